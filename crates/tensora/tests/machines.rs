//! Loads on machines that do not want them: each test makes one condition, in a process of its own, and loads with every
//! backend. What comes out is the right bytes, or an error that names the cause and what to do.
#![cfg(all(
    target_os = "linux",
    feature = "sync",
    feature = "async",
    feature = "io-uring",
    feature = "mmap"
))]
#![allow(clippy::unwrap_used)]

mod common;
#[path = "../../tensora-io/tests/machine_support/mod.rs"]
mod machine_support;

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::num::NonZero;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{Expected, skip};
use machine_support::{
    Argument, Denied, deny, has_own_mounts, in_child, in_child_within, on_a_thread, with_own_mounts,
};
use rustix::mount::{MountFlags, mount, mount_bind, mount_remount};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tempfile::TempDir;
use tensora::formats::{Sharding, TensorSpec, safetensors_layout};
use tensora::heuristics::PlanError;
use tensora::io::{Availability, Platform};
use tensora::{BackendKind, Checkpoint, DirectPolicy, Dtype, Error, Loader, Plan, ProfileChoice};

/// Shards of the largest checkpoint in common use.
const SHARDS: u32 = 163;

/// A checkpoint whose bytes are known, and the backends that work here before the machine becomes hostile.
struct Trial {
    directory: TempDir,
    expected: Expected,
    usable: Vec<BackendKind>,
}

impl Trial {
    /// In the system's directory for temporary files, where an ordinary user can read it.
    fn new() -> Self {
        Self::of(common::expected(), "three SafeTensors shards")
    }

