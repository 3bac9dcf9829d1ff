//! Layers of candle's matmuls, differentiable in the weights too: for devices and dtypes without
//! kernels. `composed` uses them for variables on GPUs and in f64.

use candle_core::{D, DType, Device, Tensor};

use super::{BlockSpec, Projection};
use crate::cpu;
use crate::error::Result;
use crate::forced;
use crate::gate::activation::Glu;
use crate::load::{FusedOrder, GateUp, Weights, split};
use crate::which::Which;

/// Three matmuls, or two, around the fused gate.
#[derive(Clone, Debug)]
pub(super) struct Block {
    pub(super) gate_up: Projections,
    pub(super) down: Linear,
    pub(super) glu: Glu,
    down_multiplier: f32,
    device: Device,
    kernel: String,
}

impl Block {
    pub(super) fn new(spec: &BlockSpec, weights: Weights) -> Result<Self> {
        let BlockSpec { glu, down_multiplier, .. } = *spec;
        let device = weights.down_proj.device().clone();
        let kernel = match device {
            Device::Cpu if !forced::is_plain() => {
                format!("plain-{}", cpu::selected()?.name_of(DType::F32))
            }
            _ => forced::PLAIN.to_string(),
        };
        let gate_up = Projections::new(weights.gate_up)?;
        let down = Linear::new(weights.down_proj, weights.down_bias)?;
        Ok(Self { gate_up, down, glu, down_multiplier, device, kernel })
    }

    /// The same block of constants, which share the memory of the variables.
    pub(super) fn detached(&self) -> Self {
        let (gate_up, down) = (self.gate_up.detached(), self.down.detached());
        Self { gate_up, down, ..self.clone() }
    }

    /// h (M,I) -> y (M,H)
    pub(super) fn project_down(&self, h: &Tensor) -> candle_core::Result<Tensor> {
        self.scale(self.down.forward(h)?)
    }

    /// The factor of the down projection times `y`.
    pub(super) fn scale(&self, y: Tensor) -> candle_core::Result<Tensor> {
        if self.down_multiplier == 1.0 { Ok(y) } else { y * f64::from(self.down_multiplier) }
    }
}

/// gate and up.
#[derive(Clone, Debug)]
pub(super) enum Projections {
    /// Two tensors, two products.
    Separate { gate: Linear, up: Linear },
    /// Rows of one tensor, one product.
    Fused { layer: Linear, order: FusedOrder },
}

impl super::Block for Block {
    fn dtype(&self) -> DType {
        self.down.dtype()
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
        self.project_down(&h)
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
    fn new(gate_up: GateUp) -> Result<Self> {
        Ok(match gate_up {
            GateUp::Separate { gate_proj, up_proj, gate_bias, up_bias } => Self::Separate {
                gate: Linear::new(gate_proj, gate_bias)?,
                up: Linear::new(up_proj, up_bias)?,
            },
            GateUp::Fused { gate_up_proj, bias, order } => {
                Self::Fused { layer: Linear::new(gate_up_proj, bias)?, order }
            }
        })
    }

    fn detached(&self) -> Self {
        match self {
            Self::Separate { gate, up } => {
                Self::Separate { gate: gate.detached(), up: up.detached() }
            }
            Self::Fused { layer, order } => Self::Fused { layer: layer.detached(), order: *order },
        }
    }

    /// gate and up, or the one layer that computes both.
    pub(super) fn layers(&self) -> Vec<&Linear> {
        match self {
            Self::Separate { gate, up } => vec![gate, up],
            Self::Fused { layer, .. } => vec![layer],
        }
    }

    /// dgate (M,I), dup (M,I) -> the gradient of the result of each of [`Projections::layers`]
    pub(super) fn join(&self, gate: Tensor, up: Tensor) -> candle_core::Result<Vec<Tensor>> {
        let order = match self {
            Self::Separate { .. } => return Ok(vec![gate, up]),
            Self::Fused { order, .. } => order,
        };
        let both = match order {
            FusedOrder::GateFirst => Tensor::cat(&[gate, up], 1)?,
            FusedOrder::UpFirst => Tensor::cat(&[up, gate], 1)?,
            FusedOrder::Interleaved => Tensor::stack(&[gate, up], 2)?.flatten(1, 2)?,
        };
        Ok(vec![both])
    }

    /// x (M,H) -> gate (M,I), up (M,I). Of one product they are views.
    pub(super) fn forward(&self, x: &Tensor) -> candle_core::Result<(Tensor, Tensor)> {
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
#[derive(Clone, Debug)]
pub(super) struct Linear {
    /// (out, in), with strides that candle's matmul takes without a copy unless a gradient is
    /// tracked through it.
    pub(super) weight: Tensor,
    pub(super) bias: Option<Tensor>,
}

impl Linear {
    /// Copies the weight once if its strides are neither those of a matrix nor of its transpose,
    /// and no gradient is tracked through it: a copy would not follow the optimizer's steps.
    pub(super) fn new(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        let keep = is_matrix(&weight) || super::is_tracked(&weight);
        Ok(Self { weight: if keep { weight } else { weight.contiguous()? }, bias })
    }

    /// The same layer of constants, which share the memory of the variables.
    pub(super) fn detached(&self) -> Self {
        Self { weight: self.weight.detach(), bias: self.bias.as_ref().map(Tensor::detach) }
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
pub(super) fn product(x: &Tensor, weight: &Tensor) -> candle_core::Result<Tensor> {
    if cfg!(target_arch = "aarch64") && x.dtype() == DType::F16 && x.device().is_cpu() {
        let weight = weight.to_dtype(DType::F32)?;
        return x.to_dtype(DType::F32)?.matmul(&weight.t()?)?.to_dtype(DType::F16);
    }
    matrix(x)?.matmul(&matrix(weight)?.t()?)
}

/// The same matrix with strides that candle's matmul takes.
pub(super) fn matrix(x: &Tensor) -> candle_core::Result<Tensor> {
    if is_matrix(x) { Ok(x.clone()) } else { x.contiguous() }
}

/// Row-major, or the transpose of that: what a GEMM takes. candle's GEMM on the CPU also takes a
/// gap between the rows.
fn is_matrix(x: &Tensor) -> bool {
    let gaps = x.device().is_cpu();
    let fits = |stride, len| stride == len || (gaps && stride > len);
    matches!((x.stride(), x.dims()), (&[rows, columns], &[m, n])
        if (columns == 1 && fits(rows, n)) || (rows == 1 && fits(columns, m)))
}
