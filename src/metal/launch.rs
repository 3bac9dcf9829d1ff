//! Buffers bound, kernels dispatched.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{DType, Layout, MetalDevice, MetalError, MetalStorage, Result, Shape, Storage, Tensor};
use candle_metal_kernels::metal::{Buffer, ComputeCommandEncoder};
use candle_metal_kernels::{BufferOffset, GemmDType, Output, call_mlx_gemm, set_params};
use objc2_metal::MTLSize;

use super::pipeline::pipeline;
use super::plan::{Choice, Kernel, Pair, Product, ProductParameters, THREADS};
use crate::activation::Glu;
use crate::device::{DeviceBlock, DeviceLinear};

/// x (M,H) contiguous -> y (M,H), by two dispatches
pub(crate) fn block(block: &DeviceBlock, x: &MetalStorage, layout: &Layout) -> Result<(MetalStorage, Shape)> {
    let rows = layout.shape().dims2()?.0;
    let gate_up = Projection { weight: &block.gate_up, bias: block.gate_up_bias.as_ref(), glu: Some(block.glu), factor: 1.0 };
    let factor = block.down_multiplier;
    let down = Projection { weight: &block.down, bias: block.down_bias.as_ref(), glu: None, factor };
    let h = gate_up.run(x.device(), x.buffer(), layout.start_offset(), rows)?; // (M,I)
    let y = down.run(x.device(), &h, 0, rows)?;
    let shape = Shape::from((rows, block.down.dim(0)?));
    Ok((MetalStorage::new(y, x.device().clone(), shape.elem_count(), x.dtype()), shape))
}

/// x (M,in) contiguous -> y (M,out)
pub(crate) fn linear(linear: &DeviceLinear, x: &MetalStorage, layout: &Layout) -> Result<(MetalStorage, Shape)> {
    let rows = layout.shape().dims2()?.0;
    let projection = Projection { weight: &linear.weight, bias: linear.bias.as_ref(), glu: None, factor: 1.0 };
    let y = projection.run(x.device(), x.buffer(), layout.start_offset(), rows)?;
    let shape = Shape::from((rows, linear.weight.dim(0)?));
    Ok((MetalStorage::new(y, x.device().clone(), shape.elem_count(), x.dtype()), shape))
}

/// gate, up (…) of any layout -> act(gate) ⊙ up (…)
pub(crate) fn glu_forward(op: &Glu, inputs: [(&MetalStorage, &Layout); 2]) -> Result<(MetalStorage, Shape)> {
    gate(op, Kernel::Glu, &inputs)
}

/// gate, up, dy (…) of any layout -> (2, …): dgate, then dup
pub(crate) fn glu_backward(op: &Glu, inputs: [(&MetalStorage, &Layout); 3]) -> Result<(MetalStorage, Shape)> {
    gate(op, Kernel::GluGradient, &inputs)
}

// ---------------------------------------------------------------- products

/// x·Wᵀ with its bias, and what follows.
struct Projection<'a> {
    /// (columns, k), or (2·columns, k) with a gate
    weight: &'a Tensor,
    bias: Option<&'a Tensor>,
    glu: Option<Glu>,
    factor: f32,
}

impl Projection<'_> {
    /// x (rows, k) contiguous from this element on -> (rows, columns)
    fn run(&self, device: &MetalDevice, x: &Buffer, x_start: usize, rows: usize) -> Result<Arc<Buffer>> {
        let (weight_rows, k) = self.weight.dims2()?;
        let columns = if self.glu.is_some() { weight_rows / 2 } else { weight_rows };
        let product = Product { rows, columns, k, glu: self.glu, has_bias: self.bias.is_some(), factor: self.factor };
        let parameters = product.parameters();
        let parameters = parameters.ok_or_else(|| candle_core::Error::Msg(format!("too large for Metal: {product:?}")))?;
        let dtype = self.weight.dtype();
        let out = device.new_buffer_builder().with_size_for(rows * columns, dtype).with_label("swiglu").build()?;
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
        let at = |buffer, start: usize| BufferOffset { buffer, offset_in_bytes: start * dtype.size_in_bytes() };
        let (x, w) = (at(x, x_start), at(weight.buffer(), weight_layout.start_offset()));
        let kernel = match product.choice() {
            Choice::Kernel(kernel) => kernel,
            Choice::Candle => return gemm(device, dtype, product, (&x, &w), out),
        };
        let aligned = product.is_aligned(dtype, [x_start, weight_layout.start_offset()]);
        let grid = product.grid(kernel);
        // Without a bias something must be bound all the same: the weight, which is not read as one.
        let Some(bias) = self.bias else {
            return dispatch(device, (kernel, dtype, aligned), grid, |encoder| {
                set_params!(encoder, (&x, &w, &w, Output::new(out), &[parameters][..]));
            });
        };
        let (bias, bias_layout) = bias.storage_and_layout();
        let bias = at(on_metal(&bias)?.buffer(), bias_layout.start_offset());
        dispatch(device, (kernel, dtype, aligned), grid, |encoder| {
            set_params!(encoder, (&x, &w, &bias, Output::new(out), &[parameters][..]));
        })
    }
}

