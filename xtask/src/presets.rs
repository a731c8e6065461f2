//! The models that fixtures imitate: published geometry, real tensor names and shapes.

use serde_json::{Value, json};
use tensora_formats::{Dtype, TensorSpec};

/// A model whose tensors can be generated.
#[derive(Debug)]
pub struct Preset {
    /// The name on the command line and of the fixture's folder.
    pub name: &'static str,
    family: Family,
    layers: u64,
    hidden: u64,
    heads: u64,
    kv_heads: u64,
    head_dim: u64,
    vocab: u64,
    feed_forward: FeedForward,
    lm_head: LmHead,
    /// Tensors that no such model has, for what real ones do not exercise.
    extras: &'static [Extra],
    /// The most tensor bytes in one SafeTensors shard, as in the published repository.
    pub shard_bytes: u64,
}

/// Decides names that differ between models of otherwise equal build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    Qwen3,
    SmolLm3,
    /// Its repositories hold the tensors twice: in shards, and in `consolidated.safetensors`.
    Mistral,
    /// Latent attention, weights of one byte with scales beside them, experts that are always on, and a
    /// layer that predicts a further token: a decoder of its own, see [`Preset::deepseek`].
    DeepSeekV3,
}

#[derive(Debug, Clone, Copy)]
enum FeedForward {
    Dense { intermediate: u64 },
    Experts { count: u64, intermediate: u64 },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LmHead {
    Stored,
    /// The embedding serves as the output layer too and is stored once.
    Tied,
}

#[derive(Debug)]
struct Extra {
    name: &'static str,
    dtype: Dtype,
    shape: &'static [u64],
}

/// The sizes at which the published repositories were split.
const SHARDS_OF_4_GB: u64 = 4_000_000_000;
const SHARDS_OF_5_GB: u64 = 5_000_000_000;
/// The published repository has 163 shards; at this size the same tensors, in the order of the layers, fill as many.
const SHARDS_OF_DEEPSEEK_V3: u64 = 4_250_000_000;

const QWEN3_VOCAB: u64 = 151_936;

/// What the layers of `tiny` lack: other dtypes, a scalar, an empty tensor, odd sizes.
const ODDITIES: &[Extra] = &[
    Extra {
        name: "model.rotary_emb.inv_freq",
        dtype: Dtype::F32,
        shape: &[8],
    },
    Extra {
        name: "model.position_ids",
        dtype: Dtype::I64,
        shape: &[1, 37],
    },
    Extra {
        name: "model.causal_mask",
        dtype: Dtype::Bool,
        shape: &[7, 9],
    },
    Extra {
        name: "model.layers.0.mlp.up_proj.weight_packed",
        dtype: Dtype::F8E4M3,
        shape: &[13, 5],
    },
    Extra {
        name: "model.layers.0.mlp.up_proj.weight_scale",
        dtype: Dtype::F32,
        shape: &[],
    },
    Extra {
        name: "model.adapter.weight",
        dtype: Dtype::F16,
        shape: &[0, 64],
    },
    Extra {
        name: "model.quantization_state",
        dtype: Dtype::U8,
        shape: &[1021],
    },
];

/// Every preset, small ones first.
pub const PRESETS: &[Preset] = &[
    Preset {
        name: "tiny",
        family: Family::Qwen3,
        layers: 3,
        hidden: 64,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        vocab: 509,
        feed_forward: FeedForward::Dense { intermediate: 192 },
        lm_head: LmHead::Stored,
        extras: ODDITIES,
        shard_bytes: SHARDS_OF_5_GB,
    },
    Preset {
        name: "tiny-sharded",
        family: Family::Qwen3,
        layers: 6,
        hidden: 64,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        vocab: 509,
        feed_forward: FeedForward::Dense { intermediate: 192 },
        lm_head: LmHead::Stored,
        extras: ODDITIES,
        shard_bytes: 300_000,
    },
    Preset {
        name: "tiny-moe",
        family: Family::Qwen3,
        layers: 5,
        hidden: 64,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        vocab: 509,
        feed_forward: FeedForward::Experts {
            count: 128,
            intermediate: 24,
        },
        lm_head: LmHead::Tied,
        extras: &[],
        shard_bytes: SHARDS_OF_5_GB,
    },
    Preset {
        name: "qwen3-0.6b",
        family: Family::Qwen3,
        layers: 28,
        hidden: 1024,
        heads: 16,
        kv_heads: 8,
        head_dim: 128,
        vocab: QWEN3_VOCAB,
        feed_forward: FeedForward::Dense { intermediate: 3072 },
        lm_head: LmHead::Stored,
        extras: &[],
        shard_bytes: SHARDS_OF_4_GB,
    },
    Preset {
        name: "smollm3-3b",
        family: Family::SmolLm3,
        layers: 36,
        hidden: 2048,
        heads: 16,
        kv_heads: 4,
        head_dim: 128,
        vocab: 128_256,
        feed_forward: FeedForward::Dense {
            intermediate: 11_008,
        },
        lm_head: LmHead::Tied,
        extras: &[],
        shard_bytes: SHARDS_OF_5_GB,
    },
    Preset {
        name: "qwen3-4b",
        family: Family::Qwen3,
        layers: 36,
        hidden: 2560,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        vocab: QWEN3_VOCAB,
        feed_forward: FeedForward::Dense { intermediate: 9728 },
        lm_head: LmHead::Tied,
        extras: &[],
        shard_bytes: SHARDS_OF_4_GB,
    },
    Preset {
        name: "qwen3-8b",
        family: Family::Qwen3,
        layers: 36,
        hidden: 4096,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        vocab: QWEN3_VOCAB,
        feed_forward: FeedForward::Dense {
            intermediate: 12_288,
        },
        lm_head: LmHead::Stored,
        extras: &[],
        shard_bytes: SHARDS_OF_4_GB,
    },
    Preset {
        name: "qwen3-14b",
        family: Family::Qwen3,
        layers: 40,
        hidden: 5120,
        heads: 40,
        kv_heads: 8,
        head_dim: 128,
        vocab: QWEN3_VOCAB,
        feed_forward: FeedForward::Dense {
            intermediate: 17_408,
        },
        lm_head: LmHead::Stored,
        extras: &[],
        shard_bytes: SHARDS_OF_4_GB,
    },
    Preset {
        name: "qwen3-32b",
        family: Family::Qwen3,
        layers: 64,
        hidden: 5120,
        heads: 64,
        kv_heads: 8,
        head_dim: 128,
        vocab: QWEN3_VOCAB,
        feed_forward: FeedForward::Dense {
            intermediate: 25_600,
        },
        lm_head: LmHead::Stored,
        extras: &[],
        shard_bytes: SHARDS_OF_4_GB,
    },
    Preset {
        name: "mistral-7b-v0.3",
        family: Family::Mistral,
        layers: 32,
        hidden: 4096,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        vocab: 32_768,
        feed_forward: FeedForward::Dense {
            intermediate: 14_336,
        },
        lm_head: LmHead::Stored,
        extras: &[],
        shard_bytes: SHARDS_OF_5_GB,
    },
    Preset {
        name: "qwen3-30b-a3b",
        family: Family::Qwen3,
        layers: 48,
        hidden: 2048,
        heads: 32,
        kv_heads: 4,
        head_dim: 128,
        vocab: QWEN3_VOCAB,
        feed_forward: FeedForward::Experts {
            count: 128,
            intermediate: 768,
        },
        lm_head: LmHead::Stored,
        extras: &[],
        shard_bytes: SHARDS_OF_4_GB,
    },
    Preset {
        name: "deepseek-v3",
        family: Family::DeepSeekV3,
        layers: 61,
        hidden: 7168,
        heads: 128,
        kv_heads: 128,
        head_dim: 128,
        vocab: 129_280,
        feed_forward: FeedForward::Experts {
            count: 256,
            intermediate: 2048,
        },
        lm_head: LmHead::Stored,
        extras: &[],
        shard_bytes: SHARDS_OF_DEEPSEEK_V3,
    },
];

/// The preset called `name`.
pub fn find(name: &str) -> Option<&'static Preset> {
    PRESETS.iter().find(|preset| preset.name == name)
}

