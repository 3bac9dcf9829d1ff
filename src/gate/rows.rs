//! Operands of any layout as rows and columns, for kernels with one row and one column stride.

use candle_core::Layout;

/// N operands of one shape, seen as `rows` rows of `columns` elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rows<const N: usize> {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    /// Of each operand, in elements.
    pub(crate) strides: [Stride; N],
}

/// The distances between the rows and between the columns of an operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stride {
    pub(crate) row: usize,
    pub(crate) column: usize,
}

impl<const N: usize> Rows<N> {
    /// Merges adjacent dimensions that every operand steps through with one stride. None if more
    /// than two dimensions remain.
    pub(crate) fn new(layouts: [&Layout; N]) -> Option<Self> {
        let dims = layouts.first()?.dims();
        let mut merged: Vec<(usize, [usize; N])> = vec![];
        for (d, &size) in dims.iter().enumerate().filter(|&(_, &size)| size != 1) {
            let strides = layouts.map(|layout| layout.stride()[d]);
            match merged.last_mut() {
                Some((outer, last)) if (0..N).all(|n| last[n] == size * strides[n]) => {
                    (*outer, *last) = (*outer * size, strides);
                }
                _ => merged.push((size, strides)),
            }
        }
        match merged[..] {
            [] => Some(Self::contiguous(1)),
            [(columns, strides)] => Some(Self::from_parts((1, [columns; N]), (columns, strides))),
            [outer, inner] => Some(Self::from_parts(outer, inner)),
            _ => None,
        }
    }

    /// One row of contiguous operands.
    pub(crate) fn contiguous(elements: usize) -> Self {
        Self::from_parts((1, [elements; N]), (elements, [1; N]))
    }

    fn from_parts(
        (rows, outer): (usize, [usize; N]),
        (columns, inner): (usize, [usize; N]),
    ) -> Self {
        let strides = std::array::from_fn(|n| Stride { row: outer[n], column: inner[n] });
        Self { rows, columns, strides }
    }

    /// The row strides, if the elements of every row are adjacent in every operand. A single row of
    /// elements that are apart is seen as many rows of one element.
    #[cfg_attr(
        not(any(feature = "cuda", test)),
        allow(dead_code, reason = "the CUDA kernels need adjacent columns")
    )]
    pub(crate) fn with_adjacent_columns(self) -> Option<Self> {
        if self.strides.iter().all(|stride| stride.column == 1) {
            return Some(self);
        }
        let turned = self.strides.map(|stride| Stride { row: stride.column, column: 1 });
        (self.rows == 1).then_some(Self { rows: self.columns, columns: 1, strides: turned })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::{DType, Device, Result, Tensor};

    use super::*;

    /// (rows, columns, strides as (row, column)) of a pair of views of one zero tensor.
    type Found = Option<(usize, usize, [(usize, usize); 2])>;

    fn rows(dims: &[usize], view: impl Fn(&Tensor) -> Result<[Tensor; 2]>) -> Option<Rows<2>> {
        let [a, b] = view(&Tensor::zeros(dims, DType::F32, &Device::Cpu).unwrap()).unwrap();
        Rows::new([a.layout(), b.layout()])
    }

    fn found(rows: Option<Rows<2>>) -> Found {
        rows.map(|r| (r.rows, r.columns, r.strides.map(|stride| (stride.row, stride.column))))
    }

    #[test]
    fn views_as_rows() {
        let whole = |t: &Tensor| Ok([t.clone(), t.clone()]);
        let halves = |t: &Tensor| Ok([t.narrow(1, 0, 7)?, t.narrow(1, 7, 7)?]);
        let broadcast = |t: &Tensor| Ok([t.narrow(0, 0, 1)?.broadcast_as((6, 7))?, t.clone()]);
        let batches = |t: &Tensor| Ok([t.narrow(2, 0, 7)?, t.narrow(2, 7, 7)?]);
        for (rows, expected) in [
            (rows(&[3, 4, 5], whole), (1, 60, [(60, 1), (60, 1)])),
            (rows(&[], whole), (1, 1, [(1, 1), (1, 1)])),
            (rows(&[1, 1], whole), (1, 1, [(1, 1), (1, 1)])),
            (rows(&[6, 14], halves), (6, 7, [(14, 1), (14, 1)])),
            (rows(&[6, 7], broadcast), (6, 7, [(0, 1), (7, 1)])),
            (rows(&[2, 3, 14], batches), (6, 7, [(14, 1), (14, 1)])),
        ] {
            assert_eq!(found(rows), Some(expected));
            assert_eq!(rows.unwrap().with_adjacent_columns(), rows, "adjacent already");
        }
    }

    #[test]
    fn columns_that_are_apart() {
        let interleaved =
            |t: &Tensor| Ok([t.narrow(2, 0, 1)?.squeeze(2)?, t.narrow(2, 1, 1)?.squeeze(2)?]);
        let one_row = rows(&[6, 7, 2], interleaved);
        assert_eq!(found(one_row), Some((1, 42, [(42, 2), (42, 2)])));
        assert_eq!(
            found(one_row.unwrap().with_adjacent_columns()),
            Some((42, 1, [(2, 1), (2, 1)]))
        );
        let transposed = rows(&[6, 7], |t| Ok([t.t()?, t.t()?]));
        assert_eq!(found(transposed), Some((7, 6, [(1, 7), (1, 7)])));
        assert_eq!(transposed.unwrap().with_adjacent_columns(), None);
        let repeated = rows(&[6, 1], |t| Ok([t.broadcast_as((6, 7))?, t.broadcast_as((6, 7))?]));
        assert_eq!(found(repeated), Some((6, 7, [(1, 0), (1, 0)])));
        assert_eq!(repeated.unwrap().with_adjacent_columns(), None);
    }

    #[test]
    fn three_dimensions_that_do_not_merge() {
        let middle = |t: &Tensor| {
            Ok([t.narrow(1, 1, 2)?.narrow(2, 0, 3)?, t.narrow(1, 0, 2)?.narrow(2, 1, 3)?])
        };
        assert_eq!(rows(&[4, 3, 5], middle), None);
    }
}
