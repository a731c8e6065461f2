//! The little I/O that metadata needs: listing directories and reading from regular files only.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, FileType, OpenOptions};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::{Error, FileStamp, Result, UNFINISHED_NAME, UnfinishedCheckpoint};

/// How much of a file is enough to recognise it.
const SNIFFED_BYTES: u64 = 512;

/// The operation that the operating system refused, as an [`Error::Io`].
fn io_error(path: &Path, operation: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io {
        path: path.to_owned(),
        operation,
        source,
    }
}

/// What `path` leads to, following symbolic links.
pub(crate) fn stat(path: &Path) -> Result<fs::Metadata> {
    fs::metadata(path).map_err(|error| {
        if error.kind() != io::ErrorKind::NotFound {
            return io_error(path, "access")(error);
        }
        match fs::read_link(path) {
            Ok(target) => Error::DanglingSymlink {
                path: path.to_owned(),
                target,
            },
            Err(_) => Error::NotFound {
                path: path.to_owned(),
            },
        }
    })
}

/// Where `path` is once all symbolic links are resolved.
pub(crate) fn canonical(path: &Path) -> Result<PathBuf> {
    stat(path)?;
    fs::canonicalize(path).map_err(io_error(path, "access"))
}

/// The regular file that `path` leads to.
fn regular(path: &Path) -> Result<FileStamp> {
    let metadata = stat(path)?;
    require_regular(path, metadata.file_type())?;
    Ok(FileStamp::new(&metadata))
}

/// A data file that has no header to be checked by.
pub(crate) fn data_file(path: &Path) -> Result<FileStamp> {
    let stamp = regular(path)?;
    let bytes = stamp.bytes();
    if bytes <= SNIFFED_BYTES
        && let Some(pointer @ Error::GitLfsPointer { .. }) =
            foreign(path, &RegularFile::open(path)?.read(bytes)?)
    {
        return Err(pointer);
    }
    Ok(stamp)
}

fn require_regular(path: &Path, file_type: FileType) -> Result<()> {
    if file_type.is_file() {
        return Ok(());
    }
    Err(Error::NotARegularFile {
        path: path.to_owned(),
        kind: special_kind(file_type),
    })
}

fn special_kind(file_type: FileType) -> &'static str {
    if file_type.is_dir() {
        return "a directory";
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        if file_type.is_fifo() {
            return "a named pipe";
        }
        if file_type.is_socket() {
            return "a socket";
        }
        if file_type.is_block_device() || file_type.is_char_device() {
            return "a device";
        }
    }
    "no regular file"
}

/// A regular file open for reading, with its length at opening.
pub(crate) struct RegularFile<'a> {
    path: &'a Path,
    file: File,
    pub(crate) bytes: u64,
    pub(crate) stamp: FileStamp,
}

impl<'a> RegularFile<'a> {
    pub(crate) fn open(path: &'a Path) -> Result<Self> {
        // Before opening, because merely opening a device may act on it; again afterwards on the
        // descriptor, because another process may have put something else there in between.
        regular(path)?;
        let mut options = OpenOptions::new();
        options.read(true);
        #[cfg(unix)]
        {
            use std::os::unix::fs::OpenOptionsExt;
            // A pipe put there in between must not block the opening. No effect on regular files.
            options.custom_flags(O_NONBLOCK);
        }
        let file = options.open(path).map_err(io_error(path, "open"))?;
        let metadata = file.metadata().map_err(io_error(path, "access"))?;
        require_regular(path, metadata.file_type())?;
        Ok(Self {
            path,
            file,
            bytes: metadata.len(),
            stamp: FileStamp::new(&metadata),
        })
    }

