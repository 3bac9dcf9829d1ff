//! Gradients through the public API: compared with finite differences and with candle's own
//! operations, through views, and under optimizers. A second derivative is an error, not a wrong
//! result.

use std::collections::{BTreeMap, HashMap};

use anyhow::{Context, Result, ensure};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, IndexOp, Module, Tensor, Var};
use candle_nn::{AdamW, Optimizer, SGD, VarBuilder, VarMap};
use candle_swiglu::{
    Family, FfnConfig, FusedOrder, GateUp, GluActivation, Linear, SwiGluFfn, Weights, glu_mul,
    reference, silu_mul,
};

mod common;
use common::{
    ACTIVATIONS, Block, Numbers, bits, check_within, composed, glu_units, integers, pack,
    rms_error, slope_size, unit_roundoff, values, weights,
};

type Vars = BTreeMap<String, Var>;

/// Variables with the given weights, and a block of these variables.
fn tracked(cfg: &FfnConfig, weights: &HashMap<String, Tensor>) -> Result<(Vars, SwiGluFfn)> {
    let dtype = weights["down_proj.weight"].dtype();
    let vars = weights
        .iter()
        .map(|(name, t)| Ok((name.clone(), Var::from_tensor(t)?)))
        .collect::<Result<Vars>>()?;
    let tensors = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
    let ffn = SwiGluFfn::new(cfg, VarBuilder::from_tensors(tensors, dtype, &Device::Cpu))?;
    Ok((vars, ffn))
}

fn gradient<'a>(store: &'a GradStore, tensor: &Tensor) -> Result<&'a Tensor> {
    store.get(tensor).context("no gradient")
}

// ---------------------------------------------------------------- 1. finite differences

const STEP: f64 = 1.0 / 1024.0;

/// <y, dy>
fn loss(ffn: &SwiGluFfn, x: &Tensor, dy: &Tensor) -> Result<f64> {
    Ok((ffn.forward(x)? * dy)?.sum_all()?.to_scalar()?)
}

/// The central five-point difference of the loss for every element of `var`.
fn differences(var: &Var, loss: impl Fn() -> Result<f64>) -> Result<Vec<f64>> {
    let (original, dims) = (values(var)?, var.dims().to_vec());
    let mut slopes = Vec::new();
    for i in 0..original.len() {
        let moved = |steps: f64| {
            let mut values = original.clone();
            values[i] += steps * STEP;
            var.set(&Tensor::from_vec(values, dims.clone(), &Device::Cpu)?)?;
            loss()
        };
        let (far, near) = (moved(2.0)? - moved(-2.0)?, moved(1.0)? - moved(-1.0)?);
        slopes.push((8.0 * near - far) / (12.0 * STEP));
    }
    var.set(&Tensor::from_vec(original, dims, &Device::Cpu)?)?;
    Ok(slopes)
}

/// The smallest distance of gate and up from a kink of the loss.
fn kink_distance(cfg: &FfnConfig, vars: &Vars, x: &Tensor) -> Result<f64> {
    let project = |name: &str| -> Result<Vec<f64>> {
        let product = x.matmul(&vars[&format!("{name}.weight")].t()?)?;
        values(&product.broadcast_add(&vars[&format!("{name}.bias")])?)
    };
    let m = f64::from(cfg.gate_multiplier);
    let gate: Vec<f64> = project("gate_proj")?.into_iter().map(|gate| m * gate).collect();
    let mut distances = Vec::new();
    if matches!(cfg.activation, GluActivation::Relu | GluActivation::Relu2) {
        distances.extend(gate.iter().map(|gate| gate.abs()));
    }
    if let Some(limit) = cfg.limit.map(f64::from) {
        distances.extend(gate.iter().map(|gate| (gate - limit).abs()));
        distances.extend(project("up_proj")?.iter().map(|up| (up.abs() - limit).abs()));
    }
    Ok(distances.into_iter().fold(f64::INFINITY, f64::min))
}

