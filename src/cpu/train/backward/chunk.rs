//! The backward pass of one chunk of rows: its phases.

use super::operands::Operands;
use super::{Chunk, Gradients};
use crate::cpu::kernels::Io;
use crate::cpu::threads::{self, Phase};
use crate::cpu::train::arena::{Arena, Memory};
use crate::cpu::train::block::Block;
use crate::cpu::train::column_sums::ColumnSums;
use crate::cpu::train::gemm::{A, B};
use crate::cpu::train::grid::Grid;
use crate::cpu::train::intake::Intake;
use crate::cpu::train::low_rank::{Mask, PackRows, RankRows};
use crate::cpu::train::products::{ChunkOperands, RowProduct, Rows, WeightGradient};
use crate::cpu::train::scratch::{Needs, OwnOffsets};

/// The backward pass of one chunk.
pub(super) struct Backward<'a, T: 'static> {
    pub(super) block: &'a Block<'a, T>,
    threads: usize,
    memory: Memory,
    own: OwnOffsets,
    /// A unit's h (rows, channels): its offset in a thread's scratch, and its stride.
    pub(super) own_h: (usize, usize),
    /// The mask of the addend of down.
    pub(super) h_mask: Option<Mask>,
    pub(super) saved: Option<[&'a [T]; 2]>,
    pub(super) gate_up_bias: *const f32,
    intakes: Vec<Intake<'a, T>>,
    /// u of the addends becomes B.
    u_panels: Vec<PackRows<T>>,
    pub(super) operands: Operands,
    /// u of gate and up, with B.
    pub(super) gate_up_u: Option<(A, B<'a, T>)>,
    /// du of each addend.
    du: [Option<RowProduct<'a, T>>; 2],
    /// The addend's term of dh.
    pub(super) dh: Option<(A, B<'a, T>)>,
    /// Channels of dh.
    pub(super) gate: Grid,
    dx: Option<RowProduct<'a, T>>,
    gradients: Vec<(&'a WeightGradient<T>, ChunkOperands)>,
    /// The memory of du.
    _du: [Option<RankRows>; 2],
}

// SAFETY: units write disjoint parts.
unsafe impl<T: Io> Sync for Backward<'_, T> {}

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

impl<'a, T: Io> Backward<'a, T> {
    pub(super) fn new(
        block: &'a Block<'a, T>,
        chunk: Chunk<'a, T>,
        gradients: &'a Gradients<T>,
        gate_up_bias: &'a Option<Vec<f32>>,
        threads: usize,
    ) -> Self {
        let (gemm, rows, a_bytes) = (block.gemm, chunk.x.rows, block.gemm.a_bytes());
        let (h, i) = (block.hidden_size(), block.intermediate_size());
        let addends = block.low_rank.each_ref().map(Option::as_ref);
        let [x_mask, h_mask] = addends.map(|addend| addend?.mask(chunk.first_row));
        let mut shared = Arena::default();
        let recompute = chunk.saved.is_none();
        let operands = Operands::new(block, rows, gradients, recompute, &mut shared);

        let group = (gemm.sweep.panels_at_once(rows, usize::MAX) / 2).max(1);
        let gate = Grid::new(rows, i.div_ceil(gemm.nr()), group, threads);
        let rows_grid = |columns| RowProduct::grid(&gemm, rows, columns, threads);
        let (dx_grid, du_grids) =
            (rows_grid(h), addends.map(|addend| Some(rows_grid(addend?.rank()))));
        let mut needs = Needs::default();
        needs.add(&gemm, gate, (3, 2));
        let grids = gradients.all().map(WeightGradient::grid).chain([dx_grid]);
        grids.chain(du_grids.into_iter().flatten()).for_each(|g| needs.add(&gemm, g, (1, 1)));
        let mut own = Arena::default();
        let own_offsets = OwnOffsets::new(&gemm, needs, &mut own);
        let h_stride = gate.group() * gemm.nr();
        let own_h = (own.piece(gate.row_block() * h_stride * a_bytes), h_stride);
        let memory = Memory::new(shared, &own, threads);
        let operands = operands.place(&memory);

        let du = addends.map(|addend| Some(RankRows::new(&gemm, rows, addend?.rank())));
        let du_a = du.each_ref().map(|du| Some(du.as_ref()?.a(a_bytes, 0)));
        let product = |terms: Vec<(A, B<'a, T>)>, y, columns, grid| RowProduct {
            gemm,
            terms,
            mask: None,
            bias: std::ptr::null(),
            factor: 1.0,
            y,
            transposed: None,
            columns,
            grid,
        };
        let du_products = [0, 1].map(|which| {
            let (addend, to) = (addends[which]?, du_a[which]?);
            let inputs = if which == 0 { &operands.dgate_up[..] } else { &[operands.dy] };
            let terms = inputs.iter().zip(0..).map(|(a, side)| (*a, addend.up_transposed(side)));
            let y = Rows::of_a(to, a_bytes);
            let transposed = operands.du_transposed[which].map(|transposed| (to, transposed));
            let product = product(terms.collect(), y, addend.rank(), du_grids[which]?);
            Some(RowProduct { transposed, ..product })
        });
        let of_addend = |which: usize| Some((du_a[which]?, addends[which]?.down_transposed()));
        let dx = chunk.dx.map(|y| {
            let [gate, up, _] = block.weights.map(|weight| B::Matrix(weight.transposed()));
            let [dgate, dup] = operands.dgate_up;
            let terms = of_addend(0).into_iter().chain([(dgate, gate), (dup, up)]).collect();
            RowProduct { mask: x_mask, ..product(terms, Rows::Io(y), h, dx_grid) }
        });
        let u_panels = [0, 1].map(|which| {
            let (from, (layout, to)) = (chunk.u[which]?, operands.u[which]?);
            Some(PackRows { gemm, from, layout, columns: addends[which]?.rank(), to })
        });
        Self {
            block,
            threads,
            own: own_offsets,
            own_h,
            h_mask,
            saved: chunk.saved,
            gate_up_bias: gate_up_bias.as_ref().map_or(std::ptr::null(), |bias| bias.as_ptr()),
            intakes: intakes(block, &chunk, &operands, x_mask),
            u_panels: u_panels.into_iter().flatten().collect(),
            operands,
            gate_up_u: addends[0].and_then(|addend| Some((chunk.u[0]?, addend.up()))),
            du: du_products,
            dh: of_addend(1),
            gate,
            dx,
            gradients: operands.of_gradients(gradients, (chunk.is_first, chunk.is_last)),
            _du: du,
            memory,
        }
    }

    pub(super) fn run(self, biases: &[Option<ColumnSums>; 3]) {
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
            let (rows, [dgate, dup]) = (self.intakes[0].from.rows, self.operands.dgate_up);
            let a_bytes = self.block.gemm.a_bytes();
            let inputs = [dgate, dup, self.operands.dy];
            for ((sums, phase), a) in biases.iter().zip(&phases.biases).zip(inputs) {
                if let Some(sums) = sums {
                    phase.work(|unit, _| sums.unit(unit, a, a_bytes, rows));
                }
            }
        }
    }
}

/// x, dy and dropped x become operands.
fn intakes<'a, T: Io>(
    block: &Block<T>,
    chunk: &Chunk<'a, T>,
    operands: &Operands,
    x_mask: Option<Mask>,
) -> Vec<Intake<'a, T>> {
    let gemm = block.gemm;
    let padded_k = gemm.layout(1, block.hidden_size()).padded_k();
    let padded = |a: A| (a, padded_k);
    let mut all = vec![
        Intake { a: operands.x.map(padded), b: operands.x_panels, ..Intake::new(gemm, chunk.x) },
        Intake {
            a: Some(padded(operands.dy)),
            transposed: operands.dy_transposed,
            ..Intake::new(gemm, chunk.dy)
        },
    ];
    if let Some(panels) = operands.dropped_x_panels {
        all.push(Intake {
            a: operands.dropped_x.map(padded),
            mask: x_mask,
            b: Some(panels),
            ..Intake::new(gemm, chunk.x)
        });
    }
    all
}
