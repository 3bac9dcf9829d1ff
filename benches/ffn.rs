//! Compares the whole block with candle's own MLP (three `candle_nn::Linear`, `silu`, `*`) and with
//! the limits of the machine. The samples alternate within one process; each kernel has a process
//! of its own.
//!
//! ```text
//! cargo bench --bench ffn [-- OPTIONS]
//!   --kernels all          best (default all): names as in CANDLE_SWIGLU_KERNEL, `best` or `all`
//!   --shapes  small,1b,8b  of (H, I) = (512, 1376), (2048, 8192), (4096, 14336)
//!   --rows    1,4,16,128,512
//!   --dtypes  bf16,f16,f32
//!   --seconds 1            time for the samples of a case, and the same again for candle's
//!   --no-candle
//!   --record  MACHINE/NAME writes NAME.csv, NAME.txt and NAME.svg under benches/record
//! ```
//!
//! The floor of a case is the larger of two times: one read of its weights, and its multiply-adds
//! at peak rate. Both are measured beside the case.
//!
//! - The read covers the same packed weights with the same threads, and alternates with the block.
//!   It is measured in order and in four streams; the faster of the two counts.
//! - The peak rate of the multiply-add instruction is measured in bursts between the samples. The
//!   best burst counts.

mod harness;

use std::fmt::Write as _;
use std::hint::black_box;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_nn::{Linear, Module};
use candle_swiglu::SwiGluFfn;

const KERNEL: &str = "CANDLE_SWIGLU_KERNEL";
const SHAPES: [(&str, usize, usize); 3] =
    [("small", 512, 1376), ("1b", 2048, 8192), ("8b", 4096, 14336)];
const HEADER: &str = "kernel,dtype,shape,rows,samples,ms,min_ms,read_ms,read_share,gflops,peak_gflops,peak_share,floor_share,candle_ms,speedup";

struct Options {
    kernels: String,
    shapes: Vec<(&'static str, usize, usize)>,
    rows: Vec<usize>,
    dtypes: Vec<DType>,
    seconds: f64,
    candle: bool,
    /// Measure with the kernel of this process and print the csv.
    child: bool,
}

fn options() -> Result<Options> {
    let mut options = Options {
        kernels: "all".into(),
        shapes: SHAPES.to_vec(),
        rows: vec![1, 4, 16, 128, 512],
        dtypes: vec![DType::BF16, DType::F16, DType::F32],
        seconds: 1.0,
        candle: true,
        child: false,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        // cargo appends `--bench` to the arguments.
        let mut value = || {
            args.next()
                .filter(|value| !value.starts_with("--"))
                .with_context(|| format!("{arg}: expected a value"))
        };
        match arg.as_str() {
            "--kernels" => options.kernels = value()?,
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
            "--seconds" => options.seconds = value()?.parse()?,
            "--no-candle" => options.candle = false,
            "--child" => options.child = true,
            "--record" => drop(value()?),
            "--bench" => {} // from cargo
            _ => anyhow::bail!("unknown option {arg}; `benches/ffn.rs` lists them"),
        }
    }
    Ok(options)
}

fn main() -> Result<()> {
    let options = options()?;
    if options.child {
        return measure_all(&options);
    }
    let record = harness::record_path()?;
    print!("{}", harness::machine_facts());
    println!(
        "{:>10} {:>5} {:>6} {:>5} {:>9} {:>9} {:>7} {:>8} {:>7} {:>7} {:>10} {:>8}",
        "kernel",
        "dtype",
        "shape",
        "rows",
        "ms",
        "read ms",
        "read/t",
        "GFLOP/s",
        "of peak",
        "floor/t",
        "candle ms",
        "speedup"
    );
    let mut csv = String::from(HEADER) + "\n";
    for kernel in kernels(&options.kernels)? {
        csv += &run_child(kernel)?;
    }
    if kernels(&options.kernels)?.len() > 1 {
        print_best(&csv);
    }
    if let Some(path) = record {
        harness::record(&path, &csv)?;
        harness::roofline::draw(&path.with_extension("svg"), &csv)?;
    }
    Ok(())
}

/// Prints the fastest kernel of each case, and by how much it is faster than the first one, which
/// runs unless another is forced.
fn print_best(csv: &str) {
    type Times<'a> = Vec<(&'a str, f64)>;
    let mut cases: Vec<(String, Times)> = vec![];
    for line in csv.lines().skip(1) {
        let fields: Vec<&str> = line.split(',').collect();
        let (kernel, case) = (fields[0], fields[1..4].join(" "));
        let Ok(ms) = fields[5].parse() else { continue };
        match cases.iter_mut().find(|(name, _)| *name == case) {
            Some((_, times)) => times.push((kernel, ms)),
            None => cases.push((case, vec![(kernel, ms)])),
        }
    }
    eprintln!("\nfastest kernel of each case (dtype, shape, rows), and its speed beside the first");
    for (case, times) in cases.iter().filter(|(_, times)| times.len() > 1) {
        let best = times.iter().min_by(|a, b| a.1.total_cmp(&b.1));
        if let Some((kernel, ms)) = best {
            eprintln!("{case:>16} {kernel:>10} {:.2}", times[0].1 / ms);
        }
    }
}

