//! The second phase: the gate's gradients.

use std::ops::Range;

use super::chunk::Backward;
use crate::cpu::epilogue::{GateGradients, GateUp, PanelSums};
use crate::cpu::kernels::Io;
use crate::cpu::sweep::Sums;
use crate::cpu::train::gemm::{A, B, Own};
use crate::cpu::train::pack::PackArgs;
use crate::which::Which;

impl<T: Io> Backward<'_, T> {
    /// Some channels of gate, up and dh -> h, dgate and dup.
    ///
    /// # Safety
    /// As [`RowProduct::unit`]; `h` is this thread's.
    pub(super) unsafe fn gate_unit(&self, unit: usize, sums: *mut f32, h: *mut u8, own: Own) {
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
            gemm.add(self.operands.dy, &down, part, to, own);
            for (i, panel) in panels.clone().enumerate() {
                let [dgate, dup] = self.operands.dgate_up;
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
        let Some(x) = self.operands.x else { return };
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
            for (a, transposed) in self.operands.dgate_up.into_iter().zip(self.operands.transposed)
            {
                if let Some(transposed) = transposed {
                    transposed.write(gemm.a_bytes(), a, rows.clone(), channels.clone());
                }
                if channels.end == i {
                    block.pad_h(a, rows.clone());
                }
            }
            let Some((layout, to)) = self.operands.h else { return };
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