/// Prints the name and size of every preset.
pub fn list() {
    println!("{:<16} {:>7} {:>15}", "preset", "tensors", "bytes");
    for preset in PRESETS {
        let tensors = preset.tensors();
        let bytes: u64 = tensors.iter().filter_map(TensorSpec::bytes).sum();
        println!("{:<16} {:>7} {:>15}", preset.name, tensors.len(), bytes);
    }
}

/// How one naming scheme spells the parts of a decoder.
struct Names {
    embedding: &'static str,
    layer: &'static str,
    input_norm: &'static str,
    attention: [&'static str; 4],
    post_attention_norm: &'static str,
    feed_forward_block: &'static str,
    /// Gate, up, down.
    feed_forward: [&'static str; 3],
    norm: &'static str,
    lm_head: &'static str,
}

/// The names of the `transformers` library.
const TRANSFORMERS: Names = Names {
    embedding: "model.embed_tokens",
    layer: "model.layers",
    input_norm: "input_layernorm",
    attention: [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
    ],
    post_attention_norm: "post_attention_layernorm",
    feed_forward_block: "mlp",
    feed_forward: ["gate_proj", "up_proj", "down_proj"],
    norm: "model.norm",
    lm_head: "lm_head",
};

/// The names of Mistral's own code, as in `consolidated.safetensors`.
const MISTRAL: Names = Names {
    embedding: "tok_embeddings",
    layer: "layers",
    input_norm: "attention_norm",
    attention: [
        "attention.wq",
        "attention.wk",
        "attention.wv",
        "attention.wo",
    ],
    post_attention_norm: "ffn_norm",
    feed_forward_block: "feed_forward",
    feed_forward: ["w1", "w3", "w2"],
    norm: "norm",
    lm_head: "output",
};

impl Preset {
    /// The tensors in the order of the model's layers, which is also the order of its shards.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let mut tensors = match self.family {
            Family::DeepSeekV3 => self.deepseek(),
            _ => self.decoder(&TRANSFORMERS),
        };
        tensors.extend(self.extras.iter().map(|extra| TensorSpec {
            name: extra.name.to_owned(),
            dtype: extra.dtype,
            shape: extra.shape.to_vec(),
        }));
        tensors
    }

