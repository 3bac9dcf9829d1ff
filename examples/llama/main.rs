//! Text from a LLaMA checkpoint: the one in `weights/`, one in a directory, or one from the hub.
//!
//! ```text
//! cargo run --release --example llama -- --prompt "Once upon a time" --temperature 0
//! ```
//!
//! The prompt and the generated text go to stdout, everything else to stderr.
#![allow(unreachable_pub, reason = "nobody else uses a program's items")]

mod generate;
#[cfg(test)]
mod generate_tests;
mod model;

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, DeviceLocation};
use candle_swiglu::Checkpoint;
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use generate::{End, SamplingArgs, Stats, TextStream};
use model::{Llama, LlamaConfig};

/// What is said when nobody says anything.
const DEFAULT_PROMPT: &str = "Once upon a time";

/// Generate text with a LLaMA checkpoint.
#[derive(Parser, Debug)]
#[command(version)]
struct Args {
    /// Run on the CPU, whatever else this was built for.
    #[arg(long)]
    cpu: bool,

    /// A directory with config.json, tokenizer.json and safetensors, or a hub id [default: the checkpoint in weights/].
    #[arg(long)]
    model_id: Option<String>,

    /// The revision of a hub id.
    #[arg(long, default_value = "main")]
    revision: String,

    /// The beginning of the text.
    #[arg(long, default_value = DEFAULT_PROMPT)]
    prompt: String,

    /// The dtype to compute in [default: the checkpoint's].
    #[arg(long)]
    dtype: Option<Dtype>,

    /// The most tokens to generate.
    #[arg(short = 'n', long, default_value_t = 256)]
    sample_len: usize,

    /// How freely tokens are chosen; 0 always takes the likeliest.
    #[arg(long, default_value_t = 0.8, allow_negative_numbers = true, value_parser = at_least_zero)]
    temperature: f64,

    /// Choose among the likeliest tokens that together have this probability.
    #[arg(long, value_parser = probability)]
    top_p: Option<f64>,

    /// Choose among this many likeliest tokens.
    #[arg(long, value_parser = at_least_one)]
    top_k: Option<usize>,

    /// The seed of the choice.
    #[arg(long, default_value_t = 299792458)]
    seed: u64,

    /// Divide the logits of recent tokens by this; 1 leaves them alone.
    #[arg(long, default_value_t = 1.0, value_parser = positive)]
    repeat_penalty: f32,

    /// How many tokens count as recent.
    #[arg(long, default_value_t = 128)]
    repeat_last_n: usize,

    /// Compute the whole text again for each token.
    #[arg(long)]
    no_kv_cache: bool,

