//! Windows hold every byte of every part, in buffers of bounded size.

use std::ops::Range;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tensora_formats::{
    Dtype, Error, TensorEntry, TensorPart, Window, WindowOptions, WindowOrder, windows,
};

use crate::fixture::{assert_refused, entry, file};
use crate::slices::{Sliced, delivered, file_byte, sliced};

const FILE_ORDER: WindowOptions = WindowOptions {
    window_bytes: 1 << 20,
    align_bytes: 4096,
    gap_bytes: 0,
    order: WindowOrder::File,
};

fn stored(
    name: &str,
    offset: u64,
    shape: &[u64],
    strides: Option<&[u64]>,
    bytes: u64,
) -> TensorEntry {
    let mut entry = entry();
    entry.name = name.to_owned();
    entry.dtype = Dtype::U8;
    entry.shape = shape.to_vec();
    entry.offset = offset;
    entry.bytes = bytes;
    entry.strides = strides.map(<[u64]>::to_vec);
    entry
}

fn bytes(name: &str, offset: u64, bytes: u64) -> TensorPart {
    TensorPart::whole(&stored(name, offset, &[bytes], None, bytes)).unwrap()
}

/// The pieces of each window: part, offset, length.
fn pieces(windows: &[Window]) -> Vec<Vec<(usize, u64, u64)>> {
    let of = |window: &Window| {
        let pieces = window.pieces.iter();
        pieces
            .map(|piece| (piece.part, piece.offset, piece.bytes))
            .collect()
    };
    windows.iter().map(of).collect()
}

#[test]
fn windows_too_small() {
    let files = [file(1 << 20)];
    let mut wide = stored("wide", 4092, &[2], None, 16);
    wide.dtype = Dtype::U64;
    let wide = [TensorPart::whole(&wide).unwrap()];
    let options = |window_bytes| WindowOptions {
        window_bytes,
        ..FILE_ORDER
    };
    assert_refused!(
        windows(&files, &wide, &options(8191)),
        Error::WindowTooSmall { .. },
        "a window of 8191 bytes cannot hold one element, which takes 8192 bytes",
        "\"wide\"",
    );
    assert_eq!(
        pieces(&windows(&files, &wide, &options(8192)).unwrap()),
        [[(0, 0, 16)]]
    );

    // The longest element counts, whichever tensor of those that share bytes comes first.
    let mut flag = stored("flag", 458, &[], None, 1);
    flag.dtype = Dtype::Bool;
    let mut long = stored("long", 451, &[], None, 8);
    long.dtype = Dtype::C64;
    let shared = [flag, long].map(|entry| TensorPart::whole(&entry).unwrap());
    let blocks_of_two = |window_bytes| WindowOptions {
        align_bytes: 2,
        order: WindowOrder::Given,
        ..options(window_bytes)
    };
    assert_refused!(
        windows(&files, &shared, &blocks_of_two(8)),
        Error::WindowTooSmall { .. },
        "a window of 8 bytes cannot hold one element, which takes 10 bytes",
        "\"long\"",
    );
    assert!(windows(&files, &shared, &blocks_of_two(10)).is_ok());

    // Three rows of three that are stored as columns.
    let transposed = stored("t", 100, &[3, 3], Some(&[1, 3]), 9);
    let transposed = [TensorPart::whole(&transposed).unwrap()];
    let unaligned = |window_bytes| WindowOptions {
        align_bytes: 1,
        ..options(window_bytes)
    };
    assert_refused!(
        windows(&files, &transposed, &unaligned(8)),
        Error::ViewTooLarge { .. },
        "one window must hold them all, 9 bytes",
        "but a window has 8 bytes",
    );
    assert_eq!(
        pieces(&windows(&files, &transposed, &unaligned(9)).unwrap()),
        [[(0, 0, 9)]]
    );
}

#[test]
fn parts_of_other_files() {
    let part = [bytes("w", 1000, 24)];
    for files in [&[][..], &[file(1023)]] {
        assert_refused!(
            windows(files, &part, &FILE_ORDER),
            Error::PartOutsideFiles { file: 0, .. },
            "\"w\": bytes 1000..1024",
        );
    }
    assert_eq!(windows(&[file(1024)], &part, &FILE_ORDER).unwrap().len(), 1);
}