    /// The tensors of `consolidated.safetensors`, the second copy that some repositories hold beside
    /// their shards.
    pub fn consolidated_tensors(&self) -> Option<Vec<TensorSpec>> {
        (self.family == Family::Mistral).then(|| self.decoder(&MISTRAL))
    }

    fn decoder(&self, names: &Names) -> Vec<TensorSpec> {
        let mut tensors = Vec::new();
        let mut add = |name: String, shape: &[u64]| {
            let name = format!("{name}.weight");
            tensors.push(TensorSpec {
                name,
                dtype: Dtype::BF16,
                shape: shape.to_vec(),
            });
        };
        let hidden = self.hidden;
        let queries = self.heads * self.head_dim;
        let keys = self.kv_heads * self.head_dim;

        add(names.embedding.to_owned(), &[self.vocab, hidden]);
        for layer in 0..self.layers {
            let at = |part: &str| format!("{}.{layer}.{part}", names.layer);
            add(at(names.input_norm), &[hidden]);
            let projections = [
                [queries, hidden],
                [keys, hidden],
                [keys, hidden],
                [hidden, queries],
            ];
            for (name, shape) in names.attention.iter().zip(projections) {
                add(at(name), &shape);
            }
            if self.family == Family::Qwen3 {
                add(at("self_attn.q_norm"), &[self.head_dim]);
                add(at("self_attn.k_norm"), &[self.head_dim]);
            }
            add(at(names.post_attention_norm), &[hidden]);

            let block = names.feed_forward_block;
            let mut add_mlp = |block: &str, intermediate: u64| {
                let shapes = [
                    [intermediate, hidden],
                    [intermediate, hidden],
                    [hidden, intermediate],
                ];
                for (name, shape) in names.feed_forward.iter().zip(shapes) {
                    add(at(&format!("{block}.{name}")), &shape);
                }
            };
            match self.feed_forward {
                FeedForward::Dense { intermediate } => add_mlp(block, intermediate),
                FeedForward::Experts {
                    count,
                    intermediate,
                } => {
                    for expert in 0..count {
                        add_mlp(&format!("{block}.experts.{expert}"), intermediate);
                    }
                    add(at(&format!("{block}.gate")), &[count, hidden]);
                }
            }
        }
        add(names.norm.to_owned(), &[hidden]);
        if self.lm_head == LmHead::Stored {
            add(names.lm_head.to_owned(), &[self.vocab, hidden]);
        }
        tensors
    }

