//! Whether checkpoints hold what they should: against each other, and against digests written down before.

mod blob;
mod check;
mod compare;
mod digests;
mod files;

use tensora_formats::CheckpointIndex;
use tensora_io::Control;

pub use check::{Check, CheckOutcome, CheckSubject, CheckedBy, Verification};
pub(crate) use compare::differences;
pub use compare::{Comparison, Difference, FirstDifference};
pub use digests::{ContentDigests, TensorDigest};
pub(crate) use digests::{TensorHashers, row_major_bytes};

use crate::identity;
use crate::{ConvertOptions, Error, Reading, Result};

/// How checkpoints are read to be digested, compared and checked.
///
/// ```
/// use tensora_convert::VerifyOptions;
/// use tensora_formats::CheckpointIndex;
/// use tensora_io::Control;
///
/// fn same(left: &str, right: &str) -> Result<bool, Box<dyn std::error::Error>> {
///     let (left, right) = (CheckpointIndex::open(left)?, CheckpointIndex::open(right)?);
///     let comparison = VerifyOptions::new().compare(&left, &right, &Control::new())?;
///     for difference in &comparison.differences {
///         println!("{difference}");
///     }
///     Ok(comparison.is_equal())
/// }
/// ```
#[derive(Clone, Debug)]
pub struct VerifyOptions {
    memory_limit_bytes: u64,
    reading: Reading,
}

impl Default for VerifyOptions {
    fn default() -> Self {
        Self {
            memory_limit_bytes: ConvertOptions::DEFAULT_MEMORY_LIMIT_BYTES,
            reading: Reading::default(),
        }
    }
}

impl VerifyOptions {
    /// In how many tensors of equal dtype and shape [`compare`](Self::compare) looks for the first byte
    /// that differs. Each costs reading both up to there again.
    pub const MAX_LOCATED: usize = 8;

    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// The most memory, in bytes, that data on its way takes at any time; by default
    /// [`ConvertOptions::DEFAULT_MEMORY_LIMIT_BYTES`], at least
    /// [`ConvertOptions::MIN_MEMORY_LIMIT_BYTES`]. Metadata and digests come on top.
    #[must_use]
    pub fn memory_limit_bytes(mut self, memory_limit_bytes: u64) -> Self {
        self.memory_limit_bytes = memory_limit_bytes;
        self
    }

    /// How the files are read.
    #[must_use]
    pub fn reading(mut self, reading: Reading) -> Self {
        self.reading = reading;
        self
    }

    /// How many bytes [`digests`](Self::digests) and [`check`](Self::check) report to
    /// [`Control`] by the time they are done with `index`: those of all its tensors in row-major order.
    /// [`compare`](Self::compare) reports those of both checkpoints. Saturating, because a stride of 0
    /// lets a few bytes describe any number of elements.
    pub fn work_bytes(index: &CheckpointIndex) -> u64 {
        index.tensors().iter().fold(0, |sum: u64, tensor| {
            sum.saturating_add(row_major_bytes(tensor).unwrap_or(u64::MAX))
        })
    }

    /// Reads all tensors and digests each.
    ///
    /// `control` watches the bytes digested, and stops the work.
    ///
    /// # Errors
    ///
    /// [`Error::MemoryLimit`]; what keeps the files from being read, or shows
    /// that they have changed since `index` was opened; [`Error::Cancelled`].
    pub fn digests(&self, index: &CheckpointIndex, control: &Control) -> Result<ContentDigests> {
        self.check_memory_limit()?;
        digests::read(self, index, control)
    }

    /// Reads both checkpoints, and says which tensors differ and how.
    ///
    /// Two checkpoints are equal exactly if their content digests are; see
    /// [`ContentHasher`](crate::ContentHasher). How they store their tensors does not matter.
    ///
    /// # Errors
    ///
    /// As [`digests`](Self::digests). A difference is no error.
    pub fn compare(
        &self,
        left: &CheckpointIndex,
        right: &CheckpointIndex,
        control: &Control,
    ) -> Result<Comparison> {
        self.check_memory_limit()?;
        compare::compare(self, left, right, control)
    }

    /// Reads a checkpoint, and holds it against what is known of it: the digests in
    /// [`SIDECAR_NAME`](crate::SIDECAR_NAME) beside it, if that file is there, and the names of blobs in a
    /// Hugging Face cache, which are the SHA-256 of whole files.
    ///
    /// Damaged tensors, which only an index opened with `DamagedTensors::LeaveOut` comes without, are
    /// listed, and all others are checked.
    ///
    /// # Errors
    ///
    /// As [`digests`](Self::digests), and [`Error::Sidecar`] for a sidecar that is
    /// damaged itself. Data that is not what it should be is no error.
    pub fn check(&self, index: &CheckpointIndex, control: &Control) -> Result<Verification> {
        self.check_memory_limit()?;
        check::check(self, index, control)
    }

    fn check_memory_limit(&self) -> Result<()> {
        if self.memory_limit_bytes < ConvertOptions::MIN_MEMORY_LIMIT_BYTES {
            return Err(Error::MemoryLimit {
                limit_bytes: self.memory_limit_bytes,
                min_bytes: ConvertOptions::MIN_MEMORY_LIMIT_BYTES,
            });
        }
        Ok(())
    }
}

/// Checks that the files are still those that the index was opened from: a digest of a file that was written to
/// meanwhile is one of nothing that ever was.
fn check_unchanged(index: &CheckpointIndex) -> Result<()> {
    index.files().iter().try_for_each(identity::check_path)
}
