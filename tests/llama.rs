//! Whole models: the example's LLaMA against Hugging Face transformers, with the same checkpoints
//! (`tests/golden/models`).

#![allow(missing_docs)]

#[path = "llama/adapters.rs"]
mod adapters;
#[path = "llama/checkpoints.rs"]
mod checkpoints;
mod common;
#[path = "llama/config.rs"]
mod config;
#[path = "../examples/llama/model.rs"]
mod model;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::{D, DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use candle_swiglu::Checkpoint;
use common::Golden;
use model::{Cache, Llama, LlamaConfig};
use tokenizers::Tokenizer;

const MODELS: [&str; 13] = [
    "bias_f32",
    "gelu_tanh_f32",
    "gqa_tied_llama3_bf16",
    "granite_bf16",
    "mistral_window_f16",
    "new_rope_keys",
    "odd_f16",
    "old_rope_keys",
    "phi3_longrope_f16",
    "phi3_window_f32",
    "qwen2_window_f32",
    "qwen3_tied_bf16",
    "smollm3_f32",
];

/// The two prompts of each reference: one of twelve tokens, and one of a single token.
const PROMPTS: [&str; 2] = ["", "single_"];

fn dir(name: &str) -> PathBuf {
    common::golden_dir().join("models").join(name)
}

fn load(dir: &Path, dtype: DType) -> Result<Llama> {
    let checkpoint = Checkpoint::open(dir)?;
    let cfg = LlamaConfig::of(&checkpoint)?;
    let model = Llama::open(&checkpoint, &cfg, dtype, &Device::Cpu)?;
    ensure!(model.notes().is_empty(), "{:?}", model.notes());
    Ok(model)
}

fn ids(tensor: &Tensor) -> Result<Vec<u32>> {
    let ids = tensor.flatten_all()?.to_vec1::<i64>()?;
    ids.into_iter().map(|id| Ok(u32::try_from(id)?)).collect()
}

/// (1,T)
fn row(tokens: &[u32]) -> Result<Tensor> {
    Ok(Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?)
}

/// The token with the largest logit, for each of `count` steps. Stops after a token of `ends`.
fn greedy(
    model: &Llama,
    prompt: &[u32],
    count: usize,
    use_kv_cache: bool,
    ends: &[u32],
) -> Result<Vec<u32>> {
    let mut cache = Cache::new(use_kv_cache, model.config());
    let mut tokens = prompt.to_vec();
    while tokens.len() < prompt.len() + count {
        let start = cache.positions();
        let logits = model.forward(&row(&tokens[start..])?, start, &mut cache)?;
        tokens.push(logits.argmax(D::Minus1)?.to_vec1::<u32>()?[0]);
        if tokens.last().is_some_and(|token| ends.contains(token)) {
            break;
        }
    }
    Ok(tokens.split_off(prompt.len()))
}

fn largest_difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    ensure!(a.dims() == b.dims(), "{:?} against {:?}", a.dims(), b.dims());
    let difference = (a.to_dtype(DType::F64)? - b.to_dtype(DType::F64)?)?.abs()?;
    Ok(difference.flatten_all()?.max(0)?.to_scalar::<f64>()?)
}

#[test]
fn every_reference_is_tested() -> Result<()> {
    let entries = std::fs::read_dir(common::golden_dir().join("models"))?
        .collect::<std::io::Result<Vec<_>>>()?;
    let mut names: Vec<String> =
        entries.into_iter().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    assert_eq!(names, MODELS);
    Ok(())
}

/// In f32 the two programs differ only in the order of sums. The bound 1e-4 is about six times the
/// largest difference between transformers' own f32 and f64 logits (1.6e-5, in the metadata). The
/// smallest effect of misreading a config field is 3.6e-3.
#[test]
fn f32_logits_and_greedy_tokens_are_those_of_transformers() -> Result<()> {
    for name in MODELS {
        let golden = Golden::load(&dir(name).join("reference.safetensors"))?;
        let model = load(&dir(name), DType::F32)?;
        let with_whole =
            PROMPTS.into_iter().chain(golden.tensor("whole_prompt").is_ok().then_some("whole_"));
        for prompt in with_whole {
            let tokens = ids(golden.tensor(&format!("{prompt}prompt"))?)?;
            let logits = model.forward_all(&row(&tokens)?)?;
            let difference =
                largest_difference(&logits, golden.tensor(&format!("{prompt}logits_f32"))?)?;
            println!("{name} {prompt}: logits within {difference:.1e}");
            assert!(difference < 1e-4, "{name} {prompt}: {difference}");
        }
        for prompt in PROMPTS {
            let tokens = ids(golden.tensor(&format!("{prompt}prompt"))?)?;
            let expected = ids(golden.tensor(&format!("{prompt}greedy_f32"))?)?;
            for use_kv_cache in [true, false] {
                let found = greedy(&model, &tokens, expected.len(), use_kv_cache, &[])?;
                assert_eq!(found, expected, "{name} {prompt} cache: {use_kv_cache}");
            }
        }
    }
    Ok(())
}

