//! Hostile checkpoints: `Checkpoint`, `FfnConfig`, `SwiGluFfn` and `Linear` load a directory of
//! arbitrary files.
//!
//! 1. The input describes a directory: families of tensors with correct names and shapes; single
//!    tensors with any name, dtype, shape and offsets; headers and files of arbitrary bytes; a
//!    config and an index that are correct, odd or arbitrary bytes.
//! 2. Everything that the directory claims to contain is loaded. Errors are allowed; each has a
//!    message, which candle's error keeps.
//! 3. A block that loads maps one row to a row of the same shape and dtype.
//!
//! libFuzzer's `-malloc_limit_mb` bounds the memory, its `-timeout` the time (README.md).
#![no_main]

use std::fs;
use std::path::Path;

use arbitrary::Arbitrary;
use candle_core::{DType, Device, Module, Tensor};
use candle_swiglu::{Checkpoint, Error, Family, FfnConfig, Linear, SwiGluFfn};
use libfuzzer_sys::fuzz_target;
use serde_json::{Map, Value, json};

// ---------------------------------------------------------------- 1. what an input describes

#[derive(Arbitrary, Debug)]
struct Input {
    sizes: Sizes,
    config: Config,
    index: Index,
    files: Vec<(u8, Contents)>,
    load: Load,
}

/// H and I, at most 16 each.
#[derive(Arbitrary, Clone, Copy, Debug)]
struct Sizes(u8, u8);

#[derive(Arbitrary, Debug)]
enum Config {
    Fields(Vec<(u8, Json)>),
    Bytes(Vec<u8>),
    None,
}

#[derive(Arbitrary, Debug)]
enum Json {
    Null,
    Bool(bool),
    Small(u8),
    Edge(u8),
    Integer(i64),
    Float(f64),
    Word(u8),
    Text(String),
    Array(Vec<Json>),
    Fields(Vec<(u8, Json)>),
}

#[derive(Arbitrary, Debug)]
enum Index {
    None,
    /// Every tensor is mapped to the file that contains it.
    Honest,
    Places(Vec<(Name, Shard)>),
    Bytes(Vec<u8>),
}

#[derive(Arbitrary, Debug)]
enum Shard {
    File(u8),
    Odd(u8),
    Text(String),
}

#[derive(Arbitrary, Debug)]
enum Contents {
    Tensors {
        blocks: Vec<Block>,
        others: Vec<Other>,
        fill: u8,
        damage: Vec<(u16, u8)>,
        cut: Option<u16>,
    },
    Header {
        header: String,
        length: Option<u64>,
        data: u8,
    },
    Bytes(Vec<u8>),
}

/// The tensors of a family, all correct.
#[derive(Arbitrary, Debug)]
struct Block {
    prefix: u8,
    family: u8,
    dtype: u8,
    bias: bool,
}

#[derive(Arbitrary, Debug)]
struct Other {
    name: Name,
    dtype: u8,
    shape: Vec<Dim>,
    /// Added to the start and the end of the correct offsets.
    shift: Option<(i8, i8)>,
}

#[derive(Arbitrary, Debug)]
enum Name {
    Known { prefix: u8, family: u8, piece: u8, bias: bool },
    Text(String),
}

#[derive(Arbitrary, Debug)]
enum Dim {
    H,
    I,
    TwiceI,
    Small(u8),
    Edge(u8),
    Any(u64),
}

#[derive(Arbitrary, Debug)]
struct Load {
    prefix: u8,
    family: Option<u8>,
    dtype: u8,
    bias: bool,
}

const PREFIXES: [&str; 4] = ["mlp", "layers.0.feed_forward", "", "experts.1"];
const FILES: [&str; 6] = [
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "consolidated.00.safetensors",
    "consolidated.01.safetensors",
    "params.json",
];
const ODD_SHARDS: [&str; 6] =
    ["../model.safetensors", "/dev/zero", "", ".", "a\0b", "x/model.safetensors"];
