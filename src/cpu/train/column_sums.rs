//! Gradients of biases: the sums of columns over all rows.

use half::bf16;

use super::gemm::A;
use crate::cpu::threads::SendPtr;

/// Columns of a unit.
const COLUMNS: usize = 256;

/// The sums of the columns, in f64 and in the order of the rows.
pub(super) struct ColumnSums {
    sums: Vec<f64>,
    to: SendPtr<f64>,
    factor: f64,
}

impl ColumnSums {
    pub(super) fn new(columns: usize, factor: f64) -> Self {
        let mut sums = vec![0.0; columns];
        let to = SendPtr(sums.as_mut_ptr());
        Self { sums, to, factor }
    }

    pub(super) fn units(&self) -> usize {
        self.sums.len().div_ceil(COLUMNS)
    }

    /// Adds some rows of A.
    ///
    /// # Safety
    /// A has these rows and columns; no other thread has this unit.
    pub(super) unsafe fn unit(&self, unit: usize, a: A, a_bytes: usize, rows: usize) {
        let start = unit * COLUMNS;
        let columns = COLUMNS.min(self.sums.len() - start);
        for row in 0..rows {
            // SAFETY: the caller's contract; elements of A have 4 or 2 bytes.
            unsafe {
                let (from, to) = (a.at(a_bytes, row, start), self.to.at(start));
                for column in 0..columns {
                    *to.add(column) += if a_bytes == 4 {
                        f64::from(*from.cast::<f32>().add(column))
                    } else {
                        f64::from((*from.cast::<bf16>().add(column)).to_f32())
                    };
                }
            }
        }
    }

    /// The sums times the factor.
    pub(super) fn into_values(self) -> Vec<f32> {
        self.sums.into_iter().map(|sum| (sum * self.factor) as f32).collect()
    }
}
