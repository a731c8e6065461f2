//! `cargo xtask fuzz`: every fuzz target, for a while.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use rustix::process::{Pid, Signal, kill_process};

/// How often a target's processor time is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How long a target may take to finish its last input and to say what it did.
const PATIENCE: Duration = Duration::from_secs(60);
/// An input that takes longer counts as a finding: those of the corpora are some kilobytes.
const INPUT_SECONDS: u64 = 20;

/// Arguments of `cargo xtask fuzz`.
#[derive(Debug, Args)]
pub struct FuzzArguments {
    /// Which targets; all of them if none is named
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
    /// How many seconds of processor time each target gets
    #[arg(long, value_name = "S", default_value_t = 60)]
    budget: u64,
    /// How many targets run at the same time
    #[arg(long, value_name = "N", default_value_t = 1)]
    jobs: usize,
    /// Write the table into this file, too
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// What libFuzzer said at the end, and what it took.
#[derive(Debug, Default, PartialEq)]
struct Found {
    cpu_seconds: f64,
    executions: u64,
    /// Edges of the program that were reached.
    coverage: u64,
    /// Inputs that libFuzzer found worth keeping, the seeds among them.
    corpus: u64,
    peak_mib: u64,
    /// Inputs that failed.
    artifacts: Vec<String>,
}

impl FuzzArguments {
    /// Runs the targets, `--jobs` of them at a time.
    ///
    /// # Errors
    ///
    /// When the tools are missing, a target does not build, or an input fails.
    pub fn run(&self) -> Result<()> {
        let folder = crate::tidy::repository_root().join("fuzz");
        let manifest = fs::read_to_string(folder.join("Cargo.toml"))?;
        let all = targets(&manifest);
        for name in &self.targets {
            ensure!(
                all.contains(name),
                "no target is called {name}; there are {}",
                all.join(", ")
            );
        }
        let chosen = if self.targets.is_empty() {
            &all
        } else {
            &self.targets
        };
        check_tools(&folder)?;
        let programs = build(&folder)?;
        let found = self.fuzz_all(&folder, &programs, chosen)?;
        let report = self.report(chosen, &found)?;
        println!("{report}");
        if let Some(path) = &self.out {
            fs::write(path, &report).with_context(|| format!("write {}", path.display()))?;
        }
        let findings: usize = found.iter().map(|found| found.artifacts.len()).sum();
        ensure!(
            findings == 0,
            "{findings} inputs failed; each becomes a regression test"
        );
        Ok(())
    }

    /// What each of the targets found, in their order.
    fn fuzz_all(&self, folder: &Path, programs: &Path, chosen: &[String]) -> Result<Vec<Found>> {
        let queue: Mutex<VecDeque<_>> = Mutex::new(chosen.iter().enumerate().collect());
        let next = || queue.lock().ok().and_then(|mut queue| queue.pop_front());
        let work = || {
            let mut found = Vec::new();
            while let Some((place, target)) = next() {
                found.push((place, fuzz(folder, programs, target, self.budget)?));
            }
            anyhow::Ok(found)
        };
        let mut found = thread::scope(|scope| {
            let jobs = self.jobs.clamp(1, chosen.len().max(1));
            let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
            let mut found = Vec::new();
            for worker in workers {
                match worker.join() {
                    Ok(some) => found.extend(some?),
                    Err(_) => bail!("a thread that watched a target panicked"),
                }
            }
            Ok(found)
        })?;
        found.sort_by_key(|(place, _)| *place);
        Ok(found.into_iter().map(|(_, found)| found).collect())
    }

