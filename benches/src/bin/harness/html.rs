//! The report as one page that needs nothing else: no script, no font, no network. Charts are inline SVG; what must be read is text, so that a phone can wrap it.

mod chart;

use std::fmt::Write;

use chart::chart;

use crate::report::{GoalOf, Report, Row};
use crate::words::{about, figures, goal, quantity, ratio, verdict};

const STYLE: &str = include_str!("report.css");
/// Of the lines of a chart, in order: ours first.
const COLOURS: usize = 7;

pub(crate) fn page(report: &Report) -> String {
    let mut out = String::new();
    let device = report.device.as_ref().map_or("No Vulkan device".into(), |device| escape(&device.name));
    _ = write!(
        out,
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/>\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/><title>Pinfold on {device}</title>\
         <style>{STYLE}</style></head><body><main>"
    );
    header(&mut out, report, &device);
    short(&mut out, report);
    for group in &report.groups {
        let rows: Vec<&Row> = report.rows.iter().filter(|row| row.group == group.name).collect();
        _ = write!(
            out,
            "<section id=\"{0}\"><h2>{0}</h2><p class=\"about\">{1}</p>",
            escape(&group.name),
            escape(about(&group.name))
        );
        for absent in &group.absent {
            let part = if absent.part.is_empty() { "Not measured here" } else { &absent.part };
            _ = write!(out, "<p class=\"absent\"><b>{}</b> – {}</p>", escape(part), escape(&absent.why));
        }
        // Rows of one name are one measurement against several.
        let mut rest = rows.as_slice();
        while let Some(first) = rest.first() {
            let many = rest.iter().take_while(|row| row.name == first.name && row.control == first.control).count();
            comparison(&mut out, &rest[..many]);
            rest = &rest[many..];
        }
        let curves: Vec<_> = report.curves.iter().filter(|curve| curve.group == group.name).collect();
        if !curves.is_empty() {
            out.push_str("<div class=\"curves\">");
            curves.iter().for_each(|curve| chart(&mut out, curve));
            out.push_str("</div>");
        }
        facts(&mut out, report, &group.name);
        out.push_str("</section>");
    }
    footer(&mut out, report);
    out.push_str("</main></body></html>\n");
    out
}

fn header(out: &mut String, report: &Report, device: &str) {
    let machine = &report.machine;
    let about = report.device.as_ref().map_or(String::new(), |device| {
        format!("{} · {} · Vulkan {}", escape(&device.kind), escape(&device.driver), escape(&device.api_version))
    });
    _ = write!(out, "<header><p class=\"brand\">Pinfold harness</p><h1>{device}</h1><p class=\"sub\">{about}</p>");
    if !report.finished {
        out.push_str("<p class=\"banner\">This run was interrupted. What follows is what was finished.</p>");
    }
    let busy = machine.load_at_start.max(machine.load_at_end) > machine.processors as f64;
    if busy {
        _ = write!(
            out,
            "<p class=\"banner\">The machine was busy: load average {:.1} on {} processors. Read ratios, not times.</p>",
            machine.load_at_start.max(machine.load_at_end),
            machine.processors
        );
    }
    let with_goal = || report.comparisons().filter(|row| row.ok.is_some());
    let met = with_goal().filter(|row| row.ok == Some(true)).count();
    let noise = report.noise().map_or("–".into(), |noise| format!("{}×", figures(noise)));
    let tiles = [
        (format!("{met}<small> of {}</small>", with_goal().count()), "goals met"),
        (report.comparisons().count().to_string(), "comparisons"),
        (noise, "a thing from itself: noise"),
        (format!("{:.1}", machine.load_at_end), "load average"),
    ];
    out.push_str("<div class=\"tiles\">");
    for (value, what) in tiles {
        _ = write!(out, "<div class=\"tile\"><b>{value}</b><span>{what}</span></div>");
    }
    out.push_str("</div><nav>");
    for group in &report.groups {
        _ = write!(out, "<a href=\"#{0}\">{0}</a>", escape(&group.name));
    }
    out.push_str("</nav></header>");
}

