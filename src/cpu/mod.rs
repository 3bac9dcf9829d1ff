//! CPU kernels: the list of them, best first, and the choice.
//!
//! A [`Kernel`] exists only after its instruction set was detected, so its functions are safe to call. Production takes
//! [`selected`]; tests and benchmarks take all of [`available`].

mod activation;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod buffer;
mod cut;
mod gate;
mod gemm;
#[cfg(test)]
mod gemm_tests;
mod glu;
mod layer;
mod micro;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "aarch64")]
mod neonbf16;
mod pack;
mod pages;
mod pass;
mod product;
mod scalar;
mod simd;
#[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
mod simd128;
#[cfg(test)]
mod tests;
mod threads;

use std::mem::MaybeUninit;
use std::sync::OnceLock;

use candle_core::DType;
use half::{bf16, f16};

pub(crate) use gate::{gate_backward, gate_forward};
pub(crate) use layer::{Layer, Part, block, linear};

use self::gemm::{Gemm, GemmElement};
use crate::activation::Glu;
use crate::error::{Error, Result};
use crate::forced;

/// gate, up (n) -> out (n)
type Forward<T> = fn(&Glu, &[T], &[T], &mut [MaybeUninit<T>]);
/// gate, up, dy (n) -> dgate, dup (n)
type Backward<T> = fn(&Glu, [&[T]; 3], [&mut [MaybeUninit<T>]; 2]);

/// The elementwise functions of one kernel for one dtype.
#[derive(Clone, Copy)]
struct Functions<T: 'static> {
    forward: Forward<T>,
    backward: Backward<T>,
}

/// One instruction set's functions.
pub(crate) struct Kernel {
    /// The name by which the environment variable and [`cpu_kernels`] know it.
    pub(crate) name: &'static str,
    /// The instruction set that everything but products in bf16 uses.
    base_name: &'static str,
    f32: Functions<f32>,
    bf16: Functions<bf16>,
    f16: Functions<f16>,
    gemm_f32: Gemm<f32>,
    gemm_bf16: Gemm<bf16>,
    gemm_f16: Gemm<f16>,
    /// The sum of words mod 2³², as fast as this instruction set reads.
    sum_words: pack::SumWords,
}

impl Kernel {
    /// The instruction set that products in this dtype use.
    pub(crate) fn name_of(&self, dtype: DType) -> &'static str {
        if dtype == DType::BF16 { self.name } else { self.base_name }
    }
}

impl GemmElement for f32 {
    fn gemm(kernel: &Kernel) -> &Gemm<Self> {
        &kernel.gemm_f32
    }
}

impl GemmElement for bf16 {
    fn gemm(kernel: &Kernel) -> &Gemm<Self> {
        &kernel.gemm_bf16
    }
}

impl GemmElement for f16 {
    fn gemm(kernel: &Kernel) -> &Gemm<Self> {
        &kernel.gemm_f16
    }
}

