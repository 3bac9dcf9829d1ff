//! Code that the integration tests share: golden files, deterministic numbers, comparisons,
//! candle's own operations, and the oracle ([`Block`]).

#![allow(dead_code, unused_imports)] // each test binary uses some of it

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_swiglu::{FfnConfig, FusedOrder, GluActivation};

mod oracle;
pub(crate) use oracle::{Block, glu_of, glu_units, slope_size};

// ---------------------------------------------------------------- golden files

/// `tests/golden`
pub(crate) fn golden_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// One safetensors file with its metadata.
pub(crate) struct Golden {
    /// `folder/file` without the extension
    pub(crate) name: String,
    pub(crate) tensors: HashMap<String, Tensor>,
    metadata: HashMap<String, String>,
}

impl Golden {
    pub(crate) fn load(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).with_context(|| format!("{}", path.display()))?;
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes)?;
        let name = path.strip_prefix(golden_dir()).unwrap_or(path).with_extension("");
        Ok(Self {
            name: name.display().to_string(),
            tensors: candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)?,
            metadata: header.metadata().clone().unwrap_or_default(),
        })
    }

    /// Every file of `tests/golden/<folder>`, sorted by name. It is an error if there are not
    /// `expected` files.
    pub(crate) fn folder(folder: &str, expected: usize) -> Result<Vec<Self>> {
        let entries =
            std::fs::read_dir(golden_dir().join(folder))?.collect::<std::io::Result<Vec<_>>>()?;
        let mut paths: Vec<PathBuf> = entries.into_iter().map(|entry| entry.path()).collect();
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
        paths.sort();
        ensure!(
            paths.len() == expected,
            "golden/{folder}: expected {expected} files, found {}",
            paths.len()
        );
        paths.iter().map(|path| Self::load(path)).collect()
    }

    pub(crate) fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).with_context(|| format!("{}: no tensor {name}", self.name))
    }

    /// A metadata string.
    pub(crate) fn text(&self, key: &str) -> Result<&str> {
        Ok(self.metadata.get(key).with_context(|| format!("{}: no metadata {key}", self.name))?)
    }

    /// The metadata `config`: the keys of the model's config.json.
    pub(crate) fn config(&self) -> Result<serde_json::Value> {
        Ok(serde_json::from_str(self.text("config")?)?)
    }

    /// The metadata `dtype`.
    pub(crate) fn dtype(&self) -> Result<DType> {
        Ok(self.text("dtype")?.parse()?)
    }
}

// ---------------------------------------------------------------- processes

/// A command that starts this test program again. TEST_RUNNER, if it is set, names a program that
/// runs programs of this target.
pub(crate) fn this_program() -> Result<Command> {
    let program = std::env::current_exe()?;
    let runner = std::env::var("TEST_RUNNER").unwrap_or_default();
    let mut words = runner.split_whitespace();
    Ok(match words.next() {
        Some(first) => {
            let mut command = Command::new(first);
            command.args(words).arg(program);
            command
        }
        None => Command::new(program),
    })
}

// ---------------------------------------------------------------- numbers

pub(crate) const FLOATS: [DType; 4] = [DType::F64, DType::F32, DType::BF16, DType::F16];

/// Every activation, and Swish with a negative slope.
pub(crate) const ACTIVATIONS: [GluActivation; GluActivation::ALL.len() + 1] = {
    let mut all = [GluActivation::Swish { beta: -0.5 }; GluActivation::ALL.len() + 1];
    let mut i = 0;
    while i < GluActivation::ALL.len() {
        all[i] = GluActivation::ALL[i];
        i += 1;
    }
    all
};

/// Half of the distance from 1 to the next number.
pub(crate) fn unit_roundoff(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 2f64.powi(-53),
        DType::F32 => 2f64.powi(-24),
        DType::F16 => 2f64.powi(-11),
        _ => 2f64.powi(-8), // bf16
    }
}

/// The random number generator SplitMix64.
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A multiple of 2⁻¹⁵ in [-1, 1).
    pub(crate) fn next(&mut self) -> f64 {
        (self.bits() >> 48) as f64 / 32768.0 - 1.0
    }

    /// Uniform in [-scale, scale), rounded to `dtype`.
    pub(crate) fn tensor(&mut self, dims: &[usize], scale: f64, dtype: DType) -> Result<Tensor> {
        let n = dims.iter().product();
        let values: Vec<f64> = (0..n).map(|_| scale * self.next()).collect();
        Ok(Tensor::from_vec(values, dims, &Device::Cpu)?.to_dtype(dtype)?)
    }
}

