mod backend;
mod direct;
mod memory;
mod params;
mod profile;
mod resident;
mod sharing;
mod stream;

use std::fmt;

use profile::Pick;
use stream::Windows;
pub use stream::{merge_gap_bytes, plan_stream};
use tensora_io::{
    Availability, BackendKind, DirectPolicy, DirectSupport, FileSystemClass, Platform,
    StorageFacts, TransferParams,
};

use crate::tuning;
use crate::units::count;
use crate::{
    BackendChoice, CacheChoice, Decision, DirectChoice, MappingConsent, MemoryChoice, MemoryKind,
    Plan, PlanError, Policy, Rejection, Result, Workload,
};

/// Decides how to read `workload` on `platform` as `policy` wishes.
///
/// What the policy names is obeyed or refused. What it leaves open is decided from, in this order: what
/// can run here and fits into memory; where the files are and how much of them is in the page cache;
/// what was measured of such loads here ([`Platform::profile`]); and, where nothing was, the regime table
/// (layout, access, files and bytes). Facts that are unknown count as the less
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
    if policy.memory == MemoryChoice::Mapped && workload.gathered_tensors > 0 {
        return Err(PlanError::MappedWithGathered {
            tensors: workload.gathered_tensors,
        });
    }
    let mut case = Case::new(workload, platform, policy);
    case.check_facts()?;
    case.check_sharing()?;

    let (memory, memory_decision) = case.memory()?;
    if memory == MemoryKind::Owned {
        case.crowded = case.is_crowded();
    }
    let constants = case.choose(memory, None)?;
    let (choice, profile_decision) = case.weigh(memory, constants)?;
    let Choice {
        backend, params, ..
    } = choice;

    let (sharing, sharing_decision) = case.sharing(memory).unzip();
    let mut decisions = vec![memory_decision];
    decisions.extend(choice.decisions);
    decisions.extend(case.slices(memory));
    decisions.extend(sharing_decision);
    decisions.extend(profile_decision);
    Ok(Plan {
        backend,
        memory,
        params,
        window_limit_bytes: case.window_limit_bytes(memory),
        sharing,
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
    match (policy.cache, policy.direct) {
        (CacheChoice::Keep, DirectChoice::Policy(direct)) if direct != DirectPolicy::Never => {
            return Err(PlanError::KeepWithDirect { direct });
        }
        (CacheChoice::Bypass, DirectChoice::Policy(DirectPolicy::Never)) => {
            return Err(PlanError::BypassWithBuffered);
        }
        _ => {}
    }
    if policy.cache == CacheChoice::Bypass {
        if policy.memory == MemoryChoice::Mapped {
            return Err(PlanError::BypassWithMapped);
        }
        if policy.backend == BackendChoice::Named(BackendKind::Mmap) {
            return Err(PlanError::BypassWithMmap);
        }
    }
    Ok(())
}

/// Where the bytes are, as far as it changes how to read them. These facts stand above the regime table.
///
/// For a selection the share of whole files that is in the page cache stands for that of its extents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Nobody looked.
    Unknown,
    /// In a file system that lives in memory.
    Memory,
    /// In the page cache, as good as completely, and reads may take them from there.
    PageCache,
    /// Partly in the page cache: chunks that are there are copied while the others are read.
    Mixed,
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
            _ if is_partly_resident(storage) && !bypassed => Self::Mixed,
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

fn is_partly_resident(storage: &StorageFacts) -> bool {
    resident_percent(storage).is_some_and(|percent| percent >= tuning::PARTLY_RESIDENT_PERCENT)
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

/// The inputs, and what follows from them for every decision.
struct Case<'a> {
    workload: &'a Workload,
    platform: &'a Platform,
    policy: &'a Policy,
    place: Place,
    /// What is in the page cache and owned tensors do not fit into memory together.
    crowded: bool,
    /// The tensors are visited through buffers, not held.
    streams: bool,
}

/// How to read into memory that is decided upon.
struct Choice {
    backend: BackendKind,
    params: TransferParams,
    /// What a stream reads into, whose readers are the parameters' workers; nothing for a load.
    windows: Windows,
    decisions: Vec<Decision>,
}

impl<'a> Case<'a> {
    /// A load; nothing is decided but where the bytes are.
    fn new(workload: &'a Workload, platform: &'a Platform, policy: &'a Policy) -> Self {
        Self {
            workload,
            platform,
            policy,
            place: Place::of(platform.storage.as_ref(), policy),
            crowded: false,
            streams: false,
        }
    }

    /// Decides everything but the memory: by constants, or as it was measured.
    fn choose(&self, memory: MemoryKind, pick: Option<&Pick<'_>>) -> Result<Choice> {
        let (backend, backend_decision) = self.backend(memory, pick)?;
        let (direct, direct_decision) = self.direct(backend, memory, pick);
        let (resident, resident_decision) = self.resident(backend, direct);
        let mut decisions = vec![backend_decision, direct_decision];
        decisions.extend(resident_decision);
        let (params, windows) = if self.streams {
            let (params, windows, param_decisions) =
                self.stream_params(backend, direct, resident, pick)?;
            decisions.extend(param_decisions);
            (params, windows)
        } else {
            let (params, param_decisions) = self.params(backend, direct, resident, pick);
            decisions.extend(param_decisions);
            (params, Windows::default())
        };
        Ok(Choice {
            backend,
            params,
            windows,
            decisions,
        })
    }

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
        if let Some(storage) = &self.platform.storage
            && let DirectSupport::Unsupported { reason } = &storage.direct
        {
            if self.policy.direct.is_required() {
                return Err(PlanError::DirectUnsupported {
                    file_system: storage.file_system.clone(),
                    reason: reason.clone(),
                });
            }
            if self.bypasses_cache() {
                return Err(PlanError::BypassUnsupported {
                    file_system: storage.file_system.clone(),
                    reason: reason.clone(),
                });
            }
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
            Some(Availability::Available) if kind == BackendKind::Mmap && self.bypasses_cache() => {
                Some(Obstacle::new(
                    "it reads through the page cache, which is to be bypassed",
                    "leave the cache to auto",
                ))
            }
            Some(Availability::Available) => None,
        }
    }

    /// Whether reads have to leave the page cache as it is. Files that live in memory have no copy there.
    fn bypasses_cache(&self) -> bool {
        self.policy.cache == CacheChoice::Bypass && self.place != Place::Memory
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
                format!("The files are behind a server ({file_system}).")
            }
            Place::Unknown | Place::PageCache | Place::Mixed | Place::Device => self.residency(),
        }
    }

    /// A sentence about how much of the files is in the page cache.
    fn residency(&self) -> String {
        match self.resident_percent() {
            Some(0) => "The files are not in the page cache.".to_owned(),
            Some(100) => "The files are in the page cache.".to_owned(),
            Some(percent) => format!("{percent} % of the files is in the page cache."),
            None => "Whether the files are in the page cache is not known, so they count as cold."
                .to_owned(),
        }
    }

    /// See [`resident_percent`]; `None` also when the storage was not probed.
    fn resident_percent(&self) -> Option<u64> {
        resident_percent(self.platform.storage.as_ref()?)
    }

    /// Whether copying what is in the page cache takes longer than reading the rest.
    fn is_mostly_resident(&self) -> bool {
        self.resident_percent()
            .is_some_and(|percent| percent >= tuning::MOSTLY_RESIDENT_PERCENT)
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
