//! What streams promise.
#![cfg(feature = "sync")]
#![allow(clippy::unwrap_used)]

mod stream_support;

use std::collections::HashSet;
use std::fs::OpenOptions;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use futures_core::Stream as _;
use proptest::prelude::*;
use proptest::sample::Index;
use stream_support::*;
use tensora_io::{
    CancelToken, Control, DirectPolicy, Error, FilledWindow, RangeStream, ReadExtent, ReadWindow,
    Result, StreamParams, TransferParams, WindowHook,
};

const KIB: usize = 1 << 10;

fn directory() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// Wakes by counting, so that a test can wait for it.
struct CountWakes(Count);

impl Wake for CountWakes {
    fn wake(self: Arc<Self>) {
        self.0.add();
    }
}

fn counting_waker() -> (Count, Waker) {
    let count = Count::default();
    (count.clone(), Arc::new(CountWakes(count)).into())
}

fn poll(stream: &mut RangeStream, waker: &Waker) -> Poll<Option<Result<FilledWindow>>> {
    Pin::new(stream).poll_next(&mut Context::from_waker(waker))
}

/// The next item of a stream that is polled, as an executor would.
fn poll_to_end(stream: &mut RangeStream) -> Option<Result<FilledWindow>> {
    let (woken, waker) = counting_waker();
    for polls in 1.. {
        if let Poll::Ready(item) = poll(stream, &waker) {
            return item;
        }
        woken.wait_for(polls);
    }
    unreachable!()
}

// ---- what arrives ----

/// One extent, before it is known how long the files are.
#[derive(Clone, Debug)]
struct RawExtent {
    file: Index,
    start: Index,
    len: usize,
    gap: usize,
    aligned: bool,
}

fn raw_extent() -> impl Strategy<Value = RawExtent> {
    (
        any::<Index>(),
        any::<Index>(),
        prop_oneof![Just(0), 1..600usize, 1..40_000usize],
        0..5000usize,
        any::<bool>(),
    )
        .prop_map(|(file, start, len, gap, aligned)| RawExtent {
            file,
            start,
            len,
            gap,
            aligned,
        })
}

/// Places extents one after the other, some as direct reads like them; in the reverse order every other time.
fn place(raw: &[RawExtent], padding: usize, lens: &[usize]) -> ReadWindow {
    let mut end = 0;
    let mut extents = Vec::new();
    for raw in raw {
        let file = raw.file.index(lens.len());
        let start = raw.start.index(lens[file] + 1);
        let len = raw.len.min(lens[file] - start);
        let mut at = end + raw.gap;
        if raw.aligned {
            at = at.next_multiple_of(4096) + start % 4096;
        }
        extents.push(ReadExtent {
            file,
            range: start as u64..(start + len) as u64,
            at,
        });
        end = at + len;
    }
    if padding % 2 == 1 {
        extents.reverse();
    }
    ReadWindow {
        extents,
        buffer_bytes: end + padding,
    }
}

#[derive(Clone, Debug)]
struct Scenario {
    lens: Vec<usize>,
    windows: Vec<ReadWindow>,
    params: StreamParams,
    hook: bool,
    polls: bool,
    /// What becomes of each window, and which held one is dropped with it.
    fates: Vec<(u8, Index)>,
}

fn scenario() -> impl Strategy<Value = Scenario> {
    let raw_windows = prop::collection::vec(
        (
            prop::collection::vec(raw_extent(), 0..4),
            prop_oneof![Just(0), 0..3000usize],
        ),
        0..20,
    );
    let transfer = (
        prop::sample::select(vec![4096_u64, 10_000, 1 << 20]),
        1..4u32,
        prop_oneof![4 => Just(1), 1 => 2..4u32],
        any::<bool>(),
    );
    (
        prop::collection::vec(0..150_000usize, 1..4),
        raw_windows,
        1..6u32,
        1..5u32,
        transfer,
        (any::<bool>(), any::<bool>(), 0..5000usize),
        prop::collection::vec((any::<u8>(), any::<Index>()), 20),
    )
        .prop_map(
            |(lens, raw, buffers, readers, transfer, (hook, polls, spare), fates)| {
                let windows: Vec<_> = raw
                    .iter()
                    .map(|(extents, padding)| place(extents, *padding, &lens))
                    .collect();
                let largest = windows.iter().map(|window| window.buffer_bytes).max();
                let (chunk_bytes, queue_depth, workers, direct) = transfer;
                let transfer = TransferParams {
                    chunk_bytes,
                    queue_depth,
                    workers,
                    direct: if direct {
                        DirectPolicy::Preferred
                    } else {
                        DirectPolicy::Never
                    },
                    resident: tensora_io::ResidentPolicy::Reread,
                };
                let params =
                    StreamParams::new(buffers, largest.unwrap_or(0) + spare, readers, transfer)
                        .with_lease_timeout(Duration::from_millis(2));
                Scenario {
                    lens,
                    windows,
                    params,
                    hook,
                    polls,
                    fates,
                }
            },
        )
}

