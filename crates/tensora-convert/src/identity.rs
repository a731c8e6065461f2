//! Whether a source is still what it was, and a conversion still the same one.

use std::fs::Metadata;
use std::io;
use std::time::UNIX_EPOCH;

use tensora_formats::{CheckpointIndex, FileEntry, Format, PlannedIndex};
use tensora_io::SourceFile;

use crate::assemble::RecordContent;
use crate::journal::Fingerprint;
use crate::outputs::Output;
use crate::{Digest, Error, Result};

/// What tells that a file was written to, or is another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    bytes: u64,
    modified_ns: u128,
    inode: u64,
}

impl Identity {
    fn new(metadata: &Metadata) -> Self {
        let modified = metadata.modified().ok();
        let since = modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        Self {
            bytes: metadata.len(),
            modified_ns: since.map_or(0, |since| since.as_nanos()),
            inode: inode(metadata),
        }
    }
}

#[cfg(unix)]
fn inode(metadata: &Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::ino(metadata)
}

#[cfg(not(unix))]
fn inode(_metadata: &Metadata) -> u64 {
    0
}

/// The identity of what is at a file's path now, which has to have the length that its index was
/// validated against.
pub(crate) fn of_path(file: &FileEntry) -> Result<Identity> {
    let identity =
        std::fs::metadata(&file.path).map_err(|error| changed(file, &error.to_string()))?;
    check_length(file, Identity::new(&identity))
}

fn check_length(file: &FileEntry, identity: Identity) -> Result<Identity> {
    match identity.bytes {
        bytes if bytes == file.bytes => Ok(identity),
        bytes => Err(changed(
            file,
            &format!("it was {} bytes long, and is {bytes} now", file.bytes),
        )),
    }
}

/// Opens a file, which has to be the one that the plan was made for.
pub(crate) fn open(file: &FileEntry, identity: Identity) -> Result<SourceFile> {
    let source = SourceFile::open(&file.path).map_err(Error::reading)?;
    check(file, identity, &source)?;
    Ok(source)
}

/// Checks that an open file is still what it was, and still what is at its path.
pub(crate) fn check(file: &FileEntry, identity: Identity, source: &SourceFile) -> Result<()> {
    let metadata = source
        .file()
        .metadata()
        .map_err(|error| not_known(file, error))?;
    let now = check_length(file, Identity::new(&metadata))?;
    if now != identity {
        return Err(changed(file, "it was written to since"));
    }
    if of_path(file)? != identity {
        return Err(changed(file, "another file took its place"));
    }
    Ok(())
}

/// A passing failure, which does not say that anything changed.
fn not_known(file: &FileEntry, source: io::Error) -> Error {
    Error::Read(tensora_io::Error::File {
        operation: "stat",
        path: file.path.clone(),
        source,
    })
}

fn changed(file: &FileEntry, how: &str) -> Error {
    Error::SourceChanged {
        path: file.path.clone(),
        how: how.to_owned(),
    }
}

/// The fingerprint of a conversion.
pub(crate) fn fingerprint(
    index: &CheckpointIndex,
    sources: &[(FileEntry, Identity)],
    format: Format,
    outputs: &[Output],
    indexes: &[PlannedIndex],
) -> Fingerprint {
    let mut source = Parts::default();
    for (file, identity) in sources {
        source.add(file.name.as_bytes());
        source.number(identity.bytes);
        source.add(&identity.modified_ns.to_le_bytes());
        source.number(identity.inode);
    }
    // Indexes are no data files, and say how the same bytes are read.
    for tensor in index.tensors() {
        source.add(tensor.name.as_bytes());
        source.add(tensor.dtype.name().as_bytes());
        source.numbers(&tensor.shape);
        source.numbers(tensor.strides.as_deref().unwrap_or_default());
        source.numbers(&[tensor.file as u64, tensor.offset, tensor.bytes]);
    }
    let mut target = Parts::default();
    target.add(format.to_string().as_bytes());
    for output in outputs {
        target.add(output.name.as_bytes());
        target.number(output.assembly.bytes);
        target.add(&output.assembly.prefix);
        target.number(output.assembly.records.len() as u64);
        for record in &output.assembly.records {
            target.number(record.at);
            match &record.content {
                RecordContent::Stored { file, range } => {
                    target.numbers(&[*file as u64, range.start, range.end]);
                }
                // The source's metadata says the rest.
                RecordContent::Gathered(part) => target.add(part.name().as_bytes()),
            }
        }
    }
    for index in indexes {
        target.add(index.name.as_bytes());
        target.add(&index.contents);
    }
    Fingerprint {
        source: source.digest(),
        target: target.digest(),
    }
}

/// Hashes values, each with its length where that varies.
#[derive(Default)]
struct Parts(blake3::Hasher);

impl Parts {
    fn number(&mut self, number: u64) {
        self.0.update(&number.to_le_bytes());
    }

    fn numbers(&mut self, numbers: &[u64]) {
        self.number(numbers.len() as u64);
        for &number in numbers {
            self.number(number);
        }
    }

    fn add(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.0.update(bytes);
    }

    fn digest(&self) -> String {
        Digest::from_bytes(self.0.finalize().into()).to_string()
    }
}
