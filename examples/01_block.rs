//! A SwiGLU block in place of a model's own MLP: `cargo run --release --example 01_block`
//!
//! `y = (silu(x·Wgᵀ) ⊙ (x·Wuᵀ))·Wdᵀ`, with x and y of shape (batch, positions, hidden size).

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::{Module, VarBuilder, VarMap};
use candle_swiglu::{FfnConfig, GluActivation, swiglu_ffn};

fn main() -> Result<()> {
    let (hidden, intermediate) = (256, 688);
    let cfg = FfnConfig::new(hidden, intermediate).with_activation(GluActivation::Silu);

    // The VarMap creates random weights. With a checkpoint, the model passes its own VarBuilder.
    let weights = VarMap::new();
    let vb = VarBuilder::from_varmap(&weights, DType::F32, &Device::Cpu);
    let ffn = swiglu_ffn(&cfg, vb.pp("model.layers.0.mlp"))?;

    let x = Tensor::randn(0f32, 1.0, (1, 8, hidden), &Device::Cpu)?;
    let y = ffn.forward(&x)?;
    println!("x {:?} -> y {:?}, kernel {}", x.dims(), y.dims(), ffn.kernel());

    // Weights of a VarMap stay trainable. `freeze` packs a copy of them for inference.
    let frozen = ffn.freeze()?;
    let difference = (frozen.forward(&x)? - y)?.abs()?.max_all()?.to_scalar::<f32>()?;
    println!("frozen: kernel {}, largest difference {difference:.1e}", frozen.kernel());
    Ok(())
}
