//! Each rule about ServerlessLLM checkpoints, broken once, in either dialect.

use std::path::Path;

use tensora_formats::{
    CheckpointIndex, DamagedTensors, Dtype, DuplicateNames, Error, Format, Note, OpenOptions,
    Result, ServerlessLlmIndex, parse_serverlessllm_index,
};

use crate::fixture::{Directory, assert_refused};

const INDEX: &str = "llama/tensor_index.json";

fn parse(index: &str, partition_bytes: &[u64]) -> Result<ServerlessLlmIndex> {
    let path = Path::new(INDEX);
    parse_serverlessllm_index(
        path,
        index.as_bytes(),
        partition_bytes,
        DuplicateNames::Reject,
    )
}

/// Both dialects' entry for a tensor `t` with these first five fields, which are in partition 0.
fn both(five: &str) -> [String; 2] {
    [
        format!(r#"{{"t":[{five}]}}"#),
        format!(r#"{{"t":[{five},0]}}"#),
    ]
}

#[test]
fn the_store_dialect_counts_through_all_partitions() {
    let index = parse(
        r#"{"b":[16,8,[2,2],[2,1],"torch.bfloat16"],
            "a":[0,10,[10],[1],"torch.uint8"],
            "tied":[16,8,[4],[1],"torch.float16"],
            "c":[24,4,[],[],"torch.float32"],
            "z":[28,0,[0],[1],"torch.int64"]}"#,
        &[16, 8, 4],
    )
    .unwrap();
    assert_eq!(index.format, Format::ServerlessLlmStore);
    let tensors: Vec<_> = index
        .tensors
        .iter()
        .map(|t| (t.name.as_str(), t.dtype, t.file, t.offset, t.bytes))
        .collect();
    assert_eq!(
        tensors,
        [
            ("a", Dtype::U8, 0, 0, 10),
            ("b", Dtype::BF16, 1, 0, 8),
            ("c", Dtype::F32, 2, 0, 4),
            ("tied", Dtype::F16, 1, 0, 8),
            ("z", Dtype::I64, 2, 4, 0),
        ]
    );
    assert!(
        index
            .tensors
            .iter()
            .all(tensora_formats::TensorEntry::is_contiguous)
    );
}

#[test]
fn the_partitioned_dialect_counts_within_a_partition() {
    let index = parse(
        r#"{"b":[0,8,[2,2],[2,1],"bf16",1],"a":[4,12,[3],[1],"torch.float32",0]}"#,
        &[16, 8, 4],
    )
    .unwrap();
    assert_eq!(index.format, Format::ServerlessLlmPartitioned);
    let tensors: Vec<_> = index
        .tensors
        .iter()
        .map(|t| (t.name.as_str(), t.dtype, t.file, t.offset, t.bytes))
        .collect();
    assert_eq!(
        tensors,
        [("a", Dtype::F32, 0, 4, 12), ("b", Dtype::BF16, 1, 0, 8)]
    );
}

#[test]
fn opened_from_a_directory() {
    let directory = Directory::new();
    directory.write(
        "tensor_index.json",
        r#"{"w":[0,24,[2,3],[1,2],"f32",1],"tied":[0,24,[6],[1],"f32",1]}"#,
    );
    directory.write("tensor.data_0", [0; 3]);
    directory.write("tensor.data_1", [0; 24]);
    directory.write("tensor.data_01", "not a partition");
    let index = CheckpointIndex::open(directory.path()).unwrap();
    assert_eq!(index.format(), Format::ServerlessLlmPartitioned);
    let files: Vec<(&str, u64)> = index
        .files()
        .iter()
        .map(|file| (file.name.as_str(), file.bytes))
        .collect();
    assert_eq!(files, [("tensor.data_0", 3), ("tensor.data_1", 24)]);
    let view = index.tensor("w").unwrap();
    assert_eq!(view.strides.as_deref(), Some(&[1, 2][..]));
    assert_eq!((view.is_contiguous(), view.range()), (false, 0..24));
    assert_eq!(
        index.notes(),
        [
            Note::NotContiguous {
                tensors: vec!["w".to_owned()]
            },
            Note::SharedBytes {
                tensors: vec!["w".to_owned()]
            },
        ]
    );
    let notes: Vec<String> = index.notes().iter().map(ToString::to_string).collect();
    assert!(
        notes.iter().all(|note| note.contains(r#""w""#)),
        "{notes:?}"
    );
}

#[test]
fn a_view_keeps_its_storage() {
    for text in both(r#"0,40,[2,3],[4,1],"torch.float32""#) {
        let index = parse(&text, &[40]).unwrap();
        let view = &index.tensors[0];
        assert_eq!((view.bytes, view.element_count()), (40, 6));
        assert_eq!(view.strides, Some(vec![4, 1]));
    }
}

#[test]
fn storage_too_small() {
    for text in both(r#"0,24,[2,3],[4,1],"torch.float32""#) {
        assert_refused!(
            parse(&text, &[40]),
            Error::StorageTooSmall { .. },
            INDEX,
            r#"tensor "t""#,
            "reaches 28 bytes",
            "has 24 bytes",
        );
    }
}

#[test]
fn size_mismatch() {
    for text in both(r#"0,25,[2,3],[3,1],"torch.float32""#) {
        assert_refused!(
            parse(&text, &[40]),
            Error::SizeMismatch { .. },
            INDEX,
            r#"tensor "t""#,
            "F32 [2, 3] takes 24 bytes",
            "25 are stored",
        );
    }
}

#[test]
fn shape_overflow() {
    for text in both(r#"0,8,[4294967296,4294967296],[0,0],"torch.float32""#) {
        assert_refused!(
            parse(&text, &[8]),
            Error::ShapeOverflow { .. },
            INDEX,
            r#"tensor "t""#,
            "4294967296",
        );
    }
}

#[test]
fn stride_count() {
    for text in both(r#"0,24,[2,3],[1],"torch.float32""#) {
        assert_refused!(
            parse(&text, &[24]),
            Error::StrideCount { .. },
            INDEX,
            r#"tensor "t""#,
            "2 dimensions but 1 strides",
        );
    }
}

#[test]
fn unknown_dtype() {
    for dtype in ["torch.complex32", "F32", "f4", "float32", ""] {
        for text in both(&format!("0,4,[1],[1],{dtype:?}")) {
            assert_refused!(
                parse(&text, &[4]),
                Error::UnknownDtype { .. },
                INDEX,
                r#"tensor "t""#,
                format!("{dtype:?}"),
                "such as bfloat16",
            );
        }
    }
}

#[test]
fn numbers() {
    for (field, five) in [
        ("offset", r#"N,4,[1],[1],"f32""#),
        ("size", r#"0,N,[1],[1],"f32""#),
        ("shape", r#"0,4,[N],[1],"f32""#),
        ("stride", r#"0,4,[1],[N],"f32""#),
    ] {
        for text in both(five) {
            let with = |number: &str| parse(&text.replace('N', number), &[4]);
            assert_refused!(
                with("-3"),
                Error::NegativeNumber { .. },
                INDEX,
                r#"tensor "t""#,
                format!("-3 in {field}"),
            );
            assert_refused!(
                with("0.5"),
                Error::FractionalNumber { .. },
                INDEX,
                r#"tensor "t""#,
                format!("0.5 in {field}"),
            );
            assert_refused!(
                with("99999999999999999999"),
                Error::NumberTooLarge { .. },
                INDEX,
                r#"tensor "t""#,
                format!("99999999999999999999 in {field}"),
            );
            assert_refused!(
                with("null"),
                Error::WrongType { .. },
                INDEX,
                r#"tensor "t""#,
                format!("{field} must be a number, found null"),
            );
        }
    }
    assert_refused!(
        parse(r#"{"t":[0,4,[1],[1],"f32",-1]}"#, &[4]),
        Error::NegativeNumber { .. },
        "-1 in partition",
    );
}

#[test]
fn wrong_type() {
    for (field, five) in [
        ("shape", r#"0,4,1,[1],"f32""#),
        ("stride", r#"0,4,[1],"1","f32""#),
        ("dtype", "0,4,[1],[1],6"),
    ] {
        for text in both(five) {
            assert_refused!(
                parse(&text, &[4]),
                Error::WrongType { .. },
                INDEX,
                r#"tensor "t""#,
                format!("{field} must be "),
            );
        }
    }
    assert_refused!(
        parse(r#"{"t":{"offset":0}}"#, &[4]),
        Error::WrongType { .. },
        INDEX,
        r#"tensor "t""#,
        "found an object",
    );
    assert_refused!(
        parse("[]", &[]),
        Error::UnexpectedValue { .. },
        INDEX,
        "an array"
    );
}

#[test]
fn field_count() {
    for (fields, count) in [
        ("", 0),
        (r#"0,4,[1],[1]"#, 4),
        (r#"0,4,[1],[1],"f32",0,0"#, 7),
    ] {
        assert_refused!(
            parse(&format!(r#"{{"t":[{fields}]}}"#), &[4]),
            Error::FieldCount { .. },
            INDEX,
            r#"tensor "t""#,
            format!("{count} fields"),
        );
    }
}

#[test]
fn mixed_dialects() {
    assert_refused!(
        parse(
            r#"{"t":[0,4,[1],[1],"f32",0],"u":[0,4,[1],[1],"f32"]}"#,
            &[4]
        ),
        Error::MixedDialects { .. },
        INDEX,
        r#""u" has 5"#,
        r#""t" has 6"#,
    );
}

#[test]
fn duplicate_tensor() {
    let text = r#"{"t":[0,4,[1],[1],"f32"],"t":[4,4,[1],[1],"i32"]}"#;
    assert_refused!(
        parse(text, &[8]),
        Error::DuplicateTensor { .. },
        INDEX,
        r#""t""#
    );
    let directory = Directory::new();
    directory.write("tensor_index.json", text);
    directory.write("tensor.data_0", [0; 8]);
    let index = OpenOptions::new()
        .duplicate_names(DuplicateNames::LastWins)
        .open(directory.path())
        .unwrap();
    assert_eq!(index.tensors().len(), 1);
    assert_eq!(
        (index.tensors()[0].dtype, index.tensors()[0].offset),
        (Dtype::I32, 4)
    );
}

#[test]
fn an_empty_index() {
    assert_refused!(
        parse("", &[]),
        Error::EmptyText { .. },
        INDEX,
        "its index is empty",
        "copy it again",
    );
}

#[test]
fn json() {
    assert_refused!(
        parse("{\n\"t\":[}", &[]),
        Error::Json { .. },
        INDEX,
        "line 2"
    );
    assert_refused!(parse("\u{feff}{}", &[]), Error::ByteOrderMark { .. }, INDEX);
    assert_refused!(
        parse("{}\0", &[]),
        Error::NulPadding { offset: 2, .. },
        INDEX
    );
}

#[test]
fn a_gap_in_the_partitions() {
    let directory = Directory::new();
    let path = directory.write("tensor_index.json", "{}");
    for partition in [0, 1, 3] {
        directory.write(&format!("tensor.data_{partition}"), [0; 8]);
    }
    assert_refused!(
        CheckpointIndex::open(directory.path()),
        Error::MissingPartition { .. },
        path.display(),
        "tensor.data_2 is missing between others",
        "copy it from where",
    );
}

#[test]
fn a_tensor_in_a_missing_partition() {
    assert_refused!(
        parse(r#"{"t":[0,4,[1],[1],"f32",2]}"#, &[4, 4]),
        Error::MissingPartition { .. },
        INDEX,
        "tensor.data_2 is missing",
        r#"tensor "t""#,
        "2 partitions",
    );
    assert_refused!(
        parse(r#"{"t":[0,4,[1],[1],"f32"]}"#, &[]),
        Error::MissingPartition { .. },
        INDEX,
        "tensor.data_0 is missing",
        r#"tensor "t""#,
    );
}

#[test]
fn a_tensor_across_partitions() {
    assert_refused!(
        parse(r#"{"t":[4,8,[2],[1],"f32"]}"#, &[8, 8]),
        Error::CrossesPartition { .. },
        INDEX,
        r#"tensor "t""#,
        "bytes 4..12",
        "tensor.data_0 at 8",
    );
}

#[test]
fn a_lost_tail_names_the_damaged_tensors() {
    for (text, partition_bytes, needed) in [
        (
            r#"{"a":[0,4,[1],[1],"f32"],"c":[16,8,[2],[1],"f32"],"b":[8,8,[2],[1],"f32"]}"#,
            &[12][..],
            24,
        ),
        (
            r#"{"a":[0,4,[1],[1],"f32",0],"c":[8,8,[2],[1],"f32",1],"b":[0,8,[2],[1],"f32",1]}"#,
            &[4, 4][..],
            16,
        ),
    ] {
        let partition = partition_bytes.len() - 1;
        let there = partition_bytes[partition];
        assert_refused!(
            parse(text, partition_bytes),
            Error::PartitionsTooShort { .. },
            INDEX,
            format!("tensor.data_{partition} is {there} bytes long"),
            format!("needs {needed}"),
            r#"2 tensors damaged: "b", "c""#,
            "copy these partitions",
            "leave the damaged tensors out",
        );
    }
}

/// Six tensors over four partitions, of which the first and the last two are too short.
const DAMAGED: &str = r#"{"a":[0,4,[4],[1],"u8",0],"b":[8,4,[2],[2],"u8",0],"c":[0,8,[8],[1],"u8",1],
    "d":[0,8,[8],[1],"u8",2],"e":[4,12,[12],[1],"u8",3],"f":[16,8,[8],[1],"u8",3]}"#;
const DAMAGED_BYTES: [u64; 4] = [11, 8, 0, 10];

#[test]
fn every_short_partition_is_told() {
    let error = parse(DAMAGED, &DAMAGED_BYTES).unwrap_err();
    let message = error.to_string();
    let Error::PartitionsTooShort { partitions, .. } = error else {
        panic!("{error:?}");
    };
    let found: Vec<(&str, u64, u64)> = partitions
        .iter()
        .map(|short| (short.file.as_str(), short.file_bytes, short.needed_bytes))
        .collect();
    assert_eq!(
        found,
        [
            ("tensor.data_0", 11, 12),
            ("tensor.data_2", 0, 8),
            ("tensor.data_3", 10, 24),
        ]
    );
    let damaged: Vec<(&str, std::ops::Range<u64>, u64)> = partitions
        .iter()
        .flat_map(|short| &short.tensors)
        .map(|tensor| {
            (
                tensor.name.as_str(),
                tensor.range.clone(),
                tensor.present_bytes,
            )
        })
        .collect();
    assert_eq!(
        damaged,
        [
            ("b", 8..12, 3),
            ("d", 0..8, 0),
            ("e", 4..16, 6),
            ("f", 16..24, 0),
        ]
    );
    for text in [
        "tensor.data_0 is 11 bytes long, but the index needs 12, tensor.data_2 is 0",
        r#"4 tensors damaged: "b", "d", "e", "f""#,
    ] {
        assert!(message.contains(text), "{message}");
    }
}

#[test]
fn damaged_tensors_can_be_left_out() {
    let directory = Directory::new();
    for rank in ["rank_0", "rank_1"] {
        directory.write(&format!("{rank}/tensor_index.json"), DAMAGED);
        for (partition, bytes) in [12, 8, 8, 24].into_iter().enumerate() {
            directory.write(&format!("{rank}/tensor.data_{partition}"), vec![0; bytes]);
        }
    }
    let options = OpenOptions::new().damaged_tensors(DamagedTensors::LeaveOut);
    let whole = options.open(directory.path()).unwrap();
    assert_eq!(whole, CheckpointIndex::open(directory.path()).unwrap());
    assert_eq!(whole.tensors().len(), 12);

    for (partition, bytes) in DAMAGED_BYTES.into_iter().enumerate() {
        let bytes = vec![0; usize::try_from(bytes).unwrap()];
        directory.write(&format!("rank_1/tensor.data_{partition}"), bytes);
    }
    assert_refused!(
        CheckpointIndex::open(directory.path()),
        Error::PartitionsTooShort { .. },
        directory.join("rank_1").join("tensor_index.json").display(),
        "tensor.data_3 is 10",
    );
    for (path, prefix, kept) in [
        (directory.path(), "rank_1/", 8),
        (&directory.join("rank_1"), "", 2),
    ] {
        let index = options.open(path).unwrap();
        assert_eq!(index.tensors().len(), kept);
        assert!(index.tensor(&format!("{prefix}c")).is_some());
        let notes: Vec<&Note> = index
            .notes()
            .iter()
            .filter(|note| matches!(note, Note::Damaged { .. }))
            .collect();
        assert_eq!(notes.len(), 3);
        let Note::Damaged {
            file,
            file_bytes: 10,
            needed_bytes: 24,
            tensors,
        } = notes[2]
        else {
            panic!("{notes:?}");
        };
        assert_eq!(*file, format!("{prefix}tensor.data_3"));
        assert_eq!(tensors[0].name, format!("{prefix}e"));
        let message = notes[2].to_string();
        assert!(message.contains("left out, not all there (2)"), "{message}");
    }
}

/// Where the last partition of the store dialect is cut off, whatever was in it.
#[test]
fn a_store_without_its_tail() {
    for bytes in 0..24 {
        let directory = Directory::new();
        directory.write("tensor_index.json", RECORDS);
        directory.write("tensor.data_0", [0; 16]);
        directory.write("tensor.data_1", vec![0; bytes]);
        let index = OpenOptions::new()
            .damaged_tensors(DamagedTensors::LeaveOut)
            .open(directory.path())
            .unwrap();
        let names: Vec<&str> = index.tensors().iter().map(|t| t.name.as_str()).collect();
        let expected = match bytes {
            0..6 => &["a"][..],
            6..13 => &["a", "b_part"],
            _ => &["a", "b", "b_part", "b_tied"],
        };
        assert_eq!(names, expected, "{bytes}");
    }
}

#[test]
fn a_lost_tail_that_was_only_padding_is_no_damage() {
    // Five bytes stored in a record of eight.
    assert!(parse(r#"{"t":[0,5,[5],[1],"u8"]}"#, &[5]).is_ok());
    assert!(parse(r#"{"t":[0,5,[5],[1],"u8"]}"#, &[4]).is_err());
}

/// Three records of 16, 13 and 8 bytes; the second is shared by two tensors, one inside the other.
const RECORDS: &str = r#"{"a":[0,16,[16],[1],"u8"],"b":[16,13,[13],[1],"u8"],
    "b_tied":[16,13,[13],[1],"u8"],"b_part":[18,4,[4],[1],"u8"],"c":[32,8,[8],[1],"u8"]}"#;

#[test]
fn surplus_bytes_that_would_shift_later_tensors() {
    assert!(parse(RECORDS, &[40]).is_ok());
    assert!(parse(RECORDS, &[32, 8]).is_ok());
    assert!(parse(RECORDS, &[16, 16, 8]).is_ok());

    let path = |partition: usize| {
        let name = format!("tensor.data_{partition}");
        Path::new(INDEX).with_file_name(name).display().to_string()
    };
    // The first partition padded by 1024 bytes takes in all that belongs to the later ones.
    assert_refused!(
        parse(RECORDS, &[16 + 1024, 16, 8]),
        Error::UnusedBytes {
            begin: 40,
            bytes: 1000,
            ..
        },
        path(0),
        "1000 bytes from byte 40 on belong to no tensor",
        "at most 7 bytes of padding",
        "shift every later tensor",
        "copy the partition again",
    );
    // Between records, at the start of a partition, and by one byte above the limit.
    for (text, sizes, partition, begin, bytes) in [
        (
            r#"{"a":[0,4,[4],[1],"u8"],"b":[12,4,[4],[1],"u8"]}"#,
            &[16][..],
            0,
            4,
            8,
        ),
        (r#"{"a":[8,4,[4],[1],"u8"]}"#, &[12], 0, 0, 8),
        (
            r#"{"a":[0,4,[4],[1],"u8"],"b":[12,4,[4],[1],"u8"]}"#,
            &[12, 4],
            0,
            4,
            8,
        ),
        (
            r#"{"a":[0,4,[4],[1],"u8"],"b":[17,4,[4],[1],"u8"],"z":[16,0,[0],[1],"u8"]}"#,
            &[8, 13],
            1,
            0,
            9,
        ),
    ] {
        assert_refused!(
            parse(text, sizes),
            Error::UnusedBytes { .. },
            path(partition),
            format!("{bytes} bytes from byte {begin} on"),
        );
    }
    let padded = r#"{"a":[0,1,[1],[1],"u8"],"b":[8,4,[4],[1],"u8"]}"#;
    assert!(parse(padded, &[8, 4]).is_ok());
    // The partitioned dialect shifts nothing.
    assert!(parse(r#"{"a":[8,4,[4],[1],"u8",1]}"#, &[99, 99]).is_ok());
}

#[test]
fn a_partition_that_no_tensor_lies_in() {
    for sizes in [&[40, 8][..], &[40, 0], &[32, 0, 8]] {
        let index = parse(RECORDS, sizes);
        assert_refused!(
            index,
            Error::UnusedPartition { .. },
            "tensor.data_1: ",
            format!("{} bytes long", sizes[1]),
            "no tensor",
            "copy the index and all partitions again",
        );
    }
    assert_refused!(
        parse("{}", &[8]),
        Error::UnusedPartition { .. },
        "tensor.data_0"
    );
    assert!(parse("{}", &[0]).is_ok());
    assert!(parse(r#"{"z":[0,0,[0],[1],"u8"]}"#, &[0]).is_ok());
}

#[test]
fn a_long_rest_behind_the_last_record_is_noted() {
    let directory = Directory::new();
    for rank in ["rank_0", "rank_1"] {
        directory.write(&format!("{rank}/tensor_index.json"), RECORDS);
        directory.write(&format!("{rank}/tensor.data_0"), [0; 16]);
        directory.write(&format!("{rank}/tensor.data_1"), [0; 24 + 7]);
    }
    let tails = |path: &Path| -> Vec<Note> {
        let index = CheckpointIndex::open(path).unwrap();
        let notes = index.notes().iter();
        notes
            .filter(|note| matches!(note, Note::UnusedTail { .. }))
            .cloned()
            .collect()
    };
    assert_eq!(tails(directory.path()), []);
    directory.write("rank_1/tensor.data_1", [0; 24 + 8]);
    let found = tails(directory.path());
    assert_eq!(
        found,
        [Note::UnusedTail {
            file: "rank_1/tensor.data_1".to_owned(),
            begin: 24,
            bytes: 8
        }]
    );
    assert!(
        found[0]
            .to_string()
            .contains("8 bytes after its last tensor")
    );
    assert_eq!(tails(&directory.join("rank_1")).len(), 1);
}

/// Three partitions of which the first lost its second half, which was a whole record, and the last has as
/// much too many.
#[test]
fn a_cut_between_records_and_a_surplus_that_hides_it() {
    let record = |name: &str, at: u64| format!(r#""{name}":[{at},4096,[4096],[1],"u8"]"#);
    let records: Vec<String> = ["a", "b", "c", "d"]
        .iter()
        .zip(0..)
        .map(|(name, at)| record(name, at * 4096))
        .collect();
    let text = format!("{{{}}}", records.join(","));
    assert!(parse(&text, &[8192, 4096, 4096]).is_ok());
    // Each tensor would be found inside a partition, but from the second on in a wrong one.
    assert_refused!(
        parse(&text, &[4096, 4096, 8192 + 4096]),
        Error::SurplusTail {
            begin: 8192,
            bytes: 4096,
            ..
        },
        Path::new(INDEX).with_file_name("tensor.data_2").display(),
        "4096 bytes follow the last tensor",
        "an earlier partition may have lost as much",
        "copy all partitions again",
        "cut it to 8192 bytes",
    );
    // Without the surplus, the last partition is too short for what was shifted into it.
    assert_refused!(
        parse(&text, &[4096, 4096, 4096]),
        Error::PartitionsTooShort { .. },
        r#"1 tensor damaged: "d""#,
    );
    // As much as a block can be filled up with, and a single partition, in which nothing is shifted.
    assert!(parse(&text, &[8192, 4096, 4096 + 4095]).is_ok());
    assert!(parse(&text, &[4 * 4096 + 1_000_000]).is_ok());
}

#[test]
fn a_tensor_of_no_bytes_is_never_damaged() {
    for (there, lost, empty) in [
        (
            r#""t":[0,5,[5],[1],"u8"]"#,
            r#""u":[8,8,[8],[1],"u8"]"#,
            r#""z":[16,0,[0],[1],"u8"]"#,
        ),
        (
            r#""t":[0,5,[5],[1],"u8",0]"#,
            r#""u":[8,8,[8],[1],"u8",0]"#,
            r#""z":[16,0,[0],[1],"u8",0]"#,
        ),
    ] {
        assert_refused!(
            parse(&format!("{{{there},{lost},{empty}}}"), &[9]),
            Error::PartitionsTooShort { .. },
            "needs 16",
            r#"1 tensor damaged: "u""#,
        );
        let index = parse(&format!("{{{there},{empty}}}"), &[5]).unwrap();
        assert_eq!(index.tensors[1].range(), 5..5);
    }
}

#[test]
fn range_overflow() {
    let offset = u64::MAX - 3;
    for text in both(&format!(r#"{offset},8,[2],[1],"f32""#)) {
        assert_refused!(
            parse(&text, &[8]),
            Error::RangeOverflow { .. },
            INDEX,
            r#"tensor "t""#,
            offset,
            "overflows",
        );
    }
}
