//! The text of a policy.

use super::names::Names;
use super::paths::Pattern;
use mapdirect_proto::Flags;
use mapdirect_sys::names::path_in_line;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use toml::Spanned;

/// Some users may pin some files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The name of the rule, by which its pins are counted.
    pub name: Arc<str>,
    /// The file that contains it.
    pub file: PathBuf,
    /// The line at which it begins.
    pub line: usize,
    /// The users, by number.
    pub users: Vec<u32>,
    /// The groups, by number.
    pub groups: Vec<u32>,
    /// Whether files may be pinned by descriptors that can write.
    pub writes: bool,
    /// What pins may deny to others ([`Flags::DENY_WRITE`], [`Flags::DENY_RENAME`]).
    pub denies: Flags,
    /// The most pins that one user may have by this rule.
    pub pins: u32,
    /// The most bytes that one user may have pinned by this rule.
    pub bytes: Option<u64>,
    /// How long a pin lasts.
    pub seconds: Option<u32>,
    paths: Vec<Pattern>,
}

/// The most pins of one user by a rule that gives no number.
const PINS: u32 = 64;

impl Rule {
    /// Whether a user, or a member of these groups, is meant.
    #[must_use]
    pub fn names(&self, uid: u32, groups: &[u32]) -> bool {
        self.users.contains(&uid) || groups.iter().any(|group| self.groups.contains(group))
    }

    /// Whether a file at this path is meant.
    #[must_use]
    pub fn covers(&self, path: &Path) -> bool {
        self.paths.iter().any(|pattern| pattern.matches(path))
    }

    /// The paths, for a person.
    #[must_use]
    pub fn paths(&self) -> Vec<String> {
        self.paths.iter().map(ToString::to_string).collect()
    }
}

/// What is wrong with a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyError {
    /// The file, or the directory.
    pub path: PathBuf,
    /// Line and column, from 1.
    pub place: Option<(usize, usize)>,
    /// What is wrong there.
    pub what: String,
}

impl fmt::Display for PolicyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", path_in_line(&self.path))?;
        if let Some((line, column)) = self.place {
            write!(f, ":{line}:{column}")?;
        }
        write!(f, ": {}", self.what)
    }
}

impl std::error::Error for PolicyError {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(default)]
    rule: Vec<Spanned<Written>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    name: Spanned<String>,
    #[serde(default)]
    users: Vec<Spanned<Id>>,
    #[serde(default)]
    groups: Vec<Spanned<Id>>,
    paths: Spanned<Vec<Spanned<String>>>,
    access: Access,
    #[serde(default)]
    deny: Vec<Denial>,
    pins: Option<Spanned<u32>>,
    bytes: Option<Spanned<Size>>,
    seconds: Option<Spanned<u32>>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Access {
    Read,
    Write,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Denial {
    Write,
    Rename,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a number or a name")]
enum Id {
    Number(u32),
    Name(String),
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "expected a number of bytes, or a size such as \"64G\""
)]
pub(crate) enum Size {
    Bytes(u64),
    Text(String),
}

impl Size {
    pub(crate) fn bytes(&self) -> Option<u64> {
        let text = match self {
            Self::Bytes(bytes) => return Some(*bytes),
            Self::Text(text) => text,
        };
        let (number, power) = match text.as_bytes().last()? {
            b'K' => (&text[..text.len() - 1], 10),
            b'M' => (&text[..text.len() - 1], 20),
            b'G' => (&text[..text.len() - 1], 30),
            b'T' => (&text[..text.len() - 1], 40),
            _ => (text.as_str(), 0),
        };
        number.parse::<u64>().ok()?.checked_mul(1 << power)
    }
}

/// Line and column of a byte, both from 1.
fn place(text: &str, at: usize) -> (usize, usize) {
    let before = &text.as_bytes()[..at.min(text.len())];
    let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
    let begin = before.iter().rposition(|byte| *byte == b'\n');
    let in_line = &before[begin.map_or(0, |begin| begin + 1)..];
    (line, String::from_utf8_lossy(in_line).chars().count() + 1)
}

/// Reads a file that an administrator has written, and says all that is wrong with
/// it, not only the first thing.
pub(crate) struct Reader<'a> {
    text: &'a str,
    path: &'a Path,
    errors: Vec<PolicyError>,
}

impl<'a> Reader<'a> {
    /// What the text says, and what looks whether that makes sense.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong if it is not TOML, or has other keys.
    pub(crate) fn begin<T: DeserializeOwned>(
        path: &'a Path,
        text: &'a str,
    ) -> Result<(T, Self), Vec<PolicyError>> {
        let document = toml::from_str(text).map_err(|error| {
            vec![PolicyError {
                path: path.to_owned(),
                place: error.span().map(|span| place(text, span.start)),
                // What the parser expected comes on lines of its own.
                what: error.message().trim_end().replace('\n', ", "),
            }]
        })?;
        let reader = Self {
            text,
            path,
            errors: Vec::new(),
        };
        Ok((document, reader))
    }

