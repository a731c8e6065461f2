//! What the layouts plan, the readers read: ours and the reference.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::num::NonZero;

use proptest::prelude::*;
use tensora_formats::{
    CheckpointIndex, CheckpointLayout, Dtype, Error, Format, STORE_PARTITION_BYTES, Sharding,
    TensorSpec, partitioned_layout, safetensors_layout, store_layout,
};

use crate::fixture::{Directory, assert_refused};

fn spec(name: &str, dtype: Dtype, shape: &[u64]) -> TensorSpec {
    TensorSpec {
        name: name.to_owned(),
        dtype,
        shape: shape.to_owned(),
    }
}

/// A shape as the reference has it.
fn lengths(shape: &[u64]) -> Vec<usize> {
    shape
        .iter()
        .map(|&dimension| usize::try_from(dimension).unwrap())
        .collect()
}

/// The data of a tensor: its number, repeated.
fn data(tensor: usize, bytes: u64) -> Vec<u8> {
    vec![u8::try_from(tensor % 251 + 1).unwrap(); usize::try_from(bytes).unwrap()]
}

/// Writes a layout the way any writer must be able to: prefix, data at offsets, length.
fn write(directory: &Directory, layout: &CheckpointLayout) {
    for planned in &layout.files {
        let mut file = File::create(directory.join(&planned.name)).unwrap();
        file.write_all(&planned.prefix).unwrap();
        file.set_len(planned.bytes).unwrap();
        for tensor in &planned.tensors {
            file.seek(SeekFrom::Start(tensor.offset)).unwrap();
            file.write_all(&data(tensor.tensor, tensor.bytes)).unwrap();
        }
    }
    if let Some(index) = &layout.index {
        directory.write(&index.name, &index.contents);
    }
}

/// Checks that a written layout reads back as the specs, each byte where it was planned.
fn assert_reads_back(specs: &[TensorSpec], layout: &CheckpointLayout) -> Directory {
    let directory = Directory::new();
    write(&directory, layout);
    let index = CheckpointIndex::open(directory.path()).unwrap();
    if !specs.is_empty() {
        assert_eq!(index.format(), layout.format);
    }
    assert_eq!(index.notes(), []);
    assert_eq!(index.tensors().len(), specs.len());
    let names: Vec<&str> = index
        .files()
        .iter()
        .map(|file| file.name.as_str())
        .collect();
    let planned: Vec<&str> = layout.files.iter().map(|file| file.name.as_str()).collect();
    assert_eq!(names, planned);
    for (number, spec) in specs.iter().enumerate() {
        let tensor = index.tensor(&spec.name).unwrap();
        assert_eq!((tensor.dtype, &tensor.shape), (spec.dtype, &spec.shape));
        assert_eq!(Some(tensor.bytes), spec.bytes());
        assert!(tensor.is_contiguous());
        let mut stored = vec![0; usize::try_from(tensor.bytes).unwrap()];
        let mut file = File::open(&index.files()[tensor.file].path).unwrap();
        file.seek(SeekFrom::Start(tensor.offset)).unwrap();
        file.read_exact(&mut stored).unwrap();
        assert_eq!(stored, data(number, tensor.bytes), "{}", spec.name);
    }
    directory
}

/// Checks that the reference reads every file of a SafeTensors layout as planned.
fn assert_reference_reads(directory: &Directory, specs: &[TensorSpec], layout: &CheckpointLayout) {
    let mut read = 0;
    for planned in &layout.files {
        let bytes = std::fs::read(directory.join(&planned.name)).unwrap();
        let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for tensor in &planned.tensors {
            let spec = &specs[tensor.tensor];
            let view = theirs.tensor(&spec.name).unwrap();
            assert_eq!(view.dtype().to_string(), spec.dtype.name());
            assert_eq!(view.shape(), lengths(&spec.shape));
            assert_eq!(view.data(), data(tensor.tensor, tensor.bytes));
            read += 1;
        }
        assert_eq!(theirs.len(), planned.tensors.len());
    }
    assert_eq!(read, specs.len());
}

fn any_dtype() -> impl Strategy<Value = Dtype> {
    prop::sample::select(Dtype::ALL)
}

