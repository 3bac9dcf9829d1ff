//! Random sizes, layouts, dtypes and formulas, checked against the f64 oracle and its bounds. A
//! failure prints the smallest failing case.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Module;
use candle_swiglu::{FfnConfig, FusedOrder, GateUp, GluActivation, Linear, SwiGluFfn, Weights};
use common::{Block, FLOATS, Numbers, check_within, pack, unit_roundoff, values, weights};
use proptest::prelude::*;
use proptest::test_runner::{RngSeed, TestCaseResult};

/// The layout of a matrix in its storage.
#[derive(Clone, Copy, Debug)]
enum Lie {
    Contiguous,
    Transposed,
    /// Columns of wider rows, beginning after the first.
    Narrowed,
    /// Every second row.
    Skipping,
    /// Not contiguous in its leading dimensions: two batches swapped.
    Swapped,
}

fn lie() -> impl Strategy<Value = Lie> {
    use Lie::*;
    prop_oneof![Just(Contiguous), Just(Transposed), Just(Narrowed), Just(Skipping), Just(Swapped)]
}

/// The same values in another layout.
fn laid(matrix: &Tensor, lie: Lie) -> Result<Tensor> {
    let (rows, columns) = matrix.dims2()?;
    let zeros = |dims: (usize, usize)| Tensor::zeros(dims, matrix.dtype(), &Device::Cpu);
    Ok(match lie {
        Lie::Contiguous => matrix.copy()?,
        Lie::Transposed => matrix.t()?.contiguous()?.t()?,
        Lie::Narrowed => Tensor::cat(&[&zeros((rows, 3))?, matrix, &zeros((rows, 2))?], 1)?
            .narrow(1, 3, columns)?,
        Lie::Skipping => {
            let pairs = Tensor::stack(&[matrix, &zeros((rows, columns))?], 1)?; // (rows, 2, columns)
            pairs.narrow(1, 0, 1)?.squeeze(1)?
        }
        Lie::Swapped => {
            let halves = Tensor::stack(&[matrix, matrix], 1)?.transpose(0, 1)?.contiguous()?; // (2, rows, columns)
            halves.get(1)?
        }
    })
}

fn activation() -> impl Strategy<Value = GluActivation> {
    use GluActivation::*;
    prop_oneof![
        4 => Just(Silu),
        1 => (0.25f32..2.0).prop_map(|beta| Swish { beta }),
        6 => proptest::sample::select(GluActivation::ALL),
    ]
}

prop_compose! {
    fn config()(
        sizes in (1usize..90, 1usize..110),
        activation in activation(),
        bias: bool,
        limit in proptest::option::weighted(0.2, 0.5f32..3.0),
        modifiers in proptest::option::weighted(0.3, (0.25f32..2.0, -1f32..1.0, 0.25f32..2.0)),
    ) -> FfnConfig {
        let mut cfg = FfnConfig::new(sizes.0, sizes.1);
        (cfg.activation, cfg.limit) = (activation, limit);
        cfg = cfg.with_bias(bias);
        if let Some((gate, offset, down)) = modifiers {
            (cfg.gate_multiplier, cfg.up_offset, cfg.down_multiplier) = (gate, offset, down);
        }
        cfg
    }
}

#[derive(Clone, Debug)]
struct Input {
    dtype: DType,
    /// The two leading dimensions of x.
    rows: (usize, usize),
    x: Lie,
    weights: Lie,
    order: Option<FusedOrder>,
    seed: u64,
}

prop_compose! {
    fn input()(
        dtype in prop::sample::select(FLOATS.to_vec()),
        rows in prop_oneof![3 => (1usize..4, 1usize..6), 1 => (1usize..3, 10usize..40)],
        x in lie(),
        weights in lie(),
        order in proptest::option::of(prop_oneof![
            Just(FusedOrder::GateFirst), Just(FusedOrder::UpFirst), Just(FusedOrder::Interleaved)
        ]),
        seed: u64,
    ) -> Input {
        Input { dtype, rows, x, weights, order, seed }
    }
}

fn passes(result: Result<()>) -> TestCaseResult {
    result.map_err(|error| TestCaseError::fail(format!("{error:#}")))
}

