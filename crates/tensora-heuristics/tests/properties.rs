//! What holds of every plan, whatever the workload, the platform and the policy.

mod common;

use common::platform;
use proptest::prelude::*;
use proptest::{option, sample};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tensora_heuristics::{
    AccessPattern, BackendChoice, CacheChoice, Decision, DirectChoice, MappingConsent,
    MemoryChoice, MemoryKind, Plan, PlanError, Policy, Proposal, SharedBy, SharedWorkload,
    StorageLayout, StreamPlan, Workload, merge_gap_bytes, plan, plan_stream,
};
use tensora_io::{
    Availability, BackendKind, CacheState, DirectPolicy, DirectSupport, FileSystemClass,
    Measurement, MemoryKind as Memory, Platform, Profile, ProfileFact, ProfileIdentity,
    ResidentPolicy, StorageFacts, TransferParams,
};

/// Sizes of every magnitude, and the extremes.
fn size() -> impl Strategy<Value = u64> {
    prop_oneof![
        1 => Just(0),
        1 => Just(u64::MAX),
        8 => (0_u32..64, any::<u64>()).prop_map(|(bits, noise)| noise >> bits),
    ]
}

fn workload() -> impl Strategy<Value = Workload> {
    (
        sample::select(vec![
            StorageLayout::SafeTensors,
            StorageLayout::ServerlessLlm,
        ]),
        sample::select(vec![AccessPattern::WholeFiles, AccessPattern::Ranges]),
        0_u32..300,
        (size(), size(), size(), size(), size()),
        option::weighted(0.5, (size(), size(), size(), size())),
        option::weighted(0.3, size()),
        option::weighted(0.3, (0_u32..10, size(), size())),
    )
        .prop_map(
            |(layout, access, files, sizes, slices, index_bytes, shared)| {
                let mut workload = Workload::new(layout, access);
                workload.files = files;
                (
                    workload.tensors,
                    workload.read_bytes,
                    workload.requests,
                    workload.largest_request_bytes,
                    workload.destination_bytes,
                ) = sizes;
                if let Some(slices) = slices {
                    (
                        workload.needed_bytes,
                        workload.gathered_tensors,
                        workload.gathered_bytes,
                        workload.indivisible_bytes,
                    ) = slices;
                }
                workload.index_bytes = index_bytes.unwrap_or(0);
                workload.shared = shared.map(|(world, shared_bytes, exclusive_bytes)| {
                    SharedWorkload::new(world, shared_bytes, exclusive_bytes)
                });
                workload
            },
        )
}

fn storage() -> impl Strategy<Value = StorageFacts> {
    (
        sample::select(vec![
            FileSystemClass::Local,
            FileSystemClass::Memory,
            FileSystemClass::Network,
            FileSystemClass::Fuse,
            FileSystemClass::Overlay,
            FileSystemClass::Unknown,
        ]),
        option::of(sample::select(vec![1_u32, 512, 4096, 1 << 31])),
        size(),
        option::of((0_u64..=110, size())),
    )
        .prop_map(|(class, align, file_bytes, resident)| {
            let mut storage = StorageFacts::unknown();
            storage.class = class;
            storage.file_bytes = file_bytes;
            if let Some(align) = align {
                storage.direct = DirectSupport::Supported {
                    offset_align_bytes: align,
                    memory_align_bytes: align,
                };
            }
            // Mostly a share of the files, sometimes a figure that makes no sense.
            storage.resident_bytes = resident.map(|(percent, any)| match percent {
                0..=100 => file_bytes / 100 * percent,
                _ => any,
            });
            storage.resident_is_estimate = storage.is_resident() && file_bytes % 2 == 0;
            storage
        })
}

/// Anything that a file of measurements may say, sense or not.
fn measurement() -> impl Strategy<Value = Measurement> {
    (
        sample::select(vec![CacheState::Cold, CacheState::Half, CacheState::Warm]),
        sample::select(vec![Memory::Owned, Memory::Owned, Memory::Mapped]),
        sample::select(BackendKind::ALL.to_vec()),
        sample::select(vec![DirectPolicy::Never, DirectPolicy::Preferred]),
        sample::select(vec![ResidentPolicy::Reread, ResidentPolicy::Copy]),
        (
            prop_oneof![9 => 4096_u64..(8 << 20), 1 => Just(0)],
            0_u32..200,
            0_u32..300,
        ),
        size(),
        proptest::collection::vec(size(), 0..4),
    )
        .prop_map(
            |(cache, memory, backend, direct, resident, params, bytes, elapsed_us)| Measurement {
                cache,
                memory,
                backend,
                params: TransferParams {
                    chunk_bytes: params.0,
                    queue_depth: params.1,
                    workers: params.2,
                    direct,
                    resident,
                },
                bytes,
                elapsed_us,
            },
        )
}

