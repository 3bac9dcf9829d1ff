//! `FfnConfig` from the configs of published models. Every field that cannot be honoured is refused
//! by name.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use candle_swiglu::{Biases, Error, Family, FfnConfig, GluActivation};
use serde::Deserialize;
use serde_json::{Value, json};

fn with_tanh(cfg: FfnConfig) -> FfnConfig {
    cfg.with_activation(GluActivation::GeluTanh)
}

/// The fields of published configs that concern the block, some other fields, and the block that
/// they describe.
fn published() -> Vec<(&'static str, Value, FfnConfig)> {
    let cfg = FfnConfig::new;
    vec![
        (
            "LLaMA 2 7B",
            json!({"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "hidden_act": "silu",
                   "pretraining_tp": 1, "rope_scaling": null, "torch_dtype": "float16"}),
            cfg(4096, 11008),
        ),
        (
            "LLaMA 3 8B",
            json!({"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "hidden_act": "silu",
                   "mlp_bias": false, "attention_bias": false, "rope_theta": 500000.0}),
            cfg(4096, 14336),
        ),
        (
            "LLaMA with MLP biases",
            json!({"model_type": "llama", "hidden_size": 64, "intermediate_size": 176, "hidden_act": "silu", "mlp_bias": true}),
            cfg(64, 176).with_bias(true),
        ),
        (
            "attention biases do not concern the block",
            json!({"model_type": "llama", "hidden_size": 64, "intermediate_size": 176, "attention_bias": true}),
            cfg(64, 176),
        ),
        (
            "Mistral 7B",
            json!({"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "hidden_act": "silu", "sliding_window": null}),
            cfg(4096, 14336),
        ),
        (
            "Qwen2 0.5B",
            json!({"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "hidden_act": "silu"}),
            cfg(896, 4864),
        ),
        (
            "Gemma 1, where gelu means the tanh form",
            json!({"model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "hidden_act": "gelu", "hidden_activation": null}),
            with_tanh(cfg(2048, 16384)),
        ),
        (
            "Gemma 1, corrected",
            json!({"model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "hidden_act": "gelu_pytorch_tanh"}),
            with_tanh(cfg(2048, 16384)),
        ),
        (
            "Gemma 2",
            json!({"model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "hidden_act": "gelu_pytorch_tanh",
                   "hidden_activation": "gelu_pytorch_tanh"}),
            with_tanh(cfg(2304, 9216)),
        ),
        (
            "Gemma 3 1B",
            json!({"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "hidden_activation": "gelu_pytorch_tanh"}),
            with_tanh(cfg(1152, 6912)),
        ),
        (
            "Gemma 3 4B, the text model of a multimodal config",
            json!({"model_type": "gemma3", "vision_config": {"hidden_size": 1152, "intermediate_size": 4304},
                   "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240}}),
            with_tanh(cfg(2560, 10240)),
        ),
        (
            "Phi-3 mini",
            json!({"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "hidden_act": "silu"}),
            cfg(3072, 8192),
        ),
        (
            "Mixtral 8x7B",
            json!({"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "hidden_act": "silu",
                   "num_local_experts": 8}),
            cfg(4096, 14336),
        ),
        (
            "Falcon-H1",
            json!({"model_type": "falcon_h1", "hidden_size": 1024, "intermediate_size": 2048, "hidden_act": "silu",
                   "mlp_bias": false, "mlp_multipliers": [0.8838834764831844, 0.5859375]}),
            cfg(1024, 2048).with_multipliers(0.883_883_5, 0.5859375),
        ),
        (
            "T5 v1.1 small",
            json!({"model_type": "t5", "d_model": 512, "d_ff": 1024, "feed_forward_proj": "gated-gelu",
                   "dense_act_fn": "gelu_new", "is_gated_act": true}),
            with_tanh(cfg(512, 1024)),
        ),
        (
            "T5-like with a SiLU gate",
            json!({"model_type": "t5", "d_model": 512, "d_ff": 1024, "feed_forward_proj": "gated-silu"}),
            cfg(512, 1024),
        ),
        (
            "ChatGLM3 6B",
            json!({"model_type": "chatglm", "hidden_size": 4096, "ffn_hidden_size": 13696, "add_bias_linear": false,
                   "add_qkv_bias": true}),
            cfg(4096, 13696),
        ),
        (
            "nomic-embed v1",
            json!({"model_type": "nomic_bert", "n_embd": 768, "n_inner": 3072, "activation_function": "swiglu",
                   "mlp_fc1_bias": false, "mlp_fc2_bias": false}),
            cfg(768, 3072),
        ),
        (
            "nomic-embed v1 as transformers 5 writes it",
            json!({"model_type": "nomic_bert", "hidden_size": 768, "intermediate_size": 3072, "hidden_act": "silu", "head_dim": null}),
            cfg(768, 3072),
        ),
        (
            "Qwen-1 7B, whose intermediate_size counts gate and up",
            json!({"model_type": "qwen", "hidden_size": 4096, "intermediate_size": 22016, "no_bias": true}),
            cfg(4096, 11008).with_family(Family::Qwen1),
        ),
        ("Meta LLaMA 7B", meta(json!({"dim": 4096, "multiple_of": 256})), cfg(4096, 11008)),
        ("Meta LLaMA 13B", meta(json!({"dim": 5120, "multiple_of": 256})), cfg(5120, 13824)),
        (
            "Meta LLaMA 2 70B",
            meta(
                json!({"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_kv_heads": 8}),
            ),
            cfg(8192, 28672),
        ),
        (
            "Meta LLaMA 3 8B",
            meta(json!({"dim": 4096, "multiple_of": 1024, "ffn_dim_multiplier": 1.3})),
            cfg(4096, 14336),
        ),
        (
            "Meta LLaMA 3.2 1B",
            meta(json!({"dim": 2048, "multiple_of": 256, "ffn_dim_multiplier": 1.5})),
            cfg(2048, 8192),
        ),
        (
            "Meta, multiplier null",
            meta(json!({"dim": 4096, "multiple_of": 256, "ffn_dim_multiplier": null})),
            cfg(4096, 11008),
        ),
        (
            "Mistral's own params.json",
            json!({"dim": 4096, "hidden_dim": 14336, "n_layers": 32}),
            cfg(4096, 14336),
        ),
        (
            "explicit nulls, as transformers 5 writes them",
            json!({"model_type": "llama", "hidden_size": 64, "intermediate_size": 176, "hidden_act": "silu", "mlp_bias": null,
                   "quantization_config": null, "hidden_activation": null, "swiglu_limit": null, "mlp_multipliers": null,
                   "activation_sparsity_pattern": null, "feed_forward_proj": null, "text_config": null, "d_model": null}),
            cfg(64, 176),
        ),
        (
            "a sparsity of zero changes nothing",
            json!({"hidden_size": 64, "intermediate_size": 176, "activation_sparsity_pattern": [0.0, 0.0]}),
            cfg(64, 176),
        ),
    ]
}

/// Adds the other fields of a `params.json`.
fn meta(mut fields: Value) -> Value {
    let rest = json!({"n_layers": 32, "n_heads": 32, "norm_eps": 1e-5, "vocab_size": -1});
    for (name, value) in rest.as_object().unwrap() {
        fields[name] = value.clone();
    }
    fields
}

#[test]
fn published_configs() {
    for (model, json, expected) in published() {
        match FfnConfig::from_json(&json) {
            Ok(cfg) => assert_eq!(cfg, expected, "{model}"),
            Err(error) => panic!("{model}: {error}"),
        }
    }
}

#[test]
fn deserialize_reads_what_from_json_reads() {
    for (model, json, expected) in published() {
        assert_eq!(FfnConfig::deserialize(&json).expect(model), expected, "{model}");
        assert_eq!(
            serde_json::from_str::<FfnConfig>(&json.to_string()).expect(model),
            expected,
            "{model}"
        );
    }
    // as a flattened field of a model's own config
    #[derive(Deserialize)]
    struct Model {
        vocab_size: usize,
        #[serde(flatten)]
        ffn: FfnConfig,
    }
    let model: Model = serde_json::from_value(
        json!({"vocab_size": 256, "hidden_size": 8, "intermediate_size": 24, "hidden_act": "relu"}),
    )
    .unwrap();
    assert_eq!(
        (model.vocab_size, model.ffn),
        (256, FfnConfig::new(8, 24).with_activation(GluActivation::Relu))
    );
    // serde does not pass on the fields that a struct consumes. The block must be read from the
    // same value.
    #[derive(Debug, Deserialize)]
    struct Taken {
        hidden_size: usize,
        #[serde(flatten)]
        _ffn: FfnConfig,
    }
    let json = json!({"hidden_size": 8, "intermediate_size": 24});
    let error = Taken::deserialize(&json).map(|model| model.hidden_size).unwrap_err();
    assert_eq!(error.to_string(), "config: missing field hidden_size");
    assert_eq!(FfnConfig::from_json(&json).unwrap(), FfnConfig::new(8, 24));
    let error = serde_json::from_value::<FfnConfig>(json!({"hidden_size": 8})).unwrap_err();
    assert_eq!(error.to_string(), "config: missing field intermediate_size");
}

#[test]
fn gpt_oss() {
    let json = |extra: Value| {
        let mut json = json!({"model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "hidden_act": "silu"});
        json.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        FfnConfig::from_json(&json).unwrap()
    };
    let block = |beta, limit| {
        let cfg = FfnConfig::new(2880, 2880)
            .with_activation(GluActivation::Swish { beta })
            .with_limit(limit);
        cfg.with_up_offset(1.0).with_bias(true)
    };
    for (cfg, expected) in [
        (json(json!({"swiglu_limit": 7.0, "swiglu_alpha": 1.702})), block(1.702, 7.0)),
        (json(json!({"swiglu_limit": 7.0})), block(1.702, 7.0)),
        (json(json!({})), block(1.702, 7.0)),
        (json(json!({"swiglu_limit": 3.5, "swiglu_alpha": 1.5})), block(1.5, 3.5)),
    ] {
        // The rows of gate and up alternate in gate_up_proj. Detection by names would treat them as
        // two halves.
        assert_eq!(cfg.family, Some(Family::Interleaved));
        assert_eq!(cfg, expected.with_family(Family::Interleaved));
    }
}

#[test]
fn hidden_act_names() {
    use GluActivation::*;
    let names = [
        (Silu, &["silu", "swish", "swiglu"][..]),
        (Swish { beta: 1.702 }, &["quick_gelu", "swish(1.702)"]),
        (Swish { beta: -2.5 }, &["swish(-2.5)"]),
        (Sigmoid, &["sigmoid", "glu"]),
        (Relu, &["relu", "reglu"]),
        (Gelu, &["gelu", "gelu_python", "geglu"]),
        (GeluTanh, &["gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_tanh"]),
        (Identity, &["linear", "identity", "bilinear"]),
        (Relu2, &["relu2", "relu_squared"]),
    ];
    for (activation, names) in names {
        for name in names {
            for field in ["hidden_act", "hidden_activation", "activation_function"] {
                let cfg = FfnConfig::from_json(
                    &json!({"hidden_size": 8, "intermediate_size": 24, field: name}),
                )
                .expect(name);
                assert_eq!(cfg.activation, activation, "{field} = {name}");
            }
            assert_eq!(
                serde_json::from_value::<GluActivation>(json!(name)).unwrap(),
                activation,
                "{name}"
            );
        }
        // Serialization and deserialization agree.
        let written = serde_json::to_value(activation).unwrap();
        assert_eq!(written, json!(activation.to_string()));
        assert_eq!(serde_json::from_value::<GluActivation>(written).unwrap(), activation);
    }
    for unknown in [
        "mish",
        "relu6",
        "laplace",
        "SiLU",
        "",
        " silu",
        "swish(",
        "swish()",
        "swish(nan)",
        "swish(inf)",
        "swish(1e99)",
    ] {
        let error = FfnConfig::from_json(
            &json!({"hidden_size": 8, "intermediate_size": 24, "hidden_act": unknown}),
        )
        .unwrap_err();
        assert!(
            matches!(&error, Error::UnknownActivation { name, .. } if name == unknown),
            "{unknown}: {error:?}"
        );
        let message = error.to_string();
        assert!(
            message.contains(&format!("\"{unknown}\"")) && message.contains("silu, swish"),
            "{message}"
        );
    }
}

/// A valid config with some fields replaced; null removes a field.
fn patched(fields: Value) -> Value {
    let mut json = json!({"hidden_size": 8, "intermediate_size": 24, "hidden_act": "silu"});
    for (name, value) in fields.as_object().unwrap() {
        json[name] = value.clone();
    }
    json
}

#[test]
fn a_missing_size_is_named() {
    for (json, field) in [
        (patched(json!({"hidden_size": null})), "hidden_size"),
        (patched(json!({"intermediate_size": null})), "intermediate_size"),
        (json!({"dim": 4096}), "intermediate_size"),
        (json!({"hidden_size": 4096, "multiple_of": 256}), "intermediate_size"), // Meta's rule applies only to Meta's fields
        (json!({"text_config": {"hidden_size": 8}}), "intermediate_size"),
        (json!({}), "hidden_size"),
        (json!([1, 2]), "hidden_size"),
        (json!("silu"), "hidden_size"),
        (Value::Null, "hidden_size"),
    ] {
        let error = FfnConfig::from_json(&json).unwrap_err();
        assert!(
            matches!(error, Error::MissingField { field: found } if found == field),
            "{json}: {error:?}"
        );
        assert_eq!(error.to_string(), format!("config: missing field {field}"));
    }
}

#[test]
fn a_field_of_the_wrong_type_or_range_is_named() {
    let sizes = ["hidden_size", "intermediate_size"].into_iter().flat_map(|name| {
        [json!(0), json!(-8), json!(8.5), json!("8"), json!([]), json!(true), json!(1e30)]
            .map(move |value| (name, value))
    });
    let others = [
        ("hidden_act", json!(1)),
        ("hidden_activation", json!(["silu"])),
        ("feed_forward_proj", json!(false)),
        ("mlp_bias", json!("false")),
        ("mlp_bias", json!(0)),
        ("no_bias", json!("yes")),
        ("add_bias_linear", json!(1)),
        ("mlp_fc1_bias", json!("no")),
        ("mlp_multipliers", json!(0.5)),
        ("mlp_multipliers", json!([0.5])),
        ("mlp_multipliers", json!([0.5, 0.5, 0.5])),
        ("mlp_multipliers", json!([0.5, "1"])),
        ("mlp_multipliers", json!([1e300, 1.0])), // finite in f64 only
    ];
    for (name, value) in sizes.chain(others) {
        let error = FfnConfig::from_json(&patched(json!({name: value.clone()}))).unwrap_err();
        assert!(
            matches!(&error, Error::InvalidField { field, .. } if field == name),
            "{name} = {value}: {error:?}"
        );
        let message = error.to_string();
        assert!(message.starts_with(&format!("config: {name}: expected ")), "{message}");
    }
    for (fields, name) in [
        (json!({"dim": 4096, "multiple_of": 0}), "multiple_of"),
        (
            json!({"dim": 4096, "multiple_of": 256, "ffn_dim_multiplier": "1.3"}),
            "ffn_dim_multiplier",
        ),
        (
            json!({"dim": 4096, "multiple_of": 256, "ffn_dim_multiplier": -1.3}),
            "ffn_dim_multiplier",
        ),
        (json!({"dim": 4096, "multiple_of": 256, "ffn_dim_multiplier": 0}), "ffn_dim_multiplier"),
        (json!({"dim": u64::MAX, "multiple_of": 256}), "dim"),
        (json!({"dim": u64::MAX / 8, "multiple_of": u64::MAX / 2, "ffn_dim_multiplier": 4}), "dim"),
        (
            json!({"model_type": "gpt_oss", "hidden_size": 8, "intermediate_size": 24, "swiglu_limit": "7"}),
            "swiglu_limit",
        ),
        (
            json!({"model_type": "gpt_oss", "hidden_size": 8, "intermediate_size": 24, "swiglu_alpha": [1]}),
            "swiglu_alpha",
        ),
    ] {
        let error = FfnConfig::from_json(&fields).unwrap_err();
        assert!(
            matches!(&error, Error::InvalidField { field, .. } if field == name),
            "{fields}: {error:?}"
        );
    }
}

#[test]
fn what_would_change_the_formula_is_refused() {
    for (fields, name) in [
        (
            json!({"quantization_config": {"quant_method": "gptq", "bits": 4}}),
            "quantization_config",
        ),
        (json!({"swiglu_limit": 7.0}), "swiglu_limit"),
        (json!({"swiglu_alpha": 1.702}), "swiglu_alpha"),
        (json!({"swiglu_limits": [0.0, 7.0]}), "swiglu_limits"),
        (json!({"swiglu_beta": 1.1}), "swiglu_beta"),
        (json!({"mlp_gate_softcap": 4.0}), "mlp_gate_softcap"),
        (json!({"ffn_sub_norm": true}), "ffn_sub_norm"),
        (json!({"use_clipped_linears": true}), "use_clipped_linears"),
        (json!({"moe_swiglu_limit": 7.0}), "moe_swiglu_limit"),
        (json!({"activation_clamp": 7.0}), "activation_clamp"),
        (json!({"mlp_act": "gelu"}), "mlp_act"),
        (json!({"glu_activation": "gelu"}), "glu_activation"),
        (json!({"ffn_hidden_act_fn": "relu"}), "ffn_hidden_act_fn"),
        (json!({"feed_forward_type": "reglu"}), "feed_forward_type"),
        (json!({"quantization": {"group_size": 64, "bits": 4}}), "quantization"),
        (json!({"use_swiglu_ffn": false}), "use_swiglu_ffn"),
        (json!({"is_gated_act": false}), "is_gated_act"),
        (json!({"activation_sparsity_pattern": [0.95, 0.0]}), "activation_sparsity_pattern"),
        (json!({"activation_sparsity_pattern": 0.5}), "activation_sparsity_pattern"),
        (json!({"activation_sparsity_pattern": "half"}), "activation_sparsity_pattern"),
        (json!({"feed_forward_proj": "relu"}), "feed_forward_proj"),
        (json!({"feed_forward_proj": "gelu"}), "feed_forward_proj"),
    ] {
        let error = FfnConfig::from_json(&patched(fields.clone())).unwrap_err();
        assert!(
            matches!(&error, Error::Unsupported { field, .. } if field == name),
            "{fields}: {error:?}"
        );
        let message = error.to_string();
        let named = message.starts_with(&format!("config: {name} = "))
            && message.contains(" is not supported: ");
        assert!(named, "{message}");
    }
    // also beside a text_config
    let json = json!({"text_config": {"hidden_size": 8, "intermediate_size": 24}, "quantization_config": {"quant_method": "awq"}});
    let error = FfnConfig::from_json(&json).unwrap_err();
    assert!(
        matches!(&error, Error::Unsupported { field, .. } if field == "quantization_config"),
        "{error:?}"
    );
    // an unknown activation of the gate
    let error =
        FfnConfig::from_json(&patched(json!({"feed_forward_proj": "gated-mish"}))).unwrap_err();
    assert!(matches!(&error, Error::UnknownActivation { name, .. } if name == "mish"), "{error:?}");
}

#[test]
fn bias_flags() {
    for (fields, biases) in [
        (json!({}), Biases::NONE),
        (json!({"mlp_bias": true}), Biases::ALL),
        (json!({"no_bias": false}), Biases::ALL),
        (json!({"no_bias": true}), Biases::NONE),
        (json!({"add_bias_linear": true}), Biases::ALL),
        (json!({"mlp_fc1_bias": true, "mlp_fc2_bias": true}), Biases::ALL),
        (json!({"mlp_fc1_bias": false, "mlp_fc2_bias": false}), Biases::NONE),
        (json!({"mlp_fc1_bias": true, "mlp_fc2_bias": false}), Biases::new(true, true, false)),
        (json!({"mlp_fc1_bias": false, "mlp_fc2_bias": true}), Biases::new(false, false, true)),
        (json!({"model_type": "ernie4_5", "use_bias": true}), Biases::ALL),
        (json!({"model_type": "ernie4_5", "use_bias": false}), Biases::NONE),
        (json!({"model_type": "ernie4_5_moe"}), Biases::NONE),
        (json!({"model_type": "gte", "hidden_act": "gelu"}), Biases::new(false, false, true)),
        (json!({"model_type": "qwen2_5_vl_vision"}), Biases::ALL),
        (json!({"use_bias": true}), Biases::NONE), // concerns other parts in most models
    ] {
        assert_eq!(
            FfnConfig::from_json(&patched(fields.clone())).unwrap().biases,
            biases,
            "{fields}"
        );
    }
}

#[test]
fn fields_that_change_nothing_are_no_errors() {
    for fields in [
        json!({"mlp_multiplier": 1.0, "mlp_act": "silu", "router_activation": "sigmoid", "projector_hidden_act": "gelu"}),
        json!({"mlp_scale": 1, "hidden_act_fn": "silu", "classifier_activation": "gelu"}),
    ] {
        let mut json = json!({"hidden_size": 64, "intermediate_size": 176});
        json.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        assert_eq!(FfnConfig::from_json(&json).unwrap(), FfnConfig::new(64, 176), "{fields}");
    }
    let gte = json!({"model_type": "new", "hidden_size": 64, "intermediate_size": 176});
    let expected = FfnConfig::new(64, 176)
        .with_activation(GluActivation::Gelu)
        .with_biases(Biases::new(false, false, true));
    assert_eq!(FfnConfig::from_json(&gte).unwrap(), expected);
}
