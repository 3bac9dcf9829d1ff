//! One unit of a product: A (rows, k) · B (k, columns) -> sums, where B is packed on the way.

use std::ops::Range;

use super::low_rank::Mask;
use super::pack::PackArgs;
use crate::cpu::kernels::Edges;
use crate::cpu::matrix::Matrix;
use crate::cpu::panels::{PackedMatrix, PanelLayout, PanelsRef};
use crate::cpu::sweep::{Rows, Sums, Sweep};

/// Bytes of B that a unit packs at a time. They stay in L2 beside the rows of A and the sums.
const PACKED_BYTES: usize = 256 << 10;
/// The length of a packed k-block is a multiple of this: sums, rounds over the streams and tiles
/// end with a block.
const K_BLOCK: usize = 128;

/// A (rows, k) in scratch, in the element type of the microkernels.
#[derive(Clone, Copy)]
pub(super) struct A {
    pub(super) data: *mut u8,
    /// Elements from one row to the next.
    pub(super) stride: usize,
}

impl A {
    /// The element of a row and a value of k.
    pub(super) fn at(&self, a_bytes: usize, row: usize, k: usize) -> *mut u8 {
        self.data.wrapping_add((row * self.stride + k) * a_bytes)
    }
}

/// A matrix (rows, k) that a unit packs.
#[derive(Clone, Copy)]
pub(super) enum Source<'a, T> {
    Tensor(Matrix<'a, T>),
    /// Unpacked on the way.
    Packed(PackedMatrix),
    /// Its transpose.
    PackedTransposed(PackedMatrix),
}

impl<T: Copy> Source<'_, T> {
    pub(super) fn rows(&self) -> usize {
        match self {
            Self::Tensor(matrix) => matrix.rows,
            Self::Packed(packed) => packed.rows,
            Self::PackedTransposed(packed) => packed.k(),
        }
    }

    pub(super) fn k(&self) -> usize {
        match self {
            Self::Tensor(matrix) => matrix.k,
            Self::Packed(packed) => packed.k(),
            Self::PackedTransposed(packed) => packed.rows,
        }
    }

    /// The same elements as (k, rows).
    pub(super) fn transposed(self) -> Self {
        match self {
            Self::Tensor(matrix) => Self::Tensor(matrix.transposed()),
            Self::Packed(packed) => Self::PackedTransposed(packed),
            Self::PackedTransposed(packed) => Self::Packed(packed),
        }
    }

    /// The first element of some rows and values of k, and the distances between values of k and
    /// between rows. Packed elements are written to `unpacked` first.
    ///
    /// # Safety
    /// The matrix has them, and `unpacked` has room for them.
    unsafe fn elements(
        &self,
        rows: Range<usize>,
        k: Range<usize>,
        unpacked: *mut u8,
    ) -> (*const u8, (usize, usize)) {
        match self {
            Self::Tensor(matrix) => {
                let (row_stride, k_stride) = matrix.strides;
                let first = rows.start * row_stride + k.start * k_stride;
                (matrix.data.as_ptr().wrapping_add(first).cast(), (k_stride, row_stride))
            }
            Self::Packed(packed) => {
                let strides = (1, k.len());
                // SAFETY: the caller's contract.
                unsafe { packed.read(rows, k, unpacked) };
                (unpacked, strides)
            }
            Self::PackedTransposed(packed) => {
                let strides = (rows.len(), 1);
                // SAFETY: as above.
                unsafe { packed.read(k, rows, unpacked) };
                (unpacked, strides)
            }
        }
    }
}

/// B (k, columns): the columns are rows of the matrices.
pub(super) enum B<'a, T> {
    Matrix(Source<'a, T>),
    /// Half of a panel's columns are of the first matrix, the others of the second.
    Pair([Source<'a, T>; 2]),
    Panels(PanelsRef),
}

impl<T: Copy> B<'_, T> {
    fn k(&self) -> usize {
        match self {
            Self::Matrix(matrix) | Self::Pair([matrix, _]) => matrix.k(),
            Self::Panels(panels) => panels.layout.k(),
        }
    }
}

/// A thread's scratch for a unit.
#[derive(Clone, Copy)]
pub(super) struct Own {
    /// [`Gemm::packed_bytes`]
    pub(super) packed: *mut u8,
    /// As many, for the elements of packed panels.
    pub(super) unpacked: *mut u8,
    /// [`Gemm::rewritten_bytes`]
    pub(super) rewritten: *mut u8,
}

/// The kernels of a product whose tensors have dtype T.
pub(super) struct Gemm<T: 'static> {
    pub(super) sweep: &'static Sweep,
    pub(super) edges: &'static Edges<T>,
}

impl<T> Clone for Gemm<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Gemm<T> {}

impl<T: Copy> Gemm<T> {
    pub(super) fn nr(&self) -> usize {
        self.sweep.nr
    }

    pub(super) fn a_bytes(&self) -> usize {
        self.sweep.a_bytes
    }

