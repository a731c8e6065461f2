//! Loads of which not every tensor is whole, alone or together with other ranks.

#[cfg(feature = "shared")]
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;
#[cfg(feature = "shared")]
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tensora_formats::TensorPart;
#[cfg(feature = "shared")]
use tensora_formats::Window;
use tensora_heuristics::{
    MemoryChoice, MemoryKind, Plan, Policy, SharedBy, SharedWorkload, Workload,
};
use tensora_io::{Control, FilledWindow, RangeStream, ReadStats, Region};
#[cfg(feature = "shared")]
use tensora_io::{RankSet, SharedOptions, SharedReport, SharedStream, SharedWindow, SourceFile};

use crate::lazy::{FileTask, Use, name_tensor};
#[cfg(feature = "shared")]
use crate::stream::Cut;
use crate::stream::position;
use crate::{LazyCheckpoint, Result, StreamOrder, Tensor};

/// Gathered tensors begin at a multiple of this, in bytes: a cache line, and more than any element is aligned to.
const ALIGN_BYTES: usize = 64;

/// What a load of parts gave.
pub(crate) struct LoadedParts {
    pub(crate) tensors: Vec<Tensor>,
    pub(crate) plan: Plan,
    pub(crate) stats: ReadStats,
    #[cfg(feature = "shared")]
    pub(crate) shared: Option<SharedReport>,
    pub(crate) read_elapsed: Duration,
}

/// How a part gets into its tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// It lies in the file in one piece, and is read or mapped as whole tensors are.
    Straight,
    /// It is copied out of windows.
    Gathered,
    /// It is copied out of windows that all ranks share, which hold this range of the file.
    Shared,
}

/// The parts of all ranks, where several load together.
struct Ranks {
    /// For each rank, its parts, in the order of the selection.
    parts: Vec<Vec<TensorPart>>,
    /// What two or more ranks need, of each selected tensor that is such a one; read as one range.
    regions: Vec<Option<TensorPart>>,
}

impl LazyCheckpoint {
    /// What is delivered of each selected tensor, by the number of the tensor, to the rank of this process.
    pub(crate) fn parts(&self) -> Result<Vec<(usize, TensorPart)>> {
        let parts = self.parts_of(self.loader.rank)?;
        Ok(self.selected.iter().copied().zip(parts).collect())
    }

    fn parts_of(&self, rank: Option<(u32, u32)>) -> Result<Vec<TensorPart>> {
        let slices = &self.loader.slices;
        slices.resolve(&self.index, &self.selected, rank)
    }

    /// Whether every byte of every tensor is delivered.
    pub(crate) fn is_whole(&self, parts: &[TensorPart]) -> bool {
        parts.len() == self.index.tensors().len() && self.loader.slices.is_empty()
    }

    /// How [`load_parts`](Self::load_parts) would go about it.
    pub(crate) fn plan_parts(&self) -> Result<Plan> {
        let parts = self.parts_of(self.loader.rank)?;
        let ranks = self.ranks()?;
        let (ways, files) = self.ways(&parts, ranks.as_ref())?;
        self.plan_ways(&parts, &ways, ranks.as_ref(), &files)
    }

    /// Loads the parts of the selected tensors.
    pub(crate) fn load_parts(&self) -> Result<LoadedParts> {
        self.loader.check_cancelled()?;
        let parts = self.parts_of(self.loader.rank)?;
        let ranks = self.ranks()?;
        let (mut ways, mut files) = self.ways(&parts, ranks.as_ref())?;
        let plan = self.plan_ways(&parts, &ways, ranks.as_ref(), &files)?;
        if ways.contains(&Way::Shared) && plan.sharing != Some(SharedBy::Memory) {
            // The page cache is what the ranks have in common, and each reads for itself.
            (ways, files) = self.ways(&parts, None)?;
        }
        let begun = Instant::now();
        let control = self.loader.control(plan.workload.read_bytes);
        let (loaded, mut stats) = match plan.memory {
            MemoryKind::Owned => self.read(&files, &plan, &control)?,
            MemoryKind::Mapped => {
                let loaded = self.map(&files, &plan, Use::Eager, &control)?;
                (loaded, ReadStats::default())
            }
        };
        let mut collected = Collected::allocate(&parts, &ways)?;
        self.gather(&parts, &ways, &plan, &mut collected, &control, &mut stats)?;
        #[cfg(feature = "shared")]
        let mut shared = None;
        #[cfg(feature = "shared")]
        if let Some(ranks) = &ranks
            && plan.sharing == Some(SharedBy::Memory)
        {
            let mut gathering = (&mut collected, &mut stats);
            shared = Some(self.gather_shared(&parts, ranks, &plan, &mut gathering, &control)?);
        }
        if plan.memory == MemoryKind::Owned {
            self.check_opened()?;
        }
        let gathered = collected.into_bytes();
        let tensors = self.selected.iter().zip(&parts).zip(gathered);
        let tensors = tensors.map(|((&number, part), gathered)| {
            let data = gathered.unwrap_or_else(|| loaded.slice(part.file(), &part.hull()));
            Tensor::of_part(&self.index.tensors()[number], part, data)
        });
        Ok(LoadedParts {
            tensors: tensors.collect(),
            plan,
            stats,
            #[cfg(feature = "shared")]
            shared,
            read_elapsed: begun.elapsed(),
        })
    }

