//! Section 10 of the contract: strangers without privilege, busy with files of
//! their own, keep nobody from pinning, and keep no pin alive.

use crate::world::{
    BINARY, World, is_emulated, is_inside, kinds, map, open, pin, wait_until_free, written,
};
use anyhow::{Context, Result, bail};
use libtest_mimic::Trial;
use mapdirect::{Guard, Kind as Reason, Pin, PinOptions};
use mapdirect_sys::fanotify::{Group, Mask};
use mapdirect_sys::fcntl::{self, HeldLease, LockKind, LockOwner};
use mapdirect_sys::unix::Socket;
use mapdirect_sys::{Errno, proc};
use mapdirect_testkit::contract::Gate;
use mapdirect_testkit::disk::run;
use mapdirect_testkit::fuse::{self, Unanswered};
use mapdirect_testkit::process::{Background, GuardProcess, Helper, listen, say, wait_for};
use mapdirect_testkit::{Disk, Kind, raw};
use rustix::process::{Resource, getrlimit, setrlimit};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

pub fn trials(world: &World) -> Vec<Trial> {
    let mut trials = world.trials(
        "strangers",
        &kinds(&[Kind::XFS, Kind::EXT4]),
        &[
            ("in-their-own-lease", in_their_own_lease),
            ("before-an-empty-pipe", before_an_empty_pipe),
            ("send-from-an-empty-pipe", send_from_an_empty_pipe),
            ("copying-to-nowhere", copying_to_nowhere),
            ("unanswered-setattr", unanswered_setattr),
            ("a-listener-that-stopped", a_listener_that_stopped),
            ("locks-of-readers", locks_of_readers),
            ("locks-of-readers-read-only", locks_of_readers_read_only),
            ("truncate-to-the-same-size", truncate_to_the_same_size),
            ("two-at-once", two_at_once),
        ],
    );
    trials.push(world.trial("strangers::loop-device-as-it-is", loop_device_as_it_is));
    trials
}

/// Those that make whoever looks at all processes wait.
pub fn alone(world: &World) -> Vec<Trial> {
    // A descriptor in flight anywhere may be one of a file that readers have
    // open, too.
    let many = kinds(&[Kind::XFS, Kind::EXT4]);
    let mut trials = world.trials(
        "strangers",
        &many,
        &[("many-descriptors", many_descriptors)],
    );
    trials.push(world.trial("strangers::unanswered-flush", unanswered_flush));
    trials
}

/// A stranger at work.
fn stranger(arguments: &[&str]) -> Helper {
    let mut helper = Helper::start("stranger", arguments).unwrap();
    assert_eq!(helper.hear().unwrap(), "ready");
    helper
}

/// A directory on the disk where everybody may make files.
fn place(disk: &Disk, name: &str) -> PathBuf {
    let path = disk.path(name);
    std::fs::create_dir(&path).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)).unwrap();
    path
}

/// Role: a stranger. What it does is the first argument.
pub fn play_stranger(arguments: &[String]) -> Result<()> {
    let Some((what, rest)) = arguments.split_first() else {
        bail!("what to do?");
    };
    raw::become_nobody()?;
    let path = PathBuf::from(rest.first().map_or("", String::as_str));
    match what.as_str() {
        "lease" => play_lease(&path),
        "splice" => play_pipe(&path, false),
        "sendfile" => play_pipe(&path, true),
        "copy" => play_copy(),
        "descriptors" => play_descriptors(&path),
        "setattr" => play_fuse(&path, rest, Unanswered::Setattr),
        "flush" => play_fuse(&path, rest, Unanswered::Flush),
        "truncate" => play_truncate(&path),
        "truncate-once" => {
            std::thread::spawn(move || raw::truncate(&raw::c_path(&path), 1));
            wait_to_end()
        }
        "lock" => play_lock(&path, rest),
        other => bail!("what is {other}?"),
    }
}

