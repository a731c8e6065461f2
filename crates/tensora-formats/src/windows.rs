//! Parts of tensors packed into windows: what is read at once into one buffer of bounded size.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::iter::FusedIterator;
use std::ops::Range;

use crate::{Error, FileEntry, Result, Runs, TensorPart};

/// How parts are packed into windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowOptions {
    /// The most that the buffer of a window may take, in bytes.
    pub window_bytes: u64,
    /// What reads are aligned to, in bytes: extents are rounded out to multiples of it in the file, and lie at
    /// multiples of it in the buffer. 1, or 0, for no alignment.
    pub align_bytes: u64,
    /// How many bytes that nobody needs are read at most, so that two extents of a window become one.
    pub gap_bytes: u64,
    /// In which order parts come.
    pub order: WindowOrder,
}

/// The order in which parts are packed into windows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum WindowOrder {
    /// As they lie in the files, which reads fastest.
    #[default]
    File,
    /// As the caller gives them.
    Given,
}

/// What is read at once into one buffer, and which parts of tensors are in it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Window {
    /// The extents to be read, ascending by file and offset, none overlapping another or close enough to be one
    /// with it.
    pub extents: Vec<WindowExtent>,
    /// The size of the buffer, at most [`WindowOptions::window_bytes`]: a multiple of the alignment, so that a
    /// direct read of the last block of a file has room.
    pub buffer_bytes: u64,
    /// The pieces that the buffer holds once the extents are read.
    pub pieces: Vec<WindowPiece>,
}

/// A range of a file, and where its bytes go.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct WindowExtent {
    /// The position of the file in [`CheckpointIndex::files`](crate::CheckpointIndex::files).
    pub file: usize,
    /// The bytes of the file; both ends are multiples of the alignment, but for the end of the file.
    pub range: Range<u64>,
    /// Where they begin in the window's buffer, a multiple of the alignment. The room up to the next multiple
    /// after the extent's end is free.
    pub at: u64,
}

/// Bytes of one part that one window holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct WindowPiece {
    /// The position of the part among those that were packed.
    pub part: usize,
    /// Where the piece begins in what is delivered of the part, in bytes.
    pub offset: u64,
    /// The piece's length in bytes, whole elements; 0 only for a part of 0 bytes.
    pub bytes: u64,
    /// Whether the part ends with this piece.
    pub is_last: bool,
}

impl Window {
    /// How many bytes are read.
    pub fn read_bytes(&self) -> u64 {
        let lengths = self.extents.iter().map(|extent| &extent.range);
        lengths.map(|range| range.end - range.start).sum()
    }

    /// How many bytes the pieces have together. More than are read, where pieces share bytes.
    pub fn needed_bytes(&self) -> u64 {
        self.pieces
            .iter()
            .fold(0, |sum, piece| sum.saturating_add(piece.bytes))
    }

    /// Where the bytes of a piece lie in the window's buffer, in delivered order. Ranges that touch are one, so
    /// that a piece of a contiguous part has one range.
    ///
    /// # Panics
    ///
    /// When the piece is not of this window, or the part is not the one that [`WindowPiece::part`] names.
    pub fn copies<'w>(&'w self, piece: &WindowPiece, part: &'w TensorPart) -> Copies<'w> {
        Copies {
            extents: &self.extents,
            file: part.file(),
            runs: part.runs(piece.offset..piece.offset.saturating_add(piece.bytes)),
            extent: None,
            next: None,
        }
    }
}

/// The places of a piece in a window's buffer; see [`Window::copies`].
#[derive(Clone, Debug)]
pub struct Copies<'w> {
    extents: &'w [WindowExtent],
    file: usize,
    runs: Runs<'w>,
    /// The extent in which the last run was found, where the next one most often is too.
    extent: Option<&'w WindowExtent>,
    next: Option<Range<usize>>,
}

