//! Blocks and linear layers of variables on the CPU: gradients at the edges of panels, blocks and
//! chunks, in every layout, with and without recomputation, and with parts of them frozen.

use std::collections::HashMap;

use anyhow::{Context, Result, ensure};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Module, Tensor, Var};
use candle_swiglu::{FfnConfig, FusedOrder, GateUp, GluActivation, Linear, SwiGluFfn, Weights};

mod common;
use common::{Block, Numbers, bits, check_within, pack, rms_error, unit_roundoff, values, weights};

/// Variables in f64 are multiplied by candle.
fn ensure_kernel(kernel: &str, dtype: DType) -> Result<()> {
    let expected = if dtype == DType::F64 { "plain" } else { "trained-" };
    ensure!(kernel.starts_with(expected), "{kernel} for {dtype:?}");
    Ok(())
}

/// Variables of a block, and the block.
struct Trained {
    vars: HashMap<String, Var>,
    ffn: SwiGluFfn,
}

impl Trained {
    fn new(cfg: &FfnConfig, tensors: &HashMap<String, Tensor>) -> Result<Self> {
        Self::with_layout(cfg, tensors, None)
    }

    /// Gate and up as rows of one variable `gate_up_proj`, if there is an order.
    fn with_layout(
        cfg: &FfnConfig,
        tensors: &HashMap<String, Tensor>,
        order: Option<FusedOrder>,
    ) -> Result<Self> {
        let mut vars = HashMap::new();
        let mut var = |name: &str, tensor: &Tensor| -> Result<Tensor> {
            let var = Var::from_tensor(tensor)?;
            let tensor = var.as_tensor().clone();
            vars.insert(name.to_string(), var);
            Ok(tensor)
        };
        let mut own = |name: &str| tensors.get(name).map(|t| var(name, t)).transpose();
        let (down, down_bias) = (own("down_proj.weight")?, own("down_proj.bias")?);
        let gate_up = match order {
            None => GateUp::separate(
                own("gate_proj.weight")?.context("gate")?,
                own("up_proj.weight")?.context("up")?,
                own("gate_proj.bias")?,
                own("up_proj.bias")?,
            ),
            Some(order) => {
                let mut both = |kind: &str| -> Result<Option<Tensor>> {
                    let Some(gate) = tensors.get(&format!("gate_proj.{kind}")) else {
                        return Ok(None);
                    };
                    let fused = pack(gate, &tensors[&format!("up_proj.{kind}")], order)?;
                    Ok(Some(var(&format!("gate_up_proj.{kind}"), &fused)?))
                };
                GateUp::fused(both("weight")?.context("gate_up")?, both("bias")?, order)
            }
        };
        let weights = Weights::new(gate_up, down.context("down")?, down_bias);
        let ffn = SwiGluFfn::from_weights(cfg, weights)?;
        ensure_kernel(ffn.kernel(), ffn.dtype())?;
        Ok(Self { vars, ffn })
    }

    /// The gradients of <y, dy>.
    fn gradients(&self, x: &Tensor, dy: &Tensor) -> Result<GradStore> {
        Ok((self.ffn.forward(x)? * dy)?.sum_all()?.backward()?)
    }
}

/// The shapes (H, I): within a panel, one beyond a panel, and several blocks of k.
const SIZES: [(usize, usize); 4] = [(5, 7), (33, 70), (130, 96), (300, 17)];
/// One row, an odd number, one beyond a unit's rows, and one beyond a chunk.
const ROWS: [usize; 5] = [1, 3, 33, 64, 513];

/// Every element is within the error bound of sums in any order. The bound is doubled, because the
/// oracle's bound of the exponential's error is that of the forward pass, and in f64 the oracle has
/// rounding errors of its own.
#[test]
fn gradients_are_within_their_bounds() -> Result<()> {
    [DType::F32, DType::F64].into_iter().try_for_each(check_gradients)
}

