//! No load leaves a descriptor, a thread or memory behind. One test in a process of its own, because it counts
//! what the whole process holds.
#![cfg(all(feature = "testing", unix))]

mod conformance_reference;

use conformance_reference::{Defect, Reference};
use tensora_io::testing::{Options, leaks, skip};
use tensora_io::{BackendKind, backend};

#[test]
fn nothing_is_left_behind() {
    let options = Options::default();
    leaks(&|| Box::new(Reference::new(Defect::None)), &options);
    for kind in BackendKind::ALL {
        match backend(kind) {
            Ok(_) => leaks(&|| backend(kind).unwrap(), &options),
            Err(error) => skip(&format!("leaks: {error}")),
        }
    }
    if cfg!(not(target_os = "linux")) {
        return;
    }
    // Last, because these do leave something behind.
    for (defect, what) in [
        (Defect::KeepsDescriptors, "descriptors"),
        (Defect::KeepsThreads, "threads"),
        (Defect::KeepsMemory, "bytes of memory"),
    ] {
        let run = || leaks(&|| Box::new(Reference::new(defect)), &options);
        let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run))
            .expect_err("the leak was not found");
        let message = panic.downcast_ref::<String>().unwrap();
        assert!(
            message.contains(&format!("left {what} behind")),
            "{defect:?}: {message}"
        );
    }
}
