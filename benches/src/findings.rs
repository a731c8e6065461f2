//! The figures that have a bound.

use serde::Serialize;
use tensora::io::CacheState;
use tensora_measure::{geometric_mean, median};

use crate::case::{
    AUTO, AUTO_MAPPING, COLUMN_SLICE, CaseKind, FS_READ, MEMCPY, MEMMAP2, PY_FASTSAFETENSORS,
    PY_SAFETENSORS, RANKS_TOGETHER, RAW_MAP, ROW_SLICE, STREAM,
};
use crate::conversion::ConversionBound;
use crate::figures::{Clock, Regret};
use crate::run::{Cell, OpenTimes, Run, Sample};

/// A figure that has a bound.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// What was measured.
    pub what: String,
    /// The figure; not a number where it could not be measured.
    pub figure: f64,
    /// It must not be larger than this.
    pub bound: f64,
    /// Where noise excuses more: up to here.
    pub noise_band: Option<f64>,
}

const REGRET: f64 = 1.10;
const MEAN_REGRET: f64 = 1.03;
/// Cold, owned: automatic ÷ what the device delivers.
const CEILING: f64 = 1.15;
/// Warm, mapped: automatic ÷ mapping and populating the files and nothing else.
const RAW_MAPPING: f64 = 1.3;
/// Warm, owned: automatic ÷ copying as many bytes into fresh huge pages.
const MEMORY_COPY: f64 = 1.25;
/// Cold, against readers that are slow there: ahead by 1.2 times.
const WELL_AHEAD: f64 = 1.0 / 1.2;
const AHEAD: f64 = 1.0;
/// Peak resident memory of an owned load beyond its data.
const EXTRA_RESIDENT_BYTES: f64 = (64 << 20) as f64;
/// Opening ÷ parsing the same headers with the `safetensors` crate.
const OPENING: f64 = 1.5;
/// Cold stream ÷ what the device delivers.
const STREAM_CEILING: f64 = 1.05;
/// Peak resident memory of a stream through 256 MiB.
const STREAM_RESIDENT_BYTES: f64 = (320 << 20) as f64;
/// Streamed digest ÷ the slower of device and hashing.
const DIGEST_LIMITS: f64 = 1.15;
/// Read ÷ needed, and time ÷ an eighth of a full load's.
const ROWS_READ: f64 = 1.05;
const ROWS_TIME: f64 = 1.5;
/// Time ÷ a full load's.
const COLUMNS_TIME: f64 = 1.1;
/// From the device, all ranks together, ÷ the checkpoint.
const RANKS_READ: f64 = 1.02;
/// Conversion ÷ a plain copy of the same files: 0.85 of its throughput.
const CONVERSION_TIME: f64 = 1.0 / 0.85;
/// Peak resident memory of a conversion through 256 MiB.
const CONVERSION_RESIDENT_BYTES: f64 = (320 << 20) as f64;
const PLANNING_SECONDS: f64 = 0.001;
/// Planning and probing, for each hundred files begun in part.
const PROBING_SECONDS: f64 = 0.005;

impl Finding {
    fn new(what: String, figure: f64, bound: f64) -> Self {
        Self {
            what,
            figure,
            bound,
            noise_band: None,
        }
    }

    /// Whether the bound is kept, or missed by less than what noise does.
    pub fn is_kept(&self) -> bool {
        self.figure <= self.bound || self.noise_band.is_some_and(|band| self.figure <= band)
    }
}

impl Run {
    /// Every figure that has a bound and was measured.
    pub fn findings(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        for (what, regret) in [
            ("owned", Cell::regret_owned as fn(&Cell) -> Option<Regret>),
            ("mapping allowed", Cell::regret_mapping),
        ] {
            let mut figures = Vec::new();
            for cell in &self.cells {
                let Some(regret) = regret(cell) else {
                    continue;
                };
                figures.push(regret.figure);
                findings.push(Finding {
                    noise_band: cell.noise_band(),
                    ..Finding::new(
                        format!("{}: regret, {what} (best: {})", cell.title(), regret.best),
                        regret.figure,
                        REGRET,
                    )
                });
            }
            if let Some(mean) = geometric_mean(figures) {
                findings.push(Finding::new(
                    format!("all cells: geometric mean of regret, {what}"),
                    mean,
                    MEAN_REGRET,
                ));
            }
        }
        for cell in &self.cells {
            cell.limits(&mut findings);
            cell.peers(&mut findings);
            cell.memory(&mut findings);
            cell.parts(&mut findings);
            cell.failed(&mut findings);
        }
        for cell in &self.conversions {
            findings.extend(cell.figures().into_iter().map(|(what, figure, bound)| {
                let bound = match bound {
                    ConversionBound::Time => CONVERSION_TIME,
                    ConversionBound::ResidentBytes => CONVERSION_RESIDENT_BYTES,
                };
                Finding::new(what, figure, bound)
            }));
        }
        for open in &self.opens {
            open.findings(&mut findings);
        }
        findings
    }
}

