//! Whatever a checkpoint holds, and whichever way it is converted, it stays the same checkpoint.
//!
//! Sources are written, and targets read and hashed, by code of these tests alone.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::num::NonZero;
use std::path::Path;

use common::{DTYPES, FORMATS, Found, Record, Tensors, digest, holds, rank_tensors, tensors};
use proptest::prelude::*;
use tensora_convert::{Checksums, ConversionReport, ConvertOptions, Error, SharedTensors, Verify};
use tensora_formats::{CheckpointIndex, Dtype, Format};
use tensora_io::Control;

fn convert(options: &ConvertOptions, source: &Path, target: &Path) -> ConversionReport {
    let index = CheckpointIndex::open(source).unwrap();
    let plan = options.plan(&index, target).unwrap();
    let report = plan.run(&Control::new()).unwrap();
    let leaves_work = common::names(target)
        .into_iter()
        .find(|name| name.contains(".tensora"));
    assert_eq!(leaves_work, None, "only the checkpoint is left");
    // What tensora itself makes of it.
    let reopened = CheckpointIndex::open(target).unwrap();
    assert_eq!(reopened.tensors().len(), index.tensors().len());
    report
}

/// Small limits, so that small checkpoints become several files and pass through several buffers.
fn options(format: Format, files: u32) -> ConvertOptions {
    let files = NonZero::new(files).unwrap();
    let options = ConvertOptions::new(format)
        .memory_limit_bytes(ConvertOptions::MIN_MEMORY_LIMIT_BYTES)
        .shared_tensors(SharedTensors::Duplicate);
    match format {
        Format::Safetensors => options.shards(files),
        Format::ServerlessLlmStore => options.partition_bytes(NonZero::new(4096).unwrap()),
        _ => options.partitions(files),
    }
}

/// Checks a target against the tensors that it shall hold.
fn check(target: &Path, format: Format, expected: &Tensors) -> Found {
    let found = common::read(target);
    if expected.is_empty() {
        // Without an entry, the index is the same in both dialects.
        assert_eq!(found.format.is_serverlessllm(), format.is_serverlessllm());
    } else {
        assert_eq!(found.format, format);
    }
    assert_eq!(
        found.tensors.keys().collect::<Vec<_>>(),
        expected.keys().collect::<Vec<_>>()
    );
    for (name, tensor) in expected {
        assert!(found.tensors[name] == *tensor, "{name:?} differs");
    }
    assert_eq!(digest(&found.tensors), digest(expected));
    found
}

/// From each format to each, and from there to each again.
fn all_ways(records: &[Record], files: u32) {
    let expected = tensors(records);
    let directory = tempfile::tempdir().unwrap();
    let holds_all = |format: &Format| expected.values().all(|it| holds(*format, it.dtype));
    let is_plain = |record: &Record| record.views.len() == 1 && record.views[0].strides.is_none();
    let formats: Vec<Format> = FORMATS.into_iter().filter(holds_all).collect();
    for &source_format in &formats {
        if source_format == Format::Safetensors && !records.iter().all(is_plain) {
            continue;
        }
        let source = directory.path().join(format!("{source_format}"));
        common::write(&source, records, source_format, files as usize);
        let before = common::snapshot(&source);
        let written = common::read(&source);
        for &middle_format in &formats {
            let middle = directory
                .path()
                .join(format!("{source_format}-{middle_format}"));
            convert(&options(middle_format, files), &source, &middle);
            let between = check(&middle, middle_format, &expected);
            if source_format.is_serverlessllm() && middle_format.is_serverlessllm() {
                assert_eq!(between.shared, written.shared);
                assert_eq!(between.strides, written.strides);
            }
            for &target_format in &formats {
                let target = directory.path().join("target");
                convert(&options(target_format, files + 1), &middle, &target);
                let found = check(&target, target_format, &expected);
                if middle_format.is_serverlessllm() && target_format.is_serverlessllm() {
                    assert_eq!(found.shared, between.shared);
                    assert_eq!(found.strides, between.strides);
                }
                fs::remove_dir_all(target).unwrap();
            }
        }
        assert!(
            common::snapshot(&source) == before,
            "the source was touched"
        );
    }
}

