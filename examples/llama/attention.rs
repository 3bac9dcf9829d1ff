//! Causal self-attention with grouped queries: several query heads share one key and value head, without copies of it.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Module, VarBuilder};
use candle_swiglu::{Linear, linear_b};

use super::cache::KvSlot;
use super::config::LlamaConfig;
use super::{attend, rope, softmax};

/// Queries are taken in blocks of this many positions, so that a long prompt needs heads * 128 * positions scores at a time.
const QUERY_BLOCK: usize = 128;

/// q, k, v, o of one layer.
#[derive(Debug, Clone)]
pub struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

/// What all layers of one forward share.
pub struct Step {
    /// (T, head_dim / 2)
    cos: Tensor,
    sin: Tensor,
    mask: Option<Tensor>,
}

/// The dtype that attention computes in. On the CPU that is f32 for halves; queries, keys and values stay halves until then.
pub fn attention_dtype(dtype: DType, device: &Device) -> DType {
    match dtype {
        DType::F16 | DType::BF16 if device.is_cpu() => DType::F32,
        dtype => dtype,
    }
}

impl Step {
    /// The step of `queries` tokens that end at position `end`, with the rotary tables of their positions.
    pub fn new(queries: usize, end: usize, (cos, sin): (Tensor, Tensor)) -> Result<Self> {
        let (dtype, device) = (cos.dtype(), cos.device());
        let mask = match softmax::needs_no_mask(queries, dtype, device) {
            true => None,
            false => Some(softmax::causal_mask(queries.min(QUERY_BLOCK), end, dtype, device)?),
        };
        Ok(Self { cos, sin, mask })
    }
}

impl Attention {
    /// The projections under `vb`, which is at `.self_attn`.
    pub fn load(cfg: &LlamaConfig, vb: VarBuilder) -> Result<Self> {
        let (q_dim, kv_dim) = (cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim);
        let hidden = cfg.hidden_size;
        Ok(Self {
            q_proj: linear_b(hidden, q_dim, cfg.qkv_bias, vb.pp("q_proj"))?,
            k_proj: linear_b(hidden, kv_dim, cfg.qkv_bias, vb.pp("k_proj"))?,
            v_proj: linear_b(hidden, kv_dim, cfg.qkv_bias, vb.pp("v_proj"))?,
            o_proj: linear_b(q_dim, hidden, cfg.o_bias, vb.pp("o_proj"))?,
            heads: cfg.num_attention_heads,
            kv_heads: cfg.num_key_value_heads,
            head_dim: cfg.head_dim,
        })
    }

    /// x (B,T,hidden) -> (B,T,hidden), after appending its keys and values to `cache`.
    pub fn forward(&self, x: &Tensor, step: &Step, cache: Option<KvSlot>) -> Result<Tensor> {
        let _span = tracing::trace_span!("attn").entered();
        let q = rope::rotate(&self.split_heads(self.q_proj.forward(x)?, self.heads)?, &step.cos, &step.sin)?;
        let k = rope::rotate(&self.split_heads(self.k_proj.forward(x)?, self.kv_heads)?, &step.cos, &step.sin)?;
        let v = self.split_heads(self.v_proj.forward(x)?, self.kv_heads)?.to_dtype(k.dtype())?.transpose(1, 2)?;
        let (k, v) = match cache {
            Some(cache) => cache.append(&k, &v)?,
            None => (k.contiguous()?, v.contiguous()?),
        };
        let tracked = q.track_op() || k.track_op() || v.track_op();
        let y = match q.device().is_cpu() && q.dtype() != DType::F64 && !tracked {
            true => attend::attend(&q.transpose(1, 2)?, &k, &v, self.scale())?.flatten_from(2)?,
            false => self.attend(&q, &k, &v, step, x.dtype())?,
        };
        self.o_proj.forward(&y)
    }

    /// What scores are multiplied by.
    fn scale(&self) -> f64 {
        (self.head_dim as f64).powf(-0.5)
    }

    /// x (B,T,heads*D) -> (B,T,heads,D)
    fn split_heads(&self, x: Tensor, heads: usize) -> Result<Tensor> {
        let (batch, len, _) = x.dims3()?;
        x.reshape((batch, len, heads, self.head_dim))
    }

    /// q (B,H,T,D), k and v (B,KV,S,D) -> softmax(q·kᵀ·scale)·v (B,T,H*D) in `dtype`. The queries stand at the last T of S
    /// positions; a block of them needs the keys up to its last one only.
    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, step: &Step, dtype: DType) -> Result<Tensor> {
        let (batch, heads, len, head_dim) = q.dims4()?;
        let computed_in = step.cos.dtype();
        let (q, k, v) = (q.to_dtype(computed_in)?, k.to_dtype(computed_in)?, v.to_dtype(computed_in)?);
        let group = heads / self.kv_heads;
        let past = k.dim(2)? - len;
        let mut blocks = Vec::with_capacity(len.div_ceil(QUERY_BLOCK));
        for start in (0..len).step_by(QUERY_BLOCK) {
            let queries = QUERY_BLOCK.min(len - start);
            let keys = past + start + queries;
            let q = q.narrow(2, start, queries)?.reshape((batch, self.kv_heads, group * queries, head_dim))?;
            let scores = q.matmul(&k.narrow(2, 0, keys)?.t()?)?; // (B,KV,G*T,S)
            let p = softmax::causal_softmax(scores, queries, self.scale(), step.mask.as_ref())?;
            let y = p.matmul(&v.narrow(2, 0, keys)?)?; // (B,KV,G*T,D)
            blocks.push(merge_heads(y.reshape((batch, heads, queries, head_dim))?, dtype)?);
        }
        Tensor::cat(&blocks, 1)
    }
}

/// y (B,H,T,D) -> (B,T,H*D)
fn merge_heads(y: Tensor, dtype: DType) -> Result<Tensor> {
    y.transpose(1, 2)?.to_dtype(dtype)?.flatten_from(2)
}