impl Cell {
    /// How it is called in tables.
    pub fn title(&self) -> String {
        format!("{} {} {}", self.preset, self.format, self.state)
    }

    fn limits(&self, findings: &mut Vec<Finding>) {
        let mut add = |what: &str, figure: Option<f64>, bound| {
            if let Some(figure) = figure {
                let what = format!("{}: {what}", self.title());
                findings.push(Finding::new(what, figure, bound));
            }
        };
        // Each of these cases is measured in the state that it is a limit of, and in no other.
        if let Some(against) = self.against_ceiling() {
            let what = format!("auto ÷ {}", against.best);
            add(&what, Some(against.figure), CEILING);
        }
        let mapped = self.ratio(AUTO_MAPPING, RAW_MAP, Clock::Usable);
        add("auto-mapping ÷ raw-map", mapped, RAW_MAPPING);
        let owned = self.ratio(AUTO, MEMCPY, Clock::Usable);
        add("auto ÷ memcpy", owned, MEMORY_COPY);
    }

    fn peers(&self, findings: &mut Vec<Finding>) {
        for peer in self.cases() {
            // Who copies is compared with who copies, and who maps with who may map.
            let ours = match peer.kind {
                CaseKind::OwnedPeer => AUTO,
                CaseKind::MappedPeer => AUTO_MAPPING,
                _ => continue,
            };
            let Some(figure) = self.ratio(ours, peer.name, Clock::Touched) else {
                continue;
            };
            let slow_when_cold = [FS_READ, PY_SAFETENSORS, PY_FASTSAFETENSORS];
            let bound = if self.state == CacheState::Cold && slow_when_cold.contains(&peer.name) {
                WELL_AHEAD
            } else {
                AHEAD
            };
            // Both only map then, so that equal is all that can be asked for.
            let even = self.state == CacheState::Warm && peer.name == MEMMAP2;
            findings.push(Finding {
                noise_band: self.noise_band().filter(|_| even),
                ..Finding::new(
                    format!("{}: {ours} ÷ {}, touched", self.title(), peer.name),
                    figure,
                    bound,
                )
            });
        }
    }

    #[allow(clippy::cast_precision_loss)]
    fn memory(&self, findings: &mut Vec<Finding>) {
        for case in self.cases().filter(|case| case.kind.is_ours_and_owned()) {
            if let Some(peak) = self.peak_resident_bytes(case.name) {
                findings.push(Finding::new(
                    format!(
                        "{}: {}, resident bytes beyond the data",
                        self.title(),
                        case.name
                    ),
                    peak as f64 - self.data_bytes as f64,
                    EXTRA_RESIDENT_BYTES,
                ));
            }
        }
    }

    /// Streams, slices and ranks.
    #[allow(clippy::cast_precision_loss)]
    fn parts(&self, findings: &mut Vec<Finding>) {
        let mut add = |what: &str, figure: Option<f64>, bound| {
            if let Some(figure) = figure {
                let what = format!("{}: {what}", self.title());
                findings.push(Finding::new(what, figure, bound));
            }
        };
        if let Some(against) = self.stream_against_ceiling() {
            let what = format!("stream ÷ {}", against.best);
            add(&what, Some(against.figure), STREAM_CEILING);
        }
        for peer in self
            .cases()
            .filter(|case| case.kind == CaseKind::StreamPeer)
        {
            let figure = self.ratio(STREAM, peer.name, Clock::Usable);
            add(&format!("stream ÷ {}", peer.name), figure, AHEAD);
        }
        let peak = self.peak_resident_bytes(STREAM).map(|peak| peak as f64);
        add("stream, resident bytes", peak, STREAM_RESIDENT_BYTES);
        if let Some(against) = self.digest_against_limits() {
            let what = format!("digest ÷ {}", against.best);
            add(&what, Some(against.figure), DIGEST_LIMITS);
        }
        let (read, needed) = (|s: &Sample| s.read_bytes, |s: &Sample| s.needed_bytes);
        let rows = self.share(ROW_SLICE, read, needed);
        add("row-slice, read ÷ needed", rows, ROWS_READ);
        let time = self.ratio(ROW_SLICE, AUTO, Clock::Usable);
        let eighths = time.map(|figure| figure * 8.0);
        add("row-slice ÷ (auto ÷ 8)", eighths, ROWS_TIME);
        let time = self.ratio(COLUMN_SLICE, AUTO, Clock::Usable);
        add("column-slice ÷ auto", time, COLUMNS_TIME);
        let device = self.share(
            RANKS_TOGETHER,
            |sample| sample.device_bytes,
            |_| Some(self.file_bytes),
        );
        add("ranks, device bytes ÷ file bytes", device, RANKS_READ);
    }

