//! What differs is found and named; what does not is not.

// Outside test functions the lint asks for more, but a test helper fails its test just so.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use common::{FORMATS, Record, View, holds, write};
use proptest::prelude::*;
use sha2::{Digest as _, Sha256};
use tensora_convert::{
    Check, CheckOutcome, CheckSubject, CheckedBy, Checksums, ConvertOptions, Difference, Error,
    Reading, SIDECAR_NAME, SharedTensors, StoredTensor, Verification, VerifyOptions,
    content_digest,
};
use tensora_formats::{CheckpointIndex, DamagedTensors, Dtype, Format, Note, OpenOptions};
use tensora_io::{
    Backend, BackendKind, CancelToken, Control, DirectPolicy, ReadRequest, ReadStats,
    ResidentPolicy, TransferParams, backend, merge_ranges,
};

fn open(path: &Path) -> CheckpointIndex {
    CheckpointIndex::open(path).unwrap()
}

/// The records as a checkpoint in a new directory below `root`.
fn written(root: &Path, name: &str, records: &[Record], format: Format) -> CheckpointIndex {
    let path = root.join(name);
    write(&path, records, format, 2);
    open(&path)
}

fn check(index: &CheckpointIndex) -> Verification {
    VerifyOptions::new().check(index, &Control::new()).unwrap()
}

fn differences(left: &CheckpointIndex, right: &CheckpointIndex) -> Vec<Difference> {
    let options = VerifyOptions::new();
    let comparison = options.compare(left, right, &Control::new()).unwrap();
    assert_eq!(
        comparison.is_equal(),
        comparison.left.content() == comparison.right.content()
    );
    comparison.differences
}

/// Small tensors, one of some megabytes, a scalar and an empty one.
fn records() -> Vec<Record> {
    vec![
        Record::plain("bias", Dtype::BF16, &[5], 1),
        Record::plain("empty", Dtype::I64, &[0, 4], 2),
        Record::plain("scalar", Dtype::F32, &[], 3),
        Record::plain("weight", Dtype::BF16, &[1500, 1001], 4),
        Record::plain("zero point", Dtype::U8, &[3, 7], 5),
    ]
}

/// A transposed matrix larger than any buffer that gathers, and one that shares its bytes with another.
fn store_records() -> Vec<Record> {
    let mut records = records();
    records.push(Record::strided(
        "transposed",
        Dtype::F16,
        &[700, 900],
        &[1, 700],
        8,
        6,
    ));
    records.push(Record::plain("head", Dtype::F32, &[31, 3], 7).tied("tied"));
    records
}

/// A sidecar written from the description of the format.
fn write_sidecar(directory: &Path, records: &[Record]) -> BTreeMap<String, String> {
    let tensors = common::tensors(records);
    let digests: BTreeMap<String, String> = tensors
        .iter()
        .map(|(name, tensor)| (name.clone(), blake3::hash(&tensor.data).to_string()))
        .collect();
    let entries: serde_json::Map<String, serde_json::Value> = tensors
        .iter()
        .map(|(name, tensor)| {
            let entry = serde_json::json!({
                "dtype": tensor.dtype.name(),
                "shape": tensor.shape,
                "blake3": digests[name],
            });
            (name.clone(), entry)
        })
        .collect();
    let sidecar = serde_json::json!({
        "format": "tensora-checksums",
        "version": 1,
        "content_digest": common::digest(&tensors),
        "tensors": entries,
    });
    fs::write(directory.join(SIDECAR_NAME), sidecar.to_string()).unwrap();
    digests
}

/// Flips a bit of a file as a device does: nothing says that the file was written to.
fn flip(path: &Path, offset: u64) {
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], offset).unwrap();
    file.set_modified(modified).unwrap();
}

/// Flips a bit of a tensor, which is contiguous, at this offset.
fn flip_in(index: &CheckpointIndex, tensor: &str, offset: u64) {
    let entry = index.tensor(tensor).unwrap();
    flip(&index.files()[entry.file].path, entry.offset + offset);
}

/// The outcomes that are no match, by the name of what was checked.
fn failures(verification: &Verification) -> Vec<(&str, &CheckOutcome)> {
    let failed = |check: &&Check| !check.outcome.is_match();
    verification
        .checks
        .iter()
        .filter(failed)
        .map(|check| match &check.subject {
            CheckSubject::Tensor(name) | CheckSubject::File(name) => {
                (name.as_str(), &check.outcome)
            }
            other => panic!("{other}"),
        })
        .collect()
}

