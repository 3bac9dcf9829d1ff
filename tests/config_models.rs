//! The rules of `FfnConfig::from_json` that depend on the model type, the layer or the expert.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use candle_swiglu::{Error, Family, FfnConfig, GluActivation};
use serde_json::{Value, json};

/// H = 32 and I = 48 plus the given fields; null removes a field.
fn config(fields: Value) -> Value {
    let mut json = json!({"hidden_size": 32, "intermediate_size": 48});
    json.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    json
}

fn read(fields: Value) -> FfnConfig {
    FfnConfig::from_json(&config(fields.clone()))
        .unwrap_or_else(|error| panic!("{fields}: {error}"))
}

fn plain() -> FfnConfig {
    FfnConfig::new(32, 48)
}

/// The field that the error names.
fn refused(result: candle_swiglu::Result<FfnConfig>) -> String {
    match result {
        Err(Error::Unsupported { field, .. } | Error::InvalidField { field, .. }) => field,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_activation_field_of_each_model_type() {
    use GluActivation::*;
    for (model, field, default) in [
        ("llama", "hidden_act", Silu),
        ("qwen3_moe", "hidden_act", Silu),
        ("gemma", "hidden_act", GeluTanh),
        ("gte", "hidden_act", Gelu),
        ("zamba", "hidden_act", Gelu),
        ("gemma2", "hidden_activation", GeluTanh),
        ("gemma3", "hidden_activation", GeluTanh),
        ("gemma3_text", "hidden_activation", GeluTanh),
        ("gemma4_text", "hidden_activation", GeluTanh),
        ("t5gemma2_text", "hidden_activation", GeluTanh),
        ("vaultgemma", "hidden_activation", GeluTanh),
        ("modernbert", "hidden_activation", Gelu),
        ("muse_glimmer_text", "hidden_activation", Silu),
        ("moonshine", "decoder_hidden_act", Silu),
        ("pix2struct_text_model", "dense_act_fn", GeluTanh),
        ("kosmos_2_5_vision_model", "dense_act_fn", GeluTanh),
        ("pop2piano", "dense_act_fn", Relu),
        ("a_model_of_its_own", "activation_function", Silu),
        ("a_model_of_its_own", "hidden_activation", Silu),
    ] {
        assert_eq!(read(json!({"model_type": model})).activation, default, "{model}");
        assert_eq!(
            read(json!({"model_type": model, field: "sigmoid"})).activation,
            Sigmoid,
            "{model}"
        );
        // Every other field must agree.
        for other in
            ["hidden_act", "hidden_activation", "activation_function", "dense_act_fn", "act_fn"]
        {
            if other != field {
                let fields =
                    |value| config(json!({"model_type": model, field: "sigmoid", other: value}));
                assert_eq!(
                    FfnConfig::from_json(&fields("sigmoid")).unwrap().activation,
                    Sigmoid,
                    "{model} {other}"
                );
                let named = refused(FfnConfig::from_json(&fields("relu")));
                assert!([other, field].contains(&named.as_str()), "{model} {other}: {named}");
                if model != "a_model_of_its_own" {
                    assert_eq!(refused(FfnConfig::from_json(&fields("mish"))), other, "{model}");
                }
            }
        }
    }
}

#[test]
fn a_field_that_transformers_does_not_read_is_refused_where_it_disagrees() {
    for fields in [
        json!({"model_type": "llama", "hidden_act": "silu", "hidden_activation": "gelu"}),
        json!({"model_type": "llama", "hidden_activation": "gelu"}), // LLaMA computes SiLU
    ] {
        let error = FfnConfig::from_json(&config(fields)).unwrap_err().to_string();
        assert_eq!(
            error,
            "config: hidden_activation = \"gelu\" is not supported: it names another activation than the field that this \
             model type reads"
        );
    }
    // No field changes what the code of a model fixes.
    for model in ["lfm2_moe", "gpt_oss", "minimax_m3_vl"] {
        let fields =
            json!({"model_type": model, "hidden_act": "swigluoai", "dense_intermediate_size": 48});
        assert!(FfnConfig::from_json(&config(fields)).is_ok(), "{model}");
    }
}

#[test]
fn dense_act_fn_of_pix2struct_and_kosmos() {
    for model in [
        "pix2struct_vision_model",
        "pix2struct",
        "kosmos-2.5",
        "kosmos_2_5_vision_model",
        "unknown",
    ] {
        let cfg = read(json!({"model_type": model, "dense_act_fn": "gelu_new"}));
        assert_eq!(cfg, plain().with_activation(GluActivation::GeluTanh), "{model}");
    }
}

#[test]
fn t5_and_its_relatives() {
    let t5 = |model: &str, fields: Value| {
        let mut json = json!({"model_type": model, "d_model": 32, "d_ff": 48});
        json.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        FfnConfig::from_json(&json)
    };
    let tanh = plain().with_activation(GluActivation::GeluTanh);
    for model in ["t5", "mt5", "umt5", "longt5", "udop"] {
        assert_eq!(
            t5(model, json!({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new"}))
                .unwrap(),
            tanh
        );
        assert_eq!(t5(model, json!({"feed_forward_proj": "gated-silu"})).unwrap(), plain());
        let disagrees = json!({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"});
        assert_eq!(refused(t5(model, disagrees)), "dense_act_fn");
        assert_eq!(refused(t5(model, json!({"feed_forward_proj": "relu"}))), "feed_forward_proj");
    }
    assert_eq!(t5("mt5", json!({})).unwrap(), tanh);
    assert_eq!(refused(t5("t5", json!({}))), "feed_forward_proj"); // no gate by default
}

#[test]
fn a_nested_text_model() {
    let inner = json!({"hidden_size": 32, "intermediate_size": 48});
    let tanh = plain().with_activation(GluActivation::GeluTanh);
    for (json, expected) in [
        // The outer model type counts if the inner config has none.
        (json!({"model_type": "gemma3", "text_config": inner}), tanh.clone()),
        (json!({"model_type": "paligemma", "text_config": inner}), tanh.clone()),
        // Otherwise the inner model type counts.
        (
            json!({"model_type": "llava", "text_config": config(json!({"model_type": "gemma2"}))}),
            tanh.clone(),
        ),
        (
            json!({"model_type": "gemma3", "text_config": config(json!({"model_type": "qwen3"}))}),
            plain(),
        ),
        // Sizes beside the inner config do not count.
        (
            json!({"model_type": "paligemma", "hidden_size": 64, "projection_dim": 64,
                   "text_config": config(json!({"model_type": "gemma"}))}),
            tanh.clone(),
        ),
        (
            json!({"model_type": "voxtral", "hidden_size": 32, "vocab_size": 99,
                   "text_config": config(json!({"model_type": "llama", "hidden_act": "silu"}))}),
            plain(),
        ),
        (
            json!({"model_type": "internvl_chat", "llm_config": config(json!({"model_type": "qwen2"}))}),
            plain(),
        ),
        // A complete model with a part that does not describe the block.
        (config(json!({"model_type": "llama", "text_config": {"vocab_size": 99}})), plain()),
    ] {
        assert_eq!(FfnConfig::from_json(&json).unwrap(), expected, "{json}");
    }
}

#[test]
fn the_limited_units() {
    let limited = |limit| plain().with_limit(limit);
    let oai = |beta, limit| {
        limited(limit).with_activation(GluActivation::Swish { beta }).with_up_offset(1.0)
    };
    for (fields, expected) in [
        (
            json!({"model_type": "deepseek_v4", "moe_intermediate_size": 48, "swiglu_limit": 7.5}),
            limited(7.5),
        ),
        (json!({"model_type": "deepseek_v4"}), limited(10.0)),
        (json!({"model_type": "glm5_next_text", "swiglu_limit": 3.0}), limited(3.0)),
        (json!({"model_type": "glm5_next_text"}), limited(10.0)),
        (json!({"model_type": "hy_v4", "swiglu_limit": 10.0}), plain()), // its dense block has no limit
        (
            json!({"model_type": "minimax_m3_vl_text", "dense_intermediate_size": 48, "intermediate_size": 16}),
            oai(1.702, 7.0),
        ),
        (
            json!({"model_type": "minimax_m3_vl_text", "dense_intermediate_size": 48, "swiglu_alpha": 1.5,
                   "swiglu_limit": 5.0, "hidden_act": "swigluoai"}),
            oai(1.5, 5.0),
        ),
        (json!({"model_type": "openai_privacy_filter"}), oai(1.702, 7.0).with_bias(true)),
        (
            json!({"model_type": "gpt_oss"}),
            oai(1.702, 7.0).with_bias(true).with_family(Family::Interleaved),
        ),
    ] {
        assert_eq!(read(fields.clone()), expected, "{fields}");
    }
    for limit in [json!(0), json!(-1.0), json!("7"), json!(1e300)] {
        let fields = json!({"model_type": "deepseek_v4", "swiglu_limit": limit});
        assert_eq!(refused(FfnConfig::from_json(&config(fields))), "swiglu_limit", "{limit}");
    }
}

#[test]
fn limits_of_each_layer() {
    let step = json!({"model_type": "step3p5", "hidden_size": 4096, "intermediate_size": 11264, "swiglu_limits": [0.0, 7.0]});
    let cfg = FfnConfig::new(4096, 11264);
    assert_eq!(refused(FfnConfig::from_json(&step)), "swiglu_limits");
    assert_eq!(FfnConfig::from_json_layer(&step, 0).unwrap(), cfg);
    assert_eq!(refused(FfnConfig::from_json_layer(&step, 1)), "swiglu_limits"); // a limit on the result of the activation
    assert_eq!(refused(FfnConfig::from_json_layer(&step, 2)), "swiglu_limits"); // no such layer
    for (list, named) in
        [(json!([null, 16.0]), true), (json!([null, 0.0]), false), (json!([]), false)]
    {
        let fields = config(json!({"model_type": "step3p7", "swiglu_limits_shared": list}));
        match FfnConfig::from_json(&fields) {
            Ok(cfg) => assert_eq!((cfg, named), (plain(), false)),
            error => assert_eq!((refused(error).as_str(), named), ("swiglu_limits_shared", true)),
        }
    }
}

#[test]
fn sizes_of_each_layer() {
    let json = json!({"model_type": "gemma3n_text", "hidden_size": 32, "intermediate_size": [16, 48],
                      "activation_sparsity_pattern": [0.95, 0.0]});
    assert_eq!(refused(FfnConfig::from_json(&json)), "activation_sparsity_pattern");
    assert_eq!(refused(FfnConfig::from_json_layer(&json, 0)), "activation_sparsity_pattern");
    let tanh = plain().with_activation(GluActivation::GeluTanh);
    assert_eq!(FfnConfig::from_json_layer(&json, 1).unwrap(), tanh);
    // By default the first ten layers are sparse.
    let default = config(json!({"model_type": "gemma3n_text"}));
    assert_eq!(refused(FfnConfig::from_json(&default)), "activation_sparsity_pattern");
    assert_eq!(refused(FfnConfig::from_json_layer(&default, 9)), "activation_sparsity_pattern");
    assert_eq!(FfnConfig::from_json_layer(&default, 10).unwrap(), tanh);
    // The same value for all layers.
    assert_eq!(read(json!({"intermediate_size": [48, 48, 48]})), plain());
    for list in [json!([48, 64]), json!([])] {
        assert_eq!(
            refused(FfnConfig::from_json(&config(json!({"intermediate_size": list})))),
            "intermediate_size"
        );
    }
    let wide = config(
        json!({"model_type": "gemma4_text", "intermediate_size": 24, "use_double_wide_mlp": true,
                             "num_hidden_layers": 5, "num_kv_shared_layers": 2}),
    );
    assert_eq!(refused(FfnConfig::from_json(&wide)), "use_double_wide_mlp");
    let width = |layer| FfnConfig::from_json_layer(&wide, layer).unwrap().intermediate_size;
    assert_eq!([width(2), width(3), width(4)], [24, 48, 48]);
}

#[test]
fn sizes_that_a_model_type_computes() {
    for (fields, expected) in [
        // int(2·12288/3) = 8192
        (json!({"model_type": "lfm2", "intermediate_size": 12288}), 8192),
        (
            json!({"model_type": "lfm2", "block_ff_dim": 6656, "block_auto_adjust_ff_dim": true, "block_multiple_of": 256}),
            4608,
        ),
        (
            json!({"model_type": "lfm2", "block_ff_dim": 6656, "block_ffn_dim_multiplier": 1.3, "block_multiple_of": 64}),
            5824,
        ),
        (json!({"model_type": "lfm2", "block_auto_adjust_ff_dim": false}), 48),
        (json!({"model_type": "granitemoehybrid", "shared_intermediate_size": 16}), 16),
        (json!({"model_type": "recurrent_gemma"}), 24),
        (json!({"model_type": "dinov2", "mlp_ratio": 4, "use_swiglu_ffn": true}), 88), // int(128·2/3) = 85
        (json!({"model_type": "moshi", "ffn_dim": 96}), 48),
        // With dense layers among those with experts, and without.
        (
            json!({"model_type": "llama4_text", "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2}),
            96,
        ),
        (
            json!({"model_type": "llama4_text", "intermediate_size_mlp": 96, "interleave_moe_layer_step": 1}),
            48,
        ),
    ] {
        assert_eq!(read(fields.clone()).intermediate_size, expected, "{fields}");
    }
    let llama4 = config(
        json!({"model_type": "llama4_text", "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2}),
    );
    let size = |layer| FfnConfig::from_json_layer(&llama4, layer).unwrap().intermediate_size;
    assert_eq!([size(0), size(1), size(2)], [96, 48, 96]);
}

#[test]
fn openelm_and_nemotron_nas() {
    // OpenELM 270M: 0.5·1280 = 640 rounds half up to 768, 0.73·1280 = 934.4 to 1024.
    let openelm = json!({"model_type": "openelm", "model_dim": 1280, "ffn_multipliers": [0.5, 0.73, 4.0, 0.22],
                         "ffn_dim_divisor": 256, "ffn_with_glu": true, "activation_fn_name": "swish"});
    let cfg = |layer| FfnConfig::from_json_layer(&openelm, layer).unwrap();
    assert_eq!(cfg(0), FfnConfig::new(1280, 768).with_family(Family::OpenElm));
    assert_eq!([1, 2, 3].map(|layer| cfg(layer).intermediate_size), [1024, 5120, 256]);
    assert_eq!(refused(FfnConfig::from_json(&openelm)), "ffn_multipliers");

    let nas = json!({"model_type": "nemotron-nas", "hidden_size": 8192, "hidden_act": "silu", "intermediate_size": null,
                     "block_configs": [{"ffn": {"ffn_mult": 5.25, "no_op": false}}, {"ffn": {"ffn_mult": 1.3125}},
                                       {"ffn": {"ffn_mult": null, "no_op": true}}]});
    let cfg = |layer| FfnConfig::from_json_layer(&nas, layer);
    assert_eq!(cfg(0).unwrap(), FfnConfig::new(8192, 28672));
    assert_eq!(cfg(1).unwrap(), FfnConfig::new(8192, 7168));
    assert_eq!(refused(cfg(2)), "block_configs");
    assert_eq!(refused(FfnConfig::from_json(&nas)), "block_configs");
}

#[test]
fn an_expert() {
    let expert = |fields| FfnConfig::from_json_expert(&config(fields)).unwrap();
    let small = FfnConfig::new(32, 16);
    assert_eq!(expert(json!({"model_type": "qwen3_moe", "moe_intermediate_size": 16})), small);
    assert_eq!(expert(json!({"model_type": "mixtral"})), plain());
    assert_eq!(expert(json!({"model_type": "llama4_text", "intermediate_size_mlp": 96})), plain());
    let limited = json!({"model_type": "hy_v4", "moe_intermediate_size": 16, "swiglu_limit": 4.0});
    assert_eq!(expert(limited), small.with_limit(4.0));
}

#[test]
fn blocks_with_other_parts_are_refused_by_model_type() {
    for model in ["bitnet", "inkling_text", "inkling2_text", "zamba2", "phi4_multimodal_audio"] {
        assert_eq!(
            refused(FfnConfig::from_json(&config(json!({"model_type": model})))),
            "model_type",
            "{model}"
        );
    }
    for model in ["dinov2", "radio", "videomt"] {
        assert_eq!(
            refused(FfnConfig::from_json(&config(json!({"model_type": model})))),
            "use_swiglu_ffn",
            "{model}"
        );
    }
    for model in ["dinov3_vit", "eomt_dinov3"] {
        assert_eq!(
            refused(FfnConfig::from_json(&config(json!({"model_type": model})))),
            "use_gated_mlp",
            "{model}"
        );
    }
}

#[test]
fn the_text_model_of_an_omni_model() {
    let json = json!({"model_type": "qwen2_5_omni", "thinker_config": {"model_type": "qwen2_5_omni_thinker",
        "text_config": {"model_type": "qwen2_5_omni_text", "hidden_size": 64, "intermediate_size": 96, "hidden_act": "silu"}}});
    assert_eq!(FfnConfig::from_json(&json).unwrap(), FfnConfig::new(64, 96));
}
