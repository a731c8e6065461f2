use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::Path;

use tensora::BackendKind;

use crate::support::{
    TENSOR_COUNT, args, assert_fields, available, data_bytes, run, sharded, single, strided,
};

const FIELDS: &[(&str, &str)] = &[
    ("format", "string"),
    ("backend", "string"),
    ("memory", "string"),
    ("tensor_count", "count"),
    ("data_bytes", "count"),
    ("elapsed_seconds", "number"),
    ("open_seconds", "number"),
    ("plan_seconds", "number"),
    ("read_seconds", "number"),
    ("bytes_per_second", "number"),
    ("notes", "array"),
    ("plan", "object"),
    ("stats", "object"),
];

/// The digest that a load with these options gives, and how the tensors were loaded.
#[track_caller]
fn digest(path: &Path, options: &[&str]) -> (String, String) {
    let options = options.iter().map(OsString::from);
    let load = run(args!["load", path, "--digest", "--json"]
        .into_iter()
        .chain(options))
    .json();
    let digest = load["digest"].as_str().unwrap().to_owned();
    assert_eq!(digest.len(), 64, "{digest}");
    let how = format!("{} {}", load["backend"], load["memory"]).replace('"', "");
    (digest, how)
}

#[test]
fn json_has_every_field_of_the_contract() {
    let directory = sharded();
    let load = run(args!["load", directory.path(), "--json"]).json();
    assert_fields(&load, FIELDS);
    assert_eq!(load["format"], "safetensors");
    assert_eq!(load["tensor_count"], TENSOR_COUNT);
    assert_eq!(load["data_bytes"], data_bytes());
    assert_eq!(load["plan"]["backend"], load["backend"]);
    assert_eq!(load["plan"]["memory"], load["memory"]);
    assert_eq!(load.get("digest"), None);
    // A system that does not tell answers null.
    let peak = &load["peak_resident_bytes"];
    assert!(load.get("peak_resident_bytes").is_some(), "{load}");
    assert!(
        peak.is_null() || peak.as_u64() > Some(data_bytes()),
        "{load}"
    );
    let seconds = |name: &str| load[name].as_f64().unwrap();
    let parts = seconds("open_seconds") + seconds("plan_seconds") + seconds("read_seconds");
    assert!((seconds("elapsed_seconds") - parts).abs() < 1e-6, "{load}");

    let load = run(args!["load", directory.path(), "--json", "--digest"]).json();
    assert_fields(&load, FIELDS);
    assert_fields(&load, &[("digest", "string"), ("digest_seconds", "number")]);
}

#[test]
fn every_backend_and_memory_loads_the_same() {
    let (_directory, single) = single();
    let sharded = sharded();
    let mut digests = BTreeSet::new();
    let mut hows = BTreeSet::new();
    let mut expected = BTreeSet::new();
    let mut load = |options: &[&str], how: &str| {
        for path in [single.as_path(), sharded.path()] {
            let (digest, found) = digest(path, options);
            digests.insert(digest);
            hows.insert(found);
        }
        expected.insert(how.to_owned());
    };
    for kind in BackendKind::ALL {
        if available(kind, "every_backend_and_memory_loads_the_same") {
            let name = kind.as_str();
            load(
                &["--memory=owned", "--backend", name],
                &format!("{name} owned"),
            );
        }
    }
    if available(BackendKind::Mmap, "mapped memory loads the same") {
        load(&["--memory=mapped"], "mmap mapped");
        load(&["--memory=mapped", "--backend=mmap"], "mmap mapped");
    }
    assert_eq!(hows, expected);
    assert_eq!(digests.len(), 1, "{digests:?}");
    // What the planner chooses is one of these.
    let (chosen, _) = digest(&single, &[]);
    assert!(digests.contains(&chosen));
}

#[test]
fn the_digest_tells_content_apart() {
    let (_directory, path) = single();
    let (before, _) = digest(&path, &[]);
    let mut contents = fs::read(&path).unwrap();
    *contents.last_mut().unwrap() ^= 1;
    // A rename, so that nobody who has the file mapped sees it change.
    let changed = path.with_extension("new");
    fs::write(&changed, contents).unwrap();
    fs::rename(&changed, &path).unwrap();
    let (after, _) = digest(&path, &[]);
    assert_ne!(before, after);
    let (part, _) = digest(&path, &["--select=lm_head.*"]);
    assert_ne!(part, after);
}

#[test]
fn strided_views_are_digested_as_they_read() {
    let directory = strided();
    let (of_both, _) = digest(directory.path(), &[]);
    let (of_view, _) = digest(directory.path(), &["--select=transposed"]);
    assert_ne!(of_both, of_view);

    // The same elements in row-major order.
    let contiguous = tempfile::tempdir().unwrap();
    let index = r#"{"transposed": [0, 12, [3, 2], [2, 1], "torch.float16"]}"#;
    fs::write(contiguous.path().join("tensor_index.json"), index).unwrap();
    let data = [16, 17, 22, 23, 18, 19, 24, 25, 20, 21, 26, 27, 0, 0, 0, 0];
    fs::write(contiguous.path().join("tensor.data_0"), data).unwrap();
    assert_eq!(digest(contiguous.path(), &[]).0, of_view);
}

