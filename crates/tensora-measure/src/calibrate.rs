use std::time::{Duration, Instant, SystemTime};

use tensora_io::{
    Availability, BackendKind, CacheState, Control, DirectPolicy, MappingPermit, Measurement,
    MemoryKind, Platform, Profile, ProfileIdentity, SourceFile, StorageFacts, TransferParams,
};

use crate::sample::Sample;
use crate::settings::{Family, ReadSetting};
use crate::{Error, Result, prime_memory, shuffled};

/// From less than this, starting threads and rings counts for more than reading.
const MIN_SAMPLE_BYTES: u64 = 32 << 20;
/// What the first read, which only estimates how long others take, is of.
const PILOT_BYTES: u64 = 64 << 20;
/// More says nothing more, however long there is.
const MAX_SAMPLE_BYTES: u64 = 4 << 30;
/// The part of usable memory that a sample may take: it is in memory twice when a copy is timed.
const SAMPLE_SHARE: u64 = 4;
/// How many cold measurements a full calibration takes, about.
const COLD_READS: u32 = 110;
/// Of the budget, per cent until which each state is measured: cold reads are slower and differ more.
const COLD_PERCENT: u32 = 55;
const HALF_PERCENT: u32 = 80;
const WARM_PERCENT: u32 = 100;
/// Of the time of a state, per cent until which each family's first settings are tried, and until which
/// neighbours of the best.
const COARSE_PERCENT: u32 = 35;
const NEIGHBOURS_PERCENT: u32 = 50;
/// How often the finalists are timed, if there is time.
const ROUNDS: usize = 5;
/// How many settings of a family go into the last rounds.
const FINALISTS: usize = 2;
/// A family whose best is so much slower than its best rival, in per cent of that one's time, is left out of the
/// last rounds.
const HOPELESS_PERCENT: u64 = 200;

/// How to calibrate. The default takes a minute and does not map.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CalibrateOptions {
    /// About how long it may take. Each backend is tried at least once in each state, however little this is.
    pub budget: Duration,
    /// Most bytes of the files to read each time; by default, as much as the budget and a quarter of the
    /// usable memory allow.
    pub sample_bytes: Option<u64>,
    /// Leave to map the files. Without it, nothing is measured about mapped memory.
    pub mapping: Option<MappingPermit>,
    /// Settings that are measured, and stand in the profile, whatever others do: those that somebody would
    /// choose without a profile, which then tells by how much others are better.
    pub always: Vec<ReadSetting>,
}

impl Default for CalibrateOptions {
    fn default() -> Self {
        Self {
            budget: Duration::from_secs(60),
            sample_bytes: None,
            mapping: None,
            always: Vec::new(),
        }
    }
}

/// What is about to be measured.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct CalibrateProgress {
    /// Since the beginning.
    pub elapsed: Duration,
    /// How long it may take in all, about.
    pub budget: Duration,
    /// How many reads were timed before.
    pub timed: u32,
    /// What is timed now.
    pub setting: ReadSetting,
}

/// What a calibration found.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Calibration {
    /// The profile: of each way of reading the best settings, fastest first within state and memory.
    pub profile: Profile,
    /// What was not measured, and why.
    pub notes: Vec<String>,
    /// Bytes that were read each time.
    pub sample_bytes: u64,
    /// How many reads were timed.
    pub timed: u32,
    /// How long it took.
    pub elapsed: Duration,
}

/// One setting and its times.
struct Trial {
    family: Family,
    params: TransferParams,
    elapsed_us: Vec<u64>,
    /// It is not tried again.
    failed: bool,
    /// It is in the profile, be it good or bad.
    kept: bool,
    /// It was timed in the last rounds, too.
    finalist: bool,
}

impl Trial {
    fn new(family: Family, params: TransferParams) -> Self {
        Self {
            family,
            params,
            elapsed_us: Vec::new(),
            failed: false,
            kept: false,
            finalist: false,
        }
    }

    fn median_us(&self) -> Option<u64> {
        let mut sorted = self.elapsed_us.clone();
        sorted.sort_unstable();
        sorted.get(sorted.len() / 2).copied()
    }
}

struct Run<'a> {
    sample: Sample<'a>,
    mapping: Option<MappingPermit>,
    control: &'a Control,
    progress: &'a mut dyn FnMut(&CalibrateProgress),
    budget: Duration,
    begun: Instant,
    timed: u32,
    notes: Vec<String>,
    trials: Vec<Trial>,
}

