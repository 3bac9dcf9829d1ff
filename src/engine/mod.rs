//! Built layers: one trait for a SwiGLU block, one for a linear layer, and the choice between
//! their implementations.
//!
//! | implementation | used for | weights |
//! |---|---|---|
//! | `cpu` | constant weights in f32, bf16 or f16 on the CPU | packed for its kernels |
//! | `gpu` | constant weights in a dtype that the device has kernels for | gate and up in one matrix |
//! | `trained` | variables in the same dtypes on the CPU | the tensors themselves |
//! | `composed` | variables in f64, and on a GPU that has the fused gate | the same |
//! | `plain` | everything else | the same, in candle's operations |
//! | `adapted` | low-rank pairs without kernels | those of the layer without pairs |
//!
//! The choice is made once, when a layer is built. A weight is constant if no gradient is tracked
//! through it. `cpu` and `gpu` layers are differentiable in x (`backward`).

pub(crate) mod adapted;
mod backward;
mod composed;
mod cpu;
mod cpu_lora;
mod direct;
mod function;
mod gpu;
mod low_rank;
mod merge;
mod plain;
mod trained;
mod unpacked;

pub use direct::backward;

use std::fmt;
use std::sync::Arc;

use candle_core::{CustomOp1, DType, Device, Tensor};

use crate::backend;
use crate::check::{check_float, check_like};
use crate::error::{Error, Result};
use crate::forced;
use crate::gate::activation::Glu;
use crate::load::{FusedOrder, GateUp, Piece, Weights, split};
use crate::lora::Lora;
use crate::which::Which;

/// A SwiGLU block, ready to run on its device.
pub(crate) trait Block: fmt::Debug + Send + Sync {
    /// The dtype of the weights.
    fn dtype(&self) -> DType;

    /// The device of the weights.
    fn device(&self) -> &Device;

    /// The name of the kernel that [`Block::forward`] runs.
    fn kernel(&self) -> &str;

    /// Whether the weights are constants that [`Block::forward`] reads in a form of its own.
    fn is_packed(&self) -> bool;

    /// x (M,H) in the dtype and on the device of the weights -> y (M,H)
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor>;

    /// A matrix (rows, k), bit for bit as it was loaded.
    fn weight(&self, which: Which) -> candle_core::Result<Tensor>;

    /// The bias (rows) of a matrix, if it has one.
    fn bias(&self, which: Which) -> candle_core::Result<Option<Tensor>>;

    /// All weights and biases.
    fn weights(&self) -> candle_core::Result<Weights> {
        let (gate, up) = (self.weight(Which::Gate)?, self.weight(Which::Up)?);
        let gate_up = GateUp::separate(gate, up, self.bias(Which::Gate)?, self.bias(Which::Up)?);
        Ok(Weights::new(gate_up, self.weight(Which::Down)?, self.bias(Which::Down)?))
    }

    /// The same block with another choice of what its forward pass keeps; none if it has no choice.
    fn with_recompute(&self, _recompute: bool) -> Option<Arc<dyn Block>> {
        None
    }

    /// The block with low-rank pairs added by its kernels; none if it has no such kernels.
    fn with_lora(&self, _pairs: &adapted::Pairs) -> Result<Option<Arc<dyn Block>>> {
        Ok(None)
    }

    /// The memory that holds packed weights; empty where nothing is packed on the CPU.
    fn packed_bytes(&self) -> Vec<&[u8]> {
        vec![]
    }
}

/// A linear layer, ready to run on its device.
pub(crate) trait Projection: fmt::Debug + Send + Sync {
    /// The dtype of the weight.
    fn dtype(&self) -> DType;

    /// The device of the weight.
    fn device(&self) -> &Device;

    /// The name of the kernel that [`Projection::forward`] runs.
    fn kernel(&self) -> &str;

    /// Whether the weight is a constant that [`Projection::forward`] reads in a form of its own.
    fn is_packed(&self) -> bool;

    /// x (M,in) in the dtype and on the device of the weight -> y (M,out)
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor>;

    /// The same with y in f32. On the CPU the sums are not rounded to the dtype of the weight.
    fn forward_f32(&self, x: &Tensor) -> candle_core::Result<Tensor>;

