//! One step of a product, for the element type of A and the format of B. A microkernel (`micro.rs`)
//! is a loop over it.

use half::{bf16, f16};

use super::format::{Format, Stored};
use super::simd::{Element, Simd};

/// One step of a product.
pub(super) trait Product<S: Simd> {
    /// The elements of A's rows.
    type A: Copy + Default + Send + Sync;
    /// What `step` reads B as.
    type B;
    /// How B is stored in a panel.
    const FORMAT: Format;
    /// Values of k per step.
    const K_STEP: usize = Self::FORMAT.k_step();
    /// Sums over this many k start at zero in registers and are then added to the total. The
    /// rounding error of a sum over n values then grows with √(`SUM_K` + n / `SUM_K`) instead of
    /// √n.
    const SUM_K: usize;
    /// There are few instructions per cache line, so that the hardware prefetcher keeps up with
    /// several streams without help.
    const MEMORY_BOUND: bool;

    /// acc (MR, NV·LANES) += a (MR, K_STEP) · b (K_STEP, NV·LANES)
    ///
    /// # Safety
    /// The CPU has the instructions. `a[r] + at` points to `K_STEP` readable elements, `b` to
    /// NV·LANES·`K_STEP`.
    unsafe fn step<const MR: usize, const NV: usize>(
        s: S,
        acc: &mut [[S::F; NV]; MR],
        a: &[*const Self::A; MR],
        at: usize,
        b: *const Self::B,
    );

    /// Steps that one call of [`Product::group`] takes.
    const GROUP: usize = 1;

    /// `GROUP` steps at once.
    ///
    /// # Safety
    /// As `GROUP` calls of [`Product::step`].
    #[inline(always)]
    unsafe fn group<const MR: usize, const NV: usize>(
        s: S,
        acc: &mut [[S::F; NV]; MR],
        a: &[*const Self::A; MR],
        at: usize,
        b: *const Self::B,
    ) {
        // SAFETY: the caller's contract.
        unsafe { Self::step(s, acc, a, at, b) }
    }
}

/// `acc[r][v] += a[r]·b[v]` for one value of k.
#[inline(always)]
unsafe fn rank_one<S: Simd, const MR: usize, const NV: usize>(
    s: S,
    acc: &mut [[S::F; NV]; MR],
    a: &[*const f32; MR],
    at: usize,
    b: [S::F; NV],
) {
    for r in 0..MR {
        // SAFETY: `Product::step`'s contract.
        let a = s.splat(unsafe { *a[r].add(at) });
        for v in 0..NV {
            acc[r][v] = s.pin(s.mul_add(a, b[v], acc[r][v]));
        }
    }
}

/// `acc[r][v] += a[r][LANE]·b` for the column vector v of one value of k.
#[inline(always)]
fn one_column<S: Simd, const LANE: usize, const MR: usize, const NV: usize>(
    s: S,
    acc: &mut [[S::F; NV]; MR],
    a: &[S::F; MR],
    v: usize,
    b: S::F,
) {
    for r in 0..MR {
        acc[r][v] = s.mul_add_lane::<LANE>(a[r], b, acc[r][v]);
    }
}

/// [`Simd::GROUP`] values of k of each row.
///
/// # Safety
/// They are readable from `at` on.
#[inline(always)]
pub(super) unsafe fn load_rows<S: Simd, T, const MR: usize>(
    s: S,
    a: &[*const T; MR],
    at: usize,
) -> [S::F; MR] {
    let mut rows = [s.splat(0.0); MR];
    for (row, a) in rows.iter_mut().zip(a) {
        // SAFETY: the caller's contract.
        *row = unsafe { s.load_f32(a.add(at).cast()) };
    }
    rows
}

/// `$body` for `$lane` = 0, 1, 2, 3 as constants.
macro_rules! for_lanes {
    ($lane:ident => $body:block) => {{
        for_lanes!($lane, 0, $body);
        for_lanes!($lane, 1, $body);
        for_lanes!($lane, 2, $body);
        for_lanes!($lane, 3, $body);
    }};
    ($lane:ident, $value:literal, $body:block) => {{
        const $lane: usize = $value;
        $body
    }};
}
#[cfg(target_arch = "aarch64")]
pub(super) use for_lanes;

/// `SUM_K` of products in f32: about √K of common models, and a divisor of the length of every
/// k-block (`sweep.rs`). Measured on Zen 4: 64 makes f32 with many rows 5 % slower; 256 is no
/// faster and, for K = 512, less accurate than oneDNN.
pub(super) const SUM_F32: usize = 128;

/// A in f32, B in T. Every element of B is widened to f32 as it is loaded.
pub(super) struct Widen<T>(std::marker::PhantomData<T>);

