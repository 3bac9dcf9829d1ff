//! Layers on the CPU whose weights are variables: forward and backward are one operation each, on
//! the kernels of this crate, with the tensors as they are (`cpu/train`).

use std::sync::Arc;

use candle_core::{DType, Device, Layout, Shape, Storage, Tensor, bail};
use half::{bf16, f16};

use super::function::{Value, function, gradient};
use super::{BlockSpec, Projection, check_addressable, is_tracked, plain};
use crate::cpu::{
    self, BlockOperands, BlockWanted, LinearWanted, Operand, Saved, Trained, WeightOperand,
};
use crate::error::Result;
use crate::load::{FusedOrder, GateUp, Weights, split};
use crate::which::Which;

const BLOCK: &str = "swiglu block";
const BLOCK_GRADIENT: &str = "swiglu block gradient";
const LINEAR: &str = "linear";
const LINEAR_GRADIENT: &str = "linear gradient";

/// A block of variables.
#[derive(Clone, Debug)]
pub(super) struct Block(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    weights: Weights,
    spec: BlockSpec,
    dtype: DType,
    kernel: String,
    /// The backward pass computes gate and up again. Otherwise the forward pass keeps them.
    recompute: bool,
}

impl Block {
    /// A block of tensors in one of the dtypes of the CPU kernels.
    pub(super) fn new(spec: &BlockSpec, weights: Weights) -> Result<Self> {
        let dtype = weights.down_proj.dtype();
        let kernel = format!("trained-{}", cpu::selected()?.name_of(dtype));
        Ok(Self(Arc::new(Inner { weights, spec: *spec, dtype, kernel, recompute: false })))
    }
}

impl super::Block for Block {
    fn dtype(&self) -> DType {
        self.0.dtype
    }

    fn device(&self) -> &Device {
        &Device::Cpu
    }

    fn kernel(&self) -> &str {
        &self.0.kernel
    }

    fn is_packed(&self) -> bool {
        false
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        match self.0.dtype {
            DType::F32 => self.0.run::<f32>(x),
            DType::BF16 => self.0.run::<bf16>(x),
            _ => self.0.run::<f16>(x),
        }
    }

    fn weight(&self, which: Which) -> candle_core::Result<Tensor> {
        Ok(self.0.matrices()?[which as usize].clone())
    }

    fn bias(&self, which: Which) -> candle_core::Result<Option<Tensor>> {
        Ok(self.0.biases()?[which as usize].clone())
    }

    fn weights(&self) -> candle_core::Result<Weights> {
        Ok(self.0.weights.clone())
    }

    fn with_recompute(&self, recompute: bool) -> Option<Arc<dyn super::Block>> {
        let Inner { weights, spec, dtype, kernel, .. } = &*self.0;
        let (weights, kernel) = (weights.clone(), kernel.clone());
        let inner = Inner { weights, spec: *spec, dtype: *dtype, kernel, recompute };
        Some(Arc::new(Self(Arc::new(inner))))
    }
}

impl Inner {
    /// Views of gate (I,H), up (I,H) and down (H,I).
    fn matrices(&self) -> candle_core::Result<[Tensor; 3]> {
        let (gate, up) = match &self.weights.gate_up {
            GateUp::Separate { gate_proj, up_proj, .. } => (gate_proj.clone(), up_proj.clone()),
            GateUp::Fused { gate_up_proj, order, .. } => split(gate_up_proj, *order)?,
        };
        Ok([gate, up, self.weights.down_proj.clone()])
    }

    /// Views of the biases (I), (I) and (H).
    fn biases(&self) -> candle_core::Result<[Option<Tensor>; 3]> {
        let (gate, up) = match &self.weights.gate_up {
            GateUp::Separate { gate_bias, up_bias, .. } => (gate_bias.clone(), up_bias.clone()),
            GateUp::Fused { bias, order, .. } => {
                bias.as_ref().map(|bias| split(bias, *order)).transpose()?.unzip()
            }
        };
        Ok([gate, up, self.weights.down_bias.clone()])
    }