    /// The decoder of DeepSeek-V3. Names, shapes and dtypes follow its published configuration; how its tensors
    /// are spread over shards is only about the same.
    fn deepseek(&self) -> Vec<TensorSpec> {
        const QUERY_RANK: u64 = 1536;
        const KEY_VALUE_RANK: u64 = 512;
        const ROTARY_DIM: u64 = 64;
        /// The first layers have no experts.
        const DENSE_LAYERS: u64 = 3;
        const DENSE_INTERMEDIATE: u64 = 18_432;
        /// Each square of so many weights has a scale.
        const SCALED: u64 = 128;

        let mut tensors = Vec::new();
        let mut add = |name: String, dtype: Dtype, shape: &[u64]| {
            let shape = shape.to_vec();
            tensors.push(TensorSpec { name, dtype, shape });
        };
        let (hidden, vocab) = (self.hidden, self.vocab);
        let FeedForward::Experts {
            count,
            intermediate,
        } = self.feed_forward
        else {
            return tensors;
        };
        let queries = self.heads * (self.head_dim + ROTARY_DIM);
        let keys_and_values = self.heads * 2 * self.head_dim;

        add(
            "model.embed_tokens.weight".into(),
            Dtype::BF16,
            &[vocab, hidden],
        );
        // The layer after the last predicts the token after the next.
        for layer in 0..=self.layers {
            let at = |part: &str| format!("model.layers.{layer}.{part}");
            if layer == self.layers {
                add(at("embed_tokens.weight"), Dtype::BF16, &[vocab, hidden]);
                add(at("enorm.weight"), Dtype::BF16, &[hidden]);
                add(at("hnorm.weight"), Dtype::BF16, &[hidden]);
                add(at("eh_proj.weight"), Dtype::BF16, &[hidden, 2 * hidden]);
                add(at("shared_head.norm.weight"), Dtype::BF16, &[hidden]);
                add(at("shared_head.head.weight"), Dtype::BF16, &[vocab, hidden]);
            }
            for (norm, width) in [
                ("input_layernorm", hidden),
                ("post_attention_layernorm", hidden),
                ("self_attn.q_a_layernorm", QUERY_RANK),
                ("self_attn.kv_a_layernorm", KEY_VALUE_RANK),
            ] {
                add(at(&format!("{norm}.weight")), Dtype::BF16, &[width]);
            }
            let mut quantised = vec![
                ("self_attn.q_a_proj".to_owned(), [QUERY_RANK, hidden]),
                ("self_attn.q_b_proj".to_owned(), [queries, QUERY_RANK]),
                (
                    "self_attn.kv_a_proj_with_mqa".to_owned(),
                    [KEY_VALUE_RANK + ROTARY_DIM, hidden],
                ),
                (
                    "self_attn.kv_b_proj".to_owned(),
                    [keys_and_values, KEY_VALUE_RANK],
                ),
                (
                    "self_attn.o_proj".to_owned(),
                    [hidden, self.heads * self.head_dim],
                ),
            ];
            let mut add_mlp = |block: &str, intermediate: u64| {
                quantised.extend([
                    (format!("{block}.gate_proj"), [intermediate, hidden]),
                    (format!("{block}.up_proj"), [intermediate, hidden]),
                    (format!("{block}.down_proj"), [hidden, intermediate]),
                ]);
            };
            if layer < DENSE_LAYERS {
                add_mlp("mlp", DENSE_INTERMEDIATE);
            } else {
                for expert in 0..count {
                    add_mlp(&format!("mlp.experts.{expert}"), intermediate);
                }
                add_mlp("mlp.shared_experts", intermediate);
                add(at("mlp.gate.weight"), Dtype::BF16, &[count, hidden]);
                add(at("mlp.gate.e_score_correction_bias"), Dtype::F32, &[count]);
            }
            for (name, shape) in quantised {
                add(at(&format!("{name}.weight")), Dtype::F8E4M3, &shape);
                let scales = shape.map(|length| length.div_ceil(SCALED));
                add(at(&format!("{name}.weight_scale_inv")), Dtype::F32, &scales);
            }
        }
        add("model.norm.weight".into(), Dtype::BF16, &[hidden]);
        add("lm_head.weight".into(), Dtype::BF16, &[vocab, hidden]);
        tensors
    }

