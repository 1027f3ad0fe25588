//! Who may pin without the capability: by the guard's policy, for a moment, and
//! from containers.

mod containers;
mod denials;
mod orders;
mod ways;

use crate::world::{BINARY, World, open, patience, written};
use anyhow::{Context, Result, bail};
use libtest_mimic::Trial;
use mapdirect::{Guard, MapOptions, PinOptions, State, Strength};
use mapdirect_sys::signal::{Signal, kill};
use mapdirect_testkit::process::{GuardProcess, Helper, ScratchDirectory, listen, say, wait_for};
use mapdirect_testkit::raw::{self, NOBODY};
use mapdirect_testkit::{Disk, Kind};
use rustix::io::Errno;
use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub fn trials(world: &World) -> Vec<Trial> {
    let mut trials = world.trials(
        "policy",
        &crate::world::kinds(&[Kind::XFS, Kind::EXT4]),
        &[("allows-what-it-says", allows)],
    );
    for (name, run) in [
        ("denials", denials::denials as fn(&World)),
        ("deputies", denials::deputies),
        ("other-names", denials::other_names),
        ("limits", orders::limits),
        ("time-is-over", orders::time_is_over),
        ("read-again", orders::read_again),
        ("armed", orders::armed),
        ("unpin", orders::unpin),
        ("storm", orders::storm),
        ("strength-and-denials", ways::strength_and_denials),
        ("run", ways::run),
        ("next-guard", ways::next_guard),
        ("containers", containers::containers),
        ("nspawn", containers::nspawn),
        ("run-in-container", containers::supervised),
        ("privileged-container", containers::privileged),
    ] {
        trials.push(world.trial(format!("policy::{name}"), run));
    }
    trials
}

/// A guard with a policy, and a directory on a disk that the policy names.
struct Setting {
    guard: GuardProcess,
    policy: ScratchDirectory,
    disk: Arc<Disk>,
    place: PathBuf,
}

impl Setting {
    fn new(world: &World, kind: Kind, name: &str, more: &str) -> Self {
        // The programs of two guards answer for each other's files.
        world.end_guard();
        let disk = world.disk(kind);
        let place = disk.path(&format!("policy-{name}"));
        let _ = std::fs::remove_dir_all(&place);
        std::fs::create_dir(&place).unwrap();
        let policy = ScratchDirectory::new("policy").unwrap();
        allow(policy.path(), 0o755);
        let path = policy.path().join("policy.toml");
        std::fs::write(&path, rule("main", &place, "write", more)).unwrap();
        allow(&path, 0o644);
        let path = path.to_string_lossy().into_owned();
        let guard = GuardProcess::start_with(Path::new(BINARY), &["--policy", &path]).unwrap();
        Self {
            guard,
            policy,
            disk,
            place,
        }
    }

    fn path(&self) -> PathBuf {
        self.policy.path().join("policy.toml")
    }

    /// A file that the policy names.
    fn file(&self, name: &str, mode: u32) -> PathBuf {
        let name = self.place.join(name);
        let name = name.strip_prefix(self.disk.path("")).unwrap();
        let path = written(&self.disk, &name.to_string_lossy(), 65536);
        allow(&path, mode);
        path
    }

    /// A program of a user without any right.
    fn nobody(&self) -> Asking {
        self.asking(&["nobody"])
    }

    fn asking(&self, how: &[&str]) -> Asking {
        let socket = self.guard.socket().to_string_lossy().into_owned();
        let words: Vec<&str> = [socket.as_str()].iter().chain(how).copied().collect();
        Asking::of(Helper::start("asks-by-policy", &words).unwrap())
    }

    /// Has the guard read the policy again, and waits until it has.
    fn read_again(&self, text: &str) -> String {
        std::fs::write(self.path(), text).unwrap();
        let before = self.guard.said().len();
        kill(self.guard.pid(), Signal::HANGUP).unwrap();
        wait_for(patience(), || {
            let said = self.guard.said()[before..].to_owned();
            let over = said.contains("rules;") || said.contains("stays as it was");
            Ok(over.then_some(said))
        })
        .unwrap()
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.place);
    }
}

