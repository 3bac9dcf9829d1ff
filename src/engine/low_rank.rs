//! Low-rank pairs in the form in which the CPU kernels add them.

use candle_core::{DType, Tensor};

use super::is_tracked;
use crate::lora::Lora;

/// The addend (x·Aᵀ)·Bᵀ of one product, without a graph: A (r,in), and B (out,r), with its scale,
/// for each of the product's matrices. r is the sum of the ranks of its pairs.
#[derive(Debug)]
pub(super) struct Addend {
    pub(super) a: Tensor,
    pub(super) b: Vec<Tensor>,
}

impl Addend {
    /// The addend of these pairs in `dtype`; none if there are none. `b_factor` multiplies the
    /// scale.
    ///
    /// The product has a matrix for each element of `pairs`. All of them multiply the same u: B of
    /// a matrix is zero at the k of the others.
    pub(super) fn new(
        pairs: &[Option<Lora>],
        rows: usize,
        dtype: DType,
        b_factor: f64,
    ) -> candle_core::Result<Option<Self>> {
        let all: Vec<&Lora> = pairs.iter().flatten().collect();
        let Some(first) = all.first() else { return Ok(None) };
        let device = first.a().device().clone();
        let a: Vec<Tensor> = all
            .iter()
            .map(|pair| pair.a().detach().to_dtype(dtype))
            .collect::<candle_core::Result<_>>()?;
        let ranks: usize = all.iter().map(|pair| rank(pair)).sum();
        let (mut b, mut start) = (vec![], 0);
        for pair in pairs {
            let Some(pair) = pair else {
                b.push(Tensor::zeros((rows, ranks), dtype, &device)?);
                continue;
            };
            let scaled = scaled(pair, dtype, b_factor)?;
            let end = start + rank(pair);
            b.push(scaled.pad_with_zeros(1, start, ranks - end)?);
            start = end;
        }
        Ok(Some(Self { a: Tensor::cat(&a, 0)?, b }))
    }
}

/// s·factor·B in `dtype`, rounded once.
fn scaled(pair: &Lora, dtype: DType, factor: f64) -> candle_core::Result<Tensor> {
    let b = pair.b().detach();
    let wide = if b.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    (b.to_dtype(wide)? * (pair.scale() * factor))?.to_dtype(dtype)
}

/// r
pub(super) fn rank(pair: &Lora) -> usize {
    pair.b().dims()[1]
}

/// A gradient is tracked through a pair.
pub(super) fn are_tracked(pairs: &[Option<Lora>]) -> bool {
    pairs.iter().flatten().any(|pair| is_tracked(pair.a()) || is_tracked(pair.b()))
}
