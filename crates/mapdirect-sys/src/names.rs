//! Names of files as text: without losing a byte, and so that a terminal shows
//! what is there.

use crate::proc::printable;
use std::ffi::{OsStr, OsString};
use std::fmt::Write;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

/// Whether a character makes a terminal do something, is invisible, or changes
/// the order in which others are shown.
#[must_use]
pub fn is_deceptive(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{61c}'
                | '\u{200b}'
                | '\u{200e}'
                | '\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{feff}'
                | '\u{fff9}'..='\u{fffb}'
                | '\u{e0000}'..='\u{e007f}'
        )
}

/// A file name as text, without losing a byte: itself if it is UTF-8, else as
/// [`quoted`] writes it. (So is a name that could be taken for a quoted one.)
#[must_use]
pub fn name(name: &OsStr) -> String {
    match name.to_str() {
        Some(text) if !text.starts_with(QUOTE) => text.to_owned(),
        _ => quoted(name),
    }
}

/// What a quoted name begins with.
const QUOTE: &str = "$'";

/// A file name as shells and Python can read it: `$'...'`, in ASCII, with C's
/// escapes. (In Python: `ast.literal_eval("b" + quoted[1:])`.)
#[must_use]
pub fn quoted(name: &OsStr) -> String {
    let mut text = String::from(QUOTE);
    for byte in name.as_bytes() {
        match byte {
            b'\n' => text.push_str("\\n"),
            b'\t' => text.push_str("\\t"),
            b'\\' | b'\'' => text.extend(['\\', char::from(*byte)]),
            b' '..=b'~' => text.push(char::from(*byte)),
            _ => {
                let _ = write!(text, "\\x{byte:02x}");
            }
        }
    }
    text.push('\'');
    text
}

/// A file name that others shall see: itself, or [`quoted`] if something in it
/// cannot be shown. Without `unicode` only ASCII can.
#[must_use]
pub fn shown(file_name: &OsStr, unicode: bool) -> String {
    let fits = |c: char| !is_deceptive(c) && (unicode || c.is_ascii());
    match file_name.to_str() {
        Some(text) if text.chars().all(fits) => name(file_name),
        _ => quoted(file_name),
    }
}

/// A file name inside a line about it: also quoted if the line would read as if it
/// went on.
#[must_use]
pub fn in_line(file_name: &OsStr, unicode: bool) -> String {
    let goes_on = |text: &str| [", ", "; ", " ("].iter().any(|mark| text.contains(mark));
    if file_name.to_str().is_some_and(goes_on) {
        return quoted(file_name);
    }
    shown(file_name, unicode)
}

/// A path inside a message, by those who know of no terminal.
#[must_use]
pub fn path_in_line(path: &Path) -> String {
    in_line(path.as_os_str(), true)
}

/// The file name that [`name`] wrote of a path.
#[must_use]
pub fn original(text: &str) -> OsString {
    let quoted = text.starts_with("$'/");
    let name = unquoted(text).filter(|_| quoted);
    name.unwrap_or_else(|| OsString::from(text))
}

/// A file name inside a line about it, as [`name`] wrote it; see [`in_line`].
#[must_use]
pub fn told(text: &str, unicode: bool) -> String {
    in_line(&original(text), unicode)
}

/// A name in a cell of a table. It is one word, so that no name makes a row read as
/// if it had another cell. Quoted if there is a blank in it, or if it could be taken
/// for something that [`one_word`] wrote, or for an empty cell.
#[must_use]
pub fn cell(file_name: &OsStr, unicode: bool) -> String {
    let splits = |c: char| c.is_whitespace() || c == '\\';
    match file_name.to_str() {
        Some("" | "-") => quoted(file_name),
        Some(text) if text.contains(splits) => one_word(&quoted(file_name)),
        _ => one_word(&shown(file_name, unicode)),
    }
}

/// Text with no blank in it, but `\x20`: what it is in a quoted name, too.
#[must_use]
pub fn one_word(text: &str) -> String {
    text.replace(' ', "\\x20")
}

/// A name that a process has given itself, inside a line about the process.
/// Quoted if it could be taken for what the line says.
#[must_use]
pub fn told_word(text: &str) -> String {
    let text = printable(text);
    if text.contains([',', ';', '(', ')']) {
        return quoted(OsStr::new(&text));
    }
    text
}

