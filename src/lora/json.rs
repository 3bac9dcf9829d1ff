//! `adapter_config.json`.

use serde_json::{Map, Value, json};

use super::config::{LoraConfig, Modules};
use crate::config::json::{field, flag, invalid, size, text, unsupported};
use crate::error::{Error, Result};

/// Fields that change the result in a way that is not computed, with the value that switches them
/// off besides null, and what they do.
const UNSUPPORTED: [(&str, Off, &str); 16] = [
    ("use_dora", Off::False, "DoRA scales the rows of the changed weight"),
    ("fan_in_fan_out", Off::False, "the weights of the base model are transposed"),
    ("lora_bias", Off::False, "B has a bias"),
    ("use_qalora", Off::False, "QALoRA pools x"),
    ("ensure_weight_tying", Off::False, "adapters of tied layers are tied"),
    ("modules_to_save", Off::Empty, "whole modules of the base model are replaced"),
    ("trainable_token_indices", Off::Empty, "rows of the embedding are replaced"),
    ("target_parameters", Off::Empty, "adapters of parameters that are not linear layers"),
    ("layer_replication", Off::Empty, "layers of the base model are repeated"),
    ("megatron_config", Off::Empty, "Megatron's parallel layers"),
    ("alora_invocation_tokens", Off::Null, "aLoRA applies to the tokens after an invocation only"),
    ("arrow_config", Off::Null, "Arrow chooses among adapters for each token"),
    ("use_bdlora", Off::Null, "BD-LoRA has block-diagonal matrices"),
    ("kasa_config", Off::Null, "KaSA changes the base weights"),
    ("velora_config", Off::Null, "VeLoRA has another backward pass"),
    ("monteclora_config", Off::Null, "MonteCLoRA draws samples of the weights"),
];

/// Fields that do not change the result of a saved adapter.
const NEUTRAL: [&str; 10] = [
    "auto_mapping",
    "corda_config", // how the adapter was initialised; init_lora_weights is checked
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
];

/// Fields that are read.
const READ: [&str; 16] = [
    "alpha_pattern",
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
];

/// The values of a field, besides null, that switch it off.
#[derive(Clone, Copy)]
enum Off {
    Null,
    False,
    /// An empty list or object.
    Empty,
}

