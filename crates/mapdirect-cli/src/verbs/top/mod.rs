//! `mapdirect top`: pins, holders, refusals and block maps on one screen.
//!
//! Whatever may have to wait (for the guard, for a file) is done by threads of
//! its own ([`feed`]); this thread draws what it has, and is there for keys.

mod feed;
mod model;
mod screen;

use crate::args::TopArgs;
use crate::{Exit, output, terminal};
use anyhow::{Context, Result};
use feed::Feed;
use mapdirect::Guard;
use mapdirect_sys::signal::{Signal, SignalFd};
use model::Model;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::time::Duration;

/// How long to wait for keys before looking for news.
const PAUSE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

pub(crate) fn run(args: &TopArgs) -> Result<Exit> {
    if !std::io::stdin().is_terminal() || !std::io::stdout().is_terminal() {
        output::complain(
            "top needs a terminal; `mapdirect status`, `watch` and `log` write to anything",
        );
        return Ok(Exit::USAGE);
    }
    if !terminal::moves_cursor() {
        output::complain(
            "top needs a terminal with a cursor that it can move, and TERM is not set, or is dumb; \
             `mapdirect status`, `watch` and `log` write to anything",
        );
        return Ok(Exit::USAGE);
    }
    let guard = Guard::from_env();
    let status = guard.status()?;
    // Before any thread is made, so that all of them have it blocked.
    let signals = SignalFd::block(&[
        Signal::INTERRUPT,
        Signal::TERMINATE,
        Signal::HANGUP,
        Signal::QUIT,
    ])?;
    let feed = Feed::start(guard, Duration::from_secs(args.interval.into()))?;
    let mut model = Model::new(status);
    // If this program panics, the terminal is restored before the message.
    let mut screen = ratatui::try_init().context("the terminal")?;
    let result = show(&mut screen, &signals, &feed, &mut model);
    let restored = ratatui::try_restore();
    result?;
    restored.context("the terminal")?;
    Ok(Exit::SUCCESS)
}

fn show(
    terminal: &mut ratatui::DefaultTerminal,
    signals: &SignalFd,
    feed: &Feed,
    model: &mut Model,
) -> Result<()> {
    let stdin = std::io::stdin();
    loop {
        feed.show_map_of(model.selected());
        terminal.draw(|frame| screen::draw(frame, model))?;
        let (stdin_fd, signal_fd) = (stdin.as_fd(), signals.as_fd());
        let mut fds = [
            PollFd::from_borrowed_fd(stdin_fd, PollFlags::IN),
            PollFd::from_borrowed_fd(signal_fd, PollFlags::IN),
        ];
        match poll(&mut fds, Some(&PAUSE)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let gone = PollFlags::HUP | PollFlags::ERR;
        if !fds[1].revents().is_empty() || fds[0].revents().intersects(gone) {
            return Ok(());
        }
        // Also what has become of the size of the terminal.
        while event::poll(Duration::ZERO)? {
            if let Event::Key(key) = event::read()?
                && key.kind == KeyEventKind::Press
                && !press(model, key)
            {
                return Ok(());
            }
        }
        while let Some(news) = feed.next() {
            model.hear(news);
        }
    }
}

/// Takes a key. Says whether to go on.
fn press(model: &mut Model, key: KeyEvent) -> bool {
    if key.modifiers.contains(KeyModifiers::CONTROL) {
        return key.code != KeyCode::Char('c');
    }
    if model.types() {
        match key.code {
            KeyCode::Esc => model.search(None),
            KeyCode::Enter => model.end_typing(),
            KeyCode::Backspace => model.untype(),
            KeyCode::Char(character) => model.type_in(character),
            _ => {}
        }
        return true;
    }
    if model.help {
        // Any key takes the help away.
        model.help = false;
        return key.code != KeyCode::Char('q');
    }
    match key.code {
        KeyCode::Char('q') => return false,
        KeyCode::Esc if model.details => model.details = false,
        KeyCode::Esc => model.search(None),
        KeyCode::Up | KeyCode::Char('k') => model.move_by(-1),
        KeyCode::Down | KeyCode::Char('j') => model.move_by(1),
        KeyCode::PageUp => model.move_by(-10),
        KeyCode::PageDown => model.move_by(10),
        KeyCode::Home => model.move_by(isize::MIN),
        KeyCode::End => model.move_by(isize::MAX),
        KeyCode::Enter => model.details = !model.details,
        KeyCode::Char('/') => model.search(Some(String::new())),
        KeyCode::Char('s') => model.sort_otherwise(),
        KeyCode::Char('?' | 'h') => model.help = true,
        _ => {}
    }
    true
}
