//! Packed layers of any dtype behind one interface, over candle's storage.

use candle_core::{CpuStorage, DType, Layout, WithDType};
use half::{bf16, f16};

use super::format::{Format, Stored};
use super::kernels::{CpuKernels, Io};
use super::low_rank::LowRank;
use super::matrix::Matrix;
use super::panels::{Columns, PackedMatrix};
use super::pass::{Block, Linear};
use super::projection::Projection;
use super::train::Operand;
use crate::error::{Error, Result};
use crate::gate::activation::Glu;
use crate::which::Which;

/// A linear layer with a packed weight. Weight and bias are zero until they are set.
pub(crate) trait LinearLayer: Send + Sync {
    /// Packs the weight (columns, k) of any layout.
    fn set_weight(&mut self, storage: &CpuStorage, layout: &Layout) -> Result<()>;
    /// Sets the bias (columns).
    fn set_bias(&mut self, bias: &[f32]);
    /// These rows of the weight, one after the other, k elements each.
    fn rows(&self, rows: &mut dyn Iterator<Item = usize>) -> CpuStorage;
    /// The bias (columns), if one was set.
    fn bias(&self) -> Option<Vec<f32>>;
    /// Packs a low-rank pair A (r, k) and B (columns, r), with its scale, in the dtype of the
    /// weight.
    fn low_rank(&self, a: Operand, b: Operand) -> Result<LowRank>;
    /// The weight (columns, k), valid as long as the layer.
    fn matrix(&self) -> PackedMatrix;
    /// x (M, k) of any layout -> y (M, columns)
    fn forward(&self, x: Operand, low_rank: Option<&LowRank>) -> Result<CpuStorage>;
    /// x (M, k) of any layout -> y (M, columns) in f32, not rounded to the dtype of the weight
    fn forward_f32(&self, x: Operand, low_rank: Option<&LowRank>) -> Result<CpuStorage>;
}

/// A block with packed weights. Weights and biases are zero until they are set.
pub(crate) trait BlockLayer: Send + Sync {
    /// Packs a weight (rows, k) of any layout.
    fn set_weight(&mut self, which: Which, storage: &CpuStorage, layout: &Layout) -> Result<()>;
    /// Sets a bias (rows).
    fn set_bias(&mut self, which: Which, bias: &[f32]);
    /// These rows of a weight, one after the other, k elements each.
    fn rows(&self, which: Which, rows: &mut dyn Iterator<Item = usize>) -> CpuStorage;
    /// The bias (rows) of a weight. gate and up share a buffer: if one of them has a bias, the
    /// other's is zero.
    fn bias(&self, which: Which) -> Option<Vec<f32>>;
    /// Packs a low-rank pair in the dtype of the weights, with its scale: A (r, H), B of gate (I,
    /// r) and of up (I, r); or A (r, I) and B of down (H, r).
    fn low_rank(&self, a: Operand, b: &[Operand]) -> Result<LowRank>;
    /// gate, up (I, H) and down (H, I), valid as long as the layer.
    fn matrices(&self) -> [PackedMatrix; 3];
    /// x (M, H) of any layout -> y (M, H), with the pairs of gate and up, and of down.
    fn forward(&self, x: Operand, low_rank: [Option<&LowRank>; 2]) -> Result<CpuStorage>;
    /// The memory of gate and up, and of down.
    fn bytes(&self) -> [&[u8]; 2];
}

/// y = x·Wᵀ + b with W (columns, k); none if the kernels do not support `dtype`.
pub(crate) fn linear(
    kernels: &'static CpuKernels,
    dtype: DType,
    columns: usize,
    k: usize,
) -> Option<Box<dyn LinearLayer>> {
    let projection = Projection::new(kernels, Format::of(dtype)?, columns, k);
    match dtype {
        DType::F32 => Some(Box::new(Linear::<f32>::new(projection)?)),
        DType::BF16 => Some(Box::new(Linear::<bf16>::new(projection)?)),
        DType::F16 => Some(Box::new(Linear::<f16>::new(projection)?)),
        _ => None,
    }
}

/// The block of sizes (H, I); none if the kernels do not support `dtype`.
pub(crate) fn block(
    kernels: &'static CpuKernels,
    dtype: DType,
    (h, i): (usize, usize),
    glu: Glu,
    down_multiplier: f32,
) -> Option<Box<dyn BlockLayer>> {
    let format = Format::of(dtype)?;
    let gate_up = Projection::new_pair(kernels, format, i, h);
    let down = Projection::new(kernels, format, h, i);
    match dtype {
        DType::F32 => Some(Box::new(Block::<f32>::new(glu, gate_up, down, down_multiplier)?)),
        DType::BF16 => Some(Box::new(Block::<bf16>::new(glu, gate_up, down, down_multiplier)?)),
        DType::F16 => Some(Box::new(Block::<f16>::new(glu, gate_up, down, down_multiplier)?)),
        _ => None,
    }
}

