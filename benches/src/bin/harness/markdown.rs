//! The report as text: in a terminal, and as the page that is kept with the project.

use std::fmt::Write;

use crate::report::{GoalOf, Report, Row};
use crate::words::{about, figures, goal, quantity, ratio, reason, verdict};

/// A few lines for whoever waits for the end.
pub(crate) fn terminal(report: &Report) -> String {
    let mut out = String::new();
    let rows: Vec<_> = report.comparisons().collect();
    let width = rows.iter().map(|row| row.name.chars().count()).max().unwrap_or_default().min(60);
    let mut group = "";
    for row in &rows {
        if row.group != group {
            group = &row.group;
            _ = writeln!(out, "\n{group}");
        }
        let against = row.peer.zip(row.peer_name.as_ref());
        let against = against.map(|(peer, name)| format!("{} {name}", quantity(peer, &row.unit))).unwrap_or_default();
        let ratio = ratio(row).map(|ratio| format!("  ratio {ratio}")).unwrap_or_default();
        let goal = goal(row).zip(verdict(row)).map(|(goal, how)| format!("  goal {goal}: {how}")).unwrap_or_default();
        _ = writeln!(out, "  {:width$}  {:>9}  {against}{ratio}{goal}", row.name, quantity(row.ours, &row.unit));
    }
    for fact in &report.facts {
        _ = writeln!(out, "  {}: {}: {}", fact.group, fact.name, fact.value);
    }
    _ = writeln!(out, "\n{}", goals(&[report]));
    if !report.finished {
        _ = writeln!(out, "The run was interrupted: this is what was finished.");
    }
    out
}

fn goals(reports: &[&Report]) -> String {
    let rows = || reports.iter().flat_map(|report| report.comparisons());
    let (met, all) = (rows().filter(|row| row.ok == Some(true)).count(), rows().filter(|row| row.ok.is_some()).count());
    format!("{met} of {all} goals are met.")
}

/// The page with the latest figures, of one or more devices.
pub(crate) fn page(reports: &[Report]) -> String {
    let mut out = String::from(
        "# Figures\n\nMade by `cargo run --release -p pinfold-benches --bin harness -- --markdown`, or by `scripts/bench`; don't edit it. \
         What is on the left of a ratio is ours, and both sides were taken in the same run, in turns (A B B A …): the ratio is the median over the rounds, \
         and in brackets is its spread: the 5th to 95th percentile of the rounds, and at least a tenth on either side. Times are medians. A goal without a unit is one for the ratio.\n",
    );
    for report in reports {
        conditions(&mut out, report);
    }
    _ = writeln!(out, "\n\n{}\n", goals(&reports.iter().collect::<Vec<_>>()));
    short(&mut out, reports);
    for report in reports {
        tables(&mut out, report, reports.len() > 1);
    }
    out
}

fn device(report: &Report) -> String {
    report.device.as_ref().map_or("no Vulkan device".into(), |device| device.name.clone())
}

fn conditions(out: &mut String, report: &Report) {
    let machine = &report.machine;
    _ = write!(out, "\n- **{}**", device(report));
    if let Some(device) = &report.device {
        _ = write!(out, " ({}, {}, Vulkan {})", device.kind, device.driver, device.api_version);
    }
    _ = write!(
        out,
        " on {} processors of {}, {}, Linux {}, in a {} run; load average {:.1} at the start and {:.1} at the end",
        machine.processors,
        machine.model,
        quantity(machine.memory_bytes as f64, "bytes"),
        machine.kernel,
        report.mode,
        machine.load_at_start,
        machine.load_at_end
    );
    if machine.load_at_end.max(machine.load_at_start) > machine.processors as f64 {
        _ = write!(out, " (**more than the processors: the neighbours are in these figures**)");
    }
    let noise = report.noise().map(|noise| {
        format!(
            "; a thing measured against itself spreads to a factor of {} (the middle one of the controls)",
            figures(noise)
        )
    });
    _ = write!(out, "{}.", noise.unwrap_or_default());
    if !report.finished {
        _ = write!(out, " The run was interrupted; this is what was finished.");
    }
}

