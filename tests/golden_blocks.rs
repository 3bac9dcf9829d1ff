//! Blocks and gates compared with PyTorch and transformers (tests/golden/README.md), through the
//! public API. There are three measures, and none of them has a chosen tolerance:
//!
//! 1. f32 and f64, element by element: a bound of the rounding error. A sum of n products, in any
//!    order, is within n·u·Σ|a||b| of the exact sum. `common::Block` propagates that bound through
//!    the activation and the second product. It is doubled where the expected value was computed in
//!    the same precision.
//! 2. f32, bf16 and f16: the root mean square error relative to f64 is at most twice that of
//!    transformers in the same dtype. The same holds for the largest error in bf16 and f16, where
//!    the few roundings to the dtype dominate.
//! 3. Gates, element by element: one rounding of the exact value and the documented units before
//!    it.

use std::collections::HashMap;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, IndexOp, Tensor, Var};
use candle_nn::{Module, VarBuilder};
use candle_swiglu::{
    Biases, Family, FfnConfig, FusedOrder, GateUp, Glu, GluActivation, SwiGluFfn, Weights,
    reference,
};

mod common;
use common::{
    Block, Golden, bits, check_within, glu_units, max_error, rms_error, slope_size, unit_roundoff,
    values,
};

type Tensors = HashMap<String, Tensor>;

// ---------------------------------------------------------------- 1. blocks

const PROJECTIONS: [&str; 4] = ["gate_proj.", "up_proj.", "down_proj.", "gate_up_proj."];

#[test]
fn llama_blocks() -> Result<()> {
    for golden in Golden::folder("mlp", 29)? {
        let ffn = check_named(&golden, "model.layers.0.mlp")?;
        let [h, i] =
            ["hidden_size", "intermediate_size"].map(|key| golden.text(key).map(str::to_string));
        assert_eq!([ffn.hidden_size().to_string(), ffn.intermediate_size().to_string()], [h?, i?]);
    }
    Ok(())
}

#[test]
fn blocks_of_other_families() -> Result<()> {
    let cases = [
        ("phi3", 1, "model.layers.31.mlp"),
        ("gemma", 1, "mlp"),
        ("falcon_h1", 2, "model.layers.3.feed_forward"),
    ];
    for (folder, files, prefix) in cases {
        for golden in Golden::folder(folder, files)? {
            check_named(&golden, prefix)?;
        }
    }
    Ok(())
}

/// Both experts. Other families have the names w1, w2 and w3 too; the `experts.N` in the prefix
/// decides.
#[test]
fn mixtral_experts() -> Result<()> {
    for golden in Golden::folder("mixtral", 1)? {
        let cfg = FfnConfig::from_json(&golden.config()?)?;
        let prefix = "model.layers.0.block_sparse_moe";
        let file = golden
            .tensors
            .iter()
            .map(|(name, tensor)| (format!("{prefix}.{name}"), tensor.clone()))
            .collect();
        let vb = VarBuilder::from_tensors(file, DType::F32, &Device::Cpu);
        for (expert, y) in [(0, "y_f64"), (1, "y_expert1_f64")] {
            let ffn = SwiGluFfn::new(&cfg, vb.pp(prefix).pp("experts").pp(expert))?;
            let weight =
                |from: &str| golden.tensor(&format!("experts.{expert}.{from}.weight")).cloned();
            let names =
                [("gate_proj.weight", "w1"), ("up_proj.weight", "w3"), ("down_proj.weight", "w2")];
            let weights = names
                .iter()
                .map(|(to, from)| Ok((to.to_string(), weight(from)?)))
                .collect::<Result<Tensors>>()?;
            let what = format!("{} expert {expert}", golden.name);
            let found = Found { y: ffn.forward(golden.tensor("x")?)?, gradients: Tensors::new() };
            check_block(&what, &golden, &cfg, &weights, y, &found)?;
        }
    }
    Ok(())
}

