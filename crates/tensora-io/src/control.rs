use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use crate::workers::lock;
use crate::{Error, Result};

/// Stops loads from another thread. Clones share one state; a token cannot be reset.
#[derive(Clone, Debug, Default)]
pub struct CancelToken(Arc<State>);

#[derive(Debug, Default)]
struct State {
    cancelled: AtomicBool,
    parent: Option<CancelToken>,
    listeners: Mutex<Vec<Weak<dyn CancelListener>>>,
}

/// What waits for something else, and is to be woken when a token is cancelled.
pub(crate) trait CancelListener: Send + Sync {
    /// Called on the thread that cancels, once by each token that it is cancelled with.
    fn cancelled(&self);
}

impl CancelToken {
    /// A token that is not cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks every load that holds this token to stop. Reads already handed to the kernel are waited
    /// for; no new ones are issued.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::Release);
        let listeners = std::mem::take(&mut *lock(&self.0.listeners));
        for listener in listeners.iter().filter_map(Weak::upgrade) {
            listener.cancelled();
        }
    }

    /// A token that is cancelled with this one, or alone, without this one.
    #[must_use]
    pub fn child(&self) -> Self {
        Self(Arc::new(State {
            cancelled: AtomicBool::new(false),
            parent: Some(self.clone()),
            listeners: Mutex::default(),
        }))
    }

    /// Tells `listener`, as long as it lives, when this token or one that it is a child of is cancelled. One
    /// that was cancelled before does not tell; look once more after this call.
    pub(crate) fn listen(&self, listener: &Weak<dyn CancelListener>) {
        let mut listeners = lock(&self.0.listeners);
        // A token may see many streams come and go.
        listeners.retain(|listener| listener.strong_count() > 0);
        listeners.push(Weak::clone(listener));
        drop(listeners);
        if let Some(parent) = &self.0.parent {
            parent.listen(listener);
        }
    }

    /// Whether [`cancel`](Self::cancel) was called on it or on a token that it is a child of.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Acquire)
            || self.0.parent.as_ref().is_some_and(Self::is_cancelled)
    }
}

/// Called with the number of bytes that have just arrived, from whichever worker received them.
type ProgressFn = dyn Fn(u64) + Send + Sync;

/// How a caller watches and stops a batch. The default neither watches nor stops.
#[derive(Clone, Default)]
pub struct Control {
    cancel: CancelToken,
    progress: Option<Arc<ProgressFn>>,
}

impl Control {
    /// Neither watches nor stops.
    pub fn new() -> Self {
        Self::default()
    }

    /// Stops the batch when `token` is cancelled.
    #[must_use]
    pub fn with_cancel(mut self, token: CancelToken) -> Self {
        self.cancel = token;
        self
    }

    /// Calls `progress` with the number of bytes of each read that has arrived (not a running total).
    /// The numbers of a successful batch add up to its bytes. Calls come from several threads at
    /// once and hold up the worker that makes them.
    #[must_use]
    pub fn with_progress(mut self, progress: impl Fn(u64) + Send + Sync + 'static) -> Self {
        self.progress = Some(Arc::new(progress));
        self
    }

    /// The token that stops the batch.
    pub fn token(&self) -> &CancelToken {
        &self.cancel
    }

    /// Whether the batch shall stop.
    pub fn is_cancelled(&self) -> bool {
        self.cancel.is_cancelled()
    }

    /// `Err` when the batch shall stop: for implementors, between reads.
    ///
    /// # Errors
    ///
    /// [`Error::Cancelled`] after the token was cancelled.
    pub fn check(&self) -> Result<()> {
        if self.is_cancelled() {
            Err(Error::Cancelled)
        } else {
            Ok(())
        }
    }

    /// Reports arrived bytes: for implementors, after each read.
    pub fn advance(&self, bytes: u64) {
        if bytes > 0
            && let Some(progress) = &self.progress
        {
            progress(bytes);
        }
    }
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control")
            .field("cancelled", &self.is_cancelled())
            .field("progress", &self.progress.is_some())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_cancelled_alone_or_with_its_parent() {
        let parent = CancelToken::new();
        let (first, second) = (parent.child(), parent.child());
        first.cancel();
        assert!(first.is_cancelled() && !parent.is_cancelled() && !second.is_cancelled());
        parent.clone().cancel();
        assert!(second.is_cancelled());
    }

    #[derive(Default)]
    struct Count(std::sync::atomic::AtomicU32);

    impl CancelListener for Count {
        fn cancelled(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_listener_is_told_by_its_token_and_by_a_parent_but_never_by_a_sibling() {
        let parent = CancelToken::new();
        let (token, sibling) = (parent.child(), parent.child());
        let count = Arc::new(Count::default());
        let listener: Arc<dyn CancelListener> = count.clone();
        token.child().listen(&Arc::downgrade(&listener));
        let told = || count.0.load(Ordering::Relaxed);
        sibling.cancel();
        assert_eq!(told(), 0);
        token.cancel();
        token.cancel();
        assert_eq!(told(), 1);
        parent.cancel();
        assert_eq!(told(), 2, "every token of the line tells for itself");
    }

    #[test]
    fn listeners_that_are_gone_are_forgotten() {
        let token = CancelToken::new();
        for _ in 0..100 {
            let count: Arc<dyn CancelListener> = Arc::new(Count::default());
            token.listen(&Arc::downgrade(&count));
        }
        assert_eq!(lock(&token.0.listeners).len(), 1);
        token.cancel();
    }
}
