use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use serde_json::Value;
use tempfile::TempDir;
use tensora::BackendKind;
use tensora::io::{Availability, Platform};

use crate::support::{Answer, args, assert_fields, data_bytes, run, single, skip, strided};

/// A small checkpoint on whatever the build directory lies on: unlike `/tmp`, that is rarely in memory.
fn checkpoint() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = directory.path().join("model.safetensors");
    fs::copy(single().1, &path).unwrap();
    (directory, path)
}

/// The answer, unless nothing can be timed here because nobody tells cold from warm, which is counted.
fn timed(what: &str, answer: Answer) -> Option<Answer> {
    if answer
        .stderr
        .contains("does not tell what is in the page cache")
    {
        skip(what, &answer.stderr);
        return None;
    }
    Some(answer)
}

fn names(state: &Value) -> BTreeSet<String> {
    let cases = state["cases"].as_array().unwrap();
    let name = |case: &Value| case["name"].as_str().unwrap().to_owned();
    cases.iter().map(name).collect()
}

#[test]
fn every_way_of_loading_is_compared_in_every_state() {
    let (_directory, path) = checkpoint();
    // A state named twice is timed once.
    let arguments = args![
        "bench",
        &path,
        "--rounds=2",
        "--states=warm,cold,warm",
        "--json"
    ];
    let Some(answer) = timed("a comparison", run(arguments)) else {
        return;
    };
    let report = answer.json();
    assert_fields(
        &report,
        &[
            ("path", "string"),
            ("data_bytes", "count"),
            ("file_bytes", "count"),
            ("version", "string"),
            ("cpus", "count"),
            ("place", "object"),
            ("elapsed_seconds", "number"),
            ("rounds", "count"),
            ("states", "array"),
            ("notes", "array"),
        ],
    );
    assert_eq!(report["data_bytes"], data_bytes());
    assert_eq!(report["rounds"], 2);

    let mut expected = BTreeSet::from(["auto".to_owned(), "auto, owned".to_owned()]);
    for fact in Platform::probe().backends {
        if fact.availability == Availability::Available {
            expected.insert(format!("{}, owned", fact.kind));
            if fact.kind == BackendKind::Mmap {
                expected.insert("mmap, mapped".to_owned());
            }
        }
    }
    let states = report["states"].as_array().unwrap();
    let mut left_out = report["notes"].to_string();
    left_out.retain(|c| c != '"');
    for (cache, state) in ["warm", "cold"].iter().zip(states) {
        assert_eq!(state["cache"], *cache);
        assert_eq!(names(state), expected, "{left_out}");
        for case in state["cases"].as_array().unwrap() {
            assert_fields(
                case,
                &[
                    ("options", "array"),
                    ("backend", "string"),
                    ("memory", "string"),
                    ("median_seconds", "number"),
                    ("bytes_per_second", "number"),
                    ("ratio", "number"),
                ],
            );
            assert_eq!(case["elapsed_seconds"].as_array().unwrap().len(), 2);
            let name = case["name"].as_str().unwrap();
            let how = format!("{}, {}", case["backend"], case["memory"]).replace('"', "");
            assert!(name == how || case["is_automatic"] == true, "{name}: {how}");
        }
        let regrets = state["regrets"].as_array().unwrap();
        assert_eq!(regrets.len(), 2, "{state}");
        for regret in regrets {
            let best = regret["best"].as_str().unwrap();
            let is_owned = regret["automatic"] == "auto, owned";
            assert!(!(is_owned && best.contains("mapped")), "{regret}");
            let verdict = regret["verdict"].as_str().unwrap();
            assert!(verdict.contains(best), "{regret}");
        }
    }
    if states.len() < 2 {
        assert!(left_out.contains("cold is left out"), "{left_out}");
        skip("a cold comparison", &left_out);
    }
}

#[test]
fn people_get_a_table_and_a_picture() {
    let (directory, path) = checkpoint();
    for (name, marks) in [
        ("plot.svg", &["<svg ", "auto, owned", "GiB/s"][..]),
        (
            "plot.HTML",
            &["<!DOCTYPE html>", "<svg ", "<table>", "auto, owned"],
        ),
    ] {
        let plot = directory.path().join(name);
        let arguments = args![
            "bench",
            &path,
            "--rounds=1",
            "--states=warm",
            "--plot",
            &plot
        ];
        let Some(answer) = timed("a picture of a comparison", run(arguments)) else {
            return;
        };
        let text = answer.text();
        for words in ["1 round in", "auto, owned (it chose", "ratio to the best"] {
            assert!(text.contains(words), "{words}: {text}");
        }
        let drawn = fs::read_to_string(plot).unwrap();
        for mark in marks {
            assert!(drawn.contains(mark), "{name}, {mark}: {drawn}");
        }
    }
}

#[test]
fn no_round_begins_that_would_end_too_late() {
    let (_directory, path) = checkpoint();
    let arguments = args![
        "bench",
        &path,
        "--rounds=100",
        "--budget=1",
        "--states=warm",
        "--json"
    ];
    let Some(answer) = timed("a budget", run(arguments)) else {
        return;
    };
    let report = answer.json();
    let rounds = report["rounds"].as_u64().unwrap();
    assert!((1..=100).contains(&rounds), "{report}");
    let is_noted = report["notes"].to_string().contains("--budget");
    assert_eq!(is_noted, rounds < 100, "{report}");
}

#[test]
fn loads_open_what_the_comparison_opened() {
    // Without a format named, this directory is refused.
    let directory = strided();
    fs::copy(single().1, directory.path().join("model.safetensors")).unwrap();
    let arguments = args![
        "bench",
        directory.path(),
        "--format=safetensors",
        "--rounds=1",
        "--states=warm",
        "--json"
    ];
    let Some(answer) = timed("options of opening", run(arguments)) else {
        return;
    };
    assert_eq!(answer.json()["data_bytes"], data_bytes());
}

#[test]
fn what_cannot_be_compared_fails_with_a_reason() {
    let (directory, path) = checkpoint();
    let absent = directory.path().join("absent");
    let error = run(args!["bench", &absent]).failure(1);
    assert!(error.contains("no such file"), "{error}");

    let empty = directory.path().join("empty.safetensors");
    fs::write(&empty, b"\x02\0\0\0\0\0\0\0{}").unwrap();
    let error = run(args!["bench", &empty]).failure(1);
    assert!(error.contains("no data"), "{error}");

    let plot = absent.join("plot.svg");
    let error = run(args!["bench", &path, "--plot", plot]).failure(1);
    assert!(error.contains("there is no directory"), "{error}");

    for (option, words) in [
        ("--plot=plot.png", ".svg or .html"),
        ("--states=hot", "cold, half, warm"),
        ("--rounds=0", "1..=100"),
        ("--budget=0", "1..=86400"),
    ] {
        let error = run(args!["bench", &path, option]).failure(2);
        assert!(error.contains(words), "{option}: {error}");
    }
}