fn any_specs() -> impl Strategy<Value = Vec<TensorSpec>> {
    let shape = prop::collection::vec(0u64..6, 0..4);
    let spec = (any_dtype(), shape).prop_filter_map("whole bytes", |(dtype, shape)| {
        let spec = spec("", dtype, &shape);
        spec.bytes().is_some().then_some(spec)
    });
    let name = "[a-c]{0,3}[\"\\\\é\n./_0-9]{0,2}";
    prop::collection::btree_map(name, spec, 0..12).prop_flat_map(|specs| {
        let specs: Vec<TensorSpec> = specs
            .into_iter()
            .map(|(name, spec)| TensorSpec { name, ..spec })
            .collect();
        Just(specs).prop_shuffle()
    })
}

fn any_sharding() -> impl Strategy<Value = Sharding> {
    prop_oneof![
        Just(Sharding::Single),
        (1u32..6).prop_map(|count| Sharding::Count(NonZero::new(count).unwrap())),
        (0u64..500).prop_map(Sharding::MaxBytes),
    ]
}

proptest! {
    #[test]
    fn safetensors_layouts_read_back(
        specs in any_specs(),
        metadata in prop::collection::btree_map(".{0,4}", ".{0,4}", 0..3),
        sharding in any_sharding(),
        alignment in prop::sample::select(&[0u64, 8, 24, 512, 4096]),
    ) {
        let layout = safetensors_layout(&specs, &metadata, sharding, alignment).unwrap();
        let directory = assert_reads_back(&specs, &layout);
        assert_reference_reads(&directory, &specs, &layout);
        let index = CheckpointIndex::open(directory.path()).unwrap();
        prop_assert_eq!(index.metadata(), &metadata);
        for planned in &layout.files {
            let data_start = planned.prefix.len() as u64;
            prop_assert!(data_start.is_multiple_of(alignment.max(8)));
            prop_assert!(planned.tensors.is_sorted_by_key(|tensor| tensor.offset));
            // Larger elements first: every tensor is aligned to its element.
            for tensor in &planned.tensors {
                let element_bytes = u64::from(specs[tensor.tensor].dtype.bits()).div_ceil(8);
                if element_bytes.is_power_of_two() {
                    prop_assert!(tensor.offset.is_multiple_of(element_bytes));
                }
            }
        }
        prop_assert_eq!(layout.index.is_some(), layout.files.len() > 1);
        match sharding {
            Sharding::Count(count) => {
                prop_assert_eq!(layout.files.len(), (count.get() as usize).min(specs.len()).max(1));
            }
            Sharding::Single => prop_assert_eq!(layout.files.len(), 1),
            _ => {}
        }
    }

    #[test]
    fn store_layouts_read_back(specs in any_specs(), partition_bytes in 0u64..600) {
        match store_layout(&specs, partition_bytes) {
            Ok(layout) => {
                assert_reads_back(&specs, &layout);
                for planned in &layout.files {
                    let filled = planned.tensors.iter().filter(|tensor| tensor.bytes > 0).count();
                    prop_assert!(planned.bytes <= partition_bytes || filled <= 1);
                    prop_assert!(planned.prefix.is_empty());
                    for tensor in &planned.tensors {
                        prop_assert!(tensor.offset.is_multiple_of(8));
                    }
                }
            }
            Err(Error::DtypeNotInFormat { dtype, .. }) => {
                prop_assert!(specs.iter().any(|spec| spec.dtype == dtype));
            }
            Err(other) => prop_assert!(false, "{other}"),
        }
    }

    #[test]
    fn partitioned_layouts_read_back(specs in any_specs(), partitions in 1u32..6) {
        let partitions = NonZero::new(partitions).unwrap();
        match partitioned_layout(&specs, partitions) {
            Ok(layout) => {
                prop_assert_eq!(
                    layout.files.len(),
                    (partitions.get() as usize).min(specs.len()).max(1)
                );
                assert_reads_back(&specs, &layout);
            }
            Err(Error::DtypeNotInFormat { dtype, .. }) => prop_assert!(dtype.bits() < 8),
            Err(other) => prop_assert!(false, "{other}"),
        }
    }

    /// Byte for byte what the reference writes, where it can write the same thing.
    #[test]
    fn a_single_file_is_what_the_reference_writes(specs in any_specs()) {
        let layout =
            safetensors_layout(&specs, &BTreeMap::new(), Sharding::Single, 0).unwrap();
        let directory = Directory::new();
        write(&directory, &layout);
        let ours = std::fs::read(directory.join("model.safetensors")).unwrap();
        let all: Vec<Vec<u8>> = specs
            .iter()
            .enumerate()
            .map(|(number, spec)| data(number, spec.bytes().unwrap()))
            .collect();
        let views: HashMap<String, safetensors::tensor::TensorView<'_>> = specs
            .iter()
            .zip(&all)
            .map(|(spec, data)| {
                let dtype = serde_json::from_str(&format!("{:?}", spec.dtype.name())).unwrap();
                let shape = lengths(&spec.shape);
                let view = safetensors::tensor::TensorView::new(dtype, shape, data).unwrap();
                (spec.name.clone(), view)
            })
            .collect();
        let theirs = safetensors::serialize(&views, None).unwrap();
        prop_assert_eq!(ours, theirs);
    }
}

