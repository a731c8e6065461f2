//! Parts of tensors: which bytes of a file they are, in the order in which they are delivered.

use std::iter::FusedIterator;
use std::ops::Range;

use crate::{Dtype, Error, Result, TensorEntry};

/// What is delivered of a tensor: all of it, or a range along some of its dimensions.
///
/// The bytes delivered are the elements in row-major order of the part's own [`shape`](Self::shape), packed
/// without gaps; strided storage is put in order too. Where they lie in the file is held as arithmetic and not as
/// a list: a part takes the same memory whether it is one run of bytes or a million.
///
/// # Examples
///
/// ```
/// use tensora_formats::{CheckpointIndex, TensorPart};
/// # use tensora_formats::{Dtype, Sharding, TensorSpec, safetensors_layout};
/// # let directory = tempfile::tempdir()?;
/// # let specs = [TensorSpec { name: "w".into(), dtype: Dtype::U8, shape: vec![3, 8] }];
/// # let layout = safetensors_layout(&specs, &Default::default(), Sharding::Single, 4096)?;
/// # let mut bytes = layout.files[0].prefix.clone();
/// # bytes.resize(4096 + 24, 0);
/// # std::fs::write(directory.path().join(&layout.files[0].name), bytes)?;
/// # let path = directory.path();
///
/// let index = CheckpointIndex::open(path)?;
/// let weight = index.tensor("w").ok_or("no w")?; // U8 [3, 8], from byte 4096 of the file
/// let columns = TensorPart::slice(weight, &[(1, 2..4)])?;
/// assert_eq!((columns.shape(), columns.bytes()), (&[3, 2][..], 6));
/// assert_eq!(columns.runs(0..6).collect::<Vec<_>>(), [4098..4100, 4106..4108, 4114..4116]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorPart {
    name: String,
    dtype: Dtype,
    shape: Vec<u64>,
    file: usize,
    /// Where the first delivered byte lies in the file.
    base: u64,
    /// The length of each run; 0 only if nothing is delivered.
    run_bytes: u64,
    /// How the runs repeat, outermost dimension first. None has a single index, and neighbours that lie in the file
    /// as one are one.
    dimensions: Vec<Dimension>,
    /// From the first byte in the file to the end of the last one.
    hull_bytes: u64,
    bytes: u64,
    is_ascending: bool,
}

/// A dimension along which runs repeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Dimension {
    count: u64,
    /// From the start of one run to that of the next along this dimension.
    stride_bytes: u64,
}

impl TensorPart {
    /// The whole tensor.
    ///
    /// # Errors
    ///
    /// [`Error::PartNotStored`] when the entry's numbers do not fit together, which those of a
    /// [`CheckpointIndex`](crate::CheckpointIndex) do, short of an expanded tensor of more than 2^64 bytes.
    pub fn whole(entry: &TensorEntry) -> Result<Self> {
        Self::slice(entry, &[])
    }

    /// The elements whose index along each dimension named in `ranges` lies in the range that stands there.
    /// Dimensions count from 0, the outermost, and ranges are in elements of that dimension.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchDimension`], [`Error::SliceOutside`], [`Error::SlicedTwice`]; [`Error::SliceCutsByte`] for
    /// a part of a packed tensor (F4, F6) that does not begin and end at whole bytes; and as
    /// [`whole`](Self::whole).
    pub fn slice(entry: &TensorEntry, ranges: &[(usize, Range<u64>)]) -> Result<Self> {
        let mut starts = vec![0; entry.shape.len()];
        let mut shape = entry.shape.clone();
        for (number, (dimension, range)) in ranges.iter().enumerate() {
            let dimension = *dimension;
            let Some(&length) = entry.shape.get(dimension) else {
                return Err(Error::NoSuchDimension {
                    tensor: entry.name.clone(),
                    shape: entry.shape.clone(),
                    dimension,
                });
            };
            if range.start > range.end || range.end > length {
                return Err(Error::SliceOutside {
                    tensor: entry.name.clone(),
                    shape: entry.shape.clone(),
                    dimension,
                    begin: range.start,
                    end: range.end,
                });
            }
            if ranges[..number]
                .iter()
                .any(|(other, _)| *other == dimension)
            {
                return Err(Error::SlicedTwice {
                    tensor: entry.name.clone(),
                    dimension,
                });
            }
            starts[dimension] = range.start;
            shape[dimension] = range.end - range.start;
        }

        let mut part = Self {
            name: entry.name.clone(),
            dtype: entry.dtype,
            shape,
            file: entry.file,
            base: entry.offset,
            run_bytes: 0,
            dimensions: Vec::new(),
            hull_bytes: 0,
            bytes: 0,
            is_ascending: true,
        };
        // A dimension of 0 cancels others, whose product may be beyond any number.
        if !part.shape.contains(&0) {
            let grid = Grid::new(entry, &starts, &part.shape).ok_or_else(|| not_stored(entry))?;
            part.place(entry, &grid)?;
        }
        Ok(part)
    }

