//! What to do about chunks that are in the page cache.

use tensora_io::{BackendKind, DirectPolicy, FileSystemClass, ResidentPolicy};

use super::{Case, decided, is_partly_resident};
use crate::plan::resident_name;
use crate::tuning;
use crate::units::Bytes;
use crate::{CacheChoice, Decision, DirectChoice, Rejection};

impl Case<'_> {
    /// The policy and why. A mapping is the page cache, so there is nothing to decide for it.
    pub(super) fn resident(
        &self,
        backend: BackendKind,
        direct: DirectPolicy,
    ) -> (ResidentPolicy, Option<Decision>) {
        if backend == BackendKind::Mmap {
            return (ResidentPolicy::default(), None);
        }
        let (policy, reason, against) = if self.reads_direct(direct) {
            self.resident_beside_direct_reads()
        } else {
            self.resident_in_buffered_reads()
        };
        let rejected = against
            .into_iter()
            .map(|(choice, reason)| Rejection::new(choice, reason))
            .collect();
        let (_, decision) = decided("resident", resident_name(policy), reason, rejected);
        (policy, Some(decision))
    }

    fn resident_beside_direct_reads(&self) -> Answer {
        use ResidentPolicy::{Copy, CopyAndDrop, Reread};

        let copying = |why: &str| Some(("copy", why.to_owned()));
        let storage = self.platform.storage.as_ref();
        let partly = storage.is_some_and(is_partly_resident);
        if let DirectChoice::Policy(policy) = self.policy.direct {
            let reason = match policy {
                DirectPolicy::Required => "Direct I/O is required, so all is read from the device.",
                _ => "Direct reads were asked for, so all is read from the device.",
            };
            let against = if partly {
                copying("what is in the page cache would not be read directly")
            } else {
                None
            };
            return (Reread, reason.to_owned(), against);
        }
        if !partly {
            let reason = match self.resident_percent() {
                Some(0) => "There is nothing in the page cache to copy.",
                Some(_) => "Too little is in the page cache to look for it chunk by chunk.",
                None => "Which chunks are in the page cache is not known.",
            };
            return (Reread, reason.to_owned(), None);
        }
        let speed = "the device would deliver again, more slowly, what is in memory already";
        if let Some(limit_bytes) = self.drop_limit_bytes(true) {
            let reason = format!(
                "{} That and the tensors do not fit into memory together. Each chunk that is there is \
                 copied and then dropped, {} in all, so that filling the destination does not make the \
                 kernel drop chunks that are not copied yet.",
                self.residency(),
                Bytes(limit_bytes)
            );
            return (
                CopyAndDrop { limit_bytes },
                reason,
                Some(("reread", speed.to_owned())),
            );
        }
        let reason = format!(
            "{} Those chunks are copied at the speed of memory while the others are read directly.",
            self.residency()
        );
        (Copy, reason, Some(("reread", speed.to_owned())))
    }

    fn resident_in_buffered_reads(&self) -> Answer {
        use ResidentPolicy::{Copy, CopyAndDrop};

        if let Some(limit_bytes) = self.drop_limit_bytes(false) {
            let reason = format!(
                "{} That and the tensors do not fit into memory together. What has been read is dropped \
                 behind, {} in all, so that filling the destination does not make the kernel drop what \
                 is not read yet.",
                self.residency(),
                Bytes(limit_bytes)
            );
            return (CopyAndDrop { limit_bytes }, reason, None);
        }
        let reason = "Buffered reads take from the page cache what is in it.".to_owned();
        let against = (self.crowded && self.policy.cache == CacheChoice::Keep).then(|| {
            let reason = "the files shall stay in the page cache, although they and the tensors do not \
                          fit into memory together";
            ("copy-and-drop", reason.to_owned())
        });
        (Copy, reason, against)
    }

    /// Whether what is in the page cache and owned tensors do not fit into memory together. What can be
    /// used includes the cached files: dropping them makes room.
    pub(super) fn is_crowded(&self) -> bool {
        let Some(storage) = &self.platform.storage else {
            return false;
        };
        let Some((usable_bytes, _)) = self.platform.memory.usable_bytes() else {
            return false;
        };
        let both = self
            .filled_bytes()
            .saturating_add(storage.resident_bytes.unwrap_or(0));
        // Files that live in memory cannot be dropped from it.
        storage.class != FileSystemClass::Memory
            && is_partly_resident(storage)
            && both > usable_bytes
    }

    /// Memory that fills up while files are copied, in bytes: ranks that load together take as much each.
    fn filled_bytes(&self) -> u64 {
        let shared = self.workload.shared.as_ref();
        let ranks = shared.map_or(1, |shared| shared.world.max(1));
        self.workload.destination_bytes.saturating_mul(ranks.into())
    }

    /// How much to drop from a crowded page cache, in bytes; `None` where there is room. Buffered reads
    /// add to it what they read.
    fn drop_limit_bytes(&self, reads_direct: bool) -> Option<u64> {
        if !self.crowded || self.policy.cache == CacheChoice::Keep {
            return None;
        }
        let (usable_bytes, _) = self.platform.memory.usable_bytes()?;
        let resident_bytes = self.platform.storage.as_ref()?.resident_bytes?;
        let cached_bytes = if reads_direct {
            resident_bytes
        } else {
            resident_bytes.max(self.workload.read_bytes)
        };
        let margin_bytes =
            tuning::CROWDING_MARGIN_BYTES.max(usable_bytes / tuning::CROWDING_MARGIN_SHARE);
        let excess_bytes = self
            .filled_bytes()
            .saturating_add(cached_bytes)
            .saturating_add(margin_bytes)
            .saturating_sub(usable_bytes);
        Some(excess_bytes.min(cached_bytes))
    }
}

/// A policy, why, and what was rejected for which reason.
type Answer = (ResidentPolicy, String, Option<(&'static str, String)>);