    /// An automatic load that fails misses every bound. A backend that does not work here, or a peer, does not.
    fn failed(&self, findings: &mut Vec<Finding>) {
        for failure in &self.failures {
            if matches!(
                failure.kind,
                CaseKind::Automatic | CaseKind::AutomaticMapping
            ) {
                let what = format!("{}: {} failed", self.title(), failure.case);
                findings.push(Finding::new(what, f64::NAN, 0.0));
            }
        }
    }
}

impl OpenTimes {
    #[allow(clippy::cast_precision_loss)]
    fn findings(&self, findings: &mut Vec<Finding>) {
        let rounds = || self.rounds.iter();
        let mut add = |what: String, figure: Option<f64>, bound| {
            if let Some(figure) = figure {
                findings.push(Finding::new(
                    format!("{}: {what}", self.preset),
                    figure,
                    bound,
                ));
            }
        };
        let ratio = rounds().map(|round| (round.open_seconds, round.crate_seconds));
        add(
            format!("opening {} tensors ÷ the crate alone", self.tensor_count),
            tensora_measure::median_ratio(ratio),
            OPENING,
        );
        add(
            "planning, seconds".to_owned(),
            median(rounds().map(|round| round.plan_seconds)),
            PLANNING_SECONDS,
        );
        add(
            format!("probing {} files and planning, seconds", self.file_count),
            median(rounds().map(|round| round.probe_and_plan_seconds)),
            PROBING_SECONDS * (self.file_count as f64 / 100.0).max(1.0),
        );
    }
}

#[cfg(test)]
mod tests {
    use tensora::io::Platform;

    use super::*;
    use crate::conversion::{ConversionFailure, ConversionKind};
    use crate::figures::tests::cell;
    use crate::run::{Failure, Host, OpenRound};

    fn run(cells: Vec<Cell>) -> Run {
        Run {
            cells,
            ..Run::new(Host {
                platform: Platform::unknown(1, Vec::new()),
            })
        }
    }

    /// What `--check` would complain about.
    fn missed(run: &Run) -> Vec<String> {
        let findings = run.findings().into_iter();
        findings
            .filter(|finding| !finding.is_kept())
            .map(|finding| finding.what)
            .collect()
    }

    #[test]
    fn a_missed_regret_is_found_unless_noise_explains_it() {
        let with = |again| {
            run(vec![cell(
                CacheState::Cold,
                &[("auto", &[1.2]), ("sync", &[1.0]), ("auto-again", &[again])],
            )])
        };
        let calm = missed(&with(1.2));
        assert_eq!(calm.len(), 2, "{calm:?}");
        assert!(calm[0].contains("tiny safetensors cold: regret, owned (best: sync)"));
        assert!(calm[1].contains("geometric mean"));
        // A machine on which the same load takes 1.25 times as long under another name says nothing of 1.2.
        let noisy = missed(&with(0.96));
        assert_eq!(noisy.len(), 1, "{noisy:?}");
        assert!(noisy[0].contains("geometric mean"));
    }

    #[test]
    fn limits_are_those_of_the_state() {
        let cold = |seconds| {
            let times: &[(&str, &[f64])] = &[("auto", &[seconds]), ("ceiling-rings", &[1.0])];
            missed(&run(vec![cell(CacheState::Cold, times)]))
        };
        assert!(cold(1.14).is_empty());
        assert!(cold(1.16)[0].contains("auto ÷ ceiling-rings"));
        let warm = |owned, mapped| {
            let times: &[(&str, &[f64])] = &[
                ("auto", &[owned]),
                ("memcpy", &[1.0]),
                ("auto-mapping", &[mapped]),
                ("raw-map", &[0.01]),
            ];
            missed(&run(vec![cell(CacheState::Warm, times)]))
        };
        assert!(warm(1.24, 0.0129).is_empty());
        assert!(warm(1.26, 0.0129)[0].contains("auto ÷ memcpy"));
        assert!(warm(1.24, 0.0131)[0].contains("auto-mapping ÷ raw-map"));
    }

