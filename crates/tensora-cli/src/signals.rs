//! Signals while files are written: the files are removed, which a killed process could not do.

use std::ffi::c_int;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use tensora::CancelToken;

/// The signals that ask a program to end.
const REQUESTS_TO_END: &[c_int] = &[
    SIGINT,
    SIGTERM,
    #[cfg(unix)]
    signal_hook::consts::SIGHUP,
];

/// How often is looked whether one came. A person does not notice, and it costs nothing.
const INTERVAL: Duration = Duration::from_millis(20);

/// The last request to end that came while it was watched for, 0 before any.
static RECEIVED: AtomicUsize = AtomicUsize::new(0);

/// What shells report for a program that was interrupted: 128 and the number of the signal.
pub(crate) fn exit_status() -> u8 {
    let number = match RECEIVED.load(Ordering::SeqCst) {
        0 => usize::try_from(SIGINT).unwrap_or_default(),
        number => number,
    };
    u8::try_from(128 + number).unwrap_or(u8::MAX)
}

/// From now on, `cancel` is cancelled instead of the process killed. A signal that the process was
/// started to ignore, as `nohup` does with SIGHUP, stays ignored.
pub(crate) fn watch(cancel: CancelToken) -> Result<()> {
    let ignored = ignored_mask();
    for &signal in REQUESTS_TO_END {
        let number = usize::try_from(signal).unwrap_or_default();
        if !is_in(ignored, signal) {
            flag::register_usize(signal, &RECEIVED, number)
                .with_context(|| format!("could not watch for signal {signal}"))?;
        }
    }
    thread::Builder::new()
        .name("tensora-signals".to_owned())
        .spawn(move || {
            while RECEIVED.load(Ordering::SeqCst) == 0 {
                thread::sleep(INTERVAL);
            }
            cancel.cancel();
        })
        .context(
            "could not start the thread that watches for Ctrl-C; raise the limits on processes \
             (ulimit -u) and on address space (ulimit -v)",
        )?;
    Ok(())
}

/// From now on, a write past the limit on file sizes (`ulimit -f`) fails, instead of killing the
/// process.
pub(crate) fn survive_file_size_limit() -> Result<()> {
    #[cfg(unix)]
    {
        use std::sync::Arc;
        use std::sync::atomic::AtomicBool;

        use signal_hook::consts::SIGXFSZ;

        // Nobody reads the flag: the failed write says it all. But a signal has to have a handler, or
        // be ignored, not to kill.
        if !is_in(ignored_mask(), SIGXFSZ) {
            flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false)))
                .context("could not watch for the limit on file sizes")?;
        }
    }
    Ok(())
}

fn is_in(mask: u64, signal: c_int) -> bool {
    let place = u32::try_from(signal - 1).unwrap_or(u32::MAX);
    mask.checked_shr(place).is_some_and(|rest| rest & 1 == 1)
}

/// The signals that this process ignores, the first one in the lowest bit. None where the system does
/// not tell: to ask it otherwise would take unsafe code.
fn ignored_mask() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    parse_ignored(&status).unwrap_or(0)
}

fn parse_ignored(status: &str) -> Option<u64> {
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))?;
    u64::from_str_radix(mask.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_found() {
        let mask =
            parse_ignored("Name:\tcat\nSigBlk:\t0000000000000002\nSigIgn:\t0000000000001001\n");
        let mask = mask.unwrap();
        let found: Vec<c_int> = (1..=64).filter(|&signal| is_in(mask, signal)).collect();
        assert_eq!(found, [1, 13]);
        assert_eq!(parse_ignored("Name:\tcat\n"), None);
    }
}
