//! Finding out what this machine can do: by trying it, and by reading what the kernel tells.

use crate::{Availability, BackendFact, BackendKind, Error, Platform};

#[cfg(all(target_os = "linux", not(tensora_portable)))]
mod cgroup;
#[cfg(all(target_os = "linux", not(tensora_portable)))]
#[allow(unsafe_code)]
mod limits;
#[cfg(all(target_os = "linux", not(tensora_portable)))]
mod memory;
#[cfg(all(target_os = "linux", not(tensora_portable)))]
pub(crate) mod mounts;

#[cfg(all(target_os = "linux", not(tensora_portable)))]
pub(crate) use limits::soft_limit;
#[cfg(all(target_os = "linux", not(tensora_portable)))]
pub(crate) use linux::read_text;
#[cfg(all(target_os = "linux", not(tensora_portable), feature = "mmap"))]
pub(crate) use mapping::{mmap_unavailable, try_self_copy};
#[cfg(all(target_os = "linux", not(tensora_portable), feature = "io-uring"))]
pub(crate) use rings::{io_uring_unavailable, try_ring};

/// The most physical memory that this process has had so far, in bytes; `None` where the system does
/// not tell. Pages of mapped files count as long as they are mapped.
pub fn peak_resident_bytes() -> Option<u64> {
    #[cfg(all(target_os = "linux", not(tensora_portable)))]
    return linux::peak_resident_bytes();
    #[cfg(not(all(target_os = "linux", not(tensora_portable))))]
    return None;
}

impl Platform {
    /// Examines this machine and this process on it.
    ///
    /// Backends are tried: a ring is made, memory is copied. Everything else is read from the kernel,
    /// in less than a millisecond altogether. What cannot be found out is `None`, so this never fails.
    /// Memory is a snapshot; probe again rather than keep it. [`storage`](Self::storage) stays `None`:
    /// it needs files, see [`StorageFacts::probe`](crate::StorageFacts::probe).
    ///
    /// ```
    /// use tensora_io::{Availability, Platform};
    ///
    /// let platform = Platform::probe();
    /// println!("{} processors", platform.cpus);
    /// for fact in &platform.backends {
    ///     match &fact.availability {
    ///         Availability::Available => println!("{} works", fact.kind),
    ///         Availability::Unavailable { reason, remedy } => {
    ///             println!("{} does not work: {reason}; {remedy}", fact.kind);
    ///         }
    ///     }
    /// }
    /// ```
    pub fn probe() -> Self {
        // Respects the affinity mask and the processor quota of control groups, of either version.
        let cpus = std::thread::available_parallelism()
            .ok()
            .and_then(|cpus| u32::try_from(cpus.get()).ok())
            .unwrap_or(1);
        let backends = BackendKind::ALL
            .into_iter()
            .map(|kind| BackendFact {
                kind,
                availability: availability(kind),
            })
            .collect();
        let mut platform = Self::unknown(cpus, backends);
        platform.os = std::env::consts::OS.to_owned();
        #[cfg(all(target_os = "linux", not(tensora_portable)))]
        linux::complete(&mut platform);
        platform
    }

    /// Takes the snapshot of memory again, and keeps what does not change while a process runs: for whoever plans
    /// many small reads, each of which would otherwise wait longer for facts than for bytes.
    pub fn refresh(&mut self) {
        #[cfg(all(target_os = "linux", not(tensora_portable)))]
        linux::refresh(self);
    }
}

fn availability(kind: BackendKind) -> Availability {
    match crate::backend(kind) {
        Ok(_) => Availability::Available,
        Err(Error::BackendUnavailable { reason, remedy, .. }) => {
            Availability::Unavailable { reason, remedy }
        }
        Err(error) => Availability::Unavailable {
            reason: error.to_string(),
            remedy: USE_ANOTHER.to_owned(),
        },
    }
}

/// The remedy that is left when nothing can be changed.
const USE_ANOTHER: &str = "use the sync or async backend";

#[cfg(all(target_os = "linux", not(tensora_portable)))]
mod linux {
    use std::fs::File;
    use std::io::Read;
    use std::path::Path;
    use std::sync::OnceLock;

    use rustix::process::Resource;

    use super::{memory, mounts, soft_limit};
    use crate::{HugePages, Platform};

    /// More than any file of the kernel that is read here has reason to hold.
    const LONGEST_TEXT_BYTES: u64 = 1 << 20;

    pub(super) fn complete(platform: &mut Platform) {
        platform.kernel =
            read_text("/proc/sys/kernel/osrelease").map(|release| release.trim().to_owned());
        platform.processor = first_processor();
        platform.page_bytes = rustix::param::page_size() as u64;
        platform.huge_pages = read_text("/sys/kernel/mm/transparent_hugepage/enabled")
            .map_or(HugePages::Unknown, |text| parse_huge_pages(&text));
        refresh(platform);
        platform.memlock_bytes = soft_limit(Resource::Memlock);
        platform.open_files = soft_limit(Resource::Nofile);
    }

