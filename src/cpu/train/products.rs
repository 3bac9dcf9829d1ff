//! The two kinds of products whose results leave this folder: rows of y or dx, and gradients of
//! weights.

use super::gemm::{A, B, Gemm, Own};
use super::grid::Grid;
use super::intake::Transposed;
use super::low_rank::Mask;
use crate::cpu::buffer::Buffer;
use crate::cpu::epilogue::PanelSums;
use crate::cpu::kernels::Edges;
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

/// A matrix that is written in T or in f32.
pub(super) enum Rows<T> {
    Io(Target<T>),
    F32(Target<f32>),
}

// Not derived, which would ask for the same of T.
impl<T> Clone for Rows<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Rows<T> {}

impl<T> Rows<T> {
    /// A, whose elements are f32, or bf16 beside T = bf16.
    pub(super) fn of_a(a: A, a_bytes: usize) -> Self {
        if a_bytes == size_of::<f32>() {
            Self::F32(Target { to: a.data.cast(), stride: a.stride })
        } else {
            Self::Io(Target { to: a.data.cast(), stride: a.stride })
        }
    }

    /// Writes the sums of a panel times a factor.
    ///
    /// # Safety
    /// The matrix has the rows from `row` and the columns from `column` on.
    unsafe fn write(
        &self,
        edges: &Edges<T>,
        (sums, factor): (PanelSums, f32),
        (row, column): (usize, usize),
        columns: usize,
    ) {
        // SAFETY: the caller's contract.
        unsafe {
            match self {
                Self::Io(target) => {
                    let to = target.row(row).to.add(column);
                    (edges.output)(sums, factor, to, target.stride, columns);
                }
                Self::F32(target) => {
                    let to = target.row(row).to.add(column);
                    (edges.output_f32)(sums, factor, to, target.stride, columns);
                }
            }
        }
    }
}

/// Rows of y = (Σ A·B + bias)·factor.
pub(super) struct RowProduct<'a, T: 'static> {
    pub(super) gemm: Gemm<T>,
    pub(super) terms: Vec<(A, B<'a, T>)>,
    /// Applied to the first term.
    pub(super) mask: Option<Mask>,
    /// As wide as all panels, or null.
    pub(super) bias: *const f32,
    pub(super) factor: f32,
    pub(super) y: Rows<T>,
    /// y as A, and its transpose.
    pub(super) transposed: Option<(A, Transposed)>,
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
            unsafe {
                self.gemm.add(*a, b, (panels.clone(), rows.clone()), sums, own);
                if let Some(mask) = self.mask.filter(|_| i == 0) {
                    self.gemm.mask(&mask, sums.to, &panels, &rows);
                }
            }
        }
        let nr = self.gemm.nr();
        for (i, panel) in panels.clone().enumerate() {
            // SAFETY: as above.
            unsafe {
                let bias = match self.bias {
                    bias if bias.is_null() => bias,
                    bias => bias.add(panel * nr),
                };
                let sums = sums.add(i * self.gemm.panel_sums(rows.len()));
                let sums = PanelSums { sums, rows: rows.len(), bias };
                let columns = nr.min(self.columns - panel * nr);
                let at = (rows.start, panel * nr);
                self.y.write(self.gemm.edges, (sums, self.factor), at, columns);
            }
        }
        if let Some((a, transposed)) = self.transposed {
            let columns = panels.start * nr..self.columns.min(panels.end * nr);
            // SAFETY: as above.
            unsafe { transposed.write(self.gemm.a_bytes(), a, rows, columns) };
        }
    }
}

/// The gradient of a weight (rows, columns), Aᵀ·B over the rows of all chunks, times a factor.
pub(super) struct WeightGradient<T: 'static> {
    gemm: Gemm<T>,
    grid: Grid,
    columns: usize,
    factor: f32,
    to: Rows<T>,
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
        to: Rows<T>,
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
            for (i, panel) in panels.enumerate() {
                let sums = sums.add(i * self.gemm.panel_sums(rows.len()));
                let sums = PanelSums { sums, rows: rows.len(), bias: std::ptr::null() };
                let columns = nr.min(self.columns - panel * nr);
                let at = (rows.start, panel * nr);
                self.to.write(self.gemm.edges, (sums, self.factor), at, columns);
            }
        }
    }
}