fn wait_to_end() -> Result<()> {
    say("ready");
    listen()?;
    // Threads that hang are ended with the process.
    std::process::exit(0);
}

fn wait_until_in(function: &'static str) -> Result<()> {
    let own = std::process::id().cast_signed();
    // Stacks are root's to read, the function slept in is one's own.
    wait_for(Duration::from_secs(10), || {
        let threads = proc::numbers_in(&format!("/proc/{own}/task"))?;
        let sleeps =
            |tid: &i32| matches!(proc::sleeps_in(*tid), Ok(Some(name)) if name.contains(function));
        Ok(threads.iter().any(sleeps).then_some(()))
    })
}

/// Asks for a pin with some patience, more where processors are emulated.
fn ask(guard: &Guard, file: &File, patience: Duration) -> mapdirect::Result<Pin> {
    let patience = if is_emulated() {
        Duration::from_secs(20)
    } else {
        patience
    };
    PinOptions::new()
        .range(0..65536)
        .patience(patience)
        .guard(guard.clone())
        .pin(file)
}

/// Pins granted and refused while a stranger is at it.
fn pins_are_granted(world: &World, guard: &Guard, path: &Path) {
    let held = world.guard().pid() > 0;
    assert!(held);
    for round in 0..3 {
        let file = if round == 1 {
            File::open(path).unwrap()
        } else {
            open(path)
        };
        let pinned = ask(guard, &file, Duration::from_secs(2));
        drop(pinned.unwrap_or_else(|error| panic!("round {round}: {error:#}")));
        drop(file);
        wait_until_free(path);
    }
    // Where readers do no harm they are let be: that is proven by looking.
    let reader = File::open(path).unwrap();
    let child = Background::spawn(Command::new("sleep").arg("60").stdin(reader)).unwrap();
    let file = open(path);
    let pinned = ask(guard, &file, Duration::from_secs(2));
    match pinned {
        Ok(pinned) => drop(pinned),
        Err(error) => {
            assert_eq!(error.kind(), Reason::OpenElsewhere, "{error:#}");
            let [opener] = error.openers() else {
                panic!("exactly one: {error:#}");
            };
            assert_eq!((&*opener.command, opener.writable), ("sleep", false));
        }
    }
    drop((child, file));
    wait_until_free(path);
}

fn while_stranger(world: &World, kind: Kind, name: &str, arguments: &[&str]) {
    let disk = world.disk(kind);
    let path = written(&disk, &format!("strangers-{name}"), 1 << 20);
    let place = place(&disk, &format!("strangers-{name}-place"));
    let own = place.join("own");
    let own = own.to_str().unwrap();
    let mut all = arguments.to_vec();
    all.push(own);
    let stranger = stranger(&all);
    pins_are_granted(world, &world.guard().client(), &path);
    stranger.kill().unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::remove_dir_all(&place).unwrap();
}

/// A truncation waits for a lease on the file, 45 seconds long.
fn in_their_own_lease(world: &World, kind: Kind) {
    while_stranger(world, kind, "lease", &["lease"]);
}

fn play_lease(path: &Path) -> Result<()> {
    std::fs::write(path, [1; 4096])?;
    mapdirect_sys::signal::ignore(libc::SIGIO)?;
    let file = File::open(path)?;
    let lease = HeldLease::take(file.as_fd())?.context("no lease")?;
    let target = raw::c_path(path);
    std::thread::spawn(move || raw::truncate(&target, 0));
    let target = path.to_owned();
    std::thread::spawn(move || File::options().write(true).open(target));
    wait_until_in("break_lease")?;
    std::mem::forget(lease);
    wait_to_end()
}

/// splice(2) into a file, from a pipe that nobody writes to.
fn before_an_empty_pipe(world: &World, kind: Kind) {
    while_stranger(world, kind, "splice", &["splice"]);
}

