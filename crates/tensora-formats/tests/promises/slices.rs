//! A part of a tensor is the bytes that its shape and ranges say, for every dtype, stride and slice.

use std::ops::Range;

use proptest::prelude::*;
use tensora_formats::{DimPart, Dtype, Error, Remainder, TensorEntry, TensorPart};

use crate::fixture::{assert_refused, entry};

/// A tensor stored without gaps.
fn packed(dtype: Dtype, shape: &[u64]) -> TensorEntry {
    let mut entry = entry();
    entry.dtype = dtype;
    entry.shape = shape.to_vec();
    entry.offset = 1000;
    entry.bytes = dtype.bytes_for(entry.element_count()).unwrap();
    entry
}

fn strided(dtype: Dtype, shape: &[u64], strides: &[u64], bytes: u64) -> TensorEntry {
    let mut entry = packed(dtype, &[]);
    entry.shape = shape.to_vec();
    entry.strides = Some(strides.to_vec());
    entry.bytes = bytes;
    entry
}

fn rank(rank: u32, world: u32, remainder: Remainder, multiple_of: u64) -> DimPart {
    DimPart::Rank {
        rank,
        world,
        remainder,
        multiple_of,
    }
}

#[test]
fn ranges_outside_the_tensor() {
    let matrix = packed(Dtype::BF16, &[4, 6]);
    assert_refused!(
        TensorPart::slice(&matrix, &[(2, 0..1)]),
        Error::NoSuchDimension { dimension: 2, .. },
        "[4, 6] has no dimension 2; its 2 dimensions count from 0",
    );
    // Past the end, reversed, and both; of a dimension that ends before the other does.
    for (begin, end) in [(0, 5), (3, 2), (5, 5), (u64::MAX, 0)] {
        assert_refused!(
            TensorPart::slice(&matrix, &[(1, 0..6), (0, begin..end)]),
            Error::SliceOutside { dimension: 0, .. },
            format!("no range {begin}..{end} along dimension 0"),
            "within 0..4",
        );
    }
    assert_refused!(
        TensorPart::slice(&matrix, &[(1, 0..3), (0, 0..1), (1, 0..3)]),
        Error::SlicedTwice { dimension: 1, .. },
        "along dimension 1 twice",
    );
    let empty = TensorPart::slice(&matrix, &[(0, 4..4)]).unwrap();
    assert_eq!(
        (empty.shape(), empty.bytes(), empty.hull()),
        (&[0, 6][..], 0, 1000..1000)
    );
}

#[test]
fn parts_that_cut_a_byte() {
    for (dtype, shape, dimension, range, elements) in [
        (Dtype::F4, [4, 3], 0, 1..2, "2 elements fill 1 byte"),
        (Dtype::F4, [4, 3], 1, 0..2, "2 elements fill 1 byte"),
        (Dtype::F4, [4, 4], 1, 1..3, "2 elements fill 1 byte"),
        (Dtype::F6E2M3, [4, 4], 1, 0..2, "4 elements fill 3 bytes"),
        (Dtype::F6E3M2, [2, 8], 1, 2..6, "4 elements fill 3 bytes"),
    ] {
        assert_refused!(
            TensorPart::slice(&packed(dtype, &shape), &[(dimension, range.clone())]),
            Error::SliceCutsByte { .. },
            elements,
            dtype,
        );
    }
    // Where the cut falls between bytes, packed elements are like any others.
    for (dtype, shape, dimension, range, runs) in [
        (Dtype::F4, [4, 3], 0, 2..4, &[(1003, 1006)][..]),
        (
            Dtype::F4,
            [2, 4],
            1,
            2..4,
            &[(1001, 1002), (1003, 1004)][..],
        ),
        (
            Dtype::F6E2M3,
            [2, 8],
            1,
            4..8,
            &[(1003, 1006), (1009, 1012)][..],
        ),
        (Dtype::F6E3M2, [4, 2], 0, 2..4, &[(1003, 1006)][..]),
    ] {
        let part = TensorPart::slice(&packed(dtype, &shape), &[(dimension, range)]).unwrap();
        let found = part.runs(0..u64::MAX).map(|run| (run.start, run.end));
        assert_eq!(found.collect::<Vec<_>>(), runs);
    }
}

