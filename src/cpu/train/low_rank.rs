//! Low-rank addends (LoRA) of the products, with dropout:
//!
//! ```text
//! u = drop(x)·Aᵀ     y = x·Wᵀ + u·Bᵀ
//! du = dy·B     dA = duᵀ·drop(x)     dB = dyᵀ·u     dx = dy·W + drop(du·A)
//! ```
//!
//! gate and up have one addend with a B for each of them, where du = dgate·Bg + dup·Bu.

use std::ops::Range;

use super::gemm::{A, B, Gemm, Source};
use super::grid::ROWS;
use super::pack::PackArgs;
use super::products::{Rows, Target, WeightGradient};
use crate::cpu::buffer::Buffer;
use crate::cpu::kernels::Io;
use crate::cpu::matrix::Matrix;
use crate::cpu::panels::PanelLayout;
use crate::cpu::threads::{Phase, SendPtr};

/// Which elements of a matrix are dropped: a hash of the row and the column decides, so that a mask
/// needs no memory and does not depend on the threads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Dropout {
    pub(crate) seed: u64,
    pub(crate) probability: f32,
}

impl Dropout {
    /// The hash is splitmix64's.
    #[inline(always)]
    pub(crate) fn keeps(&self, row: usize, column: usize) -> bool {
        let at = (row as u64) << 32 ^ column as u64;
        let mut z = self.seed.wrapping_add(at.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        let unit = ((z ^ z >> 31) >> 40) as f32 / (1u64 << 24) as f32; // [0, 1)
        unit >= self.probability
    }

    /// The same mask for a matrix that begins at this row.
    pub(super) fn mask(self, first: usize) -> Mask {
        Mask { dropout: self, first }
    }
}

/// A mask of a chunk of rows.
#[derive(Clone, Copy)]
pub(super) struct Mask {
    dropout: Dropout,
    /// The chunk's first row.
    first: usize,
}

impl Mask {
    /// Sets dropped elements to 0.
    ///
    /// # Safety
    /// The matrix has these rows and columns, of type E, from `at` on.
    pub(super) unsafe fn apply<E: Copy + Default>(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        at: *mut E,
        stride: usize,
    ) {
        for (i, row) in rows.enumerate() {
            for (j, column) in columns.clone().enumerate() {
                if !self.dropout.keeps(self.first + row, column) {
                    // SAFETY: the caller's contract.
                    unsafe { *at.add(i * stride + j) = E::default() };
                }
            }
        }
    }

    /// The same for elements of A.
    ///
    /// # Safety
    /// As [`Mask::apply`].
    pub(super) unsafe fn apply_to_a(
        &self,
        a_bytes: usize,
        rows: Range<usize>,
        columns: Range<usize>,
        at: *mut u8,
        stride: usize,
    ) {
        // SAFETY: the caller's contract; elements of A have 4 or 2 bytes.
        unsafe {
            if a_bytes == size_of::<u32>() {
                self.apply(rows, columns, at.cast::<u32>(), stride);
            } else {
                self.apply(rows, columns, at.cast::<u16>(), stride);
            }
        }
    }
}

/// The addend of one product: A (r,in), and B (out,r) of each of the product's matrices. B contains
/// the scale, and the factor 1/(1-p) of a dropout.
pub(super) struct LowRank<'a, T> {
    pub(super) a: Matrix<'a, T>,
    pub(super) b: Vec<Matrix<'a, T>>,
    pub(super) dropout: Option<Dropout>,
}

impl<'a, T: Copy> LowRank<'a, T> {
    /// r
    pub(super) fn rank(&self) -> usize {
        self.a.rows
    }

    /// A as B of u = x·Aᵀ.
    pub(super) fn down(&self) -> B<'a, T> {
        B::Matrix(Source::Tensor(self.a))
    }

    /// A as B of du·A.
    pub(super) fn down_transposed(&self) -> B<'a, T> {
        B::Matrix(Source::Tensor(self.a.transposed()))
    }

    /// B as B of u·Bᵀ.
    pub(super) fn up(&self) -> B<'a, T> {
        match self.b[..] {
            [first, second] => B::Pair([first, second].map(Source::Tensor)),
            _ => B::Matrix(Source::Tensor(self.b[0])),
        }
    }

    /// A matrix B as B of dy·B.
    pub(super) fn up_transposed(&self, which: usize) -> B<'a, T> {
        B::Matrix(Source::Tensor(self.b[which].transposed()))
    }

    pub(super) fn mask(&self, first_row: usize) -> Option<Mask> {
        self.dropout.map(|dropout| dropout.mask(first_row))
    }
}

