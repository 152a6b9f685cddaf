//! The charts of costs over sizes, as inline SVG.

use std::fmt::Write;

use super::{COLOURS, escape, extent};
use crate::report::Curve;
use crate::words::{figures, quantity};

/// A cost over a size, both logarithmic.
pub(super) fn chart(out: &mut String, curve: &Curve) {
    const LEFT: f64 = 58.0;
    const RIGHT: f64 = 352.0;
    const TOP: f64 = 12.0;
    const BOTTOM: f64 = 190.0;
    let points = || curve.lines.iter().flat_map(|line| &line.points);
    let (xs, ys) = (Decades::of(points().map(|p| p.0)), Decades::of(points().map(|p| p.1)));
    let place = |(x, y): (f64, f64)| (LEFT + xs.at(x) * (RIGHT - LEFT), BOTTOM - ys.at(y) * (BOTTOM - TOP));
    _ = write!(
        out,
        "<figure><figcaption>{}</figcaption><svg viewBox=\"0 0 360 226\" role=\"img\">",
        escape(&curve.name)
    );
    for tick in ys.ticks() {
        let y = place((1.0, tick)).1;
        _ = write!(
            out,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{RIGHT}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/><text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 6.0,
            y + 3.5,
            quantity(tick, &curve.unit)
        );
    }
    let bytes = curve.x == "bytes";
    for tick in sizes(points().map(|p| p.0), &xs) {
        let x = place((tick, 1.0)).0;
        let label = if bytes { quantity(tick, "bytes") } else { compact(tick) };
        _ = write!(
            out,
            "<line class=\"grid\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{TOP}\" y2=\"{BOTTOM}\"/><text x=\"{x:.1}\" y=\"204\" text-anchor=\"middle\">{label}</text>"
        );
    }
    _ = write!(
        out,
        "<text x=\"{:.0}\" y=\"220\" text-anchor=\"middle\" class=\"what\">{}</text>",
        f64::midpoint(LEFT, RIGHT),
        escape(&curve.x)
    );
    // Ours last, so that it lies on top.
    for (number, line) in curve.lines.iter().enumerate().rev() {
        let colour = number % COLOURS;
        let places: Vec<_> = line.points.iter().map(|&point| place(point)).collect();
        let path: Vec<_> = places.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        _ = write!(out, "<polyline class=\"line c{colour}\" points=\"{}\"/>", path.join(" "));
        for (x, y) in places {
            _ = write!(out, "<circle class=\"dot c{colour}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\"/>");
        }
    }
    out.push_str("</svg><ul class=\"legend\">");
    for (number, line) in curve.lines.iter().enumerate() {
        let exponent = line.exponent.map_or(String::new(), |e| format!(" <em>∝ n<sup>{e:.2}</sup></em>"));
        _ = write!(out, "<li class=\"c{}\">{}{exponent}</li>", number % COLOURS, escape(&line.name));
    }
    out.push_str("</ul></figure>");
}

/// The sizes that were measured, as marks, but for those that would be written over one another.
fn sizes(all: impl Iterator<Item = f64>, axis: &Decades) -> Vec<f64> {
    let mut all: Vec<_> = all.filter(|size| *size > 0.0).collect();
    all.sort_unstable_by(f64::total_cmp);
    let mut kept: Vec<f64> = Vec::new();
    for size in all {
        if kept.last().is_none_or(|&last| axis.at(size) - axis.at(last) > 0.14) {
            kept.push(size);
        }
    }
    kept
}

/// A logarithmic axis of 0 to 1 with a handful of round marks.
struct Decades {
    low: f64,
    high: f64,
}

impl Decades {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let Some((low, high)) = extent(values) else { return Self { low: 0.0, high: 1.0 } };
        let (low, high) = (low.log10(), high.log10());
        let room = ((high - low) * 0.06).max(0.12);
        Self { low: low - room, high: high + room }
    }

    fn at(&self, value: f64) -> f64 {
        if value <= 0.0 { 0.0 } else { (value.log10() - self.low) / (self.high - self.low) }
    }

    /// Powers of ten, or of a thousand where those would be many, or 1-2-5 steps where they would be few.
    fn ticks(&self) -> Vec<f64> {
        let span = self.high - self.low;
        let every = if span > 6.5 {
            3
        } else if span > 4.0 {
            2
        } else {
            1
        };
        let steps: &[f64] = if span < 1.6 { &[1.0, 2.0, 5.0] } else { &[1.0] };
        let powers = (-12..=15).filter(|power| power % every == 0);
        let all = powers.flat_map(|power| steps.iter().map(move |step| step * 10.0_f64.powi(power)));
        all.filter(|tick| (self.low..=self.high).contains(&tick.log10())).collect()
    }
}

/// `1`, `10k`, `1M`
fn compact(value: f64) -> String {
    match value {
        v if v >= 1e9 => format!("{}G", figures(v / 1e9)),
        v if v >= 1e6 => format!("{}M", v / 1e6),
        v if v >= 1e3 => format!("{}k", v / 1e3),
        v => format!("{v}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_a_few_marks_whatever_they_span() {
        for (low, high) in [(1.0, 1.1), (3.0, 40.0), (1.0, 1e5), (1e-3, 1e9), (4096.0, 4.3e9)] {
            let marks = Decades::of([low, high].into_iter()).ticks();
            assert!((1..=7).contains(&marks.len()), "{low} to {high}: {marks:?}");
        }
    }
}
