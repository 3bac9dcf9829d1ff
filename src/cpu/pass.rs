//! The whole block, `h = glu(x·Wgᵀ, x·Wuᵀ)`, `y = h·Wdᵀ`, or one projection.
//!
//! 1. Rows of x are copied into scratch as A: in the microkernel's element type and with padded
//!    strides, at most [`CHUNK_ROWS`] at a time, so that scratch is bounded.
//! 2. A unit of work is a panel of weights, or a few, times some rows (`partition.rs`, `sweep.rs`).
//!    Threads claim units in order. The sums of a unit, (panels, rows, NR) in f32, are in its
//!    thread's scratch.
//! 3. An epilogue turns the sums into h or y while they are in cache. gate and up are never
//!    written.
//! 4. A thread starts the down projection when all of h is complete.
//!
//! A low-rank addend (`low_rank.rs`) is a product of its own before each stage, u = x·Aᵀ, and one
//! more k-block in each unit of the stage (`pass/u.rs`).

mod u;

use std::ops::Range;

use self::u::{PART_ROWS, parts};
use super::buffer::Scratch;
use super::epilogue::PanelSums;
use super::kernels::{Edges, Io, OutputFn};
use super::low_rank::LowRank;
use super::matrix::Matrix;
use super::pages;
use super::partition::Partition;
use super::projection::Projection;
use super::sweep::{Rows, Sums};
use super::threads::{self, Phase, SendPtr};
use crate::gate::activation::Glu;

/// Rows of x that are processed at a time. The scratch of a block is at most
/// `rows·(H + I + 256)·a + threads·(rows·256 B + 256 KiB)` bytes for `rows` ≤ 512, where a is 2 if
/// the kernel multiplies bf16 and 4 otherwise. A matrix unit counts up to 15 rows more, and 1 KiB
/// instead of 256 B for its 8 panels.
pub(super) const CHUNK_ROWS: usize = 512;
/// Elements of padding between the rows of A. Rows a power of two apart would share cache sets.
pub(super) const PAD: usize = 64;
/// Below this many multiply-adds, one thread is faster than waking another.
pub(super) const SERIAL: usize = 1 << 16;
/// Rows that a thread copies at a time.
const COPY_ROWS: usize = 8;

/// A linear layer with packed weights; x and y have dtype T.
pub(super) struct Linear<T: 'static> {
    pub(super) projection: Projection,
    edges: &'static Edges<T>,
}

impl<T: Io> Linear<T> {
    /// None if the format's kernels do not support T.
    pub(super) fn new(projection: Projection) -> Option<Self> {
        let edges = T::edges(projection.kernels())?;
        Some(Self { projection, edges })
    }

    /// x (M, k) -> y (M, columns)
    pub(super) fn forward(&self, x: Matrix<T>, low_rank: Option<&LowRank>) -> Vec<T> {
        let stages = [self.stage(low_rank)];
        forward(self.edges, self.edges.output, &stages, x, self.projection.columns)
    }

    /// x (M, k) -> y (M, columns) in f32: the sums, without rounding to T.
    pub(super) fn forward_f32(&self, x: Matrix<T>, low_rank: Option<&LowRank>) -> Vec<f32> {
        let stages = [self.stage(low_rank)];
        forward(self.edges, self.edges.output_f32, &stages, x, self.projection.columns)
    }

    fn stage<'a>(&'a self, low_rank: Option<&'a LowRank>) -> Stage<'a> {
        Stage { projection: &self.projection, low_rank, glu: None, factor: 1.0 }
    }
}

/// The block with packed weights; x, h and y have dtype T.
pub(super) struct Block<T: 'static> {
    pub(super) glu: Glu,
    pub(super) gate_up: Projection,
    pub(super) down: Projection,
    pub(super) down_multiplier: f32,
    edges: &'static Edges<T>,
}

impl<T: Io> Block<T> {
    /// None if the format's kernels do not support T.
    pub(super) fn new(
        glu: Glu,
        gate_up: Projection,
        down: Projection,
        down_multiplier: f32,
    ) -> Option<Self> {
        // gate_up's epilogue writes h as the element type of A that down reads.
        assert!(gate_up.sweep().a_bytes == down.sweep().a_bytes);
        let edges = T::edges(gate_up.kernels())?;
        Some(Self { glu, gate_up, down, down_multiplier, edges })
    }

