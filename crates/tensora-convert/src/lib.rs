//! Convert LLM checkpoints between SafeTensors and ServerlessLLM in bounded memory, and give their
//! content a name: a digest that does not depend on format, sharding or backend.
//!
//! [`ConvertOptions::plan`] decides where every byte goes and checks that it can go there;
//! [`ConversionPlan::run`] moves it. [`content_digest`] answers whether two checkpoints hold the same
//! tensors.
#![cfg_attr(doctest, doc = include_str!("../README.md"))]
#![forbid(unsafe_code)]

mod copy;
mod digest;
mod error;
mod hash;
mod note;
mod options;
mod plan;
mod report;
mod row_major;
mod target;

pub use digest::{Digest, ParseDigestError};
pub use error::{Error, Result};
pub use hash::{ContentHasher, DataHasher, content_digest, data_digest};
pub use note::ConversionNote;
pub use options::{ConvertOptions, Overwrite};
pub use plan::ConversionPlan;
pub use report::ConversionReport;
pub use row_major::{StoredTensor, gather_row_major};
