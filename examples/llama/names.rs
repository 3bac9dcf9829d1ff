//! The names of a checkpoint's tensors: the prefix of the model, its head, and the unread tensors.

use std::collections::BTreeMap;

use candle_core::{Result, bail};
use candle_swiglu::Checkpoint;

use super::config::{LlamaConfig, ModelType};

/// The names under which a model is loaded.
pub struct Names {
    /// The prefix of `embed_tokens`, `layers` and `norm`: `model`, or empty.
    pub model: String,
    pub head: Head,
    /// The differences between the checkpoint and its config, in sentences.
    pub notes: Vec<String>,
}

/// The matrix that computes the logits.
pub enum Head {
    /// The weight of `embed_tokens`.
    Embedding,
    /// The weight of the module of this name.
    Own(String),
    /// The weight of the module of this name, which is also the embedding.
    Both(String),
}

/// A tensor that the first layer has in every model type.
const IN_LAYERS: &str = "layers.0.input_layernorm.weight";

/// The end of the name of a tensor that can be computed from the config.
const INV_FREQ: &str = "rotary_emb.inv_freq";

impl Names {
    /// The names that transformers writes.
    pub fn usual(cfg: &LlamaConfig) -> Self {
        let head =
            if cfg.tie_word_embeddings { Head::Embedding } else { Head::Own("lm_head".into()) };
        Self { model: "model".into(), head, notes: vec![] }
    }

    /// The names in the checkpoint. If the config ties the head to the embedding, this follows
    /// transformers: one matrix is used for both if only one exists or if the two are equal; two
    /// different matrices are both used.
    ///
    /// # Errors
    /// No model, or several; no head although the config does not tie it.
    pub fn find(checkpoint: &Checkpoint, cfg: &LlamaConfig) -> Result<Self> {
        let model = find_model(checkpoint)?;
        let embedding = dotted(&model, "embed_tokens.weight");
        // lm_head is a sibling of `model`, or at the root.
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

    /// The tensors that are unread so far and that the model will not read.
    pub fn unknown(&self, checkpoint: &Checkpoint, cfg: &LlamaConfig) -> Option<Unread> {
        unread(checkpoint, |name| !self.reads(cfg, name))
    }

    /// Whether the model reads a tensor of this name.
    fn reads(&self, cfg: &LlamaConfig, name: &str) -> bool {
        let head = |module: &str| name.strip_suffix(".weight") == Some(module);
        let (reads_embedding, is_head) = match &self.head {
            Head::Embedding => (true, false),
            Head::Own(module) => (true, head(module)),
            Head::Both(module) => (false, head(module)),
        };
        let in_model = if self.model.is_empty() {
            Some(name)
        } else {
            name.strip_prefix(&self.model).and_then(|name| name.strip_prefix('.'))
        };
        let in_layer = || {
            let (index, name) = in_model?.strip_prefix("layers.")?.split_once('.')?;
            (index.parse::<usize>().ok()? < cfg.num_hidden_layers).then_some(name)
        };
        is_head
            || in_model == Some("norm.weight")
            || (reads_embedding && in_model == Some("embed_tokens.weight"))
            || in_layer().is_some_and(|name| layer_reads(cfg, name))
    }
}

/// Whether a layer reads a tensor of this name.
fn layer_reads(cfg: &LlamaConfig, name: &str) -> bool {
    let (module, is_bias) = match name.rsplit_once('.') {
        Some((module, "weight")) => (module, false),
        Some((module, "bias")) => (module, true),
        _ => return false,
    };
    let biases = cfg.ffn.biases;
    let may_have_bias = match module {
        "input_layernorm" | "post_attention_layernorm" => false,
        "self_attn.q_norm" | "self_attn.k_norm" if cfg.model_type == ModelType::Qwen3 => false,
        "self_attn.q_proj" | "self_attn.k_proj" | "self_attn.v_proj"
            if cfg.model_type != ModelType::Phi3 =>
        {
            cfg.qkv_bias
        }
        "self_attn.qkv_proj" if cfg.model_type == ModelType::Phi3 => cfg.qkv_bias,
        "self_attn.o_proj" => cfg.o_bias,
        "mlp.gate_proj" | "mlp.up_proj" | "mlp.gate_up_proj" => biases.gate || biases.up,
        "mlp.down_proj" => biases.down,
        _ => return false,
    };
    may_have_bias || !is_bias
}

/// The prefix of `layers`: `model`, empty in a model saved without its head, or longer in a
/// composite model.
fn find_model(checkpoint: &Checkpoint) -> Result<String> {
    let prefixes = checkpoint.names().filter_map(|name| match name.strip_suffix(IN_LAYERS) {
        Some("") => Some(String::new()),
        prefix => prefix?.strip_suffix('.').map(str::to_string),
    });
    let mut found: Vec<String> = prefixes.collect();
    if found.len() > 1 {
        found.retain(|prefix| checkpoint.contains(&dotted(prefix, "norm.weight")));
    }
    match &found[..] {
        [prefix] => Ok(prefix.clone()),
        [] => bail!(
            "no {IN_LAYERS} in {}, with or without the prefix model.; there are {}",
            checkpoint.dir().display(),
            listed(checkpoint.names())
        ),
        several if several.iter().any(|prefix| prefix == "model") => Ok("model".into()),
        several => {
            bail!("{} has several models, under {}", checkpoint.dir().display(), several.join(", "))
        }
    }
}

fn dotted(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_string() } else { format!("{prefix}.{name}") }
}

