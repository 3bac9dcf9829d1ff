//! The whole block against candle's own MLP (three `candle_nn::Linear`, `silu`, `*`) and against the machine's limits, in turn in
//! one process.
//!
//! `cargo bench --bench ffn [-- --shapes 8b,1b --rows 1,4 --dtypes bf16 --seconds 2 --no-candle --record MACHINE/NAME]`
//!
//! The floor of a case is what its weights take to be read or its products to be multiplied, whichever is more, both measured in
//! the same run: the read of the same packed weights call by call with the block, the peaks once per run.

mod harness;

use std::fmt::Write as _;
use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_nn::{Linear, Module};
use candle_swiglu::SwiGluFfn;

struct Options {
    shapes: Vec<(&'static str, usize, usize)>,
    rows: Vec<usize>,
    dtypes: Vec<DType>,
    seconds: f64,
    candle: bool,
}

const SHAPES: [(&str, usize, usize); 3] = [("small", 512, 1376), ("1b", 2048, 8192), ("8b", 4096, 14336)];

fn options() -> Result<Options> {
    let mut options = Options {
        shapes: SHAPES.to_vec(),
        rows: vec![1, 4, 16, 128, 512],
        dtypes: vec![DType::BF16, DType::F16, DType::F32],
        seconds: 2.0,
        candle: true,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg}: expected a value"));
        match arg.as_str() {
            "--shapes" => {
                let names = value()?;
                options.shapes = SHAPES.into_iter().filter(|(name, ..)| names.split(',').any(|n| n == *name)).collect();
            }
            "--rows" => options.rows = value()?.split(',').map(str::parse).collect::<Result<_, _>>()?,
            "--dtypes" => options.dtypes = value()?.split(',').map(str::parse).collect::<Result<_, _>>()?,
            "--seconds" => options.seconds = value()?.parse()?,
            "--no-candle" => options.candle = false,
            "--record" => drop(value()?),
            _ => {}
        }
    }
    Ok(options)
}

fn main() -> Result<()> {
    let options = options()?;
    let mut csv =
        String::from("kernel,dtype,shape,rows,ms,min_ms,read_ms,share_of_read,gflops,share_of_peak,candle_ms,speedup\n");
    print!("{}", harness::machine_facts());
    let peaks = harness::peaks();
    for (name, peak) in &peaks {
        println!("peak     {name} {:.0} GFLOP/s", peak / 1e9);
    }
    println!(
        "{:>10} {:>5} {:>6} {:>5} {:>9} {:>9} {:>9} {:>7} {:>8} {:>7} {:>10} {:>8}",
        "kernel", "dtype", "shape", "rows", "ms", "min ms", "read ms", "read/t", "GFLOP/s", "of peak", "candle ms", "speedup"
    );
    for &dtype in &options.dtypes {
        for &(shape, h, i) in &options.shapes {
            let weights = [random(&[i, h], dtype, 1)?, random(&[i, h], dtype, 2)?, random(&[h, i], dtype, 3)?];
            let [gate, up, down] = weights.clone();
            let ffn = SwiGluFfn::from_tensors(gate, up, down)?;
            let candle = options.candle.then(|| weights.map(|w| Linear::new(w, None)));
            for &rows in &options.rows {
                let case = Case { shape, rows, dtype, ffn: &ffn, candle: candle.as_ref(), flops: 6.0 * (rows * h * i) as f64 };
                let peak = peaks.iter().find(|(name, _)| *name == harness::peak_of(ffn.kernel(), dtype)).map_or(0.0, |p| p.1);
                let line = case.measure(&random(&[rows, h], dtype, 4)?, peak, options.seconds)?;
                csv += &line;
            }
        }
    }
    if let Some(path) = harness::record_path() {
        harness::record(&path, &csv)?;
    }
    Ok(())
}

struct Case<'a> {
    shape: &'a str,
    rows: usize,
    dtype: DType,
    ffn: &'a SwiGluFfn,
    candle: Option<&'a [Linear; 3]>,
    flops: f64,
}

