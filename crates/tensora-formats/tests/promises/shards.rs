//! SafeTensors checkpoints of several files.

use tensora_formats::{CheckpointIndex, Error, Format, Note, OpenOptions, UnlistedTensors};

use crate::fixture::{Directory, assert_refused, index, safetensors, shard};

const INDEX: &str = "model.safetensors.index.json";

/// Two shards and their index.
fn sharded() -> Directory {
    let directory = Directory::new();
    directory.write("one.safetensors", shard(&["a", "c"]));
    directory.write("two.safetensors", shard(&["b"]));
    directory.write(
        INDEX,
        index(&[
            ("a", "one.safetensors"),
            ("b", "two.safetensors"),
            ("c", "one.safetensors"),
        ]),
    );
    directory
}

#[test]
fn a_sharded_checkpoint() {
    let directory = sharded();
    for path in [directory.path().to_owned(), directory.join(INDEX)] {
        let index = CheckpointIndex::open(path).unwrap();
        assert_eq!(index.format(), Format::Safetensors);
        assert_eq!(index.root(), directory.path());
        let files: Vec<&str> = index
            .files()
            .iter()
            .map(|file| file.name.as_str())
            .collect();
        assert_eq!(files, ["one.safetensors", "two.safetensors"]);
        let tensors: Vec<(&str, usize)> = index
            .tensors()
            .iter()
            .map(|tensor| (tensor.name.as_str(), tensor.file))
            .collect();
        assert_eq!(tensors, [("a", 0), ("b", 1), ("c", 0)]);
        assert_eq!(
            index.tensor("c").unwrap().range().end,
            index.files()[0].bytes
        );
        assert_eq!(index.tensor("d"), None);
        assert_eq!(index.data_bytes(), 3);
        assert_eq!(index.notes(), []);
    }
}

#[test]
fn the_index_decides_which_files_belong() {
    let directory = sharded();
    directory.write("consolidated.safetensors", shard(&["a", "b", "c"]));
    directory.write("._one.safetensors", "by-product of macOS");
    let index = CheckpointIndex::open(directory.path()).unwrap();
    assert_eq!(index.tensors().len(), 3);
    assert_eq!(
        index.notes(),
        [Note::FilesLeftAlone {
            files: vec!["consolidated.safetensors".to_owned()]
        }]
    );
    assert!(
        index.notes()[0]
            .to_string()
            .contains("consolidated.safetensors")
    );
}

#[test]
fn missing_shards_are_listed_together() {
    let directory = Directory::new();
    let names: Vec<String> = (0..9).map(|n| format!("{n}.safetensors")).collect();
    let map: Vec<(&str, &str)> = names.iter().map(|n| (n.as_str(), n.as_str())).collect();
    let index_path = directory.write(INDEX, index(&map));
    directory.write("4.safetensors", shard(&["4.safetensors"]));
    assert_refused!(
        CheckpointIndex::open(directory.path()),
        Error::MissingShards { .. },
        index_path.display(),
        "8 shards missing",
        r#""0.safetensors""#,
        "and 3 more",
    );
}

#[test]
fn missing_shards_are_noticed_by_their_numbers_too() {
    let directory = Directory::new();
    directory.write("model-00001-of-00003.safetensors", shard(&["a"]));
    directory.write("model-00003-of-00003.safetensors", shard(&["c"]));
    assert_refused!(
        CheckpointIndex::open(directory.path()),
        Error::MissingShards { .. },
        directory.path().display(),
        "model-00002-of-00003.safetensors",
    );
}

#[test]
fn tensor_not_in_shard() {
    let directory = sharded();
    directory.write("two.safetensors", shard(&["other"]));
    assert_refused!(
        CheckpointIndex::open(directory.path()),
        Error::TensorNotInShard { .. },
        directory.join(INDEX).display(),
        r#"tensor "b""#,
        r#""two.safetensors""#,
    );
    directory.write("two.safetensors", shard(&["a", "c"]));
    directory.write("one.safetensors", shard(&["b"]));
    assert_refused!(
        CheckpointIndex::open(directory.path()),
        Error::TensorNotInShard { .. },
        r#"tensor "a" is mapped to "one.safetensors""#,
        r#"("two.safetensors" does)"#,
        "2 more",
    );
}

#[test]
fn tensor_in_two_shards() {
    let directory = sharded();
    directory.write("two.safetensors", shard(&["b", "c"]));
    assert_refused!(
        CheckpointIndex::open(directory.path()),
        Error::TensorInTwoShards { .. },
        directory.join(INDEX).display(),
        r#"tensor "c""#,
        r#""one.safetensors" and "two.safetensors""#,
        "download the index and both shards again",
    );
}

#[test]
fn unlisted_tensors_are_refused_or_ignored() {
    let directory = sharded();
    directory.write("two.safetensors", shard(&["b", "x", "y"]));
    assert_refused!(
        CheckpointIndex::open(directory.path()),
        Error::UnlistedTensors { .. },
        directory.join(INDEX).display(),
        "2 tensors",
        r#""x", "y""#,
    );
    let index = OpenOptions::new()
        .unlisted_tensors(UnlistedTensors::Ignore)
        .open(directory.path())
        .unwrap();
    assert_eq!(index.tensors().len(), 3);
    assert_eq!(
        index.notes(),
        [Note::TensorsIgnored {
            tensors: vec!["x".to_owned(), "y".to_owned()]
        }]
    );
}

