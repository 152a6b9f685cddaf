//! Two reports beside each other: which rows agree, and which have become worse.
//!
//! What is compared is the ratio to the peer, never a time: another machine, or the same one on a busier day, changes both sides of a ratio. Each row's own
//! spread says how much it moves by itself.
//!
//! Two rows **agree** if their spreads overlap. A row is **worse** if they don't, and it lies on the bad side. It is worse, too, if its spreads are so wide that
//! they overlap all the same, but the median has moved by more than half, and the 95 % intervals of the two medians lie apart. (Half, because twice the work
//! takes less than twice the time where the second half finds the caches filled by the first.)

use std::fmt;

use crate::report::{Better, Report, Row};

/// A median that moved by this factor, and is known well enough, has moved.
const MOVED: f64 = 1.5;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Agrees,
    Better,
    Worse,
}

/// A row that both reports have.
#[derive(Debug)]
pub(crate) struct Compared {
    pub(crate) key: String,
    pub(crate) old: [f64; 3],
    pub(crate) new: [f64; 3],
    pub(crate) verdict: Verdict,
    /// The spreads overlap.
    pub(crate) overlap: bool,
    pub(crate) control: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Comparison {
    pub(crate) rows: Vec<Compared>,
    /// Rows with a ratio that only the old or only the new report has.
    pub(crate) gone: Vec<String>,
    pub(crate) added: Vec<String>,
    /// Why the two should not be compared row by row, if so.
    pub(crate) caution: Vec<String>,
}

/// low, middle, high.
fn ratio(row: &Row) -> Option<[f64; 3]> {
    Some([row.ratio_low?, row.ratio?, row.ratio_high?])
}

fn overlap(old: [f64; 3], new: [f64; 3]) -> bool {
    new[0] <= old[2] && old[0] <= new[2]
}

fn verdict(old: &Row, new: &Row) -> Option<Verdict> {
    let (before @ [_, old_mid, _], now @ [_, new_mid, _]) = (ratio(old)?, ratio(new)?);
    let apart = !overlap(before, now);
    let factor = f64::max(new_mid / old_mid, old_mid / new_mid);
    let medians_apart = new.median_low? > old.median_high? || new.median_high? < old.median_low?;
    let moved = factor > MOVED && medians_apart;
    if !apart && !moved {
        return Some(Verdict::Agrees);
    }
    let grew = new_mid > old_mid;
    Some(if grew == (new.better == Better::Lower) { Verdict::Worse } else { Verdict::Better })
}

pub(crate) fn compare(old: &Report, new: &Report) -> Comparison {
    let mut result = Comparison::default();
    let with_ratio =
        |report: &Report| -> Vec<Row> { report.rows.iter().filter(|row| ratio(row).is_some()).cloned().collect() };
    let (olds, news) = (with_ratio(old), with_ratio(new));
    for row in &news {
        let key = row.key();
        match olds.iter().find(|other| other.key() == key) {
            None => result.added.push(key),
            Some(other) => {
                let (Some(before), Some(now), Some(verdict)) = (ratio(other), ratio(row), verdict(other, row)) else {
                    continue;
                };
                let overlap = overlap(before, now);
                result.rows.push(Compared { key, old: before, new: now, verdict, overlap, control: row.control });
            }
        }
    }
    // Of a group that wasn't measured this time nothing is gone.
    let measured = |row: &&Row| new.groups.iter().any(|group| group.name == row.group);
    result.gone =
        olds.iter().filter(measured).map(Row::key).filter(|key| !news.iter().any(|row| row.key() == *key)).collect();
    let name = |report: &Report| report.device.as_ref().map_or("no device".to_owned(), |device| device.name.clone());
    let mut differ = |what: &str, before: String, now: String| {
        if before != now {
            result.caution.push(format!("{what}: {before} before, {now} now"));
        }
    };
    differ("device", name(old), name(new));
    differ("mode", old.mode.clone(), new.mode.clone());
    differ("processor", old.machine.model.clone(), new.machine.model.clone());
    differ("kernel", old.machine.kernel.clone(), new.machine.kernel.clone());
    result
}

impl Comparison {
    /// The rows that have become worse; a control can't.
    pub(crate) fn worse(&self) -> impl Iterator<Item = &Compared> {
        self.rows.iter().filter(|row| row.verdict == Verdict::Worse && !row.control)
    }

