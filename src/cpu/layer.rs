//! Packed weights of any dtype behind one interface, in candle's terms.

use candle_core::{CpuStorage, DType, Layout, WithDType};
use half::{bf16, f16};

use super::Kernel;
use super::gemm::GemmElement;
use super::pack::{Matrix, Place};
use super::pass::{Block, Projection};
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
    /// Reads all packed weights with all threads, as a sweep over them would: the floor of a decode step. Gives their sum mod 2³².
    fn read(&self, streams: usize) -> u32;
    /// x (M, k) of any layout -> y (M, columns)
    fn forward(&self, storage: &CpuStorage, layout: &Layout) -> Result<CpuStorage>;
    /// The same with y in f32, not rounded to the dtype of the weights; none if this layer has no such output.
    fn forward_f32(&self, _: &CpuStorage, _: &Layout) -> Result<Option<CpuStorage>> {
        Ok(None)
    }
}

/// y = x·Wᵀ + b with W (columns, k); none if the kernels do not take `dtype`.
pub(crate) fn linear(kernel: &'static Kernel, dtype: DType, columns: usize, k: usize) -> Option<Box<dyn Layer>> {
    fn new<T: GemmElement + WithDType>(kernel: &'static Kernel, columns: usize, k: usize) -> Option<Box<dyn Layer>> {
        Some(Box::new(LinearLayer { kernel, projection: Projection::<T>::new(kernel, columns, k) }))
    }
    match dtype {
        DType::F32 => new::<f32>(kernel, columns, k),
        DType::BF16 => new::<bf16>(kernel, columns, k),
        DType::F16 => new::<f16>(kernel, columns, k),
        _ => None,
    }
}

/// The block of these sizes; none if the kernels do not take `dtype`.
pub(crate) fn block(
    kernel: &'static Kernel,
    dtype: DType,
    (hidden_size, intermediate_size): (usize, usize),
    glu: Glu,
    down_multiplier: f32,
) -> Option<Box<dyn Layer>> {
    fn new<T: GemmElement + WithDType>(
        kernel: &'static Kernel,
        (h, i): (usize, usize),
        glu: Glu,
        down_multiplier: f32,
    ) -> Option<Box<dyn Layer>> {
        let gate_up = Projection::<T>::new_pair(kernel, i, h);
        Some(Box::new(Block { kernel, glu, gate_up, down: Projection::new(kernel, h, i), down_multiplier }))
    }
    let sizes = (hidden_size, intermediate_size);
    match dtype {
        DType::F32 => new::<f32>(kernel, sizes, glu, down_multiplier),
        DType::BF16 => new::<bf16>(kernel, sizes, glu, down_multiplier),
        DType::F16 => new::<f16>(kernel, sizes, glu, down_multiplier),
        _ => None,
    }
}

struct LinearLayer<T> {
    kernel: &'static Kernel,
    projection: Projection<T>,
}

/// A tensor of rank 2 as it lies.
fn matrix<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<Matrix<'a, T>> {
    let data = T::cpu_storage_as_slice(storage).map_err(Error::Candle)?;
    let (rows, k) = layout.shape().dims2().map_err(Error::Candle)?;
    let strides = (layout.stride()[0], layout.stride()[1]);
    Ok(Matrix { data: data.get(layout.start_offset()..).unwrap_or_default(), rows, k, strides })
}

fn read_rows<T: GemmElement + WithDType>(
    projection: &Projection<T>,
    place: Place,
    rows: &mut dyn Iterator<Item = usize>,
) -> CpuStorage {
    let k = projection.weight.k();
    let mut data: Vec<T> = vec![];
    for row in rows {
        let start = data.len();
        data.resize(start + k, T::default());
        projection.weight.read_row(place, row, &mut data[start..]);
    }
    T::to_cpu_storage_owned(data)
}

impl<T: GemmElement + WithDType> Layer for LinearLayer<T> {
    fn set_weight(&mut self, _: Part, storage: &CpuStorage, layout: &Layout) -> Result<()> {
        self.projection.set_weight(Place::Whole, matrix(storage, layout)?);
        Ok(())
    }

    fn set_bias(&mut self, _: Part, bias: &[f32]) {
        self.projection.set_bias(Place::Whole, bias);
    }

    fn rows(&self, _: Part, rows: &mut dyn Iterator<Item = usize>) -> CpuStorage {
        read_rows(&self.projection, Place::Whole, rows)
    }

    fn bias(&self, _: Part) -> Option<Vec<f32>> {
        self.projection.bias(Place::Whole)
    }

    fn read(&self, streams: usize) -> u32 {
        self.projection.weight.read(self.kernel.sum_words, streams)
    }

    fn forward(&self, storage: &CpuStorage, layout: &Layout) -> Result<CpuStorage> {
        Ok(T::to_cpu_storage_owned(self.projection.forward(self.kernel, matrix(storage, layout)?)))
    }

    fn forward_f32(&self, storage: &CpuStorage, layout: &Layout) -> Result<Option<CpuStorage>> {
        Ok(Some(CpuStorage::F32(self.projection.forward_f32(self.kernel, matrix(storage, layout)?))))
    }
}

impl<T> Block<T> {
    fn part(&self, part: Part) -> (&Projection<T>, Place) {
        match part {
            Part::Gate => (&self.gate_up, Place::Gate),
            Part::Up => (&self.gate_up, Place::Up),
            Part::Down | Part::Whole => (&self.down, Place::Whole),
        }
    }

    fn part_mut(&mut self, part: Part) -> (&mut Projection<T>, Place) {
        match part {
            Part::Gate => (&mut self.gate_up, Place::Gate),
            Part::Up => (&mut self.gate_up, Place::Up),
            Part::Down | Part::Whole => (&mut self.down, Place::Whole),
        }
    }
}

impl<T: GemmElement + WithDType> Layer for Block<T> {
    fn set_weight(&mut self, part: Part, storage: &CpuStorage, layout: &Layout) -> Result<()> {
        let (projection, place) = self.part_mut(part);
        projection.set_weight(place, matrix(storage, layout)?);
        Ok(())
    }

    fn set_bias(&mut self, part: Part, bias: &[f32]) {
        let (projection, place) = self.part_mut(part);
        projection.set_bias(place, bias);
    }

    fn rows(&self, part: Part, rows: &mut dyn Iterator<Item = usize>) -> CpuStorage {
        let (projection, place) = self.part(part);
        read_rows(projection, place, rows)
    }

    fn bias(&self, part: Part) -> Option<Vec<f32>> {
        let (projection, place) = self.part(part);
        projection.bias(place)
    }

    fn read(&self, streams: usize) -> u32 {
        let read = |projection: &Projection<T>| projection.weight.read(self.kernel.sum_words, streams);
        let parts = [&self.gate_up, &self.down].map(read);
        parts[0].wrapping_add(parts[1])
    }

    fn forward(&self, storage: &CpuStorage, layout: &Layout) -> Result<CpuStorage> {
        Ok(T::to_cpu_storage_owned(Block::forward(self, matrix(storage, layout)?)))
    }
}
