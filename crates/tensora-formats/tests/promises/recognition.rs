//! What a path is taken for, and what is said when it is nothing Tensora knows.

use std::fs;

use tensora_formats::{
    CheckpointIndex, Error, Format, OpenOptions, UNFINISHED_NAME, UnfinishedCheckpoint,
};

use crate::fixture::{Directory, assert_refused, index, shard};

const STORE: &str = r#"{"s":[0,4,[1],[1],"torch.float32"]}"#;
const PARTITIONED: &str = r#"{"p":[0,4,[1],[1],"f32",0]}"#;

fn write_store(directory: &Directory, below: &str) {
    directory.write(&format!("{below}tensor_index.json"), STORE);
    directory.write(&format!("{below}tensor.data_0"), [0; 8]);
}

#[test]
fn a_single_file_under_any_name() {
    let directory = Directory::new();
    for name in ["model.safetensors", "weights.bin", "no extension"] {
        let path = directory.write(name, shard(&["t"]));
        let index = CheckpointIndex::open(&path).unwrap();
        assert_eq!(index.format(), Format::Safetensors);
        assert_eq!(index.root(), directory.path());
        assert_eq!(index.files()[0].path, path);
        assert_eq!(index.files()[0].name, name);
        assert_eq!(index.files()[0].bytes, fs::metadata(&path).unwrap().len());
    }
}

#[test]
fn not_found() {
    assert_refused!(
        CheckpointIndex::open("Qwen/Qwen3-0.6B"),
        Error::NotFound { .. },
        "Qwen/Qwen3-0.6B",
        "local path",
    );
}

#[test]
fn an_empty_directory_says_what_was_looked_for() {
    let directory = Directory::new();
    assert_refused!(
        CheckpointIndex::open(directory.path()),
        Error::NoCheckpoint { .. },
        directory.path().display(),
        "*.safetensors.index.json",
        "tensor_index.json",
        "rank_N",
        "snapshots/",
        "directory is empty",
    );
    directory.write("notes.txt", "x");
    // A log directory by that name is no rank, and hidden files are no checkpoint.
    directory.write("rank_0/log.txt", "x");
    directory.write("._model.safetensors", "x");
    assert_refused!(
        CheckpointIndex::open(directory.path()),
        Error::NoCheckpoint { .. },
        r#"found "._model.safetensors", "notes.txt", "rank_0""#,
    );
}

