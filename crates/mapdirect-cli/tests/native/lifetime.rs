//! Section 5 of the contract: how long a pin lasts.

use crate::world::{BINARY, World, is_pinned, kinds, map, open, pin, wait_until_free, written};
use anyhow::{Context, Result, bail};
use libtest_mimic::Trial;
use mapdirect::{DirectMap, Guard, MapOptions, Pin, PinOptions, State};
use mapdirect_sys::Errno;
use mapdirect_testkit::contract::Gate;
use mapdirect_testkit::process::{GuardProcess, Helper, listen, say, wait_for};
use mapdirect_testkit::{Disk, Kind, raw};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

pub fn trials(world: &World) -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(world.trials(
        "lifetime",
        &kinds(&[Kind::XFS, Kind::EXT4]),
        &[
            ("unmap", unmap),
            ("parts", parts),
            ("close", close),
            ("fork-parent-first", fork_parent_first),
            ("fork-child-first", fork_child_first),
            ("exec", exec),
            ("sigkill", sigkill),
            ("pin-sigkill", pin_sigkill),
            ("unlinked", unlinked),
            ("renamed", renamed),
            ("union", union),
            ("two-holders", two_holders),
            ("announced-writer", announced_writer),
            ("many-files", many_files),
            ("unmount-at-once", unmount_at_once),
            ("again-and-again", again_and_again),
            ("late-guard", late_guard),
            ("opened-as-it-ends", opened_as_it_ends),
            ("guard-killed", guard_killed),
            ("guard-ended", guard_ended),
            ("whole-file", whole_file),
        ],
    ));
    trials
}

/// Who opens the file while a pin comes or goes is let in or gets ETXTBSY, and
/// nothing else: the guard takes leases then, which the kernel must not meet
/// when it makes a descriptor for the gate.
fn opened_as_it_ends(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = written(&world.disk(kind), "opened-as-it-ends", 8192);
    let over = AtomicBool::new(false);
    let opened = std::thread::scope(|scope| {
        let opener = scope.spawn(|| {
            let mut counts = (0u32, 0u32);
            while !over.load(SeqCst) {
                match File::options().write(true).open(&path) {
                    Ok(_) => counts.0 += 1,
                    Err(error) => {
                        let busy = std::io::ErrorKind::ExecutableFileBusy;
                        assert_eq!(error.kind(), busy, "after {counts:?}: {error}");
                        counts.1 += 1;
                    }
                }
                // The pin needs a moment without anybody.
                std::thread::sleep(Duration::from_micros(300));
            }
            counts
        });
        let until = Instant::now() + Duration::from_secs(3);
        while Instant::now() < until && !opener.is_finished() {
            let Ok(file) = File::open(&path) else {
                continue;
            };
            let options = PinOptions::new().range(0..4096).guard(guard.client());
            drop(options.patience(Duration::from_millis(50)).pin(&file));
        }
        over.store(true, SeqCst);
        opener.join().unwrap()
    });
    world.count(
        "opens while pins came and went",
        (opened.0 + opened.1).into(),
    );
    // Where operations are judged nobody is kept from opening it.
    let refuses = Gate::under_test() == Gate::Fanotify;
    assert!(opened.0 > 0 && (opened.1 > 0) == refuses, "{opened:?}");
}

