//! Layers on the CPU, packed for its kernels.

use std::fmt;
use std::sync::Arc;

use candle_core::{
    CpuStorage, CustomOp1, DType, Device, Layout, Shape, Storage, Tensor, WithDType,
};
use half::{bf16, f16};

use super::adapted::Pairs;
use super::function::{Value, gradient};
use super::trained::{check_rows, on_cpu, value};
use super::{BlockSpec, Projection, check_addressable, cpu_lora, run, set_views};
use crate::cpu::{
    self, BlockLayer, BlockOperands, BlockWanted, LinearLayer, LinearWanted, LowRankOperands,
    Operand, Saved, Trained, WeightOperand,
};
use crate::error::{Error, Result};
use crate::load::FusedOrder;
use crate::lora::Lora;
use crate::which::Which;

/// A block while its weights are packed.
pub(super) struct BlockBuilder {
    layer: Box<dyn BlockLayer>,
    spec: BlockSpec,
    dtype: DType,
    kernel: &'static str,
    /// Whether a matrix was set, and with a bias.
    biased: [Option<bool>; 3],
}

impl BlockBuilder {
    pub(super) fn new(spec: &BlockSpec, dtype: DType) -> Result<Self> {
        let (kernel, sizes) = (cpu::selected()?, (spec.hidden_size, spec.intermediate_size));
        let layer = cpu::block(kernel, dtype, sizes, spec.glu, spec.down_multiplier);
        let layer = layer.ok_or_else(|| unsupported("the block's first weight", dtype))?;
        Ok(Self { layer, spec: *spec, dtype, kernel: kernel.name_of(dtype), biased: [None; 3] })
    }
}

impl super::Builder for BlockBuilder {
    fn set(&mut self, which: Which, weight: &Tensor, bias: Option<&Tensor>) -> Result<()> {
        with_storage(weight, |storage, layout| self.layer.set_weight(which, storage, layout))?;
        if let Some(bias) = bias {
            self.layer.set_bias(which, &values(bias)?);
        }
        self.biased[which as usize] = Some(bias.is_some());
        Ok(())
    }

    fn set_gate_up(
        &mut self,
        weight: &Tensor,
        bias: Option<&Tensor>,
        order: FusedOrder,
    ) -> Result<()> {
        set_views(self, weight, bias, order)
    }

    fn finish(self: Box<Self>) -> Result<Arc<dyn super::Block>> {
        let Self { layer, spec, dtype, kernel, biased } = *self;
        let mut all = [false; 3];
        for which in Which::ALL {
            all[which as usize] =
                biased[which as usize].ok_or_else(|| Error::missing(which.name()))?;
        }
        Ok(Arc::new(Block(Arc::new(Inner { layer, spec, dtype, kernel, biased: all }))))
    }
}

/// A packed block. Clones share the weights.
#[derive(Clone)]
pub(super) struct Block(pub(super) Arc<Inner>);

pub(super) struct Inner {
    pub(super) layer: Box<dyn BlockLayer>,
    pub(super) spec: BlockSpec,
    pub(super) dtype: DType,
    kernel: &'static str,
    /// Whether each matrix has a bias. The packed biases of gate and up are one buffer, which is
    /// zero where only the other has a bias.
    biased: [bool; 3],
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { spec, dtype, kernel, .. } = &*self.0;
        f.debug_tuple("cpu::Block").field(dtype).field(kernel).field(spec).finish()
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
        self.0.kernel
    }

    fn is_packed(&self) -> bool {
        true
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        run(self, x)
    }

    fn weight(&self, which: Which) -> candle_core::Result<Tensor> {
        let (rows, k) = self.0.spec.shape(which);
        tensor(self.0.layer.rows(which, &mut (0..rows)), k)
    }

    fn bias(&self, which: Which) -> candle_core::Result<Option<Tensor>> {
        let bias = self.0.layer.bias(which).filter(|_| self.0.biased[which as usize]);
        bias.map(|bias| bias_tensor(bias, self.0.dtype)).transpose()
    }

    fn with_lora(&self, pairs: &Pairs) -> Result<Option<Arc<dyn super::Block>>> {
        Ok(Some(Arc::new(cpu_lora::Block::new(self.clone(), pairs)?)))
    }

    fn packed_bytes(&self) -> Vec<&[u8]> {
        self.0.layer.bytes().into()
    }
}

