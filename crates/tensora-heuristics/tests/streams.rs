//! What streams are planned with: readers, windows and buffers, and which gaps are read.

mod common;

use common::{
    GIB, MIB, five_shards, on_nfs, on_tmpfs, one_shard, platform, ranges, resident, stored, whole,
    without,
};
use tensora_heuristics::StorageLayout::{SafeTensors, ServerlessLlm};
use tensora_heuristics::{
    BackendChoice, CacheChoice, DEFAULT_STREAM_MEMORY_BYTES, DirectChoice, PlanError, Policy,
    SharedWorkload, StreamPlan, Workload, merge_gap_bytes, plan, plan_stream,
};
use tensora_io::BackendKind::{Async, IoUring, Mmap, Sync};
use tensora_io::{
    BackendKind, CacheState, DirectPolicy, DirectSupport, FileSystemClass, Measurement, MemoryKind,
    Platform, Profile, ProfileFact, ProfileIdentity, ResidentPolicy, TransferParams,
};

const KIB: u64 = 1 << 10;

#[track_caller]
fn auto(workload: &Workload, platform: &Platform) -> StreamPlan {
    with(workload, platform, |_| {})
}

#[track_caller]
fn with(workload: &Workload, platform: &Platform, change: impl FnOnce(&mut Policy)) -> StreamPlan {
    let mut policy = Policy::default();
    change(&mut policy);
    plan_stream(workload, platform, &policy).expect("there is a plan")
}

#[track_caller]
fn limited(workload: &Workload, limit_bytes: u64) -> StreamPlan {
    with(workload, &platform(2), |policy| {
        policy.memory_limit_bytes = Some(limit_bytes);
    })
}

/// Readers, depth, chunk, buffers and their size, the two sizes in KiB.
type Geometry = (u32, u32, u64, u32, u64);

fn geometry(plan: &StreamPlan) -> Geometry {
    let TransferParams {
        queue_depth,
        chunk_bytes,
        workers,
        ..
    } = plan.params;
    assert_eq!(workers, 1, "each reader is one of the readers");
    (
        plan.readers,
        queue_depth,
        chunk_bytes / KIB,
        plan.buffers,
        plan.buffer_bytes / KIB,
    )
}

fn reason<'a>(plan: &'a StreamPlan, field: &str) -> &'a str {
    let decision = plan.decisions.iter().find(|d| d.field == field);
    decision.map_or("", |decision| &decision.reason)
}

const THREADS: Geometry = (16, 1, 2048, 32, 4096);
const RINGS: Geometry = (2, 16, 1024, 8, 16384);

fn spinning() -> Platform {
    stored(|storage| {
        storage.device = Some("sda".to_owned());
        storage.device_model = Some("ST8000NM0055-1RM112".to_owned());
        storage.rotational = Some(true);
    })
}

fn buffered() -> Platform {
    stored(|storage| {
        storage.direct = DirectSupport::Unsupported {
            reason: "EINVAL".to_owned(),
        };
    })
}

#[test]
fn every_place_has_its_windows() {
    let served = |class| stored(|storage| storage.class = class);
    let mut unknown = platform(2);
    unknown.storage = None;
    let mut many_cpus = on_tmpfs();
    many_cpus.cpus = 6;
    let table = [
        ("cold, small", one_shard(), platform(2), Sync, THREADS),
        ("cold, large", five_shards(), platform(64), IoUring, RINGS),
        // A window is in order already, so that ranges need no tasks to group them.
        (
            "ranges",
            ranges(ServerlessLlm, 8, 90, GIB),
            platform(2),
            Sync,
            THREADS,
        ),
        ("half", one_shard(), resident(500), Sync, THREADS),
        ("mostly", five_shards(), resident(800), Sync, THREADS),
        (
            "page cache",
            five_shards(),
            resident(1000),
            Sync,
            (2, 1, 4096, 4, 4096),
        ),
        (
            "tmpfs",
            five_shards(),
            on_tmpfs(),
            Sync,
            (2, 1, 4096, 4, 4096),
        ),
        (
            "six CPUs",
            five_shards(),
            many_cpus,
            Sync,
            (6, 1, 4096, 12, 4096),
        ),
        (
            "server",
            five_shards(),
            on_nfs(),
            Sync,
            (4, 1, 8192, 8, 8192),
        ),
        (
            "user space",
            one_shard(),
            served(FileSystemClass::Fuse),
            Sync,
            (4, 1, 8192, 8, 8192),
        ),
        ("disk", one_shard(), spinning(), Sync, (4, 1, 4096, 8, 4096)),
        (
            "disk, large",
            five_shards(),
            spinning(),
            IoUring,
            (4, 1, 4096, 8, 4096),
        ),
        (
            "no direct reads",
            one_shard(),
            buffered(),
            Sync,
            (8, 1, 8192, 16, 8192),
        ),
        (
            "not probed",
            one_shard(),
            unknown,
            Sync,
            (8, 1, 8192, 16, 8192),
        ),
    ];
    for (name, workload, platform, backend, expected) in table {
        let plan = auto(&workload, &platform);
        assert_eq!(plan.backend, backend, "{name}");
        assert_eq!(geometry(&plan), expected, "{name}");
        // Scratch is for unaligned ends, which only direct reads have.
        let scratch = if plan.reads_direct() {
            u64::from(plan.readers) * 384 * KIB
        } else {
            0
        };
        assert_eq!(plan.scratch_bytes, scratch, "{name}");
        assert!(plan.memory_bytes() <= DEFAULT_STREAM_MEMORY_BYTES, "{name}");
    }
}

