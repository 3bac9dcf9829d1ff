//! The Metal kernels through the public API, against f64: `cargo test --features metal` on a Mac.
//! (Without one, the same kernels run on the CPU in `tests/metal_shim`, and this file is
//! type-checked by `scripts/metal-check.sh`.)
//!
//! Sizes are at the edges of the kernels: 8 | 9 rows (decode, tile), 32 | 33 and 64 | 65 (tiles),
//! and k with and without whole 16 B chunks. f16 and bf16 results must be within the bound from
//! norms, and at most twice as far from f64 as candle's CPU operations.
#![cfg(feature = "metal")]

use std::collections::HashMap;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Module, Tensor, Var};
use candle_nn::VarBuilder;
use candle_swiglu::{FfnConfig, Glu, GluActivation, Linear, SwiGluFfn, glu_mul, reference};

mod common;
use common::{
    ACTIVATIONS, Block, Numbers, check_within, composed, glu_of, glu_units, rms_error, slope_size,
    unit_roundoff, values, weights,
};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
const ROWS: [usize; 14] = [1, 2, 3, 5, 8, 9, 31, 32, 33, 63, 64, 65, 130, 520];
const SIZES: [(usize, usize); 3] = [(33, 45), (64, 96), (72, 40)];

fn gpu() -> Result<Device> {
    Device::new_metal(0).context("a Mac with a GPU")
}

fn cpu(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.to_device(&Device::Cpu)?)
}

/// Every activation, without modifiers and with all of them.
fn configs((h, i): (usize, usize)) -> Vec<FfnConfig> {
    let plain = ACTIVATIONS.map(|activation| FfnConfig::new(h, i).with_activation(activation));
    let modified = plain.clone().map(|cfg| {
        cfg.with_bias(true).with_multipliers(-0.7, 0.3).with_limit(0.5).with_up_offset(1.0)
    });
    plain.into_iter().chain(modified).collect()
}

fn on(device: &Device, tensors: &HashMap<String, Tensor>) -> Result<HashMap<String, Tensor>> {
    tensors.iter().map(|(name, t)| Ok((name.clone(), t.to_device(device)?))).collect()
}

fn build(cfg: &FfnConfig, weights: &HashMap<String, Tensor>, device: &Device) -> Result<SwiGluFfn> {
    let dtype = weights["down_proj.weight"].dtype();
    Ok(SwiGluFfn::new(cfg, VarBuilder::from_tensors(on(device, weights)?, dtype, device))?)
}

// ---------------------------------------------------------------- 1. the block and the projection

#[test]
fn the_block_follows_the_definition() -> Result<()> {
    let device = gpu()?;
    for (n, (cfg, dtype)) in SIZES
        .into_iter()
        .flat_map(configs)
        .flat_map(|cfg| DTYPES.map(|t| (cfg.clone(), t)))
        .enumerate()
    {
        let mut numbers = Numbers::new(n as u64);
        let weights = weights(&cfg, &mut numbers, dtype)?;
        let (ffn, oracle) = (build(&cfg, &weights, &device)?, Block::new(&cfg, &weights)?);
        assert_eq!(ffn.kernel(), "metal");
        for rows in ROWS {
            let x = numbers.tensor(&[rows, cfg.hidden_size], 3.0, dtype)?;
            let near = oracle.forward(&x, unit_roundoff(dtype))?;
            let y = cpu(&ffn.forward(&x.to_device(&device)?)?)?;
            check_within(
                &format!("{dtype:?} {rows} rows {cfg:?}"),
                &y,
                &near.values(),
                &near.errors(),
            )?;
        }
    }
    Ok(())
}

