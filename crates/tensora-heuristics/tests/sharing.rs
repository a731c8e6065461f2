//! What ranks that load together read through.

mod common;

use common::{GIB, five_shards, on_nfs, on_tmpfs, one_shard, platform, resident, stored};
use tensora_heuristics::{
    BackendChoice, CacheChoice, DirectChoice, MappingConsent, MemoryKind, Plan, PlanError, Policy,
    SharedBy, SharedWorkload, Workload, plan,
};
use tensora_io::{
    BackendKind, DirectPolicy, DirectSupport, FileSystemClass, Platform, ResidentPolicy,
};

fn on_linux(mut platform: Platform) -> Platform {
    platform.os = "linux".to_owned();
    platform
}

fn on_macos(mut platform: Platform) -> Platform {
    platform.os = "macos".to_owned();
    platform
}

/// A quarter of one shard for each of four ranks, and `shared_bytes` that several of them need.
fn quarter(shared_bytes: u64) -> Workload {
    let mut workload = one_shard();
    workload.destination_bytes /= 4;
    workload.shared = Some(SharedWorkload::new(4, shared_bytes, GIB));
    workload
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

/// What the decision says, and what it says of the other.
#[track_caller]
fn decision(plan: &Plan) -> (&str, &str) {
    let decision = plan
        .decisions
        .iter()
        .find(|decision| decision.field == "sharing")
        .expect("it was decided");
    let chosen = plan.sharing.expect("it was decided");
    assert_eq!(decision.chosen, chosen.to_string());
    let [rejected] = &decision.rejected[..] else {
        panic!("{decision:?}");
    };
    assert_ne!(rejected.choice, decision.chosen);
    (&decision.reason, &rejected.reason)
}

#[test]
fn what_ranks_share_depends_on_the_place() {
    let unread = stored(|storage| {
        storage.direct = DirectSupport::Unsupported {
            reason: "EINVAL".to_owned(),
        };
    });
    let mut unknown = platform(2);
    unknown.storage = None;
    let table = [
        (
            platform(2),
            SharedBy::Memory,
            "a part of the device's speed",
        ),
        (
            resident(500),
            SharedBy::Memory,
            "a part of the device's speed",
        ),
        (unread, SharedBy::Memory, "a part of the device's speed"),
        (unknown, SharedBy::Memory, "a part of the device's speed"),
        (
            on_nfs(),
            SharedBy::Memory,
            "ask the server for the same bytes",
        ),
        (
            resident(1000),
            SharedBy::PageCache,
            "a copy of what all can copy from",
        ),
        (
            on_tmpfs(),
            SharedBy::PageCache,
            "a copy of what all can copy from",
        ),
    ];
    for (platform, by, against) in table {
        let plan = auto(&quarter(GIB), &on_linux(platform));
        assert_eq!(plan.sharing, Some(by), "{against}");
        assert_eq!(plan.memory, MemoryKind::Owned);
        let (reason, rejected) = decision(&plan);
        assert!(reason.starts_with("4 ranks load together, and two or more of them need 1 GiB."));
        assert!(rejected.contains(against), "{rejected}");
        // What goes through windows of shared memory has room for them.
        assert_eq!(plan.window_limit_bytes > 0, by == SharedBy::Memory);
        if by == SharedBy::PageCache {
            assert_eq!(plan.params.direct, DirectPolicy::Never);
        }
    }
}

#[test]
fn what_is_missing_from_a_shared_cache_is_not_added_to_it_unasked() {
    let plan = with(&quarter(GIB), &on_linux(resident(990)), |policy| {
        policy.cache = CacheChoice::Bypass;
    });
    assert_eq!(plan.sharing, Some(SharedBy::PageCache));
    assert!(plan.reads_direct());
    assert_eq!(plan.params.resident, ResidentPolicy::Copy);
}

#[test]
fn nothing_to_share_is_no_decision() {
    let mut alone = quarter(GIB);
    alone.shared = Some(SharedWorkload::new(1, GIB, GIB));
    for workload in [one_shard(), quarter(0), alone] {
        let plan = auto(&workload, &on_linux(platform(2)));
        assert_eq!(plan.sharing, None);
        assert!(plan.decisions.iter().all(|d| d.field != "sharing"));
        assert_eq!(plan.window_limit_bytes, 0);
        assert!(plan.reads_direct());
    }
}

#[test]
fn a_cache_that_the_tensors_of_all_ranks_would_crowd_out_is_not_relied_upon() {
    let mut workload = five_shards();
    workload.shared = Some(SharedWorkload::new(2, GIB, GIB));
    let mut crowded = stored(|storage| {
        storage.file_bytes = five_shards().read_bytes;
        storage.resident_bytes = Some(five_shards().read_bytes);
    });
    let plan = auto(&workload, &on_linux(crowded.clone()));
    assert_eq!(plan.sharing, Some(SharedBy::Memory));
    assert!(decision(&plan).1.contains("would drop from it"));
    crowded.memory.available_bytes = Some(64 * GIB);
    let plan = auto(&workload, &on_linux(crowded));
    assert_eq!(plan.sharing, Some(SharedBy::PageCache));
}

#[test]
fn ranks_map_one_copy_where_that_is_allowed_and_fits() {
    for per_mille in [0, 500, 1000] {
        let plan = with(&quarter(GIB), &on_linux(resident(per_mille)), consent);
        assert_eq!(plan.memory, MemoryKind::Mapped, "{per_mille}");
        assert_eq!(plan.sharing, Some(SharedBy::PageCache));
        assert!(decision(&plan).1.contains("use in place"));
        assert_eq!(plan.window_limit_bytes, 0);
    }
    let rejection = |plan: &Plan| {
        let memory = &plan.decisions[0];
        assert_eq!((memory.field, &*memory.chosen), ("memory", "owned"));
        memory.rejected[0].reason.clone()
    };
    // All that they load has to stay in the page cache, not the part of one of them only.
    let mut tight = on_linux(platform(2));
    tight.memory.available_bytes = Some(2 * GIB - 1);
    let plan = with(&quarter(GIB), &tight, consent);
    assert_eq!(plan.sharing, Some(SharedBy::Memory));
    assert!(rejection(&plan).contains("4 ranks load together takes 2 GiB of the page cache"));
    tight.memory.available_bytes = Some(2 * GIB);
    assert_eq!(
        with(&quarter(GIB), &tight, consent).memory,
        MemoryKind::Mapped
    );
    tight.memory.available_bytes = None;
    assert!(rejection(&with(&quarter(GIB), &tight, consent)).contains("is not known"));
    // A server's files are not mapped for it.
    let served = with(&quarter(GIB), &on_linux(on_nfs()), consent);
    assert_eq!(
        (served.memory, served.sharing),
        (MemoryKind::Owned, Some(SharedBy::Memory))
    );
}

#[test]
fn elsewhere_ranks_share_the_page_cache_or_nothing() {
    for platform in [
        platform(2),
        resident(500),
        resident(1000),
        on_nfs(),
        on_tmpfs(),
    ] {
        let plan = auto(&quarter(GIB), &on_macos(platform));
        assert_eq!(plan.sharing, Some(SharedBy::PageCache));
        assert_eq!(plan.params.direct, DirectPolicy::Never);
        assert_eq!(plan.window_limit_bytes, 0);
        let (reason, rejected) = decision(&plan);
        assert!(
            reason.contains("On macos they have nothing else in common"),
            "{reason}"
        );
        assert_eq!(rejected, "it needs Linux, and this is macos");
    }
    type Change = fn(&mut Policy);
    let around: [Change; 3] = [
        |policy| policy.cache = CacheChoice::Bypass,
        |policy| policy.direct = DirectChoice::Policy(DirectPolicy::Required),
        |policy| policy.direct = DirectChoice::Policy(DirectPolicy::Preferred),
    ];
    for change in around {
        let mut policy = Policy::default();
        change(&mut policy);
        let refused = plan(&quarter(GIB), &on_macos(platform(2)), &policy);
        let expected = PlanError::SharingNeedsPageCache {
            os: "macos".to_owned(),
        };
        assert_eq!(refused, Err(expected));
        // Without anything to share, or with something else to share through, that is no matter.
        assert!(plan(&quarter(0), &on_macos(platform(2)), &policy).is_ok());
        let plan = plan(&quarter(GIB), &on_linux(platform(2)), &policy).expect("there is a plan");
        assert_eq!(plan.sharing, Some(SharedBy::Memory));
        assert!(plan.reads_direct());
    }
    // Where direct reads do not work, preferring them keeps nobody out of the page cache.
    let mut buffered = on_macos(on_tmpfs());
    if let Some(storage) = &mut buffered.storage {
        storage.class = FileSystemClass::Local;
        storage.direct = DirectSupport::Unsupported {
            reason: "EINVAL".to_owned(),
        };
    }
    let plan = with(&quarter(GIB), &buffered, |policy| {
        policy.direct = DirectChoice::Policy(DirectPolicy::Preferred);
    });
    assert!(!plan.reads_direct());
    assert_eq!(plan.sharing, Some(SharedBy::PageCache));
}

#[test]
fn sharing_leaves_wishes_alone() {
    for kind in BackendKind::ALL {
        let plan = with(&quarter(GIB), &on_linux(platform(2)), |policy| {
            policy.backend = BackendChoice::Named(kind);
        });
        assert_eq!((plan.backend, plan.sharing), (kind, Some(SharedBy::Memory)));
    }
    let kept = with(&quarter(GIB), &on_linux(platform(2)), |policy| {
        policy.cache = CacheChoice::Keep;
    });
    assert_eq!(kept.params.direct, DirectPolicy::Never);
}
