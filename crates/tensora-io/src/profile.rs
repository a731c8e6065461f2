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

    /// Why it says nothing about `current`, a machine and a place as they are now; `None` when it does.
    ///
    /// Another place or machine makes a profile foreign; a machine that has changed, such as by a new
    /// kernel, makes it stale.
    pub fn mismatch(&self, current: &ProfileIdentity) -> Option<String> {
        let made = &self.identity;
        let place = differences([
            (
                "file system",
                show(&made.file_system),
                show(&current.file_system),
            ),
            ("device", tell(&made.device), tell(&current.device)),
            (
                "mounted",
                tell(&made.mount_source),
                tell(&current.mount_source),
            ),
            (
                "model of the device",
                tell(&made.device_model),
                tell(&current.device_model),
            ),
            (
                "bytes of the device",
                tell(&made.device_bytes),
                tell(&current.device_bytes),
            ),
        ]);
        let machine = differences([
            ("processor", tell(&made.processor), tell(&current.processor)),
            (
                "GiB of memory",
                tell(&made.memory_gib),
                tell(&current.memory_gib),
            ),
        ]);
        let state = differences([
            ("kernel", tell(&made.kernel), tell(&current.kernel)),
            ("usable CPUs", show(&made.cpus), show(&current.cpus)),
            (
                "huge pages",
                show(&made.huge_pages),
                show(&current.huge_pages),
            ),
        ]);
        [
            ("it is foreign, made at another place", place),
            ("it is foreign, made on another machine", machine),
            ("it is stale, the machine has changed", state),
        ]
        .into_iter()
        .find_map(|(verdict, differences)| Some(format!("{verdict}: {}", differences?)))
    }
}

/// `kernel "6.1" then, "6.18" now`, for what differs; `None` where nothing does.
fn differences<const N: usize>(facts: [(&str, String, String); N]) -> Option<String> {
    let list: Vec<_> = facts
        .into_iter()
        .filter(|(_, then, now)| then != now)
        .map(|(name, then, now)| format!("{name} {then} then, {now} now"))
        .collect();
    (!list.is_empty()).then(|| list.join("; "))
}

/// A fact for a message. Debug output escapes what could steer a terminal: it may come from a file.
fn show(fact: &impl fmt::Debug) -> String {
    format!("{fact:?}")
}

fn tell(fact: &Option<impl fmt::Debug>) -> String {
    fact.as_ref().map_or_else(|| "unknown".to_owned(), show)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::StorageFacts;

    fn profile() -> Profile {
        let mut platform = Platform::unknown(4, Vec::new());
        platform.kernel = Some("6.1.0".to_owned());
        platform.storage = Some(StorageFacts::unknown());
        Profile {
            version: Profile::VERSION,
            made_by: "0.1.0".to_owned(),
            made_at_unix_s: 1_795_000_000,
            identity: ProfileIdentity::of(&platform).unwrap(),
            measurements: Vec::new(),
        }
    }

    #[test]
    fn a_profile_matches_the_place_that_it_was_made_at() {
        let profile = profile();
        assert_eq!(profile.mismatch(&profile.identity), None);
    }

    #[test]
    fn every_fact_of_the_identity_counts() {
        type Change = fn(&mut ProfileIdentity);
        let profile = profile();
        let changes: [(&str, &str, Change); 10] = [
            ("stale", "kernel \"6.1.0\" then, \"6.18\" now", |i| {
                i.kernel = Some("6.18".to_owned());
            }),
            ("stale", "usable CPUs 4 then, 2 now", |i| {
                i.cpus = 2;
            }),
            ("stale", "huge pages Unknown then, Never now", |i| {
                i.huge_pages = HugePages::Never;
            }),
            ("machine", "processor unknown then, \"x\" now", |i| {
                i.processor = Some("x".to_owned());
            }),
            ("machine", "GiB of memory unknown then, 24 now", |i| {
                i.memory_gib = Some(24);
            }),
            ("place", "file system \"unknown\" then, \"xfs\" now", |i| {
                i.file_system = "xfs".to_owned();
            }),
            ("place", "device unknown then, \"sda\" now", |i| {
                i.device = Some("sda".to_owned());
            }),
            ("place", "mounted unknown then, \"a:/b\" now", |i| {
                i.mount_source = Some("a:/b".to_owned());
            }),
            (
                "place",
                "model of the device unknown then, \"m\" now",
                |i| {
                    i.device_model = Some("m".to_owned());
                },
            ),
            ("place", "bytes of the device unknown then, 5 now", |i| {
                i.device_bytes = Some(5);
            }),
        ];
        for (verdict, difference, change) in changes {
            let mut current = profile.identity.clone();
            change(&mut current);
            let reason = profile.mismatch(&current).unwrap();
            assert!(
                reason.contains(verdict) && reason.contains(difference),
                "{reason}"
            );
        }
    }

    #[test]
    fn names_cannot_steer_a_terminal() {
        let mut profile = profile();
        profile.identity.kernel = Some("\u{1b}[2J".to_owned());
        let reason = profile.mismatch(&self::profile().identity).unwrap();
        assert!(!reason.contains('\u{1b}'), "{reason}");
    }
}