/// What a hook does to a window's bytes in these tests.
fn mask(scenario: &Scenario, number: usize) -> u8 {
    if scenario.hook {
        u8::try_from(number % 250).unwrap() + 1
    } else {
        0
    }
}

/// Streams everything, holding on to some windows and to parts of others, and looks at each of them at once, when
/// the stream stalls, and when all is over.
fn play(scenario: &Scenario, samples: &[Sample], backend: &Arc<dyn tensora_io::Backend>) {
    let files: Vec<_> = samples
        .iter()
        .map(|sample| Arc::clone(&sample.file))
        .collect();
    let arrived = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&arrived);
    let control = Control::new().with_progress(move |bytes| {
        counted.fetch_add(bytes, Ordering::Relaxed);
    });
    let (windows, params) = (scenario.windows.clone(), scenario.params);
    let hook: WindowHook = {
        let scenario = scenario.clone();
        Arc::new(move |number, bytes: &mut [u8]| {
            assert_eq!(bytes.len(), scenario.windows[number].buffer_bytes);
            for byte in bytes {
                *byte ^= mask(&scenario, number);
            }
            Ok(())
        })
    };
    let mut stream = if scenario.hook {
        RangeStream::with_hook(files, windows, Arc::clone(backend), params, control, hook)
    } else {
        RangeStream::new(files, windows, Arc::clone(backend), params, control)
    }
    .unwrap();

    let look = |held: &FilledWindow| {
        let window = &scenario.windows[held.number];
        verify(held, window, samples, mask(scenario, held.number));
    };
    let mut held: Vec<FilledWindow> = Vec::new();
    let mut parts: Vec<(FilledWindow, usize)> = Vec::new();
    let mut stalls = 0;
    let mut next = 0;
    loop {
        let item = if scenario.polls {
            poll_to_end(&mut stream)
        } else {
            stream.next()
        };
        match item {
            None => break,
            Some(Err(Error::LeasesHeld {
                held: leased,
                buffers,
                ..
            })) => {
                assert_eq!(leased, buffers);
                stalls += 1;
                held.iter().for_each(look);
                let which = scenario.fates[stalls % 20].1;
                if !held.is_empty() {
                    held.swap_remove(which.index(held.len()));
                } else {
                    parts.swap_remove(which.index(parts.len()));
                }
            }
            Some(Err(error)) => panic!("{error}"),
            Some(Ok(filled)) => {
                assert_eq!(filled.number, next, "out of order");
                next += 1;
                look(&filled);
                let (fate, which) = scenario.fates[filled.number];
                match fate % 4 {
                    0 => drop(filled),
                    1 => {
                        // A slice holds the buffer as much as the whole does.
                        let from = which.index(filled.bytes.len() + 1);
                        let part = filled.bytes.slice(from..);
                        parts.push((
                            FilledWindow {
                                bytes: part,
                                ..filled
                            },
                            from,
                        ));
                    }
                    _ => held.push(filled),
                }
                if fate > 128 && !held.is_empty() {
                    held.swap_remove(which.index(held.len()));
                }
            }
        }
    }
    assert_eq!(next, scenario.windows.len());
    let stats = stream.stats();
    assert_eq!(stats.windows, scenario.windows.len() as u64);
    let wanted: u64 = scenario.windows.iter().map(ReadWindow::read_bytes).sum();
    assert_eq!(stats.read.bytes, wanted);
    assert_eq!(arrived.load(Ordering::Relaxed), wanted);
    assert!(stats.peak_leases <= scenario.params.buffers);
    assert!(stats.lease_stalls >= stalls as u64);
    if scenario.fates[0].0.is_multiple_of(2) {
        drop(stream);
    }
    held.iter().for_each(look);
    for (part, from) in parts {
        let window = &scenario.windows[part.number];
        for extent in &window.extents {
            let len = usize::try_from(extent.range.end - extent.range.start).unwrap();
            let begin = extent.at.max(from);
            if begin >= extent.at + len {
                continue;
            }
            let start = usize::try_from(extent.range.start).unwrap() + (begin - extent.at);
            let count = extent.at + len - begin;
            let expected = samples[extent.file].content[start..start + count]
                .iter()
                .map(|byte| byte ^ mask(scenario, part.number));
            assert!(
                part.bytes[begin - from..begin - from + count]
                    .iter()
                    .copied()
                    .eq(expected),
                "a slice of window {}",
                part.number
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_window_arrives_in_order_and_leases_keep_their_bytes(scenario in scenario()) {
        let directory = directory();
        let samples: Vec<_> = scenario
            .lens
            .iter()
            .enumerate()
            .map(|(number, len)| sample(&directory, &number.to_string(), *len))
            .collect();
        for backend in backends() {
            play(&scenario, &samples, &backend);
        }
    }
}

#[test]
fn windows_are_handed_out_in_order_whichever_is_read_first() {
    let directory = directory();
    let samples = [sample(&directory, "data", 40 * KIB)];
    let windows = row(0, 4 * KIB, 10);
    let filled = Count::default();
    let hook: WindowHook = {
        let filled = filled.clone();
        Arc::new(move |_, _| {
            filled.add();
            Ok(())
        })
    };
    // The first comes after the next three have been read.
    let backend = scripted(move |offset, _| {
        if offset == 0 {
            filled.wait_for(3);
        }
    });
    let files = vec![Arc::clone(&samples[0].file)];
    let stream = RangeStream::with_hook(
        files,
        windows.clone(),
        backend,
        params(4, 4 * KIB, 4),
        Control::new(),
        hook,
    )
    .unwrap();
    let mut count = 0;
    for (number, filled) in stream.enumerate() {
        let filled = filled.unwrap();
        assert_eq!(filled.number, number);
        verify(&filled, &windows[number], &samples, 0);
        count += 1;
    }
    assert_eq!(count, 10);
}

#[test]
fn looking_ahead_is_bounded_by_the_buffers_which_are_used_again() {
    let directory = directory();
    let samples = [sample(&directory, "data", 40 * KIB)];
    let windows = row(0, 4 * KIB, 10);
    let begun = Count::default();
    let backend = {
        let begun = begun.clone();
        scripted(move |_, _| begun.add())
    };
    let files = vec![Arc::clone(&samples[0].file)];
    let mut stream = RangeStream::new(
        files,
        windows.clone(),
        backend,
        params(3, 4 * KIB, 2),
        Control::new(),
    )
    .unwrap();
    begun.wait_for(3);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(begun.get(), 3, "windows read ahead with 3 buffers");
    let first = stream.next().unwrap().unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(begun.get(), 3, "a lease still takes its buffer");
    let mut places = HashSet::from([first.bytes.as_ptr()]);
    drop(first);
    begun.wait_for(4);
    for filled in stream {
        places.insert(filled.unwrap().bytes.as_ptr());
    }
    assert!(places.len() <= 3, "{} places of 3 buffers", places.len());
}

#[test]
fn streams_of_nothing_are_streams_too() {
    let directory = directory();
    let samples = [sample(&directory, "data", 10_000)];
    let files = || vec![Arc::clone(&samples[0].file)];

    let mut none =
        RangeStream::new(vec![], vec![], sync(), params(2, 0, 2), Control::new()).unwrap();
    assert!(none.next().is_none() && none.next().is_none());
    assert!(poll_to_end(&mut none).is_none());

    // Without a byte; without an extent; with an empty extent in the middle of another.
    let mut windows = vec![ReadWindow::default(); 100];
    windows.push(ReadWindow {
        extents: vec![],
        buffer_bytes: 10,
    });
    windows.push(ReadWindow {
        extents: vec![
            ReadExtent {
                file: 0,
                range: 5..10,
                at: 0,
            },
            ReadExtent {
                file: 0,
                range: 7..7,
                at: 2,
            },
        ],
        buffer_bytes: 5,
    });
    windows.extend(vec![ReadWindow::default(); 3]);
    for buffers in 1..3 {
        let hooked = Count::default();
        let hook: WindowHook = {
            let hooked = hooked.clone();
            Arc::new(move |_, _| {
                hooked.add();
                Ok(())
            })
        };
        let stream = RangeStream::with_hook(
            files(),
            windows.clone(),
            sync(),
            params(buffers, 10, 3),
            Control::new(),
            hook,
        )
        .unwrap();
        let mut sizes = Vec::new();
        for filled in stream {
            let filled = filled.unwrap();
            verify(&filled, &windows[filled.number], &samples, 0);
            sizes.push(filled.bytes.len());
        }
        let expected: Vec<_> = windows.iter().map(|window| window.buffer_bytes).collect();
        assert_eq!(sizes, expected);
        assert_eq!(hooked.get(), windows.len() as u64);
    }

    // Windows without a byte take no buffer, so holding them stalls nothing.
    let windows = [vec![ReadWindow::default(); 50], row(0, 10, 1)].concat();
    let stream = RangeStream::new(files(), windows, sync(), params(1, 10, 1), Control::new());
    let held: Vec<_> = stream.unwrap().map(Result::unwrap).collect();
    assert_eq!(held.len(), 51);
}

// ---- what is refused ----

#[test]
fn windows_that_do_not_fit_are_refused_with_the_numbers() {
    let directory = directory();
    let sample = sample(&directory, "data", 10_000);
    let extent = |range, at| ReadExtent { file: 0, range, at };
    let path = sample.path.display().to_string();
    #[allow(clippy::reversed_empty_ranges)]
    let cases = [
        (
            vec![],
            4097,
            "takes 4097 bytes of a buffer, but a buffer has 4096",
        ),
        (
            vec![ReadExtent {
                file: 3,
                range: 0..1,
                at: 0,
            }],
            10,
            "file number 3, but the stream has 1 files",
        ),
        (vec![extent(7..5, 0)], 10, "extent 7..5"),
        (vec![extent(0..11, 0)], 10, "extent 0..11"),
        (vec![extent(0..1, 10)], 10, "exceeds the 10 bytes"),
        (vec![extent(0..u64::MAX, 1)], 10, "exceeds the 10 bytes"),
        (vec![extent(0..9, usize::MAX)], 10, "exceeds the 10 bytes"),
        (
            vec![extent(100..105, 4), extent(0..5, 0)],
            10,
            "at byte 0 and its extent 100..105",
        ),
        (vec![extent(0..5, 0), extent(0..1, 2)], 10, "overlap"),
    ];
    for (extents, buffer_bytes, expected) in cases {
        let names_the_file = extents.iter().any(|extent| extent.file == 0);
        let windows = vec![
            window(0, 0, 10),
            ReadWindow {
                extents,
                buffer_bytes,
            },
        ];
        let files = vec![Arc::clone(&sample.file)];
        let stream = RangeStream::new(files, windows, sync(), params(2, 4096, 2), Control::new());
        let Err(error @ Error::InvalidWindow { window: 1, .. }) = stream else {
            panic!("{expected}: {stream:?}")
        };
        let message = error.to_string();
        assert!(message.contains(expected), "{message:?}: {expected:?}");
        assert_eq!(message.contains(&path), names_the_file, "{message}");
    }
}

#[test]
fn parameters_outside_their_range_are_refused() {
    let good = params(1, 1, 1);
    let mut cases = Vec::new();
    for value in [0, StreamParams::MAX_BUFFERS + 1] {
        let mut bad = good;
        bad.buffers = value;
        cases.push(("buffers", bad));
    }
    for value in [0, StreamParams::MAX_READERS + 1] {
        let mut bad = good;
        bad.readers = value;
        cases.push(("readers", bad));
    }
    let mut bad = good;
    bad.transfer.workers = 0;
    cases.push(("workers", bad));
    for (expected, bad) in cases {
        let stream = RangeStream::new(vec![], vec![], sync(), bad, Control::new());
        assert!(
            matches!(stream, Err(Error::InvalidParameter { parameter, .. }) if parameter == expected),
            "{expected}: {stream:?}"
        );
    }
}

#[test]
fn buffers_that_no_machine_has_are_refused() {
    let window = ReadWindow {
        extents: vec![],
        buffer_bytes: usize::MAX / 4,
    };
    let params = params(1, window.buffer_bytes, 1);
    let stream = RangeStream::new(vec![], vec![window], sync(), params, Control::new());
    assert!(matches!(stream, Err(Error::Memory { .. })), "{stream:?}");
}

// ---- what fails on the way ----

/// Ten windows, of which the one at `failing` is of a file that has become too short. The first window is read after
/// that has failed.
fn failing_stream(directory: &tempfile::TempDir, failing: usize) -> ([Sample; 2], RangeStream) {
    let samples = [
        sample(directory, "good", 40 * KIB),
        sample(directory, "short", 8 * KIB),
    ];
    let shortened = OpenOptions::new().write(true).open(&samples[1].path);
    shortened.unwrap().set_len(5000).unwrap();
    let mut windows = row(0, 4 * KIB, 10);
    windows[failing] = window(1, 4 * KIB, 4 * KIB);
    let failing_offset = 4 * KIB;
    let begun = Count::default();
    let backend = scripted(move |offset, _| match offset {
        0 => {
            begun.wait_for(1);
            std::thread::sleep(Duration::from_millis(20));
        }
        _ if offset == failing_offset => begun.add(),
        _ => {}
    });
    let files = samples.iter().map(|s| Arc::clone(&s.file)).collect();
    let stream = RangeStream::new(
        files,
        windows,
        backend,
        params(8, 4 * KIB, 5),
        Control::new(),
    );
    (samples, stream.unwrap())
}

#[test]
fn an_error_comes_at_its_turn_and_is_the_end() {
    for polls in [false, true] {
        let directory = directory();
        let (samples, mut stream) = failing_stream(&directory, 3);
        let mut next = || {
            if polls {
                poll_to_end(&mut stream)
            } else {
                stream.next()
            }
        };
        let earlier: Vec<_> = (0..3).map(|_| next().unwrap().unwrap()).collect();
        let error = next().unwrap().unwrap_err();
        assert!(
            matches!(&error, Error::UnexpectedEof { path, .. } if *path == samples[1].path),
            "{error:?}"
        );
        assert!(next().is_none() && next().is_none());
        assert_eq!(stream.stats().windows, 3);
        drop(stream);
        for (number, filled) in earlier.iter().enumerate() {
            verify(filled, &window(0, number * 4 * KIB, 4 * KIB), &samples, 0);
        }
    }
}

#[test]
fn a_file_that_is_cut_while_it_is_streamed_is_noticed() {
    for backend in backends() {
        let directory = directory();
        let samples = [sample(&directory, "data", 40 * KIB)];
        let windows = row(0, 10 * KIB, 4);
        let files = vec![Arc::clone(&samples[0].file)];
        // With one buffer, nothing is read while the first window is held.
        let mut stream = RangeStream::new(
            files,
            windows.clone(),
            backend,
            params(1, 10 * KIB, 2),
            Control::new(),
        )
        .unwrap();
        let first = stream.next().unwrap().unwrap();
        let file = OpenOptions::new().write(true).open(&samples[0].path);
        file.unwrap().set_len(25_000).unwrap();
        verify(&first, &windows[0], &samples, 0);
        drop(first);
        verify(&stream.next().unwrap().unwrap(), &windows[1], &samples, 0);
        let error = stream.next().unwrap().unwrap_err();
        assert!(
            matches!(
                error,
                Error::UnexpectedEof {
                    actual_end: 25_000,
                    ..
                }
            ),
            "{error:?}"
        );
        assert!(stream.next().is_none());
    }
}

#[test]
fn a_panic_reaches_the_consumer_at_its_turn() {
    let directory = directory();
    let samples = [sample(&directory, "data", 40 * KIB)];
    let windows = row(0, 4 * KIB, 10);
    for (polls, in_hook) in [(false, true), (true, true), (false, false), (true, false)] {
        let hook: WindowHook = Arc::new(move |number, _| {
            assert!(!(in_hook && number == 2), "as meant in window {number}");
            Ok(())
        });
        let backend = scripted(move |offset, _| {
            assert!(in_hook || offset != 8 * KIB, "as meant in window 2");
        });
        let mut stream = RangeStream::with_hook(
            vec![Arc::clone(&samples[0].file)],
            windows.clone(),
            backend,
            params(4, 4 * KIB, 3),
            Control::new(),
            hook,
        )
        .unwrap();
        let mut next = || {
            if polls {
                poll_to_end(&mut stream)
            } else {
                stream.next()
            }
        };
        for window in &windows[..2] {
            verify(&next().unwrap().unwrap(), window, &samples, 0);
        }
        let panic = catch_unwind(AssertUnwindSafe(&mut next)).unwrap_err();
        assert_eq!(message(panic.as_ref()), "as meant in window 2");
        assert!(next().is_none());
    }
}

#[test]
fn an_error_of_the_hook_comes_at_its_turn_and_ends_the_stream() {
    let directory = directory();
    let samples = [sample(&directory, "data", 40 * KIB)];
    let windows = row(0, 4 * KIB, 10);
    for polls in [false, true] {
        let hooked = Count::default();
        let hook: WindowHook = {
            let hooked = hooked.clone();
            Arc::new(move |number, _| {
                hooked.add();
                match number {
                    // After the window behind it, so that the order is not by chance.
                    2 => hooked.wait_for(4),
                    3 => {}
                    _ => return Ok(()),
                }
                Err(Error::InvalidWindow {
                    window: number,
                    reason: "as meant".to_owned(),
                })
            })
        };
        let mut stream = RangeStream::with_hook(
            vec![Arc::clone(&samples[0].file)],
            windows.clone(),
            sync(),
            params(4, 4 * KIB, 3),
            Control::new(),
            hook,
        )
        .unwrap();
        let mut next = || {
            if polls {
                poll_to_end(&mut stream)
            } else {
                stream.next()
            }
        };
        for window in &windows[..2] {
            verify(&next().unwrap().unwrap(), window, &samples, 0);
        }
        let error = next().unwrap().unwrap_err();
        assert!(
            matches!(error, Error::InvalidWindow { window: 2, .. }),
            "{error:?}"
        );
        assert!(next().is_none());
    }
}

#[test]
fn a_panicking_progress_callback_reaches_the_consumer() {
    let directory = directory();
    let sample = sample(&directory, "data", 40 * KIB);
    let control = Control::new().with_progress(|_| panic!("as meant"));
    let files = vec![sample.file];
    let mut stream = RangeStream::new(
        files,
        row(0, 4 * KIB, 10),
        sync(),
        params(4, 4 * KIB, 3),
        control,
    )
    .unwrap();
    let panic = catch_unwind(AssertUnwindSafe(|| stream.next())).unwrap_err();
    assert_eq!(message(panic.as_ref()), "as meant");
    assert!(stream.next().is_none());
}

// ---- leases ----

fn short_stream(directory: &tempfile::TempDir, params: StreamParams) -> (Sample, RangeStream) {
    let sample = sample(directory, "data", 40 * KIB);
    let files = vec![Arc::clone(&sample.file)];
    let windows = row(0, 4 * KIB, 10);
    let stream = RangeStream::new(files, windows, sync(), params, Control::new());
    (sample, stream.unwrap())
}

#[test]
fn a_consumer_that_holds_every_buffer_is_told_and_can_go_on() {
    let patience = Duration::from_millis(30);
    for polls in [false, true] {
        let directory = directory();
        let params = params(2, 4 * KIB, 3).with_lease_timeout(patience);
        let (sample, mut stream) = short_stream(&directory, params);
        let next = |stream: &mut RangeStream| {
            if polls {
                poll_to_end(stream)
            } else {
                stream.next()
            }
        };
        let mut held: Vec<_> = (0..2)
            .map(|_| next(&mut stream).unwrap().unwrap())
            .collect();
        for stalls in 1..3 {
            let begin = Instant::now();
            let error = next(&mut stream).unwrap().unwrap_err();
            assert!(begin.elapsed() >= patience);
            let Error::LeasesHeld {
                held: 2,
                buffers: 2,
                waited,
            } = error
            else {
                panic!("{error:?}")
            };
            assert!(waited >= patience);
            assert!(error.to_string().contains("2 of 2"), "{error}");
            assert_eq!(stream.stats().lease_stalls, stalls);
        }
        let stats = stream.stats();
        assert!(stats.lease_stall_elapsed >= 2 * patience, "{stats:?}");
        assert!(
            stats.consumer_wait >= stats.lease_stall_elapsed,
            "{stats:?}"
        );
        assert!(stats.reader_wait == Duration::ZERO, "{stats:?}");
        held.remove(0);
        let third = next(&mut stream).unwrap().unwrap();
        let stats = stream.stats();
        assert!(stats.reader_wait >= patience, "{stats:?}");
        assert_eq!((stats.windows, stats.peak_leases), (3, 2));
        verify(&held[0], &window(0, 4 * KIB, 4 * KIB), &[sample], 0);
        drop((held, third));
        let rest: Vec<_> = std::iter::from_fn(|| next(&mut stream))
            .map(|filled| filled.unwrap().number)
            .collect();
        assert_eq!(rest, (3..10).collect::<Vec<_>>());
    }
}

#[test]
fn a_lease_that_is_dropped_elsewhere_ends_the_wait() {
    for polls in [false, true] {
        let filled = within(LONG / 2, move || {
            let directory = directory();
            let (_sample, mut stream) = short_stream(&directory, params(1, 4 * KIB, 2));
            let first = stream.next().unwrap().unwrap();
            let dropper = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(30));
                drop(first);
            });
            let second = if polls {
                poll_to_end(&mut stream)
            } else {
                stream.next()
            };
            dropper.join().unwrap();
            let stats = stream.stats();
            assert_eq!(stats.lease_stalls, 1);
            assert!(stats.lease_stall_elapsed > Duration::ZERO);
            assert!(stats.consumer_wait >= stats.lease_stall_elapsed);
            std::thread::sleep(Duration::from_millis(5));
            let later = stream.stats().lease_stall_elapsed;
            assert_eq!(later, stats.lease_stall_elapsed, "the stall is over");
            second.unwrap().unwrap()
        });
        assert_eq!(filled.number, 1);
    }
}

