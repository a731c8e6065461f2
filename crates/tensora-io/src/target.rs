//! Files that are written: preallocated, and past the page cache where that works.
#![forbid(unsafe_code)]

mod written;

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::direct::{self, DirectFile, DirectRefusal};
use crate::workers::lock;
use crate::{Control, DirectFallback, DirectPolicy, Error, Result};
use written::Written;

/// Largest single write. A cancelled write ends after as much at most.
const MAX_WRITE_BYTES: usize = 8 << 20;
/// What is said of a file that takes `O_DIRECT` at open and refuses it at write.
const REFUSED_WRITES: &str =
    "it was opened for direct I/O, but direct writes to it fail with EINVAL";

/// A new file of known length, written by several threads at once.
///
/// Its room is reserved when it is created, so a disk that is too full is found out before anything is written.
/// Whole blocks are written directly, past the page cache, where policy, file system and memory allow it; ragged
/// ends are buffered. Every write is complete when the call returns: neither memory nor progress has to be kept.
///
/// Dropped unfinished, the file stays as it is, for the caller to remove or to overwrite.
///
/// ```
/// use tensora_io::{Control, DirectPolicy, TargetFile};
///
/// # let directory = tempfile::tempdir().unwrap();
/// let path = directory.path().join("data");
/// let target = TargetFile::create(&path, 10_000, DirectPolicy::Preferred)?;
/// target.write_all_at(&[2; 5000], 5000, &Control::new())?;
/// target.write_all_at(&[1; 5000], 0, &Control::new())?;
/// assert_eq!(target.finish()?.bytes, 10_000);
/// # assert_eq!(std::fs::read(&path).unwrap(), [[1; 5000], [2; 5000]].concat());
/// # Ok::<(), tensora_io::Error>(())
/// ```
#[derive(Debug)]
pub struct TargetFile {
    path: PathBuf,
    len: u64,
    file: File,
    direct: Option<DirectFile>,
    policy: DirectPolicy,
    /// Direct writes turned out not to work although the file system had promised them.
    refused: AtomicBool,
    fallback: Mutex<Option<DirectFallback>>,
    written: Mutex<Written>,
    direct_bytes: AtomicU64,
}

/// What writing a file took.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct WriteStats {
    /// Length of the file, in bytes.
    pub bytes: u64,
    /// Bytes written past the page cache. What was written twice counts twice.
    pub direct_bytes: u64,
    /// Why it was written buffered although direct I/O was preferred, if it was.
    pub fallback: Option<DirectFallback>,
}

impl TargetFile {
    /// How large this process may make a file, in bytes; `None` when unlimited or unknown.
    pub fn limit_bytes() -> Option<u64> {
        #[cfg(all(target_os = "linux", not(tensora_portable)))]
        return crate::probe::soft_limit(rustix::process::Resource::Fsize);
        #[cfg(not(all(target_os = "linux", not(tensora_portable))))]
        None
    }

    /// Creates a file of `len` bytes where nothing is yet, with the mode that the umask leaves, and reserves room
    /// for it. Where the file system cannot reserve, the file is sparse until it is written.
    ///
    /// With [`DirectPolicy::Required`] it is an error when the file cannot be written directly; ragged ends and
    /// memory that is not aligned are written buffered all the same.
    ///
    /// # Errors
    ///
    /// [`Error::File`] when it cannot be created (`AlreadyExists` also for a symlink, wherever that leads),
    /// [`Error::Reserve`] when there is no room for it (`StorageFull`, `QuotaExceeded`, `FileTooLarge`), and
    /// [`Error::DirectUnsupported`]. After an error there is no file.
    pub fn create(path: impl Into<PathBuf>, len: u64, direct: DirectPolicy) -> Result<Self> {
        let path = path.into();
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(|source| Error::file("create", &path, source))?;
        // Outside the closure, so that on some systems the file can be removed although it is open there.
        let made = Self::prepare(path.clone(), file, len, direct);
        if made.is_err() {
            // The first error says more than one about this.
            let _ = std::fs::remove_file(&path);
        }
        made
    }

