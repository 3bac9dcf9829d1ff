//! Suggestions in the error for a missing tensor: prefixes that have such names, and a plain MLP
//! instead of a gated one.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use candle_nn::VarBuilder;

use crate::error::Error;
use crate::load::unread::{Listing, contains_anything, joined};

/// How many prefixes are suggested at most.
const MOST: usize = 3;

/// Prefixes other than `vb`'s under which one of the names is there, the likeliest first.
pub(crate) fn suggest(vb: &VarBuilder, names: &[String]) -> Vec<String> {
    if contains_anything(vb) {
        return vec![];
    }
    let (wanted, root) = (vb.prefix(), vb.root());
    match Listing::of(&root) {
        Some(listing) => {
            nearest(&wanted, names, listing.tensors.iter().map(|tensor| tensor.name.as_str()))
        }
        None => {
            let there = |prefix: &String| {
                names.iter().any(|name| root.contains_tensor(&joined(prefix, name)))
            };
            variants(&wanted).into_iter().filter(there).take(MOST).collect()
        }
    }
}

/// The prefixes of `tensors` under which one of `names` is, those most similar to `wanted` first.
pub(crate) fn nearest<'a>(
    wanted: &str,
    names: &[String],
    tensors: impl Iterator<Item = &'a str>,
) -> Vec<String> {
    let prefix = |tensor: &'a str, name: &String| {
        let prefix = tensor.strip_suffix(name.as_str())?;
        if prefix.is_empty() { Some(prefix) } else { prefix.strip_suffix('.') }
    };
    let prefixes: BTreeSet<&str> =
        tensors.filter_map(|tensor| names.iter().find_map(|name| prefix(tensor, name))).collect();
    let mut prefixes: Vec<&str> = prefixes.into_iter().filter(|prefix| *prefix != wanted).collect();
    prefixes.sort_by_key(|prefix| rank(wanted, prefix));
    prefixes.into_iter().take(MOST).map(str::to_string).collect()
}

/// Smaller is likelier: the same layer first, then the longer common end, then the longer common
/// beginning.
fn rank(wanted: &str, prefix: &str) -> (bool, Reverse<usize>, Reverse<usize>, Vec<u64>) {
    let numbers =
        |text: &str| text.split('.').filter_map(|part| part.parse().ok()).collect::<Vec<u64>>();
    let equal =
        |pairs: &mut dyn Iterator<Item = (&str, &str)>| pairs.take_while(|(a, b)| a == b).count();
    let end = equal(&mut wanted.rsplit('.').zip(prefix.rsplit('.')));
    let beginning = equal(&mut wanted.split('.').zip(prefix.split('.')));
    let (asked, found) = (numbers(wanted), numbers(prefix));
    (!asked.is_empty() && asked != found, Reverse(end), Reverse(beginning), found)
}

/// Where the same module is in other checkpoints: below another head, or one module further down.
fn variants(wanted: &str) -> Vec<String> {
    const HEADS: [&str; 6] = [
        "model",
        "",
        "transformer",
        "language_model.model",
        "model.language_model",
        "base_model.model.model",
    ];
    const TAILS: [&str; 3] = ["", "mlp", "feed_forward"];
    let stripped = HEADS.iter().filter_map(|head| wanted.strip_prefix(head)?.strip_prefix('.'));
    let core = stripped.min_by_key(|core| core.len()).unwrap_or(wanted);
    let module = core
        .rsplit_once('.')
        .filter(|(_, last)| TAILS.contains(last))
        .map_or(core, |(parent, _)| parent);
    let mut all = vec![];
    for base in [core, module] {
        for tail in TAILS {
            let end = if tail.is_empty() { base.to_string() } else { joined(base, tail) };
            all.extend(
                HEADS
                    .iter()
                    .map(|head| if end.is_empty() { head.to_string() } else { joined(head, &end) }),
            );
        }
    }
    let mut seen = BTreeSet::from([wanted.to_string()]);
    all.retain(|prefix| seen.insert(prefix.clone()));
    all
}

/// The error where the projections of an MLP without a gate are under `vb`'s prefix.
pub(crate) fn plain_mlp(vb: &VarBuilder) -> Option<Error> {
    const PAIRS: [(&str, &str); 10] = [
        ("c_fc", "c_proj"),
        ("fc1", "fc2"),
        ("fc_in", "fc_out"),
        ("wi", "wo"),
        ("up_proj", "down_proj"),
        ("dense_h_to_4h", "dense_4h_to_h"),
        ("lin1", "lin2"),
        ("linear1", "linear2"),
        ("linear_1", "linear_2"),
        ("w_1", "w_2"),
    ];
    let there = |name: &str| vb.contains_tensor(&format!("{name}.weight"));
    if contains_anything(vb) || there("gate_proj") {
        return None;
    }
    let (up, down) = PAIRS.into_iter().find(|(up, down)| there(up) && there(down))?;
    Some(Error::PlainMlp { prefix: vb.prefix(), up, down })
}
