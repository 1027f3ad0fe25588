//! Random attacks by several processes on files whose ranges are pinned and
//! let go all the time: not one block under a pin may change.

use crate::world::{World, kinds, open};
use anyhow::{Result, bail};
use libtest_mimic::Trial;
use mapdirect::{BlockMap, DirectMap, Extent, ExtentState, Guard, MapOptions, PinOptions};
use mapdirect_sys::Errno;
use mapdirect_testkit::attack::{Attack, CORPUS, Door, Row, Target};
use mapdirect_testkit::contract::Gate;
use mapdirect_testkit::process::{Helper, say};
use mapdirect_testkit::random::Random;
use mapdirect_testkit::{Kind, fault, raw};
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

/// So many that pins and attacks on one of them meet now and then, and do not
/// merely keep each other out.
const FILES: u64 = 32;
const BLOCK: u64 = 4096;
/// Blocks that attacks and pins range over.
const BLOCKS: u64 = 128;
const ATTACKERS: u64 = 4;
const OPERATIONS: u64 = 10_000;
/// Pins that must have been there to attack, and how many rounds of attacks
/// to wait for them.
const ENOUGH: u64 = 100;
const ROUNDS: u64 = 8;

pub fn trials(world: &World) -> Vec<Trial> {
    kinds(&[Kind::XFS, Kind::XFS_PLAIN, Kind::EXT4])
        .into_iter()
        .map(|kind| world.trial(format!("random::{kind}"), move |world| run(world, kind)))
        .collect()
}

/// `MAPDIRECT_SEED` repeats a run, as far as the scheduler lets it.
fn seed() -> u64 {
    std::env::var("MAPDIRECT_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or(20_171_109)
}

/// How many times as long as otherwise to try.
pub const SOAK_VARIABLE: &str = "MAPDIRECT_SOAK";

/// Attacks each attacker makes; `MAPDIRECT_SOAK` multiplies them.
fn operations() -> u64 {
    let times = std::env::var(SOAK_VARIABLE)
        .ok()
        .and_then(|times| times.parse().ok())
        .unwrap_or(1);
    OPERATIONS.saturating_mul(times)
}

fn file(directory: &Path, number: u64) -> PathBuf {
    directory.join(format!("random-{number}"))
}

/// Role: attacks at random. Arguments: directory, whether blocks can be
/// shared, filesystem, seed, number of operations.
pub fn play_attacker(arguments: &[String]) -> Result<()> {
    let [directory, reflink, xfs, seed, operations] = arguments else {
        bail!("wrong arguments");
    };
    let directory = Path::new(directory);
    let kind = match (reflink.as_str(), xfs.as_str()) {
        ("true", _) => Kind::XFS,
        (_, "true") => Kind::XFS_PLAIN,
        _ => Kind::EXT4,
    };
    let attacks: Vec<&Attack> = CORPUS
        .iter()
        .filter(|attack| attack.place.includes(kind) && !is_slow(attack))
        .collect();
    let mut random = Random::new(seed.parse()?);
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    for _ in 0..operations.parse::<u64>()? {
        let number = random.below(FILES);
        let other = (number + 1 + random.below(FILES - 1)) % FILES;
        let start = random.below(BLOCKS);
        let length = 1 + random.below(8);
        let target = Target {
            path: file(directory, number),
            offset: start * BLOCK,
            length: length * BLOCK,
            block: BLOCK,
            other: file(directory, other),
            door: *random.pick(&[Door::Path, Door::Path, Door::Handle, Door::ProcSelfFd]),
            file: None,
        };
        // Files that only lose blocks would soon have none to attack.
        let result = if random.below(4) == 0 {
            refill(&target.path, start, length)
        } else {
            let attack: &&Attack = random.pick(&attacks);
            attack_once(attack, &target)
        };
        let outcome = match result {
            Ok(()) => "worked",
            Err(Errno::TXTBSY) => "refused",
            Err(_) => "failed",
        };
        *counts.entry(outcome).or_default() += 1;
    }
    say(&format!("{counts:?}"));
    Ok(())
}

/// A mapping of a file that somebody else truncates raises SIGBUS: such
/// attacks are made by a child.
fn attack_once(attack: &Attack, target: &Target) -> std::result::Result<(), Errno> {
    if !attack.name.starts_with("mmap") {
        return (attack.run)(target);
    }
    let child = raw::fork(|| match (attack.run)(target) {
        Ok(()) => 0,
        Err(errno) => errno.raw_os_error(),
    })?;
    match raw::wait(child)? {
        0 => Ok(()),
        errno @ 1..128 => Err(Errno::from_raw_os_error(errno)),
        _ => Err(Errno::FAULT),
    }
}

/// They take so long that there would be little else.
fn is_slow(attack: &Attack) -> bool {
    attack.row == Row::Metadata
        || attack.name.contains("sqpoll")
        // A gigabyte of hole to shift or clone again and again.
        || attack.row == Row::Grow && attack.name.ends_with("-up")
}

fn refill(path: &Path, start: u64, length: u64) -> std::result::Result<(), Errno> {
    let io = |error: std::io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
    let file = File::options().write(true).open(path).map_err(io)?;
    let bytes = vec![0x5a; usize::try_from(length * BLOCK).unwrap_or(0)];
    file.write_all_at(&bytes, start * BLOCK).map_err(io)
}

/// Ends the pinners when it is dropped.
struct Finished<'a>(&'a AtomicBool);

