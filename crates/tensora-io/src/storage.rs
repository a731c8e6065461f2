//! Where files are stored: file system, device, and what is in the page cache.

use std::num::NonZero;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crate::workers::{Crew, chunks_of, lock};
use crate::{DirectSupport, SourceFile, StorageFacts};

/// From so many bytes on, a sample is asked about first: counting that much can take a millisecond.
const SAMPLE_MIN_BYTES: u64 = 64 << 20;
/// What one answer is about. Sixteen pages cost little beside the call.
const SAMPLE_BYTES: u64 = 64 << 10;
/// The files are cut into stretches of this length or more, and one sample is taken of each: 2 % of what counting looks at.
const STRETCH_MIN_BYTES: u64 = 4 << 20;
/// Stretches are so long that there are no more than this, and one for each file: 1.1 to 1.7 ms with 9 GiB (by hand).
const MAX_STRETCHES: u64 = 2048;

/// From so many bytes on, several threads ask what is resident: that takes the kernel some 20 ms per GB where pages are kept
/// one by one (benches/runs/2026-11-28-memory-and-pages.md), far longer than it takes to make a thread. Not measured itself.
const COUNT_IN_PARALLEL_MIN_BYTES: u64 = 512 << 20;
/// Two were measured; a limit, because making hundreds on a large machine would cost more than it spares.
const MAX_COUNTING_THREADS: usize = 8;
/// So that all are done at about the same time.
const PIECES_PER_THREAD: u64 = 4;
/// Pieces end at multiples of this, so that none cuts a page, and large ones seldom.
const PIECE_ALIGN_BYTES: u64 = 2 << 20;

impl StorageFacts {
    /// Examines the place that `files` are stored in.
    ///
    /// Takes well under a millisecond per file: a few system calls, one read of the table of mounts,
    /// and the trial of direct I/O, which each file remembers. Where the files differ, the most
    /// restrictive answer stands, in full: network before user-space server before overlay before
    /// unknown before local before memory. Without files nothing is known, see
    /// [`StorageFacts::unknown`].
    ///
    /// What is in the page cache of 64 MiB or more is first asked about 64 KiB in every 4 MiB, or in every 2048th part of the
    /// files if that is longer, where that is quick (Linux 6.5, not on stacked and user-space file systems). If all of that is
    /// there, all of the files is taken to be, and [`resident_is_estimate`](Self::resident_is_estimate) says so; a gap twice as
    /// long as such a stretch cannot be missed, and shorter ones only if none of them meets a sample. Otherwise it
    /// is counted, which can take 20 ms per gigabyte that is there; from 512 MiB on, up to 8 threads do it together.
    ///
    /// ```
    /// # let directory = tempfile::tempdir()?;
    /// # let path = directory.path().join("data");
    /// # std::fs::write(&path, [0; 5000])?;
    /// use tensora_io::{SourceFile, StorageFacts};
    ///
    /// let file = SourceFile::open(&path)?;
    /// let storage = StorageFacts::probe(&[&file]);
    /// println!("{} bytes on {}", storage.file_bytes, storage.file_system);
    /// # assert_eq!(storage.file_bytes, 5000);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn probe(files: &[&SourceFile]) -> Self {
        if files.is_empty() {
            return Self::unknown();
        }
        let file_bytes = files
            .iter()
            .fold(0_u64, |sum, file| sum.saturating_add(file.len()));
        let seems_resident = file_bytes >= SAMPLE_MIN_BYTES && seems_resident(files, file_bytes);
        let facts = Self {
            direct: combine_direct(files.iter().map(|file| (*file, file.direct_support()))),
            file_bytes,
            resident_bytes: if seems_resident {
                Some(file_bytes)
            } else {
                count_resident(files, file_bytes)
            },
            resident_is_estimate: seems_resident,
            ..Self::unknown()
        };
        #[cfg(all(target_os = "linux", not(tensora_portable)))]
        let facts = linux::with_place(facts, files);
        facts
    }
}

/// Whether all samples of these files, which have so many bytes together, are in the page cache.
fn seems_resident(files: &[&SourceFile], total_bytes: u64) -> bool {
    let stretch_bytes = total_bytes
        .div_ceil(MAX_STRETCHES)
        .max(STRETCH_MIN_BYTES)
        .next_multiple_of(SAMPLE_BYTES);
    files.iter().all(|file| {
        samples(file.len(), stretch_bytes).all(|sample| {
            let sample_bytes = sample.end - sample.start;
            file.quick_resident_bytes(sample) == Some(sample_bytes)
        })
    })
}

