//! Reads whole files with a backend of choice, and says how fast.
//!
//! `cargo run --release -p tensora-io --example read_all -- io-uring preferred FILE...`

use std::time::Instant;

use tensora_io::{
    BackendKind, Control, DirectPolicy, ReadRequest, Region, SourceFile, TransferParams, backend,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: read_all sync|async|io-uring|mmap never|preferred|required FILE...";
    let kind: BackendKind = arguments.next().ok_or(usage)?.parse()?;
    let direct = match arguments.next().ok_or(usage)?.as_str() {
        "never" => DirectPolicy::Never,
        "preferred" => DirectPolicy::Preferred,
        "required" => DirectPolicy::Required,
        _ => return Err(usage.into()),
    };
    let workers = if kind == BackendKind::IoUring { 2 } else { 16 };
    let params = TransferParams {
        chunk_bytes: 1 << 20,
        queue_depth: 16,
        workers,
        direct,
        resident: tensora_io::ResidentPolicy::Reread,
    };

    let start = Instant::now();
    let files = arguments
        .map(SourceFile::open)
        .collect::<Result<Vec<_>, _>>()?;
    let mut regions = files
        .iter()
        .map(|file| Region::allocate(usize::try_from(file.len()).unwrap_or(usize::MAX)))
        .collect::<Result<Vec<_>, _>>()?;
    let requests = files
        .iter()
        .zip(&mut regions)
        .map(|(file, region)| ReadRequest {
            file,
            offset: 0,
            destination: region.as_mut_slice().into(),
        })
        .collect();
    let stats = backend(kind)?.read(requests, &params, &Control::new())?;
    let seconds = start.elapsed().as_secs_f64();
    #[allow(clippy::cast_precision_loss, clippy::print_stdout)]
    {
        println!(
            "{seconds:.3} s, {:.2} GB/s",
            stats.bytes as f64 / seconds / 1e9
        );
        println!("{stats:#?}");
    }
    Ok(())
}