impl Drop for Finished<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

#[derive(Default)]
struct Tally {
    granted: AtomicU64,
    refused: Mutex<BTreeMap<String, u64>>,
    compared: AtomicU64,
    /// Pins during which nobody of this process stored to the file.
    still: AtomicU64,
    stores: Vec<Stores>,
}

/// How often pinners have begun and ended to store to one file. They are one
/// process, so they may do that beside each other's pins.
#[derive(Default)]
struct Stores {
    begun: AtomicU64,
    ended: AtomicU64,
}

impl Stores {
    fn during(&self, store: impl FnOnce()) {
        self.begun.fetch_add(1, SeqCst);
        store();
        self.ended.fetch_add(1, SeqCst);
    }

    /// Whether nobody has stored while `run` ran, and what it returned.
    fn without<T>(&self, run: impl FnOnce() -> T) -> (bool, T) {
        let begun = self.begun.load(SeqCst);
        let ended = self.ended.load(SeqCst);
        let result = run();
        let none = begun == ended && begun == self.begun.load(SeqCst);
        (none, result)
    }
}

fn run(world: &World, kind: Kind) {
    // One at a time: on two processors there would be nothing but waiting.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let disk = world.disk(kind);
    let guard = world.guard();
    let directory = disk.path("random");
    std::fs::create_dir(&directory).unwrap();
    for number in 0..FILES {
        let length = usize::try_from(BLOCKS * BLOCK).unwrap();
        std::fs::write(file(&directory, number), vec![1; length]).unwrap();
    }
    rustix::fs::sync();
    let seed = seed();
    let done = AtomicBool::new(false);
    let tally = Tally {
        stores: (0..FILES).map(|_| Stores::default()).collect(),
        ..Tally::default()
    };
    // Also when an attacker dies, so that nobody waits for ever.
    let said: Vec<String> = std::thread::scope(|scope| {
        let finished = Finished(&done);
        let pinners: Vec<_> = (0..4)
            .map(|number| {
                let (done, tally, directory) = (&done, &tally, &directory);
                let guard = guard.client();
                scope.spawn(move || {
                    let mut random = Random::new(seed + 1000 + number);
                    while !done.load(SeqCst) {
                        pin_once(&guard, directory, &mut random, tally);
                    }
                })
            })
            .collect();
        // How often a pin gets in between attackers is up to the scheduler:
        // attack until there was something to attack.
        let mut said = Vec::new();
        let mut round = 0;
        while round == 0 || round < ROUNDS && tally.granted.load(SeqCst) < ENOUGH {
            said.extend(attack(&directory, kind, seed + round * ATTACKERS));
            round += 1;
        }
        drop(finished);
        for pinner in pinners {
            pinner.join().unwrap();
        }
        said
    });
    let (granted, compared) = (tally.granted.load(SeqCst), tally.compared.load(SeqCst));
    let still = tally.still.load(SeqCst);
    println!(
        "random::{kind} (seed {seed}): {granted} pins granted, refused {:?}, {compared} \
         comparisons, bytes compared under {still} pins, attackers: {said:?}",
        tally.refused.lock().unwrap()
    );
    assert!(
        granted >= ENOUGH,
        "too few pins to prove anything: {granted}"
    );
    assert!(
        still >= granted / 2,
        "bytes compared under {still} of {granted} pins only"
    );
    assert!(said.iter().all(|counts| counts.contains("refused")));
    world.count("random attacks", said.len() as u64 * operations());
    world.count("pins under random attack", granted);
    std::fs::remove_dir_all(&directory).unwrap();
}