/// Role: maps or pins a range and does as it is told. Arguments: socket,
/// path, offset, length, `map`, `read` or `pin`.
pub fn play_holder(arguments: &[String]) -> Result<()> {
    let [socket, path, offset, length, how] = arguments else {
        bail!("wrong arguments");
    };
    let guard = Guard::at(socket);
    // A pin without a mapping needs no more than reading.
    let mut file = Some(File::options().read(true).write(how == "map").open(path)?);
    let start: u64 = offset.parse()?;
    let range = start..start + length.parse::<u64>()?;
    let opened = file.as_ref().context("just opened")?;
    let mut map: Option<DirectMap> = None;
    let mut pin: Option<Pin> = None;
    let patience = Duration::from_secs(2);
    if how == "map" {
        let options = MapOptions::new().range(range).accept_page_cache(true);
        map = Some(options.patience(patience).guard(guard).map(opened)?);
    } else if how == "read" {
        let options = MapOptions::new().range(range).read_only(true);
        map = Some(options.patience(patience).guard(guard).map(opened)?);
    } else {
        let options = PinOptions::new().range(range).patience(patience);
        pin = Some(options.guard(guard).pin(opened)?);
    }
    say("held");
    while let Some(order) = listen()? {
        match order.as_str() {
            "close" => drop(file.take()),
            "unmap" => map = None,
            "unpin" => pin = None,
            "unmap-first-page" => {
                let map = map.as_ref().context("not mapped")?;
                // SAFETY: nothing in this process uses that page.
                unsafe { raw::munmap(map.as_ptr() as usize, 4096) }?;
            }
            "unmap-rest" => {
                let map = map.take().context("not mapped")?;
                let (start, length) = (map.as_ptr() as usize, map.len());
                std::mem::forget(map);
                // SAFETY: as above.
                unsafe { raw::munmap(start + 4096, length - 4096) }?;
            }
            "fork" => {
                // The child keeps everything it inherited until it is killed.
                let child = raw::fork(|| {
                    loop {
                        std::thread::sleep(Duration::from_secs(3600));
                    }
                })?;
                say(&child.to_string());
                continue;
            }
            "exec" => {
                say("done");
                let error = Command::new("sleep").arg("3600").exec();
                bail!("exec: {error}");
            }
            "status" => {
                let state = map
                    .as_ref()
                    .map(DirectMap::state)
                    .or(pin.as_ref().map(Pin::state));
                say(match state {
                    Some(State::Kept) => "kept",
                    Some(State::Unattended { .. }) => "unattended",
                    Some(State::Lost { .. }) => "lost",
                    _ => "no pin",
                });
                continue;
            }
            "store" => {
                let map = map.as_ref().context("not mapped")?;
                map.write_all_at(&[9], map.len() - 1)?;
            }
            other => bail!("what is {other}?"),
        }
        say("done");
    }
    Ok(())
}

/// A process that holds a pin, and does as it is told.
pub(crate) struct Holder(Helper);

impl Holder {
    pub(crate) fn start(
        guard: &GuardProcess,
        path: &Path,
        offset: u64,
        length: u64,
        how: &str,
    ) -> Self {
        let mut helper = Helper::start(
            "hold",
            &[
                &guard.socket().to_string_lossy(),
                &path.to_string_lossy(),
                &offset.to_string(),
                &length.to_string(),
                how,
            ],
        )
        .unwrap();
        assert_eq!(helper.hear().unwrap(), "held");
        Self(helper)
    }

    /// Ends it with SIGKILL.
    pub(crate) fn kill(self) {
        self.0.kill().unwrap();
    }

    pub(crate) fn order(&mut self, order: &str) -> String {
        self.0.tell(order).unwrap();
        self.0.hear().unwrap()
    }
}

fn subject(world: &World, kind: Kind, name: &str) -> (std::sync::Arc<Disk>, std::path::PathBuf) {
    let disk = world.disk(kind);
    let path = written(&disk, &format!("lifetime-{name}"), 1 << 20);
    (disk, path)
}

/// How soon others see that a pin has ended, by the clock of the test.
pub(crate) fn freed_at_once(path: &Path) {
    // The refusal itself looks whether the pin still lives. Only a child that another
    // thread of the tests is just making has all descriptors, until execve(2).
    let until = Instant::now() + Duration::from_secs(1);
    while is_pinned(path) {
        assert!(Instant::now() < until, "{} is still pinned", path.display());
    }
}

fn unmap(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "unmap");
    let guard = world.guard();
    let file = open(&path);
    let held = map(&guard.client(), &file, 0..65536);
    assert!(is_pinned(&path));
    drop(file);
    held.unmap().unwrap();
    freed_at_once(&path);
    std::fs::remove_file(&path).unwrap();
}

fn parts(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "parts");
    let mut holder = Holder::start(&world.guard(), &path, 0, 65536, "map");
    holder.order("close");
    holder.order("unmap-first-page");
    assert!(is_pinned(&path), "a partial munmap keeps the rest");
    holder.order("unmap-rest");
    freed_at_once(&path);
    std::fs::remove_file(&path).unwrap();
}

fn close(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "close");
    let mut holder = Holder::start(&world.guard(), &path, 0, 65536, "map");
    holder.order("close");
    assert!(is_pinned(&path), "closing descriptors changes nothing");
    holder.order("store");
    holder.order("unmap");
    freed_at_once(&path);
    std::fs::remove_file(&path).unwrap();
}

pub(crate) fn fork(holder: &mut Holder) -> i32 {
    holder.order("fork").parse().unwrap()
}

pub(crate) fn kill(pid: i32) {
    mapdirect_sys::signal::kill(pid, mapdirect_sys::signal::Signal::KILL).unwrap();
}

fn fork_parent_first(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "fork1");
    let mut holder = Holder::start(&world.guard(), &path, 0, 65536, "map");
    let child = fork(&mut holder);
    holder.0.kill().unwrap();
    assert!(is_pinned(&path), "the child shares the pin");
    kill(child);
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

