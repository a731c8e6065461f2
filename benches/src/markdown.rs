//! The run as a document.

use std::fmt::Write as _;

use tensora_measure::median;

use crate::case::{AUTO, Case};
use crate::figures::Clock;
use crate::peers::PeerFact;
use crate::run::{Cell, OpenTimes, Run};

impl Run {
    /// The run as a Markdown document that shows the `plots`, of which only the names count.
    pub(crate) fn to_markdown(&self, plots: &[(String, String)]) -> String {
        let mut text = format!("# Loads on {}\n\n", self.host.kind());
        self.describe(&mut text);
        let _ = writeln!(
            text,
            "\nSeconds are medians over the rounds: until every tensor can be used, and until every byte was read \
             once more. ÷ auto is the median over the rounds of the case's time ÷ that of `auto` in the same round. \
             Peak memory is the largest of all rounds, less the bytes of the tensors. `docs/BENCHMARKS.md` says \
             what each case is, and why."
        );
        self.bounds(&mut text);
        for cell in &self.cells {
            cell.describe(&mut text);
        }
        for cell in &self.conversions {
            cell.describe(&mut text);
        }
        if !self.opens.is_empty() {
            text.push_str(
                "\n## Opening and planning\n\nMedians, in milliseconds.\n\n\
                 | preset | tensors | files | open | the crate alone | plan | probe and plan |\n\
                 |---|---:|---:|---:|---:|---:|---:|\n",
            );
            for open in &self.opens {
                open.describe(&mut text);
            }
        }
        if !plots.is_empty() {
            text.push_str("\n## Plots\n\n");
            for (name, _) in plots {
                let _ = writeln!(text, "![{}]({name})\n", name.trim_end_matches(".svg"));
            }
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
        text
    }

    fn describe(&self, text: &mut String) {
        let platform = &self.host.platform;
        let storage = platform.storage.as_ref();
        let _ = writeln!(
            text,
            "{}; {} processors; {} {}; {} GiB of memory; huge pages: {:?}; {} on {}.\n",
            platform.processor.as_deref().unwrap_or("unknown processor"),
            platform.cpus,
            platform.os,
            platform.kernel.as_deref().unwrap_or("unknown"),
            platform.memory.total_bytes.unwrap_or(0) >> 30,
            platform.huge_pages,
            storage.map_or("unknown", |storage| &storage.file_system),
            storage
                .and_then(|storage| storage.device.as_deref())
                .unwrap_or("an unknown device"),
        );
        text.push_str("Made by:\n\n");
        for invocation in &self.invocations {
            let _ = writeln!(
                text,
                "- `{}` at {}",
                invocation.command, invocation.revision
            );
        }
        if self.versions.is_empty() && self.peers.is_empty() {
            return;
        }
        text.push_str("\nCompared with:\n\n");
        for (name, version) in &self.versions {
            let _ = writeln!(text, "- crate {name} {version}");
        }
        for (name, fact) in &self.peers {
            let _ = match fact {
                PeerFact::Version(version) => writeln!(text, "- Python package {name} {version}"),
                PeerFact::Reason(reason) => {
                    writeln!(text, "- Python package {name}: **not measured**, {reason}")
                }
            };
        }
    }

    fn bounds(&self, text: &mut String) {
        let findings = self.findings();
        let kept = findings.iter().filter(|finding| finding.is_kept()).count();
        let _ = writeln!(
            text,
            "\n## Bounds\n\n{kept} of {} are kept. Where a noise band stands, a figure within it is.\n\n\
             | figure | measured | bound | noise band | kept |\n|---|---:|---:|---:|---|",
            findings.len()
        );
        for finding in &findings {
            let band = finding
                .noise_band
                .map_or_else(String::new, |band| format!("{band:.3}"));
            let _ = writeln!(
                text,
                "| {} | {} | {} | {band} | {} |",
                finding.what,
                figure(finding.figure),
                figure(finding.bound),
                if finding.is_kept() { "yes" } else { "**no**" }
            );
        }
    }
}

impl Cell {
    #[allow(clippy::cast_precision_loss)]
    fn describe(&self, text: &mut String) {
        let _ = writeln!(
            text,
            "\n## {}\n\n{} bytes of tensors, {} files, {} rounds{}.",
            self.title(),
            self.data_bytes,
            self.file_count,
            self.rounds,
            self.noise_band()
                .map_or_else(String::new, |band| format!(", noise band {band:.3}")),
        );
        if let Some(reason) = &self.cut_short {
            let _ = writeln!(text, "\n**Cut short**: {reason}");
        }
        for failure in &self.failures {
            let _ = writeln!(text, "\n**{} failed**: {}", failure.case, failure.reason);
        }
        if self.samples.is_empty() {
            return;
        }
        text.push_str(
            "\n| case | usable, s | touched, s | GB/s | ÷ auto | peak memory beyond data, MiB | choice |\n\
             |---|---:|---:|---:|---:|---:|---|\n",
        );
        for case in self.cases() {
            let usable = self.median_seconds(case.name, Clock::Usable);
            let touched = self
                .of_case(case.name)
                .any(|sample| sample.touched_seconds.is_some())
                .then(|| self.median_seconds(case.name, Clock::Touched))
                .flatten();
            let extra_mib = self
                .peak_resident_bytes(case.name)
                .map(|peak| (peak as f64 - self.data_bytes as f64) / f64::from(1 << 20));
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} | {} | {} | {} |",
                case.name,
                optional(usable, 4),
                optional(touched, 4),
                optional(
                    usable.map(|seconds| self.data_bytes as f64 / seconds / 1e9),
                    2
                ),
                optional(self.ratio(case.name, AUTO, Clock::Usable), 3),
                optional(extra_mib, 1),
                self.choices(case),
            );
        }
    }

    /// What the planner chose, or all that it chose where rounds differ.
    fn choices(&self, case: &Case) -> String {
        let mut choices: Vec<&str> = self
            .of_case(case.name)
            .filter_map(|sample| sample.choice.as_deref())
            .collect();
        choices.sort_unstable();
        choices.dedup();
        choices.join("; ")
    }
}

