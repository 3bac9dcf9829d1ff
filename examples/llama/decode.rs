//! Attention of a single position on the CPU, in one pass. A batched product would start one small gemm per key head and
//! wake every thread for each, which costs more than the arithmetic.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};

use super::rows::{for_each_row, vectorized};
use super::softmax::inline_softmax_row;

/// q (B,H,1,D), k and v (B,KV,S,D) -> softmax(q·kᵀ·scale)·v (B,H,1,D)
pub fn attend_one(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Result<Tensor> {
    q.contiguous()?.apply_op3_no_bwd(k, v, &AttendOne { scale: scale as f32 })
}

struct AttendOne {
    scale: f32,
}

impl CustomOp3 for AttendOne {
    fn name(&self) -> &'static str {
        "attend-one"
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
        let (batch, heads, _, head_dim) = lq.shape().dims4()?;
        let (_, kv_heads, keys, _) = lk.shape().dims4()?;
        let group = heads / kv_heads;
        let q = &q.as_slice::<f32>()?[lq.start_offset()..];
        let (k, v) = (Heads::new(k.as_slice()?, lk)?, Heads::new(v.as_slice()?, lv)?);
        let mut out = vec![0f32; batch * heads * head_dim];
        // one row of the loop is one key head with its group of queries
        for_each_row(&mut out, group * head_dim, group * head_dim * keys, |row, out| {
            let q = &q[row * group * head_dim..][..group * head_dim];
            let (k, v) = (k.head(row / kv_heads, row % kv_heads), v.head(row / kv_heads, row % kv_heads));
            vectorized(|| attend_group(q, (k, v, head_dim), self.scale, out));
        });
        Ok((CpuStorage::F32(out), lq.shape().clone()))
    }
}

/// q (G,D), k and v ((S,D), D) -> out (G,D), which is zero before
#[inline(always)]
fn attend_group(q: &[f32], (k, v, head_dim): (&[f32], &[f32], usize), scale: f32, out: &mut [f32]) {
    let keys = k.len() / head_dim;
    let mut p = vec![0f32; keys];
    for (q, out) in q.chunks(head_dim).zip(out.chunks_mut(head_dim)) {
        for (p, k) in p.iter_mut().zip(k.chunks(head_dim)) {
            *p = dot(q, k);
        }
        inline_softmax_row(&mut p, scale);
        for (p, v) in p.iter().zip(v.chunks(head_dim)) {
            for (out, v) in out.iter_mut().zip(v) {
                *out += p * v;
            }
        }
    }
}

/// In 8 independent sums, so that the compiler can keep them in vector registers.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 8];
    let (a, b) = (a.chunks_exact(8), b.chunks_exact(8));
    let tail: f32 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a.zip(b) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    sums.iter().sum::<f32>() + tail
}

/// Keys or values (B,KV,S,D) of which each head (S,D) lies in one piece, as it does in the cache.
pub(super) struct Heads<'a> {
    data: &'a [f32],
    strides: (usize, usize),
    len: usize,
}

impl<'a> Heads<'a> {
    pub(super) fn new(data: &'a [f32], layout: &Layout) -> Result<Self> {
        let (_, _, keys, head_dim) = layout.shape().dims4()?;
        match *layout.stride() {
            [batch, head, row, 1] if row == head_dim || keys == 1 => {
                Ok(Self { data: &data[layout.start_offset()..], strides: (batch, head), len: keys * head_dim })
            }
            _ => bail!("attention: expected contiguous heads, found strides {:?}", layout.stride()),
        }
    }

    pub(super) fn head(&self, batch: usize, head: usize) -> &'a [f32] {
        &self.data[batch * self.strides.0 + head * self.strides.1..][..self.len]
    }
}
