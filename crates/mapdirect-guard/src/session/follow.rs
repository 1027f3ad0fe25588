//! Sends records to a client.
//!
//! The thread of the client has a place in the ring of records and takes what
//! comes next as fast as its client reads. The ring waits for nobody; what was
//! overwritten before it could be sent is told as a number.

use super::{End, Session, protocol};
use crate::Errno;
use crate::audit::journal::Kept;
use crate::places::Place;
use crate::wake::Waker;
use mapdirect_proto::{FollowRequest, Record, Reply, VERSION_WITH_RECORDS};
use rustix::event::{PollFd, PollFlags, Timespec};
use std::os::fd::AsFd;

/// How often to see whether others need the place of a stranger.
const PAUSE: Timespec = Timespec {
    tv_sec: 10,
    tv_nsec: 0,
};

impl Session<'_> {
    /// Sends the records that are kept, and those that come if that was asked
    /// for.
    pub(super) fn follow(&mut self, request: FollowRequest, place: &Place) -> Result<(), End> {
        if self.version < VERSION_WITH_RECORDS || self.watcher.is_some() {
            self.refuse(protocol(
                "records need version 4, and a connection of their own",
            ))?;
            return Err(End::Nonsense);
        }
        let waker = Waker::new()?;
        let journal = &self.guard.journal;
        // First of all, so that nothing is missed.
        journal.follow(&waker);
        let result = self.send_records(request, place, &waker);
        journal.leave(&waker);
        result
    }

    fn send_records(
        &self,
        request: FollowRequest,
        place: &Place,
        waker: &Waker,
    ) -> Result<(), End> {
        let most = usize::try_from(request.kept).unwrap_or(usize::MAX);
        let (kept, mut next) = self.guard.journal.latest(most, |kept| self.may_see(kept));
        for kept in kept {
            self.send_patiently(&Reply::Record(Box::new(self.shown(&kept))), waker, place)?;
        }
        self.send_patiently(&Reply::Following, waker, place)?;
        if !request.live {
            return Ok(());
        }
        loop {
            while let Some(found) = self.guard.journal.at(next) {
                if found.missed > 0 {
                    self.send_patiently(&Reply::Missed(found.missed), waker, place)?;
                }
                next = found.kept.record.number + 1;
                if self.may_see(&found.kept) {
                    let record = Box::new(self.shown(&found.kept));
                    self.send_patiently(&Reply::Record(record), waker, place)?;
                }
            }
            self.wait(waker, place, false)?;
        }
    }

    fn is_privileged(&self) -> bool {
        self.proven.is_some() || self.peer.sender.uid == 0
    }

    fn may_see(&self, kept: &Kept) -> bool {
        self.is_privileged() || kept.owners.contains(&self.peer.sender.uid)
    }

    /// A record as the client may see it: which program a process of another
    /// user runs is only for root to know.
    fn shown(&self, kept: &Kept) -> Record {
        let mut record = kept.record.clone();
        if !self.is_privileged() && record.actor.uid != Some(self.peer.sender.uid) {
            record.actor.executable.clear();
        }
        record
    }

    /// Sends a reply when the client has room for it.
    fn send_patiently(&self, reply: &Reply, waker: &Waker, place: &Place) -> Result<(), End> {
        let bytes = reply.encode();
        loop {
            match self.socket.send_now(&[&bytes], &[]) {
                Ok(()) => return Ok(()),
                Err(Errno::AGAIN) => self.wait(waker, place, true)?,
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Waits for a record, or for room. Ends when the client is gone, when it
    /// says something, or when its place is wanted.
    fn wait(&self, waker: &Waker, place: &Place, for_room: bool) -> Result<(), End> {
        if self.guard.is_stopping() || place.is_wanted() {
            return Err(End::Gone);
        }
        let socket = self.socket.as_fd();
        let waker_fd = waker.as_fd();
        let mut wanted = PollFlags::IN | PollFlags::RDHUP;
        if for_room {
            wanted |= PollFlags::OUT;
        }
        let mut fds = [
            PollFd::from_borrowed_fd(socket, wanted),
            PollFd::from_borrowed_fd(waker_fd, PollFlags::IN),
        ];
        // Who waits for room need not hear of records.
        let count = if for_room { 1 } else { 2 };
        match rustix::event::poll(&mut fds[..count], Some(&PAUSE)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let there = fds[0].revents();
        if there.intersects(PollFlags::IN | PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR) {
            return Err(End::Gone);
        }
        if !for_room {
            waker.clear();
        }
        Ok(())
    }
}