#[test]
fn parts_that_fit_are_whole_and_others_are_cut_at_blocks() {
    let files = [file(100_000)];
    let parts = [
        bytes("after", 50_000, 5000),
        bytes("long", 10_000, 40_000),
        bytes("first", 100, 6000),
        bytes("empty", 8000, 0),
    ];
    let options = WindowOptions {
        window_bytes: 16_384,
        ..FILE_ORDER
    };
    let found = windows(&files, &parts, &options).unwrap();
    // The first window has two blocks for the first tensor, and two for as much of the long one as they hold. The last
    // ends where the file's tensors do, three blocks after the long one's last cut.
    assert_eq!(
        pieces(&found),
        [
            vec![(2, 0, 6000), (3, 0, 0), (1, 0, 6384)],
            vec![(1, 6384, 16_384)],
            vec![(1, 22_768, 16_384)],
            vec![(1, 39_152, 848), (0, 0, 5000)],
        ]
    );
    let given = WindowOptions {
        order: WindowOrder::Given,
        ..options
    };
    let found = windows(&files, &parts, &given).unwrap();
    let order: Vec<usize> = pieces(&found)
        .concat()
        .iter()
        .map(|piece| piece.0)
        .collect();
    assert!(order.is_sorted_by_key(|part| [0, 1, 2, 3].iter().position(|at| at == part)));
}

#[test]
fn what_did_not_fit_a_window_is_not_read_with_it() {
    let files = [file(22)];
    let parts = [bytes("a", 0, 10), bytes("b", 10, 12)];
    let options = WindowOptions {
        window_bytes: 16,
        align_bytes: 1,
        ..FILE_ORDER
    };
    let found = windows(&files, &parts, &options).unwrap();
    let read: Vec<u64> = found.iter().map(Window::read_bytes).collect();
    assert_eq!(read, [10, 12]);
}

#[test]
fn columns_of_several_ranks_are_read_once() {
    let files = [file(1 << 20)];
    let entry = stored("w", 4096, &[64, 1024], None, 65_536);
    let column =
        |rank: u64| TensorPart::slice(&entry, &[(1, rank * 256..(rank + 1) * 256)]).unwrap();
    let parts: Vec<_> = (0..4).map(column).collect();
    let options = WindowOptions {
        window_bytes: 16_384,
        ..FILE_ORDER
    };
    let found = windows(&files, &parts, &options).unwrap();
    assert_eq!(found.len(), 4);
    assert_eq!(found.iter().map(Window::read_bytes).sum::<u64>(), 65_536);
    assert!(
        found
            .iter()
            .all(|window| window.extents.len() == 1 && window.pieces.len() == 4)
    );
    // One rank alone, over gaps that are longer than what may be read in vain: each row by itself.
    let options = WindowOptions {
        align_bytes: 256,
        gap_bytes: 767,
        ..options
    };
    let found = windows(&files, &parts[1..2], &options).unwrap();
    assert_eq!((found.len(), found[0].extents.len()), (1, 64));
    assert_eq!(
        (found[0].read_bytes(), found[0].needed_bytes()),
        (16_384, 16_384)
    );
    let options = WindowOptions {
        gap_bytes: 768,
        window_bytes: 1 << 20,
        ..options
    };
    let found = windows(&files, &parts[1..2], &options).unwrap();
    assert_eq!(
        (found[0].extents.len(), found[0].read_bytes()),
        (1, 63 * 1024 + 256)
    );
}

#[test]
fn time_grows_with_the_parts_and_not_with_the_runs() {
    let limit = Duration::from_secs(2);
    let part_bytes = 1 << 20;
    let files = [file(20_000 * part_bytes)];
    let parts: Vec<_> = (0..20_000)
        .map(|number| bytes("t", number * part_bytes, part_bytes))
        .collect();
    for order in [WindowOrder::File, WindowOrder::Given] {
        let options = WindowOptions {
            window_bytes: 32 << 20,
            order,
            ..FILE_ORDER
        };
        let begun = Instant::now();
        assert_eq!(windows(&files, &parts, &options).unwrap().len(), 625);
        assert!(begun.elapsed() < limit, "{:?}", begun.elapsed());
    }

    // Every second byte of 8 TiB.
    let half = 1 << 42;
    let comb = stored("comb", 0, &[half, 2], None, 2 * half);
    let comb = [TensorPart::slice(&comb, &[(1, 1..2)]).unwrap()];
    let options = WindowOptions {
        window_bytes: 1 << 30,
        ..FILE_ORDER
    };
    let begun = Instant::now();
    let found = windows(&[file(2 * half)], &comb, &options).unwrap();
    assert!(begun.elapsed() < limit, "{:?}", begun.elapsed());
    assert_eq!(found.len(), 8192);
    assert!(found.iter().all(|window| window.extents.len() == 1));
}

