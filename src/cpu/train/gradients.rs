//! Which gradients are computed, and the memory that they are written to. A gradient that nobody
//! wants costs neither time nor memory.

use super::backward::BlockTargets;
use super::block::{Block, Saved};
use super::linear::{Linear, LinearTargets};
use super::low_rank::{LowRank, LowRankTargets};
use super::products::Target;
use crate::cpu::kernels::Io;
use crate::cpu::matrix::Matrix;
use crate::cpu::pages;
use crate::load::FusedOrder;

/// The wanted gradients of a block.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct BlockWanted {
    pub(crate) x: bool,
    /// gate, up, down
    pub(crate) weights: [bool; 3],
    pub(crate) biases: [bool; 3],
    /// gate and up are rows of one matrix (2I,H) and get one gradient.
    pub(crate) fused: Option<FusedOrder>,
    /// Those of the addends of gate and up, and of down.
    pub(crate) low_rank: [bool; 2],
}

/// The gradients of a block; those of biases in f32.
pub(crate) struct BlockGradients<T> {
    /// (M,H)
    pub(crate) x: Option<Vec<T>>,
    /// gate, up (I,H) and down (H,I). That of fused weights (2I,H) is gate's.
    pub(crate) weights: [Option<BlockWeightGradient<T>>; 3],
    pub(crate) biases: [Option<Vec<f32>>; 3],
    pub(crate) low_rank: [Option<LowRankGradients>; 2],
}

/// The gradients of an addend: of A (r,in), and of each B (out,r).
pub(crate) struct LowRankGradients {
    pub(crate) a: Vec<f32>,
    pub(crate) b: Vec<Vec<f32>>,
}

/// The gradient of a weight, with its shape.
pub(crate) struct BlockWeightGradient<T> {
    pub(crate) data: Vec<T>,
    pub(crate) shape: (usize, usize),
}

/// The wanted gradients of a linear layer.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct LinearWanted {
    pub(crate) x: bool,
    pub(crate) weight: bool,
    pub(crate) bias: bool,
}

/// The gradients of a linear layer; that of the bias in f32.
pub(crate) struct LinearGradients<T> {
    /// (M, in)
    pub(crate) x: Option<Vec<T>>,
    /// (out, in)
    pub(crate) weight: Option<Vec<T>>,
    /// (out)
    pub(crate) bias: Option<Vec<f32>>,
}

/// A matrix that is about to be written.
struct Output<T> {
    data: Vec<T>,
    rows: usize,
    columns: usize,
}

impl<T: Io> Output<T> {
    fn new(rows: usize, columns: usize) -> Self {
        let mut data: Vec<T> = Vec::with_capacity(rows * columns);
        pages::advise_huge(data.as_mut_ptr(), data.capacity());
        Self { data, rows, columns }
    }

    fn target(&mut self) -> Target<T> {
        Target::new(&mut self.data, self.columns)
    }

    /// # Safety
    /// Every element was written, unless there were no rows of x.
    unsafe fn finish(mut self, rows_of_x: usize) -> Vec<T> {
        let len = self.rows * self.columns;
        if rows_of_x == 0 {
            self.data.resize(len, T::zero());
        }
        // SAFETY: the caller's contract.
        unsafe { self.data.set_len(len) };
        self.data
    }
}

impl<T: Io> Block<'_, T> {
    pub(super) fn gradients(
        &self,
        x: Matrix<T>,
        dy: Matrix<T>,
        saved: &Saved<T>,
        wanted: &BlockWanted,
    ) -> BlockGradients<T> {
        let (h, i, rows) = (self.hidden_size(), self.intermediate_size(), x.rows);
        let mut dx = wanted.x.then(|| Output::new(rows, h));
        let shapes = match wanted.fused {
            Some(_) => [(2 * i, h), (0, h), (h, i)],
            None => [(i, h), (i, h), (h, i)],
        };
        let mut outputs = [0, 1, 2].map(|which| {
            let (height, width) = shapes[which];
            (wanted.weights[which] && height > 0).then(|| Output::new(height, width))
        });
        let [gate, up, down] = outputs.each_mut().map(|output| output.as_mut().map(Output::target));
        let [gate, up] = match (wanted.fused, gate) {
            (Some(order), Some(fused)) => halves(fused, order, i),
            _ => [gate, up],
        };
        let mut low_rank = [0, 1].map(|i| {
            let addend = self.low_rank[i].as_ref().filter(|_| wanted.low_rank[i])?;
            Some(LowRankOutput::new(addend))
        });
        let targets = BlockTargets {
            x: dx.as_mut().map(Output::target),
            weights: [gate, up, down],
            biases: wanted.biases,
            low_rank: low_rank.each_mut().map(|output| output.as_mut().map(LowRankOutput::targets)),
        };
        let biases = self.backward(x, dy, saved, &targets);
        // SAFETY: the targets were written: all rows of dx, and every weight's gradient.
        unsafe {
            BlockGradients {
                x: dx.map(|output| output.finish(rows)),
                weights: outputs.map(|output| {
                    output.map(|output| {
                        let shape = (output.rows, output.columns);
                        BlockWeightGradient { data: output.finish(rows), shape }
                    })
                }),
                biases,
                low_rank: low_rank.map(|output| Some(output?.finish(rows))),
            }
        }
    }
}

/// The gradients of an addend while they are written.
struct LowRankOutput {
    a: Output<f32>,
    b: Vec<Output<f32>>,
}

impl LowRankOutput {
    fn new<T: Copy>(addend: &LowRank<T>) -> Self {
        let b = addend.b.iter().map(|b| Output::new(b.rows, b.k));
        Self { a: Output::new(addend.a.rows, addend.a.k), b: b.collect() }
    }

    fn targets(&mut self) -> LowRankTargets {
        LowRankTargets { a: self.a.target(), b: self.b.iter_mut().map(Output::target).collect() }
    }

    /// # Safety
    /// As [`Output::finish`].
    unsafe fn finish(self, rows_of_x: usize) -> LowRankGradients {
        // SAFETY: the caller's contract.
        let finish = |output: Output<f32>| unsafe { output.finish(rows_of_x) };
        LowRankGradients { a: finish(self.a), b: self.b.into_iter().map(finish).collect() }
    }
}

/// The rows of gate and of up in the gradient of a fused weight.
fn halves<T>(fused: Target<T>, order: FusedOrder, i: usize) -> [Option<Target<T>>; 2] {
    let (first, second) = (fused.row(0), fused.row(i));
    match order {
        FusedOrder::GateFirst => [Some(first), Some(second)],
        FusedOrder::UpFirst => [Some(second), Some(first)],
        FusedOrder::Interleaved => {
            let every_second = |row| Some(fused.row(row).every_second_row());
            [every_second(0), every_second(1)]
        }
    }
}

impl<T: Io> Linear<'_, T> {
    pub(super) fn gradients(
        &self,
        x: Matrix<T>,
        dy: Matrix<T>,
        wanted: LinearWanted,
    ) -> LinearGradients<T> {
        let rows = x.rows;
        let mut dx = wanted.x.then(|| Output::new(rows, self.weight.k()));
        let mut weight = wanted.weight.then(|| Output::new(self.weight.rows(), self.weight.k()));
        let targets = LinearTargets {
            x: dx.as_mut().map(Output::target),
            weight: weight.as_mut().map(Output::target),
            bias: wanted.bias,
        };
        let bias = self.backward(x, dy, &targets);
        // SAFETY: the targets were written.
        unsafe {
            LinearGradients {
                x: dx.map(|output| output.finish(rows)),
                weight: weight.map(|output| output.finish(rows)),
                bias,
            }
        }
    }
}
