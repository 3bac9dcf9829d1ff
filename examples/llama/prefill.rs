//! Attention of several positions on the CPU, in one pass: a task takes a block of queries through scores, softmax and values while
//! their scores lie in the cache, and all tasks of a layer run at once.

use std::marker::PhantomData;

use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};
use half::{bf16, f16};

use super::decode::Heads;
use super::rows::{Real, in_parallel, slice, vectorized};
use super::softmax::softmax_row;

/// Queries of a task. More of them repeat the keys less often; fewer compute less of what is not visible, and leave scores in the cache.
const QUERIES: usize = 32;

/// q (B,T,H,D), k and v (B,KV,S,D), all f32 -> softmax(q·kᵀ·scale)·v (B,T,H,D) in `dtype`. The queries stand at the last T of S
/// positions and see the keys up to their own.
pub fn attend(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, dtype: DType) -> Result<Tensor> {
    let q = q.contiguous()?;
    let scale = scale as f32;
    match dtype {
        DType::F32 => q.apply_op3_no_bwd(k, v, &Attend::<f32> { scale, out: PhantomData }),
        DType::BF16 => q.apply_op3_no_bwd(k, v, &Attend::<bf16> { scale, out: PhantomData }),
        DType::F16 => q.apply_op3_no_bwd(k, v, &Attend::<f16> { scale, out: PhantomData }),
        dtype => bail!("attention: expected f32, bf16 or f16, found {dtype:?}"),
    }
}

struct Attend<T> {
    scale: f32,
    out: PhantomData<T>,
}

impl<T: Real> CustomOp3 for Attend<T> {
    fn name(&self) -> &'static str {
        "attend"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        lq: &Layout,
        k: &CpuStorage,
        lk: &Layout,
        v: &CpuStorage,
        lv: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (batch, len, heads, head_dim) = lq.shape().dims4()?;
        let (_, kv_heads, keys, _) = lk.shape().dims4()?;
        let q = slice::<f32>(q, lq)?;
        let (k, v) = (Heads::new(k.as_slice()?, lk)?, Heads::new(v.as_slice()?, lv)?);
        let (row, past) = (heads * head_dim, keys - len);
        let mut out = vec![T::zero(); batch * len * row];
        let texts = out.chunks_mut(len * row).enumerate();
        let blocks = texts
            .flat_map(|(text, out)| out.chunks_mut(QUERIES * row).enumerate().map(move |(i, out)| (text, i * QUERIES, out)));
        let mut tasks: Vec<_> = blocks.collect();
        tasks.reverse(); // those with the most keys first
        in_parallel(tasks, |(text, start, out): (usize, usize, &mut [T])| {
            let queries = out.len() / row;
            let q = &q[(text * len + start) * row..][..out.len()];
            let mut block = Block::new(queries, heads / kv_heads, head_dim, past + start + queries);
            for head in 0..kv_heads {
                block.attend(q, (k.head(text, head), v.head(text, head)), (head, row), self.scale, out);
            }
        });
        Ok((T::to_cpu_storage_owned(out), lq.shape().clone()))
    }
}

/// A block of queries with the query heads of one key head: row t*G+g is query t in head g.
struct Block {
    group: usize,
    head_dim: usize,
    /// which the last query sees
    keys: usize,
    /// (T*G,D): the queries, then what attention makes of them
    x: Vec<f32>,
    /// (T*G,keys)
    scores: Vec<f32>,
}

impl Block {
    fn new(queries: usize, group: usize, head_dim: usize, keys: usize) -> Self {
        let rows = queries * group;
        Self { group, head_dim, keys, x: vec![0.0; rows * head_dim], scores: vec![0.0; rows * keys] }
    }

