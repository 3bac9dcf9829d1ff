//! One packed matrix, or gate and up in one, with its bias and the kernels for its format.

use super::buffer::Buffer;
use super::epilogue::PanelSums;
use super::format::Format;
use super::kernels::{CpuKernels, FormatKernels};
use super::panels::{Columns, PackedMatrix, PanelLayout, Panels};
use super::sweep::Sweep;

/// A projection's packed weight and bias, and the kernels for its format.
pub(super) struct Projection {
    kernels: &'static FormatKernels,
    pub(super) weight: Panels,
    /// (panels·NR), in the order of the packed columns.
    bias: Option<Buffer>,
    /// Outputs.
    pub(super) columns: usize,
}

impl Projection {
    /// Zeros (columns, k).
    pub(super) fn new(
        kernels: &'static CpuKernels,
        format: Format,
        columns: usize,
        k: usize,
    ) -> Self {
        let kernels = kernels.format(format);
        let weight = Panels::zeroed(PanelLayout::new(&kernels.sweep, columns, k));
        Self { kernels, weight, bias: None, columns }
    }

    /// Zeros for gate and up, (intermediate_size, k) each.
    pub(super) fn new_pair(
        kernels: &'static CpuKernels,
        format: Format,
        intermediate_size: usize,
        k: usize,
    ) -> Self {
        let half = kernels.format(format).sweep.nr / 2;
        let columns = 2 * intermediate_size.next_multiple_of(half);
        Self { columns: intermediate_size, ..Self::new(kernels, format, columns, k) }
    }

    /// Panels that were packed before, without a bias.
    pub(super) fn from_panels(
        kernels: &'static FormatKernels,
        weight: Panels,
        columns: usize,
    ) -> Self {
        Self { kernels, weight, bias: None, columns }
    }

    pub(super) fn set_bias(&mut self, columns: Columns, bias: &[f32]) {
        let len = self.weight.layout.count() * self.weight.layout.nr();
        let buffer = self.bias.get_or_insert_with(|| Buffer::zeroed(len * size_of::<f32>()));
        for (row, &value) in bias.iter().enumerate() {
            let column = self.weight.layout.column(columns, row);
            assert!(column < len);
            // SAFETY: the buffer has `len` f32.
            unsafe { *buffer.as_mut_ptr::<f32>().add(column) = value };
        }
    }

    /// The bias of the rows of `columns` as it was set.
    pub(super) fn bias(&self, columns: Columns) -> Option<Vec<f32>> {
        let buffer = self.bias.as_ref()?;
        // SAFETY: columns of existing rows lie within the buffer.
        let at =
            |row| unsafe { *buffer.as_ptr::<f32>().add(self.weight.layout.column(columns, row)) };
        Some((0..self.columns).map(at).collect())
    }

    /// The sums (rows, NR) of a panel with its bias.
    pub(super) fn sums(&self, panel: usize, rows: usize, sums: *const f32) -> PanelSums {
        assert!(panel < self.weight.layout.count());
        let bias = match &self.bias {
            // SAFETY: the bias is as wide as all panels.
            Some(buffer) => unsafe { buffer.as_ptr::<f32>().add(panel * self.weight.layout.nr()) },
            None => std::ptr::null(),
        };
        PanelSums { sums, rows, bias }
    }

    /// The rows of `columns`.
    pub(super) fn matrix(&self, columns: Columns) -> PackedMatrix {
        PackedMatrix { panels: self.weight.view(), columns, rows: self.columns }
    }

    pub(super) fn kernels(&self) -> &'static FormatKernels {
        self.kernels
    }

    pub(super) fn sweep(&self) -> &'static Sweep {
        &self.kernels.sweep
    }
}
