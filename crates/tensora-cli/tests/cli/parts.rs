use std::path::Path;
use std::process::Stdio;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::Value;
use tempfile::TempDir;
use tensora::io::CacheState;

use crate::support::{Answer, args, run, sharded, single, skip, tensora};

#[test]
fn slices_read_what_they_need_and_say_so() {
    let (_directory, path) = single();
    let rule = "*mlp.weight=dim:0,rank:1/4";
    let load = run(args![
        "load",
        path,
        "--select",
        "*mlp.weight",
        "--slice",
        rule,
        "--json"
    ])
    .json();
    // Two matrices of 128 × 64 × 2 bytes, a quarter of each.
    assert_eq!(load["data_bytes"], 2 * 32 * 64 * 2);
    assert_eq!(load["plan"]["workload"]["needed_bytes"], load["data_bytes"]);
    let plan = run(args![
        "plan",
        path,
        "--select",
        "*mlp.weight",
        "--slice",
        rule
    ])
    .text();
    assert!(plan.contains("8 KiB"), "{plan}");
    // The ranks' parts differ, and a range is the same as the rank that it is.
    let digest = |rule: &str| {
        let digest = run(args!["digest", path, "--slice", rule, "--json"]).json();
        digest["digest"].as_str().unwrap().to_owned()
    };
    assert_ne!(digest(rule), digest("*mlp.weight=dim:0,rank:2/4"));
    assert_eq!(digest(rule), digest("*mlp.weight=dim:0,range:32..64"));
    let load = run(args!["load", path, "--slice", rule, "--digest", "--json"]).json();
    assert_eq!(load["digest"], digest(rule));
}

#[test]
fn rules_that_make_no_sense_are_refused_with_the_remedy() {
    let directory = sharded();
    let refusal =
        |rule: &str, status| run(args!["load", directory.path(), "--slice", rule]).failure(status);
    assert!(refusal("*mlp.weight", 2).contains("dim:"));
    assert!(refusal("*mlp.weight=dim:zero", 2).contains("zero"));
    assert!(refusal("*mlp.weight=dim:0,rank:4/4", 2).contains("4/4"));
    assert!(refusal("*mlp.weight=dim:5,rank:0/4", 1).contains("dimension"));
    assert!(refusal("nothing*=dim:0,rank:0/4", 1).contains("nothing*"));
    assert!(refusal("*mlp.weight=dim:0,rank:0/3", 1).contains("remainder:last"));
    let no_rank = refusal("*mlp.weight=dim:0", 1);
    assert!(
        no_rank.contains("--rank") && no_rank.contains("--world"),
        "{no_rank}"
    );
    let preset = run(args![
        "load",
        directory.path(),
        "--preset",
        "tensor-parallel"
    ])
    .failure(2);
    assert!(preset.contains("--world"), "{preset}");
    let unknown = run(args![
        "load",
        directory.path(),
        "--preset",
        "no-such",
        "--rank",
        "0",
        "--world",
        "2"
    ])
    .failure(1);
    assert!(unknown.contains("tensor-parallel"), "{unknown}");
}

