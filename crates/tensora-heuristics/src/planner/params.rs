//! Chunk, workers and queue depth.

use std::fmt;

use tensora_io::{BackendKind, DirectPolicy, DirectSupport, ResidentPolicy, TransferParams};

use super::profile::Pick;
use super::{Case, Place, decided};
use crate::tuning;
use crate::units::{Bytes, count};
use crate::{Decision, Rejection};

/// Why a parameter has the value that it has, where that was measured.
pub(super) const MEASURED: &str = "As measured: see backend and profile.";

/// Parts of the models that disks of virtual machines name: QEMU, VirtualBox, VMware and Hyper-V, Google, AWS.
const VIRTUAL_MODELS: [&str; 6] = [
    "qemu",
    "vbox",
    "virtual",
    "persistentdisk",
    "ephemeraldisk",
    "elastic block store",
];

/// What kind of transfer the parameters are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// Few long reads from a server.
    Server { rings: bool },
    /// Few long direct reads from a disk with moving heads.
    Disk { rings: bool },
    /// Direct reads on threads or tasks, also where they copy what is in the page cache meanwhile: too many
    /// threads for a copy cost little, too few for the device cost its speed.
    Device,
    /// Direct or buffered reads on rings.
    Rings,
    /// Buffered reads on threads or tasks.
    Copy,
    /// Reads through a page cache that does not hold the files.
    Buffered,
    /// Population of a mapping.
    Map,
}

impl Shape {
    /// Whether reads may go through scratch buffers, so that what is in flight takes memory.
    fn takes_scratch(self) -> bool {
        !matches!(self, Self::Copy | Self::Buffered | Self::Map)
    }
}