/// The rows that miss their goals, a line for each, with every device's figure, and what is known of the reason.
fn short(out: &mut String, reports: &[Report]) {
    let mut lines: Vec<(String, String, Option<&str>)> = Vec::new();
    for report in reports {
        for row in report.comparisons().filter(|row| row.ok == Some(false)) {
            let of_ratio = row.goal_of == GoalOf::Ratio;
            let against = row.peer_name.as_ref().filter(|_| of_ratio).map(|name| format!(" against {name}"));
            let what = format!(
                "{} / {}{}, goal {}",
                row.group,
                row.name,
                against.unwrap_or_default(),
                goal(row).unwrap_or_default()
            );
            let value = match ratio(row).filter(|_| of_ratio) {
                Some(ratio) => format!("ratio {ratio}, {}", quantity(row.ours, &row.unit)),
                None => quantity(row.ours, &row.unit),
            };
            let value = if reports.len() > 1 { format!("{value} on {}", device(report)) } else { value };
            match lines.iter_mut().find(|line| line.0 == what) {
                Some(line) => _ = write!(line.1, "; {value}"),
                None => lines.push((what, value, reason(&row.group, &row.name))),
            }
        }
    }
    if lines.is_empty() {
        return;
    }
    _ = writeln!(out, "## Where we are short\n");
    let mut last = None;
    for (what, value, why) in lines {
        let why = why.filter(|&why| last.replace(why) != Some(why)).map(|why| format!(". {why}")).unwrap_or_default();
        _ = writeln!(out, "- {what}: {value}{why}");
    }
    _ = writeln!(out);
}

fn tables(out: &mut String, report: &Report, named: bool) {
    for group in &report.groups {
        let rows: Vec<&Row> = report.rows.iter().filter(|row| row.group == group.name).collect();
        let of = if named { format!(", {}", device(report)) } else { String::new() };
        _ = writeln!(out, "## {}{of}\n\n{}\n", group.name, about(&group.name));
        if !rows.is_empty() {
            _ = writeln!(
                out,
                "| what | ours | against | theirs | ratio | goal | |\n| --- | --- | --- | --- | --- | --- | --- |"
            );
        }
        let mut last = ("", false);
        for row in rows {
            let of = (row.name.as_str(), row.control);
            let name = if std::mem::replace(&mut last, of) == of { "" } else { &row.name };
            let control = if row.control { " (control)" } else { "" };
            let peer = row.peer.map(|peer| quantity(peer, &row.unit)).unwrap_or_default();
            _ = writeln!(
                out,
                "| {name}{control} | {} | {} | {peer} | {} | {} | {} |",
                if name.is_empty() { String::new() } else { quantity(row.ours, &row.unit) },
                row.peer_name.as_deref().unwrap_or_default(),
                ratio(row).unwrap_or_default(),
                goal(row).unwrap_or_default(),
                verdict(row).unwrap_or_default()
            );
        }
        let curves: Vec<_> = report.curves.iter().filter(|curve| curve.group == group.name).collect();
        if !curves.is_empty() {
            _ = writeln!(out, "\nHow it grows (the exponent of the best power: 0 stays, 1 is in proportion):\n");
        }
        for curve in curves {
            let line = |line: &crate::report::Line| {
                let (first, last) = (line.points.first(), line.points.last());
                let ends = first
                    .zip(last)
                    .map(|(a, b)| format!("{} to {}", quantity(a.1, &curve.unit), quantity(b.1, &curve.unit)));
                let exponent = line.exponent.map_or("–".into(), |exponent| format!("{exponent:.2}"));
                format!("{} **{exponent}** ({})", line.name, ends.unwrap_or_default())
            };
            let lines: Vec<_> = curve.lines.iter().map(line).collect();
            let ends = curve.lines.first().and_then(|line| line.points.first().zip(line.points.last()));
            let range = ends.map(|(a, b)| format!("{} to {} {}", a.0, b.0, curve.x)).unwrap_or_default();
            _ = writeln!(out, "- {}, {range}: {}", curve.name, lines.join("; "));
        }
        let facts: Vec<_> = report.facts.iter().filter(|fact| fact.group == group.name).collect();
        if !facts.is_empty() {
            _ = writeln!(out);
        }
        facts.iter().for_each(|fact| _ = writeln!(out, "- {}: {}", fact.name, fact.value));
        if !group.absent.is_empty() {
            _ = writeln!(out);
        }
        for absent in &group.absent {
            let part = if absent.part.is_empty() { "the whole group" } else { &absent.part };
            _ = writeln!(out, "- left out: {part}: {}", absent.why);
        }
        _ = writeln!(out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::{report, row};

    #[test]
    fn the_page_says_what_is_short_and_what_was_left_out() {
        let mut slow = row("find", 2.0);
        slow.goal = Some(1.0);
        slow.judge();
        let page = page(&[report(vec![slow, row("change", 0.5)])]);
        assert!(page.contains("0 of 1 goals are met"), "{page}");
        assert!(
            page.contains("- index / find against BTreeMap, goal ≤ 1.00: ratio 2.00 (1.80–2.20), 100 ns"),
            "{page}"
        );
        assert!(page.contains("left out: UCX rcache: no libucs.so.0 <here>"), "{page}");
        assert!(page.contains("1 to 100 objects: ours **0.10** (10.0 ns to 16.0 ns)"), "{page}");
        let columns = |line: &str| line.matches('|').count();
        let table: Vec<_> = page.lines().filter(|line| line.starts_with('|')).map(columns).collect();
        assert!(table.len() >= 4 && table.iter().all(|&n| n == table[0]), "{table:?}");
    }
}