fn check_gradients(dtype: DType) -> Result<()> {
    let u = unit_roundoff(dtype);
    let mut worst = 0f64;
    for (n, ((h, i), rows)) in
        SIZES.into_iter().flat_map(|size| ROWS.map(|rows| (size, rows))).enumerate()
    {
        let mut cfg = FfnConfig::new(h, i).with_bias(n % 2 == 0);
        if n % 3 == 0 {
            cfg = cfg.with_multipliers(-0.7, 0.3).with_limit(0.5).with_up_offset(1.0);
        }
        let mut numbers = Numbers::new(60 + n as u64);
        let tensors = weights(&cfg, &mut numbers, dtype)?;
        let x = Var::from_tensor(&numbers.tensor(&[rows, h], 1.0, dtype)?)?;
        let dy = numbers.tensor(&[rows, h], 1.0, dtype)?;
        let exact = Block::new(&cfg, &tensors)?.gradients(&x, &dy, u)?;
        let mut trained = Trained::new(&cfg, &tensors)?;
        let store = trained.gradients(&x, &dy)?;
        trained.vars.insert("x".into(), x.clone());
        for (name, var) in &trained.vars {
            let near = &exact[&format!("d{name}")];
            let doubled: Vec<f64> = near.errors().iter().map(|error| 2.0 * error).collect();
            let found = store.get(var).with_context(|| format!("no gradient of {name}"))?;
            let what = format!("{dtype:?} {h} {i} {rows} {name}");
            worst = worst.max(check_within(&what, found, &near.values(), &doubled)?);
        }
    }
    eprintln!("{dtype:?}: {worst:.3} of the bound");
    Ok(())
}

/// The root mean square error of a product in bf16 or f16, relative to f64, is at most twice that
/// of candle's operations, with one row and with several chunks.
#[test]
fn halves_are_no_less_accurate_than_composed_operations() -> Result<()> {
    for (dtype, rows) in
        [DType::BF16, DType::F16].into_iter().flat_map(|d| [1, 37, 520].map(|rows| (d, rows)))
    {
        let (cfg, mut numbers) = (FfnConfig::new(40, 100), Numbers::new(71));
        let tensors = weights(&cfg, &mut numbers, dtype)?;
        let x = Var::from_tensor(&numbers.tensor(&[rows, 40], 3.0, dtype)?)?;
        let dy = numbers.tensor(&[rows, 40], 1.0, dtype)?;
        let exact = Block::new(&cfg, &tensors)?.gradients(&x, &dy, 0.0)?;
        for recompute in [false, true] {
            let mut trained = Trained::new(&cfg, &tensors)?;
            trained.ffn = trained.ffn.with_recompute(recompute);
            let project = |x: &Tensor, name: &str| -> candle_core::Result<Tensor> {
                x.matmul(&trained.vars[&format!("{name}.weight")].t()?)
            };
            let gate = project(&x, "gate_proj")?;
            let h = (gate.silu()? * project(&x, "up_proj")?)?;
            let theirs = (project(&h, "down_proj")? * &dy)?.sum_all()?.backward()?;
            let ours = trained.gradients(&x, &dy)?;
            trained.vars.insert("x".into(), x.clone());
            for (name, var) in &trained.vars {
                let exact = exact[&format!("d{name}")].values();
                let error = |store: &GradStore| -> Result<f64> {
                    Ok(rms_error(&values(store.get(var).context("no gradient")?)?, &exact))
                };
                let (ours, theirs) = (error(&ours)?, error(&theirs)?);
                let what = format!("{dtype:?}, {rows} rows, recompute {recompute}, {name}");
                ensure!(ours <= 2.0 * theirs, "{what}: error {ours:e}, candle's {theirs:e}");
            }
        }
    }
    Ok(())
}

/// In f32, what is kept is what would be computed again. A fused weight gets the gradients of
/// separate ones in its own order.
#[test]
fn recomputation_and_layouts_do_not_change_a_bit() -> Result<()> {
    for rows in [1, 70, 600] {
        let cfg = FfnConfig::new(36, 75).with_activation(GluActivation::Gelu).with_bias(rows != 70);
        let mut numbers = Numbers::new(81);
        let tensors = weights(&cfg, &mut numbers, DType::F32)?;
        let x = Var::from_tensor(&numbers.tensor(&[rows, 36], 1.0, DType::F32)?)?;
        let dy = numbers.tensor(&[rows, 36], 1.0, DType::F32)?;
        let separate = Trained::new(&cfg, &tensors)?;
        let expected = separate.gradients(&x, &dy)?;
        let of = |store: &GradStore, var: &Tensor| store.get(var).cloned().context("no gradient");
        let orders = [FusedOrder::GateFirst, FusedOrder::UpFirst, FusedOrder::Interleaved];
        for order in [None].into_iter().chain(orders.map(Some)) {
            let mut other = Trained::with_layout(&cfg, &tensors, order)?;
            other.ffn = other.ffn.with_recompute(true);
            let store = other.gradients(&x, &dy)?;
            assert_eq!(bits(&of(&store, &x)?)?, bits(&of(&expected, &x)?)?, "{order:?}");
            for (name, var) in &other.vars {
                let expected = match name.strip_prefix("gate_up_proj.") {
                    None => of(&expected, &separate.vars[name])?,
                    Some(kind) => {
                        let half =
                            |half: &str| of(&expected, &separate.vars[&format!("{half}.{kind}")]);
                        pack(&half("gate_proj")?, &half("up_proj")?, order.context("order")?)?
                    }
                };
                assert_eq!(bits(&of(&store, var)?)?, bits(&expected)?, "{order:?} {name} {rows}");
            }
        }
    }
    Ok(())
}

