//! How much memory data on its way takes, and how it is divided.

use tensora_io::{MemoryFacts, MemorySource};

use crate::{ConvertOptions, Error, Result};

/// Larger windows do not read or write faster on the devices that were measured.
pub(crate) const MAX_WINDOW_BYTES: u64 = 16 << 20;
/// Two are read, one is hashed, some are written, and each side may run ahead.
const MAX_BUFFERS: u64 = 12;
/// Fewer, and reading and writing would take turns.
const GOOD_BUFFERS: u64 = 8;
/// As many where storage is read again for every window: the fewer windows, the less often. One is read, one is
/// hashed, two are written.
const FEW_BUFFERS: u64 = 4;
/// All of a strided tensor's storage is held if it takes this part of the memory at most.
const HELD_SHARE: u64 = 2;
/// Otherwise blocks of it take this part.
const BLOCK_SHARE: u64 = 4;
/// Direct I/O wants windows that begin on blocks, and memory comes in pages.
const ALIGNMENT_BYTES: u64 = 4 << 10;
/// Large windows are made of huge pages.
const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// The buffers that all data passes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Buffers {
    pub(crate) count: u32,
    /// How much of a target file passes through one of them; a multiple of the alignment.
    pub(crate) window_bytes: u64,
    /// What strided storage is read into, to be put in order.
    pub(crate) gather_bytes: u64,
}

impl Buffers {
    /// What is good for files of these lengths, whose strided tensors reach over at most `hull_bytes`,
    /// within the limit and within what the machine leaves to this process.
    pub(crate) fn plan(
        limit_bytes: u64,
        file_bytes: &[u64],
        hull_bytes: u64,
        memory: &MemoryFacts,
    ) -> Result<Self> {
        let wanted = Self::within(limit_bytes, file_bytes, hull_bytes);
        let Some((available_bytes, source)) = memory.usable_bytes() else {
            return Ok(wanted);
        };
        // The other half is for threads, metadata, and whoever else takes from it meanwhile.
        let room_bytes = available_bytes / 2;
        if wanted.total_bytes() <= room_bytes {
            return Ok(wanted);
        }
        if room_bytes < ConvertOptions::MIN_MEMORY_LIMIT_BYTES {
            let least_bytes = wanted
                .total_bytes()
                .min(ConvertOptions::MIN_MEMORY_LIMIT_BYTES);
            return Err(Error::NotEnoughMemory {
                needed_bytes: 2 * least_bytes,
                available_bytes,
                remedy: match source {
                    MemorySource::ControlGroup => "raise the control group's memory limit",
                    MemorySource::AddressSpace | MemorySource::Data => {
                        "raise the limits of the process (ulimit -v, ulimit -d)"
                    }
                    _ => "free memory on the machine",
                },
            });
        }
        let shrunk = Self::within(room_bytes, file_bytes, hull_bytes);
        tracing::debug!(
            available_bytes,
            buffer_bytes = shrunk.total_bytes(),
            "memory is short, so buffers are smaller"
        );
        Ok(shrunk)
    }

    /// As many and as large as the limit allows and the files can use.
    fn within(limit_bytes: u64, file_bytes: &[u64], hull_bytes: u64) -> Self {
        // A transposed tensor whose storage fits is read once. A larger one is read again for each of its windows:
        // at most 6 times for each time that it is larger than the limit, and once more where it does not begin
        // with a window.
        let fits = hull_bytes <= limit_bytes / HELD_SHARE;
        let gather_bytes = match fits {
            true => hull_bytes,
            false => limit_bytes / BLOCK_SHARE,
        };
        let limit_bytes = limit_bytes - gather_bytes;
        let allowed = match fits {
            true => (limit_bytes / GOOD_BUFFERS).min(MAX_WINDOW_BYTES),
            false => limit_bytes / FEW_BUFFERS,
        };
        let unit = match fits && allowed >= HUGE_PAGE_BYTES {
            true => HUGE_PAGE_BYTES,
            false => ALIGNMENT_BYTES,
        };
        let largest = file_bytes.iter().copied().max().unwrap_or(0);
        let useful = largest.min(allowed).next_multiple_of(ALIGNMENT_BYTES);
        let window_bytes = (allowed - allowed % unit).min(useful).max(ALIGNMENT_BYTES);
        let windows = file_bytes.iter().fold(0, |sum: u64, file| {
            sum.saturating_add(file.div_ceil(window_bytes))
        });
        let count = (limit_bytes / window_bytes)
            .min(MAX_BUFFERS)
            .min(windows)
            .max(1);
        Self {
            count: u32::try_from(count).unwrap_or(1),
            window_bytes,
            gather_bytes,
        }
    }

