//! Layers with packed weights as candle sees them: one operation each, differentiable in x.
//!
//! On the CPU they are packed for its kernels, on a GPU gate and up share one matrix (`device.rs`). Either way they are
//! constants. A weight that a gradient is tracked through is never packed (`ffn.rs`, `linear.rs`); the gradient of x unpacks
//! what it needs, for as long as it needs it.

use std::fmt;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Storage, Tensor};

use crate::activation::Glu;
use crate::backend;
use crate::cpu::{self, Layer, Part};
use crate::device::{DeviceBlock, DeviceLinear, Parts};
use crate::error::{Error, Result};
use crate::family::PackedOrder;
use crate::forced;
use crate::weights::split;

/// A tensor that may be packed: of a dtype for which its device has kernels, and no gradient is tracked through it.
pub(crate) fn can_pack(tensor: &Tensor) -> bool {
    !tensor.is_variable() && !tensor.track_op() && has_kernels(tensor.device(), tensor.dtype())
}

/// The device has kernels for projections in this dtype.
pub(crate) fn has_kernels(device: &Device, dtype: DType) -> bool {
    match device {
        _ if forced::is_plain() => false,
        Device::Cpu => matches!(dtype, DType::F32 | DType::BF16 | DType::F16),
        _ => backend::has_kernels(device, dtype),
    }
}

/// The packed form has a size: its padding is less than 256 rows and 8 columns, an element at most 4 B.
fn check_addressable(name: &'static str, rows: usize, columns: usize) -> Result<()> {
    let padded = rows.checked_add(256).zip(columns.checked_add(8)).and_then(|(r, c)| r.checked_mul(c)?.checked_mul(4));
    match padded {
        Some(bytes) if bytes <= isize::MAX as usize => Ok(()),
        _ => Err(Error::TooLarge { name, rows, columns }),
    }
}

/// A layer while its weights are set.
pub(crate) struct Packer {
    source: Source,
    dtype: DType,
    device: Device,
    sizes: Sizes,
}

/// What has been set.
enum Source {
    Cpu(Box<dyn Layer>),
    Device(Parts),
}

impl Packer {
    /// None if the device has no kernels for `dtype`.
    pub(crate) fn new(sizes: Sizes, dtype: DType, device: &Device) -> Result<Option<Self>> {
        match sizes {
            Sizes::Linear { out_dim, in_dim } => check_addressable("weight", out_dim, in_dim)?,
            Sizes::Block { hidden_size: h, intermediate_size: i, .. } => {
                check_addressable("gate_proj and up_proj", i.saturating_mul(2), h)?;
                check_addressable("down_proj", h, i)?;
            }
        }
        let source = match (sizes, device) {
            (Sizes::Linear { out_dim, in_dim }, Device::Cpu) => {
                cpu::linear(cpu::selected()?, dtype, out_dim, in_dim).map(Source::Cpu)
            }
            (Sizes::Block { hidden_size, intermediate_size, glu, down_multiplier }, Device::Cpu) => {
                cpu::block(cpu::selected()?, dtype, (hidden_size, intermediate_size), glu, down_multiplier).map(Source::Cpu)
            }
            _ => has_kernels(device, dtype).then(|| Source::Device(Parts::default())),
        };
        Ok(source.map(|source| Self { source, dtype, device: device.clone(), sizes }))
    }

    /// Packs weight (rows, k) and bias (rows) of the layer's dtype and device, of any layout.
    pub(crate) fn set(&mut self, part: Part, weight: &Tensor, bias: Option<&Tensor>) -> Result<()> {
        let layer = match &mut self.source {
            Source::Cpu(layer) => layer,
            Source::Device(parts) => return Ok(parts.set(part, weight, bias)?),
        };
        let (storage, layout) = weight.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => layer.set_weight(part, storage, layout)?,
            _ => return Err(message("a packed weight lies on the CPU")),
        }
        if let Some(bias) = bias {
            layer.set_bias(part, &bias.to_dtype(DType::F32)?.to_vec1::<f32>()?);
        }
        Ok(())
    }

    /// Gate and up of one tensor (2I,H), in any order.
    pub(crate) fn set_gate_up(&mut self, weight: &Tensor, bias: Option<&Tensor>, order: PackedOrder) -> Result<()> {
        if let (Source::Device(parts), PackedOrder::GateFirst) = (&mut self.source, order) {
            return Ok(parts.set_gate_up(weight, bias)?);
        }
        let (gate, up) = split(weight, order)?;
        let bias = bias.map(|bias| split(bias, order)).transpose()?;
        self.set(Part::Gate, &gate, bias.as_ref().map(|(gate, _)| gate))?;
        self.set(Part::Up, &up, bias.as_ref().map(|(_, up)| up))
    }

    /// What was set, as it was, for a layer that stays plain.
    pub(crate) fn unpack(self, set: &[Part]) -> Result<Vec<(Part, Tensor, Option<Tensor>)>> {
        if let Source::Device(parts) = &self.source {
            let get = |&part| Ok(parts.get(part)?.map(|(weight, bias)| (part, weight, bias)));
            return set.iter().filter_map(|part| get(part).transpose()).collect();
        }
        let packed = self.finish()?;
        set.iter().map(|&part| Ok((part, packed.weight(part)?, packed.bias(part)?))).collect()
    }

    /// # Errors
    /// A weight of a layer on a GPU was not set.
    pub(crate) fn finish(self) -> Result<Packed> {
        let store = match (self.source, self.sizes) {
            (Source::Cpu(layer), _) => Some(Store::Cpu(layer)),
            (Source::Device(parts), Sizes::Linear { .. }) => parts.into_linear().map(Store::Linear),
            (Source::Device(parts), Sizes::Block { glu, down_multiplier, .. }) => {
                parts.into_block(glu, down_multiplier).map(Store::Block)
            }
        };
        let store = store.ok_or_else(|| message("a layer has all its weights"))?;
        backend::prepare(&self.device)?;
        Ok(Packed(Arc::new(Inner { store, dtype: self.dtype, device: self.device, sizes: self.sizes })))
    }
}

