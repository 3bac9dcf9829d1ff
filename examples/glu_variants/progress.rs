//! Progress bars on a terminal, lines elsewhere.

use anyhow::Result;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::run::Run;

/// A bar over the steps of all runs and one over those of the present run.
pub(crate) struct Progress {
    bars: MultiProgress,
    all: ProgressBar,
    run: ProgressBar,
}

impl Progress {
    /// `runs` runs of `steps` steps, of which `finished` are finished.
    pub(crate) fn new(runs: u64, finished: u64, steps: u64) -> Result<Self> {
        let bar = |length: u64| -> Result<ProgressBar> {
            let style = "{prefix:12} {bar:30} {pos:>6}/{len} steps, {eta_precise} left  {msg}";
            Ok(ProgressBar::new(length).with_style(ProgressStyle::with_template(style)?))
        };
        let bars = MultiProgress::new();
        let (all, run) = (bars.add(bar(runs * steps)?), bars.add(bar(steps)?));
        all.set_prefix("all runs");
        all.set_position(finished * steps);
        all.reset_eta();
        Ok(Self { bars, all, run })
    }

    /// A run begins, or continues after the steps that it has.
    pub(crate) fn begin(&self, run: &Run) {
        self.run.set_prefix(format!("{} {}", run.variant.name(), run.seed));
        self.run.set_message("");
        self.run.reset();
        self.run.set_position(run.steps());
        self.run.reset_eta();
        if run.steps() > 0 {
            self.all.inc(run.steps());
            self.all.reset_eta();
        }
    }

    /// A step is done.
    pub(crate) fn step(&self, run: &Run) {
        self.all.inc(1);
        self.run.set_position(run.steps());
        if let Some(loss) = run.log.curve.last() {
            self.run.set_message(format!("held-out loss {loss:.4}"));
        }
    }

    /// A run is finished.
    pub(crate) fn end(&self, run: &Run) -> Result<()> {
        self.note(&format!(
            "{} {}: training loss {:.4}, {} of {} steps, {} s left",
            run.variant.name(),
            run.seed,
            run.log.training_loss(),
            self.all.position(),
            self.all.length().unwrap_or_default(),
            self.all.eta().as_secs()
        ))
    }

    /// Writes a line above the bars, or to stderr if there are none.
    pub(crate) fn note(&self, line: &str) -> Result<()> {
        if self.all.is_hidden() {
            eprintln!("{line}");
            return Ok(());
        }
        Ok(self.bars.println(line)?)
    }
}
