//! Granting a pin: a promise is made only when it can be kept.
//!
//! In order: judge the request; publish the pin, so that whoever comes now
//! waits for the outcome; close the gate; prove that nobody holds a
//! description from before, and that nobody is still in the middle of
//! something the gate let pass; replace the caller's own description by one
//! from behind the gate; read the block map twice; settle.
//!
//! On an inode that is behind the gate already, and where nothing was let in
//! since the last proof, all of that holds, and what remains is to open a
//! description, lock its byte and read the block map.

use self::pending::{Queue, Turn};
use crate::apart::{self, Held};
use crate::bounded::Stuck;
use crate::busy::{Busy, Quiet};
use crate::gate::fanotify::MASK;
use crate::lifetime::CLOSES;
use crate::openers::{Openers, Wanted, openers_before};
use crate::policy::{self, Apart, Beside, Pinned};
use crate::suspicion::Prefix;
use crate::table::{Abilities, GrantState, InodeId, LOCK_BASE, Pin, Watched};
use crate::tripwire::Armed;
use crate::wake::Backoff;
use crate::{Errno, Guard};
use mapdirect_model::facts::{FileFacts, Filesystem, Obstacle, ObstacleKind};
use mapdirect_model::plan::Plan;
use mapdirect_proto::{
    BlockMap, Extent, ExtentState, Flags, Granted, Opener, PinRequest, Reason, Refusal, extent,
};
use mapdirect_proto::{MAX_INLINE_EXTENTS, PinnedRange};
use mapdirect_sys::fcntl::{
    Lease, LockKind, LockOwner, conflicting_lock, lease_holds, lock_byte_shared, set_lock,
};
use mapdirect_sys::mmap::page_size;
use mapdirect_sys::unix::Sender;
use mapdirect_sys::{fsync, memfd, proc, xfs_eofblocks};
use rustix::fs::{AtFlags, OFlags, SeekFrom, StatxFlags};
use rustix::pipe::PipeFlags;
use std::cell::Cell;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::fence;
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

/// A pin, and the descriptors that go to its holder.
#[derive(Debug)]
pub(crate) struct Grant {
    /// To be handed over once `file` is closed here.
    pub(crate) pin: Arc<Pin>,
    pub(crate) granted: Granted,
    /// The description whose life is the pin.
    pub(crate) file: OwnedFd,
    /// The extents, if there are too many for a message.
    pub(crate) extents: Option<OwnedFd>,
    /// What the pin lives by if the description cannot write.
    pub(crate) life: Option<OwnedFd>,
}

/// The holder's part in a grant.
pub(crate) trait Conversation {
    /// Has the holder put `replacement` in the place of the descriptor it
    /// sent.
    fn swap(&mut self, replacement: BorrowedFd<'_>) -> Result<(), Refusal>;

    /// Whether somebody still waits for the answer.
    fn is_wanted(&self) -> bool {
        true
    }
}

/// Longest patience a request can ask for.
const MOST_PATIENCE: Duration = Duration::from_secs(60);
/// How often to ask for a lease at least, however little patience there is: a
/// truncation that changes nothing is over at once, and is counted all the
/// same.
const LEAST_TRIES: u32 = 5;
/// How long a replaced description may take to go away: an operation of
/// another thread may be using it.
const LETTING_GO: Duration = Duration::from_millis(200);

pub(crate) fn refusal(
    reason: Reason,
    errno: Errno,
    obstacle: impl Into<String>,
    mend: impl Into<String>,
) -> Refusal {
    Refusal {
        errno: errno.raw_os_error(),
        reason,
        obstacle: obstacle.into(),
        mend: mend.into(),
        openers: Vec::new(),
    }
}

fn system(call: &str, errno: Errno) -> Refusal {
    refusal(Reason::System, errno, format!("{call} failed: {errno}"), "")
}

/// Writes a file back. It also fails for what went wrong before, in whatever
/// anybody wrote: whoever does fsync(2) first is told, and only they
/// (`file_check_and_advance_wb_err`, mm/filemap.c). That includes a direct
/// write that met somebody's pages in use (`dio_warn_stale_pagecache`, there).
fn write_back(file: BorrowedFd<'_>) -> Result<(), Refusal> {
    fsync::fsync(file).map_err(|errno| Refusal {
        mend: String::from(
            "something written to the file before may not be on the disk, or be what is there: \
             if that does not matter, or was written again, try again",
        ),
        ..system("fsync", errno)
    })
}

fn obstructed(obstacle: Obstacle) -> Refusal {
    refusal(
        obstacle.kind.into(),
        obstacle.errno,
        obstacle.text,
        obstacle.mend,
    )
}

/// Grants a pin on `file`, which its holder opened, or says why not. Nothing
/// is left behind in that case.
pub(crate) fn grant(
    guard: &Guard,
    request: &PinRequest,
    file: OwnedFd,
    owner: Sender,
    talk: &mut dyn Conversation,
) -> Result<Grant, Refusal> {
    let mut file = file;
    let judged = judge(guard, request, file.as_fd())?;
    let patience = Duration::from_millis(request.patience_ms.into()).min(MOST_PATIENCE);
    // First of all: what is changed from here on is noticed.
    let _armed = arm(guard, &judged, file.as_fd())?;
    loop {
        let watched = guard.table.get_or_insert(judged.id, || {
            let abilities = Abilities {
                reflink: judged.facts.reflink,
                exchange: judged.facts.exchange,
                coarse: in_kernel::writes_whole_folios(&judged.facts),
            };
            Watched::new(judged.id, abilities, Arc::clone(&judged.path))
        });
        let waiting = Queue::join(&watched, owner.pid);
        let mut state = lock_meanwhile(&watched, patience, || {
            if guard.gate.is_in_kernel() {
                return Ok(());
            }
            waiting.step_aside(guard, &judged, &mut file, talk)
        })?;
        if state.retired {
            continue;
        }
        let turn = waiting.into_turn();
        let pin = Arc::new(Pin::unsettled(
            guard.next_id(),
            judged.range.clone(),
            judged.mapped.clone(),
            judged.reach(),
            request.flags,
            owner,
        ));
        let mut attempt = Attempt {
            guard,
            judged: &judged,
            watched: &watched,
            state: &mut state,
            pin: &pin,
            patience,
            mark: guard.next_lock_byte(),
            marked: Cell::new(false),
            talk,
            file,
            life: None,
            turn: Some(turn),
        };
        let result = if guard.gate.is_in_kernel() {
            attempt.run_in_kernel()
        } else {
            attempt.run()
        };
        attempt.unmark();
        watched.refuse_opens.store(false, SeqCst);
        watched.opens_wait.store(false, SeqCst);
        let (file, life) = (attempt.file, attempt.life);
        if result.is_err() {
            abandon(guard, &watched, &mut state, &pin, file.as_fd());
        }
        // Whoever waited for the outcome is judged by it now.
        guard.gate.reconsider();
        let (granted, extents) = result?;
        return Ok(Grant {
            pin,
            granted,
            file,
            extents,
            life,
        });
    }
}

/// Has the tripwire listen to a file.
fn arm(guard: &Guard, judged: &Judged, file: BorrowedFd<'_>) -> Result<Armed, Refusal> {
    let armed = guard
        .tripwire
        .arm(judged.id, &judged.facts.filesystem, file);
    armed.map_err(|errno| {
        let call = "arming the tripwire (perf_event_open, name_to_handle_at)";
        match errno {
            Errno::MFILE | Errno::NFILE | Errno::NOMEM => refusal(
                Reason::Limit,
                Errno::NOMEM,
                format!("{call} failed: {errno}"),
                "give the guard more descriptors (ulimit -n), or let go of other pins",
            ),
            other => system(call, other),
        }
    })
}

/// What the request and the file say by themselves.
struct Judged {
    id: InodeId,
    facts: FileFacts,
    path: Arc<str>,
    /// The range to pin: the one asked for, rounded out to blocks.
    range: Range<u64>,
    /// The range that will be mapped.
    mapped: Option<Range<u64>>,
    /// Nothing of the file will be mapped where it is frozen.
    in_segments: bool,
    /// Open flags of the holder's description.
    open_flags: OFlags,
}

impl Judged {
    /// Where somebody could be writing to and take blocks of the range along:
    /// see [`Beside`].
    fn reach(&self) -> Range<u64> {
        if self.range.end > self.facts.size {
            return 0..u64::MAX;
        }
        if let Some(window) = self.window() {
            // Somebody may store to a folio that holds blocks of the range.
            let folios = policy::folios(&self.range);
            return window.start.min(folios.start)..window.end.max(folios.end);
        }
        // One extent of ext4 (EXT_INIT_MAX_LEN, fs/ext4/ext4_extents.h).
        let extent = 32768 * u64::from(self.facts.block_size);
        let range = &self.range;
        range.start.saturating_sub(extent)..range.end.saturating_add(extent)
    }

