//! A model that other people's software wrote, compared with how other people's software reads it.
//! `.ci/fetch-real-model` fetches it and asks the Python package `safetensors` for its contents.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;
use sha2::{Digest, Sha256};
use tensora::heuristics::PlanError;
use tensora::{BackendKind, Error, Loader};

/// A tensor as Python's package describes it.
#[derive(Debug, Deserialize)]
struct Described {
    dtype: String,
    shape: Vec<usize>,
    sha256: String,
}

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/real/all-minilm-l6-v2")
}

#[test]
fn every_backend_reads_what_python_reads() {
    let model = folder().join("model.safetensors");
    let Ok(described) = std::fs::read(folder().join("expected.json")) else {
        assert!(
            std::env::var_os("CI").is_none(),
            "run .ci/fetch-real-model first"
        );
        common::skip("the real model is not there; .ci/fetch-real-model fetches it");
        return;
    };
    let described: BTreeMap<String, Described> = serde_json::from_slice(&described).unwrap();
    assert_eq!(std::fs::metadata(&model).unwrap().len(), 90_868_376);

    let mut loaders = vec![("auto".to_owned(), Loader::new())];
    loaders.extend(BackendKind::ALL.map(|kind| (kind.to_string(), Loader::new().backend(kind))));
    for (name, loader) in loaders {
        let checkpoint = match loader.load(&model) {
            Ok(checkpoint) => checkpoint,
            Err(Error::Plan(PlanError::BackendUnavailable { reason, .. })) => {
                common::skip(&format!("{name} is unavailable: {reason}"));
                continue;
            }
            Err(error) => panic!("{name}: {error}"),
        };
        assert_eq!(checkpoint.len(), described.len(), "{name}");
        for (tensor, described) in checkpoint.iter().zip(&described) {
            assert_eq!(tensor.name(), described.0, "{name}");
            assert_eq!(
                tensor.dtype().name(),
                described.1.dtype,
                "{name}: {}",
                tensor.name()
            );
            assert_eq!(
                tensor.shape(),
                described.1.shape,
                "{name}: {}",
                tensor.name()
            );
            let sha256: String = Sha256::digest(tensor.bytes())
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect();
            assert_eq!(sha256, described.1.sha256, "{name}: {}", tensor.name());
        }
    }
}
