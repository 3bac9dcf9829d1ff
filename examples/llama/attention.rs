//! Causal self-attention with grouped queries: several query heads share one key and value head,
//! which is not copied for them.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Module, VarBuilder};
use candle_swiglu::Linear;

use super::adapter::Pairs;
use super::cache::KvSlot;
use super::config::{LayerConfig, LlamaConfig, ModelType};
use super::norm::Norm;
use super::{attend, rope, softmax};

/// Positions of a block of queries. A long prompt thus needs memory for heads * 128 * positions
/// scores at a time.
const QUERY_BLOCK: usize = 128;

/// The projections q, k, v, o of one layer.
#[derive(Debug, Clone)]
pub struct Attention {
    qkv: Qkv,
    /// The norms of each query head and of each key head (Qwen3).
    qk_norm: Option<(Norm, Norm)>,
    o_proj: Linear,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// The factor of the scores.
    scale: f64,
    /// Whether queries and keys have rotary embedding.
    rope: bool,
    window: Option<usize>,
}

#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant, reason = "one per layer; on a GPU a device is many handles")]
enum Qkv {
    Separate {
        q_proj: Linear,
        k_proj: Linear,
        v_proj: Linear,
    },
    /// One matrix with the rows of q, of k and of v, in this order (Phi-3).
    Packed(Linear),
}

/// The values that all layers of one forward share.
pub struct Step {
    /// (T, pairs)
    cos: Tensor,
    sin: Tensor,
    mask: Option<Tensor>,
    /// The mask of layers with a sliding window.
    window_mask: Option<Tensor>,
}

/// The dtype in which attention computes. On the CPU it is f32 for f16 and bf16; queries, keys and
/// values keep their dtype until they are multiplied.
pub fn attention_dtype(dtype: DType, device: &Device) -> DType {
    match dtype {
        DType::F16 | DType::BF16 if device.is_cpu() => DType::F32,
        dtype => dtype,
    }
}

impl Step {
    /// The step for `queries` tokens that end at position `end`, with the rotary tables of their
    /// positions.
    pub fn new(
        queries: usize,
        end: usize,
        window: Option<usize>,
        (cos, sin): (Tensor, Tensor),
    ) -> Result<Self> {
        let (dtype, device) = (cos.dtype(), cos.device());
        let block = queries.min(QUERY_BLOCK);
        let mask = |keys, window| match softmax::needs_no_mask(queries, dtype, device) {
            true => Ok(None),
            false => softmax::causal_mask(block, keys, window, dtype, device).map(Some),
        };
        let window_mask = match window {
            Some(keys) => mask(end.min(keys.saturating_add(block - 1)), window)?,
            None => None,
        };
        Ok(Self { mask: mask(end, None)?, window_mask, cos, sin })
    }
}

impl Attention {
    /// Loads the projections from `vb`, whose prefix ends in `.self_attn`.
    pub fn load(
        cfg: &LlamaConfig,
        layer: LayerConfig,
        vb: VarBuilder,
        pairs: Pairs,
    ) -> Result<Self> {
        let (q_dim, hidden) = (cfg.num_attention_heads * cfg.head_dim, cfg.hidden_size);
        let norm = |name| Norm::load(cfg.head_dim, cfg.rms_norm_eps, vb.pp(name));
        Ok(Self {
            qkv: Qkv::load(cfg, &vb, pairs)?,
            qk_norm: match cfg.model_type {
                ModelType::Qwen3 => Some((norm("q_norm")?, norm("k_norm")?)),
                _ => None,
            },
            o_proj: pairs.linear((q_dim, hidden), cfg.o_bias, vb.pp("o_proj"))?,
            heads: cfg.num_attention_heads,
            kv_heads: cfg.num_key_value_heads,
            head_dim: cfg.head_dim,
            scale: cfg.attention_scale,
            rope: layer.rope,
            window: cfg.sliding_window.filter(|_| layer.sliding),
        })
    }

