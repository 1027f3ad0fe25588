//! What no gate refuses is noticed, and nothing else is.

use crate::world::{BINARY, World, is_emulated, kinds, map, open, patience, pin, wait_until_free};
use libtest_mimic::Trial;
use mapdirect::{BlockMap, ExtentState, Pin, PinOptions};
use mapdirect_proto::Breach;
use mapdirect_sys::Errno;
use mapdirect_testkit::Kind;
use mapdirect_testkit::contract::{Gate, Place, Subject};
use mapdirect_testkit::disk::{Frozen, run, unmount};
use mapdirect_testkit::process::{GuardProcess, ScratchDirectory, wait_for};
use mapdirect_testkit::random::Random;
use mapdirect_testkit::raw;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

pub fn trials(world: &World) -> Vec<Trial> {
    let all = kinds(&[Kind::XFS, Kind::EXT4]);
    let mut trials = world.trials(
        "tripwire",
        &all,
        &[
            ("nvmet", nvmet),
            ("legal-load", legal_load),
            ("allocated-by-holder", allocated_by_holder),
        ],
    );
    if Gate::under_test() == Gate::Bpf {
        // Permission events cannot be taken away from a guard that lives.
        trials.extend(world.trials("tripwire", &all, &[("taken-away", taken_away)]));
    } else {
        // Under the other gate each of these is refused.
        trials.extend(world.trials(
            "tripwire",
            &all,
            &[
                ("moved-by-holder", moved_by_holder),
                ("moved-when-deleted", moved_when_deleted),
                ("moved-in-a-burst", moved_in_a_burst),
                ("moved-among-many", moved_among_many),
                ("overlay-later", overlay_later),
            ],
        ));
    }
    trials
}

/// A change must be noticed in a tenth of a second; where the machine has
/// other things to do, in one.
fn limit() -> Duration {
    if is_emulated() {
        Duration::from_secs(10)
    } else {
        Duration::from_secs(1)
    }
}

fn since_the_epoch() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap()
}

/// The breaches of a pin so far.
fn breaches(guard: &GuardProcess, pin: u64) -> Vec<Breach> {
    let mut breaches = guard.client().status().unwrap().breaches;
    breaches.retain(|breach| breach.pin == pin);
    breaches
}

/// Waits for a breach of a pin, and sees how long after `since` it was noticed.
fn noticed(world: &World, guard: &GuardProcess, pin: u64, since: Duration) -> Breach {
    let found = wait_for(patience(), || Ok(breaches(guard, pin).pop()));
    let breach = found.unwrap_or_else(|_| panic!("pin {pin}: nothing was noticed"));
    let after = Duration::from_nanos(breach.time).saturating_sub(since);
    println!("noticed after {} us", after.as_micros());
    assert!(after <= limit(), "noticed after {after:?}");
    world.count("breaches noticed", 1);
    world.count(
        "within 100 ms",
        u64::from(after <= Duration::from_millis(100)),
    );
    breach
}

fn assert_differs(before: &BlockMap, breach: &Breach) {
    assert!(!breach.before.is_empty() && !breach.after.is_empty());
    assert_ne!(breach.before, breach.after);
    let range = before.range();
    assert!(range.start <= breach.range.start && breach.range.end <= range.end);
    let was: Vec<_> = before
        .extents()
        .iter()
        .filter_map(|extent| extent.clipped(&breach.range))
        .collect();
    assert_eq!(was, breach.before);
}

/// Has the holder move blocks by its own descriptor: no gate of permission
/// events hears of that. The kernel moves none of files on persistent memory:
/// says whether it did.
fn move_blocks(world: &World, kind: Kind, subject: &Subject, file: &File) -> bool {
    match subject.move_blocks(kind, file) {
        Ok(()) => true,
        Err(errno) => {
            assert!(kind.is_dax(), "{errno}");
            world.unavailable(format!("moving blocks on {kind}: {errno}"));
            false
        }
    }
}

