//! What measured profiles change, and what they leave alone.

mod common;

use common::{
    GIB, MIB, five_shards, on_nfs, on_tmpfs, one_shard, platform, ranges, resident, without,
};
use tensora_heuristics::{
    BackendChoice, CacheChoice, DirectChoice, MappingConsent, Plan, Policy, StorageLayout,
    Workload, plan,
};
use tensora_io::BackendKind::{Async, IoUring, Mmap, Sync};
use tensora_io::CacheState::{Cold, Half, Warm};
use tensora_io::MemoryKind::{Mapped, Owned};
use tensora_io::{
    BackendKind, CacheState, DirectPolicy, Measurement, Platform, Profile, ProfileFact,
    ProfileIdentity, ResidentPolicy, TransferParams,
};

/// A way of reading: backend, chunk in MiB, depth, workers, direct or not.
type Way = (BackendKind, u64, u32, u32, DirectPolicy);

const DIRECT: DirectPolicy = DirectPolicy::Preferred;
const BUFFERED: DirectPolicy = DirectPolicy::Never;
/// What the constants say of a cold shard, of five, and of a warm copy and mapping with two CPUs.
const THREADS: Way = (Sync, 2, 1, 16, DIRECT);
const RINGS: Way = (IoUring, 2, 8, 2, DIRECT);
const COPY: Way = (Sync, 4, 1, 2, BUFFERED);
const MAP: Way = (Mmap, 4, 1, 8, BUFFERED);

/// One GiB at so many MB/s, three times: 10 % around the median where `noisy`, else exactly.
fn measured(cache: CacheState, way: Way, mb_per_s: u64, noisy: bool) -> Measurement {
    let (backend, chunk_mib, queue_depth, workers, direct) = way;
    let median_us = GIB / mb_per_s;
    let spread_us = if noisy { median_us / 10 } else { 0 };
    Measurement {
        cache,
        memory: Owned,
        backend,
        params: TransferParams {
            chunk_bytes: chunk_mib * MIB,
            queue_depth,
            workers,
            direct,
            resident: ResidentPolicy::Reread,
        },
        bytes: GIB,
        elapsed_us: vec![median_us + spread_us, median_us, median_us - spread_us],
    }
}

fn quiet(cache: CacheState, way: Way, mb_per_s: u64) -> Measurement {
    measured(cache, way, mb_per_s, false)
}

fn mapped(cache: CacheState, mb_per_s: u64) -> Measurement {
    Measurement {
        memory: Mapped,
        ..quiet(cache, MAP, mb_per_s)
    }
}

/// The platform with a profile of 23 November 2026.
fn profiled(mut platform: Platform, measurements: Vec<Measurement>) -> Platform {
    let identity = ProfileIdentity::of(&platform).expect("the base has storage");
    platform.profile = ProfileFact::Matching(Box::new(Profile {
        version: Profile::VERSION,
        made_by: "0.1.0".to_owned(),
        made_at_unix_s: 1_795_440_000,
        identity,
        measurements,
    }));
    platform
}

#[track_caller]
fn with(workload: &Workload, platform: &Platform, change: impl FnOnce(&mut Policy)) -> Plan {
    let mut policy = Policy::default();
    change(&mut policy);
    plan(workload, platform, &policy).expect("there is a plan")
}

#[track_caller]
fn auto(workload: &Workload, platform: &Platform) -> Plan {
    with(workload, platform, |_| {})
}

fn consent(policy: &mut Policy) {
    policy.mapping = MappingConsent::Granted;
}

fn way(plan: &Plan) -> Way {
    let params = &plan.params;
    (
        plan.backend,
        params.chunk_bytes / MIB,
        params.queue_depth,
        params.workers,
        params.direct,
    )
}

/// What was decided about the profile, and why.
#[track_caller]
fn profile(plan: &Plan) -> (&str, &str) {
    let decision = plan.decisions.last().expect("there are decisions");
    assert_eq!(decision.field, "profile");
    (&decision.chosen, &decision.reason)
}

#[track_caller]
fn reason<'a>(plan: &'a Plan, field: &str) -> &'a str {
    let decision = plan
        .decisions
        .iter()
        .find(|decision| decision.field == field);
    &decision.expect("it was decided").reason
}

