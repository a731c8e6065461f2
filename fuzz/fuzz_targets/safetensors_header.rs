//! Any bytes as a header: it returns, and what it accepts covers the data without a gap.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use tensora_formats::{DuplicateNames, Error, SafetensorsHeader, parse_safetensors_header};

fn parse(
    header: &[u8],
    file_bytes: u64,
    names: DuplicateNames,
) -> Result<SafetensorsHeader, Error> {
    parse_safetensors_header(Path::new("x"), header, file_bytes, names)
}

fuzz_target!(|header: &[u8]| {
    let mut file_bytes = 8 + header.len() as u64;
    let mut last_wins = parse(header, file_bytes, DuplicateNames::LastWins);
    // Give a sound header the data that it asks for.
    if let Err(Error::Truncated { needed_bytes, .. }) = last_wins {
        file_bytes = needed_bytes;
        last_wins = parse(header, file_bytes, DuplicateNames::LastWins);
    }
    let reject = parse(header, file_bytes, DuplicateNames::Reject);
    match (last_wins, reject) {
        (Ok(last_wins), Ok(reject)) => {
            assert_eq!(last_wins, reject);
            let mut end = 8 + header.len() as u64;
            for tensor in &reject.tensors {
                assert_eq!(tensor.offset, end);
                assert_eq!(
                    tensor.dtype.bytes_for(tensor.element_count()),
                    Some(tensor.bytes)
                );
                end = tensor.range().end;
            }
            assert_eq!(end, file_bytes);
        }
        (Err(error), Err(_)) => drop(error.to_string()),
        (Ok(_), Err(error)) => assert!(matches!(error, Error::DuplicateTensor { .. }), "{error}"),
        (Err(error), Ok(_)) => panic!("refused only when the last may win: {error}"),
    }
});
