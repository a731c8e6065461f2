//! Tables that fit the terminal.

use comfy_table::{
    Cell, CellAlignment, Color, ColumnConstraint, ContentArrangement, LineStyle, Table as Grid,
    TableStyle,
};

use crate::output;

/// Nothing is readable in less than this, so narrower terminals have to break lines themselves.
const MIN_WIDTH: u16 = 40;

/// How a column is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Column {
    /// Words, wrapped where the terminal is too narrow.
    Text,
    /// A short word that is never wrapped.
    Word,
    /// A number, aligned to the right and never wrapped.
    Number,
}

/// A table with a header line.
pub(crate) struct Table {
    grid: Grid,
    columns: Vec<Column>,
    /// Places of the columns that are left out where the terminal is too narrow, the first one first.
    dispensable: Vec<usize>,
}

impl Table {
    /// An empty table with these columns.
    pub(crate) fn new(columns: &[(&str, Column)]) -> Self {
        let line = LineStyle::none().fill('─');
        let mut grid = grid(TableStyle::new().header_separator(line));
        let columns = columns.iter().copied();
        grid.set_header(columns.clone().map(|(title, column)| cell(title, column)));
        Self {
            grid,
            columns: columns.map(|(_, column)| column).collect(),
            dispensable: Vec::new(),
        }
    }

    /// Lets the columns of these titles go, in this order, before anything is wrapped.
    pub(crate) fn dispense_with(&mut self, titles: &[&str]) {
        let header = self.grid.header();
        let place = |title: &&str| {
            header?
                .cell_iter()
                .position(|cell| cell.content() == *title)
        };
        self.dispensable = titles.iter().filter_map(place).collect();
    }

    /// Adds a row, one text for each column.
    pub(crate) fn row(&mut self, texts: impl IntoIterator<Item = String>) {
        let cells = texts.into_iter().zip(&self.columns);
        self.grid
            .add_row(cells.map(|(text, &column)| cell(&text, column)));
    }

    /// The text, with a line feed at the end.
    pub(crate) fn text(mut self) -> String {
        if let Some(width) = self.grid.width() {
            let mut widths = self.grid.column_max_content_widths();
            for &place in &self.dispensable {
                let gaps = 2 * widths.iter().filter(|&&width| width > 0).count();
                let needed: usize = widths.iter().copied().map(usize::from).sum();
                if needed + gaps <= usize::from(width) {
                    break;
                }
                widths[place] = 0;
                if let Some(column) = self.grid.column_mut(place) {
                    column.set_constraint(ColumnConstraint::Hidden);
                }
            }
        }
        finish(&mut self.grid, &self.columns)
    }
}

/// Lines of a label and what it stands for.
pub(crate) struct Facts(Grid);

impl Facts {
    pub(crate) fn new() -> Self {
        Self(grid(TableStyle::new()))
    }

    pub(crate) fn add(&mut self, label: &str, value: impl Into<String>) -> &mut Self {
        self.add_each(label, [value.into()])
    }

    /// A line for each value, the label on the first one.
    pub(crate) fn add_each(
        &mut self,
        label: &str,
        values: impl IntoIterator<Item = String>,
    ) -> &mut Self {
        for (place, value) in values.into_iter().enumerate() {
            let label = if place == 0 { label } else { "" };
            self.0.add_row([label.to_owned(), value]);
        }
        self
    }

    /// The text, with a line feed at the end.
    pub(crate) fn text(mut self) -> String {
        finish(&mut self.0, &[Column::Word, Column::Text])
    }
}

/// Lines of a coloured verdict, what it is about, and why.
pub(crate) struct Verdicts(Grid);

impl Verdicts {
    pub(crate) fn new() -> Self {
        Self(grid(TableStyle::new()))
    }

    pub(crate) fn add(&mut self, verdict: &str, colour: Color, item: &str, text: &str) {
        self.0.add_row([
            Cell::new(verdict).fg(colour),
            Cell::new(item),
            Cell::new(text),
        ]);
    }

    /// The text, with a line feed at the end.
    pub(crate) fn text(mut self) -> String {
        finish(&mut self.0, &[Column::Word, Column::Word, Column::Text])
    }
}

fn grid(style: TableStyle) -> Grid {
    let mut grid = Grid::new();
    grid.load_style(style)
        .set_content_arrangement(ContentArrangement::Dynamic);
    let width = match grid.width() {
        // A terminal that does not tell its width; nothing is wrapped then.
        Some(0) => Some(u16::MAX),
        width => width.map(|width| width.max(MIN_WIDTH)),
    };
    if let Some(width) = width {
        grid.set_width(width);
    }
    // A grid that takes itself for a terminal is coloured.
    if !output::colours(&std::io::stdout()) {
        grid.force_no_tty();
    }
    grid
}

fn cell(text: &str, column: Column) -> Cell {
    Cell::new(text).set_alignment(match column {
        Column::Text | Column::Word => CellAlignment::Left,
        Column::Number => CellAlignment::Right,
    })
}

fn finish(grid: &mut Grid, columns: &[Column]) -> String {
    for (place, (column, kind)) in grid.column_iter_mut().zip(columns).enumerate() {
        // Columns stand two spaces apart, and the first one at the margin.
        column.set_padding((if place == 0 { 0 } else { 1 }, 1));
        if *kind != Column::Text && !column.is_hidden() {
            column.set_constraint(ColumnConstraint::ContentWidth);
        }
    }
    let mut text = grid.trim_fmt();
    text.push('\n');
    text
}