/// In the checkpoint's own dtype the roundings of both programs move the logits away from the f32
/// logits. Ours may be off by at most twice as much as transformers', which is far below the margin
/// of every greedy choice (metadata `margin_native`).
#[test]
fn native_logits_and_greedy_tokens_are_those_of_transformers() -> Result<()> {
    for name in MODELS {
        let golden = Golden::load(&dir(name).join("reference.safetensors"))?;
        let model = load(&dir(name), golden.dtype()?)?;
        let bound = 2.0 * golden.text("max_abs_native_minus_f32")?.parse::<f64>()?.max(5e-5);
        for prompt in PROMPTS {
            let tokens = ids(golden.tensor(&format!("{prompt}prompt"))?)?;
            let logits = model.forward_all(&row(&tokens)?)?;
            let error =
                largest_difference(&logits, golden.tensor(&format!("{prompt}logits_f32"))?)?;
            println!(
                "{name} {prompt}: off f32 by {error:.1e}, transformers by {:.1e}",
                bound / 2.0
            );
            assert!(error <= bound, "{name} {prompt}: {error} > {bound}");
            let expected = ids(golden.tensor(&format!("{prompt}greedy_native"))?)?;
            assert_eq!(
                greedy(&model, &tokens, expected.len(), true, &[])?,
                expected,
                "{name} {prompt}"
            );
        }
    }
    Ok(())
}

/// The fused attention of the CPU against candle's operations with masks. f64 uses the latter, as
/// every dtype does on a GPU. The text is longer than the blocks of queries and the windows. The
/// bound is that of the f32 test.
#[test]
fn attention_in_one_pass_is_that_of_the_composition() -> Result<()> {
    for name in MODELS {
        let (f32_model, f64_model) = (load(&dir(name), DType::F32)?, load(&dir(name), DType::F64)?);
        let vocab = f32_model.config().vocab_size as u32;
        let tokens: Vec<u32> = (0..200).map(|i| (i * i * 7 + i) % vocab).collect();
        let difference = largest_difference(
            &f32_model.forward_all(&row(&tokens)?)?,
            &f64_model.forward_all(&row(&tokens)?)?,
        )?;
        println!("{name}: f32 within {difference:.1e} of f64");
        assert!(difference < 1e-4, "{name}: {difference}");
    }
    Ok(())
}

/// Logits of f16 and bf16 models are f32 too: a logit of 10 in bf16 would be a multiple of 1/16.
#[test]
fn logits_are_not_rounded_to_the_weights_dtype() -> Result<()> {
    for (name, dtype) in
        [("qwen3_tied_bf16", DType::BF16), ("odd_f16", DType::F16), ("granite_bf16", DType::BF16)]
    {
        let logits = load(&dir(name), dtype)?.forward_all(&row(&[5, 6, 7])?)?;
        assert_eq!(logits.dtype(), DType::F32);
        let rounded = logits.to_dtype(dtype)?;
        assert!(largest_difference(&logits, &rounded)? > 0.0, "{name}");
    }
    Ok(())
}

/// As in `examples/train.rs`: new variables under the names of the checkpoint, each with a
/// gradient.
#[test]
fn every_variable_has_a_gradient() -> Result<()> {
    for name in MODELS {
        let vars = VarMap::new();
        let checkpoint = Checkpoint::open(dir(name))?;
        let cfg = LlamaConfig::of(&checkpoint)?;
        let model = Llama::load(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu), &cfg)?;
        // Each logit has a different weight.
        let logits = model.forward_all(&row(&[5, 6, 7, 8, 9, 10, 11])?)?;
        let gradients = (&logits * Tensor::randn(0f32, 1.0, logits.shape(), &Device::Cpu)?)?
            .sum_all()?
            .backward()?;
        let vars = vars.data().lock().map_err(|error| anyhow::anyhow!("{error}"))?;
        let created: BTreeSet<&str> = vars.keys().map(String::as_str).collect();
        assert_eq!(created, checkpoint.names().collect(), "{name}");
        for (name_of, var) in vars.iter() {
            let gradient = gradients.get(var).with_context(|| format!("{name}: {name_of}"))?;
            let largest = gradient.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            assert!(largest > 0.0 && largest.is_finite(), "{name}: {name_of}: {largest}");
        }
    }
    Ok(())
}

