//! What files that are written promise.
#![allow(clippy::unwrap_used)]

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use proptest::sample::Index;
use tensora_io::{CancelToken, Control, DirectPolicy, Error, Region, TargetFile};

const POLICIES: [DirectPolicy; 3] = [
    DirectPolicy::Never,
    DirectPolicy::Preferred,
    DirectPolicy::Required,
];
/// At least what any file system here wants direct writes to be aligned to.
const ALIGN: usize = 64 << 10;

/// On whatever the build directory lies on: unlike `/tmp`, that is rarely in memory.
fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn control() -> Control {
    Control::new()
}

/// Bytes in which no two places are alike.
fn content(len: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    std::iter::repeat_with(|| {
        // xorshift64*
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_be_bytes()[0]
    })
    .take(len)
    .collect()
}

/// Whether the file system at `directory` takes direct writes.
fn writes_directly(directory: &Path) -> bool {
    let path = directory.join("trial");
    let made = TargetFile::create(&path, 1, DirectPolicy::Required);
    if made.is_ok() {
        std::fs::remove_file(&path).unwrap();
    }
    made.is_ok()
}

// ---- what arrives ----

/// A file, how it is cut, and how it is written.
#[derive(Clone, Debug)]
struct Scenario {
    len: usize,
    cuts: Vec<Index>,
    /// Distances of cuts from multiples of a block.
    nudges: Vec<i64>,
    order: Vec<Index>,
    /// By how much the memory of a part differs from its offset, modulo the alignment.
    skews: Vec<usize>,
    threads: usize,
    policy: DirectPolicy,
}

fn scenario() -> impl Strategy<Value = Scenario> {
    (
        prop_oneof![
            0..3usize,
            4090..4102usize,
            1..200_000usize,
            Just(65_536),
            Just(131_072)
        ],
        prop::collection::vec(any::<Index>(), 0..12),
        prop::collection::vec(
            prop_oneof![3 => Just(0_i64), 1 => -2..3_i64, 1 => Just(512)],
            12,
        ),
        prop::collection::vec(any::<Index>(), 13),
        prop::collection::vec(
            prop_oneof![2 => Just(0), 1 => prop::sample::select(vec![1, 2, 8, 511, 512])],
            13,
        ),
        1..5usize,
        prop::sample::select(POLICIES.to_vec()),
    )
        .prop_map(
            |(len, cuts, nudges, order, skews, threads, policy)| Scenario {
                len,
                cuts,
                nudges,
                order,
                skews,
                threads,
                policy,
            },
        )
}

/// A part of a file in memory of its own.
struct Part {
    offset: usize,
    len: usize,
    skew: usize,
    memory: Region,
    begin: usize,
}

impl Part {
    fn new(content: &[u8], offset: usize, len: usize, skew: usize) -> Self {
        // A region of this size begins at a multiple of the alignment.
        let mut memory = Region::allocate(2 << 20).unwrap();
        assert_eq!(memory.as_slice().as_ptr().align_offset(ALIGN), 0);
        let begin = (offset + skew) % ALIGN;
        memory.as_mut_slice()[begin..begin + len].copy_from_slice(&content[offset..offset + len]);
        Self {
            offset,
            len,
            skew,
            memory,
            begin,
        }
    }

    fn bytes(&self) -> &[u8] {
        &self.memory.as_slice()[self.begin..self.begin + self.len]
    }
}

fn parts(scenario: &Scenario, content: &[u8]) -> Vec<Part> {
    let len = scenario.len;
    let mut bounds = vec![0, len];
    for (cut, nudge) in scenario.cuts.iter().zip(&scenario.nudges) {
        let block = i64::try_from(cut.index(len / 4096 + 2) * 4096).unwrap();
        bounds.push(usize::try_from((block + nudge).max(0)).unwrap().min(len));
    }
    bounds.sort_unstable();
    let mut parts: Vec<Part> = bounds
        .windows(2)
        .zip(&scenario.skews)
        .map(|(pair, &skew)| Part::new(content, pair[0], pair[1] - pair[0], skew))
        .collect();
    for (place, index) in scenario.order.iter().enumerate().take(parts.len()) {
        let other = index.index(parts.len());
        parts.swap(place, other);
    }
    parts
}

