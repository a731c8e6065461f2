//! Checkpoints with known bytes; writers, a reader and a digest that share no code with what they test.
//!
//! They follow the published descriptions of the formats and nothing else: plain loops, whole files in
//! memory, and the first thing that is not as described panics.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::cast_possible_truncation,
    reason = "each test binary uses a part; a test helper fails its test just so"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use tensora_formats::{Dtype, Format};

pub const FORMATS: [Format; 3] = [
    Format::Safetensors,
    Format::ServerlessLlmStore,
    Format::ServerlessLlmPartitioned,
];

/// Dtype, name in SafeTensors, bits of an element, name in the store dialect, short name in the
/// partitioned one.
type DtypeRow = (
    Dtype,
    &'static str,
    u64,
    Option<&'static str>,
    Option<&'static str>,
);

pub const DTYPES: [DtypeRow; 22] = [
    (Dtype::Bool, "BOOL", 8, Some("torch.bool"), Some("bool")),
    (Dtype::F4, "F4", 4, None, None),
    (Dtype::F6E2M3, "F6_E2M3", 6, None, None),
    (Dtype::F6E3M2, "F6_E3M2", 6, None, None),
    (Dtype::U8, "U8", 8, Some("torch.uint8"), Some("u8")),
    (Dtype::I8, "I8", 8, Some("torch.int8"), Some("i8")),
    (
        Dtype::F8E5M2,
        "F8_E5M2",
        8,
        Some("torch.float8_e5m2"),
        Some("f8_e5m2"),
    ),
    (
        Dtype::F8E4M3,
        "F8_E4M3",
        8,
        Some("torch.float8_e4m3fn"),
        Some("f8_e4m3"),
    ),
    (
        Dtype::F8E8M0,
        "F8_E8M0",
        8,
        Some("torch.float8_e8m0fnu"),
        Some("f8_e8m0"),
    ),
    (
        Dtype::F8E4M3Fnuz,
        "F8_E4M3FNUZ",
        8,
        Some("torch.float8_e4m3fnuz"),
        Some("f8_e4m3fnuz"),
    ),
    (
        Dtype::F8E5M2Fnuz,
        "F8_E5M2FNUZ",
        8,
        Some("torch.float8_e5m2fnuz"),
        Some("f8_e5m2fnuz"),
    ),
    (Dtype::I16, "I16", 16, Some("torch.int16"), Some("i16")),
    (Dtype::U16, "U16", 16, None, Some("u16")),
    (Dtype::F16, "F16", 16, Some("torch.float16"), Some("f16")),
    (
        Dtype::BF16,
        "BF16",
        16,
        Some("torch.bfloat16"),
        Some("bf16"),
    ),
    (Dtype::I32, "I32", 32, Some("torch.int32"), Some("i32")),
    (Dtype::U32, "U32", 32, None, Some("u32")),
    (Dtype::F32, "F32", 32, Some("torch.float32"), Some("f32")),
    (Dtype::C64, "C64", 64, None, Some("c64")),
    (Dtype::F64, "F64", 64, Some("torch.float64"), Some("f64")),
    (Dtype::I64, "I64", 64, Some("torch.int64"), Some("i64")),
    (Dtype::U64, "U64", 64, None, Some("u64")),
];

fn row(dtype: Dtype) -> &'static DtypeRow {
    DTYPES.iter().find(|row| row.0 == dtype).unwrap()
}

pub fn bits(dtype: Dtype) -> u64 {
    row(dtype).2
}

/// Whether a format has a name for the dtype.
pub fn holds(format: Format, dtype: Dtype) -> bool {
    match format {
        Format::ServerlessLlmStore => row(dtype).3.is_some(),
        Format::ServerlessLlmPartitioned => row(dtype).4.is_some(),
        _ => true,
    }
}

/// The dtype of this name in any of the formats.
fn dtype_named(name: &str) -> Dtype {
    let named = |row: &&DtypeRow| row.1 == name || row.3 == Some(name) || row.4 == Some(name);
    let found = DTYPES.iter().find(named);
    found
        .unwrap_or_else(|| panic!("no dtype is called {name:?}"))
        .0
}

/// Bytes that are stored once, and the tensors in them.
#[derive(Clone, Debug)]
pub struct Record {
    pub bytes: Vec<u8>,
    pub views: Vec<View>,
}

