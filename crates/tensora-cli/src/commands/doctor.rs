use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use comfy_table::Color;
use serde::Serialize;
use tensora::heuristics::PlanError;
use tensora::io::{
    Availability, DirectSupport, FileSystemClass, HugePages, MemoryFacts, MemorySource, Platform,
    ProfileFact, SourceFile, StorageFacts,
};
use tensora::{BackendKind, CheckpointIndex, Format, Loader, MemoryChoice, Plan};

use crate::args::DoctorArgs;
use crate::failure;
use crate::mapping::allow_mapping;
use crate::output::{Console, Report, emit, printable};
use crate::table::Verdicts;
use crate::units::{count, grouped, share, size, size_exactly};

/// A limit on open files below this is called out even without a checkpoint: models of several
/// hundred shards exist, and each may be opened twice, buffered and direct.
const FEW_OPEN_FILES: u64 = 1024;
/// Descriptors for everything that is no shard: rings, runtimes, standard streams.
const SPARE_OPEN_FILES: u64 = 64;

/// What this machine can do, and what stands in the way.
#[derive(Serialize)]
struct Examination {
    os: String,
    kernel: Option<String>,
    cpus: u32,
    page_bytes: u64,
    huge_pages: HugePages,
    memory: MemoryFacts,
    memlock_bytes: Option<u64>,
    open_files: Option<u64>,
    backends: Vec<BackendLine>,
    checkpoint: Option<CheckpointLine>,
    storage: Option<StorageLine>,
    findings: Vec<Finding>,
}

#[derive(Serialize)]
struct BackendLine {
    kind: BackendKind,
    status: &'static str,
    reason: Option<String>,
    remedy: Option<String>,
}

#[derive(Serialize)]
struct CheckpointLine {
    path: String,
    format: Format,
    file_count: usize,
    tensor_count: usize,
    data_bytes: u64,
}

#[derive(Serialize)]
struct StorageLine {
    #[serde(flatten)]
    facts: StorageFacts,
    /// Of the files' bytes, 0 to 1; nothing where the system does not tell.
    resident_share: Option<f64>,
}

/// One thing that was examined.
#[derive(Serialize)]
struct Finding {
    item: String,
    verdict: Verdict,
    finding: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Verdict {
    /// As it should be.
    Ok,
    /// Worth knowing; loads work, perhaps slower.
    Note,
    /// Something does not work.
    Problem,
}

/// Also where a checkpoint cannot be read, the machine is described: that is when it is asked for. The
/// exit status then says that there was a failure.
pub(crate) fn doctor(arguments: &DoctorArgs, console: &Console) -> Result<ExitCode> {
    let mut examination = Examination::of_machine(Platform::probe());
    let mut status = ExitCode::SUCCESS;
    if let Some(path) = &arguments.path
        && let Err(error) = examination.add_checkpoint_at(path, arguments)
    {
        examination.findings.push(unreadable(&error.into()));
        status = ExitCode::FAILURE;
    }
    emit(&examination, console)?;
    Ok(status)
}

impl Examination {
    fn of_machine(platform: Platform) -> Self {
        let mut findings: Vec<_> = platform
            .backends
            .iter()
            .map(|fact| backend(fact.kind, &fact.availability))
            .collect();
        findings.extend(machine(&platform));
        let backends = platform.backends.into_iter();
        Self {
            os: platform.os,
            kernel: platform.kernel,
            cpus: platform.cpus,
            page_bytes: platform.page_bytes,
            huge_pages: platform.huge_pages,
            memory: platform.memory,
            memlock_bytes: platform.memlock_bytes,
            open_files: platform.open_files,
            backends: backends
                .map(|fact| BackendLine::new(fact.kind, fact.availability))
                .collect(),
            checkpoint: None,
            storage: None,
            findings,
        }
    }

