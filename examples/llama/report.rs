//! The messages on stderr, and the output of the text on stdout.

use std::fmt::Display;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::generate::{End, Stats};

/// Writes a line to stderr, and ignores errors.
pub fn note(line: impl Display) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Writes to `out` and flushes it. A reader that has closed the pipe (`| head`) ends the text
/// without an error.
pub fn print(mut out: impl Write, text: &str) -> Result<ControlFlow<End>> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(ControlFlow::Continue(())),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
            Ok(ControlFlow::Break(End::Closed))
        }
        Err(error) => Err(error).context("cannot write to stdout"),
    }
}

/// The rates of one text, and the reason for its end, one line each. `context` names the size of
/// the context and the config field that limits it.
pub fn lines(stats: &Stats, context: &str) -> Vec<String> {
    let rate = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
    let mut lines = vec![];
    if stats.generated > 0 {
        let prompt = counted(stats.prompt_tokens, "prompt token");
        lines.push(format!("{prompt} ({:.2} token/s)", rate(stats.prompt_tokens, stats.prompt)));
    }
    let generated = counted(stats.generated, "token");
    lines.push(match stats.generated {
        0 | 1 => format!("{generated} generated"),
        n => format!("{generated} generated ({:.2} token/s)", rate(n - 1, stats.generation)),
    });
    match stats.end {
        End::Eos => lines.push("ended by the model".to_string()),
        End::Context => lines.push(format!("ended by the model's context, {context}")),
        End::Stop => lines.push("ended by a stop string".to_string()),
        End::Interrupted => lines.push("interrupted".to_string()),
        End::SampleLen | End::Closed => (),
    }
    lines
}

/// `1 token`, `2 tokens`
fn counted(count: usize, what: &str) -> String {
    if count == 1 { format!("{count} {what}") } else { format!("{count} {what}s") }
}

/// The peak memory of this process, where the system reports it (Linux).
pub fn peak_memory() -> Option<String> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(format!("peak memory: {:.1} MiB", kib as f64 / 1024.0))
}

/// The error and its causes in one text, without the backtraces that candle adds to its messages.
pub fn error_text(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = without_backtrace(&cause.to_string());
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// The text before the first frame of a backtrace.
fn without_backtrace(text: &str) -> String {
    let is_frame = |line: &&str| line.trim_start().starts_with("0: ");
    text.lines()
        .take_while(|line| !is_frame(line))
        .collect::<Vec<_>>()
        .join("\n")
        .trim_end()
        .to_string()
}
