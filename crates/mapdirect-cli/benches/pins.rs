//! What a pin costs, measured against what one would do without it.
//!
//! Every figure has its peer measured in the same run, in turns, so that a
//! machine that becomes slow slows both. Printed are the medians of both, the
//! median of the ratios of neighbouring turns, and the range from the tenth
//! to the ninetieth percentile of those ratios. Needs root and loop devices;
//! goals are goals, and missing one fails nothing. Names of parts may be given
//! (`cycles`, `readers`, `threads`, `neighbours`, `many`, `strengths`,
//! `extents`); without any, all of them run.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a benchmark that cannot run must stop, and is there to print"
)]

use anyhow::Result;
use mapdirect::{MapOptions, Pin, PinOptions, Strength};
use mapdirect_testkit::disk;
use mapdirect_testkit::process::{GuardProcess, Helper, listen, play_role, say};
use mapdirect_testkit::raw::PlainMap;
use mapdirect_testkit::{Disk, Kind};
use rustix::fs::FallocateFlags;
use std::fs::File;
use std::hint::black_box;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

const BINARY: &str = env!("CARGO_BIN_EXE_mapdirect");
const MIB: u64 = 1 << 20;
const RANGE: u64 = 2 * MIB;

fn main() -> ExitCode {
    if play_role(&[("read", play_reader), ("threads", play_threads)]) {
        return ExitCode::SUCCESS;
    }
    // `cargo test --benches` runs this, too.
    if !std::env::args().any(|argument| argument == "--bench") {
        println!("a benchmark: run it with `cargo bench`");
        return ExitCode::SUCCESS;
    }
    if !rustix::process::geteuid().is_root() {
        println!("this mounts filesystems on loop devices: run it as root");
        return ExitCode::FAILURE;
    }
    disk::remove_stale();
    let release = rustix::system::uname();
    println!(
        "Linux {}, {} processors; ours / peer: medians; ratio: median (10% to 90%)\n",
        release.release().to_string_lossy(),
        std::thread::available_parallelism().map_or(0, usize::from)
    );
    let xfs = Disk::new(Kind::XFS, 1024).unwrap();
    if wanted("cycles") {
        one_processor(|| cycles(&xfs));
    }
    if wanted("readers") {
        readers(&xfs);
    }
    if wanted("threads") {
        threads(&xfs);
    }
    if wanted("neighbours") {
        neighbours(&xfs);
    }
    if wanted("together") {
        together(&xfs);
    }
    if wanted("many") {
        many_files(&xfs);
    }
    if wanted("strengths") {
        strengths(&xfs);
    }
    drop(xfs);
    if wanted("extents") {
        extents();
    }
    ExitCode::SUCCESS
}

/// Whether a part was asked for, or none was.
fn wanted(part: &str) -> bool {
    let mut named = std::env::args().skip(1).filter(|it| !it.starts_with('-'));
    let first = named.next();
    first.is_none_or(|first| first == part || named.any(|it| it == part))
}

/// Two things measured in turns.
#[derive(Default)]
struct Paired {
    ours: Vec<f64>,
    peer: Vec<f64>,
}

impl Paired {
    /// Microseconds per operation.
    fn add(&mut self, ours: f64, peer: f64) {
        self.ours.push(ours);
        self.peer.push(peer);
    }

    fn print(&self, name: &str, goal: Option<f64>) {
        let ratios: Vec<f64> = self
            .ours
            .iter()
            .zip(&self.peer)
            .map(|(ours, peer)| ours / peer)
            .collect();
        let ratio = percentile(&ratios, 50);
        let verdict = goal.map_or_else(String::new, |goal| {
            let verdict = if ratio <= goal { "met" } else { "MISSED" };
            format!("; goal {goal}x: {verdict}")
        });
        println!(
            "{name}\n    {:.2} µs / {:.2} µs; ratio {ratio:.2} ({:.2} to {:.2}), {} turns{verdict}",
            percentile(&self.ours, 50),
            percentile(&self.peer, 50),
            percentile(&ratios, 10),
            percentile(&ratios, 90),
            ratios.len(),
        );
    }
}

fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[(sorted.len() - 1) * percent / 100]
}

