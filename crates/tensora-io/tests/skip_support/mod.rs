//! For tests that are also built without the feature `testing`, which has the same for everybody.
#![allow(dead_code, clippy::unwrap_used, clippy::print_stderr)]

use std::io::Write;

/// Says that a check cannot be made here, and counts it where a log is asked for.
pub(crate) fn skip(what: &str) {
    eprintln!("SKIP: {what}");
    if let Some(log) = std::env::var_os("TENSORA_SKIP_LOG") {
        let mut log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(log)
            .unwrap();
        // One write: lines of several processes do not mix.
        log.write_all(format!("SKIP: {what}\n").as_bytes()).unwrap();
    }
}
