//! The file beside a checkpoint that says what its tensors are.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read};
use std::path::Path;

use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};
use tensora_io::SourceFile;

use crate::{ContentDigests, Digest, Error, Result, TensorDigest};

/// The file in the directory of a checkpoint that holds the digests of its tensors.
///
/// It is a JSON object: `format` is `"tensora-checksums"`, `version` is 1, `content_digest` is the
/// [content digest](crate::ContentHasher), and `tensors` gives for each name `dtype` (as SafeTensors spells
/// it), `shape` (outermost dimension first) and `blake3` (of the elements in row-major order). Digests are 64
/// hexadecimal digits.
pub const SIDECAR_NAME: &str = "tensora.blake3";

const FORMAT: &str = "tensora-checksums";
const VERSION: u64 = 1;

/// Twice what the header of a SafeTensors file, which says as much of each tensor, may take.
const LIMIT_BYTES: u64 = 200_000_000;

/// The content of a sidecar: one line for each tensor, so that two of them can be compared by any tool.
pub(crate) fn sidecar(digests: &ContentDigests) -> Vec<u8> {
    let mut text = format!(
        "{{\"format\":\"{FORMAT}\",\"version\":{VERSION},\"content_digest\":\"{}\",\"tensors\":{{",
        digests.content()
    );
    for (number, (name, tensor)) in digests.tensors().iter().enumerate() {
        text.push_str(if number == 0 { "\n" } else { ",\n" });
        let TensorDigest {
            dtype,
            shape,
            digest,
        } = tensor;
        let shape: Vec<String> = shape.iter().map(u64::to_string).collect();
        text.push_str(&format!(
            "{}:{{\"dtype\":\"{dtype}\",\"shape\":[{}],\"blake3\":\"{digest}\"}}",
            serde_json::Value::from(name.as_str()),
            shape.join(",")
        ));
    }
    text.push_str("\n}}\n");
    text.into_bytes()
}

/// What the sidecar in `directory` says; `None` if there is none.
pub(crate) fn read(directory: &Path) -> Result<Option<ContentDigests>> {
    let path = directory.join(SIDECAR_NAME);
    let file = match SourceFile::open(&path) {
        Ok(file) => file,
        Err(tensora_io::Error::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Ok(None);
        }
        Err(error) => return Err(Error::reading(error)),
    };
    let invalid = |reason| Error::Sidecar {
        path: path.clone(),
        reason,
    };
    if file.len() > LIMIT_BYTES {
        let bytes = file.len();
        return Err(invalid(format!(
            "it has {bytes} bytes, more than the {LIMIT_BYTES} that one may have"
        )));
    }
    let mut text = Vec::new();
    // It may have grown since.
    let read = file.file().take(LIMIT_BYTES).read_to_end(&mut text);
    read.map_err(|source| {
        Error::reading(tensora_io::Error::File {
            operation: "read",
            path: path.clone(),
            source,
        })
    })?;
    parse(&text).map(Some).map_err(invalid)
}

/// What a sidecar says; or why it is none, or damaged.
fn parse(text: &[u8]) -> Result<ContentDigests, String> {
    let header: Header = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    if header.format != FORMAT {
        return Err(format!(
            "its format is {:?} and not {FORMAT:?}",
            header.format
        ));
    }
    if header.version != VERSION {
        return Err(format!(
            "its version is {}, and only {VERSION} is known here",
            header.version
        ));
    }
    let body: Body = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    let digests = ContentDigests::new(body.tensors.0).map_err(|error| error.to_string())?;
    // Digests of digests: a sidecar that was damaged or edited gives itself away.
    if digests.content() != body.content_digest.0 {
        return Err(format!(
            "its content_digest is {}, but its tensors add up to {}: it was damaged or edited",
            body.content_digest.0,
            digests.content()
        ));
    }
    Ok(digests)
}

/// What has to be known before anything else can be understood.
#[derive(serde::Deserialize)]
struct Header {
    format: String,
    version: u64,
}

#[derive(serde::Deserialize)]
struct Body {
    content_digest: Hex,
    tensors: Tensors,
}

#[derive(serde::Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    blake3: Hex,
}

struct Hex(Digest);

impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map(Self).map_err(de::Error::custom)
    }
}

struct Tensors(BTreeMap<String, TensorDigest>);

impl<'de> Deserialize<'de> for Tensors {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TensorsVisitor;

