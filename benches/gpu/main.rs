//! Compares the block on one CUDA device with candle's own, with bare cuBLAS products and with the
//! limits of the device. The samples alternate within one process.
//!
//! ```text
//! cargo bench --features cuda --bench gpu [-- OPTIONS]
//!   --shapes  1b,8b,70b    of (H, I) = (2048, 8192), (4096, 14336), (8192, 28672)
//!   --rows    1,4,8,16,32,64,128,512,2048,4096
//!   --dtypes  bf16         also f16 and f32
//!   --systems ours,candle  some of the systems below (default: all)
//!   --budget  150          seconds, after which the remaining cases are reported as skipped
//!   --csv     FILE
//! ```
//!
//! | column | meaning |
//! |---|---|
//! | `system` | see below |
//! | `dtype`, `shape`, `hidden`, `intermediate`, `rows` | the case |
//! | `us`, `min_us`, `max_us` | median, minimum and maximum over the samples, for one call |
//! | `gb_per_s` | bytes of weights, x and y divided by `us` |
//! | `tflops` | 6·M·H·I divided by `us` |
//! | `floor_us` | the larger of these bytes at the ceiling `read` and 6·M·H·I at the ceiling `cublas` |
//! | `floor_share` | `floor_us / us` |
//! | `rel_error` | rms of y's error divided by rms of y, relative to y in f64 from the same numbers |
//! | `over_ours` | `us` divided by that of `ours`, or of `ours+graph` for a name with `+graph` |
//!
//! | system | what runs |
//! |---|---|
//! | `ours` | the block |
//! | `ours-cublas`, `ours-fused` | the block with one way of prefill forced |
//! | `down`, `down-cublas` | the product with down_proj alone, by our `Linear` and by candle |
//! | `candle` | three `candle_nn::Linear` with `silu` and `*` |
//! | `candle-merged` | one product for gate and up |
//! | `gemms` | the two products alone, without an activation |
//! | `read` | a ceiling: a read of the bytes of one layer, and of 4 GiB as shape `4gib` |
//! | `cublas` | a ceiling: a product of 8192³ |
//!
//! A name with `+graph` is the replay of a CUDA graph of the same calls. Without it the host
//! launches each call. The ceilings are measured in the same run; their `us` is the time of one
//! read or product.
//!
//! 1. The y of every system is checked against f64 before it is timed. An error of more than four
//!    times candle's ends the run with an error.
//! 2. A sample is a sequence of calls, at least four, between two events on the stream, and takes
//!    about 2 ms. The samples of the systems alternate, 15 of each.
//! 3. The weights rotate over at least 600 MB, so that the L2 cache holds none of them from the
//!    previous call.

mod systems;
mod timing;

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use candle_core::{DType, Device};

use systems::{Case, System};
use timing::Ceilings;

const HEADER: &str = "system,dtype,shape,hidden,intermediate,rows,us,min_us,max_us,gb_per_s,tflops,floor_us,floor_share,rel_error,over_ours";
const SHAPES: [(&str, usize, usize); 3] =
    [("1b", 2048, 8192), ("8b", 4096, 14336), ("70b", 8192, 28672)];

struct Options {
    shapes: Vec<(&'static str, usize, usize)>,
    rows: Vec<usize>,
    dtypes: Vec<DType>,
    systems: Vec<String>,
    budget: Duration,
    csv: Option<String>,
}

fn options() -> Result<Options> {
    let mut options = Options {
        shapes: SHAPES.to_vec(),
        rows: vec![1, 4, 8, 16, 32, 64, 128, 512, 2048, 4096],
        dtypes: vec![DType::BF16],
        systems: vec![],
        budget: Duration::from_secs(150),
        csv: None,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg}: expected a value"));
        match arg.as_str() {
            "--shapes" => {
                let names = value()?;
                options.shapes = SHAPES
                    .into_iter()
                    .filter(|(name, ..)| names.split(',').any(|n| n == *name))
                    .collect();
            }
            "--rows" => {
                options.rows = value()?.split(',').map(str::parse).collect::<Result<_, _>>()?
            }
            "--dtypes" => {
                options.dtypes = value()?.split(',').map(str::parse).collect::<Result<_, _>>()?
            }
            "--systems" => options.systems = value()?.split(',').map(String::from).collect(),
            "--budget" => options.budget = Duration::from_secs_f64(value()?.parse()?),
            "--csv" => options.csv = Some(value()?),
            _ => {}
        }
    }
    Ok(options)
}

fn main() -> Result<()> {
    let options = options()?;
    let device = match Device::new_cuda(0) {
        Ok(device) => device,
        Err(error) => {
            eprintln!("no CUDA device: {error}");
            return Ok(());
        }
    };
    let start = Instant::now();
    let mut csv = String::from(HEADER) + "\n";
    let ceilings = Ceilings::measure(&device, &options.shapes, &mut csv)?;
    println!("read {:.0} GB/s, cuBLAS bf16 {:.0} TFLOP/s", ceilings.gb_per_s, ceilings.tflops);
    println!(
        "{:>20} {:>5} {:>5} {:>5} {:>10} {:>8} {:>8} {:>9}",
        "system", "dtype", "shape", "rows", "us", "of floor", "/ ours", "error"
    );
    for (&dtype, &(shape, h, i)) in options
        .dtypes
        .iter()
        .flat_map(|dtype| options.shapes.iter().map(move |shape| (dtype, shape)))
    {
        let weights = systems::Weights::new(&device, dtype, h, i)?;
        for &rows in &options.rows {
            if start.elapsed() > options.budget {
                println!("skipped {dtype:?} {shape} M = {rows}: out of time");
                continue;
            }
            let case = Case::new(&weights, shape, rows)?;
            write_case(&case, &options.systems, &ceilings, &mut csv)?;
            if let Some(path) = &options.csv {
                std::fs::write(path, &csv)?;
            }
        }
    }
    Ok(())
}

/// Times the systems of a case alternately, prints the results and appends them to `csv`.
fn write_case(
    case: &Case<'_>,
    wanted: &[String],
    ceilings: &Ceilings,
    csv: &mut String,
) -> Result<()> {
    let systems: Vec<System<'_>> = case.systems(wanted)?;
    let times = timing::in_turn(&case.device()?, &systems)?;
    for (system, time) in systems.iter().zip(&times) {
        let us = time.median;
        let floor = (case.bytes() / ceilings.gb_per_s * 1e-3)
            .max(case.operations() / ceilings.tflops * 1e-6);
        let ours = if system.name.ends_with("+graph") { "ours+graph" } else { "ours" };
        let ours = systems
            .iter()
            .position(|system| system.name == ours)
            .map_or(f64::NAN, |at| times[at].median);
        let (error, share, over) = (system.rel_error, floor / us, us / ours);
        let (dtype, shape, rows) = (case.dtype().as_str(), case.shape, case.rows);
        println!(
            "{:>20} {dtype:>5} {shape:>5} {rows:>5} {us:>10.2} {share:>8.3} {over:>8.2} {error:>9.1e}",
            system.name
        );
        let _ = write!(
            csv,
            "{},{dtype},{shape},{},{},{rows},",
            system.name,
            case.hidden_size(),
            case.intermediate_size()
        );
        let _ = write!(
            csv,
            "{us:.2},{:.2},{:.2},{:.0},",
            time.least,
            time.most,
            case.bytes() / us * 1e-3
        );
        let _ = writeln!(
            csv,
            "{:.1},{floor:.2},{share:.3},{error:.2e},{over:.3}",
            case.operations() / us * 1e-6
        );
    }
    Ok(())
}