    /// The variables, in the order in which [`Inner::gradients`] returns their gradients.
    fn variables(&self) -> Vec<&Tensor> {
        let (down, down_bias) = (&self.weights.down_proj, self.weights.down_bias.as_ref());
        let all: Vec<&Tensor> = match &self.weights.gate_up {
            GateUp::Separate { gate_proj, up_proj, gate_bias, up_bias } => {
                let biases = [gate_bias.as_ref(), up_bias.as_ref(), down_bias];
                [gate_proj, up_proj, down].into_iter().chain(biases.into_iter().flatten()).collect()
            }
            GateUp::Fused { gate_up_proj, bias, .. } => {
                let biases = [bias.as_ref(), down_bias];
                [gate_up_proj, down].into_iter().chain(biases.into_iter().flatten()).collect()
            }
        };
        all.into_iter().filter(|tensor| is_tracked(tensor)).collect()
    }

    /// The gradients that the graph asks for.
    fn wanted(&self, x: &Tensor) -> BlockWanted {
        let tracked = |bias: &Option<Tensor>| bias.as_ref().is_some_and(is_tracked);
        let (gate_up, [gate_bias, up_bias], fused) = match &self.weights.gate_up {
            GateUp::Separate { gate_proj, up_proj, gate_bias, up_bias } => (
                [is_tracked(gate_proj), is_tracked(up_proj)],
                [tracked(gate_bias), tracked(up_bias)],
                None,
            ),
            GateUp::Fused { gate_up_proj, bias, order } => {
                ([is_tracked(gate_up_proj); 2], [tracked(bias); 2], Some(*order))
            }
        };
        BlockWanted {
            x: is_tracked(x),
            weights: [gate_up[0], gate_up[1], is_tracked(&self.weights.down_proj)],
            biases: [gate_bias, up_bias, tracked(&self.weights.down_bias)],
            fused,
            low_rank: [false; 2],
        }
    }

    /// Calls `f` with the block's operands.
    fn with_operands<R>(
        &self,
        f: impl FnOnce(BlockOperands) -> Result<R>,
    ) -> candle_core::Result<R> {
        let [gate, up, down] = self.matrices()?;
        let mut biases = [None, None, None];
        for (values, bias) in biases.iter_mut().zip(self.biases()?) {
            *values = bias.map(|bias| bias.to_dtype(DType::F32)?.to_vec1::<f32>()).transpose()?;
        }
        let storages = [&gate, &up, &down].map(Tensor::storage_and_layout);
        let [gate, up, down] = storages.each_ref().map(|(storage, layout)| (&**storage, *layout));
        Ok(f(BlockOperands {
            glu: self.spec.glu,
            down_multiplier: self.spec.down_multiplier,
            weights: [on_cpu(gate)?, on_cpu(up)?, on_cpu(down)?].map(WeightOperand::Tensor),
            biases: biases.each_ref().map(Option::as_deref),
            low_rank: [None; 2],
        })?)
    }

    fn run<T: Trained>(self: &Arc<Self>, x: &Tensor) -> candle_core::Result<Tensor> {
        let BlockSpec { hidden_size, intermediate_size, .. } = self.spec;
        check_rows(x, [hidden_size, intermediate_size])?;
        let wanted = self.wanted(x);
        let mut inputs: Vec<Tensor> = wanted.x.then(|| x.clone()).into_iter().collect();
        inputs.extend(self.variables().into_iter().cloned());
        let save = !self.recompute && !inputs.is_empty();
        let (storage, layout) = x.storage_and_layout();
        let operand = on_cpu((&storage, layout))?;
        let (y, saved) =
            self.with_operands(|block| T::block_forward(cpu::selected()?, block, operand, save))?;
        drop(storage);
        let value = value(y, x.shape().clone());
        let (this, x) = (self.clone(), x.clone());
        let under = inputs.first().cloned();
        let backward = move |dy: &Tensor| {
            let gradients = this.gradients::<T>([&x, dy], &saved, &wanted)?;
            gradients_of(BLOCK_GRADIENT, gradients, under.as_ref())
        };
        function(BLOCK, value, &inputs, backward)
    }

