//! A converted checkpoint holds the same tensors, and a conversion that fails leaves nothing behind.

// Outside test functions the lint asks for more, but a test helper fails its test just so.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use tensora_convert::{
    Checksums, Companions, ConversionNote, ConvertOptions, Digest, Error, Overwrite, SIDECAR_NAME,
    StoredTensor, Unfinished, Verify, content_digest,
};
use tensora_formats::{CheckpointIndex, DamagedTensors, Dtype, Format, Note, OpenOptions};
use tensora_io::{CancelToken, Control, SourceFile};

const DIALECTS: [Format; 2] = [Format::ServerlessLlmStore, Format::ServerlessLlmPartitioned];

#[derive(Clone, Debug)]
struct Tensor {
    name: String,
    dtype: Dtype,
    shape: Vec<u64>,
    data: Vec<u8>,
}

impl Tensor {
    fn new(name: &str, dtype: Dtype, shape: &[u64], seed: u64) -> Self {
        let bytes = dtype.bytes_for(shape.iter().product()).unwrap();
        let data = (0..bytes)
            .map(|i| (i.wrapping_mul(0x9e37_79b9).wrapping_add(seed * 31) >> 7).to_le_bytes()[0])
            .collect();
        Self {
            name: name.to_owned(),
            dtype,
            shape: shape.to_owned(),
            data,
        }
    }
}

/// A few tensors of all kinds: odd sizes, a scalar, an empty one, one of several megabytes.
fn tensors() -> Vec<Tensor> {
    vec![
        Tensor::new("model.embed_tokens.weight", Dtype::BF16, &[1000, 1501], 1),
        Tensor::new("model.norm.weight", Dtype::BF16, &[5], 2),
        Tensor::new("bias", Dtype::U8, &[3], 3),
        Tensor::new("mask", Dtype::Bool, &[7, 1], 4),
        Tensor::new("scale", Dtype::F32, &[], 5),
        Tensor::new("empty", Dtype::I64, &[0, 4], 6),
        Tensor::new("wide", Dtype::F64, &[300, 7], 7),
        Tensor::new("float8", Dtype::F8E4M3, &[13, 11], 8),
    ]
}

/// Writes with the reference implementation.
fn write_shard(path: &Path, tensors: &[Tensor], metadata: Option<HashMap<String, String>>) {
    let views = tensors.iter().map(|tensor| {
        let dtype: safetensors::Dtype = serde_json::from_value(tensor.dtype.name().into()).unwrap();
        let shape = tensor
            .shape
            .iter()
            .map(|&dimension| usize::try_from(dimension).unwrap())
            .collect();
        let view = safetensors::tensor::TensorView::new(dtype, shape, &tensor.data).unwrap();
        (tensor.name.clone(), view)
    });
    safetensors::serialize_to_file(views, metadata, path).unwrap();
}

/// Writes the tensors as `shards` files with an index, or as one file without.
fn write_source(directory: &Path, tensors: &[Tensor], shards: usize) -> CheckpointIndex {
    fs::create_dir_all(directory).unwrap();
    if shards == 1 {
        write_shard(&directory.join("model.safetensors"), tensors, None);
    } else {
        let mut weight_map = BTreeMap::new();
        for (number, shard) in tensors.chunks(tensors.len().div_ceil(shards)).enumerate() {
            let name = format!("model-{number}.safetensors");
            write_shard(&directory.join(&name), shard, None);
            weight_map.extend(shard.iter().map(|tensor| (&tensor.name, name.clone())));
        }
        let index = serde_json::json!({"metadata": {}, "weight_map": weight_map});
        fs::write(
            directory.join("model.safetensors.index.json"),
            index.to_string(),
        )
        .unwrap();
    }
    CheckpointIndex::open(directory).unwrap()
}

/// The tensors of a checkpoint as `tensora-formats` finds them.
fn read_back(index: &CheckpointIndex) -> Vec<Tensor> {
    let files: Vec<Vec<u8>> = index
        .files()
        .iter()
        .map(|file| fs::read(&file.path).unwrap())
        .collect();
    index
        .tensors()
        .iter()
        .map(|tensor| {
            assert!(tensor.is_contiguous(), "{}", tensor.name);
            let range = tensor.range();
            let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
            Tensor {
                name: tensor.name.clone(),
                dtype: tensor.dtype,
                shape: tensor.shape.clone(),
                data: files[tensor.file][range].to_vec(),
            }
        })
        .collect()
}

fn digest(tensors: &[Tensor]) -> Digest {
    let stored = tensors.iter().map(|tensor| StoredTensor {
        name: &tensor.name,
        dtype: tensor.dtype,
        shape: &tensor.shape,
        strides: None,
        bytes: &tensor.data,
    });
    content_digest(stored, NonZero::<usize>::MIN, &Control::new()).unwrap()
}

