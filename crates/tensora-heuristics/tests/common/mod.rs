//! Workloads and platforms that several tests share.
#![allow(dead_code, reason = "each test binary uses the part that it needs")]

use tensora_heuristics::{AccessPattern, StorageLayout, Workload};
use tensora_io::{
    Availability, BackendFact, BackendKind, DirectSupport, FileSystemClass, Platform, StorageFacts,
};

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const GIB: u64 = 1 << 30;

/// All of `read_bytes` in `files` files, each of them one request.
pub(crate) fn whole(layout: StorageLayout, files: u32, read_bytes: u64) -> Workload {
    let mut workload = Workload::new(layout, AccessPattern::WholeFiles);
    workload.files = files;
    workload.tensors = 399;
    workload.read_bytes = read_bytes;
    workload.requests = files.into();
    workload.largest_request_bytes = read_bytes.div_ceil(files.max(1).into());
    workload.destination_bytes = read_bytes;
    workload
}

/// `read_bytes` in `requests` equal extents of `files` files.
pub(crate) fn ranges(
    layout: StorageLayout,
    files: u32,
    requests: u64,
    read_bytes: u64,
) -> Workload {
    let mut workload = whole(layout, files, read_bytes);
    workload.access = AccessPattern::Ranges;
    workload.requests = requests;
    workload.largest_request_bytes = read_bytes.div_ceil(requests.max(1));
    workload
}

pub(crate) fn one_shard() -> Workload {
    whole(StorageLayout::SafeTensors, 1, 1_503_264_768)
}

pub(crate) fn five_shards() -> Workload {
    whole(StorageLayout::SafeTensors, 5, 16_381_470_720)
}

/// A machine with `cpus` processors, 24 GiB of memory and a disk that can do everything, where the
/// page cache holds nothing.
pub(crate) fn platform(cpus: u32) -> Platform {
    let facts = BackendKind::ALL.map(|kind| BackendFact {
        kind,
        availability: Availability::Available,
    });
    let mut platform = Platform::unknown(cpus, facts.to_vec());
    platform.memory.available_bytes = Some(24 * GIB);
    let mut storage = StorageFacts::unknown();
    storage.file_system = "ext4".to_owned();
    storage.class = FileSystemClass::Local;
    storage.device = Some("nvme0n1".to_owned());
    storage.direct = DirectSupport::Supported {
        offset_align_bytes: 512,
        memory_align_bytes: 512,
    };
    storage.file_bytes = 1000;
    storage.resident_bytes = Some(0);
    platform.storage = Some(storage);
    platform
}

/// The same machine after a change to what its storage is like.
pub(crate) fn stored(change: impl FnOnce(&mut StorageFacts)) -> Platform {
    let mut platform = platform(2);
    change(platform.storage.as_mut().expect("the base has storage"));
    platform
}

/// The same machine with `per_mille` of the files in the page cache.
pub(crate) fn resident(per_mille: u64) -> Platform {
    stored(|storage| storage.resident_bytes = Some(per_mille))
}

pub(crate) fn on_tmpfs() -> Platform {
    stored(|storage| {
        storage.file_system = "tmpfs".to_owned();
        storage.class = FileSystemClass::Memory;
        storage.device = None;
    })
}

pub(crate) fn on_nfs() -> Platform {
    stored(|storage| {
        storage.file_system = "nfs".to_owned();
        storage.class = FileSystemClass::Network;
        storage.device = None;
    })
}

/// Takes backends away from a platform.
pub(crate) fn without(mut platform: Platform, kinds: &[BackendKind]) -> Platform {
    for fact in &mut platform.backends {
        if kinds.contains(&fact.kind) {
            fact.availability = Availability::Unavailable {
                reason: format!("{} is blocked", fact.kind),
                remedy: format!("unblock {}", fact.kind),
            };
        }
    }
    platform
}
