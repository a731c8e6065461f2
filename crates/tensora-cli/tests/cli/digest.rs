use crate::support::{
    TENSOR_COUNT, args, assert_fields, data_bytes, run, sharded, single, strided,
};

#[test]
fn a_streamed_digest_is_that_of_a_load() {
    let (_directory, single) = single();
    let sharded = sharded();
    let strided = strided();
    for path in [single.as_path(), sharded.path(), strided.path()] {
        let loaded = run(args!["load", path, "--digest", "--json"]).json();
        let streamed = run(args!["digest", path, "--json"]).json();
        assert_eq!(streamed["digest"], loaded["digest"], "{}", path.display());
    }
}

#[test]
fn json_has_every_field_of_the_contract() {
    let directory = sharded();
    let digest = run(args!["digest", directory.path(), "--json"]).json();
    assert_fields(
        &digest,
        &[
            ("digest", "string"),
            ("format", "string"),
            ("tensor_count", "count"),
            ("data_bytes", "count"),
            ("elapsed_seconds", "number"),
            ("bytes_per_second", "number"),
            ("notes", "array"),
            ("plan", "object"),
            ("stats", "object"),
        ],
    );
    assert_eq!(digest["tensor_count"], TENSOR_COUNT);
    assert_eq!(digest["data_bytes"], data_bytes());
    assert_eq!(digest["digest"].as_str().unwrap().len(), 64);
}

#[test]
fn the_limit_on_memory_is_kept_or_refused() {
    let directory = sharded();
    let digest = |limit: &str| {
        run(args![
            "digest",
            directory.path(),
            "--memory-limit",
            limit,
            "--json"
        ])
    };
    let roomy = digest("256MiB").json();
    let tight = digest("2MiB").json();
    assert_eq!(roomy["digest"], tight["digest"]);
    assert!(tight["plan"]["memory_bytes"].as_u64().unwrap() <= 2 << 20);
    let refusal = digest("1KiB").failure(1);
    assert!(refusal.contains("--memory-limit"), "{refusal}");
}

#[test]
fn it_says_how_and_explains_itself_on_request() {
    let directory = sharded();
    let text = run(args!["digest", directory.path()]).text();
    assert!(
        text.contains("hashed") && text.contains("8 tensors"),
        "{text}"
    );
    assert!(text.contains("buffer"), "{text}");
    let explained = run(args!["digest", directory.path(), "--explain"]).text();
    assert!(explained.len() > text.len());
    let typo = run(args!["digets", directory.path()]).failure(2);
    assert!(typo.contains("digest"), "{typo}");
    let missing = run(args!["digest", "/nonexistent/checkpoint"]).failure(1);
    assert!(missing.contains("/nonexistent/checkpoint"), "{missing}");
}
