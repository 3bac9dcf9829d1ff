//! A batch of stories, and the loss of a model on it.

use anyhow::Result;
use candle_core::{Device, Tensor};
use candle_nn::loss;
use tokenizers::Tokenizer;

use crate::grammar::Story;
use crate::model::Llama;
use crate::tokenizer::EOS;

/// Stories as rows of token ids, and the positions that count in the loss.
pub(crate) struct Batch {
    /// (B,T) u32, padded with eos.
    pub(crate) inputs: Tensor,
    /// (N) u32: the positions in the flattened inputs whose successor is a token of the story or
    /// its eos.
    pub(crate) positions: Tensor,
    /// (N) u32: the successors.
    targets: Tensor,
    /// The information content of the stories, -log2 of their probability.
    bits: f64,
}

impl Batch {
    pub(crate) fn new(tokenizer: &Tokenizer, stories: impl Iterator<Item = Story>) -> Result<Self> {
        let (mut rows, mut bits) = (vec![], 0.0);
        for story in stories {
            let mut ids =
                tokenizer.encode(story.text, true).map_err(anyhow::Error::msg)?.get_ids().to_vec();
            ids.push(EOS);
            bits += story.bits;
            rows.push(ids);
        }
        let width = rows.iter().map(Vec::len).max().unwrap_or(1) - 1;
        let (mut inputs, mut positions, mut targets) = (vec![], vec![], vec![]);
        for (b, row) in rows.iter().enumerate() {
            inputs.extend((0..width).map(|t| row[..row.len() - 1].get(t).copied().unwrap_or(EOS)));
            positions.extend((0..row.len() - 1).map(|t| (b * width + t) as u32));
            targets.extend_from_slice(&row[1..]);
        }
        Ok(Self {
            inputs: Tensor::from_vec(inputs, (rows.len(), width), &Device::Cpu)?,
            positions: Tensor::new(positions, &Device::Cpu)?,
            targets: Tensor::new(targets, &Device::Cpu)?,
            bits,
        })
    }

    pub(crate) fn tokens(&self) -> usize {
        self.targets.elem_count()
    }

    /// Mean nats per token.
    pub(crate) fn loss(&self, model: &Llama) -> candle_core::Result<Tensor> {
        let logits = model.forward_all(&self.inputs)?.flatten_to(1)?; // (B·T,vocab)
        loss::cross_entropy(&logits.index_select(&self.positions, 0)?, &self.targets)
    }
}

/// The loss in nats per token over all tokens of the batches.
pub(crate) fn mean_loss(model: &Llama, batches: &[Batch]) -> Result<f64> {
    let mut nats = 0.0;
    for batch in batches {
        nats += f64::from(batch.loss(model)?.to_scalar::<f32>()?) * batch.tokens() as f64;
    }
    Ok(nats / tokens(batches) as f64)
}

/// The grammar's own entropy on the batches, in nats per token. No model's expected loss is below
/// it.
pub(crate) fn floor(batches: &[Batch]) -> f64 {
    let bits: f64 = batches.iter().map(|batch| batch.bits).sum();
    bits * std::f64::consts::LN_2 / tokens(batches) as f64
}

/// The number of tokens that count in the loss.
pub(crate) fn tokens(batches: &[Batch]) -> usize {
    batches.iter().map(Batch::tokens).sum()
}
