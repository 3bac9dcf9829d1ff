//! The adapters of a layer: names and families, switching, merging, training, dropout, and the
//! error of every broken rule.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::HashMap;

use anyhow::{Context, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Module, Optimizer, SGD, VarBuilder, VarMap};
use candle_swiglu::{
    Error, Family, FfnConfig, FfnLora, FusedOrder, GateUp, Linear, Lora, LoraAdapter, LoraConfig,
    SwiGluFfn, Weights, backward,
};

mod common;
use common::{Numbers, bits, check_within, pack, unit_roundoff, values, weights};

const CPU: Device = Device::Cpu;
const H: usize = 12;
const I: usize = 20;

// ---------------------------------------------------------------- helpers

fn pair(
    numbers: &mut Numbers,
    r: usize,
    in_dim: usize,
    out_dim: usize,
    dropout: f32,
) -> Result<Lora> {
    let a = numbers.tensor(&[r, in_dim], 0.5, DType::F32)?;
    let b = numbers.tensor(&[out_dim, r], 0.5, DType::F32)?;
    Ok(Lora::new(a, b, 1.5, dropout)?)
}

fn pairs(numbers: &mut Numbers, dropout: f32) -> Result<FfnLora> {
    Ok(FfnLora {
        gate_proj: Some(pair(numbers, 2, H, I, dropout)?),
        up_proj: Some(pair(numbers, 3, H, I, dropout)?),
        down_proj: Some(pair(numbers, 4, I, H, dropout)?),
    })
}

/// The same pair with variables.
fn trained(lora: &Lora) -> Result<Lora> {
    let variable = |tensor: &Tensor| Ok::<_, anyhow::Error>(Var::from_tensor(tensor)?.into_inner());
    Ok(Lora::new(variable(lora.a())?, variable(lora.b())?, lora.scale(), lora.dropout())?)
}

fn base_weights(numbers: &mut Numbers) -> Result<HashMap<String, Tensor>> {
    weights(&FfnConfig::new(H, I), numbers, DType::F32)
}

fn block(tensors: &HashMap<String, Tensor>) -> Result<SwiGluFfn> {
    let [gate, up, down] = ["gate_proj", "up_proj", "down_proj"]
        .map(|name| tensors[&format!("{name}.weight")].clone());
    Ok(SwiGluFfn::from_tensors(gate, up, down)?)
}

fn contains(error: &Error, parts: &[&str]) {
    let message = error.to_string();
    for part in parts {
        assert!(message.contains(part), "expected {part:?} in {message:?}");
    }
}

fn tensors_of(weights: &Weights) -> Vec<Tensor> {
    let GateUp::Separate { gate_proj, up_proj, .. } = &weights.gate_up else { return vec![] };
    vec![gate_proj.clone(), up_proj.clone(), weights.down_proj.clone()]
}

fn all_bits(weights: &Weights) -> Result<Vec<Vec<u64>>> {
    tensors_of(weights).iter().map(bits).collect()
}

/// Sums of at most 24 products and of values below 10, added in other orders: 24·10·2⁻²⁴ is 1.4e-5.
fn check_near(found: &Tensor, expected: &Tensor) -> Result<()> {
    let bounds = vec![2e-5; expected.elem_count()];
    check_within("another order of sums", found, &values(expected)?, &bounds)?;
    Ok(())
}

// ---------------------------------------------------------------- 1. which adapter computes

#[test]
fn switching() -> Result<()> {
    let mut numbers = Numbers::new(1);
    let mut ffn = block(&base_weights(&mut numbers)?)?;
    let x = numbers.tensor(&[3, H], 1.0, DType::F32)?;
    let y = |ffn: &SwiGluFfn| bits(&ffn.forward(&x).unwrap()).unwrap();
    let base = y(&ffn);
    ffn.add_adapter("b", pairs(&mut numbers, 0.0)?)?;
    ffn.add_adapter("a", pairs(&mut numbers, 0.0)?)?;
    ffn.add_adapter("none", FfnLora::default())?;
    assert_eq!(ffn.adapters().collect::<Vec<_>>(), ["a", "b", "none"]);
    assert_eq!((ffn.active_adapter(), y(&ffn)), (None, base.clone()), "adding activates nothing");
    ffn.set_adapter("a")?;
    let (clone, a) = (ffn.clone(), y(&ffn));
    ffn.set_adapter("b")?;
    let b = y(&ffn);
    assert_eq!(ffn.active_adapter(), Some("b"));
    assert!(a != base && b != base && a != b);
    assert_eq!(y(&clone), a, "a clone has its own choice");
    ffn.set_adapter("none")?;
    assert_eq!(y(&ffn), base);
    ffn.set_adapter("a")?;
    ffn.disable_adapters();
    assert_eq!((ffn.active_adapter(), y(&ffn)), (None, base.clone()));
    ffn.set_adapter("a")?;
    ffn.delete_adapter("b")?;
    assert_eq!((ffn.active_adapter(), y(&ffn)), (Some("a"), a.clone()));
    let lora = ffn.delete_adapter("a")?;
    assert_eq!((ffn.active_adapter(), y(&ffn)), (None, base));
    assert_eq!(lora.down_proj.context("a pair")?.a().dims(), [4, I]);
    assert_eq!(ffn.adapters().collect::<Vec<_>>(), ["none"]);
    assert!(format!("{clone:?}").contains("adapters"));
    Ok(())
}

