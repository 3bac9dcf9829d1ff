//! LLaMA, for inference and for training, with [`SwiGluFfn`] as its MLP and [`Linear`] for every
//! other projection:
//!
//! ```text
//! x = embed(tokens)                                   (B,T) -> (B,T,hidden)
//! x = x + o(attention(q(n), k(n), v(n)))              n = rms_norm(x), every layer
//! x = x + down(act(gate(n)) * up(n))                  n = rms_norm(x)
//! logits = lm_head(rms_norm(x))                       (B,T,vocab)
//! ```
//!
//! Mistral adds a sliding window, Qwen2 biases, Qwen3 norms of each query and key head, SmolLM3
//! layers without rotary embedding, Phi-3 packed projections, and Granite factors of the embedding,
//! the scores, the residuals and the logits.
//!
//! Values are rounded where transformers rounds them. Norms are computed in f32 and rounded before
//! the multiplication by their weight. The softmax is in f32. Rotary tables are in the model's
//! dtype, and rotated queries and keys are rounded. On the CPU the intermediate values of attention
//! are in f32. The logits are f32 sums that are not rounded to the model's dtype.
//!
//! This file is a module of the example, of `tests/llama.rs`, of `examples/train.rs` and of
//! `examples/glu_variants`.
#![allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "each of the programs that include this module uses a part of it"
)]

#[path = "adapter.rs"]
mod adapter;
#[path = "attend.rs"]
mod attend;
#[path = "attention.rs"]
mod attention;
#[path = "cache.rs"]
mod cache;
#[path = "config.rs"]
pub mod config;
#[path = "fields.rs"]
mod fields;
#[path = "model_type.rs"]
mod model_type;
#[path = "names.rs"]
mod names;
#[path = "norm.rs"]
mod norm;
#[path = "residual.rs"]
mod residual;
#[path = "rope.rs"]
mod rope;
#[path = "rope_config.rs"]
mod rope_config;
#[path = "rows.rs"]
mod rows;
#[path = "softmax.rs"]
mod softmax;

use std::fmt::Debug;
use std::sync::Arc;

use candle_core::{DType, Device, Error, Result, Tensor, bail};
use candle_nn::{Init, Module, VarBuilder};
use candle_swiglu::{Checkpoint, Linear, LoraAdapter, SwiGluFfn};

pub use self::cache::Cache;
pub use self::config::LlamaConfig;
pub use self::names::{Unread, check_all_read, ignore_unread};

use self::adapter::Pairs;
use self::attention::{Attention, Step, attention_dtype};
use self::cache::KvSlot;
use self::config::LayerConfig;
use self::names::{Head, Names};
use self::norm::Norm;

/// The feed-forward block of a layer, x (B,T,hidden) -> (B,T,hidden).
pub trait Mlp: Module + Debug + Send + Sync {
    /// The name of the kernel that runs it.
    fn kernel(&self) -> &str;
}

impl Mlp for SwiGluFfn {
    fn kernel(&self) -> &str {
        self.kernel()
    }
}

/// Builds the MLP of the layer with this number from the weights under `vb`'s prefix.
pub type BuildMlp<'a> = &'a dyn Fn(usize, VarBuilder) -> Result<Arc<dyn Mlp>>;

/// The model. A clone shares the weights. The state of a text is stored in a [`Cache`].
#[derive(Debug, Clone)]
pub struct Llama {
    /// (vocab, hidden). None if it is `lm_head`'s weight, so that there is only one copy.
    embed_tokens: Option<Tensor>,
    layers: Vec<Layer>,
    norm: Norm,
    lm_head: Linear,
    dtype: DType,
    device: Device,
    cfg: LlamaConfig,
    notes: Vec<String>,
}

impl Llama {
    /// Loads the model of a checkpoint. The prefix of its names is `model.`, empty (a model saved
    /// without its head), or a longer one. [`Llama::notes`] lists the differences between the
    /// checkpoint and its config.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape; no head although the config does not tie it
    /// to the embedding; a tensor that the model does not read, unless [`ignore_unread`] has marked
    /// it.
    pub fn open(
        checkpoint: &Checkpoint,
        cfg: &LlamaConfig,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        Self::open_with_adapter(checkpoint, cfg, None, dtype, device)
    }

