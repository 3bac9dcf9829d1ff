//! LoRA adapters compared with PEFT (tests/golden/README.md): the rules of its config, the bits of
//! its merged weights, the bytes of its files. Bad input: each error names its tensor or field.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use candle_swiglu::{Error, Lora, LoraAdapter, LoraConfig, Modules, read_json};
use serde_json::{Value, json};
use tempfile::TempDir;

mod common;
use common::{Golden, bits, golden_dir, values};

const MLP: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];
const LAYER: &str = "model.layers.0.mlp";
const CPU: Device = Device::Cpu;

fn case(name: &str) -> PathBuf {
    golden_dir().join("peft").join(name)
}

fn open(name: &str, dtype: DType) -> Result<LoraAdapter> {
    Ok(LoraAdapter::open(case(name), dtype, &CPU)?)
}

// ---------------------------------------------------------------- 1. rules

/// rules.json: for every config the modules that PEFT's own model gave an adapter, with rank and
/// scale, and the same for names that the model lacks.
#[test]
fn rules_of_the_config() -> Result<()> {
    let all = read_json(case("rules.json"))?;
    let rules = all["rules"].as_array().context("rules")?;
    ensure!(rules.len() == 25, "{} rules", rules.len());
    for (number, rule) in rules.iter().enumerate() {
        let config = LoraConfig::from_json(&rule["config"])?;
        let again = LoraConfig::from_json(&config.to_json())?;
        assert_eq!(config, again, "rule {number}");
        for (names, answers) in [("modules", "targeted"), ("extra", "extra")] {
            let Some(answers) = rule[answers].as_array() else { continue };
            let names = all[names].as_array().context("names")?;
            for name in names.iter().filter_map(Value::as_str) {
                let expected = answers.iter().find(|answer| answer[0] == name);
                let what = format!("rule {number}, {name}");
                assert_eq!(config.targets(name)?, expected.is_some(), "{what}");
                if let Some(expected) = expected {
                    assert_eq!(Some(config.rank(name)? as u64), expected[1].as_u64(), "{what}");
                    assert_eq!(Some(config.scaling(name)?), expected[2].as_f64(), "{what}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn defaults_of_peft() -> Result<()> {
    let config = LoraConfig::from_json(&json!({"peft_type": "LORA", "target_modules": ["a"]}))?;
    assert_eq!(config, LoraConfig::new(8, 8.0).with_target_modules(["a"]));
    Ok(())
}

// ---------------------------------------------------------------- 2. merged weights

/// The weights that PEFT merged, bit for bit.
#[test]
fn merged_weights() -> Result<()> {
    let cases = ["plain", "rslora", "patterns", "down_only", "bf16"];
    for name in cases {
        let adapter = open(name, DType::F32)?;
        check_merged(name, "merged", DType::F32, &[adapter])?;
    }
    check_merged("bf16", "merged_bf16_adapter", DType::F32, &[open("bf16", DType::BF16)?])?;
    check_merged("bf16", "merged_bf16_base", DType::BF16, &[open("bf16", DType::F32)?])?;
    check_merged("bf16", "merged_bf16_both", DType::BF16, &[open("bf16", DType::BF16)?])?;
    let two = [open("two/first", DType::F32)?, open("two/second", DType::F32)?];
    check_merged("two", "merged", DType::F32, &two)
}

/// `prefix.<projection>` of the reference is its base weight in `dtype` with the adapters merged.
fn check_merged(name: &str, prefix: &str, dtype: DType, adapters: &[LoraAdapter]) -> Result<()> {
    let golden = Golden::load(&case(name).join("reference.safetensors"))?;
    for projection in MLP {
        let base = golden.tensor(&format!("base.{projection}"))?.to_dtype(dtype)?;
        let mut merged = base.clone();
        for adapter in adapters {
            if let Some(lora) = adapter.get(&format!("{LAYER}.{projection}")) {
                merged = lora.merge(&merged)?;
                check_delta(lora)?;
                check_unmerge(lora, &base)?;
            }
        }
        let expected = golden.tensor(&format!("{prefix}.{projection}"))?;
        ensure!(merged.dtype() == expected.dtype(), "{name} {prefix} {projection}");
        ensure!(bits(&merged)? == bits(expected)?, "{name} {prefix} {projection}: other bits");
        let changed = adapters.iter().any(|a| a.get(&format!("{LAYER}.{projection}")).is_some());
        ensure!(changed == (bits(&merged)? != bits(&base)?), "{name} {prefix} {projection}");
    }
    Ok(())
}

/// delta against s·Σ b·a in f64. r fused multiply-adds and one product with the scale, which is
/// rounded too, are within (r + 2)·u·s·Σ|b||a| to first order; a pair in bf16 is rounded once more.
fn check_delta(lora: &Lora) -> Result<()> {
    let ((r, n), m) = (lora.a().dims2()?, lora.b().dim(0)?);
    let (a, b, delta) = (values(lora.a())?, values(lora.b())?, values(&lora.delta()?)?);
    let last = if lora.a().dtype() == DType::BF16 { 2f64.powi(-8) } else { 0.0 };
    for (at, found) in delta.iter().enumerate() {
        let terms: Vec<f64> = (0..r).map(|k| b[at / n * r + k] * a[k * n + at % n]).collect();
        let exact = lora.scale() * terms.iter().sum::<f64>();
        let size = lora.scale().abs() * terms.iter().map(|term| term.abs()).sum::<f64>();
        let bound = 1.01 * (r as f64 + 2.0) * 2f64.powi(-24) * size + 1.01 * last * exact.abs();
        ensure!((found - exact).abs() <= bound, "{at} of {m}x{n}: {found}, expected {exact}");
    }
    Ok(())
}

/// Merging and unmerging round twice to the weight's dtype (u relative to the merged weight and to
/// the result), and delta once: |error| <= u·(|w + d| + |w| + |d|) with a margin for second order.
fn check_unmerge(lora: &Lora, base: &Tensor) -> Result<()> {
    let u = common::unit_roundoff(base.dtype());
    let merged = lora.merge(base)?;
    let found = values(&lora.unmerge(&merged)?)?;
    let (w, d, sum) = (values(base)?, values(&lora.delta()?)?, values(&merged)?);
    for i in 0..w.len() {
        let bound = 1.02 * u * (sum[i].abs() + w[i].abs() + d[i].abs());
        ensure!((found[i] - w[i]).abs() <= bound, "element {i}: {}, expected {}", found[i], w[i]);
    }
    Ok(())
}

// ---------------------------------------------------------------- 3. files

/// What was read and written again has the bytes that PEFT wrote, and the fields that it wrote.
#[test]
fn saved_adapters_are_peft_s() -> Result<()> {
    let cases = ["plain", "rslora", "patterns", "down_only", "bf16", "two/first", "two/second"];
    for name in cases {
        let dtype = if name == "bf16" { DType::BF16 } else { DType::F32 };
        let (adapter, dir) = (open(name, dtype)?, TempDir::new()?);
        let dir = dir.path().join("new");
        adapter.save(&dir)?;
        let bytes = |dir: &Path| std::fs::read(dir.join("adapter_model.safetensors"));
        ensure!(bytes(&dir)? == bytes(&case(name))?, "{name}: other bytes");
        let read = |dir: &Path| read_json(dir.join("adapter_config.json"));
        let (ours, theirs) = (read(&dir)?, read(&case(name))?);
        for (field, value) in ours.as_object().context("an object")? {
            assert_eq!(theirs.get(field), Some(value), "{name}: {field}");
        }
        assert_eq!(LoraAdapter::open(&dir, dtype, &CPU)?.config(), adapter.config());
    }
    Ok(())
}

#[test]
fn unused_pairs_are_an_error() -> Result<()> {
    let adapter = open("plain", DType::F32)?;
    assert_eq!(adapter.modules().count(), 10);
    for module in adapter.modules().filter(|module| !module.ends_with("1.mlp.up_proj")) {
        assert!(adapter.get(module).is_some());
    }
    assert!(adapter.get("model.layers.2.mlp.up_proj").is_none());
    let error = adapter.check_used().unwrap_err();
    assert!(matches!(error, Error::UnusedPairs { .. }));
    assert!(error.to_string().contains("model.layers.1.mlp.up_proj"), "{error}");
    adapter.get("model.layers.1.mlp.up_proj");
    Ok(adapter.check_used()?)
}

/// A is uniform in ±1/√in, B is zero, both are variables.
#[test]
fn initialisation() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &CPU);
    let config = LoraConfig::new(64, 16.0).with_rslora().with_dropout(0.25);
    let lora = Lora::init(100, 7, &config, "m", vb.pp("m"))?;
    assert_eq!((lora.a().dims(), lora.b().dims()), (&[64, 100][..], &[7, 64][..]));
    assert_eq!((lora.scale(), lora.dropout(), vars.all_vars().len()), (2.0, 0.25, 2));
    assert!(lora.a().is_variable() && lora.b().is_variable());
    let a = values(lora.a())?;
    // The chance that all 6400 draws miss the outer hundredth is 0.99^6400 < 10^-27.
    let largest = a.iter().fold(0f64, |most, a| most.max(a.abs()));
    assert!(largest <= 0.1 && largest > 0.099, "{largest}");
    assert!(values(lora.b())?.iter().all(|b| *b == 0.0));
    let config = LoraConfig::new(64, 16.0).with_rslora().with_dropout(0.25);
    let adapter = LoraAdapter::from_pairs(config, [("m".to_string(), lora)])?;
    assert_eq!(adapter.config().target_modules, Some(Modules::Names(vec!["m".into()])));
    Ok(())
}

// ---------------------------------------------------------------- 4. bad input

fn contains(error: &Error, parts: &[&str]) {
    let message = error.to_string();
    for part in parts {
        assert!(message.contains(part), "expected {part:?} in {message:?}");
    }
}

/// `plain`'s config with one field replaced.
fn config_with(field: &str, value: Value) -> Result<LoraConfig, Error> {
    let mut json = read_json(case("plain/adapter_config.json")).unwrap();
    json[field] = value;
    LoraConfig::from_json(&json)
}

#[test]
fn fields_that_change_the_result_are_refused() {
    let cases = [
        ("peft_type", json!("IA3")),
        ("bias", json!("all")),
        ("init_lora_weights", json!("pissa_niter_16")),
        ("use_dora", json!(true)),
        ("fan_in_fan_out", json!(true)),
        ("lora_bias", json!(true)),
        ("use_qalora", json!(true)),
        ("ensure_weight_tying", json!(true)),
        ("modules_to_save", json!(["lm_head"])),
        ("trainable_token_indices", json!([3])),
        ("target_parameters", json!(["experts.down_proj"])),
        ("layer_replication", json!([[0, 2], [1, 2]])),
        ("megatron_config", json!({"tensor_model_parallel_size": 2})),
        ("alora_invocation_tokens", json!([])),
        ("arrow_config", json!({})),
        ("use_bdlora", json!({"nblocks": 2})),
        ("kasa_config", json!({})),
        ("velora_config", json!({})),
        ("monteclora_config", json!({})),
        ("of_tomorrow", json!(0)),
    ];
    for (field, value) in cases {
        let error = config_with(field, value.clone()).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error:?}");
        contains(&error, &[field, &value.to_string()]);
        assert!(field == "peft_type" || config_with(field, Value::Null).is_ok(), "{field}");
    }
    for (field, value) in [
        ("modules_to_save", json!([])),
        ("init_lora_weights", json!("gaussian")),
        ("of_tomorrow", json!({})),
        ("of_tomorrow", json!(false)),
        ("eva_config", json!({"rho": 1.0})),
        ("peft_version", json!("9.9")),
    ] {
        assert!(config_with(field, value).is_ok(), "{field}");
    }
}

#[test]
fn fields_of_wrong_values() {
    let cases = [
        ("r", json!(0)),
        ("r", json!("8")),
        ("lora_alpha", json!("8")),
        ("lora_dropout", json!(1.5)),
        ("use_rslora", json!(1)),
        ("rank_pattern", json!({"up_proj": 0})),
        ("rank_pattern", json!([8])),
        ("rank_pattern", json!({"(up_proj": 4})),
        ("alpha_pattern", json!({"up_proj": null})),
        ("alpha_pattern", json!({"[a[b]]": 4})),
        ("alpha_pattern", json!({"[a-c--b]": 4})),
        ("target_modules", json!([1])),
        ("target_modules", json!("*")),
        ("exclude_modules", json!("(")),
        ("layers_to_transform", json!([-1])),
        ("layers_pattern", json!("layers")),
    ];
    for (field, value) in cases {
        let error = config_with(field, value).unwrap_err();
        assert!(matches!(error, Error::InvalidField { .. }), "{error:?}");
        contains(&error, &[field]);
    }
    let error = LoraConfig::new(2, 2.0).targets("up_proj").unwrap_err();
    assert!(matches!(error, Error::MissingField { field: "target_modules" }));
    let json = json!({"peft_type": "LORA", "target_modules": ".*", "layers_to_transform": 0});
    contains(&LoraConfig::from_json(&json).unwrap_err(), &["layers_to_transform"]);
    contains(&LoraConfig::from_json(&json!({"r": 8})).unwrap_err(), &["peft_type"]);
    contains(&LoraConfig::from_json(&json!(8)).unwrap_err(), &["adapter_config", "object"]);
}

fn zeros(dims: &[usize], dtype: DType) -> Tensor {
    Tensor::zeros(dims, dtype, &CPU).unwrap()
}

/// An adapter's directory for `up_proj` of rank 2 with these tensors of f32 zeros.
fn directory(tensors: &[(&str, &[usize])]) -> TempDir {
    let dir = TempDir::new().unwrap();
    let config = LoraConfig::new(2, 2.0).with_target_modules(["up_proj"]).to_json();
    std::fs::write(dir.path().join("adapter_config.json"), config.to_string()).unwrap();
    let tensors = tensors.iter().map(|(name, dims)| (*name, zeros(dims, DType::F32)));
    let bytes = safetensors::serialize(tensors, None).unwrap();
    std::fs::write(dir.path().join("adapter_model.safetensors"), bytes).unwrap();
    dir
}

fn open_with(tensors: &[(&str, &[usize])]) -> Result<LoraAdapter, Error> {
    LoraAdapter::open(directory(tensors).path(), DType::F32, &CPU)
}

const A: &str = "base_model.model.model.up_proj.lora_A.weight";
const B: &str = "base_model.model.model.up_proj.lora_B.weight";

#[test]
fn tensors_of_the_file() {
    let names = ["lora_A.default.weight", "lora_B.default.weight"];
    let [a, b] = names.map(|name| format!("base_model.model.up_proj.{name}"));
    let adapter = open_with(&[(&a, &[2, 3]), (&b, &[4, 2])]).unwrap();
    assert_eq!(adapter.modules().collect::<Vec<_>>(), ["up_proj"]);

    let error = open_with(&[(A, &[2, 3])]).unwrap_err();
    assert!(matches!(error, Error::MissingTensor { .. }), "{error:?}");
    contains(&error, &["lora_B.weight", "base_model.model.model.up_proj", "lora_A.weight"]);
    let error = open_with(&[(B, &[4, 2])]).unwrap_err();
    contains(&error, &["no tensor lora_A.weight", "base_model.model.model.up_proj"]);
    assert!(matches!(open_with(&[]).unwrap_err(), Error::MissingTensor { .. }));

    let bad_shapes: [(&str, &[usize], &[usize]); 5] = [
        (A, &[3, 3], &[4, 2]),
        (B, &[2, 3], &[4, 3]),
        (A, &[6], &[4, 2]),
        (B, &[2, 3], &[8]),
        (B, &[2, 3], &[4, 2, 1]),
    ];
    for (name, a, b) in bad_shapes {
        let error = open_with(&[(A, a), (B, b)]).unwrap_err();
        assert!(matches!(error, Error::Shape { .. }), "{error:?}");
        contains(&error, &[name, "adapter_model.safetensors"]);
    }
    let error = open_with(&[(A, &[2, 0]), (B, &[4, 2])]).unwrap_err();
    assert!(matches!(error, Error::ZeroSize { name: "lora_A" }), "{error:?}");

    let others = [
        "base_model.model.model.up_proj.lora_magnitude_vector",
        "base_model.model.model.up_proj.lora_B.bias",
        "base_model.model.lm_head.weight",
        "base_model.model.lora_A.weight",
        "model.up_proj.lora_A.weight",
        "base_model.model.model.up_proj.lora_A.a.b.weight",
    ];
    for name in others {
        let error = open_with(&[(A, &[2, 3]), (B, &[4, 2]), (name, &[2, 3])]).unwrap_err();
        assert!(matches!(error, Error::NoPair { .. }), "{error:?}");
        contains(&error, &[name, "adapter_model.safetensors"]);
    }
    let twice = "base_model.model.model.up_proj.lora_A.x.weight";
    let error = open_with(&[(A, &[2, 3]), (B, &[4, 2]), (twice, &[2, 3])]).unwrap_err();
    assert!(matches!(error, Error::DuplicateTensor { .. }), "{error:?}");
    let other = [A, B].map(|name| name.replace("up_proj", "gate_proj"));
    let error = open_with(&[(&other[0], &[2, 3]), (&other[1], &[4, 2])]).unwrap_err();
    assert!(matches!(error, Error::UntargetedModule { .. }), "{error:?}");
    contains(&error, &["model.gate_proj"]);
}

#[test]
fn files_of_the_directory() {
    let open = |dir: &TempDir| LoraAdapter::open(dir.path(), DType::F32, &CPU).unwrap_err();
    for missing in ["adapter_config.json", "adapter_model.safetensors"] {
        let dir = directory(&[(A, &[2, 3]), (B, &[4, 2])]);
        std::fs::remove_file(dir.path().join(missing)).unwrap();
        std::fs::write(dir.path().join("adapter_model.bin"), "").unwrap();
        let error = open(&dir);
        assert!(matches!(error, Error::NoAdapter { .. }), "{error:?}");
        contains(&error, &[missing, "adapter_model.bin", "convert"]);
    }
    let dir = directory(&[(A, &[2, 3]), (B, &[4, 2])]);
    let path = dir.path().join("adapter_model.safetensors");
    std::fs::write(&path, "version https://git-lfs.github.com/spec/v1\nsize 99\n").unwrap();
    assert!(matches!(open(&dir), Error::LfsPointer { size: Some(99), .. }));
    std::fs::write(&path, [9; 20]).unwrap();
    assert!(matches!(open(&dir), Error::Header { .. }));
    std::fs::write(dir.path().join("adapter_config.json"), "{").unwrap();
    assert!(matches!(open(&dir), Error::Json { .. }));
    let error = LoraAdapter::open(&path, DType::F32, &CPU).unwrap_err();
    assert!(matches!(error, Error::NotADirectory { .. }), "{error:?}");
}

#[test]
fn pairs_that_do_not_fit() {
    let new = |a: &[usize], b: &[usize], dtype| {
        Lora::new(zeros(a, DType::F32), zeros(b, dtype), 1.0, 0.0).map(|_| ()).unwrap_err()
    };
    assert!(matches!(new(&[6], &[4, 2], DType::F32), Error::Rank { name: "lora_A", .. }));
    assert!(matches!(new(&[2, 3], &[4, 2, 1], DType::F32), Error::Rank { name: "lora_B", .. }));
    assert!(matches!(new(&[0, 3], &[4, 0], DType::F32), Error::ZeroSize { name: "lora_A" }));
    let error = new(&[2, 3], &[4, 3], DType::F32);
    contains(&error, &["lora_B", "[4, 2]", "[4, 3]"]);
    let error = new(&[2, 3], &[4, 2], DType::BF16);
    assert!(matches!(error, Error::DTypeMismatch { name: "lora_B", .. }), "{error:?}");
    let error = new(&[2, 3], &[4, 2], DType::U32);
    assert!(matches!(error, Error::DTypeUnsupported { .. }), "{error:?}");
    let pair = |scale, dropout| {
        Lora::new(zeros(&[2, 3], DType::F32), zeros(&[4, 2], DType::F32), scale, dropout)
    };
    contains(&pair(f64::NAN, 0.0).unwrap_err(), &["scale"]);
    contains(&pair(1.0, -0.5).unwrap_err(), &["lora_dropout"]);

    let lora = pair(1.0, 0.0).unwrap();
    for error in
        [lora.merge(&zeros(&[3, 4], DType::F32)), lora.unmerge(&zeros(&[3, 4], DType::F32))]
    {
        contains(&error.unwrap_err(), &["weight", "[4, 3]", "[3, 4]"]);
    }
    let error = lora.merge(&zeros(&[4, 3], DType::U8)).unwrap_err();
    assert!(matches!(error, Error::DTypeUnsupported { .. }), "{error:?}");

    let adapter = |config: LoraConfig, modules: &[&str]| {
        let pairs = modules.iter().map(|module| (module.to_string(), lora.clone()));
        LoraAdapter::from_pairs(config, pairs).map(|_| ()).unwrap_err()
    };
    contains(&adapter(LoraConfig::new(3, 3.0), &["m"]), &["m.lora_A.weight", "[3, 3]"]);
    contains(&adapter(LoraConfig::new(2, 3.0), &["m"]), &["m: scale"]);
    contains(&adapter(LoraConfig::new(2, 2.0).with_dropout(0.5), &["m"]), &["m: dropout"]);
    contains(&adapter(LoraConfig::new(2, 2.0), &["m", "m"]), &["m: expected one"]);
    let config = LoraConfig::new(2, 2.0).with_target_modules(["n"]);
    assert!(matches!(adapter(config, &["m"]), Error::UntargetedModule { .. }));
}