/// Builds a block from the weights in the layout and order of `input`.
fn build(
    cfg: &FfnConfig,
    all: &std::collections::HashMap<String, Tensor>,
    input: &Input,
) -> Result<SwiGluFfn> {
    let weight = |name: &str| laid(&all[&format!("{name}.weight")], input.weights);
    let bias = |name: &str| all.get(&format!("{name}.bias")).cloned();
    let gate_up = match input.order {
        None => GateUp::separate(
            weight("gate_proj")?,
            weight("up_proj")?,
            bias("gate_proj"),
            bias("up_proj"),
        ),
        Some(order) => {
            let both = pack(&all["gate_proj.weight"], &all["up_proj.weight"], order)?;
            let bias = bias("gate_proj")
                .zip(bias("up_proj"))
                .map(|(gate, up)| pack(&gate, &up, order))
                .transpose()?;
            GateUp::fused(laid(&both, input.weights)?, bias, order)
        }
    };
    Ok(SwiGluFfn::from_weights(
        cfg,
        Weights::new(gate_up, weight("down_proj")?, bias("down_proj")),
    )?)
}

proptest! {
    // The cases are the same in every run, unless PROPTEST_RNG_SEED is set.
    #![proptest_config(ProptestConfig {
        cases: std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(300),
        failure_persistence: None,
        rng_seed: match ProptestConfig::default().rng_seed { RngSeed::Random => RngSeed::Fixed(1), fixed => fixed },
        ..ProptestConfig::default()
    })]

    #[test]
    fn forward_and_dx_follow_the_oracle(cfg in config(), input in input()) {
        passes((|| {
            let mut numbers = Numbers::new(input.seed);
            let (u, h) = (unit_roundoff(input.dtype), cfg.hidden_size);
            let all = weights(&cfg, &mut numbers, input.dtype)?;
            let ffn = build(&cfg, &all, &input)?;
            let (a, b) = input.rows;
            let x = laid(&numbers.tensor(&[a * b, h], 1.5, input.dtype)?, input.x)?;
            let oracle = Block::new(&cfg, &all)?;

            let near = oracle.forward(&x.contiguous()?, u)?;
            let y = ffn.forward(&x.reshape((a, b, h))?)?;
            anyhow::ensure!(y.dims() == [a, b, h] && y.dtype() == input.dtype);
            check_within("y", &y, &near.values(), &near.errors())?;
            let flat = ffn.forward(&x)?;
            // candle's matmul may sum in another order if x has another layout.
            anyhow::ensure!(ffn.kernel().starts_with("plain") || values(&flat)? == values(&y)?, "the layout changes y");

            let (var, dy) = (Var::from_tensor(&x)?, numbers.tensor(&[a * b, h], 1.0, input.dtype)?);
            let gradients = (ffn.forward(var.as_tensor())? * &dy)?.sum_all()?.backward()?;
            let near = &oracle.gradients(&x.contiguous()?, &dy, u)?["dx"];
            let dx = gradients.get(&var).ok_or_else(|| anyhow::anyhow!("no gradient of x"))?;
            // candle adds the two parts of the gradient in the dtype, and flushes denormals of bf16
            // to 0.
            let bounds: Vec<f64> = near.errors().iter().map(|e| 2.0 * e + 1e-30).collect();
            check_within("dx", dx, &near.values(), &bounds)?;
            Ok(())
        })())?;
    }

    #[test]
    fn linear_follows_the_oracle(sizes in (1usize..150, 1usize..150), bias: bool, input in input()) {
        passes((|| {
            let mut numbers = Numbers::new(input.seed);
            let (u, (k, n), m) = (unit_roundoff(input.dtype), sizes, input.rows.0 * input.rows.1);
            let weight = numbers.tensor(&[n, k], 0.5, input.dtype)?;
            let bias = bias.then(|| numbers.tensor(&[n], 1.0, input.dtype)).transpose()?;
            let x = laid(&numbers.tensor(&[m, k], 1.0, input.dtype)?, input.x)?;
            let linear = Linear::new(laid(&weight, input.weights)?, bias.clone())?;
            anyhow::ensure!(values(&linear.weight()?)? == values(&weight)?, "unpacking changes the weight");
            let wide = |t: &Tensor| t.to_dtype(DType::F64);
            let product = |x: &Tensor, w: &Tensor, b: Option<&Tensor>| -> Result<Vec<f64>> {
                let y = wide(x)?.matmul(&wide(w)?.t()?)?;
                values(&b.map_or(Ok(y.clone()), |b| y.broadcast_add(&wide(b)?))?)
            };
            let exact = product(&x, &weight, bias.as_ref())?;
            let abs = bias.as_ref().map(Tensor::abs).transpose()?;
            let size = product(&x.abs()?, &weight.abs()?, abs.as_ref())?;
            let bounds: Vec<f64> = size.iter().map(|size| (k + 3) as f64 * u * size).collect();
            check_within("y", &linear.forward(&x)?, &exact, &bounds)?;
            Ok(())
        })())?;
    }
}
