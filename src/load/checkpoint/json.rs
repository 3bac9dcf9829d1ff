//! JSON files: `config.json`, `params.json`, `generation_config.json` and the index of the shards.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use serde_json::Value;

use super::header::{check_file, lfs_size};
use crate::error::{Error, Result};

/// The shard of every tensor, checked to be plain file names.
pub(crate) fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    let json = read_json(path)?;
    let broken = |reason: String| Error::Index { path: path.to_path_buf(), reason };
    let map = json.get("weight_map").and_then(Value::as_object).filter(|map| !map.is_empty());
    let map = map.ok_or_else(|| {
        broken("expected an object weight_map with tensors in it, found none".into())
    })?;
    let shard_of = |(tensor, shard): (&String, &Value)| match shard
        .as_str()
        .filter(|name| is_file_name(name))
    {
        Some(name) => Ok((tensor.clone(), name.to_string())),
        None => Err(broken(format!("weight_map.{tensor}: expected a file name, found {shard}"))),
    };
    map.iter().map(shard_of).collect()
}

/// One plain component: an index cannot point outside its directory.
fn is_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
}

/// A JSON file of a checkpoint (`config.json`, `generation_config.json`, ...).
///
/// Python writes the numbers `NaN`, `Infinity` and `-Infinity`, which JSON does not have. They are
/// read as strings of these names, so that a reader of another field is not affected.
///
/// # Errors
/// A file that cannot be read or is not valid JSON; a directory, a pipe, a device or a Git LFS
/// pointer in its place.
pub fn read_json(path: impl AsRef<Path>) -> Result<Value> {
    let path = path.as_ref();
    check_file(path)?;
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    if let Some(size) = lfs_size(&bytes) {
        return Err(Error::LfsPointer { path: path.to_path_buf(), size });
    }
    parse(&bytes).map_err(|source| Error::Json { path: path.to_path_buf(), source })
}

/// The bytes as JSON or, where that fails, as the JSON that Python writes.
fn parse(bytes: &[u8]) -> serde_json::Result<Value> {
    serde_json::from_slice(bytes).or_else(|error| match quote_numbers(bytes) {
        Some(quoted) => serde_json::from_slice(&quoted).map_err(|_| error),
        None => Err(error),
    })
}

/// Puts quotes around every `NaN`, `Infinity` and `-Infinity` outside strings; `None` if there is
/// none.
fn quote_numbers(bytes: &[u8]) -> Option<Vec<u8>> {
    const NUMBERS: [&[u8]; 3] = [b"NaN", b"-Infinity", b"Infinity"];
    let mut quoted = Vec::with_capacity(bytes.len() + 16);
    let (mut in_string, mut found) = (false, false);
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let number = NUMBERS.iter().find(|number| !in_string && bytes[at..].starts_with(number));
        let n = match number {
            Some(number) => number.len(),
            None if in_string && byte == b'\\' => 2.min(bytes.len() - at),
            None => 1,
        };
        in_string ^= byte == b'"';
        found |= number.is_some();
        let quote = number.map(|_| b'"');
        quoted.extend(quote.into_iter().chain(bytes[at..at + n].iter().copied()).chain(quote));
        at += n;
    }
    found.then_some(quoted)
}
