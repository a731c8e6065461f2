//! Standard output: one report, as text for people or as one JSON object for machines.

use std::fmt;
use std::io::{self, IsTerminal, Write};

use anyhow::Result;
use serde::Serialize;

/// How the user wants to be answered.
#[derive(Debug)]
pub(crate) struct Console {
    /// JSON instead of text.
    pub(crate) json: bool,
    /// Whether progress bars may be drawn.
    pub(crate) progress: bool,
    /// Whether reasons are given in full.
    pub(crate) explain: bool,
}

/// The result of a subcommand. As JSON, it serialises to an object whose fields are a contract.
pub(crate) trait Report: Serialize {
    /// The text for people, with a line feed at its end.
    fn text(&self) -> String;
}

/// Writes a report, the only thing that a successful command writes to standard output.
pub(crate) fn emit(report: &impl Report, console: &Console) -> Result<()> {
    let text = if console.json {
        let mut json = if io::stdout().is_terminal() {
            serde_json::to_string_pretty(report)?
        } else {
            serde_json::to_string(report)?
        };
        json.push('\n');
        json
    } else {
        report.text()
    };
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(OutputError)?;
    Ok(())
}

/// Standard output could not be written.
#[derive(Debug)]
pub(crate) struct OutputError(io::Error);

impl OutputError {
    /// Whether the reader simply had enough, as `head` has after ten lines.
    pub(crate) fn is_closed_pipe(&self) -> bool {
        self.0.kind() == io::ErrorKind::BrokenPipe
    }
}

impl fmt::Display for OutputError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "could not write to standard output: {}", self.0)
    }
}

impl std::error::Error for OutputError {}

/// Whether colours suit this stream: a terminal, and nobody has set `NO_COLOR`.
pub(crate) fn colours(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// A name from a file, with control characters escaped: it must not be able to steer a terminal.
pub(crate) fn printable(name: &str) -> String {
    name.chars()
        .fold(String::with_capacity(name.len()), |mut text, c| {
            if c.is_control() {
                text.extend(c.escape_default());
            } else {
                text.push(c);
            }
            text
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_steer_a_terminal() {
        assert_eq!(printable("model.norm.weight"), "model.norm.weight");
        assert_eq!(printable("größe 张量"), "größe 张量");
        assert_eq!(printable("a\u{1b}[2J\nb\u{9b}"), "a\\u{1b}[2J\\nb\\u{9b}");
    }
}
