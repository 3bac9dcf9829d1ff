//! Chat templates, and several answers with one cache.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

use anyhow::{Context, Result};
use candle_core::{DType, Device};
use candle_swiglu::Checkpoint;

use crate::chat::{Chat, Line, next_line};
use crate::generate::{End, Session, TooLong, encode_rendered, load_tokenizer};
use crate::model::{Llama, LlamaConfig};
use crate::sampler::SamplingArgs;
use crate::template::{ChatTemplate, Message};

const CHATML: &str = "{% for m in messages %}
    {{- '<|im_start|>' + m['role'] + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}";

const LLAMA3: &str = "{{- bos_token }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}";

const INST: &str = "{{ bos_token }}{% set ns = namespace(system='') %}
{%- for m in messages %}
    {%- if m.role == 'system' %}{% set ns.system = m.content.strip() + '\\n\\n' %}{% continue %}{% endif %}
    {%- if m.role == 'user' %}{{ '[INST] ' + ns.system + m.content + ' [/INST]' }}{% set ns.system = '' %}
    {%- else %}{{ ' ' + m.content.rstrip() + eos_token }}{% endif %}
{%- endfor %}";

const NO_SYSTEM: &str = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message, please') }}{% endif %}
{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}";

fn message(role: &'static str, content: &str) -> Message {
    Message { role, content: content.to_string() }
}

fn template(source: &str) -> Result<ChatTemplate> {
    let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")];
    ChatTemplate::new(
        source,
        tokens.map(|(name, token)| (name.to_string(), token.to_string())).into(),
    )
}

fn error<T>(result: Result<T>) -> String {
    format!("{:#}", result.map(|_| ()).unwrap_err())
}

#[test]
fn templates_of_the_usual_formats() -> Result<()> {
    let turns = [
        message("system", "Be brief."),
        message("user", "Hi"),
        message("assistant", "Yes? "),
        message("user", "No"),
    ];
    let found = template(CHATML)?.render(&turns[..2], true)?;
    assert_eq!(
        found,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
    let found = template(CHATML)?.render(&turns[1..3], false)?;
    assert_eq!(found, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes? <|im_end|>\n");
    let found = template(LLAMA3)?.render(&turns[1..3], true)?;
    let header = |role| format!("<|start_header_id|>{role}<|end_header_id|>\n\n");
    let expected = [
        header("user"),
        "Hi<|eot_id|>".into(),
        header("assistant"),
        "Yes?<|eot_id|>".into(),
        header("assistant"),
    ];
    assert_eq!(found, format!("<s>{}", expected.concat()));
    let found = template(INST)?.render(&turns, true)?;
    assert_eq!(found, "<s>[INST] Be brief.\n\nHi [/INST] Yes?</s>[INST] No [/INST]");
    Ok(())
}

#[test]
fn a_template_has_the_functions_of_transformers() -> Result<()> {
    let render = |source: &str| template(source)?.render(&[message("user", "<a & é>")], true);
    assert_eq!(render("{{ messages | tojson }}")?, r#"[{"role": "user", "content": "<a & é>"}]"#);
    assert_eq!(render("{{ {'a': [1]} | tojson(indent=2) }}")?, "{\n  \"a\": [\n    1\n  ]\n}");
    assert_eq!(
        render("{{ messages[0].content }}{{ tools is none }}")?.to_lowercase(),
        "<a & é>true"
    );
    assert_eq!(render("a\n  {% if true %}\n  b\n  {% endif %}\nc")?, "a\n  b\nc");
    assert_eq!(
        render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}")?,
        "01"
    );
    assert_eq!(
        render("{{ 'a,b'.split(',')[-1].upper() }}{{ 'x' if 'xy'.startswith('x') }}")?,
        "Bx"
    );
    assert_eq!(
        render("a {%- generation %} b{% endgeneration -%} c {% raw %}{% x %}{% endraw %}")?,
        "a bc {% x %}"
    );
    assert_eq!(
        render("{{ messages[0].content is sequence and messages is sequence }}")?.to_lowercase(),
        "true"
    );
    let year: i32 = render("{{ strftime_now('%Y') }}")?.parse()?;
    assert!(year >= 2024, "{year}");
    assert!(error(render("{{ strftime_now('%!') }}")).contains("not a format"));
    assert!(error(render("{% if %}")).contains("the chat template"));
    Ok(())
}

#[test]
fn what_a_template_raises_is_the_error() -> Result<()> {
    let found = error(template(NO_SYSTEM)?.render(&[message("system", "x")], true));
    assert_eq!(found, "the chat template refuses the messages: no system message, please");
    assert_eq!(template(NO_SYSTEM)?.render(&[message("user", "x")], true)?, "<user>x");
    Ok(())
}

#[test]
fn the_template_of_a_checkpoint() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let write = |file: &str, text: &str| std::fs::write(dir.path().join(file), text);
    let render = || ChatTemplate::of_dir(dir.path())?.render(&[message("user", "x")], true);
    assert!(error(render()).contains("no chat template in"));
    write(
        "tokenizer_config.json",
        r#"{"chat_template": "1{{ bos_token }}", "bos_token": {"content": "<b>"}}"#,
    )?;
    assert_eq!(render()?, "1<b>");
    let named = r#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "2"}]}"#;
    write("tokenizer_config.json", named)?;
    assert_eq!(render()?, "2");
    write("tokenizer_config.json", &named.replace("default", "rag"))?;
    assert!(
        error(render()).contains(r#"a template named default, found ["tool_use", "rag"]"#),
        "{}",
        error(render())
    );
    write("tokenizer_config.json", r#"{"chat_template": 7}"#)?;
    assert!(
        error(render())
            .contains("chat_template: expected a string or a list of named templates, found 7")
    );
    write("chat_template.json", r#"{"chat_template": "3"}"#)?;
    assert_eq!(render()?, "3");
    write("chat_template.jinja", "4{{ eos_token }}")?;
    assert_eq!(render()?, "4");
    Ok(())
}

const GREEDY: SamplingArgs = SamplingArgs {
    temperature: 0.0,
    top_p: None,
    top_k: None,
    seed: 0,
    repeat_penalty: 1.0,
    repeat_last_n: 64,
};

fn weights() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("weights")
}

/// Every prompt continues the cache, and every answer equals that of a new cache for the whole
/// chat.
#[test]
fn turns_on_the_cache_give_the_text_of_a_fresh_evaluation() -> Result<()> {
    let checkpoint = Checkpoint::open(weights())?;
    let cfg = LlamaConfig::of(&checkpoint)?;
    let model = Llama::open(&checkpoint, &cfg, DType::F32, &Device::Cpu)?;
    let tokenizer = load_tokenizer(&weights().join("tokenizer.json"))?;
    let plain = "{% for m in messages %}{{ m.content }}{% endfor %}";
    let altered = "{% for m in messages %}{% if not loop.last %}{{ m.content | upper }}{% else %}{{ m.content }}{% endif %}{% endfor %}";
    for (source, reuses) in [(plain, true), (altered, false)] {
        let template = ChatTemplate::new(source, BTreeMap::new())?;
        let session = Session::new(&model, &GREEDY, true);
        let mut chat = Chat::new(&template, &tokenizer, &cfg, session, (12, &[]));
        let mut messages = vec![];
        for (turn, user) in
            ["Once upon a time", " Then the dog said", " In the end"].into_iter().enumerate()
        {
            let mut out = vec![];
            let stats = chat.answer(user, &mut out)?;
            messages.push(message("user", user));
            let prompt = encode_rendered(&tokenizer, &template.render(&messages, true)?, &cfg)?;
            let (expected, fresh) = fresh(&model, &template, &tokenizer, &cfg, &messages)?;
            assert_eq!(String::from_utf8(out)?, expected);
            assert_eq!(fresh, prompt.len());
            assert_eq!(
                stats.prompt_tokens < prompt.len(),
                reuses && turn > 0,
                "{source}, turn {turn}"
            );
            messages.push(Message { role: "assistant", content: expected });
        }
    }
    Ok(())
}

/// The answer to `messages` with an empty cache, and the number of tokens evaluated for it.
fn fresh(
    model: &Llama,
    template: &ChatTemplate,
    tokenizer: &tokenizers::Tokenizer,
    cfg: &LlamaConfig,
    messages: &[Message],
) -> Result<(String, usize)> {
    let mut chat =
        Chat::new(template, tokenizer, cfg, Session::new(model, &GREEDY, true), (12, &[]));
    let (last, before) = messages.split_last().unwrap();
    chat.messages = before.to_vec();
    let mut out = vec![];
    let stats = chat.answer(&last.content, &mut out)?;
    Ok((String::from_utf8(out)?, stats.prompt_tokens))
}

#[test]
fn a_system_message_that_the_template_leaves_out_is_refused() -> Result<()> {
    let checkpoint = Checkpoint::open(weights())?;
    let cfg = LlamaConfig::of(&checkpoint)?;
    let model = Llama::open(&checkpoint, &cfg, DType::F32, &Device::Cpu)?;
    let tokenizer = load_tokenizer(&weights().join("tokenizer.json"))?;
    let with_system = |source: &str| {
        let template = template(source)?;
        let chat =
            Chat::new(&template, &tokenizer, &cfg, Session::new(&model, &GREEDY, true), (12, &[]));
        chat.with_system("Be brief.").map(|_| ())
    };
    with_system(CHATML)?;
    assert!(
        error(with_system(NO_SYSTEM))
            .contains("--system: the chat template refuses the messages: no system")
    );
    assert!(
        error(with_system("{{ messages[-1].content }}")).contains("leaves the system message out")
    );
    Ok(())
}

#[test]
fn a_message_that_does_not_fit_is_dropped() -> Result<()> {
    let checkpoint = Checkpoint::open(weights())?;
    let mut cfg = LlamaConfig::of(&checkpoint)?;
    cfg.max_position_embeddings = 24;
    let model = Llama::open(&checkpoint, &cfg, DType::F32, &Device::Cpu)?;
    let tokenizer = load_tokenizer(&weights().join("tokenizer.json"))?;
    let template =
        ChatTemplate::new("{% for m in messages %}{{ m.content }}{% endfor %}", BTreeMap::new())?;
    let mut chat =
        Chat::new(&template, &tokenizer, &cfg, Session::new(&model, &GREEDY, true), (8, &[]));
    chat.messages.push(message("system", "A story."));
    chat.answer("Once upon a time", io::sink())?;
    let before = chat.messages.clone();
    for user in ["the dog ran ".repeat(20), fill(&chat, 24)?] {
        let error = chat.answer(&user, io::sink()).unwrap_err();
        assert!(
            error.is::<TooLong>()
                && error.to_string().contains("only 24 (max_position_embeddings)"),
            "{error}"
        );
        assert_eq!(chat.messages, before);
    }
    let stats = chat.answer(&fill(&chat, 23)?, io::sink())?;
    assert_eq!((stats.generated, stats.end), (1, End::Context));
    assert!(chat.answer("x", io::sink()).unwrap_err().is::<TooLong>());
    chat.clear();
    assert_eq!(chat.messages, [message("system", "A story.")]);
    chat.answer("Once upon a time", io::sink())?;
    assert_eq!(chat.messages, before);
    Ok(())
}

/// A message that makes the prompt of the chat `len` tokens long.
fn fill(chat: &Chat, len: usize) -> Result<String> {
    let missing = len.checked_sub(chat.prompt()?.len()).context("the chat is longer")?;
    Ok(" a".repeat(missing))
}

#[test]
fn lines_of_the_user() -> Result<()> {
    let message = |text: &str| Some(Line::Message(text.to_string()));
    let mut input = &b"hello\r\n\n  \n two \n\xff\xfe\n /clear\n\xc3\xa9\n/exit\nnot read\n"[..];
    let mut next = || next_line(&mut input, || ());
    assert_eq!(
        [next()?, next()?, next()?],
        [message("hello"), message(" two "), Some(Line::Clear)]
    );
    assert_eq!([next()?, next()?], [message("é"), None]);
    assert_eq!(next_line(&mut &b"no newline"[..], || ())?, message("no newline"));
    assert_eq!(next_line(&mut &b""[..], || ())?, None);
    Ok(())
}
