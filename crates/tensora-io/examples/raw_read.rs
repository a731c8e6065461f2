//! What a loader is measured against: whole files, read by hand-written loops that do nothing else.
//!
//! `cargo run --release -p tensora-io --example raw_read -- MODE FILE...`, where MODE is
//!
//! - `threads`: positioned direct reads, 16 threads × 1 MiB, into huge pages that are kept;
//! - `rings`: io_uring direct, 2 rings × depth 16 × 1 MiB, into huge pages that are kept;
//! - `ceiling-threads`, `ceiling-rings`: the same, but into 16 and 32 small buffers that are used again and
//!   again: what the device delivers when memory costs nothing.
//!
//! Prints one JSON object: `elapsed_seconds` (from the first open to the last byte), `data_bytes`,
//! `peak_resident_bytes`.

#[cfg(target_os = "linux")]
fn main() {
    linux::main();
}

#[cfg(not(target_os = "linux"))]
fn main() {}

#[cfg(target_os = "linux")]
#[allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::cast_possible_truncation
)]
mod linux {
    use std::fs::{File, OpenOptions};
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::{FileExt, OpenOptionsExt};
    use std::sync::Mutex;
    use std::time::Instant;

    use io_uring::{IoUring, opcode, types};
    use tensora_io::Region;

    const CHUNK_BYTES: usize = 1 << 20;
    const BLOCK_BYTES: usize = 4096;
    const THREADS: usize = 16;
    const RINGS: usize = 2;
    const DEPTH: usize = 16;

    /// One chunk of one file; the memory is absent when small buffers are used again.
    type Job<'a> = (usize, u64, usize, Option<&'a mut [u8]>);

    pub(super) fn main() {
        let mut arguments = std::env::args().skip(1);
        let mode = arguments.next().expect("MODE FILE...");
        let paths: Vec<_> = arguments.collect();

        let start = Instant::now();
        let files: Vec<File> = paths
            .iter()
            .map(|path| {
                OpenOptions::new()
                    .read(true)
                    .custom_flags(rustix::fs::OFlags::DIRECT.bits().cast_signed())
                    .open(path)
                    .unwrap()
            })
            .collect();
        let lengths: Vec<usize> = files
            .iter()
            .map(|file| file.metadata().unwrap().len() as usize)
            .collect();
        // Rounded up to a block, so that the last read of a file may ask for a whole one.
        let mut regions: Vec<Region> = lengths
            .iter()
            .map(|len| match mode.as_str() {
                "ceiling-threads" | "ceiling-rings" => Region::allocate(0).unwrap(),
                _ => Region::allocate(len.next_multiple_of(BLOCK_BYTES)).unwrap(),
            })
            .collect();
        let mut jobs: Vec<Job<'_>> = Vec::new();
        for (file, (len, region)) in lengths.iter().zip(&mut regions).enumerate() {
            let mut memory = region.as_mut_slice().chunks_mut(CHUNK_BYTES);
            for offset in (0..*len).step_by(CHUNK_BYTES) {
                let ask = CHUNK_BYTES.min((len - offset).next_multiple_of(BLOCK_BYTES));
                jobs.push((file, offset as u64, ask, memory.next()));
            }
        }
        jobs.reverse();
        let jobs = Mutex::new(jobs);
        std::thread::scope(|scope| match mode.as_str() {
            "threads" | "ceiling-threads" => {
                for _ in 0..THREADS {
                    scope.spawn(|| read_with_thread(&files, &jobs));
                }
            }
            "rings" | "ceiling-rings" => {
                for _ in 0..RINGS {
                    scope.spawn(|| read_with_ring(&files, &jobs));
                }
            }
            other => panic!("unknown mode {other}"),
        });
        let elapsed = start.elapsed().as_secs_f64();
        println!(
            "{{\"elapsed_seconds\":{elapsed},\"data_bytes\":{},\"peak_resident_bytes\":{}}}",
            lengths.iter().sum::<usize>(),
            peak_resident_bytes(),
        );
    }

    fn read_with_thread(files: &[File], jobs: &Mutex<Vec<Job<'_>>>) {
        let mut small = Region::allocate(CHUNK_BYTES).unwrap();
        loop {
            let Some((file, offset, ask, memory)) = jobs.lock().unwrap().pop() else {
                return;
            };
            let read = files[file]
                .read_at(
                    &mut memory.unwrap_or_else(|| small.as_mut_slice())[..ask],
                    offset,
                )
                .unwrap();
            assert!(read + BLOCK_BYTES > ask, "a short read");
        }
    }

    fn read_with_ring(files: &[File], jobs: &Mutex<Vec<Job<'_>>>) {
        let mut ring = IoUring::new(DEPTH as u32).unwrap();
        // One region, so that the small buffers are made of huge pages too.
        let mut region = Region::allocate(DEPTH * CHUNK_BYTES).unwrap();
        let mut small: Vec<&mut [u8]> = region.as_mut_slice().chunks_mut(CHUNK_BYTES).collect();
        let mut free: Vec<usize> = (0..DEPTH).collect();
        let mut asked = [0; DEPTH];
        loop {
            while let Some(&slot) = free.last() {
                // A poisoned lock means that the other thread panicked, which it does not.
                let job = jobs.lock().unwrap_or_else(|_| std::process::abort()).pop();
                let Some((file, offset, ask, memory)) = job else {
                    break;
                };
                free.pop();
                asked[slot] = ask;
                let target = memory.map_or_else(|| small[slot].as_mut_ptr(), <[u8]>::as_mut_ptr);
                let entry =
                    opcode::Read::new(types::Fd(files[file].as_raw_fd()), target, ask as u32)
                        .offset(offset)
                        .build()
                        .user_data(slot as u64);
                // SAFETY: the memory is the job's own, or the slot's, and outlives this function, which
                // returns only when nothing is in flight; every failure while something is in flight
                // aborts the process.
                if unsafe { ring.submission().push(&entry) }.is_err() {
                    std::process::abort();
                }
            }
            if free.len() == DEPTH {
                return;
            }
            // Unwinding past memory that the kernel still writes to must not happen: abort instead.
            if ring.submit_and_wait(1).is_err() {
                std::process::abort();
            }
            for completion in ring.completion() {
                let slot = completion.user_data() as usize;
                if completion.result() + (BLOCK_BYTES as i32) <= asked[slot] as i32 {
                    std::process::abort();
                }
                free.push(slot);
            }
        }
    }

    fn peak_resident_bytes() -> u64 {
        std::fs::read_to_string("/proc/self/status")
            .unwrap_or_default()
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .and_then(|rest| {
                rest.trim()
                    .trim_end_matches("kB")
                    .trim()
                    .parse::<u64>()
                    .ok()
            })
            .map_or(0, |kib| kib * 1024)
    }
}
