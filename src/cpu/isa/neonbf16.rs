//! NEON with FEAT_BF16: instructions that multiply bf16 and add pairs of products to sums in f32.
//!
//! Both instructions compute `acc + (a₀·b₀ + a₁·b₁)`. Each of the two sums is rounded to odd, which
//! is within one unit in the last place; rounding to nearest is within half of one. Denormals are
//! treated as 0. There are two roundings for two products, so the error bound is that of adding one
//! product at a time with rounding to nearest.
//!
//! 1. Up to MR rows (decode): `bfdot` multiplies 4 columns of one row, 8 products. Four pairs of A
//!    are loaded at once and selected by lane.
//! 2. More rows: `bfmmla` multiplies 2 columns of 2 rows, 16 products of four neighbours in k. A
//!    k-block is first reordered for it, once for all rows ([`interleave`]).
//!
//! `bfmmla` adds its four products like two `bfdot` in the order of k, so both give the same bits.

use std::arch::aarch64::*;
use std::arch::asm;

use half::bf16;

use super::neon::Neon;
use crate::cpu::format::Format;
use crate::cpu::kernels::{CpuKernels, FourBySix, with_bf16};
use crate::cpu::micro::{Micro, MicroArgs};
use crate::cpu::product::{DotBf16, Product, for_lanes, load_rows};
use crate::cpu::simd::{Body, Isa, Simd};
use crate::cpu::sweep::Rewritten;
use crate::cpu::tuning::{CpuFamily, Unmeasured};

/// Proof that the CPU has NEON and FEAT_BF16.
#[derive(Clone, Copy)]
pub(super) struct NeonBf16(Neon);

impl NeonBf16 {
    pub(super) fn new() -> Option<Self> {
        Neon::new().filter(|_| std::arch::is_aarch64_feature_detected!("bf16")).map(Self)
    }
}

impl Isa for NeonBf16 {
    type Simd = Neon;

    #[inline(always)]
    unsafe fn assume() -> Self {
        // SAFETY: the caller's contract.
        Self(unsafe { Neon::assume() })
    }

    #[inline(always)]
    fn vectorize<B: Body<Neon>>(self, body: B) -> B::Output {
        #[target_feature(enable = "neon,bf16")]
        fn enabled<B: Body<Neon>>(s: Neon, body: B) -> B::Output {
            body.run(s)
        }
        // SAFETY: `self` proves the target features.
        unsafe { enabled(self.0, body) }
    }
}

/// The kernels, if the CPU has the instructions: those of NEON but for products in bf16.
pub(super) fn detect(family: CpuFamily) -> Option<CpuKernels> {
    let (isa, base) = (NeonBf16::new()?, super::neon::detect(family)?);
    Some(with_bf16::<_, DotBf16, FourBySix, Unmeasured>("neonbf16", isa, base, Some(many_rows())))
}

