//! The files beside a checkpoint that are not part of it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::target::{is_of_weights, nearest_existing};
use crate::{Checksums, Companions, ConversionNote, Error, Result, SIDECAR_NAME};

/// A file to be copied as it is.
#[derive(Clone, Debug)]
pub(crate) struct Companion {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    pub(crate) bytes: u64,
}

/// The companions of the checkpoint in `root`, sorted by name: regular files, also behind symbolic
/// links, that are not hidden and hold no weights.
///
/// Where they are not wanted, what cannot be examined is left out: it is in nobody's way.
pub(crate) fn companions(root: &Path, wanted: Companions) -> Result<Vec<Companion>> {
    let entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(_) if wanted == Companions::Leave => return Ok(Vec::new()),
        Err(error) => return Err(failed(root)(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let companion = entry
            .map_err(failed(root))
            .and_then(|entry| companion(&entry.path()));
        match companion {
            Ok(companion) => found.extend(companion),
            Err(_) if wanted == Companions::Leave => {}
            Err(error) => return Err(error),
        }
    }
    found.sort_by(|left, right| left.name.cmp(&right.name));
    Ok(found)
}

/// The companion at a path that was just listed; `None` if what is there is none, or is gone by now.
fn companion(path: &Path) -> Result<Option<Companion>> {
    // A name that is not UTF-8 is none that any program would look for.
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
        return Ok(None);
    };
    if name.starts_with('.') || is_of_weights(name) {
        return Ok(None);
    }
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return match fs::symlink_metadata(path) {
                // It leads nowhere: an interrupted download, which somebody misses.
                Ok(found) if found.is_symlink() => Err(failed(path)(error)),
                // Another program's temporary file, which is none of the checkpoint.
                _ => Ok(None),
            };
        }
        Err(error) => return Err(failed(path)(error)),
    };
    Ok(metadata.is_file().then(|| Companion {
        name: name.to_owned(),
        bytes: metadata.len(),
        path: path.to_owned(),
    }))
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Companion { path, source }
}

/// What else is in `root` that a user may miss beside the target, because it is never a companion.
pub(crate) fn left_behind(
    root: &Path,
    target: &Path,
    checksums: Checksums,
) -> Result<Vec<ConversionNote>> {
    // The target may be beside the source, or is going to be.
    let target = fs::canonicalize(nearest_existing(target)?).ok();
    let holds_target = |path: &Path| match (&target, fs::canonicalize(path)) {
        (Some(target), Ok(path)) => target.starts_with(path),
        _ => false,
    };
    let mut directories = Vec::new();
    // What cannot be listed cannot be named, and is in nobody's way.
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let path = entry.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
            continue;
        };
        // Those of ranks are the checkpoint.
        if !name.starts_with('.') && !is_of_weights(name) && path.is_dir() && !holds_target(&path) {
            directories.push(name.to_owned());
        }
    }
    directories.sort();
    let mut notes = Vec::new();
    if !directories.is_empty() {
        notes.push(ConversionNote::DirectoriesLeft { directories });
    }
    if checksums == Checksums::Omit && root.join(SIDECAR_NAME).is_file() {
        notes.push(ConversionNote::ChecksumsLeft);
    }
    Ok(notes)
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn what_vanished_is_none_and_a_link_to_nothing_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        fs::write(root.join("config.json"), "{}").unwrap();
        symlink("nowhere", root.join("tokenizer.json")).unwrap();
        symlink("config.json", root.join("linked.json")).unwrap();
        let found = |name: &str| companion(&root.join(name));
        assert_eq!(found("config.json").unwrap().unwrap().bytes, 2);
        assert_eq!(found("linked.json").unwrap().unwrap().bytes, 2);
        // Listed, and gone before it is looked at.
        assert!(found("config.json.tmp").unwrap().is_none());
        let error = found("tokenizer.json").unwrap_err();
        assert!(
            matches!(&error, Error::Companion { path, .. } if path.ends_with("tokenizer.json")),
            "{error}"
        );
    }

    #[test]
    fn what_is_not_wanted_need_not_be_examined() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        fs::write(root.join("config.json"), "{}").unwrap();
        symlink("nowhere", root.join("tokenizer.json")).unwrap();
        companions(root, Companions::Copy).unwrap_err();
        let left = companions(root, Companions::Leave).unwrap();
        let names: Vec<String> = left.into_iter().map(|file| file.name).collect();
        assert_eq!(names, ["config.json"]);
        let absent = root.join("absent");
        companions(&absent, Companions::Copy).unwrap_err();
        assert!(companions(&absent, Companions::Leave).unwrap().is_empty());
    }
}
