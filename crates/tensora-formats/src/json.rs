//! JSON as written: entries with their raw text, so that a message can quote what stands in the file
//! and a repeated key is seen.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::{DuplicateNames, Error, Result};

/// A string that is a part of the text unless it has escapes.
#[derive(serde::Deserialize)]
pub(crate) struct Text<'a>(#[serde(borrow)] pub(crate) Cow<'a, str>);

/// Hands the entries of an object to a function, in the order of the text and repeated keys included, and
/// keeps none of them. After the function has failed, the rest is parsed and no longer handed over.
struct Entries<F>(F);

impl<'de, F> Visitor<'de> for Entries<F>
where
    F: FnMut(Cow<'de, str>, &'de RawValue) -> Result<()>,
{
    type Value = Result<()>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut outcome = Ok(());
        while let Some((Text(key), value)) = map.next_entry()? {
            if outcome.is_ok() {
                outcome = (self.0)(key, value);
            }
        }
        Ok(outcome)
    }
}

/// The first `N` elements of an array, and how many there are in all.
pub(crate) struct Array<'a, const N: usize> {
    pub(crate) first: Vec<&'a RawValue>,
    pub(crate) count: usize,
}

impl<'de: 'a, 'a, const N: usize> Deserialize<'de> for Array<'a, N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ArrayVisitor<'a, const N: usize>(PhantomData<&'a ()>);

        impl<'de: 'a, 'a, const N: usize> Visitor<'de> for ArrayVisitor<'a, N> {
            type Value = Array<'a, N>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let mut array = Array {
                    first: Vec::new(),
                    count: 0,
                };
                while let Some(element) = seq.next_element()? {
                    if array.count < N {
                        array.first.push(element);
                    }
                    array.count += 1;
                }
                Ok(array)
            }
        }

        deserializer.deserialize_seq(ArrayVisitor(PhantomData))
    }
}

/// What kind of value a raw text is, with its article.
pub(crate) fn kind(value: &RawValue) -> &'static str {
    match value.get().as_bytes().first() {
        Some(b'{') => "an object",
        Some(b'[') => "an array",
        Some(b'"') => "a string",
        Some(b't' | b'f') => "a boolean",
        Some(b'n') => "null",
        _ => "a number",
    }
}

/// Where a number stands, for the message if it is wrong.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) path: &'a Path,
    pub(crate) tensor: &'a str,
    pub(crate) field: &'static str,
}

impl Place<'_> {
    /// The error for a value of the wrong type.
    pub(crate) fn wrong_type(self, expected: &'static str, value: &RawValue) -> Error {
        Error::WrongType {
            path: self.path.to_owned(),
            tensor: self.tensor.to_owned(),
            field: self.field,
            expected,
            found: kind(value),
        }
    }

    /// The whole number from 0 to 2^64 - 1 that `value` is.
    pub(crate) fn number(self, value: &RawValue) -> Result<u64> {
        if kind(value) != "a number" {
            return Err(self.wrong_type("a number", value));
        }
        let text = value.get();
        if let Ok(number) = text.parse() {
            return Ok(number);
        }
        let path = self.path.to_owned();
        let tensor = self.tensor.to_owned();
        let field = self.field;
        let value = text.to_owned();
        Err(if text.contains(['.', 'e', 'E']) {
            Error::FractionalNumber {
                path,
                tensor,
                field,
                value,
            }
        } else if text.starts_with('-') {
            Error::NegativeNumber {
                path,
                tensor,
                field,
                value,
            }
        } else {
            Error::NumberTooLarge {
                path,
                tensor,
                field,
                value,
            }
        })
    }

    /// The array of such numbers that `value` is.
    pub(crate) fn numbers(self, value: &RawValue) -> Result<Vec<u64>> {
        struct Numbers<'a>(Place<'a>);

        impl<'de> Visitor<'de> for Numbers<'_> {
            type Value = Result<Vec<u64>>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array of numbers")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let mut numbers = Ok(Vec::new());
                while let Some(element) = seq.next_element::<&RawValue>()? {
                    if let Ok(values) = &mut numbers {
                        match self.0.number(element) {
                            Ok(number) => values.push(number),
                            // The rest must still be consumed; the first fault is the one told.
                            Err(error) => numbers = Err(error),
                        }
                    }
                }
                Ok(numbers)
            }
        }

        let parsed = serde_json::Deserializer::from_str(value.get()).deserialize_seq(Numbers(self));
        parsed.unwrap_or_else(|_| Err(self.wrong_type("an array of numbers", value)))
    }
}

/// Checks that the bytes of `what`, a header or an index, are UTF-8 text without a byte-order mark.
pub(crate) fn text<'a>(path: &Path, what: &'static str, bytes: &'a [u8]) -> Result<&'a str> {
    if bytes.is_empty() {
        return Err(Error::EmptyText {
            path: path.to_owned(),
            text: what,
        });
    }
    let text = std::str::from_utf8(bytes).map_err(|error| Error::NotUtf8 {
        path: path.to_owned(),
        offset: error.valid_up_to() as u64,
    })?;
    if text.starts_with('\u{feff}') {
        return Err(Error::ByteOrderMark {
            path: path.to_owned(),
        });
    }
    Ok(text)
}

