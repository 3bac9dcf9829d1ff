//! Panels: weights in the order in which the microkernels read them.
//!
//! A matrix W (N, K) is cut into panels of NR rows of W, which are columns of Wᵀ. A panel holds its
//! steps `[K / k_step][NR][k_step]`: for each step, its NR columns with the step's values side by
//! side (`format.rs`). The last panel and the last step are padded with zeros.
//!
//! The steps of a panel follow each other in one stream or are dealt to several: step t is number
//! t / STREAMS of stream t mod STREAMS, and the streams are stored one after the other. A hardware
//! prefetcher follows each stream by itself; `tuning.rs` says which CPU wants how many.
//!
//! gate_proj and up_proj (I, H) share panels: NR/2 columns of gate, then the same NR/2 channels of
//! up, so that both halves of a channel meet in the registers of one microkernel.

use std::ops::Range;

use super::buffer::Buffer;
use super::format::{Format, Stored};
use super::matrix::Matrix;
use super::prefetch::prefetch;
use super::sweep::Sweep;
use super::threads::{self, Phase, SendPtr};

/// The columns of each panel that a matrix fills.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Columns {
    /// All of them: row n of W becomes column n.
    All,
    /// The first half: gate_proj.
    FirstHalf,
    /// The second half: up_proj.
    SecondHalf,
}

/// How a matrix is divided into panels, streams and steps.
#[derive(Clone, Copy)]
pub(crate) struct PanelLayout {
    format: Format,
    /// K
    k: usize,
    /// K, padded with zeros.
    padded_k: usize,
    /// Columns of a panel.
    nr: usize,
    streams: usize,
    /// Bytes from one stream of a panel to the next.
    stream_stride: usize,
    count: usize,
}

impl PanelLayout {
    /// Panels of `columns` columns, as the kernels of `sweep` read them; a gate and an up column
    /// count as two.
    pub(super) fn new(sweep: &Sweep, columns: usize, k: usize) -> Self {
        let Sweep { nr, streams, format, .. } = *sweep;
        let padded_k = k.next_multiple_of(sweep.k_multiple());
        let stream_stride =
            (padded_k / format.k_step()).div_ceil(streams) * nr * format.column_bytes();
        Self { format, k, padded_k, nr, streams, stream_stride, count: columns.div_ceil(nr) }
    }

    /// Panels.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// K
    pub(super) fn k(&self) -> usize {
        self.k
    }

    /// K, padded to whole steps, or to what the kernels read at once.
    pub(super) fn padded_k(&self) -> usize {
        self.padded_k
    }

    /// Columns of a panel.
    pub(super) fn nr(&self) -> usize {
        self.nr
    }

    /// Steps of a panel.
    pub(super) fn steps(&self) -> usize {
        self.padded_k / self.format.k_step()
    }

    /// Bytes of one step.
    pub(super) fn step_bytes(&self) -> usize {
        self.nr * self.format.column_bytes()
    }

    /// Bytes from one stream of a panel to the next.
    pub(super) fn stream_stride(&self) -> usize {
        self.stream_stride
    }

    /// Streams of a panel.
    pub(super) fn streams(&self) -> usize {
        self.streams
    }

    /// Bytes from the start of a panel to a step.
    #[inline(always)]
    pub(super) fn step_offset(&self, step: usize) -> usize {
        step % self.streams * self.stream_stride + step / self.streams * self.step_bytes()
    }

    /// Bytes from one panel to the next.
    pub(super) fn panel_stride(&self) -> usize {
        self.streams * self.stream_stride
    }

    /// Multiply-adds of one row of A, padding included.
    pub(super) fn multiply_adds(&self) -> usize {
        self.count * self.panel_stride() / self.format.column_bytes() * self.format.k_step()
    }

    /// How the columns are stored.
    pub(super) fn format(&self) -> Format {
        self.format
    }

    /// Values of k in a step.
    pub(super) fn k_step(&self) -> usize {
        self.format.k_step()
    }

    /// Bytes of one column in a step.
    pub(super) fn column_bytes(&self) -> usize {
        self.format.column_bytes()
    }

    /// Writes zeros to the steps of a panel beyond K.
    ///
    /// # Safety
    /// `panel` is a panel of this layout.
    pub(super) unsafe fn zero_beyond_k(&self, panel: *mut u8) {
        for step in self.k.div_ceil(self.format.k_step())..self.steps() {
            // SAFETY: the caller's contract.
            unsafe { panel.add(self.step_offset(step)).write_bytes(0, self.step_bytes()) };
        }
    }

