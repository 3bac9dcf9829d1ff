//! The gate activations of the GLU family and their names in Hugging Face configs.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// The activation `act` of a gated linear unit `act(x·Wgᵀ) ⊙ (x·Wuᵀ)`.
///
/// | variant | act(g) | unit | `hidden_act` |
/// |---|---|---|---|
/// | `Silu` | g·σ(g) | SwiGLU | `silu`, `swish`, `swiglu` |
/// | `Swish { beta }` | g·σ(βg) | Swish with β | `quick_gelu` (β = 1.702), `swish(β)` |
/// | `Sigmoid` | σ(g) | GLU | `sigmoid`, `glu` |
/// | `Relu` | max(g, 0) | ReGLU | `relu`, `reglu` |
/// | `Gelu` | g·Φ(g), exact through erf | GEGLU | `gelu`, `gelu_python`, `geglu` |
/// | `GeluTanh` | g·σ(√(8/π)·(g + 0.044715·g³)) | GEGLU, tanh form | `gelu_pytorch_tanh`, `gelu_new`, `gelu_fast`, `gelu_tanh` |
/// | `Identity` | g | bilinear | `linear`, `identity`, `bilinear` |
///
/// Source: N. Shazeer, "GLU Variants Improve Transformer", 2020, <https://arxiv.org/abs/2002.05202>.
///
/// ```
/// use candle_swiglu::GluActivation;
/// assert_eq!("silu".parse::<GluActivation>()?, GluActivation::Silu);
/// assert_eq!("gelu_pytorch_tanh".parse::<GluActivation>()?, GluActivation::GeluTanh);
/// assert!("mish".parse::<GluActivation>().is_err());
/// # Ok::<(), candle_swiglu::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum GluActivation {
    /// g·σ(g): SwiGLU.
    #[default]
    Silu,
    /// g·σ(βg).
    Swish {
        /// The slope β.
        beta: f32,
    },
    /// σ(g): the original GLU.
    Sigmoid,
    /// max(g, 0): ReGLU.
    Relu,
    /// g·Φ(g) with the exact normal distribution function: GEGLU.
    Gelu,
    /// The tanh approximation of GELU.
    GeluTanh,
    /// g: the bilinear unit.
    Identity,
}

const KNOWN: &str = "silu, swish, swish(β), quick_gelu, sigmoid, relu, gelu, gelu_python, gelu_new, gelu_fast, gelu_pytorch_tanh, \
                     gelu_tanh, linear, identity, swiglu, glu, reglu, geglu, bilinear";

impl FromStr for GluActivation {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Ok(match name {
            "silu" | "swish" | "swiglu" => Self::Silu,
            "quick_gelu" => Self::Swish { beta: 1.702 },
            "sigmoid" | "glu" => Self::Sigmoid,
            "relu" | "reglu" => Self::Relu,
            "gelu" | "gelu_python" | "geglu" => Self::Gelu,
            "gelu_pytorch_tanh" | "gelu_new" | "gelu_fast" | "gelu_tanh" => Self::GeluTanh,
            "linear" | "identity" | "bilinear" => Self::Identity,
            other => match swish_beta(other) {
                Some(beta) => Self::Swish { beta },
                None => return Err(Error::UnknownActivation { name: other.to_string(), known: KNOWN }),
            },
        })
    }
}

/// `swish(1.5)` -> 1.5
fn swish_beta(name: &str) -> Option<f32> {
    let beta: f32 = name.strip_prefix("swish(")?.strip_suffix(')')?.parse().ok()?;
    beta.is_finite().then_some(beta)
}

impl fmt::Display for GluActivation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Silu => f.write_str("silu"),
            Self::Swish { beta } => write!(f, "swish({beta})"),
            Self::Sigmoid => f.write_str("sigmoid"),
            Self::Relu => f.write_str("relu"),
            Self::Gelu => f.write_str("gelu"),
            Self::GeluTanh => f.write_str("gelu_pytorch_tanh"),
            Self::Identity => f.write_str("linear"),
        }
    }
}

impl TryFrom<String> for GluActivation {
    type Error = Error;

    fn try_from(name: String) -> Result<Self> {
        name.parse()
    }
}

impl From<GluActivation> for String {
    fn from(activation: GluActivation) -> String {
        activation.to_string()
    }
}
