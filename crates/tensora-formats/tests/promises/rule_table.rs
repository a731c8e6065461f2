//! The table of rules in `docs/FORMATS.md` is complete and true.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

#[test]
fn every_variant_has_a_rule_and_a_test_that_provokes_it() {
    let crate_root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let Ok(document) = fs::read_to_string(crate_root.join("../../docs/FORMATS.md")) else {
        println!("skipped: docs/FORMATS.md is not part of the published crate");
        return;
    };
    let source = fs::read_to_string(crate_root.join("src/error.rs")).unwrap();
    let body = source.split_once("pub enum Error {").unwrap().1;
    let body = body.split_once("\n}").unwrap().0;
    let variants: BTreeSet<&str> = body
        .lines()
        .filter_map(|line| line.strip_prefix("    ")?.strip_suffix(" {"))
        .filter(|name| name.starts_with(|first: char| first.is_ascii_uppercase()))
        .collect();
    assert!(variants.len() > 50, "{variants:?}");

    let table = document.split_once("| Rule | Variant | Test |").unwrap().1;
    let mut listed = BTreeSet::new();
    for row in table.lines().filter(|line| line.contains("::")) {
        let code: Vec<&str> = row.split('`').skip(1).step_by(2).collect();
        let [.., variant, test] = code[..] else {
            panic!("{row}");
        };
        assert!(listed.insert(variant), "{variant} is listed twice");
        let (module, function) = test.split_once("::").unwrap();
        let tests = format!("tests/promises/{module}.rs");
        let tests = fs::read_to_string(crate_root.join(tests)).unwrap();
        // From the function's head to the next test: what it checks stands in between.
        let head = format!("fn {function}() {{");
        let body = tests
            .split_once(&head)
            .unwrap_or_else(|| panic!("no test {test}"))
            .1;
        let body = body.split("#[test]").next().unwrap();
        assert!(
            body.contains(&format!("Error::{variant} ")),
            "{test}: no Error::{variant}"
        );
    }
    assert_eq!(listed, variants);
}
