//! Compares the block and a projection of any shape, layout, dtype and formula with loops in f64.
//!
//! 1. The input chooses H and I up to 70, M up to 40, the layouts of x and of every weight, which
//!    weights are variables, the formula, and the scale of the numbers. The numbers follow from a
//!    seed.
//! 2. The definition is computed in f64. Each number has a bound of its rounding error ([`Near`]):
//!    - a sum of n products, in any order with unit roundoff u, is off by at most (n + 3)·u·Σ|a||b|
//!      plus the propagated errors of a and b;
//!    - act has a slope of at most 1.13, and its own error of the documented units of u;
//!    - the result of a step is rounded to the dtype if the implementation writes it: h and y for
//!      packed weights, every step in the plain form.
//! 3. Elements whose terms leave the range of the dtype or of f32 may have any value; all others
//!    must be within their bounds.
//!
//! `CANDLE_SWIGLU_KERNEL` selects the kernel; by default the best one of the machine runs.
#![no_main]

use arbitrary::Arbitrary;
use candle_core::{DType, Device, IndexOp, Module, Result, Tensor, Var};
use candle_swiglu::{
    Biases, FfnConfig, FusedOrder, GateUp, GluActivation, Linear, SwiGluFfn, Weights,
};
use libfuzzer_sys::fuzz_target;

// ---------------------------------------------------------------- 1. what an input describes