#[test]
fn digests_are_those_of_the_definition_in_every_format() {
    let directory = tempfile::tempdir().unwrap();
    for format in FORMATS {
        let records = match format {
            Format::Safetensors => records(),
            _ => store_records(),
        };
        let index = written(directory.path(), &format.to_string(), &records, format);
        let hashed = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&hashed);
        let control = Control::new().with_progress(move |bytes| {
            counter.fetch_add(bytes, Ordering::Relaxed);
        });
        let digests = VerifyOptions::new().digests(&index, &control).unwrap();
        let tensors = common::tensors(&records);
        assert_eq!(digests.content().to_string(), common::digest(&tensors));
        assert!(digests.tensors().keys().eq(tensors.keys()));
        let mut data_bytes = 0;
        for (name, tensor) in &tensors {
            let found = &digests.tensors()[name];
            assert_eq!((found.dtype, &found.shape), (tensor.dtype, &tensor.shape));
            assert_eq!(
                found.digest.as_bytes(),
                blake3::hash(&tensor.data).as_bytes()
            );
            data_bytes += tensor.data.len() as u64;
        }
        assert_eq!(hashed.load(Ordering::Relaxed), data_bytes);
        assert_eq!(VerifyOptions::work_bytes(&index), data_bytes);

        let stored = records.iter().flat_map(|record| {
            record.views.iter().map(|view| StoredTensor {
                name: &view.name,
                dtype: view.dtype,
                shape: &view.shape,
                strides: view.strides.as_deref(),
                bytes: &record.bytes,
            })
        });
        let threads = std::num::NonZero::<usize>::MIN;
        let in_memory = content_digest(stored, threads, &Control::new()).unwrap();
        assert_eq!(digests.content(), in_memory);
    }
}

#[test]
fn formats_with_the_same_tensors_do_not_differ() {
    let directory = tempfile::tempdir().unwrap();
    let indexes =
        FORMATS.map(|format| written(directory.path(), &format.to_string(), &records(), format));
    for left in &indexes {
        for right in &indexes {
            assert_eq!(differences(left, right), []);
        }
    }
}

#[test]
fn each_kind_of_difference_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let left = written(directory.path(), "left", &records(), Format::Safetensors);
    let mut other = records();
    other[0] = Record::plain("new", Dtype::BF16, &[5], 1);
    other[2].views[0].dtype = Dtype::I32;
    other[3].views[0].shape = vec![1001, 1500];
    other[4].bytes[20] ^= 1;
    let right = written(
        directory.path(),
        "right",
        &other,
        Format::ServerlessLlmStore,
    );

    let found = differences(&left, &right);
    let shown: Vec<String> = found.iter().map(ToString::to_string).collect();
    let byte = records()[4].bytes[20];
    assert_eq!(
        shown,
        [
            r#""bias": only in the left checkpoint"#.to_owned(),
            r#""new": only in the right checkpoint"#.to_owned(),
            r#""scalar": F32 on the left, I32 on the right"#.to_owned(),
            r#""weight": [1500, 1001] on the left, [1001, 1500] on the right"#.to_owned(),
            format!(
                r#""zero point": its bytes differ, first byte 20, in element [2, 6]: 0x{byte:02x} on the left, 0x{:02x} on the right"#,
                byte ^ 1
            ),
        ]
    );
}

#[test]
fn the_first_byte_that_differs_is_found_wherever_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let left = written(directory.path(), "left", &records(), Format::Safetensors);
    let bytes = left.tensor("weight").unwrap().bytes;
    for (number, offset) in [0, 1, bytes / 2 + 3, bytes - 1].into_iter().enumerate() {
        let right = written(
            directory.path(),
            &number.to_string(),
            &records(),
            Format::Safetensors,
        );
        flip_in(&right, "weight", offset);
        // A later byte is not the first.
        if offset < bytes - 1 {
            flip_in(&right, "weight", bytes - 1);
        }
        // With little memory, it comes in many pieces.
        for limit in [ConvertOptions::MIN_MEMORY_LIMIT_BYTES, 64 << 20] {
            let options = VerifyOptions::new().memory_limit_bytes(limit);
            let found = options.compare(&left, &right, &Control::new()).unwrap();
            let [
                Difference::Bytes {
                    tensor,
                    first: Some(first),
                },
            ] = found.differences.as_slice()
            else {
                panic!("{:?}", found.differences);
            };
            assert_eq!((tensor.as_str(), first.offset), ("weight", offset));
            assert_eq!(first.element, [offset / 2 / 1001, offset / 2 % 1001]);
            let byte = records()[3].bytes[usize::try_from(offset).unwrap()];
            assert_eq!((first.left, first.right), (byte, byte ^ 0x10));
        }
    }
}

