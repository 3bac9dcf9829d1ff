//! What the model needs to know, read from a HF `config.json`. A field that asks for another computation than the one in
//! [`super::Llama`] is refused by name; fields that only concern training or generation defaults are left alone.

use candle_core::DType;
use candle_swiglu::{Error, FfnConfig, Result};
use serde_json::{Map, Value};

/// The sizes and switches of a LLaMA-like model.
#[derive(Debug, Clone)]
pub struct LlamaConfig {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub vocab_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub rms_norm_eps: f64,
    pub rope: RopeConfig,
    pub max_position_embeddings: usize,
    pub tie_word_embeddings: bool,
    /// Biases of q, k and v.
    pub qkv_bias: bool,
    /// Bias of o.
    pub o_bias: bool,
    pub bos_token_id: Option<u32>,
    /// Any of these ends a text; empty when the config names none.
    pub eos_token_ids: Vec<u32>,
    /// The dtype the checkpoint was saved in, when the config says so.
    pub dtype: Option<DType>,
    /// The MLP: sizes, activation, biases.
    pub ffn: FfnConfig,
}

/// Rotary position embedding: the base, and how the frequencies are stretched beyond the pretraining context.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    pub theta: f64,
    pub scaling: RopeScaling,
}

/// How the rotary frequencies are stretched.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every frequency divided by `factor`.
    Linear { factor: f64 },
    /// LLaMA 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_max_position_embeddings: usize },
}

impl LlamaConfig {
    /// Reads a HF `config.json` of model type llama, mistral or qwen2.
    ///
    /// # Errors
    /// Names the field that is missing, malformed, or asks for what the model does not compute.
    pub fn from_json(json: &Value) -> Result<Self> {
        let map = json.as_object().ok_or_else(|| invalid("(whole file)", "a JSON object", json))?;
        let top = Fields { map, section: "" };
        let (qkv_bias, o_bias) = attention_biases(&top)?;
        refuse_other_models(&top)?;
        let max_position_embeddings = top.size("max_position_embeddings")?;
        refuse_sliding_window(&top, max_position_embeddings)?;

        let hidden_size = top.size("hidden_size")?;
        let num_attention_heads = top.size("num_attention_heads")?;
        let num_key_value_heads = top.size_opt("num_key_value_heads")?.unwrap_or(num_attention_heads);
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            return Err(Error::InvalidField {
                field: "num_key_value_heads".into(),
                expected: "a divisor of num_attention_heads",
                found: format!("{num_key_value_heads} (num_attention_heads is {num_attention_heads})"),
            });
        }
        Ok(Self {
            hidden_size,
            intermediate_size: top.size("intermediate_size")?,
            vocab_size: top.size("vocab_size")?,
            num_hidden_layers: top.size("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads,
            head_dim: head_dim(&top, hidden_size, num_attention_heads)?,
            rms_norm_eps: top.positive("rms_norm_eps")?,
            rope: rope(&top, max_position_embeddings)?,
            max_position_embeddings,
            tie_word_embeddings: top.flag("tie_word_embeddings")?,
            qkv_bias,
            o_bias,
            bos_token_id: top.token_ids("bos_token_id")?.first().copied(),
            eos_token_ids: top.token_ids("eos_token_id")?,
            dtype: saved_dtype(&top),
            ffn: FfnConfig::from_json(json)?,
        })
    }

    /// Adds the end-of-text ids of a HF `generation_config.json`.
    ///
    /// # Errors
    /// When `eos_token_id` there is neither a token id, a list of them, nor null.
    pub fn add_eos_of(&mut self, generation_config: &Value) -> Result<()> {
        let Some(map) = generation_config.as_object() else {
            return Err(invalid("(whole file)", "a JSON object", generation_config));
        };
        for id in (Fields { map, section: "" }).token_ids("eos_token_id")? {
            if !self.eos_token_ids.contains(&id) {
                self.eos_token_ids.push(id);
            }
        }
        Ok(())
    }
}

