//! Header by header, the same answer as the reference implementation.
//!
//! Valid headers are generated and then damaged in many ways. For each the two must agree on whether
//! it is accepted, and if so on every tensor. The one difference by design is a tensor name that
//! appears twice; with [`DuplicateNames::LastWins`] there is none.

use std::collections::BTreeMap;
use std::panic;
use std::path::Path;

use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use tensora_formats::{
    Dtype, DuplicateNames, Error, SafetensorsHeader, parse_safetensors_header,
    safetensors_header_bytes,
};

/// A tensor as both sides describe it: dtype, shape, begin and end within the file.
type Description = (String, Vec<u64>, u64, u64);
type Tensors = BTreeMap<String, Description>;

/// What our parser makes of a whole file.
fn ours(file: &[u8], duplicate_names: DuplicateNames) -> Result<SafetensorsHeader, Error> {
    let path = Path::new("x.safetensors");
    let header_bytes = safetensors_header_bytes(path, file, file.len() as u64)?;
    let header = &file[8..8 + usize::try_from(header_bytes).unwrap()];
    parse_safetensors_header(path, header, file.len() as u64, duplicate_names)
}

fn described(header: SafetensorsHeader) -> Tensors {
    let describe = |tensor: tensora_formats::TensorEntry| {
        let range = tensor.range();
        (
            tensor.name,
            (
                tensor.dtype.to_string(),
                tensor.shape,
                range.start,
                range.end,
            ),
        )
    };
    header.tensors.into_iter().map(describe).collect()
}

/// What the reference makes of a whole file. On offsets near 2^64 its arithmetic overflows, which
/// panics in a build like this one; that counts as a refusal.
fn theirs(file: &[u8]) -> Option<Tensors> {
    let read = panic::catch_unwind(|| safetensors::SafeTensors::read_metadata(file).ok());
    let (header_bytes, metadata) = read.ok().flatten()?;
    let data_start = 8 + header_bytes as u64;
    let describe = |(name, info): (String, &safetensors::tensor::TensorInfo)| {
        let (begin, end) = info.data_offsets;
        let shape = info
            .shape
            .iter()
            .map(|&dimension| dimension as u64)
            .collect();
        (
            name,
            (
                info.dtype.to_string(),
                shape,
                data_start + begin as u64,
                data_start + end as u64,
            ),
        )
    };
    Some(metadata.tensors().into_iter().map(describe).collect())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Accepted,
    Refused,
    /// Refused by us alone, for the name that appears twice.
    DuplicateName,
}

/// Compares the two on one file.
fn compare(file: &[u8]) -> Result<Outcome, String> {
    let reference = theirs(file);
    let shown = String::from_utf8_lossy(file);
    match (ours(file, DuplicateNames::LastWins), &reference) {
        (Ok(header), Some(reference)) if described(header.clone()) == *reference => {}
        (Err(_), None) => {}
        (ours, _) => return Err(format!("ours {ours:?}, reference {reference:?}: {shown}")),
    }
    match (ours(file, DuplicateNames::Reject), reference) {
        (Ok(header), Some(reference)) if described(header.clone()) == reference => {
            Ok(Outcome::Accepted)
        }
        (Err(Error::DuplicateTensor { .. }), Some(_)) => Ok(Outcome::DuplicateName),
        (Err(_), None) => Ok(Outcome::Refused),
        (ours, reference) => Err(format!("ours {ours:?}, reference {reference:?}: {shown}")),
    }
}

/// A file with this header text.
fn file(header: &[u8], data_bytes: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    file.resize(file.len() + data_bytes, 0);
    file
}

#[derive(Clone, Debug)]
struct Tensor {
    name: String,
    dtype: Dtype,
    shape: Vec<u64>,
}

/// How an entry is written: all of these are read by the reference as the same thing.
#[derive(Clone, Copy, Debug)]
enum Form {
    Object,
    Reordered,
    WithUnknownField,
    Array,
    DtypeAsObject,
    Spaced,
}

