//! The block of a model, read from its `config.json`. Biases and formula depend on the model type
//! as in transformers 5.23.

use serde_json::Value;

use super::json::{
    entry, field, flag, invalid, number, positive_number, required, size, text, unsupported,
};
use super::model::{Config, DINOV2, Part};
use super::sizes::INTERMEDIATE;
use super::{Biases, FfnConfig, activations};
use crate::error::Result;
use crate::gate::activation::GluActivation;
use crate::load::{Family, FusedOrder};

pub(super) fn read(whole: &Value, layer: Option<usize>, part: Part) -> Result<FfnConfig> {
    let json = nested(whole).unwrap_or(whole);
    let outer = text(whole, "model_type")?.unwrap_or_default();
    let config =
        Config { json, model: stem(text(json, "model_type")?.unwrap_or(outer)), layer, part };
    refuse_quantized(whole)?;
    config.refuse()?;
    let hidden_size =
        required(json, &["hidden_size", "d_model", "dim", "n_embd", "model_dim"], "hidden_size")?;
    let cfg = FfnConfig::new(hidden_size, config.intermediate_size(hidden_size)?)
        .with_activation(activations::read(json, config.model)?)
        .with_biases(config.biases()?);
    let cfg = config.with_names(config.with_formula(cfg)?);
    cfg.validate()?;
    Ok(cfg)
}

/// The text model's config inside a multimodal one. Sizes beside it do not belong to the block.
fn nested(whole: &Value) -> Option<&Value> {
    let parts = ["text_config", "llm_config", "language_config"];
    let thinker = || field(field(whole, "thinker_config")?, "text_config"); // Qwen's Omni models
    let part = parts.into_iter().find_map(|name| field(whole, name)).or_else(thinker)?;
    let has = |json: &Value, names: &[&str]| names.iter().any(|name| field(json, name).is_some());
    let complete = has(whole, &["hidden_size", "d_model"]) && has(whole, &INTERMEDIATE);
    (has(part, &["hidden_size", "d_model"]) || !complete).then_some(part)
}

/// The model type without the suffix: `gemma3_text` and `gemma3` name the same language model.
fn stem(model_type: &str) -> &str {
    let stem = model_type
        .strip_suffix("_text_model")
        .or(model_type.strip_suffix("_text"))
        .unwrap_or(model_type);
    match stem {
        "paligemma" => "gemma", // the default of its text model
        "step3p7" => "step3p5",
        "new" => "gte", // the same model in Alibaba's own code
        other => other,
    }
}

fn refuse_quantized(whole: &Value) -> Result<()> {
    let parts = [Some(whole), nested(whole)];
    for json in parts.into_iter().flatten() {
        for name in ["quantization_config", "quantization", "compression_config"] {
            if let Some(value) = field(json, name) {
                return Err(unsupported(name, value, "quantized weights are not read"));
            }
        }
    }
    Ok(())
}

