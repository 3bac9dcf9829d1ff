//! The csv files: those of each run, and those of all runs together.

use std::path::Path;

use anyhow::Result;

use crate::batch::{floor, mean_loss};
use crate::probe;
use crate::run::{self, Run};
use crate::statistics::{Bins, LayerValues, by_sign, root_mean_square, shares};
use crate::table::Table;
use crate::variables::by_name;
use crate::variant::Variant;

/// The files. The first is written last: a run that has it is finished.
const FILES: [&str; 5] =
    ["runs.csv", "curves.csv", "activations.csv", "gradients.csv", "histograms.csv"];

/// Whether all files of a run are written.
pub(crate) fn is_finished(out: &Path, variant: Variant, seed: u64) -> bool {
    run::dir(out, variant, seed).join(FILES[0]).exists()
}

/// Evaluates a trained run and writes its files.
pub(crate) fn finish(run: &Run, out: &Path) -> Result<()> {
    let layers = probe::layers(run)?;
    let tables = [
        summary(run)?,
        curve(run)?,
        activations(run, &layers)?,
        gradients(run, &layers)?,
        histograms(run, &layers)?,
    ];
    let dir = run::dir(out, run.variant, run.seed);
    for (name, table) in FILES.iter().zip(&tables).rev() {
        table.write(&dir.join(name))?;
    }
    Ok(())
}

/// Joins the files of all finished runs, by seed and variant.
pub(crate) fn join(out: &Path, seeds: u64) -> Result<()> {
    for name in FILES {
        let mut all = Table::default();
        for seed in 1..=seeds {
            for variant in Variant::ALL {
                if is_finished(out, variant, seed) {
                    all.append(Table::read(&run::dir(out, variant, seed).join(name))?)?;
                }
            }
        }
        all.write(&out.join(name))?;
    }
    Ok(())
}

/// The number of elements of all variables, and of all matrices. The embedding is the head too, so
/// a token multiplies with every matrix once.
pub(crate) fn costs(run: &Run) -> (usize, usize) {
    let vars = by_name(&run.vars);
    let count = |least_rank: usize| {
        vars.values().filter(|var| var.rank() >= least_rank).map(|var| var.elem_count()).sum()
    };
    (count(0), count(2))
}

fn summary(run: &Run) -> Result<Table> {
    let mut table = Table::new(&[
        "variant",
        "seed",
        "units",
        "parameters",
        "multiply_adds_per_token",
        "steps",
        "training_loss",
        "held_out_loss",
        "floor",
    ]);
    let (parameters, multiply_adds) = costs(run);
    table.push(&[
        &run.variant.name(),
        &run.seed,
        &run.variant.units(run.task.settings.intermediate_size),
        &parameters,
        &multiply_adds,
        &run.steps(),
        &run.log.training_loss(),
        &mean_loss(&run.model, &run.task.held_out)?,
        &floor(&run.task.held_out),
    ])?;
    Ok(table)
}

fn curve(run: &Run) -> Result<Table> {
    let mut table = Table::new(&["variant", "seed", "step", "held_out_loss", "floor"]);
    for (i, loss) in run.log.curve.iter().enumerate() {
        let floor = floor(&run.task.curve);
        table.push(&[&run.variant.name(), &run.seed, &run.curve_step(i), loss, &floor])?;
    }
    Ok(table)
}

fn activations(run: &Run, layers: &[LayerValues]) -> Result<Table> {
    let mut table = Table::new(&[
        "variant",
        "seed",
        "layer",
        "tokens",
        "units",
        "largest",
        "zero_share",
        "small_share",
        "dead_unit_share",
        "negative_share",
        "gradient_negative",
        "gradient_positive",
    ]);
    for (i, layer) in layers.iter().enumerate() {
        let shares = shares(&layer.hidden, layer.units, run.variant.is_rectified());
        let signs = by_sign(&layer.pre, &layer.gradient);
        table.push(&[
            &run.variant.name(),
            &run.seed,
            &i,
            &(layer.hidden.len() / layer.units),
            &layer.units,
            &shares.largest,
            &shares.zero,
            &shares.small,
            &shares.dead,
            &signs.negative,
            &signs.gradient_negative,
            &signs.gradient_positive,
        ])?;
    }
    Ok(table)
}

/// The mean absolute gradient by the input of the activation, in bins of 1/4 over [-6, 6).
fn gradients(run: &Run, layers: &[LayerValues]) -> Result<Table> {
    let mut table = Table::new(&[
        "variant",
        "seed",
        "layer",
        "low",
        "high",
        "count",
        "share",
        "mean_absolute_gradient",
    ]);
    for (i, layer) in layers.iter().enumerate() {
        let mut bins = Bins::new(-6.0, 6.0, 48);
        for (pre, gradient) in layer.pre.iter().zip(&layer.gradient) {
            bins.add(f64::from(*pre), f64::from(gradient.abs()));
        }
        for bin in bins.iter() {
            let (share, mean) =
                (bin.count as f64 / layer.pre.len() as f64, bin.sum / bin.count as f64);
            let (name, seed) = (run.variant.name(), run.seed);
            let (share, mean) = (format!("{share:.3e}"), format!("{mean:.4e}"));
            table.push(&[&name, &seed, &i, &bin.low, &bin.high, &bin.count, &share, &mean])?;
        }
    }
    Ok(table)
}

/// The activations, divided by their root mean square in the layer, in 101 bins over [-4, 4). The
/// middle bin contains 0.
fn histograms(run: &Run, layers: &[LayerValues]) -> Result<Table> {
    let mut table = Table::new(&[
        "variant",
        "seed",
        "layer",
        "root_mean_square",
        "low",
        "high",
        "count",
        "share",
    ]);
    for (i, layer) in layers.iter().enumerate() {
        let unit = root_mean_square(&layer.hidden);
        let mut bins = Bins::new(-4.0, 4.0, 101);
        layer.hidden.iter().for_each(|h| bins.add(f64::from(*h) / unit, 0.0));
        for bin in bins.iter() {
            let share = bin.count as f64 / layer.hidden.len() as f64;
            let (name, seed) = (run.variant.name(), run.seed);
            let (low, high) = (format!("{:.4}", bin.low), format!("{:.4}", bin.high));
            let (unit, share) = (format!("{unit:.5}"), format!("{share:.3e}"));
            table.push(&[&name, &seed, &i, &unit, &low, &high, &bin.count, &share])?;
        }
    }
    Ok(table)
}
