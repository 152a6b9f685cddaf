//! The report, as it is written to JSON and read back. `SCHEMA` explains every field; whoever changes one changes [`VERSION`].

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::machine::Machine;
use crate::stats::{Summary, median};

/// Of the schema. Reports of another version can't be compared.
pub(crate) const VERSION: u32 = 1;

/// The part of `--help` that explains the JSON.
pub(crate) const SCHEMA: &str = "\
The JSON (version 1):
  version       1
  finished      false if the run was interrupted: what is there is whole all the same
  mode          quick, normal or full
  machine       processors, model, memory_bytes, kernel, page_size, load_at_start, load_at_end (1-minute load averages), clock
  device        index, name, kind, driver, api_version, import_alignment, extensions, heaps (bytes, budget, used, device_local), memory_types (heap, flags),
                timestamps (nanoseconds a tick, or null); null if there is no Vulkan device
  groups        name, seconds, absent: why the group, or a part of it (`part`), did not apply here
  rows          one comparison each:
    group, name, unit       what was measured; `better` is lower or higher
    ours                    our median; ours_p10, ours_p90, ours_n; ours_quantiles: 41 points of the distribution from smallest to largest
    peer, peer_name         the median and the name of what it is measured against, null if nothing; peer_p10, peer_p90, peer_n, peer_quantiles
    ratio                   median over the rounds of ours / peer, both taken in the same round, in turns
    ratio_low, ratio_high   its spread: 5th and 95th percentile of the rounds, and a tenth of the ratio on either side if that is wider, as where
                            code and data happen to lie moves it by that from one run to the next
    median_low, median_high 95 % interval of that median (bootstrap); rounds: how many
    goal                    what the ratio (`goal_of` = ratio) or our median (`goal_of` = ours) should reach; `goal_slack` may be taken off ours first;
                            null if none was set
    ok                      whether the median reaches it; null without a goal
    control                 the row is a thing against itself: what it shows is noise
    clock                   wall, cpu (the thread's own processor time) or gpu (timestamps of the queue)
    placement               which processors the threads were on, where they were told
  curves        how a cost grows: name, x, unit, lines (name, exponent of the best power of x, points)
  facts         what was found out that is no comparison: group, name, value";

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) version: u32,
    pub(crate) finished: bool,
    pub(crate) mode: String,
    pub(crate) machine: Machine,
    pub(crate) device: Option<Device>,
    pub(crate) groups: Vec<Group>,
    pub(crate) rows: Vec<Row>,
    pub(crate) curves: Vec<Curve>,
    pub(crate) facts: Vec<Fact>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Device {
    pub(crate) index: usize,
    pub(crate) name: String,
    pub(crate) kind: String,
    pub(crate) driver: String,
    pub(crate) api_version: String,
    pub(crate) import_alignment: u64,
    pub(crate) extensions: Vec<String>,
    pub(crate) heaps: Vec<Heap>,
    pub(crate) memory_types: Vec<MemoryType>,
    pub(crate) timestamps: Option<f64>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Heap {
    pub(crate) bytes: u64,
    pub(crate) budget: Option<u64>,
    pub(crate) used: Option<u64>,
    pub(crate) device_local: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct MemoryType {
    pub(crate) heap: u32,
    pub(crate) flags: String,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Group {
    pub(crate) name: String,
    pub(crate) seconds: f64,
    pub(crate) absent: Vec<Absent>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Absent {
    /// Empty: the whole group.
    pub(crate) part: String,
    pub(crate) why: String,
}

/// Which of two values one wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Better {
    #[default]
    Lower,
    Higher,
}

/// What a goal is set for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum GoalOf {
    #[default]
    Ratio,
    Ours,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Row {
    pub(crate) group: String,
    pub(crate) name: String,
    pub(crate) unit: String,
    pub(crate) better: Better,
    pub(crate) ours: f64,
    pub(crate) ours_p10: f64,
    pub(crate) ours_p90: f64,
    pub(crate) ours_n: usize,
    pub(crate) ours_quantiles: Vec<f64>,
    pub(crate) peer: Option<f64>,
    pub(crate) peer_p10: Option<f64>,
    pub(crate) peer_p90: Option<f64>,
    pub(crate) peer_n: Option<usize>,
    pub(crate) peer_quantiles: Vec<f64>,
    pub(crate) peer_name: Option<String>,
    pub(crate) ratio: Option<f64>,
    pub(crate) ratio_low: Option<f64>,
    pub(crate) ratio_high: Option<f64>,
    pub(crate) median_low: Option<f64>,
    pub(crate) median_high: Option<f64>,
    pub(crate) rounds: usize,
    pub(crate) goal: Option<f64>,
    pub(crate) goal_of: GoalOf,
    pub(crate) goal_slack: f64,
    pub(crate) ok: Option<bool>,
    pub(crate) control: bool,
    pub(crate) clock: String,
    pub(crate) placement: String,
}

impl Row {
    /// What it is called where rows of one report are told apart.
    pub(crate) fn key(&self) -> String {
        match &self.peer_name {
            Some(peer) => format!("{} / {} / {peer}", self.group, self.name),
            None => format!("{} / {}", self.group, self.name),
        }
    }

    pub(crate) fn set_ours(&mut self, summary: &Summary) {
        (self.ours, self.ours_p10, self.ours_p90) = (summary.median, summary.p10, summary.p90);
        self.ours_n = summary.n;
        self.ours_quantiles.clone_from(&summary.quantiles);
    }

    pub(crate) fn set_peer(&mut self, name: &str, summary: &Summary) {
        self.peer_name = Some(name.to_owned());
        (self.peer, self.peer_p10, self.peer_p90) = (Some(summary.median), Some(summary.p10), Some(summary.p90));
        self.peer_n = Some(summary.n);
        self.peer_quantiles.clone_from(&summary.quantiles);
    }

    /// Whether `value` is on the good side of `limit`.
    pub(crate) fn reaches(&self, value: f64, limit: f64) -> bool {
        match self.better {
            Better::Lower => value <= limit,
            Better::Higher => value >= limit,
        }
    }

    /// Judges the row by its goal.
    pub(crate) fn judge(&mut self) {
        let Some(goal) = self.goal else { return };
        let value = match self.goal_of {
            GoalOf::Ours => Some(self.ours - self.goal_slack),
            GoalOf::Ratio if self.goal_slack == 0.0 => self.ratio,
            GoalOf::Ratio => self.peer.map(|peer| (self.ours - self.goal_slack) / peer),
        };
        self.ok = value.map(|value| self.reaches(value, goal));
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Curve {
    pub(crate) group: String,
    pub(crate) name: String,
    /// What grows.
    pub(crate) x: String,
    /// Of what it costs.
    pub(crate) unit: String,
    pub(crate) lines: Vec<Line>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Line {
    pub(crate) name: String,
    pub(crate) exponent: Option<f64>,
    pub(crate) points: Vec<(f64, f64)>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Fact {
    pub(crate) group: String,
    pub(crate) name: String,
    pub(crate) value: String,
}

impl Report {
    /// Reads one back.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("can't read {}", path.display()))?;
        let found: serde_json::Value =
            serde_json::from_str(&text).with_context(|| format!("{} is no JSON", path.display()))?;
        match found.get("version").and_then(serde_json::Value::as_u64) {
            Some(version) if version == u64::from(VERSION) => {}
            Some(version) => bail!(
                "{} is of version {version}, this program reads version {VERSION}; run the older report's harness again",
                path.display()
            ),
            None => bail!("{} is no report of the harness: it has no version", path.display()),
        }
        serde_json::from_value(found).with_context(|| format!("{} is no whole report", path.display()))
    }

    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        write_whole(path, &text)
    }

    /// The rows that say something about us, not about noise.
    pub(crate) fn comparisons(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(|row| !row.control)
    }

    /// How far apart a thing was from itself at the ends of the spread, as a factor, in the middle one of the control rows.
    pub(crate) fn noise(&self) -> Option<f64> {
        let controls = self.rows.iter().filter(|row| row.control);
        let of = |row: &Row| Some(f64::max(1.0 / row.ratio_low?, row.ratio_high?));
        let factors: Vec<_> = controls.filter_map(of).collect();
        (!factors.is_empty()).then(|| median(&factors))
    }
}

/// Writes beside the file and moves it there, so that whoever reads finds the old text or the new one, never half of it.
pub(crate) fn write_whole(path: &Path, text: &str) -> Result<()> {
    let name = path.file_name().with_context(|| format!("{} names no file", path.display()))?;
    let mut beside = name.to_owned();
    beside.push(format!(".{}", std::process::id()));
    let beside = path.with_file_name(beside);
    let write = || -> Result<()> {
        let mut file = File::create(&beside)?;
        file.write_all(text.as_bytes())?;
        fs::rename(&beside, path)?;
        Ok(())
    };
    write().inspect_err(|_| _ = fs::remove_file(&beside)).with_context(|| format!("can't write {}", path.display()))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A row with a ratio and a spread of a tenth on either side.
    pub(crate) fn row(name: &str, ratio: f64) -> Row {
        let mut row = Row { group: "index".into(), name: name.into(), unit: "ns".into(), rounds: 30, ..Row::default() };
        let samples = |scale: f64| (90..=110).map(|n| f64::from(n) / 100.0 * scale).collect::<Vec<_>>();
        row.set_ours(&Summary::of(samples(50.0 * ratio)).unwrap());
        row.set_peer("BTreeMap", &Summary::of(samples(50.0)).unwrap());
        (row.ratio, row.ratio_low, row.ratio_high) = (Some(ratio), Some(ratio * 0.9), Some(ratio * 1.1));
        (row.median_low, row.median_high) = (Some(ratio * 0.98), Some(ratio * 1.02));
        row
    }

    pub(crate) fn report(rows: Vec<Row>) -> Report {
        let line = Line { name: "ours".into(), exponent: Some(0.1), points: vec![(1.0, 10.0), (100.0, 16.0)] };
        Report {
            version: VERSION,
            finished: true,
            mode: "quick".into(),
            machine: Machine::read(),
            device: Some(Device {
                name: "A <GPU> & more".into(),
                heaps: vec![Heap { bytes: 1 << 30, ..Heap::default() }],
                ..Device::default()
            }),
            groups: vec![Group {
                name: "index".into(),
                seconds: 1.5,
                absent: vec![Absent { part: "UCX rcache".into(), why: "no libucs.so.0 <here>".into() }],
            }],
            rows,
            curves: vec![Curve {
                group: "index".into(),
                name: "find".into(),
                x: "objects".into(),
                unit: "ns".into(),
                lines: vec![line],
            }],
            facts: vec![Fact { group: "limits".into(), name: "objects".into(), value: "10 & more".into() }],
        }
    }

    #[test]
    fn a_report_comes_back_from_json_as_it_was() {
        let folder = Folder::new("round-trip");
        let path = folder.0.join("report.json");
        let mut rows = vec![row("find", 0.5), row("change", 2.0)];
        rows.push(Row { name: "nothing to compare with".into(), ours: 3.0, ..Row::default() });
        let report = report(rows);
        report.write(&path).unwrap();
        assert_eq!(Report::read(&path).unwrap(), report);
        // Only the report is left behind, and it replaces what was there.
        report.write(&path).unwrap();
        assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 1);
    }

    #[test]
    fn every_field_of_the_json_is_explained() {
        fn names(value: &serde_json::Value, out: &mut Vec<String>) {
            match value {
                serde_json::Value::Object(map) => map.iter().for_each(|(name, value)| {
                    out.push(name.clone());
                    names(value, out);
                }),
                serde_json::Value::Array(all) => all.iter().for_each(|value| names(value, out)),
                _ => {}
            }
        }
        let mut report = report(vec![row("find", 0.5)]);
        report.device.as_mut().unwrap().memory_types = vec![MemoryType::default()];
        let mut found = Vec::new();
        names(&serde_json::to_value(report).unwrap(), &mut found);
        let words: Vec<_> = SCHEMA.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
        let missing: Vec<_> = found.iter().filter(|name| !words.contains(&name.as_str())).collect();
        assert!(missing.is_empty(), "not in SCHEMA: {missing:?}");
    }

    #[test]
    fn other_versions_and_other_files_are_refused_with_a_reason() {
        let folder = Folder::new("versions");
        let path = folder.0.join("report.json");
        let message = |text: &str| {
            fs::write(&path, text).unwrap();
            format!("{:#}", Report::read(&path).unwrap_err())
        };
        assert!(message(r#"{"version": 99}"#).contains("version 99"));
        assert!(message("{}").contains("no version"));
        assert!(message("not at all").contains("no JSON"));
        assert!(message(r#"{"version": 1}"#).contains("no whole report"));
    }

    #[test]
    fn a_goal_is_met_on_its_good_side_and_slack_comes_off_first() {
        let judged = |change: &dyn Fn(&mut Row)| {
            let mut row = row("find", 1.2); // 60 against 50
            change(&mut row);
            row.judge();
            row.ok
        };
        assert_eq!(judged(&|_| {}), None);
        assert_eq!(judged(&|row| row.goal = Some(1.2)), Some(true));
        assert_eq!(judged(&|row| row.goal = Some(1.1)), Some(false));
        assert_eq!(judged(&|row| (row.goal, row.goal_slack) = (Some(1.1), 5.0)), Some(true));
        assert_eq!(judged(&|row| (row.goal, row.better) = (Some(1.1), Better::Higher)), Some(true));
        assert_eq!(judged(&|row| (row.goal, row.goal_of) = (Some(59.0), GoalOf::Ours)), Some(false));
    }

    /// A folder of its own for a test, gone with it.
    pub(crate) struct Folder(pub(crate) std::path::PathBuf);

    impl Folder {
        pub(crate) fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("pinfold-harness-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}