/// A tensor: a view from the first byte of its record on.
#[derive(Clone, Debug)]
pub struct View {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<u64>,
    /// In elements; `None` in row-major order.
    pub strides: Option<Vec<u64>>,
}

/// What a checkpoint holds, whatever its format: elements in row-major order.
#[derive(Clone, PartialEq, Eq)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<u64>,
    pub data: Vec<u8>,
}

pub type Tensors = BTreeMap<String, Tensor>;

/// Bytes that are different for every seed and in every place.
pub fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut noise = Vec::with_capacity(bytes + 7);
    while noise.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        noise.extend(state.to_le_bytes());
    }
    noise.truncate(bytes);
    noise
}

/// Random numbers from a seed, as they are printed when a test fails.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: u64) -> u64 {
        let bytes = noise(8, self.0);
        self.0 = self.0.wrapping_add(0xD1B5_4A32_D192_ED03);
        u64::from_le_bytes(bytes.try_into().unwrap()) % limit.max(1)
    }
}

impl Record {
    /// A tensor of its own, in row-major order.
    pub fn plain(name: &str, dtype: Dtype, shape: &[u64], seed: u64) -> Self {
        let bits = shape.iter().product::<u64>() * bits(dtype);
        assert_eq!(bits % 8, 0, "{dtype} {shape:?} fills no whole bytes");
        Self {
            bytes: noise((bits / 8) as usize, seed),
            views: vec![View {
                name: name.to_owned(),
                dtype,
                shape: shape.to_owned(),
                strides: None,
            }],
        }
    }

    /// A strided tensor, with some bytes behind it that it does not need; a plain one where the strides
    /// are those of row-major order after all.
    pub fn strided(
        name: &str,
        dtype: Dtype,
        shape: &[u64],
        strides: &[u64],
        spare_bytes: u64,
        seed: u64,
    ) -> Self {
        if is_row_major(shape, strides) {
            return Self::plain(name, dtype, shape, seed);
        }
        let bytes = span(shape, strides) * bits(dtype) / 8 + spare_bytes;
        Self {
            bytes: noise(bytes as usize, seed),
            views: vec![View {
                name: name.to_owned(),
                dtype,
                shape: shape.to_owned(),
                strides: Some(strides.to_owned()),
            }],
        }
    }

    /// The same record with another tensor in it.
    pub fn tied(mut self, name: &str) -> Self {
        let first = self.views[0].clone();
        self.views.push(View {
            name: name.to_owned(),
            ..first
        });
        self
    }
}

/// Whether the strides make no difference: those of dimensions of one element never do.
pub fn is_row_major(shape: &[u64], strides: &[u64]) -> bool {
    let packed = packed(shape);
    let mut dimensions = shape.iter().zip(strides).zip(&packed);
    shape.contains(&0) || dimensions.all(|((&n, stride), packed)| n == 1 || stride == packed)
}

/// How many elements lie between a view's first and its last, both included.
fn span(shape: &[u64], strides: &[u64]) -> u64 {
    if shape.contains(&0) {
        return 0;
    }
    let steps = shape.iter().zip(strides);
    1 + steps
        .map(|(&count, &stride)| (count - 1) * stride)
        .sum::<u64>()
}

/// Strides of row-major order.
pub fn packed(shape: &[u64]) -> Vec<u64> {
    (0..shape.len())
        .map(|dimension| shape[dimension + 1..].iter().map(|&n| n.max(1)).product())
        .collect()
}

/// The elements of a view in row-major order, one by one.
pub fn gather(bytes: &[u8], dtype: Dtype, shape: &[u64], strides: &[u64]) -> Vec<u8> {
    let count: u64 = shape.iter().product();
    if is_row_major(shape, strides) {
        let bits = count * bits(dtype);
        return bytes[..(bits / 8) as usize].to_vec();
    }
    let element = bits(dtype) / 8;
    let mut gathered = Vec::with_capacity((count * element) as usize);
    for number in 0..count {
        let (mut rest, mut at) = (number, 0);
        for (&extent, &stride) in shape.iter().zip(strides).rev() {
            at += rest % extent * stride;
            rest /= extent;
        }
        let at = (at * element) as usize;
        gathered.extend_from_slice(&bytes[at..at + element as usize]);
    }
    gathered
}