#[derive(Arbitrary, Debug)]
struct Case {
    seed: u64,
    h: u8,
    i: u8,
    m: u8,
    dtype: Float,
    formula: Formula,
    x: Operand,
    rank: Rank,
    gate: Operand,
    up: Operand,
    down: Operand,
    /// gate and up in one tensor, which has the layout of gate
    fused: Option<Order>,
    /// A value of x that is not finite: row, column, which value.
    odd: Option<(u8, u8, u8)>,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Float {
    F32,
    BF16,
    F16,
    F64,
}

#[derive(Arbitrary, Debug)]
struct Formula {
    activation: Activation,
    bias: bool,
    /// In units of 1/256, like the next three.
    gate_multiplier: Option<i16>,
    down_multiplier: Option<i16>,
    limit: Option<u16>,
    up_offset: Option<i16>,
}

#[derive(Arbitrary, Debug)]
enum Activation {
    Silu,
    Swish(i16),
    Sigmoid,
    Relu,
    Gelu,
    GeluTanh,
    Identity,
    Relu2,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Operand {
    layout: View,
    tracked: bool,
    /// Scale of the numbers, as an exponent of 2: up to ±100 in units of 1/32, beyond in whole
    /// units.
    exponent: i8,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum View {
    Contiguous,
    Transposed,
    Rows(u8),
    Columns(u8),
    ColumnsOfTransposed(u8),
    EverySecondRow,
    EverySecondColumn,
    BroadcastRow,
    BroadcastColumn,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Rank {
    Vector,
    Matrix,
    Batch,
    BatchTransposed,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Order {
    GateFirst,
    UpFirst,
    Interleaved,
}

/// SplitMix64, uniform in [-1, 1).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f64 / f64::from(1 << 23) - 1.0
    }

    fn tensor(&mut self, dims: &[usize], operand: Operand, dtype: DType) -> Result<Tensor> {
        let exponent = f64::from(operand.exponent);
        let scale =
            if exponent.abs() <= 100.0 { (exponent / 32.0).exp2() } else { exponent.exp2() };
        let data: Vec<f64> = (0..dims.iter().product()).map(|_| scale * self.next()).collect();
        let tensor = Tensor::from_vec(data, dims, &Device::Cpu)?.to_dtype(dtype)?;
        if operand.tracked { Ok(Var::from_tensor(&tensor)?.into_inner()) } else { Ok(tensor) }
    }

    /// A matrix (rows, columns) in the operand's layout.
    fn matrix(&mut self, (r, c): (usize, usize), operand: Operand, dtype: DType) -> Result<Tensor> {
        let mut t = |dims: &[usize]| self.tensor(dims, operand, dtype);
        match operand.layout {
            View::Contiguous => t(&[r, c]),
            View::Transposed => t(&[c, r])?.t(),
            View::Rows(skip) => t(&[r + usize::from(skip), c])?.narrow(0, skip.into(), r),
            View::Columns(skip) => t(&[r, c + usize::from(skip)])?.narrow(1, skip.into(), c),
            View::ColumnsOfTransposed(skip) => {
                t(&[c + usize::from(skip), r + 1])?.t()?.narrow(1, skip.into(), c)?.narrow(0, 1, r)
            }
            View::EverySecondRow => t(&[r, 2, c])?.i((.., 1)),
            View::EverySecondColumn => t(&[r, c, 2])?.i((.., .., 1)),
            View::BroadcastRow => t(&[1, c])?.broadcast_as((r, c)),
            View::BroadcastColumn => t(&[r, 1])?.broadcast_as((r, c)),
        }
    }
}

fn factor(in_256ths: i16) -> f32 {
    f32::from(in_256ths) / 256.0
}

impl Case {
    fn dtype(&self) -> DType {
        match self.dtype {
            Float::F32 => DType::F32,
            Float::BF16 => DType::BF16,
            Float::F16 => DType::F16,
            Float::F64 => DType::F64,
        }
    }

    fn config(&self) -> FfnConfig {
        let formula = &self.formula;
        let activation = match formula.activation {
            Activation::Silu => GluActivation::Silu,
            Activation::Swish(beta) => GluActivation::Swish { beta: factor(beta) },
            Activation::Sigmoid => GluActivation::Sigmoid,
            Activation::Relu => GluActivation::Relu,
            Activation::Gelu => GluActivation::Gelu,
            Activation::GeluTanh => GluActivation::GeluTanh,
            Activation::Identity => GluActivation::Identity,
            Activation::Relu2 => GluActivation::Relu2,
        };
        let cfg = FfnConfig::new(usize::from(self.h % 70) + 1, usize::from(self.i % 70) + 1)
            .with_activation(activation)
            .with_bias(formula.bias)
            .with_multipliers(
                formula.gate_multiplier.map_or(1.0, factor),
                formula.down_multiplier.map_or(1.0, factor),
            )
            .with_up_offset(formula.up_offset.map_or(0.0, factor));
        formula.limit.map_or(cfg.clone(), |limit| cfg.with_limit((f32::from(limit) + 1.0) / 256.0))
    }

    /// x (M,H), and the same tensor in the requested rank if its shape allows it
    fn x(&self, numbers: &mut Numbers, h: usize) -> Result<(Tensor, Tensor)> {
        let (m, dtype) = (usize::from(self.m % 41), self.dtype());
        if m == 0 {
            let x = Tensor::zeros((0, h), dtype, &Device::Cpu)?;
            return Ok((x.clone(), x.reshape((2, 0, h))?));
        }
        let mut x = numbers.matrix((m, h), self.x, dtype)?;
        if let Some((row, column, which)) = self.odd {
            let value = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -0.0][usize::from(which) % 4];
            let mut rows = x.to_dtype(DType::F64)?.to_vec2::<f64>()?;
            rows[usize::from(row) % m][usize::from(column) % h] = value;
            x = Tensor::new(rows, &Device::Cpu)?.to_dtype(dtype)?;
        }
        let shaped = match self.rank {
            Rank::Vector if m == 1 => x.squeeze(0)?,
            Rank::Batch if m % 2 == 0 => x.reshape((2, m / 2, h))?,
            Rank::BatchTransposed if m % 3 == 0 => {
                let batch = x.reshape((m / 3, 3, h))?.transpose(0, 1)?; // changes the order of the rows
                x = batch.contiguous()?.reshape((m, h))?;
                batch
            }
            _ => x.clone(),
        };
        Ok((x, shaped))
    }
}

// ---------------------------------------------------------------- 2. the definition, with bounds

/// The exact value of a computed number, and the bound of its rounding error, which is infinite if
/// the number may leave the range.
#[derive(Clone, Copy)]
struct Near(f64, f64);

/// Unit roundoff, half of the smallest denormal (or the bound below which values are flushed to 0),
/// and the largest number of a dtype.
#[derive(Clone, Copy)]
struct Precision {
    u: f64,
    smallest: f64,
    largest: f64,
}

/// `vdpbf16ps` flushes denormals to 0.
const FLUSHED: f64 = 1.2e-38;

impl Precision {
    fn of(dtype: DType) -> Self {
        let (bits, smallest, largest) = match dtype {
            DType::BF16 => (8, FLUSHED, 3.38e38),
            DType::F16 => (11, 2f64.powi(-25), 65504.0),
            DType::F32 => (24, 2f64.powi(-150), 3.4e38),
            _ => (52, 1e-300, 1e300), // f64: doubled, because the definition has the same error
        };
        Self { u: 2f64.powi(-bits), smallest, largest }
    }

