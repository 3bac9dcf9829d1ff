//! The gate's parameters as the GPU kernels receive them, with one numbering of the activations for
//! CUDA and Metal.

use super::{Glu, GluActivation};

/// `GluParams` of gate.h, passed by value to every kernel that applies the gate.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct GluParams {
    activation: i32,
    beta: f32,
    gate_multiplier: f32,
    limit: f32,
    up_offset: f32,
}

impl From<&Glu> for GluParams {
    fn from(glu: &Glu) -> Self {
        let (activation, beta) = match glu.activation {
            GluActivation::Silu => (0, 1.0),
            GluActivation::Swish { beta } => (1, beta),
            GluActivation::Sigmoid => (2, 1.0),
            GluActivation::Relu => (3, 1.0),
            GluActivation::Gelu => (4, 1.0),
            GluActivation::GeluTanh => (5, 1.0),
            GluActivation::Identity => (6, 1.0),
            GluActivation::Relu2 => (7, 1.0),
        };
        let limit = glu.limit.unwrap_or(f32::INFINITY);
        Self {
            activation,
            beta,
            gate_multiplier: glu.gate_multiplier,
            limit,
            up_offset: glu.up_offset,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const HEADER: &str = include_str!("gate.h");

    /// The constant of an activation in gate.h: `GeluTanh` is `GELU_TANH`.
    fn constant(activation: GluActivation) -> String {
        let variant = format!("{activation:?}");
        let variant = variant.split(' ').next().unwrap();
        let mut name = String::new();
        for c in variant.chars() {
            if c.is_uppercase() && !name.is_empty() {
                name.push('_');
            }
            name.push(c.to_ascii_uppercase());
        }
        name
    }

    #[test]
    fn every_activation_has_its_number_and_its_case_in_the_kernels() {
        let numbers: Vec<String> = GluActivation::ALL
            .iter()
            .map(|&activation| {
                format!(
                    "{} = {}",
                    constant(activation),
                    GluParams::from(&Glu::new(activation)).activation
                )
            })
            .collect();
        let declared = format!("enum Activation : int {{ {} }};", numbers.join(", "));
        assert!(HEADER.contains(&declared), "gate.h has no line {declared}");
        for name in GluActivation::ALL.iter().copied().map(constant) {
            assert_eq!(HEADER.matches(&format!("    case {name}: return ")).count(), 1, "{name}");
        }
    }

    /// The emulators run every activation in each of their lists.
    #[test]
    fn every_activation_is_tested_on_the_emulators() {
        for (file, text) in [
            ("cuda_emu/gate_test.cpp", include_str!("../../tests/cuda_emu/gate_test.cpp")),
            ("cuda_emu/decode_test.cpp", include_str!("../../tests/cuda_emu/decode_test.cpp")),
            ("cuda_emu/prefill_test.cpp", include_str!("../../tests/cuda_emu/prefill_test.cpp")),
            ("metal_shim/reference.hpp", include_str!("../../tests/metal_shim/reference.hpp")),
        ] {
            for name in GluActivation::ALL.iter().copied().map(constant) {
                let listed = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
                let listed =
                    text.split('{').skip(1).any(|item| {
                        item.split(listed).find(|word| !word.is_empty()) == Some(&name)
                    }) || text.contains(&format!("\", {name}}}"))
                        || text.contains(&format!("\", {name},"));
                assert!(listed, "tests/{file} has no case of {name}");
            }
        }
    }

    #[test]
    fn fields_are_those_of_the_header() {
        let fields = [
            "struct GluParams {",
            "  int activation;",
            "  float beta;",
            "  float gate_multiplier;",
            "  float limit;",
            "  float up_offset;",
            "};",
        ];
        let without_comments: Vec<&str> =
            HEADER.lines().map(|line| line.split("//").next().unwrap().trim_end()).collect();
        assert!(
            without_comments.join("\n").contains(&fields.join("\n")),
            "gate.h declares other fields"
        );
        assert_eq!((size_of::<GluParams>(), align_of::<GluParams>()), (20, 4));
    }

    #[test]
    fn modifiers_reach_the_kernel() {
        let op = Glu::new(GluActivation::Swish { beta: 1.5 })
            .with_limit(7.0)
            .with_up_offset(1.0)
            .with_gate_multiplier(0.5);
        let expected = GluParams {
            activation: 1,
            beta: 1.5,
            gate_multiplier: 0.5,
            limit: 7.0,
            up_offset: 1.0,
        };
        assert_eq!(GluParams::from(&op), expected);
        let plain = GluParams {
            activation: 4,
            beta: 1.0,
            gate_multiplier: 1.0,
            limit: f32::INFINITY,
            up_offset: 0.0,
        };
        assert_eq!(GluParams::from(&Glu::new(GluActivation::Gelu)), plain);
    }
}
