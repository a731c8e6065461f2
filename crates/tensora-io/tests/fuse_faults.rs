//! Real backends on a file system that fails, falls short, and takes its time.
//!
//! A wrapper around a backend only sees what the backend says. Here the faults are below the system calls, and the
//! file system knows which reads are not answered yet: when a call has returned, there must be none.
#![cfg(all(feature = "testing", target_os = "linux", not(tensora_portable)))]
#![allow(clippy::unwrap_used)]

mod fuse_support;
mod machine_support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fuse_support::{Caching, Mounted, Plan, mount};
use machine_support::{Denied, deny, in_child, on_a_thread, while_interrupted, with_denied};
use tensora_io::testing::skip;
use tensora_io::{
    Backend, BackendKind, CancelToken, Control, DirectPolicy, Error, ReadRequest, ReadStats,
    Region, ResidentPolicy, Result, SourceFile, TransferParams, backend,
};

const KIB: usize = 1 << 10;
const CHUNK_BYTES: u64 = 16 << 10;
/// How long reads take that are to be under way when something happens.
const DELAY: Duration = Duration::from_micros(DELAY_US);
const DELAY_US: u64 = 150_000;
/// The number of `libc::EIO`.
const EIO: u64 = 5;
const CANARY: u8 = 0xAA;

/// A way of reading: a backend and a policy, on files of one kind.
#[derive(Clone, Copy, Debug)]
struct Way {
    kind: BackendKind,
    direct: DirectPolicy,
    caching: Caching,
}

impl Way {
    /// Whether the kernel itself asks for more, into its page cache, and nobody waits for that.
    fn reads_ahead(self) -> bool {
        let is_direct = self.direct != DirectPolicy::Never && self.kind != BackendKind::Mmap;
        self.caching.is_cached() && !is_direct
    }
}

/// Every way that works here, with a file system of its own, of files of these lengths.
fn for_each_way(what: &str, lens: &[usize], check: impl Fn(Way, &dyn Backend, &Mounted)) {
    for kind in BackendKind::ALL {
        let backend = match backend(kind) {
            Ok(backend) => backend,
            Err(error) => {
                skip(&format!("{what}: {error}"));
                continue;
            }
        };
        for caching in Caching::ALL {
            // Such files cannot be mapped.
            if kind == BackendKind::Mmap && !caching.is_cached() {
                continue;
            }
            for direct in [DirectPolicy::Never, DirectPolicy::Preferred] {
                let Some(mounted) = mount(what, caching, lens) else {
                    continue;
                };
                let way = Way {
                    kind,
                    direct,
                    caching,
                };
                check(way, backend.as_ref(), &mounted);
            }
        }
    }
}

fn params(way: Way) -> TransferParams {
    TransferParams {
        chunk_bytes: CHUNK_BYTES,
        queue_depth: 4,
        workers: 3,
        direct: way.direct,
        resident: ResidentPolicy::Reread,
    }
}

/// Reads are under way for a while.
fn delayed() -> Plan {
    Plan {
        delay_us: DELAY_US,
        ..Plan::default()
    }
}

/// Reads all of a file into memory that holds canaries.
fn read(
    way: Way,
    backend: &dyn Backend,
    file: &SourceFile,
    control: &Control,
) -> (Region, Result<ReadStats>) {
    let mut memory = Region::allocate(usize::try_from(file.len()).unwrap()).unwrap();
    memory.as_mut_slice().fill(CANARY);
    let request = ReadRequest {
        file,
        offset: 0,
        destination: memory.as_mut_slice().into(),
    };
    let outcome = backend.read(vec![request], &params(way), control);
    (memory, outcome)
}

/// Memory is its owner's again right after a call, to be freed and used for something else: nothing is written to it
/// any more. (It is not unmapped here. Memory that the kernel has pinned would then be another, and no write to it
/// would show.)
fn judge_memory(way: Way, mut memory: Region, unanswered: u64) {
    memory.as_mut_slice().fill(CANARY);
    std::hint::black_box(memory.as_mut_slice());
    std::thread::sleep(DELAY + DELAY / 2);
    let found = std::hint::black_box(memory.as_slice());
    let changed = found.iter().filter(|&&byte| byte != CANARY).count();
    assert_eq!(changed, 0, "{way:?}: freed memory was written to");
    assert!(
        unanswered == 0 || way.reads_ahead(),
        "{way:?}: returned while {unanswered} reads were under way"
    );
}