#[test]
fn the_first_byte_that_differs_is_found_in_row_major_order() {
    let directory = tempfile::tempdir().unwrap();
    let (rows, columns) = (700, 900);
    let strided = Record::strided("t", Dtype::F16, &[rows, columns], &[1, rows], 0, 9);
    let tensors = common::tensors(std::slice::from_ref(&strided));
    let gathered = Record {
        bytes: tensors["t"].data.clone(),
        views: vec![View {
            strides: None,
            ..strided.views[0].clone()
        }],
    };
    let left = written(directory.path(), "left", &[gathered], Format::Safetensors);
    for (row, column) in [(0, 0), (0, 1), (350, 449), (rows - 1, columns - 1)] {
        let mut changed = strided.clone();
        let stored = usize::try_from((column * rows + row) * 2 + 1).unwrap();
        changed.bytes[stored] ^= 0x80;
        // Before it as it is stored, after it in row-major order.
        if row + 1 < rows && column > 0 {
            changed.bytes[usize::try_from((row + 1) * 2).unwrap()] ^= 0x80;
        }
        let name = format!("{row}-{column}");
        let right = written(
            directory.path(),
            &name,
            &[changed],
            Format::ServerlessLlmStore,
        );
        for limit in [ConvertOptions::MIN_MEMORY_LIMIT_BYTES, 64 << 20] {
            let options = VerifyOptions::new().memory_limit_bytes(limit);
            let found = options.compare(&left, &right, &Control::new()).unwrap();
            let [
                Difference::Bytes {
                    first: Some(first), ..
                },
            ] = found.differences.as_slice()
            else {
                panic!("{:?}", found.differences);
            };
            assert_eq!(first.offset, (row * columns + column) * 2 + 1);
            assert_eq!(first.element, [row, column]);
        }
    }
}

#[test]
fn only_the_first_few_are_located_and_all_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let count = VerifyOptions::MAX_LOCATED + 3;
    let make = |seed: u64| -> Vec<Record> {
        (0..count as u64)
            .map(|number| Record::plain(&format!("{number:03}"), Dtype::U8, &[64], number + seed))
            .collect()
    };
    let left = written(directory.path(), "left", &make(1), Format::Safetensors);
    let right = written(directory.path(), "right", &make(1000), Format::Safetensors);
    let found = differences(&left, &right);
    assert_eq!(found.len(), count);
    for (number, difference) in found.iter().enumerate() {
        let Difference::Bytes { tensor, first } = difference else {
            panic!("{difference}");
        };
        assert_eq!(*tensor, format!("{number:03}"));
        assert_eq!(first.is_some(), number < VerifyOptions::MAX_LOCATED);
    }
}

#[test]
fn a_checkpoint_of_which_nothing_is_known_is_read_and_sound() {
    let directory = tempfile::tempdir().unwrap();
    let index = written(directory.path(), "a", &records(), Format::Safetensors);
    let verification = check(&index);
    assert_eq!(
        (verification.checks.len(), verification.damaged.len()),
        (0, 0)
    );
    assert!(verification.is_sound());
    let tensors = common::tensors(&records());
    assert_eq!(
        verification.digests.content().to_string(),
        common::digest(&tensors)
    );
}

#[test]
fn a_sidecar_that_agrees_matches_tensor_by_tensor() {
    let directory = tempfile::tempdir().unwrap();
    for format in FORMATS {
        let index = written(directory.path(), &format.to_string(), &records(), format);
        write_sidecar(index.root(), &records());
        let verification = check(&index);
        assert!(verification.is_sound());
        let subjects: Vec<_> = verification
            .checks
            .iter()
            .map(ToString::to_string)
            .collect();
        let names = ["bias", "empty", "scalar", "weight", "zero point"];
        assert_eq!(
            subjects,
            names.map(|name| format!("{name:?}: matches tensora.blake3"))
        );
        assert!(
            verification
                .checks
                .iter()
                .all(|check| check.by == CheckedBy::Sidecar)
        );
    }
}

#[test]
fn what_a_conversion_writes_down_is_what_a_check_finds() {
    let directory = tempfile::tempdir().unwrap();
    let source = written(
        directory.path(),
        "source",
        &store_records(),
        Format::ServerlessLlmStore,
    );
    for format in FORMATS {
        let target = directory.path().join(format.to_string());
        let plan = ConvertOptions::new(format)
            .checksums(Checksums::Write)
            .shared_tensors(match format {
                Format::Safetensors => SharedTensors::Duplicate,
                _ => SharedTensors::Refuse,
            })
            .plan(&source, &target)
            .unwrap();
        plan.run(&Control::new()).unwrap();
        let index = open(&target);
        let verification = check(&index);
        assert!(verification.is_sound(), "{:?}", failures(&verification));
        assert_eq!(verification.checks.len(), source.tensors().len());
        assert_eq!(differences(&source, &index), []);

        flip_in(&index, "transposed", 1_000_000);
        let verification = check(&index);
        let failed = failures(&verification);
        assert!(
            matches!(failed[..], [("transposed", CheckOutcome::Differs { .. })]),
            "{failed:?}"
        );
    }
}

