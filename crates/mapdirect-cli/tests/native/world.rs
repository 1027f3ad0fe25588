//! What tests share: disks, made when the first test needs them, a guard, and
//! the list of what could not be tried here.

use libtest_mimic::{Failed, Trial};
use mapdirect::{DirectMap, Guard, MapOptions, Pin, PinOptions};
use mapdirect_sys::{Errno, proc, uname};
use mapdirect_testkit::contract::Gate;
use mapdirect_testkit::process::{GuardProcess, Role};
use mapdirect_testkit::{Disk, Kind};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The binary under test.
pub const BINARY: &str = env!("CARGO_BIN_EXE_mapdirect");

/// Everything tests share.
#[derive(Clone)]
pub struct World(Arc<Inner>);

struct Inner {
    disks: Mutex<BTreeMap<String, Arc<Disk>>>,
    guard: Mutex<Option<Arc<GuardProcess>>>,
    unavailable: Mutex<BTreeSet<String>>,
    counts: Mutex<BTreeMap<&'static str, u64>>,
}

/// Programs this binary can play besides the tests.
pub fn roles() -> Vec<Role> {
    vec![
        ("member", crate::family::play_member),
        ("hold", crate::lifetime::play_holder),
        ("killed-attacker", crate::killed::play),
        ("declared-server", crate::declared::play),
        ("service-manager", mapdirect_testkit::service_manager::play),
        ("random", crate::random::play_attacker),
        ("mmap", crate::errors::play_mmap),
        ("pin", crate::errors::play_pin),
        ("own-namespace", crate::abuse::play_own_namespace),
        ("asks-by-policy", crate::policy::play_asks),
        ("headless", crate::openers::play_headless),
        ("many-mappings", crate::openers::play_many_mappings),
        ("stuck", crate::stuck::play_stuck),
        ("crowd", crate::service::play_crowd),
        ("map-direct", crate::service::play_map_direct),
        ("asks", crate::strangers::play_asks),
        ("stranger", crate::strangers::play_stranger),
        ("patience-stranger", crate::patience::play_stranger),
        ("close-all", crate::segments::play_close_all),
        ("fixed", crate::segments::play_fixed),
        ("probe", crate::segments::play_probe),
        ("store", crate::segments::play_store),
        ("halfway", crate::segments::play_halfway),
        ("writer", crate::prepare::play_writer),
        ("map-shared", crate::in_kernel::play_map_shared),
        ("map-moving", crate::in_kernel::play_map_moving),
        ("few-descriptors", crate::programs::play_few_descriptors),
        ("fork-handlers", crate::programs::play_fork_handlers),
        ("locked-memory", crate::programs::play_locked_memory),
        ("merged-memory", crate::programs::play_merged_memory),
        ("inherits", crate::programs::play_inherits),
        ("hammer", mapdirect_testkit::hammer::play),
        ("legal", mapdirect_testkit::legal::play),
        ("overlay", mapdirect_testkit::overlay::play),
        ("dump-core", crate::writers::play_dump_core),
        ("sharer", crate::neighbours::play_sharer),
        ("stable-stranger", crate::stable::hammer::play_stranger),
        ("forked", crate::states::play_forked),
        ("locks", crate::grants::play_locks),
        ("example-log", crate::examples::play_log),
        ("example-reader", crate::examples::play_reader),
        ("example-raw-reader", crate::examples::play_raw_reader),
    ]
}

/// A test on a filesystem.
pub type OnKind = fn(&World, Kind);

/// Whether a thread of a process is inside a kernel function.
pub fn is_inside(pid: i32, function: &str) -> bool {
    let threads = proc::numbers_in(&format!("/proc/{pid}/task")).unwrap_or_default();
    threads
        .into_iter()
        .any(|tid| proc::read_task_file(tid, "stack").is_ok_and(|stack| stack.contains(function)))
}

/// The filesystems to test on: `here`, or DAX where there is persistent
/// memory, as in the virtual machine that has it.
pub fn kinds(here: &[Kind]) -> Vec<Kind> {
    let dax = dax_kinds();
    if dax.is_empty() { here.to_vec() } else { dax }
}

/// Those on persistent memory, as far as there is some.
pub fn dax_kinds() -> Vec<Kind> {
    let all = Kind::DAX.into_iter();
    all.filter(|kind| kind.device().is_some()).collect()
}

/// Set where processors are emulated and time is short: what differs little
/// from something else that is tried is left to `cargo xtask soak`.
const BRIEF: &str = "MAPDIRECT_BRIEF";

/// Whether time is short.
pub fn is_brief() -> bool {
    std::env::var_os(BRIEF).is_some()
}

/// XFS through the page cache before Linux 6.6: a write to a part of a folio
/// makes all of it dirty, so the bpf gate lets nobody write near what is
/// frozen and unwritten.
pub fn dirties_whole_folios(kind: Kind) -> bool {
    kind.is_xfs() && !kind.is_dax() && uname::version() < (6, 6)
}

impl World {
    pub fn new() -> Self {
        Self(Arc::new(Inner {
            disks: Mutex::default(),
            guard: Mutex::default(),
            unavailable: Mutex::default(),
            counts: Mutex::default(),
        }))
    }

    /// The disk of a kind, shared by all tests.
    pub fn disk(&self, kind: Kind) -> Arc<Disk> {
        let mut disks = self.0.disks.lock().unwrap_or_else(PoisonError::into_inner);
        let disk = disks
            .entry(kind.to_string())
            .or_insert_with(|| Arc::new(Disk::new(kind, 512).unwrap()));
        Arc::clone(disk)
    }

