//! The content digest is what its definition says, whatever the order, the strides and the threads.

// Outside test functions the lint asks for more, but a test helper fails its test just so.
#![allow(clippy::unwrap_used)]

use std::num::NonZero;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use tensora_convert::{ContentHasher, Error, StoredTensor, content_digest, data_digest};
use tensora_formats::Dtype;
use tensora_io::{CancelToken, Control};

fn threads(count: usize) -> NonZero<usize> {
    NonZero::new(count).unwrap()
}

/// The definition, word for word, over contiguous tensors.
fn naive_digest(tensors: &[StoredTensor<'_>]) -> String {
    let mut tensors = tensors.to_vec();
    tensors.sort_by_key(|tensor| tensor.name.as_bytes());
    let mut text = Vec::new();
    for tensor in tensors {
        text.extend((tensor.name.len() as u64).to_le_bytes());
        text.extend(tensor.name.as_bytes());
        let dtype = tensor.dtype.to_string();
        text.extend((dtype.len() as u64).to_le_bytes());
        text.extend(dtype.as_bytes());
        text.extend((tensor.shape.len() as u64).to_le_bytes());
        for dimension in tensor.shape {
            text.extend(dimension.to_le_bytes());
        }
        text.extend((tensor.bytes.len() as u64).to_le_bytes());
        text.extend(blake3::hash(tensor.bytes).as_bytes());
    }
    blake3::hash(&text).to_string()
}

fn tensor<'a>(name: &'a str, dtype: Dtype, shape: &'a [u64], bytes: &'a [u8]) -> StoredTensor<'a> {
    StoredTensor {
        name,
        dtype,
        shape,
        strides: None,
        bytes,
    }
}

