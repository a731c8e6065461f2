//! The regime table, and the facts that stand above it.

mod common;

use common::{
    GIB, MIB, five_shards, on_nfs, on_tmpfs, one_shard, platform, ranges, resident, stored, whole,
    without,
};
use tensora_heuristics::StorageLayout::{SafeTensors, ServerlessLlm};
use tensora_heuristics::{
    BackendChoice, CacheChoice, DirectChoice, MappingConsent, MemoryChoice, MemoryKind, Plan,
    Policy, Workload, plan,
};
use tensora_io::BackendKind::{Async, IoUring, Mmap, Sync};
use tensora_io::{
    BackendKind, DirectPolicy, DirectSupport, FileSystemClass, Platform, ResidentPolicy,
    TransferParams,
};

const GB: u64 = 1_000_000_000;

#[track_caller]
fn auto(workload: &Workload, platform: &Platform) -> Plan {
    plan(workload, platform, &Policy::default()).expect("there is a plan")
}

#[track_caller]
fn with(workload: &Workload, platform: &Platform, change: impl FnOnce(&mut Policy)) -> Plan {
    let mut policy = Policy::default();
    change(&mut policy);
    plan(workload, platform, &policy).expect("there is a plan")
}

fn consent(policy: &mut Policy) {
    policy.mapping = MappingConsent::Granted;
}

/// Why `choice` was rejected when `field` was decided.
#[track_caller]
fn rejection<'a>(plan: &'a Plan, field: &str, choice: &str) -> &'a str {
    plan.decisions
        .iter()
        .filter(|decision| decision.field == field)
        .flat_map(|decision| &decision.rejected)
        .find(|rejection| rejection.choice == choice)
        .map(|rejection| rejection.reason.as_str())
        .unwrap_or_else(|| panic!("{choice} was not rejected for {field}"))
}

#[test]
fn every_row_of_the_regime_table() {
    let table = [
        ("one small shard", whole(SafeTensors, 1, GB), Sync),
        ("one large shard", whole(SafeTensors, 1, 20 * GB), Sync),
        ("small shards", whole(SafeTensors, 4, 4 * GB - 1), Sync),
        ("large shards", whole(SafeTensors, 2, 4 * GB), IoUring),
        ("small selection", ranges(SafeTensors, 4, 90, GB), Sync),
        (
            "large selection",
            ranges(SafeTensors, 4, 90, 8 * GB),
            IoUring,
        ),
        ("small ranges", ranges(ServerlessLlm, 8, 90, GB), Async),
        ("large ranges", ranges(ServerlessLlm, 8, 90, 8 * GB), Async),
        (
            "small partitions",
            whole(ServerlessLlm, 8, 4 * GB - 1),
            Sync,
        ),
        ("large partitions", whole(ServerlessLlm, 8, 4 * GB), IoUring),
        (
            "one large partition",
            whole(ServerlessLlm, 1, 9 * GB),
            IoUring,
        ),
    ];
    for (name, workload, backend) in table {
        let plan = auto(&workload, &platform(4));
        assert_eq!(plan.backend, backend, "{name}");
        assert_eq!(plan.memory, MemoryKind::Owned, "{name}");
        assert_eq!(plan.params.direct, DirectPolicy::Preferred, "{name}");
        assert!(plan.reads_direct(), "{name}");
    }
}

#[test]
fn the_table_holds_where_nothing_is_known_about_the_storage() {
    let mut unknown = platform(4);
    unknown.storage = None;
    let plan = auto(&five_shards(), &unknown);
    assert_eq!(plan.backend, IoUring);
    assert_eq!(plan.params.direct, DirectPolicy::Never);
    assert!(!plan.reads_direct());
}

#[test]
fn parameters_of_each_backend() {
    let table: [(Option<BackendKind>, DirectPolicy, u32, [u64; 3]); 12] = [
        // Backend, direct, CPUs; chunk in MiB, depth, workers.
        (Some(Sync), DirectPolicy::Preferred, 2, [2, 1, 16]),
        (Some(Sync), DirectPolicy::Preferred, 64, [2, 1, 16]),
        (Some(Sync), DirectPolicy::Never, 1, [8, 1, 8]),
        (Some(Sync), DirectPolicy::Never, 6, [8, 1, 8]),
        (Some(Sync), DirectPolicy::Never, 64, [8, 1, 8]),
        (Some(Async), DirectPolicy::Required, 2, [2, 1, 16]),
        (Some(Async), DirectPolicy::Never, 6, [8, 1, 8]),
        (Some(IoUring), DirectPolicy::Preferred, 1, [2, 16, 2]),
        (Some(IoUring), DirectPolicy::Preferred, 64, [2, 8, 4]),
        (Some(Mmap), DirectPolicy::Never, 2, [4, 1, 8]),
        (Some(Mmap), DirectPolicy::Never, 64, [4, 1, 16]),
        (None, DirectPolicy::Preferred, 2, [2, 16, 2]),
    ];
    for (backend, direct, cpus, [chunk_mib, queue_depth, workers]) in table {
        let plan = with(&five_shards(), &platform(cpus), |policy| {
            policy.backend = backend.map_or(BackendChoice::Auto, BackendChoice::Named);
            policy.direct = DirectChoice::Policy(direct);
        });
        let expected = TransferParams {
            chunk_bytes: chunk_mib * MIB,
            queue_depth: u32::try_from(queue_depth).expect("small"),
            workers: u32::try_from(workers).expect("small"),
            direct,
            resident: match (backend, direct) {
                (Some(Sync | Async | IoUring), DirectPolicy::Never) => ResidentPolicy::Copy,
                _ => ResidentPolicy::Reread,
            },
        };
        assert_eq!(plan.params, expected, "{backend:?} {direct} {cpus}");
    }
}

