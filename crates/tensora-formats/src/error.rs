use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::quote::{FirstOf, Plain, Quoted, Ranks, Shape, Short, Shown};
use crate::{Dtype, Format, ShortPartition};

/// A `Result` whose error is this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a checkpoint could not be opened, parsed or laid out, or a part of it not be had.
///
/// One variant per rule, so that a caller can react to the rule and need not read the message. The
/// messages name the file, the tensor, the numbers and, where there is one, the remedy. Lists
/// (`damaged`, `tensors`, …), names, shapes and whatever else comes from a file are complete in the
/// variant and shortened in the message.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    // --- Paths and files -------------------------------------------------------------------
    /// The operating system refused an operation.
    #[error("{}: could not {operation}: {source}{}", Shown(path), Remedy(source))]
    Io {
        /// What was being accessed.
        path: PathBuf,
        /// What was being done, as a verb: `open`, `read`, `list`.
        operation: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The path does not exist.
    #[error(
        "{}: no such file or directory; give a local path to a checkpoint file or directory",
        Shown(path)
    )]
    NotFound {
        /// The path as given.
        path: PathBuf,
    },
    /// A symbolic link points to nothing, as an interrupted Hugging Face download leaves it.
    #[error(
        "{}: symbolic link to {}, which does not exist; this is what an interrupted download leaves behind: download the file again",
        Shown(path),
        Shown(target)
    )]
    DanglingSymlink {
        /// The link.
        path: PathBuf,
        /// Where it points, as stored in the link.
        target: PathBuf,
    },
    /// The path is a directory, a pipe, a socket or a device where a file is needed.
    #[error("{}: is {kind}; a regular file is needed", Shown(path))]
    NotARegularFile {
        /// The path.
        path: PathBuf,
        /// What it is, with its article: `a directory`.
        kind: &'static str,
    },
    /// The file is the small text that Git leaves in place of a large file.
    #[error("{}: is a Git LFS pointer, a short text that stands in for {}; run `git lfs pull` in the repository to fetch the data", Shown(path), PointedBytes(*bytes))]
    GitLfsPointer {
        /// The pointer file.
        path: PathBuf,
        /// The size of the real file in bytes, where the pointer says so.
        bytes: Option<u64>,
    },
    /// The file's first bytes are those of another format.
    #[error(
        "{}: is {kind}, which Tensora does not read; it reads SafeTensors and ServerlessLLM checkpoints: convert the file, or download the repository's .safetensors files",
        Shown(path)
    )]
    ForeignFile {
        /// The file.
        path: PathBuf,
        /// What it is, with its article: `a GGUF file`.
        kind: &'static str,
    },
    /// A directory holds nothing that Tensora recognises.
    #[error(
        "{}: no checkpoint here: looked for *.safetensors.index.json, *.safetensors, tensor_index.json, rank_N/tensor_index.json and a Hugging Face cache's snapshots/; {}",
        Shown(path),
        FoundInstead(found)
    )]
    NoCheckpoint {
        /// The directory.
        path: PathBuf,
        /// What it holds instead, sorted by name.
        found: Vec<String>,
    },
    /// A directory holds no checkpoint that Tensora reads, but weights of other formats.
    #[error(
        "{}: holds no SafeTensors or ServerlessLLM checkpoint, but files of formats that Tensora does not read: {}; convert them, or download the repository's .safetensors files",
        Shown(path),
        FirstOf(files)
    )]
    ForeignDirectory {
        /// The directory.
        path: PathBuf,
        /// The files whose names end as those of another format, sorted.
        files: Vec<String>,
    },
    /// A conversion was interrupted while it put its files into a directory.
    #[error(
        "{}: a conversion was interrupted while it put its files in place, so that they may belong to two checkpoints; finish it with `tensora convert … --resume`, or convert again with --restart",
        Shown(path)
    )]
    Unfinished {
        /// The directory, which holds a file called [`UNFINISHED_NAME`](crate::UNFINISHED_NAME).
        path: PathBuf,
    },
    /// A directory holds several SafeTensors indexes and none has the default name.
    #[error(
        "{}: several indexes ({}); give the path of the one you want",
        Shown(path),
        FirstOf(indexes)
    )]
    SeveralIndexes {
        /// The directory.
        path: PathBuf,
        /// The index files' names, sorted.
        indexes: Vec<String>,
    },
    /// A directory holds both a SafeTensors and a ServerlessLLM checkpoint.
    #[error(
        "{}: holds both a SafeTensors and a ServerlessLLM checkpoint; name the format you want",
        Shown(path)
    )]
    SeveralFormats {
        /// The directory.
        path: PathBuf,
    },
    /// The path holds another format than the one asked for.
    #[error("{}: holds {found}, but {asked} was asked for", Shown(path))]
    WrongFormat {
        /// The path.
        path: PathBuf,
        /// The format asked for.
        asked: Format,
        /// The format found.
        found: Format,
    },
    /// A Hugging Face cache's `refs/main` does not hold a plain directory name.
    #[error(
        "{}: holds {revision}, which cannot name a directory in snapshots/; give the path of the snapshot you want",
        Shown(path), revision = Quoted(revision))]
    InvalidRevision {
        /// The `refs/main` file.
        path: PathBuf,
        /// Its content, shortened.
        revision: String,
    },
    /// A Hugging Face cache's `refs/main` names a snapshot that is not there.
    #[error(
        "{}: refs/main names snapshot {revision}, which is not in snapshots/ ({}); download the model again, or give the path of the snapshot you want",
        Shown(path),
        Present(snapshots), revision = Quoted(revision))]
    MissingSnapshot {
        /// The cache directory of the repository.
        path: PathBuf,
        /// The name in `refs/main`.
        revision: String,
        /// The snapshots that are there, sorted.
        snapshots: Vec<String>,
    },
    /// A Hugging Face cache has several snapshots and no `refs/main` to choose by.
    #[error(
        "{}: several snapshots ({}) and no refs/main to choose by; give the path of the snapshot you want",
        Shown(path),
        FirstOf(snapshots)
    )]
    SeveralSnapshots {
        /// The cache directory of the repository.
        path: PathBuf,
        /// The snapshots that are there, sorted.
        snapshots: Vec<String>,
    },
    /// The `rank_N` directories are not numbered from 0 without a gap.
    #[error(
        "{}: rank_{missing} is missing, the ranks present are {}; restore it, or open one rank alone",
        Shown(path),
        Ranks(ranks)
    )]
    MissingRank {
        /// The directory that holds the ranks.
        path: PathBuf,
        /// The first missing rank.
        missing: u32,
        /// The ranks present, ascending.
        ranks: Vec<u32>,
    },
    /// The rank asked for is not there.
    #[error(
        "{}: rank {rank} was asked for, but {}",
        Shown(path),
        UnknownRankReason(ranks)
    )]
    UnknownRank {
        /// The path.
        path: PathBuf,
        /// The rank asked for.
        rank: u32,
        /// The ranks present, ascending; empty if the path is no set of ranks.
        ranks: Vec<u32>,
    },
    /// The ranks of one set use different formats.
    #[error(
        "{}: rank_{first_rank} is {first}, but rank_{rank} is {format}; the ranks of one checkpoint share a format: open one rank alone",
        Shown(path)
    )]
    MixedRankFormats {
        /// The directory that holds the ranks.
        path: PathBuf,
        /// The first rank that has tensors.
        first_rank: u32,
        /// Its format.
        first: Format,
        /// The first rank that differs.
        rank: u32,
        /// Its format.
        format: Format,
    },

    // --- The frame of a SafeTensors file ---------------------------------------------------
    /// The file is shorter than the 8 bytes that give the header's length.
    #[error(
        "{}: {file_bytes} bytes long; a SafeTensors file starts with 8 bytes that give the header's length: download or copy the file again",
        Shown(path)
    )]
    FileTooShort {
        /// The file.
        path: PathBuf,
        /// The file's length in bytes.
        file_bytes: u64,
    },
    /// The header's length is above the format's limit.
    #[error(
        "{}: the first 8 bytes give a header of {header_bytes} bytes, above the limit of {limit_bytes}; this is not a SafeTensors file, or it is damaged: download or copy it again",
        Shown(path)
    )]
    HeaderTooLarge {
        /// The file.
        path: PathBuf,
        /// The length in the file's first 8 bytes.
        header_bytes: u64,
        /// The largest length allowed, 100,000,000 bytes.
        limit_bytes: u64,
    },
    /// The header does not fit into the file.
    #[error(
        "{}: the header of {header_bytes} bytes ends past the end of the file ({file_bytes} bytes); the file is cut short or is no SafeTensors file: download or copy it again",
        Shown(path)
    )]
    HeaderPastEnd {
        /// The file.
        path: PathBuf,
        /// The length in the file's first 8 bytes.
        header_bytes: u64,
        /// The file's length in bytes.
        file_bytes: u64,
    },
    /// The file ends before the data that its header describes.
    #[error("{}: {file_bytes} bytes long, but its header describes {needed_bytes}; {} missing, damaged: {}; download or copy the file again", Shown(path), Count(needed_bytes.saturating_sub(*file_bytes), "byte"), FirstOf(damaged))]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The file's length in bytes.
        file_bytes: u64,
        /// The length in bytes that the header describes (saturating).
        needed_bytes: u64,
        /// The tensors whose data is not all there, in offset order.
        damaged: Vec<String>,
    },
    /// The file goes on after the data that its header describes.
    #[error("{}: {file_bytes} bytes long, but its header describes only {described_bytes}; {} left over at the end; the file is damaged or was written over a longer one: download or copy it again", Shown(path), Count(file_bytes.saturating_sub(*described_bytes), "byte"))]
    TrailingBytes {
        /// The file.
        path: PathBuf,
        /// The file's length in bytes.
        file_bytes: u64,
        /// The length in bytes that the header describes.
        described_bytes: u64,
    },

    // --- JSON: headers and indexes ---------------------------------------------------------
    /// An index file is too large to be one.
    #[error(
        "{}: {bytes} bytes long, above the limit of {limit_bytes} for an index; this is some other file under an index's name, or it is damaged: download it again",
        Shown(path)
    )]
    IndexTooLarge {
        /// The index file.
        path: PathBuf,
        /// Its length in bytes.
        bytes: u64,
        /// The largest length accepted, in bytes.
        limit_bytes: u64,
    },
    /// The JSON text is not UTF-8.
    #[error(
        "{}: the JSON text is not UTF-8 from its byte {offset} on; the file is damaged or was written wrongly: download or copy it again",
        Shown(path)
    )]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// The first wrong byte, counted from the start of the JSON text.
        offset: u64,
    },
    /// The JSON text starts with a byte-order mark.
    #[error(
        "{}: the JSON text starts with a byte-order mark, which the format forbids; write it without one",
        Shown(path)
    )]
    ByteOrderMark {
        /// The file.
        path: PathBuf,
    },
    /// The JSON text is padded with NUL bytes.
    #[error(
        "{}: the JSON text is padded with NUL bytes from its byte {offset} on; the format pads with spaces: write the file anew",
        Shown(path)
    )]
    NulPadding {
        /// The file.
        path: PathBuf,
        /// The first NUL byte, counted from the start of the JSON text.
        offset: u64,
    },
    /// There is no JSON text where one must be.
    #[error(
        "{}: its {text} is empty; an interrupted download or copy leaves such a file behind: download or copy it again",
        Shown(path)
    )]
    EmptyText {
        /// The file.
        path: PathBuf,
        /// What is empty: `header` or `index`.
        text: &'static str,
    },
    /// The text is not JSON, or not of the expected form in a way that no other variant describes.
    #[error(
        "{}: line {line}, column {column} of the JSON text: {reason}",
        Shown(path), reason = Plain(reason))]
    Json {
        /// The file.
        path: PathBuf,
        /// The line within the JSON text, from 1.
        line: usize,
        /// The column within that line, in bytes, from 1.
        column: usize,
        /// What the parser found wrong there.
        reason: String,
    },
    /// A value that belongs to no tensor has the wrong type.
    #[error("{}: {key} must be {expected}, found {found}", Shown(path), key = Plain(key))]
    UnexpectedValue {
        /// The file.
        path: PathBuf,
        /// Where: keys joined by dots and escaped, such as `weight_map` or `__metadata__.format`.
        key: String,
        /// What belongs there.
        expected: &'static str,
        /// What is there.
        found: &'static str,
    },
    /// A required key is missing from an index.
    #[error("{}: has no {key}; this is no SafeTensors index: download the index again, or remove it to open the files without one", Shown(path), key = Quoted(key))]
    MissingKey {
        /// The index file.
        path: PathBuf,
        /// The missing key.
        key: &'static str,
    },
    /// A key that may appear once appears twice.
    #[error("{}: the key {key} appears twice", Shown(path), key = Quoted(key))]
    DuplicateKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
    },
    /// One header or index describes a tensor twice.
    #[error(
        "{}: tensor {tensor} appears twice; the format forbids it, and which one is meant is unclear: write the file anew, or allow that the last one wins",
        Shown(path), tensor = Quoted(tensor))]
    DuplicateTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },

    // --- One tensor's entry ----------------------------------------------------------------
    /// The dtype is not one that the format has.
    #[error("{}: tensor {tensor}: unknown dtype {dtype}, and a guess would be wrong data; correct its spelling, or write the tensor in another dtype, such as bfloat16", Shown(path),  tensor = Quoted(tensor), dtype = Quoted(dtype))]
    UnknownDtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The dtype as it stands in the file.
        dtype: String,
    },
    /// A number that counts something is negative.
    #[error(
        "{}: tensor {tensor}: negative number {value} in {field}",
        Shown(path), tensor = Quoted(tensor), value = Plain(value))]
    NegativeNumber {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The field: `shape`, `data_offsets`, `offset`, `size`, `stride` or `partition`.
        field: &'static str,
        /// The number as it stands in the file.
        value: String,
    },
    /// A number that counts something is written as a fraction or with an exponent.
    #[error(
        "{}: tensor {tensor}: {value} in {field} is not written as a whole number",
        Shown(path), tensor = Quoted(tensor), value = Plain(value))]
    FractionalNumber {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The field, as in [`Error::NegativeNumber`].
        field: &'static str,
        /// The number as it stands in the file.
        value: String,
    },
    /// A number does not fit into 64 bits.
    #[error(
        "{}: tensor {tensor}: {value} in {field} does not fit into 64 bits",
        Shown(path), tensor = Quoted(tensor), value = Plain(value))]
    NumberTooLarge {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The field, as in [`Error::NegativeNumber`].
        field: &'static str,
        /// The number as it stands in the file.
        value: String,
    },
    /// A required field is missing from a tensor's entry.
    #[error("{}: tensor {tensor}: its entry has no {field:?}", Shown(path), tensor = Quoted(tensor))]
    MissingField {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The missing field.
        field: &'static str,
    },
    /// A field appears twice in a tensor's entry.
    #[error("{}: tensor {tensor}: its entry has {field:?} twice", Shown(path), tensor = Quoted(tensor))]
    DuplicateField {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The repeated field.
        field: &'static str,
    },
    /// A field of a tensor's entry has the wrong JSON type.
    #[error(
        "{}: tensor {tensor}: {field} must be {expected}, found {found}",
        Shown(path), tensor = Quoted(tensor))]
    WrongType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The field, or `its entry`.
        field: &'static str,
        /// What belongs there.
        expected: &'static str,
        /// What is there.
        found: &'static str,
    },
    /// `data_offsets` is not a pair.
    #[error(
        "{}: tensor {tensor}: data_offsets must hold 2 numbers, begin and end; found {count}",
        Shown(path), tensor = Quoted(tensor))]
    OffsetCount {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// How many numbers there are.
        count: usize,
    },
    /// The tensor with the lowest data offset does not begin at 0.
    #[error(
        "{}: tensor {tensor}: begins at data offset {begin}, but the first tensor must begin at 0",
        Shown(path), tensor = Quoted(tensor))]
    FirstOffset {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Where it begins, in bytes from the start of the data.
        begin: u64,
    },
    /// Bytes between two tensors belong to neither.
    #[error("{}: tensor {tensor}: begins at data offset {begin}, but the tensor before it, {previous}, ends at {previous_end}: a hole of {}", Shown(path), Count(begin.saturating_sub(*previous_end), "byte"), tensor = Quoted(tensor), previous = Quoted(previous))]
    Hole {
        /// The file.
        path: PathBuf,
        /// The tensor after the hole.
        tensor: String,
        /// Where it begins, in bytes from the start of the data.
        begin: u64,
        /// The tensor before the hole.
        previous: String,
        /// Where that one ends.
        previous_end: u64,
    },
    /// Two tensors claim the same bytes.
    #[error(
        "{}: tensor {tensor}: begins at data offset {begin}, inside or before the tensor {previous}, which ends at {previous_end}",
        Shown(path), tensor = Quoted(tensor), previous = Quoted(previous))]
    Overlap {
        /// The file.
        path: PathBuf,
        /// The tensor that begins too early.
        tensor: String,
        /// Where it begins, in bytes from the start of the data.
        begin: u64,
        /// The tensor before it.
        previous: String,
        /// Where that one ends.
        previous_end: u64,
    },
    /// A tensor ends before it begins.
    #[error(
        "{}: tensor {tensor}: data_offsets [{begin}, {end}] end before they begin",
        Shown(path), tensor = Quoted(tensor))]
    ReversedOffsets {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Where it begins, in bytes from the start of the data.
        begin: u64,
        /// Where it ends.
        end: u64,
    },
    /// The size of a tensor, in elements or in bits, overflows 64 bits.
    #[error(
        "{}: tensor {tensor}: the size of {dtype} {shape} overflows 64 bits",
        Shown(path), tensor = Quoted(tensor), shape = Shape(shape))]
    ShapeOverflow {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<u64>,
    },
    /// A tensor of 4- or 6-bit elements does not fill whole bytes.
    #[error(
        "{}: tensor {tensor}: {dtype} {shape} is {bits} bits, which do not fill whole bytes",
        Shown(path), tensor = Quoted(tensor), shape = Shape(shape))]
    PartialByte {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<u64>,
        /// Its size in bits.
        bits: u64,
    },
    /// The stored size of a tensor is not that of its shape and dtype.
    #[error("{}: tensor {tensor}: {dtype} {shape} takes {}, but {stored_bytes} are stored", Shown(path), Count(*needed_bytes, "byte"), tensor = Quoted(tensor), shape = Shape(shape))]
    SizeMismatch {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<u64>,
        /// The bytes that dtype and shape need.
        needed_bytes: u64,
        /// The bytes that the file gives it.
        stored_bytes: u64,
    },

    // --- SafeTensors over several files ----------------------------------------------------
    /// A file name in an index leads, or may lead, outside the index's directory.
    #[error(
        "{}: tensor {tensor} is mapped to the file name {name}, which {reason}; names in an index must be relative and stay below its directory",
        Shown(path), tensor = Quoted(tensor), name = Quoted(name))]
    UnsafeFileName {
        /// The index file.
        path: PathBuf,
        /// A tensor mapped to it.
        tensor: String,
        /// The file name.
        name: String,
        /// What is wrong with it, as a verb phrase: `is absolute`.
        reason: &'static str,
    },
    /// An index lists no tensor, although SafeTensors files lie beside it.
    #[error(
        "{}: its weight_map is empty, but SafeTensors files lie beside it: {}; download the index again, or remove it to open the files without one",
        Shown(path),
        FirstOf(files)
    )]
    EmptyWeightMap {
        /// The index file.
        path: PathBuf,
        /// The names of the files beside it, sorted.
        files: Vec<String>,
    },
    /// Shards that an index, or the numbering of the files, calls for are missing.
    #[error("{}: {} missing: {}; download or copy them again", Shown(path), Count(missing.len() as u64, "shard"), FirstOf(missing))]
    MissingShards {
        /// The index file, or the directory if there is no index.
        path: PathBuf,
        /// The missing files' names, sorted.
        missing: Vec<String>,
    },
    /// The index maps a tensor to a shard that does not hold it.
    #[error("{}: tensor {tensor} is mapped to {shard}, which does not hold it{}", Shown(path), Elsewhere(found_in.as_deref(), *others), tensor = Quoted(tensor), shard = Quoted(shard))]
    TensorNotInShard {
        /// The index file.
        path: PathBuf,
        /// The first such tensor.
        tensor: String,
        /// The shard that the index names.
        shard: String,
        /// Another shard that holds it, if one does.
        found_in: Option<String>,
        /// How many other tensors are missing in the same way.
        others: usize,
    },
    /// Two shards of one index hold the same tensor.
    #[error(
        "{}: tensor {tensor} is in two shards, {first} and {second}, and which one is meant is unclear; download the index and both shards again",
        Shown(path), tensor = Quoted(tensor), first = Quoted(first), second = Quoted(second))]
    TensorInTwoShards {
        /// The index file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// One shard.
        first: String,
        /// The other.
        second: String,
    },
    /// A shard holds tensors that the index does not list.
    #[error("{}: the shards hold {} that the index does not list: {}; the index and the shards do not belong together, or ask to ignore unlisted tensors", Shown(path), Count(tensors.len() as u64, "tensor"), FirstOf(tensors))]
    UnlistedTensors {
        /// The index file.
        path: PathBuf,
        /// The tensors, in shard and offset order.
        tensors: Vec<String>,
    },
    /// Without an index, two files of a directory hold the same tensor.
    #[error(
        "{}: no index says which files belong together, and tensor {tensor} is in both {first} and {second}; give the path of the one file you want{}",
        Shown(path),
        ConsolidatedHint(first, second), tensor = Quoted(tensor), first = Quoted(first), second = Quoted(second))]
    TensorInTwoFiles {
        /// The directory.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// One file.
        first: String,
        /// The other.
        second: String,
    },

    // --- ServerlessLLM ---------------------------------------------------------------------
    /// An entry has neither five nor six fields.
    #[error(
        "{}: tensor {tensor}: its entry has {count} fields; the store dialect has 5 and the partitioned dialect 6: write the index anew",
        Shown(path), tensor = Quoted(tensor))]
    FieldCount {
        /// The index file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// How many fields it has.
        count: usize,
    },
    /// One index holds entries of both dialects.
    #[error(
        "{}: mixes the dialects: tensor {store} has 5 fields (store) and tensor {partitioned} has 6 (partitioned); the index was put together from two checkpoints: write it anew",
        Shown(path), store = Quoted(store), partitioned = Quoted(partitioned))]
    MixedDialects {
        /// The index file.
        path: PathBuf,
        /// A tensor with five fields.
        store: String,
        /// A tensor with six fields.
        partitioned: String,
    },
    /// A partition is missing between others, or a tensor lies in one that is not there.
    #[error("{}: tensor.data_{partition} is missing{}; {partitions} partitions are there: copy it from where the checkpoint comes from", Shown(path), NeededBy(tensor.as_deref()))]
    MissingPartition {
        /// The index file.
        path: PathBuf,
        /// The missing partition's number.
        partition: u64,
        /// A tensor that lies in it; `None` where the numbering has a gap.
        tensor: Option<String>,
        /// How many partitions are there.
        partitions: usize,
    },
    /// A tensor of the store dialect runs over the end of its partition into the next one.
    #[error("{}: tensor {tensor}: bytes {offset}..{} cross the end of tensor.data_{partition} at {partition_end}; a partition is not as long as it was written, or the index belongs to other partitions: copy the whole checkpoint again", Shown(path), offset.saturating_add(*bytes), tensor = Quoted(tensor))]
    CrossesPartition {
        /// The index file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its global offset in bytes.
        offset: u64,
        /// Its stored size in bytes.
        bytes: u64,
        /// The partition in which it begins.
        partition: u64,
        /// The global offset at which that partition ends.
        partition_end: u64,
    },
    /// Partitions end before the tensors that the index puts into them.
    #[error(
        "{}: {}; copy these partitions, and any that should follow them, again, or write the checkpoint anew, or ask to leave the damaged tensors out",
        Shown(path),
        Short(partitions)
    )]
    PartitionsTooShort {
        /// The index file, beside which the partitions are.
        path: PathBuf,
        /// All such partitions, in the order of their numbers; at least one.
        partitions: Vec<ShortPartition>,
    },
    /// A partition of the store dialect has a run of bytes that no record covers and that is too long
    /// to be padding.
    #[error("{}: {} from byte {begin} on belong to no tensor, but at most 7 bytes of padding follow a record; offsets count through all partitions, so that surplus bytes here shift every later tensor onto wrong data: copy the partition again, or write the checkpoint anew", Shown(path), Count(*bytes, "byte"))]
    UnusedBytes {
        /// The partition file.
        path: PathBuf,
        /// Where the run begins, in bytes from the start of the partition.
        begin: u64,
        /// How long it is in bytes.
        bytes: u64,
    },
    /// The last of several partitions of the store dialect goes on far behind the last record.
    #[error("{}: {} follow the last tensor, which ends at byte {begin}; an earlier partition may have lost as much, and offsets count through all partitions, so that every later tensor would be read from wrong places: copy all partitions again, or, if this one is known to be written over a longer file, cut it to {begin} bytes", Shown(path), Count(*bytes, "byte"))]
    SurplusTail {
        /// The last partition.
        path: PathBuf,
        /// Where the last record ends, in bytes from the start of the partition.
        begin: u64,
        /// How many bytes follow.
        bytes: u64,
    },
    /// No tensor lies in a partition of the store dialect.
    #[error("{}: {} long, and the index puts no tensor into it; offsets count through all partitions, so that a partition of the wrong length shifts every later tensor onto wrong data: copy the index and all partitions again, or remove this one if it is left over from another checkpoint", Shown(path), Count(*bytes, "byte"))]
    UnusedPartition {
        /// The partition file.
        path: PathBuf,
        /// Its length in bytes.
        bytes: u64,
    },
    /// The stride of a tensor has not one number per dimension.
    #[error(
        "{}: tensor {tensor}: {dimensions} dimensions but {strides} strides; the index is damaged or was written wrongly: write it anew",
        Shown(path), tensor = Quoted(tensor))]
    StrideCount {
        /// The index file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The length of its shape.
        dimensions: usize,
        /// The length of its stride.
        strides: usize,
    },
    /// A strided view reaches past the end of its storage.
    #[error("{}: tensor {tensor}: its strided view reaches {needed_bytes} bytes, but its storage has {}; the index is damaged or was written wrongly: write it anew", Shown(path), Count(*stored_bytes, "byte"), tensor = Quoted(tensor))]
    StorageTooSmall {
        /// The index file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The bytes from the storage's start to the end of the last element (saturating).
        needed_bytes: u64,
        /// The bytes that the file gives it.
        stored_bytes: u64,
    },
    /// The end of a tensor's bytes overflows 64 bits.
    #[error(
        "{}: tensor {tensor}: the end of its bytes (offset {offset}, size {bytes}) overflows 64 bits",
        Shown(path), tensor = Quoted(tensor))]
    RangeOverflow {
        /// The index file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its offset in bytes.
        offset: u64,
        /// Its stored size in bytes.
        bytes: u64,
    },

    // --- Layouts ---------------------------------------------------------------------------
    /// Two tensors to be written have the same name.
    #[error("tensor {tensor} is to be written twice; names must be unique", tensor = Quoted(tensor))]
    DuplicateSpec {
        /// The tensor.
        tensor: String,
    },
    /// A tensor to be written has the name that SafeTensors keeps for its metadata.
    #[error(
        "tensor {tensor} cannot be written to SafeTensors: the format keeps that name for its metadata", tensor = Quoted(tensor))]
    ReservedName {
        /// The tensor.
        tensor: String,
    },
    /// A tensor to be written has a size that overflows 64 bits or does not fill whole bytes.
    #[error(
        "tensor {tensor} cannot be written: {dtype} {shape} overflows 64 bits or does not fill whole bytes", tensor = Quoted(tensor), shape = Shape(shape))]
    SpecSize {
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<u64>,
    },
    /// A record to be written has no tensor, so that no index could say what it is.
    #[error("record {record} of {} cannot be written: no tensor lies in it", Count(*bytes, "byte"))]
    EmptyRecord {
        /// The record's position in the slice to be laid out.
        record: usize,
        /// Its size in bytes.
        bytes: u64,
    },
    /// The strides of a tensor to be written are not one number per dimension.
    #[error(
        "tensor {tensor} cannot be written: {dimensions} dimensions but {strides} strides", tensor = Quoted(tensor))]
    RecordStrides {
        /// The tensor.
        tensor: String,
        /// The length of its shape.
        dimensions: usize,
        /// The length of its strides.
        strides: usize,
    },
    /// A tensor to be written does not fill its record, or, if it is strided, reaches past its end.
    #[error(
        "tensor {tensor} cannot be written: it takes {}, but its record has {record_bytes}; a row-major tensor fills its record, and a strided one lies inside it",
        Count(*needed_bytes, "byte"), tensor = Quoted(tensor))]
    RecordSize {
        /// The tensor.
        tensor: String,
        /// The bytes from the record's start to the end of the tensor's last element (saturating).
        needed_bytes: u64,
        /// The size of the record in bytes.
        record_bytes: u64,
    },
    /// The format to be written has no such dtype.
    #[error(
        "tensor {tensor} cannot be written: {format} has no dtype {dtype}; write SafeTensors instead", tensor = Quoted(tensor))]
    DtypeNotInFormat {
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: Dtype,
        /// The format.
        format: Format,
    },
    /// The header of a file to be written would be above the format's limit.
    #[error(
        "{file}: its header would take {header_bytes} bytes, above the format's limit of {limit_bytes}; write more shards, or align the data less", file = Plain(file))]
    LayoutHeaderTooLarge {
        /// The file's name.
        file: String,
        /// The header's length in bytes, padding included.
        header_bytes: u64,
        /// The largest length allowed, in bytes.
        limit_bytes: u64,
    },
    /// The data alignment asked for cannot be met.
    #[error("data alignment of {alignment_bytes} bytes: must be 0 or a multiple of 8")]
    DataAlignment {
        /// The alignment asked for, in bytes.
        alignment_bytes: u64,
    },
    /// The tensors together are longer than 64 bits can count.
    #[error("tensor {tensor} cannot be written: the checkpoint would pass 2^64 bytes with it", tensor = Quoted(tensor))]
    LayoutOverflow {
        /// The first tensor that does not fit.
        tensor: String,
    },

    // --- Parts of tensors ------------------------------------------------------------------
    /// A slice names a dimension that the tensor does not have.
    #[error(
        "tensor {tensor} of shape {shape} has no dimension {dimension}; its {} count from 0",
        Count(shape.len() as u64, "dimension"), tensor = Quoted(tensor), shape = Shape(shape))]
    NoSuchDimension {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
        /// The dimension asked for.
        dimension: usize,
    },
    /// A slice is reversed or reaches past the end of its dimension.
    #[error(
        "tensor {tensor} of shape {shape} has no range {begin}..{end} along dimension {dimension}; give a range within 0..{}",
        shape.get(*dimension).copied().unwrap_or(0), tensor = Quoted(tensor), shape = Shape(shape))]
    SliceOutside {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
        /// The dimension.
        dimension: usize,
        /// Where the range begins.
        begin: u64,
        /// Where it ends.
        end: u64,
    },
    /// One dimension is to be sliced twice.
    #[error("tensor {tensor} is to be sliced along dimension {dimension} twice; give one range", tensor = Quoted(tensor))]
    SlicedTwice {
        /// The tensor.
        tensor: String,
        /// The dimension.
        dimension: usize,
    },
    /// A part of a tensor whose elements share bytes does not begin and end with whole bytes.
    #[error(
        "tensor {tensor}: a part of shape {part} of {dtype} {shape} would cut through a byte, because {} elements fill {}; begin and end where the elements before, and each row of the part, are a multiple of {}",
        PackedElements(*dtype), PackedBytes(*dtype), PackedElements(*dtype),
        tensor = Quoted(tensor), part = Shape(part), shape = Shape(shape))]
    SliceCutsByte {
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<u64>,
        /// The shape of the part.
        part: Vec<u64>,
    },
    /// The elements of a part overflow 64 bits or lie outside the bytes that are stored for the tensor.
    #[error(
        "tensor {tensor}: elements of {dtype} {shape} overflow 64 bits or lie outside its {}; an expanded tensor can be this large, otherwise its entry was changed after the checkpoint was opened",
        Count(*stored_bytes, "stored byte"), tensor = Quoted(tensor), shape = Shape(shape))]
    PartNotStored {
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<u64>,
        /// The bytes stored for it.
        stored_bytes: u64,
    },
    /// A range is reversed or reaches past the end of its dimension.
    #[error(
        "no range {begin}..{end} in a dimension of length {length}; give one within 0..{length}"
    )]
    RangeOutside {
        /// Where the range begins.
        begin: u64,
        /// Where it ends.
        end: u64,
        /// The dimension's length.
        length: u64,
    },
    /// A rank is not one of its world.
    #[error("no rank {rank} among {}; ranks count from 0", Count(u64::from(*world), "rank"))]
    NoSuchRank {
        /// The rank asked for.
        rank: u32,
        /// How many there are.
        world: u32,
    },
    /// A dimension does not divide evenly by its ranks.
    #[error(
        "a dimension of length {length} does not divide evenly by {}{}; choose a number of ranks that divides it, or let the last rank take the remainder",
        Count(u64::from(*world), "rank"), InMultiplesOf(*multiple_of))]
    UnevenRanks {
        /// The dimension's length.
        length: u64,
        /// How many ranks share it.
        world: u32,
        /// How many indexes stay together.
        multiple_of: u64,
    },

    // --- Windows ---------------------------------------------------------------------------
    /// A part to be read belongs to other files than were given.
    #[error(
        "tensor {tensor}: bytes {begin}..{end} are not in file {file} of the {} given; the part belongs to another checkpoint",
        Count(*files as u64, "file"), tensor = Quoted(tensor))]
    PartOutsideFiles {
        /// The tensor.
        tensor: String,
        /// The position of its file.
        file: usize,
        /// How many files there are.
        files: usize,
        /// Where the part begins in the file.
        begin: u64,
        /// Where it ends.
        end: u64,
    },
    /// Not one element fits a window.
    #[error(
        "tensor {tensor}: a window of {} cannot hold one element, which takes {} with the blocks around it; give at least that much",
        Count(*window_bytes, "byte"), Count(*needed_bytes, "byte"), tensor = Quoted(tensor))]
    WindowTooSmall {
        /// The tensor.
        tensor: String,
        /// The size of a window.
        window_bytes: u64,
        /// The size that would do, in bytes (saturating).
        needed_bytes: u64,
    },
    /// A strided tensor whose elements are not stored in ascending order fits no window.
    #[error(
        "tensor {tensor}: its elements do not lie in ascending order, so that one window must hold them all, {} with the blocks around them, but a window has {}; give it that much, or load the tensor instead of streaming it",
        Count(*needed_bytes, "byte"), Count(*window_bytes, "byte"), tensor = Quoted(tensor))]
    ViewTooLarge {
        /// The tensor.
        tensor: String,
        /// The size of a window.
        window_bytes: u64,
        /// The size that would do, in bytes (saturating).
        needed_bytes: u64,
    },
}

