//! What a block computes, read from a Hugging Face `config.json`. What cannot be honoured is refused by name.

use std::borrow::Cow;

use serde_json::Value;

use crate::activation::{Glu, GluActivation};
use crate::error::{Error, Result};
use crate::family::{Family, Names, PackedOrder};

/// The sizes and the formula of one block:
///
/// `y = d·((act(min(m·(x·Wgᵀ + bg), limit)) ⊙ (clamp(x·Wuᵀ + bu, ±limit) + c))·Wdᵀ + bd)`
///
/// With the defaults (SiLU, no bias, m = d = 1, no limit, c = 0) this is SwiGLU.
///
/// ```
/// use candle_swiglu::{FfnConfig, GluActivation};
/// let json = serde_json::json!({"hidden_size": 64, "intermediate_size": 176, "hidden_act": "silu", "mlp_bias": true});
/// let cfg = FfnConfig::from_json(&json)?;
/// assert_eq!(cfg, FfnConfig::new(64, 176).with_bias(true));
/// assert_eq!(cfg.activation, GluActivation::Silu);
/// # Ok::<(), candle_swiglu::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, serde::Deserialize)]
#[serde(try_from = "Value")]
#[non_exhaustive]
pub struct FfnConfig {
    /// H
    pub hidden_size: usize,
    /// I
    pub intermediate_size: usize,
    /// act
    pub activation: GluActivation,
    /// Which projections have a bias.
    pub biases: Biases,
    /// m, 1 by default (Falcon-H1's first `mlp_multipliers`)
    pub gate_multiplier: f32,
    /// d, 1 by default (Falcon-H1's second `mlp_multipliers`)
    pub down_multiplier: f32,
    /// Bound of the gate from above and of up on both sides (gpt-oss's `swiglu_limit`).
    pub limit: Option<f32>,
    /// c, 0 by default (1 in gpt-oss)
    pub up_offset: f32,
    /// Names and layout of the weights; detected when `None` and there are no `names`.
    pub family: Option<Family>,
    /// Names and layout of the weights that belong to no [`Family`]; they take precedence over `family`.
    pub names: Option<Names>,
}

/// Which of the three projections have a bias.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Biases {
    /// gate_proj has one.
    pub gate: bool,
    /// up_proj has one.
    pub up: bool,
    /// down_proj has one.
    pub down: bool,
}

impl Biases {
    /// No projection has a bias.
    pub const NONE: Self = Self::new(false, false, false);
    /// Every projection has a bias.
    pub const ALL: Self = Self::new(true, true, true);

    /// Sets each by itself.
    pub const fn new(gate: bool, up: bool, down: bool) -> Self {
        Self { gate, up, down }
    }
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

    /// All three projections have a bias, or none has one.
    pub fn with_bias(self, bias: bool) -> Self {
        self.with_biases(if bias { Biases::ALL } else { Biases::NONE })
    }

    /// Sets which projections have a bias.
    pub fn with_biases(self, biases: Biases) -> Self {
        Self { biases, ..self }
    }

    /// Multiplies the gate's argument by m and the output by d.
    pub fn with_multipliers(self, gate_multiplier: f32, down_multiplier: f32) -> Self {
        Self { gate_multiplier, down_multiplier, ..self }
    }

    /// Bounds the gate from above and up on both sides.
    pub fn with_limit(self, limit: f32) -> Self {
        Self { limit: Some(limit), ..self }
    }

    /// Adds c to the bounded up.
    pub fn with_up_offset(self, up_offset: f32) -> Self {
        Self { up_offset, ..self }
    }

    /// Names the family whose names and layout the weights have, instead of detecting it.
    pub fn with_family(self, family: Family) -> Self {
        Self { family: Some(family), ..self }
    }

    /// Names the three tensors, without `.weight`: for checkpoints of no [`Family`].
    pub fn with_names(
        self,
        gate: impl Into<Cow<'static, str>>,
        up: impl Into<Cow<'static, str>>,
        down: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self { names: Some(Names::separate(gate, up, down)), ..self }
    }

    /// Names the tensor that holds gate_proj and up_proj, the order of its rows, and down_proj's tensor.
    pub fn with_packed_names(
        self,
        gate_up: impl Into<Cow<'static, str>>,
        down: impl Into<Cow<'static, str>>,
        order: PackedOrder,
    ) -> Self {
        Self { names: Some(Names::packed(gate_up, down, order)), ..self }
    }

