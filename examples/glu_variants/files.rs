//! Files that are complete or absent, also after a kill.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result};

/// Replaces a file: `write` fills a temporary file beside it, which then takes its name.
pub(crate) fn replace(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let part = Path::new(&part);
    let replaced = || {
        write(part)?;
        File::open(part)?.sync_all()?;
        Ok::<(), anyhow::Error>(fs::rename(part, path)?)
    };
    replaced().with_context(|| format!("{}: cannot write", path.display()))
}

/// Replaces a file by a text.
pub(crate) fn write(path: &Path, text: &str) -> Result<()> {
    replace(path, |part| Ok(fs::write(part, text)?))
}