#[test]
fn a_sidecar_finds_a_flipped_bit_in_any_tensor() {
    let directory = tempfile::tempdir().unwrap();
    for (number, record) in records()
        .iter()
        .enumerate()
        .filter(|(_, record)| !record.bytes.is_empty())
    {
        let format = FORMATS[number % FORMATS.len()];
        let index = written(directory.path(), &number.to_string(), &records(), format);
        let digests = write_sidecar(index.root(), &records());
        let name = &record.views[0].name;
        flip_in(&index, name, record.bytes.len() as u64 - 1);
        let verification = check(&index);
        assert!(!verification.is_sound());
        let [(failed, CheckOutcome::Differs { expected, actual })] = failures(&verification)[..]
        else {
            panic!("{:?}", failures(&verification));
        };
        assert_eq!(
            (failed, expected.to_string()),
            (name.as_str(), digests[name].clone())
        );
        assert_eq!(*actual, verification.digests.tensors()[name].digest);
        assert_ne!(actual, expected);
        let shown = verification
            .checks
            .iter()
            .find(|check| !check.outcome.is_match())
            .unwrap();
        assert_eq!(
            shown.to_string(),
            format!("{name:?}: BLAKE3 is {actual}, but {expected} by tensora.blake3")
        );
    }
}

#[test]
fn a_sidecar_of_other_tensors_says_what_is_missing_unlisted_and_other() {
    let directory = tempfile::tempdir().unwrap();
    let index = written(directory.path(), "a", &records(), Format::Safetensors);
    let mut other = records();
    other[0].views[0].name = "elsewhere".to_owned();
    other[2].views[0].dtype = Dtype::U32;
    other[4].views[0].shape = vec![7, 3];
    write_sidecar(index.root(), &other);
    let verification = check(&index);
    assert!(!verification.is_sound());
    let failed: BTreeMap<_, _> = failures(&verification).into_iter().collect();
    let expected = BTreeMap::from([
        ("bias", CheckOutcome::NotListed),
        ("elsewhere", CheckOutcome::Missing),
        (
            "scalar",
            CheckOutcome::DtypeDiffers {
                expected: Dtype::U32,
                actual: Dtype::F32,
            },
        ),
        (
            "zero point",
            CheckOutcome::ShapeDiffers {
                expected: vec![7, 3],
                actual: vec![3, 7],
            },
        ),
    ]);
    assert!(
        failed
            .iter()
            .map(|(name, outcome)| (*name, (*outcome).clone()))
            .eq(expected)
    );
    let shown: Vec<String> = verification
        .checks
        .iter()
        .filter(|check| !check.outcome.is_match())
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        shown,
        [
            "\"bias\": not listed by tensora.blake3",
            "\"elsewhere\": missing, but listed by tensora.blake3",
            "\"scalar\": dtype is F32, but U32 by tensora.blake3",
            "\"zero point\": shape is [3, 7], but [7, 3] by tensora.blake3",
        ]
    );
}

#[test]
fn a_damaged_sidecar_is_an_error_before_anything_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let index = written(directory.path(), "a", &records(), Format::Safetensors);
    write_sidecar(index.root(), &records());
    let path = index.root().join(SIDECAR_NAME);
    let text = fs::read_to_string(&path).unwrap();
    let digit = text.find("\"blake3\":\"").unwrap() + 10;
    let other = if text[digit..].starts_with('0') {
        "1"
    } else {
        "0"
    };
    fs::write(
        &path,
        format!("{}{other}{}", &text[..digit], &text[digit + 1..]),
    )
    .unwrap();

    let control = Control::new().with_progress(|bytes| panic!("{bytes} bytes were read"));
    let error = VerifyOptions::new().check(&index, &control).unwrap_err();
    let shown = error.to_string();
    assert!(
        matches!(&error, Error::Sidecar { path: named, .. } if *named == path),
        "{shown}"
    );
    for part in [path.to_str().unwrap(), "damaged or edited", "remove it"] {
        assert!(shown.contains(part), "{shown}");
    }
}

#[test]
fn one_shard_of_many_lacks_nothing_that_its_directory_holds() {
    let directory = tempfile::tempdir().unwrap();
    let all = written(directory.path(), "a", &records(), Format::Safetensors);
    assert!(all.files().len() > 1);
    write_sidecar(all.root(), &records());
    for file in all.files() {
        let shard = open(&file.path);
        let verification = check(&shard);
        assert!(verification.is_sound(), "{:?}", failures(&verification));
        assert_eq!(verification.checks.len(), shard.tensors().len());
    }
    // What no file of the directory holds is missing all the same.
    let mut more = records();
    more.push(Record::plain("lost", Dtype::U8, &[1], 0));
    write_sidecar(all.root(), &more);
    let verification = check(&open(&all.files()[0].path));
    assert_eq!(failures(&verification), [("lost", &CheckOutcome::Missing)]);
}