    #[test]
    fn peers_are_compared_by_what_they_took_to_touch_every_byte() {
        // Touched: 1.5 and 1.9 seconds, a ratio of 0.79; by elapsed alone it would be 0.71.
        let times: &[(&str, &[f64])] = &[("auto", &[1.0]), ("fs-read", &[1.4])];
        let cold = run(vec![cell(CacheState::Cold, times)]);
        let finding = cold.findings().remove(0);
        assert!((finding.figure - 1.5 / 1.9).abs() < 1e-9, "{finding:?}");
        assert!((finding.bound - 1.0 / 1.2).abs() < 1e-9 && finding.is_kept());
        // A mapping peer stands against the load that may map.
        let times: &[(&str, &[f64])] = &[
            ("auto", &[9.0]),
            ("auto-mapping", &[0.1]),
            ("memmap2", &[0.0]),
        ];
        let warm = missed(&run(vec![cell(CacheState::Warm, times)]));
        assert_eq!(
            warm,
            ["tiny safetensors warm: auto-mapping ÷ memmap2, touched"]
        );
    }

    #[test]
    fn memory_beyond_the_data_is_found() {
        let mut cell = cell(CacheState::Cold, &[("auto", &[1.0])]);
        assert!(missed(&run(vec![cell.clone()])).is_empty());
        cell.samples[0].peak_resident_bytes = Some(1001 + (64 << 20));
        assert_eq!(missed(&run(vec![cell])).len(), 1);
    }

    #[test]
    fn conversions_have_bounds() {
        let with = |seconds: f64, peak_mib| {
            let times: &[(&str, &[f64])] = &[
                ("to-partitioned", &[1.0, 1.0, 1.0]),
                ("to-store", &[seconds, seconds, seconds]),
                ("copy-cp", &[0.9, 0.9, 0.9]),
                ("copy-threads", &[1.0, 1.0, 1.0]),
            ];
            let mut run = run(Vec::new());
            run.put_conversion(crate::conversion::tests::cell(times, peak_mib));
            run
        };
        assert!(missed(&with(1.05, 320)).is_empty());
        assert_eq!(
            missed(&with(1.07, 320)),
            ["tiny converted: to-store ÷ copy-cp"]
        );
        assert_eq!(missed(&with(1.05, 321)).len(), 2);
        let mut failing = with(1.05, 320);
        failing.conversions[0].failures.push(ConversionFailure {
            case: "to-safetensors".to_owned(),
            kind: ConversionKind::Conversion,
            reason: "no space left".to_owned(),
        });
        assert_eq!(missed(&failing).len(), 1);
        let text = failing.to_markdown(&[]);
        assert!(
            text.contains("**to-safetensors failed**: no space left"),
            "{text}"
        );
    }

    #[test]
    fn streams_slices_and_ranks_have_bounds() {
        let with = |slower: f64, more: u64| {
            let times: &[(&str, &[f64])] = &[
                ("ceiling-rings", &[1.0]),
                ("hash", &[0.5]),
                ("auto", &[1.1]),
                ("stream", &[1.04 * slower]),
                ("py-runai-stream", &[1.04]),
                ("digest", &[1.14 * slower]),
                ("row-slice", &[0.2 * slower]),
                ("column-slice", &[1.2 * slower]),
                ("ranks", &[1.5]),
            ];
            let mut cell = cell(CacheState::Cold, times);
            for sample in &mut cell.samples {
                match sample.case.as_str() {
                    "row-slice" => {
                        sample.needed_bytes = Some(1000);
                        sample.read_bytes = Some(1040 + more);
                    }
                    "ranks" => sample.device_bytes = Some(1120 + more),
                    "stream" => sample.peak_resident_bytes = Some((319 << 20) + (more << 20)),
                    _ => (),
                }
            }
            missed(&run(vec![cell]))
        };
        assert_eq!(with(1.0, 0), [""; 0]);
        let missed = with(1.1, 100);
        assert_eq!(missed.len(), 8, "{missed:?}");
    }

    #[test]
    fn a_failed_automatic_load_is_a_missed_bound_and_a_failed_peer_is_not() {
        let with = |name: &str, kind| {
            let mut cell = cell(CacheState::Cold, &[]);
            cell.failures.push(Failure {
                case: name.to_owned(),
                kind,
                reason: "exit status: 1".to_owned(),
            });
            missed(&run(vec![cell]))
        };
        assert_eq!(with("auto", CaseKind::Automatic).len(), 1);
        assert!(with("py-runai", CaseKind::OwnedPeer).is_empty());
    }

    #[test]
    fn opening_and_planning_have_bounds() {
        let with = |open_seconds, plan_seconds, probe_and_plan_seconds| {
            let mut run = run(Vec::new());
            run.put_open(OpenTimes {
                preset: "many".to_owned(),
                tensor_count: 92_000,
                file_count: 200,
                rounds: vec![OpenRound {
                    open_seconds,
                    crate_seconds: 0.1,
                    probe_and_plan_seconds,
                    plan_seconds,
                }],
            });
            missed(&run).len()
        };
        assert_eq!(with(0.149, 0.0009, 0.0099), 0);
        assert_eq!(with(0.151, 0.0011, 0.0101), 3);
    }
}