#[test]
fn every_dtype_goes_wherever_it_can() {
    for formats in [&FORMATS[..], &FORMATS[1..2], &FORMATS[2..]] {
        let mut records = Vec::new();
        for (number, &(dtype, name, ..)) in DTYPES.iter().enumerate() {
            if formats.iter().all(|&format| holds(format, dtype)) {
                // Eight elements fill whole bytes whatever the dtype.
                records.push(Record::plain(name, dtype, &[3, 8], number as u64));
                let scalar = format!("{name} scalar");
                if common::bits(dtype) >= 8 {
                    records.push(Record::plain(&scalar, dtype, &[], number as u64 + 100));
                }
                records.push(Record::plain(&format!("{name} empty"), dtype, &[0, 3], 0));
            }
        }
        all_ways(&records, 3);
    }
    // Those that only SafeTensors has.
    let records: Vec<Record> = DTYPES
        .iter()
        .map(|&(dtype, name, ..)| Record::plain(name, dtype, &[8], 7))
        .collect();
    let directory = tempfile::tempdir().unwrap();
    let (source, target) = (
        directory.path().join("source"),
        directory.path().join("target"),
    );
    common::write(&source, &records, Format::Safetensors, 2);
    convert(&options(Format::Safetensors, 3), &source, &target);
    check(&target, Format::Safetensors, &tensors(&records));
}

#[test]
fn a_dtype_that_a_format_lacks_is_refused_by_name() {
    for &(dtype, name, ..) in &DTYPES {
        for target_format in FORMATS.into_iter().filter(|&format| !holds(format, dtype)) {
            let directory = tempfile::tempdir().unwrap();
            let source = directory.path().join("source");
            let records = [Record::plain("the.weight", dtype, &[8], 1)];
            common::write(&source, &records, Format::Safetensors, 1);
            let index = CheckpointIndex::open(&source).unwrap();
            let target = directory.path().join("target");
            let error = options(target_format, 1).plan(&index, &target).unwrap_err();
            assert!(matches!(error, Error::Layout(_)), "{error}");
            let text = error.to_string();
            for part in ["the.weight", name, target_format.as_str()] {
                assert!(text.contains(part), "{part} is missing: {text}");
            }
            assert!(!target.exists());
        }
    }
}

#[test]
fn many_tiny_tensors_survive() {
    let records: Vec<Record> = (0..1500)
        .map(|number| {
            let shape = [number % 5];
            Record::plain(
                &format!("model.layers.{number}.bias"),
                Dtype::U8,
                &shape,
                number,
            )
        })
        .collect();
    all_ways(&records, 4);
}

#[test]
fn one_huge_tensor_passes_through_small_buffers() {
    // Many times the memory, of a length that no buffer divides, beside others that are not aligned.
    let records = [
        Record::plain("odd", Dtype::U8, &[4097], 1),
        Record::plain("huge", Dtype::U8, &[(9 << 20) + 13], 2),
        Record::plain("behind", Dtype::F32, &[3, 5], 3),
    ];
    let expected = tensors(&records);
    let directory = tempfile::tempdir().unwrap();
    for source_format in FORMATS {
        let source = directory.path().join(format!("{source_format}"));
        common::write(&source, &records, source_format, 1);
        for target_format in FORMATS {
            let target = directory.path().join("target");
            let limit_bytes = ConvertOptions::MIN_MEMORY_LIMIT_BYTES;
            let report = convert(&options(target_format, 2), &source, &target);
            assert!(
                report.buffer_bytes <= limit_bytes,
                "{}",
                report.buffer_bytes
            );
            check(&target, target_format, &expected);
            fs::remove_dir_all(target).unwrap();
        }
    }
}

#[test]
fn strided_and_tied_tensors_survive_small_buffers() {
    let records = [
        // Transposed, several windows long.
        Record::strided("transposed", Dtype::BF16, &[1201, 1501], &[1, 1201], 0, 1).tied("tied"),
        // Expanded: every row is the same row.
        Record::strided("expanded", Dtype::F32, &[700, 1001], &[0, 1], 0, 2),
        // Every second element of a storage that is larger than the view needs.
        Record::strided("sparse", Dtype::I16, &[30, 40], &[160, 2], 77, 3),
        Record::strided("permuted", Dtype::F64, &[7, 5, 6], &[1, 42, 7], 0, 4),
        Record::plain("embedding", Dtype::F16, &[600, 1000], 5)
            .tied("head")
            .tied("third"),
        Record::plain("scalar", Dtype::I64, &[], 6).tied("scalar too"),
    ];
    all_ways(&records, 2);
}

