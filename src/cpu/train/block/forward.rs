//! The forward pass of one chunk of rows.

use std::ops::Range;

use super::Block;
use crate::cpu::epilogue::PanelSums;
use crate::cpu::kernels::Io;
use crate::cpu::matrix::Matrix;
use crate::cpu::sweep::Sums;
use crate::cpu::threads::{self, Phase};
use crate::cpu::train::arena::{Arena, Memory};
use crate::cpu::train::gemm::{A, B, Own};
use crate::cpu::train::grid::Grid;
use crate::cpu::train::intake::Intake;
use crate::cpu::train::low_rank::{LowRank, Mask};
use crate::cpu::train::products::{RowProduct, Rows, Target};
use crate::cpu::train::scratch::{Needs, OwnOffsets};

/// The rows of one chunk.
pub(super) struct Chunk<'a, T> {
    pub(super) x: Matrix<'a, T>,
    pub(super) first_row: usize,
    /// Rows of gate and of up.
    pub(super) saved: Option<[Target<T>; 2]>,
    /// Rows of u of each addend.
    pub(super) u: [Option<A>; 2],
    pub(super) y: Target<T>,
}

/// The forward pass of one chunk.
pub(super) struct Forward<'a, T: 'static> {
    block: &'a Block<'a, T>,
    threads: usize,
    memory: Memory,
    own: OwnOffsets,
    intake: Intake<'a, T>,
    /// x with dropped elements, if there is a dropout.
    dropped_x: Option<Intake<'a, T>>,
    h: A,
    /// h with dropped elements.
    dropped_h: Option<(A, Mask)>,
    gate: Grid,
    gate_up_bias: *const f32,
    saved: Option<[Target<T>; 2]>,
    /// u of each addend.
    u: [Option<RowProduct<'a, T>>; 2],
    /// u of gate and up.
    gate_up_u: Option<(A, B<'a, T>)>,
    down: RowProduct<'a, T>,
}

// SAFETY: the biases are read only, and units write disjoint parts.
unsafe impl<T: Io> Sync for Forward<'_, T> {}

impl<'a, T: Io> Forward<'a, T> {
    pub(super) fn new(
        block: &'a Block<'a, T>,
        chunk: Chunk<'a, T>,
        [gate_up_bias, down_bias]: &'a [Option<Vec<f32>>; 2],
    ) -> Self {
        let (gemm, rows, threads) = (block.gemm, chunk.x.rows, block.threads(chunk.x.rows));
        let [gate_up_addend, down_addend] = &block.low_rank;
        let mask = |addend: &Option<LowRank<T>>| addend.as_ref()?.mask(chunk.first_row);
        let [x_mask, h_mask] = [mask(gate_up_addend), mask(down_addend)];
        let bytes = |stride: usize| (rows + gemm.sweep.row_padding()) * stride * gemm.a_bytes();
        let mut shared = Arena::default();
        let mut piece = |stride| (shared.piece(bytes(stride)), stride);
        let (xa, h) = (piece(block.x_stride()), piece(block.h_stride()));
        let dropped_x = x_mask.map(|mask| (piece(block.x_stride()), mask));
        let dropped_h = h_mask.map(|mask| (piece(block.h_stride()), mask));
        let gate = RowProduct::grid(&gemm, rows, block.gate_up_panels() * gemm.nr(), threads);
        let down = RowProduct::grid(&gemm, rows, block.hidden_size(), threads);
        let rank_grid = |addend: &LowRank<T>| RowProduct::grid(&gemm, rows, addend.rank(), threads);
        let rank_grids = block.low_rank.each_ref().map(|addend| addend.as_ref().map(rank_grid));
        let mut needs = Needs::default();
        for grid in [gate, down].into_iter().chain(rank_grids.into_iter().flatten()) {
            needs.add(&gemm, grid, (1, 1));
        }
        let mut own = Arena::default();
        let own_offsets = OwnOffsets::new(&gemm, needs, &mut own);
        let memory = Memory::new(shared, &own, threads);

        let a = |(offset, stride)| A { data: memory.at(offset), stride };
        let (xa, h) = (a(xa), a(h));
        let bias = |bias: &Option<Vec<f32>>| bias.as_ref().map_or(std::ptr::null(), |b| b.as_ptr());
        let padded_k = gemm.layout(1, block.hidden_size()).padded_k();
        let intake =
            |a, mask| Intake { a: Some((a, padded_k)), mask, ..Intake::new(gemm, chunk.x) };
        let dropped_x = dropped_x.map(|(piece, mask)| (a(piece), mask));
        let dropped_h = dropped_h.map(|(piece, mask)| (a(piece), mask));
        let inputs = [dropped_x.map_or(xa, |(a, _)| a), dropped_h.map_or(h, |(a, _)| a)];
        let u = [0, 1].map(|i| {
            let (addend, u) = (block.low_rank[i].as_ref()?, chunk.u[i]?);
            Some(RowProduct {
                gemm,
                terms: vec![(inputs[i], addend.down())],
                mask: None,
                bias: std::ptr::null(),
                factor: 1.0,
                y: Rows::of_a(u, gemm.a_bytes()),
                transposed: None,
                columns: addend.rank(),
                grid: rank_grids[i]?,
            })
        });
        let addend = |i: usize| Some((chunk.u[i]?, block.low_rank[i].as_ref()?.up()));
        Self {
            block,
            threads,
            own: own_offsets,
            intake: intake(xa, None),
            dropped_x: dropped_x.map(|(a, mask)| intake(a, Some(mask))),
            h,
            dropped_h,
            gate,
            gate_up_bias: bias(gate_up_bias),
            saved: chunk.saved,
            u,
            gate_up_u: addend(0),
            down: RowProduct {
                gemm,
                terms: [(h, block.down())].into_iter().chain(addend(1)).collect(),
                mask: None,
                bias: bias(down_bias),
                factor: block.down_multiplier,
                y: Rows::Io(chunk.y),
                transposed: None,
                columns: block.hidden_size(),
                grid: down,
            },
            memory,
        }
    }

    pub(super) fn run(self) {
        let u = |u: &Option<RowProduct<T>>| Phase::new(u.as_ref().map_or(0, |u| u.grid.units()));
        let phases = Phases {
            intake: self.intake.phase(),
            dropped_x: self.dropped_x.as_ref().map_or_else(|| Phase::new(0), Intake::phase),
            u: self.u.each_ref().map(u),
            gate: Phase::new(self.gate.units()),
            down: Phase::new(self.down.grid.units()),
        };
        threads::run_on(self.threads, |thread| self.work(thread, &phases));
    }

    /// What a thread does.
    fn work(&self, thread: usize, phases: &Phases) {
        let (sums, own) = self.own.at(self.memory.own(thread));
        let u = |which: usize| {
            if let Some(u) = &self.u[which] {
                // SAFETY: as below.
                phases.u[which].work(|unit, _| unsafe { u.unit(unit, sums, own) });
                phases.u[which].wait();
            }
        };
        // SAFETY: units of a phase write disjoint parts, a phase begins when the one it reads is
        // done, and each thread has scratch of its own.
        unsafe {
            phases.intake.work(|unit, _| self.intake.unit(unit));
            if let Some(dropped_x) = &self.dropped_x {
                phases.dropped_x.work(|unit, _| dropped_x.unit(unit));
                phases.dropped_x.wait();
            }
            phases.intake.wait();
            u(0);
            phases.gate.work(|unit, _| self.gate_unit(unit, sums, own));
            phases.gate.wait();
            u(1);
            phases.down.work(|unit, _| self.down.unit(unit, sums, own));
        }
    }

    /// Some panels of gate and up -> h, and gate and up themselves if they are saved.
    ///
    /// # Safety
    /// As [`RowProduct::unit`].
    unsafe fn gate_unit(&self, unit: usize, sums: *mut f32, own: Own) {
        let (block, gemm) = (self.block, self.block.gemm);
        let (panels, rows) = self.gate.unit(unit);
        let Some((x, _)) = self.intake.a else { return };
        // SAFETY: the caller's contract.
        unsafe {
            let part = (panels.clone(), rows.clone());
            gemm.add(x, &block.gate_up(), part.clone(), Sums::new(sums), own);
            if let Some((u, b)) = &self.gate_up_u {
                gemm.add(*u, b, part, Sums { to: sums, accumulate: true }, own);
            }
            for (i, panel) in panels.enumerate() {
                let bias = match self.gate_up_bias {
                    bias if bias.is_null() => bias,
                    bias => bias.add(panel * gemm.nr()),
                };
                let sums = sums.add(i * gemm.panel_sums(rows.len()));
                self.gate_panel(panel, rows.clone(), PanelSums { sums, rows: rows.len(), bias });
            }
        }
    }

    /// One panel of gate and up.
    unsafe fn gate_panel(&self, panel: usize, rows: Range<usize>, sums: PanelSums) {
        let (block, gemm) = (self.block, self.block.gemm);
        let (half, a_bytes) = (gemm.nr() / 2, gemm.a_bytes());
        let is_last = panel + 1 == block.gate_up_panels();
        // SAFETY: the caller's contract.
        unsafe {
            let to = self.h.at(a_bytes, rows.start, panel * half);
            (gemm.edges.gate)(&block.glu, sums, to, self.h.stride);
            for (side, target) in self.saved.iter().flatten().enumerate() {
                let target = target.row(rows.start);
                let (to, side) = (target.to.add(panel * half), sums.skip_columns(side * half));
                (gemm.edges.output)(side, 1.0, to, target.stride, half);
            }
            if is_last {
                block.pad_h(self.h, rows.clone());
            }
            let Some((dropped, mask)) = self.dropped_h else { return };
            for row in rows.clone() {
                let at = |a: A| a.at(a_bytes, row, panel * half);
                at(dropped).copy_from_nonoverlapping(at(self.h), half * a_bytes);
            }
            let at = dropped.at(a_bytes, rows.start, panel * half);
            let columns = panel * half..(panel + 1) * half;
            mask.apply_to_a(a_bytes, rows.clone(), columns, at, dropped.stride);
            if is_last {
                block.pad_h(dropped, rows);
            }
        }
    }
}

/// The units of one chunk.
struct Phases {
    intake: Phase,
    dropped_x: Phase,
    u: [Phase; 2],
    gate: Phase,
    down: Phase,
}