fn fork_child_first(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "fork2");
    let mut holder = Holder::start(&world.guard(), &path, 0, 65536, "map");
    let child = fork(&mut holder);
    kill(child);
    std::thread::sleep(Duration::from_millis(50));
    assert!(is_pinned(&path), "the parent still maps it");
    holder.order("unmap");
    holder.order("close");
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

fn exec(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "exec");
    let mut holder = Holder::start(&world.guard(), &path, 0, 65536, "map");
    assert!(is_pinned(&path));
    holder.order("exec");
    wait_until_free(&path);
    holder.0.kill().unwrap();
    std::fs::remove_file(&path).unwrap();
}

fn sigkill(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "sigkill");
    let holder = Holder::start(&world.guard(), &path, 0, 65536, "map");
    assert!(is_pinned(&path));
    holder.0.kill().unwrap();
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

fn pin_sigkill(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "pinkill");
    let mut holder = Holder::start(&world.guard(), &path, 0, 65536, "pin");
    holder.order("close");
    assert!(is_pinned(&path));
    let child = fork(&mut holder);
    holder.order("unpin");
    assert!(is_pinned(&path), "the child still has it");
    kill(child);
    wait_until_free(&path);
    let holder_again = Holder::start(&world.guard(), &path, 0, 65536, "pin");
    holder.0.kill().unwrap();
    assert!(is_pinned(&path));
    holder_again.0.kill().unwrap();
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

fn unlinked(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "unlinked");
    let guard = world.guard();
    let file = open(&path);
    let held = map(&guard.client(), &file, 0..65536);
    let before = mapdirect::block_map(&file, 0..65536).unwrap();
    std::fs::remove_file(&path).unwrap();
    // By the descriptor it can still be reached, and is still pinned.
    let pins = guard.client().pinned_ranges(&file).unwrap();
    assert_eq!(pins.len(), 1);
    let refused = rustix::fs::ftruncate(&file, 0);
    assert_eq!(refused, Err(Errno::TXTBSY));
    assert_eq!(before, mapdirect::block_map(&file, 0..65536).unwrap());
    drop(held);
    assert_eq!(rustix::fs::ftruncate(&file, 0), Ok(()));
}

fn renamed(world: &World, kind: Kind) {
    let (disk, path) = subject(world, kind, "renamed");
    let guard = world.guard();
    let file = open(&path);
    let held = map(&guard.client(), &file, 0..65536);
    let elsewhere = disk.path("lifetime-renamed-elsewhere");
    std::fs::rename(&path, &elsewhere).unwrap();
    assert!(is_pinned(&elsewhere));
    std::fs::hard_link(&elsewhere, &path).unwrap();
    assert!(is_pinned(&path));
    drop((held, file));
    freed_at_once(&path);
    for path in [&path, &elsewhere] {
        std::fs::remove_file(path).unwrap();
    }
}

fn union(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "union");
    let guard = world.guard();
    let client = guard.client();
    let file = open(&path);
    let one = map(&client, &file, 0..65536);
    let two = map(&client, &file, 32768..131_072);
    let three = pin(&client, &file, 524_288..528_384);
    let size = |size| rustix::fs::ftruncate(&file, size);
    assert_eq!(size(528_383), Err(Errno::TXTBSY), "the end of the last pin");
    drop(three);
    assert_eq!(size(528_383), Ok(()), "no pin reaches there any more");
    assert_eq!(size(131_071), Err(Errno::TXTBSY));
    drop(two);
    assert_eq!(size(131_071), Ok(()));
    assert_eq!(size(65_535), Err(Errno::TXTBSY));
    assert_eq!(client.pinned_ranges(&file).unwrap().len(), 1);
    drop(one);
    assert_eq!(size(0), Ok(()));
    std::fs::remove_file(&path).unwrap();
}

fn two_holders(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "two");
    let guard = world.guard();
    let first = Holder::start(&guard, &path, 0, 65536, "map");
    // Another process pins a part without mapping it, for which reading is
    // enough,
    let reader = File::open(&path).unwrap();
    let second = pin(&guard.client(), &reader, 65536..131_072);
    // and a third maps another, for which it announces that it will open it.
    assert!(is_pinned(&path));
    let writer = mapdirect::open(&path, &guard.client()).unwrap();
    let third = map(&guard.client(), &writer, 131_072..196_608);
    assert!(is_pinned(&path), "an announcement is good for one open");
    let ranges = guard.client().pinned_ranges(&reader).unwrap();
    assert_eq!(ranges.len(), 3);
    first.0.kill().unwrap();
    wait_for(Duration::from_secs(2), || {
        let ranges = guard.client().pinned_ranges(&reader)?;
        Ok((ranges.len() == 2).then_some(()))
    })
    .unwrap();
    let size = |size| rustix::fs::ftruncate(&writer, size);
    assert_eq!(size(196_607), Err(Errno::TXTBSY));
    drop(third);
    assert_eq!(size(131_071), Err(Errno::TXTBSY));
    assert_eq!(size(131_072), Ok(()));
    drop(second);
    assert_eq!(size(0), Ok(()));
    std::fs::remove_file(&path).unwrap();
}