#[test]
fn tied_tensors_are_duplicated_only_when_that_is_asked_for() {
    let records = [
        Record::plain("embedding", Dtype::BF16, &[50, 8], 1).tied("head"),
        // Several empty tensors may be at one place and share nothing.
        Record::plain("empty", Dtype::BF16, &[0], 2),
        Record::plain("also empty", Dtype::F32, &[3, 0], 3),
    ];
    let directory = tempfile::tempdir().unwrap();
    for format in [Format::ServerlessLlmStore, Format::ServerlessLlmPartitioned] {
        let source = directory.path().join(format!("{format}"));
        common::write(&source, &records, format, 1);
        let index = CheckpointIndex::open(&source).unwrap();
        let target = directory.path().join(format!("{format}-target"));
        let error = ConvertOptions::new(Format::Safetensors)
            .plan(&index, &target)
            .unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("embedding") && text.contains("head"),
            "{text}"
        );
        assert!(!text.contains("empty"), "{text}");
        assert!(!target.exists());
        let options = ConvertOptions::new(Format::Safetensors);
        convert(
            &options.shared_tensors(SharedTensors::Duplicate),
            &source,
            &target,
        );
        check(&target, Format::Safetensors, &tensors(&records));
    }
}

/// Two ranks that hold different parts under the same names.
fn ranks() -> Vec<Vec<Record>> {
    (0..3)
        .map(|rank| {
            vec![
                Record::plain("embedding", Dtype::BF16, &[100, 33], 10 + rank).tied("head"),
                Record::plain("norm", Dtype::F32, &[17], 20 + rank),
                Record::strided("transposed", Dtype::F16, &[40, 30], &[1, 40], 0, 30 + rank),
                Record::plain("empty", Dtype::U8, &[0], 0),
            ]
        })
        .collect()
}

#[test]
fn ranks_stay_ranks_or_become_one_checkpoint() {
    let ranks = ranks();
    let expected = rank_tensors(&ranks);
    let directory = tempfile::tempdir().unwrap();
    for source_format in &FORMATS[1..] {
        let source = directory.path().join(format!("{source_format}"));
        common::write_ranks(&source, &ranks, *source_format, 2);
        let written = common::read(&source);
        for target_format in FORMATS {
            let target = directory.path().join("target");
            let options = options(target_format, 2).checksums(Checksums::Write);
            convert(&options.verify(Verify::ReadBack), &source, &target);
            let found = check(&target, target_format, &expected);
            assert_eq!(
                target.join("rank_2").is_dir(),
                target_format.is_serverlessllm()
            );
            if target_format.is_serverlessllm() {
                assert_eq!(found.shared, written.shared);
                assert_eq!(found.strides, written.strides);
            }
            check_sidecar(&target, &expected);
            fs::remove_dir_all(target).unwrap();
        }
    }
}

/// The digests that were written beside a checkpoint are those of its tensors.
fn check_sidecar(target: &Path, expected: &Tensors) {
    let text = fs::read(target.join("tensora.blake3")).unwrap();
    let sidecar: serde_json::Value = serde_json::from_slice(&text).unwrap();
    assert_eq!(sidecar["format"], "tensora-checksums");
    assert_eq!(sidecar["version"], 1);
    assert_eq!(sidecar["content_digest"], digest(expected));
    let listed = sidecar["tensors"].as_object().unwrap();
    assert_eq!(
        listed.keys().collect::<BTreeSet<_>>(),
        expected.keys().collect::<BTreeSet<_>>()
    );
    for (name, tensor) in expected {
        let entry = &listed[name];
        assert_eq!(entry["dtype"], tensor.dtype.name(), "{name}");
        assert_eq!(entry["shape"], serde_json::json!(tensor.shape), "{name}");
        let blake3 = blake3::hash(&tensor.data).to_hex().to_string();
        assert_eq!(entry["blake3"], blake3, "{name}");
    }
}

