//! Where a checkpoint has the model, by the names of its tensors, and which of them nobody read.

use std::collections::BTreeMap;
use std::fmt;

use candle_core::{Result, bail};
use candle_swiglu::Checkpoint;

use super::config::LlamaConfig;

/// Where the model is.
pub struct Names {
    /// Of `embed_tokens`, `layers` and `norm`: `model`, or nothing.
    pub model: String,
    pub head: Head,
    /// What the config would not have told, in sentences.
    pub notes: Vec<String>,
}

/// Whose matrix gives the logits.
pub enum Head {
    /// That of `embed_tokens`.
    Embedding,
    /// A matrix of this name.
    Own(String),
    /// The matrix of this name, which is the embedding too.
    Both(String),
}

/// A tensor that every one of the models has in its first layer.
const IN_LAYERS: &str = "layers.0.input_layernorm.weight";

impl Names {
    /// As transformers names them.
    pub fn usual(cfg: &LlamaConfig) -> Self {
        let head = if cfg.tie_word_embeddings { Head::Embedding } else { Head::Own("lm_head".into()) };
        Self { model: "model".into(), head, notes: vec![] }
    }

    /// As they are in the checkpoint. Of a head and an embedding that the config ties, transformers keeps both where they are
    /// different, and takes the one for the other where only one is there; so does this.
    pub fn find(checkpoint: &Checkpoint, cfg: &LlamaConfig) -> Result<Self> {
        let model = find_model(checkpoint)?;
        let embedding = dotted(&model, "embed_tokens.weight");
        // lm_head is beside `model`, or at the root
        let beside = dotted(model.rsplit_once('.').map_or("", |(outer, _)| outer), "lm_head");
        let heads = [beside, "lm_head".to_string()];
        let head = heads.into_iter().find(|name| checkpoint.contains(&dotted(name, "weight")));
        let mut notes = vec![];
        let head = match (cfg.tie_word_embeddings, head) {
            (false, Some(head)) => Head::Own(head),
            (false, None) => bail!(
                "no lm_head.weight in {}, and the config does not tie the head to the embedding (tie_word_embeddings): \
                 a checkpoint of the model without its head cannot write text",
                checkpoint.dir().display()
            ),
            (true, None) => Head::Embedding,
            (true, Some(head)) if !checkpoint.contains(&embedding) => Head::Both(head),
            (true, Some(head)) => {
                let weight = dotted(&head, "weight");
                if checkpoint.same_data(&embedding, &weight)? {
                    checkpoint.mark_read(&weight);
                    Head::Embedding
                } else {
                    notes.push(format!(
                        "{weight} and {embedding} are different matrices although the config ties them \
                         (tie_word_embeddings): each is used for itself, as in transformers"
                    ));
                    Head::Own(head)
                }
            }
        };
        Ok(Self { model, head, notes })
    }
}

/// What stands before `layers`: `model` as a rule, nothing in a model saved without its head, more in a composite one.
fn find_model(checkpoint: &Checkpoint) -> Result<String> {
    let prefixes = checkpoint.names().filter_map(|name| match name.strip_suffix(IN_LAYERS) {
        Some("") => Some(String::new()),
        prefix => prefix?.strip_suffix('.').map(str::to_string),
    });
    let complete = |prefix: &String| checkpoint.contains(&dotted(prefix, "norm.weight"));
    let found: Vec<String> = prefixes.filter(complete).collect();
    match &found[..] {
        [prefix] => Ok(prefix.clone()),
        [] => bail!(
            "no {IN_LAYERS} with a norm.weight beside layers in {}, be it under model. or without; in it are {}",
            checkpoint.dir().display(),
            Listed::new(checkpoint.names())
        ),
        several if several.iter().any(|prefix| prefix == "model") => Ok("model".into()),
        several => bail!("{} has several models, under {}", checkpoint.dir().display(), several.join(", ")),
    }
}

fn dotted(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_string() } else { format!("{prefix}.{name}") }
}

/// Tensors of a checkpoint that the model did not read: what they are for is not computed.
#[derive(Debug, thiserror::Error)]
#[error("{} of the checkpoint's tensors are not part of the computation: {}", names.len(), Listed::new(names.iter().map(String::as_str)))]
pub struct Unread {
    pub names: Vec<String>,
}

/// Every tensor of the checkpoint has been read. Not counted is what can be computed from the config (`rotary_emb.inv_freq`, which
/// old checkpoints carry).
///
/// # Errors
/// Names the tensors that have not.
pub fn check_all_read(checkpoint: &Checkpoint) -> std::result::Result<(), Unread> {
    let mut names = checkpoint.unread();
    names.retain(|name| !name.ends_with("rotary_emb.inv_freq"));
    if names.is_empty() { Ok(()) } else { Err(Unread { names }) }
}

/// Names as one line: those that differ by numbers alone as one, and at most [`Listed::MOST`] of these.
struct Listed(Vec<String>);

impl Listed {
    const MOST: usize = 12;

    fn new<'a>(names: impl Iterator<Item = &'a str>) -> Self {
        let mut alike: BTreeMap<String, (&str, usize)> = BTreeMap::new();
        for name in names {
            let is_number = |part: &&str| part.bytes().all(|byte| byte.is_ascii_digit());
            let parts: Vec<&str> = name.split('.').map(|part| if is_number(&part) { "*" } else { part }).collect();
            alike.entry(parts.join(".")).or_insert((name, 0)).1 += 1;
        }
        let mut lines: Vec<String> = alike
            .into_values()
            .map(|(first, count)| match count {
                1 => first.to_string(),
                count => format!("{first} (and {} like it)", count - 1),
            })
            .collect();
        if lines.len() > Self::MOST {
            let more = lines.len() - Self::MOST;
            lines.truncate(Self::MOST);
            lines.push(format!("{more} more"));
        }
        Self(lines)
    }
}

impl fmt::Display for Listed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { f.write_str("no tensors") } else { f.write_str(&self.0.join(", ")) }
    }
}
