//! `docs/UNSAFE.md`: every place where unsafe code stands, and why it is sound, taken from the sources.
//!
//! Without line numbers, so that it changes only when unsafe code does: then a reviewer sees it in the change, and
//! the check fails until it was written again.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};

use super::Violation;
use super::source::Line;
use super::sources::{Source, UnsafeKind, read_all, unsafe_sites};

const CURRENT: &str = "docs/UNSAFE.md lists exactly the unsafe code that there is";
/// Where the inventory stands.
const PATH: &str = "docs/UNSAFE.md";
const FOLDERS: &[&str] = &["crates", "benches", "xtask"];

/// The inventory is of today.
pub(super) fn check(root: &Path) -> Result<Vec<Violation>> {
    let wanted = inventory(&read_all(root, FOLDERS)?)?;
    let found = std::fs::read_to_string(root.join(PATH)).unwrap_or_default();
    Ok(judge(&found, &wanted))
}

/// Writes the inventory.
pub(super) fn write(root: &Path) -> Result<()> {
    let text = inventory(&read_all(root, FOLDERS)?)?;
    let path = root.join(PATH);
    std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))
}

fn judge(found: &str, wanted: &str) -> Vec<Violation> {
    if found == wanted {
        return Vec::new();
    }
    let same = |(found, wanted): &(&str, &str)| found == wanted;
    let line = 1 + found.lines().zip(wanted.lines()).take_while(same).count();
    let found = "differs from the sources from here on: review what changed, then `cargo xtask tidy --write`";
    vec![Violation::new(CURRENT, format!("{PATH}:{line}"), found)]
}

fn inventory(sources: &[Source]) -> Result<String> {
    let (mut uses, mut declarations, mut in_tests) = (0, 0, 0);
    let mut text = String::new();
    for source in sources {
        let sites = unsafe_sites(source);
        let (tests, sites): (Vec<_>, Vec<_>) = sites
            .into_iter()
            .partition(|(line, _)| source.is_test() || source.lines[*line].test);
        in_tests += tests.len();
        if sites.is_empty() {
            continue;
        }
        writeln!(text, "\n## `{}`: {}\n", source.path, sites.len())?;
        for (line, kind) in sites {
            match kind {
                UnsafeKind::Use => uses += 1,
                UnsafeKind::Declaration => declarations += 1,
            }
            let place = place(&source.lines, line);
            match (kind, reason(&source.lines, line)) {
                (UnsafeKind::Declaration, _) => {
                    writeln!(text, "- `{place}` states a contract for its callers.")?;
                }
                (UnsafeKind::Use, Some(reason)) => writeln!(text, "- `{place}`: {reason}")?,
                (UnsafeKind::Use, None) => writeln!(text, "- `{place}`: not explained")?,
            }
        }
    }
    Ok(format!(
        "# Unsafe code\n\n\
         Written by `cargo xtask tidy --write` from the sources; `cargo xtask tidy` fails where the two differ. What follows a\n\
         place is its `SAFETY` comment: who guarantees what, and until when.\n\n\
         **{uses}** blocks and implementations take a contract on, **{declarations}** declarations state one. Tests have {in_tests} more.\n\
         {text}"
    ))
}

/// The function, implementation or declaration that the site belongs to.
fn place(lines: &[Line], site: usize) -> String {
    let code = lines[site].code.trim();
    if code.starts_with("unsafe impl") {
        return code.trim_end_matches(['{', '}', ' ']).to_owned();
    }
    lines[..=site]
        .iter()
        .rev()
        .find_map(|line| function(&line.code))
        .map_or_else(|| "top level".to_owned(), |name| format!("fn {name}"))
}

/// The name of the function that the line begins.
fn function(code: &str) -> Option<&str> {
    let (before, after) = code.split_once("fn ")?;
    let is_word = before.is_empty() || before.ends_with([' ', '(']);
    let name = after.split(['(', '<']).next()?.trim();
    let is_name = !name.is_empty() && name.chars().all(super::source::is_name);
    (is_word && is_name).then_some(name)
}

/// The `SAFETY` comment of the site, on one line.
fn reason(lines: &[Line], site: usize) -> Option<String> {
    let (first, said) = lines[..=site]
        .iter()
        .enumerate()
        .rev()
        .find_map(|(number, line)| Some((number, line.comment.split_once("SAFETY:")?.1)))?;
    let mut words: Vec<&str> = said.split_whitespace().collect();
    for line in &lines[first + 1..site] {
        if !line.code.trim().is_empty() {
            break;
        }
        words.extend(line.comment.split_whitespace());
    }
    Some(words.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = concat!(
        "// SAFETY: owned, and\n// never shared\nunsafe impl Send for A {}\n",
        "impl A {\n    fn read<'a>(&'a self) -> u8 {\n        // SAFETY: within bounds\n        let x =\n            unsafe { f() };\n        x\n    }\n}\n",
        "/// # Safety\nunsafe fn free(start: *mut u8) {}\n",
        "#[cfg(test)]\nmod tests {\n    fn t() {\n        // SAFETY: a test\n        unsafe { g() }\n    }\n}\n",
    );

    #[test]
    fn places_and_reasons_are_listed_and_tests_counted() {
        let sources = [
            Source::parse("crates/a/src/a.rs", TEXT),
            Source::parse("crates/a/src/b.rs", "fn safe() {}\n"),
            Source::parse("crates/a/tests/c.rs", "// SAFETY: yes\nunsafe { h() }\n"),
        ];
        let text = inventory(&sources).unwrap();
        assert!(text.contains("**2** blocks and implementations"), "{text}");
        assert!(text.contains("**1** declarations"), "{text}");
        assert!(text.contains("Tests have 2 more"), "{text}");
        let list = text.split("## `crates/a/src/a.rs`: 3\n\n").nth(1).unwrap();
        assert_eq!(
            list,
            "- `unsafe impl Send for A`: owned, and never shared\n\
             - `fn read`: within bounds\n\
             - `fn free` states a contract for its callers.\n"
        );
        assert!(!text.contains("b.rs"), "{text}");
    }

    #[test]
    fn an_inventory_of_yesterday_is_found() {
        assert_eq!(judge("a\nb\n", "a\nb\n"), []);
        let violations = judge("a\nb\n", "a\nc\n");
        assert_eq!(violations.len(), 1);
        assert_eq!(violations[0].place, "docs/UNSAFE.md:2");
        assert_eq!(judge("", "a\n").len(), 1);
    }
}
