//! What opening a file promises, whatever the path leads to.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use tensora_io::{DirectSupport, Error, SourceFile};

/// Opens on a thread of its own: an open that blocks fails the test instead of hanging it.
fn open(path: &Path) -> tensora_io::Result<SourceFile> {
    let (done, outcome) = mpsc::channel();
    let path = path.to_owned();
    std::thread::spawn(move || done.send(SourceFile::open(path)));
    outcome
        .recv_timeout(Duration::from_secs(10))
        .expect("open blocks")
}

fn directory() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn a_regular_file_opens_with_its_length() {
    let directory = directory();
    for len in [0, 1, 4096, 10_000] {
        let path = directory.path().join("file");
        std::fs::write(&path, vec![1; len]).unwrap();
        let file = open(&path).unwrap();
        assert_eq!(file.path(), path);
        assert_eq!(file.len(), len as u64);
        assert_eq!(file.is_empty(), len == 0);
        std::fs::write(&path, [1; 20_000]).unwrap();
        assert_eq!(file.len(), len as u64, "the length at open");
        assert_eq!(file.current_len().unwrap(), 20_000);
    }
}

#[test]
fn a_missing_path_is_named() {
    let directory = directory();
    for path in ["missing", "missing/too", "dangling"] {
        let path = directory.path().join(path);
        #[cfg(unix)]
        if path.ends_with("dangling") {
            std::os::unix::fs::symlink("nowhere", &path).unwrap();
        }
        let error = open(&path).unwrap_err();
        match &error {
            Error::File {
                operation: "open",
                path: named,
                source,
            } => {
                assert_eq!(named, &path);
                assert_eq!(source.kind(), std::io::ErrorKind::NotFound);
            }
            other => panic!("{other:?}"),
        }
        let text = error.to_string();
        assert!(text.contains(path.to_str().unwrap()), "{text}");
        assert!(text.contains("check the path"), "{text}");
    }
}

#[test]
fn a_directory_is_no_file() {
    let directory = directory();
    let error = open(directory.path()).unwrap_err();
    match &error {
        Error::NotARegularFile { path, found } => {
            assert_eq!(path, directory.path());
            assert_eq!(*found, "directory");
        }
        other => panic!("{other:?}"),
    }
}

#[cfg(unix)]
#[test]
fn a_file_on_the_way_is_no_directory() {
    let directory = directory();
    let path = directory.path().join("file");
    std::fs::write(&path, "content").unwrap();
    let error = open(&path.join("below")).unwrap_err();
    assert_eq!(error.path(), Some(path.join("below").as_path()), "{error}");
}

#[cfg(unix)]
#[test]
fn a_symlink_is_followed() {
    let directory = directory();
    let target = directory.path().join("target");
    let link = directory.path().join("link");
    std::fs::write(&target, "content").unwrap();
    std::os::unix::fs::symlink(&target, &link).unwrap();
    let file = open(&link).unwrap();
    assert_eq!((file.path(), file.len()), (link.as_path(), 7));
}

/// The error of everything that is neither a file nor a directory.
#[cfg(unix)]
fn expect_special(path: &Path, kind: &str) {
    match open(path) {
        Err(Error::NotARegularFile { path: named, found }) => {
            assert_eq!((named.as_path(), found), (path, kind));
        }
        other => panic!("{}: {other:?}", path.display()),
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_fifo_does_not_block() {
    let directory = directory();
    let path = directory.path().join("fifo");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    expect_special(&path, "FIFO");
}

#[cfg(unix)]
#[test]
fn a_device_is_no_file() {
    expect_special(Path::new("/dev/null"), "device");
}

#[cfg(unix)]
#[test]
fn a_socket_is_no_file() {
    let directory = directory();
    let path = directory.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    // A socket cannot be opened at all, so the system's own error is as good.
    match open(&path) {
        Err(Error::NotARegularFile { path: named, found }) => {
            assert_eq!((named, found), (path, "socket"));
        }
        Err(Error::File { path: named, .. }) => assert_eq!(named, path),
        other => panic!("{other:?}"),
    }
}

#[cfg(all(unix, feature = "testing"))]
#[test]
fn a_forbidden_file_is_named() {
    use std::os::unix::fs::PermissionsExt;

    let directory = directory();
    let path = directory.path().join("forbidden");
    std::fs::write(&path, "content").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o0)).unwrap();
    if std::fs::File::open(&path).is_ok() {
        return tensora_io::testing::skip("a forbidden file: this user may read everything");
    }
    match open(&path) {
        Err(Error::File {
            operation: "open",
            path: named,
            source,
        }) => {
            assert_eq!(named, path);
            assert_eq!(source.kind(), std::io::ErrorKind::PermissionDenied);
        }
        other => panic!("{other:?}"),
    }
}

/// The second descriptor, for direct reads, must be of the same file.
#[test]
fn direct_reads_never_come_from_another_file() {
    let directory = directory();
    let path = directory.path().join("file");
    let other = directory.path().join("other");
    std::fs::write(&path, [1; 8192]).unwrap();
    std::fs::write(&other, [2; 8192]).unwrap();
    let early = open(&path).unwrap();
    let support = early.direct_support();
    let late = open(&path).unwrap();
    std::fs::rename(&other, &path).unwrap();
    assert_eq!(early.direct_support(), support, "the answer is remembered");
    match late.direct_support() {
        DirectSupport::Unsupported { reason } => assert!(!reason.is_empty()),
        // By way of the descriptor that is open already.
        DirectSupport::Supported { .. } => assert!(support.is_supported()),
    }
}

#[cfg(target_os = "linux")]
#[test]
fn alignment_is_sound_where_direct_reads_work() {
    let directory = directory();
    let path = directory.path().join("file");
    std::fs::write(&path, [1; 8192]).unwrap();
    if let DirectSupport::Supported {
        offset_align_bytes,
        memory_align_bytes,
    } = open(&path).unwrap().direct_support()
    {
        assert!(offset_align_bytes.is_power_of_two());
        assert!(memory_align_bytes.is_power_of_two());
    }
}
