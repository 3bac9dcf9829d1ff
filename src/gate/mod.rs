//! The gate's definitions that every device uses: the activations and the formula, their numbers
//! and arithmetic on GPUs, and the layout of the operands. `glu_mul.rs` has the public operations.

pub(crate) mod activation;
#[cfg(any(feature = "cuda", feature = "metal", test))]
pub(crate) mod params;
#[cfg(any(feature = "cuda", feature = "metal", test))]
pub(crate) mod rows;

use candle_core::{Layout, Shape};

pub use activation::{Glu, GluActivation};

/// The shape (2, …) of both gradients in one tensor.
pub(crate) fn pair_of(layout: &Layout) -> Shape {
    Shape::from(std::iter::once(2).chain(layout.dims().iter().copied()).collect::<Vec<_>>())
}
