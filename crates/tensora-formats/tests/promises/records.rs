//! Records, which tensors may share or look into with strides, laid out in both ServerlessLLM dialects:
//! written out as files, opened again, and read by a second reader that knows the format's text only.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::num::NonZero;

use proptest::prelude::*;
use tensora_formats::{
    CheckpointIndex, CheckpointLayout, DamagedTensors, Dtype, Error, Note, OpenOptions,
    Partitioning, RecordSpec, RecordTensor, STORE_PARTITION_BYTES, TensorSpec,
    partitioned_record_layout, store_record_layout,
};

use crate::fixture::{Directory, assert_refused};

/// The dtypes that both dialects have, with their sizes and names by hand.
const DTYPES: [(Dtype, u64, &str, &str); 6] = [
    (Dtype::U8, 1, "torch.uint8", "u8"),
    (Dtype::Bool, 1, "torch.bool", "bool"),
    (Dtype::BF16, 2, "torch.bfloat16", "bf16"),
    (Dtype::F32, 4, "torch.float32", "f32"),
    (Dtype::I64, 8, "torch.int64", "i64"),
    (Dtype::F8E4M3, 1, "torch.float8_e4m3fn", "f8_e4m3"),
];

fn element_bytes(dtype: Dtype) -> u64 {
    DTYPES.iter().find(|known| known.0 == dtype).unwrap().1
}

/// Row-major strides as they are defined, from the last dimension up.
fn packed_strides(shape: &[u64]) -> Vec<u64> {
    (1..=shape.len())
        .map(|after| shape[after..].iter().map(|&d| d.max(1)).product())
        .collect()
}

fn tensor(dtype: Dtype, shape: &[u64], strides: Option<&[u64]>) -> RecordTensor {
    RecordTensor {
        name: String::new(),
        dtype,
        shape: shape.to_owned(),
        strides: strides.map(<[u64]>::to_owned),
    }
}

/// A record without names: a dense tensor, a view with slack behind it, or nothing at all, and perhaps a
/// second and a third tensor on the same bytes.
fn any_record() -> impl Strategy<Value = RecordSpec> {
    let dtype = || prop::sample::select(DTYPES.map(|known| known.0).to_vec());
    let dense = (dtype(), prop::collection::vec(1u64..5, 0..4)).prop_map(|(dtype, shape)| {
        let bytes = element_bytes(dtype) * shape.iter().product::<u64>();
        RecordSpec {
            bytes,
            // With strides given, too: where they are the packed ones, they say nothing new.
            tensors: vec![
                tensor(dtype, &shape, None),
                tensor(dtype, &shape, Some(&packed_strides(&shape))),
            ],
        }
    });
    let dimension = (1u64..4, 0u64..9);
    let view = (dtype(), prop::collection::vec(dimension, 1..4), 0u64..20).prop_map(
        |(dtype, dimensions, slack)| {
            let (shape, strides): (Vec<u64>, Vec<u64>) = dimensions.into_iter().unzip();
            let last: u64 = shape.iter().zip(&strides).map(|(d, s)| (d - 1) * s).sum();
            let view_bytes = (last + 1) * element_bytes(dtype);
            let dense = is_dense(&shape, &strides);
            RecordSpec {
                bytes: view_bytes + if dense { 0 } else { slack },
                tensors: vec![tensor(dtype, &shape, Some(&strides))],
            }
        },
    );
    let empty = (dtype(), prop::collection::vec(0u64..3, 0..3), 0usize..3).prop_map(
        |(dtype, mut shape, at)| {
            shape.insert(at.min(shape.len()), 0);
            RecordSpec {
                bytes: 0,
                tensors: vec![
                    tensor(dtype, &shape, None),
                    tensor(dtype, &shape, Some(&vec![7; shape.len()])),
                ],
            }
        },
    );
    let aliases = prop::collection::vec(any::<bool>(), 2);
    (prop_oneof![4 => dense, 4 => view, 1 => empty], aliases).prop_map(|(mut record, aliases)| {
        if !aliases[0] {
            record.tensors.truncate(1);
        }
        if aliases[1] {
            // The same bytes as another type.
            record
                .tensors
                .push(tensor(Dtype::U8, &[record.bytes], None));
        }
        record
    })
}

/// Whether the elements of a view fill a range without gaps in the order of their positions, found by
/// listing them.
fn is_dense(shape: &[u64], strides: &[u64]) -> bool {
    positions(shape, strides)
        .into_iter()
        .eq(0..shape.iter().product())
}