impl Copies<'_> {
    fn place(&mut self, run: &Range<u64>) -> Range<usize> {
        let holds = |extent: &&WindowExtent| {
            extent.file == self.file
                && extent.range.start <= run.start
                && run.end <= extent.range.end
        };
        self.extent = self.extent.filter(holds).or_else(|| {
            let after = self.extents.partition_point(|extent| {
                (extent.file, extent.range.start) <= (self.file, run.start)
            });
            self.extents[..after].last().filter(holds)
        });
        let extent = self.extent.expect("the piece is of this window");
        let begin = extent.at + (run.start - extent.range.start);
        buffer_offset(begin)..buffer_offset(begin + (run.end - run.start))
    }
}

/// An offset in a buffer, none of which is longer than a `usize` can count.
#[allow(clippy::cast_possible_truncation)]
fn buffer_offset(offset: u64) -> usize {
    offset as usize
}

impl Iterator for Copies<'_> {
    type Item = Range<usize>;

    fn next(&mut self) -> Option<Range<usize>> {
        let mut copy = match self.next.take() {
            Some(copy) => copy,
            None => {
                let run = self.runs.next()?;
                self.place(&run)
            }
        };
        while let Some(run) = self.runs.next() {
            let next = self.place(&run);
            if next.start != copy.end {
                self.next = Some(next);
                break;
            }
            copy.end = next.end;
        }
        Some(copy)
    }
}

impl FusedIterator for Copies<'_> {}

/// Packs parts into windows that are read one after the other.
///
/// - A part that fits a window is never cut, unless the parts whose bytes lie between its own do not fit the window
///   with it; then all of them are cut at the same places, so that each byte is read once. Parts are taken together
///   like this when they follow one another in the order asked for.
/// - A part is cut at multiples of the alignment in the file, or where the last element before ends.
/// - A part of 0 bytes gives a piece of 0 bytes, so that whoever visits the pieces sees every part.
/// - A part that does not [ascend](TensorPart::is_ascending) is never cut.
/// - Extents are rounded out to the alignment, but not past the file's end. A block in which one window ends and
///   another begins is read by both.
///
/// `files` are those of the index that the parts come from; pieces name parts by their position in `parts`. The
/// time taken grows with the parts and with what is read separately, not with the runs.
///
/// # Errors
///
/// [`Error::WindowTooSmall`], [`Error::ViewTooLarge`], and [`Error::PartOutsideFiles`] for parts of other files.
pub fn windows(
    files: &[FileEntry],
    parts: &[TensorPart],
    options: &WindowOptions,
) -> Result<Vec<Window>> {
    for part in parts {
        let hull = part.hull();
        if files
            .get(part.file())
            .is_none_or(|file| hull.end > file.bytes)
        {
            return Err(Error::PartOutsideFiles {
                tensor: part.name().to_owned(),
                file: part.file(),
                files: files.len(),
                begin: hull.start,
                end: hull.end,
            });
        }
    }
    let mut order: Vec<usize> = (0..parts.len()).collect();
    if options.order == WindowOrder::File {
        order.sort_by_key(|&number| {
            let part = &parts[number];
            (part.file(), part.hull().start, part.hull().end)
        });
    }
    let mut packer = Packer {
        files,
        parts,
        align_bytes: options.align_bytes.max(1),
        gap_bytes: options.gap_bytes,
        window_bytes: options.window_bytes.min(isize::MAX as u64),
        open: Draft::default(),
        done: Vec::new(),
    };
    let mut rest = order.as_slice();
    while !rest.is_empty() {
        let (group, others) = rest.split_at(group_length(parts, rest));
        packer.pack(group)?;
        rest = others;
    }
    packer.close();
    Ok(packer.done)
}

/// How many parts at the front lie within one another's hulls, one or more.
fn group_length(parts: &[TensorPart], order: &[usize]) -> usize {
    let mut hulls = order
        .iter()
        .map(|&number| (parts[number].file(), parts[number].hull()));
    let Some((file, mut all)) = hulls.next() else {
        return 0;
    };
    let more = hulls.take_while(|(other, hull)| {
        let within = *other == file && hull.start < all.end && all.start < hull.end;
        if within {
            all = all.start.min(hull.start)..all.end.max(hull.end);
        }
        within
    });
    1 + more.count()
}

