//! Programs that treat their own memory and descriptors in unusual ways.

use crate::segments::{PAGE, State, at, four, make, map_all, store, try_map};
use crate::world::{PATIENCE, World, kinds, open, wait_until_free};
use anyhow::{Context, Result, bail};
use libtest_mimic::Trial;
use mapdirect::{Guard, PinOptions};
use mapdirect_sys::uname;
use mapdirect_testkit::Kind;
use mapdirect_testkit::fault::{Access, load};
use mapdirect_testkit::process::{Helper, say, wait_for};
use mapdirect_testkit::raw;
use rustix::process::{Resource, Rlimit};
use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

pub fn trials(world: &World) -> Vec<Trial> {
    let mut trials = Vec::new();
    for kind in kinds(&[Kind::XFS, Kind::EXT4]) {
        for (role, good) in [
            ("few-descriptors", "what was refused left nothing"),
            ("fork-handlers", "300 maps beside forks"),
            ("locked-memory", "Went(0) Bus(2) Bus(2)"),
            ("inherits", "Bus(2) Bus(2)"),
        ] {
            let name = format!("programs::{kind}::{role}");
            trials.push(world.trial(name, move |world| play(world, kind, role, good)));
        }
    }
    // Blocks of one page in different states: their bytes are copied.
    for kind in kinds(&[Kind::Ext4 { block: 1024 }]) {
        if kind.block() == 1024 {
            let name = format!("programs::{kind}::merged-memory");
            trials.push(world.trial(name, move |world| {
                // A process can ask for it since Linux 6.4 (PR_SET_MEMORY_MERGE).
                if !Path::new(KSM).exists() || uname::version() < (6, 4) {
                    return world.unavailable(String::from("this kernel merges no memory (KSM)"));
                }
                play(world, kind, "merged-memory", "0 stores lost");
            }));
        }
    }
    trials
}

fn play(world: &World, kind: Kind, role: &str, good: &str) {
    let guard = world.guard();
    let (path, file) = four(world, kind, role);
    drop(file);
    let mut helper = Helper::start(
        role,
        &[&guard.socket().to_string_lossy(), &path.to_string_lossy()],
    )
    .unwrap();
    let said = helper.hear().unwrap();
    helper.finish().unwrap();
    assert_eq!(said, good);
    wait_until_free(&path);
    std::fs::remove_file(path).unwrap();
}

fn given(arguments: &[String]) -> Result<(Guard, File, &Path)> {
    let [socket, path] = arguments else {
        bail!("wrong arguments");
    };
    let path = Path::new(path);
    Ok((Guard::at(socket), open(path), path))
}

/// Role: has no descriptors left for more mappings.
pub fn play_few_descriptors(arguments: &[String]) -> Result<()> {
    let (guard, file, path) = given(arguments)?;
    let limit = Rlimit {
        current: Some(64),
        maximum: Some(64),
    };
    rustix::process::setrlimit(Resource::Nofile, limit)?;
    let mut maps = Vec::new();
    let error = loop {
        match try_map(&guard, &file, 0..4 * PAGE) {
            Ok(map) => maps.push(map),
            Err(error) => break error,
        }
        if maps.len() > 100 {
            bail!("the limit is not reached");
        }
    };
    assert_eq!(error.errno(), libc::ENOMEM, "{error:#}");
    for map in &maps {
        assert_eq!(store(at(map, 1), 1), Access::BUS_ADRERR);
    }
    // Each of them is there until it goes, and nothing of what failed.
    wait_for(PATIENCE, || {
        let pins = guard.pinned_ranges(&file)?.len();
        Ok((pins == maps.len()).then_some(()))
    })?;
    let count = maps.len();
    drop(maps);
    wait_until_free(path);
    let again: Vec<_> = (0..count)
        .map(|_| try_map(&guard, &file, 0..4 * PAGE))
        .collect::<mapdirect::Result<_>>()?;
    drop(again);
    // The guard passes a pin's descriptor, for which there is no number left.
    let mut pins = Vec::new();
    let error = loop {
        let options = PinOptions::new().range(0..PAGE).guard(guard.clone());
        match options.patience(PATIENCE).pin(&file) {
            Ok(pin) => pins.push(pin),
            Err(error) => break error,
        }
        if pins.len() > 100 {
            bail!("the limit is not reached");
        }
    };
    assert_eq!(error.errno(), libc::EMFILE, "{error:#}");
    drop(pins);
    say("what was refused left nothing");
    Ok(())
}

static LOCK: Mutex<()> = Mutex::new(());

thread_local! {
    static HELD: RefCell<Option<MutexGuard<'static, ()>>> = const { RefCell::new(None) };
}

extern "C" fn before_fork() {
    let held = LOCK.lock().unwrap();
    HELD.with(|place| *place.borrow_mut() = Some(held));
}

extern "C" fn after_fork() {
    HELD.with(|place| place.borrow_mut().take());
}