#[test]
fn no_less_accurate_than_candle_on_the_cpu() -> Result<()> {
    let device = gpu()?;
    for (activation, dtype) in
        ACTIVATIONS.into_iter().flat_map(|activation| DTYPES.map(|dtype| (activation, dtype)))
    {
        let (cfg, mut numbers) =
            (FfnConfig::new(64, 160).with_activation(activation), Numbers::new(9));
        let weights = weights(&cfg, &mut numbers, dtype)?;
        let (ffn, oracle) = (build(&cfg, &weights, &device)?, Block::new(&cfg, &weights)?);
        for rows in [4, 16, 100] {
            let x = numbers.tensor(&[rows, 64], 3.0, dtype)?;
            let project =
                |x: &Tensor, name: &str| x.matmul(&weights[&format!("{name}.weight")].t()?);
            let (gate, up) = (project(&x, "gate_proj")?, project(&x, "up_proj")?);
            let candle = project(&composed(activation, &gate, &up)?, "down_proj")?;
            let exact = oracle.forward(&x, 0.0)?.values();
            let ours = rms_error(&values(&cpu(&ffn.forward(&x.to_device(&device)?)?)?)?, &exact);
            let theirs = rms_error(&values(&candle)?, &exact);
            eprintln!("{:.3} of candle's error: {activation} {dtype:?} {rows} rows", ours / theirs);
            assert!(
                ours <= 2.0 * theirs,
                "{activation} {dtype:?} {rows} rows: error {ours:e}, candle's {theirs:e}"
            );
        }
    }
    Ok(())
}

/// `Linear` as the down projection of a block whose first half is the identity: h = x · 1.
#[test]
fn the_projection_follows_the_definition() -> Result<()> {
    let device = gpu()?;
    for (dtype, bias) in DTYPES.into_iter().flat_map(|dtype| [(dtype, false), (dtype, true)]) {
        for (out_dim, in_dim) in [(1, 1), (45, 33), (96, 64), (40, 72)] {
            let mut numbers = Numbers::new(5);
            let weight = numbers.tensor(&[out_dim, in_dim], (3.0 / in_dim as f64).sqrt(), dtype)?;
            let b = bias.then(|| numbers.tensor(&[out_dim], 0.5, dtype)).transpose()?;
            let on_gpu = b.as_ref().map(|b| b.to_device(&device)).transpose()?;
            let layer = Linear::new(weight.to_device(&device)?, on_gpu)?;
            assert_eq!(layer.kernel(), "metal");
            for rows in ROWS {
                let x = numbers.tensor(&[rows, in_dim], 3.0, dtype)?;
                let y = cpu(&layer.forward(&x.to_device(&device)?)?)?;
                let (exact, bounds) = projected(&x, &weight, b.as_ref())?;
                check_within(
                    &format!("{dtype:?} {rows} x {in_dim} -> {out_dim}"),
                    &y,
                    &exact,
                    &bounds,
                )?;
            }
        }
    }
    Ok(())
}

