//! The product with panels on a matrix unit: A (rows, k) · panels (k, 32) -> sums (panels, rows, 32)
//! in f32, in tiles of up to 16 rows, 16 columns and 32 values of k.
//!
//! A tile of A is up to 16 rows of A, 64 bytes each, where they are. A tile of B is half of 16 steps
//! of a panel, which is 64 bytes wide at a stride of 128. So both are read as they are stored.
//!
//! Up to [`ROWS`] rows make one sweep along one or several panels, which are prefetched (decode).
//! More rows read a few panels in k-blocks. A k-block of B then stays in L1 while all rows are
//! multiplied with it, and the same k of A stays in L2 for all panels of the unit (prefill). Sums
//! run over k in the same parts and the same order either way, and no row depends on another one.

use super::panels::PanelsRef;
use super::sweep::{Rows, Sums};

/// Rows of a tile.
pub(super) const ROWS: usize = 16;
/// Values of k of a tile, and the multiple to which a panel's k is padded.
pub(super) const STEP_K: usize = 32;
/// Columns of a panel.
pub(super) const NR: usize = 32;
/// Panels that [`Tiles::row`] multiplies at once.
pub(super) const ROW_PANELS: usize = 4;
/// Bytes of a row of sums.
const SUMS_ROW: usize = NR * size_of::<f32>();
/// Bytes of a panel in one step.
const STEP_BYTES: usize = NR * STEP_K * 2;
/// Cache lines of a panel in one step.
const STEP_LINES: usize = STEP_BYTES / 64;
/// Rows of A of which [`Tiles::pair`] prefetches a line in each step.
const PREFETCHED_ROWS: usize = 4;

/// The arguments of a tile microkernel: sums (panels, rows, 32) += A (rows, 32·steps) · panels.
#[derive(Clone, Copy)]
pub(super) struct TileArgs {
    /// A, its first element.
    pub(super) a: *const u8,
    /// Bytes from one row of A to the next.
    pub(super) a_stride: usize,
    pub(super) b: *const u8,
    /// Bytes from one panel to the next.
    pub(super) panel_stride: usize,
    /// At least 1.
    pub(super) steps: usize,
    pub(super) sums: *mut f32,
    /// Bytes from the sums of one panel, or tile of rows, to those of the next.
    pub(super) sums_stride: usize,
    /// Rows of each tile: the height that was configured.
    pub(super) height: usize,
    /// Add to what `sums` holds instead of starting from zero.
    pub(super) accumulate: bool,
    /// Prefetched into L2, `lines` cache lines in each step. A sweep prefetches as much as it
    /// reads, into L1, at the same distance in each panel.
    pub(super) prefetch: *const u8,
    pub(super) lines: usize,
    /// For two tiles of rows, also prefetched: into L2, in each step, a line of this row of A and of
    /// the next three; into L1, the sums.
    pub(super) next_a: *const u8,
    pub(super) next_sums: *const f32,
}

/// A tile microkernel for a fixed number of row tiles and panels.
pub(super) type TileMicro = unsafe fn(&TileArgs);

/// The microkernels of one matrix unit.
pub(super) struct Tiles {
    /// Gives this thread tiles of this height.
    pub(super) configure: unsafe fn(usize) -> Saved,
    /// Restores what the thread had.
    pub(super) restore: unsafe fn(&Saved),
    /// Two tiles of rows and one panel.
    pub(super) pair: TileMicro,
    /// One tile of rows and one panel.
    pub(super) single: TileMicro,
    /// The same with 1 or 2 panels, for a sweep.
    pub(super) sweep: [TileMicro; 2],
    /// One row and [`ROW_PANELS`] panels, for a sweep: the arithmetic of tiles without tiles.
    pub(super) row: TileMicro,
    pub(super) tuning: TileTuning,
}

/// A thread's tile configuration as the instructions read and write it.
#[repr(C, align(64))]
pub(super) struct Saved(pub(super) [u8; 64]);

/// Block sizes.
#[derive(Clone, Copy, Debug)]
pub(super) struct TileTuning {
    /// The CPU that the values were measured on.
    pub(super) measured_on: &'static str,
    /// Steps of a k-block.
    pub(super) block_steps: usize,
    /// Panels of a unit with many rows.
    pub(super) many_rows_panels: usize,
    /// Panels of a unit with one row.
    pub(super) row_panels: usize,
    /// Panels of a unit with up to [`ROWS`] rows.
    pub(super) few_rows_panels: usize,
    /// How far ahead of its use a sweep prefetches, in bytes.
    pub(super) sweep_ahead: usize,
}

/// Rows of A that are read, and of sums that are written, for this many rows: whole tiles of equal
/// height.
pub(super) fn padded_rows(rows: usize) -> usize {
    let tiles = rows.div_ceil(ROWS);
    tiles * rows.div_ceil(tiles)
}

impl Tiles {
    /// The panels of a unit with this many rows.
    pub(super) fn panels_at_once(&self, rows: usize) -> usize {
        match rows {
            1 => self.tuning.row_panels,
            2..=ROWS => self.tuning.few_rows_panels,
            _ => self.tuning.many_rows_panels,
        }
    }

