//! What is in a target directory is not trusted, and nothing outside of it is touched.
#![cfg(unix)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails its test just so"
)]

mod common;

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use common::{Record, names, noise, read, write, write_ranks};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use tensora_convert::{Companions, ConversionNote, ConvertOptions, Error, Overwrite, Unfinished};
use tensora_formats::{CheckpointIndex, Dtype, Format, UNFINISHED_NAME};
use tensora_io::{CancelToken, Control};

fn records(seed: u64) -> Vec<Record> {
    ["a", "b", "c"]
        .iter()
        .zip(seed..)
        .map(|(name, seed)| Record::plain(name, Dtype::F32, &[64, 16], seed))
        .collect()
}

fn run(options: &ConvertOptions, source: &Path, target: &Path) -> Result<(), Error> {
    let source = CheckpointIndex::open(source).unwrap();
    options
        .plan(&source, target)?
        .run(&Control::new())
        .map(drop)
}

fn assert_whole(target: &Path, expected: &Path) {
    assert_eq!(
        common::digest(&read(target).tensors),
        common::digest(&read(expected).tensors)
    );
    assert!(!target.join(".tensora-convert").exists());
    assert!(!target.join(UNFINISHED_NAME).exists());
}

#[test]
fn links_lead_nobody_out_of_the_target() {
    let directory = tempfile::tempdir().unwrap();
    let (source, outside) = (
        directory.path().join("source"),
        directory.path().join("home"),
    );
    write(&source, &records(1), Format::Safetensors, 1);
    fs::create_dir_all(outside.join("below")).unwrap();
    fs::write(outside.join("precious"), "precious").unwrap();
    fs::write(outside.join("below/precious"), "precious").unwrap();
    let untouched = common::snapshot(&outside);

    for unfinished in [Unfinished::Refuse, Unfinished::Resume, Unfinished::Discard] {
        let options = ConvertOptions::new(Format::ServerlessLlmStore).unfinished(unfinished);
        // The whole of it is somewhere else.
        let target = directory.path().join(format!("a-{unfinished:?}"));
        fs::create_dir(&target).unwrap();
        symlink(&outside, target.join(".tensora-convert")).unwrap();
        let error = run(&options, &source, &target).unwrap_err();
        assert!(matches!(error, Error::NotStaging { .. }), "{error}");

        // Things in it are.
        let target = directory.path().join(format!("b-{unfinished:?}"));
        let staging = target.join(".tensora-convert");
        fs::create_dir_all(&staging).unwrap();
        symlink(&outside, staging.join("rank_0")).unwrap();
        symlink(outside.join("precious"), staging.join("tensor.data_0")).unwrap();
        symlink(outside.join("precious"), staging.join(UNFINISHED_NAME)).unwrap();
        let outcome = run(&options, &source, &target);
        match unfinished {
            Unfinished::Refuse => {
                assert!(matches!(outcome, Err(Error::Interrupted { .. })));
            }
            _ => {
                outcome.unwrap();
                assert_whole(&target, &source);
                let written = fs::symlink_metadata(target.join("tensor.data_0")).unwrap();
                assert!(written.is_file());
            }
        }

        // Its journal is.
        let target = directory.path().join(format!("c-{unfinished:?}"));
        fs::create_dir_all(target.join(".tensora-convert")).unwrap();
        symlink(
            outside.join("precious"),
            target.join(".tensora-convert/.journal"),
        )
        .unwrap();
        run(&options, &source, &target).unwrap_err();
    }
    assert_eq!(common::snapshot(&outside), untouched);
}