/// The same in f64, where layouts differ in the order of sums: `gradients_are_within_their_bounds`
/// and tests/backward.rs compare those.
#[test]
fn recomputation_in_f64_does_not_change_a_bit() -> Result<()> {
    let orders = [FusedOrder::GateFirst, FusedOrder::UpFirst, FusedOrder::Interleaved];
    for (order, rows) in
        [None].into_iter().chain(orders.map(Some)).flat_map(|order| [1, 37].map(|m| (order, m)))
    {
        let (cfg, mut numbers) = (FfnConfig::new(36, 75).with_bias(true), Numbers::new(82));
        let tensors = weights(&cfg, &mut numbers, DType::F64)?;
        let x = Var::from_tensor(&numbers.tensor(&[rows, 36], 1.0, DType::F64)?)?;
        let dy = numbers.tensor(&[rows, 36], 1.0, DType::F64)?;
        let mut trained = Trained::with_layout(&cfg, &tensors, order)?;
        let kept = trained.gradients(&x, &dy)?;
        trained.ffn = trained.ffn.with_recompute(true);
        let again = trained.gradients(&x, &dy)?;
        for (name, var) in trained.vars.iter().chain([(&"x".to_string(), &x)]) {
            let of = |store: &GradStore| bits(store.get(var).context("no gradient")?);
            assert_eq!(of(&again)?, of(&kept)?, "{order:?} {name} {rows}");
        }
    }
    Ok(())
}

/// Operands of other strides have the gradients of contiguous ones.
#[test]
fn strides_do_not_change_a_bit() -> Result<()> {
    let (cfg, mut numbers) = (FfnConfig::new(34, 66), Numbers::new(91));
    let tensors = weights(&cfg, &mut numbers, DType::F32)?;
    let x = numbers.tensor(&[40, 34], 1.0, DType::F32)?;
    let dy = numbers.tensor(&[40, 34], 1.0, DType::F32)?;
    let contiguous = Trained::new(&cfg, &tensors)?;
    let var = Var::from_tensor(&x)?;
    let expected = contiguous.gradients(&var, &dy)?;

    // Variables (in, out), whose transposes are the weights; x and dy with their columns first.
    let turned: HashMap<String, Var> = tensors
        .iter()
        .map(|(name, t)| Ok((name.clone(), Var::from_tensor(&t.t()?.contiguous()?)?)))
        .collect::<Result<_>>()?;
    let view = |name: &str| turned[&format!("{name}.weight")].t();
    let ffn = SwiGluFfn::from_tensors(view("gate_proj")?, view("up_proj")?, view("down_proj")?)?;
    let x = Var::from_tensor(&x.t()?.contiguous()?)?;
    let dy = dy.t()?.contiguous()?.t()?;
    let store = (ffn.forward(&x.t()?)? * &dy)?.sum_all()?.backward()?;
    let of = |store: &GradStore, var: &Tensor| store.get(var).cloned().context("no gradient");
    let gradient = |var: &Tensor| -> Result<_> { bits(&of(&store, var)?.t()?.contiguous()?) };
    assert_eq!(gradient(&x)?, bits(&of(&expected, &var)?)?);
    for (name, var) in &turned {
        assert_eq!(gradient(var)?, bits(&of(&expected, &contiguous.vars[name])?)?, "{name}");
    }
    Ok(())
}

