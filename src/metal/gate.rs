//! The gate by itself on Metal: one dispatch forward, one backward.

use candle_core::backend::BackendStorage;
use candle_core::{Layout, MetalStorage, Result, Shape};

use super::launch::dispatch;
use super::plan::{Kernel, Pair};
use crate::activation::Glu;

type Input<'a> = (&'a MetalStorage, &'a Layout);

/// gate, up (…) of any layout -> act(gate) ⊙ up (…)
pub(crate) fn gate_forward(op: &Glu, inputs: [(&MetalStorage, &Layout); 2]) -> Result<(MetalStorage, Shape)> {
    gate(op, Kernel::Glu, &inputs)
}

/// gate, up, dy (…) of any layout -> (2, …): dgate, then dup
pub(crate) fn gate_backward(op: &Glu, inputs: [(&MetalStorage, &Layout); 3]) -> Result<(MetalStorage, Shape)> {
    gate(op, Kernel::GluGradient, &inputs)
}

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
