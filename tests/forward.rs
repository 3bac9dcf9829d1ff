//! The forward pass through the public API: layouts of x and of the weights, dtypes, all
//! activations and modifiers, threads.
//!
//! Where only the arrangement differs, results are compared bit by bit. If the products may be
//! summed in another order, the values are small integers and the activation is ReLU, so that every
//! sum is exact. Where the arithmetic differs, the bound is the one that `common::Block` derives.

use std::collections::HashMap;

use anyhow::{Context, Result};
use candle_core::{DType, Device, IndexOp, Module, Tensor, Var};
use candle_nn::VarBuilder;
use candle_swiglu::{
    FfnConfig, FusedOrder, GateUp, Glu, GluActivation, Linear, SwiGluFfn, Weights, glu_mul,
    reference,
};

mod common;
use common::{
    ACTIVATIONS, Block, FLOATS, Numbers, bits, check_within, composed, glu_of, integers, pack,
    rms_error, unit_roundoff, values, weights,
};

const H: usize = 33;
const I: usize = 45;

/// The block of `cfg` with the named tensors.
fn build(cfg: &FfnConfig, weights: &HashMap<String, Tensor>) -> Result<SwiGluFfn> {
    let dtype = weights["down_proj.weight"].dtype();
    Ok(SwiGluFfn::new(cfg, VarBuilder::from_tensors(weights.clone(), dtype, &Device::Cpu))?)
}

/// A contiguous copy with a storage of its own.
fn copy(tensor: &Tensor) -> Result<Tensor> {
    Ok(Tensor::from_vec(values(tensor)?, tensor.dims(), tensor.device())?
        .to_dtype(tensor.dtype())?)
}

// ---------------------------------------------------------------- 1. x

/// (…,n) in every rank and in every layout that candle's views produce.
fn views(n: usize, dtype: DType) -> Result<Vec<(&'static str, Tensor)>> {
    let mut numbers = Numbers::new(1);
    let mut t = |dims: &[usize]| numbers.tensor(dims, 2.0, dtype);
    Ok(vec![
        ("vector", t(&[n])?),
        ("vector, every third element", t(&[n, 3])?.i((.., 1))?),
        ("one row", t(&[1, n])?),
        ("rows", t(&[6, n])?),
        ("transposed", t(&[n, 6])?.t()?),
        ("last columns", t(&[6, 2 * n + 1])?.narrow(1, n + 1, n)?),
        ("even columns", t(&[6, n, 2])?.i((.., .., 0))?),
        ("every second row", t(&[6, 2, n])?.i((.., 1))?),
        ("middle rows", t(&[9, n])?.narrow(0, 2, 6)?),
        ("one row broadcast", t(&[1, n])?.broadcast_as((6, n))?),
        ("one column broadcast", t(&[6, 1])?.broadcast_as((6, n))?),
        ("rank 3", t(&[2, 3, n])?),
        ("rank 3, sequence first", t(&[3, 2, n])?.transpose(0, 1)?),
        ("rank 3, last positions", t(&[2, 5, n])?.narrow(1, 3, 2)?),
        ("rank 3, batch broadcast", t(&[3, n])?.broadcast_as((2, 3, n))?),
        ("rank 3, width first", t(&[n, 3, 2])?.permute((2, 1, 0))?),
        ("rank 4", t(&[2, 1, 3, n])?),
        ("rank 4, permuted", t(&[3, n, 2, 4])?.permute((2, 3, 0, 1))?),
    ])
}

#[test]
fn x_of_any_rank_and_layout() -> Result<()> {
    let cfg = FfnConfig::new(H, I).with_bias(true);
    for dtype in FLOATS {
        let ffn = build(&cfg, &weights(&cfg, &mut Numbers::new(2), dtype)?)?;
        for (layout, x) in views(H, dtype)? {
            let (y, of_copy) = (ffn.forward(&x)?, ffn.forward(&copy(&x)?)?);
            assert_eq!((y.dims(), y.dtype()), (x.dims(), dtype), "{layout}");
            assert_eq!(bits(&y)?, bits(&of_copy)?, "{dtype:?} {layout}");
            let rows = ffn.forward(&copy(&x)?.reshape(((), H))?)?;
            assert_eq!(bits(&y)?, bits(&rows)?, "{dtype:?} {layout} as a matrix");
        }
    }
    Ok(())
}

