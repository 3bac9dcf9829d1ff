//! The losses: during training, and at its end.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use plotters::prelude::SeriesLabelPosition::{MiddleRight, UpperRight};
use plotters::prelude::*;

use super::{Axes, Chart, FLOOR, Line, Panel, TICK, TITLE, extremes, legend, mean, plain, rows_of};
use crate::table::Table;
use crate::variant::Variant;

/// The held-out loss of a variant: step -> one value for each seed.
type Curve = BTreeMap<u64, Vec<f64>>;

/// The whole training on the left, its second half on the right.
pub(super) fn curves(root: &Panel, table: &Table) -> Result<()> {
    let floor = table.rows().next().context("curves.csv: no rows")?.number("floor")?;
    let mut curves = vec![];
    for variant in Variant::ALL {
        let mut curve = Curve::new();
        for row in rows_of(table, variant)? {
            let step = row.number("step")? as u64;
            curve.entry(step).or_default().push(row.number("held_out_loss")?);
        }
        if !curve.is_empty() {
            curves.push((variant, curve));
        }
    }
    let last = curves.iter().flat_map(|(_, curve)| curve.keys()).max().copied().unwrap_or(1);
    let panels = root.split_evenly((1, 2));
    let (title, below) = ("Held-out loss: mean and range of the seeds", Some(floor));
    panel(&panels[0], title, &curves, (0, last), below)?;
    let title = format!("The second half; the floor is {floor:.3}");
    panel(&panels[1], &title, &curves, (last / 2, last), None)
}

fn panel(
    panel: &Panel,
    title: &str,
    curves: &[(Variant, Curve)],
    (first, last): (u64, u64),
    floor: Option<f64>,
) -> Result<()> {
    let shown = |curve: &Curve| curve.clone().split_off(&first);
    let values = curves.iter().flat_map(|(_, curve)| shown(curve).into_values().flatten());
    let (least, most) = extremes(values.chain(floor));
    let space = 0.05 * (most - least) + 1e-6;
    let axes = Axes {
        title,
        x: first as f64..last as f64,
        x_desc: "step",
        y: least - space..most + space,
        y_desc: "held-out loss (nats per token)",
        x_label: &plain,
        y_label: &plain,
    };
    let mut chart = axes.draw(panel)?;
    for (variant, curve) in curves {
        band(&mut chart, &shown(curve), Line::of(*variant).colour)?;
    }
    for (variant, curve) in curves {
        let points = shown(curve).iter().map(|(step, all)| (*step as f64, mean(all))).collect();
        // The first panel's legend has only the floor, so that it covers no line.
        let label = if floor.is_none() { variant.name() } else { "" };
        Line::of(*variant).draw(&mut chart, points, label)?;
    }
    if let Some(floor) = floor {
        let points = vec![(first as f64, floor), (last as f64, floor)];
        FLOOR.draw(&mut chart, points, "floor: entropy of the grammar")?;
    }
    legend(&mut chart, UpperRight)
}

/// The area between the least and the largest value of the seeds.
fn band(chart: &mut Chart, curve: &Curve, colour: RGBColor) -> Result<()> {
    let edges: Vec<_> =
        curve.iter().map(|(step, all)| (*step as f64, extremes(all.iter().copied()))).collect();
    let below = edges.iter().map(|(step, (least, _))| (*step, *least));
    let above = edges.iter().rev().map(|(step, (_, most))| (*step, *most));
    let outline: Vec<_> = below.chain(above).collect();
    chart.draw_series([Polygon::new(outline, colour.mix(0.15).filled())])?;
    Ok(())
}

/// The final held-out loss: a point for each seed, a bar at the mean. On the left with the floor,
/// on the right without it.
pub(super) fn loss(root: &Panel, table: &Table) -> Result<()> {
    let floor = table.rows().next().context("runs.csv: no rows")?.number("floor")?;
    let mut losses = vec![];
    for variant in Variant::ALL {
        let rows = rows_of(table, variant)?;
        let of_seeds = rows.iter().map(|row| row.number("held_out_loss"));
        losses.push((variant, of_seeds.collect::<Result<Vec<f64>>>()?));
    }
    let title = "Held-out loss at the end of training, at equal parameters and multiply-adds";
    let panels = root.margin(10, 0, 0, 0).titled(title, TITLE)?.split_evenly((1, 2));
    columns(&panels[0], "Above the floor", &losses, Some(floor))?;
    columns(&panels[1], "Enlarged: mean and seeds", &losses, None)
}

fn columns(
    panel: &Panel,
    title: &str,
    losses: &[(Variant, Vec<f64>)],
    floor: Option<f64>,
) -> Result<()> {
    let (least, most) =
        extremes(losses.iter().flat_map(|(_, all)| all.iter().copied()).chain(floor));
    let space = 0.1 * (most - least) + 1e-6;
    let name = |x: &f64| {
        let at = (x.fract() == 0.0).then_some(*x as usize);
        at.and_then(|at| Variant::ALL.get(at)).map_or(String::new(), |v| v.name().to_string())
    };
    let axes = Axes {
        title,
        x: -0.5..7.5,
        x_desc: "feed-forward block",
        y: least - space..most + 2.0 * space,
        y_desc: "held-out loss (nats per token)",
        x_label: &name,
        y_label: &plain,
    };
    let mut chart = axes.draw(panel)?;
    for (at, (variant, all)) in losses.iter().enumerate().filter(|(_, (_, all))| !all.is_empty()) {
        column(&mut chart, at as f64, *variant, all, floor.is_none())?;
    }
    match floor {
        Some(floor) => {
            let points = vec![(-0.5, floor), (7.5, floor)];
            FLOOR.draw(&mut chart, points, "floor: entropy of the grammar")?;
        }
        None => {
            let seed = BLACK.stroke_width(2);
            chart
                .draw_series(std::iter::empty::<Circle<(f64, f64), i32>>())?
                .label("one seed")
                .legend(move |(x, y)| Circle::new((x + 12, y), 4, seed));
        }
    }
    let key = if floor.is_some() { MiddleRight } else { UpperRight };
    legend(&mut chart, key)
}

/// The mean, and in `detail` the seeds and the mean's value.
fn column(chart: &mut Chart, at: f64, variant: Variant, all: &[f64], detail: bool) -> Result<()> {
    let colour = Line::of(variant).colour;
    let (centre, (_, most)) = (mean(all), extremes(all.iter().copied()));
    let bar = [(at - 0.3, centre), (at + 0.3, centre)];
    chart.draw_series([PathElement::new(bar, colour.stroke_width(4))])?;
    if !detail {
        return Ok(());
    }
    let middle = (all.len() as f64 - 1.0) / 2.0;
    chart.draw_series(all.iter().enumerate().map(|(seed, loss)| {
        Circle::new((at + 0.12 * (seed as f64 - middle), *loss), 4, colour.stroke_width(2))
    }))?;
    let label = EmptyElement::at((at, most))
        + Text::new(format!("{centre:.4}"), (-26, -28), TICK.into_font());
    chart.draw_series([label])?;
    Ok(())
}