/// A reader of the store dialect that shares nothing with the one under test.
fn read_store(directory: &Path) -> BTreeMap<String, (String, Vec<u64>, Vec<u8>)> {
    let index = fs::read(directory.join("tensor_index.json")).unwrap();
    type Entry = (u64, u64, Vec<u64>, Vec<u64>, String);
    let index: BTreeMap<String, Entry> = serde_json::from_slice(&index).unwrap();
    let partitions: Vec<Vec<u8>> = (0..)
        .map_while(|number| fs::read(directory.join(format!("tensor.data_{number}"))).ok())
        .collect();
    let mut tensors = BTreeMap::new();
    for (name, (offset, size, shape, strides, dtype)) in index {
        assert_eq!(offset % 8, 0, "{name}");
        let mut packed: Vec<u64> = Vec::new();
        for dimension in 0..shape.len() {
            packed.push(
                shape[dimension + 1..]
                    .iter()
                    .map(|&count| count.max(1))
                    .product(),
            );
        }
        assert_eq!(strides, packed, "{name}");
        let mut partition_start = 0;
        for partition in &partitions {
            let partition_end = partition_start + partition.len() as u64;
            if (partition_start..partition_end).contains(&offset) {
                let begin = usize::try_from(offset - partition_start).unwrap();
                let data = partition[begin..][..usize::try_from(size).unwrap()].to_vec();
                tensors.insert(name.clone(), (dtype.clone(), shape.clone(), data));
            }
            partition_start = partition_end;
        }
        if size == 0 {
            tensors.insert(name, (dtype, shape, Vec::new()));
        }
    }
    tensors
}

fn torch_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::BF16 => "torch.bfloat16",
        Dtype::U8 => "torch.uint8",
        Dtype::Bool => "torch.bool",
        Dtype::F32 => "torch.float32",
        Dtype::I64 => "torch.int64",
        Dtype::F64 => "torch.float64",
        Dtype::F8E4M3 => "torch.float8_e4m3fn",
        other => unreachable!("{other} is not in these tests"),
    }
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn both_dialects_hold_the_same_tensors() {
    let directory = tempfile::tempdir().unwrap();
    let tensors = tensors();
    for shards in [1, 3] {
        let source = write_source(
            &directory.path().join(format!("source-{shards}")),
            &tensors,
            shards,
        );
        for format in DIALECTS {
            let target = directory.path().join(format!("{format}-{shards}"));
            let progress = Arc::new(AtomicU64::new(0));
            let counter = Arc::clone(&progress);
            let control = Control::new().with_progress(move |bytes| {
                counter.fetch_add(bytes, Ordering::Relaxed);
            });
            let plan = ConvertOptions::new(format).plan(&source, &target).unwrap();
            assert!(!target.exists(), "planning writes nothing");
            let report = plan.run(&control).unwrap();

            let converted = CheckpointIndex::open(&target).unwrap();
            assert_eq!(converted.format(), format);
            let found = read_back(&converted);
            assert_eq!(found.len(), tensors.len());
            for expected in &tensors {
                let found = found
                    .iter()
                    .find(|found| found.name == expected.name)
                    .unwrap();
                assert_eq!(
                    (found.dtype, &found.shape),
                    (expected.dtype, &expected.shape)
                );
                assert!(found.data == expected.data, "{}", expected.name);
            }
            assert_eq!(digest(&found), digest(&tensors));

            let data_bytes: usize = tensors.iter().map(|tensor| tensor.data.len()).sum();
            assert_eq!(report.data_bytes, data_bytes as u64);
            assert_eq!(progress.load(Ordering::Relaxed), report.data_bytes);
            assert_eq!(names(&target), ["tensor.data_0", "tensor_index.json"]);
            let on_disk: u64 = names(&target)
                .iter()
                .map(|name| fs::metadata(target.join(name)).unwrap().len())
                .sum();
            assert_eq!(report.target_bytes, on_disk);
            assert_eq!(report.target_bytes, plan.target_bytes());
            assert_eq!((report.files, report.tensors), (2, tensors.len()));
            let index_bytes = plan.files().last().unwrap().bytes;
            assert_eq!(
                plan.padding_bytes(),
                on_disk - index_bytes - report.data_bytes
            );
        }
    }
}

#[test]
fn an_independent_reader_finds_the_store_dialect_as_its_own_writer_leaves_it() {
    let directory = tempfile::tempdir().unwrap();
    let tensors = tensors();
    let source = write_source(&directory.path().join("source"), &tensors, 2);
    let target = directory.path().join("deep/below/target");
    ConvertOptions::new(Format::ServerlessLlmStore)
        .partition_bytes(NonZero::new(4096).unwrap())
        .plan(&source, &target)
        .unwrap()
        .run(&Control::new())
        .unwrap();
    let found = read_store(&target);
    assert_eq!(found.len(), tensors.len());
    for tensor in &tensors {
        let (dtype, shape, data) = &found[&tensor.name];
        assert_eq!(dtype, torch_name(tensor.dtype));
        assert_eq!(shape, &tensor.shape);
        assert!(data == &tensor.data, "{}", tensor.name);
    }
    // The two larger tensors exceed a partition and each get one of their own.
    let sizes: Vec<u64> = (0..)
        .map_while(|number| fs::metadata(target.join(format!("tensor.data_{number}"))).ok())
        .map(|metadata| metadata.len())
        .collect();
    assert!(sizes.len() >= 3, "{sizes:?}");
    assert!(sizes.iter().all(|bytes| bytes % 8 == 0), "{sizes:?}");
    assert_eq!(sizes.iter().filter(|&&bytes| bytes > 4096).count(), 2);
}