    /// The precision of sums of products in `dtype`: f32, except for candle's f16 products, of
    /// which some are summed in f16.
    fn of_sums(dtype: DType, plain: bool) -> Self {
        match dtype {
            DType::F64 => Self::of(dtype),
            DType::F16 if plain => Self::of(dtype),
            DType::BF16 => Self { smallest: FLUSHED, ..Self::of(DType::F32) },
            _ => Self::of(DType::F32),
        }
    }

    fn round(self, Near(value, error): Near) -> Near {
        let size = value.abs() + error;
        if size < 0.99 * self.largest {
            Near(value, error + self.u * size + self.smallest)
        } else {
            Near(value, f64::INFINITY)
        }
    }
}

/// Σ a·b + bias
fn dot<'a>(terms: impl Iterator<Item = (Near, &'a f64)>, bias: f64, p: Precision) -> Near {
    let (mut sum, mut size, mut carried, mut roundings, mut factors) =
        (bias, bias.abs(), 0.0, 3.0, 1.0);
    for (Near(a, error), b) in terms {
        sum += a * b;
        size += (a.abs() + error) * b.abs();
        carried += error * b.abs();
        roundings += 1.0;
        factors += a.abs() + b.abs(); // the other factor multiplies the error of a flushed denormal
    }
    let error = carried + roundings * p.u * size + (roundings + factors) * p.smallest;
    Near(sum, if size < 0.99 * p.largest { error } else { f64::INFINITY })
}

/// act(g), and its documented error in units of u
fn act(activation: GluActivation, g: f64) -> (f64, f64) {
    let times_sigmoid = |z: f64| g / (1.0 + (-z).exp());
    match activation {
        GluActivation::Silu => (times_sigmoid(g), 8.0),
        GluActivation::Swish { beta } => {
            let z = f64::from(beta) * g;
            (times_sigmoid(z), 8.0 + 2.0 * z.abs().min(750.0))
        }
        GluActivation::Sigmoid => (1.0 / (1.0 + (-g).exp()), 8.0),
        GluActivation::Relu => (g.max(0.0), 1.0),
        GluActivation::Gelu => (0.5 * g * libm::erfc(-g * std::f64::consts::FRAC_1_SQRT_2), 14.0),
        GluActivation::GeluTanh => {
            let units = 8.0 + 4.0 * (1.6 * g + 0.0714 * g * g * g).abs().min(750.0);
            (times_sigmoid((8.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g * g * g)), units)
        }
        GluActivation::Identity => (g, 1.0),
        GluActivation::Relu2 => (g.max(0.0).powi(2), 2.0),
        other => unimplemented!("no bound is known for {other}"),
    }
}

/// act(min(m·gate, limit)) · (clamp(up, ±limit) + c)
fn glu(cfg: &FfnConfig, gate: Near, up: Near, p: Precision) -> Near {
    const STEEPEST: f64 = 1.13; // gelu'(√2) = 1.129; swish' stays below 1.1 for every β
    let (m, limit) = (f64::from(cfg.gate_multiplier), cfg.limit.map_or(f64::INFINITY, f64::from));
    let g = p.round(Near(m * gate.0, m.abs() * gate.1));
    let g = Near(g.0.min(limit), g.1);
    let (value, units) = act(cfg.activation, g.0);
    let steepest =
        if cfg.activation == GluActivation::Relu2 { 2.0 * (g.0.abs() + g.1) } else { STEEPEST };
    let a_error = steepest * g.1 + units * p.u * value.abs() + (2.0 + g.0.abs()) * 2.0 * p.smallest;
    let u = p.round(Near(up.0.clamp(-limit, limit) + f64::from(cfg.up_offset), up.1));
    let error = a_error * (u.0.abs() + u.1) + value.abs() * u.1 + p.u * (value * u.0).abs();
    let size = (value.abs() + a_error) * (u.0.abs() + u.1);
    Near(value * u.0, if size < 0.99 * p.largest { error + p.smallest } else { f64::INFINITY })
}

