//! The weights of one block.

use candle_core::Tensor;

use super::family::{Family, FusedOrder, Names};
use crate::check::{check_float, check_same};
use crate::error::{Error, Result};
use crate::which::Which;

/// Which of the three projections have a bias.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Biases {
    /// gate_proj has one.
    pub gate: bool,
    /// up_proj has one.
    pub up: bool,
    /// down_proj has one.
    pub down: bool,
}

impl Biases {
    /// No projection has a bias.
    pub const NONE: Self = Self::new(false, false, false);
    /// Every projection has a bias.
    pub const ALL: Self = Self::new(true, true, true);

    /// Sets each by itself.
    pub const fn new(gate: bool, up: bool, down: bool) -> Self {
        Self { gate, up, down }
    }
}

/// The weights that a block needs, and how they are named.
pub(crate) struct Wanted<'a> {
    /// H
    pub(crate) hidden_size: usize,
    /// I
    pub(crate) intermediate_size: usize,
    pub(crate) biases: Biases,
    /// Detected when `None` and there are no `names`.
    pub(crate) family: Option<Family>,
    /// They take precedence over `family`.
    pub(crate) names: Option<&'a Names>,
}

/// The gate and up projections as they are stored, weights (out, in).
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum GateUp {
    /// Two tensors.
    #[non_exhaustive]
    Separate {
        /// (I,H)
        gate_proj: Tensor,
        /// (I,H)
        up_proj: Tensor,
        /// (I)
        gate_bias: Option<Tensor>,
        /// (I)
        up_bias: Option<Tensor>,
    },
    /// Rows of one tensor. Where it is not packed for the kernels, gate and up are computed by one
    /// product.
    #[non_exhaustive]
    Fused {
        /// (2I,H)
        gate_up_proj: Tensor,
        /// (2I), in the same order
        bias: Option<Tensor>,
        /// Which rows are which.
        order: FusedOrder,
    },
}

impl GateUp {
    /// gate_proj (I,H), up_proj (I,H), and their biases (I).
    pub fn separate(
        gate_proj: Tensor,
        up_proj: Tensor,
        gate_bias: Option<Tensor>,
        up_bias: Option<Tensor>,
    ) -> Self {
        Self::Separate { gate_proj, up_proj, gate_bias, up_bias }
    }

    /// gate_up_proj (2I,H) and its bias (2I), with rows in this order.
    pub fn fused(gate_up_proj: Tensor, bias: Option<Tensor>, order: FusedOrder) -> Self {
        Self::Fused { gate_up_proj, bias, order }
    }
}

/// The weights of one block, for [`crate::SwiGluFfn::from_weights`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Weights {
    /// The gate and up projections.
    pub gate_up: GateUp,
    /// (H,I)
    pub down_proj: Tensor,
    /// (H)
    pub down_bias: Option<Tensor>,
}

impl Weights {
    /// The gate and up projections, down_proj (H,I) and its bias (H).
    pub fn new(gate_up: GateUp, down_proj: Tensor, down_bias: Option<Tensor>) -> Self {
        Self { gate_up, down_proj, down_bias }
    }

    /// The weights after `f` was applied to every tensor.
    pub(crate) fn map(
        &self,
        f: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Self> {
        let optional = |bias: &Option<Tensor>| bias.as_ref().map(&f).transpose();
        let gate_up = match &self.gate_up {
            GateUp::Separate { gate_proj, up_proj, gate_bias, up_bias } => GateUp::Separate {
                gate_proj: f(gate_proj)?,
                up_proj: f(up_proj)?,
                gate_bias: optional(gate_bias)?,
                up_bias: optional(up_bias)?,
            },
            GateUp::Fused { gate_up_proj, bias, order } => GateUp::Fused {
                gate_up_proj: f(gate_up_proj)?,
                bias: optional(bias)?,
                order: *order,
            },
        };
        Ok(Self { gate_up, down_proj: f(&self.down_proj)?, down_bias: optional(&self.down_bias)? })
    }
}

/// One projection's tensors, or gate's and up's in one.
pub(crate) enum Piece {
    One { which: Which, weight: Tensor, bias: Option<Tensor> },
    GateUp { weight: Tensor, bias: Option<Tensor>, order: FusedOrder },
}

impl Piece {
    pub(super) fn one(which: Which, (weight, bias): (Tensor, Option<Tensor>)) -> Self {
        Self::One { which, weight, bias }
    }

    pub(super) fn gate_up((weight, bias): (Tensor, Option<Tensor>), order: FusedOrder) -> Self {
        Self::GateUp { weight, bias, order }
    }

    /// The weight, and the bias if there is one, with their names.
    pub(crate) fn named(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        let (names, weight, bias) = match self {
            Self::One { which, weight, bias } => ([which.name(), which.bias_name()], weight, bias),
            Self::GateUp { weight, bias, .. } => {
                (["gate_up_proj", "gate_up_proj bias"], weight, bias)
            }
        };
        names.into_iter().zip(std::iter::once(weight).chain(bias))
    }

