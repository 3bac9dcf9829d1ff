//! Checkpoints whose names differ from those that the config implies. Each is a reference with some
//! tensors renamed, changed or added.

use std::collections::HashMap;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_swiglu::Checkpoint;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::common::Golden;
use super::model::{Llama, LlamaConfig, check_all_read, ignore_unread};
use super::{MODELS, dir, greedy, ids, largest_difference, row};

type Tensors = HashMap<String, Tensor>;

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// The tensors and the config of a reference that has one file.
fn parts(name: &str) -> Result<(Tensors, Value)> {
    let tensors =
        candle_core::safetensors::load(dir(name).join("model.safetensors"), &Device::Cpu)?;
    let config = serde_json::from_slice(&std::fs::read(dir(name).join("config.json"))?)?;
    Ok((tensors, config))
}

fn written(tensors: &Tensors, config: &Value) -> Result<(TempDir, Checkpoint)> {
    let dir = TempDir::new()?;
    std::fs::write(dir.path().join("config.json"), config.to_string())?;
    candle_core::safetensors::save(tensors, dir.path().join("model.safetensors"))?;
    let checkpoint = Checkpoint::open(dir.path())?;
    Ok((dir, checkpoint))
}

fn open(checkpoint: &Checkpoint) -> Result<Llama> {
    let cfg = LlamaConfig::of(checkpoint)?;
    Ok(Llama::open(checkpoint, &cfg, DType::F32, &Device::Cpu)?)
}

/// The error message of loading.
fn message(tensors: &Tensors, config: &Value) -> Result<String> {
    let (_dir, checkpoint) = written(tensors, config)?;
    Ok(format!("{:#}", open(&checkpoint).err().context("expected an error")?))
}

/// Checks that the logits are those of the reference `name`.
fn check_as(name: &str, model: &Llama) -> Result<()> {
    let golden = Golden::load(&dir(name).join("reference.safetensors"))?;
    let logits = model.forward_all(&row(&ids(golden.tensor("prompt")?)?)?)?;
    let difference = largest_difference(&logits, golden.tensor("logits_f32")?)?;
    ensure!(difference < 1e-4, "{name}: {difference}");
    Ok(())
}

fn renamed(tensors: &Tensors, rename: impl Fn(&str) -> String) -> Tensors {
    tensors.iter().map(|(name, tensor)| (rename(name), tensor.clone())).collect()
}

/// Every tensor is read or named in an error.
#[test]
fn what_nobody_reads_is_named() -> Result<()> {
    let (tensors, config) = parts("new_rope_keys")?;
    let hidden = config["hidden_size"].as_u64().context("hidden_size")? as usize;
    let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, &Device::Cpu);
    let layer = "model.layers.1";
    for (name, tensor) in [
        (format!("{layer}.self_attn.q_norm.weight"), ones(&[16])?),
        (format!("{layer}.self_attn.k_norm.weight"), ones(&[16])?),
        (format!("{layer}.self_attn.inner_attn_ln.weight"), ones(&[hidden])?),
        (format!("{layer}.self_attn.q_proj.lora_A.default.weight"), ones(&[4, hidden])?),
        (format!("{layer}.self_attn.q_proj.weight_scale"), ones(&[1])?),
        (format!("{layer}.self_attn.q_proj.bias"), ones(&[hidden])?),
        (format!("{layer}.self_attn.sinks"), ones(&[2])?),
        (format!("{layer}.pre_feedforward_layernorm.weight"), ones(&[hidden])?),
        ("model.norm.bias".to_string(), ones(&[hidden])?),
        ("lm_head.bias".to_string(), ones(&[120])?),
        ("model.embed_positions.weight".to_string(), ones(&[256, hidden])?),
        ("score.weight".to_string(), ones(&[2, hidden])?),
        // One layer more than num_hidden_layers, like the multi-token prediction of some models.
        ("model.layers.2.eh_proj.weight".to_string(), ones(&[hidden, 2 * hidden])?),
        (format!("{layer}.mlp.ffn_layernorm.weight"), ones(&[48])?),
    ] {
        let mut more = tensors.clone();
        more.insert(name.clone(), tensor);
        let message = message(&more, &config)?;
        ensure!(message.contains(&name), "{name}: {message}");

        // With the flag, it is ignored.
        let (_dir, checkpoint) = written(&more, &config)?;
        let ignored =
            ignore_unread(&checkpoint, &LlamaConfig::of(&checkpoint)?)?.context("a tensor")?;
        assert_eq!(ignored.names, [name.as_str()]);
        check_as("new_rope_keys", &open(&checkpoint)?)?;
        check_all_read(&checkpoint)?;
    }
    // The message lists the tensors of all layers in one line.
    let mut more = tensors.clone();
    for layer in 0..2 {
        more.insert(format!("model.layers.{layer}.self_attn.q_norm.weight"), ones(&[16])?);
    }
    let message = message(&more, &config)?;
    ensure!(message.contains("does not read 2 of the checkpoint's tensors"), "{message}");
    ensure!(
        message.contains("model.layers.0.self_attn.q_norm.weight (and 1 like it)"),
        "{message}"
    );
    Ok(())
}

