//! The weights of one block, and how they are found in a `VarBuilder`.

use candle_core::Tensor;
use candle_nn::{Init, VarBuilder, init};

use crate::config::{Biases, FfnConfig};
use crate::error::{Error, Result};
use crate::family::{Family, Names, PackedOrder};
use crate::glu::{check_float, check_same};
use crate::missing::{plain_mlp, suggest};
use crate::unread::{check_block, contains_anything, joined};
use crate::which::Which;

/// The family whose names stand under `vb`'s prefix; `Llama` where a `VarMap` is still to be filled.
fn detect(vb: &VarBuilder) -> Result<Family> {
    if contains_anything(vb) {
        return Ok(Family::Llama);
    }
    let present = |family: &Family| family.weight_names().iter().filter(|name| vb.contains_tensor(name)).count();
    let complete = |family: &Family| present(family) == family.weight_names().len();
    let candidates: Vec<Family> = Family::ALL.into_iter().filter(|f| !f.must_be_named() && complete(f)).collect();
    match candidates[..] {
        [Family::Meta] if !prefix_is_meta(&vb.prefix()) => Err(ambiguous(vb, &[Family::Meta, Family::Xformers])),
        [family] => Ok(family),
        [_, _, ..] => Err(ambiguous(vb, &candidates)),
        [] => {
            // Incomplete: the family most of whose names are there, so that the error names what is missing.
            let partial = Family::ALL.into_iter().filter(|f| !f.must_be_named() && present(f) > 0);
            Ok(partial.max_by_key(|f| (present(f), *f == Family::Llama)).unwrap_or(Family::Llama))
        }
    }
}

/// `layers.0.feed_forward` (Meta LLaMA), `block_sparse_moe.experts.3` (Mixtral)
fn prefix_is_meta(prefix: &str) -> bool {
    prefix.split('.').any(|part| part == "feed_forward" || part == "experts")
}

fn ambiguous(vb: &VarBuilder, families: &[Family]) -> Error {
    let mut names: Vec<String> = families.iter().flat_map(|family| family.weight_names()).collect();
    names.sort();
    names.dedup();
    let families = families.iter().map(|family| format!("{family:?}: {}", family.names())).collect();
    Error::AmbiguousNames { prefix: vb.prefix(), names, families }
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
    /// One tensor with both, computed by one product; gate and up are views of it.
    #[non_exhaustive]
    Packed {
        /// (2I,H)
        gate_up_proj: Tensor,
        /// (2I), in the same order
        bias: Option<Tensor>,
        /// Which rows are which.
        order: PackedOrder,
    },
}

impl GateUp {
    /// gate_proj (I,H), up_proj (I,H), and their biases (I).
    pub fn separate(gate_proj: Tensor, up_proj: Tensor, gate_bias: Option<Tensor>, up_bias: Option<Tensor>) -> Self {
        Self::Separate { gate_proj, up_proj, gate_bias, up_bias }
    }

    /// gate_up_proj (2I,H) and its bias (2I), with rows in this order.
    pub fn packed(gate_up_proj: Tensor, bias: Option<Tensor>, order: PackedOrder) -> Self {
        Self::Packed { gate_up_proj, bias, order }
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

    /// Every tensor through `f`.
    pub(crate) fn map(&self, f: impl Fn(&Tensor) -> candle_core::Result<Tensor>) -> candle_core::Result<Self> {
        let optional = |bias: &Option<Tensor>| bias.as_ref().map(&f).transpose();
        let gate_up = match &self.gate_up {
            GateUp::Separate { gate_proj, up_proj, gate_bias, up_bias } => GateUp::Separate {
                gate_proj: f(gate_proj)?,
                up_proj: f(up_proj)?,
                gate_bias: optional(gate_bias)?,
                up_bias: optional(up_bias)?,
            },
            GateUp::Packed { gate_up_proj, bias, order } => {
                GateUp::Packed { gate_up_proj: f(gate_up_proj)?, bias: optional(bias)?, order: *order }
            }
        };
        Ok(Self { gate_up, down_proj: f(&self.down_proj)?, down_bias: optional(&self.down_bias)? })
    }
}

/// One projection's tensors, or gate's and up's in one.
pub(crate) enum Piece {
    One { which: Which, weight: Tensor, bias: Option<Tensor> },
    GateUp { weight: Tensor, bias: Option<Tensor>, order: PackedOrder },
}

impl Piece {
    fn one(which: Which, (weight, bias): (Tensor, Option<Tensor>)) -> Self {
        Self::One { which, weight, bias }
    }

