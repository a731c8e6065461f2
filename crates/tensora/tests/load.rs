//! The same tensors come out of every layout, by every backend, in either memory.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use common::{Expected, LAYOUTS, expected, write};
use tensora::heuristics::PlanError;
use tensora::{
    BackendKind, CancelToken, Checkpoint, DirectPolicy, Error, Loader, MappingPermit, MemoryChoice,
    MemoryKind, Tensor,
};

/// Nobody else knows the temporary files of these tests.
fn permit() -> MappingPermit {
    // SAFETY: the tests write their files before they map them and never afterwards.
    unsafe { MappingPermit::new() }
}

fn assert_same(checkpoint: &Checkpoint, expected: &Expected, context: &str) {
    assert_eq!(checkpoint.len(), expected.len(), "{context}");
    for (name, (dtype, shape, bytes)) in expected {
        let tensor = checkpoint.tensor(name).unwrap();
        assert_eq!(tensor.dtype(), *dtype, "{context}: {name}");
        let dimensions: Vec<u64> = tensor.shape().iter().map(|&d| d as u64).collect();
        assert_eq!(&dimensions, shape, "{context}: {name}");
        assert!(
            tensor.bytes() == bytes,
            "{context}: the bytes of {name} differ"
        );
    }
}

#[test]
fn every_layout_and_backend_gives_the_same_tensors() {
    let expected = expected();
    let mut digests = Vec::new();
    for layout in LAYOUTS {
        let directory = tempfile::tempdir().unwrap();
        write(&expected, layout, directory.path());
        for kind in BackendKind::ALL {
            for direct in [DirectPolicy::Never, DirectPolicy::Preferred] {
                let loader = Loader::new()
                    .backend(kind)
                    .direct(direct)
                    .chunk_bytes(64 << 10);
                let checkpoint = match loader.load(directory.path()) {
                    Ok(checkpoint) => checkpoint,
                    Err(Error::Plan(PlanError::BackendUnavailable { reason, .. })) => {
                        common::skip(&format!("{kind} is unavailable: {reason}"));
                        continue;
                    }
                    Err(error) => panic!("{layout}, {kind}: {error}"),
                };
                let context = format!("{layout}, {kind}, direct {direct}");
                assert_same(&checkpoint, &expected, &context);
                let report = checkpoint.report();
                assert_eq!(report.plan.backend, kind, "{context}");
                assert_eq!(report.plan.memory, MemoryKind::Owned, "{context}");
                assert_eq!(
                    report.stats.bytes, report.plan.workload.read_bytes,
                    "{context}"
                );
                digests.push(checkpoint.digest().unwrap());
            }
        }
        let loader = Loader::new().allow_mapping(permit());
        let mapped = loader
            .memory(MemoryChoice::Mapped)
            .load(directory.path())
            .unwrap();
        assert_eq!(mapped.report().plan.memory, MemoryKind::Mapped);
        assert_same(&mapped, &expected, layout);
        digests.push(mapped.digest().unwrap());

        let automatic = tensora::load(directory.path()).unwrap();
        assert_same(&automatic, &expected, layout);
        digests.push(automatic.digest().unwrap());
    }
    assert!(digests.len() >= LAYOUTS.len() * 8);
    assert!(digests.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn owned_loads_of_a_whole_file_copy_nothing_but_ragged_ends() {
    let directory = tempfile::tempdir().unwrap();
    write(&expected(), "one SafeTensors file", directory.path());
    let loader = Loader::new()
        .backend(BackendKind::Sync)
        .direct(DirectPolicy::Required);
    match loader.load(directory.path()) {
        Ok(checkpoint) => {
            let stats = &checkpoint.report().stats;
            assert_eq!(stats.direct_bytes, stats.bytes);
            // Less than one block of at most 4096 bytes at either end.
            assert!(stats.scratch_bytes < 2 * 4096, "{stats:?}");
        }
        Err(Error::Plan(PlanError::DirectUnsupported { reason, .. })) => common::skip(&reason),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_selection_reads_no_more_than_it_needs() {
    let expected = expected();
    for layout in LAYOUTS {
        let directory = tempfile::tempdir().unwrap();
        write(&expected, layout, directory.path());
        let loader = Loader::new()
            .select(["model.layers.{3,11}.*", "ids"])
            .select_names(["scalar"]);
        let checkpoint = loader.load(directory.path()).unwrap();
        let names: Vec<_> = checkpoint.names().collect();
        assert_eq!(
            names,
            [
                "ids",
                "model.layers.11.mask",
                "model.layers.11.mlp.weight",
                "model.layers.11.norm.weight",
                "model.layers.3.mask",
                "model.layers.3.mlp.weight",
                "model.layers.3.norm.weight",
                "scalar",
            ],
            "{layout}"
        );
        for tensor in &checkpoint {
            assert!(
                tensor.bytes() == &expected[tensor.name()].2,
                "{layout}: {}",
                tensor.name()
            );
        }
        let report = checkpoint.report();
        // Small tensors that stand close together are read in one piece, with what lies between.
        assert!(report.stats.bytes >= report.data_bytes);
        assert!(
            report.stats.bytes < report.data_bytes + 64 * 1024,
            "{layout}: {report:?}"
        );
        let left_out = checkpoint.tensor("model.layers.4.mask").unwrap_err();
        assert!(matches!(left_out, Error::NotSelected { .. }), "{left_out}");
    }
}

#[test]
fn what_does_not_exist_is_named() {
    let directory = tempfile::tempdir().unwrap();
    write(&expected(), "one SafeTensors file", directory.path());
    let message = |loader: Loader| loader.load(directory.path()).unwrap_err().to_string();

    let unknown = message(Loader::new().select_names(["layers.3.mask"]));
    assert!(unknown.contains("layers.3.mask"), "{unknown}");
    assert!(
        unknown.contains("did you mean model.layers.3.mask?"),
        "{unknown}"
    );
    let pattern = message(Loader::new().select(["model.*", "decoder.*"]));
    assert!(
        pattern.contains("\"decoder.*\"") && pattern.contains("40 tensors"),
        "{pattern}"
    );
    let glob = message(Loader::new().select(["model.{a"]));
    assert!(glob.contains("not a valid glob"), "{glob}");
}

#[test]
fn lazy_access_reads_single_tensors() {
    let expected = expected();
    for layout in LAYOUTS {
        let directory = tempfile::tempdir().unwrap();
        write(&expected, layout, directory.path());
        for loader in [
            Loader::new(),
            Loader::new()
                .allow_mapping(permit())
                .memory(MemoryChoice::Mapped),
        ] {
            let lazy = loader.open(directory.path()).unwrap();
            assert_eq!(lazy.selected().len(), expected.len());
            for (name, (_, _, bytes)) in &expected {
                assert!(
                    lazy.tensor(name).unwrap().bytes() == bytes,
                    "{layout}: {name}"
                );
            }
            assert!(matches!(
                lazy.tensor("nothing"),
                Err(Error::NoSuchTensor { .. })
            ));
        }
    }
}

#[test]
fn tensors_outlive_checkpoint_and_each_other() {
    fn shareable<T: Send + Sync + Clone + 'static>(_: &T) {}

    let expected = expected();
    let directory = tempfile::tempdir().unwrap();
    write(&expected, "three SafeTensors shards", directory.path());
    let checkpoint = tensora::load(directory.path()).unwrap();
    shareable(&checkpoint);
    let tensors: Vec<Tensor> = checkpoint.iter().cloned().collect();
    let bytes = tensors[0].bytes().slice(..);
    assert_eq!(
        bytes.as_ptr(),
        checkpoint.tensors()[0].bytes().as_ptr(),
        "a clone shares memory"
    );
    drop(checkpoint);
    drop(directory);
    let threads: Vec<_> = tensors
        .into_iter()
        .map(|tensor| {
            std::thread::spawn(move || (tensor.name().to_owned(), tensor.bytes().to_vec()))
        })
        .collect();
    for thread in threads {
        let (name, bytes) = thread.join().unwrap();
        assert!(bytes == expected[&name].2, "{name}");
    }
    assert!(bytes == expected["empty"].2);
}

#[test]
fn progress_adds_up() {
    let directory = tempfile::tempdir().unwrap();
    write(&expected(), "store dialect", directory.path());
    for kind in BackendKind::ALL {
        let (largest, calls) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let (seen, counted) = (Arc::clone(&largest), Arc::clone(&calls));
        let loader = Loader::new()
            .backend(kind)
            .chunk_bytes(32 << 10)
            .on_progress(move |progress| {
                assert!(progress.done_bytes <= progress.total_bytes);
                seen.fetch_max(progress.done_bytes, Ordering::Relaxed);
                counted.fetch_add(1, Ordering::Relaxed);
            });
        let Ok(checkpoint) = loader.load(directory.path()) else {
            common::skip(&format!("{kind} is unavailable"));
            continue;
        };
        let read_bytes = checkpoint.report().plan.workload.read_bytes;
        assert_eq!(largest.load(Ordering::Relaxed), read_bytes, "{kind}");
        assert!(calls.load(Ordering::Relaxed) > 10, "{kind}");
    }
}

#[test]
fn a_cancelled_load_says_so() {
    let directory = tempfile::tempdir().unwrap();
    write(&expected(), "one SafeTensors file", directory.path());
    for kind in BackendKind::ALL {
        let token = CancelToken::new();
        let trigger = token.clone();
        let loader = Loader::new()
            .backend(kind)
            .workers(1)
            .queue_depth(1)
            .chunk_bytes(4096)
            .cancel_with(token)
            .on_progress(move |_| trigger.cancel());
        match loader.load(directory.path()) {
            Err(Error::Plan(PlanError::BackendUnavailable { reason, .. })) => common::skip(&reason),
            outcome => assert!(outcome.is_err_and(|error| error.is_cancelled()), "{kind}"),
        }
    }
}

#[test]
fn mapping_needs_a_permit() {
    let directory = tempfile::tempdir().unwrap();
    write(&expected(), "one SafeTensors file", directory.path());
    let error = Loader::new()
        .memory(MemoryChoice::Mapped)
        .load(directory.path())
        .unwrap_err();
    assert!(
        matches!(error, Error::Plan(PlanError::MappedWithoutConsent)),
        "{error}"
    );
}

#[test]
fn too_large_a_load_is_refused_with_the_numbers() {
    let directory = tempfile::tempdir().unwrap();
    write(&expected(), "one SafeTensors file", directory.path());
    let error = Loader::new()
        .memory_limit_bytes(100_000)
        .load(directory.path())
        .unwrap_err();
    assert!(
        matches!(error, Error::Plan(PlanError::DoesNotFit { .. })),
        "{error}"
    );
    assert!(error.to_string().contains("100000"), "{error}");
}

#[test]
fn a_file_that_is_replaced_or_rewritten_after_opening_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    write(&expected(), "one SafeTensors file", directory.path());
    let path = directory.path().join("model.safetensors");
    let mut other = std::fs::read(&path).unwrap();
    let length = other.len();
    // As long as before, and with the same tensors in other places for all that anybody knows.
    other[length - 1] ^= 1;
    let replace = || {
        let beside = directory.path().join("beside");
        std::fs::write(&beside, &other).unwrap();
        std::fs::rename(&beside, &path).unwrap();
    };
    let times = std::cell::Cell::new(0);
    let rewrite = || {
        times.set(times.get() + 1);
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        let modified = std::time::UNIX_EPOCH + Duration::from_secs(times.get());
        file.set_modified(modified).unwrap();
    };
    let changes: [(&str, &dyn Fn()); 2] = [("took its place", &replace), ("written to", &rewrite)];
    for (how, change) in changes {
        let judge = |error: Error| {
            assert!(matches!(error, Error::Changed { .. }), "{error}");
            let message = error.to_string();
            assert!(message.contains("model.safetensors"), "{message}");
            assert!(message.contains(how), "{message}");
        };
        for loader in [Loader::new(), Loader::new().allow_mapping(permit())] {
            let opened = [0; 4].map(|_| loader.open(&path).unwrap());
            change();
            judge(opened[0].load_all().unwrap_err());
            judge(opened[1].tensor("ids").unwrap_err());
            judge(opened[2].plan().unwrap_err());
            judge(opened[3].stream().err().unwrap());
            loader.load(&path).unwrap();
        }

        // While it is read: whatever was read may be of both. The file that was opened stays, so a new one at its
        // path does no harm.
        if how == "written to" {
            let (once, path) = (std::sync::Once::new(), path.clone());
            let loader = Loader::new().on_progress(move |_| {
                once.call_once(|| {
                    let file = std::fs::File::options().write(true).open(&path).unwrap();
                    let now = std::time::SystemTime::now();
                    file.set_modified(now - Duration::from_secs(1)).unwrap();
                });
            });
            judge(loader.load(directory.path()).unwrap_err());
        }
    }
}

#[test]
fn a_file_that_shrinks_after_opening_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    write(&expected(), "one SafeTensors file", directory.path());
    let path = directory.path().join("model.safetensors");
    let len = std::fs::metadata(&path).unwrap().len();
    let shrink = |len| {
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(len).unwrap();
    };

    let before_open = Loader::new().open(&path).unwrap();
    shrink(len - 1000);
    let error = before_open.load_all().unwrap_err();
    assert!(matches!(error, Error::Changed { .. }), "{error}");
    assert!(error.to_string().contains(&len.to_string()), "{error}");
    shrink(len);

    // Once the file is open, its end is found out by reading.
    for kind in [BackendKind::Sync, BackendKind::Async] {
        let opened = Loader::new().backend(kind).open(&path).unwrap();
        opened.tensor("ids").unwrap();
        shrink(len - 1000);
        let error = opened.load_all().unwrap_err();
        assert!(matches!(error, Error::Tensor { .. }), "{error}");
        let message = error.to_string();
        assert!(
            message.contains("model.safetensors") && message.contains(&(len - 1000).to_string()),
            "{message}"
        );
        shrink(len);
    }
}

#[test]
fn loads_inside_runtimes() {
    let expected = expected();
    let directory = tempfile::tempdir().unwrap();
    write(&expected, "partitioned dialect", directory.path());
    let path = directory.path().to_owned();
    let runtimes = [
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap(),
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap(),
    ];
    for runtime in runtimes {
        runtime.block_on(async {
            // Blocking is bad manners here, but must work.
            for kind in BackendKind::ALL {
                let _ = Loader::new().backend(kind).load(&path);
            }
            assert_same(
                &tensora::load(&path).unwrap(),
                &expected,
                "blocking in a runtime",
            );
            // Without blocking: the runtime does other things meanwhile, on its one thread too.
            let ticks = Arc::new(AtomicU64::new(0));
            let ticker = tokio::spawn({
                let ticks = Arc::clone(&ticks);
                async move {
                    loop {
                        ticks.fetch_add(1, Ordering::Relaxed);
                        tokio::task::yield_now().await;
                    }
                }
            });
            for kind in BackendKind::ALL {
                let loader = Loader::new().backend(kind);
                if let Ok(checkpoint) = loader.load_async(&path).await {
                    assert_same(&checkpoint, &expected, "awaited");
                }
            }
            assert_same(
                &tensora::load_async(&path).await.unwrap(),
                &expected,
                "awaited",
            );
            assert!(ticks.load(Ordering::Relaxed) > 0);
            ticker.abort();
            // A future that is dropped half-way stops its load, and no other.
            let token = CancelToken::new();
            let loader = Loader::new().cancel_with(token.clone());
            let dropped =
                tokio::time::timeout(std::time::Duration::ZERO, loader.load_async(&path)).await;
            drop(dropped);
            assert!(!token.is_cancelled());
        });
    }
}

#[test]
fn hands_tensors_to_the_safetensors_crate() {
    let expected = expected();
    let directory = tempfile::tempdir().unwrap();
    write(&expected, "store dialect", directory.path());
    let checkpoint = tensora::load(directory.path()).unwrap();
    let views = checkpoint
        .iter()
        .map(|tensor| (tensor.name().to_owned(), tensor.clone()));
    let file = safetensors::serialize(views, None).unwrap();
    let read = safetensors::SafeTensors::deserialize(&file).unwrap();
    assert_eq!(read.len(), expected.len());
    for (name, (dtype, _, bytes)) in &expected {
        let tensor = read.tensor(name).unwrap();
        assert_eq!(tensor.dtype().to_string(), dtype.name());
        assert!(tensor.data() == bytes, "{name}");
    }
}

#[test]
fn a_file_that_shrinks_before_it_is_mapped_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    write(&expected(), "page-aligned SafeTensors", directory.path());
    let path = directory.path().join("model.safetensors");
    let loader = Loader::new().allow_mapping(permit());
    let opened = loader.open(&path).unwrap();
    // Opens the file, without mapping it.
    opened.plan().unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(5000).unwrap();
    let error = loader
        .memory(MemoryChoice::Mapped)
        .open(&path)
        .and_then(|opened| opened.load_all())
        .unwrap_err();
    assert!(matches!(error, Error::Format(_)), "{error}");
    let error = opened.load_all().unwrap_err();
    assert!(error.to_string().contains("5000"), "{error}");
    let error = opened.tensor("model.layers.9.mask").unwrap_err();
    assert!(error.to_string().contains("5000"), "{error}");
}
