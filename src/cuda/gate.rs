//! `glu_mul` and its gradient on CUDA: one launch each.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaStorage;
use candle_core::{DType, Layout, Result, bail};
use half::{bf16, f16};

use super::launch::{Element, GluOp, Pointer, arguments, contiguous, launch};
use super::module::{Kernels, Name};
use super::{Call, NULL};
use crate::activation::Glu;

/// An operand as candle passes it.
pub(crate) type Operand<'a> = (&'a CudaStorage, &'a Layout);

/// gate, up (…) of any layout -> act(gate) ⊙ up (…)
pub(crate) fn gate_forward(glu: &Glu, operands: [Operand<'_>; 2]) -> Result<CudaStorage> {
    match operands[0].0.dtype() {
        DType::BF16 => mul::<bf16>(glu, operands),
        DType::F16 => mul::<f16>(glu, operands),
        DType::F32 => mul::<f32>(glu, operands),
        DType::F64 => mul::<f64>(glu, operands),
        other => bail!("glu_mul on CUDA takes floats, found {other:?}"),
    }
}

/// gate, up, dy (…) of any layout -> dgate, then dup (2,…)
pub(crate) fn gate_backward(glu: &Glu, operands: [Operand<'_>; 3]) -> Result<CudaStorage> {
    match operands[0].0.dtype() {
        DType::BF16 => gradient::<bf16>(glu, operands),
        DType::F16 => gradient::<f16>(glu, operands),
        DType::F32 => gradient::<f32>(glu, operands),
        DType::F64 => gradient::<f64>(glu, operands),
        other => bail!("the gradient of glu_mul on CUDA takes floats, found {other:?}"),
    }
}

/// N operands of one shape as rows of adjacent columns, each with its own distance between rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Strided<const N: usize> {
    rows: usize,
    columns: usize,
    strides: [usize; N],
}

impl<const N: usize> Strided<N> {
    /// None if the operands do not lie so.
    fn of(layouts: [&Layout; N]) -> Option<Self> {
        // Dimensions (size, strides) that no operand steps through as one are kept apart.
        let mut dims: Vec<(usize, [usize; N])> = vec![];
        for (d, &size) in layouts[0].dims().iter().enumerate().filter(|&(_, &size)| size != 1) {
            let strides = layouts.map(|layout| layout.stride()[d]);
            match dims.last_mut() {
                Some((outer, last)) if (0..N).all(|n| last[n] == size * strides[n]) => {
                    (*outer, *last) = (*outer * size, strides)
                }
                _ => dims.push((size, strides)),
            }
        }
        let adjacent = |strides: &[usize; N]| strides.iter().all(|&stride| stride == 1);
        match dims[..] {
            [] => Some(Self { rows: 1, columns: 1, strides: [1; N] }),
            [(columns, strides)] if adjacent(&strides) => Some(Self { rows: 1, columns, strides: [columns; N] }),
            [(rows, strides)] => Some(Self { rows, columns: 1, strides }),
            [(rows, strides), (columns, inner)] if adjacent(&inner) => Some(Self { rows, columns, strides }),
            _ => None,
        }
    }
}

/// Operands that lie in rows, copied where they did not.
struct Laid<'a, const N: usize> {
    operands: [Operand<'a>; N],
    copies: [Option<CudaStorage>; N],
    strided: Strided<N>,
}

impl<'a, const N: usize> Laid<'a, N> {
    fn new<T: Element>(operands: [Operand<'a>; N]) -> Result<Self> {
        if let Some(strided) = Strided::of(operands.map(|(_, layout)| layout)) {
            return Ok(Self { operands, copies: [const { None }; N], strided });
        }
        let mut copies = [const { None }; N];
        for (copy, (storage, layout)) in copies.iter_mut().zip(operands) {
            if !layout.is_contiguous() {
                *copy = Some(contiguous::<T>(storage, layout)?);
            }
        }
        let columns = operands[0].1.shape().elem_count();
        Ok(Self { operands, copies, strided: Strided { rows: 1, columns, strides: [columns; N] } })
    }

    fn read<'b, T: Element>(&'b self, n: usize, call: &'b Call<'_>) -> Result<Pointer<'b>> {
        let (storage, layout) = self.operands[n];
        match &self.copies[n] {
            Some(copy) => Pointer::read::<T>(copy, 0, call.stream),
            None => Pointer::read::<T>(storage, layout.start_offset(), call.stream),
        }
    }
}

