//! The gate by itself on Metal: one dispatch forward, one backward.

use candle_core::backend::BackendStorage;
use candle_core::{Layout, MetalStorage, Result, Shape};

use super::launch::{Launch, dispatch};
use super::plan::{Kernel, Pair};
use crate::gate::{Glu, pair_of};

/// An operand as candle passes it.
type Operand<'a> = (&'a MetalStorage, &'a Layout);

/// gate, up (…) of any layout -> act(gate) ⊙ up (…)
pub(crate) fn gate_forward(op: &Glu, operands: [Operand<'_>; 2]) -> Result<(MetalStorage, Shape)> {
    let shape = operands[0].1.shape().clone();
    run(op, Kernel::GateForward, operands, shape)
}

/// gate, up, dy (…) of any layout -> (2, …): dgate, then dup
pub(crate) fn gate_backward(op: &Glu, operands: [Operand<'_>; 3]) -> Result<(MetalStorage, Shape)> {
    let shape = pair_of(operands[0].1);
    run(op, Kernel::GateBackward, operands, shape)
}

/// Runs a kernel of the gate. Operands that are not rows and columns are copied first.
fn run<const N: usize>(
    op: &Glu,
    kernel: Kernel,
    operands: [Operand<'_>; N],
    shape: Shape,
) -> Result<(MetalStorage, Shape)> {
    if let Some(pair) = Pair::new(operands.map(|(_, layout)| layout)) {
        return run_pair(op, kernel, &pair, operands, shape);
    }
    let copies = operands.iter().map(contiguous).collect::<Result<Vec<_>>>()?;
    let layout = Layout::contiguous(operands[0].1.shape());
    match Pair::new([&layout; N]) {
        Some(pair) => {
            run_pair(op, kernel, &pair, std::array::from_fn(|n| (&copies[n], &layout)), shape)
        }
        None => candle_core::bail!(
            "the Metal kernels take fewer than 2^31 elements, found the shape {:?}",
            layout.dims()
        ),
    }
}

fn run_pair<const N: usize>(
    op: &Glu,
    kernel: Kernel,
    pair: &Pair<N>,
    operands: [Operand<'_>; N],
    shape: Shape,
) -> Result<(MetalStorage, Shape)> {
    let (device, dtype) = (operands[0].0.device(), operands[0].0.dtype());
    let out = device
        .new_buffer_builder()
        .with_size_for(shape.elem_count(), dtype)
        .with_label("gate")
        .build()?;
    if shape.elem_count() > 0 {
        let parameters = pair.parameters(op);
        let aligned = pair.is_aligned(operands.map(|(_, layout)| layout.start_offset()));
        let launch = Launch { kernel, dtype, aligned, grid: pair.grid(), rows: pair.rows() };
        dispatch(device, launch, |encoder| {
            for (index, (storage, layout)) in operands.iter().enumerate() {
                encoder.set_input_buffer(
                    index,
                    Some(storage.buffer()),
                    layout.start_offset() * dtype.size_in_bytes(),
                );
            }
            encoder.set_output_buffer(N, Some(&out), 0);
            encoder.set_bytes(N + 1, &parameters);
        })?;
    }
    Ok((MetalStorage::new(out, device.clone(), shape.elem_count(), dtype), shape))
}

fn contiguous(&(storage, layout): &Operand<'_>) -> Result<MetalStorage> {
    let (device, dtype, n) = (storage.device(), storage.dtype(), layout.shape().elem_count());
    let buffer =
        device.new_buffer_builder().with_size_for(n, dtype).with_label("gate operand").build()?;
    let mut copy = MetalStorage::new(buffer, device.clone(), n, dtype);
    storage.copy_strided_src(&mut copy, 0, layout)?;
    Ok(copy)
}
