//! Messages stay readable, whatever the files hold that they are about.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use tensora_formats::{
    Dtype, DuplicateNames, Error, Format, Note, ShortPartition, parse_serverlessllm_index,
};

/// Fifty empty partitions, each of which lacks a tensor whose name starts with `long`.
fn short_partitions(long: &str) -> Vec<ShortPartition> {
    let entries: Vec<String> = (0..50)
        .map(|partition| {
            let name = serde_json::to_string(&format!("{long}{partition:02}")).unwrap();
            format!(r#"{name}:[0,1,[],[],"u8",{partition}]"#)
        })
        .collect();
    let index = format!("{{{}}}", entries.join(","));
    let path = Path::new("tensor_index.json");
    match parse_serverlessllm_index(path, index.as_bytes(), &[0; 50], DuplicateNames::Reject) {
        Err(Error::PartitionsTooShort { partitions, .. }) => partitions,
        other => panic!("{other:?}"),
    }
}

/// Every error, its texts and lists as long as a file can make them.
fn errors(long: &str, many: &[String]) -> Vec<Error> {
    let path = PathBuf::from(long);
    let long = long.to_owned();
    let many = many.to_vec();
    vec![
        Error::Io {
            path: path.clone(),
            operation: "a word",
            source: io::Error::other("no"),
        },
        Error::NotFound { path: path.clone() },
        Error::DanglingSymlink {
            path: path.clone(),
            target: path.clone(),
        },
        Error::NotARegularFile {
            path: path.clone(),
            kind: "a word",
        },
        Error::GitLfsPointer {
            path: path.clone(),
            bytes: Some(u64::MAX),
        },
        Error::ForeignFile {
            path: path.clone(),
            kind: "a word",
        },
        Error::NoCheckpoint {
            path: path.clone(),
            found: many.clone(),
        },
        Error::ForeignDirectory {
            path: path.clone(),
            files: many.clone(),
        },
        Error::SeveralIndexes {
            path: path.clone(),
            indexes: many.clone(),
        },
        Error::SeveralFormats { path: path.clone() },
        Error::WrongFormat {
            path: path.clone(),
            asked: Format::ServerlessLlmPartitioned,
            found: Format::ServerlessLlmPartitioned,
        },
        Error::InvalidRevision {
            path: path.clone(),
            revision: long.clone(),
        },
        Error::MissingSnapshot {
            path: path.clone(),
            revision: long.clone(),
            snapshots: many.clone(),
        },
        Error::SeveralSnapshots {
            path: path.clone(),
            snapshots: many.clone(),
        },
        Error::Unfinished { path: path.clone() },
        Error::MissingRank {
            path: path.clone(),
            missing: u32::MAX,
            ranks: (0..100_000).collect(),
        },
        Error::UnknownRank {
            path: path.clone(),
            rank: u32::MAX,
            ranks: (0..100_000).collect(),
        },
        Error::MixedRankFormats {
            path: path.clone(),
            first_rank: u32::MAX,
            first: Format::ServerlessLlmPartitioned,
            rank: u32::MAX,
            format: Format::ServerlessLlmPartitioned,
        },
        Error::FileTooShort {
            path: path.clone(),
            file_bytes: u64::MAX,
        },
        Error::HeaderTooLarge {
            path: path.clone(),
            header_bytes: u64::MAX,
            limit_bytes: u64::MAX,
        },
        Error::HeaderPastEnd {
            path: path.clone(),
            header_bytes: u64::MAX,
            file_bytes: u64::MAX,
        },
        Error::Truncated {
            path: path.clone(),
            file_bytes: u64::MAX,
            needed_bytes: u64::MAX,
            damaged: many.clone(),
        },
        Error::TrailingBytes {
            path: path.clone(),
            file_bytes: u64::MAX,
            described_bytes: u64::MAX,
        },
        Error::IndexTooLarge {
            path: path.clone(),
            bytes: u64::MAX,
            limit_bytes: u64::MAX,
        },
        Error::NotUtf8 {
            path: path.clone(),
            offset: u64::MAX,
        },
        Error::ByteOrderMark { path: path.clone() },
        Error::NulPadding {
            path: path.clone(),
            offset: u64::MAX,
        },
        Error::EmptyText {
            path: path.clone(),
            text: "a word",
        },
        Error::Json {
            path: path.clone(),
            line: usize::MAX,
            column: usize::MAX,
            reason: long.clone(),
        },
        Error::UnexpectedValue {
            path: path.clone(),
            key: long.clone(),
            expected: "a word",
            found: "a word",
        },
        Error::MissingKey {
            path: path.clone(),
            key: "a word",
        },
        Error::DuplicateKey {
            path: path.clone(),
            key: long.clone(),
        },
        Error::DuplicateTensor {
            path: path.clone(),
            tensor: long.clone(),
        },
        Error::UnknownDtype {
            path: path.clone(),
            tensor: long.clone(),
            dtype: long.clone(),
        },
        Error::NegativeNumber {
            path: path.clone(),
            tensor: long.clone(),
            field: "a word",
            value: long.clone(),
        },
        Error::FractionalNumber {
            path: path.clone(),
            tensor: long.clone(),
            field: "a word",
            value: long.clone(),
        },
        Error::NumberTooLarge {
            path: path.clone(),
            tensor: long.clone(),
            field: "a word",
            value: long.clone(),
        },
        Error::MissingField {
            path: path.clone(),
            tensor: long.clone(),
            field: "a word",
        },
        Error::DuplicateField {
            path: path.clone(),
            tensor: long.clone(),
            field: "a word",
        },
        Error::WrongType {
            path: path.clone(),
            tensor: long.clone(),
            field: "a word",
            expected: "a word",
            found: "a word",
        },
        Error::OffsetCount {
            path: path.clone(),
            tensor: long.clone(),
            count: usize::MAX,
        },
        Error::FirstOffset {
            path: path.clone(),
            tensor: long.clone(),
            begin: u64::MAX,
        },
        Error::Hole {
            path: path.clone(),
            tensor: long.clone(),
            begin: u64::MAX,
            previous: long.clone(),
            previous_end: u64::MAX,
        },
        Error::Overlap {
            path: path.clone(),
            tensor: long.clone(),
            begin: u64::MAX,
            previous: long.clone(),
            previous_end: u64::MAX,
        },
        Error::ReversedOffsets {
            path: path.clone(),
            tensor: long.clone(),
            begin: u64::MAX,
            end: u64::MAX,
        },
        Error::ShapeOverflow {
            path: path.clone(),
            tensor: long.clone(),
            dtype: Dtype::F8E4M3Fnuz,
            shape: vec![u64::MAX; 100_000],
        },
        Error::PartialByte {
            path: path.clone(),
            tensor: long.clone(),
            dtype: Dtype::F8E4M3Fnuz,
            shape: vec![u64::MAX; 100_000],
            bits: u64::MAX,
        },
        Error::SizeMismatch {
            path: path.clone(),
            tensor: long.clone(),
            dtype: Dtype::F8E4M3Fnuz,
            shape: vec![u64::MAX; 100_000],
            needed_bytes: u64::MAX,
            stored_bytes: u64::MAX,
        },
        Error::UnsafeFileName {
            path: path.clone(),
            tensor: long.clone(),
            name: long.clone(),
            reason: "a word",
        },
        Error::EmptyWeightMap {
            path: path.clone(),
            files: many.clone(),
        },
        Error::MissingShards {
            path: path.clone(),
            missing: many.clone(),
        },
        Error::TensorNotInShard {
            path: path.clone(),
            tensor: long.clone(),
            shard: long.clone(),
            found_in: Some(long.clone()),
            others: usize::MAX,
        },
        Error::TensorInTwoShards {
            path: path.clone(),
            tensor: long.clone(),
            first: long.clone(),
            second: long.clone(),
        },
        Error::UnlistedTensors {
            path: path.clone(),
            tensors: many.clone(),
        },
        Error::TensorInTwoFiles {
            path: path.clone(),
            tensor: long.clone(),
            first: long.clone(),
            second: long.clone(),
        },
        Error::FieldCount {
            path: path.clone(),
            tensor: long.clone(),
            count: usize::MAX,
        },
        Error::MixedDialects {
            path: path.clone(),
            store: long.clone(),
            partitioned: long.clone(),
        },
        Error::MissingPartition {
            path: path.clone(),
            partition: u64::MAX,
            tensor: Some(long.clone()),
            partitions: usize::MAX,
        },
        Error::CrossesPartition {
            path: path.clone(),
            tensor: long.clone(),
            offset: u64::MAX,
            bytes: u64::MAX,
            partition: u64::MAX,
            partition_end: u64::MAX,
        },
        Error::PartitionsTooShort {
            path: path.clone(),
            partitions: short_partitions(&long),
        },
        Error::UnusedBytes {
            path: path.clone(),
            begin: u64::MAX,
            bytes: u64::MAX,
        },
        Error::SurplusTail {
            path: path.clone(),
            begin: u64::MAX,
            bytes: u64::MAX,
        },
        Error::UnusedPartition {
            path: path.clone(),
            bytes: u64::MAX,
        },
        Error::StrideCount {
            path: path.clone(),
            tensor: long.clone(),
            dimensions: usize::MAX,
            strides: usize::MAX,
        },
        Error::StorageTooSmall {
            path: path.clone(),
            tensor: long.clone(),
            needed_bytes: u64::MAX,
            stored_bytes: u64::MAX,
        },
        Error::RangeOverflow {
            path: path.clone(),
            tensor: long.clone(),
            offset: u64::MAX,
            bytes: u64::MAX,
        },
        Error::DuplicateSpec {
            tensor: long.clone(),
        },
        Error::ReservedName {
            tensor: long.clone(),
        },
        Error::SpecSize {
            tensor: long.clone(),
            dtype: Dtype::F8E4M3Fnuz,
            shape: vec![u64::MAX; 100_000],
        },
        Error::EmptyRecord {
            record: usize::MAX,
            bytes: u64::MAX,
        },
        Error::RecordStrides {
            tensor: long.clone(),
            dimensions: usize::MAX,
            strides: usize::MAX,
        },
        Error::RecordSize {
            tensor: long.clone(),
            needed_bytes: u64::MAX,
            record_bytes: u64::MAX,
        },
        Error::DtypeNotInFormat {
            tensor: long.clone(),
            dtype: Dtype::F8E4M3Fnuz,
            format: Format::ServerlessLlmPartitioned,
        },
        Error::LayoutHeaderTooLarge {
            file: long.clone(),
            header_bytes: u64::MAX,
            limit_bytes: u64::MAX,
        },
        Error::DataAlignment {
            alignment_bytes: u64::MAX,
        },
        Error::LayoutOverflow {
            tensor: long.clone(),
        },
        Error::NoSuchDimension {
            tensor: long.clone(),
            shape: vec![u64::MAX; 100_000],
            dimension: usize::MAX,
        },
        Error::SliceOutside {
            tensor: long.clone(),
            shape: vec![u64::MAX; 100_000],
            dimension: usize::MAX,
            begin: u64::MAX,
            end: u64::MAX,
        },
        Error::SlicedTwice {
            tensor: long.clone(),
            dimension: usize::MAX,
        },
        Error::SliceCutsByte {
            tensor: long.clone(),
            dtype: Dtype::F6E2M3,
            shape: vec![u64::MAX; 100_000],
            part: vec![u64::MAX; 100_000],
        },
        Error::PartNotStored {
            tensor: long.clone(),
            dtype: Dtype::BF16,
            shape: vec![u64::MAX; 100_000],
            stored_bytes: u64::MAX,
        },
        Error::RangeOutside {
            begin: u64::MAX,
            end: u64::MAX,
            length: u64::MAX,
        },
        Error::NoSuchRank {
            rank: u32::MAX,
            world: u32::MAX,
        },
        Error::UnevenRanks {
            length: u64::MAX,
            world: u32::MAX,
            multiple_of: u64::MAX,
        },
        Error::PartOutsideFiles {
            tensor: long.clone(),
            file: usize::MAX,
            files: usize::MAX,
            begin: u64::MAX,
            end: u64::MAX,
        },
        Error::WindowTooSmall {
            tensor: long.clone(),
            window_bytes: u64::MAX,
            needed_bytes: u64::MAX,
        },
        Error::ViewTooLarge {
            tensor: long.clone(),
            window_bytes: u64::MAX,
            needed_bytes: u64::MAX,
        },
    ]
}

/// Every note, in the same way.
fn notes(long: &str, many: &[String]) -> Vec<Note> {
    let long = long.to_owned();
    let many = many.to_vec();
    vec![
        Note::TotalSizeDiffers {
            index: long.clone(),
            stated_bytes: u64::MAX,
            actual_bytes: u64::MAX,
        },
        Note::FilesLeftAlone {
            files: many.clone(),
        },
        Note::TensorsIgnored {
            tensors: many.clone(),
        },
        Note::MetadataConflict {
            key: long.clone(),
            kept: long.clone(),
            file: long.clone(),
            dropped: long.clone(),
        },
        Note::MoreMetadataConflicts { values: u64::MAX },
        Note::NotContiguous {
            tensors: many.clone(),
        },
        Note::SharedBytes {
            tensors: many.clone(),
        },
        Note::UnusedTail {
            file: long.clone(),
            begin: u64::MAX,
            bytes: u64::MAX,
        },
        Note::Damaged {
            tensors: short_partitions(&long)
                .into_iter()
                .flat_map(|partition| partition.tensors)
                .collect(),
            file: long,
            file_bytes: u64::MAX,
            needed_bytes: u64::MAX,
        },
    ]
}

/// The names of the variants that an enum has in its source.
fn variants<'a>(source: &'a str, head: &str) -> BTreeSet<&'a str> {
    let body = source.split_once(head).unwrap().1;
    let body = body.split_once("\n}").unwrap().0;
    body.lines()
        .filter_map(|line| line.strip_prefix("    ")?.strip_suffix(" {"))
        .filter(|name| name.starts_with(|first: char| first.is_ascii_uppercase()))
        .collect()
}

