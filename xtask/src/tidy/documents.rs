//! Manifests, the files at the root, and the links between documents.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::Violation;

const MANIFESTS: &str = "every published crate has a README.md, a description and a license";
const ROOT_FILES: &str =
    "the repository explains itself: license, changes, architecture, design, formats";
const NAMES: &str = "a function that a link into a source file is named after is in that file";
const LINKS: &str = "relative links in Markdown lead to a file and a heading that exist";

const REQUIRED: &[&str] = &[
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "docs/ARCHITECTURE.md",
    "docs/DESIGN.md",
    "docs/FORMATS.md",
    "docs/RELIABILITY.md",
    "SECURITY.md",
];

/// Every crate under `crates/` can be published and read about.
pub(super) fn check_manifests(root: &Path) -> Result<Vec<Violation>> {
    let mut violations = Vec::new();
    for package in super::dependencies::metadata(root)?.packages {
        let folder = package.manifest_path.parent().unwrap_or(root);
        if !folder.starts_with(root.join("crates")) {
            continue;
        }
        let readme = std::fs::metadata(folder.join("README.md")).is_ok_and(|file| file.len() > 0);
        let present =
            |field: &Option<String>| field.as_ref().is_some_and(|text| !text.trim().is_empty());
        for (has, what) in [
            (readme, "README.md"),
            (present(&package.description), "description"),
            (present(&package.license), "license"),
        ] {
            if !has {
                violations.push(Violation::new(
                    MANIFESTS,
                    &package.name,
                    format!("has no {what}"),
                ));
            }
        }
    }
    Ok(violations)
}

/// The documents that every reader looks for exist.
pub(super) fn check_root_files(root: &Path) -> Result<Vec<Violation>> {
    let missing = REQUIRED.iter().filter(|path| !root.join(path).is_file());
    Ok(missing
        .map(|path| Violation::new(ROOT_FILES, *path, "is missing"))
        .collect())
}

/// Links in the README files, in `SECURITY.md` and in `docs/` resolve.
pub(super) fn check_links(root: &Path) -> Result<Vec<Violation>> {
    let mut documents: Vec<_> = ["README.md", "CHANGELOG.md", "SECURITY.md"]
        .map(|name| root.join(name))
        .into();
    documents.extend(markdown_files(&root.join("docs"))?);
    for entry in std::fs::read_dir(root.join("crates")).context("list crates")? {
        documents.push(entry.context("list crates")?.path().join("README.md"));
    }
    documents.retain(|path| path.is_file());
    documents.sort();
    let mut violations = Vec::new();
    for path in &documents {
        violations.extend(check_document(root, path)?);
    }
    Ok(violations)
}

fn markdown_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    if !folder.is_dir() {
        return Ok(files);
    }
    for entry in std::fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let path = entry
            .with_context(|| format!("list {}", folder.display()))?
            .path();
        if path.is_dir() {
            files.extend(markdown_files(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "md") {
            files.push(path);
        }
    }
    Ok(files)
}

fn check_document(root: &Path, path: &Path) -> Result<Vec<Violation>> {
    let text = read(path)?;
    let shown = path.strip_prefix(root).unwrap_or(path).display();
    let mut violations = Vec::new();
    for (line, target) in links(&text) {
        let (file, anchor) = target.split_once('#').unwrap_or((&target, ""));
        let aim = match file {
            "" => path.to_path_buf(),
            file => path.parent().unwrap_or(root).join(file),
        };
        let problem = if !aim.exists() {
            Some("no such file")
        } else if !anchor.is_empty() && aim.is_file() && !anchors(&read(&aim)?).contains(anchor) {
            Some("no such heading")
        } else {
            None
        };
        if let Some(problem) = problem {
            let found = format!("link to {target}: {problem}");
            violations.push(Violation::new(LINKS, format!("{shown}:{line}"), found));
        }
    }
    for (line, name, target) in named_functions(&text) {
        let source = read(&path.parent().unwrap_or(root).join(target)).unwrap_or_default();
        if !source.contains(&format!("fn {name}(")) {
            let found = format!("{target} has no function {name}");
            violations.push(Violation::new(NAMES, format!("{shown}:{line}"), found));
        }
    }
    Ok(violations)
}

/// The links of the form ``[`name`](file.rs)``: line, name and file.
fn named_functions(text: &str) -> Vec<(usize, &str, &str)> {
    let is_name = |name: &str| {
        name.chars()
            .all(|c| c.is_ascii_lowercase() || c == '_' || c.is_ascii_digit())
    };
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate() {
        for rest in line.split("[`").skip(1) {
            let Some((name, rest)) = rest.split_once("`](") else {
                continue;
            };
            let target = rest.split(')').next().unwrap_or("");
            if target.ends_with(".rs") && is_name(name) {
                found.push((number + 1, name, target));
            }
        }
    }
    found
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
}

