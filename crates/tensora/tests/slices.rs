//! Slices read what they need, and the parts of all ranks put together are the whole.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Expected, LAYOUTS, expected, write};
use proptest::prelude::*;
use tensora::{
    BackendKind, Checkpoint, Dtype, Error, Loader, MappingPermit, MemoryChoice, SliceRule,
};

fn rule(text: &str) -> SliceRule {
    text.parse().unwrap()
}

/// A range of one dimension, element by element.
fn naive(
    data: &[u8],
    shape: &[u64],
    dim: usize,
    range: std::ops::Range<u64>,
    bits: u64,
) -> Vec<u8> {
    let elements: u64 = shape.iter().product();
    let inner: u64 = shape[dim + 1..].iter().product();
    let item = usize::try_from(bits / 8).unwrap();
    let mut kept = Vec::new();
    for element in 0..elements {
        if range.contains(&(element / inner % shape[dim])) {
            let at = usize::try_from(element).unwrap() * item;
            kept.extend_from_slice(&data[at..at + item]);
        }
    }
    kept
}

fn assert_part(
    checkpoint: &Checkpoint,
    expected: &Expected,
    name: &str,
    dim: usize,
    range: std::ops::Range<u64>,
) {
    let (dtype, shape, data) = &expected[name];
    let tensor = checkpoint.tensor(name).unwrap();
    let mut wanted = shape.clone();
    wanted[dim] = range.end - range.start;
    let found: Vec<u64> = tensor.shape().iter().map(|&d| d as u64).collect();
    assert_eq!(found, wanted, "{name}");
    let wanted = naive(data, shape, dim, range, u64::from(dtype.bits()));
    assert!(tensor.bytes()[..] == wanted[..], "{name}: other bytes");
    assert!(tensor.is_contiguous());
}

#[test]
fn ranges_of_rows_and_columns_come_out_of_every_layout_and_backend() {
    let expected = expected();
    for layout in LAYOUTS {
        let directory = tempfile::tempdir().unwrap();
        write(&expected, layout, directory.path());
        for kind in [None].into_iter().chain(BackendKind::ALL.map(Some)) {
            let mut loader = Loader::new()
                .chunk_bytes(64 << 10)
                .slice(rule("model.embed_tokens.weight=dim:1,range:500..577"))
                .slice(rule("model.layers.*.mlp.weight=dim:0,range:3..20"))
                .slice(rule(
                    "re:model\\.layers\\.[0-9]\\.norm\\.weight=dim:-1,range:0..0",
                ));
            if let Some(kind) = kind {
                loader = loader.backend(kind);
            }
            let checkpoint = match loader.load(directory.path()) {
                Ok(checkpoint) => checkpoint,
                Err(Error::Plan(error)) if error.to_string().contains("cannot run") => {
                    common::skip(&error.to_string());
                    continue;
                }
                Err(error) => panic!("{layout}, {kind:?}: {error}"),
            };
            assert_eq!(checkpoint.len(), expected.len());
            assert_part(
                &checkpoint,
                &expected,
                "model.embed_tokens.weight",
                1,
                500..577,
            );
            for layer in 0..12 {
                let name = |what: &str| format!("model.layers.{layer}.{what}");
                assert_part(&checkpoint, &expected, &name("mlp.weight"), 0, 3..20);
                let norm = if layer < 10 { 0..0 } else { 0..129 };
                assert_part(&checkpoint, &expected, &name("norm.weight"), 0, norm);
                assert_part(&checkpoint, &expected, &name("mask"), 0, 0..7);
            }
            assert!(checkpoint.tensor("scalar").unwrap().shape().is_empty());
        }
    }
}

#[test]
fn row_slices_read_no_more_than_they_need() {
    let directory = tempfile::tempdir().unwrap();
    let expected = expected();
    write(&expected, LAYOUTS[0], directory.path());
    let checkpoint = Loader::new()
        .backend(BackendKind::Sync)
        .select_names(["model.embed_tokens.weight"])
        .slice(rule("*=dim:0,rank:2/8,remainder:last"))
        .load(directory.path())
        .unwrap();
    let row = 577 * 2;
    assert_part(
        &checkpoint,
        &expected,
        "model.embed_tokens.weight",
        0,
        256..384,
    );
    let report = checkpoint.report();
    assert_eq!(report.data_bytes, 128 * row);
    assert_eq!(report.stats.bytes, 128 * row);
    assert_eq!(report.plan.workload.needed_bytes, 128 * row);
    assert_eq!(report.plan.workload.read_bytes, 128 * row);
    let slices = report.plan.decisions.iter().find(|d| d.field == "slices");
    assert!(slices.is_some(), "{}", report.plan);
}