/// A cache as Hugging Face's libraries keep it: blobs by digest, a snapshot of links to them.
#[cfg(unix)]
fn write_cache(root: &Path, records: &[Record]) -> CheckpointIndex {
    use std::os::unix::fs::symlink;

    let plain = root.join("plain");
    write(&plain, records, Format::Safetensors, 3);
    let repository = root.join("models--org--name");
    let snapshot = repository.join("snapshots/0123456789abcdef0123456789abcdef01234567");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(repository.join("blobs")).unwrap();
    fs::create_dir_all(repository.join("refs")).unwrap();
    fs::write(
        repository.join("refs/main"),
        "0123456789abcdef0123456789abcdef01234567",
    )
    .unwrap();
    for entry in fs::read_dir(&plain).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let sha256 = Sha256::digest(fs::read(&path).unwrap());
        let mut blob: String = sha256.iter().map(|byte| format!("{byte:02x}")).collect();
        if !name.ends_with(".safetensors") {
            // A small file is a Git object, with a SHA-1.
            blob.truncate(40);
        }
        fs::rename(&path, repository.join("blobs").join(&blob)).unwrap();
        symlink(format!("../../blobs/{blob}"), snapshot.join(name)).unwrap();
    }
    open(&repository)
}

#[cfg(unix)]
#[test]
fn blobs_of_a_cache_are_held_against_their_names() {
    let directory = tempfile::tempdir().unwrap();
    let index = write_cache(directory.path(), &records());
    assert!(index.files().len() > 1);
    let tensors = common::tensors(&records());
    let options = VerifyOptions::new();
    for limit in [ConvertOptions::MIN_MEMORY_LIMIT_BYTES, 256 << 20] {
        let hashed = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&hashed);
        let control = Control::new().with_progress(move |bytes| {
            counter.fetch_add(bytes, Ordering::Relaxed);
        });
        let options = options.clone().memory_limit_bytes(limit);
        let verification = options.check(&index, &control).unwrap();
        assert!(verification.is_sound(), "{:?}", failures(&verification));
        // In the one pass over the files, tensors were digested too.
        assert_eq!(
            verification.digests.content().to_string(),
            common::digest(&tensors)
        );
        assert_eq!(
            hashed.load(Ordering::Relaxed),
            VerifyOptions::work_bytes(&index)
        );
        assert_eq!(verification.checks.len(), index.files().len());
        for (check, file) in verification.checks.iter().zip(index.files()) {
            assert_eq!(check.subject, CheckSubject::File(file.name.clone()));
            assert_eq!(
                check.to_string(),
                format!("{}: matches the name of its blob", file.name)
            );
        }
    }

    // Anywhere in any file: in its header's padding or white space, its first and its last tensor.
    write_sidecar(index.root(), &records());
    for (number, file) in index.files().iter().enumerate() {
        let flipped = file.bytes - 1;
        flip(&file.path, flipped);
        let verification = check(&index);
        let failed = failures(&verification);
        let [
            (name, CheckOutcome::Differs { expected, actual }),
            (tensor, CheckOutcome::Differs { .. }),
        ] = failed[..]
        else {
            panic!("{failed:?}");
        };
        let blob = fs::read_link(&file.path).unwrap();
        assert_eq!(name, file.name);
        assert_eq!(
            expected.to_string(),
            blob.file_name().unwrap().to_str().unwrap()
        );
        let sha256 = Sha256::digest(fs::read(&file.path).unwrap());
        assert_eq!(actual.as_bytes()[..], sha256[..]);
        assert_eq!(index.tensor(tensor).unwrap().file, number);
        assert!(index.tensor(tensor).unwrap().range().contains(&flipped));
        flip(&file.path, flipped);
        assert!(check(&index).is_sound());
    }
}

#[cfg(unix)]
#[test]
fn strided_and_shared_tensors_in_blobs_are_digested_too() {
    use std::os::unix::fs::symlink;

    let directory = tempfile::tempdir().unwrap();
    let store = written(
        directory.path(),
        "store",
        &store_records(),
        Format::ServerlessLlmStore,
    );
    // The first partition becomes a blob; the others stay files.
    let partition = &store.files()[0].path;
    let sha256 = Sha256::digest(fs::read(partition).unwrap());
    let blob: String = sha256.iter().map(|byte| format!("{byte:02x}")).collect();
    let blobs = directory.path().join("blobs");
    fs::create_dir(&blobs).unwrap();
    fs::rename(partition, blobs.join(&blob)).unwrap();
    symlink(format!("../blobs/{blob}"), partition).unwrap();
    let index = open(&directory.path().join("store"));
    let verification = check(&index);
    assert_eq!(verification.checks.len(), 1);
    assert!(verification.is_sound());
    let tensors = common::tensors(&store_records());
    assert_eq!(
        verification.digests.content().to_string(),
        common::digest(&tensors)
    );
}

