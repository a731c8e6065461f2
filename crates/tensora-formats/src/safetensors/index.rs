use std::borrow::Cow;
use std::path::Path;

use serde_json::value::RawValue;

use crate::{DuplicateNames, Error, Result, json};

/// A parsed index of a SafeTensors checkpoint that consists of several files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SafetensorsIndex {
    /// The names of the files that belong to the checkpoint, sorted and unique; each is relative and
    /// stays below the index's directory.
    pub files: Vec<String>,
    /// The tensors, sorted by name, each with the position of its file in `files`.
    pub tensors: Vec<(String, usize)>,
    /// `metadata.total_size`, the bytes of all tensors together, where it is a whole number.
    pub total_bytes: Option<u64>,
}

/// Parses a `*.safetensors.index.json`.
///
/// Only the `weight_map` is required. `path` is only named in errors.
///
/// # Errors
///
/// [`Error::MissingKey`], [`Error::DuplicateKey`], [`Error::UnexpectedValue`],
/// [`Error::DuplicateTensor`] (unless the last wins), [`Error::UnsafeFileName`], or one of the errors
/// about JSON text.
pub fn parse_safetensors_index(
    path: &Path,
    index: &[u8],
    duplicate_names: DuplicateNames,
) -> Result<SafetensorsIndex> {
    let listing = parse(path, index, duplicate_names)?;
    let owned = |(name, file): (Cow<'_, str>, usize)| (name.into_owned(), file);
    Ok(SafetensorsIndex {
        files: listing.files,
        tensors: listing.tensors.into_iter().map(owned).collect(),
        total_bytes: listing.total_bytes,
    })
}

/// A [`SafetensorsIndex`] whose tensor names are parts of its text: opening a checkpoint needs each once,
/// to compare it with the name that a shard holds.
pub(super) struct Listing<'a> {
    pub(super) files: Vec<String>,
    pub(super) tensors: Vec<(Cow<'a, str>, usize)>,
    pub(super) total_bytes: Option<u64>,
}

pub(super) fn parse<'a>(
    path: &Path,
    index: &'a [u8],
    duplicate_names: DuplicateNames,
) -> Result<Listing<'a>> {
    let text = json::text(path, "index", index)?;
    let mut weight_map = None;
    let mut metadata = None;
    json::object(path, text, text, "the index", |key, value| {
        let known = match key.as_ref() {
            "weight_map" => &mut weight_map,
            "metadata" => &mut metadata,
            _ => return Ok(()),
        };
        if known.replace(value).is_none() {
            return Ok(());
        }
        Err(Error::DuplicateKey {
            path: path.to_owned(),
            key: key.into_owned(),
        })
    })?;
    let Some(weight_map) = weight_map else {
        return Err(Error::MissingKey {
            path: path.to_owned(),
            key: "weight_map",
        });
    };

    let (files, tensors) = parse_weight_map(path, text, weight_map, duplicate_names)?;
    Ok(Listing {
        files,
        tensors,
        total_bytes: match metadata {
            Some(metadata) => total_bytes(path, text, metadata)?,
            None => None,
        },
    })
}

type WeightMap<'a> = (Vec<String>, Vec<(Cow<'a, str>, usize)>);

fn parse_weight_map<'a>(
    path: &Path,
    text: &'a str,
    weight_map: &'a RawValue,
    duplicate_names: DuplicateNames,
) -> Result<WeightMap<'a>> {
    let mut entries: Vec<(Cow<'a, str>, Cow<'a, str>)> = Vec::new();
    json::object(
        path,
        text,
        weight_map.get(),
        "weight_map",
        |tensor, value| {
            if json::kind(value) != "a string" {
                return Err(Error::UnexpectedValue {
                    path: path.to_owned(),
                    key: format!("weight_map.{}", tensor.escape_debug()),
                    expected: "a file's name",
                    found: json::kind(value),
                });
            }
            entries.push((tensor, json::string(path, text, value)?));
            Ok(())
        },
    )?;
    json::sort_unique(path, &mut entries, duplicate_names)?;

    // A checkpoint has few files and many tensors, and neighbours are mostly in the same file.
    let mut files: Vec<&str> = Vec::new();
    for (tensor, file) in &entries {
        if files.last() == Some(&file.as_ref()) {
            continue;
        }
        if let Some(reason) = unsafe_reason(file) {
            return Err(Error::UnsafeFileName {
                path: path.to_owned(),
                tensor: tensor.to_string(),
                name: file.to_string(),
                reason,
            });
        }
        files.push(file);
    }
    files.sort_unstable();
    files.dedup();
    let files: Vec<String> = files.into_iter().map(str::to_owned).collect();

    let mut previous = 0;
    let mut tensors = Vec::with_capacity(entries.len());
    for (tensor, file) in entries {
        if files.get(previous).is_none_or(|name| *name != file) {
            previous = files.partition_point(|name| name.as_str() < file.as_ref());
        }
        tensors.push((tensor, previous));
    }
    Ok((files, tensors))
}

