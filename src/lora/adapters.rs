//! The adapters of one layer: their names, and the one that the layer computes with.

use std::collections::BTreeMap;

use super::pair::Lora;
use crate::error::{Error, Result};

/// The low-rank pairs that an adapter has for one layer.
pub(crate) trait Pairs: Clone {
    /// The same with `f` applied to every pair.
    fn map(&self, f: impl Fn(&Lora) -> Result<Lora>) -> Result<Self>;
}

impl Pairs for Lora {
    fn map(&self, f: impl Fn(&Lora) -> Result<Lora>) -> Result<Self> {
        f(self)
    }
}

/// The adapters of a layer, with pairs `P`. `L` is a layer as it runs.
#[derive(Clone, Debug)]
pub(crate) struct Adapters<P, L> {
    all: BTreeMap<String, P>,
    active: Option<Active<L>>,
    /// Dropout acts.
    training: bool,
}

/// The adapter that the layer computes with.
#[derive(Clone, Debug)]
struct Active<L> {
    name: String,
    /// The layer with this adapter.
    layer: L,
    /// The adapter is part of the layer's weights.
    merged: bool,
}

impl<P, L> Adapters<P, L> {
    pub(crate) fn new() -> Self {
        Self { all: BTreeMap::new(), active: None, training: false }
    }

    /// The layer that runs: with the active adapter, or `base` without one.
    pub(crate) fn running<'a>(&'a self, base: &'a L) -> &'a L {
        self.active.as_ref().map_or(base, |active| &active.layer)
    }

    pub(crate) fn active(&self) -> Option<&str> {
        self.active.as_ref().map(|active| active.name.as_str())
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.all.keys().map(String::as_str)
    }

    /// The same with `f` applied to the layer that runs.
    pub(crate) fn map_running(self, f: impl FnOnce(L) -> L) -> Self {
        let active = self.active.map(|active| Active { layer: f(active.layer), ..active });
        Self { active, ..self }
    }

    /// # Errors
    /// There is an adapter of this name.
    pub(crate) fn insert(&mut self, name: String, pairs: P) -> Result<()> {
        if self.all.contains_key(&name) {
            return Err(Error::AdapterExists { name });
        }
        self.all.insert(name, pairs);
        Ok(())
    }

    /// Removes an adapter. If it was active, none is active any more.
    pub(crate) fn remove(&mut self, name: &str) -> Result<P> {
        let removed = self.all.remove(name).ok_or_else(|| self.unknown(name))?;
        if self.active() == Some(name) {
            self.active = None;
        }
        Ok(removed)
    }

    pub(crate) fn disable(&mut self) {
        self.active = None;
    }

    fn known(&self) -> Vec<String> {
        self.all.keys().cloned().collect()
    }

    fn unknown(&self, name: &str) -> Error {
        Error::UnknownAdapter { name: name.to_string(), known: self.known() }
    }

    /// The active adapter, as it is known by its name.
    fn chosen(&self) -> Result<(&Active<L>, &P)> {
        let chosen =
            self.active.as_ref().and_then(|active| Some((active, self.all.get(&active.name)?)));
        chosen.ok_or_else(|| Error::NoActiveAdapter { known: self.known() })
    }
}

/// `add` makes the layer with pairs added to its products, `merge` the one with pairs in its
/// weights.
impl<P: Pairs, L: Clone> Adapters<P, L> {
    pub(crate) fn activate(&mut self, name: &str, add: impl FnOnce(P) -> Result<L>) -> Result<()> {
        let pairs = self.all.get(name).ok_or_else(|| self.unknown(name))?;
        let layer = add(self.in_mode(pairs)?)?;
        self.active = Some(Active { name: name.to_string(), layer, merged: false });
        Ok(())
    }

    pub(crate) fn set_training(
        &mut self,
        training: bool,
        add: impl FnOnce(P) -> Result<L>,
    ) -> Result<()> {
        let changed = self.training != training;
        self.training = training;
        match &self.active {
            Some(active) if changed && !active.merged => self.activate(&active.name.clone(), add),
            _ => Ok(()),
        }
    }

    pub(crate) fn merge(&mut self, merge: impl FnOnce(&P) -> Result<L>) -> Result<()> {
        let (active, pairs) = self.chosen()?;
        let name = active.name.clone();
        if active.merged {
            return Err(Error::AlreadyMerged { name });
        }
        self.active = Some(Active { name, layer: merge(pairs)?, merged: true });
        Ok(())
    }

    pub(crate) fn unmerge(&mut self, add: impl FnOnce(P) -> Result<L>) -> Result<()> {
        match &self.active {
            Some(active) if active.merged => self.activate(&active.name.clone(), add),
            _ => Err(Error::NotMerged),
        }
    }

    /// The layer with the active adapter in its weights.
    pub(crate) fn merged(&self, merge: impl FnOnce(&P) -> Result<L>) -> Result<L> {
        let (active, pairs) = self.chosen()?;
        if active.merged { Ok(active.layer.clone()) } else { merge(pairs) }
    }

    /// The same adapters for a layer with other weights. `change` is applied to every pair, and
    /// `merged` makes the layer of an adapter that is merged from the present one.
    pub(crate) fn rebuilt(
        &self,
        change: impl Fn(&Lora) -> Result<Lora>,
        add: impl FnOnce(P) -> Result<L>,
        merged: impl FnOnce(&L) -> Result<L>,
    ) -> Result<Self> {
        let all = self.all.iter().map(|(name, pairs)| Ok((name.clone(), pairs.map(&change)?)));
        let all = all.collect::<Result<_>>()?;
        let mut new = Self { all, active: None, training: self.training };
        match &self.active {
            None => {}
            Some(Active { name, layer, merged: true }) => {
                let (name, layer) = (name.clone(), merged(layer)?);
                new.active = Some(Active { name, layer, merged: true });
            }
            Some(active) => new.activate(&active.name, add)?,
        }
        Ok(new)
    }

    /// Without dropout unless the layer is in training.
    fn in_mode(&self, pairs: &P) -> Result<P> {
        match self.training {
            true => Ok(pairs.clone()),
            false => pairs.map(|pair| Ok(pair.without_dropout())),
        }
    }
}
