//! The model with LoRA adapters, against PEFT (`tests/golden/peft`).

use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_swiglu::{Checkpoint, Lora, LoraAdapter, LoraConfig};
use tempfile::TempDir;

use super::common::{self, Golden};
use super::model::{Llama, LlamaConfig};
use super::{ids, largest_difference, row};

const CPU: Device = Device::Cpu;

fn peft(name: &str) -> PathBuf {
    common::golden_dir().join("peft").join(name)
}

fn open(checkpoint: &Checkpoint, adapter: Option<&LoraAdapter>, dtype: DType) -> Result<Llama> {
    let cfg = LlamaConfig::of(checkpoint)?;
    Ok(Llama::open_with_adapter(checkpoint, &cfg, adapter, dtype, &CPU)?)
}

fn base() -> Result<Checkpoint> {
    Ok(Checkpoint::open(peft("base"))?)
}

/// An adapter of rank 2 whose pairs have these modules and sizes.
fn adapter(modules: &[(&str, usize, usize)]) -> Result<LoraAdapter> {
    let pair = |(module, in_dim, out_dim): &(&str, usize, usize)| -> Result<_> {
        let a = Tensor::randn(0f32, 0.3, (2, *in_dim), &CPU)?;
        let b = Tensor::randn(0f32, 0.3, (*out_dim, 2), &CPU)?;
        Ok((module.to_string(), Lora::new(a, b, 1.0, 0.0)?))
    };
    let pairs = modules.iter().map(pair).collect::<Result<Vec<_>>>()?;
    Ok(LoraAdapter::from_pairs(LoraConfig::new(2, 2.0), pairs)?)
}

/// The bound of `f32_logits_and_greedy_tokens_are_those_of_transformers`. Without the adapter the
/// logits differ by more than a hundred times as much. In f64 norms and rotary tables are computed
/// in f32 by transformers, and the bound of the logits is that of f32.
#[test]
fn logits_are_those_of_peft() -> Result<()> {
    let checkpoint = base()?;
    for name in ["plain", "rslora", "patterns", "down_only", "bf16"] {
        let golden = Golden::load(&peft(name).join("reference.safetensors"))?;
        let tokens = row(&ids(golden.tensor("tokens")?)?)?;
        for (dtype, suffix) in [(DType::F32, ""), (DType::F64, "_f64")] {
            let expected = golden.tensor(&format!("logits{suffix}"))?;
            let adapter = LoraAdapter::open(peft(name), dtype, &CPU)?;
            let logits = open(&checkpoint, Some(&adapter), dtype)?.forward_all(&tokens)?;
            let difference = largest_difference(&logits, expected)?;
            println!("{name} {dtype:?}: logits within {difference:.1e}");
            ensure!(difference < 1e-4, "{name} {dtype:?}: {difference}");
            let without = open(&base()?, None, dtype)?.forward_all(&tokens)?;
            let difference = largest_difference(&without, expected)?;
            ensure!(difference > 1e-2, "{name} {dtype:?}: the adapter changes {difference}");
        }
    }
    Ok(())
}

/// A checkpoint without its head's prefix, a tied head, and Phi-3's packed projections.
#[test]
fn names_of_modules() -> Result<()> {
    let dir = TempDir::new()?;
    let tensors = candle_core::safetensors::load(peft("base").join("model.safetensors"), &CPU)?;
    let tensors: HashMap<String, Tensor> = tensors
        .into_iter()
        .filter(|(name, _)| name != "lm_head.weight")
        .map(|(name, tensor)| (name.trim_start_matches("model.").to_string(), tensor))
        .collect();
    candle_core::safetensors::save(&tensors, dir.path().join("model.safetensors"))?;
    let mut config = candle_swiglu::read_json(peft("base").join("config.json"))?;
    config["tie_word_embeddings"] = true.into();
    std::fs::write(dir.path().join("config.json"), config.to_string())?;
    let phi3 = common::golden_dir().join("models/phi3_window_f32");
    let json = candle_swiglu::read_json(phi3.join("config.json"))?;
    let size = |name: &str| Ok::<_, anyhow::Error>(json[name].as_u64().context("a size")? as usize);
    let (h, i) = (size("hidden_size")?, size("intermediate_size")?);
    let head_dim = h / size("num_attention_heads")?;
    let qkv = h + 2 * head_dim * size("num_key_value_heads")?;
    for (dir, modules) in [
        (dir.path(), vec![("model.layers.1.mlp.up_proj", 21, 45), ("lm_head", 21, 37)]),
        (
            &phi3,
            vec![
                ("model.layers.0.self_attn.qkv_proj", h, qkv),
                ("model.layers.0.mlp.gate_up_proj", h, 2 * i),
            ],
        ),
    ] {
        for n in 0..modules.len() {
            let adapter = adapter(&modules[n..=n])?;
            let logits = |adapter| -> Result<Tensor> {
                Ok(open(&Checkpoint::open(dir)?, adapter, DType::F32)?
                    .forward_all(&row(&[5, 6, 7])?)?)
            };
            let changed = largest_difference(&logits(Some(&adapter))?, &logits(None)?)?;
            ensure!(changed > 1e-3, "{}: changes {changed}", modules[n].0);
        }
    }
    Ok(())
}

#[test]
fn pairs_that_the_model_cannot_take() -> Result<()> {
    let error = |adapter: &LoraAdapter| -> Result<String> {
        Ok(format!("{:#}", open(&base()?, Some(adapter), DType::F32).err().context("an error")?))
    };
    for module in ["model.layers.2.mlp.up_proj", "model.embed_tokens", "model.layers.0.mlp.router"]
    {
        let message = error(&adapter(&[(module, 21, 45), ("lm_head", 21, 37)])?)?;
        ensure!(message.contains(module) && !message.contains("lm_head"), "{message}");
    }
    for (module, tensor) in [
        ("model.layers.1.mlp.up_proj", "up_proj.lora_B.weight"),
        ("model.layers.1.self_attn.k_proj", "lora_B.weight"),
        ("lm_head", "lora_B.weight"),
    ] {
        let message = error(&adapter(&[(module, 21, 44)])?)?;
        let module = module.trim_end_matches(".up_proj");
        ensure!(message.contains(module) && message.contains(tensor), "{message}");
    }
    Ok(())
}