impl Off {
    fn is(self, value: &Value) -> bool {
        value.is_null()
            || match self {
                Self::Null => false,
                Self::False => *value == Value::Bool(false),
                Self::Empty => is_empty(value),
            }
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

pub(super) fn read(json: &Value) -> Result<LoraConfig> {
    let map = json.as_object().ok_or_else(|| invalid("adapter_config", "an object", json))?;
    refuse(json, map)?;
    let config = LoraConfig {
        r: size(json, &["r"])?.unwrap_or(8),
        lora_alpha: field(json, "lora_alpha").map_or(Ok(8.0), |v| number("lora_alpha", v))?,
        use_rslora: flag(json, "use_rslora")?.unwrap_or(false),
        lora_dropout: field(json, "lora_dropout").map_or(Ok(0.0), |v| number("lora_dropout", v))?,
        rank_pattern: pairs(json, "rank_pattern", rank)?,
        alpha_pattern: pairs(json, "alpha_pattern", number)?,
        target_modules: modules(json, "target_modules", true)?,
        exclude_modules: modules(json, "exclude_modules", false)?,
        layers_to_transform: layers(json)?,
        layers_pattern: layers_pattern(json)?,
        base_model_name_or_path: owned(json, "base_model_name_or_path")?,
        revision: owned(json, "revision")?,
        task_type: owned(json, "task_type")?,
    };
    check_layers(json, &config)?;
    config.validate()?;
    Ok(config)
}

/// Refuses other methods than LoRA, and every field that is not read unless it is neutral.
fn refuse(json: &Value, map: &Map<String, Value>) -> Result<()> {
    match text(json, "peft_type")? {
        Some("LORA") => {}
        None => return Err(Error::MissingField { field: "peft_type" }),
        Some(_) => return Err(unsupported("peft_type", &map["peft_type"], "only LORA is read")),
    }
    if let Some(value) = field(json, "bias").filter(|value| *value != "none") {
        return Err(unsupported("bias", value, "biases of the base model are replaced"));
    }
    if let Some(value) = field(json, "init_lora_weights") {
        let keeps_base =
            value.is_boolean() || ["gaussian", "eva", "orthogonal"].iter().any(|v| value == v);
        if !keeps_base {
            return Err(unsupported("init_lora_weights", value, "it changes the base weights"));
        }
    }
    for (name, value) in map {
        let known = UNSUPPORTED.iter().find(|(field, ..)| field == name);
        match known {
            Some((_, off, _)) if off.is(value) => {}
            Some((.., reason)) => return Err(unsupported(name, value, reason)),
            None if READ.contains(&name.as_str()) || NEUTRAL.contains(&name.as_str()) => {}
            None if Off::False.is(value) || is_empty(value) => {}
            None => return Err(unsupported(name, value, "a field that is not known")),
        }
    }
    Ok(())
}

fn number(name: &str, value: &Value) -> Result<f64> {
    value.as_f64().ok_or_else(|| invalid(name, "a number", value))
}

fn rank(name: &str, value: &Value) -> Result<usize> {
    let found = value.as_u64().and_then(|r| usize::try_from(r).ok()).filter(|&r| r > 0);
    found.ok_or_else(|| invalid(name, "a positive integer", value))
}

fn owned(json: &Value, name: &str) -> Result<Option<String>> {
    Ok(text(json, name)?.map(str::to_string))
}

fn pairs<T>(
    json: &Value,
    name: &str,
    read: impl Fn(&str, &Value) -> Result<T>,
) -> Result<Vec<(String, T)>> {
    let Some(value) = field(json, name) else { return Ok(vec![]) };
    let map = value.as_object().ok_or_else(|| invalid(name, "an object", value))?;
    let pair =
        |(key, value): (&String, &Value)| Ok((key.clone(), read(&format!("{name}.{key}"), value)?));
    map.iter().map(pair).collect()
}

fn strings(name: &str, value: &Value) -> Result<Vec<String>> {
    let item = |value: &Value| value.as_str().map(str::to_string);
    let list = value.as_array().and_then(|list| list.iter().map(item).collect());
    list.ok_or_else(|| invalid(name, "a string or a list of strings", value))
}

/// `all_linear`: the name `all-linear` has its meaning.
fn modules(json: &Value, name: &str, all_linear: bool) -> Result<Option<Modules>> {
    let read = |value: &Value| match value.as_str() {
        Some(text) if all_linear && text.to_lowercase() == ALL_LINEAR => Ok(Modules::AllLinear),
        Some(text) => Ok(Modules::Regex(text.to_string())),
        None => Ok(Modules::Names(strings(name, value)?)),
    };
    // PEFT takes an empty exclude_modules for none.
    field(json, name).filter(|value| all_linear || !is_empty(value)).map(read).transpose()
}

const ALL_LINEAR: &str = "all-linear";

fn layers(json: &Value) -> Result<Vec<usize>> {
    const NAME: &str = "layers_to_transform";
    let Some(value) = field(json, NAME) else { return Ok(vec![]) };
    let layer = |value: &Value| value.as_u64().and_then(|layer| usize::try_from(layer).ok());
    let found = match value {
        Value::Array(list) => list.iter().map(layer).collect(),
        one => layer(one).map(|layer| vec![layer]),
    };
    found.ok_or_else(|| invalid(NAME, "a layer's number or a list of them", value))
}

fn layers_pattern(json: &Value) -> Result<Vec<String>> {
    const NAME: &str = "layers_pattern";
    match field(json, NAME).filter(|value| !is_empty(value)) {
        None => Ok(vec![]),
        Some(Value::String(one)) => Ok(vec![one.clone()]),
        Some(list) => strings(NAME, list),
    }
}

/// The combinations that PEFT refuses.
fn check_layers(json: &Value, config: &LoraConfig) -> Result<()> {
    let list = matches!(config.target_modules, Some(Modules::Names(_)) | None);
    for name in ["layers_to_transform", "layers_pattern"] {
        if let Some(value) = field(json, name).filter(|_| !list) {
            return Err(invalid(name, "null where target_modules is a string", value));
        }
    }
    match field(json, "layers_pattern") {
        Some(value)
            if !config.layers_pattern.is_empty()
                && field(json, "layers_to_transform").is_none() =>
        {
            Err(invalid("layers_pattern", "null without layers_to_transform", value))
        }
        _ => Ok(()),
    }
}

pub(super) fn write(config: &LoraConfig) -> Value {
    let modules = |modules: &Option<Modules>| match modules {
        None => Value::Null,
        Some(Modules::AllLinear) => json!(ALL_LINEAR),
        Some(Modules::Regex(regex)) => json!(regex),
        Some(Modules::Names(names)) => json!(names),
    };
    let ranks = config.rank_pattern.iter().map(|(key, r)| (key.clone(), json!(r)));
    let alphas = config.alpha_pattern.iter().map(|(key, alpha)| (key.clone(), integer(*alpha)));
    json!({
        "alpha_pattern": alphas.collect::<Map<_, _>>(),
        "base_model_name_or_path": config.base_model_name_or_path,
        "bias": "none",
        "exclude_modules": modules(&config.exclude_modules),
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_pattern": or_null(&config.layers_pattern),
        "layers_to_transform": or_null(&config.layers_to_transform),
        "lora_alpha": integer(config.lora_alpha),
        "lora_dropout": config.lora_dropout,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": ranks.collect::<Map<_, _>>(),
        "revision": config.revision,
        "target_modules": modules(&config.target_modules),
        "task_type": config.task_type,
        "use_dora": false,
        "use_rslora": config.use_rslora,
    })
}

fn or_null<T: serde::Serialize>(list: &[T]) -> Value {
    if list.is_empty() { Value::Null } else { json!(list) }
}

/// PEFT declares alpha as an integer, and other readers insist on it where it is one.
fn integer(value: f64) -> Value {
    const EXACT: f64 = 9_007_199_254_740_992.0; // 2^53
    if value.fract() == 0.0 && value.abs() < EXACT { json!(value as i64) } else { json!(value) }
}
