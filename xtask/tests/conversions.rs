//! The tiny presets go through every conversion, there and back, and stay the tensors that the generator made.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::num::NonZero;
use std::path::Path;

use tensora::convert::{ConvertOptions, Digest, StoredTensor, Verify, content_digest};
use tensora::{CheckpointIndex, Format, open};
use tensora_io::Control;
use xtask::fixtures::{Content, Options, ensure};
use xtask::presets::{Preset, find};

const SEED: u64 = 11;

/// The digest of what the generator makes, without a file in between.
fn generated(preset: &Preset) -> Digest {
    let specs = preset.tensors();
    let contents: Vec<Vec<u8>> = specs
        .iter()
        .map(|spec| {
            let mut bytes = vec![0; usize::try_from(spec.bytes().unwrap()).unwrap()];
            Content::new(SEED, spec).fill(0, &mut bytes);
            bytes
        })
        .collect();
    let tensors = specs
        .iter()
        .zip(&contents)
        .map(|(spec, bytes)| StoredTensor {
            name: &spec.name,
            dtype: spec.dtype,
            shape: &spec.shape,
            strides: None,
            bytes,
        });
    content_digest(tensors, NonZero::<usize>::MIN, &Control::new()).unwrap()
}

/// Every kind of layout that a conversion can write.
fn targets() -> Vec<(&'static str, ConvertOptions)> {
    let three = NonZero::<u32>::MIN.saturating_add(2);
    let small = NonZero::new(40_000).unwrap();
    vec![
        ("one file", ConvertOptions::new(Format::Safetensors)),
        (
            "3 shards",
            ConvertOptions::new(Format::Safetensors).shards(three),
        ),
        (
            "shards by size, data on pages",
            ConvertOptions::new(Format::Safetensors)
                .shard_bytes(small)
                .data_alignment_bytes(4096),
        ),
        ("store", ConvertOptions::new(Format::ServerlessLlmStore)),
        (
            "3 partitions",
            ConvertOptions::new(Format::ServerlessLlmPartitioned).partitions(three),
        ),
        (
            "partitions by size",
            ConvertOptions::new(Format::ServerlessLlmPartitioned).partition_bytes(small),
        ),
    ]
}

fn convert(source: &Path, options: ConvertOptions, target: &Path) {
    let index = CheckpointIndex::open(source).unwrap();
    let plan = options
        .verify(Verify::ReadBack)
        .plan(&index, target)
        .unwrap();
    plan.run(&Control::new()).unwrap();
}

#[test]
fn tiny_presets_survive_every_conversion_and_the_way_back() {
    let folder = tempfile::tempdir().unwrap();
    let options = Options {
        seed: SEED,
        ..Options::new(folder.path())
    };
    for name in ["tiny", "tiny-sharded", "tiny-moe"] {
        let preset = find(name).unwrap();
        let wanted = generated(preset);
        for &format in Format::ALL {
            let source = ensure(preset, format, &options).unwrap();
            for (layout, target_options) in targets() {
                let what = format!("{name}, {format} to {layout}");
                let scratch = tempfile::tempdir_in(folder.path()).unwrap();
                let (there, back) = (scratch.path().join("there"), scratch.path().join("back"));
                convert(&source, target_options, &there);
                assert_eq!(open(&there).unwrap().digest().unwrap(), wanted, "{what}");
                convert(&there, ConvertOptions::new(format), &back);
                assert_eq!(
                    open(&back).unwrap().digest().unwrap(),
                    wanted,
                    "{what} and back"
                );
            }
        }
    }
}