    /// Bytes of all panels, padding included.
    pub(super) fn bytes(&self) -> usize {
        self.count * self.panel_stride()
    }

    /// The column of row `row` of a matrix, counted over all panels.
    pub(super) fn column(&self, columns: Columns, row: usize) -> usize {
        let (width, first) = self.share(columns);
        row / width * self.nr + first + row % width
    }

    /// Rows of a matrix in one panel, and the panel's column of the first.
    fn share(&self, columns: Columns) -> (usize, usize) {
        match columns {
            Columns::All => (self.nr, 0),
            Columns::FirstHalf => (self.nr / 2, 0),
            Columns::SecondHalf => (self.nr / 2, self.nr / 2),
        }
    }

    /// Calls `f` with each k of `range`, which begins with a round over the streams, and with the
    /// byte at which it is stored in the first column of a panel.
    #[inline(always)]
    fn each_k<T: Stored>(&self, range: Range<usize>, mut f: impl FnMut(usize, usize)) {
        let k_step = const { T::FORMAT.k_step() };
        let round_len = self.streams * k_step;
        debug_assert!(range.start.is_multiple_of(round_len));
        let (mut k, mut round) = (range.start, range.start / round_len * self.step_bytes());
        while k < range.end {
            let mut step = round;
            for _ in 0..self.streams {
                for i in 0..k_step.min(range.end - k) {
                    f(k + i, step + i * size_of::<T>());
                }
                k = range.end.min(k + k_step);
                step += self.stream_stride;
            }
            round += self.step_bytes();
        }
    }

    /// Writes `rows` of the source side by side into a panel, a block of k at a time so that the
    /// block stays in L1.
    ///
    /// # Safety
    /// `panel` is a panel of this layout, of T's format, which has room for the rows from column
    /// `first` on.
    unsafe fn fill_panel<T: Stored>(
        &self,
        panel: *mut u8,
        first: usize,
        source: Matrix<T>,
        rows: Range<usize>,
    ) {
        const BLOCK: usize = 64; // values of k: 64 columns · 64 · 4 B = 16 KiB
        let mut start = 0;
        while start < source.k {
            let end = source.k.min(start + BLOCK);
            for (column, row) in rows.clone().enumerate() {
                let from = row * source.strides.0;
                let column = (first + column) * const { T::FORMAT.column_bytes() };
                self.each_k::<T>(start..end, |k, at| {
                    // SAFETY: the caller's contract; panels and steps are aligned to their
                    // elements.
                    unsafe {
                        *panel.add(column + at).cast::<T>() =
                            source.data[from + k * source.strides.1]
                    };
                });
            }
            start = end;
        }
    }
}

/// Panels in memory that outlives the view.
#[derive(Clone, Copy)]
pub(crate) struct PanelsRef {
    pub(super) layout: PanelLayout,
    data: *const u8,
}

impl PanelsRef {
    /// # Safety
    /// `data` points to panels of this layout for as long as the view is used.
    pub(super) unsafe fn new(layout: PanelLayout, data: *const u8) -> Self {
        Self { layout, data }
    }

    /// Prefetches short panels.
    pub(super) fn prefetch(&self, panels: Range<usize>) {
        let bytes = self.layout.panel_stride();
        let first = self.data.wrapping_add(panels.start * bytes);
        for line in (0..panels.len() * bytes).step_by(64) {
            prefetch(first.wrapping_add(line));
        }
    }

    /// Some k of all panels, from a round over the streams on; the last part has the padding.
    pub(super) fn part(&self, k: Range<usize>) -> Self {
        let Self { layout, data } = *self;
        let step = k.start / layout.k_step();
        debug_assert!(step.is_multiple_of(layout.streams) && k.end <= layout.k);
        let padded_k = if k.end == layout.k { layout.padded_k - k.start } else { k.len() };
        // SAFETY: the step exists.
        let data = unsafe { data.add(layout.step_offset(step)) };
        Self { layout: PanelLayout { k: k.len(), padded_k, ..layout }, data }
    }

    pub(super) fn panel(&self, panel: usize) -> *const u8 {
        assert!(panel < self.layout.count);
        // SAFETY: there are `count` panels of this size.
        unsafe { self.data.add(panel * self.layout.panel_stride()) }
    }
}

