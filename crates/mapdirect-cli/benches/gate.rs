//! What the bpf gate costs. It needs root and a kernel that lets it be loaded:
//!
//! ```sh
//! cargo bench --bench gate --no-run
//! cargo xtask vm --kernel 7.3 --memory 6G -- target/release/deps/gate-...
//! ```
//!
//! System calls are measured in turns, with the gate in place and without it,
//! in the same boot: machines differ more than that. With `cargo xtask vm
//! --count-instructions` a nanosecond is an instruction. `MAPDIRECT_PINS` and
//! `MAPDIRECT_EXTENTS` say how many files are pinned, and in how many pieces
//! the largest file lies; none, and that is left out. `MAPDIRECT_BENCH=calls`
//! or `=again` measures that alone.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::cast_precision_loss,
    reason = "a benchmark says what it measured, or fails"
)]

use mapdirect::{Guard, MapOptions, Pin, PinOptions};
use mapdirect_testkit::contract::GATE_VARIABLE;
use mapdirect_testkit::process::GuardProcess;
use mapdirect_testkit::raw::PlainMap;
use mapdirect_testkit::{Disk, Kind, raw};
use std::fs::File;
use std::hint::black_box;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

const BINARY: &str = env!("CARGO_BIN_EXE_mapdirect");
const PAGE: usize = 4096;

fn main() {
    if !std::env::args().any(|argument| argument == "--bench") && std::env::args().len() > 1 {
        return;
    }
    if std::env::var(GATE_VARIABLE).as_deref() != Ok("bpf") {
        println!("gate: run it with {GATE_VARIABLE}=bpf on a kernel that lets the gate be loaded");
        return;
    }
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
    let disk = Disk::new(Kind::XFS, 6000).unwrap();
    let wanted = std::env::var("MAPDIRECT_BENCH").unwrap_or_default();
    if wanted.is_empty() || wanted == "again" {
        again(&disk);
    }
    if wanted.is_empty() || wanted == "calls" {
        system_calls(&disk);
    }
    if wanted == "again" || wanted == "calls" {
        return;
    }
    many_pins(&disk);
    many_extents(&disk);
}

fn count_of(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |value| value.parse().unwrap())
}

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

fn written(disk: &Disk, name: &str, length: usize) -> File {
    let path = disk.path(name);
    std::fs::write(&path, vec![7; length]).unwrap();
    let file = open(&path);
    file.sync_all().unwrap();
    file
}

fn pin(guard: &Guard, file: &File, range: std::ops::Range<u64>) -> Pin {
    PinOptions::new()
        .range(range)
        .patience(Duration::from_secs(20))
        .guard(guard.clone())
        .pin(file)
        .unwrap()
}

