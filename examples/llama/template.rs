//! Chat templates: the Jinja template of a checkpoint turns the messages of a chat into one text.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::io;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_swiglu::read_json;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value as JinjaValue};
use minijinja::{Environment, ErrorKind, context};
use serde::Serialize;
use serde_json::Value;

/// One message of a chat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`
    pub role: &'static str,
    pub content: String,
}

/// The template of a checkpoint, and the special tokens that it may use (`bos_token`, `eos_token`,
/// ...).
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: BTreeMap<String, String>,
}

/// The name of the template in the environment.
const NAME: &str = "chat template";

impl ChatTemplate {
    /// The template of the checkpoint in `dir`: from `chat_template.jinja`, `chat_template.json` or
    /// `tokenizer_config.json`, in this order.
    ///
    /// # Errors
    /// No template, one that cannot be parsed, or a malformed file.
    pub fn of_dir(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer_config.json");
        let config = if path.exists() { read_json(&path)? } else { Value::Null };
        let source = match template_file(dir)? {
            Some(source) => source,
            None => template_of(&config).with_context(|| path.display().to_string())?.with_context(|| {
                format!(
                    "--chat: no chat template in {}: expected chat_template.jinja, chat_template.json or \
                     chat_template in tokenizer_config.json",
                    dir.display()
                )
            })?,
        };
        Self::new(&source, special_tokens(&config))
    }

    /// # Errors
    /// A template that cannot be parsed.
    pub fn new(source: &str, special_tokens: BTreeMap<String, String>) -> Result<Self> {
        let mut environment = Environment::new();
        // The settings of Jinja in transformers.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(template_error)?);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", tojson);
        environment.add_test("sequence", is_sequence);
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(template_error)?;
        Ok(Self { environment, special_tokens })
    }

    /// The text of `messages`, with the beginning of an answer if `add_generation_prompt`.
    ///
    /// # Errors
    /// Any error that the template raises.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let none = JinjaValue::from(());
        let fields = context! { messages => Serde(messages), add_generation_prompt, tools => none.clone(), documents => none };
        let tokens = JinjaValue::from(Serde(&self.special_tokens));
        let template = self.environment.get_template(NAME).map_err(template_error)?;
        template.render(context! { ..fields, ..tokens }).map_err(template_error)
    }

    /// The text that follows an answer, with which the model ends it.
    pub fn after_answer(&self) -> Option<String> {
        const ANSWER: &str = "candle";
        let message = |role, content: &str| Message { role, content: content.to_string() };
        let text =
            self.render(&[message("user", "x"), message("assistant", ANSWER)], false).ok()?;
        Some(text.rsplit_once(ANSWER)?.1.to_string())
    }
}

fn template_file(dir: &Path) -> Result<Option<String>> {
    let jinja = dir.join("chat_template.jinja");
    if jinja.exists() {
        let what = || jinja.display().to_string();
        ensure!(jinja.is_file(), "{}: not a file", jinja.display());
        return Ok(Some(std::fs::read_to_string(&jinja).with_context(what)?));
    }
    let json = dir.join("chat_template.json");
    if !json.exists() {
        return Ok(None);
    }
    template_of(&read_json(&json)?).with_context(|| json.display().to_string())
}

/// The field `chat_template`: a template, or a list of named templates, of which `default` is used.
fn template_of(config: &Value) -> Result<Option<String>> {
    let named = match config.get("chat_template") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(source)) => return Ok(Some(source.clone())),
        Some(Value::Array(named)) => named,
        Some(other) => {
            bail!("chat_template: expected a string or a list of named templates, found {other}")
        }
    };
    let text =
        |entry: &Value, field: &str| entry.get(field).and_then(Value::as_str).map(str::to_string);
    let names: Vec<String> = named.iter().filter_map(|entry| text(entry, "name")).collect();
    let default = named.iter().find(|entry| text(entry, "name").as_deref() == Some("default"));
    let source = default.and_then(|entry| text(entry, "template"));
    source.map(Some).with_context(|| {
        format!("chat_template: expected a template named default, found {names:?}")
    })
}

/// The special tokens of `tokenizer_config.json`, each a string or an object with its `content`.
fn special_tokens(config: &Value) -> BTreeMap<String, String> {
    let fields = config.as_object().into_iter().flatten();
    let token = |value: &Value| {
        value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_string)
    };
    let tokens = fields.filter(|(name, _)| name.ends_with("_token"));
    tokens.filter_map(|(name, value)| Some((name.clone(), token(value)?))).collect()
}

/// Replaces the tags `{% generation %}`, which mark the answers for training in transformers, by
/// tags without effect.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(end) = rest[start..].find("%}").map(|end| start + end) else { break };
        let tag = &rest[start + 2..end];
        let word = tag.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let replaced = match word {
            "generation" => tag.replace(word, "if true"),
            "endgeneration" => tag.replace(word, "endif"),
            _ => tag.to_string(),
        };
        let _ = write!(out, "{}{{%{replaced}%}}", &rest[..start]);
        rest = &rest[end + 2..];
    }
    out + rest
}

/// The message of a template's error. If the template itself raised it, only its own message.
fn template_error(error: minijinja::Error) -> anyhow::Error {
    match error.detail().and_then(|detail| detail.strip_prefix(RAISED)) {
        Some(words) => anyhow!("the chat template refuses the messages: {words}"),
        None => anyhow!("the chat template: {error}"),
    }
}

const RAISED: &str = "raised: ";

fn raise_exception(message: &str) -> Result<String, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
}

/// Whether Jinja in Python treats the value as a sequence, which includes strings and objects.
fn is_sequence(value: JinjaValue) -> bool {
    use minijinja::value::ValueKind::{Iterable, Map, Seq, String};
    matches!(value.kind(), Iterable | Map | Seq | String)
}

/// The local time, in the format of C's `strftime`.
fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    let mut text = String::new();
    let written = write!(text, "{}", chrono::Local::now().format(format));
    let invalid = |_| {
        minijinja::Error::new(
            ErrorKind::InvalidOperation,
            format!("strftime_now: not a format: {format}"),
        )
    };
    written.map(|()| text).map_err(invalid)
}

/// JSON in the format of Python's `json.dumps`, with `ensure_ascii=False`.
fn tojson(value: JinjaValue, options: Kwargs) -> Result<JinjaValue, minijinja::Error> {
    let indent = options.get::<Option<usize>>("indent")?;
    let mut out = vec![];
    let written = match indent {
        Some(width) => {
            let indent = " ".repeat(width);
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, PythonJson)),
    };
    let text = written.map(|()| String::from_utf8_lossy(&out).into_owned());
    let invalid =
        |error| minijinja::Error::new(ErrorKind::InvalidOperation, format!("tojson: {error}"));
    text.map(JinjaValue::from_safe_string).map_err(invalid)
}

/// A space after each comma and colon, as in Python.
struct PythonJson;

impl serde_json::ser::Formatter for PythonJson {
    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }
}
