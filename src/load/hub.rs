//! Checkpoints from the Hugging Face hub (feature `hub`), through its own client `hf-hub` and into
//! the cache that all its clients share.
//!
//! The environment counts as it does for them: `HF_ENDPOINT` (server), `HF_HOME` or `HF_HUB_CACHE`
//! (cache), `HF_TOKEN` (gated models), `HF_HUB_OFFLINE=1` (the cache only).

use std::collections::{BTreeSet, HashMap};
use std::error::Error as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler};
use hf_hub::repository::RepoTreeEntry;
use hf_hub::{HFClientSync, HFError, HFRepositorySync, RepoTypeModel, resolve_cache_dir, split_id};

use crate::error::{Error, Result};
use crate::load::checkpoint::{Checkpoint, INDEX, SINGLE, is_consolidated, read_index};

/// The files of a checkpoint besides its weights. Those that the repository does not have are
/// skipped.
const SMALL_FILES: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "params.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// Downloads the config, the tokenizer and the safetensors of `model_id` ("owner/name") at
/// `revision` (a branch, a tag or a commit) and returns their directory in the cache, for
/// [`Checkpoint::open`]. What is in the cache is not downloaded again; if the server cannot be
/// reached, a complete copy in the cache will do.
///
/// `progress(done, total)` is called with bytes of weights while they arrive, from another thread.
///
/// # Errors
/// [`Error::Hub`] names the model and the reason: no such model, revision or safetensors; a token
/// is needed; no server and no complete copy; a connection that broke; a cache that cannot be
/// written.
///
/// ```no_run
/// use candle_swiglu::{Checkpoint, hub};
/// let dir = hub::download("HuggingFaceTB/SmolLM2-135M", "main", |_, _| ())?;
/// let checkpoint = Checkpoint::open(dir)?;
/// # Ok::<(), candle_swiglu::Error>(())
/// ```
pub fn download(
    model_id: &str,
    revision: &str,
    progress: impl Fn(u64, u64) + Send + Sync + 'static,
) -> Result<PathBuf> {
    fetch(model_id, revision, progress)
        .map_err(|reason| Error::Hub { model_id: model_id.to_string(), reason })
}

fn fetch(
    model_id: &str,
    revision: &str,
    progress: impl Fn(u64, u64) + Send + Sync + 'static,
) -> Result<PathBuf, String> {
    let client = HFClientSync::new().map_err(|error| with_sources(&error))?;
    let (owner, name) = split_id(model_id);
    if name.is_empty() || [owner, name].iter().any(|part| !is_plain(part)) {
        return Err("expected an id of the form owner/name".into());
    }
    let repo = client.model(owner, name);
    let cache = &resolve_cache_dir();
    if is_offline() {
        return cached(&repo, revision, cache, "HF_HUB_OFFLINE is set");
    }
    match fetch_online(&repo, revision, progress) {
        Ok(dir) => Ok(dir),
        Err(Failure::Unreachable(reason)) => cached(&repo, revision, cache, &reason),
        Err(Failure::Cache(reason)) => {
            Err(format!("the cache {} cannot be used: {reason}", cache.display()))
        }
        Err(Failure::Other(reason)) => Err(reason),
    }
}

fn fetch_online(
    repo: &HFRepositorySync<RepoTypeModel>,
    revision: &str,
    progress: impl Fn(u64, u64) + Send + Sync + 'static,
) -> Result<PathBuf, Failure> {
    let mut wanted: Vec<String> = SMALL_FILES.map(String::from).into();
    wanted.push(INDEX.into());
    let dir = repo.snapshot_download().revision(revision).allow_patterns(wanted).send()?;
    // From here on the commit, so that the weights fit the config even if the branch moves now.
    let commit = dir.file_name().and_then(|name| name.to_str()).unwrap_or(revision);
    let listed = repo.list_tree().revision(commit).send()?;
    let present: BTreeSet<String> = listed
        .into_iter()
        .filter_map(|entry| match entry {
            RepoTreeEntry::File { path, .. } => Some(path),
            _ => None,
        })
        .collect();
    let files = weight_files(&present, &dir).map_err(Failure::Other)?;
    let meter = Meter { done: Mutex::default(), report: progress };
    repo.snapshot_download()
        .revision(commit)
        .allow_patterns(files.clone())
        .progress(meter)
        .send()?;
    match files.iter().find(|name| !dir.join(name).is_file()) {
        Some(lost) => Err(Failure::Other(format!("{lost} did not arrive in {}", dir.display()))),
        None => Ok(dir),
    }
}