/// Tensors of a checkpoint that the model did not read. Without them it may compute something else
/// than intended.
#[derive(Debug, thiserror::Error)]
#[error("the model does not read {} of the checkpoint's tensors: {}", names.len(), listed(names))]
pub struct Unread {
    pub names: Vec<String>,
}

impl Unread {
    /// As candle's error, with the flag that ignores these tensors.
    pub fn into_error(self) -> candle_core::Error {
        candle_core::Error::wrap(format!("{self} (--allow-unread goes on without them)"))
    }
}

/// Checks that every tensor of the checkpoint has been read, except `rotary_emb.inv_freq`, which
/// can be computed from the config.
///
/// # Errors
/// The error names the tensors that have not been read.
pub fn check_all_read(checkpoint: &Checkpoint) -> std::result::Result<(), Unread> {
    unread(checkpoint, |_| true).map_or(Ok(()), Err)
}

/// Hides the tensors that the model will not read, so that loading succeeds, and returns them for a
/// warning.
///
/// # Errors
/// As [`Names::find`].
pub fn ignore_unread(checkpoint: &Checkpoint, cfg: &LlamaConfig) -> Result<Option<Unread>> {
    let unknown = Names::find(checkpoint, cfg)?.unknown(checkpoint, cfg);
    unknown.iter().flat_map(|unknown| &unknown.names).for_each(|name| checkpoint.hide(name));
    Ok(unknown)
}

/// The unread tensors of these names.
fn unread(checkpoint: &Checkpoint, of: impl Fn(&str) -> bool) -> Option<Unread> {
    let mut names = checkpoint.unread();
    names.retain(|name| !name.ends_with(INV_FREQ) && of(name));
    (!names.is_empty()).then_some(Unread { names })
}

/// Names in one line. Names that differ only by numbers count as one, and at most twelve are
/// listed.
fn listed<S: AsRef<str>>(names: impl IntoIterator<Item = S>) -> String {
    const MOST: usize = 12;
    let is_number = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    let mut alike: BTreeMap<String, (String, usize)> = BTreeMap::new();
    for name in names {
        let name = name.as_ref();
        let parts: Vec<&str> =
            name.split('.').map(|part| if is_number(part) { "*" } else { part }).collect();
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