    fn gradients<T: Trained>(
        &self,
        [x, dy]: [&Tensor; 2],
        saved: &Saved<T>,
        wanted: &BlockWanted,
    ) -> candle_core::Result<Vec<Value>> {
        let storages = [x, dy].map(Tensor::storage_and_layout);
        let [x_operand, dy_operand] =
            storages.each_ref().map(|(storage, layout)| (&**storage, *layout));
        let operands = [on_cpu(x_operand)?, on_cpu(dy_operand)?];
        let gradients = self.with_operands(|block| {
            T::block_backward(cpu::selected()?, block, operands, saved, wanted)
        })?;
        let mut all = vec![];
        all.extend(gradients.x.map(|dx| value(dx, x.shape().clone())));
        all.extend(gradients.weights.into_iter().flatten().map(|dw| value(dw.data, dw.shape)));
        let biases = fuse(gradients.biases, wanted.fused);
        all.extend(biases.into_iter().flatten().map(bias_value::<T>));
        Ok(all)
    }
}

/// Gradients as tensors.
fn gradients_of(
    name: &'static str,
    gradients: Vec<Value>,
    under: Option<&Tensor>,
) -> candle_core::Result<Vec<Tensor>> {
    gradients.into_iter().map(|value| gradient(name, value, under)).collect()
}

/// The gradients of the biases, with that of a fused bias as the first one.
fn fuse(biases: [Option<Vec<f32>>; 3], fused: Option<FusedOrder>) -> [Option<Vec<f32>>; 3] {
    match (biases, fused) {
        ([Some(gate), Some(up), down], Some(order)) => {
            let both = match order {
                FusedOrder::GateFirst => [gate, up].concat(),
                FusedOrder::UpFirst => [up, gate].concat(),
                FusedOrder::Interleaved => {
                    gate.into_iter().zip(up).flat_map(|(g, u)| [g, u]).collect()
                }
            };
            [Some(both), None, down]
        }
        (biases, _) => biases,
    }
}

pub(super) fn value<T: Trained>(data: Vec<T>, shape: impl Into<Shape>) -> Value {
    Value::Cpu(T::to_cpu_storage_owned(data), shape.into())
}

/// The gradient of a bias in its dtype.
fn bias_value<T: Trained>(values: Vec<f32>) -> Value {
    let shape = values.len();
    value::<T>(values.into_iter().map(|value| T::from_f64(f64::from(value))).collect(), shape)
}

/// The matrices with a row for each row of x, and the scratch of a chunk of rows, are addressable:
/// x may be a broadcast view with more rows than fit in memory.
pub(super) fn check_rows(x: &Tensor, columns: [usize; 2]) -> Result<()> {
    const CHUNK: usize = 512;
    const PADDING: usize = 128; // columns of panels and strides
    let rows = x.dims().first().copied().unwrap_or_default().max(CHUNK);
    columns
        .into_iter()
        .try_for_each(|columns| check_addressable("y", rows, columns.saturating_add(PADDING)))
}

/// The storage on the CPU, with its layout.
pub(super) fn on_cpu<'a>(
    (storage, layout): (&'a Storage, &'a Layout),
) -> candle_core::Result<Operand<'a>> {
    match storage {
        Storage::Cpu(storage) => Ok((storage, layout)),
        _ => bail!("a tensor of a trained layer is not on the CPU"),
    }
}

/// A linear layer of variables.
#[derive(Clone, Debug)]
pub(super) struct Linear(Arc<LinearInner>);

#[derive(Debug)]
struct LinearInner {
    weight: Tensor,
    bias: Option<Tensor>,
    kernel: String,
}

