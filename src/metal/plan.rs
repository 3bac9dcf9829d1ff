//! Selects kernels, their parameters and grids, from shapes and strides alone.
//!
//! The choice of a product's kernel is derived, not measured (no Apple GPU was available):
//!
//! 1. Up to 8 rows, `decode`: it is bandwidth-bound, so it takes as long as one read of the
//!    weights. M1 to M4 compute 26 to 40 f32 flops per byte that they read. With f16 weights 26 to
//!    40 rows would be bandwidth-bound if there were only multiply-adds, but conversions and the
//!    loads of x are more than half of the instructions. A tile of 32 rows costs the same for any
//!    smaller number of rows.
//! 2. Above that, `tile` where the gate, a bias or a factor follows the product. The result is
//! 2. Above that, `tile` where the gate, a bias or a factor follows the product. The result is
//!    written from the accumulators, without (M,2I) going through memory, and is rounded once. Up
//!    to 32 rows a tile has 32 rows. Above that it has 64, so that a fragment read from threadgroup
//!    memory is used for twice as many products.
//!    kernel of ours could at best be as fast.
//!    at best be as fast.

use candle_core::{DType, Layout};

use crate::gate::params::GluParams;
use crate::gate::rows::{Rows, Stride};
use crate::gate::{Glu, GluActivation};

// These are those of swiglu.metal; a test compares them.
pub(super) const SIMDGROUPS: usize = 4;
pub(super) const THREADS: usize = 128;
pub(super) const WEIGHT_ROWS: usize = 4;
pub(super) const TILE_COLUMNS: usize = 64;
pub(super) const RASTER: usize = 8;
pub(super) const ELEMENTS: usize = 4;

/// The most rows for which a product uses `decode`.
const DECODE_ROWS: usize = 8;

/// A kernel of swiglu.metal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kernel {
    /// Few rows: gate, up and the activation (`gated`), or one projection.
    Decode {
        gated: bool,
        rows: usize,
    },
    /// Many rows, as above.
    Tile {
        gated: bool,
        rows: usize,
    },
    GateForward,
    GateBackward,
}

impl Kernel {
    /// The kernel's name for this dtype.
    pub(super) fn name(self, dtype: DType) -> String {
        let dtype = dtype.as_str();
        let product = |gated| if gated { "gate_up" } else { "linear" };
        match self {
            Self::Decode { gated, rows } => format!("{}_decode_{rows}_{dtype}", product(gated)),
            Self::Tile { gated, rows } => format!("{}_tile_{rows}_{dtype}", product(gated)),
            Self::GateForward => format!("gate_forward_{dtype}"),
            Self::GateBackward => format!("gate_backward_{dtype}"),
        }
    }
}

/// x (rows, k) · w (columns or 2·columns, k)ᵀ -> (rows, columns)
#[derive(Clone, Copy, Debug)]
pub(super) struct Product {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) k: usize,
    /// The activation of gate and up, or None for one projection.
    pub(super) glu: Option<Glu>,
    pub(super) has_bias: bool,
    /// The factor of a projection and its bias.
    pub(super) factor: f32,
}

/// What computes a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    Kernel(Kernel),
    /// candle's GEMM
    Candle,
}

impl Product {
    /// Selects what computes the product. No other function decides this.
    pub(super) fn choice(&self) -> Choice {
        let gated = self.glu.is_some();
        let bare = !gated && !self.has_bias && self.factor == 1.0;
        match self.rows {
            0..=DECODE_ROWS => {
                Choice::Kernel(Kernel::Decode { gated, rows: self.rows.max(1).next_power_of_two() })
            }
            _ if bare && self.k > 0 => Choice::Candle,
            9..=32 => Choice::Kernel(Kernel::Tile { gated, rows: 32 }),
            _ => Choice::Kernel(Kernel::Tile { gated, rows: 64 }),
        }
    }

