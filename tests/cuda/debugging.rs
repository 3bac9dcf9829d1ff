//! Aids for finding a wrong result: the trace of launches, and `CANDLE_SWIGLU_KERNEL=plain`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Result, ensure};
use candle_core::DType;
use candle_swiglu::FfnConfig;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

use super::common::{Numbers, this_program, weights};
use super::{build, cuda, on_model, run};

/// Collects the messages of this crate's events.
#[derive(Clone, Default)]
struct Launches(Arc<Mutex<Vec<String>>>);

impl Launches {
    fn kept(&self) -> MutexGuard<'_, Vec<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: tracing::Subscriber> Layer<S> for Launches {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        struct Text(String);
        impl tracing::field::Visit for Text {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                self.0 += &format!("{}={value:?} ", field.name());
            }
        }
        let mut text = Text(String::new());
        event.record(&mut text);
        if event.metadata().target().starts_with("candle_swiglu::cuda") {
            self.kept().push(text.0);
        }
    }
}

#[test]
fn each_launch_is_traced_with_its_kernel_grid_and_rows() -> Result<()> {
    let Some(device) = cuda()? else { return Ok(()) };
    let cfg = FfnConfig::new(72, 136);
    let mut numbers = Numbers::new(31);
    let ffn = build(&cfg, &weights(&cfg, &mut numbers, DType::F32)?, &device)?;
    for (rows, expected) in [
        (3, &["gate_up_fma_f32_n1", "linear_fma_f32_n1"][..]),
        (40, &["cublas", "gate_forward_f32", "cublas"]),
    ] {
        let x = numbers.tensor(&[rows, 72], 1.0, DType::F32)?;
        let launches = Launches::default();
        let subscriber = tracing_subscriber::registry().with(launches.clone());
        tracing::subscriber::with_default(subscriber, || run(&ffn, &x, &device))?;
        let found = launches.kept().clone();
        ensure!(found.len() == expected.len(), "{rows} rows: {found:?}");
        for (found, name) in found.iter().zip(expected) {
            ensure!(
                found.contains(&format!("kernel=\"{name}\"")),
                "expected {name}, found {found}"
            );
            ensure!(found.contains(&format!("rows={rows}")), "{rows} rows: {found}");
            ensure!(*name == "cublas" || found.contains("grid="), "{found}");
        }
    }
    Ok(())
}

#[test]
#[ignore = "the test below starts it in a process of its own"]
fn plain_child() -> Result<()> {
    let Some(device) = cuda()? else { return Ok(()) };
    let cfg = FfnConfig::new(72, 136);
    let ffn = build(&cfg, &weights(&cfg, &mut Numbers::new(32), DType::F32)?, &device)?;
    ensure!(ffn.kernel() == "plain", "{}", ffn.kernel());
    // The driver model does not implement candle's kernels for this.
    if !on_model() {
        let launches = Launches::default();
        let x = Numbers::new(33).tensor(&[3, 72], 1.0, DType::F32)?;
        let subscriber = tracing_subscriber::registry().with(launches.clone());
        tracing::subscriber::with_default(subscriber, || run(&ffn, &x, &device))?;
        ensure!(launches.kept().is_empty());
    }
    Ok(())
}

#[test]
fn plain_is_accepted() -> Result<()> {
    let child = this_program()?
        .args(["debugging::plain_child", "--exact", "--ignored"])
        .env("CANDLE_SWIGLU_KERNEL", "plain")
        .output()?;
    let said = String::from_utf8_lossy(&child.stdout).to_string()
        + &String::from_utf8_lossy(&child.stderr);
    ensure!(child.status.success() && said.contains("1 passed"), "{said}");
    Ok(())
}
