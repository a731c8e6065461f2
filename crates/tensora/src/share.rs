use std::time::Duration;

/// Reading together with other processes of this machine, one for each rank, such that no byte is read from the device
/// twice; see [`Loader::share`](crate::Loader::share).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    name: String,
    join_timeout: Duration,
}

impl Share {
    /// How long the ranks wait for each other unless [`join_timeout`](Self::join_timeout) says otherwise: engines start
    /// their ranks together, and the slowest interpreter takes some seconds.
    pub const DEFAULT_JOIN_TIMEOUT: Duration = Duration::from_secs(30);

    /// With those processes of the same user that give the same name.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            join_timeout: Self::DEFAULT_JOIN_TIMEOUT,
        }
    }

    /// Waits this long for ranks that are missing, and then begins without them: they read alone, should they come.
    #[must_use]
    pub fn join_timeout(mut self, join_timeout: Duration) -> Self {
        self.join_timeout = join_timeout;
        self
    }

    #[cfg(feature = "shared")]
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    #[cfg(feature = "shared")]
    pub(crate) fn timeout(&self) -> Duration {
        self.join_timeout
    }
}
