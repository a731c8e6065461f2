//! Running the command, and checkpoints to run it on.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::Value;
use tempfile::TempDir;
use tensora::BackendKind;
use tensora::io::{Availability, Platform};

/// A folder for caches that nobody makes.
const NO_CACHE: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/no-cache");

/// The built command, with nothing in its environment that changes its answers.
pub(crate) fn tensora() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tensora"));
    command.env_remove("TENSORA_LOG").env_remove("NO_COLOR");
    // Nor may what the developer has measured.
    command.env("XDG_CACHE_HOME", NO_CACHE);
    command
}

/// What a run of the command left behind.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl From<Output> for Answer {
    fn from(output: Output) -> Self {
        Self {
            status: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Answer {
    /// The text of a run that succeeded and complained of nothing.
    #[track_caller]
    pub(crate) fn text(self) -> String {
        assert_eq!(self.status, Some(0), "{self:?}");
        assert_eq!(self.stderr, "", "{self:?}");
        self.stdout
    }

    /// The one JSON object of a run that succeeded: the parser refuses anything behind it.
    #[track_caller]
    pub(crate) fn json(self) -> Value {
        let text = self.text();
        let value: Value = serde_json::from_str(&text).unwrap();
        assert!(value.is_object(), "{text}");
        assert!(text.ends_with('\n'), "{text}");
        value
    }

    /// What a run that failed with this status said; it printed nothing on standard output.
    #[track_caller]
    pub(crate) fn failure(self, status: i32) -> String {
        assert_eq!(self.status, Some(status), "{self:?}");
        assert_eq!(self.stdout, "", "{self:?}");
        assert!(self.stderr.starts_with("error: "), "{self:?}");
        assert!(!self.stderr.contains('\u{1b}'), "{self:?}");
        assert!(!self.stderr.contains("panicked"), "{self:?}");
        self.stderr
    }
}

pub(crate) fn run<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Answer {
    tensora().args(arguments).output().unwrap().into()
}

/// Arguments of different types in one list.
macro_rules! args {
    ($($argument:expr),* $(,)?) => {
        [$(std::ffi::OsString::from(AsRef::<std::ffi::OsStr>::as_ref(&$argument))),*]
    };
}
pub(crate) use args;

/// Asserts that each field is there and has this JSON type.
#[track_caller]
pub(crate) fn assert_fields(value: &Value, fields: &[(&str, &str)]) {
    for &(name, kind) in fields {
        let found = match value.get(name) {
            None => "nothing",
            Some(Value::Null) => "null",
            Some(Value::Bool(_)) => "boolean",
            Some(Value::Number(number)) if number.is_u64() => "count",
            Some(Value::Number(_)) => "number",
            Some(Value::String(_)) => "string",
            Some(Value::Array(_)) => "array",
            Some(Value::Object(_)) => "object",
        };
        assert_eq!(found, kind, "field {name} of {value}");
    }
}

/// Says that a test cannot do its work here. Skips are counted by whoever set the variable.
pub(crate) fn skip(what: &str, why: &str) {
    eprintln!("SKIP: {what}: {why}");
    if let Some(path) = std::env::var_os("TENSORA_SKIP_LOG") {
        let mut log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .unwrap();
        writeln!(log, "SKIP: {what}: {why}").unwrap();
    }
}

/// Whether a backend works here; counts a skip if it does not.
pub(crate) fn available(kind: BackendKind, what: &str) -> bool {
    match Platform::probe().availability(kind) {
        Some(Availability::Available) => true,
        Some(Availability::Unavailable { reason, .. }) => {
            skip(what, &format!("{kind}: {reason}"));
            false
        }
        None => {
            skip(what, &format!("{kind} is not in this build"));
            false
        }
    }
}

/// The tensors of the generated checkpoints: several dtypes, a scalar, an empty one, odd sizes.
const TENSORS: &[(&str, Dtype, &[usize])] = &[
    ("lm_head.weight", Dtype::BF16, &[250, 64]),
    ("model.embed_tokens.weight", Dtype::BF16, &[250, 64]),
    ("model.layers.0.mask", Dtype::U8, &[7, 9]),
    ("model.layers.0.mlp.weight", Dtype::BF16, &[128, 64]),
    ("model.layers.0.scale", Dtype::F32, &[]),
    ("model.layers.1.adapter", Dtype::F16, &[0, 64]),
    ("model.layers.1.mlp.weight", Dtype::BF16, &[128, 64]),
    ("model.norm.weight", Dtype::F32, &[64]),
];

pub(crate) const TENSOR_COUNT: usize = TENSORS.len();

/// Bytes of all tensors together.
pub(crate) fn data_bytes() -> u64 {
    TENSORS.iter().map(|tensor| data(tensor).len() as u64).sum()
}

/// The content of a tensor, different for each.
fn data(&(name, dtype, shape): &(&str, Dtype, &[usize])) -> Vec<u8> {
    let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
    let seed = name.len() as u32;
    let byte = |place: u32| (place.wrapping_mul(2_654_435_761) >> 13).wrapping_add(seed) as u8;
    (0..u32::try_from(bytes).unwrap()).map(byte).collect()
}

fn write_file(path: &Path, tensors: &[(&str, Dtype, &[usize])]) {
    let contents: Vec<Vec<u8>> = tensors.iter().map(data).collect();
    let views = tensors
        .iter()
        .zip(&contents)
        .map(|((name, dtype, shape), data)| {
            let view = TensorView::new(*dtype, shape.to_vec(), data).unwrap();
            (name.to_string(), view)
        });
    let metadata = Some([("format".to_owned(), "pt".to_owned())].into());
    safetensors::serialize_to_file(views, metadata, path).unwrap();
}

/// A directory with one `model.safetensors`.
pub(crate) fn single() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    write_file(&path, TENSORS);
    (directory, path)
}

/// The same tensors in three shards with an index.
pub(crate) fn sharded() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let mut weight_map = serde_json::Map::new();
    for (number, tensors) in TENSORS.chunks(3).enumerate() {
        let name = format!("model-{:05}-of-00003.safetensors", number + 1);
        write_file(&directory.path().join(&name), tensors);
        for (tensor, ..) in tensors {
            weight_map.insert((*tensor).to_owned(), name.as_str().into());
        }
    }
    let index = serde_json::json!({
        "metadata": {"total_size": data_bytes()},
        "weight_map": weight_map,
    });
    let path = directory.path().join("model.safetensors.index.json");
    fs::write(path, index.to_string()).unwrap();
    directory
}

