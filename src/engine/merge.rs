//! Merging: low-rank pairs as a change of the weights.

use candle_core::{DType, Device, Tensor, WithDType};

use super::{Projection, cpu};
use crate::check::check_float;
use crate::error::{Error, Result};
use crate::forced;
use crate::lora::Lora;

impl Lora {
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
        let (out_dim, r, in_dim) = self.sizes()?;
        let delta = if a.dtype() == DType::F64 {
            let product = product(&flat(&b)?, &flat(&a)?, (out_dim, r, in_dim), f64::mul_add);
            scaled(product, self.scale)
        } else {
            let (a, b) = (a.to_dtype(DType::F32)?, b.to_dtype(DType::F32)?);
            let product = match has_one_chain(r)? {
                true => flat(&cpu::Linear::new(&a.t()?, None)?.forward(&b)?)?,
                false => product(&flat(&b)?, &flat(&a)?, (out_dim, r, in_dim), f32::mul_add),
            };
            scaled(product, self.scale as f32)
        }?;
        let delta = delta.reshape((out_dim, in_dim))?;
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

/// How many products of f32 the kernels with a fused multiply-add sum as one chain.
const ONE_CHAIN: usize = 128;

/// The kernels sum r products as one chain of fused multiply-adds.
fn has_one_chain(r: usize) -> Result<bool> {
    let fused = ["avx512", "avx2", "neon"].contains(&crate::cpu::selected()?.name_of(DType::F32));
    Ok(r <= ONE_CHAIN && fused && !forced::is_plain())
}

fn flat<T: WithDType>(tensor: &Tensor) -> Result<Vec<T>> {
    Ok(tensor.flatten_all()?.to_vec1()?)
}

fn scaled<T: WithDType + std::ops::MulAssign>(mut values: Vec<T>, scale: T) -> Result<Tensor> {
    values.iter_mut().for_each(|value| *value *= scale);
    let len = values.len();
    Ok(Tensor::from_vec(values, len, &Device::Cpu)?)
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
