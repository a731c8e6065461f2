//! Rust source text split into code and comments, line by line.
//!
//! The checks ask simple questions ("is there an `unsafe` here?") that a plain text search answers
//! wrongly, because the word also stands in comments and strings. This is the smallest lexer that
//! answers them rightly; it does not parse.

/// One line of a source file.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Line {
    /// The code of the line; comments are cut out, string and character contents are blanked.
    pub(super) code: String,
    /// The comments of the line, without their markers.
    pub(super) comment: String,
    /// The literal contents that `code` leaves out.
    pub(super) literal: String,
    /// Whether the line belongs to an item under `#[cfg(test)]`.
    pub(super) test: bool,
}

#[derive(Clone, Copy)]
enum State {
    Code,
    LineComment,
    BlockComment { depth: u32 },
    Text { hashes: Option<usize> },
}

/// Splits `text` into lines of code, comments and literals, and marks what is test code.
pub(super) fn lines(text: &str) -> Vec<Line> {
    let mut lines = split(text);
    mark_tests(&mut lines);
    lines
}

fn split(text: &str) -> Vec<Line> {
    let chars: Vec<char> = text.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let mut lines = Vec::new();
    let mut line = Line::default();
    let mut state = State::Code;
    let mut i = 0;
    while i < chars.len() {
        let c = at(i);
        if c == '\n' {
            if matches!(state, State::LineComment) {
                state = State::Code;
            }
            lines.push(std::mem::take(&mut line));
            i += 1;
            continue;
        }
        match state {
            State::LineComment => {
                line.comment.push(c);
                i += 1;
            }
            State::BlockComment { depth } => {
                let (step, depth) = match (c, at(i + 1)) {
                    ('/', '*') => (2, depth + 1),
                    ('*', '/') => (2, depth - 1),
                    _ => (1, depth),
                };
                if step == 1 {
                    line.comment.push(c);
                }
                state = if depth == 0 {
                    State::Code
                } else {
                    State::BlockComment { depth }
                };
                i += step;
            }
            State::Text { hashes: None } => {
                if c == '"' {
                    line.code.push('"');
                    state = State::Code;
                    i += 1;
                } else {
                    line.literal.push(c);
                    // A backslash takes the next character with it, unless that ends the line.
                    let escaped = c == '\\' && at(i + 1) != '\n';
                    i += if escaped { 2 } else { 1 };
                }
            }
            State::Text {
                hashes: Some(hashes),
            } => {
                let closes = c == '"' && (1..=hashes).all(|k| at(i + k) == '#');
                if closes {
                    line.code.push('"');
                    state = State::Code;
                    i += 1 + hashes;
                } else {
                    line.literal.push(c);
                    i += 1;
                }
            }
            State::Code => match (c, at(i + 1)) {
                ('/', '/') => {
                    state = State::LineComment;
                    i += 2;
                }
                ('/', '*') => {
                    state = State::BlockComment { depth: 1 };
                    i += 2;
                }
                ('"', _) => {
                    line.code.push('"');
                    state = State::Text { hashes: None };
                    i += 1;
                }
                ('r', '"' | '#') if starts_raw_string(&chars, i) => {
                    let hashes = (i + 1..).take_while(|&k| at(k) == '#').count();
                    line.code.push('"');
                    state = State::Text {
                        hashes: Some(hashes),
                    };
                    i += 2 + hashes;
                }
                ('\'', next) => {
                    // `'x'` and `'\n'` are characters; `'a` alone is a lifetime.
                    let length = if next == '\\' {
                        (i + 3..)
                            .take_while(|&k| k < chars.len() && at(k) != '\'')
                            .count()
                            + 4
                    } else if at(i + 2) == '\'' {
                        3
                    } else {
                        1
                    };
                    line.code.push('\'');
                    line.literal.extend(
                        (i + 1..i + length.max(1) - 1)
                            .map(&at)
                            .filter(|_| length > 1),
                    );
                    i += length;
                }
                _ => {
                    line.code.push(c);
                    i += 1;
                }
            },
        }
    }
    if line != Line::default() {
        lines.push(line);
    }
    lines
}

/// Whether the `r` at `i` opens a raw string, and is neither the end of a name nor a raw name.
fn starts_raw_string(chars: &[char], i: usize) -> bool {
    let before = i
        .checked_sub(1)
        .and_then(|k| chars.get(k))
        .copied()
        .unwrap_or(' ');
    let earlier = i
        .checked_sub(2)
        .and_then(|k| chars.get(k))
        .copied()
        .unwrap_or(' ');
    // `br"` and `cr"` open one too, unless that `b` or `c` itself ends a longer name.
    let prefixed = matches!(before, 'b' | 'c') && !is_name(earlier);
    let ends_name = is_name(before) && !prefixed;
    let after_hashes = chars.iter().skip(i + 1).find(|&&c| c != '#');
    !ends_name && after_hashes == Some(&'"')
}

