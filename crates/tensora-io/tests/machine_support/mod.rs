//! What tests need to make a machine hostile: filters for system calls, file systems of their own, processes of
//! their own, and signals.
// Each test uses a part of it.
#![allow(dead_code, clippy::unwrap_used)]

use std::ffi::CString;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::UnshareFlags;
use tensora_io::testing::skip;

/// Set in the process that [`in_child`] runs a test in.
const CHILD: &str = "TENSORA_TEST_CHILD";
/// Longer than any test takes in a process of its own that does not hang, on however busy a machine.
const PATIENCE: Duration = Duration::from_secs(300);

/// A system call that the kernel shall answer with an error number.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Denied {
    call: libc::c_long,
    errno: i32,
    /// Only where this argument, counted from 0, is so.
    only: Option<(u32, Argument)>,
}

/// The low 32 bits of an argument of a system call.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Argument {
    Is(u32),
    IsAtLeast(u32),
}

impl Denied {
    pub(crate) fn new(call: libc::c_long, errno: i32) -> Self {
        Self {
            call,
            errno,
            only: None,
        }
    }

    /// Only for this descriptor, where a descriptor is the call's first argument.
    pub(crate) fn of(self, descriptor: i32) -> Self {
        self.only(0, Argument::Is(descriptor.cast_unsigned()))
    }

    pub(crate) fn only(self, place: u32, argument: Argument) -> Self {
        Self {
            only: Some((place, argument)),
            ..self
        }
    }
}

/// From now on, the kernel answers these calls of this thread, and of threads that it starts, with an error, as
/// the filters of container runtimes do. There is no way back. Whether such a filter can be had.
pub(crate) fn deny(denied: &[Denied]) -> bool {
    const WORD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const AT_LEAST: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    // What a filter sees begins with the number of the call; the arguments, of 64 bits each, begin at byte 16.
    const NUMBER: u32 = 0;
    let argument_at =
        |place: u32| 16 + 8 * place + if cfg!(target_endian = "little") { 0 } else { 4 };
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
        program.push(statement(WORD, 0, 0, NUMBER));
        // Where the call is another, jump behind the answer.
        program.push(statement(
            EQUAL,
            0,
            if denied.only.is_some() { 3 } else { 1 },
            number,
        ));
        if let Some((place, argument)) = denied.only {
            let (compare, value) = match argument {
                Argument::Is(value) => (EQUAL, value),
                Argument::IsAtLeast(value) => (AT_LEAST, value),
            };
            program.push(statement(WORD, 0, 0, argument_at(place)));
            program.push(statement(compare, 0, 1, value));
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
    in_child_within(PATIENCE, test, prepare)
}

/// The same; a process that takes longer is killed, and the test fails.
pub(crate) fn in_child_within(
    patience: Duration,
    test: &str,
    prepare: impl FnOnce(&mut Command),
) -> Option<Output> {
    if std::env::var_os(CHILD).is_some_and(|name| name == test) {
        return None;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", test, "--nocapture", "--test-threads", "1"])
        .env(CHILD, test)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    prepare(&mut command);
    let child = command.spawn().unwrap();
    let process = Pid::from_child(&child);
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    let in_time = receiver.recv_timeout(patience);
    let is_late = in_time.is_err();
    if is_late {
        // If it has ended by now, this is an error, and no matter.
        let _ = kill_process(process, Signal::KILL);
    }
    // What it has said until then. A process of its own that it leaves may keep its output open.
    let output = in_time.or_else(|_| receiver.recv_timeout(Duration::from_secs(10)));
    let Ok(output) = output.map(Result::unwrap) else {
        panic!("{test} in a process of its own was killed: no end after {patience:?}");
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        !is_late,
        "{test} in a process of its own was killed: no end after {patience:?}\n{text}\n{errors}"
    );
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{test} in a process of its own: {}\n{text}\n{errors}",
        output.status,
    );
    Some(output)
}

/// Whether a process can have mounts that nobody else sees.
pub(crate) fn has_own_mounts() -> bool {
    on_a_thread(|| {
        // SAFETY: as in `with_mount`; the thread ends at once.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.is_ok()
    })
}

/// Gives the process to be started mounts of its own: what it mounts, nobody else sees, and it is gone with it.
pub(crate) fn with_own_mounts(command: &mut Command) {
    let unshare = || {
        // SAFETY: as in `with_mount`.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        Ok(rustix::mount::mount_change("/", private)?)
    };
    // SAFETY: between fork and exec, `unshare` makes two system calls and does not allocate: its paths are short
    // enough for the stack.
    unsafe { command.pre_exec(unshare) };
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