    /// x (B,T,hidden) -> (B,T,hidden), after appending its keys and values to `cache`.
    pub fn forward(&self, x: &Tensor, step: &Step, cache: Option<KvSlot>) -> Result<Tensor> {
        let _span = tracing::trace_span!("attn").entered();
        let (q, k, v) =
            self.qkv.forward(x, self.heads * self.head_dim, self.kv_heads * self.head_dim)?;
        let (mut q, mut k) =
            (self.split_heads(q, self.heads)?, self.split_heads(k, self.kv_heads)?);
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            (q, k) = (q_norm.forward(&q)?, k_norm.forward(&k)?);
        }
        let (q, k) = match self.rope {
            true => {
                (rope::rotate(&q, &step.cos, &step.sin)?, rope::rotate(&k, &step.cos, &step.sin)?)
            }
            false => (q.transpose(1, 2)?, k.transpose(1, 2)?),
        };
        let v = self.split_heads(v, self.kv_heads)?.to_dtype(k.dtype())?.transpose(1, 2)?;
        let (k, v) = match cache {
            Some(cache) => cache.append(&k, &v)?,
            None => (k.contiguous()?, v.contiguous()?),
        };
        let tracked = q.track_op() || k.track_op() || v.track_op();
        let y = match q.device().is_cpu() && q.dtype() != DType::F64 && !tracked {
            true => attend::attend(&q.transpose(1, 2)?, &k, &v, self.scale, self.window)?
                .flatten_from(2)?,
            false => self.attend(&q, &k, &v, step, x.dtype())?,
        };
        self.o_proj.forward(&y)
    }

    /// x (B,T,heads*D) -> (B,T,heads,D)
    fn split_heads(&self, x: Tensor, heads: usize) -> Result<Tensor> {
        let (batch, len, _) = x.dims3()?;
        x.reshape((batch, len, heads, self.head_dim))
    }

    /// q (B,H,T,D), k and v (B,KV,S,D) -> softmax(q·kᵀ·scale)·v (B,T,H*D) in `dtype`. The queries
    /// are at the last T of S positions. A block of them needs the keys from the start of the first
    /// query's window to the position of the last query.
    fn attend(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        step: &Step,
        dtype: DType,
    ) -> Result<Tensor> {
        let (batch, heads, len, head_dim) = q.dims4()?;
        let computed_in = step.cos.dtype();
        let (q, k, v) =
            (q.to_dtype(computed_in)?, k.to_dtype(computed_in)?, v.to_dtype(computed_in)?);
        let group = heads / self.kv_heads;
        let past = k.dim(2)? - len;
        let mask = if self.window.is_some() { &step.window_mask } else { &step.mask };
        let mut blocks = Vec::with_capacity(len.div_ceil(QUERY_BLOCK));
        for start in (0..len).step_by(QUERY_BLOCK) {
            let queries = QUERY_BLOCK.min(len - start);
            let end = past + start + queries;
            let first = softmax::visible(0, queries, end, self.window).start;
            let q = q.narrow(2, start, queries)?.reshape((
                batch,
                self.kv_heads,
                group * queries,
                head_dim,
            ))?;
            let scores = q.matmul(&k.narrow(2, first, end - first)?.t()?)?; // (B,KV,G*T,S)
            let p =
                softmax::causal_softmax(scores, queries, self.scale, self.window, mask.as_ref())?;
            let y = p.matmul(&v.narrow(2, first, end - first)?)?; // (B,KV,G*T,D)
            blocks.push(merge_heads(y.reshape((batch, heads, queries, head_dim))?, dtype)?);
        }
        Tensor::cat(&blocks, 1)
    }
}

impl Qkv {
    fn load(cfg: &LlamaConfig, vb: &VarBuilder, pairs: Pairs) -> Result<Self> {
        let (q_dim, kv_dim) =
            (cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim);
        let projection =
            |name, out_dim| pairs.linear((cfg.hidden_size, out_dim), cfg.qkv_bias, vb.pp(name));
        if cfg.model_type == ModelType::Phi3 {
            return Ok(Self::Packed(projection("qkv_proj", q_dim + 2 * kv_dim)?));
        }
        Ok(Self::Separate {
            q_proj: projection("q_proj", q_dim)?,
            k_proj: projection("k_proj", kv_dim)?,
            v_proj: projection("v_proj", kv_dim)?,
        })
    }

    /// x (B,T,hidden) -> q (B,T,q_dim), k and v (B,T,kv_dim)
    fn forward(&self, x: &Tensor, q_dim: usize, kv_dim: usize) -> Result<(Tensor, Tensor, Tensor)> {
        match self {
            Self::Separate { q_proj, k_proj, v_proj } => {
                Ok((q_proj.forward(x)?, k_proj.forward(x)?, v_proj.forward(x)?))
            }
            Self::Packed(qkv_proj) => {
                let qkv = qkv_proj.forward(x)?;
                let part = |start, len| qkv.narrow(2, start, len);
                Ok((part(0, q_dim)?, part(q_dim, kv_dim)?, part(q_dim + kv_dim, kv_dim)?))
            }
        }
    }
}

/// y (B,H,T,D) -> (B,T,H*D)
fn merge_heads(y: Tensor, dtype: DType) -> Result<Tensor> {
    y.transpose(1, 2)?.to_dtype(dtype)?.flatten_from(2)
}
