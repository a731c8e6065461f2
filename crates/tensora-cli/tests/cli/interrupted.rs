//! Conversions that end early: what they leave, and how they are finished.

#![cfg(unix)]

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::support::{Answer, args, digest, names, run, skip, sparse_layers};

const LAYERS: u64 = 48;
const LAYER_BYTES: u64 = 2 << 20;

/// A source that takes a while to convert, and a target that is not there yet.
struct Slow {
    directory: TempDir,
    source: PathBuf,
    target: PathBuf,
}

impl Slow {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let source = directory.path().join("model.safetensors");
        sparse_layers(&source, LAYERS, LAYER_BYTES);
        Self {
            target: directory.path().join("out"),
            source,
            directory,
        }
    }

    fn staging(&self) -> PathBuf {
        self.target.join(".tensora-convert")
    }

    /// The arguments, one partition for each tensor.
    fn arguments(&self, options: &[&str]) -> Vec<OsString> {
        let arguments = args![
            "convert",
            self.source,
            self.target,
            "--to=serverlessllm-store",
            "--partition-bytes=2MiB",
            "--memory-limit=2MiB"
        ];
        let options = options.iter().map(OsString::from);
        arguments.into_iter().chain(options).collect()
    }

    /// Started by a shell after `prelude`.
    fn start(&self, prelude: &str, options: &[&str]) -> Child {
        Command::new("sh")
            .arg("-c")
            .arg(format!("{prelude} exec \"$0\" \"$@\""))
            .arg(env!("CARGO_BIN_EXE_tensora"))
            .args(self.arguments(options))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Waits until the first file is finished, by the journal: that one exists says nothing of when it is safe on the device.
    fn wait_until_under_way(&self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        let journal = self.staging().join(".journal");
        let has_finished =
            || fs::read_to_string(&journal).is_ok_and(|text| text.contains("tensor.data_0"));
        while !has_finished() && !self.is_complete() {
            assert!(Instant::now() < deadline, "nothing was finished");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn is_complete(&self) -> bool {
        self.target.join("tensor_index.json").exists() && !self.staging().exists()
    }

    /// Interrupts a conversion such that finished files are left; how many. `None` when it was too fast
    /// each time, which is counted as a skip.
    fn interrupt(&self, sent: Signal, status: i32) -> Option<u64> {
        for _ in 0..10 {
            // What an earlier try has finished would look like progress of this one.
            let _ = fs::remove_dir_all(&self.target);
            let child = self.start("", &["--restart", "--force"]);
            self.wait_until_under_way();
            signal(&child, sent);
            let answer = Answer::from(child.wait_with_output().unwrap());
            if answer.status == Some(0) {
                continue;
            }
            let error = answer.failure(status);
            assert!(error.contains("cancelled"), "{error}");
            let files = kept_files(&error).expect(&error);
            for part in ["--resume", "--restart", ".tensora-convert"] {
                assert!(error.contains(part), "{part}: {error}");
            }
            return Some(files);
        }
        skip(
            "an interrupted conversion",
            "conversions were too fast here",
        );
        None
    }
}

/// The number in `kept: 3 finished files …`.
fn kept_files(error: &str) -> Option<u64> {
    let line = error.lines().find_map(|line| line.strip_prefix("kept: "))?;
    line.split(' ').next()?.parse().ok()
}

/// By a call, since a conversion can be over before a command that sends signals has started.
fn signal(child: &Child, signal: Signal) {
    // Not waited for yet, so the number is still the child's, even if it has ended.
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// Ctrl-C and its kin leave what `--resume` finishes, and the target is no checkpoint meanwhile.
#[test]
fn an_interrupt_leaves_a_state_that_resume_finishes() {
    for (signal, status) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)] {
        let slow = Slow::new();
        let Some(kept) = slow.interrupt(signal, status) else {
            return;
        };
        if !slow.target.join("tensor_index.json").exists() {
            let error = run(args!["inspect", slow.target]).failure(1);
            assert!(error.contains("--resume"), "{error}");
        }
        // Neither way out is taken by itself.
        let error = run(slow.arguments(&["--force"])).failure(1);
        for way in ["--resume", "--restart"] {
            assert!(error.contains(way), "{way}: {error}");
        }
        let report = run(slow.arguments(&["--resume", "--force", "--json"])).json();
        assert_eq!(report["resumed_files"], kept);
        assert_eq!(report["resumed_bytes"], kept * LAYER_BYTES);
        assert!(slow.is_complete(), "{:?}", names(&slow.target));
        assert_eq!(digest(&slow.target), digest(&slow.source));
    }
}

#[test]
fn restart_begins_anew() {
    let slow = Slow::new();
    if slow.interrupt(Signal::INT, 130).is_none() {
        return;
    }
    let report = run(slow.arguments(&["--restart", "--force", "--json"])).json();
    assert_eq!(report["resumed_files"], 0);
    assert!(slow.is_complete(), "{:?}", names(&slow.target));
    assert_eq!(digest(&slow.target), digest(&slow.source));
}

/// A kill that cannot be caught leaves nothing that opens, and what was finished is kept all the same.
#[test]
fn a_killed_conversion_is_resumed() {
    let slow = Slow::new();
    let mut child = slow.start("", &[]);
    slow.wait_until_under_way();
    child.kill().unwrap();
    child.wait().unwrap();
    if slow.is_complete() {
        skip("a killed conversion", "it was too fast here");
        return;
    }
    run(args!["inspect", slow.target]).failure(1);
    // A file that has changed since is written again.
    let first = slow.staging().join("tensor.data_0");
    let Ok(mut file) = OpenOptions::new().write(true).open(&first) else {
        skip("a killed conversion", "its files were in place already");
        return;
    };
    file.seek(SeekFrom::Start(1000)).unwrap();
    file.write_all(b"x").unwrap();
    drop(file);
    let report = run(slow.arguments(&["--resume", "--json"])).json();
    assert!(slow.is_complete(), "{:?}", names(&slow.target));
    assert_eq!(digest(&slow.target), digest(&slow.source));
    assert!(report["resumed_files"].as_u64().unwrap() < LAYERS);
}

/// What was interrupted is not mixed with something else.
#[test]
fn only_the_same_conversion_is_resumed() {
    let slow = Slow::new();
    if slow.interrupt(Signal::INT, 130).is_none() {
        return;
    }
    let mut other = slow.arguments(&["--resume", "--force"]);
    for argument in &mut other {
        if argument == "--partition-bytes=2MiB" {
            *argument = "--partition-bytes=4MiB".into();
        }
    }
    let error = run(other).failure(1);
    assert!(
        error.contains("cannot be resumed") && error.contains("--restart"),
        "{error}"
    );
}

/// There is nothing to resume in a directory that is not there.
#[test]
fn resuming_nothing_writes_everything() {
    let slow = Slow::new();
    let text = run(slow.arguments(&["--resume"])).text();
    assert!(text.contains("nothing to resume"), "{text}");
    assert!(slow.is_complete());
}

/// What `nohup` promises.
#[cfg(target_os = "linux")]
#[test]
fn a_signal_that_was_ignored_stays_ignored() {
    for (name, sent) in [
        ("INT", Signal::INT),
        ("TERM", Signal::TERM),
        ("HUP", Signal::HUP),
    ] {
        let slow = Slow::new();
        let child = slow.start(&format!("trap '' {name};"), &[]);
        slow.wait_until_under_way();
        signal(&child, sent);
        Answer::from(child.wait_with_output().unwrap()).text();
        assert!(slow.is_complete());
    }
}

/// A limit on file sizes (`ulimit -f`) is an error like a full disk, not a death.
#[cfg(target_os = "linux")]
#[test]
fn a_limit_on_file_sizes_is_an_error_that_leaves_nothing_behind() {
    let slow = Slow::new();
    // Blocks of 512 bytes or of 1 KiB, depending on the shell; half a partition or all but a bit.
    let child = slow.start("ulimit -f 2000;", &[]);
    let error = Answer::from(child.wait_with_output().unwrap()).failure(1);
    assert!(error.contains("limit on file sizes"), "{error}");
    assert!(error.contains("ulimit -f"), "{error}");
    assert!(error.contains("no file was finished"), "{error}");
    assert_eq!(names(&slow.target), [""; 0]);
}

/// A source that is written to while it is read is noticed, and what came of it is not kept.
#[test]
fn a_source_that_changes_is_an_error() {
    let slow = Slow::new();
    let child = slow.start("", &[]);
    slow.wait_until_under_way();
    signal(&child, Signal::STOP);
    let length = LAYERS * LAYER_BYTES / 2;
    let source = OpenOptions::new().write(true).open(&slow.source).unwrap();
    source.set_len(length).unwrap();
    signal(&child, Signal::CONT);
    let answer = Answer::from(child.wait_with_output().unwrap());
    if answer.status == Some(0) {
        skip("a source that changes", "the conversion was too fast here");
        return;
    }
    let error = answer.failure(1);
    assert!(error.contains("model.safetensors"), "{error}");
    assert!(!error.contains("goes on from there"), "{error}");
    run(args!["inspect", slow.target]).failure(1);
}

/// Runs a script as root of a mount namespace of its own, which is gone with it. `None`, and a skip, where
/// that is not possible.
#[cfg(target_os = "linux")]
fn in_private_mounts(what: &str, script: &str, arguments: &[&Path]) -> Option<Answer> {
    // Root needs no user namespace, and others cannot do without one.
    for kind in [&["--mount"][..], &["--mount", "--map-root-user"]] {
        let mount = "mount -t tmpfs tmpfs /mnt";
        let probe = Command::new("unshare")
            .args(kind)
            .args(["sh", "-c", mount])
            .output();
        if !probe.is_ok_and(|probe| probe.status.success()) {
            continue;
        }
        let output = Command::new("unshare")
            .args(kind)
            .args(["sh", "-c", script, env!("CARGO_BIN_EXE_tensora")])
            .args(arguments)
            .output();
        return Some(output.unwrap().into());
    }
    skip(what, "no private mount namespace can be made here");
    None
}

/// The disk fills up under a conversion; when there is room again, it goes on.
#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_fills_up_is_an_error_and_resume_goes_on() {
    let slow = Slow::new();
    let disk = slow.directory.path().join("disk");
    fs::create_dir(&disk).unwrap();
    let script = r#"
        set -u
        source=$1 disk=$2
        mount -t tmpfs -o size=100m tmpfs "$disk" || exit 9
        convert() { "$0" convert "$source" "$disk/out" --to serverlessllm-store --partition-bytes 2MiB \
            --memory-limit 2MiB "$@"; }
        convert --dry-run --json > /dev/null || exit 8
        convert 2> "$disk/../errors" & child=$!
        while [ ! -e "$disk/out/.tensora-convert/tensor.data_3" ]; do
            kill -0 $child 2> /dev/null || break
            sleep 0.005
        done
        # The shell's child is a shell, and the command is that one's.
        command=$(cat /proc/$child/task/$child/children 2> /dev/null)
        kill -STOP ${command:-$child}
        dd if=/dev/zero of="$disk/filler" bs=64k 2> /dev/null
        kill -CONT ${command:-$child}
        wait $child
        echo "status $?"
        cat "$disk/../errors"
        rm "$disk/filler"
        convert --resume --json > "$disk/../report" || exit 7
        "$0" load "$disk/out" --digest --json > "$disk/../loaded" || exit 6
    "#;
    let what = "a disk that fills up";
    let Some(answer) = in_private_mounts(what, script, &[&slow.source, &disk]) else {
        return;
    };
    let text = answer.stdout.clone();
    if text.starts_with("status 0") {
        skip(what, "the conversion was too fast here");
        return;
    }
    assert_eq!(answer.status, Some(0), "{answer:?}");
    assert!(text.starts_with("status 1"), "{answer:?}");
    assert!(text.contains("no space left"), "{text}");
    let kept = kept_files(&text).expect(&text);
    let read = |name: &str| {
        let json = fs::read_to_string(slow.directory.path().join(name)).unwrap();
        serde_json::from_str::<serde_json::Value>(&json).unwrap()
    };
    assert_eq!(read("report")["resumed_files"], kept);
    assert_eq!(read("loaded")["digest"], digest(&slow.source));
}