/// Microseconds each of `count` runs takes.
fn each(count: u32, mut run: impl FnMut()) -> f64 {
    let started = Instant::now();
    for _ in 0..count {
        run();
    }
    started.elapsed().as_secs_f64() * 1e6 / f64::from(count)
}

/// Runs on one processor, and whatever it starts as well.
fn one_processor(run: impl FnOnce()) {
    let all = rustix::thread::sched_getaffinity(None).unwrap();
    let first = (0..rustix::thread::CpuSet::MAX_CPU)
        .find(|cpu| all.is_set(*cpu))
        .unwrap();
    let mut one = rustix::thread::CpuSet::new();
    one.set(first);
    rustix::thread::sched_setaffinity(None, &one).unwrap();
    run();
    rustix::thread::sched_setaffinity(None, &all).unwrap();
}

fn written(path: &Path, length: u64) -> File {
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .unwrap();
    let bytes = vec![7; usize::try_from(MIB).unwrap()];
    for at in 0..length.div_ceil(MIB) {
        file.write_all_at(&bytes, at * MIB).unwrap();
    }
    file.set_len(length).unwrap();
    file.sync_all().unwrap();
    file
}

fn options(guard: &GuardProcess) -> MapOptions {
    MapOptions::new()
        .range(0..RANGE)
        .accept_page_cache(true)
        .patience(Duration::from_secs(2))
        .guard(guard.client())
}

fn plain(file: &File) {
    let (prot, length) = (
        libc::PROT_READ | libc::PROT_WRITE,
        usize::try_from(RANGE).unwrap(),
    );
    black_box(PlainMap::new(file.as_fd(), prot, libc::MAP_SHARED, 0, length).unwrap());
}

/// Pin, map, unmap, unpin against mmap and munmap.
fn cycles(disk: &Disk) {
    let guard = GuardProcess::start_with(Path::new(BINARY), &["--quiet"]).unwrap();
    let path = disk.path("cycles");
    let plain_file = written(&disk.path("cycles-plain"), RANGE);
    let options = options(&guard);

    let file = written(&path, RANGE);
    drop(options.map(&file).unwrap());
    let mut paired = Paired::default();
    for _ in 0..60 {
        let ours = each(50, || drop(options.map(&file).unwrap()));
        let peer = each(50, || plain(&plain_file));
        paired.add(ours, peer);
    }
    paired.print(
        "pin + map + unmap + unpin of 2 MiB against mmap + munmap, one processor,\n\
         the file open and pinned again within a quarter of a second",
        Some(12.0),
    );

    let mut paired = Paired::default();
    for _ in 0..25 {
        drop(options.map(&file).unwrap());
        // The guard has let go of the file after this.
        std::thread::sleep(Duration::from_millis(400));
        let ours = each(1, || drop(options.map(&file).unwrap()));
        let peer = each(1, || plain(&plain_file));
        paired.add(ours, peer);
    }
    paired.print(
        "the same, the first pin of a file (its gate closes, everything is proven anew)",
        None,
    );
}

/// Role: reads a block of a file again and again when told. Arguments: path,
/// number of reads.
fn play_reader(arguments: &[String]) -> Result<()> {
    let [path, count] = arguments else {
        anyhow::bail!("wrong arguments");
    };
    let count: u32 = count.parse()?;
    let file = File::open(path)?;
    let mut block = [0; 4096];
    say("ready");
    while listen()?.is_some() {
        for _ in 0..count {
            file.read_exact_at(&mut block, 8192)?;
        }
        say("done");
    }
    Ok(())
}

