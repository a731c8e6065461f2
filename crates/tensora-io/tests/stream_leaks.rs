//! However a stream ends, no thread, memory or descriptor of it is left. One test in a process of its own,
//! because it counts what the whole process holds.
#![cfg(all(feature = "sync", target_os = "linux", not(tensora_portable)))]
#![allow(clippy::unwrap_used)]

mod stream_support;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use stream_support::*;
use tensora_io::{CancelToken, Control, Error, RangeStream, Result, WindowHook};

const WINDOW_BYTES: usize = 1 << 20;
const WINDOWS: usize = 12;
const BUFFERS: u32 = 6;

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Resident memory that belongs to no file.
fn anonymous_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.unwrap().trim().strip_suffix(" kB").unwrap();
    kib.trim().parse::<usize>().unwrap() << 10
}

fn stream(sample: &Sample, control: Control, hook: WindowHook) -> RangeStream {
    RangeStream::with_hook(
        vec![Arc::clone(&sample.file)],
        row(0, WINDOW_BYTES, WINDOWS),
        sync(),
        params(BUFFERS, WINDOW_BYTES, 3).with_lease_timeout(Duration::from_millis(5)),
        control,
        hook,
    )
    .unwrap()
}

fn end_in_every_way(sample: &Sample) {
    let nothing: WindowHook = Arc::new(|_, _| Ok(()));
    let plain = || stream(sample, Control::new(), Arc::clone(&nothing));
    assert_eq!(plain().filter(Result::is_ok).count(), WINDOWS);
    drop(plain());
    drop(plain().next());
    plain().detach();

    let mut outlived = plain();
    let held: Vec<_> = outlived.by_ref().take(4).collect();
    drop(outlived);
    drop(held);

    let mut stalled = plain();
    let held: Vec<_> = stalled.by_ref().take(BUFFERS as usize).collect();
    assert!(matches!(
        stalled.next(),
        Some(Err(Error::LeasesHeld { .. }))
    ));
    drop(held);
    drop(stalled);

    let token = CancelToken::new();
    let control = Control::new().with_cancel(token.clone());
    let mut cancelled = stream(sample, control, Arc::clone(&nothing));
    cancelled.next().unwrap().unwrap();
    token.cancel();
    assert!(matches!(cancelled.next(), Some(Err(Error::Cancelled))));
    drop(cancelled);

    let hook: WindowHook = Arc::new(|number, _| {
        assert_ne!(number, 5);
        Ok(())
    });
    let panicked = stream(sample, Control::new(), hook);
    assert!(catch_unwind(AssertUnwindSafe(|| panicked.count())).is_err());
}

#[test]
fn nothing_is_left_behind() {
    /// Memory moves about in allocators; one lost buffer per stream would be far more.
    const SLACK_BYTES: usize = 4 << 20;

    let directory = tempfile::tempdir().unwrap();
    let sample = sample(&directory, "data", WINDOWS * WINDOW_BYTES);
    // What is made once and kept is made here.
    end_in_every_way(&sample);
    assert!(settles(|| threads() <= 2), "{} threads", threads());
    let (threads_before, descriptors_before, bytes_before) =
        (threads(), descriptors(), anonymous_bytes());
    for _ in 0..16 {
        end_in_every_way(&sample);
    }
    assert!(
        settles(|| threads() == threads_before),
        "{threads_before} threads before, {} after",
        threads()
    );
    assert_eq!(descriptors(), descriptors_before);
    assert!(
        settles(|| anonymous_bytes() < bytes_before + SLACK_BYTES),
        "{bytes_before} bytes before, {} after",
        anonymous_bytes()
    );

    // Leases hold their own buffers and no others, and free them one by one.
    let mut held_on = stream(&sample, Control::new(), Arc::new(|_, _| Ok(())));
    let mut held: Vec<_> = held_on.by_ref().take(4).collect();
    drop(held_on);
    let takes = |buffers: usize| {
        let most = bytes_before + buffers * WINDOW_BYTES + SLACK_BYTES / 8;
        settles(|| anonymous_bytes() < most)
    };
    assert!(anonymous_bytes() > bytes_before + 3 * WINDOW_BYTES);
    while !held.is_empty() {
        assert!(takes(held.len()), "{} leases", held.len());
        held.pop();
    }

    // At its end, a stream keeps no buffers for what might have come.
    let mut finished = stream(&sample, Control::new(), Arc::new(|_, _| Ok(())));
    assert_eq!(finished.by_ref().filter(Result::is_ok).count(), WINDOWS);
    assert!(
        takes(0),
        "{bytes_before} bytes before, {} at the end",
        anonymous_bytes()
    );
    drop(finished);
    // Right after the stream is dropped: its threads were waited for.
    assert!(settles(|| threads() == threads_before));
}