fn short(out: &mut String, report: &Report) {
    let rows: Vec<_> = report.comparisons().filter(|row| row.ok == Some(false)).collect();
    if rows.is_empty() {
        return;
    }
    out.push_str("<details class=\"short\"><summary>Where we are short</summary><ul>");
    for row in rows {
        let (goal, ratio) =
            (goal(row).unwrap_or_default(), ratio(row).map(|ratio| format!(", ratio {ratio}")).unwrap_or_default());
        let against = row.peer_name.as_ref().map(|name| format!(" against {}", escape(name))).unwrap_or_default();
        _ = write!(
            out,
            "<li><a href=\"#{}\">{} / {}</a>{against}: {}{ratio}; goal {goal}</li>",
            escape(&row.group),
            escape(&row.group),
            escape(&row.name),
            quantity(row.ours, &row.unit)
        );
    }
    out.push_str("</ul></details>");
}

/// Ours and all it was measured against, on one axis.
fn comparison(out: &mut String, rows: &[&Row]) {
    let first = rows[0];
    let judged: Vec<_> = rows.iter().filter_map(|row| row.ok).collect();
    let badge = if first.control {
        "<span class=\"badge\">control</span>"
    } else if judged.is_empty() {
        ""
    } else if judged.iter().all(|&ok| ok) {
        "<span class=\"badge good\">passes</span>"
    } else {
        "<span class=\"badge bad\">short</span>"
    };
    let more = if first.better == crate::report::Better::Higher { ", more is better" } else { "" };
    _ = write!(
        out,
        "<article><h3>{} {badge}</h3><p class=\"small\">{} rounds, {} clock{more}{}</p>",
        escape(&first.name),
        first.rounds,
        escape(&first.clock),
        if first.placement.is_empty() { String::new() } else { format!(" · {}", escape(&first.placement)) }
    );
    let axis = Axis::of(rows.iter().flat_map(|row| row.ours_quantiles.iter().chain(&row.peer_quantiles)).copied());
    let own = rows.iter().find(|row| row.goal.is_some() && row.goal_of == GoalOf::Ours);
    let note = own.and_then(|row| goal_note(row)).unwrap_or_default();
    strip(out, &axis, "ours", "ours", &first.ours_quantiles, &quantity(first.ours, &first.unit), &note);
    for row in rows.iter().filter(|row| row.peer.is_some()) {
        let name = row.peer_name.as_deref().unwrap_or_default();
        let goal = goal_note(row).filter(|_| row.goal_of == GoalOf::Ratio).unwrap_or_default();
        let note = ratio(row).map(|ratio| format!("ratio {ratio} {goal}")).unwrap_or_default();
        let value = quantity(row.peer.unwrap_or_default(), &row.unit);
        strip(out, &axis, "peer", name, &row.peer_quantiles, &value, &note);
    }
    let (low, high) = axis.ends();
    _ = write!(
        out,
        "<p class=\"axis\"><span>{}</span><span>{}</span></p></article>",
        quantity(low, &first.unit),
        quantity(high, &first.unit)
    );
}

fn goal_note(row: &Row) -> Option<String> {
    let (goal, how) = goal(row).zip(verdict(row))?;
    Some(format!("<i class=\"{how}\">goal {}: {how}</i>", escape(&goal)))
}

/// One contender's distribution: from pale to strong the middle 95, 80 and 50 per cent, and the median as a mark.
fn strip(out: &mut String, axis: &Axis, class: &str, name: &str, quantiles: &[f64], value: &str, note: &str) {
    _ = write!(
        out,
        "<div class=\"strip {class}\"><span class=\"name\">{}</span><span class=\"value\">{value}</span>",
        escape(name)
    );
    out.push_str("<svg viewBox=\"0 0 1000 18\" preserveAspectRatio=\"none\" role=\"img\" aria-hidden=\"true\">");
    out.push_str("<rect class=\"rail\" x=\"0\" y=\"8.5\" width=\"1000\" height=\"1\"/>");
    // Of 41 points every step is 2.5 %.
    for (class, low, high, y, height) in
        [("p95", 1, 39, 4.0, 10.0), ("p80", 4, 36, 4.0, 10.0), ("p50", 10, 30, 4.0, 10.0), ("mid", 20, 20, 0.0, 18.0)]
    {
        if let (Some(&low), Some(&high)) = (quantiles.get(low), quantiles.get(high)) {
            let (from, to) = (axis.at(low), axis.at(high));
            let width = f64::max(to - from, if class == "mid" { 5.0 } else { 2.0 });
            _ = write!(
                out,
                "<rect class=\"{class}\" x=\"{from:.1}\" y=\"{y}\" width=\"{width:.1}\" height=\"{height}\"/>"
            );
        }
    }
    out.push_str("</svg>");
    if !note.is_empty() {
        _ = write!(out, "<span class=\"note\">{note}</span>");
    }
    out.push_str("</div>");
}

