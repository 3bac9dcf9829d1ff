//! Weights as the microkernel reads them.
//!
//! A matrix W (N, K) is cut into panels of NR rows of W, which are columns of Wᵀ. A panel holds, for each step of `K_STEP`
//! values of k, its NR columns with the step's values side by side: `[k / K_STEP][NR][K_STEP]`. For bf16 `K_STEP` is 2, what
//! `vdpbf16ps` takes; for f16 and f32 it is 1. The last panel and an odd K are filled up with zeros.
//!
//! Steps follow each other in memory, or lie in turn in a few streams: step t is number t / STREAMS of stream t mod STREAMS, and
//! a panel is its streams one after the other. A processor that fetches ahead by itself does so for each stream. One alone is enough
//! for Zen 4, if it is let alone ([`Ahead::PAGES`](super::micro::Ahead::PAGES); four: 5 to 20 % slower), but not for Zen 3: it reads
//! 22 to 24 GB/s from one and 26 to 28 from four while it multiplies 2 to 6 rows (AVX2).
//!
//! gate_proj and up_proj (I, H) share panels: NR/2 columns of gate, then the same NR/2 channels of up, so that both halves
//! of a channel meet in one microkernel's registers.

use std::marker::PhantomData;

use bytemuck::Pod;
use half::{bf16, f16};

use super::buffer::Buffer;
use super::micro::prefetch;
use super::simd::{Element, Simd};
use super::threads::{self, Phase, SendPtr};

/// A dtype of packed weights.
pub(super) trait Packable: Element + Pod {
    /// Values of k that lie side by side.
    const K_STEP: usize;

    /// Writes a packed step of NV vectors as f32, one k after the other.
    ///
    /// # Safety
    /// The CPU has the instructions; `b` has a step, `out` room for `K_STEP·NV·LANES` f32.
    unsafe fn widen_step<S: Simd, const NV: usize>(s: S, b: *const Self, out: *mut f32);
}

macro_rules! widen_one_by_one {
    ($dtype:ty) => {
        impl Packable for $dtype {
            const K_STEP: usize = 1;

            #[inline(always)]
            unsafe fn widen_step<S: Simd, const NV: usize>(s: S, b: *const Self, out: *mut f32) {
                for at in (0..NV * S::LANES).step_by(S::LANES) {
                    // SAFETY: the caller's contract.
                    unsafe {
                        prefetch(b.wrapping_add(at + 4096 / size_of::<Self>()).cast());
                        s.store_f32(Self::load(s, b.add(at)), out.add(at));
                    }
                }
            }
        }
    };
}

widen_one_by_one!(f32);
widen_one_by_one!(f16);

impl Packable for bf16 {
    const K_STEP: usize = 2;

    #[inline(always)]
    unsafe fn widen_step<S: Simd, const NV: usize>(s: S, b: *const Self, out: *mut f32) {
        for at in (0..NV * S::LANES).step_by(S::LANES) {
            // SAFETY: the caller's contract.
            unsafe {
                s.store_f32(s.load_bf16_even(b.add(2 * at)), out.add(at));
                s.store_f32(s.load_bf16_odd(b.add(2 * at)), out.add(NV * S::LANES + at));
            }
        }
    }
}

/// Writes packed steps of NV vectors as f32, one k after the other; `stream` bytes from one of STREAMS streams to the next.
///
/// # Safety
/// The CPU has the instructions; `b` has `steps` steps from a multiple of STREAMS on, `out` room for `steps·K_STEP·NV·LANES` f32.
#[inline(always)]
pub(super) unsafe fn widen<S: Simd, T: Packable, const NV: usize, const STREAMS: usize>(
    s: S,
    b: *const T,
    stream: usize,
    steps: usize,
    out: *mut f32,
) {
    let len = NV * S::LANES * T::K_STEP;
    for round in 0..steps.div_ceil(STREAMS) {
        for i in 0..STREAMS.min(steps - round * STREAMS) {
            // SAFETY: the caller's contract.
            unsafe {
                T::widen_step::<S, NV>(s, b.add(round * len).byte_add(i * stream), out.add((round * STREAMS + i) * len));
            }
        }
    }
}

/// A matrix (rows, k) as it lies in a tensor.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a, T> {
    /// From its first element on.
    pub(super) data: &'a [T],
    pub(super) rows: usize,
    pub(super) k: usize,
    pub(super) strides: (usize, usize),
}

impl<T: Copy> Matrix<'_, T> {
    /// Every element lies within `data`.
    pub(super) fn check(&self) {
        let last = self.rows.saturating_sub(1) * self.strides.0 + self.k.saturating_sub(1) * self.strides.1;
        assert!(self.rows == 0 || self.k == 0 || last < self.data.len(), "the layout reaches beyond the storage");
    }
}

/// Which column of the packed matrix a row of W becomes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Place {
    /// Row n becomes column n.
    Whole,
    /// gate_proj: the first half of each panel.
    Gate,
    /// up_proj: the second half of each panel.
    Up,
}

/// A packed matrix.
pub(super) struct Packed<T> {
    buffer: Buffer,
    /// K
    k: usize,
    nr: usize,
    streams: usize,
    /// Elements from one stream of a panel to the next.
    stream_len: usize,
    pub(super) panels: usize,
    dtype: PhantomData<T>,
}

