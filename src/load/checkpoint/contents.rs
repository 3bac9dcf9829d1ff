//! The files of a checkpoint directory and the tensors in them.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use safetensors::Dtype;
use serde_json::Value;

use super::header::{check_file, read_exact_at, read_header};
use super::json::{read_index, read_json};
use crate::error::{Error, Result};
use crate::load::missing::nearest;
use crate::load::unread::{Listed, Listing};

pub(crate) const SINGLE: &str = "model.safetensors";
pub(crate) const ADAPTER_CONFIG: &str = "adapter_config.json";
pub(crate) const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// `consolidated*.safetensors`, Meta's name.
pub(crate) fn is_consolidated(name: &str) -> bool {
    name.starts_with("consolidated") && name.ends_with(".safetensors")
}

/// What an open checkpoint and its clones share.
pub(super) struct Contents {
    pub(super) dir: PathBuf,
    pub(super) config: Value,
    pub(super) files: Vec<(PathBuf, File)>,
    pub(super) tensors: BTreeMap<String, Entry>,
}

/// The place of a tensor's data.
pub(super) struct Entry {
    pub(super) file: usize,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) start: u64,
    pub(super) bytes: u64,
    /// Its data has been read.
    read: AtomicBool,
    /// It counts as not there.
    hidden: AtomicBool,
}

impl Entry {
    pub(super) fn mark_read(&self) {
        self.read.store(true, Ordering::Relaxed);
    }

    pub(super) fn hide(&self) {
        self.hidden.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_hidden(&self) -> bool {
        self.hidden.load(Ordering::Relaxed)
    }

    /// Nobody has read the data, and it is no constant that a model computes itself.
    pub(super) fn is_unread(&self, name: &str) -> bool {
        !self.read.load(Ordering::Relaxed) && !self.is_constant(name)
    }

    fn is_constant(&self, name: &str) -> bool {
        let ends = |endings: &[&str]| endings.iter().any(|ending| name.ends_with(ending));
        let is_mask = matches!(self.shape[..], [1, 1, m, n] if m == n);
        ends(&["rotary_emb.inv_freq", "position_ids", "masked_bias"])
            || (is_mask && ends(&[".attn.bias", ".attention.bias"]))
    }
}

impl Contents {
    /// Reads the config and every header.
    pub(super) fn open(dir: &Path) -> Result<Self> {
        check_directory(dir)?;
        let mut config = None;
        for name in ["config.json", "params.json"] {
            let path = dir.join(name);
            if config.is_none() && is_there(&path)? {
                config = Some(path);
            }
        }
        let missing = || Error::NoConfig { dir: dir.to_path_buf(), found: other_formats(dir) };
        let config = read_json(config.ok_or_else(missing)?)?;
        let mut contents = Self::empty(dir, config);
        contents.add_weights()?;
        Ok(contents)
    }

    /// Reads the config and the header of an adapter in PEFT's format.
    pub(super) fn open_adapter(dir: &Path) -> Result<Self> {
        check_directory(dir)?;
        for missing in [ADAPTER_CONFIG, ADAPTER_WEIGHTS] {
            if !is_there(&dir.join(missing))? {
                let found = other_formats(dir);
                return Err(Error::NoAdapter { dir: dir.to_path_buf(), missing, found });
            }
        }
        let mut contents = Self::empty(dir, read_json(dir.join(ADAPTER_CONFIG))?);
        contents.add_file(dir.join(ADAPTER_WEIGHTS), |_| true)?;
        Ok(contents)
    }

    fn empty(dir: &Path, config: Value) -> Self {
        Self { dir: dir.to_path_buf(), config, files: vec![], tensors: BTreeMap::new() }
    }

    /// The bytes of a tensor from `at` on.
    pub(super) fn read(&self, entry: &Entry, at: u64, buffer: &mut [u8]) -> Result<()> {
        let (path, file) = &self.files[entry.file];
        read_exact_at(file, buffer, entry.start + at).map_err(Error::io(path))
    }

