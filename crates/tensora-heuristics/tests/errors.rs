//! Every way in which there is no plan, with its message.

mod common;

use common::{GIB, five_shards, on_tmpfs, one_shard, platform, stored, without};
use expect_test::{Expect, expect};
use tensora_heuristics::{
    BackendChoice, CacheChoice, DirectChoice, MappingConsent, MemoryBound, MemoryChoice, PlanError,
    Policy, Proposal, SharedWorkload, Workload, plan, plan_stream,
};
use tensora_io::{BackendKind, DirectPolicy, DirectSupport, FileSystemClass, Platform};

#[track_caller]
fn refused(
    workload: &Workload,
    platform: &Platform,
    change: impl FnOnce(&mut Policy),
    expected: &str,
) -> PlanError {
    let mut policy = Policy::default();
    change(&mut policy);
    let error = plan(workload, platform, &policy).expect_err("there is no plan");
    assert_eq!(error.to_string(), expected);
    error
}

fn required(policy: &mut Policy) {
    policy.direct = DirectChoice::Policy(DirectPolicy::Required);
}

#[test]
fn a_named_backend_that_cannot_run() {
    for backend in BackendKind::ALL {
        let mut policy = Policy::default();
        policy.backend = BackendChoice::Named(backend);
        let error = plan(&one_shard(), &without(platform(2), &[backend]), &policy);
        assert_eq!(
            error,
            Err(PlanError::BackendUnavailable {
                backend,
                reason: format!("{backend} is blocked"),
                remedy: format!("unblock {backend}"),
            })
        );
    }
    refused(
        &one_shard(),
        &without(platform(2), &[BackendKind::IoUring]),
        |policy| policy.backend = BackendChoice::Named(BackendKind::IoUring),
        "the backend io-uring cannot run here: io-uring is blocked; unblock io-uring, or leave \
         the choice of backend and memory to auto",
    );
}

#[test]
fn mapped_memory_without_mmap() {
    let error = refused(
        &one_shard(),
        &without(platform(2), &[BackendKind::Mmap]),
        |policy| {
            policy.memory = MemoryChoice::Mapped;
            policy.mapping = MappingConsent::Granted;
        },
        "the backend mmap cannot run here: mmap is blocked; unblock mmap, or leave the choice \
         of backend and memory to auto",
    );
    assert!(matches!(error, PlanError::BackendUnavailable { .. }));
}

#[test]
fn a_named_backend_that_was_left_out() {
    let mut small_build = platform(2);
    small_build
        .backends
        .retain(|fact| fact.kind == BackendKind::Sync);
    refused(
        &one_shard(),
        &small_build,
        |policy| policy.backend = BackendChoice::Named(BackendKind::IoUring),
        "the backend io-uring is left out of this build: the platform facts do not list it; \
         enable the cargo feature `io-uring`, or leave the choice of backend and memory to auto",
    );
}

#[test]
fn no_backend_at_all() {
    let mut nothing = without(
        platform(2),
        &[BackendKind::Sync, BackendKind::IoUring, BackendKind::Mmap],
    );
    nothing
        .backends
        .retain(|fact| fact.kind != BackendKind::Async);
    let error = refused(
        &five_shards(),
        &nothing,
        |_| {},
        "no backend can run this load; remove one of these obstacles: io-uring: it cannot run \
         here: io-uring is blocked (unblock io-uring); sync: it cannot run here: sync is \
         blocked (unblock sync); async: it is left out of this build (enable the cargo feature \
         `async`); mmap: it cannot run here: mmap is blocked (unblock mmap)",
    );
    let PlanError::NoBackend { rejected } = error else {
        panic!("{error:?}");
    };
    let order: Vec<_> = rejected
        .iter()
        .map(|rejection| rejection.choice.as_str())
        .collect();
    assert_eq!(order, ["io-uring", "sync", "async", "mmap"]);
}

#[test]
fn no_backend_that_reads_directly() {
    let only_mmap = without(
        platform(2),
        &[BackendKind::Sync, BackendKind::Async, BackendKind::IoUring],
    );
    refused(
        &one_shard(),
        &only_mmap,
        required,
        "no backend can run this load; remove one of these obstacles: sync: it cannot run \
         here: sync is blocked (unblock sync); async: it cannot run here: async is blocked \
         (unblock async); io-uring: it cannot run here: io-uring is blocked (unblock \
         io-uring); mmap: it reads through the page cache, and direct I/O is required (drop \
         that requirement)",
    );
}

