//! Slice rules say which part of which tensor, refuse what nobody can have meant, and say how to mean it.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;

use tempfile::TempDir;
use tensora::formats::{Remainder, Sharding, TensorPart, TensorSpec, safetensors_layout};
use tensora::{
    CheckpointIndex, Dtype, Error, Loader, Pattern, Preset, SlicePart, SliceRule, SliceRules,
};

/// A checkpoint of tensors of these names and shapes, of which the data is a hole in the file.
fn checkpoint(tensors: &[(String, Vec<u64>)]) -> (TempDir, CheckpointIndex) {
    let specs: Vec<_> = tensors
        .iter()
        .map(|(name, shape)| TensorSpec {
            name: name.clone(),
            dtype: Dtype::BF16,
            shape: shape.clone(),
        })
        .collect();
    let layout = safetensors_layout(&specs, &BTreeMap::new(), Sharding::Single, 0).unwrap();
    let directory = tempfile::tempdir().unwrap();
    for planned in &layout.files {
        let mut file = File::create(directory.path().join(&planned.name)).unwrap();
        file.write_all(&planned.prefix).unwrap();
        file.set_len(planned.bytes).unwrap();
    }
    let index = CheckpointIndex::open(directory.path()).unwrap();
    (directory, index)
}

fn named(tensors: &[(&str, &[u64])]) -> Vec<(String, Vec<u64>)> {
    tensors
        .iter()
        .map(|(name, shape)| ((*name).to_owned(), shape.to_vec()))
        .collect()
}

fn rules(texts: &[&str]) -> SliceRules {
    let mut rules = SliceRules::default();
    for text in texts {
        rules.push(text.parse().unwrap());
    }
    rules
}

fn parts(
    rules: &SliceRules,
    index: &CheckpointIndex,
    rank: Option<(u32, u32)>,
) -> Result<Vec<TensorPart>, Error> {
    let all: Vec<usize> = (0..index.tensors().len()).collect();
    rules.resolve(index, &all, rank)
}

fn shape_of<'p>(parts: &'p [TensorPart], name: &str) -> &'p [u64] {
    parts
        .iter()
        .find(|part| part.name() == name)
        .unwrap()
        .shape()
}

#[test]
fn rules_are_read_and_written() {
    let rank = |dim, rank, remainder, multiple_of| SlicePart::Rank {
        dim,
        rank,
        remainder,
        multiple_of,
    };
    for (text, pattern, part) in [
        ("a=whole", Pattern::Name("a".into()), SlicePart::Whole),
        (
            "a.*=dim:-1,range:3..7",
            Pattern::Glob("a.*".into()),
            SlicePart::Range {
                dim: -1,
                range: 3..7,
            },
        ),
        (
            "re:a=b|c=dim:0",
            Pattern::Regex("a=b|c".into()),
            rank(0, None, Remainder::Refuse, 1),
        ),
        (
            "*=dim:1,rank:3/4,remainder:last,multiple:128",
            Pattern::Glob("*".into()),
            rank(1, Some((3, 4)), Remainder::Last, 128),
        ),
    ] {
        let rule: SliceRule = text.parse().unwrap();
        assert_eq!((&rule.pattern, &rule.part), (&pattern, &part), "{text}");
        assert_eq!(rule.to_string(), text);
    }
    // In any order, and with what is so anyway.
    let rule: SliceRule = "a=multiple:1,remainder:refuse,rank:0/1,dim:2"
        .parse()
        .unwrap();
    assert_eq!(rule.part, rank(2, Some((0, 1)), Remainder::Refuse, 1));
}

