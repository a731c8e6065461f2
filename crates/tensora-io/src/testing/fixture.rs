//! What checks are made of: sample files, batches laid out between canaries, and their verification.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tempfile::TempDir;

use super::Options;
use crate::{
    Backend, BackendKind, Control, DirectPolicy, ReadRequest, ReadStats, Region, ResidentPolicy,
    Result, SourceFile, TransferParams,
};

/// Stands between destinations and, before a read, in them. Even, as no byte of a sample is.
const CANARY: u8 = 0xAA;
/// What destinations are overwritten with once a call has returned. Also even.
const OVERWRITTEN: u8 = 0x54;
/// How long a stray write is waited for. A read that is still under way ends in far less.
const QUIET_TIME: Duration = Duration::from_millis(50);
/// What destinations are aligned to, or misaligned relative to: a page, or a large logical block.
pub(super) const PLACE_ALIGN_BYTES: usize = 4096;
/// Most bytes of canary before a destination whose place does not matter.
const MAX_GUARD_BYTES: usize = 64;

pub(super) const KIB: usize = 1 << 10;
pub(super) const MIB: usize = 1 << 20;

/// Each way of treating what is in the page cache, where reads may go through it.
fn resident_params() -> impl Iterator<Item = TransferParams> {
    let drop_all = ResidentPolicy::CopyAndDrop {
        limit_bytes: u64::MAX,
    };
    [DirectPolicy::Never, DirectPolicy::Preferred]
        .into_iter()
        .flat_map(move |direct| {
            [ResidentPolicy::Copy, drop_all].map(|resident| TransferParams {
                chunk_bytes: 64 << 10,
                queue_depth: 4,
                workers: 3,
                direct,
                resident,
            })
        })
}

const POLICIES: [DirectPolicy; 3] = [
    DirectPolicy::Never,
    DirectPolicy::Preferred,
    DirectPolicy::Required,
];

/// Numbers that look random and follow from a seed (SplitMix64).
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// Below `bound`, which is not 0.
    pub(super) fn below(&mut self, bound: usize) -> usize {
        // The remainder is less than a `usize`, so nothing is cut off.
        #[allow(clippy::cast_possible_truncation)]
        let number = (self.next() % bound as u64) as usize;
        number
    }

    pub(super) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

/// One run of one check.
#[derive(Debug)]
pub(super) struct Trial {
    pub(super) backend: Arc<dyn Backend>,
    pub(super) options: Options,
    name: &'static str,
    directory: TempDir,
}

impl Trial {
    pub(super) fn new(name: &'static str, backend: Arc<dyn Backend>, options: &Options) -> Self {
        Self {
            backend,
            options: options.clone(),
            name,
            directory: temporary_directory(&options.directory),
        }
    }

    pub(super) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Records that a part of the check cannot be done here.
    pub(super) fn skip(&self, reason: &str) {
        super::skip(&format!("{} of {:?}: {reason}", self.name, self.backend));
    }

    /// Random numbers of this check alone.
    pub(super) fn random(&self) -> Random {
        Random::new(self.options.seed ^ digest(self.name))
    }

    /// A new file of odd bytes, so that no canary and no zero passes for content.
    pub(super) fn sample(&self, name: &str, len: usize) -> Sample {
        self.sample_in(self.directory(), name, len)
    }

    pub(super) fn sample_in(&self, directory: &Path, name: &str, len: usize) -> Sample {
        let path = directory.join(name);
        let mut random = Random::new(self.options.seed ^ digest(name));
        let mut content = Vec::with_capacity(len + 8);
        while content.len() < len {
            content.extend_from_slice(&(random.next() | 0x0101_0101_0101_0101).to_le_bytes());
        }
        content.truncate(len);
        std::fs::write(&path, &content)
            .unwrap_or_else(|error| panic!("write {}: {error}", path.display()));
        Sample {
            source: open(&path),
            content: content.into(),
        }
    }

