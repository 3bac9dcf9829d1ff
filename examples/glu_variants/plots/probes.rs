//! The distribution of the activations, and the gradients that reach their inputs.

use std::collections::BTreeMap;

use anyhow::Result;
use plotters::prelude::*;

use super::{Axes, Line, Panel, TITLE, extremes, legend, mean, plain, rows_of};
use crate::table::Table;
use crate::variant::Variant;

/// The least share of the histograms' axis, as a power of ten.
const LEAST_POWER: f64 = -5.0;

/// One histogram for each variant, the mean over layers and seeds.
pub(super) fn histograms(root: &Panel, histograms: &Table, activations: &Table) -> Result<()> {
    let title = "Activations h, the input of down_proj: mean over layers and seeds";
    let panels = root.margin(10, 0, 0, 0).titled(title, TITLE)?.split_evenly((2, 4));
    for (variant, panel) in Variant::ALL.into_iter().zip(panels) {
        let zeros = rows_of(activations, variant)?;
        let zeros: Vec<f64> =
            zeros.iter().map(|row| row.number("zero_share")).collect::<Result<_>>()?;
        if !zeros.is_empty() {
            let title = format!("{}: {:.1} % are 0", variant.name(), 100.0 * mean(&zeros));
            histogram(&panel, &title, histograms, variant)?;
        }
    }
    Ok(())
}

fn histogram(panel: &Panel, title: &str, table: &Table, variant: Variant) -> Result<()> {
    let mut bins = BTreeMap::<i64, Vec<(f64, f64, f64)>>::new();
    for row in rows_of(table, variant)? {
        let (low, high) = (row.number("low")?, row.number("high")?);
        let bin = bins.entry((low * 1e6).round() as i64).or_default();
        bin.push((low, high, row.number("share")?));
    }
    let axes = Axes {
        title,
        x: -4.0..4.0,
        x_desc: "h / its root mean square",
        y: LEAST_POWER..0.0,
        y_desc: "share of activations",
        x_label: &plain,
        y_label: &|power| match power.fract() == 0.0 {
            true => format!("{}", 10f64.powf(*power) as f32),
            false => String::new(),
        },
    };
    let mut chart = axes.draw(panel)?;
    let colour = Line::of(variant).colour;
    let tops = bins.values().filter_map(|bin| {
        let share = mean(&bin.iter().map(|(_, _, share)| *share).collect::<Vec<_>>());
        let (low, high, _) = *bin.first()?;
        let power = share.log10().max(LEAST_POWER);
        Some([(low, power), (high, power)])
    });
    let ends = [(-4.0, LEAST_POWER), (4.0, LEAST_POWER)];
    let outline = [ends[0]].into_iter().chain(tops.flatten()).chain([ends[1]]);
    chart.draw_series([Polygon::new(outline.collect::<Vec<_>>(), colour.filled())])?;
    Ok(())
}

/// The share of the inputs below which the mean gradient of a bin is left out as too uncertain.
const LEAST_SHARE: f64 = 1e-4;

/// The mean absolute gradient by the input of the activation: blocks without a gate on the left,
/// those with one on the right.
pub(super) fn gradients(root: &Panel, table: &Table) -> Result<()> {
    let mut lines = vec![];
    for variant in Variant::ALL {
        lines.push((variant, mean_gradients(table, variant)?));
    }
    let (_, most) =
        extremes(lines.iter().flat_map(|(_, points)| points.iter().map(|(_, y)| *y)).chain([0.0]));
    let title = "Gradient that reaches the input g of the activation: mean over layers and seeds";
    let panels = root.margin(10, 0, 0, 0).titled(title, TITLE)?.split_evenly((1, 2));
    let titles = ["Without a gate", "With a gate"];
    for (i, (panel, title)) in panels.iter().zip(titles).enumerate() {
        let axes = Axes {
            title,
            x: -6.0..6.0,
            x_desc: "g",
            y: 0.0..1.05 * most + 1e-9,
            y_desc: "mean |∂ loss / ∂ g| (nats)",
            x_label: &plain,
            y_label: &|y| format!("{}", *y as f32),
        };
        let mut chart = axes.draw(panel)?;
        for (variant, points) in lines.iter().filter(|(v, _)| v.is_gated() == (i == 1)) {
            Line::of(*variant).draw(&mut chart, points.clone(), variant.name())?;
        }
        legend(&mut chart, SeriesLabelPosition::UpperLeft)?;
    }
    Ok(())
}

/// (middle of the bin, mean over all inputs of all layers and seeds)
fn mean_gradients(table: &Table, variant: Variant) -> Result<Vec<(f64, f64)>> {
    let mut bins = BTreeMap::<i64, (f64, f64, f64)>::new();
    let mut all = 0.0;
    for row in rows_of(table, variant)? {
        let middle = (row.number("low")? + row.number("high")?) / 2.0;
        let count = row.number("count")?;
        all += count;
        if count > 0.0 {
            let bin = bins.entry((middle * 1e6).round() as i64).or_insert((middle, 0.0, 0.0));
            bin.1 += count;
            bin.2 += count * row.number("mean_absolute_gradient")?;
        }
    }
    let certain = bins.into_values().filter(|(_, count, _)| *count >= LEAST_SHARE * all);
    Ok(certain.map(|(middle, count, sum)| (middle, sum / count)).collect())
}
