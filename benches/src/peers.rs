//! The Python packages, in a virtual environment that the bench makes itself.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::Case;
use crate::case::last_line;

/// What the packages need and do not all ask for.
const ALSO_NEEDED: &[&str] = &["torch", "numpy"];

/// The Python packages that can be timed.
#[derive(Clone, Debug)]
pub struct Peers {
    python: PathBuf,
    script: PathBuf,
    facts: BTreeMap<String, PeerFact>,
}

/// What became of one package.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PeerFact {
    /// It can be used, and this is its version.
    Version(String),
    /// It cannot.
    Reason(String),
}

impl Peers {
    /// Makes the environment in `folder` unless it is there, and installs what is missing. `script` is
    /// `benches/peers/load.py`. A package that cannot be had is a fact, not an error.
    ///
    /// # Errors
    ///
    /// When there is no Python, or it cannot make an environment.
    pub fn prepare(folder: &Path, script: &Path, say: &mut dyn FnMut(&str)) -> Result<Self> {
        let python = folder.join("bin").join("python");
        if !python.exists() {
            let mut venv = Command::new("python3");
            output(venv.args(["-m", "venv"]).arg(folder))?;
        }
        let mut peers = Self {
            python,
            script: script.to_owned(),
            facts: BTreeMap::new(),
        };
        peers.look()?;
        let mut failures = BTreeMap::new();
        for package in peers.missing() {
            say(&format!("installing the Python package {package}"));
            let mut pip = Command::new(&peers.python);
            pip.args(["-m", "pip", "install", "--quiet"])
                .args(ALSO_NEEDED)
                .arg(&package);
            if let Err(error) = output(&mut pip) {
                failures.insert(package, PeerFact::Reason(format!("{error:#}")));
            }
        }
        peers.look()?;
        for package in peers.missing() {
            // Why it could not be installed says more than that it cannot be imported.
            if let Some(fact) = failures.remove(&package) {
                peers.facts.insert(package, fact);
            }
        }
        Ok(peers)
    }

    /// What became of each package.
    pub fn facts(&self) -> &BTreeMap<String, PeerFact> {
        &self.facts
    }

    pub(crate) fn command(&self, package: &str) -> Command {
        let mut command = Command::new(&self.python);
        command.arg(&self.script).arg(package);
        command
    }

    fn look(&mut self) -> Result<()> {
        let text = output(&mut self.command("versions"))?;
        self.facts = serde_json::from_str(last_line(&text))
            .with_context(|| format!("what {} printed", self.script.display()))?;
        for package in Case::all().iter().filter_map(Case::package) {
            let unknown = || PeerFact::Reason("the script does not know it".to_owned());
            self.facts.entry(package.to_owned()).or_insert_with(unknown);
        }
        Ok(())
    }

    fn missing(&self) -> Vec<String> {
        let is_missing = |(_, fact): &(&String, &PeerFact)| matches!(fact, PeerFact::Reason(_));
        let missing = self.facts.iter().filter(is_missing);
        missing.map(|(package, _)| package.clone()).collect()
    }
}

fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().display().to_string();
    let output = command
        .output()
        .with_context(|| format!("start {program}"))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        bail!("{}: {}", output.status, last_line(&text));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
