//! What is launched: kernels, their parameters and grids, from shapes and strides alone.
//!
//! The choice of a product's kernel is reasoned, not measured (no Apple GPU was at hand):
//!
//! 1. Up to 8 rows, `decode`: as long as the multiplications hide behind it, its time is that of
//!    reading the weights once. M1 to M4 make 26 to 40 f32 flops per byte that they read, so of f16
//!    weights 26 to 40 rows would hide if there were nothing but multiplications; conversions and
//!    the loads of x are more than half of the instructions. A tile of 32 rows does the work of 32,
//!    however few they are.
//! 2. Beyond that, `tile` where something follows the product (the gate, a bias, a factor): written
//!    where the sums are, instead of (M,2I) to memory and back, and rounded once. 32 rows as long
//!    as they are enough, then 64, with which a fragment read from threadgroup memory serves twice
//!    as many products.
//! 3. A bare product of many rows is candle's own GEMM, which was tuned on the machines; ours could
//!    at best be as fast.

use candle_core::{DType, Layout};

use crate::gate::params::GluParams;
use crate::gate::rows::{Rows, Stride};
use crate::gate::{Glu, GluActivation};

// As in swiglu.metal; a test compares them.
pub(super) const SIMDGROUPS: usize = 4;
pub(super) const THREADS: usize = 128;
pub(super) const WEIGHT_ROWS: usize = 4;
pub(super) const TILE_COLUMNS: usize = 64;
pub(super) const RASTER: usize = 8;
pub(super) const ELEMENTS: usize = 4;

/// The most rows for which a product is `decode`.
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
    /// Its name for this dtype.
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
    /// The activation of gate and up; without it, one projection.
    pub(super) glu: Option<Glu>,
    pub(super) has_bias: bool,
    /// Of a projection and its bias.
    pub(super) factor: f32,
}

/// Who computes a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    Kernel(Kernel),
    /// candle's GEMM
    Candle,
}

impl Product {
    /// The one place where it is chosen.
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

    /// Threadgroups of `kernel`.
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

    /// Whether each row of x and w, which begin at these elements, is whole 16 B chunks at
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

/// A size that the kernels' sums of sizes (a tile more, a chunk more) cannot overflow.
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
    /// None if they have more than two dimensions that cannot be merged, or a number that is too
    /// large.
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

    /// Whether four elements at a time can be read of every operand, from these offsets on.
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
