use std::path::PathBuf;

use tensora_io::CacheState;

/// Why nothing can be measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file cannot be opened, read, synced or evicted, or memory cannot be had.
    #[error(transparent)]
    Io(#[from] tensora_io::Error),
    /// A file could not be read while its pages were brought into memory, or synced.
    #[error("cannot {operation} {path}: {source}", path = path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Without this there is no telling cold from warm.
    #[error(
        "{path}: this system does not tell what is in the page cache (cachestat and mincore say nothing \
         about this file; they do for files that you own)",
        path = path.display()
    )]
    ResidencyUnknown {
        /// The file.
        path: PathBuf,
    },
    /// The page cache does not stay as it was asked to be.
    #[error(
        "the files do not stay {state}: {resident_percent:.1} % is in the page cache after several tries; {remedy}"
    )]
    StateNotMade {
        /// What was wanted.
        state: CacheState,
        /// What was found, from 0 to 100.
        resident_percent: f64,
        /// What may help.
        remedy: &'static str,
    },
    /// So little says nothing about a device.
    #[error(
        "the files have {bytes} bytes, and calibration needs {needed_bytes} to say anything about the device; \
         calibrate with a larger checkpoint at the same place"
    )]
    SampleTooSmall {
        /// Bytes of all files together.
        bytes: u64,
        /// What is needed at least.
        needed_bytes: u64,
    },
    /// No way of reading could be timed.
    #[error("nothing could be measured: {reasons}")]
    NothingMeasured {
        /// Why each one failed.
        reasons: String,
    },
    /// A chart cannot be drawn.
    #[error("cannot draw the chart {title:?}: {reason}")]
    Plot {
        /// The chart's title.
        title: String,
        /// Why.
        reason: String,
    },
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