fn moved_by_holder(world: &World, kind: Kind) {
    let guard = world.guard();
    let subject = Subject::new(&world.disk(kind), "tripwire-moved", false);
    let file = open(&subject.path);
    let pin = pin(&guard.client(), &file, subject.pinned());
    let since = since_the_epoch();
    if !move_blocks(world, kind, &subject, &file) {
        return;
    }
    let breach = noticed(world, &guard, pin.pin_id(), since);
    assert_differs(pin.block_map(), &breach);
    assert_eq!(breach.path, subject.path.to_string_lossy());
    let cause = breach.cause.unwrap();
    assert_eq!(cause.pid, std::process::id().cast_signed(), "{cause}");
    // It is told once, and the next one as well.
    let since = since_the_epoch();
    move_blocks(world, kind, &subject, &file);
    wait_for(patience(), || {
        let count = breaches(&guard, pin.pin_id()).len();
        assert!(count <= 2, "told {count} times");
        Ok((count == 2).then_some(()))
    })
    .unwrap();
    noticed(world, &guard, pin.pin_id(), since);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(breaches(&guard, pin.pin_id()).len(), 2);
    drop(pin);
}

/// A file without a name is found by its handle.
fn moved_when_deleted(world: &World, kind: Kind) {
    let guard = world.guard();
    let subject = Subject::new(&world.disk(kind), "tripwire-deleted", false);
    let file = open(&subject.path);
    let pin = pin(&guard.client(), &file, subject.pinned());
    std::fs::remove_file(&subject.path).unwrap();
    let since = since_the_epoch();
    if move_blocks(world, kind, &subject, &file) {
        noticed(world, &guard, pin.pin_id(), since);
    }
}

/// One event that matters among 10,000 that do not.
fn moved_in_a_burst(world: &World, kind: Kind) {
    let guard = world.guard();
    let subject = Subject::new(&world.disk(kind), "tripwire-burst", false);
    let file = open(&subject.path);
    let pin = pin(&guard.client(), &file, subject.pinned());
    let beside = subject.bytes(Place::After).0 + 16 * kind.block();
    let mut since = Duration::ZERO;
    for round in 0..5_000 {
        // Each is an event or two.
        let (mode, bytes) = if round % 2 == 0 {
            (3, beside)
        } else {
            (0, beside)
        };
        raw::fallocate(file.as_fd(), mode, bytes, kind.block()).unwrap();
        if round == 2_500 {
            since = since_the_epoch();
            if !move_blocks(world, kind, &subject, &file) {
                return;
            }
        }
    }
    let breach = noticed(world, &guard, pin.pin_id(), since);
    assert!(breach.cause.is_some());
}

/// More files than a filter can name.
fn moved_among_many(world: &World, kind: Kind) {
    let guard = world.guard();
    let disk = world.disk(kind);
    let block = kind.block();
    let mut others = Vec::new();
    for number in 0..150 {
        let path = disk.path(&format!("tripwire-many-{number}"));
        std::fs::write(&path, vec![1; usize::try_from(block).unwrap()]).unwrap();
        let file = open(&path);
        // Every other one, so that their numbers are no range.
        let other = (number % 2 == 0).then(|| pin(&guard.client(), &file, 0..block));
        others.push((path, file, other));
    }
    let subject = Subject::new(&disk, "tripwire-among", false);
    let file = open(&subject.path);
    let pin = pin(&guard.client(), &file, subject.pinned());
    let since = since_the_epoch();
    if move_blocks(world, kind, &subject, &file) {
        noticed(world, &guard, pin.pin_id(), since);
    }
    for (path, file, other) in others {
        if let Some(other) = &other {
            assert_eq!(breaches(&guard, other.pin_id()).len(), 0);
        }
        drop((other, file));
        std::fs::remove_file(path).unwrap();
    }
}

