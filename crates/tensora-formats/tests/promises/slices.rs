//! A part of a tensor is the bytes that its shape and ranges say, for every dtype, stride and slice.

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