    pub(crate) fn agreeing(&self) -> usize {
        self.rows.iter().filter(|row| row.overlap).count()
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for caution in &self.caution {
            writeln!(f, "not the same {caution}")?;
        }
        for row in self.rows.iter().filter(|row| row.verdict != Verdict::Agrees) {
            let how = if row.verdict == Verdict::Worse { "WORSE " } else { "better" };
            let ([a, b, c], [x, y, z]) = (row.old, row.new);
            let control = if row.control { " (a control: this is noise)" } else { "" };
            writeln!(
                f,
                "{how}  {}{control}: ratio {b:.3} ({a:.3} to {c:.3}) before, {y:.3} ({x:.3} to {z:.3}) now",
                row.key
            )?;
        }
        for (what, keys) in [("only before", &self.gone), ("only now", &self.added)] {
            if !keys.is_empty() {
                writeln!(f, "{what}: {}", keys.join("; "))?;
            }
        }
        let (agree, all) = (self.agreeing(), self.rows.len());
        write!(f, "{agree} of {all} rows agree within their spread; {} are worse", self.worse().count())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::{Folder, report, row};

    fn after(change: impl Fn(&mut Row)) -> Comparison {
        let old = report(vec![row("find", 0.5), row("change", 2.0)]);
        let mut new = old.clone();
        change(&mut new.rows[0]);
        compare(&old, &new)
    }

    fn scale(row: &mut Row, by: f64) {
        for value in
            [&mut row.ratio, &mut row.ratio_low, &mut row.ratio_high, &mut row.median_low, &mut row.median_high]
        {
            *value = value.map(|value| value * by);
        }
    }

    #[test]
    fn the_same_report_agrees_with_itself() {
        let same = after(|_| {});
        assert_eq!((same.agreeing(), same.rows.len(), same.worse().count()), (2, 2, 0));
        assert!(same.gone.is_empty() && same.added.is_empty() && same.caution.is_empty());
    }

    #[test]
    fn a_row_that_takes_twice_as_long_is_worse_and_named() {
        let slow = after(|row| scale(row, 2.0));
        assert_eq!(slow.worse().map(|row| row.key.as_str()).collect::<Vec<_>>(), ["index / find / BTreeMap"]);
        assert!(slow.to_string().contains("WORSE   index / find / BTreeMap: ratio 0.500"), "{slow}");
    }

    #[test]
    fn twice_as_long_is_seen_through_a_spread_wider_than_that() {
        let wide = |row: &mut Row| {
            (row.ratio_low, row.ratio_high) = (row.ratio.map(|r| r / 3.0), row.ratio.map(|r| r * 3.0));
        };
        let (mut old, mut new) = (row("find", 0.5), row("find", 1.0));
        wide(&mut old);
        wide(&mut new);
        assert_eq!(verdict(&old, &new), Some(Verdict::Worse));
        // But not if nobody knows the medians well enough either.
        (new.median_low, new.median_high) = (Some(0.4), Some(1.4));
        assert_eq!(verdict(&old, &new), Some(Verdict::Agrees));
    }

    /// Figures of three quick runs on two processors of an AMD EPYC: one, another, and one with our side's work done twice. Low end of the spread, of the median's
    /// interval, median, high ends.
    #[test]
    fn recorded_runs_agree_and_recorded_slow_downs_are_caught() {
        type Figures = [f64; 5];
        let recorded: [(&str, [Figures; 3]); 5] = [
            (
                "find among 100,000 / rust-lapper",
                [
                    [0.822914, 1.01157, 1.04401, 1.11884, 1.2675],
                    [0.940405, 1.09662, 1.16326, 1.26621, 1.41091],
                    [1.46254, 1.67583, 1.90162, 2.09228, 2.23341],
                ],
            ),
            (
                "find among 100,000 / iset",
                [
                    [0.16942, 0.200898, 0.268522, 0.306667, 0.344071],
                    [0.176093, 0.207926, 0.262922, 0.291004, 0.331596],
                    [0.304073, 0.341936, 0.45483, 0.51546, 0.566062],
                ],
            ),
            (
                "post and read / ArrayQueue",
                [
                    [0.774435, 1.93993, 2.34275, 2.36214, 3.25325],
                    [1.50083, 2.43263, 2.44282, 2.45105, 2.6871],
                    [4.22695, 4.54014, 4.69661, 4.74974, 6.1514],
                ],
            ),
            (
                "post and read / flume",
                [
                    [0.476105, 0.845168, 1.34217, 1.43712, 1.99499],
                    [1.26163, 1.39216, 1.40181, 1.4076, 1.60711],
                    [1.58344, 2.55017, 2.60416, 2.61609, 3.31128],
                ],
            ),
            (
                "post and read / packet pipe",
                [
                    [0.0527516, 0.0603808, 0.0617166, 0.0656236, 0.0890757],
                    [0.0590638, 0.0653985, 0.0664039, 0.0674985, 0.0756745],
                    [0.0990525, 0.107644, 0.110058, 0.113497, 0.135829],
                ],
            ),
        ];
        for (name, runs) in recorded {
            let [first, second, twice] = runs.map(|[low, median_low, middle, median_high, high]| Row {
                ratio: Some(middle),
                ratio_low: Some(low),
                ratio_high: Some(high),
                median_low: Some(median_low),
                median_high: Some(median_high),
                ..row("recorded", middle)
            });
            assert_eq!(verdict(&first, &second), Some(Verdict::Agrees), "{name}, nothing changed");
            assert_eq!(verdict(&first, &twice), Some(Verdict::Worse), "{name}, twice the work");
        }
    }

    #[test]
    fn faster_is_better_and_more_is_better_where_more_is_wanted() {
        assert_eq!(after(|row| scale(row, 0.5)).rows[0].verdict, Verdict::Better);
        let more = after(|row| {
            scale(row, 0.5);
            row.better = Better::Higher;
        });
        assert_eq!(more.rows[0].verdict, Verdict::Worse);
    }

    #[test]
    fn what_moves_within_its_spread_agrees() {
        assert_eq!(after(|row| scale(row, 1.15)).worse().count(), 0);
        assert_eq!(after(|row| scale(row, 0.9)).agreeing(), 2);
    }

    #[test]
    fn a_control_that_moves_is_noise_and_no_regression() {
        let noisy = after(|row| {
            scale(row, 2.0);
            row.control = true;
        });
        assert_eq!((noisy.worse().count(), noisy.agreeing()), (0, 1));
    }

    #[test]
    fn rows_that_come_and_go_and_other_devices_are_named() {
        let old = report(vec![row("find", 0.5)]);
        let mut new = report(vec![row("change", 2.0)]);
        new.device.as_mut().unwrap().name = "another".into();
        let comparison = compare(&old, &new);
        assert_eq!(comparison.gone, ["index / find / BTreeMap"]);
        assert_eq!(comparison.added, ["index / change / BTreeMap"]);
        assert!(comparison.caution[0].contains("another now"), "{:?}", comparison.caution);
    }

    #[test]
    fn reports_are_compared_from_files_as_the_program_does() {
        let folder = Folder::new("compare");
        let (before, now) = (folder.0.join("old.json"), folder.0.join("new.json"));
        let mut slow = row("find", 0.5);
        scale(&mut slow, 2.0);
        report(vec![row("find", 0.5)]).write(&before).unwrap();
        report(vec![slow]).write(&now).unwrap();
        let comparison = compare(&Report::read(&before).unwrap(), &Report::read(&now).unwrap());
        assert_eq!(comparison.worse().count(), 1);
    }
}
