//! SafeTensors checkpoints: one file, an index with its shards, or a directory without an index.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use super::index::{self, Listing};
use super::{
    FILE_SUFFIX, HEADER_LIMIT_BYTES, LENGTH_BYTES, SafetensorsHeader, parse_safetensors_header,
    safetensors_header_bytes,
};
use crate::file::{self, RegularFile};
use crate::options::Tolerance;
use crate::{
    CheckpointIndex, DuplicateNames, Error, FileEntry, FileStamp, Format, Note, Result,
    TensorEntry, UnlistedTensors,
};

/// A checkpoint of files that have been read one after the other.
struct Files {
    files: Vec<FileEntry>,
    metadata: BTreeMap<String, String>,
    notes: Vec<Note>,
    /// How many values of `__metadata__` were dropped without a note of their own.
    dropped_values: u64,
}

/// How many keys of `__metadata__` have their conflict told. A header can hold millions.
const TOLD_CONFLICTS: usize = 16;

impl Files {
    fn new() -> Self {
        Self {
            files: Vec::new(),
            metadata: BTreeMap::new(),
            notes: Vec::new(),
            dropped_values: 0,
        }
    }

    /// Reads the header of the next file, takes note of the file and returns its tensors.
    fn read(
        &mut self,
        path: PathBuf,
        name: &OsStr,
        duplicate_names: DuplicateNames,
    ) -> Result<Vec<TensorEntry>> {
        let name = file::shown(name);
        let (header, stamp) = read_header(&path, duplicate_names)?;
        for (key, value) in header.metadata {
            match self.metadata.get(&key) {
                None => {
                    self.metadata.insert(key, value);
                }
                Some(kept) if *kept != value => self.note_conflict(key, value, &name),
                Some(_) => {}
            }
        }
        let file = self.files.len();
        self.files.push(FileEntry {
            path,
            name,
            bytes: stamp.bytes(),
            stamp,
        });
        let mut tensors = header.tensors;
        for tensor in &mut tensors {
            tensor.file = file;
        }
        Ok(tensors)
    }

    /// Takes note of the first conflict about a key; a hundred shards need not repeat it. Counts those
    /// about further keys.
    fn note_conflict(&mut self, key: String, dropped: String, file: &str) {
        let known = self
            .notes
            .iter()
            .any(|note| matches!(note, Note::MetadataConflict { key: known, .. } if *known == key));
        if known {
            return;
        }
        if self.notes.len() >= TOLD_CONFLICTS {
            self.dropped_values += 1;
        } else if let Some(kept) = self.metadata.get(&key) {
            self.notes.push(Note::MetadataConflict {
                kept: kept.clone(),
                file: file.to_owned(),
                key,
                dropped,
            });
        }
    }

    fn finish(mut self, root: &Path, mut tensors: Vec<TensorEntry>) -> CheckpointIndex {
        if self.dropped_values > 0 {
            self.notes.push(Note::MoreMetadataConflicts {
                values: self.dropped_values,
            });
        }
        // Merges runs in linear time, and shards consist of few. Stable, so that of equal names the one
        // in the first file comes first.
        tensors.sort_by(|left, right| left.name.cmp(&right.name));
        CheckpointIndex {
            format: Format::Safetensors,
            root: root.to_owned(),
            files: self.files,
            tensors,
            metadata: self.metadata,
            notes: self.notes,
            ranks: Vec::new(),
        }
    }
}

/// Reads and parses the header of one file; also returns which file that was.
fn read_header(
    path: &Path,
    duplicate_names: DuplicateNames,
) -> Result<(SafetensorsHeader, FileStamp)> {
    let mut file = RegularFile::open(path)?;
    let start = file.read(LENGTH_BYTES)?;
    let header_bytes = safetensors_header_bytes(path, &start, file.bytes)
        .map_err(|refusal| file::explain(path, refusal))?;
    let header = file.read(header_bytes)?;
    let header = parse_safetensors_header(path, &header, file.bytes, duplicate_names)?;
    Ok((header, file.stamp))
}

