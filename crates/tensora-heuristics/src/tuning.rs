//! Every number that the planner knows, with its unit and its source.
//!
//! Source, where nothing else stands: benches/runs/2026-11-hand-measurements.md (2 cores, ext4 on a virtual NVMe
//! disk; q06 is 1.5 GB in one shard, q8 is 16.4 GB in five). Between machines even the order of the backends
//! changes; that is what profiles are for. docs/HEURISTICS.md has them all in one table, which a test holds
//! against this file.

/// Bytes from which a load of several files goes to rings: q8 took 7.4–8.4 s with rings and 8.0–9.8 s
/// with threads, q06 0.59–0.71 s and 0.59–0.63 s. The crossing lies between; 4 GB is the regime table's. Later runs
/// neither move nor confirm it: cold, threads took 1.02 times as long as rings with q06 (21 rounds, from 0.46 to 2.21)
/// and with 6.2 GB (9 rounds, 0.60 to 2.02; benches/runs/2026-11-23-2cpu-23gib-ext4-matrix), 0.98 times with q06 in
/// benches/runs/2026-11-23-2cpu-23gib-ext4-rotated, all within what one and the same case varies by.
pub(crate) const LARGE_LOAD_BYTES: u64 = 4_000_000_000;

/// Per cent of the files' bytes that must be in the page cache for the load to count as resident and be
/// read through it. Below that the rest decides: q8 takes 2.3 s copied, 8 s read directly and 16 s read
/// buffered, so that 2 % read buffered cost 0.3 s, and each further per cent 0.16 s instead of 0.08 s.
pub(crate) const RESIDENT_PERCENT: u64 = 98;

/// Per cent of the files' bytes that must be in the page cache for direct reads to ask, chunk by chunk, what
/// is there. Not measured: below it there is less to gain than times vary.
pub(crate) const PARTLY_RESIDENT_PERCENT: u64 = 2;

/// Per cent of the files' bytes from which a load that copies what is in the page cache and reads the rest
/// directly is a copy above all: at 7 GB/s copied and 2.3 GB/s read, both at once, they meet at 75 % (q06,
/// benches/runs/2026-11-23-2cpu-23gib-ext4-primed).
pub(crate) const MOSTLY_RESIDENT_PERCENT: u64 = 75;

/// Per cent of the files' bytes that must be in the page cache for mapping to pay even where populating what is missing does
/// not: on disks with moving heads, on file systems of an unknown kind, for short requests, where memory is short. Not measured
/// there; on the fast disk, q06 took 0.74 s cold mapped, 0.66 s read and 0.21 s copied
/// (benches/runs/2026-11-23-2cpu-23gib-ext4-primed), q8 12 s, 8 s, and 2.3 s at the same rate, by which mapping and copying
/// meet at 78 % and at 84 %.
pub(crate) const MAP_RESIDENT_PERCENT: u64 = 80;

/// Bytes up to which a load whose files are not in the page cache is mapped where that is allowed. Of times until
/// every tensor can be used, direct reads took 1.10 (q06) and 1.27 times (6.2 GB) those of a mapping; until every byte was
/// read once more, too, which is when a mapping pays for pages that the host has taken back, 1.01 and 1.12 times:
/// medians over 21 and 9 rounds, three formats (benches/runs/2026-11-23-2cpu-23gib-ext4-matrix/run.json). With q8 it was
/// 1.02 and 0.93 times as SafeTensors (7 rounds, benches/runs/2026-11-28-2cpu-23gib-ext4-deeper/run.json), 0.95 and 0.85
/// times in the store dialect (7 rounds, benches/runs/2026-11-28-2cpu-23gib-ext4-large/run.json). What lies between was
/// not measured.
pub(crate) const MAP_COLD_MAX_BYTES: u64 = 8_000_000_000;

/// Room that dropping from the page cache leaves beside destination and files, in bytes, at least: for the
/// rest of the machine. Not measured. Without dropping, q8 fully cached on 24 GiB took 17 to 32 s copied, and
/// 10 to 18 s read directly.
pub(crate) const CROWDING_MARGIN_BYTES: u64 = 1 << 30;

