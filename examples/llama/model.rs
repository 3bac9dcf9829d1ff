//! LLaMA, for inference and for training, with [`SwiGluFfn`] as its MLP and [`Linear`] for every other projection:
//!
//! ```text
//! x = embed(tokens)                                   (B,T) -> (B,T,hidden)
//! x = x + o(attention(q(n), k(n), v(n)))              n = rms_norm(x), every layer
//! x = x + down(act(gate(n)) * up(n))                  n = rms_norm(x)
//! logits = lm_head(rms_norm(x))                       (B,T,vocab)
//! ```
//!
//! The places of rounding are those of transformers: norms in f32, rounded before the weight; logits and softmax in f32;
//! rotary tables in the model's dtype; what is rotated is rounded. On the CPU attention of that is f32 up to its result.
//!
//! This file is a module of the example, of `tests/llama.rs` and of `examples/train.rs`.
#![allow(dead_code, unreachable_pub, reason = "each of the programs that include this module uses a part of it")]

#[path = "attend.rs"]
mod attend;
#[path = "attention.rs"]
mod attention;
#[path = "cache.rs"]
mod cache;
#[path = "config.rs"]
pub mod config;
#[path = "norm.rs"]
mod norm;
#[path = "rope.rs"]
mod rope;
#[path = "rows.rs"]
mod rows;
#[path = "softmax.rs"]
mod softmax;

use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::{Init, Module, VarBuilder};
use candle_swiglu::{Linear, SwiGluFfn, linear_b};

pub use self::cache::Cache;
pub use self::config::LlamaConfig;

use self::attention::{Attention, Step, attention_dtype};
use self::cache::KvSlot;
use self::norm::Norm;

/// The model. Cloning it shares the weights; the state of a text lives in a [`Cache`].
#[derive(Debug, Clone)]
pub struct Llama {
    /// (vocab, hidden); none where the weight is `lm_head`'s, of which there is one copy
    embed_tokens: Option<Tensor>,
    layers: Vec<Layer>,
    norm: Norm,
    lm_head: Linear,
    dtype: DType,
    device: Device,
    cfg: LlamaConfig,
}

impl Llama {
    /// Loads the model from `vb`, which is at the root of the names (`model.embed_tokens`, `lm_head`, ...).
    ///
    /// With the `VarBuilder` of a `VarMap` it is created there, and [`Llama::forward_all`] has a gradient: candle's fused
    /// operations, which have none, are used only where no variable is involved.
    pub fn load(vb: VarBuilder, cfg: &LlamaConfig) -> Result<Self> {
        let model = vb.pp("model");
        let normal = Init::Randn { mean: 0.0, stdev: 0.02 };
        let embed_tokens = || model.pp("embed_tokens").get_with_hints((cfg.vocab_size, cfg.hidden_size), "weight", normal);
        let (embed_tokens, lm_head) = match cfg.tie_word_embeddings {
            true => (None, Linear::new(embed_tokens()?, None)?),
            false => {
                let lm_head = linear_b(cfg.hidden_size, cfg.vocab_size, false, vb.pp("lm_head"))?;
                (Some(embed_tokens()?), lm_head)
            }
        };
        let layers = (0..cfg.num_hidden_layers).map(|i| Layer::load(cfg, model.pp("layers").pp(i)));
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let norm = Norm::load(cfg, model.pp("norm"))?;
        Ok(Self { embed_tokens, layers, norm, lm_head, dtype: vb.dtype(), device: vb.device().clone(), cfg: cfg.clone() })
    }

    /// tokens (B,T) u32, of which the first stands at `index_pos` -> logits after the last, (B,vocab) f32.
    ///
    /// For inference: no gradient flows through the cache.
    ///
    /// # Errors
    /// When a token id is not in the vocabulary, `index_pos` is not the number of positions in the cache, or the
    /// positions reach beyond `max_position_embeddings`.
    pub fn forward(&self, tokens: &Tensor, index_pos: usize, cache: &mut Cache) -> Result<Tensor> {
        let x = self.hidden(tokens, index_pos, cache)?;
        let last = x.narrow(1, x.dim(1)? - 1, 1)?.squeeze(1)?.contiguous()?; // (B,hidden)
        self.logits(&last)
    }

    /// tokens (B,T) u32 of whole texts -> logits after each of them, (B,T,vocab) f32.
    pub fn forward_all(&self, tokens: &Tensor) -> Result<Tensor> {
        let x = self.hidden(tokens, 0, &mut Cache::new(false, &self.cfg))?;
        self.logits(&x)
    }