fn profile() -> impl Strategy<Value = ProfileFact> {
    (
        0..6,
        any::<u64>(),
        proptest::collection::vec(measurement(), 0..30),
    )
        .prop_map(|(kind, made_at_unix_s, measurements)| match kind {
            0 => ProfileFact::NotSought,
            1 => ProfileFact::Absent,
            2 => ProfileFact::Ignored {
                reason: "it is foreign".to_owned(),
            },
            _ => ProfileFact::Matching(Box::new(Profile {
                version: Profile::VERSION,
                made_by: "0.1.0".to_owned(),
                made_at_unix_s,
                // Whether it matches is not the planner's to find out.
                identity: ProfileIdentity::of(&platform(2)).expect("the base has storage"),
                measurements,
            })),
        })
}

fn facts() -> impl Strategy<Value = Platform> {
    (
        1_u32..300,
        proptest::collection::vec(0..8, BackendKind::ALL.len()),
        option::of(storage()),
        option::of(size()),
        option::of(size()),
        option::weighted(0.2, size()),
        profile(),
        sample::select(vec!["linux", "macos"]),
    )
        .prop_map(
            |(cpus, states, storage, available, cgroup, address_space, profile, os)| {
                let mut platform = platform(cpus);
                platform.os = os.to_owned();
                platform.memory.address_space_available_bytes = address_space;
                let mut states = states.into_iter();
                platform.backends.retain_mut(|fact| match states.next() {
                    Some(0) => false,
                    Some(1) => {
                        fact.availability = Availability::Unavailable {
                            reason: "blocked".to_owned(),
                            remedy: "unblock it".to_owned(),
                        };
                        true
                    }
                    _ => true,
                });
                platform.storage = storage;
                platform.profile = profile;
                platform.memory.available_bytes = available;
                platform.memory.cgroup_available_bytes = cgroup;
                platform
            },
        )
}

fn policy() -> impl Strategy<Value = Policy> {
    let backends = BackendKind::ALL.map(BackendChoice::Named);
    (
        prop_oneof![Just(BackendChoice::Auto), sample::select(backends.to_vec())],
        sample::select(vec![
            MemoryChoice::Auto,
            MemoryChoice::Auto,
            MemoryChoice::Auto,
            MemoryChoice::Auto,
            MemoryChoice::Owned,
            MemoryChoice::Mapped,
        ]),
        sample::select(vec![MappingConsent::Denied, MappingConsent::Granted]),
        sample::select(vec![
            DirectChoice::Auto,
            DirectChoice::Auto,
            DirectChoice::Policy(DirectPolicy::Never),
            DirectChoice::Policy(DirectPolicy::Preferred),
            DirectChoice::Policy(DirectPolicy::Required),
        ]),
        sample::select(vec![
            CacheChoice::Auto,
            CacheChoice::Auto,
            CacheChoice::Auto,
            CacheChoice::Keep,
            CacheChoice::Bypass,
        ]),
        option::weighted(0.2, 4000_u64..(3 << 29)),
        option::weighted(0.2, 0_u32..1100),
        option::weighted(0.2, 0_u32..300),
        option::weighted(0.2, size()),
    )
        .prop_map(
            |(
                backend,
                memory,
                mapping,
                direct,
                cache,
                chunk_bytes,
                queue_depth,
                workers,
                limit,
            )| {
                let mut policy = Policy::default();
                policy.backend = backend;
                policy.memory = memory;
                policy.mapping = mapping;
                policy.direct = direct;
                policy.cache = cache;
                policy.chunk_bytes = chunk_bytes;
                policy.queue_depth = queue_depth;
                policy.workers = workers;
                policy.memory_limit_bytes = limit;
                policy
            },
        )
}

fn input<T: DeserializeOwned>(json: &Value, key: &str) -> T {
    serde_json::from_value(json[key].clone()).expect("inputs deserialize")
}

