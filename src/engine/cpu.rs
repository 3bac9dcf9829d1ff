//! Layers on the CPU, packed for its kernels.

use std::fmt;
use std::sync::Arc;

use candle_core::{
    CpuStorage, CustomOp1, DType, Device, Layout, Shape, Storage, Tensor, WithDType,
};
use half::{bf16, f16};

use super::adapted::Pairs;
use super::low_rank::Addend;
use super::trained::on_cpu;
use super::{BlockSpec, Projection, backward, check_addressable, run, set_views};
use crate::cpu::{self, BlockLayer, LinearLayer, LowRank, Operand};
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
pub(super) struct Block(Arc<Inner>);

struct Inner {
    layer: Box<dyn BlockLayer>,
    spec: BlockSpec,
    dtype: DType,
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
        Ok(Some(Arc::new(AdaptedBlock::new(self.clone(), pairs)?)))
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
        backward::block(self, &self.0.spec, x, dy).map(Some)
    }
}

/// A packed block with low-rank pairs. Clones share the weights and the pairs.
#[derive(Clone)]
struct AdaptedBlock(Arc<AdaptedInner>);

struct AdaptedInner {
    base: Block,
    pairs: Pairs,
    /// The packed pairs of gate and up, and of down, if they are constants.
    low_rank: [Option<LowRank>; 2],
}

impl AdaptedBlock {
    fn new(base: Block, pairs: &Pairs) -> Result<Self> {
        let (inner, dtype) = (&*base.0, base.0.dtype);
        let BlockSpec { hidden_size, intermediate_size, .. } = inner.spec;
        let pack = |pairs: &[Option<Lora>], rows| {
            let addend = Addend::new(pairs, rows, dtype, 1.0)?;
            addend.map(|addend| pack(&addend, |a, b| inner.layer.low_rank(a, b))).transpose()
        };
        let low_rank = [pack(&pairs[..2], intermediate_size)?, pack(&pairs[2..], hidden_size)?];
        Ok(Self(Arc::new(AdaptedInner { base, pairs: pairs.clone(), low_rank })))
    }
}

impl fmt::Debug for AdaptedBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("cpu::AdaptedBlock").field(&self.0.base).field(&self.0.pairs).finish()
    }
}

impl super::Block for AdaptedBlock {
    fn dtype(&self) -> DType {
        self.0.base.dtype()
    }

    fn device(&self) -> &Device {
        &Device::Cpu
    }

    fn kernel(&self) -> &str {
        self.0.base.kernel()
    }

    fn is_packed(&self) -> bool {
        true
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        run(self, x)
    }

    fn weight(&self, which: Which) -> candle_core::Result<Tensor> {
        self.0.base.weight(which)
    }

    fn bias(&self, which: Which) -> candle_core::Result<Option<Tensor>> {
        self.0.base.bias(which)
    }

    fn packed_bytes(&self) -> Vec<&[u8]> {
        self.0.base.packed_bytes()
    }
}

impl CustomOp1 for AdaptedBlock {
    fn name(&self) -> &'static str {
        "swiglu block with LoRA"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let base = &*self.0.base.0;
        let shape = output_shape(layout, base.spec.hidden_size)?;
        Ok((base.layer.forward((x, layout), self.0.low_rank.each_ref().map(Option::as_ref))?, shape))
    }
}

/// Calls `f` with the storages of an addend.
fn pack<R>(
    Addend { a, b }: &Addend,
    f: impl FnOnce(Operand, &[Operand]) -> Result<R>,
) -> candle_core::Result<R> {
    let a = a.storage_and_layout();
    let b: Vec<_> = b.iter().map(Tensor::storage_and_layout).collect();
    let b = b.iter().map(|(b, layout)| on_cpu((&**b, *layout))).collect::<candle_core::Result<Vec<_>>>()?;
    Ok(f(on_cpu((&*a.0, a.1))?, &b)?)
}

/// A packed linear layer. Clones share the weight.
#[derive(Clone)]
pub(super) struct Linear(Arc<LinearInner>);

struct LinearInner {
    layer: Box<dyn LinearLayer>,
    /// (out, in)
    shape: (usize, usize),
    dtype: DType,
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

    fn bwd(&self, _x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        backward::projection(self, dy).map(Some)
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
    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        backward::projection(&self.0, &dy.to_dtype(x.dtype())?).map(Some)
    }
}

/// (M, columns), if y is addressable: x may be a broadcast view with more rows than fit in memory.
fn output_shape(x: &Layout, columns: usize) -> Result<Shape> {
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