#[test]
fn merging_and_switching() -> Result<()> {
    let mut numbers = Numbers::new(2);
    let tensors = base_weights(&mut numbers)?;
    let x = numbers.tensor(&[3, H], 1.0, DType::F32)?;
    let y = |ffn: &SwiGluFfn| bits(&ffn.forward(&x).unwrap()).unwrap();
    let variables = |(name, tensor): (&String, &Tensor)| {
        Ok((name.clone(), Var::from_tensor(tensor)?.into_inner()))
    };
    let variables = tensors.iter().map(variables).collect::<Result<HashMap<_, _>>>()?;
    for tensors in [&tensors, &variables] {
        let mut ffn = block(tensors)?;
        let before = all_bits(&ffn.weights()?)?;
        ffn.add_adapter("a", pairs(&mut numbers, 0.0)?)?;
        ffn.add_adapter("b", pairs(&mut numbers, 0.0)?)?;
        ffn.set_adapter("a")?;
        let a = y(&ffn);
        ffn.merge_adapter()?;
        let merged = y(&ffn);
        assert_eq!(all_bits(&ffn.weights()?)?, before, "weights are those of the base");
        let unloaded = ffn.merge_and_unload()?;
        assert_eq!(y(&unloaded), merged);
        assert!(all_bits(&unloaded.weights()?)? != before);
        assert!(tensors_of(&unloaded.weights()?).iter().all(|w| !w.is_variable()));
        assert_eq!(y(&ffn.freeze()?), merged);
        assert_eq!(y(&ffn.clone().with_recompute(true)), merged);
        ffn.unmerge_adapter()?;
        assert_eq!((ffn.active_adapter(), y(&ffn)), (Some("a"), a.clone()));
        ffn.merge_adapter()?;
        ffn.set_adapter("b")?;
        let b = y(&ffn);
        ffn.set_adapter("a")?;
        assert_eq!(y(&ffn), a, "another choice ends a merge");
        ffn.merge_adapter()?;
        ffn.set_training(true)?;
        assert_eq!(y(&ffn), merged);
        ffn.delete_adapter("a")?;
        assert_eq!((ffn.active_adapter(), all_bits(&ffn.weights()?)?), (None, before));
        ffn.set_adapter("b")?;
        assert_eq!(y(&ffn), b);
    }
    Ok(())
}

#[test]
fn switching_a_linear_layer() -> Result<()> {
    let mut numbers = Numbers::new(3);
    let mut layer = Linear::new(numbers.tensor(&[I, H], 1.0, DType::F32)?, None)?;
    let x = numbers.tensor(&[3, H], 1.0, DType::F32)?;
    let y = |layer: &Linear| bits(&layer.forward(&x).unwrap()).unwrap();
    let (base, rows) = (y(&layer), Tensor::new(&[3u32, 0], &CPU)?);
    let embedded = bits(&layer.embed(&rows)?)?;
    layer.add_adapter("a", pair(&mut numbers, 3, H, I, 0.5)?)?;
    assert_eq!(y(&layer), base);
    layer.set_adapter("a")?;
    let a = y(&layer);
    assert!(a != base);
    assert_eq!(bits(&layer.embed(&rows)?)?, embedded);
    assert_eq!(bits(&layer.forward_f32(&x)?)?, a);
    layer.merge_adapter()?;
    let merged = y(&layer);
    assert_eq!(y(&layer.merge_and_unload()?), merged);
    layer.unmerge_adapter()?;
    assert_eq!(y(&layer), a);
    assert_eq!((layer.active_adapter(), layer.adapters().count()), (Some("a"), 1));
    layer.set_training(true)?;
    assert!(y(&layer) != a, "half of the elements of x are dropped");
    layer.set_training(false)?;
    assert_eq!(y(&layer), a);
    layer.disable_adapters();
    assert_eq!(y(&layer), base);
    layer.set_adapter("a")?;
    layer.delete_adapter("a")?;
    assert_eq!((layer.active_adapter(), y(&layer)), (None, base));
    Ok(())
}

