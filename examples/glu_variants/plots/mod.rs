//! The pictures, drawn from the csv files.
//!
//! A colour stands for an activation, from the palette of Okabe and Ito, which colour-blind people
//! can distinguish. Lines of blocks without a gate are dashed.

mod functions;
mod probes;
mod training;

use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result};
use candle_swiglu::GluActivation;
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use crate::table::{Row, Table};
use crate::variant::Variant;

/// Draws all pictures from the tables of a directory.
pub(crate) fn draw(tables: &Path, out: &Path) -> Result<()> {
    let read = |name: &str| Table::read(&tables.join(name));
    let pictures: [(&str, (u32, u32), Draw); 6] = [
        ("activations.svg", (1200, 520), &functions::activations),
        ("gate.svg", (900, 740), &functions::gate),
        ("curves.svg", (1320, 600), &|root| training::curves(root, &read("curves.csv")?)),
        ("loss.svg", (1320, 640), &|root| training::loss(root, &read("runs.csv")?)),
        ("histograms.svg", (1600, 820), &|root| {
            probes::histograms(root, &read("histograms.csv")?, &read("activations.csv")?)
        }),
        ("gradients.svg", (1200, 560), &|root| probes::gradients(root, &read("gradients.csv")?)),
    ];
    for (name, size, picture) in pictures {
        let path = out.join(name);
        let root = SVGBackend::new(&path, size).into_drawing_area();
        let drawn = || {
            root.fill(&WHITE)?;
            picture(&root)?;
            Ok::<(), anyhow::Error>(root.present()?)
        };
        drawn().with_context(|| path.display().to_string())?;
    }
    Ok(())
}

type Draw<'a> = &'a dyn Fn(&Panel) -> Result<()>;
type Panel<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a> = ChartContext<'a, SVGBackend<'a>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

// The SVG backend divides a size by 1.24: 14.5 px, 16 px and 20 px.
const TICK: (&str, u32) = ("sans-serif", 18);
const LABEL: (&str, u32) = ("sans-serif", 20);
const TITLE: (&str, u32) = ("sans-serif", 25);

/// A panel's title and axes.
struct Axes<'a> {
    title: &'a str,
    x: Range<f64>,
    x_desc: &'a str,
    y: Range<f64>,
    y_desc: &'a str,
    x_label: &'a dyn Fn(&f64) -> String,
    y_label: &'a dyn Fn(&f64) -> String,
}

/// A number without trailing zeros.
fn plain(x: &f64) -> String {
    format!("{}", (x * 1e4).round() / 1e4)
}

impl Axes<'_> {
    fn draw<'a>(&self, panel: &Panel<'a>) -> Result<Chart<'a>> {
        let mut chart = ChartBuilder::on(panel)
            .caption(self.title, TITLE)
            .margin(12)
            .margin_right(24)
            .x_label_area_size(58)
            .y_label_area_size(96)
            .build_cartesian_2d(self.x.clone(), self.y.clone())?;
        chart
            .configure_mesh()
            .x_desc(self.x_desc)
            .y_desc(self.y_desc)
            .axis_desc_style(LABEL)
            .label_style(TICK)
            .x_label_formatter(self.x_label)
            .y_label_formatter(self.y_label)
            .max_light_lines(0)
            .draw()?;
        Ok(chart)
    }
}

/// How a line is drawn.
#[derive(Clone, Copy)]
struct Line {
    colour: RGBColor,
    dashed: bool,
}

impl Line {
    fn of(variant: Variant) -> Self {
        Self { colour: colour(variant.activation()), dashed: !variant.is_gated() }
    }

    /// Draws a line, with a label in the legend unless it is empty.
    fn draw(self, chart: &mut Chart, points: Vec<(f64, f64)>, label: &str) -> Result<()> {
        let style = self.colour.stroke_width(2);
        let series = match self.dashed {
            true => chart.draw_series(DashedLineSeries::new(points, 7, 5, style))?,
            false => chart.draw_series(LineSeries::new(points, style))?,
        };
        if !label.is_empty() {
            let gap = if self.dashed { 4 } else { 0 };
            series.label(label).legend(move |at| {
                EmptyElement::at(at)
                    + PathElement::new([(0, 0), (12 - gap, 0)], style)
                    + PathElement::new([(12, 0), (24 - gap, 0)], style)
            });
        }
        Ok(())
    }
}

const FLOOR: Line = Line { colour: RGBColor(110, 110, 110), dashed: true };

fn colour(activation: GluActivation) -> RGBColor {
    match activation {
        GluActivation::Relu => RGBColor(213, 94, 0),
        GluActivation::Gelu => RGBColor(0, 114, 178),
        GluActivation::Silu => RGBColor(0, 158, 115),
        GluActivation::Sigmoid => RGBColor(204, 121, 167),
        _ => BLACK,
    }
}

fn legend(chart: &mut Chart, position: SeriesLabelPosition) -> Result<()> {
    chart
        .configure_series_labels()
        .position(position)
        .legend_area_size(32)
        .label_font(TICK)
        .background_style(WHITE.mix(0.9))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    Ok(())
}

/// The rows of a variant.
fn rows_of(table: &Table, variant: Variant) -> Result<Vec<Row<'_>>> {
    let mut rows = vec![];
    for row in table.rows() {
        if row.text("variant")? == variant.name() {
            rows.push(row);
        }
    }
    Ok(rows)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The least and the largest value.
fn extremes(values: impl IntoIterator<Item = f64>) -> (f64, f64) {
    let start = (f64::INFINITY, f64::NEG_INFINITY);
    values.into_iter().fold(start, |(least, most), x| (least.min(x), most.max(x)))
}