#[test]
fn files_in_memory_are_copied_or_mapped() {
    for workload in [one_shard(), five_shards(), ranges(ServerlessLlm, 8, 9, GB)] {
        let copied = auto(&workload, &on_tmpfs());
        assert_eq!((copied.backend, copied.memory), (Sync, MemoryKind::Owned));
        assert_eq!(copied.params.direct, DirectPolicy::Never);
        assert_eq!(copied.params.workers, 2 * copied.platform.cpus);
        let mapped = with(&workload, &on_tmpfs(), consent);
        assert_eq!((mapped.backend, mapped.memory), (Mmap, MemoryKind::Mapped));
    }
}

#[test]
fn resident_files_are_copied_or_mapped() {
    for per_mille in [980, 1000] {
        for workload in [one_shard(), five_shards(), ranges(ServerlessLlm, 8, 9, GB)] {
            let platform = resident(per_mille);
            let copied = auto(&workload, &platform);
            assert_eq!((copied.backend, copied.memory), (Sync, MemoryKind::Owned));
            assert_eq!(copied.params.direct, DirectPolicy::Never);
            assert_eq!(copied.params.chunk_bytes, 4 * MIB);
            assert_eq!(copied.params.workers, 2 * platform.cpus);
            let mapped = with(&workload, &platform, consent);
            assert_eq!((mapped.backend, mapped.memory), (Mmap, MemoryKind::Mapped));
        }
    }
}

#[test]
fn partly_resident_files_are_copied_where_resident_and_read_elsewhere() {
    let table = [
        // Per mille; of one shard and of five: backend.
        (20, Sync, IoUring),
        (249, Sync, IoUring),
        // From here on rings would copy instead of submitting.
        (250, Sync, Sync),
        (749, Sync, Sync),
        // From here on it is a copy above all.
        (750, Sync, Sync),
        (979, Sync, Sync),
    ];
    for (per_mille, small, large) in table {
        for (workload, backend) in [(one_shard(), small), (five_shards(), large)] {
            let plan = auto(&workload, &resident(per_mille));
            assert_eq!(plan.backend, backend, "{per_mille}");
            assert_eq!(plan.memory, MemoryKind::Owned, "{per_mille}");
            assert_eq!(plan.params.direct, DirectPolicy::Preferred, "{per_mille}");
            assert_eq!(plan.params.resident, ResidentPolicy::Copy, "{per_mille}");
            // The device decides about the parameters, whatever is copied meanwhile.
            assert_eq!(plan.params.chunk_bytes, 2 * MIB, "{per_mille}");
            assert_eq!(
                plan.params.workers * plan.params.queue_depth,
                if backend == IoUring { 32 } else { 16 },
                "{per_mille}"
            );
            assert!(rejection(&plan, "resident", "reread").contains("deliver again"));
        }
    }
}

#[test]
fn next_to_nothing_resident_counts_as_cold() {
    for per_mille in [0, 19] {
        let plan = auto(&one_shard(), &resident(per_mille));
        assert!(plan.reads_direct());
        assert_eq!(plan.params.resident, ResidentPolicy::Reread);
    }
}

/// A disk with moving heads.
fn spinning() -> Platform {
    stored(|storage| {
        storage.device = Some("sda".to_owned());
        storage.device_model = Some("ST8000NM0055-1RM112".to_owned());
        storage.rotational = Some(true);
    })
}

#[test]
fn partly_resident_files_are_mapped_where_little_is_missing() {
    // Even where populating in several places at once makes heads seek.
    for (per_mille, memory) in [
        (500, MemoryKind::Owned),
        (799, MemoryKind::Owned),
        (800, MemoryKind::Mapped),
        (979, MemoryKind::Mapped),
    ] {
        let mut platform = spinning();
        platform.storage.as_mut().unwrap().resident_bytes = Some(per_mille);
        let plan = with(&one_shard(), &platform, consent);
        assert_eq!(plan.memory, memory, "{per_mille}");
        if memory == MemoryKind::Owned {
            assert!(rejection(&plan, "memory", "mapped").contains("heads seek"));
        }
    }
}

