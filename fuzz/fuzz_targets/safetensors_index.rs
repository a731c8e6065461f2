//! Any bytes as an index: it returns, and every file name it accepts stays below its directory.

#![no_main]

use std::path::{Component, Path};

use libfuzzer_sys::fuzz_target;
use tensora_formats::{DuplicateNames, parse_safetensors_index};

fuzz_target!(|index: &[u8]| {
    for names in [DuplicateNames::Reject, DuplicateNames::LastWins] {
        let index = match parse_safetensors_index(Path::new("x"), index, names) {
            Ok(index) => index,
            Err(error) => {
                drop(error.to_string());
                continue;
            }
        };
        assert!(index.files.is_sorted_by(|left, right| left < right));
        assert!(
            index
                .tensors
                .is_sorted_by(|(left, _), (right, _)| left < right)
        );
        for name in &index.files {
            assert!(!name.is_empty() && !name.contains('\0'));
            let below = |part| matches!(part, Component::Normal(_) | Component::CurDir);
            assert!(Path::new(name).components().all(below), "{name:?}");
        }
        let mut used = vec![false; index.files.len()];
        for &(_, file) in &index.tensors {
            used[file] = true;
        }
        assert!(used.into_iter().all(|used| used));
    }
});
