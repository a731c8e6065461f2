//! A conversion that is killed leaves what was there, nothing, something that is refused, or all of the new
//! checkpoint; and it can always be finished.
//!
//! Each conversion is a process of its own: this program once more, as the test `converter`. It is made slow
//! enough to be killed anywhere, and a part of the kills waits for the moment in which files get their
//! names.
//!
//! `TENSORA_KILL_SEED` repeats the moments of a run, as far as clocks can; `TENSORA_KILLS` says how many there
//! are, and `TENSORA_KILL_SCENE` which kind of conversion alone is killed.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use common::{Random, Record, Tensor, Tensors, digest};
use serde::{Deserialize, Serialize};
use tensora_convert::{ConvertOptions, Error, Overwrite, Reading, SharedTensors, Unfinished};
use tensora_formats::{CheckpointIndex, Dtype, Format, UNFINISHED_NAME};
use tensora_io::{
    Backend, BackendKind, Control, DirectPolicy, ReadRequest, ReadStats, ResidentPolicy, Result,
    TransferParams, backend,
};

const ORDER: &str = "TENSORA_TEST_CONVERTER";
/// How long each read waits.
const DELAY: Duration = Duration::from_millis(4);

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

    /// As a process that can be killed.
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

/// Not a test of its own: what a process does that the others start, and kill.
#[test]
#[ignore = "the process that the other tests kill"]
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
    let options = order
        .options()
        .reading(Reading::new(Arc::new(slow), 1, transfer));
    options
        .plan(&source, &order.target)
        .unwrap()
        .run(&Control::new())
        .unwrap();
}

/// Where a conversion was when it was killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Before,
    WritingFirstFile,
    WritingMoreFiles,
    Committing,
    CleaningUp,
    Finished,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Before => "before the first byte",
            Self::WritingFirstFile => "while the first file was written",
            Self::WritingMoreFiles => "while further files were written",
            Self::Committing => "while files got their names",
            Self::CleaningUp => "while it cleaned up",
            Self::Finished => "after the end",
        })
    }
}

/// One kind of conversion, to be killed again and again.
struct Scene {
    name: &'static str,
    order: Order,
    /// What the target holds before, where it holds something.
    old: Option<PathBuf>,
    old_digest: Option<String>,
    new_digest: String,
    /// What an undisturbed conversion leaves.
    reference: BTreeMap<PathBuf, Vec<u8>>,
    /// How long that takes, and how long of that files get their names.
    takes: Duration,
    commits: Duration,
}

fn records(seed: u64) -> Vec<Record> {
    (0..7)
        .map(|number| {
            // As long in the old checkpoint as in the new one: only their content tells them apart.
            let rows = 100 + 37 * number;
            let name = format!("model.layers.{number}.weight");
            Record::plain(&name, Dtype::BF16, &[rows, 733], seed + number)
        })
        .chain([
            Record::plain("bias", Dtype::F32, &[1001], seed + 100),
            Record::plain("scale", Dtype::F32, &[], seed + 101),
        ])
        .collect()
}

fn rank_records(seed: u64, ranks: u64) -> Vec<Vec<Record>> {
    let part = |rank| records(seed + 1000 * rank).into_iter().take(3).collect();
    (0..ranks).map(part).collect()
}

/// What a checkpoint holds by Tensora's index; `None` where it refuses to open.
fn opened(target: &Path) -> Option<Tensors> {
    let index = CheckpointIndex::open(target).ok()?;
    let files: Vec<Vec<u8>> = index
        .files()
        .iter()
        .map(|file| fs::read(&file.path).unwrap())
        .collect();
    let tensors = index.tensors().iter().map(|entry| {
        let range = entry.range();
        let bytes = &files[entry.file]
            [usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()];
        assert!(entry.is_contiguous(), "{}", entry.name);
        let tensor = Tensor {
            dtype: entry.dtype,
            shape: entry.shape.clone(),
            data: bytes.to_vec(),
        };
        (entry.name.clone(), tensor)
    });
    Some(tensors.collect())
}

