//! The rotary embedding that a `config.json` describes.

use candle_swiglu::{Error, Result};
use serde_json::{Map, Value};

use super::fields::{Fields, invalid, unsupported};
use super::model_type::ModelType;

/// Rotary position embedding: the base, the rotated part of a head, and the scaling of the
/// frequencies beyond the pretraining context.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    pub theta: f64,
    /// The number of leading values of a head that are rotated.
    pub dim: usize,
    pub scaling: RopeScaling,
}

/// How the rotary frequencies are scaled.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// The frequencies are not scaled.
    None,
    /// Every frequency is divided by `factor`.
    Linear { factor: f64 },
    /// LLaMA 3.1: low frequencies are divided by `factor`, high ones are kept, and those between
    /// are interpolated.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position_embeddings: usize,
    },
    /// Phi-3: each frequency is divided by its own factor. The factors are `short` in texts of up
    /// to `original_max_position_embeddings` positions and `long` in longer ones. cos and sin are
    /// multiplied by `attention_factor`.
    LongRope {
        short: Vec<f64>,
        long: Vec<f64>,
        original_max_position_embeddings: usize,
        attention_factor: f64,
    },
}

impl RopeConfig {
    /// Reads `rope_parameters` (transformers 5), or `rope_scaling` and `rope_theta` (earlier
    /// versions).
    ///
    /// # Errors
    /// The error names the field that is malformed or not supported.
    pub fn of(
        top: &Fields,
        model_type: ModelType,
        head_dim: usize,
        context: usize,
    ) -> Result<Self> {
        let empty = Map::new();
        let rope = section(top, &empty)?;
        let theta = match (rope.positive_opt("rope_theta")?, top.positive_opt("rope_theta")?) {
            (Some(theta), _) | (None, Some(theta)) => theta,
            (None, None) => model_type.defaults().rope_theta,
        };
        let dim = rotary_dim(top, &rope, model_type, head_dim)?;
        let scaling = match (rope_type(&rope)?, model_type) {
            (None | Some("default"), _) => RopeScaling::None,
            (Some("longrope" | "su" | "yarn"), ModelType::Phi3) => {
                longrope(top, &rope, dim, context)?
            }
            (Some("linear"), model_type) if model_type != ModelType::Phi3 => {
                RopeScaling::Linear { factor: rope.positive("factor")? }
            }
            (Some("llama3"), model_type) if model_type != ModelType::Phi3 => {
                llama3(top, &rope, context)?
            }
            (Some(other), ModelType::Phi3) => {
                return Err(unsupported(
                    &rope.name("rope_type"),
                    other,
                    "known for phi3: default, longrope",
                ));
            }
            (Some(other), _) => {
                return Err(unsupported(
                    &rope.name("rope_type"),
                    other,
                    "known: default, linear, llama3",
                ));
            }
        };
        Ok(Self { theta, dim, scaling })
    }
}

fn section<'a>(top: &Fields<'a>, empty: &'a Map<String, Value>) -> Result<Fields<'a>> {
    let (old, new) = (top.get("rope_scaling"), top.get("rope_parameters"));
    let (section, found) = match (old, new) {
        (Some(old), Some(new)) if old != new => {
            return Err(unsupported(
                "rope_scaling",
                old,
                "rope_parameters is there too and says something else",
            ));
        }
        (_, Some(new)) => ("rope_parameters", Some(new)),
        (old, None) => ("rope_scaling", old),
    };
    let map = match found {
        None => empty,
        Some(found) => {
            found.as_object().ok_or_else(|| invalid(section, "a JSON object or null", found))?
        }
    };
    if let Some((layer_type, inner)) = map.iter().find(|(_, value)| value.is_object()) {
        return Err(unsupported(
            &format!("{section}.{layer_type}"),
            inner,
            "all layers share one rotary embedding",
        ));
    }
    Ok(Fields { map, section })
}

