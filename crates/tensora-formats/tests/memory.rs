//! Opening a checkpoint takes memory and time linear in the bytes of metadata that are there, whatever they
//! say.
//!
//! A binary of its own with a single test, because the allocator counts for the whole process.

// `allow-unwrap-in-tests` does not reach the functions that tests share.
#![allow(clippy::unwrap_used)]

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use peak_alloc::PeakAlloc;
use tensora_formats::{
    CheckpointIndex, DamagedTensors, DuplicateNames, Note, OpenOptions, Result, UnlistedTensors,
};

/// Counts a block that is being moved at both of its places.
#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// What `docs/FORMATS.md` promises: at most this many bytes of memory for each byte of metadata, the
/// `CheckpointIndex`, the error and the text itself included.
const FACTOR: usize = 24;

/// What opening takes where there is next to no metadata: paths, a directory's listing, messages.
const CONSTANT_BYTES: usize = 64 << 10;

/// What `docs/FORMATS.md` promises of time: eight times as much metadata takes at most so many times as long. Eight would be
/// in proportion, and sorting takes a little more; a quadratic step takes 64 times.
const TIME_FACTOR: f64 = 24.0;
/// Times below this tell nothing: opening takes as long for next to no metadata.
const LEAST_TIME: Duration = Duration::from_millis(1);
/// A busy machine can make any one measurement longer, so the best of several counts. So many at least, and so many at most
/// while the time seems to be out of proportion.
const MEASUREMENTS: std::ops::RangeInclusive<usize> = 2..=30;

/// How many entries are many. Just above a power of two, where a growing vector has room for almost twice of what it
/// holds.
const MANY: usize = (1 << 15) + 1;
/// An eighth of it.
const FEWER: usize = (1 << 12) + 1;

/// One directory and what opening it must come to.
struct Case {
    name: &'static str,
    /// Names below the directory, with what they hold.
    metadata: Vec<(String, Vec<u8>)>,
    /// Files that are no metadata, with their lengths.
    data: Vec<(String, u64)>,
    opens: bool,
}

fn case(name: &'static str, opens: bool) -> Case {
    Case {
        name,
        metadata: Vec::new(),
        data: Vec::new(),
        opens,
    }
}

impl Case {
    fn file(mut self, name: &str, content: impl Into<Vec<u8>>) -> Self {
        self.metadata.push((name.to_owned(), content.into()));
        self
    }

    fn data(mut self, name: &str, bytes: u64) -> Self {
        self.data.push((name.to_owned(), bytes));
        self
    }

    fn safetensors(self, name: &str, header: &str, data_bytes: usize) -> Self {
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(header.as_bytes());
        file.resize(file.len() + data_bytes, 0);
        self.file(name, file)
    }

    /// Either dialect: the same entries with the fields behind the dtype given.
    fn serverlessllm(self, index: &str, partition_bytes: u64) -> Self {
        self.file("tensor_index.json", index)
            .data("tensor.data_0", partition_bytes)
    }
}

/// An object of `count` entries, whose keys are `prefix` and as few characters as make them unique.
fn object(count: usize, prefix: &str, value: impl Fn(usize) -> String) -> String {
    let mut text = String::from("{");
    for number in 0..count {
        let separator = if number == 0 { "" } else { "," };
        let key = key(number);
        write!(text, "{separator}\"{prefix}{key}\":{}", value(number)).unwrap();
    }
    text + "}"
}

/// A short text for each number.
fn key(mut number: usize) -> String {
    const DIGITS: &[u8; 64] = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ+-";
    let mut key = String::new();
    while number > 0 {
        key.push(char::from(DIGITS[number % 64]));
        number /= 64;
    }
    key
}

/// An array of `count` times `element`.
fn array(count: usize, element: &str) -> String {
    let mut text = String::from("[");
    for number in 0..count {
        text.push_str(if number == 0 { "" } else { "," });
        text.push_str(element);
    }
    text + "]"
}