#[test]
fn each_way_to_get_a_rule_wrong_is_told_apart() {
    for (text, reason) in [
        ("a", "there is no ="),
        ("=dim:0", "no pattern before the ="),
        ("a=", "is not KEY:VALUE"),
        ("a=all", "\"all\" is not KEY:VALUE"),
        ("a=rank:0/2", "there is no dim:D"),
        ("a=dim:x", "the dimension \"x\" is not a whole number"),
        ("a=dim:0,dim:1", "dim stands there twice"),
        ("a=dim:0,size:4", "there is no key \"size\""),
        ("a=dim:0,range:3", "the range \"3\" is not A..B"),
        ("a=dim:0,range:..3", "the range's begin \"\" is not"),
        ("a=dim:0,range:3..-1", "the range's end \"-1\" is not"),
        ("a=dim:0,range:3..2", "the range 3..2 ends before it begins"),
        ("a=dim:0,range:1..2,rank:0/2", "a range goes with no rank"),
        (
            "a=dim:0,range:1..2,remainder:last",
            "a range goes with no rank",
        ),
        ("a=dim:0,rank:1", "the rank \"1\" is not R/W"),
        ("a=dim:0,rank:-1/2", "the rank \"-1/2\" is not R/W"),
        ("a=dim:0,rank:2/2", "there is no rank 2 of 2"),
        ("a=dim:0,remainder:first", "neither last nor refuse"),
        ("a=dim:0,multiple:0", "the multiple is 0"),
    ] {
        let error = text.parse::<SliceRule>().unwrap_err();
        assert!(matches!(error, Error::BadSliceRule { .. }), "{error:?}");
        let message = error.to_string();
        assert!(
            message.contains(reason) && message.contains(text),
            "{message}"
        );
    }
}

#[test]
fn a_rule_cuts_what_it_matches_and_nothing_else() {
    let tensors = named(&[("a.w", &[8, 6]), ("b.w", &[8, 6]), ("c", &[5])]);
    let (_directory, index) = checkpoint(&tensors);
    let found = parts(
        &rules(&["a.*=dim:-1,range:1..3", "c=dim:0,rank:1/2,remainder:last"]),
        &index,
        None,
    );
    let found = found.unwrap();
    assert_eq!(shape_of(&found, "a.w"), [8, 2]);
    assert_eq!(shape_of(&found, "b.w"), [8, 6]);
    assert_eq!(shape_of(&found, "c"), [3]);
    let a = index.tensor("a.w").unwrap();
    let first = found[0].runs(0..4).next().unwrap();
    assert_eq!(first, a.offset + 2..a.offset + 6);

    // A rank of the rule's own comes before that of the load.
    let found = parts(
        &rules(&["re:[ab]\\.w=dim:0", "c=dim:0,rank:0/5"]),
        &index,
        Some((1, 4)),
    );
    let found = found.unwrap();
    assert_eq!(found[0].shape(), [2, 6]);
    assert_eq!(
        found[0].runs(0..24).next(),
        Some(a.offset + 24..a.offset + 48)
    );
    assert_eq!(shape_of(&found, "c"), [1]);

    // Only selected tensors are given, in the order of the selection.
    let found = rules(&["a.w=dim:0"])
        .resolve(&index, &[2, 0], Some((0, 8)))
        .unwrap();
    let names: Vec<_> = found
        .iter()
        .map(|part| (part.name(), part.shape()))
        .collect();
    assert_eq!(names, [("c", &[5][..]), ("a.w", &[1, 6][..])]);
    assert!(rules(&[]).is_empty() && !rules(&["c=whole"]).is_empty());
}

