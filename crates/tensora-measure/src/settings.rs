//! Ways of reading that are worth trying.

use tensora_io::{
    BackendKind, CacheState, DirectPolicy, MemoryKind, ResidentPolicy, TransferParams,
};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// What cold reads, and copies, are cut into; populating is cheap enough for longer pieces.
const READ_CHUNK_BYTES: std::ops::RangeInclusive<u64> = 256 * KIB..=16 * MIB;
const MAP_CHUNK_BYTES: std::ops::RangeInclusive<u64> = MIB..=128 * MIB;
const MAX_WORKERS: u32 = 64;
const MAX_RINGS: u32 = 8;
const DEPTHS: std::ops::RangeInclusive<u32> = 2..=128;
/// Most bytes in flight: scratch of a load, and its memory, grow with it.
const MAX_IN_FLIGHT_BYTES: u64 = 64 * MIB;

/// A way of reading whose parameters may vary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Family {
    pub(crate) cache: CacheState,
    pub(crate) memory: MemoryKind,
    pub(crate) backend: BackendKind,
    pub(crate) direct: DirectPolicy,
}

/// A way of reading with its parameters, in a state of the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadSetting {
    /// What the page cache holds before.
    pub cache: CacheState,
    /// Where the bytes go; mapped memory comes from the mmap backend only.
    pub memory: MemoryKind,
    /// Who reads.
    pub backend: BackendKind,
    /// How. What is resident is read again in a cold or warm state, and copied in the half one, whatever
    /// stands here.
    pub params: TransferParams,
}

impl Family {
    /// The families of a state, those first that are tried first.
    pub(crate) fn all(cache: CacheState) -> Vec<Self> {
        use BackendKind::{Async, IoUring, Mmap, Sync};
        use DirectPolicy::{Never, Preferred};
        use MemoryKind::{Mapped, Owned};
        let ways: &[_] = match cache {
            CacheState::Cold => &[
                (Owned, Sync, Preferred),
                (Owned, IoUring, Preferred),
                (Owned, Async, Preferred),
                (Mapped, Mmap, Never),
                (Owned, Sync, Never),
                (Owned, Mmap, Never),
                (Owned, IoUring, Never),
                (Owned, Async, Never),
            ],
            CacheState::Half => &[
                (Owned, Sync, Preferred),
                (Owned, IoUring, Preferred),
                (Owned, Async, Preferred),
                (Mapped, Mmap, Never),
                (Owned, Sync, Never),
                (Owned, Mmap, Never),
            ],
            CacheState::Warm => &[
                (Mapped, Mmap, Never),
                (Owned, Sync, Never),
                (Owned, Mmap, Never),
                (Owned, Async, Never),
                (Owned, IoUring, Never),
            ],
        };
        ways.iter()
            .map(|&(memory, backend, direct)| Self {
                cache,
                memory,
                backend,
                direct,
            })
            .collect()
    }

    /// The family of a setting, and its parameters as all of that family have them; `None` for what is in no
    /// family, such as mapped memory by another backend.
    pub(crate) fn of(setting: &ReadSetting) -> Option<(Self, TransferParams)> {
        let family = Self::all(setting.cache).into_iter().find(|family| {
            let is_direct = |direct| direct != DirectPolicy::Never;
            (family.memory, family.backend) == (setting.memory, setting.backend)
                && is_direct(family.direct) == is_direct(setting.params.direct)
        })?;
        let TransferParams {
            chunk_bytes,
            queue_depth,
            workers,
            ..
        } = setting.params;
        Some((family, family.params(chunk_bytes, queue_depth, workers)))
    }

    pub(crate) const fn with(self, params: TransferParams) -> ReadSetting {
        ReadSetting {
            cache: self.cache,
            memory: self.memory,
            backend: self.backend,
            params,
        }
    }

    /// Whether two families could serve the same load, so that one being slower makes it useless.
    pub(crate) fn competes_with(self, other: Self) -> bool {
        (self.cache, self.memory, self.direct) == (other.cache, other.memory, other.direct)
    }

    /// Parameters to begin with, the most promising first.
    pub(crate) fn coarse(self, cpus: u32) -> Vec<TransferParams> {
        let list: &[(u64, u32, u32)] = match (self.cache, self.memory, self.backend, self.direct) {
            // Chunk, depth, workers. Cold, the device decides, …
            (CacheState::Cold | CacheState::Half, MemoryKind::Owned, BackendKind::IoUring, _) => &[
                (MIB, 16, 2),
                (MIB, 8, 4),
                (4 * MIB, 4, 2),
                (MIB, 32, 1),
                (512 * KIB, 32, 2),
            ],
            (CacheState::Cold | CacheState::Half, MemoryKind::Owned, _, DirectPolicy::Never) => {
                &[(4 * MIB, 1, 8), (MIB, 1, 16), (8 * MIB, 1, 4)]
            }
            (CacheState::Cold | CacheState::Half, MemoryKind::Owned, ..) => &[
                (MIB, 1, 16),
                (4 * MIB, 1, 8),
                (MIB, 1, 32),
                (2 * MIB, 1, 4),
                (512 * KIB, 1, 32),
            ],
            (CacheState::Cold | CacheState::Half, MemoryKind::Mapped, ..) => {
                &[(4 * MIB, 1, 8), (4 * MIB, 1, 16), (16 * MIB, 1, 4)]
            }
            // … warm, processors and memory.
            (CacheState::Warm, MemoryKind::Owned, BackendKind::IoUring, _) => &[
                (4 * MIB, 4, cpus),
                (MIB, 4, cpus),
                (4 * MIB, 4, cpus.saturating_mul(2)),
            ],
            (CacheState::Warm, MemoryKind::Owned, ..) => &[
                (4 * MIB, 1, cpus),
                (MIB, 1, cpus),
                (4 * MIB, 1, cpus.saturating_mul(2)),
                (4 * MIB, 1, cpus.saturating_mul(4)),
            ],
            (CacheState::Warm, MemoryKind::Mapped, ..) => &[
                (4 * MIB, 1, 8),
                (16 * MIB, 1, cpus),
                (4 * MIB, 1, cpus.saturating_mul(2)),
                (4 * MIB, 1, 1),
            ],
        };
        let mut settings = Vec::new();
        for &(chunk_bytes, queue_depth, workers) in list {
            let limited = workers.clamp(1, self.max_workers());
            let params = self.params(chunk_bytes, queue_depth, limited);
            if !settings.contains(&params) {
                settings.push(params);
            }
        }
        settings
    }