#[test]
fn memory_does_not_grow_with_tensors() {
    let directory = tempfile::tempdir().unwrap();
    let tensors = [
        Tensor::new("odd", Dtype::U8, &[4097], 1),
        Tensor::new("large", Dtype::F32, &[3, 1 << 20], 2),
        Tensor::new("also", Dtype::U8, &[(1 << 20) + 3], 3),
    ];
    let source = write_source(&directory.path().join("source"), &tensors, 2);
    for format in DIALECTS {
        // Out of the page cache where the system allows it, so that direct reads have a part in this.
        for file in source.files() {
            fs::File::options()
                .write(true)
                .open(&file.path)
                .and_then(|file| file.sync_all())
                .unwrap();
            let _ = SourceFile::open(&file.path).unwrap().evict();
        }
        let target = directory.path().join(format.as_str());
        let limit = ConvertOptions::MIN_MEMORY_LIMIT_BYTES;
        let report = ConvertOptions::new(format)
            .memory_limit_bytes(limit)
            .plan(&source, &target)
            .unwrap()
            .run(&Control::new())
            .unwrap();
        assert!(report.buffer_bytes <= limit, "{}", report.buffer_bytes);
        let found = read_back(&CheckpointIndex::open(&target).unwrap());
        assert_eq!(digest(&found), digest(&tensors));
    }
}

#[test]
fn partitions_are_as_many_as_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let tensors = tensors();
    let source = write_source(&directory.path().join("source"), &tensors, 1);
    let target = directory.path().join("target");
    let report = ConvertOptions::new(Format::ServerlessLlmPartitioned)
        .partitions(NonZero::new(3).unwrap())
        .plan(&source, &target)
        .unwrap()
        .run(&Control::new())
        .unwrap();
    assert_eq!(report.files, 4);
    let converted = CheckpointIndex::open(&target).unwrap();
    assert_eq!(converted.files().len(), 3);
    assert_eq!(digest(&read_back(&converted)), digest(&tensors));
}

#[test]
fn a_checkpoint_without_tensors_converts() {
    let directory = tempfile::tempdir().unwrap();
    let source = write_source(&directory.path().join("source"), &[], 1);
    for format in DIALECTS {
        let target = directory.path().join(format.as_str());
        let report = ConvertOptions::new(format)
            .plan(&source, &target)
            .unwrap()
            .run(&Control::new())
            .unwrap();
        assert_eq!((report.tensors, report.data_bytes), (0, 0));
        assert!(CheckpointIndex::open(&target).unwrap().tensors().is_empty());
    }
}

#[test]
fn metadata_is_not_lost_in_silence() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    write_shard(&path, &tensors()[1..3], Some(metadata));
    let source = CheckpointIndex::open(&path).unwrap();
    let plan = ConvertOptions::new(Format::ServerlessLlmStore)
        .plan(&source, directory.path().join("target"))
        .unwrap();
    let expected = ConversionNote::MetadataDropped {
        target: Format::ServerlessLlmStore,
        metadata: BTreeMap::from([("format".to_owned(), "pt".to_owned())]),
    };
    assert_eq!(plan.notes(), std::slice::from_ref(&expected));
    assert_eq!(
        expected.to_string(),
        "__metadata__ dropped, serverlessllm-store has no place for it: \"format\": \"pt\""
    );
    let report = plan.run(&Control::new()).unwrap();
    assert!(report.notes.contains(&expected), "{:?}", report.notes);
}

/// The notes of a conversion to SafeTensors that come from the source's index.
fn source_notes(source: &CheckpointIndex, target: &Path) -> Vec<Note> {
    let plan = ConvertOptions::new(Format::Safetensors)
        .plan(source, target)
        .unwrap();
    let report = plan.run(&Control::new()).unwrap();
    let of_source = |notes: &[ConversionNote]| {
        let of_source = notes.iter().filter_map(|note| match note {
            ConversionNote::Source(note) => Some(note.clone()),
            _ => None,
        });
        of_source.collect::<Vec<_>>()
    };
    let notes = of_source(plan.notes());
    assert_eq!(of_source(&report.notes), notes);
    notes
}