#[test]
fn cold_and_half_resident_files_are_mapped_where_that_was_measured_to_pay() {
    let table = [
        // Bytes, per mille in the page cache, memory, and a word of why not.
        (GB, 0, MemoryKind::Mapped, ""),
        (GB, 249, MemoryKind::Mapped, ""),
        (GB, 250, MemoryKind::Mapped, ""),
        (GB, 799, MemoryKind::Mapped, ""),
        (8 * GB, 0, MemoryKind::Mapped, ""),
        (8 * GB, 500, MemoryKind::Mapped, ""),
        (8 * GB + 1, 0, MemoryKind::Owned, "up to 8 GB"),
        (8 * GB + 1, 100, MemoryKind::Owned, "up to 8 GB"),
        (8 * GB + 1, 249, MemoryKind::Owned, "up to 8 GB"),
        (8 * GB + 1, 250, MemoryKind::Mapped, ""),
        (16 * GB, 500, MemoryKind::Mapped, ""),
        (8 * GB + 1, 800, MemoryKind::Mapped, ""),
    ];
    for (bytes, per_mille, memory, against) in table {
        for workload in [whole(SafeTensors, 1, bytes), whole(ServerlessLlm, 8, bytes)] {
            let plan = with(&workload, &resident(per_mille), consent);
            assert_eq!(plan.memory, memory, "{bytes} {per_mille}");
            match memory {
                MemoryKind::Mapped => assert!(!rejection(&plan, "memory", "owned").is_empty()),
                MemoryKind::Owned => {
                    let reason = rejection(&plan, "memory", "mapped");
                    assert!(reason.contains(against), "{bytes} {per_mille}: {reason}");
                }
            }
            // Never without consent.
            assert_eq!(
                auto(&workload, &resident(per_mille)).memory,
                MemoryKind::Owned
            );
        }
    }
}

#[test]
fn cold_files_are_not_mapped_where_nobody_measured_it() {
    let strange = stored(|storage| storage.class = FileSystemClass::Unknown);
    let mut unknown = platform(2);
    unknown.storage = None;
    for (platform, against) in [
        (spinning(), "heads seek"),
        (strange, "behind a server is not known"),
        (unknown, "where the files are is not known"),
        (on_nfs(), "wait for the server"),
    ] {
        let plan = with(&one_shard(), &platform, consent);
        assert_eq!(plan.memory, MemoryKind::Owned, "{against}");
        let reason = rejection(&plan, "memory", "mapped");
        assert!(reason.contains(against), "{reason}");
    }
    let overlay = stored(|storage| storage.class = FileSystemClass::Overlay);
    assert_eq!(
        with(&one_shard(), &overlay, consent).memory,
        MemoryKind::Mapped
    );
    // Long extents were measured; a workload without sizes claims none.
    for (workload, memory) in [
        (ranges(SafeTensors, 4, 90, 90 * MIB), MemoryKind::Mapped),
        (ranges(SafeTensors, 4, 90, 90 * MIB - 1), MemoryKind::Owned),
        (whole(SafeTensors, 1, 0), MemoryKind::Owned),
    ] {
        let plan = with(&workload, &platform(2), consent);
        assert_eq!(plan.memory, memory, "{}", workload.read_bytes);
    }
    // Nor is there anything to gain where the page cache cannot hold what is needed of the files.
    let mut narrow = platform(2);
    narrow.memory.available_bytes = Some(GIB);
    let mut part = one_shard();
    part.destination_bytes = GIB / 2;
    let plan = with(&part, &narrow, consent);
    assert_eq!(plan.memory, MemoryKind::Owned);
    assert!(rejection(&plan, "memory", "mapped").contains("only 1 GiB is left"));
    // Who wants direct reads gets them.
    let direct = with(&one_shard(), &platform(2), |policy| {
        consent(policy);
        policy.direct = DirectChoice::Policy(DirectPolicy::Preferred);
    });
    assert_eq!((direct.backend, direct.memory), (Sync, MemoryKind::Owned));
}

#[test]
fn without_direct_reads_partly_resident_files_are_read_through_the_cache() {
    let mut platform = resident(500);
    if let Some(storage) = &mut platform.storage {
        storage.direct = DirectSupport::Unsupported {
            reason: "EINVAL".to_owned(),
        };
    }
    let plan = auto(&five_shards(), &platform);
    assert_eq!(plan.params.direct, DirectPolicy::Never);
    assert_eq!(plan.params.resident, ResidentPolicy::Copy);
    let never = with(&five_shards(), &resident(500), |policy| {
        policy.direct = DirectChoice::Policy(DirectPolicy::Never);
    });
    assert_eq!(never.params.direct, DirectPolicy::Never);
    assert_eq!(never.params.resident, ResidentPolicy::Copy);
}