/// A ServerlessLLM directory of the store dialect with a contiguous tensor and a transposed view.
pub(crate) fn strided() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let index = r#"{
        "plain": [0, 12, [2, 3], [3, 1], "torch.float16"],
        "transposed": [16, 12, [3, 2], [1, 3], "torch.float16"]
    }"#;
    fs::write(directory.path().join("tensor_index.json"), index).unwrap();
    let data: Vec<u8> = (0..32).collect();
    fs::write(directory.path().join("tensor.data_0"), data).unwrap();
    directory
}

/// A SafeTensors file of one tensor of this many zeros that takes no space.
pub(crate) fn sparse(path: &Path, bytes: u64) {
    let header =
        format!(r#"{{"zeros":{{"dtype":"U8","shape":[{bytes}],"data_offsets":[0,{bytes}]}}}}"#);
    let mut file = File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes())
        .unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + bytes).unwrap();
}

/// A SafeTensors file of `count` tensors of as many zeros each, which takes no space.
pub(crate) fn sparse_layers(path: &Path, count: u64, bytes: u64) {
    let tensors = (0..count).map(|layer| {
        let (begin, end) = (layer * bytes, (layer + 1) * bytes);
        format!(
            r#""layers.{layer}.weight":{{"dtype":"U8","shape":[{bytes}],"data_offsets":[{begin},{end}]}}"#
        )
    });
    let header = format!("{{{}}}", tensors.collect::<Vec<_>>().join(","));
    let mut file = File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes())
        .unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + count * bytes)
        .unwrap();
}

/// A ServerlessLLM directory of the store dialect in which two tensors share their bytes.
pub(crate) fn tied() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let index = r#"{
        "embed": [0, 12, [2, 3], [3, 1], "torch.float16"],
        "lm_head": [0, 12, [2, 3], [3, 1], "torch.float16"],
        "norm": [16, 4, [2], [1], "torch.float16"]
    }"#;
    fs::write(directory.path().join("tensor_index.json"), index).unwrap();
    let data: Vec<u8> = (0..24).collect();
    fs::write(directory.path().join("tensor.data_0"), data).unwrap();
    directory
}

/// `rank_0` and `rank_1` side by side, with tensors of the same names.
pub(crate) fn ranks() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    for rank in 0..2u8 {
        let folder = directory.path().join(format!("rank_{rank}"));
        fs::create_dir(&folder).unwrap();
        let index = r#"{"w": [0, 8, [2, 2], [2, 1], "torch.float16"]}"#;
        fs::write(folder.join("tensor_index.json"), index).unwrap();
        fs::write(folder.join("tensor.data_0"), [rank + 1; 8]).unwrap();
    }
    directory
}

/// The files and directories in a directory, sorted; none if it is not there.
pub(crate) fn names(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// The content digest of a checkpoint, by loading all of it.
#[track_caller]
pub(crate) fn digest(path: &Path) -> Value {
    run(args!["load", path, "--digest", "--json"]).json()["digest"].clone()
}
