//! Locks of programs on files that are being pinned.

use super::*;
use crate::versions::{Asked, ask_for_pin};
use mapdirect_proto::{Flags, VERSION};
use mapdirect_testkit::process::{HELPER, say};
use rustix::fs::{FlockOperation as Flock, fcntl_lock, flock};
use std::os::fd::BorrowedFd;

/// Has the program that is run in this role lock what it has as its input.
pub(crate) fn play_locks(_arguments: &[String]) -> anyhow::Result<()> {
    lock_the_whole(std::io::stdin().as_fd());
    say("locked");
    Ok(())
}

/// Locks a whole file in each way that programs do, without waiting and with:
/// rrdtool (F_SETLK), Kyoto Cabinet (F_SETLKW), etcd (F_OFD_SETLK), bbolt
/// (flock).
fn lock_the_whole(file: BorrowedFd<'_>) {
    for lock in [Flock::NonBlockingLockExclusive, Flock::LockExclusive] {
        fcntl_lock(file, lock).unwrap();
        fcntl_lock(file, Flock::Unlock).unwrap();
        flock(file, lock).unwrap();
        flock(file, Flock::Unlock).unwrap();
    }
    for kind in [LockKind::Exclusive, LockKind::Unlock] {
        set_lock(file, LockOwner::Description, kind, 0, 0).unwrap();
    }
}

/// Locks a whole file in this process and in another.
fn all_lock_the_whole(file: BorrowedFd<'_>) {
    lock_the_whole(file);
    let mut other = Command::new(std::env::current_exe().unwrap())
        .args([HELPER, "locks"])
        .stdin(file.try_clone_to_owned().unwrap())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let ended = wait_for(Duration::from_secs(10), || {
        Ok(other.try_wait()?.map(|status| status.success()))
    });
    let _ = other.kill();
    other.wait().unwrap();
    assert!(ended.unwrap(), "the other process could not lock the file");
}

/// A pin that is not mapped leaves the locks of a file to its programs, and so
/// does one that lives in the description of a program.
pub(crate) fn whole_file_locks(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "whole");
    let guard = world.guard();
    let file = open(&path);
    let held = impatient(&guard.client()).pin(&file).unwrap();
    all_lock_the_whole(file.as_fd());
    assert!(is_pinned(&path));
    // A lock that is there does not stand in the way of the next pin.
    let (owner, exclusive) = (LockOwner::Description, LockKind::Exclusive);
    set_lock(file.as_fd(), owner, exclusive, 0, 0).unwrap();
    drop(pin(&guard.client(), &file, 65536..131_072));
    set_lock(file.as_fd(), owner, LockKind::Unlock, 0, 0).unwrap();
    drop((held, file));
    // A child that another test is just making has them, too, for a moment.
    wait_until_free(&path);
    if Gate::under_test() == Gate::Fanotify {
        in_place(guard.socket(), &path);
    }
    std::fs::remove_file(&path).unwrap();
}

/// The pin's description is the program's own.
fn in_place(guard: &Path, path: &Path) {
    let file = open(path).into();
    let asked = ask_for_pin(guard, VERSION, file, Flags::IN_PLACE);
    let Asked { fds, file, .. } = asked;
    let [description] = fds.as_slice() else {
        panic!("only a description was expected: {fds:?}");
    };
    drop(file);
    all_lock_the_whole(description.as_fd());
    assert!(is_pinned(path));
    // A reader's lock keeps nothing alive.
    let reader = File::open(path).unwrap();
    let shared = LockKind::Shared;
    set_lock(reader.as_fd(), LockOwner::Description, shared, 0, 0).unwrap();
    let (both, how) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
    let mapping = PlainMap::new(description.as_fd(), both, how, 0, 65536).unwrap();
    drop(fds);
    assert!(is_pinned(path), "a mapping holds it");
    drop(mapping);
    wait_until_free(path);
}

pub(crate) fn record_locks(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "locks");
    let guard = world.guard().client();
    let file = open(&path);
    // To the end of all offsets, where pins are marked.
    let exclusive = LockKind::Exclusive;
    set_lock(file.as_fd(), LockOwner::Description, exclusive, 100, 0).unwrap();
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let held = impatient(&guard).pin(&file).unwrap();
    let stranger = File::open(&path).unwrap();
    let found = conflicting_lock(stranger.as_fd(), 100, 1).unwrap();
    assert!(found.is_some(), "the lock is still there");
    let shared = rustix::fs::FlockOperation::NonBlockingLockShared;
    assert_eq!(rustix::fs::flock(&stranger, shared), Err(Errno::AGAIN));
    drop((held, file, stranger));
    wait_until_free(&path);
    // POSIX locks would be lost, and that is said.
    let file = open(&path);
    set_lock(file.as_fd(), LockOwner::Process, exclusive, 0, 10).unwrap();
    let error = refused(impatient(&guard).pin(&file));
    assert_eq!(error.kind(), Reason::Locked, "{error:#}");
    let stranger = File::open(&path).unwrap();
    let found = conflicting_lock(stranger.as_fd(), 0, 10).unwrap();
    assert!(found.is_some(), "and the lock is still there");
    // Dropping the stranger costs this process the lock.
    drop((stranger, file));
    std::fs::remove_file(&path).unwrap();
}

/// Somebody's shared lock to the end of all offsets covers the lock of a
/// mapping's pin.
pub(crate) fn foreign_locks(world: &World, kind: Kind) {
    let (_disk, path) = subject(world, kind, "foreign");
    let guard = world.guard().client();
    let file = open(&path);
    let held = map(&guard, &file, 0..65536);
    let reader = File::open(&path).unwrap();
    set_lock(
        reader.as_fd(),
        LockOwner::Description,
        LockKind::Shared,
        0,
        0,
    )
    .unwrap();
    let second = PinOptions::new()
        .range(65536..131_072)
        .guard(guard.clone())
        .pin(&file)
        .unwrap();
    drop(held);
    assert!(is_pinned(&path), "one is left");
    drop((second, file));
    wait_until_free(&path);
    drop(reader);
    std::fs::remove_file(&path).unwrap();
}
