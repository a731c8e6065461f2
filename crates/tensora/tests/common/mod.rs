//! Small checkpoints with known bytes, written in every layout.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::print_stderr)]
// Each test binary uses a part.

use std::collections::BTreeMap;
use std::fs::File;
use std::num::NonZero;
use std::os::unix::fs::FileExt;
use std::path::Path;

use tensora::Dtype;
use tensora::formats::{
    CheckpointLayout, Sharding, TensorSpec, partitioned_layout, safetensors_layout, store_layout,
};

/// Tensor name → dtype, shape, bytes.
pub type Expected = BTreeMap<String, (Dtype, Vec<u64>, Vec<u8>)>;

pub const LAYOUTS: [&str; 5] = [
    "one SafeTensors file",
    "three SafeTensors shards",
    "page-aligned SafeTensors",
    "store dialect",
    "partitioned dialect",
];

/// Odd sizes, scalars, empty tensors, several dtypes, and one tensor larger than a chunk.
pub fn expected() -> Expected {
    let mut expected = Expected::new();
    let mut state = 1_u64;
    let mut add = |name: &str, dtype: Dtype, shape: &[u64]| {
        let bytes = dtype.bytes_for(shape.iter().product()).unwrap();
        let data = (0..bytes)
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                u8::try_from(state >> 56).unwrap()
            })
            .collect();
        expected.insert(name.to_owned(), (dtype, shape.to_vec(), data));
    };
    add("model.embed_tokens.weight", Dtype::BF16, &[1031, 577]);
    for layer in 0..12 {
        add(
            &format!("model.layers.{layer}.mlp.weight"),
            Dtype::F32,
            &[33, 65],
        );
        add(
            &format!("model.layers.{layer}.norm.weight"),
            Dtype::BF16,
            &[129],
        );
        add(&format!("model.layers.{layer}.mask"), Dtype::U8, &[7]);
    }
    add("scalar", Dtype::F64, &[]);
    add("empty", Dtype::F32, &[0, 4]);
    add("ids", Dtype::I64, &[3]);
    expected
}

/// Writes the tensors in one of [`LAYOUTS`] into `directory`.
pub fn write(expected: &Expected, layout: &str, directory: &Path) {
    let specs: Vec<_> = expected
        .iter()
        .map(|(name, (dtype, shape, _))| TensorSpec {
            name: name.clone(),
            dtype: *dtype,
            shape: shape.clone(),
        })
        .collect();
    let safetensors =
        |sharding, align| safetensors_layout(&specs, &BTreeMap::new(), sharding, align).unwrap();
    let layout = match layout {
        "one SafeTensors file" => safetensors(Sharding::Single, 8),
        "three SafeTensors shards" => safetensors(Sharding::Count(NonZero::new(3).unwrap()), 8),
        "page-aligned SafeTensors" => safetensors(Sharding::Single, 4096),
        "store dialect" => store_layout(&specs, 300_000).unwrap(),
        "partitioned dialect" => partitioned_layout(&specs, NonZero::new(4).unwrap()).unwrap(),
        other => panic!("no layout {other}"),
    };
    write_layout(&layout, &specs, expected, directory);
}

fn write_layout(
    layout: &CheckpointLayout,
    specs: &[TensorSpec],
    expected: &Expected,
    directory: &Path,
) {
    for planned in &layout.files {
        let file = File::create(directory.join(&planned.name)).unwrap();
        file.set_len(planned.bytes).unwrap();
        file.write_all_at(&planned.prefix, 0).unwrap();
        for tensor in &planned.tensors {
            let data = &expected[&specs[tensor.tensor].name].2;
            file.write_all_at(data, tensor.offset).unwrap();
        }
        // Written pages cannot be read directly, nor evicted, before they are on the device.
        file.sync_all().unwrap();
    }
    if let Some(index) = &layout.index {
        std::fs::write(directory.join(&index.name), &index.contents).unwrap();
    }
}

/// Says that a test did not run, and counts it.
pub fn skip(reason: &str) {
    use std::io::Write;
    eprintln!("SKIP: {reason}");
    if let Some(log) = std::env::var_os("TENSORA_SKIP_LOG") {
        let mut log = std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(log)
            .unwrap();
        writeln!(log, "SKIP: {reason}").unwrap();
    }
}