#[test]
fn nothing_of_a_reference_is_ignored() -> Result<()> {
    for name in MODELS {
        let checkpoint = Checkpoint::open(dir(name))?;
        let ignored = ignore_unread(&checkpoint, &LlamaConfig::of(&checkpoint)?)?;
        ensure!(ignored.is_none(), "{name}: {ignored:?}");
    }
    Ok(())
}

#[test]
fn what_the_config_tells_need_not_be_read() -> Result<()> {
    let (mut tensors, config) = parts("new_rope_keys")?;
    for layer in 0..2 {
        let inv_freq = Tensor::ones(8, DType::F32, &Device::Cpu)?;
        tensors.insert(format!("model.layers.{layer}.self_attn.rotary_emb.inv_freq"), inv_freq);
    }
    let (_dir, checkpoint) = written(&tensors, &config)?;
    check_as("new_rope_keys", &open(&checkpoint)?)?;
    Ok(check_all_read(&checkpoint)?)
}

/// As in transformers 5.23: two different matrices are both used, two equal ones are stored once,
/// and a single one is used for both.
#[test]
fn heads_and_embeddings_that_the_config_ties() -> Result<()> {
    let (tensors, config) = parts("smollm3_f32")?;
    ensure!(config["tie_word_embeddings"] == true && !tensors.contains_key(HEAD));
    let embedding = tensors[EMBEDDING].clone();

    let mut equal = tensors.clone();
    equal.insert(HEAD.into(), embedding.copy()?);
    let mut head_alone = tensors.clone();
    head_alone.remove(EMBEDDING);
    head_alone.insert(HEAD.into(), embedding.clone());
    for tensors in [equal, head_alone] {
        let (_dir, checkpoint) = written(&tensors, &config)?;
        let model = open(&checkpoint)?;
        check_as("smollm3_f32", &model)?;
        ensure!(model.notes().is_empty(), "{:?}", model.notes());
        check_all_read(&checkpoint)?;
    }

    let mut different = tensors;
    different.insert(HEAD.into(), (embedding * -2.0)?);
    let (_dir, checkpoint) = written(&different, &config)?;
    let model = open(&checkpoint)?;
    check_all_read(&checkpoint)?;
    let [note] = model.notes() else { anyhow::bail!("{:?}", model.notes()) };
    ensure!(
        [EMBEDDING, HEAD, "tie_word_embeddings"].iter().all(|word| note.contains(word)),
        "{note}"
    );
    let golden = Golden::load(&dir("smollm3_f32").join("reference.safetensors"))?;
    let tokens = ids(golden.tensor("prompt")?)?;
    let expected = (golden.tensor("logits_f32")? * -2.0)?;
    let difference = largest_difference(&model.forward_all(&row(&tokens)?)?, &expected)?;
    ensure!(difference < 2e-4, "{difference}");
    ensure!(greedy(&model, &tokens, 4, true, &[])? != ids(golden.tensor("greedy_f32")?)?[..4]);

    // If the config does not tie them, both must exist.
    let mut neither = different.clone();
    neither.remove(HEAD);
    let mut untied = config;
    untied["tie_word_embeddings"] = json!(false);
    let message = message(&neither, &untied)?;
    ensure!(message.contains(HEAD) && message.contains("tie_word_embeddings"), "{message}");
    let (_dir, checkpoint) = written(&different, &untied)?;
    ensure!(open(&checkpoint)?.notes().is_empty());
    Ok(())
}