    fn of(expected: Expected, layout: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
        common::write(&expected, layout, directory.path());
        Self {
            directory,
            expected,
            usable: usable(),
        }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The plan of a load with this backend, or whichever is chosen, that gave every byte.
    fn load(&self, kind: Option<BackendKind>) -> Result<Plan, Error> {
        load_and_compare(self.path(), &self.expected, &loader(kind))
    }

    /// Every backend that worked before works still, and so does the choice.
    fn works(&self) -> Plan {
        for &kind in &self.usable {
            self.works_with(kind);
        }
        self.load(None)
            .unwrap_or_else(|error| panic!("auto: {error}"))
    }

    fn works_with(&self, kind: BackendKind) -> Plan {
        let plan = self
            .load(Some(kind))
            .unwrap_or_else(|error| panic!("{kind}: {error}"));
        assert_eq!(plan.backend, kind);
        plan
    }

    /// A load with this backend fails, and says so.
    fn refuses(&self, kind: Option<BackendKind>, said: &[&str]) -> Error {
        let error = self.load(kind).expect_err("no load can work here");
        expect_said(&error.to_string(), said);
        error
    }

    fn has(&self, kind: BackendKind) -> bool {
        let usable = self.usable.contains(&kind);
        if !usable {
            skip(&format!("{kind} does not work here anyway"));
        }
        usable
    }
}

/// The backends that work here.
fn usable() -> Vec<BackendKind> {
    let platform = Platform::probe();
    let works = |kind: &BackendKind| platform.availability(*kind) == Some(&Availability::Available);
    BackendKind::ALL.into_iter().filter(works).collect()
}

/// Without what was measured here: constants decide.
fn loader(kind: Option<BackendKind>) -> Loader {
    let loader = Loader::new().profiles(ProfileChoice::Ignore);
    match kind {
        Some(kind) => loader.backend(kind),
        None => loader,
    }
}

fn load_and_compare(path: &Path, expected: &Expected, loader: &Loader) -> Result<Plan, Error> {
    let checkpoint = loader.load(path)?;
    compare(&checkpoint, expected);
    Ok(checkpoint.report().plan.clone())
}

#[track_caller]
fn compare(checkpoint: &Checkpoint, expected: &Expected) {
    assert_eq!(checkpoint.iter().len(), expected.len());
    for (name, (dtype, shape, data)) in expected {
        let tensor = checkpoint.tensor(name).unwrap();
        let of_tensor: Vec<u64> = tensor.shape().iter().map(|&size| size as u64).collect();
        assert_eq!((tensor.dtype(), &of_tensor), (*dtype, shape), "{name}");
        assert!(tensor.bytes()[..] == data[..], "wrong bytes in {name}");
    }
}

#[track_caller]
fn expect_said(text: &str, said: &[&str]) {
    // Plans are wrapped.
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    for part in said {
        assert!(text.contains(part), "{part:?} is missing in: {text}");
    }
}

/// Denies system calls, or counts a skip.
fn denied(what: &str, calls: &[Denied]) -> bool {
    let done = deny(calls);
    if !done {
        skip(&format!("{what}: no seccomp here"));
    }
    done
}

fn limit(resource: Resource, bytes: u64) {
    let maximum = getrlimit(resource).maximum;
    setrlimit(
        resource,
        Rlimit {
            current: Some(bytes),
            maximum,
        },
    )
    .unwrap();
}

/// From now on, this process belongs to a user that has no other, and no special rights; whether that could be had.
fn become_ordinary(what: &str) -> bool {
    let user = 20_000 + std::process::id() % 40_000;
    if !rustix::process::geteuid().is_root() {
        return true;
    }
    // SAFETY: passes numbers only; no groups are passed.
    let groups = unsafe { libc::setgroups(0, std::ptr::null()) };
    // SAFETY: passes numbers only. Both calls change every thread of the process.
    let group = unsafe { libc::setresgid(user, user, user) };
    // SAFETY: as above.
    let owner = unsafe { libc::setresuid(user, user, user) };
    let done = (groups, group, owner) == (0, 0, 0);
    if !done {
        skip(&format!(
            "{what}: this process cannot become an ordinary user's"
        ));
    }
    done
}

/// A test in a process of its own that hangs fails, and says which it was.
#[test]
fn a_process_that_hangs_is_killed_and_named() {
    const TEST: &str = "a_process_that_hangs_is_killed_and_named";

    let outcome =
        std::panic::catch_unwind(|| in_child_within(Duration::from_secs(2), TEST, |_| {}));
    match outcome {
        // In that process.
        Ok(None) => loop {
            std::thread::sleep(Duration::from_secs(1));
        },
        Ok(Some(output)) => panic!("it came to an end: {output:?}"),
        Err(panic) => expect_said(panic.downcast_ref::<String>().unwrap(), &[TEST, "killed"]),
    }
}

#[test]
fn forbidden_rings_are_named_and_not_chosen() {
    if in_child("forbidden_rings_are_named_and_not_chosen", |_| {}).is_some() {
        return;
    }
    let trial = Trial::new();
    if !trial.has(BackendKind::IoUring) {
        return;
    }
    for (call, errno, reason, remedy) in [
        (
            libc::SYS_io_uring_setup,
            libc::EPERM,
            "io_uring_setup: EPERM: blocked by seccomp",
            "kernel.io_uring_disabled=0",
        ),
        (
            libc::SYS_io_uring_setup,
            libc::ENOSYS,
            "io_uring_setup: ENOSYS: this kernel has no io_uring",
            "Linux 5.6",
        ),
        (
            libc::SYS_io_uring_setup,
            libc::ENOMEM,
            "io_uring_setup: ENOMEM",
            "ulimit -l",
        ),
        (
            libc::SYS_io_uring_register,
            libc::EPERM,
            "does not say that it offers plain reads",
            "io_uring_register",
        ),
        (
            libc::SYS_io_uring_register,
            libc::ENOMEM,
            "io_uring_register: Cannot allocate memory",
            "io_uring_register",
        ),
        (
            libc::SYS_io_uring_enter,
            libc::EPERM,
            "io_uring_enter: ",
            "allow io_uring_enter",
        ),
    ] {
        on_a_thread(|| {
            if !denied("forbidden rings", &[Denied::new(call, errno)]) {
                return;
            }
            trial.refuses(
                Some(BackendKind::IoUring),
                &["io-uring cannot run here", reason, remedy],
            );
            let plan = trial.load(None).unwrap();
            assert_ne!(plan.backend, BackendKind::IoUring);
            expect_said(&plan.to_string(), &["Not io-uring:", reason]);
            for &kind in trial
                .usable
                .iter()
                .filter(|&&kind| kind != BackendKind::IoUring)
            {
                trial.works_with(kind);
            }
        });
    }
}

/// As where an administrator has switched rings off for everybody, root included.
#[test]
fn rings_that_a_sysctl_forbids_are_named() {
    const SWITCH: &str = "/proc/sys/kernel/io_uring_disabled";

    if !with_mounts("rings_that_a_sysctl_forbids_are_named") {
        return;
    }
    let trial = Trial::new();
    if !trial.has(BackendKind::IoUring) {
        return;
    }
    if !Path::new(SWITCH).exists() {
        return skip("forbidden rings: this kernel has no kernel.io_uring_disabled");
    }
    // The switch itself belongs to the whole machine: only what this process reads of it is another, and a filter
    // refuses what the kernel would.
    let switched = trial.path().join("switched");
    std::fs::write(&switched, "2\n").unwrap();
    mount_bind(&switched, SWITCH).unwrap();
    on_a_thread(|| {
        let setup = Denied::new(libc::SYS_io_uring_setup, libc::EPERM);
        if !denied("forbidden rings", &[setup]) {
            return;
        }
        trial.refuses(
            Some(BackendKind::IoUring),
            &[
                "io_uring_setup: EPERM: blocked by sysctl kernel.io_uring_disabled=2",
                "kernel.io_uring_disabled=0",
            ],
        );
        let plan = trial.load(None).unwrap();
        expect_said(
            &plan.to_string(),
            &["Not io-uring:", "kernel.io_uring_disabled=2"],
        );
    });
}

/// The trial of a ring submits nothing, so that filters can let it pass and refuse what comes after it.
#[test]
fn rings_that_fail_later_are_named() {
    if in_child("rings_that_fail_later_are_named", |_| {}).is_some() {
        return;
    }
    let trial = Trial::new();
    if !trial.has(BackendKind::IoUring) {
        return;
    }
    for errno in [libc::EPERM, libc::EINVAL, libc::ENOMEM] {
        on_a_thread(|| {
            let submits =
                Denied::new(libc::SYS_io_uring_enter, errno).only(1, Argument::IsAtLeast(1));
            if denied("rings that refuse reads", &[submits]) {
                let cause = std::io::Error::from_raw_os_error(errno).to_string();
                trial.refuses(
                    Some(BackendKind::IoUring),
                    &[
                        "io-uring backend failed to submit reads",
                        &cause,
                        "use another backend",
                    ],
                );
                trial.works_with(BackendKind::Sync);
            }
        });
    }
}

/// A ring may be too busy for the moment; one that stays so is given up after ten seconds.
#[test]
fn rings_that_stay_busy_are_named() {
    if in_child("rings_that_stay_busy_are_named", |_| {}).is_some() {
        return;
    }
    let trial = Trial::new();
    if !trial.has(BackendKind::IoUring) {
        return;
    }
    std::thread::scope(|scope| {
        for errno in [libc::EBUSY, libc::EAGAIN] {
            let trial = &trial;
            scope.spawn(move || {
                let submits =
                    Denied::new(libc::SYS_io_uring_enter, errno).only(1, Argument::IsAtLeast(1));
                if denied("rings that stay busy", &[submits]) {
                    let cause = std::io::Error::from_raw_os_error(errno).to_string();
                    trial.refuses(
                        Some(BackendKind::IoUring),
                        &[
                            "io-uring backend failed to submit reads",
                            &cause,
                            "use another backend",
                        ],
                    );
                }
            });
        }
    });
}

/// Refused from inside, with reads under way: the load waits for them without the kernel's help, and ends.
#[test]
fn rings_that_fail_half_way_lose_nothing() {
    if in_child("rings_that_fail_half_way_lose_nothing", |_| {}).is_some() {
        return;
    }
    let trial = Trial::new();
    if !trial.has(BackendKind::IoUring) {
        return;
    }
    on_a_thread(|| {
        let loader = loader(Some(BackendKind::IoUring))
            .workers(2)
            .queue_depth(8)
            .chunk_bytes(4096)
            .on_progress(|_| {
                // On the thread of the worker, whose other reads are under way.
                deny(&[Denied::new(libc::SYS_io_uring_enter, libc::EPERM)]);
            });
        let error = load_and_compare(trial.path(), &trial.expected, &loader).unwrap_err();
        expect_said(&error.to_string(), &["io-uring", "Operation not permitted"]);
    });
    trial.works();
}

#[test]
fn little_locked_memory_is_enough() {
    if in_child("little_locked_memory_is_enough", |_| {}).is_some() {
        return;
    }
    let trial = Trial::new();
    // The limit is shared with whatever else belongs to the user, rings of other tests included.
    let is_alone = rustix::process::geteuid().is_root();
    if !become_ordinary("little locked memory") {
        return;
    }
    // What the planner chooses for large checkpoints.
    let (_directories, large) = sparse_shards(3);
    let Ok(plan) = loader(None).plan(&large) else {
        return skip("little locked memory: too little memory of any kind to plan for 4.5 GiB");
    };
    for bytes in [64 << 10, 0] {
        limit(Resource::Memlock, bytes);
        let platform = Platform::probe();
        assert_eq!(platform.memlock_bytes, Some(bytes));
        let auto = trial.load(None).unwrap();
        for &kind in &trial.usable {
            let loader = loader(Some(kind))
                .workers(plan.params.workers)
                .queue_depth(plan.params.queue_depth);
            match load_and_compare(trial.path(), &trial.expected, &loader) {
                Ok(_) => {}
                // Rings count as locked memory for ordinary users.
                Err(error) if kind == BackendKind::IoUring => {
                    expect_said(
                        &error.to_string(),
                        &[
                            "io_uring_setup: ENOMEM",
                            &format!("{bytes} bytes"),
                            "ulimit -l",
                        ],
                    );
                    if is_alone {
                        assert_eq!(bytes, 0, "enough for two small rings");
                        expect_said(&auto.to_string(), &["Not io-uring: ", "ENOMEM"]);
                        // Nor is it chosen where it would have been.
                        assert_ne!(choice(&large), BackendKind::IoUring);
                    }
                }
                Err(error) => panic!("{kind}: {error}"),
            }
        }
    }
}

/// What the planner chooses.
fn choice(path: &Path) -> BackendKind {
    loader(None).plan(path).unwrap().backend
}

/// As many files of 1.5 GiB, of holes, which take no space; never loaded, only planned for.
fn sparse_shards(count: u32) -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    std::fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    let specs: Vec<_> = (0..count)
        .map(|number| TensorSpec {
            name: format!("layers.{number}.weight"),
            dtype: Dtype::U8,
            shape: vec![3 << 29],
        })
        .collect();
    let sharding = Sharding::Count(NonZero::new(count).unwrap());
    let layout = safetensors_layout(&specs, &BTreeMap::new(), sharding, 8).unwrap();
    for planned in &layout.files {
        let file = directory.path().join(&planned.name);
        std::fs::write(&file, &planned.prefix).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(file).unwrap();
        file.set_len(planned.bytes).unwrap();
    }
    let index = layout.index.unwrap();
    std::fs::write(directory.path().join(index.name), index.contents).unwrap();
    let path = directory.path().to_owned();
    (directory, path)
}

