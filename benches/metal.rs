//! Compares the block on Metal with candle's operations. The samples alternate within one process.
//! There are two baselines: three matmuls around `silu` and a product, as in candle-transformers;
//! and candle's GEMM with the fused weight, followed by this crate's gate.
//!
//! `cargo bench --features metal --bench metal [-- --record MACHINE/NAME]`
//!
//! A sample is a chain of blocks, each of which needs the result of the previous one, and one
//! synchronization. With few rows a block is bandwidth-bound (GB/s), with many rows compute-bound
//! (TFLOP/s).

mod harness;

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use candle_core::{D, DType, Device, Module, Tensor};
use candle_swiglu::{SwiGluFfn, silu_mul};

const SHAPES: [(usize, usize); 2] = [(2048, 8192), (4096, 14336)];
const ROWS: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 512];
const DTYPES: [DType; 3] = [DType::BF16, DType::F16, DType::F32];
const CHAIN: usize = 8;

fn main() -> Result<()> {
    let record = harness::record_path()?;
    let device = Device::new_metal(0).context("a Mac with a GPU")?;
    let facts = facts(&device)?;
    print!("{facts}");
    let head = [
        "dtype",
        "H",
        "I",
        "rows",
        "ours_us",
        "candle_us",
        "merged_us",
        "speedup",
        "over_merged",
        "gb_per_s",
        "tflops",
    ];
    let mut csv = head.join(",") + "\n";
    println!("{}", head.map(|name| format!("{name:>11}")).concat());
    for dtype in DTYPES {
        for (h, i) in SHAPES {
            let weights = Weights::random(h, i, dtype, &device)?;
            for rows in ROWS {
                let fields = weights.measure(rows, &device)?;
                println!(
                    "{}",
                    fields.iter().map(|field| format!("{field:>11}")).collect::<String>()
                );
                let _ = writeln!(csv, "{}", fields.join(","));
            }
        }
    }
    if let Some(path) = record {
        harness::record(&path, &csv)?;
        std::fs::OpenOptions::new()
            .append(true)
            .open(path.with_extension("txt"))?
            .write_all(facts.as_bytes())?;
    }
    Ok(())
}

/// The machine and its GPU, as macOS names them.
fn facts(device: &Device) -> Result<String> {
    let ask = |name: &str| {
        let answer = Command::new("sysctl")
            .args(["-n", name])
            .output()
            .map(|output| output.stdout)
            .unwrap_or_default();
        String::from_utf8_lossy(&answer).trim().to_string()
    };
    let gpu = device.as_metal_device()?.metal_device();
    let (architecture, working_set) =
        (gpu.architecture_name(), gpu.recommended_max_working_set_size() >> 30);
    Ok(format!(
        "machine  {} {}, {} GiB, macOS {}\ngpu      {architecture}, working set {working_set} GiB\n",
        ask("hw.model"),
        ask("machdep.cpu.brand_string"),
        ask("hw.memsize").parse::<u64>().unwrap_or(0) >> 30,
        ask("kern.osproductversion"),
    ))
}

struct Weights {
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_up: Tensor,
    block: SwiGluFfn,
}

impl Weights {
    /// Uniform with the variance 1/n, so that values keep their size along a chain.
    fn random(h: usize, i: usize, dtype: DType, device: &Device) -> Result<Self> {
        let uniform = |rows: usize, n: usize| -> Result<Tensor> {
            let bound = (3.0 / n as f32).sqrt();
            Ok(Tensor::rand(-bound, bound, (rows, n), &Device::Cpu)?
                .to_dtype(dtype)?
                .to_device(device)?)
        };
        let (gate, up, down) = (uniform(i, h)?, uniform(i, h)?, uniform(h, i)?);
        let gate_up = Tensor::cat(&[&gate, &up], 0)?;
        let block = SwiGluFfn::from_tensors(gate.clone(), up.clone(), down.clone())?;
        anyhow::ensure!(
            block.kernel() == "metal",
            "expected the kernel metal, found {}",
            block.kernel()
        );
        Ok(Self { gate, up, down, gate_up, block })
    }

    fn measure(&self, rows: usize, device: &Device) -> Result<Vec<String>> {
        let (i, h) = self.gate.dims2()?;
        let dtype = self.gate.dtype();
        let x = Tensor::randn(0f32, 1.0, (rows, h), &Device::Cpu)?
            .to_dtype(dtype)?
            .to_device(device)?;
        let separate = |x: &Tensor| {
            let gate = x.matmul(&self.gate.t()?)?.silu()?;
            (gate * x.matmul(&self.up.t()?)?)?.matmul(&self.down.t()?)
        };
        let merged = |x: &Tensor| {
            let both = x.matmul(&self.gate_up.t()?)?;
            silu_mul(&both.narrow(D::Minus1, 0, i)?, &both.narrow(D::Minus1, i, i)?)?
                .matmul(&self.down.t()?)
        };
        check(&self.block.forward(&x)?, &separate(&x)?)?;
        let chain = |step: &dyn Fn(&Tensor) -> candle_core::Result<Tensor>| {
            let y = (0..CHAIN).try_fold(x.clone(), |x, _| step(&x));
            y.and_then(|_| device.synchronize()).unwrap_or_else(|error| eprintln!("{error}"));
        };
        let [mut a, mut b, mut c] = [
            Box::new(|| chain(&|x| self.block.forward(x))) as Box<dyn FnMut()>,
            Box::new(|| chain(&separate)),
            Box::new(|| chain(&merged)),
        ];
        let times =
            harness::interleaved(Duration::from_millis(1500), &mut [&mut a, &mut b, &mut c]);
        let [ours, candle, merged] =
            [times[0], times[1], times[2]].map(|seconds| seconds / CHAIN as f64);
        let (bytes, flops) =
            ((3 * h * i * dtype.size_in_bytes()) as f64, 6.0 * (rows * h * i) as f64);
        let micros = [ours, candle, merged].map(|seconds| format!("{:.1}", seconds * 1e6));
        let ratios = [candle / ours, merged / ours].map(|ratio| format!("{ratio:.2}"));
        let rates = [bytes / ours / 1e9, flops / ours / 1e12].map(|rate| format!("{rate:.1}"));
        let shape = [dtype.as_str().to_string(), h.to_string(), i.to_string(), rows.to_string()];
        Ok(shape.into_iter().chain(micros).chain(ratios).chain(rates).collect())
    }
}

/// Checks that both results agree up to the roundings of gate, silu(gate), h and y to the dtype.
fn check(ours: &Tensor, candle: &Tensor) -> Result<()> {
    let wide = |t: &Tensor| t.to_device(&Device::Cpu)?.to_dtype(DType::F32);
    let (ours, candle) = (wide(ours)?, wide(candle)?);
    let rms = |t: &Tensor| t.sqr()?.mean_all()?.to_scalar::<f32>().map(f32::sqrt);
    let (difference, size) = (rms(&(ours - &candle)?)?, rms(&candle)?);
    anyhow::ensure!(
        difference <= 0.02 * size,
        "the rms of the difference is {difference}, of the results {size}"
    );
    Ok(())
}