fn write_in_threads(target: &TargetFile, parts: &[Part], threads: usize) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(part) = parts.get(next.fetch_add(1, Ordering::Relaxed)) {
                    target
                        .write_all_at(part.bytes(), part.offset as u64, &control())
                        .unwrap();
                }
            });
        }
    });
}

/// How many bytes have to be written directly at least, and at most.
fn direct_bounds(parts: &[Part], align: Option<u32>) -> (u64, u64) {
    let Some(align) = align.map(|align| align as usize) else {
        return (0, 0);
    };
    let whole = |part: &&Part| {
        let end = part.offset + part.len;
        let begin = part.offset.next_multiple_of(align);
        (end - end % align).saturating_sub(begin) as u64
    };
    (
        parts
            .iter()
            .filter(|part| part.skew == 0)
            .map(|part| whole(&part))
            .sum(),
        // Memory of odd addresses is aligned nowhere; what lies in between depends on the device.
        parts
            .iter()
            .filter(|part| part.skew % 2 == 0)
            .map(|part| whole(&part))
            .sum(),
    )
}

fn check(scenario: &Scenario, directory: &Path, direct: bool) {
    if scenario.policy == DirectPolicy::Required && !direct {
        return;
    }
    let content = content(scenario.len);
    let parts = parts(scenario, &content);
    let path = directory.join("data");
    let target = TargetFile::create(&path, scenario.len as u64, scenario.policy).unwrap();
    assert_eq!(
        (target.path(), target.len()),
        (path.as_path(), scenario.len as u64)
    );
    assert_eq!(std::fs::metadata(&path).unwrap().len(), scenario.len as u64);
    let align = target.direct_align_bytes();
    assert_eq!(
        align.is_some(),
        direct && scenario.policy != DirectPolicy::Never
    );
    write_in_threads(&target, &parts, scenario.threads);
    let stats = target.finish().unwrap();
    assert_eq!(stats.bytes, scenario.len as u64);
    let (least, most) = direct_bounds(&parts, align);
    assert!(
        (least..=most).contains(&stats.direct_bytes),
        "{least}..={most}: {stats:?}"
    );
    assert_eq!(
        stats.fallback.is_some(),
        scenario.policy == DirectPolicy::Preferred && !direct,
        "{stats:?}"
    );
    assert!(
        std::fs::read(&path).unwrap() == content,
        "other bytes than were written"
    );
    std::fs::remove_file(&path).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn what_is_written_in_any_order_is_there(scenario in scenario()) {
        let directory = directory();
        check(&scenario, directory.path(), writes_directly(directory.path()));
        if let Ok(in_memory) = tempfile::tempdir_in("/dev/shm") {
            check(&scenario, in_memory.path(), writes_directly(in_memory.path()));
        }
    }
}