/// The name that [`name`] wrote.
#[must_use]
pub fn unquoted(text: &str) -> Option<OsString> {
    let Some(quoted) = text.strip_prefix(QUOTE) else {
        return Some(OsString::from(text));
    };
    let mut rest = quoted.strip_suffix('\'')?.bytes();
    let mut bytes = Vec::new();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'\\' => match rest.next()? {
                b'n' => b'\n',
                b't' => b'\t',
                b'x' => {
                    let digits = [rest.next()?, rest.next()?];
                    u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
                }
                other => other,
            },
            other => other,
        });
    }
    Some(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_as_they_are_and_quoted() {
        for (bytes, text) in [
            (&b"/data/a b.db"[..], "/data/a b.db"),
            ("/data/\u{e5}".as_bytes(), "/data/\u{e5}"),
            (b"/data/\xff\n'", r"$'/data/\xff\n\''"),
            (b"$'a'", r"$'$\'a\''"),
        ] {
            assert_eq!(name(OsStr::from_bytes(bytes)), text);
        }
        assert_eq!(
            quoted(OsStr::new("\u{202e}\x1b[m")),
            r"$'\xe2\x80\xae\x1b[m'"
        );
        for wrong in ["$'", "$'\\'", "$'\\x4'", "$'\\xzz'", "$'\\x+1'"] {
            let _ = unquoted(wrong);
        }
        assert_eq!(unquoted("$'abc"), None);
    }

    #[test]
    fn names_inside_a_line() {
        let shown = |bytes: &[u8], unicode| shown(OsStr::from_bytes(bytes), unicode);
        assert_eq!(shown("/\u{e5}".as_bytes(), true), "/\u{e5}");
        assert_eq!(shown("/\u{e5}".as_bytes(), false), r"$'/\xc3\xa5'");
        assert_eq!(shown(b"/a\nb", true), r"$'/a\nb'");
        assert_eq!(shown(b"/a\x1b[m\xff", true), r"$'/a\x1b[m\xff'");
        let told = |text| told(text, true);
        assert_eq!(told("$'/a\\xff'"), "$'/a\\xff'");
        assert_eq!(told("/a\nb"), r"$'/a\nb'");
        assert_eq!(told("/a b"), "/a b");
        assert_eq!(told("/a, by b"), "$'/a, by b'");
        assert_eq!(told("/a (deleted)"), "$'/a (deleted)'");
        assert_eq!(told_word("kworker/0:1 x"), "kworker/0:1 x");
        assert_eq!(told_word("x (uid 0), by s"), "$'x (uid 0), by s'");
        assert_eq!(told_word("\x1b[31m\n"), "\u{fffd}[31m\u{fffd}");
        // The name of the file alone, of a path that was quoted.
        let path = original(r"$'/d/a, b\xff'");
        let last = Path::new(&path).file_name().unwrap();
        assert_eq!(in_line(last, true), r"$'a, b\xff'");
    }

    #[test]
    fn a_cell_is_one_word() {
        for (bytes, text) in [
            (&b"/a"[..], "/a"),
            (b"/a,b;c(d)", "/a,b;c(d)"),
            (b"/a b", r"$'/a\x20b'"),
            (b"/a\t\n", r"$'/a\t\n'"),
            ("/a\u{3000}\u{a0}".as_bytes(), r"$'/a\xe3\x80\x80\xc2\xa0'"),
            (b"/a\\x20(deleted)", r"$'/a\\x20(deleted)'"),
            (b"$'/a'", r"$'$\'/a\''"),
            (b"", "$''"),
            (b"-", "$'-'"),
        ] {
            assert_eq!(cell(OsStr::from_bytes(bytes), true), text);
        }
        assert_eq!(cell(OsStr::new("/\u{e5}"), true), "/\u{e5}");
        assert_eq!(cell(OsStr::new("/\u{e5}"), false), r"$'/\xc3\xa5'");
        assert_eq!(one_word("a b"), r"a\x20b");
    }

    proptest! {
        #[test]
        fn no_byte_is_lost(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let original = OsString::from_vec(bytes);
            prop_assert_eq!(unquoted(&name(&original)), Some(original.clone()));
            let quoted = quoted(&original);
            prop_assert!(quoted.bytes().all(|byte| (b' '..=b'~').contains(&byte)));
            prop_assert_eq!(unquoted(&quoted), Some(original));
        }

        #[test]
        fn a_cell_has_no_blank_and_is_read_again(text in "[- \\\\$'x20a\\PC\\pC\\s]{0,12}") {
            for unicode in [true, false] {
                let cell = cell(OsStr::new(&text), unicode);
                prop_assert!(!cell.is_empty() && !cell.contains(char::is_whitespace));
                prop_assert!(!cell.contains(is_deceptive));
                prop_assert_eq!(unquoted(&cell), Some(OsString::from(&text)));
            }
        }

        #[test]
        fn any_text_is_a_name_or_not(text in ".{0,20}", tail in "[$'\\\\xn0-9a-f]{0,9}") {
            let _ = unquoted(&(text + &tail));
            let _ = unquoted(&format!("$'{tail}'"));
        }
    }
}
