//! Checks that the right bytes arrive in the right places, and nothing anywhere else.

// A check owns its trial, whose files go when it ends.
#![allow(clippy::needless_pass_by_value)]

use std::mem::MaybeUninit;

use super::fixture::{
    Arena, KIB, MIB, PLACE_ALIGN_BYTES, Place, Sample, Slot, Trial, as_usize, open, params,
};
use crate::{
    Control, DirectPolicy, Error, Platform, ReadRequest, Region, SourceFile, TransferParams,
};

/// Lengths and positions around which reads begin to be cut, rounded or aligned.
const BOUNDARIES: [usize; 14] = [
    0,
    1,
    511,
    512,
    513,
    4095,
    4096,
    4097,
    64 * KIB - 1,
    64 * KIB,
    64 * KIB + 1,
    MIB - 1,
    MIB,
    MIB + 1,
];

/// A batch without requests succeeds and reports nothing.
pub(super) fn empty_batch(trial: Trial) {
    let sample = trial.sample("sample", 1);
    for params in trial.all_params(&sample) {
        let stats = trial.read(&[], &params);
        assert_eq!(stats.bytes, 0, "{stats:?}");
    }
}

/// Empty requests succeed wherever they stand, alone and among others, also in an empty file.
pub(super) fn empty_requests(trial: Trial) {
    let empty = trial.sample("empty", 0);
    let sample = trial.sample("sample", 10_000);
    let mut slots: Vec<Slot<'_>> = [0, 1, 512, 9_999, 10_000]
        .map(|offset| sample.slot(offset, 0))
        .to_vec();
    slots.extend([empty.slot(0, 0), empty.slot(0, 0).at(Place::Adjacent)]);
    for params in trial.few_params(&sample) {
        for slot in &slots {
            trial.read(&[*slot], &params);
        }
        trial.read(&slots, &params);
        let mut mixed = Vec::new();
        for (number, slot) in slots.iter().enumerate() {
            mixed.extend([*slot, sample.slot(number * 700, 600).at(Place::Adjacent)]);
        }
        trial.read(&mixed, &params);
    }
}

/// Single bytes, each in a batch of its own: the first, the last, and those beside boundaries.
pub(super) fn single_bytes(trial: Trial) {
    let sample = trial.sample("sample", 9_001);
    for params in trial.few_params(&sample) {
        for offset in [0, 1, 511, 512, 513, 4095, 4096, 4097, 8999, 9000] {
            trial.read(&[sample.slot(offset, 1)], &params);
            let congruent = sample.slot(offset, 1).at(Place::Skewed(0));
            trial.read(&[congruent], &params);
        }
    }
}

/// Every length around a boundary of blocks, pages and chunks, from the beginning of a file, in one batch, with
/// every combination of parameters.
pub(super) fn boundary_sizes(trial: Trial) {
    let sample = trial.sample("sample", 2 * MIB);
    let slots = BOUNDARIES.map(|len| sample.slot(0, len).at(Place::Skewed(0)));
    for params in trial.all_params(&sample) {
        trial.read(&slots, &params);
    }
}

/// Whole files whose lengths lie around boundaries: no file needs to end with a block.
pub(super) fn whole_files(trial: Trial) {
    let samples = BOUNDARIES.map(|len| trial.sample(&format!("{len}-bytes"), len));
    for params in trial.few_params(&samples[1]) {
        for sample in &samples {
            trial.read(&[sample.whole()], &params);
        }
        let skewed: Vec<Slot<'_>> = samples
            .iter()
            .map(|sample| sample.slot(0, sample.len()))
            .collect();
        trial.read(&skewed, &params);
    }
}

