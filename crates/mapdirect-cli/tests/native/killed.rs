//! The guard is killed again and again, while others try to break its pins.
//!
//! `MAPDIRECT_KILLS` says how many times.

use crate::world::{
    BINARY, World, is_emulated, is_pinned, kinds, map, open, patience, pin, wait_until_free,
    written,
};
use anyhow::{Context, Result, bail};
use libtest_mimic::Trial;
use mapdirect::{BlockMap, Pin, PinOptions, State, Strength};
use mapdirect_sys::signal::{Signal, kill};
use mapdirect_sys::{Errno, descriptors};
use mapdirect_testkit::contract::Gate;
use mapdirect_testkit::process::{
    BpfDirectory, GuardProcess, HELPER, Helper, ScratchDirectory, listen, say, wait_for,
};
use mapdirect_testkit::{Kind, raw};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FallocateFlags;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

pub fn trials(world: &World) -> Vec<Trial> {
    let mut trials = world.trials(
        "killed",
        &kinds(&[Kind::XFS, Kind::EXT4]),
        &[
            ("again-and-again", again_and_again),
            ("ends", ends),
            ("output-nobody-reads", output_nobody_reads),
            ("service-manager", by_a_service_manager),
        ],
    );
    // Under the other gate a guard is started with nothing.
    if Gate::under_test() == Gate::Fanotify {
        trials.push(world.trial("killed::many-files", many_files));
        trials.push(world.trial("killed::for-ever", for_ever));
    }
    trials
}

/// How many times a guard is killed.
pub const KILLS_VARIABLE: &str = "MAPDIRECT_KILLS";
/// The same when nobody says so.
const KILLS: u32 = 30;
/// How many attack.
const ATTACKERS: usize = 8;
/// How long anybody may wait.
fn limit() -> Duration {
    Duration::from_secs(if is_emulated() { 10 } else { 1 })
}

fn kills() -> u32 {
    let said = std::env::var(KILLS_VARIABLE).ok();
    let least = if is_emulated() { 5 } else { KILLS };
    said.and_then(|kills| kills.parse().ok()).unwrap_or(least)
}

/// The guard itself, which is the child of the process that was started.
fn worker(guard: &GuardProcess) -> Option<i32> {
    guard.started().first().copied()
}

/// Kills it; returns its number.
fn kill_worker(guard: &GuardProcess) -> i32 {
    let pid = wait_for(patience(), || Ok(worker(guard)))
        .context("there is no guard")
        .unwrap();
    kill(pid, Signal::KILL).unwrap();
    pid
}

/// Waits until another guard than this one answers.
pub(crate) fn wait_for_next(guard: &GuardProcess, before: i32, limit: Duration) {
    wait_for(limit, || {
        let status = guard.client().status();
        Ok(status
            .is_ok_and(|status| status.pid != before)
            .then_some(()))
    })
    .unwrap_or_else(|_| panic!("no guard came: {}", guard.said()));
}

/// Gives a guard the time to say that it is alive: one that is killed before is of no
/// use to its supervisor, which gives up after some of these.
pub(crate) fn live() {
    std::thread::sleep(Duration::from_millis(if is_emulated() {
        1500
    } else {
        250
    }));
}

/// Something pinned, and what is promised of it.
struct Target {
    path: PathBuf,
    file: File,
    before: BlockMap,
}

impl Target {
    fn new(path: PathBuf, file: File) -> Self {
        let before = mapdirect::block_map(&file, 0..1 << 20).unwrap();
        Self { path, file, before }
    }

    fn is_as_it_was(&self) {
        let now = mapdirect::block_map(&self.file, 0..1 << 20).unwrap();
        assert_eq!(now.extents(), self.before.extents(), "{:?}", self.path);
        assert_eq!(self.file.metadata().unwrap().len(), 1 << 20);
    }
}

/// What an attacker has seen.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    tries: u64,
    /// What went through and must not.
    slipped: u64,
    /// What was refused although it is allowed: asked of a guard that was killed.
    in_flight: u64,
    slowest: Duration,
}

impl Seen {
    fn said(self) -> String {
        let Self {
            tries,
            slipped,
            in_flight,
            slowest,
        } = self;
        format!("{tries} {slipped} {in_flight} {}", slowest.as_micros())
    }

