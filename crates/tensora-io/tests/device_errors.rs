//! A device that returns errors: they arrive as errors, with file and offset, and what can be read is read.
//!
//! The file system is in an image, of which everything from the middle of a file on goes missing while it is mounted. The
//! loop device then answers reads of that with errors, as a disk answers reads of bad sectors; so does the mapping
//! of `dmsetup`, where the kernel has device mapper.
//!
//! All of it is in a mount namespace, on a `tmpfs` of its own: however this ends, mounts and loop devices go with it.
#![cfg(all(
    feature = "testing",
    feature = "mmap",
    target_os = "linux",
    not(tensora_portable)
))]
#![allow(clippy::unwrap_used)]

mod machine_support;

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use machine_support::{has_own_mounts, in_child, with_own_mounts};
use rustix::fs::FallocateFlags;
use rustix::mount::{MountFlags, UnmountFlags};
use tempfile::TempDir;
use tensora_io::testing::skip;
use tensora_io::{
    BackendKind, Control, DirectPolicy, Error, Mapping, MappingPermit, PopulateParams, ReadRequest,
    ReadStats, Region, ResidentPolicy, Result, SourceFile, TransferParams, backend,
};

const MIB: u64 = 1 << 20;
const BLOCK_BYTES: usize = 4096;
const IMAGE_BYTES: u64 = 32 * MIB;
const FILE_BYTES: u64 = 8 * MIB;
const CHUNK_BYTES: u64 = 64 << 10;
/// Where the file goes missing. At the first, no piece of the page cache ends anywhere else; at the second, what is
/// before it in the same piece cannot be read through the page cache either.
const CUTS: [u64; 2] = [4 * MIB, 4 * MIB + 3 * BLOCK_BYTES as u64];
/// Pieces of the page cache are at most so large, and begin at multiples of their size.
const PIECE_BYTES: u64 = 2 * MIB;

/// What returns the errors.
#[derive(Clone, Copy, Debug)]
enum Device {
    /// Its image is cut off.
    Loop,
    /// Maps a part of itself to errors.
    Mapper,
}

/// Runs a program, with a text as its input; what it writes.
fn run(command: &[&str], input: &str) -> std::result::Result<String, String> {
    let (program, arguments) = command.split_first().unwrap();
    let explain = |error: std::io::Error| format!("{program}: {error}");
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(explain)?;
    // A program that does not care for it may have ended.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().map_err(explain)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{program}: {}: {}", output.status, said.trim()))
}

/// Where the image is, and its file system is mounted.
struct Place(TempDir);

impl Place {
    fn new() -> std::result::Result<Self, String> {
        let place = Self(tempfile::tempdir().unwrap());
        let tmpfs = MountFlags::empty();
        rustix::mount::mount("tmpfs", place.0.path(), "tmpfs", tmpfs, None)
            .map_err(|errno| format!("a tmpfs: {errno}"))?;
        std::fs::create_dir(place.mounted()).unwrap();
        Ok(place)
    }

    fn image(&self) -> PathBuf {
        self.0.path().join("image")
    }

    fn mounted(&self) -> PathBuf {
        self.0.path().join("mounted")
    }

    fn unmount(&self) {
        rustix::mount::unmount(self.mounted(), UnmountFlags::empty()).unwrap();
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Also where a failed test has left files open. What is not mounted is no matter.
        for at in [&self.mounted(), self.0.path()] {
            let _ = rustix::mount::unmount(at, UnmountFlags::DETACH);
        }
    }
}

/// A file of which everything from `end` on cannot be read.
struct Damaged {
    // Unmounted after the file is closed.
    file: SourceFile,
    content: Vec<u8>,
    end: u64,
    _place: Place,
}

/// No two blocks are alike.
fn content() -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    std::iter::repeat_with(|| {
        // xorshift64*
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_be_bytes()
    })
    .flatten()
    .take(usize::try_from(FILE_BYTES).unwrap())
    .collect()
}

/// An image whose file system holds the content in a file.
fn write_image(place: &Place, content: &[u8]) -> std::result::Result<(), String> {
    let (image, mounted) = (place.image(), place.mounted());
    let [image_text, mounted_text] = [&image, &mounted].map(|path| path.to_str().unwrap());
    let new = File::create(&image).unwrap();
    new.set_len(IMAGE_BYTES).unwrap();
    let block = BLOCK_BYTES.to_string();
    let make = ["mkfs.ext4", "-q", "-F", "-m", "0", "-b", &block];
    let options = ["-O", "^has_journal", "-E", "lazy_itable_init=0,nodiscard"];
    run(&[&make[..], &options, &[image_text]].concat(), "")?;
    run(&["mount", "-o", "loop", image_text, mounted_text], "")?;
    let file = File::create(mounted.join("data")).unwrap();
    // In one piece.
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, FILE_BYTES).unwrap();
    file.write_all_at(content, 0).unwrap();
    file.sync_all().unwrap();
    drop(file);
    place.unmount();
    Ok(())
}

