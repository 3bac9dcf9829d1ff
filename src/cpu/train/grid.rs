//! How a product is divided into units of work: blocks of rows times groups of adjacent panels.

use std::ops::Range;

/// Row blocks are multiples of this, so that they begin with a whole step, round and tile.
pub(super) const ROWS: usize = 32;
/// The most rows of a unit: their sums stay in L2.
const MOST_ROWS: usize = 512;
/// Units that each thread is to get.
const UNITS: usize = 4;

#[derive(Clone, Copy)]
pub(super) struct Grid {
    rows: usize,
    row_block: usize,
    panels: usize,
    group: usize,
}

impl Grid {
    /// Groups of at most `group` panels. With little work for `threads` threads, groups and then
    /// row blocks are smaller.
    pub(super) fn new(rows: usize, panels: usize, group: usize, threads: usize) -> Self {
        let mut grid = Self { rows, row_block: rows.clamp(1, MOST_ROWS), panels, group };
        while grid.units() < UNITS * threads {
            if grid.group > 1 {
                grid.group /= 2;
            } else if grid.row_block > ROWS && threads > 1 {
                grid.row_block = (grid.row_block / 2).next_multiple_of(ROWS);
            } else {
                break;
            }
        }
        grid
    }

    /// The most panels of a unit.
    pub(super) fn group(&self) -> usize {
        self.group
    }

    /// The most rows of a unit.
    pub(super) fn row_block(&self) -> usize {
        self.row_block
    }

    fn groups(&self) -> usize {
        self.panels.div_ceil(self.group)
    }

    pub(super) fn units(&self) -> usize {
        self.rows.div_ceil(self.row_block) * self.groups()
    }

    /// The panels and the rows of a unit. Neighbours share their rows.
    pub(super) fn unit(&self, unit: usize) -> (Range<usize>, Range<usize>) {
        let (panel, row) =
            (unit % self.groups() * self.group, unit / self.groups() * self.row_block);
        (panel..self.panels.min(panel + self.group), row..self.rows.min(row + self.row_block))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_cover_everything_once() {
        for (rows, panels, group, threads) in
            [(1, 1, 8, 2), (512, 3, 4, 2), (513, 40, 8, 3), (8192, 64, 8, 64), (33, 2, 1, 16)]
        {
            let grid = Grid::new(rows, panels, group, threads);
            let mut seen = vec![0; rows * panels];
            for unit in 0..grid.units() {
                let (panels_of, rows_of) = grid.unit(unit);
                assert!(panels_of.len() <= grid.group() && rows_of.len() <= grid.row_block());
                assert!(rows_of.start.is_multiple_of(ROWS) || rows_of.start == 0);
                panels_of.for_each(|p| rows_of.clone().for_each(|r| seen[p * rows + r] += 1));
            }
            assert!(seen.iter().all(|&times| times == 1), "{rows} {panels} {group} {threads}");
        }
    }
}