/// Everything that is promised of a plan.
fn check(plan: &Plan) -> Result<(), TestCaseError> {
    let Plan {
        backend,
        memory,
        params,
        decisions,
        workload,
        platform,
        policy,
        ..
    } = plan;

    prop_assert_eq!(
        platform.availability(*backend),
        Some(&Availability::Available)
    );
    prop_assert!(params.validate().is_ok());
    if let BackendChoice::Named(named) = policy.backend {
        prop_assert_eq!(*backend, named);
    }

    match memory {
        MemoryKind::Mapped => {
            prop_assert_eq!(policy.mapping, MappingConsent::Granted);
            prop_assert_eq!(*backend, BackendKind::Mmap);
            prop_assert_ne!(policy.memory, MemoryChoice::Owned);
            prop_assert_eq!(workload.gathered_tensors, 0);
            prop_assert_eq!(plan.window_limit_bytes, 0);
        }
        MemoryKind::Owned => {
            prop_assert_ne!(policy.memory, MemoryChoice::Mapped);
            // All that is held, windows that are made for it included, and at least what they take.
            let held = held_bytes(workload).saturating_add(plan.window_limit_bytes);
            prop_assert!(bounds(platform, policy).all(|bound| held <= bound));
            let windows = workload.gathered_tensors > 0 || plan.sharing == Some(SharedBy::Memory);
            if windows {
                prop_assert!(plan.window_limit_bytes >= least_windows_bytes(workload));
            } else {
                prop_assert_eq!(plan.window_limit_bytes, 0);
            }
        }
    }

    let supports_direct = platform
        .storage
        .as_ref()
        .is_some_and(|storage| storage.direct.is_supported());
    // Nobody knows whether direct reads work, and nothing else will do.
    let has_to_work = policy.cache == CacheChoice::Bypass && platform.storage.is_none();
    match policy.direct {
        DirectChoice::Policy(DirectPolicy::Required) => {
            prop_assert_eq!(params.direct, DirectPolicy::Required);
            prop_assert!(plan.reads_direct());
            prop_assert_ne!(*backend, BackendKind::Mmap);
        }
        DirectChoice::Policy(DirectPolicy::Never) => {
            prop_assert_eq!(params.direct, DirectPolicy::Never);
        }
        DirectChoice::Policy(DirectPolicy::Preferred) => {
            prop_assert!(params.direct != DirectPolicy::Required || has_to_work);
        }
        DirectChoice::Auto if has_to_work => {
            prop_assert_eq!(params.direct, DirectPolicy::Required);
        }
        DirectChoice::Auto if params.direct != DirectPolicy::Never => {
            prop_assert_eq!(params.direct, DirectPolicy::Preferred);
            prop_assert!(supports_direct);
        }
        DirectChoice::Auto => {}
    }
    if *backend == BackendKind::Mmap {
        prop_assert_eq!(params.direct, DirectPolicy::Never);
    }

    let in_memory = platform
        .storage
        .as_ref()
        .is_some_and(|storage| storage.class == FileSystemClass::Memory);
    match policy.cache {
        CacheChoice::Auto => {}
        CacheChoice::Keep => {
            prop_assert_eq!(params.direct, DirectPolicy::Never);
            let drops = matches!(params.resident, ResidentPolicy::CopyAndDrop { .. });
            prop_assert!(!drops);
        }
        CacheChoice::Bypass => prop_assert!(plan.reads_direct() || in_memory),
    }

    // What is in the page cache is left alone unless direct reads were left to the planner, and dropped
    // from it only so far as it is there or will be.
    let named = matches!(policy.direct, DirectChoice::Policy(_));
    if named && plan.reads_direct() {
        prop_assert_eq!(params.resident, ResidentPolicy::Reread);
    }
    if let ResidentPolicy::CopyAndDrop { limit_bytes } = params.resident {
        let storage = platform.storage.as_ref().expect("it was probed");
        let resident = storage.resident_bytes.expect("it is known");
        let usable = platform.memory.usable_bytes().expect("it is known").0;
        prop_assert_ne!(storage.class, FileSystemClass::Memory);
        let ranks = workload
            .shared
            .as_ref()
            .map_or(1, |shared| shared.world.max(1));
        let filled = workload.destination_bytes.saturating_mul(ranks.into());
        prop_assert!(filled.saturating_add(resident) > usable);
        prop_assert!(limit_bytes > 0);
        prop_assert!(limit_bytes <= resident.max(workload.read_bytes));
    }

    // What the planner chose itself is bounded by the work and by memory; what was set stands.
    prop_assert_eq!(
        policy.chunk_bytes.unwrap_or(params.chunk_bytes),
        params.chunk_bytes
    );
    prop_assert_eq!(policy.workers.unwrap_or(params.workers), params.workers);
    if *backend == BackendKind::IoUring {
        prop_assert_eq!(
            policy.queue_depth.unwrap_or(params.queue_depth),
            params.queue_depth
        );
    } else {
        prop_assert_eq!(params.queue_depth, 1);
    }
    if policy.workers.is_none() {
        let chunks = workload.read_bytes.div_ceil(params.chunk_bytes);
        let chunks = chunks.saturating_add(workload.requests).max(1);
        prop_assert!(u64::from(params.workers) <= chunks);
    }
    let takes_scratch = *backend == BackendKind::IoUring || plan.reads_direct();
    // What was measured stands as it was measured.
    let measured = matches!(platform.profile, ProfileFact::Matching(_));
    if takes_scratch
        && !measured
        && (policy.chunk_bytes, policy.queue_depth, policy.workers) == (None, None, None)
    {
        let in_flight =
            params.chunk_bytes * u64::from(params.queue_depth) * u64::from(params.workers);
        prop_assert!(in_flight <= 64 << 20);
    }

    // Each field is decided once, with the value that the plan has and a reason for it.
    let decided: Vec<_> = decisions
        .iter()
        .map(|decision| (decision.field, decision.chosen.clone()))
        .collect();
    let resident = match params.resident {
        ResidentPolicy::Reread => "reread",
        ResidentPolicy::Copy => "copy",
        ResidentPolicy::CopyAndDrop { .. } => "copy-and-drop",
    };
    let mut expected = vec![
        ("memory", memory.to_string()),
        ("backend", backend.to_string()),
        ("direct", params.direct.to_string()),
    ];
    if *backend != BackendKind::Mmap {
        expected.push(("resident", resident.to_owned()));
    }
    expected.extend([
        ("chunk_bytes", params.chunk_bytes.to_string()),
        ("workers", params.workers.to_string()),
        ("queue_depth", params.queue_depth.to_string()),
    ]);
    if slices_are_told(workload) {
        let slices = decisions.iter().find(|decision| decision.field == "slices");
        expected.push(("slices", check_slices(workload, slices)?));
    }
    let shares = workload
        .shared
        .as_ref()
        .is_some_and(|shared| shared.world > 1 && shared.shared_bytes > 0);
    prop_assert_eq!(plan.sharing.is_some(), shares);
    if let Some(sharing) = plan.sharing {
        expected.push(("sharing", sharing.to_string()));
        if sharing == SharedBy::Memory {
            prop_assert_eq!(*memory, MemoryKind::Owned);
            prop_assert_eq!(&platform.os, "linux");
        } else if *memory == MemoryKind::Owned && !in_memory {
            // Past it only what is missing from it, where nothing may be added to it.
            let bypass = policy.cache == CacheChoice::Bypass;
            prop_assert!(
                !plan.reads_direct() || bypass,
                "every rank would read for itself"
            );
        }
    }
    let uses = |used: &str| decided.last() == Some(&("profile", used.to_owned()));
    match platform.profile {
        ProfileFact::NotSought => {}
        ProfileFact::Absent => expected.push(("profile", "absent".to_owned())),
        ProfileFact::Ignored { .. } => expected.push(("profile", "ignored".to_owned())),
        ProfileFact::Matching(_) if uses("used") => {
            expected.push(("profile", "used".to_owned()));
            prop_assert!(workload.read_bytes >= 64 << 20);
        }
        ProfileFact::Matching(_) => expected.push(("profile", "unused".to_owned())),
    }
    prop_assert_eq!(&decided[..], &expected[..]);
    for decision in decisions {
        prop_assert!(decision.reason.ends_with('.'), "{}", decision.reason);
        for rejection in &decision.rejected {
            prop_assert_ne!(&rejection.choice, &decision.chosen);
            prop_assert!(!rejection.reason.is_empty());
        }
    }
    Ok(())
}

