//! Times what the processor bounds: `cargo bench -p tensora-benches`, with a name to pick cases.

use anyhow::Result;
use criterion::Criterion;
use tensora_benches::{CpuCase, write_cpu_fixtures};

fn main() -> Result<()> {
    let folder = tempfile::tempdir()?;
    write_cpu_fixtures(folder.path())?;
    let mut criterion = Criterion::default().configure_from_args();
    for case in CpuCase::all() {
        let prepared = case.prepare(folder.path())?;
        criterion.bench_function(case.name, |bencher| {
            bencher.iter(|| prepared.run().expect(case.name));
        });
    }
    criterion.final_summary();
    Ok(())
}