    /// Examines the checkpoint at `path` and its storage; adds everything, or nothing.
    fn add_checkpoint_at(&mut self, path: &Path, arguments: &DoctorArgs) -> tensora::Result<()> {
        let loader = Loader::new().open_options(arguments.open.options());
        let checkpoint = allow_mapping(loader, MemoryChoice::Auto).open(path)?;
        let index = checkpoint.index();
        let files = index
            .files()
            .iter()
            .map(|file| SourceFile::open(&file.path))
            .collect::<Result<Vec<_>, _>>()?;
        let facts = StorageFacts::probe(&files.iter().collect::<Vec<_>>());
        let plan = checkpoint.plan();
        let profile = plan
            .as_ref()
            .ok()
            .and_then(|plan| profile(&plan.platform.profile));
        let load = planned(plan)?;
        self.add_checkpoint(path.display().to_string(), index, facts);
        self.findings.extend(profile);
        self.findings.push(load);
        Ok(())
    }

    fn add_checkpoint(&mut self, path: String, index: &CheckpointIndex, facts: StorageFacts) {
        self.findings.push(recognised(index));
        self.findings.extend(storage(&facts));
        let file_count = index.files().len() as u64;
        let needed = 2 * file_count + SPARE_OPEN_FILES;
        if let Some(limit) = self.open_files
            && limit < needed
        {
            self.findings.push(Finding::problem(
                "open files",
                format!(
                    "the limit is {}, but {} of this checkpoint may take {}",
                    grouped(limit),
                    count(file_count, "file"),
                    grouped(needed)
                ),
                format!("raise it: ulimit -n {needed}"),
            ));
        }
        self.checkpoint = Some(CheckpointLine {
            path,
            format: index.format(),
            file_count: index.files().len(),
            tensor_count: index.tensors().len(),
            data_bytes: index.data_bytes(),
        });
        #[allow(clippy::cast_precision_loss)]
        let resident_share = facts
            .resident_bytes
            .map(|bytes| bytes as f64 / facts.file_bytes.max(1) as f64);
        self.storage = Some(StorageLine {
            facts,
            resident_share,
        });
    }
}

impl BackendLine {
    fn new(kind: BackendKind, availability: Availability) -> Self {
        let (status, reason, remedy) = match availability {
            Availability::Available => ("available", None, None),
            Availability::Unavailable { reason, remedy } => {
                ("unavailable", Some(reason), Some(remedy))
            }
        };
        Self {
            kind,
            status,
            reason,
            remedy,
        }
    }
}

impl Finding {
    fn ok(item: impl Into<String>, finding: impl Into<String>) -> Self {
        Self {
            item: item.into(),
            verdict: Verdict::Ok,
            finding: finding.into(),
            remedy: None,
        }
    }

    fn note(
        item: impl Into<String>,
        finding: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            verdict: Verdict::Note,
            remedy: Some(remedy.into()),
            ..Self::ok(item, finding)
        }
    }

    fn problem(
        item: impl Into<String>,
        finding: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            verdict: Verdict::Problem,
            ..Self::note(item, finding, remedy)
        }
    }
}

fn backend(kind: BackendKind, availability: &Availability) -> Finding {
    let item = format!("{kind} backend");
    match availability {
        Availability::Available => Finding::ok(item, "available"),
        Availability::Unavailable { reason, remedy } => {
            Finding::problem(item, format!("unavailable: {reason}"), remedy.as_str())
        }
    }
}

/// What holds for every load of this process on this machine.
fn machine(platform: &Platform) -> Vec<Finding> {
    vec![
        Finding::ok(
            "kernel",
            match &platform.kernel {
                Some(release) => format!("{} {release}", platform.os),
                None => platform.os.clone(),
            },
        ),
        Finding::ok("processors", grouped(platform.cpus.into())),
        memory(&platform.memory),
        huge_pages(platform.huge_pages),
        memlock(platform),
        open_files(platform.open_files),
    ]
}