    /// x (M, H) -> y (M, H)
    pub(super) fn forward(&self, x: Matrix<T>, low_rank: [Option<&LowRank>; 2]) -> Vec<T> {
        let [gate_up, down] = low_rank;
        let stages = [
            Stage {
                projection: &self.gate_up,
                low_rank: gate_up,
                glu: Some(&self.glu),
                factor: 1.0,
            },
            Stage {
                projection: &self.down,
                low_rank: down,
                glu: None,
                factor: self.down_multiplier,
            },
        ];
        forward(self.edges, self.edges.output, &stages, x, self.down.columns)
    }
}

/// One product and its epilogue.
#[derive(Clone, Copy)]
struct Stage<'a> {
    projection: &'a Projection,
    low_rank: Option<&'a LowRank>,
    /// The columns are gate and up, and become h. Otherwise they become y, times `factor`.
    glu: Option<&'a Glu>,
    factor: f32,
}

/// x (M, k) through one or two stages -> y (M, columns), written by `output`.
fn forward<T: Io, Y: Send>(
    edges: &Edges<T>,
    output: OutputFn<Y>,
    stages: &[Stage],
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
        let y = SendPtr(unsafe { out.at(start * columns) });
        Pass::new(edges, stages, part, Out { write: output, y, stride: columns }).run();
        start += rows;
    }
    // SAFETY: every chunk has written all its rows.
    unsafe { y.set_len(x.rows * columns) };
    y
}

/// Where y is written, and by which function.
struct Out<Y> {
    write: OutputFn<Y>,
    y: SendPtr<Y>,
    stride: usize,
}

/// One chunk of rows on its way through the stages.
struct Pass<'a, T: 'static, Y> {
    edges: &'a Edges<T>,
    stages: &'a [Stage<'a>],
    x: Matrix<'a, T>,
    out: Out<Y>,
    threads: usize,
    /// The units of each stage.
    partitions: [Partition; 2],
    /// The units of each stage's low-rank product, unless they are parts of k.
    low_rank: [Partition; 2],
    scratch: Scratch,
    /// A of the first stage and of the second, u of the first and of the second, the parts of u of
    /// the first and of the second, then each thread's own: sums, a rewritten k-block, and u.
    offsets: [usize; 7],
    /// Elements from one row of these operands to the next; f32 of a part of u.
    strides: [usize; 6],
    /// Bytes of sums in a thread's own piece, and where u of few rows begins.
    sums_bytes: usize,
    own_u: usize,
    thread_bytes: usize,
}

