//! Pinning again what was pinned a moment ago, by mmap(2) alone.
//!
//! Where programs in the kernel judge, a stable pin that ends stays dormant for
//! some seconds: mmap(2) with `MAP_DIRECT` takes it up again, if nobody has done
//! anything meanwhile that it would have refused. So when a mapping goes, what
//! is known of it is kept here, and its pin stays watched; the next mapping of
//! the same range tries that first, without a word to the guard. Whatever is in
//! the way, the guard is asked as for any other pin.
//!
//! A kernel without the programs takes `MAP_DIRECT` for nothing, and maps. So
//! the programs are asked whether the description that was mapped is the pin:
//! only they know that question.

use crate::descriptor::{locks, require_read_write};
use crate::guard::Guard;
use crate::holder::Held;
use crate::map::{Durability, revoke, segments};
use crate::raw::MAP_DIRECT;
use crate::state::OnBreach;
use mapdirect_model::plan::Plan;
use mapdirect_proto::{IS_IT_PIN, MAY_TAKE_UP, PIN_NUMBER};
use mapdirect_sys::{Errno, fcntl, mmap, reopen};
use rustix::fs::OFlags;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// How long what is known of a mapping is kept: as long as the guard keeps its
/// pin.
const LINGER: Duration = Duration::from_secs(10);
/// Of how many mappings.
const MOST: usize = 64;

/// What a mapping must have in common with an earlier one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) guard: Guard,
    pub(crate) range: Range<u64>,
    /// Flags of `mmap(2)`.
    pub(crate) flags: i32,
    pub(crate) cached: bool,
}

/// What is known of a mapping that is gone.
#[derive(Debug)]
pub(crate) struct Known {
    pub(crate) shape: Shape,
    pub(crate) held: Held,
    pub(crate) plan: Plan,
    pub(crate) durability: Durability,
}

#[derive(Debug)]
struct Kept {
    known: Known,
    since: Instant,
}

/// Those of this process, and of the one it is a child of: they are of no use to
/// it. Nobody waits for this: it may be locked for ever in a child of fork(2).
static KEPT: Mutex<Vec<Kept>> = Mutex::new(Vec::new());
/// How many there are.
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// Keeps what is known of a mapping that has just gone.
pub(crate) fn keep(known: Known) {
    let Ok(mut kept) = KEPT.try_lock() else {
        return;
    };
    let now = Instant::now();
    let id = |known: &Known| {
        (
            known.held.hold().named().device,
            known.held.hold().named().inode,
        )
    };
    let mut gone: Vec<Kept> = kept
        .extract_if(.., |other| {
            now.duration_since(other.since) >= LINGER
                || other.known.shape == known.shape && id(&other.known) == id(&known)
        })
        .collect();
    if kept.len() >= MOST {
        gone.push(kept.remove(0));
    }
    kept.push(Kept { known, since: now });
    COUNT.store(kept.len(), Relaxed);
    drop(kept);
    // Each lets go of its pin, which takes a lock.
    drop(gone);
}

/// Takes out what is known of a mapping of this shape, if the file lets its pin
/// be taken up again.
fn take(file: BorrowedFd<'_>, shape: &Shape) -> Option<Known> {
    if COUNT.load(Relaxed) == 0 {
        return None;
    }
    // Most programs map no two files in one way, and then the programs in the
    // kernel say by one answer what would take several calls.
    let pin = only_one(shape)
        .filter(|pin| asks(file, MAY_TAKE_UP, *pin))
        .or_else(|| find(file, shape))?;
    let mut kept = KEPT.try_lock().ok()?;
    let at = kept.iter().position(|kept| {
        let hold = kept.known.held.hold();
        hold.id() == pin && kept.known.shape == *shape && hold.is_own()
    })?;
    let found = kept.remove(at);
    COUNT.store(kept.len(), Relaxed);
    drop(kept);
    (found.since.elapsed() < LINGER).then_some(found.known)
}

/// The pin of a mapping of this shape, if there was only one such mapping.
fn only_one(shape: &Shape) -> Option<u64> {
    let kept = KEPT.try_lock().ok()?;
    let mut alike = kept.iter().filter(|kept| kept.known.shape == *shape);
    let first = alike.next()?;
    alike.next().is_none().then(|| first.known.held.hold().id())
}

/// The pin of a mapping of this shape and file.
fn find(file: BorrowedFd<'_>, shape: &Shape) -> Option<u64> {
    let stat = rustix::fs::fstat(file).ok()?;
    let pin = {
        let kept = KEPT.try_lock().ok()?;
        let found = kept.iter().find(|kept| {
            let named = kept.known.held.hold().named();
            (named.device, named.inode) == (stat.st_dev, stat.st_ino) && kept.known.shape == *shape
        })?;
        found.known.held.hold().id()
    };
    // What is opened here is closed again, and with that go such locks.
    require_read_write(file).ok()?;
    locks::refuse_posix_locks(file).ok()?;
    Some(pin)
}

/// Maps a range again that was mapped before, and returns the address; nothing
/// if the guard must be asked.
pub(crate) fn map(
    file: BorrowedFd<'_>,
    shape: &Shape,
    on_breach: OnBreach,
) -> Option<(usize, Known)> {
    let mut known = take(file, shape)?;
    // The pin lives as long as this description does, so it is one of its own.
    let pinned = reopen::reopen(file, OFlags::RDWR).ok()?;
    let arguments = segments::Arguments {
        pinned: pinned.as_fd(),
        address: 0,
        prot: mmap::PROT_READ | mmap::PROT_WRITE,
        flags: mmap::MAP_SHARED | MAP_DIRECT | shape.flags,
    };
    // SAFETY: without MAP_FIXED a mapping takes no place that is in use.
    let address = unsafe { segments::map(&known.plan, arguments) }
        .ok()?
        .address;
    let length = usize::try_from(shape.range.end - shape.range.start).ok()?;
    let memory = revoke::Memory {
        base: address,
        length,
        stable: Some(address),
    };
    if asks(pinned.as_fd(), IS_IT_PIN, known.held.hold().id()) && known.held.wake(memory, on_breach)
    {
        return Some((address, known));
    }
    // SAFETY: mapped above, and handed to nobody.
    let _ = unsafe { mmap::unmap(address, length) };
    None
}

/// Asks the programs in the kernel about a description and a pin; whether they
/// say yes.
fn asks(file: BorrowedFd<'_>, question: u64, pin: u64) -> bool {
    fcntl::get_flags_with(file, question | pin & PIN_NUMBER) == Err(Errno::ALREADY)
}
