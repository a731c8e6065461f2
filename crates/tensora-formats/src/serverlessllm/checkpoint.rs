//! ServerlessLLM checkpoints: a directory with an index and partitions, or one such directory per rank.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;

use super::{
    INDEX_NAME, PADDING_LIMIT_BYTES, PARTITION_PREFIX, RANK_PREFIX, index, partition_name,
};
use crate::options::Tolerance;
use crate::safetensors::HEADER_LIMIT_BYTES;
use crate::{
    CheckpointIndex, DamagedTensors, Error, FileEntry, Format, Note, RankDirectory, Result,
    TensorEntry, file,
};

/// Opens a directory that holds `tensor_index.json`.
pub(crate) fn open_directory(root: &Path, tolerance: Tolerance) -> Result<CheckpointIndex> {
    let path = &root.join(INDEX_NAME);
    let content = file::read_index(path, HEADER_LIMIT_BYTES)?;
    let files = partitions(root, path)?;
    let sizes: Vec<u64> = files.iter().map(|file| file.bytes).collect();
    let (index, short) = index::parse(path, &content, &sizes, tolerance.duplicate_names)?;
    if !short.is_empty() && tolerance.damaged_tensors == DamagedTensors::Reject {
        return Err(Error::PartitionsTooShort {
            path: path.to_owned(),
            partitions: short,
        });
    }
    let mut notes = notes(&index.tensors);
    // A last partition that is too short has no tail.
    if index.format == Format::ServerlessLlmStore && short.is_empty() {
        notes.extend(unused_tail(&index.tensors, &files));
    }
    notes.extend(short.into_iter().map(Note::from));
    Ok(CheckpointIndex {
        format: index.format,
        root: root.to_owned(),
        notes,
        files,
        tensors: index.tensors,
        metadata: BTreeMap::new(),
        ranks: Vec::new(),
    })
}

/// The partitions of a directory in the order of their numbers, which have no gap.
fn partitions(root: &Path, index_path: &Path) -> Result<Vec<FileEntry>> {
    let names = file::list(root)?;
    let numbers = numbered(&names, PARTITION_PREFIX);
    let gap = (0u64..)
        .zip(&numbers)
        .find(|(expected, found)| expected != *found);
    if let Some((partition, _)) = gap {
        return Err(Error::MissingPartition {
            path: index_path.to_owned(),
            partition,
            tensor: None,
            partitions: numbers.len(),
        });
    }
    let entry = |number| {
        let name = partition_name(number);
        let path = root.join(&name);
        let stamp = file::data_file(&path)?;
        Ok(FileEntry {
            path,
            name,
            bytes: stamp.bytes(),
            stamp,
        })
    };
    numbers.into_iter().map(entry).collect()
}

/// The numbers, ascending, of the names that are `prefix` and a number.
fn numbered(names: &[OsString], prefix: &str) -> Vec<u64> {
    let mut numbers: Vec<u64> = names
        .iter()
        .filter_map(|name| {
            let digits = name.to_str()?.strip_prefix(prefix)?;
            let number: u64 = digits.parse().ok()?;
            // `+1` and `01` parse too, but are not how the format writes numbers.
            (number.to_string() == digits).then_some(number)
        })
        .collect();
    numbers.sort_unstable();
    numbers
}

/// What is remarkable about tensors sorted by name.
fn notes(tensors: &[TensorEntry]) -> Vec<Note> {
    let mut notes = Vec::new();
    let strided: Vec<String> = tensors
        .iter()
        .filter(|tensor| !tensor.is_contiguous())
        .map(|tensor| tensor.name.clone())
        .collect();
    if !strided.is_empty() {
        notes.push(Note::NotContiguous { tensors: strided });
    }

    let mut by_place: Vec<&TensorEntry> =
        tensors.iter().filter(|tensor| tensor.bytes > 0).collect();
    by_place.sort_by_key(|tensor| (tensor.file, tensor.offset));
    let mut reached = (0, 0);
    let mut sharing = Vec::new();
    for tensor in by_place {
        if (tensor.file, tensor.offset) < reached {
            sharing.push(tensor.name.clone());
        }
        reached = reached.max((tensor.file, tensor.range().end));
    }
    if !sharing.is_empty() {
        notes.push(Note::SharedBytes { tensors: sharing });
    }
    notes
}

