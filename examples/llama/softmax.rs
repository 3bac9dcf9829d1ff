//! The causal softmax of attention: a query sees the keys up to its own position, or the last of
//! them with a sliding window.
//!
//! On the CPU this is one pass over the visible part of each row, forward and backward. Elsewhere
//! it is candle's softmax after adding a mask of 0 and -inf.

use std::ops::Range;

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, D, DType, Device, Layout, Result, Shape, Tensor, bail,
};

use super::rows::{for_each_row, slice, vectorized};

/// Whether [`causal_softmax`] needs no mask.
pub fn needs_no_mask(queries: usize, dtype: DType, device: &Device) -> bool {
    queries == 1 || is_fused(dtype, device)
}

fn is_fused(dtype: DType, device: &Device) -> bool {
    device.is_cpu() && dtype == DType::F32
}

/// The keys that query `i` sees. The last of `queries` queries is at the last of `keys` positions,
/// and a window includes the query's own position.
pub(super) fn visible(
    i: usize,
    queries: usize,
    keys: usize,
    window: Option<usize>,
) -> Range<usize> {
    let end = keys + 1 + i - queries;
    let start = window.map_or(0, |window| end.saturating_sub(window));
    start..end
}

/// The mask for up to `queries` queries over `keys` keys: (queries, keys), 0 where visible, -inf
/// elsewhere. Query i is at position `keys - queries + i`. The mask of a smaller block that ends
/// earlier is therefore the lower right corner.
pub fn causal_mask(
    queries: usize,
    keys: usize,
    window: Option<usize>,
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    let row = |i| {
        let visible = visible(i, queries, keys, window);
        (0..keys).map(move |j| if visible.contains(&j) { 0f32 } else { f32::NEG_INFINITY })
    };
    let mask: Vec<f32> = (0..queries).flat_map(row).collect();
    Tensor::from_vec(mask, (queries, keys), device)?.to_dtype(dtype)
}

/// scores (B,KV,G*T,S) -> the probabilities of scores * scale, of the same shape. Row g*T+t is the
/// query at position S-T+t: it sees S-T+t+1 keys, or the last `window` of them. For a single query,
/// S is at most the window.
///
/// `mask` is the result of [`causal_mask`]. It is required where [`needs_no_mask`] is false.
pub fn causal_softmax(
    scores: Tensor,
    queries: usize,
    scale: f64,
    window: Option<usize>,
    mask: Option<&Tensor>,
) -> Result<Tensor> {
    if is_fused(scores.dtype(), scores.device()) {
        return scores.contiguous()?.apply_op1(CausalSoftmax {
            queries,
            window,
            scale: scale as f32,
        });
    }
    let scores = (scores * scale)?;
    let scores = match mask {
        Some(mask) if queries > 1 => masked(&scores, queries, mask)?,
        None if queries > 1 => bail!("softmax over {queries} queries without a mask"),
        _ => scores,
    };
    if !scores.track_op() {
        // Fused, but without a gradient.
        return candle_nn::ops::softmax_last_dim(&scores);
    }
    // The maximum only prevents overflow; its gradient is zero.
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

/// p[j] = exp((s[j] - max) * scale) / sum for the visible j, 0 for the others.
struct CausalSoftmax {
    queries: usize,
    window: Option<usize>,
    scale: f32,
}

impl CausalSoftmax {
    /// Replaces the scores in the rows of `p` by their softmax.
    fn rows(&self, p: &mut [f32], keys: usize) {
        for_each_row(p, keys, EXP * keys, |row, p| {
            softmax_of(p, visible(row % self.queries, self.queries, keys, self.window), self.scale);
        });
    }
}

impl CustomOp1 for CausalSoftmax {
    fn name(&self) -> &'static str {
        "causal-softmax"
    }

    fn cpu_fwd(&self, scores: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut out = slice(scores, layout)?.to_vec();
        self.rows(&mut out, layout.dims().last().copied().unwrap_or(0));
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, _scores: &Tensor, p: &Tensor, dp: &Tensor) -> Result<Option<Tensor>> {
        let ds = p.apply_op2_no_bwd(&dp.contiguous()?, &SoftmaxBackward)?;
        (ds * f64::from(self.scale)).map(Some)
    }
}

