//! Who may ask for what.

use super::{End, Session};
use crate::Errno;
use crate::delegation::not_capable;
use crate::grant::refusal;
use mapdirect_proto::{Reason, Refusal, Reply, VERSION_WITH_POLICY};
use mapdirect_sys::memfd::Prover;
use mapdirect_sys::unix::Sender;
use mapdirect_sys::{capget, proc, proc_status};

impl Session<'_> {
    /// Checks a proof. A proof counts only for the process that made it, and
    /// only on this connection: if somebody makes a privileged program produce
    /// the proof, it names that other process.
    pub(super) fn prove(
        &mut self,
        prover: Option<Prover>,
        sender: Option<Sender>,
    ) -> Result<(), End> {
        let proven = match prover {
            Some(prover) => self.require_prover(prover, sender).map(|()| prover),
            None => Err(not_capable()),
        };
        match proven {
            Ok(prover) => {
                self.proven = Some(prover);
                Ok(self.send(&Reply::Done, &[])?)
            }
            Err(refusal) => self.refuse(refusal),
        }
    }

    fn require_prover(&self, prover: Prover, sender: Option<Sender>) -> Result<(), Refusal> {
        let sender = self.require_peer(sender)?;
        let mend = if self.version < VERSION_WITH_POLICY {
            if prover.pid == sender.pid && proc::start_time(sender.pid) == Ok(prover.mark) {
                return Ok(());
            }
            "prove in the process that asks, in the PID and time namespaces of the guard; a newer \
             library may do so in any"
        } else {
            // The prover names itself as its own PID namespace has it. The
            // challenge was made after this process connected, so no process
            // that had the number before can have made the proof.
            let number = proc_status::ids(sender.pid).map(|ids| ids.own_number());
            let namespace = proc_status::pid_namespace(Some(sender.pid));
            if number == Ok(Some(prover.pid))
                && namespace == Ok(prover.mark)
                && self.peer.is_there()
            {
                return Ok(());
            }
            "prove in the process that asks"
        };
        Err(refusal(
            Reason::NotCapable,
            Errno::ACCESS,
            format!(
                "process {} hands in a proof that another made, process {} of its PID namespace",
                sender.pid, prover.pid
            ),
            mend,
        ))
    }

    /// The sender of a request, if the kernel says that it is the process that
    /// connected.
    pub(super) fn require_peer(&self, sender: Option<Sender>) -> Result<Sender, Refusal> {
        match sender {
            Some(sender) if sender.pid > 0 && sender.pid == self.peer.sender.pid => Ok(sender),
            Some(sender) => Err(refusal(
                Reason::NotCapable,
                Errno::ACCESS,
                format!(
                    "process {} speaks on the connection of process {}",
                    sender.pid, self.peer.sender.pid
                ),
                "connect again in every process",
            )),
            None => Err(refusal(
                Reason::NotCapable,
                Errno::ACCESS,
                "the kernel does not say who asks",
                "connect again",
            )),
        }
    }

    /// Checks whether the sender of a request may pin: the capability was
    /// proven on this connection by the very process that speaks now, and that
    /// process has not given it up since.
    pub(super) fn authorise(&self, sender: Option<Sender>) -> Result<Sender, Refusal> {
        if self.proven.is_none() {
            return Err(not_capable());
        }
        let sender = self.require_peer(sender)?;
        // In a user namespace of its own, every process has all capabilities.
        let initial = proc::in_initial_user_namespace(sender.pid) == Ok(true);
        let capable = capget::effective(sender.pid)
            .is_ok_and(|effective| capget::contains(effective, capget::CAP_LINUX_IMMUTABLE));
        // This check comes last: if the process number still names the process
        // that made the proof, it also did during the checks before.
        if initial && capable && self.peer.is_there() {
            Ok(sender)
        } else {
            Err(not_capable())
        }
    }
}
