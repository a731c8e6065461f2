use std::fmt;
use std::fs::Metadata;
use std::time::UNIX_EPOCH;

/// What tells that a file was written to, or that it is another one: length, time of the last modification, and,
/// where the system has such numbers, device and inode.
///
/// It says nothing about content. Whoever rewrites a file within one tick of the file system's clock, or sets its
/// times back, is not noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileStamp {
    bytes: u64,
    modified_ns: u128,
    device: u64,
    inode: u64,
}

/// What happened to a file between two [`FileStamp`]s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileChange {
    /// It has another length.
    Length {
        /// Its length before, in bytes.
        before_bytes: u64,
        /// Its length now, in bytes.
        now_bytes: u64,
    },
    /// It is another file, of the same length.
    Replaced,
    /// It was written to; its length is the same.
    Modified,
}

impl FileStamp {
    /// Takes the stamp from what the system says of an open file, or of what is at a path.
    pub fn new(metadata: &Metadata) -> Self {
        let modified = metadata.modified().ok();
        let since = modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let (device, inode) = numbers(metadata);
        Self {
            bytes: metadata.len(),
            modified_ns: since.map_or(0, |since| since.as_nanos()),
            device,
            inode,
        }
    }

    /// The length in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// When it was last written to, in nanoseconds since 1970; 0 where that is not known.
    pub fn modified_ns(&self) -> u128 {
        self.modified_ns
    }

    /// Its number within its file system; 0 where there are no such numbers.
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// What happened to the file until `now`; nothing, as far as can be told, if `None`.
    pub fn change_until(&self, now: &Self) -> Option<FileChange> {
        if self.bytes != now.bytes {
            return Some(FileChange::Length {
                before_bytes: self.bytes,
                now_bytes: now.bytes,
            });
        }
        if (self.device, self.inode) != (now.device, now.inode) {
            return Some(FileChange::Replaced);
        }
        (self.modified_ns != now.modified_ns).then_some(FileChange::Modified)
    }
}

#[cfg(unix)]
fn numbers(metadata: &Metadata) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt;
    (metadata.dev(), metadata.ino())
}

#[cfg(not(unix))]
fn numbers(_metadata: &Metadata) -> (u64, u64) {
    (0, 0)
}

impl fmt::Display for FileChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length {
                before_bytes,
                now_bytes,
            } => write!(
                f,
                "it was {before_bytes} bytes long, and is {now_bytes} now"
            ),
            Self::Replaced => f.write_str("another file took its place"),
            Self::Modified => f.write_str("it was written to since"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::path::Path;
    use std::time::{Duration, SystemTime};

    use super::*;

    fn stamp(path: &Path) -> FileStamp {
        FileStamp::new(&fs::metadata(path).unwrap())
    }

    #[test]
    fn each_kind_of_change_is_told_from_the_others() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        fs::write(&path, [1; 100]).unwrap();
        let before = stamp(&path);
        assert_eq!(before.bytes(), 100);
        let change = || before.change_until(&stamp(&path));
        assert_eq!(change(), None);

        let later = SystemTime::now() + Duration::from_secs(5);
        let file = File::options().write(true).open(&path).unwrap();
        file.set_modified(later).unwrap();
        assert_eq!(change(), Some(FileChange::Modified));

        let since = Duration::from_nanos(u64::try_from(before.modified_ns()).unwrap());
        if cfg!(unix) {
            let other = directory.path().join("b");
            fs::write(&other, [2; 100]).unwrap();
            let file = File::options().write(true).open(&other).unwrap();
            // A copy that keeps times is another file all the same.
            file.set_modified(UNIX_EPOCH + since).unwrap();
            fs::rename(other, &path).unwrap();
            assert_eq!(change(), Some(FileChange::Replaced));
        }

        fs::write(&path, [1; 101]).unwrap();
        let change = change().unwrap();
        assert_eq!(change.to_string(), "it was 100 bytes long, and is 101 now");
    }
}
