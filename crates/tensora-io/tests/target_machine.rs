//! Files that are written on machines that do not want them: too full, too small, without direct I/O, with
//! limits, failing devices and signals.
#![cfg(all(feature = "testing", target_os = "linux", not(tensora_portable)))]
#![allow(clippy::unwrap_used)]

mod machine_support;

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use machine_support::{Denied, deny, in_child, on_a_thread, with_denied, with_mount};
use tensora_io::testing::skip;
use tensora_io::{Control, DirectPolicy, Error, TargetFile};

fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// The error of a file for which there is no room, and which is not there afterwards.
fn expect_no_room(path: &Path, len: u64, kind: io::ErrorKind, remedy: &str) {
    for policy in [DirectPolicy::Never, DirectPolicy::Preferred] {
        let error = TargetFile::create(path, len, policy).unwrap_err();
        assert!(
            matches!(&error, Error::Reserve { path: named, bytes, .. } if named == path && *bytes == len),
            "{error:?}"
        );
        assert_eq!(error.io_error().unwrap().kind(), kind);
        let text = error.to_string();
        assert!(
            text.contains(&len.to_string()) && text.contains(remedy),
            "{text}"
        );
        assert!(!path.exists(), "it was left behind");
    }
}

#[test]
fn a_full_file_system_is_found_out_before_anything_is_written() {
    with_mount("a full file system", "tmpfs", "size=4m", |directory| {
        let path = directory.join("data");
        expect_no_room(&path, 5 << 20, io::ErrorKind::StorageFull, "make room");
        // What fits is there, and what fits beside it.
        let first = TargetFile::create(&path, 3 << 20, DirectPolicy::Preferred).unwrap();
        let second = directory.join("second");
        expect_no_room(&second, 2 << 20, io::ErrorKind::StorageFull, "make room");
        first
            .write_all_at(&vec![7; 3 << 20], 0, &Control::new())
            .unwrap();
        first.finish().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), vec![7; 3 << 20]);
    });
}

/// Without room reserved, a write fails half-way; the error says where.
#[test]
fn a_file_system_that_becomes_full_stops_a_write() {
    with_mount(
        "a file system that becomes full",
        "tmpfs",
        "size=4m",
        |directory| {
            let no_reserve = Denied::new(libc::SYS_fallocate, libc::EOPNOTSUPP);
            if !deny(&[no_reserve]) {
                return skip("a file system that becomes full: no seccomp here");
            }
            for policy in [DirectPolicy::Never, DirectPolicy::Preferred] {
                let path = directory.join("data");
                let target = TargetFile::create(&path, 6 << 20, policy).unwrap();
                assert_eq!(std::fs::metadata(&path).unwrap().len(), 6 << 20);
                let error = target
                    .write_all_at(&vec![7; 6 << 20], 0, &Control::new())
                    .unwrap_err();
                let Error::Write {
                    path: named,
                    offset,
                    ..
                } = &error
                else {
                    panic!("{error:?}");
                };
                assert_eq!(named, &path);
                assert!((3 << 20..=4 << 20).contains(offset), "{error}");
                assert_eq!(error.io_error().unwrap().kind(), io::ErrorKind::StorageFull);
                assert!(error.to_string().contains("make room"), "{error}");
                assert!(matches!(
                    target.finish(),
                    Err(Error::IncompleteTarget { offset: 0, missing_bytes, .. }) if missing_bytes == 6 << 20
                ));
                std::fs::remove_file(&path).unwrap();
            }
        },
    );
}

#[test]
fn a_file_system_without_direct_writes_is_written_through_the_page_cache() {
    with_mount(
        "a file system without direct writes",
        "ramfs",
        "",
        |directory| {
            let path = directory.join("data");
            let error = TargetFile::create(&path, 100_000, DirectPolicy::Required).unwrap_err();
            assert!(
                matches!(&error, Error::DirectUnsupported { path: named, reason }
                if named == &path && reason.contains("O_DIRECT")),
                "{error:?}"
            );
            assert!(!path.exists(), "it was left behind");
            let target = TargetFile::create(&path, 100_000, DirectPolicy::Preferred).unwrap();
            assert_eq!(target.direct_align_bytes(), None);
            target
                .write_all_at(&[7; 100_000], 0, &Control::new())
                .unwrap();
            let stats = target.finish().unwrap();
            assert_eq!((stats.bytes, stats.direct_bytes), (100_000, 0));
            let fallback = stats.fallback.unwrap();
            assert_eq!(fallback.path, path);
            assert!(fallback.reason.contains("O_DIRECT"), "{}", fallback.reason);
            assert_eq!(std::fs::read(&path).unwrap(), [7; 100_000]);
        },
    );
}

