//! How a product is divided into units of work: panels of weights times rows of x.

use std::ops::Range;

/// With fewer rows in a unit, reading its panel shows adjacent multiplying.
const BLOCK_ROWS: usize = 96;
/// Panels with fewer rows are never split, even if threads then idle.
const PART_ROWS: usize = 4;
/// Adjacent panels form one unit if each thread still gets this many units.
const UNITS_ADJACENT: usize = 4;

/// The share of the time that idle threads may lose before panels are split.
const TOLERATED_LOSS: f64 = 0.01;

/// The units of one product. A unit is one panel, or a few adjacent ones, with all rows. If that
/// leaves threads idle in the last round, the panels of that round are split by rows, one part for
/// each thread; or all panels are.
#[derive(Clone, Copy)]
pub(super) struct Partition {
    rows: usize,
    panels: usize,
    /// Panels of a unit.
    adjacent: usize,
    /// Parts of each panel before `last`, and of the panels from there on (`parts`).
    blocks: usize,
    last: usize,
    parts: usize,
}

impl Partition {
    /// `adjacent`: how many panels the kernel multiplies at once with this many rows, or, if that
    /// is more than 2, at most.
    pub(super) fn new(rows: usize, panels: usize, threads: usize, adjacent: usize) -> Self {
        let whole = Self { rows, panels, adjacent: 1, blocks: 1, last: panels, parts: 1 };
        // Fewer panels at once if that leaves threads without work, or busy for unequal times.
        let mut adjacent = adjacent;
        while adjacent > 1 {
            let rounds = panels.div_ceil(adjacent).div_ceil(threads);
            let even = rounds * adjacent * threads <= panels + panels / 20;
            if panels >= UNITS_ADJACENT * threads * adjacent && (adjacent == 2 || even) {
                return Self { adjacent, ..whole };
            }
            adjacent /= 2;
        }
        // The time of all panels in units of one panel, if they divide evenly, and what may be
        // lost.
        let even = (1.0 + TOLERATED_LOSS) * panels as f64 / threads as f64;
        let time = |blocks: usize| (panels * blocks).div_ceil(threads) as f64 / blocks as f64;
        let most = (rows / BLOCK_ROWS).clamp(1, threads);
        let enough = (1..=most).find(|&blocks| time(blocks) <= even);
        let blocks =
            enough.or_else(|| (1..=most).min_by(|&a, &b| time(a).total_cmp(&time(b)))).unwrap_or(1);
        let rest = panels % threads;
        let parts = (threads / rest.max(1)).min(rows / PART_ROWS);
        let with_parts = (panels / threads) as f64 + 1.0 / parts as f64;
        if time(1) > even && parts > 1 && with_parts <= time(blocks) {
            Self { last: panels - rest, parts, ..whole }
        } else {
            Self { blocks, ..whole }
        }
    }

    /// The largest number of panels in a unit.
    pub(super) fn adjacent(&self) -> usize {
        self.adjacent
    }

    fn whole_units(&self) -> usize {
        self.last.div_ceil(self.adjacent) * self.blocks
    }

    pub(super) fn units(&self) -> usize {
        self.whole_units() + (self.panels - self.last) * self.parts
    }

    /// The panels and the rows of a unit.
    pub(super) fn unit(&self, unit: usize) -> (Range<usize>, Range<usize>) {
        let whole = self.whole_units();
        let (first, end, block, blocks) = if unit < whole {
            (unit / self.blocks * self.adjacent, self.last, unit % self.blocks, self.blocks)
        } else {
            let part = unit - whole;
            (self.last + part / self.parts, self.panels, part % self.parts, self.parts)
        };
        (
            first..end.min(first + self.adjacent),
            self.rows * block / blocks..self.rows * (block + 1) / blocks,
        )
    }
}