/// Role: has handlers for fork that wait for a lock it holds while it maps.
pub fn play_fork_handlers(arguments: &[String]) -> Result<()> {
    let (guard, file, _) = given(arguments)?;
    raw::at_fork(before_fork, after_fork);
    let mut maps = 0;
    let children = std::thread::scope(|scope| {
        let forks = scope.spawn(|| {
            (0..300).try_for_each(|_| {
                let child = raw::fork(|| 0)?;
                assert_eq!(raw::wait(child)?, 0);
                anyhow::Ok(())
            })
        });
        for _ in 0..300 {
            let held = LOCK.lock().unwrap();
            let map = map_all(&guard, &file, 0..4 * PAGE);
            maps += i32::from(store(at(&map, 1), 1) == Access::BUS_ADRERR);
            drop((map, held));
        }
        forks.join().unwrap()
    });
    children?;
    say(&format!("{maps} maps beside forks"));
    Ok(())
}

/// Role: has all of its memory locked, whatever is mapped.
pub fn play_locked_memory(arguments: &[String]) -> Result<()> {
    let (guard, file, _) = given(arguments)?;
    raw::lock_own_memory()?;
    let map = map_all(&guard, &file, 0..6 * PAGE);
    let hole = load(at(&map, 1));
    let stored = store(at(&map, 1), 1);
    let beyond = load(at(&map, 5));
    say(&format!("{hole:?} {stored:?} {beyond:?}"));
    Ok(())
}

/// Role: has its children inherit what they should not.
pub fn play_inherits(arguments: &[String]) -> Result<()> {
    let (guard, file, _) = given(arguments)?;
    let map = map_all(&guard, &file, 0..4 * PAGE);
    raw::madvise(at(&map, 0), 4 * 4096, libc::MADV_DOFORK)?;
    let child = raw::fork(|| {
        say(&format!(
            "{:?} {:?}",
            store(at(&map, 1), 7),
            load(at(&map, 1))
        ));
        0
    })?;
    assert_eq!(raw::wait(child)?, 0);
    let mut byte = [1];
    file.read_exact_at(&mut byte, PAGE)?;
    assert_eq!(byte, [0]);
    Ok(())
}

const KSM: &str = "/sys/kernel/mm/ksm";

/// Puts the settings of the machine back.
struct Merging([(&'static str, String); 3]);

impl Merging {
    fn start() -> Result<Self> {
        let mut before = [
            ("run", "1"),
            ("pages_to_scan", "4000"),
            ("sleep_millisecs", "10"),
        ]
        .map(|(name, value)| (name, value.to_owned()));
        for (name, value) in &mut before {
            let path = format!("{KSM}/{name}");
            let was = std::fs::read_to_string(&path)?.trim().to_owned();
            std::fs::write(&path, &*value)?;
            *value = was;
        }
        Ok(Self(before))
    }
}

impl Drop for Merging {
    fn drop(&mut self) {
        for (name, value) in &self.0 {
            let _ = std::fs::write(format!("{KSM}/{name}"), value);
        }
    }
}

/// Role: has equal pages of its memory merged.
pub fn play_merged_memory(arguments: &[String]) -> Result<()> {
    let (guard, file, path) = given(arguments)?;
    drop(file);
    // Pages with blocks in different states, all with the same bytes.
    const PAGES: u64 = 64;
    let states: Vec<_> = (0..PAGES * 4)
        .map(|at| {
            if at % 4 == 0 {
                State::Written
            } else {
                State::Hole
            }
        })
        .collect();
    let file = make(path, 1024, &states, PAGES * PAGE);
    for page in 0..PAGES {
        file.write_all_at(&[5; 1024], page * PAGE)?;
    }
    file.sync_all()?;
    let map = map_all(&guard, &file, 0..PAGES * PAGE);
    raw::merge_own_memory()?;
    // Something that is merged, so that it is seen to work.
    let bait = raw::anonymous(64 * 4096)?;
    for page in 0..64 {
        assert_eq!(store(bait + page * 4096, 9), Access::Went(9));
    }
    let merging = Merging::start()?;
    let began = Instant::now();
    loop {
        let text = std::fs::read_to_string("/proc/self/ksm_stat")?;
        let merged: u64 = text
            .lines()
            .find_map(|line| line.strip_prefix("ksm_merging_pages"))
            .context("no word of merged pages")?
            .trim()
            .parse()?;
        if merged >= 32 {
            break;
        }
        if began.elapsed() > Duration::from_secs(30) {
            bail!("nothing is merged");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    // One more round.
    std::thread::sleep(Duration::from_secs(1));
    let mut lost = 0;
    for page in 0..usize::try_from(PAGES)? {
        lost += i32::from(store(at(&map, page), 9) != Access::BUS_ADRERR);
        assert_eq!(load(at(&map, page)), Access::Went(5));
    }
    drop(merging);
    say(&format!("{lost} stores lost"));
    Ok(())
}
