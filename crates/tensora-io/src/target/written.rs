//! Which bytes of a file have been written.

use std::collections::BTreeMap;
use std::ops::Range;

/// Ranges, merged where they touch: as many as there are gaps, however many writes there were.
#[derive(Debug, Default)]
pub(super) struct Written {
    /// From begin to end; they neither overlap nor touch.
    ranges: BTreeMap<u64, u64>,
}

/// What is missing of a file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Missing {
    pub(super) first: u64,
    pub(super) bytes: u64,
}

impl Written {
    pub(super) fn insert(&mut self, range: Range<u64>) {
        let Range { mut start, mut end } = range;
        if start >= end {
            return;
        }
        // From the back: each that begins before the new end, until one ends before the new begin.
        while let Some((&other_start, &other_end)) = self.ranges.range(..=end).next_back() {
            if other_end < start {
                break;
            }
            start = start.min(other_start);
            end = end.max(other_end);
            self.ranges.remove(&other_start);
        }
        self.ranges.insert(start, end);
    }

    /// What is missing of the first `len` bytes; `None` when nothing is.
    pub(super) fn missing(&self, len: u64) -> Option<Missing> {
        let present: u64 = self.ranges.iter().map(|(start, end)| end - start).sum();
        (present < len).then(|| Missing {
            // Ranges do not touch, so behind the first one there is a gap.
            first: self.ranges.get(&0).copied().unwrap_or(0),
            bytes: len - present,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn agrees_with_a_row_of_flags(
            len in 0..40_usize,
            ranges in prop::collection::vec((0..40_usize, 0..12_usize), 0..30),
        ) {
            let mut written = Written::default();
            let mut flags = vec![false; len];
            for (start, count) in ranges {
                let start = start.min(len);
                let end = (start + count).min(len);
                written.insert(start as u64..end as u64);
                flags[start..end].fill(true);
                let missing = flags.iter().position(|flag| !flag).map(|first| Missing {
                    first: first as u64,
                    bytes: flags.iter().filter(|flag| !**flag).count() as u64,
                });
                prop_assert_eq!(written.missing(len as u64), missing);
                let runs = flags.chunk_by(|a, b| a == b).filter(|run| run[0]).count();
                prop_assert_eq!(written.ranges.len(), runs);
            }
        }
    }
}
