use std::fs::{self, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use serde_json::Value;

use crate::support::{
    Answer, TENSOR_COUNT, args, assert_fields, data_bytes, digest, run, sharded, single, strided,
};

const RUN_FIELDS: &[(&str, &str)] = &[
    ("agrees", "boolean"),
    ("hashed_bytes", "count"),
    ("elapsed_seconds", "number"),
    ("bytes_per_second", "number"),
];

const SIDE_FIELDS: &[(&str, &str)] = &[
    ("path", "string"),
    ("format", "string"),
    ("tensor_count", "count"),
    ("data_bytes", "count"),
    ("digest", "string"),
    ("damaged", "array"),
    ("notes", "array"),
];

/// The report of a run that found something, on standard output, and nothing on standard error.
#[track_caller]
fn found(answer: Answer) -> String {
    assert_eq!(answer.status, Some(1), "{answer:?}");
    assert_eq!(answer.stderr, "", "{answer:?}");
    answer.stdout
}

#[track_caller]
fn found_json(answer: Answer) -> Value {
    serde_json::from_str(&found(answer)).unwrap()
}

fn flip_byte(path: &Path, offset_from_end: i64) {
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.seek(SeekFrom::End(-offset_from_end)).unwrap();
    file.read_exact(&mut byte).unwrap();
    file.seek(SeekFrom::End(-offset_from_end)).unwrap();
    file.write_all(&[byte[0] ^ 0x10]).unwrap();
}

#[test]
fn one_checkpoint_is_read_to_its_end() {
    let source = sharded();
    let json = run(args!["verify", source.path(), "--json"]).json();
    assert_fields(&json, RUN_FIELDS);
    assert_fields(&json, SIDE_FIELDS);
    assert_fields(&json, &[("checks", "array")]);
    assert_eq!(json["agrees"], true);
    assert_eq!(json["tensor_count"], TENSOR_COUNT);
    assert_eq!(json["hashed_bytes"], data_bytes());
    assert_eq!(json["digest"], digest(source.path()));
    assert_eq!(json["checks"], serde_json::json!([]));
    let text = run(args!["verify", source.path()]).text();
    assert!(text.starts_with("verdict     sound"), "{text}");
    assert!(
        text.contains("nothing here says what they should be"),
        "{text}"
    );
}

#[test]
fn checksums_find_a_flipped_byte() {
    let (_directory, source) = single();
    for format in ["safetensors", "serverlessllm-store"] {
        let target = tempfile::tempdir().unwrap();
        let target = target.path();
        run(args![
            "convert",
            source,
            target,
            "--to",
            format,
            "--checksums"
        ])
        .text();
        let text = run(args!["verify", target]).text();
        assert!(
            text.contains("8 of 8 tensors agree with tensora.blake3"),
            "{text}"
        );

        let inspection = run(args!["inspect", target, "--json"]).json();
        let tensors = inspection["tensors"].as_array().unwrap();
        let mask = tensors
            .iter()
            .find(|tensor| tensor["name"] == "model.layers.0.mask")
            .unwrap();
        let file = target.join(mask["file"].as_str().unwrap());
        let end = fs::metadata(&file).unwrap().len() - mask["offset"].as_u64().unwrap();
        flip_byte(&file, i64::try_from(end).unwrap() - 5);

        let text = found(run(args!["verify", target]));
        assert!(
            text.starts_with("verdict     DAMAGED: 1 check failed"),
            "{text}"
        );
        assert!(
            text.contains("7 of 8 tensors agree with tensora.blake3"),
            "{text}"
        );
        assert!(
            text.contains("\"model.layers.0.mask\": BLAKE3 is "),
            "{text}"
        );
        let json = found_json(run(args!["verify", target, "--json"]));
        assert_eq!(json["agrees"], false);
        let checks = json["checks"].as_array().unwrap();
        let bad: Vec<&Value> = checks
            .iter()
            .filter(|check| check["outcome"] != "matches")
            .collect();
        assert_eq!(bad.len(), 1, "{json}");
        assert_eq!(bad[0]["tensor"], "model.layers.0.mask");
        assert_eq!(bad[0]["by"], "sidecar");
        assert_eq!(bad[0]["outcome"], "differs");
        assert_ne!(bad[0]["expected"], bad[0]["actual"]);

        // Against the source, the place is found.
        let json = found_json(run(args!["verify", source, target, "--json"]));
        let differences = &json["differences"];
        assert_eq!(differences.as_array().unwrap().len(), 1, "{json}");
        assert_eq!(differences[0]["tensor"], "model.layers.0.mask");
        assert_eq!(differences[0]["kind"], "bytes");
        assert_eq!(differences[0]["offset"], 5);
        assert_eq!(differences[0]["element"], serde_json::json!([0, 5]));
    }
}

#[test]
fn a_damaged_sidecar_is_an_error() {
    let (_directory, source) = single();
    let target = tempfile::tempdir().unwrap();
    run(args![
        "convert",
        source,
        target.path(),
        "--to=safetensors",
        "--checksums"
    ])
    .text();
    fs::write(target.path().join("tensora.blake3"), "{").unwrap();
    let error = run(args!["verify", target.path()]).failure(1);
    assert!(error.contains("tensora.blake3"), "{error}");
}

#[test]
fn two_checkpoints_are_the_same_whatever_their_formats() {
    let source = sharded();
    let directory = tempfile::tempdir().unwrap();
    for format in [
        "safetensors",
        "serverlessllm-store",
        "serverlessllm-partitioned",
    ] {
        let target = directory.path().join(format);
        run(args!["convert", source.path(), target, "--to", format]).text();
        let json = run(args!["verify", source.path(), target, "--json"]).json();
        assert_fields(&json, RUN_FIELDS);
        assert_fields(&json, &[("differences", "array")]);
        for side in ["left", "right"] {
            assert_fields(&json[side], SIDE_FIELDS);
            assert_eq!(json[side]["digest"], digest(source.path()));
        }
        assert_eq!(json["agrees"], true);
        assert_eq!(json["hashed_bytes"], 2 * data_bytes());
        let text = run(args!["verify", source.path(), target]).text();
        assert!(text.starts_with("verdict  the same tensors"), "{text}");
    }
}

/// A SafeTensors file with a header that is given literally, and zeros behind it.
fn written(path: &Path, header: &str, data: &[u8]) {
    let mut contents = (header.len() as u64).to_le_bytes().to_vec();
    contents.extend(header.as_bytes());
    contents.extend(data);
    fs::write(path, contents).unwrap();
}

#[test]
fn differences_are_named_with_their_kind() {
    let directory = tempfile::tempdir().unwrap();
    let left = directory.path().join("left.safetensors");
    let right = directory.path().join("right.safetensors");
    written(
        &left,
        r#"{"bytes":{"dtype":"U16","shape":[2,2],"data_offsets":[0,8]},
            "dtype":{"dtype":"F16","shape":[2],"data_offsets":[8,12]},
            "left":{"dtype":"U8","shape":[],"data_offsets":[12,13]},
            "same":{"dtype":"U8","shape":[1],"data_offsets":[13,14]},
            "shape":{"dtype":"U8","shape":[2,3],"data_offsets":[14,20]}}"#,
        &[0; 20],
    );
    let mut data = [0; 20];
    data[5] = 0xff;
    written(
        &right,
        r#"{"bytes":{"dtype":"U16","shape":[2,2],"data_offsets":[0,8]},
            "dtype":{"dtype":"BF16","shape":[2],"data_offsets":[8,12]},
            "right":{"dtype":"U8","shape":[],"data_offsets":[12,13]},
            "same":{"dtype":"U8","shape":[1],"data_offsets":[13,14]},
            "shape":{"dtype":"U8","shape":[3,2],"data_offsets":[14,20]}}"#,
        &data,
    );
    let json = found_json(run(args!["verify", left, right, "--json"]));
    assert_eq!(json["agrees"], false);
    assert_eq!(
        json["differences"],
        serde_json::json!([
            {"tensor": "bytes", "kind": "bytes", "offset": 5, "element": [1, 0], "left": 0, "right": 255},
            {"tensor": "dtype", "kind": "dtype", "left": "F16", "right": "BF16"},
            {"tensor": "left", "kind": "only-in-left"},
            {"tensor": "right", "kind": "only-in-right"},
            {"tensor": "shape", "kind": "shape", "left": [2, 3], "right": [3, 2]},
        ])
    );
    let text = found(run(args!["verify", left, right]));
    assert!(
        text.starts_with("verdict  DIFFERENT: 5 differences\n"),
        "{text}"
    );
    let (_, table) = text.split_once("\n\n").unwrap();
    let expected = "\
tensor  differs in
────────────────────────────────────────────────────────────────────
bytes   bytes, from 5 (element [1, 0]): 00 in the first, ff in the second
dtype   dtype F16 in the first, BF16 in the second
left    only in the first
right   only in the second
shape   shape [2, 3] in the first, [3, 2] in the second
";
    let lines = |text: &str| {
        text.lines()
            .filter(|line| !line.starts_with('─'))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(lines(table), lines(expected), "{table}");
}

