//! What is launched: kernels, their parameters and grids, from shapes and strides alone.
//!
//! The choice of a product's kernel is reasoned, not measured (no Apple GPU was at hand):
//!
//! 1. Up to 8 rows, `decode`: as long as the multiplications hide behind it, its time is that of reading the weights once. M1 to M4
//!    make 26 to 40 f32 flops per byte that they read, so of f16 weights 26 to 40 rows would hide if there were nothing but
//!    multiplications; conversions and the loads of x are more than half of the instructions. A tile of 32 rows does the work of
//!    32, however few they are.
//! 2. Beyond that, `tile` where something follows the product (the gate, a bias, a factor): written where the sums are, instead of
//!    (M,2I) to memory and back, and rounded once. 32 rows as long as they are enough, then 64, with which a fragment read from
//!    threadgroup memory serves twice as many products.
//! 3. A bare product of many rows is candle's own GEMM, which was tuned on the machines; ours could at best be as fast.

use candle_core::{DType, Layout};

use crate::activation::{Glu, GluActivation};

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
    /// Gate, up and the activation (`gated`), or one projection
    Decode {
        gated: bool,
        rows: usize,
    },
    /// Likewise
    Tile {
        gated: bool,
        rows: usize,
    },
    Glu,
    GluGradient,
}

impl Kernel {
    /// Its name for this dtype.
    pub(super) fn name(self, dtype: DType) -> String {
        let dtype = dtype.as_str();
        let product = |gated| if gated { "gate_up" } else { "linear" };
        match self {
            Self::Decode { gated, rows } => format!("{}_decode_{rows}_{dtype}", product(gated)),
            Self::Tile { gated, rows } => format!("{}_tile_{rows}_{dtype}", product(gated)),
            Self::Glu => format!("glu_{dtype}"),
            Self::GluGradient => format!("glu_gradient_{dtype}"),
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
            0..=DECODE_ROWS => Choice::Kernel(Kernel::Decode { gated, rows: self.rows.max(1).next_power_of_two() }),
            _ if bare && self.k > 0 => Choice::Candle,
            9..=32 => Choice::Kernel(Kernel::Tile { gated, rows: 32 }),
            _ => Choice::Kernel(Kernel::Tile { gated, rows: 64 }),
        }
    }

    /// Threadgroups of `kernel`.
    pub(super) fn grid(&self, kernel: Kernel) -> [usize; 3] {
        let features = |weight_rows: usize| if self.glu.is_some() { weight_rows / 2 } else { weight_rows };
        match kernel {
            Kernel::Decode { rows, .. } => {
                [self.columns.div_ceil(SIMDGROUPS * features(WEIGHT_ROWS)), self.rows.div_ceil(rows), 1]
            }
            Kernel::Tile { rows, .. } => {
                let tiles = self.rows.div_ceil(rows);
                [tiles.min(RASTER), self.columns.div_ceil(features(TILE_COLUMNS)), tiles.div_ceil(RASTER)]
            }
            Kernel::Glu | Kernel::GluGradient => [0; 3],
        }
    }

    /// Whether each row of x and w, which begin at these elements, is whole 16 B chunks at multiples of 4 elements.
    pub(super) fn is_aligned(&self, dtype: DType, offsets: [usize; 2]) -> bool {
        self.k.is_multiple_of(16 / dtype.size_in_bytes()) && offsets.iter().all(|offset| offset.is_multiple_of(4))
    }

    /// None if a size does not fit.
    pub(super) fn parameters(&self) -> Option<ProductParameters> {
        Some(ProductParameters {
            rows: size(self.rows)?,
            columns: size(self.columns)?,
            k: size(self.k)?,
            has_bias: self.has_bias.into(),
            factor: self.factor,
            glu: GluParameters::new(&self.glu.unwrap_or(Glu::new(GluActivation::Identity))),
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
    glu: GluParameters,
}

/// `Glu` of swiglu.metal.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct GluParameters {
    activation: u32,
    beta: f32,
    modified: u32,
    limited: u32,
    gate_multiplier: f32,
    limit: f32,
    up_offset: f32,
}

impl GluParameters {
    fn new(op: &Glu) -> Self {
        let (activation, beta) = match op.activation {
            GluActivation::Silu => (0, 1.0),
            GluActivation::Swish { beta } => (0, beta),
            GluActivation::Sigmoid => (1, 1.0),
            GluActivation::Relu => (2, 1.0),
            GluActivation::Gelu => (3, 1.0),
            GluActivation::GeluTanh => (4, 1.0),
            GluActivation::Identity => (5, 1.0),
        };
        Self {
            activation,
            beta,
            modified: (!op.is_plain()).into(),
            limited: op.limit.is_some().into(),
            gate_multiplier: op.gate_multiplier,
            limit: op.limit.unwrap_or(f32::INFINITY),
            up_offset: op.up_offset,
        }
    }
}

/// Two or three operands of one shape, seen as rows and columns.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Pair {
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// (of rows, of columns), per operand
    strides: Vec<(usize, usize)>,
}

impl Pair {
    /// None if they have more than two dimensions that cannot be merged, or a number that is too large.
    pub(super) fn new(layouts: &[&Layout]) -> Option<Self> {
        let dims = layouts.first()?.dims();
        let mut merged: Vec<(usize, Vec<usize>)> = vec![];
        for (i, &n) in dims.iter().enumerate().filter(|&(_, &n)| n != 1) {
            let strides: Vec<usize> = layouts.iter().map(|layout| layout.stride()[i]).collect();
            match merged.last_mut() {
                Some((outer, before)) if before.iter().zip(&strides).all(|(b, s)| *b == s * n) => {
                    (*outer, *before) = (*outer * n, strides);
                }
                _ => merged.push((n, strides)),
            }
        }
        let one = || (1, vec![1; layouts.len()]);
        let (outer, inner) = match <[_; 2]>::try_from(merged) {
            Ok([outer, inner]) => (outer, inner),
            Err(mut rest) if rest.len() < 2 => (one(), rest.pop().unwrap_or_else(one)),
            Err(_) => return None,
        };
        let strides: Vec<_> = outer.1.into_iter().zip(inner.1).collect();
        let fits = strides.iter().all(|&(row, column)| u32::try_from(row.max(column)).is_ok());
        (fits && size(outer.0).is_some() && size(inner.0).is_some()).then_some(Self {
            rows: outer.0,
            columns: inner.0,
            strides,
        })
    }

    pub(super) fn grid(&self) -> [usize; 3] {
        [self.columns.div_ceil(THREADS * ELEMENTS), self.rows, 1]
    }

    /// Whether four elements at a time can be read of every operand, from these offsets on.
    pub(super) fn is_aligned(&self, offsets: &[usize]) -> bool {
        let four = |n: usize| n.is_multiple_of(ELEMENTS);
        let whole = |&(row, column): &(usize, usize)| column == 1 && (four(row) || self.rows == 1);
        four(self.columns) && self.strides.iter().all(whole) && offsets.iter().all(|&offset| four(offset))
    }

    pub(super) fn parameters(&self, op: &Glu) -> PairParameters {
        let stride = |i: usize| {
            let (row, column) = self.strides.get(i).copied().unwrap_or((0, 0));
            (row as u32, column as u32) // `new` has looked
        };
        let ((gate_row, gate_column), (up_row, up_column), (dy_row, dy_column)) = (stride(0), stride(1), stride(2));
        let (rows, columns, glu) = (self.rows as u32, self.columns as u32, GluParameters::new(op));
        PairParameters { rows, columns, gate_row, gate_column, up_row, up_column, dy_row, dy_column, glu }
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
    glu: GluParameters,
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
