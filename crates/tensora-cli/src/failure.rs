//! Errors, as the user sees them: what failed, its causes, and which option helps.

use std::borrow::Cow;
use std::fmt::{self, Write as _};
use std::io::{ErrorKind, Write as _};
use std::process::ExitCode;

use clap::builder::styling::{AnsiColor, Style};
use tensora::convert::{ConversionPlan, Error as ConvertError, Kept};
use tensora::formats::Error as FormatError;
use tensora::heuristics::{MemoryBound, PlanError, Proposal};
use tensora::io::Error as IoError;

use crate::output::{self, OutputError, readable};
use crate::signals;
use crate::units::{count, size, size_exactly};

const ERROR: Style = AnsiColor::Red.on_default().bold();
const HINT: Style = AnsiColor::Cyan.on_default().bold();

/// Says on standard error what went wrong; the exit status for it.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    if let Some(output) = error.downcast_ref::<OutputError>()
        && let Some(status) = output.closed_pipe_status()
    {
        return status;
    }
    let mut stderr = std::io::stderr().lock();
    let text = explain(error, output::colours(&stderr));
    // Nobody is left to tell if standard error is closed too.
    let _ = stderr.write_all(text.as_bytes());
    match conversion_error(error) {
        Some(error) if error.is_cancelled() => ExitCode::from(signals::exit_status()),
        _ => ExitCode::FAILURE,
    }
}

/// A conversion that ended early, and what it left behind.
#[derive(Debug)]
pub(crate) struct Stopped {
    error: ConvertError,
    /// Unknown where it cannot be looked up.
    kept: Option<Kept>,
    target: String,
}

impl Stopped {
    /// Looks up what is left.
    pub(crate) fn new(error: ConvertError, plan: &ConversionPlan) -> Self {
        Self {
            error,
            kept: plan.kept().ok(),
            target: plan.target().display().to_string(),
        }
    }

    /// What is left, and how to go on.
    fn remains(&self) -> Option<String> {
        let kept = self.kept?;
        // It was somebody else's, or cannot be gone on with.
        if matches!(
            self.error,
            ConvertError::TargetBusy { .. }
                | ConvertError::CannotResume { .. }
                | ConvertError::SourceChanged { .. }
                | ConvertError::Read(IoError::UnexpectedEof { .. })
        ) {
            return None;
        }
        Some(if kept.files == 0 {
            "no file was finished, and what was written has been removed".to_owned()
        } else {
            format!(
                "{} ({}) in {}/{STAGING_NAME}: the same command with `--resume` goes on from there, \
                 with `--restart` it begins anew",
                count(kept.files as u64, "finished file"),
                size(kept.bytes),
                readable(&self.target)
            )
        })
    }
}

impl fmt::Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for Stopped {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

/// The error of a conversion, whether or not it left something behind.
fn conversion_error(error: &anyhow::Error) -> Option<&ConvertError> {
    let stopped = error.downcast_ref::<Stopped>();
    stopped
        .map(|stopped| &stopped.error)
        .or_else(|| error.downcast_ref())
}

fn explain(error: &anyhow::Error, coloured: bool) -> String {
    let label = |style: Style, label: &str| {
        if coloured {
            format!("{style}{label}{style:#}")
        } else {
            label.to_owned()
        }
    };
    let mut text = format!("{} {}\n", label(ERROR, "error:"), message(error, "\n  "));
    if let Some(hint) = hint(error) {
        let _ = writeln!(text, "{} {hint}", label(HINT, "hint:"));
    }
    let stopped = error.downcast_ref::<Stopped>();
    if let Some(remains) = stopped.and_then(Stopped::remains) {
        let _ = writeln!(text, "{} {remains}", label(HINT, "kept:"));
    }
    text
}

/// What failed and, each after a separator, what caused it.
pub(crate) fn message(error: &anyhow::Error, separator: &str) -> String {
    let mut last = restated(error).unwrap_or_else(|| error.to_string());
    let mut text = readable(&last);
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        // Most messages end with their cause already.
        if !last.contains(&cause) {
            let _ = write!(text, "{separator}caused by: {}", readable(&cause));
            last = cause;
        }
    }
    text
}

