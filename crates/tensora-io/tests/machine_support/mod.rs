//! What tests need to make a machine hostile: filters for system calls, file systems of their own, processes of
//! their own, and signals.
#![cfg(all(feature = "testing", target_os = "linux", not(tensora_portable)))]
// Each test uses a part of it.
#![allow(dead_code, clippy::unwrap_used)]

use std::ffi::CString;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::thread::UnshareFlags;
use tensora_io::testing::skip;

/// Set in the process that [`in_child`] runs a test in.
const CHILD: &str = "TENSORA_TEST_CHILD";

/// A system call that the kernel shall answer with an error number.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Denied {
    pub(crate) call: libc::c_long,
    /// Only for this descriptor, which is then the call's first argument.
    pub(crate) descriptor: Option<i32>,
    pub(crate) errno: i32,
}

impl Denied {
    pub(crate) fn new(call: libc::c_long, errno: i32) -> Self {
        Self {
            call,
            descriptor: None,
            errno,
        }
    }

    pub(crate) fn of(self, descriptor: i32) -> Self {
        Self {
            descriptor: Some(descriptor),
            ..self
        }
    }
}

/// From now on, the kernel answers these calls of this thread, and of threads that it starts, with an error, as
/// the filters of container runtimes do. There is no way back. Whether such a filter can be had.
pub(crate) fn deny(denied: &[Denied]) -> bool {
    const WORD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    let statement = |code: u32, jump_if_true, jump_if_false, value| libc::sock_filter {
        code: u16::try_from(code).unwrap(),
        jt: jump_if_true,
        jf: jump_if_false,
        k: value,
    };
    let mut program = Vec::new();
    for denied in denied {
        let answer = libc::SECCOMP_RET_ERRNO | denied.errno.cast_unsigned();
        let number = u32::try_from(denied.call).unwrap();
        // The number of the system call is the first field of what a filter sees, the low half of the first
        // argument stands at byte 16 (at 20 where the high half comes first).
        program.push(statement(WORD, 0, 0, 0));
        match denied.descriptor {
            None => program.push(statement(EQUAL, 0, 1, number)),
            Some(descriptor) => {
                let low = if cfg!(target_endian = "little") {
                    16
                } else {
                    20
                };
                program.push(statement(EQUAL, 0, 3, number));
                program.push(statement(WORD, 0, 0, low));
                program.push(statement(EQUAL, 0, 1, descriptor.cast_unsigned()));
            }
        }
        program.push(statement(RETURN, 0, 0, answer));
    }
    program.push(statement(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW));
    let filter = libc::sock_fprog {
        len: u16::try_from(program.len()).unwrap(),
        filter: program.as_mut_ptr(),
    };
    rustix::thread::set_no_new_privs(true).unwrap();
    // SAFETY: the filter points to `len` valid statements that outlive the call; the kernel copies them and
    // applies them to this thread alone.
    let result = unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const filter,
        )
    };
    result == 0
}

/// Runs `check` on a thread of its own, whose name is that of the test.
pub(crate) fn on_a_thread<T: Send>(check: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let name = std::thread::current().name().unwrap_or("test").to_owned();
        std::thread::Builder::new()
            .name(name)
            .spawn_scoped(scope, check)
            .unwrap()
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Runs `check` on a thread for which these calls are denied; skips it where there are no filters.
pub(crate) fn with_denied(what: &str, denied: &[Denied], check: impl FnOnce() + Send) {
    on_a_thread(|| {
        if deny(denied) {
            check();
        } else {
            skip(&format!("{what}: no seccomp here"));
        }
    });
}

/// Runs `check` with a file system of its own, which nobody else sees, and which is gone afterwards.
pub(crate) fn with_mount(
    what: &str,
    file_system: &str,
    options: &str,
    check: impl FnOnce(&Path) + Send,
) {
    let directory = tempfile::tempdir().unwrap();
    on_a_thread(|| {
        // SAFETY: what a thread shares of the file system with others (its root, its directory and its mounts) is
        // only copied; nothing that this process relies on for its memory changes.
        let unshared = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) };
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        let data = CString::new(options).unwrap();
        let mounted = unshared
            .and_then(|()| rustix::mount::mount_change("/", private))
            .and_then(|()| {
                rustix::mount::mount(
                    file_system,
                    directory.path(),
                    file_system,
                    MountFlags::empty(),
                    data.as_c_str(),
                )
            });
        if let Err(errno) = mounted {
            return skip(&format!(
                "{what}: a {file_system} cannot be mounted here: {errno}"
            ));
        }
        check(directory.path());
        // Files that are still open keep it alive, and its memory with it.
        rustix::mount::unmount(directory.path(), UnmountFlags::empty()).unwrap();
    });
}

/// Runs the test of this name once more, alone in a process of its own, which `prepare` can change before it
/// begins. `None` in that process: then the test does its work.
pub(crate) fn in_child(test: &str, prepare: impl FnOnce(&mut Command)) -> Option<Output> {
    if std::env::var_os(CHILD).is_some_and(|name| name == test) {
        return None;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", test, "--nocapture", "--test-threads", "1"])
        .env(CHILD, test);
    prepare(&mut command);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{test} in a process of its own: {}\n{text}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Some(output)
}

/// Makes `SIGUSR2` interrupt system calls and do nothing else, from now on, in this process.
pub(crate) fn ignore_interruptions() {
    extern "C" fn handle(_signal: libc::c_int) {}
    // SAFETY: for a `sigaction`, all zeros are no flags, above all not `SA_RESTART`, and an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handle as extern "C" fn(libc::c_int) as libc::sighandler_t;
    // SAFETY: the handler does nothing, which is safe at any moment; the old action is not asked for.
    let result = unsafe { libc::sigaction(libc::SIGUSR2, &raw const action, std::ptr::null_mut()) };
    assert_eq!(result, 0, "sigaction: {}", std::io::Error::last_os_error());
}

/// Sends `SIGUSR2` to every thread of this process whose name begins so; how many there were.
pub(crate) fn interrupt_threads(name: &str) -> usize {
    let mut count = 0;
    for entry in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
        let number = entry.file_name().to_string_lossy().parse::<libc::pid_t>();
        // Gone by now, maybe.
        let own = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if let Ok(thread) = number
            && own.starts_with(name)
        {
            let process = std::process::id();
            // SAFETY: passes numbers only. A thread that has ended meanwhile is an error, and no matter.
            unsafe { libc::syscall(libc::SYS_tgkill, process, thread, libc::SIGUSR2) };
            count += 1;
        }
    }
    count
}

/// Runs `work` while every thread of this process whose name begins so is interrupted all the time.
pub(crate) fn while_interrupted<T>(name: &str, pause: Duration, work: impl FnOnce() -> T) -> T {
    use std::sync::atomic::{AtomicBool, Ordering};

    struct StopOnDrop<'s>(&'s AtomicBool);
    impl Drop for StopOnDrop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _guard = StopOnDrop(&stop);
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                interrupt_threads(name);
                std::thread::sleep(pause);
            }
        });
        work()
    })
}