    /// The block that a Hugging Face `config.json` (or Meta's `params.json`) describes.
    ///
    /// Read are: `hidden_size` (`d_model`, `dim`, `n_embd`), `intermediate_size` (`d_ff`, `ffn_hidden_size`, `hidden_dim`, `n_inner`, or Meta's
    /// rule from `dim`, `multiple_of` and `ffn_dim_multiplier`), `hidden_activation` or `hidden_act` (SiLU when absent; in Gemma
    /// `gelu` means the tanh form), T5's `feed_forward_proj`, the bias flags, `mlp_multipliers`, gpt-oss's `swiglu_limit` and
    /// `swiglu_alpha`. Other fields do
    /// not concern the block and are left alone.
    ///
    /// # Errors
    /// A missing size; a field of the wrong type; an unknown activation; a field that changes the formula in a way this crate
    /// does not compute (quantized weights, activation sparsity, a limit outside gpt-oss, biases on some projections only).
    pub fn from_json(json: &Value) -> Result<Self> {
        let whole = json;
        let json = match json.get("text_config") {
            Some(text) if json.get("hidden_size").is_none() => text,
            _ => json,
        };
        let model_type = json.get("model_type").and_then(Value::as_str).unwrap_or_default();
        refuse(whole, model_type)?;
        refuse(json, model_type)?;
        let hidden_size = required(json, &["hidden_size", "d_model", "dim", "n_embd"], "hidden_size")?;
        let cfg = Self::new(hidden_size, intermediate_size(json, hidden_size, model_type)?)
            .with_activation(activation(json, model_type)?)
            .with_bias(bias(json, model_type)?);
        with_model_formula(cfg, json, model_type)
    }

    /// Checks the sizes and numbers, as every constructor of a block does.
    ///
    /// # Errors
    /// A size of zero or one that memory cannot address, a limit that is not a positive number, a multiplier or an offset that is
    /// not finite; the error names the field.
    pub fn validate(&self) -> Result<()> {
        for (name, size) in [("hidden_size", self.hidden_size), ("intermediate_size", self.intermediate_size)] {
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

    /// The pair operation between the projections.
    pub(crate) fn glu(&self) -> Glu {
        let glu = Glu::new(self.activation).with_gate_multiplier(self.gate_multiplier).with_up_offset(self.up_offset);
        self.limit.map_or(glu, |limit| glu.with_limit(limit))
    }
}

impl TryFrom<Value> for FfnConfig {
    type Error = Error;

    fn try_from(json: Value) -> Result<Self> {
        Self::from_json(&json)
    }
}

/// The field's value, unless it is absent or null.
fn field<'a>(json: &'a Value, name: &str) -> Option<&'a Value> {
    json.get(name).filter(|value| !value.is_null())
}

fn invalid(name: &str, expected: &'static str, found: &Value) -> Error {
    Error::InvalidField { field: name.to_string(), expected, found: found.to_string() }
}

/// The first of the fields that is there, as a positive integer.
fn size(json: &Value, names: &[&str]) -> Result<Option<usize>> {
    let Some((name, value)) = names.iter().find_map(|name| Some((*name, field(json, name)?))) else {
        return Ok(None);
    };
    match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
        Some(n) if n > 0 => Ok(Some(n)),
        _ => Err(invalid(name, "a positive integer", value)),
    }
}

fn required(json: &Value, names: &[&str], field: &'static str) -> Result<usize> {
    size(json, names)?.ok_or(Error::MissingField { field })
}

fn flag(json: &Value, name: &str) -> Result<Option<bool>> {
    field(json, name).map(|value| value.as_bool().ok_or_else(|| invalid(name, "true or false", value))).transpose()
}

fn text<'a>(json: &'a Value, name: &str) -> Result<Option<&'a str>> {
    field(json, name).map(|value| value.as_str().ok_or_else(|| invalid(name, "a string", value))).transpose()
}

fn number(name: &str, value: &Value) -> Result<f32> {
    let found = value.as_f64().map(|x| x as f32).filter(|x| x.is_finite());
    found.ok_or_else(|| invalid(name, "a number", value))
}

/// Fields that change what the block computes, in ways that are not implemented.
fn refuse(json: &Value, model_type: &str) -> Result<()> {
    let unsupported = |name: &str, reason| match field(json, name) {
        Some(value) => Err(Error::Unsupported { field: name.to_string(), value: value.to_string(), reason }),
        None => Ok(()),
    };
    unsupported("quantization_config", "quantized weights are not read")?;
    if model_type != "gpt_oss" {
        unsupported("swiglu_limit", "the limited unit is known for model_type gpt_oss only")?;
        unsupported("swiglu_alpha", "the limited unit is known for model_type gpt_oss only")?;
    }
    let sparsity = field(json, "activation_sparsity_pattern").map(|value| match value {
        Value::Array(layers) => layers.iter().any(|layer| layer.as_f64() != Some(0.0)),
        other => other.as_f64() != Some(0.0),
    });
    if sparsity == Some(true) {
        unsupported("activation_sparsity_pattern", "the gate would be made sparse")?;
    }
    match (flag(json, "mlp_fc1_bias")?, flag(json, "mlp_fc2_bias")?) {
        (fc1, fc2) if fc1 == fc2 => Ok(()),
        (None, _) => unsupported("mlp_fc2_bias", "there is no mlp_fc1_bias; biases are on all projections or on none"),
        _ => unsupported("mlp_fc1_bias", "it differs from mlp_fc2_bias; biases are on all projections or on none"),
    }
}

