//! Streams: windows, readers and buffers within a memory limit, and which gaps are read.

use tensora_io::{
    BackendKind, CacheState, DirectPolicy, MemoryKind, Platform, ProfileFact, ResidentPolicy,
    TransferParams,
};

use super::params::{MEASURED, Shape, overridable, saturate};
use super::profile::Pick;
use super::{Case, Place, check_parameters, check_wishes, decided};
use crate::tuning;
use crate::units::{Bytes, Rate, count};
use crate::{
    AccessPattern, Decision, MemoryBound, MemoryChoice, PlanError, Policy, Rejection, Result,
    StorageLayout, StreamPlan, Workload,
};

/// Sizes of buffers are multiples of this, in bytes: of the blocks of every device, and of every page.
const BUFFER_ALIGN_BYTES: u64 = 64 << 10;

/// What a stream reads into.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Windows {
    /// Readers that the buffers and the scratch are enough for.
    readers: u32,
    buffers: u32,
    buffer_bytes: u64,
    scratch_bytes: u64,
}

/// Decides how to visit the tensors of `workload` through buffers on `platform` as `policy` wishes: as
/// [`plan`](crate::plan()) decides how to load them, but for the memory.
///
/// The stream holds no more than [`Policy::memory_limit_bytes`], or
/// [`DEFAULT_STREAM_MEMORY_BYTES`](crate::DEFAULT_STREAM_MEMORY_BYTES) where that is not set, and never more than half of
/// what the machine, the control group and the limits of the process leave. [`Policy::workers`] is the number of readers;
/// each reads a window of its own.
///
/// Ranks that share a stream ([`Workload::shared`]) get the same number and size of buffers from the same policy,
/// as long as memory is not short.
///
/// # Errors
///
/// [`PlanError`] when wishes contradict each other or the facts, when a parameter is outside its limits, when no
/// backend is left, or when the limit is below the least that works for these tensors.
pub fn plan_stream(
    workload: &Workload,
    platform: &Platform,
    policy: &Policy,
) -> Result<StreamPlan> {
    check_parameters(policy)?;
    if policy.memory == MemoryChoice::Mapped {
        return Err(PlanError::MappedStream);
    }
    check_wishes(policy)?;
    let mut case = Case::new(workload, platform, policy);
    case.streams = true;
    case.check_facts()?;

    let constants = case.choose(MemoryKind::Owned, None)?;
    let (choice, profile_decision) = case.weigh(MemoryKind::Owned, constants)?;
    let (limit_bytes, bound) = case.stream_limit();
    let windows = choice.windows;
    let readers = choice.params.workers;
    let mut plan = StreamPlan {
        backend: choice.backend,
        params: TransferParams {
            workers: 1,
            ..choice.params
        },
        readers,
        buffers: windows.buffers,
        buffer_bytes: windows.buffer_bytes,
        scratch_bytes: windows.scratch_bytes,
        decisions: Vec::new(),
        workload: workload.clone(),
        platform: platform.clone(),
        policy: policy.clone(),
    };
    let held = format!(
        "{} of {} take {}, unaligned ends of files up to {}, and the index {}. {}.",
        count(plan.buffers.into(), "buffer"),
        Bytes(plan.buffer_bytes),
        Bytes(plan.buffer_bytes.saturating_mul(plan.buffers.into())),
        Bytes(plan.scratch_bytes),
        Bytes(workload.index_bytes),
        granted(bound, limit_bytes),
    );
    plan.decisions
        .push(decided("memory_bytes", plan.memory_bytes(), held, Vec::new()).1);
    plan.decisions.extend(choice.decisions);
    plan.decisions.extend(case.slices(MemoryKind::Owned));
    plan.decisions.extend(profile_decision);
    Ok(plan)
}

/// The largest gap between needed bytes of a file that is read rather than skipped, in bytes, and why: what the
/// place delivers in the time that one more read takes.
///
/// It depends on how much of the files is in the page cache, and so on when it is asked for: ranks that have to
/// agree on their windows agree on a gap, too.
pub fn merge_gap_bytes(platform: &Platform, policy: &Policy) -> (u64, Decision) {
    let nothing = Workload::new(StorageLayout::SafeTensors, AccessPattern::Ranges);
    let case = Case::new(&nothing, platform, policy);
    let (gap_bytes, reason) = case.merge_gap();
    decided("merge_gap_bytes", gap_bytes, reason, Vec::new())
}