/// The expert of gpt-oss from three sources: copies (2I,H) and (H,I) under names, the same tensors
/// directly, and transposed views of the file's own (1,H,2I) and (1,I,H).
#[test]
fn gpt_oss_expert() -> Result<()> {
    for golden in Golden::folder("gpt_oss", 1)? {
        let cfg = FfnConfig::from_json(&golden.config()?)?;
        assert_eq!((cfg.limit, cfg.up_offset, cfg.biases), (Some(7.0), 1.0, Biases::ALL));
        assert_eq!(cfg.family, Some(Family::Interleaved));
        let x = Var::from_tensor(golden.tensor("x")?)?;
        let copies = projections(&golden.tensors);
        let named = vb(&copies, "model.layers.0.mlp", DType::F32);
        let vars: [Var; 4] =
            vars(&golden, ["gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"])?;
        let views = vars.each_ref().map(|var| var.get(0)); // (H,2I), (2I), (I,H), (H)
        let [gate_up, gate_up_bias, down, down_bias] = views;
        let viewed = interleaved(gate_up?.t()?, gate_up_bias?, down?.t()?, down_bias?);
        let copy = |name| golden.tensor(name).cloned();
        let copied = interleaved(
            copy("gate_up_proj.weight")?,
            copy("gate_up_proj.bias")?,
            copy("down_proj.weight")?,
            copy("down_proj.bias")?,
        );
        let ffns = [
            SwiGluFfn::new(&cfg, named)?,
            SwiGluFfn::from_weights(&cfg, copied)?,
            SwiGluFfn::from_weights(&cfg, viewed)?,
        ];
        let weights = separate(&copies, FusedOrder::Interleaved)?;
        for (ffn, layout) in ffns.iter().zip(["names", "copies", "views"]) {
            let what = format!("{} {layout}", golden.name);
            let y = ffn.forward(&x)?;
            let mut gradients = Tensors::new();
            if layout == "views" {
                let store = (&y * golden.tensor("dy")?)?.sum_all()?.backward()?;
                gradients.insert("dx".into(), store.get(&x).context("dx")?.clone());
                let names = [
                    "gate_up_proj.weight",
                    "gate_up_proj.bias",
                    "down_proj.weight",
                    "down_proj.bias",
                ];
                for (name, var) in names.iter().zip(&vars) {
                    let gradient = store.get(var).context("a weight without gradient")?.i(0)?;
                    gradients.insert(
                        format!("d{name}"),
                        if gradient.rank() == 2 { gradient.t()? } else { gradient },
                    );
                }
                gradients = separate(&gradients, FusedOrder::Interleaved)?;
            }
            check_block(&what, &golden, &cfg, &weights, "y_f64", &Found { y, gradients })?;
        }
    }
    Ok(())
}

fn vars<const N: usize>(golden: &Golden, names: [&str; N]) -> Result<[Var; N]> {
    let vars = names
        .iter()
        .map(|name| Ok(Var::from_tensor(golden.tensor(name)?)?))
        .collect::<Result<Vec<_>>>()?;
    vars.try_into().ok().context("as many variables as names")
}

fn interleaved(
    gate_up_proj: Tensor,
    bias: Tensor,
    down_proj: Tensor,
    down_bias: Tensor,
) -> Weights {
    let gate_up = GateUp::fused(gate_up_proj, Some(bias), FusedOrder::Interleaved);
    Weights::new(gate_up, down_proj, Some(down_bias))
}

/// A builder over a file that has `weights` under `prefix`, positioned at the prefix.
fn vb(weights: &Tensors, prefix: &str, dtype: DType) -> VarBuilder<'static> {
    let file =
        weights.iter().map(|(name, tensor)| (format!("{prefix}.{name}"), tensor.clone())).collect();
    VarBuilder::from_tensors(file, dtype, &Device::Cpu).pp(prefix)
}

fn projections(tensors: &Tensors) -> Tensors {
    let kept = tensors.iter().filter(|(name, _)| PROJECTIONS.iter().any(|p| name.starts_with(p)));
    kept.map(|(name, tensor)| (name.clone(), tensor.clone())).collect()
}