#[test]
fn without_patience_the_answer_comes_at_once() {
    let directory = directory();
    let params = params(1, 4 * KIB, 1).with_lease_timeout(Duration::ZERO);
    let (_sample, mut stream) = short_stream(&directory, params);
    let first = stream.next().unwrap().unwrap();
    assert!(matches!(stream.next(), Some(Err(Error::LeasesHeld { .. }))));
    let waker = Waker::noop();
    assert!(matches!(
        poll(&mut stream, waker),
        Poll::Ready(Some(Err(Error::LeasesHeld { .. })))
    ));
    drop(first);
    assert_eq!(stream.next().unwrap().unwrap().number, 1);
}

#[test]
fn patience_may_be_boundless() {
    within(LONG, || {
        let directory = directory();
        let params = params(1, 4 * KIB, 1).with_lease_timeout(Duration::MAX);
        let (_sample, mut stream) = short_stream(&directory, params);
        let first = stream.next().unwrap().unwrap();
        assert!(poll(&mut stream, Waker::noop()).is_pending());
        drop(first);
        assert_eq!(stream.next().unwrap().unwrap().number, 1);
    });
}

#[test]
fn leases_outlive_the_stream() {
    let directory = directory();
    let (sample, mut stream) = short_stream(&directory, params(4, 4 * KIB, 2));
    let held: Vec<_> = stream.by_ref().take(3).map(Result::unwrap).collect();
    drop(stream);
    // Whatever else is allocated now does not go where the leases are.
    let other: Vec<_> = (0..64).map(|_| vec![0xAA_u8; 4 * KIB]).collect();
    let samples = [sample];
    for filled in &held {
        let place = window(0, filled.number * 4 * KIB, 4 * KIB);
        verify(filled, &place, &samples, 0);
    }
    drop(other);
    let clone = held[1].bytes.clone();
    drop(held);
    assert_eq!(clone, samples[0].content[4 * KIB..8 * KIB]);
}

