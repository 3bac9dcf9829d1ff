//! Layers of candle's matmuls, differentiable in the weights too: for devices and dtypes without
//! kernels, and for variables on a GPU.

use std::sync::Arc;

use candle_core::{D, DType, Device, Tensor};

use super::{BlockSpec, Projection};
use crate::cpu;
use crate::error::{Error, Result};
use crate::forced;
use crate::gate::activation::Glu;
use crate::load::{FusedOrder, GateUp, Weights, split};
use crate::which::Which;

/// A block while its weights are collected.
pub(super) struct BlockBuilder {
    spec: BlockSpec,
    dtype: DType,
    device: Device,
    gate: Option<Linear>,
    up: Option<Linear>,
    gate_up: Option<(Linear, FusedOrder)>,
    down: Option<Linear>,
}

impl BlockBuilder {
    pub(super) fn new(spec: &BlockSpec, dtype: DType, device: &Device) -> Self {
        Self {
            spec: *spec,
            dtype,
            device: device.clone(),
            gate: None,
            up: None,
            gate_up: None,
            down: None,
        }
    }
}

impl super::Builder for BlockBuilder {
    fn set(&mut self, which: Which, weight: &Tensor, bias: Option<&Tensor>) -> Result<()> {
        let layer = Some(Linear::new(weight.clone(), bias.cloned())?);
        match which {
            Which::Gate => self.gate = layer,
            Which::Up => self.up = layer,
            Which::Down => self.down = layer,
        }
        Ok(())
    }

    fn set_gate_up(
        &mut self,
        weight: &Tensor,
        bias: Option<&Tensor>,
        order: FusedOrder,
    ) -> Result<()> {
        self.gate_up = Some((Linear::new(weight.clone(), bias.cloned())?, order));
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<Arc<dyn super::Block>> {
        let kernel = match self.device {
            Device::Cpu if !forced::is_plain() => {
                format!("plain-{}", cpu::selected()?.name_of(DType::F32))
            }
            _ => forced::PLAIN.to_string(),
        };
        let missing = |which: Which| move || Error::missing(which.name());
        let gate_up = match self.gate_up {
            Some((layer, order)) => Projections::Fused { layer, order },
            None => Projections::Separate {
                gate: self.gate.ok_or_else(missing(Which::Gate))?,
                up: self.up.ok_or_else(missing(Which::Up))?,
            },
        };
        let Self { spec, dtype, device, down, .. } = *self;
        let down = down.ok_or_else(missing(Which::Down))?;
        let BlockSpec { glu, down_multiplier, .. } = spec;
        Ok(Arc::new(Block { gate_up, down, glu, down_multiplier, dtype, device, kernel }))
    }
}

/// Three matmuls, or two, around the fused gate.
#[derive(Debug)]
struct Block {
    gate_up: Projections,
    down: Linear,
    glu: Glu,
    down_multiplier: f32,
    dtype: DType,
    device: Device,
    kernel: String,
}

/// gate and up.
#[derive(Debug)]
enum Projections {
    /// Two tensors, two products.
    Separate { gate: Linear, up: Linear },
    /// Rows of one tensor, one product.
    Fused { layer: Linear, order: FusedOrder },
}

impl super::Block for Block {
    fn dtype(&self) -> DType {
        self.dtype
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn kernel(&self) -> &str {
        &self.kernel
    }

    fn is_packed(&self) -> bool {
        false
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (gate, up) = self.gate_up.forward(x)?; // (M,I) each
        let h = self.glu.mul(&gate, &up)?;
        drop((gate, up));
        let y = self.down.forward(&h)?;
        if self.down_multiplier == 1.0 { Ok(y) } else { y * f64::from(self.down_multiplier) }
    }

    fn weight(&self, which: Which) -> candle_core::Result<Tensor> {
        match (&self.gate_up, which) {
            (_, Which::Down) => self.down.weight(),
            (Projections::Separate { gate, .. }, Which::Gate) => gate.weight(),
            (Projections::Separate { up, .. }, Which::Up) => up.weight(),
            (Projections::Fused { layer, order }, _) => half(&layer.weight()?, *order, which),
        }
    }

    fn bias(&self, which: Which) -> candle_core::Result<Option<Tensor>> {
        match (&self.gate_up, which) {
            (_, Which::Down) => self.down.bias(),
            (Projections::Separate { gate, .. }, Which::Gate) => gate.bias(),
            (Projections::Separate { up, .. }, Which::Up) => up.bias(),
            (Projections::Fused { layer, order }, _) => {
                layer.bias()?.map(|bias| half(&bias, *order, which)).transpose()
            }
        }
    }

    /// The tensors that the block was built from, with gate and up in one tensor if they were.
    fn weights(&self) -> candle_core::Result<Weights> {
        let gate_up = match &self.gate_up {
            Projections::Separate { gate, up } => {
                GateUp::separate(gate.weight()?, up.weight()?, gate.bias()?, up.bias()?)
            }
            Projections::Fused { layer, order } => {
                GateUp::fused(layer.weight()?, layer.bias()?, *order)
            }
        };
        Ok(Weights::new(gate_up, self.down.weight()?, self.down.bias()?))
    }
}

/// The rows of gate or of up.
fn half(fused: &Tensor, order: FusedOrder, which: Which) -> candle_core::Result<Tensor> {
    let (gate, up) = split(fused, order)?;
    Ok(if which == Which::Up { up } else { gate })
}

impl Projections {
    /// x (M,H) -> gate (M,I), up (M,I). Of one product they are views.
    fn forward(&self, x: &Tensor) -> candle_core::Result<(Tensor, Tensor)> {
        let (both, order) = match self {
            Self::Separate { gate, up } => return Ok((gate.forward(x)?, up.forward(x)?)),
            Self::Fused { layer, order } => (layer.forward(x)?, order), // (M,2I)
        };
        let i = both.dim(D::Minus1)? / 2;
        let half = |start| both.narrow(D::Minus1, start, i);
        match order {
            FusedOrder::GateFirst => Ok((half(0)?, half(i)?)),
            FusedOrder::UpFirst => Ok((half(i)?, half(0)?)),
            FusedOrder::Interleaved => {
                let pairs = both.reshape(((), i, 2))?;
                Ok((pairs.narrow(2, 0, 1)?.squeeze(2)?, pairs.narrow(2, 1, 1)?.squeeze(2)?))
            }
        }
    }
}

/// One matmul and an optional bias.
#[derive(Debug)]
pub(super) struct Linear {
    /// (out, in), with strides that candle's matmul takes without a copy unless a gradient is
    /// tracked through it.
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// Copies the weight once if its strides are neither those of a matrix nor of its transpose,
    /// and no gradient is tracked through it: a copy would not follow the optimizer's steps.
    pub(super) fn new(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        let keep = is_matrix(&weight) || super::is_tracked(&weight);
        Ok(Self { weight: if keep { weight } else { weight.contiguous()? }, bias })
    }
}

impl Projection for Linear {
    fn dtype(&self) -> DType {
        self.weight.dtype()
    }

