//! Packed layers of any dtype behind one interface, over candle's storage.

use candle_core::{CpuStorage, DType, Layout, WithDType};
use half::{bf16, f16};

use super::Kernel;
use super::gemm::GemmElement;
use super::pack::{Matrix, Place};
use super::pass::{Block, Projection};
use crate::activation::Glu;
use crate::error::{Error, Result};
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
    /// x (M, k) of any layout -> y (M, columns)
    fn forward(&self, storage: &CpuStorage, layout: &Layout) -> Result<CpuStorage>;
    /// x (M, k) of any layout -> y (M, columns) in f32, not rounded to the dtype of the weight
    fn forward_f32(&self, storage: &CpuStorage, layout: &Layout) -> Result<CpuStorage>;
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
    /// x (M, H) of any layout -> y (M, H)
    fn forward(&self, storage: &CpuStorage, layout: &Layout) -> Result<CpuStorage>;
    /// The memory of gate and up, and of down.
    fn bytes(&self) -> [&[u8]; 2];
}

/// y = x·Wᵀ + b with W (columns, k); none if the kernels do not take `dtype`.
pub(crate) fn linear(kernel: &'static Kernel, dtype: DType, columns: usize, k: usize) -> Option<Box<dyn LinearLayer>> {
    fn new<T: GemmElement + WithDType>(kernel: &'static Kernel, columns: usize, k: usize) -> Option<Box<dyn LinearLayer>> {
        Some(Box::new(Linear { kernel, projection: Projection::<T>::new(kernel, columns, k) }))
    }
    match dtype {
        DType::F32 => new::<f32>(kernel, columns, k),
        DType::BF16 => new::<bf16>(kernel, columns, k),
        DType::F16 => new::<f16>(kernel, columns, k),
        _ => None,
    }
}

/// The block of sizes (H, I); none if the kernels do not take `dtype`.
pub(crate) fn block(
    kernel: &'static Kernel,
    dtype: DType,
    sizes: (usize, usize),
    glu: Glu,
    down_multiplier: f32,
) -> Option<Box<dyn BlockLayer>> {
    fn new<T: GemmElement + WithDType>(
        kernel: &'static Kernel,
        (h, i): (usize, usize),
        glu: Glu,
        down_multiplier: f32,
    ) -> Option<Box<dyn BlockLayer>> {
        let gate_up = Projection::<T>::new_pair(kernel, i, h);
        Some(Box::new(Block { kernel, glu, gate_up, down: Projection::new(kernel, h, i), down_multiplier }))
    }
    match dtype {
        DType::F32 => new::<f32>(kernel, sizes, glu, down_multiplier),
        DType::BF16 => new::<bf16>(kernel, sizes, glu, down_multiplier),
        DType::F16 => new::<f16>(kernel, sizes, glu, down_multiplier),
        _ => None,
    }
}

struct Linear<T> {
    kernel: &'static Kernel,
    projection: Projection<T>,
}

/// A tensor of rank 2, with its strides.
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

impl<T: GemmElement + WithDType> LinearLayer for Linear<T> {
    fn set_weight(&mut self, storage: &CpuStorage, layout: &Layout) -> Result<()> {
        self.projection.set_weight(Place::Whole, matrix(storage, layout)?);
        Ok(())
    }

    fn set_bias(&mut self, bias: &[f32]) {
        self.projection.set_bias(Place::Whole, bias);
    }

    fn rows(&self, rows: &mut dyn Iterator<Item = usize>) -> CpuStorage {
        read_rows(&self.projection, Place::Whole, rows)
    }

    fn bias(&self) -> Option<Vec<f32>> {
        self.projection.bias(Place::Whole)
    }

    fn forward(&self, storage: &CpuStorage, layout: &Layout) -> Result<CpuStorage> {
        Ok(T::to_cpu_storage_owned(self.projection.forward(self.kernel, matrix(storage, layout)?)))
    }

    fn forward_f32(&self, storage: &CpuStorage, layout: &Layout) -> Result<CpuStorage> {
        Ok(CpuStorage::F32(self.projection.forward_f32(self.kernel, matrix(storage, layout)?)))
    }
}

/// The columns of a projection that a weight becomes.
fn place(which: Which) -> Place {
    match which {
        Which::Gate => Place::Gate,
        Which::Up => Place::Up,
        Which::Down => Place::Whole,
    }
}

impl<T> Block<T> {
    fn projection(&self, which: Which) -> &Projection<T> {
        if which == Which::Down { &self.down } else { &self.gate_up }
    }

    fn projection_mut(&mut self, which: Which) -> &mut Projection<T> {
        if which == Which::Down { &mut self.down } else { &mut self.gate_up }
    }
}

impl<T: GemmElement + WithDType> BlockLayer for Block<T> {
    fn set_weight(&mut self, which: Which, storage: &CpuStorage, layout: &Layout) -> Result<()> {
        self.projection_mut(which).set_weight(place(which), matrix(storage, layout)?);
        Ok(())
    }

    fn set_bias(&mut self, which: Which, bias: &[f32]) {
        self.projection_mut(which).set_bias(place(which), bias);
    }

    fn rows(&self, which: Which, rows: &mut dyn Iterator<Item = usize>) -> CpuStorage {
        read_rows(self.projection(which), place(which), rows)
    }

    fn bias(&self, which: Which) -> Option<Vec<f32>> {
        self.projection(which).bias(place(which))
    }

    fn forward(&self, storage: &CpuStorage, layout: &Layout) -> Result<CpuStorage> {
        Ok(T::to_cpu_storage_owned(Block::forward(self, matrix(storage, layout)?)))
    }

    fn bytes(&self) -> [&[u8]; 2] {
        [self.gate_up.weight.memory(), self.down.weight.memory()]
    }
}