    /// The `config.json` that stands beside the tensors.
    pub fn config(&self) -> Value {
        let (architecture, model_type) = match (self.family, self.feed_forward) {
            (Family::Qwen3, FeedForward::Dense { .. }) => ("Qwen3ForCausalLM", "qwen3"),
            (Family::Qwen3, FeedForward::Experts { .. }) => ("Qwen3MoeForCausalLM", "qwen3_moe"),
            (Family::SmolLm3, _) => ("SmolLM3ForCausalLM", "smollm3"),
            (Family::Mistral, _) => ("MistralForCausalLM", "mistral"),
            (Family::DeepSeekV3, _) => ("DeepseekV3ForCausalLM", "deepseek_v3"),
        };
        let mut config = json!({
            "architectures": [architecture],
            "model_type": model_type,
            "torch_dtype": "bfloat16",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.lm_head == LmHead::Tied,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
        });
        match self.feed_forward {
            FeedForward::Dense { intermediate } => {
                config["intermediate_size"] = intermediate.into();
            }
            FeedForward::Experts {
                count,
                intermediate,
            } => {
                config["num_experts"] = count.into();
                config["num_experts_per_tok"] = 8.into();
                config["moe_intermediate_size"] = intermediate.into();
            }
        }
        config
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashSet};

    use tensora_formats::{Sharding, safetensors_layout};

    use super::*;

    /// Tensors, bytes and shards of the repositories on the Hugging Face Hub.
    const PUBLISHED: &[(&str, usize, u64, usize)] = &[
        ("qwen3-0.6b", 311, 1_503_264_768, 1),
        ("smollm3-3b", 326, 6_150_197_248, 2),
        ("qwen3-4b", 398, 8_044_936_192, 3),
        ("qwen3-8b", 399, 16_381_470_720, 5),
        ("qwen3-14b", 443, 29_536_614_400, 8),
        ("qwen3-32b", 707, 65_524_246_528, 17),
        ("mistral-7b-v0.3", 291, 14_496_047_104, 3),
        ("qwen3-30b-a3b", 18_867, 61_064_245_248, 16),
    ];

    fn bytes(tensors: &[TensorSpec]) -> u64 {
        tensors.iter().map(|tensor| tensor.bytes().unwrap()).sum()
    }

    fn shards(preset: &Preset) -> usize {
        let sharding = Sharding::MaxBytes(preset.shard_bytes);
        safetensors_layout(&preset.tensors(), &BTreeMap::new(), sharding, 0)
            .unwrap()
            .files
            .len()
    }

    #[test]
    fn geometry_is_the_published_one() {
        for &(name, tensors, total_bytes, shard_count) in PUBLISHED {
            let preset = find(name).unwrap();
            let specs = preset.tensors();
            assert_eq!(
                (specs.len(), bytes(&specs)),
                (tensors, total_bytes),
                "{name}"
            );
            assert_eq!(shards(preset), shard_count, "{name}");
        }
        let tiny = PRESETS
            .iter()
            .filter(|preset| preset.name.starts_with("tiny"))
            .count();
        assert_eq!(
            // DeepSeek-V3's are held by a test of their own.
            PUBLISHED.len() + tiny + 1,
            PRESETS.len(),
            "a preset without published numbers"
        );
    }

    #[test]
    fn deepseek_has_as_many_tensors_and_shards_as_published() {
        let preset = find("deepseek-v3").unwrap();
        let tensors = preset.tensors();
        assert_eq!((tensors.len(), shards(preset)), (91_991, 163));
        let names: HashSet<_> = tensors.iter().map(|spec| &spec.name).collect();
        assert_eq!(names.len(), tensors.len(), "a name stands twice");
        // 671 billion parameters in the model, and 14 billion in the layer that predicts one token more.
        let weights = tensors.iter().filter(|spec| spec.dtype != Dtype::F32);
        let parameters: u64 = weights.map(|spec| spec.shape.iter().product::<u64>()).sum();
        assert_eq!(parameters / 1_000_000_000, 684);
    }

    #[test]
    fn the_consolidated_copy_has_as_many_tensors_and_bytes_under_other_names() {
        let mistral = find("mistral-7b-v0.3").unwrap();
        let consolidated = mistral.consolidated_tensors().unwrap();
        assert_eq!(
            (consolidated.len(), bytes(&consolidated)),
            (291, 14_496_047_104)
        );
        let names: HashSet<_> = mistral
            .tensors()
            .into_iter()
            .map(|spec| spec.name)
            .collect();
        assert!(consolidated.iter().all(|spec| !names.contains(&spec.name)));
        assert!(find("qwen3-8b").unwrap().consolidated_tensors().is_none());
    }