/// An overlay that is mounted when the file is pinned already truncates it, and
/// asks nobody.
fn overlay_later(world: &World, kind: Kind) {
    let disk = world.disk(kind);
    let guard = world.guard();
    let place = ScratchDirectory::new("tripwire-overlay").unwrap();
    let (lower, merged) = (place.path().join("lower"), place.path().join("merged"));
    let (upper, work) = (disk.path("tripwire-upper"), disk.path("tripwire-work"));
    for path in [&lower, &merged, &upper, &work] {
        std::fs::create_dir_all(path).unwrap();
    }
    let path = upper.join("file");
    std::fs::write(&path, vec![1; 16 * 4096]).unwrap();
    let file = open(&path);
    let held = pin(&guard.client(), &file, 0..16 * 4096);
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.display(),
        upper.display(),
        work.display()
    );
    let mounted = run(Command::new("mount")
        .args(["-t", "overlay", "overlay", "-o", &options])
        .arg(&merged));
    if let Err(error) = mounted {
        world.unavailable(format!("overlayfs: {error}"));
    } else {
        let since = since_the_epoch();
        match raw::truncate(&raw::c_path(&merged.join("file")), 4096) {
            Ok(()) => {
                let breach = noticed(world, &guard, held.pin_id(), since);
                assert_differs(held.block_map(), &breach);
                assert_eq!(breach.range, 4096..16 * 4096);
                assert!(
                    breach
                        .after
                        .iter()
                        .all(|extent| extent.state == ExtentState::Hole)
                );
            }
            // The gate has come to see it.
            Err(errno) => {
                assert_eq!(errno, Errno::TXTBSY);
                assert_eq!(file.metadata().unwrap().len(), 16 * 4096);
            }
        }
        unmount(&merged).unwrap();
    }
    drop((held, file));
    wait_until_free(&path);
    for path in [&upper, &work] {
        let _ = std::fs::remove_dir_all(path);
    }
}

/// Root takes the gate away.
fn taken_away(world: &World, kind: Kind) {
    let mut guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let subject = Subject::new(&world.disk(kind), "tripwire-away", false);
    let file = open(&subject.path);
    let held = pin(&guard.client(), &file, subject.pinned());
    let gate = guard.gate_directory().unwrap();
    run(Command::new("rm").arg("-rf").arg(gate)).unwrap();
    let (offset, length) = subject.bytes(Place::Stable);
    let since = since_the_epoch();
    match raw::fallocate(file.as_fd(), 3, offset, length) {
        Ok(()) => {
            let breach = noticed(world, &guard, held.pin_id(), since);
            assert_differs(held.block_map(), &breach);
            let cause = breach.cause.unwrap();
            assert_eq!(cause.pid, std::process::id().cast_signed(), "{cause}");
        }
        // The guard still has the programs, or has put them back.
        Err(errno) => {
            assert_eq!(errno, Errno::TXTBSY);
            world.unavailable(String::from(
                "a gate that is gone once its files are: the guard holds it",
            ));
        }
    }
    drop(held);
    guard.kill().unwrap();
}

/// A storage target discards in the file: nobody is asked.
fn nvmet(world: &World, kind: Kind) {
    let guard = world.guard();
    let subject = Subject::new(&world.disk(kind), "tripwire-nvmet", false);
    let Some(target) = Nvmet::new(&subject.path) else {
        world.unavailable(String::from("nvmet and nvme-loop"));
        return;
    };
    let file = File::open(&subject.path).unwrap();
    let pinned = PinOptions::new()
        .range(subject.pinned())
        .guard(guard.client())
        .pin(&file);
    let held = match pinned {
        Ok(held) => held,
        Err(refused) => {
            // It is known who could.
            assert_eq!(refused.errno(), Errno::TXTBSY.raw_os_error(), "{refused:#}");
            return;
        }
    };
    let since = since_the_epoch();
    let discarded = target.discard(subject.pinned());
    let now = mapdirect::block_map(&file, subject.pinned()).unwrap();
    if now.extents() == held.block_map().extents() {
        world.unavailable(format!("a discard by nvmet: {discarded:?}"));
        return;
    }
    let breach = noticed(world, &guard, held.pin_id(), since);
    assert_differs(held.block_map(), &breach);
}

/// A file served as an NVMe namespace to this machine itself.
struct Nvmet {
    device: std::path::PathBuf,
}

const CONFIG: &str = "/sys/kernel/config";
const NAME: &str = "mapdirect-tripwire";