#[test]
fn what_the_source_lacks_or_leaves_out_is_told_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);

    // Two shards that contradict each other, and a file that is no part of them.
    let source = path("sharded");
    write_source(&source, &tensors(), 2);
    let format = |value: &str| Some(HashMap::from([("format".to_owned(), value.to_owned())]));
    write_shard(
        &source.join("model-0.safetensors"),
        &tensors()[..4],
        format("pt"),
    );
    write_shard(
        &source.join("model-1.safetensors"),
        &tensors()[4..],
        format("np"),
    );
    let whole = source.join("consolidated.safetensors");
    write_shard(&whole, &tensors(), None);
    let index = CheckpointIndex::open(&source).unwrap();
    let notes = source_notes(&index, &path("sharded-target"));
    let [
        Note::MetadataConflict { kept, dropped, .. },
        Note::FilesLeftAlone { files },
    ] = &notes[..]
    else {
        panic!("{notes:?}");
    };
    assert_eq!(files, &["consolidated.safetensors"]);
    assert_eq!((&**kept, &**dropped), ("pt", "np"));
    let shown = ConversionNote::Source(notes[0].clone()).to_string();
    for part in ["source", "__metadata__", "\"format\"", "dropped \"np\""] {
        assert!(shown.contains(part), "{part}: {shown}");
    }

    // Tensors that the index does not list.
    let listed = fs::read(source.join("model.safetensors.index.json")).unwrap();
    let mut listed: serde_json::Value = serde_json::from_slice(&listed).unwrap();
    listed["weight_map"].as_object_mut().unwrap().remove("mask");
    fs::write(
        source.join("model.safetensors.index.json"),
        listed.to_string(),
    )
    .unwrap();
    let index = OpenOptions::new()
        .unlisted_tensors(tensora_formats::UnlistedTensors::Ignore)
        .open(&source)
        .unwrap();
    let notes = source_notes(&index, &path("ignoring-target"));
    let ignored =
        |note: &Note| matches!(note, Note::TensorsIgnored { tensors } if tensors == &["mask"]);
    assert!(notes.iter().any(ignored), "{notes:?}");

    // A partition that goes on behind its last tensor, and one that ends before it.
    let source = path("store");
    let store = ConvertOptions::new(Format::ServerlessLlmStore);
    let plain = write_source(&path("plain"), &tensors(), 1);
    store
        .plan(&plain, &source)
        .unwrap()
        .run(&Control::new())
        .unwrap();
    let partition = fs::File::options()
        .write(true)
        .open(source.join("tensor.data_0"))
        .unwrap();
    let bytes = partition.metadata().unwrap().len();
    partition.set_len(bytes + 4096).unwrap();
    let index = CheckpointIndex::open(&source).unwrap();
    let notes = source_notes(&index, &path("tail-target"));
    assert!(matches!(&notes[..], [Note::UnusedTail { .. }]), "{notes:?}");
    partition.set_len(bytes - 8).unwrap();
    let index = OpenOptions::new()
        .damaged_tensors(DamagedTensors::LeaveOut)
        .open(&source)
        .unwrap();
    let notes = source_notes(&index, &path("damaged-target"));
    assert!(matches!(&notes[..], [Note::Damaged { .. }]), "{notes:?}");
}

/// What becomes of strides and shared bytes is told by the conversion; that they are there is not told as well.
#[test]
fn what_the_conversion_tells_itself_is_not_told_twice() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source");
    let records = [
        common::Record::strided("transposed", Dtype::F16, &[6, 8], &[1, 6], 0, 1),
        common::Record::plain("head", Dtype::F16, &[6, 8], 2).tied("embed"),
    ];
    common::write(&source, &records, Format::ServerlessLlmStore, 1);
    let source = CheckpointIndex::open(&source).unwrap();
    assert_eq!(source.notes().len(), 2, "{:?}", source.notes());
    let plan = |format| {
        ConvertOptions::new(format)
            .shared_tensors(tensora_convert::SharedTensors::Duplicate)
            .plan(&source, directory.path().join("target"))
            .unwrap()
    };
    let notes = plan(Format::Safetensors).notes().to_owned();
    assert!(
        matches!(
            &notes[..],
            [
                ConversionNote::Duplicated { .. },
                ConversionNote::StridesDropped { .. }
            ]
        ),
        "{notes:?}"
    );
    // Nothing is lost there.
    assert_eq!(plan(Format::ServerlessLlmPartitioned).notes(), []);
}

#[test]
fn what_is_never_copied_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source");
    write_source(&source, &tensors()[1..3], 1);
    for name in ["1_Pooling", "onnx", ".cache", "rank_0"] {
        fs::create_dir(source.join(name)).unwrap();
    }
    fs::write(source.join("1_Pooling/config.json"), "{}").unwrap();
    fs::write(source.join("config.json"), "{}").unwrap();
    fs::write(source.join(SIDECAR_NAME), "of the source").unwrap();
    // It is no more left behind than the target of another run is.
    let target = source.join("converted/deep");
    fs::create_dir_all(&target).unwrap();
    let source = CheckpointIndex::open(source.join("model.safetensors")).unwrap();
    let options = ConvertOptions::new(Format::ServerlessLlmStore);
    let directories = ConversionNote::DirectoriesLeft {
        directories: vec!["1_Pooling".to_owned(), "onnx".to_owned()],
    };
    for companions in [Companions::Leave, Companions::Copy] {
        let options = options.clone().companions(companions);
        let plan = options.plan(&source, &target).unwrap();
        for note in [&directories, &ConversionNote::ChecksumsLeft] {
            assert!(plan.notes().contains(note), "{:?}", plan.notes());
        }
        // The target has checksums of its own then.
        let plan = options.checksums(Checksums::Write).plan(&source, &target);
        let notes = plan.unwrap().notes().to_owned();
        assert!(notes.contains(&directories), "{notes:?}");
        assert!(!notes.contains(&ConversionNote::ChecksumsLeft), "{notes:?}");
    }
}