impl Linear {
    /// A layer of a weight (out, in) and a bias (out) in one of the dtypes of the CPU kernels.
    pub(super) fn new(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        let kernel = format!("trained-{}", cpu::selected()?.name_of(weight.dtype()));
        Ok(Self(Arc::new(LinearInner { weight, bias, kernel })))
    }
}

impl Projection for Linear {
    fn dtype(&self) -> DType {
        self.0.weight.dtype()
    }

    fn device(&self) -> &Device {
        &Device::Cpu
    }

    fn kernel(&self) -> &str {
        &self.0.kernel
    }

    fn is_packed(&self) -> bool {
        false
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        match self.dtype() {
            DType::F32 => self.0.run::<f32>(x),
            DType::BF16 => self.0.run::<bf16>(x),
            _ => self.0.run::<f16>(x),
        }
    }

    /// 16-bit weights are multiplied by candle, in f32.
    fn forward_f32(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        if self.dtype() == DType::F32 {
            return self.forward(x);
        }
        plain::Linear::new(self.0.weight.clone(), self.0.bias.clone())?.forward_f32(x)
    }

    fn weight(&self) -> candle_core::Result<Tensor> {
        Ok(self.0.weight.clone())
    }

    fn bias(&self) -> candle_core::Result<Option<Tensor>> {
        Ok(self.0.bias.clone())
    }

    fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        Ok(self.0.weight.index_select(ids, 0)?)
    }
}

impl LinearInner {
    fn run<T: Trained>(self: &Arc<Self>, x: &Tensor) -> candle_core::Result<Tensor> {
        let (out_dim, in_dim) = self.weight.dims2()?;
        check_rows(x, [out_dim, in_dim])?;
        let wanted = LinearWanted {
            x: is_tracked(x),
            weight: is_tracked(&self.weight),
            bias: self.bias.as_ref().is_some_and(is_tracked),
        };
        let weight = wanted.weight.then_some(&self.weight);
        let bias = self.bias.as_ref().filter(|_| wanted.bias);
        let inputs: Vec<Tensor> =
            wanted.x.then_some(x).into_iter().chain(weight).chain(bias).cloned().collect();
        let values = self.bias.as_ref().map(|b| b.to_dtype(DType::F32)?.to_vec1()).transpose()?;
        let storages = [x, &self.weight].map(Tensor::storage_and_layout);
        let [x_operand, weight] =
            storages.each_ref().map(|(storage, layout)| (&**storage, *layout));
        let (x_operand, weight) = (on_cpu(x_operand)?, on_cpu(weight)?);
        let y =
            T::linear_forward(cpu::selected()?, WeightOperand::Tensor(weight), values, x_operand)?;
        let shape = Shape::from((x.dim(0)?, self.weight.dim(0)?));
        let (this, x) = (self.clone(), x.clone());
        let under = inputs.first().cloned();
        let backward = move |dy: &Tensor| {
            let gradients = this.gradients::<T>([&x, dy], wanted)?;
            gradients_of(LINEAR_GRADIENT, gradients, under.as_ref())
        };
        function(LINEAR, value(y, shape), &inputs, backward)
    }

    fn gradients<T: Trained>(
        &self,
        [x, dy]: [&Tensor; 2],
        wanted: LinearWanted,
    ) -> candle_core::Result<Vec<Value>> {
        let storages = [x, dy, &self.weight].map(Tensor::storage_and_layout);
        let [x_operand, dy, weight] =
            storages.each_ref().map(|(storage, layout)| (&**storage, *layout));
        let operands = [on_cpu(x_operand)?, on_cpu(dy)?];
        let weight = WeightOperand::Tensor(on_cpu(weight)?);
        let gradients = T::linear_backward(cpu::selected()?, weight, operands, wanted)?;
        let mut all = vec![];
        all.extend(gradients.x.map(|dx| value(dx, x.shape().clone())));
        all.extend(gradients.weight.map(|dw| value(dw, self.weight.shape().clone())));
        all.extend(gradients.bias.map(bias_value::<T>));
        Ok(all)
    }
}
