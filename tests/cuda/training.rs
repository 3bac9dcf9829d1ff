//! Blocks and linear layers of variables: gradients in every dtype and layout.

use std::collections::HashMap;

use anyhow::{Context, Result, ensure};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Module, Tensor, Var};
use candle_swiglu::{FfnConfig, FusedOrder, GateUp, Linear, SwiGluFfn, Weights, silu_mul};

use super::common::{
    Block, FLOATS, Numbers, bits, check_within, integers, pack, rms_error, unit_roundoff, values,
    weights,
};
use super::{cuda, sum_roundoff};

pub(super) type Vars = HashMap<String, Var>;

/// Variables on the device with the values of these tensors.
pub(super) fn vars(tensors: &HashMap<String, Tensor>, device: &Device) -> Result<Vars> {
    let var = |t: &Tensor| anyhow::Ok(Var::from_tensor(&t.to_device(device)?)?);
    tensors.iter().map(|(name, t)| Ok((name.clone(), var(t)?))).collect()
}

/// A block of the tensors that `take` returns, with gate and up in one tensor if there is an order.
pub(super) fn build(
    cfg: &FfnConfig,
    order: Option<FusedOrder>,
    take: impl Fn(&str) -> Option<Tensor>,
) -> Result<SwiGluFfn> {
    let get = |name: &str| take(name).with_context(|| format!("no {name}"));
    let gate_up = match order {
        Some(order) => GateUp::fused(get("gate_up_proj.weight")?, take("gate_up_proj.bias"), order),
        None => GateUp::separate(
            get("gate_proj.weight")?,
            get("up_proj.weight")?,
            take("gate_proj.bias"),
            take("up_proj.bias"),
        ),
    };
    let weights = Weights::new(gate_up, get("down_proj.weight")?, take("down_proj.bias"));
    let ffn = SwiGluFfn::from_weights(cfg, weights)?;
    ensure!(ffn.kernel() == "plain", "{}", ffn.kernel());
    Ok(ffn)
}

/// Gate and up of named tensors as rows of one.
fn fuse(tensors: &HashMap<String, Tensor>, order: FusedOrder) -> Result<HashMap<String, Tensor>> {
    let mut fused = tensors.clone();
    for kind in ["weight", "bias"] {
        let pair = fused
            .remove(&format!("gate_proj.{kind}"))
            .zip(fused.remove(&format!("up_proj.{kind}")));
        if let Some((gate, up)) = pair {
            fused.insert(format!("gate_up_proj.{kind}"), pack(&gate, &up, order)?);
        }
    }
    Ok(fused)
}

/// The rows of gate or of up.
fn unpack(fused: &Tensor, order: FusedOrder, gate: bool) -> Result<Tensor> {
    let i = fused.dim(0)? / 2;
    let rows: Vec<u32> = match order {
        FusedOrder::Interleaved => (0..i).map(|n| (2 * n + usize::from(!gate)) as u32).collect(),
        _ => {
            let first = gate == (order == FusedOrder::GateFirst);
            let start = if first { 0 } else { i };
            (start..start + i).map(|n| n as u32).collect()
        }
    };
    Ok(fused.index_select(&Tensor::new(rows, &Device::Cpu)?, 0)?)
}

fn gradient(store: &GradStore, var: &Tensor) -> Result<Tensor> {
    Ok(store.get(var).context("no gradient")?.to_device(&Device::Cpu)?)
}

/// All gradients of <y, dy>, with those of a fused tensor as gate's and up's.
fn gradients(
    ffn: &SwiGluFfn,
    vars: &Vars,
    order: Option<FusedOrder>,
    [x, dy]: [&Tensor; 2],
) -> Result<HashMap<String, Tensor>> {
    let store = (ffn.forward(x)? * dy)?.sum_all()?.backward()?;
    let mut all = HashMap::from([("dx".to_string(), gradient(&store, x)?)]);
    for (name, var) in vars {
        let found = gradient(&store, var)?;
        match (name.strip_prefix("gate_up_proj."), order) {
            (Some(kind), Some(order)) => {
                all.insert(format!("dgate_proj.{kind}"), unpack(&found, order, true)?);
                all.insert(format!("dup_proj.{kind}"), unpack(&found, order, false)?);
            }
            _ => {
                all.insert(format!("d{name}"), found);
            }
        }
    }
    Ok(all)
}

const ORDERS: [Option<FusedOrder>; 4] =
    [None, Some(FusedOrder::GateFirst), Some(FusedOrder::UpFirst), Some(FusedOrder::Interleaved)];