/// Rounds out, joins what is near, and adds up the room: what a part alone takes of a buffer.
fn room(part: &TensorPart, file_bytes: u64, options: &WindowOptions) -> u64 {
    let align = options.align_bytes.max(1);
    let rounded_out = |run: Range<u64>| {
        run.start / align * align..(run.end.div_ceil(align) * align).min(file_bytes)
    };
    let blocks: Vec<Range<u64>> = if part.is_ascending() {
        part.runs(0..part.bytes()).map(rounded_out).collect()
    } else {
        std::iter::once(part.hull()).map(rounded_out).collect()
    };
    let mut merged: Vec<Range<u64>> = Vec::new();
    for block in blocks {
        match merged.last_mut() {
            Some(last) if block.start <= last.end.saturating_add(options.gap_bytes) => {
                last.end = last.end.max(block.end);
            }
            _ => merged.push(block),
        }
    }
    merged
        .iter()
        .map(|block| (block.end - block.start).div_ceil(align) * align)
        .sum()
}

fn overlap(a: &TensorPart, b: &TensorPart) -> bool {
    a.file() == b.file() && a.hull().start < b.hull().end && b.hull().start < a.hull().end
}

fn any_options() -> impl Strategy<Value = WindowOptions> {
    (
        prop_oneof![8u64..64, 32u64..1000],
        prop::sample::select(vec![0u64, 1, 1, 2, 8, 12, 16]),
        prop_oneof![Just(0u64), 0u64..24, Just(u64::MAX)],
        prop::sample::select(vec![WindowOrder::File, WindowOrder::Given]),
    )
        .prop_map(
            |(window_bytes, align_bytes, gap_bytes, order)| WindowOptions {
                window_bytes,
                align_bytes,
                gap_bytes,
                order,
            },
        )
}