    fn hear(line: &str) -> Result<Self> {
        let numbers: std::result::Result<Vec<u64>, _> =
            line.split(' ').map(str::parse::<u64>).collect();
        let numbers = numbers.with_context(|| line.to_owned())?;
        let [tries, slipped, in_flight, slowest] = numbers[..] else {
            bail!("{line}");
        };
        Ok(Self {
            tries,
            slipped,
            in_flight,
            slowest: Duration::from_micros(slowest),
        })
    }
}

/// Role: tries everything until it is told to end. Arguments: a file, another
/// one, and the number of a descriptor of a holder of the first.
pub fn play(arguments: &[String]) -> Result<()> {
    let [path, other, holder] = arguments else {
        bail!("wrong arguments");
    };
    let (path, other) = (PathBuf::from(path), File::open(other)?);
    let holder = holder.clone();
    let over = Arc::new(AtomicBool::new(false));
    let trying = {
        let over = Arc::clone(&over);
        std::thread::spawn(move || -> Result<Seen> {
            let mut seen = Seen::default();
            while !over.load(Relaxed) {
                try_everything(&path, &other, &holder, &mut seen)?;
            }
            Ok(seen)
        })
    };
    say("trying");
    listen()?;
    over.store(true, Relaxed);
    let seen = trying
        .join()
        .map_err(|_| anyhow::anyhow!("it panicked"))??;
    say(&seen.said());
    Ok(())
}

fn try_everything(path: &Path, other: &File, holder: &str, seen: &mut Seen) -> Result<()> {
    let mut take =
        |what: &str, allowed: bool, result: std::result::Result<(), Errno>, began: Began| {
            seen.tries += 1;
            seen.slowest = seen.slowest.max(began.waited());
            match (result, allowed) {
                (Err(Errno::TXTBSY), false) | (Ok(()), true) => Ok(()),
                (Err(Errno::TXTBSY), true) => {
                    seen.in_flight += 1;
                    Ok(())
                }
                (Ok(()), false) => {
                    seen.slipped += 1;
                    eprintln!("{what} went through");
                    Ok(())
                }
                (Err(errno), _) => bail!("{what}: {errno}"),
            }
        };
    let errno = |error: std::io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
    let precise = Gate::under_test() == Gate::Bpf;
    let began = Began::now();
    let opened = File::options()
        .read(true)
        .write(true)
        .open(path)
        .map_err(errno);
    take(
        "open for writing",
        precise,
        opened.as_ref().map(drop).map_err(|e| *e),
        began,
    )?;
    let began = Began::now();
    let read = File::open(path).and_then(|file| file.read_exact_at(&mut [0; 512], 4096));
    take("read", true, read.map_err(errno), began)?;
    let began = Began::now();
    let emptied = File::options().write(true).truncate(true).open(path);
    take(
        "open with O_TRUNC",
        false,
        emptied.map(drop).map_err(errno),
        began,
    )?;
    let name = std::ffi::CString::new(path.to_str().context("a name")?)?;
    let began = Began::now();
    take("truncate", false, raw::truncate(&name, 4096), began)?;
    // By a description of a holder, and by one of its own where that may be.
    let inherited = duplicate(holder)?;
    let mut by = vec![inherited];
    by.extend(opened.ok().map(OwnedFd::from));
    for file in by {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        for (what, mode) in [
            ("punch", punch),
            ("collapse", FallocateFlags::COLLAPSE_RANGE),
            ("insert", FallocateFlags::INSERT_RANGE),
            ("zero", FallocateFlags::ZERO_RANGE),
        ] {
            let began = Began::now();
            let result = rustix::fs::fallocate(&file, mode, 8192, 4096);
            take(what, false, result, began)?;
        }
        let began = Began::now();
        take(
            "ftruncate",
            false,
            rustix::fs::ftruncate(&file, 8192),
            began,
        )?;
        let began = Began::now();
        let cloned = rustix::fs::ioctl_ficlone(&file, other);
        if cloned != Err(Errno::OPNOTSUPP) {
            take("clone", false, cloned, began)?;
        }
    }
    Ok(())
}

/// When something began, and how long this thread had waited for a processor.
struct Began(Instant, Duration);

impl Began {
    fn now() -> Self {
        Self(Instant::now(), Self::delay())
    }

    /// `/proc/thread-self/schedstat`: the second number.
    fn delay() -> Duration {
        let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
        let delay = text
            .split(' ')
            .nth(1)
            .and_then(|number| number.parse().ok());
        Duration::from_nanos(delay.unwrap_or(0))
    }