#[test]
fn entries_whose_numbers_do_not_fit_together() {
    let huge = 1 << 63;
    let mut past_the_end = packed(Dtype::U8, &[8]);
    past_the_end.bytes = 7;
    let mut past_the_file = packed(Dtype::U8, &[8]);
    past_the_file.offset = u64::MAX - 7;
    let mut overflowing = packed(Dtype::F64, &[1]);
    overflowing.shape = vec![huge, huge, huge];
    for entry in [
        past_the_end,
        past_the_file,
        overflowing,
        // Few stored bytes describe more elements than can be counted.
        strided(Dtype::F64, &[huge, 2], &[0, 1], 16),
        strided(Dtype::F64, &[huge, huge, huge], &[0, 0, 0], 8),
        strided(Dtype::U8, &[2, 2], &[u64::MAX, u64::MAX], u64::MAX),
        strided(Dtype::U8, &[2, 2], &[1], 4),
        strided(Dtype::U8, &[2, 3], &[1, 2], 5),
    ] {
        assert_refused!(
            TensorPart::whole(&entry),
            Error::PartNotStored { .. },
            "overflow 64 bits or lie outside",
            format!("{:?}", entry.shape),
        );
    }
    // A zero cancels the rest.
    let mut empty = packed(Dtype::F64, &[0]);
    empty.shape = vec![huge, 0, huge, huge];
    let part = TensorPart::slice(&empty, &[(0, 5..huge)]).unwrap();
    assert_eq!((part.bytes(), part.run_count()), (0, 0));
}

#[test]
fn ranges_and_ranks_of_a_dimension() {
    assert_eq!(DimPart::Range(3..5).range(5).unwrap(), 3..5);
    for (begin, end) in [(0, 6), (4, 3), (6, 6)] {
        assert_refused!(
            DimPart::Range(begin..end).range(5),
            Error::RangeOutside { length: 5, .. },
            format!("no range {begin}..{end}"),
            "within 0..5",
        );
    }
    for (number, world) in [(0, 0), (4, 4), (u32::MAX, 1)] {
        assert_refused!(
            rank(number, world, Remainder::Refuse, 1).range(8),
            Error::NoSuchRank { .. },
            format!("no rank {number} among {world} rank"),
        );
    }
    assert_refused!(
        rank(0, 7, Remainder::Refuse, 1).range(151_936),
        Error::UnevenRanks { .. },
        "length 151936 does not divide evenly by 7 ranks;",
    );
    // Two halves of eight heads are four heads each; a sixteenth is half a head.
    assert_eq!(
        rank(1, 2, Remainder::Refuse, 128).range(1024).unwrap(),
        512..1024
    );
    assert_refused!(
        rank(0, 16, Remainder::Refuse, 128).range(1024),
        Error::UnevenRanks { .. },
        "by 16 ranks in multiples of 128;",
    );
    let ranges = |world, multiple_of, length| {
        (0..world)
            .map(|number| {
                let range = rank(number, world, Remainder::Last, multiple_of).range(length);
                let range = range.unwrap();
                (range.start, range.end)
            })
            .collect::<Vec<_>>()
    };
    assert_eq!(ranges(3, 1, 8), [(0, 2), (2, 4), (4, 8)]);
    assert_eq!(ranges(3, 0, 8), [(0, 2), (2, 4), (4, 8)]);
    assert_eq!(ranges(2, 4, 15), [(0, 4), (4, 15)]);
    assert_eq!(ranges(3, 1, 2), [(0, 0), (0, 0), (0, 2)]);
    assert_eq!(ranges(2, 1, 0), [(0, 0), (0, 0)]);
}

