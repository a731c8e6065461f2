//! Direct or buffered.

use tensora_io::{BackendKind, DirectPolicy, DirectSupport};

use super::profile::Pick;
use super::{Case, Place, decided};
use crate::tuning::{self, evidence};
use crate::units::Bytes;
use crate::{CacheChoice, Decision, DirectChoice, MemoryKind, Rejection};

impl Case<'_> {
    /// The policy and why.
    pub(super) fn direct(
        &self,
        backend: BackendKind,
        memory: MemoryKind,
        pick: Option<&Pick<'_>>,
    ) -> (DirectPolicy, Decision) {
        let preferred = DirectPolicy::Preferred;
        let decided =
            |policy, reason: String, rejected| decided("direct", policy, reason, rejected);

        if backend == BackendKind::Mmap {
            let reason = match memory {
                MemoryKind::Mapped => "A mapping is the page cache itself.",
                MemoryKind::Owned => "The mmap backend reads through the page cache.",
            };
            let rejected = match self.policy.direct {
                DirectChoice::Policy(DirectPolicy::Preferred) => vec![Rejection::new(
                    preferred,
                    "it was asked for, but there is nothing to read directly with this backend",
                )],
                _ => Vec::new(),
            };
            let reason = format!("{reason}{}", self.kept(memory));
            return decided(DirectPolicy::Never, reason, rejected);
        }
        // Where nobody looked, only the backend can tell that direct reads do not work, and it has to.
        if self.bypasses_cache() && self.place == Place::Unknown {
            let reason =
                "The page cache is to be left as it is, and whether the storage supports direct \
                          I/O is not known: it has to."
                    .to_owned();
            return decided(DirectPolicy::Required, reason, Vec::new());
        }
        if let DirectChoice::Policy(policy) = self.policy.direct {
            let mut reason = "It was asked for.".to_owned();
            if policy == preferred
                && let Err(against) = self.supports_direct()
            {
                reason.push_str(match self.place {
                    Place::Unknown => " The backend will find out whether it works:",
                    _ => " Reads will be buffered all the same:",
                });
                reason.push_str(&format!(" {against}."));
            }
            return decided(policy, reason, Vec::new());
        }
        if self.copies_shared_cache() && !self.bypasses_cache() {
            let reason =
                "The ranks that load together share the page cache, so reads go through it."
                    .to_owned();
            let rejected = vec![Rejection::new(
                preferred,
                "every rank would read for itself what all of them need",
            )];
            return decided(DirectPolicy::Never, reason, rejected);
        }
        if self.policy.cache == CacheChoice::Keep && self.place != Place::Memory {
            let reason = format!(
                "The files shall be in the page cache afterwards, so reads go through it.{}",
                self.kept(memory)
            );
            let rejected = match self.direct_pays() {
                Ok(_) => vec![Rejection::new(
                    preferred,
                    format!(
                        "it leaves nothing in the page cache; it is what this load would be fastest \
                         with ({})",
                        evidence::KEEPING
                    ),
                )],
                Err(_) => Vec::new(),
            };
            return decided(DirectPolicy::Never, reason, rejected);
        }
        if self.bypasses_cache() {
            let reason = "The page cache is to be left as it is.".to_owned();
            let rejected = vec![Rejection::new(
                DirectPolicy::Never,
                "what is read through the page cache stays in it",
            )];
            return decided(preferred, reason, rejected);
        }
        let pays = self.direct_pays();
        if let Some(pick) = pick
            && pick.is_direct() != pays.is_ok()
        {
            let slower = "it was measured to be slower here";
            return if pick.is_direct() {
                decided(
                    preferred,
                    "As measured: direct reads are the fastest here.".to_owned(),
                    vec![Rejection::new(DirectPolicy::Never, slower)],
                )
            } else {
                decided(
                    DirectPolicy::Never,
                    "As measured: reads through the page cache are the fastest here.".to_owned(),
                    vec![Rejection::new(preferred, slower)],
                )
            };
        }
        match pays {
            Ok(reason) => decided(
                preferred,
                reason,
                vec![Rejection::new(
                    DirectPolicy::Never,
                    "reading through the page cache costs a second copy and reaches a part of the \
                     device's speed only",
                )],
            ),
            Err(against) => decided(
                DirectPolicy::Never,
                "Reads go through the page cache.".to_owned(),
                vec![Rejection::new(preferred, against)],
            ),
        }
    }

    /// What becomes of the wish to keep the files in the page cache, as a further sentence.
    fn kept(&self, memory: MemoryKind) -> String {
        let (CacheChoice::Keep, Some((usable_bytes, _))) =
            (self.policy.cache, self.platform.memory.usable_bytes())
        else {
            return String::new();
        };
        let (beside, needed_bytes) = match memory {
            MemoryKind::Mapped => ("they take", self.workload.read_bytes),
            MemoryKind::Owned if self.streams => ("they take", self.workload.read_bytes),
            MemoryKind::Owned => (
                "with the tensors they take",
                self.needed_bytes().saturating_add(self.workload.read_bytes),
            ),
        };
        if self.place == Place::Memory || needed_bytes <= usable_bytes {
            return String::new();
        }
        format!(
            " Not all of them will stay there: {beside} {}, and only {} is left.",
            Bytes(needed_bytes),
            Bytes(usable_bytes)
        )
    }

    /// Whether direct reads are known to work, and why not.
    pub(super) fn supports_direct(&self) -> std::result::Result<(), String> {
        match self
            .platform
            .storage
            .as_ref()
            .map(|storage| &storage.direct)
        {
            None => Err("the storage was not probed for direct I/O".to_owned()),
            Some(DirectSupport::Supported { .. }) => Ok(()),
            Some(DirectSupport::Unsupported { reason }) => Err(format!(
                "the storage does not support direct I/O ({reason})"
            )),
        }
    }

    /// Whether reads under this policy are expected to be direct, as [`Plan::reads_direct`](crate::Plan::reads_direct).
    pub(super) fn reads_direct(&self, direct: DirectPolicy) -> bool {
        match direct {
            DirectPolicy::Never => false,
            DirectPolicy::Preferred => self.supports_direct().is_ok(),
            DirectPolicy::Required => true,
        }
    }

    /// Whether direct reads are better than buffered ones where both are possible.
    fn direct_pays(&self) -> std::result::Result<String, String> {
        match self.place {
            Place::Memory => {
                return Err("the files live in memory, so there is no device to read".to_owned());
            }
            // Copying takes the chunks from the page cache all the same; what was dropped from it
            // meanwhile is fetched fast.
            Place::PageCache if self.crowded => self.supports_direct()?,
            Place::PageCache => {
                return Err(format!(
                    "it would fetch from the device what is in the page cache already ({})",
                    evidence::WARM
                ));
            }
            Place::Server => {
                return Err(
                    "a server's files gain from read-ahead, which direct reads do without"
                        .to_owned(),
                );
            }
            Place::Unknown | Place::Mixed | Place::Device => self.supports_direct()?,
        }
        let read = self.workload.read_bytes;
        if read < tuning::DIRECT_MIN_READ_BYTES {
            return Err(format!(
                "{} is too little to be worth it (from {})",
                Bytes(read),
                Bytes(tuning::DIRECT_MIN_READ_BYTES)
            ));
        }
        let mean = read / self.workload.requests.max(1);
        if mean < tuning::DIRECT_MIN_MEAN_REQUEST_BYTES {
            return Err(format!(
                "the requests are too short, {} on average (from {}): read-ahead serves neighbours \
                 together",
                Bytes(mean),
                Bytes(tuning::DIRECT_MIN_MEAN_REQUEST_BYTES)
            ));
        }
        if self.crowded && self.place == Place::PageCache {
            return Ok(
                "What the kernel drops from the page cache before it is copied is read from the device, \
                 at full speed."
                    .to_owned(),
            );
        }
        Ok(format!(
            "{} The storage supports direct I/O, and direct reads saturate the device.",
            self.whereabouts()
        ))
    }
}
