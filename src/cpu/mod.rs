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
mod elementwise;
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

use half::{bf16, f16};

pub(crate) use elementwise::{backward, forward};
pub(crate) use layer::{Layer, Part, block, linear};

use self::gemm::{Gemm, GemmElement};
use crate::activation::Glu;
use crate::error::{Error, Result};

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
    /// The instruction set's name.
    pub(crate) name: &'static str,
    f32: Functions<f32>,
    bf16: Functions<bf16>,
    f16: Functions<f16>,
    gemm_f32: Gemm<f32>,
    gemm_bf16: Gemm<bf16>,
    gemm_f16: Gemm<f16>,
    /// The sum of words mod 2³², as fast as this instruction set reads.
    sum_words: pack::SumWords,
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

/// The microkernels of an instruction set, and the epilogue of gate and up.
///
/// `$nv` vectors make a panel, in `$streams` streams; `$mr` are the heights of the microkernel; $mr·$nv sums, $nv columns of B and
/// one of A are to fit the registers.
macro_rules! microkernels {
    (
        $proof:path, $([$features:literal],)?
        nv $nv:literal, streams $streams:literal, mr [$($mr:literal),*] $(, beside [$($rows:literal => $panels:literal),*])?
    ) => {
        /// # Safety
        /// As [`micro::run`], or [`micro::run_streams`].
        $(#[target_feature(enable = $features)])?
        unsafe fn micro<P: Product<$proof>, const MR: usize, const STREAMS: usize, const AHEAD: u8>(call: Call) {
            // SAFETY: the caller's contract, and the target features.
            unsafe {
                if STREAMS > 1 {
                    micro::run_streams::<$proof, P, MR, $nv, 1, STREAMS, AHEAD>(<$proof>::assume(), call)
                } else {
                    micro::run::<$proof, P, MR, $nv, AHEAD>(<$proof>::assume(), call)
                }
            }
        }

        fn micros<P: Product<$proof>, const STREAMS: usize, const AHEAD: u8>() -> Vec<Micro> {
            vec![$(micro::<P, $mr, STREAMS, AHEAD>),*]
        }

        /// # Safety
        /// As [`micro::run_streams`].
        #[allow(dead_code, reason = "not every kernel takes panels side by side")]
        $(#[target_feature(enable = $features)])?
        unsafe fn micro_beside<P: Product<$proof>, const MR: usize, const PANELS: usize>(call: Call) {
            // SAFETY: the caller's contract, and the target features.
            unsafe { micro::run_streams::<$proof, P, MR, $nv, PANELS, $streams, { Ahead::NOTHING }>(<$proof>::assume(), call) }
        }

        fn micros_beside<P: Product<$proof>>() -> Vec<(usize, Micro)> {
            vec![$($(($panels, micro_beside::<P, $rows, $panels>)),*)?]
        }

        /// How the microkernels of a block fetch the next one.
        const BLOCK_AHEAD: u8 = match ($streams, <$proof>::LANES) {
            (1, _) => Ahead::TWO_LINES,
            (_, 16) => Ahead::PACE_FAR,
            _ => Ahead::PACE,
        };

        const FEW_ROWS_BLOCK: usize = match BLOCK_AHEAD {
            Ahead::PACE_FAR => gemm::FEW_ROWS_BLOCK_FAR,
            _ => gemm::FEW_ROWS_BLOCK,
        };

        /// For one sweep along a panel: from so many rows on they fetch ahead.
        fn sweep<P: Product<$proof>>(from: usize) -> Vec<Micro> {
            let few = micros::<P, $streams, { Ahead::NOTHING }>().into_iter().take(from - 1);
            few.chain(micros::<P, $streams, { Ahead::A_STEP }>().into_iter().skip(from - 1)).collect()
        }

        /// # Safety
        /// As [`glu::tile`].
        $(#[target_feature(enable = $features)])?
        unsafe fn glu_tile<T: Element, H: Hidden<T>>(op: &Glu, tile: Tile, h: *mut u8, h_stride: usize) {
            // SAFETY: the caller's contract, and the target features.
            unsafe { glu::tile::<$proof, T, H, $nv>(<$proof>::assume(), op, tile, h.cast(), h_stride) }
        }
    };
}

/// Makes `kernel()`, which gives the [`Kernel`] of one instruction set if `$detected`; the rest as in [`microkernels`]. `beside`: so
/// many rows take so many panels at once.
macro_rules! instantiate {
    (
        $module:ident, $name:literal, $proof:path, $detected:expr, $([$features:literal],)?
        nv $nv:literal, streams $streams:literal, mr [$($mr:literal),*] $(, beside [$($rows:literal => $panels:literal),*])?
    ) => {
        mod $module {
            use super::*;
            use super::glu::{Hidden, Tile};
            use super::micro::{Ahead, Call, Micro};
            use super::pack::Packable;
            use super::product::{Product, Widen};
            use super::simd::{Element, Simd};

            microkernels!(
                $proof, $([$features],)? nv $nv, streams $streams, mr [$($mr),*] $(, beside [$($rows => $panels),*])?
            );

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
            unsafe fn widen<T: Packable>(b: *const T, stream: usize, steps: usize, out: *mut f32) {
                // SAFETY: the caller's contract, and the target features.
                unsafe { pack::widen::<$proof, T, $nv, $streams>(<$proof>::assume(), b, stream, steps, out) }
            }

            /// # Safety
            /// As [`gemm::convert`].
            $(#[target_feature(enable = $features)])?
            unsafe fn convert<T: Element>(from: *const T, n: usize, to: *mut u8) {
                // SAFETY: the caller's contract, and the target features.
                unsafe { gemm::convert(<$proof>::assume(), from, n, to.cast()) }
            }

            /// # Safety
            /// As [`gemm::out_tile`].
            $(#[target_feature(enable = $features)])?
            unsafe fn out_tile<T: Element>(tile: Tile, factor: f32, y: *mut T, y_stride: usize, columns: usize) {
                // SAFETY: the caller's contract, and the target features.
                unsafe { gemm::out_tile::<$proof, T, $nv>(<$proof>::assume(), tile, factor, y, y_stride, columns) }
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

            /// A in f32; with many rows the weights are widened first, unless they are f32.
            fn gemm_f32<T: Packable>(is_f32: bool) -> Gemm<T>
            where
                Widen<T>: Product<$proof, A = f32, B = T>,
            {
                let mut gemm = Gemm {
                    nr: $nv * <$proof>::LANES,
                    streams: $streams,
                    a_is_f32: true,
                    micro: micros::<Widen<T>, $streams, { Ahead::NOTHING }>(),
                    micro_block: micros::<Widen<T>, $streams, { BLOCK_AHEAD }>(),
                    few_rows_block: FEW_ROWS_BLOCK,
                    // The processor fetches ahead by itself where there are several streams, and little to do for each line.
                    micro_sweep: sweep::<Widen<T>>(match (is_f32, $streams, <$proof>::LANES) {
                        (_, 2.., 16) | (true, 2.., _) => usize::MAX,
                        _ => 1,
                    }),
                    micro_beside: micros_beside::<Widen<T>>(),
                    widen: (!is_f32).then(|| (widen::<T> as _, micros::<Widen<f32>, 1, { Ahead::NOTHING }>())),
                    widen_from: if <$proof>::LANES == 1 { 0 } else { gemm::WIDEN_FROM },
                    convert: convert::<T>,
                    glu_tile: glu_tile::<T, f32>,
                    out_tile: out_tile::<T>,
                };
                if !is_f32 && <$proof>::GROUP > 1 {
                    // What widening holds would not leave the registers for all the sums of a sixth row.
                    for micros in [&mut gemm.micro, &mut gemm.micro_block, &mut gemm.micro_sweep] {
                        micros.truncate(5);
                    }
                }
                gemm
            }

            pub(super) fn kernel() -> Option<Kernel> {
                let detected: bool = $detected;
                detected.then(|| Kernel {
                    name: $name,
                    f32: functions(),
                    bf16: functions(),
                    f16: functions(),
                    gemm_f32: gemm_f32::<f32>(true),
                    gemm_bf16: gemm_f32::<bf16>(false),
                    gemm_f16: gemm_f32::<f16>(false),
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
        nv $nv:literal, streams $streams:literal, mr [$($mr:literal),*] $(, beside [$($rows:literal => $panels:literal),*])?
        $(, many $many:expr)?
    ) => {
        mod $module {
            use super::*;
            use super::glu::{Hidden, Tile};
            use super::micro::{Ahead, Call, Micro};
            use super::product::{DotBf16, Product};
            use super::simd::{Element, Simd};

            microkernels!(
                $proof, [$features], nv $nv, streams $streams, mr [$($mr),*] $(, beside [$($rows => $panels),*])?
            );

            pub(super) fn kernel() -> Option<Kernel> {
                let base = super::$base::kernel().filter(|_| $detected)?;
                let gemm_bf16 = Gemm {
                    nr: $nv * <$proof>::LANES,
                    streams: $streams,
                    a_is_f32: false,
                    micro: micros::<DotBf16, $streams, { Ahead::NOTHING }>(),
                    micro_block: micros::<DotBf16, $streams, { BLOCK_AHEAD }>(),
                    few_rows_block: FEW_ROWS_BLOCK,
                    micro_sweep: sweep::<DotBf16>(if $streams > 1 { usize::MAX } else { 2 }),
                    micro_beside: micros_beside::<DotBf16>(),
                    widen: None$(.or(Some($many)))?,
                    widen_from: [$($mr),*].len() + 1,
                    convert: gemm::copy_bf16,
                    glu_tile: glu_tile::<bf16, bf16>,
                    ..base.gemm_bf16
                };
                Some(Kernel { name: $name, gemm_bf16, ..base })
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
instantiate_bf16!(
    avx512bf16_kernel, "avx512bf16", avx512_kernel, super::avx512::Avx512, is_x86_feature_detected!("avx512bf16"),
    ["avx512f,avx512bw,avx512dq,avx512bf16"], nv 4, streams 4, mr [1, 2, 3, 4, 5, 6]
);
#[cfg(target_arch = "x86_64")]
instantiate!(
    avx512_kernel, "avx512", super::avx512::Avx512, super::avx512::Avx512::new().is_some(),
    ["avx512f,avx512bw,avx512dq"], nv 4, streams 4, mr [1, 2, 3, 4, 5, 6]
);
#[cfg(target_arch = "x86_64")]
instantiate!(
    avx2_kernel, "avx2", super::avx2::Avx2, super::avx2::Avx2::new().is_some(), ["avx2,fma,f16c"],
    nv 2, streams 4, mr [1, 2, 3, 4, 5, 6], beside [1 => 2, 2 => 2, 3 => 2]
);
#[cfg(target_arch = "aarch64")]
instantiate_bf16!(
    neonbf16_kernel, "neonbf16", neon_kernel, super::neon::Neon, std::arch::is_aarch64_feature_detected!("bf16"), ["neon,bf16"],
    nv 4, streams 1, mr [1, 2, 3, 4, 5, 6], many super::neonbf16::many_rows()
);
#[cfg(target_arch = "aarch64")]
instantiate!(
    neon_kernel, "neon", super::neon::Neon, super::neon::Neon::new().is_some(), ["neon"],
    nv 4, streams 1, mr [1, 2, 3, 4, 5, 6]
);
#[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
instantiate!(simd128_kernel, "simd128", super::simd128::Simd128, true, nv 2, streams 1, mr [1, 2, 3, 4]);
instantiate!(scalar_kernel, "scalar", super::scalar::Scalar, true, nv 8, streams 1, mr [1, 2]);

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
/// without it the first one runs.
///
/// ```
/// assert_eq!(candle_swiglu::cpu_kernels().last(), Some(&"scalar"));
/// ```
pub fn cpu_kernels() -> Vec<&'static str> {
    available().iter().map(|kernel| kernel.name).collect()
}

/// The environment variable that forces a kernel by name.
const FORCED: &str = "CANDLE_SWIGLU_KERNEL";

/// The kernel that production runs: the best one, or the one that `CANDLE_SWIGLU_KERNEL` names. Decided once.
pub(crate) fn selected() -> Result<&'static Kernel> {
    static SELECTED: OnceLock<std::result::Result<&'static Kernel, String>> = OnceLock::new();
    let selected = SELECTED.get_or_init(|| match std::env::var(FORCED) {
        Ok(name) if !name.is_empty() => by_name(&name).ok_or(name),
        _ => Ok(&available()[0]),
    });
    selected.as_ref().copied().map_err(|name| Error::UnknownKernel {
        variable: FORCED,
        found: name.clone(),
        available: cpu_kernels(),
    })
}

fn by_name(name: &str) -> Option<&'static Kernel> {
    available().iter().find(|kernel| kernel.name == name)
}
