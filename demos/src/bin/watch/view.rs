//! The model as a screen, and as plain text.

use std::fmt::Write as _;

use pinfold_core::watch::{NoteCause, NotePath, NoteState, UserptrEvent};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Bar, BarChart, BarGroup, Block, Paragraph, Row, Table};

use crate::json::name;
use crate::model::{HOLD_OFF_NAMES, Model};

pub(crate) const STATES: [NoteState; 8] = [
    NoteState::New,
    NoteState::Queued,
    NoteState::Acquiring,
    NoteState::Valid,
    NoteState::Invalid,
    NoteState::Faulted,
    NoteState::Closed,
    NoteState::DeadAfterFork,
];
pub(crate) const PATHS: [NotePath; 5] =
    [NotePath::None, NotePath::Import, NotePath::AliasImport, NotePath::DmaBuf, NotePath::Mirror];
pub(crate) const CAUSES: [NoteCause; 8] = [
    NoteCause::Unmap,
    NoteCause::Remap,
    NoteCause::Remove,
    NoteCause::Bracket,
    NoteCause::Manual,
    NoteCause::Injected,
    NoteCause::Fork,
    NoteCause::Evicted,
];

pub(crate) fn draw(model: &Model, frame: &mut Frame<'_>) {
    let [head, middle, below, events] =
        Layout::vertical([Constraint::Length(1), Constraint::Length(11), Constraint::Length(11), Constraint::Min(3)])
            .areas(frame.area());
    let [objects, memory] = Layout::horizontal([Constraint::Min(52), Constraint::Length(28)]).areas(middle);
    let [causes, hold_offs] = Layout::horizontal([Constraint::Length(38), Constraint::Min(42)]).areas(below);
    frame.render_widget(heading(model), head);
    frame.render_widget(objects_table(model), objects);
    frame.render_widget(memory_and_pool(model), memory);
    frame.render_widget(causes_table(model), causes);
    frame.render_widget(hold_off_chart(model), hold_offs);
    frame.render_widget(recent_events(model, usize::from(events.height)), events);
}

fn heading(model: &Model) -> Line<'static> {
    let (lost, _) = model.lost();
    let lost_style = if lost > 0 { Style::new().fg(Color::Red).bold() } else { Style::new() };
    let told = if model.is_complete() { "" } else { "  (still being told what there is)" };
    Line::from(vec![
        Span::styled(format!(" program {} ", model.process()), Style::new().add_modifier(Modifier::REVERSED)),
        Span::raw(format!("  {} objects  {} records  ", model.objects().len(), model.records())),
        Span::styled(format!("{lost} lost"), lost_style),
        Span::raw(format!("  {} late{told}  q quits", model.late())),
    ])
}

fn objects_table(model: &Model) -> Table<'static> {
    let header = std::iter::once(String::new()).chain(PATHS.iter().map(name));
    let rows = STATES.iter().map(|&state| {
        let counts = PATHS.iter().map(|&path| model.count(state, path));
        let cells = counts.map(|count| if count == 0 { "·".to_owned() } else { count.to_string() });
        Row::new(std::iter::once(name(state)).chain(cells)).style(Style::new().fg(colour(state)))
    });
    let widths = [Constraint::Length(16), Constraint::Fill(1), Constraint::Fill(1), Constraint::Length(12)];
    let widths = widths.into_iter().chain([Constraint::Fill(1), Constraint::Fill(1)]);
    Table::new(rows, widths)
        .header(Row::new(header).style(Style::new().bold()))
        .block(Block::bordered().title("objects: state by path"))
}

fn colour(state: NoteState) -> Color {
    match state {
        NoteState::Valid => Color::Green,
        NoteState::Queued | NoteState::Acquiring => Color::Yellow,
        NoteState::Invalid | NoteState::Faulted => Color::Red,
        _ => Color::Reset,
    }
}

fn memory_and_pool(model: &Model) -> Paragraph<'static> {
    let mut lines = vec![format!("{:<13}{:>12}", "pinned", bytes(model.bytes_pinned()))];
    lines.extend(PATHS[1..].iter().map(|&path| format!("  {:<13}{:>10}", name(path), bytes(model.bytes(path)))));
    lines.push(String::new());
    lines.push(pool(model));
    Paragraph::new(lines.into_iter().map(Line::from).collect::<Vec<_>>()).block(Block::bordered().title("memory, pool"))
}

fn pool(model: &Model) -> String {
    model.work().map_or_else(
        || "workers: not told yet".to_owned(),
        |work| format!("workers {}/{} wait {}", work.running, work.workers, work.pending),
    )
}

fn causes_table(model: &Model) -> Table<'static> {
    let rows = CAUSES.iter().map(|&cause| {
        Row::new([name(cause), format!("{:.1}", model.rate(cause)), model.invalidations(cause).to_string()])
    });
    Table::new(rows, [Constraint::Length(12), Constraint::Length(10), Constraint::Fill(1)])
        .header(Row::new(["", "per s", "in all"]).style(Style::new().bold()))
        .block(Block::bordered().title("invalidations by cause"))
}

fn hold_off_chart(model: &Model) -> BarChart<'static> {
    let bars = HOLD_OFF_NAMES.iter().zip(model.hold_offs());
    // Binary digits: a few long waits among thousands of short ones are what one looks for.
    let bar = |(name, &count): (&&'static str, &u64)| {
        let height = u64::from(u64::BITS - count.leading_zeros());
        Bar::default().label(Line::from(*name)).value(height).text_value(count.to_string())
    };
    let bars = bars.map(bar).collect::<Vec<_>>();
    BarChart::default()
        .data(BarGroup::default().bars(&bars))
        .bar_width(5)
        .bar_gap(1)
        .bar_style(Style::new().fg(Color::Cyan))
        .block(Block::bordered().title("hold-off of mutators, below (heights: powers of two)"))
}