/// Splits `gate_up_proj.*` (2I,..), or the gradient of it, into `gate_proj.*` (I,..) and
/// `up_proj.*` (I,..).
fn separate(tensors: &Tensors, order: FusedOrder) -> Result<Tensors> {
    let mut all = Tensors::new();
    for (name, tensor) in tensors {
        if !name.contains("gate_up_proj.") {
            all.insert(name.clone(), tensor.clone());
            continue;
        }
        let i = tensor.dim(0)? / 2;
        let pick = |start: usize, step: usize| {
            let rows: Vec<u32> = (0..i).map(|row| (start + step * row) as u32).collect();
            tensor.contiguous()?.index_select(&Tensor::new(rows, &Device::Cpu)?, 0)
        };
        let (gate, up) = match order {
            FusedOrder::GateFirst => (pick(0, 1)?, pick(i, 1)?),
            FusedOrder::UpFirst => (pick(i, 1)?, pick(0, 1)?),
            FusedOrder::Interleaved => (pick(0, 2)?, pick(1, 2)?),
            other => anyhow::bail!("no rows of {other:?}"),
        };
        all.insert(name.replace("gate_up_proj", "gate_proj"), gate);
        all.insert(name.replace("gate_up_proj", "up_proj"), up);
    }
    Ok(all)
}

/// Builds the block from its config and its names. Checks the forward pass and, if the file has
/// gradients, the backward pass: with tracked weights, and with constants, where only x has a
/// gradient.
fn check_named(golden: &Golden, prefix: &str) -> Result<SwiGluFfn> {
    let (cfg, dtype) = (FfnConfig::from_json(&golden.config()?)?, golden.dtype()?);
    let weights = projections(&golden.tensors);
    let mut tracked = Tensors::new();
    for (name, tensor) in &weights {
        tracked.insert(name.clone(), Var::from_tensor(tensor)?.into_inner());
    }
    let x = Var::from_tensor(golden.tensor("x")?)?;
    let by_name: Tensors =
        tracked.clone().into_iter().chain([("x".to_string(), x.as_tensor().clone())]).collect();
    let only_x = Tensors::from([("x".to_string(), x.as_tensor().clone())]);
    let constant = SwiGluFfn::new(&cfg, vb(&weights, prefix, dtype))?;
    let plain = SwiGluFfn::new(&cfg, vb(&tracked, prefix, dtype))?;
    for (ffn, inputs) in [(&plain, by_name), (&constant, only_x)] {
        let what = format!("{} {}", golden.name, ffn.kernel());
        let y = ffn.forward(&x)?;
        assert_eq!(
            bits(&ffn.forward(golden.tensor("x")?)?)?,
            bits(&y)?,
            "{what}: x with and without tracking"
        );
        let mut gradients = Tensors::new();
        if let Ok(dy) = golden.tensor("dy") {
            let store = (&y * dy)?.sum_all()?.backward()?;
            for (name, tensor) in &inputs {
                let gradient =
                    store.get(tensor).with_context(|| format!("{what}: no gradient of {name}"))?;
                gradients.insert(format!("d{name}"), gradient.clone());
            }
        }
        let found = Found { y, gradients: separate(&gradients, FusedOrder::GateFirst)? };
        let expected = if dtype == DType::F64 { "y" } else { "y_f64" };
        check_block(
            &what,
            golden,
            &cfg,
            &separate(&weights, FusedOrder::GateFirst)?,
            expected,
            &found,
        )?;
    }
    Ok(constant)
}

/// Results of this crate. Gradients have the golden files' names of separate projections.
struct Found {
    y: Tensor,
    gradients: Tensors,
}

