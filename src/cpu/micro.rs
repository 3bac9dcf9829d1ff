//! The microkernel: `acc (MR, NR) += A (MR, k) · B (k, NR)` with the sums in registers, written once over [`Simd`].
//!
//! B is one panel of a packed weight (`pack.rs`), or a few: for each step of `K_STEP` values of k, NR columns of `K_STEP` neighbours.
//! A is row-major. A step loads NV vectors of B and, for each of MR rows, broadcasts the row's element(s) and adds the
//! products (`product.rs`). Nothing is summed across lanes, and each sum runs over k in order, in parts of [`Product::SUM_K`]: a
//! result does not depend on how many rows or threads there are, nor on where `gemm.rs` cuts k.

use super::product::Product;
use super::simd::Simd;

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
    /// The first line of every page, into the second-level cache: the rest the processor fetches by itself.
    pub(super) const PAGES: u8 = 1;
    /// As much as it reads.
    pub(super) const A_STEP: u8 = 2;
    /// The same into the second-level cache.
    pub(super) const A_STEP_FAR: u8 = 3;
    /// `pace` bytes of every stream in a round over them, of a block that all microkernels that pass the one before fetch together.
    pub(super) const PACE: u8 = 4;
    /// The same of one stream into the second-level cache: where the first does not hold two blocks.
    pub(super) const PACE_FAR: u8 = 5;

    /// What a sweep along a panel does best with so many rows, measured: Zen 4 for 16 lanes, Zen 3 for 8. `streams`: of a panel.
    /// `reads`: there is little to do for each line, so that the processor by itself keeps enough of several streams under way.
    pub(super) const fn of_sweep(lanes: usize, streams: usize, reads: bool, rows: usize) -> u8 {
        match (lanes, streams) {
            (16, _) if rows > PAGES_ROWS => Self::A_STEP_FAR,
            (16, _) => Self::PAGES,
            (_, 2..) if reads => Self::NOTHING,
            _ => Self::A_STEP,
        }
    }
}

/// Up to so many rows the processor by itself runs far enough ahead, and each line asked for by name takes from that (6 rows 1 to
/// 12 % slower, 4 rows up to 40 %). With more it does not while memory is quick (8 rows 8 to 20 % slower; 5 % faster while it is slow).
const PAGES_ROWS: usize = 6;
const PAGE: usize = 4096;
const LINE: usize = 64;
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
    let step_len = NV * S::LANES * P::K_STEP;
    let step_bytes = step_len * size_of::<P::B>();
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
            let whole = P::SUM_K == usize::MAX;
            if whole && !first {
                for (r, row) in acc.iter_mut().enumerate() {
                    for (v, sum) in row.iter_mut().enumerate() {
                        *sum = s.load_f32(call.acc.add((r * NV + v) * S::LANES));
                    }
                }
            }
            while at < sum_end {
                let stop = if at < turn && turn < sum_end { turn } else { sum_end };
                while P::GROUP > 1 && at + P::GROUP * P::K_STEP <= stop {
                    next = fetch::<AHEAD>(next, P::GROUP, step_bytes, call.pace);
                    P::group(s, &mut acc, &a, at, b);
                    b = b.add(P::GROUP * step_len);
                    at += P::K_STEP * P::GROUP;
                }
                while S::UNROLL > 1 && at + S::UNROLL * P::K_STEP <= stop {
                    next = fetch::<AHEAD>(next, S::UNROLL, step_bytes, call.pace);
                    for i in 0..S::UNROLL {
                        P::step(s, &mut acc, &a, at + i * P::K_STEP, b.add(i * step_len));
                    }
                    b = b.add(S::UNROLL * step_len);
                    at += S::UNROLL * P::K_STEP;
                }
                while at < stop {
                    next = fetch::<AHEAD>(next, 1, step_bytes, call.pace);
                    P::step(s, &mut acc, &a, at, b);
                    b = b.add(step_len);
                    at += P::K_STEP;
                }
                if at == turn {
                    next = call.next[1];
                }
            }
            // Not by `store_sums`, with which the same inner loop runs 6 % slower on Zen 4 (AVX2, 512 rows, bf16).
            for (r, row) in acc.into_iter().enumerate() {
                for (v, sum) in row.into_iter().enumerate() {
                    let total = call.acc.add((r * NV + v) * S::LANES);
                    let joins = !whole && !first;
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
/// stream t mod STREAMS (`pack.rs`). `turn` is unused.
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
    const { assert!(P::SUM_K == usize::MAX || P::SUM_K % (STREAMS * P::K_STEP) == 0, "a sum ends with a round") };
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
            let whole = P::SUM_K == usize::MAX;
            if whole && !first {
                load_sums(s, acc.as_flattened_mut().as_flattened_mut(), call.acc);
            }
            // A round over the streams, unrolled, and what is left of one.
            while at + STREAMS * P::K_STEP <= sum_end {
                for i in 0..STREAMS {
                    stream_step::<S, P, MR, NV, PANELS, AHEAD>(s, &mut acc, &a, at, &b, i * call.stream, next);
                    at += P::K_STEP;
                }
                b.iter_mut().for_each(|b| *b = b.add(step_len));
                next = next.wrapping_add(call.pace);
            }
            let mut stream = 0;
            while at < sum_end {
                stream_step::<S, P, MR, NV, PANELS, AHEAD>(s, &mut acc, &a, at, &b, stream, next);
                at += P::K_STEP;
                stream += call.stream;
            }
            store_sums(s, acc.as_flattened().as_flattened(), call.acc, !whole && !first);
            first = false;
            if at >= end {
                return;
            }
        }
    }
}