// ---- being dropped and cancelled ----

/// A stream whose two readers read until they are cancelled, and then until the second count says so.
fn endless_stream(control: Control) -> (tempfile::TempDir, RangeStream, [Count; 3]) {
    let directory = directory();
    let sample = sample(&directory, "data", 40 * KIB);
    let counts = [Count::default(), Count::default(), Count::default()];
    let [begun, may_end, ended] = counts.clone();
    let backend = scripted(move |_, control| {
        begun.add();
        while !control.is_cancelled() {
            std::thread::sleep(Duration::from_millis(1));
        }
        may_end.wait_for(1);
        ended.add();
    });
    let files = vec![sample.file];
    let windows = row(0, 4 * KIB, 10);
    let stream = RangeStream::new(files, windows, backend, params(4, 4 * KIB, 2), control);
    (directory, stream.unwrap(), counts)
}

#[test]
fn dropping_it_cancels_it_and_waits_for_what_is_in_flight() {
    within(LONG, || {
        let token = CancelToken::new();
        let control = Control::new().with_cancel(token.clone());
        let (_directory, stream, [begun, may_end, ended]) = endless_stream(control);
        begun.wait_for(2);
        let dropped = Count::default();
        let dropping = {
            let dropped = dropped.clone();
            std::thread::spawn(move || {
                drop(stream);
                dropped.add();
            })
        };
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!((dropped.get(), ended.get()), (0, 0));
        may_end.add();
        dropping.join().unwrap();
        assert_eq!((ended.get(), begun.get()), (2, 2), "ended, begun");
        assert!(!token.is_cancelled(), "the caller's token is the caller's");
    });
}

