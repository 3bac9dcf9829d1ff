//! Reads what a block computes from a Hugging Face `config.json`. A field that cannot be honoured
//! is an error that names it.

mod activations;
mod huggingface;
pub(crate) mod json;
mod model;
mod sizes;

use std::borrow::Cow;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::gate::activation::{Glu, GluActivation};
use crate::load::{Biases, Family, FusedOrder, Names, Wanted};
use model::Part;

/// The sizes and the formula of one block:
///
/// `y = d·((act(min(m·(x·Wgᵀ + bg), limit)) ⊙ (clamp(x·Wuᵀ + bu, ±limit) + c))·Wdᵀ + bd)`
///
/// With the defaults (SiLU, no bias, m = d = 1, no limit, c = 0) this is SwiGLU.
///
/// ```
/// use candle_swiglu::{FfnConfig, GluActivation};
/// let json = serde_json::json!({"hidden_size": 64, "intermediate_size": 176,
///     "hidden_act": "silu", "mlp_bias": true});
/// let cfg = FfnConfig::from_json(&json)?;
/// assert_eq!(cfg, FfnConfig::new(64, 176).with_bias(true));
/// assert_eq!(cfg.activation, GluActivation::Silu);
/// # Ok::<(), candle_swiglu::Error>(())
/// ```
///
/// A struct with a field `#[serde(flatten)] ffn: FfnConfig` must not have fields of its own that
/// the block reads too. serde passes to a flattened field only the entries that no other field has
/// consumed, so `hidden_size` would be missing. Read the block separately, from the same
/// [`serde_json::Value`]: `FfnConfig::from_json(&value)` and
/// `serde_json::from_value::<Model>(value)`.
#[derive(Clone, Debug, PartialEq, serde::Deserialize)]
#[serde(try_from = "Value")]
#[non_exhaustive]
pub struct FfnConfig {
    /// H, the size of x and y.
    pub hidden_size: usize,
    /// I, the size of gate, up and h.
    pub intermediate_size: usize,
    /// act, the activation of the gate.
    pub activation: GluActivation,
    /// Which projections have a bias.
    pub biases: Biases,
    /// m, the factor of gate; 1 by default (Falcon-H1's first `mlp_multipliers`).
    pub gate_multiplier: f32,
    /// d, the factor of the output; 1 by default (Falcon-H1's second `mlp_multipliers`).
    pub down_multiplier: f32,
    /// Upper bound of gate, and bound of up on both sides (gpt-oss's `swiglu_limit`).
    pub limit: Option<f32>,
    /// c, the offset of up; 0 by default (1 in gpt-oss).
    pub up_offset: f32,
    /// Names and layout of the weights. They are detected if this and `names` are `None`.
    pub family: Option<Family>,
    /// Names and layout of weights that belong to no [`Family`]; they take precedence over
    /// `family`.
    pub names: Option<Names>,
}

impl FfnConfig {
    /// SwiGLU of these sizes, without biases.
    pub fn new(hidden_size: usize, intermediate_size: usize) -> Self {
        Self {
            hidden_size,
            intermediate_size,
            activation: GluActivation::Silu,
            biases: Biases::NONE,
            gate_multiplier: 1.0,
            down_multiplier: 1.0,
            limit: None,
            up_offset: 0.0,
            family: None,
            names: None,
        }
    }

    /// Sets the gate's activation.
    pub fn with_activation(self, activation: GluActivation) -> Self {
        Self { activation, ..self }
    }

    /// Gives all three projections a bias, or none.
    pub fn with_bias(self, bias: bool) -> Self {
        self.with_biases(if bias { Biases::ALL } else { Biases::NONE })
    }

    /// Sets which projections have a bias.
    pub fn with_biases(self, biases: Biases) -> Self {
        Self { biases, ..self }
    }

    /// Multiplies gate by m and the output by d.
    pub fn with_multipliers(self, gate_multiplier: f32, down_multiplier: f32) -> Self {
        Self { gate_multiplier, down_multiplier, ..self }
    }

    /// Bounds gate from above and up on both sides.
    pub fn with_limit(self, limit: f32) -> Self {
        Self { limit: Some(limit), ..self }
    }

    /// Adds c to the bounded up.
    pub fn with_up_offset(self, up_offset: f32) -> Self {
        Self { up_offset, ..self }
    }

    /// Sets the family whose names and layout the weights have, instead of detecting it.
    pub fn with_family(self, family: Family) -> Self {
        Self { family: Some(family), ..self }
    }

    /// Sets the names of the three tensors, without `.weight`, for a checkpoint of no [`Family`].
    pub fn with_names(
        self,
        gate: impl Into<Cow<'static, str>>,
        up: impl Into<Cow<'static, str>>,
        down: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self { names: Some(Names::separate(gate, up, down)), ..self }
    }

    /// Sets the name of the tensor that holds gate_proj and up_proj, the order of its rows, and the
    /// name of down_proj's tensor.
    pub fn with_fused_names(
        self,
        gate_up: impl Into<Cow<'static, str>>,
        down: impl Into<Cow<'static, str>>,
        order: FusedOrder,
    ) -> Self {
        Self { names: Some(Names::fused(gate_up, down, order)), ..self }
    }