/// Frozen tensors have no gradient, and the others have the one that they have if all are
/// variables. Every set with a variable among the weights and biases is tried.
#[test]
fn frozen_parts_get_no_gradient() -> Result<()> {
    const NAMES: [&str; 7] = [
        "x",
        "gate_proj.weight",
        "up_proj.weight",
        "down_proj.weight",
        "gate_proj.bias",
        "up_proj.bias",
        "down_proj.bias",
    ];
    for (dtype, set) in
        [DType::F32, DType::F64].into_iter().flat_map(|t| (2..128).map(move |n| (t, n)))
    {
        let (cfg, mut numbers) = (FfnConfig::new(20, 50).with_bias(true), Numbers::new(101));
        let tensors = weights(&cfg, &mut numbers, dtype)?;
        let x = Var::from_tensor(&numbers.tensor(&[9, 20], 1.0, dtype)?)?;
        let dy = numbers.tensor(&[9, 20], 1.0, dtype)?;
        let mut all = Trained::new(&cfg, &tensors)?;
        let expected = all.gradients(&x, &dy)?;
        all.vars.insert("x".into(), x);
        let take = |n: usize| match set >> n & 1 {
            1 => all.vars[NAMES[n]].as_tensor().clone(),
            _ => all.vars[NAMES[n]].as_detached_tensor(),
        };
        let gate_up = GateUp::separate(take(1), take(2), Some(take(4)), Some(take(5)));
        let ffn = SwiGluFfn::from_weights(&cfg, Weights::new(gate_up, take(3), Some(take(6))))?;
        let ffn = ffn.with_recompute(set % 3 == 0);
        let store = (ffn.forward(&take(0))? * &dy)?.sum_all()?.backward()?;
        for (n, name) in NAMES.into_iter().enumerate() {
            let found = store.get(&all.vars[name]).map(bits).transpose()?;
            let expected = (set >> n & 1 == 1).then(|| expected.get(&all.vars[name]));
            let expected = expected.map(|d| bits(d.context("no gradient")?)).transpose()?;
            assert_eq!(found, expected, "{dtype:?} {name}, variables {set:b}");
        }
    }
    Ok(())
}

/// Without rows the gradients are zeros of the right shapes, as in PyTorch.
#[test]
fn no_rows() -> Result<()> {
    let (cfg, mut numbers) = (FfnConfig::new(6, 10).with_bias(true), Numbers::new(111));
    for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
        let trained = Trained::new(&cfg, &weights(&cfg, &mut numbers, dtype)?)?;
        for dims in [vec![0, 6], vec![2, 0, 6]] {
            let x = Var::zeros(dims.as_slice(), dtype, &Device::Cpu)?;
            let y = trained.ffn.forward(&x)?;
            assert_eq!(y.dims(), dims);
            let store = y.sum_all()?.backward()?;
            for (name, var) in trained.vars.iter().chain([(&"x".to_string(), &x)]) {
                let gradient = store.get(var).with_context(|| format!("no gradient of {name}"))?;
                assert_eq!(gradient.dims(), var.dims());
                assert!(values(gradient)?.iter().all(|&value| value == 0.0), "{name}");
            }
        }
    }
    Ok(())
}

/// Several threads differentiate the same graph, each under its own loss.
#[test]
fn several_threads_differentiate_one_graph() -> Result<()> {
    let (cfg, mut numbers) = (FfnConfig::new(16, 40).with_bias(true), Numbers::new(121));
    let trained = Trained::new(&cfg, &weights(&cfg, &mut numbers, DType::F32)?)?;
    let x = Var::from_tensor(&numbers.tensor(&[8, 16], 1.0, DType::F32)?)?;
    let y = trained.ffn.forward(&x)?;
    let var = &trained.vars["down_proj.weight"];
    let run = |factor: f64| -> Result<_> {
        let store = (&y * factor)?.sum_all()?.backward()?;
        bits(store.get(var).context("no gradient")?)
    };
    let expected: Vec<_> = (1..=4).map(|n| run(f64::from(n))).collect::<Result<_>>()?;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (1..=4)
            .map(|n| {
                scope.spawn(move || (0..20).map(|_| run(f64::from(n))).collect::<Result<Vec<_>>>())
            })
            .collect();
        for (thread, expected) in threads.into_iter().zip(&expected) {
            let found = thread.join().map_err(|_| anyhow::anyhow!("a panic"))??;
            ensure!(found.iter().all(|found| found == expected), "another thread's gradient");
        }
        Ok(())
    })
}