/// The precision to which each kind of step is rounded.
#[derive(Clone, Copy)]
struct Rounding {
    sums: Precision,
    /// The arithmetic between the products.
    wide: Precision,
    dtype: Precision,
    /// Whether every step is written in the dtype.
    plain: bool,
}

impl Rounding {
    /// Rounds the result of a step that only the plain form writes.
    fn step(self, value: Near) -> Near {
        if self.plain { self.dtype.round(value) } else { value }
    }

    /// One row times W (columns, k)ᵀ, plus the bias
    fn project(self, row: &[Near], weight: &Matrix) -> Vec<Near> {
        let column = |(n, w): (usize, &Vec<f64>)| {
            let bias = weight.bias.as_ref().map_or(0.0, |bias| bias[n]);
            if !self.plain {
                return dot(row.iter().copied().zip(w), bias, self.sums);
            }
            let Near(y, error) = self.step(dot(row.iter().copied().zip(w), 0.0, self.sums));
            if weight.bias.is_some() { self.step(Near(y + bias, error)) } else { Near(y, error) }
        };
        weight.rows.iter().enumerate().map(column).collect()
    }
}

/// A weight and its bias, exactly.
struct Matrix {
    rows: Vec<Vec<f64>>,
    bias: Option<Vec<f64>>,
}

impl Matrix {
    fn new(weight: &Tensor, bias: Option<&Tensor>) -> Result<Self> {
        let bias = bias.map(|bias| bias.to_dtype(DType::F64)?.to_vec1()).transpose()?;
        Ok(Self { rows: weight.to_dtype(DType::F64)?.to_vec2()?, bias })
    }
}

/// x (M,H) -> y (M,H)
fn block(
    cfg: &FfnConfig,
    x: &[Vec<f64>],
    [gate, up, down]: [&Matrix; 3],
    rounding: Rounding,
) -> Vec<Near> {
    let d = f64::from(cfg.down_multiplier);
    let row = |x: &Vec<f64>| {
        let x: Vec<Near> = x.iter().map(|&x| Near(x, 0.0)).collect();
        let pairs = rounding.project(&x, gate).into_iter().zip(rounding.project(&x, up));
        let h: Vec<Near> =
            pairs.map(|(g, u)| rounding.dtype.round(glu(cfg, g, u, rounding.wide))).collect();
        let scaled = |Near(y, error)| {
            let y = rounding.step(rounding.wide.round(Near(d * y, d.abs() * error)));
            rounding.dtype.round(y)
        };
        rounding.project(&h, down).into_iter().map(scaled).collect::<Vec<_>>()
    };
    x.iter().flat_map(row).collect()
}

// ---------------------------------------------------------------- 3. the comparison

fn check(what: &str, y: &Tensor, expected: &[Near]) -> Result<()> {
    let y = y.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    assert_eq!(y.len(), expected.len(), "{what}");
    for (at, (&y, &Near(value, error))) in y.iter().zip(expected).enumerate() {
        let anything = !error.is_finite() || !value.is_finite();
        assert!(
            anything || (y - value).abs() <= error,
            "{what}: element {at}: {y:e}, expected {value:e} ± {error:e}"
        );
    }
    Ok(())
}

/// The bits after widening to f64, with one pattern for all NaNs.
fn bits(tensor: &Tensor) -> Result<Vec<u64>> {
    let values = tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    Ok(values
        .into_iter()
        .map(|value| if value.is_nan() { f64::NAN.to_bits() } else { value.to_bits() })
        .collect())
}

