//! candle-transformers' own models against the same weights with this crate's block in place of
//! their feed-forward.
//!
//! Each model gets random weights and an output projection of zeros in its attention, so that a
//! layer is exactly `x + mlp(norm(x))`. The second computation takes embedding, norms and head from
//! candle-nn and the blocks from the same `VarBuilder`, under each layer's own prefix.
#![allow(clippy::unwrap_used, reason = "tests")]

mod encoders;

use std::collections::HashMap;

use candle_core::{DType, Device, IndexOp, Result, Tensor};
use candle_nn::{Activation, Module, VarBuilder, VarMap};
use candle_swiglu::{FfnConfig, GluActivation, swiglu_ffn};
use candle_transformers::models::{gemma3, llama, mistral, mixtral, phi3, qwen2, qwen3, t5};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, Normal};
use serde_json::{Value, json};

const LAYERS: usize = 2;
const EXPERTS: usize = 4;
const IDS: [u32; 5] = [3, 1, 7, 0, 11];

fn config(model_type: &str) -> Value {
    json!({
        "model_type": model_type, "vocab_size": 12, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 16, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": false, "attention_bias": false, "use_sliding_window": false, "max_window_layers": 0,
        "sliding_window": 16, "num_experts_per_tok": 2, "num_local_experts": EXPERTS, "use_flash_attn": false,
    })
}

fn read<T: serde::de::DeserializeOwned>(config: &Value) -> T {
    serde_json::from_value(config.clone()).unwrap()
}

/// Random weights under the names that `build` asks for, the same for a name in every run; zeros
/// where a name contains one of `silent`.
fn random(
    build: impl Fn(VarBuilder) -> Result<()>,
    silent: &[&str],
) -> Result<HashMap<String, Tensor>> {
    let vars = VarMap::new();
    build(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
    let data = vars.data().lock().unwrap();
    let random = data.iter().map(|(name, var)| {
        let norm = ["norm", "Norm", "_ln"].iter().any(|part| name.contains(part));
        let numbers = Normal::new(if norm { 1f32 } else { 0.0 }, 0.2).unwrap();
        let seed =
            name.bytes().fold(7u64, |seed, byte| seed.wrapping_mul(31).wrapping_add(byte.into()));
        let numbers = numbers.sample_iter(StdRng::seed_from_u64(seed)).take(var.elem_count());
        let tensor = if silent.iter().any(|part| name.contains(part)) {
            var.zeros_like()?
        } else {
            Tensor::from_vec(numbers.collect::<Vec<f32>>(), var.shape(), &Device::Cpu)?
        };
        Ok((name.clone(), tensor))
    });
    random.collect()
}

fn ids() -> Result<Tensor> {
    Tensor::new(&IDS, &Device::Cpu)?.unsqueeze(0)
}

/// The block under `mlp`, or Mixtral's two best experts weighted by the router.
fn feed_forward(cfg: &FfnConfig, vb: &VarBuilder, x: &Tensor) -> Result<Tensor> {
    if !vb.contains_tensor("block_sparse_moe.gate.weight") {
        return swiglu_ffn(cfg, vb.pp("mlp"))?.forward(x);
    }
    let vb = vb.pp("block_sparse_moe");
    let router = candle_nn::linear_no_bias(cfg.hidden_size, EXPERTS, vb.pp("gate"))?;
    let shares = candle_nn::ops::softmax_last_dim(&router.forward(&x.squeeze(0)?)?)?;
    let shares = shares.to_dtype(DType::F32)?.to_vec2::<f32>()?;
    let experts = (0..EXPERTS)
        .map(|n| swiglu_ffn(cfg, vb.pp("experts").pp(n)))
        .collect::<candle_swiglu::Result<Vec<_>>>()?;
    let mut rows = vec![];
    for (row, shares) in shares.iter().enumerate() {
        let mut best: Vec<usize> = (0..EXPERTS).collect();
        best.sort_by(|&i, &j| shares[j].total_cmp(&shares[i]));
        let (first, second) = (best[0], best[1]);
        let sum = shares[first] + shares[second];
        let x = x.i((.., row..row + 1))?;
        let part = |n: usize| experts[n].forward(&x)? * f64::from(shares[n] / sum);
        rows.push((part(first)? + part(second)?)?);
    }
    Tensor::cat(&rows, 1)
}

/// The logits of the last position: blocks under `model.layers.N.mlp`, norms before them.
fn with_blocks(cfg: &FfnConfig, vb: &VarBuilder) -> Result<Tensor> {
    let h = cfg.hidden_size;
    let norm = |name: String| candle_nn::rms_norm(h, 1e-5, vb.pp(name));
    let mut x = candle_nn::embedding(12, h, vb.pp("model.embed_tokens"))?.forward(&ids()?)?;
    for layer in 0..LAYERS {
        let vb = vb.pp(format!("model.layers.{layer}"));
        let normed = norm(format!("model.layers.{layer}.post_attention_layernorm"))?.forward(&x)?;
        x = (&x + feed_forward(cfg, &vb, &normed)?)?;
    }
    let x = norm("model.norm".into())?.forward(&x)?.i((.., IDS.len() - 1..))?.contiguous()?;
    // A model that finds no head in an empty `VarMap` ties it to the embedding.
    let head = if vb.contains_tensor("lm_head.weight") { "lm_head" } else { "model.embed_tokens" };
    candle_nn::linear_no_bias(h, 12, vb.pp(head))?.forward(&x)
}

/// Each of the layers rounds eight times (norm, gate, up, activation, product, down, sum and the
/// norm's square root), and the head and its norm four times: 20 roundings of half a unit on each
/// of the two sides, 20 units in all.
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
    check_in(&[DType::F32, DType::BF16, DType::F16], cfg, run)
}

