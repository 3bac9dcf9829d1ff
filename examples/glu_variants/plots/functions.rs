//! The functions themselves: activations, their derivatives, and the gate of SwiGLU.

use anyhow::Result;
use candle_swiglu::{Glu, GluActivation, reference};
use plotters::prelude::*;

use super::{Axes, Chart, LABEL, Line, Panel, TICK, colour, legend, plain};

const ACTIVATIONS: [(GluActivation, &str); 5] = [
    (GluActivation::Identity, "identity (bilinear)"),
    (GluActivation::Relu, "ReLU"),
    (GluActivation::Gelu, "GELU"),
    (GluActivation::Silu, "Swish = SiLU"),
    (GluActivation::Sigmoid, "sigmoid (GLU)"),
];

/// The activations on the left, their derivatives on the right.
pub(super) fn activations(root: &Panel) -> Result<()> {
    let panels = root.split_evenly((1, 2));
    let axes = Axes {
        title: "Activations",
        x: -6.0..6.0,
        x_desc: "input g",
        y: -2.0..6.0,
        y_desc: "act(g)",
        x_label: &plain,
        y_label: &plain,
    };
    functions(&axes, &panels[0], |(value, _)| value, SeriesLabelPosition::UpperLeft)?;
    let title = "Derivatives of the activations";
    let axes = Axes { title, y: -0.2..1.2, y_desc: "act'(g)", ..axes };
    functions(&axes, &panels[1], |(_, slope)| slope, SeriesLabelPosition::MiddleRight)
}

fn functions(
    axes: &Axes,
    panel: &Panel,
    part: fn((f64, f64)) -> f64,
    key: SeriesLabelPosition,
) -> Result<()> {
    let mut chart = axes.draw(panel)?;
    for (activation, label) in ACTIVATIONS {
        let point = |i| {
            let g = f64::from(i) / 20.0;
            (g, part(reference::activation(activation, g)))
        };
        let points: Vec<_> = (-120..=120).map(point).filter(|(_, y)| axes.y.contains(y)).collect();
        let line =
            Line { colour: colour(activation), dashed: activation == GluActivation::Identity };
        // The derivative of ReLU jumps; its two branches are not connected.
        for (i, branch) in points.chunk_by(|(_, a), (_, b)| (b - a).abs() < 0.5).enumerate() {
            line.draw(&mut chart, branch.to_vec(), if i == 0 { label } else { "" })?;
        }
    }
    legend(&mut chart, key)
}

/// The largest value of the gate on the square.
const MOST: f64 = 36.0;
/// Cells along one side of the square.
const CELLS: i32 = 32;
/// The values with a contour. Their signed roots divide the colour bar.
const CONTOURS: [f64; 8] = [-16.0, -4.0, -1.0, -0.25, 0.25, 1.0, 4.0, 16.0];

/// silu(g)·u over gate and up, with contours and a colour bar.
pub(super) fn gate(root: &Panel) -> Result<()> {
    let (square, bar) = root.split_horizontally(750);
    let axes = Axes {
        title: "The gate of SwiGLU: silu(g)·u",
        x: -6.0..6.0,
        x_desc: "gate g",
        y: -6.0..6.0,
        y_desc: "up u",
        x_label: &plain,
        y_label: &plain,
    };
    let mut chart = axes.draw(&square)?;
    let edge = |i: i32| -6.0 + 12.0 * f64::from(i) / f64::from(CELLS);
    let cells = (0..CELLS).flat_map(|i| (0..CELLS).map(move |j| (i, j)));
    chart.draw_series(cells.map(|(i, j)| {
        let (low, high) = ((edge(i), edge(j)), (edge(i + 1), edge(j + 1)));
        let value = swiglu((low.0 + high.0) / 2.0, (low.1 + high.1) / 2.0);
        Rectangle::new([low, high], heat(value).filled())
    }))?;
    for value in CONTOURS {
        contour(&mut chart, value)?;
    }
    colour_bar(&bar)
}

fn swiglu(g: f64, u: f64) -> f64 {
    reference::glu(&Glu::new(GluActivation::Silu), g, u)
}

/// White at 0, orange above, blue below, by the root of the value's size.
fn heat(value: f64) -> RGBColor {
    let strength = (value.abs() / MOST).sqrt().min(1.0);
    let RGBColor(r, g, b) = if value < 0.0 { RGBColor(0, 90, 181) } else { RGBColor(220, 90, 0) };
    let mix = |channel: u8| (255.0 + (f64::from(channel) - 255.0) * strength).round() as u8;
    RGBColor(mix(r), mix(g), mix(b))
}

/// The points with silu(g)·u = value are u = value / silu(g), one branch for each sign of g.
fn contour(chart: &mut Chart, value: f64) -> Result<()> {
    for side in [-1.0, 1.0] {
        let point = |i: i32| {
            let g = side * f64::from(i) / 1000.0;
            (g, value / swiglu(g, 1.0))
        };
        let inside = (1..=6000).map(point).filter(|(_, u)| u.abs() <= 6.0);
        let points = thinned(inside, 0.05);
        // Where the branch is nearest to a diagonal, the contours are far from each other.
        let from_diagonal = |(g, u): &(f64, f64)| (g.abs() - u.abs()).abs();
        let at = points.iter().min_by(|a, b| from_diagonal(a).total_cmp(&from_diagonal(b)));
        if let Some(&label_at) = at {
            let text = plain(&value);
            let width = 9 * text.len() as i32;
            let label = EmptyElement::at(label_at)
                + Rectangle::new([(-4, -10), (width, 9)], WHITE.mix(0.8).filled())
                + Text::new(text, (0, -8), TICK.into_font());
            chart.draw_series(LineSeries::new(points, BLACK.mix(0.6).stroke_width(1)))?;
            chart.draw_series([label])?;
        }
    }
    Ok(())
}

/// The points, but for those that are nearer than `step` to the one before.
fn thinned(points: impl Iterator<Item = (f64, f64)>, step: f64) -> Vec<(f64, f64)> {
    let mut kept: Vec<(f64, f64)> = vec![];
    for (g, u) in points {
        if kept.last().is_none_or(|last| (g - last.0).abs() + (u - last.1).abs() >= step) {
            kept.push((g, u));
        }
    }
    kept
}

/// The colours over the signed root of the value, labelled with the values.
fn colour_bar(panel: &Panel) -> Result<()> {
    let root = MOST.sqrt();
    let mut chart = ChartBuilder::on(panel)
        .margin(12)
        .margin_top(54)
        .margin_right(20)
        .x_label_area_size(58)
        .y_label_area_size(84)
        .build_cartesian_2d(0.0..1.0, -root..root)?;
    chart
        .configure_mesh()
        .disable_mesh()
        .disable_x_axis()
        .y_labels(13)
        .y_desc("silu(g)·u")
        .axis_desc_style(LABEL)
        .label_style(TICK)
        .y_label_formatter(&|y| plain(&(y * y.abs())))
        .draw()?;
    let edge = |i: i32| root * f64::from(i) / 30.0;
    chart.draw_series((-30..30).map(|i| {
        let middle = (edge(i) + edge(i + 1)) / 2.0;
        let colour = heat(middle * middle.abs());
        Rectangle::new([(0.0, edge(i)), (1.0, edge(i + 1))], colour.filled())
    }))?;
    Ok(())
}