#[test]
fn damaged_partitions_are_reported_tensor_by_tensor_and_the_rest_is_checked() {
    let directory = tempfile::tempdir().unwrap();
    for format in [Format::ServerlessLlmStore, Format::ServerlessLlmPartitioned] {
        let index = written(
            directory.path(),
            &format.to_string(),
            &store_records(),
            format,
        );
        write_sidecar(index.root(), &store_records());
        flip_in(&index, "bias", 3);
        let last = index.files().last().unwrap();
        let cut = index
            .tensors()
            .iter()
            .filter(|tensor| index.files()[tensor.file] == *last && tensor.bytes > 0)
            .map(|tensor| tensor.range().end)
            .max()
            .unwrap()
            - 1;
        fs::OpenOptions::new()
            .write(true)
            .open(&last.path)
            .and_then(|file| file.set_len(cut))
            .unwrap();

        let tolerant = OpenOptions::default().damaged_tensors(DamagedTensors::LeaveOut);
        let damaged = tolerant.open(index.root()).unwrap();
        let verification = check(&damaged);
        assert!(!verification.is_sound());
        let [Note::Damaged { file, tensors, .. }] = verification.damaged.as_slice() else {
            panic!("{:?}", verification.damaged);
        };
        assert_eq!(*file, last.name);
        assert!(!tensors.is_empty());
        for tensor in tensors {
            assert_eq!(tensor.range.end, cut + 1);
            assert!(!verification.digests.tensors().contains_key(&tensor.name));
        }
        // A damaged tensor is not missing, too; all others are checked.
        let failed = failures(&verification);
        assert!(
            matches!(failed[..], [("bias", CheckOutcome::Differs { .. })]),
            "{failed:?}"
        );
        let all: usize = store_records()
            .iter()
            .map(|record| record.views.len())
            .sum();
        assert_eq!(verification.checks.len() + tensors.len(), all);
        // What is damaged is enough to fail.
        write_sidecar(index.root(), &store_records()[..1]);
        assert!(!check(&damaged).is_sound());
    }
}

/// Notes where reads go, and fails one of them.
#[derive(Debug)]
struct Watched {
    inner: Box<dyn Backend>,
    memory: Mutex<Vec<Range<u64>>>,
    failing: Option<u64>,
    batches: AtomicU64,
}

impl Watched {
    /// Fails the batch of this number.
    fn new(failing: Option<u64>) -> Arc<Self> {
        Arc::new(Self {
            inner: backend(BackendKind::Sync).unwrap(),
            memory: Mutex::default(),
            failing,
            batches: AtomicU64::new(0),
        })
    }

    /// How many bytes of memory were read into since this was last asked.
    fn take_memory_bytes(&self) -> u64 {
        let ranges = std::mem::take(&mut *self.memory.lock().unwrap());
        let merged = merge_ranges(ranges, 0);
        merged.iter().map(|range| range.end - range.start).sum()
    }
}

impl Backend for Watched {
    fn kind(&self) -> BackendKind {
        self.inner.kind()
    }

    fn read(
        &self,
        mut requests: Vec<ReadRequest<'_>>,
        params: &TransferParams,
        control: &Control,
    ) -> tensora_io::Result<ReadStats> {
        if Some(self.batches.fetch_add(1, Ordering::Relaxed)) == self.failing {
            return Err(tensora_io::Error::Read {
                path: requests[0].file.path().to_owned(),
                offset: requests[0].offset,
                length: 1,
                source: std::io::Error::other("worn out"),
            });
        }
        for request in &mut requests {
            let begin = request.destination.as_mut_ptr() as u64;
            let len = request.destination.len() as u64;
            self.memory.lock().unwrap().push(begin..begin + len);
        }
        self.inner.read(requests, params, control)
    }
}

fn reading(backend: Arc<dyn Backend>) -> Reading {
    let transfer = TransferParams {
        chunk_bytes: 1 << 20,
        queue_depth: 1,
        workers: 1,
        direct: DirectPolicy::Never,
        resident: ResidentPolicy::Reread,
    };
    Reading::new(backend, 2, transfer)
}

