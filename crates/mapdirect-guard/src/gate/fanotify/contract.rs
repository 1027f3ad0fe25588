//! The fanotify gate as the rest of the guard sees it.

use super::exclude::{self, Exclusion};
use super::{Gate, MASK, lifetime, server};
use crate::gate::{self, Dormancy, Task};
use crate::grant::{Granting, Holder, Secured, system};
use crate::server::OnTampering;
use crate::table::{GrantState, Passing, Pin, Watched};
use crate::{Errno, Guard};
use mapdirect_proto::{Notice, Refusal, WatchedPin};
use mapdirect_sys::fcntl::conflicting_lock;
use rustix::fs::OFlags;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

impl gate::Gate for Gate {
    fn kind(&self) -> mapdirect_proto::Gate {
        mapdirect_proto::Gate::Fanotify
    }

    /// Nobody but the guard can reach its groups, so nobody tampers with them.
    fn tasks(self: Arc<Self>, _on_tampering: Box<OnTampering>) -> Vec<Task> {
        let ends = Arc::clone(&self);
        vec![
            Task {
                name: "gate",
                failure: "the gate cannot go on",
                run: Box::new(move |guard| server::run(guard, &self)),
            },
            Task {
                name: "lifetime",
                failure: "ends of pins cannot be noticed any more",
                run: Box::new(move |guard| lifetime::run(guard, &ends)),
            },
        ]
    }

    fn sees_nfs_clients(&self) -> bool {
        false
    }

    fn exclude(
        &self,
        granting: &Granting<'_>,
        state: &mut GrantState,
        holder: &mut Holder<'_>,
    ) -> Result<Secured, Refusal> {
        Exclusion::begin(self, granting, state, holder).run(state)
    }

    fn dormancy(&self) -> Option<&dyn Dormancy> {
        None
    }

    fn others_can_store(
        &self,
        granting: &Granting<'_>,
        file: BorrowedFd<'_>,
        frozen: &[Range<u64>],
    ) -> Result<bool, Refusal> {
        let notes = granting.notes()?;
        exclude::others_can_store(granting, &notes, file, frozen)
    }

    /// The gate reads the table by itself, and judges the operations that it
    /// holds back anew.
    fn publish(&self, guard: &Guard, watched: &Watched) -> Result<(), Errno> {
        watched.renew_layers();
        guard.waiting.decided();
        Ok(())
    }

    fn outlives(&self, watched: &Watched, pin: &Pin) -> Result<(), Refusal> {
        Self::outlives(self, watched, pin)
    }

    fn has_descriptor(&self, number: RawFd) {
        self.journal.note_descriptor(number);
    }

    fn withdraw(&self, watched: &Watched, file: BorrowedFd<'_>, was_last: bool) {
        if was_last {
            // There may be no mark yet, or none any more.
            let _ = self.group.remove(MASK, file);
            self.lifetime.let_go(watched, file);
        }
    }

    /// A query for a conflicting lock finds none if it is made through the
    /// description that has the lock, and finds that lock if it is made through
    /// any other.
    fn is_the_pin(&self, granting: &Granting<'_>, file: BorrowedFd<'_>) -> Result<bool, Refusal> {
        let byte = granting.pin.lock_byte();
        let failed = |errno| system("F_OFD_GETLK", errno);
        let by_holder = conflicting_lock(file, byte, 1).map_err(failed)?;
        let other = granting.reopen(file, OFlags::RDONLY)?;
        let by_others = conflicting_lock(other.as_fd(), byte, 1).map_err(failed)?;
        Ok(by_holder.is_none() && by_others.is_some())
    }

    fn has_ended(&self, pin: &Pin, file: BorrowedFd<'_>) -> bool {
        !pin.is_alive(file)
    }

    fn end(&self, watched: &Watched, pin: &Pin) {
        pin.end();
        self.lifetime.take_out_dead(watched.id);
    }

    /// Before the pin is out of the table, it is noted what its holder keeps. The
    /// lifetime thread lets the inode go if nothing else is pinned.
    fn take_away(&self, _guard: &Guard, watched: &Arc<Watched>, pin: &Pin) {
        let _ = watched.note(Passing::left_with(pin.pid));
        watched.remove(|other| other.id == pin.id);
        self.end(watched, pin);
    }

    /// This gate asks whether a pin is alive before it refuses anything for the
    /// pin.
    fn refuses_for_ended(&self, _pin: u64) -> bool {
        false
    }

    fn fate_of(&self, named: &WatchedPin) -> Notice {
        gate::unknown(named.pin)
    }

    /// The fanotify gate is nowhere but in descriptors.
    fn directory(&self) -> Option<OwnedFd> {
        None
    }

    fn refused(&self, guard: &Guard) -> Vec<(String, u64)> {
        guard.audit.counts()
    }
}
