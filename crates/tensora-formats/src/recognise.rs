//! What a path is: the choices between files, indexes, formats, ranks and snapshots.

use std::ffi::{OsStr, OsString};
use std::path::{Component, Path};

use crate::file::{self, RegularFile};
use crate::options::Tolerance;
use crate::safetensors::{self, DEFAULT_INDEX, INDEX_SUFFIX, data_files};
use crate::{CheckpointIndex, Error, Format, Result, serverlessllm};

/// The file that a conversion leaves in a directory, and in each rank's, while it puts finished files in
/// place there.
///
/// As long as it is there, the files may belong to two checkpoints, and the directory is not opened, unless
/// [`UnfinishedCheckpoint::Open`](crate::UnfinishedCheckpoint::Open) asks for it. A SafeTensors file whose
/// own path is given is whole by itself and is opened.
pub const UNFINISHED_NAME: &str = ".tensora-unfinished";

/// What the caller asks for.
#[derive(Clone, Copy)]
struct Request {
    format: Option<Format>,
    rank: Option<u32>,
    tolerance: Tolerance,
}

pub(crate) fn open(
    path: &Path,
    format: Option<Format>,
    rank: Option<u32>,
    tolerance: Tolerance,
) -> Result<CheckpointIndex> {
    let request = Request {
        format,
        rank,
        tolerance,
    };
    if !file::stat(path)?.is_dir() {
        return open_file(path, request);
    }
    let names = file::list(path)?;
    match open_directory(path, &names, request)? {
        Some(index) => Ok(index),
        None => open_cached_repository(path, &names, request),
    }
}

/// Opens a data file or an index that was named explicitly.
fn open_file(path: &Path, request: Request) -> Result<CheckpointIndex> {
    if let Some(rank) = request.rank {
        return Err(Error::UnknownRank {
            path: path.to_owned(),
            rank,
            ranks: Vec::new(),
        });
    }
    let root = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let name = path.file_name().unwrap_or(path.as_os_str());
    let index = if name == serverlessllm::INDEX_NAME {
        file::refuse_unfinished(root, request.tolerance.unfinished)?;
        serverlessllm::open_directory(root, request.tolerance)?
    } else if name.as_encoded_bytes().ends_with(INDEX_SUFFIX.as_bytes()) {
        file::refuse_unfinished(root, request.tolerance.unfinished)?;
        safetensors::open_indexed(root, name, request.tolerance)?
    } else {
        safetensors::open_file(root, path, name, request.tolerance)?
    };
    require_format(path, index, request.format)
}

/// Opens the checkpoint that a directory holds directly or as ranks; `None` if it holds neither.
fn open_directory(
    path: &Path,
    names: &[OsString],
    request: Request,
) -> Result<Option<CheckpointIndex>> {
    // Before anything is looked for: of a checkpoint that is being put in place, all may be missing yet.
    file::refuse_unfinished(path, request.tolerance.unfinished)?;
    let ranks = serverlessllm::ranks(path, names);
    if let Some(rank) = request.rank {
        if !ranks.contains(&rank) {
            return Err(Error::UnknownRank {
                path: path.to_owned(),
                rank,
                ranks,
            });
        }
        let index = serverlessllm::open_rank(path, rank, request.tolerance)?;
        let directory = index.root.clone();
        return require_format(&directory, index, request.format).map(Some);
    }

    let has_serverlessllm_index = names.iter().any(|name| name == serverlessllm::INDEX_NAME);
    let has_serverlessllm = has_serverlessllm_index || !ranks.is_empty();
    let has_safetensors =
        names.iter().any(|name| is_index(name)) || data_files(names).next().is_some();
    let wants_serverlessllm = match (has_safetensors, has_serverlessllm, request.format) {
        (false, false, _) => return Ok(None),
        (true, true, None) => {
            return Err(Error::SeveralFormats {
                path: path.to_owned(),
            });
        }
        (true, true, Some(format)) => format.is_serverlessllm(),
        (_, has_serverlessllm, _) => has_serverlessllm,
    };
    let index = if !wants_serverlessllm {
        open_safetensors(path, names, request.tolerance)?
    } else if has_serverlessllm_index {
        serverlessllm::open_directory(path, request.tolerance)?
    } else {
        serverlessllm::open_ranks(path, &ranks, request.tolerance)?
    };
    require_format(path, index, request.format).map(Some)
}

/// Whether `name` is that of a SafeTensors index.
fn is_index(name: &OsStr) -> bool {
    file::is_visible_with_suffix(name, INDEX_SUFFIX)
}