/// sendfile(2) into a pipe that nobody reads from, and into a file.
fn send_from_an_empty_pipe(world: &World, kind: Kind) {
    while_stranger(world, kind, "sendfile", &["sendfile"]);
}

fn play_pipe(path: &Path, sends: bool) -> Result<()> {
    std::fs::write(path, vec![1; 1 << 20])?;
    let file = open(path);
    let (reader, writer) = std::io::pipe()?;
    say("ready");
    if sends {
        let mut sent = 0;
        while sent < 1 << 20 {
            sent += rustix::fs::sendfile(&writer, &file, None, 1 << 20)?;
        }
    } else {
        let flags = rustix::pipe::SpliceFlags::empty();
        rustix::pipe::splice(&reader, None, &file, None, 4096, flags)?;
    }
    drop((reader, writer));
    bail!("the pipe was not empty")
}

/// Threads that are inside of the kernel nearly all of the time.
fn copying_to_nowhere(world: &World, kind: Kind) {
    while_stranger(world, kind, "copy", &["copy"]);
}

fn play_copy() -> Result<()> {
    std::thread::spawn(|| {
        let mut zeros = File::open("/dev/zero")?;
        let mut nowhere = File::options().write(true).open("/dev/null")?;
        let mut bytes = vec![0; 256 << 20];
        loop {
            zeros.read_exact(&mut bytes)?;
            nowhere.write_all(&bytes)?;
            if bytes.is_empty() {
                return std::io::Result::Ok(());
            }
        }
    });
    wait_to_end()
}

/// A process with many descriptors, and one in flight.
fn many_descriptors(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let guard = world.guard();
    let path = written(&disk, "strangers-many", 1 << 20);
    let other = written(&disk, "strangers-many-other", 1 << 20);
    let held = open(&other);
    let first = pin(&guard.client(), &held, 0..4096);
    let stranger = stranger(&["descriptors", other.to_str().unwrap()]);
    // Others ask for the status meanwhile: that takes its time.
    let client = guard.client();
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            for _ in 0..3 {
                client.status().unwrap();
            }
        });
        for _ in 0..5 {
            let file = open(&path);
            let pinned = ask(&guard.client(), &file, Duration::from_millis(500));
            drop(pinned.unwrap_or_else(|error| panic!("{error:#}")));
            drop(file);
            wait_until_free(&path);
        }
        asking.join().unwrap();
    });
    stranger.kill().unwrap();
    drop((first, held));
    for path in [path, other] {
        wait_until_free(&path);
        std::fs::remove_file(&path).unwrap();
    }
}

fn play_descriptors(path: &Path) -> Result<()> {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit)?;
    let (one, other) = Socket::pair()?;
    one.send(&[b"x"], &[File::open("/dev/null")?.as_fd()])?;
    let most = limit
        .maximum
        .unwrap_or(20_000)
        .saturating_sub(50)
        .min(20_000);
    let files: Vec<File> = (0..most)
        .map(|_| File::open(path))
        .collect::<std::io::Result<_>>()?;
    std::mem::forget((files, one, other));
    wait_to_end()
}

/// Somebody without privilege, who is root in a user namespace of his own and
/// mounts a filesystem that he serves himself.
fn stranger_with_fuse(what: &str, place: &fuse::Place) -> Option<Helper> {
    let (directory, node) = (place.directory(), place.node());
    let arguments = [what, directory.to_str()?, node.to_str()?];
    let mut helper = Helper::start("stranger", &arguments).ok()?;
    match helper.hear() {
        Ok(line) if line == "ready" => Some(helper),
        _ => None,
    }
}

/// A FUSE filesystem that never answers `SETATTR`.
fn unanswered_setattr(world: &World, kind: Kind) {
    let path = written(&world.disk(kind), "strangers-setattr", 1 << 20);
    let place = fuse::Place::new().unwrap();
    let Some(stranger) = stranger_with_fuse("setattr", &place) else {
        world.unavailable(String::from("FUSE in a user namespace"));
        std::fs::remove_file(&path).unwrap();
        return;
    };
    pins_are_granted(world, &world.guard().client(), &path);
    stranger.kill().unwrap();
    std::fs::remove_file(&path).unwrap();
}

