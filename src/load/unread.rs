//! Tensors under a layer's prefix that the layer does not read. Without them its result would
//! differ from that of the checkpoint's model, so they are an error that names them.
//!
//! 1. A [`crate::Checkpoint`] lists its tensors under a reserved name, with the flags that say
//!    which have been read.
//! 2. Other sources of a `VarBuilder` cannot list theirs: names that real checkpoints have are
//!    looked up.

use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::load::family::Names;

// ---------------------------------------------------------------- 1. the listing

/// The reserved name. A tensor of this name could never be loaded as u8, so it hides none.
const LISTING: &str = "\0tensors";

/// The tensors under a prefix.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Listing {
    /// The prefix by which the checkpoint knows them: another one than the `VarBuilder`'s where
    /// names are rewritten on the way.
    pub(crate) prefix: String,
    pub(crate) tensors: Vec<Listed>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Listed {
    /// Without the prefix.
    pub(crate) name: String,
    /// Nobody has read it, and the checkpoint does not count it among the constants.
    pub(crate) unread: bool,
}

/// The prefix that is to be listed, if `name` is a request for a listing.
pub(crate) fn listed_prefix(name: &str) -> Option<&str> {
    let prefix = name.strip_suffix(LISTING)?;
    if prefix.is_empty() { Some(prefix) } else { prefix.strip_suffix('.') }
}

impl Listing {
    /// The reply of a `VarBuilder`'s source.
    pub(crate) fn to_tensor(&self) -> candle_core::Result<Tensor> {
        let bytes = serde_json::to_vec(self).map_err(candle_core::Error::wrap)?;
        let n = bytes.len();
        Tensor::from_vec(bytes, n, &candle_core::Device::Cpu)
    }

    /// The tensors under `vb`'s prefix, if its source can list them.
    pub(crate) fn of(vb: &VarBuilder) -> Option<Self> {
        if contains_anything(vb) || !vb.contains_tensor(LISTING) {
            return None;
        }
        let bytes = vb.get_unchecked_dtype(LISTING, DType::U8).ok()?.to_vec1::<u8>().ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// The full names of the unread tensors that `take` accepts.
    fn unread(&self, take: impl Fn(&str) -> bool) -> Vec<String> {
        let unread = self.tensors.iter().filter(|tensor| tensor.unread && take(&tensor.name));
        unread.map(|tensor| joined(&self.prefix, &tensor.name)).collect()
    }
}

/// The source contains every name, as that of `VarBuilder::zeros` does.
pub(crate) fn contains_anything(vb: &VarBuilder) -> bool {
    vb.contains_tensor("no tensor has this name")
}

/// `prefix.name`
pub(crate) fn joined(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_string() } else { format!("{prefix}.{name}") }
}

// ---------------------------------------------------------------- 2. known names

/// Tensors under a projection besides `weight` and `bias`: adapters, quantized weights and their
/// scales.
const OF_A_PROJECTION: [&str; 52] = [
    "lora_A.weight",
    "lora_B.weight",
    "lora_A.default.weight",
    "lora_B.default.weight",
    "lora_a.weight",
    "lora_b.weight",
    "lora_A",
    "lora_B",
    "lora_a",
    "lora_b",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_embedding_A.default",
    "lora_embedding_B.default",
    "lora_down.weight",
    "lora_up.weight",
    "lora_magnitude_vector",
    "lora_magnitude_vector.weight",
    "lora_magnitude_vector.default.weight",
    "ia3_l",
    "ia3_l.default",
    "hada_w1_a.default",
    "lokr_w1.default",
    "oft_R.default.weight",
    "vera_lambda_b.default",
    "base_layer.weight",
    "modules_to_save.default.weight",
    "qweight",
    "qzeros",
    "scales",
    "zeros",
    "biases",
    "g_idx",
    "SCB",
    "scale",
    "weight_scale",
    "weight_scale_inv",
    "weight_scale_2",
    "weight_zero_point",
    "weight_packed",
    "weight_shape",
    "input_scale",
    "input_zero_point",
    "act_scale",
    "smooth_scale",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4",
    "weight_g",
    "weight_v",
];

/// Modules inside a block that change its value: norms of the product of gate and up, scales of the
/// activation.
const OF_A_BLOCK: [&str; 11] = [
    "ffn_layernorm",
    "ffn_sub_norm",
    "ffn_sub_layernorm",
    "ffn_ln",
    "sub_norm",
    "sub_layernorm",
    "inner_norm",
    "inner_layernorm",
    "act_norm",
    "ffn_act",
    "dwconv",
];

/// Norms that are inside a block if they have I elements, before or behind it if they have H.
const NORMS: [&str; 6] = ["norm", "layernorm", "layer_norm", "LayerNorm", "ln", "rms_norm"];

const PARAMETERS: [&str; 4] = ["weight", "bias", "scale", "scales"];

/// Modules that are next to a block in a transformer's layer: parts of their names between
/// underscores.
const BESIDE_A_BLOCK: [&str; 9] =
    ["attn", "att", "attention", "mixer", "mamba", "ssm", "mix", "conv", "shortconv"];

/// Parts of a name that mark a module as a block, not a layer, regardless of its other tensors.
const IS_A_BLOCK: [&str; 5] = ["mlp", "ffn", "feed", "ff", "experts"];

// ---------------------------------------------------------------- the checks