/// The requested kernels. It is an error if this machine lacks one of them.
fn kernels(asked: &str) -> Result<Vec<&'static str>> {
    let available = candle_swiglu::cpu_kernels();
    match asked {
        "all" => Ok(available),
        "best" => Ok(available[..1].to_vec()),
        names => {
            let find = |name: &str| available.iter().copied().find(|a| *a == name);
            let missing =
                |name| format!("--kernels: expected some of {}, found {name}", available.join(","));
            names.split(',').map(|name| find(name).with_context(|| missing(name))).collect()
        }
    }
}

/// Measures one kernel in a child process and returns its lines of the csv.
fn run_child(kernel: &str) -> Result<String> {
    let mut child = Command::new(std::env::current_exe()?);
    child.args(std::env::args().skip(1)).arg("--child").env(KERNEL, kernel).stdout(Stdio::piped());
    let child = child.spawn()?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "{kernel}: {}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

fn measure_all(options: &Options) -> Result<()> {
    let kernel = std::env::var(KERNEL).with_context(|| format!("--child needs {KERNEL}"))?;
    for &dtype in &options.dtypes {
        for &(shape, h, i) in &options.shapes {
            let weights = [
                random(&[i, h], dtype, 1)?,
                random(&[i, h], dtype, 2)?,
                random(&[h, i], dtype, 3)?,
            ];
            let [gate, up, down] = weights.clone();
            let ffn = SwiGluFfn::from_tensors(gate, up, down)?;
            ensure!(
                dtype != DType::BF16 || kernel == ffn.kernel(),
                "expected the kernel {kernel}, found {}",
                ffn.kernel()
            );
            let candle = options.candle.then(|| weights.map(|w| Linear::new(w, None)));
            for &rows in &options.rows {
                let flops = 6.0 * (rows * h * i) as f64;
                let case = Case {
                    kernel: &kernel,
                    shape,
                    rows,
                    dtype,
                    ffn: &ffn,
                    candle: candle.as_ref(),
                    flops,
                };
                println!("{}", case.measure(&random(&[rows, h], dtype, 4)?, options.seconds)?);
            }
        }
    }
    Ok(())
}

struct Case<'a> {
    /// The name in [`KERNEL`]. In f32 and f16 `amx` and `avx512bf16` run the kernels of `avx512`,
    /// but the csv still says `amx` or `avx512bf16`.
    kernel: &'a str,
    shape: &'a str,
    rows: usize,
    dtype: DType,
    ffn: &'a SwiGluFfn,
    candle: Option<&'a [Linear; 3]>,
    flops: f64,
}