#[test]
fn what_is_in_the_page_cache_is_taken_from_there() {
    let copied = auto(&one_shard(), &resident(1000));
    assert_eq!(copied.params.direct, DirectPolicy::Never);
    assert_eq!(copied.params.resident, ResidentPolicy::Copy);
    let mixed = auto(&one_shard(), &resident(500));
    assert_eq!(mixed.params.direct, DirectPolicy::Preferred);
    assert_eq!(mixed.params.resident, ResidentPolicy::Copy);
    assert!(mixed.reads_direct());
    let cold = auto(&one_shard(), &resident(0));
    assert_eq!(cold.params.resident, ResidentPolicy::Reread);
    // Tensors that are not held crowd nothing out, however large they are.
    let mut large = resident(1000);
    if let Some(storage) = &mut large.storage {
        storage.file_bytes = five_shards().read_bytes;
        storage.resident_bytes = Some(five_shards().read_bytes);
    }
    assert_eq!(
        auto(&five_shards(), &large).params.resident,
        ResidentPolicy::Copy
    );
    let mut tight = large;
    tight.memory.available_bytes = Some(GIB);
    let plan = auto(&five_shards(), &tight);
    assert_eq!(plan.params.resident, ResidentPolicy::Copy);
    assert_eq!(geometry(&plan), (2, 1, 4096, 4, 4096));
}

#[test]
fn limits_from_large_to_tiny() {
    let table = [
        (u64::MAX, THREADS),
        (256 * MIB, THREADS),
        // All of it: 32 buffers of 4 MiB, and 6 MiB of scratch.
        (134 * MIB, THREADS),
        (134 * MIB - 1, (16, 1, 2048, 31, 4096)),
        // Two buffers more than readers are enough.
        (78 * MIB, (16, 1, 2048, 18, 4096)),
        (78 * MIB - 1, (16, 1, 2048, 32, 2048)),
        (64 * MIB, (16, 1, 2048, 29, 2048)),
        (32 * MIB, (16, 1, 1024, 26, 1024)),
        // Shorter reads cost more than fewer of them.
        (16 * MIB, (8, 1, 1024, 13, 1024)),
        (4 * MIB, (1, 1, 1024, 3, 1024)),
        (MIB, (1, 1, 256, 2, 256)),
        (896 * KIB, (1, 1, 256, 2, 256)),
    ];
    for (limit_bytes, expected) in table {
        let plan = limited(&one_shard(), limit_bytes);
        assert_eq!(geometry(&plan), expected, "{limit_bytes}");
        assert!(plan.memory_bytes() <= limit_bytes);
    }
    let mut policy = Policy::default();
    policy.memory_limit_bytes = Some(896 * KIB - 1);
    assert!(plan_stream(&one_shard(), &platform(2), &policy).is_err());

    for (limit_bytes, expected) in [
        (256 * MIB, RINGS),
        (64 * MIB, (2, 8, 1024, 7, 8192)),
        (16 * MIB, (2, 2, 1024, 7, 2048)),
        (MIB, (1, 1, 256, 2, 256)),
    ] {
        let plan = limited(&five_shards(), limit_bytes);
        assert_eq!(geometry(&plan), expected, "{limit_bytes}");
        assert!(plan.memory_bytes() <= limit_bytes);
    }
}

