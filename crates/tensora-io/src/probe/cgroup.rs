//! The memory limits of control groups, version 1 and version 2.

use std::path::{Component, Path, PathBuf};

use super::mounts::Mount;

/// A limit of a control group, and what is left of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Limit {
    pub(super) limit_bytes: u64,
    pub(super) available_bytes: u64,
    /// The file in which the limit stands.
    pub(super) path: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// The limit that leaves least, among the groups that hold this process and all groups above them.
/// `membership` is the content of `/proc/self/cgroup`.
///
/// Both versions may be mounted at once, with the memory controller under either; the files of the
/// other are then absent, and so say nothing.
pub(super) fn tightest(
    membership: &str,
    mounts: &[Mount],
    read: impl Fn(&Path) -> Option<String>,
) -> Option<Limit> {
    membership
        .lines()
        .filter_map(parse_membership)
        .filter_map(|(version, group)| {
            let (top, own) = directories(version, group, mounts)?;
            own.ancestors()
                .take_while(|directory| directory.starts_with(&top))
                .filter(|directory| {
                    // Before Linux 5.11, a group of version 1 could be told not to count for those below it.
                    version == Version::Two
                        || *directory == own
                        || read(&directory.join("memory.use_hierarchy"))
                            .is_none_or(|flag| flag.trim() != "0")
                })
                .filter_map(|directory| limit(version, directory, &read))
                .min_by_key(|limit| (limit.available_bytes, limit.limit_bytes))
        })
        .min_by_key(|limit| (limit.available_bytes, limit.limit_bytes))
}

/// One line, `number:controllers:path`, if it is about memory. Version 2 names no controllers.
fn parse_membership(line: &str) -> Option<(Version, &str)> {
    let (number, rest) = line.split_once(':')?;
    let (controllers, path) = rest.split_once(':')?;
    if number == "0" && controllers.is_empty() {
        Some((Version::Two, path))
    } else if controllers.split(',').any(|name| name == "memory") {
        Some((Version::One, path))
    } else {
        None
    }
}

/// The topmost directory of groups that is visible here, and the directory of this process's group.
fn directories(version: Version, group: &str, mounts: &[Mount]) -> Option<(PathBuf, PathBuf)> {
    let holds_memory = |mount: &&Mount| match version {
        Version::One => {
            mount.file_system == "cgroup"
                && mount
                    .super_options
                    .split(',')
                    .any(|option| option == "memory")
        }
        Version::Two => mount.file_system == "cgroup2",
    };
    let group = Path::new(group);
    // The mount that shows most groups above this one; of equals, the last, which covers the others.
    let mount = mounts
        .iter()
        .rev()
        .filter(holds_memory)
        .filter(|mount| group.starts_with(&mount.root))
        .min_by_key(|mount| mount.root.len());
    if let Some(mount) = mount
        && let Ok(below) = group.strip_prefix(&mount.root)
        && below
            .components()
            .all(|part| matches!(part, Component::Normal(_)))
    {
        let top = PathBuf::from(&mount.point);
        let own = top.join(below);
        return Some((top, own));
    }
    // A namespace hides where the group is (`/../..`). What is mounted is then, as container runtimes
    // set it up, the container's own group.
    let top = PathBuf::from(&mounts.iter().rev().find(holds_memory)?.point);
    Some((top.clone(), top))
}

fn limit(
    version: Version,
    directory: &Path,
    read: &impl Fn(&Path) -> Option<String>,
) -> Option<Limit> {
    let (limit, used, reclaimable) = match version {
        Version::One => (
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            ["total_inactive_file", "total_active_file"],
        ),
        Version::Two => (
            "memory.max",
            "memory.current",
            ["inactive_file", "active_file"],
        ),
    };
    let number = |name| read(&directory.join(name))?.trim().parse::<u64>().ok();
    let path = directory.join(limit);
    let limit_bytes = number(limit).filter(|&bytes| bytes < UNLIMITED_BYTES)?;
    // Where the use is hidden, the limit itself is still an upper bound.
    let used_bytes = number(used).unwrap_or(0);
    let stat = read(&directory.join("memory.stat")).unwrap_or_default();
    let reclaimable_bytes = reclaimable
        .into_iter()
        .fold(0u64, |sum, key| sum.saturating_add(stat_bytes(&stat, key)));
    Some(Limit {
        limit_bytes,
        available_bytes: limit_bytes
            .saturating_sub(used_bytes.saturating_sub(reclaimable_bytes))
            .min(limit_bytes),
        path,
    })
}

