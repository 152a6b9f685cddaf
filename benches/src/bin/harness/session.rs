//! Measuring: who takes turns with whom, for how long, and what becomes of the samples.
//!
//! **Problem.** On any machine the same code takes other times a second later: clocks change, neighbours come and go, memory fills. Two medians taken one
//! after the other differ by that as much as by what one wanted to know.
//!
//! **Law.** What is compared is measured in turns: one sample of each contender makes a *round*, and the order is turned round from one round to the next.
//! The ratio is taken within rounds, and its spread is that of the rounds. A *control*, one thing against itself, shows what remains.
//!
//! **Protocol.** Each contender runs once unmeasured; then rounds follow until the time is used up or there are enough. After each row the report is
//! written, so that whatever ends the program leaves a whole report of what is finished.

mod plan;

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use plan::Stat;
pub(crate) use plan::{Contender, Goal, Plan};

use crate::report::{Absent, Better, Curve, Fact, Group, Line, Report, Row};
use crate::stats::{Summary, growth_exponent, median, median_interval, percentile, six_figures};

/// Names a part of a row's `group / name`: our side of such rows does its work twice for each sample. For testing that a slow-down is noticed.
pub(crate) const SLOW: &str = "PINFOLD_HARNESS_SLOW";

/// Set by Ctrl-C.
pub(crate) static STOP: AtomicBool = AtomicBool::new(false);

/// The user has asked for the end. Not a failure: the report says that it isn't finished.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub(crate) struct Interrupted;

/// Medians of a comparison by contender, ours first.
pub(crate) type Medians = Vec<(String, f64)>;

/// How long to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Quick,
    Normal,
    Full,
}

impl Mode {
    /// One of three.
    pub(crate) fn pick<T>(self, quick: T, normal: T, full: T) -> T {
        match self {
            Self::Quick => quick,
            Self::Normal => normal,
            Self::Full => full,
        }
    }
}

/// One run of the program.
pub(crate) struct Session {
    pub(crate) mode: Mode,
    pub(crate) report: Report,
    json: Option<PathBuf>,
    bar: ProgressBar,
    slow: Option<String>,
    group: String,
    begun: Instant,
}

impl Session {
    pub(crate) fn new(mode: Mode, report: Report, json: Option<PathBuf>, groups: usize) -> Self {
        let bar = ProgressBar::with_draw_target(Some(groups as u64), ProgressDrawTarget::stderr());
        let style = ProgressStyle::with_template("{elapsed:>4} [{bar:24}] {pos}/{len} {prefix:<11.bold} {wide_msg}");
        bar.set_style(style.expect("the template is right").progress_chars("━╸ "));
        let slow = std::env::var(SLOW).ok().filter(|text| !text.is_empty());
        Self { mode, report, json, bar, slow, group: String::new(), begun: Instant::now() }
    }

    /// Starts a group of rows.
    pub(crate) fn begin(&mut self, group: &str) {
        self.group = group.into();
        self.begun = Instant::now();
        self.bar.set_prefix(group.to_owned());
        self.report.groups.push(Group { name: group.into(), ..Group::default() });
        if !std::io::stderr().is_terminal() {
            eprintln!("{group}");
        }
    }

    /// Ends it, and writes what there is.
    pub(crate) fn end(&mut self) -> Result<()> {
        let seconds = self.begun.elapsed().as_secs_f64();
        if let Some(group) = self.report.groups.last_mut() {
            group.seconds = (seconds * 10.0).round() / 10.0;
        }
        self.bar.inc(1);
        self.save()
    }

    /// Writes the report for the last time.
    pub(crate) fn end_of_run(&mut self) -> Result<()> {
        self.bar.finish_and_clear();
        self.save()
    }