#[test]
fn a_read_only_file_system_is_named() {
    with_mount("a read-only file system", "tmpfs", "ro", |directory| {
        let error = TargetFile::create(directory.join("data"), 1, DirectPolicy::Never).unwrap_err();
        assert_eq!(
            error.io_error().unwrap().kind(),
            io::ErrorKind::ReadOnlyFilesystem
        );
        assert!(error.to_string().contains("can be written to"), "{error}");
    });
}

#[test]
fn a_quota_is_named() {
    let directory = directory();
    let path = directory.path().join("data");
    let denied = [Denied::new(libc::SYS_fallocate, libc::EDQUOT)];
    with_denied("a quota", &denied, || {
        expect_no_room(&path, 1000, io::ErrorKind::QuotaExceeded, "quota");
    });
}

/// Its room cannot be reserved, but it has its length and can be written.
#[test]
fn a_file_system_that_reserves_nothing_is_no_error() {
    let directory = directory();
    for errno in [libc::EOPNOTSUPP, libc::ENOSYS, libc::EINTR] {
        let path = directory.path().join(format!("data-{errno}"));
        let denied = [Denied::new(libc::SYS_fallocate, errno)];
        with_denied("a file system that reserves nothing", &denied, || {
            let target = TargetFile::create(&path, 100_000, DirectPolicy::Preferred).unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().len(), 100_000);
            target
                .write_all_at(&[7; 100_000], 0, &Control::new())
                .unwrap();
            target.finish().unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), [7; 100_000]);
        });
    }
}

/// The descriptors of this process that lead to `path`: for buffered writes, and for direct ones.
fn descriptors(path: &Path) -> (Option<i32>, Option<i32>) {
    let (mut buffered, mut direct) = (None, None);
    for entry in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
        if std::fs::read_link(entry.path()).ok().as_deref() != Some(path) {
            continue;
        }
        let name = entry.file_name().into_string().unwrap();
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{name}")).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = i32::from_str_radix(flags.unwrap().trim(), 8).unwrap();
        let place = match flags & libc::O_DIRECT {
            0 => &mut buffered,
            _ => &mut direct,
        };
        *place = Some(name.parse().unwrap());
    }
    (buffered, direct)
}

/// A target whose calls of `call` are answered with `errno`, on one of its two descriptors.
fn with_failing_target(
    what: &str,
    policy: DirectPolicy,
    fails_directly: bool,
    call: libc::c_long,
    errno: i32,
    check: impl FnOnce(TargetFile, PathBuf) + Send,
) {
    let directory = directory();
    let path = directory.path().canonicalize().unwrap().join("data");
    on_a_thread(|| {
        let target = match TargetFile::create(&path, 100_000, policy) {
            Ok(target) if target.direct_align_bytes().is_some() || !fails_directly => target,
            other => return skip(&format!("{what}: no direct writes here: {other:?}")),
        };
        let (buffered, direct) = descriptors(&path);
        let descriptor = if fails_directly { direct } else { buffered };
        if deny(&[Denied::new(call, errno).of(descriptor.unwrap())]) {
            check(target, path);
        } else {
            skip(&format!("{what}: no seccomp here"));
        }
    });
}

#[test]
fn direct_writes_that_turn_out_not_to_work_are_replaced_and_noted() {
    let what = "direct writes that turn out not to work";
    let call = libc::SYS_pwrite64;
    with_failing_target(
        what,
        DirectPolicy::Preferred,
        true,
        call,
        libc::EINVAL,
        |target, path| {
            let mut memory = tensora_io::Region::allocate(100_000).unwrap();
            memory.as_mut_slice().fill(7);
            for range in [45_056..100_000, 0..45_056] {
                target
                    .write_all_at(
                        &memory.as_slice()[range.clone()],
                        range.start as u64,
                        &Control::new(),
                    )
                    .unwrap();
            }
            assert_eq!(target.direct_align_bytes(), None);
            let stats = target.finish().unwrap();
            assert_eq!(stats.direct_bytes, 0);
            let fallback = stats.fallback.unwrap();
            assert_eq!(fallback.path, path);
            assert!(fallback.reason.contains("EINVAL"), "{}", fallback.reason);
            assert_eq!(std::fs::read(&path).unwrap(), [7; 100_000]);
        },
    );
    with_failing_target(
        what,
        DirectPolicy::Required,
        true,
        call,
        libc::EINVAL,
        |target, path| {
            let memory = tensora_io::Region::allocate(100_000).unwrap();
            let error = target
                .write_all_at(memory.as_slice(), 0, &Control::new())
                .unwrap_err();
            assert!(
                matches!(&error, Error::DirectUnsupported { path: named, reason }
                    if named == &path && reason.contains("EINVAL")),
                "{error:?}"
            );
        },
    );
}