#[cfg(unix)]
#[test]
fn whatever_is_verified_memory_stays_within_the_limit() {
    let directory = tempfile::tempdir().unwrap();
    let large = |seed: u64| -> Vec<Record> {
        let mut records = records();
        records.push(Record::plain("large", Dtype::F32, &[3 << 20], seed));
        records
    };
    let left = write_cache(directory.path(), &large(1));
    let mut other = large(1);
    other.push(Record::strided(
        "transposed",
        Dtype::F16,
        &[2048, 1500],
        &[1, 2048],
        0,
        3,
    ));
    let right = written(
        directory.path(),
        "right",
        &other,
        Format::ServerlessLlmStore,
    );
    flip_in(&right, "large", (12 << 20) - 1);
    for limit in [ConvertOptions::MIN_MEMORY_LIMIT_BYTES, 4 << 20] {
        let watched = Watched::new(None);
        let options = VerifyOptions::new()
            .memory_limit_bytes(limit)
            .reading(reading(watched.clone()));
        let bounds = limit / 4..=limit;
        for index in [&left, &right] {
            options.check(index, &Control::new()).unwrap();
            let read_bytes = watched.take_memory_bytes();
            assert!(bounds.contains(&read_bytes), "{read_bytes} of {limit}");
            options.digests(index, &Control::new()).unwrap();
            let read_bytes = watched.take_memory_bytes();
            assert!(bounds.contains(&read_bytes), "{read_bytes} of {limit}");
        }
        let comparison = options.compare(&left, &right, &Control::new()).unwrap();
        assert_eq!(comparison.differences.len(), 2);
        // One checkpoint after the other, each in memory of its own, and then half of that for one tensor.
        let read_bytes = watched.take_memory_bytes();
        assert!(2 * read_bytes <= 5 * limit, "{read_bytes} of {limit}");
    }
    let options =
        VerifyOptions::new().memory_limit_bytes(ConvertOptions::MIN_MEMORY_LIMIT_BYTES - 1);
    let error = options.check(&left, &Control::new()).unwrap_err();
    assert!(matches!(error, Error::MemoryLimit { .. }), "{error}");
}

#[cfg(unix)]
#[test]
fn cancelling_stops_everything() {
    let directory = tempfile::tempdir().unwrap();
    let plain = written(
        directory.path(),
        "a",
        &records(),
        Format::ServerlessLlmStore,
    );
    let cached = write_cache(directory.path(), &records());
    let cancelled_after = |bytes: u64| {
        let token = CancelToken::new();
        let (cancel, seen) = (token.clone(), AtomicU64::new(0));
        Control::new()
            .with_cancel(token)
            .with_progress(move |more| {
                if seen.fetch_add(more, Ordering::Relaxed) + more >= bytes {
                    cancel.cancel();
                }
            })
    };
    let options = VerifyOptions::new().memory_limit_bytes(ConvertOptions::MIN_MEMORY_LIMIT_BYTES);
    for index in [&plain, &cached] {
        for bytes in [1, 1 << 20] {
            let error = options.check(index, &cancelled_after(bytes)).unwrap_err();
            assert!(error.is_cancelled(), "{error}");
            let error = options.digests(index, &cancelled_after(bytes)).unwrap_err();
            assert!(error.is_cancelled(), "{error}");
        }
    }
    let both = VerifyOptions::work_bytes(&plain);
    let error = options
        .compare(&plain, &cached, &cancelled_after(both + 1))
        .unwrap_err();
    assert!(error.is_cancelled(), "{error}");

    // While the place of a difference is looked for.
    let changed = written(
        directory.path(),
        "b",
        &records(),
        Format::ServerlessLlmStore,
    );
    let bytes = changed.tensor("weight").unwrap().bytes;
    flip_in(&changed, "weight", bytes - 1);
    let error = options
        .compare(&plain, &changed, &cancelled_after(2 * both))
        .unwrap_err();
    assert!(error.is_cancelled(), "{error}");
}

#[test]
fn a_file_that_changes_while_it_is_read_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let index = written(directory.path(), "a", &records(), Format::Safetensors);
    let path = index.files()[0].path.clone();
    let rewritten = path.clone();
    let control = Control::new().with_progress(move |_| {
        let file = fs::File::options().write(true).open(&rewritten).unwrap();
        file.set_modified(std::time::UNIX_EPOCH).unwrap();
    });
    let error = VerifyOptions::new().digests(&index, &control).unwrap_err();
    assert!(
        matches!(&error, Error::SourceChanged { path: named, .. } if *named == path),
        "{error}"
    );
    let error = VerifyOptions::new().check(&index, &{
        let longer = path.clone();
        Control::new().with_progress(move |_| {
            let file = fs::File::options().write(true).open(&longer).unwrap();
            file.set_len(file.metadata().unwrap().len() + 1).unwrap();
        })
    });
    assert!(matches!(error, Err(Error::SourceChanged { .. })));
}

#[test]
fn a_read_error_names_the_file_and_ends_the_work() {
    let directory = tempfile::tempdir().unwrap();
    let left = written(directory.path(), "left", &records(), Format::Safetensors);
    let right = written(directory.path(), "right", &records(), Format::Safetensors);
    let path = &right.files()[0].path;
    fs::remove_file(path).unwrap();
    let error = VerifyOptions::new()
        .compare(&left, &right, &Control::new())
        .unwrap_err();
    assert!(
        error.to_string().contains(path.to_str().unwrap()),
        "{error}"
    );
}