/// The step is s = 2⁻¹⁰. The error of a difference is s⁴/30·|L⁽⁵⁾| plus 1.5/s times the rounding
/// error of L.
///
/// An element changes gate and up by at most its own change, because |x|, |w| and the multipliers
/// are at most 1. Hence |L⁽⁵⁾| <= Σ|dh|·(|act⁽⁵⁾||up| + 5|act⁗|) < 3000, with 3·7
/// elements of h, |dh| <= 5·√(3/7), |up| <= 5.4, |act⁽⁵⁾| <= 5.6 and |act⁗| <= 2.5.
#[test]
fn finite_differences() -> Result<()> {
    for (activation, modified) in
        ACTIVATIONS.into_iter().flat_map(|activation| [(activation, false), (activation, true)])
    {
        let mut cfg = FfnConfig::new(5, 7).with_activation(activation).with_bias(true);
        if modified {
            cfg = cfg.with_multipliers(-0.7, 0.3).with_limit(0.5).with_up_offset(1.0);
        }
        let mut numbers = Numbers::new(4);
        let weights = weights(&cfg, &mut numbers, DType::F64)?;
        let (mut vars, ffn) = tracked(&cfg, &weights)?;
        let x = Var::from_tensor(&numbers.tensor(&[3, 5], 1.0, DType::F64)?)?;
        let dy = numbers.tensor(&[3, 5], 1.0, DType::F64)?;
        let distance = kink_distance(&cfg, &vars, &x)?;
        assert!(distance > 4.0 * STEP, "{cfg:?}: a kink at a distance of {distance}");

        let u = unit_roundoff(DType::F64);
        let (block, near) = (Block::new(&cfg, &weights)?, values(&ffn.forward(&x)?)?);
        let errors = block.forward(&x, u)?.errors();
        let rounding: f64 = values(&dy)?
            .iter()
            .zip(errors.iter().zip(&near))
            .map(|(dy, (e, y))| dy.abs() * (e + 16.0 * u * y.abs()))
            .sum();
        let bound = STEP.powi(4) / 30.0 * 3000.0 + 1.5 / STEP * rounding;
        let analytic = block.gradients(&x, &dy, u)?;

        let store = (ffn.forward(&x)? * &dy)?.sum_all()?.backward()?;
        vars.insert("x".into(), x.clone());
        let mut worst = 0f64;
        for (name, var) in &vars {
            let slopes = differences(var, || loss(&ffn, &x, &dy))?;
            let what = format!("{activation} {modified} {name}");
            worst = worst.max(check_within(
                &what,
                gradient(&store, var)?,
                &slopes,
                &vec![bound; slopes.len()],
            )?);
            let near = &analytic[&format!("d{name}")];
            let doubled: Vec<f64> = near.errors().iter().map(|error| 2.0 * error).collect();
            check_within(&what, gradient(&store, var)?, &near.values(), &doubled)?;
        }
        eprintln!("{activation} {modified}: {worst:.3} of the bound {bound:.1e}");
    }
    Ok(())
}

// ---------------------------------------------------------------- 2. candle's own operations

/// By how much this crate and candle may differ, per unit of |dy·up| (dgate) or of |dy| (dup): the
/// documented units of this crate; about eight operations of candle on numbers up to 1 + 2|g|; and
/// the constants of candle's GELU gradients, which have six decimal digits.
fn pair_tolerance(activation: GluActivation, g: f64, u: f64) -> [f64; 2] {
    let units = (glu_units(activation, g) + 4.0) * u;
    let theirs = 8.0 * u * (1.0 + 2.0 * g.abs());
    let digits = match activation {
        GluActivation::Gelu | GluActivation::GeluTanh => 1e-6 * (g.abs() + 0.1 * g.abs().powi(3)),
        _ => 0.0,
    };
    let act = reference::activation(activation, g).0.abs();
    [
        units * slope_size(activation, g) + theirs + digits,
        units * act.max(g.abs()).max(1.0) + theirs,
    ]
}

