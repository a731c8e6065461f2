//! An owned load holds its data and little more. Alone in its binary: it watches the whole process.
#![allow(clippy::unwrap_used)]
#![cfg(target_os = "linux")]

mod common;

use tensora::formats::{Sharding, TensorSpec, safetensors_layout};
use tensora::heuristics::PlanError;
use tensora::{BackendKind, Dtype, Error, Loader};

/// What a load may hold beyond its data.
const EXTRA_BYTES: u64 = 64 << 20;

#[test]
fn an_owned_load_holds_its_data_once() {
    // One large tensor and many small ones, of zeros: the file is a hole and takes no space.
    let mut specs = vec![TensorSpec {
        name: "large".to_owned(),
        dtype: Dtype::U8,
        shape: vec![200 << 20],
    }];
    specs.extend((0..1000).map(|number| TensorSpec {
        name: format!("small.{number}"),
        dtype: Dtype::F32,
        shape: vec![10_007],
    }));
    let layout = safetensors_layout(
        &specs,
        &std::collections::BTreeMap::new(),
        Sharding::Single,
        8,
    )
    .unwrap();
    let directory = tempfile::tempdir().unwrap();
    let planned = &layout.files[0];
    let path = directory.path().join(&planned.name);
    std::fs::write(&path, &planned.prefix).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(planned.bytes).unwrap();

    for kind in BackendKind::ALL {
        // 5 sets the peak back to what is resident now.
        if std::fs::write("/proc/self/clear_refs", "5").is_err() {
            common::skip("the peak of resident memory cannot be set back here");
            return;
        }
        let before = peak_resident_bytes();
        let checkpoint = match Loader::new().backend(kind).load(&path) {
            Ok(checkpoint) => checkpoint,
            Err(Error::Plan(PlanError::BackendUnavailable { reason, .. })) => {
                common::skip(&format!("{kind} is unavailable: {reason}"));
                continue;
            }
            Err(error) => panic!("{kind}: {error}"),
        };
        let data = checkpoint.report().data_bytes;
        let held = peak_resident_bytes() - before;
        assert!(
            held >= data,
            "{kind}: {held} bytes held, {data} loaded: is the measure right?"
        );
        assert!(
            held <= data + EXTRA_BYTES,
            "{kind}: {held} bytes held for {data}"
        );
    }
}

fn peak_resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    line.trim()
        .trim_end_matches("kB")
        .trim()
        .parse::<u64>()
        .unwrap()
        * 1024
}