/// Judged reads: a pinned file against one that is not.
fn readers(disk: &Disk) {
    const READS: u32 = 300;
    let guard = GuardProcess::start_with(Path::new(BINARY), &["--quiet"]).unwrap();
    let pinned_path = disk.path("readers");
    let free_path = disk.path("readers-free");
    let file = written(&pinned_path, RANGE);
    drop(written(&free_path, RANGE));
    let held = options(&guard).map(&file).unwrap();
    for clients in [1u32, 16] {
        let start = |path: &Path| -> Vec<Helper> {
            (0..clients)
                .map(|_| {
                    let count = READS.to_string();
                    let mut helper =
                        Helper::start("read", &[path.to_str().unwrap(), &count]).unwrap();
                    assert_eq!(helper.hear().unwrap(), "ready");
                    helper
                })
                .collect()
        };
        let mut on_pinned = start(&pinned_path);
        let mut on_free = start(&free_path);
        let time = |helpers: &mut [Helper]| {
            let started = Instant::now();
            for helper in helpers.iter_mut() {
                helper.tell("go").unwrap();
            }
            for helper in helpers.iter_mut() {
                assert_eq!(helper.hear().unwrap(), "done");
            }
            started.elapsed().as_secs_f64() * 1e6 / f64::from(READS * clients)
        };
        let mut paired = Paired::default();
        for _ in 0..20 {
            let ours = time(&mut on_pinned);
            paired.add(ours, time(&mut on_free));
        }
        paired.print(
            &format!(
                "a read of 4 KiB of a pinned file against one of a free file, {clients} clients"
            ),
            None,
        );
        let goal = if clients == 1 { 14.0 } else { 9.0 };
        print_goal("per judged read", percentile(&paired.ours, 50), goal, "µs");
        for helper in on_pinned.into_iter().chain(on_free) {
            helper.finish().unwrap();
        }
    }
    drop(held);
}

fn print_goal(what: &str, value: f64, goal: f64, unit: &str) {
    let verdict = if value <= goal { "met" } else { "MISSED" };
    println!("    {value:.1} {unit} {what}; goal {goal} {unit}: {verdict}");
}

/// Role: so many threads that sleep. Argument: their number.
fn play_threads(arguments: &[String]) -> Result<()> {
    let [count] = arguments else {
        anyhow::bail!("wrong arguments");
    };
    for _ in 0..count.parse::<u32>()? {
        let sleep = || {
            loop {
                std::thread::park();
            }
        };
        std::thread::Builder::new()
            .stack_size(16 * 1024)
            .spawn(sleep)?;
    }
    say("ready");
    while listen()?.is_some() {}
    Ok(())
}

/// The first pin of a file beside many threads against one beside few: what
/// each thread of the system costs it.
fn threads(disk: &Disk) {
    const THREADS: u32 = 5000;
    let guard = GuardProcess::start_with(Path::new(BINARY), &["--quiet"]).unwrap();
    let file = written(&disk.path("threads"), RANGE);
    let options = options(&guard);
    let first_pin = || {
        // The guard has let go of the file after this.
        std::thread::sleep(Duration::from_millis(400));
        each(1, || drop(options.map(&file).unwrap()))
    };
    let mut paired = Paired::default();
    let mut of_each = Vec::new();
    for _ in 0..8 {
        let few = first_pin();
        let count = THREADS.to_string();
        let mut helper = Helper::start("threads", &[&count]).unwrap();
        assert_eq!(helper.hear().unwrap(), "ready");
        for _ in 0..2 {
            let many = first_pin();
            paired.add(many, few);
            of_each.push((many - few) / f64::from(THREADS));
        }
        helper.finish().unwrap();
    }
    paired.print(
        &format!("the first pin of a file beside {THREADS} more threads, against none"),
        None,
    );
    print_goal(
        "for each thread of the system",
        percentile(&of_each, 50),
        8.0,
        "µs",
    );
}

/// A file that is not pinned, beside one that is, against no guard at all.
fn neighbours(disk: &Disk) {
    let pinned = written(&disk.path("neighbours-pinned"), RANGE);
    let path = disk.path("neighbours");
    drop(written(&path, RANGE));
    let work = || {
        each(2000, || {
            let file = File::options().read(true).write(true).open(&path).unwrap();
            let mut block = [0; 4096];
            file.read_exact_at(&mut block, 4096).unwrap();
            file.write_all_at(&block, 8192).unwrap();
        })
    };
    work();
    let mut paired = Paired::default();
    for _ in 0..30 {
        let guard = GuardProcess::start_with(Path::new(BINARY), &["--quiet"]).unwrap();
        let held = options(&guard).map(&pinned).unwrap();
        let ours = work();
        drop(held);
        drop(guard);
        paired.add(ours, work());
    }
    paired.print(
        "open + read + write + close of a file that is not pinned, on a filesystem with a\n\
         pinned one, against no guard",
        Some(1.06),
    );
}