#[test]
fn whichever_read_fails_its_error_is_the_one_reported() {
    let directory = tempfile::tempdir().unwrap();
    let left = written(directory.path(), "left", &records(), Format::Safetensors);
    let right = written(directory.path(), "right", &records(), Format::Safetensors);
    let bytes = left.tensor("weight").unwrap().bytes;
    flip_in(&right, "weight", bytes - 1);
    let compare = |watched: &Arc<Watched>| {
        let options = VerifyOptions::new()
            .memory_limit_bytes(ConvertOptions::MIN_MEMORY_LIMIT_BYTES)
            .reading(reading(watched.clone()));
        options.compare(&left, &right, &Control::new())
    };
    let whole = Watched::new(None);
    let expected = compare(&whole).unwrap();
    let batches = whole.batches.load(Ordering::Relaxed);
    assert!(batches > 100, "{batches}");
    for failing in (0..batches).step_by(7) {
        match compare(&Watched::new(Some(failing))) {
            Err(error) => {
                assert!(matches!(error, Error::Read(_)), "{failing}: {error}");
                assert!(error.to_string().contains("worn out"), "{error}");
            }
            // Only in the end: what is read after the difference does not matter to it.
            Ok(found) => {
                assert!(failing >= batches - 20, "{failing} of {batches}");
                assert_eq!(found, expected);
            }
        }
    }
}

/// What happens to one tensor of a checkpoint.
#[derive(Clone, Copy, Debug)]
enum Mutation {
    Remove,
    Add,
    Dtype,
    Shape,
    Byte(u64),
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_copy_does_not_differ_and_one_mutation_is_named_exactly(
        tensors in prop::collection::btree_map(
            "[a-zé.\"\\\\]{1,6}",
            (
                prop::sample::select(vec![Dtype::U8, Dtype::F16, Dtype::BF16, Dtype::F32, Dtype::F64]),
                prop::collection::vec(0u64..6, 0..4),
                any::<u64>(),
            ),
            1..8,
        ),
        formats in prop::array::uniform2(prop::sample::select(FORMATS.to_vec())),
        victim in any::<prop::sample::Index>(),
        mutation in prop_oneof![
            Just(Mutation::Remove),
            Just(Mutation::Add),
            Just(Mutation::Dtype),
            Just(Mutation::Shape),
            any::<u64>().prop_map(Mutation::Byte),
        ],
    ) {
        let records: Vec<Record> = tensors
            .iter()
            .map(|(name, (dtype, shape, seed))| Record::plain(name, *dtype, shape, *seed))
            .collect();
        prop_assert!(formats.iter().all(|&format| tensors.values().all(|(dtype, ..)| holds(format, *dtype))));
        let directory = tempfile::tempdir().unwrap();
        let left = written(directory.path(), "left", &records, formats[0]);
        let right = written(directory.path(), "right", &records, formats[1]);
        prop_assert_eq!(differences(&left, &right), []);

        let mut mutated = records.clone();
        let victim = victim.index(records.len());
        let record = &mut mutated[victim];
        let view = &mut record.views[0];
        let (tensor, shape) = (view.name.clone(), view.shape.clone());
        let expected = match mutation {
            Mutation::Byte(at) if !record.bytes.is_empty() => {
                let at = at % record.bytes.len() as u64;
                let byte = &mut record.bytes[usize::try_from(at).unwrap()];
                let left = *byte;
                *byte = !left;
                let element = at / (u64::from(view.dtype.bits()) / 8);
                let mut index = vec![0; shape.len()];
                let mut rest = element;
                for dimension in (0..shape.len()).rev() {
                    index[dimension] = rest % shape[dimension];
                    rest /= shape[dimension];
                }
                format!(
                    "{tensor:?}: its bytes differ, first byte {at}, in element {index:?}: 0x{left:02x} on the left, 0x{:02x} on the right",
                    !left
                )
            }
            Mutation::Shape => {
                view.shape.push(1);
                format!("{tensor:?}: {shape:?} on the left, {:?} on the right", view.shape)
            }
            Mutation::Dtype => {
                let other = match view.dtype {
                    Dtype::U8 => Dtype::I8,
                    Dtype::F16 => Dtype::BF16,
                    Dtype::BF16 => Dtype::F16,
                    Dtype::F32 => Dtype::I32,
                    _ => Dtype::I64,
                };
                let dtype = std::mem::replace(&mut view.dtype, other);
                format!("{tensor:?}: {dtype} on the left, {other} on the right")
            }
            Mutation::Add => {
                mutated.push(Record::plain("a new one", Dtype::U8, &[2], 1));
                "\"a new one\": only in the right checkpoint".to_owned()
            }
            Mutation::Remove | Mutation::Byte(_) => {
                mutated.remove(victim);
                format!("{tensor:?}: only in the left checkpoint")
            }
        };
        let right = written(directory.path(), "mutated", &mutated, formats[1]);
        let found: Vec<String> = differences(&left, &right).iter().map(ToString::to_string).collect();
        prop_assert_eq!(found, [expected]);
    }
}