fn check_block(
    what: &str,
    golden: &Golden,
    cfg: &FfnConfig,
    weights: &Tensors,
    y: &str,
    found: &Found,
) -> Result<()> {
    let (dtype, x, exact) = (golden.dtype()?, golden.tensor("x")?, golden.tensor(y)?);
    ensure!(found.y.dtype() == dtype && found.y.dims() == x.dims(), "{what}: {:?}", found.y);
    let u = unit_roundoff(dtype);
    let block = Block::new(cfg, weights)?;
    // Checks the oracle itself against transformers in f64. gpt-oss's β = 1.702 is rounded to f32
    // here.
    let oracle_dtype =
        if matches!(cfg.activation, GluActivation::Swish { .. }) { DType::F32 } else { DType::F64 };
    let oracle = block.forward(x, unit_roundoff(oracle_dtype))?;
    check_within(what, exact, &oracle.values(), &doubled(oracle.errors()))?;
    if let Some(theirs) =
        golden.tensors.get("y_eager").or(golden.tensors.get("y")).filter(|_| y == "y_f64")
    {
        check_ratio(what, rms_error, &found.y, theirs, &values(exact)?)?;
        if dtype != DType::F32 {
            check_ratio(what, max_error, &found.y, theirs, &values(exact)?)?;
        }
    }
    if matches!(dtype, DType::BF16 | DType::F16) {
        return Ok(());
    }
    let bounds = block.forward(x, u)?.errors();
    let bounds = if dtype == DType::F64 { doubled(bounds) } else { bounds };
    let worst = check_within(what, &found.y, &values(exact)?, &bounds)?;
    eprintln!("{what}: y {worst:.4} of the bound");
    if found.gradients.is_empty() {
        return Ok(());
    }
    let order =
        if what.contains("gpt_oss") { FusedOrder::Interleaved } else { FusedOrder::GateFirst };
    let expected = separate(&golden_gradients(golden)?, order)?;
    let oracle = block.gradients(x, golden.tensor("dy")?, u)?;
    let complete = found.gradients.len() == oracle.len() || found.gradients.keys().eq(["dx"]);
    ensure!(complete && oracle.len() == expected.len(), "{what}: {:?}", found.gradients.keys());
    for (name, near) in oracle.iter().filter(|(name, _)| found.gradients.contains_key(*name)) {
        let (what, expected) = (format!("{what} {name}"), &expected[name]);
        let worst = check_within(
            &what,
            &found.gradients[name],
            &values(expected)?,
            &doubled(near.errors()),
        )?;
        eprintln!("{what}: {worst:.4} of the bound");
        if dtype == DType::F32 {
            check_ratio(&what, rms_error, &found.gradients[name], expected, &near.values())?;
        }
    }
    Ok(())
}

fn doubled(bounds: Vec<f64>) -> Vec<f64> {
    bounds.into_iter().map(|bound| 2.0 * bound).collect()
}

/// The file's gradients. Those of gpt-oss, (1,H,2I), (1,I,H), (1,2I) and (1,H), become gradients of
/// (2I,H), (H,I), (2I) and (H).
fn golden_gradients(golden: &Golden) -> Result<Tensors> {
    let mut all = Tensors::new();
    for (name, tensor) in &golden.tensors {
        let Some(of) = name.strip_prefix('d').filter(|of| {
            *of == "x" || PROJECTIONS.iter().any(|p| of.starts_with(&p[..p.len() - 1]))
        }) else {
            continue;
        };
        match (of.strip_suffix("_bias"), tensor.rank()) {
            (Some(projection), 2) => all.insert(format!("d{projection}.bias"), tensor.i(0)?),
            (None, 3) => all.insert(format!("{name}.weight"), tensor.i(0)?.t()?),
            _ => all.insert(name.clone(), tensor.clone()),
        };
    }
    Ok(all)
}

/// Checks that the error is at most twice that of transformers in the same dtype.
fn check_ratio(
    what: &str,
    norm: fn(&[f64], &[f64]) -> f64,
    found: &Tensor,
    theirs: &Tensor,
    exact: &[f64],
) -> Result<()> {
    let (ours, theirs) = (norm(&values(found)?, exact), norm(&values(theirs)?, exact));
    eprintln!("{what}: error {:.3} of transformers'", ours / theirs);
    ensure!(ours <= 2.0 * theirs, "{what}: error {ours:e}, transformers' {theirs:e}");
    Ok(())
}