fn recent_events(model: &Model, height: usize) -> Paragraph<'static> {
    let lines = model.recent().take(height.saturating_sub(2)).map(|(at, note)| {
        let style = match note.event {
            UserptrEvent::Invalidated => Style::new().fg(Color::Yellow),
            UserptrEvent::Late | UserptrEvent::Faulted => Style::new().fg(Color::Red),
            _ => Style::new(),
        };
        let mut text = format!("{:>9.3}s  #{:<6} {:<12}", at.as_secs_f64(), note.object, name(note.event));
        if note.cause != NoteCause::None {
            let held = note.hold_off_ns as f64 / 1e3;
            write!(text, " {} held {held:.1} µs", name(note.cause)).expect("a string takes everything");
        }
        write!(text, "  gen {}", note.generation).expect("a string takes everything");
        if note.path != NotePath::None {
            write!(text, " {}", name(note.path)).expect("a string takes everything");
        }
        write!(text, " {}", note.label).expect("a string takes everything");
        Line::styled(text, style)
    });
    Paragraph::new(lines.collect::<Vec<_>>()).block(Block::bordered().title("events, newest first"))
}

/// How things stand, for a terminal that isn't one.
pub(crate) fn text(model: &Model) -> String {
    let mut lines = vec![format!("program {}: {} objects", model.process(), model.objects().len())];
    for state in STATES {
        for path in PATHS {
            let count = model.count(state, path);
            if count > 0 {
                lines.push(format!("  {:<16}{:<14}{count}", name(state), name(path)));
            }
        }
    }
    lines.push(format!("memory pinned: {}", bytes(model.bytes_pinned())));
    let used = PATHS[1..].iter().filter(|&&path| model.bytes(path) > 0);
    lines.extend(used.map(|&path| format!("  {:<16}{}", name(path), bytes(model.bytes(path)))));
    lines.push(pool(model));
    lines.push(format!("records lost to this reader: {}", model.lost().0));
    for (id, object) in model.objects() {
        let note = &object.note;
        lines.push(format!(
            "#{id} {} {} gen {} {:#x}+{:#x} {}",
            name(note.state),
            name(note.path),
            note.generation,
            object.start,
            object.bytes,
            note.label,
        ));
    }
    lines.join("\n")
}

/// A size that fits a narrow column.
fn bytes(count: u64) -> String {
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    units.iter().find(|(_, shift)| count >> shift > 0).map_or_else(
        || format!("{count} B"),
        |(unit, shift)| format!("{:.1} {unit}", count as f64 / (1_u64 << shift) as f64),
    )
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use pinfold_core::watch::{Label, UserptrNote};
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;

    fn model(notes: &[UserptrNote]) -> Model {
        let now = Instant::now();
        let mut model = Model::new(77, now);
        notes.iter().for_each(|note| model.take(&note.record(), now));
        model
    }

    fn valid(event: UserptrEvent, object: u64) -> UserptrNote {
        let (state, path) = (NoteState::Valid, NotePath::Import);
        UserptrNote {
            event,
            object,
            start: 0x1000,
            end: 0x3000,
            state,
            path,
            label: Label::new("town"),
            ..Default::default()
        }
    }

    #[test]
    fn what_happened_is_newer_than_what_was_there() {
        let model = model(&[
            UserptrNote { event: UserptrEvent::Closed, object: 1, ..Default::default() },
            UserptrNote {
                event: UserptrEvent::Invalidated,
                object: 2,
                state: NoteState::Invalid,
                ..Default::default()
            },
            valid(UserptrEvent::Present, 1),
            valid(UserptrEvent::Present, 2),
            valid(UserptrEvent::Present, 3),
            valid(UserptrEvent::AllPresent, 0),
        ]);
        assert!(model.is_complete());
        assert_eq!(model.objects().keys().copied().collect::<Vec<_>>(), [2, 3]);
        assert_eq!(model.count(NoteState::Valid, NotePath::Import), 1);
        assert_eq!(model.count(NoteState::Invalid, NotePath::None), 1);
    }

    #[test]
    fn an_invalidation_of_some_bytes_leaves_the_objects_size() {
        let part = UserptrNote { start: 0x1000, end: 0x2000, ..valid(UserptrEvent::Invalidated, 1) };
        let model = model(&[valid(UserptrEvent::Acquired, 1), part]);
        assert_eq!(model.bytes(NotePath::Import), 0x2000);
        assert_eq!(model.bytes_pinned(), 0x2000);
    }

    #[test]
    fn the_screen_shows_objects_causes_and_hold_offs() {
        let held =
            UserptrNote { cause: NoteCause::Remap, hold_off_ns: 2_500_000, ..valid(UserptrEvent::Invalidated, 1) };
        let model = model(&[valid(UserptrEvent::Acquired, 1), held]);
        let mut terminal = Terminal::new(TestBackend::new(100, 32)).expect("a terminal in memory");
        terminal.draw(|frame| draw(&model, frame)).expect("a terminal in memory");
        let screen = terminal.backend().to_string();
        for wanted in ["program 77", "1 objects", "state by path", "8.0 KiB", "remap", "held 2500.0 µs", "town", "10ms"]
        {
            assert!(screen.contains(wanted), "{wanted} is missing:\n{screen}");
        }
    }
}