    /// q and out (T,H,D) of which `row` values are one position, k and v (S,D) of key head `head`
    fn attend<T: Real>(&mut self, q: &[f32], (k, v): (&[f32], &[f32]), (head, row): (usize, usize), scale: f32, out: &mut [T]) {
        let (width, keys, depth) = (self.group * self.head_dim, self.keys, self.head_dim);
        let rows = self.x.len() / depth;
        let queries = rows / self.group;
        for (x, q) in self.x.chunks_mut(width).zip(q.chunks(row)) {
            x.copy_from_slice(&q[head * width..][..width]);
        }
        product((&self.x, depth), (k, 1, depth), (&mut self.scores, keys));
        for (r, scores) in self.scores.chunks_mut(keys).enumerate() {
            let (visible, others) = scores.split_at_mut(keys + 1 - queries + r / self.group);
            softmax_row(visible, scale);
            others.fill(0.0);
        }
        product((&self.scores, keys), (v, depth, 1), (&mut self.x, depth));
        vectorized(|| {
            for (x, out) in self.x.chunks(width).zip(out.chunks_mut(row)) {
                out[head * width..][..width].iter_mut().zip(x).for_each(|(out, x)| *out = T::round(*x));
            }
        });
    }
}

/// c (M,N) = a (M,K) · b (K,N), on this thread. a and c with their row's length; b with what lies between two rows and two columns of it.
fn product((a, depth): (&[f32], usize), (b, b_row, b_column): (&[f32], usize, usize), (c, columns): (&mut [f32], usize)) {
    let rows = c.len() / columns;
    assert!(a.len() == rows * depth && c.len() == rows * columns && b.len() > (depth - 1) * b_row + (columns - 1) * b_column);
    let (a_row, c_row) = (depth as isize, columns as isize);
    let (b_row, b_column) = (b_row as isize, b_column as isize);
    #[allow(unsafe_code, reason = "gemm has no safe interface")]
    // SAFETY: by the assertion a, b and c reach as far as (M,K), (K,N) and (M,N) with these strides; c is ours alone, and all that it
    // holds is written, not read.
    unsafe {
        let (c, a, b) = (c.as_mut_ptr(), a.as_ptr(), b.as_ptr());
        gemm::gemm(
            rows,
            columns,
            depth,
            c,
            1,
            c_row,
            false,
            a,
            1,
            a_row,
            b,
            b_column,
            b_row,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{D, Device};

    use super::super::softmax::causal_mask;
    use super::*;

    /// Against candle's operations and a mask, with and without positions before the queries; blocks of queries that come out even
    /// and that do not.
    #[test]
    fn attention_is_that_of_the_composition() -> Result<()> {
        let (batch, kv_heads, group, head_dim, scale) = (2, 2, 3, 8, 0.4);
        let values = |count: usize, step: usize| (0..count).map(|i| (i * step % 31) as f32 / 8.0 - 2.0).collect::<Vec<_>>();
        for (len, past) in [(2, 0), (QUERIES, 0), (2 * QUERIES + 1, 0), (QUERIES + 3, 5), (3, 40)] {
            let (heads, keys) = (kv_heads * group, past + len);
            let q = Tensor::from_vec(values(batch * len * heads * head_dim, 7), (batch, len, heads, head_dim), &Device::Cpu)?;
            // as in the cache: views of longer buffers
            let cached = |step| {
                let room = keys + 9;
                let buffer = values(batch * kv_heads * room * head_dim, step);
                Tensor::from_vec(buffer, (batch, kv_heads, room, head_dim), &Device::Cpu)?.narrow(2, 0, keys)
            };
            let (k, v) = (cached(11)?, cached(13)?);
            let repeated = |x: &Tensor| {
                let x = x.unsqueeze(2)?.broadcast_as((batch, kv_heads, group, keys, head_dim))?;
                x.reshape((batch, heads, keys, head_dim))
            };
            let scores = (q.transpose(1, 2)?.contiguous()?.matmul(&repeated(&k)?.t()?)? * scale)?;
            let mask = causal_mask(len, keys, DType::F32, &Device::Cpu)?;
            let p = candle_nn::ops::softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
            let expected = p.matmul(&repeated(&v)?)?.transpose(1, 2)?;
            let largest = |x: Tensor| x.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
            for (dtype, bound) in [(DType::F32, 1e-5), (DType::BF16, 2f32.powi(-7)), (DType::F16, 2f32.powi(-10))] {
                // |y| <= 2, so half a unit in its last place
                let found = attend(&q, &k, &v, scale, dtype)?;
                assert_eq!((found.dtype(), found.dims()), (dtype, expected.dims()));
                let error = largest((found.to_dtype(DType::F32)? - &expected)?)?;
                assert!(error <= bound, "{len} queries after {past} positions, {dtype:?}: {error}");
            }
        }
        Ok(())
    }
}