fn copy_directory(from: &Path, to: &Path) {
    for (name, bytes) in common::snapshot(from) {
        let path = to.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

fn staging(target: &Path) -> PathBuf {
    target.join(".tensora-convert")
}

fn is_marked(target: &Path) -> bool {
    target.join(UNFINISHED_NAME).exists()
}

impl Scene {
    fn new(name: &'static str, order: Order, old: Option<PathBuf>) -> Self {
        let new_digest = digest(&common::read(&order.source).tensors);
        let old_digest = old.as_ref().map(|old| digest(&common::read(old).tensors));
        assert_ne!(old_digest.as_ref(), Some(&new_digest));
        let mut scene = Self {
            name,
            order,
            old,
            old_digest,
            new_digest,
            reference: BTreeMap::new(),
            takes: Duration::ZERO,
            commits: Duration::ZERO,
        };
        scene.reset();
        let begun = Instant::now();
        let mut child = scene.order.start();
        let mut marked: Option<(Duration, Duration)> = None;
        while child.try_wait().unwrap().is_none() {
            if is_marked(&scene.order.target) {
                let now = begun.elapsed();
                marked = Some((marked.map_or(now, |(first, _)| first), now));
            }
        }
        scene.takes = begun.elapsed();
        scene.succeeded(child);
        // It may be over between two looks.
        scene.commits = marked.map_or(Duration::from_millis(1), |(first, last)| last - first);
        assert_eq!(scene.check(), Phase::Finished);
        scene.reference = common::snapshot(&scene.order.target);
        scene
    }

    /// The target as it is before the conversion.
    fn reset(&self) {
        let _ = fs::remove_dir_all(&self.order.target);
        if let Some(old) = &self.old {
            copy_directory(old, &self.order.target);
        }
    }

    fn succeeded(&self, child: Child) {
        let output = child.wait_with_output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {errors}", self.name);
    }

    /// Starts a converter and kills it, unless it is over before.
    fn kill(&self, order: &Order, random: &mut Random) {
        let nanos = |duration: Duration| u64::try_from(duration.as_nanos()).unwrap();
        let in_commit = random.below(5) < 2;
        let begun = Instant::now();
        let mut child = order.start();
        let moment = if in_commit {
            while !is_marked(&order.target) && child.try_wait().unwrap().is_none() {
                thread::yield_now();
            }
            let after = random.below(nanos(self.commits + self.commits / 5));
            begun.elapsed() + Duration::from_nanos(after)
        } else {
            Duration::from_nanos(random.below(nanos(self.takes)))
        };
        // A sleep would be too coarse for the short phases.
        let left = moment.saturating_sub(begun.elapsed());
        thread::sleep(left.saturating_sub(Duration::from_millis(1)));
        while begun.elapsed() < moment {
            std::hint::spin_loop();
        }
        let was_over = child.try_wait().unwrap().is_some();
        child.kill().unwrap();
        if was_over {
            self.succeeded(child);
        } else {
            child.wait().unwrap();
        }
    }

    /// Whether the target holds what it may, and so where the conversion was.
    fn check(&self) -> Phase {
        let target = &self.order.target;
        let found = opened(target).as_ref().map(digest);
        let is_new = found.as_ref() == Some(&self.new_digest);
        let is_old = found.is_some() && found == self.old_digest;
        assert!(
            found.is_none() || is_new || is_old,
            "{}: opens, and is neither the old nor the new checkpoint",
            self.name
        );
        let (marked, staged) = (is_marked(target), staging(target).exists());
        assert!(
            found.is_none() || !marked,
            "{}: opens despite its marker",
            self.name
        );
        if self.old.is_some() && !marked {
            assert!(
                found.is_some(),
                "{}: the old checkpoint is gone without need",
                self.name
            );
        }
        self.check_strangers();
        if marked {
            return Phase::Committing;
        }
        match (is_new, staged) {
            (true, true) => Phase::CleaningUp,
            (true, false) => Phase::Finished,
            (false, false) => Phase::Before,
            (false, true) => {
                let staged = fs::read_dir(staging(target)).unwrap().count();
                let plan = self.resumed().plan(&self.source(), target);
                match plan.unwrap().kept().unwrap().files {
                    // A journal that cannot be read yet, or says that nothing is finished.
                    0 => Phase::WritingFirstFile,
                    files => {
                        assert!(staged > files.min(1), "finished files are there");
                        Phase::WritingMoreFiles
                    }
                }
            }
        }
    }

    /// A reader that knows nothing of markers and starts from the index finds the old checkpoint or the new one, or
    /// no index.
    fn check_strangers(&self) {
        let target = &self.order.target;
        let indexes = ["tensor_index.json", "model.safetensors.index.json"];
        if indexes.iter().any(|name| target.join(name).exists()) {
            let found = Some(digest(&common::read(target).tensors));
            assert!(
                found.as_ref() == Some(&self.new_digest) || found == self.old_digest,
                "{}: an index stands beside files that it is not the index of",
                self.name
            );
        }
    }

    fn source(&self) -> CheckpointIndex {
        CheckpointIndex::open(&self.order.source).unwrap()
    }

    fn resumed(&self) -> ConvertOptions {
        self.order.options().unfinished(Unfinished::Resume)
    }

    /// Finishes what was killed in this phase.
    fn resume(&self, phase: Phase) {
        let target = &self.order.target;
        if phase != Phase::Finished {
            let plan = match self.resumed().plan(&self.source(), target) {
                Err(Error::TargetOccupied { .. }) if phase == Phase::CleaningUp => {
                    // All is done but for removing a directory that is empty by now.
                    fs::remove_dir(staging(target)).unwrap();
                    assert_eq!(self.check(), Phase::Finished, "{}", self.name);
                    return;
                }
                plan => plan.unwrap(),
            };
            let kept = plan.kept().unwrap();
            let report = plan.run(&Control::new()).unwrap();
            if phase < Phase::Committing {
                assert_eq!(report.resumed_files, kept.files, "{}, {phase}", self.name);
                assert_eq!(report.resumed_bytes, kept.bytes, "{}, {phase}", self.name);
            }
        }
        assert_eq!(self.check(), Phase::Finished, "{}, {phase}", self.name);
        assert!(
            common::snapshot(target) == self.reference,
            "{}, {phase}: {:?} instead of {:?}",
            self.name,
            common::names(target),
            self.reference.keys()
        );
    }
}

/// Sources and old checkpoints in `directory`, and every kind of conversion among them.
fn scenes(directory: &Path) -> Vec<Scene> {
    let place = |name: &str| directory.join(name);
    let formats = [
        (Format::Safetensors, "safetensors"),
        (Format::ServerlessLlmStore, "store"),
        (Format::ServerlessLlmPartitioned, "partitioned"),
    ];
    for (format, name) in formats {
        common::write(&place(name), &records(1), format, 2);
        common::write(&place(&format!("old-{name}")), &records(500), format, 5);
    }
    common::write(&place("old-single"), &records(500), Format::Safetensors, 1);
    let ranks = Format::ServerlessLlmPartitioned;
    common::write_ranks(&place("ranks"), &rank_records(1, 2), ranks, 2);
    common::write_ranks(&place("old-ranks"), &rank_records(500, 3), ranks, 3);

    let scene = |name, source: &str, format: Format, files, old: Option<&str>| {
        let order = Order {
            source: place(source),
            target: place("target"),
            format: format.to_string(),
            files,
            force: old.is_some(),
            resume: false,
        };
        Scene::new(name, order, old.map(place))
    };
    let [safetensors, store, partitioned] = formats.map(|(format, _)| format);
    vec![
        scene("new shards", "safetensors", safetensors, 4, None),
        scene("new store", "safetensors", store, 4, None),
        scene("new partitions", "store", partitioned, 4, None),
        scene("new ranks", "ranks", store, 3, None),
        scene(
            "shards of shards",
            "safetensors",
            safetensors,
            3,
            Some("old-safetensors"),
        ),
        scene(
            "as many shards",
            "partitioned",
            safetensors,
            5,
            Some("old-safetensors"),
        ),
        scene(
            "shards of a file",
            "store",
            safetensors,
            3,
            Some("old-single"),
        ),
        scene(
            "a file of shards",
            "safetensors",
            safetensors,
            1,
            Some("old-safetensors"),
        ),
        scene(
            "a file of a file",
            "safetensors",
            safetensors,
            1,
            Some("old-single"),
        ),
        scene("store", "safetensors", store, 3, Some("old-store")),
        scene(
            "store of partitions",
            "safetensors",
            store,
            6,
            Some("old-partitioned"),
        ),
        scene(
            "partitions",
            "store",
            partitioned,
            5,
            Some("old-partitioned"),
        ),
        scene("fewer ranks", "ranks", partitioned, 2, Some("old-ranks")),
        scene("ranks of a store", "ranks", store, 2, Some("old-ranks")),
    ]
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
fn killed_anywhere_it_leaves_nothing_wrong_and_can_be_finished() {
    let seed = from_environment("TENSORA_KILL_SEED").unwrap_or_else(|| {
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap();
        u64::from(now.subsec_nanos())
    });
    let kills = from_environment("TENSORA_KILLS").unwrap_or(50);
    eprintln!("TENSORA_KILL_SEED={seed}");
    let mut random = Random(seed);
    let directory = tempfile::tempdir().unwrap();
    let mut scenes = scenes(directory.path());
    if let Ok(name) = std::env::var("TENSORA_KILL_SCENE") {
        scenes.retain(|scene| scene.name == name);
        assert!(!scenes.is_empty(), "no scene is called {name:?}");
    }
    let mut phases: BTreeMap<Phase, u64> = BTreeMap::new();
    let mut killed = 0;
    while killed < kills {
        // Each in turn, so that none is left out.
        let scene = &scenes[usize::try_from(killed).unwrap() % scenes.len()];
        scene.reset();
        let mut order = scene.order.clone();
        let phase = loop {
            eprint!("{}: ", scene.name);
            scene.kill(&order, &mut random);
            killed += 1;
            let phase = scene.check();
            eprintln!("killed {phase}");
            *phases.entry(phase).or_default() += 1;
            // Some are killed again while they go on.
            if phase >= Phase::CleaningUp || random.below(4) > 0 {
                break phase;
            }
            order.resume = true;
        };
        scene.resume(phase);
    }
    for (phase, count) in &phases {
        eprintln!("{count:3} of {killed} killed {phase}");
    }
    if kills >= 50 {
        let writing = [Phase::WritingFirstFile, Phase::WritingMoreFiles];
        for phases_of in [&writing[..], &[Phase::Committing]] {
            let hits: u64 = phases_of.iter().filter_map(|phase| phases.get(phase)).sum();
            assert!(hits > 0, "no kill of seed {seed} landed {}", phases_of[0]);
        }
    }
}
