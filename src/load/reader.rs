//! The weights under the prefix of a `VarBuilder`.

use candle_core::Tensor;
use candle_nn::{Init, VarBuilder, init};

use super::family::{Family, Names};
use super::missing::{plain_mlp, suggest};
use super::unread::{check_block, contains_anything, joined};
use super::weights::{Piece, Wanted, fused_bias};
use crate::check::check_float;
use crate::error::{Error, Result};
use crate::which::Which;

/// Finds the weights under `vb`'s prefix and passes each projection to `take` before the next is
/// read.
pub(crate) fn load_each(
    wanted: &Wanted<'_>,
    vb: &VarBuilder,
    take: &mut dyn FnMut(Piece) -> Result<()>,
) -> Result<()> {
    let (h, i) = (wanted.hidden_size, wanted.intermediate_size);
    let names = match (wanted.names, wanted.family) {
        (Some(names), _) => names.clone(),
        (None, Some(family)) => family.names(),
        (None, None) => detect(vb)?.names(),
    };
    let loader =
        Loader { vb, names: &names, named: wanted.names.is_some() || wanted.family.is_some() };
    let down = match &names {
        Names::Separate { gate, up, down } => {
            take(Piece::one(Which::Gate, loader.projection(gate, (i, h), wanted.biases.gate)?))?;
            take(Piece::one(Which::Up, loader.projection(up, (i, h), wanted.biases.up)?))?;
            down
        }
        Names::Fused { gate_up, down, order } => {
            let tensors = loader.projection(gate_up, (2 * i, h), fused_bias(wanted.biases)?)?;
            take(Piece::gate_up(tensors, *order))?;
            down
        }
    };
    let down = loader.projection(down, (h, i), wanted.biases.down)?;
    check_block(vb, &names, i)?;
    take(Piece::one(Which::Down, down))
}

/// The family whose names are under `vb`'s prefix; `Llama` if the source contains every name or
/// none.
fn detect(vb: &VarBuilder) -> Result<Family> {
    if contains_anything(vb) {
        return Ok(Family::Llama);
    }
    let present = |family: &Family| {
        family.weight_names().iter().filter(|name| vb.contains_tensor(name)).count()
    };
    let complete = |family: &Family| present(family) == family.weight_names().len();
    let candidates: Vec<Family> =
        Family::ALL.into_iter().filter(|f| !f.must_be_named() && complete(f)).collect();
    match candidates[..] {
        [Family::Meta] if !prefix_is_meta(&vb.prefix()) => {
            Err(ambiguous(vb, &[Family::Meta, Family::Xformers]))
        }
        [family] => Ok(family),
        [_, _, ..] => Err(ambiguous(vb, &candidates)),
        [] => {
            // Incomplete: the family most of whose names are there, so that the error names what is
            // missing.
            let partial = Family::ALL.into_iter().filter(|f| !f.must_be_named() && present(f) > 0);
            Ok(partial.max_by_key(|f| (present(f), *f == Family::Llama)).unwrap_or(Family::Llama))
        }
    }
}

/// `layers.0.feed_forward` (Meta LLaMA), `block_sparse_moe.experts.3` (Mixtral)
pub(crate) fn prefix_is_meta(prefix: &str) -> bool {
    prefix.split('.').any(|part| part == "feed_forward" || part == "experts")
}

fn ambiguous(vb: &VarBuilder, families: &[Family]) -> Error {
    let mut names: Vec<String> = families.iter().flat_map(|family| family.weight_names()).collect();
    names.sort();
    names.dedup();
    let families =
        families.iter().map(|family| format!("{family:?}: {}", family.names())).collect();
    Error::AmbiguousNames { prefix: vb.prefix(), names, families }
}

/// Loads one family's projections and turns every failure into an error that says what was looked
/// for and what is there.
struct Loader<'a> {
    vb: &'a VarBuilder<'a>,
    names: &'a Names,
    /// The caller gave the family or the names.
    named: bool,
}

impl Loader<'_> {
    /// `name.weight` (out,in) and `name.bias` (out)
    fn projection(
        &self,
        name: &str,
        (out_dim, in_dim): (usize, usize),
        bias: bool,
    ) -> Result<(Tensor, Option<Tensor>)> {
        load_projection(&self.vb.pp(name), out_dim, in_dim, Some(bias)).map_err(|error| match error
        {
            Error::MissingTensor { present, location, .. } => {
                self.missing(name, bias, present, location)
            }
            other => other,
        })
    }

    fn missing(
        &self,
        name: &str,
        bias: bool,
        listed: Box<[String]>,
        location: Option<std::path::PathBuf>,
    ) -> Error {
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
            let firsts = Family::ALL
                .iter()
                .filter(|f| !f.must_be_named())
                .map(|f| f.weight_names().remove(0));
            firsts.collect()
        };
        let suggestions = suggest(self.vb, &tried).into();
        Error::MissingTensor {
            prefix: self.vb.prefix(),
            tried,
            present: present.into(),
            suggestions,
            location,
        }
    }
}

/// `weight` (out,in) and `bias` (out) under `vb`'s prefix. `bias`: must be there, must not be
/// there, or taken if there.
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
    let tensor =
        vb.get_with_hints(shape, name, hint).map_err(|error| match strip_backtrace(error) {
            E::CannotFindTensor { .. }
            | E::SafeTensor(safetensors::SafeTensorError::TensorNotFound(_)) => {
                let tried = vec![name.to_string()];
                let suggestions = suggest(vb, &tried).into();
                Error::MissingTensor {
                    prefix: vb.prefix(),
                    tried,
                    present: Box::default(),
                    suggestions,
                    location: None,
                }
            }
            E::UnexpectedShape { expected, got, .. } => Error::Shape {
                name: full(),
                expected: expected.into_dims(),
                found: got.into_dims(),
                location: None,
            },
            other => Error::from(other),
        })?;
    // Not every backend of a VarBuilder compares the shape with the expected one.
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