/// A FUSE filesystem that never answers `FLUSH`, and a process whose
/// descriptor of it is closed by execve(2).
fn unanswered_flush(world: &World) {
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let path = written(&world.disk(Kind::EXT4), "strangers-flush", 1 << 20);
    let place = fuse::Place::new().unwrap();
    let Some(stranger) = stranger_with_fuse("flush", &place) else {
        world.unavailable(String::from("FUSE in a user namespace"));
        std::fs::remove_file(&path).unwrap();
        return;
    };
    let begun = Instant::now();
    pins_are_granted(world, &guard.client(), &path);
    let took = begun.elapsed();
    stranger.kill().unwrap();
    assert!(took < Duration::from_secs(10), "{took:?}");
    std::fs::remove_file(&path).unwrap();
}

/// Serves a FUSE filesystem with one file, and never answers one kind of
/// request, which it makes itself.
fn play_fuse(directory: &Path, rest: &[String], unanswered: Unanswered) -> Result<()> {
    let node = rest.get(1).context("no node")?;
    raw::own_mapped_mount_namespace()?;
    let mut server = Some(fuse::mount(Path::new(node), directory)?);
    let file = directory.join(fuse::FILE);
    // In a process of its own: the filesystem ends when its server does.
    raw::fork(|| {
        drop(server.take());
        raw::die_with_parent();
        if unanswered == Unanswered::Setattr {
            let _ = raw::truncate(&raw::c_path(&file), 10);
        } else if let Ok(_marked_close_on_exec) = File::open(&file) {
            let _ = Command::new("true").exec();
        }
        1
    })?;
    let server = server.context("no server")?;
    let mut told = false;
    fuse::serve(&server, unanswered, || {
        // Further questions are no news.
        if !std::mem::replace(&mut told, true) {
            std::thread::spawn(|| {
                let _ = wait_to_end();
            });
        }
    });
    Ok(())
}

/// Another listener is asked for permission on a stranger's file, and has
/// stopped answering.
fn a_listener_that_stopped(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let path = written(&disk, "strangers-listener", 1 << 20);
    let own = written(&disk, "strangers-listened-to", 4096);
    std::fs::set_permissions(&own, std::fs::Permissions::from_mode(0o666)).unwrap();
    let Ok(group) = Group::pre_content() else {
        world.unavailable(String::from("permission events before content"));
        std::fs::remove_file(&path).unwrap();
        return;
    };
    let mask = Mask::from_bits(Mask::OPEN_PERM.bits() | Mask::PRE_ACCESS.bits());
    group.add(mask, File::open(&own).unwrap().as_fd()).unwrap();
    let stranger = stranger(&["truncate-once", own.to_str().unwrap()]);
    let asked = wait_for(Duration::from_secs(10), || {
        Ok(is_inside(stranger.pid(), "fanotify_handle_event").then_some(()))
    });
    if asked.is_err() {
        world.unavailable(String::from("a listener that is asked about truncations"));
    } else {
        pins_are_granted(world, &world.guard().client(), &path);
    }
    drop(group);
    stranger.kill().unwrap();
    for path in [path, own] {
        std::fs::remove_file(&path).unwrap();
    }
}

/// Readers lock the very byte that tells of a pin, and all others.
fn locks_of_readers(world: &World, kind: Kind) {
    locks_keep_no_pin(world, kind, "map");
}

fn locks_of_readers_read_only(world: &World, kind: Kind) {
    locks_keep_no_pin(world, kind, "pin");
}

/// Says so when it is dropped, after a panic as well: who waits for it would
/// wait for ever.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