/// The least that windows of these tensors take, in bytes: two buffers and scratch for one reader.
pub(super) fn least_window_memory_bytes(workload: &Workload) -> u64 {
    least_window_bytes(workload)
        .saturating_mul(2)
        .saturating_add(tuning::STREAM_SCRATCH_BYTES)
}

fn least_window_bytes(workload: &Workload) -> u64 {
    match workload.indivisible_bytes {
        0 => tuning::STREAM_MIN_WINDOW_BYTES,
        // Its ends may be rounded outwards.
        whole => {
            aligned(whole.saturating_add(BUFFER_ALIGN_BYTES)).max(tuning::STREAM_MIN_WINDOW_BYTES)
        }
    }
}

fn aligned(bytes: u64) -> u64 {
    bytes
        .checked_next_multiple_of(BUFFER_ALIGN_BYTES)
        .unwrap_or(u64::MAX)
}

/// `The memory limit that was set allows 64 MiB`.
fn granted(bound: MemoryBound, bytes: u64) -> String {
    let text = format!("{bound} {}", bound.grants(bytes));
    let mut chars = text.chars();
    match chars.next() {
        Some(first) => first.to_uppercase().chain(chars).collect(),
        None => text,
    }
}

/// What the constants say for one shape.
struct Recipe {
    chunk_bytes: u64,
    chunk_why: &'static str,
    readers: u32,
    readers_why: &'static str,
    window_bytes: u64,
    window_why: &'static str,
    /// Buffers for each reader.
    buffers: u32,
}

const THREADS_WAIT: &str =
    "Each reads its window from beginning to end; together they keep the device's queue full.";
const SHORT_WINDOW: &str =
    "A few reads long, so that readers seldom change windows, and short enough to have many.";
const ONE_READ: &str = "As long as one read.";

/// What has to fit into the limit.
struct Sizing {
    window_bytes: u64,
    least_window_bytes: u64,
    readers: u32,
    /// The number of readers was set, and stays.
    readers_set: bool,
    /// Buffers for each reader.
    buffers: u32,
    takes_scratch: bool,
}