/// Slices at random places of two files, so that some lie side by side and some in one another.
fn any_parts() -> impl Strategy<Value = Vec<Sliced>> {
    let placed = (sliced(), 0u64..600, 0usize..2).prop_filter_map(
        "cuts a byte",
        |(mut sliced, offset, file)| {
            sliced.entry.offset = offset;
            sliced.entry.file = file;
            sliced.part().is_ok().then_some(sliced)
        },
    );
    prop::collection::vec(placed, 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn windows_hold_every_byte_of_every_part(slices in any_parts(), options in any_options(), bytes_only in any::<bool>()) {
        let mut slices = slices;
        if bytes_only {
            slices.retain(|sliced| {
                sliced.entry.dtype.bits() == 8 && sliced.part().unwrap().is_ascending()
            });
        }
        let parts: Vec<TensorPart> = slices.iter().map(|sliced| sliced.part().unwrap()).collect();
        let ends = |file| parts.iter().filter(move |part| part.file() == file).map(|part| part.hull().end);
        // The files end with their last tensor, at no multiple of anything.
        let files = [0, 1].map(|number| file(ends(number).max().unwrap_or(0)));
        let align = options.align_bytes.max(1);
        let found = match windows(&files, &parts, &options) {
            Ok(found) => found,
            Err(Error::WindowTooSmall { needed_bytes, .. }) => {
                let largest = needed_bytes - align;
                prop_assert!(options.window_bytes < needed_bytes && largest <= 8u64.next_multiple_of(align));
                return Ok(());
            }
            Err(Error::ViewTooLarge { needed_bytes, .. }) => {
                let is_it = |part: &TensorPart| {
                    !part.is_ascending() && room(part, files[part.file()].bytes, &options) == needed_bytes
                };
                prop_assert!(options.window_bytes < needed_bytes && parts.iter().any(is_it));
                return Ok(());
            }
            Err(other) => return Err(TestCaseError::fail(other.to_string())),
        };

        let mut held = vec![Vec::new(); parts.len()];
        let mut piece_counts = vec![0; parts.len()];
        for window in &found {
            prop_assert!(window.buffer_bytes <= options.window_bytes);
            prop_assert!(!window.pieces.is_empty());
            let mut buffer = vec![0; usize::try_from(window.buffer_bytes).unwrap()];
            let mut free_from = 0;
            for extent in &window.extents {
                prop_assert_eq!(extent.at, free_from);
                prop_assert_eq!(extent.at % align, 0);
                prop_assert_eq!(extent.range.start % align, 0);
                let file_bytes = files[extent.file].bytes;
                prop_assert!(extent.range.start < extent.range.end && extent.range.end <= file_bytes);
                prop_assert!(extent.range.end % align == 0 || extent.range.end == file_bytes);
                for at in extent.range.clone() {
                    buffer[usize::try_from(extent.at + at - extent.range.start).unwrap()] = file_byte(at);
                }
                free_from += (extent.range.end - extent.range.start).next_multiple_of(align);
            }
            prop_assert_eq!(window.buffer_bytes, free_from);
            for pair in window.extents.windows(2) {
                let gap = pair[1].range.start.checked_sub(pair[0].range.end);
                prop_assert!(pair[0].file < pair[1].file || gap.is_some_and(|gap| gap > options.gap_bytes));
            }
            for piece in &window.pieces {
                let part = &parts[piece.part];
                let held = &mut held[piece.part];
                prop_assert_eq!(piece.offset, held.len() as u64);
                let copies: Vec<_> = window.copies(piece, part).collect();
                prop_assert!(copies.windows(2).all(|pair| pair[0].end != pair[1].start));
                prop_assert!(!part.is_contiguous() || copies.len() <= 1);
                for copy in copies {
                    held.extend_from_slice(&buffer[copy]);
                }
                prop_assert_eq!(held.len() as u64, piece.offset + piece.bytes);
                // Whole elements, and the last piece is the one that says so.
                prop_assert_eq!(piece.bytes * 8 % u64::from(part.dtype().bits()), 0);
                prop_assert_eq!(piece.is_last, held.len() as u64 == part.bytes());
                prop_assert!(piece.bytes > 0 || part.bytes() == 0);
                piece_counts[piece.part] += 1;
            }
        }

        for (number, part) in parts.iter().enumerate() {
            let sliced = &slices[number];
            prop_assert_eq!(&held[number], &delivered(&sliced.entry, &sliced.ranges).unwrap());
            prop_assert!(piece_counts[number] > 0);
            let alone = !(0..parts.len()).any(|other| other != number && overlap(part, &parts[other]));
            let fits = room(part, files[part.file()].bytes, &options) <= options.window_bytes;
            if !part.is_ascending() || (alone && fits) {
                prop_assert_eq!(piece_counts[number], 1, "part {}", number);
            }
        }

        // Parts come in the order asked for, but where they lie in one another.
        let mut first: Vec<usize> = pieces(&found).concat().iter().map(|piece| piece.0).collect();
        first.dedup();
        for pair in first.windows(2) {
            let [a, b] = [&parts[pair[0]], &parts[pair[1]]];
            let is_in_order = match options.order {
                WindowOrder::File => (a.file(), a.hull().start) <= (b.file(), b.hull().start),
                WindowOrder::Given => pair[0] < pair[1],
            };
            let tangled = |number: usize| {
                (0..parts.len()).any(|other| other != number && overlap(&parts[number], &parts[other]))
            };
            let are_tangled = tangled(pair[0]) && tangled(pair[1]);
            prop_assert!(is_in_order || are_tangled, "{pair:?}");
        }

        // Without blocks and elements to straddle, no byte is read twice, nor one that nobody needs.
        let plain = options.order == WindowOrder::File && align == 1 && options.gap_bytes == 0;
        if plain && parts.iter().all(|part| part.is_ascending() && part.dtype().bits() == 8) {
            let mut needed: Vec<(usize, u64)> = parts
                .iter()
                .flat_map(|part| part.runs(0..part.bytes()).flatten().map(|at| (part.file(), at)))
                .collect();
            needed.sort_unstable();
            needed.dedup();
            prop_assert_eq!(found.iter().map(Window::read_bytes).sum::<u64>(), needed.len() as u64);
        }
    }
}
