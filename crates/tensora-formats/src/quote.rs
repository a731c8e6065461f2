//! How messages quote what stands in a file: shortened, and without control characters, because it was
//! written by somebody who may want to flood the reader's terminal or to steer it.

use std::borrow::Cow;
use std::fmt::{self, Write as _};
use std::path::Path;

use crate::ShortPartition;

/// How many characters of a quotation a message shows.
const TEXT_CHARS: usize = 200;

/// How many characters of a path a message shows. More, because most of it is the reader's own.
const PATH_CHARS: usize = 400;

/// How many dimensions of a shape a message shows.
const DIMENSIONS: usize = 12;

/// How many names of a list a message shows.
const NAMES: usize = 5;

/// The text without its middle if it has more than `limit` characters; both ends of a name tell it
/// from others.
fn shortened(text: &str, limit: usize) -> Cow<'_, str> {
    if text.char_indices().nth(limit).is_none() {
        return Cow::Borrowed(text);
    }
    let tail_chars = limit / 3;
    let boundary = |position: Option<(usize, char)>| position.map_or(0, |(at, _)| at);
    let head_end = boundary(text.char_indices().nth(limit - tail_chars));
    let tail_start = boundary(text.char_indices().nth_back(tail_chars - 1));
    Cow::Owned(format!("{}…{}", &text[..head_end], &text[tail_start..]))
}

/// Says how long a quotation is that was shortened.
fn write_length(f: &mut fmt::Formatter<'_>, text: &str, shown: &str) -> fmt::Result {
    if shown == text {
        return Ok(());
    }
    write!(f, " ({} bytes)", text.len())
}

fn write_plain(f: &mut fmt::Formatter<'_>, text: &str, limit: usize) -> fmt::Result {
    let shown = shortened(text, limit);
    for character in shown.chars() {
        if character.is_control() {
            write!(f, "{}", character.escape_default())?;
        } else {
            f.write_char(character)?;
        }
    }
    write_length(f, text, &shown)
}

/// A text in quotation marks.
pub(crate) struct Quoted<'a>(pub(crate) &'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = shortened(self.0, TEXT_CHARS);
        write!(f, "{shown:?}")?;
        write_length(f, self.0, &shown)
    }
}

/// A text without quotation marks.
pub(crate) struct Plain<'a>(pub(crate) &'a str);

impl fmt::Display for Plain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_plain(f, self.0, TEXT_CHARS)
    }
}

/// A path, whose last part may come from an index.
pub(crate) struct Shown<'a>(pub(crate) &'a Path);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_plain(f, &self.0.to_string_lossy(), PATH_CHARS)
    }
}

/// A shape.
pub(crate) struct Shape<'a>(pub(crate) &'a [u64]);

impl fmt::Display for Shape<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(first) = self
            .0
            .get(..DIMENSIONS)
            .filter(|first| first.len() < self.0.len())
        else {
            return write!(f, "{:?}", self.0);
        };
        f.write_char('[')?;
        for dimension in first {
            write!(f, "{dimension}, ")?;
        }
        write!(f, "…] ({} dimensions)", self.0.len())
    }
}

/// The first items of a list, and how many more there are.
fn write_first<T>(
    f: &mut fmt::Formatter<'_>,
    items: &[T],
    limit: usize,
    show: impl Fn(&mut fmt::Formatter<'_>, &T) -> fmt::Result,
) -> fmt::Result {
    for (index, item) in items.iter().take(limit).enumerate() {
        if index > 0 {
            f.write_str(", ")?;
        }
        show(f, item)?;
    }
    match items.len().saturating_sub(limit) {
        0 => Ok(()),
        more => write!(f, " and {more} more"),
    }
}

/// The first names of a list, quoted, and how many more there are.
pub(crate) struct FirstOf<'a, T>(pub(crate) &'a [T]);

impl<T: AsRef<str>> fmt::Display for FirstOf<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_first(f, self.0, NAMES, |f, name| {
            write!(f, "{}", Quoted(name.as_ref()))
        })
    }
}

/// The first partitions of a list with what they have and need, how many more there are, and the tensors
/// that this damages.
pub(crate) struct Short<'a>(pub(crate) &'a [ShortPartition]);

impl fmt::Display for Short<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_first(f, self.0, NAMES, |f, partition| {
            let ShortPartition {
                file,
                file_bytes,
                needed_bytes,
                ..
            } = partition;
            let file = Plain(file);
            write!(
                f,
                "{file} is {file_bytes} bytes long, but the index needs {needed_bytes}"
            )
        })?;
        let damaged = || self.0.iter().flat_map(|partition| &partition.tensors);
        let first: Vec<&str> = damaged()
            .take(NAMES)
            .map(|tensor| tensor.name.as_str())
            .collect();
        let count = damaged().count();
        let plural = if count == 1 { "" } else { "s" };
        write!(f, "; {count} tensor{plural} damaged: {}", FirstOf(&first))?;
        match count.saturating_sub(NAMES) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// The first numbers of ranks, and how many more there are.
pub(crate) struct Ranks<'a>(pub(crate) &'a [u32]);

impl fmt::Display for Ranks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_first(f, self.0, 16, |f, rank| write!(f, "{rank}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_texts_are_whole_and_long_ones_say_how_long() {
        let limit = "ä".repeat(TEXT_CHARS);
        assert_eq!(Quoted(&limit).to_string(), format!("{limit:?}"));
        // Every number of bytes per character, so that a cut inside one would panic.
        for character in ["a", "ä", "€", "𝄞", "\u{1b}"] {
            let text = character.repeat(100_000);
            let stated = format!("({} bytes)", text.len());
            for message in [
                Quoted(&text).to_string(),
                Plain(&text).to_string(),
                Shown(Path::new(&text)).to_string(),
            ] {
                assert!(
                    message.contains('…') && message.ends_with(&stated),
                    "{message}"
                );
                assert!(message.chars().count() < 10 * PATH_CHARS, "{message}");
                assert!(!message.contains('\u{1b}'));
            }
        }
    }

    #[test]
    fn both_ends_stay() {
        let text = format!("model.layers.{}.weight", "x".repeat(1000));
        let message = Quoted(&text).to_string();
        assert!(message.starts_with("\"model.layers."), "{message}");
        assert!(message.contains(".weight\" (1020 bytes)"), "{message}");
        assert_eq!(shortened(&text, 30).chars().count(), 31);
    }

    #[test]
    fn shapes() {
        assert_eq!(Shape(&[]).to_string(), "[]");
        assert_eq!(Shape(&[2, 3]).to_string(), "[2, 3]");
        assert_eq!(
            Shape(&[7; DIMENSIONS]).to_string(),
            format!("{:?}", [7; DIMENSIONS])
        );
        let long = Shape(&[7; 1000]).to_string();
        assert!(
            long.ends_with("7, …] (1000 dimensions)") && long.len() < 100,
            "{long}"
        );
    }
}
