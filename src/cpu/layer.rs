//! Layers with packed weights behind one interface, in candle's terms.

use candle_core::{CpuStorage, DType, Layout, WithDType};
use half::{bf16, f16};

use super::format::{Format, Stored};
use super::kernels::{CpuKernels, Io};
use super::matrix::Matrix;
use super::panels::Columns;
use super::pass::{Block, Linear, Projection};
use crate::activation::Glu;
use crate::error::{Error, Result};

/// Which weight of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Part {
    /// A linear layer's only one.
    Whole,
    /// gate_proj
    Gate,
    /// up_proj
    Up,
    /// down_proj
    Down,
}

/// A layer with packed weights, first of zeros, then as they are set.
pub(crate) trait Layer: Send + Sync {
    /// Packs a weight (rows, k) of any layout.
    fn set_weight(&mut self, part: Part, storage: &CpuStorage, layout: &Layout) -> Result<()>;
    /// Sets a bias (rows).
    fn set_bias(&mut self, part: Part, bias: &[f32]);
    /// These rows of a weight, one after the other, k elements each.
    fn rows(&self, part: Part, rows: &mut dyn Iterator<Item = usize>) -> CpuStorage;
    /// The bias (rows), if one was set.
    fn bias(&self, part: Part) -> Option<Vec<f32>>;
    /// The bytes of all packed weights, padding included.
    fn packed_bytes(&self) -> Vec<&[u8]>;
    /// x (M, k) of any layout -> y (M, columns)
    fn forward(&self, storage: &CpuStorage, layout: &Layout) -> Result<CpuStorage>;
    /// The same with y in f32, not rounded to the dtype of the weights; none if this layer has no such output.
    fn forward_f32(&self, _: &CpuStorage, _: &Layout) -> Result<Option<CpuStorage>> {
        Ok(None)
    }
}

/// y = x·Wᵀ + b with W (columns, k); none if the kernels do not support `dtype`.
pub(crate) fn linear(kernels: &'static CpuKernels, dtype: DType, columns: usize, k: usize) -> Option<Box<dyn Layer>> {
    let projection = Projection::new(kernels, Format::of(dtype)?, columns, k);
    fn boxed<T: Io + Stored>(projection: Projection) -> Option<Box<dyn Layer>> {
        Some(Box::new(Linear::<T>::new(projection)?))
    }
    match dtype {
        DType::F32 => boxed::<f32>(projection),
        DType::BF16 => boxed::<bf16>(projection),
        DType::F16 => boxed::<f16>(projection),
        _ => None,
    }
}

/// The block of these sizes; none if the kernels do not support `dtype`.
pub(crate) fn block(
    kernels: &'static CpuKernels,
    dtype: DType,
    (h, i): (usize, usize),
    glu: Glu,
    down_multiplier: f32,
) -> Option<Box<dyn Layer>> {
    let format = Format::of(dtype)?;
    let (gate_up, down) = (Projection::new_pair(kernels, format, i, h), Projection::new(kernels, format, h, i));
    match dtype {
        DType::F32 => Some(Box::new(Block::<f32>::new(glu, gate_up, down, down_multiplier)?)),
        DType::BF16 => Some(Box::new(Block::<bf16>::new(glu, gate_up, down, down_multiplier)?)),
        DType::F16 => Some(Box::new(Block::<f16>::new(glu, gate_up, down, down_multiplier)?)),
        _ => None,
    }
}

/// A tensor of rank 2 as it lies.
fn matrix<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<Matrix<'a, T>> {
    let data = T::cpu_storage_as_slice(storage).map_err(Error::Candle)?;
    let (rows, k) = layout.shape().dims2().map_err(Error::Candle)?;
    let strides = (layout.stride()[0], layout.stride()[1]);
    Ok(Matrix { data: data.get(layout.start_offset()..).unwrap_or_default(), rows, k, strides })
}

fn read_rows<T: Io + Stored>(projection: &Projection, columns: Columns, rows: &mut dyn Iterator<Item = usize>) -> CpuStorage {
    let k = projection.weight.k();
    let mut data: Vec<T> = vec![];
    for row in rows {
        let start = data.len();
        data.resize(start + k, T::default());
        projection.weight.read_row(columns, row, &mut data[start..]);
    }
    T::to_cpu_storage_owned(data)
}

impl<T: Io + Stored> Layer for Linear<T> {
    fn set_weight(&mut self, _: Part, storage: &CpuStorage, layout: &Layout) -> Result<()> {
        self.projection.weight.fill::<T>(Columns::All, matrix(storage, layout)?);
        Ok(())
    }

    fn set_bias(&mut self, _: Part, bias: &[f32]) {
        self.projection.set_bias(Columns::All, bias);
    }

    fn rows(&self, _: Part, rows: &mut dyn Iterator<Item = usize>) -> CpuStorage {
        read_rows::<T>(&self.projection, Columns::All, rows)
    }

    fn bias(&self, _: Part) -> Option<Vec<f32>> {
        self.projection.bias(Columns::All)
    }

    fn packed_bytes(&self) -> Vec<&[u8]> {
        vec![self.projection.weight.bytes()]
    }

    fn forward(&self, storage: &CpuStorage, layout: &Layout) -> Result<CpuStorage> {
        Ok(T::to_cpu_storage_owned(Linear::forward(self, matrix(storage, layout)?)))
    }

    fn forward_f32(&self, storage: &CpuStorage, layout: &Layout) -> Result<Option<CpuStorage>> {
        Ok(Some(CpuStorage::F32(Linear::forward_f32(self, matrix(storage, layout)?))))
    }
}

impl<T> Block<T> {
    fn part(&self, part: Part) -> (&Projection, Columns) {
        match part {
            Part::Gate => (&self.gate_up, Columns::FirstHalf),
            Part::Up => (&self.gate_up, Columns::SecondHalf),
            Part::Down | Part::Whole => (&self.down, Columns::All),
        }
    }

    fn part_mut(&mut self, part: Part) -> (&mut Projection, Columns) {
        match part {
            Part::Gate => (&mut self.gate_up, Columns::FirstHalf),
            Part::Up => (&mut self.gate_up, Columns::SecondHalf),
            Part::Down | Part::Whole => (&mut self.down, Columns::All),
        }
    }
}

impl<T: Io + Stored> Layer for Block<T> {
    fn set_weight(&mut self, part: Part, storage: &CpuStorage, layout: &Layout) -> Result<()> {
        let (projection, columns) = self.part_mut(part);
        projection.weight.fill::<T>(columns, matrix(storage, layout)?);
        Ok(())
    }

    fn set_bias(&mut self, part: Part, bias: &[f32]) {
        let (projection, columns) = self.part_mut(part);
        projection.set_bias(columns, bias);
    }

    fn rows(&self, part: Part, rows: &mut dyn Iterator<Item = usize>) -> CpuStorage {
        let (projection, columns) = self.part(part);
        read_rows::<T>(projection, columns, rows)
    }

    fn bias(&self, part: Part) -> Option<Vec<f32>> {
        let (projection, columns) = self.part(part);
        projection.bias(columns)
    }

    fn packed_bytes(&self) -> Vec<&[u8]> {
        vec![self.gate_up.weight.bytes(), self.down.weight.bytes()]
    }

    fn forward(&self, storage: &CpuStorage, layout: &Layout) -> Result<CpuStorage> {
        Ok(T::to_cpu_storage_owned(Block::forward(self, matrix(storage, layout)?)))
    }
}