fn memory(memory: &MemoryFacts) -> Finding {
    let Some((usable_bytes, source)) = memory.usable_bytes() else {
        return Finding::note(
            "memory",
            "the system does not tell what is available",
            "loads are not checked against it; --memory-limit SIZE sets a limit",
        );
    };
    let usable = size(usable_bytes);
    let text = match source {
        MemorySource::ControlGroup => {
            format!("{usable} available, bounded by the control group")
        }
        MemorySource::AddressSpace => format!("{usable} available, bounded by ulimit -v"),
        MemorySource::Data => format!("{usable} available, bounded by ulimit -d"),
        _ => format!("{usable} available"),
    };
    let total = match memory.total_bytes {
        Some(bytes) => format!("; the machine has {}", size(bytes)),
        None => String::new(),
    };
    let limit = match memory.cgroup_limit_bytes {
        Some(bytes) => format!("; the control group allows {}", size(bytes)),
        None => String::new(),
    };
    Finding::ok("memory", format!("{text}{total}{limit}"))
}

fn huge_pages(huge_pages: HugePages) -> Finding {
    match huge_pages {
        HugePages::Always => Finding::ok("huge pages", "always"),
        HugePages::Madvise => {
            Finding::ok("huge pages", "on request (madvise), and loads request them")
        }
        HugePages::Never => Finding::note(
            "huge pages",
            "never: owned memory takes 512 times as many page faults",
            "as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        ),
        HugePages::Unknown => Finding::ok("huge pages", "the system does not tell"),
    }
}

fn memlock(platform: &Platform) -> Finding {
    // Whether the limit suffices is not computed but tried: a ring was made, or was not.
    let rings = platform
        .availability(BackendKind::IoUring)
        .is_some_and(Availability::is_available);
    let limit = match platform.memlock_bytes {
        Some(bytes) => size_exactly(bytes),
        None => "unlimited".to_owned(),
    };
    let rings = if rings { "; rings work under it" } else { "" };
    Finding::ok("locked memory", format!("{limit}{rings}"))
}

fn open_files(limit: Option<u64>) -> Finding {
    match limit {
        Some(limit) if limit < FEW_OPEN_FILES => Finding::note(
            "open files",
            format!(
                "the limit is {}; a load may take two for each file of the checkpoint",
                grouped(limit)
            ),
            format!("raise it: ulimit -n {FEW_OPEN_FILES}"),
        ),
        Some(limit) => Finding::ok("open files", grouped(limit)),
        None => Finding::ok("open files", "unlimited"),
    }
}

fn recognised(index: &CheckpointIndex) -> Finding {
    Finding::ok(
        "checkpoint",
        format!(
            "{}: {} in {}, {}",
            index.format(),
            count(index.tensors().len() as u64, "tensor"),
            count(index.files().len() as u64, "file"),
            size_exactly(index.data_bytes())
        ),
    )
}

/// What holds for the place that the files are in.
fn storage(facts: &StorageFacts) -> Vec<Finding> {
    let mut findings = vec![file_system(facts)];
    findings.extend(device(facts));
    findings.push(direct(&facts.direct));
    findings.push(page_cache(facts));
    findings
}

fn file_system(facts: &StorageFacts) -> Finding {
    let name = &facts.file_system;
    let copy = "copy the checkpoint to a local disk if it is loaded often";
    match facts.class {
        FileSystemClass::Local => Finding::ok("file system", format!("{name}, on a local device")),
        FileSystemClass::Memory => Finding::ok("file system", format!("{name}, in memory")),
        FileSystemClass::Overlay => {
            Finding::ok("file system", format!("{name}, layered over others"))
        }
        FileSystemClass::Unknown => Finding::ok("file system", name.as_str()),
        FileSystemClass::Network => Finding::note(
            "file system",
            format!("{name}, over a network, which bounds the speed"),
            copy,
        ),
        FileSystemClass::Fuse => Finding::note(
            "file system",
            format!("{name}, through a user-space server, which bounds the speed"),
            copy,
        ),
    }
}

fn device(facts: &StorageFacts) -> Option<Finding> {
    let device = facts.device.as_deref()?;
    Some(match facts.rotational {
        Some(true) => Finding::note(
            "device",
            format!("{device}, which says that it has moving heads"),
            "if it is a virtual disk, ignore that; a hard disk takes minutes for large models",
        ),
        Some(false) => Finding::ok("device", format!("{device}, no moving heads")),
        None => Finding::ok("device", device),
    })
}

fn direct(direct: &DirectSupport) -> Finding {
    match direct {
        DirectSupport::Supported {
            offset_align_bytes,
            memory_align_bytes,
        } => Finding::ok(
            "direct I/O",
            format!(
                "supported: offsets aligned to {offset_align_bytes} bytes, memory to {memory_align_bytes}"
            ),
        ),
        DirectSupport::Unsupported { reason } => Finding::note(
            "direct I/O",
            format!("not supported: {reason}"),
            "files are read through the page cache; a file system like ext4 or XFS supports it",
        ),
    }
}

fn page_cache(facts: &StorageFacts) -> Finding {
    match facts.resident_bytes {
        Some(bytes) => {
            let sample = if facts.resident_is_estimate {
                ", as far as a sample tells"
            } else {
                ""
            };
            Finding::ok(
                "page cache",
                format!(
                    "holds {} of the files: {}{sample}",
                    share(bytes, facts.file_bytes),
                    size_exactly(bytes)
                ),
            )
        }
        None => Finding::note(
            "page cache",
            "the system does not tell what it holds of the files",
            "Linux tells only who owns the files or may write to them",
        ),
    }
}

/// What was measured of the place; nothing where nobody looked.
fn profile(fact: &ProfileFact) -> Option<Finding> {
    const REMEDY: &str = "`tensora calibrate PATH` measures which ways of reading are fastest here";
    match fact {
        ProfileFact::NotSought => None,
        ProfileFact::Absent => Some(Finding::note(
            "profile",
            "nothing was measured of this device and file system, so constants decide",
            REMEDY,
        )),
        ProfileFact::Matching(profile) => Some(Finding::ok(
            "profile",
            format!(
                "{} of this machine, device and file system",
                count(profile.measurements.len() as u64, "measurement")
            ),
        )),
        ProfileFact::Ignored { reason } => Some(Finding::note(
            "profile",
            format!("ignored: {reason}"),
            REMEDY,
        )),
    }
}

/// What a load would do. That it would be refused is a finding; that a file is damaged, an error.
fn planned(plan: tensora::Result<Plan>) -> tensora::Result<Finding> {
    match plan {
        Ok(plan) => Ok(Finding::ok(
            "load",
            format!(
                "{} into {} memory; `tensora plan` explains why",
                plan.backend, plan.memory
            ),
        )),
        Err(tensora::Error::Plan(error)) => {
            let remedy = match error {
                PlanError::DoesNotFit { .. } => "`--select GLOB` loads a part",
                _ => "see the problems above",
            };
            Ok(Finding::problem(
                "load",
                format!("refused: {error}"),
                remedy,
            ))
        }
        Err(error) => Err(error),
    }
}

/// That there is no checkpoint at the path, or one that cannot be read.
fn unreadable(error: &anyhow::Error) -> Finding {
    Finding::problem(
        "checkpoint",
        failure::message(error, "; "),
        failure::hint(error).unwrap_or("see to that, then run `tensora doctor` again".into()),
    )
}

impl Report for Examination {
    fn text(&self) -> String {
        let mut verdicts = Verdicts::new();
        for finding in &self.findings {
            let (word, colour) = match finding.verdict {
                Verdict::Ok => ("ok", Color::Green),
                Verdict::Note => ("note", Color::Yellow),
                Verdict::Problem => ("problem", Color::Red),
            };
            verdicts.add(word, colour, &finding.item, &printable(&finding.finding));
            if let Some(remedy) = &finding.remedy {
                verdicts.add("", colour, "", &format!("→ {remedy}"));
            }
        }
        let of = |verdict| {
            let matching = self.findings.iter().filter(|f| f.verdict == verdict);
            matching.count() as u64
        };
        let summary = match (of(Verdict::Problem), of(Verdict::Note)) {
            (0, 0) => "Everything is as it should be.".to_owned(),
            (0, notes) => format!("No problems, {}.", count(notes, "note")),
            (problems, 0) => format!("{}.", count(problems, "problem")),
            (problems, notes) => {
                format!("{}, {}.", count(problems, "problem"), count(notes, "note"))
            }
        };
        format!("{}\n{summary}\n", verdicts.text())
    }
}

#[cfg(test)]
mod tests {
    use tensora::io::BackendFact;

    use super::*;

    /// A machine without rings, with few open files, and otherwise unknown.
    fn examination() -> Examination {
        let availability = |kind| match kind {
            BackendKind::IoUring => Availability::Unavailable {
                reason: "blocked by seccomp".to_owned(),
                remedy: "change the profile".to_owned(),
            },
            _ => Availability::Available,
        };
        let backends = BackendKind::ALL.map(|kind| BackendFact {
            kind,
            availability: availability(kind),
        });
        let mut platform = Platform::unknown(2, backends.into());
        platform.open_files = Some(256);
        Examination::of_machine(platform)
    }

    #[test]
    fn an_unavailable_backend_is_a_problem_with_a_remedy() {
        let json = serde_json::to_value(examination()).unwrap();
        assert_eq!(
            json["backends"][2],
            serde_json::json!({
                "kind": "io-uring",
                "status": "unavailable",
                "reason": "blocked by seccomp",
                "remedy": "change the profile",
            })
        );
        let text = examination().text();
        let lines: Vec<_> = text.lines().map(str::trim).collect();
        let place = lines.iter().position(|line| line.starts_with("problem"));
        let place = place.unwrap();
        assert!(
            lines[place].ends_with("unavailable: blocked by seccomp"),
            "{text}"
        );
        assert_eq!(lines[place + 1], "→ change the profile");
    }

    #[test]
    fn what_is_unknown_or_low_is_a_note() {
        let text = examination().text();
        for (item, remedy) in [
            ("memory", "--memory-limit SIZE"),
            ("open files", "ulimit -n 1024"),
        ] {
            let mut lines = text.lines().skip_while(|line| {
                !line.starts_with("note") || !line.contains(&format!("  {item}  "))
            });
            assert!(lines.next().is_some(), "{item}: {text}");
            assert!(lines.next().unwrap().contains(remedy), "{item}: {text}");
        }
        assert_eq!(text.lines().last(), Some("1 problem, 2 notes."));
    }

    #[test]
    fn a_load_that_would_be_refused_is_a_problem() {
        let refused = PlanError::DirectWithMmap;
        let finding = planned(Err(refused.into())).unwrap();
        assert!(finding.verdict == Verdict::Problem && finding.remedy.is_some());
        assert!(
            finding.finding.starts_with("refused: "),
            "{}",
            finding.finding
        );
        let broken = tensora::Error::NotSelected {
            name: "x".to_owned(),
        };
        assert!(planned(Err(broken)).is_err());
    }

    #[test]
    fn storage_that_bounds_the_speed_is_called_out() {
        let mut facts = StorageFacts::unknown();
        facts.file_system = "nfs".to_owned();
        facts.class = FileSystemClass::Network;
        facts.device = Some("sda".to_owned());
        facts.rotational = Some(true);
        let findings = storage(&facts);
        let notes: Vec<_> = findings
            .iter()
            .filter(|finding| finding.verdict == Verdict::Note)
            .map(|finding| finding.item.as_str())
            .collect();
        assert_eq!(notes, ["file system", "device", "direct I/O", "page cache"]);

        facts.class = FileSystemClass::Local;
        facts.rotational = Some(false);
        facts.direct = DirectSupport::Supported {
            offset_align_bytes: 512,
            memory_align_bytes: 4,
        };
        facts.file_bytes = 200;
        facts.resident_bytes = Some(50);
        let findings = storage(&facts);
        assert!(
            findings
                .iter()
                .all(|finding| finding.verdict == Verdict::Ok)
        );
        assert_eq!(findings[3].finding, "holds 25 % of the files: 50 bytes");

        facts.resident_bytes = Some(200);
        facts.resident_is_estimate = true;
        let finding = page_cache(&facts).finding;
        assert_eq!(
            finding,
            "holds 100 % of the files: 200 bytes, as far as a sample tells"
        );
    }
}
