//! The MLP of one layer of a checkpoint: `cargo run --release --example 02_checkpoint`
//!
//! The checkpoint is that of `weights/`. Any directory with a config.json and safetensors in
//! Hugging Face's layout will do.

use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::Module;
use candle_swiglu::{Checkpoint, FfnConfig, swiglu_ffn};

fn main() -> Result<()> {
    let weights = Path::new(env!("CARGO_MANIFEST_DIR")).join("weights");
    let dir = std::env::args().nth(1).map_or(weights, PathBuf::from);

    let checkpoint = Checkpoint::open(&dir)?;
    let cfg = FfnConfig::from_json(checkpoint.config())?; // sizes, hidden_act, mlp_bias
    let vb = checkpoint.var_builder(DType::BF16, &Device::Cpu); // bf16 weights on the CPU
    let ffn = swiglu_ffn(&cfg, vb.pp("model.layers.0.mlp"))?;

    let x = Tensor::ones((1, cfg.hidden_size), DType::BF16, &Device::Cpu)?;
    let y = ffn.forward(&x)?.to_dtype(DType::F32)?;
    println!(
        "hidden size {}, intermediate size {}, kernel {}",
        cfg.hidden_size,
        cfg.intermediate_size,
        ffn.kernel()
    );
    println!("mean square of y: {:.4}", y.sqr()?.mean_all()?.to_scalar::<f32>()?);
    Ok(())
}
