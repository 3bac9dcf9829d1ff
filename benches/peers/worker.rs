//! This crate's side of `benches/peers/run.py`: builds and times the block on request. Each line on
//! standard input is answered by one line.
//!
//! | line | action | answer |
//! |---|---|---|
//! | `facts` | none | the facts of the machine, several lines, then an empty one |
//! | `make DTYPE H I M` | writes gate_proj, up_proj, down_proj and x (M,H) to `case.safetensors` | `ok` |
//! | `load M` | builds the block, writes y of the first M rows of x to `y-ours.f64` | `ok KERNEL` |
//! | `load M train` | the same with variables, and dx under dy = 1 instead of y | `ok KERNEL` |
//! | `time SECONDS` | calls the block, with `train` and its backward pass, for that time | see below |
//! | `quit` | ends the process | none |
//!
//! The answer to `time` is `ok MEDIAN MIN CALLS`, in seconds per call. Files are in the working
//! directory. A failure is answered by `error REASON`.

#[path = "../harness/mod.rs"]
mod harness;

use std::collections::HashMap;
use std::hint::black_box;
use std::io::BufRead;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor, Var, safetensors};
use candle_nn::Module;
use candle_swiglu::{SwiGluFfn, backward};

const CASE: &str = "case.safetensors";
const RESULT: &str = "y-ours.f64";

fn main() -> Result<()> {
    if std::env::args().nth(1).as_deref() != Some("serve") {
        println!(
            "a worker of benches/peers/run.py, which measures other systems beside this crate: see benches/peers/README.md"
        );
        return Ok(());
    }
    let mut loaded = None;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        if line == "quit" {
            break;
        }
        match answer(&line, &mut loaded) {
            Ok(answer) => println!("{answer}"),
            Err(error) => println!("error {}", format!("{error:#}").replace('\n', " ")),
        }
    }
    Ok(())
}

/// A block that is called.
struct Case {
    ffn: SwiGluFfn,
    /// gate_proj, up_proj and down_proj, if candle's operations are to run instead of the block.
    candle: Option<[Tensor; 3]>,
    /// (M,H)
    x: Tensor,
    trains: bool,
}

impl Case {
    /// y, or dx of a forward and a backward pass.
    fn call(&self) -> candle_core::Result<Tensor> {
        let x = black_box(&self.x);
        let y = match &self.candle {
            None => self.ffn.forward(x)?,
            Some([gate, up, down]) => {
                let h = (x.matmul(&gate.t()?)?.silu()? * x.matmul(&up.t()?)?)?;
                h.matmul(&down.t()?)?
            }
        };
        if !self.trains {
            return Ok(y);
        }
        let mut store = if self.candle.is_some() { y.backward()? } else { backward(&y)? };
        store.remove(&self.x).ok_or_else(|| candle_core::Error::Msg("no dx".into()))
    }
}

type Loaded = Option<Case>;

fn answer(line: &str, loaded: &mut Loaded) -> Result<String> {
    let words: Vec<&str> = line.split(' ').collect();
    Ok(match words[..] {
        ["facts"] => harness::machine_facts(),
        ["make", dtype, h, i, m] => {
            make(dtype.parse()?, h.parse()?, i.parse()?, m.parse()?)?;
            "ok".into()
        }
        ["load", m] | ["load", m, "train"] => {
            let case = loaded.insert(load(m.parse()?, words.len() == 3)?);
            write(&case.call()?)?;
            format!("ok {}", case.ffn.kernel())
        }
        ["time", seconds] => {
            let case = loaded.as_ref().context("`time` before `load`")?;
            let (median, min, calls) = time(&|| drop(black_box(case.call())), seconds.parse()?);
            format!("ok {median:e} {min:e} {calls}")
        }
        _ => bail!("unknown line `{line}`"),
    })
}

fn make(dtype: DType, h: usize, i: usize, m: usize) -> Result<()> {
    let weight =
        |dims: [usize; 2], seed| random(dims, (dims[1] as f32).powf(-0.5), seed)?.to_dtype(dtype);
    let tensors = HashMap::from([
        ("gate_proj", weight([i, h], 1)?),
        ("up_proj", weight([i, h], 2)?),
        ("down_proj", weight([h, i], 3)?),
        ("x", random([m, h], 1.0, 4)?.to_dtype(dtype)?),
    ]);
    Ok(safetensors::save(&tensors, CASE)?)
}

/// Random numbers with mean 0 and the standard deviation `deviation`, reproducible from the seed.
fn random(dims: [usize; 2], deviation: f32, seed: u64) -> candle_core::Result<Tensor> {
    let scale = deviation * 3f32.sqrt() / (1u32 << 23) as f32;
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let numbers = (0..dims[0] * dims[1]).map(|_| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 40) as i32 - (1 << 23)) as f32 * scale
    });
    Tensor::from_vec(numbers.collect::<Vec<f32>>(), &dims, &Device::Cpu)
}

fn load(m: usize, trains: bool) -> Result<Case> {
    let mut tensors = safetensors::load(CASE, &Device::Cpu)?;
    let mut take = |name: &str| {
        let tensor = tensors.remove(name).with_context(|| format!("no `{name}` in {CASE}"))?;
        let tensor = if name == "x" { tensor.narrow(0, 0, m)?.copy()? } else { tensor };
        Ok::<_, anyhow::Error>(match trains {
            true => Var::from_tensor(&tensor)?.into_inner(),
            false => tensor,
        })
    };
    let (gate, up) = (take("gate_proj")?, take("up_proj")?);
    let (down, x) = (take("down_proj")?, take("x")?);
    let ffn = SwiGluFfn::from_tensors(gate.clone(), up.clone(), down.clone())?;
    let candle = (ffn.kernel() == "plain").then_some([gate, up, down]);
    Ok(Case { ffn, candle, x, trains })
}

fn write(y: &Tensor) -> Result<()> {
    let numbers = y.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    Ok(std::fs::write(RESULT, numbers.into_iter().flat_map(f64::to_le_bytes).collect::<Vec<u8>>())?)
}

/// Returns the median and minimum seconds per call and the number of calls, after two calls that do
/// not count. Short calls are timed in groups of 0.2 ms, so that the clock's resolution does not
/// matter.
fn time(call: &dyn Fn(), seconds: f64) -> (f64, f64, usize) {
    let sample = |calls: usize| {
        let start = Instant::now();
        (0..calls).for_each(|_| call());
        start.elapsed().as_secs_f64() / calls as f64
    };
    sample(1);
    let group = (2e-4 / sample(1)).ceil().clamp(1.0, 1000.0) as usize;
    let (start, mut samples) = (Instant::now(), vec![]);
    while samples.len() < 3 || start.elapsed().as_secs_f64() < seconds {
        samples.push(sample(group));
    }
    let (min, calls) =
        (samples.iter().copied().fold(f64::INFINITY, f64::min), samples.len() * group);
    (harness::median(samples), min, calls)
}
