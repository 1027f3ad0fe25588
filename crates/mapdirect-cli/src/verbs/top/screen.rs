//! The screen.

use super::model::{Model, bytes_of, id_of};
use crate::columns::name_of;
use crate::draw;
use crate::size::human;
use crate::terminal;
use crate::verbs::records;
use mapdirect::records::{Event, Record};
use mapdirect::status::PinStatus;
use mapdirect_sys::proc::printable;
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::symbols::bar;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Cell, Clear, Paragraph, Row, Sparkline, Table, TableState};
use std::sync::OnceLock;

/// Whether the terminal may show colours (no-color.org).
fn has_colours() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    let minds = || std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    *FOUND.get_or_init(|| !minds())
}

fn coloured(colour: Color) -> Style {
    if has_colours() {
        Style::new().fg(colour)
    } else {
        Style::new()
    }
}

fn strong(colour: Color) -> Style {
    coloured(colour).add_modifier(Modifier::BOLD)
}

fn title(text: impl Into<String>) -> Line<'static> {
    Line::styled(text.into(), strong(Color::Cyan))
}

/// Bars where there is nothing but ASCII.
const ASCII: bar::Set<'static> = bar::Set {
    full: "#",
    seven_eighths: "#",
    three_quarters: "#",
    five_eighths: "|",
    half: "|",
    three_eighths: ":",
    one_quarter: ":",
    one_eighth: ".",
    empty: " ",
};

pub(super) fn draw(frame: &mut Frame<'_>, model: &Model) {
    let area = frame.area();
    let [head, body, foot] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Min(0),
        Constraint::Length(1),
    ])
    .areas(area);
    frame.render_widget(Paragraph::new(heading(model)), head);
    if model.details {
        details(frame, model, body);
    } else {
        overview(frame, model, body);
    }
    frame.render_widget(Paragraph::new(footing(model)), foot);
    if model.help {
        help(frame, area);
    }
}

fn heading(model: &Model) -> Line<'static> {
    let status = &model.status;
    if !model.there {
        let words = match status.gate {
            mapdirect::Gate::Bpf => {
                "NO GUARD ANSWERS; the gate in the kernel goes on refusing; waiting for a guard"
            }
            _ => "NO GUARD ANSWERS; waiting for one; what is below is as it was",
        };
        return Line::styled(words, strong(Color::Red).add_modifier(Modifier::REVERSED));
    }
    let pins: usize = status.files.iter().map(|file| file.pins.len()).sum();
    let refused: u64 = status.refused.iter().map(|(_, count)| count).sum();
    let breaches = Span::styled(
        format!("breaches {}", status.breached),
        if status.breached > 0 {
            strong(Color::Red)
        } else {
            Style::new()
        },
    );
    Line::from(vec![
        Span::styled("mapdirect", strong(Color::Green)),
        Span::raw(format!(
            " {} pid {} up {}  pins {pins} on {}  refused {refused}  ",
            status.gate.name(),
            status.pid,
            span(status.uptime),
            counted(status.files.len() as u64, "file"),
        )),
        breaches,
    ])
}

fn footing(model: &Model) -> Line<'static> {
    let style = Style::new().add_modifier(Modifier::DIM);
    if model.types() {
        let part = model.search.clone().unwrap_or_default();
        return Line::raw(format!("/{}_", printable(&part)));
    }
    let found = model
        .search
        .as_ref()
        .map_or_else(String::new, |part| format!("  [/{}]", printable(part)));
    Line::styled(
        format!(
            "q quit  ? help  enter details  / search  s sort: {}{found}",
            model.sort.name()
        ),
        style,
    )
}

/// Seconds in few characters.
fn span(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{:02}h", seconds / 86_400, seconds / 3600 % 24),
    }
}

fn counted(count: u64, what: &str) -> String {
    if count == 1 {
        format!("1 {what}")
    } else {
        format!("{count} {what}s")
    }
}

fn overview(frame: &mut Frame<'_>, model: &Model, area: Rect) {
    // What there is no room for goes, the least important first.
    let map = if area.height >= 20 { 7 } else { 0 };
    let rate = if area.height >= 12 { 3 } else { 0 };
    let records = (area.height / 4).clamp(2, 12);
    let [files, rates, picture, last] = Layout::vertical([
        Constraint::Min(3),
        Constraint::Length(rate),
        Constraint::Length(map),
        Constraint::Length(records),
    ])
    .areas(area);
    show_files(frame, model, files);
    if rate > 0 {
        show_rates(frame, model, rates);
    }
    if map > 0 {
        show_map(frame, model, picture);
    }
    show_records(frame, model, last, |_| true, "last refusals and breaches");
}