fn rope_type<'a>(rope: &Fields<'a>) -> Result<Option<&'a str>> {
    let found = match rope.string("rope_type")? {
        Some(rope_type) => Some(rope_type),
        None => rope.string("type")?,
    };
    match found {
        None if rope.get("factor").is_some() => {
            Err(invalid(&rope.name("rope_type"), "a name", &Value::Null))
        }
        found => Ok(found),
    }
}

/// `partial_rotary_factor` of a head, rounded down as transformers does.
fn rotary_dim(
    top: &Fields,
    rope: &Fields,
    model_type: ModelType,
    head_dim: usize,
) -> Result<usize> {
    const FIELD: &str = "partial_rotary_factor";
    let fields = if rope.get(FIELD).is_some() { rope } else { top };
    let factor = fields.number(FIELD)?.unwrap_or(1.0);
    let value = || fields.get(FIELD).unwrap_or(&Value::Null);
    if factor != 1.0 && model_type != ModelType::Phi3 {
        return Err(unsupported(&fields.name(FIELD), value(), "the whole head is rotated"));
    }
    let dim = (head_dim as f64 * factor) as usize;
    if !(factor > 0.0 && factor <= 1.0 && dim > 0) {
        return Err(invalid(
            &fields.name(FIELD),
            "a part of the head of at least one value and at most all",
            value(),
        ));
    }
    match dim.next_multiple_of(2) <= head_dim {
        true => Ok(dim),
        false => Err(invalid(
            "head_dim",
            "an even number, as its two halves turn together",
            &Value::from(head_dim),
        )),
    }
}

/// The pretraining context. As in transformers, the field of the config precedes that of the
/// section.
fn original_context(top: &Fields, rope: &Fields, context: usize) -> Result<usize> {
    const FIELD: &str = "original_max_position_embeddings";
    match top.size_opt(FIELD)? {
        Some(outside) => Ok(outside),
        None => Ok(rope.size_opt(FIELD)?.unwrap_or(context)),
    }
}

fn llama3(top: &Fields, rope: &Fields, context: usize) -> Result<RopeScaling> {
    let (low, high) = (rope.positive("low_freq_factor")?, rope.positive("high_freq_factor")?);
    if high <= low {
        return Err(Error::InvalidField {
            field: rope.name("high_freq_factor"),
            expected: "more than low_freq_factor",
            found: format!("{high} (low_freq_factor is {low})"),
        });
    }
    Ok(RopeScaling::Llama3 {
        factor: rope.positive("factor")?,
        low_freq_factor: low,
        high_freq_factor: high,
        original_max_position_embeddings: original_context(top, rope, context)?,
    })
}

/// Phi-3's config class has the pretraining context as a field with default 4096, which overrides
/// the section.
fn longrope(top: &Fields, rope: &Fields, dim: usize, context: usize) -> Result<RopeScaling> {
    let original = top.size_opt("original_max_position_embeddings")?.unwrap_or(4096);
    let factors = |field: &'static str| match rope.factors(field)? {
        Some(factors) if factors.len() == dim.div_ceil(2) => Ok(factors),
        found => Err(Error::InvalidField {
            field: rope.name(field),
            expected: "one positive number for each pair of values that is rotated",
            found: match found {
                Some(factors) => format!("{} numbers for {} pairs", factors.len(), dim.div_ceil(2)),
                None => "null".to_string(),
            },
        }),
    };
    let (short, long) = (factors("short_factor")?, factors("long_factor")?);
    let stretch = rope.positive_opt("factor")?.unwrap_or(context as f64 / original as f64);
    let attention_factor = match rope.positive_opt("attention_factor")? {
        Some(attention_factor) => attention_factor,
        None if stretch <= 1.0 => 1.0,
        None => (1.0 + stretch.ln() / (original as f64).ln()).sqrt(),
    };
    Ok(RopeScaling::LongRope {
        short,
        long,
        original_max_position_embeddings: original,
        attention_factor,
    })
}
