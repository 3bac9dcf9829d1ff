//! The block.

use candle_core::{D, Tensor};
use candle_nn::{Module, VarBuilder};

use crate::config::FfnConfig;
use crate::cpu;
use crate::error::{Error, Result};
use crate::glu::{Glu, check_float, check_same};
use crate::linear::{Linear, over_rows};
use crate::weights::{GateUp, PackedOrder, Weights};

/// The SwiGLU feed-forward block, `y = (silu(x·Wgᵀ) ⊙ (x·Wuᵀ))·Wdᵀ`, and its relatives ([`FfnConfig`]).
///
/// # Shapes
/// x (…,H) of any rank ≥ 1 and any layout -> y (…,H) in x's dtype. gate_proj, up_proj (I,H), down_proj (H,I).
///
/// # Accuracy
/// Products are candle's matmuls. Between them the gate is computed in f32 (f64 for f64) and rounded once ([`crate::glu_mul`]).
///
/// # Training
/// Every step is differentiable. Weights from a `VarMap` are used where they lie, so an optimizer's steps are seen.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Module, VarBuilder, VarMap};
/// use candle_swiglu::{FfnConfig, SwiGluFfn};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let ffn = SwiGluFfn::new(&FfnConfig::new(8, 24), vb.pp("mlp"))?;
/// let x = Tensor::randn(0f32, 1.0, (2, 5, 8), &Device::Cpu)?;
/// let y = ffn.forward(&x)?;
/// assert_eq!(y.dims(), [2, 5, 8]);
/// let gradients = y.sqr()?.sum_all()?.backward()?;
/// assert!(vars.all_vars().iter().all(|var| gradients.get(var).is_some()));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct SwiGluFfn {
    hidden_size: usize,
    intermediate_size: usize,
    glu: Glu,
    gate_up: Projections,
    down: Linear,
    down_multiplier: f32,
    kernel: String,
    span: tracing::Span,
}

/// gate and up, by two products or by one
#[derive(Clone, Debug)]
enum Projections {
    Separate { gate: Linear, up: Linear },
    Packed { gate_up: Linear, order: PackedOrder },
}

impl SwiGluFfn {
    /// Loads the weights under `vb`'s prefix (`model.layers.0.mlp`, `layers.0.feed_forward`, ...); their names and layout are
    /// detected, see [`crate::Family`]. From an empty `VarMap` they are created under the names of `Family::Llama`.
    ///
    /// # Errors
    /// A size of zero, a missing tensor, another shape, names that fit several families, a bias that the config does not ask for.
    pub fn new(cfg: &FfnConfig, vb: VarBuilder) -> Result<Self> {
        check_sizes(cfg)?;
        Self::from_weights(cfg, Weights::load(cfg, &vb)?)
    }

    /// SwiGLU without biases from gate_proj (I,H), up_proj (I,H), down_proj (H,I).
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_nn::Module;
    /// let row = |v: &[f32]| Tensor::new(v, &Device::Cpu)?.reshape((1, 2));
    /// let down = Tensor::new(&[[1f32], [2.0]], &Device::Cpu)?;
    /// let ffn = candle_swiglu::SwiGluFfn::from_tensors(row(&[100.0, 0.0])?, row(&[0.0, 1.0])?, down)?;
    /// let y = ffn.forward(&Tensor::new(&[1f32, 3.0], &Device::Cpu)?)?; // h = silu(100)·3 = 300
    /// assert_eq!(y.to_vec1::<f32>()?, [300.0, 600.0]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// Wrong ranks, shapes that do not fit, a dtype that is not a float, mixed dtypes or devices.
    pub fn from_tensors(gate: Tensor, up: Tensor, down: Tensor) -> Result<Self> {
        let Ok((intermediate_size, hidden_size)) = gate.dims2() else {
            return Err(Error::Rank { name: "gate_proj", expected: "rank 2 (I, H)", found: gate.dims().to_vec() });
        };
        let gate_up = GateUp::Separate { gate_proj: gate, up_proj: up, gate_bias: None, up_bias: None };
        let weights = Weights { gate_up, down_proj: down, down_bias: None };
        Self::from_weights(&FfnConfig::new(hidden_size, intermediate_size), weights)
    }

