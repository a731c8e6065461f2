//! The cases that the processor bounds, one at a time, for callgrind; and how they compare with the
//! `safetensors` crate.
#![forbid(unsafe_code)]
#![allow(
    clippy::print_stdout,
    reason = "this is a command: results go to standard output"
)]

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use tensora_benches::{CpuCase, PreparedCase, write_cpu_fixtures};

const USAGE: &str = "\
cpu_bound fixtures FOLDER      write the checkpoints that the cases open
cpu_bound run FOLDER CASE      do a case's work once
cpu_bound compare FOLDER       time every case, beside its counterpart of the safetensors crate";

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["fixtures", folder] => write_cpu_fixtures(Path::new(folder)),
        ["run", folder, name] => {
            find(name)?.prepare(Path::new(folder))?.run()?;
            Ok(())
        }
        ["compare", folder] => compare(Path::new(folder)),
        _ => bail!("{USAGE}"),
    }
}

fn find(name: &str) -> Result<&'static CpuCase> {
    CpuCase::find(name).with_context(|| {
        let names: Vec<&str> = CpuCase::all().iter().map(|case| case.name).collect();
        format!(
            "no case is named {name:?}; the names are {}",
            names.join(", ")
        )
    })
}

/// Times each case in turn with its counterpart; what counts is the best of the rounds, because
/// whatever else the machine does only ever adds time.
fn compare(folder: &Path) -> Result<()> {
    const ROUNDS: u32 = 15;

    println!(
        "{:<26} {:>12} {:>12} {:>7}",
        "case", "us", "crate us", "ratio"
    );
    for case in CpuCase::all() {
        let ours = case.prepare(folder)?;
        let theirs = match case.reference {
            Some(name) => Some(find(name)?.prepare(folder)?),
            None => None,
        };
        let mut best = (f64::INFINITY, f64::INFINITY);
        for _ in 0..ROUNDS {
            best.0 = best.0.min(time_us(&ours)?);
            if let Some(theirs) = &theirs {
                best.1 = best.1.min(time_us(theirs)?);
            }
        }
        match theirs {
            Some(_) => println!(
                "{:<26} {:>12.1} {:>12.1} {:>7.2}",
                case.name,
                best.0,
                best.1,
                best.0 / best.1
            ),
            None => println!("{:<26} {:>12.1}", case.name, best.0),
        }
    }
    Ok(())
}

fn time_us(case: &PreparedCase) -> Result<f64> {
    let begun = Instant::now();
    case.run()?;
    Ok(begun.elapsed().as_secs_f64() * 1e6)
}
