//! When the power fails during a conversion, what the device holds by then is what was there, nothing, something
//! that is refused, or all of the new checkpoint; and it can always be finished.
//!
//! The target is on a file system in an image file, mounted through a loop device. The converter, a process of its
//! own, is stopped again and again; a copy of the image then holds what the device holds, without what is still
//! in the page cache. Each copy is mounted, which replays its journal, checked, and the conversion finished there.
//! Not simulated is a device that loses what it was told to flush, or has it in another order; `killed.rs` has
//! what is lost when only the process ends.
//!
//! All of it is in a mount namespace and a process namespace, on a `tmpfs` of its own: however this ends, mounts,
//! loop devices, images and processes go with it. That takes root, and is skipped elsewhere.
//!
//! `TENSORA_POWER_SEED` repeats the moments of a run, as far as clocks can; `TENSORA_POWER_RUNS` says how many
//! conversions there are, `TENSORA_POWER_FILE_SYSTEM` on which file system alone.
#![cfg(target_os = "linux")]
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test, which says what it did"
)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::num::NonZero;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use common::{Random, Record, digest};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use tensora_convert::{
    Checksums, ConversionNote, ConvertOptions, Error, Overwrite, Reading, SharedTensors, Unfinished,
};
use tensora_formats::{CheckpointIndex, Dtype, Format, UNFINISHED_NAME};
use tensora_io::{
    Backend, BackendKind, Control, DirectPolicy, ReadRequest, ReadStats, ResidentPolicy, Result,
    TransferParams, backend,
};

const ORDER: &str = "TENSORA_TEST_CONVERTER";
/// Names the `tmpfs` that is this test's alone.
const PLACE: &str = "TENSORA_TEST_POWER_PLACE";
/// How long each read waits, so that there is time to stop the converter.
const DELAY: Duration = Duration::from_millis(3);
/// Conversions, unless the environment says otherwise.
const RUNS: u64 = 15;
/// Copies of the image in one conversion while it writes, and while files get their names.
const MOST_COPIES: [usize; 2] = [2, 4];

// --- The converter ------------------------------------------------------------------------------

/// What a converter is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Order {
    source: PathBuf,
    target: PathBuf,
    format: String,
    files: u32,
    force: bool,
    resume: bool,
}

/// Waits before it reads.
#[derive(Debug)]
struct Slow(Box<dyn Backend>);

impl Backend for Slow {
    fn kind(&self) -> BackendKind {
        self.0.kind()
    }

    fn read(
        &self,
        requests: Vec<ReadRequest<'_>>,
        params: &TransferParams,
        control: &Control,
    ) -> Result<ReadStats> {
        thread::sleep(DELAY);
        self.0.read(requests, params, control)
    }
}

impl Order {
    fn options(&self) -> ConvertOptions {
        let format: Format = self.format.parse().unwrap();
        let files = NonZero::new(self.files).unwrap();
        let options = ConvertOptions::new(format)
            .memory_limit_bytes(ConvertOptions::MIN_MEMORY_LIMIT_BYTES)
            .shared_tensors(SharedTensors::Duplicate)
            .checksums(Checksums::Write)
            .overwrite(if self.force {
                Overwrite::Replace
            } else {
                Overwrite::Refuse
            })
            .unfinished(if self.resume {
                Unfinished::Resume
            } else {
                Unfinished::Refuse
            });
        match format {
            Format::Safetensors => options.shards(files),
            Format::ServerlessLlmStore => {
                options.partition_bytes(NonZero::new(2_000_000 / u64::from(self.files)).unwrap())
            }
            _ => options.partitions(files),
        }
    }

    /// As a process that can be stopped.
    fn start(&self) -> Child {
        Command::new(std::env::current_exe().unwrap())
            .args(["converter", "--exact", "--ignored", "--nocapture"])
            .env(ORDER, serde_json::to_string(self).unwrap())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }
}