impl Case<'_> {
    pub(super) fn params(
        &self,
        backend: BackendKind,
        direct: DirectPolicy,
        resident: ResidentPolicy,
        pick: Option<&Pick<'_>>,
    ) -> (TransferParams, [Decision; 3]) {
        let shape = self.shape(backend, direct);
        let measured = pick.map(|pick| &pick.measurement.params);
        let (chunk_bytes, chunk) = self.chunk_bytes(shape, measured);
        // A copy out of the page cache may find something missing there, and read that directly.
        let takes_scratch = shape.takes_scratch() || self.reads_direct(direct);
        let (workers, worker) = self.workers(shape, takes_scratch, chunk_bytes, measured);
        let (queue_depth, depth) = self.queue_depth(shape, chunk_bytes, workers, measured);
        let params = TransferParams {
            chunk_bytes,
            queue_depth,
            workers,
            direct,
            resident,
        };
        (params, [chunk, worker, depth])
    }

    pub(super) fn shape(&self, backend: BackendKind, direct: DirectPolicy) -> Shape {
        let rings = backend == BackendKind::IoUring;
        // Where everything is in the page cache, direct reads are only for what is dropped from it.
        let reads_device = self.reads_direct(direct) && self.place != Place::PageCache;
        match backend {
            _ if self.place == Place::Server => Shape::Server { rings },
            BackendKind::Mmap => Shape::Map,
            _ if reads_device && self.spins() => Shape::Disk { rings },
            BackendKind::IoUring => Shape::Rings,
            BackendKind::Sync | BackendKind::Async if reads_device => Shape::Device,
            _ if matches!(self.place, Place::PageCache | Place::Memory) => Shape::Copy,
            BackendKind::Sync | BackendKind::Async => Shape::Buffered,
        }
    }

    /// Whether the files are on a disk with moving heads. The kernel's word alone does not count: virtual disks
    /// say so, whatever lies below, so the disk has to be attached as one and to name a model that is made
    /// of metal. Believing too little costs a spinning disk some seeks between adjacent reads;
    /// believing too much would cost a fast one most of its speed.
    pub(super) fn spins(&self) -> bool {
        let Some(storage) = &self.platform.storage else {
            return false;
        };
        let attached = storage
            .device
            .as_deref()
            .is_some_and(|name| name.starts_with("sd") || name.starts_with("hd"));
        let made = storage.device_model.as_deref().is_some_and(|model| {
            let model = model.to_lowercase();
            !model.trim().is_empty() && !VIRTUAL_MODELS.iter().any(|part| model.contains(part))
        });
        storage.rotational == Some(true) && attached && made
    }

    fn chunk_bytes(&self, shape: Shape, measured: Option<&TransferParams>) -> (u64, Decision) {
        let (constant, why) = match shape {
            Shape::Server { .. } => (
                tuning::SERVER_CHUNK_BYTES,
                "Long sequential reads suit a server.".to_owned(),
            ),
            Shape::Disk { .. } => (
                tuning::DISK_CHUNK_BYTES,
                "Long reads keep the disk's heads where they are.".to_owned(),
            ),
            Shape::Device | Shape::Rings => (
                tuning::DEVICE_CHUNK_BYTES,
                "Long enough for the device's full speed, short enough to keep many in flight."
                    .to_owned(),
            ),
            Shape::Buffered => (
                tuning::BUFFERED_CHUNK_BYTES,
                "Through a cold page cache, long reads keep read-ahead going.".to_owned(),
            ),
            Shape::Copy => (
                tuning::COPY_CHUNK_BYTES,
                "Through the page cache, longer reads save calls and keep read-ahead going."
                    .to_owned(),
            ),
            Shape::Map => (
                tuning::MAP_CHUNK_BYTES,
                "Two huge pages: enough to save calls, little enough to share out evenly."
                    .to_owned(),
            ),
        };
        let (mut auto, mut reason) = match measured {
            Some(params) => (params.chunk_bytes, MEASURED.to_owned()),
            None => (constant, why),
        };
        let fitting = self.fitting_chunk_bytes();
        if fitting < auto {
            auto = fitting;
            reason = format!(
                "No request is longer than {}, so longer chunks would never be filled.",
                Bytes(self.workload.largest_request_bytes)
            );
        }
        overridable("chunk_bytes", auto, self.policy.chunk_bytes, reason)
    }

    /// The smallest power of two that holds the longest request, also when its ends are rounded outwards
    /// to blocks.
    pub(super) fn fitting_chunk_bytes(&self) -> u64 {
        let align = self.block_bytes();
        match self.workload.largest_request_bytes {
            0 => u64::MAX,
            largest => largest
                .saturating_add(2 * align)
                .checked_next_power_of_two()
                .unwrap_or(u64::MAX)
                .max(TransferParams::MIN_CHUNK_BYTES),
        }
    }

    /// What direct reads are multiples of, in bytes; 0 where there are none.
    pub(super) fn block_bytes(&self) -> u64 {
        let storage = self.platform.storage.as_ref();
        match storage.map(|storage| &storage.direct) {
            Some(DirectSupport::Supported {
                offset_align_bytes, ..
            }) => u64::from(*offset_align_bytes),
            _ => 0,
        }
    }

    /// Chunks that there are to read, at least: requests are cut, never joined, but how their lengths are
    /// spread is not known.
    fn fewest_chunks(&self, chunk_bytes: u64) -> u64 {
        let read_bytes = self.workload.read_bytes;
        read_bytes
            .div_ceil(chunk_bytes)
            .max(self.workload.requests.min(read_bytes))
            .max(1)
    }

    fn workers(
        &self,
        shape: Shape,
        takes_scratch: bool,
        chunk_bytes: u64,
        measured: Option<&TransferParams>,
    ) -> (u32, Decision) {
        let cpus = self.platform.cpus;
        let (constant, why) = match shape {
            Shape::Server { rings: true } => {
                (tuning::MIN_RINGS, "Two rings share a handful of reads.".to_owned())
            }
            Shape::Server { rings: false } => (
                tuning::SERVER_MAX_READS,
                "A few reads at once hide the round trip; more make the server seek.".to_owned(),
            ),
            Shape::Disk { rings: true } => (
                tuning::MIN_RINGS,
                "Two rings share a handful of reads.".to_owned(),
            ),
            Shape::Disk { rings: false } => (
                tuning::DISK_MAX_READS,
                "A few reads at once keep the disk busy; more make its heads seek.".to_owned(),
            ),
            Shape::Device => (
                tuning::DEVICE_WORKERS,
                "They wait for the device rather than compute, so the device's queue decides, not the \
                 CPUs."
                    .to_owned(),
            ),
            Shape::Rings => (
                cpus.clamp(tuning::MIN_RINGS, tuning::MAX_RINGS),
                "One ring alone starves while its destination pages are faulted in; beyond a few there \
                 is nothing left to gain."
                    .to_owned(),
            ),
            Shape::Buffered => (
                tuning::BUFFERED_WORKERS,
                "Each waits for what the page cache has to fetch, so more than there are CPUs keep the \
                 device busy."
                    .to_owned(),
            ),
            Shape::Copy => (
                cpus.saturating_mul(tuning::COPY_WORKERS_PER_CPU)
                    .clamp(tuning::COPY_MIN_WORKERS, tuning::COPY_MAX_WORKERS),
                format!(
                    "Going through the page cache is a copy, and so work for the {}; with twice as many \
                     threads none of them idles while pages are faulted in.",
                    count(cpus.into(), "CPU")
                ),
            ),
            Shape::Map if matches!(self.place, Place::PageCache | Place::Memory) => (
                cpus.clamp(1, tuning::MAP_MAX_WORKERS),
                format!(
                    "The pages are in memory: populating only enters them into page tables, which is work \
                     for the {}.",
                    count(cpus.into(), "CPU")
                ),
            ),
            Shape::Map => (
                cpus.clamp(tuning::MAP_MIN_WORKERS, tuning::MAP_MAX_WORKERS),
                "Populating waits for the device, so more workers than CPUs keep that busy.".to_owned(),
            ),
        };
        let (mut auto, mut reason) = match measured {
            Some(params) => (params.workers, MEASURED.to_owned()),
            None => (constant, why),
        };
        let room = (tuning::MAX_IN_FLIGHT_BYTES / chunk_bytes).max(1);
        if measured.is_none() && takes_scratch && room < u64::from(auto) {
            auto = saturate(room);
            reason = format!(
                "More chunks of {} at once would exceed {} in flight.",
                Bytes(chunk_bytes),
                Bytes(tuning::MAX_IN_FLIGHT_BYTES)
            );
        }
        let chunks = self.fewest_chunks(chunk_bytes);
        if chunks < u64::from(auto) {
            auto = saturate(chunks);
            reason = format!(
                "More would find nothing to do: {} to read.",
                there_are(chunks)
            );
        }
        overridable("workers", auto, self.policy.workers, reason)
    }

    fn queue_depth(
        &self,
        shape: Shape,
        chunk_bytes: u64,
        workers: u32,
        measured: Option<&TransferParams>,
    ) -> (u32, Decision) {
        let (constant, why) = match shape {
            Shape::Rings => (
                tuning::RING_DEPTH,
                "Together the rings keep the device's queue full.".to_owned(),
            ),
            Shape::Server { rings: true } => (
                tuning::SERVER_MAX_READS / tuning::MIN_RINGS,
                "A few reads at once hide the round trip; more make the server seek.".to_owned(),
            ),
            Shape::Disk { rings: true } => (
                tuning::DISK_MAX_READS / tuning::MIN_RINGS,
                "A few reads at once keep the disk busy; more make its heads seek.".to_owned(),
            ),
            Shape::Server { rings: false }
            | Shape::Disk { rings: false }
            | Shape::Device
            | Shape::Copy
            | Shape::Buffered
            | Shape::Map => {
                let rejected = match self.policy.queue_depth {
                    Some(set) if set > 1 => {
                        vec![Rejection::new(
                            set,
                            "it was set, but has no effect without rings",
                        )]
                    }
                    _ => Vec::new(),
                };
                let reason = "Only rings keep more than one read in flight per worker.".to_owned();
                return decided("queue_depth", 1, reason, rejected);
            }
        };
        let (mut auto, mut reason) = match measured {
            Some(params) => (params.queue_depth, MEASURED.to_owned()),
            None => (constant, why),
        };
        let workers = u64::from(workers);
        let room = (tuning::MAX_IN_FLIGHT_BYTES / chunk_bytes / workers).max(1);
        if measured.is_none() && room < u64::from(auto) {
            auto = saturate(room);
            reason = format!(
                "{} with more reads of {} each would exceed {} in flight.",
                count(workers, "ring"),
                Bytes(chunk_bytes),
                Bytes(tuning::MAX_IN_FLIGHT_BYTES)
            );
        }
        let chunks = self.fewest_chunks(chunk_bytes);
        let share = chunks.div_ceil(workers);
        if share < u64::from(auto) {
            auto = saturate(share);
            reason = format!("More would never be used: {} to read.", there_are(chunks));
        }
        overridable("queue_depth", auto, self.policy.queue_depth, reason)
    }
}

/// The planner's value, or the one that the caller set instead.
pub(super) fn overridable<T: fmt::Display + Copy + PartialEq>(
    field: &'static str,
    auto: T,
    set: Option<T>,
    reason: String,
) -> (T, Decision) {
    match set {
        None => decided(field, auto, reason, Vec::new()),
        Some(set) => {
            let rejected = if set == auto {
                Vec::new()
            } else {
                vec![Rejection::new(
                    auto,
                    format!("another value was set. {reason}"),
                )]
            };
            decided(field, set, "It was set.".to_owned(), rejected)
        }
    }
}

fn there_are(chunks: u64) -> String {
    let verb = if chunks == 1 { "is" } else { "are" };
    format!("there {verb} {}", count(chunks, "chunk"))
}

pub(super) fn saturate(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