    /// Says that the group, or a part of it, doesn't apply here.
    pub(crate) fn absent(&mut self, part: &str, why: impl ToString) {
        let absent = Absent { part: part.into(), why: why.to_string() };
        self.bar.suspend(|| {
            let what = if absent.part.is_empty() { "left out".into() } else { format!("{} left out", absent.part) };
            eprintln!("{}: {what}: {}", self.group, absent.why);
        });
        if let Some(group) = self.report.groups.last_mut() {
            group.absent.push(absent);
        }
    }

    pub(crate) fn fact(&mut self, name: impl Into<String>, value: impl ToString) {
        self.report.facts.push(Fact { group: self.group.clone(), name: name.into(), value: value.to_string() });
    }

    /// Makes a comparison: a row for each peer.
    pub(crate) fn measure(&mut self, plan: Plan<'_>) -> Result<Medians> {
        self.bar.set_message(plan.name.clone());
        let Plan {
            name,
            unit,
            better,
            clock,
            placement,
            stat,
            control,
            quiet,
            rounds,
            patient,
            ours,
            ours_goal,
            peers,
        } = plan;
        let slow = self.slow.as_ref().is_some_and(|slow| format!("{} / {name}", self.group).contains(slow.as_str()));
        let (peers, mut goals): (Vec<_>, Vec<_>) = peers.into_iter().unzip();
        let mut contenders = vec![ours];
        contenders.extend(peers);
        let budget = Duration::from_millis(self.mode.pick(150, 600, 1500)) * contenders.len() as u32 / 2;
        let most = rounds.unwrap_or(usize::MAX).min(self.mode.pick(41, 201, 401));
        let least = if patient { most } else { self.mode.pick(5, 7, 11).min(most) };

        for contender in &mut contenders {
            (contender.run)()?;
        }
        let begun = Instant::now();
        let mut values = vec![Vec::new(); contenders.len()];
        let mut per_round = vec![Vec::new(); contenders.len()];
        let mut round = 0;
        // Where a round takes long, on a machine that is busy, three must do.
        let needed = |spent: Duration| if spent > 4 * budget && !patient { least.min(3) } else { least };
        while round < needed(begun.elapsed()) || (round < most && begun.elapsed() < budget) {
            let turns: Vec<_> = match round % 2 {
                0 => (0..contenders.len()).collect(),
                _ => (0..contenders.len()).rev().collect(),
            };
            for turn in turns {
                if STOP.load(Ordering::Relaxed) {
                    return Err(Interrupted.into());
                }
                let mut got = (contenders[turn].run)()?;
                if slow && turn == 0 {
                    let again = (contenders[turn].run)()?;
                    got = twice(&got, &again, better);
                }
                if got.is_empty() {
                    return Err(anyhow!("{} gave no value for {name}", contenders[turn].name));
                }
                per_round[turn].push(value(&mut got, stat));
                values[turn].extend(got);
            }
            round += 1;
        }

        // Of a percentile there is one value a round; of medians all that was seen is the distribution.
        let summaries = values.into_iter().zip(&per_round).map(|(values, rounds)| match stat {
            Stat::Median => Summary::of(values),
            Stat::P99 => Summary::of(rounds.clone()),
        });
        let summaries: Vec<_> = summaries.map(|summary| summary.expect("every round gave a value")).collect();
        let base = Row {
            group: self.group.clone(),
            name,
            unit: unit.into(),
            better,
            rounds: round,
            control,
            clock: clock.into(),
            placement,
            ..Row::default()
        };
        if goals.is_empty() {
            goals.push(None);
        }
        for (index, goal) in goals.into_iter().enumerate() {
            let mut row = base.clone();
            row.set_ours(&summaries[0]);
            if let Some(peer) = summaries.get(index + 1) {
                row.set_peer(&contenders[index + 1].name, peer);
                set_ratio(&mut row, &per_round[0], &per_round[index + 1]);
            }
            let goal = goal.or(ours_goal.filter(|_| index == 0));
            if let Some(Goal { of, value, slack }) = goal {
                (row.goal, row.goal_of, row.goal_slack) = (Some(value), of, slack);
                row.judge();
            }
            if !quiet {
                self.report.rows.push(row);
            }
        }
        self.save()?;
        Ok(contenders
            .iter()
            .zip(&summaries)
            .map(|(contender, summary)| (contender.name.clone(), summary.median))
            .collect())
    }

