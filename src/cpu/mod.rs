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
mod low_rank;
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
#[cfg_attr(
    not(target_arch = "x86_64"),
    allow(dead_code, reason = "AMX is the only matrix unit with kernels here")
)]
mod tiles;
mod train;
mod tuning;
#[cfg(test)]
mod twin;

use std::sync::OnceLock;

pub(crate) use gate::{gate_backward, gate_forward};
pub(crate) use kernels::CpuKernels;
pub(crate) use layer::{BlockLayer, LinearLayer, block, linear};
pub(crate) use low_rank::LowRank;
pub(crate) use train::{
    BlockOperands, BlockWanted, Dropout, LinearWanted, LowRankGradients, LowRankOperands, Operand,
    Saved, Trained, WeightOperand,
};

use self::tuning::CpuFamily;
use crate::error::{Error, Result};
use crate::forced;

/// Every kernel this machine can run, best first. The scalar one is always there.
pub(crate) fn available() -> &'static [CpuKernels] {
    static AVAILABLE: OnceLock<Vec<CpuKernels>> = OnceLock::new();
    AVAILABLE.get_or_init(|| isa::detect(CpuFamily::detect()))
}

/// The names of the CPU kernels that this machine can run, best first: on x86-64 `amx`,
/// `avx512bf16`, `avx512` and `avx2` (Intel's Sapphire and Emerald Rapids: `avx512` before
/// `avx512bf16`), on 64-bit ARM `neonbf16` and `neon`, in WebAssembly built for it `simd128`, and
/// everywhere `scalar`. The environment variable `CANDLE_SWIGLU_KERNEL` selects one by name;
/// without it the first one runs. `CANDLE_SWIGLU_KERNEL=plain` selects no kernel of this crate, on
/// any device: the block is then computed by candle's own operations.
///
/// ```
/// assert_eq!(candle_swiglu::cpu_kernels().last(), Some(&"scalar"));
/// ```
pub fn cpu_kernels() -> Vec<&'static str> {
    available().iter().map(|kernels| kernels.name).collect()
}

/// The kernels that production runs: the best ones, or those that [`forced::VARIABLE`] names.
/// Decided once. With `plain` no layer uses them.
pub(crate) fn selected() -> Result<&'static CpuKernels> {
    static SELECTED: OnceLock<Option<&'static CpuKernels>> = OnceLock::new();
    let name = || forced::kernel().filter(|&name| name != forced::PLAIN);
    let selected = SELECTED.get_or_init(|| {
        let kernels = match name() {
            Some(name) => available().iter().find(|kernels| kernels.name == name),
            None => available().first(),
        }?;
        let tuning = kernels.f32.sweep.tuning.measured_on;
        let tiles = kernels.bf16.sweep.tiles.as_ref().map(|tiles| tiles.tuning.measured_on);
        tracing::debug!(kernel = kernels.name, cpu = ?CpuFamily::detect(), tuning, tiles, "CPU kernel selected");
        Some(kernels)
    });
    selected.ok_or_else(|| Error::UnknownKernel {
        variable: forced::VARIABLE,
        found: name().unwrap_or_default().to_string(),
        available: cpu_kernels().into_iter().chain([forced::PLAIN]).collect(),
    })
}