impl Case<'_> {
    /// What the stream may hold, and what says so.
    fn stream_limit(&self) -> (u64, MemoryBound) {
        let set = match self.policy.memory_limit_bytes {
            Some(limit_bytes) => (limit_bytes, MemoryBound::Limit),
            None => (tuning::STREAM_MEMORY_BYTES, MemoryBound::StreamDefault),
        };
        match self.platform.memory.usable_bytes() {
            // The other half is for whoever takes the tensors, and for the rest of the machine.
            Some((usable_bytes, source)) if usable_bytes / 2 < set.0 => {
                (usable_bytes / 2, source.into())
            }
            _ => set,
        }
    }

    fn recipe(&self, shape: Shape) -> Recipe {
        let cpus = self.platform.cpus;
        match shape {
            Shape::Device => Recipe {
                chunk_bytes: tuning::DEVICE_CHUNK_BYTES,
                chunk_why: "Long enough for the device's full speed, short enough to keep many in flight.",
                readers: tuning::STREAM_READERS,
                readers_why: THREADS_WAIT,
                window_bytes: tuning::STREAM_WINDOW_BYTES,
                window_why: SHORT_WINDOW,
                buffers: tuning::STREAM_BUFFERS_PER_READER,
            },
            Shape::Rings => Recipe {
                chunk_bytes: tuning::STREAM_RING_CHUNK_BYTES,
                chunk_why: "Long enough for the device's full speed, short enough to keep many in flight.",
                readers: tuning::STREAM_RING_READERS,
                readers_why: "While one ring runs out of its window's reads, the others keep the device's \
                              queue full.",
                window_bytes: tuning::STREAM_RING_WINDOW_BYTES,
                window_why: "Long enough to keep a ring's queue full, since one is made for each window.",
                buffers: tuning::STREAM_RING_BUFFERS_PER_READER,
            },
            Shape::Server { .. } => Recipe {
                chunk_bytes: tuning::SERVER_CHUNK_BYTES,
                chunk_why: "Long sequential reads suit a server.",
                readers: tuning::SERVER_MAX_READS,
                readers_why: "A few reads at once hide the round trip; more make the server seek.",
                window_bytes: tuning::SERVER_CHUNK_BYTES,
                window_why: ONE_READ,
                buffers: tuning::STREAM_BUFFERS_PER_READER,
            },
            Shape::Disk { .. } => Recipe {
                chunk_bytes: tuning::DISK_CHUNK_BYTES,
                chunk_why: "Long reads keep the disk's heads where they are.",
                readers: tuning::DISK_MAX_READS,
                readers_why: "A few reads at once keep the disk busy; more make its heads seek.",
                window_bytes: tuning::DISK_CHUNK_BYTES,
                window_why: ONE_READ,
                buffers: tuning::STREAM_BUFFERS_PER_READER,
            },
            Shape::Buffered => Recipe {
                chunk_bytes: tuning::BUFFERED_CHUNK_BYTES,
                chunk_why: "Through a cold page cache, long reads keep read-ahead going.",
                readers: tuning::BUFFERED_WORKERS,
                readers_why: "Each waits for what the page cache has to fetch, so more than there are CPUs \
                              keep the device busy.",
                window_bytes: tuning::BUFFERED_CHUNK_BYTES,
                window_why: ONE_READ,
                buffers: tuning::STREAM_BUFFERS_PER_READER,
            },
            Shape::Copy => Recipe {
                chunk_bytes: tuning::COPY_CHUNK_BYTES,
                chunk_why: "Through the page cache, longer reads save calls.",
                readers: cpus
                    .saturating_mul(tuning::STREAM_COPY_READERS_PER_CPU)
                    .clamp(tuning::COPY_MIN_WORKERS, tuning::COPY_MAX_WORKERS),
                readers_why: "Going through the page cache is a copy, and so work for the CPUs.",
                window_bytes: tuning::STREAM_WINDOW_BYTES,
                window_why: SHORT_WINDOW,
                buffers: tuning::STREAM_BUFFERS_PER_READER,
            },
            Shape::Map => Recipe {
                chunk_bytes: tuning::MAP_CHUNK_BYTES,
                chunk_why: "Two huge pages: enough to save calls, little enough to share out evenly.",
                readers: cpus.clamp(tuning::MAP_MIN_WORKERS, tuning::MAP_MAX_WORKERS),
                readers_why: "Populating waits for the device, so more readers than CPUs keep that busy.",
                window_bytes: tuning::STREAM_WINDOW_BYTES,
                window_why: SHORT_WINDOW,
                buffers: tuning::STREAM_BUFFERS_PER_READER,
            },
        }
    }

    /// Parameters whose workers are the stream's readers, what they read into, and why.
    pub(super) fn stream_params(
        &self,
        backend: BackendKind,
        direct: DirectPolicy,
        resident: ResidentPolicy,
        pick: Option<&Pick<'_>>,
    ) -> Result<(TransferParams, Windows, [Decision; 5])> {
        let policy = self.policy;
        let shape = self.shape(backend, direct);
        let recipe = self.recipe(shape);
        let measured = pick.map(|pick| &pick.measurement.params);
        let (chunk_bytes, chunk_why) = match measured {
            Some(params) => (params.chunk_bytes, MEASURED),
            None => (recipe.chunk_bytes, recipe.chunk_why),
        };
        let fitting_bytes = self.fitting_chunk_bytes();
        let auto_chunk_bytes = chunk_bytes.min(fitting_bytes);
        let chunk_bytes = policy.chunk_bytes.unwrap_or(auto_chunk_bytes);

        let is_ring = backend == BackendKind::IoUring;
        let depth = match measured {
            _ if shape != Shape::Rings => 1,
            Some(params) => params.queue_depth,
            None => tuning::STREAM_RING_DEPTH,
        };
        let depth = match policy.queue_depth {
            Some(set) if is_ring => set,
            _ => depth,
        };
        let (readers, readers_why) = match measured {
            Some(params) => (params.workers, MEASURED),
            None => (recipe.readers, recipe.readers_why),
        };

        let least_window_bytes =
            least_window_bytes(self.workload).max(policy.chunk_bytes.map_or(0, aligned));
        let in_flight_bytes = chunk_bytes.saturating_mul(depth.into());
        let useful_bytes = aligned(
            recipe
                .window_bytes
                .max(in_flight_bytes.min(tuning::STREAM_MAX_WINDOW_BYTES))
                .max(chunk_bytes),
        );
        let sizing = match &self.workload.shared {
            // The same for all ranks, whatever each of them sees of the machine.
            Some(shared) => Sizing {
                window_bytes: tuning::STREAM_SHARED_WINDOW_BYTES.max(least_window_bytes),
                least_window_bytes,
                // A reader that was asked for is one of each rank.
                readers: policy.workers.map_or(tuning::STREAM_READERS, |each| {
                    each.saturating_mul(shared.world.max(1))
                }),
                readers_set: policy.workers.is_some(),
                buffers: tuning::STREAM_BUFFERS_PER_READER,
                takes_scratch: true,
            },
            None => Sizing {
                window_bytes: useful_bytes.min(self.whole_bytes()).max(least_window_bytes),
                least_window_bytes,
                readers: policy.workers.unwrap_or(readers),
                readers_set: policy.workers.is_some(),
                buffers: recipe.buffers,
                takes_scratch: self.reads_direct(direct),
            },
        };
        let windows = self.fit(&sizing)?;
        let window_bytes = windows.buffer_bytes;
        let fit_bytes = sizing.window_bytes;

        let (auto_readers, readers_why) = match &self.workload.shared {
            Some(shared) => {
                // One buffer is with a consumer.
                let all = readers
                    .min(windows.readers)
                    .min(windows.buffers.saturating_sub(1))
                    .max(1);
                let share = all.div_ceil(shared.world.max(1));
                let why = format!(
                    "{} read the windows that they share in turn, and {} enough for all.",
                    count(shared.world.into(), "rank"),
                    match all {
                        1 => "1 reader is".to_owned(),
                        all => format!("{all} readers are"),
                    }
                );
                (share, why)
            }
            None => {
                let most = saturate(self.window_count(window_bytes));
                // Where not every window has a buffer of its own, one is with the consumer.
                let fed = if windows.buffers < most {
                    windows
                        .readers
                        .min(windows.buffers.saturating_sub(1))
                        .max(1)
                } else {
                    windows.readers
                };
                if readers <= most.min(fed) {
                    (readers, readers_why.to_owned())
                } else if most <= fed {
                    let why = format!(
                        "More would find nothing to read: all of it takes {}.",
                        count(most.into(), "window")
                    );
                    (most, why)
                } else {
                    let why = format!(
                        "The limit has room for {} of {}, which keep no more of them busy.",
                        count(windows.buffers.into(), "buffer"),
                        Bytes(window_bytes)
                    );
                    (fed, why)
                }
            }
        };
        let (readers, readers_decision) =
            overridable("readers", auto_readers, policy.workers, readers_why);

        let auto_chunk_why = if auto_chunk_bytes.min(window_bytes) < auto_chunk_bytes {
            "Reads are no longer than a buffer.".to_owned()
        } else if fitting_bytes < recipe.chunk_bytes && measured.is_none() {
            format!(
                "No request is longer than {}, so longer chunks would never be filled.",
                Bytes(self.workload.largest_request_bytes)
            )
        } else {
            chunk_why.to_owned()
        };
        let (chunk_bytes, chunk_decision) = overridable(
            "chunk_bytes",
            auto_chunk_bytes.min(window_bytes),
            policy.chunk_bytes,
            auto_chunk_why,
        );
        let (queue_depth, depth_decision) = self.stream_depth(
            is_ring,
            depth,
            window_bytes.div_ceil(chunk_bytes),
            measured.is_some(),
        );

        let window_why = if self.workload.shared.is_some() && window_bytes == fit_bytes {
            "The ranks have to agree on it, whatever each of them sees of the machine.".to_owned()
        } else if window_bytes < fit_bytes {
            "Not enough larger ones fit into the limit.".to_owned()
        } else if window_bytes == least_window_bytes && policy.chunk_bytes.is_some() {
            "A read that long was asked for.".to_owned()
        } else if window_bytes == least_window_bytes && self.workload.indivisible_bytes > 0 {
            format!(
                "A stretch of {} has to be in one buffer, because the tensor in it has its elements in \
                 another order.",
                Bytes(self.workload.indivisible_bytes)
            )
        } else if window_bytes < useful_bytes {
            "There is no more to read.".to_owned()
        } else {
            recipe.window_why.to_owned()
        };
        let window_decision = decided("buffer_bytes", window_bytes, window_why, Vec::new()).1;
        let wanted = self.wanted_buffers(&sizing, readers, window_bytes);
        let buffers_why = if windows.buffers < wanted {
            "No more of them fit into the limit."
        } else if u64::from(windows.buffers) >= self.window_count(window_bytes) {
            "More would never be filled."
        } else {
            "Some are filled while others wait, or are with the consumer."
        };
        let buffers_decision = decided(
            "buffers",
            windows.buffers,
            buffers_why.to_owned(),
            Vec::new(),
        )
        .1;

        let params = TransferParams {
            chunk_bytes,
            queue_depth,
            workers: readers,
            direct,
            resident,
        };
        let decisions = [
            chunk_decision,
            readers_decision,
            depth_decision,
            window_decision,
            buffers_decision,
        ];
        Ok((params, windows, decisions))
    }

    fn stream_depth(
        &self,
        is_ring: bool,
        depth: u32,
        chunks: u64,
        measured: bool,
    ) -> (u32, Decision) {
        let set = self.policy.queue_depth;
        if !is_ring {
            let rejected = match set {
                Some(set) if set > 1 => vec![Rejection::new(
                    set,
                    "it was set, but has no effect without rings",
                )],
                _ => Vec::new(),
            };
            let reason = "Only rings keep more than one read in flight per reader.".to_owned();
            return decided("queue_depth", 1, reason, rejected);
        }
        let (auto, reason) = if chunks < u64::from(depth) {
            (
                saturate(chunks),
                format!("A window has no more than {}.", count(chunks, "chunk")),
            )
        } else if measured {
            (depth, MEASURED.to_owned())
        } else {
            (
                depth,
                "Together the rings keep the device's queue full.".to_owned(),
            )
        };
        overridable("queue_depth", auto, set, reason)
    }

    /// The most that could be in one buffer, also when the ends of all requests are rounded outwards, in bytes.
    fn whole_bytes(&self) -> u64 {
        let rounding_bytes = self
            .block_bytes()
            .saturating_mul(2)
            .saturating_mul(self.workload.requests);
        match self.workload.read_bytes {
            0 => u64::MAX,
            read_bytes => aligned(read_bytes.saturating_add(rounding_bytes)),
        }
    }

    /// Windows that there are, about; at least 1.
    fn window_count(&self, window_bytes: u64) -> u64 {
        // What the others read is not known, nor, without sizes, what this one does.
        if self.workload.shared.is_some() || self.workload.read_bytes == 0 {
            return u64::MAX;
        }
        self.workload.read_bytes.div_ceil(window_bytes)
    }

    fn wanted_buffers(&self, sizing: &Sizing, readers: u32, window_bytes: u64) -> u32 {
        let windows = self.window_count(window_bytes);
        let wanted = readers
            .saturating_mul(sizing.buffers)
            .max(readers.saturating_add(tuning::STREAM_MIN_AHEAD));
        // A consumer may hold one and ask for the next.
        saturate(u64::from(wanted).min(windows.max(2)))
    }

    /// As many and as large buffers as the limit has room for: it is shorter windows first, down to a size that
    /// costs little, then fewer readers, then still shorter windows.
    fn fit(&self, sizing: &Sizing) -> Result<Windows> {
        let (limit_bytes, bound) = self.stream_limit();
        let least_bytes = sizing.least_window_bytes;
        let comfortable_bytes = tuning::STREAM_SMALL_WINDOW_BYTES.max(least_bytes);
        let mut window_bytes = sizing.window_bytes;
        let mut readers = sizing.readers;
        loop {
            let busy = saturate(self.window_count(window_bytes).min(readers.into()));
            let scratch_bytes = if sizing.takes_scratch {
                tuning::STREAM_SCRATCH_BYTES.saturating_mul(busy.into())
            } else {
                0
            };
            let beside_bytes = scratch_bytes.saturating_add(self.workload.index_bytes);
            let room = limit_bytes.saturating_sub(beside_bytes) / window_bytes;
            let wanted = self.wanted_buffers(sizing, busy, window_bytes);
            let enough = u64::from(wanted.min(busy.saturating_add(tuning::STREAM_MIN_AHEAD)));
            let windows = Windows {
                readers: busy,
                buffers: saturate(room).min(wanted),
                buffer_bytes: window_bytes,
                scratch_bytes,
            };
            if room >= enough {
                return Ok(windows);
            }
            if window_bytes > comfortable_bytes {
                window_bytes = aligned(window_bytes / 2).max(comfortable_bytes);
            } else if busy > 1 && !sizing.readers_set {
                readers = busy / 2;
            } else if window_bytes > least_bytes {
                window_bytes = aligned(window_bytes / 2).max(least_bytes);
            } else {
                // One being filled for each reader, and one with the consumer.
                let least_buffers = busy.saturating_add(1);
                if room >= u64::from(least_buffers) {
                    return Ok(windows);
                }
                let wishes = [
                    (self.policy.workers.is_some(), "workers"),
                    (self.policy.chunk_bytes.is_some(), "chunk_bytes"),
                ];
                return Err(PlanError::StreamDoesNotFit {
                    least_bytes: window_bytes
                        .saturating_mul(least_buffers.into())
                        .saturating_add(beside_bytes),
                    buffers: least_buffers,
                    buffer_bytes: window_bytes,
                    limit_bytes,
                    bound,
                    limit_path: self.limit_path(bound),
                    wishes: wishes
                        .into_iter()
                        .filter_map(|(set, name)| set.then_some(name))
                        .collect(),
                });
            }
        }
    }

    fn merge_gap(&self) -> (u64, String) {
        let told = |gap: u64, why: String| (gap, format!("{why}."));
        match self.place {
            Place::Memory | Place::PageCache => match self.measured_rate(CacheState::Warm) {
                Some(rate) => told(
                    gap_bytes(rate, tuning::CALL_NS),
                    format!(
                        "Measured here, {} are copied in a second, and a call takes about {} ns",
                        Rate(rate),
                        tuning::CALL_NS
                    ),
                ),
                None => told(
                    tuning::MERGE_GAP_MEMORY_BYTES,
                    "What is in memory is copied about that far in the time that a call takes"
                        .to_owned(),
                ),
            },
            Place::Server => told(
                tuning::MERGE_GAP_SERVER_BYTES,
                "A server is asked once for what lies close together, rather than waited for twice"
                    .to_owned(),
            ),
            _ if self.spins() => told(
                tuning::MERGE_GAP_DISK_BYTES,
                "A disk passes over that much in the time that it needs to move its heads"
                    .to_owned(),
            ),
            Place::Unknown | Place::Mixed | Place::Device => {
                match self.measured_rate(CacheState::Cold) {
                    Some(rate) => told(
                        gap_bytes(rate, tuning::DEVICE_OPERATION_NS),
                        format!(
                            "Measured here, the device delivers {}, and one more read takes it about {} µs",
                            Rate(rate),
                            tuning::DEVICE_OPERATION_NS / 1000
                        ),
                    ),
                    None => told(
                        tuning::MERGE_GAP_DEVICE_BYTES,
                        "A device delivers about that much in the time that one more read takes it"
                            .to_owned(),
                    ),
                }
            }
        }
    }

    /// The best that was measured of reading into memory, in bytes per second.
    fn measured_rate(&self, state: CacheState) -> Option<u64> {
        let ProfileFact::Matching(profile) = &self.platform.profile else {
            return None;
        };
        profile
            .measurements
            .iter()
            .filter(|m| (m.cache, m.memory) == (state, MemoryKind::Owned))
            .map(tensora_io::Measurement::bytes_per_second)
            .max()
            .filter(|&rate| rate > 0)
    }
}

/// What is delivered in that time, as a power of two within sensible limits.
fn gap_bytes(bytes_per_second: u64, ns: u64) -> u64 {
    let bytes = u128::from(bytes_per_second) * u128::from(ns) / 1_000_000_000;
    let bytes = u64::try_from(bytes)
        .unwrap_or(u64::MAX)
        .clamp(tuning::MERGE_GAP_MIN_BYTES, tuning::MERGE_GAP_MAX_BYTES);
    1 << bytes.ilog2()
}
