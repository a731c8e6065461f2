//! A progress bar that only shows itself when there is time to read it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tensora::io::Control;

/// Work that ends before this goes without a bar.
const PATIENCE: Duration = Duration::from_secs(1);

/// Shows on standard error how many bytes of how many are done, how fast, and for how long still.
pub(crate) struct Progress {
    bar: ProgressBar,
    begun: Instant,
    enabled: bool,
    length_known: Once,
    visible: AtomicBool,
}

impl Progress {
    /// A bar labelled `task`, never drawn unless `enabled`.
    pub(crate) fn new(task: &'static str, enabled: bool) -> Self {
        // Measures the rate from the start, also while it is hidden.
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden())
            .with_message(task)
            .with_style(style());
        Self {
            bar,
            begun: Instant::now(),
            enabled,
            length_known: Once::new(),
            visible: AtomicBool::new(false),
        }
    }

    /// `done_bytes` of `total_bytes` are done. May be called from several threads at once.
    pub(crate) fn update(&self, done_bytes: u64, total_bytes: u64) {
        // Called for each read of a load that is being measured.
        if !self.enabled {
            return;
        }
        self.length_known
            .call_once(|| self.bar.set_length(total_bytes));
        // Threads report in any order; the bar only moves forward.
        if done_bytes > self.bar.position() {
            self.bar.set_position(done_bytes);
        }
        self.show();
    }

    /// Reports what a batch of `total_bytes` does to this bar.
    pub(crate) fn control(self: &Arc<Self>, total_bytes: u64) -> Control {
        let progress = Arc::clone(self);
        let done = AtomicU64::new(0);
        Control::new().with_progress(move |bytes| {
            let done_bytes = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
            progress.update(done_bytes, total_bytes);
        })
    }

    fn show(&self) {
        if self.begun.elapsed() >= PATIENCE && !self.visible.swap(true, Ordering::Relaxed) {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
            // Also moves, and shows that the program is alive, while a device stalls.
            self.bar.enable_steady_tick(Duration::from_millis(200));
        }
    }

    /// Removes the bar.
    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl Drop for Progress {
    /// An error must not be written behind a bar.
    fn drop(&mut self) {
        self.finish();
    }
}

/// Shows on standard error what is being done, and which part of the time that it may take is over.
pub(crate) struct Activity {
    bar: ProgressBar,
    enabled: bool,
}

impl Activity {
    /// A bar that is never drawn unless `enabled`.
    pub(crate) fn new(enabled: bool) -> Self {
        let bar = ProgressBar::with_draw_target(Some(PER_MILLE), ProgressDrawTarget::hidden())
            .with_style(activity_style());
        Self { bar, enabled }
    }

    /// This is being done, after `elapsed` of about `budget`.
    pub(crate) fn show(&self, what: String, elapsed: Duration, budget: Duration) {
        if !self.enabled {
            return;
        }
        let share = elapsed.as_secs_f64() / budget.as_secs_f64().max(f64::MIN_POSITIVE);
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        self.bar.set_position(((share * 1e3) as u64).min(PER_MILLE));
        self.bar.set_message(what);
        if elapsed >= PATIENCE && self.bar.is_hidden() {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
    }
}

impl Drop for Activity {
    /// An error must not be written behind a bar.
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

const PER_MILLE: u64 = 1000;
const ACTIVITY_TEMPLATE: &str = "[{bar:30}] {elapsed}, {msg}";

fn activity_style() -> ProgressStyle {
    ProgressStyle::with_template(ACTIVITY_TEMPLATE)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

const TEMPLATE: &str =
    "{msg} [{bar:30}] {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left";

fn style() -> ProgressStyle {
    ProgressStyle::with_template(TEMPLATE)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_templates_are_valid() {
        ProgressStyle::with_template(TEMPLATE).unwrap();
        ProgressStyle::with_template(ACTIVITY_TEMPLATE).unwrap();
    }

    #[test]
    fn the_bar_waits_and_never_goes_back() {
        let progress = Progress::new("read", true);
        progress.update(20, 100);
        progress.update(10, 100);
        assert_eq!(progress.bar.position(), 20);
        assert_eq!(progress.bar.length(), Some(100));
        assert!(progress.bar.is_hidden());
    }
}