    pub(crate) fn complain(&mut self, span: &Range<usize>, what: impl Into<String>) {
        self.errors.push(PolicyError {
            path: self.path.to_owned(),
            place: Some(place(self.text, span.start)),
            what: what.into(),
        });
    }

    /// The bytes of a size, if there is one that makes sense.
    pub(crate) fn size(&mut self, size: Option<&Spanned<Size>>) -> Option<u64> {
        let size = size?;
        let bytes = size.get_ref().bytes();
        if bytes.is_none() {
            self.complain(
                &size.span(),
                "a size is a number with K, M, G or T (powers of 1024) or nothing behind it",
            );
        }
        bytes
    }

    /// What was read, unless anything is wrong.
    ///
    /// # Errors
    ///
    /// Everything that is.
    pub(crate) fn end<T>(self, read: T) -> Result<T, Vec<PolicyError>> {
        if self.errors.is_empty() {
            Ok(read)
        } else {
            Err(self.errors)
        }
    }

    fn ids(
        &mut self,
        ids: &[Spanned<Id>],
        kind: &str,
        of: impl Fn(&str) -> Option<u32>,
    ) -> Vec<u32> {
        let mut numbers = Vec::new();
        for id in ids {
            match id.get_ref() {
                Id::Number(u32::MAX) => {
                    self.complain(&id.span(), format!("{} is no {kind}", u32::MAX));
                }
                Id::Number(number) => numbers.push(*number),
                Id::Name(name) => match of(name) {
                    Some(number) => numbers.push(number),
                    None => self.complain(
                        &id.span(),
                        format!("there is no {kind} {name:?} in /etc; a number does as well"),
                    ),
                },
            }
        }
        numbers
    }

    fn at_least_one<T: PartialEq + Default + Copy>(
        &mut self,
        limit: Option<&Spanned<T>>,
        name: &str,
    ) -> Option<T> {
        let limit = limit?;
        if *limit.get_ref() == T::default() {
            self.complain(&limit.span(), format!("`{name}` = 0 allows nothing"));
        }
        Some(*limit.get_ref())
    }

    fn rule(&mut self, written: &Spanned<Written>, names: &Names) -> Rule {
        let span = written.span();
        let rule = written.get_ref();
        let name = rule.name.get_ref();
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if name.is_empty() || name.len() > 64 || !name.bytes().all(is_name) {
            self.complain(
                &rule.name.span(),
                "a name has 1 to 64 letters, digits, and any of - _ .",
            );
        }
        if rule.users.is_empty() && rule.groups.is_empty() {
            self.complain(
                &span,
                format!("rule {name:?} names neither users nor groups"),
            );
        }
        if rule.paths.get_ref().is_empty() {
            self.complain(&rule.paths.span(), format!("rule {name:?} names no path"));
        }
        let mut paths = Vec::new();
        for path in rule.paths.get_ref() {
            match Pattern::parse(path.get_ref()) {
                Ok(pattern) => paths.push(pattern),
                Err(what) => self.complain(&path.span(), what),
            }
        }
        let bytes = self.size(rule.bytes.as_ref());
        if let (Some(0), Some(size)) = (bytes, &rule.bytes) {
            self.complain(&size.span(), "`bytes` = 0 allows nothing");
        }
        Rule {
            name: Arc::from(name.as_str()),
            file: self.path.to_owned(),
            line: place(self.text, span.start).0,
            users: self.ids(&rule.users, "user", |name| names.user(name)),
            groups: self.ids(&rule.groups, "group", |name| names.group(name)),
            writes: matches!(rule.access, Access::Write),
            denies: rule
                .deny
                .iter()
                .map(|denial| match denial {
                    Denial::Write => Flags::DENY_WRITE,
                    Denial::Rename => Flags::DENY_RENAME,
                })
                .fold(Flags::NONE, |all, one| all | one),
            pins: self
                .at_least_one(rule.pins.as_ref(), "pins")
                .unwrap_or(PINS),
            bytes,
            seconds: self.at_least_one(rule.seconds.as_ref(), "seconds"),
            paths,
        }
    }
}

