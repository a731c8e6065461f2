use std::ops::Range;

use crate::{Region, Result};

/// Sorts ranges and merges those that overlap, touch, or are at most `gap_bytes` apart. Empty ranges
/// are dropped.
///
/// The result is sorted, disjoint, and covers every byte of the input; with a gap of 0 it covers no
/// other byte.
///
/// ```
/// let merged = tensora_io::merge_ranges([10..20, 0..4, 20..25, 27..30], 2);
/// assert_eq!(merged, [0..4, 10..30]);
/// ```
pub fn merge_ranges(
    ranges: impl IntoIterator<Item = Range<u64>>,
    gap_bytes: u64,
) -> Vec<Range<u64>> {
    let mut ranges: Vec<_> = ranges
        .into_iter()
        .filter(|range| range.start < range.end)
        .collect();
    ranges.sort_by_key(|range| (range.start, range.end));
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end.saturating_add(gap_bytes) => {
                last.end = last.end.max(range.end);
            }
            _ => merged.push(range),
        }
    }
    merged
}

/// Where the extents of one file go in one piece of memory, such that direct reads need no copy.
///
/// Each extent begins at an address congruent to its file offset modulo
/// [`ALIGN_BYTES`](Self::ALIGN_BYTES), so all of it but its ragged ends can be read in place. Long ones are
/// congruent modulo a huge page (2 MiB): then reads that are cut at multiples of it in the file fault each huge
/// page in once, not from two threads at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    extents: Vec<Range<u64>>,
    positions: Vec<u64>,
    bytes: u64,
}

impl Placement {
    /// A page: no less than the direct-I/O alignment of any common device.
    pub const ALIGN_BYTES: u64 = 4096;
    /// Length from which an extent is aligned to huge pages, in bytes: the padding is 3 % of it at most, and is
    /// never touched but for the rest of one huge page.
    const LONG_BYTES: u64 = 64 << 20;

    /// Places `extents`: ranges of one file, sorted and disjoint, as [`merge_ranges`] gives them.
    ///
    /// # Panics
    ///
    /// When they are not sorted and disjoint, or add up to more than a `u64`.
    pub fn new(extents: Vec<Range<u64>>) -> Self {
        let mut positions = Vec::with_capacity(extents.len());
        let mut end = 0_u64;
        let mut last = 0;
        for extent in &extents {
            assert!(
                last <= extent.start && extent.start <= extent.end,
                "extents are sorted and disjoint"
            );
            last = extent.end;
            let align = if extent.end - extent.start >= Self::LONG_BYTES {
                crate::memory::HUGE_PAGE_BYTES as u64
            } else {
                Self::ALIGN_BYTES
            };
            let ragged = extent.start % align;
            let position = end
                .checked_next_multiple_of(align)
                .and_then(|page| page.checked_add(ragged))
                .expect("extents fit a 64-bit address space");
            positions.push(position);
            end = position
                .checked_add(extent.end - extent.start)
                .expect("extents fit a 64-bit address space");
        }
        Self {
            extents,
            positions,
            bytes: end,
        }
    }

    /// How much memory the extents take together, with the padding between them, in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Allocates the memory.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`](crate::Error::Memory), also when this machine cannot address that much.
    pub fn allocate(&self) -> Result<Region> {
        Region::allocate(usize::try_from(self.bytes).unwrap_or(usize::MAX))
    }

    /// Where in the memory a range of the file stands, or `None` when it is not inside one extent.
    pub fn locate(&self, range: &Range<u64>) -> Option<Range<usize>> {
        let index = self
            .extents
            .partition_point(|extent| extent.start <= range.start)
            .checked_sub(1)?;
        let extent = &self.extents[index];
        if range.start > range.end || range.end > extent.end {
            return None;
        }
        let begin = self.positions[index] + (range.start - extent.start);
        let begin = usize::try_from(begin).ok()?;
        let len = usize::try_from(range.end - range.start).ok()?;
        Some(begin..begin + len)
    }