impl CustomOp1 for Block {
    fn name(&self) -> &'static str {
        "swiglu block"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let shape = output_shape(layout, self.0.spec.hidden_size)?;
        Ok((self.0.layer.forward((x, layout), [None; 2])?, shape))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let dx = match self.0.dtype {
            DType::F32 => self.0.dx::<f32>(x, dy),
            DType::BF16 => self.0.dx::<bf16>(x, dy),
            _ => self.0.dx::<f16>(x, dy),
        };
        gradient("swiglu block gradient", dx?, Some(x)).map(Some)
    }
}

impl Inner {
    /// Calls `f` with the block's operands and these addends.
    pub(super) fn with_operands<R>(
        &self,
        low_rank: [Option<LowRankOperands>; 2],
        f: impl FnOnce(BlockOperands) -> Result<R>,
    ) -> Result<R> {
        let biases = Which::ALL.map(|which| self.layer.bias(which));
        f(BlockOperands {
            glu: self.spec.glu,
            down_multiplier: self.spec.down_multiplier,
            weights: self.layer.matrices().map(WeightOperand::Packed),
            biases: biases.each_ref().map(Option::as_deref),
            low_rank,
        })
    }

    /// dx, with gate and up computed again.
    fn dx<T: Trained>(&self, x: &Tensor, dy: &Tensor) -> candle_core::Result<Value> {
        let BlockSpec { hidden_size, intermediate_size, .. } = self.spec;
        check_rows(x, [hidden_size, intermediate_size])?;
        let wanted = BlockWanted { x: true, ..BlockWanted::default() };
        let gradients = with_storages([x, dy], |operands| {
            self.with_operands([None; 2], |block| {
                T::block_backward(cpu::selected()?, block, operands, &Saved::nothing(), &wanted)
            })
        })?;
        Ok(value(gradients.x.unwrap_or_default(), x.shape().clone()))
    }
}

/// Calls `f` with the storages of tensors on the CPU.
pub(super) fn with_storages<R, const N: usize>(
    tensors: [&Tensor; N],
    f: impl FnOnce([Operand; N]) -> Result<R>,
) -> candle_core::Result<R> {
    let storages = tensors.map(Tensor::storage_and_layout);
    let mut operands = Vec::with_capacity(N);
    for (storage, layout) in &storages {
        operands.push(on_cpu((&**storage, *layout))?);
    }
    match operands.try_into() {
        Ok(operands) => Ok(f(operands)?),
        Err(_) => candle_core::bail!("a tensor without storage"),
    }
}

/// A packed linear layer. Clones share the weight.
#[derive(Clone)]
pub(super) struct Linear(pub(super) Arc<LinearInner>);

pub(super) struct LinearInner {
    pub(super) layer: Box<dyn LinearLayer>,
    /// (out, in)
    pub(super) shape: (usize, usize),
    pub(super) dtype: DType,
    kernel: &'static str,
}

impl Linear {
    pub(super) fn new(weight: &Tensor, bias: Option<&Tensor>) -> Result<Self> {
        let (kernel, dtype, shape) = (cpu::selected()?, weight.dtype(), weight.dims2()?);
        let layer = cpu::linear(kernel, dtype, shape.0, shape.1);
        let mut layer = layer.ok_or_else(|| unsupported("weight", dtype))?;
        with_storage(weight, |storage, layout| layer.set_weight(storage, layout))?;
        if let Some(bias) = bias {
            layer.set_bias(&values(bias)?);
        }
        Ok(Self(Arc::new(LinearInner { layer, shape, dtype, kernel: kernel.name_of(dtype) })))
    }
}

impl fmt::Debug for Linear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LinearInner { shape, dtype, kernel, .. } = &*self.0;
        f.debug_tuple("cpu::Linear").field(dtype).field(kernel).field(shape).finish()
    }
}

impl Projection for Linear {
    fn dtype(&self) -> DType {
        self.0.dtype
    }

    fn device(&self) -> &Device {
        &Device::Cpu
    }

    fn kernel(&self) -> &str {
        self.0.kernel
    }

    fn is_packed(&self) -> bool {
        true
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        run(self, x)
    }

    fn forward_f32(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        run(&OutputF32(self.clone()), x)
    }

    fn with_lora(&self, pair: &Lora) -> Result<Option<Arc<dyn Projection>>> {
        Ok(Some(Arc::new(cpu_lora::Linear::new(self.clone(), pair)?)))
    }

