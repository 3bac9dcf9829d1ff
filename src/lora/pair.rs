//! The low-rank pair of one projection.

use candle_core::{DType, Device, Tensor};
use candle_nn::{Init, VarBuilder};

use super::config::LoraConfig;
use crate::check::{check_float, check_same};
use crate::error::{Error, Result};
use crate::load::get;

/// The adapter of a projection W (out,in): `y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ` with A (r,in) and B (out,r).
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_swiglu::Lora;
/// let a = Tensor::new(&[[1f32, 2.0, 3.0]], &Device::Cpu)?; // (1,3)
/// let b = Tensor::new(&[[10f32], [100.0]], &Device::Cpu)?; // (2,1)
/// let lora = Lora::new(a, b, 0.5, 0.0)?;
/// assert_eq!(lora.delta()?.to_vec2::<f32>()?, [[5.0, 10.0, 15.0], [50.0, 100.0, 150.0]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Lora {
    /// A (r,in)
    pub(crate) a: Tensor,
    /// B (out,r)
    pub(crate) b: Tensor,
    /// s
    pub(crate) scale: f64,
    /// The probability of dropping an element of x before A in training.
    pub(crate) dropout: f32,
}

impl Lora {
    /// The pair A (r,in) and B (out,r) with the scale s and the dropout of training. Neither is
    /// copied, so variables stay variables.
    ///
    /// # Errors
    /// Another rank than 2; different r; a size of zero; a dtype that is not a float; different
    /// dtypes or devices; a scale that is not finite; a dropout outside 0 to 1.
    pub fn new(a: Tensor, b: Tensor, scale: f64, dropout: f32) -> Result<Self> {
        for (name, tensor) in [("lora_A", &a), ("lora_B", &b)] {
            if tensor.rank() != 2 {
                let (expected, found) = ("rank 2", tensor.dims().to_vec());
                return Err(Error::Rank { name, expected, found });
            }
            if tensor.elem_count() == 0 {
                return Err(Error::ZeroSize { name });
            }
            check_float(name, tensor)?;
        }
        let (r, out_dim) = (a.dim(0)?, b.dim(0)?);
        if b.dim(1)? != r {
            let (expected, found) = (vec![out_dim, r], b.dims().to_vec());
            let name = "lora_B".to_string();
            return Err(Error::Shape { name, expected, found, location: None });
        }
        check_same("lora_B", &b, "lora_A", &a)?;
        let invalid = |field: &str, expected, found: String| {
            Err(Error::InvalidField { field: field.to_string(), expected, found })
        };
        if !scale.is_finite() {
            return invalid("scale", "a finite number", scale.to_string());
        }
        if !(0.0..=1.0).contains(&dropout) {
            return invalid("lora_dropout", "a number from 0 to 1", dropout.to_string());
        }
        Ok(Self { a, b, scale, dropout })
    }

    /// The pair for the module of this name, with `lora_A.weight` and `lora_B.weight` under `vb`'s
    /// prefix. In a `VarMap` they become variables with PEFT's initialisation: A uniform in
    /// ±1/√in_dim, B zero, so that an untrained adapter changes nothing.
    ///
    /// # Errors
    /// As [`Lora::new`] and [`LoraConfig::rank`]; a tensor that is missing or has another shape.
    pub fn init(
        in_dim: usize,
        out_dim: usize,
        config: &LoraConfig,
        module: &str,
        vb: VarBuilder,
    ) -> Result<Self> {
        config.validate()?;
        let sizes = [("in_dim", in_dim), ("out_dim", out_dim)];
        if let Some((name, _)) = sizes.into_iter().find(|(_, size)| *size == 0) {
            return Err(Error::ZeroSize { name });
        }
        let r = config.rank(module)?;
        // Kaiming's uniform bound for a slope of √5: √(6 / ((1 + 5)·in)).
        let bound = 1.0 / (in_dim as f64).sqrt();
        let uniform = Init::Uniform { lo: -bound, up: bound };
        let a = get(&vb, &[r, in_dim], "lora_A.weight", uniform)?;
        let b = get(&vb, &[out_dim, r], "lora_B.weight", Init::Const(0.0))?;
        Self::new(a, b, config.scaling(module)?, config.lora_dropout as f32)
    }

    /// A (r,in)
    pub fn a(&self) -> &Tensor {
        &self.a
    }

    /// B (out,r)
    pub fn b(&self) -> &Tensor {
        &self.b
    }

    /// The scale s.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// The probability of dropping an element of x before A in training.
    pub fn dropout(&self) -> f32 {
        self.dropout
    }

    /// (out, r, in)
    fn sizes(&self) -> Result<(usize, usize, usize)> {
        let (r, in_dim) = self.a.dims2()?;
        Ok((self.b.dim(0)?, r, in_dim))
    }

