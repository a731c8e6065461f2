//! Timing of reads that gives comparable figures.
//!
//! [`prepare`] puts the page cache into a [`CacheState`] and says how well that worked, [`prime_memory`] touches the
//! memory that a case is going to need, and [`median`] and [`median_ratio`] turn the times of interleaved
//! rounds into figures that a slow minute does not spoil. [`BarChart`] and [`LineChart`] draw them.
//! [`calibrate`] puts all of this together and makes a profile of what is fastest here.
#![forbid(unsafe_code)]

mod calibrate;
mod error;
mod pages;
mod plot;
mod rounds;
mod sample;
mod settings;
mod statistics;

pub use calibrate::{CalibrateOptions, CalibrateProgress, Calibration, calibrate};
pub use error::{Error, Result};
pub use pages::{prepare, prime_memory, require};
pub use plot::{Bar, BarChart, BarRole, Line, LineChart};
pub use rounds::shuffled;
pub use settings::ReadSetting;
pub use statistics::{geometric_mean, median, median_ratio};
pub use tensora_io::CacheState;