/// dx = dy·W, dW = dyᵀ·x and db within the bounds of sums in any order. The operands are multiples
/// of 2⁻¹⁵, so that the products in f64 are exact.
#[test]
fn linear_layers() -> Result<()> {
    for (dtype, (out, k), rows) in [DType::F64, DType::F32, DType::BF16, DType::F16]
        .into_iter()
        .flat_map(|dtype| SIZES.into_iter().flat_map(move |s| ROWS.map(|rows| (dtype, s, rows))))
    {
        let mut numbers = Numbers::new(131);
        let mut var = |dims: &[usize]| -> Result<Var> {
            Ok(Var::from_tensor(&numbers.tensor(dims, 1.0, dtype)?)?)
        };
        let (weight, bias, x) = (var(&[out, k])?, var(&[out])?, var(&[rows, k])?);
        let dy = var(&[rows, out])?.as_detached_tensor();
        let layer = Linear::new(weight.as_tensor().clone(), Some(bias.as_tensor().clone()))?;
        ensure_kernel(layer.kernel(), dtype)?;
        let y = layer.forward(&x)?;
        let store = (&y * &dy)?.sum_all()?.backward()?;
        let sum_roundoff = unit_roundoff(if dtype == DType::F64 { dtype } else { DType::F32 });
        let tiny = if dtype == DType::F64 { 0.0 } else { 2f64.powi(-25) };
        let wide = |t: &Tensor| t.to_dtype(DType::F64);
        let (w, b, x64, dy64) = (wide(&weight)?, wide(&bias)?, wide(&x)?, wide(&dy)?);
        let product = |a: &Tensor, b: &Tensor, n: usize| -> Result<(Vec<f64>, Vec<f64>)> {
            let u = n as f64 * sum_roundoff;
            let errors = (a.abs()?.matmul(&b.abs()?)? * (u / (1.0 - u)))?;
            Ok((values(&a.matmul(b)?)?, values(&errors)?))
        };
        let check = |what: &str, found: &Tensor, (exact, errors): (Vec<f64>, Vec<f64>)| {
            let bounds: Vec<f64> = exact
                .iter()
                .zip(errors)
                .map(|(value, error)| error + (value.abs() + error) * unit_roundoff(dtype) + tiny)
                .collect();
            let what = format!("{dtype:?} ({out}, {k}) {rows} {what}");
            check_within(&what, found, &exact, &bounds)
        };
        let (y_exact, y_errors) = product(&x64, &w.t()?, k + 1)?;
        let y_exact = Tensor::from_vec(y_exact, (rows, out), &Device::Cpu)?.broadcast_add(&b)?;
        let y_errors = y_errors.iter().map(|error| error + 2.0 * sum_roundoff).collect();
        check("y", &y, (values(&y_exact)?, y_errors))?;
        let of = |var: &Var| store.get(var).context("no gradient");
        check("dx", of(&x)?, product(&dy64, &w, out)?)?;
        check("dW", of(&weight)?, product(&dy64.t()?, &x64, rows)?)?;
        let ones = Tensor::ones((rows, 1), DType::F64, &Device::Cpu)?;
        let (db, errors) = product(&dy64.t()?, &ones, rows)?;
        check("db", of(&bias)?, (db, errors))?;
    }
    Ok(())
}

/// An operation whose backward pass differentiates a graph of its own, as activation checkpointing
/// does.
struct Checkpointed(SwiGluFfn);

