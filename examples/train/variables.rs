//! The variables of a model, and their initial values.

use std::collections::BTreeMap;

use anyhow::Result;
use candle_core::{Device, Tensor, Var};
use candle_nn::VarMap;
use rand::rngs::StdRng;
use rand_distr::{Distribution, Normal};

/// The variables, sorted by name.
pub(crate) fn by_name(vars: &VarMap) -> BTreeMap<String, Var> {
    let data = vars.data().lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    data.iter().map(|(name, var)| (name.clone(), var.clone())).collect()
}

/// Draws a matrix from N(0, 0.04²). The standard deviation of matrices that write into the residual
/// stream is divided by √(2·layers). Norms are left as they are, at 1.
pub(crate) fn draw(name: &str, var: &Var, layers: usize, random: &mut StdRng) -> Result<()> {
    let [rows, columns] = var.dims()[..] else { return Ok(()) };
    let residual = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
    let divisor = if residual { (2.0 * layers as f32).sqrt() } else { 1.0 };
    let normal = Normal::new(0f32, 0.04 / divisor)?;
    let values: Vec<f32> = (0..rows * columns).map(|_| normal.sample(random)).collect();
    Ok(var.set(&Tensor::from_vec(values, (rows, columns), &Device::Cpu)?)?)
}
