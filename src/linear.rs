//! One projection, `y = x·Wᵀ + b`.

use candle_core::Tensor;
use candle_nn::{Module, VarBuilder};

use crate::error::{Error, Result};
use crate::glu::{check_float, check_same};
use crate::weights::load_projection;

/// A linear layer `y = x·Wᵀ + b` with W (out, in) and an optional b (out).
///
/// # Shapes
/// x (…, in) of any rank ≥ 1 and any layout -> y (…, out) in x's dtype.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_nn::Module;
/// let weight = Tensor::new(&[[1f32, 2.0], [3.0, 4.0], [5.0, 6.0]], &Device::Cpu)?;
/// let layer = candle_swiglu::Linear::from_tensors(weight, None)?;
/// let y = layer.forward(&Tensor::new(&[10f32, 100.0], &Device::Cpu)?)?;
/// assert_eq!(y.to_vec1::<f32>()?, [210.0, 430.0, 650.0]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
}

impl Linear {
    /// Loads `weight` (out_dim, in_dim) and, if it is there, `bias` (out_dim) under `vb`'s prefix. A `VarMap` gets no bias.
    ///
    /// # Errors
    /// No such tensor, or another shape.
    pub fn new(in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<Self> {
        let (weight, bias) = load_projection(&vb, out_dim, in_dim, None)?;
        Self::from_tensors(weight, bias)
    }

    /// As [`Linear::new`], but the bias must be there (`true`) or must not (`false`).
    ///
    /// # Errors
    /// No such tensor, another shape, or a bias that was not asked for.
    pub fn with_bias(in_dim: usize, out_dim: usize, bias: bool, vb: VarBuilder) -> Result<Self> {
        let (weight, bias) = load_projection(&vb, out_dim, in_dim, Some(bias))?;
        Self::from_tensors(weight, bias)
    }

    /// From weight (out, in) and bias (out), which keep their storage, and their gradients if they have any.
    ///
    /// # Errors
    /// Wrong rank, shapes that do not fit, a dtype that is not a float, mixed dtypes or devices.
    pub fn from_tensors(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        let Ok((out_dim, _)) = weight.dims2() else {
            return Err(Error::Rank { name: "weight", expected: "rank 2 (out, in)", found: weight.dims().to_vec() });
        };
        check_float("weight", &weight)?;
        if let Some(bias) = &bias {
            if bias.dims() != [out_dim] {
                let found = bias.dims().to_vec();
                return Err(Error::Shape { name: "bias".into(), expected: vec![out_dim], found, location: None });
            }
            check_same("bias", bias, "weight", &weight)?;
        }
        Ok(Self { weight: Weight::new(weight)?, bias })
    }

    /// W (out, in)
    pub fn weight(&self) -> &Tensor {
        &self.weight.0
    }

    /// b (out)
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// x (M,in) -> y (M,out)
    pub(crate) fn project(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let y = self.weight.product(x)?;
        self.bias.as_ref().map_or(Ok(y.clone()), |bias| y.broadcast_add(bias))
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (out_dim, in_dim) = self.weight.0.dims2()?;
        over_rows(x, in_dim, out_dim, &self.weight.0, |rows| self.project(rows))
    }
}

/// A weight in a layout that candle's matmul takes as it lies.
#[derive(Clone, Debug)]
struct Weight(Tensor);

impl Weight {
    /// Copies the weight once if its strides are neither those of a matrix nor of its transpose, and no gradient is tracked
    /// through it (a copy would no longer follow the optimizer's steps).
    fn new(weight: Tensor) -> Result<Self> {
        let plain = is_matrix(&weight) || weight.is_variable() || weight.track_op();
        Ok(Self(if plain { weight } else { weight.contiguous()? }))
    }

    /// x (M,in) · W (out,in)ᵀ -> (M,out)
    fn product(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        if is_matrix(&self.0) { x.matmul(&self.0.t()?) } else { x.matmul(&self.0.contiguous()?.t()?) }
    }
}

/// Row-major, possibly with a gap between the rows, or the transpose of that: what a GEMM takes.
fn is_matrix(weight: &Tensor) -> bool {
    matches!((weight.stride(), weight.dims()), (&[rows, columns], &[m, n])
        if (columns == 1 && rows >= n) || (rows == 1 && columns >= m))
}

/// Flattens x (…,in) to (M,in), applies `f` -> (M,out), and gives it x's leading dimensions back.
pub(crate) fn over_rows(
    x: &Tensor,
    in_dim: usize,
    out_dim: usize,
    weight: &Tensor,
    f: impl FnOnce(&Tensor) -> candle_core::Result<Tensor>,
) -> candle_core::Result<Tensor> {
    check_input(x, in_dim, weight)?;
    let mut dims = x.dims().to_vec();
    let last = dims.len() - 1;
    dims[last] = out_dim;
    if x.elem_count() == 0 {
        return Tensor::zeros(dims, x.dtype(), x.device());
    }
    f(&x.reshape(((), in_dim))?)?.reshape(dims)
}

fn check_input(x: &Tensor, in_dim: usize, weight: &Tensor) -> Result<()> {
    match x.dims().last() {
        None => Err(Error::Rank { name: "x", expected: "rank 1 or more", found: vec![] }),
        Some(&width) if width != in_dim => Err(Error::InputWidth { expected: in_dim, found: x.dims().to_vec() }),
        Some(_) => check_same("x", x, "the weights", weight),
    }
}
