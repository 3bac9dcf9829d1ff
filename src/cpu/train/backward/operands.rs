//! The operands of a chunk in shared scratch. Its rows are k of the gradients of weights.

use crate::cpu::kernels::Io;
use crate::cpu::panels::PanelLayout;
use crate::cpu::pass::PAD;
use crate::cpu::train::arena::{Arena, Memory};
use crate::cpu::train::block::Block;
use crate::cpu::train::gemm::{A, Gemm};
use crate::cpu::train::intake::Transposed;
use crate::cpu::train::low_rank::LowRankGradient;
use crate::cpu::train::products::{ChunkOperands, WeightGradient};

use super::Gradients;

/// B (rows, columns) in panels.
type PanelsOf = (PanelLayout, *mut u8);

/// What the phases of a chunk write and read. None is not read.
#[derive(Clone, Copy)]
pub(super) struct Operands {
    pub(super) x: Option<A>,
    pub(super) x_panels: Option<PanelsOf>,
    /// x with the elements that the addend of gate and up drops.
    pub(super) dropped_x: Option<A>,
    pub(super) dropped_x_panels: Option<PanelsOf>,
    pub(super) dy: A,
    pub(super) dy_transposed: Option<Transposed>,
    /// h, with the elements that the addend of down drops.
    pub(super) h: Option<PanelsOf>,
    pub(super) dgate_up: [A; 2],
    pub(super) transposed: [Option<Transposed>; 2],
    /// u of each addend.
    pub(super) u: [Option<PanelsOf>; 2],
    pub(super) du_transposed: [Option<Transposed>; 2],
}

/// Takes pieces of an arena, whose memory is not allocated yet: pointers are offsets.
struct Pieces<'a, T: 'static> {
    gemm: Gemm<T>,
    rows: usize,
    arena: &'a mut Arena,
}

impl<T: Copy> Pieces<'_, T> {
    fn piece(&mut self, bytes: usize) -> *mut u8 {
        std::ptr::without_provenance_mut(self.arena.piece(bytes))
    }

    fn a(&mut self, rows: usize, stride: usize) -> A {
        let rows = rows + self.gemm.sweep.row_padding();
        A { data: self.piece(rows * stride * self.gemm.a_bytes()), stride }
    }

    fn panels(&mut self, columns: usize) -> PanelsOf {
        let layout = self.gemm.layout(columns, self.rows);
        (layout, self.piece(layout.bytes()))
    }

    fn transposed(&mut self, columns: usize) -> Transposed {
        let padded_rows = self.gemm.layout(1, self.rows).padded_k();
        let to = self.a(columns, padded_rows + PAD);
        Transposed { to, rows: self.rows, padded_rows }
    }
}

impl Operands {
    /// Pieces of `arena` for what these gradients read; x is read with `recompute`.
    pub(super) fn new<T: Io>(
        block: &Block<T>,
        rows: usize,
        gradients: &Gradients<T>,
        recompute: bool,
        arena: &mut Arena,
    ) -> Self {
        let (h, i) = (block.hidden_size(), block.intermediate_size());
        let (x_stride, h_stride) = (block.x_stride(), block.h_stride());
        let [gate, up, down] = gradients.weights.each_ref().map(Option::is_some);
        let [reads_dropped_x, reads_dropped_h] = gradients.low_rank.each_ref().map(Option::is_some);
        let drops_x = block.low_rank[0].as_ref().is_some_and(|addend| addend.dropout.is_some());
        // h of down's gradient would need a copy without dropped elements.
        debug_assert!(!down || block.low_rank[1].as_ref().is_none_or(|a| a.dropout.is_none()));
        let rank = |of: &Option<LowRankGradient<T>>| of.as_ref().map(LowRankGradient::rank);
        let ranks = gradients.low_rank.each_ref().map(rank);
        let mut pieces = Pieces { gemm: block.gemm, rows, arena };
        Self {
            x: recompute.then(|| pieces.a(rows, x_stride)),
            x_panels: (gate || up).then(|| pieces.panels(h)),
            dropped_x: (reads_dropped_x && drops_x).then(|| pieces.a(rows, x_stride)),
            dropped_x_panels: reads_dropped_x.then(|| pieces.panels(h)),
            dy: pieces.a(rows, x_stride),
            dy_transposed: (down || reads_dropped_h).then(|| pieces.transposed(h)),
            h: (down || reads_dropped_h).then(|| pieces.panels(i)),
            dgate_up: [0, 1].map(|_| pieces.a(rows, h_stride)),
            transposed: [gate, up]
                .map(|wanted| (wanted || reads_dropped_x).then(|| pieces.transposed(i))),
            u: ranks.map(|rank| rank.map(|rank| pieces.panels(rank))),
            du_transposed: ranks.map(|rank| rank.map(|rank| pieces.transposed(rank))),
        }
    }

    /// The same in allocated memory.
    pub(super) fn place(self, memory: &Memory) -> Self {
        let at = |offset: *mut u8| memory.at(offset.addr());
        let a = |a: A| A { data: at(a.data), ..a };
        let panels = |(layout, offset): PanelsOf| (layout, at(offset));
        let transposed = |transposed: Transposed| Transposed { to: a(transposed.to), ..transposed };
        Self {
            x: self.x.map(a),
            x_panels: self.x_panels.map(panels),
            dropped_x: self.dropped_x.map(a),
            dropped_x_panels: self.dropped_x_panels.map(panels),
            dy: a(self.dy),
            dy_transposed: self.dy_transposed.map(transposed),
            h: self.h.map(panels),
            dgate_up: self.dgate_up.map(a),
            transposed: self.transposed.map(|piece| piece.map(transposed)),
            u: self.u.map(|piece| piece.map(panels)),
            du_transposed: self.du_transposed.map(|piece| piece.map(transposed)),
        }
    }

    /// The gradients with their operands.
    pub(super) fn of_gradients<'a, T: Copy>(
        &self,
        gradients: &'a Gradients<T>,
        (is_first, is_last): (bool, bool),
    ) -> Vec<(&'a WeightGradient<T>, ChunkOperands)> {
        let [dgate, dup] = self.transposed;
        let (dy, h) = (self.dy_transposed, self.h);
        let mut all = vec![];
        let mut add = |gradient: &'a WeightGradient<T>, a: Option<Transposed>, b| {
            if let Some((a, (layout, b))) = a.zip::<PanelsOf>(b) {
                let b = (layout, b.cast_const());
                all.push((gradient, ChunkOperands { a: a.to, b, is_first, is_last }));
            }
        };
        let of_weights = [(dgate, self.x_panels), (dup, self.x_panels), (dy, h)];
        for (gradient, (a, b)) in gradients.weights.iter().zip(of_weights) {
            gradient.iter().for_each(|gradient| add(gradient, a, b));
        }
        let of_addends =
            [(vec![dgate, dup], self.dropped_x_panels), (vec![dy], self.h)].into_iter();
        let addends = gradients.low_rank.iter().zip(of_addends).zip(self.u).zip(self.du_transposed);
        for (((gradient, (outputs, input)), u), du) in addends {
            let Some(LowRankGradient { a, b, .. }) = gradient else { continue };
            add(a, du, input);
            b.iter().zip(outputs).for_each(|(gradient, output)| add(gradient, output, u));
        }
        all
    }
}
