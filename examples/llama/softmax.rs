//! The softmax of attention, causal: a query sees the keys up to its own position.
//!
//! On the CPU this is one pass over the visible part of each row, forward and backward. Elsewhere it is candle's softmax
//! after adding a mask of 0 and -inf.

use std::sync::Mutex;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, D, DType, Device, Layout, Result, Shape, Tensor, bail};

/// Whether [`causal_softmax`] does without a mask.
pub fn needs_no_mask(queries: usize, dtype: DType, device: &Device) -> bool {
    queries == 1 || is_fused(dtype, device)
}

fn is_fused(dtype: DType, device: &Device) -> bool {
    device.is_cpu() && dtype == DType::F32
}

/// The mask for up to `queries` queries over `keys` keys: (queries, keys), 0 where visible, -inf elsewhere. Query i stands
/// at position `keys - queries + i`, so a smaller block that ends earlier finds its mask in the lower right corner.
pub fn causal_mask(queries: usize, keys: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    let visible = |i: usize| keys - queries + i + 1;
    let row = |i| (0..keys).map(move |j| if j < visible(i) { 0f32 } else { f32::NEG_INFINITY });
    let mask: Vec<f32> = (0..queries).flat_map(row).collect();
    Tensor::from_vec(mask, (queries, keys), device)?.to_dtype(dtype)
}

/// scores (B,KV,G*T,S) -> probabilities of the same shape. Row g*T+t is the query at position S-T+t: it sees S-T+t+1 keys.
///
/// `mask` is that of [`causal_mask`], needed where [`needs_no_mask`] is false.
pub fn causal_softmax(scores: &Tensor, queries: usize, mask: Option<&Tensor>) -> Result<Tensor> {
    if is_fused(scores.dtype(), scores.device()) {
        return scores.contiguous()?.apply_op1(CausalSoftmax { queries });
    }
    let scores = match mask {
        Some(mask) if queries > 1 => masked(scores, queries, mask)?,
        None if queries > 1 => bail!("softmax over {queries} queries without a mask"),
        _ => scores.clone(),
    };
    if !scores.track_op() {
        // fused, but without a gradient
        return candle_nn::ops::softmax_last_dim(&scores);
    }
    // the maximum only guards against overflow: its gradient is zero
    let exp = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
    exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)
}

/// scores (B,KV,G*T,S) + the lower right (T,S) of mask.
fn masked(scores: &Tensor, queries: usize, mask: &Tensor) -> Result<Tensor> {
    let (batch, kv_heads, rows, keys) = scores.dims4()?;
    let (mask_rows, mask_keys) = mask.dims2()?;
    let mask = mask.narrow(0, mask_rows - queries, queries)?.narrow(1, mask_keys - keys, keys)?;
    let scores = scores.reshape((batch, kv_heads, rows / queries, queries, keys))?;
    scores.broadcast_add(&mask)?.reshape((batch, kv_heads, rows, keys))
}

/// p[j] = exp(s[j] - max) / sum for the visible j, 0 for the others.
struct CausalSoftmax {
    queries: usize,
}

impl CustomOp1 for CausalSoftmax {
    fn name(&self) -> &'static str {
        "causal-softmax"
    }

    fn cpu_fwd(&self, scores: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let scores = slice(scores, layout)?;
        let keys = layout.dims().last().copied().unwrap_or(0);
        let mut out = vec![0f32; scores.len()];
        for_each_row(&mut out, keys, EXP * keys, |row, p| {
            let visible = keys + 1 - self.queries + row % self.queries;
            softmax_row(&scores[row * keys..][..visible], &mut p[..visible]);
        });
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, _scores: &Tensor, p: &Tensor, dp: &Tensor) -> Result<Option<Tensor>> {
        p.apply_op2_no_bwd(&dp.contiguous()?, &SoftmaxBackward).map(Some)
    }
}

/// ds = p * (dp - sum(p * dp)); what is not visible has p = 0 and gets 0.
struct SoftmaxBackward;

impl CustomOp2 for SoftmaxBackward {
    fn name(&self) -> &'static str {
        "softmax-backward"
    }

    fn cpu_fwd(&self, p: &CpuStorage, lp: &Layout, dp: &CpuStorage, ldp: &Layout) -> Result<(CpuStorage, Shape)> {
        let (p, dp) = (slice(p, lp)?, slice(dp, ldp)?);
        let keys = lp.dims().last().copied().unwrap_or(0);
        let mut out = vec![0f32; p.len()];
        for_each_row(&mut out, keys, 2 * keys, |row, ds| {
            let (p, dp) = (&p[row * keys..][..keys], &dp[row * keys..][..keys]);
            let dot = sum(p.iter().zip(dp).map(|(p, dp)| p * dp));
            for ((ds, p), dp) in ds.iter_mut().zip(p).zip(dp) {
                *ds = p * (dp - dot);
            }
        });
        Ok((CpuStorage::F32(out), lp.shape().clone()))
    }
}

/// scores -> exp(score - max) / sum, in `out`
pub(super) fn softmax_row(scores: &[f32], out: &mut [f32]) {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for (out, score) in out.iter_mut().zip(scores) {
        *out = (score - max).exp();
    }
    let scale = 1.0 / sum(out.iter().copied());
    out.iter_mut().for_each(|p| *p *= scale);
}

/// Sums over rows of thousands of keys are the one place where f32 would lose digits.
fn sum(values: impl Iterator<Item = f32>) -> f32 {
    values.map(f64::from).sum::<f64>() as f32
}

/// What an exponential costs, in multiplications.
const EXP: usize = 16;

/// Calls `f(row, its part of out)` for every row; `work` is about the number of multiplications in one. On candle's thread
/// pool, if there is enough of it.
pub(super) fn for_each_row(out: &mut [f32], row_len: usize, work: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    /// Some 20 microseconds: more than it costs to wake another thread.
    const BLOCK: usize = 128 * 1024;
    if row_len == 0 || work == 0 {
        return;
    }
    let rows = BLOCK.div_ceil(work);
    let each = |part: &mut [f32], first: usize| {
        part.chunks_mut(row_len).enumerate().for_each(|(i, row)| f(first + i, row));
    };
    if out.len() <= rows * row_len {
        return each(out, 0);
    }
    let blocks: Vec<_> = out.chunks_mut(rows * row_len).map(Mutex::new).collect();
    candle_core::utils::barrier_pool().execute_chunked(blocks.len(), |range| {
        for block in range {
            // each block is taken once: the lock is free and never poisoned
            let Ok(mut part) = blocks[block].lock() else { return };
            each(&mut part, block * rows);
        }
    });
}

fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("causal softmax: expected contiguous scores, found strides {:?}", layout.stride()),
    }
}