    /// [`Llama::open`] with the low-rank pairs of an adapter (LoRA) on the projections of attention
    /// and MLP and on the head.
    ///
    /// # Errors
    /// Also a pair of other sizes than its projection's, or for a module that the model lacks.
    pub fn open_with_adapter(
        checkpoint: &Checkpoint,
        cfg: &LlamaConfig,
        adapter: Option<&LoraAdapter>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let names = Names::find(checkpoint, cfg)?;
        // Checked before any weight is read.
        names.unknown(checkpoint, cfg).map_or(Ok(()), |unread| Err(unread.into_error()))?;
        let vb = checkpoint.var_builder(dtype, device);
        let model_name = names.model.clone();
        let pairs = Pairs::new(adapter, &model_name);
        let mlp = |_, vb: VarBuilder| -> Result<Arc<dyn Mlp>> {
            Ok(Arc::new(pairs.swiglu(&cfg.ffn, vb)?))
        };
        let model = Self::with_names(vb, cfg, names, &mlp, pairs)?;
        check_all_read(checkpoint).map_err(Unread::into_error)?;
        pairs.check_used()?;
        Ok(model)
    }

    /// Loads the model from `vb`, whose prefix is the root of the names (`model.embed_tokens`,
    /// `lm_head`, ...). The head is the embedding if the config ties them.
    ///
    /// With the `VarBuilder` of a `VarMap` the variables are created, and [`Llama::forward_all`]
    /// has a gradient. Candle's fused operations have no gradient, so they are used only where no
    /// variable is involved.
    pub fn load(vb: VarBuilder, cfg: &LlamaConfig) -> Result<Self> {
        Self::load_with(vb, cfg, &|_, vb| Ok(Arc::new(SwiGluFfn::new(&cfg.ffn, vb)?)))
    }

    /// [`Llama::load`] with the MLPs that `mlp` builds.
    pub fn load_with(vb: VarBuilder, cfg: &LlamaConfig, mlp: BuildMlp) -> Result<Self> {
        Self::with_names(vb, cfg, Names::usual(cfg), mlp, Pairs::NONE)
    }

    fn with_names(
        vb: VarBuilder,
        cfg: &LlamaConfig,
        names: Names,
        mlp: BuildMlp,
        pairs: Pairs,
    ) -> Result<Self> {
        let model = if names.model.is_empty() { vb.clone() } else { vb.pp(&names.model) };
        let shape = (cfg.vocab_size, cfg.hidden_size);
        let normal = Init::Randn { mean: 0.0, stdev: 0.02 };
        let embed_tokens = || model.pp("embed_tokens").get_with_hints(shape, "weight", normal);
        let sizes = (cfg.hidden_size, cfg.vocab_size);
        let lm_head = |name: &str| pairs.linear(sizes, false, vb.pp(name));
        let (embed_tokens, lm_head) = match &names.head {
            Head::Embedding => {
                (None, pairs.adapted(Linear::new(embed_tokens()?, None)?, "lm_head")?)
            }
            Head::Own(name) => (Some(embed_tokens()?), lm_head(name)?),
            Head::Both(name) => (None, lm_head(name)?),
        };
        let layer = |(i, layer): (usize, &LayerConfig)| {
            let vb = model.pp("layers").pp(i);
            Layer::load(cfg, *layer, mlp(i, vb.pp("mlp"))?, vb, pairs)
        };
        let layers = cfg.layers.iter().enumerate().map(layer).collect::<Result<Vec<_>>>()?;
        let norm = Norm::load(cfg.hidden_size, cfg.rms_norm_eps, model.pp("norm"))?;
        let (dtype, device) = (vb.dtype(), vb.device().clone());
        Ok(Self {
            embed_tokens,
            layers,
            norm,
            lm_head,
            dtype,
            device,
            cfg: cfg.clone(),
            notes: names.notes,
        })
    }

    /// tokens (B,T) u32, the first at position `index_pos` -> logits after the last, (B,vocab) f32.
    ///
    /// For inference: no gradient flows through the cache.
    ///
    /// # Errors
    /// When a token id is not in the vocabulary, `index_pos` is not the number of positions in the
    /// cache, or the positions reach beyond `max_position_embeddings`.
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

