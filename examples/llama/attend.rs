//! Attention on the CPU, in one pass. A task computes the scores, the softmax and the values of a
//! block of queries while their scores are in cache. All tasks of a layer run in parallel.

use std::marker::PhantomData;

use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};
use half::{bf16, f16};
use pulp::{Simd, WithSimd};

use super::rows::{Real, in_parallel, simd_add, simd_dots, slice, vectorized};
use super::softmax::{softmax, softmax_of, visible};

/// Queries of a task. With more of them, keys are read less often. With fewer, less work is spent
/// on keys that are not visible, and the scores stay in cache.
const QUERIES: usize = 32;

/// Keys that are multiplied with one query at once.
const KEYS: usize = 4;

/// q (B,T,H,D), k and v (B,KV,S,D) -> softmax(q·kᵀ·scale)·v (B,T,H,D), all of one dtype: f32, bf16
/// or f16, computed in f32. The queries are at the last T of S positions. Each sees the keys up to
/// its own position, or the last `window` of these.
pub fn attend(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    window: Option<usize>,
) -> Result<Tensor> {
    let q = q.contiguous()?;
    let scale = scale as f32;
    match q.dtype() {
        DType::F32 => {
            q.apply_op3_no_bwd(k, v, &Attend::<f32> { scale, window, dtype: PhantomData })
        }
        DType::BF16 => {
            q.apply_op3_no_bwd(k, v, &Attend::<bf16> { scale, window, dtype: PhantomData })
        }
        DType::F16 => {
            q.apply_op3_no_bwd(k, v, &Attend::<f16> { scale, window, dtype: PhantomData })
        }
        dtype => bail!("attention: expected f32, bf16 or f16, found {dtype:?}"),
    }
}

struct Attend<T> {
    scale: f32,
    window: Option<usize>,
    dtype: PhantomData<T>,
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
        let q = slice::<T>(q, lq)?;
        let (k, v) = (Heads::<T>::new(k.as_slice()?, lk)?, Heads::<T>::new(v.as_slice()?, lv)?);
        // A task is a block of queries. With one position there would be only one task, so there a
        // task is one key head.
        let (group, past) = (heads / kv_heads, keys - len);
        let heads_of_task = if len == 1 { 1 } else { kv_heads };
        let row = heads_of_task * group * head_dim;
        let mut out = vec![T::zero(); batch * len * heads * head_dim];
        let texts = out.chunks_mut(len * row).enumerate();
        let mut tasks: Vec<_> = texts
            .flat_map(|(text, out)| {
                out.chunks_mut(QUERIES * row)
                    .enumerate()
                    .map(move |(i, out)| (text, i * QUERIES, out))
            })
            .collect();
        tasks.reverse(); // of each text those with the most keys first
        in_parallel(
            tasks,
            2 * QUERIES.min(len) * row * keys,
            |(text, start, out): (usize, usize, &mut [T])| {
                let queries = out.len() / row;
                let q = &q[(text * len + start) * row..][..out.len()];
                let seen = visible(0, queries, past + start + queries, self.window).start
                    ..past + start + queries;
                let mut block = Block::new(queries, group, head_dim, seen.len(), self.window);
                for head in 0..heads_of_task {
                    let kv = text * heads_of_task + head;
                    let (k, v) = (
                        k.head(kv / kv_heads, kv % kv_heads),
                        v.head(kv / kv_heads, kv % kv_heads),
                    );
                    let seen = seen.start * head_dim..seen.end * head_dim;
                    block.attend(q, (&k[seen.clone()], &v[seen]), (head, row), self.scale, out);
                }
            },
        );
        Ok((T::to_cpu_storage_owned(out), lq.shape().clone()))
    }
}

/// A block of queries with the query heads of one key head: row t*G+g is query t in head g.
struct Block {
    group: usize,
    head_dim: usize,
    /// From the first key of the first query to the last key of the last one.
    keys: usize,
    window: Option<usize>,
    /// (T*G,D): the queries, later the results.
    x: Vec<f32>,
    /// (T*G,keys)
    scores: Vec<f32>,
    /// (keys,D): the keys, later the values. For one query (KEYS,D) of them at a time.
    wide: Vec<f32>,
}

impl Block {
    fn new(
        queries: usize,
        group: usize,
        head_dim: usize,
        keys: usize,
        window: Option<usize>,
    ) -> Self {
        let rows = queries * group;
        let wide = if queries == 1 { KEYS } else { keys } * head_dim;
        let (x, scores, wide) =
            (vec![0.0; rows * head_dim], vec![0.0; rows * keys], vec![0.0; wide]);
        Self { group, head_dim, keys, window, x, scores, wide }
    }