/// A range of each stretch of a file of this length: always the same ones, but scattered, so that what is missing at
/// regular distances does not lie between them all.
fn samples(file_bytes: u64, stretch_bytes: u64) -> impl Iterator<Item = Range<u64>> {
    /// 2⁶⁴ divided by the golden ratio: its multiples, as fractions of 2⁶⁴, are spread evenly however many there are.
    const SCATTER: u64 = 0x9E37_79B9_7F4A_7C15;

    (1_u64..)
        .zip(chunks_of(&(0..file_bytes), stretch_bytes))
        .map(|(number, stretch)| {
            let places = ((stretch.end - stretch.start) / SAMPLE_BYTES).max(1);
            let scattered = u128::from(number.wrapping_mul(SCATTER)) * u128::from(places);
            let place = (scattered >> 64) as u64;
            let start = stretch.start + place * SAMPLE_BYTES;
            start..(start + SAMPLE_BYTES).min(stretch.end)
        })
}

/// How many bytes of these files are in the page cache; `None` when the system does not tell of one.
fn count_resident(files: &[&SourceFile], total_bytes: u64) -> Option<u64> {
    let threads = if total_bytes < COUNT_IN_PARALLEL_MIN_BYTES {
        1
    } else {
        let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
        processors.min(MAX_COUNTING_THREADS) as u64
    };
    let piece_bytes = (total_bytes / (threads * PIECES_PER_THREAD) / PIECE_ALIGN_BYTES + 1)
        .saturating_mul(PIECE_ALIGN_BYTES);
    let pieces = Mutex::new(files.iter().flat_map(|file| {
        let pieces = chunks_of(&(0..file.len()), piece_bytes);
        pieces.map(move |piece| (*file, piece))
    }));
    let sum = Mutex::new(Some(0_u64));
    let crew = Crew::default();
    crew.run("tensora-probe", threads, &|| {
        loop {
            let Some((file, piece)) = lock(&pieces).next() else {
                return;
            };
            let resident = file.resident_bytes(piece);
            let mut sum = lock(&sum);
            *sum = sum
                .zip(resident)
                .map(|(sum, resident)| sum.saturating_add(resident));
        }
    });
    // A thread that could not be made is not missed: the calling one went on until there was nothing left.
    drop(crew.finish());
    sum.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// What holds for all files: unsupported if any file is, else the largest alignments.
fn combine_direct<'a>(
    files: impl Iterator<Item = (&'a SourceFile, DirectSupport)>,
) -> DirectSupport {
    let mut supported: Option<(u32, u32)> = None;
    let mut unsupported = None;
    for (file, support) in files {
        match support {
            DirectSupport::Supported {
                offset_align_bytes,
                memory_align_bytes,
            } => {
                let (offset, memory) = supported.unwrap_or((1, 1));
                supported = Some((
                    offset.max(offset_align_bytes),
                    memory.max(memory_align_bytes),
                ));
            }
            DirectSupport::Unsupported { reason } => {
                unsupported.get_or_insert((file, reason));
            }
        }
    }
    match (unsupported, supported) {
        (None, Some((offset_align_bytes, memory_align_bytes))) => DirectSupport::Supported {
            offset_align_bytes,
            memory_align_bytes,
        },
        // Not all are alike: say which one it is.
        (Some((file, reason)), Some(_)) => DirectSupport::Unsupported {
            reason: format!("{}: {reason}", file.path().display()),
        },
        (Some((_, reason)), None) => DirectSupport::Unsupported { reason },
        (None, None) => StorageFacts::unknown().direct,
    }
}

#[cfg(all(target_os = "linux", not(tensora_portable)))]
pub(crate) use linux::class_by_magic;

#[cfg(all(target_os = "linux", not(tensora_portable)))]
mod linux {
    use std::collections::HashMap;
    use std::fs::File;
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    use std::path::{Path, PathBuf};

    use rustix::fs::{AtFlags, StatxFlags, major, minor, statx};

    use crate::probe::mounts::{Mount, mounts};
    use crate::probe::read_text;
    use crate::{FileSystemClass, SourceFile, StorageFacts};
    use FileSystemClass::{Fuse, Local, Memory, Network, Overlay, Unknown};

    /// Magic number (`statfs`), type name and class of the file systems that checkpoints may lie on. The
    /// numbers are those of `linux/magic.h` and, for file systems kept outside the kernel, of their own
    /// sources. One number can belong to several types; the first row names it when nothing else does.
    const FILE_SYSTEMS: [(u32, &str, FileSystemClass); 51] = [
        (0xEF53, "ext4", Local),
        (0xEF53, "ext3", Local),
        (0xEF53, "ext2", Local),
        (0x5846_5342, "xfs", Local),
        (0x9123_683E, "btrfs", Local),
        (0xF2F5_2010, "f2fs", Local),
        (0x2FC1_2FC1, "zfs", Local),
        (0xCA45_1A4E, "bcachefs", Local),
        (0x7366_746E, "ntfs3", Local),
        (0x5346_544E, "ntfs", Local),
        (0x2011_BAB0, "exfat", Local),
        (0x4D44, "vfat", Local),
        (0x4D44, "msdos", Local),
        (0xE0F5_E1E2, "erofs", Local),
        (0x7371_7368, "squashfs", Local),
        (0x9660, "iso9660", Local),
        (0x1501_3346, "udf", Local),
        (0x3153_464A, "jfs", Local),
        (0x5265_4973, "reiserfs", Local),
        (0x3434, "nilfs2", Local),
        (0x482B, "hfsplus", Local),
        (0x0102_1994, "tmpfs", Memory),
        (0x0102_1994, "devtmpfs", Memory),
        (0x8584_58F6, "ramfs", Memory),
        (0x8584_58F6, "rootfs", Memory),
        (0x9584_58F6, "hugetlbfs", Memory),
        (0x6969, "nfs", Network),
        (0x6969, "nfs4", Network),
        (0xFF53_4D42, "cifs", Network),
        (0xFE53_4D42, "smb3", Network),
        (0x517B, "smbfs", Network),
        (0x00C3_6400, "ceph", Network),
        (0x0102_1997, "9p", Network),
        (0x0BD0_0BD0, "lustre", Network),
        (0x4750_4653, "gpfs", Network),
        (0x1983_0326, "beegfs", Network),
        (0x5346_414F, "afs", Network),
        (0x6B41_4653, "afs", Network),
        (0x7375_7245, "coda", Network),
        (0x2003_0528, "orangefs", Network),
        (0x2003_0528, "pvfs2", Network),
        // Cluster file systems: the device is shared, and so is its speed.
        (0x7461_636F, "ocfs2", Network),
        (0x0116_1970, "gfs2", Network),
        // Folders that a hypervisor shares with its guest.
        (0x786F_4256, "vboxsf", Network),
        (0xBACB_ACBC, "vmhgfs", Network),
        // The kernel's FUSE carries both of the next two; only the table of mounts tells them apart.
        (0x6573_5546, "fuse", Fuse),
        (0x6573_5546, "virtiofs", Network),
        (0x6573_5546, "fuseblk", Fuse),
        (0x794C_7630, "overlay", Overlay),
        (0x6175_6673, "aufs", Overlay),
        (0xF15F, "ecryptfs", Overlay),
    ];

    /// The place that one file is stored in.
    #[derive(Clone, Debug, PartialEq, Eq)]
    struct Place {
        file_system: String,
        class: FileSystemClass,
        device: Device,
        mount_source: Option<String>,
    }

    /// What the kernel tells of a block device.
    #[derive(Clone, Debug, Default, PartialEq, Eq)]
    struct Device {
        name: Option<String>,
        model: Option<String>,
        bytes: Option<u64>,
        rotational: Option<bool>,
    }

    pub(super) fn with_place(facts: StorageFacts, files: &[&SourceFile]) -> StorageFacts {
        let mounts = mounts();
        let mut places = HashMap::new();
        for file in files {
            let device = file.file().metadata().ok().map(|metadata| metadata.dev());
            let mount = mount_id(file.file());
            places
                .entry((device, mount))
                .or_insert_with(|| place(file, device, mount, &mounts));
        }
        match most_restrictive(places.into_values()) {
            Some(place) => StorageFacts {
                file_system: place.file_system,
                class: place.class,
                device: place.device.name,
                device_model: place.device.model,
                device_bytes: place.device.bytes,
                mount_source: place.mount_source,
                rotational: place.device.rotational,
                ..facts
            },
            None => facts,
        }
    }

    fn most_restrictive(places: impl Iterator<Item = Place>) -> Option<Place> {
        places.max_by(|first, second| {
            // The names only make the answer the same in every run.
            let key = |place: &Place| {
                (
                    restriction(place.class),
                    place.device.rotational == Some(true),
                )
            };
            key(first)
                .cmp(&key(second))
                .then_with(|| second.file_system.cmp(&first.file_system))
                .then_with(|| second.device.name.cmp(&first.device.name))
        })
    }

    fn restriction(class: FileSystemClass) -> u8 {
        match class {
            Memory => 0,
            Local => 1,
            Unknown => 2,
            Overlay => 3,
            Fuse => 4,
            Network => 5,
        }
    }

    fn place(
        file: &SourceFile,
        device: Option<u64>,
        mount: Option<u64>,
        mounts: &[Mount],
    ) -> Place {
        let device = device.map(|device| (major(device), minor(device)));
        let mount = find_mount(mounts, device, mount);
        let (file_system, class) = identify(file.file_system_magic(), mount);
        let device = match block_device_directory(device, mount, class) {
            Some((directory, fallback)) => block_device(&directory, fallback),
            None => Device::default(),
        };
        Place {
            file_system,
            class,
            device,
            mount_source: mount
                .map(|mount| mount.source.clone())
                .filter(|source| !source.is_empty()),
        }
    }

    /// Which line of the table of mounts the file was opened through (Linux 5.8).
    fn mount_id(file: &File) -> Option<u64> {
        let facts = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID).ok()?;
        (facts.stx_mask & StatxFlags::MNT_ID.bits() != 0).then_some(facts.stx_mnt_id)
    }

    /// By number; failing that by device, which some file systems (btrfs) report differently per file.
    fn find_mount(mounts: &[Mount], device: Option<(u32, u32)>, id: Option<u64>) -> Option<&Mount> {
        mounts
            .iter()
            .find(|mount| Some(mount.id) == id)
            .or_else(|| mounts.iter().find(|mount| Some(mount.device) == device))
    }

    /// The class of the file system, as far as its magic number tells.
    pub(crate) fn class_by_magic(file: &SourceFile) -> Option<FileSystemClass> {
        by_magic(file.file_system_magic()?).map(|(_, _, class)| class)
    }

    fn by_magic(magic: u32) -> Option<(u32, &'static str, FileSystemClass)> {
        FILE_SYSTEMS
            .into_iter()
            .find(|(number, _, _)| *number == magic)
    }

    /// Name and class. The table of mounts knows the exact type; the magic number is always there.
    fn identify(magic: Option<u32>, mount: Option<&Mount>) -> (String, FileSystemClass) {
        let numbered = magic.and_then(by_magic);
        let Some(mount) = mount else {
            return match (numbered, magic) {
                (Some((_, name, class)), _) => (name.to_owned(), class),
                (None, Some(magic)) => (format!("{magic:#x}"), Unknown),
                (None, None) => ("unknown".to_owned(), Unknown),
            };
        };
        let name = mount.file_system.as_str();
        let class = FILE_SYSTEMS
            .into_iter()
            .find(|(_, known, _)| *known == name)
            .or(numbered)
            .map_or(Unknown, |(_, _, class)| class);
        (name.to_owned(), class)
    }

    /// Where the kernel describes the device below a file system, and what to call it if it does not.
    fn block_device_directory(
        device: Option<(u32, u32)>,
        mount: Option<&Mount>,
        class: FileSystemClass,
    ) -> Option<(PathBuf, Option<String>)> {
        let by_number = |major: u32, minor: u32| {
            let number = format!("{major}:{minor}");
            (Path::new("/sys/dev/block").join(&number), Some(number))
        };
        // Major number 0 belongs to no device. Of the file systems that have it, those on a device name
        // theirs in the table of mounts; for others, such text there is only a label.
        if let Some((major, minor)) = device
            && major != 0
        {
            return Some(by_number(major, minor));
        }
        if !matches!(class, Local | Overlay) {
            return None;
        }
        let source = Path::new(&mount?.source);
        let name = source.strip_prefix("/dev").ok()?.file_name()?;
        match std::fs::metadata(source) {
            Ok(metadata) if metadata.file_type().is_block_device() => {
                Some(by_number(major(metadata.rdev()), minor(metadata.rdev())))
            }
            // A container's /dev does not hold the disks of its host.
            _ => Some((Path::new("/sys/class/block").join(name), None)),
        }
    }

    /// What sysfs tells of a device in its directory there; of a partition, that of the disk.
    fn block_device(directory: &Path, fallback: Option<String>) -> Device {
        let Ok(target) = std::fs::read_link(directory) else {
            return Device {
                name: fallback,
                ..Device::default()
            };
        };
        let is_partition = directory.join("partition").exists();
        let (above, disk) = if is_partition {
            ("..", target.parent())
        } else {
            ("", Some(target.as_path()))
        };
        let name = disk
            .and_then(Path::file_name)
            .map(|name| name.to_string_lossy().into_owned());
        let text = |path: &str| {
            read_text(directory.join(above).join(path))
                .map(|text| text.trim().to_owned())
                .filter(|text| !text.is_empty())
        };
        Device {
            name: name.or(fallback),
            model: text("device/model"),
            // In sectors of 512 bytes, whatever those of the device are.
            bytes: text("size").and_then(|size| size.parse::<u64>().ok()?.checked_mul(512)),
            rotational: match text("queue/rotational").as_deref() {
                Some("0") => Some(false),
                Some("1") => Some(true),
                _ => None,
            },
        }
    }

    #[cfg(test)]
    mod tests {
        use std::os::unix::fs::symlink;

        use super::*;

        fn mount(id: u64, device: (u32, u32), file_system: &str, source: &str) -> Mount {
            Mount {
                id,
                device,
                root: "/".to_owned(),
                point: "/".to_owned(),
                file_system: file_system.to_owned(),
                source: source.to_owned(),
                super_options: String::new(),
            }
        }

        #[test]
        fn the_table_of_mounts_is_more_exact_than_the_number() {
            for (magic, named, expected) in [
                (0xEF53, None, ("ext4", Local)),
                (0xEF53, Some("ext2"), ("ext2", Local)),
                (0x6573_5546, None, ("fuse", Fuse)),
                (0x6573_5546, Some("fuse.sshfs"), ("fuse.sshfs", Fuse)),
                (0x6573_5546, Some("virtiofs"), ("virtiofs", Network)),
                (0x6969, Some("nfs4"), ("nfs4", Network)),
                (0x0102_1994, Some("tmpfs"), ("tmpfs", Memory)),
                (0x794C_7630, Some("overlay"), ("overlay", Overlay)),
                (0xDEAD_BEEF, Some("lustre"), ("lustre", Network)),
                (0xDEAD_BEEF, Some("newfs"), ("newfs", Unknown)),
                (0xDEAD_BEEF, None, ("0xdeadbeef", Unknown)),
            ] {
                let mount = named.map(|name| mount(1, (0, 1), name, ""));
                let (name, class) = identify(Some(magic), mount.as_ref());
                assert_eq!((name.as_str(), class), expected);
            }
            assert_eq!(identify(None, None), ("unknown".to_owned(), Unknown));
        }

        #[test]
        fn one_name_has_one_class() {
            for (_, name, class) in FILE_SYSTEMS {
                for (_, other, other_class) in FILE_SYSTEMS {
                    assert!(name != other || class == other_class, "{name}");
                }
            }
        }

        #[test]
        fn the_number_of_the_mount_goes_before_the_device() {
            let mounts = [mount(1, (0, 30), "a", ""), mount(2, (0, 31), "b", "")];
            let name = |device, id| {
                find_mount(&mounts, device, id).map(|mount| mount.file_system.as_str())
            };
            assert_eq!(name(Some((0, 30)), Some(2)), Some("b"));
            assert_eq!(name(Some((0, 30)), None), Some("a"));
            assert_eq!(
                name(Some((0, 30)), Some(9)),
                Some("a"),
                "from another namespace"
            );
            assert_eq!(name(Some((0, 99)), Some(9)), None);
            assert_eq!(name(None, None), None);
        }

        #[test]
        fn most_restrictive_place_stands_in_full() {
            let place = |file_system: &str, class, rotational| Place {
                file_system: file_system.to_owned(),
                class,
                device: Device {
                    name: Some(format!("device of {file_system}")),
                    rotational,
                    ..Device::default()
                },
                mount_source: None,
            };
            let places = [
                place("tmpfs", Memory, None),
                place("ext4", Local, Some(false)),
                place("xfs", Local, Some(true)),
                place("newfs", Unknown, None),
                place("overlay", Overlay, None),
                place("fuse.x", Fuse, None),
                place("nfs4", Network, None),
            ];
            for count in 1..=places.len() {
                let worst = most_restrictive(places[..count].iter().cloned());
                assert_eq!(worst.as_ref(), places[..count].last());
                let reversed = most_restrictive(places[..count].iter().rev().cloned());
                assert_eq!(reversed, worst);
            }
            assert_eq!(most_restrictive(std::iter::empty()), None);
        }

        #[test]
        fn a_partition_answers_for_its_disk() {
            let sysfs = tempfile::tempdir().unwrap();
            let at = |path: &str| sysfs.path().join(path);
            std::fs::create_dir_all(at("devices/sda/sda2")).unwrap();
            std::fs::create_dir_all(at("devices/sda/queue")).unwrap();
            std::fs::create_dir_all(at("devices/nvme0n1/queue")).unwrap();
            std::fs::create_dir_all(at("dev/block")).unwrap();
            std::fs::write(at("devices/sda/queue/rotational"), "1\n").unwrap();
            std::fs::write(at("devices/sda/sda2/partition"), "2\n").unwrap();
            std::fs::write(at("devices/sda/sda2/size"), "8\n").unwrap();
            std::fs::write(at("devices/sda/size"), "2048\n").unwrap();
            std::fs::create_dir_all(at("devices/sda/device")).unwrap();
            std::fs::write(at("devices/sda/device/model"), "Spinning 1T  \n").unwrap();
            std::fs::write(at("devices/nvme0n1/queue/rotational"), "0\n").unwrap();
            symlink("../../devices/sda/sda2", at("dev/block/8:2")).unwrap();
            symlink("../../devices/sda", at("dev/block/8:0")).unwrap();
            symlink("../../devices/nvme0n1", at("dev/block/259:0")).unwrap();

            let device =
                |number: &str| block_device(&at("dev/block").join(number), Some(number.to_owned()));
            let disk = Device {
                name: Some("sda".to_owned()),
                model: Some("Spinning 1T".to_owned()),
                bytes: Some(1 << 20),
                rotational: Some(true),
            };
            assert_eq!(device("8:2"), disk);
            assert_eq!(device("8:0"), disk);
            let bare = |name: &str, rotational| Device {
                name: Some(name.to_owned()),
                rotational,
                ..Device::default()
            };
            assert_eq!(device("259:0"), bare("nvme0n1", Some(false)));
            assert_eq!(device("9:9"), bare("9:9", None));
        }

        #[test]
        fn only_file_systems_on_a_device_are_asked_for_it() {
            let btrfs = mount(1, (0, 40), "btrfs", "/dev/no-such-disk1");
            fn directory(
                device: Option<(u32, u32)>,
                mount: Option<&Mount>,
                class: FileSystemClass,
            ) -> Option<PathBuf> {
                block_device_directory(device, mount, class).map(|(directory, _)| directory)
            }
            assert_eq!(
                directory(Some((0, 41)), Some(&btrfs), Local),
                Some("/sys/class/block/no-such-disk1".into())
            );
            assert_eq!(
                directory(Some((8, 1)), Some(&btrfs), Local),
                Some("/sys/dev/block/8:1".into())
            );
            // Anybody may call the source of a tmpfs what they like.
            assert_eq!(directory(Some((0, 41)), Some(&btrfs), Memory), None);
            for source in ["pool/data", "none", "", "/dev", "/dev/..", "server:/export"] {
                let other = mount(1, (0, 40), "zfs", source);
                assert_eq!(
                    directory(Some((0, 41)), Some(&other), Local),
                    None,
                    "{source}"
                );
            }
            assert_eq!(directory(None, None, Local), None);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// One in each stretch, so that none can be missing as a whole; of a small file all.
        #[test]
        fn samples_lie_in_every_stretch(
            file_bytes in 0_u64..1 << 40,
            small in any::<bool>(),
            steps in 64_u64..1 << 14,
        ) {
            let file_bytes = if small { file_bytes % (SAMPLE_BYTES * 2) } else { file_bytes };
            let stretch_bytes = steps * SAMPLE_BYTES;
            let samples: Vec<_> = samples(file_bytes, stretch_bytes).take(5000).collect();
            let stretches = file_bytes.div_ceil(stretch_bytes);
            prop_assert_eq!(samples.len() as u64, stretches.min(5000));
            for (number, sample) in (0..).zip(&samples) {
                let stretch = number * stretch_bytes..((number + 1) * stretch_bytes).min(file_bytes);
                prop_assert!(stretch.start <= sample.start && sample.end <= stretch.end);
                let sample_bytes = sample.end - sample.start;
                prop_assert_eq!(sample_bytes, SAMPLE_BYTES.min(stretch.end - stretch.start));
            }
        }
    }

    /// Of 16 stretches for each place in them, no two in a row are asked about at the same place, nor many more than 16 in all.
    #[test]
    fn samples_are_scattered() {
        for all_places in [64, 65, 66, 100, 127, 1024] {
            let stretch_bytes = all_places * SAMPLE_BYTES;
            let places: Vec<_> = samples(16 * all_places * stretch_bytes, stretch_bytes)
                .map(|sample| sample.start % stretch_bytes / SAMPLE_BYTES)
                .collect();
            assert!(places.windows(2).all(|pair| pair[0] != pair[1]));
            for place in 0..all_places {
                let count = places.iter().filter(|&&other| other == place).count();
                assert!(
                    (13..=19).contains(&count),
                    "{count} at {place} of {all_places}"
                );
            }
        }
    }

    fn supported(offset_align_bytes: u32, memory_align_bytes: u32) -> DirectSupport {
        DirectSupport::Supported {
            offset_align_bytes,
            memory_align_bytes,
        }
    }

    fn unsupported(reason: &str) -> DirectSupport {
        DirectSupport::Unsupported {
            reason: reason.to_owned(),
        }
    }

    /// And what is small is counted, whatever that costs.
    #[test]
    fn resident_files_are_estimated_where_asking_is_quick() {
        let directory = tempfile::tempdir().unwrap();
        for length in [SAMPLE_MIN_BYTES - 1, SAMPLE_MIN_BYTES] {
            let path = directory.path().join("file");
            let file = std::fs::File::create(&path).unwrap();
            file.set_len(length).unwrap();
            let read = std::fs::read(&path).unwrap();
            assert_eq!(read.len() as u64, length);
            let file = SourceFile::open(&path).unwrap();
            let storage = StorageFacts::probe(&[&file]);
            if !storage.is_resident() {
                let what =
                    "estimates of what is resident: holes are not kept in the page cache here";
                return crate::skip_support::skip(what);
            }
            let is_quick = file.quick_resident_bytes(0..1).is_some();
            let is_large = length >= SAMPLE_MIN_BYTES;
            assert_eq!(storage.resident_is_estimate, is_quick && is_large);
        }
    }

    #[test]
    fn direct_support_is_that_of_all_files() {
        let directory = tempfile::tempdir().unwrap();
        let files: Vec<SourceFile> = ["a", "b", "c"]
            .map(|name| {
                let path = directory.path().join(name);
                std::fs::write(&path, "x").unwrap();
                SourceFile::open(path).unwrap()
            })
            .into();
        let combine =
            |supports: &[DirectSupport]| combine_direct(files.iter().zip(supports.iter().cloned()));
        assert_eq!(
            combine(&[supported(512, 4096), supported(4096, 4)]),
            supported(4096, 4096)
        );
        assert_eq!(combine(&[supported(512, 4)]), supported(512, 4));
        assert_eq!(
            combine(&[unsupported("refused"), unsupported("other")]),
            unsupported("refused")
        );
        let path = files[1].path().display().to_string();
        assert_eq!(
            combine(&[supported(512, 4), unsupported("refused"), supported(1, 1)]),
            unsupported(&format!("{path}: refused"))
        );
        assert!(!combine(&[]).is_supported());
    }
}
