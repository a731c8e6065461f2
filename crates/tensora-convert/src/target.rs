//! The directory that a checkpoint is written to: what is there, and what a conversion puts there.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use tensora_formats::{CheckpointIndex, Format};

use crate::{Error, Overwrite, Result};

/// What the names of files end in until all of them are complete. They also begin with a dot, so that
/// no reader takes them for a checkpoint's files.
const TEMPORARY_SUFFIX: &str = ".tensora-convert";

/// How many files an error names.
const NAMED_FILES: usize = 4;

/// The operation on the target that the operating system refused, as an [`Error::Target`].
pub(crate) fn refused(path: &Path, operation: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Target {
        operation,
        path: path.to_owned(),
        source,
    }
}

/// The two format families, whose files have different names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    Safetensors,
    ServerlessLlm,
    /// Directories of ServerlessLLM checkpoints.
    Ranks,
}

impl Family {
    fn of_format(format: Format) -> Self {
        if format.is_serverlessllm() {
            Self::ServerlessLlm
        } else {
            Self::Safetensors
        }
    }

    /// The family in which a file or directory of this name belongs to a checkpoint.
    fn of_name(name: &str) -> Option<Self> {
        let numbered = |prefix| {
            name.strip_prefix(prefix)
                .is_some_and(|number: &str| number.parse::<u64>().is_ok())
        };
        if name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json") {
            Some(Self::Safetensors)
        } else if name == "tensor_index.json" || numbered("tensor.data_") {
            Some(Self::ServerlessLlm)
        } else if numbered("rank_") {
            Some(Self::Ranks)
        } else {
            None
        }
    }
}

/// Checks that a checkpoint of this format may be written to `directory`, and returns the names of
/// the files there that it replaces.
pub(crate) fn check_occupancy(
    directory: &Path,
    format: Format,
    overwrite: Overwrite,
) -> Result<Vec<String>> {
    let mut same = Vec::new();
    let mut other = Vec::new();
    for entry in fs::read_dir(directory).map_err(refused(directory, "list"))? {
        let name = entry.map_err(refused(directory, "list"))?.file_name();
        let name = name.to_string_lossy();
        match Family::of_name(&name) {
            Some(family) if family == Family::of_format(format) => same.push(name.into_owned()),
            Some(_) => other.push(name.into_owned()),
            None => {}
        }
    }
    same.sort();
    other.sort();
    if !other.is_empty() {
        other.truncate(NAMED_FILES);
        return Err(Error::OtherCheckpoint {
            path: directory.to_owned(),
            files: other,
        });
    }
    if !same.is_empty() && overwrite == Overwrite::Refuse {
        same.truncate(NAMED_FILES);
        return Err(Error::TargetOccupied {
            path: directory.to_owned(),
            files: same,
        });
    }
    Ok(same)
}

/// Checks the directory before anything is planned into it, and returns what its file system has free.
pub(crate) fn check_directory(
    directory: &Path,
    source: &CheckpointIndex,
    format: Format,
    overwrite: Overwrite,
) -> Result<Option<u64>> {
    let existing = nearest_existing(directory)?;
    let metadata = fs::metadata(existing).map_err(refused(existing, "access"))?;
    if !metadata.is_dir() {
        return Err(Error::NotADirectory {
            path: existing.to_owned(),
        });
    }
    check_writable(existing)?;
    if existing == directory {
        check_apart(directory, source)?;
        check_occupancy(directory, format, overwrite)?;
        check_left_over(directory)?;
    }
    free_bytes(existing)
}

/// `path` or the nearest directory above it that exists.
fn nearest_existing(path: &Path) -> Result<&Path> {
    for ancestor in path.ancestors() {
        let ancestor = or_current(ancestor);
        match fs::symlink_metadata(ancestor) {
            Ok(_) => return Ok(ancestor),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // A file on the way, which the system reports for the path below it.
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => {}
            Err(error) => return Err(refused(ancestor, "access")(error)),
        }
    }
    Ok(path)
}

/// The current directory for the empty path, which is what is above a relative path's first component.
pub(crate) fn or_current(path: &Path) -> &Path {
    if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    }
}

/// Checks that no conversion is under way in `directory`, or was killed there.
fn check_left_over(directory: &Path) -> Result<()> {
    for entry in fs::read_dir(directory).map_err(refused(directory, "list"))? {
        let path = entry.map_err(refused(directory, "list"))?.path();
        if path.to_string_lossy().ends_with(TEMPORARY_SUFFIX) {
            return Err(Error::LeftOver { path });
        }
    }
    Ok(())
}

/// Checks that no file of the source is in `directory`, whichever way either is named.
fn check_apart(directory: &Path, source: &CheckpointIndex) -> Result<()> {
    let canonical = fs::canonicalize(directory).map_err(refused(directory, "resolve"))?;
    let is_source = |path: &Path| fs::canonicalize(path).is_ok_and(|path| path == canonical);
    // A source opened through symbolic links is in two places.
    let holds_file = source.files().iter().any(|file| {
        let real = fs::canonicalize(&file.path).ok();
        file.path.parent().is_some_and(is_source)
            || real.as_deref().and_then(Path::parent) == Some(&canonical)
    });
    if is_source(source.root()) || holds_file {
        return Err(Error::TargetIsSource {
            path: directory.to_owned(),
        });
    }
    Ok(())
}