/// `freeze` keeps the adapters as constants; `to_dtype` keeps them in their own dtype.
#[test]
fn frozen_and_converted_layers() -> Result<()> {
    let mut numbers = Numbers::new(4);
    let (x, lora) = (numbers.tensor(&[3, H], 1.0, DType::F32)?, pairs(&mut numbers, 0.0)?);
    let lora = FfnLora { down_proj: Some(trained(lora.down_proj.as_ref().unwrap())?), ..lora };
    let mut ffn = block(&base_weights(&mut numbers)?)?;
    ffn.add_adapter("a", lora.clone())?;
    ffn.set_adapter("a")?;
    let frozen = ffn.freeze()?;
    assert_eq!(frozen.active_adapter(), Some("a"));
    check_near(&frozen.forward(&x)?, &ffn.forward(&x)?)?;
    assert!(ffn.forward(&x)?.track_op() && !frozen.forward(&x)?.track_op());
    let wide = ffn.to_dtype(DType::F64)?;
    assert_eq!((wide.dtype(), wide.active_adapter()), (DType::F64, Some("a")));
    let gradients = wide.forward(&x.to_dtype(DType::F64)?)?.sum_all()?.backward()?;
    let a = lora.down_proj.as_ref().unwrap().a();
    assert_eq!(gradients.get(a).context("a gradient")?.dtype(), DType::F32);

    let mut layer = Linear::new(numbers.tensor(&[I, H], 1.0, DType::F32)?, None)?;
    layer.add_adapter("a", trained(&pair(&mut numbers, 3, H, I, 0.0)?)?)?;
    layer.set_adapter("a")?;
    assert!(layer.forward(&x)?.track_op() && !layer.freeze()?.forward(&x)?.track_op());
    assert_eq!(layer.to_dtype(DType::F64)?.active_adapter(), Some("a"));
    Ok(())
}

// ---------------------------------------------------------------- 2. errors

#[test]
fn broken_rules() -> Result<()> {
    let mut numbers = Numbers::new(5);
    let mut ffn = block(&base_weights(&mut numbers)?)?;
    let mut layer = Linear::new(numbers.tensor(&[I, H], 1.0, DType::F32)?, None)?;
    assert!(matches!(ffn.merge_adapter(), Err(Error::NoActiveAdapter { .. })));
    ffn.add_adapter("one", pairs(&mut numbers, 0.0)?)?;
    ffn.add_adapter("two", FfnLora::default())?;
    layer.add_adapter("one", pair(&mut numbers, 3, H, I, 0.0)?)?;

    let error = ffn.set_adapter("three").unwrap_err();
    assert!(matches!(error, Error::UnknownAdapter { .. }));
    contains(&error, &["three", "one, two"]);
    contains(&layer.set_adapter("three").unwrap_err(), &["three", "one"]);
    contains(&ffn.delete_adapter("three").unwrap_err(), &["three", "one, two"]);
    contains(&layer.delete_adapter("three").unwrap_err(), &["three", "one"]);
    let error = ffn.add_adapter("one", FfnLora::default()).unwrap_err();
    assert!(matches!(error, Error::AdapterExists { .. }));
    contains(&error, &["one"]);
    let error = layer.add_adapter("one", pair(&mut numbers, 3, H, I, 0.0)?).unwrap_err();
    assert!(matches!(error, Error::AdapterExists { .. }));

    let error = ffn.merge_and_unload().unwrap_err();
    assert!(matches!(error, Error::NoActiveAdapter { .. }));
    contains(&error, &["one, two", "set_adapter"]);
    assert!(matches!(layer.merge_and_unload(), Err(Error::NoActiveAdapter { .. })));
    assert!(matches!(layer.merge_adapter(), Err(Error::NoActiveAdapter { .. })));
    assert!(matches!(ffn.unmerge_adapter(), Err(Error::NotMerged)));
    ffn.set_adapter("one")?;
    layer.set_adapter("one")?;
    assert!(matches!(ffn.unmerge_adapter(), Err(Error::NotMerged)));
    assert!(matches!(layer.unmerge_adapter(), Err(Error::NotMerged)));
    ffn.merge_adapter()?;
    layer.merge_adapter()?;
    let error = ffn.merge_adapter().unwrap_err();
    assert!(matches!(error, Error::AlreadyMerged { .. }));
    contains(&error, &["one"]);
    assert!(matches!(layer.merge_adapter(), Err(Error::AlreadyMerged { .. })));
    assert_eq!(ffn.active_adapter(), Some("one"), "an error changes nothing");
    Ok(())
}

