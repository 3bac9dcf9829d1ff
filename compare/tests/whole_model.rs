//! The example's LLaMA and its sampler against candle-transformers'.
#![allow(unreachable_pub, reason = "the modules are those of a program")]

#[path = "../../examples/llama/model.rs"]
mod model;
#[path = "../../examples/llama/sampler.rs"]
mod sampler;

use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_core::{D, DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_swiglu::Checkpoint;
use candle_transformers::generation::{LogitsProcessor, Sampling};
use candle_transformers::utils::apply_repeat_penalty;
use model::{Cache, Llama, LlamaConfig};
use sampler::{Sampler, SamplingArgs};
use tokenizers::Tokenizer;

/// A path of the repository.
fn path(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(relative)
}

/// The input of a model, (1,T).
fn row(tokens: &[u32]) -> Result<Tensor> {
    Ok(Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?)
}

/// The `count` tokens with the largest logits after `prompt`. `forward` gives the logits of the
/// last position of the tokens from a position on.
fn greedy(
    prompt: &[u32],
    count: usize,
    mut forward: impl FnMut(&Tensor, usize) -> Result<Tensor>,
) -> Result<Vec<u32>> {
    let (mut tokens, mut start) = (prompt.to_vec(), 0);
    for _ in 0..count {
        let logits = forward(&row(&tokens[start..])?, start)?;
        start = tokens.len();
        tokens.push(logits.argmax(D::Minus1)?.to_vec1::<u32>()?[0]);
    }
    Ok(tokens.split_off(prompt.len()))
}

fn ours(dir: &Path, prompt: &[u32], count: usize) -> Result<Vec<u32>> {
    let checkpoint = Checkpoint::open(dir)?;
    let model = Llama::open(&checkpoint, &LlamaConfig::of(&checkpoint)?, DType::F32, &Device::Cpu)?;
    let mut cache = Cache::new(true, model.config());
    greedy(prompt, count, |tokens, start| Ok(model.forward(tokens, start, &mut cache)?))
}

fn candles(dir: &Path, prompt: &[u32], count: usize) -> Result<Vec<u32>> {
    use candle_transformers::models::llama;
    let cfg: llama::LlamaConfig = serde_json::from_slice(&std::fs::read(dir.join("config.json"))?)?;
    let cfg = cfg.into_config(false);
    let bytes = std::fs::read(dir.join("model.safetensors"))?;
    let model = llama::Llama::load(
        VarBuilder::from_buffered_safetensors(bytes, DType::F32, &Device::Cpu)?,
        &cfg,
    )?;
    let mut cache = llama::Cache::new(true, DType::F32, &cfg, &Device::Cpu)?;
    greedy(prompt, count, |tokens, start| Ok(model.forward(tokens, start, &mut cache)?))
}

/// The drop-in promise: on one checkpoint, candle's own LLaMA and ours write the same text.
#[test]
fn both_models_give_the_same_greedy_tokens() -> Result<()> {
    let stories = path("weights");
    let tokenizer =
        Tokenizer::from_file(stories.join("tokenizer.json")).map_err(anyhow::Error::msg)?;
    let story =
        tokenizer.encode("Once upon a time", true).map_err(anyhow::Error::msg)?.get_ids().to_vec();
    for (dir, prompt) in [
        (stories, story),
        (path("tests/golden/models/old_rope_keys"), golden_prompt("old_rope_keys")?),
    ] {
        assert_eq!(ours(&dir, &prompt, 64)?, candles(&dir, &prompt, 64)?, "{}", dir.display());
    }
    Ok(())
}

/// The first prompt of a model of `tests/golden/models`.
fn golden_prompt(model: &str) -> Result<Vec<u32>> {
    let reference = path("tests/golden/models").join(model).join("reference.safetensors");
    let ids = candle_core::safetensors::load(reference, &Device::Cpu)?["prompt"]
        .flatten_all()?
        .to_vec1::<i64>()?;
    Ok(ids.into_iter().map(u32::try_from).collect::<Result<_, _>>()?)
}

/// Both samplers choose the same tokens for the same seed, except with top-k: candle-transformers
/// puts the candidates into another order there, and with the same random number another of them is
/// chosen.
#[test]
fn both_samplers_choose_the_same_tokens() -> Result<()> {
    let args = SamplingArgs {
        temperature: 0.0,
        top_p: None,
        top_k: None,
        seed: 0,
        repeat_penalty: 1.0,
        repeat_last_n: 8,
    };
    for seed in 0..20 {
        for (temperature, top_p, repeat_penalty) in [
            (0.0, None, 1.0),
            (0.0, None, 1.3),
            (0.8, None, 1.0),
            (1.5, Some(0.9), 1.0),
            (0.8, Some(0.3), 1.1),
        ] {
            let args = SamplingArgs { temperature, top_p, seed, repeat_penalty, ..args.clone() };
            let sampling = match top_p {
                _ if temperature == 0.0 => Sampling::ArgMax,
                None => Sampling::All { temperature },
                Some(p) => Sampling::TopP { p, temperature },
            };
            let (mut ours, mut candles) =
                (Sampler::new(&args), LogitsProcessor::from_sampling(seed, sampling));
            let mut tokens = vec![1, 2, 3];
            for step in 0..40 {
                let logits = Tensor::randn(0f32, 3.0, 50, &Device::Cpu)?;
                let recent = &tokens[tokens.len().saturating_sub(args.repeat_last_n)..];
                let expected =
                    candles.sample(&apply_repeat_penalty(&logits, repeat_penalty, recent)?)?;
                assert_eq!(
                    ours.choose(&logits.unsqueeze(0)?, &tokens)?,
                    expected,
                    "{args:?}, step {step}"
                );
                tokens.push(expected);
            }
        }
    }
    Ok(())
}

/// With top-k both choose from the same tokens.
#[test]
fn both_samplers_have_the_same_candidates() -> Result<()> {
    let logits = Tensor::new(&[0.1f32, 2.0, 1.0, 1.5, -1.0, 0.5], &Device::Cpu)?;
    for (k, p) in [(3, None), (4, Some(0.7)), (9, Some(0.7)), (4, Some(1.0))] {
        let temperature = 1.0;
        let args = SamplingArgs {
            temperature,
            top_p: p,
            top_k: Some(k),
            seed: 1,
            repeat_penalty: 1.0,
            repeat_last_n: 0,
        };
        let sampling = p.map_or(Sampling::TopK { k, temperature }, |p| Sampling::TopKThenTopP {
            k,
            p,
            temperature,
        });
        let (mut ours, mut candles) =
            (Sampler::new(&args), LogitsProcessor::from_sampling(1, sampling));
        let (mut found, mut expected) = ([false; 6], [false; 6]);
        for _ in 0..1000 {
            found[ours.choose(&logits.unsqueeze(0)?, &[])? as usize] = true;
            expected[candles.sample(&logits)? as usize] = true;
        }
        assert_eq!(found, expected, "top-k {k}, top-p {p:?}");
    }
    Ok(())
}
