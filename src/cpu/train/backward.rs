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
//!
//! The addend of down adds a product to dh before phase 2 (du = dy·B), that of gate and up adds one to dx
//! after it. Their gradients are gradients of weights like the others.

use std::ops::Range;

use super::arena::{Arena, Memory};
use super::block::{Block, Saved};
use super::chunks;
use super::column_sums::ColumnSums;
use super::gemm::{A, B, Own};
use super::grid::Grid;
use super::intake::{Intake, Transposed};
use super::low_rank::{LowRankGradient, LowRankTargets, Mask, PackRows, RankRows};
use super::pack::PackArgs;
use super::products::{ChunkOperands, RowProduct, Rows, Target, WeightGradient};
use super::scratch::{Needs, OwnOffsets};
use crate::cpu::epilogue::{GateGradients, GateUp, PanelSums};
use crate::cpu::kernels::Io;
use crate::cpu::matrix::Matrix;
use crate::cpu::panels::PanelLayout;
use crate::cpu::pass::PAD;
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
    /// Of the addends of gate and up, and of down.
    pub(super) low_rank: [Option<LowRankTargets>; 2],
}

/// The gradients of weights, which are sums over the chunks.
struct Gradients<T: 'static> {
    /// gate, up, down
    weights: [Option<WeightGradient<T>>; 3],
    /// Of the addends of gate and up, and of down.
    low_rank: [Option<LowRankGradient<T>>; 2],
}

impl<T: Copy> Gradients<T> {
    fn all(&self) -> impl Iterator<Item = &WeightGradient<T>> {
        let low_rank = self.low_rank.iter().flatten().flat_map(LowRankGradient::all);
        self.weights.iter().flatten().chain(low_rank)
    }
}