#[test]
fn what_is_right_is_read() {
    for_each_way(
        "what is right is read",
        &[700_001],
        |way, backend, mounted| {
            let file = mounted.open(0);
            let (memory, outcome) = read(way, backend, &file, &Control::new());
            outcome.unwrap_or_else(|error| panic!("{way:?}: {error}"));
            assert!(memory.as_slice() == mounted.content(0), "{way:?}");
        },
    );
}

#[test]
fn a_device_error_is_named_with_its_place() {
    for_each_way(
        "a device error",
        &[700_001, 700_001],
        |way, backend, mounted| {
            for place in [0, 5000, 350_000, 700_000_u64] {
                // Opening for direct reads may try one, of the first block.
                let file = mounted.open(1);
                file.direct_support();
                mounted.answer(Plan {
                    error: Some((1, place, EIO)),
                    ..Plan::default()
                });
                let (_, outcome) = read(way, backend, &file, &Control::new());
                let error = outcome.expect_err("a device error");
                let Error::Read {
                    path,
                    offset,
                    length,
                    ..
                } = &error
                else {
                    panic!("{way:?}: {error:?}");
                };
                assert_eq!(path, &mounted.path(1));
                assert!(
                    (*offset..offset + length).contains(&place),
                    "{way:?}: {error}"
                );
                assert_eq!(
                    error.io_error().unwrap().raw_os_error(),
                    Some(libc::EIO),
                    "{way:?}: {error}"
                );
                // Other files are not affected, nor is this one once the device has recovered.
                let (memory, outcome) = read(way, backend, &mounted.open(0), &Control::new());
                outcome.unwrap_or_else(|error| panic!("{way:?}: {error}"));
                assert!(memory.as_slice() == mounted.content(0), "{way:?}");
                mounted.answer(Plan::default());
                let (memory, outcome) = read(way, backend, &file, &Control::new());
                outcome.unwrap_or_else(|error| panic!("{way:?}: {error}"));
                assert!(memory.as_slice() == mounted.content(1), "{way:?}");
            }
        },
    );
}

/// Only uncached files pass short answers on; of cached ones, the kernel takes them for the end of the file.
#[test]
fn short_reads_of_any_length_are_continued() {
    for_each_way("short reads", &[400_001], |way, backend, mounted| {
        if way.caching.is_cached() {
            return;
        }
        let file = mounted.open(0);
        file.direct_support();
        for least in [1, 512, 4096] {
            mounted.answer(Plan {
                short: Some((least, 1)),
                ..Plan::default()
            });
            let (memory, outcome) = read(way, backend, &file, &Control::new());
            let stats = outcome.unwrap_or_else(|error| panic!("{way:?}, {least}: {error}"));
            assert!(memory.as_slice() == mounted.content(0), "{way:?}, {least}");
            assert!(stats.short_reads > 0, "{way:?}, {least}: {stats:?}");
            assert!(
                stats
                    .fallbacks
                    .iter()
                    .all(|fallback| fallback.reason.contains("inside a block")),
                "{way:?}, {least}: {stats:?}"
            );
        }
    });
}

/// Interruptions, and refusals for the moment, end no load: what is asked again is answered.
#[test]
fn what_fails_for_the_moment_is_read_again() {
    /// More than the kernel keeps to itself, whose read-ahead fails without a word.
    const REFUSALS: u64 = 64;

    for_each_way(
        "failures of the moment",
        &[400_001],
        |way, backend, mounted| {
            for errno in [libc::EINTR, libc::EAGAIN] {
                mounted.answer(Plan::default());
                // The kernel drops what it has of a file that is opened.
                let file = mounted.open(0);
                file.direct_support();
                mounted.answer(Plan {
                    transient: Some((REFUSALS, u64::from(errno.unsigned_abs()))),
                    ..Plan::default()
                });
                let (memory, outcome) = read(way, backend, &file, &Control::new());
                let stats = outcome.unwrap_or_else(|error| panic!("{way:?}, {errno}: {error}"));
                assert!(memory.as_slice() == mounted.content(0), "{way:?}, {errno}");
                assert!(stats.retries > 0, "{way:?}, {errno}: {stats:?}");
            }
        },
    );
}

