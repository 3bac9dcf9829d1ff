//! A fine-tuning step of a model of LLaMA 1B's shape in bf16.

use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{AdamW, Init, Optimizer, VarBuilder, VarMap};
use candle_swiglu::{FfnConfig, FfnLora, LoraConfig, SwiGluFfn};
use serde_json::json;

use crate::model::{Llama, LlamaConfig, Mlp};
use crate::systems::{CandleMlp, H, I, adapted};

const TOKENS: usize = 512;
const VOCAB: usize = 128_256;

/// Weights of one value, which are written, so that they are resident.
struct Constant;

impl SimpleBackend for Constant {
    fn get(
        &self,
        shape: Shape,
        _name: &str,
        _init: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        Tensor::full(0.01f32, shape, device)?.to_dtype(dtype)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        candle_core::bail!("{name}: the shape is unknown")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        !name.ends_with("bias")
    }
}

impl Mlp for CandleMlp {
    fn kernel(&self) -> &str {
        "candle"
    }
}

/// Runs a system in a process of its own: the seconds of its second step, and the peak in MiB.
pub(crate) fn child(system: &str, rank: usize) -> Result<[f64; 2]> {
    let rank = rank.to_string();
    let out = Command::new(std::env::current_exe()?)
        .args(["--child", system, "--rank", &rank])
        .output()?;
    ensure!(out.status.success(), "{system}: {}", String::from_utf8_lossy(&out.stderr));
    let text = String::from_utf8(out.stdout)?;
    print!("{text}");
    let numbers: Vec<f64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let [seconds, _, peak] = numbers[..] else { anyhow::bail!("{system}: {text}") };
    Ok([seconds, peak])
}

/// Prints the seconds of the second step, the MiB of the loaded model, and of the peak.
pub(crate) fn run(system: &str, rank: usize) -> Result<()> {
    let cfg = LlamaConfig::from_json(&json!({
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": H,
        "intermediate_size": I,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": true,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }))?;
    let (vars, device, ffn_cfg) = (VarMap::new(), Device::Cpu, FfnConfig::new(H, I));
    let lora = LoraConfig::new(rank, 2.0 * rank as f64).with_target_modules([
        "gate_proj",
        "up_proj",
        "down_proj",
    ]);
    let mlp = |layer: usize, vb: VarBuilder| -> candle_core::Result<Arc<dyn Mlp>> {
        let name = format!("model.layers.{layer}.mlp");
        let of_pairs = VarBuilder::from_varmap(&vars, DType::F32, &device).pp(&name);
        let pairs = FfnLora::init(&ffn_cfg, &lora, &name, of_pairs)?;
        if system == "candle" {
            let shapes = [("gate_proj", (I, H)), ("up_proj", (I, H)), ("down_proj", (H, I))];
            let weight = |(name, shape)| vb.pp(name).get(shape, "weight");
            let [gate, up, down] = shapes.map(weight);
            return Ok(Arc::new(CandleMlp::new([gate?, up?, down?], pairs)));
        }
        let ffn = SwiGluFfn::new(&ffn_cfg, vb)?.with_recompute(system == "ours-recompute");
        Ok(Arc::new(adapted(ffn, pairs)?))
    };
    let vb = VarBuilder::from_backend(Box::new(Constant), DType::BF16, device.clone());
    let model = Llama::load_with(vb, &cfg, &mlp)?;
    let mut optimizer = AdamW::new_lr(vars.all_vars(), 1e-4)?;
    let tokens = Tensor::arange(0u32, TOKENS as u32, &device)?;
    let loaded = resident("VmRSS")?;
    std::fs::write("/proc/self/clear_refs", "5").context("the peak cannot be reset")?;
    let mut seconds = 0.0;
    for _ in 0..2 {
        let start = Instant::now();
        let logits = model.forward_all(&tokens.unsqueeze(0)?)?.squeeze(0)?;
        let loss = candle_nn::loss::cross_entropy(&logits.to_dtype(DType::F32)?, &tokens)?;
        drop(logits);
        optimizer.step(&candle_swiglu::backward(&loss)?)?;
        seconds = start.elapsed().as_secs_f64();
    }
    println!("{system} {seconds:.2} s, {loaded:.0} MiB loaded, {:.0} MiB peak", resident("VmHWM")?);
    Ok(())
}

/// A field of the process's status in MiB.
fn resident(field: &str) -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with(field)).context("no such field")?;
    let kib: f64 = line.split_whitespace().nth(1).context("no number")?.parse()?;
    Ok(kib / 1024.0)
}