struct Packer<'a> {
    files: &'a [FileEntry],
    parts: &'a [TensorPart],
    align_bytes: u64,
    gap_bytes: u64,
    window_bytes: u64,
    /// The window that is being filled.
    open: Draft,
    done: Vec<Window>,
}

/// A window that is being filled.
#[derive(Debug, Default)]
struct Draft {
    /// Ends of extents by file and start.
    extents: BTreeMap<(usize, u64), u64>,
    buffer_bytes: u64,
    pieces: Vec<WindowPiece>,
    /// What to put back where what was added does not fit after all.
    undo: Undo,
}

/// A part that is being cut.
struct Cut {
    part: usize,
    /// How much of it is in windows, in delivered bytes.
    done_bytes: u64,
}

impl Packer<'_> {
    /// Packs parts that lie within one another's hulls.
    fn pack(&mut self, group: &[usize]) -> Result<()> {
        let mut cuts: Vec<Cut> = Vec::with_capacity(group.len());
        for &part in group {
            if self.parts[part].bytes() == 0 {
                self.push_piece(part, 0, 0);
            } else {
                cuts.push(Cut {
                    part,
                    done_bytes: 0,
                });
            }
        }
        if self.cover_whole(&cuts) {
            for cut in &cuts {
                self.push_piece(cut.part, 0, self.parts[cut.part].bytes());
            }
            return Ok(());
        }
        // What does not ascend cannot be cut, so that it goes first, where one window holds all of it.
        let (ascending, atomic): (Vec<_>, Vec<_>) = cuts
            .into_iter()
            .partition(|cut| self.parts[cut.part].is_ascending());
        for cut in atomic {
            if !self.cover_whole(std::slice::from_ref(&cut)) {
                let part = &self.parts[cut.part];
                return Err(Error::ViewTooLarge {
                    tensor: part.name().to_owned(),
                    window_bytes: self.window_bytes,
                    needed_bytes: self.room_bytes(&self.rounded_out(part.file(), &part.hull())),
                });
            }
            self.push_piece(cut.part, 0, self.parts[cut.part].bytes());
        }
        self.pack_cut(ascending)
    }

    /// Packs ascending parts of one file into as many windows as it takes.
    fn pack_cut(&mut self, mut cuts: Vec<Cut>) -> Result<()> {
        while let Some(first) = cuts.first() {
            let first = first.part;
            let was_empty = self.open.extents.is_empty();
            let covered = self.cover_some(&cuts);
            let mut is_stuck = true;
            for cut in &mut cuts {
                let part = &self.parts[cut.part];
                let end = match covered {
                    Covered::All => part.bytes(),
                    Covered::Before(position) => {
                        let delivered = part.delivered_before(position);
                        delivered - delivered % part.unit_bytes()
                    }
                };
                if end > cut.done_bytes {
                    let offset = std::mem::replace(&mut cut.done_bytes, end);
                    self.push_piece(cut.part, offset, end - offset);
                    is_stuck = false;
                }
            }
            cuts.retain(|cut| cut.done_bytes < self.parts[cut.part].bytes());
            if is_stuck && was_empty {
                // A window that holds the longest element of the group holds any.
                let longer = |one: usize, other: usize| {
                    let is_longer = self.parts[other].unit_bytes() > self.parts[one].unit_bytes();
                    if is_longer { other } else { one }
                };
                let longest = cuts.iter().map(|cut| cut.part).fold(first, longer);
                return Err(self.window_too_small(longest));
            }
            if is_stuck {
                self.open.roll_back();
            }
            if !cuts.is_empty() {
                self.close();
            }
        }
        self.open.keep();
        Ok(())
    }

    fn window_too_small(&self, part: usize) -> Error {
        let part = &self.parts[part];
        // However the element lies, one block more than it fills holds it.
        let needed_bytes = part
            .unit_bytes()
            .checked_next_multiple_of(self.align_bytes)
            .and_then(|bytes| bytes.checked_add(self.align_bytes));
        Error::WindowTooSmall {
            tensor: part.name().to_owned(),
            window_bytes: self.window_bytes,
            needed_bytes: needed_bytes.unwrap_or(u64::MAX),
        }
    }

    /// Adds all that these parts need, to the open window or to a new one. `false`, and nothing is changed, if it
    /// fits neither.
    fn cover_whole(&mut self, cuts: &[Cut]) -> bool {
        let too_long = |cut: &Cut| {
            let part = &self.parts[cut.part];
            part.coverage(0, self.merged_gap_bytes()).bytes() > self.window_bytes
        };
        if cuts.iter().any(too_long) {
            return false;
        }
        if self.cover_whole_in_open(cuts) {
            return true;
        }
        let open = std::mem::take(&mut self.open);
        if !open.extents.is_empty() && self.cover_whole_in_open(cuts) {
            let next = std::mem::replace(&mut self.open, open);
            self.close();
            self.open = next;
            return true;
        }
        self.open = open;
        false
    }

    fn cover_whole_in_open(&mut self, cuts: &[Cut]) -> bool {
        let fits = matches!(self.cover_some(cuts), Covered::All);
        if fits {
            self.open.keep();
        } else {
            self.open.roll_back();
        }
        fits
    }

    /// Adds as much of what these parts still need as fits the open window, from the lowest offset on.
    fn cover_some(&mut self, cuts: &[Cut]) -> Covered {
        let parts = self.parts;
        let Some(file) = cuts.first().map(|cut| parts[cut.part].file()) else {
            return Covered::All;
        };
        let gap_bytes = self.merged_gap_bytes();
        let runs = cuts
            .iter()
            .map(|cut| parts[cut.part].coverage(cut.done_bytes, gap_bytes));
        for needed in Union::new(runs, gap_bytes, self.window_bytes) {
            if self.cover(file, &needed) {
                continue;
            }
            let position = self.last_that_fits(file, needed.start).min(needed.end);
            // An extent further on can be close enough to be joined, and what lies between does not fit.
            if position <= needed.start || !self.cover(file, &(needed.start..position)) {
                return Covered::Before(needed.start);
            }
            return Covered::Before(position);
        }
        Covered::All
    }

    /// Runs at most this far apart are one extent in any case: the blocks around them touch, or what lies between is
    /// short enough to be read.
    fn merged_gap_bytes(&self) -> u64 {
        self.gap_bytes.max(self.align_bytes - 1)
    }

    /// Adds a range of a file to the open window's extents; `false` if that would take the buffer past its limit.
    fn cover(&mut self, file: usize, needed: &Range<u64>) -> bool {
        let mut extent = self.rounded_out(file, needed);
        let before = extent.clone();
        let mut buffer_bytes = self.open.buffer_bytes;
        let reach = extent.end.saturating_add(self.gap_bytes);
        // Extents are further apart than the gap, so that none reaches this one only through another.
        let near = self.open.extents.range((file, 0)..=(file, reach)).rev();
        let mut swallowed = Vec::new();
        for (&(_, start), &end) in near {
            if end.saturating_add(self.gap_bytes) < before.start {
                break;
            }
            if start <= before.start && before.end <= end {
                return true;
            }
            extent = extent.start.min(start)..extent.end.max(end);
            buffer_bytes -= self.room_bytes(&(start..end));
            swallowed.push(start);
        }
        let Some(buffer_bytes) = buffer_bytes
            .checked_add(self.room_bytes(&extent))
            .filter(|&bytes| bytes <= self.window_bytes)
        else {
            return false;
        };
        for start in swallowed {
            if start != extent.start {
                self.open.set((file, start), None);
            }
        }
        self.open.set((file, extent.start), Some(extent.end));
        self.open.buffer_bytes = buffer_bytes;
        true
    }

    /// How far what is needed from `start` on can be added to the open window.
    fn last_that_fits(&self, file: usize, start: u64) -> u64 {
        let first_block = start - start % self.align_bytes;
        let before = self.open.extents.range((file, 0)..=(file, first_block));
        // Where it goes on an extent, what the extent has already costs nothing, but the gap between does.
        let begin = match before.last() {
            Some((_, &end)) if first_block <= end.saturating_add(self.gap_bytes) => end,
            _ => first_block,
        };
        let room_bytes = self.window_bytes - self.open.buffer_bytes;
        begin.saturating_add(room_bytes - room_bytes % self.align_bytes)
    }

    /// The blocks that hold a range of a file.
    fn rounded_out(&self, file: usize, needed: &Range<u64>) -> Range<u64> {
        let file_bytes = self.files[file].bytes;
        let end = needed.end.checked_next_multiple_of(self.align_bytes);
        needed.start - needed.start % self.align_bytes..end.unwrap_or(u64::MAX).min(file_bytes)
    }

    /// What an extent takes of a buffer.
    fn room_bytes(&self, extent: &Range<u64>) -> u64 {
        (extent.end - extent.start)
            .checked_next_multiple_of(self.align_bytes)
            .unwrap_or(u64::MAX)
    }

    fn push_piece(&mut self, part: usize, offset: u64, bytes: u64) {
        self.open.pieces.push(WindowPiece {
            part,
            offset,
            bytes,
            is_last: offset + bytes == self.parts[part].bytes(),
        });
    }

    /// Ends the open window and begins another.
    fn close(&mut self) {
        let draft = std::mem::take(&mut self.open);
        if draft.pieces.is_empty() {
            return;
        }
        let mut at = 0;
        let extents = draft.extents.into_iter().map(|((file, start), end)| {
            let extent = WindowExtent {
                file,
                range: start..end,
                at,
            };
            at += self.room_bytes(&extent.range);
            extent
        });
        let window = Window {
            extents: extents.collect(),
            buffer_bytes: draft.buffer_bytes,
            pieces: draft.pieces,
        };
        self.done.push(window);
    }
}

