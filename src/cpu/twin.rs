//! `tdpbf16ps` and the tile microkernels around it in plain Rust, so that the loops over tiles
//! (`tiles.rs`) are tested on every machine. On a CPU with AMX the tests compare every bit of both.
//!
//! For each element of a tile of sums, the products with even and with odd k are summed apart, from
//! 0 by fused multiply-adds in the order of k. The two sums are added to each other, and the result
//! to the element. Denormal operands and results are zeros of the same sign.
#![allow(clippy::unwrap_used)]

use super::isa::scalar_isa;
use super::kernels::{CpuKernels, ThirtyTwo, with_tiles};
use super::tiles::{NR, ROW_PANELS, Saved, TileArgs, TileTuning, Tiles};

/// Pairs of k in a tile.
const PAIRS: usize = 16;
/// The NaN of an invalid operation: 0·∞ or ∞ - ∞.
const INVALID: u32 = 0xffc0_0000;

/// The kernels `amx-twin`: those of the scalar instruction set, with tiles in software.
pub(super) fn kernels() -> &'static CpuKernels {
    static KERNELS: std::sync::OnceLock<CpuKernels> = std::sync::OnceLock::new();
    KERNELS.get_or_init(|| {
        let (isa, base) = scalar_isa();
        with_tiles::<_, ThirtyTwo>("amx-twin", isa, base, tiles())
    })
}

/// Blocks so small that short cases have several of them.
pub(super) fn tiles() -> Tiles {
    Tiles {
        configure: |_| Saved([0; 64]),
        restore: |_| (),
        pair: micro::<2, 1>,
        single: micro::<1, 1>,
        sweep: [micro::<1, 1>, micro::<1, 2>],
        row: micro::<1, ROW_PANELS>,
        tuning: TileTuning {
            measured_on: "none",
            block_steps: 2,
            many_rows_panels: 3,
            row_panels: 5,
            few_rows_panels: 3,
            sweep_ahead: 4 << 10,
        },
    }
}

/// # Safety
/// As [`TileArgs`] says.
unsafe fn micro<const TILES: usize, const PANELS: usize>(args: &TileArgs) {
    /// # Safety
    /// As [`TileArgs`] says.
    #[inline(always)]
    unsafe fn body<const TILES: usize, const PANELS: usize>(args: &TileArgs) {
        for (tile, panel) in (0..TILES).flat_map(|t| (0..PANELS).map(move |p| (t, p))) {
            for row in 0..args.height {
                // SAFETY: the caller's contract.
                unsafe {
                    let a = args.a.add((tile * args.height + row) * args.a_stride);
                    let b = args.b.add(panel * args.panel_stride);
                    let sums = args.sums.byte_add((tile + panel) * args.sums_stride).add(row * NR);
                    for column in 0..NR {
                        let sum = sums.add(column);
                        if !args.accumulate {
                            *sum = 0.0;
                        }
                        for step in 0..args.steps {
                            let a = a.cast::<[u32; PAIRS]>().add(step).read_unaligned();
                            let b = std::array::from_fn(|pair| {
                                *b.cast::<u32>().add((step * PAIRS + pair) * NR + column)
                            });
                            *sum = element(*sum, &a, &b);
                        }
                    }
                }
            }
        }
    }
    #[cfg(target_arch = "x86_64")]
    {
        // Without the instruction, mul_add is a slow function.
        #[target_feature(enable = "fma")]
        unsafe fn fused<const TILES: usize, const PANELS: usize>(args: &TileArgs) {
            // SAFETY: the caller's contract.
            unsafe { body::<TILES, PANELS>(args) }
        }
        if is_x86_feature_detected!("fma") {
            // SAFETY: the CPU has the instruction; the caller's contract.
            return unsafe { fused::<TILES, PANELS>(args) };
        }
    }
    // SAFETY: the caller's contract.
    unsafe { body::<TILES, PANELS>(args) }
}

/// sum + Σ a·b over the pairs of one tile.
#[inline(always)]
fn element(sum: f32, a: &[u32; PAIRS], b: &[u32; PAIRS]) -> f32 {
    let (mut even, mut odd) = (0.0, 0.0);
    for (&a, &b) in a.iter().zip(b) {
        even = fma(f32::from_bits(a << 16), f32::from_bits(b << 16), even);
        odd = fma(f32::from_bits(a & 0xffff_0000), f32::from_bits(b & 0xffff_0000), odd);
    }
    add(sum, add(even, odd))
}

#[inline(always)]
fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

/// The first NaN of the operands, made quiet; otherwise the result, whose NaN is [`INVALID`].
#[inline(always)]
fn nan_or<const N: usize>(operands: [f32; N], result: f32) -> f32 {
    match operands.into_iter().find(|x| x.is_nan()) {
        Some(nan) => f32::from_bits(nan.to_bits() | 0x0040_0000),
        None if result.is_nan() => f32::from_bits(INVALID),
        None => result,
    }
}

/// a·b + c with one rounding.
#[inline(always)]
fn fma(a: f32, b: f32, c: f32) -> f32 {
    let (a, b, c) = (flush(a), flush(b), flush(c));
    let sum = a.mul_add(b, c);
    // A result is denormal if, rounded to 24 bits with an unbounded exponent, it lies below the
    // smallest normal number. Only denormals' coarser steps round some of those up to it.
    if sum.abs() == f32::MIN_POSITIVE {
        let exact = f64::from(a) * f64::from(b) + f64::from(c);
        if exact.abs() < f64::from(f32::MIN_POSITIVE) * (1.0 - 2f64.powi(-25)) {
            return 0f32.copysign(sum);
        }
    }
    nan_or([a, b, c], flush(sum))
}

#[inline(always)]
fn add(a: f32, b: f32) -> f32 {
    let (a, b) = (flush(a), flush(b));
    nan_or([a, b], flush(a + b))
}
