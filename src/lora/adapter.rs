//! All pairs of an adapter.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Device};

use super::config::{LoraConfig, Modules};
use super::files;
use super::pair::Lora;
use crate::error::{Error, Result};

/// An adapter: the low-rank pairs of a model's projections, in PEFT's format on disk
/// (`adapter_config.json` and `adapter_model.safetensors`).
///
/// Modules have the names of the base model, for example `model.layers.0.mlp.gate_proj`.
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_nn::{VarBuilder, VarMap};
/// use candle_swiglu::{Lora, LoraAdapter, LoraConfig};
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let config = LoraConfig::new(2, 4.0).with_target_modules(["gate_proj"]);
/// let module = "model.layers.0.mlp.gate_proj";
/// let lora = Lora::init(8, 24, &config, module, vb.pp(module))?;
///
/// let dir = std::env::temp_dir().join("candle-swiglu-adapter");
/// LoraAdapter::from_pairs(config, [(module.to_string(), lora)])?.save(&dir)?;
/// let adapter = LoraAdapter::open(&dir, DType::F32, &Device::Cpu)?;
/// assert!(adapter.get(module).is_some());
/// adapter.check_used()?;
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct LoraAdapter {
    config: LoraConfig,
    pairs: BTreeMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    lora: Lora,
    used: AtomicBool,
}

impl LoraAdapter {
    /// Reads an adapter's directory with A and B in `dtype` (f16, bf16, f32 or f64) on `device`.
    /// PEFT by default widens pairs in 16 bits to f32, as `DType::F32` does here.
    ///
    /// # Errors
    /// A file that is missing or broken (as [`crate::Checkpoint::open`]); a config that
    /// [`LoraConfig::from_json`] refuses; a tensor that is no A or B; an A without B; another shape
    /// than the config's rank says; a pair for a module that the config does not target.
    pub fn open(dir: impl AsRef<Path>, dtype: DType, device: &Device) -> Result<Self> {
        let (config, pairs) = files::read(dir.as_ref(), dtype, device)?;
        Self::from_pairs(config, pairs)
    }

    /// An adapter of these pairs, each with the name of its module. If the config has no
    /// `target_modules`, it gets these names.
    ///
    /// # Errors
    /// A module twice, or one that the config does not target; a pair with another rank, scale or
    /// dropout than the config says, because only the config is saved.
    pub fn from_pairs(
        mut config: LoraConfig,
        pairs: impl IntoIterator<Item = (String, Lora)>,
    ) -> Result<Self> {
        config.validate()?;
        let mut all = BTreeMap::new();
        for (module, lora) in pairs {
            check_pair(&config, &module, &lora)?;
            let entry = Entry { lora, used: AtomicBool::new(false) };
            if all.insert(module.clone(), entry).is_some() {
                return Err(Error::InvalidField {
                    field: module,
                    expected: "one low-rank pair",
                    found: "two".to_string(),
                });
            }
        }
        if config.target_modules.is_none() {
            config.target_modules = Some(Modules::Names(all.keys().cloned().collect()));
        }
        Ok(Self { config, pairs: all })
    }

    /// The config.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// The names of the modules that have a pair, sorted.
    pub fn modules(&self) -> impl Iterator<Item = &str> {
        self.pairs.keys().map(String::as_str)
    }

    /// The pair of a module, if it has one. It then counts as used.
    pub fn get(&self, module: &str) -> Option<&Lora> {
        let entry = self.pairs.get(module)?;
        entry.used.store(true, Ordering::Relaxed);
        Some(&entry.lora)
    }

    /// The modules whose pair nobody has asked for, sorted.
    pub fn unused(&self) -> Vec<String> {
        let unused = self.pairs.iter().filter(|(_, entry)| !entry.used.load(Ordering::Relaxed));
        unused.map(|(module, _)| module.clone()).collect()
    }

    /// # Errors
    /// Modules whose pair nobody has asked for: the model does not have them.
    pub fn check_used(&self) -> Result<()> {
        let modules = self.unused();
        if modules.is_empty() { Ok(()) } else { Err(Error::UnusedPairs { modules }) }
    }

    /// Writes `adapter_config.json` and `adapter_model.safetensors`, which PEFT reads, into a
    /// directory. It is created if it is not there; these two files in it are replaced.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<()> {
        let pairs = self.pairs.iter().map(|(module, entry)| (module.as_str(), &entry.lora));
        files::write(dir.as_ref(), &self.config, pairs)
    }
}

/// The pair is the one that the config describes.
fn check_pair(config: &LoraConfig, module: &str, lora: &Lora) -> Result<()> {
    if config.target_modules.is_some() && !config.targets(module)? {
        return Err(Error::UntargetedModule { module: module.to_string() });
    }
    let (r, found) = (config.rank(module)?, lora.a().dims().to_vec());
    if found[0] != r {
        let (name, expected) = (format!("{module}.lora_A.weight"), vec![r, found[1]]);
        return Err(Error::Shape { name, expected, found, location: None });
    }
    let same = [
        ("scale", lora.scale() == config.scaling(module)?, lora.scale()),
        ("dropout", lora.dropout() == config.lora_dropout as f32, f64::from(lora.dropout())),
    ];
    match same.into_iter().find(|(_, same, _)| !same) {
        None => Ok(()),
        Some((what, _, found)) => Err(Error::InvalidField {
            field: format!("{module}: {what}"),
            expected: "that of the config",
            found: found.to_string(),
        }),
    }
}
