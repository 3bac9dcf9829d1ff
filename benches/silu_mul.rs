//! Compares `silu_mul(gate, up)` with candle's `gate.silu() * up`. The samples alternate within one
//! process.
//!
//! `cargo bench --bench silu_mul [-- --record MACHINE/NAME]`

mod harness;

use std::fmt::Write as _;
use std::hint::black_box;
use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use candle_swiglu::silu_mul;

const SHAPES: [(usize, usize); 6] =
    [(1, 64), (1, 1376), (1, 14336), (16, 14336), (512, 14336), (4096, 14336)];
const DTYPES: [DType; 3] = [DType::BF16, DType::F16, DType::F32];

fn main() -> anyhow::Result<()> {
    let mut csv =
        String::from("dtype,rows,columns,silu_mul_us,candle_us,speedup,read_write_gb_per_s\n");
    let record = harness::record_path()?;
    print!("{}", harness::machine_facts());
    println!(
        "{:>6} {:>14} {:>12} {:>12} {:>8} {:>8}",
        "dtype", "shape", "silu_mul µs", "candle µs", "speedup", "GB/s"
    );
    for dtype in DTYPES {
        for (rows, columns) in SHAPES {
            let row = measure(dtype, rows, columns)?;
            println!("{row}");
            let fields: Vec<&str> = row.split_whitespace().collect();
            let _ = writeln!(
                csv,
                "{},{rows},{columns},{},{},{},{}",
                fields[0], fields[2], fields[3], fields[4], fields[5]
            );
        }
    }
    if let Some(path) = record {
        harness::record(&path, &csv)?;
    }
    Ok(())
}

fn measure(dtype: DType, rows: usize, columns: usize) -> anyhow::Result<String> {
    let random = || Tensor::randn(0f32, 2.0, (rows, columns), &Device::Cpu)?.to_dtype(dtype);
    let (gate, up) = (random()?, random()?);
    check(&gate, &up)?;
    let mut ours = || drop(black_box(silu_mul(black_box(&gate), black_box(&up))));
    let mut candle = || drop(black_box(black_box(&gate).silu().and_then(|a| a * black_box(&up))));
    let times = harness::interleaved(Duration::from_secs(3), &mut [&mut ours, &mut candle]);
    let bytes = (3 * rows * columns * dtype.size_in_bytes()) as f64;
    let (ours, candle) = (times[0], times[1]);
    let shape = format!("{rows}x{columns}");
    let (a, b, speedup, rate) = (ours * 1e6, candle * 1e6, candle / ours, bytes / ours / 1e9);
    Ok(format!("{:>6} {shape:>14} {a:>12.2} {b:>12.2} {speedup:>8.2} {rate:>8.1}", dtype.as_str()))
}

/// Checks that both results agree up to candle's roundings of e^-x, 1 + e^-x and the quotient to
/// the dtype.
fn check(gate: &Tensor, up: &Tensor) -> anyhow::Result<()> {
    let wide = |t: Tensor| t.to_dtype(DType::F32);
    let (ours, candle) = (wide(silu_mul(gate, up)?)?, wide((gate.silu()? * up)?)?);
    let difference = (ours - &candle)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
    let largest = candle.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
    let unit = if gate.dtype() == DType::F32 { 2f32.powi(-24) } else { 2f32.powi(-8) };
    anyhow::ensure!(
        difference <= 8.0 * unit * largest,
        "the largest difference is {difference}, the largest value {largest}"
    );
    Ok(())
}
