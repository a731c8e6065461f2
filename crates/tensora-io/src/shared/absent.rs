//! Where there is no memfd and there are no abstract sockets.

use std::sync::Arc;

use super::{SharedOptions, SharedReport, SharedWindow};
use crate::{Backend, Control, Error, FilledWindow, Result, SourceFile, StreamParams};

#[derive(Debug)]
pub(super) enum Member {}

impl Member {
    pub(super) fn join(
        _: &SharedOptions,
        _: Vec<Arc<SourceFile>>,
        _: Vec<SharedWindow>,
        _: Arc<dyn Backend>,
        _: StreamParams,
        _: Control,
    ) -> Result<Self> {
        Err(Error::Unsupported {
            operation: "reading once for several processes",
            reason: "this build runs without memfd and abstract Unix sockets, which only Linux has"
                .to_owned(),
            remedy: "let each process read for itself; the page cache shares buffered reads",
        })
    }

    pub(super) fn next(&mut self) -> Option<Result<FilledWindow>> {
        match *self {}
    }

    pub(super) fn report(&self) -> SharedReport {
        match *self {}
    }
}
