//! The command on machines that do not want it, and under mapped files that are truncated.

#![cfg(target_os = "linux")]

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};

use tempfile::TempDir;
use tensora::BackendKind;

use crate::support::{available, sparse_layers, tensora};

/// How long hashing takes, while the test has to do something to the file.
const LAYERS: u64 = 16;
const LAYER_BYTES: u64 = 32 << 20;
/// If the command was done before that, how often it is tried.
const TRIES: usize = 20;

/// A file that takes a while to hash, and the command that has loaded it and hashes it.
struct Hashing {
    _directory: TempDir,
    path: PathBuf,
    command: Child,
}

impl Hashing {
    fn begin(memory: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.safetensors");
        sparse_layers(&path, LAYERS, LAYER_BYTES);
        let mut command = tensora()
            .args(["load", "--digest", "--memory", memory])
            .arg(&path)
            // Says when it has loaded.
            .env("TENSORA_LOG", "tensora=debug")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = command.stderr.as_mut().unwrap();
        let mut line = String::new();
        let mut reader = BufReader::with_capacity(1, stderr);
        while !line.contains("loaded") {
            line.clear();
            assert_ne!(reader.read_line(&mut line).unwrap(), 0, "it never loaded");
        }
        Self {
            _directory: directory,
            path,
            command,
        }
    }

    /// How it ended, and what it said since it had loaded.
    fn end(mut self) -> (ExitStatus, String, String) {
        let (mut stdout, mut stderr) = (String::new(), String::new());
        let mut pipe = self.command.stderr.take().unwrap();
        pipe.read_to_string(&mut stderr).unwrap();
        let mut pipe = self.command.stdout.take().unwrap();
        pipe.read_to_string(&mut stdout).unwrap();
        (self.command.wait().unwrap(), stdout, stderr)
    }
}

/// Repeats what may come too late until it came in time, that is, until the command did not succeed.
fn until_in_time(attempt: impl Fn(&Hashing)) -> (ExitStatus, String, String, PathBuf) {
    for _ in 0..TRIES {
        let hashing = Hashing::begin("mapped");
        attempt(&hashing);
        let path = hashing.path.clone();
        let (status, stdout, stderr) = hashing.end();
        if !status.success() {
            return (status, stdout, stderr, path);
        }
    }
    panic!("hashing was always faster");
}

fn truncate(hashing: &Hashing) {
    let file = OpenOptions::new().write(true).open(&hashing.path).unwrap();
    file.set_len(4096).unwrap();
}

#[test]
fn a_mapped_file_that_is_truncated_is_an_error() {
    if !available(BackendKind::Mmap, "truncation under a mapped load") {
        return;
    }
    let (status, stdout, stderr, path) = until_in_time(truncate);
    // 128 and the number of SIGBUS, but no signal has killed it.
    assert_eq!(status.code(), Some(135), "{status} {stderr}");
    assert_eq!(stdout, "");
    let error = format!("error: {}: bytes of it could not be had", path.display());
    assert!(stderr.starts_with(&error), "{stderr}");
    assert!(
        stderr.contains("truncated") && stderr.contains("hint: "),
        "{stderr}"
    );
    assert!(stderr.contains("`--memory owned`"), "{stderr}");
}

#[test]
fn an_owned_load_does_not_care() {
    let hashing = Hashing::begin("owned");
    truncate(&hashing);
    let (status, stdout, stderr) = hashing.end();
    assert!(status.success(), "{status} {stderr}");
    assert!(stdout.contains("digest"), "{stdout}");
}

/// What others send is not mistaken for a truncated file.
#[test]
fn a_signal_from_elsewhere_kills_as_ever() {
    if !available(BackendKind::Mmap, "SIGBUS from elsewhere") {
        return;
    }
    let (status, stdout, stderr, _) = until_in_time(|hashing| {
        let kill = format!("kill -BUS {}", hashing.command.id());
        assert!(
            Command::new("sh")
                .args(["-c", &kill])
                .status()
                .unwrap()
                .success()
        );
    });
    assert_eq!(status.signal(), Some(7), "{status} {stderr}");
    assert_eq!((stdout.as_str(), stderr.as_str()), ("", ""));
}