#[test]
fn models_saved_without_their_head() -> Result<()> {
    let (tensors, config) = parts("smollm3_f32")?;
    let base = renamed(&tensors, |name| name.trim_start_matches("model.").to_string());
    let (_dir, checkpoint) = written(&base, &config)?;
    check_as("smollm3_f32", &open(&checkpoint)?)?;
    check_all_read(&checkpoint)?;

    let (mut tensors, config) = parts("bias_f32")?;
    tensors.remove(HEAD).context("a head")?;
    let base = renamed(&tensors, |name| name.trim_start_matches("model.").to_string());
    let message = message(&base, &config)?;
    ensure!(message.contains(HEAD) && message.contains("without its head"), "{message}");
    Ok(())
}

#[test]
fn models_within_others() -> Result<()> {
    let (tensors, config) = parts("bias_f32")?;
    let prefixed = |prefix: &str| renamed(&tensors, |name| format!("{prefix}.{name}"));
    let inner = renamed(&tensors, |name| match name.strip_prefix("model.") {
        Some(name) => format!("model.language_model.{name}"),
        None => name.to_string(),
    });
    for tensors in [prefixed("language_model"), prefixed("_orig_mod"), inner] {
        let (_dir, checkpoint) = written(&tensors, &config)?;
        check_as("bias_f32", &open(&checkpoint)?)?;
        check_all_read(&checkpoint)?;
    }
    let two: Tensors = prefixed("a").into_iter().chain(prefixed("b")).collect();
    let found = message(&two, &config)?;
    ensure!(found.contains("a.model, b.model"), "{found}");
    let other = renamed(&tensors, |name| name.replace("layers", "h"));
    let found = message(&other, &config)?;
    ensure!(
        found.contains("layers.0.input_layernorm.weight") && found.contains("model.h.0."),
        "{found}"
    );
    Ok(())
}

#[test]
fn the_dtype_is_that_of_the_tensors_where_the_config_names_none() -> Result<()> {
    for (name, expected) in
        [("qwen3_tied_bf16", DType::BF16), ("odd_f16", DType::F16), ("bias_f32", DType::F32)]
    {
        let (tensors, config) = parts(name)?;
        for dtype in [None, Some(Value::Null), Some(json!("auto"))] {
            let mut config = config.clone();
            let map = config.as_object_mut().context("an object")?;
            map.remove("dtype");
            if let Some(dtype) = dtype {
                map.insert("torch_dtype".into(), dtype);
            }
            let (_dir, checkpoint) = written(&tensors, &config)?;
            assert_eq!(LlamaConfig::of(&checkpoint)?.dtype, Some(expected), "{name}");
        }
    }
    let (tensors, mut config) = parts("bias_f32")?;
    config["dtype"] = json!("bfloat16");
    let (_dir, checkpoint) = written(&tensors, &config)?;
    assert_eq!(LlamaConfig::of(&checkpoint)?.dtype, Some(DType::BF16));
    Ok(())
}

#[test]
fn what_is_missing_is_named() -> Result<()> {
    for (name, tensor, named) in [
        ("qwen3_tied_bf16", "model.layers.1.self_attn.q_norm.weight", "q_norm.weight"),
        ("phi3_window_f32", "model.layers.0.self_attn.qkv_proj.weight", "qkv_proj.weight"),
        ("phi3_window_f32", "model.layers.1.mlp.gate_up_proj.weight", "gate_up_proj.weight"),
        ("granite_bf16", "model.layers.1.self_attn.o_proj.bias", "o_proj"),
        ("bias_f32", "model.embed_tokens.weight", "embed_tokens"),
        ("bias_f32", "model.norm.weight", "norm.weight"),
        ("bias_f32", "model.layers.0.input_layernorm.weight", "layers.0.input_layernorm.weight"),
        ("bias_f32", "model.layers.1.input_layernorm.weight", "input_layernorm.weight"),
    ] {
        let (mut tensors, config) = parts(name)?;
        tensors.remove(tensor).with_context(|| format!("{name}: {tensor}"))?;
        let message = message(&tensors, &config)?;
        ensure!(message.contains(named), "{tensor}: {message}");
    }
    Ok(())
}
