//! Which part of each tensor a load is about.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use tensora_formats::{CheckpointIndex, DimPart, Remainder, TensorEntry, TensorPart};

use crate::selection::{Pattern, PatternSet};
use crate::{Error, Result};

mod preset;

pub use preset::Preset;

/// What a slice rule looks like, for messages about ones that look otherwise.
const FORM: &str = "a rule is PATTERN=dim:D,range:A..B or PATTERN=dim:D[,rank:R/W][,remainder:last|refuse][,multiple:N] \
                    or PATTERN=whole";

/// Which part to load of the tensors that a pattern matches.
///
/// As text: `PATTERN=dim:D,range:A..B` for the indexes A to B − 1 of dimension D; `PATTERN=dim:D,rank:R/W` for what
/// rank R (from 0) of W has when they share the dimension; `PATTERN=dim:D` for the same, where rank and world
/// are those of the load; `PATTERN=whole` for all of it, whatever a preset says. A rank's part may say
/// `remainder:last`, so that the last rank takes what is left over instead of that being an error, and `multiple:N`, so
/// that N neighbouring indexes, such as the rows of an attention head, stay together. D counts from 0, the
/// outermost dimension, or from −1, the innermost, down. PATTERN is as [`Pattern`] says, up to the last `=`.
///
/// ```
/// use tensora::{Pattern, SlicePart, SliceRule};
///
/// let rule: SliceRule = "*.o_proj.weight=dim:-1,range:0..512".parse()?;
/// assert_eq!(rule.pattern, Pattern::Glob("*.o_proj.weight".into()));
/// assert_eq!(rule.part, SlicePart::Range { dim: -1, range: 0..512 });
/// # Ok::<(), tensora::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceRule {
    /// The tensors.
    pub pattern: Pattern,
    /// What to load of each.
    pub part: SlicePart,
}

/// What to load of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SlicePart {
    /// All of it.
    Whole,
    /// A range along a dimension.
    Range {
        /// The dimension, from 0, the outermost, up, or from −1, the innermost, down.
        dim: i64,
        /// Its indexes.
        range: Range<u64>,
    },
    /// What one of several ranks has when all share a dimension in order.
    Rank {
        /// The dimension, from 0, the outermost, up, or from −1, the innermost, down.
        dim: i64,
        /// The rank, from 0, and how many there are; `None` for those of the load.
        rank: Option<(u32, u32)>,
        /// What happens where the dimension does not divide evenly.
        remainder: Remainder,
        /// How many neighbouring indexes stay together; 1 where any two may part.
        multiple_of: u64,
    },
    /// Nothing: a tensor that must not be cut by a rule as simple as these, nor go unnoticed.
    Refused {
        /// Why, and what to do.
        reason: String,
    },
}

impl fmt::Display for SliceRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.pattern, self.part)
    }
}

impl fmt::Display for SlicePart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole => f.write_str("whole"),
            Self::Range { dim, range } => {
                write!(f, "dim:{dim},range:{}..{}", range.start, range.end)
            }
            Self::Rank {
                dim,
                rank,
                remainder,
                multiple_of,
            } => {
                write!(f, "dim:{dim}")?;
                if let Some((rank, world)) = rank {
                    write!(f, ",rank:{rank}/{world}")?;
                }
                if *remainder == Remainder::Last {
                    f.write_str(",remainder:last")?;
                }
                if *multiple_of > 1 {
                    write!(f, ",multiple:{multiple_of}")?;
                }
                Ok(())
            }
            Self::Refused { .. } => f.write_str("refused"),
        }
    }
}

impl FromStr for SliceRule {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = |reason: String| Error::BadSliceRule {
            rule: text.to_owned(),
            reason,
        };
        // The pattern may hold a `=`, what follows it never does.
        let Some((pattern, part)) = text.rsplit_once('=') else {
            return Err(bad(format!("there is no =; {FORM}")));
        };
        if pattern.is_empty() {
            return Err(bad(format!("there is no pattern before the =; {FORM}")));
        }
        Ok(Self {
            pattern: pattern.into(),
            part: parse_part(part).map_err(bad)?,
        })
    }
}