/// The same as a part of usable memory: one part in so many. Not measured: the kernel begins to reclaim
/// well before the last byte.
pub(crate) const CROWDING_MARGIN_SHARE: u64 = 16;

/// Total bytes below which direct I/O is not worth its alignment and scratch. Not measured: at the
/// device's 2.5 GB/s this is less than 2 ms either way.
pub(crate) const DIRECT_MIN_READ_BYTES: u64 = 4 << 20;

/// Mean bytes per request below which direct I/O is not used. Not measured: half the kernel's default
/// read-ahead of 128 KiB, below which each direct read waits for a device round trip that buffered
/// neighbours share, and the rounding to blocks at both ends is no longer small.
pub(crate) const DIRECT_MIN_MEAN_REQUEST_BYTES: u64 = 64 << 10;

/// Largest read of direct threads, tasks and rings, in bytes: a huge page, so that each is faulted in by one
/// reader. With 1 MiB, 16 threads took up to 24 s and 45 s of processor time for q8, because two that share a huge
/// page both zero it; as fast as with 2 MiB (9 to 14 s, and so do 2 rings) where they happened not to collide
/// (benches/runs/2026-11-23-cold-parameters.md).
pub(crate) const DEVICE_CHUNK_BYTES: u64 = 2 << 20;

/// Largest read of a buffered copy, in bytes: warm q06 in 0.24 s with 2 threads.
pub(crate) const COPY_CHUNK_BYTES: u64 = 4 << 20;

/// Bytes that one worker of the mmap backend populates at a time: q06 warm in 12 ms with 8 workers.
pub(crate) const MAP_CHUNK_BYTES: u64 = 4 << 20;

/// Largest read from a server, in bytes. Not measured: several of the largest transfers of NFS and SMB
/// (1 MiB and 8 MiB), so that read-ahead sees one long sequence.
pub(crate) const SERVER_CHUNK_BYTES: u64 = 8 << 20;

/// Most reads at one server at once. Not measured: enough to hide a round trip, too few to make the
/// server seek between streams.
pub(crate) const SERVER_MAX_READS: u32 = 4;

/// Largest read from a disk with moving heads, in bytes. Not measured: at 200 MB/s it takes twice as long as a
/// seek.
pub(crate) const DISK_CHUNK_BYTES: u64 = 4 << 20;

/// Most reads at once from a disk with moving heads. Not measured: enough for the disk to have the next one at
/// hand, which is adjacent.
pub(crate) const DISK_MAX_READS: u32 = 4;

/// Threads or tasks of a direct load: 16 MiB in flight saturated the device.
pub(crate) const DEVICE_WORKERS: u32 = 16;

/// Threads of a buffered copy per CPU: 6.0 GB/s with 4 on 2 CPUs, 5.1 GB/s with 2 (warm, 0.2 GB of q06,
/// benches/runs/2026-11-23-calibration.json).
pub(crate) const COPY_WORKERS_PER_CPU: u32 = 2;

/// Largest read through a page cache that does not hold the files, in bytes; 1.5 GB/s with 8 MiB × 8 threads
/// (cold, 0.2 GB of q06, benches/runs/2026-11-23-calibration.json), 0.5 GB/s with 4 MiB × 2 (q06, 3.1 s).
pub(crate) const BUFFERED_CHUNK_BYTES: u64 = 8 << 20;

/// Threads that read through a page cache that does not hold the files, from the same run.
pub(crate) const BUFFERED_WORKERS: u32 = 8;

/// Fewest threads of a buffered copy: with one, page faults and the copy wait for each other.
pub(crate) const COPY_MIN_WORKERS: u32 = 2;

/// Most threads of a buffered copy. Not measured: memory bandwidth is shared, and one core alone zeroes 4.4 GB/s.
pub(crate) const COPY_MAX_WORKERS: u32 = 16;

/// Fewest rings: with one, destination pages fault inside submission and the queue starves (q06 0.74 s
/// with one, 0.59–0.71 s with two).
pub(crate) const MIN_RINGS: u32 = 2;

