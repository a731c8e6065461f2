//! Promises of the facts: what a probe says agrees with what the system says by other ways, and with
//! what then happens.

#![allow(clippy::unwrap_used)]

mod skip_support;

use std::fs::File;
use std::io::Write;
#[cfg(unix)]
use std::os::unix::fs::FileExt;

use tensora_io::{
    Availability, BackendKind, DirectSupport, Error, FileSystemClass, Platform, SourceFile,
    StorageFacts, backend,
};

fn linux() -> bool {
    cfg!(all(target_os = "linux", not(tensora_portable)))
}

/// A stored file of `length` bytes, in a directory on whatever the build directory lies on: unlike `/tmp`,
/// that is rarely in memory.
fn stored_file(directory: &tempfile::TempDir, name: &str, length: usize) -> SourceFile {
    let path = directory.path().join(name);
    let mut file = File::create(&path).unwrap();
    file.write_all(&vec![0xA5; length]).unwrap();
    file.sync_all().unwrap();
    SourceFile::open(path).unwrap()
}

fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

#[test]
fn a_probe_lists_every_backend_once_in_order() {
    let platform = Platform::probe();
    let kinds: Vec<_> = platform.backends.iter().map(|fact| fact.kind).collect();
    assert_eq!(kinds, BackendKind::ALL);
    assert!(platform.cpus >= 1);
    assert!(platform.page_bytes.is_power_of_two());
    assert_eq!(platform.os, std::env::consts::OS);
    assert_eq!(platform.storage, None);
}

#[test]
fn a_backend_is_available_exactly_if_it_can_be_made() {
    for fact in Platform::probe().backends {
        match (&fact.availability, backend(fact.kind)) {
            (Availability::Available, Ok(made)) => assert_eq!(made.kind(), fact.kind),
            (
                Availability::Unavailable { reason, remedy },
                Err(Error::BackendUnavailable {
                    backend,
                    reason: expected_reason,
                    remedy: expected_remedy,
                }),
            ) => {
                assert_eq!(backend, fact.kind);
                assert_eq!((reason, remedy), (&expected_reason, &expected_remedy));
                assert!(!reason.is_empty() && !remedy.is_empty());
            }
            (availability, made) => panic!("{}: {availability:?}, but {made:?}", fact.kind),
        }
    }
}

#[test]
fn what_was_not_compiled_in_says_which_feature_is_missing() {
    for fact in Platform::probe().backends {
        if fact.kind.is_compiled_in() {
            continue;
        }
        let Availability::Unavailable { reason, remedy } = fact.availability else {
            panic!("{} is available but not compiled in", fact.kind);
        };
        assert!(reason.contains("cargo feature"), "{reason}");
        assert!(remedy.contains(fact.kind.as_str()), "{remedy}");
    }
}

#[cfg(all(target_os = "linux", not(tensora_portable)))]
mod on_linux {
    use tensora_io::MemorySource;

    use super::skip_support::skip;
    use super::*;

