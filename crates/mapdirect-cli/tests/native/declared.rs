//! Pins that a file declares: mapdirect-pins(5).

use crate::world::{BINARY, World, is_pinned, kinds, patience, wait_until_free, written};
use anyhow::{Context, Result};
use libtest_mimic::Trial;
use mapdirect_sys::signal::{Signal, kill};
use mapdirect_testkit::disk::unmount;
use mapdirect_testkit::process::{GuardProcess, Helper, ScratchDirectory, say, wait_for};
use mapdirect_testkit::{Kind, fuse, raw};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub fn trials(world: &World) -> Vec<Trial> {
    world.trials(
        "declared",
        &kinds(&[Kind::XFS, Kind::EXT4]),
        &[
            ("pins", pins),
            ("mistakes", mistakes),
            ("by-strangers", by_strangers),
            ("keepers-killed", keepers_killed),
        ],
    )
}

/// A guard with a file of pins.
pub(crate) struct Declared {
    pub(crate) guard: GuardProcess,
    directory: ScratchDirectory,
}

impl Declared {
    pub(crate) fn start(text: &str) -> Self {
        let directory = ScratchDirectory::new("declared").unwrap();
        let path = directory.path().join("pins.toml");
        std::fs::write(&path, text).unwrap();
        let arguments = ["--pins", path.to_str().unwrap()];
        let guard = GuardProcess::start_with(Path::new(BINARY), &arguments).unwrap();
        Self { guard, directory }
    }

    /// Has the guard read another text.
    pub(crate) fn reload(&self, text: Option<&str>) {
        let path = self.directory.path().join("pins.toml");
        match text {
            Some(text) => std::fs::write(&path, text).unwrap(),
            None => std::fs::remove_file(&path).unwrap(),
        }
        kill(self.guard.pid(), Signal::HANGUP).unwrap();
    }

    pub(crate) fn says(&self, what: &str) {
        wait_for(patience(), || {
            Ok(self.guard.said().contains(what).then_some(()))
        })
        .unwrap_or_else(|_| panic!("not {what:?}: {}", self.guard.said()));
    }

    /// The process that holds the pins.
    pub(crate) fn keeper(&self) -> Option<i32> {
        self.guard.started().into_iter().find(|child| {
            std::fs::read_to_string(format!("/proc/{child}/comm"))
                .is_ok_and(|name| name.trim_end() == "pins.toml")
        })
    }
}

pub(crate) fn becomes_pinned(path: &Path) {
    wait_for(patience(), || Ok(is_pinned(path).then_some(())))
        .unwrap_or_else(|_| panic!("{} is not pinned", path.display()));
}

