//! The instruction sets, one file each: a vector type ([`Simd`](super::simd::Simd)), the door to
//! code that is compiled for it ([`Isa::vectorize`](super::simd::Isa::vectorize)), detection, and
//! the choice of shapes and tuning.
//!
//! To add one, see `docs/adding-an-instruction-set.md`.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod amx_row;
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

/// The scalar instruction set and its kernels.
#[cfg(test)]
pub(super) fn scalar_isa() -> (impl super::simd::Isa<Simd: super::simd::Simd>, CpuKernels) {
    (scalar::Scalar, scalar::kernels_of_scalars())
}

/// The matrix unit, if the CPU has one and the process may use it.
#[cfg(all(test, target_arch = "x86_64"))]
pub(super) use amx::tiles;

/// The kernels of every instruction set that this CPU has, best first. The scalar ones are always
/// there.
pub(super) fn detect(family: CpuFamily) -> Vec<CpuKernels> {
    // On Sapphire and Emerald Rapids, `vdpbf16ps` multiplies at half the rate of f32.
    #[cfg(target_arch = "x86_64")]
    let [first, second] = match family {
        CpuFamily::SapphireRapids => [avx512::detect, avx512bf16::detect],
        _ => [avx512bf16::detect, avx512::detect],
    };
    let detectors: &[fn(CpuFamily) -> Option<CpuKernels>] = &[
        #[cfg(target_arch = "x86_64")]
        amx::detect,
        #[cfg(target_arch = "x86_64")]
        first,
        #[cfg(target_arch = "x86_64")]
        second,
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