    /// What the other ranks load, where there are any.
    fn ranks(&self) -> Result<Option<Ranks>> {
        let (Some((_, world)), Some(_)) = (self.loader.rank, &self.loader.share) else {
            return Ok(None);
        };
        let parts = (0..world)
            .map(|rank| self.parts_of(Some((rank, world))))
            .collect::<Result<Vec<_>>>()?;
        let regions = (0..self.selected.len())
            .map(|at| {
                let entry = &self.index.tensors()[self.selected[at]];
                let of_ranks: Vec<&TensorPart> = parts.iter().map(|parts| &parts[at]).collect();
                common_region(&of_ranks, || TensorPart::whole(entry))
            })
            .collect::<tensora_formats::Result<_>>()?;
        Ok(Some(Ranks { parts, regions }))
    }

    /// How each part gets into its tensor, and the files for those that go straight.
    fn ways(
        &self,
        parts: &[TensorPart],
        ranks: Option<&Ranks>,
    ) -> Result<(Vec<Way>, Vec<FileTask<'_>>)> {
        let is_shared = |at: usize| ranks.is_some_and(|ranks| ranks.regions[at].is_some());
        let ways: Vec<Way> = (0..parts.len())
            .map(|at| match &parts[at] {
                _ if is_shared(at) => Way::Shared,
                part if part.is_contiguous() => Way::Straight,
                _ => Way::Gathered,
            })
            .collect();
        let straight = parts
            .iter()
            .zip(&ways)
            .filter(|(_, way)| **way == Way::Straight);
        let files = self.file_tasks(straight.map(|(part, _)| (part.file(), part.hull())))?;
        Ok((ways, files))
    }

