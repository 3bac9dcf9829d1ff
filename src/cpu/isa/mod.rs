//! The instruction sets, one file each: a vector type ([`Simd`](super::simd::Simd)), the door to
//! code that is compiled for it ([`Isa::vectorize`](super::simd::Isa::vectorize)), detection, and
//! the choice of shapes and tuning.
//!
//! To add one, see `docs/adding-an-instruction-set.md`.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512bf16;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "aarch64")]
mod neonbf16;
mod scalar;
#[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
mod simd128;

use super::kernels::CpuKernels;
use super::tuning::CpuFamily;

/// The kernels of every instruction set that this CPU has, best first. The scalar ones are always
/// there.
pub(super) fn detect(family: CpuFamily) -> Vec<CpuKernels> {
    let detectors: &[fn(CpuFamily) -> Option<CpuKernels>] = &[
        #[cfg(target_arch = "x86_64")]
        avx512bf16::detect,
        #[cfg(target_arch = "x86_64")]
        avx512::detect,
        #[cfg(target_arch = "x86_64")]
        avx2::detect,
        #[cfg(target_arch = "aarch64")]
        neonbf16::detect,
        #[cfg(target_arch = "aarch64")]
        neon::detect,
        #[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
        simd128::detect,
        scalar::detect,
    ];
    detectors.iter().filter_map(|detect| detect(family)).collect()
}