fn intermediate_size(json: &Value, hidden_size: usize, model_type: &str) -> Result<usize> {
    const FIELD: &str = "intermediate_size";
    if let Some(n) = size(json, &[FIELD, "d_ff", "ffn_hidden_size", "hidden_dim", "n_inner"])? {
        // Qwen-1 counts gate and up together.
        return Ok(if model_type == "qwen" { n / 2 } else { n });
    }
    match size(json, &["multiple_of"])? {
        Some(multiple_of) if field(json, "dim").is_some() => meta_intermediate_size(json, hidden_size, multiple_of),
        _ => Err(Error::MissingField { field: FIELD }),
    }
}

/// Meta's rule: two thirds of 4·dim, times `ffn_dim_multiplier`, each cut to an integer, rounded up to `multiple_of`.
fn meta_intermediate_size(json: &Value, dim: usize, multiple_of: usize) -> Result<usize> {
    let overflow = || invalid("dim", "a size whose block fits memory", &Value::from(dim));
    let two_thirds = dim.checked_mul(8).ok_or_else(overflow)? / 3;
    let scaled = match field(json, "ffn_dim_multiplier") {
        None => two_thirds,
        Some(value) => match value.as_f64() {
            Some(factor) if factor > 0.0 && factor.is_finite() => (factor * two_thirds as f64) as usize,
            _ => return Err(invalid("ffn_dim_multiplier", "a positive number", value)),
        },
    };
    scaled.div_ceil(multiple_of).checked_mul(multiple_of).ok_or_else(overflow)
}

fn activation(json: &Value, model_type: &str) -> Result<GluActivation> {
    if let Some(name) = text(json, "feed_forward_proj")? {
        return match name.strip_prefix("gated-") {
            Some("gelu") => Ok(GluActivation::GeluTanh), // T5's gated-gelu is gelu_new
            Some(gate) => gate.parse(),
            None => Err(Error::Unsupported { field: "feed_forward_proj".into(), value: name.into(), reason: "it has no gate" }),
        };
    }
    if model_type.starts_with("gemma") {
        // Gemma 1 wrote hidden_act = gelu and meant the tanh form, which is what transformers computes.
        let name = text(json, "hidden_activation")?.or(text(json, "hidden_act")?).unwrap_or("gelu");
        return if name == "gelu" { Ok(GluActivation::GeluTanh) } else { name.parse() };
    }
    for name in ["hidden_activation", "hidden_act", "activation_function"] {
        if let Some(value) = text(json, name)? {
            return value.parse();
        }
    }
    Ok(GluActivation::Silu)
}

fn bias(json: &Value, model_type: &str) -> Result<bool> {
    if let Some(no_bias) = flag(json, "no_bias")? {
        return Ok(!no_bias); // Qwen-1
    }
    for name in ["mlp_bias", "mlp_fc1_bias", "add_bias_linear"] {
        if let Some(bias) = flag(json, name)? {
            return Ok(bias);
        }
    }
    Ok(model_type == "gpt_oss")
}

/// The modifiers of Falcon-H1 and gpt-oss, and the families that only a model type tells.
fn with_model_formula(cfg: FfnConfig, json: &Value, model_type: &str) -> Result<FfnConfig> {
    let mut cfg = match model_type {
        "gpt_oss" => {
            let limit = field(json, "swiglu_limit").map_or(Ok(7.0), |value| number("swiglu_limit", value))?;
            let beta = field(json, "swiglu_alpha").map_or(Ok(1.702), |value| number("swiglu_alpha", value))?;
            let cfg = cfg.with_activation(GluActivation::Swish { beta }).with_limit(limit).with_up_offset(1.0);
            cfg.with_family(Family::Interleaved)
        }
        "qwen" => cfg.with_family(Family::Qwen1),
        _ => cfg,
    };
    if let Some(value) = field(json, "mlp_multipliers") {
        cfg = match value.as_array().map(Vec::as_slice) {
            Some([gate, down]) => cfg.with_multipliers(number("mlp_multipliers", gate)?, number("mlp_multipliers", down)?),
            _ => return Err(invalid("mlp_multipliers", "two numbers", value)),
        };
    }
    Ok(cfg)
}