/// Every tensor that belongs to the block under `vb`'s prefix has been read.
///
/// 1. Tensors under a projection's name belong to the block.
/// 2. So does everything else under the prefix (or under the first part of the names, where they
///    share one: `mlp.w1`).
/// 3. Where attention is under the same prefix (`blk.0.attn_q`), it is that of a whole layer: of
///    the others only the modules belong to the block that are known to be part of one.
/// 4. Under an empty prefix, tensors of deeper modules (`a.b.weight`) do not belong to the block.
pub(crate) fn check_block(vb: &VarBuilder, names: &Names, intermediate_size: usize) -> Result<()> {
    let projections = names.projections();
    let unread = match Listing::of(vb).filter(|listing| !listing.tensors.is_empty()) {
        Some(listing) => {
            let scope = Scope::new(&projections, &listing);
            listing.unread(|name| scope.contains(name))
        }
        None if contains_anything(vb) => vec![],
        None => known(vb, &projections, intermediate_size),
    };
    refuse(vb, "block", unread)
}

/// Every tensor under the prefix of one linear layer or embedding has been read. Under an empty
/// prefix, deeper modules are not the layer's.
pub(crate) fn check_linear(vb: &VarBuilder, layer: &'static str) -> Result<()> {
    let unread = match Listing::of(vb).filter(|listing| !listing.tensors.is_empty()) {
        Some(listing) => {
            let everything = !listing.prefix.is_empty();
            listing
                .unread(|name| everything || !name.contains('.') || OF_A_PROJECTION.contains(&name))
        }
        None if contains_anything(vb) => vec![],
        None => known_of_a_projection(vb, ""),
    };
    refuse(vb, layer, unread)
}

fn refuse(vb: &VarBuilder, layer: &'static str, names: Vec<String>) -> Result<()> {
    if names.is_empty() {
        Ok(())
    } else {
        Err(Error::UnreadTensors { layer, prefix: vb.prefix(), names })
    }
}

/// Which of the tensors under a prefix belong to the block.
struct Scope<'a> {
    projections: &'a [&'a str],
    /// What the projections' names have in common, with its last dot.
    parent: &'a str,
    extent: Extent,
}

#[derive(PartialEq)]
enum Extent {
    /// Everything under the parent.
    Module,
    /// A transformer's layer.
    Layer,
    /// No prefix at all.
    File,
}

impl<'a> Scope<'a> {
    fn new(projections: &'a [&'a str], listing: &Listing) -> Self {
        let parent = common_parent(projections);
        let inside = listing.tensors.iter().filter_map(|tensor| tensor.name.strip_prefix(parent));
        let mut modules = inside.map(first_part);
        let has_part = |name: &str, of: &[&str]| name.split('_').any(|part| of.contains(&part));
        let is_beside = |module: &str| {
            has_part(module, &BESIDE_A_BLOCK) && !has_part(module, &["norm", "ln", "layernorm"])
        };
        let path = joined(&listing.prefix, parent);
        let module =
            path.rsplit('.').find(|name| !name.is_empty() && name.parse::<usize>().is_err());
        let is_block = module.is_some_and(|name| has_part(name, &IS_A_BLOCK));
        let extent = if !is_block && modules.any(is_beside) {
            Extent::Layer
        } else if listing.prefix.is_empty() && parent.is_empty() {
            Extent::File
        } else {
            Extent::Module
        };
        Self { projections, parent, extent }
    }

    fn contains(&self, name: &str) -> bool {
        let of_projection = |projection: &&str| {
            name.strip_prefix(*projection).is_some_and(|rest| rest.starts_with('.'))
        };
        if self.projections.iter().any(of_projection) {
            return true;
        }
        let Some(inside) = name.strip_prefix(self.parent) else { return false };
        match self.extent {
            Extent::Module => true,
            Extent::Layer => OF_A_BLOCK.contains(&first_part(inside)),
            Extent::File => {
                inside.matches('.').count() <= 1 || OF_A_BLOCK.contains(&first_part(inside))
            }
        }
    }
}

fn first_part(name: &str) -> &str {
    name.split('.').next().unwrap_or(name)
}

/// `mlp.` of `mlp.w1`, `mlp.w3`, `mlp.w2`.
fn common_parent<'a>(names: &[&'a str]) -> &'a str {
    let Some((first, others)) = names.split_first() else { return "" };
    let parents = first.rmatch_indices('.').map(|(dot, _)| &first[..=dot]);
    parents
        .into_iter()
        .find(|parent| others.iter().all(|name| name.starts_with(parent)))
        .unwrap_or_default()
}

/// The tensors of known names that are there.
fn known(vb: &VarBuilder, projections: &[&str], intermediate_size: usize) -> Vec<String> {
    let parent = common_parent(projections);
    let mut found: Vec<String> =
        projections.iter().flat_map(|name| known_of_a_projection(vb, name)).collect();
    let parameters =
        |module: &&str| PARAMETERS.map(|parameter| format!("{parent}{module}.{parameter}"));
    let present = |name: &String| vb.contains_tensor(name);
    found.extend(
        OF_A_BLOCK
            .iter()
            .flat_map(parameters)
            .filter(present)
            .map(|name| joined(&vb.prefix(), &name)),
    );
    // A tensor that is there is not created by `get`, and one of another shape is refused.
    let inner = |name: &String| present(name) && vb.get(intermediate_size, name).is_ok();
    found.extend(
        NORMS.iter().flat_map(parameters).filter(inner).map(|name| joined(&vb.prefix(), &name)),
    );
    found
}

fn known_of_a_projection(vb: &VarBuilder, projection: &str) -> Vec<String> {
    let names = OF_A_PROJECTION.iter().map(|name| joined(projection, name));
    names.filter(|name| vb.contains_tensor(name)).map(|name| joined(&vb.prefix(), &name)).collect()
}