#[test]
fn checksums_are_those_of_the_tensors() {
    let records = [
        Record::plain("huge", Dtype::U8, &[(3 << 20) + 1], 1),
        Record::plain("gewöhnlich \"\\\u{1F600}\u{0}", Dtype::F32, &[5], 2),
        Record::plain("empty", Dtype::I64, &[0], 3),
        Record::plain("scalar", Dtype::I64, &[], 4),
    ];
    let expected = tensors(&records);
    let directory = tempfile::tempdir().unwrap();
    for source_format in FORMATS {
        let source = directory.path().join(format!("{source_format}"));
        common::write(&source, &records, source_format, 2);
        for target_format in FORMATS {
            let target = directory.path().join("target");
            let options = options(target_format, 2).checksums(Checksums::Write);
            let report = convert(&options, &source, &target);
            check_sidecar(&target, &expected);
            let content = report.content_digest.map(|digest| digest.to_string());
            assert_eq!(content, Some(digest(&expected)));
            fs::remove_dir_all(target).unwrap();
        }
    }
}

#[test]
fn metadata_and_alignment_survive_new_shards() {
    let records: Vec<Record> = (0..9)
        .map(|number| Record::plain(&format!("w{number}"), Dtype::F16, &[number, 30], number))
        .collect();
    let metadata = BTreeMap::from([
        ("format".to_owned(), "pt".to_owned()),
        ("quote \"\\".to_owned(), "é\n\u{1F600}".to_owned()),
    ]);
    let directory = tempfile::tempdir().unwrap();
    let (source, target) = (
        directory.path().join("source"),
        directory.path().join("target"),
    );
    common::write_safetensors(&source, &records, 1, &metadata);
    let options = ConvertOptions::new(Format::Safetensors)
        .shards(NonZero::new(3).unwrap())
        .data_alignment_bytes(4096);
    convert(&options, &source, &target);
    let found = check(&target, Format::Safetensors, &tensors(&records));
    assert_eq!(found.files.len(), 3);
    for file in &found.files {
        let bytes = fs::read(file).unwrap();
        let header_bytes = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        assert_eq!((8 + header_bytes) % 4096, 0);
        let header = &bytes[8..usize::try_from(8 + header_bytes).unwrap()];
        let header: serde_json::Value = serde_json::from_slice(header).unwrap();
        assert_eq!(header["__metadata__"], serde_json::json!(metadata));
    }
}

/// What a generated tensor is like.
#[derive(Clone, Debug)]
struct Sketch {
    dtype: usize,
    shape: Vec<u64>,
    style: Style,
    seed: u64,
}

#[derive(Clone, Debug)]
enum Style {
    Plain,
    /// The dimensions in another order, some of them expanded, elements between those of the view.
    Strided {
        order: Vec<usize>,
        expanded: Vec<bool>,
        step: u64,
        spare_bytes: u64,
    },
    /// Shares its bytes with the tensor before it, where that is possible.
    Tied,
}

fn style() -> impl Strategy<Value = Style> {
    let strided = (
        Just(vec![0, 1, 2, 3]).prop_shuffle(),
        prop::collection::vec(prop::bool::weighted(0.2), 4),
        1u64..3,
        0u64..20,
    );
    prop_oneof![
        3 => Just(Style::Plain),
        2 => strided.prop_map(|(order, expanded, step, spare_bytes)| Style::Strided {
            order,
            expanded,
            step,
            spare_bytes,
        }),
        1 => Just(Style::Tied),
    ]
}

fn dimension() -> impl Strategy<Value = u64> {
    prop_oneof![8 => 1u64..9, 1 => Just(0), 1 => 50u64..200]
}

fn sketch() -> impl Strategy<Value = Sketch> {
    let shape = prop::collection::vec(dimension(), 0..4);
    (any::<usize>(), shape, style(), any::<u64>()).prop_map(|(dtype, mut shape, style, seed)| {
        // Three long dimensions at once would only take time.
        while shape.iter().product::<u64>() > 40_000 {
            shape.pop();
        }
        Sketch {
            dtype,
            shape,
            style,
            seed,
        }
    })
}

/// Names as people give them, and as they do not.
fn name() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => "[a-z]{1,6}(\\.[a-z0-9]{1,6}){0,3}",
        2 => prop::collection::vec(any::<char>(), 0..8).prop_map(String::from_iter),
        1 => prop::sample::select(vec!["../../etc/passwd", "/", "a/b", "rank_0/w", "\u{feff}", "\"", "\\u0000", "\n"])
            .prop_map(str::to_owned),
    ]
    .prop_filter("reserved", |name| name != "__metadata__")
}

