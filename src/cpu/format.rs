//! Formats: how a weight is stored in a panel (`panels.rs`). The format of a weight is independent
//! of the dtype of x, h and y.
//!
//! To add one, see `docs/adding-a-weight-format.md`.

use bytemuck::Pod;
use candle_core::DType;
use half::{bf16, f16};

use super::prefetch::prefetch;
use super::simd::{Element, Simd};

/// How the columns of a panel are stored. A step is the unit in which a microkernel reads: for each
/// of NR columns, `k_step` values of k side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    F32,
    /// Pairs of neighbours in k, the operand of `vdpbf16ps` and `bfdot`.
    Bf16,
    F16,
}

impl Format {
    /// The format in which weights of a dtype are stored, if there is one.
    pub(super) fn of(dtype: DType) -> Option<Self> {
        match dtype {
            DType::F32 => Some(Self::F32),
            DType::BF16 => Some(Self::Bf16),
            DType::F16 => Some(Self::F16),
            _ => None,
        }
    }

    /// Values of k in one step.
    pub(super) const fn k_step(self) -> usize {
        match self {
            Self::F32 | Self::F16 => 1,
            Self::Bf16 => 2,
        }
    }

    /// Bytes of one column in one step.
    pub(super) const fn column_bytes(self) -> usize {
        match self {
            Self::F32 | Self::Bf16 => 4,
            Self::F16 => 2,
        }
    }
}

/// The element type of a format whose values are stored one by one.
pub(super) trait Stored: Element + Pod {
    const FORMAT: Format;

    /// Writes a step of NV vectors as f32, one k after the other.
    ///
    /// # Safety
    /// The CPU has the instructions; `b` has a step, `out` room for `k_step·NV·LANES` f32.
    unsafe fn widen_step<S: Simd, const NV: usize>(s: S, b: *const Self, out: *mut f32);
}

/// How far ahead widening prefetches.
const WIDEN_AHEAD: usize = 4096;

macro_rules! stored_one_by_one {
    ($dtype:ty, $format:ident) => {
        impl Stored for $dtype {
            const FORMAT: Format = Format::$format;

            #[inline(always)]
            unsafe fn widen_step<S: Simd, const NV: usize>(s: S, b: *const Self, out: *mut f32) {
                for at in (0..NV * S::LANES).step_by(S::LANES) {
                    // SAFETY: the caller's contract.
                    unsafe {
                        prefetch(b.wrapping_add(at).wrapping_byte_add(WIDEN_AHEAD).cast());
                        s.store_f32(Self::load(s, b.add(at)), out.add(at));
                    }
                }
            }
        }
    };
}

stored_one_by_one!(f32, F32);
stored_one_by_one!(f16, F16);

impl Stored for bf16 {
    const FORMAT: Format = Format::Bf16;

    #[inline(always)]
    unsafe fn widen_step<S: Simd, const NV: usize>(s: S, b: *const Self, out: *mut f32) {
        for at in (0..NV * S::LANES).step_by(S::LANES) {
            // SAFETY: the caller's contract.
            unsafe {
                s.store_f32(s.load_bf16_even(b.add(2 * at)), out.add(at));
                s.store_f32(s.load_bf16_odd(b.add(2 * at)), out.add(NV * S::LANES + at));
            }
        }
    }
}

/// Writes steps of NV vectors as f32, one k after the other; `stream_stride` is the distance in
/// bytes from one of STREAMS streams to the next.
///
/// # Safety
/// The CPU has the instructions; `b` has `steps` steps from a multiple of STREAMS on, `out` room
/// for `steps·k_step·NV·LANES` f32.
#[inline(always)]
pub(super) unsafe fn widen<S: Simd, T: Stored, const NV: usize, const STREAMS: usize>(
    s: S,
    b: *const T,
    stream_stride: usize,
    steps: usize,
    out: *mut f32,
) {
    let len = NV * S::LANES * const { T::FORMAT.k_step() };
    for round in 0..steps.div_ceil(STREAMS) {
        for i in 0..STREAMS.min(steps - round * STREAMS) {
            // SAFETY: the caller's contract.
            unsafe {
                let (from, to) = (
                    b.add(round * len).byte_add(i * stream_stride),
                    out.add((round * STREAMS + i) * len),
                );
                T::widen_step::<S, NV>(s, from, to);
            }
        }
    }
}
