//! The microkernel `sums (MR, NR) += A (MR, k) · B (k, NR)`, with the sums in registers.
//!
//! B is one panel of a packed weight (`panels.rs`), or a few adjacent ones. A is row-major. Each
//! step loads NV vectors of B and, for each of MR rows, broadcasts the row's values and adds the
//! products (`product.rs`). Nothing is summed across lanes, and each sum runs over k in order, in
//! parts of [`Product::SUM_K`]. A result therefore depends neither on the number of rows or threads
//! nor on where `sweep.rs` cuts k.
//!
//! [`run`] reads a panel of one stream: part of a sum -> {load the total, groups of steps, unrolled
//! steps, single steps, switch of the prefetch address} -> store. [`run_streams`] reads several
//! streams or panels: part of a sum -> {load the total, rounds over the streams, the rest of a
//! round} -> store.

use std::marker::PhantomData;

use super::prefetch::{Prefetch, fetch};
use super::product::Product;
use super::simd::{Body, Isa, Simd};
use super::tuning::Access;

/// The arguments of a microkernel. [`run`] says what the pointers must satisfy.
#[derive(Clone, Copy)]
pub(super) struct MicroArgs {
    /// A (MR, k), its first element.
    pub(super) a: *const u8,
    /// Elements from one row of A to the next.
    pub(super) a_stride: usize,
    /// B (k, NR), packed.
    pub(super) b: *const u8,
    /// Bytes from one stream of a panel to the next.
    pub(super) stream_stride: usize,
    /// Bytes from one panel to the next.
    pub(super) panel_stride: usize,
    pub(super) steps: usize,
    /// sums (PANELS, MR, NR)
    pub(super) sums: *mut f32,
    /// Add to what `sums` holds instead of starting from zero.
    pub(super) accumulate: bool,
    /// Prefetch addresses: the first until step `prefetch_switch`, the second from then on.
    pub(super) prefetch: [*const u8; 2],
    pub(super) prefetch_switch: usize,
    /// Bytes of each stream that a round prefetches of the next k-block.
    pub(super) prefetch_bytes: usize,
}

/// A microkernel for a fixed number of rows.
pub(super) type Micro = unsafe fn(&MicroArgs);

/// What a microkernel prefetches, as a constant of its type.
pub(super) struct Role;

impl Role {
    /// Nothing.
    pub(super) const QUIET: u8 = 0;
    /// Ahead in the panel that it sweeps.
    pub(super) const SWEEP: u8 = 1;
    /// A share of the next k-block.
    pub(super) const BLOCK: u8 = 2;

    const fn prefetch<S: Simd, P: Product<S>, A: Access>(role: u8, rows: usize) -> Prefetch {
        let many = (rows > A::SWEEP_ROWS) as usize;
        match role {
            Self::SWEEP if P::MEMORY_BOUND => A::SWEEP_MEMORY_BOUND[many],
            Self::SWEEP => A::SWEEP[many],
            Self::BLOCK => A::BLOCK,
            _ => Prefetch::Nothing,
        }
    }
}

/// A microkernel for one panel.
///
/// # Safety
/// The CPU has the instructions of I; the arguments as [`run`] or, with several streams,
/// [`run_streams`] require.
pub(super) unsafe fn micro<
    I: Isa,
    P: Product<I::Simd>,
    A: Access,
    const ROLE: u8,
    const MR: usize,
    const NV: usize,
>(
    args: &MicroArgs,
) {
    // SAFETY: the caller's contract.
    unsafe { I::assume() }.vectorize(OnePanel::<P, A, ROLE, MR, NV>(args, PhantomData));
}

/// A microkernel for PANELS adjacent panels, which prefetches nothing.
///
/// # Safety
/// The CPU has the instructions of I; the arguments as [`run_streams`] requires.
pub(super) unsafe fn micro_adjacent<
    I: Isa,
    P: Product<I::Simd>,
    A: Access,
    const MR: usize,
    const NV: usize,
    const PANELS: usize,
>(
    args: &MicroArgs,
) {
    // SAFETY: the caller's contract.
    unsafe { I::assume() }.vectorize(AdjacentPanels::<P, A, MR, NV, PANELS>(args, PhantomData));
}

/// The body of [`micro`], which alone makes one.
struct OnePanel<'a, P, A, const ROLE: u8, const MR: usize, const NV: usize>(
    &'a MicroArgs,
    PhantomData<(P, A)>,
);

impl<S: Simd, P: Product<S>, A: Access, const ROLE: u8, const MR: usize, const NV: usize> Body<S>
    for OnePanel<'_, P, A, ROLE, MR, NV>
{
    type Output = ();
    #[inline(always)]
    fn run(self, s: S) {
        let what = const { Role::prefetch::<S, P, A>(ROLE, MR) };
        // SAFETY: `micro`'s contract.
        unsafe {
            match A::STREAMS {
                1 => run::<S, P, MR, NV>(s, *self.0, what),
                4 => run_streams::<S, P, MR, NV, 1, 4>(s, *self.0, what),
                _ => {
                    const {
                        assert!(
                            A::STREAMS == 1 || A::STREAMS == 4,
                            "microkernels read 1 or 4 streams"
                        )
                    }
                }
            }
        }
    }
}