    /// Works out the runs of a part that has elements.
    fn place(&mut self, entry: &TensorEntry, grid: &Grid) -> Result<()> {
        let whole = |bits: u128| bits.is_multiple_of(8);
        if !whole(grid.base_bits)
            || !whole(grid.run_bits)
            || !grid.dimensions.iter().all(|&(_, stride)| whole(stride))
        {
            return Err(Error::SliceCutsByte {
                tensor: entry.name.clone(),
                dtype: entry.dtype,
                shape: entry.shape.clone(),
                part: self.shape.clone(),
            });
        }
        self.try_place(entry, grid).ok_or_else(|| not_stored(entry))
    }

    /// `None` where a number passes 64 bits, or the end of what is stored.
    fn try_place(&mut self, entry: &TensorEntry, grid: &Grid) -> Option<()> {
        let bytes = |bits: u128| u64::try_from(bits / 8).ok();
        self.run_bytes = bytes(grid.run_bits)?;
        self.bytes = self.run_bytes;
        let mut span_bytes = self.run_bytes;
        for &(count, stride_bits) in &grid.dimensions {
            let stride_bytes = bytes(stride_bits)?;
            self.dimensions.push(Dimension {
                count,
                stride_bytes,
            });
            self.bytes = self.bytes.checked_mul(count)?;
            // From the innermost dimension out: one step must lead past everything inside.
            self.is_ascending &= stride_bytes >= span_bytes;
            span_bytes = (count - 1)
                .checked_mul(stride_bytes)?
                .checked_add(span_bytes)?;
        }
        self.dimensions.reverse();
        self.hull_bytes = span_bytes;
        let begin = bytes(grid.base_bits)?;
        if begin.checked_add(span_bytes)? > entry.bytes {
            return None;
        }
        self.base = entry.offset.checked_add(begin)?;
        self.base.checked_add(span_bytes)?;
        Some(())
    }

    /// The tensor's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The dimensions of what is delivered, outermost first; empty for a scalar.
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// How many bytes are delivered.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The position of the file in [`CheckpointIndex::files`](crate::CheckpointIndex::files).
    pub fn file(&self) -> usize {
        self.file
    }

    /// Whether the bytes delivered are one run of the file, or none.
    pub fn is_contiguous(&self) -> bool {
        self.dimensions.is_empty()
    }

    /// The length in bytes of each run; all are equally long. 0 if nothing is delivered.
    pub fn run_bytes(&self) -> u64 {
        self.run_bytes
    }

    /// How many runs of the file are delivered one after the other; 0 if nothing is.
    pub fn run_count(&self) -> u64 {
        self.bytes.checked_div(self.run_bytes).unwrap_or(0)
    }

    /// The smallest range of the file that holds every byte delivered.
    pub fn hull(&self) -> Range<u64> {
        // Construction has shown that the sum does not overflow.
        self.base..self.base.saturating_add(self.hull_bytes)
    }

    /// Whether the runs ascend in the file and share no byte. `false` only for strided storage: a transposed
    /// tensor, or one expanded with a stride of 0.
    pub fn is_ascending(&self) -> bool {
        self.is_ascending
    }