/// Opens one file as a whole checkpoint.
pub(crate) fn open_file(
    root: &Path,
    path: &Path,
    name: &OsStr,
    tolerance: Tolerance,
) -> Result<CheckpointIndex> {
    let mut files = Files::new();
    let tensors = files.read(path.to_owned(), name, tolerance.duplicate_names)?;
    Ok(files.finish(root, tensors))
}

/// Opens the shards that an index lists.
pub(crate) fn open_indexed(
    root: &Path,
    index_name: &OsStr,
    tolerance: Tolerance,
) -> Result<CheckpointIndex> {
    let path = &root.join(index_name);
    let content = file::read_index(path, HEADER_LIMIT_BYTES)?;
    let index = index::parse(path, &content, tolerance.duplicate_names)?;

    let left_alone: Vec<String> = data_files(&file::list(root)?)
        .map(file::shown)
        .filter(|name| index.files.binary_search(name).is_err())
        .collect();
    if index.tensors.is_empty() && !left_alone.is_empty() {
        return Err(Error::EmptyWeightMap {
            path: path.to_owned(),
            files: left_alone,
        });
    }

    refuse_files_outside(root, path, &index)?;

    // All that are missing at once, before any is read: they are downloaded again together.
    let missing: Vec<String> = index
        .files
        .iter()
        .filter(|name| !file::exists(&root.join(name)))
        .cloned()
        .collect();
    if !missing.is_empty() {
        return Err(Error::MissingShards {
            path: path.to_owned(),
            missing,
        });
    }

    let mut files = Files::new();
    let mut listed = Listed::new(&index);
    for name in &index.files {
        listed.add(files.read(root.join(name), name.as_ref(), tolerance.duplicate_names)?);
    }
    let (tensors, unlisted) = listed.finish(path)?;
    if !unlisted.is_empty() {
        match tolerance.unlisted_tensors {
            UnlistedTensors::Reject => {
                return Err(Error::UnlistedTensors {
                    path: path.to_owned(),
                    tensors: unlisted,
                });
            }
            UnlistedTensors::Ignore => {
                files.notes.push(Note::TensorsIgnored { tensors: unlisted });
            }
        }
    }

    let actual_bytes = crate::index::data_bytes(&tensors);
    if let Some(stated_bytes) = index.total_bytes
        && stated_bytes != actual_bytes
    {
        files.notes.push(Note::TotalSizeDiffers {
            index: file::shown(index_name),
            stated_bytes,
            actual_bytes,
        });
    }
    if !left_alone.is_empty() {
        files.notes.push(Note::FilesLeftAlone { files: left_alone });
    }
    Ok(files.finish(root, tensors))
}

/// Makes sure that no sub-directory in a file name is a symbolic link that leads out of `root`.
///
/// A file itself may be a link, because Hugging Face caches consist of them: whoever wrote the
/// directory chose its target. A linked directory would let the index choose any file below it.
fn refuse_files_outside(root: &Path, path: &Path, index: &Listing<'_>) -> Result<()> {
    let mut canonical_root = None;
    let mut checked = BTreeSet::new();
    for (file, name) in index.files.iter().enumerate() {
        let Some(parent) = Path::new(name).parent() else {
            continue;
        };
        if parent == Path::new("") || !checked.insert(parent) {
            continue;
        }
        let canonical_root = match &canonical_root {
            Some(known) => known,
            None => canonical_root.insert(file::canonical(root)?),
        };
        let parent = root.join(parent);
        // What is not there is told with the other missing shards.
        if !file::exists(&parent) || file::canonical(&parent)?.starts_with(canonical_root) {
            continue;
        }
        let tensor = index.tensors.iter().find(|(_, holder)| *holder == file);
        return Err(Error::UnsafeFileName {
            path: path.to_owned(),
            tensor: tensor.map(|(name, _)| name.to_string()).unwrap_or_default(),
            name: name.clone(),
            reason: "leads out of the index's directory through a symbolic link",
        });
    }
    Ok(())
}