/// Not a test of its own: what a process does that the other test stops.
#[test]
#[ignore = "the process that the other test stops"]
fn converter() {
    let Ok(order) = std::env::var(ORDER) else {
        return;
    };
    let order: Order = serde_json::from_str(&order).unwrap();
    let slow = Slow(backend(BackendKind::Sync).unwrap());
    let transfer = TransferParams {
        chunk_bytes: 1 << 20,
        queue_depth: 1,
        workers: 2,
        direct: DirectPolicy::Preferred,
        resident: ResidentPolicy::Copy,
    };
    let source = CheckpointIndex::open(&order.source).unwrap();
    order
        .options()
        .reading(Reading::new(Arc::new(slow), 1, transfer))
        .plan(&source, &order.target)
        .unwrap()
        .run(&Control::new())
        .unwrap();
}

// --- File systems in images ---------------------------------------------------------------------

/// A file system that targets are on.
struct FileSystem {
    name: &'static str,
    /// Makes one in the file that is named behind it.
    make: &'static [&'static str],
    bytes: u64,
    /// So that nothing becomes durable but what the converter syncs.
    options: &'static str,
    /// Repairs the file that is named behind it.
    repair: Option<&'static [&'static str]>,
    /// Whether what is durable without a sync became so in the order in which it was done.
    is_ordered: bool,
}

const FILE_SYSTEMS: [FileSystem; 3] = [
    FileSystem {
        name: "ext4",
        make: &[
            "mkfs.ext4",
            "-q",
            "-F",
            "-m",
            "0",
            "-J",
            "size=4",
            "-E",
            "lazy_itable_init=0,nodiscard",
        ],
        bytes: 64 << 20,
        options: "loop,noatime,commit=300",
        repair: None,
        is_ordered: true,
    },
    // A sync of one file or directory takes nothing else along, as it does with ext4's journal; so this one notices
    // when a directory is not synced.
    FileSystem {
        name: "ext4 without a journal",
        make: &[
            "mkfs.ext4",
            "-q",
            "-F",
            "-m",
            "0",
            "-O",
            "^has_journal",
            "-E",
            "lazy_itable_init=0,nodiscard",
        ],
        bytes: 64 << 20,
        options: "loop,noatime",
        repair: Some(&["e2fsck", "-f", "-y"]),
        is_ordered: false,
    },
    // Has a log of single files beside its transactions, and checksums.
    FileSystem {
        name: "btrfs",
        make: &["mkfs.btrfs", "-q", "-f", "-m", "single", "-d", "single"],
        bytes: 128 << 20,
        options: "loop,noatime,commit=300",
        repair: None,
        is_ordered: true,
    },
];

fn run_tool(command: &[&str], more: &[&Path]) -> std::result::Result<i32, String> {
    let (program, arguments) = command.split_first().unwrap();
    let output = Command::new(program)
        .args(arguments)
        .args(more)
        .stdin(Stdio::null())
        .output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    match output.status.code() {
        Some(0) => Ok(0),
        // What it has repaired; above that it could not.
        Some(code @ 1..4) if *program == "e2fsck" => Ok(code),
        _ => Err(format!("{program}: {}: {}", output.status, said.trim())),
    }
}

impl FileSystem {
    /// An empty one in a new image.
    fn make(&self, image: &Path) -> std::result::Result<(), String> {
        File::create(image).unwrap().set_len(self.bytes).unwrap();
        run_tool(self.make, &[image]).map(drop)
    }

    fn mount(&'static self, image: &Path, on: &Path) -> std::result::Result<Mount, String> {
        fs::create_dir_all(on).unwrap();
        run_tool(&["mount", "-o", self.options], &[image, on])?;
        let mount = Mount { on: on.to_owned() };
        Ok(mount)
    }

    /// Why there is none here, if so.
    fn missing(&'static self, place: &Path) -> Option<String> {
        let image = place.join("probe");
        let made = self
            .make(&image)
            .and_then(|()| match self.repair {
                Some(repair) => run_tool(repair, &[&image]).map(drop),
                None => Ok(()),
            })
            .and_then(|()| self.mount(&image, &place.join("probed")).map(drop));
        let _ = fs::remove_file(&image);
        made.err()
    }
}

/// A mounted image. Its loop device goes with it.
struct Mount {
    on: PathBuf,
}

