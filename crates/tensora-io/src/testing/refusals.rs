//! Checks of batches that cannot be read as asked: the error must say which file, where and why.

// A check owns its trial, whose files go when it ends.
#![allow(clippy::needless_pass_by_value)]

use std::ops::Range;
use std::path::Path;

use super::fixture::{Arena, KIB, MIB, Place, Progress, Sample, Slot, Trial, params, shorten};
use crate::{Control, DirectPolicy, Error, ReadStats, Result, TransferParams};

/// Parameters outside their ranges are named and refused.
pub(super) fn invalid_parameters(trial: Trial) {
    let sample = trial.sample("sample", 10_000);
    let valid = params(DirectPolicy::Never);
    let chunk = |chunk_bytes| TransferParams {
        chunk_bytes,
        ..valid
    };
    let depth = |queue_depth| TransferParams {
        queue_depth,
        ..valid
    };
    let workers = |workers| TransferParams { workers, ..valid };
    for (params, name, number) in [
        (chunk(0), "chunk_bytes", 0),
        (chunk(4095), "chunk_bytes", 4095),
        (chunk((1 << 30) + 1), "chunk_bytes", (1 << 30) + 1),
        (chunk(u64::MAX), "chunk_bytes", u64::MAX),
        (depth(0), "queue_depth", 0),
        (depth(1025), "queue_depth", 1025),
        (depth(u32::MAX), "queue_depth", u32::MAX.into()),
        (workers(0), "workers", 0),
        (workers(257), "workers", 257),
        (workers(u32::MAX), "workers", u32::MAX.into()),
    ] {
        let (arena, outcome) = trial.attempt(&[sample.whole()], &params, &Control::new());
        match outcome {
            Err(Error::InvalidParameter {
                parameter, value, ..
            }) => assert_eq!((parameter, value), (name, number)),
            other => panic!("{params:?} is outside its range, but the outcome was {other:?}"),
        }
        arena.verify_canaries(&[sample.whole()], &params);
    }
}

/// Ranges that end past what a file offset can express are an error that names the file.
pub(super) fn overflowing_offsets(trial: Trial) {
    let sample = trial.sample("sample", 10_000);
    for params in trial.few_params(&sample) {
        for (offset, len) in [
            (u64::MAX - 10, 100),
            (u64::MAX, 1),
            (u64::MAX - 4096, 4096),
            (u64::MAX / 2, 10),
            (u64::MAX / 2 - 5, 4096),
            (u64::MAX / 2 + 1, 1),
        ] {
            let slots = [sample.slot(0, len).offset(offset)];
            let (arena, outcome) = trial.attempt(&slots, &params, &Control::new());
            match outcome {
                Err(
                    error @ (Error::RangeOverflow { .. }
                    | Error::UnexpectedEof { .. }
                    | Error::Read { .. }),
                ) => assert_eq!(error.path(), Some(sample.path()), "{error}"),
                other => panic!("{len} bytes from {offset} of a short file: {other:?}"),
            }
            arena.verify_canaries(&slots, &params);
        }
    }
}

/// Checks for the error of a file that is `actual_end` bytes long: the path, the end, and a range that
/// lies in `within` and does pass the end.
fn judge_end(outcome: Result<ReadStats>, path: &Path, within: Range<u64>, actual_end: u64) {
    match outcome {
        Err(Error::UnexpectedEof {
            path: named,
            offset,
            expected_end,
            actual_end: found,
        }) => {
            assert_eq!(named, path, "the wrong file is named");
            assert_eq!(found, actual_end, "the wrong end of the file is named");
            assert!(
                within.start <= offset && offset < expected_end && expected_end <= within.end,
                "{offset}..{expected_end} is not a part of {within:?}, which was asked for"
            );
            assert!(
                expected_end > actual_end,
                "{offset}..{expected_end} does not pass the end at {actual_end}"
            );
        }
        other => panic!(
            "bytes {within:?} of {}, which ends at {actual_end}, gave {other:?}",
            path.display()
        ),
    }
}

/// Reads `len` bytes from `offset` in several ways and expects the end of the file at `actual_end`.
fn expect_end(trial: &Trial, sample: &Sample, offset: u64, len: usize, actual_end: u64) {
    for params in trial.few_params(sample) {
        for place in [Place::Skewed(0), Place::Anywhere] {
            let slots = [sample.slot(0, len).offset(offset).at(place)];
            let (arena, outcome) = trial.attempt(&slots, &params, &Control::new());
            let within = offset..offset + len as u64;
            judge_end(outcome, sample.path(), within, actual_end);
            arena.verify_canaries(&slots, &params);
        }
    }
}

/// Ranges that begin inside a file and end past it, or begin past it.
pub(super) fn range_past_the_end(trial: Trial) {
    for size in [1, 4096, 5000, 70_001] {
        let sample = trial.sample(&format!("{size}-bytes"), size);
        let end = size as u64;
        for (offset, len) in [
            (0, size + 1),
            (0, size + 100_000),
            (end - 1, 2),
            (end, 1),
            (end, 4096),
            (end + 1, 1),
            (end.next_multiple_of(4096) + 8192, 512),
            (1 << 40, 1),
        ] {
            expect_end(&trial, &sample, offset, len, end);
        }
    }
    let empty = trial.sample("empty", 0);
    expect_end(&trial, &empty, 0, 1, 0);
    expect_end(&trial, &empty, 4096, 4096, 0);
}

