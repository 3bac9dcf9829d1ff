//! The family under whose names an adapter has the pairs of a block.

use super::adapter::LoraAdapter;
use crate::error::{Error, Result};
use crate::load::{Family, Names, prefix_is_meta};

/// The names of the projections of `block`; none if the adapter has no pair for them.
///
/// An adapter may have pairs for some of the projections only. So the family is the one most of
/// whose names are there. Several such families are no matter if they agree on what the names that
/// are there mean.
pub(super) fn find(adapter: &LoraAdapter, block: &str) -> Result<Option<Names>> {
    let present: Vec<&str> = adapter.modules().filter_map(|module| inside(module, block)).collect();
    let families = candidates(&present, prefix_is_meta(block));
    let mut meanings: Vec<Vec<_>> = vec![];
    for family in &families {
        let meaning = present.iter().map(|name| meaning(&family.names(), name)).collect();
        if !meanings.contains(&meaning) {
            meanings.push(meaning);
        }
    }
    match (families.first(), meanings.len()) {
        (None, _) => Ok(None),
        (Some(family), 1) => Ok(Some(family.names())),
        _ => Err(ambiguous(block, &present, &families)),
    }
}

/// The name of a module directly inside `block`.
fn inside<'a>(module: &'a str, block: &str) -> Option<&'a str> {
    let name = module.strip_prefix(block)?.strip_prefix('.')?;
    (!name.contains('.')).then_some(name)
}

/// The families most of whose names are present. `Meta` and `Xformers` differ only in their
/// meaning, which a prefix of Meta's decides.
fn candidates(present: &[&str], is_meta: bool) -> Vec<Family> {
    let count = |family: &Family| {
        let names = family.names();
        names.projections().into_iter().filter(|name| present.contains(name)).count()
    };
    let detected = |family: &Family| !family.must_be_named() || *family == Family::Xformers;
    let families = || Family::ALL.into_iter().filter(detected);
    let most = families().map(|family| count(&family)).max().unwrap_or(0);
    let best: Vec<Family> = families().filter(|family| most > 0 && count(family) == most).collect();
    if is_meta && best.contains(&Family::Meta) { vec![Family::Meta] } else { best }
}

/// What a projection's name means in a family.
fn meaning(names: &Names, name: &str) -> Option<String> {
    let role = names.projections().into_iter().position(|projection| projection == name)?;
    Some(match names {
        Names::Separate { .. } => ["gate", "up", "down"].get(role)?.to_string(),
        Names::Fused { order, .. } if role == 0 => format!("{order:?}"),
        Names::Fused { .. } => "down".to_string(),
    })
}

fn ambiguous(block: &str, present: &[&str], families: &[Family]) -> Error {
    Error::AmbiguousPairs {
        block: block.to_string(),
        names: present.iter().map(|name| name.to_string()).collect(),
        families: families.iter().map(|family| format!("{family:?}: {}", family.names())).collect(),
    }
}