/// Where reading on is not possible directly, that is said, and not that the file ends.
#[test]
fn direct_reads_that_end_inside_a_block_are_no_end_of_the_file() {
    for_each_way(
        "direct reads that end inside a block",
        &[100_000],
        |way, backend, mounted| {
            if way.direct == DirectPolicy::Never || way.caching.is_cached() {
                return;
            }
            let file = mounted.open(0);
            if !file.direct_support().is_supported() {
                return skip("direct reads that end inside a block: none on FUSE");
            }
            mounted.answer(Plan {
                short: Some((0, 100)),
                ..Plan::default()
            });
            let (memory, outcome) = read(way, backend, &file, &Control::new());
            let stats = outcome.unwrap_or_else(|error| panic!("{way:?}: {error}"));
            assert!(memory.as_slice() == mounted.content(0), "{way:?}");
            assert_eq!(stats.fallbacks.len(), 1, "{way:?}: {stats:?}");
            assert!(stats.direct_bytes < stats.bytes, "{way:?}: {stats:?}");
            let required = Way {
                direct: DirectPolicy::Required,
                ..way
            };
            let (_, outcome) = read(required, backend, &file, &Control::new());
            assert!(
                matches!(&outcome, Err(Error::DirectUnsupported { path, reason })
                if path == &mounted.path(0) && reason.contains("inside a block")),
                "{way:?}: {outcome:?}"
            );
        },
    );
}

#[test]
fn answers_in_any_order_arrive_in_their_places() {
    for_each_way(
        "answers in any order",
        &[300_001, 200_001],
        |way, backend, mounted| {
            mounted.answer(Plan {
                jitter_us: 8000,
                ..Plan::default()
            });
            let files = [mounted.open(0), mounted.open(1)];
            let mut memory = files
                .each_ref()
                .map(|file| vec![CANARY; usize::try_from(file.len()).unwrap()]);
            let requests = files
                .iter()
                .zip(&mut memory)
                .map(|(file, memory)| ReadRequest {
                    file,
                    offset: 0,
                    destination: memory.as_mut_slice().into(),
                })
                .collect();
            backend
                .read(requests, &params(way), &Control::new())
                .unwrap_or_else(|error| panic!("{way:?}: {error}"));
            for (number, memory) in memory.iter().enumerate() {
                assert!(memory == mounted.content(number), "{way:?}");
            }
        },
    );
}

#[test]
fn a_file_that_shrinks_while_it_is_read_is_noticed() {
    for_each_way(
        "a file that shrinks",
        &[600_001],
        |way, backend, mounted| {
            for len in [0, 4096 * 5 + 7, 300_000] {
                mounted.answer(Plan::default());
                let file = mounted.open(0);
                file.direct_support();
                mounted.answer(Plan {
                    delay_us: 1000,
                    shrink: Some((250_000, 8, len)),
                    ..Plan::default()
                });
                let (_, outcome) = read(way, backend, &file, &Control::new());
                match outcome {
                    Err(Error::UnexpectedEof {
                        path, actual_end, ..
                    }) => {
                        assert_eq!(path, mounted.path(0));
                        assert_eq!(actual_end, len, "{way:?}");
                    }
                    other => panic!("{way:?}, {len}: {other:?}"),
                }
            }
        },
    );
}

/// The first error ends the batch, but not before everything under way has come back.
#[test]
fn an_error_in_the_middle_of_a_batch_waits_for_the_rest() {
    for_each_way(
        "an error in the middle of a batch",
        &[512 * KIB],
        |way, backend, mounted| {
            let file = mounted.open(0);
            file.direct_support();
            // While others take their time.
            mounted.answer(Plan {
                error: Some((0, CHUNK_BYTES * 2, EIO)),
                error_delay_us: DELAY_US / 5,
                ..delayed()
            });
            let (memory, outcome) = read(way, backend, &file, &Control::new());
            let unanswered = mounted.unanswered();
            assert!(
                matches!(outcome, Err(Error::Read { .. })),
                "{way:?}: {outcome:?}"
            );
            judge_memory(way, memory, unanswered);
        },
    );
}

#[test]
fn cancellation_waits_for_reads_in_flight() {
    for_each_way(
        "cancellation with reads in flight",
        &[512 * KIB],
        |way, backend, mounted| {
            let file = mounted.open(0);
            file.direct_support();
            mounted.answer(delayed());
            let token = CancelToken::new();
            let control = Control::new().with_cancel(token.clone());
            let (cancelled_at, memory, outcome, unanswered) = std::thread::scope(|scope| {
                let cancel = scope.spawn(|| {
                    mounted.wait_for_unanswered(1);
                    token.cancel();
                    Instant::now()
                });
                let (memory, outcome) = read(way, backend, &file, &control);
                let unanswered = mounted.unanswered();
                (cancel.join().unwrap(), memory, outcome, unanswered)
            });
            assert!(
                matches!(outcome, Err(Error::Cancelled)),
                "{way:?}: {outcome:?}"
            );
            judge_memory(way, memory, unanswered);
            // Far less than the whole batch would take.
            let most = DELAY * 16 + DELAY;
            assert!(
                cancelled_at.elapsed() < most,
                "{way:?}: {:?}",
                cancelled_at.elapsed()
            );
        },
    );
}