#[test]
fn mapped_without_consent() {
    refused(
        &one_shard(),
        &platform(2),
        |policy| policy.memory = MemoryChoice::Mapped,
        "mapped memory was asked for without consent to its contract (nobody truncates or \
         rewrites the files while tensors are in use); grant the consent, or ask for owned \
         memory",
    );
}

#[test]
fn mapped_by_another_backend() {
    refused(
        &one_shard(),
        &platform(2),
        |policy| {
            policy.memory = MemoryChoice::Mapped;
            policy.mapping = MappingConsent::Granted;
            policy.backend = BackendChoice::Named(BackendKind::Sync);
        },
        "mapped memory comes from the mmap backend only, but sync was named; name mmap or \
         leave the backend to auto, or ask for owned memory",
    );
}

#[test]
fn direct_and_mapped() {
    refused(
        &one_shard(),
        &platform(2),
        |policy| {
            required(policy);
            policy.memory = MemoryChoice::Mapped;
            policy.mapping = MappingConsent::Granted;
        },
        "direct I/O was required together with mapped memory, which is the page cache itself; \
         ask for owned memory, or drop the requirement",
    );
}

#[test]
fn direct_and_mmap() {
    refused(
        &one_shard(),
        &platform(2),
        |policy| {
            required(policy);
            policy.backend = BackendChoice::Named(BackendKind::Mmap);
        },
        "direct I/O was required, but the mmap backend reads through the page cache; name \
         another backend, or drop the requirement",
    );
}

#[test]
fn direct_where_storage_cannot() {
    let platform = stored(|storage| {
        storage.direct = DirectSupport::Unsupported {
            reason: "open with O_DIRECT: EINVAL".to_owned(),
        };
    });
    refused(
        &one_shard(),
        &platform,
        required,
        "direct I/O was required, but these files on ext4 do not support it: open with \
         O_DIRECT: EINVAL; use the policy `preferred` to fall back to buffered reads",
    );
}

#[test]
fn wishes_about_the_page_cache_that_contradict_others() {
    refused(
        &one_shard(),
        &platform(2),
        |policy| {
            required(policy);
            policy.cache = CacheChoice::Keep;
        },
        "the page cache shall keep the files, but direct I/O is required, which leaves nothing in \
         it; leave the cache or direct I/O to auto",
    );
    refused(
        &one_shard(),
        &platform(2),
        |policy| {
            policy.direct = DirectChoice::Policy(DirectPolicy::Preferred);
            policy.cache = CacheChoice::Keep;
        },
        "the page cache shall keep the files, but direct I/O is preferred, which leaves nothing in \
         it; leave the cache or direct I/O to auto",
    );
    refused(
        &one_shard(),
        &platform(2),
        |policy| {
            policy.direct = DirectChoice::Policy(DirectPolicy::Never);
            policy.cache = CacheChoice::Bypass;
        },
        "the page cache is to be bypassed, but direct I/O is never to be used, and buffered reads \
         fill it; leave the cache or direct I/O to auto",
    );
    refused(
        &one_shard(),
        &platform(2),
        |policy| {
            policy.memory = MemoryChoice::Mapped;
            policy.mapping = MappingConsent::Granted;
            policy.cache = CacheChoice::Bypass;
        },
        "the page cache is to be bypassed, but mapped memory was asked for, which is the page cache \
         itself; ask for owned memory, or leave the cache to auto",
    );
    refused(
        &one_shard(),
        &platform(2),
        |policy| {
            policy.backend = BackendChoice::Named(BackendKind::Mmap);
            policy.cache = CacheChoice::Bypass;
        },
        "the page cache is to be bypassed, but the mmap backend reads through it; name another \
         backend, or leave the cache to auto",
    );
}

#[test]
fn a_page_cache_that_cannot_be_bypassed() {
    let mut platform = stored(|storage| {
        storage.direct = DirectSupport::Unsupported {
            reason: "open with O_DIRECT: EINVAL".to_owned(),
        };
    });
    let bypass = |policy: &mut Policy| policy.cache = CacheChoice::Bypass;
    refused(
        &one_shard(),
        &platform,
        bypass,
        "the page cache is to be bypassed, but these files on ext4 do not support direct I/O: open \
         with O_DIRECT: EINVAL; leave the cache to auto",
    );
    // In memory there is nothing to bypass.
    if let Some(storage) = &mut platform.storage {
        storage.class = FileSystemClass::Memory;
    }
    let mut policy = Policy::default();
    bypass(&mut policy);
    assert!(plan(&one_shard(), &platform, &policy).is_ok());
    // And where only mmap runs, there is no way around the page cache.
    refused(
        &one_shard(),
        &without(
            common::platform(2),
            &[BackendKind::Sync, BackendKind::Async, BackendKind::IoUring],
        ),
        bypass,
        "no backend can run this load; remove one of these obstacles: sync: it cannot run here: sync \
         is blocked (unblock sync); async: it cannot run here: async is blocked (unblock async); \
         io-uring: it cannot run here: io-uring is blocked (unblock io-uring); mmap: it reads through \
         the page cache, which is to be bypassed (leave the cache to auto)",
    );
}