/// Runs every rank at once, and gives what each printed.
fn together(path: &Path, name: &str, world: u32, ranks: &[u32], options: &[&str]) -> Vec<Answer> {
    let processes: Vec<_> = ranks
        .iter()
        .map(|rank| {
            tensora()
                .arg("load")
                .arg(path)
                .args(["--world", &world.to_string(), "--rank", &rank.to_string()])
                .args(["--shared", name, "--digest", "--json"])
                .args(options)
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    processes
        .into_iter()
        .map(|process| process.wait_with_output().unwrap().into())
        .collect()
}

/// A checkpoint too large to come into the page cache with its header, and not in the page cache; `None`, and a
/// counted skip, where that cannot be made.
fn cold(what: &str) -> Option<TempDir> {
    let directory = tempfile::tempdir().unwrap();
    let data: Vec<u8> = (0..1024_u32 * 2048 * 2)
        .map(|place| (place.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let tensors = ["embed_tokens", "layers.0.mlp", "layers.1.mlp"].map(|name| {
        let view = TensorView::new(Dtype::BF16, vec![1024, 2048], &data).unwrap();
        (format!("model.{name}.weight"), view)
    });
    let path = directory.path().join("model.safetensors");
    safetensors::serialize_to_file(tensors, None, &path).unwrap();
    std::fs::File::open(&path).unwrap().sync_all().unwrap();
    let file = tensora::io::SourceFile::open(&path).unwrap();
    let direct = file.direct_support();
    if !direct.is_supported() {
        skip(what, &format!("{direct:?}"));
        return None;
    }
    if let Err(error) = tensora_measure::require(&[file], CacheState::Cold) {
        skip(what, &error.to_string());
        return None;
    }
    Some(directory)
}

/// A name that no other test, and no other run of the tests, has.
fn group(what: &str) -> String {
    format!("{what}-{}", std::process::id())
}

#[cfg(target_os = "linux")]
#[test]
fn ranks_read_together_each_window_once() {
    let Some(directory) = cold("ranks that read together") else {
        return;
    };
    let options = [
        "--memory",
        "owned",
        "--cache",
        "bypass",
        "--slice",
        "*.weight=dim:1",
    ];
    let ranks = together(directory.path(), &group("once"), 4, &[0, 1, 2, 3], &options);
    let loads: Vec<Value> = ranks.into_iter().map(Answer::json).collect();
    for (rank, load) in loads.iter().enumerate() {
        let alone = run(args![
            "load",
            directory.path(),
            "--digest",
            "--json",
            "--memory",
            "owned",
            "--slice",
            "*.weight=dim:1",
            "--world",
            "4",
            "--rank",
            rank.to_string(),
        ])
        .json();
        assert_eq!(load["digest"], alone["digest"], "rank {rank}");
        assert_eq!(
            load["shared"]["members"],
            serde_json::json!([0, 1, 2, 3]),
            "{load}"
        );
    }
    let sum = |field: &str| {
        loads
            .iter()
            .map(|load| load["shared"][field].as_u64().unwrap())
            .sum::<u64>()
    };
    // Each window that one member reads, three receive.
    assert!(sum("windows_read_here") > 0);
    assert_eq!(sum("windows_received"), 3 * sum("windows_read_here"));
}

#[cfg(target_os = "linux")]
#[test]
fn a_rank_that_never_comes_does_not_hold_the_others_up() {
    let Some(directory) = cold("ranks of which one never comes") else {
        return;
    };
    let options = [
        "--memory",
        "owned",
        "--cache",
        "bypass",
        "--shared-timeout",
        "1",
    ];
    let ranks = together(directory.path(), &group("absent"), 3, &[0, 2], &options);
    let whole = run(args![
        "digest",
        directory.path(),
        "--direct",
        "required",
        "--json"
    ])
    .json();
    for rank in ranks {
        let load = rank.json();
        assert_eq!(load["digest"], whole["digest"]);
        assert_eq!(load["shared"]["members"], serde_json::json!([0, 2]));
    }
}

#[test]
fn reading_together_needs_a_rank_and_a_world() {
    let directory = sharded();
    let alone = run(args!["load", directory.path(), "--shared", "name"]).failure(2);
    assert!(alone.contains("--world"), "{alone}");
    let no_rank = run(args![
        "load",
        directory.path(),
        "--shared",
        "name",
        "--world",
        "2"
    ])
    .failure(2);
    assert!(no_rank.contains("--rank"), "{no_rank}");
    let outside = run(args![
        "load",
        directory.path(),
        "--shared",
        "name",
        "--world",
        "2",
        "--rank",
        "2"
    ])
    .failure(1);
    assert!(outside.contains("rank 2"), "{outside}");
}