    /// Adds a curve through the medians of comparisons at several sizes.
    pub(crate) fn curve(&mut self, name: &str, x: &str, unit: &str, points: Vec<(f64, Medians)>) -> Result<()> {
        let mut lines: BTreeMap<(usize, String), Vec<(f64, f64)>> = BTreeMap::new();
        for (at, medians) in points {
            for (order, (name, value)) in medians.into_iter().enumerate() {
                lines.entry((order, name)).or_default().push((at, value));
            }
        }
        let lines = lines.into_iter().filter(|(_, points)| points.len() > 1).map(|((_, name), points)| Line {
            exponent: growth_exponent(&points).map(six_figures),
            name,
            points,
        });
        let curve = Curve {
            group: self.group.clone(),
            name: name.into(),
            x: x.into(),
            unit: unit.into(),
            lines: lines.collect(),
        };
        if !curve.lines.is_empty() {
            self.report.curves.push(curve);
        }
        self.save()
    }

    fn save(&mut self) -> Result<()> {
        self.report.machine.load_at_end = crate::machine::load();
        match &self.json {
            Some(path) => self.report.write(path),
            None => Ok(()),
        }
    }
}

/// The value that stands for a round.
fn value(got: &mut [f64], stat: Stat) -> f64 {
    match stat {
        Stat::Median => median(got),
        Stat::P99 => {
            got.sort_unstable_by(f64::total_cmp);
            percentile(got, 0.99)
        }
    }
}

/// What doing the work twice gives: the sum of times, or half of each speed.
fn twice(first: &[f64], second: &[f64], better: Better) -> Vec<f64> {
    let pairs = first.iter().zip(second);
    match better {
        Better::Lower => pairs.map(|(a, b)| a + b).collect(),
        Better::Higher => pairs.map(|(a, b)| 1.0 / (1.0 / a + 1.0 / b)).collect(),
    }
}

/// A ratio's spread is never narrower than this part of it, on either side: where code and data happen to lie moves a time by a few per cent from one run
/// to the next, and no number of rounds within a run shows it.
const LEAST_SPREAD: f64 = 0.1;