/// Divides the tensors that the shards hold into those that the index lists and the rest.
struct Listed<'a> {
    index: &'a Listing<'a>,
    /// By position in the index, and so sorted by name: the tensor, once met where it belongs.
    tensors: Vec<Option<TensorEntry>>,
    /// By position in the index: where else the tensor was met first.
    elsewhere: HashMap<usize, usize>,
    unlisted: Vec<String>,
    /// The position after that of the tensor met last.
    next: usize,
}

impl<'a> Listed<'a> {
    fn new(index: &'a Listing<'a>) -> Self {
        let mut tensors = Vec::new();
        tensors.resize_with(index.tensors.len(), || None);
        Self {
            index,
            tensors,
            elsewhere: HashMap::new(),
            unlisted: Vec::new(),
            next: 0,
        }
    }

    /// Adds the tensors that a shard holds.
    fn add(&mut self, stored: Vec<TensorEntry>) {
        let listed = &self.index.tensors;
        for tensor in stored {
            let Some(position) = position_from(listed, self.next, &tensor.name) else {
                self.unlisted.push(tensor.name);
                continue;
            };
            self.next = position + 1;
            if listed[position].1 == tensor.file {
                self.tensors[position] = Some(tensor);
            } else {
                self.elsewhere.entry(position).or_insert(tensor.file);
            }
        }
    }

    /// Makes sure that each listed tensor was in its shard and in no other; returns the tensors, sorted by
    /// name, and the names of those that are not listed.
    fn finish(self, path: &Path) -> Result<(Vec<TensorEntry>, Vec<String>)> {
        let index = self.index;
        let is_absent = |&position: &usize| self.tensors[position].is_none();
        let mut absent = (0..self.tensors.len()).filter(is_absent);
        if let Some(position) = absent.next() {
            let (tensor, file) = &index.tensors[position];
            return Err(Error::TensorNotInShard {
                path: path.to_owned(),
                tensor: tensor.to_string(),
                shard: index.files[*file].clone(),
                found_in: self
                    .elsewhere
                    .get(&position)
                    .map(|&file| index.files[file].clone()),
                others: absent.count(),
            });
        }
        // The smallest, so that the message is the same every time.
        if let Some((&position, &second)) = self.elsewhere.iter().min() {
            let (tensor, first) = &index.tensors[position];
            return Err(Error::TensorInTwoShards {
                path: path.to_owned(),
                tensor: tensor.to_string(),
                first: index.files[*first].clone(),
                second: index.files[second].clone(),
            });
        }
        Ok((self.tensors.into_iter().flatten().collect(), self.unlisted))
    }
}