    /// The grid of `kernel`, in threadgroups.
    pub(super) fn grid(&self, kernel: Kernel) -> [usize; 3] {
        let features =
            |weight_rows: usize| if self.glu.is_some() { weight_rows / 2 } else { weight_rows };
        match kernel {
            Kernel::Decode { rows, .. } => [
                self.columns.div_ceil(SIMDGROUPS * features(WEIGHT_ROWS)),
                self.rows.div_ceil(rows),
                1,
            ],
            Kernel::Tile { rows, .. } => {
                let tiles = self.rows.div_ceil(rows);
                [
                    tiles.min(RASTER),
                    self.columns.div_ceil(features(TILE_COLUMNS)),
                    tiles.div_ceil(RASTER),
                ]
            }
            Kernel::GateForward | Kernel::GateBackward => [0; 3],
        }
    }

    /// Whether each row of x and w, which begin at these elements, consists of whole 16 B chunks at
    /// multiples of 4 elements.
    pub(super) fn is_aligned(&self, dtype: DType, offsets: [usize; 2]) -> bool {
        self.k.is_multiple_of(16 / dtype.size_in_bytes())
            && offsets.iter().all(|offset| offset.is_multiple_of(4))
    }

    /// None if a size does not fit.
    pub(super) fn parameters(&self) -> Option<ProductParameters> {
        Some(ProductParameters {
            rows: size(self.rows)?,
            columns: size(self.columns)?,
            k: size(self.k)?,
            has_bias: self.has_bias.into(),
            factor: self.factor,
            glu: GluParams::from(&self.glu.unwrap_or(Glu::new(GluActivation::Identity))),
        })
    }
}

/// A size small enough that the kernels cannot overflow when they add a tile or a chunk to it.
fn size(n: usize) -> Option<u32> {
    i32::try_from(n).ok()?.try_into().ok()
}

/// `Product` of swiglu.metal.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct ProductParameters {
    rows: u32,
    columns: u32,
    k: u32,
    has_bias: u32,
    factor: f32,
    glu: GluParams,
}

/// Two or three operands of the gate, and the kernel's grid over them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Pair<const N: usize>(Rows<N>);

impl<const N: usize> Pair<N> {
    /// None if the operands have more than two dimensions that cannot be merged, or if a number is
    /// too large.
    pub(super) fn new(layouts: [&Layout; N]) -> Option<Self> {
        let rows = Rows::new(layouts)?;
        let fits =
            rows.strides.iter().all(|stride| u32::try_from(stride.row.max(stride.column)).is_ok());
        (fits && size(rows.rows).is_some() && size(rows.columns).is_some()).then_some(Self(rows))
    }

    #[cfg(feature = "metal")]
    pub(super) fn rows(&self) -> usize {
        self.0.rows
    }

    pub(super) fn grid(&self) -> [usize; 3] {
        [self.0.columns.div_ceil(THREADS * ELEMENTS), self.0.rows, 1]
    }

    /// Whether every operand can be read four elements at a time from these offsets on.
    pub(super) fn is_aligned(&self, offsets: [usize; N]) -> bool {
        let four = |n: usize| n.is_multiple_of(ELEMENTS);
        let Rows { rows, columns, strides } = self.0;
        let whole = |stride: &Stride| stride.column == 1 && (four(stride.row) || rows == 1);
        four(columns) && strides.iter().all(whole) && offsets.into_iter().all(four)
    }

    pub(super) fn parameters(&self, op: &Glu) -> PairParameters {
        let Rows { rows, columns, strides } = self.0;
        // `new` has checked that the numbers fit.
        let stride = |i: usize| {
            strides.get(i).map_or((0, 0), |stride| (stride.row as u32, stride.column as u32))
        };
        let ((gate_row, gate_column), (up_row, up_column), (dy_row, dy_column)) =
            (stride(0), stride(1), stride(2));
        let (rows, columns, glu) = (rows as u32, columns as u32, GluParams::from(op));
        PairParameters {
            rows,
            columns,
            gate_row,
            gate_column,
            up_row,
            up_column,
            dy_row,
            dy_column,
            glu,
        }
    }
}

/// `Pair` of swiglu.metal.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct PairParameters {
    rows: u32,
    columns: u32,
    gate_row: u32,
    gate_column: u32,
    up_row: u32,
    up_column: u32,
    dy_row: u32,
    dy_column: u32,
    glu: GluParams,
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