#[test]
fn who_asks_for_direct_reads_gets_them_for_what_is_resident_too() {
    for direct in [DirectPolicy::Preferred, DirectPolicy::Required] {
        for per_mille in [500, 1000] {
            let plan = with(&five_shards(), &resident(per_mille), |policy| {
                policy.direct = DirectChoice::Policy(direct);
            });
            assert_eq!(plan.params.direct, direct);
            assert_eq!(plan.params.resident, ResidentPolicy::Reread);
            assert!(rejection(&plan, "resident", "copy").contains("not be read directly"));
        }
    }
}

#[test]
fn unknown_residency_counts_as_cold() {
    let plan = auto(
        &one_shard(),
        &stored(|storage| storage.resident_bytes = None),
    );
    assert_eq!(plan.params.direct, DirectPolicy::Preferred);
}

#[test]
fn asking_for_direct_reads_goes_past_the_page_cache() {
    let plan = with(&five_shards(), &resident(1000), |policy| {
        policy.mapping = MappingConsent::Granted;
        policy.direct = DirectChoice::Policy(DirectPolicy::Preferred);
    });
    assert_eq!((plan.backend, plan.memory), (IoUring, MemoryKind::Owned));
    assert!(plan.reads_direct());
}

#[test]
fn asking_for_direct_reads_rules_out_mapping_only_where_they_work() {
    for (direct, memory) in [
        (
            on_tmpfs().storage.expect("probed").direct,
            MemoryKind::Owned,
        ),
        (
            DirectSupport::Unsupported {
                reason: "EINVAL".to_owned(),
            },
            MemoryKind::Mapped,
        ),
    ] {
        let mut platform = on_tmpfs();
        platform.storage.as_mut().expect("probed").direct = direct;
        let plan = with(&one_shard(), &platform, |policy| {
            policy.mapping = MappingConsent::Granted;
            policy.direct = DirectChoice::Policy(DirectPolicy::Preferred);
        });
        assert_eq!(plan.memory, memory);
    }
}

#[test]
fn preferred_without_support_is_planned_as_buffered() {
    let unsupported = stored(|storage| {
        storage.direct = DirectSupport::Unsupported {
            reason: "EINVAL".to_owned(),
        };
    });
    let plan = with(&one_shard(), &unsupported, |policy| {
        policy.direct = DirectChoice::Policy(DirectPolicy::Preferred);
    });
    assert_eq!(plan.params.direct, DirectPolicy::Preferred);
    assert!(!plan.reads_direct());
    assert_eq!(plan.params.chunk_bytes, 8 * MIB);

    let plan = auto(&one_shard(), &unsupported);
    assert_eq!(plan.params.direct, DirectPolicy::Never);
    assert!(rejection(&plan, "direct", "preferred").contains("EINVAL"));
}

#[test]
fn servers_are_read_in_a_few_long_streams() {
    for class in [FileSystemClass::Network, FileSystemClass::Fuse] {
        for workload in [one_shard(), five_shards(), ranges(ServerlessLlm, 8, 9, GB)] {
            let platform = stored(|storage| storage.class = class);
            let plan = with(&workload, &platform, consent);
            assert_eq!((plan.backend, plan.memory), (Sync, MemoryKind::Owned));
            assert_eq!(plan.params.direct, DirectPolicy::Never);
            assert_eq!((plan.params.chunk_bytes, plan.params.workers), (8 * MIB, 4));
        }
    }
    // Also with rings, there are no more reads at once than that.
    let rings = with(&five_shards(), &on_nfs(), |policy| {
        policy.backend = BackendChoice::Named(IoUring);
    });
    assert_eq!((rings.params.workers, rings.params.queue_depth), (2, 2));
}

