//! The header of a safetensors file.

use std::fs::File;
use std::path::Path;

use safetensors::tensor::Metadata;

use crate::error::{Error, Result};

/// Neither a directory nor a pipe, which would be waited for.
pub(super) fn check_file(path: &Path) -> Result<()> {
    if let (false, Ok(target)) = (path.exists(), std::fs::read_link(path)) {
        return Err(Error::DanglingLink { path: path.to_path_buf(), target });
    }
    let metadata = std::fs::metadata(path).map_err(Error::io(path))?;
    if metadata.is_file() {
        return Ok(());
    }
    let found = if metadata.is_dir() { "a directory" } else { "a special file" };
    Err(Error::NotAFile { path: path.to_path_buf(), found })
}

/// Where the data starts, and the checked header: its tensors tile the rest of the file without gap
/// or overlap.
pub(super) fn read_header(path: &Path, file: &File) -> Result<(u64, Metadata)> {
    const LENGTH: u64 = 8;
    const MOST: u64 = 100_000_000; // the format's own bound
    let found = file.metadata().map_err(Error::io(path))?.len();
    if let Some(size) = lfs_pointer(file, found) {
        return Err(Error::LfsPointer { path: path.to_path_buf(), size });
    }
    let broken = |reason: String| Error::Header { path: path.to_path_buf(), reason };
    if found < LENGTH {
        return Err(broken(format!("expected at least 8 bytes, found {found}")));
    }
    let mut length = [0; LENGTH as usize];
    read_exact_at(file, &mut length, 0).map_err(Error::io(path))?;
    let length = u64::from_le_bytes(length);
    if length > MOST || length > found - LENGTH {
        let most = MOST.min(found - LENGTH);
        return Err(broken(format!(
            "expected a header of at most {most} bytes, found one of {length}"
        )));
    }
    let mut json = vec![0; length as usize];
    read_exact_at(file, &mut json, LENGTH).map_err(Error::io(path))?;
    let metadata: Metadata =
        serde_json::from_slice(&json).map_err(|error| broken(error.to_string()))?;
    let expected = (LENGTH + length).checked_add(metadata.data_len() as u64);
    match expected {
        Some(expected) if expected == found => Ok((LENGTH + length, metadata)),
        _ => Err(Error::FileSize {
            path: path.to_path_buf(),
            expected: expected.unwrap_or(u64::MAX),
            found,
        }),
    }
}

/// The size that a Git LFS pointer names, if the file of `len` bytes is one.
fn lfs_pointer(file: &File, len: u64) -> Option<Option<u64>> {
    const MOST: u64 = 1024; // by the format
    if len > MOST {
        return None;
    }
    let mut text = vec![0; len as usize];
    read_exact_at(file, &mut text, 0).ok()?;
    lfs_size(&text)
}

/// The size that a Git LFS pointer names, if these bytes are one.
pub(super) fn lfs_size(bytes: &[u8]) -> Option<Option<u64>> {
    const BEGIN: &[u8] = b"version https://git-lfs";
    let text = bytes.starts_with(BEGIN).then(|| String::from_utf8_lossy(bytes))?;
    Some(text.lines().find_map(|line| line.strip_prefix("size ")?.trim().parse().ok()))
}

#[cfg(unix)]
pub(super) fn read_exact_at(file: &File, buffer: &mut [u8], at: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, at)
}

#[cfg(windows)]
pub(super) fn read_exact_at(
    file: &File,
    mut buffer: &mut [u8],
    mut at: u64,
) -> std::io::Result<()> {
    while !buffer.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, buffer, at)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            n => {
                buffer = &mut buffer[n..];
                at += n as u64;
            }
        }
    }
    Ok(())
}

#[cfg(not(any(unix, windows)))]
pub(super) fn read_exact_at(mut file: &File, buffer: &mut [u8], at: u64) -> std::io::Result<()> {
    use std::io::{Read, Seek, SeekFrom};
    file.seek(SeekFrom::Start(at))?;
    file.read_exact(buffer)
}