    fn output(program: &str, arguments: &[&str]) -> Option<String> {
        let output = std::process::Command::new(program)
            .args(arguments)
            // They change what `nproc` says.
            .env_remove("OMP_NUM_THREADS")
            .env_remove("OMP_THREAD_LIMIT")
            .output()
            .ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned())
    }

    #[test]
    fn the_shell_says_the_same() {
        let platform = Platform::probe();
        let limit = |flag: &str, unit: u64| {
            let text = output("sh", &["-c", &format!("ulimit {flag}")])?;
            Some(text.parse::<u64>().ok().map(|value| value * unit))
        };
        let checks = [
            (
                "uname",
                output("uname", &["-r"]).map(|it| platform.kernel.as_deref() == Some(&it)),
            ),
            (
                "getconf",
                output("getconf", &["PAGESIZE"]).map(|it| it == platform.page_bytes.to_string()),
            ),
            // A quota, which `nproc` does not know, can only make it fewer.
            (
                "nproc",
                output("nproc", &[]).map(|it| platform.cpus <= it.parse().unwrap()),
            ),
            (
                "ulimit -n",
                limit("-n", 1).map(|it| it == platform.open_files),
            ),
            (
                "ulimit -l",
                limit("-l", 1024).map(|it| it == platform.memlock_bytes),
            ),
        ];
        for (program, same) in checks {
            match same {
                Some(same) => assert!(same, "{program} contradicts {platform:?}"),
                None => skip(&format!("the shell says the same: no {program} here")),
            }
        }
    }

    /// Runs `check` on a thread for which the kernel answers each of `denied`, a system call, with an error
    /// number, as the filters of container runtimes do. Returns whether such a filter can be had.
    fn with_filter(denied: &[(libc::c_long, i32)], check: impl FnOnce() + Send) -> bool {
        let statement = |code: u32, jump_if_true, jump_if_false, value| libc::sock_filter {
            code: u16::try_from(code).unwrap(),
            jt: jump_if_true,
            jf: jump_if_false,
            k: value,
        };
        // The number of the system call is the first field of what a filter sees.
        let mut program = vec![statement(
            libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
            0,
            0,
            0,
        )];
        for &(number, errno) in denied {
            let number = u32::try_from(number).unwrap();
            let answer = libc::SECCOMP_RET_ERRNO | errno.cast_unsigned();
            program.push(statement(
                libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
                0,
                1,
                number,
            ));
            program.push(statement(libc::BPF_RET | libc::BPF_K, 0, 0, answer));
        }
        program.push(statement(
            libc::BPF_RET | libc::BPF_K,
            0,
            0,
            libc::SECCOMP_RET_ALLOW,
        ));
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let filter = libc::sock_fprog {
                    len: u16::try_from(program.len()).unwrap(),
                    filter: program.as_mut_ptr(),
                };
                rustix::thread::set_no_new_privs(true).unwrap();
                // SAFETY: the filter points to `len` valid statements that outlive the call; the kernel
                // copies them and applies them to this thread alone.
                let result = unsafe {
                    libc::prctl(
                        libc::PR_SET_SECCOMP,
                        libc::SECCOMP_MODE_FILTER,
                        &raw const filter,
                    )
                };
                if result == 0 {
                    check();
                }
                result == 0
            });
            thread.join().unwrap()
        })
    }

    #[test]
    fn a_filter_is_named_as_the_reason() {
        let before = Platform::probe();
        let works = |kind| before.availability(kind).unwrap().is_available();
        let (io_uring, mmap) = (BackendKind::IoUring, BackendKind::Mmap);
        for (kind, denied, errno, in_reason, in_remedy) in [
            (
                io_uring,
                libc::SYS_io_uring_setup,
                libc::EPERM,
                "EPERM: blocked by",
                "seccomp",
            ),
            (
                io_uring,
                libc::SYS_io_uring_setup,
                libc::ENOSYS,
                "ENOSYS",
                "Linux 5.6",
            ),
            (
                io_uring,
                libc::SYS_io_uring_setup,
                libc::ENOMEM,
                "locked memory",
                "ulimit -l",
            ),
            (
                io_uring,
                libc::SYS_io_uring_register,
                libc::EPERM,
                "plain reads",
                "io_uring_register",
            ),
            (
                io_uring,
                libc::SYS_io_uring_register,
                libc::ENOMEM,
                "io_uring_register: Cannot allocate memory",
                "io_uring_register",
            ),
            (
                io_uring,
                libc::SYS_io_uring_enter,
                libc::EPERM,
                "io_uring_enter",
                "io_uring_enter",
            ),
            (
                mmap,
                libc::SYS_process_vm_readv,
                libc::EPERM,
                "seccomp",
                "process_vm_readv",
            ),
            (
                mmap,
                libc::SYS_process_vm_readv,
                libc::ENOSYS,
                "ENOSYS",
                "run a kernel",
            ),
        ] {
            if !works(kind) {
                skip(&format!(
                    "a filter is named as the reason: {kind} does not work anyway"
                ));
                continue;
            }
            let filtered = with_filter(&[(denied, errno)], || {
                let platform = Platform::probe();
                for fact in &platform.backends {
                    match &fact.availability {
                        Availability::Unavailable { reason, remedy } if fact.kind == kind => {
                            assert!(reason.contains(in_reason), "{reason}");
                            assert!(remedy.contains(in_remedy), "{remedy}");
                        }
                        availability => {
                            assert_ne!(fact.kind, kind, "{denied} is denied");
                            assert_eq!(availability.is_available(), works(fact.kind));
                        }
                    }
                }
            });
            if !filtered {
                skip("a filter is named as the reason: no seccomp here");
            }
        }
    }

    #[test]
    fn residency_without_cachestat_is_the_same() {
        let directory = directory();
        let file = stored_file(&directory, "file", (1 << 20) + 5);
        let ranges = || [0..file.len(), 7..file.len() - 1, 0..0, 4095..4097];
        let expected = ranges().map(|range| file.resident_bytes(range));
        assert!(expected[0].is_some());
        let cachestat = [(451, libc::ENOSYS)];
        let filtered = with_filter(&cachestat, || {
            assert_eq!(ranges().map(|range| file.resident_bytes(range)), expected);
        });
        // Without either nothing is known, and nothing fails.
        let neither = [(451, libc::EPERM), (libc::SYS_mincore, libc::EPERM)];
        with_filter(&neither, || {
            assert_eq!(file.resident_bytes(0..file.len()), None);
            assert_eq!(StorageFacts::probe(&[&file]).resident_bytes, None);
        });
        if !filtered {
            skip("residency without cachestat is the same: no seccomp here");
        }
    }

    /// Nobody may ask for limits, by either system call that there is for it.
    #[test]
    fn limits_are_known_although_the_question_is_refused() {
        let before = Platform::probe();
        for errno in [libc::EPERM, libc::ENOSYS] {
            let calls = [libc::SYS_prlimit64, libc::SYS_getrlimit].map(|call| (call, errno));
            let filtered = with_filter(&calls, || {
                let platform = Platform::probe();
                assert_eq!(platform.open_files, before.open_files);
                assert_eq!(platform.memlock_bytes, before.memlock_bytes);
            });
            if !filtered {
                skip("limits that may not be asked for: no seccomp here");
            }
        }
    }

    #[test]
    fn memory_figures_are_consistent() {
        let memory = Platform::probe().memory;
        let (total, available) = (memory.total_bytes.unwrap(), memory.available_bytes.unwrap());
        assert!(available <= total, "{memory:?}");
        assert_eq!(
            memory.cgroup_limit_bytes.is_some(),
            memory.cgroup_available_bytes.is_some()
        );
        assert!(memory.cgroup_available_bytes <= memory.cgroup_limit_bytes);
        let (usable, source) = memory.usable_bytes().unwrap();
        assert!(usable <= available);
        let decisive = match source {
            MemorySource::Machine => memory.available_bytes,
            MemorySource::ControlGroup => memory.cgroup_available_bytes,
            MemorySource::AddressSpace => memory.address_space_available_bytes,
            MemorySource::Data => memory.data_available_bytes,
            other => panic!("{other}"),
        };
        assert_eq!(decisive, Some(usable));
        // The limit stands in a file that has just been read.
        assert_eq!(
            memory.cgroup_limit_path.is_some(),
            memory.cgroup_limit_bytes.is_some()
        );
        assert!(memory.cgroup_limit_path.is_none_or(|path| path.exists()));
    }

    #[test]
    fn a_file_system_in_memory_is_told_apart() {
        let Ok(directory) = tempfile::tempdir_in("/dev/shm") else {
            skip("a file system in memory is told apart: no /dev/shm here");
            return;
        };
        let in_memory = stored_file(&directory, "memory", 10_000);
        let storage = StorageFacts::probe(&[&in_memory]);
        if storage.file_system != "tmpfs" {
            skip("a file system in memory is told apart: /dev/shm is no tmpfs");
            return;
        }
        assert_eq!(storage.class, FileSystemClass::Memory);
        assert_eq!(storage.device, None);
        assert_eq!(storage.resident_bytes, Some(10_000));

        // Beside a file on a device, the device stands.
        let elsewhere = super::directory();
        let stored = stored_file(&elsewhere, "stored", 10_000);
        let alone = StorageFacts::probe(&[&stored]);
        let both = StorageFacts::probe(&[&in_memory, &stored]);
        assert_eq!(both.file_system, alone.file_system);
        assert_eq!((both.class, &both.device), (alone.class, &alone.device));
        assert_eq!(both.file_bytes, 20_000);
    }

    #[test]
    fn df_says_the_same() {
        let directory = directory();
        let file = stored_file(&directory, "file", 5000);
        let storage = StorageFacts::probe(&[&file]);
        let path = file.path().to_str().unwrap();
        match output("df", &["--output=fstype", path]) {
            Some(text) => assert_eq!(text.lines().last(), Some(storage.file_system.as_str())),
            None => skip("df says the same: no GNU df here"),
        }
    }

    /// Whether a file just written and synced leaves the page cache when asked to.
    fn evicts(file: &SourceFile) -> bool {
        file.evict().unwrap();
        file.resident_bytes(0..file.len())
            .is_some_and(|bytes| bytes < file.len() / 100)
    }

    #[test]
    fn residency_follows_reading_and_evicting() {
        const LENGTH: usize = (8 << 20) + 777;
        let directory = directory();
        let file = stored_file(&directory, "file", LENGTH);
        let length = LENGTH as u64;
        assert_eq!(std::fs::read(file.path()).unwrap().len(), LENGTH);
        let Some(resident) = file.resident_bytes(0..length) else {
            skip("residency follows reading and evicting: the system does not tell");
            return;
        };
        assert!(
            resident > length * 99 / 100,
            "{resident} of {length} after reading"
        );
        assert!(resident <= length);

        if !evicts(&file) {
            skip("residency follows evicting: the file system keeps its pages");
            return;
        }
        // One page of the middle, and what was read ahead around it.
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_exact_at(file.file(), &mut byte, length / 2).unwrap();
        let page = Platform::probe().page_bytes;
        let middle = length / 2 - length / 2 % page;
        assert_eq!(file.resident_bytes(middle..middle + page), Some(page));
        assert_eq!(file.resident_bytes(middle + 1..middle + 3), Some(2));
        assert!(file.resident_bytes(0..length).unwrap() < length);
        let storage = StorageFacts::probe(&[&file]);
        assert_eq!(storage.resident_bytes, file.resident_bytes(0..length));
    }
}