/// The error names the tensor, the expected shape and the shape found.
#[test]
fn pairs_of_other_sizes() -> Result<()> {
    let mut numbers = Numbers::new(6);
    let mut ffn = block(&base_weights(&mut numbers)?)?;
    let mut error = |lora: FfnLora| {
        let error = ffn.add_adapter("a", lora).unwrap_err();
        assert!(matches!(error, Error::Shape { .. }), "{error:?}");
        assert_eq!(ffn.adapters().count(), 0);
        error
    };
    let gate_proj = Some(pair(&mut numbers, 2, H + 1, I, 0.0)?);
    let found = error(FfnLora { gate_proj, ..FfnLora::default() });
    contains(&found, &["gate_proj.lora_A.weight", "[2, 12]", "[2, 13]"]);
    let up_proj = Some(pair(&mut numbers, 2, H, I - 1, 0.0)?);
    let found = error(FfnLora { up_proj, ..FfnLora::default() });
    contains(&found, &["up_proj.lora_B.weight", "[20, 2]", "[19, 2]"]);
    let down_proj = Some(pair(&mut numbers, 2, H, I, 0.0)?);
    let found = error(FfnLora { down_proj, ..FfnLora::default() });
    contains(&found, &["down_proj.lora_A.weight", "[2, 20]", "[2, 12]"]);
    let mut layer = Linear::new(numbers.tensor(&[I, H], 1.0, DType::F32)?, None)?;
    let error = layer.add_adapter("a", pair(&mut numbers, 3, H, I + 1, 0.0)?).unwrap_err();
    contains(&error, &["lora_B.weight", "[20, 3]", "[21, 3]"]);
    Ok(())
}

// ---------------------------------------------------------------- 3. names

/// An adapter with a pair of rank 2 for each module; A is filled with its number.
fn adapter(modules: &[&str]) -> Result<LoraAdapter> {
    let pair = |(n, module): (usize, &&str)| -> Result<_> {
        let a = Tensor::full(n as f32, (2, H), &CPU)?;
        let b = Tensor::arange(0f32, 4.0 * I as f32, &CPU)?.reshape((2 * I, 2))?;
        Ok((module.to_string(), Lora::new(a, b, 1.0, 0.0)?))
    };
    let pairs = modules.iter().enumerate().map(pair).collect::<Result<Vec<_>>>()?;
    Ok(LoraAdapter::from_pairs(LoraConfig::new(2, 2.0), pairs)?)
}

/// The number of the module whose pair each projection got.
fn found(lora: &FfnLora) -> Result<[Option<usize>; 3]> {
    let number = |pair: &Option<Lora>| -> Result<Option<usize>> {
        let Some(pair) = pair else { return Ok(None) };
        Ok(Some(values(pair.a())?[0] as usize))
    };
    Ok([number(&lora.gate_proj)?, number(&lora.up_proj)?, number(&lora.down_proj)?])
}

/// The name of a block, modules of an adapter, and the module of each projection's pair.
type Case<'a> = (&'a str, &'a [&'a str], [Option<usize>; 3]);

#[test]
fn names_of_families() -> Result<()> {
    let all = [Some(0), Some(1), Some(2)];
    let fused = [Some(0), Some(0), Some(1)];
    let cases: [Case; 18] = [
        ("model.layers.0.mlp", &["gate_proj", "up_proj", "down_proj"], all),
        ("model.layers.0.mlp", &["up_proj"], [None, Some(0), None]),
        ("model.layers.0.mlp", &["down_proj"], [None, None, Some(0)]),
        ("layers.0.feed_forward", &["w1", "w3", "w2"], all),
        ("layers.0.feed_forward", &["w2"], [None, None, Some(0)]),
        ("model.layers.0.block_sparse_moe.experts.3", &["w1", "w3"], [Some(0), Some(1), None]),
        ("h.0.mlp", &["w2", "w1", "c_proj"], all),
        ("h.0.mlp", &["c_proj"], [None, None, Some(0)]),
        ("model.layers.0.mlp", &["gate_up_proj", "down_proj"], fused),
        ("mlp", &["dense_h_to_4h", "dense_4h_to_h"], fused),
        ("mlp", &["w12", "w3"], fused),
        ("mlp", &["up_gate_proj"], [Some(0), Some(0), None]),
        ("mlp", &["fc12", "fc11", "fc2"], all),
        ("layer.1.DenseReluDense", &["wi_0", "wi_1", "wo"], all),
        ("mlp", &["Wi", "Wo"], fused),
        ("mlp", &["input_linear", "output_linear"], fused),
        ("blk.0", &["ffn_gate", "ffn_up", "ffn_down"], all),
        ("model.layers.0.mlp", &["router"], [None, None, None]),
    ];
    for (block, names, expected) in cases {
        let modules: Vec<String> = names.iter().map(|name| format!("{block}.{name}")).collect();
        let modules: Vec<&str> = modules.iter().map(String::as_str).collect();
        let adapter = adapter(&modules)?;
        let lora = FfnLora::from_adapter(&adapter, block)?;
        assert_eq!(found(&lora)?, expected, "{block} {names:?}");
        let unused = if names == ["router"] { 1 } else { 0 };
        assert_eq!(adapter.unused().len(), unused, "{block} {names:?}");
        let elsewhere = FfnLora::from_adapter(&adapter, &block[1..])?;
        assert_eq!(found(&elsewhere)?, [None; 3]);
    }
    Ok(())
}

