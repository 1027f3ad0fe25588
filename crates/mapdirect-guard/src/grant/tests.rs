//! Grants on real files, each step of them made to fail: nothing may be left
//! behind then. They need root and a loop device.

use super::*;
use crate::delegation::Delegation;
use crate::gate::{Gate, fanotify};
use crate::table::LOCK_BASE;
use mapdirect_proto::Flags;
use mapdirect_sys::fcntl::conflicting_lock;
use mapdirect_sys::seam::{self, Call};
use mapdirect_sys::{Errno, dup};
use mapdirect_testkit::{Disk, Kind};
use std::fs::File;
use std::path::{Path, PathBuf};

/// A guard without a socket, its gate, and its threads.
fn with_guard(run: impl FnOnce(&Guard, &fanotify::Gate)) {
    // Leases taken for a moment raise it.
    mapdirect_sys::signal::ignore(libc::SIGIO).unwrap();
    let starter = Arc::new(crate::Starter::none());
    let gate = Arc::new(fanotify::Gate::new(&starter).unwrap());
    let limits = crate::places::Limits::of_process(Some(1024));
    let delegation = Delegation::new(PathBuf::from("/nonexistent/policy.toml"), 1024).unwrap();
    let guard = Guard::new(
        Arc::clone(&gate) as Arc<dyn Gate>,
        limits,
        delegation,
        starter,
    )
    .unwrap();
    std::thread::scope(|scope| {
        for task in Arc::clone(&gate).tasks(Box::new(|_| {})) {
            let guard = &guard;
            scope.spawn(move || (task.run)(guard).unwrap());
        }
        run(&guard, &gate);
        guard.stop();
    });
}

/// A holder in this very process.
struct Holder<'a> {
    file: &'a File,
    /// It does not do as it is told.
    refuses: bool,
}

impl Conversation for Holder<'_> {
    fn swap(&mut self, replacement: BorrowedFd<'_>) -> Result<(), Refusal> {
        if self.refuses {
            return Err(refusal(Reason::Protocol, Errno::PIPE, "it is gone", ""));
        }
        dup::replace(self.file.as_fd(), replacement).map_err(|errno| system("dup3", errno))
    }
}

fn request(flags: Flags) -> PinRequest {
    PinRequest {
        offset: 0,
        length: 65536,
        flags,
        patience_ms: 50,
    }
}

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

fn ask(guard: &Guard, file: &File, flags: Flags, refuses: bool) -> Result<Grant, Refusal> {
    let passed = rustix::io::fcntl_dupfd_cloexec(file, 0).unwrap();
    let owner = Sender {
        pid: std::process::id().cast_signed(),
        uid: 0,
    };
    let mut holder = Holder { file, refuses };
    grant(guard, &request(flags), passed, owner, None, &mut holder)
}

/// The inode is as if nobody had ever asked for a pin.
fn assert_untouched(guard: &Guard, gate: &fanotify::Gate, path: &Path, what: &str) {
    assert_eq!(guard.table.all().len(), 0, "{what}: still in the table");
    let file = open(path);
    assert_eq!(
        gate.group.has_mark(file.as_fd()),
        Ok(false),
        "{what}: still marked"
    );
    let length = i64::MAX.cast_unsigned() - LOCK_BASE;
    let lock = conflicting_lock(file.as_fd(), LOCK_BASE, length).unwrap();
    assert_eq!(lock, None, "{what}: still locked");
    file.set_len(1 << 20).unwrap();
    file.set_len(65536 * 2).unwrap();
}

/// Waits until the last pin is gone, and the inode out of the table.
fn wait_until_empty(guard: &Guard) {
    for _ in 0..2000 {
        if guard.table.all().is_empty() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("the inode is still behind the gate");
}

fn each_step_fails(kind: Kind, flags: Flags) {
    let disk = Disk::new(kind, 320).unwrap();
    let path = disk.path("file");
    std::fs::write(&path, vec![7; 65536 * 2]).unwrap();
    with_guard(|guard, gate| {
        let mut failed = 0;
        for call in Call::ALL {
            for skip in 0..8 {
                let file = open(&path);
                rustix::fs::fsync(&file).unwrap();
                let what = format!("{call:?} after {skip}");
                seam::fail_after(call, skip, Errno::NOMEM);
                let granted = ask(guard, &file, flags, false);
                seam::clear();
                if let Ok(granted) = granted {
                    // It can do without, or makes fewer such calls.
                    granted.pin.hand_over();
                    drop((granted, file));
                    wait_until_empty(guard);
                } else {
                    failed += 1;
                    drop(file);
                }
                assert_untouched(guard, gate, &path, &what);
            }
        }
        assert!(failed >= 8, "only {failed} steps failed");
        // After all that it still works.
        let file = open(&path);
        let granted = ask(guard, &file, flags, false).unwrap();
        granted.pin.hand_over();
        assert_eq!(rustix::fs::ftruncate(&file, 0), Err(Errno::TXTBSY));
        drop((granted, file));
        wait_until_empty(guard);
    });
}

#[test]
#[ignore = "needs root and loop devices: cargo xtask test"]
fn a_step_that_fails_leaves_nothing_on_xfs() {
    each_step_fails(Kind::XFS, Flags::MAP | Flags::CACHED);
}

#[test]
#[ignore = "needs root and loop devices: cargo xtask test"]
fn a_step_that_fails_leaves_nothing_on_ext4() {
    each_step_fails(Kind::EXT4, Flags::NONE);
}

#[test]
#[ignore = "needs root and loop devices: cargo xtask test"]
fn a_holder_that_leaves_in_the_middle_leaves_nothing() {
    let disk = Disk::new(Kind::EXT4, 64).unwrap();
    let path = disk.path("file");
    std::fs::write(&path, vec![7; 65536 * 2]).unwrap();
    with_guard(|guard, gate| {
        let file = open(&path);
        let refused = ask(guard, &file, Flags::NONE, true).unwrap_err();
        assert_eq!(refused.reason, Reason::Protocol);
        drop(file);
        assert_untouched(guard, gate, &path, "a holder that left");
    });
}
