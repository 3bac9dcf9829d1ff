//! A checkpoint directory: `config.json` and one or many safetensors files.
//!
//! 1. [`Checkpoint::open`] reads the config and every header, and checks them: sizes against the files, the index against
//!    the shards, names against each other. No tensor data is read.
//! 2. A tensor's shape and dtype are checked before its first byte is read.
//! 3. Data is read straight into the final buffer in the dtype asked for, converted on the way in chunks of 1 MiB. Nothing
//!    is mapped: loading needs the memory of the weights themselves and one chunk more (and, for a GPU, one tensor more).

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use bytemuck::Pod;
use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use half::{bf16, f16};
use safetensors::{Dtype, tensor::Metadata};
use serde_json::Value;

use crate::error::{Error, Result};

pub(crate) const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// `consolidated*.safetensors`, Meta's name.
pub(crate) fn is_consolidated(name: &str) -> bool {
    name.starts_with("consolidated") && name.ends_with(".safetensors")
}

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

struct Contents {
    dir: PathBuf,
    config: Value,
    files: Vec<(PathBuf, File)>,
    tensors: BTreeMap<String, Entry>,
}

/// Where a tensor lies.
struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    start: u64,
    bytes: u64,
}

impl Checkpoint {
    /// Opens a directory with `config.json` (or Meta's `params.json`) and `model.safetensors`, or the shards that
    /// `model.safetensors.index.json` names, or `consolidated*.safetensors`.
    ///
    /// # Errors
    /// Not a directory; no config or no weights in it; a file that cannot be read or is not valid JSON; a header that is
    /// broken or does not fit its file; a shard that is missing, or lacks a tensor of the index; a tensor in two files.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let metadata = std::fs::metadata(dir).map_err(Error::io(dir))?;
        if !metadata.is_dir() {
            return Err(Error::NotADirectory { path: dir.to_path_buf(), found: "a file" });
        }
        let config = ["config.json", "params.json"].map(|name| dir.join(name)).into_iter().find(|path| path.exists());
        let config = read_json(&config.ok_or_else(|| Error::NoConfig { dir: dir.to_path_buf() })?)?;
        let mut contents = Contents { dir: dir.to_path_buf(), config, files: vec![], tensors: BTreeMap::new() };
        contents.add_weights()?;
        Ok(Self { contents: Arc::new(contents), progress: None })
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
        self.contents.tensors.keys().map(String::as_str)
    }

    /// There is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.contents.tensors.contains_key(name)
    }

    /// Bytes of all tensors in the files.
    pub fn data_bytes(&self) -> u64 {
        self.contents.tensors.values().map(|entry| entry.bytes).sum()
    }

    /// Calls `f` with the number of bytes just read, whenever some were.
    pub fn with_progress(self, f: impl Fn(u64) + Send + Sync + 'static) -> Self {
        Self { progress: Some(Arc::new(f)), ..self }
    }

    /// A `VarBuilder` over the checkpoint that gives every tensor in `dtype` (f16, bf16, f32 or f64) on `device`.
    pub fn var_builder(&self, dtype: DType, device: &Device) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(self.clone()), dtype, device.clone())
    }

    /// One tensor, whatever its shape, in `dtype` on `device`.
    ///
    /// # Errors
    /// No such tensor; a dtype that is not a float, in the file or asked for; a file that cannot be read.
    pub fn tensor(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let entry = self.contents.entry(name)?;
        match dtype {
            DType::F16 => self.load::<f16>(name, entry, device),
            DType::BF16 => self.load::<bf16>(name, entry, device),
            DType::F32 => self.load::<f32>(name, entry, device),
            DType::F64 => self.load::<f64>(name, entry, device),
            other => {
                Err(Error::DTypeUnsupported { name: format!("{name} in memory"), found: format!("{other:?}"), location: None })
            }
        }
    }

    fn load<T: Element + candle_core::WithDType>(&self, name: &str, entry: &Entry, device: &Device) -> Result<Tensor> {
        let data = match entry.dtype {
            d if d == T::IN_FILE => self.read_same::<T>(entry),
            Dtype::F16 => self.read_as::<f16, T>(entry),
            Dtype::BF16 => self.read_as::<bf16, T>(entry),
            Dtype::F32 => self.read_as::<f32, T>(entry),
            Dtype::F64 => self.read_as::<f64, T>(entry),
            other => {
                let location = Some(self.contents.files[entry.file].0.clone());
                return Err(Error::DTypeUnsupported { name: name.to_string(), found: other.to_string(), location });
            }
        };
        Ok(Tensor::from_vec(data?, entry.shape.as_slice(), device)?)
    }

    /// The bytes as they lie, into zeroed pages that the system hands out as they are written.
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
        let (path, file) = &self.contents.files[entry.file];
        read_exact_at(file, buffer, entry.start + at).map_err(Error::io(path))?;
        if let Some(progress) = &self.progress {
            progress(buffer.len() as u64);
        }
        Ok(())
    }
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Contents { dir, files, tensors, .. } = &*self.contents;
        f.debug_struct("Checkpoint").field("dir", dir).field("files", &files.len()).field("tensors", &tensors.len()).finish()
    }
}