fn set_ratio(row: &mut Row, ours: &[f64], peer: &[f64]) {
    let ratios = ours.iter().zip(peer).filter(|(_, peer)| **peer > 0.0).map(|(ours, peer)| ours / peer);
    let mut ratios: Vec<f64> = ratios.collect();
    if ratios.is_empty() {
        return;
    }
    let known = |value| Some(six_figures(value));
    let (low, high) = median_interval(&ratios);
    ratios.sort_unstable_by(f64::total_cmp);
    let at = |part| percentile(&ratios, part);
    let middle = at(0.5);
    (row.ratio, row.median_low, row.median_high) = (known(middle), known(low), known(high));
    row.ratio_low = known(at(0.05).min(middle * (1.0 - LEAST_SPREAD)));
    row.ratio_high = known(at(0.95).max(middle * (1.0 + LEAST_SPREAD)));
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use super::*;
    use crate::report::tests::{Folder, report};

    fn session(json: Option<PathBuf>) -> Session {
        let mut empty = report(Vec::new());
        empty.finished = false;
        Session::new(Mode::Quick, empty, json, 1)
    }

    #[test]
    fn contenders_take_turns_and_the_order_is_turned_round() {
        let mut session = session(None);
        session.begin("test");
        let seen = RefCell::new(String::new());
        let contender = |name: &'static str| {
            Contender::new(name, || {
                seen.borrow_mut().push_str(name);
                Ok(1.0)
            })
        };
        let plan = Plan::new("turns", "ns", contender("A")).against(contender("B"), None).against(contender("C"), None);
        session.measure(plan.at_most(4)).unwrap();
        assert_eq!(*seen.borrow(), "ABC".to_owned() + "ABCCBA".repeat(2).as_str());
    }

    #[test]
    fn the_ratio_is_taken_within_rounds() {
        // Both contenders become ten times slower half way; the ratio never notices.
        let mut session = session(None);
        session.begin("test");
        let drift = Cell::new(0);
        let slower = |scale: f64| {
            drift.set(drift.get() + 1);
            Ok(if drift.get() > 10 { scale * 10.0 } else { scale })
        };
        let plan = Plan::new("drift", "ns", Contender::new("ours", || slower(3.0)))
            .against(Contender::new("peer", || slower(2.0)), Goal::ratio(1.5));
        session.measure(plan.at_most(10)).unwrap();
        let row = &session.report.rows[0];
        // No round differs from another, so the spread is the least there is.
        assert_eq!((row.ratio, row.ratio_low, row.ratio_high), (Some(1.5), Some(1.35), Some(1.65)));
        assert_eq!((row.median_low, row.median_high), (Some(1.5), Some(1.5)));
        assert_eq!((row.ok, row.rounds), (Some(true), 10));
    }

    #[test]
    fn a_planted_slow_down_does_our_work_twice_and_nobody_elses() {
        let mut session = session(None);
        session.slow = Some("test / find".into());
        session.begin("test");
        for name in ["find it", "change it"] {
            let plan = Plan::new(name, "ns", Contender::new("ours", || Ok(3.0)))
                .against(Contender::new("peer", || Ok(3.0)), None);
            session.measure(plan).unwrap();
        }
        assert_eq!(session.report.rows.iter().map(|row| row.ratio.unwrap()).collect::<Vec<_>>(), [2.0, 1.0]);
        assert_eq!(twice(&[4.0], &[4.0], Better::Higher), [2.0]);
    }

    #[test]
    fn an_interrupted_run_leaves_a_whole_report_of_what_is_finished() {
        let folder = Folder::new("partial");
        let path = folder.0.join("report.json");
        let mut session = session(Some(path.clone()));
        session.begin("test");
        session.measure(Plan::new("first", "ns", Contender::new("ours", || Ok(1.0)))).unwrap();
        let stopped = Contender::new("ours", || Err(Interrupted.into()));
        assert!(session.measure(Plan::new("second", "ns", stopped)).unwrap_err().is::<Interrupted>());
        let read = Report::read(&path).unwrap();
        assert!(!read.finished);
        assert_eq!(read.rows.iter().map(|row| row.name.as_str()).collect::<Vec<_>>(), ["first"]);
    }

    #[test]
    fn a_curve_has_a_line_for_each_contender_with_its_exponent() {
        let mut session = session(None);
        session.begin("test");
        let at = |x: f64| (x, vec![("ours".to_owned(), 5.0), ("peer".to_owned(), 2.0 * x)]);
        session.curve("growth", "objects", "ns", vec![at(1.0), at(10.0), at(100.0)]).unwrap();
        let lines = &session.report.curves.last().expect("the curve").lines;
        assert_eq!(lines.iter().map(|line| line.name.as_str()).collect::<Vec<_>>(), ["ours", "peer"]);
        assert!(lines[0].exponent.unwrap().abs() < 1e-9 && (lines[1].exponent.unwrap() - 1.0).abs() < 1e-9);
    }

    #[test]
    fn a_percentile_is_judged_by_rounds() {
        let mut values = (1..=100).map(f64::from).collect::<Vec<_>>();
        assert_eq!(value(&mut values, Stat::Median), 50.5);
        assert!((value(&mut values, Stat::P99) - 99.01).abs() < 1e-9);
    }
}