/// Whether `c` can stand inside an identifier.
pub(super) fn is_name(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Marks the item that follows each `#[cfg(test)]`, up to its closing brace or semicolon.
fn mark_tests(lines: &mut [Line]) {
    let mut start = 0;
    while start < lines.len() {
        let code: String = lines[start].code.split_whitespace().collect();
        if !(code.starts_with("#[cfg(test)]") || code.starts_with("#[cfg(all(test,")) {
            start += 1;
            continue;
        }
        let mut depth = 0u32;
        let mut end = start;
        'item: while end < lines.len() {
            let skip = if end == start {
                lines[end].code.find(']').map_or(0, |at| at + 1)
            } else {
                0
            };
            for c in lines[end].code[skip..].chars() {
                match c {
                    '{' | '(' | '[' => depth += 1,
                    '}' | ')' | ']' => {
                        depth = depth.saturating_sub(1);
                        if depth == 0 && c == '}' {
                            break 'item;
                        }
                    }
                    ';' if depth == 0 => break 'item,
                    _ => {}
                }
            }
            end += 1;
        }
        let end = end.min(lines.len() - 1);
        for line in &mut lines[start..=end] {
            line.test = true;
        }
        start = end + 1;
    }
}

/// The identifiers and single punctuation characters of all lines, each with its line index.
pub(super) fn tokens(lines: &[Line]) -> Vec<(usize, &str)> {
    let mut tokens = Vec::new();
    for (number, line) in lines.iter().enumerate() {
        let mut rest = line.code.as_str();
        while let Some(c) = rest.chars().next() {
            let length = if is_name(c) {
                rest.find(|c| !is_name(c)).unwrap_or(rest.len())
            } else {
                c.len_utf8()
            };
            let (token, tail) = rest.split_at(length);
            if !c.is_whitespace() {
                tokens.push((number, token));
            }
            rest = tail;
        }
    }
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_comments_and_literals_are_told_apart() {
        let text = concat!(
            "let a = \"unsafe // no\"; // SAFETY: yes\n",
            "let b = r#\"a \" unsafe\"#; /* one /* two */ unsafe */ let c = '\"';\n",
            "fn f<'a>(x: &'a str) -> char { '\\'' } // tail\n",
            "let d = br\"raw\"; let bar = \"x\\\"y\";",
        );
        let lines = lines(text);
        assert_eq!(lines.len(), 4);
        assert_eq!(lines[0].code, "let a = \"\"; ");
        assert_eq!(lines[0].comment, " SAFETY: yes");
        assert_eq!(lines[0].literal, "unsafe // no");
        assert_eq!(lines[1].code, "let b = \"\";  let c = ';");
        assert_eq!(lines[1].literal, "a \" unsafe\"");
        assert_eq!(lines[2].code, "fn f<'a>(x: &'a str) -> char { ' } ");
        assert_eq!(lines[3].code, "let d = b\"\"; let bar = \"\";");
    }

    #[test]
    fn strings_and_comments_go_on_over_lines() {
        let lines = lines("let s = \"one\nunsafe\"; call();\n/* a\nunsafe */ end");
        assert_eq!(lines[1].code, "\"; call();");
        assert_eq!(lines[3].code, " end");
        assert_eq!(lines[3].comment, "unsafe ");
    }

    #[test]
    fn test_items_are_marked_to_their_end() {
        let text = "fn a() {}\n#[cfg(test)]\nmod tests {\n  fn b() { c(); }\n}\nfn d() {}\n#[cfg(test)]\nmod e;\nfn f() {}";
        let marked: Vec<bool> = lines(text).iter().map(|line| line.test).collect();
        assert_eq!(
            marked,
            [false, true, true, true, true, false, true, true, false]
        );
    }

    #[test]
    fn tokens_split_names_from_punctuation() {
        let lines = lines("use std::{fs, r#io};\nunsafe{}");
        let tokens: Vec<&str> = tokens(&lines).into_iter().map(|(_, token)| token).collect();
        assert_eq!(
            tokens,
            [
                "use", "std", ":", ":", "{", "fs", ",", "r", "#", "io", "}", ";", "unsafe", "{",
                "}"
            ]
        );
    }
}
