//! A checkpoint directory: `config.json` and one or many safetensors files.
//!
//! 1. [`Checkpoint::open`] reads the config and every header, and checks them: sizes against the
//!    files, the index against the shards, names against each other. No tensor data is read.
//! 2. A tensor's shape and dtype are checked before its first byte is read.
//! 3. Data is read into the final buffer in the requested dtype, converted in chunks of 1 MiB.
//!    Nothing is mapped: loading needs the memory of the weights themselves and one chunk more
//!    (and, for a GPU, one tensor more).

mod contents;
mod elements;
mod header;
mod json;

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::load::unread::listed_prefix;
pub(crate) use contents::{ADAPTER_CONFIG, ADAPTER_WEIGHTS};
use contents::{Contents, Entry};
#[cfg(feature = "hub")]
pub(crate) use contents::{INDEX, SINGLE, is_consolidated};
use elements::{Element, convert};
#[cfg(feature = "hub")]
pub(crate) use json::read_index;
pub use json::read_json;

/// An opened checkpoint. Cloning is cheap.
///
/// ```no_run
/// use candle_core::{DType, Device};
/// use candle_swiglu::{Checkpoint, FfnConfig, SwiGluFfn};
/// let checkpoint = Checkpoint::open("path/to/llama")?;
/// let cfg = FfnConfig::from_json(checkpoint.config())?;
/// let vb = checkpoint.var_builder(DType::BF16, &Device::Cpu);
/// let ffn = SwiGluFfn::new(&cfg, vb.pp("model.layers.0.mlp"))?;
/// # Ok::<(), candle_swiglu::Error>(())
/// ```
#[derive(Clone)]
pub struct Checkpoint {
    contents: Arc<Contents>,
    progress: Option<Arc<dyn Fn(u64) + Send + Sync>>,
}