    /// The layer with a low-rank pair added by its kernels; none if it has no such kernels.
    fn with_lora(&self, _pair: &Lora) -> Result<Option<Arc<dyn Projection>>> {
        Ok(None)
    }

    /// The weight (out, in), bit for bit as it was loaded.
    fn weight(&self) -> candle_core::Result<Tensor>;

    /// The bias (out), if there is one.
    fn bias(&self) -> candle_core::Result<Option<Tensor>>;

    /// The rows `ids` (n) of the weight, (n, in). On the CPU the ids are u32.
    fn embed(&self, ids: &Tensor) -> Result<Tensor>;
}

/// The sizes and the formula of a block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BlockSpec {
    /// H
    pub(crate) hidden_size: usize,
    /// I
    pub(crate) intermediate_size: usize,
    pub(crate) glu: Glu,
    /// Factor of the down projection's result, bias included.
    pub(crate) down_multiplier: f32,
}

impl BlockSpec {
    /// (rows, k) of a matrix.
    fn shape(&self, which: Which) -> (usize, usize) {
        match which {
            Which::Gate | Which::Up => (self.intermediate_size, self.hidden_size),
            Which::Down => (self.hidden_size, self.intermediate_size),
        }
    }

    /// # Errors
    /// A matrix, or its packed form, has more bytes than there are addresses.
    fn check_addressable(&self) -> Result<()> {
        let (h, i) = (self.hidden_size, self.intermediate_size);
        check_addressable("gate_proj and up_proj", i.saturating_mul(2), h)?;
        check_addressable("down_proj", h, i)
    }
}

/// A block that is being built: it receives every matrix once.
trait Builder {
    /// Takes a matrix (rows, k) and its bias (rows), of any layout.
    fn set(&mut self, which: Which, weight: &Tensor, bias: Option<&Tensor>) -> Result<()>;

    /// Takes gate and up as rows of one tensor (2I,H), and their biases (2I).
    fn set_gate_up(
        &mut self,
        weight: &Tensor,
        bias: Option<&Tensor>,
        order: FusedOrder,
    ) -> Result<()>;

    /// # Errors
    /// A matrix was not set.
    fn finish(self: Box<Self>) -> Result<Arc<dyn Block>>;
}

impl dyn Builder + '_ {
    fn take(&mut self, piece: &Piece) -> Result<()> {
        match piece {
            Piece::One { which, weight, bias } => self.set(*which, weight, bias.as_ref()),
            Piece::GateUp { weight, bias, order } => {
                self.set_gate_up(weight, bias.as_ref(), *order)
            }
        }
    }
}

/// [`Builder::set_gate_up`] by two calls of [`Builder::set`], with views of the tensors.
fn set_views(
    builder: &mut impl Builder,
    weight: &Tensor,
    bias: Option<&Tensor>,
    order: FusedOrder,
) -> Result<()> {
    let (gate, up) = split(weight, order)?;
    let bias = bias.map(|bias| split(bias, order)).transpose()?;
    builder.set(Which::Gate, &gate, bias.as_ref().map(|(gate, _)| gate))?;
    builder.set(Which::Up, &up, bias.as_ref().map(|(_, up)| up))
}

/// Builds a block from tensors of one dtype on one device. If a gradient is tracked through any of
/// them, none is packed.
pub(crate) fn build_block(spec: &BlockSpec, weights: Weights) -> Result<Arc<dyn Block>> {
    let (dtype, device) = (weights.down_proj.dtype(), weights.down_proj.device().clone());
    let pieces = weights.into_pieces();
    let mut builder = builder(spec, dtype, &device, pieces.iter().all(is_constant))?;
    // By value: a tensor that was packed is dropped before the next is.
    pieces.into_iter().try_for_each(|piece| builder.take(&piece))?;
    builder.finish()
}

