//! Products with packed weights: A (rows, k) · panel (k, NR) -> sums (rows, NR) in f32.
//!
//! Up to MR rows take one sweep along the panel, which is fetched ahead of use (decode). More take the panel in blocks of k that
//! stay in cache while all rows pass by (prefill). Sums run over k in the same parts and order either way.

use std::mem::MaybeUninit;

use half::bf16;

use super::Kernel;
use super::glu::Tile;
use super::micro::{Call, Micro};
use super::pack::{Packable, Packed};
use super::product::SUM_F32;
use crate::activation::Glu;

/// With few rows, bytes of B that pass all rows before the next ones, and one part of a sum at least. It leaves room in L1 for the
/// sums and the same k of the rows (with 16 columns 4 KiB: 2 to 8 % slower in 16 bit, 16 KiB: up to 10 %).
pub(super) const FEW_ROWS_BLOCK: usize = 8 << 10;
/// The same where a part of a sum is more than L1 holds beside the next one, so that blocks wait in L2
/// ([`super::micro::Ahead::PACE_FAR`]): with 32 and 64 columns (16 KiB: 1 to 10 % slower, 32 KiB: up to 4 %, 256 KiB: up to 10 %).
pub(super) const FEW_ROWS_BLOCK_FAR: usize = 64 << 10;
/// With more rows, bytes of B: a quarter of 1 MiB of L2, carrying the sums in and out of registers so rarely that it no longer shows
/// (64 KiB: 3 % slower in f32).
pub(super) const BLOCK: usize = 256 << 10;
/// Up to so many rows the smaller block is faster (measured: 1.2 times at 16 rows, the same at 32).
const FEW_ROWS: usize = 24;
/// From so many rows on, a block of k is widened once rather than by each microkernel (measured: 0.96 to 1.1 times as fast at
/// 128 rows, 1.0 to 1.2 times at 512).
pub(super) const WIDEN_FROM: usize = 160;
/// How far ahead a sweep fetches. At 8 KiB the memory is what it waits for (4 KiB: up to 20 % slower with few instructions per
/// byte; 16 KiB: up to 4 %).
const SWEEP_AHEAD: usize = 8 << 10;
/// Up to so many bytes a matrix is likely to lie in a cache from the call before, so that a panel alone waits for its sums. What
/// comes from memory comes faster in one stream (AVX-512).
pub(super) const BESIDE_BYTES: usize = 8 << 20;
/// The least part of a line that is worth an instruction to fetch it.
const LEAST_PACE: usize = 8;

/// The functions of one kernel for weights of dtype T.
pub(super) struct Gemm<T> {
    /// Columns of a panel.
    pub(super) nr: usize,
    /// Streams of a panel.
    pub(super) streams: usize,
    /// A holds f32, else T.
    pub(super) a_is_f32: bool,
    /// Microkernels for 1, 2, .., MR rows over panels as they are packed.
    pub(super) micro: Vec<Micro>,
    /// The same, together fetching the next block of k.
    pub(super) micro_block: Vec<Micro>,
    /// Bytes of B in such a block where the rows are few.
    pub(super) few_rows_block: usize,
    /// Microkernels for one sweep along the panel, fetching ahead where that is faster.
    pub(super) micro_sweep: Vec<Micro>,
    /// For 1, 2, .. rows: microkernels for several panels at once, and for how many. Few rows leave the registers for it, and one
    /// panel alone would wait for each of its sums.
    pub(super) micro_beside: Vec<(usize, Micro)>,
    /// The same for matrices of so many bytes at most.
    pub(super) beside_bytes: usize,
    /// Where T is not what is multiplied: with many rows (more than MR, and `widen_from` at least) each block of k is widened
    /// once, for these microkernels.
    pub(super) widen: Option<(WidenSteps<T>, Vec<Micro>)>,
    pub(super) widen_from: usize,
    /// x (n) -> A (n), both contiguous.
    pub(super) convert: unsafe fn(*const T, usize, *mut u8),
    /// Sums of a gate-up panel -> h: operation, sums, first element of h, stride of h.
    pub(super) glu_tile: unsafe fn(&Glu, Tile, *mut u8, usize),
    /// Sums of a panel times a factor -> y: sums, factor, first element of y, stride of y, columns.
    pub(super) out_tile: OutTile<T>,
    /// The same with y in f32.
    pub(super) out_tile_f32: OutTile<f32>,
}