impl Checkpoint {
    /// Opens a directory with `config.json` (or Meta's `params.json`) and `model.safetensors`, or
    /// the shards that `model.safetensors.index.json` names, or `consolidated*.safetensors`.
    ///
    /// # Errors
    /// Not a directory; no config or no weights in it; a file that cannot be read or is not valid
    /// JSON; a header that is broken or does not fit its file; a shard that is missing, or lacks a
    /// tensor of the index; a tensor in two files.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        Ok(Self { contents: Arc::new(Contents::open(dir.as_ref())?), progress: None })
    }

    /// Opens a directory with an adapter in PEFT's format.
    pub(crate) fn open_adapter(dir: &Path) -> Result<Self> {
        Ok(Self { contents: Arc::new(Contents::open_adapter(dir)?), progress: None })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.contents.dir
    }

    /// The whole config.
    pub fn config(&self) -> &Value {
        &self.contents.config
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let there = self.contents.tensors.iter().filter(|(_, entry)| !entry.is_hidden());
        there.map(|(name, _)| name.as_str())
    }

    /// There is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.contents.tensors.get(name).is_some_and(|entry| !entry.is_hidden())
    }

    /// The shape of a tensor in the files.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.contents.tensors.get(name).map(|entry| entry.shape.as_slice())
    }

    /// The float dtype (f16, bf16, f32 or f64) that holds most of the bytes in the files; `None` if
    /// there is no such tensor.
    pub fn dtype(&self) -> Option<DType> {
        let floats = [
            (DType::BF16, Dtype::BF16),
            (DType::F16, Dtype::F16),
            (DType::F32, Dtype::F32),
            (DType::F64, Dtype::F64),
        ];
        let bytes_of = |dtype| {
            let of_dtype = self.contents.tensors.values().filter(|entry| entry.dtype == dtype);
            of_dtype.map(|entry| entry.bytes).sum::<u64>()
        };
        let sizes = floats.map(|(dtype, in_file)| (bytes_of(in_file), dtype));
        sizes
            .into_iter()
            .filter(|(bytes, _)| *bytes > 0)
            .max_by_key(|(bytes, _)| *bytes)
            .map(|(_, dtype)| dtype)
    }

    /// The names of the tensors whose data nobody has read through this checkpoint, a clone of it
    /// or a `VarBuilder` over one of them, sorted.
    ///
    /// Left out are constants that a model computes itself: names that end in
    /// `rotary_emb.inv_freq`, `position_ids` or `masked_bias`, and causal masks (names that end in
    /// `.attn.bias` or `.attention.bias`, of shape (1, 1, n, n)).
    pub fn unread(&self) -> Vec<String> {
        let unread = self
            .contents
            .tensors
            .iter()
            .filter(|(name, entry)| entry.is_unread(name) && !entry.is_hidden());
        unread.map(|(name, _)| name.clone()).collect()
    }

    /// Counts a tensor as read ([`Checkpoint::unread`]): for one that the caller knows to be equal
    /// to another, or does not need. A name that is not there changes nothing.
    pub fn mark_read(&self, name: &str) {
        if let Some(entry) = self.contents.tensors.get(name) {
            entry.mark_read();
        }
    }

    /// From now on this checkpoint and its clones behave as if there were no such tensor: for one
    /// that would be refused (a bias that the config does not have, say) where the caller knows
    /// better. A name that is not there changes nothing.
    pub fn hide(&self, name: &str) {
        if let Some(entry) = self.contents.tensors.get(name) {
            entry.hide();
        }
    }

    /// Two tensors have the same dtype, the same shape and the same bytes, as a head and the
    /// embedding that it is tied to. They are compared in chunks of 1 MiB. Neither counts as read.
    ///
    /// # Errors
    /// No such tensor; a file that cannot be read.
    pub fn same_data(&self, a: &str, b: &str) -> Result<bool> {
        const CHUNK: u64 = 1 << 20;
        let (a, b) = (self.contents.entry(a)?, self.contents.entry(b)?);
        if a.dtype != b.dtype || a.shape != b.shape || a.bytes != b.bytes {
            return Ok(false);
        }
        if (a.file, a.start) == (b.file, b.start) {
            return Ok(true);
        }
        let (mut left, mut right) = (vec![], vec![]);
        let mut at = 0;
        while at < a.bytes {
            let n = CHUNK.min(a.bytes - at);
            left.resize(n as usize, 0);
            right.resize(n as usize, 0);
            self.contents.read(a, at, &mut left)?;
            self.contents.read(b, at, &mut right)?;
            if left != right {
                return Ok(false);
            }
            at += n;
        }
        Ok(true)
    }

    /// Bytes of all tensors in the files.
    pub fn data_bytes(&self) -> u64 {
        self.contents.tensors.values().map(|entry| entry.bytes).sum()
    }

    /// Calls `f` with the number of bytes just read, whenever some were.
    pub fn with_progress(self, f: impl Fn(u64) + Send + Sync + 'static) -> Self {
        Self { progress: Some(Arc::new(f)), ..self }
    }

    /// A `VarBuilder` over the checkpoint that loads every tensor in `dtype` (f16, bf16, f32 or
    /// f64) on `device`.
    pub fn var_builder(&self, dtype: DType, device: &Device) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(self.clone()), dtype, device.clone())
    }

    /// One tensor, of any shape, in `dtype` on `device`.
    ///
    /// # Errors
    /// No such tensor; a dtype that is not a float, in the file or as `dtype`; a file that cannot
    /// be read.
    pub fn tensor(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let entry = self.contents.entry(name)?;
        self.contents.check_float(name, entry)?;
        let tensor = match dtype {
            DType::F16 => self.load::<f16>(name, entry, device),
            DType::BF16 => self.load::<bf16>(name, entry, device),
            DType::F32 => self.load::<f32>(name, entry, device),
            DType::F64 => self.load::<f64>(name, entry, device),
            other => Err(Error::DTypeUnsupported {
                name: format!("{name} in memory"),
                found: format!("{other:?}"),
                location: None,
            }),
        }?;
        entry.mark_read();
        Ok(tensor)
    }

    fn load<T: Element + candle_core::WithDType>(
        &self,
        name: &str,
        entry: &Entry,
        device: &Device,
    ) -> Result<Tensor> {
        let data = match entry.dtype {
            d if d == T::IN_FILE => self.read_same::<T>(entry),
            Dtype::F16 => self.read_as::<f16, T>(entry),
            Dtype::BF16 => self.read_as::<bf16, T>(entry),
            Dtype::F32 => self.read_as::<f32, T>(entry),
            Dtype::F64 => self.read_as::<f64, T>(entry),
            other => {
                let location = Some(self.contents.files[entry.file].0.clone());
                return Err(Error::DTypeUnsupported {
                    name: name.to_string(),
                    found: other.to_string(),
                    location,
                });
            }
        };
        Ok(Tensor::from_vec(data?, entry.shape.as_slice(), device)?)
    }

    /// Unconverted bytes, read into zeroed pages that the system allocates as they are written.
    fn read_same<T: Element>(&self, entry: &Entry) -> Result<Vec<T>> {
        const CHUNK: usize = 16 << 20;
        let mut data: Vec<T> = bytemuck::zeroed_vec(entry.bytes as usize / size_of::<T>());
        let mut at = 0;
        for chunk in bytemuck::cast_slice_mut::<T, u8>(&mut data).chunks_mut(CHUNK) {
            self.read(entry, at, chunk)?;
            at += chunk.len() as u64;
        }
        Ok(data)
    }

    /// The elements converted from S to T with one rounding, a chunk at a time.
    fn read_as<S: Element, T: Element>(&self, entry: &Entry) -> Result<Vec<T>> {
        const CHUNK: usize = 1 << 20;
        let n = entry.bytes as usize / size_of::<S>();
        let mut data: Vec<T> = bytemuck::zeroed_vec(n);
        let mut source: Vec<S> = bytemuck::zeroed_vec(n.min(CHUNK / size_of::<S>()));
        let mut at = 0;
        for target in data.chunks_mut(source.len().max(1)) {
            let source = &mut source[..target.len()];
            self.read(entry, at, bytemuck::cast_slice_mut(source))?;
            at += size_of_val(source) as u64;
            convert(source, target);
        }
        Ok(data)
    }

    fn read(&self, entry: &Entry, at: u64, buffer: &mut [u8]) -> Result<()> {
        self.contents.read(entry, at, buffer)?;
        if let Some(progress) = &self.progress {
            progress(buffer.len() as u64);
        }
        Ok(())
    }
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Contents { dir, files, tensors, .. } = &*self.contents;
        f.debug_struct("Checkpoint")
            .field("dir", dir)
            .field("files", &files.len())
            .field("tensors", &tensors.len())
            .finish()
    }
}

/// The checkpoint as the source of a `VarBuilder`.
impl SimpleBackend for Checkpoint {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let entry = self.contents.entry(name)?;
        self.contents.check_float(name, entry)?;
        if entry.shape != shape.dims() {
            let location = Some(self.contents.files[entry.file].0.clone());
            let (expected, found) = (shape.into_dims(), entry.shape.clone());
            return Err(Error::Shape { name: name.to_string(), expected, found, location }.into());
        }
        Ok(self.tensor(name, dtype, device)?)
    }

    fn get_unchecked(
        &self,
        name: &str,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        match listed_prefix(name) {
            Some(prefix) => self.contents.list(prefix).to_tensor(),
            None => Ok(self.tensor(name, dtype, device)?),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.contains(name) || listed_prefix(name).is_some()
    }
}