        impl<'de> Visitor<'de> for TensorsVisitor {
            type Value = Tensors;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with an entry for each tensor")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut tensors = BTreeMap::new();
                while let Some((name, entry)) = map.next_entry::<String, Entry>()? {
                    let tensor = TensorDigest {
                        dtype: entry.dtype.parse().map_err(de::Error::custom)?,
                        shape: entry.shape,
                        digest: entry.blake3.0,
                    };
                    // Of two entries, none can be trusted.
                    if tensors.contains_key(&name) {
                        return Err(de::Error::custom(format_args!(
                            "tensor {name:?} is there twice"
                        )));
                    }
                    tensors.insert(name, tensor);
                }
                Ok(Tensors(tensors))
            }
        }

        deserializer.deserialize_map(TensorsVisitor)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;
    use tensora_formats::Dtype;

    use super::*;

    fn digests(tensors: &[(&str, Dtype, &[u64])]) -> ContentDigests {
        let tensors = tensors
            .iter()
            .zip(1..)
            .map(|(&(name, dtype, shape), seed)| {
                let tensor = TensorDigest {
                    dtype,
                    shape: shape.to_vec(),
                    digest: Digest::from_bytes([seed; 32]),
                };
                (name.to_owned(), tensor)
            });
        ContentDigests::new(tensors.collect()).unwrap()
    }

    fn small() -> ContentDigests {
        digests(&[
            ("a\"\\\n\u{1f}é", Dtype::BF16, &[2, 3]),
            ("", Dtype::U8, &[]),
        ])
    }

    #[test]
    fn the_text_is_the_documented_one() {
        let only = digests(&[("a", Dtype::BF16, &[2, 3])]);
        let text = String::from_utf8(sidecar(&only)).unwrap();
        assert_eq!(
            text,
            format!(
                "{{\"format\":\"tensora-checksums\",\"version\":1,\"content_digest\":\"{}\",\"tensors\":{{\n\
                 \"a\":{{\"dtype\":\"BF16\",\"shape\":[2,3],\"blake3\":\"{}\"}}\n}}}}\n",
                only.content(),
                "01".repeat(32)
            )
        );
        for any in [only, small(), digests(&[])] {
            assert_eq!(parse(&sidecar(&any)), Ok(any));
        }
    }

    #[test]
    fn no_bit_can_flip_unseen() {
        let original = small();
        let text = sidecar(&original);
        for at in 0..text.len() * 8 {
            let mut damaged = text.clone();
            damaged[at / 8] ^= 1 << (at % 8);
            if let Ok(read) = parse(&damaged) {
                // A digit in the other case is the same digit.
                assert_eq!(read, original, "bit {at}");
                assert!(damaged.eq_ignore_ascii_case(&text), "bit {at}");
            }
        }
        for len in 0..text.len() - 1 {
            assert!(parse(&text[..len]).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        let text = String::from_utf8(sidecar(&small())).unwrap();
        let twice = {
            let line = text.lines().nth(1).unwrap();
            text.replacen('\n', &format!("\n{line}\n"), 1)
        };
        for (text, expected) in [
            ("{}".to_owned(), "missing field `format`"),
            (
                text.replace("tensora-checksums", "sums"),
                "its format is \"sums\"",
            ),
            (
                text.replace("\"version\":1", "\"version\":2"),
                "its version is 2",
            ),
            (text.replace("BF16", "BF17"), "BF17"),
            (text.replace("[2,3]", "[-2,3]"), "-2"),
            (
                text.replace("[2,3]", "[2,9223372036854775807]"),
                "overflows",
            ),
            (text.replace("[2,3]", "[3,2]"), "damaged or edited"),
            (
                text.replace("\"blake3\":\"01", "\"blake3\":\"1"),
                "64 hexadecimal",
            ),
            (
                text.replace("\"shape\"", "\"shapes\""),
                "missing field `shape`",
            ),
            (twice, "twice"),
            (
                text.replace("[]", "[],\"shape\":[]"),
                "duplicate field `shape`",
            ),
        ] {
            let reason = parse(text.as_bytes()).unwrap_err();
            assert!(reason.contains(expected), "{expected}: {reason}");
        }
    }

    #[test]
    fn a_file_that_is_none_is_an_error_and_no_file_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(SIDECAR_NAME);
        assert_eq!(read(directory.path()).unwrap(), None);
        fs::write(&path, sidecar(&small())).unwrap();
        assert_eq!(read(directory.path()).unwrap(), Some(small()));

        fs::write(&path, "{}").unwrap();
        let text = read(directory.path()).unwrap_err().to_string();
        let shown = path.display().to_string();
        for part in [shown.as_str(), "missing field", "--checksums"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        fs::File::create(&path)
            .and_then(|file| file.set_len(LIMIT_BYTES + 1))
            .unwrap();
        let text = read(directory.path()).unwrap_err().to_string();
        assert!(text.contains("200000001 bytes"), "{text}");

        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        let error = read(directory.path()).unwrap_err();
        assert!(error.to_string().contains("directory"), "{error}");
    }

    proptest! {
        #[test]
        fn round_trips(
            names in prop::collection::btree_set(any::<String>(), 0..8),
            shape in prop::collection::vec(0u64..100, 0..4),
            dtype in prop::sample::select(vec![Dtype::U8, Dtype::F8E4M3Fnuz, Dtype::C64]),
        ) {
            let tensors: Vec<_> = names
                .iter()
                .map(|name| (name.as_str(), dtype, shape.as_slice()))
                .collect();
            let digests = digests(&tensors);
            prop_assert_eq!(parse(&sidecar(&digests)), Ok(digests));
        }

        #[test]
        fn nothing_makes_it_panic(text in any::<Vec<u8>>()) {
            prop_assert!(parse(&text).is_err());
        }
    }
}
