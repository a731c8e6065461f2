use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use tensora_formats::Format;

/// Something about a conversion that is worth telling a user and is no error.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConversionNote {
    /// The target format has no place for the source's `__metadata__`.
    MetadataDropped {
        /// The target format.
        target: Format,
        /// What the target will lack.
        metadata: BTreeMap<String, String>,
    },
    /// A source file could not be read with direct I/O and went through the page cache.
    ReadBuffered {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

impl fmt::Display for ConversionNote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MetadataDropped { target, metadata } => {
                write!(f, "__metadata__ dropped, {target} has no place for it:")?;
                for (number, (key, value)) in metadata.iter().enumerate() {
                    let separator = if number == 0 { "" } else { "," };
                    write!(f, "{separator} {key:?}: {value:?}")?;
                }
                Ok(())
            }
            Self::ReadBuffered { path, reason } => {
                write!(f, "{} was read buffered: {reason}", path.display())
            }
        }
    }
}