fn digest(tensors: &[StoredTensor<'_>]) -> String {
    content_digest(tensors.iter().copied(), threads(2), &Control::new())
        .unwrap()
        .to_string()
}

#[test]
fn a_small_checkpoint_keeps_its_digest_for_ever() {
    let weight: Vec<u8> = (0..24).collect();
    let tensors = [
        tensor("model.norm.weight", Dtype::BF16, &[3, 4], &weight),
        tensor("lm_head.weight", Dtype::F32, &[2, 3], &weight),
        tensor("empty", Dtype::I64, &[0, 5], &[]),
        tensor("scalar", Dtype::U8, &[], &[7]),
        tensor("gewöhnlich", Dtype::F4, &[2], &[0x42]),
    ];
    assert_eq!(digest(&tensors), naive_digest(&tensors));
    assert_eq!(
        digest(&tensors),
        "770cb53bc81e3e5576801c93a28ed4ce8bc522c1f777e5bc394725bc81b58982"
    );
    assert_eq!(
        digest(&[]),
        "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
        "no tensors are the empty text"
    );
}

#[test]
fn name_dtype_shape_and_data_all_count() {
    let bytes = [1, 2, 3, 4];
    let original = tensor("ab", Dtype::U16, &[2], &bytes);
    let others = [
        tensor("a", Dtype::U16, &[2], &bytes),
        tensor("ab", Dtype::F16, &[2], &bytes),
        tensor("ab", Dtype::U16, &[2, 1], &bytes),
        tensor("ab", Dtype::U16, &[2], &[1, 2, 3, 5]),
        tensor("ab", Dtype::U16, &[1], &bytes[..2]),
    ];
    for other in others {
        assert_ne!(digest(&[original]), digest(&[other]), "{other:?}");
    }
}

#[test]
fn a_strided_tensor_has_the_digest_of_its_gathered_self() {
    // 9 MiB, so that pieces and gather buffers both end in the middle of rows.
    let (rows, columns) = (1537u64, 3072u64);
    let stored: Vec<u8> = (0..rows * columns * 2)
        .map(|i| u8::try_from(i % 253).unwrap())
        .collect();
    let shape = [columns, rows];
    let transposed = StoredTensor {
        name: "t",
        dtype: Dtype::BF16,
        shape: &shape,
        strides: Some(&[1, columns]),
        bytes: &stored,
    };
    let item = |row: u64, column: u64| {
        let at = usize::try_from((row * columns + column) * 2).unwrap();
        [stored[at], stored[at + 1]]
    };
    let gathered: Vec<u8> = (0..columns)
        .flat_map(|column| (0..rows).map(move |row| (row, column)))
        .flat_map(|(row, column)| item(row, column))
        .collect();
    let contiguous = tensor("t", Dtype::BF16, &shape, &gathered);
    assert_eq!(digest(&[transposed]), naive_digest(&[contiguous]));
    assert_eq!(
        data_digest(&transposed, threads(2), &Control::new())
            .unwrap()
            .as_bytes(),
        blake3::hash(&gathered).as_bytes()
    );
}

#[test]
fn one_tensor_after_the_other_in_any_order_gives_the_same() {
    let bytes = [1, 2, 3, 4];
    let tensors = [
        tensor("b", Dtype::U8, &[4], &bytes),
        tensor("a", Dtype::U8, &[4], &bytes),
        tensor("", Dtype::U8, &[2, 2], &bytes),
    ];
    let mut hasher = ContentHasher::new();
    for tensor in &tensors {
        let data = data_digest(tensor, threads(1), &Control::new()).unwrap();
        hasher
            .insert(tensor.name, tensor.dtype, tensor.shape, data)
            .unwrap();
    }
    assert_eq!(hasher.finish().to_string(), digest(&tensors));

    let data = hasher.finish();
    let before = hasher.finish();
    let duplicate = hasher.insert("a", Dtype::U8, &[1], data).unwrap_err();
    assert!(matches!(duplicate, Error::DuplicateTensor { tensor } if tensor == "a"));
    let oversized = hasher
        .insert("c", Dtype::U16, &[u64::MAX], data)
        .unwrap_err();
    assert!(matches!(oversized, Error::TensorSize { tensor, .. } if tensor == "c"));
    assert_eq!(hasher.finish(), before);
}

#[test]
fn duplicates_and_wrong_lengths_are_refused() {
    let hash = |tensors: Vec<StoredTensor<'_>>| {
        content_digest(tensors, threads(1), &Control::new()).unwrap_err()
    };
    let one = tensor("a", Dtype::U8, &[1], &[1]);
    assert!(matches!(
        hash(vec![one, one]),
        Error::DuplicateTensor { .. }
    ));
    let error = hash(vec![tensor("a", Dtype::F32, &[2], &[0; 7])]);
    let text = error.to_string();
    for part in ["\"a\"", "F32", "[2]", "8 bytes", "7"] {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn progress_adds_up_and_cancelling_stops() {
    let data = vec![0; 10 << 20];
    let large = tensor("a", Dtype::U8, &[10 << 20], &data);
    let hashed = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&hashed);
    let control = Control::new().with_progress(move |bytes| {
        counter.fetch_add(bytes, Ordering::Relaxed);
    });
    content_digest([large], threads(3), &control).unwrap();
    assert_eq!(hashed.load(Ordering::Relaxed), 10 << 20);

    let token = CancelToken::new();
    let in_callback = token.clone();
    let control = Control::new()
        .with_cancel(token)
        .with_progress(move |_| in_callback.cancel());
    let error = content_digest([large], threads(1), &control).unwrap_err();
    assert!(error.is_cancelled(), "{error}");
}

proptest! {
    #[test]
    fn agrees_with_the_definition(
        entries in prop::collection::btree_map(
            "[a-c.é]{0,4}",
            (prop::sample::select(Dtype::ALL.to_vec()), prop::collection::vec(0u64..4, 0..4), any::<u8>()),
            0..12,
        ),
        count in 1usize..5,
    ) {
        let owned: Vec<(String, Dtype, Vec<u64>, Vec<u8>)> = entries
            .into_iter()
            .filter_map(|(name, (dtype, shape, seed))| {
                let bytes = dtype.bytes_for(shape.iter().product())?;
                let data = (0..bytes).map(|i| u8::try_from(i % 256).unwrap() ^ seed).collect();
                Some((name, dtype, shape, data))
            })
            .rev()
            .collect();
        let tensors: Vec<StoredTensor<'_>> = owned
            .iter()
            .map(|(name, dtype, shape, data)| tensor(name, *dtype, shape, data))
            .collect();
        let digest = content_digest(tensors.iter().copied(), threads(count), &Control::new()).unwrap();
        prop_assert_eq!(digest.to_string(), naive_digest(&tensors));
    }
}