#[test]
fn no_rows_in_no_rows_out() -> Result<()> {
    let cfg = FfnConfig::new(H, I);
    let dims: [&[usize]; 7] =
        [&[0, H], &[0, 3, H], &[2, 0, H], &[0, 0, H], &[0, 2, 3, H], &[2, 0, 3, H], &[2, 3, 0, H]];
    for dtype in FLOATS {
        let ffn = build(&cfg, &weights(&cfg, &mut Numbers::new(3), dtype)?)?;
        for dims in dims {
            let x = Tensor::zeros(dims, dtype, &Device::Cpu)?;
            let y = ffn.forward(&x)?;
            assert_eq!((y.dims(), y.dtype()), (dims, dtype));
            let out = glu_mul(GluActivation::Gelu, &x, &x)?;
            assert_eq!((out.dims(), out.dtype()), (dims, dtype));
        }
    }
    Ok(())
}

/// The results are bit-identical where sums are exact. In other cases candle's matmul may sum a
/// single row in another order, so the result is only within the bound.
#[test]
fn rows_do_not_depend_on_their_neighbours() -> Result<()> {
    for dtype in FLOATS {
        let mut numbers = Numbers::new(4);
        let relu = FfnConfig::new(H, I).with_activation(GluActivation::Relu);
        let ffn = SwiGluFfn::from_weights(&relu, integer_weights(&mut numbers, dtype)?)?;
        let x = integers(&mut numbers, &[11, H], dtype)?;
        let together = ffn.forward(&x)?;
        for row in 0..11 {
            assert_eq!(
                bits(&ffn.forward(&x.i(row)?)?)?,
                bits(&together.i(row)?)?,
                "{dtype:?} row {row}"
            );
        }
    }
    for dtype in [DType::F64, DType::F32] {
        let (cfg, mut numbers) = (FfnConfig::new(H, I), Numbers::new(5));
        let weights = weights(&cfg, &mut numbers, dtype)?;
        let (ffn, x) = (build(&cfg, &weights)?, numbers.tensor(&[11, H], 2.0, dtype)?);
        let near = Block::new(&cfg, &weights)?.forward(&x, unit_roundoff(dtype))?;
        let alone = (0..11)
            .map(|row| ffn.forward(&x.i(row..row + 1)?))
            .collect::<candle_core::Result<Vec<_>>>()?;
        for y in [ffn.forward(&x)?, Tensor::cat(&alone, 0)?] {
            check_within("rows", &y, &near.values(), &twice(near.errors()))?;
        }
    }
    Ok(())
}

/// Two computations of the same precision may differ by the error of both.
fn twice(errors: Vec<f64>) -> Vec<f64> {
    errors.into_iter().map(|error| 2.0 * error).collect()
}

// ---------------------------------------------------------------- 2. weights

fn integer_weights(numbers: &mut Numbers, dtype: DType) -> Result<Weights> {
    let mut t = |dims: &[usize]| integers(numbers, dims, dtype);
    let gate_up = GateUp::separate(t(&[I, H])?, t(&[I, H])?, None, None);
    Ok(Weights::new(gate_up, t(&[H, I])?, None))
}

/// Views (rows, columns) of a storage that is larger or arranged differently, and that is a
/// variable if `tracked`.
fn weight_views(
    numbers: &mut Numbers,
    [rows, columns]: [usize; 2],
    tracked: bool,
) -> Result<Vec<(&'static str, Tensor)>> {
    let mut t = |dims: &[usize]| {
        let tensor = integers(numbers, dims, DType::F32)?;
        anyhow::Ok(if tracked { Var::from_tensor(&tensor)?.into_inner() } else { tensor })
    };
    Ok(vec![
        ("rows of a fused matrix", t(&[2 * rows, columns])?.narrow(0, rows, rows)?),
        ("columns of a wider matrix", t(&[rows, 3 * columns])?.narrow(1, columns, columns)?),
        ("transposed", t(&[columns, rows])?.t()?),
        (
            "columns of a transposed",
            t(&[2 * columns, 2 * rows])?.t()?.narrow(1, 3, columns)?.narrow(0, 1, rows)?,
        ),
        ("every second row", t(&[rows, 2, columns])?.i((.., 1))?),
        ("every second column", t(&[rows, columns, 2])?.i((.., .., 1))?),
        ("every second row of a transposed", t(&[columns, rows, 2])?.i((.., .., 0))?.t()?),
        ("one expert of several", t(&[3, rows, columns])?.i(1)?),
        ("one row broadcast", t(&[1, columns])?.broadcast_as((rows, columns))?),
        ("one column broadcast", t(&[rows, 1])?.broadcast_as((rows, columns))?),
    ])
}