#[test]
fn what_does_not_fit_says_which_tensor_which_rule_and_what_to_do() {
    let tensors = named(&[("a.w", &[8, 6]), ("b.w", &[8, 6]), ("s", &[])]);
    let (_directory, index) = checkpoint(&tensors);
    let refused = |texts: &[&str], rank| {
        let error = parts(&rules(texts), &index, rank).unwrap_err();
        (error.to_string(), error)
    };
    let (message, error) = refused(&["a.w=dim:0"], Some((0, 3)));
    assert!(matches!(error, Error::SliceDoesNotFit { .. }), "{error:?}");
    for text in [
        "\"a.w\" of shape [8, 6]",
        "`a.w=dim:0`",
        "8 does not divide evenly by 3",
        "remainder:last",
    ] {
        assert!(message.contains(text), "{text}: {message}");
    }
    let (message, error) = refused(&["a.w=dim:1,range:2..7"], None);
    assert!(matches!(error, Error::SliceDoesNotFit { .. }), "{error:?}");
    assert!(
        message.contains("2..7") && message.contains("0..6"),
        "{message}"
    );
    assert!(!message.contains("remainder"), "{message}");
    for dim in ["2", "-3", "-9223372036854775808", "9223372036854775807"] {
        let (message, error) = refused(&[&format!("a.w=dim:{dim},range:0..1")], None);
        assert!(matches!(error, Error::SliceDimension { .. }), "{error:?}");
        assert!(message.contains("[8, 6]"), "{message}");
    }
    let (_, error) = refused(&["s=dim:0"], Some((0, 1)));
    assert!(matches!(error, Error::SliceDimension { .. }), "{error:?}");
    let (message, error) = refused(&["a.w=dim:0"], None);
    assert!(matches!(error, Error::SliceNeedsRank { .. }), "{error:?}");
    assert!(
        message.contains("--rank") && message.contains("rank:R/W"),
        "{message}"
    );
    let (message, error) = refused(&["*.w=dim:0,range:0..1", "re:b.*=whole"], None);
    assert!(matches!(error, Error::SliceConflict { .. }), "{error:?}");
    for text in ["\"b.w\"", "`*.w=dim:0,range:0..1`", "`re:b.*=whole`"] {
        assert!(message.contains(text), "{text}: {message}");
    }
    let (message, error) = refused(&["a.w=whole", "x*=whole"], None);
    assert!(matches!(error, Error::UnusedSliceRule { .. }), "{error:?}");
    assert!(
        message.contains("`x*=whole`") && message.contains("none of the 3"),
        "{message}"
    );
    let (message, error) = refused(&["re:(=whole"], None);
    assert!(matches!(error, Error::BadPattern { .. }), "{error:?}");
    assert!(
        message.contains("\"re:(\"") && message.contains("regular expression"),
        "{message}"
    );
}

#[test]
fn a_selection_takes_regular_expressions_too() {
    let tensors = named(&[("a.1", &[2]), ("a.12", &[2]), ("b.1", &[2])]);
    let (directory, _) = checkpoint(&tensors);
    let selected = |patterns: &[&str]| {
        let loader = Loader::new().select(patterns.iter().copied());
        let opened = loader.open(directory.path())?;
        let names = opened.selected().map(|entry| entry.name.clone());
        Ok::<_, Error>(names.collect::<Vec<_>>())
    };
    assert_eq!(selected(&["re:[ab]\\.1"]).unwrap(), ["a.1", "b.1"]);
    assert_eq!(selected(&["re:a.*2", "b.1"]).unwrap(), ["a.12", "b.1"]);
    let error = selected(&["a.*", "re:a"]).unwrap_err();
    assert!(matches!(error, Error::NoMatch { .. }), "{error:?}");
    assert!(error.to_string().contains("\"re:a\""), "{error}");
}

#[test]
fn presets_are_read_in_order_and_give_way_to_rules_of_ones_own() {
    let text = r#"
        [[rule]]
        tensors = ["a.*", "unused"]
        whole = true
        [[rule]]
        tensors = ["re:.\\.w"]
        dim = 0
        remainder = "last"
        multiple_of = 3
        [[rule]]
        tensors = ["c"]
        refuse = "because"
    "#;
    let tensors = named(&[("a.w", &[8, 6]), ("b.w", &[8, 6]), ("c", &[5])]);
    let (_directory, index) = checkpoint(&tensors);
    let with = |texts: &[&str], rank| {
        let mut rules = rules(texts);
        rules.set_preset(Preset::parse("mine", text).unwrap());
        parts(&rules, &index, rank)
    };
    let found = with(&["c=whole"], Some((1, 2))).unwrap();
    assert_eq!(found[0].shape(), [8, 6]);
    assert_eq!(found[1].shape(), [5, 6]);
    let found = with(&["c=dim:0,range:1..2", "b.w=dim:1,range:0..2"], None).unwrap();
    assert_eq!(
        (found[1].shape(), found[2].shape()),
        (&[8, 2][..], &[1][..])
    );

    let error = with(&[], Some((0, 2))).unwrap_err();
    assert!(matches!(error, Error::SliceRefused { .. }), "{error:?}");
    let message = error.to_string();
    for text in ["\"c\"", "preset \"mine\"", "because", "`c=whole`"] {
        assert!(message.contains(text), "{text}: {message}");
    }
    let message = with(&["c=whole"], None).unwrap_err().to_string();
    assert!(
        message.contains("preset \"mine\"") && message.contains("--rank"),
        "{message}"
    );
}

