//! Bytes of a mapped file that are not there any more, said in words instead of by a bare crash.
//!
//! Somebody who truncates a mapped file breaks the contract that [`mapping`](crate::mapping) takes on; whoever then looks at
//! the bytes behind its new end gets SIGBUS. Nothing can go on from there, but it can be said which file it was.

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use signal_hook::consts::SIGBUS;
use signal_hook::low_level::{emulate_default_handler, exit};
use signal_hook_registry::register_sigaction;
use tensora::{Checkpoint, MemoryKind};

/// What shells report for a process that the signal has killed: 128 and its number.
const EXIT_STATUS: i32 = 128 + SIGBUS;
/// What the kernel says of a page that is not there: `BUS_ADRERR`, the same number everywhere. A signal that a process
/// has sent has another one, and no address.
const NO_SUCH_PAGE: i32 = 2;

/// What the handler needs, made ready before there is one: it may neither allocate nor wait for a lock.
struct Watched {
    stderr: File,
    files: Vec<MappedFile>,
}

/// The addresses at which tensors of a file are, and what is said of an access there that fails.
struct MappedFile {
    addresses: Range<usize>,
    message: String,
}

static WATCHED: OnceLock<Watched> = OnceLock::new();
/// Whether the checkpoint is still there: later, other things may be at these addresses.
static IS_MAPPED: AtomicBool = AtomicBool::new(false);

/// As long as this lives, SIGBUS for bytes of the checkpoint's files is said as an error.
#[derive(Debug)]
pub(crate) struct Watch<'c>(Option<&'c Checkpoint>);

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if self.0.is_some() {
            IS_MAPPED.store(false, Ordering::SeqCst);
        }
    }
}

/// Watches over a mapped checkpoint, the only one of this process; over an owned one there is nothing to watch.
pub(crate) fn watch(checkpoint: &Checkpoint) -> Result<Watch<'_>> {
    if checkpoint.report().plan.memory != MemoryKind::Mapped {
        return Ok(Watch(None));
    }
    let stderr = std::io::stderr().as_fd().try_clone_to_owned();
    let watched = Watched {
        stderr: stderr.context("could not duplicate standard error")?.into(),
        files: mapped_files(checkpoint),
    };
    if WATCHED.set(watched).is_ok() {
        register().context("could not watch for SIGBUS")?;
    }
    IS_MAPPED.store(true, Ordering::SeqCst);
    Ok(Watch(Some(checkpoint)))
}

/// Where the tensors of each file are, from the first to the last: a file is mapped in one piece.
fn mapped_files(checkpoint: &Checkpoint) -> Vec<MappedFile> {
    let index = checkpoint.index();
    let mut addresses: Vec<Option<Range<usize>>> = vec![None; index.files().len()];
    for tensor in checkpoint
        .iter()
        .filter(|tensor| !tensor.bytes().is_empty())
    {
        let Some(file) = index.tensor(tensor.name()).map(|entry| entry.file) else {
            continue;
        };
        let bytes = tensor.bytes().as_ptr_range();
        let own = bytes.start as usize..bytes.end as usize;
        let all = addresses[file].get_or_insert_with(|| own.clone());
        *all = all.start.min(own.start)..all.end.max(own.end);
    }
    let files = index.files().iter().zip(addresses);
    files
        .filter_map(|(file, addresses)| {
            Some(MappedFile {
                addresses: addresses?,
                message: message(&file.path.display().to_string()),
            })
        })
        .collect()
}

fn message(path: &str) -> String {
    format!(
        "error: {path}: bytes of it could not be had while it was mapped (SIGBUS): the file was truncated, or its storage \
         failed\n\
         hint: load it again when nobody writes to it; `--memory owned` copies it first, and says where it ends\n"
    )
}

#[allow(unsafe_code)]
fn register() -> std::io::Result<()> {
    // SAFETY: what is registered is safe to run in a signal handler: `handle` and what it calls only load from atomics and
    // from memory that is never changed again, and make system calls; they do not allocate, lock or panic.
    unsafe { register_sigaction(SIGBUS, handle) }.map(drop)
}

/// Says which file it was, and ends the process at once. Any other SIGBUS does what it would have done.
#[allow(unsafe_code)]
fn handle(info: &libc::siginfo_t) {
    if info.si_code == NO_SUCH_PAGE && IS_MAPPED.load(Ordering::SeqCst) {
        // SAFETY: the kernel fills the address in for a SIGBUS of its own, which the code tells from others.
        let address = unsafe { info.si_addr() } as usize;
        if let Some(watched) = WATCHED.get()
            && let Some(file) = watched.files.iter().find(|file| file.is_at(address))
        {
            // One system call; nobody is left to tell if it fails.
            let _ = (&watched.stderr).write(file.message.as_bytes());
            exit(EXIT_STATUS);
        }
    }
    // The default is known for this signal, and does not return.
    let _ = emulate_default_handler(SIGBUS);
}

impl MappedFile {
    fn is_at(&self, address: usize) -> bool {
        self.addresses.contains(&address)
    }
}
