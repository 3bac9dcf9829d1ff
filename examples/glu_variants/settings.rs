//! The sizes of the experiment. All runs of a directory have the same.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};

use crate::files;
use crate::tokenizer::{BOS, EOS};

/// The model, its training and its evaluation.
#[derive(Args, Clone, Debug, Serialize)]
pub(crate) struct Settings {
    #[arg(long, default_value_t = 96)]
    pub(crate) hidden_size: usize,
    /// Width I of the gated blocks, an even number; blocks without a gate have 3·I/2.
    #[arg(long, default_value_t = 256)]
    pub(crate) intermediate_size: usize,
    #[arg(long, default_value_t = 3)]
    pub(crate) layers: usize,
    #[arg(long, default_value_t = 2)]
    pub(crate) heads: usize,
    /// Largest size of the vocabulary.
    #[arg(long, default_value_t = 1024)]
    pub(crate) vocab_size: usize,
    /// Stories from which the tokenizer learns.
    #[arg(long, default_value_t = 5000)]
    pub(crate) tokenizer_stories: u64,
    #[arg(long, default_value_t = 1200)]
    pub(crate) steps: u64,
    /// Stories per step.
    #[arg(long, default_value_t = 8)]
    pub(crate) batch: u64,
    /// Peak learning rate of AdamW; it rises for 100 steps and falls along a cosine to a twentieth.
    #[arg(long, default_value_t = 3e-3)]
    pub(crate) lr: f64,
    /// Held-out stories of the final loss.
    #[arg(long, default_value_t = 512)]
    pub(crate) held_out: u64,
    /// Held-out stories of the loss during training.
    #[arg(long, default_value_t = 64)]
    pub(crate) curve_stories: u64,
    /// Steps between two values of this loss.
    #[arg(long, default_value_t = 50)]
    pub(crate) curve_every: u64,
    /// Held-out stories whose activations and gradients are counted.
    #[arg(long, default_value_t = 64)]
    pub(crate) probe_stories: u64,
    /// Steps between two copies of a run's state. It has no influence on the results.
    #[arg(long, default_value_t = 50)]
    #[serde(skip)]
    pub(crate) save_every: u64,
}

impl Settings {
    /// Sizes with which a run takes a fraction of a second.
    pub(crate) fn smoke() -> Self {
        Self {
            hidden_size: 16,
            intermediate_size: 32,
            layers: 2,
            heads: 2,
            vocab_size: 800,
            tokenizer_stories: 20,
            steps: 4,
            batch: 1,
            lr: 3e-3,
            held_out: 2,
            curve_stories: 1,
            curve_every: 2,
            probe_stories: 2,
            save_every: 2,
        }
    }

    /// Checks the numbers that no other part of the program checks.
    ///
    /// # Errors
    /// The error names the field, what was expected and what was found.
    pub(crate) fn validate(&self) -> Result<()> {
        let i = self.intermediate_size;
        ensure!(i.is_multiple_of(2), "intermediate_size: expected an even number, found {i}");
        let counts = [
            ("heads", self.heads as u64),
            ("steps", self.steps),
            ("batch", self.batch),
            ("held_out", self.held_out),
            ("curve_stories", self.curve_stories),
            ("curve_every", self.curve_every),
            ("probe_stories", self.probe_stories),
            ("save_every", self.save_every),
        ];
        for (field, count) in counts {
            ensure!(count > 0, "{field}: expected at least 1, found 0");
        }
        Ok(())
    }

    /// Writes `settings.json` of a new directory. In an old one, checks that it has these settings,
    /// so that all runs are comparable.
    ///
    /// # Errors
    /// A field that differs.
    pub(crate) fn claim(&self, dir: &Path) -> Result<()> {
        let path = dir.join("settings.json");
        let own = serde_json::to_value(self)?;
        if !path.exists() {
            return files::write(&path, &(serde_json::to_string_pretty(&own)? + "\n"));
        }
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let old: Value = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        for (field, value) in own.as_object().into_iter().flatten() {
            ensure!(
                old.get(field) == Some(value),
                "{field}: expected {} as in {}, found {value}",
                old.get(field).unwrap_or(&Value::Null),
                path.display()
            );
        }
        Ok(())
    }

    /// The `config.json` of the model; its MLP is replaced.
    pub(crate) fn config(&self, vocab_size: usize) -> Value {
        json!({
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "hidden_act": "silu",
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": true,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
        })
    }
}
