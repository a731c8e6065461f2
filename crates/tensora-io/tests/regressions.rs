//! Defects that were found once, each with the case that showed it.
#![allow(clippy::unwrap_used)]

mod skip_support;

use std::fs::OpenOptions;

use skip_support::skip;
use tensora_io::{
    Backend, BackendKind, Control, DirectPolicy, Error, ReadRequest, SourceFile, TransferParams,
    backend,
};

/// Every backend that works here.
fn backends(what: &str) -> impl Iterator<Item = (BackendKind, Box<dyn Backend>)> {
    BackendKind::ALL.into_iter().filter_map(move |kind| {
        backend(kind)
            .map(|backend| (kind, backend))
            .map_err(|error| skip(&format!("{what}: {error}")))
            .ok()
    })
}

fn params(direct: DirectPolicy) -> TransferParams {
    TransferParams {
        chunk_bytes: 4096,
        queue_depth: 1,
        workers: 1,
        direct,
        resident: tensora_io::ResidentPolicy::Reread,
    }
}

/// A page that the file came to end in read as zeros behind that end, and nobody noticed.
#[test]
fn a_file_cut_inside_a_page_while_it_is_read_is_noticed() {
    for (kind, backend) in backends("a file cut inside a page") {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("data");
        std::fs::write(&path, [7; 8192]).unwrap();
        let file = SourceFile::open(&path).unwrap();
        let writer = OpenOptions::new().write(true).open(&path).unwrap();
        let control = Control::new().with_progress(move |_| writer.set_len(4196).unwrap());
        let mut memory = vec![0; 8192];
        let request = ReadRequest {
            file: &file,
            offset: 0,
            destination: memory.as_mut_slice().into(),
        };
        let outcome = backend.read(vec![request], &params(DirectPolicy::Never), &control);
        assert!(
            matches!(
                outcome,
                Err(Error::UnexpectedEof {
                    actual_end: 4196,
                    ..
                })
            ),
            "{kind}: {outcome:?}"
        );
    }
}

/// A file that was empty when it was opened counted as one that nothing is read of.
#[test]
fn required_direct_reads_are_direct_after_a_file_has_grown() {
    for (kind, backend) in backends("a file that has grown") {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("data");
        std::fs::write(&path, []).unwrap();
        let file = SourceFile::open(&path).unwrap();
        let grown = OpenOptions::new().write(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        grown.set_len(4096).unwrap();
        let mut memory = vec![1; 4096];
        let request = ReadRequest {
            file: &file,
            offset: 0,
            destination: memory.as_mut_slice().into(),
        };
        match backend.read(
            vec![request],
            &params(DirectPolicy::Required),
            &Control::new(),
        ) {
            Ok(stats) => assert_eq!(stats.direct_bytes, 4096, "{kind}"),
            Err(Error::DirectUnsupported { .. }) => {}
            Err(error) => panic!("{kind}: {error}"),
        }
    }
}

/// Backends disagreed on whether nothing can be read directly of a file that does not support it.
#[test]
fn reading_nothing_succeeds_everywhere() {
    let directory = tempfile::tempdir_in(if std::path::Path::new("/dev/shm").is_dir() {
        "/dev/shm".into()
    } else {
        std::env::temp_dir()
    })
    .unwrap();
    let path = directory.path().join("data");
    std::fs::write(&path, [7; 100]).unwrap();
    let file = SourceFile::open(&path).unwrap();
    for (kind, backend) in backends("reading nothing") {
        for direct in [
            DirectPolicy::Never,
            DirectPolicy::Preferred,
            DirectPolicy::Required,
        ] {
            let request = ReadRequest {
                file: &file,
                offset: 50,
                destination: (&mut [0_u8; 0][..]).into(),
            };
            let stats = backend
                .read(vec![request], &params(direct), &Control::new())
                .unwrap();
            assert_eq!(stats.bytes, 0, "{kind} {direct}");
            assert!(
                stats.fallbacks.is_empty(),
                "{kind} {direct}: {:?}",
                stats.fallbacks
            );
        }
    }
}
