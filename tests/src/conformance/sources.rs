//! The comments in the tests, and who runs what.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

/// A test that answers a row.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Answer {
    /// Folder and program, and the name of the test in it.
    pub test: String,
    /// The devices it runs on.
    pub devices: Vec<&'static str>,
}

/// What the sources of the tests say.
#[derive(Debug, Default)]
pub struct Sources {
    /// By row, as `suite/name`.
    pub answers: BTreeMap<String, Vec<Answer>>,
    /// Comments that nobody can follow: the file, the line, and what is wrong.
    pub errors: Vec<String>,
}

/// Names for people. `fake` and `dma` are those of `for_devices!`.
fn device(word: &str) -> Option<&'static str> {
    match word {
        "fake" => Some("scripted"),
        "dma" => Some("DMA"),
        "vulkan" => Some("Vulkan drivers"),
        _ => None,
    }
}

/// A behaviour in `tests/tests/userptr`, by name: the programs that run it, and on what.
type Runs = BTreeMap<String, Vec<(String, Vec<&'static str>)>>;

impl Sources {
    /// Reads all tests below the root of the workspace.
    ///
    /// # Errors
    /// Those of reading the files.
    pub fn read(root: &Path) -> io::Result<Self> {
        let mut sources = Self::default();
        let mut runs = Runs::new();
        let (mut programs, mut shared) = (Vec::new(), Vec::new());
        for folder in ["tests", "vulkan", "core", "invalidate", "demos"] {
            for file in rust_files(&root.join(folder).join("tests"))? {
                let name = file.trim_end_matches(".rs").to_owned();
                let text = fs::read_to_string(root.join(folder).join("tests").join(&file))?;
                if folder == "tests" && name.contains('/') {
                    shared.push((name, text));
                } else {
                    lists(&name, &text, &mut runs);
                    programs.push((format!("{folder}/{name}"), text));
                }
            }
        }
        for (program, text) in &programs {
            sources.take(program, text, |test, said| {
                let devices = if said.is_empty() && (program.contains("/vk_") || program.starts_with("vulkan/")) {
                    vec!["Vulkan drivers"]
                } else {
                    said.to_vec()
                };
                vec![Answer { test: format!("{program}::{test}"), devices }]
            });
        }
        for (module, text) in &shared {
            sources.take(module, text, |behaviour, _| {
                let answer = |(program, devices): &(String, Vec<_>)| Answer {
                    test: format!("tests/{program}::{behaviour}"),
                    devices: devices.clone(),
                };
                runs.get(behaviour).into_iter().flatten().map(answer).collect()
            });
        }
        for answers in sources.answers.values_mut() {
            answers.sort();
            answers.dedup();
        }
        Ok(sources)
    }

    /// Takes the comments of one file: `// rows: suite/name; suite/name`, or `// rows (dma vulkan): ...`, above a function.
    fn take(&mut self, file: &str, text: &str, answers: impl Fn(&str, &[&'static str]) -> Vec<Answer>) {
        let mut pending: Option<(Vec<String>, Vec<&'static str>, usize)> = None;
        for (number, line) in text.lines().map(str::trim).enumerate().map(|(index, line)| (index + 1, line)) {
            if let Some(comment) = line.strip_prefix("// rows") {
                let (said, names) = comment.split_once(':').unwrap_or(("", ""));
                let said: Vec<_> = said.trim_matches([' ', '(', ')']).split_whitespace().map(device).collect();
                if names.trim().is_empty() || said.contains(&None) {
                    self.errors.push(format!("{file}:{number}: not a list of rows: {line}"));
                }
                // Names have blanks in them; what separates them is a semicolon.
                let names = names.split(';').map(|name| name.trim().to_owned());
                let entry = pending.get_or_insert_with(|| (Vec::new(), Vec::new(), number));
                entry.0.extend(names.filter(|name| !name.is_empty()));
                entry.1.extend(said.into_iter().flatten());
                continue;
            }
            let function = line.strip_prefix("pub fn ").or_else(|| line.strip_prefix("fn "));
            let Some(function) = function else { continue };
            let name = function.split(['(', '<']).next().unwrap_or(function);
            let Some((rows, said, at)) = pending.take() else { continue };
            let answers = answers(name, &said);
            if answers.is_empty() {
                self.errors.push(format!("{file}:{at}: no program runs {name}"));
            }
            for row in rows {
                self.answers.entry(row).or_default().extend(answers.iter().cloned());
            }
        }
        if let Some((.., at)) = pending {
            self.errors.push(format!("{file}:{at}: no function follows"));
        }
    }
}

/// The lists of `for_devices!` and `on_the_driver!` in a program.
fn lists(program: &str, text: &str, runs: &mut Runs) {
    let mut devices = Vec::new();
    for line in text.lines().map(str::trim) {
        if let Some(list) = line.strip_prefix("for_devices!([") {
            let list = list.split(']').next().unwrap_or(list);
            devices = list.split_whitespace().filter_map(device).collect();
        } else if line.starts_with("on_the_driver! {") {
            devices = vec!["Vulkan drivers"];
        } else if line == "});" || line == "}" && !line.starts_with("    ") && devices != ["Vulkan drivers"] {
            devices.clear();
        } else if !devices.is_empty()
            && !line.is_empty()
            && line.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
        {
            runs.entry(line.to_owned()).or_default().push((program.to_owned(), devices.clone()));
        }
    }
}

/// The names of the source files in a folder and the folders in it, in order.
fn rust_files(folder: &Path) -> io::Result<Vec<String>> {
    let mut files = Vec::new();
    let Ok(entries) = fs::read_dir(folder) else { return Ok(files) };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type()?.is_dir() {
            files.extend(rust_files(&entry.path())?.into_iter().map(|file| format!("{name}/{file}")));
        } else if name.ends_with(".rs") {
            files.push(name);
        }
    }
    files.sort();
    Ok(files)
}