#[test]
fn the_index_counts() {
    let mut workload = one_shard();
    workload.index_bytes = 100 * MIB;
    let plan = limited(&workload, 134 * MIB);
    assert_eq!(geometry(&plan), (16, 1, 1024, 28, 1024));
    assert_eq!(plan.memory_bytes(), 134 * MIB);
    workload.index_bytes = 134 * MIB;
    let mut policy = Policy::default();
    policy.memory_limit_bytes = Some(134 * MIB);
    assert!(plan_stream(&workload, &platform(2), &policy).is_err());
}

#[test]
fn no_more_than_half_of_what_there_is() {
    let left = |available_bytes| {
        let mut platform = platform(2);
        platform.memory.available_bytes = Some(available_bytes);
        platform
    };
    let plan = auto(&one_shard(), &left(512 * MIB));
    assert!(
        reason(&plan, "memory_bytes").contains("The default limit of a stream allows 256 MiB.")
    );
    let plan = auto(&one_shard(), &left(128 * MIB));
    assert_eq!(geometry(&plan), (16, 1, 2048, 29, 2048));
    assert!(
        reason(&plan, "memory_bytes")
            .contains("The machine leaves it 64 MiB, half of what there is.")
    );
    // Half counts, also where all of it would be more than the limit.
    let plan = auto(&one_shard(), &left(300 * MIB));
    assert!(reason(&plan, "memory_bytes").contains("The machine leaves it 150 MiB"));
    // A limit that was set does not raise what there is.
    let plan = with(&one_shard(), &left(128 * MIB), |policy| {
        policy.memory_limit_bytes = Some(GIB);
    });
    assert_eq!(geometry(&plan), (16, 1, 2048, 29, 2048));
    let mut grouped = left(GIB);
    grouped.memory.cgroup_available_bytes = Some(32 * MIB);
    let plan = auto(&one_shard(), &grouped);
    assert!(plan.memory_bytes() <= 16 * MIB);
    assert!(reason(&plan, "memory_bytes").contains("The control group leaves it 16 MiB"));
    let mut unknown = platform(2);
    unknown.memory.available_bytes = None;
    assert_eq!(geometry(&auto(&one_shard(), &unknown)), THREADS);
}

#[test]
fn small_workloads_take_little() {
    let two = auto(&whole(SafeTensors, 1, 8 * MIB), &platform(2));
    assert_eq!(geometry(&two), (2, 1, 2048, 2, 4096));
    let one = auto(&whole(SafeTensors, 1, 4 * MIB), &platform(2));
    assert_eq!(geometry(&one), (1, 1, 2048, 2, 4096));
    // A window of 300 KiB, rounded outwards; it is too little to read directly.
    let less = auto(&whole(SafeTensors, 1, 300 * KIB), &platform(2));
    assert_eq!(geometry(&less), (1, 1, 320, 2, 320));
    let nothing_known = auto(&whole(SafeTensors, 0, 0), &platform(2));
    assert_eq!(nothing_known.readers, 8);
    // Short requests, long windows: chunks are no longer than requests can fill.
    let short = auto(
        &ranges(ServerlessLlm, 8, 1000, 1000 * 100_000),
        &platform(2),
    );
    assert_eq!(geometry(&short), (16, 1, 128, 24, 4096));
}

#[test]
fn what_cannot_be_divided_has_room_in_one_buffer() {
    let mut workload = one_shard();
    for (indivisible_bytes, expected) in [
        (MIB, THREADS),
        (4 * MIB - 64 * KIB, THREADS),
        // Its ends may be rounded outwards.
        (4 * MIB - 64 * KIB + 1, (16, 1, 2048, 32, 4096 + 64)),
        (20 * MIB, (8, 1, 2048, 12, 20 * KIB + 64)),
        (100 * MIB, (1, 1, 2048, 2, 100 * KIB + 64)),
    ] {
        workload.indivisible_bytes = indivisible_bytes;
        let plan = auto(&workload, &platform(2));
        assert_eq!(geometry(&plan), expected, "{indivisible_bytes}");
        assert!(plan.buffer_bytes >= indivisible_bytes);
    }
    assert!(
        reason(&auto(&workload, &platform(2)), "buffer_bytes")
            .contains("100 MiB has to be in one buffer")
    );
    workload.indivisible_bytes = 128 * MIB;
    assert!(plan_stream(&workload, &platform(2), &Policy::default()).is_err());
}