#[test]
fn damaged_tensors_are_named_one_by_one() {
    let source = strided();
    let partition = source.path().join("tensor.data_0");
    let file = OpenOptions::new().write(true).open(&partition).unwrap();
    file.set_len(20).unwrap();
    let error = run(args!["inspect", source.path()]).failure(1);
    assert!(error.contains("`tensora verify PATH`"), "{error}");
    let text = found(run(args!["verify", source.path()]));
    assert!(
        text.starts_with("verdict     DAMAGED: 1 tensor not complete"),
        "{text}"
    );
    assert!(text.contains("the other tensors can be read"), "{text}");
    let line = text.lines().find(|line| line.starts_with("transposed"));
    let words: Vec<&str> = line.unwrap().split_whitespace().collect();
    assert_eq!(words, ["transposed", "tensor.data_0", "12", "4"], "{text}");
    let json = found_json(run(args!["verify", source.path(), "--json"]));
    assert_eq!(
        json["damaged"],
        serde_json::json!([
            {"tensor": "transposed", "file": "tensor.data_0", "bytes": 12, "present_bytes": 4}
        ])
    );
    assert_eq!(json["tensor_count"], 1);
    // Damaged in the same way is not the same.
    let text = found(run(args!["verify", source.path(), source.path()]));
    assert!(
        text.starts_with("verdict  DAMAGED: 2 tensors not complete"),
        "{text}"
    );
}

