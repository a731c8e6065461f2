//! Streams deliver every tensor once, whole and in order, in bounded memory.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::pin::Pin;

use common::{Expected, LAYOUTS, expected, write};
use tensora::io::Error as IoError;
use tensora::{
    BackendKind, CancelToken, DigestSink, Error, Loader, MemoryPlace, MemorySink, Sink, SinkError,
    StreamOrder, StreamedPiece, StreamedTensor, TensorStream,
};

/// Little enough for the largest tensor to come in pieces.
const LIMIT_BYTES: u64 = 2 << 20;

/// Puts pieces together, and holds them to what [`Sink`] promises.
#[derive(Default)]
struct Assembling {
    announced: Vec<StreamedTensor>,
    order: Vec<String>,
    tensors: BTreeMap<String, Vec<u8>>,
    complete: Vec<String>,
    pieces: usize,
    finished: bool,
}

impl Sink for Assembling {
    fn begin(&mut self, tensors: &[StreamedTensor]) -> Result<(), SinkError> {
        self.announced = tensors.to_vec();
        Ok(())
    }

    fn write(&mut self, piece: StreamedPiece) -> Result<(), SinkError> {
        let name = piece.tensor().name().to_owned();
        assert!(
            !self.complete.contains(&name),
            "a piece of {name} after its last"
        );
        let data = self.tensors.entry(name.clone()).or_insert_with(|| {
            self.order.push(name.clone());
            Vec::new()
        });
        assert_eq!(piece.offset_bytes(), data.len() as u64, "{name}");
        data.extend_from_slice(piece.bytes());
        assert_eq!(
            piece.is_last(),
            data.len() as u64 == piece.tensor().bytes(),
            "{name}"
        );
        if piece.is_last() {
            self.complete.push(name);
        }
        self.pieces += 1;
        Ok(())
    }

    fn finish(&mut self) -> Result<(), SinkError> {
        self.finished = true;
        Ok(())
    }
}

impl Assembling {
    fn assert_holds(&self, expected: &Expected, context: &str) {
        assert!(self.finished, "{context}");
        assert_eq!(self.tensors.len(), expected.len(), "{context}");
        assert_eq!(self.complete.len(), expected.len(), "{context}");
        let announced: Vec<_> = self.announced.iter().map(StreamedTensor::name).collect();
        assert_eq!(announced, self.order, "{context}");
        for tensor in &self.announced {
            let (dtype, shape, data) = &expected[tensor.name()];
            let context = format!("{context}: {}", tensor.name());
            assert_eq!(tensor.dtype(), *dtype, "{context}");
            let found: Vec<u64> = tensor.shape().iter().map(|&d| d as u64).collect();
            assert_eq!(&found, shape, "{context}");
            assert!(
                self.tensors[tensor.name()] == *data,
                "{context}: other bytes"
            );
        }
    }
}

#[test]
fn every_layout_and_backend_streams_the_same_tensors() {
    let expected = expected();
    let whole = {
        let directory = tempfile::tempdir().unwrap();
        write(&expected, LAYOUTS[0], directory.path());
        tensora::load(directory.path()).unwrap().digest().unwrap()
    };
    let largest = expected.values().map(|(_, _, data)| data.len()).max();
    for layout in LAYOUTS {
        let directory = tempfile::tempdir().unwrap();
        write(&expected, layout, directory.path());
        for kind in BackendKind::ALL {
            let loader = Loader::new()
                .backend(kind)
                .memory_limit_bytes(LIMIT_BYTES)
                .chunk_bytes(64 << 10);
            let checkpoint = loader.open(directory.path()).unwrap();
            let mut sink = Assembling::default();
            let report = match checkpoint.stream_into(&mut sink) {
                Ok(report) => report,
                Err(Error::Io(IoError::BackendUnavailable { reason, .. })) => {
                    common::skip(&format!("{kind} is unavailable: {reason}"));
                    continue;
                }
                Err(error) => panic!("{layout}, {kind}: {error}"),
            };
            let context = format!("{layout}, {kind}");
            sink.assert_holds(&expected, &context);
            assert_eq!(report.plan.backend, kind, "{context}");
            assert!(
                report.plan.buffer_bytes < largest.unwrap() as u64,
                "{context}"
            );
            assert!(sink.pieces > expected.len(), "{context}: nothing was cut");
            let data_bytes = expected.values().map(|(_, _, data)| data.len() as u64);
            assert_eq!(report.data_bytes, data_bytes.sum::<u64>(), "{context}");
            let held = u64::from(report.plan.buffers) * report.plan.buffer_bytes;
            assert!(held <= LIMIT_BYTES, "{context}: {held} bytes of buffers");
            assert_eq!(checkpoint.digest().unwrap(), whole, "{context}");
        }
    }
}