/// What a checkpoint of these records holds.
pub fn tensors(records: &[Record]) -> Tensors {
    let mut tensors = Tensors::new();
    for record in records {
        for view in &record.views {
            let strides = view.strides.clone().unwrap_or_else(|| packed(&view.shape));
            let tensor = Tensor {
                dtype: view.dtype,
                shape: view.shape.clone(),
                data: gather(&record.bytes, view.dtype, &view.shape, &strides),
            };
            assert!(tensors.insert(view.name.clone(), tensor).is_none());
        }
    }
    tensors
}

/// What the ranks hold side by side.
pub fn rank_tensors(ranks: &[Vec<Record>]) -> Tensors {
    let mut all = Tensors::new();
    for (rank, records) in ranks.iter().enumerate() {
        let named = tensors(records).into_iter();
        all.extend(named.map(|(name, tensor)| (format!("rank_{rank}/{name}"), tensor)));
    }
    all
}

/// The content digest, word for word.
pub fn digest(tensors: &Tensors) -> String {
    let mut text = Vec::new();
    for (name, tensor) in tensors {
        text.extend((name.len() as u64).to_le_bytes());
        text.extend(name.as_bytes());
        let dtype = row(tensor.dtype).1;
        text.extend((dtype.len() as u64).to_le_bytes());
        text.extend(dtype.as_bytes());
        text.extend((tensor.shape.len() as u64).to_le_bytes());
        for dimension in &tensor.shape {
            text.extend(dimension.to_le_bytes());
        }
        text.extend((tensor.data.len() as u64).to_le_bytes());
        text.extend(blake3::hash(&tensor.data).as_bytes());
    }
    blake3::hash(&text).to_hex().to_string()
}

// --- Writers ------------------------------------------------------------------------------------

/// Writes the records into as many SafeTensors files, which must be of one plain tensor each.
pub fn write_safetensors(
    directory: &Path,
    records: &[Record],
    shards: usize,
    metadata: &BTreeMap<String, String>,
) {
    fs::create_dir_all(directory).unwrap();
    let mut weight_map = Map::new();
    let per_shard = records.len().div_ceil(shards).max(1);
    let chunks: Vec<&[Record]> = match records {
        [] => vec![&[]],
        records => records.chunks(per_shard).collect(),
    };
    for (number, chunk) in chunks.iter().enumerate() {
        let name = match chunks.len() {
            1 => "model.safetensors".to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        let mut header = Map::new();
        if !metadata.is_empty() {
            header.insert("__metadata__".to_owned(), json!(metadata));
        }
        let mut data = Vec::new();
        for record in *chunk {
            let [view] = &record.views[..] else {
                panic!("tensors share no bytes in SafeTensors");
            };
            assert!(view.strides.is_none());
            let begin = data.len();
            data.extend_from_slice(&record.bytes);
            let entry = json!({
                "dtype": row(view.dtype).1,
                "shape": view.shape,
                "data_offsets": [begin, data.len()],
            });
            header.insert(view.name.clone(), entry);
            weight_map.insert(view.name.clone(), json!(name));
        }
        let header = serde_json::to_vec(&header).unwrap();
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header);
        file.extend(data);
        fs::write(directory.join(name), file).unwrap();
    }
    if chunks.len() > 1 {
        let index = json!({"metadata": {"total_size": 0}, "weight_map": weight_map});
        let path = directory.join("model.safetensors.index.json");
        fs::write(path, index.to_string()).unwrap();
    }
}

fn push_record(partition: &mut Vec<u8>, record: &Record) -> u64 {
    let offset = partition.len() as u64;
    partition.extend_from_slice(&record.bytes);
    while !partition.len().is_multiple_of(8) {
        // What padding holds is nobody's business.
        partition.push(0xA5);
    }
    offset
}

fn write_partitions(directory: &Path, partitions: &[Vec<u8>], index: &Map<String, Value>) {
    fs::create_dir_all(directory).unwrap();
    for (number, bytes) in partitions.iter().enumerate() {
        fs::write(directory.join(format!("tensor.data_{number}")), bytes).unwrap();
    }
    let path = directory.join("tensor_index.json");
    fs::write(path, serde_json::to_vec(index).unwrap()).unwrap();
}