    fn weight(&self) -> candle_core::Result<Tensor> {
        let (rows, k) = self.0.shape;
        tensor(self.0.layer.rows(&mut (0..rows)), k)
    }

    fn bias(&self) -> candle_core::Result<Option<Tensor>> {
        self.0.layer.bias().map(|bias| bias_tensor(bias, self.0.dtype)).transpose()
    }

    fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        let ((rows, k), ids) = (self.0.shape, ids.to_vec1::<u32>()?);
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= rows) {
            return Err(Error::RowOutOfRange { row: i64::from(id), rows });
        }
        Ok(tensor(self.0.layer.rows(&mut ids.into_iter().map(|id| id as usize)), k)?)
    }
}

impl CustomOp1 for Linear {
    fn name(&self) -> &'static str {
        "packed linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let shape = output_shape(layout, self.0.shape.0)?;
        Ok((self.0.layer.forward((x, layout), None)?, shape))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let dx = match self.0.dtype {
            DType::F32 => self.0.dx::<f32>(x, dy),
            DType::BF16 => self.0.dx::<bf16>(x, dy),
            _ => self.0.dx::<f16>(x, dy),
        };
        gradient("packed linear gradient", dx?, Some(x)).map(Some)
    }
}

impl LinearInner {
    /// dx = dy·W
    fn dx<T: Trained>(&self, x: &Tensor, dy: &Tensor) -> candle_core::Result<Value> {
        check_rows(x, [self.shape.0, self.shape.1])?;
        let wanted = LinearWanted { x: true, ..LinearWanted::default() };
        let gradients = with_storages([x, dy], |operands| {
            let weight = WeightOperand::Packed(self.layer.matrix());
            T::linear_backward(cpu::selected()?, weight, operands, wanted)
        })?;
        Ok(value(gradients.x.unwrap_or_default(), x.shape().clone()))
    }
}

/// The linear layer with y in f32.
#[derive(Clone)]
struct OutputF32(Linear);

impl CustomOp1 for OutputF32 {
    fn name(&self) -> &'static str {
        "packed linear, f32 output"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let Self(Linear(inner)) = self;
        let shape = output_shape(layout, inner.shape.0)?;
        Ok((inner.layer.forward_f32((x, layout), None)?, shape))
    }

    /// dx = dy·W, with dy rounded to the dtype of W
    fn bwd(&self, x: &Tensor, y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        self.0.bwd(x, y, &dy.to_dtype(x.dtype())?)
    }
}

/// (M, columns), if y is addressable: x may be a broadcast view with more rows than fit in memory.
pub(super) fn output_shape(x: &Layout, columns: usize) -> Result<Shape> {
    let rows = x.dims()[0];
    check_addressable("y", rows, columns)?;
    Ok(Shape::from((rows, columns)))
}

fn unsupported(name: &str, dtype: DType) -> Error {
    Error::DTypeUnsupported { name: name.into(), found: dtype.as_str().into(), location: None }
}

fn with_storage(weight: &Tensor, f: impl FnOnce(&CpuStorage, &Layout) -> Result<()>) -> Result<()> {
    let (storage, layout) = weight.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => f(storage, layout),
        _ => Err(Error::DeviceMismatch {
            name: "weight",
            other: "the packed layer",
            expected: Device::Cpu.location(),
            found: weight.device().location(),
        }),
    }
}

fn values(bias: &Tensor) -> Result<Vec<f32>> {
    Ok(bias.to_dtype(DType::F32)?.to_vec1::<f32>()?)
}

fn bias_tensor(bias: Vec<f32>, dtype: DType) -> candle_core::Result<Tensor> {
    let rows = bias.len();
    Tensor::from_vec(bias, rows, &Device::Cpu)?.to_dtype(dtype)
}

/// Unpacked rows of k elements each.
fn tensor(rows: CpuStorage, k: usize) -> candle_core::Result<Tensor> {
    fn of<T: WithDType>(data: Vec<T>, k: usize) -> candle_core::Result<Tensor> {
        Tensor::from_vec(data, ((), k), &Device::Cpu)
    }
    match rows {
        CpuStorage::F32(data) => of::<f32>(data, k),
        CpuStorage::BF16(data) => of::<bf16>(data, k),
        CpuStorage::F16(data) => of::<f16>(data, k),
        other => {
            let found = candle_core::backend::BackendStorage::dtype(&other);
            Err(unsupported("a packed weight", found).into())
        }
    }
}