/// The positions of all elements, in row-major order.
fn positions(shape: &[u64], strides: &[u64]) -> Vec<u64> {
    let Some((&first, rest)) = shape.split_first() else {
        return vec![0];
    };
    let below = positions(rest, &strides[1..]);
    (0..first)
        .flat_map(|at| below.iter().map(move |position| at * strides[0] + position))
        .collect()
}

fn any_records() -> impl Strategy<Value = Vec<RecordSpec>> {
    prop::collection::vec(any_record(), 0..9).prop_flat_map(|records| {
        let count: usize = records.iter().map(|record| record.tensors.len()).sum();
        let names = prop::collection::hash_set("\\PC{0,3}|[\u{0}-\u{1f}\"\\\\/._é€𝄞]{0,4}", count);
        (Just(records), names).prop_map(|(mut records, names)| {
            let tensors = records.iter_mut().flat_map(|record| &mut record.tensors);
            for (tensor, name) in tensors.zip(names) {
                tensor.name = name;
            }
            records
        })
    })
}

fn length(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap()
}

/// What a record holds.
fn content(number: usize, bytes: u64) -> Vec<u8> {
    (0..bytes)
        .map(|at| u8::try_from((number as u64 * 89 + at * 7) % 251 + 1).unwrap())
        .collect()
}

/// A tensor's elements in row-major order.
fn gathered(stored: &[u8], dtype: Dtype, shape: &[u64], strides: &[u64]) -> Vec<u8> {
    let width = length(element_bytes(dtype));
    positions(shape, strides)
        .into_iter()
        .flat_map(|position| &stored[length(position) * width..][..width])
        .copied()
        .collect()
}

/// Writes a layout; bytes between records are not zero, because a reader must not depend on it.
fn write(directory: &Directory, layout: &CheckpointLayout) {
    for planned in &layout.files {
        let mut bytes = vec![0xff; length(planned.bytes)];
        for record in &planned.tensors {
            let content = content(record.tensor, record.bytes);
            bytes[length(record.offset)..][..content.len()].copy_from_slice(&content);
        }
        directory.write(&planned.name, bytes);
    }
    let index = layout.index.as_ref().unwrap();
    directory.write(&index.name, &index.contents);
}

/// Opens what a layout wrote and compares it, tensor by tensor, with the records.
fn assert_opens(directory: &Directory, records: &[RecordSpec], layout: &CheckpointLayout) {
    let index = CheckpointIndex::open(directory.path()).unwrap();
    let expected: BTreeMap<&str, (usize, &RecordTensor)> = records
        .iter()
        .enumerate()
        .flat_map(|(number, record)| {
            let tensors = record.tensors.iter();
            tensors.map(move |tensor| (tensor.name.as_str(), (number, tensor)))
        })
        .collect();
    if !expected.is_empty() {
        assert_eq!(index.format(), layout.format);
    }
    let names: Vec<&str> = index.tensors().iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, expected.keys().copied().collect::<Vec<_>>());
    for entry in index.tensors() {
        let (number, tensor) = expected[entry.name.as_str()];
        assert_eq!((entry.dtype, &entry.shape), (tensor.dtype, &tensor.shape));
        let file = fs::read(&index.files()[entry.file].path).unwrap();
        let stored = &file[length(entry.range().start)..length(entry.range().end)];
        assert_eq!(stored, content(number, records[number].bytes));

        let packed = packed_strides(&tensor.shape);
        let meant = tensor.strides.as_deref().unwrap_or(&packed);
        let found = entry.strides.as_deref().unwrap_or(&packed);
        assert_eq!(
            gathered(stored, entry.dtype, &entry.shape, found),
            gathered(stored, tensor.dtype, &tensor.shape, meant),
        );
        assert_eq!(
            entry.is_contiguous(),
            tensor.shape.contains(&0) || is_dense(&tensor.shape, meant)
        );
    }
    // Each record once: what the files hold is what the records need, and no more than their padding.
    let stored: u64 = layout.files.iter().map(|file| file.bytes).sum();
    let needed: u64 = records
        .iter()
        .map(|record| record.bytes.div_ceil(8) * 8)
        .sum();
    assert_eq!(stored, needed);
}

