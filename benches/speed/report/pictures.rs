//! Pictures as SVG text: bars with their spread, percentiles, and the time line of a cut.

use plotters::prelude::*;

use crate::Result;
use crate::results::Spread;

const WIDTH: u32 = 900;
const FONT: &str = "sans-serif";

/// A bar: what it is about, who it is of, and how long it is.
pub(crate) struct Bar {
    pub(crate) group: String,
    pub(crate) backend: String,
    pub(crate) spread: Spread,
}

/// One line of a diagram.
pub(crate) struct Line {
    pub(crate) name: String,
    pub(crate) points: Vec<(f64, f64)>,
}

/// The same colour for the same contender in every picture.
fn colour(name: &str) -> RGBColor {
    match name {
        n if n.starts_with("qsd") => RGBColor(214, 110, 36),
        n if n.starts_with("io_uring") || n.starts_with("no snapshot") || n.starts_with("alone") => {
            RGBColor(130, 130, 130)
        }
        n if n.starts_with("halfsilver") || n.starts_with("copy-on-write, power") => RGBColor(38, 84, 160),
        n if n.starts_with("copy-on-write") || n.starts_with("backup") => RGBColor(70, 130, 210),
        n if n.starts_with("write-logging") || n.starts_with("fold") => RGBColor(48, 150, 110),
        n if n.starts_with("write-mirroring") => RGBColor(140, 80, 170),
        n if n.starts_with("mirror") => RGBColor(180, 160, 195),
        _ => RGBColor(90, 160, 170),
    }
}

fn text_error(e: impl std::fmt::Display) -> Box<dyn std::error::Error + Send + Sync> {
    format!("a picture: {e}").into()
}

/// Horizontal bars from 0 to the median, with a line from one quartile to the other; a rule at `rule`.
pub(crate) fn bars(title: &str, unit: &str, bars: &[Bar], rule: Option<f64>) -> Result<String> {
    const LINE: u32 = 18;
    let height = 90 + LINE * u32::try_from(bars.len())?;
    let most = bars.iter().map(|b| b.spread.high.max(b.spread.median)).chain(rule).fold(0.0, f64::max) * 1.08;
    let count = bars.len() as f64;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        area.fill(&WHITE).map_err(text_error)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(title, (FONT, 17))
            .margin(10)
            .margin_left(430)
            .x_label_area_size(38)
            .build_cartesian_2d(0.0..most.max(1e-9), 0.0..count)
            .map_err(text_error)?;
        chart.configure_mesh().disable_y_mesh().disable_y_axis().x_desc(unit).draw().map_err(text_error)?;
        for (i, bar) in bars.iter().enumerate() {
            let (bottom, top) = (count - i as f64 - 0.86, count - i as f64 - 0.14);
            let fill = colour(&bar.backend).filled();
            let Spread { median, low, high, .. } = bar.spread;
            let middle = f64::midpoint(bottom, top);
            chart.draw_series([Rectangle::new([(0.0, bottom), (median, top)], fill)]).map_err(text_error)?;
            let spread = PathElement::new(vec![(low, middle), (high, middle)], BLACK.stroke_width(2));
            chart.draw_series([spread]).map_err(text_error)?;
            let (_, y) = chart.backend_coord(&(0.0, middle));
            let first = i == 0 || bars[i - 1].group != bar.group;
            if first {
                area.draw_text(&bar.group, &(FONT, 12).into_text_style(&area), (8, y - 6)).map_err(text_error)?;
            }
            area.draw_text(&bar.backend, &(FONT, 12).into_text_style(&area), (285, y - 6)).map_err(text_error)?;
        }
        if let Some(rule) = rule {
            let line = PathElement::new(vec![(rule, 0.0), (rule, count)], BLACK.mix(0.6));
            chart.draw_series([line]).map_err(text_error)?;
        }
        area.present().map_err(text_error)?;
    }
    Ok(svg)
}

/// Latencies by their percentiles, on a logarithmic scale.
pub(crate) fn percentiles(title: &str, names: &[&str], lines: &[Line]) -> Result<String> {
    let values = || lines.iter().flat_map(|l| l.points.iter().map(|p| p.1)).filter(|v| *v > 0.0);
    let (least, most) = (values().fold(f64::MAX, f64::min), values().fold(1.0, f64::max));
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, 340)).into_drawing_area();
        area.fill(&WHITE).map_err(text_error)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(title, (FONT, 17))
            .margin(10)
            .x_label_area_size(36)
            .y_label_area_size(70)
            .build_cartesian_2d(-0.2..names.len() as f64 + 0.8, (least * 0.8..most * 1.25).log_scale())
            .map_err(text_error)?;
        let label = |x: &f64| {
            let place = x.round();
            let at = (place - x).abs() < 0.01 && place >= 0.0;
            at.then(|| names.get(place as usize)).flatten().map_or_else(String::new, |n| (*n).to_owned())
        };
        chart
            .configure_mesh()
            .x_labels(names.len() + 2)
            .x_label_formatter(&label)
            .y_desc("microseconds")
            .draw()
            .map_err(text_error)?;
        draw_lines(&mut chart, lines)?;
        area.present().map_err(text_error)?;
    }
    Ok(svg)
}

type LogChart<'a, 'b> = ChartContext<
    'a,
    SVGBackend<'b>,
    Cartesian2d<plotters::coord::types::RangedCoordf64, plotters::coord::combinators::LogCoord<f64>>,
>;

fn draw_lines<'b: 'a, 'a>(chart: &mut LogChart<'a, 'b>, lines: &[Line]) -> Result<()> {
    for line in lines {
        let style = colour(&line.name).stroke_width(2);
        let series = LineSeries::new(line.points.iter().copied(), style).point_size(3);
        let drawn = chart.draw_series(series).map_err(text_error)?;
        drawn.label(&line.name).legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 16, y)], style));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .label_font((FONT, 12))
        .draw()
        .map_err(text_error)
}

/// A value in each slice of time, with the time of the command shaded.
pub(crate) fn time_line(
    title: &str,
    unit: &str,
    name: &str,
    points: &[(f64, f64)],
    command: (f64, f64),
) -> Result<String> {
    let most = points.iter().map(|p| p.1).fold(0.0, f64::max) * 1.1;
    let end = points.last().map_or(1.0, |p| p.0);
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, 230)).into_drawing_area();
        area.fill(&WHITE).map_err(text_error)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(title, (FONT, 15))
            .margin(10)
            .x_label_area_size(36)
            .y_label_area_size(70)
            .build_cartesian_2d(0.0..end, 0.0..most.max(1.0))
            .map_err(text_error)?;
        chart.configure_mesh().x_desc("ms").y_desc(unit).light_line_style(WHITE).draw().map_err(text_error)?;
        // At least two pixels wide, or nobody would see a short command.
        let until = command.1.max(command.0 + end / 400.0);
        let shade = Rectangle::new([(command.0, 0.0), (until, most)], RED.mix(0.35).filled());
        chart.draw_series([shade]).map_err(text_error)?;
        let series = LineSeries::new(points.iter().copied(), colour(name).stroke_width(2));
        chart.draw_series(series).map_err(text_error)?;
        area.present().map_err(text_error)?;
    }
    Ok(svg)
}
