//! Each thread's scratch for the units of a chunk.

use super::arena::Arena;
use super::gemm::{Gemm, Own};
use super::grid::Grid;

/// What the units of some grids need at most.
#[derive(Clone, Copy, Default)]
pub(super) struct Needs {
    /// f32
    sums: usize,
    /// Panels that are packed at once.
    panels: usize,
    rows: usize,
}

impl Needs {
    /// Units of `grid` hold the sums of `products` products, and pack `panels` times their panels.
    pub(super) fn add<T: Copy>(
        &mut self,
        gemm: &Gemm<T>,
        grid: Grid,
        (products, panels): (usize, usize),
    ) {
        let sums = products * grid.group() * gemm.panel_sums(grid.row_block());
        self.sums = self.sums.max(sums);
        self.panels = self.panels.max(panels * grid.group());
        self.rows = self.rows.max(grid.row_block());
    }
}

/// Where the pieces of a thread's scratch begin.
#[derive(Clone, Copy)]
pub(super) struct OwnOffsets {
    sums: usize,
    packed: usize,
    unpacked: usize,
    rewritten: usize,
}

impl OwnOffsets {
    pub(super) fn new<T: Copy>(gemm: &Gemm<T>, needs: Needs, own: &mut Arena) -> Self {
        let packed = gemm.packed_bytes(needs.panels);
        Self {
            sums: own.piece(needs.sums * size_of::<f32>()),
            packed: own.piece(packed),
            unpacked: own.piece(packed),
            rewritten: own.piece(gemm.rewritten_bytes(needs.rows)),
        }
    }

    /// The pieces of a thread whose first byte is `own`.
    pub(super) fn at(&self, own: *mut u8) -> (*mut f32, Own) {
        let at = |offset| own.wrapping_add(offset);
        let (packed, unpacked) = (at(self.packed), at(self.unpacked));
        (at(self.sums).cast(), Own { packed, unpacked, rewritten: at(self.rewritten) })
    }
}
