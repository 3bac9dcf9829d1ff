//! The two kinds of products whose results leave this folder: rows of y or dx, and gradients of
//! weights.

use super::gemm::{A, B, Gemm, Own};
use super::grid::Grid;
use crate::cpu::buffer::Buffer;
use crate::cpu::epilogue::PanelSums;
use crate::cpu::panels::PanelLayout;
use crate::cpu::sweep::Sums;
use crate::cpu::threads::SendPtr;

/// A matrix that is written: its first element, and elements from one row to the next.
pub(super) struct Target<T> {
    pub(super) to: *mut T,
    pub(super) stride: usize,
}

// Not derived, which would ask for the same of T.
impl<T> Clone for Target<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Target<T> {}

// SAFETY: units write disjoint parts.
unsafe impl<T: Send> Sync for Target<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Target<T> {}

impl<T> Target<T> {
    pub(super) fn new(data: &mut Vec<T>, stride: usize) -> Self {
        Self { to: data.as_mut_ptr(), stride }
    }

    /// This row, and every second one after it.
    pub(super) fn every_second_row(self) -> Self {
        Self { stride: 2 * self.stride, ..self }
    }

    /// The same from another row on.
    pub(super) fn row(self, row: usize) -> Self {
        Self { to: self.to.wrapping_add(row * self.stride), ..self }
    }
}

/// Rows of y = (Σ A·B + bias)·factor.
pub(super) struct RowProduct<'a, T: 'static> {
    pub(super) gemm: Gemm<T>,
    pub(super) terms: Vec<(A, B<'a, T>)>,
    /// As wide as all panels, or null.
    pub(super) bias: *const f32,
    pub(super) factor: f32,
    pub(super) y: Target<T>,
    pub(super) columns: usize,
    pub(super) grid: Grid,
}

impl<'a, T: Copy> RowProduct<'a, T> {
    pub(super) fn grid(gemm: &Gemm<T>, rows: usize, columns: usize, threads: usize) -> Grid {
        let group = gemm.sweep.panels_at_once(rows, usize::MAX);
        Grid::new(rows, columns.div_ceil(gemm.nr()), group, threads)
    }

    /// # Safety
    /// The matrices have room; `sums` and `own` are this thread's; no other thread has this unit.
    pub(super) unsafe fn unit(&self, unit: usize, sums: *mut f32, own: Own) {
        let (panels, rows) = self.grid.unit(unit);
        for (i, (a, b)) in self.terms.iter().enumerate() {
            let sums = Sums { to: sums, accumulate: i > 0 };
            // SAFETY: the caller's contract.
            unsafe { self.gemm.add(*a, b, (panels.clone(), rows.clone()), sums, own) };
        }
        let (nr, y) = (self.gemm.nr(), self.y.row(rows.start));
        for (i, panel) in panels.enumerate() {
            // SAFETY: as above.
            unsafe {
                let bias = match self.bias {
                    bias if bias.is_null() => bias,
                    bias => bias.add(panel * nr),
                };
                let sums = sums.add(i * self.gemm.panel_sums(rows.len()));
                let sums = PanelSums { sums, rows: rows.len(), bias };
                let columns = nr.min(self.columns - panel * nr);
                let to = y.to.add(panel * nr);
                (self.gemm.edges.output)(sums, self.factor, to, y.stride, columns);
            }
        }
    }
}

/// The gradient of a weight (rows, columns), Aᵀ·B over the rows of all chunks, times a factor.
pub(super) struct WeightGradient<T: 'static> {
    gemm: Gemm<T>,
    grid: Grid,
    columns: usize,
    factor: f32,
    to: Target<T>,
    /// With several chunks: the sums of each unit.
    sums: Option<(Buffer, SendPtr<f32>)>,
}

/// One chunk's operands of a [`WeightGradient`].
#[derive(Clone, Copy)]
pub(super) struct ChunkOperands {
    /// A (rows of the weight, rows of the chunk)
    pub(super) a: A,
    /// B (rows of the chunk, columns of the weight)
    pub(super) b: (PanelLayout, *const u8),
    pub(super) is_first: bool,
    pub(super) is_last: bool,
}

impl<T: Copy> WeightGradient<T> {
    pub(super) fn new(
        gemm: Gemm<T>,
        (rows, columns): (usize, usize),
        factor: f32,
        to: Target<T>,
        (threads, chunks): (usize, usize),
    ) -> Self {
        let grid = RowProduct::grid(&gemm, rows, columns, threads);
        let sums = (chunks > 1).then(|| {
            let blocks = rows.div_ceil(grid.row_block());
            let panels = columns.div_ceil(gemm.nr());
            let len = blocks * panels * gemm.panel_sums(grid.row_block());
            let mut buffer = Buffer::zeroed(len * size_of::<f32>());
            let sums = SendPtr(buffer.as_mut_ptr::<f32>());
            (buffer, sums)
        });
        Self { gemm, grid, columns, factor, to, sums }
    }

    pub(super) fn grid(&self) -> Grid {
        self.grid
    }

    /// # Safety
    /// As [`RowProduct::unit`]; the chunks come one after the other.
    pub(super) unsafe fn unit(
        &self,
        unit: usize,
        chunk: ChunkOperands,
        own_sums: *mut f32,
        own: Own,
    ) {
        let (panels, rows) = self.grid.unit(unit);
        let nr = self.gemm.nr();
        let sums = match &self.sums {
            None => own_sums,
            Some((_, sums)) => {
                let block = rows.start / self.grid.row_block() * self.columns.div_ceil(nr);
                let panel = block + panels.start;
                sums.0.wrapping_add(panel * self.gemm.panel_sums(self.grid.row_block()))
            }
        };
        // SAFETY: the caller's contract.
        unsafe {
            let b = B::Panels(crate::cpu::panels::PanelsRef::new(chunk.b.0, chunk.b.1));
            let to = Sums { to: sums, accumulate: !chunk.is_first };
            self.gemm.add(chunk.a, &b, (panels.clone(), rows.clone()), to, own);
            if !chunk.is_last {
                return;
            }
            let to = self.to.row(rows.start);
            for (i, panel) in panels.enumerate() {
                let sums = sums.add(i * self.gemm.panel_sums(rows.len()));
                let sums = PanelSums { sums, rows: rows.len(), bias: std::ptr::null() };
                let columns = nr.min(self.columns - panel * nr);
                let first = to.to.add(panel * nr);
                (self.gemm.edges.output)(sums, self.factor, first, to.stride, columns);
            }
        }
    }
}