/// Writes y from the sums of a panel, see [`Gemm::out_tile`].
pub(super) type OutTile<Y> = unsafe fn(Tile, f32, *mut Y, usize, usize);

impl<T> Gemm<T> {
    /// How many panels of a matrix of so many bytes so many rows take at once.
    pub(super) fn panels_at_once(&self, rows: usize, bytes: usize) -> usize {
        let beside = self.micro_beside.get(rows.wrapping_sub(1)).filter(|_| bytes <= self.beside_bytes);
        beside.map_or(1, |&(panels, _)| panels)
    }
}

/// Packed steps, bytes from stream to stream, how many, f32 out.
type WidenSteps<T> = unsafe fn(*const T, usize, usize, *mut f32);

/// A dtype that the kernels multiply.
pub(super) trait GemmElement: Packable {
    /// The kernel's functions for this dtype.
    fn gemm(kernel: &Kernel) -> &Gemm<Self>;
}

/// Rows of A.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub(super) a: *const u8,
    pub(super) a_stride: usize,
    pub(super) a_bytes: usize,
    pub(super) rows: usize,
}

impl Rows {
    /// From row `row` and element `k` on.
    ///
    /// # Safety
    /// They exist.
    unsafe fn at(&self, row: usize, k: usize) -> *const u8 {
        // SAFETY: the caller's contract.
        unsafe { self.a.add((row * self.a_stride + k) * self.a_bytes) }
    }
}

/// A (rows, k) · panels (k, NR) -> sums (panels, rows, NR), as many panels from this one on as the kernel takes at once.
///
/// # Safety
/// A and `sums` have the rows, A of all steps of a panel; the panels exist.
pub(super) unsafe fn sweep_beside<T: Packable>(gemm: &Gemm<T>, weight: &Packed<T>, panel: usize, a: Rows, sums: *mut f32) {
    let (_, micro) = gemm.micro_beside[a.rows - 1];
    // SAFETY: the caller's contract; panels follow each other.
    unsafe { micro(call(weight, weight.panel(panel).cast(), weight.steps(), a, sums)) }
}

/// A call for the first `steps` steps at `b`, with nothing to fetch.
fn call<T: Packable>(weight: &Packed<T>, b: *const u8, steps: usize, a: Rows, sums: *mut f32) -> Call {
    Call {
        a: a.a,
        a_stride: a.a_stride,
        b,
        stream: weight.stream_len() * size_of::<T>(),
        apart: weight.panel_len() * size_of::<T>(),
        steps,
        acc: sums,
        first: true,
        next: [b; 2],
        turn: 0,
        pace: 0,
    }
}

/// A (rows, k) · panel (k, NR) -> sums (rows, NR)
///
/// # Safety
/// A and `sums` have the rows, A of all steps of the panel; `widened` has BLOCK bytes where the kernel widens. `after`, what this
/// thread is likely to read next, is only prefetched.
pub(super) unsafe fn product<T: Packable>(
    gemm: &Gemm<T>,
    weight: &Packed<T>,
    panel: usize,
    a: Rows,
    sums: *mut f32,
    widened: *mut f32,
    after: *const u8,
) {
    let mr = gemm.micro.len();
    let (steps, b) = (weight.steps(), weight.panel(panel));
    let step_bytes = weight.step_len() * size_of::<T>();
    if a.rows <= mr {
        let ahead = SWEEP_AHEAD / step_bytes;
        let next = [b.cast::<u8>().wrapping_add(ahead * step_bytes), after];
        let call = Call { next, turn: steps.saturating_sub(ahead), ..call(weight, b.cast(), steps, a, sums) };
        // SAFETY: the caller's contract.
        return unsafe { gemm.micro_sweep[a.rows - 1](call) };
    }
    let panels = a.rows.div_ceil(mr);
    let first_row = |panel: usize| a.rows * panel / panels;
    let widen = gemm.widen.as_ref().filter(|_| a.rows >= gemm.widen_from);
    let k_bytes = gemm.nr * if widen.is_some() { size_of::<f32>() } else { size_of::<T>() };
    let block_k = if a.rows <= FEW_ROWS { (gemm.few_rows_block / k_bytes).max(SUM_F32) } else { BLOCK / k_bytes };
    debug_assert!(block_k % SUM_F32 == 0, "blocks end where sums do");
    let block_steps = block_k / T::K_STEP;
    debug_assert!(block_steps % gemm.streams == 0, "blocks end where rounds over the streams do");
    let rounds = block_steps / gemm.streams;
    // Each microkernel's part of the next block, in bytes of each stream and round.
    let pace = (step_bytes / panels).max(LEAST_PACE);
    let mut start = 0;
    loop {
        let count = block_steps.min(steps - start);
        // SAFETY: the caller's contract; the block's steps exist, and `next` is only prefetched.
        unsafe {
            let packed = b.add(start / gemm.streams * weight.step_len());
            let (block, micro, micro_steps) = match widen {
                Some((widen, micro)) => {
                    widen(packed, weight.stream_len() * size_of::<T>(), count, widened);
                    (widened.cast_const().cast::<u8>(), micro, count * T::K_STEP)
                }
                None => (packed.cast(), &gemm.micro, count),
            };
            let next = if start + count < steps { packed.cast::<u8>().wrapping_add(rounds * step_bytes) } else { after };
            for panel in 0..panels {
                let (row, end) = (first_row(panel), first_row(panel + 1));
                let ahead = panel * rounds * pace;
                let prefetching = widen.is_none() && ahead < rounds * step_bytes;
                let micro = if prefetching { &gemm.micro_block } else { micro };
                let a = Rows { a: a.at(row, start * T::K_STEP), ..a };
                micro[end - row - 1](Call {
                    first: start == 0,
                    next: [next.wrapping_add(ahead); 2],
                    pace,
                    ..call(weight, block, micro_steps, a, sums.add(row * gemm.nr))
                });
            }
        }
        start += count;
        if start >= steps {
            return;
        }
    }
}

