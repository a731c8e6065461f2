//! Reading ServerlessLLM: the index in both dialects, partitions, and sets of ranks.

mod checkpoint;
mod index;

use crate::Dtype;

pub(crate) use self::checkpoint::{open_directory, open_rank, open_ranks, ranks};
pub use self::index::{ServerlessLlmIndex, parse_serverlessllm_index};
pub(crate) use self::index::{is_row_major, view_bytes};

/// The name of the index file.
pub(crate) const INDEX_NAME: &str = "tensor_index.json";

/// How partition files' names begin; a number follows.
const PARTITION_PREFIX: &str = "tensor.data_";

/// How the names of ranks' directories begin; a number follows.
const RANK_PREFIX: &str = "rank_";

/// The most padding that follows a record in the store dialect, which aligns records to 8 bytes.
const PADDING_LIMIT_BYTES: u64 = 7;

/// The most that may follow the last record of a store of several partitions: a writer that fills the last
/// block of a file for direct I/O adds less than this.
const TAIL_LIMIT_BYTES: u64 = 4095;

/// The name of a partition file.
pub(crate) fn partition_name(partition: u64) -> String {
    format!("{PARTITION_PREFIX}{partition}")
}

/// The short lower-case dtype name of the partitioned dialect, such as `bf16`; `None` for the packed
/// 4- and 6-bit types, which neither dialect has.
pub(crate) fn short_name(dtype: Dtype) -> Option<&'static str> {
    Some(match dtype {
        Dtype::F4 | Dtype::F6E2M3 | Dtype::F6E3M2 => return None,
        Dtype::Bool => "bool",
        Dtype::U8 => "u8",
        Dtype::I8 => "i8",
        Dtype::F8E5M2 => "f8_e5m2",
        Dtype::F8E4M3 => "f8_e4m3",
        Dtype::F8E8M0 => "f8_e8m0",
        Dtype::F8E4M3Fnuz => "f8_e4m3fnuz",
        Dtype::F8E5M2Fnuz => "f8_e5m2fnuz",
        Dtype::I16 => "i16",
        Dtype::U16 => "u16",
        Dtype::F16 => "f16",
        Dtype::BF16 => "bf16",
        Dtype::I32 => "i32",
        Dtype::U32 => "u32",
        Dtype::F32 => "f32",
        Dtype::C64 => "c64",
        Dtype::F64 => "f64",
        Dtype::I64 => "i64",
        Dtype::U64 => "u64",
    })
}