/// A page that is written both through the page cache and past it keeps one of the two only: neighbours of odd
/// sizes, written at the same time, over and over.
#[test]
fn neighbours_do_not_overwrite_each_other() {
    const PARTS: usize = 64;
    const PART_BYTES: usize = 3 * 4096 + 512;
    let directory = directory();
    let content = content(PARTS * PART_BYTES);
    let parts: Vec<_> = (0..PARTS)
        .map(|number| Part::new(&content, number * PART_BYTES, PART_BYTES, 0))
        .collect();
    for round in 0..12 {
        let path = directory.path().join(format!("data-{round}"));
        let target =
            TargetFile::create(&path, content.len() as u64, DirectPolicy::Preferred).unwrap();
        write_in_threads(&target, &parts, 8);
        target.finish().unwrap();
        assert!(std::fs::read(&path).unwrap() == content, "round {round}");
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn what_exceeds_one_write_is_continued() {
    const LEN: usize = (20 << 20) + 777;
    let directory = directory();
    let content = content(LEN);
    for policy in [DirectPolicy::Never, DirectPolicy::Preferred] {
        let path = directory.path().join(policy.as_str());
        let target = TargetFile::create(&path, LEN as u64, policy).unwrap();
        target.write_all_at(&content, 0, &control()).unwrap();
        target.finish().unwrap();
        assert!(std::fs::read(&path).unwrap() == content, "{policy}");
    }
}

#[test]
fn a_range_can_be_written_again() {
    let directory = directory();
    let path = directory.path().join("data");
    let target = TargetFile::create(&path, 10_000, DirectPolicy::Preferred).unwrap();
    for fill in [1, 2] {
        target.write_all_at(&[fill; 10_000], 0, &control()).unwrap();
        target
            .write_all_at(&[fill; 5000], 2500, &control())
            .unwrap();
    }
    assert_eq!(target.finish().unwrap().bytes, 10_000);
    assert_eq!(std::fs::read(&path).unwrap(), [2; 10_000]);
}

// ---- what is refused ----

#[test]
fn what_is_there_is_never_written_to() {
    let directory = directory();
    let path = directory.path().join("data");
    std::fs::write(&path, "old").unwrap();
    let expect_refusal = |path: &Path| {
        for policy in POLICIES {
            let error = TargetFile::create(path, 100, policy).unwrap_err();
            assert_eq!(
                error.io_error().unwrap().kind(),
                io::ErrorKind::AlreadyExists
            );
            assert_eq!(error.path(), Some(path));
            let text = error.to_string();
            assert!(
                text.starts_with("create ") && text.contains("remove it"),
                "{text}"
            );
        }
    };
    expect_refusal(&path);
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    #[cfg(unix)]
    for leads_to in ["nowhere", "data"] {
        let link = directory.path().join(format!("link-to-{leads_to}"));
        std::os::unix::fs::symlink(leads_to, &link).unwrap();
        expect_refusal(&link);
        assert!(link.is_symlink());
        assert!(!directory.path().join("nowhere").exists());
    }
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
}

#[test]
fn a_missing_directory_is_named() {
    let directory = directory();
    let path = directory.path().join("missing/data");
    let error = TargetFile::create(&path, 100, DirectPolicy::Never).unwrap_err();
    assert_eq!(error.io_error().unwrap().kind(), io::ErrorKind::NotFound);
    assert_eq!(error.path(), Some(path.as_path()));
}

#[test]
fn ranges_outside_the_file_are_refused() {
    let directory = directory();
    let path = directory.path().join("data");
    let target = TargetFile::create(&path, 1000, DirectPolicy::Preferred).unwrap();
    for (offset, len) in [
        (0, 1001),
        (999, 2),
        (1000, 1),
        (5000, 10),
        (u64::MAX, 1),
        (u64::MAX, 0),
    ] {
        let error = target
            .write_all_at(&vec![1; len], offset, &control())
            .unwrap_err();
        assert!(
            matches!(&error, Error::OutsideTarget { offset: named, length, file_bytes: 1000, path: named_path }
                if *named == offset && *length == len as u64 && named_path == &path),
            "{error:?}"
        );
    }
    // At the end, and nothing.
    target.write_all_at(&[], 1000, &control()).unwrap();
    target.write_all_at(&[7; 1000], 0, &control()).unwrap();
    target.finish().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), [7; 1000]);
}