    fn gate_up((weight, bias): (Tensor, Option<Tensor>), order: PackedOrder) -> Self {
        Self::GateUp { weight, bias, order }
    }

    /// The weight, and the bias if there is one, with their names.
    pub(crate) fn named(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        let (names, weight, bias) = match self {
            Self::One { which, weight, bias } => ([which.name(), which.bias_name()], weight, bias),
            Self::GateUp { weight, bias, .. } => (["gate_up_proj", "gate_up_proj bias"], weight, bias),
        };
        names.into_iter().zip(std::iter::once(weight).chain(bias))
    }

    /// The weight.
    pub(crate) fn weight(&self) -> &Tensor {
        let (Self::One { weight, .. } | Self::GateUp { weight, .. }) = self;
        weight
    }
}

/// Views of gate's and up's rows of a packed weight (2I,H), or of a packed bias (2I).
pub(crate) fn split(packed: &Tensor, order: PackedOrder) -> candle_core::Result<(Tensor, Tensor)> {
    let i = packed.dim(0)? / 2;
    let half = |start| packed.narrow(0, start, i);
    match order {
        PackedOrder::GateFirst => Ok((half(0)?, half(i)?)),
        PackedOrder::UpFirst => Ok((half(i)?, half(0)?)),
        PackedOrder::Interleaved => {
            let mut dims = vec![i, 2];
            dims.extend(&packed.dims()[1..]);
            let pairs = packed.reshape(dims)?;
            Ok((pairs.narrow(1, 0, 1)?.squeeze(1)?, pairs.narrow(1, 1, 1)?.squeeze(1)?))
        }
    }
}

impl Weights {
    /// Finds the weights under `vb`'s prefix and hands them over one projection after the other, each before the next is read.
    pub(crate) fn load_each(cfg: &FfnConfig, vb: &VarBuilder, take: &mut dyn FnMut(Piece) -> Result<()>) -> Result<()> {
        let (h, i) = (cfg.hidden_size, cfg.intermediate_size);
        let names = match (&cfg.names, cfg.family) {
            (Some(names), _) => names.clone(),
            (None, Some(family)) => family.names(),
            (None, None) => detect(vb)?.names(),
        };
        let loader = Loader { vb, names: &names, named: cfg.names.is_some() || cfg.family.is_some() };
        let down = match &names {
            Names::Separate { gate, up, down } => {
                take(Piece::one(Which::Gate, loader.projection(gate, (i, h), cfg.biases.gate)?))?;
                take(Piece::one(Which::Up, loader.projection(up, (i, h), cfg.biases.up)?))?;
                down
            }
            Names::Packed { gate_up, down, order } => {
                let tensors = loader.projection(gate_up, (2 * i, h), packed_bias(cfg.biases)?)?;
                take(Piece::gate_up(tensors, *order))?;
                down
            }
        };
        let down = loader.projection(down, (h, i), cfg.biases.down)?;
        check_block(vb, &names, i)?;
        take(Piece::one(Which::Down, down))
    }