/// Offsets and lengths around boundaries, in destinations congruent to the offset and not.
pub(super) fn unaligned_ranges(trial: Trial) {
    let sample = trial.sample("sample", 3 * 64 * KIB + 11);
    let mut slots = Vec::new();
    for offset in [1, 511, 513, 4095, 4097, 64 * KIB - 1, 64 * KIB + 1] {
        for len in [
            1,
            2,
            511,
            512,
            513,
            4095,
            4096,
            4097,
            64 * KIB - 1,
            64 * KIB + 1,
        ] {
            for skew in [0, 1, 512, 4095] {
                slots.push(sample.slot(offset, len).at(Place::Skewed(skew)));
            }
        }
    }
    // The last byte of the file, from every kind of beginning.
    for len in [1, 10, 11, 12, 523, 4096 + 11, 64 * KIB + 11] {
        slots.push(sample.slot(sample.len() - len, len).at(Place::Skewed(0)));
        slots.push(sample.slot(sample.len() - len, len));
    }
    for params in trial.few_params(&sample) {
        trial.read(&slots, &params);
    }
}

/// Destinations at every address modulo the largest common block, relative to the offset: a batch per
/// 512 of them, and once all at the same offset.
pub(super) fn misaligned_destinations(trial: Trial) {
    let sample = trial.sample("sample", 64 * KIB + 3);
    for params in trial.few_params(&sample) {
        for first in (0..PLACE_ALIGN_BYTES).step_by(512) {
            // Near an aligned place every skew counts, further away any seventh shows the same.
            let step = if first == 0 { 1 } else { 7 };
            let slots: Vec<Slot<'_>> = (first..first + 512)
                .step_by(step)
                .map(|skew| {
                    let (offset, len) = (skew * 5 % 8192, 1024 + skew % 3);
                    sample.slot(offset, len).at(Place::Skewed(skew))
                })
                .collect();
            trial.read(&slots, &params);
        }
    }
}

/// Destinations that are typed as uninitialised are filled like any other.
pub(super) fn uninitialised_destinations(trial: Trial) {
    let sample = trial.sample("sample", 300_003);
    for params in trial.few_params(&sample) {
        for slot in [
            sample.slot(0, 0),
            sample.slot(4096, 1),
            sample.slot(511, 4098),
            sample.slot(0, sample.len()),
        ] {
            // In truth initialised: a backend that leaves gaps shall fail the check, not undermine it.
            let mut memory = vec![MaybeUninit::new(0_u8); slot.len];
            trial
                .backend
                .read(
                    vec![slot.request(memory.as_mut_slice())],
                    &params,
                    &Control::new(),
                )
                .unwrap_or_else(|error| panic!("{slot}: {error}"));
            let found: Vec<u8> = memory.into_iter().map(read_initialised).collect();
            slot.compare(&found, &params);
        }
    }
}

#[allow(unsafe_code)]
fn read_initialised(byte: MaybeUninit<u8>) -> u8 {
    // SAFETY: it was initialised when its vector was made, and backends write only initialised bytes.
    unsafe { byte.assume_init() }
}

/// Fresh memory, whose pages the system makes only when the read touches them.
pub(super) fn untouched_memory(trial: Trial) {
    let sample = trial.sample("sample", 5 * MIB + 123);
    for params in trial.few_params(&sample) {
        for skew in [0, 1] {
            let slots = [sample.whole().at(Place::Skewed(skew))];
            trial.read_from(Arena::untouched(&slots), &slots, &params);
        }
    }
}

/// Chunks that are no multiple of any block are as good as others.
pub(super) fn odd_chunks(trial: Trial) {
    let sample = trial.sample("sample", MIB + 777);
    for &direct in trial.policies(&sample.source) {
        for (chunk_bytes, queue_depth, workers) in
            [(4097, 7, 3), (5000, 1, 2), (99_999, 3, 1), (1 << 30, 2, 2)]
        {
            let params = TransferParams {
                chunk_bytes,
                queue_depth,
                workers,
                direct,
                resident: crate::ResidentPolicy::Reread,
            };
            trial.read(
                &[
                    sample.whole(),
                    sample.slot(3, MIB).at(Place::Skewed(0)),
                    sample.slot(77, 300_000),
                ],
                &params,
            );
        }
    }
}

