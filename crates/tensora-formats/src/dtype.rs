use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::quote::Quoted;

/// Declares the dtypes once: variant, SafeTensors name, bits, torch name.
macro_rules! dtypes {
    ($($(#[$doc:meta])* $variant:ident, $name:literal, $bits:literal, $torch:expr;)*) => {
        /// The element type of a tensor.
        ///
        /// The order of the variants, and so of `Ord`, is the reference implementation's alignment
        /// order: SafeTensors writers sort tensors by it, descending. Serialised as
        /// [`Dtype::name`].
        // The derived deserialiser has the reference's shape on purpose: header parsing must accept
        // exactly what the reference accepts.
        #[derive(
            Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        #[non_exhaustive]
        pub enum Dtype {
            $($(#[$doc])* #[serde(rename = $name)] $variant,)*
        }

        impl Dtype {
            /// Every dtype, in alignment order.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The name as SafeTensors spells it, such as `BF16`.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// The size of one element in bits: 4, 6, or a multiple of 8.
            pub fn bits(self) -> u32 {
                match self { $(Self::$variant => $bits,)* }
            }

            /// The name as PyTorch prints it, such as `torch.bfloat16`; `None` for the packed
            /// 4- and 6-bit types, which torch has no element type for.
            pub fn torch_name(self) -> Option<&'static str> {
                match self { $(Self::$variant => $torch,)* }
            }
        }
    };
}

dtypes! {
    /// Boolean, one byte per element.
    Bool, "BOOL", 8, Some("torch.bool");
    /// 4-bit float of the OCP microscaling formats.
    F4, "F4", 4, None;
    /// 6-bit float, 2 exponent and 3 mantissa bits.
    F6E2M3, "F6_E2M3", 6, None;
    /// 6-bit float, 3 exponent and 2 mantissa bits.
    F6E3M2, "F6_E3M2", 6, None;
    /// Unsigned 8-bit integer.
    U8, "U8", 8, Some("torch.uint8");
    /// Signed 8-bit integer.
    I8, "I8", 8, Some("torch.int8");
    /// 8-bit float, 5 exponent and 2 mantissa bits.
    F8E5M2, "F8_E5M2", 8, Some("torch.float8_e5m2");
    /// 8-bit float, 4 exponent and 3 mantissa bits, no infinities.
    F8E4M3, "F8_E4M3", 8, Some("torch.float8_e4m3fn");
    /// 8-bit power of two, the scale of the OCP microscaling formats.
    F8E8M0, "F8_E8M0", 8, Some("torch.float8_e8m0fnu");
    /// 8-bit float, 4 exponent and 3 mantissa bits, no infinities and no negative zero.
    F8E4M3Fnuz, "F8_E4M3FNUZ", 8, Some("torch.float8_e4m3fnuz");
    /// 8-bit float, 5 exponent and 2 mantissa bits, no infinities and no negative zero.
    F8E5M2Fnuz, "F8_E5M2FNUZ", 8, Some("torch.float8_e5m2fnuz");
    /// Signed 16-bit integer.
    I16, "I16", 16, Some("torch.int16");
    /// Unsigned 16-bit integer.
    U16, "U16", 16, Some("torch.uint16");
    /// IEEE 754 half-precision float.
    F16, "F16", 16, Some("torch.float16");
    /// Brain float: 8 exponent and 7 mantissa bits.
    BF16, "BF16", 16, Some("torch.bfloat16");
    /// Signed 32-bit integer.
    I32, "I32", 32, Some("torch.int32");
    /// Unsigned 32-bit integer.
    U32, "U32", 32, Some("torch.uint32");
    /// IEEE 754 single-precision float.
    F32, "F32", 32, Some("torch.float32");
    /// Complex number of two 32-bit floats.
    C64, "C64", 64, Some("torch.complex64");
    /// IEEE 754 double-precision float.
    F64, "F64", 64, Some("torch.float64");
    /// Signed 64-bit integer.
    I64, "I64", 64, Some("torch.int64");
    /// Unsigned 64-bit integer.
    U64, "U64", 64, Some("torch.uint64");
}

/// A dtype name that no [`Dtype`] has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown dtype {}; the names are those of SafeTensors, such as BF16",
    Quoted(name)
)]
pub struct UnknownDtypeName {
    name: String,
}

impl Dtype {
    /// The dtype that PyTorch prints as `name`, such as `torch.bfloat16`.
    pub fn from_torch_name(name: &str) -> Option<Self> {
        // An absent torch name never equals `Some`.
        Self::ALL
            .iter()
            .copied()
            .find(|dtype| dtype.torch_name() == Some(name))
    }

    /// The size in bytes of `elements` elements stored without gaps; `None` if the bits overflow a
    /// `u64` or do not fill whole bytes.
    pub fn bytes_for(self, elements: u64) -> Option<u64> {
        let bits = elements.checked_mul(u64::from(self.bits()))?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Dtype {
    type Err = UnknownDtypeName;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .iter()
            .copied()
            .find(|dtype| dtype.name() == name)
            .ok_or_else(|| UnknownDtypeName {
                name: name.to_owned(),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_reference_on_names_sizes_and_order() {
        use safetensors::Dtype as Reference;
        let reference = [
            Reference::BOOL,
            Reference::F4,
            Reference::F6_E2M3,
            Reference::F6_E3M2,
            Reference::U8,
            Reference::I8,
            Reference::F8_E5M2,
            Reference::F8_E4M3,
            Reference::F8_E8M0,
            Reference::F8_E4M3FNUZ,
            Reference::F8_E5M2FNUZ,
            Reference::I16,
            Reference::U16,
            Reference::F16,
            Reference::BF16,
            Reference::I32,
            Reference::U32,
            Reference::F32,
            Reference::C64,
            Reference::F64,
            Reference::I64,
            Reference::U64,
        ];
        assert!(reference.is_sorted());
        assert_eq!(reference.len(), Dtype::ALL.len());
        for (theirs, &ours) in reference.iter().zip(Dtype::ALL) {
            assert_eq!(theirs.to_string(), ours.name());
            assert_eq!(theirs.bitsize(), ours.bits() as usize, "{ours}");
        }
        assert!(Dtype::ALL.is_sorted());
    }

    #[test]
    fn every_name_round_trips() {
        for &dtype in Dtype::ALL {
            assert_eq!(dtype.name().parse(), Ok(dtype));
            let json = serde_json::to_string(&dtype).unwrap();
            assert_eq!(json, format!("{:?}", dtype.name()));
            assert_eq!(serde_json::from_str::<Dtype>(&json).unwrap(), dtype);
            match dtype.torch_name() {
                Some(name) => assert_eq!(Dtype::from_torch_name(name), Some(dtype)),
                None => assert!(dtype.bits() < 8),
            }
        }
    }

    #[test]
    fn names_are_exact() {
        for wrong in ["bf16", "F33", "", "BF16 ", "torch.bfloat16"] {
            let error = wrong.parse::<Dtype>().unwrap_err();
            assert!(error.to_string().contains(&format!("{wrong:?}")));
        }
        for wrong in ["bfloat16", "torch.BFLOAT16", "torch.", "BF16"] {
            assert_eq!(Dtype::from_torch_name(wrong), None);
        }
    }

    #[test]
    fn sub_byte_elements_must_fill_whole_bytes() {
        assert_eq!(Dtype::F4.bytes_for(2), Some(1));
        assert_eq!(Dtype::F4.bytes_for(3), None);
        assert_eq!(Dtype::F6E2M3.bytes_for(4), Some(3));
        assert_eq!(Dtype::F6E2M3.bytes_for(2), None);
        assert_eq!(Dtype::U64.bytes_for(u64::MAX / 8), None);
        assert_eq!(Dtype::U64.bytes_for(u64::MAX / 64), Some(u64::MAX / 64 * 8));
    }
}