    pub(super) fn refresh(platform: &mut Platform) {
        platform.memory = memory::facts(&mounts::mounts());
    }

    /// The kernel describes every processor anew for each reader, which takes milliseconds where there are
    /// hundreds. The first is among the first few, and does not change.
    fn first_processor() -> Option<String> {
        static MODEL: OnceLock<Option<String>> = OnceLock::new();
        let path = "/proc/cpuinfo";
        let of_first = || processor(&read_start(path, 4096)?);
        // Some architectures name the hardware at the very end.
        let of_all = || processor(&read_text(path)?);
        MODEL.get_or_init(|| of_first().or_else(of_all)).clone()
    }

    /// x86 names the model, most others the hardware or nothing.
    fn processor(text: &str) -> Option<String> {
        let (_, name) = text
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(key, _)| matches!(key.trim(), "model name" | "Hardware" | "cpu model"))?;
        let name = name.trim();
        (!name.is_empty()).then(|| name.to_owned())
    }

    pub(super) fn peak_resident_bytes() -> Option<u64> {
        let status = read_text("/proc/self/status")?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))?;
        let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        kibibytes.checked_mul(1024)
    }

    /// A small file of the kernel, as text. Of one that is too long, the complete lines that fit.
    pub(crate) fn read_text(path: impl AsRef<Path>) -> Option<String> {
        read_start(path, LONGEST_TEXT_BYTES)
    }

    /// The complete lines among the first bytes of a file, or all of a shorter one.
    fn read_start(path: impl AsRef<Path>, limit_bytes: u64) -> Option<String> {
        let mut bytes = Vec::new();
        let file = File::open(path).ok()?;
        file.take(limit_bytes).read_to_end(&mut bytes).ok()?;
        if bytes.len() as u64 == limit_bytes {
            let complete = bytes.iter().rposition(|&byte| byte == b'\n').unwrap_or(0);
            bytes.truncate(complete);
        }
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The choices on one line, the chosen one in brackets: `always [madvise] never`.
    fn parse_huge_pages(text: &str) -> HugePages {
        let chosen = text
            .split_ascii_whitespace()
            .find_map(|word| word.strip_prefix('[')?.strip_suffix(']'));
        match chosen {
            Some("always") => HugePages::Always,
            Some("madvise") => HugePages::Madvise,
            Some("never") => HugePages::Never,
            _ => HugePages::Unknown,
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn the_bracketed_choice_counts() {
            for (text, expected) in [
                ("[always] madvise never\n", HugePages::Always),
                ("always [madvise] never\n", HugePages::Madvise),
                ("always madvise [never]\n", HugePages::Never),
                ("always madvise never\n", HugePages::Unknown),
                ("[inherit]", HugePages::Unknown),
                ("[", HugePages::Unknown),
                ("[]", HugePages::Unknown),
                ("", HugePages::Unknown),
            ] {
                assert_eq!(parse_huge_pages(text), expected, "{text:?}");
            }
        }

        #[test]
        fn the_start_of_cpuinfo_names_the_processor_that_all_of_it_does() {
            let all = read_text("/proc/cpuinfo").and_then(|text| processor(&text));
            assert_eq!(first_processor(), all);
            assert_eq!(first_processor(), all, "remembered");
        }

        #[test]
        fn long_files_are_cut_at_a_line() {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("long");
            std::fs::write(&path, "0123456789\n".repeat(200_000)).unwrap();
            let text = read_text(&path).unwrap();
            assert!(text.len() as u64 <= LONGEST_TEXT_BYTES);
            assert!(text.len() as u64 > LONGEST_TEXT_BYTES - 11);
            assert!(text.lines().all(|line| line == "0123456789"));

            std::fs::write(&path, "x".repeat(2 << 20)).unwrap();
            assert_eq!(read_text(&path).as_deref(), Some(""));
            std::fs::write(&path, b"a\xFFb\n").unwrap();
            assert_eq!(read_text(&path).as_deref(), Some("a\u{FFFD}b\n"));
            assert_eq!(read_text(directory.path().join("absent")), None);
            assert_eq!(read_text(directory.path()), None);
        }
    }
}

#[cfg(all(target_os = "linux", not(tensora_portable), feature = "io-uring"))]
mod rings {
    use std::io;

    use io_uring::{IoUring, Probe, opcode};
    use rustix::io::Errno;
    use rustix::process::Resource;

    use super::{USE_ANOTHER, read_text, soft_limit};
    use crate::{BackendKind, Error, Result};

    /// Makes a small ring, asks whether it can read, and enters it once: a filter may block any of the
    /// three system calls.
    ///
    /// # Errors
    ///
    /// [`Error::BackendUnavailable`] with the reason and the remedy.
    pub(crate) fn try_ring() -> Result<()> {
        let unavailable = |(reason, remedy)| Error::BackendUnavailable {
            backend: BackendKind::IoUring,
            reason,
            remedy,
        };
        let ring = IoUring::new(2).map_err(|error| unavailable(io_uring_unavailable(&error)))?;
        let mut probe = Probe::new();
        let asked = ring.submitter().register_probe(&mut probe);
        if asked.is_err() || !probe.is_supported(opcode::Read::CODE) {
            let cause = asked.map_or_else(
                |error| format!(": io_uring_register: {error}"),
                |()| String::new(),
            );
            return Err(unavailable((
                format!("io_uring here does not say that it offers plain reads{cause}"),
                format!(
                    "run Linux 5.6 or later, allow io_uring_register in the seccomp profile, or {USE_ANOTHER}"
                ),
            )));
        }
        ring.submit().map(drop).map_err(|error| {
            unavailable((
                format!("io_uring_enter: {error}"),
                format!("allow io_uring_enter in the seccomp profile, or {USE_ANOTHER}"),
            ))
        })
    }

    /// The reason and the remedy for a ring that could not be made.
    pub(crate) fn io_uring_unavailable(error: &io::Error) -> (String, String) {
        explain(
            error,
            || {
                read_text("/proc/sys/kernel/io_uring_disabled")?
                    .trim()
                    .parse()
                    .ok()
            },
            || soft_limit(Resource::Memlock),
        )
    }

    fn explain(
        error: &io::Error,
        disabled: impl FnOnce() -> Option<u32>,
        memlock_bytes: impl FnOnce() -> Option<u64>,
    ) -> (String, String) {
        let errno = Errno::from_io_error(error);
        match errno {
            Some(Errno::NOSYS) => (
                "io_uring_setup: ENOSYS: this kernel has no io_uring (older than Linux 5.1, or \
                 built without CONFIG_IO_URING), or a sandbox hides it"
                    .to_owned(),
                format!("run Linux 5.6 or later with io_uring, or {USE_ANOTHER}"),
            ),
            Some(Errno::PERM | Errno::ACCESS) => (
                forbidden(errno == Some(Errno::PERM), disabled()),
                format!(
                    "allow it with sysctl kernel.io_uring_disabled=0 and a seccomp profile that permits \
                     io_uring (the default ones of container runtimes do not), or {USE_ANOTHER}"
                ),
            ),
            Some(Errno::NOMEM) => {
                let limit = memlock_bytes()
                    .map_or_else(|| "unlimited".to_owned(), |bytes| format!("{bytes} bytes"));
                (
                    format!(
                        "io_uring_setup: ENOMEM: out of memory, or of locked memory, which rings \
                         count as for ordinary users (the limit is {limit})"
                    ),
                    format!(
                        "raise the limit (ulimit -l), use fewer workers or a smaller queue depth, \
                         or {USE_ANOTHER}"
                    ),
                )
            }
            Some(Errno::MFILE | Errno::NFILE) => (
                format!("io_uring_setup: {error}: each ring takes a file descriptor"),
                format!(
                    "raise the limit on open files (ulimit -n), use fewer workers, or {USE_ANOTHER}"
                ),
            ),
            _ => (format!("io_uring_setup: {error}"), USE_ANOTHER.to_owned()),
        }
    }

    /// What forbids rings; `disabled` is the value of the sysctl, where it can be read.
    fn forbidden(by_permission: bool, disabled: Option<u32>) -> String {
        if !by_permission {
            return "io_uring_setup: EACCES: blocked by seccomp or a security module".to_owned();
        }
        let by = match disabled {
            None => "seccomp or sysctl kernel.io_uring_disabled",
            Some(0) => "seccomp (sysctl kernel.io_uring_disabled=0 would allow it)",
            Some(1) => {
                "sysctl kernel.io_uring_disabled=1 (without CAP_SYS_ADMIN, outside the group \
                 kernel.io_uring_group), or by seccomp"
            }
            Some(value) => {
                return format!(
                    "io_uring_setup: EPERM: blocked by sysctl kernel.io_uring_disabled={value}"
                );
            }
        };
        format!("io_uring_setup: EPERM: blocked by {by}")
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        fn explained(errno: Errno, disabled: Option<u32>) -> (String, String) {
            explain(&errno.into(), || disabled, || Some(65_536))
        }

        #[test]
        fn every_value_of_the_sysctl_is_told_apart() {
            for (value, expected) in [
                (None, "blocked by seccomp or sysctl"),
                (
                    Some(0),
                    "blocked by seccomp (sysctl kernel.io_uring_disabled=0",
                ),
                (Some(1), "kernel.io_uring_disabled=1 (without CAP_SYS_ADMIN"),
                (
                    Some(2),
                    "EPERM: blocked by sysctl kernel.io_uring_disabled=2",
                ),
            ] {
                let (reason, remedy) = explained(Errno::PERM, value);
                assert!(reason.contains(expected), "{reason}");
                assert!(remedy.contains("kernel.io_uring_disabled=0"), "{remedy}");
                assert!(remedy.contains("seccomp"), "{remedy}");
            }
        }

        #[test]
        fn every_answer_has_its_remedy() {
            for (errno, in_reason, in_remedy) in [
                (Errno::NOSYS, "CONFIG_IO_URING", "Linux 5.6"),
                (Errno::NOMEM, "65536 bytes", "ulimit -l"),
                (Errno::MFILE, "file descriptor", "ulimit -n"),
                (Errno::ACCESS, "EACCES", "seccomp"),
                (Errno::IO, "io_uring_setup: ", USE_ANOTHER),
            ] {
                let (reason, remedy) = explained(errno, None);
                assert!(reason.contains(in_reason), "{reason}");
                assert!(remedy.contains(in_remedy), "{remedy}");
                assert!(remedy.contains(USE_ANOTHER), "{remedy}");
            }
        }

        #[test]
        fn the_system_is_only_asked_about_what_may_be_the_cause() {
            let unasked = || unreachable!("not the cause");
            explain(&Errno::NOSYS.into(), unasked, || unreachable!());
            explain(&Errno::NOMEM.into(), unasked, || None);
            explain(&io::Error::other("no number"), unasked, || unreachable!());
        }
    }
}

#[cfg(all(target_os = "linux", not(tensora_portable), feature = "mmap"))]
#[allow(unsafe_code)]
mod mapping {
    use std::io;
    use std::ptr::from_ref;

    use rustix::io::Errno;

    use super::USE_ANOTHER;

    /// Copies a few bytes inside this process by `process_vm_readv`, as the mmap backend copies out of
    /// a mapping: there, a page that a truncated file has lost is an error and not a signal.
    pub(crate) fn try_self_copy() -> io::Result<()> {
        let source = *b"mapped";
        let mut target = [0u8; 6];
        let local = libc::iovec {
            iov_base: target.as_mut_ptr().cast(),
            iov_len: target.len(),
        };
        let remote = libc::iovec {
            iov_base: from_ref(&source).cast_mut().cast(),
            iov_len: source.len(),
        };
        let process = std::process::id().cast_signed();
        // SAFETY: one iovec of each kind is passed. `local` covers `target`, which is exclusively
        // borrowed here and may hold any bytes; the kernel only reads what `remote` covers.
        let copied = unsafe { libc::process_vm_readv(process, &local, 1, &remote, 1, 0) };
        if copied < 0 {
            Err(io::Error::last_os_error())
        } else if target == source {
            Ok(())
        } else {
            Err(io::Error::other("it copied other bytes"))
        }
    }

    /// The reason and the remedy for a process that may not copy its own memory.
    pub(crate) fn mmap_unavailable(error: &io::Error) -> (String, String) {
        let (cause, remedy) = match Errno::from_io_error(error) {
            Some(errno @ (Errno::PERM | Errno::ACCESS)) => (
                format!(
                    "{}: blocked by seccomp or a security module",
                    if errno == Errno::PERM {
                        "EPERM"
                    } else {
                        "EACCES"
                    }
                ),
                "allow process_vm_readv in the seccomp profile, or ",
            ),
            Some(Errno::NOSYS) => (
                "ENOSYS: this kernel was built without CONFIG_CROSS_MEMORY_ATTACH, or a sandbox \
                 hides it"
                    .to_owned(),
                "run a kernel or sandbox that has it, or ",
            ),
            _ => (error.to_string(), ""),
        };
        (
            format!("process_vm_readv, by which it copies safely out of mappings: {cause}"),
            format!("{remedy}{USE_ANOTHER}"),
        )
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn every_answer_has_its_remedy() {
            for (errno, in_reason, in_remedy) in [
                (Errno::PERM, "seccomp", "allow process_vm_readv"),
                (Errno::NOSYS, "CONFIG_CROSS_MEMORY_ATTACH", "run a kernel"),
                (Errno::NOMEM, "memory", USE_ANOTHER),
            ] {
                let (reason, remedy) = mmap_unavailable(&errno.into());
                assert!(reason.contains(in_reason), "{reason}");
                assert!(remedy.contains(in_remedy), "{remedy}");
            }
        }
    }
}