/// The biases of (q, k, v) and of o: mistral and qwen2 fix them, llama has a field. The model types whose computation is
/// the one of [`super::Llama`] are just these three; their sources in transformers differ in biases and sliding window only.
fn attention_biases(top: &Fields) -> Result<(bool, bool)> {
    let field = top.flag("attention_bias")?;
    match top.string("model_type")? {
        Some("llama" | "mistral") => Ok((field, field)),
        Some("qwen2") => Ok((true, false)),
        Some(other) => Err(unsupported("model_type", other, "only llama, mistral and qwen2 are this computation")),
        None => Err(Error::MissingField { field: "model_type" }),
    }
}

/// Fields that change the computation, whatever the model type.
fn refuse_other_models(top: &Fields) -> Result<()> {
    if let Some(found) = top.get("quantization_config") {
        let method = found.get("quant_method").unwrap_or(found);
        return Err(unsupported("quantization_config", method, "quantized weights cannot be read"));
    }
    for layer_type in top.get("layer_types").and_then(Value::as_array).into_iter().flatten() {
        if layer_type.as_str() != Some("full_attention") {
            return Err(unsupported("layer_types", layer_type, "every layer attends to the whole context"));
        }
    }
    Ok(())
}

/// A window as long as the context is no window; a shorter one would give other logits. Mistral has one unless it says
/// null, qwen2 only when `use_sliding_window` says so.
fn refuse_sliding_window(top: &Fields, context: usize) -> Result<()> {
    let window = match top.string("model_type")? {
        Some("mistral") if !top.map.contains_key("sliding_window") => Some(4096),
        Some("qwen2") if !top.flag("use_sliding_window")? => None,
        _ => top.size_opt("sliding_window")?,
    };
    match window {
        Some(window) if window < context => Err(unsupported("sliding_window", window, "shorter than max_position_embeddings")),
        _ => Ok(()),
    }
}

fn head_dim(top: &Fields, hidden_size: usize, heads: usize) -> Result<usize> {
    let head_dim = match top.size_opt("head_dim")? {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => {
            return Err(Error::InvalidField {
                field: "hidden_size".into(),
                expected: "a multiple of num_attention_heads when there is no head_dim",
                found: format!("{hidden_size} (num_attention_heads is {heads})"),
            });
        }
    };
    if head_dim % 2 == 1 {
        return Err(Error::InvalidField {
            field: "head_dim".into(),
            expected: "an even number (rotary embedding turns pairs)",
            found: head_dim.to_string(),
        });
    }
    match heads.checked_mul(head_dim) {
        Some(_) => Ok(head_dim),
        None => Err(invalid("head_dim", "num_attention_heads * head_dim below 2^64", &Value::from(head_dim))),
    }
}

/// The rotary parameters from `rope_parameters` (transformers 5) or `rope_scaling` beside `rope_theta` (before).
fn rope(top: &Fields, context: usize) -> Result<RopeConfig> {
    let (old, new) = (top.get("rope_scaling"), top.get("rope_parameters"));
    let (section, found) = match (old, new) {
        (Some(old), Some(new)) if old != new => {
            return Err(unsupported("rope_scaling", old, "rope_parameters is there too and says something else"));
        }
        (_, Some(new)) => ("rope_parameters", Some(new)),
        (old, None) => ("rope_scaling", old),
    };
    let empty = Map::new();
    let map = match found {
        None => &empty,
        Some(found) => found.as_object().ok_or_else(|| invalid(section, "a JSON object or null", found))?,
    };
    if let Some((layer_type, inner)) = map.iter().find(|(_, value)| value.is_object()) {
        return Err(unsupported(&format!("{section}.{layer_type}"), inner, "all layers share one rotary embedding"));
    }
    let rope = Fields { map, section };
    for fields in [top, &rope] {
        if fields.number("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
            let value = fields.get("partial_rotary_factor").unwrap_or(&Value::Null);
            return Err(unsupported(&fields.name("partial_rotary_factor"), value, "the whole head is rotated"));
        }
    }
    let theta = match rope.get("rope_theta") {
        Some(_) => rope.positive("rope_theta")?,
        None => top.get("rope_theta").map_or(Ok(10_000.0), |_| top.positive("rope_theta"))?,
    };
    Ok(RopeConfig { theta, scaling: rope_scaling(top, &rope, context)? })
}