/// One round of attacks: what each attacker says of it.
fn attack(directory: &Path, kind: Kind, seed: u64) -> Vec<String> {
    let attackers: Vec<Helper> = (0..ATTACKERS)
        .map(|number| {
            Helper::start(
                "random",
                &[
                    &directory.to_string_lossy(),
                    &kind.reflink().to_string(),
                    &kind.is_xfs().to_string(),
                    &(seed + number).to_string(),
                    &operations().to_string(),
                ],
            )
            .unwrap()
        })
        .collect();
    attackers
        .into_iter()
        .map(|mut attacker| {
            let said = attacker.hear().unwrap();
            assert_eq!(attacker.finish().unwrap(), Some(0));
            said
        })
        .collect()
}

/// Pins a random range for a moment and looks whether it holds still.
fn pin_once(guard: &Guard, directory: &Path, random: &mut Random, tally: &Tally) {
    let number = random.below(FILES);
    let path = file(directory, number);
    let stores = &tally.stores[usize::try_from(number).unwrap()];
    let start = random.below(BLOCKS) * BLOCK;
    let range = start..start + (1 + random.below(32)) * BLOCK;
    let patience = Duration::from_millis(100);
    // What is judged in the kernel keeps nobody waiting: more attacks meet a
    // pin that is held for longer.
    let longest = match Gate::under_test() {
        Gate::Fanotify => 15_000,
        Gate::Bpf => 2_000_000,
    };
    let hold = Duration::from_micros(random.below(longest));
    if random.below(3) == 0 {
        let Ok(file) = File::options().read(true).write(true).open(&path) else {
            return;
        };
        let mapped = MapOptions::new()
            .range(range)
            .accept_page_cache(true)
            .patience(patience)
            .guard(guard.clone())
            .map(&file);
        match mapped {
            Ok(map) => {
                stores.during(|| store(&map, random));
                watch(&file, map.block_map(), hold, stores, tally);
            }
            Err(error) => refused(&error, tally),
        }
    } else {
        let file = File::open(&path).unwrap_or_else(|_| open(&path));
        let pinned = PinOptions::new()
            .range(range)
            .patience(patience)
            .guard(guard.clone())
            .pin(&file);
        match pinned {
            Ok(pin) => watch(&file, pin.block_map(), hold, stores, tally),
            Err(error) => refused(&error, tally),
        }
    }
}

/// Stores to random pages, frozen ones as well: those raise SIGBUS.
fn store(map: &DirectMap, random: &mut Random) {
    // Some of it may be frozen, or beyond the end of the file.
    if let Err(error) = map.write_all_at(&[random.byte(); 100], 0) {
        use mapdirect::Kind as Reason;
        let reason = error.kind();
        let expected = matches!(reason, Reason::FrozenBlocks | Reason::Arguments);
        assert!(expected, "{error:#}");
    }
    for _ in 0..8 {
        let offset = usize::try_from(random.below(map.len() as u64)).unwrap();
        let address = map.as_ptr() as usize + offset;
        // SAFETY: a byte of a test file, or SIGBUS.
        let stored = unsafe { fault::store(address, 3) };
        let expected = match map.write_all_at(&[3], offset) {
            Ok(()) => fault::Access::Went(3),
            Err(_) => fault::Access::BUS_ADRERR,
        };
        assert_eq!(stored, expected, "byte {offset} of {map:?}");
    }
}