#[test]
fn weights_may_be_views() -> Result<()> {
    for (dtype, tracked) in FLOATS.into_iter().flat_map(|dtype| [(dtype, false), (dtype, true)]) {
        let mut numbers = Numbers::new(6);
        let xs = [&[1, H], &[7, H]].map(|dims| integers(&mut numbers, dims, dtype));
        let [gates, ups] = [0, 1].map(|_| weight_views(&mut numbers, [I, H], tracked));
        let downs = weight_views(&mut numbers, [H, I], tracked)?;
        for (((layout, gate), (_, up)), (_, down)) in gates?.into_iter().zip(ups?).zip(downs) {
            let views = [gate.to_dtype(dtype)?, up.to_dtype(dtype)?, down.to_dtype(dtype)?];
            let copies = [copy(&views[0])?, copy(&views[1])?, copy(&views[2])?];
            let cfg = FfnConfig::new(H, I).with_activation(GluActivation::Relu);
            let [of_views, of_copies] = [views, copies].map(|[gate_proj, up_proj, down_proj]| {
                let linear = Linear::new(down_proj.clone(), None)?;
                let gate_up = GateUp::separate(gate_proj, up_proj, None, None);
                let weights = Weights::new(gate_up, down_proj, None);
                anyhow::Ok((SwiGluFfn::from_weights(&cfg, weights)?, linear))
            });
            let ((ffn, linear), (ffn_of_copies, linear_of_copies)) = (of_views?, of_copies?);
            for x in &xs {
                let x = x.as_ref().map_err(|error| anyhow::anyhow!("{error}"))?;
                let what = format!("{dtype:?} {layout}, {}, M = {}", ffn.kernel(), x.dim(0)?);
                let y = ffn.forward(x)?;
                assert!(
                    values(&y)?.iter().all(|y| y.is_finite()),
                    "{what}: the integers are too large"
                );
                assert_eq!(bits(&y)?, bits(&ffn_of_copies.forward(x)?)?, "{what}");
                let h = x.narrow(1, 0, 1)?.broadcast_as((x.dim(0)?, I))?;
                assert_eq!(
                    bits(&linear.forward(&h)?)?,
                    bits(&linear_of_copies.forward(&h)?)?,
                    "{what}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn fused_and_separate_projections_agree() -> Result<()> {
    let cfg = FfnConfig::new(H, I).with_activation(GluActivation::Relu).with_bias(true);
    for dtype in FLOATS {
        let mut numbers = Numbers::new(7);
        let mut t = |dims: &[usize]| integers(&mut numbers, dims, dtype);
        let [gate, up, down] = [t(&[I, H])?, t(&[I, H])?, t(&[H, I])?];
        let [gate_bias, up_bias, down_bias] = [t(&[I])?, t(&[I])?, t(&[H])?];
        let weights = |gate_up| Weights::new(gate_up, down.clone(), Some(down_bias.clone()));
        let separate = GateUp::separate(
            gate.clone(),
            up.clone(),
            Some(gate_bias.clone()),
            Some(up_bias.clone()),
        );
        let separate = SwiGluFfn::from_weights(&cfg, weights(separate))?;
        for order in [FusedOrder::GateFirst, FusedOrder::UpFirst, FusedOrder::Interleaved] {
            let (gate_up_proj, bias) =
                (pack(&gate, &up, order)?, Some(pack(&gate_bias, &up_bias, order)?));
            let fused =
                SwiGluFfn::from_weights(&cfg, weights(GateUp::fused(gate_up_proj, bias, order)))?;
            for m in [1, 2, 9] {
                let x = t(&[m, H])?;
                assert_eq!(
                    bits(&fused.forward(&x)?)?,
                    bits(&separate.forward(&x)?)?,
                    "{dtype:?} {order:?} M = {m}"
                );
            }
        }
    }
    Ok(())
}

// ---------------------------------------------------------------- 3. the formula

/// Every activation, with different sets of modifiers.
fn configs() -> Vec<FfnConfig> {
    let of = |activation| {
        let plain = FfnConfig::new(H, I).with_activation(activation);
        let biased = plain.clone().with_bias(true);
        let falcon = plain.clone().with_multipliers(0.6875, 1.375);
        let gpt_oss = biased.clone().with_limit(0.75).with_up_offset(1.0);
        let all = gpt_oss.clone().with_multipliers(-0.7, 0.3);
        [plain, biased, falcon, gpt_oss, all]
    };
    ACTIVATIONS.into_iter().flat_map(of).collect()
}

/// `reference::ffn` with biases: x and the weights get one more column, of ones and of the biases.
fn definition(cfg: &FfnConfig, weights: &HashMap<String, Tensor>, x: &Tensor) -> Result<Vec<f64>> {
    let column = |matrix: &Tensor, column: &[f64]| -> Result<Vec<f64>> {
        let rows = values(matrix)?;
        let width = rows.len() / column.len();
        Ok(rows
            .chunks(width)
            .zip(column)
            .flat_map(|(row, &last)| row.iter().copied().chain([last]))
            .collect())
    };
    let bias = |name: &str, n: usize| weights.get(name).map_or(Ok(vec![0.0; n]), values);
    let gate = column(&weights["gate_proj.weight"], &bias("gate_proj.bias", I)?)?;
    let up = column(&weights["up_proj.weight"], &bias("up_proj.bias", I)?)?;
    let (down, down_bias) = (values(&weights["down_proj.weight"])?, bias("down_proj.bias", H)?);
    let x = column(x, &vec![1.0; x.dim(0)?])?;
    let y = reference::ffn(&glu_of(cfg), &x, &gate, &up, &down, H + 1);
    let d = f64::from(cfg.down_multiplier);
    Ok(y.chunks(H)
        .flat_map(|row| row.iter().zip(&down_bias).map(|(y, b)| d * (y + b)).collect::<Vec<_>>())
        .collect())
}

#[test]
fn the_family_follows_the_definition() -> Result<()> {
    for (cfg, dtype) in
        configs().into_iter().flat_map(|cfg| [(cfg.clone(), DType::F64), (cfg, DType::F32)])
    {
        let (mut numbers, u) = (Numbers::new(8), unit_roundoff(dtype));
        let weights = weights(&cfg, &mut numbers, dtype)?;
        let x = numbers.tensor(&[5, H], 3.0, dtype)?;
        // In f64 the definition has the same error as the block, because it sums in f64 too.
        let errors = Block::new(&cfg, &weights)?.forward(&x, u)?.errors();
        let bounds = if dtype == DType::F64 { twice(errors) } else { errors };
        let what = format!("{dtype:?} {cfg:?}");
        let worst = check_within(
            &what,
            &build(&cfg, &weights)?.forward(&x)?,
            &definition(&cfg, &weights, &x)?,
            &bounds,
        )?;
        eprintln!("{:.4} of the bound: {what}", worst);
    }
    Ok(())
}

/// The documented accuracy: at most twice the error of candle's own operations in the same dtype.
#[test]
fn no_less_accurate_than_candle() -> Result<()> {
    for (activation, dtype) in
        ACTIVATIONS.into_iter().flat_map(|a| FLOATS[1..].iter().map(move |&dtype| (a, dtype)))
    {
        let (cfg, mut numbers) =
            (FfnConfig::new(64, 160).with_activation(activation), Numbers::new(9));
        let weights = weights(&cfg, &mut numbers, dtype)?;
        let x = numbers.tensor(&[16, 64], 3.0, dtype)?;
        let project = |x: &Tensor, name: &str| x.matmul(&weights[&format!("{name}.weight")].t()?);
        let (gate, up) = (project(&x, "gate_proj")?, project(&x, "up_proj")?);
        let candle = project(&composed(activation, &gate, &up)?, "down_proj")?;
        let exact = Block::new(&cfg, &weights)?.forward(&x, 0.0)?.values();
        let ours = rms_error(&values(&build(&cfg, &weights)?.forward(&x)?)?, &exact);
        let theirs = rms_error(&values(&candle)?, &exact);
        eprintln!("{:.3} of candle's error: {activation} {dtype:?}", ours / theirs);
        assert!(
            ours <= 2.0 * theirs,
            "{activation} {dtype:?}: error {ours:e}, candle's {theirs:e}"
        );
    }
    Ok(())
}

// ---------------------------------------------------------------- 4. the gate

#[test]
fn the_pair_takes_any_layout() -> Result<()> {
    for dtype in FLOATS {
        for (op, n) in [
            (Glu::new(GluActivation::Silu), 33),
            (Glu::new(GluActivation::Relu).with_limit(0.5), 130),
        ] {
            let views = views(n, dtype)?;
            for ((layout, gate), (other, up)) in
                views.iter().flat_map(|a| views.iter().map(move |b| (a, b)))
            {
                if gate.dims() != up.dims() {
                    continue;
                }
                let expected = bits(&op.mul(&copy(gate)?, &copy(up)?)?)?;
                assert_eq!(bits(&op.mul(gate, up)?)?, expected, "{dtype:?} {layout}, {other}");
                let (gate, up) = (Var::from_tensor(&copy(gate)?)?, Var::from_tensor(&copy(up)?)?);
                assert_eq!(
                    bits(&op.mul(&gate, &up)?)?,
                    expected,
                    "{dtype:?} {layout}, {other}, tracked"
                );
            }
        }
        // A tensor that is large enough for several threads, and a scalar.
        let large = Numbers::new(10).tensor(&[331, 2, 331], 4.0, dtype)?;
        let (gate, up) = (large.i((.., 0))?, large.i((.., 1))?.t()?);
        let expected = glu_mul(GluActivation::Gelu, &copy(&gate)?, &copy(&up)?)?;
        assert_eq!(
            bits(&glu_mul(GluActivation::Gelu, &gate, &up)?)?,
            bits(&expected)?,
            "{dtype:?}"
        );
        let scalar = large.i((7, 1, 9))?;
        assert_eq!(glu_mul(GluActivation::Gelu, &scalar, &scalar)?.dims(), [0usize; 0]);
    }
    Ok(())
}

// ---------------------------------------------------------------- 5. clones, threads, names

/// A block uses variables in place; so does its clone.
#[test]
fn clones_share_the_weights() -> Result<()> {
    let (cfg, mut numbers) = (FfnConfig::new(H, I), Numbers::new(11));
    let vars = weights(&cfg, &mut numbers, DType::F32)?
        .into_iter()
        .map(|(name, t)| Ok((name, Var::from_tensor(&t)?)));
    let vars = vars.collect::<Result<HashMap<String, Var>>>()?;
    let x = numbers.tensor(&[3, H], 1.0, DType::F32)?;
    let seen = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
    let ffn = build(&cfg, &seen)?;
    let clone = ffn.clone();
    let before = bits(&ffn.forward(&x)?)?;
    assert_eq!(bits(&clone.forward(&x)?)?, before);
    for var in vars.values() {
        var.set(&(var.as_tensor() * 2.0)?)?;
    }
    let after = bits(&ffn.forward(&x)?)?;
    assert_ne!(after, before);
    assert_eq!(bits(&clone.forward(&x)?)?, after);
    Ok(())
}

/// h has 8 · 16384 elements, enough for every caller to use all threads.
#[test]
fn concurrent_forwards_agree() -> Result<()> {
    let cfg = FfnConfig::new(16, 16384);
    for dtype in [DType::F32, DType::BF16] {
        let mut numbers = Numbers::new(12);
        let ffn = build(&cfg, &weights(&cfg, &mut numbers, dtype)?)?;
        let x = numbers.tensor(&[8, 16], 1.0, dtype)?;
        let expected = bits(&ffn.forward(&x)?)?;
        std::thread::scope(|scope| {
            let run = |ffn: SwiGluFfn| {
                (0..5).map(|_| bits(&ffn.forward(&x)?)).collect::<Result<Vec<_>>>()
            };
            let workers: Vec<_> =
                (0..4).map(|_| ffn.clone()).map(|ffn| scope.spawn(move || run(ffn))).collect();
            for worker in workers {
                let results = worker.join().ok().context("a worker panicked")??;
                assert!(results.iter().all(|y| *y == expected), "{dtype:?}");
            }
            anyhow::Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn the_kernel_has_a_name() -> Result<()> {
    let cfg = FfnConfig::new(H, I);
    for dtype in FLOATS {
        let ffn = build(&cfg, &weights(&cfg, &mut Numbers::new(13), dtype)?)?;
        let (kernel, plain) =
            (ffn.kernel().trim_start_matches("plain-"), ffn.kernel().starts_with("plain-"));
        assert!(candle_swiglu::cpu_kernels().contains(&kernel), "{}", ffn.kernel());
        assert_eq!(plain, dtype == DType::F64);
        if let Ok(forced) = std::env::var("CANDLE_SWIGLU_KERNEL") {
            // `amx` and `avx512bf16` are `avx512` with products in bf16, `neonbf16` is `neon`.
            let expected = match forced.as_str() {
                _ if dtype == DType::BF16 => &forced,
                "amx" => "avx512",
                _ => forced.trim_end_matches("bf16"),
            };
            assert_eq!(kernel, expected);
        }
        assert_eq!(ffn.clone().kernel(), ffn.kernel());
    }
    Ok(())
}