/// The smallest and the largest of what can be on a logarithmic axis.
fn extent(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let positive = values.filter(|value| *value > 0.0 && value.is_finite());
    let (low, high) =
        positive.fold((f64::INFINITY, 0.0), |(low, high): (f64, f64), value| (low.min(value), high.max(value)));
    (low <= high).then_some((low, high))
}

/// A logarithmic axis of 0 to 1000.
struct Axis {
    low: f64,
    high: f64,
}

impl Axis {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let Some((low, high)) = extent(values) else { return Self { low: 0.0, high: 1.0 } };
        // Room beside the ends; never less than a factor of two, so that noise doesn't look like a difference.
        let (low, high) = (low.ln() - 0.05, high.ln() + 0.05);
        let widen = (2.0_f64.ln() - (high - low)).max(0.0) / 2.0;
        Self { low: low - widen, high: high + widen }
    }

    fn at(&self, value: f64) -> f64 {
        if value <= 0.0 { 0.0 } else { ((value.ln() - self.low) / (self.high - self.low) * 1000.0).clamp(0.0, 995.0) }
    }

    fn ends(&self) -> (f64, f64) {
        (self.low.exp(), self.high.exp())
    }
}

fn facts(out: &mut String, report: &Report, group: &str) {
    let facts: Vec<_> = report.facts.iter().filter(|fact| fact.group == group).collect();
    if facts.is_empty() {
        return;
    }
    out.push_str("<dl>");
    for fact in facts {
        _ = write!(out, "<dt>{}</dt><dd>{}</dd>", escape(&fact.name), escape(&fact.value));
    }
    out.push_str("</dl>");
}