    /// Reads the next `count` bytes, or all if the file had fewer when it was opened.
    ///
    /// `count` must be bounded by the caller: by a format's limit and by `self.bytes`.
    pub(crate) fn read(&mut self, count: u64) -> Result<Vec<u8>> {
        let count = count.min(self.bytes);
        let mut content = Vec::with_capacity(usize::try_from(count).unwrap_or(0));
        (&self.file)
            .take(count)
            .read_to_end(&mut content)
            .map_err(io_error(self.path, "read"))?;
        if (content.len() as u64) < count {
            let shorter = io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "it became shorter while it was being read; wait until it is written or copied",
            );
            return Err(io_error(self.path, "read")(shorter));
        }
        Ok(content)
    }
}

/// Where the standard library has no name for a flag, one constant is no reason for a dependency. On
/// targets not named here the check before opening has to do.
#[cfg(unix)]
const O_NONBLOCK: i32 = if cfg!(any(target_os = "linux", target_os = "android")) {
    if cfg!(any(target_arch = "mips", target_arch = "mips64")) {
        0x80
    } else if cfg!(any(target_arch = "sparc", target_arch = "sparc64")) {
        0x4000
    } else {
        0x800
    }
} else if cfg!(any(
    target_vendor = "apple",
    target_os = "freebsd",
    target_os = "netbsd",
    target_os = "openbsd",
    target_os = "dragonfly"
)) {
    4
} else {
    0
};

/// Reads a whole index file, which may be no longer than `limit_bytes`.
pub(crate) fn read_index(path: &Path, limit_bytes: u64) -> Result<Vec<u8>> {
    let mut file = RegularFile::open(path)?;
    if file.bytes > limit_bytes {
        return Err(Error::IndexTooLarge {
            path: path.to_owned(),
            bytes: file.bytes,
            limit_bytes,
        });
    }
    let content = file.read(file.bytes)?;
    match foreign(path, &content) {
        Some(error @ Error::GitLfsPointer { .. }) => Err(error),
        _ => Ok(content),
    }
}

/// The names in a directory, sorted.
pub(crate) fn list(path: &Path) -> Result<Vec<OsString>> {
    let mut names = fs::read_dir(path)
        .map_err(io_error(path, "list"))?
        .map(|entry| Ok(entry?.file_name()))
        .collect::<io::Result<Vec<OsString>>>()
        .map_err(io_error(path, "list"))?;
    names.sort_unstable();
    Ok(names)
}

/// A file's name for display; lossy where it is not UTF-8.
pub(crate) fn shown(name: &OsStr) -> String {
    name.to_string_lossy().into_owned()
}

/// Names for display.
pub(crate) fn all_shown(names: &[OsString]) -> Vec<String> {
    names.iter().map(|name| shown(name)).collect()
}

/// Whether `name` ends with `suffix` and is not hidden. Hidden files are other programs' by-products,
/// such as the `._model.safetensors` that macOS leaves on foreign file systems.
pub(crate) fn is_visible_with_suffix(name: &OsStr, suffix: &str) -> bool {
    // The bytes, because a name that is not UTF-8 has a suffix all the same.
    let name = name.as_encoded_bytes();
    name.ends_with(suffix.as_bytes()) && !name.starts_with(b".")
}

/// Whether `path` leads to a directory.
pub(crate) fn is_directory(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.is_dir())
}

/// Refuses a directory in which a conversion was interrupted while it put its files in place, unless it is
/// to be opened all the same.
pub(crate) fn refuse_unfinished(directory: &Path, unfinished: UnfinishedCheckpoint) -> Result<()> {
    if unfinished == UnfinishedCheckpoint::Open {
        return Ok(());
    }
    let marker = directory.join(UNFINISHED_NAME);
    // Whatever it is: a link to nothing is a marker too. A directory that cannot be looked into is none
    // that can be trusted to hold no marker.
    match fs::symlink_metadata(&marker) {
        Ok(_) => Err(Error::Unfinished {
            path: directory.to_owned(),
        }),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(())
        }
        Err(error) => Err(io_error(&marker, "access")(error)),
    }
}

