//! The parameters of the model, read from a HF `config.json`. A field that requires another
//! computation than that of [`super::Llama`] is an error that names it. Fields that only concern
//! training or generation defaults are ignored.

use candle_core::DType;
use candle_swiglu::{Checkpoint, Error, Family, FfnConfig, Result};
use serde_json::Value;

use super::fields::{Fields, invalid, unsupported};
pub use super::model_type::ModelType;
pub use super::rope_config::{RopeConfig, RopeScaling};

/// The sizes and options of a LLaMA-like model.
#[derive(Debug, Clone)]
pub struct LlamaConfig {
    pub model_type: ModelType,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub vocab_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub rms_norm_eps: f64,
    pub rope: RopeConfig,
    /// The largest number of positions of a text. A `sliding_window` that the model type does not
    /// implement shortens it.
    pub max_position_embeddings: usize,
    /// The field from which this number was read: `max_position_embeddings` or `sliding_window`.
    pub context_field: &'static str,
    /// The number of positions that a query of a sliding layer sees, its own included.
    pub sliding_window: Option<usize>,
    /// One for each layer.
    pub layers: Vec<LayerConfig>,
    pub tie_word_embeddings: bool,
    /// Biases of q, k and v.
    pub qkv_bias: bool,
    /// Bias of o.
    pub o_bias: bool,
    /// The factor of the scores.
    pub attention_scale: f64,
    /// Granite's factor of the embedding; 1 in other model types.
    pub embedding_multiplier: f64,
    /// Granite's factor of the attention and MLP outputs before they are added to x.
    pub residual_multiplier: f64,
    /// Granite's divisor of the logits.
    pub logits_scaling: f64,
    pub bos_token_id: Option<u32>,
    /// Each of these ends a text. Empty if there is none.
    pub eos_token_ids: Vec<u32>,
    /// Whether `eos_token_ids` is the model type's default because the config has no
    /// `eos_token_id`.
    eos_is_default: bool,
    /// The dtype in which the checkpoint was saved, if the config has it.
    pub dtype: Option<DType>,
    /// The MLP: sizes, activation, biases.
    pub ffn: FfnConfig,
}

/// The properties in which layers of one model differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerConfig {
    /// Whether queries and keys have rotary embedding.
    pub rope: bool,
    /// Whether a query sees only the last `sliding_window` positions.
    pub sliding: bool,
}

impl LlamaConfig {
    /// Reads a HF `config.json` of one of the model types in [`ModelType`].
    ///
    /// # Errors
    /// The error names the field that is missing, malformed, or requires another computation.
    pub fn from_json(json: &Value) -> Result<Self> {
        let top = &Fields::of(json)?;
        let model_type = ModelType::of(top)?;
        model_type.refuse_foreign_fields(top)?;
        let defaults = model_type.defaults();

        let context =
            top.size_opt("max_position_embeddings")?.unwrap_or(defaults.max_position_embeddings);
        let num_hidden_layers = layer_count(top)?;
        let (usable_context, context_field) = usable_context(top, model_type, context)?;
        let (window, layers) = layers(top, model_type, num_hidden_layers, context)?;
        let hidden_size = top.size("hidden_size")?;
        let num_attention_heads = top.size("num_attention_heads")?;
        let head_dim = head_dim(top, model_type, hidden_size, num_attention_heads)?;
        let (qkv_bias, o_bias) = match model_type {
            ModelType::Qwen2 => (true, false),
            _ => (top.flag("attention_bias")?, top.flag("attention_bias")?),
        };
        let multiplier = |field| Ok::<_, Error>(top.number(field)?.unwrap_or(1.0));
        let ids = |field, default: Option<u32>| match top.has(field) {
            true => top.token_ids(field),
            false => Ok(Vec::from_iter(default)),
        };
        Ok(Self {
            model_type,
            hidden_size,
            intermediate_size: top.size("intermediate_size")?,
            vocab_size: top.size("vocab_size")?,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads: key_value_heads(top, model_type, num_attention_heads)?,
            head_dim,
            rms_norm_eps: top.positive_opt("rms_norm_eps")?.unwrap_or(defaults.rms_norm_eps),
            rope: RopeConfig::of(top, model_type, head_dim, context)?,
            max_position_embeddings: usable_context,
            context_field,
            sliding_window: window,
            layers,
            tie_word_embeddings: match top.has("tie_word_embeddings") {
                true => top.flag("tie_word_embeddings")?,
                false => defaults.tie_word_embeddings,
            },
            qkv_bias,
            o_bias,
            attention_scale: match model_type {
                ModelType::Granite => multiplier("attention_multiplier")?,
                _ => (head_dim as f64).powf(-0.5),
            },
            embedding_multiplier: multiplier("embedding_multiplier")?,
            residual_multiplier: multiplier("residual_multiplier")?,
            logits_scaling: top.positive_opt("logits_scaling")?.unwrap_or(1.0),
            bos_token_id: ids("bos_token_id", defaults.bos_token_id)?.first().copied(),
            eos_token_ids: ids("eos_token_id", defaults.eos_token_id)?,
            eos_is_default: !top.has("eos_token_id"),
            dtype: saved_dtype(top),
            ffn: match model_type {
                // So that a VarMap gets the names of this model type.
                ModelType::Phi3 => FfnConfig::from_json(json)?.with_family(Family::Phi3),
                _ => FfnConfig::from_json(json)?,
            },
        })
    }