#[test]
fn names_that_fit_several_families() -> Result<()> {
    for names in [&["m.w1", "m.w2", "m.w3"][..], &["m.w1"], &["m.w3"], &["m.w1", "m.w2"]] {
        let adapter = adapter(names)?;
        let error = FfnLora::from_adapter(&adapter, "m").unwrap_err();
        assert!(matches!(error, Error::AmbiguousPairs { .. }), "{error:?}");
        contains(&error, &["w1", "\"m\"", "Meta", "from_adapter_with_names"]);
        assert_eq!(adapter.unused().len(), names.len());
    }
    let adapter = adapter(&["m.w1", "m.w2", "m.w3"])?;
    let lora = FfnLora::from_adapter_with_names(&adapter, "m", &Family::Xformers.names())?;
    assert_eq!(found(&lora)?, [Some(0), Some(1), Some(2)]);
    Ok(adapter.check_used()?)
}

/// The rows of B belong to gate and up in the order of the family.
#[test]
fn fused_pairs() -> Result<()> {
    let adapter = adapter(&["m.gate_up_proj", "m.down_proj", "m.up_gate_proj"])?;
    let b = adapter.get("m.gate_up_proj").context("a pair")?.b().clone();
    for (family, order) in [
        (Family::Phi3, FusedOrder::GateFirst),
        (Family::Stella, FusedOrder::UpFirst),
        (Family::Interleaved, FusedOrder::Interleaved),
    ] {
        let lora = FfnLora::from_adapter_with_names(&adapter, "m", &family.names())?;
        let [gate, up] = [&lora.gate_proj, &lora.up_proj].map(|pair| pair.as_ref().unwrap());
        assert_eq!(gate.a().id(), up.a().id());
        assert_eq!(bits(&pack(gate.b(), up.b(), order)?)?, bits(&b)?, "{family:?}");
        let cfg = FfnConfig::new(H, I).with_family(family);
        let modules = lora.modules(&cfg, "m")?;
        assert_eq!(bits(modules[0].1.b())?, bits(&b)?);
        assert_eq!(modules[1].0, "m.down_proj");
        let other = FfnLora { up_proj: lora.down_proj.clone(), ..lora.clone() };
        contains(&other.modules(&cfg, "m").unwrap_err(), &["proj.lora_A.weight", "gate and up"]);
    }
    let mut numbers = Numbers::new(7);
    let odd = pair(&mut numbers, 2, H, 7, 0.0)?;
    let adapter = LoraAdapter::from_pairs(LoraConfig::new(2, 3.0), [("m.Wi".to_string(), odd)])?;
    contains(&FfnLora::from_adapter(&adapter, "m").unwrap_err(), &["m.Wi.lora_B.weight", "7"]);
    Ok(())
}