    /// The name of the kernel that runs the MLP.
    pub fn kernel(&self) -> &str {
        self.layers.first().map_or("none", |layer| layer.mlp.kernel())
    }

    pub fn config(&self) -> &LlamaConfig {
        &self.cfg
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// tokens (B,T) -> (B,T,hidden), before the last norm.
    fn hidden(&self, tokens: &Tensor, index_pos: usize, cache: &mut Cache) -> Result<Tensor> {
        let (batch, len) = tokens.dims2()?;
        self.check_tokens(tokens)?;
        cache.check(index_pos, len)?;
        let mut x = match &self.embed_tokens {
            Some(table) => table.index_select(&tokens.flatten_all()?, 0)?.reshape((batch, len, self.cfg.hidden_size))?,
            None => self.lm_head.embed(tokens)?,
        };

        let dtype = attention_dtype(self.dtype(), self.device());
        let tables = cache.tables((index_pos, len), self.dtype(), dtype, self.device())?;
        let step = Step::new(len, index_pos + len, tables)?;
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(&x, &step, cache.layer(i))?;
        }
        cache.advance(len);
        Ok(x)
    }

    /// x (..,hidden) -> (..,vocab), in f32 (f64 for a model in f64)
    fn logits(&self, x: &Tensor) -> Result<Tensor> {
        let _span = tracing::trace_span!("lm_head").entered();
        let logits = self.lm_head.forward(&self.norm.forward(x)?)?;
        if logits.dtype() == DType::F64 { Ok(logits) } else { logits.to_dtype(DType::F32) }
    }

    fn check_tokens(&self, tokens: &Tensor) -> Result<()> {
        let ids = tokens.flatten_all()?.to_vec1::<u32>()?;
        if ids.is_empty() {
            bail!("tokens: expected at least one, found shape {:?}", tokens.dims())
        }
        match ids.iter().find(|&&id| id as usize >= self.cfg.vocab_size) {
            Some(id) => bail!("token id {id} is not in the vocabulary of {} (vocab_size)", self.cfg.vocab_size),
            None => Ok(()),
        }
    }
}

/// A matrix of the file, or a new variable from the normal distribution that LLaMA starts from.
fn normal(vb: &VarBuilder, out_dim: usize, in_dim: usize) -> Result<Tensor> {
    vb.get_with_hints((out_dim, in_dim), "weight", Init::Randn { mean: 0.0, stdev: 0.02 })
}

/// Puts the projections into a `VarMap`, where the layers then find them.
fn create_projections(vb: &VarBuilder, cfg: &LlamaConfig) -> Result<()> {
    let (hidden, inter) = (cfg.hidden_size, cfg.intermediate_size);
    let (q_dim, kv_dim) = (cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim);
    let shapes = [
        ("self_attn.q_proj", q_dim, hidden),
        ("self_attn.k_proj", kv_dim, hidden),
        ("self_attn.v_proj", kv_dim, hidden),
        ("self_attn.o_proj", hidden, q_dim),
        ("mlp.gate_proj", inter, hidden),
        ("mlp.up_proj", inter, hidden),
        ("mlp.down_proj", hidden, inter),
    ];
    for i in 0..cfg.num_hidden_layers {
        for (name, out_dim, in_dim) in shapes {
            normal(&vb.pp("model.layers").pp(i).pp(name), out_dim, in_dim)?;
        }
    }
    if !cfg.tie_word_embeddings {
        normal(&vb.pp("lm_head"), cfg.vocab_size, hidden)?;
    }
    Ok(())
}

#[derive(Debug, Clone)]
struct Layer {
    input_layernorm: Norm,
    self_attn: Attention,
    post_attention_layernorm: Norm,
    mlp: SwiGluFfn,
}

impl Layer {
    fn load(cfg: &LlamaConfig, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            input_layernorm: Norm::load(cfg, vb.pp("input_layernorm"))?,
            self_attn: Attention::load(cfg, vb.pp("self_attn"))?,
            post_attention_layernorm: Norm::load(cfg, vb.pp("post_attention_layernorm"))?,
            mlp: SwiGluFfn::new(&cfg.ffn, vb.pp("mlp"))?,
        })
    }

    /// x (B,T,hidden) -> (B,T,hidden)
    fn forward(&self, x: &Tensor, step: &Step, cache: Option<KvSlot>) -> Result<Tensor> {
        let x = (x + self.self_attn.forward(&self.input_layernorm.forward(x)?, step, cache)?)?;
        let normed = self.post_attention_layernorm.forward(&x)?;
        let _span = tracing::trace_span!("mlp").entered();
        &x + self.mlp.forward(&normed)?
    }
}
