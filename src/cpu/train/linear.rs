//! A linear layer with a weight that is used as it is, forward and backward:
//!
//! ```text
//! y = x·Wᵀ + b     dx = dy·W     dW = dyᵀ·x     db = the column sums of dy
//! ```

use super::arena::{Arena, Memory};
use super::column_sums::ColumnSums;
use super::gemm::{A, B, Gemm, Source};
use super::intake::{Intake, Transposed};
use super::products::{ChunkOperands, RowProduct, Rows, Target, WeightGradient};
use super::scratch::{Needs, OwnOffsets};
use super::{chunks, padded_bias, threads_for};
use crate::cpu::kernels::Io;
use crate::cpu::matrix::Matrix;
use crate::cpu::pages;
use crate::cpu::pass::PAD;
use crate::cpu::threads::{self, Phase};

/// W (out, in) and b (out).
pub(super) struct Linear<'a, T: 'static> {
    pub(super) gemm: Gemm<T>,
    pub(super) weight: Source<'a, T>,
    pub(super) bias: Option<Vec<f32>>,
}

/// Where gradients are written, and which are computed at all.
pub(super) struct LinearTargets<T> {
    /// (M, in)
    pub(super) x: Option<Target<T>>,
    /// (out, in)
    pub(super) weight: Option<Target<T>>,
    pub(super) bias: bool,
}

impl<T: Io> Linear<'_, T> {
    /// x (M, in) -> y (M, out)
    pub(super) fn forward(&self, x: Matrix<T>) -> Vec<T> {
        x.check();
        let out = self.weight.rows();
        let mut y: Vec<T> = Vec::with_capacity(x.rows * out);
        pages::advise_huge(y.as_mut_ptr(), y.capacity());
        let to = Target::new(&mut y, out);
        let bias = padded_bias(self.bias.as_deref(), self.gemm.nr());
        let bias = bias.as_ref().map_or(std::ptr::null(), |bias| bias.as_ptr());
        let threads = self.threads(x.rows);
        for rows in chunks(x.rows) {
            let product = Product { b: self.weight, bias, y: to.row(rows.start) };
            let job = Job { product: Some(product), ..Job::new(x.rows(rows)) };
            Chunk::new(self.gemm, job, threads).run();
        }
        // SAFETY: every chunk has written all its rows.
        unsafe { y.set_len(x.rows * out) };
        y
    }

    /// Writes the gradients under dy (M, out), and returns that of the bias.
    pub(super) fn backward(
        &self,
        x: Matrix<T>,
        dy: Matrix<T>,
        targets: &LinearTargets<T>,
    ) -> Option<Vec<f32>> {
        [&x, &dy].into_iter().for_each(Matrix::check);
        let (out, k) = (self.weight.rows(), self.weight.k());
        let (threads, count) = (self.threads(x.rows), chunks(x.rows).count());
        let gradient = targets.weight.map(|to| {
            WeightGradient::new(self.gemm, (out, k), 1.0, Rows::Io(to), (threads, count))
        });
        let sums = targets.bias.then(|| ColumnSums::new(out, 1.0));
        for (number, rows) in chunks(x.rows).enumerate() {
            let b = self.weight.transposed();
            let product =
                |dx: Target<T>| Product { b, bias: std::ptr::null(), y: dx.row(rows.start) };
            let job = Job {
                product: targets.x.map(product),
                gradient: gradient.as_ref().map(|gradient| (gradient, x.rows(rows.clone()))),
                sums: sums.as_ref(),
                is_first: number == 0,
                is_last: number + 1 == count,
                ..Job::new(dy.rows(rows.clone()))
            };
            Chunk::new(self.gemm, job, threads).run();
        }
        sums.map(ColumnSums::into_values)
    }

    fn threads(&self, rows: usize) -> usize {
        threads_for(self.weight.rows() * self.weight.k() * rows)
    }
}

/// A·B + bias -> y
struct Product<'a, T> {
    b: Source<'a, T>,
    bias: *const f32,
    y: Target<T>,
}

/// What is computed from one chunk of rows.
struct Job<'a, T: 'static> {
    /// A: x in the forward pass, dy in the backward pass.
    from: Matrix<'a, T>,
    product: Option<Product<'a, T>>,
    /// Aᵀ·x
    gradient: Option<(&'a WeightGradient<T>, Matrix<'a, T>)>,
    /// The column sums of A.
    sums: Option<&'a ColumnSums>,
    is_first: bool,
    is_last: bool,
}

impl<'a, T> Job<'a, T> {
    /// Nothing.
    fn new(from: Matrix<'a, T>) -> Self {
        Self { from, product: None, gradient: None, sums: None, is_first: true, is_last: true }
    }
}

