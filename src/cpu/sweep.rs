//! The product with one panel, or a few adjacent ones: A (rows, k) · panel (k, NR) -> sums (rows,
//! NR) in f32.
//!
//! As many rows as a microkernel takes make one sweep along the panel, which is prefetched
//! (decode). More rows read the panel in k-blocks that stay in cache while all rows are multiplied
//! with them (prefill). Sums run over k in the same parts and the same order either way.

use std::ops::Range;

use super::format::Format;
use super::micro::{Micro, MicroArgs};
use super::panels::PanelsRef;
use super::product::SUM_F32;
use super::tiles::{self, Tiles};
use super::tuning::Tuning;

/// The least share of a k-block, in bytes of each stream and round, for which a prefetch is worth
/// its instruction.
const LEAST_PREFETCH: usize = 8;

/// The microkernels of one instruction set for weights of one format.
pub(super) struct Sweep {
    /// Columns of a panel.
    pub(super) nr: usize,
    /// Streams of a panel.
    pub(super) streams: usize,
    /// Bytes of an element of A: f32, or bf16 where the instruction set multiplies bf16.
    pub(super) a_bytes: usize,
    /// How the weights are stored.
    pub(super) format: Format,
    /// Microkernels for 1, 2, .., MR rows that prefetch nothing.
    pub(super) micro: Vec<Micro>,
    /// The same, which together prefetch the next k-block.
    pub(super) micro_block: Vec<Micro>,
    /// The same for one sweep along the panel.
    pub(super) micro_sweep: Vec<Micro>,
    /// For 1, 2, .. rows: the number of adjacent panels and the microkernel that multiplies them at
    /// once. With few rows there are registers to spare, and a single panel would be limited by the
    /// latency of the multiply-add.
    pub(super) micro_adjacent: Vec<(usize, Micro)>,
    /// How more than MR rows are multiplied after each k-block was rewritten.
    pub(super) rewritten: Option<Rewritten>,
    /// A matrix unit, which then multiplies any number of rows instead of the microkernels.
    pub(super) tiles: Option<Tiles>,
    pub(super) tuning: Tuning,
}

/// Rewrites one k-block for all rows at once: widens it to f32, or reorders it for instructions
/// that read it in another order.
pub(super) struct Rewritten {
    /// Rows from which this is faster. Never fewer than a sweep takes.
    pub(super) from_rows: usize,
    /// Packed steps, bytes from stream to stream, number of steps, result.
    pub(super) rewrite: unsafe fn(*const u8, usize, usize, *mut u8),
    /// Microkernels for 1, 2, .., MR rows of the result. Their steps are single values of k.
    pub(super) micro: Vec<Micro>,
    /// Bytes of one column and value of k for which the result has room.
    pub(super) value_bytes: usize,
}

/// Rows of A.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub(super) a: *const u8,
    pub(super) a_stride: usize,
    pub(super) rows: usize,
}

/// Where sums are written.
#[derive(Clone, Copy)]
pub(super) struct Sums {
    /// (panels, padded rows, NR)
    pub(super) to: *mut f32,
    /// Add to what is there instead of starting from zero.
    pub(super) accumulate: bool,
}

impl Sums {
    /// Sums that start from zero.
    pub(super) fn new(to: *mut f32) -> Self {
        Self { to, accumulate: false }
    }

    /// The sums from this element on.
    fn at(self, element: usize) -> Self {
        Self { to: self.to.wrapping_add(element), ..self }
    }
}

impl Sweep {
    /// The multiple to which the k of a panel is padded.
    pub(super) fn k_multiple(&self) -> usize {
        if self.tiles.is_some() { tiles::STEP_K } else { self.format.k_step() }
    }

    /// Rows of A that are read, and of sums that are written, for this many rows.
    pub(super) fn padded_rows(&self, rows: usize) -> usize {
        if self.tiles.is_some() { tiles::padded_rows(rows) } else { rows }
    }

    /// The most rows by which [`Sweep::padded_rows`] exceeds the rows.
    pub(super) fn row_padding(&self) -> usize {
        if self.tiles.is_some() { tiles::ROWS - 1 } else { 0 }
    }

    /// How many panels of a matrix of this many bytes are multiplied at once with this many rows.
    pub(super) fn panels_at_once(&self, rows: usize, bytes: usize) -> usize {
        if let Some(tiles) = &self.tiles {
            return tiles.panels_at_once(rows);
        }
        let adjacent = self.micro_adjacent.get(rows.wrapping_sub(1));
        adjacent.filter(|_| bytes <= self.tuning.adjacent_bytes).map_or(1, |&(panels, _)| panels)
    }

    /// Bytes of scratch for a rewritten k-block.
    pub(super) fn rewritten_bytes(&self, rows: usize) -> usize {
        self.rewritten
            .as_ref()
            .filter(|r| rows >= r.from_rows)
            .map_or(0, |_| self.tuning.many_rows_block)
    }

