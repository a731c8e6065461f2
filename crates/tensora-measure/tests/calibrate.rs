//! Promises of a calibration: every way of reading that works here is in the profile, with times that were
//! measured, and what is not there is accounted for.

#![allow(clippy::unwrap_used, clippy::print_stderr)]

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::time::Duration;

use tempfile::TempDir;
use tensora_io::{
    Availability, BackendKind, CacheState, CancelToken, Control, DirectPolicy, Measurement,
    MemoryKind, Platform, Profile, ProfileIdentity, ResidentPolicy, SourceFile, StorageFacts,
    TransferParams,
};
use tensora_measure::{CalibrateOptions, Calibration, Error, ReadSetting, calibrate};

const FILE_BYTES: usize = 24 << 20;

/// Two files on whatever the build directory lies on: unlike `/tmp`, that is rarely in memory.
fn files() -> (TempDir, Vec<SourceFile>) {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let files = ["first", "second"].map(|name| {
        let path = directory.path().join(name);
        let mut file = File::create(&path).unwrap();
        file.write_all(&vec![0xA5; FILE_BYTES]).unwrap();
        file.write_all(b"ragged").unwrap();
        file.sync_all().unwrap();
        SourceFile::open(path).unwrap()
    });
    (directory, files.into())
}

/// A calibration in about this time, and at least in what it must take; nothing, which is counted, where
/// nobody tells cold from warm.
fn calibrated(files: &[SourceFile], options: &CalibrateOptions) -> Option<Calibration> {
    match calibrate(files, options, &Control::new(), &mut |_| {}) {
        Err(error @ Error::ResidencyUnknown { .. }) => {
            skip(&format!("calibration: {error}"));
            None
        }
        answer => Some(answer.unwrap()),
    }
}

fn lasting(budget: Duration) -> CalibrateOptions {
    let mut options = CalibrateOptions::default();
    options.budget = budget;
    options
}

fn skip(what: &str) {
    eprintln!("SKIP: {what}");
    if let Some(log) = std::env::var_os("TENSORA_SKIP_LOG") {
        let mut log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)
            .unwrap();
        writeln!(log, "SKIP: {what}").unwrap();
    }
}

/// Backends that were measured in a state, and whether directly.
fn ways(calibration: &Calibration, cache: CacheState) -> BTreeSet<(BackendKind, bool)> {
    let measurements = calibration.profile.measurements.iter();
    measurements
        .filter(|measurement| measurement.cache == cache)
        .map(|measurement| {
            let is_direct = measurement.params.direct != DirectPolicy::Never;
            (measurement.backend, is_direct)
        })
        .collect()
}

#[test]
fn what_works_here_is_measured_and_what_does_not_is_noted() {
    let (_directory, files) = files();
    let Some(calibration) = calibrated(&files, &lasting(Duration::from_millis(200))) else {
        return;
    };
    let is_noted = |words: &str| calibration.notes.iter().any(|note| note.contains(words));
    assert_eq!(calibration.sample_bytes, 2 * (FILE_BYTES as u64 + 6));

    let profile = &calibration.profile;
    let mut platform = Platform::probe();
    platform.storage = Some(StorageFacts::probe(&files.iter().collect::<Vec<_>>()));
    let identity = ProfileIdentity::of(&platform);
    assert_eq!(Some(&profile.identity), identity.as_ref());
    assert_eq!(profile.version, Profile::VERSION);
    assert!(profile.made_at_unix_s > 1_700_000_000);
    for measurement in &profile.measurements {
        measurement.params.validate().unwrap();
        assert_eq!(measurement.bytes, calibration.sample_bytes);
        assert!(!measurement.elapsed_us.is_empty() && !measurement.elapsed_us.contains(&0));
        assert_eq!(measurement.memory, MemoryKind::Owned);
    }
    assert!(is_noted("mapped memory was not measured"));

    let is_direct = platform
        .storage
        .is_some_and(|storage| storage.direct.is_supported());
    assert_ne!(is_direct, is_noted("direct reads were not measured"));
    let is_evictable = !is_noted("cold reads were not measured");
    let cold = ways(&calibration, CacheState::Cold);
    let warm = ways(&calibration, CacheState::Warm);
    for fact in platform.backends {
        let kind = fact.kind;
        let works = fact.availability == Availability::Available;
        assert_ne!(works, is_noted(&format!("{kind} was not measured")));
        assert_eq!(warm.contains(&(kind, false)), works, "{kind}");
        assert_eq!(
            cold.contains(&(kind, false)),
            works && is_evictable,
            "{kind}"
        );
        if kind != BackendKind::Mmap && is_direct {
            let half = ways(&calibration, CacheState::Half);
            assert_eq!(
                half.contains(&(kind, true)),
                works && is_evictable,
                "{kind}"
            );
        }
        let reads_direct = works && is_evictable && is_direct && kind != BackendKind::Mmap;
        assert_eq!(cold.contains(&(kind, true)), reads_direct, "{kind}");
        assert!(!warm.contains(&(kind, true)), "{kind}");
    }
}