/// Builds a block from a source: `load` calls its argument with one piece after the other. Each
/// piece is packed before the next is read, so that at most one of them is in memory twice. If a
/// gradient is tracked through a later piece but not through the first, the packed pieces are
/// dropped and `load` is called again for a block that packs nothing.
///
/// # Errors
/// Those of `load`; pieces whose dtype or device differs from the first's; a missing piece.
pub(crate) fn load_block(
    spec: &BlockSpec,
    load: impl Fn(Take<'_>) -> Result<()>,
) -> Result<Arc<dyn Block>> {
    for may_pack in [true, false] {
        let mut loading = Loading { spec, may_pack, first: None };
        load(&mut |piece| loading.take(&piece))?;
        match loading.first {
            None => break,
            Some(First { builder: Some(builder), .. }) => return builder.finish(),
            Some(First { builder: None, .. }) => {}
        }
    }
    Err(Error::missing(Which::Gate.name()))
}

/// Receives the pieces of a block.
type Take<'a> = &'a mut dyn FnMut(Piece) -> Result<()>;

/// A block whose pieces are being loaded.
struct Loading<'a> {
    spec: &'a BlockSpec,
    may_pack: bool,
    first: Option<First>,
}

/// What the first piece decides. Its dtype may differ from that of a `VarBuilder` over a `VarMap`.
struct First {
    dtype: DType,
    device: Device,
    /// Whether the builder packs, and so takes only constants.
    packs: bool,
    /// None after a piece that cannot be packed.
    builder: Option<Box<dyn Builder>>,
}

impl Loading<'_> {
    fn take(&mut self, piece: &Piece) -> Result<()> {
        let constant = self.may_pack && is_constant(piece);
        let first = match &mut self.first {
            Some(first) => first,
            none => none.insert(First::new(self.spec, piece.weight(), constant)?),
        };
        for (name, tensor) in piece.named() {
            check_like(name, tensor, "the block's first weight", first.dtype, &first.device)?;
        }
        if first.packs && !constant {
            first.builder = None;
        }
        first.builder.as_deref_mut().map_or(Ok(()), |builder| builder.take(piece))
    }
}

impl First {
    fn new(spec: &BlockSpec, weight: &Tensor, constant: bool) -> Result<Self> {
        let (dtype, device) = (weight.dtype(), weight.device().clone());
        let packs = constant && has_kernels(&device, dtype);
        let builder = Some(builder(spec, dtype, &device, constant)?);
        Ok(Self { dtype, device, packs, builder })
    }
}

fn builder(
    spec: &BlockSpec,
    dtype: DType,
    device: &Device,
    constant: bool,
) -> Result<Box<dyn Builder>> {
    spec.check_addressable()?;
    match device {
        _ if !constant || !has_kernels(device, dtype) => {
            Ok(Box::new(unpacked::BlockBuilder::new(spec)))
        }
        Device::Cpu => Ok(Box::new(cpu::BlockBuilder::new(spec, dtype)?)),
        _ => Ok(Box::new(gpu::BlockBuilder::new(spec, dtype, device))),
    }
}

/// Builds a linear layer from a weight (out, in) and a bias (out) of one dtype on one device.
pub(crate) fn projection(weight: Tensor, bias: Option<Tensor>) -> Result<Arc<dyn Projection>> {
    let (rows, k) = weight.dims2()?;
    check_addressable("weight", rows, k)?;
    let constant = !is_tracked(&weight) && !bias.as_ref().is_some_and(is_tracked);
    if !constant || !has_kernels(weight.device(), weight.dtype()) {
        return unpacked::projection(weight, bias, constant);
    }
    match weight.device() {
        Device::Cpu => Ok(Arc::new(cpu::Linear::new(&weight, bias.as_ref())?)),
        _ => Ok(Arc::new(gpu::Linear::new(&weight, bias.as_ref())?)),
    }
}

/// The present values of a tensor as a constant. An optimizer writes into the storage of a
/// variable, so it is copied unless the CPU kernels are about to pack it.
pub(crate) fn constant(tensor: &Tensor) -> candle_core::Result<Tensor> {
    match is_tracked(tensor) {
        true if !tensor.device().is_cpu() || !has_kernels(tensor.device(), tensor.dtype()) => {
            tensor.detach().copy()
        }
        _ => Ok(tensor.detach()),
    }
}

/// A gradient is tracked through the tensor.
fn is_tracked(tensor: &Tensor) -> bool {
    tensor.is_variable() || tensor.track_op()
}

