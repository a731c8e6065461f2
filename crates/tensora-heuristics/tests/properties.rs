//! What holds of every plan, whatever the workload, the platform and the policy.

mod common;

use common::platform;
use proptest::prelude::*;
use proptest::{option, sample};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tensora_heuristics::{
    AccessPattern, BackendChoice, CacheChoice, DirectChoice, MappingConsent, MemoryChoice,
    MemoryKind, Plan, PlanError, Policy, StorageLayout, Workload, plan,
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
    )
        .prop_map(|(layout, access, files, sizes)| {
            let mut workload = Workload::new(layout, access);
            workload.files = files;
            (
                workload.tensors,
                workload.read_bytes,
                workload.requests,
                workload.largest_request_bytes,
                workload.destination_bytes,
            ) = sizes;
            workload
        })
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
        profile(),
    )
        .prop_map(|(cpus, states, storage, available, cgroup, profile)| {
            let mut platform = platform(cpus);
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
        })
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
        }
        MemoryKind::Owned => {
            prop_assert_ne!(policy.memory, MemoryChoice::Mapped);
            let bounds = [
                platform.memory.available_bytes,
                platform.memory.cgroup_available_bytes,
                policy.memory_limit_bytes,
            ];
            prop_assert!(
                bounds
                    .into_iter()
                    .flatten()
                    .all(|bound| workload.destination_bytes <= bound)
            );
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
        prop_assert!(workload.destination_bytes.saturating_add(resident) > usable);
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
    // A copy from a page cache that is crowded reads directly only what was dropped from it meanwhile.
    let drops = matches!(params.resident, ResidentPolicy::CopyAndDrop { .. });
    let takes_scratch = *backend == BackendKind::IoUring || plan.reads_direct() && !drops;
    // What was measured stands as it was measured.
    let measured = matches!(platform.profile, ProfileFact::Matching(_));
    if takes_scratch
        && !measured
        && (policy.chunk_bytes, policy.queue_depth, policy.workers) == (None, None, None)
    {
        let in_flight =
            params.chunk_bytes * u64::from(params.queue_depth) * u64::from(params.workers);
        prop_assert!(in_flight <= 32 << 20);
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

/// A refusal has to be one that the inputs call for.
fn check_refusal(
    error: &PlanError,
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
            available_bytes,
            ..
        } => {
            prop_assert!(needed_bytes > available_bytes);
            let mappable = policy.mapping == MappingConsent::Granted
                && policy.memory == MemoryChoice::Auto
                && matches!(
                    policy.backend,
                    BackendChoice::Auto | BackendChoice::Named(BackendKind::Mmap)
                )
                && !around
                && available(BackendKind::Mmap);
            prop_assert!(!mappable);
        }
        other => prop_assert!(false, "unexpected {other:?}"),
    }
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
            Err(error) => check_refusal(error, &platform, &policy)?,
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
