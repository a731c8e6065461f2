//! A checkpoint against what is known of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use tensora_formats::{CheckpointIndex, Dtype, Note};
use tensora_io::Control;

use super::digests::TensorHashers;
use super::{ContentDigests, VerifyOptions, blob, check_unchanged, files};
use crate::{Digest, Result, SIDECAR_NAME, sidecar};

/// What a checkpoint holds, and whether that is what it should hold.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Verification {
    /// What it holds; damaged tensors are not among it.
    pub digests: ContentDigests,
    /// What was checked and how that went: files in the order of the index, then tensors by name. Empty if
    /// nothing is known of the checkpoint but itself.
    pub checks: Vec<Check>,
    /// The [`Note::Damaged`] of the index: files that end before tensors in them do.
    pub damaged: Vec<Note>,
}

impl Verification {
    /// Whether nothing is damaged and every check went well.
    pub fn is_sound(&self) -> bool {
        self.damaged.is_empty() && self.checks.iter().all(|check| check.outcome.is_match())
    }
}

/// Something that was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Check {
    /// What.
    pub subject: CheckSubject,
    /// Against what.
    pub by: CheckedBy,
    /// How it went.
    pub outcome: CheckOutcome,
}

/// What is checked.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum CheckSubject {
    /// A tensor, by its name.
    Tensor(String),
    /// A whole file, by its name relative to the checkpoint's root.
    File(String),
}

/// What something is checked against.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CheckedBy {
    /// [`SIDECAR_NAME`], beside the checkpoint.
    Sidecar,
    /// The name of a blob in a Hugging Face cache.
    BlobName,
}

/// How a check went.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CheckOutcome {
    /// It is what it should be.
    Matches,
    /// Its data is something else.
    Differs {
        /// The digest that it should have: BLAKE3 for a tensor, SHA-256 for a file.
        expected: Digest,
        /// The digest that it has.
        actual: Digest,
    },
    /// Its element type is another one.
    DtypeDiffers {
        /// The element type that it should have.
        expected: Dtype,
        /// The element type that it has.
        actual: Dtype,
    },
    /// Its shape is another one.
    ShapeDiffers {
        /// The dimensions that it should have, outermost first.
        expected: Vec<u64>,
        /// The dimensions that it has, outermost first.
        actual: Vec<u64>,
    },
    /// It should be there, and is not.
    Missing,
    /// It is there, and nothing is said of it.
    NotListed,
}

impl CheckOutcome {
    /// Whether all is well.
    pub fn is_match(&self) -> bool {
        matches!(self, Self::Matches)
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            subject,
            by,
            outcome,
        } = self;
        write!(f, "{subject}: ")?;
        match outcome {
            CheckOutcome::Matches => write!(f, "matches {by}"),
            CheckOutcome::Differs { expected, actual } => {
                let hash = match subject {
                    CheckSubject::Tensor(_) => "BLAKE3",
                    CheckSubject::File(_) => "SHA-256",
                };
                write!(f, "{hash} is {actual}, but {expected} by {by}")
            }
            CheckOutcome::DtypeDiffers { expected, actual } => {
                write!(f, "dtype is {actual}, but {expected} by {by}")
            }
            CheckOutcome::ShapeDiffers { expected, actual } => {
                write!(f, "shape is {actual:?}, but {expected:?} by {by}")
            }
            CheckOutcome::Missing => write!(f, "missing, but listed by {by}"),
            CheckOutcome::NotListed => write!(f, "not listed by {by}"),
        }
    }
}

impl fmt::Display for CheckSubject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Both come from files that others have written, and may hold control characters.
        match self {
            Self::Tensor(name) => write!(f, "{name:?}"),
            Self::File(name) => write!(f, "{}", name.escape_debug()),
        }
    }
}

impl fmt::Display for CheckedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sidecar => SIDECAR_NAME,
            Self::BlobName => "the name of its blob",
        })
    }
}