#[test]
fn the_pair_against_composed_operations() -> Result<()> {
    for (activation, dtype) in
        ACTIVATIONS.into_iter().flat_map(|a| [(a, DType::F64), (a, DType::F32)])
    {
        let mut numbers = Numbers::new(22);
        let mut var =
            |scale| anyhow::Ok(Var::from_tensor(&numbers.tensor(&[9, 35], scale, dtype)?)?);
        let (gate, up, dy) = (var(6.0)?, var(4.0)?, var(2.0)?.as_detached_tensor());
        let ours = (glu_mul(activation, &gate, &up)? * &dy)?.sum_all()?.backward()?;
        let theirs = (composed(activation, &gate, &up)? * &dy)?.sum_all()?.backward()?;
        let inputs = [values(&gate)?, values(&up)?, values(&dy)?];
        let tolerance = |i: usize| pair_tolerance(activation, inputs[0][i], unit_roundoff(dtype));
        let n = inputs[0].len();
        let bounds: [Vec<f64>; 2] = [
            (0..n).map(|i| tolerance(i)[0] * (inputs[1][i] * inputs[2][i]).abs()).collect(),
            (0..n).map(|i| tolerance(i)[1] * inputs[2][i].abs()).collect(),
        ];
        for ((name, var), bounds) in [("dgate", &gate), ("dup", &up)].into_iter().zip(bounds) {
            let what = format!("{activation} {dtype:?} {name}");
            let worst = check_within(
                &what,
                gradient(&ours, var)?,
                &values(gradient(&theirs, var)?)?,
                &bounds,
            )?;
            eprintln!("{what}: {worst:.3} of the bound");
        }
    }
    Ok(())
}

/// The root mean square error of every gradient of a block, relative to f64, is at most twice that
/// of candle's operations in the same dtype.
#[test]
fn no_less_accurate_than_composed_operations() -> Result<()> {
    let dtypes = [DType::F32, DType::BF16, DType::F16];
    for (activation, dtype) in ACTIVATIONS.into_iter().flat_map(|a| dtypes.map(|dtype| (a, dtype)))
    {
        let (cfg, mut numbers) =
            (FfnConfig::new(32, 80).with_activation(activation), Numbers::new(23));
        let weights = weights(&cfg, &mut numbers, dtype)?;
        let (mut vars, ffn) = tracked(&cfg, &weights)?;
        let x = Var::from_tensor(&numbers.tensor(&[16, 32], 3.0, dtype)?)?;
        let dy = numbers.tensor(&[16, 32], 1.0, dtype)?;
        let project = |x: &Tensor, name: &str| x.matmul(&vars[&format!("{name}.weight")].t()?);
        let h = composed(activation, &project(&x, "gate_proj")?, &project(&x, "up_proj")?)?;
        let theirs = (project(&h, "down_proj")? * &dy)?.sum_all()?.backward()?;
        let ours = (ffn.forward(&x)? * &dy)?.sum_all()?.backward()?;
        let exact = Block::new(&cfg, &weights)?.gradients(&x, &dy, 0.0)?;
        vars.insert("x".into(), x);
        for (name, var) in &vars {
            let exact = exact[&format!("d{name}")].values();
            let error = |store| anyhow::Ok(rms_error(&values(gradient(store, var)?)?, &exact));
            let (ours, theirs) = (error(&ours)?, error(&theirs)?);
            eprintln!("{:.3} of candle's error: {activation} {dtype:?} {name}", ours / theirs);
            ensure!(
                ours <= 2.0 * theirs,
                "{activation} {dtype:?} {name}: error {ours:e}, candle's {theirs:e}"
            );
        }
    }
    Ok(())
}

// ---------------------------------------------------------------- 3. layouts

type Pair = fn(&Tensor) -> candle_core::Result<(Tensor, Tensor)>;

/// Views of one leaf as (gate, up), both (6,10).
fn views() -> Vec<(&'static str, Vec<usize>, Pair)> {
    vec![
        ("halves", vec![6, 20], |t| Ok((t.narrow(1, 0, 10)?, t.narrow(1, 10, 10)?))),
        ("interleaved", vec![6, 10, 2], |t| Ok((t.i((.., .., 0))?, t.i((.., .., 1))?))),
        ("transposed", vec![20, 6], |t| Ok((t.narrow(0, 0, 10)?.t()?, t.narrow(0, 10, 10)?.t()?))),
        ("every second row", vec![6, 2, 10], |t| Ok((t.i((.., 0))?, t.i((.., 1))?))),
        ("broadcast rows", vec![2, 10], |t| {
            Ok((t.i(0..1)?.broadcast_as((6, 10))?, t.i(1..2)?.broadcast_as((6, 10))?))
        }),
        ("broadcast columns", vec![6, 2], |t| {
            Ok((
                t.narrow(1, 0, 1)?.broadcast_as((6, 10))?,
                t.narrow(1, 1, 1)?.broadcast_as((6, 10))?,
            ))
        }),
        ("the same twice", vec![6, 10], |t| Ok((t.clone(), t.clone()))),
    ]
}

