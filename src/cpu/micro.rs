//! The microkernel: `acc (MR, NR) += A (MR, k) · B (k, NR)` with the sums in registers, written once over [`Simd`].
//!
//! B is one panel of a packed weight (`pack.rs`), or a few: for each step of `K_STEP` values of k, NR columns of `K_STEP` neighbours.
//! A is row-major. A step loads NV vectors of B and, for each of MR rows, broadcasts the row's element(s) and adds the
//! products. Nothing is summed across lanes, and each sum runs over k in order, in parts of [`Product::SUM_K`]: a result does not
//! depend on how many rows or threads there are, nor on where `gemm.rs` cuts k.
//!
//! [`Product`] is the step for one pair of element types.

use std::sync::atomic::{Ordering, compiler_fence};

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

    /// Where the sums of all panels fill no more vectors than this, a round over the streams is unrolled. With more of them, or
    /// more to do for B, the compiler mixes up its steps and runs out of registers.
    const UNROLL: usize = 0;

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
    row_by_row: bool,
) {
    for r in 0..MR {
        // SAFETY: `Product::step`'s contract.
        let a = s.splat(unsafe { *a[r].add(at) });
        for v in 0..NV {
            acc[r][v] = s.mul_add(a, b[v], acc[r][v]);
        }
        if row_by_row {
            // No load moves across.
            compiler_fence(Ordering::SeqCst);
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
    ($dtype:ty, $unroll:literal) => {
        impl<S: Simd> Product<S> for Widen<$dtype> {
            type A = f32;
            type B = $dtype;
            const K_STEP: usize = 1;
            const SUM_K: usize = SUM_F32;
            const UNROLL: usize = $unroll;

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
                    rank_one(s, acc, a, at, columns, S::ROW_BY_ROW);
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

widen!(f32, 12);
widen!(f16, 10);

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
            rank_one(s, acc, a, at, columns, false);
            // Vectors that stayed in registers for both would take the place of sums, which then go to memory and back each time.
            let b = unknown(b);
            for (v, column) in columns.iter_mut().enumerate() {
                *column = s.load_bf16_odd(b.add(v * S::LANES * 2));
            }
            rank_one(s, acc, a, at + 1, columns, false);
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
                    acc[r][v] = dot_bf16(acc[r][v], a, columns[v]);
                }
            }
        }
    }
}

/// What a microkernel is called with; the pointers' contract is at [`run`].
#[derive(Clone, Copy)]
pub(super) struct Call {
    /// A (MR, k), its first element
    pub(super) a: *const u8,
    /// Elements from one row of A to the next.
    pub(super) a_stride: usize,
    /// B (k, NR), packed
    pub(super) b: *const u8,
    /// Bytes from one stream of a panel to the next.
    pub(super) stream: usize,
    /// Bytes from one panel to the next.
    pub(super) apart: usize,
    pub(super) steps: usize,
    /// acc (PANELS, MR, NR)
    pub(super) acc: *mut f32,
    /// Start from zero, not from what `acc` holds.
    pub(super) first: bool,
    /// What to bring into the cache meanwhile, see [`Ahead`]: from here on, and from the step `turn` on from there.
    pub(super) next: [*const u8; 2],
    pub(super) turn: usize,
    /// Bytes of each stream that [`Ahead::PACE`] fetches in a round.
    pub(super) pace: usize,
}

/// How much a microkernel prefetches.
pub(super) struct Ahead;

impl Ahead {
    pub(super) const NOTHING: u8 = 0;
    /// Two lines a step, of a block that several microkernels fetch together.
    pub(super) const TWO_LINES: u8 = 1;
    /// As much as it reads.
    pub(super) const A_STEP: u8 = 2;
    /// `pace` bytes of every stream in a round over them, of a block that all microkernels that pass the one before fetch together.
    pub(super) const PACE: u8 = 3;
}

pub(super) const LINE: usize = 64;
/// Steps that a sweep fetches ahead in each of several streams.
const STREAM_AHEAD: usize = 32;

/// A microkernel of fixed MR.
pub(super) type Micro = unsafe fn(Call);

/// The body of every microkernel.
///
/// # Safety
/// The CPU has the instructions of S and P. A has MR rows of at least `steps·K_STEP` readable elements, B `steps` packed
/// steps of NV·LANES columns, `acc` MR·NV·LANES writable f32. `next` is never read, so it may point anywhere.
#[inline(always)]
pub(super) unsafe fn run<S: Simd, P: Product<S>, const MR: usize, const NV: usize, const AHEAD: u8>(s: S, call: Call) {
    let step_bytes = NV * S::LANES * P::K_STEP * size_of::<P::B>();
    // SAFETY: all pointers stay within what the caller promises.
    unsafe {
        let mut a = [call.a.cast::<P::A>(); MR];
        for (r, row) in a.iter_mut().enumerate() {
            *row = row.add(r * call.a_stride);
        }
        let mut b = call.b.cast::<P::B>();
        let mut next = call.next[0];
        let (mut at, end, turn) = (0, call.steps * P::K_STEP, call.turn * P::K_STEP);
        let mut first = call.first;
        loop {
            let mut acc = [[s.splat(0.0); NV]; MR];
            let sum_end = if P::SUM_K < end - at { at + P::SUM_K } else { end };
            let totals = call.acc;
            if P::SUM_K == usize::MAX && !first {
                for (r, row) in acc.iter_mut().enumerate() {
                    for (v, sum) in row.iter_mut().enumerate() {
                        *sum = s.load_f32(totals.add((r * NV + v) * S::LANES));
                    }
                }
            }
            while at < sum_end {
                let stop = if at < turn && turn < sum_end { turn } else { sum_end };
                while P::GROUP > 1 && at + P::GROUP * P::K_STEP <= stop {
                    next = fetch::<AHEAD>(next, P::GROUP, step_bytes);
                    P::group(s, &mut acc, &a, at, b);
                    b = b.add(NV * S::LANES * P::K_STEP * P::GROUP);
                    at += P::K_STEP * P::GROUP;
                }
                while at < stop {
                    next = fetch::<AHEAD>(next, 1, step_bytes);
                    P::step(s, &mut acc, &a, at, b);
                    b = b.add(NV * S::LANES * P::K_STEP);
                    at += P::K_STEP;
                }
                if at == turn {
                    next = call.next[1];
                }
            }
            for (r, row) in acc.into_iter().enumerate() {
                for (v, sum) in row.into_iter().enumerate() {
                    let total = totals.add((r * NV + v) * S::LANES);
                    let joins = P::SUM_K != usize::MAX && !first;
                    s.store_f32(if joins { s.add(s.load_f32(total), sum) } else { sum }, total);
                }
            }
            first = false;
            if at >= end {
                return;
            }
        }
    }
}

