//! The source of the checkpoint, and the device on which it runs.

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, DeviceLocation};
use candle_swiglu::{Checkpoint, LoraAdapter, read_json};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::model::{Llama, LlamaConfig, ignore_unread};
use crate::report::note;

/// The directory that `model_id` names. If there is no such directory, it is downloaded from the
/// hub.
pub fn checkpoint_dir(model_id: Option<&str>, revision: &str) -> Result<PathBuf> {
    let Some(model_id) = model_id else {
        let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("weights");
        return Ok(if own.is_dir() { own } else { PathBuf::from("weights") });
    };
    let path = Path::new(model_id);
    if path.exists() {
        ensure!(path.is_dir(), "{model_id}: expected the directory of a checkpoint, found a file");
        return Ok(path.to_path_buf());
    }
    let is_hub_id = model_id.split('/').count() <= 2
        && !model_id.starts_with(['.', '/', '~'])
        && !model_id.is_empty();
    ensure!(is_hub_id, "{model_id:?}: no such directory");
    download(model_id, revision)
}

#[cfg(feature = "hub")]
fn download(model_id: &str, revision: &str) -> Result<PathBuf> {
    note(format_args!("downloading {model_id} ({revision})"));
    let bar = byte_bar("downloading", 0)?;
    let progress = bar.clone();
    let dir = candle_swiglu::hub::download(model_id, revision, move |done, total| {
        progress.set_length(total);
        progress.set_position(done);
    });
    bar.finish_and_clear();
    dir.with_context(|| {
        format!("{model_id}: no such directory, and it cannot be downloaded from the hub")
    })
}

#[cfg(not(feature = "hub"))]
fn download(model_id: &str, _revision: &str) -> Result<PathBuf> {
    anyhow::bail!(
        "{model_id}: no such directory; if it is a hub id, build with --features hub to download it"
    )
}

/// The config, and the end tokens of generation_config.json if it exists.
pub fn read_config(checkpoint: &Checkpoint) -> Result<LlamaConfig> {
    let dir = checkpoint.dir();
    let mut cfg = LlamaConfig::of(checkpoint).with_context(|| dir.display().to_string())?;
    let path = dir.join("generation_config.json");
    if path.exists() || path.is_symlink() {
        cfg.add_eos_of(&read_json(&path)?).with_context(|| path.display().to_string())?;
    }
    Ok(cfg)
}

/// The first device for which this program was built and which is present.
pub fn pick_device(cpu: bool) -> Device {
    let cuda = || candle_core::utils::cuda_is_available().then(|| Device::new_cuda(0));
    let metal = || candle_core::utils::metal_is_available().then(|| Device::new_metal(0));
    let found = if cpu { None } else { cuda().or_else(metal) };
    found.unwrap_or(Ok(Device::Cpu)).unwrap_or_else(|error| {
        note(format_args!("no GPU: {error}"));
        Device::Cpu
    })
}

pub fn device_name(device: &Device) -> String {
    match device.location() {
        DeviceLocation::Cpu => "cpu".to_string(),
        DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}

/// Loads the model with the adapter in a directory, if there is one, with a progress bar. The
/// adapter's pairs are in f32, as PEFT loads them.
pub fn load(
    checkpoint: Checkpoint,
    cfg: &LlamaConfig,
    adapter: Option<&Path>,
    (dtype, device): (DType, &Device),
    allow_unread: bool,
) -> Result<Llama> {
    let adapter = adapter.map(|dir| LoraAdapter::open(dir, DType::F32, device)).transpose()?;
    if let Some(unread) = if allow_unread { ignore_unread(&checkpoint, cfg)? } else { None } {
        note(format_args!("warning: {unread}"));
    }
    let bar = byte_bar("loading", checkpoint.data_bytes())?;
    let progress = bar.clone();
    let checkpoint = checkpoint.with_progress(move |bytes| progress.inc(bytes));
    let model = Llama::open_with_adapter(&checkpoint, cfg, adapter.as_ref(), dtype, device);
    bar.finish_and_clear();
    let model = model?;
    model.notes().iter().for_each(note);
    Ok(model)
}

/// A progress bar in bytes, shown on a terminal only.
fn byte_bar(verb: &'static str, total: u64) -> Result<ProgressBar> {
    let target = if io::stderr().is_terminal() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    };
    let style =
        ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}")?;
    Ok(ProgressBar::with_draw_target(Some(total), target).with_style(style).with_message(verb))
}