fn open_safetensors(
    path: &Path,
    names: &[OsString],
    tolerance: Tolerance,
) -> Result<CheckpointIndex> {
    let indexes: Vec<&OsString> = names.iter().filter(|name| is_index(name)).collect();
    match indexes.as_slice() {
        [] => safetensors::open_unindexed(path, names, tolerance),
        [only] => safetensors::open_indexed(path, only, tolerance),
        several if several.iter().any(|name| *name == DEFAULT_INDEX) => {
            safetensors::open_indexed(path, DEFAULT_INDEX.as_ref(), tolerance)
        }
        several => Err(Error::SeveralIndexes {
            path: path.to_owned(),
            indexes: several.iter().map(|name| file::shown(name)).collect(),
        }),
    }
}

/// Returns `index` if it has the format that was asked for.
fn require_format(
    path: &Path,
    mut index: CheckpointIndex,
    asked: Option<Format>,
) -> Result<CheckpointIndex> {
    let Some(asked) = asked else {
        return Ok(index);
    };
    // Without tensors the ServerlessLLM dialects look the same.
    let either_dialect =
        index.tensors.is_empty() && asked.is_serverlessllm() && index.format.is_serverlessllm();
    if asked != index.format && !either_dialect {
        return Err(Error::WrongFormat {
            path: path.to_owned(),
            asked,
            found: index.format,
        });
    }
    index.format = asked;
    Ok(index)
}

/// Opens a snapshot of a repository's directory in a Hugging Face cache, `models--org--name`, if
/// `path` is one.
fn open_cached_repository(
    path: &Path,
    names: &[OsString],
    request: Request,
) -> Result<CheckpointIndex> {
    let snapshots_path = path.join("snapshots");
    if !file::is_directory(&snapshots_path) {
        return Err(no_checkpoint(path, names));
    }
    let snapshots = file::list(&snapshots_path)?;
    let snapshot = match main_revision(path)? {
        Some(revision) if snapshots.iter().any(|name| *name == *revision) => revision.into(),
        Some(revision) => {
            return Err(Error::MissingSnapshot {
                path: path.to_owned(),
                revision,
                snapshots: file::all_shown(&snapshots),
            });
        }
        None => match <[OsString; 1]>::try_from(snapshots) {
            Ok([only]) => only,
            Err(snapshots) if snapshots.is_empty() => {
                return Err(Error::NoCheckpoint {
                    path: snapshots_path,
                    found: Vec::new(),
                });
            }
            Err(snapshots) => {
                return Err(Error::SeveralSnapshots {
                    path: path.to_owned(),
                    snapshots: file::all_shown(&snapshots),
                });
            }
        },
    };
    let snapshot_path = snapshots_path.join(snapshot);
    let names = file::list(&snapshot_path)?;
    // Not recognised again as a repository: a snapshot does not hold another cache.
    match open_directory(&snapshot_path, &names, request)? {
        Some(index) => Ok(index),
        None => Err(no_checkpoint(&snapshot_path, &names)),
    }
}

/// How the names of other formats' weights end.
const FOREIGN_SUFFIXES: [&str; 13] = [
    ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".ggml", ".h5", ".hdf5", ".msgpack", ".onnx",
    ".npz", ".npy",
];

/// The error for a directory that holds nothing to open.
fn no_checkpoint(path: &Path, names: &[OsString]) -> Error {
    let names = file::all_shown(names);
    let is_foreign = |name: &&String| {
        let lower = name.to_ascii_lowercase();
        let ends = FOREIGN_SUFFIXES
            .iter()
            .any(|suffix| lower.ends_with(suffix));
        ends && !name.starts_with('.')
    };
    let foreign: Vec<String> = names.iter().filter(is_foreign).cloned().collect();
    let path = path.to_owned();
    if foreign.is_empty() {
        return Error::NoCheckpoint { path, found: names };
    }
    Error::ForeignDirectory {
        path,
        files: foreign,
    }
}

/// The snapshot that `refs/main` names, if there is such a file.
fn main_revision(repository: &Path) -> Result<Option<String>> {
    /// Far more than the 40 characters of a commit.
    const LIMIT_BYTES: u64 = 256;

    let path = &repository.join("refs").join("main");
    if !file::exists(path) {
        return Ok(None);
    }
    let content = RegularFile::open(path)?.read(LIMIT_BYTES)?;
    let content = String::from_utf8_lossy(&content);
    let revision = content.trim();
    // The name is joined to a path: it must be one plain component on every platform.
    let mut components = Path::new(revision).components();
    let plain = matches!(
        (components.next(), components.next()),
        (Some(Component::Normal(name)), None) if name == revision
    );
    if !plain || revision.contains(['/', '\\', ':', '\0']) {
        return Err(Error::InvalidRevision {
            path: path.to_owned(),
            revision: revision.to_owned(),
        });
    }
    Ok(Some(revision.to_owned()))
}