/// A tensor of rank 2, with its strides.
pub(super) fn matrix<'a, T: WithDType>(
    storage: &'a CpuStorage,
    layout: &Layout,
) -> Result<Matrix<'a, T>> {
    let data = T::cpu_storage_as_slice(storage).map_err(Error::Candle)?;
    let (rows, k) = layout.shape().dims2().map_err(Error::Candle)?;
    let strides = (layout.stride()[0], layout.stride()[1]);
    Ok(Matrix { data: data.get(layout.start_offset()..).unwrap_or_default(), rows, k, strides })
}

fn read_rows<T: Io + Stored>(
    projection: &Projection,
    columns: Columns,
    rows: &mut dyn Iterator<Item = usize>,
) -> CpuStorage {
    let k = projection.weight.layout.k();
    let mut data: Vec<T> = vec![];
    for row in rows {
        let start = data.len();
        data.resize(start + k, T::default());
        projection.weight.read_row(columns, row, &mut data[start..]);
    }
    T::to_cpu_storage_owned(data)
}

impl<T: Io + Stored> LinearLayer for Linear<T> {
    fn set_weight(&mut self, storage: &CpuStorage, layout: &Layout) -> Result<()> {
        self.projection.weight.fill::<T>(Columns::All, matrix(storage, layout)?);
        Ok(())
    }

    fn set_bias(&mut self, bias: &[f32]) {
        self.projection.set_bias(Columns::All, bias);
    }

    fn rows(&self, rows: &mut dyn Iterator<Item = usize>) -> CpuStorage {
        read_rows::<T>(&self.projection, Columns::All, rows)
    }

    fn bias(&self) -> Option<Vec<f32>> {
        self.projection.bias(Columns::All)
    }

    fn low_rank(&self, a: Operand, b: Operand) -> Result<LowRank> {
        LowRank::new::<T>(&self.projection, a, &[b])
    }

    fn matrix(&self) -> PackedMatrix {
        self.projection.matrix(Columns::All)
    }

    fn forward(&self, (x, layout): Operand, low_rank: Option<&LowRank>) -> Result<CpuStorage> {
        Ok(T::to_cpu_storage_owned(Linear::forward(self, matrix(x, layout)?, low_rank)))
    }

    fn forward_f32(&self, (x, layout): Operand, low_rank: Option<&LowRank>) -> Result<CpuStorage> {
        Ok(CpuStorage::F32(Linear::forward_f32(self, matrix(x, layout)?, low_rank)))
    }
}

/// The columns of a projection that a weight becomes.
fn columns(which: Which) -> Columns {
    match which {
        Which::Gate => Columns::FirstHalf,
        Which::Up => Columns::SecondHalf,
        Which::Down => Columns::All,
    }
}

impl<T> Block<T> {
    fn projection(&self, which: Which) -> &Projection {
        if which == Which::Down { &self.down } else { &self.gate_up }
    }

    fn projection_mut(&mut self, which: Which) -> &mut Projection {
        if which == Which::Down { &mut self.down } else { &mut self.gate_up }
    }
}

impl<T: Io + Stored> BlockLayer for Block<T> {
    fn set_weight(&mut self, which: Which, storage: &CpuStorage, layout: &Layout) -> Result<()> {
        self.projection_mut(which).weight.fill::<T>(columns(which), matrix(storage, layout)?);
        Ok(())
    }

    fn set_bias(&mut self, which: Which, bias: &[f32]) {
        self.projection_mut(which).set_bias(columns(which), bias);
    }

    fn rows(&self, which: Which, rows: &mut dyn Iterator<Item = usize>) -> CpuStorage {
        read_rows::<T>(self.projection(which), columns(which), rows)
    }

    fn bias(&self, which: Which) -> Option<Vec<f32>> {
        self.projection(which).bias(columns(which))
    }

    fn low_rank(&self, a: Operand, b: &[Operand]) -> Result<LowRank> {
        let base = if b.len() == 1 { &self.down } else { &self.gate_up };
        LowRank::new::<T>(base, a, b)
    }

    fn matrices(&self) -> [PackedMatrix; 3] {
        Which::ALL.map(|which| self.projection(which).matrix(columns(which)))
    }

    fn forward(&self, (x, layout): Operand, low_rank: [Option<&LowRank>; 2]) -> Result<CpuStorage> {
        Ok(T::to_cpu_storage_owned(Block::forward(self, matrix(x, layout)?, low_rank)))
    }

    fn bytes(&self) -> [&[u8]; 2] {
        [self.gate_up.weight.bytes(), self.down.weight.bytes()]
    }
}