    /// Each extent's file offset with its part of `memory`, ready to be read into.
    ///
    /// # Panics
    ///
    /// When `memory` is shorter than [`bytes`](Self::bytes).
    pub fn split<'m>(&self, mut memory: &'m mut [u8]) -> Vec<(u64, &'m mut [u8])> {
        let mut parts = Vec::with_capacity(self.extents.len());
        let mut position = 0_u64;
        for (extent, &begin) in self.extents.iter().zip(&self.positions) {
            let len = extent.end - extent.start;
            let fits = "the memory is as long as the placement";
            let skip = usize::try_from(begin - position).expect(fits);
            let len_here = usize::try_from(len).expect(fits);
            let (part, rest) = memory[skip..].split_at_mut(len_here);
            parts.push((extent.start, part));
            memory = rest;
            position = begin + len;
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ranges() -> impl Strategy<Value = Vec<Range<u64>>> {
        prop::collection::vec((0_u64..60_000, 0_u64..9_000), 0..40).prop_map(|list| {
            list.into_iter()
                .map(|(start, len)| start..start + len)
                .collect()
        })
    }

    fn covered(ranges: &[Range<u64>]) -> Vec<bool> {
        let mut bytes = vec![false; 70_000];
        for range in ranges {
            for byte in range.clone() {
                bytes[usize::try_from(byte).unwrap()] = true;
            }
        }
        bytes
    }

    #[test]
    fn long_extents_are_congruent_to_huge_pages() {
        let extents = vec![
            5000..9000,
            (1 << 20) + 17..(300 << 20) + 1,
            (301 << 20) + 5..(301 << 20) + 900,
            (310 << 20) + 4095..(400 << 20),
        ];
        let placement = Placement::new(extents.clone());
        let huge = 2 << 20;
        for extent in [&extents[1], &extents[3]] {
            let place = placement.locate(extent).unwrap();
            assert_eq!(place.start as u64 % huge, extent.start % huge);
        }
        let data: u64 = extents.iter().map(|extent| extent.end - extent.start).sum();
        assert!(placement.bytes() <= data + 5 * huge);
    }

    proptest! {
        /// Against a map of single bytes: nothing lost, nothing added but gaps of the size allowed.
        #[test]
        fn merging_covers_what_it_must(ranges in ranges(), gap in 0_u64..5_000) {
            let merged = merge_ranges(ranges.clone(), gap);
            let (wanted, got) = (covered(&ranges), covered(&merged));
            prop_assert!(wanted.iter().zip(&got).all(|(wanted, got)| !wanted || *got));
            prop_assert!(merged.iter().all(|range| range.start < range.end));
            prop_assert!(merged.windows(2).all(|pair| pair[0].end + gap < pair[1].start));
            let mut run = 0;
            for (wanted, got) in wanted.iter().zip(&got) {
                run = if *got && !wanted { run + 1 } else { 0 };
                prop_assert!(run <= gap);
            }
        }

        /// Every byte of every extent has one place, congruent to its offset, shared with no other.
        #[test]
        fn placing_keeps_extents_apart_and_congruent(ranges in ranges()) {
            let extents = merge_ranges(ranges, 0);
            let placement = Placement::new(extents.clone());
            let data: u64 = extents.iter().map(|extent| extent.end - extent.start).sum();
            prop_assert!(placement.bytes() <= data + extents.len() as u64 * 2 * Placement::ALIGN_BYTES);
            let mut memory = vec![0_u8; usize::try_from(placement.bytes()).unwrap()];
            for (number, (offset, part)) in placement.split(&mut memory).into_iter().enumerate() {
                prop_assert_eq!(offset, extents[number].start);
                prop_assert_eq!(part.len() as u64, extents[number].end - extents[number].start);
                part.fill(u8::try_from(number + 1).unwrap());
            }
            for (number, extent) in extents.iter().enumerate() {
                let place = placement.locate(extent).unwrap();
                prop_assert_eq!(place.start as u64 % Placement::ALIGN_BYTES, extent.start % Placement::ALIGN_BYTES);
                prop_assert!(memory[place].iter().all(|&byte| usize::from(byte) == number + 1));
                prop_assert_eq!(placement.locate(&(extent.start..extent.end + 1)), None);
            }
        }
    }
}