/// [`run`] over panels in streams, PANELS neighbours at once: a step of each in turn. Step t of a panel is the next one of its
/// stream t mod STREAMS (`pack.rs`). `SUM_K` is finite, and `turn` unused.
///
/// # Safety
/// As [`run`] for each panel, `apart` bytes after the one before it, `stream` bytes from one of its streams to the next; its sums
/// (MR, NR) lie behind those of the one before it.
#[inline(always)]
pub(super) unsafe fn run_streams<
    S: Simd,
    P: Product<S>,
    const MR: usize,
    const NV: usize,
    const PANELS: usize,
    const STREAMS: usize,
    const AHEAD: u8,
>(
    s: S,
    call: Call,
) {
    let step_len = NV * S::LANES * P::K_STEP;
    debug_assert!(P::SUM_K != usize::MAX, "one sum over all of k would depend on where k is cut");
    let unrolled = AHEAD == Ahead::NOTHING && PANELS * MR * NV <= P::UNROLL;
    // SAFETY: all pointers stay within what the caller promises.
    unsafe {
        let mut a = [call.a.cast::<P::A>(); MR];
        for (r, row) in a.iter_mut().enumerate() {
            *row = row.add(r * call.a_stride);
        }
        let mut b = [call.b.cast::<P::B>(); PANELS];
        for (p, panel) in b.iter_mut().enumerate() {
            *panel = panel.byte_add(p * call.apart);
        }
        let (mut at, end) = (0, call.steps * P::K_STEP);
        let (mut next, mut first) = (call.next[0], call.first);
        loop {
            let mut acc = [[[s.splat(0.0); NV]; MR]; PANELS];
            let sum_end = if P::SUM_K < end - at { at + P::SUM_K } else { end };
            while unrolled && at + STREAMS * P::K_STEP <= sum_end {
                for i in 0..STREAMS {
                    for (acc, b) in acc.iter_mut().zip(&b) {
                        P::step(s, acc, &a, at, b.byte_add(i * call.stream));
                    }
                    at += P::K_STEP;
                }
                b.iter_mut().for_each(|b| *b = b.add(step_len));
            }
            while at < sum_end {
                let round_end = sum_end.min(at + STREAMS * P::K_STEP);
                let (mut from, mut fetched) = (b, next);
                loop {
                    if AHEAD == Ahead::PACE {
                        prefetch(fetched);
                        fetched = fetched.wrapping_add(call.stream);
                    }
                    if AHEAD == Ahead::A_STEP {
                        prefetch(from[0].wrapping_add(STREAM_AHEAD * step_len).cast());
                    }
                    for (acc, b) in acc.iter_mut().zip(&from) {
                        P::step(s, acc, &a, at, *b);
                    }
                    at += P::K_STEP;
                    if at >= round_end {
                        break;
                    }
                    from.iter_mut().for_each(|b| *b = b.byte_add(call.stream));
                }
                b.iter_mut().for_each(|b| *b = b.add(step_len));
                next = next.wrapping_add(call.pace);
            }
            for (p, panel) in acc.iter().enumerate() {
                for (r, row) in panel.iter().enumerate() {
                    for (v, &sum) in row.iter().enumerate() {
                        let total = call.acc.add(((p * MR + r) * NV + v) * S::LANES);
                        s.store_f32(if first { sum } else { s.add(s.load_f32(total), sum) }, total);
                    }
                }
            }
            first = false;
            if at >= end {
                return;
            }
        }
    }
}

/// Prefetches what belongs to some steps (twice where two steps share a line); where to go on.
#[inline(always)]
fn fetch<const AHEAD: u8>(next: *const u8, steps: usize, step_bytes: usize) -> *const u8 {
    let bytes = match AHEAD {
        Ahead::NOTHING => 0,
        Ahead::TWO_LINES => 2 * LINE * steps,
        _ => steps * step_bytes,
    };
    for line in 0..bytes.div_ceil(LINE) {
        prefetch(next.wrapping_add(line * LINE));
    }
    next.wrapping_add(bytes)
}

/// Asks for the line at `p` in the first-level cache; any address will do.
#[inline(always)]
pub(super) fn prefetch(p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing and cannot fault.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p.cast())
    };
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{p}]", p = in(reg) p, options(nomem, nostack, preserves_flags))
    };
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = p;
}
