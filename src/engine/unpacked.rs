//! Layers that use their tensors as they are, and the choice between their implementations.

use std::sync::Arc;

use candle_core::Tensor;

use super::{BlockSpec, Projection, composed, has_kernels, is_tracked, plain, trained};
use crate::backend::has_glu;
use crate::error::{Error, Result};
use crate::load::{FusedOrder, GateUp, Weights};
use crate::which::Which;

/// A block while its tensors are collected.
pub(super) struct BlockBuilder {
    spec: BlockSpec,
    gate_up: [Option<Pair>; 2],
    fused: Option<(Pair, FusedOrder)>,
    down: Option<Pair>,
    /// No gradient is tracked through any of them.
    constant: bool,
}

/// A weight and its bias.
type Pair = (Tensor, Option<Tensor>);

impl BlockBuilder {
    pub(super) fn new(spec: &BlockSpec) -> Self {
        Self { spec: *spec, gate_up: [None, None], fused: None, down: None, constant: true }
    }

    fn pair(&mut self, weight: &Tensor, bias: Option<&Tensor>) -> Pair {
        self.constant &= !is_tracked(weight) && !bias.is_some_and(is_tracked);
        (weight.clone(), bias.cloned())
    }
}

impl super::Builder for BlockBuilder {
    fn set(&mut self, which: Which, weight: &Tensor, bias: Option<&Tensor>) -> Result<()> {
        let pair = Some(self.pair(weight, bias));
        match which {
            Which::Gate | Which::Up => self.gate_up[which as usize] = pair,
            Which::Down => self.down = pair,
        }
        Ok(())
    }

    fn set_gate_up(
        &mut self,
        weight: &Tensor,
        bias: Option<&Tensor>,
        order: FusedOrder,
    ) -> Result<()> {
        self.fused = Some((self.pair(weight, bias), order));
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<Arc<dyn super::Block>> {
        let missing = |which: Which| move || Error::missing(which.name());
        let gate_up = match (self.fused, self.gate_up) {
            (Some(((weight, bias), order)), _) => GateUp::fused(weight, bias, order),
            (None, [gate, up]) => {
                let (gate, gate_bias) = gate.ok_or_else(missing(Which::Gate))?;
                let (up, up_bias) = up.ok_or_else(missing(Which::Up))?;
                GateUp::separate(gate, up, gate_bias, up_bias)
            }
        };
        let (down, down_bias) = self.down.ok_or_else(missing(Which::Down))?;
        block(&self.spec, Weights::new(gate_up, down, down_bias), self.constant)
    }
}

fn block(spec: &BlockSpec, weights: Weights, constant: bool) -> Result<Arc<dyn super::Block>> {
    let kind = Kind::of(&weights.down_proj, constant);
    Ok(match kind {
        Kind::Trained => Arc::new(trained::Block::new(spec, weights)?),
        Kind::Composed => Arc::new(composed::Block::new(plain::Block::new(spec, weights)?)),
        Kind::Plain => Arc::new(plain::Block::new(spec, weights)?),
    })
}

/// A linear layer of a weight (out, in) and a bias (out).
pub(super) fn projection(
    weight: Tensor,
    bias: Option<Tensor>,
    constant: bool,
) -> Result<Arc<dyn Projection>> {
    let kind = Kind::of(&weight, constant);
    Ok(match kind {
        Kind::Trained => Arc::new(trained::Linear::new(weight, bias)?),
        Kind::Composed => Arc::new(composed::Linear::new(plain::Linear::new(weight, bias)?)),
        Kind::Plain => Arc::new(plain::Linear::new(weight, bias)?),
    })
}

enum Kind {
    Trained,
    Composed,
    Plain,
}

impl Kind {
    /// For tensors of the dtype and on the device of `weight`.
    fn of(weight: &Tensor, constant: bool) -> Self {
        let (device, dtype) = (weight.device(), weight.dtype());
        if constant || !has_glu(device, dtype) {
            Self::Plain
        } else if device.is_cpu() && has_kernels(device, dtype) {
            Self::Trained
        } else {
            Self::Composed
        }
    }
}
