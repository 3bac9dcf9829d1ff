//! The block with weights that are used as they are: its operands, and its forward pass.
//!
//! ```text
//! gate = x·Wgᵀ + bg   up = x·Wuᵀ + bu   h = act(gate) ⊙ up   y = m·(h·Wdᵀ + bd)
//! ```
//!
//! `backward.rs` has the gradients.

use std::ops::Range;

use super::arena::{Arena, Memory};
use super::gemm::{A, B, Gemm, Own};
use super::grid::Grid;
use super::intake::Intake;
use super::products::{RowProduct, Target};
use super::{chunks, padded_bias, threads_for};
use crate::cpu::epilogue::PanelSums;
use crate::cpu::kernels::Io;
use crate::cpu::matrix::Matrix;
use crate::cpu::pages;
use crate::cpu::pass::PAD;
use crate::cpu::sweep::Sums;
use crate::cpu::threads::{self, Phase};
use crate::gate::activation::Glu;

/// The formula, the weights gate and up (I,H), down (H,I), and their biases.
pub(super) struct Block<'a, T: 'static> {
    pub(super) gemm: Gemm<T>,
    pub(super) glu: Glu,
    pub(super) down_multiplier: f32,
    pub(super) weights: [Matrix<'a, T>; 3],
    pub(super) biases: [Option<Vec<f32>>; 3],
}

/// gate and up (M, I), rounded to T, in rows of [`Block::saved_stride`] elements.
pub(crate) struct SavedGateUp<T> {
    pub(super) gate: Vec<T>,
    pub(super) up: Vec<T>,
}

impl<'a, T: Io> Block<'a, T> {
    /// H
    pub(super) fn hidden_size(&self) -> usize {
        self.weights[0].k
    }

    /// I
    pub(super) fn intermediate_size(&self) -> usize {
        self.weights[0].rows
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
        B::Pair([self.weights[0], self.weights[1]])
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

    /// x (M,H) -> y (M,H), and gate and up with `save`.
    pub(super) fn forward(&self, x: Matrix<T>, save: bool) -> (Vec<T>, Option<SavedGateUp<T>>) {
        x.check();
        let h = self.hidden_size();
        let mut y: Vec<T> = Vec::with_capacity(x.rows * h);
        pages::advise_huge(y.as_mut_ptr(), y.capacity());
        let rows = || {
            let rows: Vec<T> = Vec::with_capacity(x.rows * self.saved_stride());
            pages::advise_huge(rows.as_ptr().cast_mut(), rows.capacity());
            rows
        };
        let mut saved = save.then(|| SavedGateUp { gate: rows(), up: rows() });
        let targets = saved.as_mut().map(|saved| {
            [&mut saved.gate, &mut saved.up].map(|rows| Target::new(rows, self.saved_stride()))
        });
        let to = Target::new(&mut y, h);
        let biases = [self.gate_up_bias(), padded_bias(self.biases[2].as_deref(), self.gemm.nr())];
        for rows in chunks(x.rows) {
            let targets = targets.map(|targets| targets.map(|target| target.row(rows.start)));
            let y = to.row(rows.start);
            Forward::new(self, x.rows(rows), targets, &biases, y).run();
        }
        // SAFETY: every chunk has written all its rows.
        unsafe { y.set_len(x.rows * h) };
        for rows in saved.iter_mut().flat_map(|saved| [&mut saved.gate, &mut saved.up]) {
            // SAFETY: as above, but for the columns beyond gate's and up's panels.
            unsafe { self.finish_saved(rows, x.rows) };
        }
        (y, saved)
    }
}

/// The forward pass of one chunk.
struct Forward<'a, T: 'static> {
    block: &'a Block<'a, T>,
    threads: usize,
    memory: Memory,
    sums: usize,
    own: [usize; 2],
    intake: Intake<'a, T>,
    h: A,
    gate: Grid,
    gate_up_bias: *const f32,
    saved: Option<[Target<T>; 2]>,
    down: RowProduct<'a, T>,
}

// SAFETY: the biases are read only, and units write disjoint parts.
unsafe impl<T: Io> Sync for Forward<'_, T> {}

impl<'a, T: Io> Forward<'a, T> {
    fn new(
        block: &'a Block<'a, T>,
        x: Matrix<'a, T>,
        saved: Option<[Target<T>; 2]>,
        [gate_up_bias, down_bias]: &'a [Option<Vec<f32>>; 2],
        y: Target<T>,
    ) -> Self {
        let (gemm, rows, threads) = (block.gemm, x.rows, block.threads(x.rows));
        let bytes = |stride: usize| (rows + gemm.sweep.row_padding()) * stride * gemm.a_bytes();
        let mut shared = Arena::default();
        let [xa, h] = [block.x_stride(), block.h_stride()]
            .map(|stride| (shared.piece(bytes(stride)), stride));
        let gate = RowProduct::grid(&gemm, rows, block.gate_up_panels() * gemm.nr(), threads);
        let down = RowProduct::grid(&gemm, rows, block.hidden_size(), threads);
        let sums = [gate, down].map(|grid| grid.group() * gemm.panel_sums(grid.row_block()));
        let mut own = Arena::default();
        let sums = own.piece(sums[0].max(sums[1]) * size_of::<f32>());
        let pieces = [
            own.piece(gemm.packed_bytes(gate.group().max(down.group()))),
            own.piece(gemm.rewritten_bytes(rows)),
        ];
        let memory = Memory::new(shared, &own, threads);
        let a = |(offset, stride)| A { data: memory.at(offset), stride };
        let bias = |bias: &Option<Vec<f32>>| bias.as_ref().map_or(std::ptr::null(), |b| b.as_ptr());
        let padded_k = gemm.layout(1, block.hidden_size()).padded_k();
        Self {
            block,
            threads,
            sums,
            own: pieces,
            intake: Intake { gemm, from: x, a: Some((a(xa), padded_k)), transposed: None, b: None },
            h: a(h),
            gate,
            gate_up_bias: bias(gate_up_bias),
            saved,
            down: RowProduct {
                gemm,
                terms: vec![(a(h), B::Matrix(block.weights[2]))],
                bias: bias(down_bias),
                factor: block.down_multiplier,
                y,
                columns: block.hidden_size(),
                grid: down,
            },
            memory,
        }
    }