/// Writes the store dialect, as ServerlessLLM's own writer fills partitions.
pub fn write_store(directory: &Path, records: &[Record], partition_bytes: u64) {
    let mut partitions: Vec<Vec<u8>> = vec![Vec::new()];
    let mut begin = 0;
    let mut index = Map::new();
    for record in records {
        let filled = partitions.last().unwrap().len() as u64;
        let padded = (record.bytes.len() as u64).next_multiple_of(8);
        if filled > 0 && filled + padded > partition_bytes {
            begin += filled;
            partitions.push(Vec::new());
        }
        let offset = begin + push_record(partitions.last_mut().unwrap(), record);
        for view in &record.views {
            let strides = view.strides.clone().unwrap_or_else(|| packed(&view.shape));
            let dtype = row(view.dtype).3.expect("a dtype of the store dialect");
            let entry = json!([offset, record.bytes.len(), view.shape, strides, dtype]);
            index.insert(view.name.clone(), entry);
        }
    }
    write_partitions(directory, &partitions, &index);
}

/// Writes the partitioned dialect, the records dealt out in turn.
pub fn write_partitioned(directory: &Path, records: &[Record], partitions: usize) {
    let mut partitions: Vec<Vec<u8>> = vec![Vec::new(); partitions.min(records.len()).max(1)];
    let mut index = Map::new();
    for (number, record) in records.iter().enumerate() {
        let partition = number % partitions.len();
        let offset = push_record(&mut partitions[partition], record);
        for view in &record.views {
            let strides = view.strides.clone().unwrap_or_else(|| packed(&view.shape));
            let (_, _, _, torch, short) = row(view.dtype);
            let short = short.expect("a dtype of the partitioned dialect");
            // Both spellings are in use.
            let dtype = match torch {
                Some(torch) if number % 2 == 1 => torch,
                _ => short,
            };
            let size = record.bytes.len();
            let entry = json!([offset, size, view.shape, strides, dtype, partition]);
            index.insert(view.name.clone(), entry);
        }
    }
    write_partitions(directory, &partitions, &index);
}

/// Writes the records in any format, in about as many files.
pub fn write(directory: &Path, records: &[Record], format: Format, files: usize) {
    match format {
        Format::Safetensors => write_safetensors(directory, records, files, &BTreeMap::new()),
        Format::ServerlessLlmStore => {
            let bytes: u64 = records.iter().map(|record| record.bytes.len() as u64).sum();
            write_store(directory, records, (bytes / files as u64).max(1));
        }
        _ => write_partitioned(directory, records, files),
    }
}

/// Writes a directory for each rank.
pub fn write_ranks(directory: &Path, ranks: &[Vec<Record>], format: Format, files: usize) {
    for (rank, records) in ranks.iter().enumerate() {
        write(
            &directory.join(format!("rank_{rank}")),
            records,
            format,
            files,
        );
    }
}

// --- The reader ---------------------------------------------------------------------------------

/// What a checkpoint's files say.
pub struct Found {
    pub format: Format,
    pub tensors: Tensors,
    /// Names of tensors that share bytes, at least two in each set.
    pub shared: BTreeSet<Vec<String>>,
    /// Strides of the tensors that are not in row-major order.
    pub strides: BTreeMap<String, Vec<u64>>,
    /// The data files.
    pub files: Vec<PathBuf>,
}

/// Reads a checkpoint, or a set of ranks, as its index and its files describe it.
pub fn read(directory: &Path) -> Found {
    if !directory.join("rank_0").is_dir() {
        return read_one(directory);
    }
    let mut found: Option<Found> = None;
    for rank in 0.. {
        let name = format!("rank_{rank}");
        if !directory.join(&name).is_dir() {
            break;
        }
        let mut one = read_one(&directory.join(&name));
        let prefixed = |tensor: &String| format!("{name}/{tensor}");
        one.tensors = one
            .tensors
            .iter()
            .map(|(k, v)| (prefixed(k), v.clone()))
            .collect();
        one.strides = one
            .strides
            .iter()
            .map(|(k, v)| (prefixed(k), v.clone()))
            .collect();
        let sets = one.shared.iter();
        one.shared = sets.map(|set| set.iter().map(prefixed).collect()).collect();
        match &mut found {
            None => found = Some(one),
            Some(found) => {
                assert_eq!(found.format, one.format);
                found.tensors.extend(one.tensors);
                found.strides.extend(one.strides);
                found.shared.extend(one.shared);
                found.files.extend(one.files);
            }
        }
    }
    found.unwrap()
}