/// acc + a₀·b₀ + a₁·b₁ in every lane, the pair `LANE` of bf16 from `a` with each pair of `b`.
///
/// # Safety
/// The CPU has bf16.
#[inline(always)]
unsafe fn dot<const LANE: usize>(
    mut acc: float32x4_t,
    a: float32x4_t,
    b: float32x4_t,
) -> float32x4_t {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("bfdot {acc:v}.4s, {b:v}.8h, {a:v}.2h[{lane}]", acc = inout(vreg) acc, a = in(vreg) a, b = in(vreg) b,
            lane = const LANE, options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

/// acc (2, 2) += a (2, 4) · b (2, 4)ᵀ
///
/// # Safety
/// The CPU has bf16.
#[inline(always)]
unsafe fn multiply(mut acc: float32x4_t, a: uint16x8_t, b: uint16x8_t) -> float32x4_t {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("bfmmla {acc:v}.4s, {a:v}.8h, {b:v}.8h", acc = inout(vreg) acc, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

// ---------------------------------------------------------------- few rows

impl Product<Neon> for DotBf16 {
    type A = bf16;
    type B = bf16;
    const FORMAT: Format = Format::Bf16;
    /// No intermediate flush is needed: rounding the result to bf16 loses about 1,000 times more
    /// than summing in f32.
    const SUM_K: usize = usize::MAX;
    const MEMORY_BOUND: bool = true;

    #[inline(always)]
    unsafe fn step<const MR: usize, const NV: usize>(
        s: Neon,
        acc: &mut [[float32x4_t; NV]; MR],
        a: &[*const bf16; MR],
        at: usize,
        b: *const bf16,
    ) {
        for r in 0..MR {
            // SAFETY: the caller's contract.
            unsafe {
                let a = s.splat(a[r].add(at).cast::<f32>().read_unaligned());
                for v in 0..NV {
                    acc[r][v] = dot::<0>(acc[r][v], a, s.load_f32(b.add(v * 8).cast()));
                }
            }
        }
    }

    const GROUP: usize = Neon::GROUP;

    #[inline(always)]
    unsafe fn group<const MR: usize, const NV: usize>(
        s: Neon,
        acc: &mut [[float32x4_t; NV]; MR],
        a: &[*const bf16; MR],
        at: usize,
        b: *const bf16,
    ) {
        // SAFETY: the caller's contract; a pair is as wide as an f32.
        unsafe {
            let a = load_rows(s, a, at);
            for_lanes!(LANE => {
                for v in 0..NV {
                    let b = s.load_f32(b.add((LANE * NV + v) * 8).cast());
                    for r in 0..MR {
                        acc[r][v] = dot::<LANE>(acc[r][v], a[r], b);
                    }
                }
            });
        }
    }
}

// ---------------------------------------------------------------- many rows

/// Columns of a panel.
const NR: usize = 16;
/// Values of k that `bfmmla` takes.
const QUAD: usize = 4;

/// [`interleave`], and the microkernels for 1, 2, .., 6 rows of its result.
fn many_rows() -> Rewritten {
    let micro: Vec<Micro> =
        vec![micro::<1>, micro::<2>, micro::<3>, micro::<4>, micro::<5>, micro::<6>];
    // The result has 2 bytes per value; counting 4 gives blocks half as long.
    Rewritten { from_rows: micro.len() + 1, rewrite: interleave, micro, value_bytes: 4 }
}

/// Steps `[k / 2][NR][2]` of one stream -> `[k / 4][NR][4]`; an odd step is padded with zeros.
///
/// # Safety
/// The CPU has bf16; `b` has `steps` steps, `out` room for `steps` + 1.
#[target_feature(enable = "neon,bf16")]
unsafe fn interleave(b: *const u8, _stream_stride: usize, steps: usize, out: *mut u8) {
    let (b, out) = (b.cast::<f32>(), out.cast::<f32>());
    for quad in 0..steps.div_ceil(2) {
        for v in 0..NR / 4 {
            // SAFETY: the caller's contract.
            unsafe {
                let pairs = b.add(quad * 2 * NR + v * 4);
                let second =
                    if 2 * quad + 1 < steps { vld1q_f32(pairs.add(NR)) } else { vdupq_n_f32(0.0) };
                let (first, out) = (vld1q_f32(pairs), out.add(quad * 2 * NR + v * 8));
                vst1q_f32(out, vzip1q_f32(first, second));
                vst1q_f32(out.add(4), vzip2q_f32(first, second));
            }
        }
    }
}

/// As `micro::run`, over the result of [`interleave`]. `args.steps` is a number of values of k and
/// even. Nothing is prefetched.
///
/// # Safety
/// As `micro::run`.
#[target_feature(enable = "neon,bf16")]
unsafe fn micro<const MR: usize>(args: &MicroArgs) {
    let (a, mut b) = (args.a.cast::<u16>(), args.b.cast::<u16>());
    // SAFETY: all pointers stay within what the caller promises.
    unsafe {
        let mut acc = load_tiles::<MR>(args.sums, !args.accumulate);
        let mut at = 0;
        while at + QUAD <= args.steps {
            let mut pairs = [vdupq_n_u16(0); 3];
            for (pair, rows) in pairs.iter_mut().enumerate().take(MR.div_ceil(2)) {
                let row = |r: usize| vld1_u16(a.add(r.min(MR - 1) * args.a_stride + at));
                *rows = vcombine_u16(row(2 * pair), row(2 * pair + 1));
            }
            add_quad::<MR>(&mut acc, &pairs, b);
            b = b.add(QUAD * NR);
            at += QUAD;
        }
        if at < args.steps {
            let mut pairs = [vdupq_n_u16(0); 3];
            for (pair, rows) in pairs.iter_mut().enumerate().take(MR.div_ceil(2)) {
                let row = |r: usize| {
                    let two =
                        a.add(r.min(MR - 1) * args.a_stride + at).cast::<u32>().read_unaligned();
                    vcreate_u16(u64::from(two))
                };
                *rows = vcombine_u16(row(2 * pair), row(2 * pair + 1));
            }
            add_quad::<MR>(&mut acc, &pairs, b);
        }
        store_tiles::<MR>(&acc, args.sums);
    }
}

/// Sums of 2 rows by 2 columns: [pair of rows][pair of columns]. An odd last row is paired with
/// itself, and the second half of its sums is dropped.
type Tiles = [[float32x4_t; NR / 2]; 3];

/// acc (MR, NR) += a (MR, QUAD) · b (QUAD, NR)
///
/// # Safety
/// The CPU has bf16; `b` has QUAD·NR elements.
#[inline(always)]
unsafe fn add_quad<const MR: usize>(acc: &mut Tiles, a: &[uint16x8_t; 3], b: *const u16) {
    for v in 0..NR / 2 {
        // SAFETY: the caller's contract.
        unsafe {
            let b = vld1q_u16(b.add(v * 2 * QUAD));
            for pair in 0..MR.div_ceil(2) {
                acc[pair][v] = multiply(acc[pair][v], a[pair], b);
            }
        }
    }
}

/// # Safety
/// The CPU has NEON; `sums` has (MR, NR).
#[inline(always)]
unsafe fn load_tiles<const MR: usize>(sums: *const f32, first: bool) -> Tiles {
    // SAFETY: the caller's contract.
    unsafe {
        let mut acc = [[vdupq_n_f32(0.0); NR / 2]; 3];
        if first {
            return acc;
        }
        for (pair, acc) in acc.iter_mut().enumerate().take(MR.div_ceil(2)) {
            let row = |r: usize, v: usize| {
                vreinterpretq_f64_f32(vld1q_f32(sums.add(r.min(MR - 1) * NR + v * 4)))
            };
            for v in 0..NR / 4 {
                let (upper, lower) = (row(2 * pair, v), row(2 * pair + 1, v));
                acc[2 * v] = vreinterpretq_f32_f64(vzip1q_f64(upper, lower));
                acc[2 * v + 1] = vreinterpretq_f32_f64(vzip2q_f64(upper, lower));
            }
        }
        acc
    }
}

/// # Safety
/// As [`load_tiles`].
#[inline(always)]
unsafe fn store_tiles<const MR: usize>(acc: &Tiles, sums: *mut f32) {
    for r in 0..MR {
        for v in 0..NR / 4 {
            // SAFETY: the caller's contract.
            unsafe {
                let [left, right] = [0, 1].map(|i| vreinterpretq_f64_f32(acc[r / 2][2 * v + i]));
                let row =
                    if r % 2 == 0 { vzip1q_f64(left, right) } else { vzip2q_f64(left, right) };
                vst1q_f32(sums.add(r * NR + v * 4), vreinterpretq_f32_f64(row));
            }
        }
    }
}
