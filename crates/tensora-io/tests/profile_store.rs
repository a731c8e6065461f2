//! Promises of the store of profiles: what was saved is found again, and nothing else is ever believed.

#![allow(clippy::unwrap_used)]

mod skip_support;

use std::fs;
use std::path::Path;

#[cfg(unix)]
use skip_support::skip;
use tempfile::TempDir;
use tensora_io::{
    BackendKind, CacheState, DirectPolicy, Error, Measurement, MemoryKind, Platform, Profile,
    ProfileFact, ProfileIdentity, ProfileStore, ResidentPolicy, StorageFacts, TransferParams,
};

fn platform() -> Platform {
    let mut platform = Platform::unknown(2, Vec::new());
    platform.kernel = Some("6.18.0".to_owned());
    let mut storage = StorageFacts::unknown();
    storage.file_system = "ext4".to_owned();
    storage.device = Some("nvme0n1".to_owned());
    storage.mount_source = Some("/dev/nvme0n1p2".to_owned());
    platform.storage = Some(storage);
    platform
}

fn profile(platform: &Platform) -> Profile {
    let measurement = Measurement {
        cache: CacheState::Cold,
        memory: MemoryKind::Owned,
        backend: BackendKind::IoUring,
        params: TransferParams {
            chunk_bytes: 1 << 20,
            queue_depth: 16,
            workers: 2,
            direct: DirectPolicy::Preferred,
            resident: ResidentPolicy::CopyAndDrop { limit_bytes: 5 },
        },
        bytes: 1 << 30,
        elapsed_us: vec![500_000, 510_000, 490_000],
    };
    Profile {
        version: Profile::VERSION,
        made_by: "0.1.0".to_owned(),
        made_at_unix_s: 1_795_000_000,
        identity: ProfileIdentity::of(platform).unwrap(),
        measurements: vec![measurement],
    }
}

fn store() -> (TempDir, ProfileStore) {
    let directory = tempfile::tempdir().unwrap();
    let store = ProfileStore::at(directory.path().join("deep").join("folder"));
    (directory, store)
}

/// Why the file that `change` made of a good one is ignored.
#[track_caller]
fn ignored(change: impl FnOnce(&Path)) -> String {
    let (_directory, store) = store();
    let platform = platform();
    let path = store.save(&profile(&platform)).unwrap();
    change(&path);
    match store.find(&platform) {
        ProfileFact::Ignored { reason } => {
            let shown = path.display().to_string();
            assert!(reason.starts_with(&shown), "{reason}");
            reason[shown.len()..].to_owned()
        }
        fact => panic!("{fact:?}"),
    }
}

/// The same, of a file whose text was replaced.
#[track_caller]
fn edited(from: &str, to: &str) -> String {
    ignored(|path| {
        let text = fs::read_to_string(path).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(path, text.replace(from, to)).unwrap();
    })
}

#[test]
fn what_was_saved_is_found() {
    let (directory, store) = store();
    let platform = platform();
    assert_eq!(store.find(&platform), ProfileFact::Absent);
    let mut profile = profile(&platform);
    let path = store.save(&profile).unwrap();
    assert_eq!(path, store.path_of(&profile.identity));
    assert!(path.starts_with(directory.path()));
    assert_eq!(
        store.find(&platform),
        ProfileFact::Matching(Box::new(profile.clone()))
    );

    // A later one takes its place, and leaves nothing beside it.
    profile.made_at_unix_s += 1;
    assert_eq!(store.save(&profile).unwrap(), path);
    assert_eq!(
        store.find(&platform),
        ProfileFact::Matching(Box::new(profile))
    );
    assert_eq!(fs::read_dir(store.folder()).unwrap().count(), 1);
}

#[test]
fn without_probed_storage_nothing_is_sought() {
    let (_directory, store) = store();
    assert_eq!(
        store.find(&Platform::unknown(2, Vec::new())),
        ProfileFact::NotSought
    );
}

#[test]
fn other_places_have_other_profiles() {
    let (_directory, store) = store();
    let here = platform();
    store.save(&profile(&here)).unwrap();
    let mut there = platform();
    there.storage.as_mut().unwrap().device = Some("sda".to_owned());
    assert_eq!(store.find(&there), ProfileFact::Absent);
}

#[test]
fn stale_profiles_are_ignored() {
    let reason = edited("6.18.0", "6.1.7");
    assert!(reason.contains("stale"), "{reason}");
    assert!(
        reason.contains("kernel \"6.1.7\" then, \"6.18.0\" now"),
        "{reason}"
    );
}

#[test]
fn foreign_profiles_are_ignored() {
    let reason = edited("\"device_model\":null", "\"device_model\":\"Other\"");
    assert!(reason.contains("foreign"), "{reason}");
    let reason = edited("\"processor\":null", "\"processor\":\"Other\"");
    assert!(reason.contains("another machine"), "{reason}");
}

