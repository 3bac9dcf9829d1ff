//! Rotary position embedding as transformers computes it: the frequencies in f32, step by step in the same order, so that
//! the tables agree to the last bit or nearly so.

use std::f64::consts::PI;

use candle_core::{CpuStorage, CustomOp3, DType, Device, Layout, Result, Shape, Tensor, WithDType, bail};
use candle_nn::rotary_emb;
use half::{bf16, f16};

use super::config::{LlamaConfig, RopeScaling};
use super::rows::{Real, for_each_row, slice, vectorized};

/// The frequency of each pair of a head: `1 / theta^(2i / head_dim)`, stretched as the config says.
pub fn inv_freq(cfg: &LlamaConfig) -> Vec<f32> {
    let plain = (0..cfg.head_dim / 2).map(|i| {
        let exponent = (2 * i) as f32 / cfg.head_dim as f32;
        // f64 only so that the power is rounded once
        1.0 / cfg.rope.theta.powf(f64::from(exponent)) as f32
    });
    match cfg.rope.scaling {
        RopeScaling::None => plain.collect(),
        RopeScaling::Linear { factor } => plain.map(|freq| freq / factor as f32).collect(),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            let context = original_max_position_embeddings as f64;
            plain.map(|freq| llama3(freq, factor as f32, low_freq_factor, high_freq_factor, context)).collect()
        }
    }
}

/// Waves longer than `context / low` are slowed down by `factor`, those shorter than `context / high` are kept, and
/// between the two the frequency is interpolated.
fn llama3(freq: f32, factor: f32, low: f64, high: f64, context: f64) -> f32 {
    let wavelength = (2.0 * PI) as f32 / freq;
    if wavelength > (context / low) as f32 {
        freq / factor
    } else if wavelength < (context / high) as f32 {
        freq
    } else {
        let smooth = (context as f32 / wavelength - low as f32) / (high - low) as f32;
        (1.0 - smooth) * freq / factor + smooth * freq
    }
}

/// cos and sin of every position below `len`: (len, head_dim / 2) each, rounded to `model_dtype` (as transformers does)
/// and handed out in `dtype`, the one that attention computes in.
pub fn tables(inv_freq: &[f32], len: usize, model_dtype: DType, dtype: DType, device: &Device) -> Result<(Tensor, Tensor)> {
    let angles: Vec<f32> = (0..len).flat_map(|p| inv_freq.iter().map(move |freq| p as f32 * freq)).collect();
    let table =
        |values: Vec<f32>| Tensor::from_vec(values, (len, inv_freq.len()), device)?.to_dtype(model_dtype)?.to_dtype(dtype);
    let cos = table(angles.iter().map(|angle| angle.cos()).collect())?;
    let sin = table(angles.iter().map(|angle| angle.sin()).collect())?;
    Ok((cos, sin))
}

/// x (B,T,H,D) -> (B,H,T,D): the two halves of a head turned against each other by the angles of its position, of which cos and sin are
/// (T, D/2). On the CPU, where no gradient is asked for, in the dtype of x; else in that of cos and sin.
pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let dtype = cos.dtype();
    if x.track_op() {
        // the fused operations have no gradient
        return rotary_emb::rope_slow(&x.to_dtype(dtype)?.transpose(1, 2)?.contiguous()?, cos, sin);
    }
    let y = match x.device().is_cpu() && dtype == DType::F32 {
        true => x.contiguous()?.apply_op3_no_bwd(cos, sin, &Rotate)?,
        false => rotary_emb::rope_thd(&x.to_dtype(dtype)?, cos, sin)?,
    };
    y.transpose(1, 2)
}

/// x (B,T,H,D) -> the same, turned.
struct Rotate;

