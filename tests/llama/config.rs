//! The fields of config.json that the example reads, for each model type.

use anyhow::{Context, Result, ensure};
use candle_core::DType;
use serde_json::{Value, json};

use super::model::LlamaConfig;
use super::model::config::{ModelType, RopeScaling};

/// A config with the sizes that every config has, and `fields`.
fn with(model_type: &str, fields: Value) -> Result<Value> {
    let mut all = json!({"model_type": model_type, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 100,
        "num_hidden_layers": 4, "num_attention_heads": 32});
    let map = all.as_object_mut().context("an object")?;
    for (field, value) in fields.as_object().context("an object")? {
        map.insert(field.clone(), value.clone());
    }
    Ok(all)
}

fn read(model_type: &str, fields: Value) -> Result<LlamaConfig> {
    Ok(LlamaConfig::from_json(&with(model_type, fields)?)?)
}

fn error(model_type: &str, fields: Value) -> Result<String> {
    let found = LlamaConfig::from_json(&with(model_type, fields.clone())?);
    Ok(found
        .err()
        .with_context(|| format!("{model_type} {fields}: expected an error"))?
        .to_string())
}

const MODEL_TYPES: [&str; 7] = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "phi3"];

/// The values are those of the config classes of transformers 5.23.
#[test]
fn missing_fields_have_the_defaults_of_the_model_type() -> Result<()> {
    let expected = [
        // context, eps, key and value heads, head_dim, theta, tied, bos, eos, window
        ("llama", 2048, 1e-6, 32, 2, 1e4, false, Some(1), vec![2], None),
        ("mistral", 131_072, 1e-6, 8, 2, 1e4, false, Some(1), vec![2], Some(4096)),
        ("qwen2", 32_768, 1e-6, 32, 2, 1e4, false, None, vec![], None),
        ("qwen3", 32_768, 1e-6, 32, 128, 1e4, false, None, vec![], None),
        ("smollm3", 32_768, 1e-6, 4, 2, 2e6, true, Some(128_000), vec![128_001], None),
        ("granite", 2048, 1e-6, 32, 2, 1e4, false, Some(1), vec![2], None),
        ("phi3", 4096, 1e-5, 32, 2, 1e4, false, Some(1), vec![32_000], None),
    ];
    for (model_type, context, eps, kv_heads, head_dim, theta, tied, bos, eos, window) in expected {
        let cfg = read(model_type, json!({}))?;
        assert_eq!((cfg.max_position_embeddings, cfg.rms_norm_eps), (context, eps), "{model_type}");
        assert_eq!(
            (cfg.num_key_value_heads, cfg.head_dim, cfg.rope.dim),
            (kv_heads, head_dim, head_dim),
            "{model_type}"
        );
        assert_eq!(
            (cfg.rope.theta, &cfg.rope.scaling),
            (theta, &RopeScaling::None),
            "{model_type}"
        );
        assert_eq!(
            (cfg.tie_word_embeddings, cfg.bos_token_id, cfg.eos_token_ids),
            (tied, bos, eos),
            "{model_type}"
        );
        assert_eq!((cfg.sliding_window, cfg.dtype), (window, None), "{model_type}");
    }
    // null means the number of heads; a number means that number.
    assert_eq!(read("mistral", json!({"num_key_value_heads": null}))?.num_key_value_heads, 32);
    assert_eq!(read("mistral", json!({"num_key_value_heads": 2}))?.num_key_value_heads, 2);
    let message = error("smollm3", json!({"num_attention_heads": 6, "hidden_size": 66}))?;
    ensure!(message.contains("num_key_value_heads") && message.contains("means 4"), "{message}");
    assert!(!read("smollm3", json!({"tie_word_embeddings": null}))?.tie_word_embeddings);
    for field in [
        "hidden_size",
        "intermediate_size",
        "vocab_size",
        "num_hidden_layers",
        "num_attention_heads",
    ] {
        let message = error("llama", json!({ field: null }))?;
        ensure!(message.contains(&format!("missing field {field}")), "{message}");
    }
    Ok(())
}