#[test]
fn a_disk_with_moving_heads_is_read_in_a_few_long_streams() {
    let disk = |name: &str, model: Option<&str>, rotational| {
        stored(|storage| {
            storage.device = Some(name.to_owned());
            storage.device_model = model.map(str::to_owned);
            storage.rotational = rotational;
        })
    };
    let spinning = disk("sda", Some("ST8000NM0055-1RM112"), Some(true));
    let threads = auto(&one_shard(), &spinning);
    assert!(threads.reads_direct());
    assert_eq!(
        (threads.params.chunk_bytes, threads.params.workers),
        (4 * MIB, 4)
    );
    let rings = auto(&five_shards(), &spinning).params;
    assert_eq!((rings.workers, rings.queue_depth), (2, 2));
    // What is in the page cache is no matter of heads.
    let mut warm = spinning.clone();
    if let Some(storage) = &mut warm.storage {
        storage.resident_bytes = Some(storage.file_bytes);
    }
    assert_eq!(auto(&one_shard(), &warm).params.workers, 2 * warm.cpus);
    // Virtual disks say so, too, and are not believed; nor is a disk that does not say what it is.
    for (name, model, rotational) in [
        ("vda", None, Some(true)),
        ("vda", Some("ST8000NM0055-1RM112"), Some(true)),
        ("xvda", None, Some(true)),
        ("dm-0", None, Some(true)),
        ("sda", None, Some(true)),
        ("sda", Some(" "), Some(true)),
        ("sda", Some("QEMU HARDDISK"), Some(true)),
        ("sda", Some("VBOX HARDDISK"), Some(true)),
        ("sda", Some("Virtual disk"), Some(true)),
        ("sda", Some("PersistentDisk"), Some(true)),
        ("sda", Some("EphemeralDisk"), Some(true)),
        ("sda", Some("Amazon Elastic Block Store"), Some(true)),
        ("sda", Some("ST8000NM0055-1RM112"), Some(false)),
        ("sda", Some("ST8000NM0055-1RM112"), None),
    ] {
        let plan = auto(&one_shard(), &disk(name, model, rotational));
        assert_eq!(plan.params.workers, 16, "{name} {model:?} {rotational:?}");
    }
}

#[test]
fn resident_files_of_a_server_are_copied_and_never_mapped_unasked() {
    let platform = stored(|storage| {
        storage.class = FileSystemClass::Network;
        storage.resident_bytes = Some(storage.file_bytes);
    });
    let plan = with(&one_shard(), &platform, consent);
    assert_eq!((plan.backend, plan.memory), (Sync, MemoryKind::Owned));
    assert_eq!(plan.params.chunk_bytes, 4 * MIB);
    let plan = with(&one_shard(), &platform, |policy| {
        policy.mapping = MappingConsent::Granted;
        policy.memory = MemoryChoice::Mapped;
    });
    assert_eq!(plan.memory, MemoryKind::Mapped);
}

#[test]
fn direct_reads_have_to_be_worth_it() {
    let tiny = auto(&whole(SafeTensors, 1, 4 * MIB - 1), &platform(2));
    assert_eq!(tiny.params.direct, DirectPolicy::Never);
    let enough = auto(&whole(SafeTensors, 1, 4 * MIB), &platform(2));
    assert_eq!(enough.params.direct, DirectPolicy::Preferred);
    let scattered = auto(
        &ranges(ServerlessLlm, 8, 10_000, 10_000 * 65_535),
        &platform(2),
    );
    assert_eq!(scattered.params.direct, DirectPolicy::Never);
    let longer = auto(
        &ranges(ServerlessLlm, 8, 10_000, 10_000 * 65_536),
        &platform(2),
    );
    assert_eq!(longer.params.direct, DirectPolicy::Preferred);
}

#[test]
fn what_cannot_run_is_passed_over_in_the_documented_order() {
    let table = [
        (five_shards(), [IoUring, Sync, Async, Mmap]),
        (
            ranges(ServerlessLlm, 8, 9, GB),
            [Async, Sync, IoUring, Mmap],
        ),
        (one_shard(), [Sync, Async, IoUring, Mmap]),
        (whole(ServerlessLlm, 8, GB), [Sync, Async, IoUring, Mmap]),
    ];
    for (workload, order) in table {
        for (passed_over, backend) in order.into_iter().enumerate() {
            let blocked = &order[..passed_over];
            let plan = auto(&workload, &without(platform(2), blocked));
            assert_eq!(plan.backend, backend);
            assert_eq!(plan.memory, MemoryKind::Owned);
            for kind in blocked {
                let reason = rejection(&plan, "backend", kind.as_str());
                assert!(reason.contains(&format!("{kind} is blocked")), "{reason}");
                assert!(reason.contains(&format!("unblock {kind}")), "{reason}");
            }
            // Every other backend that was not chosen has a reason, too.
            for kind in BackendKind::ALL.into_iter().filter(|kind| *kind != backend) {
                assert!(!rejection(&plan, "backend", kind.as_str()).is_empty());
            }
        }
    }
}

#[test]
fn mmap_with_owned_memory_populates_and_copies() {
    let plan = with(&one_shard(), &platform(2), |policy| {
        policy.backend = BackendChoice::Named(Mmap);
    });
    assert_eq!((plan.backend, plan.memory), (Mmap, MemoryKind::Owned));
    assert_eq!(plan.params.direct, DirectPolicy::Never);
    // With consent there is nothing to copy for.
    let plan = with(&one_shard(), &platform(2), |policy| {
        policy.backend = BackendChoice::Named(Mmap);
        policy.mapping = MappingConsent::Granted;
    });
    assert_eq!((plan.backend, plan.memory), (Mmap, MemoryKind::Mapped));
}