fn rope_scaling(top: &Fields, rope: &Fields, context: usize) -> Result<RopeScaling> {
    let rope_type = match rope.string("rope_type")? {
        Some(rope_type) => Some(rope_type),
        None => rope.string("type")?,
    };
    match rope_type {
        None if rope.get("factor").is_some() => Err(invalid(&rope.name("rope_type"), "a name", &Value::Null)),
        None | Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor: rope.positive("factor")? }),
        Some("llama3") => llama3(top, rope, context),
        Some(other) => Err(unsupported(&rope.name("rope_type"), other, "known: default, linear, llama3")),
    }
}

fn llama3(top: &Fields, rope: &Fields, context: usize) -> Result<RopeScaling> {
    let original = "original_max_position_embeddings";
    let original = match top.size_opt(original)? {
        Some(outside) => outside,
        None => rope.size_opt(original)?.unwrap_or(context),
    };
    let (low, high) = (rope.positive("low_freq_factor")?, rope.positive("high_freq_factor")?);
    if high <= low {
        return Err(Error::InvalidField {
            field: rope.name("high_freq_factor"),
            expected: "more than low_freq_factor",
            found: format!("{high} (low_freq_factor is {low})"),
        });
    }
    Ok(RopeScaling::Llama3 {
        factor: rope.positive("factor")?,
        low_freq_factor: low,
        high_freq_factor: high,
        original_max_position_embeddings: original,
    })
}

fn saved_dtype(top: &Fields) -> Option<DType> {
    let name = top.get("dtype").or_else(|| top.get("torch_dtype"))?.as_str()?;
    match name.trim_start_matches("torch.") {
        "float16" => Some(DType::F16),
        "bfloat16" => Some(DType::BF16),
        "float32" => Some(DType::F32),
        _ => None,
    }
}

/// A JSON object whose fields are read with errors that name them; null counts as absent, as it does in transformers.
struct Fields<'a> {
    map: &'a Map<String, Value>,
    section: &'static str,
}

impl<'a> Fields<'a> {
    fn name(&self, field: &str) -> String {
        if self.section.is_empty() { field.to_string() } else { format!("{}.{field}", self.section) }
    }

    fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    /// The field through `read`, or an error that says what was expected.
    fn read<T>(&self, field: &str, expected: &'static str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let found = self.get(field);
        found.map(|value| read(value).ok_or_else(|| invalid(&self.name(field), expected, value))).transpose()
    }

    fn size_opt(&self, field: &str) -> Result<Option<usize>> {
        let read = |value: &Value| usize::try_from(value.as_u64()?).ok().filter(|&size| size > 0);
        self.read(field, "an integer of at least 1", read)
    }

    fn size(&self, field: &'static str) -> Result<usize> {
        self.size_opt(field)?.ok_or(Error::MissingField { field })
    }

    fn number(&self, field: &str) -> Result<Option<f64>> {
        self.read(field, "a number", Value::as_f64)
    }

    fn positive(&self, field: &'static str) -> Result<f64> {
        let positive = |value: &Value| value.as_f64().filter(|number| *number > 0.0 && number.is_finite());
        match self.read(field, "a positive number", positive)? {
            Some(number) => Ok(number),
            None if self.section.is_empty() => Err(Error::MissingField { field }),
            None => Err(invalid(&self.name(field), "a positive number", &Value::Null)),
        }
    }

    /// False when absent, as every such field is in transformers.
    fn flag(&self, field: &str) -> Result<bool> {
        Ok(self.read(field, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    fn string(&self, field: &str) -> Result<Option<&'a str>> {
        self.read(field, "a string", Value::as_str)
    }

    /// One id, a list of ids, or none.
    fn token_ids(&self, field: &str) -> Result<Vec<u32>> {
        let id = |value: &Value| u32::try_from(value.as_u64()?).ok();
        let ids = |value: &Value| match value {
            Value::Array(list) => list.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        };
        Ok(self.read(field, "a token id, a list of them, or null", ids)?.unwrap_or_default())
    }
}

fn invalid(field: &str, expected: &'static str, found: &Value) -> Error {
    Error::InvalidField { field: field.to_string(), expected, found: found.to_string() }
}

fn unsupported(field: &str, value: impl ToString, reason: &'static str) -> Error {
    Error::Unsupported { field: field.to_string(), value: value.to_string(), reason }
}
