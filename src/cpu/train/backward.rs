//! The gradients of the block.
//!
//! ```text
//! dh = m·dy·Wd     (dgate, dup) = the gate's gradients under dh     dx = dgate·Wg + dup·Wu
//! dWg = dgateᵀ·x   dWu = dupᵀ·x   dWd = m·dyᵀ·h   biases: the column sums of dgate, dup, m·dy
//! ```
//!
//! Rows are processed in chunks, each in three phases:
//!
//! 1. x and dy become A, dy also its transpose, x also panels (`intake.rs`).
//! 2. A unit multiplies some panels of gate and up again, or reads what was saved, and the same
//!    channels of dh. While all three are in cache it computes h, dgate and dup. It writes h as
//!    panels, and dgate and dup as A and transposed.
//! 3. dx, the gradients of the weights and of the biases. Sums over several chunks stay in f32.

use std::ops::Range;

use super::arena::{Arena, Memory};
use super::block::{Block, SavedGateUp};
use super::chunks;
use super::column_sums::ColumnSums;
use super::gemm::{A, B, Own};
use super::grid::Grid;
use super::intake::{Intake, Transposed};
use super::pack::PackArgs;
use super::products::{ChunkOperands, RowProduct, Target, WeightGradient};
use crate::cpu::epilogue::{GateGradients, GateUp, PanelSums};
use crate::cpu::kernels::Io;
use crate::cpu::matrix::Matrix;
use crate::cpu::panels::PanelLayout;
use crate::cpu::sweep::Sums;
use crate::cpu::threads::{self, Phase};
use crate::which::Which;

/// Where gradients are written, and which are computed at all.
pub(super) struct BlockTargets<T> {
    /// (M,H)
    pub(super) x: Option<Target<T>>,
    /// gate and up (I,H), down (H,I)
    pub(super) weights: [Option<Target<T>>; 3],
    /// Whether the biases have one.
    pub(super) biases: [bool; 3],
}

impl<T: Io> Block<'_, T> {
    /// Writes the gradients under dy (M,H), and returns those of the biases.
    pub(super) fn backward(
        &self,
        x: Matrix<T>,
        dy: Matrix<T>,
        saved: Option<&SavedGateUp<T>>,
        targets: &BlockTargets<T>,
    ) -> [Option<Vec<f32>>; 3] {
        [&x, &dy].into_iter().for_each(Matrix::check);
        let (h, i) = (self.hidden_size(), self.intermediate_size());
        let (threads, count) = (self.threads(x.rows), chunks(x.rows).count());
        let gradient = |which: Which, shape, factor| {
            let target = targets.weights[which as usize]?;
            Some(WeightGradient::new(self.gemm, shape, factor, target, (threads, count)))
        };
        let gradients = [
            gradient(Which::Gate, (i, h), 1.0),
            gradient(Which::Up, (i, h), 1.0),
            gradient(Which::Down, (h, i), self.down_multiplier),
        ];
        let sums = |biased: bool, columns, factor| biased.then(|| ColumnSums::new(columns, factor));
        let [gate, up, down] = targets.biases;
        let biases =
            [sums(gate, i, 1.0), sums(up, i, 1.0), sums(down, h, f64::from(self.down_multiplier))];
        let gate_up_bias = self.gate_up_bias();
        for (number, rows) in chunks(x.rows).enumerate() {
            let chunk = Chunk {
                x: x.rows(rows.clone()),
                dy: dy.rows(rows.clone()),
                dx: targets.x.map(|dx| dx.row(rows.start)),
                saved: saved.map(|saved| {
                    let from = rows.start * self.saved_stride();
                    [&saved.gate[from..], &saved.up[from..]]
                }),
                is_first: number == 0,
                is_last: number + 1 == count,
            };
            Backward::new(self, chunk, &gradients, &gate_up_bias, threads).run(&biases);
        }
        biases.map(|sums| sums.map(ColumnSums::into_values))
    }
}

/// The rows of one chunk.
struct Chunk<'a, T> {
    x: Matrix<'a, T>,
    dy: Matrix<'a, T>,
    dx: Option<Target<T>>,
    /// Rows of gate and of up.
    saved: Option<[&'a [T]; 2]>,
    is_first: bool,
    is_last: bool,
}

