//! The files beside a checkpoint that are not part of it.

use std::fs;
use std::path::{Path, PathBuf};

use crate::target::is_of_weights;
use crate::{Error, Result};

/// A file to be copied as it is.
#[derive(Clone, Debug)]
pub(crate) struct Companion {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    pub(crate) bytes: u64,
}

/// The companions of the checkpoint in `root`, sorted by name: regular files, also behind symbolic
/// links, that are not hidden and hold no weights.
pub(crate) fn companions(root: &Path) -> Result<Vec<Companion>> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::Companion { path, source }
    };
    let mut found = Vec::new();
    for entry in fs::read_dir(root).map_err(failed(root))? {
        let path = entry.map_err(failed(root))?.path();
        // A name that is not UTF-8 is none that any program would look for.
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
            continue;
        };
        if name.starts_with('.') || is_of_weights(name) {
            continue;
        }
        let metadata = fs::metadata(&path).map_err(failed(&path))?;
        if metadata.is_file() {
            found.push(Companion {
                name: name.to_owned(),
                bytes: metadata.len(),
                path,
            });
        }
    }
    found.sort_by(|left, right| left.name.cmp(&right.name));
    Ok(found)
}