/// The microkernels of an instruction set, and the epilogue of gate and up. $nv vectors make a panel, in `$streams` streams.
macro_rules! microkernels {
    ($proof:path, $([$features:literal],)? streams $streams:literal) => {
        /// # Safety
        /// As [`micro::run`], or [`micro::run_streams`].
        $(#[target_feature(enable = $features)])?
        unsafe fn micro<P: Product<$proof>, const MR: usize, const NV: usize, const STREAMS: usize, const AHEAD: u8>(call: Call) {
            // SAFETY: the caller's contract, and the target features.
            unsafe {
                if STREAMS > 1 {
                    micro::run_streams::<$proof, P, MR, NV, 1, STREAMS, AHEAD>(<$proof>::assume(), call)
                } else {
                    micro::run::<$proof, P, MR, NV, AHEAD>(<$proof>::assume(), call)
                }
            }
        }

        /// # Safety
        /// As [`micro::run_streams`].
        #[allow(dead_code, reason = "not every kernel takes panels side by side")]
        $(#[target_feature(enable = $features)])?
        unsafe fn micro_beside<P: Product<$proof>, const MR: usize, const NV: usize, const PANELS: usize>(call: Call) {
            // SAFETY: the caller's contract, and the target features.
            unsafe { micro::run_streams::<$proof, P, MR, NV, PANELS, $streams, { Ahead::NOTHING }>(<$proof>::assume(), call) }
        }

        /// How the microkernels of a block fetch the next one, and the block.
        const BLOCK_AHEAD: (u8, usize) = match <$proof>::LANES {
            16 => (Ahead::PACE_FAR, gemm::FEW_ROWS_BLOCK_FAR),
            _ => (Ahead::PACE, gemm::FEW_ROWS_BLOCK),
        };

        /// # Safety
        /// As [`glu::tile`].
        $(#[target_feature(enable = $features)])?
        unsafe fn glu_tile<T: Element, H: Hidden<T>, const NV: usize>(op: &Glu, tile: Tile, h: *mut u8, h_stride: usize) {
            // SAFETY: the caller's contract, and the target features.
            unsafe { glu::tile::<$proof, T, H, NV>(<$proof>::assume(), op, tile, h.cast(), h_stride) }
        }

        /// # Safety
        /// As [`gemm::out_tile`].
        $(#[target_feature(enable = $features)])?
        unsafe fn out_tile<T: Element, const NV: usize>(tile: Tile, factor: f32, y: *mut T, y_stride: usize, columns: usize) {
            // SAFETY: the caller's contract, and the target features.
            unsafe { gemm::out_tile::<$proof, T, NV>(<$proof>::assume(), tile, factor, y, y_stride, columns) }
        }
    };
}

/// The fields of a [`Gemm`] that are microkernels: $nv vectors make a panel, `$mr` are the heights; $mr·$nv sums, $nv columns of B and
/// one of A are to fit the registers. `beside`: so many rows take so many panels at once. `reads`: see [`Ahead::of_sweep`].
macro_rules! gemm {
    (
        $proof:path, $product:ty, nv $nv:literal, streams $streams:literal, mr [$($mr:literal),*],
        beside [$($rows:literal => $panels:literal),*], reads $reads:expr, $($field:tt)*
    ) => {
        Gemm {
            nr: $nv * <$proof>::LANES,
            streams: $streams,
            micro: vec![$(micro::<$product, $mr, $nv, $streams, { Ahead::NOTHING }>),*],
            micro_block: vec![$(micro::<$product, $mr, $nv, $streams, { BLOCK_AHEAD.0 }>),*],
            few_rows_block: BLOCK_AHEAD.1,
            micro_sweep: vec![
                $(micro::<$product, $mr, $nv, $streams, { Ahead::of_sweep(<$proof>::LANES, $streams, $reads, $mr) }>),*
            ],
            beside_bytes: if <$proof>::LANES == 16 { gemm::BESIDE_BYTES } else { usize::MAX },
            micro_beside: vec![$(($panels, micro_beside::<$product, $rows, $nv, $panels>)),*],
            $($field)*
        }
    };
}

/// A [`Gemm`] whose A is f32.
macro_rules! gemm_widen {
    ($t:ty, $proof:path, nv $nv:literal, streams $streams:literal, mr $mr:tt, beside $beside:tt, widen $widen:expr) => {
        gemm!(
            $proof, Widen<$t>, nv $nv, streams $streams, mr $mr, beside $beside, reads size_of::<$t>() == size_of::<f32>(),
            a_is_f32: true,
            widen: $widen,
            widen_from: if <$proof>::LANES == 1 { 0 } else { gemm::WIDEN_FROM },
            convert: convert::<$t>,
            glu_tile: glu_tile::<$t, f32, $nv>,
            out_tile: out_tile::<$t, $nv>,
            out_tile_f32: out_tile::<f32, $nv>,
        )
    };
}

/// With many rows the weights are widened first.
macro_rules! widened {
    ($t:ty, $nv:literal, [$($mr:literal),*]) => {
        Some((widen::<$t, $nv> as _, vec![$(micro::<Widen<f32>, $mr, $nv, 1, { Ahead::NOTHING }>),*]))
    };
}

/// Makes `kernel()`, which gives the [`Kernel`] of one instruction set if `$detected`; the rest as in [`gemm`], for each dtype or for
/// all.
macro_rules! instantiate {
    (
        $module:ident, $name:literal, $proof:path, $detected:expr, $([$features:literal],)? streams $streams:literal,
        nv $nv:literal mr $mr:tt beside $beside:tt
    ) => {
        instantiate!(
            $module, $name, $proof, $detected, $([$features],)? streams $streams,
            f32 nv $nv mr $mr beside $beside, bf16 nv $nv mr $mr beside $beside, f16 nv $nv mr $mr beside $beside
        );
    };
    (
        $module:ident, $name:literal, $proof:path, $detected:expr, $([$features:literal],)? streams $streams:literal,
        f32 nv $nv32:literal mr $mr32:tt beside $beside32:tt,
        bf16 nv $nvb:literal mr $mrb:tt beside $besideb:tt,
        f16 nv $nvh:literal mr $mrh:tt beside $besideh:tt
    ) => {
        mod $module {
            use super::*;
            use super::glu::{Hidden, Tile};
            use super::micro::{Ahead, Call};
            use super::pack::Packable;
            use super::product::{Product, Widen};
            use super::simd::{Element, Simd};

            microkernels!($proof, $([$features],)? streams $streams);

            $(#[target_feature(enable = $features)])?
            fn forward_body<T: Element>(op: &Glu, gate: &[T], up: &[T], out: &mut [MaybeUninit<T>]) {
                // SAFETY: the target features of this function are those the proof stands for.
                glu::forward(unsafe { <$proof>::assume() }, op, gate, up, out)
            }

            $(#[target_feature(enable = $features)])?
            fn backward_body<T: Element>(op: &Glu, inputs: [&[T]; 3], outputs: [&mut [MaybeUninit<T>]; 2]) {
                // SAFETY: the target features of this function are those the proof stands for.
                glu::backward(unsafe { <$proof>::assume() }, op, inputs, outputs)
            }

            #[allow(unused_unsafe, reason = "the scalar kernel has no target features")]
            fn forward<T: Element>(op: &Glu, gate: &[T], up: &[T], out: &mut [MaybeUninit<T>]) {
                // SAFETY: only `kernel` names this function, after detection.
                unsafe { forward_body(op, gate, up, out) }
            }

            #[allow(unused_unsafe, reason = "the scalar kernel has no target features")]
            fn backward<T: Element>(op: &Glu, inputs: [&[T]; 3], outputs: [&mut [MaybeUninit<T>]; 2]) {
                // SAFETY: only `kernel` names this function, after detection.
                unsafe { backward_body(op, inputs, outputs) }
            }

            /// # Safety
            /// As [`pack::widen`].
            $(#[target_feature(enable = $features)])?
            unsafe fn widen<T: Packable, const NV: usize>(b: *const T, stream: usize, steps: usize, out: *mut f32) {
                // SAFETY: the caller's contract, and the target features.
                unsafe { pack::widen::<$proof, T, NV, $streams>(<$proof>::assume(), b, stream, steps, out) }
            }

            /// # Safety
            /// As [`gemm::convert`].
            $(#[target_feature(enable = $features)])?
            unsafe fn convert<T: Element>(from: *const T, n: usize, to: *mut u8) {
                // SAFETY: the caller's contract, and the target features.
                unsafe { gemm::convert(<$proof>::assume(), from, n, to.cast()) }
            }

            $(#[target_feature(enable = $features)])?
            fn sum_words_body(words: &[f32], streams: usize) -> u32 {
                // SAFETY: the target features of this function are those the proof stands for.
                pack::sum_words(unsafe { <$proof>::assume() }, words, streams)
            }

            #[allow(unused_unsafe, reason = "the scalar kernel has no target features")]
            fn sum_words(words: &[f32], streams: usize) -> u32 {
                // SAFETY: only `kernel` names this function, after detection.
                unsafe { sum_words_body(words, streams) }
            }

            fn functions<T: Element>() -> Functions<T> {
                Functions { forward: forward::<T>, backward: backward::<T> }
            }

            pub(super) fn kernel() -> Option<Kernel> {
                let detected: bool = $detected;
                detected.then(|| Kernel {
                    name: $name,
                    base_name: $name,
                    f32: functions(),
                    bf16: functions(),
                    f16: functions(),
                    gemm_f32: gemm_widen!(f32, $proof, nv $nv32, streams $streams, mr $mr32, beside $beside32, widen None),
                    gemm_bf16: gemm_widen!(
                        bf16, $proof, nv $nvb, streams $streams, mr $mrb, beside $besideb, widen widened!(bf16, $nvb, $mrb)
                    ),
                    gemm_f16: gemm_widen!(
                        f16, $proof, nv $nvh, streams $streams, mr $mrh, beside $besideh, widen widened!(f16, $nvh, $mrh)
                    ),
                    sum_words,
                })
            }
        }
    };
}

/// Makes `kernel()`, which gives the kernel of `$base` if `$detected`, but multiplies bf16 as it is, by [`product::DotBf16`]. `many`:
/// how that goes about more rows than `$mr` has, the function that reorders a block of k for them, and their microkernels.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! instantiate_bf16 {
    (
        $module:ident, $name:literal, $base:ident, $proof:path, $detected:expr, [$features:literal],
        streams $streams:literal, nv $nv:literal mr [$($mr:literal),*] beside $beside:tt $(, many $many:expr)?
    ) => {
        mod $module {
            use super::*;
            use super::glu::{Hidden, Tile};
            use super::micro::{Ahead, Call};
            use super::product::{DotBf16, Product};
            use super::simd::{Element, Simd};

            microkernels!($proof, [$features], streams $streams);

            pub(super) fn kernel() -> Option<Kernel> {
                let base = super::$base::kernel().filter(|_| $detected)?;
                let gemm_bf16 = gemm!(
                    $proof, DotBf16, nv $nv, streams $streams, mr [$($mr),*], beside $beside, reads true,
                    a_is_f32: false,
                    widen: None$(.or(Some($many)))?,
                    widen_from: [$($mr),*].len() + 1,
                    convert: gemm::copy_bf16,
                    glu_tile: glu_tile::<bf16, bf16, $nv>,
                    out_tile: out_tile::<bf16, $nv>,
                    out_tile_f32: out_tile::<f32, $nv>,
                );
                Some(Kernel { name: $name, gemm_bf16, ..base })
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
instantiate_bf16!(
    avx512bf16_kernel, "avx512bf16", avx512_kernel, super::avx512::Avx512, is_x86_feature_detected!("avx512bf16"),
    ["avx512f,avx512bw,avx512dq,avx512bf16"], streams 1,
    nv 2 mr [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12] beside [1 => 2, 2 => 2, 3 => 2, 4 => 2, 5 => 2, 6 => 2]
);
// What is widened as it is loaded has too few loads under way with two vectors (3 to 6 rows 5 to 20 % slower).
#[cfg(target_arch = "x86_64")]
instantiate!(
    avx512_kernel, "avx512", super::avx512::Avx512, super::avx512::Avx512::new().is_some(),
    ["avx512f,avx512bw,avx512dq"], streams 1,
    f32 nv 2 mr [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12] beside [1 => 2, 2 => 2, 3 => 2, 4 => 2, 5 => 2, 6 => 2],
    bf16 nv 4 mr [1, 2, 3, 4, 5, 6] beside [],
    f16 nv 4 mr [1, 2, 3, 4, 5, 6] beside []
);
#[cfg(target_arch = "x86_64")]
instantiate!(
    avx2_kernel, "avx2", super::avx2::Avx2, super::avx2::Avx2::new().is_some(), ["avx2,fma,f16c"], streams 4,
    nv 2 mr [1, 2, 3, 4, 5, 6] beside [1 => 2, 2 => 2, 3 => 2]
);
#[cfg(target_arch = "aarch64")]
instantiate_bf16!(
    neonbf16_kernel, "neonbf16", neon_kernel, super::neon::Neon, std::arch::is_aarch64_feature_detected!("bf16"), ["neon,bf16"],
    streams 1, nv 4 mr [1, 2, 3, 4, 5, 6] beside [], many super::neonbf16::many_rows()
);
// What widening holds would not leave the registers for all the sums of a sixth row.
#[cfg(target_arch = "aarch64")]
instantiate!(
    neon_kernel, "neon", super::neon::Neon, super::neon::Neon::new().is_some(), ["neon"], streams 1,
    f32 nv 4 mr [1, 2, 3, 4, 5, 6] beside [],
    bf16 nv 4 mr [1, 2, 3, 4, 5] beside [],
    f16 nv 4 mr [1, 2, 3, 4, 5] beside []
);
#[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
instantiate!(simd128_kernel, "simd128", super::simd128::Simd128, true, streams 1, nv 2 mr [1, 2, 3, 4] beside []);
instantiate!(scalar_kernel, "scalar", super::scalar::Scalar, true, streams 1, nv 8 mr [1, 2] beside []);

/// Every kernel this machine can run, best first; the scalar one is always there.
pub(crate) fn available() -> &'static [Kernel] {
    static AVAILABLE: OnceLock<Vec<Kernel>> = OnceLock::new();
    AVAILABLE.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        let simd = [avx512bf16_kernel::kernel(), avx512_kernel::kernel(), avx2_kernel::kernel()];
        #[cfg(target_arch = "aarch64")]
        let simd = [neonbf16_kernel::kernel(), neon_kernel::kernel()];
        #[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
        let simd = [simd128_kernel::kernel()];
        #[cfg(not(any(
            target_arch = "x86_64",
            target_arch = "aarch64",
            all(target_arch = "wasm32", target_feature = "simd128")
        )))]
        let simd: [Option<Kernel>; 0] = [];
        simd.into_iter().chain([scalar_kernel::kernel()]).flatten().collect()
    })
}

/// The names of the CPU kernels that this machine can run, best first: on x86-64 of `avx512bf16`, `avx512` and `avx2`, on 64-bit
/// ARM of `neonbf16` and `neon`, in WebAssembly built for it `simd128`, and everywhere `scalar`. The environment variable `CANDLE_SWIGLU_KERNEL` takes one of them;
/// without it the first one runs. `CANDLE_SWIGLU_KERNEL=plain` stands for no kernel of this crate, on any device: the definition by
/// candle's own operations.
///
/// ```
/// assert_eq!(candle_swiglu::cpu_kernels().last(), Some(&"scalar"));
/// ```
pub fn cpu_kernels() -> Vec<&'static str> {
    available().iter().map(|kernel| kernel.name).collect()
}

/// The kernel that production runs: the best one, or the one that [`forced::VARIABLE`] names. With
/// `plain` no layer uses it.
pub(crate) fn selected() -> Result<&'static Kernel> {
    let Some(name) = forced::kernel().filter(|&name| name != forced::PLAIN) else {
        return Ok(&available()[0]);
    };
    by_name(name).ok_or_else(|| Error::UnknownKernel {
        variable: forced::VARIABLE,
        found: name.to_string(),
        available: cpu_kernels().into_iter().chain([forced::PLAIN]).collect(),
    })
}

fn by_name(name: &str) -> Option<&'static Kernel> {
    available().iter().find(|kernel| kernel.name == name)
}
