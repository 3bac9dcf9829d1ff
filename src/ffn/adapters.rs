//! The low-rank adapters (LoRA) of a feed-forward block.

use std::sync::Arc;

use super::{SwiGluFfn, spec};
use crate::config::FfnConfig;
use crate::engine::{self, Block, adapted};
use crate::error::Result;
use crate::load::Piece;
use crate::lora::{FfnLora, Lora};
use crate::which::Which;

/// # Low-rank adapters
///
/// A block may have several adapters, each with a name, at most one of which is active. The active
/// one adds `s·(x·Aᵀ)·Bᵀ` to the projections for which it has a pair. Names and rules are those of
/// PEFT.
///
/// - `weights`, `dtype` and `config` are those of the block without adapters. `kernel` names what
///   runs with the active one.
/// - A clone shares weights and pairs, and has its own choice of the active adapter.
/// - `freeze` and `to_dtype` keep the adapters. `freeze` makes them constants; `to_dtype` leaves
///   them in their own dtype.
///
/// The pairs may have another float dtype than the weights. The CPU kernels of packed weights
/// compute the low-rank part in the dtype of the weights, with f32 sums, and add it before the sum
/// is rounded. Elsewhere it is computed in the wider one of x's and the pair's dtype. On a block of
/// constants gradients reach the pairs (and x) alone.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_nn::Module;
/// use candle_swiglu::{FfnLora, Lora, SwiGluFfn};
/// let row = |v: &[f32]| Tensor::new(v, &Device::Cpu)?.reshape((1, 2));
/// let down = Tensor::new(&[[1f32], [2.0]], &Device::Cpu)?;
/// let mut ffn = SwiGluFfn::from_tensors(row(&[100.0, 0.0])?, row(&[0.0, 1.0])?, down)?;
///
/// let (a, b) = (Tensor::new(&[[1f32]], &Device::Cpu)?, Tensor::new(&[[10f32], [0.0]], &Device::Cpu)?);
/// let down_proj = Some(Lora::new(a, b, 0.5, 0.0)?); // changes down_proj by ((5), (0))
/// ffn.add_adapter("a", FfnLora { down_proj, ..FfnLora::default() })?;
/// let x = Tensor::new(&[1f32, 3.0], &Device::Cpu)?; // h = silu(100)·3 = 300
/// assert_eq!(ffn.forward(&x)?.to_vec1::<f32>()?, [300.0, 600.0]);
/// ffn.set_adapter("a")?;
/// assert_eq!(ffn.forward(&x)?.to_vec1::<f32>()?, [1800.0, 600.0]);
/// assert_eq!(ffn.merge_and_unload()?.forward(&x)?.to_vec1::<f32>()?, [1800.0, 600.0]);
/// # Ok::<(), candle_core::Error>(())
/// ```
impl SwiGluFfn {
    /// Adds an adapter. As in PEFT, it does not become active: [`SwiGluFfn::set_adapter`] does
    /// that. An adapter without pairs for this block (`FfnLora::default()`) changes nothing.
    ///
    /// # Errors
    /// A name that the block has already; a pair that does not fit the block's sizes, or is on
    /// another device.
    pub fn add_adapter(&mut self, name: impl Into<String>, lora: FfnLora) -> Result<()> {
        lora.check(&self.cfg, self.block.device())?;
        self.adapters.insert(name.into(), lora)
    }

    /// Makes this adapter the active one. A merged adapter is unmerged first.
    ///
    /// # Errors
    /// No adapter of this name.
    pub fn set_adapter(&mut self, name: &str) -> Result<()> {
        let (block, cfg, recompute) = (&self.block, &self.cfg, self.recompute);
        self.adapters.activate(name, |lora| added(block, cfg, recompute, &lora))
    }

    /// Computes without adapters until [`SwiGluFfn::set_adapter`] is called. A merged adapter is
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
    pub fn delete_adapter(&mut self, name: &str) -> Result<FfnLora> {
        self.adapters.remove(name)
    }