    /// The ranges of the file that hold the bytes of `delivered`, in delivered order. `delivered` counts from the
    /// part's first byte; the first and the last range are cut to it, and what of it lies past the part's end is
    /// left out.
    pub fn runs(&self, delivered: Range<u64>) -> Runs<'_> {
        self.lattice().runs(delivered)
    }

    /// The fewest bytes, at which pieces may be cut, that hold whole elements: one element, or as many packed
    /// ones as fill bytes.
    pub(crate) fn unit_bytes(&self) -> u64 {
        match u64::from(self.dtype.bits()) {
            bits if bits.is_multiple_of(8) => bits / 8,
            6 => 3,
            _ => 1,
        }
    }

    /// Where a delivered byte lies in the file.
    fn position(&self, delivered: u64) -> u64 {
        let runs = self.runs(delivered..self.bytes);
        runs.start.saturating_add(runs.skip)
    }

    /// How many of the bytes delivered lie before `position` in the file. Only for a part that ascends: there they
    /// are the first ones.
    pub(crate) fn delivered_before(&self, position: u64) -> u64 {
        debug_assert!(self.is_ascending);
        let mut rest = position.saturating_sub(self.base);
        let mut runs_inside = self.run_count();
        let mut runs = 0;
        for dimension in &self.dimensions {
            runs_inside /= dimension.count;
            // An ascending part's strides are at least as long as a run, and so not 0.
            let complete = (rest / dimension.stride_bytes).min(dimension.count - 1);
            runs += complete * runs_inside;
            rest -= complete * dimension.stride_bytes;
        }
        runs * self.run_bytes + rest.min(self.run_bytes)
    }

    /// The ranges of the file that hold what is delivered from `delivered` on, ascending, with runs closer together
    /// than `gap_bytes`, or as close, taken as one. Runs that do not ascend are one with all that lies between.
    pub(crate) fn coverage(&self, delivered: u64, gap_bytes: u64) -> Runs<'_> {
        if delivered >= self.bytes {
            return self.runs(self.bytes..self.bytes);
        }
        let mut span_bytes = self.run_bytes;
        let mut bytes_inside = self.run_bytes;
        let mut kept = self.dimensions.len();
        for dimension in self.dimensions.iter().rev() {
            if self.is_ascending && dimension.stride_bytes - span_bytes > gap_bytes {
                break;
            }
            span_bytes += dimension.stride_bytes * (dimension.count - 1);
            bytes_inside *= dimension.count;
            kept -= 1;
        }
        let coarse = Lattice {
            base: self.base,
            run_bytes: span_bytes,
            dimensions: &self.dimensions[..kept],
            bytes: span_bytes * (self.bytes / bytes_inside),
        };
        let first = delivered / bytes_inside;
        let skip = if self.is_ascending {
            self.position(delivered) - self.position(first * bytes_inside)
        } else {
            0
        };
        coarse.runs(first * span_bytes + skip..coarse.bytes)
    }

    fn lattice(&self) -> Lattice<'_> {
        Lattice {
            base: self.base,
            run_bytes: self.run_bytes,
            dimensions: &self.dimensions,
            bytes: self.bytes,
        }
    }
}

fn not_stored(entry: &TensorEntry) -> Error {
    Error::PartNotStored {
        tensor: entry.name.clone(),
        dtype: entry.dtype,
        shape: entry.shape.clone(),
        stored_bytes: entry.bytes,
    }
}

/// Where the elements of a part are, in bits from the start of the tensor's storage. 128 of them, because the
/// products come from a file.
struct Grid {
    base_bits: u128,
    run_bits: u128,
    /// Counts and strides, innermost first.
    dimensions: Vec<(u64, u128)>,
}

impl Grid {
    /// No dimension of the part may be 0. `None` where a number overflows, or there are not as many strides as
    /// dimensions.
    fn new(entry: &TensorEntry, starts: &[u64], counts: &[u64]) -> Option<Self> {
        let element_bits = u128::from(entry.dtype.bits());
        if let Some(strides) = &entry.strides
            && strides.len() != entry.shape.len()
        {
            return None;
        }
        let mut grid = Self {
            base_bits: 0,
            run_bits: element_bits,
            dimensions: Vec::new(),
        };
        let mut packed_bits = element_bits;
        for dimension in (0..entry.shape.len()).rev() {
            let count = counts[dimension];
            let stride_bits = match &entry.strides {
                Some(strides) => u128::from(strides[dimension]).checked_mul(element_bits)?,
                None => packed_bits,
            };
            let start_bits = stride_bits.checked_mul(u128::from(starts[dimension]))?;
            grid.base_bits = grid.base_bits.checked_add(start_bits)?;
            grid.repeat(count, stride_bits)?;
            packed_bits = packed_bits.checked_mul(u128::from(entry.shape[dimension]))?;
        }
        Some(grid)
    }

    /// Adds the next dimension out, as part of the one inside it where both lie in the file as one.
    fn repeat(&mut self, count: u64, stride_bits: u128) -> Option<()> {
        if count == 1 {
            return Some(());
        }
        match self.dimensions.last_mut() {
            None if stride_bits == self.run_bits => {
                self.run_bits = self.run_bits.checked_mul(u128::from(count))?;
            }
            Some((inner, inner_bits))
                if inner_bits.checked_mul(u128::from(*inner)) == Some(stride_bits) =>
            {
                *inner = inner.checked_mul(count)?;
            }
            _ => self.dimensions.push((count, stride_bits)),
        }
        Some(())
    }
}

/// Equally long runs that repeat along dimensions, outermost first.
#[derive(Clone, Copy)]
struct Lattice<'p> {
    base: u64,
    run_bytes: u64,
    dimensions: &'p [Dimension],
    bytes: u64,
}

