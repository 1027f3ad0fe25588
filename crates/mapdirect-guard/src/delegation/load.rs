//! Which files are the policy.

use super::file::{PolicyError, Rule, parse};
use super::names::Names;
use mapdirect_sys::names::path_in_line;
use mapdirect_sys::{Errno, reopen};
use rustix::fs::{FileType, Mode, OFlags};
use std::ffi::OsStr;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where the policy is, unless the guard is told otherwise.
pub const DEFAULT: &str = "/etc/mapdirect/policy.toml";

/// The longest file.
const MOST: u64 = 1 << 20;

/// Who may pin without the capability.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    rules: Vec<Arc<Rule>>,
}

impl Policy {
    /// Reads a policy: the file at `path`, and then every `*.toml` in the
    /// directory beside it whose name ends in `.d` instead, in the order of their
    /// names. What does not exist has no rules.
    ///
    /// # Errors
    ///
    /// What is wrong, in any of the files.
    pub fn load(path: &Path) -> Result<Self, Vec<PolicyError>> {
        let names = Names::of_machine();
        let (mut rules, mut errors): (Vec<Rule>, Vec<PolicyError>) = Default::default();
        let mut files = vec![path.to_owned()];
        match directory(&path.with_extension("d")) {
            Ok(more) => files.extend(more),
            Err(error) => errors.push(error),
        }
        for file in files {
            let read = read(&file).map_err(|error| vec![error]);
            match read
                .and_then(|text| text.map_or(Ok(Vec::new()), |text| parse(&file, &text, &names)))
            {
                Ok(more) => {
                    for rule in more {
                        if let Some(other) = rules.iter().find(|other| other.name == rule.name) {
                            errors.push(PolicyError {
                                path: rule.file.clone(),
                                place: Some((rule.line, 1)),
                                what: format!(
                                    "{}:{} has a rule {:?} already",
                                    path_in_line(&other.file),
                                    other.line,
                                    rule.name
                                ),
                            });
                        }
                        rules.push(rule);
                    }
                }
                Err(more) => errors.extend(more),
            }
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        Ok(Self {
            rules: rules.into_iter().map(Arc::new).collect(),
        })
    }

    /// The rules, in the order in which they are tried.
    #[must_use]
    pub fn rules(&self) -> &[Arc<Rule>] {
        &self.rules
    }

    pub(crate) fn names(&self, uid: u32, groups: &[u32]) -> bool {
        self.rules.iter().any(|rule| rule.names(uid, groups))
    }
}

fn wrong(path: &Path, what: impl Into<String>) -> PolicyError {
    PolicyError {
        path: path.to_owned(),
        place: None,
        what: what.into(),
    }
}

/// Requires that only root can change something.
fn require_roots(path: &Path, file: &OwnedFd, kind: FileType) -> Result<(), PolicyError> {
    let stat = rustix::fs::fstat(file).map_err(|errno| wrong(path, errno.to_string()))?;
    if FileType::from_raw_mode(stat.st_mode) != kind {
        let what = match kind {
            FileType::Directory => "this is not a directory",
            _ => "this is not a regular file",
        };
        return Err(wrong(path, what));
    }
    if stat.st_uid != 0 {
        return Err(wrong(
            path,
            format!(
                "it belongs to user {}, and must belong to root",
                stat.st_uid
            ),
        ));
    }
    if stat.st_mode & 0o022 != 0 {
        return Err(wrong(
            path,
            format!(
                "others than its owner may write to it (mode {:o}): chmod go-w",
                stat.st_mode & 0o7777
            ),
        ));
    }
    Ok(())
}

/// Opens something that only root can change, and returns nothing if there is none.
/// What is of another kind is not opened: devices may do something then.
fn open(path: &Path, kind: FileType) -> Result<Option<OwnedFd>, PolicyError> {
    let failed = |errno: Errno| wrong(path, format!("it cannot be opened: {errno}"));
    let mut flags = OFlags::PATH | OFlags::CLOEXEC;
    flags.set(OFlags::DIRECTORY, kind == FileType::Directory);
    let there = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(there) => there,
        Err(Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(failed(errno)),
    };
    require_roots(path, &there, kind)?;
    let opened = reopen::reopen(there.as_fd(), OFlags::RDONLY);
    opened.map(Some).map_err(failed)
}

/// The files of a directory of policies.
fn directory(path: &Path) -> Result<Vec<PathBuf>, PolicyError> {
    let failed = |errno: Errno| wrong(path, format!("it cannot be listed: {errno}"));
    let Some(opened) = open(path, FileType::Directory)? else {
        return Ok(Vec::new());
    };
    let mut files = Vec::new();
    for entry in rustix::fs::Dir::new(opened).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().to_bytes();
        if name.ends_with(b".toml") && !name.starts_with(b".") {
            files.push(path.join(OsStr::from_bytes(name)));
        }
    }
    files.sort_unstable();
    Ok(files)
}