    /// A (rows, k) · panels (k, NR) -> sums (panels, padded rows, NR)
    ///
    /// # Safety
    /// A and `sums` have room for the padded rows, A all steps of a panel; the panels exist and are
    /// of this format; `scratch` has [`Sweep::rewritten_bytes`]. `after`, what this thread is likely
    /// to read next, is only prefetched.
    pub(super) unsafe fn panels(
        &self,
        weight: PanelsRef,
        panels: Range<usize>,
        a: Rows,
        sums: Sums,
        scratch: *mut u8,
        after: *const u8,
    ) {
        let adjacent = self.micro_adjacent.get(a.rows - 1);
        // SAFETY: the caller's contract; panels follow each other.
        unsafe {
            if let Some(tiles) = &self.tiles {
                tiles.panels(weight, panels, a, sums, after);
            } else if let Some((_, micro)) = adjacent.filter(|&&(n, _)| n == panels.len()) {
                micro(&args(weight, weight.panel(panels.start), weight.layout.steps(), a, sums));
            } else {
                for (i, panel) in panels.enumerate() {
                    let sums = sums.at(i * a.rows * self.nr);
                    self.panel(weight, panel, a, sums, scratch, after);
                }
            }
        }
    }

    /// A (rows, k) · panel (k, NR) -> sums (rows, NR)
    ///
    /// # Safety
    /// As [`Sweep::panels`].
    unsafe fn panel(
        &self,
        weight: PanelsRef,
        panel: usize,
        a: Rows,
        sums: Sums,
        scratch: *mut u8,
        after: *const u8,
    ) {
        let (steps, b) = (weight.layout.steps(), weight.panel(panel));
        let step_bytes = weight.layout.step_bytes();
        if a.rows <= self.micro.len() {
            let ahead = self.tuning.sweep_ahead / step_bytes;
            let args = MicroArgs {
                prefetch: [b.wrapping_add(ahead * step_bytes), after],
                prefetch_switch: steps.saturating_sub(ahead),
                ..args(weight, b, steps, a, sums)
            };
            // SAFETY: the caller's contract.
            return unsafe { self.micro_sweep[a.rows - 1](&args) };
        }
        // SAFETY: the caller's contract.
        unsafe { self.blocks(weight, b, a, sums, scratch, after) }
    }

    /// [`Sweep::panel`] for more rows than a microkernel takes.
    ///
    /// # Safety
    /// As there; `b` is the panel.
    unsafe fn blocks(
        &self,
        weight: PanelsRef,
        b: *const u8,
        a: Rows,
        sums: Sums,
        scratch: *mut u8,
        after: *const u8,
    ) {
        let (steps, step_bytes) = (weight.layout.steps(), weight.layout.step_bytes());
        let groups = a.rows.div_ceil(self.micro.len());
        let first_row = |group: usize| a.rows * group / groups;
        let rewritten = self.rewritten.as_ref().filter(|r| a.rows >= r.from_rows);
        let block_steps = self.block_steps(a.rows, rewritten);
        let rounds = block_steps / self.streams;
        // Each microkernel's share of the next block, in bytes of each stream and round.
        let share = (step_bytes / groups).max(LEAST_PREFETCH);
        let mut start = 0;
        loop {
            let count = block_steps.min(steps - start);
            // SAFETY: the caller's contract; the block's steps exist, and prefetch addresses are
            // not read.
            unsafe {
                let packed = b.add(start / self.streams * step_bytes);
                let (block, micro, micro_steps) = match rewritten {
                    Some(Rewritten { rewrite, micro, .. }) => {
                        rewrite(packed, weight.layout.stream_stride(), count, scratch);
                        (scratch.cast_const(), micro, count * self.format.k_step())
                    }
                    None => (packed, &self.micro, count),
                };
                let next = if start + count < steps {
                    packed.wrapping_add(rounds * step_bytes)
                } else {
                    after
                };
                for group in 0..groups {
                    let (row, end) = (first_row(group), first_row(group + 1));
                    let ahead = group * rounds * share;
                    let prefetches = rewritten.is_none() && ahead < rounds * step_bytes;
                    let micro = if prefetches { &self.micro_block } else { micro };
                    let first = (row * a.a_stride + start * self.format.k_step()) * self.a_bytes;
                    let a = Rows { a: a.a.add(first), ..a };
                    micro[end - row - 1](&MicroArgs {
                        accumulate: sums.accumulate || start > 0,
                        prefetch: [next.wrapping_add(ahead); 2],
                        prefetch_bytes: share,
                        ..args(weight, block, micro_steps, a, sums.at(row * self.nr))
                    });
                }
            }
            start += count;
            if start >= steps {
                return;
            }
        }
    }

    /// Steps of a k-block. Blocks end where parts of sums and rounds over the streams do.
    fn block_steps(&self, rows: usize, rewritten: Option<&Rewritten>) -> usize {
        let k_bytes = match rewritten {
            Some(rewritten) => self.nr * rewritten.value_bytes,
            None => self.nr * self.format.column_bytes() / self.format.k_step(),
        };
        let block_k = if rows <= self.tuning.few_rows {
            (self.tuning.few_rows_block / k_bytes).max(SUM_F32)
        } else {
            self.tuning.many_rows_block / k_bytes
        };
        debug_assert!(block_k % SUM_F32 == 0, "blocks end where sums do");
        let steps = block_k / self.format.k_step();
        debug_assert!(
            steps.is_multiple_of(self.streams),
            "blocks end where rounds over the streams do"
        );
        steps
    }
}

/// The arguments for the first `steps` steps at `b`, with nothing to prefetch.
fn args(weight: PanelsRef, b: *const u8, steps: usize, a: Rows, sums: Sums) -> MicroArgs {
    MicroArgs {
        a: a.a,
        a_stride: a.a_stride,
        b,
        stream_stride: weight.layout.stream_stride(),
        panel_stride: weight.layout.panel_stride(),
        steps,
        sums: sums.to,
        accumulate: sums.accumulate,
        prefetch: [b; 2],
        prefetch_switch: 0,
        prefetch_bytes: 0,
    }
}