    /// The policies under which `source` can be read.
    pub(super) fn policies(&self, source: &SourceFile) -> &'static [DirectPolicy] {
        // A mapping is the page cache itself, so a mapping backend never reads directly.
        if self.backend.kind() != BackendKind::Mmap && source.direct_support().is_supported() {
            &POLICIES
        } else {
            &POLICIES[..2]
        }
    }

    /// Every policy with every combination of chunk, depth and workers, and a few with each way of treating
    /// what is resident.
    pub(super) fn all_params(&self, sample: &Sample) -> Vec<TransferParams> {
        let mut all = Vec::new();
        for &direct in self.policies(&sample.source) {
            for chunk_bytes in [4 << 10, 64 << 10, 1 << 20] {
                for queue_depth in [1, 16] {
                    for workers in [1, 2, 16] {
                        all.push(TransferParams {
                            chunk_bytes,
                            queue_depth,
                            workers,
                            direct,
                            resident: ResidentPolicy::Reread,
                        });
                    }
                }
            }
        }
        all.extend(resident_params());
        all
    }

    /// Every policy with each chunk, depth and number of workers at least once.
    pub(super) fn few_params(&self, sample: &Sample) -> Vec<TransferParams> {
        let mut few = Vec::new();
        for &direct in self.policies(&sample.source) {
            for (chunk_bytes, queue_depth, workers) in
                [(4 << 10, 16, 16), (64 << 10, 16, 2), (1 << 20, 1, 1)]
            {
                few.push(TransferParams {
                    chunk_bytes,
                    queue_depth,
                    workers,
                    direct,
                    resident: ResidentPolicy::Reread,
                });
            }
        }
        few.extend(resident_params());
        few
    }

    /// Reads the slots and checks everything that `Ok` promises: the bytes, the canaries around them,
    /// the progress and the statistics.
    pub(super) fn read(&self, slots: &[Slot<'_>], params: &TransferParams) -> ReadStats {
        self.read_from(Arena::new(slots), slots, params)
    }

    /// The same into an arena that the check has prepared.
    pub(super) fn read_from(
        &self,
        mut arena: Arena,
        slots: &[Slot<'_>],
        params: &TransferParams,
    ) -> ReadStats {
        let (progress, control) = Progress::watch();
        let stats = self
            .backend
            .read(arena.requests(slots), params, &control)
            .unwrap_or_else(|error| panic!("a valid batch failed with {params:?}: {error}"));
        arena.verify(slots, params);
        judge_stats(&stats, slots, params);
        assert_eq!(
            progress.bytes(),
            stats.bytes,
            "the progress callback was told another number of bytes than arrived, with {params:?}"
        );
        stats
    }

    /// Reads the slots, whatever comes of it.
    pub(super) fn attempt(
        &self,
        slots: &[Slot<'_>],
        params: &TransferParams,
        control: &Control,
    ) -> (Arena, Result<ReadStats>) {
        let mut arena = Arena::new(slots);
        let outcome = self.backend.read(arena.requests(slots), params, control);
        (arena, outcome)
    }
}

pub(super) fn temporary_directory(parent: &Path) -> TempDir {
    tempfile::Builder::new()
        .prefix("tensora-testing-")
        .tempdir_in(parent)
        .unwrap_or_else(|error| panic!("a directory in {}: {error}", parent.display()))
}

pub(super) fn open(path: &Path) -> SourceFile {
    SourceFile::open(path).unwrap_or_else(|error| panic!("{error}"))
}

/// FNV-1a.
pub(super) fn digest(text: &str) -> u64 {
    text.bytes().fold(0xCBF2_9CE4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
    })
}

/// Parameters that suit checks of something else than parameters.
pub(super) fn params(direct: DirectPolicy) -> TransferParams {
    TransferParams {
        chunk_bytes: 64 << 10,
        queue_depth: 4,
        workers: 2,
        direct,
        resident: ResidentPolicy::Reread,
    }
}

/// A file whose content is known.
#[derive(Debug)]
pub(super) struct Sample {
    pub(super) source: SourceFile,
    pub(super) content: Arc<[u8]>,
}

impl Sample {
    pub(super) fn path(&self) -> &Path {
        self.source.path()
    }

    pub(super) fn len(&self) -> usize {
        self.content.len()
    }

    /// The same file, opened once more.
    pub(super) fn reopen(&self) -> Self {
        Self {
            source: open(self.path()),
            content: Arc::clone(&self.content),
        }
    }

    /// Makes the file shorter without the knowledge of whoever has it open.
    pub(super) fn shorten(&self, len: usize) {
        shorten(self.path(), len);
    }

    /// `len` bytes from `offset`, into any place.
    pub(super) fn slot(&self, offset: usize, len: usize) -> Slot<'_> {
        Slot {
            sample: self,
            offset: offset as u64,
            len,
            place: Place::Anywhere,
        }
    }

    /// The whole file, into a place congruent to it.
    pub(super) fn whole(&self) -> Slot<'_> {
        self.slot(0, self.len()).at(Place::Skewed(0))
    }
}

pub(super) fn shorten(path: &Path, len: usize) {
    std::fs::OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|file| file.set_len(len as u64))
        .unwrap_or_else(|error| panic!("shorten {}: {error}", path.display()));
}

