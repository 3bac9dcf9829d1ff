//! One error type for the crate: one variant per broken rule, each naming the tensor or field, what was expected and what
//! was found.
//!
//! [`Error`] converts into [`candle_core::Error`] and back without losing its type, so `?` works in candle code and the
//! variant can still be matched afterwards.

use std::path::{Path, PathBuf};

use candle_core::{DType, DeviceLocation};

/// What every fallible function of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong between a file and a forward pass.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No tensor under any of the known names.
    #[error(
        "no tensor {} under \"{prefix}\"; present there: {}{}{}",
        list(tried, " or "),
        first(present),
        did_you_mean(suggestions),
        within(location)
    )]
    MissingTensor {
        /// Where the names were looked up, for example `model.layers.0.mlp`.
        prefix: String,
        /// The names that were tried.
        tried: Vec<String>,
        /// The names that are there (all of them for a [`crate::Checkpoint`], else those of the known families).
        present: Box<[String]>,
        /// Other prefixes under which one of the names is there, the likeliest first.
        suggestions: Box<[String]>,
        /// The checkpoint's directory, when known.
        location: Option<PathBuf>,
    },
    /// The names fit several families whose layouts differ.
    #[error(
        "the names {} under \"{prefix}\" fit several families ({}): name one with FfnConfig::with_family",
        list(names, ", "),
        list(families, ", ")
    )]
    AmbiguousNames {
        /// Where the names were found.
        prefix: String,
        /// The names in question.
        names: Vec<String>,
        /// The families they fit.
        families: Vec<String>,
    },
    /// The checkpoint has a bias that the config does not ask for: ignoring it would compute something else.
    #[error("{name} is in the checkpoint, but the config has no bias for it (mlp_bias / FfnConfig::with_bias)")]
    UnexpectedBias {
        /// The bias found.
        name: String,
    },
    /// A tensor has another shape than the config says.
    #[error("{name}: expected shape {expected:?}, found {found:?}{}", within(location))]
    Shape {
        /// The tensor.
        name: String,
        /// The shape asked for.
        expected: Vec<usize>,
        /// The shape found.
        found: Vec<usize>,
        /// The file it lies in, when known.
        location: Option<PathBuf>,
    },
    /// A matrix, or its packed form, would have more bytes than there are addresses.
    #[error("{name}: {rows} x {columns} elements are more than memory can address")]
    TooLarge {
        /// The matrix.
        name: &'static str,
        /// Its rows.
        rows: usize,
        /// Its columns.
        columns: usize,
    },
    /// A tensor has another number of dimensions than it must have.
    #[error("{name}: expected {expected}, found rank {} (shape {found:?})", found.len())]
    Rank {
        /// The tensor.
        name: &'static str,
        /// The rank asked for, in words.
        expected: &'static str,
        /// The shape found.
        found: Vec<usize>,
    },
    /// A tensor's dtype is none this crate computes in.
    #[error("{name}: expected one of f16, bf16, f32, f64, found {found}{}", within(location))]
    DTypeUnsupported {
        /// The tensor.
        name: String,
        /// The dtype found.
        found: String,
        /// The file it lies in, when known.
        location: Option<PathBuf>,
    },
    /// Two tensors that meet in one product have different dtypes.
    #[error("{name}: expected dtype {expected:?} as {other}, found {found:?}")]
    DTypeMismatch {
        /// The tensor.
        name: &'static str,
        /// The tensor it meets.
        other: &'static str,
        /// The dtype of the other.
        expected: DType,
        /// The dtype found.
        found: DType,
    },
    /// Two tensors that meet in one product are on different devices.
    #[error("{name}: expected on device {expected:?} as {other}, found on {found:?}")]
    DeviceMismatch {
        /// The tensor.
        name: &'static str,
        /// The tensor it meets.
        other: &'static str,
        /// The device of the other.
        expected: DeviceLocation,
        /// The device found.
        found: DeviceLocation,
    },
    /// The last dimension of an input is not the layer's input size.
    #[error("x: expected last dimension {expected}, found shape {found:?}")]
    InputWidth {
        /// The layer's input size.
        expected: usize,
        /// The shape of x.
        found: Vec<usize>,
    },
    /// A size that must be positive is zero.
    #[error("{name}: expected at least 1, found 0")]
    ZeroSize {
        /// The size.
        name: &'static str,
    },
    /// The config lacks a field.
    #[error("config: missing field {field}")]
    MissingField {
        /// The field, or the alternatives joined by "or".
        field: &'static str,
    },
    /// A config field has the wrong type or range.
    #[error("config: {field}: expected {expected}, found {found}")]
    InvalidField {
        /// The field.
        field: String,
        /// What would be valid.
        expected: &'static str,
        /// What stands there.
        found: String,
    },
    /// The activation's name is not known.
    #[error("unknown activation \"{name}\"; known: {known}")]
    UnknownActivation {
        /// The name found.
        name: String,
        /// The names accepted.
        known: &'static str,
    },
    /// The config asks for something this crate does not compute.
    #[error("config: {field} = {value} is not supported: {reason}")]
    Unsupported {
        /// The field.
        field: String,
        /// Its value.
        value: String,
        /// What it would change.
        reason: &'static str,
    },
    /// The path of a checkpoint is not a directory.
    #[error("{}: expected a checkpoint directory, found {found}", path.display())]
    NotADirectory {
        /// The path.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// The path of a file of the checkpoint is not one.
    #[error("{}: expected a file, found {found}", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// The directory holds no weights.
    #[error("{}: no model.safetensors, model.safetensors.index.json or consolidated*.safetensors in it{}", dir.display(), instead(found))]
    NoWeights {
        /// The directory.
        dir: PathBuf,
        /// Files of other formats in it, and what to do with them.
        found: Vec<String>,
    },
    /// The directory holds no config.
    #[error("{}: no config.json (or params.json) in it{}", dir.display(), instead(found))]
    NoConfig {
        /// The directory.
        dir: PathBuf,
        /// Files of other formats in it, and what to do with them.
        found: Vec<String>,
    },
    /// A symbolic link of the checkpoint leads nowhere, as in an incomplete copy of a download cache.
    #[error("{}: a symbolic link to {}, which is not there", path.display(), target.display())]
    DanglingLink {
        /// The link.
        path: PathBuf,
        /// What it points to.
        target: PathBuf,
    },
    /// The file is the text that Git LFS leaves in the place of a large file.
    #[error("{}: a Git LFS pointer, not the file{}: run `git lfs pull` in its repository", path.display(), of_size(size))]
    LfsPointer {
        /// The file.
        path: PathBuf,
        /// Bytes of the file it stands for, if the pointer says so.
        size: Option<u64>,
    },
    /// A tensor is stored in a quantized format.
    #[error(
        "{name}: found {found} of shape {shape:?}: the weights are quantized{}, which is not supported: expected one of f16, bf16, f32, \
         f64{}",
        by_the_config(key),
        within(location)
    )]
    QuantizedTensor {
        /// The tensor.
        name: String,
        /// The dtype found.
        found: String,
        /// The shape found.
        shape: Box<[usize]>,
        /// The field of the config that says so.
        key: Option<&'static str>,
        /// The file it lies in.
        location: Option<PathBuf>,
    },
    /// Tensors under a layer's prefix that the layer does not read: without them it would compute something else.
    #[error(
        "{} under \"{prefix}\" would not be read, and the {layer} would compute something else without: expected only the \
         {layer}'s own weights and biases (read those of another layer before it)",
        first(names)
    )]
    UnreadTensors {
        /// What was loaded: a block or a linear layer.
        layer: &'static str,
        /// Its prefix.
        prefix: String,
        /// The tensors.
        names: Vec<String>,
    },
    /// The tensors are those of a feed-forward block without a gate.
    #[error("under \"{prefix}\" are {up} and {down}, a plain MLP without a gate: expected gate, up and down projections")]
    PlainMlp {
        /// Where the names were found.
        prefix: String,
        /// The first projection.
        up: &'static str,
        /// The second.
        down: &'static str,
    },
    /// A file cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not the JSON it should be.
    #[error("{}: not valid JSON: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// A safetensors header is broken, or lies about its sizes.
    #[error("{}: broken safetensors header: {reason}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A safetensors file is shorter or longer than its header says.
    #[error("{}: expected {expected} bytes by its header, found {found}", path.display())]
    FileSize {
        /// The file.
        path: PathBuf,
        /// The size that the header implies.
        expected: u64,
        /// The size of the file.
        found: u64,
    },
    /// The index is not an object with a `weight_map` of plain file names.
    #[error("{}: {reason}", path.display())]
    Index {
        /// The index file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The index names a shard that is not there.
    #[error("{}: shard {shard} (of {tensor}) is missing", index.display())]
    MissingShard {
        /// The index file.
        index: PathBuf,
        /// The shard.
        shard: String,
        /// A tensor that should be in it.
        tensor: String,
    },
    /// A shard lacks a tensor that the index places in it.
    #[error("{}: {tensor} is not in shard {shard}", index.display())]
    NotInShard {
        /// The index file.
        index: PathBuf,
        /// The shard.
        shard: String,
        /// The tensor.
        tensor: String,
    },
    /// Two files hold a tensor of the same name.
    #[error("{tensor} is both in {} and in {}", first.display(), second.display())]
    DuplicateTensor {
        /// The tensor.
        tensor: String,
        /// One file.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// A row that a matrix does not have was asked for.
    #[error("row {row}: expected one of the weight's {rows} rows")]
    RowOutOfRange {
        /// The row.
        row: i64,
        /// How many there are.
        rows: usize,
    },
    /// Ids that choose rows have a dtype that candle does not index with.
    #[error("ids: expected dtype u8, u32 or i64, found {}", found.as_str())]
    IdsDType {
        /// The dtype found.
        found: DType,
    },
    /// The environment asks for a kernel that this machine does not have.
    #[error("{variable}: expected one of {}, found {found}", available.join(", "))]
    UnknownKernel {
        /// The environment variable.
        variable: &'static str,
        /// What it says.
        found: String,
        /// The kernels this machine can run, best first, and `plain`.
        available: Vec<&'static str>,
    },
    /// A checkpoint cannot be downloaded.
    #[error("hub: {model_id}: {reason}")]
    Hub {
        /// The model asked for.
        model_id: String,
        /// Why.
        reason: String,
    },
    /// An error of candle itself.
    #[error(transparent)]
    Candle(candle_core::Error),
}

fn list(names: &[String], separator: &str) -> String {
    if names.is_empty() { "none".to_string() } else { names.join(separator) }
}

/// At most 20 of the names.
fn first(names: &[String]) -> String {
    const MOST: usize = 20;
    match names.len().checked_sub(MOST) {
        None | Some(0) => list(names, ", "),
        Some(more) => format!("{} and {more} more", names[..MOST].join(", ")),
    }
}

fn did_you_mean(prefixes: &[String]) -> String {
    if prefixes.is_empty() {
        return String::new();
    }
    let quoted: Vec<String> = prefixes.iter().map(|prefix| format!("\"{prefix}\"")).collect();
    format!("; did you mean {}?", quoted.join(" or "))
}

fn instead(found: &[String]) -> String {
    if found.is_empty() { String::new() } else { format!("; there is {}", found.join(", ")) }
}

fn of_size(size: &Option<u64>) -> String {
    size.map(|size| format!(" of {size} bytes")).unwrap_or_default()
}

fn by_the_config(key: &Option<&str>) -> String {
    key.map(|key| format!(" (config: {key})")).unwrap_or_default()
}

fn within(location: &Option<PathBuf>) -> String {
    location.as_ref().map(|path| format!(" (in {})", path.display())).unwrap_or_default()
}

impl Error {
    /// The crate's error inside a candle error, if it came from here.
    ///
    /// ```
    /// use candle_swiglu::{silu_mul, Error};
    /// use candle_core::{DType, Device, Tensor};
    ///
    /// fn in_candle_code() -> candle_core::Result<Tensor> {
    ///     let gate = Tensor::zeros((2, 3), DType::U32, &Device::Cpu)?;
    ///     Ok(silu_mul(&gate, &gate)?)
    /// }
    /// let error = in_candle_code().unwrap_err();
    /// assert!(matches!(Error::find(&error), Some(Error::DTypeUnsupported { .. })));
    /// ```
    pub fn find(error: &candle_core::Error) -> Option<&Error> {
        use candle_core::Error as E;
        match error {
            E::Io(io) => io.get_ref()?.downcast_ref(),
            E::Context { inner, .. } | E::WithPath { inner, .. } | E::WithBacktrace { inner, .. } => Self::find(inner),
            _ => None,
        }
    }

    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_path_buf();
        move |source| Error::Io { path, source }
    }
}

/// The error travels inside candle's transparent I/O variant, the one that keeps a source of any type: it prints as itself,
/// and [`Error::find`] gets it back.
impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(inner) => inner,
            own => candle_core::Error::Io(std::io::Error::other(own)),
        }
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        match error {
            candle_core::Error::Io(io) => match io.downcast::<Error>() {
                Ok(own) => own,
                Err(io) => Error::Candle(candle_core::Error::Io(io)),
            },
            candle_core::Error::WithBacktrace { inner, .. } if Error::find(&inner).is_some() => Error::from(*inner),
            other => Error::Candle(other),
        }
    }
}