/// Understands the text of a policy.
///
/// # Errors
///
/// Everything that is wrong with it, or the first thing if it is not TOML.
pub(crate) fn parse(path: &Path, text: &str, names: &Names) -> Result<Vec<Rule>, Vec<PolicyError>> {
    let (document, mut reader) = Reader::begin::<Document>(path, text)?;
    let rules: Vec<_> = document
        .rule
        .iter()
        .map(|written| (reader.rule(written, names), written.get_ref().name.span()))
        .collect();
    for (at, (rule, span)) in rules.iter().enumerate() {
        if let Some((other, _)) = rules[..at]
            .iter()
            .find(|(other, _)| other.name == rule.name)
        {
            reader.complain(
                span,
                format!("line {} has a rule {:?} already", other.line, rule.name),
            );
        }
    }
    reader.end(rules.into_iter().map(|(rule, _)| rule).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<Rule>, Vec<String>> {
        parse(Path::new("p.toml"), text, &Names::of_machine())
            .map_err(|errors| errors.iter().map(ToString::to_string).collect())
    }

    const GOOD: &str = r#"
# Databases.
[[rule]]
name = "databases"
users = [1000, "root"]
groups = ["root"]
paths = ["/srv/db/", "/home/*/db/*.img"]
access = "write"
deny = ["rename"]
pins = 3
bytes = "2M"
seconds = 60
"#;

    #[test]
    fn a_rule_is_understood() {
        let rules = read(GOOD).unwrap();
        let [rule] = &rules[..] else { panic!() };
        assert_eq!((&*rule.name, rule.line), ("databases", 3));
        assert_eq!(
            (&rule.users[..], &rule.groups[..]),
            (&[1000, 0][..], &[0][..])
        );
        assert_eq!(
            (rule.writes, rule.pins, rule.bytes, rule.seconds),
            (true, 3, Some(2 << 20), Some(60))
        );
        assert_eq!(rule.denies, Flags::DENY_RENAME);
        assert!(rule.names(1000, &[]) && rule.names(7, &[8, 0]) && !rule.names(7, &[8]));
        assert!(rule.covers(Path::new("/home/u/db/a.img")));
        assert!(!rule.covers(Path::new("/home/u/db/a.txt")));
        assert_eq!(read("").unwrap(), []);
        assert_eq!(read("# nothing\n").unwrap(), []);
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        let cases = [
            (
                "name = \"databases\"",
                "nam = \"x\"",
                "p.toml:4:1: unknown field `nam`",
            ),
            (
                "access = \"write\"",
                "access = \"all\"",
                "p.toml:8:10: unknown variant `all`",
            ),
            (
                "access = \"write\"",
                "",
                "p.toml:3:1: missing field `access`",
            ),
            (
                "1000",
                "\"nobody-of-this-name\"",
                "p.toml:5:10: there is no user",
            ),
            ("1000", "-1", "p.toml:5:9: expected a number or a name"),
            ("1000", "4294967295", "p.toml:5:10: 4294967295 is no user"),
            (
                "\"/srv/db/\"",
                "\"srv\"",
                "p.toml:7:10: a path begins with /",
            ),
            ("\"2M\"", "\"2X\"", "p.toml:11:9: a size is a number"),
            ("\"2M\"", "\"99999999T\"", "p.toml:11:9: a size is a number"),
            ("\"2M\"", "-5", "p.toml:11:9: expected a number of bytes"),
            (
                "pins = 3",
                "pins = 0",
                "p.toml:10:8: `pins` = 0 allows nothing",
            ),
            ("[\"rename\"]", "[\"delete\"]", "p.toml:9:"),
            ("[\"rename\"]", "7", "p.toml:9:"),
            (
                "seconds = 60",
                "seconds = \"x\"",
                "p.toml:12:11: invalid type",
            ),
            ("[[rule]]", "[rule", "p.toml:3:"),
            (
                "\"databases\"",
                "\"\u{e4}\"",
                "p.toml:4:8: a name has 1 to 64",
            ),
            ("\"databases\"", "\"databases", "p.toml:4:"),
        ];
        for (from, to, expected) in cases {
            let errors = read(&GOOD.replacen(from, to, 1)).unwrap_err();
            assert!(
                errors.iter().any(|error| error.starts_with(expected)),
                "{to}: {errors:?}"
            );
            assert!(
                errors.iter().all(|error| !error.contains('\n')),
                "{errors:?}"
            );
        }
        let twice = read(&format!("{GOOD}{GOOD}")).unwrap_err();
        assert_eq!(
            twice,
            ["p.toml:16:8: line 3 has a rule \"databases\" already"]
        );
        let nobody = GOOD.replace("users = [1000, \"root\"]\ngroups = [\"root\"]\n", "");
        let errors = read(&nobody).unwrap_err();
        assert_eq!(
            errors,
            ["p.toml:3:1: rule \"databases\" names neither users nor groups"]
        );
    }

    #[test]
    fn every_mistake_is_said_at_once() {
        let text = GOOD
            .replace("1000", "\"x y\"")
            .replace("\"/srv/db/\"", "\"a\"");
        assert_eq!(read(&text).unwrap_err().len(), 2);
    }

    #[test]
    fn places_count_characters() {
        assert_eq!(place("", 0), (1, 1));
        assert_eq!(place("a\n\u{e4}b", 4), (2, 2));
        assert_eq!(place("a\n", 9), (2, 1));
    }
}
