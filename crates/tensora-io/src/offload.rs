use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::{CancelToken, Error, Result};

type Outcome<T> = std::thread::Result<T>;

/// Runs blocking work on a thread of its own and gives its result as a future, on any executor.
///
/// The work owns everything that it touches. Dropping the future cancels `token`, so that work which
/// watches it ends early; the thread then finishes and frees everything by itself.
///
/// ```
/// # async fn example() -> tensora_io::Result<()> {
/// use tensora_io::{CancelToken, SourceFile, offload};
///
/// let file = offload(CancelToken::new(), || SourceFile::open("Cargo.toml"))?.await?;
/// println!("{} bytes", file.len());
/// # Ok(())
/// # }
/// ```
///
/// # Errors
///
/// [`Error::Thread`] when the system refuses another thread.
///
/// # Panics
///
/// A panic of the work is passed on to whoever awaits it.
pub fn offload<T: Send + 'static>(
    token: CancelToken,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<Offload<T>> {
    let shared = Arc::new(Mutex::new(State {
        outcome: None,
        waker: None,
        done: false,
    }));
    let thread_shared = Arc::clone(&shared);
    std::thread::Builder::new()
        .name("tensora-offload".to_owned())
        .spawn(move || {
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            let mut state = thread_shared.lock().unwrap_or_else(PoisonError::into_inner);
            state.outcome = Some(outcome);
            state.done = true;
            let waker = state.waker.take();
            drop(state);
            if let Some(waker) = waker {
                waker.wake();
            }
        })
        .map_err(|source| Error::Thread { source })?;
    Ok(Offload { shared, token })
}

#[derive(Debug)]
struct State<T> {
    outcome: Option<Outcome<T>>,
    waker: Option<Waker>,
    done: bool,
}

/// The future of [`offload`].
#[derive(Debug)]
#[must_use = "dropping it cancels the work"]
pub struct Offload<T> {
    shared: Arc<Mutex<State<T>>>,
    token: CancelToken,
}

impl<T> Future for Offload<T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        let mut state = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        match state.outcome.take() {
            Some(Ok(value)) => Poll::Ready(value),
            Some(Err(panic)) => {
                drop(state);
                std::panic::resume_unwind(panic)
            }
            None => {
                state.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl<T> Drop for Offload<T> {
    fn drop(&mut self) {
        let state = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        // A token that the caller shares with later work must not be cancelled by a future that has
        // already given its result.
        if !state.done {
            self.token.cancel();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn poll_once<T>(offload: &mut Offload<T>) -> Poll<T> {
        Pin::new(offload).poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn gives_the_result_and_leaves_the_token_alone() {
        let token = CancelToken::new();
        let mut future = offload(token.clone(), || 7).unwrap();
        let value = loop {
            if let Poll::Ready(value) = poll_once(&mut future) {
                break value;
            }
            std::thread::yield_now();
        };
        drop(future);
        assert_eq!(value, 7);
        assert!(!token.is_cancelled());
    }

    #[test]
    fn dropping_it_cancels_the_work() {
        let token = CancelToken::new();
        let (done, ended) = mpsc::channel();
        let seen = token.clone();
        let future = offload(token, move || {
            while !seen.is_cancelled() {
                std::thread::yield_now();
            }
            let _ = done.send(());
        })
        .unwrap();
        drop(future);
        ended.recv().unwrap();
    }

    #[test]
    fn passes_a_panic_on() {
        let mut future = offload(CancelToken::new(), || panic!("as meant")).unwrap();
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            loop {
                if let Poll::Ready(()) = poll_once(&mut future) {
                    break;
                }
                std::thread::yield_now();
            }
        }));
        assert_eq!(
            outcome.unwrap_err().downcast_ref::<&str>(),
            Some(&"as meant")
        );
    }
}
