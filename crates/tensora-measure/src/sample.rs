//! The part of the files that a calibration reads again and again.

use std::ops::Range;
use std::time::{Duration, Instant};

use tensora_io::{
    BackendKind, CacheState, Control, Mapping, MappingPermit, Placement, PopulateParams,
    ReadRequest, SourceFile, TransferParams,
};

use crate::pages;
use crate::{Error, Result};

/// A shorter piece of a file would be read before a device is busy.
const MIN_EXTENT_BYTES: u64 = 64 << 20;
/// Extents end at multiples of this, except where a file ends.
const ALIGN_BYTES: u64 = 2 << 20;
/// Of the bytes that shall be resident, all but one part in so many must be.
const TOLERATED: u64 = 1000;

/// One extent of each of some files, from the file's first byte on.
pub(crate) struct Sample<'a> {
    extents: Vec<(&'a SourceFile, Range<u64>)>,
    pub(crate) bytes: u64,
}

impl<'a> Sample<'a> {
    /// About `bytes` (at least 1) of the files, the largest first: from several where each gives a long piece.
    pub(crate) fn choose(files: &'a [SourceFile], bytes: u64) -> Self {
        let mut largest: Vec<_> = files.iter().filter(|file| !file.is_empty()).collect();
        largest.sort_by_key(|file| std::cmp::Reverse(file.len()));
        let share = (bytes / largest.len().max(1) as u64)
            .max(MIN_EXTENT_BYTES)
            .next_multiple_of(ALIGN_BYTES);
        let mut extents: Vec<(&SourceFile, Range<u64>)> = Vec::new();
        let mut left = bytes;
        // What short files do not give, long ones give in a second pass.
        for limit in [share, u64::MAX] {
            for (place, &file) in largest.iter().enumerate() {
                if left == 0 {
                    break;
                }
                let taken = extents.get(place).map_or(0, |(_, extent)| extent.end);
                let end = file.len().min(limit).min(taken.saturating_add(left));
                let end = if end == file.len() {
                    end
                } else {
                    (end / ALIGN_BYTES * ALIGN_BYTES)
                        .max(taken)
                        .max(ALIGN_BYTES.min(file.len()))
                };
                left = left.saturating_sub(end - taken);
                match extents.get_mut(place) {
                    Some((_, extent)) => extent.end = end,
                    None => extents.push((file, 0..end)),
                }
            }
        }
        let bytes = extents.iter().map(|(_, extent)| extent.end).sum();
        Self { extents, bytes }
    }

    /// Puts the sample into the state, and nothing else of the files if that can be avoided: eviction is
    /// of whole files. The half state is of each extent.
    pub(crate) fn prepare(&self, state: CacheState) -> Result<()> {
        let (mut wanted_bytes, mut missing_bytes) = (0, 0);
        for (file, extent) in &self.extents {
            let cut = match state {
                CacheState::Cold => 0,
                CacheState::Half => extent.end / 2 / ALIGN_BYTES * ALIGN_BYTES,
                CacheState::Warm => extent.end,
            };
            pages::evict(file, &(cut..extent.end))?;
            pages::read(file, &(0..cut))?;
            wanted_bytes += cut;
            missing_bytes += cut - pages::resident(file, 0..cut)?;
        }
        if missing_bytes > wanted_bytes / TOLERATED {
            #[allow(clippy::cast_precision_loss)]
            return Err(Error::StateNotMade {
                state,
                resident_percent: (wanted_bytes - missing_bytes) as f64 * 100.0
                    / self.bytes.max(1) as f64,
                remedy: "is there enough memory, and does nobody else use these files?",
            });
        }
        Ok(())
    }

    /// How long it takes to read the sample into new memory, allocating it included, as a load does it.
    pub(crate) fn time_owned(
        &self,
        backend: BackendKind,
        params: &TransferParams,
        control: &Control,
    ) -> Result<Duration> {
        let backend = tensora_io::backend(backend)?;
        let begun = Instant::now();
        let placements: Vec<_> = self
            .extents
            .iter()
            .map(|(_, extent)| Placement::new(vec![extent.clone()]))
            .collect();
        let mut regions = placements
            .iter()
            .map(Placement::allocate)
            .collect::<tensora_io::Result<Vec<_>>>()?;
        let mut requests = Vec::new();
        for ((placement, region), (file, _)) in
            placements.iter().zip(&mut regions).zip(&self.extents)
        {
            let parts = placement.split(region.as_mut_slice());
            requests.extend(parts.into_iter().map(|(offset, part)| ReadRequest {
                file,
                offset,
                destination: part.into(),
            }));
        }
        backend.read(requests, params, control)?;
        let elapsed = begun.elapsed();
        std::hint::black_box(&regions);
        Ok(elapsed)
    }

    /// How long it takes to map the files and to bring the sample into memory and page tables, when the page cache has
    /// been prepared to be in the state that `cache` says.
    pub(crate) fn time_mapped(
        &self,
        cache: CacheState,
        permit: MappingPermit,
        params: &TransferParams,
        control: &Control,
    ) -> Result<Duration> {
        let begun = Instant::now();
        let populate = PopulateParams {
            chunk_bytes: params.chunk_bytes,
            workers: params.workers,
            known_resident: cache == CacheState::Warm,
        };
        let mut mappings = Vec::new();
        for (file, extent) in &self.extents {
            let mapping = Mapping::new(file, permit)?;
            let ranges = std::slice::from_ref(extent);
            mapping.populate(file, ranges, &populate, control)?;
            mappings.push(mapping);
        }
        Ok(begun.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn files(lengths: &[u64]) -> (tempfile::TempDir, Vec<SourceFile>) {
        let directory = tempfile::tempdir().unwrap();
        let files = lengths.iter().enumerate().map(|(number, &length)| {
            let path = directory.path().join(number.to_string());
            std::fs::File::create(&path)
                .unwrap()
                .set_len(length)
                .unwrap();
            SourceFile::open(path).unwrap()
        });
        let files = files.collect();
        (directory, files)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// As much as was asked for, or all there is, to a unit of alignment per file; each file once.
        #[test]
        fn a_sample_is_as_large_as_was_asked_for(
            lengths in prop::collection::vec(0_u64..400 << 20, 1..6),
            bytes in 1_u64..2 << 30,
        ) {
            let (_directory, files) = files(&lengths);
            let sample = Sample::choose(&files, bytes);
            let wanted = bytes.min(lengths.iter().sum());
            let slack = (lengths.len() as u64 + 1) * ALIGN_BYTES;
            prop_assert!(sample.bytes + slack >= wanted && sample.bytes <= wanted + slack, "{} {wanted}", sample.bytes);
            let mut seen = std::collections::BTreeSet::new();
            for (file, extent) in &sample.extents {
                prop_assert!(seen.insert(file.path()));
                prop_assert!(extent.start == 0 && extent.end <= file.len() && extent.end > 0);
            }
            prop_assert_eq!(sample.extents.iter().map(|(_, extent)| extent.end).sum::<u64>(), sample.bytes);
        }
    }

    #[test]
    fn long_files_share_a_sample() {
        let (_directory, files) = files(&[1 << 30, 3 << 30, 2 << 30]);
        let lengths = |bytes| {
            let sample = Sample::choose(&files, bytes);
            let lengths = sample.extents.iter().map(|(_, extent)| extent.end >> 20);
            lengths.collect::<Vec<_>>()
        };
        assert_eq!(lengths(64 << 20), [64]);
        assert_eq!(lengths(150 << 20), [64, 64, 22]);
        assert_eq!(lengths(768 << 20), [256, 256, 256]);
    }
}