/// What a library says in terms of its own interface, in terms of the command.
fn restated(error: &anyhow::Error) -> Option<String> {
    if let Some(ConvertError::Layout(FormatError::DtypeNotInFormat {
        tensor,
        dtype,
        format,
        ..
    })) = conversion_error(error)
    {
        return Some(format!(
            "tensor {tensor:?} cannot be written: {format} has no name for the dtype {dtype}; \
             the checkpoint has to stay safetensors"
        ));
    }
    match error.downcast_ref()? {
        tensora::Error::Plan(PlanError::DoesNotFit {
            needed_bytes,
            destination_bytes,
            buffer_bytes,
            index_bytes,
            available_bytes,
            bound,
            limit_path,
            ..
        }) => {
            let place = limit_path
                .as_ref()
                .map_or_else(String::new, |path| format!(" ({})", path.display()));
            Some(format!(
                "the load needs {} of memory ({} for tensors, {} for reads under way, {} for the index), \
                 but {bound}{place} leaves {}",
                size_exactly(*needed_bytes),
                size(*destination_bytes),
                size(*buffer_bytes),
                size(*index_bytes),
                size_exactly(*available_bytes)
            ))
        }
        tensora::Error::ShareWithoutRank => {
            Some("reading together needs a rank and the number of ranks".to_owned())
        }
        _ => None,
    }
}

/// The option or subcommand that helps; the libraries' messages cannot know of these.
pub(crate) fn hint(error: &anyhow::Error) -> Option<Cow<'static, str>> {
    if let Some(error) = conversion_error(error) {
        return conversion_hint(error).map(Cow::Borrowed);
    }
    if let Some(tensora::Error::Plan(PlanError::DoesNotFit {
        bound, proposals, ..
    })) = error.downcast_ref()
    {
        return Some(memory_hint(*bound, proposals).into());
    }
    let hint = match error.downcast_ref::<tensora::Error>()? {
        tensora::Error::Format(error) => format_hint(error),
        tensora::Error::Plan(error) => plan_hint(error),
        tensora::Error::Io(error) => io_hint(error),
        tensora::Error::ShareWithoutRank => Some("`--rank R --world W` says which rank this is"),
        _ => None,
    };
    hint.map(Cow::Borrowed)
}

/// Where conversions keep what they have written until it gets its place.
const STAGING_NAME: &str = ".tensora-convert";

const DOCTOR: &str = "`tensora doctor` shows which backends work here";

fn io_hint(error: &IoError) -> Option<&'static str> {
    match error {
        IoError::BackendUnavailable { .. } => Some(DOCTOR),
        IoError::File { source, .. } | IoError::Memory { source, .. }
            if source.kind() == ErrorKind::OutOfMemory =>
        {
            Some(
                "`--memory owned --select GLOB` loads a part; or raise the limit on address space \
                 (`ulimit -v`), if there is one",
            )
        }
        _ => None,
    }
}

fn format_hint(error: &FormatError) -> Option<&'static str> {
    match error {
        FormatError::SeveralFormats { .. } => Some("`--format FORMAT` chooses the format"),
        FormatError::WrongFormat { .. } => Some("without `--format`, any format is accepted"),
        FormatError::NoCheckpoint { found, .. }
            if found.iter().any(|name| name == STAGING_NAME) =>
        {
            Some(
                "a conversion to here was interrupted; the same `tensora convert` with `--resume` finishes it",
            )
        }
        FormatError::PartitionsTooShort { .. } => {
            Some("`tensora verify PATH` names every tensor that is not complete")
        }
        FormatError::MissingRank { .. } | FormatError::MixedRankFormats { .. } => {
            Some("`--rank N` opens one rank alone")
        }
        FormatError::UnlistedTensors { .. } => {
            Some("`--ignore-unlisted` leaves out what the index does not list")
        }
        _ => None,
    }
}

fn plan_hint(error: &PlanError) -> Option<&'static str> {
    match error {
        PlanError::BackendUnavailable { .. }
        | PlanError::BackendLeftOut { .. }
        | PlanError::NoBackend { .. } => Some(DOCTOR),
        PlanError::MappedWithBackend { .. } => {
            Some("`--backend auto --memory mapped`, or `--memory owned` to keep the backend")
        }
        PlanError::DirectWithMapped | PlanError::DirectWithMmap => {
            Some("`--direct required` goes with `--memory owned` and any backend but mmap")
        }
        PlanError::DirectUnsupported { .. } => Some("`--direct preferred` falls back"),
        PlanError::KeepWithDirect { .. } => {
            Some("`--cache keep` goes with `--direct auto` or `--direct never`")
        }
        PlanError::BypassWithBuffered => {
            Some("`--cache bypass` goes with `--direct auto`, `preferred` or `required`")
        }
        PlanError::BypassWithMapped | PlanError::BypassWithMmap => {
            Some("`--cache bypass` goes with `--memory owned` and any backend but mmap")
        }
        PlanError::BypassUnsupported { .. } => Some("`--cache auto` reads through the page cache"),
        PlanError::StreamDoesNotFit { .. } => {
            Some("`--memory-limit SIZE` sets the limit, of which the checkpoint's size is no part")
        }
        _ => None,
    }
}