#[test]
fn what_was_measured_to_be_faster_is_taken() {
    let other = (IoUring, 2, 8, 4, DIRECT);
    let plan = auto(
        &one_shard(),
        &profiled(
            platform(2),
            vec![quiet(Cold, THREADS, 2000), quiet(Cold, other, 2400)],
        ),
    );
    // 64 MiB in flight are more than the constants allow, but this was measured.
    assert_eq!(way(&plan), other);
    assert_eq!(
        reason(&plan, "backend"),
        "Measured here on 2026-11-23: io-uring 4 × 8 × 2 MiB direct 2.4 GB/s, and sync 16 × 2 MiB direct \
         2.0 GB/s, which the constants say."
    );
    assert_eq!(profile(&plan).0, "used");
    let backend = &plan.decisions[1];
    assert_eq!(backend.rejected[0].choice, "sync");
    assert_eq!(
        backend.rejected[0].reason,
        "the best that was measured of it here is sync 16 × 2 MiB direct 2.0 GB/s"
    );
    assert!(backend.rejected[1].reason.contains("not measured"));
}

#[test]
fn the_constants_stay_where_measuring_does_not_tell_the_difference() {
    let other = (IoUring, 2, 8, 4, DIRECT);
    for (own, best, noisy, keeps, why) in [
        (2400, 2000, false, true, "is the fastest"),
        (2000, 2059, false, true, "is within 3 %"),
        (2000, 2070, false, false, "was faster"),
        (2000, 2150, true, true, "is within the spread of its times"),
        (2000, 2300, true, false, "was faster"),
    ] {
        let measurements = vec![
            measured(Cold, THREADS, own, noisy),
            measured(Cold, other, best, false),
        ];
        let plan = auto(&one_shard(), &profiled(platform(2), measurements));
        assert_eq!(way(&plan), if keeps { THREADS } else { other }, "{why}");
        let (chosen, reason) = profile(&plan);
        assert_eq!(chosen, "used");
        assert!(reason.contains(why), "{reason}");
    }
}

#[test]
fn what_the_constants_say_need_not_have_been_measured() {
    let other = (Async, 2, 1, 8, DIRECT);
    let plan = auto(
        &five_shards(),
        &profiled(platform(2), vec![quiet(Cold, other, 100)]),
    );
    assert_eq!(way(&plan), other);
    assert!(reason(&plan, "backend").contains("was not measured"));
}

#[test]
fn warm_and_cold_are_told_apart() {
    let measurements = vec![
        quiet(Cold, RINGS, 2300),
        quiet(Cold, THREADS, 2000),
        quiet(Warm, COPY, 6000),
        quiet(Warm, (IoUring, 4, 4, 2, BUFFERED), 8000),
    ];
    let cold = auto(&one_shard(), &profiled(platform(2), measurements.clone()));
    assert_eq!(way(&cold), RINGS);
    for warm in [resident(1000), on_tmpfs()] {
        let plan = auto(&one_shard(), &profiled(warm, measurements.clone()));
        assert_eq!(way(&plan), (IoUring, 4, 4, 2, BUFFERED));
    }
}

#[test]
fn direct_and_buffered_are_measured_too() {
    let measurements = vec![
        quiet(Cold, THREADS, 1000),
        quiet(Cold, (Sync, 8, 1, 4, BUFFERED), 1500),
    ];
    let cold = profiled(platform(2), measurements.clone());
    let plan = auto(&one_shard(), &cold);
    assert_eq!(way(&plan), (Sync, 8, 1, 4, BUFFERED));
    assert!(reason(&plan, "direct").starts_with("As measured"));
    // The other way round: a server whose direct reads are the faster ones.
    let served = profiled(
        on_nfs(),
        vec![
            quiet(Cold, (Sync, 8, 1, 4, BUFFERED), 500),
            quiet(Cold, THREADS, 900),
        ],
    );
    let plan = auto(&one_shard(), &served);
    assert_eq!(way(&plan), THREADS);
    assert!(reason(&plan, "direct").starts_with("As measured"));
    // Wishes rule some of them out.
    let direct = with(&one_shard(), &cold, |policy| {
        policy.direct = DirectChoice::Policy(DirectPolicy::Required);
    });
    assert_eq!(way(&direct), (Sync, 2, 1, 16, DirectPolicy::Required));
    let bypass = with(&one_shard(), &cold, |policy| {
        policy.cache = CacheChoice::Bypass;
    });
    assert_eq!(way(&bypass), THREADS);
    let keep = with(&one_shard(), &cold, |policy| {
        policy.cache = CacheChoice::Keep;
    });
    assert_eq!(way(&keep), (Sync, 8, 1, 4, BUFFERED));
}

