//! Lines and bars as SVG. Every chart can be read without colours: lines differ in their dashes, and a table stands
//! below.

use maud::{Markup, html};

/// Pixels of a chart's drawing, without the margins for its numbers.
const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 220.0;
const LEFT: f64 = 56.0;
const BELOW: f64 = 24.0;
/// More points than twice this are of no use to an eye.
const COLUMNS: usize = 640;
/// Rows of the table below.
const ROWS: usize = 12;

/// One line of a chart.
pub(super) struct Line {
    pub(super) name: String,
    /// Which of the eight looks of lines it has.
    pub(super) look: usize,
    /// x and y; x does not fall.
    pub(super) points: Vec<(f64, f64)>,
}

/// A moment that a chart marks, at an x.
pub(super) struct Mark {
    pub(super) at: f64,
    pub(super) text: String,
}

/// A chart of `lines` with its table; nothing if there is no point.
pub(super) fn lines(title: &str, x_name: &str, lines: &[Line], marks: &[Mark]) -> Markup {
    let drawn: Vec<(&Line, Vec<(f64, f64)>)> = lines
        .iter()
        .map(|line| (line, line.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect()))
        .filter(|(_, points): &(_, Vec<_>)| !points.is_empty())
        .collect();
    let all = || drawn.iter().flat_map(|(_, points)| points.iter().copied());
    let (Some(xs), Some(ys)) = (extent(all().map(|(x, _)| x)), extent(all().map(|(_, y)| y))) else {
        return html! {};
    };
    let (low, high) = padded(ys);
    let x = |value: f64| LEFT + (value - xs.0) / (xs.1 - xs.0).max(f64::MIN_POSITIVE) * WIDTH;
    let y = |value: f64| 8.0 + (high - value) / (high - low) * HEIGHT;
    let path = |points: &[(f64, f64)]| {
        let points = thinned(points, xs);
        points.iter().map(|&(px, py)| format!("{:.1},{:.1}", x(px), y(py))).collect::<Vec<_>>().join(" ")
    };
    html! {
        figure .chart {
            figcaption {
                (title)
                @for (line, _) in &drawn {
                    " " span .key {
                        svg viewBox="0 0 28 8" width="28" height="8" aria-hidden="true" { line x1="0" y1="4" x2="28" y2="4" class={ "s" (line.look % 8) } {} }
                        " " (line.name)
                    }
                }
            }
            svg viewBox={ "0 0 " (LEFT + WIDTH + 8.0) " " (HEIGHT + BELOW + 8.0) } role="img" aria-label={ (title) " by " (x_name) } {
                @for tick in ticks(low, high) {
                    line .grid x1=(LEFT) x2=(LEFT + WIDTH) y1=(y(tick)) y2=(y(tick)) {}
                    text x=(LEFT - 6.0) y=(y(tick) + 4.0) text-anchor="end" { (short(tick)) }
                }
                @for tick in ticks(xs.0, xs.1) {
                    text x=(x(tick)) y=(HEIGHT + BELOW) text-anchor="middle" { (short(tick)) }
                }
                @for mark in marks.iter().filter(|mark| (xs.0..=xs.1).contains(&mark.at)) {
                    line .mark x1=(x(mark.at)) x2=(x(mark.at)) y1="8" y2=(HEIGHT + 8.0) { title { (mark.text) } }
                }
                @for (line, points) in &drawn {
                    @if points.len() == 1 {
                        circle class={ "dot s" (line.look % 8) } cx=(x(points[0].0)) cy=(y(points[0].1)) r="4" { title { (line.name) } }
                    } @else {
                        polyline points=(path(points)) class={ "s" (line.look % 8) } { title { (line.name) } }
                    }
                }
            }
            details id={ "numbers-" (slug(title)) } {
                summary { "Numbers" }
                table {
                    thead { tr { th { (x_name) } th { "line" } th { (title) } } }
                    tbody {
                        @for (line, points) in &drawn {
                            @for (px, py) in some(points) {
                                tr { td { (short(px)) } td { (line.name) } td { (format!("{py:.4}")) } }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// One bar of parts, each with its class and its size.
pub(super) fn bar(label: &str, parts: &[(&str, f64)]) -> Markup {
    let whole: f64 = parts.iter().map(|(_, size)| size).sum();
    let mut at = 0.0;
    let mut placed = Vec::new();
    for &(class, size) in parts {
        let width = if whole > 0.0 { size / whole * 1000.0 } else { 0.0 };
        placed.push((class, at, width));
        at += width;
    }
    html! {
        svg .bar viewBox="0 0 1000 20" preserveAspectRatio="none" role="img" aria-label=(label) {
            rect .none x="0" y="0" width="1000" height="20" {}
            @for (class, x, width) in placed {
                rect class=(class) x=(format!("{x:.2}")) y="0" width=(format!("{width:.2}")) height="20" {}
            }
        }
    }
}

fn extent(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.fold(None, |extent, value| match extent {
        None => Some((value, value)),
        Some((low, high)) => Some((f64::min(low, value), f64::max(high, value))),
    })
}

/// A flat line needs a height, too.
fn padded((low, high): (f64, f64)) -> (f64, f64) {
    if high > low { (low, high) } else { (low - low.abs().max(1.0) * 0.1, high + high.abs().max(1.0) * 0.1) }
}

/// The lowest and the highest point of each column of pixels, so that no spike is lost.
fn thinned(points: &[(f64, f64)], (first, last): (f64, f64)) -> Vec<(f64, f64)> {
    if points.len() <= 2 * COLUMNS {
        return points.to_vec();
    }
    let column = |x: f64| ((x - first) / (last - first).max(f64::MIN_POSITIVE) * (COLUMNS - 1) as f64) as usize;
    let mut thin = Vec::new();
    for chunk in points.chunk_by(|a, b| column(a.0) == column(b.0)) {
        let by_height = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let (low, high) = (chunk.iter().min_by(by_height), chunk.iter().max_by(by_height));
        let mut both: Vec<(f64, f64)> = low.into_iter().chain(high).copied().collect();
        both.sort_by(|a, b| a.0.total_cmp(&b.0));
        both.dedup();
        thin.extend(both);
    }
    thin
}

/// Round numbers between two.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let rough = (high - low) / 5.0;
    if rough <= 0.0 || !rough.is_finite() {
        return vec![low];
    }
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|n| n * power).find(|&step| step >= rough).unwrap_or(rough);
    let first = (low / step).ceil() as i64;
    (first..).map(|n| n as f64 * step).take_while(|&tick| tick <= high * (1.0 + 1e-9)).take(12).collect()
}

/// A number for an axis.
fn short(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if size >= 1e6 => format!("{:.1}M", value / 1e6),
        size if size >= 1e4 => format!("{:.0}k", value / 1e3),
        size if size >= 10.0 => format!("{value:.0}"),
        size if size >= 0.01 => format!("{}", (value * 1000.0).round() / 1000.0),
        _ => format!("{value:.1e}"),
    }
}

/// A few points, evenly spread, with the last one.
fn some(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let step = points.len().div_ceil(ROWS).max(1);
    let mut some: Vec<(f64, f64)> = points.iter().copied().step_by(step).collect();
    if let Some(last) = points.last().filter(|last| some.last() != Some(last)) {
        some.push(*last);
    }
    some
}

fn slug(title: &str) -> String {
    title.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_million_points_become_few_and_keep_their_spikes() {
        let mut points: Vec<(f64, f64)> = (0..1_000_000).map(|i| (f64::from(i), 1.0)).collect();
        points[123_456].1 = 9.0;
        points[123_457].1 = -9.0;
        let thin = thinned(&points, (0.0, 999_999.0));
        assert!(thin.len() <= 2 * COLUMNS, "{}", thin.len());
        assert!(thin.iter().any(|p| p.1 == 9.0) && thin.iter().any(|p| p.1 == -9.0));
        assert!(thin.windows(2).all(|pair| pair[0].0 <= pair[1].0), "in order");
        let text = lines("loss", "step", &[Line { name: "train".into(), look: 0, points }], &[]).into_string();
        assert!(text.len() < 40_000, "{} bytes", text.len());
    }

    #[test]
    fn what_is_no_number_is_not_drawn_and_a_chart_of_nothing_is_nothing() {
        let line = |points: Vec<(f64, f64)>| [Line { name: "x".into(), look: 0, points }];
        assert_eq!(lines("t", "step", &line(vec![]), &[]).into_string(), "");
        assert_eq!(lines("t", "step", &line(vec![(1.0, f64::NAN)]), &[]).into_string(), "");
        let text = lines("t", "step", &line(vec![(1.0, f64::INFINITY), (1.0, 2.0), (2.0, 2.0)]), &[]).into_string();
        assert!(text.contains("<polyline") && !text.contains("NaN") && !text.contains("inf"), "{text}");
    }

    #[test]
    fn axes_have_round_numbers() {
        assert_eq!(ticks(0.0, 1.0), [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]);
        assert_eq!(ticks(3.0, 3.0), [3.0]);
        assert_eq!([0.0, 0.25, 12.3, 12_345.0, 2_500_000.0].map(short), ["0", "0.25", "12", "12k", "2.5M"]);
    }
}
