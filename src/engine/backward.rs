//! The gradient of x through layers whose weights are constants.

use candle_core::{Result, Tensor};

use super::{Block, BlockSpec, Projection};
use crate::which::Which;

/// dx = dy·W
pub(super) fn projection(layer: &dyn Projection, dy: &Tensor) -> Result<Tensor> {
    dy.matmul(&layer.weight()?)
}

/// dx, with gate and up computed again: dh = d·dy·Wd, (dgate, dup) = the gate's gradients,
/// dx = dgate·Wg + dup·Wu. A packed weight is unpacked for each product and dropped after it.
pub(super) fn block(
    block: &dyn Block,
    spec: &BlockSpec,
    x: &Tensor,
    dy: &Tensor,
) -> Result<Tensor> {
    let dh = (dy * f64::from(spec.down_multiplier))?.matmul(&block.weight(Which::Down)?)?;
    let (gate, up) = (project(block, Which::Gate, x)?, project(block, Which::Up, x)?);
    let (dgate, dup) = spec.glu.gradients(&gate, &up, &dh)?;
    dgate.matmul(&block.weight(Which::Gate)?)? + dup.matmul(&block.weight(Which::Up)?)?
}

/// x·Wᵀ + b
fn project(block: &dyn Block, which: Which, x: &Tensor) -> Result<Tensor> {
    let y = x.matmul(&block.weight(which)?.t()?)?;
    match block.bias(which)? {
        Some(bias) => y.broadcast_add(&bias),
        None => Ok(y),
    }
}
