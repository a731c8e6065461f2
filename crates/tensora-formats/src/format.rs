use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::quote::Quoted;

/// The on-disk formats that Tensora reads and writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Format {
    /// SafeTensors: one file, or shards with an index.
    #[serde(rename = "safetensors")]
    Safetensors,
    /// ServerlessLLM's own store: five-field entries, offsets that count through all partitions.
    #[serde(rename = "serverlessllm-store")]
    ServerlessLlmStore,
    /// The partitioned ServerlessLLM dialect: six-field entries, offsets within one partition.
    #[serde(rename = "serverlessllm-partitioned")]
    ServerlessLlmPartitioned,
}

/// A name that no [`Format`] has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown format {}; the formats are safetensors, serverlessllm-store and serverlessllm-partitioned",
    Quoted(name)
)]
pub struct UnknownFormatName {
    name: String,
}

impl Format {
    /// Every format.
    pub const ALL: &'static [Self] = &[
        Self::Safetensors,
        Self::ServerlessLlmStore,
        Self::ServerlessLlmPartitioned,
    ];

    /// The name used on command lines and in reports, such as `serverlessllm-store`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Safetensors => "safetensors",
            Self::ServerlessLlmStore => "serverlessllm-store",
            Self::ServerlessLlmPartitioned => "serverlessllm-partitioned",
        }
    }

    /// Whether this is one of the two ServerlessLLM dialects.
    pub fn is_serverlessllm(self) -> bool {
        !matches!(self, Self::Safetensors)
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Format {
    type Err = UnknownFormatName;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .iter()
            .copied()
            .find(|format| format.as_str() == name)
            .ok_or_else(|| UnknownFormatName {
                name: name.to_owned(),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_name_everywhere() {
        for &format in Format::ALL {
            assert_eq!(format.to_string(), format.as_str());
            assert_eq!(format.as_str().parse(), Ok(format));
            assert_eq!(
                serde_json::to_value(format).unwrap(),
                serde_json::Value::from(format.as_str())
            );
        }
        let error = "gguf".parse::<Format>().unwrap_err();
        assert!(error.to_string().contains("\"gguf\""), "{error}");
    }
}