impl Nvmet {
    fn new(file: &Path) -> Option<Self> {
        let script = format!(
            "set -e
             modprobe nvmet && modprobe nvme-loop
             mountpoint -q {CONFIG} || mount -t configfs none {CONFIG}
             cd {CONFIG}/nvmet
             mkdir subsystems/{NAME}
             echo 1 > subsystems/{NAME}/attr_allow_any_host
             mkdir subsystems/{NAME}/namespaces/1
             printf %s '{}' > subsystems/{NAME}/namespaces/1/device_path
             echo 1 > subsystems/{NAME}/namespaces/1/enable
             mkdir ports/77
             echo loop > ports/77/addr_trtype
             ln -s {CONFIG}/nvmet/subsystems/{NAME} ports/77/subsystems/{NAME}
             printf %s transport=loop,nqn={NAME} > /dev/nvme-fabrics",
            file.display()
        );
        let output = Command::new("sh").arg("-c").arg(script).output().unwrap();
        if !output.status.success() {
            remove_nvmet();
            return None;
        }
        let device = wait_for(patience(), || {
            let devices = std::fs::read_dir("/sys/block")?.flatten();
            let mut names = devices.map(|entry| entry.file_name().to_string_lossy().into_owned());
            let name = names.find(|name| name.starts_with("nvme"));
            let path = name.map(|name| Path::new("/dev").join(name));
            Ok(path.filter(|path| path.exists()))
        });
        match device {
            Ok(device) => Some(Self { device }),
            Err(_) => {
                remove_nvmet();
                None
            }
        }
    }

    fn discard(&self, range: std::ops::Range<u64>) -> anyhow::Result<()> {
        run(Command::new("blkdiscard")
            .args(["-o", &range.start.to_string()])
            .args(["-l", &(range.end - range.start).to_string()])
            .arg(&self.device))
    }
}

impl Drop for Nvmet {
    fn drop(&mut self) {
        remove_nvmet();
    }
}

fn remove_nvmet() {
    let script = format!(
        "for c in /sys/class/nvme/*/subsysnqn; do
             grep -qx {NAME} $c && echo 1 > $(dirname $c)/delete_controller
         done
         cd {CONFIG}/nvmet || exit 0
         rm -f ports/77/subsystems/{NAME}
         rmdir ports/77 subsystems/{NAME}/namespaces/1 subsystems/{NAME}"
    );
    let _ = Command::new("sh").arg("-c").arg(script).output();
}

/// How long the legal load goes on; `MAPDIRECT_SOAK` multiplies it.
fn load_time() -> Duration {
    let times = std::env::var(crate::random::SOAK_VARIABLE)
        .ok()
        .and_then(|times| times.parse().ok())
        .unwrap_or(1u32);
    let once = Duration::from_secs(if is_emulated() { 20 } else { 4 });
    once.saturating_mul(times.max(1))
        .min(Duration::from_secs(3600))
}

