//! What it takes to make stores durable, beside the bare instructions and
//! libpmem, in turns within one run.
//!
//! The instructions are what is measured, not the media: where there is no
//! persistent memory the file lies in the page cache, and its mapping is told
//! to do what it would do on persistent memory (and libpmem is told the same
//! by PMEM_IS_PMEM_FORCE). Where `MAPDIRECT_PMEM` names persistent memory it
//! lies there, and the system calls for the same are measured, too:
//!
//! ```sh
//! cargo bench --bench persist --no-run
//! cargo xtask vm --nvdimm 1G -- env MAPDIRECT_PMEM=/dev/pmem0 cargo bench --bench persist
//! ```

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a benchmark prints, and stops where something is wrong"
)]

use mapdirect::{DirectMap, Durability, MapOptions};
use mapdirect_testkit::process::{GuardProcess, play_role};
use mapdirect_testkit::{Disk, Kind, latency};
use std::ffi::c_void;
use std::fs::File;
use std::hint::black_box;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

const BINARY: &str = env!("CARGO_BIN_EXE_mapdirect");
const LENGTH: usize = 128 << 20;
const TURNS: usize = 61;

fn main() -> ExitCode {
    if play_role(&[]) {
        return ExitCode::SUCCESS;
    }
    if !rustix::process::geteuid().is_root() {
        println!("needs root: a guard, and a filesystem on a loop device");
        return ExitCode::FAILURE;
    }
    let dax = Kind::XfsDax { reflink: false };
    let has_pmem = dax.device().is_some();
    let kind = if has_pmem { dax } else { Kind::XFS_PLAIN };
    let disk = Disk::new(kind, 512).unwrap();
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let path = disk.path("file");
    std::fs::write(&path, vec![1; LENGTH]).unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    file.sync_all().unwrap();
    let mut map = MapOptions::new()
        .accept_page_cache(!has_pmem)
        .populate(true)
        .guard(guard.client())
        .map(&file)
        .unwrap();
    println!(
        "flushing with {}; medians of nanoseconds per call, ratio of neighbouring turns (10% to \
         90%), {TURNS} turns",
        mapdirect_sys::cache::instruction()
    );
    if has_pmem {
        system_calls(&map, &file, &guard, &disk);
    }
    let libpmem = Libpmem::load();
    if libpmem.is_none() {
        println!(
            "libpmem is not installed (Debian: libpmem1): compared with bare instructions only"
        );
    }
    map.pretend(Durability::CacheFlush);
    persists(&map, libpmem.as_ref());
    copies(&map, libpmem.as_ref());
    groups(&map);
    drop(map);
    ExitCode::SUCCESS
}

/// Against the system calls that make stores durable without this.
fn system_calls(map: &DirectMap, file: &File, guard: &GuardProcess, disk: &Disk) {
    let verdict = |ratio: f64, goal: f64| {
        let met = if ratio >= goal { "met" } else { "MISSED" };
        format!("{ratio:.0}x, goal {goal}: {met}")
    };
    let updates = latency::updates(map, file).unwrap();
    let [low, middle, high] = updates.times_faster;
    println!(
        "64 bytes: stored and persisted {:.2} us, pwrite and fdatasync {:.0} us: {} ({low:.0} to \
         {high:.0})",
        updates.persist,
        updates.fdatasync,
        verdict(middle, 60.0)
    );
    let (first, synced) = latency::first_stores(&guard.client(), &disk.root(), 256, &|| 0).unwrap();
    println!(
        "first store to a page: pinned {:.2} us, unwritten with MAP_SYNC {:.0} us: {}",
        first.microseconds,
        synced.microseconds,
        verdict(synced.microseconds / first.microseconds, 15.0)
    );
}

/// Part of libpmem, if it is there: a peer to measure against, not a
/// dependency.
struct Libpmem {
    persist: extern "C" fn(*const c_void, usize),
    memcpy_persist: extern "C" fn(*mut c_void, *const c_void, usize) -> *mut c_void,
}

impl Libpmem {
    fn load() -> Option<Self> {
        // SAFETY: nothing else runs yet that reads the environment.
        unsafe { std::env::set_var("PMEM_IS_PMEM_FORCE", "1") };
        // SAFETY: loads a library whose constructor only looks at the machine.
        let library = unsafe { libc::dlopen(c"libpmem.so.1".as_ptr(), libc::RTLD_NOW) };
        if library.is_null() {
            return None;
        }
        let symbol = |name: &std::ffi::CStr| {
            // SAFETY: a library that stays loaded.
            let found = unsafe { libc::dlsym(library, name.as_ptr()) };
            (!found.is_null()).then_some(found)
        };
        let persist = symbol(c"pmem_persist")?;
        let memcpy_persist = symbol(c"pmem_memcpy_persist")?;
        Some(Self {
            // SAFETY: the signature that libpmem(7) gives.
            persist: unsafe {
                std::mem::transmute::<*mut c_void, extern "C" fn(*const c_void, usize)>(persist)
            },
            // SAFETY: as above.
            memcpy_persist: unsafe {
                std::mem::transmute::<
                    *mut c_void,
                    extern "C" fn(*mut c_void, *const c_void, usize) -> *mut c_void,
                >(memcpy_persist)
            },
        })
    }
}

fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[(sorted.len() - 1) * percent / 100]
}