    /// Write a trace for chrome://tracing into the working directory.
    #[arg(long)]
    tracing: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Dtype {
    F16,
    Bf16,
    F32,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let _trace = args.tracing.then(start_trace);

    let dir = checkpoint_dir(args.model_id.as_deref(), &args.revision)?;
    let checkpoint = Checkpoint::open(&dir)?;
    let cfg = read_config(&checkpoint)?;
    let tokenizer = generate::load_tokenizer(&dir.join("tokenizer.json"))?;
    let prompt = generate::encode(&tokenizer, &args.prompt, &cfg)?;

    let device = pick_device(args.cpu);
    let dtype = pick_dtype(args.dtype, &cfg);
    note(format_args!("model: {}", dir.display()));
    note(format_args!("device: {}, dtype: {}", device_name(&device), dtype.as_str()));
    let start = Instant::now();
    let model = load(checkpoint, &cfg, dtype, &device)?;
    note(format_args!("kernel: {}", model.kernel()));
    note(format_args!("loaded in {:.2} s", start.elapsed().as_secs_f64()));

    let mut text = TextStream::after(&tokenizer, &prompt)?;
    let mut open = print(&args.prompt)?.is_continue();
    let sample_len = if open { args.sample_len } else { 0 };
    let stats = generate::generate(&model, &prompt, sample_len, &sampling_args(&args), !args.no_kv_cache, |token| {
        print(&text.push(token)?)
    })?;
    open &= stats.end != End::Closed;
    if open {
        let _ = print(&format!("{}\n", text.finish()?))?;
    }
    report(prompt.len(), &stats, cfg.max_position_embeddings);
    Ok(())
}

/// The directory that `model_id` names, downloaded if it is none here.
fn checkpoint_dir(model_id: Option<&str>, revision: &str) -> Result<PathBuf> {
    let Some(model_id) = model_id else {
        let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("weights");
        return Ok(if own.is_dir() { own } else { PathBuf::from("weights") });
    };
    if Path::new(model_id).exists() {
        return Ok(PathBuf::from(model_id));
    }
    if model_id.starts_with(['.', '/', '~']) {
        bail!("{model_id}: no such directory")
    }
    download(model_id, revision)
}

#[cfg(feature = "hub")]
fn download(model_id: &str, revision: &str) -> Result<PathBuf> {
    note(format_args!("downloading {model_id} ({revision})"));
    let bar = byte_bar("downloading", 0)?;
    let progress = bar.clone();
    let dir = candle_swiglu::hub::download(model_id, revision, move |done, total| {
        progress.set_length(total);
        progress.set_position(done);
    });
    bar.finish_and_clear();
    Ok(dir?)
}

#[cfg(not(feature = "hub"))]
fn download(model_id: &str, _revision: &str) -> Result<PathBuf> {
    bail!("{model_id}: no such directory; if it is a hub id, build with --features hub to download it")
}

/// The config, and the end tokens of generation_config.json when there is one.
fn read_config(checkpoint: &Checkpoint) -> Result<LlamaConfig> {
    let dir = checkpoint.dir();
    let mut cfg = LlamaConfig::from_json(checkpoint.config()).with_context(|| dir.display().to_string())?;
    let path = dir.join("generation_config.json");
    if path.exists() {
        let what = || path.display().to_string();
        let json = std::fs::read_to_string(&path).with_context(what)?;
        cfg.add_eos_of(&serde_json::from_str(&json).with_context(what)?).with_context(what)?;
    }
    Ok(cfg)
}

/// The first device that this was built for and finds.
fn pick_device(cpu: bool) -> Device {
    let cuda = || candle_core::utils::cuda_is_available().then(|| Device::new_cuda(0));
    let metal = || candle_core::utils::metal_is_available().then(|| Device::new_metal(0));
    let found = if cpu { None } else { cuda().or_else(metal) };
    found.unwrap_or(Ok(Device::Cpu)).unwrap_or_else(|error| {
        note(format_args!("no GPU: {error}"));
        Device::Cpu
    })
}

fn device_name(device: &Device) -> String {
    match device.location() {
        DeviceLocation::Cpu => "cpu".to_string(),
        DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}

fn pick_dtype(asked: Option<Dtype>, cfg: &LlamaConfig) -> DType {
    match asked {
        Some(Dtype::F16) => DType::F16,
        Some(Dtype::Bf16) => DType::BF16,
        Some(Dtype::F32) => DType::F32,
        None => cfg.dtype.unwrap_or(DType::F32),
    }
}

fn sampling_args(args: &Args) -> SamplingArgs {
    SamplingArgs {
        temperature: args.temperature,
        top_p: args.top_p,
        top_k: args.top_k,
        seed: args.seed,
        repeat_penalty: args.repeat_penalty,
        repeat_last_n: args.repeat_last_n,
    }
}

/// The model, with a progress bar while its bytes are read.
fn load(checkpoint: Checkpoint, cfg: &LlamaConfig, dtype: DType, device: &Device) -> Result<Llama> {
    let bar = byte_bar("loading", checkpoint.data_bytes())?;
    let progress = bar.clone();
    let checkpoint = checkpoint.with_progress(move |bytes| progress.inc(bytes));
    let model = Llama::load(checkpoint.var_builder(dtype, device), cfg);
    bar.finish_and_clear();
    Ok(model?)
}

/// Shown on a terminal only.
fn byte_bar(verb: &'static str, total: u64) -> Result<ProgressBar> {
    let target = if io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}")?;
    Ok(ProgressBar::with_draw_target(Some(total), target).with_style(style).with_message(verb))
}

fn report(prompt_tokens: usize, stats: &Stats, context: usize) {
    let rate = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
    if stats.generated > 0 {
        note(format_args!("{prompt_tokens} prompt tokens ({:.2} token/s)", rate(prompt_tokens, stats.prompt)));
    }
    match stats.generated {
        0 | 1 => note(format_args!("{} tokens generated", stats.generated)),
        n => note(format_args!("{n} tokens generated ({:.2} token/s)", rate(n - 1, stats.generation))),
    }
    match stats.end {
        End::Eos => note("ended by the model"),
        End::Context => note(format_args!("ended by the context of {context} tokens")),
        End::SampleLen | End::Closed => (),
    }
    if let Some(kib) = peak_memory_kib() {
        note(format_args!("peak memory: {:.1} MiB", kib as f64 / 1024.0));
    }
}

/// The most memory this process has held, where the system tells (Linux).
fn peak_memory_kib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// Writes to stdout at once; a reader that has gone away (`| head`) ends the text, it is no error.
fn print(text: &str) -> Result<ControlFlow<()>> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(ControlFlow::Continue(())),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(ControlFlow::Break(())),
        Err(error) => Err(error).context("cannot write to stdout"),
    }
}

/// Writes a line to stderr, if anyone listens.
fn note(line: impl Display) {
    let _ = writeln!(io::stderr(), "{line}");
}

fn start_trace() -> tracing_chrome::FlushGuard {
    let (layer, guard) = tracing_chrome::ChromeLayerBuilder::new().build();
    tracing_subscriber::registry().with(layer).init();
    guard
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

fn number<T: std::str::FromStr>(text: &str, expected: &str, valid: impl Fn(&T) -> bool) -> Result<T, String> {
    text.parse().ok().filter(valid).ok_or_else(|| format!("expected {expected}"))
}