/// The largest parameters that are valid work. They may exceed a limit of the system or of the user; an
/// error that says so is as good.
pub(super) fn largest_parameters(trial: Trial) {
    let sample = trial.sample("sample", 2 * MIB + 1);
    let slots = [sample.whole(), sample.slot(1, 10)];
    for &direct in trial.policies(&sample.source) {
        // Depth and workers in turn: together they take more locked memory than a user may have, and
        // would fail other loads of the same user meanwhile.
        for (chunk_bytes, queue_depth, workers) in [
            (
                TransferParams::MIN_CHUNK_BYTES,
                TransferParams::MAX_QUEUE_DEPTH,
                1,
            ),
            (
                TransferParams::MIN_CHUNK_BYTES,
                1,
                TransferParams::MAX_WORKERS,
            ),
            (
                TransferParams::MAX_CHUNK_BYTES,
                1,
                TransferParams::MAX_WORKERS,
            ),
        ] {
            let params = TransferParams {
                chunk_bytes,
                queue_depth,
                workers,
                direct,
                resident: crate::ResidentPolicy::Reread,
            };
            let (arena, outcome) = trial.attempt(&slots, &params, &Control::new());
            match outcome {
                Ok(_) => arena.verify(&slots, &params),
                Err(
                    error @ (Error::BackendUnavailable { .. }
                    | Error::Backend { .. }
                    | Error::Thread { .. }
                    | Error::Memory { .. }),
                ) => trial.skip(&format!("{params:?}: {error}")),
                Err(error) => panic!("with {params:?}: {error}"),
            }
        }
    }
}

/// Thousands of ranges of 1 to 300 bytes in one batch.
pub(super) fn tiny_ranges(trial: Trial) {
    let sample = trial.sample("sample", MIB + 5);
    let mut random = trial.random();
    for params in trial.few_params(&sample) {
        let slots: Vec<Slot<'_>> = (0..3000)
            .map(|_| {
                let len = 1 + random.below(300);
                sample.slot(random.below(sample.len() - len + 1), len)
            })
            .collect();
        trial.read(&slots, &params);
    }
}

/// Ranges that overlap, contain each other or are the same are each delivered in full.
pub(super) fn overlapping_ranges(trial: Trial) {
    let sample = trial.sample("sample", 300 * KIB + 1);
    let mut slots = vec![sample.whole(), sample.whole(), sample.slot(0, sample.len())];
    for begin in (0..20_000).step_by(1000) {
        slots.push(sample.slot(begin, 5000));
        slots.push(sample.slot(begin, 5000).at(Place::Skewed(0)));
        slots.push(sample.slot(begin, 5001));
        slots.push(sample.slot(begin + 1, 1));
        slots.push(sample.slot(begin + 10, 100));
    }
    for params in trial.few_params(&sample) {
        trial.read(&slots, &params);
        // The same range again and again, where a cache of results would be tempting.
        for len in [1, 700, 4096, 70_000] {
            trial.read(&[sample.slot(8192, len); 20], &params);
        }
    }
}

/// Ranges that follow each other in the file, with destinations that do as well, do not, or do in the
/// opposite order.
pub(super) fn adjacent_ranges(trial: Trial) {
    let sample = trial.sample("sample", 400_001);
    for params in trial.few_params(&sample) {
        for len in [1, 7, 512, 1000, 4096, 50_000] {
            let count = (sample.len() / len).min(64);
            let first = sample.len() - count * len;
            let scattered: Vec<Slot<'_>> = (0..count)
                .map(|number| sample.slot(first + number * len, len))
                .collect();
            trial.read(&scattered, &params);
            let adjacent: Vec<Slot<'_>> = scattered
                .iter()
                .map(|slot| slot.at(Place::Adjacent))
                .collect();
            trial.read(&adjacent, &params);
            let reversed: Vec<Slot<'_>> = adjacent.iter().rev().copied().collect();
            trial.read(&reversed, &params);
        }
    }
}

