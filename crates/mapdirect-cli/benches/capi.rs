//! What libmapdirect costs beside the library in Rust, and what the preloaded mmap(2)
//! costs programs that do not ask for `MAP_DIRECT`; in turns within one run.
//!
//! As in `persist`, the instructions are measured and not the media: the mappings are
//! told to do what they would do on persistent memory. The C functions are called
//! through pointers that the compiler knows nothing of, as a linker's table has them.
//!
//! ```sh
//! cargo xtask install --libraries --prefix $PWD/target/capi/stage
//! cargo bench --bench capi
//! ```

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a benchmark prints, and stops where something is wrong"
)]

use mapdirect::{Durability, MapOptions};
use mapdirect_testkit::process::{GuardProcess, play_role};
use mapdirect_testkit::{Disk, Kind};
use std::ffi::c_void;
use std::fs::File;
use std::hint::black_box;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Instant;

const BINARY: &str = env!("CARGO_BIN_EXE_mapdirect");
const LENGTH: usize = 64 << 20;
const TURNS: usize = 101;
const GOAL: f64 = 1.02;

fn main() -> ExitCode {
    if play_role(&[]) {
        return ExitCode::SUCCESS;
    }
    if !rustix::process::geteuid().is_root() {
        println!("needs root: a guard, and a filesystem on a loop device");
        return ExitCode::FAILURE;
    }
    println!("medians, ratio of neighbouring turns (10% to 90%), {TURNS} turns");
    preloaded();
    from_c();
    ExitCode::SUCCESS
}

fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[(sorted.len() - 1) * percent / 100]
}

fn report(name: &str, ours: &[f64], peer: &[f64]) {
    let ratios: Vec<f64> = ours
        .iter()
        .zip(peer)
        .map(|(ours, peer)| ours / peer)
        .collect();
    let [low, middle, high] = [10, 50, 90].map(|percent| percentile(&ratios, percent));
    let verdict = if middle <= GOAL { "met" } else { "MISSED" };
    println!(
        "{name:>32}: {:8.1} ns, peer {:8.1} ns: {middle:.3} ({low:.3} to {high:.3}), goal {GOAL}: \
         {verdict}",
        percentile(ours, 50),
        percentile(peer, 50)
    );
}

/// Nanoseconds per call, at places that wander through the mapping.
fn each(size: usize, turn: usize, mut call: impl FnMut(usize)) -> f64 {
    let calls = (4 << 20) / (size + 256);
    let step = (size + 255) & !63;
    let mut at = turn * 4096;
    let started = Instant::now();
    for _ in 0..calls {
        if at + size > LENGTH {
            at = 0;
        }
        call(at);
        at += step;
    }
    started.elapsed().as_secs_f64() * 1e9 / calls as f64
}

/// Makes the lines of a range dirty.
fn touch(base: *mut u8, at: usize, size: usize) {
    for line in (at..at + size).step_by(64) {
        // SAFETY: inside the mapping; nothing else uses it.
        unsafe { base.wrapping_add(line).write_volatile(3) };
    }
}

fn from_c() {
    let disk = Disk::new(Kind::XFS_PLAIN, 512).unwrap();
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    // SAFETY: nothing else runs yet that reads the environment.
    unsafe { std::env::set_var("MAPDIRECT_SOCKET", guard.socket()) };
    let path = disk.path("file");
    std::fs::write(&path, vec![1; LENGTH]).unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    file.sync_all().unwrap();
    let mut map = MapOptions::new()
        .accept_page_cache(true)
        .populate(true)
        .map(&file)
        .unwrap();
    map.pretend(Durability::CacheFlush);
    mapdirect_capi::mapdirect_accept_page_cache(1);
    let flags = libc::MAP_SHARED | libc::MAP_POPULATE | mapdirect_capi::MAP_DIRECT;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let fd = file.as_raw_fd();
    // SAFETY: no MAP_FIXED.
    let memory = unsafe {
        mapdirect_capi::mapdirect_mmap(std::ptr::null_mut(), LENGTH, access, flags, fd, 0)
    };
    assert!(memory != libc::MAP_FAILED);
    assert!(mapdirect_capi::pretend(memory, Durability::CacheFlush));
    let persist: extern "C" fn(*const c_void, usize) -> i32 =
        black_box(mapdirect_capi::mapdirect_persist);
    let memcpy_persist: unsafe extern "C" fn(*mut c_void, *const c_void, usize) -> i32 =
        black_box(mapdirect_capi::mapdirect_memcpy_persist);
    let place = |at: usize| memory.cast::<u8>().wrapping_add(at).cast::<c_void>();
    let source = vec![0x5a; 65536];
    for size in [8, 64, 256, 4096, 65536] {
        let (mut c, mut rust) = (Vec::new(), Vec::new());
        for turn in 0..TURNS {
            c.push(each(size, turn, |at| {
                touch(memory.cast(), at, size);
                assert_eq!(persist(place(at), size), 0);
            }));
            rust.push(each(size, turn, |at| {
                touch(map.as_mut_ptr(), at, size);
                map.persist(at..at + size).unwrap();
            }));
        }
        report(&format!("persist {size} from C"), &c, &rust);
        let from = black_box(&source[..size]);
        let (mut c, mut rust) = (Vec::new(), Vec::new());
        for turn in 0..TURNS {
            c.push(each(size, turn, |at| {
                // SAFETY: inside the mapping, and from memory of this function.
                let done = unsafe { memcpy_persist(place(at), from.as_ptr().cast(), size) };
                assert_eq!(done, 0);
            }));
            rust.push(each(size, turn, |at| {
                map.write_persist_at(from, at).unwrap()
            }));
        }
        report(&format!("memcpy_persist {size} from C"), &c, &rust);
    }
    // SAFETY: nothing refers to it any more.
    let unmapped = unsafe { mapdirect_capi::mapdirect_munmap(memory, LENGTH) };
    assert_eq!(unmapped, 0);
}

/// mmap and munmap of a program, with and without the preloaded functions.
fn preloaded() {
    let target = Path::new(BINARY).ancestors().nth(2).unwrap();
    let library = target.join("capi/stage/lib/libmapdirect-mmap.so");
    if !library.exists() {
        println!("{} is not built: see above", library.display());
        return;
    }
    let program = std::env::temp_dir().join(format!("mapdirect-cost-{}", std::process::id()));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/native/capi/plain.c");
    let compiled = Command::new("cc")
        .args(["-O2", "-lpthread", "-o"])
        .arg(&program)
        .arg(source)
        .status();
    assert!(compiled.unwrap().success());
    let mut command = Command::new(&program);
    let output = command
        .args(["cost", "1000"])
        .env("LD_PRELOAD", library)
        .output()
        .unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    let (ours, peer): (Vec<f64>, Vec<f64>) = text
        .lines()
        .map(|line| {
            let (ours, peer) = line.split_once(' ').unwrap();
            (ours.parse::<f64>().unwrap(), peer.parse::<f64>().unwrap())
        })
        .unzip();
    report("mmap + munmap, preloaded", &ours, &peer);
    std::fs::remove_file(program).unwrap();
}
