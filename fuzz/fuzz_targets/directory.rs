//! Any bytes as a small tree of files, links and directories: opening it returns, whatever is asked for,
//! and what is accepted is sound.
//!
//! The input is a list of pieces: a byte that chooses a path, a byte that says what to put there, two bytes
//! of length, little-endian, and as many bytes of content.

#![no_main]

use std::fs;
use std::path::{Path, PathBuf};

use libfuzzer_sys::fuzz_target;
use tensora_formats::{
    CheckpointIndex, DamagedTensors, DuplicateNames, Error, Format, OpenOptions, UNFINISHED_NAME,
    UnfinishedCheckpoint, UnlistedTensors,
};

const PATHS: [&str; 24] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "other.safetensors.index.json",
    "a.safetensors",
    "b.safetensors",
    "sub/a.safetensors",
    "sub",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "tensor_index.json",
    "tensor.data_0",
    "tensor.data_1",
    "tensor.data_2",
    "rank_0/tensor_index.json",
    "rank_0/tensor.data_0",
    "rank_1/tensor_index.json",
    "rank_1/tensor.data_0",
    "rank_1",
    "refs/main",
    "snapshots/a/model.safetensors",
    "snapshots/b/tensor_index.json",
    UNFINISHED_NAME,
    "rank_1/.tensora-unfinished",
    "pytorch_model.bin",
];

/// Where links lead.
const TARGETS: [&str; 8] = [
    ".",
    "..",
    "/dev/null",
    "nowhere",
    "a.safetensors",
    "tensor.data_0",
    "rank_0",
    "sub/../sub",
];

/// Builds the tree; what cannot be put somewhere is left out.
fn build(root: &Path, mut input: &[u8]) {
    while let Some((&[path, kind, low, high], rest)) = input.split_first_chunk() {
        let length = usize::from(u16::from_le_bytes([low, high])).min(rest.len());
        let (content, rest) = rest.split_at(length);
        input = rest;
        let path = root.join(PATHS[usize::from(path) % PATHS.len()]);
        if let Some(parent) = path.parent() {
            let _ = fs::create_dir_all(parent);
        }
        let _ = match kind % 8 {
            // A SafeTensors file: the first byte says how much data follows the header.
            0..3 => {
                let (data, header) = content.split_first().unwrap_or((&0, &[]));
                let mut file = (header.len() as u64).to_le_bytes().to_vec();
                file.extend_from_slice(header);
                file.resize(file.len() + usize::from(*data), 0);
                fs::write(path, file)
            }
            // The content as it is.
            3..6 => fs::write(path, content),
            6 => fs::create_dir(path),
            _ => {
                let choice = content.first().map_or(0, |&first| usize::from(first));
                std::os::unix::fs::symlink(TARGETS[choice % TARGETS.len()], path)
            }
        };
    }
}

/// Checks that an index is true of the files that it names.
fn check(index: &CheckpointIndex) {
    for file in index.files() {
        let metadata = fs::metadata(&file.path).expect("a file of an index is there");
        assert!(metadata.is_file());
        assert_eq!(metadata.len(), file.bytes);
    }
    assert!(
        index
            .tensors()
            .is_sorted_by(|left, right| left.name < right.name)
    );
    for tensor in index.tensors() {
        assert!(tensor.range().end <= index.files()[tensor.file].bytes);
        match &tensor.strides {
            None => assert_eq!(
                tensor.dtype.bytes_for(tensor.element_count()),
                Some(tensor.bytes)
            ),
            Some(strides) => {
                let last: u64 = tensor
                    .shape
                    .iter()
                    .zip(strides)
                    .map(|(dimension, stride)| (dimension - 1) * stride)
                    .sum();
                assert!((last + 1) * u64::from(tensor.dtype.bits()) <= 8 * tensor.bytes);
            }
        }
    }
    let mut next = 0;
    for rank in index.ranks() {
        assert_eq!(rank.files.start, next);
        next = rank.files.end;
        for file in &index.files()[rank.files.clone()] {
            assert!(file.name.starts_with(&format!("{}/", rank.name)));
        }
    }
    assert!(index.ranks().is_empty() || next == index.files().len());
    for note in index.notes() {
        assert!(note.to_string().len() < 20_000);
    }
}

fn open(options: &OpenOptions, path: &Path) -> Option<CheckpointIndex> {
    match options.open(path) {
        Ok(index) => {
            check(&index);
            Some(index)
        }
        Err(error) => {
            assert!(error.to_string().len() < 20_000);
            None
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let root: PathBuf = std::env::temp_dir().join(format!("tensora-fuzz-{}", std::process::id()));
    let _ = fs::remove_dir_all(&root);
    fs::create_dir(&root).expect("a directory to build in");
    build(&root, input);

    let strict = OpenOptions::new();
    let tolerant = OpenOptions::new()
        .unlisted_tensors(UnlistedTensors::Ignore)
        .duplicate_names(DuplicateNames::LastWins)
        .damaged_tensors(DamagedTensors::LeaveOut)
        .unfinished(UnfinishedCheckpoint::Open);
    for options in [strict, tolerant.clone()] {
        for &format in Format::ALL {
            open(&options.clone().format(format), &root);
        }
        for rank in [0, 1, 7] {
            open(&options.clone().rank(rank), &root);
        }
        for path in PATHS {
            open(&options, &root.join(path));
        }
    }
    if root.join(UNFINISHED_NAME).symlink_metadata().is_ok() {
        let refused = CheckpointIndex::open(&root);
        assert!(matches!(refused, Err(Error::Unfinished { .. })));
    }
    // Tolerance changes nothing about what needs none.
    if let Some(index) = open(&OpenOptions::new(), &root) {
        assert_eq!(open(&tolerant, &root), Some(index));
    }
    let _ = fs::remove_dir_all(&root);
});