    /// Sets whether dropout acts on the input of the pairs. Without it, the default, it does not,
    /// and the result is the same every time. New random masks are drawn in each call. gate_proj
    /// and up_proj may share one if their probabilities are equal. A merged adapter has no dropout.
    ///
    /// candle's `ModuleT::forward_t` cannot decide this: candle implements it for every `Module`,
    /// so that a type which is one has no implementation of its own.
    ///
    /// # Errors
    /// None but candle's.
    pub fn set_training(&mut self, training: bool) -> Result<()> {
        let (block, cfg, recompute) = (&self.block, &self.cfg, self.recompute);
        self.adapters.set_training(training, |lora| added(block, cfg, recompute, &lora))
    }

    /// Computes with the active adapter in the weights, which then costs nothing. The weights
    /// without it are kept as well, so that [`SwiGluFfn::unmerge_adapter`] restores them bit for
    /// bit; [`SwiGluFfn::merge_and_unload`] keeps the merged weights alone. Merged weights are
    /// constants. Later steps of an optimizer do not change them.
    ///
    /// # Errors
    /// No adapter is active; it is merged already.
    pub fn merge_adapter(&mut self) -> Result<()> {
        let (block, cfg) = (&self.block, &self.cfg);
        self.adapters.merge(|lora| merged(block, cfg, lora))
    }

    /// Takes the merged adapter out of the weights. It remains active.
    ///
    /// # Errors
    /// No adapter is merged.
    pub fn unmerge_adapter(&mut self) -> Result<()> {
        let (block, cfg, recompute) = (&self.block, &self.cfg, self.recompute);
        self.adapters.unmerge(|lora| added(block, cfg, recompute, &lora))
    }

    /// A block of constants without adapters, with the active adapter in its weights: `W + s·B·A`
    /// for every projection that has a pair.
    ///
    /// # Accuracy
    /// As [`Lora::merge`]: the same bits as those of PEFT's `merge_and_unload`.
    ///
    /// # Errors
    /// No adapter is active.
    pub fn merge_and_unload(&self) -> Result<Self> {
        let block = self.adapters.merged(|lora| merged(&self.block, &self.cfg, lora))?;
        Ok(Self::with_block(&self.cfg, block))
    }

    /// The block as it runs.
    pub(super) fn running(&self) -> &Arc<dyn Block> {
        self.adapters.running(&self.block)
    }

    /// The block with the adapters of another one of its sizes, changed by `change`. `merged` makes
    /// the block with a merged adapter from the other's.
    pub(super) fn with_adapters_of(
        self,
        other: &Self,
        change: impl Fn(&Lora) -> Result<Lora>,
        merged: impl FnOnce(&Arc<dyn Block>) -> Result<Arc<dyn Block>>,
    ) -> Result<Self> {
        let add = |lora| added(&self.block, &self.cfg, self.recompute, &lora);
        let adapters = other.adapters.rebuilt(change, add, merged)?;
        Ok(Self { adapters, ..self })
    }
}

/// The block with pairs added to its products.
fn added(
    block: &Arc<dyn Block>,
    cfg: &FfnConfig,
    recompute: bool,
    lora: &FfnLora,
) -> Result<Arc<dyn Block>> {
    if lora.is_empty() {
        return Ok(block.clone());
    }
    let pairs = lora.pairs().map(Option::<&Lora>::cloned);
    let block = adapted::block(block, &spec(cfg), pairs)?;
    Ok(block.with_recompute(recompute).unwrap_or(block))
}

/// The block with pairs in its weights, which are constants.
fn merged(block: &Arc<dyn Block>, cfg: &FfnConfig, lora: &FfnLora) -> Result<Arc<dyn Block>> {
    let piece = |which: Which| -> Result<Piece> {
        let weight = block.weight(which)?;
        let weight = match lora.pairs()[which as usize] {
            Some(pair) => pair.merge(&weight)?,
            None => engine::constant(&weight)?,
        };
        let bias = block.bias(which)?.as_ref().map(engine::constant).transpose()?;
        Ok(Piece::One { which, weight, bias })
    };
    engine::load_block(&spec(cfg), |take| {
        Which::ALL.into_iter().try_for_each(|which| take(piece(which)?))
    })
}
