//! What the Rust sources of each crate may contain.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::Violation;
use super::source::{Line, is_name, lines, tokens};

const UNSAFE_CONFINED: &str = "only tensora-io contains `unsafe`; tensora has at most one `unsafe fn`, whose contract it \
     passes on, and tensora-cli takes it on once and reports its breach in one handler of a signal";
const UNSAFE_DENIED: &str =
    "every crate root forbids unsafe code; tensora-io and the command deny it";
const UNSAFE_EXPLAINED: &str = "every `unsafe` block and impl follows a `// SAFETY:` comment";
const VOCABULARY: &str = "tensora-io never mentions a format, a tensor or a dtype";
const PURITY: &str = "tensora-heuristics does no I/O: plan() is a pure function of its arguments";

/// Where `unsafe` may stand outside `tensora-io`: folder, declarations and blocks at most.
///
/// The command takes the contract of mappings on in one block, and has two more to say so when somebody else breaks it:
/// one installs a handler of SIGBUS, one asks for the address. Tests and examples show the call.
const UNSAFE_ALLOWANCES: &[(&str, usize, usize)] = &[
    ("crates/tensora/tests", 0, usize::MAX),
    ("crates/tensora/examples", 0, usize::MAX),
    ("crates/tensora-cli/src", 0, 3),
];

/// The one crate that contains unsafe code.
const UNSAFE_HOME: &str = "crates/tensora-io";

/// Words that name what `tensora-io` does not know. Its own name is taken out before the search.
const FORMAT_WORDS: &[&str] = &["tensor", "dtype", "safetensors", "serverlessllm"];

/// Modules of `std` that reach outside the process, and names that do so wherever they come from.
const IMPURE_MODULES: &[&str] = &["env", "fs", "io", "net", "os", "process", "thread"];
const IMPURE_NAMES: &[&str] = &["File", "Instant", "OpenOptions", "SystemTime"];

/// A source file of the repository.
pub(super) struct Source {
    /// Relative to the root, with forward slashes.
    pub(super) path: String,
    pub(super) lines: Vec<Line>,
}

impl Source {
    pub(super) fn parse(path: impl Into<String>, text: &str) -> Self {
        Self {
            path: path.into(),
            lines: lines(text),
        }
    }

    fn place(&self, line: usize) -> String {
        format!("{}:{}", self.path, line + 1)
    }