    fn device(&self) -> &Device {
        self.weight.device()
    }

    fn kernel(&self) -> &str {
        "plain"
    }

    fn is_packed(&self) -> bool {
        false
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let y = product(x, &self.weight)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }

    /// On the CPU candle multiplies halves in f32 too, so that this has the same products.
    fn forward_f32(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let wide = |tensor: &Tensor| tensor.to_dtype(DType::F32);
        let y = match x.device() {
            Device::Cpu => product(&wide(x)?, &wide(&self.weight)?)?,
            _ => wide(&product(x, &self.weight)?)?,
        };
        match &self.bias {
            Some(bias) => y.broadcast_add(&wide(bias)?),
            None => Ok(y),
        }
    }

    fn weight(&self) -> candle_core::Result<Tensor> {
        Ok(self.weight.clone())
    }

    fn bias(&self) -> candle_core::Result<Option<Tensor>> {
        Ok(self.bias.clone())
    }

    fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        Ok(self.weight.index_select(ids, 0)?)
    }
}

/// x (M,in) · W (out,in)ᵀ -> (M,out)
///
/// On 64-bit ARM's CPU f16 is multiplied in f32: candle's own product sums in f16 there, which is
/// less accurate and makes the result depend on the layout.
fn product(x: &Tensor, weight: &Tensor) -> candle_core::Result<Tensor> {
    if cfg!(target_arch = "aarch64") && x.dtype() == DType::F16 && x.device().is_cpu() {
        let weight = weight.to_dtype(DType::F32)?;
        return x.to_dtype(DType::F32)?.matmul(&weight.t()?)?.to_dtype(DType::F16);
    }
    if is_matrix(weight) { x.matmul(&weight.t()?) } else { x.matmul(&weight.contiguous()?.t()?) }
}

/// Row-major, possibly with a gap between the rows, or the transpose of that: what a GEMM takes.
fn is_matrix(weight: &Tensor) -> bool {
    matches!((weight.stride(), weight.dims()), (&[rows, columns], &[m, n])
        if (columns == 1 && rows >= n) || (rows == 1 && columns >= m))
}