fn header_cases(many: usize) -> Vec<Case> {
    let one = |fields: &str| format!(r#"{{"t":{{{fields}}}}}"#);
    let usual = r#""dtype":"U8","shape":[],"data_offsets":[0,1]"#;
    let header =
        |name, opens, header: &str| case(name, opens).safetensors("m.safetensors", header, 1);
    let empty = r#"["U8",[0],[0,0]]"#;
    let mut escaped = String::new();
    for _ in 0..many {
        escaped.push_str("\\u00e9");
    }
    vec![
        header(
            "header: a shape of many dimensions",
            true,
            &one(&format!(
                r#""dtype":"U8","shape":{},"data_offsets":[0,1]"#,
                array(8 * many, "1")
            )),
        ),
        header(
            "header: a shape of many dimensions, as an array",
            true,
            &format!(r#"{{"t":["U8",{},[0,1]]}}"#, array(8 * many, "1")),
        ),
        header(
            "header: a shape whose last dimension is wrong",
            false,
            &one(&format!(
                r#""dtype":"U8","shape":[{}-1],"data_offsets":[0,1]"#,
                "1,".repeat(8 * many)
            )),
        ),
        case("header: tensors of no bytes", true).safetensors(
            "m.safetensors",
            &object(many, "", |_| empty.to_owned()),
            0,
        ),
        case("header: scalars", true).safetensors(
            "m.safetensors",
            &object(many, "", |at| format!(r#"["U8",[],[{at},{}]]"#, at + 1)),
            many,
        ),
        header(
            "header: tensors whose data is missing",
            false,
            &object(many, "", |at| format!(r#"["U8",[],[{at},{}]]"#, at + 1)),
        ),
        case("header: one name again and again", false).safetensors(
            "m.safetensors",
            &format!("{{{}}}", vec![r#""":["U8",[0],[0,0]]"#; many].join(",")),
            0,
        ),
        header(
            "header: metadata",
            true,
            &format!(
                r#"{{"__metadata__":{},"t":{{{usual}}}}}"#,
                object(many, "", |_| "\"\"".to_owned())
            ),
        ),
        header(
            "header: metadata of the wrong type",
            false,
            &format!(
                r#"{{"__metadata__":{}}}"#,
                object(many, "", |_| "0".to_owned())
            ),
        ),
        header(
            "header: an unknown array",
            true,
            &one(&format!(r#"{usual},"x":{}"#, array(8 * many, "1"))),
        ),
        header(
            "header: an unknown object",
            true,
            &one(&format!(
                r#"{usual},"x":{}"#,
                object(many, "", |_| "0".to_owned())
            )),
        ),
        header(
            "header: unknown fields",
            true,
            &one(&format!("{usual}{}", r#","":0"#.repeat(4 * many))),
        ),
        header(
            "header: unknown fields and none of the known",
            false,
            &one(&format!(r#""":0{}"#, r#","":0"#.repeat(4 * many))),
        ),
        header(
            "header: a dtype that is an array",
            false,
            &one(&format!(r#""dtype":{}"#, array(8 * many, "1"))),
        ),
        header(
            "header: a dtype of megabytes",
            false,
            &one(&format!(
                r#""dtype":"{escaped}","shape":[],"data_offsets":[0,1]"#
            )),
        ),
        header(
            "header: a name of megabytes",
            true,
            &format!(r#"{{"{escaped}":{{{usual}}}}}"#),
        ),
        header(
            "header: numbers for tensors",
            false,
            &object(many, "", |_| "0".to_owned()),
        ),
        header("header: deep nesting", false, &"[".repeat(8 * many)),
        header(
            "header: deep nesting in an unknown field",
            false,
            &one(&format!(
                r#"{usual},"x":{}{}"#,
                "[".repeat(4 * many),
                "]".repeat(4 * many)
            )),
        ),
        header(
            "header: a number of megabytes",
            false,
            &one(&format!(
                r#""dtype":"U8","shape":[{}],"data_offsets":[0,1]"#,
                "1".repeat(8 * many)
            )),
        ),
        case("header: what a model has", true).safetensors(
            "m.safetensors",
            &object(many / 8, "model.layers.10.mlp.experts.100.up_proj.weight_", |at| {
                let (begin, end) = (3_145_728 * at, 3_145_728 * (at + 1));
                format!(r#"{{"dtype":"BF16","shape":[768,2048],"data_offsets":[{begin},{end}]}}"#)
            }),
            0,
        )
        .data("m.safetensors", (many / 8) as u64 * 3_145_728),
        header("header: white space", true, &{
            one(usual) + &" ".repeat(8 * many)
        }),
        case("headers: values that differ", true)
            .safetensors(
                "a.safetensors",
                &format!(
                    r#"{{"__metadata__":{}}}"#,
                    object(many, "", |_| "\"\"".to_owned())
                ),
                0,
            )
            .safetensors(
                "b.safetensors",
                &format!(
                    r#"{{"__metadata__":{}}}"#,
                    object(many, "", |_| "\"b\"".to_owned())
                ),
                0,
            ),
        case("headers: many files without an index", true)
            .safetensors("a.safetensors", &object(many, "", |_| empty.to_owned()), 0)
            .safetensors("b.safetensors", &object(many, "ä", |_| empty.to_owned()), 0)
            .safetensors("c.safetensors", &object(many, "ö", |_| empty.to_owned()), 0),
        case("headers: the same tensors in two files", false)
            .safetensors("a.safetensors", &object(many, "", |_| empty.to_owned()), 0)
            .safetensors("b.safetensors", &object(many, "", |_| empty.to_owned()), 0),
    ]
}

fn index_cases(many: usize) -> Vec<Case> {
    const NAME: &str = "model.safetensors.index.json";
    let empty = r#"["U8",[0],[0,0]]"#;
    let map = |weight_map: String| format!(r#"{{"weight_map":{weight_map}}}"#);
    let index = |name, opens, index: String| case(name, opens).file(NAME, index);
    vec![
        index(
            "index: tensors of one shard",
            true,
            map(object(many, "", |_| r#""s""#.to_owned())),
        )
        .safetensors("s", &object(many, "", |_| empty.to_owned()), 0),
        index(
            "index: escaped names",
            true,
            map(object(many, "\\u0061", |_| r#""\u0073""#.to_owned())),
        )
        .safetensors("s", &object(many, "a", |_| empty.to_owned()), 0),
        index(
            "index: tensors that the shard lacks",
            false,
            map(object(many, "", |_| r#""s""#.to_owned())),
        )
        .safetensors("s", "{}", 0),
        index(
            "index: tensors that are not listed",
            false,
            map(r#"{"0":"s"}"#.to_owned()),
        )
        .safetensors("s", &object(many, "", |_| empty.to_owned()), 0),
        index(
            "index: a shard for each tensor, none there",
            false,
            map(object(many, "", |at| format!("\"{}\"", key(at + 1)))),
        ),
        index(
            "index: unsafe names",
            false,
            map(object(many, "", |at| format!("\"/{}\"", key(at)))),
        ),
        index(
            "index: one name again and again",
            false,
            map(format!("{{{}}}", vec![r#""":"s""#; many].join(","))),
        ),
        index(
            "index: numbers for names",
            false,
            map(object(many, "", |_| "0".to_owned())),
        ),
        index(
            "index: unknown keys",
            false,
            object(4 * many, "", |_| "0".to_owned()),
        ),
        index(
            "index: metadata",
            true,
            format!(
                r#"{{"metadata":{},"weight_map":{{}}}}"#,
                object(4 * many, "", |_| "0".to_owned())
            ),
        ),
        index("index: deep nesting", false, "{\"\":".repeat(2 * many)),
        index(
            "index: a file name of megabytes",
            false,
            map(format!(r#"{{"t":"{}"}}"#, "s".repeat(8 * many))),
        ),
        index(
            "index: a file name of megabytes of directories",
            false,
            map(format!(r#"{{"t":"{}"}}"#, "s/".repeat(4 * many))),
        ),
    ]
}

fn serverlessllm_cases(many: usize) -> Vec<Case> {
    let mut cases = Vec::new();
    for (dialect, last) in [("store", ""), ("partitioned", ",0")] {
        let name = |what: &str| -> &'static str {
            // Leaked once per case; the table of results names it.
            Box::leak(format!("{dialect}: {what}").into_boxed_str())
        };
        let index =
            |what, opens, bytes, index: &str| case(name(what), opens).serverlessllm(index, bytes);
        let entries = |entry: &str| object(many, "", |_| format!("[{entry}{last}]"));
        let ones = array(4 * many, "1");
        cases.extend([
            index(
                "tensors of no bytes",
                true,
                0,
                &entries(r#"0,0,[0],[0],"u8""#),
            ),
            index("shared scalars", true, 1, &entries(r#"0,1,[],[],"u8""#)),
            index("shared views", true, 2, &entries(r#"0,2,[2],[0],"u8""#)),
            index("damaged tensors", false, 0, &entries(r#"0,1,[],[],"u8""#)),
            index(
                "a shape of many dimensions",
                true,
                1,
                &format!(r#"{{"t":[0,1,{ones},{ones},"u8"{last}]}}"#),
            ),
            index(
                "a view of many dimensions",
                true,
                2,
                &format!(
                    r#"{{"t":[0,2,[2,{}],[0,{}],"u8"{last}]}}"#,
                    &ones[1..ones.len() - 1],
                    &ones[1..ones.len() - 1]
                ),
            ),
            index(
                "many dimensions and few strides",
                false,
                1,
                &format!(r#"{{"t":[0,1,{ones},[],"u8"{last}]}}"#),
            ),
            index(
                "one name again and again",
                false,
                1,
                &format!(
                    "{{{}}}",
                    vec![format!(r#""":[0,1,[],[],"u8"{last}]"#); many].join(",")
                ),
            ),
            index(
                "numbers for entries",
                false,
                1,
                &object(many, "", |_| "0".to_owned()),
            ),
            index(
                "an entry of many fields",
                false,
                1,
                &format!(r#"{{"t":{}}}"#, array(8 * many, "0")),
            ),
            index(
                "deep nesting",
                false,
                1,
                &format!(r#"{{"t":{}"#, "[".repeat(8 * many)),
            ),
            index(
                "a dtype of megabytes",
                false,
                1,
                &format!(r#"{{"t":[0,1,[],[],"{}"{last}]}}"#, "\\u00e9".repeat(many)),
            ),
        ]);
        let mut ranks = case(name("ranks"), true);
        for rank in 0..3 {
            ranks = ranks
                .file(
                    &format!("rank_{rank}/tensor_index.json"),
                    entries(r#"0,2,[2],[0],"u8""#),
                )
                .data(&format!("rank_{rank}/tensor.data_0"), 2);
        }
        cases.push(ranks);
    }
    cases
}

/// Opens with both of what the options can ask for; the answer that the defaults give.
fn open(path: &Path) -> Result<CheckpointIndex> {
    let tolerant = OpenOptions::new()
        .duplicate_names(DuplicateNames::LastWins)
        .unlisted_tensors(UnlistedTensors::Ignore)
        .damaged_tensors(DamagedTensors::LeaveOut);
    // Its result is dropped before the next is built.
    drop(tolerant.open(path).map_err(|error| error.to_string()));
    CheckpointIndex::open(path)
}

fn cases(many: usize) -> Vec<Case> {
    let mut cases = header_cases(many);
    cases.append(&mut index_cases(many));
    cases.append(&mut serverlessllm_cases(many));
    cases
}

/// Near the largest header that there may be: a million tensors, scalars and empty ones, one of them with a name of
/// 10 MB.
fn large_case() -> Case {
    const TENSORS: usize = 1_000_000;
    let tensor = |number: usize| {
        let shape = if number.is_multiple_of(2) { "" } else { "0" };
        let [begin, end] = [number, number + 1].map(|number| number.div_ceil(2));
        format!(r#"{{"dtype":"U8","shape":[{shape}],"data_offsets":[{begin},{end}]}}"#)
    };
    let mut header = object(TENSORS, "", tensor);
    header.pop();
    write!(
        header,
        ",\"{}\":{}}}",
        "n".repeat(10_000_000),
        tensor(TENSORS)
    )
    .unwrap();
    case("header: a million tensors and a name of 10 MB", true).safetensors(
        "m.safetensors",
        &header,
        TENSORS / 2 + 1,
    )
}

/// A case in a directory of its own.
struct Written {
    name: &'static str,
    opens: bool,
    metadata_bytes: usize,
    directory: tempfile::TempDir,
}

impl Case {
    fn write(self) -> Written {
        let directory = tempfile::tempdir().unwrap();
        let mut metadata_bytes = 0;
        for (name, content) in self.metadata {
            let path = directory.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            metadata_bytes += content.len();
            fs::write(path, content).unwrap();
        }
        for (name, bytes) in self.data {
            // Sparse, where there is metadata before it.
            let path = directory.path().join(name);
            let file = fs::File::options()
                .append(true)
                .create(true)
                .open(path)
                .unwrap();
            file.set_len(file.metadata().unwrap().len() + bytes)
                .unwrap();
        }
        Written {
            name: self.name,
            opens: self.opens,
            metadata_bytes,
            directory,
        }
    }
}

impl Written {
    /// What opening comes to, how long it takes, and how much memory for each byte of metadata.
    fn open_by(
        &self,
        open: impl Fn(&Path) -> Result<CheckpointIndex>,
    ) -> (Result<CheckpointIndex>, Duration, f64) {
        let before = ALLOCATOR.current_usage();
        ALLOCATOR.reset_peak_usage();
        let start = Instant::now();
        let opened = open(self.directory.path());
        let elapsed = start.elapsed();
        let taken = ALLOCATOR.peak_usage().saturating_sub(before);
        let (name, bytes) = (self.name, self.metadata_bytes);
        assert_eq!(opened.is_ok(), self.opens, "{name}: {opened:.300?}");
        assert!(
            taken <= FACTOR * bytes + CONSTANT_BYTES,
            "{name}: {taken} bytes for {bytes}"
        );
        (opened, elapsed, taken as f64 / bytes as f64)
    }

    /// How long it takes at the least, in seconds.
    fn seconds(&self, best: f64) -> f64 {
        best.min(self.open_by(open).1.max(LEAST_TIME).as_secs_f64())
    }
}

#[test]
fn memory_and_time_are_linear_in_the_metadata() {
    let mut largest = 0.0f64;
    let mut slowest = 0.0f64;
    for (case, smaller) in cases(MANY).into_iter().zip(cases(FEWER)) {
        let (case, smaller) = (case.write(), smaller.write());
        let times = case.metadata_bytes as f64 / smaller.metadata_bytes as f64;
        let (opened, _, factor) = case.open_by(open);
        let (mut seconds, mut of_smaller, mut time_factor) = (f64::MAX, f64::MAX, f64::MAX);
        for measurement in 1..=*MEASUREMENTS.end() {
            seconds = case.seconds(seconds);
            of_smaller = smaller.seconds(of_smaller);
            time_factor = seconds / of_smaller;
            if measurement >= *MEASUREMENTS.start() && time_factor <= TIME_FACTOR {
                break;
            }
        }
        println!(
            "{factor:5.1} x {:7} bytes, {:6.1} ms, {time_factor:4.1} times as long for {times:.1} times as much: {}",
            case.metadata_bytes,
            seconds * 1e3,
            case.name
        );
        assert!(
            time_factor <= TIME_FACTOR,
            "{}: {seconds} s for {} bytes, {of_smaller} s for {}",
            case.name,
            case.metadata_bytes,
            smaller.metadata_bytes
        );
        largest = largest.max(factor);
        slowest = slowest.max(time_factor);
        if case.name == "headers: values that differ" {
            let dropped = opened.unwrap().notes().iter().any(|note| {
                matches!(note, Note::MoreMetadataConflicts { values } if *values == MANY as u64 - 16)
            });
            assert!(dropped);
        }
    }
    let large = large_case().write();
    // Once is enough, as slow as it is.
    let (opened, elapsed, factor) = large.open_by(|path| CheckpointIndex::open(path));
    println!(
        "{factor:5.1} x {} bytes, {elapsed:.1?}: {}",
        large.metadata_bytes, large.name
    );
    assert_eq!(opened.unwrap().tensors().len(), 1_000_001);
    println!(
        "at most {largest:.1} bytes for each byte of metadata, and {slowest:.1} times as long for 8 times as much"
    );
}
