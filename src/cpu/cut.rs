//! How a product is cut into units of work: panels of weights times rows of x.

use std::ops::Range;

/// With fewer rows in a unit, reading its panel shows beside multiplying.
const BLOCK_ROWS: usize = 96;
/// With fewer rows a panel is left whole, whatever waits.
const PART_ROWS: usize = 4;
/// Panels go side by side where so many units of them remain for each thread.
const UNITS_BESIDE: usize = 4;

/// Every panel with all rows is a unit, or a few panels side by side. Where that leaves threads without work in the last round, the
/// panels of that round are cut by rows, one part for each thread, or all panels are.
#[derive(Clone, Copy)]
pub(super) struct Cut {
    rows: usize,
    panels: usize,
    /// Panels of a unit.
    beside: usize,
    /// Row blocks of each panel before `last`, and from there on.
    blocks: usize,
    last: usize,
    parts: usize,
}

impl Cut {
    /// `beside`: as many panels as the kernel takes at once for so few rows.
    pub(super) fn new(rows: usize, panels: usize, threads: usize, beside: usize) -> Self {
        let whole = Self { rows, panels, beside: 1, blocks: 1, last: panels, parts: 1 };
        if beside > 1 && panels >= UNITS_BESIDE * threads * beside {
            return Self { beside, ..whole };
        }
        // The time that all panels take, in times of a whole one.
        let even = 1.01 * panels as f64 / threads as f64;
        let time = |blocks: usize| (panels * blocks).div_ceil(threads) as f64 / blocks as f64;
        let most = (rows / BLOCK_ROWS).clamp(1, threads);
        let enough = (1..=most).find(|&blocks| time(blocks) <= even);
        let blocks = enough.or_else(|| (1..=most).min_by(|&a, &b| time(a).total_cmp(&time(b)))).unwrap_or(1);
        let rest = panels % threads;
        let parts = (threads / rest.max(1)).min(rows / PART_ROWS);
        let with_parts = (panels / threads) as f64 + 1.0 / parts as f64;
        if time(1) > even && parts > 1 && with_parts <= time(blocks) {
            Self { last: panels - rest, parts, ..whole }
        } else {
            Self { blocks, ..whole }
        }
    }

    /// Panels of a unit at most.
    pub(super) fn beside(&self) -> usize {
        self.beside
    }

    fn whole_units(&self) -> usize {
        self.last.div_ceil(self.beside) * self.blocks
    }

    pub(super) fn units(&self) -> usize {
        self.whole_units() + (self.panels - self.last) * self.parts
    }

    /// The panels and the rows of a unit.
    pub(super) fn unit(&self, unit: usize) -> (Range<usize>, Range<usize>) {
        let whole = self.whole_units();
        let (first, end, block, blocks) = if unit < whole {
            (unit / self.blocks * self.beside, self.last, unit % self.blocks, self.blocks)
        } else {
            let part = unit - whole;
            (self.last + part / self.parts, self.panels, part % self.parts, self.parts)
        };
        (first..end.min(first + self.beside), self.rows * block / blocks..self.rows * (block + 1) / blocks)
    }
}
