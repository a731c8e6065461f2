//! Checks of the direct-I/O policies, beyond those that every other check reads under.

// A check owns its trial, whose files go when it ends.
#![allow(clippy::needless_pass_by_value)]

use std::path::Path;

use super::fixture::{
    Arena, MIB, PLACE_ALIGN_BYTES, Place, Sample, Slot, Trial, open, params, temporary_directory,
};
use crate::{Control, DirectPolicy, DirectSupport, Error, Region, SourceFile};

/// `Required` is obeyed wherever a file can be read directly, also for its ragged end, and refused where
/// not, with the name of the file.
pub(super) fn required_reads_directly(trial: Trial) {
    let sample = trial.sample("sample", MIB + 1);
    if reads_directly(&trial, &sample) {
        let params = params(DirectPolicy::Required);
        trial.read(&[sample.whole(), sample.slot(1, 1000)], &params);
    }
}

/// Whether direct reads can be checked. Where not, they must be refused, and unless that is in the
/// backend's nature, it is recorded that they were not checked.
fn reads_directly(trial: &Trial, sample: &Sample) -> bool {
    if trial
        .policies(&sample.source)
        .contains(&DirectPolicy::Required)
    {
        return true;
    }
    if let DirectSupport::Unsupported { reason } = sample.source.direct_support() {
        trial.skip(&reason);
    }
    let params = params(DirectPolicy::Required);
    let (_, outcome) = trial.attempt(&[sample.whole()], &params, &Control::new());
    judge_refusal(outcome, sample.path());
    false
}

/// An error that says which file cannot be read directly.
fn judge_refusal(outcome: crate::Result<crate::ReadStats>, path: &Path) {
    match outcome {
        Err(Error::DirectUnsupported {
            path: named,
            reason,
        }) => {
            assert_eq!(named, path, "the wrong file is named");
            assert!(!reason.trim().is_empty(), "no reason is given");
        }
        other => panic!(
            "direct I/O is required and {} has none, but the outcome was {other:?}",
            path.display()
        ),
    }
}

/// After a read under `Required`, the page cache holds no more of the file than before; after one under
/// `Never`, it holds all of it.
pub(super) fn required_bypasses_the_cache(trial: Trial) {
    let sample = trial.sample("sample", MIB + 1);
    if !reads_directly(&trial, &sample) {
        return;
    }
    std::fs::File::open(sample.path())
        .and_then(|file| file.sync_all())
        .unwrap_or_else(|error| panic!("sync {}: {error}", sample.path().display()));
    let resident = |source: &SourceFile| source.resident_bytes(0..source.len());
    if sample.source.evict().is_err() || resident(&sample.source) != Some(0) {
        return trial.skip("the system does not evict files on request, or does not tell");
    }
    if direct_reads_are_cached(&sample.source) {
        return trial.skip("the file system serves direct reads from the page cache");
    }
    trial.read(&[sample.whole()], &params(DirectPolicy::Required));
    assert_eq!(
        resident(&sample.source),
        Some(0),
        "bytes are in the page cache after a read that had to bypass it"
    );
    trial.read(&[sample.whole()], &params(DirectPolicy::Never));
    assert_eq!(
        resident(&sample.source),
        Some(sample.source.len()),
        "not all bytes are in the page cache after a buffered read"
    );
}

/// Whether the file system takes a direct read and then reads buffered, as btrfs does where data has
/// checksums (seen on Linux 6.18). No backend can know.
#[cfg(unix)]
fn direct_reads_are_cached(source: &SourceFile) -> bool {
    use std::os::unix::fs::FileExt;

    let Ok(direct) = source.direct() else {
        return false;
    };
    let mut region = Region::allocate(2 * MIB).unwrap_or_else(|error| panic!("{error}"));
    let read = direct.file.read_at(&mut region.as_mut_slice()[..MIB], 0);
    assert!(read.is_ok(), "a direct read of whole blocks: {read:?}");
    source.resident_bytes(0..source.len()) != Some(0)
}

#[cfg(not(unix))]
fn direct_reads_are_cached(_source: &SourceFile) -> bool {
    false
}

/// What is aligned as direct reads need it goes straight into its destination.
pub(super) fn aligned_reads_need_no_scratch(trial: Trial) {
    let sample = trial.sample("sample", 4 * MIB);
    let params = params(DirectPolicy::Required);
    if !reads_directly(&trial, &sample) {
        return;
    }
    // Two whole huge pages at a distance: aligned for every device, adjacent for none.
    let slots = [0, 2 * MIB].map(|offset| sample.slot(offset, MIB).at(Place::Skewed(0)));
    let stats = trial.read(&slots, &params);
    let align = match sample.source.direct_support() {
        DirectSupport::Supported {
            offset_align_bytes,
            memory_align_bytes,
        } => offset_align_bytes.max(memory_align_bytes),
        DirectSupport::Unsupported { reason } => panic!("{reason}"),
    };
    if align as usize > PLACE_ALIGN_BYTES {
        return trial.skip(&format!("direct reads need an alignment of {align} bytes"));
    }
    assert_eq!(
        stats.scratch_bytes, 0,
        "aligned ranges went through scratch: {stats:?}"
    );
}

/// Files in memory, of which older kernels allow no direct reads: never and preferred work, and preferred
/// says what it fell back from; required works or says why not. Files elsewhere are not affected.
pub(super) fn memory_file_system(trial: Trial) {
    let shared_memory = Path::new("/dev/shm");
    if !shared_memory.is_dir() {
        return trial.skip("there is no /dev/shm");
    }
    let directory = temporary_directory(shared_memory);
    let sample = trial.sample_in(directory.path(), "in-memory", 300_001);
    let elsewhere = trial.sample("elsewhere", 100_001);
    let slots: Vec<Slot<'_>> = [&sample, &elsewhere]
        .into_iter()
        .flat_map(|sample: &Sample| [sample.whole(), sample.slot(3, 0), sample.slot(4097, 777)])
        .collect();

    trial.read(&slots, &params(DirectPolicy::Never));

    let stats = trial.read(&slots, &params(DirectPolicy::Preferred));
    let in_memory = sample.source.direct_support();
    let fallback = |sample: &Sample| {
        let mut fallbacks = stats.fallbacks.iter();
        fallbacks.any(|fallback| fallback.path == sample.path())
    };
    for sample in [&sample, &elsewhere] {
        let direct = trial
            .policies(&sample.source)
            .contains(&DirectPolicy::Required);
        // One that announces direct reads may still refuse them.
        assert!(
            direct || fallback(sample),
            "{} was read buffered without a note: {stats:?}",
            sample.path().display()
        );
    }

    let required = params(DirectPolicy::Required);
    let mut arena = Arena::new(&slots[..3]);
    match trial
        .backend
        .read(arena.requests(&slots[..3]), &required, &Control::new())
    {
        Ok(stats) => {
            assert!(
                in_memory.is_supported() && stats.direct_bytes == stats.bytes,
                "required, but not direct: {in_memory:?}, {stats:?}"
            );
            arena.verify(&slots[..3], &required);
        }
        refused => judge_refusal(refused, sample.path()),
    }
    // Still readable in the ordinary way through a descriptor of its own.
    let reopened = Sample {
        source: open(sample.path()),
        content: sample.content.clone(),
    };
    trial.read(&[reopened.whole()], &params(DirectPolicy::Never));
}