/// What a load of owned tensors holds beside windows, in bytes.
fn held_bytes(workload: &Workload) -> u64 {
    workload
        .destination_bytes
        .saturating_add(workload.read_bytes.min(32 << 20))
        .saturating_add(workload.index_bytes)
}

/// Everything that limits the memory of a load, in bytes.
fn bounds(platform: &Platform, policy: &Policy) -> impl Iterator<Item = u64> + use<> {
    let facts = platform.memory.usable_bytes().map(|(bytes, _)| bytes);
    facts.into_iter().chain(policy.memory_limit_bytes)
}

/// The smallest buffer that works: a window of 256 KiB, or what cannot be divided with its ends rounded outwards.
fn least_buffer_bytes(workload: &Workload) -> u64 {
    let block = 64 << 10;
    match workload.indivisible_bytes {
        0 => 256 << 10,
        whole => whole
            .saturating_add(block)
            .checked_next_multiple_of(block)
            .unwrap_or(u64::MAX)
            .max(256 << 10),
    }
}

/// Two such buffers, and scratch for one reader, in bytes.
fn least_windows_bytes(workload: &Workload) -> u64 {
    least_buffer_bytes(workload)
        .saturating_mul(2)
        .saturating_add(384 << 10)
}

fn slices_are_told(workload: &Workload) -> bool {
    workload.needed_bytes > 0
        && (workload.access == AccessPattern::Ranges || workload.gathered_tensors > 0)
}