fn check_in(
    dtypes: &[DType],
    cfg: &FfnConfig,
    run: impl Fn(VarBuilder, DType) -> Result<Tensor>,
) -> Result<()> {
    let weights = random(|vb| run(vb, DType::F32).map(drop), &["o_proj"])?;
    for &dtype in dtypes {
        let cast = weights.iter().map(|(name, w)| Ok((name.clone(), w.to_dtype(dtype)?)));
        let vb = VarBuilder::from_tensors(cast.collect::<Result<_>>()?, dtype, &Device::Cpu);
        let (candle, ours) = (run(vb.clone(), dtype)?, with_blocks(cfg, &vb)?);
        let (error, largest) = distance(&candle, &ours)?;
        assert!(largest > 0.1, "the logits are all but zero: {largest}");
        assert!(error <= bound(dtype, largest), "{dtype:?}: {error} apart, largest {largest}");
        if dtype == DType::F32 {
            let wrong = with_blocks(&cfg.clone().with_activation(GluActivation::Relu), &vb)?;
            let (error, _) = distance(&candle, &wrong)?;
            assert!(error > 100.0 * bound(dtype, largest), "ReLU is only {error} apart");
        }
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
    let cfg: mistral::Config =
        mistral::Config { hidden_act: Activation::GeluPytorchTanh, ..read(&config("mistral")) };
    let ours = FfnConfig::new(cfg.hidden_size, cfg.intermediate_size)
        .with_activation(cfg.hidden_act.try_into().unwrap());
    assert_eq!(ours, block(&json));
    check(&ours, |vb, _| mistral::Model::new(&cfg, vb)?.forward(&ids()?, 0))
}

#[test]
fn phi3() -> Result<()> {
    let json = config("phi3");
    let cfg: phi3::Config = read(&json);
    check(&block(&json), |vb, _| phi3::Model::new(&cfg, vb)?.forward(&ids()?, 0))
}

#[test]
fn mixtral_experts() -> Result<()> {
    let json = config("mixtral");
    let cfg: mixtral::Config = read(&json);
    // candle multiplies the experts' outputs by weights in f32: halves fail there.
    check_in(&[DType::F32], &block(&json), |vb, _| {
        mixtral::Model::new(&cfg, vb)?.forward(&ids()?, 0)
    })
}

/// Norms around the block as well, weights of norms less one, and a tied head.
#[test]
fn gemma3() -> Result<()> {
    let mut json = config("gemma3_text");
    json["hidden_activation"] = "gelu_pytorch_tanh".into();
    json["hidden_act"] = Value::Null;
    json["num_key_value_heads"] = 1.into(); // as Gemma 3 1B; candle's cache fails with more of them
    for (field, value) in [
        ("rope_local_base_freq", 1e4),
        ("query_pre_attn_scalar", 8.0),
        ("sliding_window_pattern", 2.0),
    ] {
        json[field] = if field.starts_with("rope") { value.into() } else { (value as u64).into() };
    }
    let cfg: gemma3::Config = read(&json);
    let run = |vb: VarBuilder| gemma3::Model::new(false, &cfg, vb)?.forward(&ids()?, 0);
    let weights = random(|vb| run(vb).map(drop), &["o_proj"])?;
    let vb = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
    let ours = |block: &FfnConfig| {
        let norm = |name: String, x: &Tensor| {
            let weight = (vb.get(32, &format!("{name}.weight"))? + 1.0)?;
            candle_nn::ops::rms_norm(&x.contiguous()?, &weight, 1e-5)
        };
        let table = candle_nn::embedding(12, 32, vb.pp("model.embed_tokens"))?;
        let mut x = (table.forward(&ids()?)? * 32f64.sqrt())?;
        for layer in 0..LAYERS {
            let prefix = format!("model.layers.{layer}");
            let ffn = swiglu_ffn(block, vb.pp(&prefix).pp("mlp"))?;
            let y = ffn.forward(&norm(format!("{prefix}.pre_feedforward_layernorm"), &x)?)?;
            x = (&x + norm(format!("{prefix}.post_feedforward_layernorm"), &y)?)?;
        }
        let last = x.i((.., IDS.len() - 1..))?;
        norm("model.norm".into(), &last)?.broadcast_matmul(&table.embeddings().t()?)
    };
    // One norm more in each layer: 2·2·4 roundings more on the two sides.
    agree(&run(vb.clone())?, &ours, &block(&json), 36.0)?;
    let converted = cfg.hidden_activation.try_into().unwrap();
    assert_eq!(FfnConfig::new(32, 48).with_activation(converted), block(&json));
    Ok(())
}

/// candle's output is within so many units of ours, and far from it with another activation.
fn agree(
    candle: &Tensor,
    ours: &dyn Fn(&FfnConfig) -> Result<Tensor>,
    block: &FfnConfig,
    units: f32,
) -> Result<()> {
    let (error, largest) = distance(candle, &ours(block)?)?;
    assert!(largest > 0.1, "the output is all but zero: {largest}");
    let bound = units * f32::EPSILON * largest;
    assert!(error <= bound, "{error} apart, largest {largest}");
    let (error, _) = distance(candle, &ours(&block.clone().with_activation(GluActivation::Relu))?)?;
    assert!(error > 100.0 * bound, "ReLU is only {error} apart");
    Ok(())
}

#[test]
fn t5_encoder() -> Result<()> {
    let json = json!({
        "model_type": "t5", "is_encoder_decoder": true,
        "vocab_size": 12, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": LAYERS,
        "relative_attention_num_buckets": 8, "dropout_rate": 0.0, "layer_norm_epsilon": 1e-5,
        "initializer_factor": 1.0, "feed_forward_proj": "gated-gelu", "eos_token_id": 1, "pad_token_id": 0,
    });
    let cfg: t5::Config = read(&json);
    let run =
        |vb: VarBuilder, dtype| t5::T5EncoderModel::load(vb, &cfg)?.forward_dt(&ids()?, dtype);
    let weights = random(|vb| run(vb, None).map(drop), &["SelfAttention.o."])?;
    // bf16 weights under x in f32: candle widens the weights in each product, and so does the
    // block.
    for (dtype, computed_in) in [(DType::F32, None), (DType::BF16, Some(DType::F32))] {
        let cast = weights.iter().map(|(name, w)| Ok((name.clone(), w.to_dtype(dtype)?)));
        let vb = VarBuilder::from_tensors(cast.collect::<Result<_>>()?, dtype, &Device::Cpu);
        let ours = |block: &FfnConfig| {
            let norm = |name: String, x: &Tensor| {
                let weight = vb.get(32, &format!("{name}.weight"))?.to_dtype(DType::F32)?;
                candle_nn::ops::rms_norm(x, &weight, 1e-5)
            };
            let table = candle_nn::embedding(12, 32, vb.pp("encoder.embed_tokens"))?;
            let mut x = table.forward(&ids()?)?.to_dtype(DType::F32)?;
            for layer in 0..LAYERS {
                let prefix = format!("encoder.block.{layer}.layer.1");
                let ffn = swiglu_ffn(block, vb.pp(&prefix).pp("DenseReluDense"))?;
                assert_eq!(ffn.dtype(), dtype);
                x = (&x + ffn.forward(&norm(format!("{prefix}.layer_norm"), &x)?)?)?;
            }
            norm("encoder.final_layer_norm".into(), &x)
        };
        let candle = run(vb.clone(), computed_in)?;
        let (error, largest) = distance(&candle, &ours(&block(&json))?)?;
        assert!(error <= bound(DType::F32, largest), "{dtype:?}: {error} apart, largest {largest}");
        let (error, _) =
            distance(&candle, &ours(&block(&json).with_activation(GluActivation::Silu))?)?;
        assert!(error > 100.0 * bound(DType::F32, largest), "SiLU is only {error} apart");
    }
    Ok(())
}