impl candle_core::CustomOp1 for Checkpointed {
    fn name(&self) -> &'static str {
        "checkpointed"
    }

    fn cpu_fwd(
        &self,
        x: &candle_core::CpuStorage,
        layout: &candle_core::Layout,
    ) -> candle_core::Result<(candle_core::CpuStorage, candle_core::Shape)> {
        Ok((x.clone(), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let x = Var::from_tensor(x)?;
        let inner = (self.0.forward(&x)? * dy)?.sum_all()?.backward()?;
        Ok(inner.get(&x).cloned())
    }
}

/// `candle_swiglu::backward` has the gradients of `Tensor::backward`: of variables that are used
/// once and several times, and around an operation that differentiates by itself.
#[test]
fn the_direct_backward_pass_has_the_same_gradients() -> Result<()> {
    [DType::F32, DType::F64].into_iter().try_for_each(check_direct)
}

fn check_direct(dtype: DType) -> Result<()> {
    let (cfg, mut numbers) = (FfnConfig::new(12, 30).with_bias(true), Numbers::new(141));
    let tensors = weights(&cfg, &mut numbers, dtype)?;
    let (trained, inner) = (Trained::new(&cfg, &tensors)?, Trained::new(&cfg, &tensors)?);
    let x = Var::from_tensor(&numbers.tensor(&[7, 12], 1.0, dtype)?)?;
    let h = trained.ffn.forward(&x)?.apply_op1(Checkpointed(inner.ffn.clone()))?;
    let loss = (trained.ffn.forward(&h)? + x.as_tensor())?.sqr()?.sum_all()?;
    let (expected, found) = (loss.backward()?, candle_swiglu::backward(&loss)?);
    for (name, var) in trained.vars.iter().chain([(&"x".to_string(), &x)]) {
        let gradient = |store: &GradStore| -> Result<Vec<f64>> {
            values(store.get(var).with_context(|| format!("no gradient of {name}"))?)
        };
        assert_eq!(gradient(&found)?, gradient(&expected)?, "{dtype:?} {name}");
    }
    assert!(inner.vars.values().all(|var| found.get(var).is_none()), "an inner graph's gradient");
    Ok(())
}

/// One matrix as gate and up gets the sum of both gradients. In another dtype the block still
/// computes gate and up again.
#[test]
fn shared_weights_and_other_dtypes() -> Result<()> {
    let mut numbers = Numbers::new(151);
    let mut var = |dims: &[usize]| -> Result<Var> {
        Ok(Var::from_tensor(&numbers.tensor(dims, 0.5, DType::F32)?)?)
    };
    let (both, down, x) = (var(&[10, 6])?, var(&[6, 10])?, var(&[4, 6])?);
    let (own, other) = (both.as_tensor().clone(), Var::from_tensor(&both.copy()?)?);
    let run = |up: &Tensor| -> Result<GradStore> {
        let down = down.as_tensor().clone();
        let ffn = SwiGluFfn::from_tensors(own.clone(), up.clone(), down)?.with_recompute(true);
        let wide = ffn.forward(&x.to_dtype(DType::F64)?)?.to_dtype(DType::F32)?;
        Ok((ffn.forward(&x)? + wide)?.sum_all()?.backward()?)
    };
    let (shared, separate) = (run(&own)?, run(&other)?);
    let of = |store: &GradStore, var: &Var| -> Result<Vec<f64>> {
        values(store.get(var).context("no gradient")?)
    };
    let (gate, up) = (of(&separate, &both)?, of(&separate, &other)?);
    let expected: Vec<f64> = gate.iter().zip(&up).map(|(gate, up)| gate + up).collect();
    let bound = 16.0 * unit_roundoff(DType::F32);
    let bounds: Vec<f64> =
        gate.iter().zip(&up).map(|(gate, up)| bound * (1.0 + gate.abs() + up.abs())).collect();
    check_within("both", shared.get(&both).context("no gradient")?, &expected, &bounds)?;
    Ok(())
}

/// More rows than fit in memory, by a view, are an error.
#[test]
fn more_rows_than_addresses() -> Result<()> {
    let var = |dims: (usize, usize)| -> Result<Tensor> {
        Ok(Var::zeros(dims, DType::F32, &Device::Cpu)?.into_inner())
    };
    let x = Tensor::zeros((1, 4), DType::F32, &Device::Cpu)?.broadcast_as((1 << 60, 4))?;
    let ffn = SwiGluFfn::from_tensors(var((8, 4))?, var((8, 4))?, var((4, 8))?)?;
    let errors = [ffn.forward(&x).err(), Linear::new(var((4, 4))?, None)?.forward(&x).err()];
    for error in errors {
        let message = error.context("expected an error")?.to_string();
        ensure!(message.contains("more than memory can address"), "{message}");
    }
    let wide = var((1, 1))?.broadcast_as((1 << 62, 1))?;
    let message = Linear::new(wide, None).err().context("expected an error")?.to_string();
    ensure!(message.contains("more than memory can address"), "{message}");
    Ok(())
}