    /// How long it took, without what there was no processor for.
    fn waited(&self) -> Duration {
        let elapsed = self.0.elapsed();
        elapsed.saturating_sub(Self::delay().saturating_sub(self.1))
    }
}

/// A copy of a descriptor that this process was started with.
fn duplicate(number: &str) -> Result<OwnedFd> {
    let number: i32 = number.parse()?;
    Ok(raw::duplicate(number)?)
}

/// An attacker, which has inherited a holder's description.
struct Attacker(Helper);

impl Attacker {
    fn start(path: &Path, other: &Path, holder: BorrowedFd<'_>) -> Self {
        let copy = holder.try_clone_to_owned().unwrap();
        let number = copy.as_raw_fd().to_string();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args([HELPER, "killed-attacker"])
            .args([path, other])
            .arg(number);
        descriptors::inherit(&mut command, copy);
        let mut helper = Helper::spawn(command).unwrap();
        assert_eq!(helper.hear().unwrap(), "trying");
        Self(helper)
    }

    fn end(mut self) -> Seen {
        self.0.tell("end").unwrap();
        let seen = Seen::hear(&self.0.hear().unwrap()).unwrap();
        assert_eq!(self.0.status().unwrap(), 0);
        seen
    }
}

/// A holder that is another process, and its family.
struct Family(Child);

impl Family {
    fn start(guard: &GuardProcess, path: &Path) -> Self {
        let mut child = Command::new(BINARY)
            .args(["pin", "--patience", "20000"])
            .arg(path)
            .args(["--", "sh", "-c", "echo held; exec cat"])
            .env("MAPDIRECT_SOCKET", guard.socket())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("held") {
            line.clear();
            assert!(output.read_line(&mut line).unwrap() > 0, "it ended");
        }
        Self(child)
    }

    /// Waits until it has said this, and returns all that it has said.
    fn hears(&mut self, words: &str) -> String {
        let stderr = self.0.stderr.as_mut().unwrap();
        let limit = Timespec::try_from(patience()).unwrap();
        let mut said = Vec::new();
        loop {
            let text = String::from_utf8_lossy(&said);
            if text.contains(words) {
                return text.into_owned();
            }
            let mut fds = [PollFd::new(&*stderr, PollFlags::IN)];
            assert_eq!(
                poll(&mut fds, Some(&limit)),
                Ok(1),
                "it has only said: {text}"
            );
            let mut some = [0; 4096];
            let length = stderr.read(&mut some).unwrap();
            assert!(length > 0, "it ended, and had said: {text}");
            said.extend_from_slice(&some[..length]);
        }
    }

    /// Its status, and what it has said since.
    fn end(mut self) -> (Option<i32>, String) {
        drop(self.0.stdin.take());
        let mut said = String::new();
        let stderr = self.0.stderr.as_mut().unwrap();
        stderr.read_to_string(&mut said).unwrap();
        (self.0.wait().unwrap().code(), said)
    }
}