/// Large enough to be counted in pieces by several threads.
#[test]
fn residency_of_large_files_is_the_sum_of_theirs() {
    let directory = directory();
    // Nothing but holes, which take no space but can be in the page cache like anything else.
    let files: Vec<_> = [700 << 20, 3, 0, (500 << 20) + 4097]
        .into_iter()
        .enumerate()
        .map(|(number, length)| {
            let path = directory.path().join(number.to_string());
            File::create(&path).unwrap().set_len(length).unwrap();
            SourceFile::open(path).unwrap()
        })
        .collect();
    for (at, length) in [(0, 100), (300 << 20, 9 << 20), ((700 << 20) - 5, 5)] {
        let mut bytes = vec![0; length];
        files[0].file().read_exact_at(&mut bytes, at).unwrap();
    }
    let one_by_one: Option<Vec<_>> = files
        .iter()
        .map(|file| file.resident_bytes(0..file.len()))
        .collect();
    let Some(one_by_one) = one_by_one else {
        assert!(!linux(), "Linux tells about an own file");
        return;
    };
    let storage = StorageFacts::probe(&files.iter().collect::<Vec<_>>());
    assert_eq!(storage.resident_bytes, Some(one_by_one.iter().sum()));
    assert!(one_by_one[0] >= 9 << 20, "{one_by_one:?}");
    assert!(!storage.is_resident());
    assert!(!storage.resident_is_estimate);
    let small = StorageFacts::probe(&[&files[2]]);
    assert!(small.is_resident());
    assert!(!small.resident_is_estimate);
}