// ---------------------------------------------------------------- 2. gates

#[test]
fn pair_operations() -> Result<()> {
    for golden in Golden::folder("glu", 32)? {
        let op = pair_op(&golden)?;
        let suffix = if golden.dtype()? == DType::F64 { "" } else { "_f64" };
        for set in ["", "special_"] {
            let [gate, up, dy] =
                ["gate", "up", "dy"].map(|name| golden.tensor(&format!("{set}{name}")));
            let (gate, up, dy) = (Var::from_tensor(gate?)?, Var::from_tensor(up?)?, dy?);
            let out = op.mul(&gate, &up)?;
            let store = (&out * dy)?.sum_all()?.backward()?;
            let found = [Some(&out), store.get(&gate), store.get(&up)];
            for (name, found) in ["out", "dgate", "dup"].into_iter().zip(found) {
                let what = format!("{} {set}{name}", golden.name);
                let exact = golden.tensor(&format!("{set}{name}{suffix}"))?;
                let inputs = [values(&gate)?, values(&up)?, values(dy)?];
                check_pair(&what, &op, name, &inputs, found.with_context(|| what.clone())?, exact)?;
            }
        }
        let (gate, up) = (golden.tensor("inf_gate")?, golden.tensor("inf_up")?);
        let inputs = [values(gate)?, values(up)?, vec![]];
        let exact = golden.tensor(&format!("inf_out{suffix}"))?;
        check_pair(
            &format!("{} inf_out", golden.name),
            &op,
            "out",
            &inputs,
            &op.mul(gate, up)?,
            exact,
        )?;
    }
    Ok(())
}

fn pair_op(golden: &Golden) -> Result<Glu> {
    let number = |key| Ok::<f32, anyhow::Error>(golden.text(key)?.parse()?);
    Ok(match golden.text("activation")? {
        "silu" => Glu::new(GluActivation::Silu),
        "swish" => Glu::new(GluActivation::Swish { beta: number("beta")? }),
        "sigmoid" => Glu::new(GluActivation::Sigmoid),
        "relu" => Glu::new(GluActivation::Relu),
        "gelu" => Glu::new(GluActivation::Gelu),
        "gelu_tanh" => Glu::new(GluActivation::GeluTanh),
        "identity" => Glu::new(GluActivation::Identity),
        "gpt_oss" => Glu::new(GluActivation::Swish { beta: number("alpha")? })
            .with_limit(number("limit")?)
            .with_up_offset(1.0),
        other => anyhow::bail!("no activation for {other}"),
    })
}

/// `inputs`: gate, up, dy. NaN and ∞ must be found where they are expected. ∞ is allowed where the
/// dtype may overflow. Other values must be within [`pair_bound`].
fn check_pair(
    what: &str,
    op: &Glu,
    name: &str,
    inputs: &[Vec<f64>; 3],
    found: &Tensor,
    exact: &Tensor,
) -> Result<()> {
    let (dtype, found, exact) = (found.dtype(), values(found)?, values(exact)?);
    ensure!(
        !exact.is_empty() && found.len() == exact.len(),
        "{what}: {} elements, expected {}",
        found.len(),
        exact.len()
    );
    let mut worst = 0f64;
    for (i, (&found, &exact)) in found.iter().zip(&exact).enumerate() {
        let at = inputs.each_ref().map(|values| values.get(i).copied().unwrap_or(f64::NAN));
        let bound = pair_bound(op, name, at, exact, dtype);
        let overflows = exact.abs() + bound >= largest(dtype) * (1.0 + 0.5 * unit_roundoff(dtype));
        // Values that only PyTorch produces: its ReLU and clamp mask a gradient even if it is NaN,
        // and its act(-∞) is NaN where the limit is 0.
        let theirs_alone = match name {
            "dgate" => exact == 0.0 && found.is_nan() && (at[0].is_nan() || at[1].is_nan()),
            "dup" => at[0] == f64::NEG_INFINITY || (op.limit.is_some() && at[1].is_nan()),
            _ => false,
        };
        let close = if exact.is_nan() || theirs_alone {
            found.is_nan() || theirs_alone
        } else if found.is_infinite() || exact.is_infinite() {
            found.is_infinite()
                && found.signum() == exact.signum()
                && (exact.is_infinite() || overflows)
        } else {
            ensure!(bound.is_finite(), "{what} at gate, up, dy = {at:?}: the bound is not finite");
            worst = worst.max((found - exact).abs() / bound);
            (found - exact).abs() <= bound
        };
        ensure!(
            close,
            "{what} at gate, up, dy = {at:?}: {found:e}, expected {exact:e}, bound {bound:e}"
        );
    }
    eprintln!("{what}: {worst:.3} of the bound");
    Ok(())
}