pub(super) fn check(
    options: &VerifyOptions,
    index: &CheckpointIndex,
    control: &Control,
) -> Result<Verification> {
    // First, because it may be damaged, and reading the data takes long.
    let listed = sidecar::read(index.root())?;
    let blobs: BTreeMap<usize, Digest> = index
        .files()
        .iter()
        .enumerate()
        .filter_map(|(file, entry)| Some((file, blob::named_sha256(&entry.path)?)))
        .collect();

    let mut hashers = TensorHashers::new(index)?;
    let whole: Vec<usize> = blobs.keys().copied().collect();
    let actual = files::hash(options, index, &whole, &mut hashers, control)?;
    let others: Vec<usize> = index
        .tensors()
        .iter()
        .enumerate()
        .filter(|(_, tensor)| !(tensor.is_contiguous() && blobs.contains_key(&tensor.file)))
        .map(|(number, _)| number)
        .collect();
    hashers.read(options, &others, control)?;
    check_unchanged(index)?;
    let digests = hashers.finish()?;

    let mut checks: Vec<Check> = blobs
        .into_iter()
        .zip(actual.into_values())
        .map(|((file, expected), actual)| Check {
            subject: CheckSubject::File(index.files()[file].name.clone()),
            by: CheckedBy::BlobName,
            outcome: outcome(expected, actual),
        })
        .collect();
    if let Some(listed) = listed {
        let exempt = exempt_names(index, &listed);
        checks.extend(tensor_checks(&listed, &digests, &exempt));
    }
    let notes = index.notes().iter();
    let damaged = notes.filter(|note| matches!(note, Note::Damaged { .. }));
    Ok(Verification {
        digests,
        checks,
        damaged: damaged.cloned().collect(),
    })
}

/// The tensors that a sidecar lists and the index rightly lacks.
fn exempt_names(index: &CheckpointIndex, listed: &ContentDigests) -> BTreeSet<String> {
    let mut exempt = BTreeSet::new();
    for note in index.notes() {
        if let Note::Damaged { tensors, .. } = note {
            exempt.extend(tensors.iter().map(|tensor| tensor.name.clone()));
        }
    }
    let mut missing = listed.tensors().keys();
    if missing.any(|name| index.tensor(name).is_none() && !exempt.contains(name))
        // The sidecar is that of the directory. If it was a single shard that was opened, the others hold the
        // rest.
        && let Ok(all) = CheckpointIndex::open(index.root())
    {
        exempt.extend(all.tensors().iter().map(|tensor| tensor.name.clone()));
    }
    exempt
}

/// Holds tensors against those that are listed; those in `exempt` may be missing.
fn tensor_checks(
    listed: &ContentDigests,
    found: &ContentDigests,
    exempt: &BTreeSet<String>,
) -> Vec<Check> {
    let (listed, found) = (listed.tensors(), found.tensors());
    let names: BTreeSet<&String> = listed.keys().chain(found.keys()).collect();
    let outcomes = names.into_iter().filter_map(|name| {
        let outcome = match (listed.get(name), found.get(name)) {
            (Some(expected), Some(actual)) if expected.dtype != actual.dtype => {
                CheckOutcome::DtypeDiffers {
                    expected: expected.dtype,
                    actual: actual.dtype,
                }
            }
            (Some(expected), Some(actual)) if expected.shape != actual.shape => {
                CheckOutcome::ShapeDiffers {
                    expected: expected.shape.clone(),
                    actual: actual.shape.clone(),
                }
            }
            (Some(expected), Some(actual)) => outcome(expected.digest, actual.digest),
            (Some(_), None) if exempt.contains(name) => return None,
            (Some(_), None) => CheckOutcome::Missing,
            (None, _) => CheckOutcome::NotListed,
        };
        Some(Check {
            subject: CheckSubject::Tensor(name.clone()),
            by: CheckedBy::Sidecar,
            outcome,
        })
    });
    outcomes.collect()
}

fn outcome(expected: Digest, actual: Digest) -> CheckOutcome {
    match expected == actual {
        true => CheckOutcome::Matches,
        false => CheckOutcome::Differs { expected, actual },
    }
}
