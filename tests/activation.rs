//! What `GluActivation` and `Glu` accept from a caller: the activations of candle_nn, and numbers
//! that make a formula.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor};
use candle_nn::{Activation, Module};
use candle_swiglu::{Error, FfnConfig, Glu, GluActivation, glu_mul};
use common::values;

#[test]
fn candle_nns_activations() -> anyhow::Result<()> {
    let gate = Tensor::arange(-60f64, 61., &Device::Cpu)?.affine(0.1, 0.003)?;
    let one = gate.ones_like()?;
    for (theirs, ours) in [
        (Activation::Silu, GluActivation::Silu),
        (Activation::Swish, GluActivation::Silu),
        (Activation::Sigmoid, GluActivation::Sigmoid),
        (Activation::Relu, GluActivation::Relu),
        (Activation::Gelu, GluActivation::Gelu),
        (Activation::NewGelu, GluActivation::GeluTanh),
        (Activation::GeluPytorchTanh, GluActivation::GeluTanh),
        (Activation::Relu2, GluActivation::Relu2),
    ] {
        assert_eq!(GluActivation::try_from(theirs)?, ours, "{theirs:?}");
        // Both compute the same function in f64, up to a few roundings. The erf and tanh forms of
        // GELU differ by 4e-4.
        let (ours, exact) =
            (values(&glu_mul(ours, &gate, &one)?)?, values(&theirs.forward(&gate)?)?);
        for (ours, exact) in ours.iter().zip(exact) {
            assert!((ours - exact).abs() <= 1e-10, "{theirs:?}: expected {exact}, found {ours}");
        }
    }
    Ok(())
}

#[test]
fn candle_nns_other_activations_are_refused_by_name() {
    for theirs in [
        Activation::Relu6,
        Activation::HardSigmoid,
        Activation::Swiglu,
        Activation::Mish,
        Activation::HardSwish,
        Activation::Elu(1.0),
        Activation::LeakyRelu(0.1),
    ] {
        let error = GluActivation::try_from(theirs).unwrap_err();
        let message = error.to_string();
        assert!(
            matches!(error, Error::Unsupported { .. }) && message.contains(&format!("{theirs:?}")),
            "{message}"
        );
    }
}

#[test]
fn numbers_that_make_no_formula_are_named() {
    let x = Tensor::ones((2, 3), DType::F32, &Device::Cpu).unwrap();
    let glu = Glu::new(GluActivation::Silu);
    for bad in [f32::NAN, -1.0, 0.0, f32::NEG_INFINITY] {
        let error = glu.with_limit(bad).mul(&x, &x).unwrap_err();
        assert!(
            matches!(&error, Error::InvalidField { field, .. } if field == "limit"),
            "{bad}: {error:?}"
        );
        assert!(FfnConfig::new(8, 8).with_limit(bad).validate().is_err(), "{bad}");
    }
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for (glu, name) in [
            (glu.with_gate_multiplier(bad), "gate_multiplier"),
            (glu.with_up_offset(bad), "up_offset"),
            (Glu::new(GluActivation::Swish { beta: bad }), "beta"),
        ] {
            let error = glu.mul(&x, &x).unwrap_err();
            assert!(
                matches!(&error, Error::InvalidField { field, .. } if field == name),
                "{name} {bad}: {error:?}"
            );
        }
        let error = FfnConfig::new(8, 8).with_multipliers(1.0, bad).validate().unwrap_err();
        assert!(
            matches!(&error, Error::InvalidField { field, .. } if field == "down_multiplier"),
            "{bad}: {error:?}"
        );
    }
}
