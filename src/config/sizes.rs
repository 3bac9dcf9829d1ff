//! I by model type, computed from the `config.json` as in the model's own code.

use serde_json::Value;

use super::json::{entry, field, flag, invalid, required, size, size_at, unsupported};
use super::model::{Config, DINOV2, Part};
use crate::error::{Error, Result};

pub(super) const INTERMEDIATE: [&str; 5] =
    ["intermediate_size", "d_ff", "ffn_hidden_size", "hidden_dim", "n_inner"];

impl Config<'_> {
    /// I. Whether a block of this size is possible is checked later.
    pub(super) fn intermediate_size(&self, hidden_size: usize) -> Result<usize> {
        let json = self.json;
        let one = |name: &'static str| {
            size_at(json, &[name], self.layer)?.ok_or(Error::MissingField { field: name })
        };
        let expert = ["moe_intermediate_size", "expert_ffn_hidden_size"];
        if let (Part::Expert, Some(size)) = (self.part, size_at(json, &expert, self.layer)?) {
            return Ok(size);
        }
        match self.model {
            "llama4" | "minimax_m3_vl" if self.part == Part::Expert => one("intermediate_size"),
            "deepseek_v4" if field(json, "moe_intermediate_size").is_some() => {
                one("moe_intermediate_size")
            }
            "granitemoeshared" | "granitemoehybrid" | "granitemoe_swa" => {
                one("shared_intermediate_size")
            }
            "minimax_m3_vl" => one("dense_intermediate_size"),
            "glm4v_vision" | "glm4v_moe_vision" => one("out_hidden_size"),
            "llama4"
                if field(json, "intermediate_size_mlp").is_some() && self.is_dense_llama4()? =>
            {
                one("intermediate_size_mlp")
            }
            "moshi" | "moshi_depth" | "kyutai_speech_to" => half("ffn_dim", json, one("ffn_dim")?),
            "recurrent_gemma" => Ok(one("intermediate_size")? / 2),
            "deimv2" => Ok(one("decoder_ffn_dim")? / 2),
            "lfm2" => lfm2(json),
            "openelm" => self.openelm(hidden_size),
            _ if field(json, "block_configs").is_some() => self.nemotron_nas(hidden_size),
            "gemma4" | "gemma4_unified" => {
                Ok(one("intermediate_size")?.saturating_mul(self.gemma4_width()?))
            }
            model if DINOV2.contains(&model) => dinov2(json, hidden_size),
            _ => self.usual_intermediate_size(),
        }
    }

    fn usual_intermediate_size(&self) -> Result<usize> {
        const FIELD: &str = "intermediate_size";
        if let Some(size) = size_at(self.json, &INTERMEDIATE, self.layer)? {
            // Qwen-1's intermediate_size counts gate and up together.
            return if self.model == "qwen" { half(FIELD, self.json, size) } else { Ok(size) };
        }
        match (size(self.json, &["dim"])?, size(self.json, &["multiple_of"])?) {
            (Some(dim), Some(multiple_of)) => meta(self.json, dim, multiple_of),
            _ => Err(Error::MissingField { field: FIELD }),
        }
    }

    /// Whether the block is dense. Llama 4 mixes layers of experts with dense layers, whose I is
    /// `intermediate_size_mlp`.
    fn is_dense_llama4(&self) -> Result<bool> {
        let step = size(self.json, &["interleave_moe_layer_step"])?.unwrap_or(1);
        let listed = field(self.json, "moe_layers").and_then(Value::as_array);
        Ok(match (self.layer, listed) {
            (Some(layer), Some(moe)) => {
                !moe.iter().any(|entry| entry.as_u64() == Some(layer as u64))
            }
            (Some(layer), None) => layer % step != step - 1,
            (None, Some(moe)) => moe.len() < size(self.json, &["num_hidden_layers"])?.unwrap_or(48),
            (None, None) => step > 1,
        })
    }

    /// The factor of I: Gemma 4 may double it in the layers that reuse keys and values.
    fn gemma4_width(&self) -> Result<usize> {
        const NAME: &str = "use_double_wide_mlp";
        if !flag(self.json, NAME)?.unwrap_or(false) {
            return Ok(1);
        }
        let shared = field(self.json, "num_kv_shared_layers").and_then(Value::as_u64).unwrap_or(0);
        let layers = size(self.json, &["num_hidden_layers"])?;
        match (self.layer, layers) {
            _ if shared == 0 => Ok(1),
            (Some(layer), Some(layers)) => {
                Ok(if (layer as u64).saturating_add(shared) >= layers as u64 { 2 } else { 1 })
            }
            _ => Err(unsupported(
                NAME,
                &Value::Bool(true),
                "the width differs by layer (FfnConfig::from_json_layer)",
            )),
        }
    }

    /// OpenELM: H times the layer's `ffn_multipliers`, rounded to the nearest multiple of
    /// `ffn_dim_divisor`.
    fn openelm(&self, hidden_size: usize) -> Result<usize> {
        const NAME: &str = "ffn_multipliers";
        let value = field(self.json, NAME).ok_or(Error::MissingField { field: NAME })?;
        let multiplier = entry(NAME, value, self.layer)?;
        let exact = match multiplier.as_f64() {
            Some(multiplier) if multiplier > 0.0 => multiplier * hidden_size as f64,
            _ => return Err(invalid(NAME, "a positive number for the layer", value)),
        };
        let divisor = size(self.json, &["ffn_dim_divisor"])?.unwrap_or(256);
        let nearest =
            ((exact + (divisor / 2) as f64) as usize / divisor).max(1).saturating_mul(divisor);
        // The result is not more than a tenth below the exact value.
        Ok(if (nearest as f64) < 0.9 * exact { nearest.saturating_add(divisor) } else { nearest })
    }

    /// Nemotron-NAS: two thirds of H times the layer's `ffn_mult`, rounded up to a multiple of 256.
    fn nemotron_nas(&self, hidden_size: usize) -> Result<usize> {
        const NAME: &str = "block_configs";
        let blocks = field(self.json, NAME).unwrap_or(&Value::Null);
        let ffn = entry(NAME, blocks, self.layer)?.get("ffn").unwrap_or(&Value::Null);
        for switch in ["no_op", "replace_with_linear"] {
            if flag(ffn, switch)? == Some(true) {
                return Err(unsupported(
                    NAME,
                    &Value::from(switch),
                    "the layer has no gated block",
                ));
            }
        }
        match (size(ffn, &["intermediate_size"])?, factor(ffn, "ffn_mult")?) {
            (Some(size), _) => Ok(size),
            (None, Some(factor)) => {
                round_up((2.0 * factor * hidden_size as f64 / 3.0) as usize, 256, "ffn_mult")
            }
            (None, None) => {
                Err(invalid(NAME, "ffn.ffn_mult or ffn.intermediate_size for the layer", ffn))
            }
        }
    }
}