    /// A (rows, k) · panels (k, 32) -> sums (panels, rows, 32)
    ///
    /// # Safety
    /// The thread may use the matrix unit. A and `sums` have room for [`padded_rows`], A all k of a
    /// panel; the panels exist. `after`, what this thread is likely to read next, is only
    /// prefetched.
    pub(super) unsafe fn panels(
        &self,
        weight: PanelsRef,
        panels: std::ops::Range<usize>,
        a: Rows,
        sums: Sums,
        after: *const u8,
    ) {
        let tiles = a.rows.div_ceil(ROWS);
        let height = padded_rows(a.rows) / tiles;
        // SAFETY: the caller's contract; the configuration is restored below.
        unsafe {
            if weight.layout.k() == 0 {
                if !sums.accumulate {
                    sums.to.write_bytes(0, panels.len() * tiles * height * NR);
                }
                return;
            }
            // One row of whole groups of panels is multiplied in vectors.
            let in_vectors = a.rows == 1 && panels.len().is_multiple_of(ROW_PANELS);
            let saved = (!in_vectors).then(|| (self.configure)(height));
            if tiles == 1 {
                self.sweep(weight, panels, a, sums, after);
            } else {
                self.blocks(weight, panels, (tiles, height), a, sums, after);
            }
            if let Some(saved) = saved {
                (self.restore)(&saved);
            }
        }
    }

    /// One tile of rows: a sweep along the panels.
    unsafe fn sweep(
        &self,
        weight: PanelsRef,
        panels: std::ops::Range<usize>,
        a: Rows,
        sums: Sums,
        after: *const u8,
    ) {
        let mut first = panels.start;
        while first < panels.end {
            let rest = panels.end - first;
            let (count, micro) = if a.rows == 1 && rest >= ROW_PANELS {
                (ROW_PANELS, self.row)
            } else {
                let count = rest.min(self.sweep.len());
                (count, self.sweep[count - 1])
            };
            let (b, steps) = (weight.panel(first), weight.layout.padded_k() / STEP_K);
            let ahead = (self.tuning.sweep_ahead / STEP_BYTES).min(steps);
            let index = first - panels.start;
            let args = TileArgs {
                a: a.a,
                a_stride: a.a_stride * 2,
                b,
                panel_stride: weight.layout.panel_stride(),
                steps: steps - ahead,
                // SAFETY: the caller's contract.
                sums: unsafe { sums.to.add(index * a.rows * NR) },
                sums_stride: a.rows * SUMS_ROW,
                height: a.rows,
                accumulate: sums.accumulate,
                prefetch: b.wrapping_add(ahead * STEP_BYTES),
                lines: STEP_LINES,
                next_a: a.a,
                next_sums: sums.to,
            };
            first += count;
            let next = if first < panels.end { weight.panel(first) } else { after };
            // SAFETY: the caller's contract. The second part continues where the first ends.
            unsafe {
                if steps > ahead {
                    micro(&args);
                }
                if ahead > 0 {
                    micro(&TileArgs {
                        a: args.a.add((steps - ahead) * STEP_K * 2),
                        b: b.add((steps - ahead) * STEP_BYTES),
                        steps: ahead,
                        accumulate: sums.accumulate || steps > ahead,
                        prefetch: next,
                        ..args
                    });
                }
            }
        }
    }

    /// Several tiles of rows: k-blocks.
    unsafe fn blocks(
        &self,
        weight: PanelsRef,
        panels: std::ops::Range<usize>,
        (tiles, height): (usize, usize),
        a: Rows,
        sums: Sums,
        after: *const u8,
    ) {
        let steps = weight.layout.padded_k() / STEP_K;
        let blocks = steps.div_ceil(self.tuning.block_steps);
        let groups = tiles.div_ceil(2);
        // Each group's share of the next block.
        let lines = STEP_LINES.div_ceil(groups);
        for block in 0..blocks {
            let (start, end) = (steps * block / blocks, steps * (block + 1) / blocks);
            let count = end - start;
            // The same rows of A in the next block, or in the first one of the next unit.
            let next_a = a.a.wrapping_add((end % steps) * STEP_K * 2);
            for panel in panels.clone() {
                let b = weight.panel(panel).wrapping_add(start * STEP_BYTES);
                let next = if panel + 1 < panels.end {
                    weight.panel(panel + 1).wrapping_add(start * STEP_BYTES)
                } else if block + 1 < blocks {
                    weight.panel(panels.start).wrapping_add(end * STEP_BYTES)
                } else {
                    after
                };
                let index = panel - panels.start;
                let (first, share) =
                    (index * tiles * height, index * PREFETCHED_ROWS % (2 * height));
                for group in 0..groups {
                    let row = 2 * group * height;
                    // SAFETY: the caller's contract.
                    unsafe {
                        let args = TileArgs {
                            a: a.a.add((row * a.a_stride + start * STEP_K) * 2),
                            a_stride: a.a_stride * 2,
                            b,
                            panel_stride: 0,
                            steps: count,
                            sums: sums.to.add((first + row) * NR),
                            sums_stride: height * SUMS_ROW,
                            height,
                            accumulate: sums.accumulate || block > 0,
                            prefetch: next.wrapping_add(group * count * lines * 64),
                            lines,
                            next_a: next_a.wrapping_add((row + share) * a.a_stride * 2),
                            // The sums of the next group, or of the next panel.
                            next_sums: sums.to.wrapping_add((first + row + 2 * height) * NR),
                        };
                        let micro = if 2 * group + 1 < tiles { self.pair } else { self.single };
                        micro(&args);
                    }
                }
            }
        }
    }
}