#[test]
fn a_directory_of_another_format() {
    let directory = Directory::new();
    directory.write("config.json", "{}");
    directory.write("pytorch_model.bin", "x");
    directory.write("model-Q4_K_M.GGUF", "x");
    directory.write(".hidden.bin", "x");
    directory.write("cache/snapshots/0000/flax_model.msgpack", "x");
    for (path, files) in [
        (
            directory.path().to_owned(),
            r#": "model-Q4_K_M.GGUF", "pytorch_model.bin";"#,
        ),
        (directory.join("cache"), r#": "flax_model.msgpack";"#),
    ] {
        assert_refused!(
            CheckpointIndex::open(&path),
            Error::ForeignDirectory { .. },
            path.display(),
            files,
            "does not read",
            "convert them, or download",
        );
    }
    directory.write("model.safetensors", shard(&["t"]));
    assert!(CheckpointIndex::open(directory.path()).is_ok());
}

#[test]
fn git_lfs_pointers() {
    let pointer = "version https://git-lfs.github.com/spec/v1\n\
        oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n\
        size 4976698672\n";
    let directory = Directory::new();
    let path = directory.write("model.safetensors", pointer);
    let by_directory = CheckpointIndex::open(directory.path());
    for result in [CheckpointIndex::open(&path), by_directory] {
        assert_refused!(
            result,
            Error::GitLfsPointer {
                bytes: Some(4_976_698_672),
                ..
            },
            path.display(),
            "4976698672 bytes",
            "git lfs pull",
        );
    }

    let directory = Directory::new();
    let path = directory.write("model.safetensors.index.json", pointer);
    assert_refused!(
        CheckpointIndex::open(directory.path()),
        Error::GitLfsPointer { .. },
        path.display(),
    );

    let directory = Directory::new();
    write_store(&directory, "");
    let path = directory.write("tensor.data_0", pointer);
    assert_refused!(
        CheckpointIndex::open(directory.path()),
        Error::GitLfsPointer { .. },
        path.display(),
    );
}

#[test]
fn foreign_files() {
    let directory = Directory::new();
    let path = directory.write("model.gguf", b"GGUF\x03\0\0\0\x23\x01\0\0\0\0\0\0");
    assert_refused!(
        CheckpointIndex::open(&path),
        Error::ForeignFile { .. },
        path.display(),
        "GGUF",
        "convert",
    );
    let path = directory.write("config.json", "{\"architectures\": []}");
    assert_refused!(
        CheckpointIndex::open(path),
        Error::ForeignFile { .. },
        "JSON"
    );
    // Noise is not called anything that it may not be.
    let path = directory.write("noise", [0xaa; 64]);
    assert_refused!(
        CheckpointIndex::open(path),
        Error::HeaderTooLarge { .. },
        "noise"
    );
}

#[test]
fn which_index() {
    let directory = Directory::new();
    directory.write("a.safetensors", shard(&["a"]));
    directory.write("b.safetensors", shard(&["b"]));
    let path = directory.write(
        "x.fp16.safetensors.index.json",
        index(&[("a", "a.safetensors")]),
    );
    let names = |opened: CheckpointIndex| -> Vec<String> {
        opened
            .tensors()
            .iter()
            .map(|tensor| tensor.name.clone())
            .collect()
    };
    assert_eq!(
        names(CheckpointIndex::open(directory.path()).unwrap()),
        ["a"]
    );

    directory.write("y.safetensors.index.json", index(&[("b", "b.safetensors")]));
    assert_refused!(
        CheckpointIndex::open(directory.path()),
        Error::SeveralIndexes { .. },
        directory.path().display(),
        r#""x.fp16.safetensors.index.json", "y.safetensors.index.json""#,
        "give the path",
    );
    assert_eq!(names(CheckpointIndex::open(path).unwrap()), ["a"]);

    directory.write(
        "model.safetensors.index.json",
        index(&[("b", "b.safetensors")]),
    );
    assert_eq!(
        names(CheckpointIndex::open(directory.path()).unwrap()),
        ["b"]
    );
}

#[test]
fn two_formats_in_one_directory() {
    let directory = Directory::new();
    directory.write("model.safetensors", shard(&["t"]));
    write_store(&directory, "");
    assert_refused!(
        CheckpointIndex::open(directory.path()),
        Error::SeveralFormats { .. },
        directory.path().display(),
        "name the format",
    );
    for format in [Format::Safetensors, Format::ServerlessLlmStore] {
        let index = OpenOptions::new()
            .format(format)
            .open(directory.path())
            .unwrap();
        assert_eq!(index.format(), format);
    }
    // An explicit file needs no choice.
    let index = CheckpointIndex::open(directory.join("tensor_index.json")).unwrap();
    assert_eq!(index.format(), Format::ServerlessLlmStore);
    assert_eq!(index.root(), directory.path());
}

#[test]
fn another_format_than_asked_for() {
    let directory = Directory::new();
    let file = directory.write("model.safetensors", shard(&["t"]));
    for path in [&file, directory.path()] {
        assert_refused!(
            OpenOptions::new()
                .format(Format::ServerlessLlmStore)
                .open(path),
            Error::WrongFormat { .. },
            path.display(),
            "holds safetensors, but serverlessllm-store was asked for",
        );
    }
    let directory = Directory::new();
    write_store(&directory, "");
    for format in [Format::Safetensors, Format::ServerlessLlmPartitioned] {
        assert_refused!(
            OpenOptions::new().format(format).open(directory.path()),
            Error::WrongFormat { .. },
            format!("holds serverlessllm-store, but {format} was asked for"),
        );
    }
}

#[test]
fn an_empty_serverlessllm_index_is_of_either_dialect() {
    let directory = Directory::new();
    directory.write("tensor_index.json", "{}");
    let index = CheckpointIndex::open(directory.path()).unwrap();
    assert_eq!(index.format(), Format::ServerlessLlmStore);
    assert_eq!((index.tensors().len(), index.files().len()), (0, 0));
    let format = Format::ServerlessLlmPartitioned;
    let index = OpenOptions::new()
        .format(format)
        .open(directory.path())
        .unwrap();
    assert_eq!(index.format(), format);
}

#[test]
fn ranks_side_by_side() {
    let directory = Directory::new();
    directory.write("config.json", "{}");
    for rank in [0, 1, 2, 10] {
        if rank < 10 {
            write_store(&directory, &format!("rank_{rank}/"));
        }
    }
    let index = CheckpointIndex::open(directory.path()).unwrap();
    assert_eq!(index.format(), Format::ServerlessLlmStore);
    let tensors: Vec<(&str, &str)> = index
        .tensors()
        .iter()
        .map(|tensor| {
            (
                tensor.name.as_str(),
                index.files()[tensor.file].name.as_str(),
            )
        })
        .collect();
    assert_eq!(
        tensors,
        [
            ("rank_0/s", "rank_0/tensor.data_0"),
            ("rank_1/s", "rank_1/tensor.data_0"),
            ("rank_2/s", "rank_2/tensor.data_0"),
        ]
    );
    assert_eq!(
        index.files()[1].path,
        directory.join("rank_1").join("tensor.data_0")
    );
    let directories: Vec<(&str, std::ops::Range<usize>)> = index
        .ranks()
        .iter()
        .map(|rank| (rank.name.as_str(), rank.files.clone()))
        .collect();
    assert_eq!(
        directories,
        [("rank_0", 0..1), ("rank_1", 1..2), ("rank_2", 2..3)]
    );

    let one = OpenOptions::new().rank(1).open(directory.path()).unwrap();
    assert_eq!(one.tensors()[0].name, "s");
    assert_eq!(one.root(), directory.join("rank_1"));
    assert_eq!(one.files()[0].name, "tensor.data_0");
    assert_eq!(one.ranks(), []);

    assert_refused!(
        OpenOptions::new().rank(3).open(directory.path()),
        Error::UnknownRank { .. },
        "rank 3",
        "0, 1, 2",
    );
}

#[test]
fn names_stay_sorted_over_many_ranks() {
    let directory = Directory::new();
    for rank in 0..12 {
        write_store(&directory, &format!("rank_{rank}/"));
    }
    let index = CheckpointIndex::open(directory.path()).unwrap();
    assert!(
        index
            .tensors()
            .is_sorted_by(|left, right| left.name < right.name)
    );
    let tensor = index.tensor("rank_10/s").unwrap();
    assert_eq!(index.files()[tensor.file].name, "rank_10/tensor.data_0");
}

#[test]
fn a_single_rank_keeps_its_names() {
    let directory = Directory::new();
    write_store(&directory, "rank_0/");
    let index = CheckpointIndex::open(directory.path()).unwrap();
    assert_eq!(index.tensors()[0].name, "s");
    assert_eq!(index.ranks(), []);
}

#[test]
fn a_missing_rank() {
    let directory = Directory::new();
    for rank in [0, 1, 3] {
        write_store(&directory, &format!("rank_{rank}/"));
    }
    assert_refused!(
        CheckpointIndex::open(directory.path()),
        Error::MissingRank { missing: 2, .. },
        directory.path().display(),
        "rank_2 is missing",
        "0, 1, 3",
    );
    // One rank alone needs no other.
    assert!(OpenOptions::new().rank(3).open(directory.path()).is_ok());
}

#[test]
fn a_rank_without_its_index() {
    let directory = Directory::new();
    write_store(&directory, "rank_0/");
    directory.write("rank_1/tensor.data_0", [0; 8]);
    assert_refused!(
        CheckpointIndex::open(directory.path()),
        Error::NotFound { .. },
        directory.join("rank_1").join("tensor_index.json").display(),
    );
}

#[test]
fn a_rank_of_what_has_no_ranks() {
    let directory = Directory::new();
    let path = directory.write("model.safetensors", shard(&["t"]));
    for path in [directory.path(), &path] {
        assert_refused!(
            OpenOptions::new().rank(0).open(path),
            Error::UnknownRank { .. },
            path.display(),
            "no set of rank_N",
        );
    }
}

#[test]
fn ranks_of_different_dialects() {
    let directory = Directory::new();
    directory.write("rank_0/tensor_index.json", "{}");
    write_store(&directory, "rank_1/");
    directory.write("rank_2/tensor_index.json", PARTITIONED);
    directory.write("rank_2/tensor.data_0", [0; 4]);
    assert_refused!(
        CheckpointIndex::open(directory.path()),
        Error::MixedRankFormats { .. },
        directory.path().display(),
        "rank_1 is serverlessllm-store",
        "rank_2 is serverlessllm-partitioned",
    );
}

#[test]
fn an_unfinished_conversion() {
    let safetensors = Directory::new();
    safetensors.write("model.safetensors", shard(&["t"]));
    safetensors.write(
        "model.safetensors.index.json",
        index(&[("t", "model.safetensors")]),
    );
    let store = Directory::new();
    write_store(&store, "");
    let ranks = Directory::new();
    write_store(&ranks, "rank_0/");
    write_store(&ranks, "rank_1/");
    let only_rank = Directory::new();
    write_store(&only_rank, "rank_0/");
    let nothing = Directory::new();
    let cache = Directory::new();
    cache.write("snapshots/abc/model.safetensors", shard(&["t"]));

    for (directory, below, opened) in [
        (&safetensors, "", &["", "model.safetensors.index.json"][..]),
        (&store, "", &["", "tensor_index.json"]),
        // Of a rank, and of the directory that holds the ranks.
        (
            &ranks,
            "rank_1/",
            &["", "rank_1", "rank_1/tensor_index.json"],
        ),
        (&ranks, "", &[""]),
        (&only_rank, "rank_0/", &["", "rank_0"]),
        // Nothing was put in place yet.
        (&nothing, "", &[""]),
        (&cache, "snapshots/abc/", &["", "snapshots/abc"]),
    ] {
        let marker = directory.write(&format!("{below}{UNFINISHED_NAME}"), "");
        let holder = marker.parent().unwrap().to_owned();
        let open = OpenOptions::new().unfinished(UnfinishedCheckpoint::Open);
        for name in opened {
            let path = directory.join(name);
            assert_refused!(
                CheckpointIndex::open(&path),
                Error::Unfinished { .. },
                holder.display(),
                "interrupted",
                "--resume",
                "--restart",
            );
            if directory.path() == nothing.path() {
                let found = open.open(&path);
                assert_refused!(found, Error::NoCheckpoint { .. }, UNFINISHED_NAME);
            } else {
                assert!(open.open(&path).is_ok(), "{}", path.display());
            }
        }
        fs::remove_file(marker).unwrap();
        if directory.path() != nothing.path() {
            assert!(CheckpointIndex::open(directory.path()).is_ok());
        }
    }

    ranks.write(&format!("rank_1/{UNFINISHED_NAME}"), "");
    // The other rank is whole by itself, as is a file whose own path is given.
    let other = OpenOptions::new().rank(0).open(ranks.path());
    assert_eq!(other.unwrap().tensors().len(), 1);
    let rank = OpenOptions::new().rank(1).open(ranks.path());
    assert_refused!(
        rank,
        Error::Unfinished { .. },
        ranks.join("rank_1").display()
    );
    let file = safetensors.join("model.safetensors");
    safetensors.write(UNFINISHED_NAME, "");
    assert!(CheckpointIndex::open(file).is_ok());
}

#[cfg(unix)]
mod unix {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;
    use std::process::Command;
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_hugging_face_cache() {
        let directory = Directory::new();
        let revision = "c1899de289a04d12100db370d81485cdf75e47ca";
        directory.write("models--x--y/blobs/aaaa", shard(&["t"]));
        let snapshot = directory.join("models--x--y/snapshots").join(revision);
        fs::create_dir_all(&snapshot).unwrap();
        symlink("../../blobs/aaaa", snapshot.join("model.safetensors")).unwrap();
        let root = directory.join("models--x--y");

        // The only snapshot needs no ref; with one it is found by it, among several too.
        assert_eq!(CheckpointIndex::open(&root).unwrap().root(), snapshot);
        directory.write("models--x--y/refs/main", format!("{revision}\n"));
        fs::create_dir(directory.join("models--x--y/snapshots/0000")).unwrap();
        let index = CheckpointIndex::open(&root).unwrap();
        assert_eq!(index.root(), snapshot);
        assert_eq!(index.files()[0].path, snapshot.join("model.safetensors"));
        assert_eq!(CheckpointIndex::open(&snapshot).unwrap(), index);

        fs::remove_file(directory.join("models--x--y/refs/main")).unwrap();
        assert_refused!(
            CheckpointIndex::open(&root),
            Error::SeveralSnapshots { .. },
            root.display(),
            r#""0000""#,
            revision,
        );
        directory.write("models--x--y/refs/main", "ffff");
        assert_refused!(
            CheckpointIndex::open(&root),
            Error::MissingSnapshot { .. },
            root.display(),
            r#""ffff""#,
            revision,
        );
        // A snapshot that a download has only begun.
        directory.write("models--x--y/refs/main", "0000");
        assert_refused!(
            CheckpointIndex::open(&root),
            Error::NoCheckpoint { .. },
            root.join("snapshots").join("0000").display(),
        );
    }

    #[test]
    fn a_revision_must_be_a_plain_name() {
        let directory = Directory::new();
        directory.write("outside/model.safetensors", shard(&["t"]));
        fs::create_dir_all(directory.join("cache/snapshots/x")).unwrap();
        let outside = directory.join("outside");
        for revision in [
            "",
            "..",
            ".",
            "../../outside",
            outside.to_str().unwrap(),
            "x/",
            "x\\y",
            "C:",
        ] {
            directory.write("cache/refs/main", revision);
            assert_refused!(
                CheckpointIndex::open(directory.join("cache")),
                Error::InvalidRevision { .. },
                directory.join("cache/refs/main").display(),
                format!("{revision:?}"),
            );
        }
    }

    #[test]
    fn a_cache_without_snapshots() {
        let directory = Directory::new();
        fs::create_dir_all(directory.join("snapshots")).unwrap();
        assert_refused!(
            CheckpointIndex::open(directory.path()),
            Error::NoCheckpoint { .. },
            directory.join("snapshots").display(),
            "empty",
        );
    }

    #[test]
    fn dangling_symlinks() {
        let directory = Directory::new();
        directory.write(
            "model.safetensors.index.json",
            index(&[("t", "model-1.safetensors")]),
        );
        symlink("../../blobs/gone", directory.join("model-1.safetensors")).unwrap();
        let by_file = CheckpointIndex::open(directory.join("model-1.safetensors"));
        for result in [CheckpointIndex::open(directory.path()), by_file] {
            assert_refused!(
                result,
                Error::DanglingSymlink { .. },
                directory.join("model-1.safetensors").display(),
                "../../blobs/gone",
                "interrupted download",
            );
        }
    }

    #[test]
    fn only_regular_files_are_opened() {
        let directory = Directory::new();
        let pipe = directory.join("pipe.safetensors");
        assert!(
            Command::new("mkfifo")
                .arg(&pipe)
                .status()
                .unwrap()
                .success()
        );
        let socket = directory.join("socket.safetensors");
        let _listener = UnixListener::bind(&socket).unwrap();
        let folder = directory.join("folder.safetensors");
        fs::create_dir(&folder).unwrap();
        fs::write(
            directory.join("f.safetensors.index.json"),
            index(&[("t", "folder.safetensors")]),
        )
        .unwrap();

        // In a thread of its own: opening a pipe without a writer could block for ever.
        let (sender, receiver) = mpsc::channel();
        let paths = [
            (pipe.clone(), pipe, "named pipe"),
            (socket.clone(), socket, "socket"),
            ("/dev/null".into(), "/dev/null".into(), "device"),
            (
                directory.join("f.safetensors.index.json"),
                folder,
                "directory",
            ),
        ];
        std::thread::spawn(move || {
            for (path, named, kind) in paths {
                sender
                    .send((CheckpointIndex::open(path), named, kind))
                    .unwrap();
            }
        });
        for _ in 0..4 {
            let (result, named, kind) = receiver.recv_timeout(Duration::from_secs(10)).unwrap();
            assert_refused!(result, Error::NotARegularFile { .. }, named.display(), kind);
        }
    }

    #[test]
    fn names_that_are_not_utf8() {
        use std::ffi::OsStr;
        use std::os::unix::ffi::OsStrExt;

        let directory = Directory::new();
        let path = directory
            .path()
            .join(OsStr::from_bytes(b"\xff.safetensors"));
        if fs::write(&path, shard(&["t"])).is_err() {
            println!("skipped: this file system has only names in UTF-8");
            return;
        }
        for opened in [directory.path(), &path] {
            let index = CheckpointIndex::open(opened).unwrap();
            assert_eq!(index.files()[0].path, path);
            assert_eq!(index.files()[0].name, "\u{fffd}.safetensors");
        }
        let listing = index(&[("u", "u.safetensors")]);
        directory.write("u.safetensors", shard(&["u"]));
        let name = OsStr::from_bytes(b"\xfe.safetensors.index.json");
        let index_path = directory.path().join(name);
        fs::write(&index_path, listing).unwrap();
        for opened in [directory.path(), &index_path] {
            let index = CheckpointIndex::open(opened).unwrap();
            assert_eq!(index.tensors()[0].name, "u");
            let left_alone = index.notes()[0].to_string();
            assert!(left_alone.contains("\u{fffd}.safetensors"), "{left_alone}");
        }
    }

    #[test]
    fn what_to_do_about_permissions() {
        use std::os::unix::fs::PermissionsExt;

        let directory = Directory::new();
        let path = directory.write("below/model.safetensors", shard(&["t"]));
        let below = directory.join("below");
        fs::set_permissions(&below, fs::Permissions::from_mode(0o000)).unwrap();
        let result = CheckpointIndex::open(&path);
        fs::set_permissions(&below, fs::Permissions::from_mode(0o700)).unwrap();
        if result.is_ok() {
            println!("skipped: this user may read everything");
            return;
        }
        assert_refused!(result, Error::Io { .. }, path.display(), "make it readable",);
    }

    #[test]
    fn what_the_system_refuses_is_passed_on() {
        let directory = Directory::new();
        let path = directory.join(&"n".repeat(300));
        let error = CheckpointIndex::open(&path).unwrap_err();
        assert!(std::error::Error::source(&error).is_some());
        assert_refused!(
            Err::<(), _>(error),
            Error::Io { .. },
            directory.path().display(),
            "could not access"
        );
    }
}