#[test]
fn what_cannot_be_renamed_over_is_found_before_anything_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source");
    write(&source, &records(1), Format::Safetensors, 1);
    fs::write(source.join("config.json"), "{}").unwrap();
    let options = ConvertOptions::new(Format::ServerlessLlmStore)
        .overwrite(Overwrite::Replace)
        .companions(Companions::Copy);
    for name in ["tensor.data_0", "tensor_index.json", "config.json"] {
        let target = directory.path().join(format!("over-{name}"));
        fs::create_dir_all(target.join(name).join("inside")).unwrap();
        let error = run(&options, &source, &target).unwrap_err();
        assert!(
            matches!(&error, Error::NotReplaceable { path, .. } if path.ends_with(name)),
            "{error}"
        );
        assert_eq!(names(&target), [name.to_owned(), format!("{name}/inside")]);
    }

    let ranks = directory.path().join("ranks");
    write_ranks(
        &ranks,
        &[records(1), records(5)],
        Format::ServerlessLlmStore,
        1,
    );
    let (target, elsewhere) = (
        directory.path().join("linked"),
        directory.path().join("disk"),
    );
    fs::create_dir(&target).unwrap();
    fs::create_dir(&elsewhere).unwrap();
    symlink(&elsewhere, target.join("rank_0")).unwrap();
    let error = run(&options, &ranks, &target).unwrap_err();
    assert!(
        matches!(&error, Error::NotReplaceable { path, .. } if path.ends_with("rank_0")),
        "{error}"
    );
    assert!(names(&elsewhere).is_empty());
}

#[test]
fn the_source_is_not_replaced_by_way_of_a_link_to_its_rank() {
    let directory = tempfile::tempdir().unwrap();
    let (target, source) = (
        directory.path().join("target"),
        directory.path().join("source"),
    );
    write_ranks(
        &target,
        &[records(1), records(5)],
        Format::ServerlessLlmStore,
        1,
    );
    fs::create_dir(&source).unwrap();
    for rank in ["rank_0", "rank_1"] {
        symlink(target.join(rank), source.join(rank)).unwrap();
    }
    let before = common::snapshot(&target);
    let options =
        ConvertOptions::new(Format::ServerlessLlmPartitioned).overwrite(Overwrite::Replace);
    let error = run(&options, &source, &target).unwrap_err();
    assert!(matches!(error, Error::TargetIsSource { .. }), "{error}");
    assert_eq!(common::snapshot(&target), before);
}

#[test]
fn fewer_ranks_replace_more() {
    let directory = tempfile::tempdir().unwrap();
    let (source, target) = (
        directory.path().join("source"),
        directory.path().join("target"),
    );
    write_ranks(
        &source,
        &[records(1), records(5)],
        Format::ServerlessLlmStore,
        1,
    );
    let old = [records(11), records(12), records(13), records(14)];
    write_ranks(&target, &old, Format::ServerlessLlmStore, 1);
    // What a program for logs makes of a rank that there is no more.
    fs::create_dir(target.join("rank_7")).unwrap();
    let options = ConvertOptions::new(Format::ServerlessLlmPartitioned);
    let error = run(&options, &source, &target).unwrap_err();
    assert!(matches!(error, Error::TargetOccupied { .. }), "{error}");

    // Interrupted while it put its files in place: the marker is in every rank, nothing else has moved.
    let staged = options.clone().overwrite(Overwrite::Replace);
    let index = CheckpointIndex::open(&source).unwrap();
    let plan = staged.plan(&index, &target).unwrap();
    let token = CancelToken::new();
    let stop = token.clone();
    let control = Control::new()
        .with_cancel(token)
        .with_progress(move |_| stop.cancel());
    let _ = plan.run(&control);
    let resume = staged.clone().unfinished(Unfinished::Resume);
    for rank in 0..4 {
        fs::write(target.join(format!("rank_{rank}/{UNFINISHED_NAME}")), "").unwrap();
    }
    run(&resume, &source, &target).unwrap();
    assert_whole(&target, &source);
    assert!(!names(&target).iter().any(|name| {
        name.starts_with("rank_") && !name.starts_with("rank_0") && !name.starts_with("rank_1")
    }));

    // A directory that holds something else keeps its rank from going, and is known beforehand.
    fs::create_dir(target.join("rank_2")).unwrap();
    fs::write(target.join("rank_2/log.txt"), noise(3, 1)).unwrap();
    let error = run(&staged, &source, &target).unwrap_err();
    assert!(
        matches!(&error, Error::OtherCheckpoint { files, .. } if files == &["rank_2/log.txt"]),
        "{error}"
    );
}