/// Where `name` is in a sorted list.
///
/// Finds it with few comparisons if it is soon after the position `next`: a shard is a few runs that are
/// sorted like the list, one for each dtype.
fn position_from<T>(listed: &[(Cow<'_, str>, T)], next: usize, name: &str) -> Option<usize> {
    let compare = |entry: &(Cow<'_, str>, T)| entry.0.as_ref().cmp(name);
    let (before, after) = listed.split_at_checked(next)?;
    if after.first().is_none_or(|first| compare(first).is_gt()) {
        return before.binary_search_by(compare).ok();
    }
    let mut reach = 1;
    while after.get(reach).is_some_and(|entry| compare(entry).is_le()) {
        reach *= 2;
    }
    let begin = reach / 2;
    let window = after.get(begin..reach.min(after.len()))?;
    let found = window.binary_search_by(compare).ok()?;
    Some(next + begin + found)
}

/// Opens all SafeTensors files of a directory that has no index.
pub(crate) fn open_unindexed(
    root: &Path,
    names: &[OsString],
    tolerance: Tolerance,
) -> Result<CheckpointIndex> {
    let names: Vec<&OsStr> = data_files(names).collect();
    let missing = missing_by_number(names.iter().filter_map(|name| name.to_str()));
    if !missing.is_empty() {
        return Err(Error::MissingShards {
            path: root.to_owned(),
            missing,
        });
    }

    let mut files = Files::new();
    let mut tensors: Vec<TensorEntry> = Vec::new();
    for name in &names {
        tensors.append(&mut files.read(root.join(name), name, tolerance.duplicate_names)?);
    }
    let index = files.finish(root, tensors);
    for pair in index.tensors.windows(2) {
        if let [first, second] = pair
            && first.name == second.name
        {
            return Err(Error::TensorInTwoFiles {
                path: root.to_owned(),
                tensor: first.name.clone(),
                first: file::shown(names[first.file]),
                second: file::shown(names[second.file]),
            });
        }
    }
    Ok(index)
}

/// The data files among a directory's names.
pub(crate) fn data_files(names: &[OsString]) -> impl Iterator<Item = &OsStr> {
    names
        .iter()
        .map(OsString::as_os_str)
        .filter(|name| file::is_visible_with_suffix(name, FILE_SUFFIX))
}

/// How many missing shards are listed where nothing but a number in a name says that there are more.
const LISTED_MISSING: usize = 10_000;

/// The shards that the others' numbering (`model-00002-of-00003.safetensors`) says there should be.
///
/// Without an index nothing else tells a partial download from a whole one.
fn missing_by_number<'a>(names: impl Iterator<Item = &'a str>) -> Vec<String> {
    // By what is the same in all names of a set: text before, digits of the number, total as text.
    let mut sets: BTreeMap<(&str, usize, &str), BTreeSet<u64>> = BTreeMap::new();
    for name in names {
        if let Some((before, number, total)) = numbered(name)
            && let Ok(parsed) = number.parse()
        {
            sets.entry((before, number.len(), total))
                .or_default()
                .insert(parsed);
        }
    }
    let mut missing = Vec::new();
    for ((before, digits, total), present) in sets {
        let count = total.parse::<u64>().unwrap_or(0);
        // Most writers count from 1, some from 0.
        let first = u64::from(!present.contains(&0));
        let absent =
            (first..first.saturating_add(count)).filter(|number| !present.contains(number));
        // A total far above what is there is no reason to list a billion names.
        missing.extend(
            absent
                .map(|number| format!("{before}-{number:0digits$}-of-{total}{FILE_SUFFIX}"))
                .take(LISTED_MISSING - missing.len()),
        );
    }
    missing
}

/// Splits `before-00001-of-00003.safetensors`.
fn numbered(name: &str) -> Option<(&str, &str, &str)> {
    let stem = name.strip_suffix(FILE_SUFFIX)?;
    let (rest, total) = stem.rsplit_once("-of-")?;
    let (before, number) = rest.rsplit_once('-')?;
    let all_digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    (all_digits(number) && all_digits(total)).then_some((before, number, total))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(names: &[&str]) -> Vec<String> {
        missing_by_number(names.iter().copied())
    }

    #[test]
    fn a_name_is_found_from_every_position() {
        for length in 0..40u64 {
            // Every second name is absent.
            let listed: Vec<(Cow<'_, str>, ())> = (0..length)
                .map(|number| (format!("{:03}", 2 * number + 1).into(), ()))
                .collect();
            for sought in 0..=2 * length {
                let name = format!("{sought:03}");
                let expected = listed.iter().position(|(listed, ())| *listed == name);
                for next in 0..=listed.len() {
                    assert_eq!(position_from(&listed, next, &name), expected);
                }
            }
        }
    }

    #[test]
    fn numbered_names_tell_what_is_missing() {
        assert_eq!(
            missing(&[
                "m-00001-of-00003.safetensors",
                "m-00003-of-00003.safetensors"
            ]),
            ["m-00002-of-00003.safetensors"]
        );
        assert_eq!(
            missing(&["m-00000-of-00002.safetensors", "x-1-of-1.safetensors"]),
            ["m-00001-of-00002.safetensors"]
        );
        assert_eq!(
            missing(&["m-00001-of-000002.safetensors"]),
            ["m-00002-of-000002.safetensors"]
        );
        assert_eq!(
            missing(&[
                "model.safetensors",
                "a-of-b.safetensors",
                "one-of-2.safetensors",
                "-1-of-1.safetensors",
            ]),
            [""; 0]
        );
    }
}