#[test]
fn detaching_it_waits_for_nothing() {
    within(LONG, || {
        let (_directory, stream, [begun, may_end, ended]) = endless_stream(Control::new());
        begun.wait_for(2);
        stream.detach();
        assert_eq!(ended.get(), 0);
        may_end.add();
        ended.wait_for(2);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(begun.get(), 2, "reads after the end");
    });
}

#[test]
fn cancelling_ends_it_while_every_buffer_is_leased_out() {
    for (polls, by_parent) in [(false, false), (false, true), (true, false), (true, true)] {
        within(LONG / 2, move || {
            let directory = directory();
            let sample = sample(&directory, "data", 40 * KIB);
            let token = CancelToken::new();
            let control = if by_parent {
                Control::new().with_cancel(token.child())
            } else {
                Control::new().with_cancel(token.clone())
            };
            let windows = row(0, 4 * KIB, 10);
            let params = params(2, 4 * KIB, 2);
            let files = vec![Arc::clone(&sample.file)];
            let mut stream = RangeStream::new(files, windows, sync(), params, control).unwrap();
            let held: Vec<_> = stream.by_ref().take(2).map(Result::unwrap).collect();
            let canceller = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(30));
                token.cancel();
            });
            let item = if polls {
                poll_to_end(&mut stream)
            } else {
                stream.next()
            };
            assert!(matches!(item, Some(Err(Error::Cancelled))), "{item:?}");
            assert!(stream.next().is_none());
            canceller.join().unwrap();
            let samples = [sample];
            for filled in &held {
                let place = window(0, filled.number * 4 * KIB, 4 * KIB);
                verify(filled, &place, &samples, 0);
            }
        });
    }
}