/// What has to be chosen, where the decision says that no less is read than is needed.
fn check_slices(workload: &Workload, decision: Option<&Decision>) -> Result<String, TestCaseError> {
    let chosen = match workload.gathered_tensors {
        0 => "straight",
        gathered if gathered >= workload.tensors => "gathered",
        _ => "mixed",
    };
    let reason = &decision.expect("slices are told").reason;
    let told = reason
        .split_once(" is needed and ")
        .and_then(|(needed, rest)| {
            let (read, rest) = rest.split_once(" read")?;
            Some((
                told_bytes(needed)?,
                told_bytes(read)?,
                rest.starts_with(','),
            ))
        });
    let Some((needed, read, more)) = told else {
        return Err(TestCaseError::fail(reason.clone()));
    };
    prop_assert!(needed <= read, "{}", reason);
    prop_assert_eq!(
        more,
        workload.read_bytes > workload.needed_bytes,
        "{}",
        reason
    );
    Ok(chosen.to_owned())
}

/// `1.5 GiB` in bytes.
fn told_bytes(text: &str) -> Option<f64> {
    let (number, unit) = text.split_once(' ')?;
    let exponent = match unit {
        "byte" | "bytes" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => return None,
    };
    Some(number.parse::<f64>().ok()? * 2_f64.powi(exponent))
}

