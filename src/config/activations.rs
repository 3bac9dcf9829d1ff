//! Which field of a `config.json` holds the gate's activation, by model type as in transformers
//! 5.23.

use serde_json::Value;

use super::json::{field, text, unsupported};
use crate::error::{Error, Result};
use crate::gate::activation::GluActivation::{self, Gelu, GeluTanh, Relu, Silu};

/// How a model type determines its activation.
enum Rule {
    /// The model's code fixes it; no field of the config changes it.
    Fixed(GluActivation),
    /// One field, or the default if it is absent.
    Field(&'static str, GluActivation),
    /// T5's `feed_forward_proj`, or the default if it is absent.
    T5(&'static str),
    /// A model type outside transformers: the first of the usual fields that exists.
    Usual,
}

/// Model types (without `_text`) that read `hidden_act` and default to SiLU.
#[rustfmt::skip]
const HIDDEN_ACT_SILU: &[&str] = &[
    "afmoe", "aimv2", "aimv2_vision_model", "aria", "axk1", "axk2", "bailing_hybrid", "bamba",
    "beam", "blt_global_transformer", "blt_local_decoder", "blt_local_encoder", "chameleon",
    "cohere", "cohere2", "cohere2_moe", "cohere_compass", "csm", "csm_depth_decoder_model", "cwm",
    "deepseek_ocr2", "deepseek_ocr2_encoder", "deepseek_v2", "deepseek_v3", "deepseek_v32",
    "deepseek_v4", "dia_decoder", "dia_encoder", "diffllama", "doge", "dots1", "dots3_note",
    "dots3_note_audio_encoder", "dots3_note_vision_encoder", "emu3", "ernie4_5", "ernie4_5_moe",
    "ernie4_5_vl_moe", "esmc", "eurobert", "evolla", "exaone4", "exaone4_5_vision", "exaone_moe",
    "falcon_h1", "flex_olmo", "flint", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "glm4v",
    "glm4v_moe", "glm4v_moe_vision", "glm4v_vision", "glm5_next", "glm5_next_vision", "glm_image",
    "glm_moe_dsa", "glm_ocr", "glm_ocr_vision", "granite", "granite4_vision", "granite_docling",
    "granite_swa", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "helium",
    "higgs_audio_v2", "hrm", "hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl", "hy_v3", "hy_v4",
    "hyperclovax", "idefics", "idefics2_perceiver", "jamba", "kimi_linear", "kolibri1",
    "kyutai_speech_to", "laguna", "llama", "llama4", "longcat_flash", "mellum", "mimo_v2_flash",
    "minicpm3", "minimax", "ministral", "ministral3", "mistral", "mistral4", "mistral_large4",
    "mixtral", "mllama", "molmo2", "molmo2_adapter", "moonshine_streaming", "moshi", "moshi_depth",
    "muse_glimmer_assistant", "muse_spark", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe",
    "ovis2_vision", "paddleocr_vl", "pe_audio_encoder", "pe_audio_video_encoder",
    "pe_video_encoder", "phi3", "phi4_multimodal", "phimoe", "qwen2", "qwen2_5_omni",
    "qwen2_5_omni_talker", "qwen2_5_omni_vision_encoder", "qwen2_5_vl", "qwen2_5_vl_vision",
    "qwen2_moe", "qwen2_vl", "qwen3", "qwen3_5", "qwen3_5_moe", "qwen3_moe", "qwen3_next",
    "qwen3_omni_moe", "qwen3_omni_moe_talker", "qwen3_omni_moe_talker_code_predictor", "qwen3_vl",
    "qwen3_vl_moe", "qwen4_exp", "sapiens2", "seed_oss", "smollm3", "solar_open", "stablelm",
    "step3p5", "step3p7", "ultrabert", "unlimited_ocr", "vibevoice_diffusion", "voxtral",
    "voxtral_realtime", "voxtral_realtime_encoder", "youtu",
];

/// Fields that hold the activation of the feed-forward block in some model type.
const FIELDS: [&str; 15] = [
    "hidden_activation",
    "hidden_act",
    "activation_function",
    "dense_act_fn",
    "act_fn",
    "activation",
    "activation_fn",
    "activation_fn_name",
    "activation_type",
    "ffn_act_fn",
    "ffn_activation",
    "ff_activation",
    "hidden_act_fn",
    "mlp_hidden_act",
    "mlp_activation_function",
];

const FEED_FORWARD: &str = "feed_forward_proj";

/// Whether the name of a field that is not in [`FIELDS`] says that it holds the activation of the
/// feed-forward block (`mlp_act`).
fn looks_like_one(name: &str) -> bool {
    const OF_THE_BLOCK: [&str; 9] =
        ["hidden", "mlp", "ffn", "ff", "feed", "forward", "glu", "gate", "dense"];
    const KIND: [&str; 5] = ["fn", "func", "function", "name", "type"];
    let mut parts = name.split('_').skip_while(|part| OF_THE_BLOCK.contains(part));
    let is_act = matches!(parts.next(), Some("act" | "activation"));
    name == "feed_forward_type"
        || (is_act && parts.all(|part| KIND.contains(&part)) && !FIELDS.contains(&name))
}

fn rule(model: &str) -> Rule {
    match model {
        "gpt_oss" | "openai_privacy_filter" | "minimax_m3_vl" => Rule::Fixed(Silu), // huggingface.rs sets its slope
        "lfm2" | "lfm2_moe" | "lfm3" | "lfm3_vl_vision" | "deimv2" | "esmfold2" => {
            Rule::Fixed(Silu)
        }
        _ if super::model::DINOV2.contains(&model) => Rule::Fixed(Silu),
        "gemma2" | "gemma3" | "gemma3n" | "gemma4" | "gemma4_vision" | "gemma4_unified"
        | "diffusion_gemma" | "embedding_gemma2" | "recurrent_gemma" | "vaultgemma"
        | "t5_gemma_module" | "t5gemma" | "t5gemma2" | "t5gemma2_decoder" => {
            Rule::Field("hidden_activation", GeluTanh)
        }
        "modernbert" | "modernbert-decoder" => Rule::Field("hidden_activation", Gelu),
        "muse_glimmer" => Rule::Field("hidden_activation", Silu),
        "gemma" => Rule::Field("hidden_act", GeluTanh),
        "gte" | "zamba" | "pixtral" | "dinov3_vit" | "eomt_dinov3" => {
            Rule::Field("hidden_act", Gelu)
        }
        "moonshine" => Rule::Field("decoder_hidden_act", Silu),
        "pix2struct" | "pix2struct_vision_model" | "kosmos-2.5" | "kosmos_2_5_vision_model" => {
            Rule::Field("dense_act_fn", GeluTanh)
        }
        "pop2piano" => Rule::Field("dense_act_fn", Relu),
        "t5" | "longt5" | "udop" => Rule::T5("relu"),
        "mt5" | "umt5" => Rule::T5("gated-gelu"),
        _ if HIDDEN_ACT_SILU.contains(&model) => Rule::Field("hidden_act", Silu),
        _ => Rule::Usual,
    }
}

/// The gate's activation of a model type, which is given without `_text`.
pub(super) fn read(json: &Value, model: &str) -> Result<GluActivation> {
    let rule = rule(model);
    if let Rule::Fixed(activation) = rule {
        return Ok(activation);
    }
    let t5 = text(json, FEED_FORWARD)?.map(gated);
    if let Some(Err(no_gate @ Error::Unsupported { .. })) = t5 {
        return Err(no_gate);
    }
    let (name, activation) = match rule {
        Rule::T5(default) => (FEED_FORWARD, t5.unwrap_or_else(|| gated(default))?),
        Rule::Field(name, default) => (name, named(json, name, model)?.unwrap_or(default)),
        _ if t5.is_some() => (FEED_FORWARD, t5.transpose()?.unwrap_or_default()),
        _ => match FIELDS.into_iter().find(|name| field(json, name).is_some()) {
            Some(name) => (name, named(json, name, model)?.unwrap_or_default()),
            None => ("hidden_act", Silu),
        },
    };
    agree(json, model, name, activation)?;
    Ok(activation)
}

/// Checks that every other field that holds an activation names the same one.
fn agree(json: &Value, model: &str, read: &str, activation: GluActivation) -> Result<()> {
    let reason = "it names another activation than the field that this model type reads";
    // The convolutions before Voxtral's audio layers have an activation of their own.
    let elsewhere = |name| model == "voxtral_realtime_encoder" && name == "activation_function";
    for name in FIELDS.into_iter().filter(|&name| name != read && !elsewhere(name)) {
        if let Some(value) = text(json, name)?.map(Value::from)
            && named(json, name, model).ok().flatten() != Some(activation)
        {
            return Err(unsupported(name, &value, reason));
        }
    }
    for (name, value) in
        json.as_object().into_iter().flatten().filter(|(name, _)| looks_like_one(name))
    {
        let same = |text: &str| {
            named(json, name, model).is_ok_and(|found| found == Some(activation)) || text.is_empty()
        };
        if value.as_str().is_some_and(|text| !same(text)) {
            return Err(unsupported(name, value, reason));
        }
    }
    // In Pop2Piano `dense_act_fn` and `feed_forward_proj` are independent.
    let other = text(json, FEED_FORWARD)?.filter(|_| read != FEED_FORWARD && model != "pop2piano");
    match other {
        Some(name) if gated(name).ok() != Some(activation) => {
            Err(unsupported(FEED_FORWARD, &name.into(), reason))
        }
        _ => Ok(()),
    }
}

/// The activation that a field names. The first release of Gemma wrote `gelu` for the tanh form.
fn named(json: &Value, name: &str, model: &str) -> Result<Option<GluActivation>> {
    let activation = text(json, name)?.map(str::parse).transpose()?;
    Ok(activation.map(
        |activation| if model == "gemma" && activation == Gelu { GeluTanh } else { activation },
    ))
}

/// T5's notation, in which `gated-gelu` is the tanh form.
fn gated(name: &str) -> Result<GluActivation> {
    match name.strip_prefix("gated-") {
        Some("gelu") => Ok(GeluTanh),
        Some(gate) => gate.parse(),
        None => Err(unsupported(FEED_FORWARD, &Value::from(name), "it has no gate")),
    }
}
