use std::fmt;

use tensora_io::{
    Availability, BackendKind, DirectPolicy, DirectSupport, FileSystemClass, Platform,
    StorageFacts, TransferParams,
};

use crate::tuning::{self, evidence};
use crate::units::{Bytes, count};
use crate::{
    AccessPattern, BackendChoice, Decision, DirectChoice, MappingConsent, MemoryBound,
    MemoryChoice, MemoryKind, Plan, PlanError, Policy, Rejection, Result, StorageLayout, Workload,
};

/// Decides how to read `workload` on `platform` as `policy` wishes.
///
/// What the policy names is obeyed or refused. What it leaves open is decided from, in this order: what
/// can run here and fits into memory; where the files are and how much of them is in the page cache;
/// and the regime table (layout, access, files and bytes). Facts that are unknown count as the less
/// favourable case: storage that was not probed is read buffered, files of unknown residency are cold.
///
/// # Errors
///
/// [`PlanError`] when wishes contradict each other or the facts, when a parameter is outside its limits,
/// when no backend is left, or when the tensors do not fit into memory.
///
/// # Example
///
/// ```
/// use tensora_heuristics::{AccessPattern, Policy, StorageLayout, Workload, plan};
/// use tensora_io::{Availability, BackendFact, BackendKind, Platform};
///
/// let mut workload = Workload::new(StorageLayout::SafeTensors, AccessPattern::WholeFiles);
/// workload.files = 5;
/// workload.read_bytes = 16_381_470_720;
/// let facts = BackendKind::ALL.map(|kind| BackendFact {
///     kind,
///     availability: Availability::Available,
/// });
/// let platform = Platform::unknown(8, facts.to_vec());
///
/// let plan = plan(&workload, &platform, &Policy::default())?;
/// assert_eq!(plan.backend, BackendKind::IoUring);
/// println!("{plan}");
/// # Ok::<(), tensora_heuristics::PlanError>(())
/// ```
pub fn plan(workload: &Workload, platform: &Platform, policy: &Policy) -> Result<Plan> {
    check_parameters(policy)?;
    check_wishes(policy)?;
    let case = Case {
        workload,
        platform,
        policy,
        place: Place::of(platform.storage.as_ref(), policy),
    };
    case.check_facts()?;

    let (memory, memory_decision) = case.memory()?;
    let (backend, backend_decision) = case.backend(memory)?;
    let (direct, direct_decision) = case.direct(backend, memory);
    let (params, param_decisions) = case.params(backend, direct);

    let mut decisions = vec![memory_decision, backend_decision, direct_decision];
    decisions.extend(param_decisions);
    Ok(Plan {
        backend,
        memory,
        params,
        decisions,
        workload: workload.clone(),
        platform: platform.clone(),
        policy: policy.clone(),
    })
}

/// Overrides are checked before anything is decided, so that a wrong one is an error whatever the facts.
fn check_parameters(policy: &Policy) -> Result<()> {
    let check = |parameter, value: Option<u64>, min, max| match value {
        Some(value) if !(min..=max).contains(&value) => Err(PlanError::ParameterOutOfRange {
            parameter,
            value,
            min,
            max,
        }),
        _ => Ok(()),
    };
    check(
        "chunk_bytes",
        policy.chunk_bytes,
        TransferParams::MIN_CHUNK_BYTES,
        TransferParams::MAX_CHUNK_BYTES,
    )?;
    check(
        "queue_depth",
        policy.queue_depth.map(u64::from),
        1,
        TransferParams::MAX_QUEUE_DEPTH.into(),
    )?;
    check(
        "workers",
        policy.workers.map(u64::from),
        1,
        TransferParams::MAX_WORKERS.into(),
    )
}

/// Wishes that contradict each other, whatever the facts.
fn check_wishes(policy: &Policy) -> Result<()> {
    if policy.memory == MemoryChoice::Mapped {
        if let BackendChoice::Named(backend) = policy.backend
            && backend != BackendKind::Mmap
        {
            return Err(PlanError::MappedWithBackend { backend });
        }
        if policy.direct.is_required() {
            return Err(PlanError::DirectWithMapped);
        }
        if policy.mapping == MappingConsent::Denied {
            return Err(PlanError::MappedWithoutConsent);
        }
    }
    if policy.backend == BackendChoice::Named(BackendKind::Mmap) && policy.direct.is_required() {
        return Err(PlanError::DirectWithMmap);
    }
    Ok(())
}

