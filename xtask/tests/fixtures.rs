//! A generated fixture is what it says: a checkpoint of the preset, with the generator's content.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use tensora_formats::{CheckpointIndex, Format};
use xtask::fixtures::{Content, Data, Existing, Options, clean, ensure};
use xtask::presets::{Preset, find};

const TINY: [&str; 3] = ["tiny", "tiny-sharded", "tiny-moe"];

fn preset(name: &str) -> &'static Preset {
    find(name).unwrap()
}

/// Opens the fixture and checks every tensor against the preset and the generator.
fn verify(path: &Path, preset: &Preset, format: Format, seed: u64) {
    let index = CheckpointIndex::open(path).unwrap();
    assert_eq!(index.format(), format);
    let specs = preset.tensors();
    assert_eq!(index.tensors().len(), specs.len());
    for spec in &specs {
        let tensor = index
            .tensor(&spec.name)
            .unwrap_or_else(|| panic!("{} is missing", spec.name));
        assert_eq!(
            (tensor.dtype, &tensor.shape),
            (spec.dtype, &spec.shape),
            "{}",
            spec.name
        );
        assert!(tensor.is_contiguous(), "{}", spec.name);
        assert_eq!(Some(tensor.bytes), spec.bytes(), "{}", spec.name);

        let mut stored = vec![0; usize::try_from(tensor.bytes).unwrap()];
        let file = fs::File::open(&index.files()[tensor.file].path).unwrap();
        file.read_exact_at(&mut stored, tensor.offset).unwrap();
        let mut wanted = vec![0; stored.len()];
        Content::new(seed, spec).fill(0, &mut wanted);
        assert!(stored == wanted, "{}: other content", spec.name);
    }
}

#[test]
fn every_tiny_preset_opens_in_every_layout_with_the_generators_content() {
    let folder = tempfile::tempdir().unwrap();
    for name in TINY {
        for &format in Format::ALL {
            let options = Options {
                seed: 3,
                ..Options::new(folder.path())
            };
            let path = ensure(preset(name), format, &options).unwrap();
            verify(&path, preset(name), format, 3);
        }
    }
}

#[test]
fn folders_and_files_have_the_documented_names() {
    let folder = tempfile::tempdir().unwrap();
    let options = Options::new(folder.path());
    let make = |name, format| {
        let path = ensure(preset(name), format, &options).unwrap();
        let mut names: Vec<String> = fs::read_dir(&path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        (path.strip_prefix(folder.path()).unwrap().to_owned(), names)
    };
    assert_eq!(
        make("tiny", Format::Safetensors),
        (
            PathBuf::from("tiny"),
            ["config.json", "fixture.json", "model.safetensors"]
                .map(str::to_owned)
                .to_vec()
        )
    );
    let (path, names) = make("tiny-sharded", Format::Safetensors);
    assert_eq!(path, PathBuf::from("tiny-sharded"));
    assert!(
        names.contains(&"model-00003-of-00003.safetensors".to_owned()),
        "{names:?}"
    );
    assert!(
        names.contains(&"model.safetensors.index.json".to_owned()),
        "{names:?}"
    );
    let (path, names) = make("tiny", Format::ServerlessLlmStore);
    assert_eq!(path, PathBuf::from("tiny-serverlessllm-store"));
    assert!(names.contains(&"tensor_index.json".to_owned()), "{names:?}");
    let (path, names) = make("tiny", Format::ServerlessLlmPartitioned);
    assert_eq!(path, PathBuf::from("tiny-serverlessllm-partitioned"));
    assert!(names.contains(&"tensor.data_7".to_owned()), "{names:?}");
}

#[test]
fn the_same_seed_gives_the_same_files_and_another_gives_others() {
    let folder = tempfile::tempdir().unwrap();
    let file = |run: &str, seed| {
        let options = Options {
            seed,
            ..Options::new(folder.path().join(run))
        };
        let path = ensure(preset("tiny"), Format::Safetensors, &options).unwrap();
        fs::read(path.join("model.safetensors")).unwrap()
    };
    let first = file("a", 1);
    assert!(first == file("b", 1), "two runs differ");
    assert!(first != file("c", 2), "two seeds agree");
}

#[test]
fn a_complete_fixture_is_reused_and_any_other_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let options = Options::new(folder.path());
    let tiny = preset("tiny");
    let path = ensure(tiny, Format::Safetensors, &options).unwrap();
    let marker = path.join("marker");
    let generate = |options: &Options| {
        fs::write(&marker, "").unwrap();
        ensure(tiny, Format::Safetensors, options).unwrap();
        !marker.exists()
    };
    assert!(
        !generate(&options),
        "a complete fixture was generated again"
    );
    assert!(
        generate(&Options {
            existing: Existing::Replace,
            ..options.clone()
        }),
        "force did nothing"
    );
    assert!(
        generate(&Options {
            seed: 1,
            ..options.clone()
        }),
        "another seed was taken for the same"
    );
    verify(&path, tiny, Format::Safetensors, 1);

    // What an interrupted copy or a full disk leaves.
    assert!(generate(&options));
    fs::File::options()
        .write(true)
        .open(path.join("model.safetensors"))
        .unwrap()
        .set_len(100)
        .unwrap();
    assert!(
        generate(&options),
        "a truncated file was taken for complete"
    );
    fs::write(path.join("fixture.json"), "{").unwrap();
    assert!(
        generate(&options),
        "a damaged record was taken for complete"
    );
    verify(&path, tiny, Format::Safetensors, 0);
}

