//! From prompt to text: the tokenizer, and the loop that feeds each token back.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail, ensure};
use candle_core::Tensor;
use candle_swiglu::read_json;
use tokenizers::{
    DecodeStream, DecoderWrapper, ModelWrapper, NormalizerWrapper, PostProcessorWrapper,
    PreTokenizerWrapper, Tokenizer,
};

use crate::model::{Cache, Llama, LlamaConfig};
use crate::sampler::{Sampler, SamplingArgs};

/// The tokenizer of a checkpoint. Truncation and padding, which some files enable, are disabled,
/// because a prompt must be used whole.
pub fn load_tokenizer(path: &Path) -> Result<Tokenizer> {
    ensure!(path.is_file(), "{}: no such file; {}", path.display(), instead_of_tokenizer(path));
    let mut tokenizer = Tokenizer::from_file(path).map_err(|error| match read_json(path) {
        Err(pointer @ candle_swiglu::Error::LfsPointer { .. }) => pointer.into(),
        _ => anyhow!("{}: not a tokenizer: {error}", path.display()),
    })?;
    tokenizer.with_truncation(None).map_err(|error| anyhow!("{}: {error}", path.display()))?;
    tokenizer.with_padding(None);
    Ok(tokenizer)
}

/// A hint about other tokenizer files beside `path`, where tokenizer.json is missing.
fn instead_of_tokenizer(path: &Path) -> String {
    let there = |file: &&str| path.with_file_name(file).is_file();
    let found: Vec<_> = ["tokenizer.model", "vocab.json", "merges.txt", "vocab.txt"]
        .into_iter()
        .filter(there)
        .collect();
    if found.is_empty() {
        return "the checkpoint needs its tokenizer".to_string();
    }
    let dir = path.parent().unwrap_or(path).display();
    format!(
        "there is {}, from which transformers makes it: python -c \"from transformers import AutoTokenizer as T; \
         T.from_pretrained('{dir}').save_pretrained('{dir}')\"",
        found.join(", ")
    )
}

/// The prompt's token ids, with the special tokens that the tokenizer adds. They are checked
/// against the context and the vocabulary of the model.
pub fn encode(tokenizer: &Tokenizer, prompt: &str, cfg: &LlamaConfig) -> Result<Vec<u32>> {
    let mut ids = token_ids(tokenizer, prompt, true)?;
    if ids.is_empty() {
        ids.extend(cfg.bos_token_id);
    }
    ensure!(
        !ids.is_empty(),
        "the prompt is empty, and the model has no token to begin a text with"
    );
    check(&ids, cfg)?;
    Ok(ids)
}

/// The token ids of a text that contains the special tokens, as the output of a chat template does.
pub fn encode_rendered(tokenizer: &Tokenizer, text: &str, cfg: &LlamaConfig) -> Result<Vec<u32>> {
    let ids = token_ids(tokenizer, text, false)?;
    ensure!(!ids.is_empty(), "the chat template made an empty text");
    check(&ids, cfg)?;
    Ok(ids)
}

fn token_ids(tokenizer: &Tokenizer, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
    let encoding = tokenizer.encode(text, add_special_tokens);
    Ok(encoding.map_err(|error| anyhow!("cannot tokenize the prompt: {error}"))?.get_ids().to_vec())
}

/// A prompt that does not fit into the model's context.
#[derive(Debug, thiserror::Error)]
#[error("the prompt has {len} tokens, the model's context only {context}")]
pub struct TooLong {
    pub len: usize,
    pub context: String,
}

/// The size of the context and the field of `config.json` that limits it.
pub fn context(cfg: &LlamaConfig) -> String {
    format!("{} ({})", cfg.max_position_embeddings, cfg.context_field)
}

/// Checks that the ids fit into the model's context and vocabulary.
fn check(ids: &[u32], cfg: &LlamaConfig) -> Result<()> {
    let len = ids.len();
    ensure!(len <= cfg.max_position_embeddings, TooLong { len, context: context(cfg) });
    if let Some(id) = ids.iter().find(|&&id| id as usize >= cfg.vocab_size) {
        bail!(
            "the tokenizer gave token id {id}, the model's vocabulary has only {} (vocab_size)",
            cfg.vocab_size
        )
    }
    Ok(())
}

/// Decodes token ids to text, in complete characters only.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    stream: DecodeStream<
        'a,
        ModelWrapper,
        NormalizerWrapper,
        PreTokenizerWrapper,
        PostProcessorWrapper,
        DecoderWrapper,
    >,
    /// Ids whose text has not been returned yet.
    pending: Vec<u32>,
}

impl<'a> TextStream<'a> {
    /// A stream that continues after `prompt`. The text of the prompt is not returned.
    pub fn after(tokenizer: &'a Tokenizer, prompt: &[u32]) -> Result<Self> {
        let mut text =
            Self { tokenizer, stream: tokenizer.decode_stream(true), pending: Vec::new() };
        for &id in prompt {
            text.push(id)?;
        }
        text.pending.clear();
        Ok(text)
    }

