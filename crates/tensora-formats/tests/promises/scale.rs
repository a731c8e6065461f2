//! Metadata of the largest checkpoints is read in time linear in its size.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::num::NonZero;
use std::time::{Duration, Instant};

use tensora_formats::{CheckpointIndex, Dtype, Sharding, TensorSpec, safetensors_layout};

use crate::fixture::Directory;

/// The real geometry of qwen3-30b-a3b: 18,867 tensors over 16 shards. The files are sparse.
fn mixture_of_experts() -> Vec<TensorSpec> {
    let mut specs = Vec::new();
    let mut push = |name: String, shape: &[u64]| {
        specs.push(TensorSpec {
            name,
            dtype: Dtype::BF16,
            shape: shape.to_owned(),
        });
    };
    push("lm_head.weight".to_owned(), &[151_936, 2048]);
    push("model.embed_tokens.weight".to_owned(), &[151_936, 2048]);
    for layer in 0..48 {
        let layer = format!("model.layers.{layer}");
        push(format!("{layer}.input_layernorm.weight"), &[2048]);
        push(format!("{layer}.post_attention_layernorm.weight"), &[2048]);
        push(format!("{layer}.mlp.gate.weight"), &[128, 2048]);
        for expert in 0..128 {
            let expert = format!("{layer}.mlp.experts.{expert}");
            push(format!("{expert}.gate_proj.weight"), &[768, 2048]);
            push(format!("{expert}.up_proj.weight"), &[768, 2048]);
            push(format!("{expert}.down_proj.weight"), &[2048, 768]);
        }
        let attention = format!("{layer}.self_attn");
        push(format!("{attention}.q_proj.weight"), &[4096, 2048]);
        push(format!("{attention}.k_proj.weight"), &[512, 2048]);
        push(format!("{attention}.v_proj.weight"), &[512, 2048]);
        push(format!("{attention}.o_proj.weight"), &[2048, 4096]);
        push(format!("{attention}.q_norm.weight"), &[128]);
        push(format!("{attention}.k_norm.weight"), &[128]);
    }
    push("model.norm.weight".to_owned(), &[2048]);
    specs
}

/// Reads and parses the headers of the 16 shards with the reference implementation, and nothing else;
/// returns the bytes of data.
fn parse_headers_with_reference(directory: &Directory) -> usize {
    let shards: Vec<safetensors::tensor::Metadata> = (1..=16)
        .map(|number| {
            let name = format!("model-{number:05}-of-00016.safetensors");
            let mut file = File::open(directory.join(&name)).unwrap();
            let mut length = [0; 8];
            file.read_exact(&mut length).unwrap();
            let mut header = vec![0; usize::try_from(u64::from_le_bytes(length)).unwrap()];
            file.read_exact(&mut header).unwrap();
            serde_json::from_slice(&header).unwrap()
        })
        .collect();
    shards
        .iter()
        .map(safetensors::tensor::Metadata::data_len)
        .sum()
}

#[test]
fn eighteen_thousand_tensors_open_at_once() {
    let specs = mixture_of_experts();
    let sharding = Sharding::Count(NonZero::new(16).unwrap());
    let layout = safetensors_layout(&specs, &BTreeMap::new(), sharding, 0).unwrap();
    let directory = Directory::new();
    for planned in &layout.files {
        let mut file = File::create(directory.join(&planned.name)).unwrap();
        file.write_all(&planned.prefix).unwrap();
        file.set_len(planned.bytes).unwrap();
    }
    let index = layout.index.unwrap();
    directory.write(&index.name, &index.contents);

    let mut best = Duration::MAX;
    let mut best_reference = Duration::MAX;
    for _ in 0..9 {
        let start = Instant::now();
        let bytes = parse_headers_with_reference(&directory);
        best_reference = best_reference.min(start.elapsed());
        assert_eq!(bytes, 61_064_245_248);

        let start = Instant::now();
        let index = CheckpointIndex::open(directory.path()).unwrap();
        best = best.min(start.elapsed());
        assert_eq!(index.tensors().len(), 18_867);
        assert_eq!(index.data_bytes(), 61_064_245_248);
        assert_eq!(index.files().len(), 16);
        assert_eq!(index.notes(), []);
    }
    println!(
        "18,867 tensors over 16 shards open in {best:?}, their headers alone in {best_reference:?}"
    );
    // Two thirds of the reference's time are usual, although it reads no index and compares nothing.
    assert!(
        best < best_reference.mul_f64(1.5),
        "{best:?} against {best_reference:?}"
    );
}

/// Hostile headers of some megabytes: the ways in which a quadratic step would show.
#[test]
fn refusals_are_linear_too() {
    let directory = Directory::new();
    let entries = |count: usize, name: &dyn Fn(usize) -> String, last: &str| {
        let mut header = String::from("{");
        for number in 0..count {
            header += &format!(
                r#""{}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}},"#,
                name(number)
            );
        }
        header + last + "}"
    };
    let cases = [
        entries(
            60_000,
            &|n| n.to_string(),
            r#""t":{"dtype":"U7","shape":[],"data_offsets":[0,0]}"#,
        ),
        entries(
            60_000,
            &|n| n.to_string(),
            r#""0":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}"#,
        ),
        entries(
            60_000,
            &|n| n.to_string(),
            r#""t":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}"#,
        ),
        entries(60_000, &|_| "same".to_owned(), r#""t":4"#),
        format!(
            r#"{{"t":{{"dtype":"U8","shape":[{}-1],"data_offsets":[0,0]}}}}"#,
            "1,".repeat(1_000_000)
        ),
        format!(
            r#"{{"t":{{"dtype":"U8","shape":[],"data_offsets":[{}1]}}}}"#,
            "1,".repeat(1_000_000)
        ),
        format!("{{\"t\":{}", "[".repeat(3_000_000)),
        format!("{{\"t\":\"{}", "\\u0041".repeat(500_000)),
    ];
    for header in cases {
        let path = directory.write("x.safetensors", crate::fixture::safetensors(&header, 2));
        let start = Instant::now();
        let error = CheckpointIndex::open(path).unwrap_err();
        let elapsed = start.elapsed();
        assert!(elapsed < Duration::from_secs(5), "{elapsed:?}: {error}");
        assert!(error.to_string().len() < 1000, "{error}");
    }
}
