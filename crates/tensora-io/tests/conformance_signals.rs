//! Loads go on when signals interrupt them. One test in a process of its own, because every thread of it is
//! interrupted.
#![cfg(all(feature = "testing", unix))]

mod conformance_reference;

use conformance_reference::{Defect, Reference};
use tensora_io::testing::{Options, signals, skip};
use tensora_io::{BackendKind, backend};

#[test]
fn interruptions_do_no_harm() {
    let options = Options::default();
    signals(&|| Box::new(Reference::new(Defect::None)), &options);
    for kind in BackendKind::ALL {
        match backend(kind) {
            Ok(_) => signals(&|| backend(kind).unwrap(), &options),
            Err(error) => skip(&format!("signals: {error}")),
        }
    }
    if cfg!(target_os = "linux") {
        let run = || {
            signals(
                &|| Box::new(Reference::new(Defect::FailsWhenInterrupted)),
                &options,
            );
        };
        let panic = std::panic::catch_unwind(run).expect_err("no thread was interrupted");
        let message = panic.downcast_ref::<String>().unwrap();
        assert!(message.contains("the defect's own panic"), "{message}");
    }
}
