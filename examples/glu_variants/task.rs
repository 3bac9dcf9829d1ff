//! What all runs share: the tokenizer and the stories.

use anyhow::Result;
use tokenizers::Tokenizer;

use crate::batch::Batch;
use crate::grammar::story;
use crate::settings::Settings;
use crate::tokenizer;

/// The stream of the held-out stories. The runs of seed s train on stream s ≥ 1.
const HELD_OUT: u64 = 0;

/// The settings, the tokenizer and the held-out stories.
pub(crate) struct Task {
    pub(crate) settings: Settings,
    tokenizer: Tokenizer,
    /// Of the final loss.
    pub(crate) held_out: Vec<Batch>,
    /// Of the loss during training.
    pub(crate) curve: Vec<Batch>,
    /// Of the activations and their gradients.
    pub(crate) probe: Vec<Batch>,
}

impl Task {
    pub(crate) fn new(settings: Settings) -> Result<Self> {
        settings.validate()?;
        let texts = (0..settings.tokenizer_stories).map(|i| story(1, i).text);
        let tokenizer = tokenizer::train(settings.vocab_size, texts)?;
        let first = |stories: u64| {
            let starts = (0..stories).step_by(settings.batch as usize);
            let batch = |start| {
                let end = stories.min(start + settings.batch);
                Batch::new(&tokenizer, (start..end).map(|i| story(HELD_OUT, i)))
            };
            starts.map(batch).collect::<Result<Vec<_>>>()
        };
        let held_out = first(settings.held_out)?;
        let (curve, probe) = (first(settings.curve_stories)?, first(settings.probe_stories)?);
        Ok(Self { settings, tokenizer, held_out, curve, probe })
    }

    pub(crate) fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// The stories of one step: for every variant the same.
    pub(crate) fn batch(&self, seed: u64, step: u64) -> Result<Batch> {
        let first = step * self.settings.batch;
        let stories = (first..first + self.settings.batch).map(|i| story(seed, i));
        Batch::new(&self.tokenizer, stories)
    }
}
