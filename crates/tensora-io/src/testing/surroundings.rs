//! Checks of what surrounds a call: other threads, async runtimes, and what is left behind.

// A check owns its trial, whose files go when it ends.
#![allow(clippy::needless_pass_by_value)]

use super::fixture::{Arena, KIB, MIB, Place, Random, Sample, Slot, Trial, params};
use crate::{CancelToken, Control, Error, ReadStats, Result, TransferParams};

/// Many loads at once through one backend do not see each other, nor that others are cancelled or panic.
pub(super) fn concurrent_loads(trial: Trial) {
    let samples: Vec<Sample> = (0..4)
        .map(|number| trial.sample(&format!("sample-{number}"), 200_000 + number))
        .collect();
    let all_params = trial.few_params(&samples[0]);
    let load = &|thread: usize| {
        let fate = [Fate::Completes, Fate::IsCancelled, Fate::Panics][thread % 3];
        let mut random = Random::new(trial.random().next() ^ thread as u64);
        for _ in 0..4 {
            let slots: Vec<Slot<'_>> = (0..1 + random.below(8))
                .map(|_| {
                    let sample = &samples[random.below(samples.len())];
                    let offset = random.below(sample.len());
                    let len = random.below(sample.len() - offset + 1);
                    sample.slot(offset, len).at(Place::Skewed(random.below(2)))
                })
                .collect();
            let params = &all_params[random.below(all_params.len())];
            trial.read(&slots, params);
            match meet(&trial, &slots, params, fate) {
                (arena, Ok(Ok(_))) => arena.verify(&slots, params),
                (_, Ok(Err(Error::Cancelled))) if fate == Fate::IsCancelled => {}
                (_, Err(_)) if fate == Fate::Panics => {}
                (_, other) => panic!("{fate:?} became {other:?}, with {params:?}"),
            }
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..16)
            .map(|thread| scope.spawn(move || load(thread)))
            .collect();
        for thread in threads {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
    });
}

/// What becomes of a load at its first progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Completes,
    IsCancelled,
    Panics,
}

/// Runs a load into its fate.
fn meet(
    trial: &Trial,
    slots: &[Slot<'_>],
    params: &TransferParams,
    fate: Fate,
) -> (Arena, std::thread::Result<Result<ReadStats>>) {
    let token = CancelToken::new();
    let control = Control::new().with_cancel(token.clone());
    let control = control.with_progress(move |_| match fate {
        Fate::Completes => {}
        Fate::IsCancelled => token.cancel(),
        // Unlike `panic!`, without a message on standard error.
        Fate::Panics => std::panic::resume_unwind(Box::new("the progress callback's own panic")),
    });
    let mut arena = Arena::new(slots);
    let requests = arena.requests(slots);
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        trial.backend.read(requests, params, &control)
    }));
    (arena, outcome)
}

/// A call may come from inside a Tokio runtime of either flavour, from its tasks and from its blocking
/// threads, and a backend may be dropped there.
#[cfg(feature = "async")]
pub(super) fn inside_a_runtime(trial: Trial) {
    use std::sync::Arc;
    use tokio::runtime::Builder;

    let sample = Arc::new(trial.sample("sample", 400_001));
    let trial = Arc::new(trial);
    let load = {
        let (trial, sample) = (Arc::clone(&trial), Arc::clone(&sample));
        move || {
            for &direct in trial.policies(&sample.source) {
                trial.read(&[sample.whole(), sample.slot(1, 5000)], &params(direct));
            }
        }
    };
    let build = |mut builder: Builder| {
        builder
            .build()
            .unwrap_or_else(|error| panic!("a Tokio runtime: {error}"))
    };

    let current_thread = build(Builder::new_current_thread());
    // On the only thread that could run tasks, which therefore nothing may wait for.
    current_thread.block_on(async { load() });

    let mut builder = Builder::new_multi_thread();
    builder.worker_threads(2);
    let multi_thread = build(builder);
    multi_thread.block_on(async {
        // More tasks than threads to run them.
        let tasks: Vec<_> = (0..6)
            .map(|number| {
                let load = load.clone();
                if number % 2 == 0 {
                    tokio::spawn(async move { load() })
                } else {
                    tokio::task::spawn_blocking(load)
                }
            })
            .collect();
        for task in tasks {
            if let Err(error) = task.await {
                std::panic::resume_unwind(error.into_panic());
            }
        }
    });

    drop(load);
    // The last owner, so that the backend is dropped on the runtime's own thread.
    current_thread.block_on(async { drop(trial) });
}

