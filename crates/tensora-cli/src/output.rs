//! Standard output: one report, as text for people or as one JSON object for machines.

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;

/// What shells report for a program that SIGPIPE ended: 128 and the number of the signal.
const CLOSED_PIPE: u8 = 141;

/// The longest word of a message that is shown in full, in characters: real paths are shorter.
const MAX_WORD_CHARS: usize = 400;
/// What is shown of longer ones: of their beginning and of their end.
const CUT_WORD_CHARS: (usize, usize) = (150, 50);

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
        .map_err(|source| OutputError {
            json: console.json,
            source,
        })?;
    Ok(())
}

/// Standard output could not be written.
#[derive(Debug)]
pub(crate) struct OutputError {
    json: bool,
    source: io::Error,
}

impl OutputError {
    /// The exit status where the reader had enough. Of text it may, as `head` has after ten lines; a
    /// part of a JSON object is nothing, so that ends as programs do that SIGPIPE kills.
    pub(crate) fn closed_pipe_status(&self) -> Option<ExitCode> {
        let is_closed = self.source.kind() == io::ErrorKind::BrokenPipe;
        is_closed.then(|| ExitCode::from(if self.json { CLOSED_PIPE } else { 0 }))
    }
}

impl fmt::Display for OutputError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "could not write to standard output: {}", self.source)
    }
}

impl std::error::Error for OutputError {}

/// Whether colours suit this stream: a terminal, and nobody has set `NO_COLOR`.
pub(crate) fn colours(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// A name from a file, with characters escaped that control or are not seen: it must not be able to
/// steer a terminal, nor to look like another name.
pub(crate) fn printable(name: &str) -> String {
    name.chars()
        .fold(String::with_capacity(name.len()), |mut text, c| {
            if c.is_control() || is_unseen(c) {
                text.extend(c.escape_default());
            } else {
                text.push(c);
            }
            text
        })
}

/// Whether a character only changes how others are shown (Unicode's format characters, such as those
/// that reverse the direction), ends a line, or leaves no mark.
fn is_unseen(c: char) -> bool {
    matches!(
        c,
        '\u{ad}'
            | '\u{34f}'
            | '\u{600}'..='\u{605}'
            | '\u{61c}'
            | '\u{6dd}'
            | '\u{70f}'
            | '\u{890}'..='\u{891}'
            | '\u{8e2}'
            | '\u{115f}'..='\u{1160}'
            | '\u{180b}'..='\u{180f}'
            | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{3164}'
            | '\u{fe00}'..='\u{fe0f}'
            | '\u{feff}'
            | '\u{ffa0}'
            | '\u{fff0}'..='\u{fffb}'
            | '\u{110bd}'
            | '\u{110cd}'
            | '\u{13430}'..='\u{1343f}'
            | '\u{1bca0}'..='\u{1bca3}'
            | '\u{1d173}'..='\u{1d17a}'
            | '\u{e0000}'..='\u{e0fff}'
    )
}

/// A message with paths and patterns of any length and content in it, as [`printable`], and with its
/// longest words cut, so that what it says is not lost between them.
pub(crate) fn readable(message: &str) -> String {
    let cut = |word: &str| {
        let chars = word.chars().count();
        if chars <= MAX_WORD_CHARS {
            return word.to_owned();
        }
        let (first, last) = CUT_WORD_CHARS;
        let head: String = word.chars().take(first).collect();
        let tail: String = word.chars().skip(chars - last).collect();
        format!("{head}…{tail} ({chars} characters)")
    };
    let words: Vec<String> = message.split(' ').map(cut).collect();
    printable(&words.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_steer_a_terminal() {
        assert_eq!(printable("model.norm.weight"), "model.norm.weight");
        assert_eq!(printable("größe 张量"), "größe 张量");
        assert_eq!(printable("a\u{1b}[2J\nb\u{9b}"), "a\\u{1b}[2J\\nb\\u{9b}");
        for c in [
            '\u{202e}',
            '\u{2066}',
            '\u{2028}',
            '\u{2029}',
            '\u{200b}',
            '\u{feff}',
            '\u{e0041}',
        ] {
            let name = format!("a{c}b");
            assert_eq!(printable(&name), format!("a{}b", c.escape_unicode()));
        }
        // Marks that belong to the letter before them.
        assert_eq!(printable("हिन्दी e\u{301}"), "हिन्दी e\u{301}");
    }

    #[test]
    fn long_words_are_cut_and_short_ones_are_not() {
        let short = "x".repeat(MAX_WORD_CHARS - 1);
        let message = format!("no such file: {short}; check the path");
        assert_eq!(readable(&message), message);
        let long = "ä".repeat(100_000);
        let text = readable(&format!("no such file: {long}/model.json; check the path"));
        assert!(text.chars().count() < 300, "{text}");
        assert!(text.starts_with("no such file: ää"), "{text}");
        let end = "ä/model.json; (100012 characters) check the path";
        assert!(text.ends_with(end), "{text}");
    }
}