    /// The bytes around the range that XFS may copy together with it, when they
    /// are shared and written to. That a folio is larger does not matter: what
    /// is neither shared nor copied with it is written back where it lies.
    fn window(&self) -> Option<Range<u64>> {
        self.facts.copies_around(&self.range)
    }

    fn is_writable(&self) -> bool {
        self.open_flags & OFlags::ACCMODE != OFlags::RDONLY
    }
}

fn judge(guard: &Guard, request: &PinRequest, file: BorrowedFd<'_>) -> Result<Judged, Refusal> {
    let flags = request.flags;
    let open_flags = rustix::fs::fcntl_getfl(file).map_err(|errno| system("F_GETFL", errno))?;
    if open_flags.contains(OFlags::PATH) {
        return Err(refusal(
            Reason::Arguments,
            Errno::BADF,
            "the descriptor is only a path (O_PATH)",
            "open the file for reading and writing",
        ));
    }
    let access = open_flags & OFlags::ACCMODE;
    let wanted = if flags.contains(Flags::MAP) {
        access == OFlags::RDWR
    } else {
        access != OFlags::WRONLY
    };
    let facts = FileFacts::read(file).map_err(|errno| system("reading the file's facts", errno))?;
    let obstacles = facts.obstacles();
    // A file of the wrong kind is that before it is anything else.
    if let Some(obstacle) = obstacles.first()
        && obstacle.kind == ObstacleKind::FileType
    {
        return Err(obstructed(obstacle.clone()));
    }
    if !wanted {
        return Err(refusal(
            Reason::NotReadWrite,
            Errno::ACCESS,
            "the descriptor is not open for what the pin needs",
            "open the file for reading and writing (a pin without mapping: for reading)",
        ));
    }
    if let Some(obstacle) = obstacles.into_iter().next() {
        return Err(obstructed(obstacle));
    }
    if flags.contains(Flags::MAP) && !facts.dax && !flags.contains(Flags::CACHED) {
        return Err(refusal(
            Reason::NoDax,
            Errno::OPNOTSUPP,
            "the file has no DAX, so stores would go to the page cache",
            "put it on persistent memory mounted with dax, or accept the page cache \
             (option, or MAPDIRECT_CACHED=1)",
        ));
    }
    let asked = range_of(request, &facts)?;
    let range = if flags.contains(Flags::WHOLE_FILE) {
        let block = u64::from(facts.block_size).max(1);
        0..facts.size.max(1).next_multiple_of(block).max(asked.end)
    } else {
        asked.clone()
    };
    let id = InodeId {
        dev: facts.dev,
        inode: facts.inode,
    };
    let above = |path: &str| guard.overlays.above(file, path, id, facts.links);
    // To ask where a file is takes longer than all the other questions.
    let known = guard
        .table
        .get(id)
        .map(|watched| Arc::clone(&watched.path))
        .filter(|path| above(path).is_none());
    let path = known.unwrap_or_else(|| Arc::from(proc::path_of(file)));
    if let Some(mount_point) = above(&path) {
        return Err(refusal(
            Reason::OverlayUpper,
            Errno::OPNOTSUPP,
            format!("the overlay at {mount_point} writes to it behind every gate"),
            "unmount the overlay, or move the file out of its upper directory",
        ));
    }
    if !guard.gate.is_in_kernel()
        && let Some(directory) = guard.exports.of(id.dev)
    {
        return Err(refusal(
            Reason::Filesystem,
            Errno::OPNOTSUPP,
            format!(
                "its filesystem is exported by NFS for writing (at {}), and a client that sets a \
                 file's size asks no gate of permission events",
                proc::printable(&directory)
            ),
            "export it read-only, or use the bpf gate",
        ));
    }
    Ok(Judged {
        id,
        facts,
        path,
        range,
        mapped: flags.contains(Flags::MAP).then_some(asked),
        in_segments: flags.contains(Flags::SEGMENTS),
        open_flags,
    })
}

/// The range asked for, rounded out to blocks.
fn range_of(request: &PinRequest, facts: &FileFacts) -> Result<Range<u64>, Refusal> {
    let block = u64::from(facts.block_size).max(1);
    let overflow = || {
        refusal(
            Reason::Arguments,
            Errno::OVERFLOW,
            "the range ends beyond the largest file",
            "give a smaller offset or length",
        )
    };
    let (start, end) = if request.length > 0 {
        let end = request.offset.checked_add(request.length);
        (request.offset, end.ok_or_else(overflow)?)
    } else if request.flags.contains(Flags::WHOLE_FILE) {
        (0, facts.size.max(1))
    } else {
        (request.offset, facts.size)
    };
    if start >= end {
        return Err(refusal(
            Reason::Arguments,
            Errno::INVAL,
            format!("the range is empty: the file ends at byte {}", facts.size),
            "give a range of at least one byte",
        ));
    }
    let end = end.checked_next_multiple_of(block).ok_or_else(overflow)?;
    if end > i64::MAX.cast_unsigned() {
        return Err(overflow());
    }
    Ok(start - start % block..end)
}

fn lock(watched: &Watched, patience: Duration) -> Result<MutexGuard<'_, GrantState>, Refusal> {
    lock_meanwhile(watched, patience, || Ok(()))
}