/// Files of a Hugging Face cache are named by their SHA-256.
#[cfg(unix)]
#[test]
fn blobs_are_held_to_their_names() {
    use std::os::unix::fs::symlink;

    let (directory, source) = single();
    let snapshot = directory.path().join("models--a--b/snapshots/0");
    let blobs = directory.path().join("models--a--b/blobs");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(&blobs).unwrap();
    let output = std::process::Command::new("sha256sum")
        .arg(&source)
        .output();
    let Ok(output) = output else {
        crate::support::skip("names of blobs", "there is no sha256sum here");
        return;
    };
    let sum = String::from_utf8(output.stdout).unwrap();
    let name = sum.split(' ').next().unwrap();
    fs::rename(&source, blobs.join(name)).unwrap();
    symlink(
        Path::new("../../blobs").join(name),
        snapshot.join("model.safetensors"),
    )
    .unwrap();
    let text = run(args!["verify", snapshot]).text();
    assert!(
        text.contains("1 of 1 file agrees with the names of their blobs"),
        "{text}"
    );
    flip_byte(&blobs.join(name), 1);
    let text = found(run(args!["verify", snapshot]));
    assert!(text.contains("model.safetensors: SHA-256 is "), "{text}");
    let json = found_json(run(args!["verify", snapshot, "--json"]));
    assert_eq!(json["checks"][0]["file"], "model.safetensors");
    assert_eq!(json["checks"][0]["by"], "blob-name");
    assert_eq!(json["checks"][0]["expected"], name);
}

#[test]
fn what_cannot_be_read_is_an_error_and_no_difference() {
    let source = sharded();
    let missing = run(args!["verify", source.path(), "/nonexistent/checkpoint"]).failure(1);
    assert!(missing.contains("/nonexistent/checkpoint"), "{missing}");
    let typo = run(args!["verfy", source.path()]).failure(2);
    assert!(typo.contains("'verify'"), "{typo}");
    let third = run(args!["verify", "a", "b", "c"]).failure(2);
    assert!(third.contains("unexpected argument 'c'"), "{third}");
    let low = run(args!["verify", source.path(), "--memory-limit=1KiB"]).failure(1);
    assert!(low.contains("--memory-limit"), "{low}");
}

#[test]
fn long_lists_are_cut_for_people_only() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("many.safetensors");
    let tensors: Vec<String> = (0..50)
        .map(|number| {
            format!(r#""t{number:02}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#)
        })
        .collect();
    written(&path, &format!("{{{}}}", tensors.join(",")), &[]);
    let empty = directory.path().join("empty.safetensors");
    written(&empty, "{}", &[]);
    let text = found(run(args!["verify", path, empty]));
    assert!(text.contains("… 10 more, --all shows them"), "{text}");
    let all = found(run(args!["verify", path, empty, "--all"]));
    assert!(all.contains("t49"), "{all}");
    let json = found_json(run(args!["verify", path, empty, "--json"]));
    assert_eq!(json["differences"].as_array().unwrap().len(), 50);
}