/// x·Wᵀ + b in f64, and its error bound: γ·(Σ|x||w| + |b|) in f32 with one rounding to the dtype.
fn projected(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<(Vec<f64>, Vec<f64>)> {
    let wide = |t: &Tensor| t.to_dtype(DType::F64);
    let (a, w) = (wide(x)?, wide(weight)?.t()?);
    let (mut sum, mut size) = (a.matmul(&w)?, a.abs()?.matmul(&w.abs()?)?);
    if let Some(bias) = bias {
        sum = sum.broadcast_add(&wide(bias)?)?;
        size = size.broadcast_add(&wide(bias)?.abs()?)?;
    }
    let n = (x.dim(1)? + 1) as f64 * unit_roundoff(DType::F32);
    let (exact, gamma) = (values(&sum)?, n / (1.0 - n));
    let round = if x.dtype() == DType::F32 { 0.0 } else { unit_roundoff(x.dtype()) };
    let bounds = values(&size)?
        .iter()
        .zip(&exact)
        .map(|(s, y)| gamma * s + round * (y.abs() + gamma * s))
        .collect();
    Ok((exact, bounds))
}

#[test]
fn x_of_any_layout() -> Result<()> {
    let device = gpu()?;
    let (cfg, mut numbers) = (FfnConfig::new(64, 96), Numbers::new(2));
    for dtype in DTYPES {
        let ffn = build(&cfg, &weights(&cfg, &mut numbers, dtype)?, &device)?;
        let mut t = |dims: &[usize]| {
            Ok::<_, anyhow::Error>(numbers.tensor(dims, 2.0, dtype)?.to_device(&device)?)
        };
        let views = [
            ("vector", t(&[64])?),
            ("transposed", t(&[64, 6])?.t()?),
            ("last columns", t(&[6, 129])?.narrow(1, 65, 64)?),
            ("middle rows", t(&[9, 64])?.narrow(0, 2, 6)?),
            ("rank 3, sequence first", t(&[3, 2, 64])?.transpose(0, 1)?),
            ("one row broadcast", t(&[1, 64])?.broadcast_as((12, 64))?),
            ("no rows", t(&[0, 3, 64])?),
        ];
        for (layout, x) in views {
            let copy = cpu(&x)?.contiguous()?.to_device(&device)?;
            let (y, of_copy) = (ffn.forward(&x)?, ffn.forward(&copy)?);
            assert_eq!(y.dims(), x.dims(), "{layout}");
            assert_eq!(
                common::bits(&cpu(&y)?)?,
                common::bits(&cpu(&of_copy)?)?,
                "{dtype:?} {layout}"
            );
        }
    }
    Ok(())
}

/// Dispatches run concurrently unless candle is told which buffers they read and write. This test
/// has h and y of many calls in flight.
#[test]
fn calls_in_flight_do_not_disturb_each_other() -> Result<()> {
    let device = gpu()?;
    let (cfg, mut numbers) = (FfnConfig::new(64, 96).with_bias(true), Numbers::new(3));
    let ffn = build(&cfg, &weights(&cfg, &mut numbers, DType::F32)?, &device)?;
    for rows in [1, 40] {
        let mut x = numbers.tensor(&[rows, 64], 1.0, DType::F32)?.to_device(&device)?;
        let mut steps = vec![x.clone()];
        for _ in 0..200 {
            x = (ffn.forward(&x)? + &x)?; // each call needs the one before
            steps.push(x.clone());
        }
        for pair in steps.windows(2) {
            let again = (ffn.forward(&pair[0])? + &pair[0])?;
            device.synchronize()?;
            assert_eq!(common::bits(&cpu(&again)?)?, common::bits(&cpu(&pair[1])?)?, "{rows} rows");
        }
    }
    Ok(())
}

// ---------------------------------------------------------------- 2. gradients

/// Packed weights give a gradient of x, variables give all gradients.
#[test]
fn gradients_follow_the_definition() -> Result<()> {
    let device = gpu()?;
    let u = unit_roundoff(DType::F32);
    for (cfg, rows) in configs((33, 45)).into_iter().flat_map(|cfg| [(cfg.clone(), 3), (cfg, 70)]) {
        let mut numbers = Numbers::new(4);
        let weights = weights(&cfg, &mut numbers, DType::F32)?;
        let (x, dy) = (
            numbers.tensor(&[rows, 33], 2.0, DType::F32)?,
            numbers.tensor(&[rows, 33], 1.0, DType::F32)?,
        );
        let near = Block::new(&cfg, &weights)?.gradients(&x, &dy, u)?;
        let vars =
            on(&device, &weights)?.into_iter().map(|(name, t)| Ok((name, Var::from_tensor(&t)?)));
        let vars = vars.collect::<Result<HashMap<_, _>>>()?;
        let tensors =
            vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
        let tracked = SwiGluFfn::new(&cfg, VarBuilder::from_tensors(tensors, DType::F32, &device))?;
        let x = Var::from_tensor(&x.to_device(&device)?)?;
        for ffn in [tracked, build(&cfg, &weights, &device)?] {
            let store = (ffn.forward(&x)? * dy.to_device(&device)?)?.sum_all()?.backward()?;
            let check = |name: &str, tensor: &Tensor| -> Result<()> {
                let Some(found) = store.get(tensor) else {
                    ensure!(ffn.kernel() == "metal" && name != "dx", "no gradient {name}"); // packed weights are constants
                    return Ok(());
                };
                let (near, what) = (&near[name], format!("{name} {rows} rows {cfg:?}"));
                let doubled: Vec<f64> = near.errors().iter().map(|error| 2.0 * error).collect();
                check_within(&what, &cpu(found)?, &near.values(), &doubled)?;
                Ok(())
            };
            check("dx", &x)?;
            vars.iter().try_for_each(|(name, var)| check(&format!("d{name}"), var))?;
        }
    }
    Ok(())
}

// ---------------------------------------------------------------- 3. the gate alone

/// Random numbers of many magnitudes whose mantissas use all bits.
fn ragged(numbers: &mut Numbers, dims: &[usize], dtype: DType) -> Result<Tensor> {
    let cubed = numbers.tensor(dims, 1.0, DType::F64)?.powf(3.0)?;
    Ok((cubed * 20.0)?.to_dtype(dtype)?)
}

/// gate, up and dy in each layout that candle's views of `(rows, columns)` can have.
fn operands(
    numbers: &mut Numbers,
    dtype: DType,
    device: &Device,
) -> Result<Vec<(&'static str, Tensor)>> {
    let mut t =
        |dims: &[usize]| Ok::<_, anyhow::Error>(ragged(numbers, dims, dtype)?.to_device(device)?);
    Ok(vec![
        ("contiguous", t(&[9, 36])?),
        ("first half", t(&[9, 72])?.narrow(1, 0, 36)?),
        ("second half", t(&[9, 72])?.narrow(1, 36, 36)?),
        ("even columns", t(&[9, 36, 2])?.narrow(2, 0, 1)?.squeeze(2)?),
        ("transposed", t(&[36, 9])?.t()?),
        ("broadcast", t(&[1, 36])?.broadcast_as((9, 36))?),
        ("odd offset", t(&[10, 36])?.flatten_all()?.narrow(0, 5, 324)?.reshape((9, 36))?),
    ])
}

#[test]
fn the_gate_and_its_gradient_follow_the_definition() -> Result<()> {
    let device = gpu()?;
    let ops = configs((8, 8)).iter().map(glu_of).collect::<Vec<Glu>>();
    for (dtype, op) in DTYPES.into_iter().flat_map(|dtype| ops.iter().map(move |op| (dtype, op))) {
        let mut numbers = Numbers::new(6);
        let views = operands(&mut numbers, dtype, &device)?;
        for ((layout, gate), (other, up)) in
            views.iter().flat_map(|a| views.iter().map(move |b| (a, b)))
        {
            let what = format!("{dtype:?} {op:?} {layout}, {other}");
            let dy = ragged(&mut numbers, &[9, 36], dtype)?;
            check_gate(&what, op, [gate, up], &dy, &device)?;
        }
    }
    Ok(())
}

/// The bound: the documented units of the formula, three more for its modifiers, the rounding of
/// m·g times act's own slope, and one rounding to the dtype, which has denormals. `slope_size`
/// bounds the terms of a slope.
fn check_gate(
    what: &str,
    op: &Glu,
    [gate, up]: [&Tensor; 2],
    dy: &Tensor,
    device: &Device,
) -> Result<()> {
    let (dtype, u) = (dy.dtype(), unit_roundoff(DType::F32));
    let smallest = if dtype == DType::F16 { 2f64.powi(-24) } else { 2f64.powi(-126) };
    let round =
        |exact: f64, error: f64| error + unit_roundoff(dtype) * (exact.abs() + error) + smallest;
    let [g, v] = [Var::from_tensor(gate)?, Var::from_tensor(up)?];
    let store = (op.mul(&g, &v)? * dy.to_device(device)?)?.sum_all()?.backward()?;
    let found = [
        op.mul(gate, up)?,
        store.get(&g).context("dgate")?.clone(),
        store.get(&v).context("dup")?.clone(),
    ];

    let all = values(&cpu(gate)?)?.into_iter().zip(values(&cpu(up)?)?).zip(values(dy)?);
    let (mut exact, mut bounds) = (vec![vec![]; 3], vec![vec![]; 3]);
    for ((g, v), d) in all {
        let (value, gradient) = (reference::glu(op, g, v), reference::glu_grad(op, g, v, d));
        let (inner, d) = (f64::from(op.gate_multiplier) * g, d.abs());
        let units = u * (glu_units(op.activation, inner) + 3.0);
        let (act, slope) = reference::activation(
            op.activation,
            inner.min(op.limit.map_or(f64::INFINITY, f64::from)),
        );
        let act_error = units * act.abs() + u * (inner * slope).abs();
        let factor = v.abs() + f64::from(op.up_offset);
        let size = slope_size(op.activation, inner).max(slope.abs()) + 1.0 + inner.abs().min(8.0); // beyond 8 act is straight
        let errors = [act_error * factor, 2.0 * units * size * factor * d, act_error * d];
        for (i, exact_value) in [value, gradient.0, gradient.1].into_iter().enumerate() {
            exact[i].push(exact_value);
            bounds[i].push(round(exact_value, errors[i] + u * exact_value.abs()));
        }
    }
    for (i, name) in ["out", "dgate", "dup"].into_iter().enumerate() {
        check_within(&format!("{name} {what}"), &cpu(&found[i])?, &exact[i], &bounds[i])?;
    }
    Ok(())
}

/// Results that would be wrong with fast math.
#[test]
fn special_values() -> Result<()> {
    let device = gpu()?;
    let gate = Tensor::new(
        &[f32::NEG_INFINITY, f32::INFINITY, f32::NAN, -3.4e38, 3.4e38, -200.0, -0.0],
        &device,
    )?;
    let up = Tensor::full(2f32, 7, &device)?;
    let out = cpu(&glu_mul(GluActivation::Silu, &gate, &up)?)?.to_vec1::<f32>()?;
    assert!(out[0] == 0.0 && out[0].is_sign_negative(), "{out:?}");
    assert!(out[1] == f32::INFINITY && out[2].is_nan() && out[4] == f32::INFINITY, "{out:?}");
    assert!(out[3] == 0.0 && out[5] == 0.0 && out[6] == 0.0, "{out:?}");
    let limited = Glu::new(GluActivation::Relu).with_limit(7.0);
    let out = cpu(&limited.mul(&up, &gate)?)?.to_vec1::<f32>()?;
    assert!(out[2].is_nan() && out[0] == -14.0 && out[1] == 14.0, "{out:?}");

    // NaN in one row of x affects only that row.
    let (cfg, mut numbers) = (FfnConfig::new(64, 96), Numbers::new(7));
    let ffn = build(&cfg, &weights(&cfg, &mut numbers, DType::F32)?, &device)?;
    for rows in [3, 40] {
        let mut x = values(&numbers.tensor(&[rows, 64], 1.0, DType::F32)?)?;
        x[64 + 5] = f64::NAN;
        let x = Tensor::from_vec(x, (rows, 64), &Device::Cpu)?
            .to_dtype(DType::F32)?
            .to_device(&device)?;
        for (row, y) in cpu(&ffn.forward(&x)?)?.to_vec2::<f32>()?.iter().enumerate() {
            assert!(y.iter().all(|y| y.is_nan() == (row == 1)), "row {row} of {rows}");
        }
    }
    Ok(())
}