fn half(name: &'static str, json: &Value, both: usize) -> Result<usize> {
    let odd = || invalid(name, "an even number", field(json, name).unwrap_or(&Value::Null));
    if both.is_multiple_of(2) { Ok(both / 2) } else { Err(odd()) }
}

/// A positive number that scales a size.
fn factor(json: &Value, name: &str) -> Result<Option<f64>> {
    field(json, name)
        .map(|value| match value.as_f64() {
            Some(factor) if factor > 0.0 && factor.is_finite() => Ok(factor),
            _ => Err(invalid(name, "a positive number", value)),
        })
        .transpose()
}

/// `size` rounded up to `multiple_of`.
fn round_up(size: usize, multiple_of: usize, name: &str) -> Result<usize> {
    let overflow = || invalid(name, "a size whose block fits memory", &Value::from(size));
    size.div_ceil(multiple_of).checked_mul(multiple_of).ok_or_else(overflow)
}

/// Meta's rule: two thirds of 4·dim, truncated; times `ffn_dim_multiplier`, truncated; rounded up
/// to a multiple of `multiple_of`.
fn meta(json: &Value, dim: usize, multiple_of: usize) -> Result<usize> {
    let overflow = || invalid("dim", "a size whose block fits memory", &Value::from(dim));
    let two_thirds = dim.checked_mul(8).ok_or_else(overflow)? / 3;
    let scaled = factor(json, "ffn_dim_multiplier")?
        .map_or(two_thirds, |factor| (factor * two_thirds as f64) as usize);
    scaled.div_ceil(multiple_of).checked_mul(multiple_of).ok_or_else(overflow)
}

/// LFM2: `block_ff_dim` (or `intermediate_size`). Meta's rule applies to it unless
/// `block_auto_adjust_ff_dim` is false.
fn lfm2(json: &Value) -> Result<usize> {
    let full = required(json, &["block_ff_dim", "intermediate_size"], "intermediate_size")?;
    if !flag(json, "block_auto_adjust_ff_dim")?.unwrap_or(true) {
        return Ok(full);
    }
    let two_thirds = full.checked_mul(2).map_or(full / 3 * 2, |twice| twice / 3);
    let scaled = factor(json, "block_ffn_dim_multiplier")?.unwrap_or(1.0) * two_thirds as f64;
    let multiple_of = size(json, &["block_multiple_of"])?.unwrap_or(256);
    round_up(scaled as usize, multiple_of, "block_ff_dim")
}

/// DINOv2: two thirds of H·`mlp_ratio`, rounded up to a multiple of 8.
fn dinov2(json: &Value, hidden_size: usize) -> Result<usize> {
    let full = (hidden_size as f64 * factor(json, "mlp_ratio")?.unwrap_or(4.0)) as usize;
    round_up((full as f64 * 2.0 / 3.0) as usize, 8, "mlp_ratio")
}
