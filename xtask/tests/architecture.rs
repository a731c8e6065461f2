//! The invariants of the architecture hold: `cargo test` says so, not only `cargo xtask tidy`.

use xtask::tidy::{ARCHITECTURE, repository_root};

#[test]
fn every_architecture_invariant_holds() {
    let root = repository_root();
    let mut broken = Vec::new();
    for check in ARCHITECTURE {
        let violations =
            (check.run)(&root).unwrap_or_else(|error| panic!("{}: {error:#}", check.name));
        broken.extend(violations.iter().map(ToString::to_string));
    }
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
}