/// New pairs are variables that change nothing yet, under PEFT's names. What was trained is saved,
/// and read again.
#[test]
fn new_pairs() -> Result<()> {
    const BLOCK: &str = "model.layers.1.mlp";
    let mut numbers = Numbers::new(8);
    for (cfg, targets, names) in [
        (FfnConfig::new(H, I), vec!["gate_proj", "down_proj"], vec!["gate_proj", "down_proj"]),
        (FfnConfig::new(H, I), vec![], vec!["gate_proj", "up_proj", "down_proj"]),
        (FfnConfig::new(H, I).with_family(Family::Meta), vec!["w3"], vec!["w3"]),
        (FfnConfig::new(H, I).with_family(Family::Phi3), vec![], vec!["gate_up_proj", "down_proj"]),
    ] {
        let mut config = LoraConfig::new(4, 8.0).with_rank_pattern([("gate_proj", 3)]);
        if !targets.is_empty() {
            config = config.with_target_modules(targets);
        }
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &CPU);
        let lora = FfnLora::init(&cfg, &config, BLOCK, vb.pp(BLOCK))?;
        let mut expected: Vec<String> = names
            .iter()
            .flat_map(|name| ["A", "B"].map(|side| format!("{BLOCK}.{name}.lora_{side}.weight")))
            .collect();
        let mut created: Vec<String> = vars.data().lock().unwrap().keys().cloned().collect();
        expected.sort();
        created.sort();
        assert_eq!(created, expected);

        let tensors = base_weights(&mut numbers)?;
        let (mut ffn, x) = (block(&tensors)?, numbers.tensor(&[5, H], 1.0, DType::F32)?);
        let before = bits(&ffn.forward(&x)?)?;
        ffn.add_adapter("new", lora.clone())?;
        ffn.set_adapter("new")?;
        assert_eq!(bits(&ffn.forward(&x)?)?, before, "B is zero");
        let mut optimizer = SGD::new(vars.all_vars(), 0.5)?;
        for _ in 0..2 {
            let loss = ffn.forward(&x)?.sqr()?.mean_all()?;
            optimizer.step(&loss.backward()?)?;
        }
        let after = ffn.forward(&x)?;
        assert!(bits(&after)? != before);

        let dir = tempfile::TempDir::new()?;
        LoraAdapter::from_pairs(config.clone(), lora.modules(&cfg, BLOCK)?)?.save(dir.path())?;
        let adapter = LoraAdapter::open(dir.path(), DType::F32, &CPU)?;
        let names = cfg.family.unwrap_or(Family::Llama).names();
        let read = FfnLora::from_adapter_with_names(&adapter, BLOCK, &names)?;
        adapter.check_used()?;
        let mut ffn = block(&tensors)?;
        ffn.add_adapter("read", read)?;
        let mut again = VarMap::new();
        let vb = VarBuilder::from_varmap(&again, DType::F32, &CPU).pp("base_model.model");
        ffn.add_adapter("again", FfnLora::init(&cfg, &config, BLOCK, vb.pp(BLOCK))?)?;
        again.load(dir.path().join("adapter_model.safetensors"))?;
        for name in ["read", "again"] {
            ffn.set_adapter(name)?;
            check_near(&ffn.forward(&x)?, &after)?;
        }
    }
    Ok(())
}

// ---------------------------------------------------------------- 4. training

/// Steps on a packed base change A and B alone. The gradients are those of the active adapter.
#[test]
fn training_changes_the_active_adapter_alone() -> Result<()> {
    let mut numbers = Numbers::new(9);
    let mut ffn = block(&base_weights(&mut numbers)?)?;
    let mut layer = Linear::new(numbers.tensor(&[H, H], 1.0, DType::F32)?, None)?;
    let mut all = HashMap::new();
    for name in ["one", "two"] {
        let lora = pairs(&mut numbers, 0.0)?;
        let [gate_proj, up_proj, down_proj] = [&lora.gate_proj, &lora.up_proj, &lora.down_proj]
            .map(|pair| Some(trained(pair.as_ref().unwrap()).unwrap()));
        let of_layer = trained(&pair(&mut numbers, 2, H, H, 0.0)?)?;
        let pairs = [&gate_proj, &up_proj, &down_proj].map(|pair| pair.clone().unwrap());
        let tensors =
            pairs.iter().chain([&of_layer]).flat_map(|pair| [pair.a().clone(), pair.b().clone()]);
        all.insert(name, tensors.collect::<Vec<Tensor>>());
        ffn.add_adapter(name, FfnLora { gate_proj, up_proj, down_proj })?;
        layer.add_adapter(name, of_layer)?;
    }
    let x = numbers.tensor(&[7, H], 1.0, DType::F32)?;
    let weights = (all_bits(&ffn.weights()?)?, bits(&layer.weight()?)?);
    for (active, other) in [("one", "two"), ("two", "one")] {
        ffn.set_adapter(active)?;
        layer.set_adapter(active)?;
        let loss = || layer.forward(&ffn.forward(&x)?)?.sqr()?.mean_all();
        let gradients: [GradStore; 2] = [loss()?.backward()?, backward(&loss()?)?];
        for store in &gradients {
            assert!(all[active].iter().all(|tensor| store.get(tensor).is_some()));
            assert!(all[other].iter().all(|tensor| store.get(tensor).is_none()));
        }
        let before = |name: &str| all[name].iter().map(bits).collect::<Result<Vec<_>>>();
        let (before_active, before_other) = (before(active)?, before(other)?);
        let vars =
            all.values().flatten().map(Var::from_tensor).collect::<candle_core::Result<_>>()?;
        let (mut optimizer, first) = (SGD::new(vars, 0.05)?, loss()?.to_scalar::<f32>()?);
        for _ in 0..5 {
            optimizer.step(&backward(&loss()?)?)?;
        }
        assert!(loss()?.to_scalar::<f32>()? < first);
        assert!(before_active.iter().zip(before(active)?).all(|(old, new)| *old != new));
        assert_eq!(before_other, before(other)?);
        assert_eq!((all_bits(&ffn.weights()?)?, bits(&layer.weight()?)?), weights.clone());
    }
    Ok(())
}