/// Whoever was let in by an announcement can write, and a later grant must
/// know.
fn announced_writer(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "announced");
    let guard = world.guard();
    let _first = Holder::start(&guard, &path, 0, 65536, "pin");
    let writer = mapdirect::open(&path, &guard.client()).unwrap();
    let arguments = [
        &*guard.socket().to_string_lossy(),
        &*path.to_string_lossy(),
        "65536",
        "65536",
        "pin",
    ];
    let mut other = Helper::start("hold", &arguments).unwrap();
    let said = other.hear().unwrap();
    match Gate::under_test() {
        Gate::Fanotify => {
            let open = "somebody else has it open";
            assert!(
                said.starts_with("failed: ") && said.contains(open),
                "{said}"
            );
        }
        // What the writer does will be judged.
        Gate::Bpf => assert_eq!(said, "held"),
    }
    drop((writer, other));
    let _second = Holder::start(&guard, &path, 65536, 65536, "pin");
    std::fs::remove_file(&path).unwrap();
}

fn many_files(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let guard = world.guard();
    let held: Vec<_> = (0..300)
        .map(|number| {
            let path = written(&disk, &format!("many-{number}"), 8192);
            let file = open(&path);
            let held = map(&guard.client(), &file, 0..8192);
            (path, held)
        })
        .collect();
    assert!(held.iter().all(|(path, _)| is_pinned(path)));
    for (at, (path, held)) in held.into_iter().enumerate() {
        drop(held);
        freed_at_once(&path);
        if at % 50 == 0 {
            let next = disk.path("many-299");
            assert!(is_pinned(&next), "others are not touched");
        }
        std::fs::remove_file(&path).unwrap();
    }
}

/// A filesystem can be unmounted right after the last pin on it is gone.
fn unmount_at_once(world: &World, kind: Kind) {
    let guard = world.guard();
    let disk = Disk::new(kind, 512).unwrap();
    let path = written(&disk, "file", 65536);
    let file = open(&path);
    let held = map(&guard.client(), &file, 0..65536);
    let busy = Command::new("umount").arg(disk.root()).output().unwrap();
    assert!(!busy.status.success(), "it is mapped");
    drop((held, file));
    // The kernel hands the guard a reference with each close event: give it
    // the time that starting umount(8) takes, which is more than it needs.
    let started = Instant::now();
    disk.unmount().unwrap();
    assert!(started.elapsed() < Duration::from_secs(10));
}

fn again_and_again(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "again");
    let guard = world.guard();
    let file = open(&path);
    for round in 0..300u64 {
        let start = round % 16 * 4096;
        let held = map(&guard.client(), &file, start..start + 65536);
        if round % 10 == 0 {
            // Every few rounds something is let in between two pins.
            assert_eq!(rustix::fs::ftruncate(&file, 4096), Err(Errno::TXTBSY));
            drop(held);
            let end = 1 << 20;
            rustix::io::pwrite(&file, &[1; 4096], end - 4096).unwrap();
            freed_at_once(&path);
            drop(File::options().write(true).open(&path).unwrap());
        }
    }
    drop(file);
    freed_at_once(&path);
    std::fs::remove_file(&path).unwrap();
}

/// The guard gets so little time that a pin is often over before the guard has
/// finished to hand it over. The file is free then all the same.
fn late_guard(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "late");
    let mut first = CpuSet::new();
    let all = sched_getaffinity(None).unwrap();
    let cpu = (0..CpuSet::MAX_CPU).find(|cpu| all.is_set(*cpu)).unwrap();
    first.set(cpu);
    // What this thread starts runs on this processor, too.
    sched_setaffinity(None, &first).unwrap();
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let over = AtomicBool::new(false);
    let until = Instant::now() + Duration::from_secs(60);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !over.load(SeqCst) && Instant::now() < until {
                    std::hint::spin_loop();
                }
            });
        }
        let file = open(&path);
        let late = (0..100).filter(|_| {
            drop(map(&guard.client(), &file, 0..65536));
            is_pinned(&path)
        });
        let late = late.count();
        over.store(true, SeqCst);
        assert_eq!(late, 0, "still pinned after that many of 100 pins");
    });
    sched_setaffinity(None, &all).unwrap();
    std::fs::remove_file(&path).unwrap();
}