/// A matrix (rows, k) within panels that outlive the view.
#[derive(Clone, Copy)]
pub(crate) struct PackedMatrix {
    pub(super) panels: PanelsRef,
    pub(super) columns: Columns,
    pub(super) rows: usize,
}

impl PackedMatrix {
    pub(super) fn k(&self) -> usize {
        self.panels.layout.k
    }

    /// Writes some rows and values of k side by side, row by row, as they were packed.
    ///
    /// # Safety
    /// The matrix has them; `to` has room for them.
    pub(super) unsafe fn read(&self, rows: Range<usize>, k: Range<usize>, to: *mut u8) {
        debug_assert!(rows.end <= self.rows && k.end <= self.k());
        // SAFETY: the caller's contract; elements of these formats have these sizes.
        unsafe {
            match self.panels.layout.format {
                Format::F32 => self.read_as::<u32, 1>(rows, k, to.cast()),
                Format::F16 => self.read_as::<u16, 1>(rows, k, to.cast()),
                Format::Bf16 if k.start.is_multiple_of(2) && k.len().is_multiple_of(2) => {
                    let pairs = k.start / 2..k.end / 2;
                    self.read_as::<u32, 1>(rows, pairs, to.cast());
                }
                Format::Bf16 => self.read_as::<u16, 2>(rows, k, to.cast()),
            }
        }
    }

    /// [`PackedMatrix::read`] with K_STEP elements E in a column of a step.
    unsafe fn read_as<E: Copy, const K_STEP: usize>(
        &self,
        rows: Range<usize>,
        k: Range<usize>,
        to: *mut E,
    ) {
        let layout = &self.panels.layout;
        let (width, first) = layout.share(self.columns);
        let mut row = rows.start;
        while row < rows.end {
            let (panel, column) = (row / width, row % width);
            let count = (width - column).min(rows.end - row);
            // SAFETY: the caller's contract; a panel has all steps of its columns.
            unsafe {
                let from = self.panels.panel(panel).add((first + column) * layout.column_bytes());
                let to = to.add((row - rows.start) * k.len());
                for at in k.clone() {
                    let from = from.add(layout.step_offset(at / K_STEP)).cast::<E>();
                    let (from, to) = (from.add(at % K_STEP), to.add(at - k.start));
                    for i in 0..count {
                        to.add(i * k.len()).write_unaligned(*from.add(i * K_STEP));
                    }
                }
            }
            row += count;
        }
    }
}

/// A packed matrix: bytes in the order of a [`Format`].
pub(super) struct Panels {
    buffer: Buffer,
    pub(super) layout: PanelLayout,
}

impl Panels {
    pub(super) fn zeroed(layout: PanelLayout) -> Self {
        Self { buffer: Buffer::zeroed(layout.bytes()), layout }
    }

    pub(super) fn view(&self) -> PanelsRef {
        PanelsRef { layout: self.layout, data: self.buffer.as_ptr() }
    }

    /// All panels, padding included.
    pub(super) fn bytes(&self) -> &[u8] {
        self.buffer.bytes()
    }

    /// Packs all rows of a matrix.
    pub(super) fn fill<T: Stored>(&mut self, columns: Columns, source: Matrix<T>) {
        source.check();
        let layout = self.layout;
        let (width, first) = layout.share(columns);
        let filled = source.rows.div_ceil(width);
        assert!(T::FORMAT == layout.format && source.k == layout.k && filled <= layout.count);
        let data = SendPtr(self.buffer.as_mut_ptr::<u8>());
        let panels = Phase::new(filled);
        threads::run(|_| {
            panels.work(|panel, _| {
                let rows = panel * width..source.rows.min((panel + 1) * width);
                // SAFETY: panels are disjoint, and zeroed before.
                unsafe {
                    layout.fill_panel(data.at(panel * layout.panel_stride()), first, source, rows)
                };
            });
        });
    }

    /// Reads a row of a matrix, k elements, as it was packed.
    pub(super) fn read_row<T: Stored>(&self, columns: Columns, row: usize, out: &mut [T]) {
        let layout = self.layout;
        let column = layout.column(columns, row);
        assert!(T::FORMAT == layout.format && out.len() == layout.k);
        let panel = self.view().panel(column / layout.nr);
        let column = column % layout.nr * layout.format.column_bytes();
        layout.each_k::<T>(0..layout.k, |k, at| {
            // SAFETY: k < layout.k, so the step is one of the panel's.
            out[k] = unsafe { *panel.add(column + at).cast::<T>() };
        });
    }
}