impl OpenTimes {
    fn describe(&self, text: &mut String) {
        let milliseconds = |of: fn(&crate::run::OpenRound) -> f64| {
            optional(median(self.rounds.iter().map(of)).map(|it| it * 1e3), 3)
        };
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} |",
            self.preset,
            self.tensor_count,
            self.file_count,
            milliseconds(|round| round.open_seconds),
            milliseconds(|round| round.crate_seconds),
            milliseconds(|round| round.plan_seconds),
            milliseconds(|round| round.probe_and_plan_seconds),
        );
    }
}

fn optional(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(String::new, |value| format!("{value:.digits$}"))
}

/// Bytes without decimals, ratios and seconds with as many as say something.
fn figure(value: f64) -> String {
    if value.is_nan() {
        "–".to_owned()
    } else if value.abs() >= 1e4 {
        format!("{value:.0}")
    } else if value.abs() >= 0.1 {
        format!("{value:.3}")
    } else {
        format!("{value:.5}")
    }
}

#[cfg(test)]
mod tests {
    use tensora::io::{CacheState, Platform};

    use super::*;
    use crate::figures::tests::cell;
    use crate::run::{Failure, Host};

    #[test]
    fn what_was_not_measured_is_said() {
        let mut run = Run::new(Host {
            platform: Platform::unknown(1, Vec::new()),
        });
        let mut cell = cell(CacheState::Cold, &[("auto", &[1.0]), ("sync", &[1.25])]);
        cell.failures.push(Failure {
            case: "io-uring".to_owned(),
            kind: crate::CaseKind::Explicit,
            reason: "blocked by seccomp".to_owned(),
        });
        cell.cut_short = Some("the files do not stay cold".to_owned());
        run.put_cell(cell);
        let reason = PeerFact::Reason("no matching distribution".to_owned());
        run.peers.insert("fastsafetensors".to_owned(), reason);
        let text = run.to_markdown(&[("regret.svg".to_owned(), String::new())]);
        for part in [
            "**io-uring failed**: blocked by seccomp",
            "**Cut short**: the files do not stay cold",
            "fastsafetensors: **not measured**, no matching distribution",
            "| sync | 1.2500 | 1.7500 |",
            "regret, owned (best: sync) | 0.800 | 1.100 |  | yes |",
            "![regret](regret.svg)",
        ] {
            assert!(text.contains(part), "{part} is missing:\n{text}");
        }
    }
}
