//! Trains a block with AdamW to compute what another one computes: `cargo run --release --example
//! 03_train`
//!
//! `train.rs` trains a whole model.

use anyhow::{Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_nn::{AdamW, Module, Optimizer, ParamsAdamW, VarBuilder, VarMap, loss};
use candle_swiglu::{FfnConfig, SwiGluFfn, backward, swiglu_ffn};

/// A block with random weights, which are variables of `vars`.
fn block(vars: &VarMap) -> Result<SwiGluFfn> {
    Ok(swiglu_ffn(
        &FfnConfig::new(16, 32),
        VarBuilder::from_varmap(vars, DType::F32, &Device::Cpu),
    )?)
}

fn main() -> Result<()> {
    let (teacher, vars) = (block(&VarMap::new())?, VarMap::new());
    let student = block(&vars)?;
    let mut optimizer = AdamW::new(
        vars.all_vars(),
        ParamsAdamW { lr: 0.01, weight_decay: 0.0, ..ParamsAdamW::default() },
    )?;
    let mut losses = vec![];
    for step in 0..=300 {
        let x = Tensor::randn(0f32, 1.0, (64, 16), &Device::Cpu)?;
        let loss = loss::mse(&student.forward(&x)?, &teacher.forward(&x)?)?;
        optimizer.step(&backward(&loss)?)?; // `loss.backward()`, faster
        losses.push(loss.to_scalar::<f32>()?);
        if step % 100 == 0 {
            println!("step {step:3}: loss {:.5}", losses[step]);
        }
    }
    let (first, last) = (losses[0], losses[300]);
    ensure!(last < first / 2.0, "expected the loss to fall to half of {first}, found {last}");
    let trained = student.freeze()?; // packed for inference
    println!("trained; kernel for inference: {}", trained.kernel());
    Ok(())
}