    /// q and out (T,H,D), in which one position has `row` values; k and v (keys,D) of key head
    /// `head`.
    fn attend<T: Real>(
        &mut self,
        q: &[T],
        (k, v): (&[T], &[T]),
        (head, row): (usize, usize),
        scale: f32,
        out: &mut [T],
    ) {
        let width = self.group * self.head_dim;
        let q = q.chunks(row).map(|q| &q[head * width..][..width]);
        vectorized(
            #[inline(always)]
            || self.x.chunks_mut(width).zip(q).for_each(|(x, q)| T::widen(q, x)),
        );
        match self.x.len() == width {
            true => pulp::Arch::new().dispatch(One { block: self, k, v, scale }),
            false => self.several(k, v, scale),
        }
        let out = out.chunks_mut(row).map(|out| &mut out[head * width..][..width]);
        vectorized(
            #[inline(always)]
            || self.x.chunks(width).zip(out).for_each(|(x, out)| T::round(x, out)),
        );
    }

    /// k and v (keys,D)
    fn several<T: Real>(&mut self, k: &[T], v: &[T], scale: f32) {
        let (keys, depth) = (self.keys, self.head_dim);
        let queries = self.x.len() / (self.group * depth);
        widen(k, &mut self.wide);
        product((&self.x, depth), (&self.wide, 1, depth), (&mut self.scores, keys));
        for (r, scores) in self.scores.chunks_mut(keys).enumerate() {
            softmax_of(scores, visible(r / self.group, queries, keys, self.window), scale);
        }
        widen(v, &mut self.wide);
        product((&self.scores, keys), (&self.wide, depth, 1), (&mut self.x, depth));
    }
}

/// [`Block::several`] for one query: k and v are read once and widened a few rows at a time.
struct One<'a, T> {
    block: &'a mut Block,
    k: &'a [T],
    v: &'a [T],
    scale: f32,
}

impl<T: Real> WithSimd for One<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Block { keys, head_dim: depth, x, scores, wide, .. } = self.block;
        let (keys, depth) = (*keys, *depth);
        for first in (0..keys).step_by(KEYS) {
            let count = KEYS.min(keys - first);
            T::widen(&self.k[first * depth..][..count * depth], &mut wide[..count * depth]);
            let k = rows(wide, depth);
            for (q, scores) in x.chunks_exact(depth).zip(scores.chunks_exact_mut(keys)) {
                scores[first..][..count].copy_from_slice(&simd_dots(simd, q, k)[..count]);
            }
        }
        scores.chunks_exact_mut(keys).for_each(|scores| softmax(scores, self.scale));
        x.fill(0.0);
        for first in (0..keys).step_by(KEYS) {
            let count = KEYS.min(keys - first);
            let (widened, others) = wide.split_at_mut(count * depth);
            T::widen(&self.v[first * depth..][..count * depth], widened);
            others.fill(0.0);
            let v = rows(wide, depth);
            for (y, p) in x.chunks_exact_mut(depth).zip(scores.chunks_exact(keys)) {
                let mut factors = [0.0; KEYS];
                factors[..count].copy_from_slice(&p[first..][..count]);
                simd_add(simd, factors, v, y);
            }
        }
    }
}

/// wide (KEYS,D)
#[inline(always)]
fn rows(wide: &[f32], depth: usize) -> [&[f32]; KEYS] {
    std::array::from_fn(|key| &wide[key * depth..][..depth])
}

fn widen<T: Real>(from: &[T], to: &mut [f32]) {
    vectorized(
        #[inline(always)]
        || T::widen(from, to),
    );
}

/// Keys or values (B,KV,S,D) in which each head (S,D) is contiguous, as in the cache.
struct Heads<'a, T> {
    data: &'a [T],
    strides: (usize, usize),
    len: usize,
}

impl<'a, T> Heads<'a, T> {
    fn new(data: &'a [T], layout: &Layout) -> Result<Self> {
        let (_, _, keys, head_dim) = layout.shape().dims4()?;
        match *layout.stride() {
            [batch, head, row, 1] if row == head_dim || keys == 1 => Ok(Self {
                data: &data[layout.start_offset()..],
                strides: (batch, head),
                len: keys * head_dim,
            }),
            _ => bail!("attention: expected contiguous heads, found strides {:?}", layout.stride()),
        }
    }

    fn head(&self, batch: usize, head: usize) -> &'a [T] {
        &self.data[batch * self.strides.0 + head * self.strides.1..][..self.len]
    }
}

