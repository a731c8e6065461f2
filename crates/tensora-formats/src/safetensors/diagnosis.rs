//! Why a header's JSON was refused: a second, slower pass over a text that the strict parser would not
//! take, which finds the tensor and the rule.

use std::path::Path;

use serde_json::value::RawValue;

use super::METADATA_KEY;
use super::header::RawTensor;
use crate::json::{self, Array, Place};
use crate::{Dtype, Error, Result};

const FIELDS: [&str; 3] = ["dtype", "shape", "data_offsets"];

/// The reason why `text` is no header, as specific as possible; `refusal` is the strict parser's.
pub(super) fn diagnose(path: &Path, text: &str, refusal: &serde_json::Error) -> Error {
    match examine(path, text) {
        Err(reason) => reason,
        // Nothing that this pass knows; the strict parser is right all the same.
        Ok(()) => json::error(path, text, text, refusal),
    }
}

fn examine(path: &Path, text: &str) -> Result<()> {
    let mut metadata_seen = false;
    json::object(path, text, text, "the header", |name, value| {
        if name != METADATA_KEY {
            return examine_tensor(path, text, &name, value);
        }
        if metadata_seen {
            return Err(Error::DuplicateKey {
                path: path.to_owned(),
                key: name.into_owned(),
            });
        }
        metadata_seen = true;
        examine_metadata(path, text, value)
    })
}

fn examine_metadata(path: &Path, text: &str, metadata: &RawValue) -> Result<()> {
    if json::kind(metadata) == "null" {
        return Ok(());
    }
    json::object(path, text, metadata.get(), METADATA_KEY, |key, value| {
        if json::kind(value) == "a string" {
            return Ok(());
        }
        Err(Error::UnexpectedValue {
            path: path.to_owned(),
            key: format!("{METADATA_KEY}.{}", key.escape_debug()),
            expected: "a string",
            found: json::kind(value),
        })
    })
}

fn examine_tensor(path: &Path, text: &str, tensor: &str, value: &RawValue) -> Result<()> {
    if serde_json::from_str::<RawTensor>(value.get()).is_ok() {
        return Ok(());
    }
    let entry = Place {
        path,
        tensor,
        field: "its entry",
    };
    if json::kind(value) != "an object" {
        // An array of the three values would have been accepted; whatever is wrong with this one,
        // it should not be an array.
        return Err(entry.wrong_type("an object", value));
    }
    let mut values = [None; FIELDS.len()];
    json::object(path, text, value.get(), tensor, |name, value| {
        if let Some(position) = FIELDS.iter().position(|field| *field == name)
            && values[position].replace(value).is_some()
        {
            return Err(Error::DuplicateField {
                path: path.to_owned(),
                tensor: tensor.to_owned(),
                field: FIELDS[position],
            });
        }
        Ok(())
    })?;
    for (field, value) in FIELDS.into_iter().zip(values) {
        let Some(value) = value else {
            return Err(Error::MissingField {
                path: path.to_owned(),
                tensor: tensor.to_owned(),
                field,
            });
        };
        let place = Place { field, ..entry };
        match field {
            "dtype" => examine_dtype(place, value)?,
            "shape" => drop(place.numbers(value)?),
            _ => examine_offsets(place, value)?,
        }
    }
    Ok(())
}

fn examine_dtype(place: Place<'_>, value: &RawValue) -> Result<()> {
    if serde_json::from_str::<Dtype>(value.get()).is_ok() {
        return Ok(());
    }
    let Ok(dtype) = serde_json::from_str::<String>(value.get()) else {
        return Err(place.wrong_type("a dtype's name", value));
    };
    Err(Error::UnknownDtype {
        path: place.path.to_owned(),
        tensor: place.tensor.to_owned(),
        dtype,
    })
}

fn examine_offsets(place: Place<'_>, value: &RawValue) -> Result<()> {
    let Ok(array) = serde_json::from_str::<Array<'_, 2>>(value.get()) else {
        return Err(place.wrong_type("an array of two numbers", value));
    };
    if array.count != 2 {
        return Err(Error::OffsetCount {
            path: place.path.to_owned(),
            tensor: place.tensor.to_owned(),
            count: array.count,
        });
    }
    for offset in array.first {
        place.number(offset)?;
    }
    Ok(())
}