/// What is wrong with a file name that somebody else wrote; `None` if it stays below its directory.
fn unsafe_reason(name: &str) -> Option<&'static str> {
    // Both separators count on every platform: the same checkpoint must not be safe on one only.
    let separators = ['/', '\\'];
    if name.is_empty() {
        Some("is empty")
    } else if name.contains('\0') {
        Some("contains a NUL")
    } else if name.starts_with(separators) {
        Some("is absolute")
    } else if matches!(name.as_bytes(), [drive, b':', ..] if drive.is_ascii_alphabetic()) {
        Some("has a drive prefix")
    } else if name.split(separators).any(|component| component == "..") {
        Some("climbs with \"..\"")
    } else {
        None
    }
}

fn total_bytes(path: &Path, text: &str, metadata: &RawValue) -> Result<Option<u64>> {
    if json::kind(metadata) == "null" {
        return Ok(None);
    }
    let mut total_bytes = None;
    json::object(path, text, metadata.get(), "metadata", |key, value| {
        // Informative only, so that whatever else stands there is no error. Some writers make it a float.
        if key == "total_size" && total_bytes.is_none() {
            let (whole, fraction) = value.get().split_once('.').unwrap_or((value.get(), ""));
            let is_whole = fraction.bytes().all(|digit| digit == b'0');
            total_bytes = Some(whole.parse().ok().filter(|_| is_whole));
        }
        Ok(())
    })?;
    Ok(total_bytes.flatten())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_names_stay_below_their_directory() {
        for name in [
            "a.safetensors",
            "sub/a",
            "a..b",
            "...",
            "ab:c",
            "./a",
            "a b",
            "ä",
        ] {
            assert_eq!(unsafe_reason(name), None, "{name}");
        }
        for name in [
            "",
            "/a",
            "\\a",
            "\\\\server\\a",
            "C:a",
            "c:\\a",
            "..",
            "../a",
            "a/../b",
            "a\\..\\b",
            "a/..",
            "a\0b",
        ] {
            assert!(unsafe_reason(name).is_some(), "{name:?}");
        }
    }

    #[test]
    fn the_total_is_informative() {
        let parse = |metadata: &str| {
            let text = format!("{{\"metadata\": {metadata}, \"weight_map\": {{}}}}");
            parse_safetensors_index(Path::new("i"), text.as_bytes(), DuplicateNames::Reject)
                .unwrap()
                .total_bytes
        };
        assert_eq!(parse("{\"total_size\": 12}"), Some(12));
        assert_eq!(parse("{\"total_size\": 12.0}"), Some(12));
        for other in [
            "null",
            "{}",
            "{\"total_size\": 1.5}",
            "{\"total_size\": -1}",
            "{\"total_size\": \"12\"}",
            "{\"total_size\": 1e3}",
        ] {
            assert_eq!(parse(other), None, "{other}");
        }
    }

    #[test]
    fn files_are_sorted_and_the_last_of_equal_names_can_win() {
        let text = br#"{"weight_map": {"b": "z", "a": "y", "c": "x", "b": "y"}}"#;
        let index =
            parse_safetensors_index(Path::new("i"), text, DuplicateNames::LastWins).unwrap();
        assert_eq!(index.files, ["x", "y"]);
        let tensors: Vec<_> = index
            .tensors
            .iter()
            .map(|(name, file)| (name.as_str(), *file))
            .collect();
        assert_eq!(tensors, [("a", 1), ("b", 1), ("c", 0)]);
    }
}