    fn report(&self, chosen: &[String], found: &[Found]) -> Result<String> {
        let mut report = format!(
            "# Fuzzing\n\n`cargo xtask fuzz --budget {}`.\n\n\
             | target | minutes of processor time | executions | edges covered | corpus | peak MiB | findings |\n\
             |---|---:|---:|---:|---:|---:|---|\n",
            self.budget
        );
        for (target, found) in chosen.iter().zip(found) {
            let artifacts = if found.artifacts.is_empty() {
                "none".to_owned()
            } else {
                found.artifacts.join(", ")
            };
            writeln!(
                report,
                "| {target} | {:.1} | {} | {} | {} | {} | {artifacts} |",
                found.cpu_seconds / 60.0,
                found.executions,
                found.coverage,
                found.corpus,
                found.peak_mib
            )?;
        }
        Ok(report)
    }
}

/// `cargo fuzz` with the compiler that it needs.
fn cargo_fuzz(folder: &Path) -> Command {
    let mut command = Command::new("cargo");
    command
        .current_dir(folder)
        // This chore's own toolchain must not be passed on.
        .env_remove("RUSTUP_TOOLCHAIN")
        .env_remove("CARGO")
        .args(["+nightly", "fuzz"]);
    command
}

fn check_tools(folder: &Path) -> Result<()> {
    ensure!(
        cfg!(target_os = "linux"),
        "the processor time of a target is read from /proc, which only Linux has"
    );
    let works = cargo_fuzz(folder)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    ensure!(
        works,
        "fuzzing needs a nightly compiler and cargo-fuzz: `rustup toolchain install nightly` and \
         `cargo install cargo-fuzz`"
    );
    Ok(())
}

/// Builds every target. Returns the folder that their programs are in.
fn build(folder: &Path) -> Result<PathBuf> {
    let status = cargo_fuzz(folder).arg("build").status();
    let status = status.context("start cargo fuzz")?;
    ensure!(status.success(), "cargo fuzz build: {status}");
    // cargo-fuzz always names the platform, so that flags are not given to build scripts.
    let platform = Command::new("rustc")
        .current_dir(folder)
        .env_remove("RUSTUP_TOOLCHAIN")
        .args(["+nightly", "--print", "host-tuple"])
        .output()
        .context("start rustc")?;
    let platform = String::from_utf8(platform.stdout)?;
    Ok(folder.join("target").join(platform.trim()).join("release"))
}

/// The programs of the manifest.
fn targets(manifest: &str) -> Vec<String> {
    manifest
        .split("[[bin]]")
        .skip(1)
        .filter_map(|table| {
            let line = table
                .lines()
                .find_map(|line| line.strip_prefix("name = "))?;
            Some(line.trim_matches('"').to_owned())
        })
        .collect()
}

/// Runs one target until it has had its processor time, or an input fails.
fn fuzz(folder: &Path, programs: &Path, target: &str, budget_seconds: u64) -> Result<Found> {
    eprintln!("{target}: {budget_seconds} s of processor time");
    // What libFuzzer finds worth keeping goes below what git ignores, and so does what it says.
    let corpus = format!("target/corpus/{target}");
    let artifacts = format!("artifacts/{target}/");
    for place in [&corpus, &artifacts] {
        fs::create_dir_all(folder.join(place)).with_context(|| format!("create {place}"))?;
    }
    let log = folder.join(format!("target/{target}.log"));
    let mut command = Command::new(programs.join(target));
    command
        .current_dir(folder)
        .args([&corpus, &format!("seeds/{target}")])
        .arg(format!("-artifact_prefix={artifacts}"))
        .arg(format!("-timeout={INPUT_SECONDS}"))
        .arg("-print_final_stats=1")
        .stdout(Stdio::null())
        .stderr(File::create(&log).with_context(|| format!("create {}", log.display()))?);
    if std::env::var_os("TMPDIR").is_none() && Path::new("/dev/shm").is_dir() {
        // One target makes directories, and memory is the fastest place for them.
        command.env("TMPDIR", "/dev/shm");
    }
    let mut child = command.spawn().with_context(|| format!("start {target}"))?;
    let watched = watch(&mut child, budget_seconds);
    if watched.is_err() {
        // Whatever went wrong, nothing goes on behind.
        child.kill().and_then(|()| child.wait()).ok();
    }
    let (cpu_seconds, succeeded) = watched.with_context(|| format!("watch {target}"))?;
    let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    let found = Found {
        cpu_seconds,
        ..read_output(&text)
    };
    ensure!(
        succeeded || !found.artifacts.is_empty(),
        "{target} failed:\n{text}"
    );
    Ok(found)
}

/// Asks the process to end when it has had its processor time. Returns how much it had, and whether it succeeded.
fn watch(child: &mut Child, budget_seconds: u64) -> Result<(f64, bool)> {
    let stat = format!("/proc/{}/stat", child.id());
    let ticks_per_second = rustix::param::clock_ticks_per_second();
    let mut ticks = 0;
    let mut asked = None;
    loop {
        if let Some(status) = child.try_wait()? {
            #[allow(clippy::cast_precision_loss)]
            let seconds = ticks as f64 / ticks_per_second as f64;
            return Ok((seconds, status.success()));
        }
        ticks = fs::read_to_string(&stat)
            .ok()
            .and_then(|text| cpu_ticks(&text))
            .unwrap_or(ticks)
            .max(ticks);
        match asked {
            None if ticks >= budget_seconds * ticks_per_second => {
                kill_process(Pid::from_child(child), Signal::USR1).context("ask for the end")?;
                asked = Some(Instant::now());
            }
            Some(asked) if asked.elapsed() > PATIENCE => bail!(
                "it does not end within {} s of being asked to",
                PATIENCE.as_secs()
            ),
            None | Some(_) => {}
        }
        thread::sleep(LOOK_EVERY);
    }
}

/// Time in user and kernel mode of `/proc/PID/stat`, in ticks.
fn cpu_ticks(stat: &str) -> Option<u64> {
    // The second field is a name in parentheses, which may hold anything.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let kernel: u64 = fields.next()?.parse().ok()?;
    Some(user + kernel)
}

fn read_output(text: &str) -> Found {
    let mut found = Found::default();
    let number = |word: &str| word.trim().parse().unwrap_or(0);
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("stat::number_of_executed_units:") {
            found.executions = number(rest);
        } else if let Some(rest) = line.strip_prefix("stat::peak_rss_mb:") {
            found.peak_mib = number(rest);
        } else if let Some((_, path)) = line.split_once("Test unit written to ") {
            found.artifacts.push(path.trim().to_owned());
        } else if let Some((_, rest)) = line.split_once(" cov: ") {
            let mut words = rest.split_whitespace();
            let reached = number(words.next().unwrap_or(""));
            found.coverage = found.coverage.max(reached);
            if let Some(kept) = words.skip_while(|word| *word != "corp:").nth(1) {
                found.corpus = number(kept.split('/').next().unwrap_or(""));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_in_a_manifest() {
        let manifest = "[package]\nname = \"no\"\n\n[[bin]]\nname = \"a\"\npath = \"x\"\n\n[[bin]]\nname = \"b\"\n";
        assert_eq!(targets(manifest), ["a", "b"]);
    }

    #[test]
    fn what_libfuzzer_says_is_read() {
        let text = "#2\tINITED cov: 12 ft: 13 corp: 1/1b exec/s: 0 rss: 40Mb\n\
                    #99\tDONE   cov: 311 ft: 900 corp: 9/9b\n\
                    Test unit written to /a/crash-1\n\
                    stat::number_of_executed_units: 99\nstat::peak_rss_mb:              52\n";
        let wanted = Found {
            cpu_seconds: 0.0,
            executions: 99,
            coverage: 311,
            corpus: 9,
            peak_mib: 52,
            artifacts: vec!["/a/crash-1".to_owned()],
        };
        assert_eq!(read_output(text), wanted);
        assert_eq!(read_output(""), Found::default());
    }

    #[test]
    fn processor_time_is_read_whatever_the_name_of_the_program() {
        let stat = "7 (a) b 1) R 1 1 1 0 -1 0 1 2 3 4 120 30 5 6 20 0 1 0 99";
        assert_eq!(cpu_ticks(stat), Some(150));
        assert_eq!(cpu_ticks("7 (a"), None);
    }

    #[test]
    fn a_process_that_is_busy_is_asked_to_end_and_one_that_fails_is_known_to() {
        let mut busy = Command::new("sh")
            .args(["-c", "trap 'exit 0' USR1; while :; do :; done"])
            .spawn()
            .unwrap();
        let (seconds, succeeded) = watch(&mut busy, 1).unwrap();
        assert!(seconds >= 1.0 && succeeded, "{seconds} {succeeded}");
        let mut failing = Command::new("false").spawn().unwrap();
        assert!(!watch(&mut failing, 1).unwrap().1);
    }
}