#[test]
fn wishes_are_obeyed() {
    for backend in [Sync, Async, IoUring, Mmap] {
        let plan = with(&one_shard(), &platform(2), |policy| {
            policy.backend = BackendChoice::Named(backend);
        });
        assert_eq!(plan.backend, backend);
        let expected = match backend {
            IoUring => RINGS,
            Mmap => (8, 1, 4096, 16, 4096),
            _ => THREADS,
        };
        assert_eq!(geometry(&plan), expected, "{backend}");
    }
    let plan = with(&one_shard(), &platform(2), |policy| {
        policy.workers = Some(3);
    });
    assert_eq!(geometry(&plan), (3, 1, 2048, 6, 4096));
    assert_eq!(reason(&plan, "readers"), "It was set.");
    // Readers that were set are kept where windows can be shorter instead.
    let plan = with(&one_shard(), &platform(2), |policy| {
        policy.workers = Some(16);
        policy.memory_limit_bytes = Some(16 * MIB);
    });
    assert_eq!(geometry(&plan), (16, 1, 512, 20, 512));
    let plan = with(&one_shard(), &platform(2), |policy| {
        policy.chunk_bytes = Some(16 * MIB);
    });
    assert_eq!(geometry(&plan), (8, 1, 16 * KIB, 15, 16 * KIB));
    let plan = with(&one_shard(), &platform(2), |policy| {
        policy.chunk_bytes = Some(100_000);
    });
    assert_eq!(plan.params.chunk_bytes, 100_000);
    assert_eq!(plan.buffer_bytes, 4 * MIB);
    let plan = with(&five_shards(), &platform(2), |policy| {
        policy.queue_depth = Some(64);
    });
    assert_eq!((plan.params.queue_depth, plan.buffer_bytes), (64, 32 * MIB));
    // Not for want of memory: no window is longer.
    let plan = with(&five_shards(), &platform(2), |policy| {
        policy.queue_depth = Some(64);
        policy.memory_limit_bytes = Some(4 * GIB);
    });
    assert_eq!((plan.params.queue_depth, plan.buffer_bytes), (64, 32 * MIB));
    // Without rings it has no effect, and the plan says so.
    let plan = with(&one_shard(), &platform(2), |policy| {
        policy.queue_depth = Some(64);
    });
    assert_eq!(geometry(&plan), THREADS);
    assert!(
        plan.to_string()
            .contains("Not 64: it was set, but has no effect without rings.")
    );
    for direct in [
        DirectPolicy::Never,
        DirectPolicy::Preferred,
        DirectPolicy::Required,
    ] {
        let plan = with(&one_shard(), &resident(500), |policy| {
            policy.direct = DirectChoice::Policy(direct);
        });
        assert_eq!(plan.params.direct, direct);
    }
    let kept = with(&one_shard(), &platform(2), |policy| {
        policy.cache = CacheChoice::Keep;
    });
    assert_eq!(kept.params.direct, DirectPolicy::Never);
    let bypassed = with(&one_shard(), &resident(1000), |policy| {
        policy.cache = CacheChoice::Bypass;
    });
    assert!(bypassed.reads_direct());
}

#[test]
fn what_cannot_run_is_passed_over() {
    let plan = auto(&five_shards(), &without(platform(2), &[IoUring]));
    assert_eq!(plan.backend, Sync);
    assert_eq!(geometry(&plan), THREADS);
    let plan = auto(
        &five_shards(),
        &without(platform(2), &[IoUring, Sync, Async]),
    );
    assert_eq!(plan.backend, Mmap);
    assert_eq!(plan.params.direct, DirectPolicy::Never);
}

#[test]
fn ranks_agree_on_buffers_whatever_they_see() {
    let platform = |cpus| {
        let mut platform = platform(cpus);
        platform.os = "linux".to_owned();
        platform
    };
    let mut workload = one_shard();
    workload.shared = Some(SharedWorkload::new(4, GIB, GIB));
    let expected = auto(&workload, &platform(2));
    assert_eq!(geometry(&expected), (4, 1, 2048, 32, 4096));
    let mut other = five_shards();
    other.shared = Some(SharedWorkload::new(4, GIB, GIB));
    let mut few = platform(64);
    few.memory.available_bytes = Some(GIB);
    for (workload, platform) in [
        (&other, platform(2)),
        (&workload, few),
        (&workload, resident(500)),
        (&workload, resident(1000)),
        (&workload, on_nfs()),
        (&other, without(platform(2), &[Sync, IoUring])),
    ] {
        let plan = auto(workload, &platform);
        assert_eq!(
            (plan.buffers, plan.buffer_bytes),
            (expected.buffers, expected.buffer_bytes)
        );
    }
    // Readers that are set are those of each rank, and each has a buffer.
    let many = with(&workload, &platform(2), |policy| {
        policy.workers = Some(12);
    });
    assert_eq!((many.readers, many.buffers), (12, 59));
    assert!(many.memory_bytes() <= DEFAULT_STREAM_MEMORY_BYTES);
    let mut policy = Policy::default();
    policy.workers = Some(256);
    assert!(matches!(
        plan_stream(&workload, &platform(2), &policy),
        Err(PlanError::StreamDoesNotFit { wishes, .. }) if wishes == ["workers"]
    ));
}

