use std::fmt;
use std::path::PathBuf;

use crate::{BackendKind, Error, ProfileFact};

/// Whether something works here and, if not, why and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(tag = "status", rename_all = "kebab-case"))]
pub enum Availability {
    /// It works: this was tried, not assumed.
    Available,
    /// It does not.
    Unavailable {
        /// What stands in the way.
        reason: String,
        /// What would remove it, or what to use instead.
        remedy: String,
    },
}

impl Availability {
    /// Whether it works.
    pub fn is_available(&self) -> bool {
        matches!(self, Self::Available)
    }
}

/// Which memory a load delivers its bytes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum MemoryKind {
    /// Memory of the load's own, into which the files are read.
    Owned,
    /// The page cache itself, mapped without a copy.
    Mapped,
}

impl MemoryKind {
    /// The name in JSON and messages.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Owned => "owned",
            Self::Mapped => "mapped",
        }
    }
}

impl fmt::Display for MemoryKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Use of transparent huge pages for anonymous memory
/// (`/sys/kernel/mm/transparent_hugepage/enabled`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum HugePages {
    /// For all memory.
    Always,
    /// For memory that asks for it, as [`Region`](crate::Region) does.
    Madvise,
    /// Never.
    Never,
    /// The system does not tell.
    Unknown,
}

/// Memory that a load may use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct MemoryFacts {
    /// Physical memory of the machine, in bytes.
    pub total_bytes: Option<u64>,
    /// What the machine can still give without swapping (`MemAvailable`), in bytes.
    pub available_bytes: Option<u64>,
    /// The memory limit of a control group, in bytes: of all groups that hold this process, the one that
    /// leaves least. `None` when unlimited or unknown.
    pub cgroup_limit_bytes: Option<u64>,
    /// What that group leaves: the limit less the use that cannot be reclaimed, in bytes. File pages
    /// count as reclaimable.
    pub cgroup_available_bytes: Option<u64>,
    /// The file in which that limit stands (`/sys/fs/cgroup/app/memory.max`).
    #[cfg_attr(feature = "serde", serde(default))]
    pub cgroup_limit_path: Option<PathBuf>,
    /// What the limit of this process on address space (`ulimit -v`) leaves, in bytes; `None` when
    /// unlimited or unknown. Mapped files count against it.
    #[cfg_attr(feature = "serde", serde(default))]
    pub address_space_available_bytes: Option<u64>,
    /// What its limit on data (`ulimit -d`) leaves, in bytes; `None` when unlimited or unknown. Mapped
    /// files do not count against it.
    #[cfg_attr(feature = "serde", serde(default))]
    pub data_available_bytes: Option<u64>,
}

/// What says how much memory a load may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum MemorySource {
    /// What the machine can still give (`MemAvailable`).
    Machine,
    /// The memory limit of a control group.
    #[cfg_attr(feature = "serde", serde(rename = "cgroup"))]
    ControlGroup,
    /// The limit of this process on address space (`ulimit -v`).
    AddressSpace,
    /// The limit of this process on data (`ulimit -d`).
    Data,
}

impl MemorySource {
    /// The name in JSON and messages.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Machine => "machine",
            Self::ControlGroup => "cgroup",
            Self::AddressSpace => "address-space",
            Self::Data => "data",
        }
    }
}

impl fmt::Display for MemorySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl MemoryFacts {
    /// What a load may use: the tightest of what the machine, the control group and the limits of the
    /// process leave, in bytes, and which of them decides. `None` when none is known.
    pub fn usable_bytes(&self) -> Option<(u64, MemorySource)> {
        [
            (self.available_bytes, MemorySource::Machine),
            (self.cgroup_available_bytes, MemorySource::ControlGroup),
            (
                self.address_space_available_bytes,
                MemorySource::AddressSpace,
            ),
            (self.data_available_bytes, MemorySource::Data),
        ]
        .into_iter()
        .filter_map(|(bytes, source)| Some((bytes?, source)))
        .min_by_key(|&(bytes, _)| bytes)
    }
}

/// Facts about the machine and about this process on it. What the system does not tell is `None`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Platform {
    /// Operating system, as Rust names it (`linux`).
    pub os: String,
    /// Kernel release (`uname -r`).
    pub kernel: Option<String>,
    /// Model of the first processor, as the kernel names it.
    #[cfg_attr(feature = "serde", serde(default))]
    pub processor: Option<String>,
    /// Processors that this process may use, after affinity and control-group quota; at least 1.
    pub cpus: u32,
    /// Size of an ordinary page, in bytes.
    pub page_bytes: u64,
    /// Huge pages for anonymous memory.
    pub huge_pages: HugePages,
    /// Memory that a load may use.
    pub memory: MemoryFacts,
    /// Soft limit on locked memory, in bytes; `None` when unlimited or unknown.
    pub memlock_bytes: Option<u64>,
    /// Soft limit on open files; `None` when unlimited or unknown.
    pub open_files: Option<u64>,
    /// Every backend, in the order of [`BackendKind::ALL`].
    pub backends: Vec<BackendFact>,
    /// Where the files of a checkpoint live, once probed.
    pub storage: Option<StorageFacts>,
    /// What was measured of that place, once sought.
    #[cfg_attr(feature = "serde", serde(default))]
    pub profile: ProfileFact,
}