    fn prepare(path: PathBuf, file: File, len: u64, policy: DirectPolicy) -> Result<Self> {
        reserve(&file, len).map_err(|source| Error::Reserve {
            path: path.clone(),
            bytes: len,
            source,
        })?;
        let (direct, fallback) = match policy {
            DirectPolicy::Never => (None, None),
            _ => match direct::open_for_writing(&path, &file) {
                Ok(direct) => (Some(direct), None),
                Err(refusal) if policy == DirectPolicy::Required => {
                    return Err(refusal.into_error(&path));
                }
                Err(refusal) => (None, Some(fallback(&path, &refusal))),
            },
        };
        Ok(Self {
            path,
            len,
            file,
            direct,
            policy,
            refused: AtomicBool::new(false),
            fallback: Mutex::new(fallback),
            written: Mutex::default(),
            direct_bytes: AtomicU64::new(0),
        })
    }

    /// The path it was created at.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether its length is 0.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What writes had better begin and end at multiples of, in the file, and their memory with them, so that
    /// all of it is written directly; `None` where nothing is.
    pub fn direct_align_bytes(&self) -> Option<u32> {
        self.usable_direct().map(|direct| direct.offset_align_bytes)
    }

    /// Writes all of `bytes` at `offset`. Ranges that several threads write at once must not overlap, or it is
    /// not known whose bytes are kept.
    ///
    /// `control` can stop it, between writes of 8 MiB; nothing is reported to it, since whatever is written here
    /// was counted when it was read.
    ///
    /// # Errors
    ///
    /// [`Error::Write`] says where it failed; [`Error::OutsideTarget`] for a range that is not inside the file,
    /// [`Error::DirectUnsupported`] when direct writes are required and turn out not to work, and
    /// [`Error::Cancelled`]. None of the range then counts as written; it can be written again.
    pub fn write_all_at(&self, bytes: &[u8], offset: u64, control: &Control) -> Result<()> {
        let length = bytes.len() as u64;
        let end = offset.checked_add(length);
        let Some(end) = end.filter(|&end| end <= self.len) else {
            return Err(Error::OutsideTarget {
                path: self.path.clone(),
                offset,
                length,
                file_bytes: self.len,
            });
        };
        let (mut rest, mut at) = (bytes, offset);
        while !rest.is_empty() {
            control.check()?;
            let (part, direct) = self.next_part(rest, at);
            let count = match direct {
                Some(direct) => match write_at(&direct.file, part, at) {
                    // Some file systems take O_DIRECT at open and refuse it at write.
                    Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                        self.refuse()?;
                        continue;
                    }
                    other => other,
                },
                None => write_at(&self.file, part, at),
            };
            let count = count.map_err(|source| Error::Write {
                path: self.path.clone(),
                offset: at,
                length: part.len() as u64,
                source,
            })?;
            if direct.is_some() {
                self.direct_bytes.fetch_add(count as u64, Ordering::Relaxed);
            }
            rest = &rest[count..];
            at += count as u64;
        }
        lock(&self.written).insert(offset..end);
        Ok(())
    }

    /// What of `rest`, which belongs at `at` and is not empty, to write next, and by which way.
    fn next_part<'b>(&self, rest: &'b [u8], at: u64) -> (&'b [u8], Option<&DirectFile>) {
        let most = rest.len().min(MAX_WRITE_BYTES);
        let Some(direct) = self.usable_direct() else {
            return (&rest[..most], None);
        };
        let align = direct.offset_align_bytes as usize;
        // Less than the alignment.
        #[allow(clippy::cast_possible_truncation)]
        let skew = (at % u64::from(direct.offset_align_bytes)) as usize;
        if skew > 0 {
            return (&rest[..most.min(align - skew)], None);
        }
        let whole = most - most % align;
        // Where one block's memory is not aligned, that of the next ones is not either.
        let is_aligned = rest
            .as_ptr()
            .addr()
            .is_multiple_of(direct.memory_align_bytes as usize);
        if whole == 0 || !is_aligned {
            return (&rest[..most], None);
        }
        (&rest[..whole], Some(direct))
    }

    fn usable_direct(&self) -> Option<&DirectFile> {
        self.direct
            .as_ref()
            .filter(|_| !self.refused.load(Ordering::Relaxed))
    }

    /// Writes directly no more, which is an error where that is required.
    fn refuse(&self) -> Result<()> {
        let refusal = DirectRefusal::Unsupported {
            reason: REFUSED_WRITES.to_owned(),
        };
        if self.policy == DirectPolicy::Required {
            return Err(refusal.into_error(&self.path));
        }
        if !self.refused.swap(true, Ordering::Relaxed) {
            *lock(&self.fallback) = Some(fallback(&self.path, &refusal));
        }
        Ok(())
    }

    /// Ends the file: checks that every byte was written, and waits until it is on the device.
    ///
    /// Its name is there for good only when its directory was synced too, which is the caller's.
    ///
    /// # Errors
    ///
    /// [`Error::IncompleteTarget`] when a part was never written, [`Error::ChangedTarget`] when somebody else
    /// changed the file's length, and [`Error::File`] when the device fails. The file stays as it is.
    pub fn finish(self) -> Result<WriteStats> {
        let written = self
            .written
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(missing) = written.missing(self.len) {
            return Err(Error::IncompleteTarget {
                path: self.path,
                offset: missing.first,
                missing_bytes: missing.bytes,
                file_bytes: self.len,
            });
        }
        let metadata = self
            .file
            .metadata()
            .map_err(|source| Error::file("stat", &self.path, source))?;
        if metadata.len() != self.len {
            return Err(Error::ChangedTarget {
                path: self.path,
                expected_bytes: self.len,
                actual_bytes: metadata.len(),
            });
        }
        // Direct writes too: they bypass the page cache, but not the device's own cache.
        self.file
            .sync_all()
            .map_err(|source| Error::file("sync", &self.path, source))?;
        Ok(WriteStats {
            bytes: self.len,
            direct_bytes: self.direct_bytes.into_inner(),
            fallback: self
                .fallback
                .into_inner()
                .unwrap_or_else(PoisonError::into_inner),
        })
    }
}