/// Translates a parser's error about `fragment`, which is a part of `text`.
pub(crate) fn error(path: &Path, text: &str, fragment: &str, error: &serde_json::Error) -> Error {
    let padding = text.trim_end_matches('\0').len();
    if padding < text.len()
        && serde_json::from_str::<serde::de::IgnoredAny>(&text[..padding]).is_ok()
    {
        return Error::NulPadding {
            path: path.to_owned(),
            offset: padding as u64,
        };
    }
    let start = (fragment.as_ptr() as usize).saturating_sub(text.as_ptr() as usize);
    let before = text.get(..start).unwrap_or("");
    let lines_before = before.bytes().filter(|&byte| byte == b'\n').count();
    let columns_before = before.len() - before.rfind('\n').map_or(0, |newline| newline + 1);
    let message = error.to_string();
    let suffix = format!(" at line {} column {}", error.line(), error.column());
    Error::Json {
        path: path.to_owned(),
        line: lines_before + error.line(),
        column: error.column() + if error.line() > 1 { 0 } else { columns_before },
        reason: message.strip_suffix(&suffix).unwrap_or(&message).to_owned(),
    }
}

/// Hands each entry of the object that `fragment`, a part of `text`, is to `visit`, which may refuse it;
/// `what` names the object in messages. What is wrong with the text comes before what `visit` refuses.
pub(crate) fn object<'a>(
    path: &Path,
    text: &'a str,
    fragment: &'a str,
    what: &str,
    visit: impl FnMut(Cow<'a, str>, &'a RawValue) -> Result<()>,
) -> Result<()> {
    let mut deserializer = serde_json::Deserializer::from_str(fragment);
    let outcome = deserializer
        .deserialize_map(Entries(visit))
        .and_then(|outcome| deserializer.end().map(|()| outcome));
    outcome.unwrap_or_else(|parse_error| {
        Err(match serde_json::from_str::<&RawValue>(fragment) {
            Ok(value) if kind(value) != "an object" => Error::UnexpectedValue {
                path: path.to_owned(),
                key: what.to_owned(),
                expected: "an object",
                found: kind(value),
            },
            _ => error(path, text, fragment, &parse_error),
        })
    })
}

/// The string that `value`, a part of `text`, is, with its escapes resolved.
pub(crate) fn string<'a>(path: &Path, text: &str, value: &'a RawValue) -> Result<Cow<'a, str>> {
    match serde_json::from_str(value.get()) {
        Ok(Text(string)) => Ok(string),
        Err(parse_error) => Err(error(path, text, value.get(), &parse_error)),
    }
}

/// Sorts entries by tensor name and sees to it that no name is there twice.
pub(crate) fn sort_unique<T>(
    path: &Path,
    entries: &mut Vec<(Cow<'_, str>, T)>,
    duplicate_names: DuplicateNames,
) -> Result<()> {
    // Stable, so that of equal names the last in the text comes last.
    entries.sort_by(|(left, _), (right, _)| left.cmp(right));
    if duplicate_names == DuplicateNames::LastWins {
        entries.reverse();
        entries.dedup_by(|(next, _), (kept, _)| next == kept);
        entries.reverse();
        return Ok(());
    }
    let repeated = entries.windows(2).find_map(|pair| match pair {
        [(left, _), (right, _)] if left == right => Some(right),
        _ => None,
    });
    match repeated {
        None => Ok(()),
        Some(tensor) => Err(Error::DuplicateTensor {
            path: path.to_owned(),
            tensor: tensor.clone().into_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_in_a_fragment_is_placed_in_the_whole_text() {
        let text = "{\n \"a\": 1,\n \"b\": \"\\ud800\"\n}";
        let path = Path::new("f");
        let found = object(path, text, text, "it", |key, value| {
            if key == "b" {
                string(path, text, value)?;
            }
            Ok(())
        });
        let found = found.unwrap_err();
        let Error::Json { line, column, .. } = found else {
            panic!("{found}");
        };
        assert_eq!(line, 3);
        // The value starts at column 7; the parser stops where the pair's second half should be.
        assert!((7..=14).contains(&column), "{column}");
    }

    #[test]
    fn numbers_are_whole_and_fit() {
        let place = Place {
            path: Path::new("f"),
            tensor: "t",
            field: "shape",
        };
        let parse = |text: &str| {
            let value = RawValue::from_string(text.to_owned()).unwrap();
            place.numbers(&value)
        };
        assert_eq!(parse("[0, 18446744073709551615]").unwrap(), [0, u64::MAX]);
        assert_eq!(parse(" [ ] ").unwrap(), [0; 0]);
        for text in ["[1, -1]", "[-0]"] {
            assert!(matches!(parse(text), Err(Error::NegativeNumber { .. })));
        }
        for text in ["[1.0]", "[1e2]", "[-1.5]", "[1E400]"] {
            assert!(matches!(parse(text), Err(Error::FractionalNumber { .. })));
        }
        let text = "[18446744073709551616]";
        assert!(matches!(parse(text), Err(Error::NumberTooLarge { .. })));
        for text in ["[null]", "[\"1\"]", "[[1]]", "3", "{}"] {
            assert!(
                matches!(parse(text), Err(Error::WrongType { .. })),
                "{text}"
            );
        }
    }
}