    /// The guard, shared by all tests that leave it alive.
    pub fn guard(&self) -> Arc<GuardProcess> {
        let mut guard = self.0.guard.lock().unwrap_or_else(PoisonError::into_inner);
        let running =
            guard.get_or_insert_with(|| Arc::new(GuardProcess::start(Path::new(BINARY)).unwrap()));
        Arc::clone(running)
    }

    /// Ends the shared guard, for a test that has one of its own: the programs of
    /// two guards answer for each other's files.
    pub fn end_guard(&self) {
        let mut guard = self.0.guard.lock().unwrap_or_else(PoisonError::into_inner);
        drop(guard.take());
    }

    /// Notes something this kernel or device does not have.
    pub fn unavailable(&self, what: String) {
        let mut unavailable = self
            .0
            .unavailable
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        unavailable.insert(what);
    }

    /// Counts something that was tried.
    pub fn count(&self, what: &'static str, by: u64) {
        let mut counts = self.0.counts.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry(what).or_default() += by;
    }

    /// Says what was tried, and what could not be.
    pub fn report(&self) {
        let counts = self.0.counts.lock().unwrap_or_else(PoisonError::into_inner);
        for (what, count) in &*counts {
            println!("tried: {count} {what}");
        }
        let unavailable = self
            .0
            .unavailable
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for what in &*unavailable {
            println!("not available here: {what}");
        }
    }

    /// Tests of a module on each of some filesystems.
    pub fn trials(&self, module: &str, kinds: &[Kind], tests: &[(&str, OnKind)]) -> Vec<Trial> {
        let on = |kind: Kind| {
            tests.iter().map(move |&(name, run)| {
                let name = format!("{module}::{kind}::{name}");
                self.trial(name, move |world| run(world, kind))
            })
        };
        kinds.iter().copied().flat_map(on).collect()
    }

    /// A trial that needs root.
    pub fn trial(
        &self,
        name: impl Into<String>,
        run: impl FnOnce(&World) + Send + 'static,
    ) -> Trial {
        let world = self.clone();
        let name = name.into();
        Trial::test(name.clone(), move || {
            let _watched = crate::hang::watch(name);
            if !rustix::process::geteuid().is_root() {
                return Err(Failed::from("needs root: run `cargo xtask test`"));
            }
            // In a thread of its own: a thread that has used io_uring once is
            // judged otherwise for as long as it lives.
            let ended = std::thread::scope(|scope| scope.spawn(|| run(&world)).join());
            match ended {
                Ok(()) => Ok(()),
                Err(panicked) => std::panic::resume_unwind(panicked),
            }
        })
        .with_ignored_flag(true)
    }
}

/// Opens a file for reading and writing.
pub fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

/// A new file of so many bytes, written and synced.
pub fn written(disk: &Disk, name: &str, length: usize) -> PathBuf {
    let path = disk.path(name);
    std::fs::write(&path, vec![7; length]).unwrap();
    File::open(&path).unwrap().sync_all().unwrap();
    path
}

/// Longer than any test of another thread keeps a shared thing busy.
/// In a virtual machine everything takes longer.
pub const PATIENCE: Duration = Duration::from_secs(8);

/// More of it where the processor is emulated on a machine that has other
/// things to do: a look at a process may take a second there.
pub fn patience() -> Duration {
    if is_emulated() {
        5 * PATIENCE
    } else {
        PATIENCE
    }
}

/// Whether this is a virtual machine as tests are run in: without KVM all of
/// it takes many times as long.
pub fn is_emulated() -> bool {
    Gate::under_test() == Gate::Bpf || !dax_kinds().is_empty()
}

/// Maps a range with the page cache accepted.
pub fn map(guard: &Guard, file: &File, range: std::ops::Range<u64>) -> DirectMap {
    MapOptions::new()
        .range(range)
        .accept_page_cache(true)
        .patience(patience())
        .guard(guard.clone())
        .map(file)
        .unwrap()
}

/// Pins a range.
pub fn pin(guard: &Guard, file: &File, range: std::ops::Range<u64>) -> Pin {
    PinOptions::new()
        .range(range)
        .patience(patience())
        .guard(guard.clone())
        .pin(file)
        .unwrap()
}

/// Whether anything of a file is pinned: nobody may open it for writing then,
/// or, where the gate is precise, take anything out of its beginning.
pub fn is_pinned(path: &Path) -> bool {
    if Gate::under_test() == Gate::Bpf {
        let file = File::options().write(true).open(path).unwrap();
        // No block is a byte long, so it fails in any case.
        let collapse = rustix::fs::FallocateFlags::COLLAPSE_RANGE;
        let refused = rustix::fs::fallocate(&file, collapse, 0, 1).unwrap_err();
        assert!(matches!(refused, Errno::TXTBSY | Errno::INVAL), "{refused}");
        return refused == Errno::TXTBSY;
    }
    match File::options().write(true).open(path) {
        Ok(_) => false,
        Err(error) => {
            assert_eq!(error.kind(), std::io::ErrorKind::ExecutableFileBusy);
            true
        }
    }
}

/// Waits until nothing of a file is pinned any more. That is soon, unless a child
/// that another test has just forked still shares the descriptors of this process.
pub fn wait_until_free(path: &Path) {
    let deadline = Instant::now() + patience();
    while is_pinned(path) {
        assert!(
            Instant::now() < deadline,
            "{} is still pinned",
            path.display()
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}
