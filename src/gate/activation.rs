//! The gate activations of the GLU family, their names in Hugging Face configs, and the modifiers
//! that models apply around them.

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
/// | `Relu2` | max(g, 0)² | gated squared ReLU | `relu2`, `relu_squared` |
/// | `Gelu` | g·Φ(g), exact through erf | GEGLU | `gelu`, `gelu_python`, `geglu` |
/// | `GeluTanh` | g·σ(√(8/π)·(g + 0.044715·g³)) | GEGLU, tanh form | `gelu_pytorch_tanh`, `gelu_new`, `gelu_fast`, `gelu_tanh` |
/// | `Identity` | g | bilinear | `linear`, `identity`, `bilinear` |
///
/// Source: N. Shazeer, "GLU Variants Improve Transformer", 2020,
/// <https://arxiv.org/abs/2002.05202>.
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
#[non_exhaustive]
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
    /// max(g, 0)²: the squared ReLU, as in BitNet. In f32 the square is ∞ for g above 1.8·10¹⁹.
    Relu2,
}

impl GluActivation {
    /// One value of each variant, in their order, for tests and listings. `Swish` has the slope of
    /// `quick_gelu`. A later version may add variants.
    ///
    /// ```
    /// use candle_swiglu::GluActivation;
    /// assert!(GluActivation::ALL.contains(&GluActivation::Silu));
    /// ```
    pub const ALL: &'static [Self] = &[
        Self::Silu,
        Self::Swish { beta: 1.702 },
        Self::Sigmoid,
        Self::Relu,
        Self::Gelu,
        Self::GeluTanh,
        Self::Identity,
        Self::Relu2,
    ];
}

/// The gate with the modifiers that published models use:
///
/// `out = act(min(m·gate, limit)) ⊙ (clamp(up, ±limit) + c)`
///
/// with gate multiplier m (Falcon-H1), limit and up offset c (gpt-oss: 7 and 1, with Swish of β =
/// 1.702). By default m = 1, there is no limit, and c = 0. The gradient passes below the limit and
/// is 0 at the limit and beyond, as in PyTorch 2.15's clamp.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_swiglu::{Glu, GluActivation};
/// let gpt_oss = Glu::new(GluActivation::Identity).with_limit(7.0).with_up_offset(1.0);
/// let gate = Tensor::new(&[2f32, 100.0], &Device::Cpu)?;
/// let up = Tensor::new(&[3f32, -100.0], &Device::Cpu)?;
/// assert_eq!(gpt_oss.mul(&gate, &up)?.to_vec1::<f32>()?, [8.0, -42.0]); // 2·(3+1), 7·(-7+1)
/// # Ok::<(), candle_swiglu::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Glu {
    /// act
    pub activation: GluActivation,
    /// m
    pub gate_multiplier: f32,
    /// limit
    pub limit: Option<f32>,
    /// c
    pub up_offset: f32,
}

impl Glu {
    /// `act(gate) ⊙ up`
    pub fn new(activation: GluActivation) -> Self {
        Self { activation, gate_multiplier: 1.0, limit: None, up_offset: 0.0 }
    }

    /// Multiplies the gate by m before everything else.
    pub fn with_gate_multiplier(self, gate_multiplier: f32) -> Self {
        Self { gate_multiplier, ..self }
    }

    /// Bounds the gate from above and up on both sides.
    pub fn with_limit(self, limit: f32) -> Self {
        Self { limit: Some(limit), ..self }
    }

    /// Adds c to the bounded up.
    pub fn with_up_offset(self, up_offset: f32) -> Self {
        Self { up_offset, ..self }
    }

    /// Checks the numbers. Every operation that uses them makes the same check.
    ///
    /// # Errors
    /// A limit that is not above 0, a multiplier, an offset or a β that is not finite; the error
    /// names the field.
    pub fn validate(&self) -> Result<()> {
        let beta = match self.activation {
            GluActivation::Swish { beta } => beta,
            _ => 1.0,
        };
        let fields = [
            (
                "limit",
                self.limit.unwrap_or(1.0),
                "a number above 0",
                self.limit.is_none_or(|limit| limit > 0.0),
            ),
            (
                "gate_multiplier",
                self.gate_multiplier,
                "a finite number",
                self.gate_multiplier.is_finite(),
            ),
            ("up_offset", self.up_offset, "a finite number", self.up_offset.is_finite()),
            ("beta", beta, "a finite number", beta.is_finite()),
        ];
        match fields.into_iter().find(|(.., valid)| !valid) {
            None => Ok(()),
            Some((field, found, expected, _)) => Err(Error::InvalidField {
                field: field.to_string(),
                expected,
                found: found.to_string(),
            }),
        }
    }

