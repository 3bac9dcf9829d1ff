//! From prompt to text and back, with the checkpoint in `weights/`.

#![allow(clippy::unwrap_used)]

use std::ops::ControlFlow;
use std::path::PathBuf;

use anyhow::Result;
use candle_core::{DType, Device};
use candle_swiglu::Checkpoint;
use tokenizers::Tokenizer;

use crate::generate::{End, Session, Stats, TextStream, encode, load_tokenizer};
use crate::model::{Llama, LlamaConfig};
use crate::sampler::SamplingArgs;

fn weights(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("weights").join(file)
}

fn tokenizer() -> Result<Tokenizer> {
    load_tokenizer(&weights("tokenizer.json"))
}

fn config() -> Result<LlamaConfig> {
    Ok(LlamaConfig::from_json(Checkpoint::open(weights(""))?.config())?)
}

fn model(cfg: &LlamaConfig) -> Result<Llama> {
    let vb = Checkpoint::open(weights(""))?.var_builder(DType::F32, &Device::Cpu);
    Ok(Llama::load(vb, cfg)?)
}

const GREEDY: SamplingArgs = SamplingArgs {
    temperature: 0.0,
    top_p: None,
    top_k: None,
    seed: 0,
    repeat_penalty: 1.0,
    repeat_last_n: 64,
};

fn tokens(
    model: &Llama,
    prompt: &[u32],
    sample_len: usize,
    args: &SamplingArgs,
) -> Result<(Vec<u32>, Stats)> {
    let mut tokens = vec![];
    let stats = Session::new(model, args, true).generate(prompt, sample_len, |token| {
        tokens.push(token);
        Ok(ControlFlow::Continue(()))
    })?;
    Ok((tokens, stats))
}

#[test]
fn characters_of_many_bytes_come_whole() -> Result<()> {
    let tokenizer = tokenizer()?;
    let start = encode(&tokenizer, "It said: ", &config()?)?;
    for said in ["Café", "日本語", "😀👩‍👩‍👧", "e\u{301}", " naïve — “so”", "ab  c\n\n d"]
    {
        let all = encode(&tokenizer, &format!("It said: {said}"), &config()?)?;
        let mut text = TextStream::after(&tokenizer, &all[..start.len()])?;
        let mut found = tokenizer.decode(&all[..start.len()], true).map_err(anyhow::Error::msg)?;
        for &id in &all[start.len()..] {
            let piece = text.push(id)?;
            assert!(!piece.contains('\u{fffd}'), "{said}: {piece:?}");
            found += &piece;
        }
        found += &text.finish()?;
        assert_eq!(found, format!("It said: {said}"));
    }
    Ok(())
}

#[test]
fn a_prompt_that_does_not_fit_is_an_error() -> Result<()> {
    let (tokenizer, mut cfg) = (tokenizer()?, config()?);
    let words = "Once upon a time ".repeat(200);
    let error = encode(&tokenizer, &words, &cfg).map(|ids| ids.len()).unwrap_err().to_string();
    assert!(error.contains("the prompt has") && error.contains("context only 512"), "{error}");
    cfg.vocab_size = 300;
    let error = encode(&tokenizer, "Once upon a time", &cfg).unwrap_err().to_string();
    assert!(error.contains("token id") && error.contains("only 300 (vocab_size)"), "{error}");
    let error = load_tokenizer(&weights("no-tokenizer.json")).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("no-tokenizer.json: no such file"), "{error}");
    let error = load_tokenizer(&weights("config.json")).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("config.json: not a tokenizer"), "{error}");
    Ok(())
}

#[test]
fn a_text_ends_where_it_should() -> Result<()> {
    let (tokenizer, cfg) = (tokenizer()?, config()?);
    let prompt = encode(&tokenizer, "Once upon a time", &cfg)?;
    let (story, stats) = tokens(&model(&cfg)?, &prompt, 500, &GREEDY)?;
    assert_eq!((stats.end, stats.generated), (End::Eos, story.len() + 1));

    let (start, stats) = tokens(&model(&cfg)?, &prompt, 10, &GREEDY)?;
    assert_eq!((stats.end, stats.generated, &start[..]), (End::SampleLen, 10, &story[..10]));
    let (nothing, stats) = tokens(&model(&cfg)?, &prompt, 0, &GREEDY)?;
    assert_eq!((stats.end, nothing.len()), (End::SampleLen, 0));

    let mut narrow = cfg.clone();
    narrow.max_position_embeddings = prompt.len() + 7;
    let (start, stats) = tokens(&model(&narrow)?, &prompt, 500, &GREEDY)?;
    assert_eq!((stats.end, &start[..]), (End::Context, &story[..7]));

    let mut several = cfg.clone();
    several.eos_token_ids.push(story[5]);
    let first = story.iter().position(|&token| token == story[5]);
    let (start, stats) = tokens(&model(&several)?, &prompt, 500, &GREEDY)?;
    assert_eq!((stats.end, Some(start.len())), (End::Eos, first));

    let closed = Session::new(&model(&cfg)?, &GREEDY, true)
        .generate(&prompt, 500, |_| Ok(ControlFlow::Break(End::Closed)))?;
    assert_eq!((closed.end, closed.generated), (End::Closed, 1));
    Ok(())
}

#[test]
fn a_seed_gives_one_text() -> Result<()> {
    let (tokenizer, cfg) = (tokenizer()?, config()?);
    let (model, prompt) = (model(&cfg)?, encode(&tokenizer, "Once upon a time", &cfg)?);
    let drawn = |seed| {
        let args = SamplingArgs {
            temperature: 0.9,
            top_p: Some(0.95),
            top_k: Some(50),
            repeat_penalty: 1.1,
            seed,
            ..GREEDY
        };
        Ok::<_, anyhow::Error>(tokens(&model, &prompt, 40, &args)?.0)
    };
    assert_eq!(drawn(1)?, drawn(1)?);
    assert_ne!(drawn(1)?, drawn(2)?);
    Ok(())
}
