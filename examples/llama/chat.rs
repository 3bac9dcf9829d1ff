//! A chat: each line of the user becomes a message, and the model answers it.

use std::io::{BufRead, Write};
use std::ops::ControlFlow;

use anyhow::{Context, Result, ensure};
use tokenizers::Tokenizer;

use crate::generate::{End, Session, Stats, TextStream, TooLong, context, encode_rendered};
use crate::interrupt::Generating;
use crate::model::LlamaConfig;
use crate::report::{note, print};
use crate::stop::Stop;
use crate::template::{ChatTemplate, Message};

/// The messages so far, and the model that answers them.
pub struct Chat<'a> {
    template: &'a ChatTemplate,
    tokenizer: &'a Tokenizer,
    cfg: &'a LlamaConfig,
    session: Session<'a>,
    stop: &'a [String],
    /// The most tokens of an answer.
    sample_len: usize,
    pub messages: Vec<Message>,
}

impl<'a> Chat<'a> {
    /// Answers end with the end tokens of the session, and with the special token that the template
    /// puts after an answer.
    pub fn new(
        template: &'a ChatTemplate,
        tokenizer: &'a Tokenizer,
        cfg: &'a LlamaConfig,
        mut session: Session<'a>,
        (sample_len, stop): (usize, &'a [String]),
    ) -> Self {
        end_of_answer(template, tokenizer).into_iter().for_each(|token| session.add_end(token));
        Self { template, tokenizer, cfg, session, stop, sample_len, messages: vec![] }
    }

    /// Begins the chat with a system message.
    ///
    /// # Errors
    /// When the template refuses it or leaves it out.
    pub fn with_system(mut self, system: &str) -> Result<Self> {
        self.messages.push(Message { role: "system", content: system.to_string() });
        let user = Message { role: "user", content: "x".to_string() };
        let text =
            self.template.render(&[self.messages[0].clone(), user], true).context("--system")?;
        ensure!(
            text.contains(system.trim()),
            "--system: the chat template leaves the system message out"
        );
        Ok(self)
    }

    /// The token ids of the messages so far, with the beginning of an answer.
    pub fn prompt(&self) -> Result<Vec<u32>> {
        encode_rendered(self.tokenizer, &self.template.render(&self.messages, true)?, self.cfg)
    }

    /// Forgets all messages but the system message.
    pub fn clear(&mut self) {
        self.messages.retain(|message| message.role == "system");
    }

    /// Writes the answer to `user` to `out` while it is generated, and keeps it as a message.
    ///
    /// # Errors
    /// [`TooLong`] when the context has no room for the messages and one token of the answer. In
    /// that case `user` is not kept.
    pub fn answer(&mut self, user: &str, mut out: impl Write) -> Result<Stats> {
        self.messages.push(Message { role: "user", content: user.to_string() });
        let prompt = self.prompt().and_then(|prompt| self.with_room(prompt));
        let prompt = prompt.inspect_err(|_| drop(self.messages.pop()))?;
        let mut answer = String::new();
        let mut text = TextStream::after(self.tokenizer, &prompt)?;
        let mut say = |piece: String| {
            answer.push_str(&piece);
            print(&mut out, &piece)
        };
        let stats =
            run(&mut self.session, &prompt, self.sample_len, &mut text, self.stop, &mut say)?;
        self.messages.push(Message { role: "assistant", content: answer });
        Ok(stats)
    }

    /// Returns `prompt` if at least one token fits after it.
    fn with_room(&self, prompt: Vec<u32>) -> Result<Vec<u32>> {
        let len = prompt.len();
        ensure!(
            len < self.cfg.max_position_embeddings,
            TooLong { len, context: context(self.cfg) }
        );
        Ok(prompt)
    }
}

/// Generates after `prompt` and passes the text to `say`, until a stop string, Ctrl-C, or the end
/// of the text.
pub fn run(
    session: &mut Session,
    prompt: &[u32],
    sample_len: usize,
    text: &mut TextStream,
    stop: &[String],
    say: &mut impl FnMut(String) -> Result<ControlFlow<End>>,
) -> Result<Stats> {
    let generating = Generating::start();
    let mut stop = Stop::new(stop);
    let mut stats = session.generate(prompt, sample_len, |token| {
        let (piece, stopped) = stop.push(&text.push(token)?);
        let said = say(piece)?;
        Ok(match said {
            ControlFlow::Continue(()) if stopped => ControlFlow::Break(End::Stop),
            ControlFlow::Continue(()) if generating.interrupted() => {
                ControlFlow::Break(End::Interrupted)
            }
            said => said,
        })
    })?;
    if stats.end != End::Closed && stats.end != End::Stop {
        let (piece, stopped) = stop.push(&text.finish()?);
        if let ControlFlow::Break(end) = say(piece + &stop.finish())? {
            stats.end = end;
        } else if stopped {
            stats.end = End::Stop;
        }
    }
    Ok(stats)
}

/// The special token that the template puts after an answer.
fn end_of_answer(template: &ChatTemplate, tokenizer: &Tokenizer) -> Option<u32> {
    let text = template.after_answer()?;
    let first = *tokenizer.encode(text.trim_start(), false).ok()?.get_ids().first()?;
    tokenizer.get_added_tokens_decoder().get(&first).filter(|token| token.special).map(|_| first)
}

/// A line of user input.
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    Message(String),
    /// `/clear`
    Clear,
}

/// The next line of the user without its line end, or None at the end of the input or after
/// `/exit`. Empty lines are skipped. Lines that are not UTF-8 are skipped with a note.
pub fn next_line(input: &mut impl BufRead, prompt: impl Fn()) -> Result<Option<Line>> {
    loop {
        prompt();
        let mut line = vec![];
        if input.read_until(b'\n', &mut line).context("cannot read stdin")? == 0 {
            return Ok(None);
        }
        let Ok(line) = String::from_utf8(line) else {
            note("[the line is not UTF-8 and was skipped]");
            continue;
        };
        let line = line.strip_suffix('\n').unwrap_or(&line);
        let line = line.strip_suffix('\r').unwrap_or(line);
        match line.trim() {
            "" => (),
            "/exit" => return Ok(None),
            "/clear" => return Ok(Some(Line::Clear)),
            _ => return Ok(Some(Line::Message(line.to_string()))),
        }
    }
}
