//! The story model's tokenizer: byte-level BPE, as in LLaMA 3, so that any text can be encoded.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::json;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer, TokenizerBuilder};

/// The token at the beginning of every text.
pub(crate) const BOS: u32 = 0;
/// The token at the end of every text.
pub(crate) const EOS: u32 = 1;
const BOS_TEXT: &str = "<|begin_of_text|>";
const EOS_TEXT: &str = "<|end_of_text|>";

/// Learns merges from the texts. The vocabulary has at most `vocab_size` tokens.
pub(crate) fn train(
    vocab_size: usize,
    texts: impl Iterator<Item = String> + Send,
) -> Result<Tokenizer> {
    let special = [BOS_TEXT, EOS_TEXT].map(|text| AddedToken::from(text, true)).to_vec();
    let mut trainer = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .min_frequency(2)
        .special_tokens(special)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .show_progress(false)
        .build();
    let mut tokenizer = TokenizerBuilder::<
        BPE,
        NormalizerWrapper,
        ByteLevel,
        TemplateProcessing,
        ByteLevel,
    >::default()
    .with_model(BPE::default())
    .with_normalizer(None)
    .with_pre_tokenizer(Some(ByteLevel::default().add_prefix_space(false)))
    .with_post_processor(Some(begins_with_bos()?))
    .with_decoder(Some(ByteLevel::default()))
    .build()
    .map_err(anyhow::Error::msg)?;
    tokenizer.train(&mut trainer, texts).map_err(anyhow::Error::msg)?;
    Ok(tokenizer.into())
}

fn begins_with_bos() -> Result<TemplateProcessing> {
    let template = TemplateProcessing::builder()
        .try_single(format!("{BOS_TEXT} $A"))
        .and_then(|builder| builder.try_pair(format!("{BOS_TEXT} $A {BOS_TEXT}:1 $B:1")))
        .map_err(anyhow::Error::msg)?
        .special_tokens(vec![(BOS_TEXT, BOS)])
        .build();
    Ok(template?)
}

/// Writes `tokenizer.json`, and the other tokenizer files that transformers reads.
pub(crate) fn save(tokenizer: &Tokenizer, dir: &Path) -> Result<()> {
    let path = dir.join("tokenizer.json");
    tokenizer
        .save(&path, true)
        .map_err(anyhow::Error::msg)
        .with_context(|| path.display().to_string())?;
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS_TEXT,
        "eos_token": EOS_TEXT,
        "clean_up_tokenization_spaces": false,
        "model_max_length": 512,
    });
    Ok(std::fs::write(
        dir.join("tokenizer_config.json"),
        serde_json::to_string_pretty(&config)? + "\n",
    )?)
}