/// x (rows, k) · w (columns, k)ᵀ -> out (rows, columns) by candle's GEMM
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

// ---------------------------------------------------------------- the gate alone

type Input<'a> = (&'a MetalStorage, &'a Layout);

/// Operands that are not rows and columns are copied first.
fn gate(op: &Glu, kernel: Kernel, inputs: &[Input]) -> Result<(MetalStorage, Shape)> {
    let layouts: Vec<&Layout> = inputs.iter().map(|input| input.1).collect();
    if let Some(pair) = Pair::new(&layouts) {
        return run_pair(op, kernel, &pair, inputs);
    }
    let copies = inputs.iter().map(contiguous).collect::<Result<Vec<_>>>()?;
    let layout = Layout::contiguous(layouts[0].shape());
    let copies: Vec<Input> = copies.iter().map(|copy| (copy, &layout)).collect();
    match Pair::new(&vec![&layout; copies.len()]) {
        Some(pair) => run_pair(op, kernel, &pair, &copies),
        None => candle_core::bail!("too large for Metal: {:?}", layout.dims()),
    }
}

fn run_pair(op: &Glu, kernel: Kernel, pair: &Pair, inputs: &[Input]) -> Result<(MetalStorage, Shape)> {
    let (first, layout) = inputs[0];
    let (device, dtype) = (first.device(), first.dtype());
    let shape = match kernel {
        Kernel::GluGradient => Shape::from(std::iter::once(2).chain(layout.dims().iter().copied()).collect::<Vec<_>>()),
        _ => layout.shape().clone(),
    };
    let out = device.new_buffer_builder().with_size_for(shape.elem_count(), dtype).with_label("glu").build()?;
    if shape.elem_count() > 0 {
        let offsets: Vec<usize> = inputs.iter().map(|input| input.1.start_offset()).collect();
        let parameters = pair.parameters(op);
        dispatch(device, (kernel, dtype, pair.is_aligned(&offsets)), pair.grid(), |encoder| {
            for (index, (storage, layout)) in inputs.iter().enumerate() {
                encoder.set_input_buffer(index, Some(storage.buffer()), layout.start_offset() * dtype.size_in_bytes());
            }
            encoder.set_output_buffer(inputs.len(), Some(&out), 0);
            encoder.set_bytes(inputs.len() + 1, &parameters);
        })?;
    }
    Ok((MetalStorage::new(out, device.clone(), shape.elem_count(), dtype), shape))
}

fn contiguous(&(storage, layout): &Input) -> Result<MetalStorage> {
    let (device, dtype, n) = (storage.device(), storage.dtype(), layout.shape().elem_count());
    let buffer = device.new_buffer_builder().with_size_for(n, dtype).with_label("glu operand").build()?;
    let mut copy = MetalStorage::new(buffer, device.clone(), n, dtype);
    storage.copy_strided_src(&mut copy, 0, layout)?;
    Ok(copy)
}

// ---------------------------------------------------------------- dispatch

/// `grid` threadgroups on candle's encoder, with what `bind` binds. The encoder is locked meanwhile: `bind` calls nothing of candle's.
fn dispatch(
    device: &MetalDevice,
    (kernel, dtype, aligned): (Kernel, DType, bool),
    [width, height, depth]: [usize; 3],
    bind: impl FnOnce(&ComputeCommandEncoder),
) -> Result<()> {
    let pipeline = pipeline(device, kernel, dtype, aligned)?;
    let guard = device.command_encoder()?;
    let encoder: &ComputeCommandEncoder = guard.as_ref();
    encoder.set_compute_pipeline_state(&pipeline);
    bind(encoder);
    encoder.dispatch_thread_groups(MTLSize { width, height, depth }, MTLSize { width: THREADS, height: 1, depth: 1 });
    Ok(())
}
