//! What a measured profile of the place says, and when it beats the constants.

use tensora_io::{
    BackendKind, CacheState, DirectPolicy, Measurement, Profile, ProfileFact, ResidentPolicy,
};

use super::{Case, Choice, Place, decided};
use crate::tuning;
use crate::units::{Bytes, Rate, Seconds, date};
use crate::{BackendChoice, CacheChoice, Decision, DirectChoice, MemoryKind, Result};

/// The measurement that is taken over, instead of what the constants say.
pub(super) struct Pick<'a> {
    pub(super) measurement: &'a Measurement,
    /// Why, in whole sentences.
    pub(super) reason: String,
    /// Everything that could have been taken over, for what is said about the rest.
    candidates: Vec<&'a Measurement>,
}

impl Pick<'_> {
    /// What was measured of a backend that was not picked.
    pub(super) fn against(&self, kind: BackendKind) -> String {
        match fastest(
            self.candidates
                .iter()
                .copied()
                .filter(|m| m.backend == kind),
        ) {
            Some(best) => format!("the best that was measured of it here is {}", told(best)),
            None => "it was not measured here for such a load".to_owned(),
        }
    }

    pub(super) fn is_direct(&self) -> bool {
        is_direct(self.measurement)
    }
}

/// What a load is estimated to take, mapped and owned, by what was measured.
pub(super) struct Estimate {
    mapped_us: u128,
    owned_us: u128,
    on: String,
}

impl Estimate {
    pub(super) fn favours_mapping(&self) -> bool {
        self.mapped_us * (100 + u128::from(tuning::PROFILE_MARGIN_PERCENT)) < self.owned_us * 100
    }

    pub(super) fn favours_reading(&self) -> bool {
        self.owned_us * (100 + u128::from(tuning::PROFILE_MARGIN_PERCENT)) < self.mapped_us * 100
    }

    /// As a clause.
    pub(super) fn told(&self) -> String {
        format!(
            "by what was measured here{} mapping takes about {}, and reading into memory of its own {}",
            self.on,
            Seconds(self.mapped_us),
            Seconds(self.owned_us)
        )
    }
}

impl<'a> Case<'a> {
    /// Sets what the constants chose against what was measured. The decision is about the profile alone;
    /// there is none where nobody looked for one.
    pub(super) fn weigh(
        &self,
        memory: MemoryKind,
        constants: Choice,
    ) -> Result<(Choice, Option<Decision>)> {
        let profile = |chosen, reason| Some(decided("profile", chosen, reason, Vec::new()).1);
        let measured = match &self.platform.profile {
            ProfileFact::NotSought => return Ok((constants, None)),
            ProfileFact::Absent => {
                let reason = "Nothing was measured of this place, so constants decide; `tensora \
                              calibrate PATH` measures, and what it finds comes before them."
                    .to_owned();
                return Ok((constants, profile("absent", reason)));
            }
            ProfileFact::Ignored { reason } => {
                let reason = format!(
                    "There is a profile, but {}; `tensora calibrate PATH` makes a new one.",
                    reason.trim_end_matches('.')
                );
                return Ok((constants, profile("ignored", reason)));
            }
            ProfileFact::Matching(measured) => measured,
        };
        let on = on(measured);
        let unused = |why: String| {
            profile(
                "unused",
                format!("There is a profile, measured here{on}, but {why}."),
            )
        };
        let state = match self.comparable() {
            Ok(state) => state,
            Err(why) => return Ok((constants, unused(why))),
        };
        let candidates = self.candidates(measured, state, memory);
        let Some(best) = fastest(candidates.iter().copied()) else {
            let why = format!(
                "it tells no {state} time for {memory} memory of a way that is possible and wished for"
            );
            return Ok((constants, unused(why)));
        };
        let own = candidates.iter().copied().find(|m| same_way(m, &constants));
        let Some(own) = own else {
            let way = way(best);
            let reason = format!(
                "Measured here{on}: {}. What the constants say was not measured.",
                told(best)
            );
            let pick = Pick {
                measurement: best,
                reason,
                candidates,
            };
            let choice = self.choose(memory, Some(&pick))?;
            let reason = format!(
                "It is of this machine and place and knows loads like this one; of what it measured{on}, \
                 {way} was the fastest."
            );
            return Ok((choice, profile("used", reason)));
        };
        let margin = tuning::PROFILE_MARGIN_PERCENT;
        if std::ptr::eq(own, best) {
            let reason = format!(
                "Measured here{on}, what the constants say is the fastest: {}.",
                told(own)
            );
            return Ok((constants, profile("used", reason)));
        }
        let within_margin = u128::from(own.bytes_per_second()) * (100 + u128::from(margin))
            >= u128::from(best.bytes_per_second()) * 100;
        // The best may be no better than a good run of the other.
        let within_spread = fastest_rate(own) >= best.bytes_per_second();
        if within_margin || within_spread {
            let how = if within_margin {
                format!("{margin} %")
            } else {
                "the spread of its times".to_owned()
            };
            let reason = format!(
                "Measured here{on}: {}, and what the constants say, {}, is within {how} of that, so it \
                 stays.",
                told(best),
                told(own)
            );
            return Ok((constants, profile("used", reason)));
        }
        let pick = Pick {
            measurement: best,
            reason: format!(
                "Measured here{on}: {}, and {}, which the constants say.",
                told(best),
                told(own)
            ),
            candidates,
        };
        let choice = self.choose(memory, Some(&pick))?;
        let reason = format!(
            "It is of this machine and place, knows loads like this one, and comes before the \
             constants: {} was faster than {}.",
            way(best),
            way(own)
        );
        Ok((choice, profile("used", reason)))
    }

