//! The block, one projection and the gate on CUDA. `README.md` beside this file lists the
//! conditions of each kernel.
//!
//! ```text
//! x (M,H)   gate_up_proj (2I,H), gate's rows first   down_proj (H,I)
//! few      h (M,I) = glu(x·Wgᵀ, x·Wuᵀ)    gate_up of decode.cu: the weights are read once, gate and up stay in registers
//!          y (M,H) = h·Wdᵀ                linear of decode.cu, which starts while gate_up still runs
//! more     p (M,2I) = x·Wguᵀ              cuBLAS, one product
//!          h = glu(p's halves)            gate.cu, by strides, no copy of a half
//!      or  h = glu(x·Wgᵀ, x·Wuᵀ)          prefill_sm90.cu, where `plan::prefill` says so
//!          y = h·Wdᵀ                      cuBLAS
//! ```
//!
//! 1. All work is queued on the stream of x's candle device, in order, and nothing waits for the
//!    device. h, p and y come from the stream's allocator, and chunks of rows reuse them
//!    (`plan::chunk_rows`). A call can therefore be captured in a CUDA graph. As for any candle
//!    operation, event tracking must be off if the device has a stream of its own.
//! 2. Kernels that wait by themselves start early (`launch::launch`). Before that wait they read
//!    only weights, and those are complete: `prepare` synchronises the stream once, when a layer is
//!    built.
//! 3. Products are summed in f32, and h and y are rounded once. Where p exists, gate and up are
//!    rounded too.
//! 4. A bias is added while the sum is still in f32. With cuBLAS it is y's first value, with β = α,
//!    and y may then be rounded twice.
//! 5. `plan::decode_rows` gives the most rows that count as few: 32, or 16 on Hopper in bf16 and
//!    f16.

mod functions;
mod gate;
mod launch;
mod plan;
mod products;

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::CudaStream;
use candle_core::cuda_backend::{CudaDevice, CudaStorage, WrapErr};
use candle_core::{DType, Layout, Result, Shape, bail};
use half::{bf16, f16};

use crate::device::{DeviceBlock, DeviceLinear};
use crate::gate::params::GluParams;
pub(crate) use functions::Functions;
pub(crate) use gate::{gate_backward, gate_forward};
use launch::{Element, LaunchContext, Pointer, Weight, contiguous, weight};
pub use plan::{Prefill, force_prefill};
use products::{Operands, Projection};

/// Whether the kernels of the block and of the projection run on this device in this dtype: compute
/// capability 8.0 or newer. Elsewhere candle's operations are used.
pub(crate) fn supports(device: &CudaDevice, dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::BF16 | DType::F16) && supports_glu(device, dtype)
}

/// Whether the gate's kernels run there, f64 included.
pub(crate) fn supports_glu(device: &CudaDevice, dtype: DType) -> bool {
    let floats = matches!(dtype, DType::F64 | DType::F32 | DType::BF16 | DType::F16);
    floats && functions::major(device).is_some_and(|major| major >= 8)
}

/// The code that runs: `cuda-sm80`, `cuda-sm90`, or `cuda` where the driver has compiled the PTX
/// for a newer device.
pub(crate) fn kernel_name(device: &CudaDevice) -> &'static str {
    match functions::major(device) {
        Some(8) => "cuda-sm80",
        Some(9) => "cuda-sm90",
        _ => "cuda",
    }
}

/// Loads the kernels and waits until the weights that were written on the device's stream are
/// complete. A layer may be called afterwards.
pub(crate) fn prepare(device: &CudaDevice) -> Result<Arc<Functions>> {
    let functions = Functions::of(device)?;
    device.cuda_stream().synchronize().w()?;
    Ok(functions)
}

/// x (M,H) of any layout -> y (M,H), with functions that were loaded when the layer was built.
pub(crate) fn block(
    functions: &Functions,
    block: &DeviceBlock,
    x: &CudaStorage,
    layout: &Layout,
) -> Result<(CudaStorage, Shape)> {
    match x.dtype() {
        DType::BF16 => block_of::<bf16>(functions, block, x, layout),
        DType::F16 => block_of::<f16>(functions, block, x, layout),
        DType::F32 => block_of::<f32>(functions, block, x, layout),
        other => bail!("the CUDA block takes bf16, f16 and f32, found {other:?}"),
    }
}