/// Version 1 has no word for "unlimited": it shows the largest number of bytes it can count, 2⁶³ less
/// a page. No machine comes near half of that.
const UNLIMITED_BYTES: u64 = 1 << 62;

/// One line of `memory.stat`, `key bytes`; 0 when absent.
fn stat_bytes(stat: &str, key: &str) -> u64 {
    stat.lines()
        .find_map(|line| {
            line.strip_prefix(key)?
                .strip_prefix(' ')?
                .trim()
                .parse()
                .ok()
        })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;

    fn mount(root: &str, point: &str, file_system: &str, super_options: &str) -> Mount {
        Mount {
            id: 30,
            device: (0, 30),
            root: root.to_owned(),
            point: point.to_owned(),
            file_system: file_system.to_owned(),
            source: "cgroup".to_owned(),
            super_options: super_options.to_owned(),
        }
    }

    fn v1(root: &str) -> Mount {
        mount(root, "/sys/fs/cgroup/memory", "cgroup", "rw,memory")
    }

    fn v2(root: &str) -> Mount {
        mount(root, "/sys/fs/cgroup", "cgroup2", "rw,nsdelegate")
    }

    /// Reads from a list of files.
    fn files<P: AsRef<Path>>(
        list: impl IntoIterator<Item = (P, String)>,
    ) -> impl Fn(&Path) -> Option<String> {
        let files: HashMap<PathBuf, String> = list
            .into_iter()
            .map(|(path, content)| (path.as_ref().to_owned(), content))
            .collect();
        move |path| files.get(path).cloned()
    }

    #[test]
    fn version_2_counts_file_cache_as_free() {
        let stat = format!(
            "anon {}\nfile 99\ninactive_file {}\nactive_file {}\nfile_dirty 7\n",
            GIB,
            2 * GIB,
            3 * GIB
        );
        let read = files([
            ("/sys/fs/cgroup/app/memory.max", format!("{}\n", 8 * GIB)),
            (
                "/sys/fs/cgroup/app/memory.current",
                format!("{}\n", 7 * GIB),
            ),
            ("/sys/fs/cgroup/app/memory.stat", stat),
        ]);
        assert_eq!(
            tightest("0::/app\n", &[v2("/")], read),
            Some(Limit {
                limit_bytes: 8 * GIB,
                available_bytes: 6 * GIB,
                path: "/sys/fs/cgroup/app/memory.max".into(),
            })
        );
    }

    #[test]
    fn a_full_parent_is_tighter_than_an_empty_child() {
        let read = files([
            ("/sys/fs/cgroup/pod/app/memory.max", (4 * GIB).to_string()),
            ("/sys/fs/cgroup/pod/app/memory.current", "0".to_owned()),
            ("/sys/fs/cgroup/pod/memory.max", (16 * GIB).to_string()),
            ("/sys/fs/cgroup/pod/memory.current", (15 * GIB).to_string()),
        ]);
        assert_eq!(
            tightest("0::/pod/app", &[v2("/")], read),
            Some(Limit {
                limit_bytes: 16 * GIB,
                available_bytes: GIB,
                path: "/sys/fs/cgroup/pod/memory.max".into(),
            })
        );
    }

    #[test]
    fn unlimited_is_no_limit() {
        let read = files([("/sys/fs/cgroup/app/memory.max", "max\n".to_owned())]);
        assert_eq!(tightest("0::/app", &[v2("/")], read), None);
        for huge in ["9223372036854771712\n", "9223372036854710272\n", "-1\n"] {
            let read = files([(
                "/sys/fs/cgroup/memory/app/memory.limit_in_bytes",
                huge.to_owned(),
            )]);
            assert_eq!(tightest("4:memory:/app", &[v1("/")], read), None, "{huge}");
        }
    }

    #[test]
    fn version_1_takes_the_hierarchical_counts() {
        let membership =
            "9:name=systemd:/x\n5:cpu,cpuacct:/y\n4:hugetlb,memory:/docker/abc\n0::/z\n";
        let stat = format!(
            "inactive_file 1\nactive_file 1\ntotal_inactive_file {GIB}\ntotal_active_file {GIB}\n"
        );
        let directory = "/sys/fs/cgroup/memory/docker/abc";
        let list = [
            (
                format!("{directory}/memory.limit_in_bytes"),
                (6 * GIB).to_string(),
            ),
            (
                format!("{directory}/memory.usage_in_bytes"),
                (5 * GIB).to_string(),
            ),
            (format!("{directory}/memory.stat"), stat),
        ];
        let mounts = [
            mount("/", "/sys/fs/cgroup/cpu", "cgroup", "rw,cpu,cpuacct"),
            v1("/"),
        ];
        assert_eq!(
            tightest(membership, &mounts, files(list)),
            Some(Limit {
                limit_bytes: 6 * GIB,
                available_bytes: 3 * GIB,
                path: "/sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes".into(),
            })
        );
    }

    #[test]
    fn a_version_1_parent_without_hierarchy_does_not_count() {
        for (flag, expected) in [("0\n", 4 * GIB), ("1\n", GIB)] {
            let read = files([
                (
                    "/sys/fs/cgroup/memory/a/b/memory.limit_in_bytes",
                    (4 * GIB).to_string(),
                ),
                (
                    "/sys/fs/cgroup/memory/a/memory.limit_in_bytes",
                    GIB.to_string(),
                ),
                (
                    "/sys/fs/cgroup/memory/a/memory.use_hierarchy",
                    flag.to_owned(),
                ),
            ]);
            let limit = tightest("4:memory:/a/b", &[v1("/")], read);
            assert_eq!(
                limit.map(|limit| limit.limit_bytes),
                Some(expected),
                "{flag}"
            );
        }
    }

    #[test]
    fn a_container_sees_its_group_at_the_mount() {
        // A bind mount of the group, in version 1: the path is the host's, and so is the mount's root.
        let read = files([(
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            GIB.to_string(),
        )]);
        let limit = tightest("4:memory:/docker/abc", &[v1("/docker/abc")], &read);
        assert_eq!(limit.map(|limit| limit.limit_bytes), Some(GIB));
        // A sibling's name that only begins alike is another group, and nothing better is known.
        assert_eq!(
            directories(Version::One, "/docker/abcd", &[v1("/docker/abc")]),
            Some((
                "/sys/fs/cgroup/memory".into(),
                "/sys/fs/cgroup/memory".into()
            ))
        );
        // Hidden by a namespace, in version 2.
        let read = files([("/sys/fs/cgroup/memory.max", GIB.to_string())]);
        for membership in ["0::/", "0::/../../other", "0::/a/../../b"] {
            let limit = tightest(membership, &[v2("/")], &read);
            assert_eq!(
                limit.map(|limit| limit.limit_bytes),
                Some(GIB),
                "{membership}"
            );
        }
    }

    #[test]
    fn never_looks_outside_the_mount() {
        let read = |path: &Path| -> Option<String> {
            assert!(path.starts_with("/sys/fs/cgroup"), "{}", path.display());
            None
        };
        for path in [
            "/../../etc",
            "/a/./b",
            "//x",
            "relative",
            "",
            "/a:b (deleted)",
        ] {
            tightest(
                &format!("0::{path}\n4:memory:{path}"),
                &[v2("/"), v1("/")],
                read,
            );
        }
    }

    #[test]
    fn of_two_versions_the_one_that_limits_counts() {
        let mounts = [
            v1("/"),
            mount("/", "/sys/fs/cgroup/unified", "cgroup2", "rw"),
        ];
        let read = files([("/sys/fs/cgroup/unified/app/memory.max", GIB.to_string())]);
        let limit = tightest("4:memory:/\n0::/app", &mounts, read);
        assert_eq!(limit.map(|limit| limit.limit_bytes), Some(GIB));
    }

    #[test]
    fn more_use_than_limit_leaves_nothing() {
        let read = files([
            ("/sys/fs/cgroup/memory.max", "0".to_owned()),
            ("/sys/fs/cgroup/memory.current", u64::MAX.to_string()),
        ]);
        let limit = tightest("0::/", &[v2("/")], read);
        assert_eq!(limit.map(|limit| limit.available_bytes), Some(0));
        // Counters are read one after the other and can disagree.
        let read = files([
            ("/sys/fs/cgroup/memory.max", GIB.to_string()),
            ("/sys/fs/cgroup/memory.current", "5".to_owned()),
            (
                "/sys/fs/cgroup/memory.stat",
                format!("inactive_file {0}\nactive_file {0}\n", u64::MAX),
            ),
        ]);
        let limit = tightest("0::/", &[v2("/")], read);
        assert_eq!(limit.map(|limit| limit.available_bytes), Some(GIB));
    }

    proptest! {
        #[test]
        fn never_panics(
            membership in any::<String>(),
            group in "[a./ :]{0,20}",
            root in "[a./]{0,5}",
            content in any::<String>(),
        ) {
            let mounts = [v1(&root), v2(&root)];
            for membership in [membership, format!("0::{group}\n1:memory:{group}")] {
                tightest(&membership, &mounts, |_| Some(content.clone()));
            }
            stat_bytes(&content, "inactive_file");
        }
    }
}