macro_rules! widen {
    ($dtype:ty) => {
        impl<S: Simd> Product<S> for Widen<$dtype> {
            type A = f32;
            type B = $dtype;
            const FORMAT: Format = <$dtype as Stored>::FORMAT;
            const SUM_K: usize = SUM_F32;
            const MEMORY_BOUND: bool = size_of::<$dtype>() == size_of::<f32>();

            #[inline(always)]
            unsafe fn step<const MR: usize, const NV: usize>(
                s: S,
                acc: &mut [[S::F; NV]; MR],
                a: &[*const f32; MR],
                at: usize,
                b: *const $dtype,
            ) {
                // SAFETY: the caller's contract.
                unsafe {
                    let mut columns = [s.splat(0.0); NV];
                    for (v, column) in columns.iter_mut().enumerate() {
                        *column = <$dtype>::load(s, b.add(v * S::LANES));
                    }
                    rank_one(s, acc, a, at, columns);
                }
            }

            const GROUP: usize = S::GROUP;

            #[inline(always)]
            unsafe fn group<const MR: usize, const NV: usize>(
                s: S,
                acc: &mut [[S::F; NV]; MR],
                a: &[*const f32; MR],
                at: usize,
                b: *const $dtype,
            ) {
                // SAFETY: the caller's contract.
                unsafe {
                    let a = load_rows(s, a, at);
                    for_lanes!(LANE => {
                        for v in 0..NV {
                            let column = <$dtype>::load(s, b.add((LANE * NV + v) * S::LANES));
                            one_column::<S, LANE, MR, NV>(s, acc, &a, v, column);
                        }
                    });
                }
            }
        }
    };
}

widen!(f32);
widen!(f16);

/// bf16 is stored as pairs of neighbours in k. The even values of a step are widened first, then
/// the odd ones.
impl<S: Simd> Product<S> for Widen<bf16> {
    type A = f32;
    type B = bf16;
    const FORMAT: Format = Format::Bf16;
    const SUM_K: usize = SUM_F32;
    const MEMORY_BOUND: bool = false;

    #[inline(always)]
    unsafe fn step<const MR: usize, const NV: usize>(
        s: S,
        acc: &mut [[S::F; NV]; MR],
        a: &[*const f32; MR],
        at: usize,
        b: *const bf16,
    ) {
        // SAFETY: the caller's contract.
        unsafe {
            let mut columns = [s.splat(0.0); NV];
            for (v, column) in columns.iter_mut().enumerate() {
                *column = s.load_bf16_even(b.add(v * S::LANES * 2));
            }
            rank_one(s, acc, a, at, columns);
            // Reload the pairs: keeping them in registers for both halves would spill accumulators.
            let b = unknown(b);
            for (v, column) in columns.iter_mut().enumerate() {
                *column = s.load_bf16_odd(b.add(v * S::LANES * 2));
            }
            rank_one(s, acc, a, at + 1, columns);
        }
    }

    const GROUP: usize = S::GROUP.div_ceil(2);

    #[inline(always)]
    unsafe fn group<const MR: usize, const NV: usize>(
        s: S,
        acc: &mut [[S::F; NV]; MR],
        a: &[*const f32; MR],
        at: usize,
        b: *const bf16,
    ) {
        // SAFETY: the caller's contract.
        unsafe {
            let a = load_rows(s, a, at);
            for v in 0..2 * NV {
                let pairs = b.add(v * S::LANES * 2);
                let (even, odd) = (s.load_bf16_even(pairs), s.load_bf16_odd(pairs));
                if v < NV {
                    one_column::<S, 0, MR, NV>(s, acc, &a, v, even);
                    one_column::<S, 1, MR, NV>(s, acc, &a, v, odd);
                } else {
                    one_column::<S, 2, MR, NV>(s, acc, &a, v - NV, even);
                    one_column::<S, 3, MR, NV>(s, acc, &a, v - NV, odd);
                }
            }
        }
    }
}

/// Returns `p` unchanged. The compiler cannot know that, and loads from it again.
#[inline(always)]
#[cfg_attr(
    target_arch = "x86_64",
    allow(clippy::pointers_in_nomem_asm_block, reason = "nothing is read or written")
)]
fn unknown<T>(p: *const T) -> *const T {
    #[cfg(target_arch = "x86_64")]
    {
        let mut p = p;
        // SAFETY: the assembly is a comment; the register keeps its value.
        unsafe {
            std::arch::asm!("/* {p} */", p = inout(reg) p, options(pure, nomem, nostack, preserves_flags))
        };
        p
    }
    #[cfg(not(target_arch = "x86_64"))]
    p
}

/// Pairs of bf16 in A and B, multiplied by an instruction for them (`isa/`).
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) struct DotBf16;