    /// The weight.
    pub(crate) fn weight(&self) -> &Tensor {
        let (Self::One { weight, .. } | Self::GateUp { weight, .. }) = self;
        weight
    }
}

/// Views of gate's and up's rows of a fused weight (2I,H), or of a fused bias (2I).
pub(crate) fn split(fused: &Tensor, order: FusedOrder) -> candle_core::Result<(Tensor, Tensor)> {
    let i = fused.dim(0)? / 2;
    let half = |start| fused.narrow(0, start, i);
    match order {
        FusedOrder::GateFirst => Ok((half(0)?, half(i)?)),
        FusedOrder::UpFirst => Ok((half(i)?, half(0)?)),
        FusedOrder::Interleaved => {
            let mut dims = vec![i, 2];
            dims.extend(&fused.dims()[1..]);
            let pairs = fused.reshape(dims)?;
            Ok((pairs.narrow(1, 0, 1)?.squeeze(1)?, pairs.narrow(1, 1, 1)?.squeeze(1)?))
        }
    }
}

/// The inverse of [`split`], in new memory.
pub(crate) fn fuse(gate: &Tensor, up: &Tensor, order: FusedOrder) -> candle_core::Result<Tensor> {
    match order {
        FusedOrder::GateFirst => Tensor::cat(&[gate, up], 0),
        FusedOrder::UpFirst => Tensor::cat(&[up, gate], 0),
        FusedOrder::Interleaved => Tensor::stack(&[gate, up], 1)?.flatten(0, 1),
    }
}

impl Weights {
    /// One piece per projection, or one for a fused gate and up.
    pub(crate) fn into_pieces(self) -> Vec<Piece> {
        let mut pieces = match self.gate_up {
            GateUp::Separate { gate_proj, up_proj, gate_bias, up_bias } => {
                vec![
                    Piece::one(Which::Gate, (gate_proj, gate_bias)),
                    Piece::one(Which::Up, (up_proj, up_bias)),
                ]
            }
            GateUp::Fused { gate_up_proj, bias, order } => {
                vec![Piece::gate_up((gate_up_proj, bias), order)]
            }
        };
        pieces.push(Piece::one(Which::Down, (self.down_proj, self.down_bias)));
        pieces
    }

    /// # Errors
    /// Shapes or biases that are not the wanted ones; a dtype that is not a float; mixed dtypes or
    /// devices.
    pub(crate) fn check(&self, wanted: &Wanted<'_>) -> Result<()> {
        for (name, tensor, expected) in self.expected(wanted) {
            if tensor.rank() != expected.len() {
                let expected =
                    if expected.len() == 2 { "rank 2 (out, in)" } else { "rank 1 (out)" };
                return Err(Error::Rank { name, expected, found: tensor.dims().to_vec() });
            }
            if tensor.dims() != expected {
                let found = tensor.dims().to_vec();
                return Err(Error::Shape {
                    name: name.to_string(),
                    expected,
                    found,
                    location: None,
                });
            }
            check_float(name, tensor)?;
            check_same(name, tensor, "down_proj", &self.down_proj)?;
        }
        self.check_biases(wanted.biases)
    }

    fn check_biases(&self, biases: Biases) -> Result<()> {
        let gate_up = match &self.gate_up {
            GateUp::Separate { gate_bias, up_bias, .. } => {
                vec![("gate_proj", gate_bias, biases.gate), ("up_proj", up_bias, biases.up)]
            }
            GateUp::Fused { bias, .. } => vec![("gate_up_proj", bias, fused_bias(biases)?)],
        };
        for (name, bias, expected) in
            gate_up.into_iter().chain([("down_proj", &self.down_bias, biases.down)])
        {
            match bias {
                Some(_) if !expected => {
                    return Err(Error::UnexpectedBias { name: format!("{name}.bias") });
                }
                None if expected => return Err(Error::missing_tensor(format!("{name}.bias"))),
                _ => {}
            }
        }
        Ok(())
    }

    /// The tensors with their names and their expected shapes.
    fn expected(&self, wanted: &Wanted<'_>) -> Vec<(&'static str, &Tensor, Vec<usize>)> {
        let (h, i) = (wanted.hidden_size, wanted.intermediate_size);
        let mut all = vec![("down_proj", &self.down_proj, vec![h, i])];
        all.extend(self.down_bias.iter().map(|b| ("down_proj bias", b, vec![h])));
        match &self.gate_up {
            GateUp::Separate { gate_proj, up_proj, gate_bias, up_bias } => {
                all.extend([
                    ("gate_proj", gate_proj, vec![i, h]),
                    ("up_proj", up_proj, vec![i, h]),
                ]);
                all.extend(gate_bias.iter().map(|b| ("gate_proj bias", b, vec![i])));
                all.extend(up_bias.iter().map(|b| ("up_proj bias", b, vec![i])));
            }
            GateUp::Fused { gate_up_proj, bias, .. } => {
                all.push(("gate_up_proj", gate_up_proj, vec![2 * i, h]));
                all.extend(bias.iter().map(|b| ("gate_up_proj bias", b, vec![2 * i])));
            }
        }
        all
    }
}

/// Whether a fused gate_up_proj has a bias: gate and up both have one or neither has.
pub(super) fn fused_bias(biases: Biases) -> Result<bool> {
    match biases.gate == biases.up {
        true => Ok(biases.gate),
        false => Err(Error::InvalidField {
            field: "biases".into(),
            expected: "gate and up both true or both false where they are rows of one tensor",
            found: format!("{biases:?}"),
        }),
    }
}
