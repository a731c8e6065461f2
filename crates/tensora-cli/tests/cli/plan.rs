use tensora::BackendKind;

use crate::support::{args, assert_fields, available, data_bytes, run, sharded};

#[test]
fn json_is_the_plans_own() {
    let directory = sharded();
    let plan = run(args!["plan", directory.path(), "--json"]).json();
    assert_fields(
        &plan,
        &[
            ("backend", "string"),
            ("memory", "string"),
            ("direct", "boolean"),
            ("chunk_bytes", "count"),
            ("queue_depth", "count"),
            ("workers", "count"),
            ("decisions", "array"),
            ("workload", "object"),
            ("platform", "object"),
        ],
    );
    let decisions = plan["decisions"].as_array().unwrap();
    assert!(!decisions.is_empty());
    for decision in decisions {
        assert_fields(
            decision,
            &[
                ("field", "string"),
                ("chosen", "string"),
                ("reason", "string"),
                ("rejected", "array"),
            ],
        );
    }
    assert_eq!(plan["workload"]["files"], 3);
    let storage = &plan["platform"]["storage"];
    assert!(
        storage["file_bytes"].as_u64() > Some(data_bytes()),
        "{storage}"
    );
}

#[test]
fn wishes_reach_the_planner() {
    let directory = sharded();
    let plan = run(args![
        "plan",
        directory.path(),
        "--backend=sync",
        "--memory=owned",
        "--direct=never",
        "--cache=keep",
        "--chunk-bytes=64KiB",
        "--workers=3",
        "--queue-depth=5",
        "--memory-limit=1GiB",
        "--select=model.layers.0.*",
        "--json"
    ])
    .json();
    assert_eq!(plan["backend"], "sync");
    assert_eq!(plan["memory"], "owned");
    assert_eq!(plan["direct_policy"], "never");
    assert_eq!(plan["chunk_bytes"], 64 << 10);
    assert_eq!(plan["workers"], 3);
    let policy = &plan["policy"];
    assert_eq!(policy["cache"], "keep");
    assert_eq!(policy["queue_depth"], 5);
    assert_eq!(policy["memory_limit_bytes"], 1 << 30);
    assert_eq!(plan["workload"]["tensors"], 3);
}

#[test]
fn only_owned_memory_denies_mappings() {
    let directory = sharded();
    for (memory, consent) in [
        ("auto", "granted"),
        ("mapped", "granted"),
        ("owned", "denied"),
    ] {
        if memory == "mapped" && !available(BackendKind::Mmap, "consent by --memory mapped") {
            continue;
        }
        let plan = run(args![
            "plan",
            directory.path(),
            "--memory",
            memory,
            "--json"
        ])
        .json();
        assert_eq!(plan["policy"]["mapping"], consent, "{memory}");
    }
}

#[test]
fn people_get_reasons() {
    let directory = sharded();
    let text = run(args!["plan", directory.path(), "--memory=owned"]).text();
    for label in ["plan ", "load ", "where ", "memory ", "backend ", "chunk "] {
        let found = text.lines().any(|line| line.starts_with(label));
        assert!(found, "{label}: {text}");
    }
}