impl<T: Packable> Packed<T> {
    /// Zeros for `columns` columns (a gate and an up column count as two).
    pub(super) fn zeroed(columns: usize, k: usize, nr: usize, streams: usize) -> Self {
        let panels = columns.div_ceil(nr);
        let stream_len = k.div_ceil(T::K_STEP).div_ceil(streams) * nr * T::K_STEP;
        let buffer = Buffer::zeroed(panels * streams * stream_len * size_of::<T>());
        Self { buffer, k, nr, streams, stream_len, panels, dtype: PhantomData }
    }

    /// K
    pub(super) fn k(&self) -> usize {
        self.k
    }

    /// Steps of a panel.
    pub(super) fn steps(&self) -> usize {
        self.k.div_ceil(T::K_STEP)
    }

    /// Elements, padding included.
    pub(super) fn len(&self) -> usize {
        self.panels * self.panel_len()
    }

    /// Padding included.
    pub(super) fn bytes(&self) -> usize {
        self.buffer.bytes()
    }

    /// The buffer, padding included.
    pub(super) fn memory(&self) -> &[u8] {
        bytemuck::cast_slice(self.buffer.words())
    }

    /// Elements from one panel to the next.
    pub(super) fn panel_len(&self) -> usize {
        self.streams * self.stream_len
    }

    /// Elements from one stream of a panel to the next.
    pub(super) fn stream_len(&self) -> usize {
        self.stream_len
    }

    /// Calls `f` with each k of `range`, which begins with a round over the streams, and where it lies in a column of a panel.
    #[inline(always)]
    fn each_k(&self, range: std::ops::Range<usize>, mut f: impl FnMut(usize, usize)) {
        let round_len = self.streams * T::K_STEP;
        debug_assert!(range.start.is_multiple_of(round_len));
        let (mut k, mut round) = (range.start, range.start / round_len * self.step_len());
        while k < range.end {
            let mut step = round;
            for _ in 0..self.streams {
                for i in 0..T::K_STEP.min(range.end - k) {
                    f(k + i, step + i);
                }
                k = range.end.min(k + T::K_STEP);
                step += self.stream_len;
            }
            round += self.step_len();
        }
    }

    /// Columns of a panel.
    pub(super) fn nr(&self) -> usize {
        self.nr
    }

    /// Elements of one step.
    pub(super) fn step_len(&self) -> usize {
        self.nr * T::K_STEP
    }

    pub(super) fn panel(&self, panel: usize) -> *const T {
        assert!(panel < self.panels);
        // SAFETY: the buffer holds `panels` panels of this length.
        unsafe { self.buffer.as_ptr::<T>().add(panel * self.panel_len()) }
    }

    /// The column of row `row`.
    pub(super) fn column(&self, place: Place, row: usize) -> usize {
        let half = self.nr / 2;
        match place {
            Place::Whole => row,
            Place::Gate => row / half * self.nr + row % half,
            Place::Up => row / half * self.nr + half + row % half,
        }
    }

    /// Rows of W in one panel, and the panel's column of the first.
    fn share(&self, place: Place) -> (usize, usize) {
        match place {
            Place::Whole => (self.nr, 0),
            Place::Gate => (self.nr / 2, 0),
            Place::Up => (self.nr / 2, self.nr / 2),
        }
    }

    /// Writes all rows of a matrix to their places.
    pub(super) fn fill(&mut self, place: Place, source: Matrix<T>) {
        source.check();
        let (rows, first_column) = self.share(place);
        assert!(source.k == self.k && source.rows.div_ceil(rows.max(1)) <= self.panels);
        let data = SendPtr(self.buffer.as_mut_ptr::<T>());
        let this = &*self;
        let panels = Phase::new(source.rows.div_ceil(rows.max(1)));
        threads::run(|_| {
            panels.work(|panel, _| {
                let rows = panel * rows..source.rows.min((panel + 1) * rows);
                // SAFETY: panels are disjoint, and zeroed before.
                unsafe { this.fill_panel(data.at(panel * this.panel_len()), first_column, source, rows) };
            });
        });
    }

    /// Writes `rows` of the source side by side into a panel, a block of steps at a time so that the block stays in L1.
    ///
    /// # Safety
    /// `panel` is a panel of this matrix, which has room for the rows from `first_column` on.
    unsafe fn fill_panel(&self, panel: *mut T, first_column: usize, source: Matrix<T>, rows: std::ops::Range<usize>) {
        const BLOCK: usize = 64; // values of k: 64 columns · 64 · 4 B = 16 KiB
        let mut start = 0;
        while start < source.k {
            let end = source.k.min(start + BLOCK);
            for (column, row) in rows.clone().enumerate() {
                let from = row * source.strides.0;
                let column = (first_column + column) * T::K_STEP;
                self.each_k(start..end, |k, at| {
                    // SAFETY: the caller's contract.
                    unsafe { *panel.add(column + at) = source.data[from + k * source.strides.1] };
                });
            }
            start = end;
        }
    }

    /// Reads the row of W that lies at `place`, k elements.
    pub(super) fn read_row(&self, place: Place, row: usize, out: &mut [T]) {
        let column = self.column(place, row);
        assert!(out.len() == self.k && column / self.nr < self.panels);
        let (panel, column) = (self.panel(column / self.nr), column % self.nr * T::K_STEP);
        self.each_k(0..self.k, |k, at| {
            // SAFETY: k < self.k, so the step is one of the panel's.
            out[k] = unsafe { *panel.add(column + at) };
        });
    }
}