/// Everything that may be done beside a pin, at any speed: no alarm.
fn legal_load(world: &World, kind: Kind) {
    let guard = world.guard();
    let disk = world.disk(kind);
    let subject = Subject::new(&disk, "tripwire-legal", true);
    let file = open(&subject.path);
    let held = pin(&guard.client(), &file, subject.pinned());
    let aside = disk.path("tripwire-aside");
    let mut random = Random::new(u64::from(std::process::id()));
    let until = Instant::now() + load_time();
    let mut done = 0u64;
    let mut frozen_until = Instant::now();
    let mut second: Option<(Pin, std::ops::Range<u64>)> = None;
    let block = kind.block();
    let blocks = 512;
    while Instant::now() < until {
        // Anywhere but in the pin, up to its very edges.
        let at = random.below(blocks);
        let count = 1 + random.below(16);
        let place = at * block..(at + count) * block;
        let meets =
            |range: &std::ops::Range<u64>| place.start < range.end && range.start < place.end;
        let is_free =
            !meets(&subject.pinned()) && second.as_ref().is_none_or(|(_, range)| !meets(range));
        let choice = random.below(16);
        if !is_free && choice < 10 {
            continue;
        }
        let length = usize::try_from(place.end - place.start).unwrap();
        // The gate may refuse more than it must.
        let legal = |result: Result<(), Errno>| {
            assert!(
                matches!(result, Ok(()) | Err(Errno::TXTBSY | Errno::NOSPC)),
                "{choice}: {result:?}"
            );
        };
        match choice {
            0 | 1 => legal(write(&file, &vec![7; length], place.start)),
            2 => legal(raw::fallocate(
                file.as_fd(),
                0,
                place.start,
                place.end - place.start,
            )),
            3 => legal(raw::fallocate(
                file.as_fd(),
                1,
                place.start,
                place.end - place.start,
            )),
            4 | 5 => legal(raw::fallocate(
                file.as_fd(),
                3,
                place.start,
                place.end - place.start,
            )),
            6 => legal(raw::fallocate(
                file.as_fd(),
                0x10,
                place.start,
                place.end - place.start,
            )),
            7 if kind.reflink() => {
                let other = open(&subject.other);
                let result = mapdirect_testkit::attack::clone_range(
                    file.as_fd(),
                    other.as_fd(),
                    0,
                    count.min(16) * block,
                    place.start,
                );
                legal(result);
            }
            8 => {
                let size = file.metadata().unwrap().len();
                legal(rustix::fs::ftruncate(&file, size.max(place.end)));
            }
            9 => {
                let end = subject.pinned().end.max(place.end);
                if second.is_none() {
                    legal(rustix::fs::ftruncate(&file, end));
                }
            }
            10 => file.sync_all().unwrap(),
            // In the pin itself, where it is stable.
            11 => legal(write(&file, &vec![9; 4096], subject.bytes(Place::First).0)),
            // Pins come, and what they pinned may be punched as soon as they go.
            12 => match second.take() {
                Some((pin, range)) => {
                    drop(pin);
                    if !meets_range(&range, &subject.pinned()) {
                        let length = range.end - range.start;
                        legal(raw::fallocate(file.as_fd(), 3, range.start, length));
                    }
                }
                None => {
                    let options = PinOptions::new().range(place.clone()).guard(guard.client());
                    if let Ok(pin) = options.pin(&file) {
                        second = Some((pin, place));
                    }
                }
            },
            13 if Instant::now() > frozen_until => {
                drop(Frozen::new(&disk));
                frozen_until = Instant::now() + Duration::from_millis(700);
            }
            14 => {
                std::fs::write(&aside, vec![1; length]).unwrap();
                let _ = std::fs::remove_file(&aside);
            }
            _ => {
                rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
            }
        }
        done += 1;
    }
    drop(second);
    file.sync_all().unwrap();
    std::thread::sleep(Duration::from_millis(600));
    world.count("legal operations beside a pin", done);
    let now = mapdirect::block_map(&file, subject.pinned()).unwrap();
    assert_eq!(
        held.block_map().extents(),
        now.extents(),
        "not legal after all"
    );
    let alarms = breaches(&guard, held.pin_id());
    assert!(alarms.is_empty(), "{alarms:#?}");
    drop(held);
}

/// What a holder has allocated is no breach, and is watched from then on.
fn allocated_by_holder(world: &World, kind: Kind) {
    let guard = world.guard();
    let path = world.disk(kind).path("tripwire-allocated");
    for round in 0..5 {
        let file = File::create_new(&path).unwrap();
        file.set_len(512 * 4096).unwrap();
        file.write_all_at(&[1; 4096], 9 * 4096).unwrap();
        raw::fallocate(file.as_fd(), 0, 64 * 4096, 64 * 4096).unwrap();
        file.sync_all().unwrap();
        drop(file);
        let file = open(&path);
        let mut held = map(&guard.client(), &file, 0..512 * 4096);
        for part in 0..8 {
            let start = (part * 64 + round) * 4096;
            // Others on the machine may stand in the way for a moment.
            wait_for(patience(), || {
                match held.allocate(start..start + 4096 * 16) {
                    Err(error) if error.errno() == libc::ETXTBSY => Ok(None),
                    done => Ok(Some(done?)),
                }
            })
            .unwrap();
        }
        std::thread::sleep(Duration::from_millis(100));
        let alarms = breaches(&guard, held.pin_id());
        assert!(alarms.is_empty(), "{alarms:#?}");
        world.count("allocations of holders", 8);
        drop((held, file));
        wait_until_free(&path);
        std::fs::remove_file(&path).unwrap();
    }
}

fn meets_range(one: &std::ops::Range<u64>, other: &std::ops::Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

fn write(file: &File, bytes: &[u8], at: u64) -> Result<(), Errno> {
    file.write_all_at(bytes, at)
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}