/// A [`Job`] with its scratch.
struct Chunk<'a, T: 'static> {
    threads: usize,
    memory: Memory,
    own: OwnOffsets,
    intakes: Vec<Intake<'a, T>>,
    a: A,
    product: Option<RowProduct<'a, T>>,
    gradient: Option<(&'a WeightGradient<T>, ChunkOperands)>,
    sums: Option<&'a ColumnSums>,
}

// SAFETY: units write disjoint parts.
unsafe impl<T: Io> Sync for Chunk<'_, T> {}

impl<'a, T: Io> Chunk<'a, T> {
    fn new(gemm: Gemm<T>, job: Job<'a, T>, threads: usize) -> Self {
        let Job { from, .. } = job;
        let rows = from.rows;
        let mut shared = Arena::default();
        let bytes = |rows: usize, stride: usize| {
            (rows + gemm.sweep.row_padding()) * stride * gemm.a_bytes()
        };
        let padded_k = gemm.layout(1, from.k).padded_k();
        let stride = padded_k + PAD;
        let a = (shared.piece(bytes(rows, stride)), stride);
        let by_rows = |columns: usize| gemm.layout(columns, rows);
        let padded_rows = by_rows(1).padded_k();
        let gradient = job.gradient.map(|(gradient, x)| {
            let stride = padded_rows + PAD;
            let transposed = (shared.piece(bytes(from.k, stride)), stride);
            (gradient, x, transposed, shared.piece(by_rows(x.k).bytes()))
        });

        let product = job.product.map(|product| {
            let grid = RowProduct::grid(&gemm, rows, product.b.rows(), threads);
            (product, grid)
        });
        let grids = product.iter().map(|(_, grid)| *grid);
        let grids = grids.chain(gradient.iter().map(|(gradient, ..)| gradient.grid()));
        let mut needs = Needs::default();
        grids.for_each(|grid| needs.add(&gemm, grid, (1, 1)));
        let mut own = Arena::default();
        let own_offsets = OwnOffsets::new(&gemm, needs, &mut own);
        let memory = Memory::new(shared, &own, threads);

        let at = |(offset, stride)| A { data: memory.at(offset), stride };
        let a = at(a);
        let mut take = Intake { a: Some((a, padded_k)), ..Intake::new(gemm, from) };
        let mut intakes = vec![];
        let gradient = gradient.map(|(gradient, x, transposed, b)| {
            let b = (by_rows(x.k), memory.at(b));
            take.transposed = Some(Transposed { to: at(transposed), rows, padded_rows });
            intakes.push(Intake { b: Some(b), ..Intake::new(gemm, x) });
            let b = (b.0, b.1.cast_const());
            let (is_first, is_last) = (job.is_first, job.is_last);
            (gradient, ChunkOperands { a: at(transposed), b, is_first, is_last })
        });
        intakes.push(take);
        let product = product.map(|(Product { b, bias, y }, grid)| RowProduct {
            gemm,
            terms: vec![(a, B::Matrix(b))],
            mask: None,
            bias,
            factor: 1.0,
            y: Rows::Io(y),
            transposed: None,
            columns: b.rows(),
            grid,
        });
        Self { threads, own: own_offsets, intakes, a, product, gradient, sums: job.sums, memory }
    }

    fn run(self) {
        let phases = Phases {
            intakes: self.intakes.iter().map(Intake::phase).collect(),
            product: Phase::new(self.product.as_ref().map_or(0, |p| p.grid.units())),
            gradient: Phase::new(self.gradient.as_ref().map_or(0, |(g, _)| g.grid().units())),
            sums: Phase::new(self.sums.map_or(0, ColumnSums::units)),
        };
        threads::run_on(self.threads, |thread| self.work(thread, &phases));
    }

    /// What a thread does.
    fn work(&self, thread: usize, phases: &Phases) {
        let (sums, own) = self.own.at(self.memory.own(thread));
        // SAFETY: units of a phase write disjoint parts, a phase begins when the ones that it reads
        // are done, and each thread has scratch of its own.
        unsafe {
            for (intake, phase) in self.intakes.iter().zip(&phases.intakes) {
                phase.work(|unit, _| intake.unit(unit));
            }
            phases.intakes.iter().for_each(Phase::wait);
            if let Some(product) = &self.product {
                phases.product.work(|unit, _| product.unit(unit, sums, own));
            }
            if let Some((gradient, operands)) = &self.gradient {
                phases.gradient.work(|unit, _| gradient.unit(unit, *operands, sums, own));
            }
            if let (Some(of), Some(last)) = (self.sums, self.intakes.last()) {
                let (a_bytes, rows) = (last.gemm.a_bytes(), last.from.rows);
                phases.sums.work(|unit, _| of.unit(unit, self.a, a_bytes, rows));
            }
        }
    }
}

/// The units of one chunk.
struct Phases {
    intakes: Vec<Phase>,
    product: Phase,
    gradient: Phase,
    sums: Phase,
}
