use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::support::{TENSOR_COUNT, args, assert_fields, data_bytes, run, sharded, single, sparse};

const FIELDS: &[(&str, &str)] = &[
    ("source_format", "string"),
    ("target_format", "string"),
    ("target", "string"),
    ("dry_run", "boolean"),
    ("tensor_count", "count"),
    ("data_bytes", "count"),
    ("target_bytes", "count"),
    ("padding_bytes", "count"),
    ("files", "array"),
    ("notes", "array"),
];

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[track_caller]
fn digest(path: &Path) -> Value {
    run(args!["load", path, "--digest", "--json"]).json()["digest"].clone()
}

#[test]
fn a_dry_run_says_what_a_run_writes_and_writes_nothing() {
    let source = sharded();
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("out");
    let convert = args![
        "convert",
        source.path(),
        target,
        "--to=serverlessllm-store",
        "--json"
    ];
    let dry = run(convert.clone().into_iter().chain(args!["--dry-run"])).json();
    assert_fields(&dry, FIELDS);
    assert_eq!(dry["dry_run"], true);
    assert_eq!(dry.get("elapsed_seconds"), None);
    assert_eq!(names(directory.path()), [""; 0]);

    let wet = run(&convert).json();
    assert_fields(&wet, FIELDS);
    assert_fields(
        &wet,
        &[
            ("elapsed_seconds", "number"),
            ("bytes_per_second", "number"),
            ("buffer_bytes", "count"),
        ],
    );
    assert_eq!(wet["dry_run"], false);
    for field in [
        "tensor_count",
        "data_bytes",
        "target_bytes",
        "padding_bytes",
        "files",
    ] {
        assert_eq!(dry[field], wet[field], "{field}");
    }
    assert_eq!(wet["tensor_count"], TENSOR_COUNT);
    assert_eq!(wet["data_bytes"], data_bytes());
    let mut listed = Vec::new();
    for file in wet["files"].as_array().unwrap() {
        let name = file["path"].as_str().unwrap();
        assert_eq!(
            file["bytes"],
            fs::metadata(target.join(name)).unwrap().len()
        );
        listed.push(name.to_owned());
    }
    listed.sort();
    assert_eq!(names(&target), listed);
}

#[test]
fn both_dialects_hold_the_same_content() {
    let source = sharded();
    let expected = digest(source.path());
    let directory = tempfile::tempdir().unwrap();
    for (format, option, partitions) in [
        ("serverlessllm-store", "--partition-bytes=40KiB", 3),
        ("serverlessllm-store", "--memory-limit=1MiB", 1),
        ("serverlessllm-partitioned", "--partitions=3", 3),
        ("serverlessllm-partitioned", "--memory-limit=2MiB", 1),
    ] {
        let target = directory.path().join(format!("{format}{option}"));
        run(args![
            "convert",
            source.path(),
            target,
            "--to",
            format,
            option
        ])
        .text();
        let inspection = run(args!["inspect", target, "--json"]).json();
        assert_eq!(inspection["format"], format);
        let files = inspection["files"].as_array().unwrap().len();
        assert_eq!(files, partitions, "{format} {option}");
        assert_eq!(digest(&target), expected, "{format} {option}");
    }
}

#[test]
fn replacing_takes_force() {
    let (_directory, source) = single();
    let target = tempfile::tempdir().unwrap();
    let convert = args![
        "convert",
        source,
        target.path(),
        "--to",
        "serverlessllm-store"
    ];
    run(&convert).text();
    let error = run(&convert).failure(1);
    assert!(error.contains("hint: `--force`"), "{error}");
    run(convert.clone().into_iter().chain(args!["--force"])).text();
    assert_eq!(digest(target.path()), digest(&source));
}

#[test]
fn people_get_a_summary() {
    let (_directory, source) = single();
    let target = tempfile::tempdir().unwrap();
    let convert = args![
        "convert",
        source,
        target.path(),
        "--to",
        "serverlessllm-partitioned"
    ];
    let text = run(convert.clone().into_iter().chain(args!["--dry-run"])).text();
    assert!(text.contains("nothing was written"), "{text}");
    let text = run(&convert).text();
    for label in [
        "from ", "to ", "tensors ", "files ", "time ", "speed ", "note ", "file ",
    ] {
        let found = text.lines().any(|line| line.starts_with(label));
        assert!(found, "{label}: {text}");
    }
    assert!(text.contains("__metadata__ dropped"), "{text}");
}

#[test]
fn options_of_the_other_dialect_are_refused() {
    let (_directory, source) = single();
    let target = tempfile::tempdir().unwrap();
    for (format, option) in [
        ("serverlessllm-store", "--partitions=2"),
        ("serverlessllm-partitioned", "--partition-bytes=1MiB"),
    ] {
        let error = run(args![
            "convert",
            source,
            target.path(),
            "--to",
            format,
            option
        ])
        .failure(1);
        assert!(
            error.contains("hint: `--partitions N` goes with"),
            "{error}"
        );
    }
    let error = run(args![
        "convert",
        source,
        target.path(),
        "--to",
        "serverlessllm-store",
        "--memory-limit=1K"
    ])
    .failure(1);
    assert!(error.contains("hint: `--memory-limit SIZE`"), "{error}");
    assert_eq!(names(target.path()), [""; 0]);
}

