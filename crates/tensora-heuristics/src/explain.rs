use std::fmt;

use tensora_io::{BackendKind, DirectPolicy, Platform, ResidentPolicy, TransferParams};

use crate::planner::resident_percent;
use crate::units::{Bytes, count};
use crate::{AccessPattern, Decision, Plan, StreamPlan, Workload};

/// Column at which an explanation is wrapped.
const WIDTH: usize = 100;
/// Column at which its text begins, behind the name of the decision.
const INDENT: usize = 13;

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        wrap(f, "plan", &self.summary())?;
        wrap(f, "load", &load(&self.workload))?;
        wrap(f, "where", &whereabouts(&self.platform))?;
        self.decisions.iter().try_for_each(|d| explain(f, d))
    }
}

impl fmt::Display for StreamPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        wrap(f, "plan", &self.summary())?;
        wrap(f, "stream", &load(&self.workload))?;
        wrap(f, "where", &whereabouts(&self.platform))?;
        self.decisions.iter().try_for_each(|d| explain(f, d))
    }
}

fn explain(f: &mut fmt::Formatter<'_>, decision: &Decision) -> fmt::Result {
    f.write_str("\n")?;
    let chosen = spoken(decision.field, &decision.chosen);
    wrap(
        f,
        title(decision),
        &format!("{chosen}. {}", decision.reason),
    )?;
    for rejection in &decision.rejected {
        let choice = match (decision.field, rejection.choice.as_str()) {
            // "Not never" says it twice.
            ("direct", "never") => "buffered".to_owned(),
            ("direct", "preferred") => "direct".to_owned(),
            (field, choice) => spoken(field, choice),
        };
        let reason = rejection.reason.trim_end_matches('.');
        wrap(f, "", &format!("Not {choice}: {reason}."))?;
    }
    Ok(())
}

/// A choice as a person writes it.
fn spoken(field: &str, choice: &str) -> String {
    match (field, choice) {
        ("sharing", "memory") => return "shared memory".to_owned(),
        ("sharing", "page-cache") => return "page cache".to_owned(),
        _ => {}
    }
    match choice.parse() {
        Ok(bytes) if field.ends_with("_bytes") => Bytes(bytes).to_string(),
        _ => choice.to_owned(),
    }
}

fn title(decision: &Decision) -> &'static str {
    match decision.field {
        "chunk_bytes" => "chunk",
        "queue_depth" => "queue depth",
        "merge_gap_bytes" => "gap",
        "memory_bytes" => "memory",
        "buffer_bytes" => "buffer",
        field => field,
    }
}

impl Plan {
    /// The whole plan in one sentence.
    fn summary(&self) -> String {
        let params = &self.params;
        let chunk = Bytes(params.chunk_bytes);
        let workers = u64::from(params.workers);
        let crew = match self.backend {
            BackendKind::Sync => count(workers, "thread"),
            BackendKind::Async => count(workers, "task"),
            BackendKind::IoUring => {
                format!("{} of depth {}", count(workers, "ring"), params.queue_depth)
            }
            BackendKind::Mmap => count(workers, "worker"),
        };
        let how = how(self.backend, params, self.reads_direct());
        format!(
            "{}, {} memory: {crew}, chunks of {chunk}, {how}.",
            self.backend, self.memory
        )
    }
}

impl StreamPlan {
    /// The whole plan in one sentence.
    fn summary(&self) -> String {
        let params = &self.params;
        let readers = u64::from(self.readers);
        let crew = match self.backend {
            BackendKind::IoUring => {
                format!("{} of depth {}", count(readers, "ring"), params.queue_depth)
            }
            _ => count(readers, "reader"),
        };
        format!(
            "{}, {} of {}: {crew}, chunks of {}, {}.",
            self.backend,
            count(self.buffers.into(), "buffer"),
            Bytes(self.buffer_bytes),
            Bytes(params.chunk_bytes),
            how(self.backend, params, self.reads_direct())
        )
    }
}

/// What is done about the page cache.
fn how(backend: BackendKind, params: &TransferParams, reads_direct: bool) -> String {
    let direct = match params.direct {
        _ if backend == BackendKind::Mmap => "through the page cache",
        DirectPolicy::Never => "buffered",
        DirectPolicy::Preferred if reads_direct => "direct",
        DirectPolicy::Preferred => "direct where possible",
        DirectPolicy::Required => "direct or not at all",
    };
    let resident = match params.resident {
        ResidentPolicy::CopyAndDrop { .. } => ", what is in the page cache copied and dropped",
        ResidentPolicy::Copy if reads_direct => ", what is in the page cache copied",
        ResidentPolicy::Copy | ResidentPolicy::Reread => "",
    };
    format!("{direct}{resident}")
}

fn load(workload: &Workload) -> String {
    let access = match workload.access {
        AccessPattern::WholeFiles => "whole files",
        AccessPattern::Ranges => "ranges",
    };
    format!(
        "{} from {} of {}, {access}: {} in {}.",
        Bytes(workload.read_bytes),
        count(workload.files.into(), workload.layout.file_term()),
        workload.layout.title(),
        count(workload.tensors, "tensor"),
        count(workload.requests, "request"),
    )
}

fn whereabouts(platform: &Platform) -> String {
    let storage = match &platform.storage {
        None => "unknown storage".to_owned(),
        Some(storage) => {
            let device = match &storage.device {
                Some(device) => format!(" on {device}"),
                None => String::new(),
            };
            let resident = match resident_percent(storage) {
                Some(percent) if storage.resident_is_estimate => {
                    format!("{percent} % (by a sample)")
                }
                Some(percent) => format!("{percent} %"),
                None => "an unknown part".to_owned(),
            };
            format!(
                "{}{device}, {resident} of the files in the page cache",
                storage.file_system
            )
        }
    };
    let memory = match platform.memory.usable_bytes() {
        Some((bytes, source)) => format!("{} of memory left ({source})", Bytes(bytes)),
        None => "unknown memory".to_owned(),
    };
    format!(
        "{storage}; {}; {memory}.",
        count(platform.cpus.into(), "CPU")
    )
}

/// Writes one labelled paragraph, wrapped between words, with a hanging indent.
fn wrap(f: &mut fmt::Formatter<'_>, label: &str, text: &str) -> fmt::Result {
    write!(f, "{label:INDENT$}")?;
    let mut column = INDENT;
    for (index, word) in text.split_whitespace().enumerate() {
        let width = word.chars().count();
        if index > 0 && column + 1 + width > WIDTH {
            write!(f, "\n{:INDENT$}", "")?;
            column = INDENT;
        } else if index > 0 {
            f.write_str(" ")?;
            column += 1;
        }
        f.write_str(word)?;
        column += width;
    }
    f.write_str("\n")
}
