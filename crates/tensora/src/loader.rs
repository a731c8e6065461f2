use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tensora_formats::OpenOptions;
#[cfg(feature = "mmap")]
use tensora_heuristics::MappingConsent;
use tensora_heuristics::{BackendChoice, CacheChoice, DirectChoice, MemoryChoice, Plan, Policy};
#[cfg(feature = "mmap")]
use tensora_io::MappingPermit;
use tensora_io::{
    Backend, BackendKind, CancelToken, Control, DirectPolicy, Platform, ProfileFact, ProfileStore,
    offload,
};

use crate::selection::Selection;
use crate::{
    Checkpoint, LazyCheckpoint, Preset, Result, Share, SliceRule, SliceRules, StreamOrder,
};

/// How far a load has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LoadProgress {
    /// Bytes that have arrived.
    pub done_bytes: u64,
    /// Bytes that will arrive in all.
    pub total_bytes: u64,
}

/// Where profiles of measured reads are looked for, which the planner prefers to its constants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProfileChoice {
    /// In the store of this user ([`ProfileStore::user`]), where `tensora calibrate` keeps them.
    #[default]
    User,
    /// In this store.
    Store(ProfileStore),
    /// Nowhere: the planner has its constants.
    Ignore,
}

impl ProfileChoice {
    /// What is known of the place of a platform whose storage was probed. A store that does not exist
    /// knows nothing.
    pub(crate) fn find(&self, platform: &Platform) -> ProfileFact {
        match self {
            Self::User => {
                ProfileStore::user().map_or(ProfileFact::Absent, |store| store.find(platform))
            }
            Self::Store(store) => store.find(platform),
            Self::Ignore => ProfileFact::NotSought,
        }
    }
}

type ProgressFn = dyn Fn(LoadProgress) + Send + Sync;

/// What to load and how, where the planner shall not decide.
///
/// ```no_run
/// use tensora::{BackendKind, Loader};
///
/// let checkpoint = Loader::new()
///     .backend(BackendKind::IoUring)
///     .select(["model.layers.0.*", "lm_head.weight"])
///     .on_progress(|progress| println!("{} of {}", progress.done_bytes, progress.total_bytes))
///     .load("Qwen3-8B")?;
/// # Ok::<(), tensora::Error>(())
/// ```
#[derive(Clone, Default)]
pub struct Loader {
    pub(crate) policy: Policy,
    /// Given by the caller, and of the kind that the policy names.
    own_backend: Option<Arc<dyn Backend>>,
    pub(crate) selection: Selection,
    pub(crate) slices: SliceRules,
    pub(crate) rank: Option<(u32, u32)>,
    pub(crate) share: Option<Share>,
    pub(crate) stream_order: StreamOrder,
    pub(crate) lease_timeout: Option<Duration>,
    pub(crate) open_options: OpenOptions,
    pub(crate) profiles: ProfileChoice,
    #[cfg(feature = "mmap")]
    pub(crate) permit: Option<MappingPermit>,
    cancel: CancelToken,
    progress: Option<Arc<ProgressFn>>,
}

impl Loader {
    /// Everything is the planner's choice, memory is owned, and every tensor is loaded.
    pub fn new() -> Self {
        Self::default()
    }

    /// Uses this backend. It is never replaced by another: it works, or the load fails with the reason.
    #[must_use]
    pub fn backend(self, kind: BackendKind) -> Self {
        self.backend_choice(BackendChoice::Named(kind))
    }

    /// Names a backend or leaves it to the planner.
    #[must_use]
    pub fn backend_choice(mut self, choice: BackendChoice) -> Self {
        self.policy.backend = choice;
        self.own_backend = None;
        self
    }

    /// Reads with a backend of the caller's own: one that wraps another to count, slow down or disturb its reads, or one
    /// that fetches the bytes of files some other way.
    ///
    /// The plan is made for its [`kind`](Backend::kind), which therefore has to be one that can run on this machine.
    /// Every load and stream of this loader reads tensors through it; metadata is read as always. Memory is owned, since
    /// a mapping is read through no backend, unless [`memory`](Self::memory) says otherwise later.
    ///
    /// ```no_run
    /// use std::sync::Arc;
    /// use tensora::io::{self, Backend, BackendKind, Control, ReadRequest, ReadStats, TransferParams};
    ///
    /// /// Says what is read.
    /// #[derive(Debug)]
    /// struct Tracing(Box<dyn Backend>);
    ///
    /// impl Backend for Tracing {
    ///     fn kind(&self) -> BackendKind {
    ///         self.0.kind()
    ///     }
    ///
    ///     fn read(
    ///         &self,
    ///         requests: Vec<ReadRequest<'_>>,
    ///         params: &TransferParams,
    ///         control: &Control,
    ///     ) -> io::Result<ReadStats> {
    ///         for request in &requests {
    ///             println!("{} from byte {}", request.file.path().display(), request.offset);
    ///         }
    ///         self.0.read(requests, params, control)
    ///     }
    /// }
    ///
    /// let backend = Arc::new(Tracing(io::backend(BackendKind::Sync)?));
    /// let checkpoint = tensora::Loader::new().read_with(backend).load("Qwen3-8B")?;
    /// # Ok::<(), tensora::Error>(())
    /// ```
    #[must_use]
    pub fn read_with(mut self, backend: Arc<dyn Backend>) -> Self {
        self.policy.backend = BackendChoice::Named(backend.kind());
        self.policy.memory = MemoryChoice::Owned;
        self.own_backend = Some(backend);
        self
    }

