use tensora::BackendKind;

use crate::support::{TENSOR_COUNT, args, assert_fields, available, data_bytes, run, sharded};

fn kinds(examination: &serde_json::Value) -> Vec<&str> {
    let backends = examination["backends"].as_array().unwrap();
    backends
        .iter()
        .map(|backend| backend["kind"].as_str().unwrap())
        .collect()
}

#[test]
fn json_describes_the_machine() {
    let examination = run(["doctor", "--json"]).json();
    assert_fields(
        &examination,
        &[
            ("os", "string"),
            ("cpus", "count"),
            ("page_bytes", "count"),
            ("huge_pages", "string"),
            ("memory", "object"),
            ("backends", "array"),
            ("findings", "array"),
            ("checkpoint", "null"),
            ("storage", "null"),
        ],
    );
    // The system need not tell these, but the fields are there.
    for field in ["kernel", "memlock_bytes", "open_files"] {
        assert!(examination.get(field).is_some(), "{field}: {examination}");
    }
    for field in ["total_bytes", "available_bytes", "cgroup_limit_bytes"] {
        assert!(
            examination["memory"].get(field).is_some(),
            "{field}: {examination}"
        );
    }
    assert_eq!(
        kinds(&examination),
        BackendKind::ALL.map(BackendKind::as_str)
    );
    for backend in examination["backends"].as_array().unwrap() {
        let kind: BackendKind = backend["kind"].as_str().unwrap().parse().unwrap();
        if available(kind, "json_describes_the_machine: an available backend") {
            assert_fields(
                backend,
                &[("status", "string"), ("reason", "null"), ("remedy", "null")],
            );
            assert_eq!(backend["status"], "available");
        }
    }
    for finding in examination["findings"].as_array().unwrap() {
        assert_fields(finding, &[("item", "string"), ("finding", "string")]);
        let verdict = finding["verdict"].as_str().unwrap();
        assert!(["ok", "note", "problem"].contains(&verdict), "{finding}");
        assert_eq!(
            finding.get("remedy").is_some(),
            verdict != "ok",
            "{finding}"
        );
    }
}

#[test]
fn json_describes_the_storage_of_a_checkpoint() {
    let directory = sharded();
    let examination = run(args!["doctor", directory.path(), "--json"]).json();
    assert_fields(
        &examination["checkpoint"],
        &[
            ("path", "string"),
            ("format", "string"),
            ("file_count", "count"),
            ("tensor_count", "count"),
            ("data_bytes", "count"),
        ],
    );
    assert_eq!(examination["checkpoint"]["tensor_count"], TENSOR_COUNT);
    let storage = &examination["storage"];
    assert_fields(
        storage,
        &[
            ("file_system", "string"),
            ("class", "string"),
            ("direct", "object"),
            ("file_bytes", "count"),
        ],
    );
    for field in ["device", "rotational", "resident_bytes", "resident_share"] {
        assert!(storage.get(field).is_some(), "{field}: {storage}");
    }
    assert!(
        storage["file_bytes"].as_u64() > Some(data_bytes()),
        "{storage}"
    );
    if let Some(share) = storage["resident_share"].as_f64() {
        assert!((0.0..=1.0).contains(&share), "{storage}");
    }
}

#[test]
fn people_get_a_verdict_for_each_item() {
    let directory = sharded();
    let text = run(args!["doctor", directory.path()]).text();
    let items = [
        "sync backend",
        "async backend",
        "io-uring backend",
        "mmap backend",
        "kernel",
        "processors",
        "memory",
        "huge pages",
        "locked memory",
        "open files",
        "checkpoint",
        "file system",
        "direct I/O",
        "page cache",
        "load",
    ];
    for item in items {
        let found = text.lines().any(|line| {
            let (verdict, rest) = line.split_once(' ').unwrap_or_default();
            ["ok", "note", "problem"].contains(&verdict) && rest.trim_start().starts_with(item)
        });
        assert!(found, "{item}: {text}");
    }
    let verdict = text.lines().last().unwrap();
    assert!(verdict.ends_with('.'), "{text}");
}

#[test]
fn a_bad_path_fails() {
    let error = run(["doctor", "/nonexistent/checkpoint", "--json"]).failure(1);
    assert!(error.contains("/nonexistent/checkpoint"), "{error}");
}