/// Elements of x as A holds them.
///
/// # Safety
/// The CPU has the instructions of S; `from` has n elements, `to` room for them.
#[inline(always)]
pub(super) unsafe fn convert<S: super::simd::Simd, T: super::simd::Element>(s: S, from: *const T, n: usize, to: *mut f32) {
    let whole = n - n % S::LANES;
    let mut i = 0;
    // SAFETY: the caller's contract; the tail goes through a buffer of LANES elements at least.
    unsafe {
        while i < whole {
            s.store_f32(T::load(s, from.add(i)), to.add(i));
            i += S::LANES;
        }
        if whole < n {
            let mut tail = [T::default(); super::simd::MAX_LANES];
            std::ptr::copy_nonoverlapping(from.add(whole), tail.as_mut_ptr(), n - whole);
            let mut wide = [0f32; super::simd::MAX_LANES];
            s.store_f32(T::load(s, tail.as_ptr()), wide.as_mut_ptr());
            std::ptr::copy_nonoverlapping(wide.as_ptr(), to.add(whole), n - whole);
        }
    }
}

/// bf16 as it is.
///
/// # Safety
/// `from` has n elements, `to` room for them.
pub(super) unsafe fn copy_bf16(from: *const bf16, n: usize, to: *mut u8) {
    // SAFETY: the caller's contract.
    unsafe { std::ptr::copy_nonoverlapping(from, to.cast(), n) }
}

/// Sums of one panel, with their bias, times `factor`, rounded once -> y (rows, columns)
///
/// # Safety
/// The CPU has the instructions. The tile has NV·LANES columns; `y` has its rows, `y_stride` apart, of `columns` writable elements.
#[inline(always)]
pub(super) unsafe fn out_tile<S: super::simd::Simd, T: super::simd::Element, const NV: usize>(
    s: S,
    tile: Tile,
    factor: f32,
    y: *mut T,
    y_stride: usize,
    columns: usize,
) {
    let factor = s.splat(factor);
    for row in 0..tile.rows {
        for v in 0..NV {
            let at = v * S::LANES;
            // SAFETY: the caller's contract; a vector that is not whole goes through a buffer.
            unsafe {
                let value = s.mul(tile.vector::<S, NV>(s, row, v), factor);
                if at >= columns {
                    break; // the panel's padding, beyond y
                }
                let out = y.add(row * y_stride + at);
                if at + S::LANES <= columns {
                    T::store(s, value, out);
                } else {
                    let mut buffer = [MaybeUninit::<T>::uninit(); super::simd::MAX_LANES];
                    T::store(s, value, buffer.as_mut_ptr().cast());
                    std::ptr::copy_nonoverlapping(buffer.as_ptr().cast::<T>(), out, columns - at);
                }
            }
        }
    }
}