#[test]
fn each_read_is_announced_and_time_is_used_for_more_rounds() {
    let (_directory, files) = files();
    // On a busy machine one round may take seconds.
    let budgets = [4, 16, 64].map(Duration::from_secs);
    for budget in budgets {
        let mut announced = 0;
        let options = lasting(budget);
        let answer = calibrate(&files, &options, &Control::new(), &mut |progress| {
            assert_eq!(progress.timed, announced);
            assert_eq!(progress.budget, options.budget);
            progress.setting.params.validate().unwrap();
            announced += 1;
        });
        if let Err(error @ Error::ResidencyUnknown { .. }) = answer {
            return skip(&format!("rounds of a calibration: {error}"));
        }
        let calibration = answer.unwrap();
        assert_eq!(calibration.timed, announced);
        let measurements = calibration.profile.measurements.iter();
        let rounds = measurements.map(|measurement| measurement.elapsed_us.len());
        if rounds.max() > Some(1) {
            return;
        }
    }
    panic!("one round only, with a budget of {budgets:?}");
}

#[test]
fn the_sample_is_no_larger_than_asked_for() {
    let (_directory, files) = files();
    let mut options = lasting(Duration::from_millis(1));
    options.sample_bytes = Some(36 << 20);
    if let Some(calibration) = calibrated(&files, &options) {
        assert!(calibration.sample_bytes <= 38 << 20, "{calibration:?}");
    }
}

#[test]
fn what_shall_be_measured_in_any_case_is_in_the_profile() {
    let (_directory, files) = files();
    let mut options = lasting(Duration::from_millis(200));
    // Nobody would try that twice.
    let slow = ReadSetting {
        cache: CacheState::Warm,
        memory: MemoryKind::Owned,
        backend: BackendKind::Sync,
        params: TransferParams {
            chunk_bytes: 4 << 10,
            queue_depth: 1,
            workers: 1,
            direct: DirectPolicy::Never,
            resident: ResidentPolicy::Reread,
        },
    };
    options.always = vec![slow];
    let Some(calibration) = calibrated(&files, &options) else {
        return;
    };
    let is_kept = calibration.profile.measurements.iter().any(|measurement| {
        let Measurement {
            cache,
            memory,
            backend,
            params,
            ..
        } = *measurement;
        let setting = ReadSetting {
            cache,
            memory,
            backend,
            params,
        };
        setting == slow
    });
    assert!(is_kept, "{calibration:?}");
}

#[test]
fn little_is_too_little() {
    let (_directory, mut files) = files();
    files.pop();
    let options = CalibrateOptions::default();
    let error = calibrate(&files, &options, &Control::new(), &mut |_| {}).unwrap_err();
    assert!(matches!(error, Error::SampleTooSmall { .. }), "{error:?}");
    assert!(error.to_string().contains("larger checkpoint"), "{error}");
}

#[test]
fn a_calibration_can_be_stopped() {
    let (_directory, files) = files();
    let token = CancelToken::new();
    let control = Control::new().with_cancel(token.clone());
    let mut announced = 0;
    let options = CalibrateOptions::default();
    let result = calibrate(&files, &options, &control, &mut |_| {
        announced += 1;
        token.cancel();
    });
    match result.unwrap_err() {
        Error::Io(error) => assert!(error.is_cancelled() && announced == 1, "{announced}"),
        error @ Error::ResidencyUnknown { .. } => skip(&format!("stopping: {error}")),
        error => panic!("{error:?}"),
    }
}