/// Where the bytes are, as far as it changes how to read them. These facts stand above the regime table.
///
/// Below [`tuning::RESIDENT_PERCENT`] the part that is in the page cache changes nothing yet: deciding
/// per file would need residency per file among the facts. For a selection the share of whole files
/// stands for that of its extents, for the same reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Nobody looked.
    Unknown,
    /// In a file system that lives in memory.
    Memory,
    /// In the page cache, as good as completely, and reads may take them from there.
    PageCache,
    /// Behind a server, over a network or in user space.
    Server,
    /// On a device, or on something that has to be taken for one.
    Device,
}

impl Place {
    fn of(storage: Option<&StorageFacts>, policy: &Policy) -> Self {
        let Some(storage) = storage else {
            return Self::Unknown;
        };
        // Who asks for direct reads and gets them goes to the device whatever the cache holds.
        let bypassed = match policy.direct {
            DirectChoice::Auto | DirectChoice::Policy(DirectPolicy::Never) => false,
            DirectChoice::Policy(DirectPolicy::Preferred | DirectPolicy::Required) => {
                storage.direct.is_supported()
            }
        };
        match storage.class {
            FileSystemClass::Memory => Self::Memory,
            _ if is_resident(storage) && !bypassed => Self::PageCache,
            FileSystemClass::Network | FileSystemClass::Fuse => Self::Server,
            FileSystemClass::Local | FileSystemClass::Overlay | FileSystemClass::Unknown => {
                Self::Device
            }
        }
    }
}

/// Whole per cent of the files' bytes that are in the page cache, rounded down; `None` when not known.
pub(crate) fn resident_percent(storage: &StorageFacts) -> Option<u64> {
    let resident = u128::from(storage.resident_bytes?.min(storage.file_bytes));
    let percent = (resident * 100).checked_div(u128::from(storage.file_bytes))?;
    u64::try_from(percent).ok()
}

fn is_resident(storage: &StorageFacts) -> bool {
    resident_percent(storage).is_some_and(|percent| percent >= tuning::RESIDENT_PERCENT)
}

/// One thing that stands in the way of a choice.
struct Obstacle {
    reason: String,
    /// What would remove it, as a clause.
    remedy: String,
}

impl Obstacle {
    fn new(reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            remedy: remedy.into(),
        }
    }
}

/// Owned tensors do not fit.
struct Shortage {
    needed_bytes: u64,
    available_bytes: u64,
    bound: MemoryBound,
}

/// The rows of the regime table, and above them the places where the bytes' whereabouts decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Regime {
    /// From memory to memory.
    Copy,
    /// Behind a server.
    Server,
    /// Small or single-shard SafeTensors.
    Small,
    /// Large multi-shard SafeTensors, large partitioned ServerlessLLM.
    Large,
    /// Range-access ServerlessLLM.
    Extents,
    /// Partitioned ServerlessLLM that is not large.
    SmallPartitions,
}

impl Regime {
    /// The order of preference. Async follows sync because it makes the same reads at a small price;
    /// mmap comes last everywhere because for owned memory it copies out of the page cache.
    const fn order(self) -> [BackendKind; 4] {
        use BackendKind::{Async, IoUring, Mmap, Sync};
        match self {
            Self::Copy | Self::Server | Self::Small | Self::SmallPartitions => {
                [Sync, Async, IoUring, Mmap]
            }
            Self::Large => [IoUring, Sync, Async, Mmap],
            Self::Extents => [Async, Sync, IoUring, Mmap],
        }
    }

    /// What speaks against a backend that could run but is not the best.
    fn against(self, kind: BackendKind) -> String {
        match (self, kind) {
            (Self::Copy, BackendKind::Mmap) => {
                "for owned memory it adds a mapping to the same copy".to_owned()
            }
            (_, BackendKind::Mmap) => format!(
                "for owned memory it copies out of the page cache, and cold mappings are slow ({})",
                evidence::COLD_MAPPING
            ),
            (Self::Extents, BackendKind::Sync) => {
                "its one queue takes the extents as they come, where tasks keep those of one file \
                 together"
                    .to_owned()
            }
            (Self::Extents, BackendKind::IoUring) => {
                "rings are for long batches; the regime table keeps them for whole checkpoints"
                    .to_owned()
            }
            (Self::Large, BackendKind::Sync) => "threads trail by a few per cent".to_owned(),
            (_, BackendKind::Async) => {
                "it makes the same reads as sync, each handed to Tokio's blocking pool first"
                    .to_owned()
            }
            (Self::Copy, _) => {
                "there is no device to keep busy, only a copy to spread over the CPUs".to_owned()
            }
            (Self::Server, _) => {
                "many reads at once are what a server behind a file system handles worst".to_owned()
            }
            (Self::SmallPartitions, _) => {
                format!("rings have no lead at this size ({})", evidence::PARTITIONS)
            }
            (_, _) => format!(
                "rings lead, by a few per cent, only from {} in several files on",
                large_load()
            ),
        }
    }
}