/// Nanoseconds of one call, by the best tenth of many small batches: what
/// disturbs a machine only ever makes it slower.
fn each(mut call: impl FnMut(u64)) -> f64 {
    const BATCHES: usize = 400;
    const CALLS: u64 = 50;
    let mut times: Vec<f64> = (0..BATCHES)
        .map(|_| {
            let started = Instant::now();
            for number in 0..CALLS {
                call(number * PAGE as u64);
            }
            started.elapsed().as_nanos() as f64 / CALLS as f64
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[BATCHES / 10]
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Bytes that are pinned again and again.
const RANGE: usize = 2 << 20;
const MAP_DIRECT: i32 = 0x200_0000;

/// Nanoseconds of one run, as [`each`] has them; for what takes longer.
fn each_of_few(mut run: impl FnMut()) -> f64 {
    const BATCHES: usize = 40;
    const RUNS: u32 = 20;
    let mut times: Vec<f64> = (0..BATCHES)
        .map(|_| {
            let started = Instant::now();
            for _ in 0..RUNS {
                run();
            }
            started.elapsed().as_nanos() as f64 / f64::from(RUNS)
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[BATCHES / 2]
}

/// Threads of this process that sleep until this is dropped.
struct Idle(Arc<Barrier>, Vec<std::thread::JoinHandle<()>>);

impl Idle {
    fn new(count: usize) -> Self {
        let barrier = Arc::new(Barrier::new(count + 1));
        let threads = (0..count)
            .map(|_| {
                let barrier = Arc::clone(&barrier);
                std::thread::spawn(move || {
                    barrier.wait();
                })
            })
            .collect();
        Self(barrier, threads)
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        self.0.wait();
        for thread in self.1.drain(..) {
            thread.join().unwrap();
        }
    }
}

/// Pinning a stable range again, against mmap and munmap: by mmap(2) with
/// `MAP_DIRECT`, through the library, and by the guard.
fn again(disk: &Disk) {
    let plain = written(disk, "again-plain", RANGE);
    let pinned = written(disk, "again-pinned", RANGE);
    let (plain_path, path) = (disk.path("again-plain"), disk.path("again-pinned"));
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let options = MapOptions::new()
        .range(0..RANGE as u64)
        .accept_page_cache(true)
        .patience(Duration::from_secs(20))
        .guard(guard.client());
    let both = libc::PROT_READ | libc::PROT_WRITE;
    let map = |file: &File, flags: i32| {
        black_box(PlainMap::new(file.as_fd(), both, flags, 0, RANGE).unwrap());
    };
    for threads in [1, 11, 101] {
        let _idle = Idle::new(threads - 1);
        let peer = each_of_few(|| map(&plain, libc::MAP_SHARED));
        let print = |name: &str, ours: f64, peer: f64, goal: Option<f64>| {
            let ratio = ours / peer;
            let verdict = goal.map_or_else(String::new, |goal| {
                let verdict = if ratio <= goal { "met" } else { "MISSED" };
                format!("; goal {goal}x: {verdict}")
            });
            println!("  {name}: {ours:.0} ns / {peer:.0} ns, {ratio:.2}x{verdict}");
        };
        println!("pinned again, {threads} threads:");
        // Somebody has to have pinned it; then each is the last to let go.
        drop(options.map(&pinned).unwrap());
        let ours = each_of_few(|| map(&open(&path), libc::MAP_SHARED | MAP_DIRECT));
        let with_open = each_of_few(|| map(&open(&plain_path), libc::MAP_SHARED));
        print(
            "open + mmap(MAP_DIRECT) + close + munmap",
            ours,
            with_open,
            Some(1.3),
        );
        let first = options.map(&pinned).unwrap();
        let id = first.pin_id();
        drop(first);
        let mut taken_up = 0u32;
        let ours = each_of_few(|| {
            let held = options.map(&pinned).unwrap();
            taken_up += u32::from(held.pin_id() == id);
        });
        print("the library, map + drop", ours, peer, Some(3.0));
        println!("    {taken_up} of 800 without the guard");
        let ours = each_of_few(|| {
            drop(options.map(&pinned).unwrap());
            // It fails, but whoever asks that could have moved blocks.
            let collapse = rustix::fs::FallocateFlags::COLLAPSE_RANGE;
            rustix::fs::fallocate(&pinned, collapse, 0, 1).unwrap_err();
        });
        print("by the guard, map + drop", ours, peer, None);
    }
}

/// pread and pwrite of 4 KiB: without the gate, with it and nothing pinned, on
/// a file that is not pinned beside one that is, and on that one.
fn system_calls(disk: &Disk) {
    const ROUNDS: usize = 5;
    /// The kernel takes programs off when it gets round to it.
    const AFTERWARDS: Duration = Duration::from_secs(3);
    let plain = written(disk, "plain", 1 << 20);
    let pinned = written(disk, "pinned", 1 << 20);
    let mut figures: [[Vec<f64>; 4]; 2] =
        std::array::from_fn(|_| std::array::from_fn(|_| Vec::new()));
    let mut measure = |at: usize, file: &File| {
        let [read, write] = &mut figures;
        let mut page = vec![1; PAGE];
        read[at].push(each(|at| file.read_exact_at(&mut page, at).unwrap()));
        let page = vec![1; PAGE];
        write[at].push(each(|at| file.write_all_at(&page, at).unwrap()));
    };
    for _ in 0..ROUNDS {
        measure(0, &plain);
        let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
        measure(1, &plain);
        let held = pin(&guard.client(), &pinned, 0..1 << 20);
        measure(2, &plain);
        measure(3, &pinned);
        drop((held, guard));
        std::thread::sleep(AFTERWARDS);
    }
    for (name, mut times) in ["pread 4 KiB", "pwrite 4 KiB"].into_iter().zip(figures) {
        // Of each round by itself: what was before differs.
        let ratios = |at: usize| {
            let rounds = times[at].iter().zip(&times[0]);
            let mut ratios: Vec<f64> = rounds.map(|(with, without)| with / without).collect();
            let median = median(&mut ratios);
            (median, ratios[0], ratios[ratios.len() - 1])
        };
        let ratios = [1, 2, 3].map(ratios);
        println!("{name}: no gate {:.0} ns", median(&mut times[0]));
        let columns = ["nothing pinned", "another file pinned", "pinned"];
        for (at, (column, (ratio, least, most))) in columns.into_iter().zip(ratios).enumerate() {
            let time = median(&mut times[at + 1]);
            println!("  gate, {column}: {time:.0} ns, {ratio:.3}x ({least:.3} to {most:.3})");
        }
    }
}

/// Memory that is free, or would be if it were needed.
fn available() -> i64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kilobytes = line.unwrap().trim().split(' ').next().unwrap();
    kilobytes.parse::<i64>().unwrap() * 1024
}

fn many_pins(disk: &Disk) {
    let count = count_of("MAPDIRECT_PINS", 2000);
    if count == 0 {
        return;
    }
    let directory = disk.path("many");
    std::fs::create_dir(&directory).unwrap();
    let files: Vec<File> = (0..count)
        .map(|number| {
            let path = directory.join(number.to_string());
            std::fs::write(&path, [7; PAGE]).unwrap();
            open(&path)
        })
        .collect();
    rustix::fs::syncfs(&files[0]).unwrap();
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let client = guard.client();
    // What is there once.
    drop(pin(&client, &files[0], 0..PAGE as u64));
    let before = available();
    let started = Instant::now();
    let held: Vec<Pin> = files
        .iter()
        .map(|file| pin(&client, file, 0..PAGE as u64))
        .collect();
    let took = started.elapsed();
    let bytes = (before - available()) / i64::try_from(count).unwrap();
    let refused = raw::fallocate(files[files.len() / 2].as_fd(), 3, 0, PAGE as u64);
    assert!(refused.is_err());
    let started = Instant::now();
    drop(held);
    println!(
        "{count} files pinned: {:.2} ms each, {bytes} bytes each (guard, holder and kernel); let \
         go of in {:.2} ms each",
        took.as_secs_f64() * 1e3 / count as f64,
        started.elapsed().as_secs_f64() * 1e3 / count as f64
    );
}

fn many_extents(disk: &Disk) {
    let count = count_of("MAPDIRECT_EXTENTS", 20_000);
    if count == 0 {
        return;
    }
    let file = written(disk, "pieces", 0);
    for number in 0..count / 2 {
        file.write_all_at(&[1; PAGE], number * 2 * PAGE as u64)
            .unwrap();
    }
    file.sync_all().unwrap();
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let before = available();
    let started = Instant::now();
    let held = pin(&guard.client(), &file, 0..count * PAGE as u64);
    let took = started.elapsed();
    let bytes = before - available();
    let extents = held.extents().len();
    let page = vec![1; PAGE];
    let last = (count / 2 - 1) * 2 * PAGE as u64;
    let write = each(|at| file.write_all_at(&page, last - 2 * at).unwrap());
    let hole = file.write_all_at(&page, last - PAGE as u64);
    assert!(hole.is_err(), "a frozen block was written");
    println!(
        "{extents} extents pinned in {:.2} s, {:.1} bytes each; pwrite 4 KiB between frozen \
         blocks {write:.0} ns",
        took.as_secs_f64(),
        bytes as f64 / extents as f64
    );
}
