//! Layers on a GPU, whose kernels read the weights in the layout of `device.rs`.

use std::fmt;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor};

use super::{BlockSpec, Projection, backward, run, set_views};
use crate::backend::GpuKernels;
use crate::device::{DeviceBlock, DeviceLinear, Parts};
use crate::error::{Error, Result};
use crate::load::FusedOrder;
use crate::which::Which;

/// A block while its weights are written to the device.
pub(super) struct BlockBuilder {
    parts: Parts,
    spec: BlockSpec,
    dtype: DType,
    device: Device,
    /// Whether a matrix was set with a bias.
    biased: [bool; 3],
}

impl BlockBuilder {
    pub(super) fn new(spec: &BlockSpec, dtype: DType, device: &Device) -> Self {
        Self {
            parts: Parts::default(),
            spec: *spec,
            dtype,
            device: device.clone(),
            biased: [false; 3],
        }
    }
}

impl super::Builder for BlockBuilder {
    fn set(&mut self, which: Which, weight: &Tensor, bias: Option<&Tensor>) -> Result<()> {
        self.biased[which as usize] = bias.is_some();
        Ok(self.parts.set(which, weight, bias)?)
    }

    /// Gate above up is the kernels' own layout. Contiguous tensors are used without a copy.
    fn set_gate_up(
        &mut self,
        weight: &Tensor,
        bias: Option<&Tensor>,
        order: FusedOrder,
    ) -> Result<()> {
        if order == FusedOrder::GateFirst {
            [Which::Gate, Which::Up]
                .into_iter()
                .for_each(|which| self.biased[which as usize] = bias.is_some());
            return Ok(self.parts.set_gate_up(weight, bias)?);
        }
        set_views(self, weight, bias, order)
    }

    fn finish(self: Box<Self>) -> Result<Arc<dyn super::Block>> {
        let Self { parts, spec, dtype, device, biased } = *self;
        let weights = parts.into_block(spec.glu, spec.down_multiplier)?;
        let kernels = GpuKernels::load(&device)?;
        Ok(Arc::new(Block(Arc::new(Inner { weights, spec, dtype, device, kernels, biased }))))
    }
}

/// A block on a GPU. Clones share the weights.
#[derive(Clone)]
struct Block(Arc<Inner>);

struct Inner {
    weights: DeviceBlock,
    spec: BlockSpec,
    dtype: DType,
    device: Device,
    kernels: GpuKernels,
    /// Whether each matrix has a bias. The biases of gate and up are one tensor, which is zero
    /// where only the other has a bias.
    biased: [bool; 3],
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { spec, dtype, device, kernels, .. } = &*self.0;
        f.debug_tuple("gpu::Block")
            .field(dtype)
            .field(&device.location())
            .field(&kernels.name)
            .field(spec)
            .finish()
    }
}

impl super::Block for Block {
    fn dtype(&self) -> DType {
        self.0.dtype
    }

    fn device(&self) -> &Device {
        &self.0.device
    }

    fn kernel(&self) -> &str {
        self.0.kernels.name
    }

    fn is_packed(&self) -> bool {
        true
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        run(self, &x.contiguous()?)
    }

    fn weight(&self, which: Which) -> candle_core::Result<Tensor> {
        self.0.weights.weight(which)
    }

    fn bias(&self, which: Which) -> candle_core::Result<Option<Tensor>> {
        if self.0.biased[which as usize] { self.0.weights.bias(which) } else { Ok(None) }
    }
}

impl CustomOp1 for Block {
    fn name(&self) -> &'static str {
        "swiglu block"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Err(on_the_cpu(&self.0.device))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> candle_core::Result<(candle_core::CudaStorage, Shape)> {
        crate::cuda::block(self.0.kernels.cuda()?, &self.0.weights, x, layout)
    }

    #[cfg(feature = "metal")]
    fn metal_fwd(
        &self,
        x: &candle_core::MetalStorage,
        layout: &Layout,
    ) -> candle_core::Result<(candle_core::MetalStorage, Shape)> {
        crate::metal::block(&self.0.weights, x, layout)
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        backward::block(self, &self.0.spec, x, dy).map(Some)
    }
}

/// A linear layer on a GPU. Clones share the weight.
#[derive(Clone)]
pub(super) struct Linear {
    weights: DeviceLinear,
    kernels: GpuKernels,
}

impl fmt::Debug for Linear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("gpu::Linear").field(&self.weights).field(&self.kernels.name).finish()
    }
}

impl Linear {
    pub(super) fn new(weight: &Tensor, bias: Option<&Tensor>) -> Result<Self> {
        let weights = DeviceLinear::new(weight, bias)?;
        Ok(Self { weights, kernels: GpuKernels::load(weight.device())? })
    }
}

impl Projection for Linear {
    fn dtype(&self) -> DType {
        self.weights.weight.dtype()
    }

    fn device(&self) -> &Device {
        self.weights.weight.device()
    }

    fn kernel(&self) -> &str {
        self.kernels.name
    }

    fn is_packed(&self) -> bool {
        true
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        run(self, &x.contiguous()?)
    }

    fn forward_f32(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.forward(x)?.to_dtype(DType::F32)
    }

    fn weight(&self) -> candle_core::Result<Tensor> {
        Ok(self.weights.weight.clone())
    }

    fn bias(&self) -> candle_core::Result<Option<Tensor>> {
        Ok(self.weights.bias.clone())
    }

    fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        Ok(self.weights.weight.index_select(ids, 0)?)
    }
}

impl CustomOp1 for Linear {
    fn name(&self) -> &'static str {
        "packed linear"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Err(on_the_cpu(self.weights.weight.device()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> candle_core::Result<(candle_core::CudaStorage, Shape)> {
        crate::cuda::linear(self.kernels.cuda()?, &self.weights, x, layout)
    }

    #[cfg(feature = "metal")]
    fn metal_fwd(
        &self,
        x: &candle_core::MetalStorage,
        layout: &Layout,
    ) -> candle_core::Result<(candle_core::MetalStorage, Shape)> {
        crate::metal::linear(&self.weights, x, layout)
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        backward::projection(self, dy).map(Some)
    }
}

fn on_the_cpu(device: &Device) -> candle_core::Error {
    let (expected, found) = (device.location(), Device::Cpu.location());
    Error::DeviceMismatch { name: "x", other: "the weights", expected, found }.into()
}
