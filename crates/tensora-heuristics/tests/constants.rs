//! The constants and their table in `docs/HEURISTICS.md` say the same.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn read(path: &str) -> String {
    let path = repository().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Names and values of the numbers in `tuning.rs`.
fn constants(source: &str) -> BTreeMap<String, String> {
    source
        .lines()
        .filter_map(|line| line.strip_prefix("pub(crate) const ")?.split_once(": "))
        .map(|(name, rest)| {
            let (_, value) = rest.split_once(" = ").expect("a constant has a value");
            let value = value.strip_suffix(';').expect("it is on one line");
            (name.to_owned(), value.to_owned())
        })
        .collect()
}

/// The first two columns of rows whose first one is `` `A_NAME` ``, and the other two.
fn table(document: &str) -> BTreeMap<String, (String, [String; 2])> {
    document
        .lines()
        .filter_map(|line| {
            let cells: Vec<_> = line.split('|').map(str::trim).collect();
            let ["", name, value, unit, source, ""] = cells[..] else {
                return None;
            };
            let name = name.strip_prefix('`')?.strip_suffix('`')?;
            Some((
                name.to_owned(),
                (
                    value.trim_matches('`').to_owned(),
                    [unit.to_owned(), source.to_owned()],
                ),
            ))
        })
        .collect()
}

#[test]
fn every_constant_is_documented_with_value_unit_and_source() {
    let constants = constants(&read("crates/tensora-heuristics/src/tuning.rs"));
    let table = table(&read("docs/HEURISTICS.md"));
    assert!(constants.len() > 20, "{constants:?}");
    let documented: BTreeMap<_, _> = table
        .iter()
        .map(|(name, (value, _))| (name.clone(), value.clone()))
        .collect();
    assert_eq!(constants, documented);
    for (name, (_, texts)) in &table {
        assert!(texts.iter().all(|text| !text.is_empty()), "{name}");
    }
}

#[test]
fn runs_that_constants_rest_on_are_archived() {
    let source = read("crates/tensora-heuristics/src/tuning.rs");
    let mut runs = 0;
    for (start, _) in source.match_indices("benches/runs/") {
        let path: String = source[start..]
            .chars()
            .take_while(|c| c.is_ascii_alphanumeric() || "/-._".contains(*c))
            .collect();
        let path = path.trim_end_matches('.');
        assert!(repository().join(path).exists(), "{path}");
        runs += 1;
    }
    assert!(runs > 0);
}