    /// Adds the weights' files: a single one wins over an index, as in transformers.
    fn add_weights(&mut self) -> Result<()> {
        let single = self.dir.join(SINGLE);
        let index = self.dir.join(INDEX);
        if is_there(&single)? {
            return self.add_file(single, |_| true);
        }
        if is_there(&index)? {
            return self.add_indexed(&index);
        }
        let consolidated = self.consolidated()?;
        if consolidated.is_empty() {
            return Err(Error::NoWeights {
                dir: self.dir.clone(),
                found: other_formats(&self.dir),
            });
        }
        consolidated.into_iter().try_for_each(|path| self.add_file(path, |_| true))
    }

    fn consolidated(&self) -> Result<Vec<PathBuf>> {
        let mut paths = vec![];
        for entry in std::fs::read_dir(&self.dir).map_err(Error::io(&self.dir))? {
            let path = entry.map_err(Error::io(&self.dir))?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if is_consolidated(name) {
                paths.push(path);
            }
        }
        paths.sort();
        Ok(paths)
    }

    fn add_indexed(&mut self, index: &Path) -> Result<()> {
        let homes = read_index(index)?;
        let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (tensor, shard) in &homes {
            shards.entry(shard).or_default().push(tensor);
        }
        for (shard, tensors) in shards {
            let path = self.dir.join(shard);
            if !is_there(&path)? {
                let (shard, tensor) = (shard.to_string(), tensors[0].to_string());
                return Err(Error::MissingShard { index: index.to_path_buf(), shard, tensor });
            }
            // A tensor that the index places in another shard is not taken from this one.
            self.add_file(path, |name| homes.get(name).is_none_or(|home| home == shard))?;
            if let Some(tensor) = tensors.iter().find(|tensor| !self.tensors.contains_key(**tensor))
            {
                let (shard, tensor) = (shard.to_string(), tensor.to_string());
                return Err(Error::NotInShard { index: index.to_path_buf(), shard, tensor });
            }
        }
        Ok(())
    }

    /// Reads and checks one file's header and adds the tensors that `take` accepts.
    fn add_file(&mut self, path: PathBuf, take: impl Fn(&str) -> bool) -> Result<()> {
        check_file(&path)?;
        let file = File::open(&path).map_err(Error::io(&path))?;
        let (data_start, metadata) = read_header(&path, &file)?;
        for (name, info) in metadata.tensors() {
            if !take(&name) {
                continue;
            }
            if let Some(other) = self.tensors.get(&name) {
                let first = self.files[other.file].0.clone();
                return Err(Error::DuplicateTensor { tensor: name, first, second: path });
            }
            // An empty tensor may claim any shape; its strides are computed all the same.
            if info
                .shape
                .iter()
                .filter(|&&dim| dim > 0)
                .try_fold(1usize, |n, &dim| n.checked_mul(dim))
                .is_none()
            {
                let reason = format!("{name}: shape {:?} has strides that overflow", info.shape);
                return Err(Error::Header { path, reason });
            }
            let (start, end) = info.data_offsets;
            let entry = Entry {
                file: self.files.len(),
                dtype: info.dtype,
                shape: info.shape.clone(),
                start: data_start + start as u64,
                bytes: (end - start) as u64,
                read: AtomicBool::new(false),
                hidden: AtomicBool::new(false),
            };
            self.tensors.insert(name, entry);
        }
        self.files.push((path, file));
        Ok(())
    }

    pub(super) fn entry(&self, name: &str) -> Result<&Entry> {
        self.tensors.get(name).filter(|entry| !entry.is_hidden()).ok_or_else(|| {
            // "mlp.gate_proj.weight": gate_proj.weight is missing under mlp.
            let module = name.rsplit_once('.').map_or("", |(module, _)| module);
            let prefix = module.rsplit_once('.').map_or("", |(prefix, _)| prefix);
            let tried = vec![name[prefix.len()..].trim_start_matches('.').to_string()];
            let suggestions =
                nearest(prefix, &tried, self.tensors.keys().map(String::as_str)).into();
            let (prefix, location) = (prefix.to_string(), Some(self.dir.clone()));
            Error::MissingTensor {
                present: self.under(&prefix).into(),
                prefix,
                tried,
                suggestions,
                location,
            }
        })
    }