/// The backward pass of one chunk.
struct Backward<'a, T: 'static> {
    block: &'a Block<'a, T>,
    threads: usize,
    memory: Memory,
    own: OwnOffsets,
    saved: Option<[&'a [T]; 2]>,
    gate_up_bias: *const f32,
    gradients: &'a [Option<WeightGradient<T>>; 3],
    intakes: [Intake<'a, T>; 2],
    /// Channels of dh.
    gate: Grid,
    /// dgate and dup as A, if anything reads them.
    dgate_up: [A; 2],
    /// Their transposes, if the weights have gradients.
    transposed: [Option<Transposed>; 2],
    /// h (rows, I) as B, if down has a gradient.
    h: Option<(PanelLayout, *mut u8)>,
    dx: Option<RowProduct<'a, T>>,
    is_first: bool,
    is_last: bool,
}

/// The units of one chunk.
struct Phases {
    intakes: [Phase; 2],
    gate: Phase,
    dx: Phase,
    weights: [Phase; 3],
    biases: [Phase; 3],
}

/// Offsets into a thread's scratch.
struct OwnOffsets {
    sums: usize,
    packed: usize,
    rewritten: usize,
    /// h of a unit (rows, channels), in rows of `h_stride` elements.
    h: usize,
    h_stride: usize,
}

// SAFETY: units write disjoint parts.
unsafe impl<T: Io> Sync for Backward<'_, T> {}

impl<'a, T: Io> Backward<'a, T> {
    fn new(
        block: &'a Block<'a, T>,
        chunk: Chunk<'a, T>,
        gradients: &'a [Option<WeightGradient<T>>; 3],
        gate_up_bias: &'a Option<Vec<f32>>,
        threads: usize,
    ) -> Self {
        let (gemm, rows) = (block.gemm, chunk.x.rows);
        let (h, i) = (block.hidden_size(), block.intermediate_size());
        let [gate_gradient, up_gradient, down_gradient] = gradients;
        let has_gate_up = gate_gradient.is_some() || up_gradient.is_some();

        // Shared pieces. The rows of the chunk are k of the weights' gradients.
        let mut shared = Arena::default();
        let by_rows = |columns: usize| gemm.layout(columns, rows);
        let padded_rows = by_rows(1).padded_k();
        let transposed_stride = padded_rows + crate::cpu::pass::PAD;
        let mut a = |rows: usize, stride: usize| {
            let bytes = (rows + gemm.sweep.row_padding()) * stride * gemm.a_bytes();
            (shared.piece(bytes), stride)
        };
        let (x_stride, h_stride) = (block.x_stride(), block.h_stride());
        let x_a = chunk.saved.is_none().then(|| a(rows, x_stride));
        let dy_a = a(rows, x_stride);
        let dy_transposed = down_gradient.as_ref().map(|_| a(h, transposed_stride));
        let dgate_up = [0, 1].map(|_| a(rows, h_stride));
        let transposed = [gate_gradient, up_gradient]
            .map(|gradient| gradient.as_ref().map(|_| a(i, transposed_stride)));
        let x_b = has_gate_up.then(|| shared.piece(by_rows(h).bytes()));
        let h_b = down_gradient.as_ref().map(|_| shared.piece(by_rows(i).bytes()));

        // Each thread's pieces.
        let group = (gemm.sweep.panels_at_once(rows, usize::MAX) / 2).max(1);
        let gate = Grid::new(rows, i.div_ceil(gemm.nr()), group, threads);
        let dx_grid = RowProduct::grid(&gemm, rows, h, threads);
        let mut sums = 3 * gate.group() * gemm.panel_sums(gate.row_block());
        let mut most_rows = rows;
        let weight_grids = gradients.iter().flatten().map(WeightGradient::grid);
        for grid in weight_grids.chain([dx_grid]) {
            sums = sums.max(grid.group() * gemm.panel_sums(grid.row_block()));
            most_rows = most_rows.max(grid.row_block());
        }
        let mut own = Arena::default();
        let unit_stride = gate.group() * gemm.nr();
        let own_offsets = OwnOffsets {
            sums: own.piece(sums * size_of::<f32>()),
            packed: own.piece(gemm.packed_bytes((2 * gate.group()).max(dx_grid.group()))),
            rewritten: own.piece(gemm.rewritten_bytes(most_rows)),
            h: own.piece(gate.row_block() * unit_stride * gemm.a_bytes()),
            h_stride: unit_stride,
        };
        let memory = Memory::new(shared, &own, threads);

        let at = |(offset, stride)| A { data: memory.at(offset), stride };
        let turned = |piece| Transposed { to: at(piece), rows, padded_rows };
        let padded_k = gemm.layout(1, h).padded_k();
        let intakes = [
            Intake {
                gemm,
                from: chunk.x,
                a: x_a.map(|piece| (at(piece), padded_k)),
                transposed: None,
                b: x_b.map(|offset| (by_rows(h), memory.at(offset))),
            },
            Intake {
                gemm,
                from: chunk.dy,
                a: Some((at(dy_a), padded_k)),
                transposed: dy_transposed.map(turned),
                b: None,
            },
        ];
        let dgate_up = dgate_up.map(at);
        let [gate_weight, up_weight, _] =
            block.weights.map(|weight| B::Matrix(weight.transposed()));
        let dx = chunk.dx.map(|y| RowProduct {
            gemm,
            terms: vec![(dgate_up[0], gate_weight), (dgate_up[1], up_weight)],
            bias: std::ptr::null(),
            factor: 1.0,
            y,
            columns: h,
            grid: dx_grid,
        });
        Self {
            block,
            threads,
            own: own_offsets,
            saved: chunk.saved,
            gate_up_bias: gate_up_bias.as_ref().map_or(std::ptr::null(), |bias| bias.as_ptr()),
            gradients,
            intakes,
            gate,
            dgate_up,
            transposed: transposed.map(|piece| piece.map(turned)),
            h: h_b.map(|offset| (by_rows(i), memory.at(offset))),
            dx,
            is_first: chunk.is_first,
            is_last: chunk.is_last,
            memory,
        }
    }

    fn run(self, biases: &[Option<ColumnSums>; 3]) {
        let units = |g: &Option<WeightGradient<T>>| g.as_ref().map_or(0, |g| g.grid().units());
        let columns = |sums: &Option<ColumnSums>| sums.as_ref().map_or(0, ColumnSums::units);
        let phases = Phases {
            intakes: self.intakes.each_ref().map(Intake::phase),
            gate: Phase::new(self.gate.units()),
            dx: Phase::new(self.dx.as_ref().map_or(0, |dx| dx.grid.units())),
            weights: self.gradients.each_ref().map(|gradient| Phase::new(units(gradient))),
            biases: biases.each_ref().map(|sums| Phase::new(columns(sums))),
        };
        threads::run_on(self.threads, |thread| self.work(thread, &phases, biases));
    }

    /// What a thread does.
    fn work(&self, thread: usize, phases: &Phases, biases: &[Option<ColumnSums>; 3]) {
        let own = self.memory.own(thread);
        let sums = own.wrapping_add(self.own.sums).cast::<f32>();
        let h = own.wrapping_add(self.own.h);
        let own = Own {
            packed: own.wrapping_add(self.own.packed),
            rewritten: own.wrapping_add(self.own.rewritten),
        };
        // SAFETY: units of a phase write disjoint parts, a phase begins when the ones that it reads
        // are done, and each thread has scratch of its own.
        unsafe {
            for (intake, phase) in self.intakes.iter().zip(&phases.intakes) {
                phase.work(|unit, _| intake.unit(unit));
            }
            phases.intakes.iter().for_each(Phase::wait);
            phases.gate.work(|unit, _| self.gate_unit(unit, sums, h, own));
            phases.gate.wait();
            if let Some(dx) = &self.dx {
                phases.dx.work(|unit, _| dx.unit(unit, sums, own));
            }
            for which in Which::ALL {
                let gradient = self.gradients[which as usize].as_ref();
                if let (Some(gradient), Some(operands)) = (gradient, self.operands(which)) {
                    let phase = &phases.weights[which as usize];
                    phase.work(|unit, _| gradient.unit(unit, operands, sums, own));
                }
            }
            let (rows, [dgate, dup]) = (self.intakes[0].from.rows, self.dgate_up);
            let a_bytes = self.block.gemm.a_bytes();
            for ((sums, phase), a) in biases.iter().zip(&phases.biases).zip([dgate, dup, self.dy()])
            {
                if let Some(sums) = sums {
                    phase.work(|unit, _| sums.unit(unit, a, a_bytes, rows));
                }
            }
        }
    }

    /// dy as A.
    fn dy(&self) -> A {
        self.intakes[1].a.map_or(A { data: std::ptr::null_mut(), stride: 0 }, |(a, _)| a)
    }

    /// The operands of a weight's gradient.
    fn operands(&self, which: Which) -> Option<ChunkOperands> {
        let transposed = match which {
            Which::Gate | Which::Up => self.transposed[which as usize]?,
            Which::Down => self.intakes[1].transposed?,
        };
        let (layout, b) = if which == Which::Down { self.h? } else { self.intakes[0].b? };
        let (is_first, is_last) = (self.is_first, self.is_last);
        Some(ChunkOperands { a: transposed.to, b: (layout, b.cast_const()), is_first, is_last })
    }

    /// Some channels of gate, up and dh -> h, dgate and dup.
    ///
    /// # Safety
    /// As [`RowProduct::unit`]; `h` is this thread's.
    unsafe fn gate_unit(&self, unit: usize, sums: *mut f32, h: *mut u8, own: Own) {
        let (block, gemm) = (self.block, self.block.gemm);
        let (panels, rows) = self.gate.unit(unit);
        let (nr, panel_sums) = (gemm.nr(), gemm.panel_sums(rows.len()));
        let dh = sums.wrapping_add(2 * panels.len() * panel_sums);
        let h = A { data: h, stride: self.own.h_stride };
        let down = B::Matrix(block.weights[Which::Down as usize].transposed());
        // SAFETY: the caller's contract.
        unsafe {
            if self.saved.is_none() {
                self.gate_up(&panels, rows.clone(), sums, own);
            }
            gemm.add(self.dy(), &down, (panels.clone(), rows.clone()), Sums::new(dh), own);
            for (i, panel) in panels.clone().enumerate() {
                let [dgate, dup] = self.dgate_up;
                let to = |a: A| (a.at(gemm.a_bytes(), rows.start, panel * nr), a.stride);
                (gemm.edges.gate_gradients)(&GateGradients {
                    op: &block.glu,
                    gate_up: self.inputs(panel, i, &rows, sums),
                    dh: self.panel_sums(dh, i, rows.len(), std::ptr::null()),
                    factor: block.down_multiplier,
                    outputs: [(h.at(gemm.a_bytes(), 0, i * nr), h.stride), to(dgate), to(dup)],
                });
            }
            self.finish(panels, rows, h);
        }
    }

    /// gate and up again.
    unsafe fn gate_up(&self, panels: &Range<usize>, rows: Range<usize>, sums: *mut f32, own: Own) {
        let (block, gemm) = (self.block, self.block.gemm);
        let Some((x, _)) = self.intakes[0].a else { return };
        let pairs = 2 * panels.start..block.gate_up_panels().min(2 * panels.end);
        // SAFETY: the caller's contract. The last panel of dh may be half empty.
        unsafe {
            let panel_sums = gemm.panel_sums(rows.len());
            let missing = 2 * panels.len() - pairs.len();
            sums.add(pairs.len() * panel_sums).write_bytes(0, missing * panel_sums);
            gemm.add(x, &block.gate_up(), (pairs, rows), Sums::new(sums), own);
        }
    }

    /// Gate and up of panel `panel` of dh, which is number `i` of its unit.
    unsafe fn inputs(
        &self,
        panel: usize,
        i: usize,
        rows: &Range<usize>,
        sums: *mut f32,
    ) -> GateUp<T> {
        let nr = self.block.gemm.nr();
        if let Some([gate, up]) = self.saved {
            let stride = self.block.saved_stride();
            let at = rows.start * stride + panel * nr;
            return GateUp::Rows { gate: gate[at..].as_ptr(), up: up[at..].as_ptr(), stride };
        }
        let side = |side: usize| {
            let pair = 2 * panel + side;
            let bias = match self.gate_up_bias {
                bias if bias.is_null() || pair >= self.block.gate_up_panels() => std::ptr::null(),
                // SAFETY: the bias is as wide as all panels.
                bias => unsafe { bias.add(pair * nr) },
            };
            self.panel_sums(sums, 2 * i + side, rows.len(), bias)
        };
        GateUp::Sums([side(0), side(1)])
    }

    fn panel_sums(&self, sums: *mut f32, i: usize, rows: usize, bias: *const f32) -> PanelSums {
        let sums = sums.wrapping_add(i * self.block.gemm.panel_sums(rows));
        PanelSums { sums, rows, bias }
    }

    /// What the weights' gradients read: transposes and panels.
    unsafe fn finish(&self, panels: Range<usize>, rows: Range<usize>, h: A) {
        let (block, gemm) = (self.block, self.block.gemm);
        let (nr, i) = (gemm.nr(), block.intermediate_size());
        let channels = panels.start * nr..i.min(panels.end * nr);
        // SAFETY: the caller's contract.
        unsafe {
            for (a, transposed) in self.dgate_up.into_iter().zip(self.transposed) {
                if let Some(transposed) = transposed {
                    transposed.write(gemm.a_bytes(), a, rows.clone(), channels.clone());
                }
                if channels.end == i {
                    block.pad_h(a, rows.clone());
                }
            }
            let Some((layout, to)) = self.h else { return };
            for (number, panel) in panels.enumerate() {
                let to = to.add(panel * layout.panel_stride());
                (gemm.edges.pack_a)(&PackArgs {
                    from: h.at(gemm.a_bytes(), 0, number * nr).cast_const(),
                    strides: (h.stride, 1),
                    k: rows.len(),
                    columns: nr,
                    to: to.add(layout.step_offset(rows.start / layout.k_step())),
                    layout,
                });
                if rows.end == layout.k() {
                    layout.zero_beyond_k(to);
                }
            }
        }
    }
}
