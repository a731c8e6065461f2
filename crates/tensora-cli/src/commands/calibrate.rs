use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;
use tensora::heuristics::{self, MappingConsent, Policy};
use tensora::io::{
    CacheState, Control, DirectPolicy, Measurement, Profile, ProfileFact, ProfileIdentity,
    ProfileStore, SourceFile,
};
use tensora::{BackendChoice, BackendKind, Loader, MemoryChoice, MemoryKind, Plan, ProfileChoice};
use tensora_measure::{CalibrateOptions, CalibrateProgress, Calibration, ReadSetting};

use crate::args::CalibrateArgs;
use crate::mapping::{allow_mapping, permit};
use crate::output::{Console, Report, emit, printable};
use crate::progress::Activity;
use crate::table::{Column, Facts, Table};
use crate::units::{count, duration, rate, size};

/// What a calibration found, and what comes of it.
#[derive(Serialize)]
struct CalibrationResult {
    /// Where the profile is kept; nothing after a dry run.
    path: Option<String>,
    dry_run: bool,
    elapsed_seconds: f64,
    /// Bytes that were read each time.
    sample_bytes: u64,
    /// How many reads were timed.
    timed: u32,
    profile: Profile,
    /// What was not measured, and why.
    notes: Vec<String>,
    plans: Vec<Change>,
}

/// What the planner does with this checkpoint without the profile, and with it.
#[derive(Serialize)]
struct Change {
    cache: CacheState,
    mapping: MappingConsent,
    before: Option<Strategy>,
    after: Option<Strategy>,
}

/// A plan in short.
#[derive(PartialEq, Eq, Serialize)]
struct Strategy {
    backend: BackendKind,
    memory: MemoryKind,
    direct: bool,
    chunk_bytes: u64,
    queue_depth: u32,
    workers: u32,
}

pub(crate) fn calibrate(arguments: &CalibrateArgs, console: &Console) -> Result<()> {
    let store = if arguments.dry_run {
        None
    } else {
        Some(writable_store()?)
    };
    let loader = Loader::new()
        .open_options(arguments.open.options())
        .profiles(ProfileChoice::Ignore);
    let checkpoint = allow_mapping(loader, MemoryChoice::Auto).open(&arguments.path)?;
    let files = checkpoint
        .index()
        .files()
        .iter()
        .map(|file| SourceFile::open(&file.path))
        .collect::<Result<Vec<_>, _>>()
        .map_err(tensora::Error::from)?;

    let mut options = CalibrateOptions::default();
    options.budget = Duration::from_secs(arguments.budget.into());
    options.mapping = Some(permit());
    // What is larger than memory can be calibrated with, but not planned for.
    let plan = checkpoint.plan().ok();
    options.always = plan.as_ref().map_or_else(Vec::new, constants);
    let activity = Activity::new(console.progress);
    let calibration =
        tensora_measure::calibrate(&files, &options, &Control::new(), &mut |progress| {
            activity.show(described(progress), progress.elapsed, progress.budget);
        })?;
    drop(activity);

    let path = store
        .map(|store| store.save(&calibration.profile))
        .transpose()
        .map_err(tensora::Error::from)?;
    let plans = plan.map_or_else(Vec::new, |plan| changes(&plan, &calibration.profile));
    emit(
        &CalibrationResult::new(calibration, path.as_deref(), plans),
        console,
    )
}

/// The user's store, of which it is known before a minute of measuring that it can be written to.
fn writable_store() -> Result<ProfileStore> {
    const REMEDY: &str = "`--dry-run` measures without keeping anything";
    let store = ProfileStore::user().with_context(|| {
        format!("there is no place for profiles: set HOME or XDG_CACHE_HOME to an absolute path, or {REMEDY}")
    })?;
    let folder = store.folder();
    let trial = folder.join(format!(".{}.trial", std::process::id()));
    fs::create_dir_all(folder)
        .and_then(|()| OpenOptions::new().write(true).create_new(true).open(&trial))
        .and_then(|_| fs::remove_file(&trial))
        .with_context(|| {
            format!(
                "profiles cannot be kept in {}: make it writable, set XDG_CACHE_HOME to another folder, or {REMEDY}",
                folder.display()
            )
        })?;
    Ok(store)
}