impl Mount {
    /// The numbers of writes and discards that the device has completed, when none is under way.
    fn writes(&self) -> Option<(u64, u64)> {
        let on = self.on.to_str().unwrap();
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let line = mounts
            .lines()
            .find(|line| line.split(' ').nth(1) == Some(on));
        let device = line.unwrap().split(' ').next().unwrap();
        let device = Path::new(device).file_name().unwrap();
        let text = fs::read_to_string(Path::new("/sys/block").join(device).join("stat")).unwrap();
        let numbers: Vec<u64> = text
            .split_whitespace()
            .map(|n| n.parse().unwrap())
            .collect();
        (numbers[8] == 0).then_some((numbers[4], numbers[11]))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let unmounted = run_tool(&["umount"], &[&self.on]);
        if !thread::panicking() {
            unmounted.unwrap();
        }
    }
}

/// Copies a file, but not its holes.
fn copy_sparse(from: &Path, to: &Path) {
    use rustix::fs::{SeekFrom, seek};
    let mut source = File::open(from).unwrap();
    let target = File::create(to).unwrap();
    target.set_len(source.metadata().unwrap().len()).unwrap();
    let mut end = 0;
    // An error says that there is no more data.
    while let Ok(begin) = seek(&source, SeekFrom::Data(end)) {
        end = seek(&source, SeekFrom::Hole(begin)).unwrap();
        let mut data = vec![0; usize::try_from(end - begin).unwrap()];
        seek(&source, SeekFrom::Start(begin)).unwrap();
        source.read_exact(&mut data).unwrap();
        target.write_all_at(&data, begin).unwrap();
    }
}

/// Copies what the device holds at one moment.
fn copy_device(mount: &Mount, image: &Path, to: &Path) {
    // A busy machine can leave the device waiting for long.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(20) {
        let before = mount.writes();
        if before.is_some() {
            copy_sparse(image, to);
            if mount.writes() == before {
                return;
            }
        }
        thread::sleep(Duration::from_millis(1));
    }
    panic!("the device is never idle although its only writer has been stopped");
}

// --- What is converted --------------------------------------------------------------------------

/// One kind of conversion.
struct Scene {
    name: &'static str,
    source: PathBuf,
    format: Format,
    files: u32,
    /// What the target holds before, where it holds something.
    old: Option<PathBuf>,
    old_digest: Option<String>,
    new_digest: String,
    /// What an undisturbed conversion leaves.
    reference: BTreeMap<PathBuf, Vec<u8>>,
    /// For the target and each rank in it, what a checkpoint there may hold.
    parts: BTreeMap<PathBuf, BTreeSet<String>>,
}

fn records(seed: u64) -> Vec<Record> {
    (0..7)
        .map(|number| {
            // No file ends where a block does: the end goes through the page cache, the rest past it.
            let rows = 100 + 37 * number;
            let name = format!("model.layers.{number}.weight");
            Record::plain(&name, Dtype::BF16, &[rows, 733], seed + number)
        })
        .chain([Record::plain("bias", Dtype::F32, &[1001], seed + 100)])
        .collect()
}

fn rank_records(seed: u64) -> Vec<Vec<Record>> {
    let part = |rank: u64| records(seed + 1000 * rank).into_iter().take(3).collect();
    (0..2).map(part).collect()
}

fn content(directory: &Path) -> String {
    digest(&common::read(directory).tensors)
}