/// A byte of a file of which every stretch differs from every other.
pub(crate) fn file_byte(at: u64) -> u8 {
    let mixed = (at + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    u8::try_from(mixed >> 56).unwrap()
}

/// Where each element of a part is stored, in bits from the start of the file, in delivered order: one index vector
/// after the other, each with its own dot product.
fn element_bits(entry: &TensorEntry, ranges: &[Range<u64>]) -> Vec<u64> {
    let mut strides = vec![1; entry.shape.len()];
    for dimension in (1..entry.shape.len()).rev() {
        strides[dimension - 1] = strides[dimension] * entry.shape[dimension];
    }
    let strides = entry.strides.as_ref().unwrap_or(&strides);
    let mut indexes: Vec<Vec<u64>> = vec![vec![]];
    for range in ranges {
        let longer = |index: &Vec<u64>| {
            let index = index.clone();
            range.clone().map(move |at| [&index[..], &[at]].concat())
        };
        indexes = indexes.iter().flat_map(longer).collect();
    }
    let bit = |index: &Vec<u64>| {
        let element: u64 = index
            .iter()
            .zip(strides)
            .map(|(at, stride)| at * stride)
            .sum();
        entry.offset * 8 + element * u64::from(entry.dtype.bits())
    };
    indexes.iter().map(bit).collect()
}

/// What is delivered of a part, bit by bit; `None` where it does not begin and end with whole bytes.
pub(crate) fn delivered(entry: &TensorEntry, ranges: &[Range<u64>]) -> Option<Vec<u8>> {
    let bits = u64::from(entry.dtype.bits());
    let elements = element_bits(entry, ranges);
    let positions: Vec<u64> = elements
        .iter()
        .flat_map(|&first| first..first + bits)
        .collect();
    let mut bytes = Vec::new();
    for byte in positions.chunks(8) {
        // Eight bits that follow one another, from the first of a byte on.
        if byte.len() < 8 || byte[0] % 8 != 0 || byte[7] != byte[0] + 7 {
            return None;
        }
        bytes.push(file_byte(byte[0] / 8));
    }
    Some(bytes)
}

/// A tensor and a range along each of its dimensions.
#[derive(Clone, Debug)]
pub(crate) struct Sliced {
    pub(crate) entry: TensorEntry,
    pub(crate) ranges: Vec<Range<u64>>,
}

impl Sliced {
    pub(crate) fn part(&self) -> Result<TensorPart, Error> {
        let ranges: Vec<_> = self.ranges.iter().cloned().enumerate().collect();
        TensorPart::slice(&self.entry, &ranges)
    }
}

/// Tensors of any kind: packed, and strided in any way, transposed, expanded and with gaps among them.
pub(crate) fn tensors() -> impl Strategy<Value = TensorEntry> {
    let any = prop::sample::select(Dtype::ALL);
    let whole: Vec<Dtype> = Dtype::ALL
        .iter()
        .copied()
        .filter(|dtype| dtype.bits() >= 8)
        .collect();
    let shape = prop::collection::vec(0u64..7, 0..4);
    let packed = (any, shape).prop_filter_map("no whole bytes", |(dtype, shape)| {
        let elements = shape.iter().product();
        dtype
            .bytes_for(elements)
            .map(|bytes| (dtype, shape, None, bytes))
    });
    let permuted = prop::collection::vec((1u64..6, 0u64..2), 0..4)
        .prop_map(|shape| {
            let mut stride = 1;
            let dimensions = shape.into_iter().map(|(count, gap)| {
                let dimension = (count, stride);
                stride *= count + gap;
                dimension
            });
            dimensions.collect::<Vec<_>>()
        })
        .prop_shuffle();
    let views = prop_oneof![prop::collection::vec((1u64..6, 0u64..12), 0..4), permuted];
    let strided = (prop::sample::select(whole), views, 0u64..5).prop_map(|(dtype, view, extra)| {
        let last: u64 = view
            .iter()
            .map(|(count, stride)| (count - 1) * stride)
            .sum();
        let bytes = (last + 1) * u64::from(dtype.bits() / 8) + extra;
        let (shape, strides): (Vec<u64>, Vec<u64>) = view.into_iter().unzip();
        (dtype, shape, Some(strides), bytes)
    });
    let seed = entry();
    (prop_oneof![packed, strided], 0u64..60).prop_map(
        move |((dtype, shape, strides, bytes), offset)| {
            let mut entry = seed.clone();
            entry.dtype = dtype;
            entry.shape = shape;
            entry.strides = strides;
            entry.bytes = bytes;
            entry.offset = offset;
            entry
        },
    )
}

/// A range of each dimension, often all of it.
pub(crate) fn sliced() -> impl Strategy<Value = Sliced> {
    tensors().prop_flat_map(|entry| {
        let range = |&length: &u64| {
            let any = (0..=length, 0..=length).prop_map(|(a, b)| a.min(b)..a.max(b));
            prop_oneof![Just(0..length), any]
        };
        let ranges: Vec<_> = entry.shape.iter().map(range).collect();
        (Just(entry), ranges).prop_map(|(entry, ranges)| Sliced { entry, ranges })
    })
}

fn bytes_of(runs: impl Iterator<Item = Range<u64>>) -> Vec<u8> {
    runs.flatten().map(file_byte).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn parts_are_what_a_naive_slice_is(sliced in sliced(), from in 0u64..80, len in 0u64..80) {
        let expected = delivered(&sliced.entry, &sliced.ranges);
        let part = sliced.part();
        let Some(expected) = expected else {
            prop_assert!(matches!(part, Err(Error::SliceCutsByte { .. })), "{part:?}");
            return Ok(());
        };
        let part = part.unwrap();
        let shape: Vec<u64> = sliced.ranges.iter().map(|range| range.end - range.start).collect();
        prop_assert_eq!(part.shape(), &shape);
        prop_assert_eq!(part.bytes(), expected.len() as u64);

        let runs: Vec<_> = part.runs(0..part.bytes()).collect();
        prop_assert_eq!(bytes_of(runs.iter().cloned()), &expected[..]);
        prop_assert_eq!(runs.len() as u64, part.run_count());
        prop_assert!(runs.iter().all(|run| run.end - run.start == part.run_bytes()));
        prop_assert_eq!(part.is_contiguous(), runs.len() <= 1);
        let ascends = runs.windows(2).all(|pair| pair[0].end <= pair[1].start);
        prop_assert_eq!(part.is_ascending(), ascends);
        if !runs.is_empty() {
            let start = runs.iter().map(|run| run.start).min().unwrap();
            let end = runs.iter().map(|run| run.end).max().unwrap();
            prop_assert_eq!(part.hull(), start..end);
        }

        // Any stretch of it, also past its end.
        let some = part.runs(from..from + len);
        prop_assert_eq!(some.size_hint().0, some.clone().count());
        let expected = expected.iter().skip(usize::try_from(from).unwrap());
        let expected: Vec<u8> = expected.take(usize::try_from(len).unwrap()).copied().collect();
        prop_assert_eq!(bytes_of(some), expected);
    }

    #[test]
    fn parts_of_all_ranks_are_the_whole(
        entry in tensors(),
        dimension in 0usize..12,
        world in 1u32..6,
        multiple_of in 0u64..4,
        remainder in prop::sample::select(vec![Remainder::Refuse, Remainder::Last]),
    ) {
        // Packed elements cannot be cut anywhere, and a scalar has no dimension.
        if entry.shape.is_empty() || entry.dtype.bits() < 8 {
            return Ok(());
        }
        let dimension = dimension % entry.shape.len();
        let length = entry.shape[dimension];
        let mut ranges: Vec<_> = entry.shape.iter().map(|&length| 0..length).collect();
        let whole = delivered(&entry, &ranges).unwrap();
        // A row is what lies side by side in the whole for one index of the dimensions before this one.
        let row = entry.shape[dimension..].iter().product::<u64>() * u64::from(entry.dtype.bits() / 8);
        let rows = (whole.len() as u64).checked_div(row).unwrap_or(0);
        let mut rebuilt = vec![Vec::new(); usize::try_from(rows).unwrap()];
        let each = length / u64::from(world) / multiple_of.max(1) * multiple_of.max(1);
        let mut end = 0;
        for number in 0..world {
            let range = rank(number, world, remainder, multiple_of).range(length);
            if remainder == Remainder::Refuse && each * u64::from(world) != length {
                let is_refused = matches!(range, Err(Error::UnevenRanks { .. }));
                prop_assert!(is_refused, "{range:?}");
                return Ok(());
            }
            let range = range.unwrap();
            prop_assert_eq!(range.start, end);
            prop_assert!(range.end - range.start == each || number == world - 1);
            end = range.end;
            ranges[dimension] = range.clone();
            let part = TensorPart::slice(&entry, &[(dimension, range)]).unwrap();
            let bytes = bytes_of(part.runs(0..part.bytes()));
            prop_assert_eq!(&bytes, &delivered(&entry, &ranges).unwrap());
            if let Some(row) = bytes.len().checked_div(rebuilt.len()) {
                for (at, rebuilt) in rebuilt.iter_mut().enumerate() {
                    rebuilt.extend_from_slice(&bytes[at * row..(at + 1) * row]);
                }
            }
        }
        prop_assert_eq!(end, length);
        prop_assert_eq!(rebuilt.concat(), whole);
    }
}