/// Reads what a layout wrote as the formats' text says, and nothing else: the fields by position, the
/// store's offsets through the concatenation.
fn assert_second_reader(directory: &Directory, records: &[RecordSpec], partitioned: bool) {
    let index = fs::read(directory.join("tensor_index.json")).unwrap();
    let index: BTreeMap<String, Vec<serde_json::Value>> = serde_json::from_slice(&index).unwrap();
    let mut partitions: Vec<Vec<u8>> = Vec::new();
    while let Ok(bytes) = fs::read(directory.join(&format!("tensor.data_{}", partitions.len()))) {
        partitions.push(bytes);
    }
    let whole = partitions.concat();
    let numbers = |value: &serde_json::Value| -> Vec<u64> {
        let values = value.as_array().unwrap().iter();
        values.map(|number| number.as_u64().unwrap()).collect()
    };
    let mut seen = 0;
    for (number, record) in records.iter().enumerate() {
        for tensor in &record.tensors {
            let entry = &index[&tensor.name];
            assert_eq!(entry.len(), if partitioned { 6 } else { 5 });
            let [offset, bytes] = [0, 1].map(|field| length(entry[field].as_u64().unwrap()));
            let holder = match entry.get(5) {
                Some(partition) => &partitions[length(partition.as_u64().unwrap())],
                None => &whole,
            };
            assert_eq!(
                holder[offset..offset + bytes],
                content(number, record.bytes)
            );
            assert!(offset.is_multiple_of(8));
            assert_eq!(numbers(&entry[2]), tensor.shape);
            let packed = packed_strides(&tensor.shape);
            assert_eq!(
                &numbers(&entry[3]),
                tensor.strides.as_ref().unwrap_or(&packed)
            );
            let known = DTYPES.iter().find(|known| known.0 == tensor.dtype).unwrap();
            let name = if partitioned { known.3 } else { known.2 };
            assert_eq!(entry[4].as_str().unwrap(), name);
            seen += 1;
        }
    }
    assert_eq!(seen, index.len());
}

fn bytes(count: u64) -> NonZero<u64> {
    NonZero::new(count).unwrap()
}

proptest! {
    #[test]
    fn store_records_read_back(records in any_records(), partition_bytes in 0u64..300) {
        let layout = store_record_layout(&records, partition_bytes).unwrap();
        let directory = Directory::new();
        write(&directory, &layout);
        assert_opens(&directory, &records, &layout);
        assert_second_reader(&directory, &records, false);
        // In input order.
        let order: Vec<usize> = layout
            .files
            .iter()
            .flat_map(|file| file.tensors.iter().map(|record| record.tensor))
            .collect();
        prop_assert!(order.into_iter().eq(0..records.len()));
        for file in &layout.files {
            let filled = file.tensors.iter().filter(|record| record.bytes > 0).count();
            prop_assert!(file.bytes <= partition_bytes || filled == 1);
        }
    }

    #[test]
    fn partitioned_records_read_back(
        records in any_records(),
        partitioning in prop_oneof![
            (1u32..6).prop_map(|count| Partitioning::Count(NonZero::new(count).unwrap())),
            (1u64..300).prop_map(|max_bytes| Partitioning::MaxBytes(bytes(max_bytes))),
        ],
    ) {
        let layout = partitioned_record_layout(&records, partitioning).unwrap();
        let directory = Directory::new();
        write(&directory, &layout);
        assert_opens(&directory, &records, &layout);
        assert_second_reader(&directory, &records, true);
        for file in &layout.files {
            // Read from front to back, the input is read from front to back.
            prop_assert!(file.tensors.is_sorted_by_key(|record| record.tensor));
            prop_assert!(!file.tensors.is_empty() || records.is_empty());
        }
        match partitioning {
            Partitioning::Count(count) => prop_assert_eq!(
                layout.files.len(),
                (count.get() as usize).min(records.len()).max(1)
            ),
            Partitioning::MaxBytes(max_bytes) => {
                for file in &layout.files {
                    prop_assert!(file.bytes <= max_bytes.get() || file.tensors.len() == 1);
                }
            }
            _ => {}
        }
    }
}

