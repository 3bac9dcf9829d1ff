//! Encoders whose blocks have layouts, biases or names of their own: nomic, stella, jina,
//! ModernBERT.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Activation, LayerNormConfig, Module, VarBuilder};
use candle_swiglu::{Biases, FfnConfig, FusedOrder, GluActivation, swiglu_ffn};
use candle_transformers::models::{jina_bert, modernbert, nomic_bert, stella_en_v5};
use serde_json::json;

use super::{LAYERS, agree, block, ids, random, read};

const EPS: f64 = 1e-5;

/// Names of a post-norm encoder.
struct Names {
    embeddings: &'static str,
    first_norm: &'static str,
    layers: &'static str,
    /// Behind attention, and behind the block.
    norms: [&'static str; 2],
}

/// x = norm(word + type); in each layer x = norm(x + 0), x = norm(x + mlp(x))
fn post_norm(names: &Names, cfg: &FfnConfig, vb: &VarBuilder) -> Result<Tensor> {
    let norm = |name: String, x: &Tensor| candle_nn::layer_norm(32, EPS, vb.pp(name))?.forward(x);
    let table = |name: &str, n| candle_nn::embedding(n, 32, vb.pp(names.embeddings).pp(name));
    let ids = ids()?;
    let types = table("token_type_embeddings", 2)?.forward(&ids.zeros_like()?)?;
    let mut x =
        norm(names.first_norm.into(), &(table("word_embeddings", 12)?.forward(&ids)? + types)?)?;
    for layer in 0..LAYERS {
        let prefix = format!("{}.{layer}", names.layers);
        let [after_attention, after_block] = names.norms.map(|name| format!("{prefix}.{name}"));
        x = norm(after_attention, &x)?;
        let y = swiglu_ffn(cfg, vb.pp(&prefix).pp("mlp"))?.forward(&x)?;
        x = norm(after_block, &(x + y)?)?;
    }
    Ok(x)
}

/// Two layer norms in each layer, of six roundings each, beside the block's eight, on both sides:
/// 2·(2·20 + 6).
const POST_NORM_UNITS: f32 = 92.0;

fn compare(
    run: impl Fn(VarBuilder) -> Result<Tensor>,
    silent: &str,
    cfg: &FfnConfig,
    ours: impl Fn(&FfnConfig, &VarBuilder) -> Result<Tensor>,
) -> Result<()> {
    let weights = random(|vb| run(vb).map(drop), &[silent])?;
    let vb = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
    agree(&run(vb.clone())?, &|cfg: &FfnConfig| ours(cfg, &vb), cfg, POST_NORM_UNITS)
}

/// `fc11`, `fc12`, `fc2`, with a bias on each side by itself.
#[test]
fn nomic() -> Result<()> {
    for (fc1, fc2) in [(false, false), (true, true), (false, true), (true, false)] {
        let json = json!({
            "model_type": "nomic_bert", "vocab_size": 12, "n_embd": 32, "n_head": 4, "n_layer": LAYERS, "n_inner": 48,
            "n_positions": 16, "type_vocab_size": 2, "layer_norm_epsilon": EPS, "mlp_fc1_bias": fc1, "mlp_fc2_bias": fc2,
            "activation_function": "swiglu",
        });
        let cfg: nomic_bert::Config = read(&json);
        assert_eq!(block(&json).biases, Biases::new(fc1, fc1, fc2));
        let names = Names {
            embeddings: "embeddings",
            first_norm: "emb_ln",
            layers: "encoder.layers",
            norms: ["norm1", "norm2"],
        };
        let run = |vb: VarBuilder| {
            nomic_bert::NomicBertModel::load(vb, &cfg)?.forward(&ids()?, None, None)
        };
        compare(run, "out_proj", &block(&json), |cfg, vb| post_norm(&names, cfg, vb))?;
    }
    Ok(())
}

/// `up_gate_proj` with up first and no bias, `down_proj` with one.
#[test]
fn stella_small() -> Result<()> {
    let cfg = stella_en_v5::Config {
        variant: stella_en_v5::ModelVariant::Small,
        vocab_size: 12,
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: LAYERS,
        num_attention_heads: 4,
        max_position_embeddings: 16,
        type_vocab_size: 2,
        norm_eps: EPS,
        scaling_factor: 2.0,
        rope_theta: 1e4,
        activation_fn: Activation::Gelu,
        ..Default::default()
    };
    let ffn = FfnConfig::new(32, 48)
        .with_activation(cfg.activation_fn.try_into().unwrap())
        .with_biases(Biases::new(false, false, true));
    let names = Names {
        embeddings: "new.embeddings",
        first_norm: "new.embeddings.LayerNorm",
        layers: "new.encoder.layer",
        norms: ["attn_ln", "mlp_ln"],
    };
    let run = |vb: VarBuilder| {
        stella_en_v5::Model::new(&cfg, vb)?
            .forward(&ids()?, &ids()?.ones_like()?.to_dtype(DType::U8)?)
    };
    compare(run, "o_proj", &ffn, |cfg, vb| post_norm(&names, cfg, vb))
}

/// The 1.5B model has LLaMA's layout.
#[test]
fn stella_large() -> Result<()> {
    let cfg = stella_en_v5::Config {
        vocab_size: 12,
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: LAYERS,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        max_position_embeddings: 16,
        norm_eps: EPS,
        rope_theta: 1e4,
        activation_fn: Activation::Silu,
        ..Default::default()
    };
    let ffn = FfnConfig::new(32, 48).with_activation(cfg.activation_fn.try_into().unwrap());
    let run = |vb: VarBuilder| {
        stella_en_v5::Model::new(&cfg, vb)?
            .forward(&ids()?, &ids()?.ones_like()?.to_dtype(DType::U8)?)
    };
    compare(run, "o_proj", &ffn, |cfg, vb| {
        let norm = |name: String, x: &Tensor| candle_nn::rms_norm(32, EPS, vb.pp(name))?.forward(x);
        let mut x = candle_nn::embedding(12, 32, vb.pp("model.embed_tokens"))?.forward(&ids()?)?;
        for layer in 0..LAYERS {
            let prefix = format!("model.layers.{layer}");
            let normed = norm(format!("{prefix}.post_attention_layernorm"), &x)?;
            x = (&x + swiglu_ffn(cfg, vb.pp(&prefix).pp("mlp"))?.forward(&normed)?)?;
        }
        norm("model.norm".into(), &x)
    })
}

/// Names that no family has, a bias on down alone, and a norm under the block's own prefix.
#[test]
fn jina() -> Result<()> {
    let json = json!({
        "vocab_size": 12, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 48,
        "hidden_act": "gelu", "max_position_embeddings": 16, "type_vocab_size": 2, "initializer_range": 0.02,
        "layer_norm_eps": EPS, "pad_token_id": 0, "position_embedding_type": "alibi",
    });
    let cfg: jina_bert::Config = read(&json);
    let ffn = FfnConfig::new(32, 48)
        .with_activation(GluActivation::Gelu)
        .with_fused_names("gated_layers", "wo", FusedOrder::GateFirst)
        .with_biases(Biases::new(false, false, true));
    let names = Names {
        embeddings: "embeddings",
        first_norm: "embeddings.LayerNorm",
        layers: "encoder.layer",
        norms: ["attention.output.LayerNorm", "mlp.layernorm"],
    };
    let run = |vb: VarBuilder| jina_bert::BertModel::new(vb, &cfg)?.forward(&ids()?);
    compare(run, "attention.output.dense", &ffn, |cfg, vb| post_norm(&names, cfg, vb))
}

/// `Wi` and `Wo`, as from the config and by names of the caller's.
#[test]
fn modernbert() -> Result<()> {
    let json = json!({
        "model_type": "modernbert", "vocab_size": 12, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 16, "layer_norm_eps": EPS, "pad_token_id": 0,
        "global_attn_every_n_layers": 2, "global_rope_theta": 1e4, "local_attention": 8, "local_rope_theta": 1e4,
        "hidden_activation": "gelu",
    });
    let cfg: modernbert::Config = read(&json);
    let run = |vb: VarBuilder| {
        modernbert::ModernBert::load(vb, &cfg)?.forward(&ids()?, &ids()?.ones_like()?)
    };
    let named = block(&json).with_fused_names("Wi", "Wo", FusedOrder::GateFirst);
    for ffn in [block(&json), named] {
        compare(run, "attn.Wo", &ffn, |cfg, vb| {
            let without_bias = LayerNormConfig { eps: EPS, affine: false, ..Default::default() };
            let norm = |name: &str, x: &Tensor| {
                candle_nn::layer_norm(32, without_bias, vb.pp(name))?.forward(x)
            };
            let table = candle_nn::embedding(12, 32, vb.pp("model.embeddings.tok_embeddings"))?;
            let mut x = norm("model.embeddings.norm", &table.forward(&ids()?)?)?;
            for layer in 0..LAYERS {
                let prefix = format!("model.layers.{layer}");
                let normed = norm(&format!("{prefix}.mlp_norm"), &x)?;
                x = (&x + swiglu_ffn(cfg, vb.pp(&prefix).pp("mlp"))?.forward(&normed)?)?;
            }
            norm("model.final_norm", &x)
        })?;
    }
    Ok(())
}