fn locks_keep_no_pin(world: &World, kind: Kind, how: &str) {
    let disk = world.disk(kind);
    let guard = world.guard();
    for (round, whose) in ["byte", "end", "all", "process"].into_iter().enumerate() {
        let path = written(&disk, &format!("strangers-lock-{how}-{whose}"), 1 << 20);
        let file = how == "map";
        let file = file.then(|| open(&path));
        let client = guard.client();
        let held = file.as_ref().map(|file| map(&client, file, 0..65536));
        let reader = File::open(&path).unwrap();
        let pinned = held.is_none().then(|| pin(&client, &reader, 0..65536));
        let id = client.pinned_ranges(&reader).unwrap()[0].pin.to_string();
        let mut reading = stranger(&["lock", path.to_str().unwrap(), &id, whose]);
        // Nothing that is locked ends a pin, either.
        let refused = || match Gate::under_test() {
            Gate::Fanotify => File::options().write(true).open(&path).is_err(),
            Gate::Bpf => crate::world::is_pinned(&path),
        };
        assert!(refused(), "{whose}: it is pinned");
        std::thread::sleep(Duration::from_millis(100));
        assert!(refused(), "{whose}: it is still pinned");
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let _over = Over(&over);
            // To ask for leave to write, again and again, keeps nothing alive,
            // either.
            scope.spawn(|| {
                while !over.load(SeqCst) {
                    let _ = File::options().write(true).open(&path);
                }
            });
            if round % 2 == 0 {
                // The one who was let in to write may let go before or after.
                drop(file);
                drop((held, pinned));
            } else {
                drop((held, pinned));
                drop(file);
            }
            wait_until_free(&path);
        });
        assert!(client.pinned_ranges(&reader).unwrap().is_empty());
        reading.tell("end").unwrap();
        drop((reading, reader));
        std::fs::remove_file(&path).unwrap();
    }
}

fn play_lock(path: &Path, rest: &[String]) -> Result<()> {
    let [_, id, whose] = rest else {
        bail!("wrong arguments");
    };
    let byte = (1 << 62) + id.parse::<u64>()?;
    let file = File::open(path)?;
    let shared = LockKind::Shared;
    let (owner, start, length) = match whose.as_str() {
        "byte" => (LockOwner::Description, byte, 1),
        "end" => (LockOwner::Description, byte - 5, 0),
        "all" => (LockOwner::Description, 0, 0),
        _ => (LockOwner::Process, byte, 1),
    };
    fcntl::set_lock(file.as_fd(), owner, shared, start, length)?;
    std::mem::forget(file);
    wait_to_end()
}

