use tensora::BackendKind;

use crate::support::{
    Answer, TENSOR_COUNT, args, assert_fields, available, data_bytes, run, sharded, single, strided,
};

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
    for field in [
        "device",
        "rotational",
        "resident_bytes",
        "resident_is_estimate",
        "resident_share",
    ] {
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
        "profile",
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

/// The report of a run with a path that is no readable checkpoint.
#[track_caller]
fn unreadable(answer: &Answer) -> serde_json::Value {
    assert_eq!(answer.status, Some(1), "{answer:?}");
    assert_eq!(answer.stderr, "", "{answer:?}");
    let examination: serde_json::Value = serde_json::from_str(&answer.stdout).unwrap();
    assert_fields(
        &examination,
        &[
            ("os", "string"),
            ("checkpoint", "null"),
            ("storage", "null"),
        ],
    );
    assert_eq!(kinds(&examination).len(), BackendKind::ALL.len());
    let findings = examination["findings"].as_array().unwrap();
    let of_checkpoint: Vec<_> = findings
        .iter()
        .filter(|finding| finding["item"] == "checkpoint")
        .collect();
    let [finding] = of_checkpoint[..] else {
        panic!("{examination}");
    };
    assert_eq!(finding["verdict"], "problem");
    assert_fields(finding, &[("finding", "string"), ("remedy", "string")]);
    finding.clone()
}

/// Who asks the doctor has a problem, and it must not be the reason to get no answer.
#[test]
fn an_unreadable_checkpoint_is_a_finding_and_a_failure() {
    let (directory, path) = single();
    let truncated = directory.path().join("truncated.safetensors");
    let contents = std::fs::read(&path).unwrap();
    std::fs::write(&truncated, &contents[..contents.len() - 100]).unwrap();
    let partitioned = strided();
    let partition = partitioned.path().join("tensor.data_0");
    std::fs::write(partition, [0; 20]).unwrap();
    let absent = directory.path().join("absent");
    for (path, word) in [
        (absent.as_path(), "absent"),
        (&truncated, "100 bytes missing"),
        (partitioned.path(), "tensor.data_0"),
    ] {
        let finding = unreadable(&run(args!["doctor", path, "--json"]));
        let text = finding["finding"].as_str().unwrap();
        assert!(text.contains(word), "{finding}");
        let answer = run(args!["doctor", path]);
        assert_eq!(answer.status, Some(1), "{answer:?}");
        assert_eq!(answer.stderr, "", "{answer:?}");
        assert!(answer.stdout.contains("processors"), "{answer:?}");
        let mut lines = answer.stdout.lines();
        let found = lines.any(|line| line.starts_with("problem") && line.contains("checkpoint"));
        assert!(found, "{answer:?}");
    }
}

/// The case that the limit is examined for.
#[cfg(target_os = "linux")]
#[test]
fn too_few_open_files_are_a_finding_and_a_failure() {
    let directory = tempfile::tempdir().unwrap();
    let mut index = serde_json::Map::new();
    for number in 0..64 {
        let name = format!("model-{number}.safetensors");
        let tensor = format!("tensor-{number}");
        let header = format!(r#"{{"{tensor}":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}}"#);
        let mut contents = (header.len() as u64).to_le_bytes().to_vec();
        contents.extend(header.as_bytes());
        contents.push(0);
        std::fs::write(directory.path().join(&name), contents).unwrap();
        index.insert(tensor, name.into());
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": index});
    let path = directory.path().join("model.safetensors.index.json");
    std::fs::write(path, index.to_string()).unwrap();
    let program = env!("CARGO_BIN_EXE_tensora");
    let script = format!("ulimit -n 40; exec '{program}' doctor --json \"$0\"");
    let output = std::process::Command::new("sh")
        .args(["-c", &script])
        .arg(directory.path())
        .output();
    let finding = unreadable(&output.unwrap().into());
    let text = finding["finding"].as_str().unwrap();
    assert!(text.contains("ulimit -n"), "{finding}");
}