#[test]
fn another_number_of_partitions_is_another_fixture() {
    let folder = tempfile::tempdir().unwrap();
    for partitions in [2, 5] {
        let partitions = std::num::NonZero::new(partitions).unwrap();
        let options = Options {
            partitions,
            ..Options::new(folder.path())
        };
        let path = ensure(preset("tiny"), Format::ServerlessLlmPartitioned, &options).unwrap();
        let index = CheckpointIndex::open(&path).unwrap();
        assert_eq!(index.files().len(), partitions.get() as usize);
    }
}

#[test]
fn leftovers_of_an_interrupted_run_are_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let partial = folder.path().join(".tiny.partial");
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join("model.safetensors"), "half").unwrap();
    let path = ensure(
        preset("tiny"),
        Format::Safetensors,
        &Options::new(folder.path()),
    )
    .unwrap();
    verify(&path, preset("tiny"), Format::Safetensors, 0);
    assert!(!partial.exists());
}

#[test]
fn a_folder_that_is_no_fixture_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let other = folder.path().join("tiny");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("precious"), "x").unwrap();
    let options = Options {
        existing: Existing::Replace,
        ..Options::new(folder.path())
    };
    let error = ensure(preset("tiny"), Format::Safetensors, &options).unwrap_err();
    assert!(error.to_string().contains("is no fixture"), "{error}");
    clean(folder.path(), &[]).unwrap();
    assert!(other.join("precious").exists());
}

#[test]
fn sparse_fixtures_have_headers_and_lengths_and_take_no_space() {
    let folder = tempfile::tempdir().unwrap();
    let options = Options {
        data: Data::Sparse,
        ..Options::new(folder.path())
    };
    let model = preset("mistral-7b-v0.3");
    let path = ensure(model, Format::Safetensors, &options).unwrap();
    assert_eq!(path, folder.path().join("mistral-7b-v0.3-sparse"));
    let index = CheckpointIndex::open(&path).unwrap();
    // The second copy stands beside the shards and is not part of the checkpoint.
    assert_eq!(
        (index.tensors().len(), index.data_bytes()),
        (291, 14_496_047_104)
    );
    assert_eq!(index.files().len(), 3);
    let copy = CheckpointIndex::open(path.join("consolidated.safetensors")).unwrap();
    assert_eq!(
        (copy.tensors().len(), copy.data_bytes()),
        (291, 14_496_047_104)
    );

    let stored: u64 = fs::read_dir(&path)
        .unwrap()
        .map(|entry| entry.unwrap().metadata().unwrap().blocks() * 512)
        .sum();
    assert!(stored < 4 << 20, "{stored} bytes on disk");
}

#[test]
fn cleaning_removes_what_is_named_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let options = Options::new(folder.path());
    let tiny = ensure(preset("tiny"), Format::Safetensors, &options).unwrap();
    let store = ensure(preset("tiny"), Format::ServerlessLlmStore, &options).unwrap();
    let sharded = ensure(preset("tiny-sharded"), Format::Safetensors, &options).unwrap();
    let partial = folder.path().join(".tiny.partial");
    fs::create_dir(&partial).unwrap();
    let real = folder.path().join("real");
    fs::create_dir(&real).unwrap();

    clean(folder.path(), &[preset("tiny")]).unwrap();
    let left = [&tiny, &store, &sharded, &partial, &real].map(|path| path.exists());
    assert_eq!(left, [false, false, true, false, true]);
    clean(folder.path(), &[]).unwrap();
    assert!(!sharded.exists() && real.exists());
    clean(&folder.path().join("absent"), &[]).unwrap();
}
