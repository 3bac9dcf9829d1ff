//! Measures what LoRA costs.
//!
//! ```text
//! cargo bench --bench lora [-- OPTIONS]
//!   --rank    16
//!   --dtypes  bf16,f16,f32
//!   --rows    1,512
//!   --seconds 2            time for the samples of a case
//!   --no-training          leaves the second part out
//!   --no-step              leaves the third part out
//!   --record  MACHINE/NAME writes NAME.csv and NAME.txt under benches/record
//! ```
//!
//! 1. Forward: the block of LLaMA 1B (H 2048, I 8192) and a linear layer (2048, 2048), with and
//!    without pairs on every projection. The samples alternate.
//! 2. Training: forward and backward of this block with f32 pairs on constant weights, M = 512,
//!    beside the same in candle's operations. The samples alternate.
//! 3. A fine-tuning step of the whole model, 512 tokens, with f32 pairs on the projections of every
//!    block: its time and the peak of the resident memory. Each system has a process of its own.

#[path = "../harness/mod.rs"]
mod harness;
#[path = "../../examples/llama/model.rs"]
mod model;
mod step;
mod systems;

use std::fmt::Write as _;
use std::hint::black_box;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Tensor, Var};
use candle_nn::Module;
use candle_swiglu::{Linear, Lora, SwiGluFfn};

use systems::{CandleMlp, H, I, adapted, normal, pairs};

struct Options {
    rank: usize,
    dtypes: Vec<DType>,
    rows: Vec<usize>,
    seconds: f64,
    training: bool,
    step: bool,
    /// Makes the step of this system, in a process of its own.
    child: Option<String>,
}

fn options() -> Result<Options> {
    let mut options = Options {
        rank: 16,
        dtypes: vec![DType::BF16, DType::F16, DType::F32],
        rows: vec![1, 512],
        seconds: 2.0,
        training: true,
        step: true,
        child: None,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg}: expected a value"));
        match arg.as_str() {
            "--rank" => options.rank = value()?.parse()?,
            "--dtypes" => {
                let dtype = |name: &str| name.parse().context("--dtypes");
                options.dtypes = value()?.split(',').map(dtype).collect::<Result<_>>()?;
            }
            "--rows" => {
                options.rows = value()?.split(',').map(str::parse).collect::<Result<_, _>>()?;
            }
            "--no-training" => options.training = false,
            "--seconds" => options.seconds = value()?.parse()?,
            "--no-step" => options.step = false,
            "--child" => options.child = Some(value()?),
            "--record" => drop(value()?), // read by the harness
            "--bench" => {}
            other => bail!("{other}: no such option"),
        }
    }
    Ok(options)
}

fn main() -> Result<()> {
    let options = options()?;
    if let Some(system) = &options.child {
        return step::run(system, options.rank);
    }
    let record = harness::record_path()?;
    print!("{}", harness::machine_facts());
    let mut csv = String::from("part,case,dtype,rows,with,without_or_candle,ratio\n");
    let mut line = |part: &str, case: &str, dtype: &str, rows: usize, [a, b]: [f64; 2]| {
        let ratio = a / b;
        println!("{part:>9} {case:>8} {dtype:>5} {rows:>4} {a:>12.3} {b:>12.3} {ratio:>7.3}");
        let _ = writeln!(csv, "{part},{case},{dtype},{rows},{a:.4},{b:.4},{ratio:.4}");
    };
    println!("milliseconds with LoRA, milliseconds without it, ratio");
    for &dtype in &options.dtypes {
        for &rows in &options.rows {
            line("forward", "block", dtype.as_str(), rows, block(dtype, rows, &options)?);
            line("forward", "linear", dtype.as_str(), rows, linear(dtype, rows, &options)?);
        }
    }
    println!("milliseconds of forward and backward, of candle's operations, ratio");
    for dtype in [DType::BF16, DType::F32].into_iter().filter(|_| options.training) {
        line("training", "block", dtype.as_str(), 512, training(dtype, &options)?);
    }
    if options.step {
        println!("seconds of a step and MiB of peak memory: this crate, candle, ratio");
        let systems = ["ours", "ours-recompute", "candle"];
        let steps: Vec<[f64; 2]> = systems
            .iter()
            .map(|system| step::child(system, options.rank))
            .collect::<Result<_>>()?;
        for (system, step) in systems.iter().zip(&steps).take(2) {
            for (i, what) in ["seconds", "MiB"].into_iter().enumerate() {
                line("step", system, what, 512, [step[i], steps[2][i]]);
            }
        }
    }
    match record {
        Some(path) => Ok(harness::record(&path, &csv)?),
        None => Ok(()),
    }
}

/// A competitor.
type Call<'a> = &'a dyn Fn() -> candle_core::Result<Tensor>;

/// Medians in milliseconds.
fn alternating(options: &Options, [a, b]: [Call; 2]) -> Result<[f64; 2]> {
    [a()?, b()?].iter().try_for_each(check)?;
    let (mut a, mut b) = (|| drop(black_box(a())), || drop(black_box(b())));
    let budget = Duration::from_secs_f64(options.seconds);
    let times = harness::interleaved(budget, &mut [&mut a, &mut b]);
    Ok([times[0] * 1e3, times[1] * 1e3])
}

fn check(result: &Tensor) -> Result<()> {
    let sum = result.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()?;
    ensure!(sum.is_finite(), "a result is not finite");
    Ok(())
}

fn block(dtype: DType, rows: usize, options: &Options) -> Result<[f64; 2]> {
    let base =
        SwiGluFfn::from_tensors(normal(I, H, dtype)?, normal(I, H, dtype)?, normal(H, I, dtype)?)?;
    let with = adapted(base.clone(), pairs(options.rank, dtype, Ok)?)?;
    let x = normal(rows, H, dtype)?;
    alternating(options, [&|| with.forward(&x), &|| base.forward(&x)])
}

fn linear(dtype: DType, rows: usize, options: &Options) -> Result<[f64; 2]> {
    let base = Linear::new(normal(H, H, dtype)?, None)?;
    let mut with = base.clone();
    let r = options.rank;
    with.add_adapter("lora", Lora::new(normal(r, H, dtype)?, normal(H, r, dtype)?, 2.0, 0.0)?)?;
    with.set_adapter("lora")?;
    let x = normal(rows, H, dtype)?;
    alternating(options, [&|| with.forward(&x), &|| base.forward(&x)])
}

/// dx and the gradients of the pairs.
fn training(dtype: DType, options: &Options) -> Result<[f64; 2]> {
    let weights = [normal(I, H, dtype)?, normal(I, H, dtype)?, normal(H, I, dtype)?];
    let [gate, up, down] = weights.clone();
    let vars = |tensor: Tensor| Ok(Var::from_tensor(&tensor)?.into_inner());
    let pairs = pairs(options.rank, DType::F32, vars)?;
    let ours = adapted(SwiGluFfn::from_tensors(gate, up, down)?, pairs.clone())?;
    let candle = CandleMlp::new(weights, pairs);
    let x = Var::from_tensor(&normal(512, H, dtype)?)?;
    let gradient = |layer: &dyn Module| -> candle_core::Result<Tensor> {
        let store = candle_swiglu::backward(&layer.forward(&x)?.sum_all()?)?;
        store.get(&x).cloned().context("x has no gradient").map_err(candle_core::Error::wrap)
    };
    alternating(options, [&|| gradient(&ours), &|| gradient(&candle)])
}