#[test]
fn a_plan_names_the_files_that_it_replaces() {
    let directory = tempfile::tempdir().unwrap();
    let source = write_source(&directory.path().join("source"), &tensors(), 1);
    let target = directory.path().join("target");
    let options = ConvertOptions::new(Format::ServerlessLlmStore)
        .partition_bytes(NonZero::new(64).unwrap())
        .checksums(Checksums::Write);
    let first = options.plan(&source, &target).unwrap();
    assert!(first.replaced_files().unwrap().is_empty());
    first.run(&Control::new()).unwrap();
    fs::write(target.join("config.json"), "{}").unwrap();
    let mut old = names(&target);
    old.retain(|name| name != "config.json");
    assert!(old.len() > 4, "{old:?}");

    let plan = ConvertOptions::new(Format::ServerlessLlmStore)
        .overwrite(Overwrite::Replace)
        .plan(&source, &target)
        .unwrap();
    let replaced = plan.replaced_files().unwrap();
    let old: Vec<PathBuf> = old.into_iter().map(PathBuf::from).collect();
    assert_eq!(replaced, old);
    plan.run(&Control::new()).unwrap();
    // One of the old names has new content, and the others are gone.
    assert_eq!(
        names(&target),
        ["config.json", "tensor.data_0", "tensor_index.json"]
    );
}

#[test]
fn more_windows_than_can_be_listed_are_refused_before_anything_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source");
    // One byte, and a terabyte of it.
    let expanded = common::Record::strided("expanded", Dtype::U8, &[1 << 40], &[0], 0, 1);
    common::write(&source, &[expanded], Format::ServerlessLlmStore, 1);
    let source = CheckpointIndex::open(&source).unwrap();
    let target = directory.path().join("target");
    let options = |format| {
        ConvertOptions::new(format).memory_limit_bytes(ConvertOptions::MIN_MEMORY_LIMIT_BYTES)
    };
    let store = options(Format::ServerlessLlmStore);
    for options in [
        options(Format::Safetensors),
        store.clone().verify(Verify::ReadBack),
        store.clone().checksums(Checksums::Write),
    ] {
        let error = refused(&options, &source, &target);
        assert!(
            matches!(error, Error::TooManyWindows { bytes, .. } if bytes >= 1 << 40),
            "{error}"
        );
    }
    assert!(!target.exists());
    // Copied as it is stored, it takes a byte.
    let plan = store.plan(&source, &target).unwrap();
    plan.run(&Control::new()).unwrap();
}

/// Plans into `target`, which must be refused, and must stay as it is.
fn refused(options: &ConvertOptions, source: &CheckpointIndex, target: &Path) -> Error {
    let before = target.is_dir().then(|| names(target));
    let error = options.plan(source, target).unwrap_err();
    assert_eq!(target.is_dir().then(|| names(target)), before);
    error
}

#[test]
fn what_cannot_be_asked_for_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let source = write_source(&directory.path().join("source"), &tensors(), 1);
    let target = directory.path().join("target");
    let store = ConvertOptions::new(Format::ServerlessLlmStore);
    let partitioned = ConvertOptions::new(Format::ServerlessLlmPartitioned);

    let one = NonZero::<u32>::MIN;
    let error = refused(&store.clone().partitions(one), &source, &target);
    assert!(error.to_string().contains("set partition_bytes"), "{error}");
    let error = refused(&partitioned.clone().shards(one), &source, &target);
    assert!(error.to_string().contains("set partitions"), "{error}");
    let both = partitioned.partitions(one).partition_bytes(one.into());
    let error = refused(&both, &source, &target);
    assert!(matches!(error, Error::OptionsContradict { .. }), "{error}");
    let error = refused(&store.clone().memory_limit_bytes(4096), &source, &target);
    assert!(
        matches!(
            error,
            Error::MemoryLimit {
                limit_bytes: 4096,
                ..
            }
        ),
        "{error}"
    );

    let unsupported = [Tensor::new("counts", Dtype::U32, &[2], 1)];
    let source = write_source(&directory.path().join("u32"), &unsupported, 1);
    let error = refused(&store, &source, &target);
    let text = error.to_string();
    assert!(matches!(error, Error::Layout(_)), "{text}");
    for part in ["counts", "U32", "serverlessllm-store"] {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn a_target_that_is_no_free_directory_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let source_directory = directory.path().join("source");
    let source = write_source(&source_directory, &tensors(), 1);
    let options = ConvertOptions::new(Format::ServerlessLlmStore).overwrite(Overwrite::Replace);

    let error = refused(&options, &source, &source_directory);
    assert!(matches!(error, Error::TargetIsSource { .. }), "{error}");
    let around = source_directory.join("../source/.");
    let error = refused(&options, &source, &around);
    assert!(matches!(error, Error::TargetIsSource { .. }), "{error}");

    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    for target in [file.clone(), file.join("below")] {
        let error = refused(&options, &source, &target);
        assert!(
            matches!(&error, Error::NotADirectory { path } if *path == file),
            "{error}"
        );
    }

    for name in ["other.safetensors", "x.safetensors.index.json", "rank_0"] {
        let target = directory.path().join(format!("holds-{name}"));
        fs::create_dir(&target).unwrap();
        fs::write(target.join(name), "").unwrap();
        let error = refused(&options, &source, &target);
        assert!(
            matches!(&error, Error::OtherCheckpoint { files, .. } if files == &[name]),
            "{error}"
        );
    }

    // What another conversion left is neither taken for granted nor thrown away.
    let target = directory.path().join("interrupted");
    let plan = options.plan(&source, &target).unwrap();
    let staging = target.join(".tensora-convert");
    fs::create_dir_all(&staging).unwrap();
    fs::write(staging.join("tensor.data_0"), "somebody else's").unwrap();
    for error in [
        refused(&options, &source, &target),
        plan.run(&Control::new()).unwrap_err(),
    ] {
        assert!(
            matches!(&error, Error::Interrupted { path, files: 0 } if *path == staging),
            "{error}"
        );
    }
    assert_eq!(
        fs::read_to_string(staging.join("tensor.data_0")).unwrap(),
        "somebody else's"
    );
}