    /// Parameters of which one is twice or half as large.
    pub(crate) fn neighbours(self, params: &TransferParams) -> Vec<TransferParams> {
        let &TransferParams {
            chunk_bytes,
            queue_depth,
            workers,
            ..
        } = params;
        let mut list = vec![
            (chunk_bytes, queue_depth, workers * 2),
            (chunk_bytes, queue_depth, workers / 2),
            (chunk_bytes * 2, queue_depth, workers),
            (chunk_bytes / 2, queue_depth, workers),
        ];
        if self.backend == BackendKind::IoUring {
            list.push((chunk_bytes, queue_depth * 2, workers));
            list.push((chunk_bytes, queue_depth / 2, workers));
        }
        let chunks = match self.memory {
            MemoryKind::Owned => READ_CHUNK_BYTES,
            MemoryKind::Mapped => MAP_CHUNK_BYTES,
        };
        list.retain(|(chunk_bytes, queue_depth, workers)| {
            let in_flight = chunk_bytes * u64::from(*queue_depth) * u64::from(*workers);
            chunks.contains(chunk_bytes)
                && (1..=self.max_workers()).contains(workers)
                && (*queue_depth == 1 || DEPTHS.contains(queue_depth))
                && (self.memory == MemoryKind::Mapped || in_flight <= MAX_IN_FLIGHT_BYTES)
        });
        list.into_iter()
            .map(|(chunk_bytes, queue_depth, workers)| {
                self.params(chunk_bytes, queue_depth, workers)
            })
            .collect()
    }

    const fn max_workers(self) -> u32 {
        match self.backend {
            BackendKind::IoUring => MAX_RINGS,
            _ => MAX_WORKERS,
        }
    }

    const fn params(self, chunk_bytes: u64, queue_depth: u32, workers: u32) -> TransferParams {
        TransferParams {
            chunk_bytes,
            queue_depth,
            workers,
            direct: self.direct,
            // Direct reads of what the page cache holds would measure the cold state again.
            resident: match (self.cache, self.direct) {
                (CacheState::Half, DirectPolicy::Preferred | DirectPolicy::Required) => {
                    ResidentPolicy::Copy
                }
                _ => ResidentPolicy::Reread,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_that_can_be_reached_is_valid() {
        for cache in [CacheState::Cold, CacheState::Half, CacheState::Warm] {
            for family in Family::all(cache) {
                for cpus in [1, 2, 64, 4096] {
                    let mut settings = family.coarse(cpus);
                    assert!(!settings.is_empty(), "{family:?}");
                    let mut place = 0;
                    while let Some(params) = settings.get(place).copied() {
                        params.validate().unwrap();
                        assert_eq!(Family::of(&family.with(params)), Some((family, params)));
                        for next in family.neighbours(&params) {
                            assert_ne!(next, params);
                            if !settings.contains(&next) {
                                settings.push(next);
                            }
                        }
                        place += 1;
                    }
                    assert!(settings.len() < 500, "{family:?}: {}", settings.len());
                }
            }
        }
    }

    #[test]
    fn a_setting_is_made_like_its_family() {
        let mut setting = ReadSetting {
            cache: CacheState::Half,
            memory: MemoryKind::Owned,
            backend: BackendKind::Sync,
            params: TransferParams {
                chunk_bytes: 3 * MIB,
                queue_depth: 1,
                workers: 5,
                direct: DirectPolicy::Required,
                resident: ResidentPolicy::CopyAndDrop { limit_bytes: 7 },
            },
        };
        let (family, params) = Family::of(&setting).unwrap();
        assert_eq!(family.direct, DirectPolicy::Preferred);
        assert_eq!(params.resident, ResidentPolicy::Copy);
        assert_eq!((params.chunk_bytes, params.workers), (3 * MIB, 5));
        // Nobody reads directly what is in the page cache anyway, nor maps with threads.
        setting.cache = CacheState::Warm;
        assert_eq!(Family::of(&setting), None);
        setting.params.direct = DirectPolicy::Never;
        assert!(Family::of(&setting).is_some());
        setting.memory = MemoryKind::Mapped;
        assert_eq!(Family::of(&setting), None);
    }

    #[test]
    fn mapped_and_owned_memory_do_not_compete() {
        let families = Family::all(CacheState::Cold);
        let rivals = |family: Family| {
            let rivals = families.iter().filter(|other| other.competes_with(family));
            rivals.count()
        };
        // Direct reads by three backends, buffered ones by four, and mapping.
        let counts: Vec<_> = families.iter().map(|&family| rivals(family)).collect();
        assert_eq!(counts, [3, 3, 3, 1, 4, 4, 4, 4]);
    }
}
