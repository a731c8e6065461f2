use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::direct::{self, DirectFile, DirectRefusal};
use crate::{DirectSupport, Error, Result};

/// A regular file, opened for reading.
///
/// The descriptor is opened once and kept, so a path that is renamed or replaced later does not
/// change what is read. A second descriptor, for direct I/O, is opened on first need and checked to
/// be the same file.
#[derive(Debug)]
pub struct SourceFile {
    path: PathBuf,
    file: File,
    len: u64,
    direct: OnceLock<Result<DirectFile, DirectRefusal>>,
    #[cfg(all(target_os = "linux", not(tensora_portable)))]
    file_system_magic: OnceLock<u32>,
}

/// What tells a file of this machine from others, and from itself after a change; see [`SourceFile::identity`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FileIdentity {
    device: u64,
    inode: u64,
    len: u64,
    modified_ns: i128,
}

impl SourceFile {
    /// Opens `path`, following symlinks. Never blocks on a FIFO or a device.
    ///
    /// # Errors
    ///
    /// [`Error::File`] when it cannot be opened, [`Error::NotARegularFile`] when it is something else.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let (file, metadata) = open_regular(&path)?;
        Ok(Self {
            len: metadata.len(),
            path,
            file,
            direct: OnceLock::new(),
            #[cfg(all(target_os = "linux", not(tensora_portable)))]
            file_system_magic: OnceLock::new(),
        })
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its length when it was opened, in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether its length was 0 when it was opened.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What tells it from other files of this machine, and from itself after a change: device, inode, length,
    /// and time of the last modification. Only the length, where the system has no such numbers.
    pub fn identity(&self) -> FileIdentity {
        #[cfg(unix)]
        if let Ok(metadata) = self.file.metadata() {
            use std::os::unix::fs::MetadataExt;
            return FileIdentity {
                device: metadata.dev(),
                inode: metadata.ino(),
                len: metadata.len(),
                modified_ns: (i128::from(metadata.mtime()) * 1_000_000_000)
                    + i128::from(metadata.mtime_nsec()),
            };
        }
        FileIdentity {
            len: self.len,
            ..FileIdentity::default()
        }
    }

    /// Its length now, in bytes.
    ///
    /// # Errors
    ///
    /// [`Error::File`] when the descriptor cannot be examined.
    pub fn current_len(&self) -> Result<u64> {
        Ok(self
            .file
            .metadata()
            .map_err(|source| Error::file("stat", &self.path, source))?
            .len())
    }

    /// Whether it can be read with direct I/O, found out on the first call and then remembered.
    pub fn direct_support(&self) -> DirectSupport {
        match self.direct() {
            Ok(direct) => DirectSupport::Supported {
                offset_align_bytes: direct.offset_align_bytes,
                memory_align_bytes: direct.memory_align_bytes,
            },
            Err(refusal) => DirectSupport::Unsupported {
                reason: refusal.to_string(),
            },
        }
    }

    /// The descriptor for buffered reads.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// What `statfs` says of the kind of its file system; `None` when it does not. Who serves a file system is asked
    /// until there is an answer.
    #[cfg(all(target_os = "linux", not(tensora_portable)))]
    pub(crate) fn file_system_magic(&self) -> Option<u32> {
        if let Some(known) = self.file_system_magic.get() {
            return Some(*known);
        }
        // The field is of another width and sign on every architecture; magic numbers have 32 bits.
        let kind = i128::from(rustix::fs::fstatfs(&self.file).ok()?.f_type);
        Some(
            *self
                .file_system_magic
                .get_or_init(|| (kind & 0xFFFF_FFFF) as u32),
        )
    }

    /// Whether a process serves its file system, or may do so as far as the system says.
    #[cfg(all(feature = "io-uring", target_os = "linux", not(tensora_portable)))]
    pub(crate) fn is_on_fuse(&self) -> bool {
        /// That of every such file system.
        const FUSE_SUPER_MAGIC: u32 = 0x6573_5546;

        self.file_system_magic()
            .is_none_or(|magic| magic == FUSE_SUPER_MAGIC)
    }

    /// The descriptor for direct reads and its alignment, or why there is none. What a later try
    /// could change is not remembered.
    pub(crate) fn direct(&self) -> Result<&DirectFile, DirectRefusal> {
        if let Some(known) = self.direct.get() {
            return known.as_ref().map_err(Clone::clone);
        }
        match direct::open(&self.path, &self.file) {
            Err(passing @ DirectRefusal::Failed { .. }) => Err(passing),
            found => self
                .direct
                .get_or_init(|| found)
                .as_ref()
                .map_err(Clone::clone),
        }
    }
}

/// Opens a regular file without ever blocking on what is none.
fn open_regular(path: &Path) -> Result<(File, std::fs::Metadata)> {
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(all(target_os = "linux", not(tensora_portable)))]
    {
        use std::os::unix::fs::OpenOptionsExt;
        // A FIFO without a writer, or a device, would otherwise hold up the open itself.
        options.custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed());
    }
    #[cfg(not(all(target_os = "linux", not(tensora_portable))))]
    {
        // Without that flag, look before opening; the descriptor is looked at again below.
        let metadata =
            std::fs::metadata(path).map_err(|source| Error::file("open", path, source))?;
        require_regular(path, &metadata)?;
    }
    let file = options
        .open(path)
        .map_err(|source| Error::file("open", path, source))?;
    let metadata = file
        .metadata()
        .map_err(|source| Error::file("stat", path, source))?;
    require_regular(path, &metadata)?;
    #[cfg(all(target_os = "linux", not(tensora_portable)))]
    direct::set_blocking(&file).map_err(|source| Error::file("open", path, source))?;
    Ok((file, metadata))
}

fn require_regular(path: &Path, metadata: &std::fs::Metadata) -> Result<()> {
    if metadata.is_file() {
        return Ok(());
    }
    Err(Error::NotARegularFile {
        path: path.to_owned(),
        found: kind_of(metadata),
    })
}

fn kind_of(metadata: &std::fs::Metadata) -> &'static str {
    if metadata.is_dir() {
        return "directory";
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        let kind = metadata.file_type();
        if kind.is_fifo() {
            return "FIFO";
        } else if kind.is_socket() {
            return "socket";
        } else if kind.is_block_device() || kind.is_char_device() {
            return "device";
        }
    }
    "special file"
}
