//! Blocks and linear layers with low-rank pairs: results and gradients against PEFT
//! (tests/golden/README.md) and against f64, merged weights, dtypes and layouts of x.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::{BTreeMap, HashMap};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Module;
use candle_swiglu::{FfnConfig, FfnLora, GateUp, Linear, Lora, LoraAdapter, SwiGluFfn, Weights};

mod common;
use common::{
    Block, Golden, Numbers, bits, check_within, golden_dir, rms_error, unit_roundoff, values,
    weights,
};

const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];
const CPU: Device = Device::Cpu;

// ---------------------------------------------------------------- helpers

fn pairs_of(lora: &FfnLora) -> [(&'static str, Option<&Lora>); 3] {
    let [gate, up, down] = PROJECTIONS;
    [(gate, lora.gate_proj.as_ref()), (up, lora.up_proj.as_ref()), (down, lora.down_proj.as_ref())]
}

/// The same pairs after `f` was applied to every A and B.
fn map(lora: &FfnLora, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<FfnLora> {
    let pair = |lora: &Option<Lora>| -> Result<Option<Lora>> {
        let Some(lora) = lora else { return Ok(None) };
        Ok(Some(Lora::new(f(lora.a())?, f(lora.b())?, lora.scale(), lora.dropout())?))
    };
    Ok(FfnLora {
        gate_proj: pair(&lora.gate_proj)?,
        up_proj: pair(&lora.up_proj)?,
        down_proj: pair(&lora.down_proj)?,
    })
}

fn variable(tensor: &Tensor) -> Result<Tensor> {
    Ok(Var::from_tensor(tensor)?.into_inner())
}

/// Pairs of these ranks (0 for none), with the scale of the number of the projection.
fn random_pairs(
    (h, i): (usize, usize),
    ranks: [usize; 3],
    numbers: &mut Numbers,
    dtype: DType,
) -> Result<FfnLora> {
    let mut pair = |r: usize, in_dim: usize, out_dim: usize, scale| -> Result<Option<Lora>> {
        if r == 0 {
            return Ok(None);
        }
        let a = numbers.tensor(&[r, in_dim], (3.0 / in_dim as f64).sqrt(), dtype)?;
        let b = numbers.tensor(&[out_dim, r], (3.0 / r as f64).sqrt(), dtype)?;
        Ok(Some(Lora::new(a, b, scale, 0.0)?))
    };
    Ok(FfnLora {
        gate_proj: pair(ranks[0], h, i, 0.5)?,
        up_proj: pair(ranks[1], h, i, 1.7)?,
        down_proj: pair(ranks[2], i, h, 2.0)?,
    })
}

fn weights_of(tensors: &HashMap<String, Tensor>) -> Weights {
    let get = |name: &str| tensors.get(name).cloned();
    let gate_up = GateUp::separate(
        get("gate_proj.weight").unwrap(),
        get("up_proj.weight").unwrap(),
        get("gate_proj.bias"),
        get("up_proj.bias"),
    );
    Weights::new(gate_up, get("down_proj.weight").unwrap(), get("down_proj.bias"))
}

fn adapted(cfg: &FfnConfig, base: &HashMap<String, Tensor>, lora: &FfnLora) -> Result<SwiGluFfn> {
    let mut ffn = SwiGluFfn::from_weights(cfg, weights_of(base))?;
    ffn.add_adapter("a", lora.clone())?;
    ffn.set_adapter("a")?;
    Ok(ffn)
}

fn oracle(cfg: &FfnConfig, base: &HashMap<String, Tensor>, lora: &FfnLora) -> Result<Block> {
    let pairs = pairs_of(lora).into_iter().filter_map(|(name, pair)| Some((name, pair?)));
    pairs
        .into_iter()
        .try_fold(Block::new(cfg, base)?, |block, (name, pair)| block.with_pair(name, pair))
}

/// y, and the gradients of <y, dy> for x and every A and B that are variables.
fn results(
    ffn: &SwiGluFfn,
    lora: &FfnLora,
    x: &Tensor,
    dy: &Tensor,
) -> Result<BTreeMap<String, Tensor>> {
    let x = Var::from_tensor(x)?;
    let y = ffn.forward(&x)?;
    let store = (&y * dy)?.sum_all()?.backward()?;
    let mut all = BTreeMap::from([("y".to_string(), y)]);
    all.insert("dx".into(), store.get(&x).context("no gradient of x")?.clone());
    for (name, pair) in pairs_of(lora) {
        let tensors = pair.map(|pair| [("lora_A", pair.a()), ("lora_B", pair.b())]);
        for (side, tensor) in tensors.into_iter().flatten() {
            let gradient =
                store.get(tensor).with_context(|| format!("no gradient of {name}.{side}"))?;
            all.insert(format!("d{name}.{side}"), gradient.clone());
        }
    }
    Ok(all)
}

/// Values and their error bounds.
type Bounded = (Vec<f64>, Vec<f64>);

/// The exact values of [`results`] with the errors that the unit roundoff u may cause.
fn exact_results(
    block: &Block,
    x: &Tensor,
    dy: &Tensor,
    u: f64,
) -> Result<BTreeMap<String, Bounded>> {
    let y = block.forward(x, u)?;
    let mut all = BTreeMap::from([("y".to_string(), (y.values(), y.errors()))]);
    for (name, near) in block.gradients(x, dy, u)? {
        all.insert(name, (near.values(), near.errors()));
    }
    Ok(all)
}

// ---------------------------------------------------------------- 1. PEFT

struct Case {
    golden: Golden,
    cfg: FfnConfig,
    base: HashMap<String, Tensor>,
}

impl Case {
    fn load(name: &str) -> Result<Self> {
        let golden =
            Golden::load(&golden_dir().join("peft").join(name).join("reference.safetensors"))?;
        let (intermediate_size, hidden_size) = golden.tensor("base.gate_proj")?.dims2()?;
        let base = |name: &str| -> Result<_> {
            Ok((format!("{name}.weight"), golden.tensor(&format!("base.{name}"))?.clone()))
        };
        let base = PROJECTIONS.into_iter().map(base).collect::<Result<_>>()?;
        Ok(Self { golden, cfg: FfnConfig::new(hidden_size, intermediate_size), base })
    }

    fn base_in(&self, dtype: DType) -> Result<HashMap<String, Tensor>> {
        let convert =
            |(name, tensor): (&String, &Tensor)| Ok((name.clone(), tensor.to_dtype(dtype)?));
        self.base.iter().map(convert).collect()
    }
}

fn lora_of(directory: &str, dtype: DType) -> Result<FfnLora> {
    let adapter = LoraAdapter::open(golden_dir().join("peft").join(directory), dtype, &CPU)?;
    Ok(FfnLora::from_adapter(&adapter, "model.layers.0.mlp")?)
}

const CASES: [&str; 5] = ["plain", "rslora", "patterns", "down_only", "bf16"];

/// y and all gradients are those of PEFT. Both programs compute within the error bound, so they
/// differ by at most twice as much.
#[test]
fn results_are_those_of_peft() -> Result<()> {
    for (name, dtype) in
        CASES.into_iter().flat_map(|name| [DType::F32, DType::F64].map(|d| (name, d)))
    {
        let (case, lora) = (Case::load(name)?, map(&lora_of(name, dtype)?, variable)?);
        let suffix = if dtype == DType::F64 { "_f64" } else { "" };
        let (x, dy) =
            (case.golden.tensor("x")?.to_dtype(dtype)?, case.golden.tensor("dy")?.to_dtype(dtype)?);
        let base = case.base_in(dtype)?;
        let exact =
            exact_results(&oracle(&case.cfg, &base, &lora)?, &x, &dy, unit_roundoff(dtype))?;
        let found = results(&adapted(&case.cfg, &base, &lora)?, &lora, &x, &dy)?;
        ensure!(found.len() == if name == "down_only" { 4 } else { 8 }, "{name}: {}", found.len());
        for (what, found) in &found {
            let expected = values(case.golden.tensor(&format!("{what}{suffix}"))?)?;
            let bounds: Vec<f64> = exact[what].1.iter().map(|error| 2.0 * error).collect();
            check_within(&format!("{name} {dtype:?} {what}"), found, &expected, &bounds)?;
        }
    }
    Ok(())
}

/// Two adapters at once: the second one on weights that contain the first. Merging rounds each
/// weight once more than PEFT does, which is one rounding beside those of its 21 or 45 products, so
/// the root mean square error of every result is of the size of PEFT's.
#[test]
fn two_adapters_are_those_of_peft() -> Result<()> {
    let case = Case::load("two")?;
    let (first, second) = (lora_of("two/first", DType::F32)?, lora_of("two/second", DType::F32)?);
    let mut ffn = adapted(&case.cfg, &case.base, &first)?.merge_and_unload()?;
    let lora = map(&second, variable)?;
    ffn.add_adapter("second", lora.clone())?;
    ffn.set_adapter("second")?;
    let (x, dy) = (case.golden.tensor("x")?, case.golden.tensor("dy")?);
    let found = results(&ffn, &lora, x, dy)?;
    for (what, found) in &found {
        let name = if what.contains("lora") { format!("{what}.second") } else { what.clone() };
        let (expected, wide) = (
            values(case.golden.tensor(&name)?)?,
            values(case.golden.tensor(&format!("{name}_f64"))?)?,
        );
        let theirs = rms_error(&expected, &wide);
        let ours = rms_error(&values(found)?, &wide);
        ensure!(ours <= 4.0 * theirs, "{name}: error {ours:e}, PEFT's {theirs:e}");
    }
    let unloaded = ffn.merge_and_unload()?.weights()?;
    check_weights(&unloaded, &case.golden, "merged")
}

fn check_weights(found: &Weights, golden: &Golden, prefix: &str) -> Result<()> {
    let GateUp::Separate { gate_proj, up_proj, .. } = &found.gate_up else {
        anyhow::bail!("fused")
    };
    for (name, tensor) in PROJECTIONS.into_iter().zip([gate_proj, up_proj, &found.down_proj]) {
        let expected = golden.tensor(&format!("{prefix}.{name}"))?;
        ensure!(bits(tensor)? == bits(expected)?, "{prefix}.{name}: other bits");
    }
    Ok(())
}

/// The weights after `merge_and_unload` are those of PEFT, bit for bit, and what the merged layers
/// compute is what a layer of these weights computes.
#[test]
fn merged_weights_are_those_of_peft() -> Result<()> {
    for (name, prefix, dtype, pair_dtype) in [
        ("plain", "merged", DType::F32, DType::F32),
        ("rslora", "merged", DType::F32, DType::F32),
        ("patterns", "merged", DType::F32, DType::F32),
        ("down_only", "merged", DType::F32, DType::F32),
        ("bf16", "merged_bf16_adapter", DType::F32, DType::BF16),
        ("bf16", "merged_bf16_base", DType::BF16, DType::F32),
        ("bf16", "merged_bf16_both", DType::BF16, DType::BF16),
    ] {
        let (case, lora) = (Case::load(name)?, lora_of(name, pair_dtype)?);
        let mut ffn = adapted(&case.cfg, &case.base_in(dtype)?, &lora)?;
        let x = case.golden.tensor("x")?.to_dtype(dtype)?;
        let before = bits(&ffn.forward(&x)?)?;
        let unloaded = ffn.merge_and_unload()?;
        check_weights(&unloaded.weights()?, &case.golden, prefix)?;
        assert_eq!((unloaded.adapters().count(), unloaded.active_adapter()), (0, None));
        let merged = bits(&unloaded.forward(&x)?)?;
        ffn.merge_adapter()?;
        assert_eq!(bits(&ffn.forward(&x)?)?, merged, "{name}");
        check_weights(&ffn.merge_and_unload()?.weights()?, &case.golden, prefix)?;
        ffn.unmerge_adapter()?;
        assert_eq!(bits(&ffn.forward(&x)?)?, before, "{name}");
        for projection in PROJECTIONS {
            let weight = case.base[&format!("{projection}.weight")].to_dtype(dtype)?;
            let mut layer = Linear::new(weight, None)?;
            let pairs = pairs_of(&lora);
            let Some(pair) = pairs.iter().find(|(name, _)| *name == projection).unwrap().1 else {
                continue;
            };
            layer.add_adapter("a", pair.clone())?;
            layer.set_adapter("a")?;
            let expected = case.golden.tensor(&format!("{prefix}.{projection}"))?;
            ensure!(
                bits(&layer.merge_and_unload()?.weight()?)? == bits(expected)?,
                "{name} {projection}"
            );
        }
    }
    Ok(())
}

// ---------------------------------------------------------------- 2. f64

/// (H, I), rows and ranks: edges of panels and chunks, ranks beyond a panel, pairs on some.
const SIZES: [((usize, usize), usize, [usize; 3]); 8] = [
    ((5, 7), 1, [1, 1, 1]),
    ((33, 70), 3, [3, 16, 33]),
    ((33, 70), 37, [16, 16, 16]),
    ((33, 70), 513, [4, 0, 0]),
    ((40, 17), 64, [0, 3, 0]),
    ((130, 96), 13, [0, 0, 33]),
    ((130, 96), 530, [16, 1, 3]),
    ((300, 17), 2, [33, 0, 16]),
];

/// In f32 y and every gradient are within twice the error bound of sums in any order, for constant
/// weights and for variables, kept and recomputed.
#[test]
fn f32_results_are_within_their_bounds() -> Result<()> {
    let (u, mut worst) = (unit_roundoff(DType::F32), 0f64);
    for (n, ((h, i), rows, ranks)) in SIZES.into_iter().enumerate() {
        let mut cfg = FfnConfig::new(h, i).with_bias(n % 2 == 1);
        if n % 3 == 0 {
            cfg = cfg.with_multipliers(-0.7, 0.3).with_limit(0.9).with_up_offset(1.0);
        }
        let mut numbers = Numbers::new(160 + n as u64);
        let base = weights(&cfg, &mut numbers, DType::F32)?;
        let lora = map(&random_pairs((h, i), ranks, &mut numbers, DType::F32)?, variable)?;
        let (x, dy) = (
            numbers.tensor(&[rows, h], 1.0, DType::F32)?,
            numbers.tensor(&[rows, h], 1.0, DType::F32)?,
        );
        let exact = exact_results(&oracle(&cfg, &base, &lora)?, &x, &dy, u)?;
        let variables = base.iter().map(|(name, w)| Ok((name.clone(), variable(w)?)));
        let variables = variables.collect::<Result<HashMap<_, _>>>()?;
        for (kind, weights) in [("constants", &base), ("variables", &variables)] {
            for recompute in [false, true] {
                let ffn = adapted(&cfg, weights, &lora)?.with_recompute(recompute);
                let found = results(&ffn, &lora, &x, &dy)?;
                for (name, found) in &found {
                    let (expected, errors) = &exact[name];
                    let bounds: Vec<f64> = errors.iter().map(|error| 2.0 * error).collect();
                    let what = format!("({h}, {i}) {rows} {ranks:?} {kind} {recompute} {name}");
                    worst = worst.max(check_within(&what, found, expected, &bounds)?);
                }
            }
            // Without a gradient the pairs are packed too.
            let constant = map(&lora, |tensor| Ok(tensor.detach()))?;
            let y = adapted(&cfg, weights, &constant)?.forward(&x)?;
            let (expected, errors) = &exact["y"];
            let bounds: Vec<f64> = errors.iter().map(|error| 2.0 * error).collect();
            check_within(&format!("{n} constant pairs on {kind}"), &y, expected, &bounds)?;
        }
    }
    eprintln!("{worst:.3} of the bound");
    Ok(())
}

/// Variables of the base get the gradients of a layer whose weights are `W + s·B·A`.
#[test]
fn variables_of_the_base_have_gradients() -> Result<()> {
    let (u, cfg, mut numbers) =
        (unit_roundoff(DType::F32), FfnConfig::new(33, 70), Numbers::new(5));
    let base = weights(&cfg, &mut numbers, DType::F32)?;
    let lora = map(&random_pairs((33, 70), [3, 4, 5], &mut numbers, DType::F32)?, variable)?;
    let (x, dy) =
        (numbers.tensor(&[9, 33], 1.0, DType::F32)?, numbers.tensor(&[9, 33], 1.0, DType::F32)?);
    let exact = oracle(&cfg, &base, &lora)?.gradients(&x, &dy, u)?;
    let variables = base.iter().map(|(name, w)| Ok((name.clone(), variable(w)?)));
    let variables = variables.collect::<Result<HashMap<_, _>>>()?;
    let ffn = adapted(&cfg, &variables, &lora)?;
    let store = (ffn.forward(&x)? * &dy)?.sum_all()?.backward()?;
    for (name, var) in &variables {
        let near = &exact[&format!("d{name}")];
        let bounds: Vec<f64> = near.errors().iter().map(|error| 2.0 * error).collect();
        check_within(name, store.get(var).context("no gradient")?, &near.values(), &bounds)?;
    }
    Ok(())
}

/// x·Wᵀ + s·(x·Aᵀ)·Bᵀ in candle's operations and in x's dtype.
fn project(x: &Tensor, weight: &Tensor, pair: Option<&Lora>) -> candle_core::Result<Tensor> {
    let y = x.matmul(&weight.t()?)?;
    let Some(pair) = pair else { return Ok(y) };
    let low = x.matmul(&pair.a().to_dtype(x.dtype())?.t()?)?;
    y + (low.matmul(&pair.b().to_dtype(x.dtype())?.t()?)? * pair.scale())?
}

/// In 16 bits the root mean square errors of y and all gradients are at most twice those of
/// candle's operations, for pairs in 16 bits and for pairs in f32 that candle's operations round.
#[test]
fn halves_are_no_less_accurate_than_composed_operations() -> Result<()> {
    let (h, i) = (40, 100);
    for (n, (dtype, rows)) in [DType::BF16, DType::F16]
        .into_iter()
        .flat_map(|d| [1, 37, 520].map(|rows| (d, rows)))
        .enumerate()
    {
        for pair_dtype in [dtype, DType::F32] {
            let (cfg, mut numbers) = (FfnConfig::new(h, i), Numbers::new(270 + n as u64));
            let base = weights(&cfg, &mut numbers, dtype)?;
            let lora =
                map(&random_pairs((h, i), [16, 5, 33], &mut numbers, pair_dtype)?, variable)?;
            let x = Var::from_tensor(&numbers.tensor(&[rows, h], 2.0, dtype)?)?;
            let dy = numbers.tensor(&[rows, h], 1.0, dtype)?;
            let exact = exact_results(&oracle(&cfg, &base, &lora)?, &x, &dy, 0.0)?;
            let ours = results(&adapted(&cfg, &base, &lora)?, &lora, &x, &dy)?;

            let weight = |name: &str| &base[&format!("{name}.weight")];
            let gate = project(&x, weight("gate_proj"), lora.gate_proj.as_ref())?;
            let up = project(&x, weight("up_proj"), lora.up_proj.as_ref())?;
            let h = (gate.silu()? * up)?;
            let y = project(&h, weight("down_proj"), lora.down_proj.as_ref())?;
            let store = (&y * &dy)?.sum_all()?.backward()?;
            let theirs = |name: &str| -> Result<Tensor> {
                let (projection, side) = match name {
                    "y" => return Ok(y.clone()),
                    "dx" => return Ok(store.get(&x).context("dx")?.clone()),
                    _ => name[1..].split_once('.').context("a name with a dot")?,
                };
                let pair = pairs_of(&lora).into_iter().find(|(name, _)| *name == projection);
                let pair = pair.and_then(|(_, pair)| pair).context("a pair")?;
                let tensor = if side == "lora_A" { pair.a() } else { pair.b() };
                Ok(store.get(tensor).context("a gradient")?.clone())
            };
            for (name, ours) in &ours {
                let theirs = theirs(name)?;
                assert_eq!(ours.dtype(), theirs.dtype(), "{name}");
                let exact = &exact[name].0;
                let (ours, theirs) =
                    (rms_error(&values(ours)?, exact), rms_error(&values(&theirs)?, exact));
                let what = format!("{dtype:?}, pairs in {pair_dtype:?}, {rows} rows, {name}");
                ensure!(ours <= 2.0 * theirs, "{what}: error {ours:e}, candle's {theirs:e}");
            }
        }
    }
    Ok(())
}

// ---------------------------------------------------------------- 3. x, dtypes, linear layers

/// No rows; rows of a view; three dimensions; one dimension.
#[test]
fn any_x() -> Result<()> {
    let (cfg, mut numbers) = (FfnConfig::new(33, 70), Numbers::new(6));
    for dtype in [DType::F32, DType::F64, DType::BF16] {
        let base = weights(&cfg, &mut numbers, dtype)?;
        let lora = random_pairs((33, 70), [3, 0, 16], &mut numbers, dtype)?;
        for lora in [map(&lora, variable)?, lora] {
            let ffn = adapted(&cfg, &base, &lora)?;
            let y = ffn.forward(&Tensor::zeros((2, 0, 33), dtype, &CPU)?)?;
            assert_eq!((y.dims(), y.dtype()), (&[2, 0, 33][..], dtype));
            let x = numbers.tensor(&[33, 2, 7], 1.0, dtype)?.permute((2, 1, 0))?; // (7,2,33)
            assert!(!x.is_contiguous());
            let y = ffn.forward(&x)?;
            assert_eq!(y.dims(), [7, 2, 33]);
            assert_eq!(bits(&y)?, bits(&ffn.forward(&x.contiguous()?)?)?);
            let row = x.get(3)?.get(1)?;
            assert_eq!(ffn.forward(&row)?.dims(), [33]);
        }
    }
    Ok(())
}

/// x in a narrower dtype is widened; for x in a wider one the layer is. Merged or not.
#[test]
fn x_in_another_dtype() -> Result<()> {
    let (cfg, mut numbers) = (FfnConfig::new(33, 70), Numbers::new(7));
    for (dtype, x_dtype) in [
        (DType::F32, DType::BF16),
        (DType::BF16, DType::F32),
        (DType::F32, DType::F64),
        (DType::BF16, DType::F16),
    ] {
        let wide = if x_dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let base = weights(&cfg, &mut numbers, dtype)?;
        let lora = random_pairs((33, 70), [3, 4, 16], &mut numbers, dtype)?;
        let x = numbers.tensor(&[5, 33], 1.0, x_dtype)?;
        let mut ffn = adapted(&cfg, &base, &lora)?;
        let mut linear = Linear::new(base["gate_proj.weight"].clone(), None)?;
        linear.add_adapter("a", lora.gate_proj.clone().unwrap())?;
        linear.set_adapter("a")?;
        for merged in [false, true] {
            if merged {
                ffn.merge_adapter()?;
                linear.merge_adapter()?;
            }
            let expected = ffn.to_dtype(wide)?.forward(&x.to_dtype(wide)?)?.to_dtype(x_dtype)?;
            let y = ffn.forward(&x)?;
            assert_eq!(y.dtype(), x_dtype);
            assert_eq!(bits(&y)?, bits(&expected)?, "{dtype:?} {x_dtype:?}");
            let expected = linear.to_dtype(wide)?.forward(&x.to_dtype(wide)?)?.to_dtype(x_dtype)?;
            assert_eq!(bits(&linear.forward(&x)?)?, bits(&expected)?, "{dtype:?} {x_dtype:?}");
        }
        assert_eq!(ffn.dtype(), dtype);
    }
    Ok(())
}

/// y of a linear layer in f32 and f64 is within the bound of n + r + 4 roundings of the sum of the
/// absolute products, and its gradients are those of candle's operations within twice that.
#[test]
fn linear_layers() -> Result<()> {
    let mut numbers = Numbers::new(8);
    for (dtype, (rows, in_dim, out_dim), r) in
        [DType::F32, DType::F64].into_iter().flat_map(|dtype| {
            [((1, 33, 31), 1), ((3, 129, 65), 3), ((37, 40, 64), 16), ((515, 48, 17), 33)]
                .map(|(s, r)| (dtype, s, r))
        })
    {
        let weight = numbers.tensor(&[out_dim, in_dim], 1.0, dtype)?;
        let bias = numbers.tensor(&[out_dim], 1.0, dtype)?;
        let tensor =
            |numbers: &mut Numbers, dims: &[usize]| variable(&numbers.tensor(dims, 1.0, dtype)?);
        let pair = Lora::new(
            tensor(&mut numbers, &[r, in_dim])?,
            tensor(&mut numbers, &[out_dim, r])?,
            0.7,
            0.0,
        )?;
        let x = Var::from_tensor(&numbers.tensor(&[rows, in_dim], 1.0, dtype)?)?;
        let dy = numbers.tensor(&[rows, out_dim], 1.0, dtype)?;
        for base in [weight.clone(), variable(&weight)?] {
            let mut layer = Linear::new(base, Some(bias.clone()))?;
            layer.add_adapter("a", pair.clone())?;
            layer.set_adapter("a")?;
            let y = layer.forward(&x)?;
            let units = (in_dim + out_dim + rows + r + 4) as f64 * unit_roundoff(dtype);
            let tensors = [x.as_tensor(), &weight, &bias, pair.a(), pair.b(), &dy];
            let exact = linear_in_f64(tensors, pair.scale(), false)?;
            let sizes = linear_in_f64(tensors, pair.scale(), true)?;
            let store = (&y * &dy)?.sum_all()?.backward()?;
            let gradient = |tensor: &Tensor| store.get(tensor).cloned().context("no gradient");
            let found = [y.clone(), gradient(&x)?, gradient(pair.a())?, gradient(pair.b())?];
            for (n, ((found, exact), size)) in found.iter().zip(&exact).zip(&sizes).enumerate() {
                let bounds: Vec<f64> =
                    values(size)?.iter().map(|size| 2.0 * units * size).collect();
                check_within(
                    &format!("{dtype:?} {rows} {in_dim} {out_dim} {r} {n}"),
                    found,
                    &values(exact)?,
                    &bounds,
                )?;
            }
            if dtype == DType::F32 {
                let bounds: Vec<f64> =
                    values(&sizes[0])?.iter().map(|size| 2.0 * units * size).collect();
                check_within("forward_f32", &layer.forward_f32(&x)?, &values(&exact[0])?, &bounds)?;
            }
        }
    }
    Ok(())
}

/// y, dx, dA, dB in f64; or, if `absolute`, the sums of the absolute products.
fn linear_in_f64(
    tensors: [&Tensor; 6],
    scale: f64,
    absolute: bool,
) -> candle_core::Result<[Tensor; 4]> {
    let wide = |tensor: &Tensor| -> candle_core::Result<Tensor> {
        let tensor = tensor.detach().to_dtype(DType::F64)?;
        if absolute { tensor.abs() } else { Ok(tensor) }
    };
    let [x, w, bias, a, b, dy] = tensors.map(wide);
    let [x, w, bias, a, b, dy] = [x?, w?, bias?, a?, b?, dy?];
    let low = x.matmul(&a.t()?)?;
    let y = (x.matmul(&w.t()?)?.broadcast_add(&bias)? + (low.matmul(&b.t()?)? * scale)?)?;
    let du = (dy.matmul(&b)? * scale)?;
    let dx = (dy.matmul(&w)? + du.matmul(&a)?)?;
    Ok([y, dx, du.t()?.matmul(&x)?, (dy.t()?.matmul(&low)? * scale)?])
}

/// In 16 bits a linear layer is at most twice as far from f64 as candle's operations.
#[test]
fn linear_layers_in_16_bits() -> Result<()> {
    let mut numbers = Numbers::new(9);
    for (dtype, pair_dtype) in [
        (DType::BF16, DType::BF16),
        (DType::BF16, DType::F32),
        (DType::F16, DType::F16),
        (DType::F16, DType::F32),
    ] {
        for rows in [1, 40, 514] {
            let weight = numbers.tensor(&[65, 100], 0.2, dtype)?;
            let (a, b) = (
                numbers.tensor(&[7, 100], 0.2, pair_dtype)?,
                numbers.tensor(&[65, 7], 1.0, pair_dtype)?,
            );
            let pair = Lora::new(a, b, 1.5, 0.0)?;
            let (x, zero) =
                (numbers.tensor(&[rows, 100], 1.0, dtype)?, Tensor::zeros(65, dtype, &CPU)?);
            let mut layer = Linear::new(weight.clone(), None)?;
            layer.add_adapter("a", pair.clone())?;
            layer.set_adapter("a")?;
            let dy = Tensor::zeros((rows, 65), dtype, &CPU)?;
            let tensors = [&x, &weight, &zero, pair.a(), pair.b(), &dy];
            let exact = values(&linear_in_f64(tensors, pair.scale(), false)?[0])?;
            let theirs = rms_error(&values(&project(&x, &weight, Some(&pair))?)?, &exact);
            for y in [layer.forward(&x)?, layer.forward_f32(&x)?] {
                let ours = rms_error(&values(&y)?, &exact);
                ensure!(
                    ours <= 2.0 * theirs,
                    "{dtype:?} {pair_dtype:?} {rows}: {ours:e}, candle's {theirs:e}"
                );
            }
        }
    }
    Ok(())
}
