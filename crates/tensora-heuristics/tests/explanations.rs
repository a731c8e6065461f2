//! What the planner says, as people and as programs read it.

mod common;

use common::{five_shards, on_nfs, one_shard, platform, ranges, resident, without};
use expect_test::{Expect, expect};
use tensora_heuristics::{
    BackendChoice, DirectChoice, MappingConsent, MemoryChoice, Policy, SharedWorkload,
    StorageLayout, Workload, plan, plan_stream,
};
use tensora_io::{
    BackendKind, CacheState, DirectPolicy, Measurement, MemoryKind, Platform, Profile, ProfileFact,
    ProfileIdentity, ResidentPolicy, TransferParams,
};

#[track_caller]
fn explains(workload: &Workload, platform: &Platform, policy: &Policy, expected: &Expect) {
    let plan = plan(workload, platform, policy).expect("there is a plan");
    expected.assert_eq(&plan.to_string());
}

#[test]
fn large_and_cold() {
    explains(
        &five_shards(),
        &platform(2),
        &Policy::default(),
        &expect![[r#"
            plan         io-uring, owned memory: 2 rings of depth 16, chunks of 2 MiB, direct.
            load         15.26 GiB from 5 shards of SafeTensors, whole files: 399 tensors in 5 requests.
            where        ext4 on nvme0n1, 0 % of the files in the page cache; 2 CPUs; 24 GiB of memory left
                         (machine).

            memory       owned. It fits: with the reads under way the tensors take 15.29 GiB, and the machine
                         leaves 24 GiB.
                         Not mapped: the caller has not taken on the contract of mappings.

            backend      io-uring. 15.26 GiB in 5 shards is a large load, 4 GB (3.73 GiB) or more, and large
                         loads favour rings (16.4 GB in 5 shards took 7.4 to 8.4 s with rings and 8.0 to 9.8 s
                         with threads, benches/runs/2026-11-hand-measurements.md).
                         Not sync: threads trail by a few per cent.
                         Not async: it makes the same reads as sync, each handed to Tokio's blocking pool first.
                         Not mmap: for owned memory it copies out of the page cache, after filling that (1.5 and
                         6.2 GB took 2.4 to 2.8 times as long as read directly,
                         benches/runs/2026-11-23-2cpu-23gib-ext4-matrix/run.json).

            direct       preferred. The files are not in the page cache. The storage supports direct I/O, and
                         direct reads saturate the device.
                         Not buffered: reading through the page cache costs a second copy and reaches a part of
                         the device's speed only.

            resident     reread. There is nothing in the page cache to copy.

            chunk        2 MiB. Long enough for the device's full speed, short enough to keep many in flight.

            workers      2. One ring alone starves while its destination pages are faulted in; beyond a few
                         there is nothing left to gain.

            queue depth  16. Together the rings keep the device's queue full.
        "#]],
    );
}

#[test]
fn large_where_rings_are_blocked() {
    explains(
        &five_shards(),
        &without(platform(2), &[BackendKind::IoUring]),
        &Policy::default(),
        &expect![[r#"
            plan         sync, owned memory: 16 threads, chunks of 2 MiB, direct.
            load         15.26 GiB from 5 shards of SafeTensors, whole files: 399 tensors in 5 requests.
            where        ext4 on nvme0n1, 0 % of the files in the page cache; 2 CPUs; 24 GiB of memory left
                         (machine).

            memory       owned. It fits: with the reads under way the tensors take 15.29 GiB, and the machine
                         leaves 24 GiB.
                         Not mapped: the caller has not taken on the contract of mappings.

            backend      sync. 15.26 GiB in 5 shards is a large load, 4 GB (3.73 GiB) or more, and large loads
                         favour rings (16.4 GB in 5 shards took 7.4 to 8.4 s with rings and 8.0 to 9.8 s with
                         threads, benches/runs/2026-11-hand-measurements.md). That speaks for io-uring, which
                         cannot be used; sync is the next in order of preference.
                         Not io-uring: it cannot run here: io-uring is blocked (unblock io-uring).
                         Not async: it makes the same reads as sync, each handed to Tokio's blocking pool first.
                         Not mmap: for owned memory it copies out of the page cache, after filling that (1.5 and
                         6.2 GB took 2.4 to 2.8 times as long as read directly,
                         benches/runs/2026-11-23-2cpu-23gib-ext4-matrix/run.json).

            direct       preferred. The files are not in the page cache. The storage supports direct I/O, and
                         direct reads saturate the device.
                         Not buffered: reading through the page cache costs a second copy and reaches a part of
                         the device's speed only.

            resident     reread. There is nothing in the page cache to copy.

            chunk        2 MiB. Long enough for the device's full speed, short enough to keep many in flight.

            workers      16. They wait for the device rather than compute, so the device's queue decides, not
                         the CPUs.

            queue depth  1. Only rings keep more than one read in flight per worker.
        "#]],
    );
}

#[test]
fn small_and_warm() {
    explains(
        &one_shard(),
        &resident(990),
        &Policy::default(),
        &expect![[r#"
            plan         sync, owned memory: 4 threads, chunks of 4 MiB, buffered.
            load         1.4 GiB from 1 shard of SafeTensors, whole files: 399 tensors in 1 request.
            where        ext4 on nvme0n1, 99 % of the files in the page cache; 2 CPUs; 24 GiB of memory left
                         (machine).

            memory       owned. It fits: with the reads under way the tensors take 1.43 GiB, and the machine
                         leaves 24 GiB.
                         Not mapped: the caller has not taken on the contract of mappings.

            backend      sync. 99 % of the files is in the page cache. What is left to do is a copy, and threads
                         spread it over the CPUs.
                         Not async: it makes the same reads as sync, each handed to Tokio's blocking pool first.
                         Not io-uring: there is no device to keep busy, or hardly, only a copy to spread over
                         the CPUs.
                         Not mmap: for owned memory it adds a mapping to the same copy.

            direct       never. Reads go through the page cache.
                         Not direct: it would fetch from the device what is in the page cache already (1.5 GB
                         took 0.012 s mapped, 0.24 s copied and 0.75 s read directly,
                         benches/runs/2026-11-hand-measurements.md).

            resident     copy. Buffered reads take from the page cache what is in it.

            chunk        4 MiB. Through the page cache, longer reads save calls and keep read-ahead going.

            workers      4. Going through the page cache is a copy, and so work for the 2 CPUs; with twice as
                         many threads none of them idles while pages are faulted in.

            queue depth  1. Only rings keep more than one read in flight per worker.
        "#]],
    );
}

#[test]
fn small_and_warm_with_consent() {
    let mut policy = Policy::default();
    policy.mapping = MappingConsent::Granted;
    explains(
        &one_shard(),
        &resident(1000),
        &policy,
        &expect![[r#"
            plan         mmap, mapped memory: 2 workers, chunks of 4 MiB, through the page cache.
            load         1.4 GiB from 1 shard of SafeTensors, whole files: 399 tensors in 1 request.
            where        ext4 on nvme0n1, 100 % of the files in the page cache; 2 CPUs; 24 GiB of memory left
                         (machine).

            memory       mapped. The files are in the page cache. Mappings are allowed, so the tensors are used
                         where they are.
                         Not owned: it would copy what can be used in place (1.5 GB took 0.012 s mapped, 0.24 s
                         copied and 0.75 s read directly, benches/runs/2026-11-hand-measurements.md).

            backend      mmap. Mapped memory comes from the mmap backend only.

            direct       never. A mapping is the page cache itself.

            chunk        4 MiB. Two huge pages: enough to save calls, little enough to share out evenly.

            workers      2. The pages are in memory: populating only enters them into page tables, which is work
                         for the 2 CPUs.

            queue depth  1. Only rings keep more than one read in flight per worker.
        "#]],
    );
}

#[test]
fn cold_with_consent() {
    let mut policy = Policy::default();
    policy.mapping = MappingConsent::Granted;
    explains(
        &one_shard(),
        &resident(0),
        &policy,
        &expect![[r#"
            plan         mmap, mapped memory: 8 workers, chunks of 4 MiB, through the page cache.
            load         1.4 GiB from 1 shard of SafeTensors, whole files: 399 tensors in 1 request.
            where        ext4 on nvme0n1, 0 % of the files in the page cache; 2 CPUs; 24 GiB of memory left
                         (machine).

            memory       mapped. The files are not in the page cache. Mappings are allowed, and up to 8 GB (7.45
                         GiB) it pays to fill the page cache and use the tensors there, since no other memory
                         has to be zeroed and filled (reading 1.5 and 6.2 GB took 1.10 and 1.27 times as long as
                         mapping them, 1.01 and 1.12 times with each byte read once more,
                         benches/runs/2026-11-23-2cpu-23gib-ext4-matrix/run.json).
                         Not owned: it would copy what can be used in place.

            backend      mmap. Mapped memory comes from the mmap backend only.

            direct       never. A mapping is the page cache itself.

            chunk        4 MiB. Two huge pages: enough to save calls, little enough to share out evenly.

            workers      8. Populating waits for the device, so more workers than CPUs keep that busy.

            queue depth  1. Only rings keep more than one read in flight per worker.
        "#]],
    );
}

#[test]
fn half_resident_with_consent() {
    let mut policy = Policy::default();
    policy.mapping = MappingConsent::Granted;
    explains(
        &one_shard(),
        &resident(500),
        &policy,
        &expect![[r#"
            plan         mmap, mapped memory: 8 workers, chunks of 4 MiB, through the page cache.
            load         1.4 GiB from 1 shard of SafeTensors, whole files: 399 tensors in 1 request.
            where        ext4 on nvme0n1, 50 % of the files in the page cache; 2 CPUs; 24 GiB of memory left
                         (machine).

            memory       mapped. 50 % of the files is in the page cache. Mappings are allowed, and it pays to
                         bring the rest there and use the tensors there, since no other memory has to be zeroed
                         and filled (with half of 1.5, 6.2 and 16.4 GB there, reading took 1.51, 1.80 and 1.82
                         times as long as mapping, 1.40, 1.43 and 1.63 times with each byte read once more,
                         benches/runs/2026-11-29-2cpu-23gib-ext4-paired/run.json,
                         benches/runs/2026-11-23-2cpu-23gib-ext4-matrix/run.json and
                         benches/runs/2026-11-28-2cpu-23gib-ext4-deeper/run.json).
                         Not owned: it would copy what can be used in place.

            backend      mmap. Mapped memory comes from the mmap backend only.

            direct       never. A mapping is the page cache itself.

            chunk        4 MiB. Two huge pages: enough to save calls, little enough to share out evenly.

            workers      8. Populating waits for the device, so more workers than CPUs keep that busy.

            queue depth  1. Only rings keep more than one read in flight per worker.
        "#]],
    );
}

#[test]
fn selected_ranges() {
    let workload = ranges(StorageLayout::ServerlessLlm, 8, 40, 40 * 300_000);
    explains(
        &workload,
        &platform(2),
        &Policy::default(),
        &expect![[r#"
            plan         async, owned memory: 16 tasks, chunks of 512 KiB, direct.
            load         11.44 MiB from 8 partitions of ServerlessLLM, ranges: 399 tensors in 40 requests.
            where        ext4 on nvme0n1, 0 % of the files in the page cache; 2 CPUs; 24 GiB of memory left
                         (machine).

            memory       owned. It fits: with the reads under way the tensors take 22.89 MiB, and the machine
                         leaves 24 GiB.
                         Not mapped: the caller has not taken on the contract of mappings.

            backend      async. These are ranges of a ServerlessLLM directory, 40 extents in 8 partitions; tasks
                         grouped per file read each partition's ranges together.
                         Not sync: its one queue takes the extents as they come, where tasks keep those of one
                         file together.
                         Not io-uring: rings are for long batches; the regime table keeps them for whole
                         checkpoints.
                         Not mmap: for owned memory it copies out of the page cache, after filling that (1.5 and
                         6.2 GB took 2.4 to 2.8 times as long as read directly,
                         benches/runs/2026-11-23-2cpu-23gib-ext4-matrix/run.json).

            direct       preferred. The files are not in the page cache. The storage supports direct I/O, and
                         direct reads saturate the device.
                         Not buffered: reading through the page cache costs a second copy and reaches a part of
                         the device's speed only.

            resident     reread. There is nothing in the page cache to copy.

            chunk        512 KiB. No request is longer than 292.97 KiB, so longer chunks would never be filled.

            workers      16. They wait for the device rather than compute, so the device's queue decides, not
                         the CPUs.

            queue depth  1. Only rings keep more than one read in flight per worker.
        "#]],
    );
}

#[test]
fn behind_a_server() {
    explains(
        &one_shard(),
        &on_nfs(),
        &Policy::default(),
        &expect![[r#"
            plan         sync, owned memory: 4 threads, chunks of 8 MiB, buffered.
            load         1.4 GiB from 1 shard of SafeTensors, whole files: 399 tensors in 1 request.
            where        nfs, 0 % of the files in the page cache; 2 CPUs; 24 GiB of memory left (machine).

            memory       owned. It fits: with the reads under way the tensors take 1.43 GiB, and the machine
                         leaves 24 GiB.
                         Not mapped: the caller has not taken on the contract of mappings.

            backend      sync. The files are behind a server (nfs). A few threads, each with a long sequence to
                         read, suit it best.
                         Not async: it makes the same reads as sync, each handed to Tokio's blocking pool first.
                         Not io-uring: many reads at once are what a server behind a file system handles worst.
                         Not mmap: for owned memory it copies out of the page cache, after filling that (1.5 and
                         6.2 GB took 2.4 to 2.8 times as long as read directly,
                         benches/runs/2026-11-23-2cpu-23gib-ext4-matrix/run.json).

            direct       never. Reads go through the page cache.
                         Not direct: a server's files gain from read-ahead, which direct reads do without.

            resident     copy. Buffered reads take from the page cache what is in it.

            chunk        8 MiB. Long sequential reads suit a server.

            workers      4. A few reads at once hide the round trip; more make the server seek.

            queue depth  1. Only rings keep more than one read in flight per worker.
        "#]],
    );
}

#[test]
fn everything_named() {
    let mut policy = Policy::default();
    policy.backend = BackendChoice::Named(BackendKind::Async);
    policy.memory = MemoryChoice::Owned;
    policy.direct = DirectChoice::Policy(DirectPolicy::Never);
    policy.chunk_bytes = Some(512 << 10);
    policy.queue_depth = Some(4);
    policy.workers = Some(3);
    explains(
        &five_shards(),
        &platform(2),
        &policy,
        &expect![[r#"
            plan         async, owned memory: 3 tasks, chunks of 512 KiB, buffered.
            load         15.26 GiB from 5 shards of SafeTensors, whole files: 399 tensors in 5 requests.
            where        ext4 on nvme0n1, 0 % of the files in the page cache; 2 CPUs; 24 GiB of memory left
                         (machine).

            memory       owned. It was asked for. It fits: with the reads under way the tensors take 15.29 GiB,
                         and the machine leaves 24 GiB.

            backend      async. It was named.
                         Not io-uring: async was named. Left to the planner: 15.26 GiB in 5 shards is a large
                         load, 4 GB (3.73 GiB) or more, and large loads favour rings (16.4 GB in 5 shards took
                         7.4 to 8.4 s with rings and 8.0 to 9.8 s with threads,
                         benches/runs/2026-11-hand-measurements.md).

            direct       never. It was asked for.

            resident     copy. Buffered reads take from the page cache what is in it.

            chunk        512 KiB. It was set.
                         Not 8 MiB: another value was set. Through a cold page cache, long reads keep read-ahead
                         going.

            workers      3. It was set.
                         Not 8: another value was set. Each waits for what the page cache has to fetch, so more
                         than there are CPUs keep the device busy.

            queue depth  1. Only rings keep more than one read in flight per worker.
                         Not 4: it was set, but has no effect without rings.
        "#]],
    );
}

#[test]
fn as_json() {
    let plan = plan(&one_shard(), &platform(2), &Policy::default()).expect("there is a plan");
    let mut json = serde_json::to_value(&plan).expect("plans serialize");
    // The facts have a shape of their own, which tensora-io decides.
    json["platform"] = "as given".into();
    let json = serde_json::to_string_pretty(&json).expect("values serialize");
    expect![[r#"
        {
          "backend": "sync",
          "chunk_bytes": 2097152,
          "decisions": [
            {
              "chosen": "owned",
              "field": "memory",
              "reason": "It fits: with the reads under way the tensors take 1.43 GiB, and the machine leaves 24 GiB.",
              "rejected": [
                {
                  "choice": "mapped",
                  "reason": "the caller has not taken on the contract of mappings"
                }
              ]
            },
            {
              "chosen": "sync",
              "field": "backend",
              "reason": "1.4 GiB in 1 shard: threads are at least as fast as rings on one shard (1.5 GB in 1 shard took 0.59 to 0.63 s with threads and 0.59 to 0.71 s with rings, benches/runs/2026-11-hand-measurements.md).",
              "rejected": [
                {
                  "choice": "async",
                  "reason": "it makes the same reads as sync, each handed to Tokio's blocking pool first"
                },
                {
                  "choice": "io-uring",
                  "reason": "rings lead, by a few per cent, only from 4 GB (3.73 GiB) in several files on"
                },
                {
                  "choice": "mmap",
                  "reason": "for owned memory it copies out of the page cache, after filling that (1.5 and 6.2 GB took 2.4 to 2.8 times as long as read directly, benches/runs/2026-11-23-2cpu-23gib-ext4-matrix/run.json)"
                }
              ]
            },
            {
              "chosen": "preferred",
              "field": "direct",
              "reason": "The files are not in the page cache. The storage supports direct I/O, and direct reads saturate the device.",
              "rejected": [
                {
                  "choice": "never",
                  "reason": "reading through the page cache costs a second copy and reaches a part of the device's speed only"
                }
              ]
            },
            {
              "chosen": "reread",
              "field": "resident",
              "reason": "There is nothing in the page cache to copy.",
              "rejected": []
            },
            {
              "chosen": "2097152",
              "field": "chunk_bytes",
              "reason": "Long enough for the device's full speed, short enough to keep many in flight.",
              "rejected": []
            },
            {
              "chosen": "16",
              "field": "workers",
              "reason": "They wait for the device rather than compute, so the device's queue decides, not the CPUs.",
              "rejected": []
            },
            {
              "chosen": "1",
              "field": "queue_depth",
              "reason": "Only rings keep more than one read in flight per worker.",
              "rejected": []
            }
          ],
          "direct": true,
          "direct_policy": "preferred",
          "drop_limit_bytes": null,
          "memory": "owned",
          "platform": "as given",
          "policy": {
            "backend": "auto",
            "cache": "auto",
            "chunk_bytes": null,
            "direct": "auto",
            "mapping": "denied",
            "memory": "auto",
            "memory_limit_bytes": null,
            "queue_depth": null,
            "workers": null
          },
          "queue_depth": 1,
          "resident": "reread",
          "sharing": null,
          "window_limit_bytes": 0,
          "workers": 16,
          "workload": {
            "access": "whole-files",
            "destination_bytes": 1503264768,
            "files": 1,
            "gathered_bytes": 0,
            "gathered_tensors": 0,
            "index_bytes": 0,
            "indivisible_bytes": 0,
            "largest_request_bytes": 1503264768,
            "layout": "safetensors",
            "needed_bytes": 0,
            "read_bytes": 1503264768,
            "requests": 1,
            "shared": null,
            "tensors": 399
          }
        }"#]].assert_eq(&json);
}

#[test]
fn an_estimate_is_called_one() {
    let mut platform = resident(1000);
    if let Some(storage) = &mut platform.storage {
        storage.resident_is_estimate = true;
    }
    let plan = plan(&one_shard(), &platform, &Policy::default()).expect("there is a plan");
    let text = plan.to_string();
    assert!(
        text.contains("100 % (by a sample) of the files in the page cache"),
        "{text}"
    );
}

#[test]
fn half_resident() {
    explains(
        &five_shards(),
        &resident(500),
        &Policy::default(),
        &expect![[r#"
            plan         sync, owned memory: 16 threads, chunks of 2 MiB, direct, what is in the page cache
                         copied.
            load         15.26 GiB from 5 shards of SafeTensors, whole files: 399 tensors in 5 requests.
            where        ext4 on nvme0n1, 50 % of the files in the page cache; 2 CPUs; 24 GiB of memory left
                         (machine).

            memory       owned. It fits: with the reads under way the tensors take 15.29 GiB, and the machine
                         leaves 24 GiB.
                         Not mapped: the caller has not taken on the contract of mappings.

            backend      sync. 50 % of the files is in the page cache. Threads copy that part while other
                         threads wait for the device, which was faster than rings (with half of 6.2 GB there,
                         rings took 1.17 times as long as threads,
                         benches/runs/2026-11-23-2cpu-23gib-ext4-matrix/run.json).
                         Not async: it makes the same reads as sync, each handed to Tokio's blocking pool first.
                         Not io-uring: a ring's worker submits nothing while it copies what is in memory (with
                         half of 6.2 GB there, rings took 1.17 times as long as threads,
                         benches/runs/2026-11-23-2cpu-23gib-ext4-matrix/run.json).
                         Not mmap: for owned memory it copies out of the page cache, after filling that (1.5 and
                         6.2 GB took 2.4 to 2.8 times as long as read directly,
                         benches/runs/2026-11-23-2cpu-23gib-ext4-matrix/run.json).

            direct       preferred. 50 % of the files is in the page cache. The storage supports direct I/O, and
                         direct reads saturate the device.
                         Not buffered: reading through the page cache costs a second copy and reaches a part of
                         the device's speed only.

            resident     copy. 50 % of the files is in the page cache. Those chunks are copied at the speed of
                         memory while the others are read directly.
                         Not reread: the device would deliver again, more slowly, what is in memory already.

            chunk        2 MiB. Long enough for the device's full speed, short enough to keep many in flight.

            workers      16. They wait for the device rather than compute, so the device's queue decides, not
                         the CPUs.

            queue depth  1. Only rings keep more than one read in flight per worker.
        "#]],
    );
}

#[test]
fn crowded() {
    let mut platform = resident(1000);
    if let Some(storage) = &mut platform.storage {
        storage.file_bytes = five_shards().read_bytes;
        storage.resident_bytes = Some(storage.file_bytes);
    }
    explains(
        &five_shards(),
        &platform,
        &Policy::default(),
        &expect![[r#"
            plan         sync, owned memory: 4 threads, chunks of 4 MiB, direct, what is in the page cache
                         copied and dropped.
            load         15.26 GiB from 5 shards of SafeTensors, whole files: 399 tensors in 5 requests.
            where        ext4 on nvme0n1, 100 % of the files in the page cache; 2 CPUs; 24 GiB of memory left
                         (machine).

            memory       owned. It fits: with the reads under way the tensors take 15.29 GiB, and the machine
                         leaves 24 GiB.
                         Not mapped: the caller has not taken on the contract of mappings.

            backend      sync. The files are in the page cache. What is left to do is a copy, and threads spread
                         it over the CPUs.
                         Not async: it makes the same reads as sync, each handed to Tokio's blocking pool first.
                         Not io-uring: there is no device to keep busy, or hardly, only a copy to spread over
                         the CPUs.
                         Not mmap: for owned memory it adds a mapping to the same copy.

            direct       preferred. What the kernel drops from the page cache before it is copied is read from
                         the device, at full speed.
                         Not buffered: reading through the page cache costs a second copy and reaches a part of
                         the device's speed only.

            resident     copy-and-drop. The files are in the page cache. That and the tensors do not fit into
                         memory together. Each chunk that is there is copied and then dropped, 8.01 GiB in all,
                         so that filling the destination does not make the kernel drop chunks that are not
                         copied yet.
                         Not reread: the device would deliver again, more slowly, what is in memory already.

            chunk        4 MiB. Through the page cache, longer reads save calls and keep read-ahead going.

            workers      4. Going through the page cache is a copy, and so work for the 2 CPUs; with twice as
                         many threads none of them idles while pages are faulted in.

            queue depth  1. Only rings keep more than one read in flight per worker.
        "#]],
    );
}

#[test]
fn measured() {
    let mut platform = platform(2);
    let way = |backend, workers, queue_depth, elapsed_us| Measurement {
        cache: CacheState::Cold,
        memory: MemoryKind::Owned,
        backend,
        params: TransferParams {
            chunk_bytes: 1 << 20,
            queue_depth,
            workers,
            direct: DirectPolicy::Preferred,
            resident: ResidentPolicy::Reread,
        },
        bytes: 1 << 30,
        elapsed_us,
    };
    platform.profile = ProfileFact::Matching(Box::new(Profile {
        version: Profile::VERSION,
        made_by: "0.1.0".to_owned(),
        made_at_unix_s: 1_795_440_000,
        identity: ProfileIdentity::of(&platform).expect("the base has storage"),
        measurements: vec![
            way(BackendKind::Sync, 16, 1, vec![500_000, 510_000, 520_000]),
            way(BackendKind::IoUring, 2, 32, vec![440_000, 450_000, 460_000]),
        ],
    }));
    explains(
        &one_shard(),
        &platform,
        &Policy::default(),
        &expect![[r#"
            plan         io-uring, owned memory: 2 rings of depth 32, chunks of 1 MiB, direct.
            load         1.4 GiB from 1 shard of SafeTensors, whole files: 399 tensors in 1 request.
            where        ext4 on nvme0n1, 0 % of the files in the page cache; 2 CPUs; 24 GiB of memory left
                         (machine).

            memory       owned. It fits: with the reads under way the tensors take 1.43 GiB, and the machine
                         leaves 24 GiB.
                         Not mapped: the caller has not taken on the contract of mappings.

            backend      io-uring. Measured here on 2026-11-23: io-uring 2 × 32 × 1 MiB direct 2.4 GB/s. What
                         the constants say was not measured.
                         Not sync: the best that was measured of it here is sync 16 × 1 MiB direct 2.1 GB/s.
                         Not async: it was not measured here for such a load.
                         Not mmap: it was not measured here for such a load.

            direct       preferred. The files are not in the page cache. The storage supports direct I/O, and
                         direct reads saturate the device.
                         Not buffered: reading through the page cache costs a second copy and reaches a part of
                         the device's speed only.

            resident     reread. There is nothing in the page cache to copy.

            chunk        1 MiB. As measured: see backend and profile.

            workers      2. As measured: see backend and profile.

            queue depth  32. As measured: see backend and profile.

            profile      used. It is of this machine and place and knows loads like this one; of what it
                         measured on 2026-11-23, io-uring 2 × 32 × 1 MiB direct was the fastest.
        "#]],
    );
}

#[track_caller]
fn explains_stream(workload: &Workload, platform: &Platform, policy: &Policy, expected: &Expect) {
    let plan = plan_stream(workload, platform, policy).expect("there is a plan");
    expected.assert_eq(&plan.to_string());
}

/// Column slices of every other tensor for one of four ranks.
fn rank_of_four() -> Workload {
    let mut workload = ranges(StorageLayout::SafeTensors, 2, 700, 7_000_000_000);
    workload.tensors = 326;
    workload.needed_bytes = 4_000_000_000;
    workload.destination_bytes = 4_000_000_000;
    workload.index_bytes = 3 << 20;
    workload.gathered_tensors = 72;
    workload.gathered_bytes = 1_000_000_000;
    workload.shared = Some(SharedWorkload::new(4, 6_000_000_000, 2_000_000_000));
    workload
}

#[test]
fn stream_with_threads() {
    let mut workload = one_shard();
    workload.index_bytes = 400_000;
    explains_stream(
        &workload,
        &platform(2),
        &Policy::default(),
        &expect![[r#"
            plan         sync, 32 buffers of 4 MiB: 16 readers, chunks of 2 MiB, direct.
            stream       1.4 GiB from 1 shard of SafeTensors, whole files: 399 tensors in 1 request.
            where        ext4 on nvme0n1, 0 % of the files in the page cache; 2 CPUs; 24 GiB of memory left
                         (machine).

            memory       134.38 MiB. 32 buffers of 4 MiB take 128 MiB, unaligned ends of files up to 6 MiB, and
                         the index 390.63 KiB. The default limit of a stream allows 256 MiB.

            backend      sync. 1.4 GiB in 1 shard: threads are at least as fast as rings on one shard (1.5 GB in
                         1 shard took 0.59 to 0.63 s with threads and 0.59 to 0.71 s with rings,
                         benches/runs/2026-11-hand-measurements.md). That was measured of loads; streams are
                         taken to be alike.
                         Not async: it makes the same reads as sync, each handed to Tokio's blocking pool first.
                         Not io-uring: rings lead, by a few per cent, only from 4 GB (3.73 GiB) in several files
                         on.
                         Not mmap: for owned memory it copies out of the page cache, after filling that (1.5 and
                         6.2 GB took 2.4 to 2.8 times as long as read directly,
                         benches/runs/2026-11-23-2cpu-23gib-ext4-matrix/run.json).

            direct       preferred. The files are not in the page cache. The storage supports direct I/O, and
                         direct reads saturate the device.
                         Not buffered: reading through the page cache costs a second copy and reaches a part of
                         the device's speed only.

            resident     reread. There is nothing in the page cache to copy.

            chunk        2 MiB. Long enough for the device's full speed, short enough to keep many in flight.

            readers      16. Each reads its window from beginning to end; together they keep the device's queue
                         full.

            queue depth  1. Only rings keep more than one read in flight per reader.

            buffer       4 MiB. A few reads long, so that readers seldom change windows, and short enough to
                         have many.

            buffers      32. Some are filled while others wait, or are with the consumer.
        "#]],
    );
}

#[test]
fn stream_with_rings_in_little_memory() {
    let mut policy = Policy::default();
    policy.memory_limit_bytes = Some(24 << 20);
    policy.workers = Some(3);
    explains_stream(
        &five_shards(),
        &platform(2),
        &policy,
        &expect![[r#"
            plan         io-uring, 5 buffers of 4 MiB: 3 rings of depth 4, chunks of 1 MiB, direct.
            stream       15.26 GiB from 5 shards of SafeTensors, whole files: 399 tensors in 5 requests.
            where        ext4 on nvme0n1, 0 % of the files in the page cache; 2 CPUs; 24 GiB of memory left
                         (machine).

            memory       21.13 MiB. 5 buffers of 4 MiB take 20 MiB, unaligned ends of files up to 1.13 MiB, and
                         the index 0 bytes. The memory limit that was set allows 24 MiB.

            backend      io-uring. 15.26 GiB in 5 shards is a large load, 4 GB (3.73 GiB) or more, and large
                         loads favour rings (16.4 GB in 5 shards took 7.4 to 8.4 s with rings and 8.0 to 9.8 s
                         with threads, benches/runs/2026-11-hand-measurements.md). That was measured of loads;
                         streams are taken to be alike.
                         Not sync: threads trail by a few per cent.
                         Not async: it makes the same reads as sync, each handed to Tokio's blocking pool first.
                         Not mmap: for owned memory it copies out of the page cache, after filling that (1.5 and
                         6.2 GB took 2.4 to 2.8 times as long as read directly,
                         benches/runs/2026-11-23-2cpu-23gib-ext4-matrix/run.json).

            direct       preferred. The files are not in the page cache. The storage supports direct I/O, and
                         direct reads saturate the device.
                         Not buffered: reading through the page cache costs a second copy and reaches a part of
                         the device's speed only.

            resident     reread. There is nothing in the page cache to copy.

            chunk        1 MiB. Long enough for the device's full speed, short enough to keep many in flight.

            readers      3. It was set.
                         Not 2: another value was set. While one ring runs out of its window's reads, the others
                         keep the device's queue full.

            queue depth  4. A window has no more than 4 chunks.

            buffer       4 MiB. Not enough larger ones fit into the limit.

            buffers      5. No more of them fit into the limit.
        "#]],
    );
}

#[test]
fn stream_of_what_cannot_be_divided() {
    let mut workload = ranges(StorageLayout::ServerlessLlm, 8, 40, 40 * 30_000_000);
    workload.needed_bytes = 1_100_000_000;
    workload.indivisible_bytes = 30_000_000;
    explains_stream(
        &workload,
        &resident(500),
        &Policy::default(),
        &expect![[r#"
            plan         sync, 8 buffers of 28.69 MiB: 4 readers, chunks of 2 MiB, direct, what is in the page
                         cache copied.
            stream       1.12 GiB from 8 partitions of ServerlessLLM, ranges: 399 tensors in 40 requests.
            where        ext4 on nvme0n1, 50 % of the files in the page cache; 2 CPUs; 24 GiB of memory left
                         (machine).

            memory       231 MiB. 8 buffers of 28.69 MiB take 229.5 MiB, unaligned ends of files up to 1.5 MiB,
                         and the index 0 bytes. The default limit of a stream allows 256 MiB.

            backend      sync. 1.12 GiB in 8 partitions is below 4 GB (3.73 GiB), where threads are at least as
                         fast as rings (1.5 GB in 8 partitions took 0.62 s with direct threads and 0.65 s with
                         rings, benches/runs/2026-11-hand-measurements.md). That was measured of loads; streams
                         are taken to be alike.
                         Not async: it makes the same reads as sync, each handed to Tokio's blocking pool first.
                         Not io-uring: rings have no lead at this size (1.5 GB in 8 partitions took 0.62 s with
                         direct threads and 0.65 s with rings, benches/runs/2026-11-hand-measurements.md).
                         Not mmap: for owned memory it copies out of the page cache, after filling that (1.5 and
                         6.2 GB took 2.4 to 2.8 times as long as read directly,
                         benches/runs/2026-11-23-2cpu-23gib-ext4-matrix/run.json).

            direct       preferred. 50 % of the files is in the page cache. The storage supports direct I/O, and
                         direct reads saturate the device.
                         Not buffered: reading through the page cache costs a second copy and reaches a part of
                         the device's speed only.

            resident     copy. 50 % of the files is in the page cache. Those chunks are copied at the speed of
                         memory while the others are read directly.
                         Not reread: the device would deliver again, more slowly, what is in memory already.

            chunk        2 MiB. Long enough for the device's full speed, short enough to keep many in flight.

            readers      4. The limit has room for 8 buffers of 28.69 MiB, which keep no more of them busy.

            queue depth  1. Only rings keep more than one read in flight per reader.

            buffer       28.69 MiB. A stretch of 28.61 MiB has to be in one buffer, because the tensor in it has
                         its elements in another order.

            buffers      8. Some are filled while others wait, or are with the consumer.

            slices       straight. 1.02 GiB is needed and 1.12 GiB read, 9 % more: gaps between needed bytes are
                         read where that takes less time than another read. What is needed of each tensor lies
                         in one piece and is handed on where it was read.
        "#]],
    );
}

#[test]
fn stream_out_of_the_page_cache() {
    let mut policy = Policy::default();
    policy.queue_depth = Some(8);
    explains_stream(
        &one_shard(),
        &resident(1000),
        &policy,
        &expect![[r#"
            plan         sync, 4 buffers of 4 MiB: 2 readers, chunks of 4 MiB, buffered.
            stream       1.4 GiB from 1 shard of SafeTensors, whole files: 399 tensors in 1 request.
            where        ext4 on nvme0n1, 100 % of the files in the page cache; 2 CPUs; 24 GiB of memory left
                         (machine).

            memory       16 MiB. 4 buffers of 4 MiB take 16 MiB, unaligned ends of files up to 0 bytes, and the
                         index 0 bytes. The default limit of a stream allows 256 MiB.

            backend      sync. The files are in the page cache. What is left to do is a copy, and threads spread
                         it over the CPUs.
                         Not async: it makes the same reads as sync, each handed to Tokio's blocking pool first.
                         Not io-uring: there is no device to keep busy, or hardly, only a copy to spread over
                         the CPUs.
                         Not mmap: for owned memory it adds a mapping to the same copy.

            direct       never. Reads go through the page cache.
                         Not direct: it would fetch from the device what is in the page cache already (1.5 GB
                         took 0.012 s mapped, 0.24 s copied and 0.75 s read directly,
                         benches/runs/2026-11-hand-measurements.md).

            resident     copy. Buffered reads take from the page cache what is in it.

            chunk        4 MiB. Through the page cache, longer reads save calls.

            readers      2. Going through the page cache is a copy, and so work for the CPUs.

            queue depth  1. Only rings keep more than one read in flight per reader.
                         Not 8: it was set, but has no effect without rings.

            buffer       4 MiB. A few reads long, so that readers seldom change windows, and short enough to
                         have many.

            buffers      4. Some are filled while others wait, or are with the consumer.
        "#]],
    );
}

#[test]
fn stream_that_ranks_share() {
    let mut platform = platform(2);
    platform.os = "linux".to_owned();
    explains_stream(
        &rank_of_four(),
        &platform,
        &Policy::default(),
        &expect![[r#"
            plan         io-uring, 32 buffers of 4 MiB: 1 ring of depth 4, chunks of 1 MiB, direct.
            stream       6.52 GiB from 2 shards of SafeTensors, ranges: 326 tensors in 700 requests.
            where        ext4 on nvme0n1, 0 % of the files in the page cache; 2 CPUs; 24 GiB of memory left
                         (machine).

            memory       137 MiB. 32 buffers of 4 MiB take 128 MiB, unaligned ends of files up to 6 MiB, and the
                         index 3 MiB. The default limit of a stream allows 256 MiB.

            backend      io-uring. 6.52 GiB in 2 shards is a large load, 4 GB (3.73 GiB) or more, and large
                         loads favour rings (16.4 GB in 5 shards took 7.4 to 8.4 s with rings and 8.0 to 9.8 s
                         with threads, benches/runs/2026-11-hand-measurements.md). That was measured of loads;
                         streams are taken to be alike.
                         Not sync: threads trail by a few per cent.
                         Not async: it makes the same reads as sync, each handed to Tokio's blocking pool first.
                         Not mmap: for owned memory it copies out of the page cache, after filling that (1.5 and
                         6.2 GB took 2.4 to 2.8 times as long as read directly,
                         benches/runs/2026-11-23-2cpu-23gib-ext4-matrix/run.json).

            direct       preferred. The files are not in the page cache. The storage supports direct I/O, and
                         direct reads saturate the device.
                         Not buffered: reading through the page cache costs a second copy and reaches a part of
                         the device's speed only.

            resident     reread. There is nothing in the page cache to copy.

            chunk        1 MiB. Long enough for the device's full speed, short enough to keep many in flight.

            readers      1. 4 ranks read the windows that they share in turn, and 2 readers are enough for all.

            queue depth  4. A window has no more than 4 chunks.

            buffer       4 MiB. The ranks have to agree on it, whatever each of them sees of the machine.

            buffers      32. Some are filled while others wait, or are with the consumer.

            slices       mixed. 3.73 GiB is needed and 6.52 GiB read, 75 % more: gaps between needed bytes are
                         read where that takes less time than another read. 72 tensors, 953.67 MiB, lie
                         scattered in their files; what holds them is read in windows, and they are gathered
                         from there. The others are handed on where they were read.
                         Not straight: it takes a read for each of many short runs, of which every one costs
                         more than the gap before it.
        "#]],
    );
}

#[test]
fn slices_that_ranks_share() {
    let mut platform = platform(2);
    platform.os = "linux".to_owned();
    explains(
        &rank_of_four(),
        &platform,
        &Policy::default(),
        &expect![[r#"
            plan         io-uring, owned memory: 2 rings of depth 16, chunks of 2 MiB, direct.
            load         6.52 GiB from 2 shards of SafeTensors, ranges: 326 tensors in 700 requests.
            where        ext4 on nvme0n1, 0 % of the files in the page cache; 2 CPUs; 24 GiB of memory left
                         (machine).

            memory       owned. It fits: with the reads under way the tensors take 3.76 GiB, and the machine
                         leaves 24 GiB.
                         Not mapped: the caller has not taken on the contract of mappings; 72 slices lie
                         scattered in their files, which no mapping can show in one piece.

            backend      io-uring. 6.52 GiB in 2 shards is a large load, 4 GB (3.73 GiB) or more, and large
                         loads favour rings (16.4 GB in 5 shards took 7.4 to 8.4 s with rings and 8.0 to 9.8 s
                         with threads, benches/runs/2026-11-hand-measurements.md).
                         Not sync: threads trail by a few per cent.
                         Not async: it makes the same reads as sync, each handed to Tokio's blocking pool first.
                         Not mmap: for owned memory it copies out of the page cache, after filling that (1.5 and
                         6.2 GB took 2.4 to 2.8 times as long as read directly,
                         benches/runs/2026-11-23-2cpu-23gib-ext4-matrix/run.json).

            direct       preferred. The files are not in the page cache. The storage supports direct I/O, and
                         direct reads saturate the device.
                         Not buffered: reading through the page cache costs a second copy and reaches a part of
                         the device's speed only.

            resident     reread. There is nothing in the page cache to copy.

            chunk        2 MiB. Long enough for the device's full speed, short enough to keep many in flight.

            workers      2. One ring alone starves while its destination pages are faulted in; beyond a few
                         there is nothing left to gain.

            queue depth  16. Together the rings keep the device's queue full.

            slices       mixed. 3.73 GiB is needed and 6.52 GiB read, 75 % more: gaps between needed bytes are
                         read where that takes less time than another read. 72 tensors, 953.67 MiB, lie
                         scattered in their files; what holds them is read in windows, and they are gathered
                         from there. The others are read straight to where they go.
                         Not straight: it takes a read for each of many short runs, of which every one costs
                         more than the gap before it.

            sharing      shared memory. 4 ranks load together, and two or more of them need 5.59 GiB. Each
                         window of them is read once, by one of the ranks, into memory that all map, and all
                         copy out of it what they need.
                         Not page cache: reading through it costs a second copy and reaches a part of the
                         device's speed only.
        "#]],
    );
}

#[test]
fn slices_where_ranks_can_share_the_page_cache_only() {
    let mut platform = platform(2);
    platform.os = "macos".to_owned();
    explains(
        &rank_of_four(),
        &platform,
        &Policy::default(),
        &expect![[r#"
            plan         io-uring, owned memory: 2 rings of depth 16, chunks of 2 MiB, buffered.
            load         6.52 GiB from 2 shards of SafeTensors, ranges: 326 tensors in 700 requests.
            where        ext4 on nvme0n1, 0 % of the files in the page cache; 2 CPUs; 24 GiB of memory left
                         (machine).

            memory       owned. It fits: with the reads under way the tensors take 3.76 GiB, and the machine
                         leaves 24 GiB.
                         Not mapped: the caller has not taken on the contract of mappings; 72 slices lie
                         scattered in their files, which no mapping can show in one piece.

            backend      io-uring. 6.52 GiB in 2 shards is a large load, 4 GB (3.73 GiB) or more, and large
                         loads favour rings (16.4 GB in 5 shards took 7.4 to 8.4 s with rings and 8.0 to 9.8 s
                         with threads, benches/runs/2026-11-hand-measurements.md).
                         Not sync: threads trail by a few per cent.
                         Not async: it makes the same reads as sync, each handed to Tokio's blocking pool first.
                         Not mmap: for owned memory it copies out of the page cache, after filling that (1.5 and
                         6.2 GB took 2.4 to 2.8 times as long as read directly,
                         benches/runs/2026-11-23-2cpu-23gib-ext4-matrix/run.json).

            direct       never. The ranks that load together share the page cache, so reads go through it.
                         Not direct: every rank would read for itself what all of them need.

            resident     copy. Buffered reads take from the page cache what is in it.

            chunk        2 MiB. Long enough for the device's full speed, short enough to keep many in flight.

            workers      2. One ring alone starves while its destination pages are faulted in; beyond a few
                         there is nothing left to gain.

            queue depth  16. Together the rings keep the device's queue full.

            slices       mixed. 3.73 GiB is needed and 6.52 GiB read, 75 % more: gaps between needed bytes are
                         read where that takes less time than another read. 72 tensors, 953.67 MiB, lie
                         scattered in their files; what holds them is read in windows, and they are gathered
                         from there. The others are read straight to where they go.
                         Not straight: it takes a read for each of many short runs, of which every one costs
                         more than the gap before it.

            sharing      page cache. 4 ranks load together, and two or more of them need 5.59 GiB. On macos they
                         have nothing else in common: reads are buffered, which costs a second copy and a part
                         of the device's speed, and what does not stay in the page cache is read again. Each
                         rank copies out of the page cache what it needs.
                         Not shared memory: it needs Linux, and this is macos.
        "#]],
    );
}

#[test]
fn ranks_that_map() {
    let mut platform = platform(2);
    platform.os = "linux".to_owned();
    let mut workload = rank_of_four();
    workload.gathered_tensors = 0;
    workload.gathered_bytes = 0;
    let mut policy = Policy::default();
    policy.mapping = MappingConsent::Granted;
    explains(
        &workload,
        &platform,
        &policy,
        &expect![[r#"
            plan         mmap, mapped memory: 8 workers, chunks of 4 MiB, through the page cache.
            load         6.52 GiB from 2 shards of SafeTensors, ranges: 326 tensors in 700 requests.
            where        ext4 on nvme0n1, 0 % of the files in the page cache; 2 CPUs; 24 GiB of memory left
                         (machine).

            memory       mapped. Mappings are allowed, and 4 ranks load together: one copy of the files in the
                         page cache, 7.45 GiB, is enough for all of them.
                         Not owned: it would copy what can be used in place.

            backend      mmap. Mapped memory comes from the mmap backend only.

            direct       never. A mapping is the page cache itself.

            chunk        4 MiB. Two huge pages: enough to save calls, little enough to share out evenly.

            workers      8. Populating waits for the device, so more workers than CPUs keep that busy.

            queue depth  1. Only rings keep more than one read in flight per worker.

            slices       straight. 3.73 GiB is needed and 6.52 GiB read, 75 % more: gaps between needed bytes
                         are read where that takes less time than another read. What is needed of each tensor
                         lies in one piece and is used where it is.

            sharing      page cache. 4 ranks load together, and two or more of them need 5.59 GiB. A mapping is
                         the page cache, which all of them use in place: each page is fetched once.
                         Not shared memory: it would be filled out of what all can use in place.
        "#]],
    );
}

#[test]
fn stream_as_json() {
    let mut workload = one_shard();
    workload.index_bytes = 1000;
    let plan = plan_stream(&workload, &platform(2), &Policy::default()).expect("there is a plan");
    let json = serde_json::to_value(&plan).expect("plans serialize");
    let keys: Vec<_> = json.as_object().expect("an object").keys().collect();
    expect![[r#"["backend", "buffer_bytes", "buffers", "chunk_bytes", "decisions", "direct", "direct_policy", "memory_bytes", "platform", "policy", "queue_depth", "readers", "resident", "scratch_bytes", "workers", "workload"]"#]].assert_eq(&format!("{keys:?}"));
    let numbers = [
        "readers",
        "buffers",
        "buffer_bytes",
        "scratch_bytes",
        "memory_bytes",
        "workers",
    ];
    let numbers = numbers.map(|key| json[key].as_u64().expect("a number"));
    assert_eq!(
        numbers,
        [16, 32, 4 << 20, 16 * (384 << 10), (134 << 20) + 1000, 1]
    );
    assert_eq!(json["direct"], true);
    assert_eq!(json["resident"], "reread");
    assert_eq!(json["decisions"][0]["field"], "memory_bytes");
    assert_eq!(json["workload"]["index_bytes"], 1000);
}