#[test]
fn a_selection_loads_what_it_names() {
    let directory = sharded();
    let load = run(args![
        "load",
        directory.path(),
        "--select",
        "*.mlp.weight",
        "--select",
        "model.norm.weight",
        "--json"
    ])
    .json();
    assert_eq!(load["tensor_count"], 3);
    assert_eq!(load["data_bytes"], 2 * 128 * 64 * 2 + 64 * 4);
}

#[test]
fn people_get_a_short_answer_or_the_whole_plan() {
    let directory = sharded();
    let short = run(args!["load", directory.path(), "--digest"]).text();
    for label in [
        "format ", "loaded ", "how ", "time ", "speed ", "digest ", "why ",
    ] {
        let found = short.lines().any(|line| line.starts_with(label));
        assert!(found, "{label}: {short}");
    }
    assert!(
        short.contains("8 tensors, 94.8 KiB (97,091 bytes)"),
        "{short}"
    );
    assert!(!short.contains("queue depth"), "{short}");
    let long = run(args!["load", directory.path(), "--explain"]).text();
    assert!(long.contains("queue depth"), "{long}");

    let verbose = run(args!["load", directory.path(), "-v"]);
    assert_eq!(verbose.status, Some(0), "{verbose:?}");
    assert!(verbose.stdout.contains("queue depth"), "{verbose:?}");
    assert!(verbose.stderr.contains("planned"), "{verbose:?}");
    assert!(!verbose.stderr.contains('\u{1b}'), "{verbose:?}");
}

/// What is odd about a checkpoint is said where it is loaded, not only where it is inspected.
#[test]
fn the_notes_of_the_checkpoint_are_shown() {
    let wrong_total = sharded();
    let path = wrong_total.path().join("model.safetensors.index.json");
    let index = fs::read_to_string(&path).unwrap();
    let total = format!("{}}}", data_bytes());
    let wrong = format!("{}}}", data_bytes() + 1);
    assert!(index.contains(&total), "{index}");
    fs::write(&path, index.replace(&total, &wrong)).unwrap();
    for directory in [wrong_total, strided()] {
        let load = run(args!["load", directory.path(), "--json"]).json();
        let inspection = run(args!["inspect", directory.path(), "--json"]).json();
        assert_ne!(load["notes"].as_array().unwrap().len(), 0, "{load}");
        assert_eq!(load["notes"], inspection["notes"]);
        let text = run(args!["load", directory.path()]).text();
        let note = load["notes"][0].as_str().unwrap();
        assert!(text.contains(&format!("note    {note}")), "{note}: {text}");
    }
}

/// Memory may run out where the planner could not foresee it.
#[cfg(target_os = "linux")]
#[test]
fn a_mapping_that_is_refused_comes_with_a_way_out() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    crate::support::sparse(&path, 1 << 30);
    let program = env!("CARGO_BIN_EXE_tensora");
    let script = format!("ulimit -v 200000; exec '{program}' load \"$0\" --memory mapped");
    let output = std::process::Command::new("sh")
        .args(["-c", &script])
        .arg(&path)
        .output();
    let error = crate::support::Answer::from(output.unwrap()).failure(1);
    for part in ["hint: ", "--select GLOB", "ulimit -v"] {
        assert!(error.contains(part), "{part}: {error}");
    }
}

#[test]
fn tracing_leaves_standard_output_alone() {
    let directory = sharded();
    let output = crate::support::tensora()
        .args(args!["load", directory.path(), "--json"])
        .env("TENSORA_LOG", "tensora=debug")
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("loaded"), "{stderr}");
    let load: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(load["tensor_count"], TENSOR_COUNT);
}

/// Runs the command with room for so few open files that it can open a checkpoint but make no
/// ring; just runs it where rings do not work anyway.
#[cfg(all(target_os = "linux", not(tensora_portable)))]
fn without_rings(path: &Path, options: &str) -> crate::support::Answer {
    let shell = |limit: u32| -> crate::support::Answer {
        let program = env!("CARGO_BIN_EXE_tensora");
        let path = path.display();
        let script = format!("ulimit -n {limit}; exec '{program}' load '{path}' {options}");
        let output = std::process::Command::new("sh")
            .arg("-c")
            .arg(script)
            .output();
        output.unwrap().into()
    };
    // How many descriptors a run starts with is up to whoever runs the tests.
    (4..64)
        .map(shell)
        .find(|answer| answer.stderr.contains("io_uring_setup"))
        .expect("a limit at which a file can be opened and a ring cannot be made")
}

#[cfg(all(target_os = "linux", not(tensora_portable)))]
#[test]
fn a_named_backend_is_never_replaced() {
    let (_directory, path) = single();
    let options = "--backend io-uring --memory owned --json";
    let error = without_rings(&path, options).failure(1);
    assert!(
        error.contains("the backend io-uring cannot run here"),
        "{error}"
    );
    assert!(error.contains("hint: `tensora doctor`"), "{error}");
}
