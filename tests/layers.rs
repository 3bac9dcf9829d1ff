//! Names, biases and dtypes that the caller chooses; the weights of a built block; freezing; the
//! embedding.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;
#[path = "../benches/harness/memory.rs"]
mod memory;

use std::collections::HashMap;

use anyhow::Result;
use candle_core::{DType, Device, Shape, Tensor, Var};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, Module, VarBuilder, VarMap};
use candle_swiglu::{
    Biases, Embedding, Error, FfnConfig, FusedOrder, GateUp, Linear, Names, SwiGluFfn, Weights,
    embedding, linear, linear_no_bias, swiglu_ffn,
};
use common::{Numbers, bits, check_within, pack, unit_roundoff, values};

const H: usize = 32;
const I: usize = 48;

const ORDERS: [FusedOrder; 3] =
    [FusedOrder::GateFirst, FusedOrder::UpFirst, FusedOrder::Interleaved];

fn all_biases() -> impl Iterator<Item = Biases> {
    (0..8).map(|n| Biases::new(n & 1 > 0, n & 2 > 0, n & 4 > 0))
}

/// Weights with these biases: gate_proj, up_proj, down_proj and their biases.
fn parts(biases: Biases, dtype: DType) -> Result<([Tensor; 3], [Option<Tensor>; 3])> {
    let mut numbers = Numbers::new(7);
    let mut weight =
        |out: usize, k: usize| numbers.tensor(&[out, k], (3.0 / k as f64).sqrt(), dtype);
    let weights = [weight(I, H)?, weight(I, H)?, weight(H, I)?];
    let mut numbers = Numbers::new(8);
    let mut bias =
        |n: usize, there: bool| there.then(|| numbers.tensor(&[n], 0.5, dtype)).transpose();
    Ok((weights, [bias(I, biases.gate)?, bias(I, biases.up)?, bias(H, biases.down)?]))
}

fn block(cfg: &FfnConfig, dtype: DType) -> Result<SwiGluFfn> {
    let ([gate, up, down], [gate_bias, up_bias, down_bias]) = parts(cfg.biases, dtype)?;
    let weights = Weights::new(GateUp::separate(gate, up, gate_bias, up_bias), down, down_bias);
    Ok(SwiGluFfn::from_weights(cfg, weights)?)
}

fn x(dtype: DType) -> Result<Tensor> {
    Numbers::new(9).tensor(&[5, H], 1.0, dtype)
}

fn builder(tensors: &[(String, Option<Tensor>)], dtype: DType) -> VarBuilder<'static> {
    let there = tensors.iter().filter_map(|(name, tensor)| Some((name.clone(), tensor.clone()?)));
    VarBuilder::from_tensors(there.collect::<HashMap<_, _>>(), dtype, &Device::Cpu)
}

