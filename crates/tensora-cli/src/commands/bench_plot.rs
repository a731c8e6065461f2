//! A comparison as a picture, alone or on a page with its table.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use tensora_measure::{Bar, BarChart, BarRole};

use super::bench::Comparison;
use crate::output::printable;
use crate::units::size;

const GIB: f64 = (1 << 30) as f64;

/// Whether a plot can be written to `path`, as far as that is known before there is one.
pub(super) fn check(path: &Path) -> Result<()> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    ensure!(
        folder.is_dir(),
        "the plot cannot be written to {}: there is no directory {}",
        path.display(),
        folder.display()
    );
    Ok(())
}

/// Writes one chart for each state: as SVG, or as HTML if the file is named so.
pub(super) fn write(comparison: &Comparison, path: &Path) -> Result<()> {
    let charts = charts(comparison)?;
    let text = if is_html(path) {
        page(comparison, &charts)
    } else {
        stacked(&charts)
    };
    fs::write(path, text).with_context(|| format!("cannot write the plot to {}", path.display()))
}

/// Whether a file is to be a page rather than a picture.
pub(super) fn is_html(path: &Path) -> bool {
    path.extension()
        .is_some_and(|extension| extension.eq_ignore_ascii_case("html"))
}

fn title(comparison: &Comparison) -> String {
    // Of `.`, the directory's own name.
    let path = Path::new(&comparison.path);
    let whole = fs::canonicalize(path);
    let name = whole.as_deref().unwrap_or(path).file_name().map_or_else(
        || comparison.path.clone(),
        |name| name.to_string_lossy().into_owned(),
    );
    format!("{}, {}", printable(&name), size(comparison.data_bytes))
}

fn charts(comparison: &Comparison) -> Result<Vec<String>> {
    let mut charts = Vec::new();
    for state in &comparison.states {
        let bars = state.cases.iter().map(|case| Bar {
            label: case.name.clone(),
            value: case.bytes_per_second / GIB,
            role: if case.is_automatic {
                BarRole::Automatic
            } else {
                BarRole::Explicit
            },
        });
        let chart = BarChart {
            title: format!("{}: {}", state.cache, title(comparison)),
            unit: "GiB/s, more is better".to_owned(),
            bars: bars.collect(),
            bound: None,
        };
        charts.push(chart.to_svg()?);
    }
    Ok(charts)
}

/// Documents as one, each below the other.
fn stacked(charts: &[String]) -> String {
    let (mut width_px, mut height_px) = (0, 0);
    let mut inner = String::new();
    for chart in charts {
        let placed = chart.replacen("<svg ", &format!("<svg y=\"{height_px}\" "), 1);
        inner.push_str(&placed);
        inner.push('\n');
        width_px = width_px.max(attribute(chart, "width"));
        height_px += attribute(chart, "height");
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width_px}\" height=\"{height_px}\" \
         viewBox=\"0 0 {width_px} {height_px}\">\n{inner}</svg>\n"
    )
}

/// A number that the first element states about itself; 0 if it does not.
fn attribute(svg: &str, name: &str) -> u32 {
    let begin = format!(" {name}=\"");
    svg.split_once(&begin)
        .and_then(|(_, rest)| rest.split_once('"'))
        .and_then(|(number, _)| number.parse().ok())
        .unwrap_or(0)
}

/// A page that needs no other file.
fn page(comparison: &Comparison, charts: &[String]) -> String {
    let title = escaped(&title(comparison));
    let mut body = format!(
        "<h1>Loads of {title}</h1>\n<p>{}</p>\n<ul>\n",
        escaped(&printable(&comparison.machine()))
    );
    for (cache, verdict) in comparison.verdicts() {
        let _ = writeln!(body, "<li>{cache}: {}</li>", escaped(verdict));
    }
    body.push_str("</ul>\n");
    for chart in charts {
        body.push_str(chart);
        body.push('\n');
    }
    body.push_str("<table>\n<tr>");
    for heading in [
        "cache",
        "load",
        "chosen",
        "median",
        "speed",
        "ratio to the best",
        "peak memory",
    ] {
        let _ = write!(body, "<th>{heading}</th>");
    }
    body.push_str("</tr>\n");
    for state in &comparison.states {
        for case in &state.cases {
            body.push_str("<tr>");
            for text in case.columns(state.cache) {
                let _ = write!(body, "<td>{}</td>", escaped(&text));
            }
            body.push_str("</tr>\n");
        }
    }
    body.push_str("</table>\n");
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<title>{title}</title>\n\
         <style>{STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )
}

const STYLE: &str = "body { font-family: sans-serif; margin: 2em auto; max-width: 60em; } \
    svg { display: block; max-width: 100%; } \
    td, th { padding: 0.2em 0.8em; text-align: left; } \
    td:nth-child(n+4), th:nth-child(n+4) { text-align: right; }";

/// Text that no browser takes for markup.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_become_markup() {
        assert_eq!(
            escaped(r#"<script src="x">&amp;"#),
            "&lt;script src=&quot;x&quot;&gt;&amp;amp;"
        );
    }

    #[test]
    fn charts_stand_below_each_other() {
        let chart = |height: u32| format!("<svg width=\"860\" height=\"{height}\" x=\"y\">a</svg>");
        let text = stacked(&[chart(100), chart(250)]);
        assert!(
            text.contains("width=\"860\" height=\"350\" viewBox=\"0 0 860 350\""),
            "{text}"
        );
        assert!(
            text.contains("<svg y=\"0\" width") && text.contains("<svg y=\"100\" width"),
            "{text}"
        );
    }
}
