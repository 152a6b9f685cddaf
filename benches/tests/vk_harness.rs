//! The harness as people start it: one small group, a report in every form, and one report held against another.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// A folder that is gone with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("pinfold-vk-harness-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a temporary folder");
        Self(path)
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn harness(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_harness")).args(arguments).output().expect("the harness starts")
}

fn json(path: &str) -> Value {
    let text = std::fs::read_to_string(Path::new(path)).expect("a report");
    serde_json::from_str(&text).expect("JSON")
}

#[test]
fn a_run_on_a_driver_leaves_whole_reports_that_can_be_compared() {
    let folder = Folder::new("whole");
    let (first, page, text, second) =
        (folder.file("1.json"), folder.file("1.html"), folder.file("1.md"), folder.file("2.json"));
    let run = ["--quick", "--only", "submit", "--json"];
    let output = harness(&[&run[..], &[&first, "--html", &page, "--markdown", &text]].concat());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");

    let report = json(&first);
    assert_eq!((&report["version"], &report["finished"], &report["mode"]), (&1.into(), &true.into(), &"quick".into()));
    if report["device"].is_null() {
        println!("SKIP a_run_on_a_driver_leaves_whole_reports_that_can_be_compared: no Vulkan device: {said}");
        return;
    }
    let rows = report["rows"].as_array().expect("rows");
    assert!(rows.len() > 4, "{} rows; {said}", rows.len());
    for row in rows {
        let number = |field: &str| row[field].as_f64().unwrap_or_else(|| panic!("{field} of {row}"));
        assert!(
            number("ours") > 0.0 && number("ratio_low") <= number("ratio") && number("ratio") <= number("ratio_high"),
            "{row}"
        );
    }
    assert!(rows.iter().any(|row| row["control"] == true), "no control row");
    assert!(std::fs::read_to_string(&page).expect("a page").contains("</html>"));
    assert!(std::fs::read_to_string(&text).expect("Markdown").contains("# Figures"));

    // Nothing is measured again: the report against itself, and against one in which a row was twice as fast.
    let compare = |old: &str| harness(&["--from", &first, "--compare", old]);
    assert!(compare(&first).status.success());
    let mut faster = report.clone();
    let row =
        faster["rows"].as_array_mut().expect("rows").iter_mut().find(|row| row["control"] == false).expect("a row");
    let name = row["name"].as_str().expect("a name").to_owned();
    for field in ["ratio", "ratio_low", "ratio_high", "median_low", "median_high"] {
        row[field] = (row[field].as_f64().expect("a number") / 1e3).into();
    }
    std::fs::write(&second, faster.to_string()).expect("a second report");
    let output = compare(&second);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains(&format!("WORSE   submit / {name}")) && output.status.code() == Some(3), "{said}");
}
