//! What the tripwire costs those who change other files of a filesystem that
//! many files are pinned on. It needs root:
//!
//! ```sh
//! cargo bench --bench tripwire
//! ```
//!
//! Files are made, allocated and removed in a directory of their own, in turns
//! with the guard's events switched on and off by their descriptors.
//! `MAPDIRECT_PINS` says how many files are pinned: every other one of a
//! directory, so that a filter is as long as it can be from 27 on.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::cast_precision_loss,
    reason = "a benchmark says what it measured, or fails"
)]

use mapdirect::{Pin, PinOptions};
use mapdirect_testkit::process::GuardProcess;
use mapdirect_testkit::{Disk, Kind, raw};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

const BINARY: &str = env!("CARGO_BIN_EXE_mapdirect");
/// `_IO('$', 0)` and `_IO('$', 1)`.
const ENABLE: u64 = 0x2400;
const DISABLE: u64 = 0x2401;

fn main() {
    if !std::env::args().any(|argument| argument == "--bench") && std::env::args().len() > 1 {
        return;
    }
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
    let count_of = |variable: &str, default: u64| {
        std::env::var(variable).map_or(default, |value| value.parse().unwrap())
    };
    let pins = count_of("MAPDIRECT_PINS", 10_000);
    let turns = count_of("MAPDIRECT_TURNS", 400);
    for kind in [Kind::XFS, Kind::EXT4] {
        measure(kind, pins, turns);
        measure(kind, 1, turns);
    }
}

fn measure(kind: Kind, count: u64, turns: u64) {
    let disk = Disk::new(kind, 2000).unwrap();
    let (pinned, load) = (disk.path("pinned"), disk.path("load"));
    std::fs::create_dir(&pinned).unwrap();
    std::fs::create_dir(&load).unwrap();
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let client = guard.client();
    let path = |number: u64| pinned.join(number.to_string());
    for number in 0..count {
        File::create(pinned.join(format!("{number}.free"))).unwrap();
        std::fs::write(path(number), [7; 4096]).unwrap();
    }
    rustix::fs::syncfs(File::open(&pinned).unwrap()).unwrap();
    let begun = Instant::now();
    // A pin keeps the file open: no other descriptor is kept, of which a
    // process may have 20,000 and no more.
    let held: Vec<Pin> = (0..count)
        .map(|number| {
            let file = File::options()
                .read(true)
                .write(true)
                .open(path(number))
                .unwrap();
            let options = PinOptions::new().range(0..4096).guard(client.clone());
            options
                .patience(Duration::from_secs(60))
                .pin(&file)
                .unwrap()
        })
        .collect();
    let granted = begun.elapsed();
    // Until files that might have come next are not listened to any more.
    std::thread::sleep(Duration::from_secs(11));
    let events = events_of(guard.worker().unwrap());
    let switch = |request| {
        for event in &events {
            raw::ioctl_value(event.as_fd(), request, 0).unwrap();
        }
    };
    // Pair by pair: whatever else the machine does changes slower than that.
    let mut ratios = Vec::new();
    turn(&load);
    for _ in 0..turns {
        switch(DISABLE);
        let without = turn(&load);
        switch(ENABLE);
        let with = turn(&load);
        ratios.push((with.as_secs_f64(), without.as_secs_f64()));
    }
    let sorted = |pick: fn(&(f64, f64)) -> f64| {
        let mut values: Vec<f64> = ratios.iter().map(pick).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let each = |pick| sorted(pick)[ratios.len() / 2];
    let pairs = sorted(|pair| pair.0 / pair.1);
    let of_100 = |part: usize| pairs[pairs.len() * part / 100];
    println!(
        "{kind}: {count} pinned ({:.2} ms each), {} events: a file made, allocated and removed takes \
         {:.2} us with, {:.2} us without; of {} pairs the median is {:.4}, a quarter below {:.4}, \
         a quarter above {:.4}",
        granted.as_secs_f64() * 1e3 / count as f64,
        events.len(),
        each(|pair| pair.0) * 1e6 / FILES as f64,
        each(|pair| pair.1) * 1e6 / FILES as f64,
        pairs.len(),
        of_100(50),
        of_100(25),
        of_100(75),
    );
    drop(held);
}

/// Files of a turn.
const FILES: u32 = 200;

/// Makes, allocates and removes files; returns how much processor time that took,
/// so that what others do on the machine matters less.
fn turn(directory: &Path) -> Duration {
    let begun = processor_time();
    for number in 0..FILES {
        let path = directory.join(number.to_string());
        let file = File::create_new(&path).unwrap();
        raw::fallocate(file.as_fd(), 0, 0, 65536).unwrap();
        drop(file);
        std::fs::remove_file(&path).unwrap();
    }
    processor_time().checked_sub(begun).unwrap()
}

fn processor_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(now).unwrap()
}

/// The tracepoints a guard listens to.
fn events_of(pid: i32) -> Vec<OwnedFd> {
    let mut events = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .flatten()
    {
        let link = std::fs::read_link(entry.path()).unwrap_or_default();
        if link.as_os_str() == "anon_inode:[perf_event]" {
            let number = entry.file_name().to_string_lossy().parse().unwrap();
            events.push(raw::take_descriptor(pid, number).unwrap());
        }
    }
    events
}