/// The same; `meanwhile` is done again and again while others have it.
fn lock_meanwhile(
    watched: &Watched,
    patience: Duration,
    mut meanwhile: impl FnMut() -> Result<(), Refusal>,
) -> Result<MutexGuard<'_, GrantState>, Refusal> {
    // Another grant on the inode may rightly take as long as its patience.
    let mut backoff = Backoff::until(
        Instant::now() + patience + MOST_PATIENCE,
        Duration::from_micros(50),
        Duration::from_millis(5),
    );
    loop {
        if let Some(state) = watched.try_grant() {
            return Ok(state);
        }
        if backoff.is_over() {
            return Err(refusal(
                Reason::StillChanging,
                Errno::TXTBSY,
                "another request for this file has not been decided yet",
                "try again later",
            ));
        }
        meanwhile()?;
        backoff.pause();
    }
}

/// Takes back what a grant that failed has done.
fn abandon(
    guard: &Guard,
    watched: &Arc<Watched>,
    state: &mut GrantState,
    pin: &Pin,
    file: BorrowedFd<'_>,
) {
    watched.remove(|other| other.id == pin.id);
    // It can only fail to make less of it.
    let _ = guard.gate.publish(watched);
    if watched.pins.load().is_empty() {
        state.retired = true;
        // Marks first: once the entry is gone another grant may set its own.
        // None may be there yet, or any more.
        if let Some(gate) = guard.gate.fanotify() {
            let _ = gate.group.remove(MASK, file);
            let _ = guard.lifetime.closes.remove(CLOSES, file);
            guard.lifetime.forget(watched);
        }
        guard.table.remove(watched);
    }
}

/// One attempt at a grant.
struct Attempt<'a> {
    guard: &'a Guard,
    judged: &'a Judged,
    watched: &'a Arc<Watched>,
    state: &'a mut GrantState,
    pin: &'a Arc<Pin>,
    /// How long to wait for others, each time there is something to wait for.
    patience: Duration,
    /// A byte to mark the holder's own description by.
    mark: u64,
    marked: Cell<bool>,
    talk: &'a mut dyn Conversation,
    /// A description of the inode: the holder's, later the pin's.
    file: OwnedFd,
    /// The holder's end of the pipe that the pin lives by, if it does.
    life: Option<OwnedFd>,
    /// Who else asks for the same file.
    turn: Option<Turn>,
}

/// What a description that takes another's place keeps of its flags.
const KEPT_FLAGS: OFlags = OFlags::ACCMODE
    .union(OFlags::APPEND)
    .union(OFlags::DIRECT)
    .union(OFlags::DSYNC)
    .union(OFlags::SYNC)
    .union(OFlags::NOATIME)
    .union(OFlags::NONBLOCK);