impl Case<'_> {
    /// Returns one line of the csv.
    fn measure(&self, x: &Tensor, seconds: f64) -> Result<String> {
        if let Some(candle) = self.candle {
            check(&self.ffn.forward(x)?, &candle_mlp(candle, x)?)?;
        }
        let burst = harness::peak_of(self.kernel, self.dtype);
        let (mut ours, mut reads, mut theirs, mut peak) =
            (vec![], [vec![], vec![]], vec![], f64::NAN);
        let time = |samples: &mut Vec<f64>, f: &mut dyn FnMut()| {
            let start = Instant::now();
            f();
            samples.push(start.elapsed().as_secs_f64());
        };
        let forward = || drop(black_box(self.ffn.forward(black_box(x))));
        let bytes = self.ffn.packed_bytes();
        let floor = |streams| harness::read_all(self.kernel, &bytes, streams);
        ensure!(floor(1) == floor(4), "the sums of the two orders of reading differ");
        // Short calls are timed in groups, so that the clock's resolution does not matter.
        let start = Instant::now();
        forward();
        let first = start.elapsed().as_secs_f64();
        let group = (2e-4 / first).ceil().clamp(1.0, 1000.0) as usize;
        let enough = if first > 2.0 { 2 } else { 5 };
        let (start, mut last_burst) = (Instant::now(), None::<Instant>);
        while start.elapsed() < Duration::from_secs_f64(seconds) || ours.len() < enough {
            time(&mut ours, &mut || (0..group).for_each(|_| forward()));
            for (read, streams) in reads.iter_mut().zip([1, 4]) {
                let mut read_all = || (0..group).for_each(|_| _ = black_box(floor(streams)));
                time(read, &mut read_all);
            }
            if let Some(candle) =
                self.candle.filter(|_| theirs.len() < 3 || theirs.iter().sum::<f64>() < seconds)
            {
                time(&mut theirs, &mut || drop(black_box(candle_mlp(candle, black_box(x)))));
            }
            if let Some(burst) = burst
                .filter(|_| last_burst.is_none_or(|at| at.elapsed() > Duration::from_millis(200)))
            {
                peak = f64::max(peak, burst());
                last_burst = Some(Instant::now());
            }
        }
        let [in_order, in_four] = reads;
        let read = if harness::median(in_four.clone()) < harness::median(in_order.clone()) {
            in_four
        } else {
            in_order
        };
        let share = harness::median(ours.iter().zip(&read).map(|(t, r)| r / t).collect());
        let least = ours.iter().copied().fold(f64::INFINITY, f64::min) / group as f64;
        let samples = ours.len();
        let [ours, read] = [ours, read].map(|samples| harness::median(samples) / group as f64);
        let theirs = if theirs.is_empty() { f64::NAN } else { harness::median(theirs) };
        let of_peak = self.flops / ours / peak;
        let of_floor = share.max(of_peak); // the larger floor gives the larger share
        let (kernel, dtype, shape, rows) =
            (self.kernel, self.dtype.as_str(), self.shape, self.rows);
        let (ms, least, read_ms, candle_ms) = (ours * 1e3, least * 1e3, read * 1e3, theirs * 1e3);
        let (gflops, peak, speedup) = (self.flops / ours / 1e9, peak / 1e9, theirs / ours);
        eprintln!(
            "{kernel:>10} {dtype:>5} {shape:>6} {rows:>5} {ms:>9.4} {read_ms:>9.4} {share:>7.3} {gflops:>8.1} {of_peak:>7.3} {of_floor:>7.3} {candle_ms:>10.3} {speedup:>8.1}"
        );
        let mut line = format!(
            "{kernel},{dtype},{shape},{rows},{samples},{ms:.5},{least:.5},{read_ms:.5},{share:.4},{gflops:.1},"
        );
        let _ = write!(line, "{peak:.1},{of_peak:.4},{of_floor:.4},{candle_ms:.4},{speedup:.2}");
        Ok(line)
    }
}

/// candle's own block, as in the LLaMA of candle-transformers.
fn candle_mlp([gate, up, down]: &[Linear; 3], x: &Tensor) -> candle_core::Result<Tensor> {
    down.forward(&(candle_nn::ops::silu(&gate.forward(x)?)? * up.forward(x)?)?)
}

/// Random numbers that keep activations near 1 in size, reproducible from the seed.
fn random(dims: &[usize], dtype: DType, seed: u64) -> Result<Tensor> {
    let k = dims[dims.len() - 1];
    let scale =
        if seed == 4 { 1.0 } else { (k as f32).powf(-0.5) } * 3f32.sqrt() / (1u32 << 23) as f32;
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let numbers = (0..dims.iter().product::<usize>()).map(|_| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 40) as i32 - (1 << 23)) as f32 * scale
    });
    let tensor = match dtype {
        DType::BF16 => Tensor::from_vec(
            numbers.map(half::bf16::from_f32).collect::<Vec<_>>(),
            dims,
            &Device::Cpu,
        ),
        DType::F16 => Tensor::from_vec(
            numbers.map(half::f16::from_f32).collect::<Vec<_>>(),
            dims,
            &Device::Cpu,
        ),
        _ => Tensor::from_vec(numbers.collect::<Vec<f32>>(), dims, &Device::Cpu),
    };
    Ok(tensor?)
}

/// Checks that both results agree up to candle's roundings of gate, up and silu to the dtype.
fn check(ours: &Tensor, candle: &Tensor) -> Result<()> {
    let wide = |t: &Tensor| t.to_dtype(DType::F32)?.flatten_all();
    let (ours, candle) = (wide(ours)?, wide(candle)?);
    let norm = |t: &Tensor| t.sqr()?.mean_all()?.to_scalar::<f32>();
    let (error, size) = (norm(&(&ours - &candle)?)?.sqrt(), norm(&candle)?.sqrt());
    ensure!(error <= 0.01 * size, "the rms of the difference is {error}, of the results {size}");
    Ok(())
}