/// Nanoseconds a call takes, over places that wander through the mapping, and
/// on from turn to turn: as a log is written, to lines that no cache holds
/// yet, whoever's turn was before.
fn each(size: usize, mut call: impl FnMut(usize)) -> f64 {
    static PLACE: AtomicUsize = AtomicUsize::new(0);
    // Some microseconds of work in any case.
    let calls = (1 << 20) / (size + 256);
    // Apart by a few lines, so that none is hit twice in a row.
    let step = (size + 255) & !63;
    let mut at = PLACE.load(Relaxed);
    let started = Instant::now();
    for _ in 0..calls {
        if at + size > LENGTH {
            at = 0;
        }
        call(at);
        at += step;
    }
    let took = started.elapsed().as_secs_f64() * 1e9 / calls as f64;
    PLACE.store(at & !63, Relaxed);
    took
}

fn report(name: &str, ours: &[f64], peers: &[(&str, Vec<f64>, Option<f64>)]) {
    print!("{name:>24}: {:8.1}", percentile(ours, 50));
    for (peer, theirs, goal) in peers {
        let ratios: Vec<f64> = ours
            .iter()
            .zip(theirs)
            .map(|(ours, peer)| ours / peer)
            .collect();
        let ratio = percentile(&ratios, 50);
        let verdict = match goal {
            Some(goal) if ratio <= *goal => format!(", goal {goal}: met"),
            Some(goal) => format!(", goal {goal}: MISSED"),
            None => String::new(),
        };
        print!(
            " | {peer} {:.1}: {ratio:.2} ({:.2} to {:.2}){verdict}",
            percentile(theirs, 50),
            percentile(&ratios, 10),
            percentile(&ratios, 90)
        );
    }
    println!();
}

/// The bare instructions: a store to every line, the lines written back, a
/// fence.
fn raw_persist(map: &DirectMap, at: usize, size: usize) {
    let address = map.as_ptr() as usize + at;
    // SAFETY: inside the mapping; the callers keep to its length.
    unsafe { mapdirect_sys::cache::write_back(address, size) };
    mapdirect_sys::cache::drain();
}

/// Makes the lines of a range dirty.
fn touch(map: &DirectMap, at: usize, size: usize) {
    for line in (at..at + size).step_by(64) {
        let byte: *mut u8 = std::ptr::with_exposed_provenance_mut(map.as_ptr() as usize + line);
        // SAFETY: inside the mapping; nothing else uses it.
        unsafe { byte.write_volatile(3) };
    }
}

fn persists(map: &DirectMap, libpmem: Option<&Libpmem>) {
    println!("persist, of lines just stored to");
    for size in [8, 64, 256, 1024, 4096, 65536] {
        let (mut ours, mut raw, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..TURNS {
            ours.push(each(size, |at| {
                touch(map, at, size);
                map.persist(at..at + size).unwrap();
            }));
            raw.push(each(size, |at| {
                touch(map, at, size);
                raw_persist(map, at, size);
            }));
            if let Some(libpmem) = libpmem {
                theirs.push(each(size, |at| {
                    touch(map, at, size);
                    (libpmem.persist)(map.as_mut_ptr().wrapping_add(at).cast(), size);
                }));
            }
        }
        let mut peers = vec![("bare", raw, Some(1.03))];
        if libpmem.is_some() {
            peers.push(("libpmem", theirs, None));
        }
        report(&format!("{size} bytes"), &ours, &peers);
    }
}

fn copies(map: &DirectMap, libpmem: Option<&Libpmem>) {
    println!("copy_persist");
    let source = vec![0x5a; 65536];
    for size in [8, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 4096, 65536] {
        let from = black_box(&source[..size]);
        let (mut ours, mut raw, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..TURNS {
            ours.push(each(size, |at| map.write_persist_at(from, at).unwrap()));
            raw.push(each(size, |at| {
                map.write_all_at(from, at).unwrap();
                raw_persist(map, at, size);
            }));
            if let Some(libpmem) = libpmem {
                theirs.push(each(size, |at| {
                    let to = map.as_mut_ptr().wrapping_add(at).cast();
                    black_box((libpmem.memcpy_persist)(to, from.as_ptr().cast(), size));
                }));
            }
        }
        let mut peers = vec![("write + persist", raw, None)];
        if libpmem.is_some() {
            let goal = if size < 256 { 0.65 } else { 1.05 };
            peers.push(("libpmem", theirs, Some(goal)));
        }
        report(&format!("{size} bytes"), &ours, &peers);
    }
}

/// Scattered updates, each waited for, and all of them together.
fn groups(map: &DirectMap) {
    const UPDATES: usize = 16;
    println!("{UPDATES} updates of 8 bytes, pages apart");
    let place = |at: usize, update: usize| (at * 64 + update * 8192 + update * 64) % (LENGTH - 64);
    let (mut ours, mut single) = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        ours.push(each(64, |at| {
            for update in 0..UPDATES {
                let at = place(at, update);
                map.write_all_at(&[7; 8], at).unwrap();
                map.flush_async_range(at..at + 8).unwrap();
            }
            map.drain().unwrap();
        }));
        single.push(each(64, |at| {
            for update in 0..UPDATES {
                let at = place(at, update);
                map.write_all_at(&[7; 8], at).unwrap();
                map.persist(at..at + 8).unwrap();
            }
        }));
    }
    report(
        "flush, one drain",
        &ours,
        &[("16 persists", single, Some(0.125))],
    );
}
