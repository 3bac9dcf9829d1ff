//! Low-rank addends of packed projections (LoRA): (x·Aᵀ)·Bᵀ is added to the sums of x·Wᵀ.
//!
//! u = x·Aᵀ is a product of its own. u·Bᵀ is one more k-block of the projection: B has the panels
//! of W, with k = r. Gate and up have one addend, whose A has the rows of both pairs. B of gate is
//! zero at the k of up's pair and the other way round.

use super::format::Stored;
use super::kernels::Io;
use super::layer::matrix;
use super::panels::{Columns, PanelLayout, Panels};
use super::pass::PAD;
use super::projection::Projection;
use super::train::Operand;
use crate::error::Result;

/// A packed pair.
pub(crate) struct LowRank {
    /// A (r, k)
    pub(super) a: Projection,
    /// B (columns, r), with its scale.
    pub(super) b: Projection,
}

impl LowRank {
    /// The addend of `base`. `a` (r, k) and `b` (rows, r) are matrices of any layout in T; `b` has
    /// one matrix for the columns of the base, or one for each half of them.
    pub(super) fn new<T: Io + Stored>(
        base: &Projection,
        a: Operand,
        b: &[Operand],
    ) -> Result<Self> {
        let a = matrix::<T>(a.0, a.1)?;
        let kernels = base.kernels();
        let panels = |columns, k| Panels::zeroed(PanelLayout::new(&kernels.sweep, columns, k));
        let mut down = panels(a.rows, a.k);
        down.fill::<T>(Columns::All, a);
        let columns = base.weight.layout.count() * base.weight.layout.nr();
        let mut up = panels(columns, a.rows);
        let halves = [Columns::FirstHalf, Columns::SecondHalf];
        let places = if b.len() == 1 { &[Columns::All][..] } else { &halves[..] };
        for (place, (storage, layout)) in places.iter().zip(b) {
            up.fill::<T>(*place, matrix(storage, layout)?);
        }
        Ok(Self {
            a: Projection::from_panels(kernels, down, a.rows),
            b: Projection::from_panels(kernels, up, base.columns),
        })
    }

    /// f32 of the sums of all u of these rows.
    pub(super) fn part_len(&self, rows: usize) -> usize {
        let sweep = self.a.sweep();
        self.a.weight.layout.count() * sweep.padded_rows(rows) * sweep.nr
    }

    /// Elements from one row of u to the next.
    pub(super) fn u_stride(&self) -> usize {
        self.b.weight.layout.padded_k() + PAD
    }
}