#[test]
fn half_resident_files_have_times_of_their_own() {
    let mut copied = quiet(Half, (Async, 1, 1, 16, DIRECT), 5000);
    copied.params.resident = ResidentPolicy::Copy;
    let mut measurements = vec![
        quiet(Cold, RINGS, 2400),
        quiet(Cold, THREADS, 2000),
        // Read again from the device, it is not what is planned.
        quiet(Half, (Sync, 2, 1, 8, DIRECT), 9000),
        copied,
    ];
    let half = |measurements: &Vec<_>, per_mille| {
        auto(
            &one_shard(),
            &profiled(resident(per_mille), measurements.clone()),
        )
    };
    assert_eq!(way(&half(&measurements, 500)), (Async, 1, 1, 16, DIRECT));
    assert_eq!(way(&half(&measurements, 249)), RINGS);
    assert_eq!(way(&half(&measurements, 250)), (Async, 1, 1, 16, DIRECT));
    // Without them, cold ones tell as much as long as the device decides.
    measurements.truncate(2);
    assert_eq!(way(&half(&measurements, 500)), RINGS);
    let copy = half(&measurements, 800);
    assert_eq!(way(&copy), THREADS);
    assert_eq!(profile(&copy).0, "unused");
}

#[test]
fn mapping_is_weighed_against_reading() {
    let rates = |cold_mapped, warm_mapped| {
        vec![
            quiet(Cold, THREADS, 2000),
            quiet(Warm, COPY, 6000),
            mapped(Cold, cold_mapped),
            mapped(Warm, warm_mapped),
        ]
    };
    for (per_mille, cold_mapped, warm_mapped, memory) in [
        // Cold and small, mapping has to be slower by more than the margin not to be chosen.
        (0, 1500, 100_000, Owned),
        (0, 1930, 100_000, Owned),
        (0, 1950, 100_000, Mapped),
        (0, 2100, 100_000, Mapped),
        // Warm, too.
        (1000, 1500, 100_000, Mapped),
        (1000, 1500, 5900, Mapped),
        (1000, 1500, 5000, Owned),
        // Between them, too: of each GB, 40 % cold take 0.20 s read, and 60 % warm are copied meanwhile.
        (600, 1600, 100_000, Owned),
        (600, 1950, 100_000, Owned),
        (600, 2050, 100_000, Mapped),
        (600, 2200, 100_000, Mapped),
        (900, 1500, 100_000, Mapped),
        (900, 500, 100_000, Owned),
    ] {
        let platform = profiled(resident(per_mille), rates(cold_mapped, warm_mapped));
        let plan = with(&one_shard(), &platform, consent);
        assert_eq!(
            plan.memory, memory,
            "{per_mille} {cold_mapped} {warm_mapped}"
        );
        // Without consent there is nothing to weigh.
        assert_eq!(auto(&one_shard(), &platform).memory, Owned);
    }
    // Cold and large, it has to be faster.
    for (cold_mapped, memory) in [(1950, Owned), (2050, Owned), (2100, Mapped)] {
        let platform = profiled(resident(0), rates(cold_mapped, 100_000));
        let plan = with(&five_shards(), &platform, consent);
        assert_eq!(plan.memory, memory, "{cold_mapped}");
    }
    // Times of half-resident files beat what cold and warm ones let expect: that would be to map.
    for (half_owned, half_mapped, memory) in [(3000, 4000, Mapped), (4000, 3000, Owned)] {
        let mut measurements = rates(2200, 100_000);
        let mut copied = quiet(Half, THREADS, half_owned);
        copied.params.resident = ResidentPolicy::Copy;
        let reread = quiet(Half, THREADS, 9000);
        measurements.extend([reread, copied, mapped(Half, half_mapped)]);
        let half = profiled(resident(600), measurements);
        assert_eq!(with(&one_shard(), &half, consent).memory, memory);
    }
    let platform = profiled(platform(2), rates(4000, 100_000));
    let plan = with(&one_shard(), &platform, consent);
    assert_eq!(
        reason(&plan, "memory"),
        "Mappings are allowed, and by what was measured here on 2026-11-23 mapping takes about 0.38 s, and \
         reading into memory of its own 0.75 s."
    );
    // A server's files are not mapped, however fast that was.
    let served = profiled(on_nfs(), rates(4000, 100_000));
    assert_eq!(with(&one_shard(), &served, consent).memory, Owned);
}

#[test]
fn parameters_of_a_mapping_are_measured_too() {
    let mut wide = mapped(Warm, 120_000);
    wide.params.workers = 2;
    wide.params.chunk_bytes = 16 * MIB;
    let platform = profiled(
        resident(1000),
        vec![quiet(Warm, COPY, 6000), mapped(Warm, 80_000), wide],
    );
    let plan = with(&one_shard(), &platform, consent);
    assert_eq!(
        (plan.memory, way(&plan)),
        (Mapped, (Mmap, 16, 1, 2, BUFFERED))
    );
}