const EDGES: [u64; 12] = [
    0,
    1,
    1 << 20,
    (1 << 31) - 1,
    1 << 31,
    1 << 32,
    (1 << 32) + 1,
    1 << 53,
    (1 << 62) + 1,
    1 << 63,
    u64::MAX - 1,
    u64::MAX,
];
const DTYPES: [(&str, u64); 12] = [
    ("F32", 32),
    ("BF16", 16),
    ("F16", 16),
    ("F64", 64),
    ("F8_E4M3", 8),
    ("F4", 4),
    ("F6_E2M3", 6),
    ("I64", 64),
    ("U8", 8),
    ("BOOL", 8),
    ("C64", 64),
    ("F31", 31),
];
const FIELDS: [&str; 32] = [
    "hidden_size",
    "intermediate_size",
    "model_type",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "feed_forward_proj",
    "mlp_bias",
    "mlp_multipliers",
    "swiglu_limit",
    "swiglu_alpha",
    "text_config",
    "dim",
    "multiple_of",
    "ffn_dim_multiplier",
    "d_model",
    "n_embd",
    "d_ff",
    "ffn_hidden_size",
    "hidden_dim",
    "n_inner",
    "no_bias",
    "add_bias_linear",
    "mlp_fc1_bias",
    "mlp_fc2_bias",
    "quantization_config",
    "activation_sparsity_pattern",
    "num_hidden_layers",
    "vocab_size",
    "torch_dtype",
    "weight_map",
    "metadata",
];
const WORDS: [&str; 14] = [
    "silu",
    "gelu",
    "relu",
    "linear",
    "swish(1.5)",
    "swish(inf)",
    "swish(",
    "gated-gelu",
    "gated-",
    "gpt_oss",
    "qwen",
    "gemma",
    "llama",
    "glu",
];
/// For each family its names (gate, up and down, or the fused tensor and down), and the family to
/// request.
const FAMILIES: [(&[&str], Family); 13] = [
    (&["gate_proj", "up_proj", "down_proj"], Family::Llama),
    (&["w1", "w3", "w2"], Family::Meta),
    (&["w1", "w2", "w3"], Family::Xformers),
    (&["w2", "w1", "c_proj"], Family::Qwen1),
    (&["gate_up_proj", "down_proj"], Family::Phi3),
    (&["dense_h_to_4h", "dense_4h_to_h"], Family::ChatGlm),
    (&["w12", "w3"], Family::Dinov2),
    (&["up_gate_proj", "down_proj"], Family::Stella),
    (&["fc1", "fc2"], Family::FlashAttn),
    (&["gate_up_proj", "down_proj"], Family::Interleaved),
    (&["fc12", "fc11", "fc2"], Family::Nomic),
    (&["wi_0", "wi_1", "wo"], Family::T5),
    (&["ffn_gate", "ffn_up", "ffn_down"], Family::Gguf),
];

fn pick<T: Copy>(list: &[T], at: u8) -> T {
    list[usize::from(at) % list.len()]
}

fn joined(prefix: u8, rest: &str) -> String {
    let prefix = pick(&PREFIXES, prefix);
    if prefix.is_empty() { rest.to_string() } else { format!("{prefix}.{rest}") }
}

fn ending(bias: bool) -> &'static str {
    if bias { "bias" } else { "weight" }
}

impl Sizes {
    fn hidden(self) -> u64 {
        u64::from(self.0 % 16) + 1
    }

    fn intermediate(self) -> u64 {
        u64::from(self.1 % 16) + 1
    }
}

impl Name {
    fn text(&self) -> String {
        match self {
            Name::Text(text) => text.clone(),
            Name::Known { prefix, family, piece, bias } => joined(
                *prefix,
                &format!("{}.{}", pick(pick(&FAMILIES, *family).0, *piece), ending(*bias)),
            ),
        }
    }
}

impl Dim {
    fn size(&self, sizes: Sizes) -> u64 {
        match *self {
            Dim::H => sizes.hidden(),
            Dim::I => sizes.intermediate(),
            Dim::TwiceI => 2 * sizes.intermediate(),
            Dim::Small(n) => u64::from(n),
            Dim::Edge(at) => pick(&EDGES, at),
            Dim::Any(n) => n,
        }
    }
}

impl Json {
    fn value(&self) -> Value {
        match self {
            Json::Null => Value::Null,
            Json::Bool(value) => json!(value),
            Json::Small(value) => json!(value),
            Json::Edge(at) => json!(pick(&EDGES, *at)),
            Json::Integer(value) => json!(value),
            Json::Float(value) => json!(value),
            Json::Word(at) => json!(pick(&WORDS, *at)),
            Json::Text(text) => json!(text),
            Json::Array(values) => values.iter().map(Json::value).collect(),
            Json::Fields(fields) => Value::Object(object(fields).collect()),
        }
    }
}