impl<'a, T: Io, Y: Send> Pass<'a, T, Y> {
    fn new(edges: &'a Edges<T>, stages: &'a [Stage<'a>], x: Matrix<'a, T>, out: Out<Y>) -> Self {
        let multiply_adds: usize =
            stages.iter().map(|s| s.projection.weight.layout.multiply_adds()).sum::<usize>()
                * x.rows;
        let threads = if multiply_adds < SERIAL { 1 } else { threads::count() };
        let stage = |i: usize| stages.get(i).map(|s| s.projection);
        let low_rank = |i: usize| stages.get(i).and_then(|s| s.low_rank);
        let sweep = stages[0].projection.sweep();
        // h is written in whole panels of the first stage.
        let a_stride = |p: &Projection| p.weight.layout.k().next_multiple_of(sweep.nr) + PAD;
        let strides = [
            stage(0).map_or(0, a_stride),
            stage(1).map_or(0, a_stride),
            low_rank(0).map_or(0, LowRank::u_stride),
            low_rank(1).map_or(0, LowRank::u_stride),
            low_rank(0).map_or(0, |pair| pair.part_len(x.rows)),
            low_rank(1).map_or(0, |pair| pair.part_len(x.rows)),
        ];
        let mut offsets = [0; 7];
        for (i, stride) in strides.into_iter().enumerate() {
            let parts = || low_rank(i - 4).map_or(0, |pair| parts(pair).count());
            let bytes = match i {
                ..4 => (x.rows + sweep.row_padding()) * stride * sweep.a_bytes,
                _ if x.rows < PART_ROWS => parts() * stride * size_of::<f32>(),
                _ => 0,
            };
            offsets[i + 1] = (offsets[i] + bytes).next_multiple_of(64);
        }
        let partition = |projection: Option<&Projection>| match projection {
            Some(p) => {
                let adjacent = p.sweep().panels_at_once(x.rows, p.weight.layout.bytes());
                Partition::new(x.rows, p.weight.layout.count(), threads, adjacent)
            }
            None => Partition::new(x.rows, 0, threads, 1),
        };
        let partitions = [0, 1].map(|i| partition(stage(i)));
        let of_low_rank = [0, 1].map(|i| partition(low_rank(i).map(|pair| &pair.a)));
        let rows = x.rows + sweep.row_padding();
        let most = partitions.iter().map(Partition::adjacent).max().unwrap_or(1);
        // Of u the sums of a part, too; u of few rows has all its panels.
        let of_u = |(i, partition): (usize, &Partition)| {
            let panels = low_rank(i).map_or(0, |pair| pair.a.weight.layout.count());
            2 * if x.rows < PART_ROWS { panels } else { panels.min(partition.adjacent()) }
        };
        let of_u = of_low_rank.iter().enumerate().map(of_u).max().unwrap_or(0);
        let sums_bytes = rows * sweep.nr * most.max(of_u) * size_of::<f32>();
        let own_u = (sums_bytes + sweep.rewritten_bytes(x.rows)).next_multiple_of(64);
        let u_bytes = match x.rows {
            ..PART_ROWS => rows * strides[2].max(strides[3]) * sweep.a_bytes,
            _ => 0,
        };
        let thread_bytes = (own_u + u_bytes).next_multiple_of(64);
        let scratch = Scratch::borrow(offsets[6] + threads * thread_bytes);
        Self {
            edges,
            stages,
            x,
            out,
            threads,
            partitions,
            low_rank: of_low_rank,
            scratch,
            offsets,
            strides,
            sums_bytes,
            own_u,
            thread_bytes,
        }
    }

    fn run(mut self) {
        let scratch = SendPtr(self.scratch.as_mut_ptr());
        let copy = Phase::new(self.x.rows.div_ceil(COPY_ROWS));
        let phases = self.partitions.map(|partition| Phase::new(partition.units()));
        let few = self.x.rows < PART_ROWS;
        let low_rank = [0, 1].map(|i| {
            let pair = self.stages.get(i).and_then(|stage| stage.low_rank);
            Phase::new(match pair {
                Some(pair) if few => parts(pair).count(),
                _ => self.low_rank[i].units(),
            })
        });
        let work = |thread: usize| {
            // SAFETY: scratch has `threads` pieces of this size from the last offset on.
            let own = unsafe { scratch.at(self.offsets[6] + thread * self.thread_bytes) };
            // SAFETY: units of a phase write disjoint parts of A, u, h and y, and a phase begins
            // when the one it reads is done.
            unsafe {
                copy.work(|unit, _| self.copy_rows(&scratch, unit));
                copy.wait();
                for (i, stage) in self.stages.iter().enumerate() {
                    if let Some(pair) = stage.low_rank.filter(|_| few) {
                        low_rank[i].work(|part, _| self.part_of_u(i, pair, &scratch, own, part));
                        low_rank[i].wait();
                        self.u_of_parts(i, pair, &scratch, own);
                    } else if let Some(pair) = stage.low_rank {
                        low_rank[i].work(|unit, _| self.u(i, pair, &scratch, own, unit));
                        low_rank[i].wait();
                    }
                    phases[i].work(|unit, next| self.unit(i, &scratch, own, unit, next));
                    if i + 1 < self.stages.len() {
                        phases[i].wait();
                    }
                }
            }
        };
        threads::run_on(self.threads, work);
    }

    /// Rows of an operand from this one on.
    ///
    /// # Safety
    /// `scratch` is this pass's, and the operand has these rows.
    unsafe fn rows(
        &self,
        scratch: &SendPtr<u8>,
        operand: usize,
        Range { start, end }: Range<usize>,
    ) -> Rows {
        let (a_stride, a_bytes) = (self.strides[operand], self.a_bytes());
        // SAFETY: the caller's contract.
        let a = unsafe { scratch.at(self.offsets[operand] + start * a_stride * a_bytes) };
        Rows { a, a_stride, rows: end - start }
    }

    /// Copies some rows of x into A.
    ///
    /// # Safety
    /// `scratch` is this pass's, and no other thread has this unit.
    unsafe fn copy_rows(&self, scratch: &SendPtr<u8>, unit: usize) {
        let (k, stride) = (self.x.k, self.x.strides.1);
        let projection = self.stages[0].projection;
        let (a_bytes, padded_k) = (self.a_bytes(), projection.weight.layout.padded_k());
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
                let a = scratch.at(row * self.strides[0] * a_bytes);
                (self.edges.take_x)(source.as_ptr(), k, a);
                a.add(k * a_bytes).write_bytes(0, (padded_k - k) * a_bytes);
            }
        }
    }

    /// One panel of a stage, or some adjacent ones, times all rows or some of them.
    ///
    /// # Safety
    /// `scratch` is this pass's, `own` this thread's piece of it; A of this stage is complete; no
    /// other thread has this unit.
    unsafe fn unit(
        &self,
        stage: usize,
        scratch: &SendPtr<u8>,
        own: *mut u8,
        unit: usize,
        next: usize,
    ) {
        let (panels, rows) = self.partitions[stage].unit(unit);
        let Stage { projection, low_rank, .. } = self.stages[stage];
        let (sweep, sums) = (projection.sweep(), own.cast::<f32>());
        // SAFETY: the pieces lie within scratch as `new` laid it out; y has this chunk's rows.
        unsafe {
            let a = self.rows(scratch, stage, rows.clone());
            let (rewritten, after) = (own.add(self.sums_bytes), self.first_byte(stage, next));
            if let Some(LowRank { b, .. }) = low_rank.filter(|_| self.x.rows < PART_ROWS) {
                b.weight.view().prefetch(panels.clone());
            }
            let weight = projection.weight.view();
            sweep.panels(weight, panels.clone(), a, Sums::new(sums), rewritten, after);
            if let Some(LowRank { b, .. }) = low_rank {
                let u = self.u_rows(stage, scratch, own, rows.clone());
                let sums = Sums { to: sums, accumulate: true };
                sweep.panels(b.weight.view(), panels.clone(), u, sums, rewritten, after);
            }
            let panel_sums = sweep.padded_rows(rows.len()) * sweep.nr;
            for (i, panel) in panels.enumerate() {
                let sums = projection.sums(panel, rows.len(), sums.add(i * panel_sums));
                self.write(stage, scratch, panel, rows.start, sums);
            }
        }
    }

    /// The sums of one panel and the rows from `start` on -> h or y.
    ///
    /// # Safety
    /// As [`Pass::unit`], whose sums they are.
    unsafe fn write(
        &self,
        stage: usize,
        scratch: &SendPtr<u8>,
        panel: usize,
        start: usize,
        sums: PanelSums,
    ) {
        let (rows, Stage { projection, glu, factor, .. }) = (sums.rows, self.stages[stage]);
        let nr = projection.sweep().nr;
        // SAFETY: as there.
        unsafe {
            match glu {
                Some(glu) => {
                    let (width, stride) = (nr / 2, self.strides[1]);
                    let h = scratch
                        .at(self.offsets[1] + (start * stride + panel * width) * self.a_bytes());
                    (self.edges.gate)(glu, sums, h, stride);
                    self.pad(scratch, panel, start..start + rows);
                }
                None => {
                    let columns = nr.min(projection.columns - panel * nr);
                    let Out { write, ref y, stride } = self.out;
                    write(sums, factor, y.at(start * stride + panel * nr), stride, columns);
                }
            }
        }
    }

    /// The weights of a unit; after the last unit of a stage, those of the first unit of the next
    /// stage.
    fn first_byte(&self, stage: usize, unit: usize) -> *const u8 {
        let (stage, unit) =
            if unit < self.partitions[stage].units() { (stage, unit) } else { (stage + 1, 0) };
        let panel =
            |s: &Stage| s.projection.weight.view().panel(self.partitions[stage].unit(unit).0.start);
        self.stages.get(stage).map_or(std::ptr::null(), panel)
    }

    /// Writes zeros behind h where its width is not a multiple of a step. Otherwise a padding
    /// weight of 0 could be multiplied with a NaN.
    ///
    /// # Safety
    /// As [`Pass::unit`], which has just written these rows of h.
    unsafe fn pad(&self, scratch: &SendPtr<u8>, panel: usize, rows: Range<usize>) {
        let weight = self.stages[1].projection.weight.layout;
        let (k, a_bytes, width) =
            (weight.k(), self.a_bytes(), self.stages[0].projection.sweep().nr / 2);
        let padding = weight.padded_k() - k;
        if padding > 0 && panel == (k - 1) / width {
            for row in rows {
                // SAFETY: a row of h has room for whole panels and PAD.
                unsafe {
                    let end = scratch.at(self.offsets[1] + (row * self.strides[1] + k) * a_bytes);
                    end.write_bytes(0, padding * a_bytes);
                }
            }
        }
    }

    /// Bytes of an element of A, of u and of h.
    fn a_bytes(&self) -> usize {
        self.stages[0].projection.sweep().a_bytes
    }
}
