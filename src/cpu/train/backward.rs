//! The gradients of the block.
//!
//! ```text
//! dh = m·dy·Wd     (dgate, dup) = the gate's gradients under dh     dx = dgate·Wg + dup·Wu
//! dWg = dgateᵀ·x   dWu = dupᵀ·x   dWd = m·dyᵀ·h   biases: the column sums of dgate, dup, m·dy
//! ```
//!
//! Rows are processed in chunks, each in three phases:
//!
//! 1. x and dy become A, dy also its transpose, x also panels (`intake.rs`).
//! 2. A unit multiplies some panels of gate and up again, or reads what was saved, and the same
//!    channels of dh. While all three are in cache it computes h, dgate and dup. It writes h as
//!    panels, and dgate and dup as A and transposed.
//! 3. dx, the gradients of the weights and of the biases. Sums over several chunks stay in f32.
//!
//! The addend of down adds a product to dh before phase 2 (du = dy·B), that of gate and up adds one
//! to dx after it. Their gradients are gradients of weights like the others.

mod chunk;
mod gate;
mod operands;

use self::chunk::Backward;
use super::block::{Block, Saved};
use super::chunks;
use super::column_sums::ColumnSums;
use super::gemm::A;
use super::low_rank::{LowRankGradient, LowRankTargets};
use super::products::{Rows, Target, WeightGradient};
use crate::cpu::kernels::Io;
use crate::cpu::matrix::Matrix;
use crate::which::Which;

/// Where gradients are written, and which are computed at all.
pub(super) struct BlockTargets<T> {
    /// (M,H)
    pub(super) x: Option<Target<T>>,
    /// gate and up (I,H), down (H,I)
    pub(super) weights: [Option<Target<T>>; 3],
    /// Whether the biases have one.
    pub(super) biases: [bool; 3],
    /// Of the addends of gate and up, and of down.
    pub(super) low_rank: [Option<LowRankTargets>; 2],
}

/// The gradients of weights, which are sums over the chunks.
struct Gradients<T: 'static> {
    /// gate, up, down
    weights: [Option<WeightGradient<T>>; 3],
    /// Of the addends of gate and up, and of down.
    low_rank: [Option<LowRankGradient<T>>; 2],
}

impl<T: Copy> Gradients<T> {
    fn all(&self) -> impl Iterator<Item = &WeightGradient<T>> {
        let low_rank = self.low_rank.iter().flatten().flat_map(LowRankGradient::all);
        self.weights.iter().flatten().chain(low_rank)
    }
}

impl<T: Io> Block<'_, T> {
    /// Writes the gradients under dy (M,H), and returns those of the biases.
    pub(super) fn backward(
        &self,
        x: Matrix<T>,
        dy: Matrix<T>,
        saved: &Saved<T>,
        targets: &BlockTargets<T>,
    ) -> [Option<Vec<f32>>; 3] {
        [&x, &dy].into_iter().for_each(Matrix::check);
        let (h, i) = (self.hidden_size(), self.intermediate_size());
        let (threads, count) = (self.threads(x.rows), chunks(x.rows).count());
        let gradient = |which: Which, shape, factor| {
            let target = Rows::Io(targets.weights[which as usize]?);
            Some(WeightGradient::new(self.gemm, shape, factor, target, (threads, count)))
        };
        let low_rank = |i: usize, factor| {
            let (of, to) = (self.low_rank[i].as_ref()?, targets.low_rank[i].as_ref()?);
            Some(LowRankGradient::new(self.gemm, of, to, factor, (threads, count)))
        };
        let gradients = Gradients {
            weights: [
                gradient(Which::Gate, (i, h), 1.0),
                gradient(Which::Up, (i, h), 1.0),
                gradient(Which::Down, (h, i), self.down_multiplier),
            ],
            low_rank: [low_rank(0, 1.0), low_rank(1, self.down_multiplier)],
        };
        let sums = |biased: bool, columns, factor| biased.then(|| ColumnSums::new(columns, factor));
        let [gate, up, down] = targets.biases;
        let biases =
            [sums(gate, i, 1.0), sums(up, i, 1.0), sums(down, h, f64::from(self.down_multiplier))];
        let gate_up_bias = self.gate_up_bias();
        for (number, rows) in chunks(x.rows).enumerate() {
            let chunk = Chunk {
                x: x.rows(rows.clone()),
                dy: dy.rows(rows.clone()),
                first_row: rows.start,
                dx: targets.x.map(|dx| dx.row(rows.start)),
                saved: saved.gate_up.as_ref().map(|saved| {
                    let from = rows.start * self.saved_stride();
                    saved.each_ref().map(|rows| &rows[from..])
                }),
                u: saved.u.each_ref().map(|u| Some(u.as_ref()?.a(self.gemm.a_bytes(), rows.start))),
                is_first: number == 0,
                is_last: number + 1 == count,
            };
            Backward::new(self, chunk, &gradients, &gate_up_bias, threads).run(&biases);
        }
        biases.map(|sums| sums.map(ColumnSums::into_values))
    }
}

/// The rows of one chunk.
struct Chunk<'a, T> {
    x: Matrix<'a, T>,
    dy: Matrix<'a, T>,
    first_row: usize,
    dx: Option<Target<T>>,
    /// Rows of gate and of up.
    saved: Option<[&'a [T]; 2]>,
    /// Rows of u of each addend.
    u: [Option<A>; 2],
    is_first: bool,
    is_last: bool,
}
