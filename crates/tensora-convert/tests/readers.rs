//! What is written is read by others: the `safetensors` crate, the Python package of that name, and a reader
//! of the store dialect that knows only its description.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{DTYPES, FORMATS, Record, Tensors, holds, tensors};
use safetensors::SafeTensors;
use serde::Deserialize;
use serde_json::Value;
use tensora_convert::{ConvertOptions, SharedTensors};
use tensora_formats::{CheckpointIndex, Dtype, Format, STORE_PARTITION_BYTES};
use tensora_io::Control;

/// Every dtype of the format, scalars, empty tensors, odd lengths, names of all kinds.
fn records(format: Format) -> Vec<Record> {
    let mut records = Vec::new();
    for (number, &(dtype, name, ..)) in DTYPES.iter().enumerate() {
        if holds(format, dtype) {
            records.push(Record::plain(name, dtype, &[5, 8], number as u64));
        }
    }
    records.extend([
        Record::plain("scalar", Dtype::F32, &[], 100),
        Record::plain("empty", Dtype::BF16, &[3, 0], 101),
        Record::plain("odd", Dtype::U8, &[100_003], 102),
        Record::plain("", Dtype::U8, &[1], 103),
        Record::plain(
            "tab\t \"quoted\" \\ \u{0} \u{1F600} é",
            Dtype::I8,
            &[3],
            104,
        ),
        Record::plain("../../etc/passwd", Dtype::I64, &[2, 2], 105),
        Record::plain("model.embed_tokens.weight", Dtype::F16, &[211, 64], 106),
    ]);
    records
}

fn convert(options: &ConvertOptions, source: &Path, target: &Path) {
    let source = CheckpointIndex::open(source).unwrap();
    let options = options.clone().shared_tensors(SharedTensors::Duplicate);
    options
        .plan(&source, target)
        .unwrap()
        .run(&Control::new())
        .unwrap();
}

/// Converts checkpoints of every format to SafeTensors in every shape, and hands out the results with what they
/// shall hold.
fn each_safetensors_target(mut check: impl FnMut(&Path, &Tensors)) {
    let directory = tempfile::tempdir().unwrap();
    let three = NonZero::new(3).unwrap();
    for format in FORMATS {
        let records = records(format);
        let source = directory.path().join(format!("{format}"));
        common::write(&source, &records, format, 2);
        let single = ConvertOptions::new(Format::Safetensors).metadata("format", "pt");
        let shards = single.clone().shards(three);
        for (name, options) in [
            ("single", single),
            ("shards", shards.clone()),
            ("aligned", shards.data_alignment_bytes(4096)),
        ] {
            let target = directory.path().join(format!("{format}-{name}"));
            convert(&options, &source, &target);
            check(&target, &tensors(&records));
        }
    }
}

/// The SafeTensors files of a directory; several must be listed by an index.
fn shards(directory: &Path) -> Vec<PathBuf> {
    let mut shards: Vec<PathBuf> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "safetensors")
        })
        .collect();
    shards.sort();
    let index = directory.join("model.safetensors.index.json");
    assert_eq!(index.exists(), shards.len() > 1);
    shards
}

#[test]
fn the_safetensors_crate_reads_every_byte() {
    each_safetensors_target(|target, expected| {
        let mut seen = 0;
        for path in shards(target) {
            let bytes = fs::read(&path).unwrap();
            let file = SafeTensors::deserialize(&bytes).unwrap();
            for (name, view) in file.tensors() {
                let expected = &expected[&name];
                let dtype = serde_json::to_value(view.dtype()).unwrap();
                assert_eq!(dtype, expected.dtype.name(), "{name:?}");
                let shape: Vec<u64> = view.shape().iter().map(|&n| n as u64).collect();
                assert_eq!(shape, expected.shape, "{name:?}");
                assert!(view.data() == expected.data, "{name:?}");
                seen += 1;
            }
            let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
            let metadata = header.metadata().as_ref().unwrap();
            assert_eq!(metadata["format"], "pt");
        }
        assert_eq!(seen, expected.len());
    });
}

/// A tensor as Python's package reads it.
#[derive(Deserialize)]
struct InPython {
    dtype: String,
    shape: Vec<u64>,
    hex: String,
    /// The same through NumPy, where it has the dtype.
    numpy_hex: Option<String>,
}

const READ_IN_PYTHON: &str = r#"
import json, sys
import numpy
from safetensors import deserialize, safe_open

IN_NUMPY = {"BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64", "F16", "F32", "F64"}
tensors = {}
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        for name, tensor in deserialize(file.read()):
            assert name not in tensors, name
            tensors[name] = {
                "dtype": tensor["dtype"],
                "shape": tensor["shape"],
                "hex": bytes(tensor["data"]).hex(),
                "numpy_hex": None,
            }
    with safe_open(path, framework="np") as file:
        for name in file.keys():
            if tensors[name]["dtype"] in IN_NUMPY:
                array = file.get_tensor(name)
                assert list(array.shape) == tensors[name]["shape"], name
                tensors[name]["numpy_hex"] = array.tobytes().hex()