impl Case<'_> {
    fn measure(&self, x: &Tensor, peak: f64, seconds: f64) -> Result<String> {
        if let Some(candle) = self.candle {
            check(&self.ffn.forward(x)?, &candle_mlp(candle, x)?)?;
        }
        let (mut ours, mut read, mut theirs) = (vec![], vec![], vec![]);
        let time = |samples: &mut Vec<f64>, f: &mut dyn FnMut()| {
            let start = Instant::now();
            f();
            samples.push(start.elapsed().as_secs_f64());
        };
        // Short calls are timed in groups, so that the clock's resolution does not show.
        let start = Instant::now();
        (0..3).for_each(|_| drop(black_box(self.ffn.forward(black_box(x)))));
        let group = (2e-4 / (start.elapsed().as_secs_f64() / 3.0)).ceil().clamp(1.0, 1000.0) as usize;
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs_f64(seconds) || ours.len() < 5 {
            time(&mut ours, &mut || (0..group).for_each(|_| drop(black_box(self.ffn.forward(black_box(x))))));
            time(&mut read, &mut || (0..group).for_each(|_| _ = black_box(self.ffn.read_weights())));
            if let Some(candle) = self.candle.filter(|_| theirs.len() < 5 || theirs.iter().sum::<f64>() < seconds) {
                time(&mut theirs, &mut || drop(black_box(candle_mlp(candle, black_box(x)))));
            }
        }
        let share = harness::median(ours.iter().zip(&read).map(|(t, r)| r / t).collect());
        let best = ours.iter().copied().fold(f64::INFINITY, f64::min) / group as f64;
        let [ours, read] = [ours, read].map(|samples| harness::median(samples) / group as f64);
        let theirs = if theirs.is_empty() { f64::NAN } else { harness::median(theirs) };
        let rate = self.flops / ours;
        let (kernel, dtype, shape, rows) = (self.ffn.kernel(), self.dtype.as_str(), self.shape, self.rows);
        let (ms, min, read_ms, candle_ms) = (ours * 1e3, best * 1e3, read * 1e3, theirs * 1e3);
        let (gflops, of_peak, speedup) = (rate / 1e9, rate / peak, theirs / ours);
        println!(
            "{kernel:>10} {dtype:>5} {shape:>6} {rows:>5} {ms:>9.4} {min:>9.4} {read_ms:>9.4} {share:>7.3} {gflops:>8.1} {of_peak:>7.3} {candle_ms:>10.3} {speedup:>8.1}"
        );
        let mut line = String::new();
        let _ = writeln!(
            line,
            "{kernel},{dtype},{shape},{rows},{ms:.5},{min:.5},{read_ms:.5},{share:.4},{gflops:.1},{of_peak:.4},{candle_ms:.4},{speedup:.2}"
        );
        Ok(line)
    }
}

/// candle's own block, as its LLaMA has it.
fn candle_mlp([gate, up, down]: &[Linear; 3], x: &Tensor) -> candle_core::Result<Tensor> {
    down.forward(&(candle_nn::ops::silu(&gate.forward(x)?)? * up.forward(x)?)?)
}

/// Numbers of about the size that keeps activations near 1; the same every time.
fn random(dims: &[usize], dtype: DType, seed: u64) -> Result<Tensor> {
    let k = dims[dims.len() - 1];
    let scale = if seed == 4 { 1.0 } else { (k as f32).powf(-0.5) } * 3f32.sqrt() / (1u32 << 23) as f32;
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let numbers = (0..dims.iter().product::<usize>()).map(|_| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 40) as i32 - (1 << 23)) as f32 * scale
    });
    let tensor = match dtype {
        DType::BF16 => Tensor::from_vec(numbers.map(half::bf16::from_f32).collect::<Vec<_>>(), dims, &Device::Cpu),
        DType::F16 => Tensor::from_vec(numbers.map(half::f16::from_f32).collect::<Vec<_>>(), dims, &Device::Cpu),
        _ => Tensor::from_vec(numbers.collect::<Vec<f32>>(), dims, &Device::Cpu),
    };
    Ok(tensor?)
}

/// The same values, up to candle's roundings of gate, up and silu to the dtype.
fn check(ours: &Tensor, candle: &Tensor) -> Result<()> {
    let wide = |t: &Tensor| t.to_dtype(DType::F32)?.flatten_all();
    let (ours, candle) = (wide(ours)?, wide(candle)?);
    let norm = |t: &Tensor| t.sqr()?.mean_all()?.to_scalar::<f32>();
    let (error, size) = (norm(&(&ours - &candle)?)?.sqrt(), norm(&candle)?.sqrt());
    ensure!(error <= 0.01 * size, "results differ by {error} rms, their size is {size}");
    Ok(())
}
