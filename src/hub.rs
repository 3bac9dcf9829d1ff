//! Checkpoints from the Hugging Face hub (feature `hub`).

use std::path::PathBuf;

use crate::error::{Error, Result};

pub fn download(model_id: &str, revision: &str) -> Result<PathBuf> {
    let _ = revision;
    Err(Error::Hub { model_id: model_id.to_string(), reason: "later".into() })
}