/// Without the feature `async` there is no runtime to be in.
#[cfg(not(feature = "async"))]
pub(super) fn inside_a_runtime(trial: Trial) {
    trial.skip("tensora-io was built without the feature `async`, which brings Tokio");
}

/// See [`signals`](super::signals).
#[cfg(target_os = "linux")]
pub(super) fn signals(trial: Trial) {
    use std::sync::atomic::{AtomicBool, Ordering};

    struct StopOnDrop<'s>(&'s AtomicBool);
    impl Drop for StopOnDrop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    system::ignore_interruptions();
    let sample = trial.sample("sample", 4 * MIB + 7);
    let slots = [sample.whole(), sample.slot(1, 300_000)];
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _guard = StopOnDrop(&stop);
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                system::interrupt_all_threads();
                std::thread::sleep(std::time::Duration::from_micros(100));
            }
        });
        for params in trial.few_params(&sample) {
            for _ in 0..4 {
                // Where that works, so that buffered reads have something to wait for.
                let _ = sample.source.evict();
                trial.read(&slots, &params);
            }
        }
    });
}

#[cfg(not(target_os = "linux"))]
pub(super) fn signals(trial: Trial) {
    trial.skip("only Linux tells which threads there are to interrupt");
}

/// Loads that end in every possible way, so that each can leave something behind.
fn load_in_every_way(trial: &Trial, sample: &Sample, shortened: &Sample) {
    let fully: Vec<Slot<'_>> = (0..8)
        .map(|number| sample.slot(number * 1000, 64 * KIB))
        .chain([sample.whole()])
        .collect();
    for &direct in trial.policies(&sample.source) {
        let params = TransferParams {
            chunk_bytes: 16 << 10,
            ..params(direct)
        };
        trial.read(&fully, &params);

        let (_, outcome) = trial.attempt(&[shortened.whole()], &params, &Control::new());
        assert!(
            matches!(outcome, Err(Error::UnexpectedEof { .. })),
            "{outcome:?}"
        );

        let (_, outcome) = meet(trial, &fully, &params, Fate::IsCancelled);
        assert!(matches!(outcome, Ok(Err(Error::Cancelled))), "{outcome:?}");

        let (_, outcome) = meet(trial, &fully, &params, Fate::Panics);
        assert!(outcome.is_err(), "{outcome:?}");
    }
}

fn leak_samples(trial: &Trial) -> (Sample, Sample) {
    let shortened = trial.sample("shortened", 100_000);
    shortened.shorten(5000);
    (trial.sample("sample", MIB + 7), shortened)
}

/// When its files are dropped, no descriptor and no mapping of them is left in the process.
#[cfg(target_os = "linux")]
pub(super) fn files_are_let_go(trial: Trial) {
    let (sample, shortened) = leak_samples(&trial);
    load_in_every_way(&trial, &sample, &shortened);
    drop((sample, shortened));
    let own = trial.directory().to_string_lossy().into_owned();
    let held = || {
        let mut held = system::descriptors();
        held.extend(system::mappings());
        held.retain(|line| line.contains(&own));
        held
    };
    assert!(
        system::settles(|| held().is_empty()),
        "descriptors or mappings of files are left: {:?}",
        held()
    );
}

