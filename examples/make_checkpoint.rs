//! Writes a LLaMA checkpoint of random weights in Hugging Face layout, for measuring memory and
//! speed at any size.
//!
//! ```text
//! cargo run --release --example make_checkpoint -- --out DIR --layers 2
//! ```
//!
//! Only one tensor is in memory at a time. The same flags and seed give the same bytes.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use half::{bf16, f16};
use safetensors::{Dtype, View};
use serde_json::json;

/// Write a LLaMA checkpoint of random weights
#[derive(Parser)]
struct Args {
    /// The directory to write; created if it is not there
    #[arg(long)]
    out: PathBuf,
    /// A published size; the flags below change single numbers of it [default: 8b with two layers]
    #[arg(long, value_enum)]
    preset: Option<Preset>,
    /// Width of the model, a multiple of twice the heads
    #[arg(long)]
    hidden_size: Option<usize>,
    /// Width of the feed-forward block
    #[arg(long)]
    intermediate_size: Option<usize>,
    /// Number of layers
    #[arg(long)]
    layers: Option<usize>,
    /// Number of attention heads
    #[arg(long)]
    heads: Option<usize>,
    /// Number of key and value heads
    #[arg(long)]
    kv_heads: Option<usize>,
    /// Number of tokens
    #[arg(long)]
    vocab: Option<usize>,
    /// The output projection is the embedding
    #[arg(long)]
    tie_embeddings: bool,
    /// Of all tensors
    #[arg(long, value_enum, default_value_t = FloatType::Bf16)]
    dtype: FloatType,
    /// Most bytes of tensors in one file; a larger tensor gets a file of its own
    #[arg(long, default_value_t = 5_000_000_000)]
    shard_size: u64,
    /// Of the random weights
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Replace the checkpoint that is there
    #[arg(long)]
    force: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Preset {
    /// LLaMA 3 8B
    #[value(name = "8b")]
    Llama8b,
    /// LLaMA 3.2 1B
    #[value(name = "1b")]
    Llama1b,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum FloatType {
    Bf16,
    F16,
    F32,
}

/// The sizes of a LLaMA.
struct Sizes {
    hidden: usize,
    intermediate: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    vocab: usize,
    tied: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let sizes = Sizes::new(&args)?;
    prepare(&args.out, args.force)?;
    let shards = split(tensors(&sizes, args.dtype.dtype(), args.seed), args.shard_size);
    write(&args.out, shards)?;
    // Written last, so that a directory with a config is complete.
    save_json(&args.out.join("config.json"), &sizes.config(args.dtype))
}

impl Sizes {
    fn new(args: &Args) -> Result<Self> {
        let eight = Self {
            hidden: 4096,
            intermediate: 14336,
            layers: 32,
            heads: 32,
            kv_heads: 8,
            vocab: 128256,
            tied: false,
        };
        let base = match args.preset {
            None => Self { layers: 2, ..eight },
            Some(Preset::Llama8b) => eight,
            Some(Preset::Llama1b) => {
                Self { hidden: 2048, intermediate: 8192, layers: 16, tied: true, ..eight }
            }
        };
        let sizes = Self {
            hidden: args.hidden_size.unwrap_or(base.hidden),
            intermediate: args.intermediate_size.unwrap_or(base.intermediate),
            layers: args.layers.unwrap_or(base.layers),
            heads: args.heads.unwrap_or(base.heads),
            kv_heads: args.kv_heads.unwrap_or(base.kv_heads),
            vocab: args.vocab.unwrap_or(base.vocab),
            tied: args.tie_embeddings || base.tied,
        };
        sizes.check()?;
        Ok(sizes)
    }

    fn check(&self) -> Result<()> {
        let Self { hidden, intermediate, layers, heads, kv_heads, vocab, .. } = *self;
        for (flag, size) in [
            ("--hidden-size", hidden),
            ("--intermediate-size", intermediate),
            ("--layers", layers),
            ("--heads", heads),
            ("--kv-heads", kv_heads),
            ("--vocab", vocab),
        ] {
            ensure!((1..=1 << 24).contains(&size), "{flag}: expected 1 to 2^24, found {size}");
        }
        ensure!(
            hidden % (2 * heads) == 0,
            "--hidden-size {hidden}: expected a multiple of twice --heads {heads}"
        );
        ensure!(
            heads % kv_heads == 0,
            "--heads {heads}: expected a multiple of --kv-heads {kv_heads}"
        );
        Ok(())
    }

    /// The `config.json`, in the format of LLaMA 3.
    fn config(&self, dtype: FloatType) -> serde_json::Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden / self.heads,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "attention_bias": false,
            "mlp_bias": false,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "max_position_embeddings": 8192,
            // The last 256 tokens are the special ones: 128000 and 128001 of 128256.
            "bos_token_id": self.vocab.saturating_sub(256),
            "eos_token_id": self.vocab.saturating_sub(255).min(self.vocab - 1),
            "torch_dtype": dtype.torch_name(),
        })
    }
}

impl FloatType {
    fn dtype(self) -> Dtype {
        match self {
            Self::Bf16 => Dtype::BF16,
            Self::F16 => Dtype::F16,
            Self::F32 => Dtype::F32,
        }
    }

    fn torch_name(self) -> &'static str {
        match self {
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
            Self::F32 => "float32",
        }
    }
}

/// A tensor whose values are generated while they are written.
struct Random {
    shape: Vec<usize>,
    dtype: Dtype,
    seed: u64,
}

impl View for Random {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let values = self.values();
        Cow::Owned(match self.dtype {
            Dtype::BF16 => {
                bytes(values, |value| bf16::from_f32(value).to_le_bytes(), self.data_len())
            }
            Dtype::F16 => {
                bytes(values, |value| f16::from_f32(value).to_le_bytes(), self.data_len())
            }
            _ => bytes(values, f32::to_le_bytes, self.data_len()),
        })
    }
}