/// Most rings. Not measured: four cores zero destination pages faster than any one device delivers.
pub(crate) const MAX_RINGS: u32 = 4;

/// Reads in flight per ring: 2 × 16 were the best cold case of q8, at 1 and at 2 MiB.
pub(crate) const RING_DEPTH: u32 = 16;

/// Fewest workers of the mmap backend where files are not in memory: cold population waits for the device, and 8 were
/// best. Warm, one per CPU: q06 in 0.032 s with 2, 0.034 s with 8 and 0.041 s with 16, on 2 CPUs.
pub(crate) const MAP_MIN_WORKERS: u32 = 8;

/// Most workers of the mmap backend. Not measured: they contend for one address space's lock.
pub(crate) const MAP_MAX_WORKERS: u32 = 16;

/// Bytes that all workers together keep in flight at most. 16 MiB saturate the device while nobody has to wait for fresh
/// memory; with 2 rings that do, 64 MiB took 0.94 of the time of 32 MiB (q8 cold). Reads in flight fill their destination,
/// so that this costs no memory.
pub(crate) const MAX_IN_FLIGHT_BYTES: u64 = 64 << 20;

/// What a load owns beside its destination at most, in bytes: the scratch for what is not aligned, 384 KiB each, of
/// every thread or of `RING_DEPTH` reads of each of `MAX_RINGS`, and the stacks.
pub(crate) const OVERHEAD_BYTES: u64 = 32 << 20;

/// Memory that windows take beside the tensors of a load at most, in bytes, where slices are gathered out of
/// them or ranks share them. Not measured: half of what a stream has, because the tensors are held, too.
pub(crate) const WINDOW_MEMORY_BYTES: u64 = 128 << 20;

/// Most ranks of which one is proposed where the whole does not fit. Not measured: more than one machine has
/// processors of any kind for.
pub(crate) const PROPOSED_WORLD_MAX: u32 = 64;

/// Memory of a stream where no limit is set, in bytes. Not measured: the limit under which streams have to
/// attain the device's speed.
pub(crate) const STREAM_MEMORY_BYTES: u64 = 256 << 20;

/// Window of a stream read by threads or tasks, in bytes: two reads of `DEVICE_CHUNK_BYTES`. As
/// fast as the device with 4 and with 8 MiB (q8 cold, benches/runs/2026-11-23-stream-parameters.md).
pub(crate) const STREAM_WINDOW_BYTES: u64 = 4 << 20;

/// Window of a stream read by rings, in bytes: a full queue of `STREAM_RING_CHUNK_BYTES`; a ring is
/// made for each. As fast as the device, like 8 MiB (q8 cold, benches/runs/2026-11-23-stream-parameters.md).
pub(crate) const STREAM_RING_WINDOW_BYTES: u64 = 16 << 20;

/// Window of a stream that ranks share, in bytes; they have to agree on it. Not measured.
pub(crate) const STREAM_SHARED_WINDOW_BYTES: u64 = 4 << 20;

/// Window below which readers are given up rather than making windows shorter, in bytes. Not measured: half of
/// `DEVICE_CHUNK_BYTES`, with which the device was nearly as fast.
pub(crate) const STREAM_SMALL_WINDOW_BYTES: u64 = 1 << 20;

/// Shortest window, in bytes. Not measured: one scratch read.
pub(crate) const STREAM_MIN_WINDOW_BYTES: u64 = 256 << 10;

/// Readers of a stream that are threads or tasks. As fast as the device,
/// like 8 (q8 cold, benches/runs/2026-11-23-stream-parameters.md).
pub(crate) const STREAM_READERS: u32 = 16;

/// Readers of a stream that are rings: as fast as the device with 2; 4 took 1.09 times as long (q8 cold,
/// benches/runs/2026-11-23-stream-parameters.md).
pub(crate) const STREAM_RING_READERS: u32 = 2;