/// Integers in -2..=2. Sums of their products are exact in any order, so results can be compared
/// bit by bit.
pub(crate) fn integers(numbers: &mut Numbers, dims: &[usize], dtype: DType) -> Result<Tensor> {
    Ok(numbers.tensor(dims, 2.5, DType::F64)?.round()?.clamp(-2.0, 2.0)?.to_dtype(dtype)?)
}

/// Weights of a block with separate projections, and its biases, under the names of Hugging Face's
/// LLaMA. A uniform weight in ±√(3/n) has the variance 1/n, so that products have the size of their
/// inputs.
pub(crate) fn weights(
    cfg: &FfnConfig,
    numbers: &mut Numbers,
    dtype: DType,
) -> Result<HashMap<String, Tensor>> {
    let (h, i) = (cfg.hidden_size, cfg.intermediate_size);
    let mut all = HashMap::new();
    let biases = [cfg.biases.gate, cfg.biases.up, cfg.biases.down];
    for ((name, out_dim, in_dim), bias) in
        [("gate_proj", i, h), ("up_proj", i, h), ("down_proj", h, i)].into_iter().zip(biases)
    {
        let scale = (3.0 / in_dim as f64).sqrt();
        all.insert(format!("{name}.weight"), numbers.tensor(&[out_dim, in_dim], scale, dtype)?);
        if bias {
            all.insert(format!("{name}.bias"), numbers.tensor(&[out_dim], 0.5, dtype)?);
        }
    }
    Ok(all)
}

/// The elements in row-major order, widened exactly to f64.
pub(crate) fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

/// The bits of the widened elements, which are equal for equal tensors. Zeros of different sign
/// differ.
pub(crate) fn bits(tensor: &Tensor) -> Result<Vec<u64>> {
    Ok(values(tensor)?.into_iter().map(f64::to_bits).collect())
}

// ---------------------------------------------------------------- comparisons

/// The root mean square of the differences.
pub(crate) fn rms_error(found: &[f64], exact: &[f64]) -> f64 {
    let sum: f64 = found.iter().zip(exact).map(|(f, e)| (f - e).powi(2)).sum();
    (sum / found.len() as f64).sqrt()
}

/// The largest difference.
pub(crate) fn max_error(found: &[f64], exact: &[f64]) -> f64 {
    found
        .iter()
        .zip(exact)
        .map(|(f, e)| (f - e).abs())
        .fold(0.0, |worst, e| if e > worst || e.is_nan() { e } else { worst })
}

/// Fails unless |found - expected| <= bound for every element. Returns the largest error in units
/// of its bound.
pub(crate) fn check_within(
    what: &str,
    found: &Tensor,
    expected: &[f64],
    bounds: &[f64],
) -> Result<f64> {
    let found = values(found)?;
    ensure!(
        found.len() == expected.len() && found.len() == bounds.len(),
        "{what}: found {} elements, expected {}",
        found.len(),
        expected.len()
    );
    let mut worst = 0f64;
    for (i, ((&found, &expected), &bound)) in found.iter().zip(expected).zip(bounds).enumerate() {
        let error = (found - expected).abs();
        ensure!(
            error <= bound,
            "{what}: element {i}: {found}, expected {expected}: error {error:e}, bound {bound:e}"
        );
        worst = worst.max(if error == 0.0 { 0.0 } else { error / bound });
    }
    Ok(worst)
}

// ---------------------------------------------------------------- the same in candle's operations

/// act(gate) ⊙ up
pub(crate) fn composed(
    activation: GluActivation,
    gate: &Tensor,
    up: &Tensor,
) -> candle_core::Result<Tensor> {
    let act = match activation {
        GluActivation::Silu => gate.silu()?,
        GluActivation::Swish { beta } => {
            (gate * candle_nn::ops::sigmoid(&(gate * f64::from(beta))?)?)?
        }
        GluActivation::Sigmoid => candle_nn::ops::sigmoid(gate)?,
        GluActivation::Relu => gate.relu()?,
        GluActivation::Gelu => gate.gelu_erf()?,
        GluActivation::GeluTanh => gate.gelu()?,
        GluActivation::Identity => gate.clone(),
        GluActivation::Relu2 => gate.relu()?.sqr()?,
        other => candle_core::bail!("no operations for {other}"),
    };
    act * up
}

/// gate (I,…), up (I,…) -> (2I,…)
pub(crate) fn pack(gate: &Tensor, up: &Tensor, order: FusedOrder) -> candle_core::Result<Tensor> {
    match order {
        FusedOrder::GateFirst => Tensor::cat(&[gate, up], 0),
        FusedOrder::UpFirst => Tensor::cat(&[up, gate], 0),
        FusedOrder::Interleaved => Tensor::stack(&[gate, up], 1)?.flatten(0, 1),
        other => candle_core::bail!("no packing for {other:?}"),
    }
}
