use std::ops::Range;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::{Error, Result};

/// What stands on each side of a comparison; it decides the colour of a bar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarRole {
    /// The automatic choice: dark blue.
    Automatic,
    /// A backend that was named: light blue.
    Explicit,
    /// Somebody else's reader: orange.
    Peer,
    /// What the machine can do at best, with nothing loaded: grey.
    Limit,
}

/// One bar.
#[derive(Clone, Debug, PartialEq)]
pub struct Bar {
    /// What it is called; stands to its left.
    pub label: String,
    /// How long it is, in the chart's unit; not drawn unless finite and at least 0.
    pub value: f64,
    /// Whose it is.
    pub role: BarRole,
}

/// Horizontal bars, one below the other, in the order given.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BarChart {
    /// Stands above.
    pub title: String,
    /// The unit of the values; stands below.
    pub unit: String,
    /// The bars, from top to bottom.
    pub bars: Vec<Bar>,
    /// Where to draw a red line that values are meant to stay left of.
    pub bound: Option<f64>,
}

/// A named row of points.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Line {
    /// What it is called in the legend.
    pub label: String,
    /// Horizontal and vertical coordinate; not drawn unless both are finite and above 0.
    pub points: Vec<(f64, f64)>,
}

/// Lines over logarithmic axes: equal ratios are equal distances.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LineChart {
    /// Stands above.
    pub title: String,
    /// The unit of the horizontal axis.
    pub horizontal_unit: String,
    /// The unit of the vertical axis.
    pub vertical_unit: String,
    /// The lines.
    pub lines: Vec<Line>,
}

const WIDTH_PX: u32 = 860;
const BAR_PX: u32 = 26;
const LINES_HEIGHT_PX: u32 = 520;
const TITLE_PX: u32 = 18;
const TEXT_PX: u32 = 13;
/// About what a character of text takes; without a font at hand nobody knows exactly.
const CHARACTER_PX: u32 = 8;

const INK: RGBColor = RGBColor(40, 40, 40);
const GRID: RGBColor = RGBColor(225, 225, 225);
const BOUND: RGBColor = RGBColor(200, 30, 30);
/// Told apart also by people who see few colours (Okabe and Ito's set, without yellow).
const LINE_COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(0, 0, 0),
];

impl BarRole {
    const fn colour(self) -> RGBColor {
        match self {
            Self::Automatic => RGBColor(0, 90, 156),
            Self::Explicit => RGBColor(120, 178, 222),
            Self::Peer => RGBColor(230, 140, 50),
            Self::Limit => RGBColor(150, 150, 150),
        }
    }
}

impl BarChart {
    /// The chart as an SVG document.
    ///
    /// # Errors
    ///
    /// [`Error::Plot`] when there is nothing to draw.
    pub fn to_svg(&self) -> Result<String> {
        let bars: Vec<&Bar> = self
            .bars
            .iter()
            .filter(|bar| bar.value.is_finite() && bar.value >= 0.0)
            .collect();
        let longest = bars
            .iter()
            .map(|bar| bar.value)
            .chain(self.bound.filter(|bound| bound.is_finite()))
            .fold(0.0, f64::max);
        if bars.is_empty() {
            return Err(nothing(&self.title));
        }
        let height_px = pixels(bars.len()) * BAR_PX + 90;
        draw(&self.title, height_px, |area| {
            self.draw_bars(area, &bars, longest)
        })
    }

    fn draw_bars(
        &self,
        area: &DrawingArea<SVGBackend<'_>, Shift>,
        bars: &[&Bar],
        longest: f64,
    ) -> Drawn {
        let characters = bars.iter().map(|bar| bar.label.chars().count()).max();
        let label_px = pixels(characters.unwrap_or(0)) * CHARACTER_PX + 16;
        // Room at the right for the value that stands behind the longest bar.
        let end = if longest > 0.0 { longest * 1.12 } else { 1.0 };
        let count = f64::from(pixels(bars.len()));
        let mut chart = ChartBuilder::on(area)
            .margin(10)
            .x_label_area_size(44)
            .y_label_area_size(label_px.min(WIDTH_PX / 2))
            // The first bar is at the top.
            .build_cartesian_2d(0.0..end, count..0.0)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .disable_y_axis()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .x_desc(self.unit.as_str())
            .x_label_formatter(&|value| short(*value))
            .label_style(text())
            .draw()?;
        // Below the bars, so that it does not strike their values through.
        if let Some(bound) = self.bound.filter(|bound| bound.is_finite()) {
            let ends = [(bound, 0.0), (bound, count)];
            chart.draw_series(LineSeries::new(ends, BOUND.stroke_width(2)))?;
        }
        for (row, bar) in (0_u32..).map(f64::from).zip(bars) {
            let body = [(0.0, row + 0.15), (bar.value, row + 0.85)];
            chart.draw_series([Rectangle::new(body, bar.role.colour().filled())])?;
            let behind = EmptyElement::at((bar.value, row + 0.5))
                + Text::new(short(bar.value), (5, 0), anchored(HPos::Left));
            chart.draw_series([behind])?;
            let before = EmptyElement::at((0.0, row + 0.5))
                + Text::new(bar.label.clone(), (-8, 0), anchored(HPos::Right));
            chart.draw_series([before])?;
        }
        Ok(())
    }
}