#[test]
fn other_versions_are_ignored_even_if_nothing_else_is_known_of_them() {
    let reason = ignored(|path| fs::write(path, r#"{"version": 7, "new": []}"#).unwrap());
    assert!(reason.contains("version 7"), "{reason}");
    assert!(
        reason.contains(&format!("version {}", Profile::VERSION)),
        "{reason}"
    );
}

#[test]
fn what_is_no_profile_is_ignored() {
    for text in [
        "",
        "{",
        "null",
        "[]",
        "\u{0}",
        r#"{"version": "1"}"#,
        r#"{"version": 1}"#,
    ] {
        let reason = ignored(|path| fs::write(path, text).unwrap());
        assert!(reason.contains("damaged at line"), "{text:?}: {reason}");
    }
    for (from, to) in [
        ("io-uring", "telepathy"),
        ("\"bytes\":1073741824", "\"bytes\":-1"),
        ("\"cold\"", "\"\\u001b[2J\""),
    ] {
        let reason = edited(from, to);
        assert!(reason.contains("damaged at line"), "{to}: {reason}");
        assert!(!reason.contains('\u{1b}'), "{reason}");
    }
}

#[test]
fn a_file_cut_anywhere_is_ignored() {
    let (_directory, store) = store();
    let platform = platform();
    let path = store.save(&profile(&platform)).unwrap();
    let text = fs::read(&path).unwrap();
    for length in 0..text.len() {
        fs::write(&path, &text[..length]).unwrap();
        let fact = store.find(&platform);
        assert!(
            matches!(fact, ProfileFact::Ignored { .. }),
            "{length}: {fact:?}"
        );
    }
}

#[test]
fn impossible_measurements_are_ignored() {
    for (from, to, reason_part) in [
        ("\"workers\":2", "\"workers\":0", "workers = 0 is outside"),
        ("\"workers\":2", "\"workers\":100000", "workers = 100000"),
        (
            "\"chunk_bytes\":1048576",
            "\"chunk_bytes\":1",
            "chunk_bytes = 1",
        ),
        ("\"queue_depth\":16", "\"queue_depth\":0", "queue_depth = 0"),
        ("[500000,510000,490000]", "[]", "nothing was read"),
        ("[500000,510000,490000]", "[500000,0]", "took no time"),
        ("\"bytes\":1073741824", "\"bytes\":0", "nothing was read"),
    ] {
        let reason = edited(from, to);
        assert!(reason.contains("measurement 0 is impossible"), "{reason}");
        assert!(reason.contains(reason_part), "{reason}");
    }
    let reason = ignored(|path| {
        let text = fs::read_to_string(path).unwrap();
        let mut value: serde_json::Value = serde_json::from_str(&text).unwrap();
        value["measurements"] = serde_json::json!([]);
        fs::write(path, value.to_string()).unwrap();
    });
    assert!(reason.contains("no measurements"), "{reason}");
}

#[test]
fn endless_files_are_not_read_to_their_end() {
    let reason = ignored(|path| {
        let file = fs::File::create(path).unwrap();
        file.set_len(1 << 40).unwrap();
    });
    assert!(reason.contains("more than 1048576 bytes"), "{reason}");
}

#[test]
fn what_is_no_file_is_ignored() {
    let reason = ignored(|path| {
        fs::remove_file(path).unwrap();
        fs::create_dir(path).unwrap();
    });
    assert!(reason.contains("directory"), "{reason}");
}

#[test]
fn impossible_profiles_are_not_saved() {
    let (_directory, store) = store();
    let mut profile = profile(&platform());
    profile.measurements.clear();
    let error = store.save(&profile).unwrap_err().to_string();
    assert!(error.contains("no measurements"), "{error}");
    assert!(!store.folder().exists());
}

#[test]
fn a_folder_that_cannot_be_made_is_an_error_that_names_it() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    let store = ProfileStore::at(file.join("profiles"));
    let error = store.save(&profile(&platform())).unwrap_err();
    assert!(matches!(error, Error::File { .. }), "{error:?}");
    assert!(error.to_string().contains("file/profiles"), "{error}");
    // Nor does looking fail.
    let fact = store.find(&platform());
    assert!(matches!(fact, ProfileFact::Ignored { .. }), "{fact:?}");
}

#[cfg(unix)]
#[test]
fn files_that_may_not_be_read_are_ignored() {
    use std::os::unix::fs::PermissionsExt;

    let (_directory, store) = store();
    let platform = platform();
    let path = store.save(&profile(&platform)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o0)).unwrap();
    if fs::File::open(&path).is_ok() {
        return skip("files that may not be read: permissions do not bind this user");
    }
    match store.find(&platform) {
        ProfileFact::Ignored { reason } => assert!(reason.contains("cannot be opened"), "{reason}"),
        fact => panic!("{fact:?}"),
    }
    fs::set_permissions(store.folder(), fs::Permissions::from_mode(0o500)).unwrap();
    let error = store.save(&profile(&platform)).unwrap_err().to_string();
    assert!(error.contains("permission"), "{error}");
    fs::set_permissions(store.folder(), fs::Permissions::from_mode(0o700)).unwrap();
}