#[test]
fn presets_that_say_nothing_or_too_much_are_refused() {
    for (text, reason) in [
        ("rules = []", "rules"),
        (
            "[[rule]]\ntensors = [\"a\"]\ndim = 0\ndims = 1",
            "unknown field `dims`",
        ),
        (
            "[[rule]]\ntensors = []\ndim = 0",
            "rule 1: `tensors` names none",
        ),
        ("[[rule]]\ntensors = [\"a\"]", "rule 1: give one of"),
        (
            "[[rule]]\ntensors = [\"a\"]\ndim = 0\nwhole = true",
            "give one of",
        ),
        ("[[rule]]\ntensors = [\"a\"]\nwhole = false", "give one of"),
        (
            "[[rule]]\ntensors = [\"a\"]\nwhole = true\nmultiple_of = 2",
            "go with `dim` only",
        ),
        (
            "[[rule]]\ntensors = [\"a\"]\ndim = 0\nmultiple_of = 0",
            "`multiple_of` is 0",
        ),
        (
            "[[rule]]\ntensors = [\"a\"]\ndim = 0\nremainder = \"first\"",
            "first",
        ),
    ] {
        let error = Preset::parse("mine", text).unwrap_err();
        assert!(matches!(error, Error::BadPreset { .. }), "{error:?}");
        let message = error.to_string();
        assert!(
            message.contains(reason) && message.contains("\"mine\""),
            "{message}"
        );
    }
    let bad_glob = "[[rule]]\ntensors = [\"{a\"]\ndim = 0";
    let error = Preset::parse("mine", bad_glob).unwrap_err();
    assert!(matches!(error, Error::BadPattern { .. }), "{error:?}");

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("mine.toml");
    let missing = Preset::find(path.to_str().unwrap()).unwrap_err();
    assert!(
        matches!(missing, Error::UnknownPreset { .. }),
        "{missing:?}"
    );
    assert!(missing.to_string().contains("tensor-parallel"), "{missing}");
    let unreadable = Preset::find(directory.path().to_str().unwrap()).unwrap_err();
    assert!(
        matches!(unreadable, Error::PresetFile { .. }),
        "{unreadable:?}"
    );
    std::fs::write(&path, "[[rule]]\ntensors = [\"a\"]\ndim = 0").unwrap();
    let found = Preset::find(path.to_str().unwrap()).unwrap();
    assert_eq!(found.name(), path.to_str().unwrap());
    for name in Preset::shipped() {
        assert_eq!(Preset::find(name).unwrap().name(), name);
    }
}

/// The tensors of qwen3-0.6b.
fn qwen3() -> Vec<(String, Vec<u64>)> {
    let mut tensors = named(&[
        ("lm_head.weight", &[151_936, 1024]),
        ("model.embed_tokens.weight", &[151_936, 1024]),
        ("model.norm.weight", &[1024]),
    ]);
    for layer in 0..28 {
        for (name, shape) in [
            ("input_layernorm", &[1024][..]),
            ("post_attention_layernorm", &[1024]),
            ("self_attn.q_norm", &[128]),
            ("self_attn.k_norm", &[128]),
            ("self_attn.q_proj", &[2048, 1024]),
            ("self_attn.k_proj", &[1024, 1024]),
            ("self_attn.v_proj", &[1024, 1024]),
            ("self_attn.o_proj", &[1024, 2048]),
            ("mlp.gate_proj", &[3072, 1024]),
            ("mlp.up_proj", &[3072, 1024]),
            ("mlp.down_proj", &[1024, 3072]),
        ] {
            tensors.push((
                format!("model.layers.{layer}.{name}.weight"),
                shape.to_vec(),
            ));
        }
    }
    tensors
}

fn tensor_parallel() -> SliceRules {
    let mut rules = SliceRules::default();
    rules.set_preset(Preset::find("tensor-parallel").unwrap());
    rules
}

