//! The step of a product for one pair of element types: a microkernel (`micro.rs`) is a loop over it.

use half::{bf16, f16};

use super::simd::{Element, Simd};

/// One step of a product.
pub(super) trait Product<S: Simd> {
    /// What A's rows hold.
    type A: Copy + Default + Send + Sync;
    /// What B holds.
    type B;
    /// k per step.
    const K_STEP: usize;
    /// Sums of this many k begin at zero in registers and then join the total: what rounding does to a sum of n then grows with
    /// √(`SUM_K` + n / `SUM_K`), not with √n.
    const SUM_K: usize;

    /// acc (MR, NV·LANES) += a (MR, K_STEP) · b (K_STEP, NV·LANES)
    ///
    /// # Safety
    /// The CPU has the instructions. `a[r] + at` points to `K_STEP` readable elements, `b` to NV·LANES·`K_STEP`.
    unsafe fn step<const MR: usize, const NV: usize>(
        s: S,
        acc: &mut [[S::F; NV]; MR],
        a: &[*const Self::A; MR],
        at: usize,
        b: *const Self::B,
    );

    /// Steps that [`Product::group`] takes.
    const GROUP: usize = 1;

    /// So many steps at once.
    ///
    /// # Safety
    /// As that many calls of [`Product::step`].
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
            acc[r][v] = s.in_turn(s.mul_add(a, b[v], acc[r][v]));
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
pub(super) unsafe fn load_rows<S: Simd, T, const MR: usize>(s: S, a: &[*const T; MR], at: usize) -> [S::F; MR] {
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

/// About √K of the models at hand, and a divisor of the k in every block of `gemm.rs`. Joining the total that often costs little
/// (64: f32 5 % slower with many rows; 256: no faster, and for K = 512 further from f64 than oneDNN).
pub(super) const SUM_F32: usize = 128;

/// f32 activations, B of one element per k: f32, or f16 widened as it is loaded.
pub(super) struct Widen<T>(std::marker::PhantomData<T>);

macro_rules! widen {
    ($dtype:ty) => {
        impl<S: Simd> Product<S> for Widen<$dtype> {
            type A = f32;
            type B = $dtype;
            const K_STEP: usize = 1;
            const SUM_K: usize = SUM_F32;

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

/// f32 activations, pairs of bf16 widened as they are loaded: first the even, then the odd k.
impl<S: Simd> Product<S> for Widen<bf16> {
    type A = f32;
    type B = bf16;
    const K_STEP: usize = 2;
    const SUM_K: usize = SUM_F32;

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
            // Vectors that stayed in registers for both would take the place of sums, which then go to memory and back each time.
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

/// The same pointer, but the compiler does not know that: what was loaded from it is loaded again.
#[inline(always)]
#[cfg_attr(target_arch = "x86_64", allow(clippy::pointers_in_nomem_asm_block, reason = "nothing is read or written"))]
fn unknown<T>(p: *const T) -> *const T {
    #[cfg(target_arch = "x86_64")]
    {
        let mut p = p;
        // SAFETY: a comment alone; the register keeps its value.
        unsafe { std::arch::asm!("/* {p} */", p = inout(reg) p, options(pure, nomem, nostack, preserves_flags)) };
        p
    }
    #[cfg(not(target_arch = "x86_64"))]
    p
}

/// Pairs of bf16 on both sides, by the instruction for them.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) struct DotBf16;

#[cfg(target_arch = "x86_64")]
impl Product<super::avx512::Avx512> for DotBf16 {
    type A = bf16;
    type B = bf16;
    const K_STEP: usize = 2;
    /// What bf16 rounds away at the end is a thousand times more.
    const SUM_K: usize = usize::MAX;

    #[inline(always)]
    unsafe fn step<const MR: usize, const NV: usize>(
        s: super::avx512::Avx512,
        acc: &mut [[std::arch::x86_64::__m512; NV]; MR],
        a: &[*const bf16; MR],
        at: usize,
        b: *const bf16,
    ) {
        use super::avx512::{dot_bf16, splat_pair};
        // SAFETY: the caller's contract.
        unsafe {
            let mut columns = [s.splat(0.0); NV];
            for (v, column) in columns.iter_mut().enumerate() {
                *column = s.load_f32(b.add(v * 32).cast());
            }
            for r in 0..MR {
                let a = splat_pair(a[r].add(at));
                for v in 0..NV {
                    acc[r][v] = s.in_turn(dot_bf16(acc[r][v], a, columns[v]));
                }
            }
        }
    }
}