/// ds = p * (dp - sum(p * dp)). Keys that are not visible have p = 0 and get 0.
struct SoftmaxBackward;

impl CustomOp2 for SoftmaxBackward {
    fn name(&self) -> &'static str {
        "softmax-backward"
    }

    fn cpu_fwd(
        &self,
        p: &CpuStorage,
        lp: &Layout,
        dp: &CpuStorage,
        ldp: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (p, dp) = (slice::<f32>(p, lp)?, slice::<f32>(dp, ldp)?);
        let keys = lp.dims().last().copied().unwrap_or(0);
        let mut out = vec![0f32; p.len()];
        for_each_row(&mut out, keys, 2 * keys, |row, ds| {
            let (p, dp) = (&p[row * keys..][..keys], &dp[row * keys..][..keys]);
            let dot = p.iter().zip(dp).map(|(p, dp)| f64::from(p * dp)).sum::<f64>() as f32;
            for ((ds, p), dp) in ds.iter_mut().zip(p).zip(dp) {
                *ds = p * (dp - dot);
            }
        });
        Ok((CpuStorage::F32(out), lp.shape().clone()))
    }
}

/// [`softmax_row`] of the visible scores; the others become 0.
pub(super) fn softmax_of(row: &mut [f32], visible: Range<usize>, scale: f32) {
    row[..visible.start].fill(0.0);
    row[visible.end..].fill(0.0);
    softmax_row(&mut row[visible], scale);
}

/// scores -> exp((score - max) * scale) / sum, in place
fn softmax_row(row: &mut [f32], scale: f32) {
    vectorized(
        #[inline(always)]
        || softmax(row, scale),
    );
}

/// [`softmax_row`], with the vectors of its caller.
#[inline(always)]
pub(super) fn softmax(row: &mut [f32], scale: f32) {
    let max = lanes(row, [f32::NEG_INFINITY; LANES], |max, s| if s > max { s } else { max });
    let max = max.into_iter().fold(f32::NEG_INFINITY, f32::max);
    row.iter_mut().for_each(|p| *p = exp((*p - max) * scale));
    // f64, because an f32 sum over rows of thousands of keys would lose digits.
    let over_sum =
        1.0 / lanes(row, [0f64; LANES], |sum, p| sum + f64::from(p)).iter().sum::<f64>() as f32;
    row.iter_mut().for_each(|p| *p *= over_sum);
}

/// The number of independent results, which the compiler can keep in vector registers.
const LANES: usize = 16;

/// Each of the results is `f` over every sixteenth value. The remaining values go to the first
/// results.
#[inline(always)]
fn lanes<T: Copy>(values: &[f32], mut results: [T; LANES], f: impl Fn(T, f32) -> T) -> [T; LANES] {
    let mut chunks = values.chunks_exact(LANES);
    let mut all = |values: &[f32]| {
        for (result, &value) in results.iter_mut().zip(values) {
            *result = f(*result, value);
        }
    };
    chunks.by_ref().for_each(&mut all);
    all(chunks.remainder());
    results
}

/// e^x for x <= 0 within 2 units in the last place, in operations that the compiler can vectorize.
/// The result is never below 1.7e-38. NaN stays NaN.
///
/// With n the integer nearest to x / ln 2 and r = x - n·ln 2, |r| <= 0.35: the result is 2ⁿ times
/// the Taylor polynomial of degree 7, whose error is less than 0.35⁸/8! = 6e-9.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const ROUNDS: f32 = 12_582_912.0; // 1.5 · 2²³: adding it rounds to an integer, which then stands in the low bits
    const LN_2: (f32, f32) = (0.693_359_4, -2.121_944_4e-4); // n times the first is exact
    let x = if x < -87.0 { -87.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUNDS;
    let n = shifted - ROUNDS;
    let r = (x - n * LN_2.0) - n * LN_2.1;
    let mut y = 1.0 / 5040.0;
    for factorial in [720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0] {
        y = y * r + 1.0 / factorial;
    }
    y * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23)
}