fn read_one(directory: &Path) -> Found {
    let index = directory.join("tensor_index.json");
    if !index.exists() {
        return read_safetensors(directory);
    }
    let index: BTreeMap<String, Vec<Value>> =
        serde_json::from_slice(&fs::read(index).unwrap()).unwrap();
    match index.values().next().map(Vec::len) {
        Some(6) => read_partitioned(directory, &index),
        _ => read_store(directory, &index),
    }
}

fn number(value: &Value) -> u64 {
    value
        .as_u64()
        .unwrap_or_else(|| panic!("{value} is no u64"))
}

fn numbers(value: &Value) -> Vec<u64> {
    value.as_array().unwrap().iter().map(number).collect()
}

fn read_safetensors(directory: &Path) -> Found {
    let index = directory.join("model.safetensors.index.json");
    let mut weight_map: BTreeMap<String, String> = BTreeMap::new();
    let names: BTreeSet<String> = if index.exists() {
        let index: Value = serde_json::from_slice(&fs::read(index).unwrap()).unwrap();
        weight_map = serde_json::from_value(index["weight_map"].clone()).unwrap();
        weight_map.values().cloned().collect()
    } else {
        BTreeSet::from(["model.safetensors".to_owned()])
    };
    let mut found = Found {
        format: Format::Safetensors,
        tensors: Tensors::new(),
        shared: BTreeSet::new(),
        strides: BTreeMap::new(),
        files: Vec::new(),
    };
    for name in names {
        let path = directory.join(&name);
        let bytes = fs::read(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
        let header_bytes = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: BTreeMap<String, Value> =
            serde_json::from_slice(&bytes[8..8 + header_bytes]).unwrap();
        let data = &bytes[8 + header_bytes..];
        let mut covered = Vec::new();
        for (tensor, entry) in header.iter().filter(|(name, _)| *name != "__metadata__") {
            let offsets = numbers(&entry["data_offsets"]);
            let dtype = dtype_named(entry["dtype"].as_str().unwrap());
            let shape = numbers(&entry["shape"]);
            assert_eq!(
                shape.iter().product::<u64>() * bits(dtype),
                (offsets[1] - offsets[0]) * 8,
                "{tensor}"
            );
            covered.push((offsets[0], offsets[1]));
            let data = data[offsets[0] as usize..offsets[1] as usize].to_vec();
            let tensor_found = Tensor { dtype, shape, data };
            assert!(found.tensors.insert(tensor.clone(), tensor_found).is_none());
            if !weight_map.is_empty() {
                assert_eq!(weight_map[tensor], name, "{tensor}");
            }
        }
        covered.sort_unstable();
        let end = covered.iter().fold(0, |end, &(begin, next)| {
            assert_eq!(begin, end, "{name} has a hole");
            next
        });
        assert_eq!(end, data.len() as u64, "{name} has more than its tensors");
        found.files.push(path);
    }
    if !weight_map.is_empty() {
        assert_eq!(weight_map.len(), found.tensors.len());
    }
    found
}

/// The bytes of the partitions, which are numbered without a gap.
fn partitions(directory: &Path) -> (Vec<PathBuf>, Vec<Vec<u8>>) {
    let paths: Vec<PathBuf> = (0..)
        .map(|number| directory.join(format!("tensor.data_{number}")))
        .take_while(|path| path.exists())
        .collect();
    let bytes = paths.iter().map(|path| fs::read(path).unwrap()).collect();
    (paths, bytes)
}

/// An entry of either dialect: the record's place in its partition, then the view.
struct Entry {
    name: String,
    partition: usize,
    offset: u64,
    size: u64,
    shape: Vec<u64>,
    strides: Vec<u64>,
    dtype: Dtype,
}

/// Five fields; offsets count through all partitions.
fn read_store(directory: &Path, index: &BTreeMap<String, Vec<Value>>) -> Found {
    let (paths, partitions) = partitions(directory);
    let mut entries = Vec::new();
    for (name, fields) in index {
        let [offset, size, shape, strides, dtype] = &fields[..] else {
            panic!("{name}: {} fields", fields.len());
        };
        let dtype = dtype.as_str().unwrap();
        assert!(dtype.starts_with("torch."), "{name}: {dtype}");
        let (mut offset, size) = (number(offset), number(size));
        let mut partition = 0;
        while partition + 1 < partitions.len() && offset >= partitions[partition].len() as u64 {
            offset -= partitions[partition].len() as u64;
            partition += 1;
        }
        entries.push(Entry {
            name: name.clone(),
            partition,
            offset,
            size,
            shape: numbers(shape),
            strides: numbers(strides),
            dtype: dtype_named(dtype),
        });
    }
    read_entries(Format::ServerlessLlmStore, &entries, paths, &partitions)
}

/// Six fields; offsets count within the partition that the last one names.
fn read_partitioned(directory: &Path, index: &BTreeMap<String, Vec<Value>>) -> Found {
    let (paths, partitions) = partitions(directory);
    let mut entries = Vec::new();
    for (name, fields) in index {
        let [offset, size, shape, strides, dtype, partition] = &fields[..] else {
            panic!("{name}: {} fields", fields.len());
        };
        entries.push(Entry {
            name: name.clone(),
            partition: number(partition) as usize,
            offset: number(offset),
            size: number(size),
            shape: numbers(shape),
            strides: numbers(strides),
            dtype: dtype_named(dtype.as_str().unwrap()),
        });
    }
    let format = Format::ServerlessLlmPartitioned;
    read_entries(format, &entries, paths, &partitions)
}

fn read_entries(
    format: Format,
    entries: &[Entry],
    files: Vec<PathBuf>,
    partitions: &[Vec<u8>],
) -> Found {
    let mut found = Found {
        format,
        tensors: Tensors::new(),
        shared: BTreeSet::new(),
        strides: BTreeMap::new(),
        files,
    };
    let mut records: BTreeMap<(usize, u64, u64), Vec<String>> = BTreeMap::new();
    for entry in entries {
        let name = &entry.name;
        assert_eq!(
            entry.offset % 8,
            0,
            "{name}: records begin at multiples of 8"
        );
        let bytes = if entry.size == 0 {
            &[]
        } else {
            &partitions[entry.partition][entry.offset as usize..][..entry.size as usize]
        };
        if is_row_major(&entry.shape, &entry.strides) {
            let bits = entry.shape.iter().product::<u64>() * bits(entry.dtype);
            assert_eq!(
                bits,
                entry.size * 8,
                "{name}: a contiguous tensor fills its record"
            );
        } else {
            found.strides.insert(name.clone(), entry.strides.clone());
        }
        let tensor = Tensor {
            dtype: entry.dtype,
            shape: entry.shape.clone(),
            data: gather(bytes, entry.dtype, &entry.shape, &entry.strides),
        };
        found.tensors.insert(name.clone(), tensor);
        if entry.size > 0 {
            let place = (entry.partition, entry.offset, entry.size);
            records.entry(place).or_default().push(name.clone());
        }
    }
    // Nothing but records and up to 7 bytes after each.
    let mut ends = vec![0; partitions.len()];
    for &(partition, offset, size) in records.keys() {
        assert_eq!(offset, ends[partition], "in partition {partition}");
        ends[partition] = (offset + size).next_multiple_of(8);
    }
    for (number, (bytes, end)) in partitions.iter().zip(ends).enumerate() {
        assert_eq!(bytes.len() as u64, end, "length of partition {number}");
    }
    found.shared = records
        .into_values()
        .filter(|names| names.len() > 1)
        .collect();
    found
}

// --- Directories --------------------------------------------------------------------------------

/// Every file below a directory and its bytes, hidden ones too.
pub fn snapshot(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut open = vec![directory.to_owned()];
    while let Some(folder) = open.pop() {
        let Ok(entries) = fs::read_dir(&folder) else {
            continue;
        };
        for entry in entries {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else {
                let name = path.strip_prefix(directory).unwrap().to_owned();
                files.insert(name, fs::read(&path).unwrap());
            }
        }
    }
    files
}

/// What is in a directory and below it, files and folders, sorted.
pub fn names(directory: &Path) -> Vec<String> {
    let mut names = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(folder) = open.pop() {
        let Ok(entries) = fs::read_dir(&folder) else {
            continue;
        };
        for entry in entries {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(directory).unwrap();
            names.push(name.to_string_lossy().into_owned());
            if path.is_dir() {
                open.push(path);
            }
        }
    }
    names.sort();
    names
}

/// Says that a test did not run, and counts it.
pub fn skip(reason: &str) {
    use std::io::Write;
    eprintln!("SKIP: {reason}");
    if let Some(log) = std::env::var_os("TENSORA_SKIP_LOG") {
        let mut log = fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(log)
            .unwrap();
        writeln!(log, "SKIP: {reason}").unwrap();
    }
}
