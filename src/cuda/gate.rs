//! The gate by itself on CUDA: one launch forward, one backward.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaStorage;
use candle_core::{DType, Layout, Result, bail};
use half::{bf16, f16};

use super::functions::Functions;
use super::launch::{Element, LaunchContext, NULL, Pointer, arguments, contiguous};
use super::plan::Kernel;
use crate::gate::Glu;
use crate::gate::params::GluParams;
use crate::gate::rows::Rows;

/// An operand as candle passes it.
pub(crate) type Operand<'a> = (&'a CudaStorage, &'a Layout);

/// gate, up (…) of any layout -> act(gate) ⊙ up (…)
pub(crate) fn gate_forward(glu: &Glu, operands: [Operand<'_>; 2]) -> Result<CudaStorage> {
    match operands[0].0.dtype() {
        DType::BF16 => forward::<bf16>(glu, operands),
        DType::F16 => forward::<f16>(glu, operands),
        DType::F32 => forward::<f32>(glu, operands),
        DType::F64 => forward::<f64>(glu, operands),
        other => bail!("the gate on CUDA takes floats, found {other:?}"),
    }
}

/// gate, up, dy (…) of any layout -> dgate, then dup (2,…)
pub(crate) fn gate_backward(glu: &Glu, operands: [Operand<'_>; 3]) -> Result<CudaStorage> {
    match operands[0].0.dtype() {
        DType::BF16 => backward::<bf16>(glu, operands),
        DType::F16 => backward::<f16>(glu, operands),
        DType::F32 => backward::<f32>(glu, operands),
        DType::F64 => backward::<f64>(glu, operands),
        other => bail!("the gate's gradient on CUDA takes floats, found {other:?}"),
    }
}

/// Operands as rows of adjacent columns; operands of any other layout are copied.
struct Laid<'a, const N: usize> {
    operands: [Operand<'a>; N],
    copies: [Option<CudaStorage>; N],
    rows: Rows<N>,
}

impl<'a, const N: usize> Laid<'a, N> {
    fn new<T: Element>(operands: [Operand<'a>; N]) -> Result<Self> {
        let rows = Rows::new(operands.map(|(_, layout)| layout));
        if let Some(rows) = rows.and_then(Rows::with_adjacent_columns) {
            return Ok(Self { operands, copies: [const { None }; N], rows });
        }
        let mut copies = [const { None }; N];
        for (copy, (storage, layout)) in copies.iter_mut().zip(operands) {
            if !layout.is_contiguous() {
                *copy = Some(contiguous::<T>(storage, layout)?);
            }
        }
        Ok(Self { operands, copies, rows: Rows::contiguous(operands[0].1.shape().elem_count()) })
    }

    fn read<'b, T: Element>(
        &'b self,
        n: usize,
        call: &'b LaunchContext<'_>,
    ) -> Result<Pointer<'b>> {
        let (storage, layout) = self.operands[n];
        match &self.copies[n] {
            Some(copy) => Pointer::read::<T>(copy, 0, call.stream),
            None => Pointer::read::<T>(storage, layout.start_offset(), call.stream),
        }
    }
}

fn forward<T: Element>(glu: &Glu, operands: [Operand<'_>; 2]) -> Result<CudaStorage> {
    let device = operands[0].0.device();
    let (stream, functions) = (device.cuda_stream(), Functions::of(device)?);
    let call = LaunchContext { device, stream: &stream, functions: &functions };
    let elements = operands[0].1.shape().elem_count();
    let mut out = call.alloc::<T>(1, elements)?;
    if elements > 0 {
        let laid = Laid::new::<T>(operands)?;
        let Rows { rows, columns, strides: [gate_stride, up_stride] } = laid.rows;
        let (gate, up) = (laid.read::<T>(0, &call)?, laid.read::<T>(1, &call)?);
        let out = Pointer::write(&mut out, &stream);
        let sizes =
            [rows, columns, gate_stride.row, up_stride.row, columns].map(|size| size as i64);
        let [r, c, gs, us, os] = sizes;
        let op = GluParams::from(glu);
        let list = arguments![
            gate.address,
            up.address,
            NULL.address,
            NULL.address,
            out.address,
            r,
            c,
            gs,
            us,
            os,
            op
        ];
        // SAFETY: the arguments of gate_forward_*; gate and up have rows of adjacent columns at
        // these strides, and out has rows·columns elements.
        unsafe { call.launch::<T>(call.over::<T>(Kernel::GateForward, rows, columns), list)? };
    }
    Ok(CudaStorage::wrap_cuda_slice(out, device.clone()))
}

fn backward<T: Element>(glu: &Glu, operands: [Operand<'_>; 3]) -> Result<CudaStorage> {
    let device = operands[0].0.device();
    let (stream, functions) = (device.cuda_stream(), Functions::of(device)?);
    let call = LaunchContext { device, stream: &stream, functions: &functions };
    let elements = operands[0].1.shape().elem_count();
    let mut out = call.alloc::<T>(2, elements)?;
    if elements > 0 {
        let laid = Laid::new::<T>(operands)?;
        let Rows { rows, columns, strides } = laid.rows;
        let [gate, up, dy] =
            [laid.read::<T>(0, &call)?, laid.read::<T>(1, &call)?, laid.read::<T>(2, &call)?];
        let out = Pointer::write(&mut out, &stream);
        let (dgate, dup) = (out.address, out.address + (elements * size_of::<T>()) as u64);
        let [r, c, s] = [rows, columns, columns].map(|size| size as i64);
        let [gs, us, ds] = strides.map(|stride| stride.row as i64);
        let op = GluParams::from(glu);
        let list = arguments![
            gate.address,
            up.address,
            dy.address,
            dgate,
            dup,
            r,
            c,
            gs,
            us,
            ds,
            s,
            s,
            op
        ];
        // SAFETY: the arguments of gate_backward_*; the inputs have rows of adjacent columns at
        // these strides, and dgate and dup have rows·columns elements each.
        unsafe { call.launch::<T>(call.over::<T>(Kernel::GateBackward, rows, columns), list)? };
    }
    Ok(CudaStorage::wrap_cuda_slice(out, device.clone()))
}
