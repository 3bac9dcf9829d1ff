//! The block, `Linear` and the gate on a CUDA device, against the definition in f64.
//!
//! Without a device every test prints a line and passes; with `CANDLE_SWIGLU_REQUIRE_CUDA=1` it
//! fails instead.

#![cfg(feature = "cuda")]

use std::collections::HashMap;
use std::io::Write;

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::VarBuilder;
use candle_swiglu::{CudaPrefill, FfnConfig, SwiGluFfn, force_cuda_prefill};

#[path = "../common/mod.rs"]
mod common;
mod debugging;
mod forward;
mod gate;
mod streams;

/// Dtypes that the kernels of the block take.
const KERNEL_DTYPES: [DType; 3] = [DType::BF16, DType::F16, DType::F32];

/// A candle device of its own on the first GPU, if there is one.
fn cuda() -> Result<Option<Device>> {
    present(Device::new_cuda(0))
}

/// The same with a stream of its own, so that cudarc tracks uses by events.
fn cuda_with_stream() -> Result<Option<Device>> {
    present(Device::new_cuda_with_stream(0))
}

fn present(device: candle_core::Result<Device>) -> Result<Option<Device>> {
    match device {
        Ok(device) => Ok(Some(device)),
        Err(error) => {
            let required =
                std::env::var_os("CANDLE_SWIGLU_REQUIRE_CUDA").is_some_and(|value| value == "1");
            ensure!(!required, "CANDLE_SWIGLU_REQUIRE_CUDA=1, but no CUDA device: {error}");
            let test = std::thread::current().name().unwrap_or("test").to_string();
            // Not through eprintln, which the harness keeps to itself.
            writeln!(
                std::io::stderr(),
                "{test} skipped: no CUDA device ({})",
                error.to_string().lines().next().unwrap_or("")
            )?;
            Ok(None)
        }
    }
}

/// Whether the driver is the model of tests/cuda_model, which is slow and whose kernels are their
/// own definition.
fn on_model() -> bool {
    std::env::var_os("CUDA_MODEL").is_some()
}

/// The block of `cfg` over named tensors, on `device`.
fn build(cfg: &FfnConfig, weights: &HashMap<String, Tensor>, device: &Device) -> Result<SwiGluFfn> {
    let dtype = weights["down_proj.weight"].dtype();
    let moved = weights
        .iter()
        .map(|(name, t)| Ok((name.clone(), t.to_device(device)?)))
        .collect::<Result<HashMap<_, _>>>()?;
    Ok(SwiGluFfn::new(cfg, VarBuilder::from_tensors(moved, dtype, device))?)
}

/// What `work` gives with one way of prefill forced.
fn with_prefill<R>(way: CudaPrefill, work: impl FnOnce() -> R) -> R {
    force_cuda_prefill(Some(way));
    let result = work();
    force_cuda_prefill(None);
    result
}

/// y of an x on the CPU, back on the CPU.
fn run(layer: &impl Module, x: &Tensor, device: &Device) -> Result<Tensor> {
    Ok(layer.forward(&x.to_device(device)?)?.to_device(&Device::Cpu)?)
}

/// Unit roundoff of the sums: f32's, and four times as much on tensor cores, which add the products
/// of one instruction with truncation.
fn sum_roundoff(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => common::unit_roundoff(DType::F32),
        _ => 4.0 * common::unit_roundoff(DType::F32),
    }
}