fn message(text: &str) -> Error {
    Error::Candle(candle_core::Error::Msg(text.into()))
}

/// Where the weights are.
enum Store {
    Cpu(Box<dyn Layer>),
    Linear(DeviceLinear),
    Block(DeviceBlock),
}

/// What a packed layer computes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Sizes {
    Linear { out_dim: usize, in_dim: usize },
    Block { hidden_size: usize, intermediate_size: usize, glu: Glu, down_multiplier: f32 },
}

/// A layer with packed weights; cloning shares them.
#[derive(Clone)]
pub(crate) struct Packed(Arc<Inner>);

struct Inner {
    store: Store,
    dtype: DType,
    device: Device,
    sizes: Sizes,
}

impl fmt::Debug for Packed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Packed").field(&self.0.dtype).field(&self.0.device.location()).field(&self.0.sizes).finish()
    }
}

impl Packed {
    pub(crate) fn dtype(&self) -> DType {
        self.0.dtype
    }

    /// The name of the kernel that will run.
    pub(crate) fn kernel(&self) -> Result<&'static str> {
        match self.0.device {
            Device::Cpu => Ok(cpu::selected()?.name_of(self.0.dtype)),
            _ => Ok(backend::kernel_name(&self.0.device)),
        }
    }

    /// x (M, k) -> y (M, columns)
    pub(crate) fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let contiguous = if x.device().is_cpu() { x.clone() } else { x.contiguous()? };
        if x.track_op() { contiguous.apply_op1(self.clone()) } else { contiguous.apply_op1_no_bwd(self) }
    }

    /// x (M, k) -> y (M, columns) in f32. On the CPU the sums are not rounded to the layer's dtype.
    pub(crate) fn forward_f32(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        match (x.device().is_cpu(), x.track_op()) {
            (true, true) => x.apply_op1(OutputF32(self.clone())),
            (true, false) => x.apply_op1_no_bwd(&OutputF32(self.clone())),
            (false, _) => self.forward(x)?.to_dtype(DType::F32),
        }
    }

    pub(crate) fn read(&self, streams: usize) -> u32 {
        match &self.0.store {
            Store::Cpu(layer) => layer.read(streams),
            Store::Linear(_) | Store::Block(_) => 0,
        }
    }

    /// A weight as it was before it was packed, (rows, k); on a GPU a view.
    pub(crate) fn weight(&self, part: Part) -> candle_core::Result<Tensor> {
        match &self.0.store {
            Store::Cpu(_) => self.select(part, &mut (0..self.rows_of(part))),
            Store::Linear(_) | Store::Block(_) => Ok(self.on_device(part)?.0),
        }
    }

    /// The rows `ids` (n), u32 on the CPU, of a linear layer's weight, (n, k).
    pub(crate) fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        let rows = self.rows_of(Part::Whole);
        let Store::Cpu(_) = &self.0.store else {
            return Ok(self.on_device(Part::Whole)?.0.index_select(ids, 0)?);
        };
        let ids = ids.to_vec1::<u32>()?;
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= rows) {
            return Err(Error::RowOutOfRange { row: i64::from(id), rows });
        }
        Ok(self.select(Part::Whole, &mut ids.into_iter().map(|id| id as usize))?)
    }

    fn on_device(&self, part: Part) -> candle_core::Result<(Tensor, Option<Tensor>)> {
        match &self.0.store {
            Store::Linear(layer) => Ok((layer.weight.clone(), layer.bias.clone())),
            Store::Block(block) => block.get(part),
            Store::Cpu(_) => candle_core::bail!("the weights are packed for the CPU"),
        }
    }

    /// These rows of a weight packed for the CPU, (n, k).
    fn select(&self, part: Part, rows: &mut dyn Iterator<Item = usize>) -> candle_core::Result<Tensor> {
        let k = match (self.0.sizes, part) {
            (Sizes::Linear { in_dim, .. }, _) => in_dim,
            (Sizes::Block { intermediate_size, .. }, Part::Down) => intermediate_size,
            (Sizes::Block { hidden_size, .. }, _) => hidden_size,
        };
        let Store::Cpu(layer) = &self.0.store else {
            candle_core::bail!("only the CPU's weights are unpacked");
        };
        match layer.rows(part, rows) {
            CpuStorage::F32(data) => Tensor::from_vec(data, ((), k), &Device::Cpu),
            CpuStorage::BF16(data) => Tensor::from_vec(data, ((), k), &Device::Cpu),
            CpuStorage::F16(data) => Tensor::from_vec(data, ((), k), &Device::Cpu),
            other => candle_core::bail!("packed weights are never {:?}", candle_core::backend::BackendStorage::dtype(&other)),
        }
    }

    /// A bias (rows), if there is one, in the layer's dtype.
    pub(crate) fn bias(&self, part: Part) -> candle_core::Result<Option<Tensor>> {
        let Store::Cpu(layer) = &self.0.store else {
            return Ok(self.on_device(part)?.1);
        };
        let rows = self.rows_of(part);
        let tensor = |bias: Vec<f32>| Tensor::from_vec(bias, rows, &Device::Cpu)?.to_dtype(self.0.dtype);
        layer.bias(part).map(tensor).transpose()
    }

    fn rows_of(&self, part: Part) -> usize {
        match (self.0.sizes, part) {
            (Sizes::Linear { out_dim, .. }, _) => out_dim,
            (Sizes::Block { hidden_size, .. }, Part::Down | Part::Whole) => hidden_size,
            (Sizes::Block { intermediate_size, .. }, _) => intermediate_size,
        }
    }

    /// x·Wᵀ + b
    fn project(&self, part: Part, x: &Tensor) -> candle_core::Result<Tensor> {
        let y = x.matmul(&self.weight(part)?.t()?)?;
        match self.bias(part)? {
            Some(bias) => y.broadcast_add(&bias),
            None => Ok(y),
        }
    }
}