impl Random {
    /// Ones for a norm's weight, else values around 0 with standard deviation 0.02. The sum of four
    /// uniform 16-bit numbers, each of variance 2^32 / 12, is close enough to a normal
    /// distribution.
    fn values(&self) -> impl Iterator<Item = f32> + use<> {
        let (seed, norm) = (self.seed, self.shape.len() == 1);
        let scale = 0.02 / (4f32 / 12.0).sqrt() / 65536.0;
        (0u64..).map(move |i| {
            let bits = splitmix64(seed.wrapping_add(i));
            let sum: u32 =
                [0, 16, 32, 48].map(|shift| u32::from((bits >> shift) as u16)).iter().sum();
            if norm { 1.0 } else { (sum as f32 - 2.0 * 65535.0) * scale }
        })
    }
}

fn bytes<const N: usize>(
    values: impl Iterator<Item = f32>,
    encode: impl Fn(f32) -> [u8; N],
    length: usize,
) -> Vec<u8> {
    let mut bytes = vec![0; length];
    for (target, value) in bytes.chunks_exact_mut(N).zip(values) {
        target.copy_from_slice(&encode(value));
    }
    bytes
}

/// The i-th output of SplitMix64 (Steele, Lea, Flood 2014), computed without the previous ones.
fn splitmix64(i: u64) -> u64 {
    let z = i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// All tensors in the order of the model, by their names in Hugging Face checkpoints.
fn tensors(sizes: &Sizes, dtype: Dtype, seed: u64) -> Vec<(String, Random)> {
    let Sizes { hidden: h, intermediate: i, vocab, .. } = *sizes;
    let kv = h / sizes.heads * sizes.kv_heads;
    let mut all = vec![];
    let mut add = |name: String, shape: &[usize]| {
        let seed = splitmix64(splitmix64(seed).wrapping_add(all.len() as u64));
        all.push((name, Random { shape: shape.to_vec(), dtype, seed }));
    };
    add("model.embed_tokens.weight".into(), &[vocab, h]);
    for layer in 0..sizes.layers {
        for (name, shape) in [
            ("input_layernorm", &[h][..]),
            ("self_attn.q_proj", &[h, h]),
            ("self_attn.k_proj", &[kv, h]),
            ("self_attn.v_proj", &[kv, h]),
            ("self_attn.o_proj", &[h, h]),
            ("post_attention_layernorm", &[h]),
            ("mlp.gate_proj", &[i, h]),
            ("mlp.up_proj", &[i, h]),
            ("mlp.down_proj", &[h, i]),
        ] {
            add(format!("model.layers.{layer}.{name}.weight"), shape);
        }
    }
    add("model.norm.weight".into(), &[h]);
    if !sizes.tied {
        add("lm_head.weight".into(), &[vocab, h]);
    }
    all
}

/// Splits the tensors into shards, in order, as many to a shard as fit.
fn split(tensors: Vec<(String, Random)>, shard_size: u64) -> Vec<Vec<(String, Random)>> {
    let mut shards: Vec<Vec<_>> = vec![];
    let mut room = 0;
    for (name, tensor) in tensors {
        let size = tensor.data_len() as u64;
        if shards.is_empty() || size > room {
            shards.push(vec![]);
            room = shard_size;
        }
        room = room.saturating_sub(size);
        if let Some(shard) = shards.last_mut() {
            shard.push((name, tensor));
        }
    }
    shards
}

/// Creates the directory. With `force`, removes the checkpoint that it contains.
fn prepare(out: &Path, force: bool) -> Result<()> {
    std::fs::create_dir_all(out).with_context(|| format!("{}: cannot be made", out.display()))?;
    for entry in
        std::fs::read_dir(out).with_context(|| format!("{}: cannot be read", out.display()))?
    {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let weights = name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json");
        if weights || name == "config.json" {
            ensure!(
                force,
                "{}: there is a checkpoint already (--force replaces it)",
                path.display()
            );
            std::fs::remove_file(&path)
                .with_context(|| format!("{}: cannot be removed", path.display()))?;
        }
    }
    Ok(())
}

/// Writes `model.safetensors`, or the shards and their index. Each file is streamed, and renamed to
/// its final name when it is complete.
fn write(out: &Path, shards: Vec<Vec<(String, Random)>>) -> Result<()> {
    let n = shards.len();
    let (mut weight_map, mut total_size) = (serde_json::Map::new(), 0);
    for (k, shard) in (1..).zip(shards) {
        let file = if n == 1 {
            "model.safetensors".to_string()
        } else {
            format!("model-{k:05}-of-{n:05}.safetensors")
        };
        let size: u64 = shard.iter().map(|(_, tensor)| tensor.data_len() as u64).sum();
        total_size += size;
        eprintln!("{file}: {} tensors, {:.2} GB", shard.len(), size as f64 / 1e9);
        weight_map.extend(shard.iter().map(|(name, _)| (name.clone(), json!(file))));
        let path = out.join(&file);
        let metadata = [("format".to_string(), "pt".to_string())].into();
        safetensors::serialize_to_file(shard, Some(metadata), &path)
            .with_context(|| format!("{}: cannot be written", path.display()))?;
    }
    if n > 1 {
        let index = json!({"metadata": {"total_size": total_size}, "weight_map": weight_map});
        save_json(&out.join("model.safetensors.index.json"), &index)?;
    }
    Ok(())
}

fn save_json(path: &Path, json: &serde_json::Value) -> Result<()> {
    std::fs::write(path, format!("{json:#}\n"))
        .with_context(|| format!("{}: cannot be written", path.display()))
}
