//! The block with weights that are used as they are: its operands, and its forward pass.
//!
//! ```text
//! gate = x·Wgᵀ + bg   up = x·Wuᵀ + bu   h = act(gate) ⊙ up   y = m·(h·Wdᵀ + bd)
//! ```
//!
//! gate, up and down may have low-rank addends (`low_rank.rs`). `backward.rs` has the gradients.

mod forward;

use std::ops::Range;

use self::forward::{Chunk, Forward};
use super::gemm::{A, B, Gemm, Source};
use super::low_rank::{LowRank, RankRows};
use super::products::Target;
use super::{chunks, padded_bias, threads_for};
use crate::cpu::kernels::Io;
use crate::cpu::matrix::Matrix;
use crate::cpu::pages;
use crate::cpu::pass::PAD;
use crate::gate::activation::Glu;

/// The formula, the weights gate and up (I,H), down (H,I), their biases, and the addends of gate
/// and up, and of down.
pub(super) struct Block<'a, T: 'static> {
    pub(super) gemm: Gemm<T>,
    pub(super) glu: Glu,
    pub(super) down_multiplier: f32,
    pub(super) weights: [Source<'a, T>; 3],
    pub(super) biases: [Option<Vec<f32>>; 3],
    pub(super) low_rank: [Option<LowRank<'a, T>>; 2],
}

/// What the forward pass keeps for the backward pass.
pub(crate) struct Saved<T> {
    /// gate and up (M, I), rounded to T, in rows of [`Block::saved_stride`] elements. Without them
    /// they are computed again.
    pub(super) gate_up: Option<[Vec<T>; 2]>,
    /// u of each addend.
    pub(super) u: [Option<RankRows>; 2],
}

impl<T> Saved<T> {
    /// Nothing: gate and up are computed again, of a block without addends.
    pub(crate) fn nothing() -> Self {
        Self { gate_up: None, u: [None, None] }
    }
}

impl<'a, T: Io> Block<'a, T> {
    /// H
    pub(super) fn hidden_size(&self) -> usize {
        self.weights[0].k()
    }

    /// I
    pub(super) fn intermediate_size(&self) -> usize {
        self.weights[0].rows()
    }

    pub(super) fn threads(&self, rows: usize) -> usize {
        threads_for(3 * self.hidden_size() * self.intermediate_size() * rows)
    }

    /// Whole panels.
    pub(super) fn saved_stride(&self) -> usize {
        self.intermediate_size().next_multiple_of(self.gemm.nr())
    }

    /// Panels of gate and up, each with half of its columns.
    pub(super) fn gate_up_panels(&self) -> usize {
        self.intermediate_size().div_ceil(self.gemm.nr() / 2)
    }

    pub(super) fn gate_up(&self) -> B<'a, T> {
        match self.weights[0] {
            Source::Packed(packed) if self.gemm.reads(&packed.panels) => B::Panels(packed.panels),
            gate => B::Pair([gate, self.weights[1]]),
        }
    }

    fn down(&self) -> B<'a, T> {
        match self.weights[2] {
            Source::Packed(packed) if self.gemm.reads(&packed.panels) => B::Panels(packed.panels),
            down => B::Matrix(down),
        }
    }

    /// The biases of gate and up in the order of the panels, if there is one.
    pub(super) fn gate_up_bias(&self) -> Option<Vec<f32>> {
        let half = self.gemm.nr() / 2;
        let [gate, up, _] = &self.biases;
        (gate.is_some() || up.is_some()).then(|| {
            let mut both = vec![0.0; self.gate_up_panels() * 2 * half];
            for (bias, first) in [(gate, 0), (up, half)] {
                for (i, &value) in bias.iter().flatten().enumerate() {
                    both[i / half * 2 * half + first + i % half] = value;
                }
            }
            both
        })
    }

    /// The stride of rows of H elements as A.
    pub(super) fn x_stride(&self) -> usize {
        self.gemm.layout(1, self.hidden_size()).padded_k() + PAD
    }

    /// The stride of rows of I elements as A, which are written in whole panels.
    pub(super) fn h_stride(&self) -> usize {
        let padded_k = self.gemm.layout(1, self.intermediate_size()).padded_k();
        padded_k.max(self.saved_stride()) + PAD
    }

    /// Writes zeros behind I elements of these rows, as far as a product reads.
    ///
    /// # Safety
    /// A has the rows, of [`Block::h_stride`].
    pub(super) unsafe fn pad_h(&self, a: A, rows: Range<usize>) {
        let (i, a_bytes) = (self.intermediate_size(), self.gemm.a_bytes());
        let padding = (self.gemm.layout(1, i).padded_k() - i) * a_bytes;
        for row in rows.filter(|_| padding > 0) {
            // SAFETY: the caller's contract.
            unsafe { a.at(a_bytes, row, i).write_bytes(0, padding) };
        }
    }

    /// Writes zeros behind the panels of gate or of up, which may be half a panel narrower than
    /// [`Block::saved_stride`].
    ///
    /// # Safety
    /// The rows have this stride, and every element of the panels was written.
    unsafe fn finish_saved(&self, saved: &mut Vec<T>, rows: usize) {
        let stride = self.saved_stride();
        for row in 0..rows {
            for column in self.gate_up_panels() * (self.gemm.nr() / 2)..stride {
                // SAFETY: the capacity is that of all rows.
                unsafe { saved.as_mut_ptr().add(row * stride + column).write(T::zero()) };
            }
        }
        // SAFETY: the caller's contract, and the loop above.
        unsafe { saved.set_len(rows * stride) };
    }

    /// x (M,H) -> y (M,H), and what the backward pass reads; gate and up are kept with `save`.
    pub(super) fn forward(&self, x: Matrix<T>, save: bool) -> (Vec<T>, Saved<T>) {
        x.check();
        let h = self.hidden_size();
        let mut y: Vec<T> = Vec::with_capacity(x.rows * h);
        pages::advise_huge(y.as_mut_ptr(), y.capacity());
        let rows = || {
            let rows: Vec<T> = Vec::with_capacity(x.rows * self.saved_stride());
            pages::advise_huge(rows.as_ptr().cast_mut(), rows.capacity());
            rows
        };
        let mut gate_up = save.then(|| [rows(), rows()]);
        let targets = gate_up
            .as_mut()
            .map(|saved| saved.each_mut().map(|rows| Target::new(rows, self.saved_stride())));
        let u = self.low_rank.each_ref().map(|addend| {
            addend.as_ref().map(|addend| RankRows::new(&self.gemm, x.rows, addend.rank()))
        });
        let to = Target::new(&mut y, h);
        let biases = [self.gate_up_bias(), padded_bias(self.biases[2].as_deref(), self.gemm.nr())];
        for rows in chunks(x.rows) {
            let chunk = Chunk {
                x: x.rows(rows.clone()),
                first_row: rows.start,
                saved: targets.map(|targets| targets.map(|target| target.row(rows.start))),
                u: u.each_ref().map(|u| u.as_ref().map(|u| u.a(self.gemm.a_bytes(), rows.start))),
                y: to.row(rows.start),
            };
            Forward::new(self, chunk, &biases).run();
        }
        // SAFETY: every chunk has written all its rows.
        unsafe { y.set_len(x.rows * h) };
        for rows in gate_up.iter_mut().flatten() {
            // SAFETY: as above, but for the columns beyond gate's and up's panels.
            unsafe { self.finish_saved(rows, x.rows) };
        }
        (y, Saved { gate_up, u })
    }
}