fn fallback(path: &Path, refusal: &DirectRefusal) -> DirectFallback {
    DirectFallback {
        path: path.to_owned(),
        reason: refusal.to_string(),
    }
}

/// Writes some of `bytes`, which is not empty, and not nothing.
fn write_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<usize> {
    loop {
        #[cfg(unix)]
        let result = std::os::unix::fs::FileExt::write_at(file, bytes, offset);
        #[cfg(windows)]
        let result = std::os::windows::fs::FileExt::seek_write(file, bytes, offset);
        #[cfg(not(any(unix, windows)))]
        let result: io::Result<usize> = Err(io::ErrorKind::Unsupported.into());
        match result {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            other => return other,
        }
    }
}

#[cfg(not(all(target_os = "linux", not(tensora_portable))))]
fn reserve(file: &File, len: u64) -> io::Result<()> {
    file.set_len(len)
}

/// Gives the file its length, and the blocks for it where the file system can.
#[cfg(all(target_os = "linux", not(tensora_portable)))]
fn reserve(file: &File, len: u64) -> io::Result<()> {
    use rustix::fs::{FallocateFlags, fallocate};
    use rustix::io::Errno;

    /// So much at a time that a signal, which undoes what is under way on some file systems, does not undo much.
    const PIECE_BYTES: u64 = 256 << 20;
    /// So many signals in a row, and the file is written without reserving the rest.
    const MAX_INTERRUPTIONS: u32 = 64;

    // Past the limit, the kernel not only refuses, but kills the process with SIGXFSZ.
    if TargetFile::limit_bytes().is_some_and(|limit| len > limit) {
        return Err(Errno::FBIG.into());
    }
    let mut reserved = 0;
    let mut interruptions = 0;
    while reserved < len {
        let piece = PIECE_BYTES.min(len - reserved);
        match fallocate(file, FallocateFlags::empty(), reserved, piece) {
            Ok(()) => {
                reserved += piece;
                interruptions = 0;
            }
            Err(Errno::INTR) if interruptions < MAX_INTERRUPTIONS => interruptions += 1,
            Err(Errno::INTR | Errno::OPNOTSUPP | Errno::NOSYS) => break,
            Err(errno) => return Err(errno.into()),
        }
    }
    if reserved < len {
        file.set_len(len)?;
    }
    Ok(())
}
