//! The directory that a checkpoint is written to: what is there, and what a conversion puts there.

use std::cell::LazyCell;
use std::collections::HashSet;
use std::ffi::OsString;
use std::fs;
use std::hash::Hash;
use std::io;
use std::path::{Path, PathBuf};

use tensora_formats::{CheckpointIndex, Format, UNFINISHED_NAME};

use crate::{ConvertOptions, Error, Overwrite, Result, SIDECAR_NAME, staging};

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

/// What a conversion puts into a directory, as far as that matters to what is there.
#[derive(Clone, Debug)]
pub(crate) struct Kind {
    pub(crate) format: Format,
    /// The directories of ranks; empty unless there are several.
    pub(crate) ranks: Vec<String>,
    /// The names of the companions that are copied.
    pub(crate) companions: Vec<String>,
}

impl Kind {
    fn family(&self) -> Family {
        match self.format.is_serverlessllm() {
            false => Family::Safetensors,
            true if self.ranks.is_empty() => Family::ServerlessLlm,
            true => Family::Ranks,
        }
    }
}

/// What of a target is gone once a conversion is complete.
#[derive(Clone, Debug, Default)]
pub(crate) struct Replaced {
    /// Files, relative to the target. Not all names are UTF-8.
    pub(crate) files: Vec<PathBuf>,
    /// Directories of ranks that there are no more, relative to the target. Nothing else is in them.
    pub(crate) directories: Vec<PathBuf>,
}

/// Checks that a checkpoint of this kind may be written to `directory`, and returns what it replaces.
///
/// Whatever could keep files from getting their names is found here: later it is too late.
pub(crate) fn check_occupancy(
    directory: &Path,
    source: &CheckpointIndex,
    kind: &Kind,
    overwrite: Overwrite,
) -> Result<Replaced> {
    let mut same: Vec<PathBuf> = Vec::new();
    let mut other: Vec<PathBuf> = Vec::new();
    let mut gone: Vec<PathBuf> = Vec::new();
    for name in names(directory)? {
        // A name that is not UTF-8 ends as one that is, and holds no number.
        match Family::of_name(&name.to_string_lossy()) {
            Some(Family::Ranks) if kind.family() == Family::Ranks => {
                let rank = directory.join(&name);
                if !rank.is_dir() {
                    other.push(name.into());
                    continue;
                }
                check_rank_directory(directory, &rank)?;
                let is_gone = !kind.ranks.iter().any(|kept| name == kept.as_str());
                for file in names(&rank)? {
                    let family = Family::of_name(&file.to_string_lossy());
                    let is_checkpoint =
                        family == Some(Family::ServerlessLlm) || file == UNFINISHED_NAME;
                    let file = Path::new(&name).join(file);
                    if is_checkpoint {
                        same.push(file);
                    } else if is_gone {
                        // The directory would stay, as a rank without a checkpoint.
                        other.push(file);
                    }
                }
                if is_gone {
                    gone.push(name.into());
                }
            }
            Some(family) if family == kind.family() => same.push(name.into()),
            Some(_) => other.push(name.into()),
            // Digests of what is replaced would be wrong for what replaces it.
            None if name == SIDECAR_NAME
                || kind.companions.iter().any(|copied| name == copied.as_str()) =>
            {
                same.push(name.into());
            }
            None => {}
        }
    }
    same.sort();
    other.sort();
    if !other.is_empty() {
        return Err(Error::OtherCheckpoint {
            path: directory.to_owned(),
            files: first_names(&other),
        });
    }
    let is_occupied = !same.is_empty() || !gone.is_empty();
    if is_occupied && overwrite == Overwrite::Refuse {
        same.extend(gone);
        return Err(Error::TargetOccupied {
            path: directory.to_owned(),
            files: first_names(&same),
        });
    }
    // The marker comes and goes, whatever is replaced.
    let marker = PathBuf::from(UNFINISHED_NAME);
    check_replaceable(directory, same.iter().chain([&marker]), source)?;
    check_removable(directory, same.iter().chain(&gone).chain([&marker]))?;
    Ok(Replaced {
        files: same,
        directories: gone,
    })
}

/// The first of these, for an error.
fn first_names(paths: &[PathBuf]) -> Vec<String> {
    let first = paths.iter().take(NAMED_FILES);
    first.map(|path| path.display().to_string()).collect()
}

/// Checks that files can be put into the directory of a rank by renaming.
fn check_rank_directory(target: &Path, rank: &Path) -> Result<()> {
    let found = fs::symlink_metadata(rank).map_err(refused(rank, "access"))?;
    let refuse = |what| {
        Err(Error::NotReplaceable {
            path: rank.to_owned(),
            what,
        })
    };
    if found.is_symlink() {
        return refuse("is a symbolic link");
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let around = fs::metadata(target).map_err(refused(target, "access"))?;
        if around.dev() != found.dev() {
            return refuse("is another file system");
        }
    }
    #[cfg(not(unix))]
    let _ = target;
    // The target may be this user's and a rank in it somebody else's.
    check_writable(rank)
}

/// Checks that these are files, and none of them of the source.
fn check_replaceable<'a>(
    directory: &Path,
    files: impl Iterator<Item = &'a PathBuf>,
    source: &CheckpointIndex,
) -> Result<()> {
    let sources = LazyCell::new(|| {
        let files = source.files().iter();
        files
            .filter_map(|file| place(&file.path).ok())
            .collect::<HashSet<_>>()
    });
    for file in files {
        let path = directory.join(file);
        match fs::symlink_metadata(&path) {
            Ok(found) if found.is_dir() => {
                return Err(Error::NotReplaceable {
                    path,
                    what: "is a directory under the name of a file",
                });
            }
            Ok(found) if !found.is_symlink() => {}
            // Replacing a link leaves what it leads to.
            Ok(_) => continue,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(refused(&path, "access")(error)),
        }
        if place(&path).is_ok_and(|place| sources.contains(&place)) {
            return Err(Error::TargetIsSource {
                path: directory.to_owned(),
            });
        }
    }
    Ok(())
}