fn entry(tensor: &Tensor, begin: u64, end: u64, form: Form) -> String {
    let dtype = format!("\"{}\"", tensor.dtype.name());
    let shape = format!("{:?}", tensor.shape);
    match form {
        Form::Object => {
            format!(r#"{{"dtype":{dtype},"shape":{shape},"data_offsets":[{begin},{end}]}}"#)
        }
        Form::Reordered => {
            format!(r#"{{"data_offsets":[{begin},{end}],"shape":{shape},"dtype":{dtype}}}"#)
        }
        Form::WithUnknownField => format!(
            r#"{{"x":[{{"y":null}},1e5,-7],"dtype":{dtype},"shape":{shape},"data_offsets":[{begin},{end}]}}"#
        ),
        Form::Array => format!("[{dtype},{shape},[{begin},{end}]]"),
        Form::DtypeAsObject => format!(
            r#"{{"dtype":{{{dtype}:null}},"shape":{shape},"data_offsets":[{begin},{end}]}}"#
        ),
        Form::Spaced => format!(
            "{{ \"dtype\" :\t{dtype},\n\"shape\": {shape} , \"data_offsets\": [ {begin} ,{end}]\r\n}}"
        ),
    }
}

fn any_tensor() -> impl Strategy<Value = Tensor> {
    (
        "[a-d]{1,2}|[\u{e9}./]{0,2}",
        prop::sample::select(Dtype::ALL),
        prop::collection::vec(0u64..5, 0..4),
    )
        .prop_map(|(name, dtype, shape)| Tensor { name, dtype, shape })
}

fn any_form() -> impl Strategy<Value = Form> {
    prop_oneof![
        8 => Just(Form::Object),
        1 => Just(Form::Reordered),
        1 => Just(Form::WithUnknownField),
        1 => Just(Form::Array),
        1 => Just(Form::DtypeAsObject),
        1 => Just(Form::Spaced),
    ]
}

fn any_metadata() -> impl Strategy<Value = Option<&'static str>> {
    prop_oneof![
        4 => Just(None),
        1 => Just(Some(r#""__metadata__":{"format":"pt"}"#)),
        1 => Just(Some(r#""__metadata__":{}"#)),
        1 => Just(Some(r#""__metadata__":null"#)),
        1 => Just(Some(r#""\u005f_metadata__":{"a":"1","a":"2"}"#)),
    ]
}

/// A header as text, and the data bytes that it describes. Sound, but for names that may repeat and
/// for sizes that may not fill whole bytes.
fn any_header() -> impl Strategy<Value = (String, usize)> {
    (
        prop::collection::vec((any_tensor(), any_form()), 0..5),
        any_metadata(),
        prop::sample::select(&["", " ", "   \n\t\r"]),
    )
        .prop_flat_map(|(tensors, metadata, padding)| {
            let mut offset = 0;
            let mut entries = Vec::new();
            for (tensor, form) in tensors {
                let elements: u64 = tensor.shape.iter().product();
                let end = offset + elements * u64::from(tensor.dtype.bits()) / 8;
                let value = entry(&tensor, offset, end, form);
                entries.push(format!(
                    "{}:{value}",
                    serde_json::to_string(&tensor.name).unwrap()
                ));
                offset = end;
            }
            entries.extend(metadata.map(str::to_owned));
            let data_bytes = usize::try_from(offset).unwrap();
            Just(entries).prop_shuffle().prop_map(move |entries| {
                (format!("{{{}}}{padding}", entries.join(",")), data_bytes)
            })
        })
}

/// A way to damage a file. Positions are reduced modulo what there is.
#[derive(Clone, Debug)]
enum Damage {
    /// Nothing at all.
    None,
    /// Flips bits of one byte anywhere.
    Flip(usize, u8),
    /// Replaces the nth occurrence of a text in the header.
    Replace(&'static str, &'static str, usize),
    /// Inserts a text somewhere in the header.
    Insert(&'static str, usize),
    /// Removes a few bytes of the header.
    Remove(usize, usize),
    /// Changes a digit of the header.
    Digit(usize, u8),
    /// Makes the data longer or shorter.
    Resize(i64),
    /// Cuts the file off anywhere.
    Cut(usize),
    /// Writes another header length.
    Length(u64),
}

fn any_damage() -> impl Strategy<Value = Damage> {
    let replacements = prop::sample::select(&[
        ("\"F32\"", "\"f32\""),
        ("\"U8\"", "\"I8\""),
        ("\"dtype\"", "\"shape\""),
        ("\"dtype\"", "\"dtype\":\"U8\",\"dtype\""),
        ("\"shape\"", "\"data_offsets\""),
        ("\"shape\"", "\"SHAPE\""),
        ("\"shape\"", "\"shap\\u0065\""),
        ("\"data_offsets\"", "\"data_offset\""),
        ("\"dtype\":", "\"dtype\":{},\"x\":"),
        ("null", "{}"),
        ("null", "0"),
        ("[", "{"),
        ("]", ",0]"),
        ("]", "]]"),
        ("[", "[0,"),
        ("[", "[-"),
        ("0", "0.0"),
        ("0", "-0"),
        ("1", "1e0"),
        ("2", "18446744073709551616"),
        ("2", "9223372036854775807"),
        ("4", "4294967296,4294967296"),
        (":{", ":null,\"y\":{"),
        ("{\"", "{\"__metadata__\":{\"k\":1},\""),
        ("\"pt\"", "null"),
        ("\"a", "\"__metadata__"),
        ("\"a", "\"b"),
        ("\"b", "\"\\ud800"),
    ])
    .prop_flat_map(|(from, to)| (0usize..4).prop_map(move |nth| Damage::Replace(from, to, nth)));
    let insertions = prop::sample::select(&[
        "\0", " ", "\u{feff}", ",", "\"", "\\", "{}", "[]", "\"\":0,", "1e999", "\u{1}", "/**/",
        "NaN",
    ]);
    prop_oneof![
        3 => Just(Damage::None),
        2 => (any::<usize>(), 1u8..=255).prop_map(|(at, bits)| Damage::Flip(at, bits)),
        6 => replacements,
        2 => (insertions, any::<usize>()).prop_map(|(text, at)| Damage::Insert(text, at)),
        1 => (any::<usize>(), 1usize..8).prop_map(|(at, count)| Damage::Remove(at, count)),
        4 => (any::<usize>(), 0u8..10).prop_map(|(at, digit)| Damage::Digit(at, digit)),
        1 => (-9i64..9).prop_map(Damage::Resize),
        1 => any::<usize>().prop_map(Damage::Cut),
        1 => prop_oneof![0u64..300, Just(100_000_001), Just(u64::MAX)].prop_map(Damage::Length),
    ]
}

/// The damaged file.
fn damaged(header: &str, data_bytes: usize, damage: &Damage) -> Vec<u8> {
    let mut text = header.as_bytes().to_vec();
    let mut data_bytes = data_bytes;
    match *damage {
        Damage::Replace(from, to, nth) => {
            let positions: Vec<usize> = header.match_indices(from).map(|(at, _)| at).collect();
            if !positions.is_empty() {
                let at = positions[nth % positions.len()];
                text.splice(at..at + from.len(), to.bytes());
            }
        }
        Damage::Insert(inserted, at) => {
            let at = at % (text.len() + 1);
            text.splice(at..at, inserted.bytes());
        }
        Damage::Remove(at, count) => {
            let at = at % text.len();
            let end = text.len().min(at + count);
            text.drain(at..end);
        }
        Damage::Digit(at, digit) => {
            let digits: Vec<usize> = (0..text.len())
                .filter(|&at| text[at].is_ascii_digit())
                .collect();
            if !digits.is_empty() {
                text[digits[at % digits.len()]] = b'0' + digit;
            }
        }
        Damage::Resize(by) => {
            data_bytes = data_bytes.saturating_add_signed(isize::try_from(by).unwrap());
        }
        _ => {}
    }
    let mut file = file(&text, data_bytes);
    match *damage {
        Damage::Flip(at, bits) => {
            let at = at % file.len();
            file[at] ^= bits;
        }
        Damage::Cut(at) => file.truncate(at % file.len()),
        Damage::Length(length) => file[..8].copy_from_slice(&length.to_le_bytes()),
        _ => {}
    }
    file
}

#[test]
fn the_reference_agrees_on_generated_headers() {
    let cases = 20_000;
    let mut runner = TestRunner::new(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(cases)
    });
    let counts = std::cell::RefCell::new(BTreeMap::<&str, u32>::new());
    runner
        .run(
            &(any_header(), any_damage(), any_damage()),
            |((header, data_bytes), one, two)| {
                // The second is applied to the header only while it is still text.
                let first = damaged(&header, data_bytes, &one);
                let file = match (&two, std::str::from_utf8(&first[first.len().min(8)..])) {
                    (Damage::None, _) | (_, Err(_)) => first,
                    (_, Ok(_)) if !matches!(one, Damage::Replace(..) | Damage::Digit(..)) => first,
                    (_, Ok(text)) => {
                        let header_len = text.len() - data_bytes;
                        damaged(&text[..header_len], data_bytes, &two)
                    }
                };
                let outcome = compare(&file).map_err(TestCaseError::fail)?;
                let name = match outcome {
                    Outcome::Accepted => "accepted",
                    Outcome::Refused => "refused",
                    Outcome::DuplicateName => "duplicate name",
                };
                *counts.borrow_mut().entry(name).or_default() += 1;
                Ok(())
            },
        )
        .unwrap();

    // An agreement about one class only would say little.
    let counts = counts.into_inner();
    println!("{counts:?}");
    let count = |name| counts.get(name).copied().unwrap_or(0);
    assert!(count("accepted") > cases / 10, "{counts:?}");
    assert!(count("refused") > cases / 4, "{counts:?}");
    assert!(count("duplicate name") > cases / 1000, "{counts:?}");
}

/// Forms that a generator is unlikely to meet, with what the reference does about them.
#[test]
fn the_reference_agrees_on_odd_headers() {
    use Outcome::{Accepted, DuplicateName, Refused};
    let t = r#""t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
    let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    let cases: Vec<(String, usize, Outcome)> = vec![
        ("{}".into(), 0, Accepted),
        ("{}".into(), 1, Refused),
        ("".into(), 0, Refused),
        ("[]".into(), 0, Refused),
        ("[null]".into(), 0, Refused),
        ("null".into(), 0, Refused),
        (" {} ".into(), 0, Accepted),
        ("{}\0".into(), 0, Refused),
        ("\0{}".into(), 0, Refused),
        ("\u{feff}{}".into(), 0, Refused),
        ("{}{}".into(), 0, Refused),
        (format!("{{{t}}}"), 1, Accepted),
        (format!("{{{t},}}"), 1, Refused),
        (format!("{{{t},{t}}}"), 1, DuplicateName),
        (format!(r#"{{{t},"t":{{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}}}"#), 2, DuplicateName),
        // The first one's faults are forgotten with it, unless it cannot be parsed.
        (format!(r#"{{"t":{{"dtype":"U8","shape":[9],"data_offsets":[5,1]}},{t}}}"#), 1, DuplicateName),
        (format!(r#"{{"t":{{"dtype":"U7","shape":[9],"data_offsets":[5,1]}},{t}}}"#), 1, Refused),
        (r#"{"__metadata__":null}"#.into(), 0, Accepted),
        (r#"{"__metadata__":{"a":"b","a":"c"}}"#.into(), 0, Accepted),
        (r#"{"__metadata__":null,"__metadata__":null}"#.into(), 0, Refused),
        (r#"{"__metadata__":[]}"#.into(), 0, Refused),
        (r#"{"__metadata__":{"a":1}}"#.into(), 0, Refused),
        (r#"{"t":["U8",[1],[0,1]]}"#.into(), 1, Accepted),
        (r#"{"t":["U8",[1],[0,1],0]}"#.into(), 1, Refused),
        (r#"{"t":["U8",[1]]}"#.into(), 1, Refused),
        (r#"{"t":{"dtype":{"U8":null},"shape":[1],"data_offsets":[0,1]}}"#.into(), 1, Accepted),
        (r#"{"t":{"dtype":{"U8":{}},"shape":[1],"data_offsets":[0,1]}}"#.into(), 1, Refused),
        (r#"{"t":{"dtype":{"U8":0},"shape":[1],"data_offsets":[0,1]}}"#.into(), 1, Refused),
        (r#"{"t":{"dtype":4,"shape":[1],"data_offsets":[0,1]}}"#.into(), 1, Refused),
        (r#"{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1e999}}"#.into(), 1, Refused),
        (r#"{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":"\ud800"}}"#.into(), 1, Refused),
        (r#"{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":0,"x":0}}"#.into(), 1, Accepted),
        (
            format!(r#"{{"t":{{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":{}}}}}"#, nested(100)),
            1,
            Accepted,
        ),
        (
            format!(r#"{{"t":{{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":{}}}}}"#, nested(130)),
            1,
            Refused,
        ),
        (r#"{"t":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}"#.into(), 0, Refused),
        (r#"{"t":{"dtype":"U8","shape":[01],"data_offsets":[0,1]}}"#.into(), 1, Refused),
        (r#"{"t":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}}"#.into(), 1, Refused),
        (r#"{"t":{"dtype":"U8","shape":[0,18446744073709551615,9],"data_offsets":[0,0]}}"#.into(), 0, Accepted),
        (r#"{"t":{"dtype":"U8","shape":[18446744073709551615,9,0],"data_offsets":[0,0]}}"#.into(), 0, Refused),
        (r#"{"t":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}"#.into(), 1, Accepted),
        (r#"{"t":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}"#.into(), 1, Refused),
        (r#"{"t":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}"#.into(), 3, Accepted),
        (
            r#"{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"b":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"c":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"d":{"dtype":"U8","shape":[0],"data_offsets":[1,1]}}"#.into(),
            1,
            Accepted,
        ),
        (r#"{"":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#.into(), 1, Accepted),
    ];
    // Ends within 8 bytes of 2^64: the reference's sum with the header's length overflows.
    let step = (1u64 << 61) - 1;
    let huge: Vec<String> = (0..8)
        .map(|n| {
            let (begin, end) = (n * step, (n + 1) * step);
            format!(r#""{n}":{{"dtype":"U8","shape":[{step}],"data_offsets":[{begin},{end}]}}"#)
        })
        .collect();
    let overflowing = format!("{{{}}}", huge.join(","));
    let cases = cases.into_iter().chain([(overflowing, 0, Refused)]);
    for (header, data_bytes, expected) in cases {
        let outcome = compare(&file(header.as_bytes(), data_bytes)).unwrap();
        assert_eq!(outcome, expected, "{header}");
    }
}
