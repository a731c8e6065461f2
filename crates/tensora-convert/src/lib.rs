//! Convert LLM checkpoints between SafeTensors and ServerlessLLM in bounded memory, and give their
//! content a name: a digest that does not depend on format, sharding or backend.
//!
//! [`content_digest`] answers whether two checkpoints hold the same tensors.

#![forbid(unsafe_code)]

mod digest;
mod error;
mod hash;
mod row_major;

pub use digest::{Digest, ParseDigestError};
pub use error::{Error, Result};
pub use hash::{ContentHasher, content_digest, data_digest};
pub use row_major::{StoredTensor, gather_row_major};
