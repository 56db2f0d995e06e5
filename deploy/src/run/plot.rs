//! Curves for a terminal: characters at their places, a letter for each curve.

/// One curve: its letter and its points, x and y.
pub(super) type Curve = (char, Vec<(f64, f64)>);

/// Characters across and down that fit into every terminal.
pub(super) const SIZE: (usize, usize) = (64, 12);

/// What lies under several letters at once.
const SEVERAL: char = '*';

/// A chart of so many characters, with its numbers at the margins; nothing if there is no point to draw.
pub(super) fn chart(title: &str, curves: &[Curve], (width, height): (usize, usize)) -> Vec<String> {
    let points = || curves.iter().flat_map(|(_, points)| points).filter(|(x, y)| x.is_finite() && y.is_finite());
    let extent = |values: &mut dyn Iterator<Item = f64>| {
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)))
    };
    let (left, right) = extent(&mut points().map(|point| point.0));
    let (low, high) = extent(&mut points().map(|point| point.1));
    if points().next().is_none() || width < 2 || height < 2 {
        return Vec::new();
    }
    let place = |value: f64, (from, to): (f64, f64), cells: usize| {
        let share = if to > from { (value - from) / (to - from) } else { 0.0 };
        (share * (cells - 1) as f64).round() as usize
    };
    let mut cells = vec![vec![' '; width]; height];
    for (letter, points) in curves {
        for &(x, y) in points.iter().filter(|(x, y)| x.is_finite() && y.is_finite()) {
            let cell = &mut cells[height - 1 - place(y, (low, high), height)][place(x, (left, right), width)];
            *cell = if *cell == ' ' || *cell == *letter { *letter } else { SEVERAL };
        }
    }
    let number = |value: f64| format!("{value:.3}");
    let margin = number(low).len().max(number(high).len());
    let mut lines = vec![title.to_owned()];
    for (n, row) in cells.iter().enumerate() {
        let label = match n {
            0 => number(high),
            n if n == height - 1 => number(low),
            _ => String::new(),
        };
        lines.push(format!("{label:>margin$} |{}", row.iter().collect::<String>()).trim_end().to_owned());
    }
    let (first, last) = (left.to_string(), right.to_string());
    lines.push(format!("{:margin$} +{}", "", "-".repeat(width)));
    lines.push(format!("{:margin$}  {first}{last:>rest$}", "", rest = width.saturating_sub(first.len())));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_stand_at_their_places_and_numbers_at_the_margins() {
        let curves =
            [('t', vec![(0.0, 2.0), (5.0, 1.0), (10.0, 0.0)]), ('v', vec![(0.0, 2.0), (10.0, 1.0), (5.0, f64::NAN)])];
        let lines = chart("loss", &curves, (11, 3));
        assert_eq!(
            lines,
            [
                "loss",
                "2.000 |*",
                "      |     t    v",
                "0.000 |          t",
                "      +-----------",
                "       0        10",
            ]
        );
        assert!(chart("loss", &[('t', vec![(1.0, f64::NAN)])], (10, 3)).is_empty());
        assert_eq!(chart("flat", &[('t', vec![(1.0, 0.5)])], (4, 2))[2], "0.500 |t");
    }
}