/// Gradients through views. The gradient of the output is contiguous, transposed, or one number
/// that is broadcast. The gradient of the leaf is a sum of at most 12 terms.
#[test]
fn gradients_through_views() -> Result<()> {
    let (u, mut numbers) = (unit_roundoff(DType::F64), Numbers::new(31));
    let dy = numbers.tensor(&[10, 6], 1.0, DType::F64)?;
    let loss = |arrival: &str, out: Tensor| match arrival {
        "contiguous" => (out * dy.t()?.contiguous()?)?.sum_all(),
        "transposed" => (out.t()? * &dy)?.sum_all(),
        _ => out.sum_all(),
    };
    for (layout, dims, pair) in views() {
        let leaf = Var::from_tensor(&numbers.tensor(&dims, 3.0, DType::F64)?)?;
        let (gate, up) = pair(&leaf)?;
        for arrival in ["contiguous", "transposed", "broadcast"] {
            let ours = loss(arrival, silu_mul(&gate, &up)?)?.backward()?;
            let theirs = loss(arrival, composed(GluActivation::Silu, &gate, &up)?)?.backward()?;
            let expected = values(gradient(&theirs, &leaf)?)?;
            // |g|, |up| <= 3, |dy| <= 1; 12 terms, and 12 additions of numbers up to 12·3.3.
            let bound =
                12.0 * 3.0 * pair_tolerance(GluActivation::Silu, 3.0, u)[0] + 12.0 * 12.0 * 3.3 * u;
            let what = format!("{layout}, gradient {arrival}");
            check_within(&what, gradient(&ours, &leaf)?, &expected, &vec![bound; expected.len()])?;
        }
    }
    Ok(())
}

#[test]
fn one_side_may_be_untracked() -> Result<()> {
    let mut numbers = Numbers::new(32);
    let [gate, up] = [0, 1].map(|_| numbers.tensor(&[4, 9], 3.0, DType::F32));
    let (gate, up) = (Var::from_tensor(&gate?)?, Var::from_tensor(&up?)?);
    let both = silu_mul(&gate, &up)?.sum_all()?.backward()?;
    let only_gate = silu_mul(&gate, &up.as_detached_tensor())?.sum_all()?.backward()?;
    let only_up = silu_mul(&gate.as_detached_tensor(), &up)?.sum_all()?.backward()?;
    assert_eq!(bits(gradient(&only_gate, &gate)?)?, bits(gradient(&both, &gate)?)?);
    assert_eq!(bits(gradient(&only_up, &up)?)?, bits(gradient(&both, &up)?)?);
    assert!(only_gate.get(&up).is_none() && only_up.get(&gate).is_none());
    Ok(())
}

/// Fused weights get the gradients of separate ones, in their own order. The comparison is bit by
/// bit over integers, whose sums are exact.
#[test]
fn fused_weights_get_the_same_gradients() -> Result<()> {
    [DType::F32, DType::F64].into_iter().try_for_each(check_fused)
}

fn check_fused(dtype: DType) -> Result<()> {
    let cfg = FfnConfig::new(6, 9).with_activation(GluActivation::Relu).with_bias(true);
    let mut numbers = Numbers::new(33);
    let mut var =
        |dims: &[usize]| anyhow::Ok(Var::from_tensor(&integers(&mut numbers, dims, dtype)?)?);
    let [gate, up, down] = [var(&[9, 6])?, var(&[9, 6])?, var(&[6, 9])?];
    let [gate_bias, up_bias, down_bias] = [var(&[9])?, var(&[9])?, var(&[6])?];
    let (x, dy) = (var(&[5, 6])?, var(&[5, 6])?.as_detached_tensor());
    let run = |gate_up: GateUp| -> Result<GradStore> {
        let weights =
            Weights::new(gate_up, down.as_tensor().clone(), Some(down_bias.as_tensor().clone()));
        Ok((SwiGluFfn::from_weights(&cfg, weights)?.forward(&x)? * &dy)?.sum_all()?.backward()?)
    };
    let own = |var: &Var| var.as_tensor().clone();
    let separate =
        run(GateUp::separate(own(&gate), own(&up), Some(own(&gate_bias)), Some(own(&up_bias))))?;
    for order in [FusedOrder::GateFirst, FusedOrder::UpFirst, FusedOrder::Interleaved] {
        let pack = |gate: &Tensor, up: &Tensor| pack(gate, up, order);
        let fused = [
            Var::from_tensor(&pack(&gate, &up)?.detach())?,
            Var::from_tensor(&pack(&gate_bias, &up_bias)?.detach())?,
        ];
        let store = run(GateUp::fused(own(&fused[0]), Some(own(&fused[1])), order))?;
        for (var, [gate, up]) in fused.iter().zip([[&gate, &up], [&gate_bias, &up_bias]]) {
            let expected = pack(gradient(&separate, gate)?, gradient(&separate, up)?)?;
            assert_eq!(bits(gradient(&store, var)?)?, bits(&expected)?, "{dtype:?} {order:?}");
        }
        for var in [&x, &down, &down_bias] {
            assert_eq!(
                bits(gradient(&store, var)?)?,
                bits(gradient(&separate, var)?)?,
                "{dtype:?} {order:?}"
            );
        }
    }
    Ok(())
}

