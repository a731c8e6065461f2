//! What a populated mapping promises: every page is there, or an error says why not.
#![cfg(all(feature = "mmap", target_os = "linux", not(tensora_portable)))]
#![allow(
    unsafe_code,
    clippy::panic,
    clippy::single_range_in_vec_init,
    clippy::unwrap_used
)]

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use tensora_io::{Control, Error, Mapping, MappingPermit, PopulateParams, SourceFile};

/// Not a multiple of a page, nor of what a fault brings in.
const LEN: u64 = (3 << 20) + 70_123;

fn mapped(file: &SourceFile) -> Mapping {
    // SAFETY: the bytes of the mapping are not looked at once its file is shortened.
    let permit = unsafe { MappingPermit::new() };
    Mapping::new(file, permit).unwrap()
}

fn written(len: u64) -> (tempfile::NamedTempFile, SourceFile) {
    // Not in `/tmp`, which may be a file system in memory, whose pages are never evicted.
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    std::fs::write(file.path(), vec![7; usize::try_from(len).unwrap()]).unwrap();
    file.as_file().sync_all().unwrap();
    let source = SourceFile::open(file.path()).unwrap();
    (file, source)
}

/// The pages of `range` that are not in this process's page table, by the kernel's word.
fn missing(mapping: &Mapping, range: &Range<u64>) -> Vec<u64> {
    let page = rustix::param::page_size() as u64;
    let base = mapping.as_slice().as_ptr() as u64;
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    (range.start / page..range.end.div_ceil(page))
        .filter(|number| {
            let mut entry = [0; 8];
            pagemap
                .read_exact_at(&mut entry, (base / page + number) * 8)
                .unwrap();
            u64::from_ne_bytes(entry) >> 63 == 0
        })
        .collect()
}

#[test]
fn every_page_of_populated_ranges_is_in_the_page_table() {
    let (_kept, file) = written(LEN);
    let every_kind = [
        vec![0..LEN],
        vec![5..70_001, 1_000_000..1_000_001, LEN - 1..LEN],
        vec![65_535..65_537, 200_000..400_000],
        (0..40)
            .map(|i| i * 70_000 + 11..i * 70_000 + 9_000)
            .collect(),
    ];
    for ranges in &every_kind {
        for chunk_bytes in [4096, 100_000, 256 << 10, 4 << 20] {
            for resident_bytes in [0, LEN / 2, LEN] {
                // Also where the claim is false.
                for known_resident in [false, true] {
                    file.evict().unwrap();
                    let mut bytes = vec![0; usize::try_from(resident_bytes).unwrap()];
                    file.file().read_exact_at(&mut bytes, 0).unwrap();
                    let mapping = mapped(&file);
                    assert!(
                        !missing(&mapping, &(0..LEN)).is_empty(),
                        "nothing is there before"
                    );
                    let params = PopulateParams {
                        chunk_bytes,
                        workers: 2,
                        known_resident,
                    };
                    mapping
                        .populate(&file, ranges, &params, &Control::default())
                        .unwrap();
                    for range in ranges {
                        assert_eq!(
                            missing(&mapping, range),
                            [0; 0],
                            "{range:?} by {params:?}, {resident_bytes} resident"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_file_that_was_shortened_cannot_be_populated() {
    // Within the last window of a fault, and long before it.
    for cut in [1, 4096, 60_000, 65_536, 2 << 20] {
        let (kept, file) = written(LEN);
        let mapping = mapped(&file);
        // Shortened by pages: of the page with the end of the file, all bytes are there.
        let page = rustix::param::page_size() as u64;
        let now = (LEN - cut) / page * page;
        kept.as_file().set_len(now).unwrap();
        for known_resident in [false, true] {
            let params = PopulateParams {
                chunk_bytes: 256 << 10,
                workers: 2,
                known_resident,
            };
            match mapping.populate(&file, &[0..LEN], &params, &Control::default()) {
                Err(Error::UnexpectedEof { actual_end, .. }) => assert_eq!(actual_end, now),
                other => panic!("{cut} bytes shorter: {other:?}"),
            }
        }
    }
}