/// Ten thousand files at once.
/// Files that are pinned for the first time: with one request, against one after
/// the other.
fn together(disk: &Disk) {
    const FILES: usize = 250;
    let directory = disk.path("together");
    std::fs::create_dir(&directory).unwrap();
    let guard = GuardProcess::start_with(Path::new(BINARY), &["--quiet"]).unwrap();
    let options = PinOptions::new()
        .guard(guard.client())
        .patience(Duration::from_secs(2));
    let mut paired = Paired::default();
    for turn in 0..10 {
        let fresh = |side: &str| -> Vec<File> {
            let path = |number| directory.join(format!("{side}-{turn}-{number}"));
            (0..FILES)
                .map(|number| written(&path(number), 65536))
                .collect()
        };
        let (ours, peer) = (fresh("ours"), fresh("peer"));
        let started = Instant::now();
        let all = options.pin_all(&ours).unwrap();
        let at_once = started.elapsed();
        drop((all, ours));
        let started = Instant::now();
        let each: Vec<Pin> = peer.iter().map(|file| options.pin(file).unwrap()).collect();
        let one_by_one = started.elapsed();
        drop((each, peer));
        let per_file = |time: Duration| time.as_secs_f64() * 1e6 / FILES as f64;
        paired.add(per_file(at_once), per_file(one_by_one));
    }
    paired.print(
        "first pins of 250 files with one request, against one by one",
        None,
    );
    print_goal(
        "for each of them",
        percentile(&paired.ours, 50),
        500.0,
        "µs",
    );
}

fn many_files(disk: &Disk) {
    const FILES: u64 = 10_000;
    // Of this process and of the guard, beside the pins.
    const OTHERS: u64 = 500;
    let directory = disk.path("many");
    std::fs::create_dir(&directory).unwrap();
    let descriptors = raise_descriptor_limit();
    // The guard has two for each pin.
    let files = FILES.min(descriptors.saturating_sub(OTHERS) / 2 / 500 * 500);
    if files < FILES {
        println!("(a process may have {descriptors} descriptors here: {files} files instead)");
    }
    let paths: Vec<_> = (0..files)
        .map(|number| directory.join(number.to_string()))
        .collect();
    for path in &paths {
        std::fs::write(path, [7; 4096]).unwrap();
    }
    rustix::fs::syncfs(File::open(&directory).unwrap()).unwrap();
    let guard = GuardProcess::start_with(Path::new(BINARY), &["--quiet"]).unwrap();
    let one = PinOptions::new()
        .guard(guard.client())
        .patience(Duration::from_secs(2));
    let mut pins: Vec<Pin> = Vec::new();
    let mut paired = Paired::default();
    for some in paths.chunks(500) {
        let mut left = some.iter();
        let ours = each(500, || {
            let path = left.next().unwrap();
            let file = File::options().read(true).write(true).open(path).unwrap();
            pins.push(one.pin(&file).unwrap());
        });
        let mut left = some.iter();
        let peer = each(500, || {
            let file = File::open(left.next().unwrap()).unwrap();
            black_box(mapdirect::block_map(&file, 0..4096).unwrap());
        });
        paired.add(ours, peer);
    }
    paired.print(
        &format!("pins of {files} files, each against open + FIEMAP + close of it"),
        None,
    );
    let memory =
        std::fs::read_to_string(format!("/proc/{}/status", guard.worker().unwrap())).unwrap();
    let resident = memory.lines().find(|line| line.starts_with("VmRSS"));
    println!("    the guard then: {}", resident.unwrap_or("no VmRSS"));
    let status: Vec<f64> = (0..11)
        .map(|_| each(1, || drop(black_box(guard.client().status().unwrap()))))
        .collect();
    print_goal(
        "for the status of all",
        percentile(&status, 50) / 1e3,
        100.0,
        "ms",
    );
    let started = Instant::now();
    drop(pins);
    let last = &paths[paths.len() - 1];
    while File::options().write(true).open(last).is_err() {
        std::thread::yield_now();
    }
    println!("    all released in {:.0?}", started.elapsed());
}