/// A file that became shorter between open and read.
pub(super) fn truncated_after_open(trial: Trial) {
    for (before, after) in [
        (5000, 4999),
        (5000, 0),
        (100_000, 4096),
        (100_000, 65_537),
        (MIB, 512),
    ] {
        let sample = trial.sample(&format!("{before}-to-{after}"), before);
        // Direct reads may need a second descriptor: it shall be found before and after.
        if after % 2 == 0 {
            sample.source.direct_support();
        }
        sample.shorten(after);
        expect_end(&trial, &sample, 0, before, after as u64);
        expect_end(&trial, &sample, before as u64 - 1, 1, after as u64);
        // What is left can still be read.
        let rest = Sample {
            source: sample.reopen().source,
            content: sample.content[..after].into(),
        };
        for params in trial.few_params(&rest) {
            trial.read(&[rest.whole()], &params);
        }
    }
}

/// A file that becomes shorter while it is read: an error, or everything, if it was all there before.
pub(super) fn truncated_while_reading(trial: Trial) {
    for &direct in trial.policies(&trial.sample("probe", 1).source) {
        for (after, workers) in [(0, 1), (5 * 4096 + 11, 2), (MIB + 4096, 4)] {
            let sample = trial.sample("sample", 4 * MIB + 77);
            let params = TransferParams {
                workers,
                chunk_bytes: 16 << 10,
                ..params(direct)
            };
            let path = sample.path().to_owned();
            let progress = Progress::default();
            let arrived = progress.clone();
            let control = Control::new().with_progress(move |bytes| {
                if arrived.bytes() == 0 {
                    shorten(&path, after);
                }
                arrived.add(bytes);
            });
            let slots = [sample.whole()];
            let (mut arena, outcome) = trial.attempt(&slots, &params, &control);
            assert!(
                progress.bytes() < sample.len() as u64,
                "all of a file arrived after most of it was gone, with {params:?}"
            );
            judge_end(outcome, sample.path(), 0..sample.len() as u64, after as u64);
            arena.verify_canaries(&slots, &params);
            arena.stays_quiet("a read of a shrinking file failed", &params);
        }
    }
}

/// One short file among many, wherever it stands: the error names it and no other.
pub(super) fn one_bad_file_among_good_ones(trial: Trial) {
    let good: Vec<Sample> = (0..6)
        .map(|number| trial.sample(&format!("good-{number}"), 64 * KIB + number))
        .collect();
    let bad = trial.sample("bad", 64 * KIB);
    bad.shorten(40_000);
    for params in trial.few_params(&good[0]) {
        for position in [0, 3, 6] {
            let mut slots: Vec<Slot<'_>> = good.iter().map(Sample::whole).collect();
            slots.insert(position, bad.whole());
            let (arena, outcome) = trial.attempt(&slots, &params, &Control::new());
            judge_end(outcome, bad.path(), 0..bad.len() as u64, 40_000);
            arena.verify_canaries(&slots, &params);
            // The failure is the batch's, not the backend's.
            let rest: Vec<Slot<'_>> = good.iter().map(Sample::whole).collect();
            trial.read(&rest, &params);
        }
    }
}

/// Reads a sample whose path no longer leads to it. Never and preferred must succeed; required may say
/// that it would have to open the path again.
fn read_without_path(trial: &Trial, make: &dyn Fn(&str) -> Sample) {
    for direct in [
        DirectPolicy::Never,
        DirectPolicy::Preferred,
        DirectPolicy::Required,
    ] {
        let params = params(direct);
        let sample = make(direct.as_str());
        let slots = [sample.whole(), sample.slot(513, 700)];
        let mut arena = Arena::new(&slots);
        let outcome = trial
            .backend
            .read(arena.requests(&slots), &params, &Control::new());
        match outcome {
            Ok(_) => arena.verify(&slots, &params),
            Err(Error::DirectUnsupported { path, .. }) if direct == DirectPolicy::Required => {
                assert_eq!(path, sample.path(), "the wrong file is named");
            }
            Err(error) => panic!("with {params:?}: {error}"),
        }
        // Opened for direct reads in time, there is no need of the path.
        let early = make(&format!("{direct}-early"));
        if trial.policies(&early.source).contains(&direct) {
            trial.read(&[early.whole()], &params);
        }
    }
}

/// A file that was deleted is still what its descriptor names.
pub(super) fn deleted_after_open(trial: Trial) {
    read_without_path(&trial, &|name| {
        let sample = trial.sample(name, 100_001);
        if name.ends_with("early") {
            sample.source.direct_support();
        }
        std::fs::remove_file(sample.path()).unwrap_or_else(|error| panic!("remove: {error}"));
        sample
    });
}

/// A path that leads to another file by now does not change what is read.
pub(super) fn replaced_after_open(trial: Trial) {
    read_without_path(&trial, &|name| {
        let sample = trial.sample(name, 100_001);
        if name.ends_with("early") {
            sample.source.direct_support();
        }
        let other = trial.sample("other", 200_002);
        std::fs::rename(other.path(), sample.path())
            .unwrap_or_else(|error| panic!("rename: {error}"));
        sample
    });
}