#[test]
fn names_of_the_caller_with_each_bias_by_itself() -> Result<()> {
    for biases in all_biases() {
        let cfg = FfnConfig::new(H, I).with_biases(biases);
        let expected = bits(&block(&cfg, DType::F32)?.forward(&x(DType::F32)?)?)?;
        let ([gate, up, down], [gate_bias, up_bias, down_bias]) = parts(biases, DType::F32)?;
        let separate = [
            ("net.0.gate.weight".to_string(), Some(gate.clone())),
            ("net.0.gate.bias".to_string(), gate_bias.clone()),
            ("net.0.value.weight".to_string(), Some(up.clone())),
            ("net.0.value.bias".to_string(), up_bias.clone()),
            ("net.2.weight".to_string(), Some(down.clone())),
            ("net.2.bias".to_string(), down_bias.clone()),
        ];
        let named = cfg.clone().with_names("net.0.gate", "net.0.value", "net.2");
        let ffn = swiglu_ffn(&named, builder(&separate, DType::F32))?;
        assert_eq!(bits(&ffn.forward(&x(DType::F32)?)?)?, expected, "{biases:?}");

        for order in ORDERS {
            let named = cfg.clone().with_fused_names("Wi", "Wo", order);
            let bias = match (&gate_bias, &up_bias) {
                (Some(gate), Some(up)) => Some(pack(gate, up, order)?),
                _ => None,
            };
            let fused = [
                ("Wi.weight".to_string(), Some(pack(&gate, &up, order)?)),
                ("Wi.bias".to_string(), bias),
                ("Wo.weight".to_string(), Some(down.clone())),
                ("Wo.bias".to_string(), down_bias.clone()),
            ];
            let ffn = swiglu_ffn(&named, builder(&fused, DType::F32));
            if biases.gate == biases.up {
                assert_eq!(
                    bits(&ffn?.forward(&x(DType::F32)?)?)?,
                    expected,
                    "{biases:?} {order:?}"
                );
            } else {
                let error = ffn.unwrap_err();
                assert!(
                    matches!(&error, Error::InvalidField { field, .. } if field == "biases"),
                    "{error}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn names_that_are_not_there() -> Result<()> {
    let ([gate, up, down], _) = parts(Biases::NONE, DType::F32)?;
    let tensors = [
        ("Wi.weight".to_string(), Some(pack(&gate, &up, FusedOrder::GateFirst)?)),
        ("Wo.weight".to_string(), Some(down)),
    ];
    let cfg = FfnConfig::new(H, I).with_fused_names("Wi", "Wout", FusedOrder::GateFirst);
    let error = swiglu_ffn(&cfg, builder(&tensors, DType::F32)).unwrap_err();
    assert!(
        matches!(&error, Error::MissingTensor { tried, .. } if tried == &["Wout.weight"]),
        "{error}"
    );
    assert_eq!(cfg.names, Some(Names::fused("Wi", "Wout", FusedOrder::GateFirst)));
    Ok(())
}

#[test]
fn the_weights_of_a_block_make_the_block_again() -> Result<()> {
    for dtype in [DType::F32, DType::BF16, DType::F16, DType::F64] {
        for biases in all_biases() {
            let cfg = FfnConfig::new(H, I).with_biases(biases);
            let ffn = block(&cfg, dtype)?;
            let weights = ffn.weights()?;
            let (expected, expected_biases) = parts(biases, dtype)?;
            let GateUp::Separate { gate_proj, up_proj, gate_bias, up_bias, .. } = &weights.gate_up
            else {
                panic!("expected gate and up as two tensors");
            };
            for (found, expected) in
                [gate_proj, up_proj, &weights.down_proj].into_iter().zip(&expected)
            {
                assert_eq!(bits(found)?, bits(expected)?, "{dtype:?} {biases:?}");
            }
            for (found, expected) in
                [gate_bias, up_bias, &weights.down_bias].into_iter().zip(&expected_biases)
            {
                let of = |bias: &Option<Tensor>| bias.as_ref().map(bits).transpose();
                assert_eq!(of(found)?, of(expected)?, "{dtype:?} {biases:?}");
            }
            let again = SwiGluFfn::from_weights(ffn.config(), weights)?;
            assert_eq!(
                bits(&again.forward(&x(dtype)?)?)?,
                bits(&ffn.forward(&x(dtype)?)?)?,
                "{dtype:?} {biases:?}"
            );
        }
    }
    Ok(())
}

#[test]
fn freezing_a_trained_block_packs_it() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let cfg = FfnConfig::new(H, I).with_biases(Biases::new(false, false, true));
    let trained = swiglu_ffn(&cfg, vb.pp("mlp"))?;
    let head = linear(H, 7, vb.pp("head"))?;
    let (frozen, frozen_head) = (trained.freeze()?, head.freeze()?);
    assert!(
        trained.kernel().starts_with("trained") && !frozen.kernel().starts_with("trained"),
        "{}",
        frozen.kernel()
    );
    assert!(head.kernel().starts_with("trained") && !frozen_head.kernel().starts_with("trained"));

    let x = x(DType::F32)?;
    let (y, expected) = (frozen.forward(&x)?, trained.forward(&x)?);
    // Both have the same bound: that of sums of H and I products, each of size about 1.
    let size = values(&expected)?.iter().fold(1.0, |a: f64, b| a.max(b.abs()));
    let bounds = vec![4.0 * (H + I) as f64 * unit_roundoff(DType::F32) * size; 5 * H];
    check_within("frozen", &y, &values(&expected)?, &bounds)?;

    let gradients = frozen_head.forward(&y)?.sum_all()?.backward()?;
    assert!(
        vars.all_vars().iter().all(|var| gradients.get(var).is_none()),
        "frozen weights have no gradient"
    );
    let gradients = head.forward(&expected)?.sum_all()?.backward()?;
    assert!(vars.all_vars().iter().all(|var| gradients.get(var).is_some()));

    // A later step of an optimizer changes only the trained block.
    let before = bits(&frozen.forward(&x)?)?;
    for var in vars.all_vars() {
        var.set(&var.as_tensor().affine(2.0, 0.0)?)?;
    }
    assert_eq!(bits(&frozen.forward(&x)?)?, before);
    assert_ne!(bits(&trained.forward(&x)?)?, bits(&expected)?);
    Ok(())
}

#[test]
fn x_in_another_dtype_is_computed_in_the_wider_one() -> Result<()> {
    let cfg = FfnConfig::new(H, I).with_bias(true);
    for weights in [DType::F64, DType::F32, DType::BF16, DType::F16] {
        let ffn = block(&cfg, weights)?;
        let ([gate, ..], [bias, ..]) = parts(cfg.biases, weights)?;
        let layer = Linear::new(gate, bias)?;
        for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
            let wide = match (weights, dtype) {
                (a, b) if a == b => a,
                (DType::F64, _) | (_, DType::F64) => DType::F64,
                _ => DType::F32,
            };
            let x = x(dtype)?;
            let (y, z) = (ffn.forward(&x)?, layer.forward(&x)?);
            assert_eq!((y.dtype(), z.dtype()), (dtype, dtype));
            let x = x.to_dtype(wide)?;
            let expected = ffn.to_dtype(wide)?.forward(&x)?.to_dtype(dtype)?;
            assert_eq!(bits(&y)?, bits(&expected)?, "{dtype:?} on {weights:?}");
            let expected = layer.to_dtype(wide)?.forward(&x)?.to_dtype(dtype)?;
            assert_eq!(bits(&z)?, bits(&expected)?, "{dtype:?} on {weights:?}");
        }
        for integer in [DType::U32, DType::U8, DType::I64] {
            let x = Tensor::zeros((5, H), integer, &Device::Cpu)?;
            for error in [ffn.forward(&x).unwrap_err(), layer.forward(&x).unwrap_err()] {
                assert!(
                    matches!(Error::find(&error), Some(Error::DTypeUnsupported { .. })),
                    "{error}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn the_dtype_is_that_of_the_tensors() -> Result<()> {
    let vars = VarMap::new();
    let f32_builder = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    drop(swiglu_ffn(&FfnConfig::new(H, I), f32_builder)?);
    // The variables stay f32, whatever the builder's dtype.
    let bf16_builder = VarBuilder::from_varmap(&vars, DType::BF16, &Device::Cpu);
    let ffn = swiglu_ffn(&FfnConfig::new(H, I), bf16_builder)?;
    assert_eq!(ffn.dtype(), DType::F32);
    assert_eq!(ffn.forward(&x(DType::F32)?)?.dtype(), DType::F32);
    assert_eq!(ffn.forward(&x(DType::BF16)?)?.dtype(), DType::BF16);
    Ok(())
}

/// A backend that returns the tensor of a name without checking the request.
struct Careless(HashMap<&'static str, Tensor>);

impl SimpleBackend for Careless {
    fn get(
        &self,
        _: Shape,
        name: &str,
        _: Init,
        _: DType,
        _: &Device,
    ) -> candle_core::Result<Tensor> {
        self.0
            .get(name)
            .cloned()
            .ok_or_else(|| candle_core::Error::CannotFindTensor { path: name.to_string() }.bt())
    }

    fn get_unchecked(
        &self,
        name: &str,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        self.get(().into(), name, Init::Const(0.0), dtype, device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }
}

#[test]
fn a_backend_that_checks_nothing_is_checked() -> Result<()> {
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu);
    let f32 = DType::F32;
    let load = |changed: &'static str, tensor: Tensor| -> Result<Error> {
        let mut tensors = HashMap::from([
            ("gate_proj.weight", zeros(&[I, H], f32)?),
            ("up_proj.weight", zeros(&[I, H], f32)?),
            ("down_proj.weight", zeros(&[H, I], f32)?),
        ]);
        tensors.insert(changed, tensor);
        let vb = VarBuilder::from_backend(Box::new(Careless(tensors)), f32, Device::Cpu);
        Ok(SwiGluFfn::new(&FfnConfig::new(H, I), vb).unwrap_err())
    };
    for (name, shape) in [
        ("gate_proj.weight", vec![I - 8, H]),
        ("up_proj.weight", vec![40, 16]),
        ("up_proj.weight", vec![400, 16]),
        ("up_proj.weight", vec![H, I]),
        ("down_proj.weight", vec![I, H]),
        ("down_proj.weight", vec![H * I]),
        ("down_proj.weight", vec![1, H, I]),
    ] {
        let error = load(name, zeros(&shape, f32)?)?;
        assert!(
            matches!(&error, Error::Shape { name: n, found, .. } if n == name && *found == shape),
            "{error}"
        );
    }
    let error = load("up_proj.weight", zeros(&[I, H], DType::BF16)?)?;
    assert!(
        matches!(error, Error::DTypeMismatch { name: "up_proj", found: DType::BF16, .. }),
        "{error}"
    );
    let error = load("gate_proj.weight", zeros(&[I, H], DType::U8)?)?;
    assert!(matches!(error, Error::DTypeUnsupported { .. }), "{error}");
    Ok(())
}

#[test]
fn numbers_of_the_formula_are_checked() -> Result<()> {
    let cfg = FfnConfig::new(H, I);
    for (cfg, field) in [
        (cfg.clone().with_limit(f32::NAN), "limit"),
        (cfg.clone().with_limit(-1.0), "limit"),
        (cfg.clone().with_limit(0.0), "limit"),
        (cfg.clone().with_up_offset(f32::INFINITY), "up_offset"),
        (cfg.clone().with_multipliers(f32::NAN, 1.0), "gate_multiplier"),
        (cfg.clone().with_multipliers(1.0, f32::NEG_INFINITY), "down_multiplier"),
    ] {
        let error = block(&cfg, DType::F32).unwrap_err();
        let error = error.downcast::<Error>()?;
        assert!(matches!(&error, Error::InvalidField { field: f, .. } if f == field), "{error}");
    }
    let x = x(DType::F32)?;
    let glu = candle_swiglu::Glu::new(candle_swiglu::GluActivation::Silu).with_limit(-1.0);
    assert!(matches!(glu.mul(&x, &x), Err(Error::InvalidField { .. })));
    Ok(())
}

#[test]
fn ids_of_every_integer_dtype() -> Result<()> {
    let weight = Numbers::new(3).tensor(&[11, H], 1.0, DType::BF16)?;
    let table = Embedding::new(weight.clone())?;
    let expected = bits(&weight.index_select(&Tensor::new(&[3u32, 0, 10, 3], &Device::Cpu)?, 0)?)?;
    for dtype in [DType::U8, DType::U32, DType::I64] {
        let ids = Tensor::new(&[[3u32, 0], [10, 3]], &Device::Cpu)?.to_dtype(dtype)?;
        let rows = table.forward(&ids)?;
        assert_eq!(rows.dims(), [2, 2, H]);
        assert_eq!(bits(&rows)?, expected, "{dtype:?}");
    }
    for (ids, row) in
        [(Tensor::new(&[11u32], &Device::Cpu)?, 11), (Tensor::new(&[0i64, -1], &Device::Cpu)?, -1)]
    {
        let error = table.forward(&ids).unwrap_err();
        let found = Error::find(&error).expect("our error");
        assert!(matches!(found, Error::RowOutOfRange { row: r, rows: 11 } if *r == row), "{error}");
    }
    let error = table.forward(&Tensor::new(&[1f32], &Device::Cpu)?).unwrap_err();
    assert_eq!(
        Error::find(&error).expect("our error").to_string(),
        "ids: expected dtype u8, u32 or i64, found f32"
    );
    Ok(())
}

#[test]
fn an_embedding_is_its_tied_head() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let trained = embedding(11, H, vb.pp("embed_tokens"))?;
    assert_eq!((trained.hidden_size(), trained.embeddings()?.dims()), (H, &[11, H][..]));
    let loss = trained
        .as_linear()
        .forward(&trained.forward(&Tensor::new(&[1u32, 2], &Device::Cpu)?)?)?
        .sum_all()?;
    assert!(loss.backward()?.get(&vars.all_vars()[0]).is_some(), "one variable for both");

    let weight = trained.embeddings()?.detach();
    let tied = Embedding::new(weight.clone())?;
    assert_eq!(bits(&tied.embeddings()?)?, bits(&weight)?);
    let x = x(DType::F32)?;
    let head = Linear::new(weight, None)?;
    assert_eq!(bits(&tied.as_linear().forward(&x)?)?, bits(&head.forward(&x)?)?);
    assert!(linear_no_bias(H, 11, vb.pp("embed_tokens")).is_ok());
    Ok(())
}

/// A block of constants and one variable, which is the first, second or third weight that is read.
/// All combinations of biases are tried.
#[test]
fn a_block_of_constants_and_a_variable() -> Result<()> {
    const NAMES: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];
    for (biases, variable) in
        all_biases().flat_map(|biases| [0, 1, 2].map(|variable| (biases, variable)))
    {
        let cfg = FfnConfig::new(H, I).with_biases(biases);
        let (mut weights, given) = parts(biases, DType::F32)?;
        let var = Var::from_tensor(&weights[variable])?;
        weights[variable] = var.as_tensor().clone();
        let mut tensors = vec![];
        for ((name, weight), bias) in NAMES.into_iter().zip(weights).zip(given) {
            tensors.push((format!("{name}.weight"), Some(weight)));
            tensors.push((format!("{name}.bias"), bias));
        }
        let block = SwiGluFfn::new(&cfg, builder(&tensors, DType::F32))?;
        assert!(block.kernel().starts_with("trained"), "{}", block.kernel());
        let x = x(DType::F32)?;
        let y = block.forward(&x)?;
        let gradients = y.sqr()?.sum_all()?.backward()?;
        assert!(gradients.get(&var).is_some(), "{biases:?}: no gradient of {}", NAMES[variable]);
        let frozen = block.freeze()?;
        assert!(!frozen.kernel().starts_with("trained"), "{}", frozen.kernel());
        let difference = (&y - frozen.forward(&x)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(difference < 1e-5, "{biases:?}, {}: {difference}", NAMES[variable]);
        block.to_dtype(DType::F64)?;
        // A step of an optimizer changes the block, but not its frozen copy.
        let before = bits(&frozen.forward(&x)?)?;
        var.set(&var.zeros_like()?)?;
        assert_ne!(bits(&block.forward(&x)?)?, bits(&y)?, "{biases:?}, {}", NAMES[variable]);
        assert_eq!(bits(&frozen.forward(&x)?)?, before, "{biases:?}, {}", NAMES[variable]);
    }
    Ok(())
}

/// The benchmark's floor reads every byte of the packed weights, with each instruction set and in
/// each order: the sum of the 32-bit words is that of the weights, to which padding adds nothing.
#[test]
fn the_packed_memory_holds_the_weights() -> Result<()> {
    let (h, i) = (300, 700); // several pieces, and a rest in each order
    let mut numbers = Numbers::new(11);
    let mut weight = |rows, k| numbers.tensor(&[rows, k], 1.0, DType::F32);
    let (gate, up, down) = (weight(i, h)?, weight(i, h)?, weight(h, i)?);
    let mut expected = 0u32;
    for matrix in [&gate, &up, &down] {
        let words = matrix.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits);
        expected = words.fold(expected, u32::wrapping_add);
    }
    let block = SwiGluFfn::from_tensors(gate, up, down)?;
    for (kernel, streams) in
        candle_swiglu::cpu_kernels().into_iter().flat_map(|kernel| [(kernel, 1), (kernel, 4)])
    {
        let sum = memory::read_all(kernel, &block.packed_bytes(), streams);
        assert_eq!(sum, expected, "{kernel}, {streams} streams");
    }
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    assert!(SwiGluFfn::new(&FfnConfig::new(h, i), vb)?.packed_bytes().is_empty());
    Ok(())
}