/// u or du (rows, r) as A, with zeros behind r.
pub(crate) struct RankRows {
    _buffer: Buffer,
    data: SendPtr<u8>,
    stride: usize,
}

impl RankRows {
    pub(super) fn new<T: Copy>(gemm: &Gemm<T>, rows: usize, rank: usize) -> Self {
        let stride = gemm.layout(1, rank).padded_k();
        let rows = rows + gemm.sweep.row_padding();
        let mut buffer = Buffer::zeroed(rows * stride * gemm.a_bytes());
        let data = SendPtr(buffer.as_mut_ptr());
        Self { _buffer: buffer, data, stride }
    }

    /// From this row on.
    pub(super) fn a(&self, a_bytes: usize, row: usize) -> A {
        A { data: self.data.0.wrapping_add(row * self.stride * a_bytes), stride: self.stride }
    }
}

/// Rows of A (rows, columns) become panels of B, whose k are the rows.
pub(super) struct PackRows<T: 'static> {
    pub(super) gemm: Gemm<T>,
    pub(super) from: A,
    pub(super) layout: PanelLayout,
    pub(super) columns: usize,
    pub(super) to: *mut u8,
}

// SAFETY: units write disjoint rows.
unsafe impl<T: Sync> Sync for PackRows<T> {}

impl<T: Io> PackRows<T> {
    pub(super) fn phase(&self) -> Phase {
        Phase::new(self.layout.k().div_ceil(ROWS))
    }

    /// # Safety
    /// A has the rows and columns; no other thread has this unit.
    pub(super) unsafe fn unit(&self, unit: usize) {
        let rows = unit * ROWS..self.layout.k().min((unit + 1) * ROWS);
        // SAFETY: the caller's contract.
        unsafe { self.rows(rows) };
    }

    /// # Safety
    /// As [`PackRows::unit`]; the rows begin with a round over the streams.
    pub(super) unsafe fn rows(&self, rows: Range<usize>) {
        let Self { gemm, from, layout, columns, to } = *self;
        for panel in 0..layout.count() {
            let column = panel * layout.nr();
            // SAFETY: the caller's contract.
            unsafe {
                let to = to.add(panel * layout.panel_stride());
                (gemm.edges.pack_a)(&PackArgs {
                    from: from.at(gemm.a_bytes(), rows.start, column).cast_const(),
                    strides: (from.stride, 1),
                    k: rows.len(),
                    columns: layout.nr().min(columns - column),
                    to: to.add(layout.step_offset(rows.start / layout.k_step())),
                    layout,
                });
                if rows.end == layout.k() {
                    layout.zero_beyond_k(to);
                }
            }
        }
    }
}

/// Where the gradients of an addend are written: that of A (r,in), and those of B (out,r).
pub(super) struct LowRankTargets {
    pub(super) a: Target<f32>,
    pub(super) b: Vec<Target<f32>>,
}

/// The gradients of an addend while the chunks are processed.
pub(super) struct LowRankGradient<T: 'static> {
    /// r
    rank: usize,
    pub(super) a: WeightGradient<T>,
    pub(super) b: Vec<WeightGradient<T>>,
}

impl<T: Copy> LowRankGradient<T> {
    /// Of an addend with this target. A·`factor` is what multiplies x.
    pub(super) fn new(
        gemm: Gemm<T>,
        of: &LowRank<T>,
        to: &LowRankTargets,
        factor: f32,
        threads_chunks: (usize, usize),
    ) -> Self {
        let new = |shape, target: Target<f32>| {
            WeightGradient::new(gemm, shape, factor, Rows::F32(target), threads_chunks)
        };
        let b = of.b.iter().zip(&to.b);
        Self {
            rank: of.rank(),
            a: new((of.rank(), of.a.k), to.a),
            b: b.map(|(b, target)| new((b.rows, of.rank()), *target)).collect(),
        }
    }

    pub(super) fn rank(&self) -> usize {
        self.rank
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &WeightGradient<T>> {
        std::iter::once(&self.a).chain(&self.b)
    }
}
