//! The block with pairs, of this crate and of candle's operations.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::Module;
use candle_swiglu::{FfnLora, Lora, SwiGluFfn};

/// Of LLaMA 1B.
pub(crate) const H: usize = 2048;
pub(crate) const I: usize = 8192;

/// Normal numbers with a variance of 1/columns.
pub(crate) fn normal(rows: usize, columns: usize, dtype: DType) -> candle_core::Result<Tensor> {
    let scale = 1.0 / (columns as f64).sqrt();
    (Tensor::randn(0f32, 1.0, (rows, columns), &Device::Cpu)? * scale)?.to_dtype(dtype)
}

/// Pairs on every projection; `f` makes their tensors.
pub(crate) fn pairs(
    rank: usize,
    dtype: DType,
    f: impl Fn(Tensor) -> Result<Tensor>,
) -> Result<FfnLora> {
    let pair = |rows, k| -> Result<_> {
        let (a, b) = (normal(rank, k, dtype)?, normal(rows, rank, dtype)?);
        Ok(Some(Lora::new(f(a)?, f(b)?, 2.0, 0.0)?))
    };
    Ok(FfnLora { gate_proj: pair(I, H)?, up_proj: pair(I, H)?, down_proj: pair(H, I)? })
}

pub(crate) fn adapted(mut ffn: SwiGluFfn, pairs: FfnLora) -> candle_swiglu::Result<SwiGluFfn> {
    ffn.add_adapter("lora", pairs)?;
    ffn.set_adapter("lora")?;
    Ok(ffn)
}

/// A LLaMA's MLP in candle's operations, with pairs in f32 as PEFT computes them.
#[derive(Debug)]
pub(crate) struct CandleMlp {
    weights: [Tensor; 3],
    pairs: FfnLora,
}

impl CandleMlp {
    pub(crate) fn new(weights: [Tensor; 3], pairs: FfnLora) -> Self {
        Self { weights, pairs }
    }
}

/// x·Wᵀ + s·(x·Aᵀ)·Bᵀ
fn project(x: &Tensor, weight: &Tensor, pair: Option<&Lora>) -> candle_core::Result<Tensor> {
    let y = candle_nn::Linear::new(weight.clone(), None).forward(x)?;
    let Some(pair) = pair else { return Ok(y) };
    let through =
        |weight: &Tensor, x: &Tensor| candle_nn::Linear::new(weight.clone(), None).forward(x);
    let u = through(pair.a(), &x.to_dtype(pair.a().dtype())?)?;
    let change = (through(pair.b(), &u)? * pair.scale())?;
    (y.to_dtype(change.dtype())? + change)?.to_dtype(y.dtype())
}

impl Module for CandleMlp {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let [gate, up, down] = &self.weights;
        let gate = project(x, gate, self.pairs.gate_proj.as_ref())?;
        let h = (gate.silu()? * project(x, up, self.pairs.up_proj.as_ref())?)?;
        project(&h, down, self.pairs.down_proj.as_ref())
    }
}