#[test]
fn parameters_outside_their_limits() {
    refused(
        &one_shard(),
        &platform(2),
        |policy| policy.chunk_bytes = Some(4095),
        "chunk_bytes = 4095 is outside its limits: use 4096 to 1073741824, or leave it to the \
         planner",
    );
    refused(
        &one_shard(),
        &platform(2),
        |policy| policy.queue_depth = Some(0),
        "queue_depth = 0 is outside its limits: use 1 to 1024, or leave it to the planner",
    );
    refused(
        &one_shard(),
        &platform(2),
        |policy| policy.workers = Some(257),
        "workers = 257 is outside its limits: use 1 to 256, or leave it to the planner",
    );
}

/// Needed and available bytes, and what bounds them.
#[track_caller]
fn shortage(error: &PlanError) -> (u64, u64, MemoryBound) {
    match error {
        PlanError::DoesNotFit {
            needed_bytes,
            available_bytes,
            bound,
            ..
        } => (*needed_bytes, *available_bytes, *bound),
        other => panic!("{other:?}"),
    }
}

/// Refuses a load for want of memory, with this message.
#[track_caller]
fn short(
    workload: &Workload,
    platform: &Platform,
    change: impl FnOnce(&mut Policy),
    expected: &Expect,
) -> PlanError {
    let mut policy = Policy::default();
    change(&mut policy);
    let error = plan(workload, platform, &policy).expect_err("there is no plan");
    expected.assert_eq(&error.to_string());
    error
}

#[track_caller]
fn proposals(error: &PlanError) -> &[Proposal] {
    match error {
        PlanError::DoesNotFit { proposals, .. } => proposals,
        other => panic!("{other:?}"),
    }
}

#[test]
fn more_than_the_machine_leaves() {
    let mut small = platform(2);
    small.memory.available_bytes = Some(8 * GIB);
    let error = short(
        &five_shards(),
        &small,
        |_| {},
        &expect![
            "the load needs 15.29 GiB (16415025152 bytes) of memory, 15.26 GiB for tensors and 32 MiB for reads under way, but the machine leaves 8 GiB (8589934592 bytes); map the tensors instead (consent to the contract of mappings), or stream them through 128.75 MiB of memory, or load the slices of one rank of 2 or more, or load fewer tensors at a time, about 7.97 GiB of them, or free memory on the machine"
        ],
    );
    let needed = five_shards().destination_bytes + (32 << 20);
    assert_eq!(shortage(&error), (needed, 8 * GIB, MemoryBound::Machine));
    let [
        Proposal::Map { steps },
        Proposal::Stream { memory_bytes },
        Proposal::Slice { world: 2 },
        Proposal::Select { destination_bytes },
    ] = proposals(&error)
    else {
        panic!("{error:?}");
    };
    assert_eq!(steps.len(), 1);
    assert!(*memory_bytes <= 256 << 20);
    assert_eq!(*destination_bytes, 8 * GIB - (32 << 20));
}

#[test]
fn more_than_the_control_group_leaves() {
    let mut small = platform(2);
    small.memory.cgroup_available_bytes = Some(GIB);
    small.memory.cgroup_limit_path = Some("/sys/fs/cgroup/serving/memory.max".into());
    let mut workload = one_shard();
    workload.index_bytes = 5 << 20;
    let error = short(
        &workload,
        &small,
        |policy| {
            policy.memory = MemoryChoice::Owned;
            policy.backend = BackendChoice::Named(BackendKind::Sync);
        },
        &expect![
            "the load needs 1.44 GiB (1542062080 bytes) of memory, 1.4 GiB for tensors, 32 MiB for reads under way and 5 MiB for the index, but the control group (/sys/fs/cgroup/serving/memory.max) leaves 1 GiB (1073741824 bytes); map the tensors instead (ask for mapped memory, consent to the contract of mappings, leave the backend to auto), or stream them through 139 MiB of memory, or load the slices of one rank of 2 or more, or load fewer tensors at a time, about 987 MiB of them, or raise the control group's memory limit"
        ],
    );
    assert_eq!(shortage(&error).2, MemoryBound::ControlGroup);
    let PlanError::DoesNotFit {
        needed_bytes,
        destination_bytes,
        buffer_bytes,
        index_bytes,
        limit_path,
        ..
    } = error
    else {
        unreachable!();
    };
    assert_eq!(needed_bytes, destination_bytes + buffer_bytes + index_bytes);
    assert_eq!(index_bytes, 5 << 20);
    assert_eq!(limit_path, small.memory.cgroup_limit_path);
}