/// Parses what follows the `=`; the error says what is wrong.
fn parse_part(text: &str) -> Result<SlicePart, String> {
    if text == "whole" {
        return Ok(SlicePart::Whole);
    }
    let (mut dim, mut range, mut rank, mut remainder, mut multiple_of) =
        (None, None, None, None, None);
    for field in text.split(',') {
        let (key, value) = field
            .split_once(':')
            .ok_or_else(|| format!("{field:?} is not KEY:VALUE; {FORM}"))?;
        let number = |value: &str, what: &str| {
            value
                .parse::<u64>()
                .map_err(|_| format!("{what} {value:?} is not a whole number"))
        };
        let is_new = match key {
            "dim" => {
                let value = value
                    .parse::<i64>()
                    .map_err(|_| format!("the dimension {value:?} is not a whole number"))?;
                dim.replace(value).is_none()
            }
            "range" => {
                let (begin, end) = value
                    .split_once("..")
                    .ok_or_else(|| format!("the range {value:?} is not A..B"))?;
                let begin = number(begin, "the range's begin")?;
                let end = number(end, "the range's end")?;
                if begin > end {
                    return Err(format!("the range {value} ends before it begins"));
                }
                range.replace(begin..end).is_none()
            }
            "rank" => rank.replace(parse_rank(value)?).is_none(),
            "remainder" => {
                let value = match value {
                    "last" => Remainder::Last,
                    "refuse" => Remainder::Refuse,
                    _ => {
                        return Err(format!(
                            "the remainder {value:?} is neither last nor refuse"
                        ));
                    }
                };
                remainder.replace(value).is_none()
            }
            "multiple" => {
                let value = number(value, "the multiple")?;
                if value == 0 {
                    return Err("the multiple is 0; it is 1 or more".to_owned());
                }
                multiple_of.replace(value).is_none()
            }
            _ => return Err(format!("there is no key {key:?}; {FORM}")),
        };
        if !is_new {
            return Err(format!("{key} stands there twice"));
        }
    }
    let dim = dim.ok_or_else(|| format!("there is no dim:D; {FORM}"))?;
    match range {
        Some(range) if rank.is_none() && remainder.is_none() && multiple_of.is_none() => {
            Ok(SlicePart::Range { dim, range })
        }
        Some(_) => Err(format!(
            "a range goes with no rank, remainder or multiple; {FORM}"
        )),
        None => Ok(SlicePart::Rank {
            dim,
            rank,
            remainder: remainder.unwrap_or_default(),
            multiple_of: multiple_of.unwrap_or(1),
        }),
    }
}

fn parse_rank(text: &str) -> Result<(u32, u32), String> {
    let numbers = text
        .split_once('/')
        .and_then(|(rank, world)| Some((rank.parse().ok()?, world.parse().ok()?)));
    match numbers {
        Some((rank, world)) if rank < world => Ok((rank, world)),
        Some((rank, world)) => Err(format!(
            "there is no rank {rank} of {world}; ranks count from 0"
        )),
        None => Err(format!("the rank {text:?} is not R/W, such as 0/4")),
    }
}

/// Which part to load of each tensor: rules of the caller's own, and those of a preset for what they leave out.
///
/// A tensor that no rule matches is loaded whole. Of the rules of one's own, each has to match a selected tensor, and
/// none may match the same one as another. Among those of a preset the first that matches counts, and one that
/// matches nothing is no error.
#[derive(Clone, Debug, Default)]
pub struct SliceRules {
    own: Vec<SliceRule>,
    preset: Option<Preset>,
}

/// A rule that a tensor is sliced by, and where it comes from.
struct Applied<'r> {
    rule: String,
    part: &'r SlicePart,
    preset: Option<&'r Preset>,
}

impl SliceRules {
    /// Adds a rule of one's own.
    pub fn push(&mut self, rule: SliceRule) {
        self.own.push(rule);
    }

    /// Takes the rules of this preset, instead of any other's, for tensors that no rule of one's own matches.
    pub fn set_preset(&mut self, preset: Preset) {
        self.preset = Some(preset);
    }

    /// Whether there are no rules, so that every tensor is loaded whole.
    pub fn is_empty(&self) -> bool {
        self.own.is_empty() && self.preset.is_none()
    }