fn refused(error: &mapdirect::Error, tally: &Tally) {
    use mapdirect::Kind as Reason;
    let expected = matches!(
        error.kind(),
        Reason::OpenElsewhere
            | Reason::OpenHere
            | Reason::StillChanging
            | Reason::FrozenBlocks
            | Reason::System
    );
    assert!(expected, "{error:#}");
    // The file is opened again behind a gate that may refuse somebody else's
    // moment, and fsync tells of a direct write of the attackers that met
    // pages in use, but nothing else may go wrong with it.
    let mut why = error.kind().to_string();
    if error.kind() == Reason::System && error.to_string().contains("fsync failed") {
        assert_eq!(error.errno(), Errno::IO.raw_os_error(), "{error:#}");
        why = String::from("written-back-badly");
    } else if error.kind() == Reason::System {
        assert_eq!(error.errno(), Errno::TXTBSY.raw_os_error(), "{error:#}");
    }
    let mut refused = tally.refused.lock().unwrap();
    *refused.entry(why).or_default() += 1;
}

/// Where every byte lies and what it is, except that a block stops being
/// shared when the other file lets go of it, which is no change of this one.
fn places(map: &BlockMap) -> BlockMap {
    let extents = map.extents().iter().map(|extent| {
        let state = match extent.state {
            ExtentState::Shared => ExtentState::Written,
            state => state,
        };
        Extent::new(extent.offset, extent.physical, extent.length, state)
    });
    BlockMap::new(
        map.device(),
        map.block_size(),
        0,
        map.range(),
        extents.collect::<Vec<_>>(),
    )
}

/// The block map of a pinned range stays what it is, and so do its bytes unless
/// this process stores to them: where the gate lets others write to blocks that
/// stay where they are, those that are frozen.
fn watch(file: &File, promised: &BlockMap, hold: Duration, stores: &Stores, tally: &Tally) {
    tally.granted.fetch_add(1, SeqCst);
    let range = promised.range();
    let still: Vec<Range<u64>> = match Gate::under_test() {
        Gate::Fanotify => vec![range.clone()],
        Gate::Bpf => promised
            .frozen()
            .map(|extent| extent.offset..extent.offset + extent.length)
            .collect(),
    };
    let bytes = || {
        still
            .iter()
            .map(|part| read(file, part))
            .collect::<Vec<_>>()
    };
    let (nobody_stored, changes) = stores.without(|| {
        let before = bytes();
        for _ in 0..3 {
            std::thread::sleep(hold / 3);
            let now = mapdirect::block_map(file, range.clone()).unwrap();
            assert_eq!(
                places(promised),
                places(&now),
                "the block map under a pin changed"
            );
            tally.compared.fetch_add(1, SeqCst);
        }
        changes(&still, &before, &bytes())
    });
    if nobody_stored {
        assert!(
            changes.is_empty(),
            "bytes under a pin changed: {changes}: {promised:?}"
        );
        tally.still.fetch_add(1, SeqCst);
    }
}

/// Which sectors are not what they were: the first byte of each that changed.
fn changes(parts: &[Range<u64>], before: &[Vec<u8>], after: &[Vec<u8>]) -> String {
    let mut said = Vec::new();
    for ((part, before), after) in parts.iter().zip(before).zip(after) {
        for at in (0..before.len()).step_by(512) {
            let end = before.len().min(at + 512);
            let differs = (at..end).find(|&byte| before[byte] != after[byte]);
            if let Some(byte) = differs {
                let (offset, was, is) = (part.start + byte as u64, before[byte], after[byte]);
                said.push(format!("{offset}: {was:#x} to {is:#x}"));
            }
        }
    }
    said.join(", ")
}

/// What there is of a range before the end of the file.
fn read(file: &File, range: &Range<u64>) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap()];
    let mut done = 0;
    while done < bytes.len() {
        let at = range.start + done as u64;
        match file.read_at(&mut bytes[done..], at).unwrap() {
            0 => break,
            read => done += read,
        }
    }
    bytes
}
