//! A conformance suite for implementors of [`Backend`], wrappers included.
//!
//! [`checks`] lists the promises of the trait, each as something that can be run and that panics with an
//! explanation when the promise is broken. [`conformance`] runs all of them;
//! [`conformance_tests!`](crate::conformance_tests) makes one `#[test]` of each. [`leaks`] and [`signals`]
//! belong to the suite too, but concern the whole process and therefore need one of their own.
//!
//! ```no_run
//! use tensora_io::testing::{Options, conformance};
//! use tensora_io::{BackendKind, backend};
//!
//! conformance(&|| backend(BackendKind::Sync).unwrap(), &Options::default());
//! ```
//!
//! What cannot be checked on a machine is skipped through [`skip`], never silently.
//!
//! For the callers of backends there is [`FaultBackend`], which makes reads go wrong.

mod direct;
mod faults;
mod fixture;
mod interruption;
mod ranges;
mod refusals;
mod surroundings;

use std::fmt;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use crate::Backend;
pub use faults::{Fault, FaultBackend, Faults};
use fixture::Trial;

/// How a check is run.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    /// Where a check makes its files, each time in a fresh directory that is removed afterwards. Direct
    /// I/O is only checked where the file system has it.
    pub directory: PathBuf,
    /// Seed of everything random. It is part of every failure's message.
    pub seed: u64,
    /// How long one check may take before the backend counts as hanging.
    pub timeout: Duration,
}

impl Default for Options {
    /// The system's directory for temporary files, the seed from the environment variable
    /// `TENSORA_SEED` or else from the clock, and five minutes.
    fn default() -> Self {
        Self {
            directory: std::env::temp_dir(),
            seed: seed(),
            timeout: Duration::from_secs(300),
        }
    }
}

/// The seed that a developer asks for, or one that differs from run to run.
fn seed() -> u64 {
    match std::env::var("TENSORA_SEED") {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("TENSORA_SEED={text:?} is not a whole number")),
        Err(_) => std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |elapsed| u64::from(elapsed.subsec_nanos())),
    }
}

/// One promise of [`Backend`].
#[derive(Clone, Copy)]
pub struct Check {
    name: &'static str,
    body: fn(Trial),
}

impl Check {
    /// What it is called, in the form of a function's name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Holds one backend from `make` to the promise.
    ///
    /// The check runs on a thread of its own. When that does not return in time, it is left behind,
    /// with the memory that the backend may still be writing to.
    ///
    /// # Panics
    ///
    /// When the promise is broken. The message names the check, the seed and what went wrong.
    pub fn run(&self, make: &dyn Fn() -> Box<dyn Backend>, options: &Options) {
        let trial = Trial::new(self.name, Arc::from(make()), options);
        let backend = format!("{:?}", trial.backend);
        let directory = trial.directory().to_owned();
        let body = self.body;
        let (done, outcome) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name(self.name.to_owned())
            .spawn(move || {
                // Moved in, so that the sender is dropped when the body panics.
                let done = done;
                body(trial);
                // The receiver is gone only when the time was over, and then nobody listens.
                let _ = done.send(());
            })
            .unwrap_or_else(|error| panic!("a thread for the check {}: {error}", self.name));
        let context = format!("{} of {backend} (TENSORA_SEED={})", self.name, options.seed);
        if outcome.recv_timeout(options.timeout) == Err(mpsc::RecvTimeoutError::Timeout) {
            // The thread that is left behind does not get to it.
            let _ = std::fs::remove_dir_all(directory);
            panic!(
                "{context}: no end after {:?}: the backend hangs",
                options.timeout
            );
        }
        if let Err(panic) = thread.join() {
            panic!("{context}: {}", message(panic.as_ref()));
        }
    }
}

impl fmt::Debug for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Check").field(&self.name).finish()
    }
}

/// What a panic said.
fn message(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("a panic without a message")
}

/// Declares the checks once: as the list behind [`checks`], and as the tests of `conformance_tests!`.
///
/// The first argument is a dollar sign, which a macro cannot write into a macro that it defines.
macro_rules! declare {
    ($dollar:tt $($module:ident::$name:ident)*) => {
        const CHECKS: &[Check] = &[$(Check {
            name: stringify!($name),
            body: $module::$name,
        }),*];

        /// Makes one `#[test]` of each check, in the module in which it stands.
        ///
        /// Its argument is the path of a `fn(&Check)` that runs the check, or skips it where the backend is
        /// unavailable.
        ///
        /// ```
        /// mod plain {
        ///     use tensora_io::testing::{Check, Options, skip};
        ///     use tensora_io::{BackendKind, backend};
        ///
        ///     fn run(check: &Check) {
        ///         if let Err(error) = backend(BackendKind::IoUring) {
        ///             return skip(&error.to_string());
        ///         }
        ///         check.run(&|| backend(BackendKind::IoUring).unwrap(), &Options::default());
        ///     }
        ///
        ///     tensora_io::conformance_tests!(run);
        /// }
        /// ```
        #[macro_export]
        macro_rules! conformance_tests {
            ($dollar run:path) => {
                $(#[test]
                fn $name() {
                    let check = $dollar crate::testing::checks()
                        .iter()
                        .find(|check| check.name() == stringify!($name));
                    $dollar run(check.expect("a declared check"));
                })*
            };
        }
    };
}

