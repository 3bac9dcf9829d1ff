//! Layers that are differentiated, forward and backward. Weights through which a gradient is
//! tracked change with every step of an optimizer, so there is no packed copy of them, and a unit
//! packs what it multiplies. Constant weights are those of a packed layer (`PackedMatrix`).
//!
//! | file | content |
//! |---|---|
//! | `block.rs`, `backward.rs` | the block, and its gradients |
//! | `linear.rs` | a linear layer, and its gradients |
//! | `gradients.rs` | which gradients are computed, and their memory |
//! | `low_rank.rs` | low-rank addends (LoRA), and their dropout |
//! | `products.rs` | rows of y and dx; gradients of weights |
//! | `gemm.rs`, `pack.rs` | one unit of a product, whose B is packed on the way |
//! | `intake.rs` | x and dy become operands |
//! | `grid.rs`, `arena.rs`, `scratch.rs` | units of work; pieces of scratch; each thread's pieces |
//! | `column_sums.rs` | gradients of biases |
//!
//! The microkernels, the epilogues and the order of the sums are those of packed layers. bf16 is
//! multiplied as bf16 where the instruction set does so, and everything else in f32.

mod arena;
mod backward;
mod block;
mod column_sums;
mod gemm;
mod gradients;
mod grid;
mod intake;
mod linear;
mod low_rank;
#[cfg(test)]
mod low_rank_tests;
pub(super) mod pack;
mod products;
mod scratch;
#[cfg(test)]
mod tests;

use std::ops::Range;

use candle_core::{CpuStorage, DType, Layout, WithDType};
use half::bf16;

use self::block::Block;
use self::gemm::{Gemm, Source};
use self::linear::Linear;
use self::low_rank::LowRank;
use super::kernels::{CpuKernels, Io};
use super::layer::matrix;
use super::matrix::Matrix;
use super::panels::PackedMatrix;
use super::pass::{CHUNK_ROWS, SERIAL};
use super::threads;
use crate::error::{Error, Result};
use crate::gate::activation::Glu;

pub(crate) use self::block::Saved;
pub(crate) use self::gradients::{
    BlockGradients, BlockWanted, LinearGradients, LinearWanted, LowRankGradients,
};
pub(crate) use self::low_rank::Dropout;

/// A tensor of rank 2 on the CPU.
pub(crate) type Operand<'a> = (&'a CpuStorage, &'a Layout);

/// The kernels for tensors of dtype T.
fn gemm<T: Io>(kernels: &'static CpuKernels) -> Result<Gemm<T>> {
    let bf16 = &kernels.bf16;
    let direct = T::DTYPE == DType::BF16 && bf16.sweep.a_bytes == size_of::<bf16>();
    let format = if direct { bf16 } else { &kernels.f32 };
    let edges = T::edges(format).ok_or_else(|| Error::DTypeUnsupported {
        name: "weight".into(),
        found: T::DTYPE.as_str().into(),
        location: None,
    })?;
    Ok(Gemm { sweep: &format.sweep, edges })
}

/// Chunks of rows, whose operands in scratch are of bounded size.
fn chunks(rows: usize) -> impl ExactSizeIterator<Item = Range<usize>> {
    (0..rows).step_by(CHUNK_ROWS).map(move |start| start..rows.min(start + CHUNK_ROWS))
}

/// The threads for this many multiply-adds.
fn threads_for(multiply_adds: usize) -> usize {
    if multiply_adds < SERIAL { 1 } else { threads::count() }
}

/// A bias as wide as whole panels.
fn padded_bias(bias: Option<&[f32]>, nr: usize) -> Option<Vec<f32>> {
    bias.map(|bias| {
        let mut padded = bias.to_vec();
        padded.resize(bias.len().next_multiple_of(nr), 0.0);
        padded
    })
}

/// The weight of a layer.
#[derive(Clone, Copy)]
pub(crate) enum WeightOperand<'a> {
    /// In any layout.
    Tensor(Operand<'a>),
    /// Of a packed layer, which outlives the call.
    Packed(PackedMatrix),
}

/// A low-rank addend of a product, in the dtype of x: A (r,in), and for each matrix of the product
/// B (out,r), with the scale and, if there is a dropout p, the factor 1/(1-p).
#[derive(Clone, Copy)]
pub(crate) struct LowRankOperands<'a> {
    pub(crate) a: Operand<'a>,
    pub(crate) b: &'a [Operand<'a>],
    pub(crate) dropout: Option<Dropout>,
}