#[test]
fn an_empty_checkpoint() {
    let layout = safetensors_layout(&[], &BTreeMap::new(), Sharding::MaxBytes(1), 0).unwrap();
    let directory = assert_reads_back(&[], &layout);
    assert_reference_reads(&directory, &[], &layout);
    assert_reads_back(&[], &store_layout(&[], STORE_PARTITION_BYTES).unwrap());
    assert_reads_back(&[], &partitioned_layout(&[], NonZero::<u32>::MIN).unwrap());
}

#[test]
fn shard_names_are_those_of_hugging_face() {
    let specs: Vec<TensorSpec> = (0..12)
        .map(|n| spec(&format!("t{n}"), Dtype::F32, &[2]))
        .collect();
    let count = Sharding::Count(NonZero::new(12).unwrap());
    let layout = safetensors_layout(&specs, &BTreeMap::new(), count, 0).unwrap();
    assert_eq!(layout.files[0].name, "model-00001-of-00012.safetensors");
    assert_eq!(layout.files[11].name, "model-00012-of-00012.safetensors");
    let index = layout.index.as_ref().unwrap();
    assert_eq!(index.name, "model.safetensors.index.json");
    let json: serde_json::Value = serde_json::from_slice(&index.contents).unwrap();
    assert_eq!(json["metadata"]["total_size"], 96);
    assert_eq!(
        json["weight_map"]["t11"],
        "model-00012-of-00012.safetensors"
    );
}

#[test]
fn metadata_comes_first_and_the_header_is_padded_with_spaces() {
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let specs = [
        spec("small", Dtype::U8, &[3]),
        spec("b", Dtype::F32, &[1]),
        spec("a", Dtype::F32, &[1]),
    ];
    let layout = safetensors_layout(&specs, &metadata, Sharding::Single, 0).unwrap();
    let prefix = &layout.files[0].prefix;
    let header = std::str::from_utf8(&prefix[8..]).unwrap();
    assert_eq!(
        header.trim_end_matches(' '),
        r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},"small":{"dtype":"U8","shape":[3],"data_offsets":[8,11]}}"#
    );
    assert_eq!(prefix[..8], (header.len() as u64).to_le_bytes());
    assert!(prefix.len().is_multiple_of(8));
}

#[test]
fn the_store_dialect_as_its_own_writer_writes_it() {
    let specs = [
        spec("a", Dtype::F16, &[3]),
        spec("b", Dtype::BF16, &[2, 2]),
        spec("c", Dtype::F32, &[]),
    ];
    let layout = store_layout(&specs, 16).unwrap();
    let index = layout.index.as_ref().unwrap();
    assert_eq!(index.name, "tensor_index.json");
    assert_eq!(
        std::str::from_utf8(&index.contents).unwrap(),
        r#"{"a":[0,6,[3],[1],"torch.float16"],"b":[8,8,[2,2],[2,1],"torch.bfloat16"],"c":[16,4,[],[],"torch.float32"]}"#
    );
    let files: Vec<(&str, u64)> = layout
        .files
        .iter()
        .map(|file| (file.name.as_str(), file.bytes))
        .collect();
    assert_eq!(files, [("tensor.data_0", 16), ("tensor.data_1", 8)]);
    // A record that ends exactly at the limit does not take the partition past it.
    assert_eq!(store_layout(&specs[..2], 15).unwrap().files.len(), 2);
}

#[test]
fn the_store_dialect_splits_at_10_gib() {
    let specs: Vec<TensorSpec> = (0..3)
        .map(|n| spec(&format!("t{n}"), Dtype::U8, &[5 << 30]))
        .collect();
    let layout = store_layout(&specs, STORE_PARTITION_BYTES).unwrap();
    let sizes: Vec<u64> = layout.files.iter().map(|file| file.bytes).collect();
    assert_eq!(sizes, [10 << 30, 5 << 30]);
}

