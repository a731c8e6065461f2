//! Owned or mapped, and whether owned fits.

use tensora_io::{BackendKind, DirectPolicy, FileSystemClass};

use super::stream::least_window_memory_bytes;
use super::{Case, Obstacle, Place, decided};
use crate::tuning::{self, evidence};
use crate::units::{Bytes, count, gigabytes};
use crate::{
    BackendChoice, CacheChoice, Decision, DirectChoice, MappingConsent, MemoryBound, MemoryChoice,
    MemoryKind, PlanError, Policy, Proposal, Rejection, Result, SharedBy, plan_stream,
};

/// Owned tensors do not fit.
struct Shortage {
    available_bytes: u64,
    bound: MemoryBound,
}

impl Case<'_> {
    pub(super) fn memory(&self) -> Result<(MemoryKind, Decision)> {
        let owned =
            |reason: String, rejected| decided("memory", MemoryKind::Owned, reason, rejected);
        let mapped =
            |reason: String, rejected| decided("memory", MemoryKind::Mapped, reason, rejected);

        if self.policy.memory == MemoryChoice::Mapped {
            let mut reason =
                "It was asked for, and the caller takes on the contract of mappings.".to_owned();
            if let Err(against) = self.mapping_pays() {
                reason.push_str(&format!(" Be warned: {against}."));
            }
            return Ok(mapped(reason, Vec::new()));
        }

        let obstacles = self.mapping_obstacles();
        let pays = if obstacles.is_empty() {
            self.mapping_pays()
        } else {
            Err(join(obstacles.iter().map(|o| o.reason.as_str()), "; "))
        };
        let too_large = |shortage: &Shortage| {
            format!(
                "it takes {}, and {} leaves {}",
                Bytes(self.needed_bytes()),
                shortage.bound,
                Bytes(shortage.available_bytes)
            )
        };
        match (pays, self.shortage()) {
            (Ok(reason), shortage) => {
                let against = match (self.place, shortage) {
                    (_, Some(shortage)) => too_large(&shortage),
                    (Place::Memory | Place::PageCache, None) => {
                        format!("it would copy what can be used in place ({})", evidence::WARM)
                    }
                    _ => "it would copy what can be used in place".to_owned(),
                };
                Ok(mapped(reason, vec![Rejection::new(MemoryKind::Owned, against)]))
            }
            (Err(_), None) if self.policy.memory == MemoryChoice::Owned => {
                Ok(owned(format!("It was asked for. {}", self.fits()), Vec::new()))
            }
            (Err(against), None) => Ok(owned(
                self.fits(),
                vec![Rejection::new(MemoryKind::Mapped, against)],
            )),
            (Err(_), Some(shortage)) if obstacles.is_empty() => Ok(mapped(
                "Owned tensors would not fit into memory, and mappings are allowed: the kernel keeps \
                 as much of the files as there is room for."
                    .to_owned(),
                vec![Rejection::new(MemoryKind::Owned, too_large(&shortage))],
            )),
            (Err(_), Some(shortage)) => Err(PlanError::DoesNotFit {
                needed_bytes: self.needed_bytes(),
                destination_bytes: self.workload.destination_bytes,
                buffer_bytes: self.buffer_bytes(),
                index_bytes: self.workload.index_bytes,
                available_bytes: shortage.available_bytes,
                bound: shortage.bound,
                limit_path: self.limit_path(shortage.bound),
                proposals: self.proposals(&obstacles, &shortage),
            }),
        }
    }

    /// What would fit, and really would: each is worked out, not guessed.
    fn proposals(&self, obstacles: &[Obstacle], shortage: &Shortage) -> Vec<Proposal> {
        let mut proposals = Vec::new();
        if self.could_map() {
            proposals.push(Proposal::Map {
                steps: obstacles.iter().map(|o| o.remedy.clone()).collect(),
            });
        }
        let policy = Policy {
            memory: MemoryChoice::Auto,
            ..self.policy.clone()
        };
        if let Ok(stream) = plan_stream(self.workload, self.platform, &policy) {
            proposals.push(Proposal::Stream {
                memory_bytes: stream.memory_bytes(),
            });
        }
        // With nothing to read with, less of it is no way out.
        if self.choose(MemoryKind::Owned, None).is_err() {
            return proposals;
        }
        let destination_bytes = self.workload.destination_bytes;
        let beside_bytes = self
            .buffer_bytes()
            .saturating_add(self.workload.index_bytes);
        let room_bytes = shortage.available_bytes.saturating_sub(beside_bytes);
        // A slice may have to be gathered.
        let windows_bytes = if self.needs_windows() {
            0
        } else {
            least_window_memory_bytes(self.workload)
        };
        let ranks = self
            .workload
            .shared
            .as_ref()
            .map_or(1, |shared| shared.world.max(1));
        let slice_bytes = room_bytes.saturating_sub(windows_bytes);
        if slice_bytes > 0
            && let parts = destination_bytes.div_ceil(slice_bytes)
            && let Ok(world) = u32::try_from(parts.saturating_mul(ranks.into()))
            && (2..=tuning::PROPOSED_WORLD_MAX).contains(&world)
        {
            proposals.push(Proposal::Slice { world });
        }
        if room_bytes > 0 {
            proposals.push(Proposal::Select {
                destination_bytes: room_bytes,
            });
        }
        proposals
    }

    /// Whether nothing but wishes keeps the tensors from being mapped.
    fn could_map(&self) -> bool {
        let available = self
            .platform
            .availability(BackendKind::Mmap)
            .is_some_and(tensora_io::Availability::is_available);
        let index_fits = self
            .bound()
            .is_none_or(|(bytes, _)| self.workload.index_bytes <= bytes);
        available
            && index_fits
            && self.workload.gathered_tensors == 0
            && self.address_space_shortage().is_none()
    }

    /// What the limit on address space leaves, where that is too little to map the files.
    fn address_space_shortage(&self) -> Option<u64> {
        let left_bytes = self.platform.memory.address_space_available_bytes?;
        let storage = self.platform.storage.as_ref();
        // Whole files are mapped, whatever is needed of them.
        let mapped_bytes = storage
            .map_or(0, |storage| storage.file_bytes)
            .max(self.workload.read_bytes);
        (mapped_bytes > left_bytes).then_some(left_bytes)
    }

    pub(super) fn limit_path(&self, bound: MemoryBound) -> Option<std::path::PathBuf> {
        match bound {
            MemoryBound::ControlGroup => self.platform.memory.cgroup_limit_path.clone(),
            _ => None,
        }
    }

    /// Everything that keeps the planner from choosing mapped memory, so that an error can name all of
    /// it at once.
    fn mapping_obstacles(&self) -> Vec<Obstacle> {
        let mut obstacles = Vec::new();
        if self.policy.memory == MemoryChoice::Owned {
            obstacles.push(Obstacle::new(
                "owned memory was asked for",
                "ask for mapped memory",
            ));
        }
        if self.policy.mapping == MappingConsent::Denied {
            obstacles.push(Obstacle::new(
                "the caller has not taken on the contract of mappings",
                "consent to the contract of mappings",
            ));
        }
        if let BackendChoice::Named(backend) = self.policy.backend
            && backend != BackendKind::Mmap
        {
            obstacles.push(Obstacle::new(
                format!("only the mmap backend maps, and {backend} was named"),
                "leave the backend to auto",
            ));
        }
        if self.workload.gathered_tensors > 0 {
            obstacles.push(Obstacle::new(
                format!(
                    "{} lie scattered in their files, which no mapping can show in one piece",
                    count(self.workload.gathered_tensors, "slice")
                ),
                "select others",
            ));
        }
        if let Some(left_bytes) = self.address_space_shortage() {
            obstacles.push(Obstacle::new(
                format!(
                    "mapped files count against the process's limit on address space, which leaves {}",
                    Bytes(left_bytes)
                ),
                MemoryBound::AddressSpace.remedy(),
            ));
        }
        if let Some(obstacle) = self.obstacle(BackendKind::Mmap) {
            obstacles.push(Obstacle::new(
                format!("of the mmap backend: {}", obstacle.reason),
                obstacle.remedy,
            ));
        }
        obstacles
    }

    /// Whether mapping is better than reading where both are possible, and why or why not.
    fn mapping_pays(&self) -> std::result::Result<String, String> {
        if self.policy.backend == BackendChoice::Named(BackendKind::Mmap) {
            return Ok(
                "The mmap backend was named and mappings are allowed, so its mapping is handed out as \
                 it is."
                    .to_owned(),
            );
        }
        if self.policy.direct == DirectChoice::Policy(DirectPolicy::Preferred)
            && self.supports_direct().is_ok()
        {
            return Err("direct I/O was asked for, and a mapping is the page cache".to_owned());
        }
        let by_constants = self.mapping_pays_by_constants();
        match (self.estimate(), by_constants) {
            (None, by_constants) => by_constants,
            (Some(estimate), Ok(_)) if estimate.favours_reading() => Err(estimate.told()),
            (Some(estimate), _) if estimate.favours_mapping() => {
                Ok(format!("Mappings are allowed, and {}.", estimate.told()))
            }
            (Some(_), by_constants) => by_constants,
        }
    }

    fn mapping_pays_by_constants(&self) -> std::result::Result<String, String> {
        let shared = self.workload.shared.as_ref();
        if let Some(shared) = shared
            && self.shares()
            && matches!(self.place, Place::Mixed | Place::Device)
        {
            let all_bytes = shared.shared_bytes.saturating_add(shared.exclusive_bytes);
            return match self.platform.memory.usable_bytes() {
                Some((usable_bytes, _)) if all_bytes <= usable_bytes => Ok(format!(
                    "Mappings are allowed, and {} load together: one copy of the files in the page cache, \
                     {}, is enough for all of them.",
                    count(shared.world.into(), "rank"),
                    Bytes(all_bytes)
                )),
                Some((usable_bytes, _)) => Err(format!(
                    "what {} load together takes {} of the page cache, and only {} is left",
                    count(shared.world.into(), "rank"),
                    Bytes(all_bytes),
                    Bytes(usable_bytes)
                )),
                None => Err(
                    "whether what the ranks load together fits into the page cache is not known"
                        .to_owned(),
                ),
            };
        }
        match self.place {
            Place::PageCache if self.is_served() => Err(
                "when the server goes away, touching a page that the cache has dropped hangs or kills \
                 the process"
                    .to_owned(),
            ),
            Place::Memory | Place::PageCache => Ok(format!(
                "{} Mappings are allowed, so the tensors are used where they are.",
                self.whereabouts()
            )),
            Place::Server => Err(
                "every first touch of a page would wait for the server, and when that goes away the \
                 process hangs or is killed"
                    .to_owned(),
            ),
            Place::Mixed | Place::Device if self.policy.cache == CacheChoice::Keep => {
                Ok(format!(
                    "The files shall be in the page cache afterwards, and of what brings them there \
                     populating a mapping is the fastest ({}).",
                    evidence::KEEPING
                ))
            }
            Place::Mixed if self.maps_partly_resident() => Ok(format!(
                "{} Mappings are allowed, so that part is used where it is; the rest is too little \
                 for direct reads to make up for copying it.",
                self.whereabouts()
            )),
            Place::Mixed | Place::Device => self.populating_pays(),
            Place::Unknown => Err(
                "where the files are is not known, and mapping does not pay everywhere".to_owned(),
            ),
        }
    }

    /// Whether bringing files of a device into the page cache and using them there is better than reading
    /// them directly.
    fn populating_pays(&self) -> std::result::Result<String, String> {
        let read_bytes = self.workload.read_bytes;
        if self.has_unknown_class() {
            return Err(
                "whether the files are behind a server is not known, and cold files of a server are not \
                 mapped"
                    .to_owned(),
            );
        }
        if self.spins() {
            return Err(
                "populating a mapping reads in many places at once, which makes a disk's heads seek"
                    .to_owned(),
            );
        }
        // What was measured are long extents.
        let mean_bytes = read_bytes / self.workload.requests.max(1);
        if mean_bytes < tuning::PROFILE_MIN_MEAN_REQUEST_BYTES {
            return Err(format!(
                "cold, mapping pays for requests of {} and more, and those of this load have {} on average",
                Bytes(tuning::PROFILE_MIN_MEAN_REQUEST_BYTES),
                Bytes(mean_bytes)
            ));
        }
        if let Some((usable_bytes, _)) = self.platform.memory.usable_bytes()
            && usable_bytes < read_bytes
        {
            return Err(format!(
                "populating a mapping takes {} of the page cache, and only {} is left",
                Bytes(read_bytes),
                Bytes(usable_bytes)
            ));
        }
        let percent = self.resident_percent().unwrap_or(0);
        if percent >= tuning::PROFILE_HALF_PERCENT {
            return Ok(format!(
                "{} Mappings are allowed, and it pays to bring the rest there and use the tensors there, since \
                 no other memory has to be zeroed and filled ({}).",
                self.whereabouts(),
                evidence::HALF_MAPPING_LEADS
            ));
        }
        let most = gigabytes(tuning::MAP_COLD_MAX_BYTES);
        if read_bytes > tuning::MAP_COLD_MAX_BYTES {
            return Err(format!(
                "the files are not in memory, and mapping pays up to {most}: larger loads are read more slowly \
                 through a mapping ({})",
                evidence::COLD_MAPPING
            ));
        }
        Ok(format!(
            "{} Mappings are allowed, and up to {most} it pays to fill the page cache and use the tensors \
             there, since no other memory has to be zeroed and filled ({}).",
            self.whereabouts(),
            evidence::COLD_MAPPING_LEADS
        ))
    }

    /// Whether nobody knows what kind of file system the files are in.
    fn has_unknown_class(&self) -> bool {
        let storage = self.platform.storage.as_ref();
        storage.is_some_and(|storage| storage.class == FileSystemClass::Unknown)
    }

    /// Whether so much is in the page cache that mapping pays although some is not.
    fn maps_partly_resident(&self) -> bool {
        self.resident_percent()
            .is_some_and(|percent| percent >= tuning::MAP_RESIDENT_PERCENT)
    }

    /// Whether the files come from a server, resident or not.
    pub(super) fn is_served(&self) -> bool {
        self.platform.storage.as_ref().is_some_and(|storage| {
            matches!(
                storage.class,
                FileSystemClass::Network | FileSystemClass::Fuse
            )
        })
    }

    /// All that a load holds whose tensors are owned, in bytes.
    pub(super) fn needed_bytes(&self) -> u64 {
        self.workload
            .destination_bytes
            .saturating_add(self.buffer_bytes())
            .saturating_add(self.workload.index_bytes)
    }

    /// What the reads under way take, and windows at least, in bytes.
    fn buffer_bytes(&self) -> u64 {
        // Scratch never exceeds what is read.
        let scratch_bytes = tuning::OVERHEAD_BYTES.min(self.workload.read_bytes);
        if self.needs_windows() {
            scratch_bytes.saturating_add(least_window_memory_bytes(self.workload))
        } else {
            scratch_bytes
        }
    }

    /// Whether something is gathered out of windows, or shared through them.
    fn needs_windows(&self) -> bool {
        self.workload.gathered_tensors > 0
            || self.shares() && self.owned_sharing() == SharedBy::Memory
    }

    /// What windows may take beside the tensors, in bytes.
    pub(super) fn window_limit_bytes(&self, memory: MemoryKind) -> u64 {
        if memory == MemoryKind::Mapped || !self.needs_windows() {
            return 0;
        }
        let least_bytes = least_window_memory_bytes(self.workload);
        let room_bytes = self.bound().map_or(u64::MAX, |(available_bytes, _)| {
            available_bytes.saturating_sub(self.needed_bytes())
        });
        least_bytes
            .saturating_add(room_bytes)
            .min(tuning::WINDOW_MEMORY_BYTES.max(least_bytes))
    }

    /// The tightest bound on the load's memory, when any is known.
    fn bound(&self) -> Option<(u64, MemoryBound)> {
        let usable = self
            .platform
            .memory
            .usable_bytes()
            .map(|(bytes, source)| (bytes, MemoryBound::from(source)));
        let limit = self
            .policy
            .memory_limit_bytes
            .map(|bytes| (bytes, MemoryBound::Limit));
        usable
            .into_iter()
            .chain(limit)
            .min_by_key(|(bytes, _)| *bytes)
    }

    fn shortage(&self) -> Option<Shortage> {
        let (available_bytes, bound) = self.bound()?;
        (self.needed_bytes() > available_bytes).then_some(Shortage {
            available_bytes,
            bound,
        })
    }

    fn fits(&self) -> String {
        let needed = Bytes(self.needed_bytes());
        match self.bound() {
            Some((available, bound)) => format!(
                "It fits: with the reads under way the tensors take {needed}, and {bound} leaves {}.",
                Bytes(available)
            ),
            None => format!(
                "With the reads under way the tensors take {needed}; how much memory is left is not \
                 known."
            ),
        }
    }
}

fn join<'a>(parts: impl Iterator<Item = &'a str>, separator: &str) -> String {
    parts.collect::<Vec<_>>().join(separator)
}
