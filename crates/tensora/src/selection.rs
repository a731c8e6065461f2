//! Which tensors a load is about.

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};
use tensora_formats::CheckpointIndex;

use crate::{Error, Result};

/// Names and patterns; everything, when there are none of either.
#[derive(Clone, Debug, Default)]
pub(crate) struct Selection {
    pub(crate) names: Vec<String>,
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
        let globs = self.globs()?;
        let mut used = vec![false; self.patterns.len()];
        for (number, tensor) in tensors.iter().enumerate() {
            for pattern in globs.matches(&tensor.name) {
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

    fn globs(&self) -> Result<GlobSet> {
        let bad = |pattern: &str, error: globset::Error| Error::BadPattern {
            pattern: pattern.to_owned(),
            reason: error.kind().to_string(),
        };
        let mut globs = GlobSetBuilder::new();
        for pattern in &self.patterns {
            // Tensor names are no paths: `*` matches a slash like any other character.
            let glob = GlobBuilder::new(pattern)
                .literal_separator(false)
                .backslash_escape(true)
                .build()
                .map_err(|error| bad(pattern, error))?;
            globs.add(glob);
        }
        globs
            .build()
            .map_err(|error| bad(&self.patterns.join(" "), error))
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