/// The cost of an exponential, in multiplications.
const EXP: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials() {
        let units = |x: f32| {
            let exact = f64::from(x).exp();
            (f64::from(exp(x)) - exact).abs() / (exact * 2f64.powi(-23))
        };
        let worst = (0..=870_000).map(|i| units(i as f32 * -1e-4)).fold(0.0, f64::max);
        assert!(worst < 2.0, "{worst} units in the last place");
        assert_eq!(exp(0.0), 1.0);
        assert!(
            exp(-1000.0) < 1.7e-38 && exp(f32::NEG_INFINITY) < 1.7e-38 && exp(f32::NAN).is_nan()
        );
    }

    /// The fused pass against candle's operations and a mask.
    #[test]
    fn gradients_are_those_of_the_composition() -> Result<()> {
        let (queries, keys, scale) = (3, 5, 0.25);
        let values: Vec<f32> = (0..2 * 6 * 5).map(|i| (i * 29 % 17) as f32 - 8.0).collect();
        let scores =
            candle_core::Var::from_vec(values.clone(), (1, 2, 2 * queries, keys), &Device::Cpu)?;
        let weights = Tensor::from_vec(values, scores.shape(), &Device::Cpu)?.sqr()?;
        for window in [None, Some(2), Some(9)] {
            let composed = {
                let mask = causal_mask(queries, keys, window, DType::F32, &Device::Cpu)?;
                let exp = masked(&(scores.as_tensor() * scale)?, queries, &mask)?.exp()?;
                exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?
            };
            let fused = causal_softmax(scores.as_tensor().clone(), queries, scale, window, None)?;
            let gradient = |p: &Tensor| -> Result<Vec<f32>> {
                let store = (p * &weights)?.sum_all()?.backward()?;
                store
                    .get(&scores)
                    .map_or_else(|| bail!("no gradient"), |g| g.flatten_all()?.to_vec1())
            };
            let close = |a: Vec<f32>, b: Vec<f32>| {
                a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= 1e-6 + 1e-5 * b.abs())
            };
            let flat = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
            assert!(close(flat(&fused)?, flat(&composed)?), "{window:?}");
            assert!(close(gradient(&fused)?, gradient(&composed)?), "{window:?}");
        }
        Ok(())
    }

    #[test]
    fn a_window_counts_the_own_position() {
        assert_eq!([0, 1, 2].map(|i| visible(i, 3, 5, None)), [0..3, 0..4, 0..5]);
        assert_eq!([0, 1, 2].map(|i| visible(i, 3, 5, Some(4))), [0..3, 0..4, 1..5]);
        assert_eq!([0, 1, 2].map(|i| visible(i, 3, 5, Some(1))), [2..3, 3..4, 4..5]);
    }

    #[test]
    fn rows_sum_to_one() {
        for keys in [1, 7, 8, 9, 1000] {
            let scores: Vec<f32> =
                (0..keys).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.3).collect();
            let mut p = scores.clone();
            softmax_row(&mut p, 0.5);
            let weights: Vec<f64> = scores.iter().map(|&s| (f64::from(s) * 0.5).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for (p, weight) in p.iter().zip(weights) {
                assert!((f64::from(*p) - weight / sum).abs() <= 1e-6 * weight / sum, "{keys} keys");
            }
        }
        let mut p = [0.0, f32::NAN, 1.0];
        softmax_row(&mut p, 1.0);
        assert!(p.iter().all(|p| p.is_nan()));
    }
}