declare! { $
    ranges::empty_batch
    ranges::empty_requests
    ranges::single_bytes
    ranges::boundary_sizes
    ranges::whole_files
    ranges::unaligned_ranges
    ranges::misaligned_destinations
    ranges::uninitialised_destinations
    ranges::untouched_memory
    ranges::odd_chunks
    ranges::largest_parameters
    ranges::tiny_ranges
    ranges::overlapping_ranges
    ranges::adjacent_ranges
    ranges::several_files
    ranges::random_batches
    ranges::offsets_beyond_4_gib
    ranges::a_request_over_2_gib
    direct::required_reads_directly
    direct::required_bypasses_the_cache
    direct::aligned_reads_need_no_scratch
    direct::memory_file_system
    refusals::invalid_parameters
    refusals::overflowing_offsets
    refusals::range_past_the_end
    refusals::truncated_after_open
    refusals::truncated_while_reading
    refusals::one_bad_file_among_good_ones
    refusals::deleted_after_open
    refusals::replaced_after_open
    interruption::cancelled_before_the_start
    interruption::cancelled_by_the_progress_callback
    interruption::cancelled_from_another_thread
    interruption::cancelled_at_any_time
    interruption::panicking_progress_callback
    interruption::quiet_after_success
    interruption::quiet_after_an_error
    surroundings::concurrent_loads
    surroundings::inside_a_runtime
    surroundings::files_are_let_go
}

/// Every check, in the order in which [`conformance`] runs them: simple ones first.
pub fn checks() -> &'static [Check] {
    CHECKS
}

/// Holds backends from `make`, a fresh one for each check, to every promise of [`Backend`].
///
/// # Panics
///
/// When a promise is broken, after all checks have run. The message lists every failure.
pub fn conformance(make: &dyn Fn() -> Box<dyn Backend>, options: &Options) {
    let failures: Vec<String> = checks()
        .iter()
        .filter_map(|check| {
            let run = std::panic::AssertUnwindSafe(|| check.run(make, options));
            let panic = std::panic::catch_unwind(run).err()?;
            Some(message(panic.as_ref()).to_owned())
        })
        .collect();
    assert!(
        failures.is_empty(),
        "{} of {} checks failed:\n{}",
        failures.len(),
        checks().len(),
        failures.join("\n")
    );
}

/// Checks that loads, whether they succeed, fail, are cancelled or panic, leave no descriptor, thread or
/// memory behind.
///
/// It counts what the process holds, so nothing else may run in that process. Linux only; elsewhere it
/// is skipped.
///
/// # Panics
///
/// When something is left behind.
pub fn leaks(make: &dyn Fn() -> Box<dyn Backend>, options: &Options) {
    let check = Check {
        name: "leaks",
        body: surroundings::leaks,
    };
    check.run(make, options);
}

/// Checks that loads are complete and right while every thread of the process is interrupted by signals all
/// the time.
///
/// It installs a handler for `SIGUSR2` that stays, and interrupts what else runs in that process. Linux
/// only; elsewhere it is skipped.
///
/// # Panics
///
/// When a load fails.
pub fn signals(make: &dyn Fn() -> Box<dyn Backend>, options: &Options) {
    let check = Check {
        name: "signals",
        body: surroundings::signals,
    };
    check.run(make, options);
}

/// Records that something could not be checked here, and why: as a line on standard error that the test
/// harness does not capture, and in the file that the environment variable `TENSORA_SKIP_LOG` names.
///
/// # Panics
///
/// When that file cannot be written: a skip must not go unnoticed.
pub fn skip(reason: &str) {
    let reason = reason.replace('\n', " ");
    let line = format!("SKIP: {reason}\n");
    skips().push(reason);
    // A closed standard error is no reason to fail.
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(path) = std::env::var_os("TENSORA_SKIP_LOG") {
        // One write in append mode: lines of several processes do not mix.
        let written = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .and_then(|mut log| log.write_all(line.as_bytes()));
        if let Err(error) = written {
            panic!("TENSORA_SKIP_LOG={}: {error}", path.display());
        }
    }
}

/// The reasons of all skips that this process has recorded so far.
pub fn skipped() -> Vec<String> {
    skips().clone()
}

fn skips() -> MutexGuard<'static, Vec<String>> {
    static SKIPS: Mutex<Vec<String>> = Mutex::new(Vec::new());
    SKIPS.lock().unwrap_or_else(PoisonError::into_inner)
}