// ---------------------------------------------------------------- 4. training

/// Trains for a few steps of `optimizer` towards the output of another block. The loss must fall,
/// and every variable must have a gradient and change.
fn train(ffn: &SwiGluFfn, vars: &[Var], mut optimizer: impl Optimizer, what: &str) -> Result<()> {
    let (cfg, mut numbers) = (FfnConfig::new(6, 10), Numbers::new(41));
    let (_, teacher) = tracked(&cfg, &weights(&cfg, &mut numbers, DType::F32)?)?;
    let x = numbers.tensor(&[32, 6], 1.0, DType::F32)?;
    let target = teacher.forward(&x)?.detach();
    let error = || -> Result<Tensor> { Ok((ffn.forward(&x)? - &target)?.sqr()?.mean_all()?) };
    let before: Vec<_> = vars.iter().map(|var| bits(var)).collect::<Result<_>>()?;
    let mut losses = vec![error()?.to_scalar::<f32>()?];
    for _ in 0..10 {
        let store = error()?.backward()?;
        for var in vars {
            let gradient = gradient(&store, var)?;
            assert_eq!(gradient.dims(), var.dims(), "{what}");
            assert!(values(gradient)?.iter().any(|&g| g != 0.0), "{what}: a gradient is zero");
        }
        optimizer.step(&store)?;
        losses.push(error()?.to_scalar::<f32>()?);
    }
    assert!(losses.windows(2).all(|pair| pair[1] < pair[0]), "{what}: {losses:?}");
    for (var, before) in vars.iter().zip(before) {
        assert_ne!(bits(var)?, before, "{what}: a variable did not change");
    }
    Ok(())
}

/// Fills the map with reproducible weights, because its own initial values are random.
fn seed(map: &VarMap, seed: u64) -> Result<Vec<String>> {
    let mut numbers = Numbers::new(seed);
    let data = map.data().lock().map_err(|_| anyhow::anyhow!("poisoned"))?;
    let vars: BTreeMap<&String, &Var> = data.iter().collect();
    for var in vars.values() {
        var.set(&numbers.tensor(var.dims(), 0.7, DType::F32)?)?;
    }
    Ok(vars.into_keys().cloned().collect())
}

#[test]
fn a_var_map_trains() -> Result<()> {
    let layouts: [(Option<Family>, &[&str]); 4] = [
        (None, &["down_proj", "gate_proj", "up_proj"]),
        (Some(Family::Phi3), &["down_proj", "gate_up_proj"]),
        (Some(Family::Stella), &["down_proj", "up_gate_proj"]),
        (Some(Family::Interleaved), &["down_proj", "gate_up_proj"]),
    ];
    for ((family, names), bias) in
        layouts.into_iter().flat_map(|layout| [(layout, false), (layout, true)])
    {
        let mut cfg = FfnConfig::new(6, 10).with_bias(bias);
        cfg.family = family;
        for optimizer in ["sgd", "adamw"] {
            let map = VarMap::new();
            let ffn = SwiGluFfn::new(
                &cfg,
                VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu).pp("layers.0.mlp"),
            )?;
            let suffixes: &[&str] = if bias { &["bias", "weight"] } else { &["weight"] };
            let expected = names
                .iter()
                .flat_map(|name| suffixes.iter().map(move |s| format!("layers.0.mlp.{name}.{s}")));
            assert_eq!(seed(&map, 42)?, expected.collect::<Vec<_>>());
            let (vars, what) = (map.all_vars(), format!("{family:?}, bias {bias}, {optimizer}"));
            match optimizer {
                "sgd" => train(&ffn, &vars, SGD::new(vars.clone(), 0.1)?, &what)?,
                _ => train(&ffn, &vars, AdamW::new_lr(vars.clone(), 0.01)?, &what)?,
            }
        }
    }
    Ok(())
}