/// Within the bounds of sums in any order, in every layout, with and without recomputation. The
/// bounds are doubled as in tests/trained.rs.
#[test]
fn gradients_of_variables() -> Result<()> {
    let Some(device) = cuda()? else { return Ok(()) };
    for (dtype, rows) in
        [DType::F64, DType::F32].into_iter().flat_map(|t| [1, 3, 40].map(|m| (t, m)))
    {
        let mut cfg = FfnConfig::new(33, 45).with_bias(rows != 40);
        if rows == 3 {
            cfg = cfg.with_limit(2.0).with_multipliers(0.7, 0.3);
        }
        let mut numbers = Numbers::new(51);
        let tensors = weights(&cfg, &mut numbers, dtype)?;
        let (x, dy) =
            (numbers.tensor(&[rows, 33], 2.0, dtype)?, numbers.tensor(&[rows, 33], 1.0, dtype)?);
        let exact = Block::new(&cfg, &tensors)?.gradients(&x, &dy, unit_roundoff(dtype))?;
        let (x, dy) = (Var::from_tensor(&x.to_device(&device)?)?, dy.to_device(&device)?);
        for (order, recompute) in
            ORDERS.into_iter().flat_map(|order| [(order, false), (order, true)])
        {
            let tensors = order.map_or(Ok(tensors.clone()), |order| fuse(&tensors, order))?;
            let vars = vars(&tensors, &device)?;
            let ffn = build(&cfg, order, |name| Some(vars.get(name)?.as_tensor().clone()))?;
            let found = gradients(&ffn.with_recompute(recompute), &vars, order, [&x, &dy])?;
            ensure!(found.len() == exact.len(), "{} gradients, {}", found.len(), exact.len());
            for (name, near) in &exact {
                let bounds: Vec<f64> = near.errors().iter().map(|error| 2.0 * error).collect();
                let what = format!("{dtype:?} M = {rows} {order:?} recompute {recompute} {name}");
                check_within(&what, &found[name], &near.values(), &bounds)?;
            }
        }
    }
    Ok(())
}

/// In bf16 and f16 the root mean square error is at most twice that of candle's graph around the
/// same gate.
#[test]
fn halves_are_no_less_accurate_than_candles_graph() -> Result<()> {
    let Some(device) = cuda()? else { return Ok(()) };
    let (cfg, rows) = (FfnConfig::new(72, 136).with_bias(true), 40);
    for dtype in [DType::BF16, DType::F16] {
        let mut numbers = Numbers::new(52);
        let tensors = weights(&cfg, &mut numbers, dtype)?;
        let (x, dy) =
            (numbers.tensor(&[rows, 72], 2.0, dtype)?, numbers.tensor(&[rows, 72], 1.0, dtype)?);
        let exact = Block::new(&cfg, &tensors)?.gradients(&x, &dy, 0.0)?;
        let (x, dy) = (Var::from_tensor(&x.to_device(&device)?)?, dy.to_device(&device)?);
        let mut vars = vars(&tensors, &device)?;
        let ffn = build(&cfg, None, |name| Some(vars.get(name)?.as_tensor().clone()))?;
        let project = |x: &Tensor, name: &str| -> Result<Tensor> {
            let y = x.matmul(&vars[&format!("{name}.weight")].t()?)?;
            Ok(y.broadcast_add(&vars[&format!("{name}.bias")])?)
        };
        let h = silu_mul(&project(&x, "gate_proj")?, &project(&x, "up_proj")?)?;
        let theirs = (project(&h, "down_proj")? * &dy)?.sum_all()?.backward()?;
        let ours = (ffn.forward(&x)? * &dy)?.sum_all()?.backward()?;
        vars.insert("x".into(), x.clone());
        for (name, var) in &vars {
            let exact = exact[&format!("d{name}")].values();
            let error = |store| anyhow::Ok(rms_error(&values(&gradient(store, var)?)?, &exact));
            let (ours, theirs) = (error(&ours)?, error(&theirs)?);
            ensure!(ours <= 2.0 * theirs, "{dtype:?} {name}: error {ours:e}, candle's {theirs:e}");
        }
    }
    Ok(())
}

