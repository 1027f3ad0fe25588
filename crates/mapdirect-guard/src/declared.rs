//! The file of pins that are taken when a guard starts: mapdirect-pins(5).
//!
//! ```toml
//! [[pin]]
//! path = "/srv/db/data"
//! length = "64M"
//! strength = "stable"
//! ```

use crate::delegation::{PolicyError, Reader, Size, read_text as read};
use serde::Deserialize;
use std::ops::Range;
use std::path::{Path, PathBuf};
use toml::Spanned;

/// Where the file is, unless the guard is told otherwise.
pub const DEFAULT_PINS: &str = "/etc/mapdirect/pins.toml";

/// The most pins in the file.
const MOST: usize = 1024;

/// A pin that a file declares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Declared {
    /// The file to pin.
    pub path: PathBuf,
    /// The range in bytes; `None` is all of the file as it is then.
    pub range: Option<Range<u64>>,
    /// Only what is or becomes stable is held.
    pub stable: bool,
    /// The size of the file is held as well.
    pub whole_file: bool,
    /// Nobody may open the file for writing.
    pub deny_write: bool,
    /// No name of the file may be removed, renamed or replaced.
    pub deny_rename: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(default)]
    pin: Vec<Spanned<Written>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    path: Spanned<PathBuf>,
    offset: Option<Spanned<Size>>,
    length: Option<Spanned<Size>>,
    #[serde(default)]
    strength: Strength,
    #[serde(default)]
    scope: Scope,
    #[serde(default)]
    deny: Vec<Denial>,
}

#[derive(Clone, Copy, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Strength {
    #[default]
    All,
    Stable,
}

#[derive(Clone, Copy, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Scope {
    #[default]
    Range,
    File,
}

#[derive(Clone, Copy, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Denial {
    Write,
    Rename,
}

impl Reader<'_> {
    fn pin(&mut self, written: &Written) -> Declared {
        let path = written.path.get_ref();
        if !path.is_absolute() {
            self.complain(&written.path.span(), "a path begins with a slash");
        }
        let offset = self.size(written.offset.as_ref());
        let length = self.size(written.length.as_ref());
        if let (Some(0), Some(span)) = (length, &written.length) {
            self.complain(&span.span(), "`length` = 0 pins nothing");
        }
        let stable = written.strength == Strength::Stable;
        let begin = offset.unwrap_or(0);
        let end = match length {
            Some(length) => begin.checked_add(length),
            // How far a file that is not there yet will go is not known, but a pin
            // of strength stable follows it.
            None if stable => Some(u64::MAX),
            None => None,
        };
        if length.is_some()
            && end.is_none_or(|end| end > i64::MAX.cast_unsigned())
            && let Some(span) = &written.length
        {
            self.complain(&span.span(), "the range ends beyond the largest file");
        }
        if let (Some(span), None) = (&written.offset, end) {
            self.complain(
                &span.span(),
                "an `offset` needs a `length`, or strength \"stable\"",
            );
        }
        Declared {
            path: path.clone(),
            range: end.map(|end| begin..end),
            stable,
            whole_file: written.scope == Scope::File,
            deny_write: written.deny.contains(&Denial::Write),
            deny_rename: written.deny.contains(&Denial::Rename),
        }
    }
}

/// Understands the text of such a file.
///
/// # Errors
///
/// Everything that is wrong with it, or the first thing if it is not TOML.
pub fn parse_pins(path: &Path, text: &str) -> Result<Vec<Declared>, Vec<PolicyError>> {
    let (document, mut reader) = Reader::begin::<Document>(path, text)?;
    let mut pins: Vec<Declared> = Vec::new();
    for written in &document.pin {
        let pin = reader.pin(written.get_ref());
        if pins.contains(&pin) {
            reader.complain(&written.span(), "this pin is there already");
        }
        pins.push(pin);
    }
    if let Some(more) = document.pin.get(MOST) {
        reader.complain(&more.span(), format!("there may be {MOST} pins"));
    }
    reader.end(pins)
}

/// Reads such a file. One that does not exist declares nothing.
///
/// # Errors
///
/// What is wrong with it: others than root may write to it, it cannot be read, or
/// does not make sense.
pub fn read_pins(path: &Path) -> Result<Vec<Declared>, Vec<PolicyError>> {
    let text = read(path).map_err(|error| vec![error])?;
    text.map_or(Ok(Vec::new()), |text| parse_pins(path, &text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Vec<Declared>, Vec<String>> {
        parse_pins(Path::new("pins.toml"), text)
            .map_err(|errors| errors.iter().map(ToString::to_string).collect())
    }

    fn plain(path: &str) -> Declared {
        Declared {
            path: path.into(),
            range: None,
            stable: false,
            whole_file: false,
            deny_write: false,
            deny_rename: false,
        }
    }

    #[test]
    fn what_is_declared_is_understood() {
        let pins = parse(
            "[[pin]]\npath = \"/a\"\n[[pin]]\npath = '/b'\noffset = \"1M\"\nlength = 4096\n\
             deny = [\"write\", \"rename\"]\n[[pin]]\npath = '/c'\nstrength = 'stable'\n\
             scope = 'file'\n",
        );
        let pins = pins.unwrap();
        assert_eq!(pins[0], plain("/a"));
        assert_eq!(
            pins[1],
            Declared {
                range: Some(1 << 20..(1 << 20) + 4096),
                deny_write: true,
                deny_rename: true,
                ..plain("/b")
            }
        );
        assert_eq!(
            pins[2],
            Declared {
                range: Some(0..u64::MAX),
                stable: true,
                whole_file: true,
                ..plain("/c")
            }
        );
        assert_eq!(parse(""), Ok(Vec::new()));
    }

    #[test]
    fn whatever_is_wrong_is_said_with_its_place() {
        for (text, said) in [
            ("[[pin]]\n", "pins.toml:1:1: missing field `path`"),
            ("[[pin]]\npath = 'a'\n", "pins.toml:2:8: a path begins"),
            (
                "[[pin]]\npath = '/a'\nlength = 0\n",
                "pins.toml:3:10: `length` = 0",
            ),
            (
                "[[pin]]\npath = '/a'\nlenght = 1\n",
                "pins.toml:3:1: unknown field `lenght`",
            ),
            (
                "[[pin]]\npath = '/a'\nlength = '1X'\n",
                "pins.toml:3:10: a size is",
            ),
            (
                "[[pin]]\npath = '/a'\noffset = 1\n",
                "pins.toml:3:10: an `offset` needs",
            ),
            (
                "[[pin]]\npath = '/a'\noffset = 1\nlength = '8388608T'\n",
                "pins.toml:4:10: the range ends",
            ),
            (
                "[[pin]]\npath = '/a'\n[[pin]]\npath = '/a'\n",
                "pins.toml:3:1: this pin is there already",
            ),
            ("pins = 1\n", "pins.toml:1:1: unknown field `pins`"),
        ] {
            let errors = parse(text).unwrap_err();
            assert!(errors[0].starts_with(said), "{text}: {errors:?}");
        }
    }
}
