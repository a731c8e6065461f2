//! What a load does about bytes that are in the page cache.
#![cfg(all(target_os = "linux", not(tensora_portable)))]
#![allow(clippy::unwrap_used)]

mod skip_support;

use std::io::{Read, Write};

use skip_support::skip;
use tensora_io::{
    Backend, BackendKind, Control, DirectPolicy, Placement, ReadRequest, ReadStats, ResidentPolicy,
    SourceFile, TransferParams, backend,
};

const MIB: u64 = 1 << 20;
const LEN: u64 = 24 * MIB + 777;
/// Some systems reclaim pages of the cache at any time: figures may be off by so much.
const RECLAIMED: u64 = 6 * MIB;

fn content() -> Vec<u8> {
    (0..LEN).map(|at| (at * 31 % 251) as u8).collect()
}

/// A file whose first `resident` bytes are in the page cache and whose others are not; `None`, counted, where
/// files cannot be evicted or read directly.
fn partly_resident(directory: &std::path::Path, resident: u64) -> Option<SourceFile> {
    let path = directory.join("data");
    let mut file = std::fs::File::create(&path).unwrap();
    file.write_all(&content()).unwrap();
    file.sync_all().unwrap();
    drop(file);
    let source = SourceFile::open(&path).unwrap();
    source.evict().unwrap();
    if source.resident_bytes(0..LEN) != Some(0) || !source.direct_support().is_supported() {
        skip("treatment of resident chunks: files here cannot be evicted or read directly");
        return None;
    }
    // Read-ahead would bring in more than was read.
    rustix::fs::fadvise(source.file(), 0, None, rustix::fs::Advice::Random).unwrap();
    let mut reader = source.file().take(resident);
    std::io::copy(&mut reader, &mut std::io::sink()).unwrap();
    assert_resident(&source, resident);
    Some(source)
}

/// As many bytes are in the page cache, or a little less.
#[track_caller]
fn assert_resident(file: &SourceFile, bytes: u64) {
    let resident = file.resident_bytes(0..LEN).unwrap();
    assert!(
        (bytes.saturating_sub(RECLAIMED)..=bytes).contains(&resident),
        "{resident} bytes of {LEN} are resident, not {bytes}"
    );
}

/// As many bytes were read directly, or a little more.
#[track_caller]
fn assert_direct(stats: &ReadStats, bytes: u64) {
    assert_eq!(stats.bytes, LEN);
    assert!(
        (bytes..=bytes + RECLAIMED).contains(&stats.direct_bytes),
        "{} bytes of {LEN} were read directly, not {bytes}",
        stats.direct_bytes
    );
}

fn backends() -> impl Iterator<Item = Box<dyn Backend>> {
    [BackendKind::Sync, BackendKind::Async, BackendKind::IoUring]
        .into_iter()
        .filter_map(|kind| match backend(kind) {
            Ok(backend) => Some(backend),
            Err(_) => {
                skip(&format!(
                    "treatment of resident chunks by {kind}: it cannot run here"
                ));
                None
            }
        })
}

fn read(
    backend: &dyn Backend,
    file: &SourceFile,
    direct: DirectPolicy,
    resident: ResidentPolicy,
) -> ReadStats {
    let placement = Placement::new(std::iter::once(0..LEN).collect());
    let mut region = placement.allocate().unwrap();
    let requests = placement
        .split(region.as_mut_slice())
        .into_iter()
        .map(|(offset, part)| ReadRequest {
            file,
            offset,
            destination: part.into(),
        })
        .collect();
    let params = TransferParams {
        chunk_bytes: MIB,
        queue_depth: 4,
        workers: 3,
        direct,
        resident,
    };
    let stats = backend.read(requests, &params, &Control::new()).unwrap();
    let bytes = placement.locate(&(0..LEN)).unwrap();
    assert!(region.as_slice()[bytes] == content(), "{}", backend.kind());
    stats
}

#[test]
fn what_is_resident_is_copied_and_the_rest_read_directly() {
    for backend in backends() {
        let directory = tempfile::tempdir().unwrap();
        // The cut lies inside a chunk: most of it is missing, so it is read whole.
        let Some(file) = partly_resident(directory.path(), 10 * MIB + MIB / 4) else {
            return;
        };
        let stats = read(
            &*backend,
            &file,
            DirectPolicy::Preferred,
            ResidentPolicy::Copy,
        );
        assert_direct(&stats, LEN - 10 * MIB);
        // Neither more nor less is in the page cache than before.
        assert_resident(&file, 10 * MIB + MIB / 4);
    }
}

#[test]
fn rereading_and_requiring_go_to_the_device_whatever_is_resident() {
    for backend in backends() {
        let directory = tempfile::tempdir().unwrap();
        let Some(file) = partly_resident(directory.path(), 10 * MIB) else {
            return;
        };
        for (direct, resident) in [
            (DirectPolicy::Preferred, ResidentPolicy::Reread),
            (DirectPolicy::Required, ResidentPolicy::Reread),
            (DirectPolicy::Required, ResidentPolicy::Copy),
        ] {
            let stats = read(&*backend, &file, direct, resident);
            assert_eq!(
                stats.direct_bytes,
                LEN,
                "{} {direct} {resident:?}",
                backend.kind()
            );
        }
    }
}

#[test]
fn what_was_copied_is_dropped_up_to_the_limit() {
    for backend in backends() {
        for (limit_bytes, left) in [(u64::MAX, 0), (0, 16 * MIB)] {
            let directory = tempfile::tempdir().unwrap();
            let Some(file) = partly_resident(directory.path(), 16 * MIB) else {
                return;
            };
            let policy = ResidentPolicy::CopyAndDrop { limit_bytes };
            let stats = read(&*backend, &file, DirectPolicy::Preferred, policy);
            assert_direct(&stats, LEN - 16 * MIB);
            assert_resident(&file, left);
        }
        // Only about as much as was asked for.
        let directory = tempfile::tempdir().unwrap();
        let Some(file) = partly_resident(directory.path(), 16 * MIB) else {
            return;
        };
        let policy = ResidentPolicy::CopyAndDrop {
            limit_bytes: 4 * MIB,
        };
        read(&*backend, &file, DirectPolicy::Preferred, policy);
        assert_resident(&file, 12 * MIB);
    }
}

#[test]
fn buffered_reads_drop_behind_too() {
    for backend in backends() {
        let directory = tempfile::tempdir().unwrap();
        let Some(file) = partly_resident(directory.path(), LEN) else {
            return;
        };
        let policy = ResidentPolicy::CopyAndDrop {
            limit_bytes: u64::MAX,
        };
        let stats = read(&*backend, &file, DirectPolicy::Never, policy);
        assert_eq!(stats.direct_bytes, 0);
        assert_resident(&file, 0);
    }
}
