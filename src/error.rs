//! One error type for the crate: one variant per broken rule, each naming the tensor or field, what
//! was expected and what was found.
//!
//! [`Error`] converts into [`candle_core::Error`] and back without losing its type, so `?` works in
//! candle code and the variant can still be matched afterwards.

mod convert;
mod text;

use std::path::PathBuf;

use candle_core::{DType, DeviceLocation};

use text::{by_the_config, did_you_mean, first, instead, list, of_size, within};

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
        /// The names that are there (all of them for a [`crate::Checkpoint`], else those of the
        /// known families).
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
    /// The checkpoint has a bias that the config has not: without it the result would differ.
    #[error(
        "{name} is in the checkpoint, but the config has no bias for it (mlp_bias / FfnConfig::with_bias)"
    )]
    UnexpectedBias {
        /// The bias found.
        name: String,
    },
    /// A tensor has another shape than the config says.
    #[error("{name}: expected shape {expected:?}, found {found:?}{}", within(location))]
    Shape {
        /// The tensor.
        name: String,
        /// The expected shape.
        expected: Vec<usize>,
        /// The shape found.
        found: Vec<usize>,
        /// Its file, when known.
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
        /// The expected rank, in words.
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
        /// Its file, when known.
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
        /// The value found.
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
    /// The config needs a formula that this crate does not compute.
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
    /// The directory lacks a file of an adapter.
    #[error("{}: no {missing} in it{}", dir.display(), instead(found))]
    NoAdapter {
        /// The directory.
        dir: PathBuf,
        /// The file.
        missing: &'static str,
        /// Files of other formats in it, and what to do with them.
        found: Vec<String>,
    },
    /// A tensor of an adapter is not one of a low-rank pair.
    #[error(
        "{name}: expected a name base_model.model.<module>.lora_A.weight or .lora_B.weight{}",
        within(location)
    )]
    NoPair {
        /// The tensor.
        name: String,
        /// Its file.
        location: Option<PathBuf>,
    },
    /// An adapter has a pair for a module that its config does not target.
    #[error(
        "{module}: a low-rank pair for a module that target_modules and exclude_modules of the config do not select"
    )]
    UntargetedModule {
        /// The module.
        module: String,
    },
    /// An adapter has pairs for modules that the model lacks.
    #[error("{}: low-rank pairs for modules that the model does not have", first(modules))]
    UnusedPairs {
        /// The modules.
        modules: Vec<String>,
    },
    /// The modules of an adapter fit several families that give them different meanings.
    #[error(
        "the adapter's {} under \"{block}\" fit several families ({}): name one with \
         FfnLora::from_adapter_with_names",
        list(names, ", "),
        list(families, ", ")
    )]
    AmbiguousPairs {
        /// The name of the block.
        block: String,
        /// The modules inside it.
        names: Vec<String>,
        /// The families they fit.
        families: Vec<String>,
    },
    /// A layer has no adapter of this name.
    #[error("no adapter {name:?} in this layer; it has {}", list(known, ", "))]
    UnknownAdapter {
        /// The name.
        name: String,
        /// The names of the layer's adapters.
        known: Vec<String>,
    },
    /// A layer has an adapter of this name already.
    #[error("the layer has an adapter {name:?} already: delete_adapter removes it")]
    AdapterExists {
        /// The name.
        name: String,
    },
    /// An operation on the active adapter of a layer that has none.
    #[error(
        "no adapter is active in this layer; it has {}: set_adapter activates one",
        list(known, ", ")
    )]
    NoActiveAdapter {
        /// The names of the layer's adapters.
        known: Vec<String>,
    },
    /// The active adapter of a layer is part of its weights already.
    #[error("the adapter {name:?} is merged already")]
    AlreadyMerged {
        /// The name.
        name: String,
    },
    /// No adapter is part of the layer's weights.
    #[error("no adapter is merged into this layer's weights")]
    NotMerged,
    /// A symbolic link of the checkpoint leads nowhere, as in an incomplete copy of a download
    /// cache.
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
        /// The size in bytes of the file, if the pointer has it.
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
        /// Its file.
        location: Option<PathBuf>,
    },
    /// Tensors under a layer's prefix that the layer does not read: without them it would compute
    /// something else.
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
    #[error(
        "under \"{prefix}\" are {up} and {down}, a plain MLP without a gate: expected gate, up and down projections"
    )]
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
    /// A safetensors header is broken, or its sizes are inconsistent.
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
    /// An id is not a row of the matrix.
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
    /// The environment variable names a kernel that this machine does not have.
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
        /// The requested model.
        model_id: String,
        /// Why.
        reason: String,
    },
    /// An error of candle itself.
    #[error(transparent)]
    Candle(candle_core::Error),
}
