//! What `mapdirect run` costs a program. It needs root:
//!
//! ```sh
//! cargo bench --bench run
//! ```
//!
//! The same program is measured in turns, by itself and under supervision, so
//! that the ratios are of one run on one machine.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::cast_precision_loss,
    reason = "a benchmark says what it measured, or fails"
)]

use mapdirect_testkit::process::GuardProcess;
use mapdirect_testkit::raw::PlainMap;
use mapdirect_testkit::{Disk, Kind};
use std::fs::File;
use std::hint::black_box;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

const BINARY: &str = env!("CARGO_BIN_EXE_mapdirect");
const MEASURE: &str = "--measure";
const PAGE: usize = 4096;
/// How often each side is measured.
const TURNS: usize = 5;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, measure, path] = &arguments[..]
        && measure == MEASURE
    {
        return measure_calls(Path::new(path));
    }
    if !arguments.iter().any(|argument| argument == "--bench") && arguments.len() > 1 {
        return;
    }
    let disk = Disk::new(Kind::XFS, 600).unwrap();
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let path = disk.path("mapped");
    std::fs::write(&path, vec![7; 16 * PAGE]).unwrap();
    File::open(&path).unwrap().sync_all().unwrap();
    println!("gate: {}", guard.client().gate().unwrap());
    let itself = std::env::current_exe().unwrap();
    let measure = |command: &mut Command| -> Vec<(String, f64)> {
        let output = command
            .arg(MEASURE)
            .arg(&path)
            .env("MAPDIRECT_SOCKET", guard.socket())
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        assert!(output.stderr.is_empty(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        let line = |line: &str| {
            let (name, time) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), time.parse().unwrap())
        };
        text.lines().map(line).collect()
    };
    let mut alone: Vec<(String, f64)> = Vec::new();
    let mut supervised: Vec<(String, f64)> = Vec::new();
    for _ in 0..TURNS {
        // The pins of the turn before end a moment after their program.
        while File::options().write(true).open(&path).is_err() {
            std::thread::yield_now();
        }
        keep_best(&mut alone, measure(&mut Command::new(&itself)));
        let mut command = Command::new(BINARY);
        command.arg("run").arg("--files").arg(&path).arg("--");
        keep_best(&mut supervised, measure(command.arg(&itself)));
    }
    println!(
        "{:32} {:>12} {:>12} {:>8}",
        "", "alone", "supervised", "ratio"
    );
    for ((name, alone), (_, supervised)) in alone.iter().zip(&supervised) {
        let ratio = supervised / alone;
        println!("{name:32} {alone:9.0} ns {supervised:9.0} ns {ratio:8.2}");
    }
}

/// Of each measurement the shortest: what disturbs only ever makes it longer.
fn keep_best(best: &mut Vec<(String, f64)>, now: Vec<(String, f64)>) {
    if best.is_empty() {
        *best = now;
        return;
    }
    for ((_, best), (_, now)) in best.iter_mut().zip(now) {
        *best = best.min(now);
    }
}

/// The program that is measured.
fn measure_calls(path: &Path) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let both = libc::PROT_READ | libc::PROT_WRITE;
    let shared = || {
        let mapped = PlainMap::new(file.as_fd(), both, libc::MAP_SHARED, 0, PAGE);
        drop(black_box(mapped.unwrap()));
    };
    // The first one is when the file is pinned.
    shared();
    each("getppid", || {
        black_box(rustix::process::getppid());
    });
    each("open, close /dev/null", || {
        drop(File::open("/dev/null").unwrap());
    });
    each("fstat", || {
        black_box(rustix::fs::fstat(&file).unwrap());
    });
    each("mmap, munmap shared", shared);
}

/// Nanoseconds of one call, by the best tenth of many small batches.
fn each(name: &str, mut call: impl FnMut()) {
    const BATCHES: usize = 200;
    const CALLS: u32 = 50;
    let mut times: Vec<f64> = (0..BATCHES)
        .map(|_| {
            let started = Instant::now();
            for _ in 0..CALLS {
                call();
            }
            started.elapsed().as_nanos() as f64 / f64::from(CALLS)
        })
        .collect();
    times.sort_by(f64::total_cmp);
    println!("{name} {}", times[BATCHES / 10]);
}