impl Sketch {
    fn record(&self, name: &str, dtypes: &[Dtype]) -> Record {
        let dtype = dtypes[self.dtype % dtypes.len()];
        let mut shape = self.shape.clone();
        if common::bits(dtype) < 8 {
            // Whole bytes.
            shape.push(4);
        }
        let dimensions = shape.len();
        match &self.style {
            Style::Strided {
                order,
                expanded,
                step,
                spare_bytes,
            } if common::bits(dtype) >= 8 => {
                let mut strides = vec![0; dimensions];
                let mut stride = *step;
                for &dimension in order.iter().filter(|&&dimension| dimension < dimensions) {
                    if !expanded[dimension] {
                        strides[dimension] = stride;
                        stride *= shape[dimension].max(1);
                    }
                }
                Record::strided(name, dtype, &shape, &strides, *spare_bytes, self.seed)
            }
            _ => Record::plain(name, dtype, &shape, self.seed),
        }
    }
}

/// Records for a source of this format.
fn records(format: Format, entries: &BTreeMap<String, Sketch>, dtypes: &[Dtype]) -> Vec<Record> {
    let mut records: Vec<Record> = Vec::new();
    for (name, sketch) in entries {
        let mut sketch = sketch.clone();
        if format == Format::Safetensors {
            sketch.style = Style::Plain;
        }
        match (&sketch.style, records.pop()) {
            (Style::Tied, Some(last)) => records.push(last.tied(name)),
            (_, last) => {
                records.extend(last);
                records.push(sketch.record(name, dtypes));
            }
        }
    }
    records
}

proptest! {
    // Each case syncs many files. What fails is shown, and belongs into a test of its own.
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(48)
    })]

    #[test]
    fn any_checkpoint_survives_any_chain_of_conversions(
        entries in prop::collection::btree_map(name(), sketch(), 0..24),
        chain in prop::collection::vec((prop::sample::select(FORMATS.to_vec()), 1u32..5, any::<bool>()), 2..5),
        alignment in prop::sample::select(vec![8u64, 64, 4096]),
        partition_bytes in 1u64..6000,
        limits in any::<bool>(),
    ) {
        let formats: Vec<Format> = chain.iter().map(|link| link.0).collect();
        let dtypes: Vec<Dtype> = DTYPES
            .iter()
            .map(|row| row.0)
            .filter(|&dtype| formats.iter().all(|&format| holds(format, dtype)))
            .collect();
        let (source_format, files, _) = chain[0];
        let records = records(source_format, &entries, &dtypes);
        let expected = tensors(&records);
        let directory = tempfile::tempdir().unwrap();
        let mut source = directory.path().join("0");
        common::write(&source, &records, source_format, files as usize);
        for (number, &(format, files, verified)) in chain.iter().enumerate().skip(1) {
            let written = common::read(&source);
            let mut options = ConvertOptions::new(format)
                .memory_limit_bytes(ConvertOptions::MIN_MEMORY_LIMIT_BYTES)
                .checksums(Checksums::Write);
            if verified {
                options = options.verify(Verify::ReadBack);
            }
            let (count, bytes) = (NonZero::new(files).unwrap(), NonZero::new(partition_bytes).unwrap());
            options = match format {
                Format::Safetensors if limits => options.shard_bytes(bytes).data_alignment_bytes(alignment),
                Format::Safetensors => options.shards(count).data_alignment_bytes(alignment),
                Format::ServerlessLlmPartitioned if !limits => options.partitions(count),
                _ => options.partition_bytes(bytes),
            };
            let target = directory.path().join(number.to_string());
            if format == Format::Safetensors && !written.shared.is_empty() {
                let index = CheckpointIndex::open(&source).unwrap();
                let error = options.plan(&index, &target).unwrap_err();
                prop_assert!(matches!(error, Error::SharedTensors { .. }), "{}", error);
                options = options.shared_tensors(SharedTensors::Duplicate);
            }
            convert(&options, &source, &target);
            let found = check(&target, format, &expected);
            check_sidecar(&target, &expected);
            if written.format.is_serverlessllm() && format.is_serverlessllm() {
                prop_assert_eq!(&found.shared, &written.shared);
                prop_assert_eq!(&found.strides, &written.strides);
            } else {
                prop_assert!(found.shared.is_empty() && found.strides.is_empty());
            }
            source = target;
        }
    }
}