/// Measures which ways of reading `files` are fastest here, cold, half and warm: a coarse grid of backends and
/// parameters first, then what is near the best, then the best of each in interleaved rounds.
///
/// It reads only, as any user may who owns the files, and always the same part of them, a sample of the
/// largest. Nothing else should use the files or the device meanwhile. Of the files in the sample, what was in the page
/// cache is dropped; the sample itself is there afterwards.
///
/// `progress` is called before each timed read. The control stops everything.
///
/// # Errors
///
/// [`Error::SampleTooSmall`] for less than 32 MiB in all; [`Error::ResidencyUnknown`] where nobody can
/// tell cold from warm; [`Error::NothingMeasured`] when every way failed; what
/// [`SourceFile`] says when files cannot be read.
pub fn calibrate(
    files: &[SourceFile],
    options: &CalibrateOptions,
    control: &Control,
    progress: &mut dyn FnMut(&CalibrateProgress),
) -> Result<Calibration> {
    let begun = Instant::now();
    let file_bytes: u64 = files.iter().map(SourceFile::len).sum();
    if file_bytes < MIN_SAMPLE_BYTES {
        return Err(Error::SampleTooSmall {
            bytes: file_bytes,
            needed_bytes: MIN_SAMPLE_BYTES,
        });
    }
    let mut platform = Platform::probe();
    let storage = StorageFacts::probe(&files.iter().collect::<Vec<_>>());
    let is_direct = storage.direct.is_supported();
    platform.storage = Some(storage);
    let identity = ProfileIdentity::of(&platform).ok_or_else(|| Error::NothingMeasured {
        reasons: "the storage of the files is not known".to_owned(),
    })?;
    let mut run = Run {
        sample: Sample::choose(files, file_bytes.min(PILOT_BYTES)),
        mapping: options.mapping,
        control,
        progress,
        budget: options.budget,
        begun,
        timed: 0,
        notes: Vec::new(),
        trials: Vec::new(),
    };
    run.note_what_is_missing(&platform, is_direct);
    let is_evictable = run.is_evictable()?;
    let sample_bytes = match options.sample_bytes {
        Some(bytes) => bytes.max(MIN_SAMPLE_BYTES),
        None => run.affordable_bytes(is_evictable)?,
    };
    let memory_bytes = match platform.memory.usable_bytes() {
        Some((usable_bytes, _)) => usable_bytes / SAMPLE_SHARE,
        None => u64::MAX,
    };
    run.sample = Sample::choose(
        files,
        sample_bytes
            .min(memory_bytes)
            .clamp(MIN_SAMPLE_BYTES, file_bytes),
    );
    let works = |family: &Family| {
        platform
            .availability(family.backend)
            .is_some_and(Availability::is_available)
            && (is_direct || family.direct == DirectPolicy::Never)
            && (options.mapping.is_some() || family.memory == MemoryKind::Owned)
    };
    for (cache, percent) in [
        (CacheState::Cold, COLD_PERCENT),
        (CacheState::Half, HALF_PERCENT),
        (CacheState::Warm, WARM_PERCENT),
    ] {
        if cache != CacheState::Warm && !is_evictable {
            continue;
        }
        let end = options.budget * percent / 100;
        let families: Vec<_> = Family::all(cache).into_iter().filter(works).collect();
        let always: Vec<_> = options
            .always
            .iter()
            .filter_map(Family::of)
            .filter(|(family, _)| families.contains(family))
            .collect();
        run.measure_state(&families, &always, platform.cpus, end)?;
    }
    run.finish(identity)
}

