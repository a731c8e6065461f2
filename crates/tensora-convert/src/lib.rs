//! Convert LLM checkpoints between SafeTensors and ServerlessLLM in bounded memory, and give their
//! content a name: a digest that does not depend on format, sharding or backend.
//!
//! [`ConvertOptions::plan`] decides where every byte goes and checks that it can go there;
//! [`ConversionPlan::run`] moves it. [`content_digest`] answers whether two checkpoints hold the same
//! tensors.
#![cfg_attr(doctest, doc = include_str!("../README.md"))]
#![forbid(unsafe_code)]

mod assemble;
mod buffers;
mod companions;
mod digest;
mod error;
mod hash;
mod identity;
mod journal;
mod note;
mod options;
mod outputs;
mod plan;
mod reading;
mod report;
mod row_major;
mod run;
mod sidecar;
mod staging;
mod target;
mod verify;

pub use digest::{Digest, ParseDigestError};
pub use error::{Error, Result};
pub use hash::{ContentHasher, DataHasher, content_digest, data_digest};
pub use note::ConversionNote;
pub use options::{
    Checksums, Companions, ConvertOptions, Overwrite, SharedTensors, Unfinished, Verify,
};
pub use plan::{ConversionPlan, OutputKind, PlannedOutput};
pub use reading::Reading;
pub use report::{ConversionReport, Kept};
pub use row_major::{StoredTensor, gather_row_major};
pub use sidecar::SIDECAR_NAME;
pub use verify::{
    Check, CheckOutcome, CheckSubject, CheckedBy, Comparison, ContentDigests, Difference,
    FirstDifference, TensorDigest, Verification, VerifyOptions,
};