#[test]
fn companions_have_any_name_and_arrive_as_they_are() {
    let directory = tempfile::tempdir().unwrap();
    let (source, target) = (
        directory.path().join("source"),
        directory.path().join("target"),
    );
    write(&source, &records(1), Format::Safetensors, 1);
    let large = noise((2 << 20) + 17, 3);
    fs::write(source.join("journal"), &large).unwrap();
    fs::write(source.join("empty"), "").unwrap();
    let options = ConvertOptions::new(Format::ServerlessLlmStore).companions(Companions::Copy);
    run(&options, &source, &target).unwrap();
    assert_whole(&target, &source);
    assert!(fs::read(target.join("journal")).unwrap() == large);
    assert_eq!(fs::read(target.join("empty")).unwrap(), b"");

    // One that grows after the space for it was found.
    let index = CheckpointIndex::open(&source).unwrap();
    let other = directory.path().join("other");
    let plan = options.plan(&index, &other).unwrap();
    fs::write(source.join("empty"), "no more").unwrap();
    let error = plan.run(&Control::new()).unwrap_err();
    assert!(matches!(error, Error::Companion { .. }), "{error}");
}

#[test]
fn a_tensor_of_a_size_made_of_nothing_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("tensor.data_0"), [7; 8]).unwrap();
    let index = r#"{"bomb":[0,1,[72057594037927936],[0],"torch.uint8"]}"#;
    fs::write(source.join("tensor_index.json"), index).unwrap();
    let source = CheckpointIndex::open(&source).unwrap();
    let target = directory.path().join("target");
    let options = ConvertOptions::new(Format::ServerlessLlmStore);
    // When it is planned, before anything is written.
    let checked = options.checksums(tensora_convert::Checksums::Write);
    let error = checked.plan(&source, &target).unwrap_err();
    assert!(matches!(error, Error::TooManyWindows { .. }), "{error}");
    assert!(!target.exists());
    let error = tensora_convert::VerifyOptions::new()
        .digests(&source, &Control::new())
        .unwrap_err();
    assert!(matches!(error, Error::TooManyWindows { .. }), "{error}");
}

// --- Several users --------------------------------------------------------------------------------

/// Names the directory in which this program, started again as another user, finds what it is to do.
const PLACE: &str = "TENSORA_TEST_OTHER_USER";
const NOBODY: u32 = 65534;

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Gives a directory and all that is in it to a user, and lets everybody read it.
fn give(directory: &Path, user: u32) {
    for name in names(directory).iter().map(String::as_str).chain([""]) {
        let path = directory.join(name);
        set_mode(&path, if path.is_dir() { 0o755 } else { 0o644 });
        chown(&path, Some(user), Some(user)).unwrap();
    }
}

