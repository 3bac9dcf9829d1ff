//! Fields of a `config.json`, read with errors that name them.

use candle_swiglu::{Error, Result};
use serde_json::{Map, Value};

/// A JSON object; null counts as absent, as it does in transformers.
pub struct Fields<'a> {
    pub map: &'a Map<String, Value>,
    pub section: &'static str,
}

impl<'a> Fields<'a> {
    /// The fields of `json`, which must be an object.
    pub fn of(json: &'a Value) -> Result<Self> {
        let map = json.as_object().ok_or_else(|| invalid("(whole file)", "a JSON object", json))?;
        Ok(Self { map, section: "" })
    }

    pub fn name(&self, field: &str) -> String {
        if self.section.is_empty() {
            field.to_string()
        } else {
            format!("{}.{field}", self.section)
        }
    }

    pub fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    /// Whether the field is present, null included.
    pub fn has(&self, field: &str) -> bool {
        self.map.contains_key(field)
    }

    /// Reads the field with `read`. The error says what was expected.
    pub fn read<T>(
        &self,
        field: &str,
        expected: &'static str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let found = self.get(field);
        found
            .map(|value| read(value).ok_or_else(|| invalid(&self.name(field), expected, value)))
            .transpose()
    }

    pub fn size_opt(&self, field: &str) -> Result<Option<usize>> {
        self.read(field, "an integer of at least 1", positive_size)
    }

    pub fn size(&self, field: &'static str) -> Result<usize> {
        self.size_opt(field)?.ok_or(Error::MissingField { field })
    }

    /// An integer that may be 0.
    pub fn count(&self, field: &str) -> Result<Option<usize>> {
        self.read(field, "an integer of at least 0", |value| usize::try_from(value.as_u64()?).ok())
    }

    pub fn number(&self, field: &str) -> Result<Option<f64>> {
        self.read(field, "a number", |value| value.as_f64().filter(|number| number.is_finite()))
    }

    pub fn positive_opt(&self, field: &str) -> Result<Option<f64>> {
        self.read(field, "a positive number", |value| {
            value.as_f64().filter(|number| *number > 0.0 && number.is_finite())
        })
    }

    pub fn positive(&self, field: &'static str) -> Result<f64> {
        match self.positive_opt(field)? {
            Some(number) => Ok(number),
            None if self.section.is_empty() => Err(Error::MissingField { field }),
            None => Err(invalid(&self.name(field), "a positive number", &Value::Null)),
        }
    }

    /// False if absent, which is the default of most such fields in transformers.
    pub fn flag(&self, field: &str) -> Result<bool> {
        Ok(self.read(field, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    pub fn string(&self, field: &str) -> Result<Option<&'a str>> {
        self.read(field, "a string", Value::as_str)
    }

    /// Positive numbers.
    pub fn factors(&self, field: &str) -> Result<Option<Vec<f64>>> {
        let factor =
            |value: &Value| value.as_f64().filter(|factor| *factor > 0.0 && factor.is_finite());
        self.read(field, "a list of positive numbers", |value| {
            value.as_array()?.iter().map(factor).collect()
        })
    }

    /// One id, a list of ids, or none. Negative ids, which mean "none" in some configs, are
    /// omitted.
    pub fn token_ids(&self, field: &str) -> Result<Vec<u32>> {
        let id = |value: &Value| match value.as_i64()? {
            ..0 => Some(None),
            id => u32::try_from(id).ok().map(Some),
        };
        let ids = |value: &Value| match value {
            Value::Array(list) => list.iter().map(id).collect::<Option<Vec<_>>>(),
            one => id(one).map(|id| vec![id]),
        };
        let ids = self.read(field, "a token id, a list of them, or null", ids)?;
        Ok(ids.unwrap_or_default().into_iter().flatten().collect())
    }
}

fn positive_size(value: &Value) -> Option<usize> {
    usize::try_from(value.as_u64()?).ok().filter(|&size| size > 0)
}

pub fn invalid(field: &str, expected: &'static str, found: &Value) -> Error {
    Error::InvalidField { field: field.to_string(), expected, found: found.to_string() }
}

pub fn unsupported(field: &str, value: impl ToString, reason: &'static str) -> Error {
    Error::Unsupported { field: field.to_string(), value: value.to_string(), reason }
}