    pub(super) fn layout(&self, columns: usize, k: usize) -> PanelLayout {
        PanelLayout::new(self.sweep, columns, k)
    }

    /// The kernels read these panels as they are.
    pub(super) fn reads(&self, panels: &PanelsRef) -> bool {
        panels.layout.format() == self.sweep.format
    }

    /// f32 of the sums of a panel.
    pub(super) fn panel_sums(&self, rows: usize) -> usize {
        self.sweep.padded_rows(rows) * self.sweep.nr
    }

    /// Values of k that a unit of this many panels packs at a time.
    fn k_block(&self, panels: usize) -> usize {
        let step = panels * self.layout(1, 1).step_bytes() / self.sweep.format.k_step();
        (PACKED_BYTES / step / K_BLOCK * K_BLOCK).max(K_BLOCK)
    }

    /// Scratch for the packed k-block of a unit of at most this many panels.
    pub(super) fn packed_bytes(&self, panels: usize) -> usize {
        PACKED_BYTES.max(self.layout(panels * self.nr(), K_BLOCK).bytes())
    }

    /// Scratch for a rewritten k-block (`sweep.rs`).
    pub(super) fn rewritten_bytes(&self, rows: usize) -> usize {
        self.sweep.rewritten_bytes(rows)
    }

    /// Adds A (rows, k) · B (k, columns) of some panels to the sums, or sets them.
    ///
    /// # Safety
    /// A has these rows, as many as they are padded to, and k elements and the padding, zero, in
    /// each; B has these panels; `sums` has room for their sums; `own` is this thread's.
    pub(super) unsafe fn add(
        &self,
        a: A,
        b: &B<T>,
        (panels, rows): (Range<usize>, Range<usize>),
        sums: Sums,
        own: Own,
    ) {
        let k = b.k();
        let block = match b {
            B::Panels(_) => k.max(1),
            _ => self.k_block(panels.len()),
        };
        for start in (0..k.max(1)).step_by(block) {
            let part = start..k.min(start + block);
            let accumulate = sums.accumulate || start > 0;
            let a = Rows {
                a: a.at(self.a_bytes(), rows.start, start),
                a_stride: a.stride,
                rows: rows.len(),
            };
            // SAFETY: the caller's contract.
            unsafe {
                let (view, panels) = match b {
                    B::Panels(view) => (*view, panels.clone()),
                    B::Matrix(matrix) => {
                        let matrices = [(matrix, 0)];
                        (self.pack(&matrices, part, &panels, own), 0..panels.len())
                    }
                    B::Pair([first, second]) => {
                        let matrices = [(first, 0), (second, self.nr() / 2)];
                        (self.pack(&matrices, part, &panels, own), 0..panels.len())
                    }
                };
                let after = view.panel(panels.start);
                let sums = Sums { accumulate, ..sums };
                self.sweep.panels(view, panels, a, sums, own.rewritten, after);
            }
        }
    }

    /// Sets dropped elements of the sums of some panels to 0.
    ///
    /// # Safety
    /// `sums` has them.
    pub(super) unsafe fn mask(
        &self,
        mask: &Mask,
        sums: *mut f32,
        panels: &Range<usize>,
        rows: &Range<usize>,
    ) {
        let nr = self.nr();
        for (i, panel) in panels.clone().enumerate() {
            let columns = panel * nr..(panel + 1) * nr;
            // SAFETY: the caller's contract.
            unsafe {
                let sums = sums.add(i * self.panel_sums(rows.len()));
                mask.apply(rows.clone(), columns, sums, nr);
            }
        }
    }

    /// Packs some k of some panels. Rows of each matrix become the columns of a panel from the
    /// given one on.
    ///
    /// # Safety
    /// `own` is this thread's.
    unsafe fn pack(
        &self,
        matrices: &[(&Source<T>, usize)],
        k: Range<usize>,
        panels: &Range<usize>,
        Own { packed: to, unpacked, .. }: Own,
    ) -> PanelsRef {
        let width = self.nr() / matrices.len();
        let layout = self.layout(panels.len() * self.nr(), k.len());
        // SAFETY: the caller's contract; the matrices were checked.
        unsafe {
            let rows = matrices[0].0.rows();
            if layout.padded_k() > layout.k() || panels.end * width > rows {
                to.write_bytes(0, layout.bytes());
            }
            for (i, panel) in panels.clone().enumerate() {
                let row = (panel * width).min(rows);
                let columns = width.min(rows - row);
                for &(matrix, first) in matrices.iter().filter(|_| columns > 0) {
                    let (from, strides) = matrix.elements(row..row + columns, k.clone(), unpacked);
                    (self.edges.pack)(&PackArgs {
                        from,
                        strides,
                        k: k.len(),
                        columns,
                        to: to.add(i * layout.panel_stride() + first * layout.column_bytes()),
                        layout,
                    });
                }
            }
            PanelsRef::new(layout, to)
        }
    }
}