impl<'p> Lattice<'p> {
    fn runs(self, delivered: Range<u64>) -> Runs<'p> {
        let end = delivered.end.min(self.bytes);
        let mut runs = Runs {
            dimensions: self.dimensions,
            positions: vec![0; self.dimensions.len()],
            start: self.base,
            run_bytes: self.run_bytes,
            skip: 0,
            remaining_bytes: end.saturating_sub(delivered.start),
        };
        if runs.remaining_bytes > 0 {
            let mut run = delivered.start / self.run_bytes;
            runs.skip = delivered.start % self.run_bytes;
            for (position, dimension) in runs.positions.iter_mut().zip(self.dimensions).rev() {
                *position = run % dimension.count;
                run /= dimension.count;
                runs.start += *position * dimension.stride_bytes;
            }
        }
        runs
    }
}

/// The ranges of a file that hold part of a tensor, in delivered order; see [`TensorPart::runs`]. None is empty.
#[derive(Clone, Debug)]
pub struct Runs<'p> {
    dimensions: &'p [Dimension],
    /// The index of the next run along each dimension.
    positions: Vec<u64>,
    /// Where the next run begins in the file.
    start: u64,
    run_bytes: u64,
    /// How much of the next run was delivered before.
    skip: u64,
    remaining_bytes: u64,
}

impl Runs<'_> {
    /// How many bytes are still to come.
    pub(crate) fn bytes(&self) -> u64 {
        self.remaining_bytes
    }

    fn advance(&mut self) {
        for (position, dimension) in self.positions.iter_mut().zip(self.dimensions).rev() {
            if *position + 1 < dimension.count {
                *position += 1;
                self.start += dimension.stride_bytes;
                return;
            }
            self.start -= *position * dimension.stride_bytes;
            *position = 0;
        }
    }
}

impl Iterator for Runs<'_> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        if self.remaining_bytes == 0 {
            return None;
        }
        let start = self.start + self.skip;
        let bytes = (self.run_bytes - self.skip).min(self.remaining_bytes);
        self.skip = 0;
        self.remaining_bytes -= bytes;
        if self.remaining_bytes > 0 {
            self.advance();
        }
        Some(start..start + bytes)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let runs = match self.run_bytes {
            0 => 0,
            run_bytes => (u128::from(self.skip) + u128::from(self.remaining_bytes))
                .div_ceil(u128::from(run_bytes)),
        };
        match usize::try_from(runs) {
            Ok(runs) => (runs, Some(runs)),
            Err(_) => (usize::MAX, None),
        }
    }
}

impl FusedIterator for Runs<'_> {}

/// What to do with a dimension that its ranks cannot share evenly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Remainder {
    /// An error: most inference engines cannot use parts of unequal length.
    #[default]
    Refuse,
    /// The last rank takes what is left over; the others have equally much, or nothing.
    Last,
}

/// A part of one dimension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DimPart {
    /// These indexes.
    Range(Range<u64>),
    /// What one of several ranks has when all share the dimension in order, rank 0 first.
    Rank {
        /// The rank, from 0 to `world` − 1.
        rank: u32,
        /// How many ranks there are, 1 or more.
        world: u32,
        /// What happens to a remainder.
        remainder: Remainder,
        /// How many neighbouring indexes stay together, such as those of one attention head; 1, or 0, where any
        /// two may part. Only the end of the last rank may lie elsewhere, and only with [`Remainder::Last`].
        multiple_of: u64,
    },
}

impl DimPart {
    /// The indexes, for a dimension of this length.
    ///
    /// # Errors
    ///
    /// [`Error::RangeOutside`], [`Error::NoSuchRank`], [`Error::UnevenRanks`].
    pub fn range(&self, length: u64) -> Result<Range<u64>> {
        match *self {
            Self::Range(ref range) if range.start > range.end || range.end > length => {
                Err(Error::RangeOutside {
                    begin: range.start,
                    end: range.end,
                    length,
                })
            }
            Self::Range(ref range) => Ok(range.clone()),
            Self::Rank { rank, world, .. } if rank >= world => {
                Err(Error::NoSuchRank { rank, world })
            }
            Self::Rank {
                rank,
                world,
                remainder,
                multiple_of,
            } => {
                let multiple_of = multiple_of.max(1);
                // At most `length / world`, so that no product below passes `length`.
                let each = length / u64::from(world) / multiple_of * multiple_of;
                if remainder == Remainder::Refuse && each * u64::from(world) != length {
                    return Err(Error::UnevenRanks {
                        length,
                        world,
                        multiple_of,
                    });
                }
                let begin = each * u64::from(rank);
                let end = if rank == world - 1 {
                    length
                } else {
                    begin + each
                };
                Ok(begin..end)
            }
        }
    }
}