#[test]
fn variables_given_as_tensors_train() -> Result<()> {
    let mut numbers = Numbers::new(43);
    let mut var =
        |dims: &[usize]| anyhow::Ok(Var::from_tensor(&numbers.tensor(dims, 0.7, DType::F32)?)?);
    let vars = [var(&[10, 6])?, var(&[10, 6])?, var(&[6, 10])?];
    let [gate, up, down] = vars.each_ref().map(|var| var.as_tensor().clone());
    train(
        &SwiGluFfn::from_tensors(gate, up, down)?,
        &vars,
        SGD::new(vars.to_vec(), 0.1)?,
        "matrices",
    )?;
    // Views of variables: two layouts that a matmul accepts, and one that it does not.
    let vars = [var(&[6, 10])?, var(&[10, 2, 6])?, var(&[6, 10, 2])?];
    let views = [vars[0].t()?, vars[1].i((.., 1))?, vars[2].i((.., .., 0))?];
    let [gate, up, down] = views;
    train(&SwiGluFfn::from_tensors(gate, up, down)?, &vars, SGD::new(vars.to_vec(), 0.1)?, "views")
}

// ---------------------------------------------------------------- 5. second derivatives

fn assert_refused(result: candle_core::Result<GradStore>) {
    let message =
        result.map_or_else(|error| error.to_string(), |_| "a second derivative".to_string());
    assert!(
        message.contains("gradient"),
        "expected that a gradient has no backward, found: {message}"
    );
}

#[test]
fn a_second_derivative_is_an_error() -> Result<()> {
    let mut numbers = Numbers::new(51);
    let [gate, up] = [0, 1].map(|_| numbers.tensor(&[3, 4], 2.0, DType::F32));
    let (gate, up) = (Var::from_tensor(&gate?)?, Var::from_tensor(&up?)?);
    let store = silu_mul(&gate, &up)?.sum_all()?.backward()?;
    for var in [&gate, &up] {
        assert_refused(gradient(&store, var)?.sqr()?.sum_all()?.backward());
    }
    Ok(())
}

/// candle keeps the graph of a backward pass only if this variable is set, and reads it once per
/// thread. The test therefore runs in a process of its own.
#[test]
fn a_second_derivative_of_the_block_is_an_error() -> Result<()> {
    const KEEP_GRAPH: &str = "CANDLE_GRAD_DO_NOT_DETACH";
    if std::env::var_os(KEEP_GRAPH).is_none() {
        let name = "a_second_derivative_of_the_block_is_an_error";
        let output =
            common::this_program()?.args([name, "--exact"]).env(KEEP_GRAPH, "1").output()?;
        let stdout = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success() && stdout.contains("1 passed"), "{stdout}");
        return Ok(());
    }
    for dtype in [DType::F32, DType::F64] {
        let (cfg, mut numbers) = (FfnConfig::new(4, 6), Numbers::new(52));
        let (vars, ffn) = tracked(&cfg, &weights(&cfg, &mut numbers, dtype)?)?;
        let x = Var::from_tensor(&numbers.tensor(&[3, 4], 1.0, dtype)?)?;
        let store = ffn.forward(&x)?.sum_all()?.backward()?;
        let down = &vars["down_proj.weight"];
        for var in [&x, &vars["gate_proj.weight"], &vars["up_proj.weight"], down] {
            assert_refused(gradient(&store, var)?.sqr()?.sum_all()?.backward());
        }
        let layer = Linear::new(down.as_tensor().clone(), None)?;
        let h = Var::from_tensor(&numbers.tensor(&[3, 6], 1.0, dtype)?)?;
        let store = layer.forward(&h)?.sum_all()?.backward()?;
        for var in [&h, down] {
            assert_refused(gradient(&store, var)?.sqr()?.sum_all()?.backward());
        }
    }
    Ok(())
}