/// Where in the image this byte of the content is, and that nothing before it is behind there.
fn find_in_image(image: &Path, content: &[u8], at: u64) -> u64 {
    let blocks: HashMap<&[u8], usize> = content.chunks(BLOCK_BYTES).zip(0..).collect();
    let mut places = vec![None; blocks.len()];
    for (place, block) in std::fs::read(image)
        .unwrap()
        .chunks(BLOCK_BYTES)
        .enumerate()
    {
        if let Some(&number) = blocks.get(block) {
            places[number] = Some((place * BLOCK_BYTES) as u64);
        }
    }
    let places: Vec<u64> = places.into_iter().map(Option::unwrap).collect();
    let (before, behind) = places.split_at(usize::try_from(at).unwrap() / BLOCK_BYTES);
    assert!(before.iter().all(|place| *place < behind[0]));
    assert!(behind.iter().all(|place| *place >= behind[0]));
    behind[0]
}

/// Mounts the image, read-only, such that what is behind `cut` cannot be read.
fn mount_damaged(place: &Place, device: Device, cut: u64) -> std::result::Result<(), String> {
    let (image, mounted) = (place.image(), place.mounted());
    let [image_text, mounted_text] = [&image, &mounted].map(|path| path.to_str().unwrap());
    match device {
        Device::Loop => {
            let options = "loop,ro,noload";
            run(&["mount", "-o", options, image_text, mounted_text], "")?;
            // The device keeps its length; what it has no data for, it fails to read.
            let image = File::options().write(true).open(image).unwrap();
            image.set_len(cut).unwrap();
        }
        Device::Mapper => {
            const SECTOR_BYTES: u64 = 512;
            let (good, all) = (cut / SECTOR_BYTES, IMAGE_BYTES / SECTOR_BYTES);
            let below = run(&["losetup", "--find", "--show", image_text], "")?;
            let table = format!("0 {good} linear {below} 0\n{good} {} error\n", all - good);
            let name = format!("tensora-test-{}", std::process::id());
            let made = run(&["dmsetup", "create", "--noudevsync", &name], &table);
            // Either is gone when whoever uses it is.
            run(&["losetup", "--detach", &below], "")?;
            made?;
            let mapped = format!("/dev/mapper/{name}");
            let done = run(&["mount", "-o", "ro,noload", &mapped, mounted_text], "");
            run(&["dmsetup", "remove", "--deferred", &name], "")?;
            done?;
        }
    }
    Ok(())
}

impl Damaged {
    fn new(device: Device, end: u64) -> std::result::Result<Self, String> {
        let place = Place::new()?;
        let content = content();
        write_image(&place, &content)?;
        let cut = find_in_image(&place.image(), &content, end);
        mount_damaged(&place, device, cut)?;
        let damaged = Self {
            file: SourceFile::open(place.mounted().join("data")).unwrap(),
            content,
            end,
            _place: place,
        };
        damaged.evict();
        let mut byte = [0];
        match damaged.file.file().read_at(&mut byte, end) {
            Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(damaged),
            other => Err(format!(
                "a read of what is missing gives {other:?}, not EIO"
            )),
        }
    }

    fn evict(&self) {
        self.file.evict().unwrap();
        assert_eq!(self.file.resident_bytes(0..FILE_BYTES), Some(0));
    }

    /// What of the file can be read by such a way.
    fn readable(&self, through_the_cache: bool) -> Range<u64> {
        match through_the_cache {
            true => 0..self.end - self.end % PIECE_BYTES,
            false => 0..self.end,
        }
    }

    /// The error names the file, the place, and what the device said.
    fn judge(&self, way: &str, error: &Error) {
        let Error::Read {
            path,
            offset,
            length,
            source,
        } = error
        else {
            panic!("{way}: {error:?}");
        };
        assert_eq!(path, self.file.path(), "{way}");
        assert_eq!(source.raw_os_error(), Some(libc::EIO), "{way}: {error}");
        let failed = *offset..offset + length;
        assert!(
            failed.contains(&self.end) && *length <= CHUNK_BYTES,
            "{way}, {}: {error}",
            self.end
        );
        let text = error.to_string();
        let named = [path.to_str().unwrap(), &offset.to_string(), "Input/output"];
        assert!(
            named.iter().all(|part| text.contains(part)),
            "{way}: {text}"
        );
    }