    /// The change of W, `s·B·A` (out,in), in the pair's dtype. It is a constant: no gradient is
    /// tracked through it.
    ///
    /// # Accuracy
    /// On the CPU the product is a chain of r fused multiply-adds in f32 (f64 for a pair in f64),
    /// in order, then multiplied by s and rounded to the pair's dtype. PEFT computes the same bits
    /// with PyTorch for the CPU where that sums in this order, which was observed up to r = 257. On
    /// other devices it is candle's matmul.
    ///
    /// # Errors
    /// Those of candle.
    pub fn delta(&self) -> Result<Tensor> {
        let (a, b) = (self.a.detach(), self.b.detach());
        if !matches!(a.device(), Device::Cpu) {
            return Ok((b.matmul(&a)? * self.scale)?);
        }
        let sizes = self.sizes()?;
        let delta = match a.dtype() {
            DType::F64 => {
                let (a, b) = (flat::<f64>(&a)?, flat::<f64>(&b)?);
                let mut delta = product(&b, &a, sizes, f64::mul_add);
                delta.iter_mut().for_each(|value| *value *= self.scale);
                Tensor::from_vec(delta, (sizes.0, sizes.2), &Device::Cpu)?
            }
            _ => {
                let (a, b) = (flat::<f32>(&a)?, flat::<f32>(&b)?);
                let mut delta = product(&b, &a, sizes, f32::mul_add);
                delta.iter_mut().for_each(|value| *value *= self.scale as f32);
                Tensor::from_vec(delta, (sizes.0, sizes.2), &Device::Cpu)?
            }
        };
        Ok(delta.to_dtype(self.a.dtype())?)
    }

    /// `weight + s·B·A` for a weight (out,in), in the weight's dtype, as PEFT's `merge` computes
    /// it: the sum of the weight and [`Lora::delta`] in f32 (f64 if one of them is), rounded once.
    /// The result is a constant.
    ///
    /// # Errors
    /// A weight of another shape, on another device, or of a dtype that is not a float.
    pub fn merge(&self, weight: &Tensor) -> Result<Tensor> {
        self.check_weight(weight)?;
        let (dtype, delta) = (weight.dtype(), self.delta()?);
        let wide = wide(dtype, delta.dtype());
        let sum = (weight.detach().to_dtype(wide)? + delta.to_dtype(wide)?)?;
        Ok(sum.to_dtype(dtype)?)
    }

    /// `weight - s·B·A`, as PEFT's `unmerge` computes it: [`Lora::delta`] is rounded to the
    /// weight's dtype first. Rounding makes the result of merging and unmerging differ from the
    /// original by up to one unit in the last place of the larger of the two weights.
    ///
    /// # Errors
    /// As [`Lora::merge`].
    pub fn unmerge(&self, weight: &Tensor) -> Result<Tensor> {
        self.check_weight(weight)?;
        let dtype = weight.dtype();
        let wide = wide(dtype, dtype);
        let delta = self.delta()?.to_dtype(dtype)?.to_dtype(wide)?;
        Ok((weight.detach().to_dtype(wide)? - delta)?.to_dtype(dtype)?)
    }

    fn check_weight(&self, weight: &Tensor) -> Result<()> {
        let (out_dim, _, in_dim) = self.sizes()?;
        if weight.dims() != [out_dim, in_dim] {
            let (expected, found) = (vec![out_dim, in_dim], weight.dims().to_vec());
            let name = "weight".to_string();
            return Err(Error::Shape { name, expected, found, location: None });
        }
        check_float("weight", weight)?;
        let (expected, found) = (self.a.device().location(), weight.device().location());
        if expected != found {
            let (name, other) = ("weight", "lora_A");
            return Err(Error::DeviceMismatch { name, other, expected, found });
        }
        Ok(())
    }
}

/// The dtype in which two dtypes are added.
fn wide(a: DType, b: DType) -> DType {
    if a == DType::F64 || b == DType::F64 { DType::F64 } else { DType::F32 }
}

fn flat<T: candle_core::WithDType>(tensor: &Tensor) -> Result<Vec<T>> {
    Ok(tensor.to_dtype(T::DTYPE)?.flatten_all()?.to_vec1()?)
}

/// b (out,r) · a (r,in) -> (out,in): for each element one chain of fused multiply-adds over r.
fn product<T: Copy + Default>(
    b: &[T],
    a: &[T],
    (out_dim, r, in_dim): (usize, usize, usize),
    mul_add: impl Fn(T, T, T) -> T,
) -> Vec<T> {
    let mut all = vec![T::default(); out_dim * in_dim];
    for (sums, b) in all.chunks_exact_mut(in_dim).zip(b.chunks_exact(r)) {
        for (b, a) in b.iter().zip(a.chunks_exact(in_dim)) {
            sums.iter_mut().zip(a).for_each(|(sum, a)| *sum = mul_add(*b, *a, *sum));
        }
    }
    all
}