/// Checks that this user may take away what is at these paths, be it by renaming a file over it: in a sticky
/// directory, such as `/tmp`, only the owners of a file and of the directory may, and root.
#[cfg(unix)]
fn check_removable<'a>(directory: &Path, paths: impl Iterator<Item = &'a PathBuf>) -> Result<()> {
    use std::collections::HashMap;
    use std::os::unix::fs::MetadataExt;

    const STICKY: u32 = 0o1000;

    let user = rustix::process::geteuid();
    if user.is_root() {
        return Ok(());
    }
    let mut restricted: HashMap<PathBuf, bool> = HashMap::new();
    for path in paths {
        let path = directory.join(path);
        let Some(around) = path.parent() else {
            continue;
        };
        let is_restricted = match restricted.get(around) {
            Some(&known) => known,
            None => {
                let found = fs::metadata(around).map_err(refused(around, "access"))?;
                let is_restricted = found.mode() & STICKY != 0 && found.uid() != user.as_raw();
                restricted.insert(around.to_owned(), is_restricted);
                is_restricted
            }
        };
        if !is_restricted {
            continue;
        }
        match fs::symlink_metadata(&path) {
            Ok(found) if found.uid() != user.as_raw() => {
                return Err(Error::NotReplaceable {
                    path,
                    what: "belongs to another user, in a directory where only owners may replace files (sticky)",
                });
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(refused(&path, "access")(error)),
        }
    }
    Ok(())
}

#[cfg(not(unix))]
fn check_removable<'a>(_directory: &Path, _paths: impl Iterator<Item = &'a PathBuf>) -> Result<()> {
    Ok(())
}

/// What tells where `path` leads to from every other place, by whichever name, link or bind mount it is reached.
#[cfg(unix)]
fn place(path: &Path) -> io::Result<impl Eq + Hash + use<>> {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).map(|found| (found.dev(), found.ino()))
}

#[cfg(not(unix))]
fn place(path: &Path) -> io::Result<impl Eq + Hash + use<>> {
    fs::canonicalize(path)
}

/// The names in a directory.
fn names(directory: &Path) -> Result<Vec<OsString>> {
    fs::read_dir(directory)
        .and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect())
        .map_err(refused(directory, "list"))
}

/// Whether a file of this name beside a checkpoint holds weights, in whatever format, or belongs to
/// those that do.
pub(crate) fn is_of_weights(name: &str) -> bool {
    const SUFFIXES: [&str; 16] = [
        ".index.json",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".pkl",
        ".gguf",
        ".ggml",
        ".h5",
        ".hdf5",
        ".msgpack",
        ".onnx",
        ".onnx_data",
        ".npz",
        ".npy",
        ".nemo",
    ];
    let lower = name.to_ascii_lowercase();
    Family::of_name(name).is_some()
        || name == SIDECAR_NAME
        || SUFFIXES.iter().any(|suffix| lower.ends_with(suffix))
}

/// Checks the directory before anything is planned into it, and returns what its file system has free.
///
/// Whether it is occupied is not asked while a conversion is to be finished there that has begun to put
/// its files in place.
pub(crate) fn check_directory(
    directory: &Path,
    source: &CheckpointIndex,
    kind: &Kind,
    options: &ConvertOptions,
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
        if !staging::check(directory, options.unfinished)? {
            check_occupancy(directory, source, kind, options.overwrite)?;
        }
    }
    free_bytes(existing)
}

/// `path` or the nearest directory above it that exists.
pub(crate) fn nearest_existing(path: &Path) -> Result<&Path> {
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

/// Checks that no file of the source is in `directory`, whichever way either is named.
fn check_apart(directory: &Path, source: &CheckpointIndex) -> Result<()> {
    let here = place(directory).map_err(refused(directory, "access"))?;
    let is_here = |path: &Path| place(path).is_ok_and(|place| place == here);
    // A source opened through symbolic links is in two places.
    let holds_file = source.files().iter().any(|file| {
        let real = fs::canonicalize(&file.path).ok();
        let parents = [Some(&*file.path), real.as_deref()].map(|path| path.and_then(Path::parent));
        parents.into_iter().flatten().any(is_here)
    });
    if is_here(source.root()) || holds_file {
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

/// Makes created, renamed and removed names survive a crash.
#[cfg(unix)]
pub(crate) fn sync_directory(directory: &Path) -> Result<()> {
    use rustix::fs::OFlags;
    use std::os::unix::fs::OpenOptionsExt;
    #[cfg(test)]
    SYNCED.with_borrow_mut(|synced| synced.push(directory.to_owned()));
    // What is no directory any more is an error; a pipe would block whoever opens it.
    fs::OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::DIRECTORY.bits().cast_signed())
        .open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(refused(directory, "sync"))
}

#[cfg(all(test, unix))]
thread_local! {
    /// What this thread has synced, for tests: nothing but a crash shows it otherwise.
    pub(crate) static SYNCED: std::cell::RefCell<Vec<PathBuf>> = const { std::cell::RefCell::new(Vec::new()) };
}

/// Elsewhere a directory cannot be opened as a file.
#[cfg(not(unix))]
pub(crate) fn sync_directory(_directory: &Path) -> Result<()> {
    Ok(())
}