/// Runs a test of this program once more as `nobody`, with `place` for it to look at.
fn as_nobody(test: &str, place: &Path) {
    // The program may lie where only root can look.
    let program = place.join("program");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    set_mode(&program, 0o755);
    let mut command = Command::new(&program);
    command
        .args([test, "--exact", "--nocapture"])
        .env(PLACE, place)
        .current_dir("/")
        .uid(NOBODY)
        .gid(NOBODY);
    let output = loop {
        match command.output() {
            // Another test has forked while the program was written, and has not started its own yet.
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy => {
                thread::sleep(Duration::from_millis(10));
            }
            output => break output.unwrap(),
        }
    };
    assert!(
        output.status.success(),
        "{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn replacing(format: Format) -> ConvertOptions {
    ConvertOptions::new(format)
        .overwrite(Overwrite::Replace)
        .companions(Companions::Copy)
}

/// The rank of a target that is this user's otherwise cannot be written to.
fn check_locked(place: &Path, target: &str) {
    let options = replacing(Format::ServerlessLlmPartitioned);
    let error = run(&options, &place.join("ranks"), &place.join(target)).unwrap_err();
    assert!(
        matches!(&error, Error::Target { path, .. } if path.ends_with("rank_1")),
        "{target}: {error}"
    );
    assert!(
        error.to_string().contains("permissions"),
        "{target}: {error}"
    );
}

/// Something in a target where everybody may write is not this user's to replace.
fn check_sticky(place: &Path) {
    for (source, target, name) in [
        ("source", "sticky", "tensor.data_0"),
        ("source", "sticky-beside", "config.json"),
        ("ranks", "sticky-ranks", "rank_2"),
    ] {
        let options = replacing(Format::ServerlessLlmStore);
        let error = run(&options, &place.join(source), &place.join(target)).unwrap_err();
        assert!(
            matches!(&error, Error::NotReplaceable { path, .. } if path.ends_with(name)),
            "{target}: {error}"
        );
    }
    let options = replacing(Format::ServerlessLlmStore);
    run(&options, &place.join("source"), &place.join("sticky-own")).unwrap();
}

#[test]
fn what_only_others_may_replace_is_found_before_anything_is_written() {
    if let Some(place) = std::env::var_os(PLACE) {
        let place = Path::new(&place);
        check_locked(place, "foreign");
        check_locked(place, "locked");
        return check_sticky(place);
    }
    let name = "what_only_others_may_replace_is_found_before_anything_is_written";
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path();
    let (format, old) = (
        Format::ServerlessLlmStore,
        [records(11), records(12), records(13)],
    );
    write(&place.join("source"), &records(1), Format::Safetensors, 1);
    fs::write(place.join("source/config.json"), "{}").unwrap();
    write_ranks(&place.join("ranks"), &[records(1), records(5)], format, 1);
    write_ranks(&place.join("locked"), &old[..2], format, 1);
    if !rustix::process::geteuid().is_root() {
        set_mode(&place.join("locked/rank_1"), 0o555);
        let before = names(&place.join("locked"));
        check_locked(place, "locked");
        assert_eq!(names(&place.join("locked")), before);
        set_mode(&place.join("locked/rank_1"), 0o755);
        return common::skip(&format!("{name}: only root has files of several users"));
    }

    write_ranks(&place.join("foreign"), &old[..2], format, 1);
    write_ranks(&place.join("sticky-ranks"), &old, format, 1);
    write(&place.join("sticky"), &old[0], format, 1);
    write(&place.join("sticky-own"), &old[0], format, 1);
    fs::create_dir(place.join("sticky-beside")).unwrap();
    fs::write(place.join("sticky-beside/config.json"), "old").unwrap();
    give(place, 0);
    for own in [
        "locked",
        "foreign",
        "sticky-own",
        "sticky-ranks/rank_0",
        "sticky-ranks/rank_1",
    ] {
        give(&place.join(own), NOBODY);
    }
    set_mode(&place.join("locked/rank_1"), 0o555);
    give(&place.join("foreign/rank_1"), 0);
    // It can be emptied, and stays.
    set_mode(&place.join("sticky-ranks/rank_2"), 0o777);
    for sticky in ["sticky", "sticky-beside", "sticky-ranks", "sticky-own"] {
        chown(place.join(sticky), Some(0), Some(0)).unwrap();
        set_mode(&place.join(sticky), 0o1777);
    }
    let refused = [
        "locked",
        "foreign",
        "sticky",
        "sticky-beside",
        "sticky-ranks",
    ];
    let all = || {
        refused.map(|target| {
            let target = place.join(target);
            (names(&target), common::snapshot(&target))
        })
    };
    let before = all();
    as_nobody(name, place);
    assert!(all() == before, "something was written");
    assert_whole(&place.join("sticky-own"), &place.join("source"));
    // Root may.
    run(
        &replacing(format),
        &place.join("source"),
        &place.join("sticky"),
    )
    .unwrap();
    assert_whole(&place.join("sticky"), &place.join("source"));
}

// --- Other names for the source --------------------------------------------------------------------

#[cfg(target_os = "linux")]
#[test]
fn a_bind_mount_of_the_source_is_the_source() {
    const BOUND: &str = "TENSORA_TEST_BIND_MOUNT";
    let options = replacing(Format::ServerlessLlmPartitioned);
    if let Some(place) = std::env::var_os(BOUND) {
        let place = Path::new(&place);
        let (source, target) = (place.join("source"), place.join("target"));
        let before = common::snapshot(&source);
        assert!(common::snapshot(&target) == before);
        let error = run(&options, &source, &target).unwrap_err();
        assert!(matches!(error, Error::TargetIsSource { .. }), "{error}");
        assert!(common::snapshot(&source) == before);
        return;
    }
    let name = "a_bind_mount_of_the_source_is_the_source";
    let directory = tempfile::tempdir().unwrap();
    let (source, target) = (
        directory.path().join("source"),
        directory.path().join("target"),
    );
    write(&source, &records(1), Format::ServerlessLlmStore, 1);
    fs::create_dir(&target).unwrap();
    let in_namespace = |command: &[&OsStr]| {
        Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c"])
            .arg("mount --bind \"$1\" \"$2\" && shift 2 && exec \"$@\"")
            .arg("sh")
            .args([&source, &target])
            .args(command)
            .env(BOUND, directory.path())
            .output()
    };
    let refused = match in_namespace(&[OsStr::new("true")]) {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(error) => Some(format!("unshare: {error}")),
    };
    if let Some(reason) = refused {
        return common::skip(&format!("{name}: no mounts of its own: {reason}"));
    }
    let program = std::env::current_exe().unwrap();
    let arguments = [program.as_os_str(), OsStr::new(name), OsStr::new("--exact")];
    let output = in_namespace(&arguments).unwrap();
    assert!(
        output.status.success(),
        "{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn a_file_of_the_source_is_not_replaced_under_another_name() {
    let directory = tempfile::tempdir().unwrap();
    let (source, target) = (
        directory.path().join("source"),
        directory.path().join("target"),
    );
    write(&source, &records(1), Format::ServerlessLlmStore, 1);
    write(&target, &records(2), Format::ServerlessLlmStore, 1);
    fs::remove_file(target.join("tensor.data_0")).unwrap();
    fs::hard_link(source.join("tensor.data_0"), target.join("tensor.data_0")).unwrap();
    let before = common::snapshot(&target);
    let options = replacing(Format::ServerlessLlmPartitioned);
    let error = run(&options, &source, &target).unwrap_err();
    assert!(matches!(error, Error::TargetIsSource { .. }), "{error}");
    assert!(error.to_string().contains("holds files of it"), "{error}");
    assert!(common::snapshot(&target) == before);
    // A copy is nobody's.
    fs::remove_file(target.join("tensor.data_0")).unwrap();
    fs::copy(source.join("tensor.data_0"), target.join("tensor.data_0")).unwrap();
    run(&options, &source, &target).unwrap();
    assert_whole(&target, &source);
}

// --- Names and kinds of files ----------------------------------------------------------------------

#[test]
fn a_shard_whose_name_is_not_utf8_is_replaced_like_any_other() {
    let directory = tempfile::tempdir().unwrap();
    let (source, target) = (
        directory.path().join("source"),
        directory.path().join("target"),
    );
    write(&source, &records(1), Format::ServerlessLlmStore, 1);
    write(&target, &records(2), Format::Safetensors, 1);
    let old = target.join(OsStr::from_bytes(b"model-\xff.safetensors"));
    if let Err(error) = fs::rename(target.join("model.safetensors"), &old) {
        return common::skip(&format!("no names here that are not UTF-8: {error}"));
    }
    let options = ConvertOptions::new(Format::Safetensors);
    let error = run(&options, &source, &target).unwrap_err();
    assert!(matches!(error, Error::TargetOccupied { .. }), "{error}");
    run(&options.overwrite(Overwrite::Replace), &source, &target).unwrap();
    assert!(!old.exists());
    assert_whole(&target, &source);
    CheckpointIndex::open(&target).unwrap();
}

#[test]
fn a_link_to_nothing_beside_the_source_matters_to_who_wants_it_copied() {
    let directory = tempfile::tempdir().unwrap();
    let (source, target) = (
        directory.path().join("source"),
        directory.path().join("target"),
    );
    write(&source, &records(1), Format::Safetensors, 1);
    fs::write(source.join("config.json"), "{}").unwrap();
    symlink("blobs/nowhere", source.join("tokenizer.json")).unwrap();
    let options = ConvertOptions::new(Format::ServerlessLlmStore);
    let copying = options.clone().companions(Companions::Copy);
    let error = run(&copying, &source, &target).unwrap_err();
    assert!(
        matches!(&error, Error::Companion { path, .. } if path.ends_with("tokenizer.json")),
        "{error}"
    );
    let index = CheckpointIndex::open(&source).unwrap();
    let plan = options.plan(&index, &target).unwrap();
    let left = ConversionNote::CompanionsLeft {
        files: vec!["config.json".to_owned()],
    };
    assert!(plan.notes().contains(&left), "{:?}", plan.notes());
    plan.run(&Control::new()).unwrap();
    assert_whole(&target, &source);
}

fn make_pipe(path: &Path) {
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
}

/// What something comes to, if it does not take for ever.
fn in_time<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(work()));
    let result = receiver.recv_timeout(Duration::from_secs(20));
    result.expect("it should have ended long ago")
}