/// What `VarBuilder` asks of a source of tensors.
impl SimpleBackend for Checkpoint {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        let entry = self.contents.entry(name)?;
        if entry.shape != shape.dims() {
            let location = Some(self.contents.files[entry.file].0.clone());
            let (expected, found) = (shape.into_dims(), entry.shape.clone());
            return Err(Error::Shape { name: name.to_string(), expected, found, location }.into());
        }
        Ok(self.tensor(name, dtype, device)?)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        Ok(self.tensor(name, dtype, device)?)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.contains(name)
    }
}

impl Contents {
    /// Adds the weights' files: a single one wins over an index, as in transformers.
    fn add_weights(&mut self) -> Result<()> {
        let single = self.dir.join(SINGLE);
        let index = self.dir.join(INDEX);
        if single.exists() {
            return self.add_file(single, |_| true);
        }
        if index.exists() {
            return self.add_indexed(&index);
        }
        let consolidated = self.consolidated()?;
        if consolidated.is_empty() {
            return Err(Error::NoWeights { dir: self.dir.clone() });
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
            if !path.exists() {
                let (shard, tensor) = (shard.to_string(), tensors[0].to_string());
                return Err(Error::MissingShard { index: index.to_path_buf(), shard, tensor });
            }
            // A tensor that the index places in another shard is not taken from this one.
            self.add_file(path, |name| homes.get(name).is_none_or(|home| home == shard))?;
            if let Some(tensor) = tensors.iter().find(|tensor| !self.tensors.contains_key(**tensor)) {
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
            if info.shape.iter().filter(|&&dim| dim > 0).try_fold(1usize, |n, &dim| n.checked_mul(dim)).is_none() {
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
            };
            self.tensors.insert(name, entry);
        }
        self.files.push((path, file));
        Ok(())
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.tensors.get(name).ok_or_else(|| {
            // "mlp.gate_proj.weight": gate_proj.weight is missing under mlp.
            let module = name.rsplit_once('.').map_or("", |(module, _)| module);
            let prefix = module.rsplit_once('.').map_or("", |(prefix, _)| prefix);
            let tried = vec![name[prefix.len()..].trim_start_matches('.').to_string()];
            let (prefix, location) = (prefix.to_string(), Some(self.dir.clone()));
            Error::MissingTensor { present: self.under(&prefix), prefix, tried, location }
        })
    }

    /// The names under a prefix, without it; at most 20 of them.
    fn under(&self, prefix: &str) -> Vec<String> {
        const MOST: usize = 20;
        let dotted = if prefix.is_empty() { String::new() } else { format!("{prefix}.") };
        let mut names: Vec<String> =
            self.tensors.keys().filter_map(|name| name.strip_prefix(&dotted)).map(str::to_string).take(MOST + 1).collect();
        if names.len() > MOST {
            names[MOST] = "...".to_string();
        }
        names
    }
}

/// One plain component: an index cannot point outside its directory.
/// The shard of every tensor, checked to be plain file names.
pub(crate) fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    let json = read_json(path)?;
    let broken = |reason: String| Error::Index { path: path.to_path_buf(), reason };
    let map = json.get("weight_map").and_then(Value::as_object).filter(|map| !map.is_empty());
    let map = map.ok_or_else(|| broken("expected an object weight_map with tensors in it, found none".into()))?;
    let shard_of = |(tensor, shard): (&String, &Value)| match shard.as_str().filter(|name| is_file_name(name)) {
        Some(name) => Ok((tensor.clone(), name.to_string())),
        None => Err(broken(format!("weight_map.{tensor}: expected a file name, found {shard}"))),
    };
    map.iter().map(shard_of).collect()
}

fn is_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
}

/// Neither a directory nor a pipe, which would be waited for.
fn check_file(path: &Path) -> Result<()> {
    let metadata = std::fs::metadata(path).map_err(Error::io(path))?;
    if metadata.is_file() {
        return Ok(());
    }
    let found = if metadata.is_dir() { "a directory" } else { "a special file" };
    Err(Error::NotAFile { path: path.to_path_buf(), found })
}

