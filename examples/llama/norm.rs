//! RMS norm, rounded where transformers rounds.

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, WithDType, bail};
use candle_nn::{Init, Module, RmsNorm, VarBuilder};
use half::{bf16, f16};

use super::rows::{Real, dot, for_each_row, slice, vectorized};

/// y = round(x / sqrt(mean(x²) + eps)) * weight, with the quotient in f32
#[derive(Debug, Clone)]
pub struct Norm {
    inner: RmsNorm,
    eps: f64,
}

impl Norm {
    /// `weight` (size) under `vb`'s prefix.
    pub fn load(size: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints(size, "weight", Init::Const(1.0))?;
        Ok(Self { inner: RmsNorm::new(weight, eps), eps })
    }

    /// x (..,size) -> (..,size)
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let _span = tracing::trace_span!("rms-norm").entered();
        let weight = self.inner.weight();
        let halves = matches!(weight.dtype(), DType::F16 | DType::BF16);
        match (halves, weight.device().is_cpu()) {
            // None of the fused operations has a gradient.
            _ if x.track_op() || weight.track_op() => self.inner.forward_diff(x),
            // On the CPU candle's fused operation multiplies f16 and bf16 by the weight before it
            // rounds.
            (true, true) => {
                x.contiguous()?.apply_op2_no_bwd(weight, &RoundedNorm { eps: self.eps as f32 })
            }
            (true, false) => self.inner.forward(x),
            (false, _) if weight.dtype() == DType::F32 => self.inner.forward(x),
            // Candle's fused operation has no f64.
            (false, _) => self.inner.forward_diff(x),
        }
    }
}

struct RoundedNorm {
    eps: f32,
}

impl CustomOp2 for RoundedNorm {
    fn name(&self) -> &'static str {
        "rounded-rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let y = match x {
            CpuStorage::BF16(_) => {
                bf16::to_cpu_storage_owned(self.rows::<bf16>(slice(x, lx)?, slice(w, lw)?))
            }
            CpuStorage::F16(_) => {
                f16::to_cpu_storage_owned(self.rows::<f16>(slice(x, lx)?, slice(w, lw)?))
            }
            _ => bail!("rms norm: expected f16 or bf16"),
        };
        Ok((y, lx.shape().clone()))
    }
}

impl RoundedNorm {
    /// x ((rows,H), H), weight (H) -> (rows,H)
    fn rows<T: Real>(&self, x: &[T], weight: &[T]) -> Vec<T> {
        let hidden = weight.len();
        let mut wide = vec![0f32; hidden];
        T::widen(weight, &mut wide);
        let mut y = vec![T::zero(); x.len()];
        for_each_row(&mut y, hidden, 4 * hidden, |row, y| {
            let x = &x[row * hidden..][..hidden];
            vectorized(
                #[inline(always)]
                || norm_row(x, &wide, self.eps, y),
            );
        });
        y
    }
}

#[inline(always)]
fn norm_row<T: Real>(x: &[T], weight: &[f32], eps: f32, y: &mut [T]) {
    let mut wide = vec![0f32; x.len()];
    T::widen(x, &mut wide);
    let root = (dot(&wide, &wide) / x.len() as f32 + eps).sqrt();
    wide.iter_mut().for_each(|x| *x /= root);
    T::round(&wide, y);
    T::widen(y, &mut wide);
    wide.iter_mut().zip(weight).for_each(|(x, weight)| *x *= weight);
    T::round(&wide, y);
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// The two differ in the order of a sum, and therefore by one unit in the last place where a
    /// quotient is close enough to the middle of two values.
    #[test]
    fn rounds_where_the_composition_does() -> Result<()> {
        for (dtype, unit) in [(DType::BF16, 2f32.powi(-7)), (DType::F16, 2f32.powi(-10))] {
            for hidden in [1, 15, 16, 100, 2048] {
                let x: Vec<f32> =
                    (0..3 * hidden).map(|i| (i * 37 % 101) as f32 / 16.0 - 3.0).collect();
                let x = Tensor::from_vec(x, (3, hidden), &Device::Cpu)?.to_dtype(dtype)?;
                let weight: Vec<f32> =
                    (0..hidden).map(|i| 0.5 + (i * 13 % 29) as f32 / 16.0).collect();
                let weight = Tensor::from_vec(weight, hidden, &Device::Cpu)?.to_dtype(dtype)?;
                let norm = Norm { inner: RmsNorm::new(weight, 1e-5), eps: 1e-5 };
                let values = |y: Tensor| y.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
                let (found, expected) =
                    (values(norm.forward(&x)?)?, values(norm.inner.forward_diff(&x)?)?);
                let off = found.iter().zip(&expected).filter(|(a, b)| a != b).count();
                assert!(
                    off * 100 <= found.len(),
                    "{dtype:?} {hidden}: {off} of {} values differ",
                    found.len()
                );
                for (a, b) in found.iter().zip(&expected) {
                    // One unit of the quotient, and one of the product.
                    assert!((a - b).abs() <= 2.0 * unit * b.abs(), "{dtype:?} {hidden}: {a} {b}");
                }
            }
        }
        Ok(())
    }
}
