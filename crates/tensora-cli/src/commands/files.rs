//! Files as `inspect` and `convert` list them.

use serde::Serialize;

use crate::output::printable;
use crate::table::{Column, Table};
use crate::units::{grouped, size};

/// A file of a checkpoint, with how many of the tensors in question it holds.
#[derive(Serialize)]
pub(super) struct FileLine<'a> {
    pub(super) path: &'a str,
    pub(super) bytes: u64,
    pub(super) tensor_count: usize,
}

/// A table of at most `rows` files.
pub(super) fn file_table(files: &[FileLine<'_>], rows: usize) -> String {
    let mut table = Table::new(&[
        ("file", Column::Text),
        ("tensors", Column::Number),
        ("size", Column::Number),
        ("bytes", Column::Number),
    ]);
    for file in files.iter().take(rows) {
        table.row([
            printable(file.path),
            grouped(file.tensor_count as u64),
            size(file.bytes),
            grouped(file.bytes),
        ]);
    }
    table.text() + &left_out(files.len(), rows)
}

/// What stands below a table that does not show everything.
pub(super) fn left_out(count: usize, rows: usize) -> String {
    match count.saturating_sub(rows) {
        0 => String::new(),
        more => format!("… {} more, --all shows them\n", grouped(more as u64)),
    }
}
