//! How much memory the machine, the control group and the limits of this process leave.

use rustix::process::Resource;

use super::mounts::Mount;
use super::{cgroup, read_text, soft_limit};
use crate::MemoryFacts;

pub(super) fn facts(mounts: &[Mount]) -> MemoryFacts {
    let meminfo = read_text("/proc/meminfo").unwrap_or_default();
    let group = read_text("/proc/self/cgroup")
        .and_then(|membership| cgroup::tightest(&membership, mounts, |path| read_text(path)));
    let [address_space_available_bytes, data_available_bytes] = left_to_process();
    MemoryFacts {
        total_bytes: meminfo_bytes(&meminfo, "MemTotal"),
        available_bytes: meminfo_bytes(&meminfo, "MemAvailable"),
        cgroup_limit_bytes: group.as_ref().map(|group| group.limit_bytes),
        cgroup_available_bytes: group.as_ref().map(|group| group.available_bytes),
        cgroup_limit_path: group.map(|group| group.path),
        address_space_available_bytes,
        data_available_bytes,
    }
}

/// A line of `/proc/meminfo`, such as `MemTotal:       24684084 kB`.
fn meminfo_bytes(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    kibibytes.checked_mul(1024)
}

/// What the limits on address space and on data leave, in bytes.
fn left_to_process() -> [Option<u64>; 2] {
    let limits = [Resource::As, Resource::Data].map(soft_limit);
    if limits == [None, None] {
        return limits;
    }
    let statm = read_text("/proc/self/statm").unwrap_or_default();
    let page_bytes = rustix::param::page_size() as u64;
    left_of_limits(limits, statm_bytes(&statm, page_bytes))
}

/// The address space and the private memory of a process, in bytes, out of `/proc/self/statm`; 0 where
/// it does not tell, so that a limit stays an upper bound.
fn statm_bytes(statm: &str, page_bytes: u64) -> [u64; 2] {
    // The order of the fields: size resident shared text lib data dt, in pages.
    [0, 5].map(|field| {
        statm
            .split_ascii_whitespace()
            .nth(field)
            .and_then(|pages| pages.parse().ok())
            .unwrap_or(0u64)
            .saturating_mul(page_bytes)
    })
}

fn left_of_limits(limits: [Option<u64>; 2], used: [u64; 2]) -> [Option<u64>; 2] {
    let left = |limit: Option<u64>, used| Some(limit?.saturating_sub(used));
    [left(limits[0], used[0]), left(limits[1], used[1])]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MEMINFO: &str = "\
MemTotal:       24684084 kB
MemFree:         1181756 kB
MemAvailable:   22962764 kB
HugePages_Total:       0
";

    #[test]
    fn meminfo_is_in_kibibytes() {
        assert_eq!(meminfo_bytes(MEMINFO, "MemTotal"), Some(24_684_084 << 10));
        assert_eq!(
            meminfo_bytes(MEMINFO, "MemAvailable"),
            Some(22_962_764 << 10)
        );
    }

    #[test]
    fn odd_meminfo_is_unknown() {
        assert_eq!(meminfo_bytes(MEMINFO, "Mem"), None, "a prefix only");
        assert_eq!(meminfo_bytes(MEMINFO, "HugePages_Total"), None, "no unit");
        for text in [
            "",
            "MemTotal",
            "MemTotal:",
            "MemTotal: kB",
            "MemTotal: -5 kB",
            "MemTotal: 18446744073709551615 kB",
            "MemTotal: 99999999999999999999 kB",
        ] {
            assert_eq!(meminfo_bytes(text, "MemTotal"), None, "{text:?}");
        }
    }

    #[test]
    fn each_process_limit_counts_for_itself() {
        let used = statm_bytes("1000 300 200 10 0 400 0\n", 4096);
        assert_eq!(used, [4_096_000, 1_638_400]);
        assert_eq!(left_of_limits([None, None], used), [None, None]);
        assert_eq!(
            left_of_limits([Some(5_000_000), None], used),
            [Some(904_000), None]
        );
        assert_eq!(
            left_of_limits([Some(5_000_000), Some(2_000_000)], used),
            [Some(904_000), Some(361_600)]
        );
        assert_eq!(left_of_limits([Some(1), None], used), [Some(0), None]);
        assert_eq!(statm_bytes("x", 4096), [0, 0]);
        assert_eq!(statm_bytes(&u64::MAX.to_string(), 4096), [u64::MAX, 0]);
    }

    proptest! {
        #[test]
        fn never_panics(text in any::<String>()) {
            meminfo_bytes(&text, "MemTotal");
            meminfo_bytes(&format!("MemTotal:{text}"), "MemTotal");
            statm_bytes(&text, 65536);
        }
    }
}
