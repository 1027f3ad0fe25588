//! What the terminal can show: its width, its characters, its colours.

pub(crate) use mapdirect_sys::names::told_word;

use mapdirect_sys::names;
use mapdirect_sys::proc::printable;
use std::ffi::OsStr;
use std::io::{IsTerminal, stderr, stdout};
use std::path::Path;
use std::sync::OnceLock;

/// The width where nobody says another.
const WIDTH: usize = 80;
/// The least width that is drawn in.
const LEAST: usize = 40;

/// How a word is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    Strong,
    Good,
    Note,
    Bad,
}

/// The value of a variable that is set to something.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Whether characters beyond ASCII can be shown: what the locale says, as
/// setlocale(3) finds it.
pub(crate) fn is_unicode() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"]
            .into_iter()
            .find_map(variable);
        locale.is_some_and(|locale| names_utf8(&locale))
    })
}

fn names_utf8(locale: &str) -> bool {
    let locale = locale.to_ascii_lowercase();
    let coding = locale.split_once('.').map_or("", |(_, coding)| coding);
    let coding = coding.split('@').next().unwrap_or_default();
    matches!(coding, "utf-8" | "utf8")
}

/// The number of columns that text on stdout may take: what `COLUMNS` says, or
/// the terminal, or 80.
pub(crate) fn width() -> usize {
    chosen_width()
        .or_else(|| {
            let size = rustix::termios::tcgetwinsize(stdout()).ok()?;
            Some(usize::from(size.ws_col)).filter(|columns| *columns > 0)
        })
        .map_or(WIDTH, |columns| columns.max(LEAST))
}

/// The number of columns of the terminal that stderr is; nothing if it is none.
/// What goes to a log has a line for each complaint.
pub(crate) fn width_of_stderr() -> Option<usize> {
    let stderr = stderr();
    if !stderr.is_terminal() {
        return None;
    }
    let size = rustix::termios::tcgetwinsize(&stderr).ok();
    let columns = size.map(|size| usize::from(size.ws_col));
    let columns = chosen_width().or(columns.filter(|columns| *columns > 0));
    Some(columns.map_or(WIDTH, |columns| columns.max(LEAST)))
}

fn chosen_width() -> Option<usize> {
    let columns = variable("COLUMNS")?.parse().ok()?;
    (columns > 0).then_some(columns)
}

/// Whether stdout is a terminal that shows colours, and nobody minds
/// (no-color.org).
fn has_colours() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND
        .get_or_init(|| stdout().is_terminal() && variable("NO_COLOR").is_none() && moves_cursor())
}

/// Whether the terminal understands more than lines of text.
pub(crate) fn moves_cursor() -> bool {
    variable("TERM").is_some_and(|terminal| terminal != "dumb")
}

/// `text` in a style, if the terminal has some.
pub(crate) fn paint(style: Style, text: &str) -> String {
    let code = match style {
        Style::Strong => "1",
        Style::Good => "32",
        Style::Note => "33",
        Style::Bad => "1;31",
    };
    if has_colours() {
        format!("\x1b[{code}m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}

/// A file name as the terminal can show it and a shell can read it: itself, or
/// quoted if something in it cannot be shown.
pub(crate) fn name(path: &Path) -> String {
    names::shown(path.as_os_str(), is_unicode())
}

/// A file name that the guard tells: it may be quoted already.
pub(crate) fn told_name(text: &str) -> String {
    names::told(text, is_unicode())
}

/// The file's own name in a path that the guard tells, for `mapdirect top`.
#[cfg(feature = "tui")]
pub(crate) fn told_file_name(text: &str) -> String {
    let path = names::original(text);
    let name = Path::new(&path).file_name().unwrap_or_default();
    names::in_line(name, is_unicode())
}

/// A file name in a cell of a table.
pub(crate) fn cell(path: &Path) -> String {
    names::cell(path.as_os_str(), is_unicode())
}

/// A file name that the guard tells, in a cell of a table.
pub(crate) fn told_cell(text: &str) -> String {
    names::cell(&names::original(text), is_unicode())
}

/// A name in a cell of a table that is none of a file: what a process or a rule is
/// called.
pub(crate) fn word_cell(text: &str) -> String {
    names::cell(OsStr::new(&printable(text)), is_unicode())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locales() {
        for locale in ["C.UTF-8", "en_US.utf8", "de_DE.UTF-8@euro"] {
            assert!(names_utf8(locale), "{locale}");
        }
        for locale in ["C", "POSIX", "de_DE.ISO-8859-1", "en_US", "UTF-8"] {
            assert!(!names_utf8(locale), "{locale}");
        }
    }
}