/// One file for each tensor.
fn many_shards() -> Trial {
    let tensors = |number: u32| {
        let data = (0..3000)
            .map(|at: u32| (at * 7 + number).to_le_bytes()[0])
            .collect();
        (
            format!("layers.{number}.weight"),
            (Dtype::U8, vec![3000], data),
        )
    };
    let expected: Expected = (0..SHARDS).map(tensors).collect();
    let specs: Vec<_> = expected
        .iter()
        .map(|(name, (dtype, shape, _))| TensorSpec {
            name: name.clone(),
            dtype: *dtype,
            shape: shape.clone(),
        })
        .collect();
    let count = Sharding::Count(NonZero::new(SHARDS).unwrap());
    let layout = safetensors_layout(&specs, &BTreeMap::new(), count, 8).unwrap();
    assert_eq!(layout.files.len(), SHARDS as usize);
    let directory = tempfile::tempdir().unwrap();
    for planned in &layout.files {
        let mut bytes = planned.prefix.clone();
        bytes.resize(usize::try_from(planned.bytes).unwrap(), 0);
        for tensor in &planned.tensors {
            let at = usize::try_from(tensor.offset).unwrap();
            let data = &expected[&specs[tensor.tensor].name].2;
            bytes[at..at + data.len()].copy_from_slice(data);
        }
        std::fs::write(directory.path().join(&planned.name), bytes).unwrap();
    }
    let index = layout.index.unwrap();
    std::fs::write(directory.path().join(index.name), index.contents).unwrap();
    Trial {
        directory,
        expected,
        usable: usable(),
    }
}