/// Waits are interrupted all the time, and nothing is lost or read twice into the wrong place.
#[test]
fn signals_during_waits_do_no_harm() {
    if in_child("signals_during_waits_do_no_harm", |_| {}).is_some() {
        return;
    }
    machine_support::ignore_interruptions();
    for_each_way(
        "signals during waits",
        &[200_001],
        |way, backend, mounted| {
            let file = mounted.open(0);
            mounted.answer(Plan {
                delay_us: 10_000,
                jitter_us: 20_000,
                ..Plan::default()
            });
            let (memory, outcome) = while_interrupted("", Duration::from_micros(500), || {
                read(way, backend, &file, &Control::new())
            });
            outcome.unwrap_or_else(|error| panic!("{way:?}: {error}"));
            assert!(memory.as_slice() == mounted.content(0), "{way:?}");
        },
    );
}

/// A child has copies of memory and of descriptors, rings among them. What it does with them, and its end, must not
/// disturb the reads of its parent.
#[test]
fn a_fork_during_a_read_does_no_harm() {
    for_each_way(
        "a fork during a read",
        &[256 * KIB],
        |way, backend, mounted| {
            let file = mounted.open(0);
            file.direct_support();
            mounted.answer(Plan {
                delay_us: DELAY_US / 3,
                ..Plan::default()
            });
            let mut memory = Region::allocate(256 * KIB).unwrap();
            memory.as_mut_slice().fill(CANARY);
            let (address, len) = (memory.as_slice().as_ptr().expose_provenance(), memory.len());
            let request = ReadRequest {
                file: &file,
                offset: 0,
                destination: memory.as_mut_slice().into(),
            };
            let outcome = std::thread::scope(|scope| {
                scope.spawn(|| {
                    mounted.wait_for_unanswered(1);
                    fork_and_scribble(address, len);
                });
                backend.read(vec![request], &params(way), &Control::new())
            });
            outcome.unwrap_or_else(|error| panic!("{way:?}: {error}"));
            assert!(memory.as_slice() == mounted.content(0), "{way:?}");
        },
    );
}

/// Overwrites the memory in a child process, and waits for its end.
fn fork_and_scribble(address: usize, len: usize) {
    // SAFETY: between fork and exit the child calls nothing but what is allowed after a fork of a process with
    // several threads: it writes to memory and ends.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "fork: {}", std::io::Error::last_os_error());
    if child == 0 {
        let memory: *mut u8 = std::ptr::with_exposed_provenance_mut(address);
        // SAFETY: the child's own copy of a mapping of `len` bytes, which nobody else in the child uses: it has
        // one thread.
        unsafe { memory.write_bytes(0x54, len) };
        // SAFETY: ends the child at once, without running what belongs to its parent.
        unsafe { libc::_exit(0) };
    }
    let mut status = 0;
    // SAFETY: `status` lives until after the call, which waits for the child made above.
    let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert_eq!((waited, status), (child, 0));
}

// ---- rings alone ----

fn ring(what: &str) -> Option<Box<dyn Backend>> {
    backend(BackendKind::IoUring)
        .map_err(|error| skip(&format!("{what}: {error}")))
        .ok()
}

const RING: Way = Way {
    kind: BackendKind::IoUring,
    direct: DirectPolicy::Preferred,
    caching: Caching::Overlaid,
};

/// A filter can keep a process from being told what file system it reads: then it may be this one.
#[test]
fn rings_keep_off_files_of_which_nobody_says_where_they_are() {
    let what = "file systems without a name";
    let (Some(backend), Some(mounted)) = (ring(what), mount(what, Caching::Uncached, &[400_001]))
    else {
        return;
    };
    mounted.answer(Plan {
        short: Some((512, 1)),
        ..Plan::default()
    });
    let way = Way {
        direct: DirectPolicy::Never,
        caching: Caching::Uncached,
        ..RING
    };
    with_denied(what, &[Denied::new(libc::SYS_fstatfs, libc::EPERM)], || {
        let file = mounted.open(0);
        let (memory, outcome) = read(way, backend.as_ref(), &file, &Control::new());
        let stats = outcome.unwrap();
        assert!(memory.as_slice() == mounted.content(0));
        assert!(stats.short_reads > 0, "{stats:?}");
    });
}