// ---------------------------------------------------------------- 5. dropout

/// Layers with a dropout of `probability` on every pair, in training, and the same pairs without.
fn dropping(probability: f32, numbers: &mut Numbers) -> Result<[SwiGluFfn; 2]> {
    let (base, with) = (block(&base_weights(numbers)?)?, pairs(numbers, probability)?);
    let without = |pair: &Option<Lora>| -> Option<Lora> {
        let pair = pair.as_ref()?;
        Lora::new(pair.a().clone(), pair.b().clone(), pair.scale(), 0.0).ok()
    };
    let without = FfnLora {
        gate_proj: without(&with.gate_proj),
        up_proj: without(&with.up_proj),
        down_proj: without(&with.down_proj),
    };
    let mut layers = [base.clone(), base];
    for (layer, lora) in layers.iter_mut().zip([with, without]) {
        layer.add_adapter("a", lora)?;
        layer.set_adapter("a")?;
    }
    Ok(layers)
}

/// Dropout acts in training alone: otherwise the bits are those of the pairs without dropout.
#[test]
fn dropout_acts_in_training_alone() -> Result<()> {
    let mut numbers = Numbers::new(10);
    let [mut with, without] = dropping(0.5, &mut numbers)?;
    let x = numbers.tensor(&[9, H], 1.0, DType::F32)?;
    let expected = bits(&without.forward(&x)?)?;
    assert_eq!(bits(&with.forward(&x)?)?, expected);
    with.set_training(true)?;
    let [first, second] = [bits(&with.forward(&x)?)?, bits(&with.forward(&x)?)?];
    assert!(first != expected && second != expected && first != second);
    with.set_training(false)?;
    assert_eq!(bits(&with.forward(&x)?)?, expected);
    with.merge_adapter()?;
    let merged = bits(&with.forward(&x)?)?;
    with.set_training(true)?;
    assert_eq!(bits(&with.forward(&x)?)?, merged, "a merged adapter has no dropout");
    Ok(())
}

/// With p = 1 the pairs change nothing, and get gradients of zero.
#[test]
fn everything_dropped() -> Result<()> {
    let mut numbers = Numbers::new(11);
    let [mut with, _] = dropping(1.0, &mut numbers)?;
    with.set_training(true)?;
    let x = Var::from_tensor(&numbers.tensor(&[9, H], 1.0, DType::F32)?)?;
    let mut base = with.clone();
    base.disable_adapters();
    let [y, expected] = [with.forward(&x)?, base.forward(&x)?];
    check_near(&y, &expected)?;
    let gradient = |y: &Tensor| -> Result<Tensor> {
        Ok(y.sum_all()?.backward()?.get(&x).context("a gradient")?.clone())
    };
    check_near(&gradient(&y)?, &gradient(&expected)?)?;
    let mut layer = Linear::new(numbers.tensor(&[I, H], 1.0, DType::F32)?, None)?;
    let lora = trained(&pair(&mut numbers, 3, H, I, 1.0)?)?;
    layer.add_adapter("a", lora.clone())?;
    layer.set_adapter("a")?;
    layer.set_training(true)?;
    let store = layer.forward(&x)?.sum_all()?.backward()?;
    for tensor in [lora.a(), lora.b()] {
        assert!(store.get(tensor).is_none_or(|g| values(g).unwrap().iter().all(|g| *g == 0.0)));
    }
    Ok(())
}