pub(crate) fn allow(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// A rule for the user without any right.
pub(crate) fn rule(name: &str, place: &Path, access: &str, more: &str) -> String {
    format!(
        "[[rule]]\nname = {name:?}\nusers = [{NOBODY}]\npaths = [{:?}]\naccess = {access:?}\n{more}\n",
        place.to_str().unwrap()
    )
}

/// A program that asks for pins.
struct Asking(Helper);

impl Asking {
    fn of(mut helper: Helper) -> Self {
        assert_eq!(helper.hear().unwrap(), "ready");
        Self(helper)
    }

    fn says(&mut self, order: &str) -> String {
        self.0.tell(order).unwrap();
        self.0.hear().unwrap()
    }

    fn holds(&mut self, how: &str, path: &Path) -> u64 {
        let said = self.says(&format!("{how} {}", path.display()));
        let id = said.strip_prefix("held ");
        let id = id.unwrap_or_else(|| panic!("{how} {}: {said}", path.display()));
        id.parse().unwrap()
    }

    /// It is refused, with this errno, kind and words.
    fn is_refused(&mut self, how: &str, path: &Path, errno: Errno, kind: &str, words: &str) {
        let said = self.says(&format!("{how} {}", path.display()));
        let expected = format!("refused {} {kind} ", errno.raw_os_error());
        assert!(
            said.starts_with(&expected) && said.contains(words),
            "{how} {}: {said}; expected {expected}{words}",
            path.display()
        );
    }
}

/// Role: asks for pins at a socket, as told: as `nobody`, as `root`, or by a
/// descriptor that root `opened` before.
pub fn play_asks(arguments: &[String]) -> Result<()> {
    let [socket, how, rest @ ..] = arguments else {
        bail!("where, and how?");
    };
    let before = match rest.first() {
        Some(path) => Some(File::options().read(true).write(true).open(path)?),
        None => None,
    };
    match how.as_str() {
        "nobody" | "opened" => raw::become_nobody()?,
        "root" => {}
        other => bail!("how is {other}?"),
    }
    let guard = Guard::at(socket.as_str());
    let mut held = Held::default();
    say("ready");
    while let Some(order) = listen()? {
        say(&held.obey(&guard, before.as_ref(), &order)?);
    }
    Ok(())
}

fn ranged() -> PinOptions {
    PinOptions::new().range(0..65536)
}

/// How to pin by a word.
fn options_of(word: &str) -> Option<PinOptions> {
    Some(match word {
        "pin" | "pin-read-only" => ranged(),
        "pin-stable" => ranged().strength(Strength::Stable),
        "pin-growth" => PinOptions::new().strength(Strength::Stable).range_from(0),
        "pin-deny-write" => ranged().deny_write(true),
        "pin-deny-rename" => ranged().deny_rename(true),
        "pin-family" => ranged().family(true),
        _ => return None,
    })
}

fn refusal(error: &mapdirect::Error) -> String {
    format!(
        "refused {} {} {}",
        error.errno(),
        error.kind().key(),
        error.to_string().replace('\n', " ")
    )
}

#[derive(Default)]
struct Held {
    pins: Vec<mapdirect::Pin>,
    maps: Vec<mapdirect::DirectMap>,
}

impl Held {
    fn obey(&mut self, guard: &Guard, before: Option<&File>, order: &str) -> Result<String> {
        let (verb, path) = order.split_once(' ').unwrap_or((order, ""));
        // A file that is pinned already may be opened by whoever may pin it.
        let opened = |write: bool| {
            if write {
                mapdirect::open(path, guard).map_err(|error| {
                    if error.kind() == mapdirect::Kind::System {
                        format!("not opened: {error}").replace('\n', " ")
                    } else {
                        refusal(&error)
                    }
                })
            } else {
                File::open(path).map_err(|error| format!("not opened: {error}"))
            }
        };
        let done = match verb {
            "let-go" => {
                self.pins.clear();
                self.maps.clear();
                return Ok(String::from("gone"));
            }
            "state" => return Ok(self.states()),
            "storm" => return storm(guard, path),
            "pin-opened" => self.pin(guard, before.context("nothing is open")?, ranged()),
            _ => match opened(verb != "pin-read-only") {
                Err(said) => return Ok(said),
                Ok(file) => self.ask(guard, verb, file)?,
            },
        };
        Ok(match done {
            Ok(id) => format!("held {id}"),
            Err(error) => refusal(&error),
        })
    }

    fn ask(&mut self, guard: &Guard, verb: &str, file: File) -> Result<mapdirect::Result<u64>> {
        Ok(match verb {
            "map" => {
                let options = MapOptions::new().accept_page_cache(true).range(0..65536);
                let map = options.patience(patience()).guard(guard.clone()).map(file);
                map.map(|map| {
                    let id = map.pin_id();
                    self.maps.push(map);
                    id
                })
            }
            "open" => Ok(0),
            "give-way" => guard.give_way(&file, 4096..u64::MAX).and_then(|giving| {
                file.set_len(4096).unwrap();
                giving.resume().map(|()| 0)
            }),
            other => {
                let options = options_of(other).with_context(|| format!("what is {other}?"))?;
                self.pin(guard, &file, options)
            }
        })
    }

    fn states(&self) -> String {
        let pins = self.pins.iter().map(mapdirect::Pin::state);
        let states = pins.chain(self.maps.iter().map(mapdirect::DirectMap::state));
        let states: Vec<_> = states
            .map(|state| match state {
                State::Lost { why } => format!("lost: {why}"),
                other => format!("{other:?}"),
            })
            .collect();
        states.join("; ")
    }

    fn pin(&mut self, guard: &Guard, file: &File, options: PinOptions) -> mapdirect::Result<u64> {
        let options = options.patience(patience());
        let pin = options.guard(guard.clone()).pin(file)?;
        let id = pin.pin_id();
        self.pins.push(pin);
        Ok(id)
    }
}

/// Pins and lets go as fast as it can, from many threads, until it is killed.
fn storm(guard: &Guard, path: &str) -> Result<String> {
    for _ in 0..8 {
        let (guard, path) = (guard.clone(), path.to_owned());
        std::thread::spawn(move || {
            loop {
                if let Ok(file) = mapdirect::open(&path, &guard) {
                    let options = PinOptions::new().range(0..65536).guard(guard.clone());
                    drop(options.pin_all(&[&file, &file]));
                }
            }
        });
    }
    Ok(String::from("held 0"))
}

/// A user whom the policy names pins and maps without the capability; nobody can
/// take anything out of the file then, and the status says by which rule.
fn allows(world: &World, kind: Kind) {
    let setting = Setting::new(world, kind, &format!("allows-{kind}"), "");
    let path = setting.file("a", 0o666);
    let mut asking = setting.nobody();
    for how in ["pin", "pin-read-only", "map"] {
        let id = asking.holds(how, &path);
        assert!(crate::world::is_pinned(&path), "{how}");
        assert_eq!(asking.says("state"), "Kept");
        let status = setting.guard.client().status().unwrap();
        let [file] = &status.files[..] else {
            panic!("{status:?}")
        };
        let pin = &file.pins[0];
        assert_eq!(
            (pin.pin, pin.uid, &file.path),
            (id, NOBODY, &path.display().to_string())
        );
        let by = pin.delegated.as_ref().unwrap();
        assert_eq!((&*by.rule, by.left), ("main", None));
        assert_eq!(status.policy.unwrap().rules, 1);
        assert_eq!(asking.says("let-go"), "gone");
        crate::world::wait_until_free(&path);
    }
    // Root, who needs no rule, is in nobody's way.
    let held = crate::world::pin(&setting.guard.client(), &open(&path), 0..65536);
    asking.holds("open", &path);
    drop(held);
    assert_eq!(asking.0.finish().unwrap(), Some(0));
}