#[cfg(unix)]
#[test]
fn the_source_is_recognised_through_symbolic_links() {
    let directory = tempfile::tempdir().unwrap();
    let blobs = directory.path().join("blobs");
    write_source(&blobs, &tensors(), 1);
    let snapshot = directory.path().join("snapshot");
    fs::create_dir(&snapshot).unwrap();
    std::os::unix::fs::symlink(
        blobs.join("model.safetensors"),
        snapshot.join("model.safetensors"),
    )
    .unwrap();
    let source = CheckpointIndex::open(&snapshot).unwrap();
    let options = ConvertOptions::new(Format::ServerlessLlmStore);
    for target in [&snapshot, &blobs] {
        let error = refused(&options, &source, target);
        assert!(matches!(error, Error::TargetIsSource { .. }), "{error}");
    }
}

/// Runs a test of this program once more, as a user without special rights.
#[cfg(unix)]
fn as_another_user(test: &str) {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    use std::process::Command;
    const IS_ANOTHER: &str = "TENSORA_TEST_IS_ANOTHER_USER";

    if std::env::var_os(IS_ANOTHER).is_some() {
        return common::skip(&format!("{test}: any user may write to any directory"));
    }
    let room = tempfile::tempdir().unwrap();
    fs::set_permissions(room.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let user = 20_000 + std::process::id() % 40_000;
    let run = |program: &Path, arguments: &[&str]| {
        Command::new(program)
            .args(arguments)
            .env(IS_ANOTHER, "")
            .env("TMPDIR", room.path())
            .uid(user)
            .gid(user)
            .output()
    };
    let program = std::env::current_exe().unwrap();
    for can_run in [
        run(Path::new("test"), &["-w", room.path().to_str().unwrap()]),
        run(&program, &["--list"]),
    ] {
        let problem = match can_run {
            Ok(output) if output.status.success() => continue,
            Ok(output) => output.status.to_string(),
            Err(error) => error.to_string(),
        };
        return common::skip(&format!("{test}: not to be run as another user: {problem}"));
    }
    let output = run(&program, &["--exact", test, "--nocapture"]).unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[cfg(unix)]
#[test]
fn a_directory_without_permission_is_refused_before_anything_is_read() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let source = write_source(&directory.path().join("source"), &tensors(), 1);
    let locked = directory.path().join("locked");
    fs::create_dir(&locked).unwrap();
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o555)).unwrap();
    if fs::write(locked.join("probe"), "").is_ok() {
        // Permissions do not bind root.
        return as_another_user(
            "a_directory_without_permission_is_refused_before_anything_is_read",
        );
    }
    let error = refused(
        &ConvertOptions::new(Format::ServerlessLlmStore),
        &source,
        &locked.join("target"),
    );
    assert!(matches!(error, Error::Target { .. }), "{error}");
}