impl Attempt<'_> {
    fn run(&mut self) -> Result<(Granted, Option<OwnedFd>), Refusal> {
        let marked = self.gate_has_mark();
        // Marks go with their inode, on unmount for one: what was proven then
        // is worth nothing now.
        let was_closed = self.state.closed && marked == Ok(true);
        self.state.closed = was_closed;
        if !was_closed {
            self.watched.unrest_by.take();
            self.watched.mapping_by.take();
            for note in [
                &self.watched.writers_let_in,
                &self.watched.unrest,
                &self.watched.mapped_writable,
            ] {
                note.store(false, SeqCst);
            }
        }
        // What is under way is waited for, and no pin remembers the rest.
        self.watched.forget_if_free();
        self.watched.add(self.pin);
        // The other half of `Server::judge` in the gate: publish, then look
        // for notes.
        fence(SeqCst);
        let settled = if was_closed {
            self.prove_again()?
        } else {
            self.close_the_gate()?;
            self.prove_from_scratch()?;
            false
        };
        if !was_closed && (self.judged.is_writable() || self.judged.facts.reflink) {
            self.replace_description()?;
        } else {
            let for_pin = self.open_for_pin()?;
            self.unmark();
            self.file = for_pin;
        }
        self.begin_life()?;
        self.state.closed = true;
        let (map, pinned, held) = self.come_to_rest(settled)?;
        self.check_marks()?;
        self.pin.settle(&map, pinned, held);
        self.hand_out(&map)
    }

    fn gate_has_mark(&self) -> Result<bool, Errno> {
        let gate = self.guard.gate.fanotify();
        gate.map_or(Ok(false), |gate| gate.group.has_mark(self.file.as_fd()))
    }

    /// Nothing else removes marks of an inode with a grant under way; if they
    /// are gone all the same there is no gate.
    fn check_marks(&self) -> Result<(), Refusal> {
        let file = self.file.as_fd();
        let gate = self.gate_has_mark();
        let closes = self.guard.lifetime.closes.has_mark(file);
        if gate == Ok(true) && closes == Ok(true) {
            return Ok(());
        }
        Err(refusal(
            Reason::StillChanging,
            Errno::TXTBSY,
            "the watch on the file went away while the pin was granted",
            "try again",
        ))
    }

    fn close_the_gate(&self) -> Result<(), Refusal> {
        let file = self.file.as_fd();
        let gate = self.guard.gate.fanotify();
        let result = gate
            .map_or(Ok(()), |gate| gate.group.add(MASK, file))
            .and_then(|()| self.guard.lifetime.watch(self.watched, file));
        result.map_err(|errno| {
            refusal(
                Reason::NoGate,
                Errno::OPNOTSUPP,
                format!("the kernel cannot watch this file (fanotify_mark: {errno})"),
                "run `mapdirect doctor` to see what this kernel offers",
            )
        })
    }

    /// Whoever has left is waited for no longer: others wait for the outcome.
    fn require_wanted(&self) -> Result<(), Refusal> {
        if self.talk.is_wanted() {
            return Ok(());
        }
        Err(refusal(
            Reason::Protocol,
            Errno::PIPE,
            "the client is gone",
            "",
        ))
    }

    fn patiently(&self) -> Backoff {
        Backoff::until(
            Instant::now() + self.patience,
            Duration::from_millis(1),
            Duration::from_millis(20),
        )
    }

    /// Nobody may hold a description from before the gate closed, and nobody
    /// may be in the middle of a truncation from before.
    fn prove_from_scratch(&self) -> Result<(), Refusal> {
        self.quietly(|quiet| quiet.wait_for_truncations(&self.guard.scans))?;
        let mut backoff = self.patiently();
        let mut tries = 0;
        loop {
            // It counts writers and truncations alike, those under way too.
            if self.lease_proves()? {
                return Ok(());
            }
            if self.turn_openers_away()? {
                continue;
            }
            if self.only_those_who_wait()? {
                return Ok(());
            }
            tries += 1;
            let over = backoff.is_over() && tries >= LEAST_TRIES;
            if !self.judged.facts.reflink || over {
                let found = self.look_around()?;
                let Some(found) = found else {
                    return Ok(());
                };
                if over {
                    return Err(self.open_elsewhere(found));
                }
            }
            self.require_wanted()?;
            backoff.pause();
        }
    }

    /// Whoever comes to open the file for writing in the middle of a grant
    /// waits at the gate, and the lease counts it. If nobody else stands in
    /// the way, it gets the answer it would get a moment later. Says whether
    /// that is worth another try.
    fn turn_openers_away(&self) -> Result<bool, Refusal> {
        if !self.watched.opens_wait.load(SeqCst) || self.watched.refuse_opens.load(SeqCst) {
            return Ok(false);
        }
        self.mark_own_description()?;
        let found = self.openers(Some(self.mark));
        if !found.others.is_empty() || !found.hidden.is_empty() {
            return Ok(false);
        }
        self.watched.refuse_opens.store(true, SeqCst);
        self.guard.gate.reconsider();
        Ok(true)
    }

    /// Whether everybody who has the file open asks for a pin of it, too, and
    /// has come behind the gate for that.
    fn only_those_who_wait(&self) -> Result<bool, Refusal> {
        let Some(turn) = self.turn.as_ref().filter(|turn| turn.bring_others()) else {
            return Ok(false);
        };
        self.mark_own_description()?;
        let harmless = |found: &Openers| {
            found.hidden.is_empty()
                && found.others.iter().all(|opener| {
                    turn.queue().knows(opener)
                        || !self.judged.facts.reflink && !opener.writable && opener.pid != 0
                })
        };
        if !harmless(&self.openers(Some(self.mark))) {
            return Ok(false);
        }
        // As beside readers: see `look_around`.
        self.quietly(|quiet| quiet.wait_for_opens())?;
        let again = self.openers(Some(self.mark));
        if !harmless(&again) {
            return Ok(false);
        }
        self.refuse_executed(&again)?;
        self.quietly(|quiet| quiet.wait_for_changes())?;
        Ok(true)
    }

    /// Without reflink a reader from before the gate can do no harm, but a
    /// lease cannot tell readers beside the holder's own descriptor from
    /// writers: look who they are. Returns who stands in the way, or nothing
    /// if nobody does.
    fn look_around(&self) -> Result<Option<Openers>, Refusal> {
        self.mark_own_description()?;
        let harmless = |found: &Openers| {
            // Somebody must be there: the lease says so. What is not seen
            // may be anything.
            let explained = !found.others.is_empty() && found.hidden.is_empty();
            !self.judged.facts.reflink && explained && !found.has_writer()
        };
        let found = self.openers(Some(self.mark));
        if !harmless(&found) {
            return Ok(Some(found));
        }
        self.refuse_executed(&found)?;
        // A descriptor may have been on its way into a table while we looked:
        // from an open, or to a child. Those opens are over now, and a child
        // is seen beside its parent.
        self.quietly(|quiet| quiet.wait_for_opens())?;
        let again = self.openers(Some(self.mark));
        if !harmless(&again) {
            return Ok(Some(again));
        }
        self.quietly(|quiet| quiet.wait_for_changes())?;
        Ok(None)
    }

    /// Waits for others by `wait`, and refuses if they do not finish.
    fn quietly(
        &self,
        wait: impl FnOnce(&Quiet<'_>) -> Result<Vec<Busy>, Stuck>,
    ) -> Result<(), Refusal> {
        let quiet = Quiet {
            file: self.file.as_fd(),
            id: self.judged.id,
            prefix: match self.judged.facts.filesystem {
                Filesystem::Xfs => Prefix("xfs_"),
                Filesystem::Ext4 => Prefix("ext4_"),
                // Anybody's.
                _ => Prefix(""),
            },
            held: &|| self.guard.gate.held(),
            // It ends as soon as it can, and a busy processor needs some time
            // to show that a thread goes on.
            deadline: Instant::now() + self.patience.max(Duration::from_secs(1)),
        };
        still_changing(&wait(&quiet).map_err(stuck)?)
    }

    fn openers(&self, mark: Option<u64>) -> Openers {
        let wanted = Wanted {
            id: self.judged.id,
            path: &self.judged.path,
            mark,
        };
        openers_before(
            wanted,
            Instant::now() + self.patience.max(Duration::from_secs(1)),
        )
    }

    fn lease_proves(&self) -> Result<bool, Refusal> {
        let file = self.file.as_fd();
        let _no_looks = self.watched.hold_looks();
        let proven = match lease_holds(file, Lease::Sole) {
            Ok(false) if !self.judged.is_writable() && !self.judged.facts.reflink => {
                let no_writer = lease_holds(file, Lease::NoWriter);
                if no_writer == Ok(true) {
                    let found = self.openers(None);
                    self.refuse_executed(&found)?;
                    // Whoever opens it to truncate it counts as a reader so
                    // far.
                    self.quietly(|quiet| quiet.wait_for_all_truncations())?;
                    lease_holds(file, Lease::NoWriter)
                } else {
                    no_writer
                }
            }
            proven => proven,
        };
        match proven {
            Ok(proven) => Ok(proven),
            // No leases here: only looking around is left.
            Err(Errno::INVAL) => Ok(false),
            Err(other) => Err(system("F_SETLEASE", other)),
        }
    }

    /// A gate switches the kernel's own protection of running programs off.
    fn refuse_executed(&self, found: &Openers) -> Result<(), Refusal> {
        let Some(opener) = &found.executing else {
            return Ok(());
        };
        Err(Refusal {
            openers: vec![opener.clone()],
            ..refusal(
                Reason::Executing,
                Errno::TXTBSY,
                format!("pid {} ({}) is executing it", opener.pid, opener.command),
                "end that program first",
            )
        })
    }

    /// Has the holder's description told apart from others by a lock.
    fn mark_own_description(&self) -> Result<(), Refusal> {
        lock_byte_shared(self.file.as_fd(), self.mark)
            .map_err(|errno| self.lock_refused(errno, self.mark))?;
        self.marked.set(true);
        Ok(())
    }

    /// Takes the mark off a description that stays.
    fn unmark(&self) {
        if self.marked.take() {
            // A mark that stays tells nobody anything.
            let _ = set_lock(
                self.file.as_fd(),
                LockOwner::Description,
                LockKind::Unlock,
                self.mark,
                1,
            );
        }
    }

    fn lock_refused(&self, errno: Errno, byte: u64) -> Refusal {
        if errno != Errno::AGAIN {
            return system("F_OFD_SETLK", errno);
        }
        let holder = conflicting_lock(self.file.as_fd(), byte, 1)
            .ok()
            .flatten()
            .and_then(|lock| lock.pid);
        let who = holder.map_or_else(
            || String::from("somebody"),
            |pid| format!("pid {pid} ({})", proc::command(pid)),
        );
        refusal(
            Reason::Locked,
            Errno::TXTBSY,
            format!("{who} holds an exclusive record lock to the end of all offsets"),
            format!("lock no further than byte {LOCK_BASE} (2^62), where pins are marked"),
        )
    }

    fn open_elsewhere(&self, found: Openers) -> Refusal {
        let own = found.others.iter().all(|opener| opener.pid == self.pin.pid);
        let reason = if own && !found.others.is_empty() {
            Reason::OpenHere
        } else {
            Reason::OpenElsewhere
        };
        let mut obstacle = if found.others.is_empty() {
            String::from(
                "it is open somewhere that /proc does not show (a descriptor in flight through \
                 a socket, a client of an NFS export, a part of the kernel), or somebody \
                 truncates it by path again and again",
            )
        } else if reason == Reason::OpenHere {
            String::from("this process has it open or mapped a second time")
        } else if self.judged.facts.reflink {
            String::from(
                "somebody else has it open; on a filesystem with reflink a reader can \
                 share its blocks, too",
            )
        } else {
            String::from("somebody else has it open for writing")
        };
        for hidden in &found.hidden {
            obstacle.push_str("; perhaps through ");
            obstacle.push_str(hidden);
        }
        Refusal {
            openers: found.others,
            ..refusal(
                reason,
                Errno::TXTBSY,
                obstacle,
                "have it closed there, or ask with more patience",
            )
        }
    }

    /// Nothing that was let in since the last proof may still matter. Says
    /// whether there was nothing at all.
    fn prove_again(&mut self) -> Result<bool, Refusal> {
        // Clear first, look then: what is let in meanwhile notes itself anew.
        let writers = self.watched.writers_let_in.swap(false, SeqCst);
        if writers && let Err(refusal) = self.no_other_writer() {
            self.watched.writers_let_in.store(true, SeqCst);
            return Err(refusal);
        }
        let unrest = self.watched.unrest.swap(false, SeqCst);
        if unrest {
            self.wait_for_those_let_in()?;
        }
        Ok(!writers && !unrest)
    }

    /// Whatever the gate has let in must be over. It is known which threads
    /// these are: nobody else can be at it.
    fn wait_for_those_let_in(&self) -> Result<(), Refusal> {
        let threads = self.watched.unrest_by.take();
        let waited = self.quietly(|quiet| {
            if threads.and_others {
                quiet.wait_for_changes()
            } else {
                quiet.wait_for_changes_by(&threads.tids)
            }
        });
        if waited.is_err() {
            self.watched.unrest_by.add(&threads);
            self.watched.unrest.store(true, SeqCst);
        }
        waited
    }

    /// Nobody else may have it open for writing. All descriptions are behind
    /// the gate here, but some things the gate cannot see.
    fn no_other_writer(&self) -> Result<(), Refusal> {
        let pins = self.watched.pins.load();
        let mut backoff = self.patiently();
        loop {
            if self.lease_proves()? {
                return Ok(());
            }
            self.mark_own_description()?;
            let mut found = self.openers(Some(self.mark));
            // Holders of pins may have theirs, and have been asked; so may
            // those who ask now.
            let is_holder = |opener: &Opener| {
                pins.iter().any(|pin| pin.pid == opener.pid)
                    || self.watched.queue.has(opener.pid, self.pin.pid)
            };
            found.others.retain(|opener| opener.writable);
            let explained = self.judged.is_writable()
                || pins.iter().any(|pin| pin.id != self.pin.id)
                || found.others.iter().any(is_holder);
            found.others.retain(|opener| !is_holder(opener));
            if found.others.is_empty() && found.hidden.is_empty() {
                // The kernel's own writers (a storage target, an overlay that
                // is mounted nowhere) are in no process. They count as
                // writers of the inode, and where nobody else may, it shows.
                let file = self.file.as_fd();
                if explained || lease_holds(file, Lease::NoWriter) != Ok(false) {
                    return Ok(());
                }
            }
            if backoff.is_over() {
                return Err(self.open_elsewhere(found));
            }
            self.require_wanted()?;
            backoff.pause();
        }
    }

    /// Opens the description that will be the pin.
    fn open_for_pin(&self) -> Result<OwnedFd, Refusal> {
        let access = if self.judged.is_writable() {
            OFlags::RDWR
        } else {
            OFlags::RDONLY
        };
        self.reopen(access)
    }

    fn reopen(&self, flags: OFlags) -> Result<OwnedFd, Refusal> {
        self.guard
            .own
            .during(|| proc::reopen(self.file.as_fd(), flags))
            .map_err(|errno| system("opening the file again", errno))
    }

    /// Puts a description from behind the gate in the place of the holder's,
    /// and makes sure the old one is gone.
    fn replace_description(&mut self) -> Result<(), Refusal> {
        // The old description is marked by a lock that goes when it does.
        self.mark_own_description()?;
        let replacement = self.reopen(self.judged.open_flags & KEPT_FLAGS)?;
        let position = rustix::fs::seek(&self.file, SeekFrom::Current(0))
            .and_then(|at| rustix::fs::seek(&replacement, SeekFrom::Start(at)));
        position.map_err(|errno| system("lseek", errno))?;
        let for_pin = self.open_for_pin()?;
        let _held = HoldOpens::new(self.guard, self.watched);
        self.talk.swap(replacement.as_fd())?;
        // Our own copy goes with this; from now on the pin's description
        // stands for the inode.
        self.file = for_pin;
        self.marked.set(false);
        if self.is_gone()? {
            return Ok(());
        }
        let mut found = self.openers(Some(self.mark));
        found.marked.extend(
            found
                .others
                .drain(..)
                .filter(|opener| opener.mapped || opener.pid == 0),
        );
        Err(Refusal {
            openers: found.marked,
            ..refusal(
                Reason::OpenHere,
                Errno::TXTBSY,
                "the descriptor given has a duplicate, a mapping made through it, or an \
                 operation under way that the gate cannot watch",
                "close duplicates in other processes, unmap it, let operations finish; \
                 then try again",
            )
        })
    }

    /// Whether the marked description is gone.
    fn is_gone(&self) -> Result<bool, Refusal> {
        let mut backoff = Backoff::until(
            Instant::now() + LETTING_GO,
            Duration::from_micros(20),
            Duration::from_millis(10),
        );
        loop {
            let found = conflicting_lock(self.file.as_fd(), self.mark, 1)
                .map_err(|errno| system("F_OFD_GETLK", errno))?;
            if found.is_none() {
                return Ok(true);
            }
            if backoff.is_over() {
                return Ok(false);
            }
            backoff.pause();
        }
    }

    /// Ties the life of the pin to something that only its holders have. A
    /// description that can write is one: nobody else has such while the file
    /// is pinned, and its lock tells when it goes. Every reader could hold the
    /// same lock as one that cannot, so that comes with a pipe.
    fn begin_life(&mut self) -> Result<(), Refusal> {
        if !self.judged.is_writable() {
            let flags = PipeFlags::CLOEXEC | PipeFlags::NONBLOCK;
            let (ours, theirs) = rustix::pipe::pipe_with(flags).map_err(|e| system("pipe2", e))?;
            self.pin.lives_by(ours);
            self.life = Some(theirs);
            return Ok(());
        }
        let byte = self.pin.lock_byte();
        lock_byte_shared(self.file.as_fd(), byte).map_err(|errno| self.lock_refused(errno, byte))
    }

    /// Reads the block map; unless nothing was let in since it was last at
    /// rest, after writing everything back, and until it stays the same.
    fn read_map(&self, settled: bool) -> Result<BlockMap, Refusal> {
        let read = || {
            mapdirect_model::block_map::read(self.file.as_fd(), self.judged.range.clone())
                .map_err(|errno| system("FIEMAP", errno))
        };
        if !settled {
            write_back(self.file.as_fd())?;
        }
        let mut map = read()?;
        if !self.judged.facts.keeps_blocks_beyond_the_end() && reaches_beyond_the_end(&map) {
            // They would go by themselves, or become part of the file when
            // it grows.
            let (owner, size) = (self.judged.facts.owner, map.file_size());
            xfs_eofblocks::free(self.file.as_fd(), owner, size)
                .map_err(|errno| system("XFS_IOC_FREE_EOFBLOCKS", errno))?;
            map = read()?;
            if reaches_beyond_the_end(&map) {
                return Err(refusal(
                    Reason::StillChanging,
                    Errno::TXTBSY,
                    "XFS keeps blocks beyond the end of the file for writes to come",
                    "try again, or pin nothing beyond the end of the file",
                ));
            }
        }
        if settled && !is_moving(&map) {
            return Ok(map);
        }
        self.free_copy_blocks()?;
        let deadline = Instant::now() + self.patience;
        loop {
            let again = read()?;
            if again == map && !is_moving(&again) {
                return Ok(again);
            }
            if Instant::now() >= deadline {
                return Err(refusal(
                    Reason::StillChanging,
                    Errno::TXTBSY,
                    "its block map keeps changing although nobody has it open",
                    "try again later",
                ));
            }
            std::thread::sleep(Duration::from_millis(1));
            write_back(self.file.as_fd())?;
            map = again;
        }
    }

    /// Blocks that XFS has set aside for copies of shared blocks nearby would
    /// take those of the range along when they are written to: it looks there
    /// first (`xfs_map_blocks`, fs/xfs/xfs_aops.c). It does not show them to
    /// anybody (only debug kernels do), so they are taken back unseen; it
    /// does so for inodes without dirty pages (`xfs_can_free_cowblocks`).
    fn free_copy_blocks(&self) -> Result<(), Refusal> {
        if self.judged.window().is_none() {
            return Ok(());
        }
        // fsync(2) leaves the inode marked as having dirty pages.
        rustix::fs::syncfs(&self.file).map_err(|errno| system("syncfs", errno))?;
        xfs_eofblocks::free(self.file.as_fd(), self.judged.facts.owner, 0)
            .map_err(|errno| system("XFS_IOC_FREE_EOFBLOCKS", errno))
    }

    /// What beside the range would take blocks of it along when written to.
    fn look_beside(&self, map: &BlockMap) -> Result<Beside, Refusal> {
        let range = map.range();
        let is_ext4 = self.judged.facts.filesystem == Filesystem::Ext4;
        let block = u64::from(map.block_size()).max(1);
        let mut beside = Beside {
            window: self.judged.window(),
            failing_frees: is_ext4 && reaches_beyond_the_end(map),
            grows_into: self.judged.facts.allocates_ahead()
                && range.end > map.file_size().next_multiple_of(block),
            ..Beside::default()
        };
        let failed = |errno| system("FIEMAP", errno);
        if let Some(window) = &beside.window {
            let around = mapdirect_model::block_map::read(self.file.as_fd(), window.clone());
            let around = around.map_err(failed)?;
            beside.frozen.extend(
                around
                    .frozen()
                    .filter(|extent| extent.state == ExtentState::Shared)
                    .map(|extent| extent.offset..extent.end()),
            );
        } else {
            // FIEMAP cuts extents to what is asked for: ask for more.
            for edge in [range.start, range.end - 1] {
                let unwritten = |extent: &&Extent| extent.state == ExtentState::Unwritten;
                if map.find(edge).filter(unwritten).is_none() {
                    continue;
                }
                let around =
                    mapdirect_model::block_map::read(self.file.as_fd(), self.judged.reach());
                let around = around.map_err(failed)?;
                if let Some(extent) = around.find(edge).filter(unwritten) {
                    let run = extent.offset..extent.end();
                    if is_ext4 {
                        beside.edges.extend([
                            run.start.saturating_sub(block)..run.start,
                            run.end..run.end.saturating_add(block),
                        ]);
                    }
                    beside.frozen.push(run);
                }
            }
        }
        Ok(beside)
    }

    fn check_map(&self, map: &BlockMap) -> Result<(), Refusal> {
        for (state, reason, text) in [
            (
                ExtentState::Inline,
                Reason::InlineData,
                "lies inside the inode",
            ),
            (
                ExtentState::Encoded,
                Reason::Encoded,
                "is encrypted or compressed",
            ),
        ] {
            if map.total(state) > 0 {
                return Err(refusal(
                    reason,
                    Errno::OPNOTSUPP,
                    format!("part of the range {text}"),
                    "",
                ));
            }
        }
        if map.is_stable() {
            return Ok(());
        }
        if let Some(mapped) = &self.judged.mapped
            && !self.judged.in_segments
        {
            let under: Vec<_> = map
                .frozen()
                .filter_map(|extent| extent.clipped(mapped))
                .collect();
            if let Some(first) = under.first() {
                let bytes: u64 = under.iter().map(|extent| extent.length).sum();
                return Err(refusal(
                    Reason::FrozenBlocks,
                    Errno::OPNOTSUPP,
                    format!(
                        "{bytes} bytes of the range cannot be stored to as they are; the \
                         first: {} bytes at {} ({})",
                        first.length, first.offset, first.state
                    ),
                    "use a library that maps them apart, or make the range stable first \
                     (mapdirect prepare)",
                ));
            }
        }
        if let Some(obstacle) = self.judged.facts.obstacle_to_frozen() {
            return Err(obstructed(obstacle));
        }
        Ok(())
    }

    /// The block map, what the pin promises of it, and what it takes to keep
    /// that. Until frozen blocks are kept apart from those that others store
    /// to, a store may still change them: so it is read again afterwards.
    fn come_to_rest(&self, settled: bool) -> Result<(BlockMap, Pinned, Option<Held>), Refusal> {
        const TRIES: u32 = 10;
        let mut map = self.read_map(settled)?;
        for _ in 0..TRIES {
            self.check_map(&map)?;
            let Still { pinned, held, .. } = self.keep_still(&map)?;
            if held.is_none() && !pinned.has_frozen() {
                return Ok((map, pinned, held));
            }
            let again = self.read_map(false)?;
            if again == map {
                return Ok((map, pinned, held));
            }
            map = again;
        }
        Err(refusal(
            Reason::StillChanging,
            Errno::TXTBSY,
            "its block map keeps changing by stores through somebody's mapping",
            "have it unmapped there, or make the range stable first (mapdirect prepare)",
        ))
    }

    /// What the pin promises, and what it takes to keep that where somebody
    /// stores beside frozen blocks.
    fn keep_still(&self, map: &BlockMap) -> Result<Still, Refusal> {
        let beside = self.look_beside(map)?;
        let mut pinned = Pinned::new(map, self.pin.flags.contains(Flags::WHOLE_FILE));
        let dax = self.judged.facts.dax;
        let mapped = self.judged.mapped.as_ref();
        if let Some(mapped) = mapped {
            let length = mapped.end - mapped.start;
            let plan = Plan::new(map, mapped.start, length, page_size());
            pinned = pinned.mapped(&plan, !dax);
        }
        let frozen = pinned.frozen_pages(&beside, page_size());
        let stored_to = self.nobody_stores_to(&frozen)?;
        let (apart, held) = if dax {
            (Apart::Without, None)
        } else if mapped.is_some() || stored_to {
            let (pages, held) = self.keep_apart(&frozen, map.file_size())?;
            (Apart::Held(pages.into()), held)
        } else {
            // Nobody stores near it, and nobody will be let.
            (Apart::No, None)
        };
        Ok(Still {
            pinned: pinned.with_beside(beside.clone()).apart(apart),
            held,
            frozen,
            beside,
        })
    }

    /// Nobody may have a mapping to store by over what is to be frozen, from
    /// before the pin. Says whether anybody has one of anything else.
    fn nobody_stores_to(&self, frozen: &[Range<u64>]) -> Result<bool, Refusal> {
        if frozen.is_empty() {
            return Ok(false);
        }
        if self.guard.gate.is_in_kernel() {
            return self.nobody_may_come_to_store(frozen);
        }
        if !self.watched.mapped_writable.load(SeqCst) {
            return Ok(false);
        }
        // What the gate has let in may not show yet.
        let threads = self.watched.mapping_by.take();
        let waited = self.quietly(|quiet| {
            if threads.and_others {
                quiet.wait_for_mappings()
            } else {
                quiet.wait_for_mappings_by(&threads.tids)
            }
        });
        if waited.is_err() {
            self.watched.mapping_by.add(&threads);
        }
        waited?;
        let mut backoff = self.patiently();
        let found = loop {
            let found = self.openers(None);
            if found.hidden.is_empty() {
                break found;
            }
            if backoff.is_over() {
                return Err(self.open_elsewhere(Openers {
                    hidden: found.hidden,
                    ..Openers::default()
                }));
            }
            backoff.pause();
        };
        let mappings = found.writable_mappings;
        let over = mappings.iter().find(|(_, mapped)| {
            frozen
                .iter()
                .any(|run| run.start.max(mapped.start) < run.end.min(mapped.end))
        });
        let Some((opener, mapped)) = over else {
            return Ok(!mappings.is_empty());
        };
        Err(Refusal {
            openers: vec![opener.clone()],
            ..refusal(
                Reason::OpenElsewhere,
                Errno::TXTBSY,
                format!(
                    "a writable mapping of bytes {} to {} covers blocks that cannot be \
                     stored to as they are",
                    mapped.start, mapped.end
                ),
                "unmap it first, or fill and unshare the range",
            )
        })
    }

    /// Sees to it that no store takes frozen blocks along; returns the pages
    /// that must stay for that.
    fn keep_apart(
        &self,
        frozen: &[Range<u64>],
        size: u64,
    ) -> Result<(Vec<u64>, Option<Held>), Refusal> {
        /// A quarter of a gigabyte of page cache.
        const MOST: usize = 1 << 16;
        let folio = policy::folio_size();
        let pages = apart::pages_between(frozen, size, page_size(), folio);
        if pages.is_empty() {
            return Ok((pages, None));
        }
        let too_many = |what: String| {
            refusal(
                Reason::Limit,
                Errno::NOMEM,
                what,
                "make the range stable first (mapdirect prepare), or map it in parts",
            )
        };
        if pages.len() > MOST {
            return Err(too_many(format!(
                "what can be stored to and what cannot lie in so many pieces that {} pages of \
                 page cache would be needed to keep them apart; {MOST} may be",
                pages.len()
            )));
        }
        let Some(budget) = self.guard.pages.take(pages.len()) else {
            return Err(too_many(String::from(
                "others have so many ranges with frozen blocks mapped that the guard keeps no \
                 more pages of page cache apart",
            )));
        };
        let file = self.reopen(OFlags::RDONLY)?;
        // Its mapping of the file comes to the gate, too.
        let held = self
            .guard
            .own
            .for_long(|| apart::hold(file.as_fd(), &pages, folio, budget));
        let held = held.map_err(|failed| match failed {
            apart::Failed::InUse(offset) => {
                let mut openers = self.openers(None).others;
                openers.retain(|opener| opener.mapped);
                Refusal {
                    openers,
                    ..refusal(
                        Reason::OpenElsewhere,
                        Errno::TXTBSY,
                        format!(
                            "somebody maps the file, so that what can be stored to around byte \
                             {offset} and what cannot stay in one piece in the page cache"
                        ),
                        "have it unmapped there for a moment, or make the range stable first \
                         (mapdirect prepare)",
                    )
                }
            }
            apart::Failed::System(call, errno @ (Errno::NOMEM | Errno::MFILE | Errno::NFILE)) => {
                too_many(format!(
                    "keeping what can be stored to and what cannot apart in the page cache: \
                     {call} failed: {errno}"
                ))
            }
            apart::Failed::System(call, errno) => refusal(
                Reason::FrozenBlocks,
                Errno::OPNOTSUPP,
                format!(
                    "what can be stored to and what cannot do not stay apart in the page cache: \
                     {call} failed: {errno}"
                ),
                "make the range stable first (mapdirect prepare), or use DAX",
            ),
        })?;
        Ok((pages, Some(held)))
    }

    fn hand_out(&self, map: &BlockMap) -> Result<(Granted, Option<OwnedFd>), Refusal> {
        let extents = map.extents();
        let inline = extents.len() <= MAX_INLINE_EXTENTS;
        let sealed = (!inline)
            .then(|| memfd::sealed("mapdirect-extents", &extent::encode_extents(extents)))
            .transpose()
            .map_err(|errno| system("memfd_create", errno))?;
        let granted = Granted {
            pin: self.pin.id,
            range: map.range(),
            file_size: map.file_size(),
            block_size: map.block_size(),
            device: map.device(),
            extent_count: extents.len() as u64,
            extents: if inline { extents.to_vec() } else { Vec::new() },
        };
        Ok((granted, sealed))
    }
}

