//! Whether a source is still what it was, and a conversion still the same one.

use std::io;

use tensora_formats::{CheckpointIndex, FileEntry, FileStamp, Format, PlannedIndex};
use tensora_io::SourceFile;

use crate::assemble::RecordContent;
use crate::journal::Fingerprint;
use crate::outputs::Output;
use crate::{Digest, Error, Result};

/// Checks that what is at a file's path now is what its metadata was read from.
pub(crate) fn check_path(file: &FileEntry) -> Result<()> {
    match std::fs::metadata(&file.path) {
        Ok(metadata) => check_stamp(file, FileStamp::new(&metadata)),
        Err(error) => Err(changed(file, error.to_string())),
    }
}

fn check_stamp(file: &FileEntry, now: FileStamp) -> Result<()> {
    match file.stamp.change_until(&now) {
        None => Ok(()),
        Some(change) => Err(changed(file, change.to_string())),
    }
}

/// Opens a file, which has to be the one that its metadata was read from.
pub(crate) fn open(file: &FileEntry) -> Result<SourceFile> {
    let source = SourceFile::open(&file.path).map_err(Error::reading)?;
    check(file, &source)?;
    Ok(source)
}

/// Checks that an open file is still what it was, and still what is at its path.
pub(crate) fn check(file: &FileEntry, source: &SourceFile) -> Result<()> {
    let metadata = source
        .file()
        .metadata()
        .map_err(|error| not_known(file, error))?;
    check_stamp(file, FileStamp::new(&metadata))?;
    check_path(file)
}

/// A passing failure, which does not say that anything changed.
fn not_known(file: &FileEntry, source: io::Error) -> Error {
    Error::Read(tensora_io::Error::File {
        operation: "stat",
        path: file.path.clone(),
        source,
    })
}

fn changed(file: &FileEntry, how: String) -> Error {
    Error::SourceChanged {
        path: file.path.clone(),
        how,
    }
}

/// The fingerprint of a conversion.
pub(crate) fn fingerprint(
    index: &CheckpointIndex,
    format: Format,
    outputs: &[Output],
    indexes: &[PlannedIndex],
) -> Fingerprint {
    let mut source = Parts::default();
    for file in index.files() {
        source.add(file.name.as_bytes());
        // Not the device, whose number may be another after the machine was started again.
        source.number(file.stamp.bytes());
        source.add(&file.stamp.modified_ns().to_le_bytes());
        source.number(file.stamp.inode());
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
