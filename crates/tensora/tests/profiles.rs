//! Promises about measured profiles: the one of the checkpoint's place reaches the planner, unless that is not
//! wanted.
#![allow(clippy::unwrap_used)]

mod common;

use tensora::io::{
    CacheState, DirectPolicy, Measurement, Platform, Profile, ProfileFact, ProfileIdentity,
    ProfileStore, ResidentPolicy, TransferParams,
};
use tensora::{BackendKind, Loader, MemoryKind, ProfileChoice};

fn profile(platform: &Platform) -> Profile {
    let measurement = Measurement {
        cache: CacheState::Cold,
        memory: MemoryKind::Owned,
        backend: BackendKind::Sync,
        params: TransferParams {
            chunk_bytes: 1 << 20,
            queue_depth: 1,
            workers: 3,
            direct: DirectPolicy::Never,
            resident: ResidentPolicy::Reread,
        },
        bytes: 1 << 30,
        elapsed_us: vec![400_000],
    };
    Profile {
        version: Profile::VERSION,
        made_by: "0.1.0".to_owned(),
        made_at_unix_s: 1_795_000_000,
        identity: ProfileIdentity::of(platform).unwrap(),
        measurements: vec![measurement],
    }
}

#[test]
fn the_profile_of_the_place_reaches_the_planner() {
    let directory = tempfile::tempdir().unwrap();
    common::write(&common::expected(), common::LAYOUTS[1], directory.path());
    let store = ProfileStore::at(directory.path().join("profiles"));
    let loader = Loader::new().profiles(ProfileChoice::Store(store.clone()));
    let before = loader.plan(directory.path()).unwrap();
    assert_eq!(before.platform.profile, ProfileFact::Absent);

    let mut made = profile(&before.platform);
    store.save(&made).unwrap();
    let plan = loader.plan(directory.path()).unwrap();
    assert_eq!(
        plan.platform.profile,
        ProfileFact::Matching(Box::new(made.clone()))
    );
    let loaded = loader.load(directory.path()).unwrap();
    assert_eq!(loaded.report().plan.platform.profile, plan.platform.profile);
    let ignoring = loader.clone().profiles(ProfileChoice::Ignore);
    let plan = ignoring.plan(directory.path()).unwrap();
    assert_eq!(plan.platform.profile, ProfileFact::NotSought);

    // One of another machine is not believed, and does not keep anything from being loaded.
    made.identity.cpus += 1;
    store.save(&made).unwrap();
    let loaded = loader.load(directory.path()).unwrap();
    match &loaded.report().plan.platform.profile {
        ProfileFact::Ignored { reason } => assert!(reason.contains("CPUs"), "{reason}"),
        fact => panic!("{fact:?}"),
    }
}
