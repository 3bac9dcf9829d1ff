//! Binds buffers and dispatches kernels.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{
    DType, Layout, MetalDevice, MetalError, MetalStorage, Result, Shape, Storage, Tensor,
};
use candle_metal_kernels::metal::{Buffer, ComputeCommandEncoder};
use candle_metal_kernels::{BufferOffset, GemmDType, Output, call_mlx_gemm, set_params};
use objc2_metal::MTLSize;

use super::pipeline::pipeline;
use super::plan::{Choice, Kernel, Product, ProductParameters, THREADS};
use crate::device::{DeviceBlock, DeviceLinear};
use crate::gate::activation::Glu;

/// x (M,H) contiguous -> y (M,H), in two dispatches
pub(crate) fn block(
    block: &DeviceBlock,
    x: &MetalStorage,
    layout: &Layout,
) -> Result<(MetalStorage, Shape)> {
    let rows = layout.shape().dims2()?.0;
    let gate_up = Projection {
        weight: &block.gate_up,
        bias: block.gate_up_bias.as_ref(),
        glu: Some(block.glu),
        factor: 1.0,
    };
    let factor = block.down_multiplier;
    let down =
        Projection { weight: &block.down, bias: block.down_bias.as_ref(), glu: None, factor };
    let h = gate_up.run(x.device(), x.buffer(), layout.start_offset(), rows)?; // (M,I)
    let y = down.run(x.device(), &h, 0, rows)?;
    let shape = Shape::from((rows, block.down.dim(0)?));
    Ok((MetalStorage::new(y, x.device().clone(), shape.elem_count(), x.dtype()), shape))
}

/// x (M,in) contiguous -> y (M,out)
pub(crate) fn linear(
    linear: &DeviceLinear,
    x: &MetalStorage,
    layout: &Layout,
) -> Result<(MetalStorage, Shape)> {
    let rows = layout.shape().dims2()?.0;
    let projection =
        Projection { weight: &linear.weight, bias: linear.bias.as_ref(), glu: None, factor: 1.0 };
    let y = projection.run(x.device(), x.buffer(), layout.start_offset(), rows)?;
    let shape = Shape::from((rows, linear.weight.dim(0)?));
    Ok((MetalStorage::new(y, x.device().clone(), shape.elem_count(), x.dtype()), shape))
}

// ---------------------------------------------------------------- products

/// x·Wᵀ with its bias, and the gate or the factor that follows.
struct Projection<'a> {
    /// (columns, k), or (2·columns, k) with a gate
    weight: &'a Tensor,
    bias: Option<&'a Tensor>,
    glu: Option<Glu>,
    factor: f32,
}

impl Projection<'_> {
    /// x (rows, k), contiguous and starting at element `x_start` -> (rows, columns)
    fn run(
        &self,
        device: &MetalDevice,
        x: &Buffer,
        x_start: usize,
        rows: usize,
    ) -> Result<Arc<Buffer>> {
        let (weight_rows, k) = self.weight.dims2()?;
        let columns = if self.glu.is_some() { weight_rows / 2 } else { weight_rows };
        let product = Product {
            rows,
            columns,
            k,
            glu: self.glu,
            has_bias: self.bias.is_some(),
            factor: self.factor,
        };
        let parameters = product.parameters();
        let parameters = parameters
            .ok_or_else(|| candle_core::Error::Msg(format!("too large for Metal: {product:?}")))?;
        let dtype = self.weight.dtype();
        let out = device
            .new_buffer_builder()
            .with_size_for(rows * columns, dtype)
            .with_label("swiglu")
            .build()?;
        if rows * columns > 0 {
            self.encode(device, &product, parameters, (x, x_start), &out)?;
        }
        Ok(out)
    }

    fn encode(
        &self,
        device: &MetalDevice,
        product: &Product,
        parameters: ProductParameters,
        (x, x_start): (&Buffer, usize),
        out: &Buffer,
    ) -> Result<()> {
        let dtype = self.weight.dtype();
        let (weight, weight_layout) = self.weight.storage_and_layout();
        let weight = on_metal(&weight)?;
        let at = |buffer, start: usize| BufferOffset {
            buffer,
            offset_in_bytes: start * dtype.size_in_bytes(),
        };
        let (x, w) = (at(x, x_start), at(weight.buffer(), weight_layout.start_offset()));
        let kernel = match product.choice() {
            Choice::Kernel(kernel) => kernel,
            Choice::Candle => return gemm(device, dtype, product, (&x, &w), out),
        };
        let aligned = product.is_aligned(dtype, [x_start, weight_layout.start_offset()]);
        let launch =
            Launch { kernel, dtype, aligned, grid: product.grid(kernel), rows: product.rows };
        // Without a bias some buffer must still be bound. It is the weight, which the kernel does
        // not read as a bias.
        let Some(bias) = self.bias else {
            return dispatch(device, launch, |encoder| {
                set_params!(encoder, (&x, &w, &w, Output::new(out), &[parameters][..]));
            });
        };
        let (bias, bias_layout) = bias.storage_and_layout();
        let bias = at(on_metal(&bias)?.buffer(), bias_layout.start_offset());
        dispatch(device, launch, |encoder| {
            set_params!(encoder, (&x, &w, &bias, Output::new(out), &[parameters][..]));
        })
    }
}

