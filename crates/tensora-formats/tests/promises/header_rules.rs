//! Each rule about a single SafeTensors file, broken once.

use std::path::Path;

use tensora_formats::{
    CheckpointIndex, Dtype, DuplicateNames, Error, OpenOptions, Result, SafetensorsHeader,
    parse_safetensors_header, safetensors_header_bytes,
};

use crate::fixture::{Directory, assert_refused, safetensors};

const FILE: &str = "weights/model.safetensors";

/// Parses `header` as that of a file with `data_bytes` of data.
fn parse(header: impl AsRef<[u8]>, data_bytes: u64) -> Result<SafetensorsHeader> {
    let header = header.as_ref();
    let file_bytes = 8 + header.len() as u64 + data_bytes;
    parse_safetensors_header(Path::new(FILE), header, file_bytes, DuplicateNames::Reject)
}

/// A header with one tensor `t` of these fields.
fn entry(fields: &str) -> String {
    format!(r#"{{"ok":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}},"t":{{{fields}}}}}"#)
}

#[test]
fn file_too_short() {
    let directory = Directory::new();
    for length in [0, 7] {
        let path = directory.write("short.safetensors", vec![0; length]);
        assert_refused!(
            CheckpointIndex::open(&path),
            Error::FileTooShort { .. },
            path.display(),
            format!("{length} bytes long"),
        );
    }
}

#[test]
fn header_too_large() {
    let start = 100_000_001u64.to_le_bytes();
    assert_refused!(
        safetensors_header_bytes(Path::new(FILE), &start, u64::MAX),
        Error::HeaderTooLarge { .. },
        FILE,
        "100000001",
        "100000000",
    );
    let start = 100_000_000u64.to_le_bytes();
    let bytes = safetensors_header_bytes(Path::new(FILE), &start, 100_000_008).unwrap();
    assert_eq!(bytes, 100_000_000);
    // The limit holds for the parser too, whoever has read the header.
    assert_refused!(
        parse(vec![b' '; 100_000_001], 0),
        Error::HeaderTooLarge { .. },
        FILE,
        "100000001",
    );
}

#[test]
fn header_past_end() {
    let start = 3u64.to_le_bytes();
    assert_refused!(
        safetensors_header_bytes(Path::new(FILE), &start, 10),
        Error::HeaderPastEnd { .. },
        FILE,
        "3 bytes",
        "10 bytes",
    );
    assert_refused!(
        parse_safetensors_header(Path::new(FILE), b"{}", 9, DuplicateNames::Reject),
        Error::HeaderPastEnd { .. },
        FILE,
        "9 bytes",
    );
}

#[test]
fn truncated_names_the_damaged_tensors() {
    let header = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},
        "b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]},
        "c":{"dtype":"U8","shape":[0],"data_offsets":[8,8]},
        "d":{"dtype":"U8","shape":[4],"data_offsets":[8,12]}}"#;
    let Err(Error::Truncated {
        damaged,
        needed_bytes,
        file_bytes,
        ..
    }) = parse(header, 7)
    else {
        panic!("should be refused");
    };
    assert_eq!(damaged, ["b", "d"]);
    assert_eq!(needed_bytes - file_bytes, 5);
    assert_refused!(
        parse(header, 7),
        Error::Truncated { .. },
        FILE,
        "5 bytes missing",
        r#""b", "d""#,
    );
}

#[test]
fn trailing_bytes() {
    assert_refused!(
        parse("{}", 1),
        Error::TrailingBytes { .. },
        FILE,
        "11 bytes long",
        "describes only 10",
        "1 byte left over",
        "download or copy it again",
    );
}

#[test]
fn empty_header() {
    assert_refused!(
        parse("", 0),
        Error::EmptyText { .. },
        FILE,
        "its header is empty",
        "download or copy it again",
    );
    // As a file full of zeros has it.
    let directory = Directory::new();
    let path = directory.write("zeros.safetensors", [0; 4096]);
    assert_refused!(
        CheckpointIndex::open(&path),
        Error::EmptyText { .. },
        path.display(),
        "its header is empty",
    );
}

#[test]
fn not_utf8() {
    assert_refused!(
        parse(b"{\"a\xff\": 1}", 0),
        Error::NotUtf8 { offset: 3, .. },
        FILE,
        "byte 3",
    );
}

#[test]
fn byte_order_mark() {
    assert_refused!(parse("\u{feff}{}", 0), Error::ByteOrderMark { .. }, FILE);
}