#[test]
fn the_partitioned_dialect_as_written() {
    let specs = [
        spec("a", Dtype::U8, &[3]),
        spec("b", Dtype::BF16, &[4, 4]),
        spec("c", Dtype::F8E4M3, &[9]),
    ];
    let layout = partitioned_layout(&specs, NonZero::new(2).unwrap()).unwrap();
    assert_eq!(layout.format, Format::ServerlessLlmPartitioned);
    assert_eq!(
        std::str::from_utf8(&layout.index.unwrap().contents).unwrap(),
        r#"{"a":[0,3,[3],[1],"u8",1],"b":[0,32,[4,4],[4,1],"bf16",0],"c":[8,9,[9],[1],"f8_e4m3",1]}"#
    );
}

#[test]
fn dtypes_that_a_dialect_lacks() {
    let lacking = |format: Format| -> Vec<&str> {
        Dtype::ALL
            .iter()
            .filter(|dtype| {
                let specs = [spec("t", **dtype, &[8])];
                let layout = match format {
                    Format::Safetensors => {
                        safetensors_layout(&specs, &BTreeMap::new(), Sharding::Single, 0)
                    }
                    Format::ServerlessLlmStore => store_layout(&specs, STORE_PARTITION_BYTES),
                    _ => partitioned_layout(&specs, NonZero::<u32>::MIN),
                };
                if layout.is_err() {
                    assert_refused!(
                        layout,
                        Error::DtypeNotInFormat { .. },
                        r#"tensor "t""#,
                        dtype,
                        format,
                    );
                    return true;
                }
                false
            })
            .map(|dtype| dtype.name())
            .collect()
    };
    assert_eq!(lacking(Format::Safetensors), [""; 0]);
    let packed = ["F4", "F6_E2M3", "F6_E3M2"];
    assert_eq!(lacking(Format::ServerlessLlmPartitioned), packed);
    assert_eq!(
        lacking(Format::ServerlessLlmStore),
        [&packed[..], &["U16", "U32", "C64", "U64"]].concat()
    );
}

#[test]
fn names_and_sizes_that_cannot_be_written() {
    let twice = [spec("t", Dtype::U8, &[1]), spec("t", Dtype::U8, &[1])];
    let reserved = [spec("__metadata__", Dtype::U8, &[1])];
    let huge = [spec("t", Dtype::I64, &[1 << 32, 1 << 32])];
    let partial = [spec("t", Dtype::F4, &[3])];
    let too_many: Vec<TensorSpec> = (0..8)
        .map(|n| spec(&format!("t{n}"), Dtype::U8, &[(1 << 61) - 8]))
        .collect();
    let safetensors =
        |specs: &[TensorSpec]| safetensors_layout(specs, &BTreeMap::new(), Sharding::Single, 0);

    assert_refused!(safetensors(&twice), Error::DuplicateSpec { .. }, r#""t""#);
    assert_refused!(
        safetensors(&reserved),
        Error::ReservedName { .. },
        "__metadata__"
    );
    assert_refused!(
        safetensors(&huge),
        Error::SpecSize { .. },
        r#""t""#,
        "4294967296",
        "I64"
    );
    assert_refused!(
        safetensors(&partial),
        Error::SpecSize { .. },
        r#""t""#,
        "F4 [3]"
    );
    assert_refused!(
        safetensors(&too_many),
        Error::LayoutOverflow { .. },
        r#""t7""#
    );
    for layout in [
        |specs: &[TensorSpec]| store_layout(specs, STORE_PARTITION_BYTES),
        |specs: &[TensorSpec]| partitioned_layout(specs, NonZero::<u32>::MIN),
    ] {
        assert_refused!(layout(&twice), Error::DuplicateSpec { .. }, r#""t""#);
        assert_refused!(layout(&huge), Error::SpecSize { .. }, r#""t""#);
        assert_refused!(layout(&too_many), Error::LayoutOverflow { .. }, r#""t7""#);
        // Only SafeTensors keeps that name for itself.
        assert_reads_back(&reserved, &layout(&reserved).unwrap());
    }
}

#[test]
fn data_alignment() {
    for alignment in [1, 4, 12] {
        assert_refused!(
            safetensors_layout(&[], &BTreeMap::new(), Sharding::Single, alignment),
            Error::DataAlignment { .. },
            format!("{alignment} bytes"),
            "multiple of 8",
        );
    }
    for alignment in [1 << 30, u64::MAX - 7] {
        assert_refused!(
            safetensors_layout(&[], &BTreeMap::new(), Sharding::Single, alignment),
            Error::LayoutHeaderTooLarge { .. },
            "model.safetensors",
            "100000000",
            "align",
        );
    }
}