/// See [`leaks`](super::leaks).
#[cfg(target_os = "linux")]
pub(super) fn leaks(trial: Trial) {
    const ROUNDS: u64 = 32;
    /// What a pool may keep of its own, far below one thing per load.
    const SLACK: u64 = 8;
    /// Memory moves about in allocators; a lost destination or scratch buffer per load is more.
    const SLACK_BYTES: u64 = 24 << 20;

    let (sample, shortened) = leak_samples(&trial);
    let rounds = |count| {
        for _ in 0..count {
            load_in_every_way(&trial, &sample, &shortened);
        }
    };
    // What is made once and kept is made here.
    rounds(8);
    let descriptors = system::descriptors().len() as u64;
    let threads = system::threads();
    let mappings = system::mappings().len() as u64;
    let anonymous_bytes = system::anonymous_bytes();
    rounds(ROUNDS);
    for (what, before, slack, count) in [
        (
            "descriptors",
            descriptors,
            SLACK,
            (|| system::descriptors().len() as u64) as fn() -> u64,
        ),
        ("threads", threads, SLACK, system::threads),
        ("mappings", mappings, 2 * SLACK, || {
            system::mappings().len() as u64
        }),
        (
            "bytes of memory",
            anonymous_bytes,
            SLACK_BYTES,
            system::anonymous_bytes,
        ),
    ] {
        assert!(
            system::settles(|| count() <= before + slack),
            "{ROUNDS} rounds of loads left {what} behind: {before} before, {} after",
            count()
        );
    }
}

#[cfg(not(target_os = "linux"))]
pub(super) fn files_are_let_go(trial: Trial) {
    let (sample, shortened) = leak_samples(&trial);
    load_in_every_way(&trial, &sample, &shortened);
    trial.skip("only Linux tells which files a process holds");
}

#[cfg(not(target_os = "linux"))]
pub(super) fn leaks(trial: Trial) {
    files_are_let_go(trial);
}

/// What Linux tells about this process.
#[cfg(target_os = "linux")]
mod system {
    use std::time::{Duration, Instant};

    fn text(path: &str) -> String {
        std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    fn directory(path: &str) -> impl Iterator<Item = std::path::PathBuf> {
        std::fs::read_dir(path)
            .unwrap_or_else(|error| panic!("{path}: {error}"))
            .filter_map(|entry| Some(entry.ok()?.path()))
    }

    /// What each open descriptor names.
    pub(super) fn descriptors() -> Vec<String> {
        directory("/proc/self/fd")
            .filter_map(|path| {
                Some(
                    std::fs::read_link(path)
                        .ok()?
                        .to_string_lossy()
                        .into_owned(),
                )
            })
            .collect()
    }

    pub(super) fn threads() -> u64 {
        directory("/proc/self/task").count() as u64
    }

    /// Makes `SIGUSR2` interrupt system calls and do nothing else, from now on.
    #[allow(unsafe_code)]
    pub(super) fn ignore_interruptions() {
        extern "C" fn handle(_signal: libc::c_int) {}
        // SAFETY: for a `sigaction`, all zeros are no flags, above all not `SA_RESTART`, and an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handle as extern "C" fn(libc::c_int) as libc::sighandler_t;
        // SAFETY: the handler does nothing, which is safe at any moment; the old action is not asked for.
        let result =
            unsafe { libc::sigaction(libc::SIGUSR2, &raw const action, std::ptr::null_mut()) };
        assert_eq!(result, 0, "sigaction: {}", std::io::Error::last_os_error());
    }

    /// Sends `SIGUSR2` to every thread of this process.
    #[allow(unsafe_code)]
    pub(super) fn interrupt_all_threads() {
        let process = std::process::id();
        for path in directory("/proc/self/task") {
            let name = path.file_name().and_then(|name| name.to_str());
            if let Some(thread) = name.and_then(|name| name.parse::<libc::pid_t>().ok()) {
                // SAFETY: passes numbers only. A thread that has ended meanwhile is an error, and no matter.
                unsafe { libc::syscall(libc::SYS_tgkill, process, thread, libc::SIGUSR2) };
            }
        }
    }

    pub(super) fn mappings() -> Vec<String> {
        text("/proc/self/maps").lines().map(str::to_owned).collect()
    }

    /// Resident memory that belongs to no file.
    pub(super) fn anonymous_bytes() -> u64 {
        text("/proc/self/status")
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"))
            .and_then(|rest| rest.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok())
            .map_or(0, |kib| kib << 10)
    }

    /// Whether `condition` comes true within the time that ended threads take to disappear.
    pub(super) fn settles(condition: impl Fn() -> bool) -> bool {
        let begin = Instant::now();
        loop {
            if condition() {
                return true;
            }
            if begin.elapsed() > Duration::from_secs(2) {
                return false;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