fn show_files(frame: &mut Frame<'_>, model: &Model, area: Rect) {
    let files = model.files();
    if files.is_empty() {
        let words = if model.status.files.is_empty() {
            "nothing is pinned"
        } else {
            "no name contains that"
        };
        frame.render_widget(Paragraph::new(words), area);
        return;
    }
    // What the other columns and the blanks between them leave.
    let room = usize::from(area.width).saturating_sub(41).max(10);
    let rows = files.iter().map(|file| {
        let broken = file.pins.iter().any(|pin| pin.breaches > 0);
        let lost = file.pins.iter().any(|pin| !pin.lost.is_empty());
        let (state, style) = match (broken, lost) {
            (true, _) => ("BROKEN", strong(Color::Red)),
            (_, true) => ("LOST", strong(Color::Red)),
            _ => ("kept", coloured(Color::Green)),
        };
        Row::new([
            Cell::new(file.pins.len().to_string()),
            Cell::new(human(bytes_of(file))),
            Cell::new(file.holders.len().to_string()),
            Cell::new(model.refused_of(id_of(file)).to_string()),
            Cell::new(Span::styled(state, style)),
            Cell::new(ending(&name_of(file), room)),
        ])
    });
    let widths = [
        Constraint::Length(5),
        Constraint::Length(10),
        Constraint::Length(7),
        Constraint::Length(8),
        Constraint::Length(6),
        Constraint::Min(10),
    ];
    let table = Table::new(rows, widths)
        .header(
            Row::new(["pins", "bytes", "holders", "refused", "state", "file"])
                .style(strong(Color::Cyan)),
        )
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    let mut state = TableState::default().with_selected(model.place());
    frame.render_stateful_widget(table, area, &mut state);
}

/// The end of a path, if all of it is too long: the file's own name is there.
fn ending(path: &str, room: usize) -> String {
    let length = path.chars().count();
    if length <= room {
        return path.to_owned();
    }
    let left_out = length - room.saturating_sub(3);
    format!("...{}", path.chars().skip(left_out).collect::<String>())
}

fn show_rates(frame: &mut Frame<'_>, model: &Model, area: Rect) {
    let [head, bars] = Layout::vertical([Constraint::Length(1), Constraint::Min(1)]).areas(area);
    let now = model.rates.back().copied().unwrap_or(0);
    let most = model.rates.iter().copied().max().unwrap_or(0);
    let missed = match model.missed {
        0 => String::new(),
        count => format!(", {count} not told: they came too fast"),
    };
    let words = format!("refusals per second: {now}, at most {most}{missed}");
    frame.render_widget(Paragraph::new(title(words)), head);
    let width = usize::from(bars.width);
    let skip = model.rates.len().saturating_sub(width);
    let rates: Vec<u64> = model.rates.iter().copied().skip(skip).collect();
    let mut line = Sparkline::default()
        .data(rates)
        .style(coloured(Color::Yellow));
    if !terminal::is_unicode() {
        line = line.bar_set(ASCII);
    }
    frame.render_widget(line, bars);
}

fn show_map(frame: &mut Frame<'_>, model: &Model, area: Rect) {
    let Some(file) = model.file() else {
        return;
    };
    let mut lines = vec![title(format!("block map of {}", name_of(file)))];
    match &model.map {
        Some((id, Ok(map))) if *id == id_of(file) => {
            let pinned: Vec<_> = file.pins.iter().map(|pin| pin.range.clone()).collect();
            let picture = draw::block_map(map, &pinned);
            let rows: Vec<_> = picture.lines().map(str::to_owned).collect();
            // The legend is the last line, and worth more than what is before.
            let room = usize::from(area.height).saturating_sub(2);
            let (legend, rows) = match rows.split_last() {
                Some((legend, rows)) => (legend.trim_start().to_owned(), rows),
                None => (String::new(), &rows[..]),
            };
            lines.extend(rows.iter().take(room).cloned().map(Line::raw));
            lines.push(Line::raw(legend));
        }
        Some((id, Err(why))) if *id == id_of(file) => {
            lines.push(Line::raw(format!(
                "cannot be looked at: {}",
                printable(why)
            )));
        }
        _ => lines.push(Line::raw("...")),
    }
    frame.render_widget(Paragraph::new(lines), area);
}

fn show_records(
    frame: &mut Frame<'_>,
    model: &Model,
    area: Rect,
    wanted: impl Fn(&Record) -> bool,
    words: &str,
) {
    let mut lines = vec![title(words)];
    let room = usize::from(area.height).saturating_sub(1);
    let mut records = model
        .records
        .iter()
        .filter(|record| wanted(record))
        .peekable();
    if records.peek().is_none() {
        lines.push(Line::raw("none"));
    }
    for record in records.take(room) {
        let (what, style) = match record.event {
            Event::Breach => (String::from("BREACH"), strong(Color::Red)),
            _ => (printable(&record.operation), coloured(Color::Yellow)),
        };
        // Of the time, what matters on a screen: hours, minutes and seconds.
        let time = records::time(record.time);
        let time = time.get(11..19).unwrap_or_default().to_owned();
        let mut name = terminal::told_file_name(&record.name.path);
        let remark = record.name.remark_as(terminal::told_name);
        if !records::is_known(&name) {
            name = records::name(record);
        } else if !remark.is_empty() {
            name = format!("{name} ({remark})");
        }
        lines.push(Line::from(vec![
            Span::raw(format!("{time} ")),
            Span::styled(format!("{what:<14} "), style),
            Span::raw(format!("{name}, by {}", records::who(&record.actor))),
        ]));
    }
    frame.render_widget(Paragraph::new(lines), area);
}