fn run(case: &Case) -> Result<()> {
    let (cfg, dtype, mut numbers) = (case.config(), case.dtype(), Numbers(case.seed));
    let (h, i) = (cfg.hidden_size, cfg.intermediate_size);
    let (x, shaped) = case.x(&mut numbers, h)?;
    let mut bias = |n: usize, operand| {
        (cfg.biases == Biases::ALL).then(|| numbers.tensor(&[n], operand, dtype)).transpose()
    };
    let biases = [bias(i, case.gate)?, bias(i, case.up)?, bias(h, case.down)?];
    let down = numbers.matrix((h, i), case.down, dtype)?;

    let order = case.fused.map(|order| match order {
        Order::GateFirst => FusedOrder::GateFirst,
        Order::UpFirst => FusedOrder::UpFirst,
        Order::Interleaved => FusedOrder::Interleaved,
    });
    let (gate, up, [gate_bias, up_bias, down_bias], gate_up) = match order {
        None => {
            let (gate, up) = (
                numbers.matrix((i, h), case.gate, dtype)?,
                numbers.matrix((i, h), case.up, dtype)?,
            );
            let [gate_bias, up_bias, _] = biases.clone();
            let gate_up = GateUp::separate(gate.clone(), up.clone(), gate_bias, up_bias);
            (gate, up, biases, gate_up)
        }
        Some(order) => {
            let gate_up_proj = numbers.matrix((2 * i, h), case.gate, dtype)?;
            let bias = (cfg.biases == Biases::ALL)
                .then(|| numbers.tensor(&[2 * i], case.gate, dtype))
                .transpose()?;
            let (gate, up) = halves(&gate_up_proj, order)?;
            let halves = bias.as_ref().map(|bias| halves(bias, order)).transpose()?;
            let (gate_bias, up_bias) = halves.unzip();
            (
                gate,
                up,
                [gate_bias, up_bias, biases[2].clone()],
                GateUp::fused(gate_up_proj, bias, order),
            )
        }
    };

    let weights = Weights::new(gate_up, down.clone(), down_bias.clone());
    let ffn = SwiGluFfn::from_weights(&cfg, weights)?;
    let y = ffn.forward(&shaped)?;
    assert_eq!((y.dims(), y.dtype()), (shaped.dims(), dtype));
    let rounding = |plain| Rounding {
        sums: Precision::of_sums(dtype, plain),
        wide: Precision::of_sums(dtype, false),
        dtype: Precision::of(dtype),
        plain,
    };
    let x_rows = x.to_dtype(DType::F64)?.to_vec2::<f64>()?;
    let matrices = [
        Matrix::new(&gate, gate_bias.as_ref())?,
        Matrix::new(&up, up_bias.as_ref())?,
        Matrix::new(&down, down_bias.as_ref())?,
    ];
    let plain = ffn.kernel().starts_with("plain");
    let expected = block(&cfg, &x_rows, matrices.each_ref(), rounding(plain));
    check(&format!("block, {}", ffn.kernel()), &y, &expected)?;
    // A second call does not depend on the first.
    assert_eq!(bits(&ffn.forward(&shaped)?)?, bits(&y)?, "second call, {}", ffn.kernel());

    let linear = Linear::new(gate.clone(), gate_bias.clone())?;
    assert_eq!(bits(&linear.weight()?)?, bits(&gate)?, "unpacked weight");
    let rounding = rounding(linear.kernel() == "plain");
    let row = |x: &Vec<f64>| {
        let x: Vec<Near> = x.iter().map(|&x| Near(x, 0.0)).collect();
        rounding
            .project(&x, &matrices[0])
            .into_iter()
            .map(|y| rounding.dtype.round(y))
            .collect::<Vec<_>>()
    };
    let expected: Vec<Near> = x_rows.iter().flat_map(row).collect();
    check(&format!("linear, {}", linear.kernel()), &linear.forward(&shaped)?, &expected)
}

/// gate and up of a fused weight or bias
fn halves(fused: &Tensor, order: FusedOrder) -> Result<(Tensor, Tensor)> {
    let i = fused.dim(0)? / 2;
    let rows = |start: usize, step: usize| {
        let rows =
            Tensor::from_vec((0..i).map(|n| (start + n * step) as u32).collect(), i, &Device::Cpu)?;
        fused.contiguous()?.index_select(&rows, 0)
    };
    match order {
        FusedOrder::GateFirst => Ok((rows(0, 1)?, rows(i, 1)?)),
        FusedOrder::UpFirst => Ok((rows(i, 1)?, rows(0, 1)?)),
        FusedOrder::Interleaved => Ok((rows(0, 2)?, rows(1, 2)?)),
        other => candle_core::bail!("the fuzz target does not support the order {other:?}"),
    }
}

fuzz_target!(|case: Case| run(&case).expect("every step of a case is valid"));