/// A plan that takes all for resident because a sample is, is wrong about little.
#[cfg(all(target_os = "linux", not(tensora_portable)))]
#[test]
fn no_long_gap_escapes_the_sample() {
    use rustix::fs::{Advice, fadvise};

    const LENGTHS: [u64; 2] = [(96 << 20) + 4097, 40 << 20];
    /// Twice the distance of samples, and as much again as large folios may keep at both ends.
    const GAP_BYTES: u64 = 16 << 20;

    let directory = directory();
    let files: Vec<_> = (0..)
        .zip(LENGTHS)
        .map(|(number, length)| {
            let path = directory.path().join(format!("{number}"));
            File::create(&path).unwrap().set_len(length).unwrap();
            SourceFile::open(path).unwrap()
        })
        .collect();
    let fill = || {
        for file in &files {
            std::io::copy(&mut file.file(), &mut std::io::sink()).unwrap();
            std::io::Seek::rewind(&mut file.file()).unwrap();
        }
    };
    let probe = || StorageFacts::probe(&files.iter().collect::<Vec<_>>());
    let count = || -> u64 {
        files
            .iter()
            .map(|file| file.resident_bytes(0..file.len()).unwrap())
            .sum()
    };
    fill();
    let total = LENGTHS.iter().sum();
    let storage = probe();
    if !storage.is_resident() {
        skip_support::skip(
            "no long gap escapes the sample: holes are not kept in the page cache here",
        );
        return;
    }
    assert_eq!(storage.resident_bytes, Some(total));

    let mut looked_at = 0;
    for file in &files {
        for start in (0..file.len()).step_by((5 << 20) + 12345) {
            fill();
            let gap = std::num::NonZero::new(GAP_BYTES);
            fadvise(file.file(), start, gap, Advice::DontNeed).unwrap();
            let missing = total - count();
            // The end of a file is nearer, or the file system keeps its pages.
            if missing < GAP_BYTES / 2 {
                continue;
            }
            let storage = probe();
            assert!(!storage.resident_is_estimate, "{start}");
            // Others may need memory meanwhile.
            assert!(storage.resident_bytes.unwrap() <= total - missing);
            looked_at += 1;
        }
    }
    if looked_at == 0 {
        skip_support::skip("no long gap escapes the sample: the file system keeps its pages");
    }
}

