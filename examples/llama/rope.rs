//! Rotary position embedding. The frequencies are computed in f32 in the same order as in
//! transformers, so that the tables agree to the last bit or nearly so.

use std::f64::consts::PI;

use candle_core::{
    CpuStorage, CustomOp3, D, DType, Device, Layout, Result, Shape, Tensor, WithDType, bail,
};
use candle_nn::rotary_emb;
use half::{bf16, f16};

use super::config::{RopeConfig, RopeScaling};
use super::rows::{Real, for_each_row, slice, vectorized};

/// The rotary frequencies, one for each pair of a head: `1 / theta^(2i / dim)`, scaled according to
/// the config.
#[derive(Debug)]
pub struct Frequencies {
    inv_freq: Vec<f32>,
    /// The frequencies of texts with more than this number of positions, if they differ.
    long: Option<(usize, Vec<f32>)>,
    /// The factor of cos and sin.
    scale: f32,
}

impl Frequencies {
    pub fn new(rope: &RopeConfig) -> Self {
        // f64, so that the power is rounded only once.
        let power = |i: usize| rope.theta.powf(f64::from((2 * i) as f32 / rope.dim as f32)) as f32;
        let plain = || (0..rope.dim.div_ceil(2)).map(|i| 1.0 / power(i));
        let (inv_freq, long, scale) = match &rope.scaling {
            RopeScaling::None => (plain().collect(), None, 1.0),
            RopeScaling::Linear { factor } => {
                (plain().map(|freq| freq / *factor as f32).collect(), None, 1.0)
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let context = *original_max_position_embeddings as f64;
                let stretched = plain().map(|freq| {
                    llama3(freq, *factor as f32, *low_freq_factor, *high_freq_factor, context)
                });
                (stretched.collect(), None, 1.0)
            }
            RopeScaling::LongRope {
                short,
                long,
                original_max_position_embeddings,
                attention_factor,
            } => {
                let divided = |factors: &[f64]| {
                    factors
                        .iter()
                        .enumerate()
                        .map(|(i, factor)| 1.0 / (*factor as f32 * power(i)))
                        .collect::<Vec<_>>()
                };
                (
                    divided(short),
                    Some((*original_max_position_embeddings, divided(long))),
                    *attention_factor as f32,
                )
            }
        };
        Self { inv_freq, long, scale }
    }

    /// Whether a text of `len` positions uses the frequencies of long texts.
    pub fn is_long(&self, len: usize) -> bool {
        self.long.as_ref().is_some_and(|(original, _)| len > *original)
    }

    /// Whether long texts have other frequencies than short ones.
    pub fn depend_on_length(&self) -> bool {
        self.long.is_some()
    }

    /// cos and sin of every position below `len`: (len, pairs) each. They are rounded to
    /// `model_dtype`, as in transformers, and returned in `dtype`, in which attention computes.
    pub fn tables(
        &self,
        is_long: bool,
        len: usize,
        model_dtype: DType,
        dtype: DType,
        device: &Device,
    ) -> Result<(Tensor, Tensor)> {
        let inv_freq = match &self.long {
            Some((_, long)) if is_long => long,
            _ => &self.inv_freq,
        };
        let angles: Vec<f32> =
            (0..len).flat_map(|p| inv_freq.iter().map(move |freq| p as f32 * freq)).collect();
        let table = |of: fn(f32) -> f32| {
            let values: Vec<f32> = angles.iter().map(|&angle| of(angle) * self.scale).collect();
            Tensor::from_vec(values, (len, inv_freq.len()), device)?
                .to_dtype(model_dtype)?
                .to_dtype(dtype)
        };
        Ok((table(f32::cos)?, table(f32::sin)?))
    }
}

/// The frequencies of waves longer than `context / low` are divided by `factor`, those of waves
/// shorter than `context / high` are kept, and those between are interpolated.
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

/// x (B,T,H,D) -> (B,H,T,D): rotates the two halves of the first R values of each head by the
/// angles of the position. The other values are copied. cos and sin are (T, R/2). On the CPU
/// without a gradient the result has the dtype of x, else that of cos and sin.
pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let dtype = cos.dtype();
    if x.device().is_cpu() && dtype == DType::F32 && !x.track_op() {
        return x.contiguous()?.apply_op3_no_bwd(cos, sin, &Rotate)?.transpose(1, 2);
    }
    let (head_dim, turned) = (x.dim(D::Minus1)?, 2 * cos.dim(1)?);
    if turned < head_dim {
        let rest = x.narrow(3, turned, head_dim - turned)?.to_dtype(dtype)?.transpose(1, 2)?;
        return Tensor::cat(&[&turn_all(&x.narrow(3, 0, turned)?, cos, sin)?, &rest], 3);
    }
    turn_all(x, cos, sin)
}

/// [`rotate`] for R = D, with candle's operations.
fn turn_all(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let x = x.to_dtype(cos.dtype())?;
    match x.track_op() {
        // The fused operation has no gradient.
        true => rotary_emb::rope_slow(&x.transpose(1, 2)?.contiguous()?, cos, sin),
        false => rotary_emb::rope_thd(&x.contiguous()?, cos, sin)?.transpose(1, 2),
    }
}