    fn read(
        &self,
        kind: BackendKind,
        direct: DirectPolicy,
        range: Range<u64>,
    ) -> (Region, Result<ReadStats>) {
        let len = usize::try_from(range.end - range.start).unwrap();
        let mut memory = Region::allocate(len).unwrap();
        let request = ReadRequest {
            file: &self.file,
            offset: range.start,
            destination: memory.as_mut_slice().into(),
        };
        // One after the other, so that the first that fails is the first that is missing.
        let params = TransferParams {
            chunk_bytes: CHUNK_BYTES,
            queue_depth: 1,
            workers: 1,
            direct,
            resident: ResidentPolicy::Reread,
        };
        let outcome = backend(kind)
            .unwrap()
            .read(vec![request], &params, &Control::new());
        (memory, outcome)
    }

    fn check_backend(&self, kind: BackendKind, direct: DirectPolicy) {
        let way = format!("{kind}, {direct}");
        let readable = self.readable(direct == DirectPolicy::Never);
        self.evict();
        let (_, outcome) = self.read(kind, direct, 0..FILE_BYTES);
        self.judge(&way, &outcome.expect_err("half of the file is missing"));
        // A byte more than there is, of which nothing is aligned.
        self.evict();
        let (_, outcome) = self.read(kind, direct, self.end - 5000..self.end + 1);
        self.judge(&way, &outcome.expect_err("a byte of it is missing"));
        for range in [readable.clone(), 1..readable.end - 1] {
            self.evict();
            let (memory, outcome) = self.read(kind, direct, range.clone());
            outcome.unwrap_or_else(|error| panic!("{way}, {range:?}: {error}"));
            assert!(memory.as_slice() == self.part(&range), "{way}, {range:?}");
        }
    }

    fn part(&self, range: &Range<u64>) -> &[u8] {
        let [begin, end] = [range.start, range.end].map(|at| usize::try_from(at).unwrap());
        &self.content[begin..end]
    }

    fn check_mapping(&self) {
        self.evict();
        // SAFETY: nobody else knows of the file, and what was cut off is not looked at.
        let permit = unsafe { MappingPermit::new() };
        let mapping = Mapping::new(&self.file, permit).unwrap();
        let params = PopulateParams {
            chunk_bytes: CHUNK_BYTES,
            workers: 1,
            known_resident: false,
        };
        let populate =
            |range: Range<u64>| mapping.populate(&self.file, &[range], &params, &Control::new());
        let error = populate(0..FILE_BYTES).expect_err("half of the file is missing");
        self.judge("a mapping", &error);
        let readable = self.readable(true);
        populate(readable.clone()).unwrap();
        let bytes = mapping
            .bytes()
            .slice(..usize::try_from(readable.end).unwrap());
        assert!(bytes == self.part(&readable));
    }
}

fn check(test: &str, device: Device) {
    if !has_own_mounts() {
        return skip(&format!("{test}: no mounts of one's own here"));
    }
    if in_child(test, with_own_mounts).is_some() {
        return;
    }
    for end in CUTS {
        let damaged = match Damaged::new(device, end) {
            Ok(damaged) => damaged,
            Err(reason) => return skip(&format!("{test}: {reason}")),
        };
        for kind in BackendKind::ALL {
            if let Err(error) = backend(kind) {
                skip(&format!("{test}: {error}"));
                continue;
            }
            damaged.check_backend(kind, DirectPolicy::Never);
            match damaged.file.direct_support().is_supported() {
                // Nothing is read directly through a mapping.
                _ if kind == BackendKind::Mmap => {}
                true => damaged.check_backend(kind, DirectPolicy::Required),
                false => skip(&format!("{test}: no direct I/O here")),
            }
        }
        damaged.check_mapping();
    }
}

#[test]
fn errors_of_a_device_are_named_and_nothing_else_is_lost() {
    check(
        "errors_of_a_device_are_named_and_nothing_else_is_lost",
        Device::Loop,
    );
}

#[test]
fn errors_of_a_mapped_device_are_named_and_nothing_else_is_lost() {
    let test = "errors_of_a_mapped_device_are_named_and_nothing_else_is_lost";
    // The file can be there without the driver.
    let there = File::open("/dev/mapper/control")
        .map_err(|error| format!("/dev/mapper/control: {error}"))
        .and_then(|_| run(&["dmsetup", "version"], ""));
    match there {
        Ok(_) => check(test, Device::Mapper),
        Err(reason) => skip(&format!("{test}: no device mapper here: {reason}")),
    }
}
