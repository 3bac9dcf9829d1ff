//! The flags of the program.

use std::io::Read;
use std::path::PathBuf;

use anyhow::{Context, Result};
use candle_core::DType;
use clap::{Parser, ValueEnum};

use crate::sampler::SamplingArgs;

/// The prompt without `--prompt` and `--file`.
const DEFAULT_PROMPT: &str = "Once upon a time";

/// Generate text with a LLaMA checkpoint.
#[derive(Parser, Debug)]
#[command(version)]
pub struct Args {
    /// Run on the CPU, whatever else this was built for.
    #[arg(long)]
    pub cpu: bool,

    /// A directory with config.json, tokenizer.json and safetensors, or a hub id [default: the
    /// checkpoint in weights/].
    #[arg(short, long)]
    pub model_id: Option<String>,

    /// The revision of a hub id.
    #[arg(long, default_value = "main")]
    pub revision: String,

    /// The directory of a LoRA adapter in PEFT's format (adapter_config.json and
    /// adapter_model.safetensors).
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,

    /// The beginning of the text; `-` reads it from stdin [default: "Once upon a time"].
    #[arg(short, long, allow_hyphen_values = true, conflicts_with_all = ["file", "chat"])]
    pub prompt: Option<String>,

    /// Read the beginning of the text from this file.
    #[arg(short, long, conflicts_with = "chat")]
    pub file: Option<PathBuf>,

    /// Do not print the prompt before the generated text.
    #[arg(long, conflicts_with = "chat")]
    pub no_echo: bool,

    /// Answer each line of stdin, with the checkpoint's chat template; /exit or the end of stdin
    /// ends the chat.
    #[arg(long)]
    pub chat: bool,

    /// The system message of the chat.
    #[arg(long, value_name = "TEXT", requires = "chat", conflicts_with_all = ["prompt", "file", "no_echo"])]
    pub system: Option<String>,

    /// End the text before this string; may be given several times.
    #[arg(long, value_name = "STRING", allow_hyphen_values = true, value_parser = not_empty)]
    pub stop: Vec<String>,

    /// The dtype to compute in [default: the checkpoint's].
    #[arg(long)]
    pub dtype: Option<Dtype>,

    /// The most tokens to generate; in a chat, of each answer.
    #[arg(short = 'n', long, default_value_t = 256)]
    pub sample_len: usize,

    /// How freely tokens are chosen; 0 always takes the likeliest.
    #[arg(long, default_value_t = 0.8, allow_negative_numbers = true, value_parser = at_least_zero)]
    pub temperature: f64,

    /// Choose among the likeliest tokens that together have this probability.
    #[arg(long, value_parser = probability)]
    pub top_p: Option<f64>,

    /// Choose among this many likeliest tokens.
    #[arg(long, value_parser = at_least_one)]
    pub top_k: Option<usize>,

    /// The seed of the choice.
    #[arg(long, default_value_t = 299792458)]
    pub seed: u64,

    /// Divide the logits of recent tokens by this; 1 leaves them alone.
    #[arg(long, default_value_t = 1.0, value_parser = positive)]
    pub repeat_penalty: f32,

    /// How many tokens count as recent.
    #[arg(long, default_value_t = 128)]
    pub repeat_last_n: usize,

    /// Compute the whole text again for each token.
    #[arg(long)]
    pub no_kv_cache: bool,

    /// Go on with a warning if the checkpoint has tensors that the model does not read.
    #[arg(long)]
    pub allow_unread: bool,

    /// Write a trace for chrome://tracing to this file [default: trace-SECONDS.json in the working
    /// directory].
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    pub tracing: Option<Option<PathBuf>>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Dtype {
    F16,
    Bf16,
    F32,
}

impl From<Dtype> for DType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F16 => Self::F16,
            Dtype::Bf16 => Self::BF16,
            Dtype::F32 => Self::F32,
        }
    }
}

impl Args {
    /// The prompt, unchanged, from the command line, `--file` or `stdin`.
    pub fn prompt(&self, mut stdin: impl Read) -> Result<String> {
        if let Some(path) = &self.file {
            return std::fs::read_to_string(path)
                .with_context(|| format!("--file {}", path.display()));
        }
        match self.prompt.as_deref() {
            Some("-") => {
                let mut text = String::new();
                stdin.read_to_string(&mut text).context("--prompt -: cannot read stdin")?;
                Ok(text)
            }
            prompt => Ok(prompt.unwrap_or(DEFAULT_PROMPT).to_string()),
        }
    }

    pub fn sampling(&self) -> SamplingArgs {
        SamplingArgs {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            seed: self.seed,
            repeat_penalty: self.repeat_penalty,
            repeat_last_n: self.repeat_last_n,
        }
    }
}

fn not_empty(text: &str) -> Result<String, String> {
    if text.is_empty() {
        Err("expected a string of at least one character".to_string())
    } else {
        Ok(text.to_string())
    }
}

fn at_least_zero(text: &str) -> Result<f64, String> {
    number(text, "a number of at least 0", |x: &f64| *x >= 0.0 && x.is_finite())
}

fn positive(text: &str) -> Result<f32, String> {
    number(text, "a number above 0", |x: &f32| *x > 0.0 && x.is_finite())
}

fn probability(text: &str) -> Result<f64, String> {
    number(text, "a number above 0 and up to 1", |x: &f64| *x > 0.0 && *x <= 1.0)
}

fn at_least_one(text: &str) -> Result<usize, String> {
    number(text, "a whole number of at least 1", |x: &usize| *x >= 1)
}

fn number<T: std::str::FromStr>(
    text: &str,
    expected: &str,
    valid: impl Fn(&T) -> bool,
) -> Result<T, String> {
    text.parse().ok().filter(valid).ok_or_else(|| format!("expected {expected}"))
}