fn details(frame: &mut Frame<'_>, model: &Model, area: Rect) {
    let Some(file) = model.file() else {
        frame.render_widget(Paragraph::new("nothing is pinned"), area);
        return;
    };
    let id = id_of(file);
    let mut lines = vec![
        title(name_of(file)),
        Line::raw(format!("inode {} of device {}", file.inode, file.device)),
    ];
    let half = usize::from(area.height / 4).max(2);
    lines.extend(file.pins.iter().take(half).map(pin_line));
    if file.pins.len() > half {
        lines.push(Line::raw(format!(
            "  and {} more pins",
            file.pins.len() - half
        )));
    }
    for holder in file.holders.iter().take(half) {
        lines.push(Line::raw(format!(
            "  held by pid {} ({}): maps {}, {}",
            holder.pid,
            terminal::told_word(&holder.command),
            human(holder.mapped),
            counted(holder.descriptors.into(), "descriptor"),
        )));
    }
    if file.holders.len() > half {
        let more = file.holders.len() - half;
        lines.push(Line::raw(format!("  and {more} more processes")));
    }
    let height = u16::try_from(lines.len()).unwrap_or(u16::MAX);
    let map = area.height.saturating_sub(height).saturating_sub(4).min(19);
    let [top, picture, last] = Layout::vertical([
        Constraint::Length(height),
        Constraint::Length(map),
        Constraint::Min(0),
    ])
    .areas(area);
    frame.render_widget(Paragraph::new(lines), top);
    show_map(frame, model, picture);
    let of_file = |record: &Record| (record.device, record.inode) == id;
    show_records(
        frame,
        model,
        last,
        of_file,
        "refusals and breaches of this file",
    );
}

fn pin_line(pin: &PinStatus) -> Line<'static> {
    let end = if pin.range.end == u64::MAX {
        String::from("the end")
    } else {
        pin.range.end.to_string()
    };
    let mut words = format!(
        "  pin {}: bytes {} to {end}, {} stable, {} frozen, {} old, pid {}, uid {}",
        pin.pin,
        pin.range.start,
        human(pin.stable),
        human(pin.frozen),
        span(pin.age),
        pin.pid,
        pin.uid,
    );
    if pin.breaches > 0 {
        words += &format!("; BROKEN {} times", pin.breaches);
    }
    if !pin.lost.is_empty() {
        words += &format!("; LOST: {}", printable(&pin.lost));
    }
    if pin.breaches > 0 || !pin.lost.is_empty() {
        Line::styled(words, strong(Color::Red))
    } else {
        Line::raw(words)
    }
}

fn help(frame: &mut Frame<'_>, area: Rect) {
    let lines: Vec<Line<'_>> = [
        "",
        "  up, down, k, j      another file",
        "  page up, page down  ten files further; home, end",
        "  enter               pins, holders and map of the file; again: back",
        "  /                   only names with this in them; escape: all",
        "  s                   sort by name, pins, bytes, refusals",
        "  q, control-c        quit",
        "",
        "  refused: since this screen began. `mapdirect log` has the rest.",
        "",
        "  any key takes this away",
    ]
    .into_iter()
    .map(Line::raw)
    .collect();
    let height = (u16::try_from(lines.len()).unwrap_or(0) + 1).min(area.height);
    let width = 68.min(area.width);
    let place = Rect {
        x: (area.width - width) / 2,
        y: (area.height - height) / 2,
        width,
        height,
    };
    frame.render_widget(Clear, place);
    let mut all = vec![title("  keys")];
    all.extend(lines);
    frame.render_widget(
        Paragraph::new(all).style(Style::new().add_modifier(Modifier::REVERSED)),
        place,
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_short() {
        for (seconds, said) in [
            (59, "59s"),
            (61, "1m01s"),
            (3600, "1h00m"),
            (90_000, "1d01h"),
        ] {
            assert_eq!(span(seconds), said);
        }
        assert_eq!(ending("/srv/db/a", 9), "/srv/db/a");
        assert_eq!(ending("/srv/db/a", 7), "...db/a".get(..7).unwrap());
        assert_eq!(counted(1, "file"), "1 file");
        assert_eq!(counted(0, "file"), "0 files");
    }
}