fn profiled(mut platform: Platform, cache: CacheState, mb_per_s: u64) -> Platform {
    let identity = ProfileIdentity::of(&platform).expect("the base has storage");
    platform.profile = ProfileFact::Matching(Box::new(Profile {
        version: Profile::VERSION,
        made_by: "0.1.0".to_owned(),
        made_at_unix_s: 1_795_435_200,
        identity,
        measurements: vec![Measurement {
            cache,
            memory: MemoryKind::Owned,
            backend: IoUring,
            params: TransferParams {
                chunk_bytes: MIB,
                queue_depth: 24,
                workers: 3,
                direct: DirectPolicy::Preferred,
                resident: ResidentPolicy::Reread,
            },
            bytes: mb_per_s * 1_000_000,
            elapsed_us: vec![1_000_000; 3],
        }],
    }));
    platform
}

#[test]
fn what_was_measured_of_loads_goes_for_streams() {
    let plan = auto(&one_shard(), &profiled(platform(2), CacheState::Cold, 2000));
    assert_eq!(plan.backend, IoUring);
    assert_eq!(geometry(&plan), (3, 24, 1024, 10, 24 * KIB));
    assert!(reason(&plan, "profile").contains("of this machine"));
}

#[test]
fn the_gap_that_is_read_depends_on_the_place() {
    let mut unknown = platform(2);
    unknown.storage = None;
    let table = [
        (platform(2), 64 * KIB, "A device delivers"),
        (resident(500), 64 * KIB, "A device delivers"),
        (unknown, 64 * KIB, "A device delivers"),
        (buffered(), 64 * KIB, "A device delivers"),
        (resident(1000), 8 * KIB, "in the time that a call takes"),
        (on_tmpfs(), 8 * KIB, "in the time that a call takes"),
        (on_nfs(), MIB, "A server is asked once"),
        (spinning(), MIB, "to move its heads"),
        // 25 µs at 2 GB/s are 50 kB; the power of two below.
        (
            profiled(platform(2), CacheState::Cold, 2000),
            32 * KIB,
            "Measured here, the device delivers 2.0 GB/s",
        ),
        (
            profiled(platform(2), CacheState::Cold, 1),
            4 * KIB,
            "Measured here",
        ),
        (
            profiled(platform(2), CacheState::Cold, 900_000),
            MIB,
            "Measured here",
        ),
        (
            profiled(platform(2), CacheState::Warm, 2000),
            64 * KIB,
            "A device delivers",
        ),
        // 1.5 µs at 6 GB/s are 9 kB.
        (
            profiled(resident(1000), CacheState::Warm, 6000),
            8 * KIB,
            "Measured here, 6.0 GB/s are copied",
        ),
        // What heads and servers need is no matter of rates.
        (
            profiled(spinning(), CacheState::Cold, 200),
            MIB,
            "to move its heads",
        ),
        (
            profiled(on_nfs(), CacheState::Cold, 200),
            MIB,
            "A server is asked once",
        ),
    ];
    for (platform, gap_bytes, why) in table {
        let (gap, decision) = merge_gap_bytes(&platform, &Policy::default());
        assert_eq!(gap, gap_bytes, "{}", decision.reason);
        assert_eq!(decision.field, "merge_gap_bytes");
        assert_eq!(decision.chosen, gap_bytes.to_string());
        assert!(decision.reason.contains(why), "{}", decision.reason);
    }
    // Who goes past the page cache reads from the device.
    let mut direct = Policy::default();
    direct.direct = DirectChoice::Policy(DirectPolicy::Required);
    assert_eq!(merge_gap_bytes(&resident(1000), &direct).0, 64 * KIB);
}

/// A column slice of half the tensors: `read_bytes` for `needed_bytes`.
fn sliced(needed_bytes: u64, read_bytes: u64, gathered_tensors: u64) -> Workload {
    let mut workload = ranges(SafeTensors, 4, 90, read_bytes);
    workload.needed_bytes = needed_bytes;
    workload.destination_bytes = needed_bytes;
    workload.gathered_tensors = gathered_tensors;
    workload.gathered_bytes = needed_bytes / 2;
    workload
}