#[test]
fn four_ranks_of_qwen3_are_the_whole() {
    let (_directory, index) = checkpoint(&qwen3());
    assert_eq!(index.tensors().len(), 311);
    let ranks: Vec<_> = (0..4)
        .map(|rank| parts(&tensor_parallel(), &index, Some((rank, 4))).unwrap())
        .collect();
    let mut delivered_bytes = 0;
    for (number, entry) in index.tensors().iter().enumerate() {
        let of_ranks: Vec<_> = ranks.iter().map(|parts| &parts[number]).collect();
        let name = entry.name.as_str();
        delivered_bytes += of_ranks[0].bytes();
        if name.contains("norm") {
            let whole = TensorPart::whole(entry).unwrap();
            assert!(of_ranks.iter().all(|part| **part == whole), "{name}");
            continue;
        }
        let [rows, columns] = entry.shape[..] else {
            panic!("{name}");
        };
        let is_row_parallel = name.contains("o_proj") || name.contains("down_proj");
        let expected = if is_row_parallel {
            [rows, columns / 4]
        } else {
            [rows / 4, columns]
        };
        // Every byte belongs to one rank, in order: side by side in each row, or one below the other.
        let steps = if is_row_parallel { rows } else { 1 };
        let mut at = entry.offset;
        let mut runs: Vec<_> = of_ranks
            .iter()
            .map(|part| part.runs(0..part.bytes()))
            .collect();
        for _ in 0..steps {
            for runs in &mut runs {
                let run = runs.next().unwrap();
                assert_eq!(run.start, at, "{name}");
                at = run.end;
            }
        }
        assert_eq!(at, entry.range().end, "{name}");
        for (part, mut runs) in of_ranks.into_iter().zip(runs) {
            assert_eq!(part.shape(), expected, "{name}");
            assert_eq!(runs.next(), None, "{name}");
        }
    }
    // A quarter, and what every rank has of the norms.
    let norm_bytes = 2 * (1024 + 28 * (1024 + 1024 + 128 + 128));
    assert_eq!(
        delivered_bytes,
        (1_503_264_768 - norm_bytes) / 4 + norm_bytes
    );
}