#[test]
fn a_named_backend_stays_owned_and_says_what_it_was_chosen_over() {
    let plan = with(&five_shards(), &resident(1000), |policy| {
        policy.backend = BackendChoice::Named(Async);
        policy.mapping = MappingConsent::Granted;
    });
    assert_eq!((plan.backend, plan.memory), (Async, MemoryKind::Owned));
    assert!(rejection(&plan, "memory", "mapped").contains("async was named"));
    assert!(rejection(&plan, "backend", "sync").contains("async was named"));
}

#[test]
fn consent_is_worth_nothing_where_mmap_cannot_run() {
    let plan = with(&one_shard(), &without(resident(1000), &[Mmap]), consent);
    assert_eq!((plan.backend, plan.memory), (Sync, MemoryKind::Owned));
    assert!(rejection(&plan, "memory", "mapped").contains("mmap is blocked"));
}

#[test]
fn too_large_for_memory_is_mapped_with_consent() {
    let mut small = platform(2);
    small.memory.available_bytes = Some(GIB);
    let plan = with(&one_shard(), &small, consent);
    assert_eq!((plan.backend, plan.memory), (Mmap, MemoryKind::Mapped));
    assert!(rejection(&plan, "memory", "owned").contains("the machine leaves 1 GiB"));
}

#[test]
fn mapping_where_it_pays_says_too_that_owned_tensors_would_not_fit() {
    for per_mille in [0, 1000] {
        let plan = with(&one_shard(), &resident(per_mille), |policy| {
            consent(policy);
            policy.memory_limit_bytes = Some(GIB);
        });
        assert_eq!(plan.memory, MemoryKind::Mapped);
        assert!(rejection(&plan, "memory", "owned").contains("limit that was set leaves 1 GiB"));
    }
}

#[test]
fn populating_what_is_in_memory_takes_a_worker_per_cpu() {
    for (per_mille, cpus, workers) in [(1000, 1, 1), (1000, 2, 2), (1000, 64, 16), (0, 2, 8)] {
        let mut platform = resident(per_mille);
        platform.cpus = cpus;
        let plan = with(&one_shard(), &platform, |policy| {
            policy.memory = MemoryChoice::Mapped;
            consent(policy);
        });
        assert_eq!(plan.params.workers, workers, "{per_mille} {cpus}");
    }
}

#[test]
fn no_more_workers_or_depth_than_there_are_chunks() {
    let two = auto(&whole(SafeTensors, 1, 7 * MIB), &resident(1000));
    assert_eq!(two.params.workers, 2);
    let mut many_cpus = resident(1000);
    many_cpus.cpus = 32;
    let three = auto(&whole(SafeTensors, 1, 11 * MIB), &many_cpus);
    assert_eq!(three.params.workers, 3);
    // Twelve requests are twelve reads, although their bytes would fill ten chunks.
    let short = auto(&ranges(ServerlessLlm, 8, 12, 12 * 100_000), &many_cpus);
    assert_eq!(
        (short.params.chunk_bytes, short.params.workers),
        (128 << 10, 12)
    );
    let nothing = auto(&whole(SafeTensors, 1, 0), &many_cpus);
    assert_eq!(nothing.params.workers, 1);
    let rings = with(&whole(SafeTensors, 1, 6 * MIB), &platform(2), |policy| {
        policy.backend = BackendChoice::Named(IoUring);
    });
    assert_eq!((rings.params.workers, rings.params.queue_depth), (2, 2));
}

#[test]
fn chunks_are_no_longer_than_requests_can_fill() {
    let short = auto(&ranges(ServerlessLlm, 8, 100, 100 * 100_000), &platform(2));
    assert_eq!(short.params.chunk_bytes, 128 << 10);
    // Rounded outwards to blocks, a request of exactly 128 KiB touches one block more.
    let exact = auto(&ranges(ServerlessLlm, 8, 100, 100 * 131_072), &platform(2));
    assert_eq!(exact.params.chunk_bytes, 256 << 10);
    let tiny = auto(&ranges(ServerlessLlm, 8, 100, 100), &platform(2));
    assert_eq!(tiny.params.chunk_bytes, TransferParams::MIN_CHUNK_BYTES);
}

#[test]
fn overrides_are_taken_as_they_are_and_shape_the_rest() {
    let plan = with(&five_shards(), &platform(2), |policy| {
        policy.chunk_bytes = Some(8 * MIB);
    });
    // 64 MiB in flight at most.
    assert_eq!((plan.params.workers, plan.params.queue_depth), (2, 4));
    let plan = with(&five_shards(), &platform(2), |policy| {
        policy.workers = Some(8);
    });
    assert_eq!((plan.params.workers, plan.params.queue_depth), (8, 4));
    assert_eq!(
        rejection(&plan, "workers", "2").split('.').next(),
        Some("another value was set")
    );
    let plan = with(&five_shards(), &platform(2), |policy| {
        policy.backend = BackendChoice::Named(Sync);
        policy.queue_depth = Some(64);
        policy.workers = Some(200);
    });
    assert_eq!((plan.params.workers, plan.params.queue_depth), (200, 1));
    assert!(rejection(&plan, "queue_depth", "64").contains("no effect"));
    let plan = with(&five_shards(), &platform(2), |policy| {
        policy.backend = BackendChoice::Named(Sync);
        policy.chunk_bytes = Some(TransferParams::MAX_CHUNK_BYTES);
    });
    assert_eq!(plan.params.workers, 1);
}