/// Every file cut to a length of its own (or left as it is): what is left is found, what is lost is told.
fn assert_damage(
    directory: &Directory,
    layout: &CheckpointLayout,
    records: &[RecordSpec],
    lengths: &[u64],
) {
    let mut lost: BTreeMap<String, (String, u64)> = BTreeMap::new();
    for (planned, &bytes) in layout.files.iter().zip(lengths) {
        let path = directory.join(&planned.name);
        let file = fs::OpenOptions::new().write(true).open(path).unwrap();
        file.set_len(bytes).unwrap();
        for record in &planned.tensors {
            let end = record.offset + record.bytes;
            if end <= bytes || record.bytes == 0 {
                continue;
            }
            let present = bytes.saturating_sub(record.offset);
            for tensor in &records[record.tensor].tensors {
                lost.insert(tensor.name.clone(), (planned.name.clone(), present));
            }
        }
    }
    let opened = OpenOptions::new()
        .damaged_tensors(DamagedTensors::LeaveOut)
        .open(directory.path())
        .unwrap();
    let mut told = BTreeMap::new();
    for note in opened.notes() {
        if let Note::Damaged { file, tensors, .. } = note {
            for tensor in tensors {
                let place = (file.clone(), tensor.present_bytes);
                assert!(told.insert(tensor.name.clone(), place).is_none());
            }
        }
    }
    assert_eq!(told, lost);
    let names = |index: &CheckpointIndex| -> BTreeSet<String> {
        index.tensors().iter().map(|t| t.name.clone()).collect()
    };
    let all = records.iter().flat_map(|record| &record.tensors);
    let kept: BTreeSet<String> = all
        .map(|tensor| tensor.name.clone())
        .filter(|name| !lost.contains_key(name))
        .collect();
    assert_eq!(names(&opened), kept);
    match CheckpointIndex::open(directory.path()) {
        Ok(index) => {
            assert!(lost.is_empty());
            assert_eq!(index, opened);
        }
        Err(Error::PartitionsTooShort { partitions, .. }) => {
            let tensors = partitions.iter().flat_map(|short| &short.tensors);
            let refused: BTreeSet<&String> = tensors.map(|tensor| &tensor.name).collect();
            assert!(!lost.is_empty() && refused.into_iter().eq(lost.keys()));
        }
        Err(other) => panic!("{other}"),
    }
}

proptest! {
    #[test]
    fn damage_is_told_in_full(records in any_records(), seed in any::<[u8; 5]>()) {
        let partitioning = Partitioning::Count(NonZero::new(5).unwrap());
        let layout = partitioned_record_layout(&records, partitioning).unwrap();
        let directory = Directory::new();
        write(&directory, &layout);
        let lengths: Vec<u64> = layout
            .files
            .iter()
            .zip(seed)
            // One in four stays whole.
            .map(|(file, cut)| file.bytes * u64::from(cut).min(192) / 192)
            .collect();
        assert_damage(&directory, &layout, &records, &lengths);

        // Only the last partition of a store can be found too short: offsets count through all.
        let layout = store_record_layout(&records, 64).unwrap();
        let directory = Directory::new();
        write(&directory, &layout);
        let mut lengths: Vec<u64> = layout.files.iter().map(|file| file.bytes).collect();
        if let Some(last) = lengths.last_mut() {
            *last = *last * u64::from(seed[0]).min(192) / 192;
        }
        assert_damage(&directory, &layout, &records, &lengths);
    }
}

#[test]
fn tied_weights_are_stored_once() {
    let weight = |name: &str| RecordTensor {
        name: name.to_owned(),
        ..tensor(Dtype::BF16, &[2, 3], None)
    };
    let tied = RecordSpec {
        bytes: 12,
        tensors: vec![
            weight("embed"),
            weight("head"),
            RecordTensor {
                name: "head.T".to_owned(),
                ..tensor(Dtype::BF16, &[3, 2], Some(&[1, 3]))
            },
        ],
    };
    let records = [
        RecordSpec::of(TensorSpec {
            name: "norm".to_owned(),
            dtype: Dtype::U8,
            shape: vec![5],
        })
        .unwrap(),
        tied,
    ];
    let text = |layout: &CheckpointLayout| {
        String::from_utf8(layout.index.as_ref().unwrap().contents.clone()).unwrap()
    };
    let layout = store_record_layout(&records, STORE_PARTITION_BYTES).unwrap();
    assert_eq!(
        text(&layout),
        r#"{"norm":[0,5,[5],[1],"torch.uint8"],"embed":[8,12,[2,3],[3,1],"torch.bfloat16"],"head":[8,12,[2,3],[3,1],"torch.bfloat16"],"head.T":[8,12,[3,2],[1,3],"torch.bfloat16"]}"#
    );
    assert_eq!(layout.files[0].bytes, 24);
    assert_eq!(layout.files[0].tensors.len(), 2);
    let layout = partitioned_record_layout(&records, Partitioning::MaxBytes(bytes(16))).unwrap();
    assert_eq!(
        text(&layout),
        r#"{"norm":[0,5,[5],[1],"u8",1],"embed":[0,12,[2,3],[3,1],"bf16",0],"head":[0,12,[2,3],[3,1],"bf16",0],"head.T":[0,12,[3,2],[1,3],"bf16",0]}"#
    );
}

