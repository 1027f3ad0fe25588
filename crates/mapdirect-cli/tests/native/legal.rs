//! An hour of legal load, in parts: several processes do whatever anybody may
//! beside a pin, and the tripwire must not be heard.

use crate::world::{BINARY, World, is_emulated, kinds, open, pin};
use libtest_mimic::Trial;
use mapdirect::Pin;
use mapdirect_testkit::attack::{Attack, Door, Target};
use mapdirect_testkit::contract::{Gate, Place, Subject};
use mapdirect_testkit::disk::Frozen;
use mapdirect_testkit::legal::{COUNTED, SECONDS_VARIABLE};
use mapdirect_testkit::process::{GuardProcess, Helper, wait_for};
use mapdirect_testkit::{Disk, Kind};
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::time::{Duration, Instant};

const PROCESSES: u64 = 4;
/// What each of them must have done, so that nothing heard means something.
const DONE: [&str; 6] = [
    "in the pin",
    "beside the pin",
    "at the end",
    "all of the file",
    "other files",
    "other pins",
];

pub fn trials(world: &World) -> Vec<Trial> {
    kinds(&[Kind::XFS, Kind::EXT4])
        .into_iter()
        .map(|kind| world.trial(format!("legal::{kind}"), move |world| run(world, kind)))
        .collect()
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// The tracepoints a guard listens to.
fn wires(guard: &GuardProcess) -> usize {
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", guard.worker().unwrap())).unwrap();
    let links = descriptors
        .flatten()
        .filter_map(|entry| std::fs::read_link(entry.path()).ok());
    let of_perf = links.filter(|link| link.as_os_str() == "anon_inode:[perf_event]");
    of_perf.count()
}

fn run(world: &World, kind: Kind) {
    let seconds = number(SECONDS_VARIABLE).unwrap_or_else(|| if is_emulated() { 20 } else { 5 });
    let seed = number("MAPDIRECT_SEED").unwrap_or(20_171_109);
    let disk = Disk::new(kind, 1024).unwrap();
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let before = wires(&guard);
    // Nobody may map what has frozen blocks, so that the first has none.
    let files = [false, true].map(|frozen| Pinned::new(&disk, &guard, frozen));
    assert!(
        wires(&guard) > before,
        "no tripwire: nothing would be heard"
    );
    let mut processes: Vec<Helper> = (0..PROCESSES)
        .map(|number| {
            let file = &files[usize::from(number % 2 == 1)];
            let directory = disk.path(&format!("legal-{number}"));
            file.load(&guard, &directory, kind, seed + number, seconds)
        })
        .collect();
    for process in &mut processes {
        process.tell("begin").unwrap();
    }
    // It is frozen now and then: whatever was under way goes on afterwards.
    let until = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < until {
        let left = until.saturating_duration_since(Instant::now());
        std::thread::sleep(left.min(Duration::from_secs(3)));
        let frozen = Frozen::new(&disk).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        drop(frozen);
    }
    let refused = guard.client().status().unwrap().refused;
    println!("legal::{kind}: the gate refused {refused:?}");
    let mut all: BTreeMap<String, [u64; 2]> = BTreeMap::new();
    for process in processes {
        add(process, &mut all);
    }
    for pinned in &files {
        pinned.file.sync_all().unwrap();
    }
    // The last look at a file comes seconds after it was heard of.
    std::thread::sleep(Duration::from_secs(6));
    println!("legal::{kind} (seed {seed}, {seconds} s): done and refused {all:?}");
    let status = guard.client().status().unwrap();
    assert_eq!(status.breached, 0, "{:#?}", status.breaches);
    files.iter().for_each(Pinned::assert_kept);
    world.count("legal operations", all.values().map(|[done, _]| done).sum());
    world.count(COUNTED, seconds);
    if Gate::under_test() == Gate::Fanotify {
        let Pinned {
            subject,
            file,
            held,
        } = &files[0];
        move_a_block(kind, subject, file);
        wait_for(Duration::from_secs(10), || {
            Ok((!held.integrity().is_intact()).then_some(()))
        })
        .unwrap_or_else(|_| panic!("what is not legal must be heard"));
    }
}

/// A file with a pin.
struct Pinned {
    subject: Subject,
    file: File,
    held: Pin,
}

impl Pinned {
    fn new(disk: &Disk, guard: &GuardProcess, frozen: bool) -> Self {
        let name = if frozen { "legal-frozen" } else { "legal" };
        let subject = Subject::new(disk, name, frozen);
        let file = open(&subject.path);
        let held = pin(&guard.client(), &file, subject.pinned());
        Self {
            subject,
            file,
            held,
        }
    }

    /// Starts a process of the load.
    fn load(
        &self,
        guard: &GuardProcess,
        directory: &Path,
        kind: Kind,
        seed: u64,
        seconds: u64,
    ) -> Helper {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let range = |range: &Range<u64>| format!("{}-{}", range.start, range.end);
        let (start, length) = self.subject.bytes(Place::First);
        let given = match Gate::under_test() {
            Gate::Bpf => text(&self.subject.path),
            // Nobody else may open it: they write by what the holder hands on.
            Gate::Fanotify => format!("{} {}", std::process::id(), self.file.as_raw_fd()),
        };
        let shares = kind.reflink() && self.held.block_map().frozen().next().is_some();
        let arguments = [
            given,
            text(guard.socket()),
            text(&self.subject.other),
            text(directory),
            range(&self.subject.pinned()),
            range(&(start..start + length)),
            shares.to_string(),
            seed.to_string(),
            seconds.to_string(),
        ];
        Helper::start("legal", &arguments.each_ref().map(String::as_str)).unwrap()
    }

    fn assert_kept(&self) {
        let now = mapdirect::block_map(&self.file, self.subject.pinned()).unwrap();
        assert_eq!(self.held.block_map().extents(), now.extents(), "not legal");
        assert!(self.held.integrity().is_intact() && self.held.state().is_kept());
    }
}

/// Adds up what a process says it has done.
fn add(mut process: Helper, all: &mut BTreeMap<String, [u64; 2]>) {
    let mut heard = BTreeMap::new();
    while let Ok(line) = process.hear() {
        let words: Vec<_> = line.split('\t').collect();
        let [name, done, refused] = words[..] else {
            println!("legal: {line}");
            continue;
        };
        let counts: [u64; 2] = [done, refused].map(|count| count.parse().unwrap());
        heard.insert(name.to_owned(), counts);
    }
    assert_eq!(process.finish().unwrap(), Some(0), "something failed");
    for name in DONE {
        let [done, refused] = heard.get(name).copied().unwrap_or_default();
        assert!(done > 0, "{name}: none of {refused} worked");
        let sum = all.entry(name.to_owned()).or_default();
        *sum = [sum[0] + done, sum[1] + refused];
    }
}

/// What the holder itself does asks no gate of permission events. It has to be
/// the last one who has the file open.
fn move_a_block(kind: Kind, subject: &Subject, file: &File) {
    let (offset, length) = subject.bytes(Place::Stable);
    let target = Target {
        path: subject.path.clone(),
        offset,
        length,
        block: kind.block(),
        other: subject.other.clone(),
        door: Door::ALL[0],
        file: Some(file.as_fd().try_clone_to_owned().unwrap()),
    };
    let name = if kind.is_xfs() {
        "xfs-swapext"
    } else {
        "ext4-move-extent"
    };
    (Attack::by_name(name).unwrap().run)(&target).unwrap();
}