    /// The text that `id` completes. It is empty while a character is spread over several tokens.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.pending.push(id);
        let text = match self.stream.step(id) {
            Ok(None) => return Ok(String::new()),
            Ok(Some(text)) => text,
            Err(_) => self.restart(id)?,
        };
        self.pending.clear();
        Ok(text)
    }

    /// Starts a new stream that knows `last`, and returns the text of the pending tokens. The old
    /// stream fails when bytes that never became a character change the decoding of the text before
    /// them (byte fallback). Text that was already returned stays as it is.
    fn restart(&mut self, last: u32) -> Result<String> {
        self.stream = self.tokenizer.decode_stream(true);
        self.stream.step(last).map_err(|error| anyhow!("cannot decode token {last}: {error}"))?;
        self.pending_text()
    }

    /// The text not returned yet: the beginning of a character that was never completed.
    pub fn finish(&self) -> Result<String> {
        self.pending_text()
    }

    fn pending_text(&self) -> Result<String> {
        self.tokenizer
            .decode(&self.pending, true)
            .map_err(|error| anyhow!("cannot decode {:?}: {error}", self.pending))
    }
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The model generated an end token.
    Eos,
    /// The requested number of tokens was generated.
    SampleLen,
    /// The context is full.
    Context,
    /// The text reached a stop string.
    Stop,
    /// Ctrl-C.
    Interrupted,
    /// The reader of the output has closed it.
    Closed,
}

/// Token counts and times of one text.
#[derive(Debug)]
pub struct Stats {
    /// Tokens of the prompt that were evaluated, without those that were in the cache.
    pub prompt_tokens: usize,
    /// The time until the first token.
    pub prompt: Duration,
    /// Tokens generated, an end token included.
    pub generated: usize,
    /// The time for all of them except the first.
    pub generation: Duration,
    pub end: End,
}

/// Generates several texts with one cache.
pub struct Session<'a> {
    model: &'a Llama,
    cache: Cache,
    /// The tokens whose keys and values are in the cache.
    cached: Vec<u32>,
    sampler: Sampler,
    /// Each of these tokens ends a text.
    ends: Vec<u32>,
}

impl<'a> Session<'a> {
    /// Without `use_kv_cache` the whole text is computed again for each token.
    pub fn new(model: &'a Llama, args: &SamplingArgs, use_kv_cache: bool) -> Self {
        let cfg = model.config();
        let cache = Cache::new(use_kv_cache, cfg);
        Self {
            model,
            cache,
            cached: vec![],
            sampler: Sampler::new(args),
            ends: cfg.eos_token_ids.clone(),
        }
    }

    /// Ends texts at `token` too.
    pub fn add_end(&mut self, token: u32) {
        self.ends.push(token);
    }

    /// Generates up to `sample_len` tokens after `prompt` and passes each to `on_token`
    /// immediately.
    ///
    /// If the prompt begins with the tokens in the cache, only the others are evaluated.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        sample_len: usize,
        mut on_token: impl FnMut(u32) -> Result<ControlFlow<End>>,
    ) -> Result<Stats> {
        let (limit, end) = self.limit(prompt.len(), sample_len);
        self.keep_prefix_of(prompt);
        let prompt_tokens = prompt.len() - self.cache.positions();
        let mut stats = Stats {
            prompt_tokens,
            prompt: Duration::ZERO,
            generated: 0,
            generation: Duration::ZERO,
            end,
        };
        let mut tokens = prompt.to_vec();
        let mut start = Instant::now();
        while stats.generated < limit {
            let next = self.next(&tokens)?;
            tokens.push(next);
            stats.generated += 1;
            if stats.generated == 1 {
                stats.prompt = start.elapsed();
                start = Instant::now();
            }
            if self.ends.contains(&next) {
                stats.end = End::Eos;
                break;
            }
            if let ControlFlow::Break(end) = on_token(next)? {
                stats.end = end;
                break;
            }
        }
        stats.generation = if stats.generated > 0 { start.elapsed() } else { Duration::ZERO };
        Ok(stats)
    }

    /// The most tokens after a prompt of `len` tokens, and the reason for the end when all are
    /// generated.
    fn limit(&self, len: usize, sample_len: usize) -> (usize, End) {
        let room = self.model.config().max_position_embeddings.saturating_sub(len);
        if sample_len <= room { (sample_len, End::SampleLen) } else { (room, End::Context) }
    }

    /// Empties the cache unless `prompt` begins with its tokens and has more.
    fn keep_prefix_of(&mut self, prompt: &[u32]) {
        if prompt.len() <= self.cached.len() || !prompt.starts_with(&self.cached) {
            self.cache.reset();
            self.cached.clear();
        }
    }

    /// The token after `tokens`, which begin with the tokens in the cache.
    fn next(&mut self, tokens: &[u32]) -> Result<u32> {
        let index_pos = self.cache.positions();
        let input = Tensor::new(&tokens[index_pos..], self.model.device())?.unsqueeze(0)?; // (1,T)
        let logits = self.model.forward(&input, index_pos, &mut self.cache)?; // (1,vocab)
        self.cached.extend(&tokens[self.cached.len()..self.cache.positions()]);
        self.sampler.choose(&logits, tokens)
    }
}
