//! What follows from the samples of a cell.

use tensora_measure::{median, median_ratio};

use crate::case::{AUTO, AUTO_AGAIN, AUTO_MAPPING, Case, CaseKind, DIGEST, STREAM};
use crate::run::{Cell, Sample};

/// Until when a case's time runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// Until every tensor can be used. It compares loads that leave every byte in memory.
    Usable,
    /// Until every byte was read once more. A reader that maps and leaves the reading for later gains
    /// nothing by that.
    Touched,
}

/// How the planner's choice compares with the best explicit backend.
#[derive(Clone, Debug, PartialEq)]
pub struct Regret {
    /// The best explicit backend.
    pub best: String,
    /// Median over the rounds of the automatic choice's time ÷ that backend's.
    pub figure: f64,
}

impl Sample {
    fn seconds(&self, clock: Clock) -> f64 {
        match clock {
            Clock::Usable => self.elapsed_seconds,
            Clock::Touched => self.touched_seconds.unwrap_or(self.elapsed_seconds),
        }
    }
}

impl Cell {
    /// The cases that have samples, in the order of tables.
    pub fn cases(&self) -> impl Iterator<Item = &'static Case> {
        let has_samples = |case: &&Case| self.of_case(case.name).next().is_some();
        Case::all().iter().filter(has_samples)
    }

    /// Names of the cases of these kinds that have samples.
    fn names(&self, kinds: &[CaseKind]) -> Vec<&'static str> {
        self.cases()
            .filter(|case| kinds.contains(&case.kind))
            .map(|case| case.name)
            .collect()
    }

    pub(crate) fn of_case(&self, case: &str) -> impl Iterator<Item = &Sample> {
        self.samples
            .iter()
            .filter(move |sample| sample.case == case)
    }

    /// Median of the case's times, in seconds.
    pub fn median_seconds(&self, case: &str, clock: Clock) -> Option<f64> {
        median(self.of_case(case).map(|sample| sample.seconds(clock)))
    }

    /// Largest peak resident memory of the case, in bytes.
    pub fn peak_resident_bytes(&self, case: &str) -> Option<u64> {
        self.of_case(case)
            .filter_map(|sample| sample.peak_resident_bytes)
            .max()
    }

    /// Median over the rounds of the one case's time ÷ the other's in the same round.
    pub fn ratio(&self, numerator: &str, denominator: &str, clock: Clock) -> Option<f64> {
        median_ratio(self.of_case(numerator).filter_map(|above| {
            let mut below = self.of_case(denominator);
            let below = below.find(|below| below.round == above.round)?;
            Some((above.seconds(clock), below.seconds(clock)))
        }))
    }

    /// The automatic choice into owned memory, against every backend into owned memory.
    pub fn regret_owned(&self) -> Option<Regret> {
        self.against_best(AUTO, &self.names(&[CaseKind::Explicit]))
    }

    /// The automatic choice that may map, against every backend, owned and mapped.
    pub fn regret_mapping(&self) -> Option<Regret> {
        let rivals = self.names(&[CaseKind::Explicit, CaseKind::ExplicitMapped]);
        self.against_best(AUTO_MAPPING, &rivals)
    }

    /// The automatic choice into owned memory, against the faster of the two ceilings.
    pub fn against_ceiling(&self) -> Option<Regret> {
        self.against_best(AUTO, &self.names(&[CaseKind::Ceiling]))
    }

    /// The stream, against the faster of the two ceilings.
    pub fn stream_against_ceiling(&self) -> Option<Regret> {
        self.against_best(STREAM, &self.names(&[CaseKind::Ceiling]))
    }

    /// The streamed digest, against whichever takes longer: the faster ceiling, or hashing as much memory.
    pub fn digest_against_limits(&self) -> Option<Regret> {
        let device = self.against_best(DIGEST, &self.names(&[CaseKind::Ceiling]))?;
        let hashing = self.against_best(DIGEST, &self.names(&[CaseKind::Hash]))?;
        Some(if hashing.figure < device.figure {
            hashing
        } else {
            device
        })
    }

    /// Largest of the case's quotients of two of a sample's counts.
    #[allow(clippy::cast_precision_loss)]
    pub(crate) fn share(
        &self,
        case: &str,
        of: impl Fn(&Sample) -> Option<u64>,
        to: impl Fn(&Sample) -> Option<u64>,
    ) -> Option<f64> {
        self.of_case(case)
            .filter_map(|sample| Some(of(sample)? as f64 / to(sample)? as f64))
            .max_by(f64::total_cmp)
    }

    /// `case` against the one rival that is best over all rounds. The best of each single round would be whoever
    /// was lucky in it: a minimum of several noisy times, which nobody who sticks to one choice attains.
    fn against_best(&self, case: &str, rivals: &[&str]) -> Option<Regret> {
        let best = rivals
            .iter()
            .filter_map(|&rival| Some((self.ratio(rival, case, Clock::Usable)?, rival)))
            .min_by(|a, b| a.0.total_cmp(&b.0))?
            .1;
        Some(Regret {
            best: best.to_owned(),
            figure: self.ratio(case, best, Clock::Usable)?,
        })
    }

    /// By what factor the medians of one and the same case differ, measured under two names; at least 1.
    pub fn noise_band(&self) -> Option<f64> {
        let once = self.median_seconds(AUTO, Clock::Usable)?;
        let again = self.median_seconds(AUTO_AGAIN, Clock::Usable)?;
        Some((once / again).max(again / once))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use tensora::Format;
    use tensora::io::CacheState;

    use super::*;

    /// A cell of the given cases, each with a time per round.
    pub(crate) fn cell(state: CacheState, times: &[(&str, &[f64])]) -> Cell {
        let samples = times.iter().flat_map(|&(name, seconds)| {
            let case = Case::all().iter().find(|case| case.name == name).unwrap();
            (0..).zip(seconds).map(|(round, &elapsed_seconds)| Sample {
                case: name.to_owned(),
                kind: case.kind,
                round,
                elapsed_seconds,
                touched_seconds: (case.kind != CaseKind::Ceiling).then_some(elapsed_seconds + 0.5),
                peak_resident_bytes: Some(1000),
                choice: None,
                needed_bytes: None,
                read_bytes: None,
                device_bytes: None,
            })
        });
        Cell {
            preset: "tiny".to_owned(),
            format: Format::Safetensors,
            state,
            data_bytes: 1000,
            file_bytes: 1100,
            file_count: 1,
            rounds: 3,
            samples: samples.collect(),
            failures: Vec::new(),
            cut_short: None,
        }
    }

    fn close(found: f64, wanted: f64) {
        assert!((found - wanted).abs() < 1e-9, "{found} is not {wanted}");
    }

    #[test]
    fn ratios_compare_within_a_round_and_by_the_same_clock() {
        // The machine is ten times slower in round 1; each round's ratio is what it would be anyway.
        let cell = cell(
            CacheState::Cold,
            &[("auto", &[1.1, 13.0]), ("sync", &[1.0, 10.0])],
        );
        close(cell.ratio("auto", "sync", Clock::Usable).unwrap(), 1.2);
        let touched = (1.6 / 1.5 + 13.5 / 10.5) / 2.0;
        close(cell.ratio("auto", "sync", Clock::Touched).unwrap(), touched);
        assert_eq!(cell.ratio("auto", "async", Clock::Usable), None);
    }

    #[test]
    fn a_round_in_which_one_side_is_missing_counts_for_nothing() {
        let cell = cell(
            CacheState::Cold,
            &[("auto", &[2.0, 100.0]), ("sync", &[1.0])],
        );
        close(cell.ratio("auto", "sync", Clock::Usable).unwrap(), 2.0);
    }

    #[test]
    fn regret_is_against_one_backend_not_against_the_luckiest_of_each_round() {
        let cell = cell(
            CacheState::Cold,
            &[
                ("auto", &[1.0, 1.0, 1.0]),
                // Lucky once each, and worse than `mmap` otherwise.
                ("sync", &[0.5, 1.4, 1.4]),
                ("io-uring", &[1.4, 0.5, 1.4]),
                ("mmap", &[0.9, 0.9, 0.9]),
                ("mmap-mapped", &[0.1, 0.1, 0.1]),
                ("auto-mapping", &[0.2, 0.2, 0.2]),
            ],
        );
        let regret = cell.regret_owned().unwrap();
        assert_eq!(regret.best, "mmap");
        close(regret.figure, 1.0 / 0.9);
        let regret = cell.regret_mapping().unwrap();
        assert_eq!(regret.best, "mmap-mapped");
        close(regret.figure, 2.0);
    }

    #[test]
    fn the_faster_ceiling_counts() {
        let cell = cell(
            CacheState::Cold,
            &[
                ("auto", &[1.2]),
                ("ceiling-threads", &[1.1]),
                ("ceiling-rings", &[1.0]),
            ],
        );
        let against = cell.against_ceiling().unwrap();
        assert_eq!(against.best, "ceiling-rings");
        close(against.figure, 1.2);
    }

    #[test]
    fn a_digest_is_held_against_whichever_limit_is_lower() {
        let with = |hash| {
            let cell = cell(
                CacheState::Cold,
                &[
                    ("digest", &[3.0]),
                    ("ceiling-threads", &[2.0]),
                    ("ceiling-rings", &[2.5]),
                    ("hash", &[hash]),
                ],
            );
            cell.digest_against_limits().unwrap()
        };
        let slow_device = with(1.0);
        assert_eq!(slow_device.best, "ceiling-threads");
        close(slow_device.figure, 1.5);
        let slow_hash = with(2.4);
        assert_eq!(slow_hash.best, "hash");
        close(slow_hash.figure, 1.25);
    }

    #[test]
    fn the_noise_band_is_the_same_whichever_name_was_slower() {
        for (once, again) in [(1.0, 1.25), (1.25, 1.0)] {
            let cell = cell(
                CacheState::Cold,
                &[("auto", &[once]), ("auto-again", &[again])],
            );
            close(cell.noise_band().unwrap(), 1.25);
        }
        assert_eq!(
            cell(CacheState::Cold, &[("auto", &[1.0])]).noise_band(),
            None
        );
    }
}