#[test]
fn few_open_files_are_enough_or_named() {
    if in_child("few_open_files_are_enough_or_named", |_| {}).is_some() {
        return;
    }
    let trial = many_shards();
    let mut refused = 0;
    for files in [24, 100, 163, 175, 200, 260, 320, 335, 400, 1024] {
        limit(Resource::Nofile, files);
        for kind in trial.usable.iter().copied().map(Some).chain([None]) {
            for direct in [
                DirectPolicy::Never,
                DirectPolicy::Preferred,
                DirectPolicy::Required,
            ] {
                if kind == Some(BackendKind::Mmap) && direct == DirectPolicy::Required {
                    continue;
                }
                let result =
                    load_and_compare(trial.path(), &trial.expected, &loader(kind).direct(direct));
                let place = format!("{files} files, {kind:?}, {direct}");
                match result {
                    Ok(_) => assert!(files > 163, "{place}: fewer than there are shards"),
                    Err(Error::Plan(PlanError::DirectUnsupported { .. })) if files >= 400 => {
                        skip("few open files: no direct I/O here");
                    }
                    Err(error) => {
                        refused += 1;
                        assert!(files < 400, "{place}: {error}");
                        expect_said(&error.to_string(), &["ulimit -n"]);
                        // What is read through the page cache needs one descriptor for each shard; rings and
                        // runtimes need some of their own.
                        let plain =
                            matches!(kind, None | Some(BackendKind::Sync | BackendKind::Mmap));
                        let direct = direct == DirectPolicy::Required;
                        assert!(files < 200 || direct || !plain, "{place}: {error}");
                    }
                }
            }
        }
    }
    assert!(refused > 0);
}

/// Nothing but a hole: it takes no space, and as much memory as any other.
fn hole(bytes: u64) -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let spec = TensorSpec {
        name: "large".to_owned(),
        dtype: Dtype::U8,
        shape: vec![bytes],
    };
    let layout = safetensors_layout(&[spec], &BTreeMap::new(), Sharding::Single, 8).unwrap();
    let planned = &layout.files[0];
    let path = directory.path().join(&planned.name);
    std::fs::write(&path, &planned.prefix).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(planned.bytes).unwrap();
    (directory, path)
}

const LARGE_BYTES: u64 = 1 << 30;

/// Refused before anything is read, with the numbers, by every backend.
fn expect_no_fit(path: &Path, usable: &[BackendKind], said: &[&str]) {
    for kind in usable.iter().copied().map(Some).chain([None]) {
        let error = loader(kind)
            .on_progress(|_| panic!("reading has begun"))
            .load(path)
            .unwrap_err();
        let Error::Plan(PlanError::DoesNotFit {
            needed_bytes,
            available_bytes,
            ..
        }) = &error
        else {
            panic!("{kind:?}: {error}");
        };
        assert!(
            *needed_bytes >= LARGE_BYTES && *available_bytes < LARGE_BYTES,
            "{error}"
        );
        expect_said(&error.to_string(), said);
    }
}

#[test]
fn limits_on_memory_are_seen_before_reading() {
    if in_child("limits_on_memory_are_seen_before_reading", |_| {}).is_some() {
        return;
    }
    let trial = Trial::new();
    let (_directory, path) = hole(LARGE_BYTES);
    for (resource, named) in [(Resource::As, "address space"), (Resource::Data, "data")] {
        let before = getrlimit(resource);
        limit(resource, 600 << 20);
        expect_no_fit(&path, &trial.usable, &[named]);
        trial.works();
        setrlimit(resource, before).unwrap();
    }
}

/// The directory of the control group of this process that has the memory controller, and the names of the files with its
/// limit and its use.
fn control_group() -> Option<(PathBuf, [&'static str; 2])> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    let membership = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = |is_it: &dyn Fn(&str) -> bool| {
        membership.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            is_it(controllers).then_some(path)
        })
    };
    let of_memory = own(&|names| names.split(',').any(|name| name == "memory"));
    let (file_system, own, files) = match of_memory {
        Some(own) => (
            "cgroup",
            own,
            ["memory.limit_in_bytes", "memory.usage_in_bytes"],
        ),
        None => (
            "cgroup2",
            own(&str::is_empty)?,
            ["memory.max", "memory.current"],
        ),
    };
    let point = mounts.lines().find_map(|line| {
        let (place, kind) = line.split_once(" - ")?;
        let mut kind = kind.split(' ');
        let is_it = kind.next()? == file_system
            && (file_system == "cgroup2" || kind.next_back()?.split(',').any(|o| o == "memory"));
        is_it.then_some(place.split(' ').nth(4)?)
    });
    let directory = Path::new(point?).join(own.trim_start_matches('/'));
    directory.is_dir().then_some((directory, files))
}

