//! The low-rank adapters (LoRA) of a linear layer.

use std::sync::Arc;

use super::Linear;
use crate::engine::{self, Projection, adapted};
use crate::error::Result;
use crate::lora::Lora;

/// # Low-rank adapters
///
/// As those of [`crate::SwiGluFfn`], with one pair for each adapter. The rows that
/// [`Linear::embed`] returns are those of W without adapters, as in PEFT for a head that is tied to
/// the embedding.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_nn::Module;
/// use candle_swiglu::{Linear, Lora};
/// let weight = Tensor::new(&[[1f32, 2.0]], &Device::Cpu)?;
/// let mut layer = Linear::new(weight, None)?;
/// let (a, b) = (Tensor::new(&[[0f32, 1.0]], &Device::Cpu)?, Tensor::new(&[[3f32]], &Device::Cpu)?);
/// layer.add_adapter("a", Lora::new(a, b, 2.0, 0.0)?)?;
/// layer.set_adapter("a")?;
/// let y = layer.forward(&Tensor::new(&[10f32, 100.0], &Device::Cpu)?)?;
/// assert_eq!(y.to_vec1::<f32>()?, [210.0 + 2.0 * 100.0 * 3.0]);
/// # Ok::<(), candle_core::Error>(())
/// ```
impl Linear {
    /// Adds an adapter, which does not become active: as [`crate::SwiGluFfn::add_adapter`].
    ///
    /// # Errors
    /// A name that the layer has already; a pair that does not fit W, or is on another device.
    pub fn add_adapter(&mut self, name: impl Into<String>, lora: Lora) -> Result<()> {
        let names = ["lora_A.weight", "lora_B.weight"];
        lora.check_fits(names, (self.in_dim, self.out_dim), self.layer.device())?;
        self.adapters.insert(name.into(), lora)
    }

    /// Makes this adapter the active one. A merged adapter is unmerged first.
    ///
    /// # Errors
    /// No adapter of this name.
    pub fn set_adapter(&mut self, name: &str) -> Result<()> {
        self.adapters.activate(name, |lora| adapted::projection(&self.layer, lora))
    }

    /// Computes without adapters until [`Linear::set_adapter`] is called. A merged adapter is
    /// unmerged.
    pub fn disable_adapters(&mut self) {
        self.adapters.disable();
    }

    /// The name of the active adapter.
    pub fn active_adapter(&self) -> Option<&str> {
        self.adapters.active()
    }

    /// The names of the adapters, sorted.
    pub fn adapters(&self) -> impl Iterator<Item = &str> {
        self.adapters.names()
    }

    /// Removes an adapter and returns it. If it was active, none is active any more.
    ///
    /// # Errors
    /// No adapter of this name.
    pub fn delete_adapter(&mut self, name: &str) -> Result<Lora> {
        self.adapters.remove(name)
    }

    /// Sets whether dropout acts, as [`crate::SwiGluFfn::set_training`].
    ///
    /// # Errors
    /// None but candle's.
    pub fn set_training(&mut self, training: bool) -> Result<()> {
        self.adapters.set_training(training, |lora| adapted::projection(&self.layer, lora))
    }

    /// Computes with the active adapter in W, as [`crate::SwiGluFfn::merge_adapter`].
    ///
    /// # Errors
    /// No adapter is active; it is merged already.
    pub fn merge_adapter(&mut self) -> Result<()> {
        self.adapters.merge(|lora| merged(&self.layer, lora))
    }

    /// Takes the merged adapter out of W. It remains active.
    ///
    /// # Errors
    /// No adapter is merged.
    pub fn unmerge_adapter(&mut self) -> Result<()> {
        self.adapters.unmerge(|lora| adapted::projection(&self.layer, lora))
    }

    /// A layer of constants without adapters, with the active adapter in its weight, as
    /// [`crate::SwiGluFfn::merge_and_unload`].
    ///
    /// # Errors
    /// No adapter is active.
    pub fn merge_and_unload(&self) -> Result<Self> {
        let layer = self.adapters.merged(|lora| merged(&self.layer, lora))?;
        Ok(Self::with_layer((self.out_dim, self.in_dim), layer))
    }

    /// The layer as it runs.
    pub(super) fn running(&self) -> &Arc<dyn Projection> {
        self.adapters.running(&self.layer)
    }

    /// As [`crate::SwiGluFfn`]'s function of this name.
    pub(super) fn with_adapters_of(
        self,
        other: &Self,
        change: impl Fn(&Lora) -> Result<Lora>,
        merged: impl FnOnce(&Arc<dyn Projection>) -> Result<Arc<dyn Projection>>,
    ) -> Result<Self> {
        let add = |lora| adapted::projection(&self.layer, lora);
        let adapters = other.adapters.rebuilt(change, add, merged)?;
        Ok(Self { adapters, ..self })
    }
}

/// The layer with a pair in its weight, which is a constant.
fn merged(layer: &Arc<dyn Projection>, lora: &Lora) -> Result<Arc<dyn Projection>> {
    let bias = layer.bias()?.as_ref().map(engine::constant).transpose()?;
    engine::projection(lora.merge(&layer.weight()?)?, bias)
}