impl LineChart {
    /// The chart as an SVG document.
    ///
    /// # Errors
    ///
    /// [`Error::Plot`] when there is nothing to draw.
    pub fn to_svg(&self) -> Result<String> {
        let drawable = |&(x, y): &(f64, f64)| x.is_finite() && y.is_finite() && x > 0.0 && y > 0.0;
        let lines: Vec<Line> = self
            .lines
            .iter()
            .map(|line| Line {
                label: line.label.clone(),
                points: line.points.iter().copied().filter(drawable).collect(),
            })
            .filter(|line| !line.points.is_empty())
            .collect();
        let points = || lines.iter().flat_map(|line| &line.points);
        let (Some(horizontal), Some(vertical)) = (
            around(points().map(|point| point.0)),
            around(points().map(|point| point.1)),
        ) else {
            return Err(nothing(&self.title));
        };
        draw(&self.title, LINES_HEIGHT_PX, |area| {
            self.draw_lines(area, &lines, horizontal.clone(), vertical.clone())
        })
    }

    fn draw_lines(
        &self,
        area: &DrawingArea<SVGBackend<'_>, Shift>,
        lines: &[Line],
        horizontal: Range<f64>,
        vertical: Range<f64>,
    ) -> Drawn {
        let mut chart = ChartBuilder::on(area)
            .margin(10)
            .margin_right(24)
            .x_label_area_size(44)
            .y_label_area_size(64)
            .build_cartesian_2d(horizontal.log_scale(), vertical.log_scale())?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .x_desc(self.horizontal_unit.as_str())
            .y_desc(self.vertical_unit.as_str())
            .x_label_formatter(&|value| short(*value))
            .y_label_formatter(&|value| short(*value))
            .label_style(text())
            .draw()?;
        for (line, colour) in lines.iter().zip(LINE_COLOURS.into_iter().cycle()) {
            let points = line.points.iter().copied();
            chart
                .draw_series(LineSeries::new(points, colour.stroke_width(2)).point_size(4))?
                .label(line.label.as_str())
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(3))
                });
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.85))
            .border_style(GRID)
            .label_font(text())
            .draw()?;
        Ok(())
    }
}

type Drawn = std::result::Result<(), DrawingAreaErrorKind<std::io::Error>>;

/// A white page with a title, and what `contents` draws below it.
fn draw(
    title: &str,
    height_px: u32,
    contents: impl Fn(&DrawingArea<SVGBackend<'_>, Shift>) -> Drawn,
) -> Result<String> {
    let mut svg = String::new();
    let mut draw = || -> Drawn {
        let page = SVGBackend::with_string(&mut svg, (WIDTH_PX, height_px)).into_drawing_area();
        page.fill(&WHITE)?;
        let below = page.titled(title, ("sans-serif", TITLE_PX).into_font().color(&INK))?;
        contents(&below)?;
        page.present()
    };
    draw().map_err(|error| Error::Plot {
        title: title.to_owned(),
        reason: error.to_string(),
    })?;
    Ok(svg)
}

fn nothing(title: &str) -> Error {
    Error::Plot {
        title: title.to_owned(),
        reason: "there is no value to draw".to_owned(),
    }
}

fn text() -> TextStyle<'static> {
    ("sans-serif", TEXT_PX).into_font().color(&INK)
}

fn anchored(horizontal: HPos) -> TextStyle<'static> {
    text().pos(Pos::new(horizontal, VPos::Center))
}

/// From a little below the smallest value to a little above the largest.
fn around(values: impl Iterator<Item = f64>) -> Option<Range<f64>> {
    let (least, most) = values.fold((f64::INFINITY, 0.0), |(least, most), value| {
        (f64::min(least, value), f64::max(most, value))
    });
    (least <= most).then(|| least / 1.5..most * 1.5)
}

