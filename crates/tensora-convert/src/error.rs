use tensora_formats::Dtype;

/// A `Result` whose error is this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a checkpoint could not be digested or converted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    // --- Tensors that were handed in -------------------------------------------------------
    /// Two tensors have the same name.
    #[error("tensor {tensor:?} appears twice; names are unique within a checkpoint")]
    DuplicateTensor {
        /// The tensor.
        tensor: String,
    },
    /// A tensor's size cannot be computed.
    #[error(
        "tensor {tensor:?}: the size of {dtype} {shape:?} overflows 64 bits or fills no whole number of bytes"
    )]
    TensorSize {
        /// The tensor.
        tensor: String,
        /// Its element type.
        dtype: Dtype,
        /// Its dimensions, outermost first.
        shape: Vec<u64>,
    },
    /// The bytes handed in are not as many as the tensor has, or for a strided tensor too few.
    #[error(
        "tensor {tensor:?}: {dtype} {shape:?} needs {needed_bytes} bytes, but {stored_bytes} were given"
    )]
    StoredBytes {
        /// The tensor.
        tensor: String,
        /// Its element type.
        dtype: Dtype,
        /// Its dimensions, outermost first.
        shape: Vec<u64>,
        /// The bytes that dtype, shape and strides call for; saturating.
        needed_bytes: u64,
        /// The bytes that were given.
        stored_bytes: u64,
    },
    /// A tensor does not have one stride per dimension.
    #[error("tensor {tensor:?}: {dimensions} dimensions, but {strides} strides")]
    StrideCount {
        /// The tensor.
        tensor: String,
        /// The number of dimensions.
        dimensions: usize,
        /// The number of strides.
        strides: usize,
    },
    /// A tensor of packed elements is not contiguous.
    #[error(
        "tensor {tensor:?}: elements of {dtype} do not begin on bytes, so they can only be stored contiguously"
    )]
    PackedStrides {
        /// The tensor.
        tensor: String,
        /// Its element type, of fewer than 8 bits.
        dtype: Dtype,
    },

    // --- Resources -------------------------------------------------------------------------
    /// Memory could not be had.
    #[error("no memory for {bytes} bytes of {purpose}")]
    Memory {
        /// How many bytes were asked for.
        bytes: u64,
        /// What they were for.
        purpose: &'static str,
    },
    /// The caller's cancellation token was set.
    #[error("cancelled")]
    Cancelled,
}

impl Error {
    /// Whether the caller's own cancellation is the reason.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Cancelled)
    }
}