/// What the kernel says of the group is replaced, where only this process sees it; no group is made or changed.
#[test]
fn a_control_group_that_is_too_small_is_seen_before_reading() {
    if !with_mounts("a_control_group_that_is_too_small_is_seen_before_reading") {
        return;
    }
    let trial = Trial::new();
    let (_directory, path) = hole(LARGE_BYTES);
    let Some((group, [limit, used])) = control_group() else {
        return skip("a small control group: no control group for memory here");
    };
    mount("tmpfs", &group, "tmpfs", MountFlags::empty(), None).unwrap();
    std::fs::write(group.join(limit), (512 << 20).to_string()).unwrap();
    std::fs::write(group.join(used), (100 << 20).to_string()).unwrap();
    std::fs::write(group.join("memory.stat"), "inactive_file 0\n").unwrap();
    let file = group.join(limit);
    expect_no_fit(
        &path,
        &trial.usable,
        &["control group", file.to_str().unwrap()],
    );
    trial.works();
    // Full to the last page: even little is refused.
    std::fs::write(group.join(used), (512 << 20).to_string()).unwrap();
    trial.refuses(None, &["control group", file.to_str().unwrap()]);
}

/// Whatever the limit, a load gives its bytes or an error: never an abort or a wrong byte.
#[test]
fn tight_limits_on_memory_are_errors() {
    if in_child("tight_limits_on_memory_are_errors", |_| {}).is_some() {
        return;
    }
    let trial = Trial::new();
    // What threads and runtimes leave behind is there before the limits are.
    trial.works();
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages =
        |field: usize| -> u64 { statm.split(' ').nth(field).unwrap().trim().parse().unwrap() };
    let page_bytes = rustix::param::page_size() as u64;
    let (mut loaded, mut refused) = (0, 0);
    for (resource, field) in [(Resource::As, 0), (Resource::Data, 5)] {
        let before = getrlimit(resource);
        let used = pages(field) * page_bytes;
        for extra in [2, 4, 6, 8, 12, 16, 32, 48, 96, 256_u64] {
            for kind in trial.usable.iter().copied().map(Some).chain([None]) {
                limit(resource, used + (extra << 20));
                let result = trial.load(kind);
                setrlimit(resource, before).unwrap();
                match result {
                    Ok(_) => loaded += 1,
                    Err(error) => {
                        refused += 1;
                        let text = error.to_string();
                        let named = ["memory", "thread", "address space", "ulimit"];
                        assert!(
                            named.iter().any(|word| text.contains(word)),
                            "{extra} MiB, {kind:?}: {text}"
                        );
                        assert!(extra < 256, "{kind:?}: {text}");
                    }
                }
            }
        }
    }
    assert!(loaded > 0 && refused > 0, "{loaded} {refused}");
}

#[test]
fn one_processor_is_enough() {
    if in_child("one_processor_is_enough", |_| {}).is_some() {
        return;
    }
    let trial = Trial::new();
    let mut one = rustix::thread::CpuSet::new();
    let all = rustix::thread::sched_getaffinity(None).unwrap();
    one.set((0..1024).find(|&cpu| all.is_set(cpu)).unwrap());
    rustix::thread::sched_setaffinity(None, &one).unwrap();
    assert_eq!(Platform::probe().cpus, 1);
    let plan = trial.works();
    expect_said(&plan.to_string(), &["1 CPU;"]);
}

#[test]
fn huge_pages_are_no_necessity() {
    if in_child("huge_pages_are_no_necessity", |_| {}).is_some() {
        return;
    }
    let trial = Trial::new();
    rustix::thread::disable_transparent_huge_pages(true).unwrap();
    trial.works();
    // A kernel that was built without them refuses the advice, and one before 5.14 to populate.
    if denied(
        "no huge pages",
        &[Denied::new(libc::SYS_madvise, libc::EINVAL)],
    ) {
        trial.works();
    }
}

/// Runs the test in a process with mounts of its own; whether this is that process.
fn with_mounts(test: &str) -> bool {
    if !has_own_mounts() {
        skip(&format!("{test}: no mounts of one's own here"));
        return false;
    }
    in_child(test, with_own_mounts).is_none()
}