/// Whether anything is at `path`, be it a symbolic link to nothing.
pub(crate) fn exists(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// If the file that a format's own check refused is recognisably something else, that as an error;
/// otherwise `refusal`.
pub(crate) fn explain(path: &Path, refusal: Error) -> Error {
    let start = RegularFile::open(path).and_then(|mut file| file.read(SNIFFED_BYTES));
    start
        .ok()
        .and_then(|start| foreign(path, &start))
        .unwrap_or(refusal)
}

/// What a file that starts with `start` is, if it is something that users take for a checkpoint.
fn foreign(path: &Path, start: &[u8]) -> Option<Error> {
    if start.starts_with(b"version https://git-lfs.github.com/spec/") {
        let text = String::from_utf8_lossy(start);
        let size = text.lines().find_map(|line| line.strip_prefix("size "));
        return Some(Error::GitLfsPointer {
            path: path.to_owned(),
            bytes: size.and_then(|size| size.trim().parse().ok()),
        });
    }
    let kind = match start {
        [b'P', b'K', 3, 4, ..] => "a zip archive, most likely a PyTorch checkpoint (.bin, .pt)",
        [0x80, 2..=5, ..] => "a Python pickle, most likely a PyTorch checkpoint (.bin, .pt)",
        [b'G', b'G', b'U', b'F', ..] => "a GGUF file",
        [0x89, b'H', b'D', b'F', ..] => "an HDF5 file",
        [0x93, b'N', b'U', b'M', b'P', b'Y', ..] => "a NumPy array file",
        [0x1f, 0x8b, ..] => "a gzip archive",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "a Zstandard archive",
        [b'<', b'!' | b'h' | b'H', ..] => {
            "an HTML page, most likely an error message that a download has saved"
        }
        [b'{', b'"' | b'\n' | b'\r' | b' ', ..] => {
            "a JSON text that is neither a *.safetensors.index.json nor a tensor_index.json"
        }
        _ => return None,
    };
    Some(Error::ForeignFile {
        path: path.to_owned(),
        kind,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_shrinks_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let path = &directory.path().join("m.safetensors");
        fs::write(path, [7; 100]).unwrap();
        let mut file = RegularFile::open(path).unwrap();
        assert_eq!(file.read(8).unwrap(), [7; 8]);
        OpenOptions::new()
            .write(true)
            .open(path)
            .unwrap()
            .set_len(50)
            .unwrap();
        let message = file.read(60).unwrap_err().to_string();
        assert!(message.contains("m.safetensors"), "{message}");
        assert!(message.contains("became shorter"), "{message}");
    }

    #[test]
    fn a_file_that_is_replaced_is_read_as_it_was_opened() {
        let directory = tempfile::tempdir().unwrap();
        let path = &directory.path().join("m.safetensors");
        fs::write(path, [7; 100]).unwrap();
        let mut file = RegularFile::open(path).unwrap();
        let other = directory.path().join("other");
        fs::write(&other, [8; 10]).unwrap();
        fs::rename(other, path).unwrap();
        assert_eq!(file.bytes, 100);
        assert_eq!(file.read(100).unwrap(), [7; 100]);
    }

    #[test]
    fn foreign_files_are_recognised_by_content() {
        for (start, expected) in [
            (&b"PK\x03\x04\0\0"[..], "PyTorch"),
            (b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9", "pickle"),
            (b"GGUF\x03\0\0\0", "GGUF"),
            (b"\x89HDF\r\n\x1a\n", "HDF5"),
            (b"\x93NUMPY\x01\0", "NumPy"),
            (b"\x1f\x8b\x08\0", "gzip"),
            (b"\x28\xb5\x2f\xfd\0", "Zstandard"),
            (b"<!DOCTYPE html>", "HTML"),
            (b"{\n  \"architectures\": []}", "JSON"),
        ] {
            let error = foreign(Path::new("m.bin"), start).unwrap();
            assert!(matches!(error, Error::ForeignFile { .. }));
            let message = error.to_string();
            assert!(
                message.starts_with("m.bin: ") && message.contains(expected),
                "{message}"
            );
        }
        assert!(foreign(Path::new("m"), b"").is_none());
        assert!(foreign(Path::new("m"), &[0xff; 600]).is_none());
    }
}