fn object(fields: &[(u8, Json)]) -> impl Iterator<Item = (String, Value)> {
    fields.iter().map(|(name, value)| (pick(&FIELDS, *name).to_string(), value.value()))
}

// ---------------------------------------------------------------- 2. the files

/// A safetensors file to which tensors are added.
#[derive(Default)]
struct Listing {
    entries: Map<String, Value>,
    /// Offset of the next tensor. An entry of the header may claim more bytes than the file has.
    end: u64,
}

impl Listing {
    const LARGEST: u64 = 1 << 16;

    fn add(&mut self, name: String, dtype: u8, shape: &[u64], shift: (i8, i8)) {
        let (dtype, bits) = pick(&DTYPES, dtype);
        let bits = shape
            .iter()
            .try_fold(bits, |product, &dim| product.checked_mul(dim))
            .unwrap_or(u64::MAX);
        let start = self.end;
        let end = start.saturating_add(bits / 8);
        if end <= Self::LARGEST {
            self.end = end;
        }
        let offsets = [
            start.saturating_add_signed(shift.0.into()),
            end.saturating_add_signed(shift.1.into()),
        ];
        self.entries.insert(name, json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
    }

    fn add_block(&mut self, block: &Block, sizes: Sizes) {
        let (names, _) = pick(&FAMILIES, block.family);
        let (h, i) = (sizes.hidden(), sizes.intermediate());
        for (at, name) in names.iter().enumerate() {
            let (rows, columns) = match (at + 1 == names.len(), names.len()) {
                (true, _) => (h, i),
                (false, 2) => (2 * i, h),
                (false, _) => (i, h),
            };
            self.add(
                joined(block.prefix, &format!("{name}.weight")),
                block.dtype,
                &[rows, columns],
                (0, 0),
            );
            if block.bias {
                self.add(
                    joined(block.prefix, &format!("{name}.bias")),
                    block.dtype,
                    &[rows],
                    (0, 0),
                );
            }
        }
    }

    fn file(self, fill: u8) -> Vec<u8> {
        let data = (0..self.end).map(|at| fill.wrapping_mul(at as u8 | 1) & 0xbf); // rarely a NaN
        let header = Value::Object(self.entries).to_string();
        (header.len() as u64).to_le_bytes().into_iter().chain(header.bytes()).chain(data).collect()
    }
}

impl Contents {
    /// The bytes of the file, and the names of its tensors.
    fn file(&self, sizes: Sizes) -> (Vec<u8>, Vec<String>) {
        match self {
            Contents::Bytes(bytes) => (bytes.clone(), vec![]),
            Contents::Header { header, length, data } => {
                let mut bytes = length.unwrap_or(header.len() as u64).to_le_bytes().to_vec();
                bytes.extend(header.bytes());
                bytes.resize(bytes.len() + usize::from(*data), 0);
                (bytes, vec![])
            }
            Contents::Tensors { blocks, others, fill, damage, cut } => {
                let mut listing = Listing::default();
                blocks.iter().take(3).for_each(|block| listing.add_block(block, sizes));
                for Other { name, dtype, shape, shift } in others {
                    let shape: Vec<u64> = shape.iter().map(|dim| dim.size(sizes)).collect();
                    listing.add(name.text(), *dtype, &shape, shift.unwrap_or_default());
                }
                let names = listing.entries.keys().cloned().collect();
                let mut bytes = listing.file(*fill);
                for &(at, value) in damage {
                    let at = usize::from(at) % bytes.len();
                    bytes[at] = value;
                }
                bytes.truncate(cut.map_or(bytes.len(), usize::from));
                (bytes, names)
            }
        }
    }
}

impl Input {
    /// Writes all files to the directory.
    fn write(&self, dir: &Path) -> std::io::Result<()> {
        let mut places = Map::new();
        for (name, contents) in self.files.iter().take(4) {
            let name = pick(&FILES, *name);
            let (bytes, tensors) = contents.file(self.sizes);
            fs::write(dir.join(name), bytes)?;
            places.extend(tensors.into_iter().map(|tensor| (tensor, json!(name))));
        }
        let index = match &self.index {
            Index::None => None,
            Index::Bytes(bytes) => Some(bytes.clone()),
            Index::Honest => Some(json!({"weight_map": places}).to_string().into_bytes()),
            Index::Places(more) => {
                places.extend(more.iter().map(|(name, shard)| (name.text(), json!(shard.text()))));
                Some(json!({"weight_map": places}).to_string().into_bytes())
            }
        };
        if let Some(index) = index {
            fs::write(dir.join("model.safetensors.index.json"), index)?;
        }
        match &self.config {
            Config::None => Ok(()),
            Config::Bytes(bytes) => fs::write(dir.join("config.json"), bytes),
            Config::Fields(fields) => {
                let sizes = [
                    ("hidden_size", self.sizes.hidden()),
                    ("intermediate_size", self.sizes.intermediate()),
                ]
                .into_iter();
                let all: Map<_, _> = sizes
                    .map(|(name, n)| (name.to_string(), json!(n)))
                    .chain(object(fields))
                    .collect();
                fs::write(dir.join("config.json"), Value::Object(all).to_string())
            }
        }
    }
}

impl Shard {
    fn text(&self) -> &str {
        match self {
            Shard::File(at) => pick(&FILES, *at),
            Shard::Odd(at) => pick(&ODD_SHARDS, *at),
            Shard::Text(text) => text,
        }
    }
}

// ---------------------------------------------------------------- 3. everything is loaded

/// Checks that an error has a message, and that candle's error keeps it.
fn checked<T>(result: Result<T, Error>) -> Option<T> {
    result
        .map_err(|error| {
            let message = error.to_string();
            assert!(!message.is_empty());
            assert_eq!(candle_core::Error::from(error).to_string(), message);
        })
        .ok()
}

fn one_row(layer: &dyn Module, input: usize, output: usize, dtype: DType) {
    let x = Tensor::ones((1, input), DType::F32, &Device::Cpu)
        .and_then(|x| x.to_dtype(dtype))
        .expect("a row");
    let y = layer.forward(&x).expect("a loaded layer accepts a row");
    assert_eq!((y.dims(), y.dtype()), (&[1, output][..], dtype));
}

fn load_all(input: &Input, dir: &Path) {
    let Some(checkpoint) = checked(Checkpoint::open(dir)) else { return };
    let dtype =
        pick(&[DType::F32, DType::BF16, DType::F16, DType::F64, DType::U32], input.load.dtype);
    let vb = checkpoint.var_builder(dtype, &Device::Cpu);
    let _ = (
        format!("{checkpoint:?}"),
        checkpoint.data_bytes(),
        checkpoint.contains("mlp.up_proj.weight"),
    );
    for name in checkpoint.names() {
        let Some(tensor) = checked(checkpoint.tensor(name, dtype, &Device::Cpu)) else { continue };
        assert_eq!(tensor.dtype(), dtype);
        if let (Some(prefix), Ok((rows, columns))) = (name.strip_suffix(".weight"), tensor.dims2())
        {
            let Some(linear) = checked(Linear::load(columns, rows, vb.pp(prefix))) else {
                continue;
            };
            one_row(&linear, columns, rows, dtype);
        }
    }
    let sizes = (input.sizes.hidden() as usize, input.sizes.intermediate() as usize);
    let given = FfnConfig::new(sizes.0, sizes.1).with_bias(input.load.bias);
    let configs = [checked(FfnConfig::from_json(checkpoint.config())), Some(given)];
    for mut cfg in configs.into_iter().flatten() {
        if let Some(family) = input.load.family {
            cfg = cfg.with_family(pick(&FAMILIES, family).1);
        }
        let prefix = pick(&PREFIXES, input.load.prefix);
        let vb = if prefix.is_empty() { vb.clone() } else { vb.pp(prefix) };
        if let Some(ffn) = checked(SwiGluFfn::new(&cfg, vb)) {
            one_row(&ffn, cfg.hidden_size, cfg.hidden_size, dtype);
        }
    }
}

fuzz_target!(|input: Input| {
    let memory = Path::new("/dev/shm"); // in memory, if it exists
    let parent = if memory.is_dir() { memory.to_path_buf() } else { std::env::temp_dir() };
    let dir = tempfile::Builder::new()
        .prefix("candle-swiglu-fuzz")
        .tempdir_in(parent)
        .expect("a directory");
    input.write(dir.path()).expect("written files");
    load_all(&input, dir.path());
});