    /// As pieces.
    pub(crate) fn into_pieces(self) -> Vec<Piece> {
        let mut pieces = match self.gate_up {
            GateUp::Separate { gate_proj, up_proj, gate_bias, up_bias } => {
                vec![Piece::one(Which::Gate, (gate_proj, gate_bias)), Piece::one(Which::Up, (up_proj, up_bias))]
            }
            GateUp::Packed { gate_up_proj, bias, order } => vec![Piece::gate_up((gate_up_proj, bias), order)],
        };
        pieces.push(Piece::one(Which::Down, (self.down_proj, self.down_bias)));
        pieces
    }

    /// # Errors
    /// Shapes, biases, dtypes or devices that are not those of the config and of down_proj.
    pub(crate) fn check(&self, cfg: &FfnConfig) -> Result<()> {
        for (name, tensor, expected) in self.expected(cfg) {
            if tensor.rank() != expected.len() {
                let expected = if expected.len() == 2 { "rank 2 (out, in)" } else { "rank 1 (out)" };
                return Err(Error::Rank { name, expected, found: tensor.dims().to_vec() });
            }
            if tensor.dims() != expected {
                let found = tensor.dims().to_vec();
                return Err(Error::Shape { name: name.to_string(), expected, found, location: None });
            }
            check_float(name, tensor)?;
            check_same(name, tensor, "down_proj", &self.down_proj)?;
        }
        self.check_biases(cfg.biases)
    }

    fn check_biases(&self, biases: Biases) -> Result<()> {
        let gate_up = match &self.gate_up {
            GateUp::Separate { gate_bias, up_bias, .. } => {
                vec![("gate_proj", gate_bias, biases.gate), ("up_proj", up_bias, biases.up)]
            }
            GateUp::Packed { bias, .. } => vec![("gate_up_proj", bias, packed_bias(biases)?)],
        };
        for (name, bias, expected) in gate_up.into_iter().chain([("down_proj", &self.down_bias, biases.down)]) {
            match bias {
                Some(_) if !expected => return Err(Error::UnexpectedBias { name: format!("{name}.bias") }),
                None if expected => return Err(Error::missing_tensor(format!("{name}.bias"))),
                _ => {}
            }
        }
        Ok(())
    }

    /// The tensors with their names and the shapes that the config asks of them.
    fn expected(&self, cfg: &FfnConfig) -> Vec<(&'static str, &Tensor, Vec<usize>)> {
        let (h, i) = (cfg.hidden_size, cfg.intermediate_size);
        let mut all = vec![("down_proj", &self.down_proj, vec![h, i])];
        all.extend(self.down_bias.iter().map(|b| ("down_proj bias", b, vec![h])));
        match &self.gate_up {
            GateUp::Separate { gate_proj, up_proj, gate_bias, up_bias } => {
                all.extend([("gate_proj", gate_proj, vec![i, h]), ("up_proj", up_proj, vec![i, h])]);
                all.extend(gate_bias.iter().map(|b| ("gate_proj bias", b, vec![i])));
                all.extend(up_bias.iter().map(|b| ("up_proj bias", b, vec![i])));
            }
            GateUp::Packed { gate_up_proj, bias, .. } => {
                all.push(("gate_up_proj", gate_up_proj, vec![2 * i, h]));
                all.extend(bias.iter().map(|b| ("gate_up_proj bias", b, vec![2 * i])));
            }
        }
        all
    }
}

/// gate_proj and up_proj in one tensor have a bias in one tensor.
pub(crate) fn packed_bias(biases: Biases) -> Result<bool> {
    match biases.gate == biases.up {
        true => Ok(biases.gate),
        false => Err(Error::InvalidField {
            field: "biases".into(),
            expected: "gate and up both true or both false where they are rows of one tensor",
            found: format!("{biases:?}"),
        }),
    }
}

/// Loads one family's projections and turns every failure into an error that says what was looked for and what is there.
struct Loader<'a> {
    vb: &'a VarBuilder<'a>,
    names: &'a Names,
    /// The caller gave the family or the names.
    named: bool,
}