/// What would fit, in terms of the command.
fn memory_hint(bound: MemoryBound, proposals: &[Proposal]) -> String {
    let mut ways = Vec::new();
    if bound == MemoryBound::Limit {
        ways.push("`--memory-limit SIZE` raises the limit".to_owned());
    }
    for proposal in proposals {
        match proposal {
            Proposal::Map { .. } => ways.push(
                "`--memory mapped` (with `--backend auto`) needs no memory of its own".to_owned(),
            ),
            Proposal::Slice { world } => ways.push(format!(
                "`--preset tensor-parallel --rank R --world {world}` loads one rank's part"
            )),
            Proposal::Select { .. } => ways.push("`--select GLOB` loads a part".to_owned()),
            Proposal::Stream { memory_bytes } => ways.push(format!(
                "streaming, as `tensora digest` does, takes {}",
                size(*memory_bytes)
            )),
            _ => (),
        }
    }
    match bound {
        MemoryBound::Limit => (),
        MemoryBound::ControlGroup => ways.push("raise the control group's limit".to_owned()),
        MemoryBound::AddressSpace => ways.push("raise the limit (`ulimit -v`)".to_owned()),
        MemoryBound::Data => ways.push("raise the limit (`ulimit -d`)".to_owned()),
        _ => ways.push("take a machine with more memory".to_owned()),
    }
    ways.join("; ")
}

fn conversion_hint(error: &ConvertError) -> Option<&'static str> {
    match error {
        ConvertError::OptionNotForTarget { .. } => Some(
            "`--shards N`, `--shard-bytes SIZE`, `--align SIZE` and `--metadata KEY=VALUE` go with `--to safetensors`, \
             `--partition-bytes SIZE` with either ServerlessLLM dialect, `--partitions N` with \
             `--to serverlessllm-partitioned`",
        ),
        ConvertError::SharedTensors { .. } => {
            Some("`--tied duplicate` writes the bytes once for each of them")
        }
        ConvertError::MemoryLimit { .. } => Some("`--memory-limit SIZE` sets the limit"),
        ConvertError::Read(IoError::Memory { .. }) => {
            Some("`--memory-limit SIZE` makes the buffers smaller, down to 1MiB")
        }
        ConvertError::Read(IoError::Thread { .. }) => {
            Some("a limit on address space (ulimit -v) refuses threads, too")
        }
        ConvertError::TargetOccupied { .. } => Some("`--force` replaces it"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context;
    use tensora::heuristics::Proposal;

    use super::*;

    #[test]
    fn causes_are_not_said_twice() {
        let error = tensora::load("/nonexistent/checkpoint").unwrap_err();
        let text = explain(&error.into(), false);
        assert!(text.starts_with("error: /nonexistent/checkpoint"), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");

        let error: anyhow::Error = std::io::Error::other("the disk is gone").into();
        let error = Err::<(), _>(error)
            .context("reading failed")
            .context("no result")
            .unwrap_err();
        assert_eq!(
            explain(&error, false),
            "error: no result\n  caused by: reading failed\n  caused by: the disk is gone\n"
        );
        assert!(explain(&error, true).contains("\u{1b}["));
    }

    #[test]
    fn memory_refusals_name_what_the_command_can_do() {
        for (bound, limit_helps) in [
            (MemoryBound::Machine, false),
            (MemoryBound::ControlGroup, false),
            (MemoryBound::AddressSpace, false),
            (MemoryBound::Data, false),
            (MemoryBound::Limit, true),
        ] {
            let refusal = PlanError::DoesNotFit {
                needed_bytes: 4 << 30,
                destination_bytes: 4 << 30,
                buffer_bytes: 0,
                index_bytes: 0,
                available_bytes: 1 << 30,
                bound,
                limit_path: None,
                proposals: vec![
                    Proposal::Map {
                        steps: vec!["consent to the contract of mappings".to_owned()],
                    },
                    Proposal::Slice { world: 8 },
                    Proposal::Select {
                        destination_bytes: 1 << 30,
                    },
                ],
            };
            let text = explain(&tensora::Error::from(refusal).into(), false);
            assert!(!text.contains("consent"), "{text}");
            assert!(text.contains("4.00 GiB (4,294,967,296 bytes)"), "{text}");
            assert!(text.contains("1.00 GiB (1,073,741,824 bytes)"), "{text}");
            assert!(
                text.contains("hint: ") && text.contains("`--select GLOB`"),
                "{text}"
            );
            assert!(text.contains("--memory mapped"), "{text}");
            assert!(text.contains("--world 8"), "{text}");
            assert_eq!(text.contains("--memory-limit"), limit_helps, "{text}");
        }
    }
}
