//! Whole files through a [`RangeStream`] with parameters given by hand: where the planner's constants for streams come
//! from.
//!
//! `cargo run --release -p tensora-io --example raw_stream -- BACKEND READERS BUFFERS BUFFER_KIB CHUNK_KIB DEPTH FILE...`
//!
//! Reads are direct. The consumer reads every byte once. Prints one JSON object: `elapsed_seconds` (from the first open
//! to the last byte), `data_bytes`, `consumer_wait_seconds`, `reader_wait_seconds`, `xor`.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

use tensora_io::{
    BackendKind, Control, DirectPolicy, RangeStream, ReadExtent, ReadWindow, ResidentPolicy,
    SourceFile, StreamParams, TransferParams, backend,
};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [
        kind,
        readers,
        buffers,
        buffer_kib,
        chunk_kib,
        depth,
        paths @ ..,
    ] = &arguments[..]
    else {
        return Err("BACKEND READERS BUFFERS BUFFER_KIB CHUNK_KIB DEPTH FILE...".into());
    };
    let buffer_bytes = buffer_kib.parse::<usize>()? << 10;
    let transfer = TransferParams {
        chunk_bytes: chunk_kib.parse::<u64>()? << 10,
        queue_depth: depth.parse()?,
        workers: 1,
        direct: DirectPolicy::Required,
        resident: ResidentPolicy::Reread,
    };
    let params = StreamParams::new(buffers.parse()?, buffer_bytes, readers.parse()?, transfer);

    let begun = Instant::now();
    let files = paths
        .iter()
        .map(|path| SourceFile::open(path).map(Arc::new))
        .collect::<Result<Vec<_>, _>>()?;
    let mut windows = Vec::new();
    for (number, file) in files.iter().enumerate() {
        for start in (0..file.len()).step_by(buffer_bytes) {
            let end = file.len().min(start + buffer_bytes as u64);
            windows.push(ReadWindow {
                extents: vec![ReadExtent {
                    file: number,
                    range: start..end,
                    at: 0,
                }],
                buffer_bytes: usize::try_from(end - start)?.next_multiple_of(4096),
            });
        }
    }
    let data_bytes: u64 = files.iter().map(|file| file.len()).sum();
    let backend = Arc::from(backend(kind.parse::<BackendKind>()?)?);
    let mut stream = RangeStream::new(files, windows, backend, params, Control::new())?;
    let mut xor = 0_u64;
    for window in stream.by_ref() {
        let bytes = window?.bytes;
        let (words, _) = bytes.as_chunks::<8>();
        let fold = |xor, word: &[u8; 8]| xor ^ u64::from_ne_bytes(*word);
        xor = words.iter().fold(xor, fold);
    }
    let elapsed = begun.elapsed().as_secs_f64();
    let stats = stream.stats();
    println!(
        "{{\"elapsed_seconds\":{elapsed:.4},\"data_bytes\":{data_bytes},\"consumer_wait_seconds\":{:.4},\
         \"reader_wait_seconds\":{:.4},\"xor\":{xor}}}",
        stats.consumer_wait.as_secs_f64(),
        stats.reader_wait.as_secs_f64(),
    );
    Ok(())
}