#[test]
fn unsafe_file_names() {
    let directory = Directory::new();
    let path = directory.write("outside.safetensors", shard(&["t"]));
    let absolute = path.to_str().unwrap();
    for (name, reason) in [
        ("", "empty"),
        (absolute, "absolute"),
        ("../outside.safetensors", "climbs"),
        ("x/../../outside.safetensors", "climbs"),
        (r"\\server\\x", "absolute"),
        (r"..\\x", "climbs"),
        ("C:x", "drive"),
        (r"a\u0000b", "NUL"),
    ] {
        let index_path = directory.write(&format!("inside/{INDEX}"), index(&[("t", name)]));
        assert_refused!(
            CheckpointIndex::open(directory.join("inside")),
            Error::UnsafeFileName { .. },
            index_path.display(),
            r#"tensor "t""#,
            reason,
        );
    }
}

#[cfg(unix)]
#[test]
fn a_sub_directory_may_not_be_a_link_to_elsewhere() {
    use std::os::unix::fs::symlink;

    let directory = Directory::new();
    directory.write("outside/s.safetensors", shard(&["t"]));
    directory.write("root/below/real/s.safetensors", shard(&["t"]));
    let root = directory.join("root");
    symlink("../outside", root.join("link")).unwrap();
    symlink("../../outside", root.join("below/link")).unwrap();
    symlink("below/real", root.join("inner")).unwrap();
    symlink(
        "../../outside/s.safetensors",
        root.join("below/s.safetensors"),
    )
    .unwrap();
    let open = |name: &str| {
        directory.write(&format!("root/{INDEX}"), index(&[("t", name)]));
        CheckpointIndex::open(&root)
    };
    for name in [
        "link/s.safetensors",
        "below/link/s.safetensors",
        "link/gone",
    ] {
        assert_refused!(
            open(name),
            Error::UnsafeFileName { .. },
            root.join(INDEX).display(),
            r#"tensor "t""#,
            name,
            "symbolic link",
        );
    }
    // Links that stay inside, and a last component that is a link, as in a Hugging Face cache.
    for name in [
        "inner/s.safetensors",
        "below/s.safetensors",
        "./inner/s.safetensors",
    ] {
        assert_eq!(open(name).unwrap().tensors().len(), 1, "{name}");
    }
    assert_refused!(
        open("nowhere/s.safetensors"),
        Error::MissingShards { .. },
        "nowhere",
    );
}

