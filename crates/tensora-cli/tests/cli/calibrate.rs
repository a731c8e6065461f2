use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use crate::support::{Answer, args, assert_fields, run, single, skip, sparse, tensora};

/// As much as a calibration needs, on whatever the build directory lies on: unlike `/tmp`, that is rarely in
/// memory.
fn checkpoint() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = directory.path().join("model.safetensors");
    sparse(&path, 33 << 20);
    (directory, path)
}

fn with_cache<S: AsRef<std::ffi::OsStr>>(
    cache: &Path,
    arguments: impl IntoIterator<Item = S>,
) -> Answer {
    let mut command = tensora();
    command.env("XDG_CACHE_HOME", cache).args(arguments);
    command.output().unwrap().into()
}

/// The answer, unless calibration cannot work here because nobody tells cold from warm, which is counted.
fn measured(what: &str, answer: Answer) -> Option<Answer> {
    if answer
        .stderr
        .contains("does not tell what is in the page cache")
    {
        skip(what, &answer.stderr);
        return None;
    }
    Some(answer)
}

fn status_of_profile(cache: &Path, path: &Path, options: &[&str]) -> String {
    let options = options.iter().map(std::ffi::OsString::from);
    let arguments = args!["plan", path, "--json"].into_iter().chain(options);
    let plan = with_cache(cache, arguments).json();
    let status = &plan["platform"]["profile"]["status"];
    status.as_str().unwrap().to_owned()
}

#[test]
fn what_was_measured_is_kept_and_found_by_the_next_plan() {
    let (_directory, path) = checkpoint();
    let cache = tempfile::tempdir().unwrap();
    assert_eq!(status_of_profile(cache.path(), &path, &[]), "absent");

    let arguments = args!["calibrate", &path, "--budget=1", "--json"];
    let Some(answer) = measured("a profile is kept", with_cache(cache.path(), arguments)) else {
        return;
    };
    let report = answer.json();
    assert_fields(
        &report,
        &[
            ("path", "string"),
            ("dry_run", "boolean"),
            ("elapsed_seconds", "number"),
            ("sample_bytes", "count"),
            ("timed", "count"),
            ("profile", "object"),
            ("notes", "array"),
            ("plans", "array"),
        ],
    );
    assert_eq!(report["dry_run"], false);
    let measurements = report["profile"]["measurements"].as_array().unwrap();
    assert!(!measurements.is_empty());
    for measurement in measurements {
        assert_fields(
            measurement,
            &[
                ("cache", "string"),
                ("memory", "string"),
                ("backend", "string"),
                ("params", "object"),
                ("bytes", "count"),
                ("elapsed_us", "array"),
            ],
        );
    }
    let plans = report["plans"].as_array().unwrap();
    assert_eq!(plans.len(), 6);
    for plan in plans {
        for side in ["before", "after"] {
            assert_fields(&plan[side], &[("backend", "string"), ("memory", "string")]);
        }
    }

    let stored = Path::new(report["path"].as_str().unwrap());
    assert!(stored.starts_with(cache.path()), "{}", stored.display());
    let stored: Value = serde_json::from_slice(&fs::read(stored).unwrap()).unwrap();
    assert_eq!(stored, report["profile"]);
    assert_eq!(status_of_profile(cache.path(), &path, &[]), "matching");
    let ignoring = ["--no-profile"];
    assert_eq!(
        status_of_profile(cache.path(), &path, &ignoring),
        "not-sought"
    );
    let doctor = with_cache(cache.path(), args!["doctor", &path]).text();
    assert!(doctor.contains("measurements of this machine"), "{doctor}");
    let elsewhere = tempfile::tempdir().unwrap();
    assert_eq!(status_of_profile(elsewhere.path(), &path, &[]), "absent");
}

#[test]
fn a_dry_run_keeps_nothing_and_needs_no_place_for_it() {
    let (_directory, path) = checkpoint();
    let nowhere = path.join("cache");
    let arguments = args!["calibrate", &path, "--budget=1", "--dry-run"];
    let Some(answer) = measured("a dry run", with_cache(&nowhere, arguments)) else {
        return;
    };
    let text = answer.text();
    for words in [
        "no profile was kept",
        "cache",
        "workers",
        "planned without the profile",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
}

#[test]
fn whether_a_profile_can_be_kept_is_known_before_measuring() {
    let (_directory, path) = checkpoint();
    let error = with_cache(&path.join("cache"), args!["calibrate", &path]).failure(1);
    for words in ["profiles cannot be kept in", "XDG_CACHE_HOME", "--dry-run"] {
        assert!(error.contains(words), "{words}: {error}");
    }
    let mut homeless = tensora();
    homeless
        .env_remove("HOME")
        .env("XDG_CACHE_HOME", "relative");
    let answer: Answer = homeless
        .args(args!["calibrate", &path])
        .output()
        .unwrap()
        .into();
    let error = answer.failure(1);
    assert!(error.contains("set HOME or XDG_CACHE_HOME"), "{error}");
}

#[test]
fn memory_that_keeps_everything_is_measured_warm_only() {
    const WHAT: &str = "calibration in memory";
    let Ok(directory) = tempfile::tempdir_in("/dev/shm") else {
        return skip(WHAT, "no /dev/shm");
    };
    let path = directory.path().join("model.safetensors");
    sparse(&path, 33 << 20);
    // Holes would be in nobody's memory.
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, bytes).unwrap();
    let arguments = args!["calibrate", &path, "--budget=1", "--dry-run", "--json"];
    let Some(answer) = measured(WHAT, run(arguments)) else {
        return;
    };
    let report = answer.json();
    let notes = report["notes"].to_string();
    if !notes.contains("cold reads were not measured") {
        return skip(WHAT, "what is in /dev/shm can be evicted here");
    }
    let measurements = report["profile"]["measurements"].as_array().unwrap();
    assert!(!measurements.is_empty());
    for measurement in measurements {
        assert_eq!(measurement["cache"], "warm", "{measurement}");
    }
}

#[test]
fn what_cannot_be_measured_fails_with_a_remedy() {
    let directory = tempfile::tempdir().unwrap();
    let absent = directory.path().join("absent");
    let error = run(args!["calibrate", absent, "--dry-run"]).failure(1);
    assert!(error.contains("no such file"), "{error}");
    let (_directory, small) = single();
    let error = run(args!["calibrate", small, "--dry-run", "--json"]).failure(1);
    assert!(error.contains("a larger checkpoint"), "{error}");
    for budget in ["0", "3601", "1.5", "-1"] {
        let option = format!("--budget={budget}");
        run(args!["calibrate", small, option]).failure(2);
    }
}