    /// The config of a checkpoint. Without a dtype in `config.json`, the dtype is that of the
    /// tensors.
    ///
    /// # Errors
    /// As [`LlamaConfig::from_json`].
    pub fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let mut cfg = Self::from_json(checkpoint.config())?;
        let computed_in = |dtype: &DType| matches!(dtype, DType::F16 | DType::BF16 | DType::F32);
        cfg.dtype = cfg.dtype.or_else(|| checkpoint.dtype().filter(computed_in));
        Ok(cfg)
    }

    /// Adds the end-of-text ids of a HF `generation_config.json`. They replace an id that is only
    /// the model type's default.
    ///
    /// # Errors
    /// When its `eos_token_id` is neither a token id, a list of them, nor null.
    pub fn add_eos_of(&mut self, generation_config: &Value) -> Result<()> {
        let ids = Fields::of(generation_config)?.token_ids("eos_token_id")?;
        if self.eos_is_default && !ids.is_empty() {
            self.eos_token_ids.clear();
            self.eos_is_default = false;
        }
        for id in ids {
            if !self.eos_token_ids.contains(&id) {
                self.eos_token_ids.push(id);
            }
        }
        Ok(())
    }
}

fn layer_count(top: &Fields) -> Result<usize> {
    const MOST: usize = 100_000;
    match top.size("num_hidden_layers")? {
        count if count <= MOST => Ok(count),
        count => Err(invalid("num_hidden_layers", "at most 100000", &Value::from(count))),
    }
}

/// The model type's default if the field is missing, the number of heads if it is null.
fn key_value_heads(top: &Fields, model_type: ModelType, heads: usize) -> Result<usize> {
    const FIELD: &str = "num_key_value_heads";
    let default = model_type.defaults().num_key_value_heads.filter(|_| !top.has(FIELD));
    let kv_heads = top.size_opt(FIELD)?.or(default).unwrap_or(heads);
    match heads.is_multiple_of(kv_heads) {
        true => Ok(kv_heads),
        false => Err(Error::InvalidField {
            field: FIELD.into(),
            expected: "a divisor of num_attention_heads",
            found: match top.get(FIELD) {
                Some(_) => format!("{kv_heads} (num_attention_heads is {heads})"),
                None => format!("none, which means {kv_heads} (num_attention_heads is {heads})"),
            },
        }),
    }
}

fn head_dim(
    top: &Fields,
    model_type: ModelType,
    hidden_size: usize,
    heads: usize,
) -> Result<usize> {
    let head_dim = match top.size_opt("head_dim")?.or(model_type.defaults().head_dim) {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => {
            return Err(Error::InvalidField {
                field: "hidden_size".into(),
                expected: "a multiple of num_attention_heads, or a head_dim",
                found: format!("{hidden_size} (num_attention_heads is {heads})"),
            });
        }
    };
    // q, k and v together have at most three times this many rows.
    match heads.checked_mul(head_dim).and_then(|rows| rows.checked_mul(3)) {
        Some(_) => Ok(head_dim),
        None => Err(invalid(
            "head_dim",
            "3 * num_attention_heads * head_dim below 2^64",
            &Value::from(head_dim),
        )),
    }
}

