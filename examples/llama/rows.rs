//! What the fused CPU operations share: rows of a tensor over candle's thread pool, and loops that the compiler may vectorize for
//! this machine.

use std::sync::Mutex;

use candle_core::{CpuStorage, Layout, Result, WithDType, bail};
use half::{bf16, f16};

/// A dtype of the model, of which the CPU computes in f32.
pub(super) trait Real: WithDType {
    fn widen(self) -> f32;
    fn round(x: f32) -> Self;
}

impl Real for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn round(x: f32) -> Self {
        x
    }
}

impl Real for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn round(x: f32) -> Self {
        Self::from_f32(x)
    }
}

impl Real for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    fn round(x: f32) -> Self {
        Self::from_f32(x)
    }
}

/// Calls `f`, compiled for the vectors that this machine has; what `f` calls counts only as far as it is inlined.
#[inline(always)]
pub(super) fn vectorized<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// Calls `f(row, its part of out)` for every row; `work` is about the number of multiplications in one. On candle's thread
/// pool, if there is enough of it.
pub(super) fn for_each_row<T: Send>(out: &mut [T], row_len: usize, work: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    /// Some 20 microseconds: more than it costs to wake another thread.
    const BLOCK: usize = 128 * 1024;
    if row_len == 0 || work == 0 {
        return;
    }
    let rows = BLOCK.div_ceil(work);
    let blocks = out.chunks_mut(rows * row_len).enumerate().collect();
    in_parallel(blocks, |(block, part): (usize, &mut [T])| {
        part.chunks_mut(row_len).enumerate().for_each(|(i, row)| f(block * rows + i, row));
    });
}

/// Calls `f` for every task, the first ones first, on candle's thread pool if there are several.
pub(super) fn in_parallel<T: Send>(mut tasks: Vec<T>, f: impl Fn(T) + Sync) {
    if tasks.len() <= 1 {
        return tasks.pop().into_iter().for_each(f);
    }
    let tasks: Vec<_> = tasks.into_iter().map(|task| Mutex::new(Some(task))).collect();
    candle_core::utils::barrier_pool().execute_chunked(tasks.len(), |range| {
        for task in &tasks[range] {
            // each task is taken once: the lock is free and never poisoned
            let task = task.lock().ok().and_then(|mut task| task.take());
            task.into_iter().for_each(&f);
        }
    });
}

/// The values of a contiguous tensor.
pub(super) fn slice<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<T>()?[start..end]),
        None => bail!("expected a contiguous tensor, found strides {:?}", layout.stride()),
    }
}
