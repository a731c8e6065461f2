//! Small checkpoints, written byte by byte.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use tensora_formats::{CheckpointIndex, FileEntry, TensorEntry};

/// Asserts that a result is an error of the given form whose message holds all the given texts.
macro_rules! assert_refused {
    ($result:expr, $variant:pat, $($text:expr),+ $(,)?) => {{
        let error = $result.expect_err("should be refused");
        let message = error.to_string();
        assert!(matches!(error, $variant), "{error:?}");
        $(
            let text: &str = &$text.to_string();
            assert!(message.contains(text), "{text:?} is not in: {message}");
        )+
    }};
}

pub(crate) use assert_refused;

/// A temporary directory to build a checkpoint in.
pub(crate) struct Directory(TempDir);

impl Directory {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// Writes a file, and the directories above it; returns its path.
    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }
}

/// A SafeTensors file with this header and this many bytes of data.
pub(crate) fn safetensors(header: &str, data_bytes: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.resize(file.len() + data_bytes, 0);
    file
}

/// A SafeTensors file of one-byte tensors with these names.
pub(crate) fn shard(names: &[&str]) -> Vec<u8> {
    let entries: Vec<String> = names
        .iter()
        .enumerate()
        .map(|(at, name)| {
            let end = at + 1;
            format!(r#""{name}":{{"dtype":"U8","shape":[1],"data_offsets":[{at},{end}]}}"#)
        })
        .collect();
    safetensors(&format!("{{{}}}", entries.join(",")), names.len())
}

/// An index that maps tensors to files.
pub(crate) fn index(weight_map: &[(&str, &str)]) -> String {
    let entries: Vec<String> = weight_map
        .iter()
        .map(|(tensor, file)| format!(r#""{tensor}":"{file}""#))
        .collect();
    format!(r#"{{"weight_map":{{{}}}}}"#, entries.join(","))
}

/// A tensor's entry, to be changed into any other.
pub(crate) fn entry() -> TensorEntry {
    one_tensor().tensors()[0].clone()
}

/// A file of this length, of which nothing else is known.
pub(crate) fn file(bytes: u64) -> FileEntry {
    let mut file = one_tensor().files()[0].clone();
    file.bytes = bytes;
    file
}

fn one_tensor() -> CheckpointIndex {
    let directory = Directory::new();
    let path = directory.write("model.safetensors", shard(&["t"]));
    CheckpointIndex::open(path).unwrap()
}
