//! The block, `Linear` and the gate on a CUDA device, against the definition in f64.
//!
//! Without a device every test prints a line and passes. With `CANDLE_SWIGLU_REQUIRE_CUDA=1` it
//! fails.

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
mod products;
mod streams;
mod training;

/// The dtypes that the kernels of the block support.
const KERNEL_DTYPES: [DType; 3] = [DType::BF16, DType::F16, DType::F32];

/// A new candle device on the first GPU, if there is one.
fn cuda() -> Result<Option<Device>> {
    present(Device::new_cuda(0))
}

/// The same with a stream of its own, so that cudarc tracks uses with events.
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
            // Not eprintln, which the test harness captures.
            writeln!(
                std::io::stderr(),
                "{test} skipped: no CUDA device ({})",
                error.to_string().lines().next().unwrap_or("")
            )?;
            Ok(None)
        }
    }
}

/// Whether the driver is the model of tests/cuda_model. The model is slow, and computes kernels by
/// their definition.
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

/// The result of `work` with one prefill method forced.
fn with_prefill<R>(way: CudaPrefill, work: impl FnOnce() -> R) -> R {
    force_cuda_prefill(Some(way));
    let result = work();
    force_cuda_prefill(None);
    result
}

/// Computes y of an x on the CPU, and copies it back to the CPU.
fn run(layer: &impl Module, x: &Tensor, device: &Device) -> Result<Tensor> {
    Ok(layer.forward(&x.to_device(device)?)?.to_device(&Device::Cpu)?)
}

/// Unit roundoff of the sums: that of f32, or four times as much on tensor cores, which truncate
/// when they add the products of one instruction.
fn sum_roundoff(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => common::unit_roundoff(DType::F32),
        _ => 4.0 * common::unit_roundoff(DType::F32),
    }
}
