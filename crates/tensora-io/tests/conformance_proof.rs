//! The conformance suite passes a backend that is right and fails one that is wrong, for the right reason.
#![cfg(all(feature = "testing", unix))]
#![allow(clippy::unwrap_used)]

mod conformance_reference;

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use conformance_reference::{Defect as D, Reference};
use tensora_io::testing::{Check, Options, checks, conformance, skipped};

/// A defect, a check that must find it, and a part of what the check says.
#[rustfmt::skip]
const DEFECTS: &[(D, &str, &str)] = &[
    (D::PanicsOnAnEmptyBatch, "empty_batch", "the defect's own panic"),
    (D::PanicsOnAnEmptyRequest, "empty_requests", "the defect's own panic"),
    (D::FailsOnAnEmptyFile, "empty_requests", "ends at byte 0"),
    (D::WrongLastByte, "single_bytes", "1 bytes are wrong, the first at 0"),
    (D::WrongLastByte, "boundary_sizes", "1 bytes are wrong"),
    (D::WrongLastByte, "uninitialised_destinations", "1 bytes are wrong"),
    (D::WrongLastByte, "untouched_memory", "1 bytes are wrong"),
    (D::WrongLastByte, "random_batches", "1 bytes are wrong"),
    (D::WritesOneByteTooMany, "boundary_sizes", "no destination was overwritten"),
    (D::WritesOneByteTooMany, "untouched_memory", "no destination was overwritten"),
    (D::SkipsUnalignedTail, "whole_files", "never written"),
    (D::SkipsUnalignedHead, "unaligned_ranges", "never written"),
    (D::SkipsMisalignedDestination, "misaligned_destinations", "never written"),
    (D::RoundsChunksDown, "odd_chunks", "never written"),
    (D::FailsWithManyWorkers, "largest_parameters", "the defect's own panic"),
    (D::StopsAfter1024Requests, "tiny_ranges", "never written"),
    (D::ReadsEqualRangesOnce, "overlapping_ranges", "never written"),
    (D::TakesAdjacentForContiguous, "adjacent_ranges", "bytes are wrong"),
    (D::ReadsTheFirstFileOnly, "several_files", "ends at byte 0"),
    (D::TruncatesOffsets, "offsets_beyond_4_gib", "the byte at offset"),
    (D::TruncatesLengths, "a_request_over_2_gib", "the byte at offset"),
    (D::CountsOneByteTooMany, "boundary_sizes", "the statistics count other bytes"),
    (D::ReportsTooMuchProgress, "boundary_sizes", "the progress callback was told"),
    (D::ReportsNoProgress, "boundary_sizes", "the progress callback was told"),
    (D::ReadsBufferedInstead, "required_reads_directly", "had to be read directly"),
    (D::RefusesToReadDirectly, "required_reads_directly", "direct I/O is required, but"),
    (D::ClaimsToReadDirectly, "required_bypasses_the_cache", "in the page cache"),
    (D::CopiesWhatIsAligned, "aligned_reads_need_no_scratch", "went through scratch"),
    (D::HidesFallbacks, "memory_file_system", "or the fallback recorded"),
    (D::ClampsParameters, "invalid_parameters", "outside its range"),
    (D::OverflowsOffsets, "overflowing_offsets", "the defect's own overflow"),
    (D::SwallowsTheEnd, "range_past_the_end", "gave Ok"),
    (D::SwallowsTheEnd, "truncated_while_reading", "all of a file arrived"),
    (D::NamesTheWrongRange, "range_past_the_end", "which was asked for"),
    (D::NamesTheLengthAtOpen, "truncated_after_open", "the wrong end"),
    (D::NamesTheFirstFile, "one_bad_file_among_good_ones", "the wrong file"),
    (D::ReopensThePath, "deleted_after_open", "open"),
    (D::ReopensThePath, "replaced_after_open", "bytes are wrong"),
    (D::IgnoresEarlyCancellation, "cancelled_before_the_start", "bytes arrived in a cancelled load"),
    (D::IgnoresCancellation, "cancelled_by_the_progress_callback", "ended with Ok"),
    (D::ReadsOnWhenCancelled, "cancelled_by_the_progress_callback", "arrived after"),
    (D::ReadsOnWhenCancelled, "cancelled_from_another_thread", "arrived after"),
    (D::WritesAfterCancellation, "cancelled_by_the_progress_callback", "was written to"),
    (D::WritesAfterCancellation, "cancelled_from_another_thread", "was written to"),
    (D::CallsCancelledComplete, "cancelled_at_any_time", "bytes are wrong"),
    (D::SwallowsPanics, "panicking_progress_callback", "was swallowed"),
    (D::ReplacesPanics, "panicking_progress_callback", "another panic"),
    (D::DiesOfAPanic, "panicking_progress_callback", "the defect's own panic"),
    (D::WritesAfterAPanic, "panicking_progress_callback", "was written to"),
    (D::WritesAfterSuccess, "quiet_after_success", "was written to"),
    (D::WritesAfterAnError, "quiet_after_an_error", "was written to"),
    (D::SharesItsBuffer, "concurrent_loads", "bytes are wrong"),
    (D::Hangs, "single_bytes", "the backend hangs"),
    #[cfg(feature = "async")]
    (D::EntersARuntime, "inside_a_runtime", "runtime"),
    #[cfg(feature = "async")]
    (D::WaitsForATask, "inside_a_runtime", "the backend hangs"),
    #[cfg(feature = "async")]
    (D::OwnsARuntime, "inside_a_runtime", "Cannot drop a runtime"),
    #[cfg(target_os = "linux")]
    (D::KeepsFiles, "files_are_let_go", "are left"),
];

#[test]
fn the_reference_conforms() {
    conformance(&|| Box::new(Reference::new(D::None)), &Options::default());
}

/// Whether the check recorded that it could not be done here.
fn was_skipped(name: &str, defect: D) -> bool {
    let begin = format!("{name} of {:?}", Reference::new(defect));
    skipped().iter().any(|reason| reason.starts_with(&begin))
}

#[test]
fn every_defect_is_found() {
    let mut missed = Vec::new();
    for &(defect, name, said) in DEFECTS {
        let check = checks().iter().find(|check| check.name() == name).unwrap();
        let mut options = Options::default();
        if [D::Hangs, D::WaitsForATask].contains(&defect) {
            options.timeout = Duration::from_secs(1);
        }
        let run = || check.run(&|| Box::new(Reference::new(defect)), &options);
        match catch_unwind(AssertUnwindSafe(run)) {
            // Some cannot show everywhere: a wrong direct read only where there are direct reads.
            _ if was_skipped(name, defect) => {}
            Ok(()) => missed.push(format!("{name} did not find {defect:?}")),
            Err(panic) => {
                let message = panic.downcast_ref::<String>().unwrap();
                if !message.contains(said) || !message.contains(name) {
                    missed.push(format!("{name} found {defect:?}, but said: {message}"));
                }
            }
        }
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

#[test]
fn every_check_finds_a_defect() {
    let all: BTreeSet<&str> = checks().iter().map(Check::name).collect();
    let proven: BTreeSet<&str> = DEFECTS.iter().map(|&(_, name, _)| name).collect();
    let runtime = cfg!(feature = "async");
    let unproven: Vec<_> = all
        .difference(&proven)
        .filter(|&&name| runtime || name != "inside_a_runtime")
        .filter(|&&name| cfg!(target_os = "linux") || name != "files_are_let_go")
        .collect();
    assert!(unproven.is_empty(), "no defect for {unproven:?}");
}