/// For a while, a file is pinned whenever anybody looks.
pub(crate) fn stays_pinned(path: &Path, limit: Duration) {
    let began = Instant::now();
    while began.elapsed() < limit {
        assert!(is_pinned(path), "after {:?}", began.elapsed());
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub(crate) fn entry(path: &Path, more: &str) -> String {
    format!("[[pin]]\npath = {:?}\n{more}\n", path.display().to_string())
}

/// Keepers that are killed as soon as they are there end no pin.
fn keepers_killed(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "declared-killed", 1 << 20);
    let declared = Declared::start(&entry(&path, ""));
    becomes_pinned(&path);
    // Only then the supervisor has what it lives by.
    declared.says("declared-killed: pinned as");
    let worker = declared.guard.worker().unwrap();
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(3) {
        for child in declared.guard.started() {
            if child != worker {
                // It may be gone already.
                let _ = kill(child, Signal::KILL);
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    stays_pinned(&path, Duration::from_secs(2));
    wait_for(patience(), || Ok(declared.keeper())).unwrap();
    drop(declared);
    std::fs::remove_file(&path).unwrap();
}

/// They are taken at the start and when there is something to take, and outlive
/// whoever takes them.
fn pins(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let [first, second, late]: [PathBuf; 3] =
        ["first", "second", "late"].map(|name| disk.path(&format!("declared-{name}")));
    for name in ["first", "second"] {
        written(&disk, &format!("declared-{name}"), 1 << 20);
    }
    let text = entry(&first, "") + &entry(&late, "strength = 'stable'");
    let declared = Declared::start(&text);
    becomes_pinned(&first);
    declared.says("declared-late: not pinned: No such file");
    // Whose they are can be seen.
    let status = declared.guard.client().status().unwrap();
    let keeper = declared.keeper().unwrap();
    let [file] = &status.files[..] else {
        panic!("{:?}", status.files);
    };
    assert_eq!(file.pins[0].pid, keeper);
    let holder = file.holders.iter().find(|holder| holder.pid == keeper);
    assert_eq!(holder.unwrap().command, "pins.toml");
    // What comes later is taken then.
    written(&disk, "declared-late", 1 << 20);
    becomes_pinned(&late);
    // The guard is killed, and the keeper.
    kill(declared.guard.worker().unwrap(), Signal::KILL).unwrap();
    stays_pinned(&first, Duration::from_millis(700));
    kill(keeper, Signal::KILL).unwrap();
    stays_pinned(&first, Duration::from_millis(700));
    wait_for(patience(), || {
        Ok(declared
            .keeper()
            .is_some_and(|now| now != keeper)
            .then_some(()))
    })
    .unwrap();
    stays_pinned(&first, Duration::from_millis(500));
    assert!(is_pinned(&late));
    // Others take their place.
    declared.reload(Some(
        &(entry(&second, "length = '64K'") + &entry(&late, "strength = 'stable'")),
    ));
    becomes_pinned(&second);
    wait_until_free(&first);
    declared.says("declares 2 (before: 2)");
    assert!(is_pinned(&late));
    // One that is being granted is not shown yet.
    let mut known = wait_for(patience(), || {
        let files = declared.guard.client().status()?.files;
        Ok((files.len() == 2).then_some(files))
    })
    .unwrap();
    known.sort_by_key(|file| file.path.clone());
    assert_eq!(known[1].pins[0].range, 0..65536);
    // None at all.
    declared.reload(None);
    wait_until_free(&second);
    wait_until_free(&late);
    wait_for(patience(), || Ok(declared.keeper().is_none().then_some(()))).unwrap();
    // And some again.
    declared.reload(Some(&entry(&first, "scope = 'file'")));
    becomes_pinned(&first);
    drop(declared);
    wait_until_free(&first);
    for path in [first, second, late] {
        std::fs::remove_file(path).unwrap();
    }
}

/// No mistake in the file keeps the guard from starting, or ends a pin.
fn mistakes(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "declared-mistakes", 1 << 20);
    let declared = Declared::start(&entry(&path, "lenght = 5"));
    declared.says("pins.toml:3:1: unknown field `lenght`");
    assert!(!is_pinned(&path));
    assert!(declared.guard.client().status().is_ok());
    declared.reload(Some(&entry(&path, "length = '8K'")));
    becomes_pinned(&path);
    declared.reload(Some("pins"));
    declared.says("declared pins stay as they were");
    assert!(is_pinned(&path));
    drop(declared);
    wait_until_free(&path);
    std::fs::remove_file(path).unwrap();
}

/// A directory in which nobody learns what is there.
struct Served {
    server: Option<Helper>,
    directory: ScratchDirectory,
}

impl Served {
    fn start() -> Self {
        let directory = ScratchDirectory::new("served").unwrap();
        let arguments = [directory.path().to_str().unwrap()];
        let mut server = Helper::start("declared-server", &arguments).unwrap();
        assert_eq!(server.hear().unwrap(), "serving");
        Self {
            server: Some(server),
            directory,
        }
    }

    /// Ends the server: whoever waits is let go.
    fn end(&mut self) {
        if let Some(server) = self.server.take() {
            server.kill().unwrap();
            unmount(self.directory.path()).unwrap();
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.end();
    }
}

/// Role: answers everything by FUSE, but where a name leads to. Argument: where.
pub fn play(arguments: &[String]) -> Result<()> {
    let [directory] = arguments else {
        anyhow::bail!("wrong arguments");
    };
    raw::die_with_parent();
    let server = fuse::mount(Path::new("/dev/fuse"), Path::new(directory))
        .context("the server of a stranger")?;
    say("serving");
    fuse::serve(&server, fuse::Unanswered::Lookup, || {});
    Ok(())
}

/// Whoever has a directory on the way to a declared file leads nobody elsewhere,
/// and keeps no other pin waiting, nor alive.
fn by_strangers(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let path = written(&disk, "declared-by-strangers", 1 << 20);
    let link = disk.path("declared-link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let mut served = Served::start();
    let text = entry(&served.directory.path().join(fuse::FILE), "")
        + &entry(&link, "")
        + &entry(Path::new("/dev/null"), "")
        + &entry(&path, "length = '8K'");
    let mut declared = Declared::start(&text);
    declared.says("a filesystem on the way to it does not answer");
    declared.says("declared-link: not pinned: a part of its path is a symbolic link");
    declared.says("/dev/null: not pinned: it is no regular file");
    becomes_pinned(&path);
    // It goes on doing what it is told.
    let some = entry(&served.directory.path().join(fuse::FILE), "");
    declared.reload(Some(&some));
    wait_until_free(&path);
    declared.reload(Some(&text));
    becomes_pinned(&path);
    // And ends, with everything that is pinned.
    kill(declared.guard.pid(), Signal::TERMINATE).unwrap();
    wait_until_free(&path);
    served.end();
    assert_eq!(declared.guard.terminate().unwrap(), Some(0));
    for path in [path, link] {
        std::fs::remove_file(path).unwrap();
    }
}