/// A machine that leaves `available_bytes` and has `resident_bytes` of the five shards in the page cache.
fn cached(resident_bytes: u64, available_bytes: u64) -> Platform {
    let mut platform = stored(|storage| {
        storage.file_bytes = five_shards().read_bytes;
        storage.resident_bytes = Some(resident_bytes);
    });
    platform.memory.available_bytes = Some(available_bytes);
    platform
}

fn refuse_direct(platform: &mut Platform) {
    if let Some(storage) = &mut platform.storage {
        storage.direct = DirectSupport::Unsupported {
            reason: "for this test".to_owned(),
        };
    }
}

#[test]
fn a_page_cache_that_the_tensors_would_crowd_out_is_copied_and_dropped() {
    let all = five_shards().read_bytes;
    let crowded = auto(&five_shards(), &cached(all, 24 * GIB));
    // It is still a copy; what the kernel drops meanwhile is read directly.
    assert_eq!(crowded.backend, Sync);
    assert_eq!(
        (crowded.params.chunk_bytes, crowded.params.workers),
        (4 * MIB, 4)
    );
    assert_eq!(crowded.params.direct, DirectPolicy::Preferred);
    assert_eq!(
        crowded.params.resident,
        ResidentPolicy::CopyAndDrop {
            limit_bytes: 2 * all - 24 * GIB + 24 * GIB / 16
        }
    );
    // On a small machine the margin has a least size, and no more is dropped than is there.
    let small = auto(&one_shard(), &{
        let mut platform = stored(|storage| {
            storage.file_bytes = one_shard().read_bytes;
            storage.resident_bytes = Some(one_shard().read_bytes);
        });
        platform.memory.available_bytes = Some(2 * GIB);
        platform
    });
    assert_eq!(
        small.params.resident,
        ResidentPolicy::CopyAndDrop {
            limit_bytes: one_shard().read_bytes
        }
    );
    let roomy = auto(&five_shards(), &cached(all, 32 * GIB));
    assert_eq!(roomy.backend, Sync);
    assert_eq!(roomy.params.direct, DirectPolicy::Never);
    assert_eq!(roomy.params.resident, ResidentPolicy::Copy);
    // Mapped, they are one and the same.
    let mapped = with(&five_shards(), &cached(all, 24 * GIB), consent);
    assert_eq!(mapped.memory, MemoryKind::Mapped);
}

#[test]
fn a_half_cached_checkpoint_can_be_crowded_too() {
    let half = five_shards().read_bytes / 2;
    let platform = cached(half, 20 * GIB);
    let plan = auto(&five_shards(), &platform);
    assert_eq!(plan.backend, Sync);
    assert_eq!(plan.params.direct, DirectPolicy::Preferred);
    assert_eq!(
        plan.params.resident,
        ResidentPolicy::CopyAndDrop {
            limit_bytes: five_shards().read_bytes + half - 20 * GIB + 20 * GIB / 16
        }
    );
}

#[test]
fn buffered_reads_of_a_crowded_cache_drop_what_they_add_to_it_too() {
    let (all, half) = (five_shards().read_bytes, five_shards().read_bytes / 2);
    let mut platform = cached(half, 20 * GIB);
    refuse_direct(&mut platform);
    let plan = auto(&five_shards(), &platform);
    assert_eq!(plan.params.direct, DirectPolicy::Never);
    assert_eq!(
        plan.params.resident,
        ResidentPolicy::CopyAndDrop {
            limit_bytes: 2 * all - 20 * GIB + 20 * GIB / 16
        }
    );
    // So do those of a server.
    let mut served = cached(all, 24 * GIB);
    if let Some(storage) = &mut served.storage {
        storage.class = FileSystemClass::Network;
    }
    let plan = auto(&five_shards(), &served);
    assert!(matches!(
        plan.params.resident,
        ResidentPolicy::CopyAndDrop { .. }
    ));
}

#[test]
fn nothing_is_dropped_from_a_file_system_in_memory() {
    let mut platform = cached(five_shards().read_bytes, 24 * GIB);
    if let Some(storage) = &mut platform.storage {
        storage.class = FileSystemClass::Memory;
    }
    let plan = auto(&five_shards(), &platform);
    assert_eq!(plan.params.resident, ResidentPolicy::Copy);
}