#[test]
fn nul_padding() {
    assert_refused!(
        parse("{}  \0\0", 0),
        Error::NulPadding { offset: 4, .. },
        FILE,
        "byte 4",
        "spaces",
    );
    // NUL bytes after a text that is wrong anyway are not the first thing to tell.
    assert_refused!(parse("{\0\0", 0), Error::Json { .. }, FILE);
}

#[test]
fn json() {
    for (header, line) in [
        (" ", 1),
        ("{", 1),
        ("{}{}", 1),
        ("{\"a\":\n nope}", 2),
        ("{\"a\\ud800\": 1}", 1),
    ] {
        assert_refused!(
            parse(header, 0),
            Error::Json { .. },
            FILE,
            format!("line {line}, column "),
        );
    }
    let deep = format!(
        "{{\"__metadata__\":null,\"a\":{}{}}}",
        "[".repeat(200),
        "]".repeat(200)
    );
    assert_refused!(parse(deep, 0), Error::WrongType { .. }, FILE, r#""a""#);
    // A field that nobody reads: the diagnosing pass finds nothing, and the strict parser's word
    // stands.
    let fields = format!(
        r#""dtype":"U8","shape":[0],"data_offsets":[0,0],"x":{}{}"#,
        "[".repeat(200),
        "]".repeat(200)
    );
    assert_refused!(
        parse(entry(&fields), 0),
        Error::Json { .. },
        FILE,
        "recursion limit"
    );
}

#[test]
fn unexpected_value() {
    for (header, key, found) in [
        ("[]", "the header", "an array"),
        ("3", "the header", "a number"),
        (r#"{"__metadata__":[]}"#, "__metadata__", "an array"),
        (
            r#"{"__metadata__":{"format":1}}"#,
            "__metadata__.format",
            "a number",
        ),
        (
            r#"{"__metadata__":{"format":null}}"#,
            "__metadata__.format",
            "null",
        ),
    ] {
        assert_refused!(
            parse(header, 0),
            Error::UnexpectedValue { .. },
            FILE,
            key,
            found
        );
    }
}

#[test]
fn duplicate_metadata() {
    assert_refused!(
        parse(r#"{"__metadata__":{},"__metadata__":{}}"#, 0),
        Error::DuplicateKey { .. },
        FILE,
        "__metadata__",
    );
}

#[test]
fn duplicate_tensor_is_refused_unless_the_last_may_win() {
    let header = r#"{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
        "u":{"dtype":"U8","shape":[1],"data_offsets":[2,3]},
        "t":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}"#;
    assert_refused!(
        parse(header, 3),
        Error::DuplicateTensor { .. },
        FILE,
        r#""t""#
    );

    let directory = Directory::new();
    let path = directory.write("model.safetensors", safetensors(header, 3));
    let index = OpenOptions::new()
        .duplicate_names(DuplicateNames::LastWins)
        .open(path)
        .unwrap();
    assert_eq!(index.tensors().len(), 2);
    assert_eq!(index.tensor("t").unwrap().shape, [2]);
}

#[test]
fn unknown_dtype() {
    for dtype in ["F33", "bf16", "F8", "", "torch.float16"] {
        assert_refused!(
            parse(
                entry(&format!(
                    r#""dtype":"{dtype}","shape":[],"data_offsets":[0,4]"#
                )),
                4
            ),
            Error::UnknownDtype { .. },
            FILE,
            r#"tensor "t""#,
            format!("{dtype:?}"),
            "such as bfloat16",
        );
    }
}

#[test]
fn negative_number() {
    for (fields, field) in [
        (
            r#""dtype":"U8","shape":[1,-5],"data_offsets":[0,0]"#,
            "shape",
        ),
        (
            r#""dtype":"U8","shape":[0],"data_offsets":[-5,0]"#,
            "data_offsets",
        ),
    ] {
        assert_refused!(
            parse(entry(fields), 0),
            Error::NegativeNumber { .. },
            FILE,
            r#"tensor "t""#,
            format!("-5 in {field}"),
        );
    }
}

#[test]
fn fractional_number() {
    for value in ["1.5", "1.0", "1e0"] {
        assert_refused!(
            parse(
                entry(&format!(
                    r#""dtype":"U8","shape":[{value}],"data_offsets":[0,1]"#
                )),
                1
            ),
            Error::FractionalNumber { .. },
            FILE,
            r#"tensor "t""#,
            format!("{value} in shape"),
        );
    }
}

#[test]
fn number_too_large() {
    assert_refused!(
        parse(
            entry(r#""dtype":"U8","shape":[18446744073709551616],"data_offsets":[0,1]"#),
            1
        ),
        Error::NumberTooLarge { .. },
        FILE,
        r#"tensor "t""#,
        "18446744073709551616 in shape",
    );
}

#[test]
fn missing_field() {
    for (fields, field) in [
        (r#""shape":[],"data_offsets":[0,4]"#, "dtype"),
        (r#""dtype":"F32","data_offsets":[0,4]"#, "shape"),
        (r#""dtype":"F32","shape":[]"#, "data_offsets"),
    ] {
        assert_refused!(
            parse(entry(fields), 4),
            Error::MissingField { .. },
            FILE,
            r#"tensor "t""#,
            format!("{field:?}"),
        );
    }
}

#[test]
fn duplicate_field() {
    for (extra, field) in [
        (r#""dtype":"F32""#, "dtype"),
        (r#""shape":[]"#, "shape"),
        (r#""data_offsets":[0,4]"#, "data_offsets"),
    ] {
        let fields = format!(r#""dtype":"F32","shape":[],"data_offsets":[0,4],{extra}"#);
        assert_refused!(
            parse(entry(&fields), 4),
            Error::DuplicateField { .. },
            FILE,
            r#"tensor "t""#,
            format!("{field:?} twice"),
        );
    }
}

#[test]
fn wrong_type() {
    for (fields, field, found) in [
        (
            r#""dtype":4,"shape":[],"data_offsets":[0,4]"#,
            "dtype",
            "a number",
        ),
        (
            r#""dtype":"F32","shape":4,"data_offsets":[0,4]"#,
            "shape",
            "a number",
        ),
        (
            r#""dtype":"F32","shape":["4"],"data_offsets":[0,4]"#,
            "shape",
            "a string",
        ),
        (
            r#""dtype":"F32","shape":[],"data_offsets":{}"#,
            "data_offsets",
            "an object",
        ),
        (
            r#""dtype":"F32","shape":[],"data_offsets":[0,true]"#,
            "data_offsets",
            "a boolean",
        ),
    ] {
        assert_refused!(
            parse(entry(fields), 4),
            Error::WrongType { .. },
            FILE,
            r#"tensor "t""#,
            format!("{field} must be "),
            format!("found {found}"),
        );
    }
    for (value, found) in [
        ("null", "null"),
        ("[]", "an array"),
        ("\"F32\"", "a string"),
    ] {
        assert_refused!(
            parse(format!("{{\"t\":{value}}}"), 0),
            Error::WrongType { .. },
            FILE,
            r#"tensor "t""#,
            "its entry must be an object",
            format!("found {found}"),
        );
    }
}

#[test]
fn offset_count() {
    for (offsets, count) in [("[]", 0), ("[0]", 1), ("[0,4,4]", 3)] {
        let fields = format!(r#""dtype":"F32","shape":[],"data_offsets":{offsets}"#);
        assert_refused!(
            parse(entry(&fields), 4),
            Error::OffsetCount { .. },
            FILE,
            r#"tensor "t""#,
            format!("found {count}"),
        );
    }
}

#[test]
fn first_offset() {
    let header = r#"{"t":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}"#;
    assert_refused!(
        parse(header, 8),
        Error::FirstOffset { .. },
        FILE,
        r#""t""#,
        "offset 4"
    );
}

#[test]
fn hole() {
    let header = r#"{"t":{"dtype":"U8","shape":[4],"data_offsets":[7,11]},
        "first":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#;
    assert_refused!(
        parse(header, 11),
        Error::Hole { .. },
        FILE,
        r#"tensor "t""#,
        "offset 7",
        r#""first", ends at 4"#,
        "3 bytes",
    );
}

#[test]
fn overlap() {
    let header = r#"{"t":{"dtype":"U8","shape":[4],"data_offsets":[3,7]},
        "first":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#;
    assert_refused!(
        parse(header, 7),
        Error::Overlap { .. },
        FILE,
        r#"tensor "t""#,
        "offset 3",
        r#""first", which ends at 4"#,
    );
}

#[test]
fn reversed_offsets() {
    let header = r#"{"t":{"dtype":"U8","shape":[4],"data_offsets":[4,0]}}"#;
    assert_refused!(
        parse(header, 4),
        Error::ReversedOffsets { .. },
        FILE,
        r#""t""#,
        "[4, 0]",
    );
}

#[test]
fn shape_overflow() {
    for shape in [
        "[4294967296,4294967296]",
        "[18446744073709551615]",
        "[9223372036854775808,2,0]",
    ] {
        assert_refused!(
            parse(
                entry(&format!(
                    r#""dtype":"F64","shape":{shape},"data_offsets":[0,0]"#
                )),
                0
            ),
            Error::ShapeOverflow { .. },
            FILE,
            r#"tensor "t""#,
            "F64",
            shape.replace(',', ", "),
        );
    }
}

#[test]
fn partial_byte() {
    for (dtype, shape, bits) in [
        ("F4", "[3]", 12),
        ("F6_E2M3", "[2]", 12),
        ("F6_E3M2", "[]", 6),
    ] {
        let fields = format!(r#""dtype":"{dtype}","shape":{shape},"data_offsets":[0,2]"#);
        assert_refused!(
            parse(entry(&fields), 2),
            Error::PartialByte { .. },
            FILE,
            r#"tensor "t""#,
            dtype,
            format!("{bits} bits"),
        );
    }
}

#[test]
fn size_mismatch() {
    assert_refused!(
        parse(
            entry(r#""dtype":"BF16","shape":[2,3],"data_offsets":[0,13]"#),
            13
        ),
        Error::SizeMismatch { .. },
        FILE,
        r#"tensor "t""#,
        "BF16 [2, 3] takes 12 bytes",
        "13 are stored",
    );
}

/// What the reference accepts although it looks odd.
#[test]
fn accepted() {
    assert!(parse("{}", 0).unwrap().tensors.is_empty());
    assert!(parse(" \n{ } \t", 0).unwrap().tensors.is_empty());
    assert!(
        parse(r#"{"__metadata__":null}"#, 0)
            .unwrap()
            .metadata
            .is_empty()
    );
    let header = parse(r#"{"__metadata__":{"a":"1"}}"#, 0).unwrap();
    assert_eq!(header.metadata["a"], "1");

    let header = parse(
        r#"{"../x":{"dtype":"I64","shape":[],"data_offsets":[1,9],"extra":[{}]},
            "":{"shape":[1],"dtype":"BOOL","data_offsets":[0,1]},
            "z2":{"dtype":"U8","shape":[7,0],"data_offsets":[9,9]},
            "z1":{"dtype":"F32","shape":[0],"data_offsets":[9,9]}}"#,
        9,
    )
    .unwrap();
    let names: Vec<&str> = header.tensors.iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["", "../x", "z1", "z2"]);
    let scalar = &header.tensors[1];
    assert_eq!((scalar.dtype, scalar.bytes), (Dtype::I64, 8));
    assert_eq!((scalar.element_count(), scalar.is_contiguous()), (1, true));
    assert_eq!(header.tensors[3].element_count(), 0);
    // Offsets count from the start of the file, whatever their alignment.
    assert_eq!(scalar.offset, header.tensors[0].offset + 1);
}

#[test]
fn messages_escape_what_a_hostile_name_holds() {
    let escaped = "a\\u001b[31m\\n";
    let directory = Directory::new();
    let with_index = |weight_map: String| {
        directory.write(
            "i.safetensors.index.json",
            format!(r#"{{"weight_map":{weight_map}}}"#),
        );
        CheckpointIndex::open(directory.path()).map(drop)
    };
    // A broken shard, so that its path is in the message; elsewhere no file can have that name.
    #[cfg(unix)]
    directory.write("a\u{1b}[31m\n", safetensors("{}", 1));
    for result in [
        parse(
            format!(r#"{{"{escaped}":{{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}}}"#),
            2,
        )
        .map(drop),
        parse(
            format!(r#"{{"{escaped}":{{"dtype":"{escaped}","shape":[],"data_offsets":[0,1]}}}}"#),
            1,
        )
        .map(drop),
        parse(format!(r#"{{"__metadata__":{{"{escaped}":1}}}}"#), 0).map(drop),
        with_index(format!(r#"{{"{escaped}":1}}"#)),
        with_index(format!(r#"{{"t":"{escaped}"}}"#)),
        with_index(format!(r#"{{"t":"x{escaped}"}}"#)),
    ] {
        let message = result.unwrap_err().to_string();
        assert!(message.contains("[31m"), "{message:?}");
        assert!(!message.contains(char::is_control), "{message:?}");
    }
}