fn copy_directory(from: &Path, to: &Path) {
    for (name, bytes) in common::snapshot(from) {
        let path = to.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

/// The target and the directories of ranks in it.
fn parts(target: &Path) -> Vec<PathBuf> {
    let ranks = (0..2).map(|rank| PathBuf::from(format!("rank_{rank}")));
    let ranks = ranks.filter(|rank| target.join(rank).is_dir());
    [PathBuf::new()].into_iter().chain(ranks).collect()
}

impl Scene {
    fn new(
        name: &'static str,
        (source, format, files): (PathBuf, Format, u32),
        old: Option<PathBuf>,
        spare: &Path,
    ) -> Self {
        let mut scene = Self {
            name,
            new_digest: content(&source),
            old_digest: old.as_deref().map(content),
            source,
            format,
            files,
            old,
            reference: BTreeMap::new(),
            parts: BTreeMap::new(),
        };
        assert_ne!(scene.old_digest.as_ref(), Some(&scene.new_digest));
        let target = spare.join("reference");
        scene.prepare(&target);
        scene.allow(&target);
        let plan = scene.order(&target, false).options();
        let plan = plan.plan(&scene.source(), &target).unwrap();
        plan.run(&Control::new()).unwrap();
        scene.allow(&target);
        scene.reference = common::snapshot(&target);
        fs::remove_dir_all(&target).unwrap();
        scene
    }

    fn allow(&mut self, target: &Path) {
        let has_index = |part: &PathBuf| has_index(&target.join(part));
        for part in parts(target).into_iter().filter(has_index) {
            let content = content(&target.join(&part));
            self.parts.entry(part).or_default().insert(content);
        }
    }

    fn prepare(&self, target: &Path) {
        if let Some(old) = &self.old {
            copy_directory(old, target);
        }
    }

    fn source(&self) -> CheckpointIndex {
        CheckpointIndex::open(&self.source).unwrap()
    }

    fn order(&self, target: &Path, resume: bool) -> Order {
        Order {
            source: self.source.clone(),
            target: target.to_owned(),
            format: self.format.to_string(),
            files: self.files,
            force: self.old.is_some(),
            resume,
        }
    }
}

fn has_index(directory: &Path) -> bool {
    let indexes = ["tensor_index.json", "model.safetensors.index.json"];
    indexes.iter().any(|name| directory.join(name).exists())
}

fn scenes(directory: &Path) -> Vec<Scene> {
    let place = |name: &str| directory.join(name);
    let [safetensors, store, partitioned] = common::FORMATS;
    common::write(&place("shards"), &records(1), safetensors, 2);
    common::write(&place("store"), &records(1), store, 2);
    common::write(&place("old-shards"), &records(500), safetensors, 5);
    common::write(&place("old-single"), &records(500), safetensors, 1);
    common::write(&place("old-store"), &records(500), store, 6);
    common::write_ranks(&place("ranks"), &rank_records(1), partitioned, 2);
    common::write_ranks(&place("old-ranks"), &rank_records(500), partitioned, 3);

    let scene = |name, source: &str, format, files, old: Option<&str>| {
        Scene::new(
            name,
            (place(source), format, files),
            old.map(place),
            directory,
        )
    };
    vec![
        scene("new shards", "store", safetensors, 3, None),
        scene("store over a store", "shards", store, 3, Some("old-store")),
        scene("new ranks", "ranks", partitioned, 2, None),
        scene(
            "shards over shards",
            "shards",
            safetensors,
            5,
            Some("old-shards"),
        ),
        scene(
            "ranks over ranks",
            "ranks",
            partitioned,
            2,
            Some("old-ranks"),
        ),
        scene(
            "file over a file",
            "shards",
            safetensors,
            1,
            Some("old-single"),
        ),
    ]
}

// --- Power loss ---------------------------------------------------------------------------------

/// Where a conversion was when the power failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Before,
    Writing,
    Committing,
    CleaningUp,
    Finished,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Before => "before the first file",
            Self::Writing => "while files were written",
            Self::Committing => "while files got their names",
            Self::CleaningUp => "while it cleaned up",
            Self::Finished => "after the end",
        })
    }
}

/// What the device held when the power failed.
struct Copy {
    image: PathBuf,
    phase: Phase,
    /// What the target held at that moment, with what was not on the device.
    live: BTreeMap<PathBuf, Vec<u8>>,
}

/// What is seen of a conversion from outside.
#[derive(PartialEq, Eq)]
struct Look {
    names: Vec<String>,
    journal_bytes: Option<u64>,
}

fn staging(target: &Path) -> PathBuf {
    target.join(".tensora-convert")
}

fn journal(target: &Path) -> PathBuf {
    staging(target).join(".journal")
}

fn is_marked(target: &Path) -> bool {
    target.join(UNFINISHED_NAME).exists()
}

impl Look {
    fn at(target: &Path) -> Self {
        Self {
            names: common::names(target),
            journal_bytes: fs::metadata(journal(target))
                .ok()
                .map(|journal| journal.len()),
        }
    }
}

/// Where a target is on its file system: below a directory that a conversion may have to make.
const TARGET: &str = "models/target";

/// Everything that is needed to let the power fail.
struct Bench<'a> {
    place: &'a Path,
    file_system: &'static FileSystem,
    scene: &'a Scene,
    tally: &'a mut Tally,
}

/// What happened.
#[derive(Default)]
struct Tally {
    copies: usize,
    phases: BTreeMap<(Phase, Phase), u64>,
    /// Copies that lacked something that was not synced.
    lossy: u64,
    damaged: u64,
}

