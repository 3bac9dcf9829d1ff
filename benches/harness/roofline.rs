//! The roofline plot: speed over arithmetic intensity, the two limits of the machine, and the cases
//! below them.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

/// One measured case.
struct Point<'a> {
    dtype: &'a str,
    shape: &'a str,
    /// flop per byte of weights
    intensity: f64,
    gflops: f64,
    peak: f64,
    /// GB/s
    bandwidth: f64,
    candle: f64,
}

const DTYPES: [(&str, RGBColor); 3] =
    [("bf16", RGBColor(0, 114, 178)), ("f16", RGBColor(213, 94, 0)), ("f32", RGBColor(0, 130, 90))];

/// Draws the first kernel of the csv, one chart per dtype.
pub fn draw(path: &Path, csv: &str) -> Result<()> {
    let points = points(csv)?;
    let root = SVGBackend::new(path, (1320, 460)).into_drawing_area();
    let failed = |error| anyhow!("{}: {error}", path.display());
    root.fill(&WHITE).map_err(|error| failed(error.to_string()))?;
    for ((dtype, colour), panel) in DTYPES.into_iter().zip(root.split_evenly((1, 3))) {
        let points: Vec<&Point> = points.iter().filter(|point| point.dtype == dtype).collect();
        if !points.is_empty() {
            draw_panel(&panel, dtype, colour, &points)
                .map_err(|error| failed(error.to_string()))?;
        }
    }
    root.present().map_err(|error| failed(error.to_string()))
}

fn draw_panel<'a>(
    panel: &DrawingArea<SVGBackend<'a>, Shift>,
    dtype: &str,
    colour: RGBColor,
    points: &[&Point],
) -> Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>> {
    let most = |f: fn(&Point) -> f64| points.iter().map(|point| f(point)).fold(0.0, f64::max);
    // The small shape fits in cache. The memory roof is that of the large shapes.
    let memory =
        points.iter().filter(|p| p.shape != "small").map(|p| p.bandwidth).fold(0.0, f64::max);
    let peak = most(|p| p.peak);
    let mut chart = ChartBuilder::on(panel)
        .caption(format!("{dtype}: the block under its limits"), ("sans-serif", 17))
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d((0.3f64..1500.0).log_scale(), (0.5f64..2000.0).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("flop per byte of weights")
        .y_desc("GFLOP/s")
        .light_line_style(WHITE)
        .draw()?;
    let roof = (0..=200)
        .map(|i| 0.3 * 5000f64.powf(f64::from(i) / 200.0))
        .map(|x| (x, peak.min(x * memory)));
    chart
        .draw_series(LineSeries::new(roof, BLACK.stroke_width(2)))?
        .label(format!("{memory:.0} GB/s, {peak:.0} GFLOP/s measured"))
        .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], BLACK.stroke_width(2)));
    for (shape, size) in [("small", 3), ("1b", 5), ("8b", 7)] {
        let of_shape = || points.iter().filter(move |point| point.shape == shape);
        let ours = of_shape().map(|p| Circle::new((p.intensity, p.gflops), size, colour.filled()));
        chart
            .draw_series(ours)?
            .label(format!("candle-swiglu, {shape}"))
            .legend(move |(x, y)| Circle::new((x + 9, y), size, colour.filled()));
        let candle = of_shape()
            .filter(|p| p.candle.is_finite())
            .map(|p| Cross::new((p.intensity, p.candle), size, BLACK.mix(0.5)));
        chart
            .draw_series(candle)?
            .label(format!("candle, {shape}"))
            .legend(move |(x, y)| Cross::new((x + 9, y), size, BLACK.mix(0.5)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.9))
        .border_style(BLACK.mix(0.3))
        .draw()
}

/// The lines of the csv that belong to its first kernel.
fn points(csv: &str) -> Result<Vec<Point<'_>>> {
    let mut lines = csv.lines();
    let columns: Vec<&str> = lines.next().context("a csv has a header")?.split(',').collect();
    let rows: Vec<Vec<&str>> = lines.map(|line| line.split(',').collect()).collect();
    let first = rows.first().context("a csv has cases")?[0];
    rows.iter()
        .filter(|row| row[0] == first)
        .map(|row| {
            let text = |name: &str| {
                let at = columns.iter().position(|column| *column == name);
                at.and_then(|at| row.get(at).copied()).with_context(|| format!("no column {name}"))
            };
            let number = |name: &str| Ok::<f64, anyhow::Error>(text(name)?.parse()?);
            let (dtype, ms, gflops) = (text("dtype")?, number("ms")?, number("gflops")?);
            let bytes = if dtype == "f32" { 4.0 } else { 2.0 };
            let intensity = 2.0 * number("rows")? / bytes;
            let weights = gflops * 1e9 * ms * 1e-3 / intensity;
            Ok(Point {
                dtype,
                shape: text("shape")?,
                intensity,
                gflops,
                peak: number("peak_gflops")?,
                bandwidth: weights / (number("read_ms")? * 1e-3) / 1e9,
                candle: gflops * ms / number("candle_ms")?,
            })
        })
        .collect()
}