#[test]
fn more_than_the_process_may_have() {
    let mut small = platform(2);
    small.memory.data_available_bytes = Some(GIB);
    let error = short(
        &one_shard(),
        &small,
        |_| {},
        &expect![
            "the load needs 1.43 GiB (1536819200 bytes) of memory, 1.4 GiB for tensors and 32 MiB for reads under way, but the process's limit on data leaves 1 GiB (1073741824 bytes); map the tensors instead (consent to the contract of mappings), or stream them through 134 MiB of memory, or load the slices of one rank of 2 or more, or load fewer tensors at a time, about 992 MiB of them, or raise the process's limit on data (`ulimit -d`)"
        ],
    );
    assert_eq!(shortage(&error).2, MemoryBound::Data);
    assert!(matches!(proposals(&error)[0], Proposal::Map { .. }));
    // Mapped files count against this one, so mapping is no way out, with consent or without.
    small.memory.address_space_available_bytes = Some(GIB / 2);
    let error = short(
        &one_shard(),
        &small,
        |_| {},
        &expect![
            "the load needs 1.43 GiB (1536819200 bytes) of memory, 1.4 GiB for tensors and 32 MiB for reads under way, but the process's limit on address space leaves 512 MiB (536870912 bytes); stream them through 134 MiB of memory, or load the slices of one rank of 3 or more, or load fewer tensors at a time, about 480 MiB of them, or raise the process's limit on address space (`ulimit -v`)"
        ],
    );
    assert_eq!(shortage(&error).2, MemoryBound::AddressSpace);
    assert!(matches!(proposals(&error)[0], Proposal::Stream { .. }));
    let mut policy = Policy::default();
    policy.mapping = MappingConsent::Granted;
    assert_eq!(plan(&one_shard(), &small, &policy), Err(error));
}

#[test]
fn more_than_the_limit_that_was_set() {
    let error = short(
        &one_shard(),
        &without(on_tmpfs(), &[BackendKind::Mmap]),
        |policy| {
            policy.memory_limit_bytes = Some(GIB);
            policy.mapping = MappingConsent::Granted;
        },
        &expect![
            "the load needs 1.43 GiB (1536819200 bytes) of memory, 1.4 GiB for tensors and 32 MiB for reads under way, but the memory limit that was set leaves 1 GiB (1073741824 bytes); stream them through 16 MiB of memory, or load the slices of one rank of 2 or more, or load fewer tensors at a time, about 992 MiB of them, or raise the memory limit"
        ],
    );
    assert_eq!(shortage(&error).2, MemoryBound::Limit);
}

#[test]
fn nothing_fits() {
    let error = short(
        &five_shards(),
        &without(platform(2), &[BackendKind::Mmap]),
        |policy| policy.memory_limit_bytes = Some(100_000),
        &expect![
            "the load needs 15.29 GiB (16415025152 bytes) of memory, 15.26 GiB for tensors and 32 MiB for reads under way, but the memory limit that was set leaves 97.66 KiB (100000 bytes); raise the memory limit"
        ],
    );
    assert_eq!(proposals(&error), []);
}

/// Refuses a stream with this message.
#[track_caller]
fn no_stream(
    workload: &Workload,
    platform: &Platform,
    change: impl FnOnce(&mut Policy),
    expected: &Expect,
) -> PlanError {
    let mut policy = Policy::default();
    change(&mut policy);
    let error = plan_stream(workload, platform, &policy).expect_err("there is no plan");
    expected.assert_eq(&error.to_string());
    error
}

#[test]
fn a_stream_is_not_mapped() {
    no_stream(
        &one_shard(),
        &platform(2),
        |policy| {
            policy.memory = MemoryChoice::Mapped;
            policy.mapping = MappingConsent::Granted;
        },
        &expect![
            "mapped memory was asked for, but a stream reads into buffers of its own, which it uses again and again; leave the memory to auto, or map the whole load instead of streaming it"
        ],
    );
}