/// # Safety
/// `from` has as many f32 as the sums have lanes.
#[inline(always)]
unsafe fn load_sums<S: Simd>(s: S, sums: &mut [S::F], from: *const f32) {
    for (i, sum) in sums.iter_mut().enumerate() {
        // SAFETY: the caller's contract.
        *sum = unsafe { s.load_f32(from.add(i * S::LANES)) };
    }
}

/// Writes the sums, or where they join a total adds them to it.
///
/// # Safety
/// `totals` has as many f32 as the sums have lanes.
#[inline(always)]
unsafe fn store_sums<S: Simd>(s: S, sums: &[S::F], totals: *mut f32, joins: bool) {
    for (i, &sum) in sums.iter().enumerate() {
        // SAFETY: the caller's contract.
        unsafe {
            let total = totals.add(i * S::LANES);
            s.store_f32(if joins { s.add(s.load_f32(total), sum) } else { sum }, total);
        }
    }
}

/// A step of each panel, and what goes with it of fetching: `stream` bytes from the first stream of a round on.
///
/// # Safety
/// As [`Product::step`] for each panel.
#[inline(always)]
unsafe fn stream_step<S: Simd, P: Product<S>, const MR: usize, const NV: usize, const PANELS: usize, const AHEAD: u8>(
    s: S,
    acc: &mut [[[S::F; NV]; MR]; PANELS],
    a: &[*const P::A; MR],
    at: usize,
    b: &[*const P::B; PANELS],
    stream: usize,
    next: *const u8,
) {
    match AHEAD {
        Ahead::PACE => {
            // Half a step: two groups of rows at least pass a block.
            let half = NV * S::LANES * P::K_STEP * size_of::<P::B>() / 2;
            (0..half.div_ceil(LINE)).for_each(|line| prefetch(next.wrapping_add(stream + line * LINE)));
        }
        Ahead::A_STEP => prefetch(b[0].wrapping_add(STREAM_AHEAD * NV * S::LANES * P::K_STEP).wrapping_byte_add(stream).cast()),
        _ => (),
    }
    for (acc, b) in acc.iter_mut().zip(b) {
        // SAFETY: the caller's contract.
        unsafe { P::step(s, acc, a, at, b.byte_add(stream)) };
    }
}

/// Prefetches what belongs to some steps (twice where two steps share a line); where to go on.
#[inline(always)]
fn fetch<const AHEAD: u8>(next: *const u8, steps: usize, step_bytes: usize, pace: usize) -> *const u8 {
    let bytes = steps * step_bytes;
    let (bytes, further) = match AHEAD {
        Ahead::NOTHING => return next,
        Ahead::PAGES => (usize::from(next.addr() % PAGE < bytes), bytes),
        // Half a step: two groups of rows at least pass a block.
        Ahead::PACE | Ahead::PACE_FAR => (bytes / 2, steps * pace),
        _ => (bytes, bytes),
    };
    for line in 0..bytes.div_ceil(LINE) {
        let line = next.wrapping_add(line * LINE);
        if matches!(AHEAD, Ahead::A_STEP | Ahead::PACE) { prefetch(line) } else { prefetch_far(line) }
    }
    next.wrapping_add(further)
}

macro_rules! prefetch {
    ($(#[$doc:meta])* $name:ident, $x86:ident, $arm:literal) => {
        $(#[$doc])*
        #[inline(always)]
        pub(super) fn $name(p: *const u8) {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a prefetch reads nothing and cannot fault.
            unsafe {
                std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::$x86 }>(p.cast())
            };
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            unsafe {
                std::arch::asm!(concat!("prfm ", $arm, ", [{p}]"), p = in(reg) p, options(nomem, nostack, preserves_flags))
            };
            #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
            let _ = p;
        }
    };
}

prefetch!(
    /// Asks for the line at `p` in the first-level cache; any address will do.
    prefetch,
    _MM_HINT_T0,
    "pldl1keep"
);
prefetch!(
    /// The same for the second-level cache.
    prefetch_far,
    _MM_HINT_T1,
    "pldl2keep"
);