impl Bench<'_> {
    fn context(&self) -> String {
        format!("{} on {}", self.scene.name, self.file_system.name)
    }

    fn mount(&self, image: &Path, name: &str) -> Mount {
        let mount = self.file_system.mount(image, &self.place.join(name));
        mount.unwrap_or_else(|error| panic!("{}: {error}", self.context()))
    }

    /// An image with the target as it is before a conversion.
    fn new_image(&self) -> PathBuf {
        let image = self.place.join("image");
        self.file_system.make(&image).unwrap();
        let mount = self.mount(&image, "prepared");
        self.scene.prepare(&mount.on.join(TARGET));
        image
    }

    /// Converts in an image, and copies what the device holds at some moments, the last right after the end.
    fn convert(&mut self, image: &Path, resume: bool, random: &mut Random) -> Vec<Copy> {
        let mount = self.mount(image, "running");
        let target = mount.on.join(TARGET);
        let mut copies: Vec<Copy> = Vec::new();
        let mut taken = [0; 2];
        let (mut was_staged, mut was_marked) = (false, false);
        let mut seen = Look::at(&target);
        // Nothing is to be seen while a file is written.
        let mut timer = Instant::now() + Duration::from_millis(random.below(150));
        let mut child = self.scene.order(&target, resume).start();
        let process = Pid::from_child(&child);
        while child.try_wait().unwrap().is_none() {
            was_staged |= staging(&target).exists();
            was_marked |= is_marked(&target);
            let now = Look::at(&target);
            let is_changed = now != seen;
            seen = now;
            let is_due = Instant::now() >= timer;
            // Files get their names within milliseconds.
            let (kind, rarity) = match was_marked {
                false => (0, 4),
                true => (1, 2),
            };
            if taken[kind] == MOST_COPIES[kind]
                || !(is_due || is_changed && random.below(rarity) == 0)
            {
                continue;
            }
            if is_due {
                timer += Duration::from_secs(3600);
            }
            // Further on than where it can be seen.
            let spun = Instant::now();
            let wait = Duration::from_nanos(random.below(400_000));
            while spun.elapsed() < wait {
                std::hint::spin_loop();
            }
            kill_process(process, Signal::STOP).unwrap();
            thread::sleep(Duration::from_micros(random.below(4000)));
            let (marked, staged) = (is_marked(&target), staging(&target).exists());
            was_marked |= marked;
            was_staged |= staged;
            let phase = match (marked, staged) {
                (true, _) => Phase::Committing,
                (false, true) if was_marked => Phase::CleaningUp,
                (false, true) => Phase::Writing,
                // With the last of it removed it is all but over.
                (false, false) if was_marked || was_staged => Phase::CleaningUp,
                (false, false) => Phase::Before,
            };
            copies.push(self.copy(&mount, image, phase));
            taken[kind] += 1;
            kill_process(process, Signal::CONT).unwrap();
            seen = Look::at(&target);
        }
        // Whoever was told that it is done must find it done.
        copies.push(self.copy(&mount, image, Phase::Finished));
        let output = child.wait_with_output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {errors}", self.context());
        copies
    }

    fn copy(&mut self, mount: &Mount, image: &Path, phase: Phase) -> Copy {
        self.tally.copies += 1;
        let copy = self.place.join(format!("copy-{}", self.tally.copies));
        copy_device(mount, image, &copy);
        Copy {
            image: copy,
            phase,
            live: common::snapshot(&mount.on.join(TARGET)),
        }
    }

    /// Checks what a copy holds, and finishes the conversion there.
    fn revive(&mut self, copy: &Copy, random: &mut Random) {
        let context = format!("{}, power lost {}", self.context(), copy.phase);
        if let Some(repair) = self.file_system.repair {
            run_tool(repair, &[&copy.image]).unwrap();
        }
        let mount = self.mount(&copy.image, "revived");
        let target = mount.on.join(TARGET);
        let found = self.check(&target, &context);
        eprintln!("{context}: found as {found}");
        *self.tally.phases.entry((copy.phase, found)).or_default() += 1;
        self.tally.lossy += u64::from(common::snapshot(&target) != copy.live);
        if copy.phase == Phase::Finished {
            assert_eq!(
                found,
                Phase::Finished,
                "{context}: what was reported as done is not: {:?}",
                common::names(&target)
            );
        }
        self.resume(&target, found, &context, random);
        let files = common::snapshot(&target);
        assert!(
            files == self.scene.reference,
            "{context}: {:?} instead of {:?}",
            common::names(&target),
            self.scene.reference.keys()
        );
    }

    /// Whether the target holds what it may, and so where the conversion was as far as the device knows.
    fn check(&self, target: &Path, context: &str) -> Phase {
        let scene = self.scene;
        let found = opened(target);
        let is_new = found.as_ref() == Some(&scene.new_digest);
        assert!(
            found.is_none() || is_new || found == scene.old_digest,
            "{context}: opens, and is neither the old nor the new checkpoint"
        );
        let (marked, staged) = (is_marked(target), staging(target).exists());
        assert!(
            found.is_none() || !marked,
            "{context}: opens despite its marker"
        );
        assert!(
            marked || found.is_some() || scene.old.is_none(),
            "{context}: the old checkpoint is gone without need"
        );
        if self.file_system.is_ordered {
            // Readers that know nothing of markers start from the index.
            for part in parts(target) {
                if has_index(&target.join(&part)) {
                    assert!(
                        scene.parts[&part].contains(&content(&target.join(&part))),
                        "{context}: an index stands beside files that it is not the index of"
                    );
                }
            }
        }
        match (marked, is_new, staged) {
            (true, ..) => Phase::Committing,
            (false, true, true) => Phase::CleaningUp,
            (false, true, false) => Phase::Finished,
            (false, false, true) => Phase::Writing,
            (false, false, false) => Phase::Before,
        }
    }

    fn resume(&mut self, target: &Path, found: Phase, context: &str, random: &mut Random) {
        if found == Phase::Finished {
            return;
        }
        let damaged = match found < Phase::CleaningUp && random.below(4) == 0 {
            true => damage(target, random),
            false => None,
        };
        let options = self.scene.order(target, true).options();
        let plan = match options.plan(&self.scene.source(), target) {
            Err(Error::TargetOccupied { .. }) if found == Phase::CleaningUp => {
                // All is done but for removing files of no use.
                fs::remove_dir_all(staging(target)).unwrap();
                return;
            }
            plan => plan.unwrap_or_else(|error| panic!("{context}: {error}")),
        };
        let kept = plan.kept().unwrap();
        let report = plan.run(&Control::new());
        let report = report.unwrap_or_else(|error| panic!("{context}: {error}"));
        let again: Vec<&String> = report
            .notes
            .iter()
            .filter_map(|note| match note {
                ConversionNote::WrittenAgain { file } => Some(file),
                _ => None,
            })
            .collect();
        assert_eq!(
            again,
            damaged.iter().collect::<Vec<_>>(),
            "{context}: whether files have lost data that the journal calls safe"
        );
        assert_eq!(report.resumed_files, kept.files - again.len(), "{context}");
        self.tally.damaged += u64::from(damaged.is_some());
        let done = opened(target);
        assert_eq!(
            done.as_ref(),
            Some(&self.scene.new_digest),
            "{context}: resumed"
        );
    }
}