    /// From tensors in any of the layouts of [`GateUp`], with the formula of `cfg`. The tensors keep their storage; a view
    /// whose rows are not contiguous (every second row, say) is copied once, unless a gradient is tracked through it.
    ///
    /// # Errors
    /// As [`SwiGluFfn::from_tensors`], and biases where the config has none or none where it has them.
    pub fn from_weights(cfg: &FfnConfig, weights: Weights) -> Result<Self> {
        check_sizes(cfg)?;
        check_weights(cfg, &weights)?;
        let cpu = weights.down_proj.device().is_cpu();
        let gate_up = match weights.gate_up {
            GateUp::Separate { gate_proj, up_proj, gate_bias, up_bias } => Projections::Separate {
                gate: Linear::from_tensors(gate_proj, gate_bias)?,
                up: Linear::from_tensors(up_proj, up_bias)?,
            },
            GateUp::Packed { gate_up_proj, bias, order } => {
                Projections::Packed { gate_up: Linear::from_tensors(gate_up_proj, bias)?, order }
            }
        };
        Ok(Self {
            hidden_size: cfg.hidden_size,
            intermediate_size: cfg.intermediate_size,
            glu: cfg.glu(),
            gate_up,
            down: Linear::from_tensors(weights.down_proj, weights.down_bias)?,
            down_multiplier: cfg.down_multiplier,
            kernel: if cpu { format!("plain-{}", cpu::best().name) } else { "plain".to_string() },
            span: tracing::span!(tracing::Level::TRACE, "swiglu-ffn"),
        })
    }

    /// The name of the kernel that will run: `plain-<instruction set>` on the CPU (candle's matmuls around the fused gate
    /// in that instruction set), `plain` on other devices (candle's operations).
    pub fn kernel(&self) -> &str {
        &self.kernel
    }

    /// H
    pub fn hidden_size(&self) -> usize {
        self.hidden_size
    }

    /// I
    pub fn intermediate_size(&self) -> usize {
        self.intermediate_size
    }

    /// x (M,H) -> y (M,H)
    fn forward_rows(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (gate, up) = self.gate_up.forward(x)?; // (M,I) each
        let h = self.glu.mul(&gate, &up)?;
        drop((gate, up));
        let y = self.down.project(&h)?;
        if self.down_multiplier == 1.0 { Ok(y) } else { y * f64::from(self.down_multiplier) }
    }
}

impl Module for SwiGluFfn {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let _enter = self.span.enter();
        over_rows(x, self.hidden_size, self.hidden_size, self.down.weight(), |rows| self.forward_rows(rows))
    }
}

impl Projections {
    /// x (M,H) -> gate (M,I), up (M,I); views of one product when packed
    fn forward(&self, x: &Tensor) -> candle_core::Result<(Tensor, Tensor)> {
        let (gate_up, order) = match self {
            Self::Separate { gate, up } => return Ok((gate.project(x)?, up.project(x)?)),
            Self::Packed { gate_up, order } => (gate_up.project(x)?, order), // (M,2I)
        };
        let i = gate_up.dim(D::Minus1)? / 2;
        let half = |start| gate_up.narrow(D::Minus1, start, i);
        match order {
            PackedOrder::GateFirst => Ok((half(0)?, half(i)?)),
            PackedOrder::UpFirst => Ok((half(i)?, half(0)?)),
            PackedOrder::Interleaved => {
                let pairs = gate_up.reshape(((), i, 2))?;
                Ok((pairs.narrow(2, 0, 1)?.squeeze(2)?, pairs.narrow(2, 1, 1)?.squeeze(2)?))
            }
        }
    }
}

fn check_sizes(cfg: &FfnConfig) -> Result<()> {
    for (name, size) in [("hidden_size", cfg.hidden_size), ("intermediate_size", cfg.intermediate_size)] {
        if size == 0 {
            return Err(Error::ZeroSize { name });
        }
    }
    Ok(())
}

fn check_weights(cfg: &FfnConfig, weights: &Weights) -> Result<()> {
    for (name, tensor, expected) in weights.expected(cfg) {
        if tensor.rank() != expected.len() {
            let expected = if expected.len() == 2 { "rank 2 (out, in)" } else { "rank 1 (out)" };
            return Err(Error::Rank { name, expected, found: tensor.dims().to_vec() });
        }
        if tensor.dims() != expected {
            return Err(Error::Shape { name: name.to_string(), expected, found: tensor.dims().to_vec(), location: None });
        }
        check_float(name, tensor)?;
        check_same(name, tensor, "down_proj", &weights.down_proj)?;
    }
    check_biases(cfg, weights)
}

fn check_biases(cfg: &FfnConfig, weights: &Weights) -> Result<()> {
    let gate_up = match &weights.gate_up {
        GateUp::Separate { gate_bias, up_bias, .. } => vec![("gate_proj", gate_bias), ("up_proj", up_bias)],
        GateUp::Packed { bias, .. } => vec![("gate_up_proj", bias)],
    };
    for (name, bias) in gate_up.into_iter().chain([("down_proj", &weights.down_bias)]) {
        match bias {
            Some(_) if !cfg.bias => return Err(Error::UnexpectedBias { name: format!("{name}.bias") }),
            None if cfg.bias => {
                let tried = vec![format!("{name}.bias")];
                return Err(Error::MissingTensor { prefix: String::new(), tried, present: vec![], location: None });
            }
            _ => {}
        }
    }
    Ok(())
}