/// Files of different lengths in one batch, the same one opened twice, and adjacent destinations that
/// belong to different files.
pub(super) fn several_files(trial: Trial) {
    let empty = trial.sample("empty", 0);
    let tiny = trial.sample("tiny", 3);
    let large = trial.sample("large", 3 * MIB + 333);
    let again = large.reopen();
    let small: Vec<Sample> = (0..40)
        .map(|number| trial.sample(&format!("small-{number}"), 4090 + number))
        .collect();
    let mut slots = vec![
        empty.whole(),
        tiny.whole(),
        large.whole(),
        again.whole(),
        tiny.slot(1, 2),
        again.slot(4096, 8192).at(Place::Adjacent),
        large.slot(4096 + 8192, 4096).at(Place::Adjacent),
        empty.slot(0, 0),
    ];
    // The same offsets in every file: only the file tells the ranges apart.
    slots.extend(small.iter().map(|sample| sample.slot(512, 1024)));
    slots.extend(small.iter().map(Sample::whole));
    for params in trial.few_params(&large) {
        trial.read(&slots, &params);
    }
}

/// Random batches, in random order, against the content as written.
pub(super) fn random_batches(trial: Trial) {
    let mut random = trial.random();
    let samples: Vec<Sample> = [1, 513, 5000, 70_001, 600_011]
        .into_iter()
        .map(|len| trial.sample(&format!("{len}-bytes"), len))
        .collect();
    let all_params = trial.all_params(&samples[0]);
    for params in all_params.iter().cycle().take(3 * all_params.len()) {
        let slots: Vec<Slot<'_>> = (0..1 + random.below(60))
            .map(|_| {
                let sample = &samples[random.below(samples.len())];
                let offset = random.below(sample.len());
                let longest = sample.len() - offset;
                // Short ranges as often as long ones.
                let len = match random.below(4) {
                    0 => longest,
                    1 => random.below(longest.min(600) + 1),
                    _ => random.below(longest.min(60_000) + 1),
                };
                sample.slot(offset, len).at(match random.below(4) {
                    0 => Place::Anywhere,
                    1 => Place::Adjacent,
                    2 => Place::Skewed(0),
                    _ => Place::Skewed(random.below(PLACE_ALIGN_BYTES)),
                })
            })
            .collect();
        let mut arena = Arena::new(&slots);
        let mut requests = arena.requests(&slots);
        random.shuffle(&mut requests);
        trial
            .backend
            .read(requests, params, &Control::new())
            .unwrap_or_else(|error| panic!("{slots:?} with {params:?}: {error}"));
        arena.verify(&slots, params);
    }
}

/// Writes `marks` into an otherwise empty file of `len` bytes that takes no space, where the file
/// system can do that.
fn sparse(trial: &Trial, len: u64, marks: &[u64]) -> Option<SourceFile> {
    let path = trial.directory().join("sparse");
    let write = || {
        let mut file = std::fs::File::create(&path)?;
        file.set_len(len)?;
        for &at in marks {
            use std::io::{Seek, SeekFrom, Write};
            file.seek(SeekFrom::Start(at))?;
            file.write_all(&[mark(at)])?;
        }
        Ok::<(), std::io::Error>(())
    };
    if let Err(error) = write() {
        trial.skip(&format!("no sparse file of {len} bytes: {error}"));
        return None;
    }
    Some(open(&path))
}

/// The byte written at an offset: differs between near and between far ones, and is never 0.
fn mark(at: u64) -> u8 {
    at.to_le_bytes()
        .iter()
        .fold(1, |sum: u8, byte| sum.wrapping_mul(31).wrapping_add(*byte))
        | 1
}