#[test]
fn a_checkpoint_larger_than_the_free_space_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    // Twelve tebibytes of hole: more than is free wherever this runs, below what ext4 allows.
    let bytes = 12u64 << 40;
    let header =
        format!(r#"{{"a":{{"dtype":"U8","shape":[{bytes}],"data_offsets":[0,{bytes}]}}}}"#);
    let mut start = (header.len() as u64).to_le_bytes().to_vec();
    start.extend(header.as_bytes());
    fs::write(&path, &start).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    if let Err(error) = file.set_len(start.len() as u64 + bytes) {
        return common::skip(&format!("no sparse file of 12 TiB here: {error}"));
    }
    let source = CheckpointIndex::open(&path).unwrap();
    let target = directory.path().join("target");
    match ConvertOptions::new(Format::ServerlessLlmStore).plan(&source, &target) {
        Err(Error::NotEnoughSpace {
            needed_bytes,
            free_bytes,
            ..
        }) => assert!(needed_bytes > bytes && free_bytes < needed_bytes),
        Ok(plan) => {
            let free_bytes = plan.free_bytes();
            assert!(free_bytes.is_none_or(|free| free > bytes), "{free_bytes:?}");
            common::skip(&format!(
                "too little space: {free_bytes:?} bytes are free here"
            ));
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn an_existing_checkpoint_is_refused_or_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let tensors = tensors();
    let old = write_source(&directory.path().join("old"), &tensors, 1);
    let new = write_source(&directory.path().join("new"), &tensors[1..4], 1);
    let target = directory.path().join("target");
    let options =
        ConvertOptions::new(Format::ServerlessLlmStore).partition_bytes(NonZero::new(64).unwrap());
    options
        .plan(&old, &target)
        .unwrap()
        .run(&Control::new())
        .unwrap();
    assert!(target.join("tensor.data_3").exists());
    fs::write(target.join("config.json"), "{}").unwrap();

    let error = refused(&options, &new, &target);
    let text = error.to_string();
    assert!(matches!(error, Error::TargetOccupied { .. }), "{text}");
    assert!(text.contains("tensor.data_0"), "{text}");

    let replace = options.clone().overwrite(Overwrite::Replace);
    let plan = replace.plan(&new, &target).unwrap();
    // A replacement that is cancelled leaves the old checkpoint as it was.
    let token = CancelToken::new();
    let in_callback = token.clone();
    let control = Control::new()
        .with_cancel(token)
        .with_progress(move |_| in_callback.cancel());
    let before = names(&target);
    assert!(plan.run(&control).unwrap_err().is_cancelled());
    assert_eq!(names(&target), before);
    let kept = CheckpointIndex::open(&target).unwrap();
    assert_eq!(digest(&read_back(&kept)), digest(&tensors));

    plan.run(&Control::new()).unwrap();
    assert_eq!(
        names(&target),
        ["config.json", "tensor.data_0", "tensor_index.json"]
    );
    let replaced = CheckpointIndex::open(&target).unwrap();
    assert_eq!(digest(&read_back(&replaced)), digest(&tensors[1..4]));
}

#[test]
fn a_cancelled_conversion_leaves_what_can_be_resumed_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let tensors = [
        Tensor::new("a", Dtype::U8, &[6 << 20], 1),
        Tensor::new("b", Dtype::U8, &[6 << 20], 2),
    ];
    let source = write_source(&directory.path().join("source"), &tensors, 1);
    let existing = directory.path().join("existing");
    fs::create_dir_all(&existing).unwrap();
    let missing = directory.path().join("missing/below");
    // Anywhere on the way: in the first window, in a later one, in a later partition.
    for (after_bytes, target) in [1, 3 << 20, 7 << 20, 12 << 20]
        .into_iter()
        .flat_map(|bytes| [(bytes, &existing), (bytes, &missing)])
    {
        let token = CancelToken::new();
        let in_callback = token.clone();
        let read = AtomicU64::new(0);
        let control = Control::new()
            .with_cancel(token)
            .with_progress(move |bytes| {
                if read.fetch_add(bytes, Ordering::Relaxed) + bytes >= after_bytes {
                    in_callback.cancel();
                }
            });
        let options = ConvertOptions::new(Format::ServerlessLlmStore)
            .memory_limit_bytes(2 << 20)
            .partition_bytes(NonZero::new(1 << 20).unwrap());
        let plan = options.plan(&source, target).unwrap();
        let error = plan.run(&control).unwrap_err();
        assert!(error.is_cancelled(), "{error}");
        let kept = plan.kept().unwrap();
        if kept.files == 0 {
            assert!(!target.is_dir() || names(target).is_empty());
        } else {
            assert_eq!(names(target), [".tensora-convert"]);
            assert!(after_bytes > 6 << 20, "the first file was not complete");
        }
        CheckpointIndex::open(target).unwrap_err();

        let report = options
            .unfinished(Unfinished::Resume)
            .plan(&source, target)
            .unwrap()
            .run(&Control::new())
            .unwrap();
        assert_eq!(
            (report.resumed_files, report.resumed_bytes),
            (kept.files, kept.bytes)
        );
        let converted = CheckpointIndex::open(target).unwrap();
        assert_eq!(digest(&read_back(&converted)), digest(&tensors));
        fs::remove_dir_all(target).unwrap();
        if target == &existing {
            fs::create_dir(target).unwrap();
        }
    }
}

#[test]
fn a_panic_of_the_callback_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let source = write_source(&directory.path().join("source"), &tensors(), 1);
    let target = directory.path().join("target");
    let plan = ConvertOptions::new(Format::ServerlessLlmStore)
        .plan(&source, &target)
        .unwrap();
    let control = Control::new().with_progress(|_| panic!("of the callback"));
    let run = std::panic::AssertUnwindSafe(|| plan.run(&control));
    assert!(std::panic::catch_unwind(run).is_err());
    assert!(!target.exists());
}