/// The files that [`Checkpoint::open`] would read.
fn weight_files(present: &BTreeSet<String>, dir: &Path) -> Result<Vec<String>, String> {
    if present.contains(SINGLE) {
        return Ok(vec![SINGLE.into()]);
    }
    if present.contains(INDEX) {
        let homes = read_index(&dir.join(INDEX)).map_err(|error| error.to_string())?;
        let shards: BTreeSet<String> = homes.into_values().collect();
        return match shards.iter().find(|&shard| !present.contains(shard)) {
            Some(shard) => Err(format!("{INDEX} names {shard}, which is not in the repository")),
            None => Ok(shards.into_iter().collect()),
        };
    }
    let consolidated: Vec<String> =
        present.iter().filter(|name| is_consolidated(name)).cloned().collect();
    if consolidated.is_empty() {
        let names: Vec<&str> = present.iter().map(String::as_str).collect();
        return Err(format!(
            "expected {SINGLE}, {INDEX} or consolidated*.safetensors in the repository, found {}",
            names.join(", ")
        ));
    }
    Ok(consolidated)
}

/// The copy in the cache, if it is complete.
fn cached(
    repo: &HFRepositorySync<RepoTypeModel>,
    revision: &str,
    cache: &Path,
    reason: &str,
) -> Result<PathBuf, String> {
    let local = repo.snapshot_download().revision(revision).local_files_only(true).send();
    let dir = local.map_err(|_| {
        format!("{reason}; nothing of revision {revision} in the cache {}", cache.display())
    })?;
    match Checkpoint::open(&dir) {
        Ok(_) => Ok(dir),
        Err(error) => Err(format!("{reason}; the copy in the cache is not complete: {error}")),
    }
}

enum Failure {
    /// No answer, or a server in trouble.
    Unreachable(String),
    Cache(String),
    Other(String),
}

impl From<HFError> for Failure {
    fn from(error: HFError) -> Self {
        let reason = with_sources(&error);
        match error {
            HFError::Request { .. } => Self::Unreachable(reason),
            HFError::Http { context } if context.status.is_server_error() => {
                Self::Unreachable(reason)
            }
            HFError::Io(_) | HFError::CacheLockTimeout { .. } => Self::Cache(reason),
            _ => Self::Other(reason),
        }
    }
}

/// The error and, where it does not say so itself, what caused it.
fn with_sources(error: &HFError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

fn is_plain(part: &str) -> bool {
    !part.starts_with('.')
        && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}

fn is_offline() -> bool {
    let value = std::env::var("HF_HUB_OFFLINE").unwrap_or_default();
    ["1", "true", "yes", "on"].contains(&value.to_ascii_lowercase().as_str())
}

/// Adds up the bytes of several files.
struct Meter<F> {
    done: Mutex<Sum>,
    report: F,
}

#[derive(Default)]
struct Sum {
    total: u64,
    files: HashMap<String, u64>,
    /// Of the files that come in chunks shared between them (xet), for which there is only one
    /// figure.
    chunked: u64,
}

impl<F: Fn(u64, u64) + Send + Sync> ProgressHandler for Meter<F> {
    fn on_progress(&self, event: &ProgressEvent) {
        let ProgressEvent::Download(event) = event else { return };
        let Ok(mut sum) = self.done.lock() else { return };
        match event {
            // One for all files, then one for each.
            DownloadEvent::Start { total_bytes, .. } => sum.total = sum.total.max(*total_bytes),
            DownloadEvent::Progress { files } => {
                sum.files
                    .extend(files.iter().map(|file| (file.filename.clone(), file.bytes_completed)));
            }
            DownloadEvent::AggregateProgress { bytes_completed, .. } => {
                sum.chunked = *bytes_completed
            }
            DownloadEvent::Complete => return,
        }
        let done = sum.files.values().sum::<u64>().max(sum.chunked);
        (self.report)(done.min(sum.total), sum.total);
    }
}
