//! The residual connections.

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, WithDType, bail};
use half::{bf16, f16};

use super::rows::{Real, for_each_row, slice, vectorized};

/// x + y, both (..,H). For f16 and bf16 on the CPU it runs on all threads and in the vectors of
/// this machine: candle's sum takes half as long as all products of a prompt on AMX.
pub fn add(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let halves = x.dtype() == y.dtype() && matches!(x.dtype(), DType::F16 | DType::BF16);
    if halves && x.device().is_cpu() && !x.track_op() && !y.track_op() {
        x.contiguous()?.apply_op2_no_bwd(&y.contiguous()?, &Add)
    } else {
        x + y
    }
}

struct Add;

impl CustomOp2 for Add {
    fn name(&self) -> &'static str {
        "residual"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        y: &CpuStorage,
        ly: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if lx.shape() != ly.shape() {
            bail!("residual: expected two of one shape, found {:?} and {:?}", lx.dims(), ly.dims())
        }
        let width = lx.dims().last().copied().unwrap_or(1);
        let sum = match x {
            CpuStorage::BF16(_) => {
                bf16::to_cpu_storage_owned(rows::<bf16>(slice(x, lx)?, slice(y, ly)?, width))
            }
            CpuStorage::F16(_) => {
                f16::to_cpu_storage_owned(rows::<f16>(slice(x, lx)?, slice(y, ly)?, width))
            }
            _ => bail!("residual: expected f16 or bf16"),
        };
        Ok((sum, lx.shape().clone()))
    }
}

/// x + y (rows, width)
fn rows<T: Real>(x: &[T], y: &[T], width: usize) -> Vec<T> {
    let mut sum = vec![T::zero(); x.len()];
    for_each_row(&mut sum, width, width, |row, out| {
        let part = row * width..(row + 1) * width;
        vectorized(
            #[inline(always)]
            || add_row(&x[part.clone()], &y[part.clone()], out),
        );
    });
    sum
}

/// Elements that are widened at a time.
const BLOCK: usize = 256;

#[inline(always)]
fn add_row<T: Real>(x: &[T], y: &[T], sum: &mut [T]) {
    let (mut a, mut b) = ([0f32; BLOCK], [0f32; BLOCK]);
    let parts = x.chunks(BLOCK).zip(y.chunks(BLOCK)).zip(sum.chunks_mut(BLOCK));
    for ((x, y), sum) in parts {
        let (a, b) = (&mut a[..x.len()], &mut b[..x.len()]);
        T::widen(x, a);
        T::widen(y, b);
        a.iter_mut().zip(b.iter()).for_each(|(a, b)| *a += *b);
        T::round(a, sum);
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn sums_are_those_of_candle() -> Result<()> {
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            for shape in [(1, 1), (3, 255), (2, 256), (5, 1000), (300, 577)] {
                let random = || Tensor::randn(0f32, 1.0, shape, &Device::Cpu)?.to_dtype(dtype);
                let (x, y) = (random()?, random()?);
                let difference = (add(&x, &y)? - (&x + &y)?)?.to_dtype(DType::F32)?;
                assert_eq!(difference.abs()?.max_all()?.to_scalar::<f32>()?, 0.0);
            }
        }
        Ok(())
    }
}
