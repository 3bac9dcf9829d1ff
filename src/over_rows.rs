//! Accepts inputs of any rank and any float dtype for layers that compute rows (M, in) of one
//! dtype.

use candle_core::{DType, Device, Tensor};

use crate::check::{check_float, check_like};
use crate::error::Error;

/// Applies a layer to x (…,in) of any float dtype -> y (…,out) in x's dtype, computed in the wider
/// dtype of x and the weights.
/// `forward` computes rows (M,in) in the dtype of the layer. `convert` makes the layer in a wider
/// dtype.
/// dtype.
pub(crate) fn over_rows<L>(
    layer: &L,
    x: &Tensor,
    sizes: (usize, usize),
    (dtype, device): (DType, &Device),
    convert: impl FnOnce(DType) -> candle_core::Result<L>,
    forward: impl FnOnce(&L, &Tensor) -> candle_core::Result<Tensor>,
) -> candle_core::Result<Tensor> {
    check_float("x", x)?;
    let wide = wider(x.dtype(), dtype);
    if x.dtype() == dtype {
        rows(x, sizes, dtype, device, |x| forward(layer, x))
    } else if wide == dtype {
        rows(&x.to_dtype(wide)?, sizes, dtype, device, |x| forward(layer, x))?.to_dtype(x.dtype())
    } else {
        let layer = convert(wide)?;
        rows(&x.to_dtype(wide)?, sizes, wide, device, |x| forward(&layer, x))?.to_dtype(x.dtype())
    }
}

/// The dtype that holds every value of both: f32 for f16 and bf16.
pub(crate) fn wider(a: DType, b: DType) -> DType {
    match (a, b) {
        _ if a == b => a,
        (DType::F64, _) | (_, DType::F64) => DType::F64,
        _ => DType::F32,
    }
}

/// Flattens x (…,in) to (M,in), applies `f` -> (M,out), and restores x's leading dimensions.
///
/// # Errors
/// x is a scalar, or its last dimension, dtype or device differs from the layer's.
pub(crate) fn rows(
    x: &Tensor,
    (in_dim, out_dim): (usize, usize),
    dtype: DType,
    device: &Device,
    f: impl FnOnce(&Tensor) -> candle_core::Result<Tensor>,
) -> candle_core::Result<Tensor> {
    let mut dims = x.dims().to_vec();
    match dims.last_mut() {
        None => {
            return Err(Error::Rank { name: "x", expected: "rank 1 or more", found: vec![] }.into());
        }
        Some(width) if *width != in_dim => {
            return Err(Error::InputWidth { expected: in_dim, found: x.dims().to_vec() }.into());
        }
        Some(width) => *width = out_dim,
    }
    check_like("x", x, "the weights", dtype, device)?;
    if x.elem_count() == 0 {
        return Tensor::zeros(dims, x.dtype(), x.device());
    }
    if x.rank() == 2 {
        return f(x);
    }
    f(&x.reshape(((), in_dim))?)?.reshape(dims)
}
