use std::fmt;

use crate::{BackendKind, HugePages, MemoryKind, Platform, TransferParams};

/// What the page cache holds of the files when a load begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum CacheState {
    /// Nothing.
    Cold,
    /// The first half of each file.
    Half,
    /// All of it.
    Warm,
}

impl CacheState {
    /// The name in JSON and messages.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Half => "half",
            Self::Warm => "warm",
        }
    }
}

impl fmt::Display for CacheState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What reads from one place were measured to take on this machine.
///
/// Only facts about files, bytes and time: what to make of them is the planner's business.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Profile {
    /// [`Profile::VERSION`] when it was made.
    pub version: u32,
    /// Version of this crate that measured.
    pub made_by: String,
    /// When, in seconds since 1970, UTC.
    pub made_at_unix_s: u64,
    /// The machine and the place.
    pub identity: ProfileIdentity,
    /// What was timed; never empty in a stored profile.
    pub measurements: Vec<Measurement>,
}

impl Profile {
    /// Version of the format and of the meaning of measurements: it grows when a profile made before can
    /// no longer be compared, because a backend has changed.
    pub const VERSION: u32 = 1;
}

/// What a profile is about: measurements hold for no other machine, kernel, device or file system.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct ProfileIdentity {
    /// Kernel release.
    pub kernel: Option<String>,
    /// Model of the processor.
    pub processor: Option<String>,
    /// Processors that the process may use.
    pub cpus: u32,
    /// Physical memory of the machine in GiB, rounded.
    pub memory_gib: Option<u64>,
    /// Huge pages for anonymous memory.
    pub huge_pages: HugePages,
    /// File system type.
    pub file_system: String,
    /// Name of the device.
    pub device: Option<String>,
    /// Model of the device.
    pub device_model: Option<String>,
    /// Capacity of the device, in bytes.
    pub device_bytes: Option<u64>,
    /// What was mounted.
    pub mount_source: Option<String>,
}

impl ProfileIdentity {
    /// The identity of a platform whose storage was probed; `None` without that.
    pub fn of(platform: &Platform) -> Option<Self> {
        let storage = platform.storage.as_ref()?;
        Some(Self {
            kernel: platform.kernel.clone(),
            processor: platform.processor.clone(),
            cpus: platform.cpus,
            memory_gib: platform
                .memory
                .total_bytes
                .map(|bytes| (bytes + (1 << 29)) >> 30),
            huge_pages: platform.huge_pages,
            file_system: storage.file_system.clone(),
            device: storage.device.clone(),
            device_model: storage.device_model.clone(),
            device_bytes: storage.device_bytes,
            mount_source: storage.mount_source.clone(),
        })
    }
}

/// One way of reading, timed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Measurement {
    /// What the page cache held before each time.
    pub cache: CacheState,
    /// Where the bytes went.
    pub memory: MemoryKind,
    /// The backend that read.
    pub backend: BackendKind,
    /// How.
    pub params: TransferParams,
    /// Bytes that were read each time.
    pub bytes: u64,
    /// How long that took, in microseconds, time by time; never empty.
    pub elapsed_us: Vec<u64>,
}

impl Measurement {
    /// The median of the times, in microseconds; of an even number, the longer of the two in the middle.
    pub fn median_us(&self) -> u64 {
        let mut sorted = self.elapsed_us.clone();
        sorted.sort_unstable();
        sorted.get(sorted.len() / 2).copied().unwrap_or(u64::MAX)
    }

    /// Bytes per second, by the median.
    pub fn bytes_per_second(&self) -> u64 {
        let rate = u128::from(self.bytes) * 1_000_000 / u128::from(self.median_us().max(1));
        u64::try_from(rate).unwrap_or(u64::MAX)
    }
}

/// What is known of a profile for the place that files are in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(tag = "status", rename_all = "kebab-case"))]
pub enum ProfileFact {
    /// Nobody looked.
    #[default]
    NotSought,
    /// There is none.
    Absent,
    /// There is one of this machine and place.
    Matching(Box<Profile>),
    /// There is one, which says nothing about this machine and place as they are now.
    Ignored {
        /// Why: unreadable, stale (which part of the machine changed) or foreign.
        reason: String,
    },
}
