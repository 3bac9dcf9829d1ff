//! Shared by the fused CPU operations: loops over the rows of a tensor on candle's thread pool, and
//! loops that the compiler may vectorize for this machine.

use std::sync::Mutex;

use candle_core::{CpuStorage, Layout, Result, WithDType, bail};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use pulp::{Simd, WithSimd};

/// A dtype of the model for which the CPU computes in f32.
pub(super) trait Real: WithDType {
    fn widen(from: &[Self], to: &mut [f32]);
    fn round(from: &[f32], to: &mut [Self]);
}

impl Real for f32 {
    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f32]) {
        to.copy_from_slice(from);
    }

    #[inline(always)]
    fn round(from: &[f32], to: &mut [Self]) {
        to.copy_from_slice(from);
    }
}

impl Real for bf16 {
    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f32]) {
        to.iter_mut()
            .zip(from)
            .for_each(|(to, from)| *to = f32::from_bits(u32::from(from.to_bits()) << 16));
    }

    #[inline(always)]
    fn round(from: &[f32], to: &mut [Self]) {
        to.iter_mut().zip(from).for_each(|(to, from)| *to = Self::from_f32(*from));
    }
}

impl Real for f16 {
    fn widen(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }

    fn round(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }
}

/// Calls `f`, compiled for the vector instructions of this machine. This only applies to the
/// functions called by `f` that are `inline(always)`.
#[inline(always)]
pub(super) fn vectorized<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// About 20 microseconds, in multiplications. Waking another thread costs less.
const WORTH_A_THREAD: usize = 128 * 1024;

/// Calls `f(row, its part of out)` for every row. `work` is the approximate number of
/// multiplications of one row. The rows are distributed over candle's thread pool if the total is
/// large enough.
pub(super) fn for_each_row<T: Send>(
    out: &mut [T],
    row_len: usize,
    work: usize,
    f: impl Fn(usize, &mut [T]) + Sync,
) {
    if row_len == 0 || work == 0 {
        return;
    }
    let rows = WORTH_A_THREAD.div_ceil(work);
    let blocks = out.chunks_mut(rows * row_len).enumerate().collect();
    in_parallel(blocks, WORTH_A_THREAD, |(block, part): (usize, &mut [T])| {
        part.chunks_mut(row_len).enumerate().for_each(|(i, row)| f(block * rows + i, row));
    });
}

/// Calls `f` for every task, starting with the first ones. `work` is the approximate number of
/// multiplications of one task. The tasks are distributed over candle's thread pool if the total is
/// large enough.
pub(super) fn in_parallel<T: Send>(tasks: Vec<T>, work: usize, f: impl Fn(T) + Sync) {
    if tasks.len() <= 1 || tasks.len() * work <= WORTH_A_THREAD {
        return tasks.into_iter().for_each(f);
    }
    let tasks: Vec<_> = tasks.into_iter().map(|task| Mutex::new(Some(task))).collect();
    candle_core::utils::barrier_pool().execute_chunked(tasks.len(), |range| {
        for task in &tasks[range] {
            // Each task is taken once, so the lock is free and never poisoned.
            let task = task.lock().ok().and_then(|mut task| task.take());
            task.into_iter().for_each(&f);
        }
    });
}

/// The sum of a*b.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    struct Dot<'a>(&'a [f32], &'a [f32]);
    impl WithSimd for Dot<'_> {
        type Output = f32;

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> f32 {
            simd_dots(simd, self.0, [self.1])[0]
        }
    }
    pulp::Arch::new().dispatch(Dot(a, b))
}

/// The sums of a*b for several b, with the vectors of its caller. Written by hand because the
/// compiler does not vectorize sums.
#[inline(always)]
pub(super) fn simd_dots<S: Simd, const N: usize>(simd: S, a: &[f32], b: [&[f32]; N]) -> [f32; N] {
    let (a_vectors, a_tail) = S::as_simd_f32s(a);
    let b = b.map(S::as_simd_f32s);
    let mut sums = [simd.splat_f32s(0.0); N];
    for (i, a) in a_vectors.iter().enumerate() {
        for (sum, b) in sums.iter_mut().zip(&b) {
            *sum = simd.mul_add_e_f32s(*a, b.0[i], *sum);
        }
    }
    let mut out = sums.map(|sum| simd.reduce_sum_f32s(sum));
    for (out, b) in out.iter_mut().zip(&b) {
        *out += a_tail.iter().zip(b.1).map(|(a, b)| a * b).sum::<f32>();
    }
    out
}

/// y += the sum of factor * x, with the vectors of its caller
#[inline(always)]
pub(super) fn simd_add<S: Simd, const N: usize>(
    simd: S,
    factors: [f32; N],
    x: [&[f32]; N],
    y: &mut [f32],
) {
    let (y_vectors, y_tail) = S::as_mut_simd_f32s(y);
    let x = x.map(S::as_simd_f32s);
    let wide = factors.map(|factor| simd.splat_f32s(factor));
    for (i, y) in y_vectors.iter_mut().enumerate() {
        for (factor, x) in wide.iter().zip(&x) {
            *y = simd.mul_add_e_f32s(*factor, x.0[i], *y);
        }
    }
    for (factor, x) in factors.iter().zip(&x) {
        y_tail.iter_mut().zip(x.1).for_each(|(y, x)| *y += factor * x);
    }
}

/// The values of a contiguous tensor.
pub(super) fn slice<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<T>()?[start..end]),
        None => bail!("expected a contiguous tensor, found strides {:?}", layout.stride()),
    }
}