fn read_json(path: &Path) -> Result<Value> {
    check_file(path)?;
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&bytes).map_err(|source| Error::Json { path: path.to_path_buf(), source })
}

/// Where the data starts, and the checked header: its tensors tile the rest of the file without gap or overlap.
fn read_header(path: &Path, file: &File) -> Result<(u64, Metadata)> {
    const LENGTH: u64 = 8;
    const MOST: u64 = 100_000_000; // the format's own bound
    let found = file.metadata().map_err(Error::io(path))?.len();
    let broken = |reason: String| Error::Header { path: path.to_path_buf(), reason };
    if found < LENGTH {
        return Err(broken(format!("expected at least 8 bytes, found {found}")));
    }
    let mut length = [0; LENGTH as usize];
    read_exact_at(file, &mut length, 0).map_err(Error::io(path))?;
    let length = u64::from_le_bytes(length);
    if length > MOST || length > found - LENGTH {
        let most = MOST.min(found - LENGTH);
        return Err(broken(format!("expected a header of at most {most} bytes, found one of {length}")));
    }
    let mut json = vec![0; length as usize];
    read_exact_at(file, &mut json, LENGTH).map_err(Error::io(path))?;
    let metadata: Metadata = serde_json::from_slice(&json).map_err(|error| broken(error.to_string()))?;
    let expected = (LENGTH + length).checked_add(metadata.data_len() as u64);
    match expected {
        Some(expected) if expected == found => Ok((LENGTH + length, metadata)),
        _ => Err(Error::FileSize { path: path.to_path_buf(), expected: expected.unwrap_or(u64::MAX), found }),
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, buffer: &mut [u8], at: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, at)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut buffer: &mut [u8], mut at: u64) -> std::io::Result<()> {
    while !buffer.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, buffer, at)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            n => {
                buffer = &mut buffer[n..];
                at += n as u64;
            }
        }
    }
    Ok(())
}

#[cfg(not(any(unix, windows)))]
fn read_exact_at(mut file: &File, buffer: &mut [u8], at: u64) -> std::io::Result<()> {
    use std::io::{Read, Seek, SeekFrom};
    file.seek(SeekFrom::Start(at))?;
    file.read_exact(buffer)
}

/// A float dtype of the file or of memory.
trait Element: Pod {
    const IN_FILE: Dtype;
    const WIDE: bool = false;
    fn to_f32(self) -> f32;
    fn from_f32(value: f32) -> Self;
    fn to_f64(self) -> f64 {
        f64::from(self.to_f32())
    }
    fn from_f64(value: f64) -> Self;
}

impl Element for f16 {
    const IN_FILE: Dtype = Dtype::F16;
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
    fn from_f64(value: f64) -> Self {
        f16::from_f32(round_to_odd(value))
    }
}

impl Element for bf16 {
    const IN_FILE: Dtype = Dtype::BF16;
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
    fn from_f64(value: f64) -> Self {
        bf16::from_f32(round_to_odd(value))
    }
}

impl Element for f32 {
    const IN_FILE: Dtype = Dtype::F32;
    fn to_f32(self) -> f32 {
        self
    }
    fn from_f32(value: f32) -> Self {
        value
    }
    fn from_f64(value: f64) -> Self {
        value as f32
    }
}

impl Element for f64 {
    const IN_FILE: Dtype = Dtype::F64;
    const WIDE: bool = true;
    fn to_f32(self) -> f32 {
        self as f32
    }
    fn from_f32(value: f32) -> Self {
        f64::from(value)
    }
    fn to_f64(self) -> f64 {
        self
    }
    fn from_f64(value: f64) -> Self {
        value
    }
}

/// The f32 next to `value` on the side of zero, its last bit set if it is not exact: rounding this once more to a narrower
/// format gives what rounding `value` itself would (half's own `from_f64` drops the lower half of the bits).
fn round_to_odd(value: f64) -> f32 {
    let near = value as f32;
    if near.is_nan() || f64::from(near) == value {
        return near;
    }
    let beyond = f64::from(near).abs() > value.abs();
    f32::from_bits((near.to_bits() - u32::from(beyond)) | 1)
}

/// Through f32, which holds f16 and bf16 exactly; through f64 where one side is f64, so that there is one rounding.
fn convert<S: Element, T: Element>(source: &[S], target: &mut [T]) {
    if S::WIDE || T::WIDE {
        target.iter_mut().zip(source).for_each(|(t, s)| *t = T::from_f64(s.to_f64()));
    } else {
        target.iter_mut().zip(source).for_each(|(t, s)| *t = T::from_f32(s.to_f32()));
    }
}