    /// What mapping and reading would take; `None` where the profile does not tell, or is not asked because
    /// more than this load's time counts.
    pub(super) fn estimate(&self) -> Option<Estimate> {
        let ProfileFact::Matching(profile) = &self.platform.profile else {
            return None;
        };
        if self.policy.cache == CacheChoice::Keep || self.is_served() {
            return None;
        }
        let state = self.comparable().ok()?;
        let resident = match self.place {
            Place::Memory => 100,
            _ => self.resident_percent().unwrap_or(0),
        };
        // Time for a share of the bytes; a rate that does not matter need not be known.
        let share_us = |percent: u64, cache, memory| {
            if percent == 0 {
                return Some(0);
            }
            let of_kind = profile.measurements.iter().filter(|m| {
                (m.cache, m.memory) == (cache, memory) && self.is_usable(m) && is_as_planned(m)
            });
            let rate = fastest(of_kind)?.bytes_per_second();
            let bytes = u128::from(self.workload.read_bytes) * u128::from(percent) / 100;
            Some(bytes * 1_000_000 / u128::from(rate.max(1)))
        };
        let half = |memory| share_us(100, CacheState::Half, memory);
        if state == CacheState::Half
            && let (Some(mapped_us), Some(owned_us)) =
                (half(MemoryKind::Mapped), half(MemoryKind::Owned))
        {
            return Some(Estimate {
                mapped_us,
                owned_us,
                on: on(profile),
            });
        }
        let warm = |memory| share_us(resident, CacheState::Warm, memory);
        let cold = |memory| share_us(100 - resident, CacheState::Cold, memory);
        Some(Estimate {
            mapped_us: warm(MemoryKind::Mapped)? + cold(MemoryKind::Mapped)?,
            // One part is copied while the other is read.
            owned_us: warm(MemoryKind::Owned)?.max(cold(MemoryKind::Owned)?),
            on: on(profile),
        })
    }

    /// The state of the page cache in which a load like this one was measured, or why none was.
    fn comparable(&self) -> std::result::Result<CacheState, String> {
        let read_bytes = self.workload.read_bytes;
        if read_bytes < tuning::PROFILE_MIN_READ_BYTES {
            return Err(format!(
                "it is about loads of {} and more, and this one has {}",
                Bytes(tuning::PROFILE_MIN_READ_BYTES),
                Bytes(read_bytes)
            ));
        }
        let mean_bytes = read_bytes / self.workload.requests.max(1);
        if mean_bytes < tuning::PROFILE_MIN_MEAN_REQUEST_BYTES {
            return Err(format!(
                "it is about requests of {} and more, and those of this load have {} on average",
                Bytes(tuning::PROFILE_MIN_MEAN_REQUEST_BYTES),
                Bytes(mean_bytes)
            ));
        }
        if self.crowded {
            return Err("it is about page caches that have room".to_owned());
        }
        match self.place {
            Place::Unknown => Err("the storage of this load is not known".to_owned()),
            Place::Memory | Place::PageCache => Ok(CacheState::Warm),
            Place::Server | Place::Device => Ok(CacheState::Cold),
            Place::Mixed => match self.resident_percent() {
                Some(percent) if percent < tuning::PROFILE_HALF_PERCENT => Ok(CacheState::Cold),
                _ => Ok(CacheState::Half),
            },
        }
    }