/// A tensor's name and shape, and the shape that one of two ranks has of it; `None` for what is refused.
type Case = (&'static str, &'static [u64], Option<&'static [u64]>);

#[test]
fn the_shipped_preset_knows_the_common_names() {
    let cases: &[Case] = &[
        // Qwen 2: biases.
        ("model.layers.0.self_attn.q_proj.bias", &[8], Some(&[4])),
        ("model.layers.0.self_attn.o_proj.bias", &[8], Some(&[8])),
        (
            "language_model.model.layers.0.mlp.up_proj.weight",
            &[8, 6],
            Some(&[4, 6]),
        ),
        // Phi-2 and Phi-3.
        (
            "model.layers.0.self_attn.dense.weight",
            &[8, 6],
            Some(&[8, 3]),
        ),
        ("model.layers.0.self_attn.dense.bias", &[8], Some(&[8])),
        ("model.layers.0.mlp.fc1.weight", &[8, 6], Some(&[4, 6])),
        ("model.layers.0.mlp.fc1.bias", &[8], Some(&[4])),
        ("model.layers.0.mlp.fc2.weight", &[8, 6], Some(&[8, 3])),
        ("lm_head.bias", &[8], Some(&[4])),
        ("model.layers.0.self_attn.qkv_proj.weight", &[8, 6], None),
        ("model.layers.0.mlp.gate_up_proj.weight", &[8, 6], None),
        // Experts: Qwen 3, Mixtral, DeepSeek, Llama 4, gpt-oss.
        ("model.layers.0.mlp.gate.weight", &[8, 6], Some(&[8, 6])),
        (
            "model.layers.0.mlp.experts.17.gate_proj.weight",
            &[8, 6],
            Some(&[4, 6]),
        ),
        (
            "model.layers.0.mlp.experts.17.down_proj.weight",
            &[8, 6],
            Some(&[8, 3]),
        ),
        (
            "model.layers.0.mlp.shared_expert.up_proj.weight",
            &[8, 6],
            Some(&[4, 6]),
        ),
        (
            "model.layers.0.mlp.shared_expert_gate.weight",
            &[1, 6],
            Some(&[1, 6]),
        ),
        (
            "model.layers.0.block_sparse_moe.gate.weight",
            &[8, 6],
            Some(&[8, 6]),
        ),
        (
            "model.layers.0.block_sparse_moe.experts.3.w1.weight",
            &[8, 6],
            Some(&[4, 6]),
        ),
        (
            "model.layers.0.block_sparse_moe.experts.3.w2.weight",
            &[8, 6],
            Some(&[8, 3]),
        ),
        (
            "model.layers.0.block_sparse_moe.experts.3.w3.weight",
            &[8, 6],
            Some(&[4, 6]),
        ),
        (
            "model.layers.0.self_attn.q_a_proj.weight",
            &[8, 6],
            Some(&[8, 6]),
        ),
        (
            "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
            &[8, 6],
            Some(&[8, 6]),
        ),
        (
            "model.layers.0.self_attn.q_b_proj.weight",
            &[8, 6],
            Some(&[4, 6]),
        ),
        (
            "model.layers.0.self_attn.kv_b_proj.weight_scale_inv",
            &[8, 6],
            Some(&[4, 6]),
        ),
        (
            "model.layers.0.mlp.down_proj.weight_scale_inv",
            &[8, 6],
            Some(&[8, 3]),
        ),
        (
            "model.layers.0.feed_forward.experts.gate_up_proj",
            &[2, 8, 6],
            None,
        ),
        (
            "model.layers.0.feed_forward.experts.down_proj",
            &[2, 8, 6],
            None,
        ),
        (
            "model.layers.0.mlp.experts.down_proj_blocks",
            &[2, 8, 6],
            None,
        ),
        // GPT-NeoX, Falcon, GPT-2.
        (
            "gpt_neox.layers.0.attention.query_key_value.weight",
            &[8, 6],
            Some(&[4, 6]),
        ),
        (
            "gpt_neox.layers.0.attention.dense.weight",
            &[8, 6],
            Some(&[8, 3]),
        ),
        ("gpt_neox.layers.0.attention.dense.bias", &[8], Some(&[8])),
        ("gpt_neox.layers.0.mlp.dense_h_to_4h.bias", &[8], Some(&[4])),
        (
            "gpt_neox.layers.0.mlp.dense_4h_to_h.weight",
            &[8, 6],
            Some(&[8, 3]),
        ),
        ("gpt_neox.embed_in.weight", &[8, 6], Some(&[4, 6])),
        ("embed_out.weight", &[8, 6], Some(&[4, 6])),
        (
            "transformer.h.0.self_attention.query_key_value.weight",
            &[8, 6],
            None,
        ),
        ("h.0.attn.c_attn.weight", &[8, 6], None),
        ("h.0.mlp.c_proj.weight", &[8, 6], None),
        ("wte.weight", &[8, 6], Some(&[4, 6])),
        ("wpe.weight", &[8, 6], Some(&[8, 6])),
        // Quantised, and beside the language model.
        ("model.layers.0.mlp.up_proj.qweight", &[8, 6], None),
        ("model.layers.0.mlp.up_proj.weight_scale", &[8, 1], None),
        ("visual.blocks.0.mlp.up_proj.weight", &[8, 6], Some(&[8, 6])),
        (
            "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
            &[8, 6],
            Some(&[8, 6]),
        ),
    ];
    for (name, shape, expected) in cases {
        let (_directory, index) = checkpoint(&named(&[(name, shape)]));
        match (parts(&tensor_parallel(), &index, Some((1, 2))), expected) {
            (Ok(found), Some(expected)) => assert_eq!(found[0].shape(), *expected, "{name}"),
            (Err(Error::SliceRefused { .. }), None) => {}
            (found, _) => panic!("{name}: {found:?}"),
        }
    }
    // What does not divide is an error that shows the way past the preset.
    let (_directory, index) = checkpoint(&named(&[("wte.weight", &[50_257, 8])]));
    let message = parts(&tensor_parallel(), &index, Some((0, 2)))
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("50257") && message.contains("`wte.weight=whole`"),
        "{message}"
    );
}