#[test]
fn slices_say_what_they_cost() {
    let table = [
        (
            sliced(GIB, GIB, 0),
            "straight",
            "1 GiB is needed and 1 GiB read. What",
        ),
        (
            sliced(GIB, GIB + 1, 0),
            "straight",
            "less than 1 % more: gaps",
        ),
        (
            sliced(GIB, GIB + GIB / 50 + 1, 0),
            "straight",
            "1.02 GiB read, 2 % more: gaps",
        ),
        (
            sliced(GIB, GIB, 200),
            "mixed",
            "200 tensors, 512 MiB, lie scattered",
        ),
        (
            sliced(GIB, 2 * GIB, 399),
            "gathered",
            "2 GiB read, 2 times as much: gaps",
        ),
        (
            sliced(GIB, 4 * GIB - 1, 1),
            "mixed",
            "3 times as much: gaps",
        ),
        // No workload is read by less than it needs.
        (
            sliced(2 * GIB, GIB, 0),
            "straight",
            "2 GiB is needed and 2 GiB read. What",
        ),
    ];
    for (workload, chosen, why) in table {
        let load = plan(&workload, &platform(2), &Policy::default()).expect("there is a plan");
        let stream = auto(&workload, &platform(2));
        for decisions in [&load.decisions, &stream.decisions] {
            let decision = decisions.iter().find(|d| d.field == "slices").expect(why);
            assert_eq!(decision.chosen, chosen, "{}", decision.reason);
            assert!(decision.reason.contains(why), "{}", decision.reason);
            let rejected: Vec<_> = decision.rejected.iter().map(|r| &*r.choice).collect();
            let expected: &[&str] = if chosen == "straight" {
                &[]
            } else {
                &["straight"]
            };
            assert_eq!(rejected, expected);
        }
    }
    // All of the files is no slice, and what claims nothing says nothing.
    let mut all = one_shard();
    all.needed_bytes = all.read_bytes;
    for workload in [all, sliced(0, GIB, 0)] {
        let plan = auto(&workload, &platform(2));
        assert_eq!(reason(&plan, "slices"), "");
    }
}

#[test]
fn windows_beside_a_load_have_a_limit() {
    let limit = |workload: &Workload, available_bytes| {
        let mut platform = platform(2);
        platform.memory.available_bytes = available_bytes;
        plan(workload, &platform, &Policy::default()).map(|plan| plan.window_limit_bytes)
    };
    let gathered = sliced(GIB, GIB, 9);
    assert_eq!(limit(&sliced(GIB, GIB, 0), None), Ok(0));
    assert_eq!(limit(&gathered, None), Ok(128 * MIB));
    assert_eq!(limit(&gathered, Some(24 * GIB)), Ok(128 * MIB));
    // What there is, down to the least that works: two windows and scratch for one reader.
    let least = 896 * KIB;
    let held = GIB + 32 * MIB;
    assert_eq!(limit(&gathered, Some(held + 50 * MIB)), Ok(50 * MIB));
    assert_eq!(limit(&gathered, Some(held + least)), Ok(least));
    assert!(limit(&gathered, Some(held + least - 1)).is_err());
    // Windows of that size can really be had.
    let mut policy = Policy::default();
    policy.memory_limit_bytes = Some(least);
    let mut windows = gathered.clone();
    windows.destination_bytes = 0;
    assert!(plan_stream(&windows, &platform(2), &policy).is_ok());
    let mut whole_hull = gathered;
    whole_hull.indivisible_bytes = 200 * MIB;
    let needed = 2 * (200 * MIB + 64 * KIB) + 384 * KIB;
    assert_eq!(limit(&whole_hull, None), Ok(needed));
}

#[test]
fn the_backend_is_that_of_loads() {
    // A stream's readers are the workers of a load, so that what is known of the one goes for the other.
    for kind in BackendKind::ALL {
        let stream = with(&five_shards(), &platform(2), |policy| {
            policy.backend = BackendChoice::Named(kind);
        });
        assert_eq!(
            stream.params.direct == DirectPolicy::Never,
            kind == Mmap,
            "{kind}"
        );
    }
    let plan = auto(&one_shard(), &platform(2));
    assert!(reason(&plan, "backend").ends_with("streams are taken to be alike."));
    assert!(!reason(&auto(&one_shard(), &on_tmpfs()), "backend").contains("alike"));
}
