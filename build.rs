//! With the feature `cuda`: compiles the kernels of src/cuda with nvcc to fatbins that
//! `src/cuda/functions.rs` embeds. Without it nothing is built.
//!
//! | fatbin | code |
//! |---|---|
//! | decode, gate | machine code for sm_80 and sm_90; PTX of compute_80, which the driver compiles for anything newer |
//! | prefill_sm90 | machine code for sm_90a (Hopper) alone |
//!
//! Environment variables:
//!
//! - `NVCC` names the compiler. Otherwise it is searched in `CUDA_HOME` and `CUDA_PATH`, in `PATH`
//!   and in /usr/local/cuda.
//! - `NVCC_CCBIN` names the host compiler of nvcc.
//! - `CANDLE_SWIGLU_CUDA_SKIP_NVCC=1` embeds empty fatbins. Using a kernel of this crate is then an
//!   error.
//!
//! The build scripts of candle's CUDA crates run nvcc too, so a machine without CUDA needs a
//! stand-in for it: `scripts/cuda-toolkit.sh DIR none` makes one.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

const PORTABLE: &[&str] =
    &["arch=compute_80,code=[compute_80,sm_80]", "arch=compute_90,code=sm_90"];
const HOPPER: &[&str] = &["arch=compute_90a,code=sm_90a"];
const FATBINS: [(&str, &[&str]); 3] =
    [("decode", PORTABLE), ("gate", PORTABLE), ("prefill_sm90", HOPPER)];

const SOURCES: &str = "src/cuda";
const SKIP: &str = "CANDLE_SWIGLU_CUDA_SKIP_NVCC";
const VARIABLES: [&str; 6] = ["NVCC", "NVCC_CCBIN", "CUDA_HOME", "CUDA_PATH", "DOCS_RS", SKIP];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    for entry in std::fs::read_dir(SOURCES)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "cu" || extension == "cuh") {
            println!("cargo::rerun-if-changed={}", path.display());
        }
    }
    println!("cargo::rerun-if-changed=src/gate/gate.h");
    VARIABLES.iter().for_each(|name| println!("cargo::rerun-if-env-changed={name}"));
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    if set(SKIP) || set("DOCS_RS") {
        for (name, _) in FATBINS {
            std::fs::write(fatbin(&out, name), [])?;
        }
        return Ok(());
    }
    let nvcc = nvcc();
    // All start at once, each in a process of its own.
    let started: Vec<_> =
        FATBINS.iter().map(|(name, code)| (name, start(&nvcc, name, code, &out))).collect();
    for (name, child) in started {
        let status = child.map_err(|error| missing(&nvcc, &error))?.wait()?;
        if !status.success() {
            return Err(format!(
                "{} failed on {SOURCES}/{name}.cu ({status}); its messages are above",
                nvcc.display()
            )
            .into());
        }
    }
    Ok(())
}

/// Whether the variable is set, and neither empty nor 0.
fn set(name: &str) -> bool {
    std::env::var_os(name).is_some_and(|value| !value.is_empty() && value != "0")
}

fn fatbin(out: &Path, name: &str) -> PathBuf {
    out.join(name).with_extension("fatbin")
}

fn nvcc() -> PathBuf {
    if let Some(nvcc) = std::env::var_os("NVCC").filter(|nvcc| !nvcc.is_empty()) {
        return nvcc.into();
    }
    let roots = ["CUDA_HOME", "CUDA_PATH"]
        .into_iter()
        .filter_map(std::env::var_os)
        .map(|root| Path::new(&root).join("bin"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders =
        roots.chain(std::env::split_paths(&path)).chain([PathBuf::from("/usr/local/cuda/bin")]);
    let found = folders.map(|folder| folder.join("nvcc")).find(|nvcc| nvcc.is_file());
    found.unwrap_or_else(|| "nvcc".into())
}

fn start(nvcc: &Path, name: &str, code: &[&str], out: &Path) -> std::io::Result<Child> {
    let mut command = Command::new(nvcc);
    command
        .args(["-std=c++17", "-O3", "-fatbin"])
        .args(code.iter().map(|code| format!("-gencode={code}")));
    if let Some(compiler) = std::env::var_os("NVCC_CCBIN").filter(|compiler| !compiler.is_empty()) {
        command.arg("-ccbin").arg(compiler);
    }
    command
        .arg("-o")
        .arg(fatbin(out, name))
        .arg(Path::new(SOURCES).join(name).with_extension("cu"))
        .spawn()
}

fn missing(nvcc: &Path, error: &std::io::Error) -> String {
    format!(
        "cannot run {} ({error}). The feature `cuda` needs nvcc 12 or newer: install the CUDA toolkit, name the compiler in NVCC, or \
         on a machine without CUDA run `eval \"$(scripts/cuda-toolkit.sh DIR)\"` in a clone of candle-swiglu: candle's own CUDA crates need \
         nvcc too.",
        nvcc.display()
    )
}
