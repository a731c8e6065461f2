//! The limits of this process.

use rustix::process::Resource;

use super::read_text;

/// `RLIM64_INFINITY`.
const UNLIMITED: u64 = u64::MAX;

/// The soft limit; `None` when unlimited or unknown.
///
/// A filter for system calls may refuse the question, which `rustix::process::getrlimit` takes for impossible and
/// panics; then `/proc` is asked.
pub(crate) fn soft_limit(resource: Resource) -> Option<u64> {
    ask(resource)
        .or_else(|| told(&read_text("/proc/self/limits")?, resource))
        .filter(|&limit| limit != UNLIMITED)
}

/// `prlimit64(2)`, whose numbers have 64 bits on every architecture.
fn ask(resource: Resource) -> Option<u64> {
    #[repr(C)]
    #[derive(Default)]
    struct Limit {
        current: u64,
        maximum: u64,
    }

    let mut answer = Limit::default();
    let (own_process, none) = (0 as libc::pid_t, std::ptr::null::<Limit>());
    // SAFETY: no new limit is passed, and the kernel writes one `rlimit64`, whose layout `answer` has and which
    // outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            own_process,
            resource as libc::c_uint,
            none,
            &raw mut answer,
        )
    };
    (result == 0).then_some(answer.current)
}

/// A line such as `Max open files            1024                 524288               files`.
fn told(limits: &str, resource: Resource) -> Option<u64> {
    let name = match resource {
        Resource::As => "Max address space",
        Resource::Data => "Max data size",
        Resource::Fsize => "Max file size",
        Resource::Memlock => "Max locked memory",
        Resource::Nofile => "Max open files",
        _ => return None,
    };
    let rest = limits.lines().find_map(|line| line.strip_prefix(name))?;
    match rest.split_ascii_whitespace().next()? {
        "unlimited" => Some(UNLIMITED),
        number => number.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKED_FOR: [Resource; 5] = [
        Resource::As,
        Resource::Data,
        Resource::Fsize,
        Resource::Memlock,
        Resource::Nofile,
    ];

    #[test]
    fn the_kernel_says_the_same_by_both_ways() {
        let limits = read_text("/proc/self/limits").unwrap();
        for resource in ASKED_FOR {
            let asked = ask(resource);
            assert!(asked.is_some(), "{resource:?}");
            assert_eq!(told(&limits, resource), asked, "{resource:?}");
            assert_eq!(
                soft_limit(resource),
                rustix::process::getrlimit(resource).current,
                "{resource:?}"
            );
        }
    }

    #[test]
    fn odd_texts_are_unknown() {
        for text in [
            "",
            "Max open files",
            "Max open files            many                 524288               files",
            "Max open files            -1                   524288               files",
            "open files 5",
        ] {
            assert_eq!(told(text, Resource::Nofile), None, "{text:?}");
        }
        let text = "Max open files            unlimited            unlimited            files";
        assert_eq!(told(text, Resource::Nofile), Some(UNLIMITED));
        assert_eq!(told(text, Resource::Cpu), None);
    }
}
