//! The one place where the command takes on the contract of mappings.

use tensora::{Loader, MappingPermit, MemoryChoice};

/// `loader` with leave to map the files, unless owned memory was asked for.
pub(crate) fn allow_mapping(loader: Loader, memory: MemoryChoice) -> Loader {
    if memory == MemoryChoice::Owned {
        return loader;
    }
    loader.allow_mapping(permit())
}

/// Leave to map files.
#[allow(unsafe_code)]
pub(crate) fn permit() -> MappingPermit {
    // SAFETY: the contract is that nobody truncates or rewrites the files while the tensors are in
    // use. The command uses them only until it exits and writes to none of them, but it cannot keep
    // other processes from doing so: there it relies on the user, to whom `load --help`,
    // `calibrate --help` and the README state the contract and the consequences. Breaking it is
    // undefined behaviour by Rust's rules. The bytes are only ever brought into memory, copied or hashed
    // as plain bytes, so what comes of it is a wrong digest, or SIGBUS past a truncated end, which
    // `bus_error` reports.
    // `--memory owned` never comes here and relies on nobody.
    unsafe { MappingPermit::new() }
}