/// The content of a target that opens as a checkpoint.
fn opened(target: &Path) -> Option<String> {
    CheckpointIndex::open(target).ok().map(|_| content(target))
}

/// Loses some bytes of a file that the journal calls safe, as a device does that lies about it. Returns the file's
/// name, if there is one.
fn damage(target: &Path, random: &mut Random) -> Option<String> {
    let text = fs::read_to_string(journal(target)).ok()?;
    let files: Vec<String> = text
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter_map(|event| Some(event.get("file")?.as_str()?.to_owned()))
        .collect();
    let count = u64::try_from(files.len()).unwrap();
    let name = files.get(usize::try_from(random.below(count)).unwrap())?;
    let staged = staging(target).join(name);
    let path = match staged.is_file() {
        true => staged,
        // It has its name already.
        false => target.join(name),
    };
    let file = File::options().write(true).open(path).unwrap();
    let last = file.metadata().unwrap().len() - 64;
    file.write_all_at(&[0; 64], random.below(last)).unwrap();
    Some(name.clone())
}

fn from_environment(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(
        value
            .parse()
            .unwrap_or_else(|_| panic!("{name}={value} is no number")),
    )
}

#[test]
fn power_lost_anywhere_leaves_nothing_wrong_and_can_be_finished() {
    if let Some(place) = std::env::var_os(PLACE) {
        return lose_power(Path::new(&place));
    }
    let directory = tempfile::tempdir().unwrap();
    let in_namespace = |command: &[&str]| {
        Command::new("unshare")
            .args(["--mount", "--propagation", "private"])
            .args(["--pid", "--fork", "--kill-child", "--mount-proc"])
            .args([
                "sh",
                "-c",
                "mount -t tmpfs tmpfs \"$1\" && shift && exec \"$@\"",
                "sh",
            ])
            .arg(directory.path())
            .args(command)
            .env(PLACE, directory.path())
            .output()
    };
    let name = "power_lost_anywhere_leaves_nothing_wrong_and_can_be_finished";
    let refused = match in_namespace(&["true"]) {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(error) => Some(format!("unshare: {error}")),
    };
    if let Some(reason) = refused {
        return common::skip(&format!("{name}: no mounts of its own: {reason}"));
    }
    let program = std::env::current_exe().unwrap();
    let output =
        in_namespace(&[program.to_str().unwrap(), name, "--exact", "--nocapture"]).unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    eprint!("{said}");
    assert!(output.status.success(), "{}", output.status);
}

