//! Every claim of Pinfold's next to its rivals, on whatever GPU is there.
//!
//! What a row is made of stands in `session`; what is in the report, in `report`; what is measured, in `groups`.

mod clock;
mod compare;
mod groups;
mod html;
mod machine;
mod markdown;
mod memory;
mod placement;
mod report;
mod session;
mod stats;
mod ucx;
mod userfault;
mod vulkan;
mod words;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use anyhow::{Result, bail};
use clap::{Parser, ValueEnum};

use crate::compare::compare;
use crate::machine::Machine;
use crate::report::{Report, VERSION};
use crate::session::{Interrupted, Mode, STOP, Session};
use crate::vulkan::Card;

/// Measures Pinfold against its rivals, on this machine and on one Vulkan device.
///
/// Rows without a device are measured in any case. Nothing fails because something is slow: the report says which goals are met. Only --compare, and
/// what can't be measured at all, end with a status other than 0.
#[derive(Parser)]
#[command(after_long_help = report::SCHEMA)]
struct Cli {
    /// A first look: about half a minute
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// More rounds and larger sizes: about a quarter of an hour
    #[arg(long)]
    full: bool,
    /// Which Vulkan device, as --list numbers them; without it, the first of the fastest kind
    #[arg(long, value_name = "N")]
    device: Option<usize>,
    /// List the Vulkan devices, and measure nothing
    #[arg(long)]
    list: bool,
    /// Only this group; may be given several times
    #[arg(long, value_name = "GROUP", value_enum)]
    only: Vec<Which>,
    /// Write the report as JSON; it is brought up to date after each row
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the report as a page with charts, in one file
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write the report as Markdown
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Say which rows have become worse since an older report, and end with status 3 if any has
    #[arg(long, value_name = "OLD.json")]
    compare: Option<PathBuf>,
    /// Take this report instead of measuring; may be given several times for --markdown, one for each device
    #[arg(long, value_name = "FILE")]
    from: Vec<PathBuf>,
}

/// The groups, in the order in which they run. The index is first because a change of it looks at a record of each thread that has read one, and
/// everything that makes such threads comes later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Which {
    Index,
    Workqueue,
    Watch,
    Invalidate,
    Pin,
    Import,
    Mirror,
    Submit,
    Bandwidth,
    Frame,
    Dmabuf,
    Limits,
}

impl Which {
    fn needs_device(self) -> bool {
        matches!(self, Self::Import | Self::Mirror | Self::Submit | Self::Bandwidth | Self::Frame)
    }
}

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned());
    let result = match arguments.next().as_deref() {
        Some(ucx::ARGUMENT) => ucx::child().map(|()| ExitCode::SUCCESS),
        Some(groups::dmabuf::ARGUMENT) => groups::dmabuf::child(arguments).map(|()| ExitCode::SUCCESS),
        _ => run(&Cli::parse()),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("harness: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<ExitCode> {
    if cli.list {
        vulkan::list()?.iter().enumerate().for_each(|(index, name)| println!("{index}  {name}"));
        return Ok(ExitCode::SUCCESS);
    }
    // Read first: a file that can't be read should be known before the minutes have passed.
    let old = cli.compare.as_deref().map(Report::read).transpose()?;
    let reports = match cli.from.as_slice() {
        [] => vec![measure(cli)?],
        files => files.iter().map(|path| Report::read(path)).collect::<Result<Vec<_>>>()?,
    };
    let [report, ..] = reports.as_slice() else { bail!("there is no report") };
    if let Some(path) = &cli.html {
        report::write_whole(path, &html::page(report))?;
    }
    if let Some(path) = &cli.markdown {
        report::write_whole(path, &markdown::page(&reports))?;
    }
    if cli.from.is_empty() {
        print!("{}", markdown::terminal(report));
    }
    if let Some(old) = old {
        let comparison = compare(&old, report);
        println!("{comparison}");
        if comparison.worse().next().is_some() {
            return Ok(ExitCode::from(3));
        }
    }
    Ok(if report.finished { ExitCode::SUCCESS } else { ExitCode::from(130) })
}

/// Measures what was asked for. An interrupted run is a report too.
fn measure(cli: &Cli) -> Result<Report> {
    // A second Ctrl-C doesn't wait for the sample that is being taken.
    ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("interrupted; the report says what is finished (once more to end at once)");
    })?;
    let mode = match (cli.quick, cli.full) {
        (true, _) => Mode::Quick,
        (_, true) => Mode::Full,
        _ => Mode::Normal,
    };
    let wanted = |which: &Which| cli.only.is_empty() || cli.only.contains(which);
    let groups: Vec<_> = Which::value_variants().iter().copied().filter(wanted).collect();
    // Before anything is pinned.
    let machine = Machine::read();
    let (card, no_card) = match Card::open(cli.device) {
        Ok(card) => (Some(card), None),
        Err(error) if cli.device.is_some() => return Err(error),
        Err(error) => (None, Some(format!("{error:#}"))),
    };
    let report = Report {
        version: VERSION,
        mode: mode.pick("quick", "normal", "full").into(),
        machine,
        device: card.as_ref().map(Card::describe),
        ..Report::default()
    };
    let mut session = Session::new(mode, report, cli.json.clone(), groups.len());
    let mut complete = true;
    for group in groups {
        let value = group.to_possible_value().expect("no group is hidden");
        session.begin(value.get_name());
        let result = match (&card, group.needs_device()) {
            (None, true) => {
                session.absent("", no_card.as_deref().unwrap_or_default());
                Ok(())
            }
            (card, _) => measure_group(&mut session, group, card.as_ref()),
        };
        match result {
            Ok(()) => session.end()?,
            Err(error) if error.is::<Interrupted>() => {
                session.end()?;
                complete = false;
                break;
            }
            // One group that can't be measured says why, and the others go on.
            Err(error) => {
                session.absent("the rest", format!("{error:#}"));
                session.end()?;
            }
        }
    }
    session.report.finished = complete;
    session.end_of_run()?;
    Ok(session.report)
}

fn measure_group(session: &mut Session, group: Which, card: Option<&Card>) -> Result<()> {
    match (group, card) {
        (Which::Import, Some(card)) => groups::import::run(session, card),
        (Which::Mirror, Some(card)) => groups::mirror::run(session, card),
        (Which::Submit, Some(card)) => groups::submit::run(session, card),
        (Which::Bandwidth, Some(card)) => groups::bandwidth::run(session, card),
        (Which::Frame, Some(card)) => groups::frame::run(session, card),
        (Which::Limits, card) => groups::limits::run(session, card),
        (Which::Dmabuf, card) => groups::dmabuf::run(session, card),
        (Which::Invalidate, _) => groups::invalidate::run(session),
        (Which::Index, _) => groups::index::run(session),
        (Which::Workqueue, _) => groups::workqueue::run(session),
        (Which::Watch, _) => groups::watch::run(session),
        (Which::Pin, _) => groups::pin::run(session),
        (_, None) => unreachable!("a group that needs a device isn't run without one"),
    }
}