#[test]
fn a_read_only_file_system_is_enough_to_load_from() {
    if !with_mounts("a_read_only_file_system_is_enough_to_load_from") {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    mount("tmpfs", place.path(), "tmpfs", MountFlags::empty(), None).unwrap();
    let mut trial = Trial::new();
    common::write(&trial.expected, "three SafeTensors shards", place.path());
    trial.directory = place;
    mount_remount(trial.path(), MountFlags::RDONLY, "").unwrap();
    trial.works();
    #[cfg(feature = "convert")]
    {
        let target = trial.path().join("converted");
        let error = convert(&trial, &target).unwrap_err();
        expect_said(
            &error.to_string(),
            &[
                trial.path().to_str().unwrap(),
                "could not write to the directory: Read-only file system",
                "choose a place that can be written to",
            ],
        );
    }
}

#[test]
fn neither_proc_nor_sys_is_needed() {
    if !with_mounts("neither_proc_nor_sys_is_needed") {
        return;
    }
    let trial = Trial::new();
    let (_directory, path) = hole(64 << 20);
    for place in ["/proc", "/sys"] {
        mount("tmpfs", place, "tmpfs", MountFlags::empty(), None).unwrap();
    }
    assert!(!Path::new("/proc/self").exists());
    let plan = trial.works();
    expect_said(&plan.to_string(), &["memory"]);
    // There is a limit of the caller's still, and files can be read directly still.
    let error = loader(None)
        .memory_limit_bytes(1 << 20)
        .load(&path)
        .unwrap_err();
    assert!(
        matches!(error, Error::Plan(PlanError::DoesNotFit { .. })),
        "{error}"
    );
    for kind in [BackendKind::Sync, BackendKind::Async, BackendKind::IoUring] {
        if trial.usable.contains(&kind) {
            let loader = loader(Some(kind)).direct(DirectPolicy::Required);
            match load_and_compare(trial.path(), &trial.expected, &loader) {
                Ok(_) => {}
                Err(Error::Plan(PlanError::DirectUnsupported { reason, .. })) => {
                    skip(&format!("direct I/O without /proc: {reason}"));
                }
                Err(error) => panic!("{kind}: {error}"),
            }
        }
    }
}

#[test]
fn memory_and_overlay_file_systems_are_read_like_others() {
    if !with_mounts("memory_and_overlay_file_systems_are_read_like_others") {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    mount("tmpfs", place.path(), "tmpfs", MountFlags::empty(), None).unwrap();
    let names = ["lower", "upper", "work", "merged"];
    for name in names {
        std::fs::create_dir(place.path().join(name)).unwrap();
    }
    let [lower, upper, work, merged] = names.map(|name| place.path().join(name));
    let mut trial = Trial::new();
    common::write(&trial.expected, "three SafeTensors shards", &lower);
    let show = |path: &Path| path.to_str().unwrap().to_owned();
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        show(&lower),
        show(&upper),
        show(&work)
    );
    let options = std::ffi::CString::new(options).unwrap();
    let mut places = vec![(lower, "tmpfs")];
    match mount(
        "overlay",
        &merged,
        "overlay",
        MountFlags::empty(),
        options.as_c_str(),
    ) {
        Ok(()) => places.push((merged, "overlay")),
        Err(errno) => skip(&format!("no overlay can be mounted here: {errno}")),
    }
    for (directory, file_system) in places {
        // Not to be removed with the trial: it is a part of the mount.
        let own = std::mem::replace(&mut trial.directory, tempfile::tempdir_in(&place).unwrap());
        drop(own);
        let plan = |kind: Option<BackendKind>, direct| {
            load_and_compare(&directory, &trial.expected, &loader(kind).direct(direct))
        };
        let auto = load_and_compare(&directory, &trial.expected, &loader(None)).unwrap();
        expect_said(&auto.to_string(), &[file_system]);
        // In memory it is, and an overlay says so of the pages of the file below.
        assert!(auto.platform.storage.unwrap().is_resident());
        for &kind in &trial.usable {
            for direct in [DirectPolicy::Never, DirectPolicy::Preferred] {
                plan(Some(kind), direct).unwrap();
            }
            if let Err(error) = plan(Some(kind), DirectPolicy::Required) {
                let text = error.to_string();
                assert!(text.contains("direct"), "{text}");
            }
        }
    }
}

/// What older kernels do not have, and what sandboxes hide.
#[test]
fn older_kernels_do_as_well() {
    const CACHESTAT: libc::c_long = 451;
    if in_child("older_kernels_do_as_well", |_| {}).is_some() {
        return;
    }
    let trial = Trial::new();
    for (what, calls) in [
        ("cachestat", &[CACHESTAT][..]),
        ("cachestat and mincore", &[CACHESTAT, libc::SYS_mincore]),
        ("statx", &[libc::SYS_statx]),
        ("fallocate", &[libc::SYS_fallocate]),
        (
            "copies by the kernel",
            &[libc::SYS_copy_file_range, libc::SYS_sendfile],
        ),
        ("advice on files", &[libc::SYS_fadvise64, libc::SYS_madvise]),
        (
            "openat2 and statfs",
            &[libc::SYS_openat2, libc::SYS_fstatfs],
        ),
        ("affinity", &[libc::SYS_sched_getaffinity]),
        // Not even the question is allowed.
        ("limits", &[libc::SYS_prlimit64, libc::SYS_getrlimit]),
        (
            "everything new",
            &[
                CACHESTAT,
                libc::SYS_statx,
                libc::SYS_openat2,
                libc::SYS_clone3,
                libc::SYS_preadv2,
                libc::SYS_memfd_create,
            ],
        ),
    ] {
        on_a_thread(|| {
            let calls: Vec<_> = calls
                .iter()
                .map(|&call| Denied::new(call, libc::ENOSYS))
                .collect();
            if denied(what, &calls) {
                trial.works();
            }
        });
    }
    expect_direct_reads_by_trial(CACHESTAT);
    // The mmap backend cannot do without this one; the others can.
    for (errno, said) in [(libc::ENOSYS, "ENOSYS"), (libc::EPERM, "EPERM")] {
        on_a_thread(|| {
            if !trial.has(BackendKind::Mmap)
                || !denied(
                    "copies of memory",
                    &[Denied::new(libc::SYS_process_vm_readv, errno)],
                )
            {
                return;
            }
            trial.refuses(
                Some(BackendKind::Mmap),
                &["process_vm_readv", said, "use the sync or async backend"],
            );
            let plan = trial.load(None).unwrap();
            expect_said(&plan.to_string(), &["Not mmap:", "process_vm_readv"]);
            for &kind in trial
                .usable
                .iter()
                .filter(|&&kind| kind != BackendKind::Mmap)
            {
                trial.works_with(kind);
            }
        });
    }
}

/// Nobody says how direct reads must be aligned, nor what is in the page cache: it is tried.
fn expect_direct_reads_by_trial(cachestat: libc::c_long) {
    let mut trial = Trial::new();
    // Where temporary files are, there may be no direct I/O.
    let build = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    common::write(&trial.expected, "three SafeTensors shards", build.path());
    trial.directory = build;
    let required = |kind| loader(Some(kind)).direct(DirectPolicy::Required);
    for kind in [BackendKind::Sync, BackendKind::Async, BackendKind::IoUring] {
        if !trial.has(kind) {
            continue;
        }
        let load = || load_and_compare(trial.path(), &trial.expected, &required(kind));
        if let Err(error) = load() {
            skip(&format!("direct reads without statx: {error}"));
            continue;
        }
        on_a_thread(|| {
            let calls = [cachestat, libc::SYS_statx].map(|call| Denied::new(call, libc::ENOSYS));
            if denied("direct reads without statx", &calls) {
                load().unwrap_or_else(|error| panic!("{kind}: {error}"));
            }
        });
    }
}

#[test]
fn refused_threads_are_named() {
    if in_child("refused_threads_are_named", |_| {}).is_some() {
        return;
    }
    let trial = Trial::new();
    let no_threads =
        [libc::SYS_clone, libc::SYS_clone3].map(|call| Denied::new(call, libc::EAGAIN));
    on_a_thread(|| {
        if denied("refused threads", &no_threads) {
            expect_few_threads(&trial);
            expect_digest_and_conversion(&trial);
        }
    });
    // The same by the limit that administrators set.
    if become_ordinary("refused threads") {
        limit(Resource::Nproc, 1);
        expect_few_threads(&trial);
    }
}

fn expect_few_threads(trial: &Trial) {
    for kind in trial.usable.iter().copied().map(Some).chain([None]) {
        match trial.load(kind) {
            Ok(_) => {}
            Err(error) => expect_said(
                &error.to_string(),
                &["starting a thread failed", "ulimit -u"],
            ),
        }
        // One worker is the calling thread, except for the runtime of the async backend.
        let alone = load_and_compare(trial.path(), &trial.expected, &loader(kind).workers(1));
        match (kind, alone) {
            (_, Ok(_)) => {}
            (Some(BackendKind::Async), Err(error)) => {
                expect_said(
                    &error.to_string(),
                    &["starting a thread failed", "ulimit -u"],
                );
            }
            (_, Err(error)) => panic!("{kind:?} with one worker: {error}"),
        }
    }
}

#[cfg(feature = "convert")]
fn convert(trial: &Trial, target: &Path) -> Result<(), Error> {
    use tensora::convert::ConvertOptions;
    let index = tensora::CheckpointIndex::open(trial.path())?;
    let plan = ConvertOptions::new(tensora::Format::ServerlessLlmStore).plan(&index, target)?;
    plan.run(&tensora::io::Control::new())?;
    Ok(())
}

#[cfg(feature = "convert")]
fn expect_digest_and_conversion(trial: &Trial) {
    let checkpoint = loader(Some(BackendKind::Sync))
        .workers(1)
        .load(trial.path())
        .unwrap();
    checkpoint.digest().unwrap();
    let target = tempfile::tempdir().unwrap();
    if let Err(error) = convert(trial, &target.path().join("converted")) {
        expect_said(&error.to_string(), &["thread", "ulimit -u"]);
    }
}

#[cfg(not(feature = "convert"))]
fn expect_digest_and_conversion(_trial: &Trial) {}

/// The ranks say that there is no memory to share, instead of waiting for each other.
#[cfg(feature = "shared")]
#[test]
fn ranks_without_memory_to_share_say_so() {
    use tensora::Share;
    if in_child("ranks_without_memory_to_share_say_so", |_| {}).is_some() {
        return;
    }
    let trial = Trial::new();
    for errno in [libc::ENOSYS, libc::EPERM] {
        on_a_thread(|| {
            if !denied("no memfd", &[Denied::new(libc::SYS_memfd_create, errno)]) {
                return;
            }
            let group = format!("machines-{}-{errno}", std::process::id());
            let load = |rank| {
                let share = Share::new(&group).join_timeout(Duration::from_secs(2));
                loader(None).rank(rank, 2).share(share).load(trial.path())
            };
            std::thread::scope(|scope| {
                let ranks = [0, 1].map(|rank| scope.spawn(move || load(rank)));
                for rank in ranks {
                    match rank.join().unwrap() {
                        Ok(checkpoint) => compare(&checkpoint, &trial.expected),
                        Err(error) => expect_said(&error.to_string(), &["memfd_create", &group]),
                    }
                }
            });
        });
    }
}

/// Of a truncated file, an owned load has read everything or says where it ends.
#[test]
fn truncation_during_an_owned_load_is_an_error() {
    let kinds = usable();
    for &kind in &kinds {
        for (direct, workers) in [
            (DirectPolicy::Never, 1),
            (DirectPolicy::Never, 3),
            (DirectPolicy::Preferred, 3),
        ] {
            let trial = Trial::of(common::expected(), "one SafeTensors file");
            let path = trial.path().join("model.safetensors");
            let truncate = move || {
                let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
                file.set_len(10_000).unwrap();
            };
            let once = std::sync::Once::new();
            let loader = loader(Some(kind))
                .direct(direct)
                .workers(workers)
                .chunk_bytes(16 << 10)
                .on_progress(move |_| once.call_once(&truncate));
            let error = load_and_compare(trial.path(), &trial.expected, &loader)
                .expect_err("most of the file was not read yet");
            expect_said(
                &error.to_string(),
                &[
                    "model.safetensors ends at byte 10000",
                    "truncated",
                    "loading tensor",
                ],
            );
        }
    }
}

fn shorten(path: &Path, len: u64) {
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(len).unwrap();
}

/// The largest file of a checkpoint, by its name.
fn largest_partition(directory: &Path) -> PathBuf {
    let files = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let partitions = files.filter(|path| path.to_str().unwrap().contains("tensor.data_"));
    partitions
        .max_by_key(|path| path.metadata().unwrap().len())
        .unwrap()
}

#[test]
fn a_partition_that_shrinks_before_it_is_loaded_is_an_error() {
    for kind in usable() {
        for layout in ["store dialect", "partitioned dialect"] {
            for direct in [DirectPolicy::Never, DirectPolicy::Preferred] {
                let trial = Trial::of(common::expected(), layout);
                let opened = loader(Some(kind))
                    .direct(direct)
                    .open(trial.path())
                    .unwrap();
                let partition = largest_partition(trial.path());
                shorten(&partition, 10_000);
                let Err(error) = opened.load_all() else {
                    panic!("{kind}, {layout}, {direct}: loaded from a partition that is gone");
                };
                expect_said(
                    &error.to_string(),
                    &[
                        partition.to_str().unwrap(),
                        "has changed since its metadata was read",
                        "and is 10000 now",
                        "open the checkpoint again when it is completely written",
                    ],
                );
            }
        }
    }
}

#[test]
fn a_partition_that_shrinks_while_it_is_loaded_is_an_error() {
    for kind in usable() {
        for layout in ["store dialect", "partitioned dialect"] {
            for direct in [DirectPolicy::Never, DirectPolicy::Preferred] {
                let trial = Trial::of(common::expected(), layout);
                let partition = largest_partition(trial.path());
                let shrinking = partition.clone();
                let once = std::sync::Once::new();
                let loader = loader(Some(kind))
                    .direct(direct)
                    .workers(2)
                    .queue_depth(4)
                    .chunk_bytes(16 << 10)
                    .on_progress(move |_| once.call_once(|| shorten(&shrinking, 10_000)));
                let Err(error) = load_and_compare(trial.path(), &trial.expected, &loader) else {
                    panic!("{kind}, {layout}, {direct}: loaded from a partition that is gone");
                };
                expect_said(
                    &error.to_string(),
                    &[
                        partition.to_str().unwrap(),
                        "ends at byte 10000",
                        "truncated",
                        "loading tensor",
                    ],
                );
            }
        }
    }
}

#[test]
fn truncation_after_an_owned_load_changes_nothing() {
    for kind in usable() {
        let trial = Trial::new();
        let checkpoint = loader(Some(kind)).load(trial.path()).unwrap();
        for entry in std::fs::read_dir(trial.path()).unwrap() {
            let file = std::fs::OpenOptions::new()
                .write(true)
                .open(entry.unwrap().path())
                .unwrap();
            file.set_len(0).unwrap();
        }
        compare(&checkpoint, &trial.expected);
    }
}

/// What the contract of mappings says: bytes past the end of a truncated file kill whoever looks at them.
#[test]
fn truncation_under_a_mapped_load_is_a_bus_error() {
    use std::os::unix::process::ExitStatusExt;
    const PATH: &str = "TENSORA_TEST_TRUNCATED";
    let Some(path) = std::env::var_os(PATH).map(PathBuf::from) else {
        let trial = Trial::of(common::expected(), "one SafeTensors file");
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "truncation_under_a_mapped_load_is_a_bus_error"])
            .env(PATH, trial.path())
            .output()
            .unwrap();
        assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{output:?}");
        return;
    };
    // SAFETY: the contract is broken on purpose. The bytes are looked at in this process alone, which does not
    // survive it.
    let permit = unsafe { tensora::MappingPermit::new() };
    let mapped = loader(None)
        .memory(tensora::MemoryChoice::Mapped)
        .allow_mapping(permit);
    let checkpoint = mapped.load(&path).unwrap();
    compare(&checkpoint, &common::expected());
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(path.join("model.safetensors"));
    file.unwrap().set_len(0).unwrap();
    let read = checkpoint
        .iter()
        .flat_map(|tensor| tensor.bytes().to_vec())
        .count();
    panic!("{read} bytes of an empty file");
}