/// Lets the power fail on every file system that can be had, with everything in `place`.
fn lose_power(place: &Path) {
    let begun = Instant::now();
    let only = std::env::var("TENSORA_POWER_FILE_SYSTEM").ok();
    let file_systems: Vec<&'static FileSystem> = FILE_SYSTEMS
        .iter()
        .filter(|file_system| only.as_ref().is_none_or(|only| only == file_system.name))
        .filter(|file_system| match file_system.missing(place) {
            Some(reason) => {
                common::skip(&format!("power loss on {}: {reason}", file_system.name));
                false
            }
            None => true,
        })
        .collect();
    if file_systems.is_empty() {
        return;
    }
    let seed = from_environment("TENSORA_POWER_SEED").unwrap_or_else(|| {
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap();
        u64::from(now.subsec_nanos())
    });
    let runs = from_environment("TENSORA_POWER_RUNS").unwrap_or(RUNS);
    eprintln!("TENSORA_POWER_SEED={seed}");
    let mut random = Random(seed);
    let scenes = scenes(place);
    let mut tally = Tally::default();
    for run in 0..usize::try_from(runs).unwrap() {
        // Every scene on every file system, as far as the runs go.
        let mut bench = Bench {
            place,
            file_system: file_systems[run % file_systems.len()],
            scene: &scenes[(run + run / scenes.len()) % scenes.len()],
            tally: &mut tally,
        };
        let image = bench.new_image();
        let mut copies = bench.convert(&image, false, &mut random);
        // In some it fails again while the conversion goes on.
        let open = |copy: &&Copy| matches!(copy.phase, Phase::Writing | Phase::Committing);
        if random.below(3) == 0
            && let Some(copy) = copies.iter().rfind(open)
        {
            copy_sparse(&copy.image, &image);
            if let Some(repair) = bench.file_system.repair {
                run_tool(repair, &[&image]).unwrap();
            }
            copies.extend(bench.convert(&image, true, &mut random));
        }
        for copy in copies {
            bench.revive(&copy, &mut random);
            fs::remove_file(&copy.image).unwrap();
        }
    }
    let copies = tally.copies;
    for ((lost, found), count) in &tally.phases {
        eprintln!("{count:3} of {copies} lost {lost}, found as {found}");
    }
    eprintln!(
        "{copies} copies, {} of them without something that was not synced, {} damaged further, in {:.1?}",
        tally.lossy,
        tally.damaged,
        begun.elapsed()
    );
    if runs >= RUNS {
        for phase in [Phase::Writing, Phase::Committing, Phase::Finished] {
            let hit = tally.phases.keys().any(|(lost, _)| *lost == phase);
            assert!(hit, "with seed {seed} no power was lost {phase}");
        }
        assert!(tally.lossy > 0, "a power loss that loses nothing is none");
        assert!(
            tally.damaged > 0,
            "no file that was finished could be damaged"
        );
    }
}
