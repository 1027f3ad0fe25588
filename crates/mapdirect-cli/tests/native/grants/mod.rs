//! Grants: a promise is made only when it can be kept.

mod blocks;
mod locks;
mod open;

pub(crate) use self::blocks::*;
pub(crate) use self::locks::*;
pub(crate) use self::open::*;

use crate::world::{
    PATIENCE, World, dirties_whole_folios, is_inside, is_pinned, kinds, map, open, pin,
    wait_until_free, written,
};
use libtest_mimic::Trial;
use mapdirect::{DirectMap, ExtentState, Guard, Kind as Reason, MapOptions, Pin, PinOptions};
use mapdirect_sys::fcntl::{LockKind, LockOwner, conflicting_lock, set_lock};
use mapdirect_sys::unix::Socket;
use mapdirect_sys::{Errno, inode_flags};
use mapdirect_testkit::attack::clone_range;
use mapdirect_testkit::contract::Gate;
use mapdirect_testkit::disk::{Frozen, run};
use mapdirect_testkit::process::{Background, wait_for};
use mapdirect_testkit::raw::{self, PlainMap};
use mapdirect_testkit::{Disk, Kind};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub fn trials(world: &World) -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(world.trials(
        "grants",
        &kinds(&[Kind::XFS, Kind::EXT4]),
        &[
            ("who-has-it-open", who_has_it_open),
            ("patience", patience),
            ("duplicate", duplicate),
            ("inherited", inherited),
            ("mapped-before", mapped_before),
            ("in-flight", in_flight),
            ("registered", registered),
            ("frozen-truncate", frozen_truncate),
            ("frozen-write", frozen_write),
            ("frozen-write-behind-the-gate", frozen_write_behind_the_gate),
            ("dirty", dirty),
            ("description", description),
            ("record-locks", record_locks),
            ("foreign-locks", foreign_locks),
            ("whole-file-locks", whole_file_locks),
            ("at-once", at_once),
            ("many-extents", many_extents),
            ("rounding", rounding),
            ("beyond-the-end", beyond_the_end),
            ("bytes", bytes),
            ("gone", gone),
            ("unmounted", unmounted),
            ("busy-processor", busy_processor),
            ("hammered", hammered),
        ],
    ));
    trials.push(world.trial("grants::xfs::allocated-ahead", allocated_ahead));
    trials.push(world.trial("grants::xfs::extent-size-hint", extent_size_hint));
    trials.push(world.trial("grants::xfs::copied-along", copied_along));
    trials.push(world.trial("grants::xfs::collapsed-towards", collapsed_towards));
    trials.push(world.trial("grants::xfs::allocated-into", allocated_into));
    trials.push(world.trial("grants::ext4::converted-along", converted_along));
    trials.push(world.trial("grants::xfs-plain::reader", reader_without_reflink));
    trials
}

fn subject(world: &World, kind: Kind, name: &str) -> (std::sync::Arc<Disk>, std::path::PathBuf) {
    let disk = world.disk(kind);
    let path = written(&disk, &format!("grants-{name}"), 1 << 20);
    (disk, path)
}

fn impatient(guard: &Guard) -> PinOptions {
    PinOptions::new()
        .range(0..65536)
        .patience(Duration::from_millis(20))
        .guard(guard.clone())
}

fn refused(result: mapdirect::Result<Pin>) -> mapdirect::Error {
    let error = result.unwrap_err();
    assert_eq!(error.errno(), Errno::TXTBSY.raw_os_error(), "{error:#}");
    error
}

/// Whoever could change the file unseen is in the way of a pin by permission
/// events, and the refusal is returned; in the way of one in the kernel is
/// nobody.
fn excluded(result: mapdirect::Result<Pin>) -> Option<mapdirect::Error> {
    match Gate::under_test() {
        Gate::Fanotify => Some(refused(result)),
        Gate::Bpf => {
            drop(result.unwrap());
            None
        }
    }
}

/// Why a pin is refused beside an operation of the holder's own that is under
/// way.
fn reason_of_own_operation() -> Reason {
    match Gate::under_test() {
        Gate::Fanotify => Reason::OpenHere,
        Gate::Bpf => Reason::StillChanging,
    }
}
