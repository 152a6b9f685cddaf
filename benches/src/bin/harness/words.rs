//! How values are said, on a page and in a table.

use crate::report::{GoalOf, Row};

/// Three figures that matter, in the size of unit in which they are easiest read: `412 ns`, `1.68 ms`, `35.2 GB/s`.
pub(crate) fn quantity(value: f64, unit: &str) -> String {
    let scale: &[(&str, f64)] = match unit {
        "ns" => &[("ns", 1.0), ("µs", 1e3), ("ms", 1e6), ("s", 1e9)],
        "µs" => &[("ns", 1e-3), ("µs", 1.0), ("ms", 1e3), ("s", 1e6)],
        "ms" => &[("ns", 1e-6), ("µs", 1e-3), ("ms", 1.0), ("s", 1e3)],
        "bytes" => &[("B", 1.0), ("KiB", 1024.0), ("MiB", 1_048_576.0), ("GiB", 1_073_741_824.0)],
        _ => return format!("{} {unit}", figures(value)),
    };
    let fits = scale.iter().rev().find(|(_, factor)| value.abs() >= *factor).unwrap_or(&scale[0]);
    format!("{} {}", figures(value / fits.1), fits.0)
}

/// Three figures that matter.
pub(crate) fn figures(value: f64) -> String {
    let size = value.abs();
    if !value.is_finite() {
        "–".into()
    } else if size >= 1e6 || (size > 0.0 && size < 0.001) {
        format!("{value:.2e}")
    } else if size >= 100.0 || value == 0.0 {
        format!("{value:.0}")
    } else if size >= 10.0 {
        format!("{value:.1}")
    } else if size >= 1.0 {
        format!("{value:.2}")
    } else if size >= 0.01 {
        format!("{value:.3}")
    } else {
        format!("{value:.4}")
    }
}

/// `0.48 (0.44–0.53)`
pub(crate) fn ratio(row: &Row) -> Option<String> {
    let (middle, low, high) = (row.ratio?, row.ratio_low?, row.ratio_high?);
    Some(format!("{} ({}–{})", figures(middle), figures(low), figures(high)))
}

/// `≤ 1.10`, `≤ 50 ns`, `≤ 1.10 + 2 µs`
pub(crate) fn goal(row: &Row) -> Option<String> {
    let goal = row.goal?;
    let sign = match row.better {
        crate::report::Better::Lower => "≤",
        crate::report::Better::Higher => "≥",
    };
    let slack =
        if row.goal_slack > 0.0 { format!(" + {}", quantity(row.goal_slack, &row.unit)) } else { String::new() };
    Some(match row.goal_of {
        GoalOf::Ratio => format!("{sign} {}{slack}", figures(goal)),
        GoalOf::Ours => format!("{sign} {}", quantity(goal, &row.unit)),
    })
}

/// `passes` or `short`.
pub(crate) fn verdict(row: &Row) -> Option<&'static str> {
    row.ok.map(|ok| if ok { "passes" } else { "short" })
}

/// What a group is about, in a sentence or two.
pub(crate) fn about(group: &str) -> &'static str {
    match group {
        "import" => {
            "Giving memory the program already has to the device: through Pinfold (registered, watched, imported), by hand (the bare driver calls), and by a staged copy."
        }
        "pin" => {
            "The same on a device that takes its pages, as a GPU does and a CPU driver doesn't: fixed buffers of an io_uring, registered through Pinfold and by the bare call."
        }
        "mirror" => {
            "Where a device can't import, a mirror is a copy that is kept fresh. A refresh should cost what has changed, not what there is."
        }
        "invalidate" => {
            "What being watched costs the program: its own munmap and madvise, first touches, and calls that have nothing to do with it. The floor is a bare userfaultfd on the same processors."
        }
        "index" => "Which objects touch these bytes? Asked by threads that may not allocate, while others insert.",
        "workqueue" => "Handing work to another thread, two workers each.",
        "watch" => "The ring of notes that says what happened to which object: 127-byte records, room for 512.",
        "submit" => "What a lease adds to a submit.",
        "bandwidth" => {
            "What the GPU itself gets: one kernel reads a buffer, one writes it, in the program's own memory and in the device's. Times are the GPU's."
        }
        "frame" => {
            "A frame of a model, drawn from where its vertices lie: in the program's memory, or copied to the device's."
        }
        "limits" => "How many, how big, until which error.",
        "dmabuf" => {
            "Memory handed to another process: as a dma-buf, without a copy, or through a pipe or shared memory, with one."
        }
        _ => "",
    }
}

/// What is known of why a row is as it is: what ours does that the peer doesn't.
pub(crate) fn reason(group: &str, name: &str) -> Option<&'static str> {
    let known = [
        (
            "import",
            "acquire, cold",
            "Ours also makes every page present, watches the range and looks at its mappings before and after, so it grows with the pages; by hand it is the driver's calls alone, and on a CPU driver those pin nothing",
        ),
        (
            "pin",
            "acquire, cold",
            "Ours also looks whether every page is there, which grows with the pages, watches the range and looks at its mappings before and after",
        ),
        (
            "import",
            "register",
            "An object is some 400 bytes with counts of its own, and the table it is entered into is copied where it changes, so that readers need no lock",
        ),
        (
            "mirror",
            "refresh",
            "A refresh asks the kernel which pages were written and lets the kernel copy them, as a plain copy would crash when the memory vanishes; what is protected again faults at the next write",
        ),
        (
            "submit",
            "submit's own work",
            "A submit allocates once and counts in each shard, whatever the number of objects: few objects have more of it each",
        ),
        (
            "invalidate",
            "watched",
            "The watcher closes the gate, waits for what is under way and tells the objects; the bare one reads and throws away",
        ),
        (
            "invalidate",
            "watch a page of watched memory",
            "A target is entered into the index, and the kernel is asked once whether the page is watched still, as some calls end a watch without an event",
        ),
        (
            "invalidate",
            "one munmap over",
            "The caller waits for the kernel to free as many pages, which is the plain munmap beside it; what the library adds to that is the row without pages",
        ),
        ("workqueue", "empty items", "Every item passes the pool's one lock twice"),
        (
            "watch",
            "post and read",
            "A post also walks the list of watches, and looks at filter, policy and bell; a read takes the reader's turn, and looks for losses, removals and who waits. Both queues take two locked instructions",
        ),
    ];
    known.iter().find(|(of, begins, _)| *of == group && name.starts_with(begins)).map(|(_, _, why)| *why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_come_in_the_unit_that_reads_best() {
        assert_eq!(quantity(412.3, "ns"), "412 ns");
        assert_eq!(quantity(1_681.0, "µs"), "1.68 ms");
        assert_eq!(quantity(0.25, "µs"), "250 ns");
        assert_eq!(quantity(35.21, "GB/s"), "35.2 GB/s");
        assert_eq!(quantity(268_435_456.0, "bytes"), "256 MiB");
        assert_eq!(
            [0.0, 0.0004, 0.004, 0.25, 99.94, 1e7].map(figures),
            ["0", "4.00e-4", "0.0040", "0.250", "99.9", "1.00e7"]
        );
    }

    #[test]
    fn goals_say_what_they_are_of() {
        let mut row = Row { unit: "µs".into(), goal: Some(1.1), goal_slack: 2.0, ..Row::default() };
        assert_eq!(goal(&row).unwrap(), "≤ 1.10 + 2.00 µs");
        (row.goal, row.goal_of, row.goal_slack) = (Some(30_000.0), GoalOf::Ours, 0.0);
        assert_eq!(goal(&row).unwrap(), "≤ 30.0 ms");
    }
}