#[test]
fn a_target_format_is_needed_and_must_be_one_that_is_written() {
    for arguments in [
        &["convert", "source", "target"][..],
        &["convert", "source", "target", "--to", "safetensors"],
        &[
            "convert",
            "source",
            "target",
            "--to",
            "serverlessllm-store",
            "--partition-bytes=0",
        ],
    ] {
        let error = run(arguments).failure(2);
        assert!(
            error.contains("--to") || error.contains("more than 0"),
            "{error}"
        );
    }
}

/// A conversion that takes long enough to be interrupted, started by a shell after `prelude`.
#[cfg(unix)]
fn slow_conversion(prelude: &str, source: &Path, target: &Path) -> std::process::Child {
    sparse(source, 96 << 20);
    let program = env!("CARGO_BIN_EXE_tensora");
    let script = format!(
        "{prelude} exec '{program}' convert \"$0\" \"$1\" --to serverlessllm-store \
         --memory-limit 1MiB"
    );
    std::process::Command::new("sh")
        .arg("-c")
        .arg(script)
        .args([source, target])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap()
}

/// Sends the signal when the conversion is under way.
#[cfg(unix)]
fn signal(child: &std::process::Child, target: &Path, name: &str) {
    use std::time::{Duration, Instant};

    // A temporary file is there.
    let deadline = Instant::now() + Duration::from_secs(20);
    while !target.exists() || names(target).is_empty() {
        assert!(Instant::now() < deadline, "nothing was written");
        std::thread::sleep(Duration::from_millis(1));
    }
    // Not waited for yet, so the number is still the child's, even if it has ended.
    let kill = std::process::Command::new("kill")
        .args([&format!("-{name}"), &child.id().to_string()])
        .status();
    assert!(kill.unwrap().success());
}

/// An interrupt ends a conversion early and leaves nothing behind, wherever it comes.
#[cfg(unix)]
#[test]
fn an_interrupt_removes_what_was_written() {
    for (name, status) in [("INT", 130), ("TERM", 143), ("HUP", 129)] {
        let directory = tempfile::tempdir().unwrap();
        let source = directory.path().join("model.safetensors");
        let target = directory.path().join("out");
        let child = slow_conversion("", &source, &target);
        signal(&child, &target, name);
        let answer = crate::support::Answer::from(child.wait_with_output().unwrap());
        // A signal that comes while the last file is renamed comes too late to stop anything.
        if answer.status == Some(0) {
            assert_eq!(names(&target), ["tensor.data_0", "tensor_index.json"]);
        } else {
            assert!(answer.failure(status).contains("cancelled"));
            assert!(
                !target.exists() || names(&target).is_empty(),
                "{name}: {:?}",
                names(&target)
            );
        }
    }
}

/// What `nohup` promises.
#[cfg(target_os = "linux")]
#[test]
fn a_signal_that_was_ignored_stays_ignored() {
    for name in ["INT", "TERM", "HUP"] {
        let directory = tempfile::tempdir().unwrap();
        let source = directory.path().join("model.safetensors");
        let target = directory.path().join("out");
        let child = slow_conversion(&format!("trap '' {name};"), &source, &target);
        signal(&child, &target, name);
        crate::support::Answer::from(child.wait_with_output().unwrap()).text();
        assert_eq!(names(&target), ["tensor.data_0", "tensor_index.json"]);
    }
}

/// A limit on file sizes (`ulimit -f`) is an error like a full disk, not a death.
#[cfg(target_os = "linux")]
#[test]
fn a_limit_on_file_sizes_is_an_error_that_leaves_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("model.safetensors");
    let target = directory.path().join("out");
    // Blocks of 512 bytes or of 1 KiB, depending on the shell; 8 MiB or 16 of 96.
    let child = slow_conversion("ulimit -f 16384;", &source, &target);
    let error = crate::support::Answer::from(child.wait_with_output().unwrap()).failure(1);
    assert!(error.contains("limit on file sizes"), "{error}");
    assert!(error.contains("ulimit -f"), "{error}");
    assert!(!target.exists(), "{:?}", names(&target));
}

/// Buffers make do with what is left.
#[cfg(target_os = "linux")]
#[test]
fn buffers_are_as_large_as_data_and_machine_allow() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("model.safetensors");
    let target = directory.path().join("out");
    // Room for less than the 96 MiB that the buffers would take.
    let program = env!("CARGO_BIN_EXE_tensora");
    let convert = |prelude: &str| {
        let script = format!(
            "{prelude} exec '{program}' convert \"$0\" \"$1\" --to serverlessllm-store --force --json"
        );
        let output = std::process::Command::new("sh")
            .args(["-c", &script])
            .args([&source, &target])
            .output();
        crate::support::Answer::from(output.unwrap()).json()["buffer_bytes"]
            .as_u64()
            .unwrap()
    };
    sparse(&source, 96 << 20);
    let shrunk = convert("ulimit -v 100000;");
    assert!(shrunk < 50 << 20, "{shrunk}");
    sparse(&source, 400_000);
    let small = convert("");
    assert!((400_000..420_000).contains(&small), "{small}");
}

/// What the command can do is said, not what a library could.
#[test]
fn a_dtype_without_a_name_in_the_target_has_to_stay_where_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("model.safetensors");
    let header = r#"{"t.F4":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}"#;
    let mut contents = (header.len() as u64).to_le_bytes().to_vec();
    contents.extend(header.as_bytes());
    contents.push(0);
    fs::write(&source, contents).unwrap();
    let target = directory.path().join("out");
    let error = run(args!["convert", source, target, "--to=serverlessllm-store"]).failure(1);
    for part in ["t.F4", "has no name for the dtype F4", "stay safetensors"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert!(!error.contains("write SafeTensors"), "{error}");
}