fn described(progress: &CalibrateProgress) -> String {
    let ReadSetting {
        cache,
        memory,
        backend,
        params,
    } = progress.setting;
    let chunk = size(params.chunk_bytes);
    let workers = count(params.workers.into(), "worker");
    format!("{cache}, {memory}: {backend} with {workers}, chunks of {chunk}")
}

const STATES: [CacheState; 3] = [CacheState::Cold, CacheState::Half, CacheState::Warm];

/// The plan for the same load in another state, with another profile and another policy; nothing where it is
/// refused. A plan follows from facts alone, so no state has to be made for it.
fn replanned(
    plan: &Plan,
    cache: CacheState,
    profile: ProfileFact,
    policy: &Policy,
) -> Option<Plan> {
    let mut platform = plan.platform.clone();
    platform.profile = profile;
    if let Some(storage) = &mut platform.storage {
        storage.resident_bytes = Some(match cache {
            CacheState::Cold => 0,
            CacheState::Half => storage.file_bytes / 2,
            CacheState::Warm => storage.file_bytes,
        });
        storage.resident_is_estimate = false;
    }
    heuristics::plan(&plan.workload, &platform, policy).ok()
}

/// What the planner does without a profile, whichever backend it is told to use: a profile says something
/// about that only if it was measured too.
fn constants(plan: &Plan) -> Vec<ReadSetting> {
    let named = BackendKind::ALL.map(BackendChoice::Named);
    let mut settings = Vec::new();
    for cache in STATES {
        for mapping in [MappingConsent::Granted, MappingConsent::Denied] {
            for backend in [BackendChoice::Auto].into_iter().chain(named) {
                let mut policy = Policy::default();
                policy.mapping = mapping;
                policy.backend = backend;
                let Some(plan) = replanned(plan, cache, ProfileFact::NotSought, &policy) else {
                    continue;
                };
                let setting = ReadSetting {
                    cache,
                    memory: plan.memory,
                    backend: plan.backend,
                    params: plan.params,
                };
                if !settings.contains(&setting) {
                    settings.push(setting);
                }
            }
        }
    }
    settings
}

/// The plans for this load in each state and with each consent, without and with the profile.
fn changes(plan: &Plan, profile: &Profile) -> Vec<Change> {
    let mut changes = Vec::new();
    for cache in STATES {
        for mapping in [MappingConsent::Granted, MappingConsent::Denied] {
            let mut policy = Policy::default();
            policy.mapping = mapping;
            let strategy = |profile| {
                let plan = replanned(plan, cache, profile, &policy)?;
                Some(Strategy::of(&plan))
            };
            changes.push(Change {
                cache,
                mapping,
                before: strategy(ProfileFact::NotSought),
                after: strategy(ProfileFact::Matching(Box::new(profile.clone()))),
            });
        }
    }
    changes
}

impl Strategy {
    fn of(plan: &Plan) -> Self {
        Self {
            backend: plan.backend,
            memory: plan.memory,
            direct: plan.reads_direct(),
            chunk_bytes: plan.params.chunk_bytes,
            queue_depth: plan.params.queue_depth,
            workers: plan.params.workers,
        }
    }

    /// `io-uring, owned: 2 of depth 16, chunks of 1.00 MiB, direct`.
    fn text(&self) -> String {
        let depth = match self.backend {
            BackendKind::IoUring => format!(" of depth {}", self.queue_depth),
            _ => String::new(),
        };
        format!(
            "{}, {}: {}{depth}, chunks of {}{}",
            self.backend,
            self.memory,
            count(self.workers.into(), "worker"),
            size(self.chunk_bytes),
            if self.direct { ", direct" } else { "" }
        )
    }
}