#[test]
fn cancelling_ends_it_while_a_window_is_read() {
    for polls in [false, true] {
        within(LONG / 2, move || {
            let token = CancelToken::new();
            let control = Control::new().with_cancel(token.clone());
            let (_directory, mut stream, [begun, may_end, ended]) = endless_stream(control);
            begun.wait_for(2);
            let canceller = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(30));
                token.cancel();
            });
            // The reads go on until they may end: the consumer is not made to wait for them.
            let item = if polls {
                poll_to_end(&mut stream)
            } else {
                stream.next()
            };
            assert!(matches!(item, Some(Err(Error::Cancelled))), "{item:?}");
            assert!(stream.next().is_none());
            assert_eq!(ended.get(), 0);
            canceller.join().unwrap();
            may_end.add();
        });
    }
}

#[test]
fn a_stream_that_was_cancelled_before_it_began_reads_nothing() {
    let token = CancelToken::new();
    token.cancel();
    let begun = Count::default();
    let backend = {
        let begun = begun.clone();
        scripted(move |_, _| begun.add())
    };
    let directory = directory();
    let sample = sample(&directory, "data", 40 * KIB);
    let files = vec![sample.file];
    let control = Control::new().with_cancel(token);
    let windows = row(0, 4 * KIB, 10);
    let mut stream =
        RangeStream::new(files, windows, backend, params(4, 4 * KIB, 2), control).unwrap();
    assert!(matches!(stream.next(), Some(Err(Error::Cancelled))));
    assert!(stream.next().is_none());
    drop(stream);
    assert_eq!(begun.get(), 0);
}

