//! Rotary position embedding as transformers computes it: the frequencies in f32, step by step in the same order, so that
//! the tables agree to the last bit or nearly so.

use std::f64::consts::PI;

use candle_core::{DType, Device, Result, Tensor};

use super::config::{LlamaConfig, RopeScaling};

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
