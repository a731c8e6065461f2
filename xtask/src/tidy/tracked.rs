//! What the repository tracks: no paths of somebody's machine, no large files.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::Violation;

const NO_MACHINE_PATHS: &str = "tracked files name no absolute path of a developer's machine";
const NO_LARGE_FILES: &str = "tracked files are small; what is large is generated or fetched";

const MAX_BYTES: u64 = 1 << 20;

/// Folders in which developers keep their checkouts. Spelled in parts, so that this file passes.
const MACHINE_FOLDERS: &[&str] = &[
    concat!("/", "home/"),
    concat!("/", "root/"),
    concat!("/", "work/"),
    concat!("/", "Users/"),
];

/// Looks at every file that git tracks.
pub(super) fn check(root: &Path) -> Result<Vec<Violation>> {
    let output = Command::new("git")
        .args(["ls-files", "-z"])
        .current_dir(root)
        .output()
        .context("start git ls-files")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "git ls-files: {}\n{errors}",
        output.status
    );
    let mut violations = Vec::new();
    for path in String::from_utf8_lossy(&output.stdout)
        .split('\0')
        .filter(|path| !path.is_empty())
    {
        // Tracked but deleted, or a link: nothing to read.
        if let Ok(metadata) = std::fs::symlink_metadata(root.join(path))
            && metadata.is_file()
        {
            violations.extend(judge_size(path, metadata.len()));
            let bytes = std::fs::read(root.join(path)).with_context(|| format!("read {path}"))?;
            violations.extend(judge_text(path, &String::from_utf8_lossy(&bytes)));
        }
    }
    Ok(violations)
}

fn judge_size(path: &str, bytes: u64) -> Option<Violation> {
    (bytes > MAX_BYTES).then(|| {
        Violation::new(
            NO_LARGE_FILES,
            path,
            format!("{bytes} bytes, more than {MAX_BYTES}"),
        )
    })
}

fn judge_text(path: &str, text: &str) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (number, line) in text.lines().enumerate() {
        for folder in MACHINE_FOLDERS {
            // Inside a longer path or address the same letters are harmless.
            let absolute = line.match_indices(folder).any(|(at, _)| {
                !line[..at].ends_with(|c: char| {
                    c.is_alphanumeric() || matches!(c, '.' | '_' | '-' | '}' | '*')
                })
            });
            if absolute {
                let place = format!("{path}:{}", number + 1);
                violations.push(Violation::new(
                    NO_MACHINE_PATHS,
                    place,
                    format!("names {folder}"),
                ));
            }
        }
    }
    violations
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_paths_are_found_and_parts_of_others_are_not() {
        let [home, root, work, users] = MACHINE_FOLDERS else {
            panic!("four folders")
        };
        for folder in [home, root, work, users] {
            let violations = judge_text("a.md", &format!("fine\ncd {folder}me/tensora\n"));
            assert_eq!(violations.len(), 1, "{folder}");
            assert_eq!(violations[0].place, "a.md:2");
        }
        assert_eq!(
            judge_text(
                "a.md",
                &format!("https://example.org{home}x, ./target{work}y")
            ),
            []
        );
    }

    #[test]
    fn large_files_are_found() {
        assert_eq!(judge_size("a", MAX_BYTES), None);
        assert!(judge_size("a", MAX_BYTES + 1).is_some());
    }
}
