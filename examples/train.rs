//! Trains the checkpoint in `weights/`: a small LLaMA, whose every MLP is a
//! [`candle_swiglu::SwiGluFfn`], on stories that a grammar tells. No story is seen twice, and the
//! grammar's entropy is known, so the held-out loss has a floor to stand beside.
//!
//! 1. A byte-level BPE tokenizer is trained on the first stories of the stream.
//! 2. Each step takes fresh stories, one to a row: `<bos> story <eos>`, padded; the loss is the
//!    mean over the tokens after bos.
//! 3. The weights are rounded to bf16 and written in the layout of Hugging Face, and the written
//!    checkpoint is what is evaluated, on stories of another stream.
//!
//! `cargo run --release --example train -- --out DIR` repeats what `weights/README.md` reports.

#[path = "train/grammar.rs"]
mod grammar;
#[path = "llama/model.rs"]
mod model;
#[path = "train/tokenizer.rs"]
mod tokenizer;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarBuilder, VarMap, loss};
use candle_swiglu::Checkpoint;
use clap::Parser;
use model::{Llama, LlamaConfig};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, Normal};
use serde_json::json;
use tokenizers::Tokenizer;

#[derive(Parser, Debug)]
#[command(about = "Train the small story LLaMA of weights/")]
struct Args {
    /// Where the checkpoint is written.
    #[arg(long)]
    out: PathBuf,
    /// Stream of the training stories, and of the initial weights; the held-out stream is the next
    /// one.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[arg(long, default_value_t = 3400)]
    steps: u64,
    /// Stories per step.
    #[arg(long, default_value_t = 16)]
    batch: u64,
    /// Peak learning rate of AdamW; it rises for 100 steps and falls along a cosine to a twentieth.
    #[arg(long, default_value_t = 3e-3)]
    lr: f64,
    #[arg(long, default_value_t = 2048)]
    vocab_size: usize,
    /// Held-out stories.
    #[arg(long, default_value_t = 1000)]
    held_out: u64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    std::fs::create_dir_all(&args.out)
        .with_context(|| format!("{}: cannot create", args.out.display()))?;
    let tokenizer =
        tokenizer::train(args.vocab_size, (0..20_000).map(|i| grammar::story(args.seed, i).text))?;
    tokenizer::save(&tokenizer, &args.out)?;
    let json = config(tokenizer.get_vocab_size(true));
    std::fs::write(args.out.join("config.json"), serde_json::to_string_pretty(&json)? + "\n")?;

    let vars = VarMap::new();
    let model = Llama::load(
        VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu),
        &LlamaConfig::from_json(&json)?,
    )?;
    initialise(&vars, args.seed)?;
    train(&args, &model, &vars, &tokenizer)?;
    save(&vars, &args.out)?;
    report(&args, &tokenizer)
}

/// The model's config.json.
fn config(vocab_size: usize) -> serde_json::Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": null,
        "attention_bias": false,
        "mlp_bias": false,
        "tie_word_embeddings": true,
        "bos_token_id": tokenizer::BOS,
        "eos_token_id": tokenizer::EOS,
        "torch_dtype": "bfloat16",
    })
}

/// Every matrix from N(0, 0.04²), those that write into the residual stream narrower by
/// √(2·layers); norms stay 1.
fn initialise(vars: &VarMap, seed: u64) -> Result<()> {
    let mut random = StdRng::seed_from_u64(seed);
    for (name, var) in by_name(vars) {
        let [rows, columns] = var.dims()[..] else { continue };
        let residual = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
        let normal = Normal::new(0f32, if residual { 0.04 / 10f32.sqrt() } else { 0.04 })?;
        let values: Vec<f32> = (0..rows * columns).map(|_| normal.sample(&mut random)).collect();
        var.set(&Tensor::from_vec(values, (rows, columns), &Device::Cpu)?)?;
    }
    Ok(())
}

/// The variables in the order of their names.
fn by_name(vars: &VarMap) -> BTreeMap<String, Var> {
    let data = vars.data().lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    data.iter().map(|(name, var)| (name.clone(), var.clone())).collect()
}

fn train(args: &Args, model: &Llama, vars: &VarMap, tokenizer: &Tokenizer) -> Result<()> {
    let params = ParamsAdamW { lr: 0.0, beta1: 0.9, beta2: 0.98, eps: 1e-8, weight_decay: 0.05 };
    let mut optimizer = AdamW::new(by_name(vars).into_values().collect(), params)?;
    let (start, mut tokens, mut mean) = (Instant::now(), 0, 0f64);
    for step in 0..args.steps {
        let batch = Batch::new(
            tokenizer,
            (step * args.batch..(step + 1) * args.batch).map(|i| grammar::story(args.seed, i)),
        )?;
        optimizer.set_learning_rate(learning_rate(args, step));
        let loss = batch.loss(model)?;
        optimizer.backward_step(&loss)?;
        tokens += batch.tokens();
        mean += (f64::from(loss.to_scalar::<f32>()?) - mean) / 50f64.min(step as f64 + 1.0);
        if (step + 1) % 50 == 0 {
            let rate = tokens as f64 / start.elapsed().as_secs_f64();
            eprintln!(
                "step {:5}  loss {mean:.4}  floor {:.4}  {rate:.0} tokens/s",
                step + 1,
                batch.floor()
            );
        }
    }
    eprintln!(
        "{tokens} tokens of {} stories in {:.0} s",
        args.steps * args.batch,
        start.elapsed().as_secs_f64()
    );
    Ok(())
}