fn footer(out: &mut String, report: &Report) {
    let machine = &report.machine;
    _ = write!(
        out,
        "<footer><h2>Machine</h2><dl><dt>processors</dt><dd>{} × {}</dd><dt>memory</dt><dd>{}</dd><dt>kernel</dt><dd>Linux {}, pages of {}, clock {}</dd>\
         <dt>load average</dt><dd>{:.2} at the start, {:.2} at the end</dd><dt>run</dt><dd>{}</dd>",
        machine.processors,
        escape(&machine.model),
        quantity(machine.memory_bytes as f64, "bytes"),
        escape(&machine.kernel),
        quantity(machine.page_size as f64, "bytes"),
        escape(&machine.clock),
        machine.load_at_start,
        machine.load_at_end,
        escape(&report.mode)
    );
    if let Some(device) = &report.device {
        for (number, heap) in device.heaps.iter().enumerate() {
            let budget =
                heap.budget.map(|budget| format!(", budget {}", quantity(budget as f64, "bytes"))).unwrap_or_default();
            let kind = if heap.device_local { ", device-local" } else { "" };
            _ = write!(out, "<dt>heap {number}</dt><dd>{}{budget}{kind}</dd>", quantity(heap.bytes as f64, "bytes"));
        }
        for (number, kind) in device.memory_types.iter().enumerate() {
            _ = write!(out, "<dt>memory type {number}</dt><dd>heap {}: {}</dd>", kind.heap, escape(&kind.flags));
        }
        _ = write!(out, "<dt>extensions</dt><dd>{}</dd>", escape(&device.extensions.join(", ")));
    }
    out.push_str(
        "</dl><p class=\"small\">A strip shows a distribution on a logarithmic axis: pale, middle and strong are the middle 95, 80 and 50 per cent, the mark \
         is the median. A ratio is ours divided by theirs, taken within rounds in which both took turns: the median, and in brackets the 5th to 95th percentile of the rounds, at least a tenth on either side. \
         A control is a thing against itself: what it shows is noise. Exponents are those of the power of n that fits best.</p></footer>",
    );
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::{report, row};
    use crate::report::{Better, Line};

    /// Checks that every element is closed where it was opened, and that nothing but escaped text lies between. Returns the names.
    fn elements(page: &str) -> Vec<String> {
        let (mut open, mut seen): (Vec<String>, Vec<String>) = (Vec::new(), Vec::new());
        let body = page.strip_prefix("<!DOCTYPE html>\n").expect("a page says what it is");
        let mut parts = body.split('<');
        assert_eq!(parts.next(), Some(""), "text before the first element");
        for part in parts {
            let (tag, text) = part.split_once('>').unwrap_or_else(|| panic!("not closed: {part}"));
            let within_style = tag == "style";
            assert!(within_style || !text.contains('>'), "a bare > in {text}");
            for entity in text.split('&').skip(1) {
                assert!(
                    ["amp;", "lt;", "gt;", "quot;"].iter().any(|known| entity.starts_with(known)),
                    "a bare & in {text}"
                );
            }
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop().as_deref(), Some(name), "closed in another order than opened");
                continue;
            }
            assert_eq!(tag.matches('"').count() % 2, 0, "quotes of {tag}");
            let name: String = tag.chars().take_while(char::is_ascii_alphanumeric).collect();
            seen.push(name.clone());
            if !tag.ends_with('/') {
                open.push(name);
            }
        }
        assert!(open.is_empty(), "left open: {open:?}");
        seen
    }

    #[test]
    fn the_page_is_well_formed_and_needs_nothing_else() {
        let mut short = row("a <b> & \"c\"", 3.0);
        short.goal = Some(1.0);
        short.judge();
        let alone = Row {
            name: "alone".into(),
            group: "index".into(),
            ok: Some(true),
            goal: Some(4.0),
            ours: 3.0,
            ..Row::default()
        };
        let control = Row { control: true, ..row("itself", 1.0) };
        let mut full = report(vec![short, control, alone, row("find", 0.5)]);
        full.finished = false;
        full.machine.load_at_end = 1e3;
        let text = page(&full);
        let seen = elements(&text);
        assert_eq!(seen.iter().filter(|name| *name == "article").count(), 4);
        for forbidden in ["http:", "https:", "<script", "url(", "NaN", "inf\""] {
            assert!(!text.contains(forbidden), "{forbidden} in the page");
        }
        assert!(text.contains("a &lt;b&gt; &amp; &quot;c&quot;"));
    }

    #[test]
    fn an_empty_report_and_odd_values_make_a_page_too() {
        let mut empty = report(vec![Row {
            ours: f64::NAN,
            ours_quantiles: vec![0.0; 41],
            group: "index".into(),
            ..Row::default()
        }]);
        empty.device = None;
        empty.curves[0].lines =
            vec![Line { name: "zero".into(), exponent: None, points: vec![(0.0, 0.0), (5.0, 0.0)] }];
        let text = page(&empty);
        elements(&text);
        assert!(!text.contains("NaN"), "{text}");
        elements(&page(&Report::default()));
    }

    #[test]
    fn every_contender_has_a_strip_and_lies_in_order_on_the_axis() {
        let axis = Axis::of([10.0, 20.0, 1000.0].into_iter());
        assert!(axis.at(10.0) < axis.at(20.0) && axis.at(20.0) < axis.at(1000.0) && axis.at(1000.0) < 1000.0);
        let mut second = row("find", 0.25);
        second.peer_name = Some("iset".into());
        second.better = Better::Higher;
        let text = page(&report(vec![row("find", 0.5), second]));
        assert_eq!(text.matches("class=\"strip").count(), 3); // ours once
        // A goal is said once, where what it is set for stands.
        let with_goal = |of: GoalOf| {
            let mut row = row("find", 0.5);
            (row.goal, row.goal_of) = (Some(1.0), of);
            row.judge();
            page(&report(vec![row])).split_once("<article>").expect("a comparison").1.to_owned()
        };
        for (of, before, strip) in
            [(GoalOf::Ours, "strip ours", "strip peer"), (GoalOf::Ratio, "strip peer", "class=\"axis\"")]
        {
            let text = with_goal(of);
            let (goal, from, to) =
                (text.find(">goal ").unwrap(), text.find(before).unwrap(), text.find(strip).unwrap());
            assert!(text.matches(">goal ").count() == 1 && from < goal && goal < to, "{text}");
        }
    }
}
