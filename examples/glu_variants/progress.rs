//! Progress bars on a terminal, lines elsewhere.

use anyhow::Result;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::run::Run;

/// A bar over the steps of all runs, and one for each run that is in progress.
pub(crate) struct Progress {
    bars: MultiProgress,
    all: ProgressBar,
}

impl Progress {
    /// `runs` runs of `steps` steps, of which `finished` are finished.
    pub(crate) fn new(runs: u64, finished: u64, steps: u64) -> Result<Self> {
        let bars = MultiProgress::new();
        let all = bars.add(bar(runs * steps, finished * steps)?);
        all.set_prefix("all runs");
        Ok(Self { bars, all })
    }

    /// The bar of a run that begins, or continues after the steps that it has.
    pub(crate) fn begin(&self, run: &Run) -> Result<ProgressBar> {
        let bar = self.bars.add(bar(run.task.settings.steps, run.steps())?);
        bar.set_prefix(format!("{} {}", run.variant.name(), run.seed));
        if run.steps() > 0 {
            self.all.inc(run.steps());
            self.all.reset_eta();
        }
        Ok(bar)
    }

    /// A step is done.
    pub(crate) fn step(&self, run: &Run, bar: &ProgressBar) {
        self.all.inc(1);
        bar.set_position(run.steps());
        if let Some(loss) = run.log.curve.last() {
            bar.set_message(format!("held-out loss {loss:.4}"));
        }
    }

    /// A run is finished: a line above the bars, or on stderr if there are none.
    pub(crate) fn end(&self, run: &Run, bar: &ProgressBar) -> Result<()> {
        bar.finish_and_clear();
        let line = format!(
            "{} {}: training loss {:.4}, {:.0} s; {} of {} steps, {} s left",
            run.variant.name(),
            run.seed,
            run.log.training_loss(),
            run.log.seconds.iter().sum::<f64>(),
            self.all.position(),
            self.all.length().unwrap_or_default(),
            self.all.eta().as_secs()
        );
        if self.all.is_hidden() {
            eprintln!("{line}");
            return Ok(());
        }
        Ok(self.bars.println(line)?)
    }
}

/// The time that is left is estimated from the steps after `position`.
fn bar(length: u64, position: u64) -> Result<ProgressBar> {
    let style = "{prefix:12} {bar:30} {pos:>6}/{len} steps, {eta_precise} left  {msg}";
    let bar = ProgressBar::new(length).with_style(ProgressStyle::with_template(style)?);
    bar.set_position(position);
    bar.reset_eta();
    Ok(bar)
}
