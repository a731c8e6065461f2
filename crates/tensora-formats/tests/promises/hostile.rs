//! Files that are not what their names promise, or change while they are looked at.
#![cfg(unix)]

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use tensora_formats::{CheckpointIndex, Error, Result};

use crate::fixture::{Directory, assert_refused, index, shard};

const STORE: &str = r#"{"s":[0,4,[1],[1],"torch.float32"]}"#;

/// Opens in a thread of its own, because what is tested for is that it does not block for ever.
fn open(path: &Path) -> Result<CheckpointIndex> {
    let (sender, receiver) = mpsc::channel();
    let path = path.to_owned();
    std::thread::spawn(move || {
        sender.send(CheckpointIndex::open(path)).unwrap();
    });
    receiver
        .recv_timeout(Duration::from_secs(20))
        .expect("opening blocks")
}

fn make_fifo(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

/// A checkpoint of each kind, with every file that is read when it is opened.
fn checkpoints() -> Vec<(Directory, &'static str)> {
    let mut checkpoints = Vec::new();
    for name in [
        "model.safetensors",
        "model.safetensors.index.json",
        "sub/s.safetensors",
        "tensor_index.json",
        "tensor.data_0",
        "tensor.data_1",
        "rank_0/tensor_index.json",
        "rank_1/tensor_index.json",
        "rank_1/tensor.data_0",
        "refs/main",
        "snapshots/abc/model.safetensors",
    ] {
        let directory = Directory::new();
        match name.split_once('/').map_or(name, |(first, _)| first) {
            "model.safetensors" => {
                directory.write("model.safetensors", shard(&["t"]));
            }
            "model.safetensors.index.json" | "sub" => {
                let listing = index(&[("t", "sub/s.safetensors")]);
                directory.write("model.safetensors.index.json", listing);
                directory.write("sub/s.safetensors", shard(&["t"]));
            }
            "refs" | "snapshots" => {
                directory.write("refs/main", "abc");
                directory.write("snapshots/abc/model.safetensors", shard(&["t"]));
            }
            "rank_0" | "rank_1" => {
                for rank in ["rank_0", "rank_1"] {
                    directory.write(&format!("{rank}/tensor_index.json"), STORE);
                    directory.write(&format!("{rank}/tensor.data_0"), [0; 4]);
                }
            }
            _ => {
                let listing = r#"{"a":[0,8,[2],[1],"f32"],"b":[8,4,[1],[1],"f32"]}"#;
                directory.write("tensor_index.json", listing);
                directory.write("tensor.data_0", [0; 8]);
                directory.write("tensor.data_1", [0; 4]);
            }
        }
        assert!(CheckpointIndex::open(directory.path()).is_ok(), "{name}");
        checkpoints.push((directory, name));
    }
    checkpoints
}

#[test]
fn special_files_in_place_of_every_kind_of_file() {
    for (directory, name) in checkpoints() {
        let path = directory.join(name);
        // Socket addresses are short; a link to a short one leads there as well.
        let elsewhere = Directory::new();
        let socket = elsewhere.join("s");
        let _listener = UnixListener::bind(&socket).unwrap();
        for kind in ["named pipe", "socket", "device", "directory"] {
            if path.is_dir() {
                fs::remove_dir(&path).unwrap();
            } else {
                fs::remove_file(&path).unwrap();
            }
            match kind {
                "named pipe" => make_fifo(&path),
                "socket" => symlink(&socket, &path).unwrap(),
                "device" => symlink("/dev/zero", &path).unwrap(),
                _ => fs::create_dir(&path).unwrap(),
            }
            assert_refused!(
                open(directory.path()),
                Error::NotARegularFile { .. },
                path.display(),
                kind,
            );
        }
    }
}

#[test]
fn links_that_lead_nowhere_or_in_circles() {
    for (directory, name) in checkpoints() {
        let path = directory.join(name);
        fs::remove_file(&path).unwrap();
        symlink(path.file_name().unwrap(), &path).unwrap();
        let error = open(directory.path()).unwrap_err();
        assert!(std::error::Error::source(&error).is_some(), "{error:?}");
        assert_refused!(
            Err::<(), _>(error),
            Error::Io { .. },
            path.display(),
            "could not access",
        );
        fs::remove_file(&path).unwrap();
        symlink("gone", &path).unwrap();
        assert_refused!(
            open(directory.path()),
            Error::DanglingSymlink { .. },
            path.display(),
            "gone",
        );
    }
    // Directories that contain themselves end, too.
    let directory = Directory::new();
    directory.write("tensor_index.json", STORE);
    directory.write("tensor.data_0", [0; 4]);
    symlink(".", directory.join("rank_0")).unwrap();
    symlink(".", directory.join("snapshots")).unwrap();
    let opened = open(directory.path()).unwrap();
    assert_eq!(opened.tensors()[0].name, "s");
    fs::remove_file(directory.join("tensor_index.json")).unwrap();
    assert!(open(directory.path()).is_err());
    let around = Directory::new();
    symlink(".", around.join("sub")).unwrap();
    let deep = format!("{}s.safetensors", "sub/".repeat(30));
    around.write("model.safetensors.index.json", index(&[("t", &deep)]));
    around.write("s.safetensors", shard(&["t"]));
    assert_eq!(open(around.path()).unwrap().files()[0].name, deep);
}

/// While another program puts one thing after the other in a file's place, each opening gives a whole
/// answer about one of them.
#[test]
fn files_that_are_swapped_while_they_are_opened() {
    const ROUNDS: usize = 200;

    let directory = Directory::new();
    let path = directory.write("model.safetensors", shard(&["t"]));
    for round in 0..ROUNDS / 10 {
        make_fifo(&directory.join(&format!("pipe {round}")));
    }
    let (sender, receiver) = mpsc::channel();
    let swapped = Arc::new(AtomicBool::new(false));
    let opening = std::thread::spawn({
        let (swapped, path) = (Arc::clone(&swapped), path.clone());
        move || {
            while !swapped.load(Ordering::Relaxed) {
                sender.send(CheckpointIndex::open(&path)).unwrap();
            }
        }
    });
    for round in 0..ROUNDS {
        let put = |make: &dyn Fn(&Path)| {
            let new = directory.join("new");
            make(&new);
            fs::rename(&new, &path).unwrap();
        };
        put(&|new| fs::write(new, shard(&["t", "u", "v"])).unwrap());
        put(&|new| symlink("model.safetensors", new).unwrap());
        put(&|new| fs::write(new, b"GGUF").unwrap());
        put(&|new| symlink("/dev/zero", new).unwrap());
        put(&|new| fs::write(new, shard(&["t"])).unwrap());
        if round % 10 == 0 {
            let pipe = directory.join(&format!("pipe {}", round / 10));
            fs::rename(pipe, &path).unwrap();
        }
    }
    swapped.store(true, Ordering::Relaxed);

    let mut opened = 0;
    let mut refused = 0;
    // Ends when the thread has ended and dropped its sender, unless it hangs.
    loop {
        match receiver.recv_timeout(Duration::from_secs(20)) {
            Ok(Ok(index)) => {
                let names: &[&str] = match index.tensors().len() {
                    1 => &["t"],
                    _ => &["t", "u", "v"],
                };
                assert_eq!(index.files()[0].bytes, shard(names).len() as u64);
                opened += 1;
            }
            Ok(Err(
                Error::NotARegularFile { .. }
                | Error::Io { .. }
                | Error::FileTooShort { .. }
                | Error::ForeignFile { .. },
            )) => refused += 1,
            Ok(Err(other)) => panic!("{other:?}"),
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => panic!("opening blocks"),
        }
    }
    opening.join().unwrap();
    println!("{opened} opened, {refused} refused");
    assert!(opened > 0 && refused > 0);
}