impl CustomOp1 for Packed {
    fn name(&self) -> &'static str {
        match self.0.sizes {
            Sizes::Linear { .. } => "packed linear",
            Sizes::Block { .. } => "swiglu block",
        }
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let columns = match self.0.sizes {
            Sizes::Linear { out_dim, .. } => out_dim,
            Sizes::Block { hidden_size, .. } => hidden_size,
        };
        check_addressable("y", layout.dims()[0], columns)?; // x may be a broadcast view of more rows than memory has
        let y = match &self.0.store {
            Store::Cpu(layer) => layer.forward(storage, layout)?,
            Store::Linear(_) | Store::Block(_) => candle_core::bail!("x is on the CPU, the weights are not"),
        };
        Ok((y, Shape::from((layout.dims()[0], columns))))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> candle_core::Result<(candle_core::CudaStorage, Shape)> {
        match &self.0.store {
            Store::Block(block) => crate::cuda::block(block, x, layout),
            Store::Linear(linear) => crate::cuda::linear(linear, x, layout),
            Store::Cpu(_) => candle_core::bail!("x is on a CUDA device, the weights are not"),
        }
    }

    #[cfg(feature = "metal")]
    fn metal_fwd(
        &self,
        x: &candle_core::MetalStorage,
        layout: &Layout,
    ) -> candle_core::Result<(candle_core::MetalStorage, Shape)> {
        match &self.0.store {
            Store::Block(block) => crate::metal::block(block, x, layout),
            Store::Linear(linear) => crate::metal::linear(linear, x, layout),
            Store::Cpu(_) => candle_core::bail!("x is on a Metal device, the weights are not"),
        }
    }

    /// dx, with gate and up computed again: dh = d·dy·Wd, (dgate, dup) = glu's, dx = dgate·Wg + dup·Wu.
    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let dx = match self.0.sizes {
            Sizes::Linear { .. } => dy.matmul(&self.weight(Part::Whole)?)?,
            Sizes::Block { glu, down_multiplier, .. } => {
                let dh = (dy * f64::from(down_multiplier))?.matmul(&self.weight(Part::Down)?)?;
                let (gate, up) = (self.project(Part::Gate, x)?, self.project(Part::Up, x)?);
                let (dgate, dup) = glu.gradients(&gate, &up, &dh)?;
                (dgate.matmul(&self.weight(Part::Gate)?)? + dup.matmul(&self.weight(Part::Up)?)?)?
            }
        };
        Ok(Some(dx))
    }
}

/// A linear layer on the CPU whose y is in f32.
struct OutputF32(Packed);

impl CustomOp1 for OutputF32 {
    fn name(&self) -> &'static str {
        "packed linear, f32 output"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let shape = (layout.dims()[0], self.0.rows_of(Part::Whole));
        check_addressable("y", shape.0, shape.1)?;
        let y = match &self.0.0.store {
            Store::Cpu(layer) => layer.forward_f32(storage, layout)?,
            Store::Linear(_) | Store::Block(_) => None,
        };
        match y {
            Some(y) => Ok((y, Shape::from(shape))),
            None => candle_core::bail!("only a linear layer on the CPU has an f32 output"),
        }
    }

    /// dx = dy·W, with dy rounded to the dtype of W
    fn bwd(&self, x: &Tensor, y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        self.0.bwd(x, y, &dy.to_dtype(x.dtype())?)
    }
}