    /// Whether no modifier is set.
    pub(crate) fn is_plain(&self) -> bool {
        self.gate_multiplier == 1.0 && self.limit.is_none() && self.up_offset == 0.0
    }
}

const KNOWN: &str = "silu, swish, swish(β), quick_gelu, sigmoid, relu, gelu, gelu_python, gelu_new, gelu_fast, gelu_accurate, gelu_pytorch_tanh, \
                     gelu_python_tanh, gelu_tanh, linear, identity, swiglu, glu, reglu, geglu, bilinear, relu2, relu_squared";

impl FromStr for GluActivation {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Ok(match name {
            "silu" | "swish" | "swiglu" => Self::Silu,
            "quick_gelu" => Self::Swish { beta: 1.702 },
            "sigmoid" | "glu" => Self::Sigmoid,
            "relu" | "reglu" => Self::Relu,
            "gelu" | "gelu_python" | "geglu" => Self::Gelu,
            "gelu_pytorch_tanh" | "gelu_python_tanh" | "gelu_new" | "gelu_fast"
            | "gelu_accurate" | "gelu_tanh" => Self::GeluTanh,
            "linear" | "identity" | "bilinear" => Self::Identity,
            "relu2" | "relu_squared" => Self::Relu2,
            other => match swish_beta(other) {
                Some(beta) => Self::Swish { beta },
                None => {
                    return Err(Error::UnknownActivation { name: other.to_string(), known: KNOWN });
                }
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
            Self::Relu2 => f.write_str("relu2"),
        }
    }
}

/// The variant that computes the same function. Candle's `Gelu` is the exact one; `NewGelu` and
/// `GeluPytorchTanh` are the tanh form.
///
/// # Errors
/// An activation that no variant computes.
impl TryFrom<candle_nn::Activation> for GluActivation {
    type Error = Error;

    fn try_from(activation: candle_nn::Activation) -> Result<Self> {
        use candle_nn::Activation as A;
        let reason = match activation {
            A::Silu | A::Swish => return Ok(Self::Silu),
            A::Sigmoid => return Ok(Self::Sigmoid),
            A::Relu => return Ok(Self::Relu),
            A::Gelu => return Ok(Self::Gelu),
            A::NewGelu | A::GeluPytorchTanh => return Ok(Self::GeluTanh),
            A::Relu2 => return Ok(Self::Relu2),
            A::Swiglu => "candle_nn's Swiglu halves its input; the gate of SwiGLU is Silu",
            A::Relu6 | A::HardSigmoid | A::Mish | A::HardSwish | A::Elu(_) | A::LeakyRelu(_) => {
                "no GluActivation computes it"
            }
        };
        Err(Error::Unsupported {
            field: "activation".into(),
            value: format!("{activation:?}"),
            reason,
        })
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

#[cfg(test)]
mod tests {
    use super::GluActivation::{self, *};

    /// A new variant does not compile until it has a position in this chain.
    fn after(activation: GluActivation) -> Option<GluActivation> {
        match activation {
            Silu => Some(Swish { beta: 1.702 }),
            Swish { .. } => Some(Sigmoid),
            Sigmoid => Some(Relu),
            Relu => Some(Gelu),
            Gelu => Some(GeluTanh),
            GeluTanh => Some(Identity),
            Identity => Some(Relu2),
            Relu2 => None,
        }
    }

    #[test]
    fn all_has_every_variant_and_its_name_is_known() {
        let chain: Vec<GluActivation> =
            std::iter::successors(Some(Silu), |&activation| after(activation)).collect();
        assert_eq!(chain, GluActivation::ALL);
        for &activation in GluActivation::ALL {
            let name = activation.to_string();
            assert_eq!(name.parse::<GluActivation>().ok(), Some(activation), "{name}");
            let listed = name.split('(').next().unwrap_or_default();
            assert!(super::KNOWN.split(", ").any(|known| known == listed), "KNOWN has no {listed}");
        }
    }
}