fn mul<T: Element>(glu: &Glu, operands: [Operand<'_>; 2]) -> Result<CudaStorage> {
    let device = operands[0].0.device();
    let (stream, kernels) = (device.cuda_stream(), Kernels::of(device)?);
    let call = Call { device, stream: &stream, kernels: &kernels };
    let elements = operands[0].1.shape().elem_count();
    let mut out = call.alloc::<T>(1, elements)?;
    if elements > 0 {
        let laid = Laid::new::<T>(operands)?;
        let Strided { rows, columns, strides: [gate_stride, up_stride] } = laid.strided;
        let (gate, up) = (laid.read::<T>(0, &call)?, laid.read::<T>(1, &call)?);
        let out = Pointer::write(&mut out, &stream);
        let sizes = [rows, columns, gate_stride, up_stride, columns].map(|size| size as i64);
        let [r, c, gs, us, os] = sizes;
        let op = GluOp::from(glu);
        let list = arguments![gate.address, up.address, NULL.address, NULL.address, out.address, r, c, gs, us, os, op];
        let name = Name { op: "glu_mul", family: "", dtype: T::NAME, variant: "" };
        // SAFETY: the arguments of glu_mul_*; gate and up have rows of adjacent columns at these strides, out has rows·columns elements.
        unsafe { launch(&stream, kernels.get(name)?, call.elementwise_grid::<T>(rows, columns), false, list)? };
    }
    Ok(CudaStorage::wrap_cuda_slice(out, device.clone()))
}

fn gradient<T: Element>(glu: &Glu, operands: [Operand<'_>; 3]) -> Result<CudaStorage> {
    let device = operands[0].0.device();
    let (stream, kernels) = (device.cuda_stream(), Kernels::of(device)?);
    let call = Call { device, stream: &stream, kernels: &kernels };
    let elements = operands[0].1.shape().elem_count();
    let mut out = call.alloc::<T>(2, elements)?;
    if elements > 0 {
        let laid = Laid::new::<T>(operands)?;
        let Strided { rows, columns, strides } = laid.strided;
        let [gate, up, dy] = [laid.read::<T>(0, &call)?, laid.read::<T>(1, &call)?, laid.read::<T>(2, &call)?];
        let out = Pointer::write(&mut out, &stream);
        let (dgate, dup) = (out.address, out.address + (elements * size_of::<T>()) as u64);
        let [r, c, s] = [rows, columns, columns].map(|size| size as i64);
        let [gs, us, ds] = strides.map(|stride| stride as i64);
        let op = GluOp::from(glu);
        let list = arguments![gate.address, up.address, dy.address, dgate, dup, r, c, gs, us, ds, s, s, op];
        let name = Name { op: "glu_grad", family: "", dtype: T::NAME, variant: "" };
        // SAFETY: the arguments of glu_grad_*; the inputs have rows of adjacent columns at these strides, dgate and dup rows·columns
        // elements each.
        unsafe { launch(&stream, kernels.get(name)?, call.elementwise_grid::<T>(rows, columns), false, list)? };
    }
    Ok(CudaStorage::wrap_cuda_slice(out, device.clone()))
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;

    /// The rows of a pair of views of one zero tensor (dims), as `Strided` sees them.
    fn strided(dims: &[usize], view: impl Fn(&Tensor) -> Result<[Tensor; 2]>) -> Result<Option<(usize, usize, [usize; 2])>> {
        let [a, b] = view(&Tensor::zeros(dims, DType::F32, &Device::Cpu)?)?;
        let found = Strided::of([a.layout(), b.layout()]);
        Ok(found.map(|s| (s.rows, s.columns, s.strides)))
    }

    #[test]
    fn views_as_rows() -> Result<()> {
        let whole = |t: &Tensor| Ok([t.clone(), t.clone()]);
        assert_eq!(strided(&[3, 4, 5], whole)?, Some((1, 60, [60, 60])));
        assert_eq!(strided(&[], whole)?, Some((1, 1, [1, 1])));
        assert_eq!(strided(&[1, 1], whole)?, Some((1, 1, [1, 1])));
        let halves = |t: &Tensor| Ok([t.narrow(1, 0, 7)?, t.narrow(1, 7, 7)?]);
        assert_eq!(strided(&[6, 14], halves)?, Some((6, 7, [14, 14])));
        let interleaved = |t: &Tensor| Ok([t.narrow(2, 0, 1)?.squeeze(2)?, t.narrow(2, 1, 1)?.squeeze(2)?]);
        assert_eq!(strided(&[6, 7, 2], interleaved)?, Some((42, 1, [2, 2])));
        let broadcast = |t: &Tensor| Ok([t.narrow(0, 0, 1)?.broadcast_as((6, 7))?, t.clone()]);
        assert_eq!(strided(&[6, 7], broadcast)?, Some((6, 7, [0, 7])));
        let batches = |t: &Tensor| Ok([t.narrow(2, 0, 7)?, t.narrow(2, 7, 7)?]);
        assert_eq!(strided(&[2, 3, 14], batches)?, Some((6, 7, [14, 14])));
        Ok(())
    }

    #[test]
    fn views_that_are_copied() -> Result<()> {
        let transposed = |t: &Tensor| Ok([t.t()?, t.t()?]);
        assert_eq!(strided(&[6, 7], transposed)?, None);
        let columns = |t: &Tensor| Ok([t.broadcast_as((6, 7))?, t.broadcast_as((6, 7))?]);
        assert_eq!(strided(&[6, 1], columns)?, None);
        let middle = |t: &Tensor| Ok([t.narrow(1, 1, 2)?.narrow(2, 0, 3)?, t.narrow(1, 0, 2)?.narrow(2, 1, 3)?]);
        assert_eq!(strided(&[4, 3, 5], middle)?, None);
        Ok(())
    }
}