    /// Whether the whole file is a test: it stands in a folder of tests or is a `tests.rs`.
    pub(super) fn is_test(&self) -> bool {
        self.path.contains("/tests/") || self.path.ends_with("/tests.rs")
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum UnsafeKind {
    /// Takes a contract on: a block or an implementation.
    Use,
    /// States a contract: a function, a trait, an extern block, an attribute.
    Declaration,
}

/// The lines with unsafe code.
pub(super) fn unsafe_sites(source: &Source) -> Vec<(usize, UnsafeKind)> {
    let tokens = tokens(&source.lines);
    tokens
        .iter()
        .enumerate()
        .filter(|(_, (_, token))| *token == "unsafe")
        .map(|(i, (line, _))| {
            let kind = match tokens.get(i + 1).map(|(_, token)| *token) {
                Some("{" | "impl") => UnsafeKind::Use,
                _ => UnsafeKind::Declaration,
            };
            (*line, kind)
        })
        .collect()
}

/// Whether a `SAFETY:` comment stands on the line or right before the statement it belongs to.
fn is_explained(lines: &[Line], site: usize) -> bool {
    let explains = |line: &Line| line.comment.contains("SAFETY:");
    if explains(&lines[site]) {
        return true;
    }
    for line in lines[..site].iter().rev() {
        if explains(line) {
            return true;
        }
        let code = line.code.trim();
        let only_comment = code.is_empty() && !line.comment.is_empty();
        let attribute = code.starts_with("#[");
        // `let x =` or `call(` goes on with the unsafe block; a finished statement does not.
        let continues = !code.is_empty() && !code.ends_with([';', '{', '}']);
        if !(only_comment || attribute || continues) {
            return false;
        }
    }
    false
}

fn judge_unsafe(sources: &[Source]) -> Vec<Violation> {
    let mut violations = Vec::new();
    let mut used = vec![(0, 0); UNSAFE_ALLOWANCES.len()];
    for source in sources {
        let home = source.path.starts_with(&format!("{UNSAFE_HOME}/"));
        let allowance = UNSAFE_ALLOWANCES
            .iter()
            .position(|(folder, ..)| source.path.starts_with(&format!("{folder}/")));
        for (line, kind) in unsafe_sites(source) {
            if kind == UnsafeKind::Use && !is_explained(&source.lines, line) {
                let found =
                    "no `// SAFETY:` comment before this: say who guarantees what, and until when";
                violations.push(Violation::new(UNSAFE_EXPLAINED, source.place(line), found));
            }
            if home {
                continue;
            }
            let within = allowance.is_some_and(|index| {
                let (_, declarations, uses) = UNSAFE_ALLOWANCES[index];
                let (declared, taken) = &mut used[index];
                match kind {
                    UnsafeKind::Declaration => *declared += 1,
                    UnsafeKind::Use => *taken += 1,
                }
                *declared <= declarations && *taken <= uses
            });
            if !within {
                violations.push(Violation::new(
                    UNSAFE_CONFINED,
                    source.place(line),
                    "`unsafe` stands here",
                ));
            }
        }
    }
    violations
}

fn judge_root(source: &Source) -> Vec<Violation> {
    let code: String = source
        .lines
        .iter()
        .flat_map(|line| line.code.chars())
        .filter(|c| !c.is_whitespace())
        .collect();
    let folder = source
        .path
        .rsplit_once('/')
        .map_or("", |(folder, _)| folder);
    let may_deny = folder.starts_with(UNSAFE_HOME)
        || UNSAFE_ALLOWANCES
            .iter()
            .any(|(allowed, ..)| *allowed == folder);
    let forbids = code.contains("#![forbid(unsafe_code)]");
    let denies = code.contains("#![deny(unsafe_code)]");
    if forbids || (may_deny && denies) {
        return Vec::new();
    }
    let found = if may_deny {
        "has neither `#![forbid(unsafe_code)]` nor `#![deny(unsafe_code)]`"
    } else {
        "has no `#![forbid(unsafe_code)]`"
    };
    vec![Violation::new(UNSAFE_DENIED, &source.path, found)]
}

fn judge_vocabulary(source: &Source) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (number, line) in source
        .lines
        .iter()
        .enumerate()
        .filter(|(_, line)| !line.test)
    {
        for text in [&line.code, &line.comment, &line.literal] {
            let text = text.to_lowercase().replace("tensora", "");
            if let Some(word) = FORMAT_WORDS.iter().find(|word| text.contains(**word)) {
                let found = format!(
                    "says `{word}`; here there are only files, byte ranges and destinations"
                );
                violations.push(Violation::new(VOCABULARY, source.place(number), found));
            }
        }
    }
    violations
}

fn judge_purity(source: &Source) -> Vec<Violation> {
    let mut found: Vec<(usize, String)> = Vec::new();
    let tokens: Vec<(usize, &str)> = tokens(&source.lines)
        .into_iter()
        .filter(|(line, _)| !source.lines[*line].test)
        .collect();
    for (i, (line, token)) in tokens.iter().enumerate() {
        if IMPURE_NAMES.contains(token) {
            found.push((*line, (*token).to_owned()));
        }
        let path = tokens
            .get(i + 1..i + 3)
            .is_some_and(|next| next.iter().all(|(_, t)| *t == ":"));
        if *token != "std" || !path {
            continue;
        }
        // `std::fs` names one module, `std::{fmt, fs::File}` those at the first level of the group.
        let mut depth = 0;
        let mut first = true;
        for (line, token) in &tokens[i + 3..] {
            match *token {
                "{" => depth += 1,
                "}" => depth -= 1,
                "," => first = depth == 1,
                name if name.starts_with(is_name) => {
                    if first && depth <= 1 && IMPURE_MODULES.contains(&name) {
                        found.push((*line, format!("std::{name}")));
                    }
                    first = false;
                }
                _ => {}
            }
            if depth == 0 && !matches!(*token, ":") {
                break;
            }
        }
    }
    found
        .into_iter()
        .map(|(line, name)| {
            let found = format!("uses `{name}`; let the caller find the fact out and pass it in");
            Violation::new(PURITY, source.place(line), found)
        })
        .collect()
}

/// `unsafe` stands where it may, each with its reason, and each crate root says so.
pub(super) fn check_unsafe(root: &Path) -> Result<Vec<Violation>> {
    let mut violations = judge_unsafe(&read_all(root, &["crates", "xtask", "benches"])?);
    for package in super::dependencies::metadata(root)?.packages {
        let folder = package.manifest_path.parent().unwrap_or(root);
        // Each of these is the root of a crate of its own.
        for target in ["src/lib.rs", "src/main.rs"] {
            let path = folder.join(target);
            if path.exists() {
                violations.extend(judge_root(&read(root, &path)?));
            }
        }
    }
    Ok(violations)
}

/// `tensora-io` speaks of files and ranges only, in code, comments and messages alike.
pub(super) fn check_vocabulary(root: &Path) -> Result<Vec<Violation>> {
    let sources = read_all(root, &["crates/tensora-io/src"])?;
    Ok(sources
        .iter()
        .filter(|source| !source.is_test())
        .flat_map(judge_vocabulary)
        .collect())
}

/// `tensora-heuristics` touches neither files nor clocks nor the environment.
pub(super) fn check_purity(root: &Path) -> Result<Vec<Violation>> {
    let sources = read_all(root, &["crates/tensora-heuristics/src"])?;
    Ok(sources
        .iter()
        .filter(|source| !source.is_test())
        .flat_map(judge_purity)
        .collect())
}

fn read(root: &Path, path: &Path) -> Result<Source> {
    let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let relative = path.strip_prefix(root).unwrap_or(path);
    Ok(Source::parse(
        relative.to_string_lossy().replace('\\', "/"),
        &text,
    ))
}

/// Every Rust source below the folders, in the order of their paths.
pub(super) fn read_all(root: &Path, folders: &[&str]) -> Result<Vec<Source>> {
    let mut paths = Vec::new();
    for folder in folders {
        collect_rust_files(&root.join(folder), &mut paths)?;
    }
    paths.sort();
    paths.iter().map(|path| read(root, path)).collect()
}

fn collect_rust_files(folder: &Path, paths: &mut Vec<PathBuf>) -> Result<()> {
    let entries =
        std::fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("list {}", folder.display()))?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            if entry.file_name() != "target" {
                collect_rust_files(&path, paths)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            paths.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(judge: fn(&Source) -> Vec<Violation>, path: &str, text: &str) -> Vec<String> {
        judge(&Source::parse(path, text))
            .into_iter()
            .map(|violation| violation.place)
            .collect()
    }

    fn unsafe_places(sources: &[(&str, &str)]) -> Vec<(&'static str, String)> {
        let sources: Vec<_> = sources
            .iter()
            .map(|(path, text)| Source::parse(*path, text))
            .collect();
        judge_unsafe(&sources)
            .into_iter()
            .map(|v| (v.invariant, v.place))
            .collect()
    }

    #[test]
    fn unsafe_in_words_is_no_unsafe_code() {
        let text = "// unsafe\nlet a = \"unsafe {\";\nlet unsafely = 1;\n#![forbid(unsafe_code)]\n";
        assert_eq!(
            unsafe_places(&[("crates/tensora-formats/src/lib.rs", text)]),
            []
        );
    }

    #[test]
    fn unsafe_outside_its_home_is_found() {
        let text = "fn a() {\n    // SAFETY: none\n    unsafe { b() }\n}\n";
        for path in [
            "crates/tensora-formats/src/a.rs",
            "crates/tensora-formats/tests/a.rs",
            "xtask/src/a.rs",
        ] {
            assert_eq!(
                unsafe_places(&[(path, text)]),
                [(UNSAFE_CONFINED, format!("{path}:3"))]
            );
        }
        assert_eq!(unsafe_places(&[("crates/tensora-io/src/a.rs", text)]), []);
    }

    #[test]
    fn the_command_has_three_blocks_and_not_four() {
        let one = "fn map() {\n    // SAFETY: taken on\n    unsafe { io() }\n}\n";
        let path = "crates/tensora-cli/src/a.rs";
        let three = one.repeat(3);
        assert_eq!(unsafe_places(&[(path, &three)]), []);
        let four = [(path, three.as_str()), ("crates/tensora-cli/src/b.rs", one)];
        assert_eq!(
            unsafe_places(&four),
            [(UNSAFE_CONFINED, "crates/tensora-cli/src/b.rs:3".to_owned())]
        );
        assert_eq!(
            unsafe_places(&[("crates/tensora/src/a.rs", one)]),
            [(UNSAFE_CONFINED, "crates/tensora/src/a.rs:3".to_owned())]
        );
    }

    #[test]
    fn an_unexplained_unsafe_is_found() {
        let good = concat!(
            "// SAFETY: one reason\n// over two lines\nunsafe impl Send for A {}\n",
            "// SAFETY: the value of a statement\nlet x =\n    unsafe { f() };\n",
            "let y = unsafe { g() }; // SAFETY: same line\n",
            "// SAFETY: an attribute between\n#[allow(unsafe_code)]\nunsafe { h() }\n",
            "unsafe fn declared() {}\n",
        );
        assert_eq!(unsafe_places(&[("crates/tensora-io/src/a.rs", good)]), []);

        for bad in [
            "fn a() {\n    unsafe { b() }\n}\n",
            "// SAFETY: of another statement\nlet x = 1;\nunsafe { f() };\n",
            "// SAFETY: too far away\n\nunsafe impl Send for A {}\n",
            "unsafe impl Sync for A {}\n",
        ] {
            let places = unsafe_places(&[("crates/tensora-io/src/a.rs", bad)]);
            assert_eq!(places.len(), 1, "{bad}");
            assert_eq!(places[0].0, UNSAFE_EXPLAINED, "{bad}");
        }
    }

    #[test]
    fn crate_roots_must_forbid_or_deny() {
        let forbid = "#![forbid(unsafe_code)]\n";
        let deny = "#![deny(unsafe_code)]\n";
        for (path, text, broken) in [
            ("crates/tensora-formats/src/lib.rs", forbid, 0),
            ("crates/tensora-formats/src/lib.rs", deny, 1),
            (
                "crates/tensora-formats/src/lib.rs",
                "// #![forbid(unsafe_code)]\n",
                1,
            ),
            ("crates/tensora/src/lib.rs", deny, 1),
            ("crates/tensora-cli/src/main.rs", deny, 0),
            ("crates/tensora-io/src/lib.rs", deny, 0),
            ("crates/tensora-io/src/lib.rs", "", 1),
            ("xtask/src/main.rs", "", 1),
        ] {
            assert_eq!(
                judge(judge_root, path, text).len(),
                broken,
                "{path}: {text}"
            );
        }
    }

    #[test]
    fn format_words_are_found_in_code_comments_and_messages() {
        let good = "use tensora_io::Backend; // of Tensora\n#[cfg(tensora_portable)]\n\
                    #[cfg(test)]\nmod tests { const NAME: &str = \"model.safetensors\"; }\n";
        assert_eq!(judge(judge_vocabulary, "a.rs", good), Vec::<String>::new());
        for bad in [
            "struct TensorRange;",
            "// one per tensor",
            "\"bad DType\"",
            "serverlessllm();",
            "// SafeTensors",
        ] {
            assert_eq!(judge(judge_vocabulary, "a.rs", bad), ["a.rs:1"], "{bad}");
        }
    }

    #[test]
    fn impure_names_are_found_however_they_are_imported() {
        let good = "use std::{fmt, collections::BTreeMap};\nuse std::time::Duration;\nlet io = 1;\n\
                    use crate::fs;\n#[cfg(test)]\nmod tests { use std::fs; }\n";
        assert_eq!(judge(judge_purity, "a.rs", good), Vec::<String>::new());
        for bad in [
            "use std::fs;",
            "use std::{fmt, fs::read};",
            "use std::{collections::{BTreeMap, BTreeSet}, io};",
            "let a = std::env::var(name);",
            "::std::process::exit(1)",
            "File::open(path)",
            "let start = Instant::now();",
        ] {
            assert_eq!(judge(judge_purity, "a.rs", bad), ["a.rs:1"], "{bad}");
        }
    }
}