/// Everything that is promised of the plan of a stream.
fn check_stream(plan: &StreamPlan) -> Result<(), TestCaseError> {
    let StreamPlan {
        backend,
        params,
        readers,
        buffers,
        buffer_bytes,
        workload,
        platform,
        policy,
        ..
    } = plan;
    prop_assert_eq!(
        platform.availability(*backend),
        Some(&Availability::Available)
    );
    if let BackendChoice::Named(named) = policy.backend {
        prop_assert_eq!(*backend, named);
    }

    // Never more than was allowed, nor than half of what there is.
    let limit = policy.memory_limit_bytes.unwrap_or(256 << 20);
    prop_assert!(plan.memory_bytes() <= limit);
    if let Some((usable_bytes, _)) = platform.memory.usable_bytes() {
        prop_assert!(plan.memory_bytes() <= usable_bytes / 2);
    }
    // In sum, nothing left out: one buffer for the consumer beside one for each reader that has a window.
    let windows = match (&workload.shared, workload.read_bytes) {
        (None, 1..) => workload.read_bytes.div_ceil(*buffer_bytes),
        _ => u64::MAX,
    };
    let busy = u64::from(*readers).min(windows);
    prop_assert!(*buffers >= 2);
    prop_assert!(busy <= u64::from(*buffers), "{} {}", readers, buffers);
    prop_assert!(busy < u64::from(*buffers) || u64::from(*buffers) >= windows);
    prop_assert_eq!(buffer_bytes % (64 << 10), 0);
    prop_assert!(*buffer_bytes >= least_buffer_bytes(workload).min(1 << 63));
    let scratch = if plan.reads_direct() {
        busy * (384 << 10)
    } else {
        0
    };
    prop_assert!(plan.scratch_bytes >= scratch);
    prop_assert_eq!(
        plan.memory_bytes(),
        u64::from(*buffers) * buffer_bytes + plan.scratch_bytes + workload.index_bytes
    );

    prop_assert!(params.validate().is_ok());
    prop_assert_eq!(params.workers, 1);
    prop_assert!(params.chunk_bytes <= *buffer_bytes);
    prop_assert!((1..=TransferParams::MAX_WORKERS).contains(readers));
    prop_assert_eq!(
        policy.chunk_bytes.unwrap_or(params.chunk_bytes),
        params.chunk_bytes
    );
    prop_assert_eq!(policy.workers.unwrap_or(*readers), *readers);
    if *backend == BackendKind::IoUring {
        prop_assert_eq!(
            policy.queue_depth.unwrap_or(params.queue_depth),
            params.queue_depth
        );
    } else {
        prop_assert_eq!(params.queue_depth, 1);
    }
    let drops = matches!(params.resident, ResidentPolicy::CopyAndDrop { .. });
    prop_assert!(!drops, "a stream crowds nothing out");

    let decided: Vec<_> = plan
        .decisions
        .iter()
        .map(|decision| (decision.field, decision.chosen.clone()))
        .collect();
    let numbers = [
        ("memory_bytes", plan.memory_bytes().to_string()),
        ("backend", backend.to_string()),
        ("direct", params.direct.to_string()),
        ("chunk_bytes", params.chunk_bytes.to_string()),
        ("readers", readers.to_string()),
        ("queue_depth", params.queue_depth.to_string()),
        ("buffer_bytes", buffer_bytes.to_string()),
        ("buffers", buffers.to_string()),
    ];
    for number in &numbers {
        prop_assert_eq!(decided.iter().filter(|d| d.0 == number.0).count(), 1);
        prop_assert!(decided.contains(number), "{:?} {:?}", decided, number);
    }
    let slices = plan
        .decisions
        .iter()
        .find(|decision| decision.field == "slices");
    prop_assert_eq!(slices.is_some(), slices_are_told(workload));
    if slices.is_some() {
        let chosen = check_slices(workload, slices)?;
        prop_assert!(decided.contains(&("slices", chosen)));
    }
    for decision in &plan.decisions {
        prop_assert!(decision.reason.ends_with('.'), "{}", decision.reason);
        for rejection in &decision.rejected {
            prop_assert_ne!(&rejection.choice, &decision.chosen);
        }
    }
    Ok(())
}