fn learning_rate(args: &Args, step: u64) -> f64 {
    const WARMUP: f64 = 100.0;
    let progress = step as f64 / args.steps as f64;
    let cosine = 0.05 + 0.95 * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
    args.lr * cosine * ((step as f64 + 1.0) / WARMUP).min(1.0)
}

/// Stories as rows of token ids, and which of their positions count.
struct Batch {
    /// (B,T) u32, padded with eos
    inputs: Tensor,
    /// the positions in the flattened inputs whose successor is a token of the story or its eos:
    /// (N) u32
    positions: Tensor,
    /// the successors: (N) u32
    targets: Tensor,
    bits: f64,
}

impl Batch {
    fn new(tokenizer: &Tokenizer, stories: impl Iterator<Item = grammar::Story>) -> Result<Self> {
        let (mut rows, mut bits) = (vec![], 0.0);
        for story in stories {
            let mut ids =
                tokenizer.encode(story.text, true).map_err(anyhow::Error::msg)?.get_ids().to_vec();
            ids.push(tokenizer::EOS);
            bits += story.bits;
            rows.push(ids);
        }
        let width = rows.iter().map(Vec::len).max().unwrap_or(1) - 1;
        let (mut inputs, mut positions, mut targets) = (vec![], vec![], vec![]);
        for (b, row) in rows.iter().enumerate() {
            inputs.extend(
                (0..width).map(|t| row[..row.len() - 1].get(t).copied().unwrap_or(tokenizer::EOS)),
            );
            positions.extend((0..row.len() - 1).map(|t| (b * width + t) as u32));
            targets.extend_from_slice(&row[1..]);
        }
        Ok(Self {
            inputs: Tensor::from_vec(inputs, (rows.len(), width), &Device::Cpu)?,
            positions: Tensor::new(positions, &Device::Cpu)?,
            targets: Tensor::new(targets, &Device::Cpu)?,
            bits,
        })
    }

    fn tokens(&self) -> usize {
        self.targets.elem_count()
    }

    /// The grammar's own nats per token: no model's expectation is below.
    fn floor(&self) -> f64 {
        self.bits * std::f64::consts::LN_2 / self.tokens() as f64
    }

    /// Mean nats per token.
    fn loss(&self, model: &Llama) -> candle_core::Result<Tensor> {
        let logits = model.forward_all(&self.inputs)?.flatten_to(1)?; // (B·T,vocab)
        loss::cross_entropy(&logits.index_select(&self.positions, 0)?, &self.targets)
    }
}

/// Writes the variables, rounded to bf16, as `model.safetensors`.
fn save(vars: &VarMap, dir: &Path) -> Result<()> {
    let tensors =
        by_name(vars).into_iter().map(|(name, var)| Ok((name, var.to_dtype(DType::BF16)?)));
    let tensors = tensors.collect::<Result<Vec<_>>>()?;
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    Ok(safetensors::serialize_to_file(tensors, Some(metadata), &dir.join("model.safetensors"))?)
}

/// Evaluates the written checkpoint, in f32 from its bf16 weights, on the held-out stream.
fn report(args: &Args, tokenizer: &Tokenizer) -> Result<()> {
    let checkpoint = Checkpoint::open(&args.out)?;
    let model = Llama::open(&checkpoint, &LlamaConfig::of(&checkpoint)?, DType::F32, &Device::Cpu)?;
    let (mut nats, mut bits, mut tokens) = (0.0, 0.0, 0);
    for first in (0..args.held_out).step_by(16) {
        let indices = first..(first + 16).min(args.held_out);
        let batch = Batch::new(tokenizer, indices.map(|i| grammar::story(args.seed + 1, i)))?;
        nats += f64::from(batch.loss(&model)?.to_scalar::<f32>()?) * batch.tokens() as f64;
        bits += batch.bits;
        tokens += batch.tokens();
    }
    let floor = bits * std::f64::consts::LN_2;
    println!(
        "held-out stories        {} (stream {}), {tokens} tokens",
        args.held_out,
        args.seed + 1
    );
    println!("held-out loss           {:.4} nats per token", nats / tokens as f64);
    println!(
        "entropy of the grammar  {:.4} nats per token on the same stories: the floor",
        floor / tokens as f64
    );
    println!(
        "per story               {:.1} nats, floor {:.1}",
        nats / args.held_out as f64,
        floor / args.held_out as f64
    );
    Ok(())
}