fn guard_killed(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "killed");
    let mut guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let file = open(&path);
    let held = map(&guard.client(), &file, 0..65536);
    let pinned = pin(&guard.client(), &file, 65536..131_072);
    let mut elsewhere = Holder::start(&guard, &path, 131_072, 4096, "pin");
    assert_eq!(held.state(), State::Kept);
    assert_eq!(elsewhere.order("status"), "kept");
    let event = held.event_fd().unwrap();
    assert!(!event.clear());
    // Readers and writers at work while it dies must not hang.
    let busy: Vec<_> = (0..4)
        .map(|_| {
            let path = path.clone();
            std::thread::spawn(move || {
                let until = Instant::now() + Duration::from_millis(300);
                while Instant::now() < until {
                    let _ = std::fs::read(&path).unwrap();
                    let _ = File::options().write(true).open(&path);
                }
            })
        })
        .collect();
    std::thread::sleep(Duration::from_millis(100));
    guard.kill().unwrap();
    for thread in busy {
        thread.join().unwrap();
    }
    let mut fds = [rustix::event::PollFd::new(
        &event,
        rustix::event::PollFlags::IN,
    )];
    let second = rustix::event::Timespec {
        tv_sec: 1,
        tv_nsec: 0,
    };
    assert_eq!(rustix::event::poll(&mut fds, Some(&second)), Ok(1));
    let expected = match Gate::under_test() {
        Gate::Fanotify => "lost",
        Gate::Bpf => "unattended",
    };
    wait_for(Duration::from_secs(1), || {
        let states = [held.state(), pinned.state()];
        let told = states
            .iter()
            .all(|state| state.to_string().starts_with(expected));
        Ok((told && elsewhere.order("status") == expected).then_some(()))
    })
    .unwrap();
    if Gate::under_test() == Gate::Bpf {
        // It is the guard that is gone, and not the gate.
        assert!(is_pinned(&path));
        drop((held, pinned, elsewhere));
        wait_until_free(&path);
        std::fs::remove_file(&path).unwrap();
        return;
    }
    assert!(!is_pinned(&path), "nobody refuses any more");
    // A new guard promises nothing about what others still have open.
    let again = GuardProcess::start(Path::new(BINARY)).unwrap();
    let reader = File::open(&path).unwrap();
    let refused = PinOptions::new()
        .guard(again.client())
        .pin(&reader)
        .unwrap_err();
    assert_eq!(refused.errno(), Errno::TXTBSY.raw_os_error());
    assert!(!refused.openers().is_empty(), "{refused:#}");
    std::fs::remove_file(&path).unwrap();
}

fn guard_ended(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "ended");
    let mut guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let socket = guard.socket().to_owned();
    let file = open(&path);
    let held = map(&guard.client(), &file, 0..65536);
    assert_eq!(guard.terminate().unwrap(), Some(0));
    assert!(!socket.exists(), "it takes its socket away");
    wait_for(Duration::from_secs(1), || {
        Ok((!held.state().is_kept()).then_some(()))
    })
    .unwrap();
    let refused = MapOptions::new()
        .guard(guard.client())
        .accept_page_cache(true)
        .map(&file)
        .unwrap_err();
    assert_eq!(refused.kind(), mapdirect::Kind::NoGuard);
    std::fs::remove_file(&path).unwrap();
}

fn whole_file(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "whole");
    let guard = world.guard();
    let file = open(&path);
    let held = PinOptions::new()
        .scope(mapdirect::Scope::File)
        .guard(guard.client())
        .pin(&file)
        .unwrap();
    let size = 1 << 20;
    for other in [0, size - 1, size + 1, 2 * size] {
        assert_eq!(
            rustix::fs::ftruncate(&file, other),
            Err(Errno::TXTBSY),
            "{other}"
        );
    }
    assert_eq!(rustix::fs::ftruncate(&file, size), Ok(()));
    assert_eq!(rustix::io::pwrite(&file, b"x", size - 1), Ok(1));
    assert_eq!(rustix::io::pwrite(&file, b"x", size), Err(Errno::TXTBSY));
    drop(held);
    assert_eq!(rustix::io::pwrite(&file, b"x", size), Ok(1));
    std::fs::remove_file(&path).unwrap();
}