/// A refusal has to be one that the inputs call for.
fn check_refusal(
    error: &PlanError,
    workload: &Workload,
    platform: &Platform,
    policy: &Policy,
) -> Result<(), TestCaseError> {
    let available = |kind| platform.availability(kind) == Some(&Availability::Available);
    let required = policy.direct == DirectChoice::Policy(DirectPolicy::Required);
    let bypass = policy.cache == CacheChoice::Bypass;
    // Nothing that goes through the page cache will do.
    let around = required || bypass;
    match error {
        PlanError::BackendUnavailable { backend, .. } | PlanError::BackendLeftOut { backend } => {
            prop_assert!(!available(*backend));
            prop_assert!(
                policy.backend == BackendChoice::Named(*backend)
                    || policy.memory == MemoryChoice::Mapped
            );
        }
        PlanError::NoBackend { rejected } => {
            prop_assert_eq!(policy.backend, BackendChoice::Auto);
            prop_assert_eq!(rejected.len(), BackendKind::ALL.len());
            prop_assert!(
                !BackendKind::ALL
                    .into_iter()
                    .any(|kind| available(kind) && !(around && kind == BackendKind::Mmap))
            );
        }
        PlanError::MappedWithoutConsent | PlanError::MappedWithBackend { .. } => {
            prop_assert_eq!(policy.memory, MemoryChoice::Mapped);
        }
        PlanError::DirectWithMapped
        | PlanError::DirectWithMmap
        | PlanError::DirectUnsupported { .. } => prop_assert!(required),
        PlanError::KeepWithDirect { direct } => {
            prop_assert_eq!(policy.cache, CacheChoice::Keep);
            prop_assert_eq!(policy.direct, DirectChoice::Policy(*direct));
        }
        PlanError::BypassWithBuffered
        | PlanError::BypassWithMapped
        | PlanError::BypassWithMmap
        | PlanError::BypassUnsupported { .. } => prop_assert!(bypass),
        PlanError::ParameterOutOfRange {
            value, min, max, ..
        } => prop_assert!(!(min..=max).contains(&value)),
        PlanError::DoesNotFit {
            needed_bytes,
            destination_bytes,
            buffer_bytes,
            index_bytes,
            available_bytes,
            proposals,
            ..
        } => {
            prop_assert!(needed_bytes > available_bytes);
            prop_assert_eq!(Some(*available_bytes), bounds(platform, policy).min());
            let sum = destination_bytes.saturating_add(*buffer_bytes);
            prop_assert_eq!(*needed_bytes, sum.saturating_add(*index_bytes));
            for proposal in proposals {
                check_proposal(proposal, workload, platform, policy)?;
            }
            let left = platform.memory.address_space_available_bytes;
            let storage = platform.storage.as_ref();
            let mapped = storage
                .map_or(0, |storage| storage.file_bytes)
                .max(workload.read_bytes);
            let mappable = policy.mapping == MappingConsent::Granted
                && policy.memory == MemoryChoice::Auto
                && matches!(
                    policy.backend,
                    BackendChoice::Auto | BackendChoice::Named(BackendKind::Mmap)
                )
                && !around
                && workload.gathered_tensors == 0
                && left.is_none_or(|left| mapped <= left)
                && available(BackendKind::Mmap);
            prop_assert!(!mappable);
        }
        PlanError::MappedWithGathered { tensors } => {
            prop_assert_eq!(policy.memory, MemoryChoice::Mapped);
            prop_assert_eq!(*tensors, workload.gathered_tensors);
            prop_assert!(*tensors > 0);
        }
        PlanError::SharingNeedsPageCache { os } => {
            prop_assert_eq!(os, &platform.os);
            prop_assert_ne!(os, "linux");
            prop_assert!(workload.shared.is_some());
            prop_assert!(around || matches!(policy.direct, DirectChoice::Policy(_)));
        }
        PlanError::MappedStream => prop_assert_eq!(policy.memory, MemoryChoice::Mapped),
        PlanError::StreamDoesNotFit {
            least_bytes,
            buffers,
            buffer_bytes,
            limit_bytes,
            wishes,
            ..
        } => {
            // What is beyond all numbers fits nowhere.
            if *least_bytes == u64::MAX {
                return Ok(());
            }
            prop_assert!(least_bytes > limit_bytes);
            prop_assert!(buffer_bytes.saturating_mul((*buffers).into()) <= *least_bytes);
            // What fits is not refused: nothing but wishes raises it above two of the smallest buffers.
            let least = least_windows_bytes(workload).saturating_add(workload.index_bytes);
            prop_assert!(
                !wishes.is_empty() || least > *limit_bytes || !scratch_is_taken(workload, platform)
            );
            let without = least.saturating_sub(384 << 10);
            prop_assert!(
                !wishes.is_empty()
                    || without > *limit_bytes
                    || scratch_is_taken(workload, platform)
            );
        }
        other => prop_assert!(false, "unexpected {other:?}"),
    }
    Ok(())
}

/// Whether a stream may need scratch: not where nothing can be read directly, unless it may be on other ranks.
fn scratch_is_taken(workload: &Workload, platform: &Platform) -> bool {
    let storage = platform.storage.as_ref();
    workload.shared.is_some() || storage.is_none_or(|storage| storage.direct.is_supported())
}