/// No gradient is tracked through the piece.
fn is_constant(piece: &Piece) -> bool {
    !piece.named().any(|(_, tensor)| is_tracked(tensor))
}

/// The device has kernels for the block and for projections in this dtype.
fn has_kernels(device: &Device, dtype: DType) -> bool {
    match device {
        _ if forced::is_plain() => false,
        Device::Cpu => matches!(dtype, DType::F32 | DType::BF16 | DType::F16),
        _ => backend::has_kernels(device, dtype),
    }
}

/// A matrix is addressable in packed form too, which pads it by less than 256 rows and 32 columns
/// of at most 4 bytes each.
fn check_addressable(name: &'static str, rows: usize, columns: usize) -> Result<()> {
    let padded = rows.checked_add(256).zip(columns.checked_add(32));
    match padded.and_then(|(rows, columns)| rows.checked_mul(columns)?.checked_mul(4)) {
        Some(bytes) if bytes <= isize::MAX as usize => Ok(()),
        _ => Err(Error::TooLarge { name, rows, columns }),
    }
}

/// Runs a layer as one operation of candle's graph, which keeps the layer if x is tracked.
fn run<L: CustomOp1 + Clone + Send + Sync + 'static>(
    layer: &L,
    x: &Tensor,
) -> candle_core::Result<Tensor> {
    if x.track_op() { x.apply_op1(layer.clone()) } else { x.apply_op1_no_bwd(layer) }
}

#[cfg(test)]
mod lora_tests;
#[cfg(test)]
mod tests;

/// Applies a layer to x (…,in) of any float dtype -> y (…,out) in x's dtype, computed in the wider
/// dtype of x and the weights.
///
/// `forward` computes rows (M,in) in the dtype of the layer. `convert` makes the layer in a wider
/// dtype.
pub(crate) fn over_rows<L>(
    layer: &L,
    x: &Tensor,
    sizes: (usize, usize),
    (dtype, device): (DType, &Device),
    convert: impl FnOnce(DType) -> candle_core::Result<L>,
    forward: impl FnOnce(&L, &Tensor) -> candle_core::Result<Tensor>,
) -> candle_core::Result<Tensor> {
    check_float("x", x)?;
    let wide = wider(x.dtype(), dtype);
    if x.dtype() == dtype {
        rows(x, sizes, dtype, device, |x| forward(layer, x))
    } else if wide == dtype {
        rows(&x.to_dtype(wide)?, sizes, dtype, device, |x| forward(layer, x))?.to_dtype(x.dtype())
    } else {
        let layer = convert(wide)?;
        rows(&x.to_dtype(wide)?, sizes, wide, device, |x| forward(&layer, x))?.to_dtype(x.dtype())
    }
}

/// The dtype that holds every value of both: f32 for f16 and bf16.
pub(crate) fn wider(a: DType, b: DType) -> DType {
    match (a, b) {
        _ if a == b => a,
        (DType::F64, _) | (_, DType::F64) => DType::F64,
        _ => DType::F32,
    }
}

/// Flattens x (…,in) to (M,in), applies `f` -> (M,out), and restores x's leading dimensions.
///
/// # Errors
/// x is a scalar, or its last dimension, dtype or device differs from the layer's.
pub(crate) fn rows(
    x: &Tensor,
    (in_dim, out_dim): (usize, usize),
    dtype: DType,
    device: &Device,
    f: impl FnOnce(&Tensor) -> candle_core::Result<Tensor>,
) -> candle_core::Result<Tensor> {
    let mut dims = x.dims().to_vec();
    match dims.last_mut() {
        None => {
            return Err(Error::Rank { name: "x", expected: "rank 1 or more", found: vec![] }.into());
        }
        Some(width) if *width != in_dim => {
            return Err(Error::InputWidth { expected: in_dim, found: x.dims().to_vec() }.into());
        }
        Some(width) => *width = out_dim,
    }
    check_like("x", x, "the weights", dtype, device)?;
    if x.elem_count() == 0 && !device.is_cpu() {
        return Tensor::zeros(dims, x.dtype(), x.device());
    }
    if x.rank() == 2 {
        return f(x);
    }
    f(&x.reshape((x.elem_count() / in_dim, in_dim))?)?.reshape(dims)
}
