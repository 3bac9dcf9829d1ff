//! Rows of x and of dy become operands: A, its transpose, and panels of B.

use std::ops::Range;

use super::gemm::{A, Gemm};
use super::grid::ROWS;
use super::low_rank::{Mask, PackRows};
use super::pack::{PackArgs, transpose};
use crate::cpu::kernels::Io;
use crate::cpu::matrix::Matrix;
use crate::cpu::panels::PanelLayout;
use crate::cpu::threads::Phase;

/// A matrix (rows, k) of dtype T, and where its forms are written.
pub(super) struct Intake<'a, T: 'static> {
    pub(super) gemm: Gemm<T>,
    pub(super) from: Matrix<'a, T>,
    /// A (rows, k), padded with zeros to this many k.
    pub(super) a: Option<(A, usize)>,
    /// Applied to A, and with it to the transpose and the panels. Needs `a`.
    pub(super) mask: Option<Mask>,
    /// The transpose of A (k, rows), padded with zeros. Needs `a`.
    pub(super) transposed: Option<Transposed>,
    /// Panels of B (rows, k): the rows are its k, and its columns are k.
    pub(super) b: Option<(PanelLayout, *mut u8)>,
}

// SAFETY: units write disjoint rows of each form.
unsafe impl<T: Sync> Sync for Intake<'_, T> {}

impl<'a, T: Io> Intake<'a, T> {
    /// Without any forms.
    pub(super) fn new(gemm: Gemm<T>, from: Matrix<'a, T>) -> Self {
        Self { gemm, from, a: None, mask: None, transposed: None, b: None }
    }

    /// Its units.
    pub(super) fn phase(&self) -> Phase {
        let any = self.a.is_some() || self.b.is_some();
        Phase::new(if any { self.from.rows.div_ceil(ROWS) } else { 0 })
    }

    /// # Safety
    /// The forms have room; no other thread has this unit.
    pub(super) unsafe fn unit(&self, unit: usize) {
        let rows = unit * ROWS..self.from.rows.min((unit + 1) * ROWS);
        // SAFETY: the caller's contract.
        unsafe {
            if let Some((a, padded_k)) = self.a {
                rows.clone().for_each(|row| self.take_row(a, padded_k, row));
                if let Some(mask) = self.mask {
                    let (a_bytes, columns) = (self.gemm.a_bytes(), 0..self.from.k);
                    let at = a.at(a_bytes, rows.start, 0);
                    mask.apply_to_a(a_bytes, rows.clone(), columns, at, a.stride);
                }
                if let Some(transposed) = self.transposed {
                    transposed.write(self.gemm.a_bytes(), a, rows.clone(), 0..self.from.k);
                }
            }
            match (self.b, self.a) {
                (Some((layout, to)), Some((from, _))) if self.mask.is_some() => {
                    let (gemm, columns) = (self.gemm, self.from.k);
                    PackRows { gemm, from, layout, columns, to }.rows(rows);
                }
                (Some((layout, to)), _) => self.pack_rows(layout, to, rows),
                (None, _) => {}
            }
        }
    }

    unsafe fn take_row(&self, a: A, padded_k: usize, row: usize) {
        let (k, stride, a_bytes) = (self.from.k, self.from.strides.1, self.gemm.a_bytes());
        let source = &self.from.data[row * self.from.strides.0..];
        // SAFETY: the caller's contract: A has the padded k elements in every row.
        unsafe {
            if stride == 1 {
                (self.gemm.edges.take_x)(source[..k].as_ptr(), k, a.at(a_bytes, row, 0));
            } else {
                let gathered: Vec<T> = (0..k).map(|i| source[i * stride]).collect();
                (self.gemm.edges.take_x)(gathered.as_ptr(), k, a.at(a_bytes, row, 0));
            }
            a.at(a_bytes, row, k).write_bytes(0, (padded_k - k) * a_bytes);
        }
    }

    unsafe fn pack_rows(&self, layout: PanelLayout, to: *mut u8, rows: Range<usize>) {
        let Matrix { data, k: columns, strides, rows: all, .. } = self.from;
        for panel in 0..layout.count() {
            let column = panel * layout.nr();
            // SAFETY: the caller's contract; a block of rows begins with a round over the streams.
            unsafe {
                let to = to.add(panel * layout.panel_stride());
                (self.gemm.edges.pack)(&PackArgs {
                    from: data.as_ptr().add(rows.start * strides.0 + column * strides.1).cast(),
                    strides,
                    k: rows.len(),
                    columns: layout.nr().min(columns - column),
                    to: to.add(layout.step_offset(rows.start / layout.k_step())),
                    layout,
                });
                if rows.end == all {
                    layout.zero_beyond_k(to);
                }
            }
        }
    }
}

/// The transpose (k, rows) of a matrix A (rows, k): A of another product.
#[derive(Clone, Copy)]
pub(super) struct Transposed {
    pub(super) to: A,
    /// The rows of A, and the number to which they are padded with zeros.
    pub(super) rows: usize,
    pub(super) padded_rows: usize,
}

impl Transposed {
    /// Some rows and columns.
    ///
    /// # Safety
    /// A has them, and the transpose has room for them; no other thread writes them.
    pub(super) unsafe fn write(
        &self,
        a_bytes: usize,
        from: A,
        rows: Range<usize>,
        columns: Range<usize>,
    ) {
        let size = (rows.len(), columns.len());
        let (source, target) = (
            from.at(a_bytes, rows.start, columns.start),
            self.to.at(a_bytes, columns.start, rows.start),
        );
        // SAFETY: the caller's contract; elements of A have 4 or 2 bytes.
        unsafe {
            if a_bytes == 4 {
                let from = (source.cast::<u32>().cast_const(), from.stride);
                transpose(size, from, (target.cast::<u32>(), self.to.stride));
            } else {
                let from = (source.cast::<u16>().cast_const(), from.stride);
                transpose(size, from, (target.cast::<u16>(), self.to.stride));
            }
            if rows.end == self.rows {
                let padding = (self.padded_rows - self.rows) * a_bytes;
                columns.for_each(|c| self.to.at(a_bytes, c, self.rows).write_bytes(0, padding));
            }
        }
    }
}