#[test]
fn a_token_serves_one_stream_after_the_other() {
    let token = CancelToken::new();
    let directory = directory();
    let sample = sample(&directory, "data", 40 * KIB);
    for _ in 0..3 {
        let control = Control::new().with_cancel(token.clone());
        let files = vec![Arc::clone(&sample.file)];
        let windows = row(0, 4 * KIB, 10);
        let stream = RangeStream::new(files, windows, sync(), params(2, 4 * KIB, 2), control);
        assert_eq!(stream.unwrap().filter(Result::is_ok).count(), 10);
    }
    assert!(!token.is_cancelled());
}

// ---- asynchronous use ----

#[test]
fn polling_says_when_to_poll_again() {
    let directory = directory();
    let samples = [sample(&directory, "data", 40 * KIB)];
    let windows = row(0, 4 * KIB, 10);
    let may_read = Count::default();
    let backend = {
        let may_read = may_read.clone();
        scripted(move |_, _| may_read.wait_for(1))
    };
    let files = vec![Arc::clone(&samples[0].file)];
    let params = params(3, 4 * KIB, 2);
    let mut stream =
        RangeStream::new(files, windows.clone(), backend, params, Control::new()).unwrap();
    let (early, early_waker) = counting_waker();
    let (woken, waker) = counting_waker();
    assert!(poll(&mut stream, &early_waker).is_pending());
    assert!(poll(&mut stream, &waker).is_pending());
    may_read.add();
    woken.wait_for(1);
    assert_eq!(early.get(), 0, "only the last task to poll is woken");
    let Poll::Ready(Some(Ok(filled))) = poll(&mut stream, &waker) else {
        panic!("woken for nothing")
    };
    verify(&filled, &windows[0], &samples, 0);
}

/// One thread runs all tasks. The window can only be read once another task has run.
#[cfg(feature = "async")]
#[test]
fn polling_leaves_the_executor_to_other_tasks() {
    let numbers = within(LONG, || {
        let directory = directory();
        let sample = sample(&directory, "data", 40 * KIB);
        let may_read = Count::default();
        let backend = {
            let may_read = may_read.clone();
            scripted(move |_, _| may_read.wait_for(1))
        };
        let files = vec![sample.file];
        let windows = row(0, 4 * KIB, 10);
        let mut stream = RangeStream::new(
            files,
            windows,
            backend,
            params(3, 4 * KIB, 2),
            Control::new(),
        )
        .unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime.block_on(async move {
            let polled = tokio::spawn(async move {
                let mut numbers = Vec::new();
                while let Some(filled) =
                    std::future::poll_fn(|context| Pin::new(&mut stream).poll_next(context)).await
                {
                    numbers.push(filled.unwrap().number);
                }
                stream.detach();
                numbers
            });
            tokio::task::yield_now().await;
            may_read.add();
            polled.await.unwrap()
        })
    });
    assert_eq!(numbers, (0..10).collect::<Vec<_>>());
}