struct Case<'a> {
    workload: &'a Workload,
    platform: &'a Platform,
    policy: &'a Policy,
    place: Place,
}

impl Case<'_> {
    /// Wishes against facts that no choice of the planner can get around.
    fn check_facts(&self) -> Result<()> {
        let named = match self.policy.backend {
            BackendChoice::Named(kind) => Some(kind),
            BackendChoice::Auto if self.policy.memory == MemoryChoice::Mapped => {
                Some(BackendKind::Mmap)
            }
            BackendChoice::Auto => None,
        };
        if let Some(backend) = named {
            match self.platform.availability(backend) {
                Some(Availability::Available) => {}
                Some(Availability::Unavailable { reason, remedy }) => {
                    return Err(PlanError::BackendUnavailable {
                        backend,
                        reason: reason.clone(),
                        remedy: remedy.clone(),
                    });
                }
                None => return Err(PlanError::BackendLeftOut { backend }),
            }
        }
        // Storage that nobody probed may support it: then the backend finds out.
        if self.policy.direct.is_required()
            && let Some(storage) = &self.platform.storage
            && let DirectSupport::Unsupported { reason } = &storage.direct
        {
            return Err(PlanError::DirectUnsupported {
                file_system: storage.file_system.clone(),
                reason: reason.clone(),
            });
        }
        Ok(())
    }

    /// What keeps `kind` from running this load, if anything does.
    fn obstacle(&self, kind: BackendKind) -> Option<Obstacle> {
        match self.platform.availability(kind) {
            None => Some(Obstacle::new(
                "it is left out of this build",
                format!("enable the cargo feature `{kind}`"),
            )),
            Some(Availability::Unavailable { reason, remedy }) => Some(Obstacle::new(
                format!("it cannot run here: {reason}"),
                remedy.as_str(),
            )),
            Some(Availability::Available)
                if kind == BackendKind::Mmap && self.policy.direct.is_required() =>
            {
                Some(Obstacle::new(
                    "it reads through the page cache, and direct I/O is required",
                    "drop that requirement",
                ))
            }
            Some(Availability::Available) => None,
        }
    }

    // ---- memory ----

    fn memory(&self) -> Result<(MemoryKind, Decision)> {
        let owned =
            |reason: String, rejected| decided("memory", MemoryKind::Owned, reason, rejected);
        let mapped =
            |reason: String, rejected| decided("memory", MemoryKind::Mapped, reason, rejected);

        if self.policy.memory == MemoryChoice::Mapped {
            let mut reason =
                "It was asked for, and the caller takes on the contract of mappings.".to_owned();
            if let Err(against) = self.mapping_pays() {
                reason.push_str(&format!(" Be warned: {against}."));
            }
            return Ok(mapped(reason, Vec::new()));
        }

        let obstacles = self.mapping_obstacles();
        let pays = if obstacles.is_empty() {
            self.mapping_pays()
        } else {
            Err(join(obstacles.iter().map(|o| o.reason.as_str()), "; "))
        };
        match (pays, self.shortage()) {
            (Ok(reason), _) => {
                let against = format!("it would copy what can be used in place ({})", evidence::WARM);
                Ok(mapped(reason, vec![Rejection::new(MemoryKind::Owned, against)]))
            }
            (Err(_), None) if self.policy.memory == MemoryChoice::Owned => {
                Ok(owned(format!("It was asked for. {}", self.fits()), Vec::new()))
            }
            (Err(against), None) => Ok(owned(
                self.fits(),
                vec![Rejection::new(MemoryKind::Mapped, against)],
            )),
            (Err(_), Some(shortage)) if obstacles.is_empty() => Ok(mapped(
                "Owned tensors would not fit into memory, and mappings are allowed: the kernel keeps \
                 as much of the files as there is room for."
                    .to_owned(),
                vec![Rejection::new(
                    MemoryKind::Owned,
                    format!(
                        "it takes {}, and {} leaves {}",
                        Bytes(shortage.needed_bytes),
                        shortage.bound,
                        Bytes(shortage.available_bytes)
                    ),
                )],
            )),
            (Err(_), Some(shortage)) => Err(PlanError::DoesNotFit {
                needed_bytes: shortage.needed_bytes,
                destination_bytes: self.workload.destination_bytes,
                available_bytes: shortage.available_bytes,
                bound: shortage.bound,
                mapping: format!(
                    "map the tensors instead: {}",
                    join(obstacles.iter().map(|o| o.remedy.as_str()), ", ")
                ),
            }),
        }
    }

    /// Everything that keeps the planner from choosing mapped memory, so that an error can name all of
    /// it at once.
    fn mapping_obstacles(&self) -> Vec<Obstacle> {
        let mut obstacles = Vec::new();
        if self.policy.memory == MemoryChoice::Owned {
            obstacles.push(Obstacle::new(
                "owned memory was asked for",
                "ask for mapped memory",
            ));
        }
        if self.policy.mapping == MappingConsent::Denied {
            obstacles.push(Obstacle::new(
                "the caller has not taken on the contract of mappings",
                "consent to the contract of mappings",
            ));
        }
        if let BackendChoice::Named(backend) = self.policy.backend
            && backend != BackendKind::Mmap
        {
            obstacles.push(Obstacle::new(
                format!("only the mmap backend maps, and {backend} was named"),
                "leave the backend to auto",
            ));
        }
        if let Some(obstacle) = self.obstacle(BackendKind::Mmap) {
            obstacles.push(Obstacle::new(
                format!("of the mmap backend: {}", obstacle.reason),
                obstacle.remedy,
            ));
        }
        obstacles
    }

    /// Whether mapping is better than reading where both are possible, and why or why not.
    fn mapping_pays(&self) -> std::result::Result<String, String> {
        if self.policy.backend == BackendChoice::Named(BackendKind::Mmap) {
            return Ok(
                "The mmap backend was named and mappings are allowed, so its mapping is handed \
                       out as it is."
                    .to_owned(),
            );
        }
        if self.policy.direct == DirectChoice::Policy(DirectPolicy::Preferred) {
            return Err("direct I/O was asked for, and a mapping is the page cache".to_owned());
        }
        match self.place {
            Place::PageCache if self.is_served() => Err(
                "when the server goes away, touching a page that the cache has dropped kills the process"
                    .to_owned(),
            ),
            Place::Memory | Place::PageCache => Ok(format!(
                "{} Mappings are allowed, so the tensors are used where they are.",
                self.whereabouts()
            )),
            Place::Server => Err(
                "every first touch of a page would wait for the server, and when that goes away the \
                 process is killed"
                    .to_owned(),
            ),
            Place::Unknown | Place::Device => Err(format!(
                "mapping pays for files that are in memory; cold, it is slower than reading ({})",
                evidence::COLD_MAPPING
            )),
        }
    }

    /// What owned tensors and the reads under way take, in bytes.
    fn needed_bytes(&self) -> u64 {
        // Scratch never exceeds what is read.
        let overhead = tuning::OVERHEAD_BYTES.min(self.workload.read_bytes);
        self.workload.destination_bytes.saturating_add(overhead)
    }

    /// The tightest bound on the load's memory, when any is known.
    fn bound(&self) -> Option<(u64, MemoryBound)> {
        let usable = self.platform.memory.usable_bytes().map(|(bytes, source)| {
            let bound = match source {
                "cgroup" => MemoryBound::ControlGroup,
                _ => MemoryBound::Machine,
            };
            (bytes, bound)
        });
        let limit = self
            .policy
            .memory_limit_bytes
            .map(|bytes| (bytes, MemoryBound::Limit));
        usable
            .into_iter()
            .chain(limit)
            .min_by_key(|(bytes, _)| *bytes)
    }

    fn shortage(&self) -> Option<Shortage> {
        let needed_bytes = self.needed_bytes();
        let (available_bytes, bound) = self.bound()?;
        (needed_bytes > available_bytes).then_some(Shortage {
            needed_bytes,
            available_bytes,
            bound,
        })
    }

    fn fits(&self) -> String {
        let needed = Bytes(self.needed_bytes());
        match self.bound() {
            Some((available, bound)) => format!(
                "It fits: with the reads under way the tensors take {needed}, and {bound} leaves {}.",
                Bytes(available)
            ),
            None => format!(
                "With the reads under way the tensors take {needed}; how much memory is left is not \
                 known."
            ),
        }
    }

    // ---- backend ----

    fn backend(&self, memory: MemoryKind) -> Result<(BackendKind, Decision)> {
        if memory == MemoryKind::Mapped {
            let reason = "Mapped memory comes from the mmap backend only.".to_owned();
            return Ok(decided("backend", BackendKind::Mmap, reason, Vec::new()));
        }
        let BackendChoice::Named(named) = self.policy.backend else {
            return self.suitable_backend();
        };
        // The name decides, but who named it may like to know what it was chosen over.
        let rejected = match self.suitable_backend() {
            Ok((suitable, decision)) if suitable != named => vec![Rejection::new(
                suitable,
                format!(
                    "{named} was named. Left to the planner: {}",
                    decision.reason
                ),
            )],
            Ok(_) | Err(_) => Vec::new(),
        };
        Ok(decided(
            "backend",
            named,
            "It was named.".to_owned(),
            rejected,
        ))
    }

    /// The first backend in the regime's order that can run.
    fn suitable_backend(&self) -> Result<(BackendKind, Decision)> {
        let regime = self.regime();
        let mut rejected = Vec::new();
        let mut chosen = None;
        for kind in regime.order() {
            match self.obstacle(kind) {
                Some(Obstacle { reason, remedy }) => {
                    rejected.push(Rejection::new(kind, format!("{reason} ({remedy})")));
                }
                None if chosen.is_none() => chosen = Some(kind),
                None => rejected.push(Rejection::new(kind, regime.against(kind))),
            }
        }
        let Some(chosen) = chosen else {
            return Err(PlanError::NoBackend { rejected });
        };
        let [first, ..] = regime.order();
        let mut reason = self.regime_reason(regime);
        if chosen != first {
            reason.push_str(&format!(
                " That speaks for {first}, which cannot be used; {chosen} is the next in order of \
                 preference."
            ));
        }
        Ok(decided("backend", chosen, reason, rejected))
    }

    fn regime(&self) -> Regime {
        let large = self.workload.read_bytes >= tuning::LARGE_LOAD_BYTES;
        match (self.place, self.workload.layout, self.workload.access) {
            (Place::Memory | Place::PageCache, ..) => Regime::Copy,
            (Place::Server, ..) => Regime::Server,
            (_, StorageLayout::ServerlessLlm, AccessPattern::Ranges) => Regime::Extents,
            (_, StorageLayout::ServerlessLlm, AccessPattern::WholeFiles) if large => Regime::Large,
            (_, StorageLayout::ServerlessLlm, AccessPattern::WholeFiles) => Regime::SmallPartitions,
            // A selection is merged into extents and cut into chunks, so its bytes count, not its
            // pattern.
            (_, StorageLayout::SafeTensors, _) if large && self.workload.files > 1 => Regime::Large,
            (_, StorageLayout::SafeTensors, _) => Regime::Small,
        }
    }

    fn regime_reason(&self, regime: Regime) -> String {
        let size = Bytes(self.workload.read_bytes);
        let files = self.files();
        let large = large_load();
        match regime {
            Regime::Copy => format!(
                "{} What is left to do is a copy, and threads spread it over the CPUs.",
                self.whereabouts()
            ),
            Regime::Server => format!(
                "{} A few threads, each with a long sequence to read, suit it best.",
                self.whereabouts()
            ),
            Regime::Large => format!(
                "{size} in {files} is a large load, {large} or more, and large loads favour rings ({}).",
                evidence::LARGE
            ),
            Regime::Extents => format!(
                "These are ranges of a ServerlessLLM directory, {} in {files}; tasks grouped per file \
                 read each partition's ranges together.",
                count(self.workload.requests, "extent"),
            ),
            Regime::SmallPartitions => format!(
                "{size} in {files} is below {large}, where threads are at least as fast as rings ({}).",
                evidence::PARTITIONS
            ),
            Regime::Small if self.workload.files > 1 => format!(
                "{size} in {files} is below {large}, and small loads favour threads ({}).",
                evidence::SMALL
            ),
            Regime::Small => format!(
                "{size} in {files}: threads are at least as fast as rings on one shard ({}).",
                evidence::SMALL
            ),
        }
    }

    // ---- direct ----

    fn direct(&self, backend: BackendKind, memory: MemoryKind) -> (DirectPolicy, Decision) {
        let preferred = DirectPolicy::Preferred;
        let decided =
            |policy, reason: String, rejected| decided("direct", policy, reason, rejected);

        if backend == BackendKind::Mmap {
            let reason = match memory {
                MemoryKind::Mapped => "A mapping is the page cache itself.",
                MemoryKind::Owned => "The mmap backend reads through the page cache.",
            };
            let rejected = match self.policy.direct {
                DirectChoice::Policy(DirectPolicy::Preferred) => vec![Rejection::new(
                    preferred,
                    "it was asked for, but there is nothing to read directly with this backend",
                )],
                _ => Vec::new(),
            };
            return decided(DirectPolicy::Never, reason.to_owned(), rejected);
        }
        if let DirectChoice::Policy(policy) = self.policy.direct {
            let mut reason = "It was asked for.".to_owned();
            if policy == preferred
                && let Err(against) = self.supports_direct()
            {
                reason.push_str(&format!(" Reads will be buffered all the same: {against}."));
            }
            return decided(policy, reason, Vec::new());
        }
        match self.direct_pays() {
            Ok(reason) => decided(
                preferred,
                reason,
                vec![Rejection::new(
                    DirectPolicy::Never,
                    "reading through the page cache costs a second copy and reaches a part of the \
                     device's speed only",
                )],
            ),
            Err(against) => decided(
                DirectPolicy::Never,
                "Reads go through the page cache.".to_owned(),
                vec![Rejection::new(preferred, against)],
            ),
        }
    }

    fn supports_direct(&self) -> std::result::Result<(), String> {
        match self
            .platform
            .storage
            .as_ref()
            .map(|storage| &storage.direct)
        {
            None => Err("the storage was not probed for direct I/O".to_owned()),
            Some(DirectSupport::Supported { .. }) => Ok(()),
            Some(DirectSupport::Unsupported { reason }) => Err(format!(
                "the storage does not support direct I/O ({reason})"
            )),
        }
    }

    /// Whether direct reads are better than buffered ones where both are possible.
    fn direct_pays(&self) -> std::result::Result<String, String> {
        match self.place {
            Place::Memory => {
                return Err("the files live in memory, so there is no device to read".to_owned());
            }
            Place::PageCache => {
                return Err(format!(
                    "it would fetch from the device what is in the page cache already ({})",
                    evidence::WARM
                ));
            }
            Place::Server => {
                return Err(
                    "a server's files gain from read-ahead, which direct reads do without"
                        .to_owned(),
                );
            }
            Place::Unknown | Place::Device => self.supports_direct()?,
        }
        let read = self.workload.read_bytes;
        if read < tuning::DIRECT_MIN_READ_BYTES {
            return Err(format!(
                "{} is too little to be worth it (from {})",
                Bytes(read),
                Bytes(tuning::DIRECT_MIN_READ_BYTES)
            ));
        }
        let mean = read / self.workload.requests.max(1);
        if mean < tuning::DIRECT_MIN_MEAN_REQUEST_BYTES {
            return Err(format!(
                "the requests are too short, {} on average (from {}): read-ahead serves neighbours \
                 together",
                Bytes(mean),
                Bytes(tuning::DIRECT_MIN_MEAN_REQUEST_BYTES)
            ));
        }
        Ok(format!(
            "{} The storage supports direct I/O, and direct reads saturate the device.",
            self.whereabouts()
        ))
    }

    // ---- transfer parameters ----

    fn params(
        &self,
        backend: BackendKind,
        direct: DirectPolicy,
    ) -> (TransferParams, [Decision; 3]) {
        let shape = self.shape(backend, direct);
        let (chunk_bytes, chunk) = self.chunk_bytes(shape);
        let (workers, worker) = self.workers(shape, chunk_bytes);
        let (queue_depth, depth) = self.queue_depth(shape, chunk_bytes, workers);
        let params = TransferParams {
            chunk_bytes,
            queue_depth,
            workers,
            direct,
        };
        (params, [chunk, worker, depth])
    }

    fn shape(&self, backend: BackendKind, direct: DirectPolicy) -> Shape {
        let rings = backend == BackendKind::IoUring;
        let reads_direct = match direct {
            DirectPolicy::Never => false,
            DirectPolicy::Preferred => self.supports_direct().is_ok(),
            DirectPolicy::Required => true,
        };
        match backend {
            _ if self.place == Place::Server => Shape::Server { rings },
            BackendKind::Mmap => Shape::Map,
            BackendKind::IoUring => Shape::Rings,
            BackendKind::Sync | BackendKind::Async if reads_direct => Shape::Device,
            BackendKind::Sync | BackendKind::Async => Shape::Copy,
        }
    }

    fn chunk_bytes(&self, shape: Shape) -> (u64, Decision) {
        let (mut auto, mut reason) = match shape {
            Shape::Server { .. } => (
                tuning::SERVER_CHUNK_BYTES,
                "Long sequential reads suit a server.".to_owned(),
            ),
            Shape::Device | Shape::Rings => (
                tuning::DEVICE_CHUNK_BYTES,
                "Long enough for the device's full speed, short enough to keep many in flight."
                    .to_owned(),
            ),
            Shape::Copy => (
                tuning::COPY_CHUNK_BYTES,
                "Through the page cache, longer reads save calls and keep read-ahead going."
                    .to_owned(),
            ),
            Shape::Map => (
                tuning::MAP_CHUNK_BYTES,
                "Two huge pages: enough to save calls, little enough to share out evenly."
                    .to_owned(),
            ),
        };
        let fitting = self.fitting_chunk_bytes();
        if fitting < auto {
            auto = fitting;
            reason = format!(
                "No request is longer than {}, so longer chunks would never be filled.",
                Bytes(self.workload.largest_request_bytes)
            );
        }
        overridable("chunk_bytes", auto, self.policy.chunk_bytes, reason)
    }

    /// The smallest power of two that holds the longest request, also when its ends are rounded outwards
    /// to blocks.
    fn fitting_chunk_bytes(&self) -> u64 {
        let align = match self
            .platform
            .storage
            .as_ref()
            .map(|storage| &storage.direct)
        {
            Some(DirectSupport::Supported {
                offset_align_bytes, ..
            }) => u64::from(*offset_align_bytes),
            _ => 0,
        };
        match self.workload.largest_request_bytes {
            0 => u64::MAX,
            largest => largest
                .saturating_add(2 * align)
                .checked_next_power_of_two()
                .unwrap_or(u64::MAX)
                .max(TransferParams::MIN_CHUNK_BYTES),
        }
    }

    /// Chunks that there are to read, at least: requests are cut, never joined, but how their lengths are
    /// spread is not known.
    fn fewest_chunks(&self, chunk_bytes: u64) -> u64 {
        let read_bytes = self.workload.read_bytes;
        read_bytes
            .div_ceil(chunk_bytes)
            .max(self.workload.requests.min(read_bytes))
            .max(1)
    }

    fn workers(&self, shape: Shape, chunk_bytes: u64) -> (u32, Decision) {
        let cpus = self.platform.cpus;
        let (mut auto, mut reason) = match shape {
            Shape::Server { rings: true } => {
                (tuning::MIN_RINGS, "Two rings share a handful of reads.".to_owned())
            }
            Shape::Server { rings: false } => (
                tuning::SERVER_MAX_READS,
                "A few reads at once hide the round trip; more make the server seek.".to_owned(),
            ),
            Shape::Device => (
                tuning::DEVICE_WORKERS,
                "They wait for the device rather than compute, so the device's queue decides, not the \
                 CPUs."
                    .to_owned(),
            ),
            Shape::Rings => (
                cpus.clamp(tuning::MIN_RINGS, tuning::MAX_RINGS),
                "One ring alone starves while its destination pages are faulted in; beyond a few there \
                 is nothing left to gain."
                    .to_owned(),
            ),
            Shape::Copy => (
                cpus.clamp(tuning::COPY_MIN_WORKERS, tuning::COPY_MAX_WORKERS),
                format!(
                    "Going through the page cache is a copy, and so work for the {}.",
                    count(cpus.into(), "CPU")
                ),
            ),
            Shape::Map => (
                cpus.clamp(tuning::MAP_MIN_WORKERS, tuning::MAP_MAX_WORKERS),
                "Populating waits for the device where files are cold and sets up pages where they are \
                 not; several workers do both faster."
                    .to_owned(),
            ),
        };
        let room = (tuning::MAX_IN_FLIGHT_BYTES / chunk_bytes).max(1);
        if shape.takes_scratch() && room < u64::from(auto) {
            auto = saturate(room);
            reason = format!(
                "More chunks of {} at once would exceed {} in flight.",
                Bytes(chunk_bytes),
                Bytes(tuning::MAX_IN_FLIGHT_BYTES)
            );
        }
        let chunks = self.fewest_chunks(chunk_bytes);
        if chunks < u64::from(auto) {
            auto = saturate(chunks);
            reason = format!(
                "More would find nothing to do: {} to read.",
                there_are(chunks)
            );
        }
        overridable("workers", auto, self.policy.workers, reason)
    }

    fn queue_depth(&self, shape: Shape, chunk_bytes: u64, workers: u32) -> (u32, Decision) {
        let (mut auto, mut reason) = match shape {
            Shape::Rings => (
                tuning::RING_DEPTH,
                "Together the rings keep the device's queue full.".to_owned(),
            ),
            Shape::Server { rings: true } => (
                tuning::SERVER_MAX_READS / tuning::MIN_RINGS,
                "A few reads at once hide the round trip; more make the server seek.".to_owned(),
            ),
            Shape::Server { rings: false } | Shape::Device | Shape::Copy | Shape::Map => {
                let rejected = match self.policy.queue_depth {
                    Some(set) if set > 1 => {
                        vec![Rejection::new(
                            set,
                            "it was set, but has no effect without rings",
                        )]
                    }
                    _ => Vec::new(),
                };
                let reason = "Only rings keep more than one read in flight per worker.".to_owned();
                return decided("queue_depth", 1, reason, rejected);
            }
        };
        let workers = u64::from(workers);
        let room = (tuning::MAX_IN_FLIGHT_BYTES / chunk_bytes / workers).max(1);
        if room < u64::from(auto) {
            auto = saturate(room);
            reason = format!(
                "{} with more reads of {} each would exceed {} in flight.",
                count(workers, "ring"),
                Bytes(chunk_bytes),
                Bytes(tuning::MAX_IN_FLIGHT_BYTES)
            );
        }
        let chunks = self.fewest_chunks(chunk_bytes);
        let share = chunks.div_ceil(workers);
        if share < u64::from(auto) {
            auto = saturate(share);
            reason = format!("More would never be used: {} to read.", there_are(chunks));
        }
        overridable("queue_depth", auto, self.policy.queue_depth, reason)
    }

    // ---- words ----

    fn is_served(&self) -> bool {
        self.platform.storage.as_ref().is_some_and(|storage| {
            matches!(
                storage.class,
                FileSystemClass::Network | FileSystemClass::Fuse
            )
        })
    }

    /// `5 shards`, `1 partition`.
    fn files(&self) -> String {
        count(self.workload.files.into(), self.workload.layout.file_term())
    }

    /// A sentence about where the bytes are.
    fn whereabouts(&self) -> String {
        let Some(storage) = &self.platform.storage else {
            return "Where the files are is not known.".to_owned();
        };
        let file_system = &storage.file_system;
        match self.place {
            Place::Memory => format!("The files live in memory ({file_system})."),
            Place::Server => {
                format!("The files are behind a server ({file_system}), not in the page cache.")
            }
            _ => match resident_percent(storage) {
                Some(0) => "The files are not in the page cache.".to_owned(),
                Some(100) => "The files are in the page cache.".to_owned(),
                Some(percent) => format!("{percent} % of the files is in the page cache."),
                None => {
                    "Whether the files are in the page cache is not known, so they count as cold."
                        .to_owned()
                }
            },
        }
    }
}