#[test]
fn a_bound_on_partitions_still_balances_them() {
    let sizes = |records: &[u64], max_bytes| -> Vec<u64> {
        let records: Vec<RecordSpec> = records
            .iter()
            .enumerate()
            .map(|(number, &bytes)| {
                let spec = TensorSpec {
                    name: number.to_string(),
                    dtype: Dtype::U8,
                    shape: vec![bytes],
                };
                RecordSpec::of(spec).unwrap()
            })
            .collect();
        let partitioning = Partitioning::MaxBytes(bytes(max_bytes));
        let layout = partitioned_record_layout(&records, partitioning).unwrap();
        layout.files.iter().map(|file| file.bytes).collect()
    };
    // Not 12 and 4.
    assert_eq!(sizes(&[800, 800, 800, 800], 2400), [1600, 1600]);
    // Balanced greedily, one would have 56 bytes.
    assert_eq!(sizes(&[24, 24, 16, 16, 16], 48), [48, 48]);
    // Larger ones are by themselves, behind the others.
    assert_eq!(sizes(&[800, 8, 1600, 8], 16), [16, 800, 1600]);
    assert_eq!(sizes(&[800], 1), [800]);
    // Padding counts.
    assert_eq!(sizes(&[9, 9], 18), [16, 16]);
    assert_eq!(sizes(&[], 1), [0]);
    let names: BTreeSet<String> = partitioned_record_layout(&[], Partitioning::MaxBytes(bytes(1)))
        .unwrap()
        .files
        .into_iter()
        .map(|file| file.name)
        .collect();
    assert_eq!(names, BTreeSet::from(["tensor.data_0".to_owned()]));
}

#[test]
fn records_that_do_not_fit_their_tensors() {
    let record = |bytes, tensor: RecordTensor| {
        let name = "t".to_owned();
        let tensors = vec![RecordTensor { name, ..tensor }];
        [RecordSpec { bytes, tensors }]
    };
    let layouts = |records: &[RecordSpec]| {
        let partitioning = Partitioning::Count(NonZero::<u32>::MIN);
        [
            store_record_layout(records, STORE_PARTITION_BYTES),
            partitioned_record_layout(records, partitioning),
        ]
    };
    for (record_bytes, tensor) in [
        (23, tensor(Dtype::F32, &[2, 3], None)),
        (25, tensor(Dtype::F32, &[2, 3], None)),
        (25, tensor(Dtype::F32, &[2, 3], Some(&[3, 1]))),
        (23, tensor(Dtype::F32, &[2, 3], Some(&[1, 2]))),
        (1, tensor(Dtype::F32, &[0], None)),
    ] {
        let needed = if tensor.shape == [0] { 0 } else { 24 };
        for layout in layouts(&record(record_bytes, tensor)) {
            assert_refused!(
                layout,
                Error::RecordSize { .. },
                r#"tensor "t""#,
                format!("takes {needed} bytes"),
                format!("has {record_bytes}"),
            );
        }
    }
    for layout in layouts(&record(24, tensor(Dtype::F32, &[2, 3], Some(&[1])))) {
        assert_refused!(
            layout,
            Error::RecordStrides { .. },
            r#"tensor "t""#,
            "2 dimensions but 1 strides",
        );
    }
    let nothing = [RecordSpec {
        bytes: 7,
        tensors: Vec::new(),
    }];
    for layout in layouts(&nothing) {
        assert_refused!(layout, Error::EmptyRecord { .. }, "record 0 of 7 bytes");
    }
    // What a reader would refuse, although a view of it takes one byte only.
    let expanded = tensor(Dtype::U8, &[1 << 40, 1 << 40], Some(&[0, 0]));
    for layout in layouts(&record(1, expanded)) {
        assert_refused!(layout, Error::SpecSize { .. }, r#"tensor "t""#);
    }
    // One name for two tensors of one record, or of two.
    let spec = |name: &str| TensorSpec {
        name: name.to_owned(),
        dtype: Dtype::U8,
        shape: vec![1],
    };
    let mut twice = RecordSpec::of(spec("t")).unwrap();
    twice.tensors.push(twice.tensors[0].clone());
    let both = [spec("t"), spec("t")].map(|spec| RecordSpec::of(spec).unwrap());
    for records in [&[twice][..], &both] {
        for layout in layouts(records) {
            assert_refused!(layout, Error::DuplicateSpec { .. }, r#"tensor "t""#);
        }
    }
}
