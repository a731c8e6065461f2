use std::time::Duration;

use tensora_formats::Format;
use tensora_heuristics::Plan;
use tensora_io::ReadStats;
#[cfg(feature = "shared")]
use tensora_io::SharedReport;

/// What a load did, and how fast.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct LoadReport {
    /// Format of the checkpoint.
    pub format: Format,
    /// How it was loaded, and why.
    pub plan: Plan,
    /// How many tensors were loaded.
    pub tensor_count: usize,
    /// Bytes of the loaded tensors; tied tensors count each.
    pub data_bytes: u64,
    /// From the path to usable tensors.
    pub elapsed: Duration,
    /// Of that: reading and validating metadata, until the files were known.
    pub open_elapsed: Duration,
    /// Of that: examining machine and files, and planning.
    pub plan_elapsed: Duration,
    /// Of that: moving bytes, or mapping and populating.
    pub read_elapsed: Duration,
    /// What the backend counted. Empty for mapped memory, where nothing is moved.
    pub stats: ReadStats,
    /// What became of reading together with other ranks, where that was asked for and done through shared
    /// memory.
    #[cfg(feature = "shared")]
    pub shared: Option<SharedReport>,
}

impl LoadReport {
    /// Tensor bytes per second of the whole load.
    #[allow(clippy::cast_precision_loss)]
    pub fn bytes_per_second(&self) -> f64 {
        self.data_bytes as f64 / self.elapsed.as_secs_f64().max(f64::MIN_POSITIVE)
    }
}