/// Where a destination lies.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    /// A few bytes after the one before.
    Anywhere,
    /// At an address that differs from the offset by this much, modulo [`PLACE_ALIGN_BYTES`].
    Skewed(usize),
    /// Right after the one before.
    Adjacent,
}

/// One request to be made, and what it should bring.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot<'s> {
    sample: &'s Sample,
    pub(super) offset: u64,
    pub(super) len: usize,
    place: Place,
}

impl<'s> Slot<'s> {
    pub(super) fn at(mut self, place: Place) -> Self {
        self.place = place;
        self
    }

    pub(super) fn offset(mut self, offset: u64) -> Self {
        self.offset = offset;
        self
    }

    pub(super) fn expected(&self) -> &'s [u8] {
        usize::try_from(self.offset)
            .ok()
            .and_then(|begin| self.sample.content.get(begin..begin.checked_add(self.len)?))
            .unwrap_or_else(|| panic!("the check expects bytes past the end of a sample: {self}"))
    }

    pub(super) fn request<'a>(
        &self,
        destination: impl Into<crate::Destination<'a>>,
    ) -> ReadRequest<'a>
    where
        's: 'a,
    {
        ReadRequest {
            file: &self.sample.source,
            offset: self.offset,
            destination: destination.into(),
        }
    }

    /// Explains how `found` differs from what should have been read.
    pub(super) fn compare(&self, found: &[u8], params: &TransferParams) {
        let expected = self.expected();
        if found == expected {
            return;
        }
        let wrong: Vec<usize> = (0..self.len)
            .filter(|&at| found[at] != expected[at])
            .collect();
        let at = wrong[0];
        panic!(
            "{self} at address {:p}: {} bytes are wrong, the first at {at} ({:#04x} instead of {:#04x}{}), \
             the last at {}, with {params:?}",
            found.as_ptr(),
            wrong.len(),
            found[at],
            expected[at],
            match found[at] {
                CANARY | 0 => ", never written",
                _ => "",
            },
            wrong[wrong.len() - 1],
        );
    }
}

impl std::fmt::Display for Slot<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { offset, len, .. } = self;
        let path = self.sample.path().display();
        write!(f, "{len} bytes from offset {offset} of {path}")
    }
}

/// Memory with the destinations of a batch in it, and canaries between them.
#[derive(Debug)]
pub(super) struct Arena {
    memory: Region,
    places: Vec<Range<usize>>,
    /// What memory holds where nothing was read.
    filling: u8,
}

