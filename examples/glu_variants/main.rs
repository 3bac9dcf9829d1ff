//! Compares the feed-forward blocks of N. Shazeer, "GLU Variants Improve Transformer", 2020,
//! <https://arxiv.org/abs/2002.05202>, in a small LLaMA: ReLU, GELU and Swish without a gate; GLU,
//! bilinear, ReGLU, GEGLU and SwiGLU with one.
//!
//! ```text
//! cargo run --profile bench --example glu_variants -- --out DIR
//! ```
//!
//! # Method
//! 1. All variants have the same number of parameters and of multiply-adds. A gated block has three
//!    matrices of width I, a block without a gate two of width 3/2·I.
//! 2. The text is the story grammar of `examples/train`. Its entropy is known and is the floor of
//!    the held-out loss. No story is used twice.
//! 3. The runs of one seed see the same stories in the same order. They start from the same
//!    embedding, attention and norms. The matrices of the blocks have the same distribution.
//! 4. After training, [`results`] measures the loss on held-out stories, the activations (the input
//!    of `down_proj`), and the gradients that reach the input of the activation.
//! 5. A run saves its weights, the moments of AdamW and its measurements every few steps. The same
//!    command continues after a kill and has the same losses as without it, and skips what is
//!    finished.
//!
//! Other modes train no model: `--time` measures times, `--fit` fits small blocks to functions, and
//! `--plot DIR` draws the pictures again from the csv files. `--smoke` makes runs of a second.
//! `README.md` describes the files.

mod adamw;
#[path = "../train/batch.rs"]
mod batch;
mod ffn;
mod files;
mod fit;
#[path = "../train/grammar.rs"]
mod grammar;
#[path = "../llama/model.rs"]
mod model;
mod plots;
mod probe;
mod progress;
mod results;
mod run;
#[path = "../train/schedule.rs"]
mod schedule;
mod settings;
mod statistics;
mod table;
mod task;
#[cfg(test)]
mod tests;
mod timing;
#[allow(dead_code, reason = "the tokenizer is not saved")]
#[path = "../train/tokenizer.rs"]
mod tokenizer;
#[path = "../train/variables.rs"]
mod variables;
mod variant;

use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread::available_parallelism;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use progress::Progress;
use run::Run;
use settings::Settings;
use task::Task;
use variant::Variant;

#[derive(Parser, Debug)]
#[command(about = "Compare the feed-forward blocks of Shazeer's table in a small LLaMA")]
struct Args {
    /// Where the runs, tables and pictures are written.
    #[arg(long, required_unless_present = "plot")]
    out: Option<PathBuf>,
    /// Runs of each variant, with the seeds 1, 2, ...
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// Runs at the same time, each on one thread; as many as there are cores by default.
    #[arg(long)]
    jobs: Option<usize>,
    /// Runs of a second, to try the program; options of the sizes are ignored.
    #[arg(long)]
    smoke: bool,
    /// Only measures times, in turn, and writes times.csv. The machine should be idle.
    #[arg(long)]
    time: bool,
    /// Only fits small blocks to functions of two numbers and writes fits.csv.
    #[arg(long, conflicts_with = "time")]
    fit: bool,
    /// Only draws the pictures of a directory again, from its csv files, into --out if it is given.
    #[arg(long, value_name = "DIR")]
    plot: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(dir) = &args.plot {
        return plots::draw(dir, args.out.as_deref().unwrap_or(dir));
    }
    let out = args.out.context("--out: missing")?;
    use_one_thread()?;
    let jobs = args.jobs.unwrap_or_else(|| available_parallelism().map_or(1, NonZero::get));
    if args.fit {
        std::fs::create_dir_all(&out).with_context(|| out.display().to_string())?;
        return fit::measure(if args.smoke { 20 } else { 4000 }, &out);
    }
    let settings = if args.smoke { Settings::smoke() } else { args.settings };
    if args.time {
        let plan = if args.smoke { timing::Plan::smoke() } else { timing::Plan::usual() };
        return timing::measure(&prepare(settings, &out)?, plan, &out);
    }
    experiment(settings, args.seeds, jobs, &out)
}

/// Starts the program again with one thread for candle's operations, unless the environment names a
/// number of threads. The operations of a model of this size are too short for several threads, so
/// the runs are distributed over the cores instead.
fn use_one_thread() -> Result<()> {
    #[cfg(unix)]
    if std::env::var_os("RAYON_NUM_THREADS").is_none() {
        use std::os::unix::process::CommandExt;
        let mut again = std::process::Command::new(std::env::current_exe()?);
        again.args(std::env::args_os().skip(1));
        again.envs([("RAYON_NUM_THREADS", "1"), ("CANDLE_NUM_THREADS", "1")]);
        return Err(again.exec().into()); // returns only if it fails
    }
    Ok(())
}

/// The task of a directory, which is created if it does not exist.
fn prepare(settings: Settings, out: &Path) -> Result<Task> {
    std::fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    let task = Task::new(settings)?;
    task.settings.claim(out)?;
    Ok(task)
}

/// Trains what is not finished, `jobs` runs at a time, then writes the tables and pictures.
fn experiment(settings: Settings, seeds: u64, jobs: usize, out: &Path) -> Result<()> {
    ensure!(jobs > 0, "jobs: expected at least 1, found 0");
    let task = prepare(settings, out)?;
    let runs = (1..=seeds).flat_map(|seed| Variant::ALL.map(|variant| (variant, seed)));
    let (finished, open): (Vec<_>, Vec<_>) =
        runs.partition(|(variant, seed)| results::is_finished(out, *variant, *seed));
    let all = (finished.len() + open.len()) as u64;
    let progress = Progress::new(all, finished.len() as u64, task.settings.steps)?;
    let queue = Mutex::new(open.into_iter());
    std::thread::scope(|scope| {
        let worker = || {
            loop {
                let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some((variant, seed)) = next else { return Ok(()) };
                train(&task, variant, seed, &progress, out)?;
            }
        };
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(worker)).collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().unwrap_or_else(|_| bail!("a run panicked")))
    })?;
    results::join(out, seeds)?;
    plots::draw(out, out)
}

/// Trains and evaluates one run, from the state that it has.
fn train(task: &Task, variant: Variant, seed: u64, progress: &Progress, out: &Path) -> Result<()> {
    let mut run = Run::open(task, variant, seed, out)?;
    let bar = progress.begin(&run)?;
    while !run.is_trained() {
        run.advance()?;
        progress.step(&run, &bar);
    }
    results::finish(&run, out)?;
    progress.end(&run, &bar)
}