/// c (M,N) = a (M,K) · b (K,N), on this thread. a and c come with the length of their rows, b with
/// the distances between its rows and between its columns.
fn product(
    (a, depth): (&[f32], usize),
    (b, b_row, b_column): (&[f32], usize, usize),
    (c, columns): (&mut [f32], usize),
) {
    let rows = c.len() / columns;
    assert!(
        a.len() == rows * depth
            && c.len() == rows * columns
            && b.len() > (depth - 1) * b_row + (columns - 1) * b_column
    );
    let (a_row, c_row) = (depth as isize, columns as isize);
    let (b_row, b_column) = (b_row as isize, b_column as isize);
    #[allow(unsafe_code, reason = "gemm has no safe interface")]
    // SAFETY: the assertion ensures that a, b and c contain (M,K), (K,N) and (M,N) with these
    // strides. c is borrowed exclusively, and it is only written, never read.
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

    /// Against candle's operations and a mask, with and without positions before the queries. The
    /// number of queries is in some cases a multiple of the block, in others not.
    #[test]
    fn attention_is_that_of_the_composition() -> Result<()> {
        let (batch, kv_heads, group, head_dim, scale) = (2, 2, 3, 20, 0.2);
        let values = |count: usize, step: usize| {
            (0..count).map(|i| (i * step % 31) as f32 / 8.0 - 2.0).collect::<Vec<_>>()
        };
        let lens = [
            (1, 0),
            (1, 3),
            (1, 50),
            (2, 0),
            (QUERIES, 0),
            (2 * QUERIES + 1, 0),
            (QUERIES + 3, 5),
            (3, 40),
        ];
        let windows = [None, Some(1), Some(4), Some(QUERIES), Some(1000)];
        for ((len, past), window) in
            lens.into_iter().flat_map(|len| windows.map(|window| (len, window)))
        {
            let (heads, keys) = (kv_heads * group, past + len);
            let q = Tensor::from_vec(
                values(batch * len * heads * head_dim, 7),
                (batch, len, heads, head_dim),
                &Device::Cpu,
            )?;
            // As in the cache: views of longer buffers.
            let cached = |step| {
                let room = keys + 9;
                let buffer = values(batch * kv_heads * room * head_dim, step);
                Tensor::from_vec(buffer, (batch, kv_heads, room, head_dim), &Device::Cpu)?
                    .narrow(2, 0, keys)
            };
            let (k, v) = (cached(11)?, cached(13)?);
            let repeated = |x: &Tensor| {
                let x = x.unsqueeze(2)?.broadcast_as((batch, kv_heads, group, keys, head_dim))?;
                x.reshape((batch, heads, keys, head_dim))
            };
            let mask = causal_mask(len, keys, window, DType::F32, &Device::Cpu)?;
            let composed = |q: Tensor, k: Tensor, v: Tensor| {
                let scores =
                    (q.transpose(1, 2)?.contiguous()?.matmul(&repeated(&k)?.t()?)? * scale)?;
                let p = candle_nn::ops::softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
                p.matmul(&repeated(&v)?)?.transpose(1, 2)
            };
            let largest = |x: Tensor| x.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
            // |y| <= 2, so the bound is half a unit in its last place.
            for (dtype, bound) in
                [(DType::F32, 1e-5), (DType::BF16, 2f32.powi(-8)), (DType::F16, 2f32.powi(-11))]
            {
                let rounded = |x: &Tensor| x.to_dtype(dtype);
                let exact = |x: &Tensor| x.to_dtype(dtype)?.to_dtype(DType::F32);
                let expected = composed(exact(&q)?, exact(&k)?, exact(&v)?)?;
                let found = attend(&rounded(&q)?, &rounded(&k)?, &rounded(&v)?, scale, window)?;
                assert_eq!((found.dtype(), found.dims()), (dtype, expected.dims()));
                let error = largest((found.to_dtype(DType::F32)? - &expected)?)?;
                assert!(
                    error <= bound + 1e-5,
                    "{len} queries after {past}, window {window:?}, {dtype:?}: {error}"
                );
            }
        }
        Ok(())
    }

    /// Values of earlier keys that are still in the buffer are not multiplied by 0.
    #[test]
    fn an_infinite_value_gives_infinity() -> Result<()> {
        let zeros = |keys| Tensor::zeros((1, 1, keys, 8), DType::F32, &Device::Cpu);
        let infinite = Tensor::full(f32::INFINITY, (1, 1, 4, 8), &Device::Cpu)?;
        let v = Tensor::cat(&[&infinite, &zeros(1)?], 2)?;
        let y = attend(&zeros(1)?, &zeros(5)?, &v, 1.0, None)?.flatten_all()?.to_vec1::<f32>()?;
        assert_eq!(y, [f32::INFINITY; 8]);
        Ok(())
    }
}
