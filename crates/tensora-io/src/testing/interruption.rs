//! Checks that a batch can be stopped, and that its end, whichever, is the end of all its writing.

// A check owns its trial, whose files go when it ends.
#![allow(clippy::needless_pass_by_value)]

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::fixture::{Arena, KIB, MIB, Place, Progress, Sample, Slot, Trial, params};
use crate::{CancelToken, Control, DirectPolicy, Error, TransferParams};

/// Length of a load that has many more chunks than can be under way.
const LONG_BYTES: usize = 8 * MIB + 333;

/// Many chunks for few workers: when such a load is stopped, most of it must not happen.
fn many_chunks(direct: DirectPolicy) -> TransferParams {
    TransferParams {
        chunk_bytes: 16 << 10,
        ..params(direct)
    }
}

/// How much may still arrive after the cancellation: what was under way, and what was about to be.
fn under_way_bytes(params: &TransferParams) -> u64 {
    2 * params.chunk_bytes * u64::from(params.queue_depth) * u64::from(params.workers)
}

/// A sample as one request, and as many.
fn long_batches(sample: &Sample) -> [Vec<Slot<'_>>; 2] {
    let parts = (0..sample.len() / (8 * KIB))
        .map(|number| sample.slot(number * 8 * KIB, 8 * KIB).at(Place::Skewed(0)));
    [vec![sample.whole()], parts.collect()]
}

/// A token that was cancelled before the call: nothing is read.
pub(super) fn cancelled_before_the_start(trial: Trial) {
    let sample = trial.sample("sample", 100_000);
    for params in trial.few_params(&sample) {
        let token = CancelToken::new();
        token.cancel();
        let progress = Progress::default();
        let arrived = progress.clone();
        let control = Control::new()
            .with_cancel(token)
            .with_progress(move |bytes| arrived.add(bytes));
        let slots = [sample.whole()];
        let (mut arena, outcome) = trial.attempt(&slots, &params, &control);
        judge_cancelled(outcome, &params);
        assert_eq!(progress.bytes(), 0, "bytes arrived in a cancelled load");
        arena.verify_canaries(&slots, &params);
        arena.stays_quiet("a load that never began", &params);
    }
}

fn judge_cancelled(outcome: crate::Result<crate::ReadStats>, params: &TransferParams) {
    match outcome {
        Err(Error::Cancelled) => {}
        other => panic!("a cancelled load ended with {other:?}, with {params:?}"),
    }
}

/// Cancelling at the first bytes ends the load long before its end, with hardly another read.
pub(super) fn cancelled_by_the_progress_callback(trial: Trial) {
    let sample = trial.sample("sample", LONG_BYTES);
    for &direct in trial.policies(&sample.source) {
        let params = many_chunks(direct);
        for slots in long_batches(&sample) {
            let token = CancelToken::new();
            let (progress, arrived) = (Progress::default(), Progress::default());
            let control = Control::new().with_cancel(token.clone()).with_progress({
                let progress = progress.clone();
                let arrived = arrived.clone();
                move |bytes| {
                    if token.is_cancelled() {
                        arrived.add(bytes);
                    }
                    progress.add(bytes);
                    token.cancel();
                }
            });
            let (mut arena, outcome) = trial.attempt(&slots, &params, &control);
            judge_cancelled(outcome, &params);
            judge_late_bytes(&arrived, &params);
            assert!(
                progress.bytes() > 0,
                "cancelled before anything was reported, with {params:?}"
            );
            arena.verify_canaries(&slots, &params);
            arena.stays_quiet("a load was cancelled", &params);
        }
    }
}

/// `late` counts what arrived after the cancellation.
fn judge_late_bytes(late: &Progress, params: &TransferParams) {
    let most = under_way_bytes(params);
    assert!(
        late.bytes() <= most,
        "{} bytes arrived after the cancellation, when at most {most} could be under way: new reads \
         were begun, with {params:?}",
        late.bytes()
    );
}