/// What to do where the operating system's answer alone does not say it.
struct Remedy<'a>(&'a io::Error);

impl fmt::Display for Remedy<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0.kind() {
            io::ErrorKind::PermissionDenied => {
                "; make it readable, and its directories searchable, for the user that runs this"
            }
            _ => "",
        })
    }
}

struct FoundInstead<'a>(&'a [String]);

impl fmt::Display for FoundInstead<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            f.write_str("the directory is empty")
        } else {
            write!(f, "found {}", FirstOf(self.0))
        }
    }
}

struct Present<'a>(&'a [String]);

impl fmt::Display for Present<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            f.write_str("none is there")
        } else {
            write!(f, "there: {}", FirstOf(self.0))
        }
    }
}

struct UnknownRankReason<'a>(&'a [u32]);

impl fmt::Display for UnknownRankReason<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            f.write_str("the path is no set of rank_N directories; open it without a rank")
        } else {
            write!(f, "the ranks present are {}", Ranks(self.0))
        }
    }
}

struct PointedBytes(Option<u64>);

impl fmt::Display for PointedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(bytes) => write!(f, "a file of {bytes} bytes"),
            None => f.write_str("the real file"),
        }
    }
}

struct Elsewhere<'a>(Option<&'a str>, usize);

impl fmt::Display for Elsewhere<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(shard) = self.0 {
            write!(f, " ({} does)", Quoted(shard))?;
        }
        if self.1 > 0 {
            write!(f, "; the same is true of {} more", self.1)?;
        }
        f.write_str("; the index and the shards do not belong together: download both again")
    }
}

