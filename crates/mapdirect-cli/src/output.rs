//! Writing to the terminal, where nobody may be listening any more.

use std::io::Write;
use std::ops::Range;

/// Writes a line to stdout, and makes sure it is out. A reader that has left
/// is no reason to panic or to let go of a pin.
pub(crate) fn line(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = writeln!(stdout, "{text}");
    let _ = stdout.flush();
}

/// Writes one complaint to stderr.
pub(crate) fn complain(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "mapdirect: {text}");
}

/// A range of a file in words.
pub(crate) fn bytes(range: &Range<u64>) -> String {
    if range.end == u64::MAX {
        format!("bytes {} to the end (however far it grows)", range.start)
    } else {
        format!("bytes {} to {}", range.start, range.end)
    }
}

/// Width to draw in: that of the terminal, or 80 columns where there is none.
pub(crate) fn width() -> usize {
    let stdout = std::io::stdout();
    rustix::termios::tcgetwinsize(&stdout).map_or(80, |size| usize::from(size.ws_col).max(40))
}