/// The backend was made when rings were still allowed.
#[test]
fn a_refused_ring_is_an_error_with_reason_and_remedy() {
    let what = "a refused ring";
    let (Some(backend), Some(mounted)) = (ring(what), mount(what, Caching::Overlaid, &[100_000]))
    else {
        return;
    };
    let file = mounted.open(0);
    for (errno, said) in [
        (libc::EPERM, "seccomp"),
        (libc::ENOMEM, "locked memory"),
        (libc::EMFILE, "ulimit -n"),
    ] {
        on_a_thread(|| {
            if !deny(&[Denied::new(libc::SYS_io_uring_setup, errno)]) {
                return skip(&format!("{what}: no seccomp here"));
            }
            let (memory, outcome) = read(RING, backend.as_ref(), &file, &Control::new());
            let error = outcome.expect_err("a ring without the system call");
            assert!(
                matches!(
                    &error,
                    Error::BackendUnavailable {
                        backend: BackendKind::IoUring,
                        ..
                    }
                ),
                "{error:?}"
            );
            assert!(error.to_string().contains(said), "{error}");
            assert!(memory.as_slice().iter().all(|&byte| byte == CANARY));
        });
    }
}

/// The ring stops to take entries, and to wait, while reads are under way: they are waited for all the same.
#[test]
fn a_ring_that_refuses_entries_waits_for_what_it_has() {
    let what = "a ring that refuses entries";
    let (Some(backend), Some(mounted)) = (ring(what), mount(what, Caching::Overlaid, &[512 * KIB]))
    else {
        return;
    };
    let file = mounted.open(0);
    for errno in [libc::EPERM, libc::ENOMEM] {
        // The first chunk arrives at once, and on the thread that has the ring.
        mounted.answer(Plan {
            prompt: Some(0),
            ..delayed()
        });
        let denied = Arc::new(AtomicBool::new(false));
        let (memory, outcome, unanswered) = on_a_thread(|| {
            let seen = Arc::clone(&denied);
            let control = Control::new().with_progress(move |_| {
                if !seen.load(Ordering::SeqCst) {
                    seen.store(
                        deny(&[Denied::new(libc::SYS_io_uring_enter, errno)]),
                        Ordering::SeqCst,
                    );
                }
            });
            let mut memory = Region::allocate(512 * KIB).unwrap();
            let request = ReadRequest {
                file: &file,
                offset: 0,
                destination: memory.as_mut_slice().into(),
            };
            let params = TransferParams {
                workers: 1,
                queue_depth: 8,
                ..params(RING)
            };
            let outcome = backend.read(vec![request], &params, &control);
            (memory, outcome, mounted.unanswered())
        });
        if !denied.load(Ordering::SeqCst) {
            return skip(&format!("{what}: no seccomp here"));
        }
        let error = outcome.expect_err("a ring without the system call");
        assert!(
            matches!(
                &error,
                Error::Backend {
                    backend: BackendKind::IoUring,
                    ..
                }
            ),
            "{error:?}"
        );
        assert_eq!(
            error.io_error().unwrap().raw_os_error(),
            Some(errno),
            "{error}"
        );
        judge_memory(RING, memory, unanswered);
    }
}

/// As many completions as there can be, which nobody looks at for a while. (More than a ring has room for cannot arrive:
/// see the tests beside the backend, where a ring is made too small.)
#[test]
fn completions_that_pile_up_are_all_taken() {
    let what = "completions that pile up";
    let len = 4096 * 1500 + 5;
    let (Some(backend), Some(mounted)) = (ring(what), mount(what, Caching::Overlaid, &[len]))
    else {
        return;
    };
    for direct in [DirectPolicy::Never, DirectPolicy::Preferred] {
        let file = mounted.open(0);
        let slept = AtomicBool::new(false);
        let control = Control::new().with_progress(move |_| {
            if !slept.swap(true, Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(300));
            }
        });
        let mut memory = vec![CANARY; len];
        let request = ReadRequest {
            file: &file,
            offset: 0,
            destination: memory.as_mut_slice().into(),
        };
        let params = TransferParams {
            chunk_bytes: 4096,
            queue_depth: TransferParams::MAX_QUEUE_DEPTH,
            workers: 1,
            direct,
            resident: ResidentPolicy::Reread,
        };
        let stats = backend.read(vec![request], &params, &control).unwrap();
        assert_eq!(stats.bytes, len as u64);
        assert!(memory == mounted.content(0), "{direct}");
    }
}