#[test]
fn a_pipe_in_the_place_of_a_companion_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let (source, target) = (
        directory.path().join("source"),
        directory.path().join("target"),
    );
    write(&source, &records(1), Format::Safetensors, 1);
    let companion = source.join("config.json");
    fs::write(&companion, "{}").unwrap();
    let options = ConvertOptions::new(Format::ServerlessLlmStore).companions(Companions::Copy);
    let index = CheckpointIndex::open(&source).unwrap();
    let plan = options.plan(&index, &target).unwrap();
    fs::remove_file(&companion).unwrap();
    make_pipe(&companion);
    let error = in_time(move || plan.run(&Control::new())).unwrap_err();
    assert!(
        matches!(&error, Error::Companion { path, .. } if *path == companion),
        "{error}"
    );
    assert!(error.to_string().contains("FIFO"), "{error}");
}

#[test]
fn a_pipe_in_the_place_of_a_directory_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let (source, target) = (
        directory.path().join("source"),
        directory.path().join("target"),
    );
    let ranks = [records(1), records(5)];
    write_ranks(&source, &ranks, Format::ServerlessLlmStore, 1);
    let index = CheckpointIndex::open(&source).unwrap();
    let options = ConvertOptions::new(Format::ServerlessLlmPartitioned);
    let plan = options.plan(&index, &target).unwrap();
    let (staged, aside) = (
        target.join(".tensora-convert/rank_0"),
        directory.path().join("aside"),
    );
    // While the one file in it is written.
    let is_done = AtomicBool::new(false);
    let control = Control::new().with_progress(move |_| {
        if !is_done.swap(true, Ordering::SeqCst) {
            fs::rename(&staged, &aside).unwrap();
            make_pipe(&staged);
        }
    });
    let error = in_time(move || plan.run(&control)).unwrap_err();
    assert!(
        matches!(&error, Error::Target { operation: "sync", path, .. } if path.ends_with("rank_0")),
        "{error}"
    );
}