/// y, dx, dW and db of a linear layer within the bounds of sums in any order. The operands are
/// multiples of 2⁻¹⁵, so that the products in f64 are exact.
#[test]
fn linear_layers() -> Result<()> {
    let Some(device) = cuda()? else { return Ok(()) };
    for (dtype, rows) in FLOATS.into_iter().flat_map(|t| [1, 3, 40].map(|m| (t, m))) {
        let (out, k, mut numbers) = (45, 33, Numbers::new(53));
        let mut var = |dims: &[usize]| -> Result<Var> {
            Ok(Var::from_tensor(&numbers.tensor(dims, 1.0, dtype)?.to_device(&device)?)?)
        };
        let (weight, bias, x) = (var(&[out, k])?, var(&[out])?, var(&[rows, k])?);
        let dy = var(&[rows, out])?.as_detached_tensor();
        let layer = Linear::new(weight.as_tensor().clone(), Some(bias.as_tensor().clone()))?;
        ensure!(layer.kernel() == "plain", "{}", layer.kernel());
        let y = layer.forward(&x)?;
        let store = (&y * &dy)?.sum_all()?.backward()?;
        let wide = |t: &Tensor| t.to_device(&Device::Cpu)?.to_dtype(DType::F64);
        let (w, b, x64, dy64) = (wide(&weight)?, wide(&bias)?, wide(&x)?, wide(&dy)?);
        let u = if dtype == DType::F64 { unit_roundoff(dtype) } else { sum_roundoff(dtype) };
        let check = |what: &str,
                     found: &Tensor,
                     (a, b): (&Tensor, &Tensor),
                     bias: Option<&Tensor>|
         -> Result<()> {
            let (mut exact, mut size) = (a.matmul(b)?, a.abs()?.matmul(&b.abs()?)?);
            let product = exact.abs()?;
            if let Some(bias) = bias {
                (exact, size) = (exact.broadcast_add(bias)?, size.broadcast_add(&bias.abs()?)?);
            }
            let gamma = (a.dim(1)? + 1) as f64 * u;
            let tiny = if dtype == DType::F64 { 0.0 } else { 2f64.powi(-25) };
            // The product is rounded, and the sum with the bias.
            let bounds: Vec<f64> = values(&exact)?
                .iter()
                .zip(values(&product)?.iter().zip(values(&size)?))
                .map(|(y, (p, size))| {
                    1.01 * (gamma * size + unit_roundoff(dtype) * (y.abs() + p)) + tiny
                })
                .collect();
            check_within(
                &format!("{dtype:?} M = {rows} {what}"),
                found,
                &values(&exact)?,
                &bounds,
            )?;
            Ok(())
        };
        let ones = Tensor::ones((1, rows), DType::F64, &Device::Cpu)?;
        check("y", &y.to_device(&Device::Cpu)?, (&x64, &w.t()?.contiguous()?), Some(&b))?;
        check("dx", &gradient(&store, &x)?, (&dy64, &w), None)?;
        check("dW", &gradient(&store, &weight)?, (&dy64.t()?.contiguous()?, &x64), None)?;
        check("db", &gradient(&store, &bias)?, (&ones, &dy64), None)?;
    }
    Ok(())
}

/// x, dy and variables with gaps between their rows, or transposed, give the same bits. They are
/// integers, whose sums are exact in any order.
#[test]
fn operands_of_any_layout() -> Result<()> {
    let Some(device) = cuda()? else { return Ok(()) };
    let (rows, h, i) = (5, 24, 40);
    let mut numbers = Numbers::new(54);
    let mut var = |dims: &[usize]| -> Result<Var> {
        Ok(Var::from_tensor(&integers(&mut numbers, dims, DType::F32)?.to_device(&device)?)?)
    };
    // gate has rows with gaps, up is transposed, down is contiguous.
    let vars = [var(&[i, h + 3])?, var(&[h, i])?, var(&[h, i])?, var(&[rows, h + 1])?];
    let dy = var(&[h, rows])?.as_detached_tensor();
    let views = [
        vars[0].narrow(1, 2, h)?,
        vars[1].t()?,
        vars[2].as_tensor().clone(),
        vars[3].narrow(1, 1, h)?,
    ];
    let copies: Vec<Var> = views
        .iter()
        .map(|view| Ok(Var::from_tensor(&view.detach().force_contiguous()?)?))
        .collect::<Result<_>>()?;
    let run = |[gate, up, down, x]: [Tensor; 4], dy: &Tensor| -> Result<GradStore> {
        let cfg = FfnConfig::new(h, i).with_activation(candle_swiglu::GluActivation::Relu);
        let weights = Weights::new(GateUp::separate(gate, up, None, None), down, None);
        let ffn = SwiGluFfn::from_weights(&cfg, weights)?;
        Ok((ffn.forward(&x)? * dy)?.sum_all()?.backward()?)
    };
    let found = run(views, &dy.t()?)?;
    let own = |n: usize| copies[n].as_tensor().clone();
    let expected = run([own(0), own(1), own(2), own(3)], &dy.t()?.contiguous()?)?;
    let cut = [
        gradient(&found, &vars[0])?.narrow(1, 2, h)?,
        gradient(&found, &vars[1])?.t()?,
        gradient(&found, &vars[2])?,
        gradient(&found, &vars[3])?.narrow(1, 1, h)?,
    ];
    for (n, (found, var)) in cut.iter().zip(&copies).enumerate() {
        assert_eq!(bits(&found.contiguous()?)?, bits(&gradient(&expected, var)?)?, "operand {n}");
    }
    Ok(())
}

/// `candle_swiglu::backward` has the gradients of `Tensor::backward`.
#[test]
fn the_direct_backward_pass() -> Result<()> {
    let Some(device) = cuda()? else { return Ok(()) };
    for dtype in [DType::F32, DType::BF16] {
        let (cfg, mut numbers) = (FfnConfig::new(12, 30).with_bias(true), Numbers::new(55));
        let vars = vars(&weights(&cfg, &mut numbers, dtype)?, &device)?;
        let ffn = build(&cfg, None, |name| Some(vars.get(name)?.as_tensor().clone()))?;
        let x = numbers.tensor(&[7, 12], 1.0, dtype)?.to_device(&device)?;
        let loss = ffn.forward(&ffn.forward(&x)?)?.sqr()?.sum_all()?; // each variable twice
        let (expected, found) = (loss.backward()?, candle_swiglu::backward(&loss)?);
        for (name, var) in &vars {
            let (found, expected) = (gradient(&found, var)?, gradient(&expected, var)?);
            assert_eq!(values(&found)?, values(&expected)?, "{dtype:?} {name}");
        }
    }
    Ok(())
}