/// A load is cancelled from elsewhere while its workers are held up by their progress.
pub(super) fn cancelled_from_another_thread(trial: Trial) {
    let sample = trial.sample("sample", LONG_BYTES);
    for &direct in trial.policies(&sample.source) {
        let params = many_chunks(direct);
        for slots in long_batches(&sample) {
            let token = CancelToken::new();
            let (begun, has_begun) = mpsc::channel();
            let late = Progress::default();
            let control = Control::new().with_cancel(token.clone()).with_progress({
                let (token, late) = (token.clone(), late.clone());
                move |bytes| {
                    if token.is_cancelled() {
                        late.add(bytes);
                    }
                    // The receiver is gone once the load has been cancelled.
                    let _ = begun.send(());
                    while !token.is_cancelled() {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                }
            });
            let (mut arena, outcome) = std::thread::scope(|scope| {
                scope.spawn(move || {
                    if has_begun.recv().is_ok() {
                        token.cancel();
                    }
                });
                trial.attempt(&slots, &params, &control)
            });
            judge_cancelled(outcome, &params);
            judge_late_bytes(&late, &params);
            arena.stays_quiet("a load was cancelled", &params);
        }
    }
}

/// Cancelled after a random time, a load is either complete and right, or cancelled and over.
pub(super) fn cancelled_at_any_time(trial: Trial) {
    let sample = trial.sample("sample", 4 * MIB + 5);
    let mut random = trial.random();
    for &direct in trial.policies(&sample.source) {
        for round in 0..24 {
            let params = TransferParams {
                chunk_bytes: [4 << 10, 64 << 10][round % 2],
                queue_depth: [1, 16][round / 2 % 2],
                workers: [1, 2, 16][round % 3],
                direct,
                resident: crate::ResidentPolicy::Reread,
            };
            let slots = [sample.whole(), sample.slot(777, 300_000)];
            let begin = Instant::now();
            let (_, whole) = trial.attempt(&slots, &params, &Control::new());
            assert!(whole.is_ok(), "{whole:?} with {params:?}");
            // Sometimes before the load begins or after its end, mostly in between.
            let pause = begin.elapsed().mul_f64(random.below(120) as f64 / 100.0);
            let token = CancelToken::new();
            let control = Control::new().with_cancel(token.clone());
            let (mut arena, outcome) = std::thread::scope(|scope| {
                let (ready, is_ready) = mpsc::channel();
                scope.spawn(move || {
                    // The receiver waits for this.
                    let _ = ready.send(());
                    let begin = Instant::now();
                    // Sleeping is not precise enough for loads of less than a millisecond.
                    while begin.elapsed() < pause {
                        std::hint::spin_loop();
                    }
                    token.cancel();
                });
                let _ = is_ready.recv();
                trial.attempt(&slots, &params, &control)
            });
            match outcome {
                Ok(_) => arena.verify(&slots, &params),
                Err(Error::Cancelled) => arena.verify_canaries(&slots, &params),
                Err(error) => panic!("a cancelled load failed otherwise, with {params:?}: {error}"),
            }
            if round % 6 == 0 {
                arena.stays_quiet("a load was cancelled", &params);
            }
        }
    }
}

/// A panic of the progress callback reaches the caller as it is, once nothing is in flight, and the
/// backend works on.
pub(super) fn panicking_progress_callback(trial: Trial) {
    const OWN: &str = "the progress callback's own panic";
    let sample = trial.sample("sample", 2 * MIB + 333);
    for &direct in trial.policies(&sample.source) {
        for (workers, queue_depth, first_bytes) in [(1, 1, 0), (2, 16, 100_000), (16, 4, 0)] {
            let params = TransferParams {
                queue_depth,
                workers,
                ..many_chunks(direct)
            };
            let progress = Progress::default();
            let control = Control::new().with_progress(move |bytes| {
                progress.add(bytes);
                // From then on every call panics, so that several workers do at once.
                if progress.bytes() > first_bytes {
                    // Unlike `panic!`, without a message on standard error.
                    resume_unwind(Box::new(OWN));
                }
            });
            let slots = [sample.whole(), sample.slot(5000, 10_000)];
            let mut arena = Arena::new(&slots);
            let requests = arena.requests(&slots);
            let read = AssertUnwindSafe(|| trial.backend.read(requests, &params, &control));
            match catch_unwind(read) {
                Ok(outcome) => panic!("a panic was swallowed: {outcome:?}, with {params:?}"),
                Err(panic) => assert!(
                    panic.downcast_ref::<&str>() == Some(&OWN),
                    "another panic was passed on than the callback's, with {params:?}: {}",
                    super::message(panic.as_ref())
                ),
            }
            arena.verify_canaries(&slots, &params);
            arena.stays_quiet("a panic was passed on", &params);
            trial.read(&slots, &params);
        }
    }
}

/// After success the memory is its owner's again.
pub(super) fn quiet_after_success(trial: Trial) {
    let sample = trial.sample("sample", 2 * MIB + 333);
    let parts = (0..500).map(|number| sample.slot(number * 4001, 4000));
    let slots: Vec<Slot<'_>> = parts.chain([sample.whole()]).collect();
    for params in trial.few_params(&sample) {
        let mut arena = Arena::new(&slots);
        trial
            .backend
            .read(arena.requests(&slots), &params, &Control::new())
            .unwrap_or_else(|error| panic!("with {params:?}: {error}"));
        arena.stays_quiet("a load was complete", &params);
    }
}

/// After an error the memory is its owner's again, also that of requests other than the failed one.
pub(super) fn quiet_after_an_error(trial: Trial) {
    let good = trial.sample("good", 4 * MIB + 333);
    for params in trial.few_params(&good) {
        let params = TransferParams {
            chunk_bytes: 16 << 10,
            ..params
        };
        let bad = trial.sample("bad", MIB);
        // The file is long enough when the load begins, so that the error comes in the middle.
        let path = bad.path().to_owned();
        let control = Control::new().with_progress(move |_| super::fixture::shorten(&path, 0));
        let slots = [
            good.slot(0, 2 * MIB),
            bad.whole(),
            good.slot(2 * MIB, 2 * MIB),
        ];
        let (mut arena, outcome) = trial.attempt(&slots, &params, &control);
        if let Ok(stats) = outcome {
            // Everything of the bad file was read first.
            arena.verify(&slots, &params);
            assert_eq!(stats.bytes, 5 * MIB as u64);
        }
        arena.stays_quiet("a load failed", &params);
    }
}
