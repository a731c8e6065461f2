//! Windows hold every byte of every part, in buffers of bounded size.

use tensora_formats::{
    Dtype, Error, TensorEntry, TensorPart, Window, WindowOptions, WindowOrder, windows,
};

use crate::fixture::{assert_refused, entry, file};

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
