//! Which files are to be pinned.

use glob::{MatchOptions, Pattern};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Where the system keeps its own files, which `run` leaves alone unless a GLOB
/// names them. What a JVM tells of itself is in `hsperfdata_USER`.
const LEFT_ALONE: [&str; 8] = [
    "/usr/",
    "/lib",
    "/etc/",
    "/bin/",
    "/sbin/",
    "/proc/",
    "/sys/",
    "/tmp/hsperfdata_",
];

/// As a shell has it: a star stays within a directory.
const AS_SHELLS: MatchOptions = MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: false,
};

/// The files to be pinned.
#[derive(Debug)]
pub(crate) struct Files {
    globs: Vec<Glob>,
}

#[derive(Debug)]
struct Glob {
    /// As it was given.
    given: String,
    pattern: Pattern,
}

impl Files {
    /// Understands globs; a relative one begins in `directory`. Without any,
    /// every file is meant but those of the system.
    ///
    /// # Errors
    ///
    /// Which glob makes no sense, and why.
    pub(crate) fn new(globs: &[PathBuf], directory: &Path) -> Result<Self, String> {
        let understood = globs.iter().map(|glob| {
            let given = crate::terminal::name(glob);
            let text = absolute(glob, directory)
                .ok_or_else(|| format!("--files {given}: it is not UTF-8"))?;
            let pattern =
                Pattern::new(&text).map_err(|error| format!("--files {given}: {}", error.msg))?;
            Ok(Glob { given, pattern })
        });
        Ok(Self {
            globs: understood.collect::<Result<_, String>>()?,
        })
    }

    /// Whether files are named, and not the system's alone left out.
    pub(crate) fn are_named(&self) -> bool {
        !self.globs.is_empty()
    }

    /// Whether a file is to be pinned, by its absolute path without links; and
    /// if so which globs say so, a bit for each.
    pub(crate) fn matching(&self, path: &OsStr) -> Option<u64> {
        if self.globs.is_empty() {
            let is_under = |place: &&str| path.as_bytes().starts_with(place.as_bytes());
            let wanted = path.as_bytes().starts_with(b"/") && !LEFT_ALONE.iter().any(is_under);
            return wanted.then_some(0);
        }
        let path = path.to_string_lossy();
        let found = self.globs.iter().enumerate();
        let found = found.filter(|(_, glob)| glob.pattern.matches_with(&path, AS_SHELLS));
        found
            .map(|(number, _)| bit(number))
            .reduce(|some, more| some | more)
    }

    /// The globs that no file has matched, of those that have a bit.
    pub(crate) fn unmatched(&self, matched: u64) -> impl Iterator<Item = &str> {
        let each = self.globs.iter().enumerate();
        each.filter(move |(number, _)| bit(*number) != 0 && matched & bit(*number) == 0)
            .map(|(_, glob)| &*glob.given)
    }
}

/// The bit of a glob. Those behind the 64th have none.
fn bit(number: usize) -> u64 {
    u32::try_from(number)
        .ok()
        .and_then(|number| 1u64.checked_shl(number))
        .unwrap_or(0)
}

/// A glob that begins at the root. Its fixed beginning is a directory, whose
/// links are followed: the kernel names files without links.
fn absolute(glob: &Path, directory: &Path) -> Option<String> {
    let joined = directory.join(glob);
    let text = joined.to_str()?;
    let first_special = text.find(['*', '?', '[']).unwrap_or(text.len());
    let fixed = match text[..first_special].rfind('/') {
        Some(at) => &text[..at],
        None => "",
    };
    let (fixed, rest) = (Path::new(fixed), text[fixed.len()..].to_owned());
    if first_special == text.len()
        && let Ok(whole) = std::fs::canonicalize(&joined)
    {
        return Some(Pattern::escape(whole.to_str()?));
    }
    match std::fs::canonicalize(fixed) {
        Ok(canonical) if canonical == Path::new("/") => Some(rest),
        Ok(canonical) => Some(Pattern::escape(canonical.to_str()?) + &rest),
        // What is not there yet.
        Err(_) => Some(text.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mapdirect_testkit::process::ScratchDirectory;

    fn files(globs: &[&str], directory: &str) -> Files {
        let globs: Vec<PathBuf> = globs.iter().map(PathBuf::from).collect();
        Files::new(&globs, Path::new(directory)).unwrap()
    }

    #[test]
    fn a_star_stays_in_its_directory() {
        let files = files(&["/nowhere/a/*.db", "/nowhere/b/**"], "/");
        assert!(files.matching("/nowhere/a/one.db".as_ref()).is_some());
        assert!(files.matching("/nowhere/a/deep/one.db".as_ref()).is_none());
        assert!(files.matching("/nowhere/b/deep/er/one".as_ref()).is_some());
        assert!(files.matching("/nowhere/c".as_ref()).is_none());
        assert_eq!(files.unmatched(0b11).count(), 0);
    }

    #[test]
    fn a_relative_glob_begins_where_one_is() {
        let directory = ScratchDirectory::new("globs").unwrap();
        let real = directory.path().join("real [1]");
        std::fs::create_dir(&real).unwrap();
        std::fs::write(real.join("a?b"), "").unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let real = std::fs::canonicalize(&real).unwrap();
        let globs: Vec<PathBuf> = ["*.db", "./a?b", "gone"].map(PathBuf::from).to_vec();
        let files = Files::new(&globs, &link).unwrap();
        assert!(files.matching(real.join("x.db").as_os_str()).is_some());
        assert!(files.matching(real.join("a?b").as_os_str()).is_some());
        assert!(files.matching(real.join("c").as_os_str()).is_none());
        assert_eq!(files.unmatched(0b011).collect::<Vec<_>>(), ["gone"]);
    }

    #[test]
    fn the_systems_own_files_are_left_alone() {
        let files = files(&[], "/");
        assert!(files.matching("/var/lib/data.mdb".as_ref()).is_some());
        assert!(files.matching("/root/data.mdb".as_ref()).is_some());
        for path in [
            "/usr/lib/x.so",
            "/lib64/x.so",
            "/etc/ld.so.cache",
            "pipe:[1]",
            "",
        ] {
            assert!(files.matching(path.as_ref()).is_none(), "{path}");
        }
        assert!(files.matching("/tmp/hsperfdata_root/17".as_ref()).is_none());
    }

    #[test]
    fn nonsense_is_told() {
        let nonsense = Files::new(&[PathBuf::from("/a/[")], Path::new("/"));
        assert!(nonsense.unwrap_err().starts_with("--files /a/[: "));
    }
}