    /// The limit with which all of a storage of so many bytes is held.
    pub(crate) fn limit_for(hull_bytes: u64) -> u64 {
        hull_bytes.saturating_mul(HELD_SHARE)
    }

    /// What they take together.
    pub(crate) fn total_bytes(self) -> u64 {
        u64::from(self.count) * self.window_bytes + self.gather_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn buffers_are_no_larger_than_the_data() {
        let unknown = MemoryFacts::default();
        let buffers = Buffers::plan(256 << 20, &[418 << 10], 0, &unknown).unwrap();
        assert_eq!(buffers.total_bytes(), 420 << 10);
        let buffers = Buffers::plan(256 << 20, &[1 << 40], 0, &unknown).unwrap();
        assert_eq!(buffers.total_bytes(), MAX_BUFFERS * MAX_WINDOW_BYTES);
    }

    #[test]
    fn too_little_memory_is_refused_with_the_numbers() {
        let mut memory = MemoryFacts::default();
        memory.available_bytes = Some(1 << 30);
        memory.cgroup_available_bytes = Some(1 << 20);
        let error = Buffers::plan(256 << 20, &[1 << 40], 0, &memory).unwrap_err();
        let text = error.to_string();
        for part in ["2097152", "1048576", "control group"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        // What is small needs little.
        let buffers = Buffers::plan(256 << 20, &[100_000], 0, &memory).unwrap();
        assert!(buffers.total_bytes() < 1 << 19);
    }

    proptest! {
        #[test]
        fn all_buffers_together_stay_within_the_limit(
            limit in ConvertOptions::MIN_MEMORY_LIMIT_BYTES..1 << 30,
            available in prop::option::of(2 * ConvertOptions::MIN_MEMORY_LIMIT_BYTES..1 << 30),
            files in prop::collection::vec(prop_oneof![0u64..100_000, 0u64..1 << 40], 0..5),
            hull in prop_oneof![Just(0u64), 0u64..100_000, 0u64..1 << 40],
        ) {
            let mut memory = MemoryFacts::default();
            memory.available_bytes = available;
            let buffers = Buffers::plan(limit, &files, hull, &memory).unwrap();
            let total = buffers.total_bytes();
            prop_assert!(total <= limit && total <= available.map_or(u64::MAX, |bytes| bytes / 2));
            prop_assert!(buffers.window_bytes > 0);
            prop_assert!(buffers.window_bytes.is_multiple_of(ALIGNMENT_BYTES));
            // Nothing is larger than what uses it, and there is no buffer that nothing uses.
            let largest = files.iter().copied().max().unwrap_or(0);
            prop_assert!(buffers.window_bytes < largest.max(1) + ALIGNMENT_BYTES);
            prop_assert!(buffers.gather_bytes <= hull);
            if available.is_none() {
                // What fits is held as a whole, and what does not comes in few windows.
                let fits = Buffers::limit_for(hull) <= limit;
                prop_assert_eq!(buffers.gather_bytes == hull, fits);
                prop_assert!(fits || 6 * buffers.window_bytes >= limit || buffers.window_bytes >= largest);
            }
            prop_assert!((hull == 0) == (buffers.gather_bytes == 0));
            let windows: u64 = files.iter().map(|file| file.div_ceil(buffers.window_bytes)).sum();
            prop_assert!(buffers.count >= 1 && u64::from(buffers.count) <= windows.max(1));
        }
    }
}