/// Largest read of a stream's ring, in bytes: what the device's ceiling was measured with; 2 MiB are
/// as fast (q8 cold, benches/runs/2026-11-23-stream-parameters.md).
pub(crate) const STREAM_RING_CHUNK_BYTES: u64 = 1 << 20;

/// Reads in flight on a stream's ring, at most: the same.
pub(crate) const STREAM_RING_DEPTH: u32 = 16;

/// Bytes of a window at most, whatever a profile would keep in flight. Not measured: windows are memory, so that two of
/// them and a consumer have to fit into `STREAM_MEMORY_BYTES` with room to spare.
pub(crate) const STREAM_MAX_WINDOW_BYTES: u64 = 32 << 20;

/// Readers per CPU of a stream that copies from the page cache. Not measured: its buffers' pages are in place, so
/// that a thread has nothing to wait for, and the consumer has work, too.
pub(crate) const STREAM_COPY_READERS_PER_CPU: u32 = 1;

/// Buffers of a stream for each thread or task. Not measured: one being filled, one waiting or with the consumer.
pub(crate) const STREAM_BUFFERS_PER_READER: u32 = 2;

/// Buffers of a stream for each ring. Not measured: the same memory as with threads.
pub(crate) const STREAM_RING_BUFFERS_PER_READER: u32 = 4;

/// Buffers beside those being filled, at least, where the limit has room. Not measured: one waiting, one with the
/// consumer.
pub(crate) const STREAM_MIN_AHEAD: u32 = 2;

/// Scratch of one reader for unaligned ends of files, in bytes: what `tensora-io` takes for one such read.
pub(crate) const STREAM_SCRATCH_BYTES: u64 = 384 << 10;

/// Gap between needed bytes that is read rather than skipped, in bytes, on a device. Not measured: at 2.4 GB/s it
/// takes 27 µs, about as long as one more read.
pub(crate) const MERGE_GAP_DEVICE_BYTES: u64 = 64 << 10;

/// The same in memory and the page cache. Not measured: at 6 GB/s it takes 1.4 µs, about as long as a call.
pub(crate) const MERGE_GAP_MEMORY_BYTES: u64 = 8 << 10;

/// The same behind a server. Not measured: at 1 GB/s it takes 1 ms, about as long as a round trip and the
/// server's own read.
pub(crate) const MERGE_GAP_SERVER_BYTES: u64 = 1 << 20;

/// The same on a disk with moving heads. Not measured: at 200 MB/s it takes 5 ms, less than a seek.
pub(crate) const MERGE_GAP_DISK_BYTES: u64 = 1 << 20;

/// The smallest gap that a profile's rate gives, in bytes. Not measured: a page, which is read whole anyway.
pub(crate) const MERGE_GAP_MIN_BYTES: u64 = 4 << 10;

/// The largest gap that a profile's rate gives, in bytes. Not measured: that of a server.
pub(crate) const MERGE_GAP_MAX_BYTES: u64 = 1 << 20;

/// What one more read costs a device that is kept busy, in nanoseconds. Not measured: 40,000 reads a second, which
/// most do.
pub(crate) const DEVICE_OPERATION_NS: u64 = 25_000;

/// What one more call costs that copies from memory, in nanoseconds. Not measured.
pub(crate) const CALL_NS: u64 = 1_500;

/// Per cent by which another way must have been measured to be faster to displace the constants' choice: what
/// the times of one and the same case vary by on a quiet machine.
pub(crate) const PROFILE_MARGIN_PERCENT: u64 = 3;

/// Total bytes from which a measured profile applies: below, opening and starting threads outweigh what it
/// measured.
pub(crate) const PROFILE_MIN_READ_BYTES: u64 = 64 << 20;

/// Mean bytes per request from which it applies: what was measured are long extents, cut into chunks.
pub(crate) const PROFILE_MIN_MEAN_REQUEST_BYTES: u64 = 1 << 20;

