use std::ffi::OsString;
use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::support::{
    TENSOR_COUNT, args, assert_fields, available, data_bytes, digest, names, ranks, run, sharded,
    single, sparse, strided, tied,
};

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
    ("reading", "object"),
];

const FORMATS: [&str; 3] = [
    "safetensors",
    "serverlessllm-store",
    "serverlessllm-partitioned",
];

/// `convert SOURCE TARGET --to FORMAT`, and options.
fn convert(source: &Path, target: &Path, format: &str, options: &[&str]) -> Vec<OsString> {
    let arguments = args!["convert", source, target, "--to", format];
    let options = options.iter().map(OsString::from);
    arguments.into_iter().chain(options).collect()
}

#[test]
fn a_dry_run_says_what_a_run_writes_and_writes_nothing() {
    let source = sharded();
    fs::write(source.path().join("config.json"), "{}").unwrap();
    let directory = tempfile::tempdir().unwrap();
    for (format, companion) in [
        ("serverlessllm-store", "--companions"),
        ("safetensors", "--companions"),
        ("serverlessllm-partitioned", "--verify"),
    ] {
        let target = directory.path().join(format);
        let dry = convert(
            source.path(),
            &target,
            format,
            &["--json", companion, "--dry-run"],
        );
        let dry = run(dry).json();
        assert_fields(&dry, FIELDS);
        assert_eq!(dry["dry_run"], true);
        assert_eq!(dry.get("elapsed_seconds"), None);
        assert!(!target.exists());

        let wet = run(convert(
            source.path(),
            &target,
            format,
            &["--json", companion],
        ));
        let wet = wet.json();
        assert_fields(&wet, FIELDS);
        assert_fields(
            &wet,
            &[
                ("elapsed_seconds", "number"),
                ("bytes_per_second", "number"),
                ("buffer_bytes", "count"),
                ("direct_bytes", "count"),
                ("resumed_files", "count"),
                ("resumed_bytes", "count"),
                ("verified", "boolean"),
            ],
        );
        assert_eq!(wet["dry_run"], false);
        assert_eq!(wet["verified"], companion == "--verify");
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
            assert_fields(
                file,
                &[
                    ("path", "string"),
                    ("kind", "string"),
                    ("bytes", "count"),
                    ("tensor_count", "count"),
                    ("data_offset", "count"),
                    ("padding_bytes", "count"),
                ],
            );
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
}

/// What people see before they decide, to the letter.
#[test]
fn a_dry_run_reads_well() {
    let (_directory, source) = single();
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("out");
    let options = ["--shards=2", "--align=4KiB", "--backend=sync", "--dry-run"];
    let text = run(convert(&source, &target, "safetensors", &options)).text();
    let (facts, table) = text.split_once("\n\n").unwrap();
    let labels: Vec<&str> = facts
        .lines()
        .map(|line| line.split("  ").next().unwrap().trim_end())
        .collect();
    assert_eq!(
        labels,
        [
            "from", "to", "target", "tensors", "files", "reading", "free", "dry run"
        ],
        "{facts}"
    );
    assert!(facts.contains("reading  sync, "), "{facts}");
    assert!(facts.ends_with("nothing was written"), "{facts}");
    let expected = "\
file                              tensors      size   bytes  data at  aligned to  padding
──────────────────────────────────────────────────────────────────────────────────────────
model-00001-of-00002.safetensors        4  66.8 KiB  68,356    4,096           4        0
model-00002-of-00002.safetensors        4  36.1 KiB  36,927    4,096       4,096        0
model.safetensors.index.json                  519 B     519
";
    assert_eq!(table, expected, "{table}");
}

/// What a dry run with `--force` would replace is listed file by file.
#[test]
fn a_dry_run_names_what_would_be_gone() {
    let source = sharded();
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("out");
    let format = "serverlessllm-store";
    let first = ["--partition-bytes=40KiB", "--checksums"];
    run(convert(source.path(), &target, format, &first)).text();
    fs::write(target.join("config.json"), "{}").unwrap();
    let mut old = names(&target);
    old.retain(|name| name != "config.json");
    let again = ["--force", "--dry-run"];
    let text = run(convert(source.path(), &target, format, &again)).text();
    let (facts, _) = text.split_once("\n\n").unwrap();
    let mut listed = facts
        .lines()
        .skip_while(|line| !line.starts_with("replaces "));
    for name in &old {
        let line = listed.next().unwrap();
        assert!(line.ends_with(&format!(" {name}")), "{name}: {facts}");
    }
    assert!(listed.next().unwrap().starts_with("dry run "), "{facts}");
    let again = ["--force", "--dry-run", "--json"];
    let dry = run(convert(source.path(), &target, format, &again)).json();
    assert_eq!(dry["replaced_files"], serde_json::json!(old));
    // There is nothing in a new directory.
    let new = directory.path().join("new");
    let dry = run(convert(source.path(), &new, format, &again)).json();
    assert_eq!(dry["replaced_files"], serde_json::json!([]));
}

/// What `inspect` says of a source that is not quite right, a conversion says, too.
#[test]
fn the_notes_of_the_source_are_shown() {
    let source = sharded();
    // The last shard again, with another value for a key.
    let shard = source.path().join("model-00003-of-00003.safetensors");
    let text = fs::read(&shard).unwrap();
    let place = text.windows(4).position(|word| word == b"\"pt\"").unwrap();
    let mut changed = text;
    changed[place..place + 4].copy_from_slice(b"\"np\"");
    fs::write(&shard, changed).unwrap();
    let (_directory, other) = single();
    fs::copy(other, source.path().join("consolidated.safetensors")).unwrap();
    fs::create_dir(source.path().join("1_Pooling")).unwrap();
    fs::write(source.path().join("tensora.blake3"), "").unwrap();
    let inspection = run(args!["inspect", source.path(), "--json"]).json();
    let expected: Vec<&str> = inspection["notes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|note| note.as_str().unwrap())
        .collect();
    assert_eq!(expected.len(), 2, "{expected:?}");
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("out");
    for options in [&["--json", "--dry-run"][..], &["--json"]] {
        let report = run(convert(source.path(), &target, "safetensors", options)).json();
        let notes: Vec<&str> = report["notes"]
            .as_array()
            .unwrap()
            .iter()
            .map(|note| note.as_str().unwrap())
            .collect();
        for part in expected
            .iter()
            .copied()
            .chain(["1_Pooling", "tensora.blake3"])
        {
            let found = notes.iter().filter(|note| note.contains(part)).count();
            assert_eq!(found, 1, "{part}: {notes:?}");
        }
    }
    let options = ["--force", "--dry-run"];
    let text = run(convert(source.path(), &target, "safetensors", &options)).text();
    for part in [
        "consolidated.safetensors",
        "np",
        "1_Pooling",
        "tensora.blake3",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn every_format_becomes_every_other() {
    let source = sharded();
    let expected = digest(source.path());
    let directory = tempfile::tempdir().unwrap();
    for from in FORMATS {
        let first = directory.path().join(from);
        run(convert(source.path(), &first, from, &[])).text();
        for to in FORMATS {
            let second = directory.path().join(format!("{from}-{to}"));
            let options = ["--verify", "--checksums", "--json"];
            let report = run(convert(&first, &second, to, &options)).json();
            assert_eq!(report["source_format"], from);
            assert_eq!(report["target_format"], to);
            assert_eq!(report["digest"], expected, "{from} to {to}");
            assert_eq!(report["verified"], true, "{from} to {to}");
            assert_eq!(digest(&second), expected, "{from} to {to}");
            let inspection = run(args!["inspect", second, "--json"]).json();
            assert_eq!(inspection["format"], to);
        }
    }
}

#[test]
fn files_are_as_many_and_as_large_as_was_asked_for() {
    let source = sharded();
    let expected = digest(source.path());
    let directory = tempfile::tempdir().unwrap();
    for (format, option, files) in [
        ("serverlessllm-store", "--partition-bytes=40KiB", 3),
        ("serverlessllm-store", "--memory-limit=1MiB", 1),
        ("serverlessllm-partitioned", "--partitions=3", 3),
        ("serverlessllm-partitioned", "--partition-bytes=40KiB", 3),
        ("serverlessllm-partitioned", "--memory-limit=2MiB", 1),
        ("safetensors", "--shards=4", 4),
        ("safetensors", "--shard-bytes=70KB", 2),
        ("safetensors", "--align=4KiB", 1),
    ] {
        let target = directory.path().join(format!("{format}{option}"));
        run(convert(source.path(), &target, format, &[option])).text();
        let inspection = run(args!["inspect", target, "--json"]).json();
        assert_eq!(inspection["format"], format);
        let found = inspection["files"].as_array().unwrap().len();
        assert_eq!(found, files, "{format} {option}");
        assert_eq!(digest(&target), expected, "{format} {option}");
        if option == "--align=4KiB" {
            let tensors = inspection["tensors"].as_array().unwrap();
            let first = tensors.iter().map(|tensor| &tensor["offset"]);
            assert_eq!(first.filter_map(Value::as_u64).min(), Some(4096));
        }
    }
}

/// A backend that was named reads, and is not replaced.
#[test]
fn the_backend_is_the_named_one() {
    let (_directory, source) = single();
    let directory = tempfile::tempdir().unwrap();
    for kind in tensora::BackendKind::ALL {
        let target = directory.path().join(kind.as_str());
        let options = [format!("--backend={kind}"), "--json".to_owned()];
        let options = [options[0].as_str(), options[1].as_str()];
        let answer = run(convert(&source, &target, "serverlessllm-store", &options));
        if available(kind, "a conversion by this backend") {
            assert_eq!(answer.json()["reading"]["backend"], kind.as_str());
            assert_eq!(digest(&target), digest(&source));
        } else {
            let error = answer.failure(1);
            assert!(error.contains("tensora doctor"), "{error}");
            assert!(!target.exists());
        }
    }
}

#[test]
fn metadata_is_kept_and_added_to() {
    let (_directory, source) = single();
    let target = tempfile::tempdir().unwrap();
    let options = ["--metadata=author=me", "--metadata", "note=a=b"];
    run(convert(&source, target.path(), "safetensors", &options)).text();
    let metadata = &run(args!["inspect", target.path(), "--json"]).json()["metadata"];
    assert_eq!(
        metadata,
        &serde_json::json!({"author": "me", "format": "pt", "note": "a=b"})
    );
    let bad = convert(
        &source,
        target.path(),
        "safetensors",
        &["--metadata=author"],
    );
    assert!(run(bad).failure(2).contains("KEY=VALUE"));
    let twice = ["--metadata=a=1", "--metadata=a=2", "--force"];
    let error = run(convert(&source, target.path(), "safetensors", &twice)).failure(1);
    assert!(error.contains("gives \"a\" twice"), "{error}");
}

#[test]
fn companions_are_copied_on_request_and_named_otherwise() {
    let source = sharded();
    for name in ["config.json", "tokenizer.json"] {
        fs::write(source.path().join(name), name).unwrap();
    }
    let directory = tempfile::tempdir().unwrap();
    let without = directory.path().join("without");
    let text = run(convert(source.path(), &without, "safetensors", &[])).text();
    assert!(
        text.contains("\"config.json\", \"tokenizer.json\""),
        "{text}"
    );
    assert!(!without.join("config.json").exists());
    let with = directory.path().join("with");
    run(convert(
        source.path(),
        &with,
        "safetensors",
        &["--companions"],
    ))
    .text();
    for name in ["config.json", "tokenizer.json"] {
        assert_eq!(fs::read_to_string(with.join(name)).unwrap(), name);
    }
}

#[test]
fn tied_tensors_are_refused_or_duplicated_where_they_cannot_stay_tied() {
    let source = tied();
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("refused");
    let error = run(convert(source.path(), &target, "safetensors", &[])).failure(1);
    for part in ["\"embed\"", "\"lm_head\"", "hint: `--tied duplicate`"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert!(!target.exists());
    let target = directory.path().join("duplicated");
    let duplicated = convert(source.path(), &target, "safetensors", &["--tied=duplicate"]);
    let text = run(duplicated).text();
    assert!(text.contains("stored separately"), "{text}");
    assert_eq!(digest(&target), digest(source.path()));
    // Where sharing can be expressed, nothing has to be said.
    let target = directory.path().join("tied");
    let kept = convert(
        source.path(),
        &target,
        "serverlessllm-partitioned",
        &["--json"],
    );
    assert_eq!(run(kept).json()["data_bytes"], 16);
    assert_eq!(digest(&target), digest(source.path()));
}

#[test]
fn strides_are_gathered_where_the_target_has_none() {
    let source = strided();
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("gathered");
    let text = run(convert(source.path(), &target, "safetensors", &[])).text();
    assert!(text.contains("\"transposed\""), "{text}");
    assert_eq!(digest(&target), digest(source.path()));
}

#[test]
fn ranks_stay_ranks_or_become_one_checkpoint() {
    let source = ranks();
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("ranks");
    run(convert(
        source.path(),
        &target,
        "serverlessllm-partitioned",
        &[],
    ))
    .text();
    assert_eq!(names(&target), ["rank_0", "rank_1"]);
    assert_eq!(digest(&target), digest(source.path()));
    let target = directory.path().join("joined");
    let text = run(convert(source.path(), &target, "safetensors", &[])).text();
    assert!(text.contains("2 ranks become one checkpoint"), "{text}");
    assert_eq!(digest(&target), digest(source.path()));
    let target = directory.path().join("one");
    let one = convert(source.path(), &target, "safetensors", &["--rank=1"]);
    assert_eq!(
        run(one.into_iter().chain(args!["--json"])).json()["tensor_count"],
        1
    );
}

#[test]
fn replacing_takes_force() {
    let (_directory, source) = single();
    let target = tempfile::tempdir().unwrap();
    for format in FORMATS {
        let target = target.path().join(format);
        run(convert(&source, &target, format, &[])).text();
        let before = names(&target);
        let error = run(convert(&source, &target, format, &[])).failure(1);
        assert!(error.contains("hint: `--force`"), "{error}");
        assert_eq!(names(&target), before);
        run(convert(&source, &target, format, &["--force"])).text();
        assert_eq!(names(&target), before);
        assert_eq!(digest(&target), digest(&source));
    }
}

#[test]
fn people_get_a_summary() {
    let (_directory, source) = single();
    let target = tempfile::tempdir().unwrap();
    let format = "serverlessllm-partitioned";
    let options = ["--verify", "--checksums"];
    let text = run(convert(&source, target.path(), format, &options)).text();
    for label in [
        "from ",
        "to ",
        "tensors ",
        "files ",
        "reading ",
        "time ",
        "speed ",
        "verified ",
        "digest ",
        "note ",
        "file ",
    ] {
        let found = text.lines().any(|line| line.starts_with(label));
        assert!(found, "{label}: {text}");
    }
    assert!(text.contains("__metadata__ dropped"), "{text}");
    assert!(names(target.path()).contains(&"tensora.blake3".to_owned()));
}

#[test]
fn options_of_another_format_are_refused() {
    let (_directory, source) = single();
    let target = tempfile::tempdir().unwrap();
    for (format, option) in [
        ("serverlessllm-store", "--partitions=2"),
        ("serverlessllm-store", "--shards=2"),
        ("serverlessllm-store", "--align=4KiB"),
        ("serverlessllm-partitioned", "--shard-bytes=1MiB"),
        ("serverlessllm-partitioned", "--metadata=a=b"),
        ("safetensors", "--partitions=2"),
        ("safetensors", "--partition-bytes=1MiB"),
    ] {
        let error = run(convert(&source, target.path(), format, &[option])).failure(1);
        assert!(error.contains("hint: `--shards N`"), "{option}: {error}");
    }
    let low = convert(
        &source,
        target.path(),
        "serverlessllm-store",
        &["--memory-limit=1K"],
    );
    let error = run(low).failure(1);
    assert!(error.contains("`--memory-limit SIZE`"), "{error}");
    assert_eq!(names(target.path()), [""; 0]);
}

#[test]
fn wrong_usage_is_told_at_once() {
    for (options, part) in [
        (&[][..], "--to"),
        (&["--to", "gguf"], "safetensors"),
        (&["--to", "safetensor"], "tip: "),
        (&["--to=safetensors", "--align=0"], "more than 0"),
        (&["--to=safetensors", "--partition-bytes=0"], "more than 0"),
        (
            &["--to=safetensors", "--shards=1", "--shard-bytes=1G"],
            "cannot be used with",
        ),
        (
            &["--to=safetensors", "--resume", "--restart"],
            "cannot be used with",
        ),
        (&["--to=safetensors", "--tied=copy"], "duplicate"),
        (&["--to=safetensors", "--verfy"], "'--verify'"),
    ] {
        let arguments = ["convert", "source", "target"];
        let error = run(arguments.iter().chain(options)).failure(2);
        assert!(error.contains(part), "{options:?}: {error}");
    }
}

#[test]
fn places_that_cannot_be_written_to_are_refused_with_a_way_out() {
    let source = sharded();
    let (directory, file) = single();
    let missing = directory.path().join("missing");
    for (from, to, parts) in [
        (
            missing.as_path(),
            missing.as_path(),
            &["no such file", "missing"][..],
        ),
        (source.path(), source.path(), &["directory of the source"]),
        (
            file.as_path(),
            directory.path(),
            &["directory of the source"],
        ),
        (source.path(), file.as_path(), &["is not a directory"]),
    ] {
        let error = run(convert(from, to, "serverlessllm-store", &[])).failure(1);
        for part in parts {
            assert!(error.contains(part), "{part}: {error}");
        }
    }
    // Another kind of checkpoint is not replaced, not even by force.
    let other = tempfile::tempdir().unwrap();
    run(convert(source.path(), other.path(), "safetensors", &[])).text();
    let mixed = convert(
        source.path(),
        other.path(),
        "serverlessllm-store",
        &["--force"],
    );
    let error = run(mixed).failure(1);
    assert!(error.contains("another kind of checkpoint"), "{error}");
}

/// Buffers make do with what is left.
#[cfg(target_os = "linux")]
#[test]
fn buffers_are_as_large_as_data_and_machine_allow() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("model.safetensors");
    let target = directory.path().join("out");
    let program = env!("CARGO_BIN_EXE_tensora");
    let convert = |options: &str| {
        let script = format!(
            "exec '{program}' convert \"$0\" \"$1\" --to serverlessllm-store --force --json {options}"
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
    let limited = convert("--memory-limit 8MiB");
    assert!(limited <= 8 << 20, "{limited}");
    sparse(&source, 400_000);
    let small = convert("");
    assert!((400_000..1 << 20).contains(&small), "{small}");
}

/// Not what the command says of its buffers, but what the kernel says of the process.
#[cfg(target_os = "linux")]
#[test]
fn memory_does_not_grow_with_the_checkpoint() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("model.safetensors");
    let target = directory.path().join("out");
    for format in ["serverlessllm-store", "safetensors"] {
        let peaks = [64 << 20, 512 << 20].map(|bytes| {
            sparse(&source, bytes);
            let options = ["--memory-limit=8MiB", "--json", "--checksums", "--verify"];
            let report = run(convert(&source, &target, format, &options)).json();
            assert_eq!(report["data_bytes"], bytes);
            fs::remove_dir_all(&target).unwrap();
            report["peak_resident_bytes"].as_u64().unwrap()
        });
        let [small, large] = peaks;
        assert!(small > 4 << 20 && large < 64 << 20, "{peaks:?}");
        assert!(large < small + (8 << 20), "{peaks:?}");
    }
}

/// A checkpoint has hundreds of shards, and a process 1,024 descriptors.
#[cfg(target_os = "linux")]
#[test]
fn each_file_is_open_once_while_it_is_converted() {
    const SHARDS: u64 = 60;
    // Each shard twice, for buffered and for direct reads; a few files at a time to verify them; and others.
    const LIMIT: u64 = 2 * SHARDS + 2 * 16 + 24;

    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source");
    fs::create_dir(&source).unwrap();
    let mut weight_map = serde_json::Map::new();
    for shard in 0..SHARDS {
        let name = format!("model-{shard:02}.safetensors");
        let tensor = format!("layers.{shard}.weight");
        let header =
            format!(r#"{{"{tensor}":{{"dtype":"U8","shape":[10000],"data_offsets":[0,10000]}}}}"#);
        let mut contents = (header.len() as u64).to_le_bytes().to_vec();
        contents.extend(header.as_bytes());
        contents.resize(contents.len() + 10_000, 1);
        fs::write(source.join(&name), contents).unwrap();
        weight_map.insert(tensor, name.into());
    }
    let index =
        serde_json::json!({"metadata": {"total_size": 10_000 * SHARDS}, "weight_map": weight_map});
    fs::write(
        source.join("model.safetensors.index.json"),
        index.to_string(),
    )
    .unwrap();
    let output = std::process::Command::new("sh")
        .arg("-c")
        .arg(format!("ulimit -n {LIMIT}; exec \"$0\" \"$@\""))
        .arg(env!("CARGO_BIN_EXE_tensora"))
        .args(convert(
            &source,
            &directory.path().join("out"),
            "safetensors",
            &["--verify", "--checksums", "--shards=60", "--json"],
        ))
        .output()
        .unwrap();
    let report = crate::support::Answer::from(output).json();
    assert_eq!(report["verified"], true);
    assert_eq!(report["files"].as_array().unwrap().len(), 62);
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
    let error = run(convert(&source, &target, "serverlessllm-store", &[])).failure(1);
    for part in ["t.F4", "has no name for the dtype F4", "stay safetensors"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert!(!error.contains("write SafeTensors"), "{error}");
    run(convert(&source, &target, "safetensors", &["--verify"])).text();
}

/// Directories that are missing are made, as deep as they are, with the modes of the umask.
#[cfg(unix)]
#[test]
fn what_is_written_follows_the_umask() {
    use std::os::unix::fs::PermissionsExt;

    let (_directory, source) = single();
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("a/b/out");
    let program = env!("CARGO_BIN_EXE_tensora");
    let script = format!(
        "umask 027; exec '{program}' convert \"$0\" \"$1\" --to serverlessllm-store --checksums"
    );
    let output = std::process::Command::new("sh")
        .args(["-c", &script])
        .args([&source, &target])
        .output();
    crate::support::Answer::from(output.unwrap()).text();
    for name in names(&target) {
        let mode = fs::metadata(target.join(&name))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o640, "{name}");
    }
    assert_eq!(names(&target).len(), 3);
}