#[test]
fn missing_bytes_are_noticed_at_the_end() {
    let directory = directory();
    for (written, first, missing) in [
        (vec![], 0, 10_000),
        (vec![(0, 9999)], 9999, 1),
        (vec![(1, 9999)], 0, 1),
        (vec![(0, 4096), (4097, 5903)], 4096, 1),
        (vec![(5000, 2000), (0, 1000), (1000, 500)], 1500, 6500),
    ] {
        let path = directory.path().join("data");
        let target = TargetFile::create(&path, 10_000, DirectPolicy::Preferred).unwrap();
        for (offset, len) in written {
            target
                .write_all_at(&vec![1; len], offset, &control())
                .unwrap();
        }
        match target.finish() {
            Err(Error::IncompleteTarget {
                path: named,
                offset,
                missing_bytes,
                file_bytes: 10_000,
            }) => {
                assert_eq!((offset, missing_bytes), (first, missing));
                assert_eq!(named, path);
            }
            other => panic!("{other:?}"),
        }
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn a_file_that_somebody_else_changes_is_noticed_at_the_end() {
    let directory = directory();
    for len in [0, 9999, 10_001] {
        let path = directory.path().join(format!("becomes-{len}"));
        let target = TargetFile::create(&path, 10_000, DirectPolicy::Never).unwrap();
        target.write_all_at(&[1; 10_000], 0, &control()).unwrap();
        let other = std::fs::File::options().write(true).open(&path).unwrap();
        other.set_len(len).unwrap();
        let error = target.finish().unwrap_err();
        assert!(
            matches!(&error, Error::ChangedTarget { path: named, expected_bytes: 10_000, actual_bytes }
                if named == &path && *actual_bytes == len),
            "{error:?}"
        );
    }
}

#[test]
fn an_empty_file_is_complete_at_once() {
    let directory = directory();
    for policy in [DirectPolicy::Never, DirectPolicy::Preferred] {
        let path = directory.path().join(policy.as_str());
        let target = TargetFile::create(&path, 0, policy).unwrap();
        assert!(target.is_empty());
        assert_eq!(target.finish().unwrap().bytes, 0);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
    }
}

// ---- how it stops ----

#[test]
fn a_write_that_was_cancelled_before_writes_nothing() {
    let directory = directory();
    let path = directory.path().join("data");
    let target = TargetFile::create(&path, 10_000, DirectPolicy::Preferred).unwrap();
    let token = CancelToken::new();
    token.cancel();
    let control = Control::new().with_cancel(token);
    let outcome = target.write_all_at(&[1; 10_000], 0, &control);
    assert!(matches!(outcome, Err(Error::Cancelled)), "{outcome:?}");
    assert_eq!(std::fs::read(&path).unwrap(), [0; 10_000]);
    assert!(matches!(
        target.finish(),
        Err(Error::IncompleteTarget {
            missing_bytes: 10_000,
            ..
        })
    ));
}

/// Cancelled as soon as something is in the file, most of it is never written, and none of it counts.
#[cfg(unix)]
#[test]
fn a_write_is_cancelled_between_its_chunks() {
    use std::os::unix::fs::FileExt;

    const LEN: usize = 64 << 20;
    let directory = directory();
    let content = vec![7; LEN];
    // The system may let the other thread sleep for longer than the whole write takes.
    for attempt in 0.. {
        let path = directory.path().join(format!("data-{attempt}"));
        let target = TargetFile::create(&path, LEN as u64, DirectPolicy::Preferred).unwrap();
        let token = CancelToken::new();
        let control = Control::new().with_cancel(token.clone());
        let other = std::fs::File::open(&path).unwrap();
        let outcome = std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut byte = [0];
                while byte == [0] {
                    other.read_exact_at(&mut byte, 0).unwrap();
                }
                token.cancel();
            });
            target.write_all_at(&content, 0, &control)
        });
        if let Err(error) = outcome {
            assert!(error.is_cancelled(), "{error}");
            let mut last = [7];
            other.read_exact_at(&mut last, LEN as u64 - 1).unwrap();
            assert_eq!(last, [0], "written to its end all the same");
            // It can be written again, and is then complete.
            target.write_all_at(&content, 0, &Control::new()).unwrap();
            target.finish().unwrap();
            return;
        }
        assert!(attempt < 20, "never cancelled in the middle");
        std::fs::remove_file(&path).unwrap();
    }
}