    fn run(self) {
        let intake = self.intake.phase();
        let [gate, down] = [self.gate, self.down.grid].map(|grid| Phase::new(grid.units()));
        threads::run_on(self.threads, |thread| self.work(thread, [&intake, &gate, &down]));
    }

    /// What a thread does.
    fn work(&self, thread: usize, [intake, gate, down]: [&Phase; 3]) {
        let own = self.memory.own(thread);
        let sums = own.wrapping_add(self.sums).cast::<f32>();
        let [packed, rewritten] = self.own.map(|offset| own.wrapping_add(offset));
        let own = Own { packed, rewritten };
        // SAFETY: units of a phase write disjoint parts, a phase begins when the one before it is
        // done, and each thread has scratch of its own.
        unsafe {
            intake.work(|unit, _| self.intake.unit(unit));
            intake.wait();
            gate.work(|unit, _| self.gate_unit(unit, sums, own));
            gate.wait();
            down.work(|unit, _| self.down.unit(unit, sums, own));
        }
    }

    /// Some panels of gate and up -> h, and gate and up themselves if they are saved.
    ///
    /// # Safety
    /// As [`RowProduct::unit`].
    unsafe fn gate_unit(&self, unit: usize, sums: *mut f32, own: Own) {
        let (block, gemm) = (self.block, self.block.gemm);
        let (panels, rows) = self.gate.unit(unit);
        let Some((x, _)) = self.intake.a else { return };
        let half = gemm.nr() / 2;
        // SAFETY: the caller's contract.
        unsafe {
            let part = (panels.clone(), rows.clone());
            gemm.add(x, &block.gate_up(), part, Sums::new(sums), own);
            for (i, panel) in panels.enumerate() {
                let bias = match self.gate_up_bias {
                    bias if bias.is_null() => bias,
                    bias => bias.add(panel * gemm.nr()),
                };
                let sums = sums.add(i * gemm.panel_sums(rows.len()));
                let sums = PanelSums { sums, rows: rows.len(), bias };
                let to = self.h.at(gemm.a_bytes(), rows.start, panel * half);
                (gemm.edges.gate)(&block.glu, sums, to, self.h.stride);
                for (side, target) in self.saved.iter().flatten().enumerate() {
                    let target = target.row(rows.start);
                    let to = target.to.add(panel * half);
                    (gemm.edges.output)(
                        sums.skip_columns(side * half),
                        1.0,
                        to,
                        target.stride,
                        half,
                    );
                }
                if panel + 1 == block.gate_up_panels() {
                    block.pad_h(self.h, rows.clone());
                }
            }
        }
    }
}
