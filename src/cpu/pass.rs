//! The whole block, `h = glu(x·Wgᵀ, x·Wuᵀ)`, `y = h·Wdᵀ`, or one projection.
//!
//! 1. Rows of x are copied, in the microkernel's element type and with padded strides, into scratch; at most
//!    [`CHUNK_ROWS`] at a time, so that scratch is bounded.
//! 2. Units of work are panels of weights times rows (`cut.rs`, `gemm.rs`). Threads claim them in order. The sums of a unit,
//!    (panels, rows, NR) in f32, lie in its thread's scratch.
//! 3. An epilogue turns the sums into h or y while they are in cache; gate and up are never written.
//! 4. Threads go on to the down projection when all of h is there.

use super::buffer::{Buffer, Scratch};
use super::cut::Cut;
use super::gemm::{BLOCK, Gemm, GemmElement, OutTile, Rows, product, sweep_beside};
use super::glu::Tile;
use super::pack::{Matrix, Packed, Place};
use super::threads::{self, Phase, SendPtr};
use super::{Kernel, pages};
use crate::activation::Glu;

/// Rows of x that are worked on at a time. Scratch of a block is at most
/// `rows·(H + I + 256)·a + threads·(rows·256 B + 256 KiB)` bytes, with a = 2 where the kernel multiplies bf16 as it is, else 4;
/// rows ≤ 512.
pub(super) const CHUNK_ROWS: usize = 512;
/// Elements between the rows of A beyond their length: rows a power of two apart would share cache sets.
const PAD: usize = 64;
/// Below this many multiply-adds per thread one thread is faster than waking another.
const SERIAL: usize = 1 << 16;
/// Rows that a thread copies at a time.
const COPY_ROWS: usize = 8;

/// A projection's packed weight and bias.
pub(super) struct Projection<T> {
    pub(super) weight: Packed<T>,
    /// (panels·NR), in the order of the packed columns
    bias: Option<Buffer>,
    /// out
    pub(super) columns: usize,
}

impl<T: GemmElement> Projection<T> {
    /// Of zeros: (columns, k).
    pub(super) fn new(kernel: &Kernel, columns: usize, k: usize) -> Self {
        let gemm = T::gemm(kernel);
        Self { weight: Packed::zeroed(columns, k, gemm.nr, gemm.streams), bias: None, columns }
    }

    /// Zeros for gate and up, (intermediate_size, k) each.
    pub(super) fn new_pair(kernel: &Kernel, intermediate_size: usize, k: usize) -> Self {
        let gemm = T::gemm(kernel);
        let columns = 2 * intermediate_size.next_multiple_of(gemm.nr / 2);
        Self { weight: Packed::zeroed(columns, k, gemm.nr, gemm.streams), bias: None, columns: intermediate_size }
    }

    pub(super) fn set_weight(&mut self, place: Place, weight: Matrix<T>) {
        self.weight.fill(place, weight);
    }

    pub(super) fn set_bias(&mut self, place: Place, bias: &[f32]) {
        let len = self.weight.panels * self.weight.nr();
        let buffer = self.bias.get_or_insert_with(|| Buffer::zeroed(len * size_of::<f32>()));
        for (row, &value) in bias.iter().enumerate() {
            let column = self.weight.column(place, row);
            assert!(column < len);
            // SAFETY: the buffer has `len` f32.
            unsafe { *buffer.as_mut_ptr::<f32>().add(column) = value };
        }
    }

    /// The bias as it was set, of the rows of `place`.
    pub(super) fn bias(&self, place: Place) -> Option<Vec<f32>> {
        let buffer = self.bias.as_ref()?;
        // SAFETY: columns of existing rows lie within the buffer.
        let at = |row| unsafe { *buffer.as_ptr::<f32>().add(self.weight.column(place, row)) };
        Some((0..self.columns).map(at).collect())
    }

