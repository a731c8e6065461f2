//! Which tensors a load is about.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt;
use std::str::FromStr;

use globset::GlobBuilder;
use regex::bytes::{Regex, RegexSet};
use tensora_formats::CheckpointIndex;

use crate::{Error, Result};

/// Says which tensors are meant, by their names.
///
/// As text, a pattern is a glob, or a regular expression if it begins with `re:`. Text without `*`, `?`, `[`, `{`
/// and `\` is the name that it spells.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Pattern {
    /// The tensor of this name.
    Name(String),
    /// Names that match a glob: `*` for any characters (dots and slashes too), `?` for one byte, `[…]` for one of
    /// several, `{a,b}` for either, and `\` before a character that stands for itself.
    Glob(String),
    /// Names of which all matches a regular expression, in the syntax of the crate `regex`.
    Regex(String),
}

impl FromStr for Pattern {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(if let Some(regex) = text.strip_prefix("re:") {
            Self::Regex(regex.to_owned())
        } else if text.contains(['*', '?', '[', '{', '\\']) {
            Self::Glob(text.to_owned())
        } else {
            Self::Name(text.to_owned())
        })
    }
}

impl From<&str> for Pattern {
    fn from(text: &str) -> Self {
        let Ok(pattern) = text.parse();
        pattern
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(text) | Self::Glob(text) => f.write_str(text),
            Self::Regex(regex) => write!(f, "re:{regex}"),
        }
    }
}

impl Pattern {
    fn bad(&self, reason: impl fmt::Display) -> Error {
        Error::BadPattern {
            pattern: self.to_string(),
            reason: reason.to_string(),
        }
    }

    /// The regular expression of a glob or of a regular expression, of which all of a name has to match.
    fn regex(&self) -> Result<String> {
        let regex = match self {
            Self::Name(name) => format!(r"\A{}\z", regex::escape(name)),
            Self::Glob(glob) => {
                // Tensor names are no paths: `*` matches a slash like any other character.
                let glob = GlobBuilder::new(glob)
                    .literal_separator(false)
                    .backslash_escape(true)
                    .build()
                    .map_err(|error| self.bad(error.kind()))?;
                format!("(?s){}", glob.regex())
            }
            Self::Regex(regex) => {
                // Alone first: `a)(b` is an error, and must not become right between the parentheses.
                Regex::new(regex).map_err(|error| self.bad(error))?;
                format!(r"\A(?:{regex})\z")
            }
        };
        Regex::new(&regex).map_err(|error| self.bad(error))?;
        Ok(regex)
    }
}

/// Patterns that names are held against all at once.
#[derive(Clone, Debug, Default)]
pub(crate) struct PatternSet {
    /// The positions of the patterns that are names.
    names: HashMap<String, Vec<usize>>,
    others: RegexSet,
    /// The positions of the other patterns.
    numbers: Vec<usize>,
}

impl PatternSet {
    pub(crate) fn new<'p>(patterns: impl IntoIterator<Item = &'p Pattern>) -> Result<Self> {
        let mut set = Self::default();
        let mut regexes = Vec::new();
        let mut last = None;
        for (number, pattern) in patterns.into_iter().enumerate() {
            if let Pattern::Name(name) = pattern {
                set.names.entry(name.clone()).or_default().push(number);
            } else {
                regexes.push(pattern.regex()?);
                set.numbers.push(number);
                last = Some(pattern);
            }
        }
        if let Some(last) = last {
            // Each of them is valid alone, so that only their size together is left to go wrong.
            set.others = RegexSet::new(regexes).map_err(|error| last.bad(error))?;
        }
        Ok(set)
    }

    /// The positions of the patterns that match, ascending.
    pub(crate) fn matches(&self, name: &str) -> Vec<usize> {
        let names = self.names.get(name).into_iter().flatten().copied();
        let others = self.others.matches(name.as_bytes()).into_iter();
        let mut matches: Vec<_> = names
            .chain(others.map(|number| self.numbers[number]))
            .collect();
        matches.sort_unstable();
        matches
    }
}

/// Names and patterns; everything, when there are none of either.
#[derive(Clone, Debug, Default)]
pub(crate) struct Selection {
    pub(crate) names: Vec<String>,
    /// In the text form of [`Pattern`].
    pub(crate) patterns: Vec<String>,
}

