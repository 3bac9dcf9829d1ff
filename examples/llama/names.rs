//! The names of a checkpoint's tensors: the prefix of the model, its head, and the tensors that
//! were not read.

use std::collections::BTreeMap;

use candle_core::{Result, bail};
use candle_swiglu::Checkpoint;

use super::config::LlamaConfig;

/// The names under which a model is loaded.
pub struct Names {
    /// The prefix of `embed_tokens`, `layers` and `norm`: `model`, or empty.
    pub model: String,
    pub head: Head,
    /// Where the checkpoint differs from its config, in sentences.
    pub notes: Vec<String>,
}

/// The matrix of the logits.
pub enum Head {
    /// The weight of `embed_tokens`.
    Embedding,
    /// The weight of the module of this name.
    Own(String),
    /// The weight of the module of this name, which is the embedding's weight too.
    Both(String),
}

/// A tensor that the first layer has in every model type.
const IN_LAYERS: &str = "layers.0.input_layernorm.weight";

impl Names {
    /// The names that transformers writes.
    pub fn usual(cfg: &LlamaConfig) -> Self {
        let head = if cfg.tie_word_embeddings { Head::Embedding } else { Head::Own("lm_head".into()) };
        Self { model: "model".into(), head, notes: vec![] }
    }

    /// The names in the checkpoint. If the config ties the head to the embedding, then, as in
    /// transformers, one matrix serves as both when only one is there or when both are equal; two
    /// different matrices are both used.
    ///
    /// # Errors
    /// No model, or several; no head, although the config does not tie it.
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

/// The prefix of `layers`: `model`, empty in a model saved without its head, or longer in a
/// composite model.
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
            listed(checkpoint.names())
        ),
        several if several.iter().any(|prefix| prefix == "model") => Ok("model".into()),
        several => bail!("{} has several models, under {}", checkpoint.dir().display(), several.join(", ")),
    }
}

fn dotted(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_string() } else { format!("{prefix}.{name}") }
}

/// Tensors of a checkpoint that the model did not read, and without which it may compute something
/// else than intended.
#[derive(Debug, thiserror::Error)]
#[error("the model does not read {} of the checkpoint's tensors: {}", names.len(), listed(names))]
pub struct Unread {
    pub names: Vec<String>,
}

/// Checks that every tensor of the checkpoint has been read, except `rotary_emb.inv_freq`, which
/// follows from the config.
///
/// # Errors
/// Names the tensors that have not been read.
pub fn check_all_read(checkpoint: &Checkpoint) -> std::result::Result<(), Unread> {
    let mut names = checkpoint.unread();
    names.retain(|name| !name.ends_with("rotary_emb.inv_freq"));
    if names.is_empty() { Ok(()) } else { Err(Unread { names }) }
}

/// Names in one line. Names that differ only by numbers count as one, and at most twelve are
/// listed.
fn listed<S: AsRef<str>>(names: impl IntoIterator<Item = S>) -> String {
    const MOST: usize = 12;
    let is_number = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    let mut alike: BTreeMap<String, (String, usize)> = BTreeMap::new();
    for name in names {
        let name = name.as_ref();
        let parts: Vec<&str> = name.split('.').map(|part| if is_number(part) { "*" } else { part }).collect();
        alike.entry(parts.join(".")).or_insert((name.to_string(), 0)).1 += 1;
    }
    let mut lines: Vec<String> = alike
        .into_values()
        .map(|(first, count)| match count {
            1 => first,
            count => format!("{first} (and {} like it)", count - 1),
        })
        .collect();
    if lines.len() > MOST {
        let more = lines.len() - MOST;
        lines.truncate(MOST);
        lines.push(format!("{more} more"));
    }
    if lines.is_empty() { "no tensors".to_string() } else { lines.join(", ") }
}
