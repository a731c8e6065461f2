//! What ranks that load together read through, and what slices cost.

use tensora_io::{DirectPolicy, MemoryKind};

use super::{Case, Place, decided};
use crate::units::{Bytes, count};
use crate::{AccessPattern, Decision, DirectChoice, PlanError, Rejection, Result, SharedBy};

impl Case<'_> {
    /// Whether there is anything that two ranks need.
    pub(super) fn shares(&self) -> bool {
        let shared = self.workload.shared.as_ref();
        shared.is_some_and(|shared| shared.world > 1 && shared.shared_bytes > 0)
    }

    /// Ranks that can share nothing but the page cache have to be allowed to.
    pub(super) fn check_sharing(&self) -> Result<()> {
        let asked = self.policy.direct == DirectChoice::Policy(DirectPolicy::Preferred)
            && self.supports_direct().is_ok();
        let around = self.bypasses_cache() || self.policy.direct.is_required() || asked;
        if self.shares() && !self.has_shared_memory() && around {
            return Err(PlanError::SharingNeedsPageCache {
                os: self.platform.os.clone(),
            });
        }
        Ok(())
    }

    /// What the ranks share whose tensors are owned.
    pub(super) fn owned_sharing(&self) -> SharedBy {
        match self.place {
            _ if !self.has_shared_memory() => SharedBy::PageCache,
            Place::Memory => SharedBy::PageCache,
            // Filling the destinations of all ranks would drop what the slower ones have not copied yet.
            Place::PageCache if !self.is_crowded() => SharedBy::PageCache,
            _ => SharedBy::Memory,
        }
    }

    /// Whether owned tensors are copied out of a page cache that the ranks share, so that nothing may be
    /// read past it.
    pub(super) fn copies_shared_cache(&self) -> bool {
        self.shares() && self.owned_sharing() == SharedBy::PageCache
    }

    pub(super) fn sharing(&self, memory: MemoryKind) -> Option<(SharedBy, Decision)> {
        if !self.shares() {
            return None;
        }
        let shared = self.workload.shared.as_ref()?;
        let what = format!(
            "{} load together, and two or more of them need {}.",
            count(shared.world.into(), "rank"),
            Bytes(shared.shared_bytes)
        );
        let own_memory = SharedBy::Memory;
        Some(if memory == MemoryKind::Mapped {
            decided(
                "sharing",
                SharedBy::PageCache,
                format!(
                    "{what} A mapping is the page cache, which all of them use in place: each page is \
                     fetched once."
                ),
                vec![Rejection::new(
                    own_memory,
                    "it would be filled out of what all can use in place",
                )],
            )
        } else if self.owned_sharing() == SharedBy::Memory {
            let against = match self.place {
                Place::PageCache => {
                    "filling the tensors of all ranks would drop from it what the slower ones have not \
                     copied yet"
                }
                Place::Server => {
                    "the ranks would ask the server for the same bytes at the same time, and wait for its \
                     answers page by page"
                }
                _ => {
                    "reading through it costs a second copy and reaches a part of the device's speed only"
                }
            };
            decided(
                "sharing",
                own_memory,
                format!(
                    "{what} Each window of them is read once, by one of the ranks, into memory that all \
                     map, and all copy out of it what they need."
                ),
                vec![Rejection::new(SharedBy::PageCache, against)],
            )
        } else {
            let (why, against) = if self.has_shared_memory() {
                (
                    self.whereabouts(),
                    "it would be filled with a copy of what all can copy from".to_owned(),
                )
            } else {
                (
                    format!(
                        "On {} they have nothing else in common: reads are buffered, which costs a second \
                         copy and a part of the device's speed, and what does not stay in the page cache \
                         is read again.",
                        self.platform.os
                    ),
                    format!("it needs Linux, and this is {}", self.platform.os),
                )
            };
            decided(
                "sharing",
                SharedBy::PageCache,
                format!("{what} {why} Each rank copies out of the page cache what it needs."),
                vec![Rejection::new(own_memory, against)],
            )
        })
    }

    /// What is needed and what is read, where that is not simply all of the files.
    pub(super) fn slices(&self, memory: MemoryKind) -> Option<Decision> {
        let workload = self.workload;
        let needed_bytes = workload.needed_bytes;
        // Nothing is delivered that is not read, whatever the workload claims.
        let read_bytes = workload.read_bytes.max(needed_bytes);
        let is_part = workload.access == AccessPattern::Ranges || workload.gathered_tensors > 0;
        if needed_bytes == 0 || !is_part {
            return None;
        }
        let mut reason = format!(
            "{} is needed and {} read",
            Bytes(needed_bytes),
            Bytes(read_bytes)
        );
        let beyond_bytes = read_bytes.saturating_sub(needed_bytes);
        if beyond_bytes > 0 {
            reason.push_str(&format!(
                ", {}: gaps between needed bytes are read where that takes less time than another \
                 read.",
                compared(beyond_bytes, needed_bytes)
            ));
        } else {
            reason.push('.');
        }
        let gathered = workload.gathered_tensors;
        let (chosen, rejected) = if gathered == 0 {
            reason.push_str(if self.streams {
                " What is needed of each tensor lies in one piece and is handed on where it was read."
            } else if memory == MemoryKind::Mapped {
                " What is needed of each tensor lies in one piece and is used where it is."
            } else {
                " What is needed of each tensor lies in one piece and is read straight to where it goes."
            });
            ("straight", Vec::new())
        } else {
            let all = gathered >= workload.tensors;
            reason.push_str(&format!(
                " {}, {}, {} scattered in their files; what holds them is read in windows, and they are \
                 gathered from there.",
                count(gathered, "tensor"),
                Bytes(workload.gathered_bytes),
                if gathered == 1 { "lies" } else { "lie" },
            ));
            if !all {
                reason.push_str(if self.streams {
                    " The others are handed on where they were read."
                } else {
                    " The others are read straight to where they go."
                });
            }
            let rejection = Rejection::new(
                "straight",
                "it takes a read for each of many short runs, of which every one costs more than the gap \
                 before it",
            );
            (if all { "gathered" } else { "mixed" }, vec![rejection])
        };
        Some(decided("slices", chosen, reason, rejected).1)
    }

    fn has_shared_memory(&self) -> bool {
        self.platform.os == "linux"
    }
}

/// `2 % more`, or, where it is as much again or more, `3 times as much`.
fn compared(beyond_bytes: u64, needed_bytes: u64) -> String {
    let percent = u128::from(beyond_bytes) * 100 / u128::from(needed_bytes.max(1));
    match percent {
        0 => "less than 1 % more".to_owned(),
        1..=99 => format!("{percent} % more"),
        _ => format!("{} times as much", percent / 100 + 1),
    }
}
