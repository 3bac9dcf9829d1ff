//! u = x·Aᵀ, the first product of a low-rank addend.
//!
//! u has few columns, so that parts of k are units when there are few rows. Its sums are the same
//! for any number of rows: the parts are added in order.

use std::ops::Range;

use super::Pass;
use crate::cpu::kernels::Io;
use crate::cpu::low_rank::LowRank;
use crate::cpu::sweep::{Rows, Sums};
use crate::cpu::threads::SendPtr;

/// Values of k whose products are a part of the sums of u.
const PART_K: usize = 1024;
/// With fewer rows, the parts of u are units.
pub(super) const PART_ROWS: usize = 32;

impl<T: Io, Y: Send> Pass<'_, T, Y> {
    /// Some panels of u, or some rows of them.
    ///
    /// # Safety
    /// As [`Pass::unit`].
    pub(super) unsafe fn u(
        &self,
        stage: usize,
        pair: &LowRank,
        scratch: &SendPtr<u8>,
        own: *mut u8,
        unit: usize,
    ) {
        let (panels, rows) = self.low_rank[stage].unit(unit);
        let sweep = pair.a.sweep();
        let len = panels.len() * sweep.padded_rows(rows.len()) * sweep.nr;
        let sums = own.cast::<f32>();
        // SAFETY: as there; a thread's own piece has the sums and those of a part.
        unsafe {
            for (number, k) in parts(pair).enumerate() {
                let part = if number == 0 { sums } else { sums.add(len) };
                self.sums_of_u(
                    stage,
                    (pair, k),
                    scratch,
                    own,
                    (panels.clone(), rows.clone()),
                    part,
                );
                if number > 0 {
                    add(sums, part, len);
                }
            }
            self.write_u(stage, pair, scratch, own, (panels, rows), sums);
        }
    }

    /// A part of k of all u.
    ///
    /// # Safety
    /// As [`Pass::unit`].
    pub(super) unsafe fn part_of_u(
        &self,
        stage: usize,
        pair: &LowRank,
        scratch: &SendPtr<u8>,
        own: *mut u8,
        part: usize,
    ) {
        let all = (0..pair.a.weight.layout.count(), 0..self.x.rows);
        let k = part * PART_K..pair.a.weight.layout.k().min((part + 1) * PART_K);
        // SAFETY: as there; scratch has the parts.
        unsafe {
            let to = self.part(stage, scratch, part);
            self.sums_of_u(stage, (pair, k), scratch, own, all, to);
        }
    }

    /// u from its parts, for this thread.
    ///
    /// # Safety
    /// As [`Pass::unit`]; the parts are complete.
    pub(super) unsafe fn u_of_parts(
        &self,
        stage: usize,
        pair: &LowRank,
        scratch: &SendPtr<u8>,
        own: *mut u8,
    ) {
        let all = (0..pair.a.weight.layout.count(), 0..self.x.rows);
        let (sums, len) = (own.cast::<f32>(), self.strides[4 + stage]);
        // SAFETY: as there.
        unsafe {
            sums.copy_from_nonoverlapping(self.part(stage, scratch, 0), len);
            for (number, _) in parts(pair).enumerate().skip(1) {
                add(sums, self.part(stage, scratch, number), len);
            }
            self.write_u(stage, pair, scratch, own, all, sums);
        }
    }

    /// The sums of a part of u.
    ///
    /// # Safety
    /// `scratch` is this pass's.
    unsafe fn part(&self, stage: usize, scratch: &SendPtr<u8>, part: usize) -> *mut f32 {
        let bytes = part * self.strides[4 + stage] * size_of::<f32>();
        // SAFETY: the caller's contract.
        unsafe { scratch.at(self.offsets[4 + stage] + bytes).cast() }
    }

    /// The sums of some panels and rows of u over some k.
    ///
    /// # Safety
    /// As [`Pass::unit`]; `to` has room for them.
    unsafe fn sums_of_u(
        &self,
        stage: usize,
        (pair, k): (&LowRank, Range<usize>),
        scratch: &SendPtr<u8>,
        own: *mut u8,
        (panels, rows): (Range<usize>, Range<usize>),
        to: *mut f32,
    ) {
        let sweep = pair.a.sweep();
        // SAFETY: the caller's contract.
        unsafe {
            let x = self.rows(scratch, stage, rows);
            let x = Rows { a: x.a.add(k.start * sweep.a_bytes), ..x };
            let weight = pair.a.weight.view().part(k);
            let (rewritten, after) = (own.add(self.sums_bytes), self.first_byte(stage, 0));
            sweep.panels(weight, panels, x, Sums::new(to), rewritten, after);
        }
    }

    /// Sums -> u as A, with zeros behind it.
    ///
    /// # Safety
    /// As [`Pass::unit`]; the sums are those of these panels and rows.
    unsafe fn write_u(
        &self,
        stage: usize,
        LowRank { a, b }: &LowRank,
        scratch: &SendPtr<u8>,
        own: *mut u8,
        (panels, rows): (Range<usize>, Range<usize>),
        sums: *const f32,
    ) {
        let (sweep, padded_k) = (a.sweep(), b.weight.layout.padded_k());
        let panel_sums = sweep.padded_rows(rows.len()) * sweep.nr;
        // SAFETY: the caller's contract; u has room for the padded k in every row.
        unsafe {
            let u = self.u_rows(stage, scratch, own, rows.clone());
            for (i, panel) in panels.enumerate() {
                let first = panel * sweep.nr;
                let columns = sweep.nr.min(a.columns - first);
                let sums = a.sums(panel, rows.len(), sums.add(i * panel_sums));
                let to = u.a.cast_mut().add(first * sweep.a_bytes);
                self.edges.output_a(sums, to, u.a_stride, columns, sweep.a_bytes);
                if first + columns == a.columns {
                    for row in 0..rows.len() {
                        let end = row * u.a_stride + a.columns;
                        let zeros = (padded_k - a.columns) * sweep.a_bytes;
                        u.a.cast_mut().add(end * sweep.a_bytes).write_bytes(0, zeros);
                    }
                }
            }
        }
    }

    /// Rows of u. Each thread has its own u of few rows.
    ///
    /// # Safety
    /// As [`Pass::rows`]; `own` is this thread's.
    pub(super) unsafe fn u_rows(
        &self,
        stage: usize,
        scratch: &SendPtr<u8>,
        own: *mut u8,
        rows: Range<usize>,
    ) -> Rows {
        // SAFETY: the caller's contract; own has all rows, of which there are few.
        unsafe {
            if self.x.rows < PART_ROWS {
                let a_stride = self.strides[2 + stage];
                let first = rows.start * a_stride * self.a_bytes();
                return Rows { a: own.add(self.own_u + first), a_stride, rows: rows.len() };
            }
            self.rows(scratch, 2 + stage, rows)
        }
    }
}

/// The parts of k of a pair's u.
pub(super) fn parts(pair: &LowRank) -> impl Iterator<Item = Range<usize>> {
    let k = pair.a.weight.layout.k();
    (0..k).step_by(PART_K).map(move |start| start..k.min(start + PART_K))
}

/// to += from
///
/// # Safety
/// Both have `len` elements and do not overlap.
unsafe fn add(to: *mut f32, from: *const f32, len: usize) {
    for i in 0..len {
        // SAFETY: the caller's contract.
        unsafe { *to.add(i) += *from.add(i) };
    }
}