    fn tile(&self, panel: usize, rows: usize, sums: *const f32) -> Tile {
        let bias = match &self.bias {
            // SAFETY: the bias is as wide as all panels.
            Some(buffer) => unsafe { buffer.as_ptr::<f32>().add(panel * self.weight.nr()) },
            None => std::ptr::null(),
        };
        Tile { sums, rows, bias }
    }

    /// x (M, k) -> y (M, columns)
    pub(super) fn forward(&self, kernel: &'static Kernel, x: Matrix<T>) -> Vec<T> {
        let gemm = T::gemm(kernel);
        forward(gemm, gemm.out_tile, &[self.stage()], x, self.columns)
    }

    /// x (M, k) -> y (M, columns) in f32: the sums, without a rounding to T.
    pub(super) fn forward_f32(&self, kernel: &'static Kernel, x: Matrix<T>) -> Vec<f32> {
        let gemm = T::gemm(kernel);
        forward(gemm, gemm.out_tile_f32, &[self.stage()], x, self.columns)
    }

    fn stage(&self) -> Stage<'_, T> {
        Stage { projection: self, glu: None, factor: 1.0 }
    }
}

/// The block's packed weights.
pub(super) struct Block<T> {
    pub(super) kernel: &'static Kernel,
    pub(super) glu: Glu,
    pub(super) gate_up: Projection<T>,
    pub(super) down: Projection<T>,
    pub(super) down_multiplier: f32,
}

impl<T: GemmElement> Block<T> {
    /// x (M, H) -> y (M, H)
    pub(super) fn forward(&self, x: Matrix<T>) -> Vec<T> {
        let stages = [
            Stage { projection: &self.gate_up, glu: Some(&self.glu), factor: 1.0 },
            Stage { projection: &self.down, glu: None, factor: self.down_multiplier },
        ];
        let gemm = T::gemm(self.kernel);
        forward(gemm, gemm.out_tile, &stages, x, self.down.columns)
    }
}

/// One product and its epilogue.
#[derive(Clone, Copy)]
struct Stage<'a, T> {
    projection: &'a Projection<T>,
    /// The columns are gate and up, and become h. Else they become y, times `factor`.
    glu: Option<&'a Glu>,
    factor: f32,
}

/// x (M, k) through one or two stages -> y (M, columns), written by `out_tile`
fn forward<T: GemmElement, Y: Send>(
    gemm: &Gemm<T>,
    out_tile: OutTile<Y>,
    stages: &[Stage<T>],
    x: Matrix<T>,
    columns: usize,
) -> Vec<Y> {
    x.check();
    let mut y: Vec<Y> = Vec::with_capacity(x.rows * columns);
    pages::advise_huge(y.as_mut_ptr(), y.capacity());
    let out = SendPtr(y.as_mut_ptr());
    let mut start = 0;
    while start < x.rows {
        let rows = CHUNK_ROWS.min(x.rows - start);
        let part = Matrix { data: &x.data[start * x.strides.0..], rows, ..x };
        // SAFETY: y has room for all rows, and the chunks of rows are disjoint.
        let out = SendPtr(unsafe { out.at(start * columns) });
        Pass::new(gemm, stages, part, Out { tile: out_tile, y: out, stride: columns }).run();
        start += rows;
    }
    // SAFETY: every chunk has written all its rows.
    unsafe { y.set_len(x.rows * columns) };
    y
}

/// Where y goes, and what writes it.
struct Out<Y> {
    tile: OutTile<Y>,
    y: SendPtr<Y>,
    stride: usize,
}

/// One chunk of rows on its way through the stages.
struct Pass<'a, T, Y> {
    gemm: &'a Gemm<T>,
    stages: &'a [Stage<'a, T>],
    x: Matrix<'a, T>,
    out: Out<Y>,
    threads: usize,
    /// The units of each stage.
    cuts: [Cut; 2],
    scratch: Scratch,
    /// A of the first stage, A of the second, then each thread's own: sums, and widened weights.
    offsets: [usize; 3],
    a_strides: [usize; 2],
    thread_bytes: usize,
}