#[test]
fn any_of_several_end_tokens_ends_the_text() -> Result<()> {
    for name in ["new_rope_keys", "old_rope_keys"] {
        let golden = Golden::load(&dir(name).join("reference.safetensors"))?;
        let model = load(&dir(name), DType::F32)?;
        let expected = ids(golden.tensor("greedy_stopped")?)?;
        let ends = model.config().eos_token_ids.clone();
        assert!(ends.len() > 1, "{name}: {ends:?}");
        assert_eq!(
            greedy(&model, &ids(golden.tensor("prompt")?)?, 24, true, &ends)?,
            expected,
            "{name}"
        );
    }
    Ok(())
}

/// The last logits do not depend on how the text is split into calls, except for the order of sums.
/// The cases include a window that is shorter than some of the pieces, and frequencies that change
/// with the length of the text.
#[test]
fn prefill_in_pieces_gives_the_same_logits() -> Result<()> {
    for name in MODELS {
        let golden = Golden::load(&dir(name).join("reference.safetensors"))?;
        let model = load(&dir(name), DType::F32)?;
        let longest = golden.tensor("whole_prompt").or_else(|_| golden.tensor("prompt"))?;
        let tokens = ids(longest)?;
        let whole = model.forward(&row(&tokens)?, 0, &mut Cache::new(true, model.config()))?;
        for piece in [1, 2, 5, 7] {
            let mut cache = Cache::new(true, model.config());
            let mut last = None;
            for part in tokens.chunks(piece) {
                last = Some(model.forward(&row(part)?, cache.positions(), &mut cache)?);
            }
            let difference = largest_difference(&last.context("no piece")?, &whole)?;
            assert!(difference < 1e-4, "{name} in pieces of {piece}: {difference}");
        }
    }
    Ok(())
}

#[test]
fn tokens_and_positions_out_of_range_are_errors() -> Result<()> {
    let model = load(&dir("bias_f32"), DType::F32)?;
    let (vocab, context) =
        (model.config().vocab_size as u32, model.config().max_position_embeddings);
    let error = |tokens: &[u32], start| -> Result<String> {
        let found = model.forward(&row(tokens)?, start, &mut Cache::new(true, model.config()));
        Ok(found.err().context("expected an error")?.to_string())
    };
    let message = error(&[1, vocab], 0)?;
    assert!(message.contains(&vocab.to_string()) && message.contains("vocabulary"), "{message}");
    let message = error(&vec![1; context + 1], 0)?;
    assert!(message.contains(&context.to_string()), "{message}");
    error(&[1], 3)?;
    Ok(())
}

/// The checkpoint of `weights/` in both programs gives the same ids and the same text
/// (`tests/golden/stories.py`).
#[test]
fn stories_are_those_of_transformers() -> Result<()> {
    let weights = Path::new(env!("CARGO_MANIFEST_DIR")).join("weights");
    let model = load(&weights, DType::F32)?;
    let ends = model.config().eos_token_ids.clone();
    let tokenizer =
        Tokenizer::from_file(weights.join("tokenizer.json")).map_err(anyhow::Error::msg)?;
    let encode = |text: &str| {
        Ok::<_, anyhow::Error>(
            tokenizer.encode(text, true).map_err(anyhow::Error::msg)?.get_ids().to_vec(),
        )
    };
    let stories: Vec<Story> =
        serde_json::from_slice(&std::fs::read(common::golden_dir().join("stories.json"))?)?;
    ensure!(stories.len() == 4);
    for story in stories {
        // The f32 logits of the two programs differ by less than 1e-4 each.
        ensure!(story.smallest_margin > 1e-3, "{}: margin {}", story.prompt, story.smallest_margin);
        let mut tokens = encode(&story.prompt)?;
        tokens.extend(greedy(&model, &tokens, 240, true, &ends)?);
        assert_eq!(tokens, story.ids, "{}", story.prompt);
        assert_eq!(tokenizer.decode(&tokens, true).map_err(anyhow::Error::msg)?, story.text);
    }
    Ok(())
}

#[derive(serde::Deserialize)]
struct Story {
    prompt: String,
    ids: Vec<u32>,
    text: String,
    smallest_margin: f64,
}