/// Three significant digits, and no more zeros than that takes.
fn short(value: f64) -> String {
    let digits = match value.abs() {
        0.0 => return "0".to_owned(),
        value if value >= 100.0 => 0,
        value if value >= 10.0 => 1,
        value if value >= 1.0 => 2,
        value if value >= 0.1 => 3,
        _ => 4,
    };
    let text = format!("{value:.digits$}");
    match text.split_once('.') {
        Some(_) => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        None => text,
    }
}

fn pixels(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX).min(4096)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bars(values: &[(&str, f64)]) -> BarChart {
        BarChart {
            title: "qwen3-0.6b, cold".to_owned(),
            unit: "GB/s".to_owned(),
            bars: values
                .iter()
                .map(|&(label, value)| Bar {
                    label: label.to_owned(),
                    value,
                    role: BarRole::Explicit,
                })
                .collect(),
            bound: None,
        }
    }

    /// The widths of the rectangles in the colour of explicit backends.
    fn widths(svg: &str) -> Vec<f64> {
        svg.lines()
            .filter(|line| line.starts_with("<rect") && line.contains("#78B2DE"))
            .map(|line| {
                let (_, rest) = line.split_once(" width=\"").unwrap();
                rest.split_once('"').unwrap().0.parse().unwrap()
            })
            .collect()
    }

    #[test]
    fn bars_are_as_long_as_their_values() {
        let svg = bars(&[("sync", 1.0), ("io-uring", 2.0)]).to_svg().unwrap();
        let widths = widths(&svg);
        assert_eq!(widths.len(), 2, "{svg}");
        assert!((widths[1] / widths[0] - 2.0).abs() < 0.02, "{widths:?}");
        for text in ["qwen3-0.6b, cold", "GB/s", "sync", "io-uring"] {
            assert!(svg.contains(text), "{text} is missing:\n{svg}");
        }
    }

    #[test]
    fn a_bound_is_a_red_line_that_fits_in() {
        let mut chart = bars(&[("regret", 1.0)]);
        assert!(!chart.to_svg().unwrap().contains("#C81E1E"));
        chart.bound = Some(2.0);
        let with_bound = chart.to_svg().unwrap();
        assert!(with_bound.contains("#C81E1E"), "{with_bound}");
        let alone = bars(&[("regret", 1.0)]).to_svg().unwrap();
        assert!(widths(&with_bound)[0] < 0.6 * widths(&alone)[0]);
    }

    #[test]
    fn labels_cannot_break_the_document() {
        let svg = bars(&[("<script>&\"", 1.0)]).to_svg().unwrap();
        assert!(svg.contains("&lt;script&gt;&amp;"), "{svg}");
        assert!(!svg.contains("<script>"));
    }

    #[test]
    fn without_values_there_is_nothing_to_draw() {
        for chart in [bars(&[]), bars(&[("failed", f64::NAN)])] {
            let error = chart.to_svg().unwrap_err().to_string();
            assert!(
                error.contains("no value") && error.contains("qwen3-0.6b"),
                "{error}"
            );
        }
        let lines = LineChart {
            lines: vec![Line {
                label: "auto".to_owned(),
                points: vec![(0.0, 1.0)],
            }],
            ..LineChart::default()
        };
        assert!(lines.to_svg().is_err());
    }

    #[test]
    fn each_line_has_its_points_and_its_name() {
        let line = |label: &str, points: &[(f64, f64)]| Line {
            label: label.to_owned(),
            points: points.to_vec(),
        };
        let svg = LineChart {
            title: "time against size".to_owned(),
            horizontal_unit: "GB".to_owned(),
            vertical_unit: "s".to_owned(),
            lines: vec![
                line("cold", &[(1.5, 0.66), (6.2, 2.8), (16.4, 8.0)]),
                line("warm", &[(1.5, 0.2), (f64::NAN, 1.0)]),
            ],
        }
        .to_svg()
        .unwrap();
        assert_eq!(svg.matches("<circle").count(), 4, "{svg}");
        for text in ["time against size", "cold", "warm"] {
            assert!(svg.contains(text), "{text} is missing:\n{svg}");
        }
    }

    #[test]
    fn numbers_are_short() {
        for (value, text) in [
            (0.0, "0"),
            (0.012, "0.012"),
            (0.5, "0.5"),
            (1.0, "1"),
            (2.345, "2.35"),
            (16.38, "16.4"),
            (1200.0, "1200"),
        ] {
            assert_eq!(short(value), text);
        }
    }
}