/// Too little space is found out before anything is written.
#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_is_too_small_is_refused_beforehand() {
    let slow = Slow::new();
    let disk = slow.directory.path().join("disk");
    fs::create_dir(&disk).unwrap();
    let script = r#"
        mount -t tmpfs -o size=20m tmpfs "$2" || exit 9
        "$0" convert "$1" "$2/out" --to safetensors
        status=$?
        [ -e "$2/out" ] && exit 8
        exit $status
    "#;
    let what = "a disk that is too small";
    if let Some(answer) = in_private_mounts(what, script, &[&slow.source, &disk]) {
        let error = answer.failure(1);
        assert!(error.contains("free"), "{error}");
    }
}

/// A directory that cannot be written to is refused before anything is tried.
#[cfg(target_os = "linux")]
#[test]
fn a_read_only_place_is_refused_beforehand() {
    let slow = Slow::new();
    let disk = slow.directory.path().join("disk");
    fs::create_dir(&disk).unwrap();
    let script = r#"
        mount -t tmpfs -o ro tmpfs "$2" || exit 9
        "$0" convert "$1" "$2/out" --to safetensors
    "#;
    let what = "a read-only file system";
    if let Some(answer) = in_private_mounts(what, script, &[&slow.source, &disk]) {
        let error = answer.failure(1);
        assert!(error.contains("Read-only file system"), "{error}");
    }
}
