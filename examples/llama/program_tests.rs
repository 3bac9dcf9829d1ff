//! Flags, prompts, stop strings and messages.

#![allow(clippy::unwrap_used)]

use std::ops::ControlFlow;
use std::time::Duration;

use anyhow::{Result, anyhow};
use clap::Parser;

use crate::args::Args;
use crate::generate::{End, Stats, load_tokenizer};
use crate::report::{error_text, lines, print};
use crate::stop::Stop;

fn parse(args: &[&str]) -> Result<Args> {
    Ok(Args::try_parse_from(std::iter::once(&"llama").chain(args))?)
}

#[test]
fn flags_that_exclude_each_other() -> Result<()> {
    for args in [
        &["-p", "x", "-f", "y"][..],
        &["--chat", "-p", "x"],
        &["--chat", "-f", "x"],
        &["--chat", "--no-echo"],
    ] {
        let error = parse(args).unwrap_err().to_string();
        assert!(error.contains("cannot be used with"), "{args:?}: {error}");
    }
    for args in [&["-p", "x", "--system", "y"][..], &["-f", "x", "--system", "y"]] {
        assert!(parse(args).is_err(), "{args:?}");
    }
    assert!(parse(&["--system", "x"]).unwrap_err().to_string().contains("--chat"));
    assert!(parse(&["--stop", ""]).unwrap_err().to_string().contains("at least one character"));
    let args = parse(&[
        "-m",
        "dir",
        "-p",
        "-x",
        "--stop",
        "a",
        "--stop",
        "-b",
        "--no-echo",
        "--allow-unread",
    ])?;
    assert_eq!((args.model_id.as_deref(), args.prompt.as_deref()), (Some("dir"), Some("-x")));
    assert_eq!(args.stop, ["a", "-b"]);
    assert!(parse(&["--chat", "--system", "x", "--stop", "y"]).is_ok());
    assert_eq!(parse(&["--adapter", "dir"])?.adapter, Some("dir".into()));
    assert_eq!(parse(&["--tracing", "--cpu"])?.tracing, Some(None));
    assert_eq!(parse(&["--tracing", "t.json"])?.tracing, Some(Some("t.json".into())));
    Ok(())
}

#[test]
fn where_the_prompt_comes_from() -> Result<()> {
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), " from a file\n")?;
    let path = file.path().display().to_string();
    let prompt = |args: &[&str]| parse(args)?.prompt(&b"from stdin\n"[..]);
    assert_eq!(prompt(&[])?, "Once upon a time");
    assert_eq!(prompt(&["-p", ""])?, "");
    assert_eq!(prompt(&["--prompt", "-"])?, "from stdin\n");
    assert_eq!(prompt(&["-f", &path])?, " from a file\n");
    let error = format!("{:#}", prompt(&["-f", "no/such/file"]).unwrap_err());
    assert!(error.starts_with("--file no/such/file: No such file"), "{error}");
    std::fs::write(file.path(), [0xff])?;
    assert!(format!("{:#}", prompt(&["-f", &path]).unwrap_err()).contains("UTF-8"));
    Ok(())
}

#[test]
fn a_text_ends_before_a_stop_string() {
    let text = |stops: &[&str], pieces: &[&str]| {
        let stops: Vec<String> = stops.iter().map(|stop| stop.to_string()).collect();
        let mut stop = Stop::new(&stops);
        let mut text = String::new();
        for piece in pieces {
            let (certain, stopped) = stop.push(piece);
            text += &certain;
            if stopped {
                return (text, true);
            }
        }
        (text + &stop.finish(), false)
    };
    assert_eq!(text(&[], &["a", "b"]), ("ab".into(), false));
    assert_eq!(text(&["END"], &["xE", "N", "D y"]), ("x".into(), true));
    assert_eq!(text(&["END"], &["xE", "N", "EN", "D"]), ("xEN".into(), true));
    assert_eq!(text(&["aab"], &["a", "a", "a", "b"]), ("a".into(), true));
    assert_eq!(text(&["END"], &["xE", "N"]), ("xEN".into(), false));
    assert_eq!(text(&["bc", "b"], &["a", "bcd"]), ("a".into(), true));
    assert_eq!(text(&["d", "b"], &["abcd"]), ("a".into(), true));
    assert_eq!(text(&["éa"], &["é", "é", "a"]), ("é".into(), true));
    assert_eq!(text(&["\n\n"], &["a\n", "b\n", "\n"]), ("a\nb".into(), true));
    let stops = ["END".to_string()];
    assert_eq!(
        Stop::new(&stops).push("abcE"),
        ("abc".into(), false),
        "held back no more than needed"
    );
}

fn stats(prompt_tokens: usize, generated: usize, end: End) -> Stats {
    let second = Duration::from_secs(1);
    Stats { prompt_tokens, prompt: second, generated, generation: second, end }
}

#[test]
fn the_report() {
    let one = lines(&stats(1, 1, End::Eos), "512 (max_position_embeddings)");
    assert_eq!(one, ["1 prompt token (1.00 token/s)", "1 token generated", "ended by the model"]);
    let more = lines(&stats(2, 3, End::Context), "512 (sliding_window)");
    let end = "ended by the model's context, 512 (sliding_window)";
    assert_eq!(more, ["2 prompt tokens (2.00 token/s)", "3 tokens generated (2.00 token/s)", end]);
    assert_eq!(lines(&stats(2, 0, End::SampleLen), "512"), ["0 tokens generated"]);
    assert_eq!(lines(&stats(2, 3, End::Interrupted), "512").last().unwrap(), "interrupted");
    assert_eq!(lines(&stats(2, 3, End::Stop), "512").last().unwrap(), "ended by a stop string");
}

#[test]
fn an_error_has_no_backtrace() {
    let cause = anyhow!("no such file\n   0: frame\n             at /a/b.rs:1\n   1: frame\n");
    assert_eq!(error_text(&cause), "no such file");
    let error = anyhow!("the cause").context("while loading").context("model x");
    assert_eq!(error_text(&error), "model x: while loading: the cause");
    let candle = candle_core::Error::Msg("broken".into()).bt();
    assert_eq!(error_text(&anyhow::Error::from(candle).context("loading")), "loading: broken");
}

#[test]
fn a_closed_output_is_no_error() {
    struct Closed(std::io::ErrorKind);
    impl std::io::Write for Closed {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(self.0.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let closed = print(Closed(std::io::ErrorKind::BrokenPipe), "x").unwrap();
    assert_eq!(closed, ControlFlow::Break(End::Closed));
    assert!(print(Closed(std::io::ErrorKind::StorageFull), "x").is_err());
}

#[test]
fn a_missing_tokenizer_says_what_is_there() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("tokenizer.json");
    let error = || load_tokenizer(&path).map(|_| ()).unwrap_err().to_string();
    assert!(error().contains("the checkpoint needs its tokenizer"), "{}", error());
    std::fs::write(dir.path().join("tokenizer.model"), "")?;
    assert!(
        error().contains("there is tokenizer.model") && error().contains("save_pretrained"),
        "{}",
        error()
    );
    assert_eq!(error().lines().count(), 1);
    std::fs::write(&path, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 17\n")?;
    assert!(error().contains("Git LFS pointer"), "{}", error());
    Ok(())
}
