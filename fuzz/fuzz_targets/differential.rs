//! Any bytes as a whole SafeTensors file: the same answer as the reference implementation.

#![no_main]

use std::collections::BTreeMap;
use std::path::Path;

use libfuzzer_sys::fuzz_target;
use tensora_formats::{
    DuplicateNames, Error, SafetensorsHeader, parse_safetensors_header, safetensors_header_bytes,
};

fn ours(file: &[u8]) -> Result<SafetensorsHeader, Error> {
    let path = Path::new("x");
    let file_bytes = file.len() as u64;
    let header_bytes = safetensors_header_bytes(path, file, file_bytes)?;
    let header = &file[8..8 + header_bytes as usize];
    parse_safetensors_header(path, header, file_bytes, DuplicateNames::LastWins)
}

fuzz_target!(|file: &[u8]| {
    let ours = ours(file);
    // Here the reference's arithmetic overflows, which is a panic in this build.
    if matches!(
        ours,
        Err(Error::Truncated {
            needed_bytes: u64::MAX,
            ..
        })
    ) {
        return;
    }
    let theirs = safetensors::SafeTensors::read_metadata(file);
    let (ours, (header_bytes, theirs)) = match (ours, theirs) {
        (Ok(ours), Ok(theirs)) => (ours, theirs),
        (Err(_), Err(_)) => return,
        (Ok(_), Err(error)) => panic!("refused by the reference alone: {error}"),
        (Err(error), Ok(_)) => panic!("accepted by the reference alone: {error}"),
    };

    let data_start = 8 + header_bytes as u64;
    let tensors = theirs.tensors();
    assert_eq!(ours.tensors.len(), tensors.len());
    for tensor in &ours.tensors {
        let info = tensors[&tensor.name];
        let shape: Vec<u64> = info
            .shape
            .iter()
            .map(|&dimension| dimension as u64)
            .collect();
        let (begin, end) = info.data_offsets;
        assert_eq!(tensor.dtype.name(), info.dtype.to_string());
        assert_eq!(tensor.shape, shape);
        assert_eq!(
            tensor.range(),
            data_start + begin as u64..data_start + end as u64
        );
    }
    let metadata: BTreeMap<String, String> = theirs
        .metadata()
        .clone()
        .unwrap_or_default()
        .into_iter()
        .collect();
    assert_eq!(ours.metadata, metadata);
});