/// What is proposed has to work.
fn check_proposal(
    proposal: &Proposal,
    workload: &Workload,
    platform: &Platform,
    policy: &Policy,
) -> Result<(), TestCaseError> {
    let (mut workload, mut policy) = (workload.clone(), policy.clone());
    match proposal {
        Proposal::Map { .. } => {
            policy.memory = MemoryChoice::Mapped;
            policy.mapping = MappingConsent::Granted;
            policy.backend = BackendChoice::Auto;
            policy.direct = DirectChoice::Auto;
            policy.cache = CacheChoice::Auto;
        }
        Proposal::Stream { memory_bytes } => {
            policy.memory = MemoryChoice::Auto;
            let stream = plan_stream(&workload, platform, &policy);
            prop_assert_eq!(
                stream.map(|stream| stream.memory_bytes()),
                Ok(*memory_bytes)
            );
            return Ok(());
        }
        Proposal::Slice { world } => {
            let ranks = workload
                .shared
                .as_ref()
                .map_or(1, |shared| shared.world.max(1));
            prop_assert!((2..=64).contains(world));
            // One of them, and all on one machine fit together.
            workload.destination_bytes = workload
                .destination_bytes
                .div_ceil(u64::from(world / ranks).max(1));
        }
        Proposal::Select { destination_bytes } => {
            prop_assert!(*destination_bytes > 0);
            workload.destination_bytes = *destination_bytes;
        }
        other => prop_assert!(false, "unexpected {other:?}"),
    }
    let again = plan(&workload, platform, &policy);
    prop_assert!(again.is_ok(), "{proposal}: {again:?}");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn plans_keep_their_promises(workload in workload(), platform in facts(), policy in policy()) {
        let first = plan(&workload, &platform, &policy);
        prop_assert_eq!(&first, &plan(&workload, &platform, &policy));
        match &first {
            Ok(plan) => check(plan)?,
            Err(error) => check_refusal(error, &workload, &platform, &policy)?,
        }
    }

    #[test]
    fn plans_replay_from_their_json(workload in workload(), platform in facts(), policy in policy()) {
        let Ok(first) = plan(&workload, &platform, &policy) else {
            return Ok(());
        };
        let json = serde_json::to_string(&first).expect("plans serialize");
        let json: Value = serde_json::from_str(&json).expect("plans are JSON");
        let again = plan(
            &input::<Workload>(&json, "workload"),
            &input::<Platform>(&json, "platform"),
            &input::<Policy>(&json, "policy"),
        );
        prop_assert_eq!(again.as_ref(), Ok(&first));
        prop_assert_eq!(&json["direct"], &Value::Bool(first.reads_direct()));
        prop_assert_eq!(&json["chunk_bytes"], &Value::from(first.params.chunk_bytes));
    }

    #[test]
    fn streams_keep_their_promises(workload in workload(), platform in facts(), policy in policy()) {
        let first = plan_stream(&workload, &platform, &policy);
        prop_assert_eq!(&first, &plan_stream(&workload, &platform, &policy));
        match &first {
            Ok(plan) => check_stream(plan)?,
            Err(error) => check_refusal(error, &workload, &platform, &policy)?,
        }
    }

    #[test]
    fn streams_replay_from_their_json(
        workload in workload(), platform in facts(), policy in policy(),
    ) {
        let Ok(first) = plan_stream(&workload, &platform, &policy) else {
            return Ok(());
        };
        let json = serde_json::to_string(&first).expect("plans serialize");
        let json: Value = serde_json::from_str(&json).expect("plans are JSON");
        let again = plan_stream(
            &input::<Workload>(&json, "workload"),
            &input::<Platform>(&json, "platform"),
            &input::<Policy>(&json, "policy"),
        );
        prop_assert_eq!(again.as_ref(), Ok(&first));
        prop_assert_eq!(&json["memory_bytes"], &Value::from(first.memory_bytes()));
        prop_assert_eq!(&json["readers"], &Value::from(first.readers));
    }

    #[test]
    fn more_memory_never_makes_a_stream_impossible(workload in workload(), platform in facts(), limit in 0_u64..(1 << 31)) {
        let with = |limit_bytes| {
            let mut policy = Policy::default();
            policy.memory_limit_bytes = Some(limit_bytes);
            plan_stream(&workload, &platform, &policy)
        };
        if with(limit).is_ok() {
            let more = with(limit * 2);
            prop_assert!(more.is_ok(), "{:?}", more);
        }
    }

    #[test]
    fn gaps_are_powers_of_two_within_limits(platform in facts(), policy in policy()) {
        let (gap_bytes, decision) = merge_gap_bytes(&platform, &policy);
        prop_assert!(gap_bytes.is_power_of_two());
        prop_assert!((4 << 10..=1 << 20).contains(&gap_bytes));
        prop_assert_eq!(decision.chosen, gap_bytes.to_string());
    }

    #[test]
    fn parameters_are_refused_exactly_outside_their_limits(policy in policy()) {
        let params = TransferParams {
            chunk_bytes: policy.chunk_bytes.unwrap_or(TransferParams::MIN_CHUNK_BYTES),
            queue_depth: policy.queue_depth.unwrap_or(1),
            workers: policy.workers.unwrap_or(1),
            direct: DirectPolicy::Never,
            resident: ResidentPolicy::Reread,
        };
        let workload = Workload::new(StorageLayout::SafeTensors, AccessPattern::WholeFiles);
        let refused = matches!(
            plan(&workload, &platform(2), &policy),
            Err(PlanError::ParameterOutOfRange { .. })
        );
        prop_assert_eq!(refused, params.validate().is_err());
    }
}
