//! candle-transformers' own models against the same weights with this crate's block in place of their feed-forward.
//!
//! Each model gets random weights and an output projection of zeros in its attention, so that a layer is exactly
//! `x + mlp(norm(x))`. The second computation takes embedding, norms and head from candle-nn and the blocks from the
//! same `VarBuilder`, under each layer's own prefix.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::HashMap;

use candle_core::{DType, Device, IndexOp, Result, Tensor};
use candle_nn::{Activation, Module, VarBuilder, VarMap};
use candle_swiglu::{FfnConfig, GluActivation, swiglu_ffn};
use candle_transformers::models::{llama, mistral, qwen2, qwen3};
use serde_json::{Value, json};

const LAYERS: usize = 2;
const IDS: [u32; 5] = [3, 1, 7, 0, 11];

fn config(model_type: &str) -> Value {
    json!({
        "model_type": model_type, "vocab_size": 12, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 16, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": false, "attention_bias": false, "use_sliding_window": false, "max_window_layers": 0,
        "sliding_window": 16,
    })
}

fn read<T: serde::de::DeserializeOwned>(config: &Value) -> T {
    serde_json::from_value(config.clone()).unwrap()
}

/// Random weights under the names that `build` asks for; zeros where a name contains one of `silent`.
fn random(build: impl Fn(VarBuilder) -> Result<()>, silent: &[&str]) -> Result<HashMap<String, Tensor>> {
    let vars = VarMap::new();
    build(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
    let data = vars.data().lock().unwrap();
    let random = data.iter().map(|(name, var)| {
        let norm = name.contains("norm");
        let (mean, deviation) = if norm { (1.0, 0.2) } else { (0.0, 0.2) };
        let tensor = if silent.iter().any(|part| name.contains(part)) {
            var.zeros_like()?
        } else {
            Tensor::randn(mean as f32, deviation, var.shape(), &Device::Cpu)?
        };
        Ok((name.clone(), tensor))
    });
    random.collect()
}

fn ids() -> Result<Tensor> {
    Tensor::new(&IDS, &Device::Cpu)?.unsqueeze(0)
}

/// The logits of the last position: blocks under `model.layers.N.mlp`, norms before them.
fn with_blocks(cfg: &FfnConfig, vb: &VarBuilder) -> Result<Tensor> {
    let h = cfg.hidden_size;
    let norm = |name: String| candle_nn::rms_norm(h, 1e-5, vb.pp(name));
    let mut x = candle_nn::embedding(12, h, vb.pp("model.embed_tokens"))?.forward(&ids()?)?;
    for layer in 0..LAYERS {
        let ffn = swiglu_ffn(cfg, vb.pp(format!("model.layers.{layer}.mlp")))?;
        let normed = norm(format!("model.layers.{layer}.post_attention_layernorm"))?.forward(&x)?;
        x = (x + ffn.forward(&normed)?)?;
    }
    let x = norm("model.norm".into())?.forward(&x)?.i((.., IDS.len() - 1..))?.contiguous()?;
    // A model that finds no head in an empty `VarMap` ties it to the embedding.
    let head = if vb.contains_tensor("lm_head.weight") { "lm_head" } else { "model.embed_tokens" };
    candle_nn::linear_no_bias(h, 12, vb.pp(head))?.forward(&x)
}

/// Each of the layers rounds eight times (norm, gate, up, activation, product, down, sum and the norm's square root), and
/// the head and its norm four times: 20 roundings of half a unit on each of the two sides, 20 units in all.
fn bound(dtype: DType, largest: f32) -> f32 {
    let unit = match dtype {
        DType::F32 => f32::EPSILON,
        DType::F16 => half::f16::EPSILON.to_f32(),
        _ => half::bf16::EPSILON.to_f32(),
    };
    20.0 * unit * largest
}

fn distance(a: &Tensor, b: &Tensor) -> Result<(f32, f32)> {
    let flat = |x: &Tensor| x.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
    let (a, b) = (flat(a)?, flat(b)?);
    assert_eq!(a.len(), b.len());
    let largest = a.iter().fold(0f32, |max, x| max.max(x.abs()));
    Ok((a.iter().zip(&b).fold(0f32, |max, (x, y)| max.max((x - y).abs())), largest))
}

/// `run` loads candle's model and gives its logits.
fn check(cfg: &FfnConfig, run: impl Fn(VarBuilder, DType) -> Result<Tensor>) -> Result<()> {
    let weights = random(|vb| run(vb, DType::F32).map(drop), &["o_proj"])?;
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let cast = weights.iter().map(|(name, w)| Ok((name.clone(), w.to_dtype(dtype)?)));
        let vb = VarBuilder::from_tensors(cast.collect::<Result<_>>()?, dtype, &Device::Cpu);
        let (candle, ours) = (run(vb.clone(), dtype)?, with_blocks(cfg, &vb)?);
        let (error, largest) = distance(&candle, &ours)?;
        assert!(largest > 0.1, "the logits are all but zero: {largest}");
        assert!(error <= bound(dtype, largest), "{dtype:?}: {error} apart, largest {largest}");
        // A test that could not fail would pass with another activation as well.
        let wrong = with_blocks(&cfg.clone().with_activation(GluActivation::Relu), &vb)?;
        let (error, _) = distance(&candle, &wrong)?;
        assert!(error > bound(dtype, largest), "{dtype:?}: ReLU is only {error} apart");
    }
    Ok(())
}

fn block(config: &Value) -> FfnConfig {
    FfnConfig::from_json(config).unwrap()
}

#[test]
fn llama() -> Result<()> {
    let json = config("llama");
    let cfg = read::<llama::LlamaConfig>(&json).into_config(false);
    check(&block(&json), |vb, dtype| {
        let mut cache = llama::Cache::new(false, dtype, &cfg, &Device::Cpu)?;
        llama::Llama::load(vb, &cfg)?.forward(&ids()?, 0, &mut cache)
    })
}

#[test]
fn qwen2() -> Result<()> {
    let json = config("qwen2");
    let cfg: qwen2::Config = read(&json);
    check(&block(&json), |vb, _| qwen2::ModelForCausalLM::new(&cfg, vb)?.forward(&ids()?, 0))
}

#[test]
fn qwen3() -> Result<()> {
    let json = config("qwen3");
    let cfg: qwen3::Config = read(&json);
    check(&block(&json), |vb, _| qwen3::ModelForCausalLM::new(&cfg, vb)?.forward(&ids()?, 0))
}

#[test]
fn mistral_with_the_activation_of_its_config() -> Result<()> {
    let mut json = config("mistral");
    json["hidden_act"] = "gelu_pytorch_tanh".into();
    let cfg: mistral::Config = mistral::Config { hidden_act: Activation::GeluPytorchTanh, ..read(&config("mistral")) };
    let ours = FfnConfig::new(cfg.hidden_size, cfg.intermediate_size).with_activation(cfg.hidden_act.try_into().unwrap());
    assert_eq!(ours, block(&json));
    check(&ours, |vb, _| mistral::Model::new(&cfg, vb)?.forward(&ids()?, 0))
}