impl Run<'_> {
    fn note_what_is_missing(&mut self, platform: &Platform, is_direct: bool) {
        for fact in &platform.backends {
            if let Availability::Unavailable { reason, .. } = &fact.availability {
                self.notes
                    .push(format!("{} was not measured: {reason}", fact.kind));
            }
        }
        if !is_direct {
            self.notes.push(
                "direct reads were not measured: not all files can be read directly".to_owned(),
            );
        }
        if self.mapping.is_none() {
            self.notes
                .push("mapped memory was not measured: mapping was not allowed".to_owned());
        }
    }

    fn is_evictable(&mut self) -> Result<bool> {
        match self.sample.prepare(CacheState::Cold) {
            Ok(()) => Ok(true),
            Err(error @ Error::StateNotMade { .. }) => {
                self.notes
                    .push(format!("cold reads were not measured: {error}"));
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// How much can be read each time, for the budget to suffice.
    fn affordable_bytes(&mut self, is_evictable: bool) -> Result<u64> {
        let cache = if is_evictable {
            CacheState::Cold
        } else {
            CacheState::Warm
        };
        let begun = Instant::now();
        self.sample.prepare(cache)?;
        prime_memory(self.sample.bytes)?;
        let params = TransferParams {
            chunk_bytes: 1 << 20,
            queue_depth: 1,
            workers: 8,
            direct: DirectPolicy::Preferred,
            resident: tensora_io::ResidentPolicy::Reread,
        };
        self.sample
            .time_owned(BackendKind::Sync, &params, self.control)?;
        let pilot_us = begun.elapsed().as_micros().max(1);
        let read_us = (self.budget * COLD_PERCENT / 100 / COLD_READS).as_micros();
        let bytes = u128::from(self.sample.bytes) * read_us / pilot_us;
        Ok(u64::try_from(bytes)
            .unwrap_or(u64::MAX)
            .clamp(PILOT_BYTES, MAX_SAMPLE_BYTES))
    }

    /// Measures the families, all of one state, and what is `always` measured of them, until `end` from the
    /// beginning of the run.
    fn measure_state(
        &mut self,
        families: &[Family],
        always: &[(Family, TransferParams)],
        cpus: u32,
        end: Duration,
    ) -> Result<()> {
        let begin = self.begun.elapsed();
        let time = end.saturating_sub(begin);
        let until = |percent: u32| begin + time * percent / 100;
        let timed_before = self.timed;

        for &(family, params) in always {
            if let Some(place) = self.time_new(family, params)? {
                self.trials[place].kept = true;
            }
        }
        // The first settings of all families before the second ones of any: time may run out.
        let coarse: Vec<_> = families.iter().map(|family| family.coarse(cpus)).collect();
        let longest = coarse.iter().map(Vec::len).max().unwrap_or(0);
        for place in 0..longest {
            for (&family, settings) in families.iter().zip(&coarse) {
                if let Some(&params) = settings.get(place)
                    && (place == 0 || self.begun.elapsed() < until(COARSE_PERCENT))
                {
                    self.time_new(family, params)?;
                }
            }
        }
        for family in self.by_speed(families) {
            let Some(best) = self.ranked(family).first().copied() else {
                continue;
            };
            for params in family.neighbours(&self.trials[best].params) {
                if self.begun.elapsed() < until(NEIGHBOURS_PERCENT) {
                    self.time_new(family, params)?;
                }
            }
        }
        let mut finalists = Vec::new();
        for family in self.by_speed(families) {
            for (rank, place) in self.ranked(family).into_iter().enumerate() {
                if rank < FINALISTS || self.trials[place].kept {
                    finalists.push(place);
                }
            }
        }
        // Of many settings that were timed once, the fastest is one that was lucky. So all finalists are
        // timed again equally often: no round begins that would not end in time, but the first.
        for round in 1..ROUNDS {
            let now = self.begun.elapsed();
            let timed = self.timed.saturating_sub(timed_before).max(1);
            let round_time =
                (now - begin) / timed * u32::try_from(finalists.len()).unwrap_or(u32::MAX);
            if now >= end || (round > 1 && now + round_time > end) {
                break;
            }
            for turn in shuffled(finalists.len(), round) {
                self.time(finalists[turn])?;
                self.trials[finalists[turn]].finalist = true;
            }
        }
        Ok(())
    }

    /// Times a setting that was not timed before; its place then.
    fn time_new(&mut self, family: Family, params: TransferParams) -> Result<Option<usize>> {
        let is_known = |trial: &Trial| trial.family == family && trial.params == params;
        if self.trials.iter().any(is_known) {
            return Ok(None);
        }
        let place = self.trials.len();
        self.trials.push(Trial::new(family, params));
        self.time(place)?;
        Ok(Some(place))
    }

    /// Families that were timed, the fastest first, without those that are hopeless.
    fn by_speed(&self, families: &[Family]) -> Vec<Family> {
        let best_us = |family: Family| {
            let place = *self.ranked(family).first()?;
            self.trials[place].median_us()
        };
        let timed: Vec<_> = families
            .iter()
            .filter_map(|&family| Some((best_us(family)?, family)))
            .collect();
        let mut hopeful: Vec<_> = timed
            .iter()
            .copied()
            .filter(|&(own_us, family)| {
                let rivals = timed
                    .iter()
                    .filter(|(_, other)| other.competes_with(family));
                let rival_us = rivals.map(|&(best_us, _)| best_us).min().unwrap_or(own_us);
                own_us.saturating_mul(100) <= rival_us.saturating_mul(HOPELESS_PERCENT)
            })
            .collect();
        hopeful.sort_by_key(|&(own_us, _)| own_us);
        hopeful.into_iter().map(|(_, family)| family).collect()
    }

    /// Places of the family's trials, the fastest first.
    fn ranked(&self, family: Family) -> Vec<usize> {
        let mut timed: Vec<_> = self
            .trials
            .iter()
            .enumerate()
            .filter(|(_, trial)| trial.family == family && !trial.failed)
            .filter_map(|(place, trial)| Some((trial.median_us()?, place)))
            .collect();
        timed.sort_unstable();
        timed.into_iter().map(|(_, place)| place).collect()
    }

    /// Times a trial once more. That one way of reading fails is noted, and ends nothing.
    fn time(&mut self, place: usize) -> Result<()> {
        self.control.check()?;
        let Trial {
            family,
            params,
            failed,
            ..
        } = self.trials[place];
        if failed {
            return Ok(());
        }
        (self.progress)(&CalibrateProgress {
            elapsed: self.begun.elapsed(),
            budget: self.budget,
            timed: self.timed,
            setting: family.with(params),
        });
        match self.time_once(family, &params) {
            Ok(elapsed) => {
                self.timed += 1;
                let elapsed_us = u64::try_from(elapsed.as_micros())
                    .unwrap_or(u64::MAX)
                    .max(1);
                self.trials[place].elapsed_us.push(elapsed_us);
                tracing::debug!(?family, ?params, elapsed_us, "timed");
                Ok(())
            }
            Err(Error::Io(error)) if error.is_cancelled() => Err(error.into()),
            Err(error @ Error::ResidencyUnknown { .. }) => Err(error),
            Err(error) => {
                self.trials[place].failed = true;
                let Family { cache, backend, .. } = family;
                let note = format!("{backend}, {cache}, is left out in part: {error}");
                if !self.notes.contains(&note) {
                    self.notes.push(note);
                }
                Ok(())
            }
        }
    }

    fn time_once(&self, family: Family, params: &TransferParams) -> Result<Duration> {
        self.sample.prepare(family.cache)?;
        match (family.memory, self.mapping) {
            (MemoryKind::Mapped, Some(permit)) => {
                if family.cache != CacheState::Warm {
                    prime_memory(self.sample.bytes)?;
                }
                self.sample
                    .time_mapped(family.cache, permit, params, self.control)
            }
            _ => {
                // What goes through a cold page cache takes memory twice.
                let is_twice =
                    family.cache != CacheState::Warm && family.direct == DirectPolicy::Never;
                prime_memory(self.sample.bytes * if is_twice { 2 } else { 1 })?;
                self.sample.time_owned(family.backend, params, self.control)
            }
        }
    }

    fn finish(self, identity: ProfileIdentity) -> Result<Calibration> {
        let mut measurements = Vec::new();
        for (place, trial) in self.trials.iter().enumerate() {
            let best = self.ranked(trial.family).first().copied();
            let has_finalist = self
                .trials
                .iter()
                .any(|other| other.finalist && other.family == trial.family);
            // What was timed only once is not set beside what was timed again.
            let is_best = best == Some(place) && !has_finalist;
            if (trial.kept || trial.finalist || is_best)
                && !trial.elapsed_us.is_empty()
                && !trial.failed
            {
                measurements.push(Measurement {
                    cache: trial.family.cache,
                    memory: trial.family.memory,
                    backend: trial.family.backend,
                    params: trial.params,
                    bytes: self.sample.bytes,
                    elapsed_us: trial.elapsed_us.clone(),
                });
            }
        }
        if measurements.is_empty() {
            return Err(Error::NothingMeasured {
                reasons: self.notes.join("; "),
            });
        }
        measurements.sort_by_key(|measurement| {
            let state = [CacheState::Cold, CacheState::Half, CacheState::Warm]
                .iter()
                .position(|&state| state == measurement.cache);
            let is_mapped = measurement.memory == MemoryKind::Mapped;
            (state, is_mapped, measurement.median_us())
        });
        let made_at = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Ok(Calibration {
            profile: Profile {
                version: Profile::VERSION,
                made_by: env!("CARGO_PKG_VERSION").to_owned(),
                made_at_unix_s: made_at.map_or(0, |since| since.as_secs()),
                identity,
                measurements,
            },
            notes: self.notes,
            sample_bytes: self.sample.bytes,
            timed: self.timed,
            elapsed: self.begun.elapsed(),
        })
    }
}