/// A block, whose weights are gate and up (I,H) and down (H,I).
#[derive(Clone, Copy)]
pub(crate) struct BlockOperands<'a> {
    pub(crate) glu: Glu,
    pub(crate) down_multiplier: f32,
    pub(crate) weights: [WeightOperand<'a>; 3],
    /// In f32.
    pub(crate) biases: [Option<&'a [f32]>; 3],
    /// Of gate and up, and of down.
    pub(crate) low_rank: [Option<LowRankOperands<'a>>; 2],
}

/// The functions of one dtype.
pub(crate) trait Trained: WithDType {
    /// x (M,H) -> y (M,H), and what the backward pass reads; gate and up are kept with `save`.
    fn block_forward(
        kernels: &'static CpuKernels,
        block: BlockOperands,
        x: Operand,
        save: bool,
    ) -> Result<(Vec<Self>, Saved<Self>)>;

    /// The gradients under dy (M,H).
    fn block_backward(
        kernels: &'static CpuKernels,
        block: BlockOperands,
        x_dy: [Operand; 2],
        saved: &Saved<Self>,
        wanted: &BlockWanted,
    ) -> Result<BlockGradients<Self>>;

    /// x (M, in) -> x·Wᵀ + b (M, out)
    fn linear_forward(
        kernels: &'static CpuKernels,
        weight: WeightOperand,
        bias: Option<Vec<f32>>,
        x: Operand,
    ) -> Result<Vec<Self>>;

    /// The gradients under dy (M, out).
    fn linear_backward(
        kernels: &'static CpuKernels,
        weight: WeightOperand,
        x_dy: [Operand; 2],
        wanted: LinearWanted,
    ) -> Result<LinearGradients<Self>>;
}

impl<T: Io> Trained for T {
    fn block_forward(
        kernels: &'static CpuKernels,
        block: BlockOperands,
        x: Operand,
        save: bool,
    ) -> Result<(Vec<Self>, Saved<Self>)> {
        Ok(make_block(kernels, block)?.forward(matrix(x.0, x.1)?, save))
    }

    fn block_backward(
        kernels: &'static CpuKernels,
        block: BlockOperands,
        [x, dy]: [Operand; 2],
        saved: &Saved<Self>,
        wanted: &BlockWanted,
    ) -> Result<BlockGradients<Self>> {
        let (x, dy) = (matrix(x.0, x.1)?, matrix(dy.0, dy.1)?);
        Ok(make_block(kernels, block)?.gradients(x, dy, saved, wanted))
    }

    fn linear_forward(
        kernels: &'static CpuKernels,
        weight: WeightOperand,
        bias: Option<Vec<f32>>,
        x: Operand,
    ) -> Result<Vec<Self>> {
        Ok(make_linear(kernels, weight, bias)?.forward(matrix(x.0, x.1)?))
    }

    fn linear_backward(
        kernels: &'static CpuKernels,
        weight: WeightOperand,
        [x, dy]: [Operand; 2],
        wanted: LinearWanted,
    ) -> Result<LinearGradients<Self>> {
        let (x, dy) = (matrix(x.0, x.1)?, matrix(dy.0, dy.1)?);
        Ok(make_linear(kernels, weight, None)?.gradients(x, dy, wanted))
    }
}

fn make_block<'a, T: Io>(
    kernels: &'static CpuKernels,
    block: BlockOperands<'a>,
) -> Result<Block<'a, T>> {
    let [gate, up, down] = block.weights;
    let [gate_up_addend, down_addend] = block.low_rank;
    Ok(Block {
        gemm: gemm(kernels)?,
        glu: block.glu,
        down_multiplier: block.down_multiplier,
        weights: [source(gate)?, source(up)?, source(down)?],
        biases: block.biases.map(|bias| bias.map(<[f32]>::to_vec)),
        low_rank: [low_rank(gate_up_addend)?, low_rank(down_addend)?],
    })
}

fn make_linear<'a, T: Io>(
    kernels: &'static CpuKernels,
    weight: WeightOperand<'a>,
    bias: Option<Vec<f32>>,
) -> Result<Linear<'a, T>> {
    Ok(Linear { gemm: gemm(kernels)?, weight: source(weight)?, bias })
}

fn source<'a, T: Io>(weight: WeightOperand<'a>) -> Result<Source<'a, T>> {
    Ok(match weight {
        WeightOperand::Tensor(operand) => Source::Tensor(checked(operand)?),
        WeightOperand::Packed(packed) => Source::Packed(packed),
    })
}

fn low_rank<'a, T: Io>(addend: Option<LowRankOperands<'a>>) -> Result<Option<LowRank<'a, T>>> {
    let Some(LowRankOperands { a, b, dropout }) = addend else { return Ok(None) };
    let b = b.iter().map(|b| checked(*b)).collect::<Result<_>>()?;
    Ok(Some(LowRank { a: checked(a)?, b, dropout }))
}

/// A matrix that lies within its storage.
fn checked<'a, T: Io>((storage, layout): Operand<'a>) -> Result<Matrix<'a, T>> {
    let matrix = matrix(storage, layout)?;
    matrix.check();
    Ok(matrix)
}
