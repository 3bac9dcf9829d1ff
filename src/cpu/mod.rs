//! CPU kernels: the list of them, best first, and the drivers that run one over candle's storages.
//!
//! A [`Kernel`] exists only after its instruction set was detected, so its functions are safe to call. Production takes
//! [`best`]; tests and benchmarks take all of [`available`].

mod activation;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod elementwise;
mod glu;
mod pages;
mod scalar;
mod simd;
#[cfg(test)]
mod tests;

use std::mem::MaybeUninit;
use std::sync::OnceLock;

use half::{bf16, f16};

pub(crate) use elementwise::{backward, forward};

use crate::glu::Glu;

/// gate, up (n) -> out (n)
type Forward<T> = fn(&Glu, &[T], &[T], &mut [MaybeUninit<T>]);
/// gate, up, dy (n) -> dgate, dup (n)
type Backward<T> = fn(&Glu, [&[T]; 3], [&mut [MaybeUninit<T>]; 2]);

/// The functions of one kernel for one dtype.
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
}

/// Makes `kernel()`, which gives the [`Kernel`] of one instruction set if `$proof::new()` detects it.
macro_rules! instantiate {
    ($module:ident, $name:literal, $proof:path, $features:literal) => {
        mod $module {
            use super::*;

            #[target_feature(enable = $features)]
            fn forward_body<T: simd::Element>(op: &Glu, gate: &[T], up: &[T], out: &mut [MaybeUninit<T>]) {
                // SAFETY: the target features of this function are those the proof stands for.
                glu::forward(unsafe { <$proof>::assume() }, op, gate, up, out)
            }

            #[target_feature(enable = $features)]
            fn backward_body<T: simd::Element>(op: &Glu, inputs: [&[T]; 3], outputs: [&mut [MaybeUninit<T>]; 2]) {
                // SAFETY: the target features of this function are those the proof stands for.
                glu::backward(unsafe { <$proof>::assume() }, op, inputs, outputs)
            }

            fn forward<T: simd::Element>(op: &Glu, gate: &[T], up: &[T], out: &mut [MaybeUninit<T>]) {
                // SAFETY: only `kernel` names this function, after detection.
                unsafe { forward_body(op, gate, up, out) }
            }

            fn backward<T: simd::Element>(op: &Glu, inputs: [&[T]; 3], outputs: [&mut [MaybeUninit<T>]; 2]) {
                // SAFETY: only `kernel` names this function, after detection.
                unsafe { backward_body(op, inputs, outputs) }
            }

            pub(super) fn kernel() -> Option<Kernel> {
                <$proof>::new()?;
                Some(Kernel {
                    name: $name,
                    f32: Functions { forward: forward::<f32>, backward: backward::<f32> },
                    bf16: Functions { forward: forward::<bf16>, backward: backward::<bf16> },
                    f16: Functions { forward: forward::<f16>, backward: backward::<f16> },
                })
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
instantiate!(avx512_kernel, "avx512", avx512::Avx512, "avx512f,avx512bw,avx512dq");
#[cfg(target_arch = "x86_64")]
instantiate!(avx2_kernel, "avx2", avx2::Avx2, "avx2,fma,f16c");

fn scalar_kernel() -> Kernel {
    fn forward<T: simd::Element>(op: &Glu, gate: &[T], up: &[T], out: &mut [MaybeUninit<T>]) {
        glu::forward(scalar::Scalar, op, gate, up, out)
    }
    fn backward<T: simd::Element>(op: &Glu, inputs: [&[T]; 3], outputs: [&mut [MaybeUninit<T>]; 2]) {
        glu::backward(scalar::Scalar, op, inputs, outputs)
    }
    Kernel {
        name: "scalar",
        f32: Functions { forward: forward::<f32>, backward: backward::<f32> },
        bf16: Functions { forward: forward::<bf16>, backward: backward::<bf16> },
        f16: Functions { forward: forward::<f16>, backward: backward::<f16> },
    }
}

/// Every kernel this machine can run, best first; the scalar one is always there.
pub(crate) fn available() -> &'static [Kernel] {
    static AVAILABLE: OnceLock<Vec<Kernel>> = OnceLock::new();
    AVAILABLE.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        let simd = [avx512_kernel::kernel(), avx2_kernel::kernel()];
        #[cfg(not(target_arch = "x86_64"))]
        let simd: [Option<Kernel>; 0] = [];
        simd.into_iter().flatten().chain([scalar_kernel()]).collect()
    })
}

/// The kernel that production runs.
pub(crate) fn best() -> &'static Kernel {
    &available()[0]
}