/// The lines of a document that are prose, numbered from 1, with inline code blanked.
fn prose(text: &str) -> Vec<(usize, String)> {
    let mut fenced = false;
    let mut prose = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if !fenced {
            let kept: Vec<&str> = line.split('`').step_by(2).collect();
            prose.push((number + 1, kept.join("``")));
        }
    }
    prose
}

/// The targets of relative links, `[text](target)` and `[label]: target`, with their line numbers.
fn links(text: &str) -> Vec<(usize, String)> {
    let mut links = Vec::new();
    for (number, line) in prose(text) {
        let inline = line
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split_once(')').map(|(t, _)| t));
        let reference = line
            .strip_prefix('[')
            .and_then(|rest| rest.split_once("]: "))
            .map(|(_, target)| target);
        for target in inline.chain(reference) {
            // A title may follow the target.
            let target = target.split_whitespace().next().unwrap_or("");
            let elsewhere = target.contains("://") || target.starts_with("mailto:");
            if !target.is_empty() && !elsewhere {
                links.push((number, target.to_owned()));
            }
        }
    }
    links
}

/// The anchors that a forge derives from the headings of a document.
fn anchors(text: &str) -> BTreeSet<String> {
    let mut anchors = BTreeSet::new();
    let mut fenced = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        }
        let heading = line.trim_start_matches('#');
        if fenced || heading.len() == line.len() || !heading.starts_with(' ') {
            continue;
        }
        let slug: String = heading
            .trim()
            .to_lowercase()
            .chars()
            .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
            .map(|c| if c == ' ' { '-' } else { c })
            .collect();
        // The second heading of the same text gets a number.
        let numbered = (1..).map(|n| format!("{slug}-{n}"));
        let free = std::iter::once(slug.clone())
            .chain(numbered)
            .find(|slug| !anchors.contains(slug));
        anchors.extend(free);
    }
    anchors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_links_are_found_and_code_is_not() {
        let text = "See [a](docs/A.md#one \"title\") and [b](https://example.org/x), `[c](no.md)`.\n\
                    ```\n[d](no.md)\n```\n[e]: B.md\n[f](#here)";
        let found = links(text);
        assert_eq!(
            found,
            [
                (1, "docs/A.md#one".to_owned()),
                (5, "B.md".to_owned()),
                (6, "#here".to_owned())
            ]
        );
    }

    #[test]
    fn functions_that_links_are_named_after_have_to_be_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("README.md");
        std::fs::write(folder.path().join("a.rs"), "fn one() {}\n").unwrap();
        let text = "[`one`](a.rs) [`Two`](a.rs) [`lib.rs`](a.rs)\n[`one`](a.rs), [`two`](a.rs)\n";
        std::fs::write(&path, text).unwrap();
        let violations = check_document(folder.path(), &path).unwrap();
        let found: Vec<_> = violations
            .iter()
            .map(|violation| violation.place.as_str())
            .collect();
        assert_eq!(found, ["README.md:2"]);
        assert!(violations[0].found.contains("no function two"));
    }

    #[test]
    fn headings_become_anchors() {
        let text = "# One: a `Two`-three\n## Same\n## Same\n```\n# not one\n```\n#also not\n";
        let wanted = ["one-a-two-three", "same", "same-1"].map(str::to_owned);
        assert_eq!(anchors(text), BTreeSet::from(wanted));
    }

    #[test]
    fn dead_links_are_found_with_their_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("README.md");
        std::fs::write(folder.path().join("B.md"), "# Here\n").unwrap();
        std::fs::write(
            &path,
            "# Top\n[ok](B.md) [ok](B.md#here) [ok](#top)\n[bad](C.md)\n[bad](B.md#gone)\n",
        )
        .unwrap();
        let places: Vec<_> = check_document(folder.path(), &path)
            .unwrap()
            .into_iter()
            .map(|violation| (violation.place, violation.found))
            .collect();
        assert_eq!(
            places,
            [
                (
                    "README.md:3".to_owned(),
                    "link to C.md: no such file".to_owned()
                ),
                (
                    "README.md:4".to_owned(),
                    "link to B.md#gone: no such heading".to_owned()
                ),
            ]
        );
    }

    #[test]
    fn missing_root_files_are_found() {
        let folder = tempfile::tempdir().unwrap();
        for path in REQUIRED.iter().skip(1) {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "x").unwrap();
        }
        let places: Vec<_> = check_root_files(folder.path())
            .unwrap()
            .into_iter()
            .map(|v| v.place)
            .collect();
        assert_eq!(places, ["LICENSE"]);
    }
}