/// The sliding window, if it is shorter than the context, and the properties of each layer.
fn layers(
    top: &Fields,
    model_type: ModelType,
    count: usize,
    context: usize,
) -> Result<(Option<usize>, Vec<LayerConfig>)> {
    use ModelType::*;
    let default = model_type.defaults().sliding_window.filter(|_| !top.has("sliding_window"));
    let window = match model_type {
        Llama | Granite => None,
        Mistral | Phi3 => top.size_opt("sliding_window")?.or(default),
        Qwen2 | Qwen3 | SmolLm3 if !top.flag("use_sliding_window")? => None,
        Qwen2 | Qwen3 | SmolLm3 => top.size_opt("sliding_window")?.or(default),
    };
    let rope = if model_type == SmolLm3 { rope_layers(top, count)? } else { vec![true; count] };
    let first_sliding = top.count("max_window_layers")?.unwrap_or(28);
    let slides = |i: usize| match model_type {
        _ if window.is_none() => false,
        Llama | Granite => false,
        Mistral | Phi3 => true,
        Qwen2 | Qwen3 => i >= first_sliding,
        SmolLm3 => !rope[i],
    };
    let sliding: Vec<bool> = match layer_types(top, count)? {
        None => (0..count).map(slides).collect(),
        Some((_, value)) if value.contains(&true) && window.is_none() => {
            let found = Value::from("sliding_attention");
            return Err(unsupported(
                "layer_types",
                found,
                "the config switches the sliding window off",
            ));
        }
        Some((found, types)) if matches!(model_type, Mistral | Phi3) => {
            let window_matters = window.is_some_and(|window| window < context);
            if window_matters && types.contains(&false) {
                return Err(unsupported(
                    "layer_types",
                    found,
                    "every layer of this model type has the sliding window",
                ));
            }
            (0..count).map(slides).collect()
        }
        Some((_, types)) => types,
    };
    let window = window.filter(|&window| window < context);
    let layer =
        |(rope, sliding): (bool, bool)| LayerConfig { rope, sliding: sliding && window.is_some() };
    Ok((window, rope.into_iter().zip(sliding).map(layer).collect()))
}

/// The field `layer_types`, and for each layer whether it has a sliding window.
fn layer_types<'a>(top: &Fields<'a>, count: usize) -> Result<Option<(&'a Value, Vec<bool>)>> {
    let Some(types) = top.read("layer_types", "a list of names", Value::as_array)? else {
        return Ok(None);
    };
    let slides = |layer_type: &Value| match layer_type.as_str() {
        Some("full_attention") => Ok(false),
        Some("sliding_attention") => Ok(true),
        _ => {
            Err(unsupported("layer_types", layer_type, "known: full_attention, sliding_attention"))
        }
    };
    let sliding = types.iter().map(slides).collect::<Result<Vec<_>>>()?;
    match (top.get("layer_types"), sliding.len() == count) {
        (Some(value), true) => Ok(Some((value, sliding))),
        _ => Err(Error::InvalidField {
            field: "layer_types".into(),
            expected: "one for each of num_hidden_layers",
            found: format!("{} (num_hidden_layers is {count})", sliding.len()),
        }),
    }
}

/// SmolLM3: whether each layer has rotary embedding. These are the layers with a 1 in
/// `no_rope_layers`, by default all except every fourth.
fn rope_layers(top: &Fields, count: usize) -> Result<Vec<bool>> {
    const EXPECTED: &str = "a list of 0 and 1 with one for each layer";
    let one = |value: &Value| match value {
        Value::Bool(on) => Some(*on),
        value => value.as_u64().filter(|&number| number <= 1).map(|number| number == 1),
    };
    let list = |value: &Value| value.as_array()?.iter().map(one).collect::<Option<Vec<_>>>();
    match top.read("no_rope_layers", EXPECTED, list)? {
        Some(layers) if layers.len() >= count => Ok(layers[..count].to_vec()),
        Some(layers) => Err(Error::InvalidField {
            field: "no_rope_layers".into(),
            expected: EXPECTED,
            found: format!("{} (num_hidden_layers is {count})", layers.len()),
        }),
        None => {
            let interval = top.size_opt("no_rope_layer_interval")?.unwrap_or(4);
            Ok((1..=count).map(|layer| !layer.is_multiple_of(interval)).collect())
        }
    }
}

/// transformers' LLaMA and Granite ignore `sliding_window` in their masks but not in their caches.
/// A text within the window has the same result with and without it, so here the window limits the
/// context. The second result is the field that sets the limit.
fn usable_context(
    top: &Fields,
    model_type: ModelType,
    context: usize,
) -> Result<(usize, &'static str)> {
    let window = match model_type {
        ModelType::Llama | ModelType::Granite => {
            top.size_opt("sliding_window")?.filter(|&window| window < context)
        }
        _ => None,
    };
    Ok(window.map_or((context, "max_position_embeddings"), |window| (window, "sliding_window")))
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
