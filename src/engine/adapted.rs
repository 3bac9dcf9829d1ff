//! Layers with low-rank pairs (LoRA) where no kernel adds them: candle's matmuls over the weights
//! of a layer, differentiable in x, in the pairs and in variables among the weights.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::plain::product;
use super::{BlockSpec, Projection, wider};
use crate::error::Result;
use crate::lora::Lora;
use crate::which::Which;

/// The pairs of gate, up and down.
pub(crate) type Pairs = [Option<Lora>; 3];

/// The block with low-rank pairs added to its projections; the weights are shared. A pair whose
/// dropout is not 0 drops elements of its input in every call.
pub(crate) fn block(
    base: &Arc<dyn super::Block>,
    spec: &BlockSpec,
    pairs: Pairs,
) -> Result<Arc<dyn super::Block>> {
    let block = if has_one_mask(&pairs) { base.with_lora(&pairs)? } else { None };
    Ok(block.unwrap_or_else(|| composed_block(base, spec, pairs)))
}

/// The kernels drop the same elements of x for gate and up.
fn has_one_mask([gate, up, _]: &Pairs) -> bool {
    match (gate, up) {
        (Some(gate), Some(up)) => gate.dropout() == up.dropout(),
        _ => true,
    }
}

/// [`block`] in candle's matmuls.
pub(super) fn composed_block(
    base: &Arc<dyn super::Block>,
    spec: &BlockSpec,
    pairs: Pairs,
) -> Arc<dyn super::Block> {
    Arc::new(Block { base: base.clone(), spec: *spec, pairs })
}

/// The linear layer with a low-rank pair, as [`block`].
pub(crate) fn projection(base: &Arc<dyn Projection>, pair: Lora) -> Result<Arc<dyn Projection>> {
    if let Some(layer) = base.with_lora(&pair)? {
        return Ok(layer);
    }
    Ok(Arc::new(Linear { base: base.clone(), pair }))
}

/// s·(drop(x)·Aᵀ)·Bᵀ in the wider dtype of x and the pair.
fn low_rank(x: &Tensor, pair: &Lora) -> candle_core::Result<Tensor> {
    let dtype = wider(x.dtype(), pair.a().dtype());
    let x = x.to_dtype(dtype)?;
    let x = drop_elements(&x, pair.dropout())?;
    let u = product(&x, &pair.a().to_dtype(dtype)?)?;
    product(&u, &pair.b().to_dtype(dtype)?)? * pair.scale()
}

/// x with each element 0 with this probability p, and the others times 1/(1-p).
pub(super) fn drop_elements(x: &Tensor, probability: f32) -> candle_core::Result<Tensor> {
    match probability {
        0.0 => Ok(x.clone()),
        1.0 => x.zeros_like(), // candle refuses 1
        probability => candle_nn::ops::dropout(x, probability),
    }
}

/// y + s·(drop(x)·Aᵀ)·Bᵀ, added in the wider dtype and rounded to that of y.
fn add_low_rank(y: &Tensor, x: &Tensor, pair: Option<&Lora>) -> candle_core::Result<Tensor> {
    let Some(pair) = pair else { return Ok(y.clone()) };
    let change = low_rank(x, pair)?;
    (y.to_dtype(change.dtype())? + change)?.to_dtype(y.dtype())
}

/// x·Wᵀ + b + s·(drop(x)·Aᵀ)·Bᵀ
fn project(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    pair: Option<&Lora>,
) -> candle_core::Result<Tensor> {
    let y = product(x, weight)?;
    let y = match bias {
        Some(bias) => y.broadcast_add(bias)?,
        None => y,
    };
    add_low_rank(&y, x, pair)
}

/// A block with pairs.
#[derive(Debug)]
struct Block {
    base: Arc<dyn super::Block>,
    spec: BlockSpec,
    pairs: Pairs,
}

impl Block {
    fn project(&self, which: Which, x: &Tensor) -> candle_core::Result<Tensor> {
        let (weight, bias) = (self.base.weight(which)?, self.base.bias(which)?);
        project(x, &weight, bias.as_ref(), self.pairs[which as usize].as_ref())
    }
}

impl super::Block for Block {
    fn dtype(&self) -> DType {
        self.base.dtype()
    }

    fn device(&self) -> &Device {
        self.base.device()
    }

    fn kernel(&self) -> &str {
        "plain"
    }

    fn is_packed(&self) -> bool {
        self.base.is_packed()
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (gate, up) = (self.project(Which::Gate, x)?, self.project(Which::Up, x)?);
        let h = self.spec.glu.mul(&gate, &up)?;
        let y = self.project(Which::Down, &h)?;
        match self.spec.down_multiplier {
            1.0 => Ok(y),
            factor => y * f64::from(factor),
        }
    }

    fn weight(&self, which: Which) -> candle_core::Result<Tensor> {
        self.base.weight(which)
    }

    fn bias(&self, which: Which) -> candle_core::Result<Option<Tensor>> {
        self.base.bias(which)
    }
}

/// A linear layer with a pair.
#[derive(Debug)]
struct Linear {
    base: Arc<dyn Projection>,
    pair: Lora,
}

impl Projection for Linear {
    fn dtype(&self) -> DType {
        self.base.dtype()
    }

    fn device(&self) -> &Device {
        self.base.device()
    }

    fn kernel(&self) -> &str {
        self.base.kernel()
    }

    fn is_packed(&self) -> bool {
        self.base.is_packed()
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        add_low_rank(&self.base.forward(x)?, x, Some(&self.pair))
    }

    fn forward_f32(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        add_low_rank(&self.base.forward_f32(x)?, x, Some(&self.pair))
    }

    fn weight(&self) -> candle_core::Result<Tensor> {
        self.base.weight()
    }

    fn bias(&self) -> candle_core::Result<Option<Tensor>> {
        self.base.bias()
    }

    fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        self.base.embed(ids)
    }
}
