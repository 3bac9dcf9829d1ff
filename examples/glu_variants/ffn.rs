//! A feed-forward block with or without a gate, from candle's operations around [`glu_mul`], which
//! can keep what it computes.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{D, Result, Tensor, Var};
use candle_nn::{Module, VarBuilder};
use candle_swiglu::{GluActivation, Linear, glu_mul, linear_no_bias};

use crate::model::Mlp;
use crate::settings::Settings;
use crate::variant::Variant;

/// The passes of one layer.
pub(crate) type Passes = Arc<Mutex<Vec<Pass>>>;

/// What a block computed in one forward pass.
#[derive(Debug)]
pub(crate) struct Pass {
    /// (B,T,units): the input of the activation.
    pub(crate) pre: Tensor,
    /// Zeros that were added to `pre`: the gradient of this variable is that of `pre`.
    pub(crate) zero: Var,
    /// (B,T,units): the input of down_proj.
    pub(crate) hidden: Tensor,
}

/// `y = (act(x·Wgᵀ) ⊙ (x·Wuᵀ))·Wdᵀ`, or `y = act(x·Wuᵀ)·Wdᵀ` without a gate.
#[derive(Debug)]
pub(crate) struct Ffn {
    activation: GluActivation,
    /// The projection to the input of the activation: `gate_proj`, or `up_proj` without a gate.
    pre: Linear,
    /// `up_proj` of a block with a gate.
    factor: Option<Linear>,
    down_proj: Linear,
    passes: Option<Passes>,
}

impl Ffn {
    /// Loads `gate_proj`, `up_proj` and `down_proj` under `vb`'s prefix. With `passes`, every
    /// forward pass adds to them.
    pub(crate) fn load(
        variant: Variant,
        settings: &Settings,
        vb: VarBuilder,
        passes: Option<Passes>,
    ) -> Result<Self> {
        let (hidden, units) = (settings.hidden_size, variant.units(settings.intermediate_size));
        let up = |name| linear_no_bias(hidden, units, vb.pp(name));
        let (pre, factor) = match variant.is_gated() {
            true => (up("gate_proj")?, Some(up("up_proj")?)),
            false => (up("up_proj")?, None),
        };
        let down_proj = linear_no_bias(units, hidden, vb.pp("down_proj"))?;
        Ok(Self { activation: variant.activation(), pre, factor, down_proj, passes })
    }
}

impl Module for Ffn {
    /// x (B,T,H) -> (B,T,H)
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut pre = self.pre.forward(x)?;
        let zero = match self.passes {
            Some(_) => Some(Var::zeros(pre.shape(), pre.dtype(), pre.device())?),
            None => None,
        };
        if let Some(zero) = &zero {
            pre = (pre + zero.as_tensor())?;
        }
        let factor = self.factor.as_ref().map(|up_proj| up_proj.forward(x)).transpose()?;
        let hidden = activate(self.activation, &pre, factor.as_ref())?;
        if let (Some(passes), Some(zero)) = (&self.passes, zero) {
            let pass = Pass { pre: pre.detach(), zero, hidden: hidden.detach() };
            passes.lock().unwrap_or_else(PoisonError::into_inner).push(pass);
        }
        self.down_proj.forward(&hidden)
    }
}

/// `act(pre) ⊙ factor`, or `act(pre)`, as a product with a row of ones.
pub(crate) fn activate(
    activation: GluActivation,
    pre: &Tensor,
    factor: Option<&Tensor>,
) -> Result<Tensor> {
    let ones = || {
        let row = Tensor::ones(pre.dim(D::Minus1)?, pre.dtype(), pre.device())?;
        row.broadcast_as(pre.shape())
    };
    Ok(glu_mul(activation, pre, &factor.cloned().map_or_else(ones, Ok)?)?)
}

impl Mlp for Ffn {
    fn kernel(&self) -> &str {
        self.down_proj.kernel()
    }
}
