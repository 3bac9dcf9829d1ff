//! The model types: their defaults for fields that a config does not have, as in transformers 5.23,
//! and the fields that each of them ignores.

use candle_swiglu::{Error, Result};
use serde_json::Value;

use super::fields::{Fields, unsupported};

/// The `model_type`s whose computation is that of [`super::Llama`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelType {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    SmolLm3,
    Granite,
    Phi3,
}

use ModelType::{Granite, Llama, Mistral, Phi3, Qwen2, Qwen3, SmolLm3};

/// The values of fields that are missing from the config.
pub struct Defaults {
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    /// None: the default is `num_attention_heads`, also if the field is null.
    pub num_key_value_heads: Option<usize>,
    /// None: the default is `hidden_size / num_attention_heads`.
    pub head_dim: Option<usize>,
    pub rope_theta: f64,
    pub tie_word_embeddings: bool,
    pub bos_token_id: Option<u32>,
    pub eos_token_id: Option<u32>,
    pub sliding_window: Option<usize>,
}

impl ModelType {
    pub fn of(top: &Fields) -> Result<Self> {
        match top.string("model_type")? {
            Some("llama") => Ok(Llama),
            Some("mistral") => Ok(Mistral),
            Some("qwen2") => Ok(Qwen2),
            Some("qwen3") => Ok(Qwen3),
            Some("smollm3") => Ok(SmolLm3),
            Some("granite") => Ok(Granite),
            Some("phi3") => Ok(Phi3),
            Some(other) => {
                let known = "only llama, mistral, qwen2, qwen3, smollm3, granite and phi3 are this computation";
                Err(unsupported("model_type", other, known))
            }
            None => Err(Error::MissingField { field: "model_type" }),
        }
    }

    pub fn defaults(self) -> Defaults {
        let llama = Defaults {
            max_position_embeddings: 2048,
            rms_norm_eps: 1e-6,
            num_key_value_heads: None,
            head_dim: None,
            rope_theta: 10_000.0,
            tie_word_embeddings: false,
            bos_token_id: Some(1),
            eos_token_id: Some(2),
            sliding_window: None,
        };
        let (kv_heads, window) = (Some(32), Some(4096));
        let qwen = |head_dim| Defaults {
            max_position_embeddings: 32_768,
            num_key_value_heads: kv_heads,
            head_dim,
            bos_token_id: None,
            eos_token_id: None,
            sliding_window: window,
            ..llama
        };
        match self {
            Llama | Granite => llama,
            Mistral => Defaults {
                max_position_embeddings: 131_072,
                num_key_value_heads: Some(8),
                sliding_window: window,
                ..llama
            },
            Qwen2 => qwen(None),
            Qwen3 => qwen(Some(128)),
            SmolLm3 => Defaults {
                max_position_embeddings: 32_768,
                num_key_value_heads: Some(4),
                rope_theta: 2_000_000.0,
                tie_word_embeddings: true,
                bos_token_id: Some(128_000),
                eos_token_id: Some(128_001),
                ..llama
            },
            Phi3 => Defaults {
                max_position_embeddings: 4096,
                rms_norm_eps: 1e-5,
                eos_token_id: Some(32_000),
                ..llama
            },
        }
    }

    /// Rejects fields that change the computation of another model type, unless their value has no
    /// effect.
    ///
    /// # Errors
    /// The error names the field.
    pub fn refuse_foreign_fields(self, top: &Fields) -> Result<()> {
        for field in ["quantization_config", "quantization", "compression_config"] {
            if let Some(found) = top.get(field) {
                let method = found.get("quant_method").unwrap_or(found);
                return Err(unsupported(field, method, "quantized weights cannot be read"));
            }
        }
        for (field, off, read_by) in FOREIGN {
            let found =
                top.get(field).filter(|value| !read_by.contains(&self) && !is_off(value, off));
            if let Some(value) = found {
                return Err(unsupported(
                    field,
                    value,
                    "this model type does not compute with it in transformers",
                ));
            }
        }
        if let Some(value) = top.get("is_causal").filter(|value| value.as_bool() == Some(false)) {
            return Err(unsupported("is_causal", value, "a token sees only those before it"));
        }
        match top.get("position_embedding_type") {
            Some(value) if value != "rope" => {
                Err(unsupported("position_embedding_type", value, "only rope is known"))
            }
            _ => Ok(()),
        }
    }
}

/// Whether the value, which is not null, has no effect.
fn is_off(value: &Value, off: &[f64]) -> bool {
    match value {
        Value::Bool(on) => !on,
        Value::Array(list) => list.iter().all(|value| is_off(value, off)),
        value => value.as_f64().is_some_and(|number| off.contains(&number)),
    }
}

/// A field, the numbers that have no effect (besides null and false), and the model types that read
/// it.
type Foreign = (&'static str, &'static [f64], &'static [ModelType]);

const FOREIGN: &[Foreign] = &[
    // Qwen2 has biases whatever the value of this field.
    ("attention_bias", &[], &[Llama, Qwen2, Qwen3, SmolLm3, Granite]),
    ("mlp_bias", &[], &[Llama, SmolLm3, Granite]),
    ("embedding_multiplier", &[1.0], &[Granite]),
    ("residual_multiplier", &[1.0], &[Granite]),
    ("attention_multiplier", &[], &[Granite]),
    ("logits_scaling", &[1.0], &[Granite]),
    ("no_rope_layers", &[1.0], &[SmolLm3]),
    ("no_rope_layer_interval", &[0.0], &[SmolLm3]),
    ("add_cross_attention", &[], &[]),
    ("alibi", &[], &[]),
    ("attention_chunk_size", &[], &[]),
    ("attention_in_multiplier", &[1.0], &[]),
    ("attention_out_multiplier", &[1.0], &[]),
    ("attn_logit_softcap", &[], &[]),
    ("attn_logit_softcapping", &[], &[]),
    ("attn_temperature_tuning", &[], &[]),
    ("clip_qkv", &[], &[]),
    ("final_logit_softcap", &[], &[]),
    ("final_logit_softcapping", &[], &[]),
    ("is_encoder_decoder", &[], &[]),
    ("key_multiplier", &[1.0], &[]),
    ("kv_lora_rank", &[], &[]),
    ("lm_head_multiplier", &[1.0], &[]),
    ("logit_scale", &[1.0], &[]),
    ("logits_soft_cap", &[], &[]),
    ("mlp_multipliers", &[1.0], &[]),
    ("n_routed_experts", &[0.0, 1.0], &[]),
    ("num_experts", &[0.0, 1.0], &[]),
    ("num_local_experts", &[0.0, 1.0], &[]),
    ("parallel_attn", &[], &[]),
    ("q_lora_rank", &[], &[]),
    ("qk_layernorm", &[], &[]),
    ("qk_norm", &[], &[]),
    ("query_pre_attn_scalar", &[], &[]),
    ("rope_interleave", &[], &[]),
    ("rope_interleaved", &[], &[]),
    ("rope_local_base_freq", &[], &[]),
    ("rotary_pct", &[1.0], &[]),
    ("scale_depth", &[], &[]),
    ("scale_emb", &[1.0], &[]),
    ("use_alibi", &[], &[]),
    ("use_bidirectional_attention", &[], &[]),
    ("use_parallel_residual", &[], &[]),
    ("use_qk_norm", &[], &[]),
];