impl CustomOp3 for Rotate {
    fn name(&self) -> &'static str {
        "rotate"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        cos: &CpuStorage,
        lcos: &Layout,
        sin: &CpuStorage,
        lsin: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, len, heads, head_dim) = lx.shape().dims4()?;
        let tables = (slice(cos, lcos)?, slice(sin, lsin)?);
        if tables.0.len() != len * head_dim / 2 || tables.1.len() != tables.0.len() {
            bail!(
                "rotary tables: expected {len} positions of {} angles, found {:?} and {:?}",
                head_dim / 2,
                lcos.shape(),
                lsin.shape()
            )
        }
        let y = match x {
            CpuStorage::F32(_) => f32::to_cpu_storage_owned(turned(slice::<f32>(x, lx)?, tables, heads, head_dim / 2)),
            CpuStorage::BF16(_) => bf16::to_cpu_storage_owned(turned(slice::<bf16>(x, lx)?, tables, heads, head_dim / 2)),
            CpuStorage::F16(_) => f16::to_cpu_storage_owned(turned(slice::<f16>(x, lx)?, tables, heads, head_dim / 2)),
            _ => bail!("rotary embedding: expected f32, bf16 or f16"),
        };
        Ok((y, lx.shape().clone()))
    }
}

/// x ((positions,H), 2·half), tables of the angles of T positions, after which they begin anew
fn turned<T: Real>(x: &[T], (cos, sin): (&[f32], &[f32]), heads: usize, half: usize) -> Vec<T> {
    let mut y = vec![T::zero(); x.len()];
    let row = 2 * half * heads;
    for_each_row(&mut y, row, 4 * row, |position, y| {
        let x = &x[position * row..][..row];
        let start = position * half % cos.len();
        let (cos, sin) = (&cos[start..][..half], &sin[start..][..half]);
        vectorized(
            #[inline(always)]
            || turn(x, (cos, sin), y),
        );
    });
    y
}

/// x and y (H, 2·half) of one position
#[inline(always)]
fn turn<T: Real>(x: &[T], (cos, sin): (&[f32], &[f32]), y: &mut [T]) {
    let mut wide = vec![0f32; x.len()];
    T::widen(x, &mut wide);
    for head in wide.chunks_exact_mut(2 * cos.len()) {
        let (x0, x1) = head.split_at_mut(cos.len());
        for ((x0, x1), (cos, sin)) in x0.iter_mut().zip(x1).zip(cos.iter().zip(sin)) {
            (*x0, *x1) = (*x0 * cos - *x1 * sin, *x0 * sin + *x1 * cos);
        }
    }
    T::round(&wide, y);
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;

    /// What has no gradient against what has one, in two texts.
    #[test]
    fn turns_as_the_composition_does() -> Result<()> {
        let (batch, len, heads, head_dim) = (2, 5, 3, 12);
        let inv_freq: Vec<f32> = (0..head_dim / 2).map(|i| 0.5f32.powf(i as f32)).collect();
        let (cos, sin) = tables(&inv_freq, len, DType::F32, DType::F32, &Device::Cpu)?;
        let x: Vec<f32> = (0..batch * len * heads * head_dim).map(|i| (i * 37 % 101) as f32 / 16.0 - 3.0).collect();
        // |y| < 8, so half a unit in its last place
        for (dtype, bound) in [(DType::F32, 0.0), (DType::BF16, 2f32.powi(-6)), (DType::F16, 2f32.powi(-9))] {
            let x = Tensor::from_slice(&x, (batch, len, heads, head_dim), &Device::Cpu)?.to_dtype(dtype)?;
            let (found, expected) = (rotate(&x, &cos, &sin)?, rotate(Var::from_tensor(&x)?.as_tensor(), &cos, &sin)?);
            assert_eq!((found.dims(), found.dtype()), (expected.dims(), dtype));
            let error = (found.to_dtype(DType::F32)? - expected)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            assert!(error <= bound + 1e-6, "{dtype:?}: {error}");
        }
        // the tables of another number of positions
        let x = Tensor::zeros((1, len + 1, heads, head_dim), DType::F32, &Device::Cpu)?;
        assert!(rotate(&x, &cos, &sin).is_err());
        Ok(())
    }
}
