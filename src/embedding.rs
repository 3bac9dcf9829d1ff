//! An embedding, whose matrix a tied head shares.

use candle_core::Tensor;
use candle_nn::{Init, Module, VarBuilder};

use crate::error::Result;
use crate::linear::Linear;
use crate::load::{self, check_linear};

/// An embedding: ids (…) -> rows (…, H) of a weight (V, H).
///
/// The matrix may also be the head of a model that ties the two: [`Embedding::as_linear`] shares
/// it. There is one copy, which on the CPU is packed for the kernels of this crate.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_nn::Module;
/// let weight = Tensor::new(&[[1f32, 2.0], [3.0, 4.0], [5.0, 6.0]], &Device::Cpu)?;
/// let embedding = candle_swiglu::Embedding::new(weight)?;
/// let x = embedding.forward(&Tensor::new(&[2u32, 0], &Device::Cpu)?)?;
/// assert_eq!(x.to_vec2::<f32>()?, [[5.0, 6.0], [1.0, 2.0]]);
/// let logits = embedding.as_linear().forward(&x)?; // x·Wᵀ
/// assert_eq!(logits.to_vec2::<f32>()?, [[17.0, 39.0, 61.0], [5.0, 11.0, 17.0]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Embedding {
    weight: Linear,
    hidden_size: usize,
}

impl Embedding {
    /// An embedding with a weight (V, H), which may be a variable.
    ///
    /// # Errors
    /// Wrong rank, a size of zero, a dtype that is not a float.
    pub fn new(weight: Tensor) -> Result<Self> {
        let hidden_size = weight.dims().last().copied().unwrap_or_default();
        Ok(Self { weight: Linear::new(weight, None)?, hidden_size })
    }

    /// The weight (V, H); unpacked into a new tensor if it is packed.
    ///
    /// # Errors
    /// Only errors of candle's operations.
    pub fn embeddings(&self) -> Result<Tensor> {
        self.weight.weight()
    }

    /// H
    pub fn hidden_size(&self) -> usize {
        self.hidden_size
    }

    /// The head of a model that ties it to the embedding: x (…, H) -> x·Wᵀ (…, V), with the same
    /// matrix and no copy of it.
    pub fn as_linear(&self) -> Linear {
        self.weight.clone()
    }
}

impl Module for Embedding {
    /// ids (…) in u8, u32 or i64 -> (…, H)
    fn forward(&self, ids: &Tensor) -> candle_core::Result<Tensor> {
        Ok(self.weight.embed(ids)?)
    }
}

/// The [`Embedding`] whose `weight` (vocab_size, hidden_size) is under `vb`'s prefix.
///
/// # Errors
/// No such tensor; another shape; a tensor that would be unread (an adapter, a scale).
pub fn embedding(vocab_size: usize, hidden_size: usize, vb: VarBuilder) -> Result<Embedding> {
    let init = Init::Randn { mean: 0.0, stdev: 1.0 };
    let weight = load::get(&vb, &[vocab_size, hidden_size], "weight", init)?;
    check_linear(&vb, "embedding")?;
    Embedding::new(weight)
}