    fn plan_ways(
        &self,
        parts: &[TensorPart],
        ways: &[Way],
        ranks: Option<&Ranks>,
        straight: &[FileTask<'_>],
    ) -> Result<Plan> {
        let all = self.file_tasks(parts.iter().map(|part| (part.file(), part.hull())))?;
        let platform = self.platform(&all);
        let policy = &self.loader.policy;
        let (gap_bytes, gap_decision) = tensora_heuristics::merge_gap_bytes(&platform, policy);
        let mut workload = self.workload(parts.len(), self.is_whole(parts), &all);
        describe(&mut workload, parts, gap_bytes);
        // What lies straight has its place with alignment, the rest one after the other.
        let collected: u64 = parts
            .iter()
            .zip(ways)
            .filter(|(_, way)| **way != Way::Straight)
            .map(|(part, _)| part.bytes().next_multiple_of(ALIGN_BYTES as u64))
            .sum();
        let placed = self.workload(0, false, straight).destination_bytes;
        workload.destination_bytes = placed.saturating_add(collected);
        if let Some(ranks) = ranks {
            workload.shared = Some(ranks.workload());
        }
        let mut plan = tensora_heuristics::plan(&workload, &platform, policy)?;
        if ways.contains(&Way::Gathered) {
            plan.decisions.push(gap_decision);
        }
        tracing::debug!(backend = %plan.backend, memory = %plan.memory, params = ?plan.params, "planned");
        Ok(plan)
    }

    /// The policy for windows beside tensors, within what the plan left them.
    fn window_policy(&self, plan: &Plan) -> Policy {
        let mut policy = self.loader.policy.clone();
        policy.memory_limit_bytes = Some(plan.window_limit_bytes);
        policy.memory = MemoryChoice::Owned;
        policy
    }

    /// Copies what does not lie in one piece out of windows.
    fn gather(
        &self,
        parts: &[TensorPart],
        ways: &[Way],
        plan: &Plan,
        collected: &mut Collected,
        control: &Control,
        stats: &mut ReadStats,
    ) -> Result<()> {
        let numbers: Vec<usize> = (0..parts.len())
            .filter(|&at| ways[at] == Way::Gathered && parts[at].bytes() > 0)
            .collect();
        if numbers.is_empty() {
            return Ok(());
        }
        let gathered = numbers.iter().map(|&at| parts[at].clone()).collect();
        let cut = self.cut(gathered, &self.window_policy(plan), 0, StreamOrder::File)?;
        let (files, windows) = cut.reads();
        let backend = self.loader.backend_of(cut.plan.backend)?;
        let mut stream = RangeStream::new(
            files,
            windows,
            backend,
            cut.params(self.loader.lease_timeout),
            control.clone(),
        )?;
        for filled in stream.by_ref() {
            let FilledWindow { number, bytes } =
                filled.map_err(|error| name_tensor(&self.index, error))?;
            let window = &cut.windows[number];
            for piece in &window.pieces {
                let mut out = &mut collected.of(numbers[piece.part])[position(piece.offset)..];
                for run in window.copies(piece, &cut.parts[piece.part]) {
                    let (now, later) = out.split_at_mut(run.len());
                    now.copy_from_slice(&bytes[run]);
                    out = later;
                }
            }
        }
        stats.merge(stream.stats().read);
        Ok(())
    }

    /// Copies this rank's parts out of windows that the ranks read together.
    #[cfg(feature = "shared")]
    fn gather_shared(
        &self,
        parts: &[TensorPart],
        ranks: &Ranks,
        plan: &Plan,
        (collected, stats): &mut (&mut Collected, &mut ReadStats),
        control: &Control,
    ) -> Result<SharedReport> {
        let (Some(share), Some((rank, world))) = (&self.loader.share, self.loader.rank) else {
            return Err(crate::Error::ShareWithoutRank);
        };
        let numbers: Vec<usize> = (0..parts.len())
            .filter(|&at| ranks.regions[at].is_some())
            .collect();
        let regions = numbers
            .iter()
            .filter_map(|&at| ranks.regions[at].clone())
            .collect();
        let cut = self.cut(regions, &self.window_policy(plan), 0, StreamOrder::File)?;
        let (files, windows) = cut.reads();
        let backend = self.loader.backend_of(cut.plan.backend)?;
        let mut everybody = RankSet::new();
        (0..world).for_each(|rank| everybody.insert(rank));
        let windows = windows.into_iter().map(|window| SharedWindow {
            window,
            wanted: everybody.clone(),
        });
        let options = SharedOptions::new(share.name(), rank, world, fingerprint(&files, ranks))
            .with_join_timeout(share.timeout());
        let mut stream = SharedStream::join(
            &options,
            files,
            windows.collect(),
            backend,
            cut.params(self.loader.lease_timeout),
            control.clone(),
        )?;
        for filled in stream.by_ref() {
            let FilledWindow { number, bytes } =
                filled.map_err(|error| name_tensor(&self.index, error))?;
            for (at, from, stored) in pieces(&cut, &cut.windows[number]) {
                let at = numbers[at];
                copy_within_region(&parts[at], &stored, &bytes[from..], collected.of(at));
            }
        }
        let report = stream.report();
        stats.merge(report.read_here.clone());
        Ok(report)
    }
}

/// What ranks have to agree on to read together, beside the windows: which files these are, and what each rank makes of
/// them.
#[cfg(feature = "shared")]
fn fingerprint(files: &[Arc<SourceFile>], ranks: &Ranks) -> Vec<u8> {
    // Not proof against a forger, who could as well send wrong bytes: ranks trust each other.
    let mut hasher = DefaultHasher::new();
    for file in files {
        file.identity().hash(&mut hasher);
    }
    for part in ranks.parts.iter().flatten() {
        (part.name(), part.shape(), part.hull().start).hash(&mut hasher);
    }
    hasher.finish().to_le_bytes().to_vec()
}

impl Ranks {
    fn workload(&self) -> SharedWorkload {
        let shared_bytes = self.regions.iter().flatten().map(TensorPart::bytes).sum();
        let exclusive = self.parts.iter().map(|parts| {
            let alone = parts.iter().zip(&self.regions);
            let alone = alone.filter(|(_, region)| region.is_none());
            alone.map(|(part, _)| part.bytes()).sum::<u64>()
        });
        let world = u32::try_from(self.parts.len()).unwrap_or(u32::MAX);
        SharedWorkload::new(world, shared_bytes, exclusive.sum())
    }
}

/// The one range of the file that ranks whose needs overlap read together: what all of them need, if that is one
/// and the same, and else the whole tensor. `None` where each byte is needed by one rank at most, and for storage out
/// of order, which each rank reads alone.
fn common_region(
    of_ranks: &[&TensorPart],
    whole: impl Fn() -> tensora_formats::Result<TensorPart>,
) -> tensora_formats::Result<Option<TensorPart>> {
    let mut hulls: Vec<Range<u64>> = of_ranks
        .iter()
        .filter(|part| part.bytes() > 0)
        .map(|part| part.hull())
        .collect();
    hulls.sort_by_key(|hull| (hull.start, hull.end));
    let overlap = hulls.windows(2).any(|pair| pair[1].start < pair[0].end);
    if !overlap || of_ranks.iter().any(|part| !part.is_ascending()) {
        return Ok(None);
    }
    if let [first, rest @ ..] = of_ranks
        && first.is_contiguous()
        && rest.iter().all(|part| part == first)
    {
        return Ok(Some((*first).clone()));
    }
    let whole = whole()?;
    Ok(whole.is_contiguous().then_some(whole))
}

/// What a window of regions holds: the position of each region, where it begins in the buffer, and which range of
/// the file that is.
#[cfg(feature = "shared")]
fn pieces<'c>(
    cut: &'c Cut,
    window: &'c Window,
) -> impl Iterator<Item = (usize, usize, Range<u64>)> + 'c {
    window.pieces.iter().filter_map(|piece| {
        let region = &cut.parts[piece.part];
        let from = window.copies(piece, region).next()?.start;
        let begin = region.hull().start + piece.offset;
        Some((piece.part, from, begin..begin + piece.bytes))
    })
}