/// One example of each kind of value for each field.
#[test]
fn what_would_be_another_computation_is_refused_by_name() -> Result<()> {
    let everywhere = [
        json!({"attn_logit_softcapping": 50.0}),
        json!({"final_logit_softcapping": 30.0}),
        json!({"query_pre_attn_scalar": 256}),
        json!({"use_qk_norm": true}),
        json!({"qk_layernorm": true}),
        json!({"clip_qkv": 8.0}),
        json!({"logit_scale": 0.0625}),
        json!({"scale_emb": 12}),
        json!({"key_multiplier": 0.5}),
        json!({"alibi": true}),
        json!({"parallel_attn": true}),
        json!({"num_local_experts": 8}),
        json!({"is_causal": false}),
        json!({"position_embedding_type": "nope"}),
        json!({"quantization_config": {"quant_method": "gptq"}}),
        json!({"quantization": {"bits": 4, "group_size": 64}}),
        json!({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
        json!({"layer_types": ["linear_attention", "full_attention", "full_attention", "full_attention"]}),
        json!({"layer_types": ["full_attention"]}),
    ];
    let mut cases: Vec<(&str, Value)> = MODEL_TYPES
        .iter()
        .flat_map(|name| everywhere.iter().map(|fields| (*name, fields.clone())))
        .collect();
    let granite =
        ["embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"];
    for name in MODEL_TYPES.into_iter().filter(|name| *name != "granite") {
        cases.extend(granite.map(|field| (name, json!({field: 0.5}))));
    }
    for name in MODEL_TYPES.into_iter().filter(|name| *name != "smollm3") {
        cases.push((name, json!({"no_rope_layers": [1, 0, 1, 1]})));
    }
    for name in ["mistral", "phi3"] {
        cases.push((name, json!({"attention_bias": true})));
    }
    for name in ["mistral", "qwen2", "qwen3", "phi3"] {
        cases.push((name, json!({"mlp_bias": true})));
    }
    for name in ["llama", "mistral", "qwen2", "qwen3", "smollm3", "granite"] {
        cases.push((name, json!({"partial_rotary_factor": 0.5})));
        cases.push((name, json!({"rope_scaling": {"rope_type": "longrope"}})));
        cases.push((name, json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}})));
    }
    for name in MODEL_TYPES {
        cases.push((
            name,
            json!({"layer_types": ["sliding_attention", "full_attention", "full_attention", "full_attention"],
            "sliding_window": null}),
        ));
    }
    cases.push(("phi3", json!({"rope_scaling": {"rope_type": "linear", "factor": 2.0}})));
    cases.push(("mistral", json!({"layer_types": vec!["full_attention"; 4]})));
    for (model_type, fields) in cases {
        let message = error(model_type, fields.clone())?;
        let field =
            fields.as_object().and_then(|map| map.keys().next().cloned()).context("a field")?;
        ensure!(message.contains(&field), "{model_type} {fields}: {message}");
    }
    for model_type in ["gemma2", "minicpm", "cohere", "stablelm", "olmo2", "mixtral", "LLAMA"] {
        let message = error(model_type, json!({}))?;
        ensure!(message.contains(model_type) && message.contains("smollm3"), "{message}");
    }
    Ok(())
}

/// The same fields with a value that has no effect, and fields that concern training.
#[test]
fn what_changes_nothing_is_accepted() -> Result<()> {
    let harmless = json!({"attn_logit_softcapping": null, "final_logit_softcapping": null, "use_qk_norm": false, "clip_qkv": null,
        "logit_scale": 1.0, "scale_emb": 1, "alibi": false, "num_local_experts": 0, "is_causal": true, "no_rope_layers": [1, 1, 1, 1],
        "position_embedding_type": "rope", "quantization_config": null, "residual_multiplier": 1.0, "embedding_multiplier": 1,
        "logits_scaling": 1.0, "mlp_multipliers": null, "partial_rotary_factor": 1.0, "attention_bias": false, "mlp_bias": false,
        "attention_dropout": 0.1, "initializer_range": 0.1, "pretraining_tp": 2, "use_cache": false, "num_nextn_predict_layers": 1});
    for model_type in MODEL_TYPES {
        read(model_type, harmless.clone()).with_context(|| model_type.to_string())?;
    }
    Ok(())
}