#[test]
fn a_stream_refuses_what_a_load_refuses() {
    let wishes: [fn(&mut Policy); 4] = [
        |policy| policy.workers = Some(0),
        |policy| {
            required(policy);
            policy.cache = CacheChoice::Keep;
        },
        |policy| {
            required(policy);
            policy.backend = BackendChoice::Named(BackendKind::Mmap);
        },
        |policy| policy.backend = BackendChoice::Named(BackendKind::IoUring),
    ];
    let platform = without(platform(2), &[BackendKind::IoUring]);
    for change in wishes {
        let mut policy = Policy::default();
        change(&mut policy);
        let load = plan(&one_shard(), &platform, &policy).expect_err("there is no plan");
        assert_eq!(plan_stream(&one_shard(), &platform, &policy), Err(load));
    }
}

#[test]
fn a_stream_that_its_limit_has_no_room_for() {
    let error = no_stream(
        &one_shard(),
        &platform(2),
        |policy| policy.memory_limit_bytes = Some(500_000),
        &expect![
            "a stream of these tensors takes 896 KiB (917504 bytes) of memory at least, 2 buffers of 256 KiB and 384 KiB besides, but the memory limit that was set allows 488.28 KiB (500000 bytes); raise the memory limit"
        ],
    );
    let PlanError::StreamDoesNotFit {
        least_bytes,
        buffers,
        buffer_bytes,
        bound: MemoryBound::Limit,
        ..
    } = error
    else {
        panic!("{error:?}");
    };
    assert_eq!((buffers, buffer_bytes), (2, 256 << 10));
    // What it asks for is enough, and not a byte more than that.
    let mut policy = Policy::default();
    policy.memory_limit_bytes = Some(least_bytes);
    assert!(plan_stream(&one_shard(), &platform(2), &policy).is_ok());
    policy.memory_limit_bytes = Some(least_bytes - 1);
    assert!(plan_stream(&one_shard(), &platform(2), &policy).is_err());

    let mut workload = one_shard();
    workload.indivisible_bytes = 300 << 20;
    no_stream(
        &workload,
        &platform(2),
        |policy| policy.workers = Some(7),
        &expect![
            "a stream of these tensors takes 1.76 GiB (1889796096 bytes) of memory at least, 6 buffers of 300.06 MiB and 1.88 MiB besides, but the default limit of a stream allows 256 MiB (268435456 bytes); raise the memory limit, or leave workers to the planner"
        ],
    );
    no_stream(
        &one_shard(),
        &platform(2),
        |policy| policy.chunk_bytes = Some(1 << 30),
        &expect![
            "a stream of these tensors takes 2 GiB (2147876864 bytes) of memory at least, 2 buffers of 1 GiB and 384 KiB besides, but the default limit of a stream allows 256 MiB (268435456 bytes); raise the memory limit, or leave chunk_bytes to the planner"
        ],
    );
    let mut small = platform(2);
    small.memory.cgroup_available_bytes = Some(1 << 20);
    small.memory.cgroup_limit_path = Some("/sys/fs/cgroup/serving/memory.max".into());
    no_stream(
        &one_shard(),
        &small,
        |_| {},
        &expect![
            "a stream of these tensors takes 896 KiB (917504 bytes) of memory at least, 2 buffers of 256 KiB and 384 KiB besides, but the control group (/sys/fs/cgroup/serving/memory.max) leaves it 512 KiB, half of what there is (524288 bytes); raise the control group's memory limit"
        ],
    );
}

#[test]
fn slices_that_no_mapping_can_show() {
    let mut workload = one_shard();
    workload.gathered_tensors = 3;
    refused(
        &workload,
        &platform(2),
        |policy| {
            policy.memory = MemoryChoice::Mapped;
            policy.mapping = MappingConsent::Granted;
        },
        "mapped memory was asked for, but 3 of the tensors are slices that lie scattered in their files, which \
         no mapping can show in one piece; ask for owned memory, or select others",
    );
}

#[test]
fn sharing_without_a_page_cache_or_shared_memory() {
    let mut workload = one_shard();
    workload.shared = Some(SharedWorkload::new(2, GIB, 0));
    let mut elsewhere = platform(2);
    elsewhere.os = "freebsd".to_owned();
    refused(
        &workload,
        &elsewhere,
        required,
        "on freebsd ranks can share a read through the page cache only, and the wishes keep reads out of it; \
         leave the cache and direct I/O to auto, or load without sharing",
    );
}