/// Blocks behind the one that holds the end of the file are allocated.
fn reaches_beyond_the_end(map: &BlockMap) -> bool {
    let block = u64::from(map.block_size()).max(1);
    let end = map.file_size().next_multiple_of(block);
    map.extents()
        .iter()
        .any(|extent| extent.end() > end && extent.state != ExtentState::Hole)
}

/// Some of it has no place yet.
fn is_moving(map: &BlockMap) -> bool {
    map.total(ExtentState::Delalloc) + map.total(ExtentState::Unknown) > 0
}

fn still_changing(busy: &[Busy]) -> Result<(), Refusal> {
    if busy.is_empty() {
        return Ok(());
    }
    let who: Vec<_> = busy
        .iter()
        .take(4)
        .map(|busy| format!("thread {} ({}) is {}", busy.tid, busy.command, busy.doing))
        .collect();
    // None of them is an opener: it is not known whether they have it open.
    Err(refusal(
        Reason::StillChanging,
        Errno::TXTBSY,
        format!(
            "somebody may be in the middle of changing it: {}",
            who.join(", ")
        ),
        "try again when that is over, or ask with more patience",
    ))
}

fn stuck(stuck: Stuck) -> Refusal {
    refusal(
        Reason::StillChanging,
        Errno::TXTBSY,
        stuck.obstacle(),
        "try again when that is over; if it hangs, end it, or what it waits for",
    )
}