#[test]
fn mapped_rows_are_used_where_they_are() {
    let directory = tempfile::tempdir().unwrap();
    let expected = expected();
    write(&expected, LAYOUTS[0], directory.path());
    // SAFETY: the test writes its files before it maps them and never afterwards.
    let permit = unsafe { MappingPermit::new() };
    let loader = Loader::new()
        .allow_mapping(permit)
        .memory(MemoryChoice::Mapped)
        .select_names(["model.embed_tokens.weight"]);
    let rows = loader.clone().slice(rule("*=dim:0,range:7..1000"));
    let checkpoint = rows.load(directory.path()).unwrap();
    assert_part(
        &checkpoint,
        &expected,
        "model.embed_tokens.weight",
        0,
        7..1000,
    );
    assert_eq!(checkpoint.report().stats.bytes, 0);
    // Columns cannot be shown by a mapping, and what was asked for is not replaced.
    let columns = loader.slice(rule("*=dim:1,range:7..100"));
    let error = columns.load(directory.path()).unwrap_err().to_string();
    assert!(error.contains("mapped"), "{error}");
}

#[test]
fn rules_that_do_not_fit_are_errors_with_a_way_out() {
    let directory = tempfile::tempdir().unwrap();
    write(&expected(), LAYOUTS[0], directory.path());
    let refusal = |text: &str| {
        let loader = Loader::new().slice(rule(text));
        loader.load(directory.path()).unwrap_err().to_string()
    };
    let uneven = refusal("model.embed_tokens.weight=dim:0,rank:0/8");
    assert!(
        uneven.contains("1031") && uneven.contains("remainder:last"),
        "{uneven}"
    );
    let outside = refusal("model.embed_tokens.weight=dim:0,range:5..2000");
    assert!(outside.contains("1031"), "{outside}");
    let dimension = refusal("ids=dim:1,range:0..1");
    assert!(dimension.contains("\"ids\""), "{dimension}");
    let nothing = refusal("nothing.*=dim:0,range:0..1");
    assert!(nothing.contains("nothing.*"), "{nothing}");
    let no_rank = refusal("ids=dim:0");
    assert!(no_rank.contains("rank"), "{no_rank}");
}

/// The parts of every rank along one dimension, as they would be concatenated.
fn concatenate(parts: &[Vec<u8>], shapes: &[Vec<usize>], dim: usize, item: usize) -> Vec<u8> {
    let outer: usize = shapes[0][..dim].iter().product();
    let mut whole = Vec::new();
    for row in 0..outer {
        for (part, shape) in parts.iter().zip(shapes) {
            let len = shape[dim..].iter().product::<usize>() * item;
            whole.extend_from_slice(&part[row * len..(row + 1) * len]);
        }
    }
    whole
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Loads of every rank of a random world, of tensors of random dtypes and shapes, put together again.
    #[test]
    fn the_parts_of_all_ranks_are_the_whole(
        tensors in prop::collection::vec(
            (
                prop::sample::select(vec![Dtype::U8, Dtype::BF16, Dtype::F32, Dtype::C64]),
                prop::collection::vec(1_u64..40, 1..4),
            ),
            1..6,
        ),
        layout in prop::sample::select(LAYOUTS.to_vec()),
        world in 1_u32..6,
        dim in 0_usize..3,
        limit in prop::sample::select(vec![None, Some(4_u64 << 20)]),
    ) {
        let mut seed = 17_u8;
        let expected: Expected = tensors.into_iter().enumerate().map(|(number, (dtype, shape))| {
            let bytes = dtype.bytes_for(shape.iter().product()).unwrap();
            let data = (0..bytes).map(|_| {
                seed = seed.wrapping_mul(73).wrapping_add(41);
                seed
            }).collect();
            (format!("t{number}"), (dtype, shape, data))
        }).collect();
        // The partitioned dialect wants a tensor of each dtype name it knows; C64 is not among them.
        let expected: Expected = expected.into_iter()
            .filter(|(_, (dtype, ..))| layout.contains("SafeTensors") || *dtype != Dtype::C64)
            .collect();
        prop_assume!(!expected.is_empty());
        let directory = tempfile::tempdir().unwrap();
        write(&expected, layout, directory.path());

        let ranks: Vec<Checkpoint> = (0..world).map(|rank| {
            let mut loader = Loader::new().rank(rank, world);
            for (name, (_, shape, _)) in &expected {
                if dim < shape.len() {
                    loader = loader.slice(rule(&format!("{name}=dim:{dim},remainder:last")));
                }
            }
            if let Some(limit) = limit {
                loader = loader.memory_limit_bytes(limit);
            }
            loader.load(directory.path()).unwrap()
        }).collect();
        for (name, (dtype, shape, data)) in &expected {
            let parts: Vec<Vec<u8>> =
                ranks.iter().map(|rank| rank.tensor(name).unwrap().bytes().to_vec()).collect();
            let shapes: Vec<Vec<usize>> =
                ranks.iter().map(|rank| rank.tensor(name).unwrap().shape().to_vec()).collect();
            if dim < shape.len() {
                let item = dtype.bits() as usize / 8;
                let whole = concatenate(&parts, &shapes, dim, item);
                prop_assert!(whole == *data, "{}", name);
            } else {
                prop_assert!(parts.iter().all(|part| part == data), "{}", name);
            }
        }
    }
}