/// One element of x and of y: y = w·x + s·b·a·d·x with d = 0 or 1/(1-p). The values that appear are
/// these two, and d = 0 has the frequency p.
#[test]
fn elements_are_dropped_with_their_probability() -> Result<()> {
    const ROWS: usize = 4000;
    for p in [0.1f32, 0.5, 0.9] {
        let one = |value: f32| Tensor::full(value, (1, 1), &CPU);
        let mut layer = Linear::new(one(1.0)?, None)?;
        layer.add_adapter("a", Lora::new(one(2.0)?, one(0.5)?, 1.0, p)?)?;
        layer.set_adapter("a")?;
        layer.set_training(true)?;
        let x = Var::from_tensor(&Tensor::ones((ROWS, 1), DType::F32, &CPU)?)?;
        let y = layer.forward(&x)?;
        let kept = 1.0 + 1.0 / (1.0 - f64::from(p));
        // Two products and a sum, with 1/(1-p) rounded to f32.
        let near =
            |y: f64, value: f64| (y - value).abs() <= 4.0 * unit_roundoff(DType::F32) * value;
        let found = values(&y)?;
        assert!(found.iter().all(|y| near(*y, 1.0) || near(*y, kept)));
        let dropped = found.iter().filter(|y| near(**y, 1.0)).count() as f64;
        // Six standard deviations: exceeded once in 5·10⁸ runs.
        let (mean, deviation) = (f64::from(p), (f64::from(p) * (1.0 - f64::from(p))).sqrt());
        let difference = (dropped / ROWS as f64 - mean).abs();
        assert!(difference < 6.0 * deviation / (ROWS as f64).sqrt(), "{p}: {dropped} of {ROWS}");
        // y is linear in x, and the gradient has the mask of the forward pass: dx = y / x.
        let store = y.sum_all()?.backward()?;
        let dx = values(store.get(&x).context("a gradient")?)?;
        assert!(dx.iter().zip(&found).all(|(dx, y)| near(*dx, *y)));
    }
    Ok(())
}

/// The mean over calls approaches the result without dropout, where the result is linear in the
/// dropped values: down_proj's pair, whose input has no dropout of its own.
#[test]
fn the_mean_is_the_result_without_dropout() -> Result<()> {
    const CALLS: usize = 400;
    let mut numbers = Numbers::new(12);
    let (p, lora) = (0.3f32, pair(&mut numbers, 4, I, H, 0.3)?);
    let mut ffn = block(&base_weights(&mut numbers)?)?;
    ffn.add_adapter("a", FfnLora { down_proj: Some(lora.clone()), ..FfnLora::default() })?;
    ffn.set_adapter("a")?;
    let x = numbers.tensor(&[5, H], 1.0, DType::F32)?;
    let expected = values(&ffn.forward(&x)?)?;
    ffn.set_training(true)?;
    let mut sums = vec![0f64; expected.len()];
    let mut squares = sums.clone();
    for _ in 0..CALLS {
        for ((sum, square), y) in sums.iter_mut().zip(&mut squares).zip(values(&ffn.forward(&x)?)?)
        {
            *sum += y;
            *square += y * y;
        }
    }
    // The mean of n values is within seven of its standard deviations, which are estimated from
    // the values; the chance of one failure among 60 elements is about 10⁻⁹.
    let n = CALLS as f64;
    for ((sum, square), expected) in sums.iter().zip(&squares).zip(&expected) {
        let mean = sum / n;
        let deviation = ((square / n - mean * mean).max(0.0) / n).sqrt();
        assert!((mean - expected).abs() <= 7.0 * deviation, "{mean}, expected {expected}, p {p}");
        assert!(deviation > 0.0);
    }
    Ok(())
}

/// The pairs of gate and up may have different dropouts: here that of up alone drops everything.
#[test]
fn different_dropouts() -> Result<()> {
    let mut numbers = Numbers::new(13);
    let (tensors, lora) = (base_weights(&mut numbers)?, pairs(&mut numbers, 0.0)?);
    let up = lora.up_proj.clone().context("a pair")?;
    let up_proj = Some(Lora::new(up.a().clone(), up.b().clone(), up.scale(), 1.0)?);
    let layer = |lora: FfnLora| -> Result<SwiGluFfn> {
        let mut ffn = block(&tensors)?;
        ffn.add_adapter("a", lora)?;
        ffn.set_adapter("a")?;
        ffn.set_training(true)?;
        Ok(ffn)
    };
    let x = numbers.tensor(&[5, H], 1.0, DType::F32)?;
    let found = layer(FfnLora { up_proj, ..lora.clone() })?.forward(&x)?;
    check_near(&found, &layer(FfnLora { up_proj: None, ..lora })?.forward(&x)?)
}
