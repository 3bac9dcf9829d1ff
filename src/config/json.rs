//! Fields of a `config.json`, each with an error that names it.

use serde_json::Value;

use crate::error::{Error, Result};

/// The value of the field, or `None` if it is absent or null.
pub(crate) fn field<'a>(json: &'a Value, name: &str) -> Option<&'a Value> {
    json.get(name).filter(|value| !value.is_null())
}

pub(crate) fn invalid(name: &str, expected: &'static str, found: &Value) -> Error {
    Error::InvalidField { field: name.to_string(), expected, found: found.to_string() }
}

pub(crate) fn unsupported(name: &str, value: &Value, reason: &'static str) -> Error {
    Error::Unsupported { field: name.to_string(), value: value.to_string(), reason }
}

/// The layer's entry of a list. Without a layer, the entry that all layers share.
pub(super) fn entry<'a>(name: &str, value: &'a Value, layer: Option<usize>) -> Result<&'a Value> {
    let Value::Array(list) = value else { return Ok(value) };
    match (layer, list.split_first()) {
        (Some(layer), _) => {
            list.get(layer).ok_or_else(|| invalid(name, "an entry for the layer", value))
        }
        (None, Some((first, rest))) if rest.iter().all(|other| other == first) => Ok(first),
        _ => Err(invalid(
            name,
            "one value for all layers (FfnConfig::from_json_layer reads a list)",
            value,
        )),
    }
}

fn positive(name: &str, value: &Value) -> Result<usize> {
    match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
        Some(n) if n > 0 => Ok(n),
        _ => Err(invalid(name, "a positive integer", value)),
    }
}

/// The first field that exists, as a positive integer. In a list the layer's entry counts.
pub(super) fn size_at(json: &Value, names: &[&str], layer: Option<usize>) -> Result<Option<usize>> {
    let found = names.iter().find_map(|name| Some((*name, field(json, name)?)));
    found.map(|(name, value)| positive(name, entry(name, value, layer)?)).transpose()
}

/// The first field that exists, as a positive integer.
pub(crate) fn size(json: &Value, names: &[&str]) -> Result<Option<usize>> {
    let found = names.iter().find_map(|name| Some((*name, field(json, name)?)));
    found.map(|(name, value)| positive(name, value)).transpose()
}

pub(super) fn required(json: &Value, names: &[&str], field: &'static str) -> Result<usize> {
    size(json, names)?.ok_or(Error::MissingField { field })
}

pub(crate) fn flag(json: &Value, name: &str) -> Result<Option<bool>> {
    field(json, name)
        .map(|value| value.as_bool().ok_or_else(|| invalid(name, "true or false", value)))
        .transpose()
}

pub(crate) fn text<'a>(json: &'a Value, name: &str) -> Result<Option<&'a str>> {
    field(json, name)
        .map(|value| value.as_str().ok_or_else(|| invalid(name, "a string", value)))
        .transpose()
}

pub(super) fn number(name: &str, value: &Value) -> Result<f32> {
    let found = value.as_f64().map(|x| x as f32).filter(|x| x.is_finite());
    found.ok_or_else(|| invalid(name, "a number", value))
}

/// A number above 0, or `default` where the field is absent.
pub(super) fn positive_number(json: &Value, name: &str, default: f32) -> Result<f32> {
    match field(json, name) {
        None => Ok(default),
        Some(value) => match number(name, value)? {
            x if x > 0.0 => Ok(x),
            _ => Err(invalid(name, "a number above 0", value)),
        },
    }
}