impl Selection {
    /// Positions of the selected tensors in the index, ascending.
    ///
    /// A name that does not exist and a pattern that matches nothing are errors: loading less than
    /// somebody asked for must not go unnoticed.
    pub(crate) fn resolve(&self, index: &CheckpointIndex) -> Result<Vec<usize>> {
        let tensors = index.tensors();
        if self.names.is_empty() && self.patterns.is_empty() {
            return Ok((0..tensors.len()).collect());
        }
        let mut selected = vec![false; tensors.len()];
        for name in &self.names {
            selected[position(index, name)?] = true;
        }
        let patterns: Vec<Pattern> = self
            .patterns
            .iter()
            .map(|text| text.as_str().into())
            .collect();
        let patterns = PatternSet::new(&patterns)?;
        let mut used = vec![false; self.patterns.len()];
        for (number, tensor) in tensors.iter().enumerate() {
            for pattern in patterns.matches(&tensor.name) {
                used[pattern] = true;
                selected[number] = true;
            }
        }
        if let Some(unused) = used.iter().position(|used| !used) {
            return Err(Error::NoMatch {
                pattern: self.patterns[unused].clone(),
                tensor_count: tensors.len(),
                root: index.root().to_owned(),
            });
        }
        Ok((0..tensors.len())
            .filter(|&number| selected[number])
            .collect())
    }
}

/// Where a tensor stands in the index.
pub(crate) fn position(index: &CheckpointIndex, name: &str) -> Result<usize> {
    index
        .tensors()
        .binary_search_by(|tensor| tensor.name.as_str().cmp(name))
        .map_err(|_| Error::NoSuchTensor {
            name: name.to_owned(),
            similar: similar(index, name),
            tensor_count: index.tensors().len(),
            root: index.root().to_owned(),
        })
}

/// Up to three names that contain what was asked for, or end as it does: the usual slips are a missing
/// prefix (`model.`) or suffix (`.weight`).
fn similar(index: &CheckpointIndex, name: &str) -> Vec<String> {
    let wanted = name.to_lowercase();
    let tail = wanted.split_once('.').map_or("", |(_, tail)| tail);
    index
        .tensors()
        .iter()
        .map(|tensor| &tensor.name)
        .filter(|candidate| {
            let candidate = candidate.to_lowercase();
            !candidate.is_empty()
                && (candidate.contains(&wanted)
                    || wanted.contains(&candidate)
                    || (!tail.is_empty() && candidate.ends_with(tail)))
        })
        .take(3)
        .cloned()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, name: &str) -> bool {
        let set = PatternSet::new([&Pattern::from(pattern)]).unwrap();
        !set.matches(name).is_empty()
    }

    #[test]
    fn text_is_a_name_a_glob_or_a_regular_expression() {
        assert_eq!(
            Pattern::from("lm_head.weight"),
            Pattern::Name("lm_head.weight".into())
        );
        assert_eq!(Pattern::from("re:a|b"), Pattern::Regex("a|b".into()));
        for glob in ["*.weight", "a?", "a[bc]", "{a,b}", r"\*"] {
            assert_eq!(Pattern::from(glob), Pattern::Glob(glob.into()));
        }
        for text in ["a", "a*", "re:a+"] {
            assert_eq!(Pattern::from(text).to_string(), text);
        }
    }

    #[test]
    fn all_of_a_name_has_to_match() {
        assert!(matches("a.b", "a.b"));
        assert!(!matches("a.b", "axb") && !matches("a.b", "a.b.c"));
        assert!(matches("model.*.weight", "model.layers.0/x\n.weight"));
        assert!(!matches("model.*.weight", "model.x.weight.scale"));
        assert!(matches(r"\*", "*") && !matches(r"\*", "a"));
        assert!(matches("re:a|bc", "a") && matches("re:a|bc", "bc"));
        assert!(!matches("re:a|bc", "ac") && !matches("re:a|bc", "abc"));
        assert!(!matches("re:(?m)a$", "a\nb"));
        assert!(matches("re:.\\.ü", "ä.ü"));
    }

    #[test]
    fn patterns_are_told_apart_by_position() {
        let patterns = ["b", "*", "re:[ab]", "a", "b"].map(Pattern::from);
        let set = PatternSet::new(&patterns).unwrap();
        assert_eq!(set.matches("a"), [1, 2, 3]);
        assert_eq!(set.matches("b"), [0, 1, 2, 4]);
        assert_eq!(set.matches("c"), [1]);
        assert!(PatternSet::default().matches("a").is_empty());
    }

    #[test]
    fn patterns_that_are_none_are_named() {
        for wrong in ["[a", "{a", "re:(", "re:a)(b", "re:(?x)a # b"] {
            let patterns = ["*", wrong, "b"].map(Pattern::from);
            let error = PatternSet::new(&patterns).unwrap_err();
            assert!(
                matches!(&error, Error::BadPattern { pattern, .. } if pattern == wrong),
                "{error}"
            );
        }
    }
}