impl Arena {
    /// Destinations full of canaries.
    pub(super) fn new(slots: &[Slot<'_>]) -> Self {
        let mut arena = Self::untouched(slots);
        arena.memory.as_mut_slice().fill(CANARY);
        arena.filling = CANARY;
        arena
    }

    /// Destinations in fresh memory, which reads as zeros and has no page behind it yet.
    pub(super) fn untouched(slots: &[Slot<'_>]) -> Self {
        // The addresses of the places need no more than this of the memory's own alignment.
        let mut random = Random::new(slots.len() as u64);
        let mut places: Vec<Range<usize>> = Vec::with_capacity(slots.len());
        let mut end = 0;
        for slot in slots {
            let guarded = end + 1 + random.below(MAX_GUARD_BYTES);
            let begin = match slot.place {
                Place::Anywhere => guarded,
                Place::Skewed(skew) => {
                    let align = PLACE_ALIGN_BYTES as u64;
                    let wanted = (slot.offset % align + skew as u64) % align;
                    guarded.next_multiple_of(PLACE_ALIGN_BYTES) + as_usize(wanted)
                }
                Place::Adjacent => end,
            };
            end = begin + slot.len;
            places.push(begin..end);
        }
        let memory =
            Region::allocate(end + PLACE_ALIGN_BYTES).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(
            memory.as_slice().as_ptr().align_offset(PLACE_ALIGN_BYTES),
            0
        );
        Self {
            memory,
            places,
            filling: 0,
        }
    }

    pub(super) fn requests<'a>(&'a mut self, slots: &[Slot<'a>]) -> Vec<ReadRequest<'a>> {
        let mut rest = self.memory.as_mut_slice();
        let mut position = 0;
        let mut requests = Vec::with_capacity(slots.len());
        for (slot, place) in slots.iter().zip(&self.places) {
            let (_, from_place) = rest.split_at_mut(place.start - position);
            let (destination, after) = from_place.split_at_mut(slot.len);
            requests.push(slot.request(destination));
            rest = after;
            position = place.end;
        }
        requests
    }

    /// Checks every byte: those of the destinations, and those around them.
    pub(super) fn verify(&self, slots: &[Slot<'_>], params: &TransferParams) {
        let memory = self.memory.as_slice();
        for (slot, place) in slots.iter().zip(&self.places) {
            slot.compare(&memory[place.clone()], params);
        }
        self.verify_canaries(slots, params);
    }

    /// Checks the bytes around the destinations.
    pub(super) fn verify_canaries(&self, slots: &[Slot<'_>], params: &TransferParams) {
        let memory = self.memory.as_slice();
        let mut end = 0;
        let last = memory.len()..memory.len();
        for (number, place) in self.places.iter().chain([&last]).enumerate() {
            for (at, &byte) in memory[end..place.start].iter().enumerate() {
                if byte == self.filling {
                    continue;
                }
                let neighbour = slots.get(number).or(slots.last());
                panic!(
                    "a byte that belongs to no destination was overwritten, {at} bytes after one and {} before \
                     the next ({}), with {params:?}",
                    place.start - end - at,
                    neighbour.map_or_else(String::new, ToString::to_string),
                );
            }
            end = place.end;
        }
    }

    /// Overwrites everything, as an owner may once a call has returned, and checks that it stays so.
    pub(super) fn stays_quiet(&mut self, situation: &str, params: &TransferParams) {
        self.memory.as_mut_slice().fill(OVERWRITTEN);
        // The compiler must not conclude that nobody can have changed what was just written.
        std::hint::black_box(self.memory.as_mut_slice());
        std::thread::sleep(QUIET_TIME);
        let memory = std::hint::black_box(self.memory.as_slice());
        if let Some(at) = memory.iter().position(|&byte| byte != OVERWRITTEN) {
            panic!("byte {at} of the memory was written to after {situation}, with {params:?}");
        }
    }
}

/// Counts what a progress callback is told.
#[derive(Clone, Debug, Default)]
pub(super) struct Progress(Arc<AtomicU64>);

impl Progress {
    /// A count, and a control that feeds it.
    pub(super) fn watch() -> (Self, Control) {
        let progress = Self::default();
        let inner = progress.clone();
        let control = Control::new().with_progress(move |bytes| inner.add(bytes));
        (progress, control)
    }

    pub(super) fn add(&self, bytes: u64) {
        self.0.fetch_add(bytes, Ordering::SeqCst);
    }

    pub(super) fn bytes(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

/// Checks that the statistics of a successful batch agree with the batch and with each other.
fn judge_stats(stats: &ReadStats, slots: &[Slot<'_>], params: &TransferParams) {
    let requested = slots.iter().map(|slot| slot.len as u64).sum::<u64>();
    assert_eq!(
        stats.bytes, requested,
        "the statistics count other bytes than were requested, with {params:?}: {stats:?}"
    );
    assert!(
        stats.direct_bytes <= stats.bytes && stats.scratch_bytes <= stats.bytes,
        "parts exceed the whole, with {params:?}: {stats:?}"
    );
    assert!(
        stats.bytes == 0 || stats.operations > 0,
        "bytes arrived without an operation, with {params:?}: {stats:?}"
    );
    for fallback in &stats.fallbacks {
        assert!(
            slots.iter().any(|slot| slot.sample.path() == fallback.path),
            "the fallback of a file that is not in the batch, with {params:?}: {fallback:?}"
        );
        assert!(
            !fallback.reason.trim().is_empty(),
            "a fallback without a reason, with {params:?}: {fallback:?}"
        );
    }
    let may_be_buffered = |slot: &&Slot<'_>| {
        params.direct == DirectPolicy::Never
            || stats
                .fallbacks
                .iter()
                .any(|fallback| fallback.path == slot.sample.path())
    };
    let (least, most) = match params.direct {
        DirectPolicy::Never => (0, 0),
        // How much of the sample is in the page cache is the system's business.
        DirectPolicy::Preferred if params.resident != ResidentPolicy::Reread => (0, requested),
        DirectPolicy::Preferred => {
            let buffered = slots.iter().filter(may_be_buffered);
            (
                requested - buffered.map(|slot| slot.len as u64).sum::<u64>(),
                requested,
            )
        }
        DirectPolicy::Required => (requested, requested),
    };
    assert!(
        (least..=most).contains(&stats.direct_bytes),
        "{least} to {most} bytes had to be read directly, or the fallback recorded, with {params:?}: {stats:?}"
    );
    assert!(
        params.direct == DirectPolicy::Preferred || stats.fallbacks.is_empty(),
        "a fallback although direct I/O was not just preferred, with {params:?}: {stats:?}"
    );
}

/// For numbers that are smaller than some length in memory.
pub(super) fn as_usize(number: u64) -> usize {
    usize::try_from(number).unwrap_or_else(|_| panic!("{number} exceeds the address space"))
}