/// The text of a policy, or nothing if there is no such file.
pub(crate) fn read(path: &Path) -> Result<Option<String>, PolicyError> {
    if let Some(parent) = path.parent() {
        let here = parent.as_os_str().is_empty();
        let parent = if here { Path::new(".") } else { parent };
        open(parent, FileType::Directory)?;
    }
    let Some(file) = open(path, FileType::RegularFile)? else {
        return Ok(None);
    };
    let mut bytes = Vec::new();
    std::fs::File::from(file)
        .take(MOST + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| wrong(path, format!("it cannot be read: {error}")))?;
    if bytes.len() as u64 > MOST {
        return Err(wrong(path, format!("it has more than {MOST} bytes")));
    }
    String::from_utf8(bytes).map(Some).map_err(|error| {
        wrong(
            path,
            format!("byte {} is not UTF-8", error.utf8_error().valid_up_to()),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn rule(name: &str) -> String {
        format!("[[rule]]\nname = {name:?}\nusers = [7]\npaths = [\"/x\"]\naccess = \"read\"\n")
    }

    /// A directory with a policy, or nothing where files of root cannot be made.
    struct Setting(tempfile::TempDir);

    impl Setting {
        fn new() -> Option<Self> {
            let root = rustix::process::geteuid().is_root();
            root.then(|| Self(tempfile::tempdir().unwrap()))
        }

        fn path(&self) -> PathBuf {
            self.0.path().join("policy.toml")
        }

        fn write(&self, name: &str, text: &str) -> PathBuf {
            let path = self.0.path().join(name);
            std::fs::write(&path, text).unwrap();
            allow(&path, 0o644);
            path
        }

        fn directory(&self) {
            let path = self.0.path().join("policy.d");
            std::fs::create_dir(&path).unwrap();
            allow(&path, 0o755);
        }

        fn load(&self) -> Result<Vec<String>, Vec<String>> {
            let policy = Policy::load(&self.path());
            policy
                .map(|policy| {
                    policy
                        .rules
                        .iter()
                        .map(|rule| rule.name.to_string())
                        .collect()
                })
                .map_err(|errors| errors.iter().map(ToString::to_string).collect())
        }
    }

    fn allow(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn files_are_read_in_order() {
        let Some(setting) = Setting::new() else {
            return;
        };
        assert_eq!(setting.load(), Ok(vec![]));
        setting.write("policy.toml", &rule("main"));
        setting.directory();
        setting.write("policy.d/20.toml", &rule("later"));
        setting.write("policy.d/10.toml", &rule("sooner"));
        setting.write("policy.d/10.toml~", "nonsense");
        setting.write("policy.d/.hidden.toml", "nonsense");
        let names = ["main", "sooner", "later"].map(String::from);
        assert_eq!(setting.load(), Ok(names.to_vec()));
        let path = setting.write("policy.d/30.toml", &rule("main"));
        let errors = setting.load().unwrap_err();
        assert!(
            errors[0].starts_with(&format!("{}:1:1: ", path.display()))
                && errors[0].contains("policy.toml:1 has a rule \"main\" already"),
            "{errors:?}"
        );
    }

    #[test]
    fn only_root_writes_a_policy() {
        let Some(setting) = Setting::new() else {
            return;
        };
        let path = setting.write("policy.toml", &rule("main"));
        for mode in [0o664, 0o646, 0o666] {
            allow(&path, mode);
            let errors = setting.load().unwrap_err();
            assert!(errors[0].contains("may write to it"), "{errors:?}");
        }
        allow(&path, 0o600);
        assert!(setting.load().is_ok());
        std::os::unix::fs::chown(&path, Some(7), None).unwrap();
        let errors = setting.load().unwrap_err();
        assert!(errors[0].contains("belongs to user 7"), "{errors:?}");
        std::os::unix::fs::chown(&path, Some(0), None).unwrap();
        allow(setting.0.path(), 0o777);
        assert!(setting.load().is_err());
        allow(setting.0.path(), 0o700);
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        let errors = setting.load().unwrap_err();
        assert!(errors[0].contains("not a regular file"), "{errors:?}");
        std::fs::remove_dir(&path).unwrap();
        // An open of one would fail where there is no terminal.
        std::os::unix::fs::symlink("/dev/tty", &path).unwrap();
        let errors = setting.load().unwrap_err();
        assert!(errors[0].contains("not a regular file"), "{errors:?}");
        std::fs::remove_file(&path).unwrap();
        let odd = OsStr::from_bytes(b"policy.d/\xff.toml");
        std::fs::create_dir(setting.0.path().join("policy.d")).unwrap();
        std::fs::write(setting.0.path().join(odd), "nonsense").unwrap();
        assert!(setting.load().is_err(), "it was left out");
        std::fs::remove_dir_all(setting.0.path().join("policy.d")).unwrap();
        std::fs::write(&path, [b'#', 0xff]).unwrap();
        let errors = setting.load().unwrap_err();
        assert!(errors[0].contains("byte 1 is not UTF-8"), "{errors:?}");
        std::fs::write(&path, vec![b'#'; (1 << 20) + 1]).unwrap();
        assert!(setting.load().unwrap_err()[0].contains("more than"));
    }
}