/// Somebody who may write truncates the file to the size it has, again and
/// again: that is allowed, and in nobody's way.
fn truncate_to_the_same_size(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let guard = world.guard();
    let path = written(&disk, "strangers-same-size", 1 << 20);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
    let mut stranger = stranger(&["truncate", path.to_str().unwrap()]);
    let mut refused = Vec::new();
    let tries = if is_emulated() { 3 } else { 12 };
    for _ in 0..tries {
        let file = File::open(&path).unwrap();
        let pinned = ask(&guard.client(), &file, Duration::from_secs(2));
        match pinned {
            Ok(pinned) => drop(pinned),
            Err(error) => refused.push(format!("{error:#}")),
        }
        drop(file);
        std::thread::sleep(Duration::from_millis(20));
    }
    stranger.tell("end").unwrap();
    let longest: u64 = stranger.hear().unwrap().parse().unwrap();
    drop(stranger);
    assert!(
        refused.is_empty(),
        "{} of {tries}: {refused:?}",
        refused.len()
    );
    if !is_emulated() {
        assert!(longest < 1000, "a truncation took {longest} ms");
    }
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

fn play_truncate(path: &Path) -> Result<()> {
    let target = raw::c_path(path);
    let size = std::fs::metadata(path)?.len();
    let (tell, told) = std::sync::mpsc::channel::<()>();
    let truncating = std::thread::spawn(move || {
        let mut longest = Duration::ZERO;
        while told.recv_timeout(Duration::from_millis(10))
            == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
        {
            let begun = Instant::now();
            let result = raw::truncate(&target, size);
            longest = longest.max(begun.elapsed());
            assert!(matches!(result, Ok(()) | Err(Errno::TXTBSY)), "{result:?}");
        }
        longest
    });
    say("ready");
    listen()?;
    drop(tell);
    let longest = truncating
        .join()
        .map_err(|_| anyhow::anyhow!("it failed"))?;
    say(&longest.as_millis().to_string());
    Ok(())
}

/// Two processes that have the same file open ask for a pin of it at the same
/// time, and both get it.
fn two_at_once(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let guard = world.guard();
    let path = written(&disk, "strangers-two", 1 << 20);
    let socket = guard.socket().to_str().unwrap().to_owned();
    let file = path.to_str().unwrap();
    for modes in [["read", "read"], ["write", "read"], ["write", "write"]] {
        for round in 0..if is_emulated() { 2 } else { 5 } {
            let mut both = modes.map(|mode| {
                let mut one = Helper::start("asks", &[&socket, file, mode]).unwrap();
                assert_eq!(one.hear().unwrap(), "ready");
                one
            });
            for one in &mut both {
                one.tell("go").unwrap();
            }
            let answers = both.each_mut().map(|one| one.hear().unwrap());
            let all = answers.iter().all(|answer| answer == "granted");
            assert!(all, "{modes:?} {round}: {answers:?}");
            // And each is a pin of its own.
            let [mut first, mut second] = both;
            first.tell("end").unwrap();
            assert_eq!(first.finish().unwrap(), Some(0));
            assert!(crate::world::is_pinned(&path));
            second.tell("end").unwrap();
            assert_eq!(second.finish().unwrap(), Some(0));
            wait_until_free(&path);
        }
    }
    std::fs::remove_file(&path).unwrap();
}

/// Role: opens a file, and pins it when it is told to. Arguments: socket, path,
/// `read` or `write`.
pub fn play_asks(arguments: &[String]) -> Result<()> {
    let [socket, path, mode] = arguments else {
        bail!("wrong arguments");
    };
    let file = File::options()
        .read(true)
        .write(mode == "write")
        .open(path)?;
    say("ready");
    listen()?;
    let pinned = ask(&Guard::at(socket), &file, Duration::from_secs(2));
    match &pinned {
        Ok(_) => say("granted"),
        Err(error) => say(&format!("{error:#}").replace('\n', " ")),
    }
    listen()?;
    drop(pinned);
    Ok(())
}

/// A loop device is listed for what it may do.
fn loop_device_as_it_is(world: &World) {
    let disk = world.disk(Kind::XFS);
    let guard = world.guard().client();
    for (read_only, how) in [(true, "--read-only"), (false, "--show")] {
        let path = written(&disk, "strangers-loop", 1 << 20);
        let made = Command::new("losetup")
            .args(["--find", "--show", how])
            .arg(&path)
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        let device = String::from_utf8(made.stdout).unwrap();
        let error = PinOptions::new()
            .range(0..65536)
            .patience(Duration::from_millis(20))
            .guard(guard.clone())
            .pin(File::open(&path).unwrap());
        let _ = run(Command::new("losetup").arg("-d").arg(device.trim_end()));
        let error = error.unwrap_err();
        let listed: Vec<_> = error
            .openers()
            .iter()
            .filter(|opener| opener.pid == 0)
            .collect();
        let [opener] = &listed[..] else {
            panic!("exactly one: {error:#}");
        };
        assert_eq!(opener.writable, !read_only, "{how}: {error:#}");
        wait_until_free(&path);
        std::fs::remove_file(&path).unwrap();
    }
}