impl<T: Io> Block<'_, T> {
    /// Writes the gradients under dy (M,H), and returns those of the biases.
    pub(super) fn backward(
        &self,
        x: Matrix<T>,
        dy: Matrix<T>,
        saved: &Saved<T>,
        targets: &BlockTargets<T>,
    ) -> [Option<Vec<f32>>; 3] {
        [&x, &dy].into_iter().for_each(Matrix::check);
        let (h, i) = (self.hidden_size(), self.intermediate_size());
        let (threads, count) = (self.threads(x.rows), chunks(x.rows).count());
        let gradient = |which: Which, shape, factor| {
            let target = Rows::Io(targets.weights[which as usize]?);
            Some(WeightGradient::new(self.gemm, shape, factor, target, (threads, count)))
        };
        let low_rank = |i: usize, factor| {
            let (of, to) = (self.low_rank[i].as_ref()?, targets.low_rank[i].as_ref()?);
            Some(LowRankGradient::new(self.gemm, of, to, factor, (threads, count)))
        };
        let gradients = Gradients {
            weights: [
                gradient(Which::Gate, (i, h), 1.0),
                gradient(Which::Up, (i, h), 1.0),
                gradient(Which::Down, (h, i), self.down_multiplier),
            ],
            low_rank: [low_rank(0, 1.0), low_rank(1, self.down_multiplier)],
        };
        let sums = |biased: bool, columns, factor| biased.then(|| ColumnSums::new(columns, factor));
        let [gate, up, down] = targets.biases;
        let biases =
            [sums(gate, i, 1.0), sums(up, i, 1.0), sums(down, h, f64::from(self.down_multiplier))];
        let gate_up_bias = self.gate_up_bias();
        for (number, rows) in chunks(x.rows).enumerate() {
            let chunk = Chunk {
                x: x.rows(rows.clone()),
                dy: dy.rows(rows.clone()),
                first_row: rows.start,
                dx: targets.x.map(|dx| dx.row(rows.start)),
                saved: saved.gate_up.as_ref().map(|saved| {
                    let from = rows.start * self.saved_stride();
                    saved.each_ref().map(|rows| &rows[from..])
                }),
                u: saved.u.each_ref().map(|u| Some(u.as_ref()?.a(self.gemm.a_bytes(), rows.start))),
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
    first_row: usize,
    dx: Option<Target<T>>,
    /// Rows of gate and of up.
    saved: Option<[&'a [T]; 2]>,
    /// Rows of u of each addend.
    u: [Option<A>; 2],
    is_first: bool,
    is_last: bool,
}

/// The backward pass of one chunk.
struct Backward<'a, T: 'static> {
    block: &'a Block<'a, T>,
    threads: usize,
    memory: Memory,
    own: OwnOffsets,
    /// A unit's h (rows, channels), and the mask of the addend of down.
    own_h: (usize, usize),
    h_mask: Option<Mask>,
    saved: Option<[&'a [T]; 2]>,
    gate_up_bias: *const f32,
    intakes: Vec<Intake<'a, T>>,
    /// u of the addends as B.
    u_panels: Vec<PackRows<T>>,
    /// x as A, if gate and up are computed again.
    x: Option<A>,
    dy: A,
    /// u of gate and up.
    gate_up_u: Option<(A, B<'a, T>)>,
    /// du of each addend.
    du: [Option<RowProduct<'a, T>>; 2],
    /// The addend's term of dh.
    dh: Option<(A, B<'a, T>)>,
    /// Channels of dh.
    gate: Grid,
    /// dgate and dup as A, if anything reads them.
    dgate_up: [A; 2],
    /// Their transposes, if anything reads them.
    transposed: [Option<Transposed>; 2],
    /// h (rows, I) as B, if a gradient reads it.
    h: Option<(PanelLayout, *mut u8)>,
    dx: Option<RowProduct<'a, T>>,
    /// The gradients of weights with their operands.
    gradients: Vec<(&'a WeightGradient<T>, ChunkOperands)>,
    /// du of the addends.
    _du: [Option<RankRows>; 2],
}

/// The units of one chunk.
struct Phases {
    intakes: Vec<Phase>,
    u_panels: Vec<Phase>,
    du: [Phase; 2],
    gate: Phase,
    dx: Phase,
    gradients: Vec<Phase>,
    biases: [Phase; 3],
}

// SAFETY: units write disjoint parts.
unsafe impl<T: Io> Sync for Backward<'_, T> {}

impl<'a, T: Io> Backward<'a, T> {
    fn new(
        block: &'a Block<'a, T>,
        chunk: Chunk<'a, T>,
        gradients: &'a Gradients<T>,
        gate_up_bias: &'a Option<Vec<f32>>,
        threads: usize,
    ) -> Self {
        let (gemm, rows, a_bytes) = (block.gemm, chunk.x.rows, block.gemm.a_bytes());
        let (h, i) = (block.hidden_size(), block.intermediate_size());
        let [gate_gradient, up_gradient, down_gradient] = &gradients.weights;
        let [gate_up_addend, down_addend] = &block.low_rank;
        let [gate_up_rank, down_rank] = &gradients.low_rank;
        let [x_mask, h_mask] = [gate_up_addend, down_addend]
            .map(|addend| addend.as_ref().and_then(|addend| addend.mask(chunk.first_row)));

        // Shared pieces. The rows of the chunk are k of the weights' gradients.
        let mut shared = Arena::default();
        let by_rows = |columns: usize| gemm.layout(columns, rows);
        let padded_rows = by_rows(1).padded_k();
        let a_piece = |shared: &mut Arena, rows: usize, stride: usize| {
            let bytes = (rows + gemm.sweep.row_padding()) * stride * a_bytes;
            (shared.piece(bytes), stride)
        };
        let transposed_piece =
            |shared: &mut Arena, columns| a_piece(shared, columns, padded_rows + PAD);
        let panels_piece = |shared: &mut Arena, columns| {
            let layout = by_rows(columns);
            (layout, shared.piece(layout.bytes()))
        };
        let (x_stride, h_stride) = (block.x_stride(), block.h_stride());
        let x_a = chunk.saved.is_none().then(|| a_piece(&mut shared, rows, x_stride));
        let x_b = (gate_gradient.is_some() || up_gradient.is_some())
            .then(|| panels_piece(&mut shared, h));
        let reads_dropped_x = gate_up_rank.is_some();
        let dropped_x_a =
            (reads_dropped_x && x_mask.is_some()).then(|| a_piece(&mut shared, rows, x_stride));
        let dropped_x_b = reads_dropped_x.then(|| panels_piece(&mut shared, h));
        let dy_a = a_piece(&mut shared, rows, x_stride);
        let reads_down = down_gradient.is_some() || down_rank.is_some();
        let dy_transposed = reads_down.then(|| transposed_piece(&mut shared, h));
        let h_b = reads_down.then(|| panels_piece(&mut shared, i));
        let dgate_up = [0, 1].map(|_| a_piece(&mut shared, rows, h_stride));
        let transposed = [gate_gradient, up_gradient].map(|gradient| {
            (gradient.is_some() || gate_up_rank.is_some()).then(|| transposed_piece(&mut shared, i))
        });
        let u_b = [gate_up_addend, down_addend]
            .map(|addend| addend.as_ref().map(|addend| panels_piece(&mut shared, addend.rank())));
        let du_transposed = [gate_up_addend, down_addend].map(|addend| {
            addend.as_ref().map(|addend| transposed_piece(&mut shared, addend.rank()))
        });
        let du = [gate_up_addend, down_addend]
            .map(|addend| addend.as_ref().map(|addend| RankRows::new(&gemm, rows, addend.rank())));

        // Each thread's pieces.
        let group = (gemm.sweep.panels_at_once(rows, usize::MAX) / 2).max(1);
        let gate = Grid::new(rows, i.div_ceil(gemm.nr()), group, threads);
        let dx_grid = RowProduct::grid(&gemm, rows, h, threads);
        let du_grids = [gate_up_addend, down_addend].map(|addend| {
            addend.as_ref().map(|addend| RowProduct::grid(&gemm, rows, addend.rank(), threads))
        });
        let mut needs = Needs::default();
        needs.add(&gemm, gate, (3, 2));
        let grids = gradients.all().map(WeightGradient::grid);
        grids
            .chain([dx_grid])
            .chain(du_grids.into_iter().flatten())
            .for_each(|grid| needs.add(&gemm, grid, (1, 1)));
        let mut own = Arena::default();
        let unit_stride = gate.group() * gemm.nr();
        let own_offsets = OwnOffsets::new(&gemm, needs, &mut own);
        let own_h = (own.piece(gate.row_block() * unit_stride * a_bytes), unit_stride);
        let memory = Memory::new(shared, &own, threads);

        let at = |(offset, stride)| A { data: memory.at(offset), stride };
        let panels = |(layout, offset): (PanelLayout, usize)| (layout, memory.at(offset));
        let turned = |piece| Transposed { to: at(piece), rows, padded_rows };
        let padded_k = gemm.layout(1, h).padded_k();
        let (dy, dgate_up) = (at(dy_a), dgate_up.map(at));
        let dy_transposed = dy_transposed.map(turned);
        let transposed = transposed.map(|piece| piece.map(turned));
        let du_transposed = du_transposed.map(|piece| piece.map(turned));
        let (x_b, dropped_x_b, h_b) = (x_b.map(panels), dropped_x_b.map(panels), h_b.map(panels));
        let mut intakes = vec![
            Intake {
                a: x_a.map(|piece| (at(piece), padded_k)),
                b: x_b,
                ..Intake::new(gemm, chunk.x)
            },
            Intake {
                a: Some((dy, padded_k)),
                transposed: dy_transposed,
                ..Intake::new(gemm, chunk.dy)
            },
        ];
        if reads_dropped_x {
            intakes.push(Intake {
                a: dropped_x_a.map(|piece| (at(piece), padded_k)),
                mask: x_mask,
                b: dropped_x_b,
                ..Intake::new(gemm, chunk.x)
            });
        }
        let mut u_panels = vec![];
        let u_b = [0, 1].map(|which| {
            let (addend, from) = (block.low_rank[which].as_ref()?, chunk.u[which]?);
            let (layout, to) = panels(u_b[which]?);
            u_panels.push(PackRows { gemm, from, layout, columns: addend.rank(), to });
            Some((layout, to))
        });
        let du_a = du.each_ref().map(|du| Some(du.as_ref()?.a(a_bytes, 0)));
        let du_product = |which: usize, terms: Vec<(A, B<'a, T>)>| {
            let (addend, to) = (block.low_rank[which].as_ref()?, du_a[which]?);
            Some(RowProduct {
                gemm,
                terms,
                mask: None,
                bias: std::ptr::null(),
                factor: 1.0,
                y: Rows::of_a(to, a_bytes),
                transposed: du_transposed[which].map(|transposed| (to, transposed)),
                columns: addend.rank(),
                grid: du_grids[which]?,
            })
        };
        let gate_up_terms = gate_up_addend
            .iter()
            .flat_map(|addend| [0, 1].map(|side| (dgate_up[side], addend.up_transposed(side))));
        let down_terms = down_addend.iter().map(|addend| (dy, addend.up_transposed(0)));
        let du_products =
            [du_product(0, gate_up_terms.collect()), du_product(1, down_terms.collect())];

        let operands = |transposed: Option<Transposed>, b: Option<(PanelLayout, *mut u8)>| {
            let (transposed, (layout, b)) = (transposed?, b?);
            let (is_first, is_last) = (chunk.is_first, chunk.is_last);
            Some(ChunkOperands { a: transposed.to, b: (layout, b.cast_const()), is_first, is_last })
        };
        let mut all = vec![];
        let [dgate_transposed, dup_transposed] = transposed;
        let base = [(dgate_transposed, x_b), (dup_transposed, x_b), (dy_transposed, h_b)];
        for (gradient, (a, b)) in gradients.weights.iter().zip(base) {
            all.extend(gradient.as_ref().zip(operands(a, b)));
        }
        if let Some(gradient) = gate_up_rank {
            all.extend(Some(&gradient.a).zip(operands(du_transposed[0], dropped_x_b)));
            for (gradient, a) in gradient.b.iter().zip(transposed) {
                all.extend(Some(gradient).zip(operands(a, u_b[0])));
            }
        }
        if let Some(gradient) = down_rank {
            all.extend(Some(&gradient.a).zip(operands(du_transposed[1], h_b)));
            let b = gradient.b.iter().zip([dy_transposed]);
            b.for_each(|(gradient, a)| all.extend(Some(gradient).zip(operands(a, u_b[1]))));
        }

        let [gate_weight, up_weight, _] =
            block.weights.map(|weight| B::Matrix(weight.transposed()));
        let of_addend =
            gate_up_addend.as_ref().and_then(|addend| Some((du_a[0]?, addend.down_transposed())));
        let dx = chunk.dx.map(|y| RowProduct {
            gemm,
            terms: of_addend
                .into_iter()
                .chain([(dgate_up[0], gate_weight), (dgate_up[1], up_weight)])
                .collect(),
            mask: x_mask,
            bias: std::ptr::null(),
            factor: 1.0,
            y: Rows::Io(y),
            transposed: None,
            columns: h,
            grid: dx_grid,
        });
        let gate_up_u = gate_up_addend.as_ref().and_then(|addend| Some((chunk.u[0]?, addend.up())));
        let dh = down_addend.as_ref().and_then(|addend| Some((du_a[1]?, addend.down_transposed())));
        Self {
            block,
            threads,
            own: own_offsets,
            own_h,
            h_mask,
            saved: chunk.saved,
            gate_up_bias: gate_up_bias.as_ref().map_or(std::ptr::null(), |bias| bias.as_ptr()),
            x: x_a.map(at),
            intakes,
            u_panels,
            dy,
            gate_up_u,
            du: du_products,
            dh,
            gate,
            dgate_up,
            transposed,
            h: h_b,
            dx,
            gradients: all,
            _du: du,
            memory,
        }
    }

    fn run(self, biases: &[Option<ColumnSums>; 3]) {
        let product =
            |product: &Option<RowProduct<T>>| product.as_ref().map_or(0, |p| p.grid.units());
        let columns = |sums: &Option<ColumnSums>| sums.as_ref().map_or(0, ColumnSums::units);
        let phases = Phases {
            intakes: self.intakes.iter().map(Intake::phase).collect(),
            u_panels: self.u_panels.iter().map(PackRows::phase).collect(),
            du: self.du.each_ref().map(|du| Phase::new(product(du))),
            gate: Phase::new(self.gate.units()),
            dx: Phase::new(product(&self.dx)),
            gradients: self.gradients.iter().map(|(g, _)| Phase::new(g.grid().units())).collect(),
            biases: biases.each_ref().map(|sums| Phase::new(columns(sums))),
        };
        threads::run_on(self.threads, |thread| self.work(thread, &phases, biases));
    }

    /// What a thread does.
    fn work(&self, thread: usize, phases: &Phases, biases: &[Option<ColumnSums>; 3]) {
        let own = self.memory.own(thread);
        let h = own.wrapping_add(self.own_h.0);
        let (sums, own) = self.own.at(own);
        // SAFETY: units of a phase write disjoint parts, a phase begins when the ones that it reads
        // are done, and each thread has scratch of its own.
        unsafe {
            let product = |product: &Option<RowProduct<T>>, phase: &Phase| {
                if let Some(product) = product {
                    phase.work(|unit, _| product.unit(unit, sums, own));
                }
            };
            for (intake, phase) in self.intakes.iter().zip(&phases.intakes) {
                phase.work(|unit, _| intake.unit(unit));
            }
            for (u, phase) in self.u_panels.iter().zip(&phases.u_panels) {
                phase.work(|unit, _| u.unit(unit));
            }
            phases.intakes.iter().chain(&phases.u_panels).for_each(Phase::wait);
            product(&self.du[1], &phases.du[1]);
            phases.du[1].wait();
            phases.gate.work(|unit, _| self.gate_unit(unit, sums, h, own));
            phases.gate.wait();
            product(&self.du[0], &phases.du[0]);
            phases.du[0].wait();
            product(&self.dx, &phases.dx);
            for ((gradient, operands), phase) in self.gradients.iter().zip(&phases.gradients) {
                phase.work(|unit, _| gradient.unit(unit, *operands, sums, own));
            }
            let (rows, [dgate, dup]) = (self.intakes[0].from.rows, self.dgate_up);
            let a_bytes = self.block.gemm.a_bytes();
            for ((sums, phase), a) in biases.iter().zip(&phases.biases).zip([dgate, dup, self.dy]) {
                if let Some(sums) = sums {
                    phase.work(|unit, _| sums.unit(unit, a, a_bytes, rows));
                }
            }
        }
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
        let h = A { data: h, stride: self.own_h.1 };
        let down = B::Matrix(block.weights[Which::Down as usize].transposed());
        let part = (panels.clone(), rows.clone());
        // SAFETY: the caller's contract.
        unsafe {
            if self.saved.is_none() {
                self.gate_up(&panels, rows.clone(), sums, own);
            }
            if let Some((du, a)) = &self.dh {
                gemm.add(*du, a, part.clone(), Sums::new(dh), own);
                if let Some(mask) = &self.h_mask {
                    gemm.mask(mask, dh, &panels, &rows);
                }
            }
            let to = Sums { to: dh, accumulate: self.dh.is_some() };
            gemm.add(self.dy, &down, part, to, own);
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
        let Some(x) = self.x else { return };
        let pairs = 2 * panels.start..block.gate_up_panels().min(2 * panels.end);
        // SAFETY: the caller's contract. The last panel of dh may be half empty.
        unsafe {
            let panel_sums = gemm.panel_sums(rows.len());
            let missing = 2 * panels.len() - pairs.len();
            sums.add(pairs.len() * panel_sums).write_bytes(0, missing * panel_sums);
            let part = (pairs, rows);
            gemm.add(x, &block.gate_up(), part.clone(), Sums::new(sums), own);
            if let Some((u, b)) = &self.gate_up_u {
                gemm.add(*u, b, part, Sums { to: sums, accumulate: true }, own);
            }
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
            if let Some(mask) = &self.h_mask {
                mask.apply_to_a(gemm.a_bytes(), rows.clone(), channels, h.data, h.stride);
            }
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
