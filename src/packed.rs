//! Layers with packed weights as candle sees them: one operation each, differentiable in x.
//!
//! Packed weights are constants. A weight that a gradient is tracked through is never packed (`ffn.rs`, `linear.rs`); the
//! gradient of x unpacks what it needs, for as long as it needs it.

use std::fmt;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Storage, Tensor};

use crate::cpu::{self, Layer, Part};
use crate::error::{Error, Result};
use crate::glu::Glu;

/// A tensor that may be packed: floats that the kernels take, on the CPU, and no gradient is tracked through it.
pub(crate) fn can_pack(tensor: &Tensor) -> bool {
    let constant = !tensor.is_variable() && !tensor.track_op();
    constant && tensor.device().is_cpu() && matches!(tensor.dtype(), DType::F32 | DType::BF16 | DType::F16)
}

/// The packed form has a size: its padding is less than 256 rows and 2 columns, an element at most 4 B.
fn check_addressable(name: &'static str, rows: usize, columns: usize) -> Result<()> {
    let padded = rows.checked_add(256).zip(columns.checked_add(2)).and_then(|(r, c)| r.checked_mul(c)?.checked_mul(4));
    match padded {
        Some(bytes) if bytes <= isize::MAX as usize => Ok(()),
        _ => Err(Error::TooLarge { name, rows, columns }),
    }
}

/// A layer while its weights are set.
pub(crate) struct Packer(Box<dyn Layer>);

impl Packer {
    /// None if the kernels do not take `dtype`.
    pub(crate) fn linear(dtype: DType, columns: usize, k: usize) -> Result<Option<Self>> {
        check_addressable("weight", columns, k)?;
        Ok(cpu::linear(cpu::selected()?, dtype, columns, k).map(Self))
    }

    /// None if the kernels do not take `dtype`.
    pub(crate) fn block(dtype: DType, sizes: (usize, usize), glu: Glu, down_multiplier: f32) -> Result<Option<Self>> {
        let (h, i) = sizes;
        check_addressable("gate_proj and up_proj", i.saturating_mul(2), h)?;
        check_addressable("down_proj", h, i)?;
        Ok(cpu::block(cpu::selected()?, dtype, sizes, glu, down_multiplier).map(Self))
    }

    /// Packs weight (rows, k) and bias (rows) of the layer's dtype, of any layout.
    pub(crate) fn set(&mut self, part: Part, weight: &Tensor, bias: Option<&Tensor>) -> Result<()> {
        let (storage, layout) = weight.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => self.0.set_weight(part, storage, layout)?,
            _ => return Err(Error::Candle(candle_core::Error::Msg("a packed weight lies on the CPU".into()))),
        }
        if let Some(bias) = bias {
            self.0.set_bias(part, &bias.to_dtype(DType::F32)?.to_vec1::<f32>()?);
        }
        Ok(())
    }

    pub(crate) fn finish(self, dtype: DType, sizes: Sizes) -> Packed {
        Packed(Arc::new(Inner { layer: self.0, dtype, sizes }))
    }
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
    layer: Box<dyn Layer>,
    dtype: DType,
    sizes: Sizes,
}

impl fmt::Debug for Packed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Packed").field(&self.0.dtype).field(&self.0.sizes).finish()
    }
}

impl Packed {
    pub(crate) fn dtype(&self) -> DType {
        self.0.dtype
    }

    /// x (M, k) -> y (M, columns)
    pub(crate) fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        if x.track_op() { x.apply_op1(self.clone()) } else { x.apply_op1_no_bwd(self) }
    }

    pub(crate) fn read(&self) -> u64 {
        self.0.layer.read()
    }

    /// A weight as it was before it was packed, (rows, k).
    pub(crate) fn weight(&self, part: Part) -> candle_core::Result<Tensor> {
        let rows = self.rows_of(part);
        self.select(part, &mut (0..rows))
    }

    /// These rows of a weight, (n, k).
    pub(crate) fn select(&self, part: Part, rows: &mut dyn Iterator<Item = usize>) -> candle_core::Result<Tensor> {
        let k = match (self.0.sizes, part) {
            (Sizes::Linear { in_dim, .. }, _) => in_dim,
            (Sizes::Block { intermediate_size, .. }, Part::Down) => intermediate_size,
            (Sizes::Block { hidden_size, .. }, _) => hidden_size,
        };
        match self.0.layer.rows(part, rows) {
            CpuStorage::F32(data) => Tensor::from_vec(data, ((), k), &Device::Cpu),
            CpuStorage::BF16(data) => Tensor::from_vec(data, ((), k), &Device::Cpu),
            CpuStorage::F16(data) => Tensor::from_vec(data, ((), k), &Device::Cpu),
            other => candle_core::bail!("packed weights are never {:?}", candle_core::backend::BackendStorage::dtype(&other)),
        }
    }

    /// A bias (rows), if there is one, in the layer's dtype.
    pub(crate) fn bias(&self, part: Part) -> candle_core::Result<Option<Tensor>> {
        let rows = self.rows_of(part);
        let tensor = |bias: Vec<f32>| Tensor::from_vec(bias, rows, &Device::Cpu)?.to_dtype(self.0.dtype);
        self.0.layer.bias(part).map(tensor).transpose()
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
        let y = self.0.layer.forward(storage, layout)?;
        Ok((y, Shape::from((layout.dims()[0], columns))))
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