    /// The weights that a block of this config needs.
    pub(crate) fn wanted(&self) -> Wanted<'_> {
        Wanted {
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            biases: self.biases,
            family: self.family,
            names: self.names.as_ref(),
        }
    }

    /// The block that a Hugging Face `config.json` (or Meta's `params.json`) describes.
    ///
    /// | what | read from |
    /// |---|---|
    /// | model | `text_config`, `llm_config` or `language_config` with sizes, else the top level |
    /// | H | `hidden_size`, `d_model`, `dim`, `n_embd`, `model_dim` |
    /// | I | `intermediate_size`, `d_ff`, `ffn_hidden_size`, `hidden_dim`, `n_inner`, or by model type |
    /// | activation | the field that transformers 5.23 reads, else `hidden_act` or a similar field |
    /// | biases | `mlp_bias`, `no_bias`, `add_bias_linear`, `mlp_fc1_bias`, ERNIE's `use_bias` |
    /// | m, d | Falcon-H1's `mlp_multipliers` |
    /// | limit, c | `swiglu_limit` and `swiglu_alpha` of the model types that have them |
    /// | names | the model type, where the names alone do not tell the layout |
    ///
    /// Where a model type has several gated blocks, this is its dense one;
    /// [`Self::from_json_expert`] reads an expert. Fields that do not concern the block are
    /// ignored.
    ///
    /// # Errors
    /// A missing size; a field of the wrong type; an unknown activation; two fields that name
    /// different activations; a list of one value per layer whose values differ
    /// ([`Self::from_json_layer`] reads it); a field or a model type that changes the formula in a
    /// way this crate does not compute (quantized weights, activation sparsity, a limit on the
    /// result of the activation, a norm between the projections, no gate at all).
    pub fn from_json(json: &Value) -> Result<Self> {
        huggingface::read(json, None, Part::Dense)
    }

    /// The block of layer `layer`, counted from 0, where a config has one value per layer.
    ///
    /// ```
    /// use candle_swiglu::FfnConfig;
    /// let json = serde_json::json!({"hidden_size": 64, "intermediate_size": [128, 176]});
    /// assert!(FfnConfig::from_json(&json).is_err());
    /// assert_eq!(FfnConfig::from_json_layer(&json, 1)?, FfnConfig::new(64, 176));
    /// # Ok::<(), candle_swiglu::Error>(())
    /// ```
    ///
    /// # Errors
    /// The errors of [`Self::from_json`]; a list without an entry for the layer.
    pub fn from_json_layer(json: &Value, layer: usize) -> Result<Self> {
        huggingface::read(json, Some(layer), Part::Dense)
    }

    /// One expert of a mixture, read as in [`Self::from_json`] with two differences. I is read from
    /// `moe_intermediate_size` or `expert_ffn_hidden_size` if the config has one. The limit of
    /// model types that limit only their experts (HunYuan-V4) applies. A shared expert may have
    /// another I: set `intermediate_size` to it.
    ///
    /// ```
    /// use candle_swiglu::FfnConfig;
    /// let json = serde_json::json!({"model_type": "qwen3_moe", "hidden_size": 64,
    ///     "intermediate_size": 176, "moe_intermediate_size": 32});
    /// assert_eq!(FfnConfig::from_json_expert(&json)?, FfnConfig::new(64, 32));
    /// assert_eq!(FfnConfig::from_json(&json)?, FfnConfig::new(64, 176));
    /// # Ok::<(), candle_swiglu::Error>(())
    /// ```
    ///
    /// # Errors
    /// The errors of [`Self::from_json`].
    pub fn from_json_expert(json: &Value) -> Result<Self> {
        huggingface::read(json, None, Part::Expert)
    }

    /// Checks the sizes and numbers, as every constructor of a block does.
    ///
    /// # Errors
    /// A size of zero or one that memory cannot address, a limit that is not a positive number, a
    /// multiplier or an offset that is not finite. The error names the field.
    pub fn validate(&self) -> Result<()> {
        for (name, size) in
            [("hidden_size", self.hidden_size), ("intermediate_size", self.intermediate_size)]
        {
            if size == 0 {
                return Err(Error::ZeroSize { name });
            }
        }
        let (rows, columns) = (self.intermediate_size, self.hidden_size);
        if rows.checked_mul(2).is_none() {
            return Err(Error::TooLarge { name: "gate_up_proj", rows, columns });
        }
        self.glu().validate()?;
        match self.down_multiplier.is_finite() {
            true => Ok(()),
            false => Err(Error::InvalidField {
                field: "down_multiplier".into(),
                expected: "a finite number",
                found: self.down_multiplier.to_string(),
            }),
        }
    }

    /// The gate of the block, between the projections.
    pub(crate) fn glu(&self) -> Glu {
        let glu = Glu::new(self.activation)
            .with_gate_multiplier(self.gate_multiplier)
            .with_up_offset(self.up_offset);
        self.limit.map_or(glu, |limit| glu.with_limit(limit))
    }
}

impl TryFrom<Value> for FfnConfig {
    type Error = Error;

    fn try_from(json: Value) -> Result<Self> {
        Self::from_json(&json)
    }
}