/// Guards that are killed as soon as they are there end no pin, unless that goes on
/// for so long that whoever comes to the file has waited enough.
fn for_ever(world: &World) {
    let mut guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let client = guard.client();
    let path = written(&world.disk(Kind::XFS), "killed-for-ever", 1 << 20);
    let pinned = pin(&client, &File::open(&path).unwrap(), 0..1 << 20);
    live();
    let guards = |guard: &GuardProcess| guard.said().matches("starting another").count();
    let kill_all = |guard: &GuardProcess| {
        // One that is gone already may be among them.
        for pid in guard.started() {
            let _ = kill(pid, Signal::KILL);
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    while guards(&guard) < 8 {
        kill_all(&guard);
    }
    wait_for(patience(), || {
        Ok(client
            .status()
            .is_ok_and(|status| status.files.len() == 1)
            .then_some(()))
    })
    .unwrap();
    assert!(is_pinned(&path), "{}", guard.said());
    assert!(!pinned.state().is_lost(), "{}", pinned.state());
    live();
    let began = Instant::now();
    while !guard.has_ended().unwrap() {
        kill_all(&guard);
        assert!(
            began.elapsed() < Duration::from_secs(30),
            "{}",
            guard.said()
        );
    }
    let took = began.elapsed();
    assert!(took > Duration::from_secs(9), "{took:?}: {}", guard.said());
    println!("gave up after {} guards in {took:?}", guards(&guard));
    assert!(guard.said().contains("giving up"), "{}", guard.said());
    wait_for(limit(), || Ok(pinned.state().is_lost().then_some(()))).unwrap();
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// A guard is started with a descriptor for each file and each pin that an earlier
/// one has left, and their names in one string.
fn many_files(world: &World) {
    // The kernel takes 128 KiB.
    const FILES: usize = 5000;
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let client = guard.client();
    let disk = world.disk(Kind::XFS);
    let directory = disk.path("killed-many");
    std::fs::create_dir(&directory).unwrap();
    let path = |number: usize| directory.join(number.to_string());
    let pins: Vec<Pin> = (0..FILES)
        .map(|number| {
            std::fs::write(path(number), [1; 4096]).unwrap();
            pin(&client, &File::open(path(number)).unwrap(), 0..4096)
        })
        .collect();
    for _ in 0..2 {
        let before = kill_worker(&guard);
        wait_for_next(&guard, before, 2 * patience());
        live();
    }
    for (number, pin) in pins.iter().enumerate() {
        assert!(!pin.state().is_lost(), "{number}: {}", pin.state());
    }
    for number in (0..FILES).step_by(100) {
        assert!(is_pinned(&path(number)), "{number}: {}", guard.said());
    }
    drop(pins);
    wait_until_free(&path(0));
    std::fs::remove_dir_all(&directory).unwrap();
    world.count("files pinned while the guard was killed", FILES as u64);
}

/// Nothing slips through, nobody waits for long, and every pin survives; when
/// the supervisor is killed, every holder is told.
fn again_and_again(world: &World, kind: Kind) {
    let mut guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let client = guard.client();
    let disk = world.disk(kind);
    let new = |name: &str| {
        let path = written(&disk, name, 1 << 20);
        (path.clone(), open(&path))
    };
    let (mapped_path, mapped_file) = new("killed-mapped");
    let mapped = map(&client, &mapped_file, 0..1 << 20);
    let (pinned_path, pinned_file) = new("killed-pinned");
    let pinned = pin(&client, &pinned_file, 0..1 << 20);
    let (read_path, _) = new("killed-read-only");
    let read_file = File::open(&read_path).unwrap();
    let read_only = pin(&client, &read_file, 0..1 << 20);
    let (stable_path, stable_file) = new("killed-stable");
    let stable = PinOptions::new()
        .strength(Strength::Stable)
        .patience(patience())
        .guard(client.clone())
        .pin(&stable_file)
        .unwrap();
    let (family_path, _) = new("killed-family");
    let mut family = Family::start(&guard, &family_path);
    let (other_path, _other) = new("killed-other");
    let targets = [
        Target::new(mapped_path, mapped_file),
        Target::new(pinned_path, pinned_file),
        Target::new(read_path, read_file),
        Target::new(stable_path, stable_file),
    ];
    // A reader's description is no way in.
    let attackers: Vec<_> = (0..ATTACKERS)
        .map(|number| {
            let target = &targets[[0, 1, 3][number % 3]];
            Attacker::start(&target.path, &other_path, target.file.as_fd())
        })
        .collect();
    let states = || {
        [
            mapped.state(),
            pinned.state(),
            read_only.state(),
            stable.state(),
        ]
    };
    let (mut slowest, mut seed) = (Duration::ZERO, 1_u64);
    for round in 0..kills() {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        std::thread::sleep(Duration::from_micros((seed >> 33) % 40_000));
        let began = Instant::now();
        let before = kill_worker(&guard);
        wait_for_next(&guard, before, 2 * patience());
        slowest = slowest.max(began.elapsed());
        for state in states() {
            assert!(!state.is_lost(), "round {round}: {state}; {}", guard.said());
        }
        if round % 4 == 0 {
            live();
        }
        if round % 100 == 99 {
            println!("{kind}: {} kills, {slowest:?}", round + 1);
        }
        if round % 10 == 0 {
            // A new pin is granted, and ends, beside the others.
            let more = pin(&client, &targets[0].file, 0..65536);
            drop(more);
        }
    }
    let seen: Vec<_> = attackers.into_iter().map(Attacker::end).collect();
    targets.iter().for_each(Target::is_as_it_was);
    let all = seen.iter().fold(Seen::default(), |all, one| Seen {
        tries: all.tries + one.tries,
        slipped: all.slipped + one.slipped,
        in_flight: all.in_flight + one.in_flight,
        slowest: all.slowest.max(one.slowest),
    });
    println!(
        "{kind}: {} kills, {all:?}, next guard within {slowest:?}",
        kills()
    );
    assert_eq!(all.slipped, 0, "{all:?}");
    assert!(all.slowest < limit(), "{all:?}");
    // All of them are kept, and known to the guard there is.
    wait_for(patience(), || {
        Ok(states().iter().all(State::is_kept).then_some(()))
    })
    .unwrap();
    let status = client.status().unwrap();
    let known: Vec<u64> = status
        .files
        .iter()
        .flat_map(|file| &file.pins)
        .map(|pin| pin.pin)
        .collect();
    for id in [
        mapped.pin_id(),
        pinned.pin_id(),
        read_only.pin_id(),
        stable.pin_id(),
    ] {
        assert!(known.contains(&id), "{id}: {known:?}");
    }
    assert_eq!(known.len(), 5, "{known:?}");
    let shown: Vec<_> = status.files.iter().map(|file| file.path.clone()).collect();
    assert!(
        shown.contains(&family_path.to_string_lossy().into_owned()),
        "{shown:?}"
    );
    // They end as ever.
    drop(stable);
    wait_until_free(&targets[3].path);
    world.count("kills of a guard under attack", kills().into());
    world.count("attacks while guards were killed", all.tries);
    // Whoever is told of a supervisor that was killed is told at once.
    let began = Instant::now();
    guard.kill().unwrap();
    let is_told = |state: &State| match Gate::under_test() {
        Gate::Fanotify => state.is_lost(),
        Gate::Bpf => matches!(state, State::Unattended { .. }),
    };
    let held = || [mapped.state(), pinned.state(), read_only.state()];
    wait_for(limit(), || Ok(held().iter().all(is_told).then_some(())))
        .context("not all were told")
        .unwrap();
    let told = began.elapsed();
    if Gate::under_test() == Gate::Fanotify {
        let said = family.hears("not kept any more");
        // It is not said to stay when it has ended.
        let last = said.rsplit("has taken the pin over").next();
        assert!(!last.unwrap().contains("stays"), "{said}");
        let (status, more) = family.end();
        assert_eq!(status, Some(124), "{said}{more}");
    } else {
        family.end();
    }
    println!("{kind}: told within {told:?}");
    drop((mapped, pinned, read_only));
    for target in &targets {
        wait_until_free(&target.path);
        std::fs::remove_file(&target.path).unwrap();
    }
    wait_until_free(&family_path);
    std::fs::remove_file(&family_path).unwrap();
    std::fs::remove_file(&other_path).unwrap();
}

/// What systemd keeps outlives the supervisor as well: restarts, upgrades and
/// SIGKILL end no pin, and what is stopped for good is told to all.
fn by_a_service_manager(world: &World, kind: Kind) {
    let directory = ScratchDirectory::new("managed").unwrap();
    let path_of = |name: &str| directory.path().join(name).to_string_lossy().into_owned();
    let gate = BpfDirectory::new(Path::new(BINARY));
    let socket = path_of("guard.sock");
    let arguments = [
        &path_of("notify"),
        BINARY,
        "guard",
        "--quiet",
        "--gate",
        Gate::under_test().name(),
        "--bpf-directory",
        gate.path().to_str().unwrap(),
        "--socket",
        &socket,
    ];
    let mut manager = Helper::start("service-manager", &arguments).unwrap();
    assert_eq!(manager.hear().unwrap(), "waiting");
    let mut order = |order: &str| -> usize {
        manager.tell(order).unwrap();
        loop {
            // The guard says that it is ready on the same pipe.
            if let Ok(kept) = manager.hear().unwrap().parse() {
                return kept;
            }
        }
    };
    order("start");
    let client = mapdirect::Guard::at(&socket);
    let paths =
        ["managed-mapped", "managed-pinned"].map(|name| written(&world.disk(kind), name, 1 << 20));
    let files = [0, 1].map(|at: usize| open(&paths[at]));
    let mapped = map(&client, &files[0], 0..1 << 20);
    let pinned = pin(&client, &files[1], 0..1 << 20);
    let before: Vec<_> = paths
        .iter()
        .zip(&files)
        .map(|(path, file)| Target::new(path.clone(), file.try_clone().unwrap()))
        .collect();
    for action in ["restart", "kill", "restart", "kill"] {
        let kept = order(action);
        if Gate::under_test() == Gate::Fanotify {
            // Two groups, the journal, the socket; and of each file and of the pin
            // that is not mapped.
            assert_eq!(kept, 8, "after {action}");
        }
        for state in [mapped.state(), pinned.state()] {
            assert!(!state.is_lost(), "after {action}: {state}");
        }
        wait_for(patience(), || {
            Ok((mapped.state().is_kept() && pinned.state().is_kept()).then_some(()))
        })
        .unwrap();
        assert!(
            is_pinned(&paths[0]) && is_pinned(&paths[1]),
            "after {action}"
        );
        // The guard before may take a moment to be gone, and the connection to it.
        let status = wait_for(patience(), || Ok(client.status().ok())).unwrap();
        assert_eq!(status.files.len(), 2, "after {action}");
    }
    before.iter().for_each(Target::is_as_it_was);
    drop(pinned);
    wait_until_free(&paths[1]);
    let began = Instant::now();
    order("stop");
    let is_told = || match Gate::under_test() {
        Gate::Fanotify => mapped.state().is_lost(),
        Gate::Bpf => !mapped.state().is_kept(),
    };
    wait_for(limit(), || Ok(is_told().then_some(()))).unwrap();
    println!("{kind}: stopped, and told within {:?}", began.elapsed());
    drop((mapped, before, files));
    for path in &paths {
        wait_until_free(path);
        std::fs::remove_file(path).unwrap();
    }
}

/// Pins that end while no guard is there end; their filesystem can be unmounted.
fn ends(world: &World, kind: Kind) {
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let client = guard.client();
    let path = written(&world.disk(kind), "killed-ends", 1 << 20);
    for round in 0..6 {
        let file = open(&path);
        let held: Mutex<Option<(Option<Pin>, Option<mapdirect::DirectMap>)>> =
            Mutex::new(Some(if round % 2 == 0 {
                (Some(pin(&client, &file, 0..65536)), None)
            } else {
                (None, Some(map(&client, &file, 0..65536)))
            }));
        drop(file);
        let before = kill_worker(&guard);
        if round % 3 == 0 {
            wait_for_next(&guard, before, 2 * patience());
        }
        drop(held.lock().unwrap().take());
        wait_until_free(&path);
        wait_for_next(&guard, before, 2 * patience());
        live();
        let known = client.status().unwrap().files;
        assert!(known.is_empty(), "{known:?}");
    }
    drop(guard);
    std::fs::remove_file(&path).unwrap();
}

/// A guard takes the place of one that was killed while nobody reads what both of
/// them and their supervisor say.
fn output_nobody_reads(world: &World, kind: Kind) {
    let directory = ScratchDirectory::new("unread").unwrap();
    let socket = directory.path().join("guard.sock");
    let gate = BpfDirectory::new(Path::new(BINARY));
    let (_reader, stderr) = rustix::pipe::pipe().unwrap();
    let filled = stderr.try_clone().unwrap();
    let flags = rustix::fs::fcntl_getfl(&filled).unwrap();
    rustix::fs::fcntl_setfl(&filled, flags | rustix::fs::OFlags::NONBLOCK).unwrap();
    while rustix::io::write(&filled, &[b'.'; 4096]).is_ok() {}
    rustix::fs::fcntl_setfl(&filled, flags).unwrap();
    let mut child = Command::new(BINARY)
        .args(["guard", "--gate", Gate::under_test().name(), "--socket"])
        .arg(&socket)
        .arg("--bpf-directory")
        .arg(gate.path())
        .stdout(filled)
        .stderr(stderr)
        .spawn()
        .unwrap();
    let client = mapdirect::Guard::at(&socket);
    let answers = |before: i32| {
        wait_for(patience(), || {
            let status = client.status().ok();
            Ok(status.map(|status| status.pid).filter(|pid| *pid != before))
        })
    };
    let result = answers(0).and_then(|first| {
        let path = written(&world.disk(kind), "killed-unread", 65536);
        let held = pin(&client, &open(&path), 0..65536);
        live();
        for _ in 0..50 {
            assert!(
                File::options()
                    .write(true)
                    .truncate(true)
                    .open(&path)
                    .is_err()
            );
        }
        kill(first, Signal::KILL)?;
        answers(first)?;
        anyhow::ensure!(is_pinned(&path), "it is not pinned any more");
        drop(held);
        Ok(())
    });
    kill(child.id().cast_signed(), Signal::TERMINATE).unwrap();
    let ended = wait_for(patience(), || Ok(child.try_wait()?));
    if ended.is_err() {
        child.kill().unwrap();
    }
    result.unwrap();
    // A guard that waits does not hear that it shall end.
    assert!(ended.unwrap().success());
}