impl Loader<'_> {
    /// `name.weight` (out,in) and `name.bias` (out)
    fn projection(&self, name: &str, (out_dim, in_dim): (usize, usize), bias: bool) -> Result<(Tensor, Option<Tensor>)> {
        load_projection(&self.vb.pp(name), out_dim, in_dim, Some(bias)).map_err(|error| match error {
            Error::MissingTensor { present, location, .. } => self.missing(name, bias, present, location),
            other => other,
        })
    }

    fn missing(&self, name: &str, bias: bool, listed: Box<[String]>, location: Option<std::path::PathBuf>) -> Error {
        let mut present: Vec<String> = Family::ALL.iter().flat_map(|f| f.weight_names()).collect();
        present.retain(|name| self.vb.contains_tensor(name));
        present.extend(listed);
        present.sort();
        present.dedup();
        if let Some(error) = plain_mlp(self.vb).filter(|_| !self.named) {
            return error;
        }
        let nothing = !self.names.weights().iter().any(|name| self.vb.contains_tensor(name));
        let tried = if self.named || !nothing {
            vec![if bias && self.vb.contains_tensor(&format!("{name}.weight")) {
                format!("{name}.bias")
            } else {
                format!("{name}.weight")
            }]
        } else {
            let firsts = Family::ALL.iter().filter(|f| !f.must_be_named()).map(|f| f.weight_names().remove(0));
            firsts.collect()
        };
        let suggestions = suggest(self.vb, &tried).into();
        Error::MissingTensor { prefix: self.vb.prefix(), tried, present: present.into(), suggestions, location }
    }
}

/// `weight` (out,in) and `bias` (out) under `vb`'s prefix. `bias`: must be there, must not be there, or taken if there.
pub(crate) fn load_projection(
    vb: &VarBuilder,
    out_dim: usize,
    in_dim: usize,
    bias: Option<bool>,
) -> Result<(Tensor, Option<Tensor>)> {
    let bound = 1.0 / (in_dim as f64).sqrt();
    let has_bias = vb.contains_tensor("bias") && !contains_anything(vb);
    if bias == Some(false) && has_bias {
        return Err(Error::UnexpectedBias { name: joined(&vb.prefix(), "bias") });
    }
    let weight = get(vb, &[out_dim, in_dim], "weight", init::DEFAULT_KAIMING_NORMAL)?;
    let bias = if bias.unwrap_or(has_bias) {
        Some(get(vb, &[out_dim], "bias", Init::Uniform { lo: -bound, up: bound })?)
    } else {
        None
    };
    Ok((weight, bias))
}

/// One tensor of this shape, with candle's errors turned into this crate's.
pub(crate) fn get(vb: &VarBuilder, shape: &[usize], name: &str, hint: Init) -> Result<Tensor> {
    use candle_core::Error as E;
    let full = || joined(&vb.prefix(), name);
    let tensor = vb.get_with_hints(shape, name, hint).map_err(|error| match strip_backtrace(error) {
        E::CannotFindTensor { .. } | E::SafeTensor(safetensors::SafeTensorError::TensorNotFound(_)) => {
            let tried = vec![name.to_string()];
            let suggestions = suggest(vb, &tried).into();
            Error::MissingTensor { prefix: vb.prefix(), tried, present: Box::default(), suggestions, location: None }
        }
        E::UnexpectedShape { expected, got, .. } => {
            Error::Shape { name: full(), expected: expected.into_dims(), found: got.into_dims(), location: None }
        }
        other => Error::from(other),
    })?;
    // Not every backend of a VarBuilder compares the shape with the one asked for.
    if tensor.dims() != shape {
        let (expected, found) = (shape.to_vec(), tensor.dims().to_vec());
        return Err(Error::Shape { name: full(), expected, found, location: None });
    }
    check_float(&full(), &tensor)?;
    Ok(tensor)
}

fn strip_backtrace(error: candle_core::Error) -> candle_core::Error {
    match error {
        candle_core::Error::WithBacktrace { inner, .. } => strip_backtrace(*inner),
        other => other,
    }
}
