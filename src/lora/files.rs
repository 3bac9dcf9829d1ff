//! The directory of an adapter.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device};

use super::config::LoraConfig;
use super::pair::Lora;
use crate::error::{Error, Result};
use crate::load::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint};

/// What PEFT puts before the name of a module.
const PREFIX: &str = "base_model.model.";
const SIDES: [&str; 2] = ["lora_A", "lora_B"];

/// The config, and the pair of every module.
pub(super) fn read(
    dir: &Path,
    dtype: DType,
    device: &Device,
) -> Result<(LoraConfig, Vec<(String, Lora)>)> {
    let file = Checkpoint::open_adapter(dir)?;
    let config = LoraConfig::from_json(file.config())?;
    let mut pairs = vec![];
    for (module, names) in modules(&file)? {
        let lora = read_pair(&file, &config, &module, &names, dtype, device)?;
        pairs.push((module, lora));
    }
    if pairs.is_empty() {
        return Err(missing(&file, PREFIX.trim_end_matches('.'), "*.lora_A.weight"));
    }
    Ok((config, pairs))
}

/// The names of A and B of every module.
fn modules(file: &Checkpoint) -> Result<BTreeMap<String, [String; 2]>> {
    let mut found: BTreeMap<&str, [Option<&str>; 2]> = BTreeMap::new();
    let path = file.dir().join(ADAPTER_WEIGHTS);
    for name in file.names() {
        let Some((module, side)) = parse(name) else {
            return Err(Error::NoPair { name: name.to_string(), location: Some(path) });
        };
        let before = found.entry(module).or_default()[side].replace(name);
        if before.is_some() {
            let tensor = format!("{PREFIX}{module}.{}", SIDES[side]);
            return Err(Error::DuplicateTensor { tensor, first: path.clone(), second: path });
        }
    }
    let complete = |(module, names): (&str, [Option<&str>; 2])| match names {
        [Some(a), Some(b)] => Ok((module.to_string(), [a.to_string(), b.to_string()])),
        [a, _] => {
            let side = SIDES[usize::from(a.is_some())];
            Err(missing(file, &format!("{PREFIX}{module}"), &format!("{side}.weight")))
        }
    };
    found.into_iter().map(complete).collect()
}

fn missing(file: &Checkpoint, prefix: &str, name: &str) -> Error {
    let under = |full: &str| Some(full.strip_prefix(prefix)?.strip_prefix('.')?.to_string());
    Error::MissingTensor {
        prefix: prefix.to_string(),
        tried: vec![name.to_string()],
        present: file.names().filter_map(under).collect(),
        suggestions: Box::default(),
        location: Some(file.dir().join(ADAPTER_WEIGHTS)),
    }
}

/// The module of `base_model.model.<module>.lora_A.weight`, and 0 for A or 1 for B. The name of the
/// adapter may stand before `weight`.
fn parse(name: &str) -> Option<(&str, usize)> {
    let name = name.strip_prefix(PREFIX)?.strip_suffix(".weight")?;
    let split = |name: &'_ str| {
        let (module, last) = name.rsplit_once('.').filter(|(module, _)| !module.is_empty())?;
        Some((module.len(), SIDES.iter().position(|side| *side == last)))
    };
    let (len, side) = match split(name)? {
        (len, Some(side)) => (len, side),
        (len, None) => {
            let (len, side) = split(&name[..len])?;
            (len, side?)
        }
    };
    Some((&name[..len], side))
}

fn read_pair(
    file: &Checkpoint,
    config: &LoraConfig,
    module: &str,
    [a, b]: &[String; 2],
    dtype: DType,
    device: &Device,
) -> Result<Lora> {
    let r = config.rank(module)?;
    let shape = |name: &String| file.shape(name).unwrap_or_default().to_vec();
    let (a_shape, b_shape) = (shape(a), shape(b));
    let in_dim = a_shape.last().copied().unwrap_or_default();
    let out_dim = b_shape.first().copied().unwrap_or_default();
    for (name, found, expected) in [(a, a_shape, [r, in_dim]), (b, b_shape, [out_dim, r])] {
        if found != expected {
            let location = Some(file.dir().join(ADAPTER_WEIGHTS));
            let (name, expected) = (name.clone(), expected.to_vec());
            return Err(Error::Shape { name, expected, found, location });
        }
    }
    let (a, b) = (file.tensor(a, dtype, device)?, file.tensor(b, dtype, device)?);
    Lora::new(a, b, config.scaling(module)?, config.lora_dropout as f32)
}

pub(super) fn write<'a>(
    dir: &Path,
    config: &LoraConfig,
    pairs: impl Iterator<Item = (&'a str, &'a Lora)>,
) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
    let path = dir.join(ADAPTER_WEIGHTS);
    let mut tensors = vec![];
    for (module, lora) in pairs {
        for (side, tensor) in SIDES.into_iter().zip([lora.a(), lora.b()]) {
            let tensor = tensor.to_device(&Device::Cpu)?.contiguous()?;
            tensors.push((format!("{PREFIX}{module}.{side}.weight"), tensor));
        }
    }
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]); // PEFT requires it
    let bytes = safetensors::serialize(tensors, Some(metadata))
        .map_err(|error| Error::Header { path: path.clone(), reason: error.to_string() })?;
    std::fs::write(&path, bytes).map_err(Error::io(&path))?;
    let path = dir.join(ADAPTER_CONFIG);
    let text = format!("{:#}", config.to_json());
    std::fs::write(&path, text).map_err(Error::io(&path))
}