impl Platform {
    /// A machine of which nothing is known but its processors and which backends work: the base for
    /// facts that come from elsewhere than a probe, tests above all.
    pub fn unknown(cpus: u32, backends: Vec<BackendFact>) -> Self {
        Self {
            os: "unknown".to_owned(),
            kernel: None,
            processor: None,
            cpus: cpus.max(1),
            page_bytes: 4096,
            huge_pages: HugePages::Unknown,
            memory: MemoryFacts::default(),
            memlock_bytes: None,
            open_files: None,
            backends,
            storage: None,
            profile: ProfileFact::NotSought,
        }
    }

    /// Whether `kind` works here, and why not.
    pub fn availability(&self, kind: BackendKind) -> Option<&Availability> {
        self.backends
            .iter()
            .find(|fact| fact.kind == kind)
            .map(|fact| &fact.availability)
    }
}

/// Whether a backend works here.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct BackendFact {
    /// The backend.
    pub kind: BackendKind,
    /// Whether it works here.
    pub availability: Availability,
}

/// How a file system reaches its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum FileSystemClass {
    /// On a block device of this machine.
    Local,
    /// In memory (tmpfs, ramfs).
    Memory,
    /// Over a network (NFS, CIFS, Ceph, Lustre, 9p, …).
    Network,
    /// Through a user-space server.
    Fuse,
    /// Layered over others.
    Overlay,
    /// Not recognised.
    Unknown,
}

/// Facts about the place that a set of files is stored in. Where the files differ, the most
/// restrictive answer stands here.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct StorageFacts {
    /// File system type (`ext4`, `tmpfs`, `nfs`, or the magic number in hexadecimal).
    pub file_system: String,
    /// How it reaches its bytes.
    pub class: FileSystemClass,
    /// Name of the block device (`nvme0n1`), of the whole disk for a partition, or `major:minor` where
    /// the system does not name it; `None` where there is no single device.
    pub device: Option<String>,
    /// Model of that device, where it tells one.
    #[cfg_attr(feature = "serde", serde(default))]
    pub device_model: Option<String>,
    /// Capacity of that device, in bytes.
    #[cfg_attr(feature = "serde", serde(default))]
    pub device_bytes: Option<u64>,
    /// What was mounted (`/dev/nvme0n1p2`, `server:/export`), as the table of mounts names it.
    #[cfg_attr(feature = "serde", serde(default))]
    pub mount_source: Option<String>,
    /// Whether the device says that it has moving heads. Virtual disks often do, whatever lies below.
    pub rotational: Option<bool>,
    /// Whether all files can be read with direct I/O.
    pub direct: DirectSupport,
    /// Bytes of these files, by their lengths when they were opened.
    pub file_bytes: u64,
    /// Bytes of these files that are in the page cache; `None` when the system does not tell.
    pub resident_bytes: Option<u64>,
    /// Whether that was not counted: all of a sample was there, so all is taken to be, see [`StorageFacts::probe`].
    #[cfg_attr(feature = "serde", serde(default))]
    pub resident_is_estimate: bool,
}

impl StorageFacts {
    /// Storage of which nothing is known, not even whether direct I/O works.
    pub fn unknown() -> Self {
        Self {
            file_system: "unknown".to_owned(),
            class: FileSystemClass::Unknown,
            device: None,
            device_model: None,
            device_bytes: None,
            mount_source: None,
            rotational: None,
            direct: DirectSupport::Unsupported {
                reason: "not probed".to_owned(),
            },
            file_bytes: 0,
            resident_bytes: None,
            resident_is_estimate: false,
        }
    }

    /// Whether all bytes of the files were in the page cache, or all of a sample of them; `false` where the system does not tell.
    pub fn is_resident(&self) -> bool {
        self.resident_bytes == Some(self.file_bytes)
    }
}

/// Whether a file can be read past the page cache, and how aligned such reads must be.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(tag = "status", rename_all = "kebab-case"))]
pub enum DirectSupport {
    /// It can.
    Supported {
        /// Offsets and lengths must be multiples of this, in bytes; a power of two.
        offset_align_bytes: u32,
        /// Addresses must be multiples of this, in bytes; a power of two.
        memory_align_bytes: u32,
    },
    /// It cannot.
    Unsupported {
        /// Why not.
        reason: String,
    },
}

impl DirectSupport {
    /// Whether direct reads work.
    pub fn is_supported(&self) -> bool {
        matches!(self, Self::Supported { .. })
    }
}

/// The answer for a backend that this build does not contain: its cargo feature was off, or the
/// operating system has no such thing.
pub(crate) fn unavailable(kind: BackendKind) -> Error {
    if kind.is_compiled_in() {
        return Error::BackendUnavailable {
            backend: kind,
            reason: format!("it is not supported on {}", std::env::consts::OS),
            remedy: "choose another backend".to_owned(),
        };
    }
    Error::BackendUnavailable {
        backend: kind,
        reason: format!("this build of tensora-io was made without the cargo feature `{kind}`"),
        remedy: format!("enable the feature `{kind}`, or choose another backend"),
    }
}