/// How much of what parts need an open window has.
enum Covered {
    All,
    /// What lies before this offset in the file.
    Before(u64),
}

/// What an open window was when changes were last kept.
#[derive(Debug, Default)]
struct Undo {
    /// What stood in its extents before each change, in the order of the changes.
    extents: Vec<((usize, u64), Option<u64>)>,
    buffer_bytes: u64,
}

impl Draft {
    fn set(&mut self, extent: (usize, u64), end: Option<u64>) {
        let before = match end {
            Some(end) => self.extents.insert(extent, end),
            None => self.extents.remove(&extent),
        };
        self.undo.extents.push((extent, before));
    }

    fn keep(&mut self) {
        self.undo.extents.clear();
        self.undo.buffer_bytes = self.buffer_bytes;
    }

    fn roll_back(&mut self) {
        for (extent, before) in self.undo.extents.drain(..).rev() {
            match before {
                Some(end) => self.extents.insert(extent, end),
                None => self.extents.remove(&extent),
            };
        }
        self.buffer_bytes = self.undo.buffer_bytes;
    }
}

/// The ranges that several parts of one file need together, ascending.
struct Union<'p> {
    runs: Vec<Runs<'p>>,
    /// The next range of each, with its position in `runs`.
    next: BinaryHeap<Reverse<(u64, u64, usize)>>,
    gap_bytes: u64,
    /// Ranges of this length are not joined with others, because none longer can be used.
    long_bytes: u64,
}

impl<'p> Union<'p> {
    fn new(runs: impl Iterator<Item = Runs<'p>>, gap_bytes: u64, long_bytes: u64) -> Self {
        let runs: Vec<_> = runs.collect();
        let mut union = Self {
            next: BinaryHeap::with_capacity(runs.len()),
            runs,
            gap_bytes,
            long_bytes,
        };
        for number in 0..union.runs.len() {
            union.push_next(number);
        }
        union
    }

    fn push_next(&mut self, number: usize) {
        if let Some(range) = self.runs[number].next() {
            self.next.push(Reverse((range.start, range.end, number)));
        }
    }
}

impl Iterator for Union<'_> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        let Reverse((start, mut end, number)) = self.next.pop()?;
        self.push_next(number);
        while end - start < self.long_bytes
            && let Some(&Reverse((other, other_end, number))) = self.next.peek()
            && other <= end.saturating_add(self.gap_bytes)
        {
            self.next.pop();
            end = end.max(other_end);
            self.push_next(number);
        }
        Some(start..end)
    }
}