    /// What to load of each of the tensors at the positions `selected` in the index, in that order. `rank` is the
    /// rank, from 0, and the number of ranks, for rules that do not name their own.
    ///
    /// # Errors
    ///
    /// [`Error::BadPattern`], [`Error::UnusedSliceRule`], [`Error::SliceConflict`], [`Error::SliceNeedsRank`],
    /// [`Error::SliceRefused`], [`Error::SliceDimension`], and [`Error::SliceDoesNotFit`].
    pub fn resolve(
        &self,
        index: &CheckpointIndex,
        selected: &[usize],
        rank: Option<(u32, u32)>,
    ) -> Result<Vec<TensorPart>> {
        let patterns = PatternSet::new(self.own.iter().map(|rule| &rule.pattern))?;
        let mut used = vec![false; self.own.len()];
        let mut parts = Vec::with_capacity(selected.len());
        for &number in selected {
            let entry = &index.tensors()[number];
            let matches = patterns.matches(&entry.name);
            for &rule in &matches {
                used[rule] = true;
            }
            let applied = match matches[..] {
                [] => self.of_preset(&entry.name),
                [rule] => {
                    let rule = &self.own[rule];
                    Some(Applied {
                        rule: rule.to_string(),
                        part: &rule.part,
                        preset: None,
                    })
                }
                [first, second, ..] => {
                    return Err(Error::SliceConflict {
                        tensor: entry.name.clone(),
                        first: self.own[first].to_string(),
                        second: self.own[second].to_string(),
                    });
                }
            };
            parts.push(match applied {
                Some(applied) => applied.part_of(entry, rank)?,
                None => TensorPart::whole(entry)?,
            });
        }
        if let Some(unused) = used.iter().position(|used| !used) {
            return Err(Error::UnusedSliceRule {
                rule: self.own[unused].to_string(),
                selected_count: selected.len(),
                root: index.root().to_owned(),
            });
        }
        Ok(parts)
    }

    fn of_preset(&self, name: &str) -> Option<Applied<'_>> {
        let preset = self.preset.as_ref()?;
        let (pattern, part) = preset.rule_for(name)?;
        Some(Applied {
            rule: format!("{pattern}={part}"),
            part,
            preset: Some(preset),
        })
    }
}

impl Applied<'_> {
    fn part_of(&self, entry: &TensorEntry, of_load: Option<(u32, u32)>) -> Result<TensorPart> {
        let tensor = || entry.name.clone();
        let preset = || self.preset.map(|preset| preset.name().to_owned());
        let (dim, part) = match self.part {
            SlicePart::Whole => return Ok(TensorPart::whole(entry)?),
            SlicePart::Refused { reason } => {
                return Err(Error::SliceRefused {
                    tensor: tensor(),
                    rule: self.rule.clone(),
                    preset: preset(),
                    reason: reason.clone(),
                });
            }
            SlicePart::Range { dim, range } => (*dim, DimPart::Range(range.clone())),
            SlicePart::Rank {
                dim,
                rank,
                remainder,
                multiple_of,
            } => {
                let Some((rank, world)) = rank.or(of_load) else {
                    return Err(Error::SliceNeedsRank {
                        tensor: tensor(),
                        rule: self.rule.clone(),
                        preset: preset(),
                    });
                };
                let part = DimPart::Rank {
                    rank,
                    world,
                    remainder: *remainder,
                    multiple_of: *multiple_of,
                };
                (*dim, part)
            }
        };
        let Some((dimension, length)) = dimension(dim, &entry.shape) else {
            return Err(Error::SliceDimension {
                tensor: tensor(),
                shape: entry.shape.clone(),
                rule: self.rule.clone(),
                preset: preset(),
            });
        };
        part.range(length)
            .and_then(|range| TensorPart::slice(entry, &[(dimension, range)]))
            .map_err(|source| Error::SliceDoesNotFit {
                tensor: tensor(),
                shape: entry.shape.clone(),
                rule: self.rule.clone(),
                preset: preset(),
                source: Box::new(source),
            })
    }
}

/// The dimension that `dim` means, counted from 0, and its length.
fn dimension(dim: i64, shape: &[u64]) -> Option<(usize, u64)> {
    let distance = usize::try_from(dim.unsigned_abs()).ok()?;
    let dimension = if dim < 0 {
        shape.len().checked_sub(distance)?
    } else {
        distance
    };
    Some((dimension, *shape.get(dimension)?))
}