json.dump(tensors, sys.stdout)
"#;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn the_python_package_reads_every_byte() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let python = root.join("fixtures/venv/bin/python");
    let found = Command::new(&python)
        .args(["-c", "import numpy, safetensors"])
        .output();
    if !found.is_ok_and(|output| output.status.success()) {
        assert!(
            std::env::var_os("CI").is_none(),
            "run .ci/fetch-real-model first"
        );
        common::skip(
            "the Python package safetensors is not there; .ci/fetch-real-model installs it",
        );
        return;
    }
    each_safetensors_target(|target, expected| {
        let output = Command::new(&python)
            .args(["-c", READ_IN_PYTHON])
            .args(shards(target))
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{errors}");
        let read: BTreeMap<String, InPython> = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(read.len(), expected.len());
        let mut through_numpy = 0;
        for (name, tensor) in expected {
            let read = &read[name];
            assert_eq!(read.dtype, tensor.dtype.name(), "{name:?}");
            assert_eq!(read.shape, tensor.shape, "{name:?}");
            assert!(read.hex == hex(&tensor.data), "{name:?}");
            if let Some(numpy_hex) = &read.numpy_hex {
                assert!(*numpy_hex == read.hex, "{name:?} in NumPy");
                through_numpy += 1;
            }
        }
        assert!(through_numpy > 8, "{through_numpy}");
    });
}

/// A store as its description says: five fields; offsets that count through all partitions; records that begin
/// at multiples of 8, one behind the other; a new partition where a record would take the current one past its
/// size; one offset for what is stored once. Returns the lengths of the partitions.
fn check_store(directory: &Path, partition_bytes: u64, expected: &Tensors) -> Vec<u64> {
    let text = fs::read(directory.join("tensor_index.json")).unwrap();
    let index: BTreeMap<String, Value> = serde_json::from_slice(&text).unwrap();
    let partitions: Vec<Vec<u8>> = (0..)
        .map_while(|number| fs::read(directory.join(format!("tensor.data_{number}"))).ok())
        .collect();
    let all: Vec<u8> = partitions.concat();
    assert_eq!(index.len(), expected.len());

    // Offset and size of each record that has bytes.
    let mut records: BTreeMap<u64, u64> = BTreeMap::new();
    for (name, entry) in &index {
        let fields = entry.as_array().unwrap();
        assert_eq!(fields.len(), 5, "{name:?}");
        let integers = |value: &Value| -> Vec<u64> {
            let values = value.as_array().unwrap();
            values.iter().map(|value| value.as_u64().unwrap()).collect()
        };
        let (offset, size) = (fields[0].as_u64().unwrap(), fields[1].as_u64().unwrap());
        let (shape, strides) = (integers(&fields[2]), integers(&fields[3]));
        let tensor = &expected[name];
        let row = DTYPES.iter().find(|row| row.0 == tensor.dtype).unwrap();
        assert_eq!(fields[4].as_str(), row.3, "{name:?}");
        assert_eq!(shape, tensor.shape, "{name:?}");
        assert_eq!(offset % 8, 0, "{name:?}");
        let (begin, end) = (
            usize::try_from(offset).unwrap(),
            usize::try_from(offset + size).unwrap(),
        );
        let data = common::gather(&all[begin..end], tensor.dtype, &shape, &strides);
        assert!(data == tensor.data, "{name:?}");
        if size > 0 {
            let before = records.insert(offset, size);
            assert!(before.is_none_or(|before| before == size), "{name:?}");
        }
    }

    let mut partition = 0;
    let (mut begin, mut at) = (0, 0);
    for (&offset, &size) in &records {
        assert_eq!(offset, at, "records follow each other without a gap");
        let padded = size.next_multiple_of(8);
        let end = begin + partitions[partition].len() as u64;
        if offset == end {
            assert!(
                offset - begin + padded > partition_bytes,
                "a partition was ended too early"
            );
            partition += 1;
            begin = end;
        }
        let end = begin + partitions[partition].len() as u64;
        assert!(offset + padded <= end, "a record lies in one partition");
        assert!(
            end - begin <= partition_bytes || offset == begin && offset + padded == end,
            "only a record that is larger makes a larger partition"
        );
        at = offset + padded;
    }
    assert_eq!(at, all.len() as u64, "nothing is behind the last record");
    assert_eq!(partition + 1, partitions.len().max(1));
    partitions.iter().map(|bytes| bytes.len() as u64).collect()
}

#[test]
fn a_reader_of_the_description_reads_the_store() {
    let directory = tempfile::tempdir().unwrap();
    for format in FORMATS {
        let mut records: Vec<Record> = records(Format::ServerlessLlmStore);
        if format.is_serverlessllm() {
            let tied = Record::plain("embedding", Dtype::BF16, &[100, 9], 200);
            records.push(tied.tied("head"));
            let strided = Record::strided("transposed", Dtype::F16, &[30, 50], &[1, 30], 0, 201);
            records.push(strided);
        }
        let expected = tensors(&records);
        let source = directory.path().join(format!("{format}"));
        common::write(&source, &records, format, 2);
        for (partition_bytes, at_least) in
            [(8, 20), (4096, 3), (65_536, 2), (STORE_PARTITION_BYTES, 1)]
        {
            let target = directory.path().join("target");
            let mut options = ConvertOptions::new(Format::ServerlessLlmStore);
            if partition_bytes != STORE_PARTITION_BYTES {
                options = options.partition_bytes(NonZero::new(partition_bytes).unwrap());
            }
            convert(&options, &source, &target);
            let lengths = check_store(&target, partition_bytes, &expected);
            assert!(lengths.len() >= at_least, "{partition_bytes}: {lengths:?}");
            if format.is_serverlessllm() {
                let text = fs::read(target.join("tensor_index.json")).unwrap();
                let index: BTreeMap<String, Value> = serde_json::from_slice(&text).unwrap();
                assert_eq!(index["embedding"][0], index["head"][0], "stored once");
                assert_eq!(index["transposed"][3], serde_json::json!([1, 30]));
            }
            fs::remove_dir_all(target).unwrap();
        }
    }
}
