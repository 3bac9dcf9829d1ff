//! Each test breaks one rule and expects one typed error whose message names the fault: files,
//! names, shapes, dtypes. (Configs: `config.rs`. Mixed devices need a second device, so they are
//! not tested here.)
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use candle_core::{DType, Device, Tensor};
use candle_swiglu::{Checkpoint, Error, FfnConfig, SwiGluFfn};
use tempfile::TempDir;

/// Asserts that the result is an error of this variant, that its message has all these parts, and
/// that candle's error keeps both.
macro_rules! assert_error {
    ($result:expr, $pattern:pat, $parts:expr) => {{
        let error = Error::from($result.map(|_| "success").unwrap_err());
        assert!(matches!(error, $pattern), "{error:?}");
        let message = error.to_string();
        for part in $parts {
            assert!(message.contains(part as &str), "expected {part:?} in {message:?}");
        }
        let candle = candle_core::Error::from(error);
        assert_eq!(candle.to_string(), message);
        assert!(matches!(Error::find(&candle), Some($pattern)), "{candle:?}");
        let candle = candle.bt();
        assert!(matches!(Error::find(&candle), Some($pattern)), "{candle:?}");
        let error = Error::from(candle);
        assert!(matches!(error, $pattern), "{error:?}");
        let candle = candle_core::Error::from(error).context("layer 3").bt();
        assert!(matches!(Error::find(&candle), Some($pattern)), "{candle:?}");
    }};
}

mod files;
mod formats;
mod tensors;
mod unread;

const H: usize = 4;
const I: usize = 6;
const CONFIG: &str = r#"{"hidden_size": 4, "intermediate_size": 6}"#;

fn zeros(shape: &[usize], dtype: DType) -> Tensor {
    Tensor::zeros(shape, dtype, &Device::Cpu).unwrap()
}

/// A directory with a config and these files.
fn directory(files: &[(&str, &[u8])]) -> TempDir {
    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join("config.json"), CONFIG).unwrap();
    for (name, bytes) in files {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

/// A safetensors file with this header and `data` bytes of data.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

/// A safetensors file of zeros. The dtypes have the names of the format.
fn tensors(list: &[(&str, &str, &[usize])]) -> Vec<u8> {
    let mut end = 0;
    let entries = list.iter().map(|(name, dtype, shape)| {
        let start = end;
        let bits: usize = dtype.trim_start_matches(|c: char| !c.is_ascii_digit()).parse().unwrap();
        end += shape.iter().product::<usize>() * bits / 8;
        format!(
            r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#
        )
    });
    let header = format!("{{{}}}", entries.collect::<Vec<_>>().join(","));
    file(&header, end)
}

fn block() -> Vec<u8> {
    let (ih, hi): (&[usize], &[usize]) = (&[I, H], &[H, I]);
    tensors(&[
        ("mlp.gate_proj.weight", "F32", ih),
        ("mlp.up_proj.weight", "F32", ih),
        ("mlp.down_proj.weight", "F32", hi),
    ])
}

fn load(dir: &TempDir, cfg: &FfnConfig, prefix: &str) -> Result<SwiGluFfn, Error> {
    SwiGluFfn::new(
        cfg,
        Checkpoint::open(dir.path())?.var_builder(DType::F32, &Device::Cpu).pp(prefix),
    )
}

fn load_file(bytes: &[u8]) -> Result<SwiGluFfn, Error> {
    load(&directory(&[("model.safetensors", bytes)]), &FfnConfig::new(H, I), "mlp")
}

fn open_file(bytes: &[u8]) -> Result<Checkpoint, Error> {
    Checkpoint::open(directory(&[("model.safetensors", bytes)]).path())
}

#[test]
fn the_block_itself_is_good() {
    assert_eq!(load_file(&block()).unwrap().hidden_size(), H);
}