/// The sum of four errors: one rounding to the dtype; the documented error of the f32 (f64)
/// computation before it; the loss where numbers or σ itself are denormal; and PyTorch's own f64
/// error in the tails, where 1 + erf, 1 + tanh and 1 - σ cancel.
fn pair_bound(op: &Glu, name: &str, [gate, up, dy]: [f64; 3], exact: f64, dtype: DType) -> f64 {
    let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let limit = op.limit.map_or(f64::INFINITY, f64::from);
    let (g, up) = (gate.min(limit), up.clamp(-limit, limit) + f64::from(op.up_offset));
    // The other factors, and the size of the terms whose sum is act or act'.
    let (others, size) = match name {
        "out" => (up, reference::activation(op.activation, g).0.abs()),
        "dgate" if gate >= limit => return 0.0,
        "dgate" => (dy * up, slope_size(op.activation, g)),
        _ => (dy, reference::activation(op.activation, g).0.abs()),
    };
    let plain = op.limit.is_none();
    let units = glu_units(op.activation, g)
        + if plain { 0.0 } else { 2.0 }
        + if name == "dgate" { 4.0 } else { 0.0 };
    let rounding = if dtype == wide { 0.0 } else { unit_roundoff(dtype) * exact.abs() };
    let computing = units * unit_roundoff(wide) * others.abs() * size;
    // candle adds gradients up, and its bf16 sum flushes denormals to 0.
    let flushed = if dtype == DType::BF16 && name != "out" { 2f64.powi(-126) } else { 0.0 };
    let denormal = flushed
        + smallest(dtype)
        + smallest(wide) * (2.0 + g.abs().min(750.0)) * (1.0 + others.abs());
    let x = g.abs().min(40.0); // above, PyTorch's σ, erf and tanh are exactly 0 or ±1
    let theirs = 2f64.powi(-52)
        * others.abs()
        * match op.activation {
            GluActivation::Gelu | GluActivation::GeluTanh => {
                (1.0 + x.min(10.0)) * (1.0 + x.min(10.0).powi(2))
            }
            GluActivation::Silu | GluActivation::Swish { .. } | GluActivation::Sigmoid
                if name == "dgate" =>
            {
                1.0 + x
            }
            _ => 0.0,
        };
    // β = 1.702 is rounded to f32, which is visible in f64.
    let beta = if dtype == DType::F64 && !plain {
        2f64.powi(-24) * (1.0 + g * g) * others.abs()
    } else {
        0.0
    };
    rounding + 1.01 * (computing + denormal) + theirs + beta
}

/// The largest finite number.
fn largest(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => f64::MAX,
        DType::F32 => f64::from(f32::MAX),
        DType::F16 => 65504.0,
        _ => (2.0 - 2f64.powi(-7)) * 2f64.powi(127),
    }
}

/// The smallest positive number.
fn smallest(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => f64::from_bits(1),
        DType::F32 => 2f64.powi(-149),
        DType::F16 => 2f64.powi(-24),
        _ => 2f64.powi(-133),
    }
}
