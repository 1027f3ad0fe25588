//! Strangers who try to have others wait at the fanotify gate, or to keep its
//! guard from being killed.

use crate::world::{BINARY, World, open, pin, written};
use anyhow::Result;
use libtest_mimic::Trial;
use mapdirect_sys::signal::{self, Signal};
use mapdirect_testkit::contract::Gate;
use mapdirect_testkit::hostile::{self, Attack};
use mapdirect_testkit::process::{GuardProcess, Helper, say};
use mapdirect_testkit::{Kind, fuse};
use rustix::fs::{Mode, chmod};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What a guard promises: nobody waits for longer, whatever strangers do.
const LONGEST: Duration = Duration::from_secs(1);
/// How long each of them is at it.
const ATTACK: Duration = Duration::from_secs(2);

pub fn trials(world: &World) -> Vec<Trial> {
    if Gate::under_test() == Gate::Bpf {
        // That gate asks nobody.
        return Vec::new();
    }
    let everywhere = [Attack::Exec, Attack::Faults, Attack::Crowd];
    let mut trials = Vec::new();
    for kind in [Kind::XFS, Kind::EXT4] {
        for attack in Attack::ALL {
            if kind != Kind::XFS && !everywhere.contains(&attack) {
                continue;
            }
            let name = format!("patience::{kind}::{}", attack.name());
            trials.push(world.trial(name, move |world| attacked(world, kind, attack)));
        }
    }
    trials
}

/// Of a crowd everybody wants a processor, and whoever wakes many at once has to
/// wait for one as well.
fn longest(attack: Attack) -> Duration {
    if attack == Attack::Crowd {
        5 * LONGEST
    } else {
        LONGEST
    }
}

pub fn play_stranger(arguments: &[String]) -> Result<()> {
    if let Err(error) = hostile::play(arguments) {
        say(&format!("cannot: {error:#}"));
    }
    Ok(())
}

/// Somebody who reads a byte of a file again and again.
struct Reader(Arc<Reads>);

#[derive(Default)]
struct Reads {
    done: AtomicU64,
    failed: AtomicU64,
    slowest: Mutex<Duration>,
    /// When the one under way began.
    begun: Mutex<Option<Instant>>,
    over: AtomicU64,
}

impl Reader {
    fn start(path: &Path) -> Self {
        let reads = Arc::<Reads>::default();
        let (path, shared) = (path.to_owned(), Arc::clone(&reads));
        // Nobody waits for it: it may hang.
        std::thread::spawn(move || {
            while shared.over.load(SeqCst) == 0 {
                let begun = Instant::now();
                *lock(&shared.begun) = Some(begun);
                let read = File::open(&path).and_then(|file| file.read_exact_at(&mut [0], 0));
                *lock(&shared.begun) = None;
                let mut slowest = lock(&shared.slowest);
                *slowest = begun.elapsed().max(*slowest);
                drop(slowest);
                shared.failed.fetch_add(u64::from(read.is_err()), SeqCst);
                shared.done.fetch_add(1, SeqCst);
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        Self(reads)
    }

    fn done(&self) -> u64 {
        self.0.done.load(SeqCst)
    }

    /// The longest that any took, the one under way included.
    fn slowest(&self) -> Duration {
        let under_way = lock(&self.0.begun).map_or(Duration::ZERO, |begun| begun.elapsed());
        under_way.max(*lock(&self.0.slowest))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.over.store(1, SeqCst);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn attacked(world: &World, kind: Kind, attack: Attack) {
    let disk = world.disk(kind);
    let path = written(&disk, "patience", 1 << 16);
    let other = written(&disk, "patience-other", 1 << 16);
    chmod(disk.path("."), Mode::from_raw_mode(0o755)).unwrap();
    chmod(&path, Mode::from_raw_mode(0o666)).unwrap();
    let mut guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let client = guard.client();
    let mut first = Some(pin(&client, &open(&path), 0..65536));
    let second = pin(&client, &open(&other), 0..65536);
    let place = fuse::Place::new().unwrap();
    let (node, directory) = (place.node(), place.directory());
    let words = [
        attack.name(),
        node.to_str().unwrap(),
        directory.to_str().unwrap(),
        path.to_str().unwrap(),
        guard.socket().to_str().unwrap(),
    ];
    let mut stranger = Helper::start("patience-stranger", &words).unwrap();
    let line = stranger.hear().unwrap();
    if line != "ready" {
        // Too few threads or descriptors allowed, no FUSE, no namespaces.
        world.unavailable(format!("the stranger of {}: {line}", attack.name()));
        return;
    }
    if attack == Attack::Epoll {
        // Now it can open the file for writing, while that is still watched.
        drop(first.take());
    }
    let reader = Reader::start(&other);
    let same = Reader::start(&path);
    std::thread::sleep(ATTACK);
    for (reader, which) in [(&reader, "another"), (&same, "the same")] {
        let (done, slowest) = (reader.done(), reader.slowest());
        println!(
            "{kind} {}: {done} reads of {which} file, the slowest {slowest:?}",
            attack.name()
        );
        assert!(slowest < longest(attack), "{which} file: {slowest:?}");
        let enough = if attack == Attack::Crowd { 1 } else { 4 };
        assert!(done >= enough, "{which} file: {done} reads");
        assert_eq!(reader.0.failed.load(SeqCst), 0, "{which} file");
    }
    // What hangs in a grant's look at all processes must not keep the guard
    // alive either.
    let late = std::thread::spawn({
        let (client, third) = (client.clone(), written(&disk, "patience-third", 1 << 16));
        move || {
            let file = open(&third);
            let _reader = File::open(&third).unwrap();
            let _ = mapdirect::PinOptions::new()
                .range(0..65536)
                .patience(Duration::from_millis(1))
                .guard(client)
                .pin(&file);
        }
    });
    std::thread::sleep(Duration::from_millis(500));
    let killed = Instant::now();
    let before = (reader.done(), same.done());
    signal::kill(guard.pid(), Signal::KILL).unwrap();
    if attack == Attack::Crowd {
        // Nobody keeps four thousand free threads from the processors.
        signal::kill(stranger.pid(), Signal::STOP).unwrap();
    }
    while reader.done() < before.0 + 2 || same.done() < before.1 + 2 {
        assert!(
            killed.elapsed() < longest(attack),
            "SIGKILL of the guard frees nobody"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    println!(
        "{kind} {}: everybody free {:?} after SIGKILL of the guard",
        attack.name(),
        killed.elapsed()
    );
    stranger.kill().unwrap();
    guard.kill().unwrap();
    late.join().unwrap();
    drop((first, second));
    for path in [path, other, disk.path("patience-third")] {
        std::fs::remove_file(path).unwrap();
    }
    world.count("attacks on everybody's patience", 1);
}