#[test]
fn no_message_echoes_long_texts() {
    // One and several bytes per character, and one that must not reach a terminal.
    for character in ["n", "ä", "\u{1b}"] {
        let long = character.repeat(100_000);
        let many = vec![long.clone(); 50];
        let named = |debug: String| debug.split(' ').next().unwrap_or_default().to_owned();

        let errors = errors(&long, &many);
        let covered: BTreeSet<String> = errors
            .iter()
            .map(|error| named(format!("{error:?}")))
            .collect();
        let all = variants(include_str!("../../src/error.rs"), "pub enum Error {");
        assert_eq!(
            covered.iter().map(String::as_str).collect::<BTreeSet<_>>(),
            all
        );

        let notes = notes(&long, &many);
        let covered: BTreeSet<String> = notes
            .iter()
            .map(|note| named(format!("{note:?}")))
            .collect();
        let all = variants(include_str!("../../src/note.rs"), "pub enum Note {");
        assert_eq!(
            covered.iter().map(String::as_str).collect::<BTreeSet<_>>(),
            all
        );

        let unknown = [
            long.parse::<Dtype>().unwrap_err().to_string(),
            long.parse::<Format>().unwrap_err().to_string(),
        ];
        let messages = errors
            .iter()
            .map(ToString::to_string)
            .chain(notes.iter().map(ToString::to_string))
            .chain(unknown);
        let length = format!("({} bytes)", long.len());
        // With the number that makes each of them unique.
        let numbered = format!("({} bytes)", long.len() + 2);
        for message in messages {
            // Five names of two hundred characters, each of them escaped, and a path.
            assert!(
                message.len() < 12_000,
                "{} bytes: {message:.2000}",
                message.len()
            );
            assert!(!message.contains('\u{1b}'));
            let quotes = message.contains('…');
            assert_eq!(
                quotes,
                message.contains(&length)
                    || message.contains(&numbered)
                    || message.contains("dimensions)"),
                "{message}"
            );
        }
    }
}

#[test]
fn a_refused_permission_says_what_to_do() {
    let error = |kind| Error::Io {
        path: PathBuf::from("m.safetensors"),
        operation: "open",
        source: io::Error::from(kind),
    };
    let message = error(io::ErrorKind::PermissionDenied).to_string();
    assert!(
        message.starts_with("m.safetensors: could not open: "),
        "{message}"
    );
    assert!(message.contains("; make it readable"), "{message}");
    let message = error(io::ErrorKind::TimedOut).to_string();
    assert!(!message.contains("readable"), "{message}");
}