#[test]
fn a_source_that_changes_is_an_error_and_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let source_directory = directory.path().join("source");
    let source = write_source(&source_directory, &tensors(), 1);
    let path = source_directory.join("model.safetensors");
    let length = fs::metadata(&path).unwrap().len();
    let target = directory.path().join("target");
    let plan = ConvertOptions::new(Format::ServerlessLlmStore)
        .plan(&source, &target)
        .unwrap();

    let set_length = |bytes| {
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(bytes).unwrap();
    };
    set_length(length - 1);
    let error = plan.run(&Control::new()).unwrap_err();
    assert!(
        matches!(&error, Error::SourceChanged { how, .. }
            if how.contains(&length.to_string()) && how.contains(&(length - 1).to_string())),
        "{error}"
    );
    assert!(!target.exists());

    // As long as it was, but nobody knows what is in it.
    set_length(length);
    let error = plan.run(&Control::new()).unwrap_err();
    assert!(error.to_string().contains("written to"), "{error}");
    assert!(!target.exists());

    // Changed while it is read: seen at the end at the latest.
    let source = CheckpointIndex::open(&source_directory).unwrap();
    let plan = ConvertOptions::new(Format::ServerlessLlmStore)
        .plan(&source, &target)
        .unwrap();
    let growing = path.clone();
    let control = Control::new().with_progress(move |_| {
        let file = fs::OpenOptions::new().write(true).open(&growing).unwrap();
        file.set_len(length + 1).unwrap();
    });
    let error = plan.run(&control).unwrap_err();
    assert!(
        matches!(&error, Error::SourceChanged { how, .. } if how.contains(&(length + 1).to_string())),
        "{error}"
    );
    assert!(!target.exists());

    fs::remove_file(&path).unwrap();
    let error = plan.run(&Control::new()).unwrap_err();
    assert!(matches!(error, Error::Read(_)), "{error}");
    assert!(error.to_string().contains("model.safetensors"), "{error}");
}

#[test]
fn a_checkpoint_that_appears_meanwhile_is_not_overwritten() {
    let directory = tempfile::tempdir().unwrap();
    let source = write_source(&directory.path().join("source"), &tensors(), 1);
    let target = directory.path().join("target");
    let plan = ConvertOptions::new(Format::ServerlessLlmStore)
        .plan(&source, &target)
        .unwrap();
    let appearing = target.join("tensor_index.json");
    let in_callback = appearing.clone();
    let control = Control::new().with_progress(move |_| {
        fs::write(&in_callback, "somebody else's").unwrap();
    });
    let error = plan.run(&control).unwrap_err();
    assert!(matches!(error, Error::TargetOccupied { .. }), "{error}");
    assert_eq!(fs::read_to_string(&appearing).unwrap(), "somebody else's");
    // What was converted is there to be resumed.
    assert_eq!(names(&target), [".tensora-convert", "tensor_index.json"]);
    assert_eq!(plan.kept().unwrap().files, 1);
}

#[cfg(unix)]
#[test]
fn files_have_the_mode_of_any_new_file() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let source = write_source(&directory.path().join("source"), &tensors()[1..3], 1);
    let target = directory.path().join("target");
    ConvertOptions::new(Format::ServerlessLlmStore)
        .plan(&source, &target)
        .unwrap()
        .run(&Control::new())
        .unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
    let ordinary = directory.path().join("ordinary");
    fs::write(&ordinary, "").unwrap();
    for name in names(&target) {
        assert_eq!(mode(&target.join(&name)), mode(&ordinary), "{name}");
    }
}

proptest! {
    // Each case syncs files.
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_checkpoint_survives(
        entries in prop::collection::btree_map(
            "[a-z./]{1,8}",
            (
                prop::sample::select(vec![Dtype::U8, Dtype::BF16, Dtype::F32, Dtype::I64, Dtype::F8E4M3]),
                prop::collection::vec(0u64..40, 0..3),
            ),
            1..20,
        ),
        shards in 1usize..4,
        partition_bytes in 1u64..5000,
        partitions in 1u32..6,
    ) {
        let tensors: Vec<Tensor> = entries
            .iter()
            .zip(0..)
            .map(|((name, (dtype, shape)), seed)| Tensor::new(name, *dtype, shape, seed))
            .collect();
        let directory = tempfile::tempdir().unwrap();
        let source = write_source(&directory.path().join("source"), &tensors, shards);
        let options = [
            ConvertOptions::new(Format::ServerlessLlmStore)
                .partition_bytes(NonZero::new(partition_bytes).unwrap()),
            ConvertOptions::new(Format::ServerlessLlmPartitioned)
                .partitions(NonZero::new(partitions).unwrap()),
        ];
        for (options, format) in options.iter().zip(DIALECTS) {
            let target = directory.path().join(format.as_str());
            options.plan(&source, &target).unwrap().run(&Control::new()).unwrap();
            let found = read_back(&CheckpointIndex::open(&target).unwrap());
            prop_assert_eq!(digest(&found), digest(&tensors));
            if format == Format::ServerlessLlmStore {
                let independent = read_store(&target);
                for tensor in &tensors {
                    prop_assert!(independent[&tensor.name].2 == tensor.data, "{}", tensor.name);
                }
            }
        }
    }
}
