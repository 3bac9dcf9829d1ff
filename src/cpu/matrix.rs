//! A matrix in a tensor of any strides.

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