#[test]
fn residency_of_odd_ranges() {
    let directory = directory();
    let file = stored_file(&directory, "file", 10_000);
    let empty = stored_file(&directory, "empty", 0);
    let Some(all) = file.resident_bytes(0..10_000) else {
        assert!(!linux(), "Linux tells about an own file");
        return;
    };
    assert_eq!(
        file.resident_bytes(0..u64::MAX),
        Some(all),
        "cut off at the end"
    );
    assert_eq!(file.resident_bytes(10_000..u64::MAX), Some(0));
    assert_eq!(file.resident_bytes(u64::MAX..u64::MAX), Some(0));
    #[expect(clippy::reversed_empty_ranges)]
    let reversed = 5000..100;
    assert_eq!(file.resident_bytes(reversed), Some(0));
    assert_eq!(empty.resident_bytes(0..u64::MAX), Some(0));
}

#[test]
fn storage_of_many_files_is_cheap() {
    let directory = directory();
    let files: Vec<_> = (0..163)
        .map(|number| stored_file(&directory, &number.to_string(), 100))
        .collect();
    let files: Vec<_> = files.iter().collect();
    let started = std::time::Instant::now();
    let storage = StorageFacts::probe(&files);
    let elapsed = started.elapsed();
    assert_eq!(storage.file_bytes, 16_300);
    // A tenth of that is usual; the rest is room for a busy machine.
    assert!(elapsed.as_millis() < 1630, "{elapsed:?}");
    assert_eq!(
        storage.direct.is_supported(),
        files[0].direct_support().is_supported()
    );
}

#[test]
fn storage_of_one_file_is_that_files() {
    let directory = directory();
    let file = stored_file(&directory, "file", 5000);
    let storage = StorageFacts::probe(&[&file]);
    assert_eq!(storage.direct, file.direct_support());
    assert_eq!(storage.file_bytes, 5000);
    if linux() {
        assert_ne!(storage.file_system, "unknown");
    } else {
        assert_eq!(storage.class, FileSystemClass::Unknown);
        assert_eq!(storage.resident_bytes, None);
        assert!(matches!(storage.direct, DirectSupport::Unsupported { .. }));
        assert!(file.evict().is_err());
    }
}

#[test]
fn storage_of_nothing_is_unknown() {
    assert_eq!(StorageFacts::probe(&[]), StorageFacts::unknown());
}

#[cfg(all(target_os = "linux", not(tensora_portable)))]
#[test]
fn refreshing_looks_at_memory_again_and_at_nothing_else() {
    let mut platform = Platform::probe();
    let probed = platform.memory.available_bytes;
    platform.memory.available_bytes = None;
    platform.kernel = Some("kept".to_owned());
    platform.refresh();
    assert!(probed.is_some() && platform.memory.available_bytes.is_some());
    assert_eq!(platform.kernel.as_deref(), Some("kept"));
}
