//! CPU kernels: the instruction sets that the machine has, best first, and the choice between them.
//!
//! `docs/architecture.md` describes the way of x through this folder.

mod activation;
#[cfg(test)]
mod block_tests;
mod buffer;
mod epilogue;
mod format;
mod gate;
mod glu;
mod isa;
mod kernels;
mod layer;
mod matrix;
mod micro;
mod pages;
mod panels;
mod partition;
mod pass;
mod prefetch;
mod product;
mod projection;
mod simd;
mod sweep;
#[cfg(test)]
mod tests;
mod threads;
mod tuning;

use std::sync::OnceLock;

pub(crate) use gate::{gate_backward, gate_forward};
pub(crate) use kernels::CpuKernels;
pub(crate) use layer::{BlockLayer, LinearLayer, block, linear};

use self::tuning::CpuFamily;
use crate::error::{Error, Result};

/// Every kernel this machine can run, best first. The scalar one is always there.
pub(crate) fn available() -> &'static [CpuKernels] {
    static AVAILABLE: OnceLock<Vec<CpuKernels>> = OnceLock::new();
    AVAILABLE.get_or_init(|| isa::detect(CpuFamily::detect()))
}

/// The names of the CPU kernels that this machine can run, best first: on x86-64 of `avx512bf16`,
/// `avx512` and `avx2`, on 64-bit ARM of `neonbf16` and `neon`, in WebAssembly built for it `simd128`,
/// and everywhere `scalar`. The environment variable `CANDLE_SWIGLU_KERNEL` selects one by name;
/// without it the first one runs.
///
/// ```
/// assert_eq!(candle_swiglu::cpu_kernels().last(), Some(&"scalar"));
/// ```
pub fn cpu_kernels() -> Vec<&'static str> {
    available().iter().map(|kernels| kernels.name).collect()
}

/// The environment variable that forces a kernel by name.
const FORCED: &str = "CANDLE_SWIGLU_KERNEL";

/// The kernel that production runs: the best one, or the one that `CANDLE_SWIGLU_KERNEL` names. Decided once.
pub(crate) fn selected() -> Result<&'static CpuKernels> {
    static SELECTED: OnceLock<std::result::Result<&'static CpuKernels, String>> = OnceLock::new();
    let selected = SELECTED.get_or_init(|| {
        let kernels = match std::env::var(FORCED) {
            Ok(name) if !name.is_empty() => by_name(&name).ok_or(name)?,
            _ => &available()[0],
        };
        let tuning = kernels.f32.sweep.tuning.measured_on;
        tracing::debug!(kernel = kernels.name, cpu = ?CpuFamily::detect(), tuning, "CPU kernel selected");
        Ok(kernels)
    });
    selected.as_ref().copied().map_err(|name| Error::UnknownKernel {
        variable: FORCED,
        found: name.clone(),
        available: cpu_kernels(),
    })
}

fn by_name(name: &str) -> Option<&'static CpuKernels> {
    available().iter().find(|kernels| kernels.name == name)
}