/// Ranges beyond what 32 bits can express, which a truncated offset would read from the beginning.
pub(super) fn offsets_beyond_4_gib(trial: Trial) {
    const GIB_4: u64 = 4 << 30;
    let marks = [
        3,
        5000,
        GIB_4 - 1,
        GIB_4,
        GIB_4 + 3,
        GIB_4 + 5000,
        GIB_4 + 70_000,
    ];
    let Some(source) = sparse(&trial, GIB_4 + 70_001, &marks) else {
        return;
    };
    for &direct in trial.policies(&source) {
        for (offset, len) in [
            (GIB_4 - 1, 2),
            (GIB_4, 8192),
            (GIB_4 + 3, 1),
            (GIB_4 - 70_000, 140_001),
            (3, 4998),
        ] {
            let mut memory = vec![0xAA; len];
            trial
                .backend
                .read(
                    vec![ReadRequest {
                        file: &source,
                        offset,
                        destination: memory.as_mut_slice().into(),
                    }],
                    &params(direct),
                    &Control::new(),
                )
                .unwrap_or_else(|error| panic!("{len} bytes from {offset}: {error}"));
            judge_sparse(&memory, offset, &marks);
        }
    }
}

/// Checks that `memory` holds the marks that lie in the range that begins at `offset`, and zeros.
fn judge_sparse(memory: &[u8], offset: u64, marks: &[u64]) {
    static ZEROS: [u8; 64 * KIB] = [0; 64 * KIB];
    let mut begin = 0;
    let end = offset + memory.len() as u64;
    for &at in marks.iter().filter(|at| (offset..end).contains(at)) {
        let place = as_usize(at - offset);
        assert_eq!(memory[place], mark(at), "the byte at offset {at}");
        begin = judge_zeros(memory, begin, place, offset) + 1;
    }
    judge_zeros(memory, begin, memory.len(), offset);

    fn judge_zeros(memory: &[u8], begin: usize, end: usize, offset: u64) -> usize {
        for (number, part) in memory[begin..end].chunks(ZEROS.len()).enumerate() {
            assert!(
                part == &ZEROS[..part.len()],
                "bytes that were never written are not 0 within 64 KiB of offset {}",
                offset + (begin + number * ZEROS.len()) as u64
            );
        }
        end
    }
}

/// One request of more bytes than one system call reads, or 31 bits count.
pub(super) fn a_request_over_2_gib(trial: Trial) {
    /// Two such loads at once could be more than a small machine has.
    static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());
    const LEN: usize = (2 << 30) + (20 << 20) + 77;
    let _guard = ONE_AT_A_TIME
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    // The destination, as much again for the page cache of a mapping, and some for everyone else.
    let needed = 2 * LEN as u64 + (1 << 30);
    match Platform::probe().memory.usable_bytes() {
        Some((available, _)) if available >= needed => {}
        available => {
            return trial.skip(&format!(
                "{needed} bytes of memory are needed, available are {available:?}"
            ));
        }
    }
    let end = LEN as u64 + 5;
    let marks = [
        5,
        (1 << 30) - 1,
        1 << 30,
        (2 << 30) - 4096,
        (2 << 30) + 5,
        end - 1,
    ];
    let Some(source) = sparse(&trial, end, &marks) else {
        return;
    };
    let mut region = Region::allocate(LEN + 5).unwrap_or_else(|error| panic!("{error}"));
    // Holes read directly never enter the page cache; where that is not possible, they do.
    let params = TransferParams {
        chunk_bytes: TransferParams::MAX_CHUNK_BYTES,
        queue_depth: 1,
        ..params(DirectPolicy::Preferred)
    };
    let stats = trial
        .backend
        .read(
            vec![ReadRequest {
                file: &source,
                offset: 5,
                // Congruent, so that direct reads are as long as the chunk allows.
                destination: (&mut region.as_mut_slice()[5..]).into(),
            }],
            &params,
            &Control::new(),
        )
        .unwrap_or_else(|error| panic!("{LEN} bytes: {error}"));
    judge_sparse(&region.as_slice()[5..], 5, &marks);
    assert_eq!(stats.bytes, LEN as u64, "{stats:?}");
}
