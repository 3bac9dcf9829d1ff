//! Text from a LLaMA checkpoint: the one in `weights/`, one in a directory, or one from the hub.
//!
//! ```text
//! cargo run --release --example llama -- --prompt "Once upon a time" --temperature 0
//! cargo run --release --example llama -- -m path/to/checkpoint --chat
//! ```
//!
//! The prompt, the generated text and the answers go to stdout, everything else to stderr.
#![allow(unreachable_pub, reason = "nobody else uses a program's items")]

mod args;
mod chat;
#[cfg(test)]
mod chat_tests;
mod generate;
#[cfg(test)]
mod generate_tests;
mod interrupt;
mod model;
#[cfg(test)]
mod program_tests;
mod report;
mod sampler;
mod source;
mod stop;
mod template;

use std::fs::File;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use candle_core::DType;
use candle_swiglu::Checkpoint;
use clap::Parser;
use tokenizers::Tokenizer;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use args::Args;
use chat::{Chat, Line, next_line};
use generate::{End, Session, TextStream, TooLong};
use model::Llama;
use report::{note, print};
use sampler::SamplingArgs;
use template::ChatTemplate;

fn main() -> ExitCode {
    run(&Args::parse()).unwrap_or_else(|error| {
        note(format_args!("error: {}", report::error_text(&error)));
        ExitCode::FAILURE
    })
}

fn run(args: &Args) -> Result<ExitCode> {
    let _trace = args.tracing.as_ref().map(|file| start_trace(file.as_deref())).transpose()?;
    interrupt::install().context("cannot handle Ctrl-C")?;

    let dir = source::checkpoint_dir(args.model_id.as_deref(), &args.revision)?;
    let checkpoint = Checkpoint::open(&dir)?;
    let cfg = source::read_config(&checkpoint)?;
    let tokenizer = generate::load_tokenizer(&dir.join("tokenizer.json"))?;
    let template = args.chat.then(|| ChatTemplate::of_dir(&dir)).transpose()?;
    let text = if args.chat { String::new() } else { args.prompt(io::stdin())? };
    let prompt = if args.chat { vec![] } else { generate::encode(&tokenizer, &text, &cfg)? };

    let device = source::pick_device(args.cpu);
    let dtype = args.dtype.map_or(cfg.dtype.unwrap_or(DType::F32), DType::from);
    note(format_args!("model: {}", dir.display()));
    args.adapter.iter().for_each(|dir| note(format_args!("adapter: {}", dir.display())));
    note(format_args!("device: {}, dtype: {}", source::device_name(&device), dtype.as_str()));
    let start = Instant::now();
    let adapter = args.adapter.as_deref();
    let model = source::load(checkpoint, &cfg, adapter, (dtype, &device), args.allow_unread)?;
    note(format_args!("kernel: {}", model.kernel()));
    note(format_args!("loaded in {:.2} s", start.elapsed().as_secs_f64()));

    let sampling = args.sampling();
    let status = match &template {
        Some(template) => converse(args, &model, &tokenizer, template, &sampling)?,
        None => complete(args, &model, &tokenizer, (&text, &prompt), &sampling)?,
    };
    report::peak_memory().into_iter().for_each(note);
    Ok(status)
}

/// Writes the prompt and the generated text.
fn complete(
    args: &Args,
    model: &Llama,
    tokenizer: &Tokenizer,
    (text, prompt): (&str, &[u32]),
    sampling: &SamplingArgs,
) -> Result<ExitCode> {
    let mut out = io::stdout();
    let mut stream = TextStream::after(tokenizer, prompt)?;
    let open = args.no_echo || print(&out, text)?.is_continue();
    let sample_len = if open { args.sample_len } else { 0 };
    let mut session = Session::new(model, sampling, !args.no_kv_cache);
    let mut say = |piece: String| print(&mut out, &piece);
    let stats = chat::run(&mut session, prompt, sample_len, &mut stream, &args.stop, &mut say)?;
    if open && stats.end != End::Closed {
        let _ = print(&out, "\n")?;
    }
    report::lines(&stats, &generate::context(model.config())).iter().for_each(note);
    Ok(if stats.end == End::Interrupted {
        ExitCode::from(interrupt::EXIT_STATUS)
    } else {
        ExitCode::SUCCESS
    })
}

/// Answers each line of stdin. A line that does not fit into the context is reported and skipped.
fn converse(
    args: &Args,
    model: &Llama,
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    sampling: &SamplingArgs,
) -> Result<ExitCode> {
    let cfg = model.config();
    let session = Session::new(model, sampling, !args.no_kv_cache);
    let mut chat = Chat::new(template, tokenizer, cfg, session, (args.sample_len, &args.stop));
    if let Some(system) = &args.system {
        chat = chat.with_system(system)?;
    }
    let mut input = io::stdin().lock();
    let terminal = input.is_terminal() && io::stderr().is_terminal();
    let prompt = || {
        if terminal {
            let _ = print(io::stderr(), "> ");
        }
    };
    while let Some(line) = next_line(&mut input, prompt)? {
        let user = match line {
            Line::Message(user) => user,
            Line::Clear => {
                chat.clear();
                continue;
            }
        };
        let stats = match chat.answer(&user, io::stdout()) {
            Err(error) if error.is::<TooLong>() => {
                note(format_args!("[{error}; the message was dropped, /clear starts a new chat]"));
                continue;
            }
            answered => answered?,
        };
        if stats.end == End::Closed || print(io::stdout(), "\n")?.is_break() {
            break;
        }
        note(format_args!("[{}]", report::lines(&stats, &generate::context(cfg)).join(", ")));
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes a trace to `file` until the guard is dropped.
fn start_trace(file: Option<&Path>) -> Result<tracing_chrome::FlushGuard> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let path =
        file.map_or_else(|| PathBuf::from(format!("trace-{seconds}.json")), Path::to_path_buf);
    let file = File::create(&path).with_context(|| format!("--tracing {}", path.display()))?;
    let (layer, guard) = tracing_chrome::ChromeLayerBuilder::new().writer(file).build();
    tracing_subscriber::registry().with(layer).init();
    note(format_args!("trace: {}", path.display()));
    Ok(guard)
}
