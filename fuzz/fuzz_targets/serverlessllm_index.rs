//! Any bytes as partition sizes and an index of either dialect: it returns, and the ranges that it
//! accepts lie inside their partitions.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use tensora_formats::{DuplicateNames, parse_serverlessllm_index};

fuzz_target!(|input: &[u8]| {
    // The first byte says how many partitions, two bytes each say how long; then comes the index.
    let Some((&count, rest)) = input.split_first() else {
        return;
    };
    let Some((sizes, index)) = rest.split_at_checked(2 * usize::from(count % 4)) else {
        return;
    };
    let sizes: Vec<u64> = sizes
        .chunks_exact(2)
        .map(|size| u64::from(u16::from_le_bytes([size[0], size[1]])))
        .collect();
    for names in [DuplicateNames::Reject, DuplicateNames::LastWins] {
        let index = match parse_serverlessllm_index(Path::new("x"), index, &sizes, names) {
            Ok(index) => index,
            Err(error) => {
                drop(error.to_string());
                continue;
            }
        };
        assert!(
            index
                .tensors
                .is_sorted_by(|left, right| left.name < right.name)
        );
        for tensor in &index.tensors {
            assert!(tensor.range().end <= sizes[tensor.file]);
            let Some(strides) = &tensor.strides else {
                assert_eq!(
                    tensor.dtype.bytes_for(tensor.element_count()),
                    Some(tensor.bytes)
                );
                continue;
            };
            // The last element of a view is inside its storage.
            let last: u64 = tensor
                .shape
                .iter()
                .zip(strides)
                .map(|(d, s)| (d - 1) * s)
                .sum();
            assert!((last + 1) * u64::from(tensor.dtype.bits()) <= 8 * tensor.bytes);
        }
    }
});