impl CalibrationResult {
    fn new(calibration: Calibration, path: Option<&Path>, plans: Vec<Change>) -> Self {
        Self {
            path: path.map(|path| path.display().to_string()),
            dry_run: path.is_none(),
            elapsed_seconds: calibration.elapsed.as_secs_f64(),
            sample_bytes: calibration.sample_bytes,
            timed: calibration.timed,
            profile: calibration.profile,
            notes: calibration.notes,
            plans,
        }
    }

    /// The best of each way of reading in each state; measurements are sorted by time.
    fn best(&self) -> impl Iterator<Item = &Measurement> {
        let mut seen = BTreeSet::new();
        self.profile.measurements.iter().filter(move |measurement| {
            seen.insert((
                measurement.cache.as_str(),
                measurement.memory.as_str(),
                measurement.backend,
                is_direct(measurement),
            ))
        })
    }
}

fn is_direct(measurement: &Measurement) -> bool {
    measurement.params.direct != DirectPolicy::Never
}

/// `ext4 on nvme0n1`.
fn place(identity: &ProfileIdentity) -> String {
    match &identity.device {
        Some(device) => format!("{} on {device}", identity.file_system),
        None => identity.file_system.clone(),
    }
}

impl Report for CalibrationResult {
    #[allow(clippy::cast_precision_loss)]
    fn text(&self) -> String {
        let mut facts = Facts::new();
        facts
            .add("place", printable(&place(&self.profile.identity)))
            .add(
                "timed",
                format!(
                    "{} of {} each, in {}",
                    count(self.timed.into(), "read"),
                    size(self.sample_bytes),
                    duration(self.elapsed_seconds)
                ),
            );
        match &self.path {
            Some(path) => facts.add("profile", printable(path)),
            None => facts.add("dry run", "no profile was kept"),
        };
        facts.add_each("note", self.notes.iter().map(|note| printable(note)));

        let mut table = Table::new(&[
            ("cache", Column::Word),
            ("memory", Column::Word),
            ("backend", Column::Word),
            ("reads", Column::Word),
            ("workers", Column::Number),
            ("depth", Column::Number),
            ("chunk", Column::Number),
            ("rounds", Column::Number),
            ("median", Column::Number),
            ("speed", Column::Number),
        ]);
        table.dispense_with(&["rounds", "median"]);
        for measurement in self.best() {
            let params = &measurement.params;
            table.row([
                measurement.cache.to_string(),
                measurement.memory.to_string(),
                measurement.backend.to_string(),
                if is_direct(measurement) {
                    "direct"
                } else {
                    "buffered"
                }
                .to_owned(),
                params.workers.to_string(),
                params.queue_depth.to_string(),
                size(params.chunk_bytes),
                measurement.elapsed_us.len().to_string(),
                duration(measurement.median_us() as f64 / 1e6),
                rate(measurement.bytes_per_second() as f64),
            ]);
        }
        let mut text = format!("{}\n{}", facts.text(), table.text());
        if !self.plans.is_empty() {
            let mut table = Table::new(&[
                ("cache", Column::Word),
                ("--memory", Column::Word),
                ("planned without the profile", Column::Text),
                ("with it", Column::Text),
            ]);
            for change in &self.plans {
                let show = |strategy: &Option<Strategy>| {
                    strategy
                        .as_ref()
                        .map_or_else(|| "does not fit".to_owned(), Strategy::text)
                };
                let memory = match change.mapping {
                    MappingConsent::Granted => "auto",
                    MappingConsent::Denied => "owned",
                };
                let after = if change.before == change.after {
                    "the same".to_owned()
                } else {
                    show(&change.after)
                };
                table.row([
                    change.cache.to_string(),
                    memory.to_owned(),
                    show(&change.before),
                    after,
                ]);
            }
            text.push('\n');
            text.push_str(&table.text());
        }
        text
    }
}