    /// The differences between the checkpoint and its config, in sentences.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// tokens (B,T) -> (B,T,hidden) before the last norm, or (B,index_pos+T,hidden) if the whole
    /// text is computed again.
    fn hidden(&self, tokens: &Tensor, index_pos: usize, cache: &mut Cache) -> Result<Tensor> {
        self.check_tokens(tokens)?;
        cache.check(index_pos, tokens.dims2()?.1)?;
        let tokens = cache.continued(tokens)?;
        let (start, (batch, len)) = (cache.positions(), tokens.dims2()?);
        let x = match &self.embed_tokens {
            Some(table) => table.index_select(&tokens.flatten_all()?, 0)?.reshape((
                batch,
                len,
                self.cfg.hidden_size,
            ))?,
            None => self.lm_head.embed(&tokens)?,
        };
        let mut x = scaled(x, self.cfg.embedding_multiplier)?;

        let dtype = attention_dtype(self.dtype(), self.device());
        let tables = cache.tables((start, len), self.dtype(), dtype, self.device())?;
        let step = Step::new(len, start + len, self.cfg.sliding_window, tables)?;
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(&x, &step, cache.layer(i))?;
        }
        cache.advance(len);
        Ok(x)
    }

    /// x (..,hidden) -> (..,vocab), in f32 (f64 for a model in f64)
    fn logits(&self, x: &Tensor) -> Result<Tensor> {
        let _span = tracing::trace_span!("lm_head").entered();
        let x = self.norm.forward(x)?;
        let logits = if self.dtype() == DType::F64 {
            self.lm_head.forward(&x)?
        } else {
            self.lm_head.forward_f32(&x)?
        };
        scaled(logits, 1.0 / self.cfg.logits_scaling)
    }

    fn check_tokens(&self, tokens: &Tensor) -> Result<()> {
        let ids = tokens.flatten_all()?.to_vec1::<u32>()?;
        if ids.is_empty() {
            bail!("tokens: expected at least one, found shape {:?}", tokens.dims())
        }
        match ids.iter().find(|&&id| id as usize >= self.cfg.vocab_size) {
            Some(id) => bail!(
                "token id {id} is not in the vocabulary of {} (vocab_size)",
                self.cfg.vocab_size
            ),
            None => Ok(()),
        }
    }
}

#[derive(Debug, Clone)]
struct Layer {
    input_layernorm: Norm,
    self_attn: Attention,
    post_attention_layernorm: Norm,
    mlp: Arc<dyn Mlp>,
    residual_multiplier: f64,
}

impl Layer {
    fn load(
        cfg: &LlamaConfig,
        layer: LayerConfig,
        mlp: Arc<dyn Mlp>,
        vb: VarBuilder,
        pairs: Pairs,
    ) -> Result<Self> {
        let norm = |name| Norm::load(cfg.hidden_size, cfg.rms_norm_eps, vb.pp(name));
        Ok(Self {
            input_layernorm: norm("input_layernorm")?,
            self_attn: Attention::load(cfg, layer, vb.pp("self_attn"), pairs)?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            mlp,
            residual_multiplier: cfg.residual_multiplier,
        })
    }

    /// x (B,T,hidden) -> (B,T,hidden)
    fn forward(&self, x: &Tensor, step: &Step, cache: Option<KvSlot>) -> Result<Tensor> {
        let attended = self.self_attn.forward(&self.input_layernorm.forward(x)?, step, cache)?;
        let x = residual::add(x, &scaled(attended, self.residual_multiplier)?)?;
        let normed = self.post_attention_layernorm.forward(&x)?;
        let _span = tracing::trace_span!("mlp").entered();
        residual::add(&x, &scaled(self.mlp.forward(&normed)?, self.residual_multiplier)?)
    }
}

/// x * factor, rounded once. candle's product of f16 or bf16 would round the factor too.
fn scaled(x: Tensor, factor: f64) -> Result<Tensor> {
    match x.dtype() {
        _ if factor == 1.0 => Ok(x),
        dtype @ (DType::F16 | DType::BF16) => (x.to_dtype(DType::F32)? * factor)?.to_dtype(dtype),
        _ => x * factor,
    }
}