/// The fused rotation on the CPU: x (B,T,H,D) -> (B,T,H,D).
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
        let half = lcos.dims().last().copied().unwrap_or(0);
        if tables.0.len() != len * half
            || tables.1.len() != tables.0.len()
            || half == 0
            || 2 * half > head_dim
        {
            bail!(
                "rotary tables: expected {len} positions of up to {} angles, found {:?} and {:?}",
                head_dim / 2,
                lcos.shape(),
                lsin.shape()
            )
        }
        let sizes = (heads, head_dim, half);
        let y = match x {
            CpuStorage::F32(_) => {
                f32::to_cpu_storage_owned(turned(slice::<f32>(x, lx)?, tables, sizes))
            }
            CpuStorage::BF16(_) => {
                bf16::to_cpu_storage_owned(turned(slice::<bf16>(x, lx)?, tables, sizes))
            }
            CpuStorage::F16(_) => {
                f16::to_cpu_storage_owned(turned(slice::<f16>(x, lx)?, tables, sizes))
            }
            _ => bail!("rotary embedding: expected f32, bf16 or f16"),
        };
        Ok((y, lx.shape().clone()))
    }
}

/// x ((positions,H), D). The tables have `half` angles of T positions and repeat after that.
fn turned<T: Real>(
    x: &[T],
    (cos, sin): (&[f32], &[f32]),
    (heads, head_dim, half): (usize, usize, usize),
) -> Vec<T> {
    let mut y = vec![T::zero(); x.len()];
    let row = head_dim * heads;
    for_each_row(&mut y, row, 4 * row, |position, y| {
        let x = &x[position * row..][..row];
        let start = position * half % cos.len();
        let (cos, sin) = (&cos[start..][..half], &sin[start..][..half]);
        vectorized(
            #[inline(always)]
            || turn(x, head_dim, (cos, sin), y),
        );
    });
    y
}

/// x and y (H, D) of one position
#[inline(always)]
fn turn<T: Real>(x: &[T], head_dim: usize, (cos, sin): (&[f32], &[f32]), y: &mut [T]) {
    let mut wide = vec![0f32; x.len()];
    T::widen(x, &mut wide);
    for head in wide.chunks_exact_mut(head_dim) {
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

    fn config(dim: usize, scaling: RopeScaling) -> RopeConfig {
        RopeConfig { theta: 100.0, dim, scaling }
    }

    /// The fused operation against the one with a gradient, on two texts, with whole and partial
    /// rotation.
    #[test]
    fn turns_as_the_composition_does() -> Result<()> {
        let (batch, len, heads, head_dim) = (2, 5, 3, 12);
        let x: Vec<f32> = (0..batch * len * heads * head_dim)
            .map(|i| (i * 37 % 101) as f32 / 16.0 - 3.0)
            .collect();
        for dim in [head_dim, 7, 2] {
            let frequencies = Frequencies::new(&config(dim, RopeScaling::None));
            let (cos, sin) =
                frequencies.tables(false, len, DType::F32, DType::F32, &Device::Cpu)?;
            assert_eq!(cos.dims(), [len, dim.div_ceil(2)]);
            // |y| < 8, so the bound is half a unit in its last place.
            for (dtype, bound) in
                [(DType::F32, 0.0), (DType::BF16, 2f32.powi(-6)), (DType::F16, 2f32.powi(-9))]
            {
                let x = Tensor::from_slice(&x, (batch, len, heads, head_dim), &Device::Cpu)?
                    .to_dtype(dtype)?;
                let (found, expected) = (
                    rotate(&x, &cos, &sin)?,
                    rotate(Var::from_tensor(&x)?.as_tensor(), &cos, &sin)?,
                );
                assert_eq!((found.dims(), found.dtype()), (expected.dims(), dtype));
                let error = (found.to_dtype(DType::F32)? - expected)?
                    .abs()?
                    .flatten_all()?
                    .max(0)?
                    .to_scalar::<f32>()?;
                assert!(error <= bound + 1e-6, "{dim} of {head_dim}, {dtype:?}: {error}");
            }
            // Tables for another number of positions.
            let x = Tensor::zeros((1, len + 1, heads, head_dim), DType::F32, &Device::Cpu)?;
            assert!(rotate(&x, &cos, &sin).is_err());
        }
        Ok(())
    }

    #[test]
    fn long_texts_turn_by_other_frequencies() -> Result<()> {
        let scaling = RopeScaling::LongRope {
            short: vec![1.0, 2.0],
            long: vec![4.0, 8.0],
            original_max_position_embeddings: 10,
            attention_factor: 3.0,
        };
        let frequencies = Frequencies::new(&config(4, scaling));
        assert_eq!([9, 10, 11].map(|len| frequencies.is_long(len)), [false, false, true]);
        for (is_long, divisors) in [(false, [1.0, 2.0]), (true, [4.0, 8.0])] {
            let (cos, _) = frequencies.tables(is_long, 2, DType::F32, DType::F32, &Device::Cpu)?;
            let expected =
                [3.0 * f32::cos(1.0 / divisors[0]), 3.0 * f32::cos(1.0 / (10.0 * divisors[1]))];
            for (found, expected) in cos.get(1)?.to_vec1::<f32>()?.into_iter().zip(expected) {
                assert!(
                    (found - expected).abs() <= 1e-6,
                    "{is_long}: {found}, expected {expected}"
                );
            }
        }
        Ok(())
    }
}
