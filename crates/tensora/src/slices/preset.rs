//! Slice rules that come from a file.

use std::path::Path;

use serde::Deserialize;
use tensora_formats::Remainder;

use super::SlicePart;
use crate::selection::{Pattern, PatternSet};
use crate::{Error, Result};

/// The presets that this crate comes with, by name.
const SHIPPED: &[(&str, &str)] = &[(
    "tensor-parallel",
    include_str!("../../presets/tensor-parallel.toml"),
)];

/// Slice rules for a family of models, which come with this crate or from a file.
///
/// The file is TOML; that of the preset `tensor-parallel`, `presets/tensor-parallel.toml` of this crate, says at its
/// top how one is written.
#[derive(Clone, Debug)]
pub struct Preset {
    name: String,
    parts: Vec<SlicePart>,
    /// In the order of the file, each with the position of its part.
    patterns: Vec<(Pattern, usize)>,
    set: PatternSet,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    rule: Vec<Rule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    tensors: Vec<String>,
    dim: Option<i64>,
    remainder: Option<RemainderName>,
    multiple_of: Option<u64>,
    whole: Option<bool>,
    refuse: Option<String>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RemainderName {
    Refuse,
    Last,
}

impl Preset {
    /// The preset of this name, or else the one in the file at this path.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownPreset`], [`Error::PresetFile`], and as [`parse`](Self::parse).
    pub fn find(name_or_path: &str) -> Result<Self> {
        if let Some((name, text)) = SHIPPED.iter().find(|(name, _)| *name == name_or_path) {
            return Self::parse(name, text);
        }
        let path = Path::new(name_or_path);
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(name_or_path, &text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Err(Error::UnknownPreset {
                    name: name_or_path.to_owned(),
                })
            }
            Err(source) => Err(Error::PresetFile {
                path: path.to_owned(),
                source,
            }),
        }
    }

    /// Reads rules from the text of a file; messages call the preset by `name`.
    ///
    /// # Errors
    ///
    /// [`Error::BadPreset`] for what is no TOML, has unknown keys, or rules that say nothing or several things, and
    /// [`Error::BadPattern`].
    pub fn parse(name: &str, text: &str) -> Result<Self> {
        let bad = |reason: String| Error::BadPreset {
            preset: name.to_owned(),
            reason,
        };
        let file: File =
            toml::from_str(text).map_err(|error| bad(error.to_string().trim_end().to_owned()))?;
        let mut parts = Vec::with_capacity(file.rule.len());
        let mut patterns: Vec<(Pattern, usize)> = Vec::new();
        for (number, rule) in file.rule.iter().enumerate() {
            let part = rule
                .part()
                .map_err(|reason| bad(format!("rule {}: {reason}", number + 1)))?;
            parts.push(part);
            patterns.extend(
                rule.tensors
                    .iter()
                    .map(|text| (text.as_str().into(), number)),
            );
        }
        let set = PatternSet::new(patterns.iter().map(|(pattern, _)| pattern))?;
        Ok(Self {
            name: name.to_owned(),
            parts,
            patterns,
            set,
        })
    }

    /// The names of the presets that this crate comes with.
    pub fn shipped() -> impl ExactSizeIterator<Item = &'static str> {
        SHIPPED.iter().map(|(name, _)| *name)
    }

    /// The name, or the path of the file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The first rule for the tensor of this name: the pattern that matches, and what to load.
    pub(super) fn rule_for(&self, name: &str) -> Option<(&Pattern, &SlicePart)> {
        let &first = self.set.matches(name).first()?;
        let (pattern, rule) = self.patterns.get(first)?;
        Some((pattern, self.parts.get(*rule)?))
    }
}

impl Rule {
    /// What the rule says; the error says what is wrong with it.
    fn part(&self) -> Result<SlicePart, &'static str> {
        if self.tensors.is_empty() {
            return Err("`tensors` names none; it is a list of patterns");
        }
        if self.dim.is_none() && (self.remainder.is_some() || self.multiple_of.is_some()) {
            return Err("`remainder` and `multiple_of` go with `dim` only");
        }
        match (self.dim, self.whole, &self.refuse) {
            (Some(_), None, None) if self.multiple_of == Some(0) => {
                Err("`multiple_of` is 0; it is 1 or more")
            }
            (Some(dim), None, None) => Ok(SlicePart::Rank {
                dim,
                rank: None,
                remainder: match self.remainder {
                    Some(RemainderName::Last) => Remainder::Last,
                    Some(RemainderName::Refuse) | None => Remainder::Refuse,
                },
                multiple_of: self.multiple_of.unwrap_or(1),
            }),
            (None, Some(true), None) => Ok(SlicePart::Whole),
            (None, None, Some(reason)) => Ok(SlicePart::Refused {
                reason: reason.clone(),
            }),
            _ => Err("give one of `dim = D`, `whole = true` and `refuse = \"why\"`"),
        }
    }
}