/// Lets this process, and the guard that it starts, have as many descriptors as
/// the system allows it, and says how many.
fn raise_descriptor_limit() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let more = limit.maximum.map(|most| most.max(100_000));
    let wishes = [more, limit.maximum].map(|most| Rlimit {
        current: most,
        maximum: most,
    });
    // Only CAP_SYS_RESOURCE of the initial user namespace raises the maximum.
    wishes
        .into_iter()
        .find_map(|wish| setrlimit(Resource::Nofile, wish).ok())
        .unwrap();
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// A file of so many extents with two written MiB in the middle.
fn scattered(path: &Path, extents: u64) -> File {
    const BLOCK: u64 = 4096;
    let file = File::create_new(path).unwrap();
    for number in 0..extents {
        // One unwritten block, one hole; with room in the middle.
        let gap = if number < extents / 2 { 0 } else { RANGE };
        let at = number * 2 * BLOCK + gap;
        rustix::fs::fallocate(&file, FallocateFlags::empty(), at, BLOCK).unwrap();
    }
    let middle = extents / 2 * 2 * BLOCK;
    file.write_all_at(&vec![7; usize::try_from(RANGE).unwrap()], middle)
        .unwrap();
    file.sync_all().unwrap();
    file
}

/// A pin of strength stable against one of strength all, on a file with 20,000
/// holes.
fn strengths(disk: &Disk) {
    const HOLES: u64 = 20_000;
    const BLOCK: u64 = 4096;
    let file = File::create_new(disk.path("holes")).unwrap();
    for number in 0..HOLES {
        file.write_all_at(&[7; 4096], number * 2 * BLOCK).unwrap();
    }
    file.set_len(HOLES * 2 * BLOCK).unwrap();
    file.sync_all().unwrap();
    drop(file);
    let file = File::options()
        .read(true)
        .write(true)
        .open(disk.path("holes"))
        .unwrap();
    let guard = GuardProcess::start_with(Path::new(BINARY), &["--quiet"]).unwrap();
    let options = |strength| {
        PinOptions::new()
            .strength(strength)
            .guard(guard.client())
            .patience(Duration::from_secs(2))
    };
    let (stable, all) = (options(Strength::Stable), options(Strength::All));
    for (name, pause, turns) in [
        ("again", Duration::ZERO, 20),
        ("for the first time", Duration::from_millis(400), 10),
    ] {
        let mut paired = Paired::default();
        for _ in 0..turns {
            std::thread::sleep(pause);
            let ours = each(1, || drop(stable.pin(&file).unwrap()));
            std::thread::sleep(pause);
            let peer = each(1, || drop(all.pin(&file).unwrap()));
            paired.add(ours, peer);
        }
        let name = format!("a file of {HOLES} holes pinned {name}, strength stable against all");
        paired.print(&name, Some(1.0));
    }
}

/// A pin in a file of many extents against one of few.
fn extents() {
    println!("(making a file of 1000000 extents)");
    let disk = Disk::new(Kind::XFS, 12 * 1024).unwrap();
    let few = scattered(&disk.path("few"), 1000);
    let many = scattered(&disk.path("many"), 1_000_000);
    let guard = GuardProcess::start_with(Path::new(BINARY), &["--quiet"]).unwrap();
    let at = |extents: u64| {
        let middle = extents / 2 * 2 * 4096;
        options(&guard).range(middle..middle + RANGE)
    };
    let (few_options, many_options) = (at(1000), at(1_000_000));
    for (name, pause, turns, count) in [
        ("again", Duration::ZERO, 40, 25),
        ("for the first time", Duration::from_millis(400), 15, 1),
    ] {
        let mut paired = Paired::default();
        for _ in 0..turns {
            std::thread::sleep(pause);
            let ours = each(count, || drop(many_options.map(&many).unwrap()));
            let peer = each(count, || drop(few_options.map(&few).unwrap()));
            paired.add(ours, peer);
        }
        paired.print(
            &format!("2 MiB pinned {name} in a file of 1000000 extents against one of 1000"),
            Some(1.3),
        );
    }
}