    /// # Errors
    /// The tensor is stored in integers or in 8 bits, as quantized weights are.
    pub(super) fn check_float(&self, name: &str, entry: &Entry) -> Result<()> {
        if matches!(entry.dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32 | Dtype::F64) {
            return Ok(());
        }
        let keys = ["quantization_config", "quantization", "compression_config"];
        let key =
            keys.into_iter().find(|key| self.config.get(key).is_some_and(|value| !value.is_null()));
        let (name, found, location) =
            (name.to_string(), entry.dtype.to_string(), Some(self.files[entry.file].0.clone()));
        match key {
            Some(_) => Err(Error::QuantizedTensor {
                name,
                found,
                shape: entry.shape.as_slice().into(),
                key,
                location,
            }),
            None => Err(Error::DTypeUnsupported { name, found, location }),
        }
    }

    /// The tensors under a prefix.
    pub(super) fn list(&self, prefix: &str) -> Listing {
        let there = self.below(prefix).filter(|(_, _, entry)| !entry.is_hidden());
        let listed = there.map(|(name, short, entry)| Listed {
            name: short.to_string(),
            unread: entry.is_unread(name),
        });
        Listing { prefix: prefix.to_string(), tensors: listed.collect() }
    }

    /// The names under a prefix, without it.
    fn under(&self, prefix: &str) -> Vec<String> {
        self.below(prefix).map(|(_, short, _)| short.to_string()).collect()
    }

    /// The tensors under a prefix: name, name without the prefix, entry. (A checkpoint of experts
    /// has tens of thousands of tensors, and each layer looks under its own prefix.)
    fn below(&self, prefix: &str) -> impl Iterator<Item = (&str, &str, &Entry)> {
        let dotted = if prefix.is_empty() { String::new() } else { format!("{prefix}.") };
        let from = self.tensors.range(dotted.clone()..);
        from.map_while(move |(name, entry)| {
            Some((name.as_str(), name.strip_prefix(&dotted)?, entry))
        })
    }
}

fn check_directory(dir: &Path) -> Result<()> {
    if std::fs::metadata(dir).map_err(Error::io(dir))?.is_dir() {
        return Ok(());
    }
    Err(Error::NotADirectory { path: dir.to_path_buf(), found: "a file" })
}

/// Something is at this path.
///
/// # Errors
/// A symbolic link to nothing.
fn is_there(path: &Path) -> Result<bool> {
    match (path.exists(), std::fs::read_link(path)) {
        (true, _) => Ok(true),
        (false, Ok(target)) => Err(Error::DanglingLink { path: path.to_path_buf(), target }),
        (false, Err(_)) => Ok(false),
    }
}

/// Files of a model in formats that are not read, and what to do with them.
fn other_formats(dir: &Path) -> Vec<String> {
    const KNOWN: [(&str, &str, &str); 8] = [
        ("adapter_model", ".safetensors", "an adapter, which LoraAdapter::open reads"),
        ("", ".gguf", "a GGUF file, which is not supported yet"),
        ("", ".bin", "PyTorch weights: convert them to safetensors"),
        ("", ".pth", "PyTorch weights: convert them to safetensors"),
        ("", ".pt", "PyTorch weights: convert them to safetensors"),
        (
            "",
            ".safetensors",
            "safetensors of another name: rename it to model.safetensors, or add its index",
        ),
        ("", ".npz", "MLX or NumPy weights: convert them to safetensors"),
        ("tokenizer", ".model", "a tokenizer alone"),
    ];
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    let is = |name: &str, start: &str, end: &str| name.starts_with(start) && name.ends_with(end);
    let kind = |name: &String| {
        let (.., what) = KNOWN.iter().find(|(start, end, _)| is(name, start, end))?;
        Some(format!("{name} ({what})"))
    };
    names.iter().filter_map(kind).take(3).collect()
}