    /// Owned or mapped memory, or the planner's choice. Mapped memory needs
    /// [`allow_mapping`](Self::allow_mapping).
    #[must_use]
    pub fn memory(mut self, choice: MemoryChoice) -> Self {
        self.policy.memory = choice;
        self
    }

    /// Allows tensors to be views of mapped files. The planner then maps where that is fastest, unless
    /// [`memory`](Self::memory) says otherwise.
    ///
    /// The contract is that of [`MappingPermit::new`]: nobody truncates or rewrites the checkpoint's files
    /// while tensors are in use.
    #[cfg(feature = "mmap")]
    #[must_use]
    pub fn allow_mapping(mut self, permit: MappingPermit) -> Self {
        self.permit = Some(permit);
        self.policy.mapping = MappingConsent::Granted;
        self
    }

    /// Whether reads bypass the page cache, instead of the planner's choice.
    #[must_use]
    pub fn direct(self, policy: DirectPolicy) -> Self {
        self.direct_choice(DirectChoice::Policy(policy))
    }

    /// Fixes whether reads bypass the page cache, or leaves it to the planner.
    #[must_use]
    pub fn direct_choice(mut self, choice: DirectChoice) -> Self {
        self.policy.direct = choice;
        self
    }

    /// What the load leaves in the page cache: the files, for the next load, at the price of a slower one now;
    /// nothing; or whatever is fastest, which is the default.
    #[must_use]
    pub fn cache(mut self, choice: CacheChoice) -> Self {
        self.policy.cache = choice;
        self
    }

    /// Largest single read in bytes, instead of the planner's choice; 4 KiB to 1 GiB.
    #[must_use]
    pub fn chunk_bytes(mut self, chunk_bytes: u64) -> Self {
        self.policy.chunk_bytes = Some(chunk_bytes);
        self
    }

    /// Reads in flight per ring, instead of the planner's choice; 1 to 1024.
    #[must_use]
    pub fn queue_depth(mut self, queue_depth: u32) -> Self {
        self.policy.queue_depth = Some(queue_depth);
        self
    }

    /// Threads, concurrent reads or rings, instead of the planner's choice; 1 to 256.
    #[must_use]
    pub fn workers(mut self, workers: u32) -> Self {
        self.policy.workers = Some(workers);
        self
    }

    /// Refuses, before anything is read, loads that would hold more than this in owned memory.
    #[must_use]
    pub fn memory_limit_bytes(mut self, limit_bytes: u64) -> Self {
        self.policy.memory_limit_bytes = Some(limit_bytes);
        self
    }

    /// Loads only tensors whose names match one of these globs (`*`, `?`, `[…]`, `{a,b}`), in addition to
    /// what was selected before. A pattern that matches nothing is an error.
    #[must_use]
    pub fn select<P: Into<String>>(mut self, patterns: impl IntoIterator<Item = P>) -> Self {
        let patterns = patterns.into_iter().map(Into::into);
        self.selection.patterns.extend(patterns);
        self
    }

    /// Loads only tensors of these names, in addition to what was selected before. A name that the
    /// checkpoint lacks is an error.
    #[must_use]
    pub fn select_names<N: Into<String>>(mut self, names: impl IntoIterator<Item = N>) -> Self {
        self.selection
            .names
            .extend(names.into_iter().map(Into::into));
        self
    }

    /// Delivers a part only of each tensor that the rule is about, in addition to the rules given before. A rule that
    /// is about no selected tensor is an error.
    #[must_use]
    pub fn slice(mut self, rule: SliceRule) -> Self {
        self.slices.push(rule);
        self
    }

    /// Delivers of each tensor what a preset's rules say; rules given with [`slice`](Self::slice) come before them. It
    /// needs a [`rank`](Self::rank).
    #[must_use]
    pub fn preset(mut self, preset: Preset) -> Self {
        self.slices.set_preset(preset);
        self
    }

    /// Which of how many ranks this process is, from 0: for rules that divide a dimension among ranks without saying so
    /// themselves.
    #[must_use]
    pub fn rank(mut self, rank: u32, world: u32) -> Self {
        self.rank = Some((rank, world));
        self
    }