#[test]
fn a_device_that_fails_is_named_with_the_place() {
    let what = "a device that fails";
    for policy in [DirectPolicy::Never, DirectPolicy::Preferred] {
        let fails_directly = policy == DirectPolicy::Preferred;
        with_failing_target(
            what,
            policy,
            fails_directly,
            libc::SYS_pwrite64,
            libc::EIO,
            |target, path| {
                let memory = tensora_io::Region::allocate(40_960).unwrap();
                let error = target
                    .write_all_at(memory.as_slice(), 8192, &Control::new())
                    .unwrap_err();
                assert!(
                    matches!(&error, Error::Write { path: named, offset: 8192, .. } if named == &path),
                    "{error:?}"
                );
                assert_eq!(
                    error.io_error().unwrap().raw_os_error(),
                    Some(libc::EIO),
                    "{error}"
                );
            },
        );
    }
    with_failing_target(
        what,
        DirectPolicy::Preferred,
        false,
        libc::SYS_fsync,
        libc::EIO,
        |target, path| {
            target
                .write_all_at(&[7; 100_000], 0, &Control::new())
                .unwrap();
            let error = target.finish().unwrap_err();
            assert!(
                matches!(&error, Error::File { operation: "sync", path: named, .. } if named == &path),
                "{error:?}"
            );
        },
    );
}

/// The kernel would kill a process that goes past its limit.
#[test]
fn a_limit_on_file_sizes_is_an_error_and_no_signal() {
    use rustix::process::{Resource, Rlimit, setrlimit};

    if in_child("a_limit_on_file_sizes_is_an_error_and_no_signal", |_| {}).is_some() {
        return;
    }
    let directory = directory();
    let path = directory.path().join("data");
    setrlimit(
        Resource::Fsize,
        Rlimit {
            current: Some(100_000),
            maximum: Some(100_000),
        },
    )
    .unwrap();
    expect_no_room(&path, 100_001, io::ErrorKind::FileTooLarge, "ulimit -f");
    let target = TargetFile::create(&path, 100_000, DirectPolicy::Preferred).unwrap();
    target
        .write_all_at(&[7; 100_000], 0, &Control::new())
        .unwrap();
    target.finish().unwrap();
}

#[test]
fn the_mode_follows_the_umask() {
    if in_child("the_mode_follows_the_umask", |_| {}).is_some() {
        return;
    }
    let directory = directory();
    for (umask, mode) in [
        (0o022, 0o644),
        (0o027, 0o640),
        (0o077, 0o600),
        (0o002, 0o664),
    ] {
        let path = directory.path().join(format!("data-{umask:o}"));
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(umask));
        let target = TargetFile::create(&path, 1, DirectPolicy::Preferred).unwrap();
        target.write_all_at(&[7], 0, &Control::new()).unwrap();
        target.finish().unwrap();
        let found = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(found & 0o7777, mode, "{umask:o}");
    }
}

#[test]
fn signals_during_writes_do_no_harm() {
    const LEN: usize = (24 << 20) + 777;
    if in_child("signals_during_writes_do_no_harm", |_| {}).is_some() {
        return;
    }
    machine_support::ignore_interruptions();
    let mut directories = vec![directory()];
    directories.extend(tempfile::tempdir_in("/dev/shm"));
    let content: Vec<u8> = (0..LEN).map(|at| (at % 251).to_le_bytes()[0]).collect();
    machine_support::while_interrupted("", Duration::from_micros(50), || {
        for directory in &directories {
            for policy in [DirectPolicy::Never, DirectPolicy::Preferred] {
                for round in 0..3 {
                    let path = directory.path().join(format!("data-{policy}-{round}"));
                    let target = TargetFile::create(&path, LEN as u64, policy).unwrap();
                    std::thread::scope(|scope| {
                        for (number, part) in content.chunks(1 << 20).enumerate() {
                            let target = &target;
                            scope.spawn(move || {
                                target
                                    .write_all_at(part, (number << 20) as u64, &Control::new())
                                    .unwrap();
                            });
                        }
                    });
                    target.finish().unwrap();
                    assert!(
                        std::fs::read(&path).unwrap() == content,
                        "{}",
                        path.display()
                    );
                    std::fs::remove_file(&path).unwrap();
                }
            }
        }
    });
}