impl<'a, T: GemmElement, Y: Send> Pass<'a, T, Y> {
    fn new(gemm: &'a Gemm<T>, stages: &'a [Stage<'a, T>], x: Matrix<'a, T>, out: Out<Y>) -> Self {
        let multiply_adds: usize = stages.iter().map(|s| s.projection.weight.len()).sum::<usize>() * x.rows;
        let threads = if multiply_adds < SERIAL { 1 } else { threads::count() };
        let a_bytes = if gemm.a_is_f32 { size_of::<f32>() } else { size_of::<T>() };
        let a_strides = [0, 1].map(|i| stages.get(i).map_or(0, |s| s.projection.weight.k().next_multiple_of(gemm.nr) + PAD));
        let offsets = [0, x.rows * a_strides[0] * a_bytes, x.rows * (a_strides[0] + a_strides[1]) * a_bytes];
        let offsets = offsets.map(|offset| offset.next_multiple_of(64));
        let cuts = [0, 1].map(|i| {
            let weight = stages.get(i).map(|s| &s.projection.weight);
            let beside = gemm.panels_at_once(x.rows, weight.map_or(0, Packed::bytes));
            Cut::new(x.rows, weight.map_or(0, |w| w.panels), threads, beside)
        });
        let sums = x.rows * gemm.nr * cuts[0].beside().max(cuts[1].beside()) * size_of::<f32>();
        let widened = if gemm.widen.is_some() && x.rows >= gemm.widen_from { BLOCK } else { 0 };
        let thread_bytes = (sums + widened).next_multiple_of(64);
        let scratch = Scratch::borrow(offsets[2] + threads * thread_bytes);
        Self { gemm, stages, x, out, threads, cuts, scratch, offsets, a_strides, thread_bytes }
    }

    fn run(mut self) {
        let scratch = SendPtr(self.scratch.as_mut_ptr());
        let copy = Phase::new(self.x.rows.div_ceil(COPY_ROWS));
        let phases = self.cuts.map(|cut| Phase::new(cut.units()));
        let work = |thread: usize| {
            // SAFETY: scratch has `threads` pieces of this size from the last offset on.
            let own = unsafe { scratch.at(self.offsets[2] + thread * self.thread_bytes) };
            // SAFETY: units of a phase write disjoint parts of A, h and y, and a phase begins when the one it reads is done.
            unsafe {
                copy.work(|unit, _| self.copy_rows(&scratch, unit));
                copy.wait();
                for (i, phase) in phases.iter().enumerate().take(self.stages.len()) {
                    phase.work(|unit, next| self.unit(i, &scratch, own, unit, next));
                    if i + 1 < self.stages.len() {
                        phase.wait();
                    }
                }
            }
        };
        if self.threads == 1 { work(0) } else { threads::run(work) }
    }

    /// Copies some rows of x into A.
    ///
    /// # Safety
    /// `scratch` is this pass's, and no other thread has this unit.
    unsafe fn copy_rows(&self, scratch: &SendPtr<u8>, unit: usize) {
        let (k, stride) = (self.x.k, self.x.strides.1);
        let a_bytes = self.a_bytes();
        let mut gathered: Vec<T> = Vec::new();
        for row in unit * COPY_ROWS..self.x.rows.min((unit + 1) * COPY_ROWS) {
            let source = &self.x.data[row * self.x.strides.0..];
            let source = if stride == 1 {
                &source[..k]
            } else {
                gathered.clear();
                gathered.extend((0..k).map(|i| source[i * stride]));
                &gathered[..]
            };
            // SAFETY: A has room for k elements and the padding in every row.
            unsafe {
                let a = scratch.at(row * self.a_strides[0] * a_bytes);
                (self.gemm.convert)(source.as_ptr(), k, a);
                // An odd k is filled up to a whole step.
                a.add(k * a_bytes).write_bytes(0, (k.next_multiple_of(T::K_STEP) - k) * a_bytes);
            }
        }
    }

    /// One panel of a stage, or some side by side, times all rows or a block of them.
    ///
    /// # Safety
    /// `scratch` is this pass's, `own` this thread's piece of it; A of this stage is complete; no other thread has this unit.
    unsafe fn unit(&self, stage: usize, scratch: &SendPtr<u8>, own: *mut u8, unit: usize, next: usize) {
        let (panels, std::ops::Range { start, end }) = self.cuts[stage].unit(unit);
        let rows = end - start;
        let projection = self.stages[stage].projection;
        let (a_bytes, a_stride) = (self.a_bytes(), self.a_strides[stage]);
        let sums = own.cast::<f32>();
        // SAFETY: the pieces lie within scratch as `new` laid it out; y has this chunk's rows.
        unsafe {
            let a = scratch.at(self.offsets[stage] + start * a_stride * a_bytes);
            let a = Rows { a, a_stride, a_bytes, rows };
            let most = self.cuts[stage].beside();
            if most > 1 && panels.len() == most {
                sweep_beside(self.gemm, &projection.weight, panels.start, a, sums);
            } else {
                let widened = own.add(self.x.rows * self.gemm.nr * most * size_of::<f32>()).cast();
                for (i, panel) in panels.clone().enumerate() {
                    let sums = sums.add(i * rows * self.gemm.nr);
                    product(self.gemm, &projection.weight, panel, a, sums, widened, self.first_byte(stage, next));
                }
            }
            for (i, panel) in panels.enumerate() {
                self.write(stage, scratch, panel, start, projection.tile(panel, rows, sums.add(i * rows * self.gemm.nr)));
            }
        }
    }

    /// The sums of one panel and the rows from `start` on -> h or y.
    ///
    /// # Safety
    /// As [`Pass::unit`], whose tile it is.
    unsafe fn write(&self, stage: usize, scratch: &SendPtr<u8>, panel: usize, start: usize, tile: Tile) {
        let (rows, Stage { projection, glu, factor }) = (tile.rows, self.stages[stage]);
        // SAFETY: as there.
        unsafe {
            match glu {
                Some(glu) => {
                    let (width, stride) = (self.gemm.nr / 2, self.a_strides[1]);
                    let h = scratch.at(self.offsets[1] + (start * stride + panel * width) * self.a_bytes());
                    (self.gemm.glu_tile)(glu, tile, h, stride);
                    self.fill_up(scratch, panel, start..start + rows);
                }
                None => {
                    let columns = self.gemm.nr.min(projection.columns - panel * self.gemm.nr);
                    let Out { tile: out_tile, ref y, stride } = self.out;
                    out_tile(tile, factor, y.at(start * stride + panel * self.gemm.nr), stride, columns);
                }
            }
        }
    }

    /// The weights of a unit; behind the last one of a stage, of the first of the next.
    fn first_byte(&self, stage: usize, unit: usize) -> *const u8 {
        let (stage, unit) = if unit < self.cuts[stage].units() { (stage, unit) } else { (stage + 1, 0) };
        let panel = |s: &Stage<T>| s.projection.weight.panel(self.cuts[stage].unit(unit).0.start).cast();
        self.stages.get(stage).map_or(std::ptr::null(), panel)
    }

    /// Zeros behind h where its width is no multiple of a step: 0 times a weight of 0, not NaN.
    ///
    /// # Safety
    /// As [`Pass::unit`], which has just written these rows of h.
    unsafe fn fill_up(&self, scratch: &SendPtr<u8>, panel: usize, rows: std::ops::Range<usize>) {
        let k = self.stages[1].projection.weight.k();
        let (padding, width, a_bytes) = (k.next_multiple_of(T::K_STEP) - k, self.gemm.nr / 2, self.a_bytes());
        if padding > 0 && panel == (k - 1) / width {
            for row in rows {
                // SAFETY: a row of h has room for whole panels and PAD.
                unsafe {
                    let end = scratch.at(self.offsets[1] + (row * self.a_strides[1] + k) * a_bytes);
                    end.write_bytes(0, padding * a_bytes);
                }
            }
        }
    }

    fn a_bytes(&self) -> usize {
        if self.gemm.a_is_f32 { size_of::<f32>() } else { size_of::<T>() }
    }
}