    /// Reads together with the other ranks, each of which is a process of this user on this machine that loads the
    /// same checkpoint by the same rules: what more than one of them needs is read from the device once. It
    /// needs a [`rank`](Self::rank).
    ///
    /// Whether through shared memory or the page cache is the planner's choice. A rank that ends, or never comes, holds nobody up for
    /// long; the tensors are the same in any case.
    #[must_use]
    pub fn share(mut self, share: Share) -> Self {
        self.share = Some(share);
        self
    }

    /// In which order tensors are streamed.
    #[must_use]
    pub fn stream_order(mut self, order: StreamOrder) -> Self {
        self.stream_order = order;
        self
    }

    /// How long a stream waits while the caller holds pieces in every buffer, before it says so with
    /// [`tensora_io::Error::LeasesHeld`]; 30 s unless set. The stream can be asked again after that.
    #[must_use]
    pub fn lease_timeout(mut self, lease_timeout: Duration) -> Self {
        self.lease_timeout = Some(lease_timeout);
        self
    }

    /// How to read the metadata: a format or rank to force, what to do about tensors that an index does
    /// not list.
    #[must_use]
    pub fn open_options(mut self, options: OpenOptions) -> Self {
        self.open_options = options;
        self
    }

    /// Where a profile of the checkpoint's device and file system is looked for. By default, in the store of
    /// this user: one file is read below `$XDG_CACHE_HOME` or `$HOME/.cache`, in well under a millisecond.
    /// A profile that is missing, damaged or of another machine never fails a load; the plan says why
    /// it was ignored.
    #[must_use]
    pub fn profiles(mut self, choice: ProfileChoice) -> Self {
        self.profiles = choice;
        self
    }

    /// Calls `progress` as bytes arrive, from several threads at once.
    #[must_use]
    pub fn on_progress(mut self, progress: impl Fn(LoadProgress) + Send + Sync + 'static) -> Self {
        self.progress = Some(Arc::new(progress));
        self
    }

    /// Stops the load when `token` is cancelled.
    #[must_use]
    pub fn cancel_with(mut self, token: CancelToken) -> Self {
        self.cancel = token;
        self
    }

    /// Reads the metadata at `path`; tensors are read when asked for.
    ///
    /// # Errors
    ///
    /// When the path is no checkpoint, its metadata is wrong, or the selection matches nothing.
    pub fn open(&self, path: impl AsRef<Path>) -> Result<LazyCheckpoint> {
        LazyCheckpoint::open(self.clone(), path.as_ref())
    }

    /// What a load of `path` would do, and why, without doing it.
    ///
    /// # Errors
    ///
    /// As [`load`](Self::load), short of what only reading can show.
    pub fn plan(&self, path: impl AsRef<Path>) -> Result<Plan> {
        self.open(path)?.plan()
    }

    /// Loads the selected tensors of the checkpoint at `path`.
    ///
    /// # Errors
    ///
    /// See [`Error`](crate::Error).
    pub fn load(&self, path: impl AsRef<Path>) -> Result<Checkpoint> {
        self.open(path)?.load_all()
    }

    /// [`load`](Self::load) without blocking the caller: the work is done on threads of its own, on
    /// whatever executor the future is polled. Dropping the future stops the load and frees
    /// what it held, once the reads that were handed to the kernel are back; it cancels a token of its own,
    /// never the one of [`cancel_with`](Self::cancel_with).
    ///
    /// # Errors
    ///
    /// As [`load`](Self::load).
    pub async fn load_async(&self, path: impl AsRef<Path>) -> Result<Checkpoint> {
        let path: PathBuf = path.as_ref().to_owned();
        let dropped = self.cancel.child();
        let loader = self.clone().cancel_with(dropped.clone());
        offload(dropped, move || loader.load(path))?.await
    }

    /// The caller's own backend, or the one of the kind that was planned.
    pub(crate) fn backend_of(&self, planned: BackendKind) -> Result<Arc<dyn Backend>> {
        match &self.own_backend {
            Some(own) => Ok(Arc::clone(own)),
            None => Ok(tensora_io::backend(planned)?.into()),
        }
    }

    /// What a backend needs to know of progress and cancellation, for `total_bytes` to come.
    pub(crate) fn control(&self, total_bytes: u64) -> Control {
        let control = Control::new().with_cancel(self.cancel.clone());
        let Some(progress) = self.progress.clone() else {
            return control;
        };
        let done = AtomicU64::new(0);
        control.with_progress(move |bytes| {
            let done_bytes = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
            progress(LoadProgress {
                done_bytes,
                total_bytes,
            });
        })
    }

    pub(crate) fn check_cancelled(&self) -> Result<()> {
        Ok(self.control(0).check()?)
    }
}

impl std::fmt::Debug for Loader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loader")
            .field("policy", &self.policy)
            .field("own_backend", &self.own_backend)
            .field("selection", &self.selection)
            .field("slices", &self.slices)
            .field("rank", &self.rank)
            .field("share", &self.share)
            .field("open_options", &self.open_options)
            .field("profiles", &self.profiles)
            .finish_non_exhaustive()
    }
}
