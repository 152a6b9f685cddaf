//! Shows what a running Pinfold program does with its memory: live in the terminal, as JSON lines, or once.
//!
//! ```text
//! PINFOLD_WATCH=1 ./engine &          # or PINFOLD_WATCH=/some/where.sock
//! watch $!                            # or: watch /some/where.sock
//! ```

mod json;
mod model;
mod view;

use std::io::{self, ErrorKind, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use pinfold_core::watch::share::{AttachError, Remote};
use pinfold_core::watch::{ReadError, Record, records};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyModifiers};

use model::Model;

/// How long a program may take to tell what there is.
const PRESENT_TIME: Duration = Duration::from_secs(10);
/// How often the screen is drawn.
const FRAME: Duration = Duration::from_millis(100);

#[derive(Parser)]
#[command(name = "watch", about = "Shows what a running Pinfold program does with its memory")]
struct Arguments {
    /// Process id of the program, or the path of its socket.
    program: String,
    /// Print records as JSON, one a line; with --once, the snapshot as one JSON object.
    #[arg(long)]
    json: bool,
    /// Print how things stand, and end.
    #[arg(long)]
    once: bool,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let remote = attach(&arguments.program)?;
    match (arguments.once, arguments.json) {
        (true, json) => once(&remote, json),
        (false, true) => stream(&remote),
        (false, false) => live(&remote),
    }
}

fn attach(program: &str) -> Result<Remote, AttachError> {
    match program.parse() {
        Ok(process) => Remote::attach_process(process),
        Err(_) => Remote::attach(Path::new(program)),
    }
}

/// What a wait for records ended with.
enum Got {
    Records(Vec<Record>),
    Nothing,
    End,
}

fn wait(remote: &Remote, limit: Option<Duration>) -> Result<Got> {
    let mut bytes = [0; 65536];
    match remote.read_timeout(&mut bytes, limit) {
        Ok(0) => Ok(Got::End),
        Ok(len) => Ok(Got::Records(records(&bytes[..len]).collect::<Result<_, _>>().context("the program's records")?)),
        Err(ReadError::Empty) => Ok(Got::Nothing),
        Err(error) => Err(error.into()),
    }
}

fn once(remote: &Remote, json: bool) -> Result<()> {
    let start = Instant::now();
    let mut model = Model::new(remote.process(), start);
    while !model.is_complete() {
        let left = PRESENT_TIME.saturating_sub(start.elapsed());
        match wait(remote, Some(left))? {
            Got::Records(records) => records.iter().for_each(|record| model.take(record, Instant::now())),
            Got::Nothing if left.is_zero() => bail!("the program has not told what there is within {PRESENT_TIME:?}"),
            Got::Nothing => {}
            Got::End => break,
        }
    }
    model.set_lost(remote.lost());
    let text = if json { json::snapshot(&model).to_string() } else { view::text(&model) };
    print_lines(&text)?;
    Ok(())
}

fn stream(remote: &Remote) -> Result<()> {
    let start = Instant::now();
    loop {
        match wait(remote, None)? {
            Got::Records(records) => {
                let now = start.elapsed();
                let lines = records.iter().map(|record| json::line(record, now).to_string());
                if !print_lines(&lines.collect::<Vec<_>>().join("\n"))? {
                    return Ok(());
                }
            }
            Got::Nothing => {}
            Got::End => {
                eprintln!("program {} has ended", remote.process());
                return Ok(());
            }
        }
    }
}

/// Prints; answers false if nobody reads any more.
fn print_lines(text: &str) -> io::Result<bool> {
    match writeln!(io::stdout().lock(), "{text}") {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        done => done.map(|()| true),
    }
}

fn live(remote: &Remote) -> Result<()> {
    let mut model = Model::new(remote.process(), Instant::now());
    let mut terminal = ratatui::init();
    let ended = watch(remote, &mut model, &mut terminal);
    ratatui::restore();
    if ended? {
        println!("program {} has ended\n{}", remote.process(), view::text(&model));
    }
    Ok(())
}

/// Draws until the user has enough (false) or the program ends (true).
fn watch(remote: &Remote, model: &mut Model, terminal: &mut ratatui::DefaultTerminal) -> Result<bool> {
    loop {
        let frame = Instant::now();
        // As many as there are, but not for ever: a program that posts faster than we read must not freeze the screen.
        while frame.elapsed() < FRAME / 2 {
            match wait(remote, Some(Duration::ZERO))? {
                Got::Records(records) => records.iter().for_each(|record| model.take(record, frame)),
                Got::Nothing => break,
                Got::End => return Ok(true),
            }
        }
        model.set_lost(remote.lost());
        model.tick(frame);
        terminal.draw(|canvas| view::draw(model, canvas)).context("the terminal")?;
        while event::poll(FRAME.saturating_sub(frame.elapsed())).context("the terminal")? {
            let Event::Key(key) = event::read().context("the terminal")? else { continue };
            let interrupt = key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('c');
            if interrupt || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc) {
                return Ok(false);
            }
        }
    }
}
