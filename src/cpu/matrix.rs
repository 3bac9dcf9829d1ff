//! A matrix in a tensor of any strides.

use std::ops::Range;

/// A matrix (rows, k) of any strides.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a, T> {
    /// From its first element on.
    pub(super) data: &'a [T],
    pub(super) rows: usize,
    pub(super) k: usize,
    pub(super) strides: (usize, usize),
}

impl<T: Copy> Matrix<'_, T> {
    /// The same elements as (k, rows).
    pub(super) fn transposed(self) -> Self {
        Self { rows: self.k, k: self.rows, strides: (self.strides.1, self.strides.0), ..self }
    }

    /// Some rows.
    pub(super) fn rows(self, rows: Range<usize>) -> Self {
        let first = (rows.start * self.strides.0).min(self.data.len());
        Self { data: &self.data[first..], rows: rows.len(), ..self }
    }

    /// Every element lies within `data`.
    pub(super) fn check(&self) {
        let last = self.rows.saturating_sub(1) * self.strides.0
            + self.k.saturating_sub(1) * self.strides.1;
        assert!(
            self.rows == 0 || self.k == 0 || last < self.data.len(),
            "the layout reaches beyond the storage"
        );
    }
}