#[test]
fn wishes_come_before_measurements() {
    let platform = profiled(
        platform(2),
        vec![
            quiet(Cold, RINGS, 2400),
            quiet(Cold, (Async, 2, 1, 8, DIRECT), 2200),
            quiet(Cold, (Async, 1, 1, 4, DIRECT), 2300),
        ],
    );
    // The best of a named backend.
    let named = with(&one_shard(), &platform, |policy| {
        policy.backend = BackendChoice::Named(Async);
    });
    assert_eq!(way(&named), (Async, 1, 1, 4, DIRECT));
    assert_eq!(reason(&named, "backend"), "It was named.");
    // The best of those with what was set, and the constants where there is none.
    let set = with(&one_shard(), &platform, |policy| policy.workers = Some(8));
    assert_eq!(way(&set), (Async, 2, 1, 8, DIRECT));
    let set = with(&one_shard(), &platform, |policy| policy.workers = Some(3));
    assert_eq!(way(&set), (Sync, 2, 1, 3, DIRECT));
    assert_eq!(profile(&set).0, "unused");
}

#[test]
fn what_cannot_run_is_not_taken() {
    let platform = profiled(
        without(platform(2), &[IoUring]),
        vec![quiet(Cold, RINGS, 9000), quiet(Cold, THREADS, 2000)],
    );
    assert_eq!(way(&auto(&five_shards(), &platform)), THREADS);
}

#[test]
fn measurements_that_make_no_sense_are_passed_over() {
    let mut no_chunk = quiet(Cold, RINGS, 9000);
    no_chunk.params.chunk_bytes = 0;
    let mut no_time = quiet(Cold, RINGS, 9000);
    no_time.elapsed_us.clear();
    let mut no_bytes = quiet(Cold, RINGS, 9000);
    no_bytes.bytes = 0;
    let mut no_map = quiet(Cold, RINGS, 9000);
    no_map.memory = Mapped;
    let platform = profiled(platform(2), vec![no_chunk, no_time, no_bytes, no_map]);
    let plan = auto(&one_shard(), &platform);
    assert_eq!(way(&plan), THREADS);
    assert_eq!(profile(&plan).0, "unused");
}

#[test]
fn loads_unlike_what_was_measured_go_by_the_constants() {
    let other = (IoUring, 1, 8, 4, DIRECT);
    let profiled = |base| {
        profiled(
            base,
            vec![quiet(Cold, other, 9000), quiet(Warm, other, 9000)],
        )
    };
    let whole = |bytes| common::whole(StorageLayout::SafeTensors, 1, bytes);
    let short = |bytes| ranges(StorageLayout::SafeTensors, 1, 100, 100 * bytes);
    for (workload, used, why) in [
        (whole(64 * MIB), true, ""),
        (whole(64 * MIB - 1), false, "64 MiB and more"),
        (short(MIB), true, ""),
        (short(MIB - 1), false, "on average"),
    ] {
        let plan = auto(&workload, &profiled(platform(2)));
        let (chosen, reason) = profile(&plan);
        assert_eq!(chosen, if used { "used" } else { "unused" });
        assert!(reason.contains(why), "{reason}");
        assert_eq!(way(&plan) == other, used);
    }
    // Nobody measured a page cache that is too full.
    let mut crowded = resident(1000);
    crowded.storage = crowded.storage.map(|mut storage| {
        storage.file_bytes = five_shards().read_bytes;
        storage.resident_bytes = Some(storage.file_bytes);
        storage
    });
    let plan = auto(&five_shards(), &profiled(crowded));
    assert_eq!(plan.backend, Sync);
    assert!(profile(&plan).1.contains("have room"));
}

#[test]
fn a_missing_or_ignored_profile_is_told() {
    let mut platform = platform(2);
    let without = auto(&one_shard(), &platform);
    assert!(
        without
            .decisions
            .iter()
            .all(|decision| decision.field != "profile")
    );
    for (fact, chosen, why) in [
        (ProfileFact::Absent, "absent", "`tensora calibrate PATH`"),
        (
            ProfileFact::Ignored {
                reason: "the kernel has changed".to_owned(),
            },
            "ignored",
            "the kernel has changed; `tensora calibrate PATH`",
        ),
    ] {
        platform.profile = fact;
        let plan = auto(&one_shard(), &platform);
        assert_eq!(profile(&plan).0, chosen);
        assert!(profile(&plan).1.contains(why), "{}", profile(&plan).1);
        assert_eq!(plan.params, without.params);
    }
}