/// What a pin promises, and what it takes to keep that.
struct Still {
    pinned: Pinned,
    held: Option<Held>,
    /// Pages that nobody may have mapped to store to.
    frozen: Vec<Range<u64>>,
    beside: Beside,
}

/// Holds back every open of an inode while it exists.
struct HoldOpens<'a> {
    guard: &'a Guard,
    watched: &'a Watched,
}

impl<'a> HoldOpens<'a> {
    fn new(guard: &'a Guard, watched: &'a Watched) -> Self {
        watched.hold_opens.store(true, SeqCst);
        Self { guard, watched }
    }
}

impl Drop for HoldOpens<'_> {
    fn drop(&mut self) {
        self.watched.hold_opens.store(false, SeqCst);
        self.guard.gate.reconsider();
    }
}

/// The pins of a file, for whoever has it open.
pub(crate) fn pins_of(guard: &Guard, file: BorrowedFd<'_>) -> Result<Vec<PinnedRange>, Refusal> {
    // Anybody may ask about any file, and no server of a filesystem (FUSE, NFS)
    // may make the guard wait: this asks none.
    let statx = rustix::fs::statx(
        file,
        "",
        AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC,
        StatxFlags::INO,
    )
    .map_err(|errno| system("statx", errno))?;
    let id = InodeId {
        dev: rustix::fs::makedev(statx.stx_dev_major, statx.stx_dev_minor),
        inode: statx.stx_ino,
    };
    let Some(watched) = guard.table.get(id) else {
        return Ok(Vec::new());
    };
    let pins = watched.pins.load();
    Ok(pins
        .iter()
        .filter(|pin| pin.settled().is_some() && !pin.is_dead())
        .map(|pin| PinnedRange {
            pin: pin.id,
            range: pin.shown.clone(),
            flags: pin.flags,
            pid: pin.pid,
        })
        .collect())
}

#[cfg(feature = "bpf")]
pub(crate) mod adopt;
pub(crate) mod allocate;
pub(crate) mod in_kernel;
pub(crate) mod pending;
#[cfg(test)]
mod tests;
