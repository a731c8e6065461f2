//! The plots of a run.

use tensora::Format;
use tensora::io::CacheState;
use tensora_measure::{Bar, BarChart, BarRole, Line, LineChart};

use crate::case::{AUTO, AUTO_MAPPING, CaseKind};
use crate::figures::Clock;
use crate::run::{Cell, Run};

const REGRET_BOUND: f64 = 1.10;

/// The name and contents of every plot that the run has figures for.
pub(crate) fn draw(run: &Run) -> Vec<(String, String)> {
    let mut plots = Vec::new();
    // A chart without figures is left out.
    let mut add = |name: String, svg: tensora_measure::Result<String>| {
        if let Ok(svg) = svg {
            plots.push((format!("{name}.svg"), svg));
        }
    };
    add("regret".to_owned(), regret(run).to_svg());
    for &format in Format::ALL {
        add(
            format!("time-{format}"),
            time_against_size(run, format).to_svg(),
        );
    }
    for cell in &run.cells {
        let name = format!("throughput-{}-{}-{}", cell.preset, cell.format, cell.state);
        add(name, throughput(cell).to_svg());
    }
    plots
}

fn role(kind: CaseKind) -> BarRole {
    match kind {
        CaseKind::Ceiling | CaseKind::Memcpy | CaseKind::RawMapping | CaseKind::Hash => {
            BarRole::Limit
        }
        CaseKind::Automatic
        | CaseKind::AutomaticMapping
        | CaseKind::Stream
        | CaseKind::Digest
        | CaseKind::RowSlice
        | CaseKind::ColumnSlice
        | CaseKind::Ranks => BarRole::Automatic,
        CaseKind::Explicit | CaseKind::ExplicitMapped => BarRole::Explicit,
        CaseKind::OwnedPeer | CaseKind::MappedPeer | CaseKind::StreamPeer => BarRole::Peer,
    }
}

fn throughput(cell: &Cell) -> BarChart {
    // A part of the tensors in a part of the time says nothing of speed.
    let whole = cell.cases().filter(|case| !case.kind.loads_parts());
    let bars = whole.filter_map(|case| {
        let seconds = cell.median_seconds(case.name, Clock::Touched)?;
        Some(Bar {
            label: case.name.to_owned(),
            value: gigabytes(cell) / seconds,
            role: role(case.kind),
        })
    });
    BarChart {
        title: format!("{}: loaded, and every byte read", cell.title()),
        unit: "GB/s, longer is better".to_owned(),
        bars: bars.collect(),
        bound: None,
    }
}

fn regret(run: &Run) -> BarChart {
    let mut bars = Vec::new();
    for cell in &run.cells {
        for (what, regret, role) in [
            ("owned", cell.regret_owned(), BarRole::Automatic),
            ("mapping allowed", cell.regret_mapping(), BarRole::Explicit),
        ] {
            bars.extend(regret.map(|regret| Bar {
                label: format!("{}, {what}", cell.title()),
                value: regret.figure,
                role,
            }));
        }
    }
    BarChart {
        title: "Regret: automatic choice ÷ best explicit backend".to_owned(),
        unit: "1 is as good as the best; the line is the bound".to_owned(),
        bars,
        bound: Some(REGRET_BOUND),
    }
}

fn time_against_size(run: &Run, format: Format) -> LineChart {
    let states = [CacheState::Cold, CacheState::Half, CacheState::Warm];
    let lines = states.iter().flat_map(|&state| {
        [AUTO, AUTO_MAPPING].map(|case| {
            let cells = run.cells.iter();
            let cells = cells.filter(|cell| cell.format == format && cell.state == state);
            let mut points: Vec<(f64, f64)> = cells
                .filter_map(|cell| {
                    let seconds = cell.median_seconds(case, Clock::Usable)?;
                    Some((gigabytes(cell), seconds))
                })
                .collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            Line {
                label: format!("{case}, {state}"),
                points,
            }
        })
    });
    LineChart {
        title: format!("{format}: time until every tensor can be used"),
        horizontal_unit: "GB of tensors".to_owned(),
        vertical_unit: "seconds".to_owned(),
        lines: lines.collect(),
    }
}

#[allow(clippy::cast_precision_loss)]
fn gigabytes(cell: &Cell) -> f64 {
    cell.data_bytes as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use tensora::io::Platform;

    use super::*;
    use crate::figures::tests::cell;
    use crate::run::Host;

    #[test]
    fn each_cell_has_its_plot_and_empty_ones_are_left_out() {
        let mut run = Run::new(Host {
            platform: Platform::unknown(1, Vec::new()),
        });
        assert!(draw(&run).is_empty());
        run.put_cell(cell(
            CacheState::Cold,
            &[("auto", &[1.0]), ("sync", &[1.1])],
        ));
        run.put_cell(cell(CacheState::Warm, &[]));
        let plots = draw(&run);
        let names: Vec<_> = plots.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(
            names,
            [
                "regret.svg",
                "time-safetensors.svg",
                "throughput-tiny-safetensors-cold.svg"
            ]
        );
        assert!(plots[2].1.contains("sync"));
    }
}