    /// The measurements of ways that are possible here and that the caller's wishes allow.
    fn candidates(
        &self,
        profile: &'a Profile,
        state: CacheState,
        memory: MemoryKind,
    ) -> Vec<&'a Measurement> {
        let of_state = |state| -> Vec<_> {
            profile
                .measurements
                .iter()
                .filter(|m| (m.cache, m.memory) == (state, memory))
                .filter(|m| self.is_usable(m) && self.is_wished_for(m))
                .filter(|m| is_as_planned(m))
                .collect()
        };
        let candidates = of_state(state);
        // As long as the device decides, cold times tell which way is best, too.
        if candidates.is_empty() && state == CacheState::Half && !self.is_mostly_resident() {
            return of_state(CacheState::Cold);
        }
        candidates
    }

    /// Whether a measurement makes sense and is of something that can run here.
    fn is_usable(&self, measurement: &Measurement) -> bool {
        measurement.params.validate().is_ok()
            && !measurement.elapsed_us.is_empty()
            && measurement.bytes_per_second() > 0
            && self.obstacle(measurement.backend).is_none()
            && (measurement.memory == MemoryKind::Owned || measurement.backend == BackendKind::Mmap)
            && (!is_direct(measurement) || self.supports_direct().is_ok())
    }

    fn is_wished_for(&self, measurement: &Measurement) -> bool {
        let params = &measurement.params;
        let named = match self.policy.backend {
            BackendChoice::Auto => true,
            BackendChoice::Named(kind) => measurement.backend == kind,
        };
        let set = self
            .policy
            .chunk_bytes
            .is_none_or(|set| set == params.chunk_bytes)
            && self.policy.workers.is_none_or(|set| set == params.workers)
            && (measurement.backend != BackendKind::IoUring
                || self
                    .policy
                    .queue_depth
                    .is_none_or(|set| set == params.queue_depth));
        let direct = match self.policy.direct {
            _ if measurement.backend == BackendKind::Mmap => true,
            DirectChoice::Policy(policy) => is_direct(measurement) == self.reads_direct(policy),
            DirectChoice::Auto if self.bypasses_cache() => is_direct(measurement),
            DirectChoice::Auto => {
                let may_be_direct = self.policy.cache != CacheChoice::Keep
                    && !self.copies_shared_cache()
                    && !matches!(self.place, Place::Memory | Place::PageCache);
                !is_direct(measurement) || may_be_direct
            }
        };
        named && set && direct
    }
}

fn is_direct(measurement: &Measurement) -> bool {
    measurement.backend != BackendKind::Mmap && measurement.params.direct != DirectPolicy::Never
}

/// Whether half-resident files were read as they would be: what was read again from the device is none of a
/// load that copies it.
fn is_as_planned(measurement: &Measurement) -> bool {
    measurement.cache != CacheState::Half
        || !is_direct(measurement)
        || measurement.params.resident == ResidentPolicy::Copy
}

/// The first of those with the highest median rate.
fn fastest<'m>(measurements: impl Iterator<Item = &'m Measurement>) -> Option<&'m Measurement> {
    measurements.reduce(|best, next| {
        if next.bytes_per_second() > best.bytes_per_second() {
            next
        } else {
            best
        }
    })
}

/// Bytes per second in the shortest of its times.
fn fastest_rate(measurement: &Measurement) -> u64 {
    let shortest_us = measurement.elapsed_us.iter().copied().min().unwrap_or(0);
    let rate = u128::from(measurement.bytes) * 1_000_000 / u128::from(shortest_us.max(1));
    u64::try_from(rate).unwrap_or(u64::MAX)
}

/// Whether a measurement is of what was chosen.
fn same_way(measurement: &Measurement, choice: &Choice) -> bool {
    let (measured, chosen) = (&measurement.params, &choice.params);
    let depth = |depth| match choice.backend {
        BackendKind::IoUring => depth,
        _ => 1,
    };
    measurement.backend == choice.backend
        && is_direct(measurement) == (chosen.direct != DirectPolicy::Never)
        && (measured.chunk_bytes, measured.workers) == (chosen.chunk_bytes, chosen.workers)
        && depth(measured.queue_depth) == depth(chosen.queue_depth)
}

/// `io-uring 2 × 16 × 1 MiB direct`.
fn way(measurement: &Measurement) -> String {
    let params = &measurement.params;
    let mut text = format!("{} {}", measurement.backend, params.workers);
    if measurement.backend == BackendKind::IoUring {
        text.push_str(&format!(" × {}", params.queue_depth));
    }
    text.push_str(&format!(" × {}", Bytes(params.chunk_bytes)));
    if is_direct(measurement) {
        text.push_str(" direct");
    }
    text
}

/// `io-uring 2 × 16 × 1 MiB direct 2.4 GB/s`.
fn told(measurement: &Measurement) -> String {
    format!(
        "{} {}",
        way(measurement),
        Rate(measurement.bytes_per_second())
    )
}

/// ` on 2026-11-23`, or nothing for a time that is no date.
fn on(profile: &Profile) -> String {
    date(profile.made_at_unix_s).map_or_else(String::new, |date| format!(" on {date}"))
}