/// x (rows, k) · w (columns, k)ᵀ -> out (rows, columns), with candle's GEMM
fn gemm(
    device: &MetalDevice,
    dtype: DType,
    product: &Product,
    (x, w): (&BufferOffset, &BufferOffset),
    out: &Buffer,
) -> Result<()> {
    let gemm_dtype = match dtype {
        DType::F32 => GemmDType::F32,
        DType::F16 => GemmDType::F16,
        DType::BF16 => GemmDType::BF16,
        other => candle_core::bail!("no Metal kernel for {other:?}"),
    };
    let guard = device.command_encoder()?;
    let Product { rows, columns, k, .. } = *product;
    tracing::trace!(kernel = "candle's gemm", rows, columns, k, "launch");
    call_mlx_gemm(
        device.metal_device(),
        &guard,
        device.kernels(),
        gemm_dtype,
        (1, rows, columns, k),
        &[k, 1],
        x.offset_in_bytes,
        x.buffer,
        &[1, k],
        w.offset_in_bytes,
        w.buffer,
        out,
    )
    .map_err(MetalError::from)?;
    Ok(())
}

fn on_metal(storage: &Storage) -> Result<&MetalStorage> {
    match storage {
        Storage::Metal(storage) => Ok(storage),
        _ => candle_core::bail!("x is on a Metal device, the weights are not"),
    }
}

// ---------------------------------------------------------------- dispatch

/// A kernel, its threadgroups, and the rows that it computes (for the trace).
#[derive(Clone, Copy, Debug)]
pub(super) struct Launch {
    pub(super) kernel: Kernel,
    pub(super) dtype: DType,
    pub(super) aligned: bool,
    pub(super) grid: [usize; 3],
    pub(super) rows: usize,
}

/// Dispatches on candle's encoder, with the buffers that `bind` sets. The encoder is locked during
/// `bind`, which must therefore not call candle.
pub(super) fn dispatch(
    device: &MetalDevice,
    launch: Launch,
    bind: impl FnOnce(&ComputeCommandEncoder),
) -> Result<()> {
    let Launch { kernel, dtype, aligned, grid, rows } = launch;
    tracing::trace!(kernel = kernel.name(dtype), aligned, grid = ?grid, threads = THREADS, rows, "launch");
    let pipeline = pipeline(device, kernel, dtype, aligned)?;
    let guard = device.command_encoder()?;
    let encoder: &ComputeCommandEncoder = guard.as_ref();
    encoder.set_compute_pipeline_state(&pipeline);
    bind(encoder);
    let [width, height, depth] = grid;
    encoder.dispatch_thread_groups(
        MTLSize { width, height, depth },
        MTLSize { width: THREADS, height: 1, depth: 1 },
    );
    Ok(())
}
