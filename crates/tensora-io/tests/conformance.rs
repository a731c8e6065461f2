//! Every backend of this crate against the conformance suite, one test per check.
#![cfg(feature = "testing")]

use tensora_io::testing::{Check, Options, skip};
use tensora_io::{BackendKind, backend};

fn run(kind: BackendKind, check: &Check) {
    if let Err(error) = backend(kind) {
        return skip(&format!("{}: {error}", check.name()));
    }
    let make = || backend(kind).expect("what was available a moment ago");
    check.run(&make, &Options::default());
}

macro_rules! backends {
    ($($module:ident: $kind:ident)*) => {
        $(mod $module {
            fn run(check: &tensora_io::testing::Check) {
                super::run(tensora_io::BackendKind::$kind, check);
            }

            tensora_io::conformance_tests!(run);
        })*
    };
}

backends! {
    sync: Sync
    tokio: Async
    io_uring: IoUring
    mmap: Mmap
}