#[test]
fn pieces_that_are_kept_do_not_change_and_are_reported_when_they_stall_the_stream() {
    let directory = tempfile::tempdir().unwrap();
    let expected = expected();
    write(&expected, LAYOUTS[1], directory.path());
    let checkpoint = Loader::new()
        .memory_limit_bytes(LIMIT_BYTES / 2)
        .lease_timeout(std::time::Duration::from_millis(50))
        .open(directory.path())
        .unwrap();
    let mut stream = checkpoint.stream().unwrap();
    let mut kept: Vec<StreamedPiece> = Vec::new();
    let mut stalls = 0;
    for piece in stream.by_ref() {
        match piece {
            Ok(piece) => kept.push(piece),
            Err(Error::Io(IoError::LeasesHeld { .. })) => {
                stalls += 1;
                // Each still is what the file holds, although everything since was read.
                for piece in kept.drain(..) {
                    let whole = &expected[piece.tensor().name()].2;
                    let begin = usize::try_from(piece.offset_bytes()).unwrap();
                    assert!(whole[begin..begin + piece.bytes().len()] == piece.bytes()[..]);
                }
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!(stalls > 0, "nothing was held for long enough");
    assert!(stream.report().stats.lease_stalls >= stalls);
}

#[test]
fn the_order_of_names_is_kept() {
    let directory = tempfile::tempdir().unwrap();
    write(&expected(), LAYOUTS[1], directory.path());
    let names = [
        "scalar",
        "model.embed_tokens.weight",
        "ids",
        "model.layers.7.mask",
    ];
    let mut sink = Assembling::default();
    Loader::new()
        .select_names(names)
        .select(["model.layers.1.*"])
        .stream_order(StreamOrder::Selection)
        .memory_limit_bytes(LIMIT_BYTES)
        .open(directory.path())
        .unwrap()
        .stream_into(&mut sink)
        .unwrap();
    assert_eq!(sink.order[..names.len()], names);
    assert_eq!(sink.order.len(), names.len() + 3);
}

#[test]
fn slices_are_streamed_in_row_major_order() {
    let directory = tempfile::tempdir().unwrap();
    let expected = expected();
    write(&expected, LAYOUTS[2], directory.path());
    let mut sink = Assembling::default();
    Loader::new()
        .select_names(["model.embed_tokens.weight"])
        .slice(
            "model.embed_tokens.weight=dim:1,range:100..133"
                .parse()
                .unwrap(),
        )
        .memory_limit_bytes(LIMIT_BYTES)
        .open(directory.path())
        .unwrap()
        .stream_into(&mut sink)
        .unwrap();
    let (_, shape, data) = &expected["model.embed_tokens.weight"];
    let row = usize::try_from(shape[1]).unwrap() * 2;
    let columns: Vec<u8> = data
        .chunks_exact(row)
        .flat_map(|row| &row[200..266])
        .copied()
        .collect();
    assert!(sink.tensors["model.embed_tokens.weight"] == columns);
    assert_eq!(sink.announced[0].shape(), [1031, 33]);
}

/// A transposed matrix and an expanded vector, as the store dialect can hold them.
#[test]
fn strided_tensors_are_streamed_in_row_major_order() {
    let directory = tempfile::tempdir().unwrap();
    let stored: Vec<u8> = (0..24).collect();
    std::fs::write(directory.path().join("tensor.data_0"), &stored).unwrap();
    let index = r#"{
        "transposed": [0, 24, [4, 3], [1, 4], "torch.int16"],
        "also": [0, 24, [3, 4], [4, 1], "torch.int16"],
        "expanded": [0, 24, [3, 2], [0, 1], "torch.int8"]
    }"#;
    std::fs::write(directory.path().join("tensor_index.json"), index).unwrap();
    let mut sink = Assembling::default();
    let checkpoint = Loader::new().open(directory.path()).unwrap();
    checkpoint.stream_into(&mut sink).unwrap();
    let transposed: Vec<u8> = (0..4_u8)
        .flat_map(|column| {
            (0..3_u8).flat_map(move |row| [8 * row + 2 * column, 8 * row + 2 * column + 1])
        })
        .collect();
    assert_eq!(sink.tensors["transposed"], transposed);
    assert_eq!(sink.tensors["also"], stored);
    assert_eq!(sink.tensors["expanded"], [0, 1, 0, 1, 0, 1]);
    let loaded = tensora::load(directory.path()).unwrap();
    assert_eq!(checkpoint.digest().unwrap(), loaded.digest().unwrap());
}

#[test]
fn memory_of_the_caller_is_filled_in_any_layout() {
    let directory = tempfile::tempdir().unwrap();
    let expected = expected();
    write(&expected, LAYOUTS[0], directory.path());
    // Two matrices side by side, as one of twice as many columns; the mask after them.
    let row = 65 * 4;
    let names = ["model.layers.3.mlp.weight", "model.layers.4.mlp.weight"];
    let mut memory = vec![0xee; 33 * 2 * row + 7 + 5];
    let place = |tensor: &StreamedTensor| {
        let offset = names.iter().position(|name| *name == tensor.name());
        Some(match offset {
            Some(column) => MemoryPlace {
                offset: column * row,
                strides_bytes: Some(vec![2 * row, 4]),
            },
            None => MemoryPlace::contiguous(33 * 2 * row),
        })
    };
    Loader::new()
        .select_names(names)
        .select_names(["model.layers.9.mask"])
        .open(directory.path())
        .unwrap()
        .stream_into(&mut MemorySink::new(&mut memory, place))
        .unwrap();
    for line in 0..33 {
        for (column, name) in names.iter().enumerate() {
            let at = line * 2 * row + column * row;
            let wanted = &expected[*name].2[line * row..(line + 1) * row];
            assert!(memory[at..at + row] == *wanted, "row {line} of {name}");
        }
    }
    let mask = &memory[33 * 2 * row..];
    assert_eq!(mask[..7], expected["model.layers.9.mask"].2);
    assert_eq!(mask[7..], [0xee; 5]);
}

#[test]
fn memory_that_does_not_suit_is_refused_before_anything_is_written() {
    let directory = tempfile::tempdir().unwrap();
    write(&expected(), LAYOUTS[0], directory.path());
    let checkpoint = Loader::new()
        .select_names(["ids", "scalar"])
        .open(directory.path())
        .unwrap();
    let refusal = |place: fn(&StreamedTensor) -> Option<MemoryPlace>| {
        let mut memory = [0xee; 32];
        let mut sink = MemorySink::new(&mut memory, place);
        let error = checkpoint.stream_into(&mut sink).unwrap_err().to_string();
        assert_eq!(memory, [0xee; 32], "{error}");
        error
    };
    let nowhere = refusal(|tensor| (tensor.name() == "ids").then(|| MemoryPlace::contiguous(0)));
    assert!(
        nowhere.contains("no place for the tensor \"scalar\""),
        "{nowhere}"
    );
    let past = refusal(|_| Some(MemoryPlace::contiguous(9)));
    assert!(past.contains("\"ids\"") && past.contains("33"), "{past}");
    let strides = refusal(|_| {
        Some(MemoryPlace {
            offset: 0,
            strides_bytes: Some(vec![8, 8]),
        })
    });
    assert!(strides.contains("2 strides"), "{strides}");
    let overflow = refusal(|_| Some(MemoryPlace::contiguous(usize::MAX - 3)));
    assert!(overflow.contains("address space"), "{overflow}");
}

#[test]
fn a_sink_that_fails_stops_the_stream_with_its_own_words() {
    struct Full(usize);
    impl Sink for Full {
        fn write(&mut self, _piece: StreamedPiece) -> Result<(), SinkError> {
            self.0 += 1;
            if self.0 < 4 {
                Ok(())
            } else {
                Err("the device is full".into())
            }
        }
    }
    let directory = tempfile::tempdir().unwrap();
    write(&expected(), LAYOUTS[3], directory.path());
    let mut sink = Full(0);
    let checkpoint = Loader::new().open(directory.path()).unwrap();
    let error = checkpoint.stream_into(&mut sink).unwrap_err();
    assert_eq!(sink.0, 4);
    assert!(matches!(
        &error,
        Error::Sink {
            tensor: Some(_),
            ..
        }
    ));
    assert!(
        error.to_string().ends_with("failed: the device is full"),
        "{error}"
    );
}

#[test]
fn a_file_that_is_cut_off_is_an_error_that_names_the_tensor() {
    let directory = tempfile::tempdir().unwrap();
    let expected = expected();
    write(&expected, LAYOUTS[0], directory.path());
    let checkpoint = Loader::new().open(directory.path()).unwrap();
    let path = checkpoint.index().files()[0].path.clone();
    let last = checkpoint
        .index()
        .tensors()
        .iter()
        .max_by_key(|tensor| tensor.offset);
    let last = last.unwrap().clone();
    // Opened, checked, and then cut off.
    let stream = checkpoint.stream();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(last.offset + 1).unwrap();
    let outcome = stream.and_then(|stream| stream.drain_into(&mut DigestSink::new()));
    match outcome {
        // It was all read before.
        Ok(_) => assert!(checkpoint.digest().is_err()),
        Err(Error::Tensor { tensor, .. }) => assert_eq!(tensor, last.name),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_cancelled_stream_ends() {
    let directory = tempfile::tempdir().unwrap();
    write(&expected(), LAYOUTS[0], directory.path());
    let token = CancelToken::new();
    let checkpoint = Loader::new()
        .cancel_with(token.clone())
        .memory_limit_bytes(LIMIT_BYTES)
        .open(directory.path())
        .unwrap();
    let mut stream = checkpoint.stream().unwrap();
    let first = stream.next().unwrap().unwrap();
    token.cancel();
    let error = stream.find_map(Result::err).unwrap();
    assert!(error.is_cancelled(), "{error}");
    assert!(stream.next().is_none());
    drop(stream);
    assert!(!first.bytes().is_empty());
}

#[test]
fn tasks_stream_without_blocking_their_thread() {
    async fn next(stream: &mut TensorStream) -> Option<tensora::Result<StreamedPiece>> {
        use futures_core::Stream;
        std::future::poll_fn(|context| Pin::new(&mut *stream).poll_next(context)).await
    }

    let directory = tempfile::tempdir().unwrap();
    let expected = expected();
    write(&expected, LAYOUTS[1], directory.path());
    let checkpoint = Loader::new()
        .memory_limit_bytes(LIMIT_BYTES)
        .open(directory.path())
        .unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let mut sink = Assembling::default();
    let ticks = runtime.block_on(async {
        // On the same thread: it only runs while the stream waits.
        let ticking = tokio::spawn(async {
            let mut ticks = 0_u64;
            loop {
                tokio::task::yield_now().await;
                ticks += 1;
                if ticks > 1000 {
                    return ticks;
                }
            }
        });
        let mut stream = checkpoint.stream().unwrap();
        sink.begin(stream.tensors()).unwrap();
        while let Some(piece) = next(&mut stream).await {
            sink.write(piece.unwrap()).unwrap();
            tokio::task::yield_now().await;
        }
        sink.finish().unwrap();
        stream.detach();
        ticking.await.unwrap()
    });
    assert!(ticks > 1000);
    sink.assert_holds(&expected, "async");
}

#[test]
fn a_limit_that_nothing_fits_is_refused_with_what_would() {
    let directory = tempfile::tempdir().unwrap();
    write(&expected(), LAYOUTS[0], directory.path());
    let checkpoint = Loader::new()
        .memory_limit_bytes(1000)
        .open(directory.path())
        .unwrap();
    let error = checkpoint.stream().unwrap_err().to_string();
    assert!(error.contains("1000 bytes"), "{error}");
    assert!(error.contains("at least"), "{error}");
}