struct NeededBy<'a>(Option<&'a str>);

impl fmt::Display for NeededBy<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(tensor) => write!(f, ", and tensor {} lies in it", Quoted(tensor)),
            None => f.write_str(" between others"),
        }
    }
}

/// Mistral's repositories hold the model twice; the message says so where the name gives it away.
struct ConsolidatedHint<'a>(&'a str, &'a str);

impl fmt::Display for ConsolidatedHint<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.starts_with("consolidated") != self.1.starts_with("consolidated") {
            f.write_str(", or download the index (consolidated*.safetensors usually holds the whole model a second time)")?;
        }
        Ok(())
    }
}

/// The fewest elements that fill whole bytes.
struct PackedElements(Dtype);

impl fmt::Display for PackedElements {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", fewest_elements(self.0))
    }
}

/// The bytes that the fewest such elements fill.
struct PackedBytes(Dtype);

impl fmt::Display for PackedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = fewest_elements(self.0) * u64::from(self.0.bits()) / 8;
        write!(f, "{}", Count(bytes, "byte"))
    }
}

/// How many elements fill whole bytes: 8 bits divided by what their size shares with 8.
fn fewest_elements(dtype: Dtype) -> u64 {
    8 >> dtype.bits().trailing_zeros().min(3)
}

struct InMultiplesOf(u64);

impl fmt::Display for InMultiplesOf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 > 1 {
            write!(f, " in multiples of {}", self.0)?;
        }
        Ok(())
    }
}

/// A number with its unit, in the plural where it needs one.
struct Count(u64, &'static str);

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.0 == 1 { "" } else { "s" };
        write!(f, "{} {}{plural}", self.0, self.1)
    }
}