#[test]
fn windows() -> Result<()> {
    let sliding =
        |cfg: &LlamaConfig| cfg.layers.iter().map(|layer| layer.sliding).collect::<Vec<_>>();
    let (all, none) = ([true; 4], [false; 4]);
    let cases = [
        // Mistral-7B-v0.1
        (
            "mistral",
            json!({"max_position_embeddings": 32_768, "sliding_window": 4096}),
            Some(4096),
            all,
        ),
        ("mistral", json!({"max_position_embeddings": 32_768, "sliding_window": null}), None, none),
        ("mistral", json!({"max_position_embeddings": 4096, "sliding_window": 4096}), None, none),
        (
            "mistral",
            json!({"sliding_window": 9, "layer_types": vec!["sliding_attention"; 4]}),
            Some(9),
            all,
        ),
        // Phi-3-mini-4k
        ("phi3", json!({"max_position_embeddings": 4096, "sliding_window": 2047}), Some(2047), all),
        (
            "qwen2",
            json!({"sliding_window": 7, "use_sliding_window": false, "max_window_layers": 2}),
            None,
            none,
        ),
        (
            "qwen2",
            json!({"sliding_window": 7, "use_sliding_window": true, "max_window_layers": 2}),
            Some(7),
            [false, false, true, true],
        ),
        ("qwen3", json!({"sliding_window": 7, "use_sliding_window": true}), Some(7), none),
        ("qwen3", json!({"use_sliding_window": true, "max_window_layers": 0}), Some(4096), all),
        (
            "qwen3",
            json!({"sliding_window": 7, "use_sliding_window": true,
                "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]}),
            Some(7),
            [true, false, false, true],
        ),
        (
            "smollm3",
            json!({"use_sliding_window": true, "sliding_window": 7}),
            Some(7),
            [false, false, false, true],
        ),
        ("smollm3", json!({"use_sliding_window": true}), None, none),
        (
            "smollm3",
            json!({"use_sliding_window": true, "sliding_window": 7, "no_rope_layers": [0, 1, 1, 0, 1]}),
            Some(7),
            [true, false, false, true],
        ),
    ];
    for (model_type, fields, window, layers) in cases {
        let cfg =
            read(model_type, fields.clone()).with_context(|| format!("{model_type} {fields}"))?;
        assert_eq!(
            (cfg.sliding_window, &sliding(&cfg)[..]),
            (window, &layers[..]),
            "{model_type} {fields}"
        );
    }
    // transformers' llama attends to all positions. Up to the window there is no difference.
    let cfg = read("llama", json!({"max_position_embeddings": 32_768, "sliding_window": 4096}))?;
    assert_eq!(
        (cfg.sliding_window, cfg.max_position_embeddings, cfg.context_field),
        (None, 4096, "sliding_window")
    );
    let cfg = read("llama", json!({"max_position_embeddings": 4096, "sliding_window": 4096}))?;
    assert_eq!((cfg.max_position_embeddings, cfg.context_field), (4096, "max_position_embeddings"));
    Ok(())
}

#[test]
fn layers_without_rope() -> Result<()> {
    let rope = |fields| {
        Ok::<_, anyhow::Error>(
            read("smollm3", fields)?.layers.iter().map(|layer| layer.rope).collect::<Vec<_>>(),
        )
    };
    assert_eq!(rope(json!({}))?, [true, true, true, false]);
    assert_eq!(rope(json!({"no_rope_layer_interval": 2}))?, [true, false, true, false]);
    assert_eq!(
        rope(json!({"no_rope_layers": [0, 1, 1, 0], "no_rope_layer_interval": 2}))?,
        [false, true, true, false]
    );
    for wrong in [json!([0, 1, 1]), json!([0, 1, 1, 2]), json!("all"), json!([0.5, 1, 1, 1])] {
        let message = error("smollm3", json!({"no_rope_layers": wrong}))?;
        ensure!(message.contains("no_rope_layers"), "{message}");
    }
    Ok(())
}

#[test]
fn granite_has_its_multipliers() -> Result<()> {
    let cfg = read(
        "granite",
        json!({"embedding_multiplier": 12, "attention_multiplier": 0.0078125, "residual_multiplier": 0.22, "logits_scaling": 16}),
    )?;
    let found = (
        cfg.embedding_multiplier,
        cfg.attention_scale,
        cfg.residual_multiplier,
        cfg.logits_scaling,
    );
    assert_eq!(found, (12.0, 0.0078125, 0.22, 16.0));
    // The default of transformers, not 1/√head_dim.
    assert_eq!(read("granite", json!({}))?.attention_scale, 1.0);
    assert_eq!(read("llama", json!({"head_dim": 16}))?.attention_scale, 0.25);
    Ok(())
}

#[test]
fn phi3_rotates_parts_and_stretches() -> Result<()> {
    let rope = json!({"type": "su", "short_factor": [1.0, 1.5, 2.0], "long_factor": [1, 2, 3]});
    let fields = json!({"head_dim": 8, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 4096,
        "max_position_embeddings": 131_072, "rope_scaling": rope});
    let cfg = read("phi3", fields)?;
    assert_eq!(cfg.rope.dim, 6);
    let RopeScaling::LongRope { short, long, original_max_position_embeddings, attention_factor } =
        cfg.rope.scaling
    else {
        anyhow::bail!("{:?}", cfg.rope.scaling)
    };
    assert_eq!(
        (&short[..], &long[..], original_max_position_embeddings),
        (&[1.0, 1.5, 2.0][..], &[1.0, 2.0, 3.0][..], 4096)
    );
    // √(1 + ln 32 / ln 4096)
    ensure!((attention_factor - 1.190_238).abs() < 1e-6, "{attention_factor}");
    for (field, value) in [
        ("short_factor", json!([1.0, 1.5])),
        ("long_factor", Value::Null),
        ("short_factor", json!([1.0, 0.0, 1.0])),
    ] {
        let mut rope =
            json!({"type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [1, 2, 3]});
        rope[field] = value;
        let message = error(
            "phi3",
            json!({"head_dim": 8, "partial_rotary_factor": 0.75, "rope_scaling": rope}),
        )?;
        ensure!(message.contains(field), "{message}");
    }
    for factor in [0.0, 1.5, -1.0, 0.01] {
        let message = error("phi3", json!({"partial_rotary_factor": factor}))?;
        ensure!(message.contains("partial_rotary_factor"), "{message}");
    }
    let message = error("llama", json!({"head_dim": 7}))?;
    ensure!(message.contains("head_dim"), "{message}");
    Ok(())
}

/// The result is an error, and nothing is allocated.
#[test]
fn sizes_without_measure() -> Result<()> {
    for field in ["num_hidden_layers", "head_dim", "num_attention_heads"] {
        for size in [u64::MAX, 1 << 62] {
            let message = error("smollm3", json!({field: size, "num_key_value_heads": null}))?;
            ensure!(message.contains(field), "{field}: {message}");
        }
    }
    for (field, wrong) in
        [("num_hidden_layers", json!(0)), ("head_dim", json!(0)), ("hidden_size", json!(-1))]
    {
        let message = error("llama", json!({field: wrong}))?;
        ensure!(message.contains(field), "{message}");
    }
    Ok(())
}

#[test]
fn negative_token_ids_are_none() -> Result<()> {
    let cfg = read("llama", json!({"eos_token_id": -1, "bos_token_id": -1}))?;
    assert_eq!((cfg.eos_token_ids, cfg.bos_token_id), (vec![], None));
    assert_eq!(read("llama", json!({"eos_token_id": [2, -1, 5]}))?.eos_token_ids, [2, 5]);
    ensure!(read("llama", json!({"eos_token_id": null}))?.eos_token_ids.is_empty());
    for wrong in [json!("2"), json!([2, "3"]), json!(1.5), json!(4_294_967_296u64)] {
        let message = error("llama", json!({"eos_token_id": wrong}))?;
        ensure!(message.contains("eos_token_id"), "{message}");
    }
    // The id of generation_config.json replaces a default, and is added to the ids of config.json.
    for (fields, expected) in [
        (json!({}), vec![7]),
        (json!({"eos_token_id": 2}), vec![2, 7]),
        (json!({"eos_token_id": null}), vec![7]),
    ] {
        let mut cfg = read("llama", fields)?;
        cfg.add_eos_of(&json!({"eos_token_id": [7, -1]}))?;
        assert_eq!(cfg.eos_token_ids, expected);
    }
    let mut cfg = read("llama", json!({}))?;
    cfg.add_eos_of(&json!({"temperature": 0.5}))?;
    assert_eq!(cfg.eos_token_ids, [2]);
    Ok(())
}

#[test]
fn dtypes_are_read_or_left_open() -> Result<()> {
    for (fields, expected) in [
        (json!({"torch_dtype": "bfloat16"}), Some(DType::BF16)),
        (json!({"dtype": "float16", "torch_dtype": "float32"}), Some(DType::F16)),
        (json!({"torch_dtype": "torch.float32"}), Some(DType::F32)),
        (json!({"torch_dtype": "auto"}), None),
        (json!({"torch_dtype": null, "dtype": null}), None),
        (json!({}), None),
    ] {
        assert_eq!(read("llama", fields.clone())?.dtype, expected, "{fields}");
    }
    assert_eq!(read("qwen3", json!({}))?.model_type, ModelType::Qwen3);
    Ok(())
}