/// Copies what a part needs of `stored`, a range of its file that `bytes` begin with, to where it belongs in `out`.
#[cfg(feature = "shared")]
fn copy_within_region(part: &TensorPart, stored: &Range<u64>, bytes: &[u8], out: &mut [u8]) {
    let delivered = delivered_within(part, stored);
    let mut at = position(delivered.start);
    for run in part.runs(delivered) {
        let from = position(run.start - stored.start);
        let len = position(run.end - run.start);
        out[at..at + len].copy_from_slice(&bytes[from..from + len]);
        at += len;
    }
}

/// Which bytes of an ascending part lie in a range of its file.
#[cfg(feature = "shared")]
fn delivered_within(part: &TensorPart, stored: &Range<u64>) -> Range<u64> {
    // The first delivered byte that lies at `offset` or after it.
    let first_from = |offset: u64| {
        let (mut low, mut high) = (0, part.bytes());
        while low < high {
            let middle = low + (high - low) / 2;
            let lies_before = part
                .runs(middle..middle + 1)
                .next()
                .is_some_and(|run| run.start < offset);
            if lies_before {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low
    };
    first_from(stored.start)..first_from(stored.end)
}

/// Adds to a workload what parts make of it.
pub(crate) fn describe(workload: &mut Workload, parts: &[TensorPart], gap_bytes: u64) {
    workload.needed_bytes = parts.iter().map(TensorPart::bytes).sum();
    for part in parts.iter().filter(|part| !part.is_contiguous()) {
        workload.gathered_tensors += 1;
        workload.gathered_bytes = workload.gathered_bytes.saturating_add(part.bytes());
        let hull = part.hull();
        let hull_bytes = hull.end - hull.start;
        if !part.is_ascending() {
            workload.indivisible_bytes = workload.indivisible_bytes.max(hull_bytes);
            continue;
        }
        let gaps = part.run_count() - 1;
        let mean_gap_bytes = hull_bytes.saturating_sub(part.bytes()) / gaps.max(1);
        if mean_gap_bytes > gap_bytes {
            // Its runs are read one by one instead of all that lies between them.
            let skipped = hull_bytes.saturating_sub(part.bytes());
            workload.read_bytes = workload.read_bytes.saturating_sub(skipped);
            workload.requests = workload.requests.saturating_add(gaps);
        }
    }
}

/// Memory for parts that are copied to where they belong, one after the other.
struct Collected {
    region: Region,
    /// By the position of the part.
    places: Vec<Option<Range<usize>>>,
}

impl Collected {
    fn allocate(parts: &[TensorPart], ways: &[Way]) -> Result<Self> {
        let mut end = 0_usize;
        let places = parts.iter().zip(ways).map(|(part, way)| {
            if *way == Way::Straight {
                return None;
            }
            let begin = end.next_multiple_of(ALIGN_BYTES);
            // More than the address space is more than can be allocated.
            end = begin.saturating_add(position(part.bytes()));
            Some(begin..end)
        });
        let places = places.collect();
        let region = Region::allocate(end)?;
        Ok(Self { region, places })
    }

    /// The memory of a part that has a place here.
    fn of(&mut self, part: usize) -> &mut [u8] {
        let place = self.places[part].clone().unwrap_or_default();
        &mut self.region.as_mut_slice()[place]
    }

    /// The bytes of each part that has a place here.
    fn into_bytes(self) -> impl Iterator<Item = Option<Bytes>> {
        let bytes = self.region.into_bytes();
        let places = self.places.into_iter();
        places.map(move |place| place.map(|place| bytes.slice(place)))
    }
}