#[test]
fn gathered_and_shared_loads_are_proposed_what_fits_them() {
    let mut workload = one_shard();
    workload.gathered_tensors = 1;
    workload.shared = Some(SharedWorkload::new(4, GIB, GIB));
    let mut small = platform(2);
    small.os = "linux".to_owned();
    small.memory.available_bytes = Some(GIB);
    let error = short(
        &workload,
        &small,
        |_| {},
        &expect![
            "the load needs 1.43 GiB (1537736704 bytes) of memory, 1.4 GiB for tensors and 32.88 MiB for reads under way, but the machine leaves 1 GiB (1073741824 bytes); stream them through 134 MiB of memory, or load the slices of one rank of 8 or more, or load fewer tensors at a time, about 991.13 MiB of them, or free memory on the machine"
        ],
    );
    // No mapping; and as this is one rank of four already, more than eight would share what is left.
    assert!(
        !proposals(&error)
            .iter()
            .any(|p| matches!(p, Proposal::Map { .. }))
    );
    assert!(proposals(&error).contains(&Proposal::Slice { world: 8 }));
    let PlanError::DoesNotFit { buffer_bytes, .. } = error else {
        unreachable!();
    };
    // Reads under way, and two windows with scratch for one reader.
    assert_eq!(buffer_bytes, (32 << 20) + (896 << 10));
}

#[test]
fn what_is_proposed_fits() {
    let mut workload = five_shards();
    workload.index_bytes = 3 << 20;
    for limit_bytes in [20 << 20, 300 << 20, GIB, 5 * GIB, 12 * GIB] {
        let mut policy = Policy::default();
        policy.memory_limit_bytes = Some(limit_bytes);
        let error = plan(&workload, &platform(2), &policy).expect_err("it does not fit");
        for proposal in proposals(&error) {
            let (mut workload, mut policy) = (workload.clone(), policy.clone());
            match proposal {
                Proposal::Map { .. } => policy.mapping = MappingConsent::Granted,
                Proposal::Stream { memory_bytes } => {
                    let stream = plan_stream(&workload, &platform(2), &policy).expect("it fits");
                    assert_eq!(stream.memory_bytes(), *memory_bytes);
                    assert!(*memory_bytes <= limit_bytes);
                    continue;
                }
                Proposal::Slice { world } => {
                    // A rank of fewer does not fit, also where nothing is gathered.
                    workload.gathered_tensors = 1;
                    workload.destination_bytes =
                        five_shards().destination_bytes / u64::from(world - 1);
                    assert!(plan(&workload, &platform(2), &policy).is_err());
                    workload.destination_bytes =
                        five_shards().destination_bytes.div_ceil((*world).into());
                }
                Proposal::Select { destination_bytes } => {
                    workload.destination_bytes = *destination_bytes;
                }
                other => panic!("{other}"),
            }
            let fits = plan(&workload, &platform(2), &policy);
            assert!(fits.is_ok(), "{limit_bytes}: {proposal}: {fits:?}");
        }
    }
}

#[test]
fn the_last_byte_decides() {
    let mut policy = Policy::default();
    let needed = one_shard().destination_bytes + (32 << 20);
    policy.memory_limit_bytes = Some(needed);
    assert!(plan(&one_shard(), &platform(2), &policy).is_ok());
    policy.memory_limit_bytes = Some(needed - 1);
    let error = plan(&one_shard(), &platform(2), &policy).expect_err("one byte is missing");
    assert_eq!(shortage(&error), (needed, needed - 1, MemoryBound::Limit));
}

#[test]
fn names_that_no_choice_has() {
    assert_eq!(
        error_of::<BackendChoice>("uring"),
        r#"unknown backend "uring": use one of auto, sync, async, io-uring, mmap"#
    );
    assert_eq!(
        error_of::<MemoryChoice>("mmap"),
        r#"unknown memory "mmap": use one of auto, owned, mapped"#
    );
    assert_eq!(
        error_of::<CacheChoice>("warm"),
        r#"unknown cache policy "warm": use one of auto, keep, bypass"#
    );
    assert_eq!(
        error_of::<DirectChoice>("always"),
        r#"unknown direct policy "always": use one of auto, never, preferred, required"#
    );
}

fn error_of<T: std::str::FromStr + std::fmt::Debug>(name: &str) -> String
where
    T::Err: std::fmt::Debug + std::fmt::Display,
{
    name.parse::<T>()
        .expect_err("the name is unknown")
        .to_string()
}