/// The bytes of the last partition behind the last record, where they are more than padding.
fn unused_tail(tensors: &[TensorEntry], files: &[FileEntry]) -> Option<Note> {
    let last = files.len().checked_sub(1)?;
    let in_last = tensors.iter().filter(|tensor| tensor.file == last);
    let begin = in_last.map(|tensor| tensor.range().end).max()?;
    let bytes = files[last].bytes.saturating_sub(begin);
    (bytes > PADDING_LIMIT_BYTES).then(|| Note::UnusedTail {
        file: files[last].name.clone(),
        begin,
        bytes,
    })
}

/// The ranks among a directory's names, ascending; empty unless at least one of them holds an index.
pub(crate) fn ranks(root: &Path, names: &[OsString]) -> Vec<u32> {
    let ranks: Vec<u32> = numbered(names, RANK_PREFIX)
        .into_iter()
        .filter_map(|rank| u32::try_from(rank).ok())
        .collect();
    // Programs leave log directories of that name too.
    let holds_index = |&rank: &u32| file::exists(&root.join(rank_name(rank)).join(INDEX_NAME));
    if ranks.iter().any(holds_index) {
        ranks
    } else {
        Vec::new()
    }
}

pub(crate) fn rank_name(rank: u32) -> String {
    format!("{RANK_PREFIX}{rank}")
}

/// Opens one rank of a directory by itself.
pub(crate) fn open_rank(root: &Path, rank: u32, tolerance: Tolerance) -> Result<CheckpointIndex> {
    let directory = root.join(rank_name(rank));
    file::refuse_unfinished(&directory, tolerance.unfinished)?;
    open_directory(&directory, tolerance)
}

/// Opens the ranks of a directory side by side, each tensor's name prefixed with `rank_N/`; a single
/// rank as it is.
pub(crate) fn open_ranks(
    root: &Path,
    ranks: &[u32],
    tolerance: Tolerance,
) -> Result<CheckpointIndex> {
    let gap = (0u32..)
        .zip(ranks)
        .find(|(expected, found)| expected != *found);
    if let Some((missing, _)) = gap {
        return Err(Error::MissingRank {
            path: root.to_owned(),
            missing,
            ranks: ranks.to_owned(),
        });
    }
    if let [rank] = ranks {
        return open_rank(root, *rank, tolerance);
    }

    let mut format = None;
    let mut files = Vec::new();
    let mut tensors = Vec::new();
    let mut directories = Vec::new();
    let mut of_files = Vec::new();
    for &rank in ranks {
        let directory = rank_name(rank);
        let opened = open_rank(root, rank, tolerance)?;
        // A rank without tensors reads the same in either dialect.
        if !opened.tensors.is_empty() {
            let (first_rank, first) = *format.get_or_insert((rank, opened.format));
            if opened.format != first {
                return Err(Error::MixedRankFormats {
                    path: root.to_owned(),
                    first_rank,
                    first,
                    rank,
                    format: opened.format,
                });
            }
        }
        // The other notes are about tensors, and are taken again of all ranks together.
        let in_directory = |name: &str| format!("{directory}/{name}");
        of_files.extend(opened.notes.into_iter().filter_map(|mut note| {
            match &mut note {
                Note::UnusedTail { file, .. } => *file = in_directory(file),
                Note::Damaged { file, tensors, .. } => {
                    *file = in_directory(file);
                    for tensor in tensors {
                        tensor.name = in_directory(&tensor.name);
                    }
                }
                _ => return None,
            }
            Some(note)
        }));
        let first_file = files.len();
        files.extend(opened.files.into_iter().map(|mut file| {
            file.name = in_directory(&file.name);
            file
        }));
        tensors.extend(opened.tensors.into_iter().map(|mut tensor| {
            tensor.name = in_directory(&tensor.name);
            tensor.file += first_file;
            tensor
        }));
        directories.push(RankDirectory {
            files: first_file..files.len(),
            name: directory,
        });
    }
    tensors.sort_unstable_by(|left, right| left.name.cmp(&right.name));
    let mut notes = notes(&tensors);
    notes.append(&mut of_files);
    Ok(CheckpointIndex {
        format: format.map_or(Format::ServerlessLlmStore, |(_, format)| format),
        root: root.to_owned(),
        notes,
        files,
        tensors,
        metadata: BTreeMap::new(),
        ranks: directories,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_canonical_and_ascending() {
        let names = [
            "x_10", "x_2", "x_02", "x_+3", "x_", "x_a", "y_1", "x_0", "x_1.tmp",
        ];
        let names = names.map(OsString::from);
        assert_eq!(numbered(&names, "x_"), [0, 2, 10]);
    }
}
