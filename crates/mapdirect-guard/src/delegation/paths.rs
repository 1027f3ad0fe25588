//! Paths in a policy.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A path of a rule: a file, or a directory with everything below it. `*` stands
/// for any part of one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pattern(Vec<Vec<u8>>);

impl Pattern {
    /// Understands a path.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub(crate) fn parse(text: &str) -> Result<Self, &'static str> {
        let Some(names) = text.strip_prefix('/') else {
            return Err("a path begins with /");
        };
        if text.contains('\0') {
            return Err("a path contains no NUL");
        }
        let names = names.strip_suffix('/').unwrap_or(names);
        if names.is_empty() {
            return Ok(Self(Vec::new()));
        }
        let names: Vec<_> = names.split('/').collect();
        if names.contains(&"") {
            return Err("a path has one / between names");
        }
        if names.iter().any(|name| matches!(*name, "." | "..")) {
            return Err("a path contains neither . nor ..");
        }
        if names.contains(&"**") {
            return Err("a directory stands for everything below it; ** is not needed");
        }
        Ok(Self(
            names.iter().map(|name| name.as_bytes().to_vec()).collect(),
        ))
    }

    /// Whether a file is meant. `path` must be absolute.
    pub(crate) fn matches(&self, path: &Path) -> bool {
        let Some(names) = path.as_os_str().as_bytes().strip_prefix(b"/") else {
            return false;
        };
        let mut names = names.split(|byte| *byte == b'/');
        self.0
            .iter()
            .all(|pattern| names.next().is_some_and(|name| is_like(name, pattern)))
    }
}

impl std::fmt::Display for Pattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() {
            return f.write_str("/");
        }
        self.0
            .iter()
            .try_for_each(|name| write!(f, "/{}", String::from_utf8_lossy(name)))
    }
}

/// Whether a name is like a pattern, in which `*` stands for any bytes. The time
/// is bounded by the product of both lengths.
fn is_like(name: &[u8], pattern: &[u8]) -> bool {
    let (mut at, mut in_pattern) = (0, 0);
    // Where to go on when what follows the last star does not fit here.
    let mut retry = None;
    while at < name.len() {
        match pattern.get(in_pattern) {
            Some(b'*') => {
                in_pattern += 1;
                retry = Some((in_pattern, at));
            }
            Some(byte) if *byte == name[at] => {
                at += 1;
                in_pattern += 1;
            }
            _ => {
                let Some((behind_star, from)) = retry else {
                    return false;
                };
                (in_pattern, at) = (behind_star, from + 1);
                retry = Some((behind_star, at));
            }
        }
    }
    pattern[in_pattern..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, path: &str) -> bool {
        Pattern::parse(pattern).unwrap().matches(Path::new(path))
    }

    #[test]
    fn a_directory_stands_for_what_is_below_it() {
        for pattern in ["/srv/db", "/srv/db/", "/srv", "/", "/*/db", "/s*v/*"] {
            assert!(matches(pattern, "/srv/db/a/b"), "{pattern}");
        }
        assert!(matches("/srv/db/a", "/srv/db/a"));
        for pattern in ["/srv/d", "/srv/db/a/b/c", "/db", "/srv/db*x", "/*/*/*/*/*"] {
            assert!(!matches(pattern, "/srv/db/a/b"), "{pattern}");
        }
        assert!(!matches("/srv/db", "/srv/db2/x"));
        assert!(!matches("/srv", "srv/x"));
    }

    #[test]
    fn a_star_stands_for_a_part_of_one_name() {
        assert!(matches("/a/*.img", "/a/x.img"));
        assert!(matches("/a/*.img", "/a/.img"));
        assert!(matches("/a/*b*d", "/a/xbxxdxd"));
        assert!(!matches("/a/*.img", "/a/x.im"));
        assert!(!matches("/a/*.img", "/a/b/x.img"));
        assert!(!matches("/a/*b*d", "/a/xdxb"));
        assert!(!is_like(&[b'a'; 4096], b"*a*a*a*a*a*a*a*a*b"));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "", "srv", "~/x", "/a//b", "/a/../b", "/./a", "/a/**/b", "/a\0b",
        ] {
            assert!(Pattern::parse(text).is_err(), "{text:?}");
        }
        assert_eq!(Pattern::parse("/a/b*/").unwrap().to_string(), "/a/b*");
        assert_eq!(Pattern::parse("/").unwrap().to_string(), "/");
    }
}
