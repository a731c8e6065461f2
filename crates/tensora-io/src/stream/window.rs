//! What a stream reads: windows, each a buffer's worth of ranges.

use std::ops::Range;
use std::sync::Arc;

use crate::{Error, Result, SourceFile};

/// What is read into one buffer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReadWindow {
    /// The ranges to read, in any order. Their places in the buffer do not overlap.
    pub extents: Vec<ReadExtent>,
    /// How much of a buffer the window takes, in bytes. Where no extent goes, the buffer holds zeros
    /// or bytes of an earlier window. A window of 0 bytes takes no buffer.
    pub buffer_bytes: usize,
}

/// A range of a file and its place in a buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadExtent {
    /// Position of the file among the files of the stream.
    pub file: usize,
    /// What to read, in bytes from the start of the file.
    pub range: Range<u64>,
    /// Where in the buffer the range begins, in bytes. Direct reads need no scratch memory when it is
    /// congruent to `range.start` modulo the file's alignment.
    pub at: usize,
}

impl ReadExtent {
    /// Length of the range. That of an extent which was checked fits.
    pub(crate) fn len(&self) -> usize {
        usize::try_from(self.read_bytes()).unwrap_or(usize::MAX)
    }

    fn read_bytes(&self) -> u64 {
        self.range.end.saturating_sub(self.range.start)
    }
}

impl ReadWindow {
    /// How many bytes are read for it.
    pub fn read_bytes(&self) -> u64 {
        let bytes = self.extents.iter().map(ReadExtent::read_bytes);
        bytes.fold(0, u64::saturating_add)
    }

    /// Checks it against the files and the size of a buffer, and puts its extents in the order of their places,
    /// without the empty ones. `number` is its position in the stream.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidWindow`], with the numbers.
    pub(crate) fn prepare(
        &mut self,
        number: usize,
        files: &[Arc<SourceFile>],
        buffer_bytes: usize,
    ) -> Result<()> {
        let refuse = |reason| Error::InvalidWindow {
            window: number,
            reason,
        };
        if self.buffer_bytes > buffer_bytes {
            return Err(refuse(format!(
                "it takes {} bytes of a buffer, but a buffer has {buffer_bytes}; cut the window, or make \
                 buffer_bytes larger",
                self.buffer_bytes
            )));
        }
        for extent in &self.extents {
            extent.check(files, self.buffer_bytes).map_err(refuse)?;
        }
        self.extents.retain(|extent| extent.len() > 0);
        self.extents.sort_unstable_by_key(|extent| extent.at);
        for pair in self.extents.windows(2) {
            let [first, second] = pair else { continue };
            if first.at + first.len() > second.at {
                return Err(refuse(format!(
                    "its {} and its {} overlap in the buffer",
                    first.describe(files),
                    second.describe(files)
                )));
            }
        }
        Ok(())
    }
}

impl ReadExtent {
    fn check(&self, files: &[Arc<SourceFile>], window_bytes: usize) -> Result<(), String> {
        if self.file >= files.len() {
            return Err(format!(
                "it names file number {}, but the stream has {} files, numbered from 0",
                self.file,
                files.len()
            ));
        }
        if self.range.start > self.range.end {
            return Err(format!(
                "its {} ends before it begins",
                self.describe(files)
            ));
        }
        let end_at = usize::try_from(self.read_bytes())
            .ok()
            .and_then(|len| self.at.checked_add(len));
        match end_at {
            Some(end_at) if end_at <= window_bytes => Ok(()),
            _ => Err(format!(
                "its {} exceeds the {window_bytes} bytes that the window takes of a buffer",
                self.describe(files)
            )),
        }
    }

    fn describe(&self, files: &[Arc<SourceFile>]) -> String {
        let path = files
            .get(self.file)
            .map_or_else(String::new, |file| format!(" of {}", file.path().display()));
        format!(
            "extent {}..{}{path} at byte {}",
            self.range.start, self.range.end, self.at
        )
    }
}