#[cfg(unix)]
fn check_writable(directory: &Path) -> Result<()> {
    use rustix::fs::{Access, access};
    access(directory, Access::WRITE_OK | Access::EXEC_OK)
        .map_err(|errno| refused(directory, "write to the directory")(errno.into()))
}

#[cfg(not(unix))]
fn check_writable(_directory: &Path) -> Result<()> {
    Ok(())
}

/// What the file system of `path` has free for this user, in bytes, where it says so.
#[cfg(unix)]
pub(crate) fn free_bytes(path: &Path) -> Result<Option<u64>> {
    let facts = rustix::fs::statvfs(path)
        .map_err(|errno| refused(path, "ask for the free space of")(errno.into()))?;
    Ok(facts.f_bavail.checked_mul(facts.f_frsize))
}

#[cfg(not(unix))]
pub(crate) fn free_bytes(_path: &Path) -> Result<Option<u64>> {
    Ok(None)
}

/// How large this process may make a file, in bytes; `None` when unlimited or unknown.
#[cfg(unix)]
pub(crate) fn file_size_limit_bytes() -> Option<u64> {
    rustix::process::getrlimit(rustix::process::Resource::Fsize).current
}

#[cfg(not(unix))]
pub(crate) fn file_size_limit_bytes() -> Option<u64> {
    None
}

/// Files under temporary names, which all get their own names or none. Whatever has not been
/// committed when this is dropped is removed.
#[derive(Debug)]
pub(crate) struct Staging {
    directory: PathBuf,
    /// Directories that did not exist before, outermost first.
    created: Vec<PathBuf>,
    /// The final names of the files staged so far.
    staged: Vec<String>,
    /// How many of them, from the first on, have got their names.
    renamed: usize,
    committed: bool,
}

impl Staging {
    /// Creates `directory` where it does not exist.
    pub(crate) fn new(directory: &Path) -> Result<Self> {
        let mut staging = Self {
            directory: directory.to_owned(),
            created: Vec::new(),
            staged: Vec::new(),
            renamed: 0,
            committed: false,
        };
        let existing = nearest_existing(directory)?;
        let mut missing: Vec<&Path> = directory
            .ancestors()
            .take_while(|&ancestor| ancestor != existing && !ancestor.as_os_str().is_empty())
            .collect();
        missing.reverse();
        for path in missing {
            match fs::create_dir(path) {
                Ok(()) => staging.created.push(path.to_owned()),
                // Somebody else was faster, or the path goes through `..`.
                Err(_) if path.is_dir() => {}
                Err(error) => return Err(refused(path, "create")(error)),
            }
        }
        Ok(staging)
    }

    /// Creates a file that is to be called `name`, and returns it with its temporary path.
    pub(crate) fn create(&mut self, name: &str) -> Result<(File, PathBuf)> {
        let path = temporary_path(&self.directory, name);
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(file) => {
                self.staged.push(name.to_owned());
                Ok((file, path))
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(Error::LeftOver { path })
            }
            Err(error) => Err(refused(&path, "create")(error)),
        }
    }

    /// Gives all files their names in the order in which they were created, the last one after the
    /// others are safe on the device. `replaced` are the names of files that are to be gone then.
    pub(crate) fn commit(mut self, replaced: &[String]) -> Result<()> {
        // As long as the old index is there, the directory passes for the old checkpoint. The
        // last file is what a reader recognises the new one by.
        let last = self.staged.last();
        let mut stale: Vec<&String> = replaced
            .iter()
            .filter(|&name| last == Some(name) || !self.staged.contains(name))
            .collect();
        stale.sort_by_key(|name| !name.ends_with(".json"));
        for name in stale {
            let path = self.directory.join(name);
            fs::remove_file(&path).map_err(refused(&path, "remove"))?;
            sync_directory(&self.directory)?;
        }

        while let Some(name) = self.staged.get(self.renamed) {
            if self.renamed + 1 == self.staged.len() {
                sync_directory(&self.directory)?;
            }
            let path = self.directory.join(name);
            fs::rename(temporary_path(&self.directory, name), &path)
                .map_err(refused(&path, "rename a temporary file to"))?;
            self.renamed += 1;
        }
        sync_directory(&self.directory)?;
        for parent in self.created.iter().filter_map(|path| path.parent()) {
            sync_directory(or_current(parent))?;
        }
        self.committed = true;
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        for (position, name) in self.staged.iter().enumerate() {
            let path = if position < self.renamed {
                self.directory.join(name)
            } else {
                temporary_path(&self.directory, name)
            };
            if let Err(error) = fs::remove_file(&path) {
                tracing::warn!(path = %path.display(), %error, "could not remove an incomplete file");
            }
        }
        for path in self.created.iter().rev() {
            // Somebody else's files may be in it by now; then it stays.
            let _ = fs::remove_dir(path);
        }
    }
}

/// Where a file is until it gets its name.
pub(crate) fn temporary_path(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!(".{name}{TEMPORARY_SUFFIX}"))
}

/// Makes created, renamed and removed names survive a crash.
#[cfg(unix)]
fn sync_directory(directory: &Path) -> Result<()> {
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(refused(directory, "sync"))
}

/// Elsewhere a directory cannot be opened as a file.
#[cfg(not(unix))]
fn sync_directory(_directory: &Path) -> Result<()> {
    Ok(())
}