/// The body of [`micro_adjacent`], which alone makes one.
struct AdjacentPanels<'a, P, A, const MR: usize, const NV: usize, const PANELS: usize>(
    &'a MicroArgs,
    PhantomData<(P, A)>,
);

impl<S: Simd, P: Product<S>, A: Access, const MR: usize, const NV: usize, const PANELS: usize>
    Body<S> for AdjacentPanels<'_, P, A, MR, NV, PANELS>
{
    type Output = ();
    #[inline(always)]
    fn run(self, s: S) {
        // SAFETY: `micro_adjacent`'s contract.
        unsafe {
            match A::STREAMS {
                1 => run_streams::<S, P, MR, NV, PANELS, 1>(s, *self.0, Prefetch::Nothing),
                _ => run_streams::<S, P, MR, NV, PANELS, 4>(s, *self.0, Prefetch::Nothing),
            }
        }
    }
}

/// # Safety
/// The CPU has the instructions of S and P. A has MR rows of at least `steps·K_STEP` readable
/// elements, B `steps` packed steps of NV·LANES columns, `sums` MR·NV·LANES writable f32. The
/// prefetch addresses are never read and may point anywhere.
#[inline(always)]
unsafe fn run<S: Simd, P: Product<S>, const MR: usize, const NV: usize>(
    s: S,
    args: MicroArgs,
    what: Prefetch,
) {
    let step_bytes = NV * S::LANES * const { P::FORMAT.column_bytes() };
    // SAFETY: all pointers stay within what the caller promises.
    unsafe {
        let unroll = const { if NV >= S::UNROLL_FROM { S::UNROLL } else { 1 } };
        let a = rows::<S, P, MR, NV>(s, &args);
        let mut b = args.b.cast::<P::B>();
        let mut next = args.prefetch[0];
        let (mut at, end, switch) = (0, args.steps * P::K_STEP, args.prefetch_switch * P::K_STEP);
        let mut first = !args.accumulate;
        loop {
            let mut acc = [[s.splat(0.0); NV]; MR];
            let sum_end = if P::SUM_K < end - at { at + P::SUM_K } else { end };
            let whole = P::SUM_K == usize::MAX;
            if whole && !first {
                for (r, row) in acc.iter_mut().enumerate() {
                    for (v, sum) in row.iter_mut().enumerate() {
                        *sum = s.load_f32(args.sums.add((r * NV + v) * S::LANES));
                    }
                }
            }
            while at < sum_end {
                let stop = if at < switch && switch < sum_end { switch } else { sum_end };
                while P::GROUP > 1 && at + P::GROUP * P::K_STEP <= stop {
                    next = fetch(what, next, P::GROUP, step_bytes, args.prefetch_bytes);
                    P::group(s, &mut acc, &a, at, b);
                    b = b.byte_add(P::GROUP * step_bytes);
                    at += P::K_STEP * P::GROUP;
                }
                while unroll > 1 && at + unroll * P::K_STEP <= stop {
                    next = fetch(what, next, unroll, step_bytes, args.prefetch_bytes);
                    if unroll == 2 {
                        // Two calls: a loop over steps of 24 accumulators exceeds LLVM's threshold
                        // for unrolling. A loop over the shorter steps of AVX2 does not.
                        P::step(s, &mut acc, &a, at, b);
                        P::step(s, &mut acc, &a, at + P::K_STEP, b.byte_add(step_bytes));
                    } else {
                        for i in 0..unroll {
                            let b = b.byte_add(i * step_bytes);
                            P::step(s, &mut acc, &a, at + i * P::K_STEP, b);
                        }
                    }
                    b = b.byte_add(unroll * step_bytes);
                    at += unroll * P::K_STEP;
                }
                while at < stop {
                    next = fetch(what, next, 1, step_bytes, args.prefetch_bytes);
                    P::step(s, &mut acc, &a, at, b);
                    b = b.byte_add(step_bytes);
                    at += P::K_STEP;
                }
                if at == switch {
                    next = args.prefetch[1];
                }
            }
            // Not `store_sums`: with it, the inner loop of AVX2 in bf16 is 6 % slower on Zen 4 (512
            // rows).
            for (r, row) in acc.into_iter().enumerate() {
                for (v, sum) in row.into_iter().enumerate() {
                    let total = args.sums.add((r * NV + v) * S::LANES);
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

/// [`run`] over panels in several streams, PANELS adjacent ones at once: one step of each panel
/// after the other. Step t of a panel is the next one of its stream t mod STREAMS (`panels.rs`).
/// `prefetch_switch` is unused.
///
/// # Safety
/// As [`run`] for each panel. The panels are `panel_stride` bytes apart, the streams of a panel
/// `stream_stride` bytes. The sums (MR, NR) of each panel follow those of the panel before it.
#[inline(always)]
unsafe fn run_streams<
    S: Simd,
    P: Product<S>,
    const MR: usize,
    const NV: usize,
    const PANELS: usize,
    const STREAMS: usize,
>(
    s: S,
    args: MicroArgs,
    what: Prefetch,
) {
    let step_bytes = NV * S::LANES * const { P::FORMAT.column_bytes() };
    const {
        assert!(
            P::SUM_K == usize::MAX || P::SUM_K % (STREAMS * P::K_STEP) == 0,
            "a sum ends with a round"
        )
    };
    // SAFETY: all pointers stay within what the caller promises.
    unsafe {
        let a = rows::<S, P, MR, NV>(s, &args);
        let mut b = [args.b.cast::<P::B>(); PANELS];
        for (p, panel) in b.iter_mut().enumerate() {
            *panel = panel.byte_add(p * args.panel_stride);
        }
        let (mut at, end) = (0, args.steps * P::K_STEP);
        let (mut next, mut first) = (args.prefetch[0], !args.accumulate);
        loop {
            let mut acc = [[[s.splat(0.0); NV]; MR]; PANELS];
            let sum_end = if P::SUM_K < end - at { at + P::SUM_K } else { end };
            let whole = P::SUM_K == usize::MAX;
            if whole && !first {
                load_sums(s, acc.as_flattened_mut().as_flattened_mut(), args.sums);
            }
            // Unrolled rounds over the streams, then the rest of a round.
            while at + STREAMS * P::K_STEP <= sum_end {
                for i in 0..STREAMS {
                    stream_step::<S, P, MR, NV, PANELS>(
                        s,
                        &mut acc,
                        &a,
                        at,
                        &b,
                        i * args.stream_stride,
                        next,
                        what,
                    );
                    at += P::K_STEP;
                }
                b.iter_mut().for_each(|b| *b = b.byte_add(step_bytes));
                next = next.wrapping_add(args.prefetch_bytes);
            }
            let mut stream = 0;
            while at < sum_end {
                stream_step::<S, P, MR, NV, PANELS>(s, &mut acc, &a, at, &b, stream, next, what);
                at += P::K_STEP;
                stream += args.stream_stride;
            }
            store_sums(s, acc.as_flattened().as_flattened(), args.sums, !whole && !first);
            first = false;
            if at >= end {
                return;
            }
        }
    }
}

/// The first element of each row.
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn rows<S: Simd, P: Product<S>, const MR: usize, const NV: usize>(
    s: S,
    args: &MicroArgs,
) -> [*const P::A; MR] {
    std::array::from_fn(|r| {
        // SAFETY: the caller's contract.
        let row = unsafe { args.a.cast::<P::A>().add(r * args.a_stride) };
        if NV >= S::UNROLL_FROM { s.hide(row) } else { row }
    })
}

/// # Safety
/// `from` has one f32 for each lane of the sums.
#[inline(always)]
unsafe fn load_sums<S: Simd>(s: S, sums: &mut [S::F], from: *const f32) {
    for (i, sum) in sums.iter_mut().enumerate() {
        // SAFETY: the caller's contract.
        *sum = unsafe { s.load_f32(from.add(i * S::LANES)) };
    }
}

/// Writes the sums, or adds them to the totals.
///
/// # Safety
/// `totals` has one f32 for each lane of the sums.
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

/// Steps that a sweep prefetches ahead in each of several streams.
const STREAM_AHEAD: usize = 32;

/// One step of each panel with its prefetching; `stream` is the distance in bytes from the first
/// stream of the round.
///
/// # Safety
/// As [`Product::step`] for each panel.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn stream_step<
    S: Simd,
    P: Product<S>,
    const MR: usize,
    const NV: usize,
    const PANELS: usize,
>(
    s: S,
    acc: &mut [[[S::F; NV]; MR]; PANELS],
    a: &[*const P::A; MR],
    at: usize,
    b: &[*const P::B; PANELS],
    stream: usize,
    next: *const u8,
    what: Prefetch,
) {
    let step_bytes = NV * S::LANES * const { P::FORMAT.column_bytes() };
    let next = match what {
        Prefetch::StepIntoL1 => b[0].wrapping_byte_add(STREAM_AHEAD * step_bytes).cast(),
        _ => next,
    };
    fetch(what, next.wrapping_add(stream), 1, step_bytes, 0);
    for (acc, b) in acc.iter_mut().zip(b) {
        // SAFETY: the caller's contract.
        unsafe { P::step(s, acc, a, at, b.byte_add(stream)) };
    }
}
