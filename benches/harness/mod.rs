//! Times competitors alternately (A B A B ...) in one process, so that drift of the machine cancels
//! in their ratio.

#![allow(unreachable_pub, dead_code, reason = "each benchmark uses some of it")]

mod memory;
mod peak;
pub mod roofline;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

#[allow(unused_imports, reason = "each benchmark uses some of it")]
pub use memory::read_all;
#[allow(unused_imports, reason = "each benchmark uses some of it")]
pub use peak::peak_of;

/// The median seconds per call of each competitor. Samples alternate until `budget` is spent, for
/// at least 5 rounds.
pub fn interleaved(budget: Duration, competitors: &mut [&mut dyn FnMut()]) -> Vec<f64> {
    // A sample takes at least about a millisecond, so that the clock's resolution does not matter.
    let repeats = competitors
        .iter_mut()
        .map(|f| (1e-3 / seconds(f, 3)).ceil().max(1.0) as usize)
        .max()
        .unwrap_or(1);
    let mut samples = vec![vec![]; competitors.len()];
    let start = Instant::now();
    while samples[0].len() < 5 || start.elapsed() < budget {
        for (f, samples) in competitors.iter_mut().zip(&mut samples) {
            samples.push(seconds(f, repeats));
        }
    }
    samples.into_iter().map(median).collect()
}

fn seconds(f: &mut dyn FnMut(), repeats: usize) -> f64 {
    let start = Instant::now();
    (0..repeats).for_each(|_| f());
    start.elapsed().as_secs_f64() / repeats as f64
}

/// The median of the samples.
pub fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

/// CPU, features, threads and kernel version, as far as Linux reports them, and the versions of
/// this crate and of candle.
pub fn machine_facts() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let line = |key: &str| {
        cpu.lines()
            .find(|l| l.starts_with(key))
            .and_then(|l| l.split(": ").nth(1))
            .unwrap_or("unknown")
            .to_string()
    };
    let flags = format!("{} {}", line("flags"), line("Features")); // the field's name on x86 and on ARM
    let wanted =
        ["avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_vnni", "amx_bf16"];
    let wanted = wanted.into_iter().chain(["asimd", "asimdhp", "bf16", "i8mm", "sve", "sve2"]);
    let flags: Vec<&str> = wanted.filter(|f| flags.split(' ').any(|g| g == *f)).collect();
    let mut facts = String::new();
    let _ = writeln!(
        facts,
        "cpu      {} family {} model {}",
        line("model name"),
        line("cpu family"),
        line("model\t")
    );
    let _ = writeln!(facts, "features {}", flags.join(" "));
    let _ = writeln!(facts, "threads  {}", candle_core::utils::get_num_threads());
    let release = read("/proc/sys/kernel/osrelease");
    let _ = writeln!(
        facts,
        "os       {} {}",
        std::env::consts::OS,
        release.split('-').next().unwrap_or_default().trim()
    );
    let _ =
        writeln!(facts, "crate    candle-swiglu {}, candle-core 0.11.1", env!("CARGO_PKG_VERSION"));
    facts
}

/// `--record NAME` among the arguments: the path `benches/record/NAME`, to which extensions are
/// added.
///
/// # Errors
/// No name follows. `--bench`, which cargo appends, is not a name.
pub fn record_path() -> anyhow::Result<Option<PathBuf>> {
    let mut args = std::env::args().skip_while(|arg| arg != "--record");
    if args.next().is_none() {
        return Ok(None);
    }
    let name = args.next().filter(|name| !name.starts_with("--"));
    anyhow::ensure!(name.is_some(), "--record: expected MACHINE/NAME");
    Ok(name.map(|name| Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/record").join(name)))
}

/// Writes the csv and the facts of the machine.
pub fn record(path: &Path, csv: &str) -> std::io::Result<()> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    std::fs::write(path.with_extension("csv"), csv)?;
    std::fs::write(path.with_extension("txt"), machine_facts())
}