#[test]
fn keeping_reads_through_the_page_cache_or_maps_it() {
    let keep = |policy: &mut Policy| policy.cache = CacheChoice::Keep;
    for per_mille in [0, 500, 1000] {
        for workload in [one_shard(), five_shards()] {
            let mut roomy = resident(per_mille);
            roomy.memory.available_bytes = Some(64 * GIB);
            let read = with(&workload, &roomy, keep);
            assert_eq!(read.memory, MemoryKind::Owned);
            assert_eq!(read.params.direct, DirectPolicy::Never);
            assert_eq!(read.params.resident, ResidentPolicy::Copy);
            assert!(!says_what_leaves(&read));
            let mapped = with(&workload, &roomy, |policy| {
                keep(policy);
                consent(policy);
            });
            assert_eq!(mapped.memory, MemoryKind::Mapped);
        }
    }
    let cold = with(&five_shards(), &platform(2), keep);
    assert!(rejection(&cold, "direct", "preferred").contains("leaves nothing in the page cache"));
    // A server's files are not mapped for it.
    let served = with(&one_shard(), &on_nfs(), |policy| {
        keep(policy);
        consent(policy);
    });
    assert_eq!(served.memory, MemoryKind::Owned);
}

/// Whether the plan warns that the files will not stay in the page cache.
fn says_what_leaves(plan: &Plan) -> bool {
    plan.decisions
        .iter()
        .any(|decision| decision.reason.contains("Not all of them will stay there"))
}

#[test]
fn keeping_says_what_will_not_stay() {
    let keep = |policy: &mut Policy| policy.cache = CacheChoice::Keep;
    let plan = with(&five_shards(), &platform(2), keep);
    assert!(says_what_leaves(&plan), "{plan}");
    // What a crowded cache holds is not dropped on purpose.
    let crowded = with(
        &five_shards(),
        &cached(five_shards().read_bytes, 24 * GIB),
        keep,
    );
    assert_eq!(crowded.params.direct, DirectPolicy::Never);
    assert_eq!(crowded.params.resident, ResidentPolicy::Copy);
    assert!(rejection(&crowded, "resident", "copy-and-drop").contains("shall stay"));
    // Mapped, tensors and files are the same memory.
    let mapped = with(&five_shards(), &platform(2), |policy| {
        keep(policy);
        consent(policy);
    });
    assert!(!says_what_leaves(&mapped));
    let mut small = platform(2);
    small.memory.available_bytes = Some(8 * GIB);
    let mapped = with(&five_shards(), &small, |policy| {
        keep(policy);
        consent(policy);
    });
    assert!(says_what_leaves(&mapped));
}

#[test]
fn bypassing_reads_directly_and_copies_what_is_there() {
    let bypass = |policy: &mut Policy| policy.cache = CacheChoice::Bypass;
    for (per_mille, resident_policy) in [
        (0, ResidentPolicy::Reread),
        (500, ResidentPolicy::Copy),
        (1000, ResidentPolicy::Copy),
    ] {
        let plan = with(&one_shard(), &resident(per_mille), |policy| {
            bypass(policy);
            consent(policy);
        });
        assert_eq!(plan.memory, MemoryKind::Owned);
        assert_eq!(plan.params.direct, DirectPolicy::Preferred);
        assert_eq!(plan.params.resident, resident_policy);
        assert!(rejection(&plan, "memory", "mapped").contains("is to be bypassed"));
    }
    // What is missing from the page cache may need scratch, so that a copy is bounded as direct reads are.
    let mut many_cpus = resident(1000);
    many_cpus.cpus = 64;
    let long = |policy: &mut Policy| policy.chunk_bytes = Some(8 * MIB);
    let plan = with(&five_shards(), &many_cpus, |policy| {
        bypass(policy);
        long(policy);
    });
    assert_eq!(plan.params.workers, 8);
    assert_eq!(with(&one_shard(), &many_cpus, long).params.workers, 16);
    // Also where it does not pay.
    let tiny = with(&whole(SafeTensors, 1, MIB), &platform(2), bypass);
    assert_eq!(tiny.params.direct, DirectPolicy::Preferred);
    let mut served = on_nfs();
    served.storage = served.storage.map(|mut storage| {
        storage.class = FileSystemClass::Fuse;
        storage
    });
    assert!(with(&one_shard(), &served, bypass).reads_direct());
    // Where nobody looked, it has to work or fail.
    let mut unknown = platform(2);
    unknown.storage = None;
    assert_eq!(
        with(&one_shard(), &unknown, bypass).params.direct,
        DirectPolicy::Required
    );
    // Files in memory have no second copy to bypass.
    let copied = with(&one_shard(), &on_tmpfs(), bypass);
    assert_eq!(copied.params.direct, DirectPolicy::Never);
    let mapped = with(&one_shard(), &on_tmpfs(), |policy| {
        bypass(policy);
        consent(policy);
    });
    assert_eq!(mapped.memory, MemoryKind::Mapped);
}