    #[test]
    fn names_and_shapes_are_the_real_ones() {
        let shape = |tensors: &[TensorSpec], name: &str| {
            tensors
                .iter()
                .find(|spec| spec.name == name)
                .map(|spec| spec.shape.clone())
        };
        let dense = find("qwen3-4b").unwrap().tensors();
        for (name, wanted) in [
            ("model.embed_tokens.weight", vec![151_936, 2560]),
            ("model.layers.0.input_layernorm.weight", vec![2560]),
            ("model.layers.35.self_attn.q_proj.weight", vec![4096, 2560]),
            ("model.layers.1.self_attn.k_proj.weight", vec![1024, 2560]),
            ("model.layers.1.self_attn.v_proj.weight", vec![1024, 2560]),
            ("model.layers.1.self_attn.o_proj.weight", vec![2560, 4096]),
            ("model.layers.1.self_attn.q_norm.weight", vec![128]),
            ("model.layers.1.self_attn.k_norm.weight", vec![128]),
            ("model.layers.1.post_attention_layernorm.weight", vec![2560]),
            ("model.layers.1.mlp.gate_proj.weight", vec![9728, 2560]),
            ("model.layers.1.mlp.up_proj.weight", vec![9728, 2560]),
            ("model.layers.1.mlp.down_proj.weight", vec![2560, 9728]),
            ("model.norm.weight", vec![2560]),
        ] {
            assert_eq!(shape(&dense, name), Some(wanted), "{name}");
        }
        assert_eq!(shape(&dense, "lm_head.weight"), None);

        let experts = find("qwen3-30b-a3b").unwrap().tensors();
        for (name, wanted) in [
            ("model.layers.47.mlp.gate.weight", vec![128, 2048]),
            (
                "model.layers.0.mlp.experts.127.gate_proj.weight",
                vec![768, 2048],
            ),
            (
                "model.layers.0.mlp.experts.0.up_proj.weight",
                vec![768, 2048],
            ),
            (
                "model.layers.0.mlp.experts.0.down_proj.weight",
                vec![2048, 768],
            ),
            ("lm_head.weight", vec![151_936, 2048]),
        ] {
            assert_eq!(shape(&experts, name), Some(wanted), "{name}");
        }

        let own = find("mistral-7b-v0.3")
            .unwrap()
            .consolidated_tensors()
            .unwrap();
        for (name, wanted) in [
            ("tok_embeddings.weight", vec![32_768, 4096]),
            ("layers.0.attention.wq.weight", vec![4096, 4096]),
            ("layers.0.attention.wk.weight", vec![1024, 4096]),
            ("layers.31.attention.wo.weight", vec![4096, 4096]),
            ("layers.0.attention_norm.weight", vec![4096]),
            ("layers.0.ffn_norm.weight", vec![4096]),
            ("layers.0.feed_forward.w1.weight", vec![14_336, 4096]),
            ("layers.0.feed_forward.w2.weight", vec![4096, 14_336]),
            ("layers.0.feed_forward.w3.weight", vec![14_336, 4096]),
            ("norm.weight", vec![4096]),
            ("output.weight", vec![32_768, 4096]),
        ] {
            assert_eq!(shape(&own, name), Some(wanted), "{name}");
        }
    }

    #[test]
    fn tiny_presets_exercise_what_real_models_do_not() {
        let tiny = find("tiny").unwrap().tensors();
        for dtype in [
            Dtype::BF16,
            Dtype::F32,
            Dtype::I64,
            Dtype::Bool,
            Dtype::F8E4M3,
        ] {
            assert!(tiny.iter().any(|spec| spec.dtype == dtype), "{dtype:?}");
        }
        assert!(tiny.iter().any(|spec| spec.shape.is_empty()), "a scalar");
        assert!(
            tiny.iter().any(|spec| spec.bytes() == Some(0)),
            "an empty tensor"
        );
        assert!(
            tiny.iter().any(|spec| spec.bytes().unwrap() % 2 == 1),
            "an odd size"
        );
        assert_eq!(shards(find("tiny").unwrap()), 1);
        assert_eq!(shards(find("tiny-sharded").unwrap()), 3);
        let moe = find("tiny-moe").unwrap().tensors();
        assert!((1900..2100).contains(&moe.len()), "{}", moe.len());
        assert!(bytes(&moe) < 8 << 20);
    }

    #[test]
    fn configurations_carry_the_geometry() {
        let config = find("qwen3-30b-a3b").unwrap().config();
        assert_eq!(config["architectures"][0], "Qwen3MoeForCausalLM");
        assert_eq!(config["num_experts"], 128);
        assert_eq!(config["hidden_size"], 2048);
        assert_eq!(config["tie_word_embeddings"], false);
        assert_eq!(
            find("qwen3-4b").unwrap().config()["intermediate_size"],
            9728
        );
    }
}