/// What kind of transfer the parameters are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    /// Few long reads from a server.
    Server { rings: bool },
    /// Direct reads on threads or tasks.
    Device,
    /// Direct or buffered reads on rings.
    Rings,
    /// Buffered reads on threads or tasks.
    Copy,
    /// Population of a mapping.
    Map,
}

impl Shape {
    /// Whether reads may go through scratch buffers, so that what is in flight takes memory.
    fn takes_scratch(self) -> bool {
        !matches!(self, Self::Copy | Self::Map)
    }
}

fn decided<T: fmt::Display>(
    field: &'static str,
    chosen: T,
    reason: String,
    rejected: Vec<Rejection>,
) -> (T, Decision) {
    let decision = Decision {
        field,
        chosen: chosen.to_string(),
        reason,
        rejected,
    };
    (chosen, decision)
}

/// The planner's value, or the one that the caller set instead.
fn overridable<T: fmt::Display + Copy + PartialEq>(
    field: &'static str,
    auto: T,
    set: Option<T>,
    reason: String,
) -> (T, Decision) {
    match set {
        None => decided(field, auto, reason, Vec::new()),
        Some(set) => {
            let rejected = if set == auto {
                Vec::new()
            } else {
                vec![Rejection::new(
                    auto,
                    format!("another value was set. {reason}"),
                )]
            };
            decided(field, set, "It was set.".to_owned(), rejected)
        }
    }
}

/// `4 GB (3.73 GiB)`: the regime table's round figure, and the same in the unit of all other sizes.
fn large_load() -> String {
    let bytes = tuning::LARGE_LOAD_BYTES;
    format!("{} GB ({})", bytes / 1_000_000_000, Bytes(bytes))
}

fn there_are(chunks: u64) -> String {
    let verb = if chunks == 1 { "is" } else { "are" };
    format!("there {verb} {}", count(chunks, "chunk"))
}

fn join<'a>(parts: impl Iterator<Item = &'a str>, separator: &str) -> String {
    parts.collect::<Vec<_>>().join(separator)
}

fn saturate(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