impl Config<'_> {
    /// Refuses fields and model types that change the formula in ways that are not implemented.
    fn refuse(&self) -> Result<()> {
        self.refuse_model()?;
        self.refuse_without_gate()?;
        let limited = matches!(
            self.model,
            "gpt_oss"
                | "openai_privacy_filter"
                | "minimax_m3_vl"
                | "deepseek_v4"
                | "glm5_next"
                | "glm5_next_vision"
                | "hy_v4"
        );
        for name in ["swiglu_limit", "swiglu_alpha"] {
            if let Some(value) = field(self.json, name).filter(|_| !limited) {
                return Err(unsupported(
                    name,
                    value,
                    "the formula of this model type with a limit is not known",
                ));
            }
        }
        for name in ["swiglu_limits", "swiglu_limits_shared"] {
            let after =
                "the limit applies to the result of the activation, and only in some layers";
            self.refuse_layers(name, "a list of numbers", after)?;
        }
        self.refuse_sparsity()?;
        for (name, value) in self.json.as_object().into_iter().flatten() {
            let off =
                value.is_null() || *value == Value::Bool(false) || value.as_f64() == Some(0.0);
            let factor_of_one = value.as_f64() == Some(1.0)
                && (name.ends_with("multiplier") || name.ends_with("scale"));
            if is_modifier(name) && !off && !factor_of_one {
                return Err(unsupported(
                    name,
                    value,
                    "a field of this name probably changes the formula",
                ));
            }
        }
        Ok(())
    }

    /// Refuses blocks that compute something between or beside the projections which the formula
    /// lacks.
    fn refuse_model(&self) -> Result<()> {
        let reason = match self.model {
            "inkling2" => "the gate and up are softly capped",
            "bitnet" => "ffn_sub_norm normalises the product before down_proj",
            "inkling" if self.part == Part::Dense => "a learned global_scale multiplies the output",
            "zamba2" => "low-rank adapters add to gate_proj and up_proj",
            "phi4_multimodal_audio" => "the block has a LayerNorm inside",
            _ => return Ok(()),
        };
        Err(unsupported("model_type", &Value::from(self.model), reason))
    }

    /// Refuses a config in which a switch selects a feed-forward network without a gate.
    fn refuse_without_gate(&self) -> Result<()> {
        let off_by_default = match self.model {
            "dinov3_vit" | "eomt_dinov3" => "use_gated_mlp",
            model if DINOV2.contains(&model) => "use_swiglu_ffn",
            _ => "",
        };
        for name in ["use_swiglu_ffn", "use_gated_mlp", "is_gated_act", "ffn_with_glu"] {
            if !flag(self.json, name)?.unwrap_or(name != off_by_default) {
                return Err(unsupported(
                    name,
                    &Value::Bool(false),
                    "the feed-forward network has no gate",
                ));
            }
        }
        Ok(())
    }

    fn refuse_sparsity(&self) -> Result<()> {
        const NAME: &str = "activation_sparsity_pattern";
        let reason = "activation sparsity is not implemented";
        if self.model != "gemma3n" || field(self.json, NAME).is_some() {
            return self.refuse_layers(NAME, "a number or a list of numbers", reason);
        }
        // If the field is absent, the first ten layers of a deeper model are sparse.
        let deep = size(self.json, &["num_hidden_layers"])?.unwrap_or(35) > 10;
        match self.layer {
            Some(layer) if layer >= 10 => Ok(()),
            _ if deep => Err(unsupported(NAME, &Value::Null, reason)),
            _ => Ok(()),
        }
    }

    /// Refuses a field unless it is 0 or null. In a list the layer's entry counts; without a layer
    /// all entries count.
    fn refuse_layers(
        &self,
        name: &str,
        expected: &'static str,
        reason: &'static str,
    ) -> Result<()> {
        let Some(value) = field(self.json, name) else { return Ok(()) };
        let off = |value: &Value| value.is_null() || value.as_f64() == Some(0.0);
        let off = match (value, self.layer) {
            (Value::Array(list), None) => list.iter().all(off),
            (Value::Array(_), layer) => off(entry(name, value, layer)?),
            (Value::Number(_), _) => off(value),
            (Value::String(_), _) => false,
            _ => return Err(invalid(name, expected, value)),
        };
        if off { Ok(()) } else { Err(unsupported(name, value, reason)) }
    }

    fn biases(&self) -> Result<Biases> {
        let all = |bias: bool| if bias { Biases::ALL } else { Biases::NONE };
        let json = self.json;
        match self.model {
            "ernie4_5" | "ernie4_5_moe" | "ernie4_5_vl_moe" | "paddleocr_vl" => {
                return Ok(all(flag(json, "use_bias")?.unwrap_or(false)));
            }
            "gte" | "voxtral_realtime_encoder" => return Ok(Biases::new(false, false, true)),
            "glm_ocr_vision" | "glm5_next_vision" => {
                return Ok(all(flag(json, "attention_bias")?.unwrap_or(true)));
            }
            "molmo2_adapter" => {
                let bias = flag(json, "mlp_bias")?.unwrap_or(false);
                return Ok(Biases::new(bias, bias, false));
            }
            _ => {}
        }
        if let Some(no_bias) = flag(json, "no_bias")? {
            return Ok(all(!no_bias)); // Qwen-1
        }
        let (fc1, fc2) = (flag(json, "mlp_fc1_bias")?, flag(json, "mlp_fc2_bias")?);
        for name in ["mlp_bias", "add_bias_linear"] {
            if let Some(bias) = flag(json, name)? {
                return Ok(all(bias));
            }
        }
        if fc1.or(fc2).is_some() {
            // In Nomic's own code both are true by default.
            let (fc1, fc2) = (fc1.unwrap_or(true), fc2.unwrap_or(true));
            return Ok(Biases::new(fc1, fc1, fc2));
        }
        Ok(all(self.has_bias_by_default()))
    }

    fn has_bias_by_default(&self) -> bool {
        let with_bias = [
            "gpt_oss",
            "openai_privacy_filter",
            "dinov3_vit",
            "eomt_dinov3",
            "sapiens2",
            "qwen2_5_vl_vision",
            "qwen2_5_omni_vision_encoder",
            "exaone4_5_vision",
            "dots3_note_audio_encoder",
            "moonshine",
            "moonshine_streaming",
            "recurrent_gemma",
            "deimv2",
        ];
        with_bias.contains(&self.model) || DINOV2.contains(&self.model)
    }

    /// Sets the limit, slope and offset of limited units, and Falcon-H1's multipliers.
    fn with_formula(&self, cfg: FfnConfig) -> Result<FfnConfig> {
        let mut cfg = match self.model {
            "gpt_oss" | "openai_privacy_filter" | "minimax_m3_vl" => {
                let limit = positive_number(self.json, "swiglu_limit", 7.0)?;
                let beta = field(self.json, "swiglu_alpha")
                    .map_or(Ok(1.702), |value| number("swiglu_alpha", value))?;
                cfg.with_activation(GluActivation::Swish { beta })
                    .with_limit(limit)
                    .with_up_offset(1.0)
            }
            "deepseek_v4" | "glm5_next" | "glm5_next_vision" => {
                cfg.with_limit(positive_number(self.json, "swiglu_limit", 10.0)?)
            }
            "hy_v4" if self.part == Part::Expert => {
                cfg.with_limit(positive_number(self.json, "swiglu_limit", 10.0)?)
            }
            _ => cfg,
        };
        if let Some(value) = field(self.json, "mlp_multipliers") {
            cfg = match value.as_array().map(Vec::as_slice) {
                Some([gate, down]) => cfg.with_multipliers(
                    number("mlp_multipliers", gate)?,
                    number("mlp_multipliers", down)?,
                ),
                _ => return Err(invalid("mlp_multipliers", "two numbers", value)),
            };
        }
        Ok(cfg)
    }

    /// Sets the names and layouts that only the model type determines.
    fn with_names(&self, cfg: FfnConfig) -> FfnConfig {
        match self.model {
            "gpt_oss" => cfg.with_family(Family::Interleaved),
            "qwen" => cfg.with_family(Family::Qwen1),
            "lfm2" | "lfm2_moe" | "lfm3" | "lfm3_vl_vision" if self.part == Part::Dense => {
                cfg.with_family(Family::Meta)
            }
            "moonshine" | "moonshine_streaming" => cfg.with_family(Family::FlashAttn),
            "openelm" => cfg.with_family(Family::OpenElm),
            "moshi" | "moshi_depth" | "kyutai_speech_to" => {
                cfg.with_fused_names("fc1", "fc2", FusedOrder::GateFirst)
            }
            _ => cfg,
        }
    }
}

/// Whether a field's name says that it bounds, scales or normalises something inside a feed-forward
/// block. The fields that are read above are excluded.
fn is_modifier(name: &str) -> bool {
    const READ: [&str; 8] = [
        "activation_sparsity_pattern",
        "swiglu_limit",
        "swiglu_alpha",
        "swiglu_limits",
        "swiglu_limits_shared",
        "mlp_multipliers",
        "ffn_multipliers",
        "ffn_dim_multiplier",
    ];
    const INSIDE: [&str; 9] = [
        "softcap",
        "clip",
        "clamp",
        "limit",
        "scale",
        "multiplier",
        "sub_norm",
        "layernorm",
        "sparsity",
    ];
    let block = ["mlp_", "ffn_", "glu_", "moe_swiglu_", "act_", "activation_"]
        .iter()
        .any(|prefix| name.starts_with(prefix));
    let modifies =
        name.starts_with("swiglu_") || (block && INSIDE.iter().any(|part| name.contains(part)));
    (modifies || name == "use_clipped_linears") && !READ.contains(&name)
}