/// x (M,K) of any layout, weight (N,K), bias (N) -> y (M,N) = x·Wᵀ + b
pub(crate) fn linear(
    functions: &Functions,
    linear: &DeviceLinear,
    x: &CudaStorage,
    layout: &Layout,
) -> Result<(CudaStorage, Shape)> {
    match x.dtype() {
        DType::BF16 => linear_of::<bf16>(functions, linear, x, layout),
        DType::F16 => linear_of::<f16>(functions, linear, x, layout),
        DType::F32 => linear_of::<f32>(functions, linear, x, layout),
        other => bail!("the CUDA projection takes bf16, f16 and f32, found {other:?}"),
    }
}

/// x in place if it is contiguous and 16-byte aligned, else a copy.
struct Input<'a> {
    x: &'a CudaStorage,
    offset: usize,
    copy: Option<CudaStorage>,
}

impl<'a> Input<'a> {
    fn new<T: Element>(x: &'a CudaStorage, layout: &Layout, stream: &CudaStream) -> Result<Self> {
        if let Some((offset, _)) = layout.contiguous_offsets()
            && Pointer::read::<T>(x, offset, stream)?.is_aligned()
        {
            return Ok(Self { x, offset, copy: None });
        }
        Ok(Self { x, offset: 0, copy: Some(contiguous::<T>(x, layout)?) })
    }

    fn pointer<'b, T: Element>(&'b self, stream: &'b CudaStream) -> Result<Pointer<'b>> {
        Pointer::read::<T>(self.copy.as_ref().unwrap_or(self.x), self.offset, stream)
    }
}

fn block_of<T: Element>(
    functions: &Functions,
    block: &DeviceBlock,
    x: &CudaStorage,
    layout: &Layout,
) -> Result<(CudaStorage, Shape)> {
    let device = x.device();
    let stream = device.cuda_stream();
    let call = LaunchContext { device, stream: &stream, functions };
    let (m, h) = layout.shape().dims2()?;
    let i = block.gate_up.dim(0)? / 2;
    let (gate_up, down) = (weight(&block.gate_up)?, weight(&block.down)?);
    let gate_up_bias = block.gate_up_bias.as_ref().map(weight).transpose()?;
    let down_bias = block.down_bias.as_ref().map(weight).transpose()?;
    let rows = Input::new::<T>(x, layout, &stream)?;
    let mut y = call.alloc::<T>(m, h)?;
    {
        let operands = Operands {
            sizes: (m, h, i),
            x: rows.pointer::<T>(&stream)?,
            gate_up: gate_up.pointer::<T>(&stream)?,
            gate_up_bias: Weight::optional::<T>(&gate_up_bias, &stream)?,
            down: Projection {
                sizes: (h, i),
                weight: down.pointer::<T>(&stream)?,
                bias: Weight::optional::<T>(&down_bias, &stream)?,
                factor: block.down_multiplier,
            },
            y: Pointer::write(&mut y, &stream),
            glu: GluParams::from(&block.glu),
        };
        operands.run::<T>(&call)?;
    }
    Ok((CudaStorage::wrap_cuda_slice(y, device.clone()), Shape::from((m, h))))
}

fn linear_of<T: Element>(
    functions: &Functions,
    linear: &DeviceLinear,
    x: &CudaStorage,
    layout: &Layout,
) -> Result<(CudaStorage, Shape)> {
    let device = x.device();
    let stream = device.cuda_stream();
    let call = LaunchContext { device, stream: &stream, functions };
    let (m, _) = layout.shape().dims2()?;
    let (n, k) = linear.weight.dims2()?;
    let (matrix, bias) = (weight(&linear.weight)?, linear.bias.as_ref().map(weight).transpose()?);
    let rows = Input::new::<T>(x, layout, &stream)?;
    let mut y = call.alloc::<T>(m, n)?;
    {
        let projection = Projection {
            sizes: (n, k),
            weight: matrix.pointer::<T>(&stream)?,
            bias: Weight::optional::<T>(&bias, &stream)?,
            factor: 1.0,
        };
        let (x, y) = (rows.pointer::<T>(&stream)?, Pointer::write(&mut y, &stream));
        projection.run::<T>(&call, (&x, y.address), m)?;
    }
    Ok((CudaStorage::wrap_cuda_slice(y, device.clone()), Shape::from((m, n))))
}