/// Per cent of the files' bytes in the page cache from which times of half-resident files count, and below
/// which those of cold ones do: half-way between the two. Without a profile, loads of any size are mapped from here on, where
/// that is allowed; other shares than a half were not measured. With half of the files there, direct reads and copies took
/// 1.51 and 1.40 times as long as a mapping by the two clocks (q06, 30 rounds,
/// benches/runs/2026-11-29-2cpu-23gib-ext4-paired/run.json), 1.80 and 1.43 times (6.2 GB, 7 rounds,
/// benches/runs/2026-11-23-2cpu-23gib-ext4-matrix/run.json), and 1.82 and 1.63 times (q8, 7 rounds,
/// benches/runs/2026-11-28-2cpu-23gib-ext4-deeper/run.json).
pub(crate) const PROFILE_HALF_PERCENT: u64 = 25;

/// Where the figures in explanations come from: each names the archived run in which it was measured.
pub(crate) mod evidence {
    /// The run from before there was a harness.
    macro_rules! hand_measurements {
        () => {
            "benches/runs/2026-11-hand-measurements.md"
        };
    }

    /// Rings against threads, large and cold.
    pub(crate) const LARGE: &str = concat!(
        "16.4 GB in 5 shards took 7.4 to 8.4 s with rings and 8.0 to 9.8 s with threads, ",
        hand_measurements!()
    );
    /// Rings against threads, small and cold.
    pub(crate) const SMALL: &str = concat!(
        "1.5 GB in 1 shard took 0.59 to 0.63 s with threads and 0.59 to 0.71 s with rings, ",
        hand_measurements!()
    );
    /// Rings against threads, small and cold, partitioned.
    pub(crate) const PARTITIONS: &str = concat!(
        "1.5 GB in 8 partitions took 0.62 s with direct threads and 0.65 s with rings, ",
        hand_measurements!()
    );
    macro_rules! matrix {
        () => {
            "benches/runs/2026-11-23-2cpu-23gib-ext4-matrix/run.json"
        };
    }
    macro_rules! deeper {
        () => {
            "benches/runs/2026-11-28-2cpu-23gib-ext4-deeper/run.json"
        };
    }
    macro_rules! paired {
        () => {
            "benches/runs/2026-11-29-2cpu-23gib-ext4-paired/run.json"
        };
    }

    /// Copying out of a mapping against reading, cold.
    pub(crate) const COLD_COPY_OF_MAPPING: &str = concat!(
        "1.5 and 6.2 GB took 2.4 to 2.8 times as long as read directly, ",
        matrix!()
    );
    /// Mapping against reading, cold, small enough to be mapped.
    pub(crate) const COLD_MAPPING_LEADS: &str = concat!(
        "reading 1.5 and 6.2 GB took 1.10 and 1.27 times as long as mapping them, 1.01 and 1.12 times with \
         each byte read once more, ",
        matrix!()
    );
    /// Mapping against reading, half-resident.
    pub(crate) const HALF_MAPPING_LEADS: &str = concat!(
        "with half of 1.5, 6.2 and 16.4 GB there, reading took 1.51, 1.80 and 1.82 times as long as mapping, 1.40, \
         1.43 and 1.63 times with each byte read once more, ",
        paired!(),
        ", ",
        matrix!(),
        " and ",
        deeper!()
    );
    /// Rings against threads, half-resident and large.
    pub(crate) const HALF_RINGS_TRAIL: &str = concat!(
        "with half of 6.2 GB there, rings took 1.17 times as long as threads, ",
        matrix!()
    );
    /// Mapping against reading, cold and large.
    pub(crate) const COLD_MAPPING: &str = concat!(
        "reading 16.4 GB took 1.02 times as long as mapping them, 0.93 times with each byte read once more, ",
        deeper!()
    );
    /// What bringing the files into the page cache costs.
    pub(crate) const KEEPING: &str = concat!(
        "16.4 GB took 11 to 14 s mapped, 15 to 17 s read through the page cache and 7.4 to 9.8 s read \
         directly, ",
        hand_measurements!()
    );
    /// Mapping against copying against reading, warm.
    pub(crate) const WARM: &str = concat!(
        "1.5 GB took 0.012 s mapped, 0.24 s copied and 0.75 s read directly, ",
        hand_measurements!()
    );
}
