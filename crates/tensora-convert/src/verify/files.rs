//! Files read as a whole, for what is known of them as a whole: their SHA-256.

use std::collections::BTreeMap;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use tensora_formats::{CheckpointIndex, FileEntry, TensorEntry};
use tensora_io::Control;

use super::VerifyOptions;
use super::digests::TensorHashers;
use crate::assemble::{Assembled, Assembly, AssemblyStream, Record, RecordContent, plan_buffers};
use crate::identity;
use crate::{Digest, Error, Result};

/// Reads these files once from beginning to end. Returns their SHA-256, by their positions in the index, and
/// hashes their contiguous tensors on the way.
pub(super) fn hash(
    options: &VerifyOptions,
    index: &CheckpointIndex,
    files: &[usize],
    hashers: &mut TensorHashers<'_>,
    control: &Control,
) -> Result<BTreeMap<usize, Digest>> {
    let entries: Vec<&FileEntry> = files.iter().map(|&file| &index.files()[file]).collect();
    let sources = entries
        .iter()
        .map(|entry| identity::open(entry).map(Arc::new))
        .collect::<Result<Vec<_>>>()?;
    let whole: Vec<Assembly> = entries.iter().enumerate().map(as_it_is).collect();
    let buffers = plan_buffers(
        options.memory_limit_bytes,
        &whole.iter().collect::<Vec<_>>(),
    )?;
    let stream = AssemblyStream::new(Arc::new(whole), sources, &options.reading, buffers, control)?;
    let digests = thread::scope(|scope| {
        // A rendezvous and no queue: the reader must not run out of buffers because one hash is slower.
        let (sender, receiver) = mpsc::sync_channel(0);
        let sha256 = thread::Builder::new()
            .name("tensora-sha256".to_owned())
            .spawn_scoped(scope, move || sha256_of_each(&receiver))
            .map_err(|source| Error::Thread { source })?;
        let hashed = hash_tensors(
            stream,
            files,
            index,
            hashers,
            control,
            |bytes, ends_file| {
                // The other end is gone only after a panic, which is passed on below.
                let _ = sender.send((bytes.clone(), ends_file));
            },
        );
        drop(sender);
        let digests = sha256.join().unwrap_or_else(|panic| resume_unwind(panic));
        hashed.map(|()| digests)
    })?;
    Ok(files.iter().copied().zip(digests).collect())
}

/// A file to be put together out of itself.
fn as_it_is((file, entry): (usize, &&FileEntry)) -> Assembly {
    let content = RecordContent::Stored {
        file,
        range: 0..entry.bytes,
    };
    Assembly {
        bytes: entry.bytes,
        prefix: Vec::new(),
        records: vec![Record { at: 0, content }],
    }
}

/// The SHA-256 of each file, whose bytes come in order, and with each piece whether the file ends with it.
fn sha256_of_each(pieces: &Receiver<(Bytes, bool)>) -> Vec<Digest> {
    let mut hasher = Sha256::new();
    let mut digests = Vec::new();
    for (bytes, ends_file) in pieces {
        hasher.update(&bytes);
        if ends_file {
            digests.push(Digest::from_bytes(hasher.finalize_reset().into()));
        }
    }
    digests
}

/// Hashes the contiguous tensors of `files` while these pass by. `visit` is given every window before.
fn hash_tensors(
    windows: impl Iterator<Item = Result<Assembled>>,
    files: &[usize],
    index: &CheckpointIndex,
    hashers: &mut TensorHashers<'_>,
    control: &Control,
    visit: impl Fn(&Bytes, bool),
) -> Result<()> {
    let mut tensors = contiguous_tensors(index, files);
    for window in windows {
        let Assembled {
            file,
            range,
            bytes,
            ends_file,
        } = window?;
        visit(&bytes, ends_file);
        // Those that begin behind this window are behind all of these, and tensors may overlap.
        let of_file = &mut tensors[file];
        let begun = of_file.partition_point(|(_, tensor)| tensor.offset < range.end);
        for (number, tensor) in &of_file[..begun] {
            let (begin, end) = (
                tensor.offset.max(range.start),
                tensor.range().end.min(range.end),
            );
            let part = &bytes[position(begin - range.start)..position(end - range.start)];
            hashers.update(*number, begin - tensor.offset, part);
            control.advance(end - begin);
        }
        let mut number = 0;
        of_file.retain(|(_, tensor)| {
            number += 1;
            number > begun || tensor.range().end > range.end
        });
    }
    Ok(())
}

/// The tensors with data that are stored in row-major order, by offset, for each of these files.
fn contiguous_tensors<'a>(
    index: &'a CheckpointIndex,
    files: &[usize],
) -> Vec<Vec<(usize, &'a TensorEntry)>> {
    let places: BTreeMap<usize, usize> = files.iter().copied().zip(0..).collect();
    let mut of_files = vec![Vec::new(); files.len()];
    for (number, tensor) in index.tensors().iter().enumerate() {
        if let Some(&place) = places.get(&tensor.file)
            && tensor.is_contiguous()
            && tensor.bytes > 0
        {
            of_files[place].push((number, tensor));
        }
    }
    for tensors in &mut of_files {
        tensors.sort_by_key(|(_, tensor)| tensor.offset);
    }
    of_files
}

/// A position in a buffer, which a `usize` can count.
#[allow(clippy::cast_possible_truncation)]
fn position(at: u64) -> usize {
    at as usize
}
