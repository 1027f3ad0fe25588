//! The bpf gate as the rest of the guard sees it.

use super::exclude::{self, Exclusion};
use super::{Gate, events};
use crate::gate::{self, Dormancy, Task};
use crate::grant::{Granting, Holder, Secured, system};
use crate::server::OnTampering;
use crate::table::{GrantState, InodeId, Pin, Watched};
use crate::{Errno, Guard};
use mapdirect_proto::{Notice, Refusal, WatchedPin};
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

impl gate::Gate for Gate {
    fn kind(&self) -> mapdirect_proto::Gate {
        mapdirect_proto::Gate::Bpf
    }

    fn tasks(self: Arc<Self>, on_tampering: Box<OnTampering>) -> Vec<Task> {
        vec![Task {
            name: "gate",
            failure: "the gate cannot go on",
            run: Box::new(move |guard| events::run(guard, &self, &*on_tampering)),
        }]
    }

    fn sees_nfs_clients(&self) -> bool {
        true
    }

    fn exclude(
        &self,
        granting: &Granting<'_>,
        _state: &mut GrantState,
        holder: &mut Holder<'_>,
    ) -> Result<Secured, Refusal> {
        Exclusion::begin(self, granting, holder)?.run()
    }

    fn others_can_store(
        &self,
        granting: &Granting<'_>,
        file: BorrowedFd<'_>,
        frozen: &[Range<u64>],
    ) -> Result<bool, Refusal> {
        exclude::others_can_store(self, granting, file, frozen)
    }

    fn publish(&self, _guard: &Guard, watched: &Watched) -> Result<(), Errno> {
        self.publish(watched)
    }

    fn granted(&self, watched: &Watched) {
        self.grant_is_over(watched, true);
    }

    fn withdraw(&self, watched: &Watched, _file: BorrowedFd<'_>, _was_last: bool) {
        self.grant_is_over(watched, false);
        // If this fails, the entry still contains more than is pinned, so it
        // only refuses more.
        let _ = self.publish(watched);
    }

    fn is_the_pin(&self, granting: &Granting<'_>, file: BorrowedFd<'_>) -> Result<bool, Refusal> {
        let pin = self.pin_of(file);
        Ok(pin.map_err(|errno| system("asking the gate", errno))? == Some(granting.pin.id))
    }

    fn has_ended(&self, pin: &Pin, _file: BorrowedFd<'_>) -> bool {
        self.is_over(pin.id)
    }

    /// The programs report the end of the pin, and the pin is removed then.
    fn end(&self, _watched: &Watched, pin: &Pin) {
        pin.end();
    }

    fn take_away(&self, guard: &Guard, watched: &Arc<Watched>, pin: &Pin) {
        self.disown(watched.id, pin.id);
        pin.end();
        events::remove(guard, self, watched, pin.id);
    }

    /// When an inode has several pins, only the guard removes one that has
    /// ended.
    fn refuses_for_ended(&self, pin: u64) -> bool {
        self.is_over(pin)
    }

    fn dormancy(&self) -> Option<&dyn Dormancy> {
        Some(self)
    }

    fn has_copy_blocks(&self, file: BorrowedFd<'_>) -> Option<bool> {
        self.has_copy_blocks(file).ok()
    }

    fn fate_of(&self, named: &WatchedPin) -> Notice {
        let pin = named.pin;
        if !self.keeps(pin) {
            return gate::unknown(pin);
        }
        Notice::Unattended {
            pin,
            why: String::from(
                "the guard could not take it over: the kernel refuses, and ends it with its last \
                 mapping",
            ),
        }
    }

    fn directory(&self) -> Option<OwnedFd> {
        self.directory()
    }

    /// The kernel also counts refusals at times when there was no guard.
    fn refused(&self, _guard: &Guard) -> Vec<(String, u64)> {
        self.refused()
    }
}

impl Dormancy for Gate {
    fn catch_up(&self) {
        self.take_note();
    }

    fn spoil(&self, guard: &Guard, inode: InodeId) {
        // The pin may have ended without being known as dormant yet.
        self.disturb_inode(inode);
        self.forget_dormant(guard, inode);
    }

    fn spoil_all(&self, guard: &Guard) {
        self.spoil_all(guard);
    }

    fn sleeper(&self, inode: InodeId) -> Option<Arc<Pin>> {
        self.dormant_pin(inode)
    }
}