#[test]
fn index_keys() {
    let directory = Directory::new();
    for (text, expected) in [
        ("{}", r#"no "weight_map""#),
        (r#"{"metadata":{}}"#, r#"no "weight_map""#),
    ] {
        let path = directory.write(INDEX, text);
        assert_refused!(
            CheckpointIndex::open(directory.path()),
            Error::MissingKey { .. },
            path.display(),
            expected,
        );
    }
    for (text, key) in [
        (r#"{"weight_map":{},"weight_map":{}}"#, "weight_map"),
        (
            r#"{"metadata":{},"weight_map":{},"metadata":{}}"#,
            "metadata",
        ),
    ] {
        directory.write(INDEX, text);
        assert_refused!(
            CheckpointIndex::open(directory.path()),
            Error::DuplicateKey { .. },
            INDEX,
            key,
            "twice",
        );
    }
    for (text, key, found) in [
        ("[]", "the index", "an array"),
        (r#"{"weight_map":[]}"#, "weight_map", "an array"),
        (r#"{"weight_map":{"t":1}}"#, "weight_map.t", "a number"),
        (r#"{"weight_map":{},"metadata":3}"#, "metadata", "a number"),
    ] {
        directory.write(INDEX, text);
        assert_refused!(
            CheckpointIndex::open(directory.path()),
            Error::UnexpectedValue { .. },
            INDEX,
            key,
            found,
        );
    }
    directory.write(INDEX, "{\"weight_map\":\n{\"t\":}}");
    assert_refused!(
        CheckpointIndex::open(directory.path()),
        Error::Json { .. },
        INDEX,
        "line 2"
    );
    directory.write(INDEX, b"{\"\xff\":1}");
    assert_refused!(
        CheckpointIndex::open(directory.path()),
        Error::NotUtf8 { .. },
        INDEX,
        "byte 2"
    );
}

#[test]
fn an_empty_weight_map() {
    let directory = sharded();
    let path = directory.write(INDEX, r#"{"weight_map":{}}"#);
    for opened in [directory.path(), &path] {
        assert_refused!(
            CheckpointIndex::open(opened),
            Error::EmptyWeightMap { .. },
            path.display(),
            r#""one.safetensors", "two.safetensors""#,
            "download the index again",
        );
    }
    // With no file beside it, it says nothing false.
    let directory = Directory::new();
    directory.write(INDEX, r#"{"weight_map":{}}"#);
    let index = CheckpointIndex::open(directory.path()).unwrap();
    assert_eq!((index.tensors().len(), index.files().len()), (0, 0));
}

#[test]
fn a_tensor_twice_in_the_weight_map() {
    let directory = sharded();
    directory.write(
        INDEX,
        index(&[
            ("a", "one.safetensors"),
            ("b", "gone.safetensors"),
            ("b", "two.safetensors"),
            ("c", "one.safetensors"),
        ]),
    );
    assert_refused!(
        CheckpointIndex::open(directory.path()),
        Error::DuplicateTensor { .. },
        directory.join(INDEX).display(),
        r#""b""#,
    );
    let last_wins = OpenOptions::new().duplicate_names(tensora_formats::DuplicateNames::LastWins);
    // The file that only the losing entry names is not missed.
    assert_eq!(last_wins.open(directory.path()).unwrap().tensors().len(), 3);
}

#[test]
fn an_index_of_absurd_size_is_not_read() {
    let directory = Directory::new();
    let path = directory.write(INDEX, "");
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(100_000_001).unwrap();
    assert_refused!(
        CheckpointIndex::open(directory.path()),
        Error::IndexTooLarge { .. },
        path.display(),
        "100000001",
        "100000000",
    );
}

#[test]
fn a_wrong_total_is_noted() {
    let directory = sharded();
    let text = index(&[
        ("a", "one.safetensors"),
        ("b", "two.safetensors"),
        ("c", "one.safetensors"),
    ]);
    let with_total = |total: &str| {
        text.replacen(
            '{',
            &format!(r#"{{"metadata":{{"total_size":{total}}},"#),
            1,
        )
    };
    directory.write(INDEX, with_total("3"));
    assert_eq!(CheckpointIndex::open(directory.path()).unwrap().notes(), []);
    directory.write(INDEX, with_total("4"));
    let index = CheckpointIndex::open(directory.path()).unwrap();
    assert_eq!(
        index.notes(),
        [Note::TotalSizeDiffers {
            index: INDEX.to_owned(),
            stated_bytes: 4,
            actual_bytes: 3,
        }]
    );
    assert!(index.notes()[0].to_string().contains("4 bytes"));
}

#[test]
fn without_an_index_all_files_belong() {
    let directory = Directory::new();
    directory.write("b.safetensors", shard(&["x"]));
    directory.write("a.safetensors", shard(&["z", "y"]));
    directory.write("._a.safetensors", "by-product of macOS");
    directory.write("config.json", "{}");
    let index = CheckpointIndex::open(directory.path()).unwrap();
    let tensors: Vec<(&str, usize)> = index
        .tensors()
        .iter()
        .map(|tensor| (tensor.name.as_str(), tensor.file))
        .collect();
    assert_eq!(tensors, [("x", 1), ("y", 0), ("z", 0)]);
}

#[test]
fn without_an_index_a_tensor_may_not_be_in_two_files() {
    let directory = Directory::new();
    directory.write("model.safetensors", shard(&["x"]));
    directory.write("other.safetensors", shard(&["w", "x"]));
    assert_refused!(
        CheckpointIndex::open(directory.path()),
        Error::TensorInTwoFiles { .. },
        directory.path().display(),
        r#""x""#,
        r#""model.safetensors" and "other.safetensors""#,
    );
    std::fs::remove_file(directory.join("other.safetensors")).unwrap();
    directory.write("consolidated.safetensors", shard(&["x"]));
    assert_refused!(
        CheckpointIndex::open(directory.path()),
        Error::TensorInTwoFiles { .. },
        "second time",
    );
}

#[test]
fn metadata_is_merged() {
    let with_metadata = |metadata: &str, tensor: &str| {
        safetensors(
            &format!(
                r#"{{"__metadata__":{metadata},"{tensor}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}}}"#
            ),
            0,
        )
    };
    let directory = Directory::new();
    directory.write(
        "1.safetensors",
        with_metadata(r#"{"format":"pt","k":"1"}"#, "a"),
    );
    directory.write(
        "2.safetensors",
        with_metadata(r#"{"format":"pt","k":"2"}"#, "b"),
    );
    directory.write("3.safetensors", with_metadata(r#"{"l":"3","k":"3"}"#, "c"));
    let index = CheckpointIndex::open(directory.path()).unwrap();
    let metadata: Vec<(&str, &str)> = index
        .metadata()
        .iter()
        .map(|(key, value)| (key.as_str(), value.as_str()))
        .collect();
    assert_eq!(metadata, [("format", "pt"), ("k", "1"), ("l", "3")]);
    assert_eq!(
        index.notes(),
        [Note::MetadataConflict {
            key: "k".to_owned(),
            kept: "1".to_owned(),
            file: "2.safetensors".to_owned(),
            dropped: "2".to_owned(),
        }]
    );
    assert!(index.notes()[0].to_string().contains("2.safetensors"));
}

#[test]
fn an_error_inside_a_shard_names_the_shard() {
    let directory = sharded();
    let path = directory.write("two.safetensors", safetensors("{}", 3));
    assert_refused!(
        CheckpointIndex::open(directory.path()),
        Error::TrailingBytes { .. },
        path.display(),
    );
}
