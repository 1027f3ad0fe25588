//! Receives requests and their descriptors.

use super::{Handed, Said, Session, protocol};
use crate::Errno;
use crate::delegation::{self, not_capable};
use crate::grant::{self, system};
use mapdirect_proto::{DecodeError, Refusal, Request, VERSION_WITH_POLICY};
use mapdirect_sys::unix::{Received, Sender, Socket};
use mapdirect_sys::{descriptors, memfd};
use std::os::fd::{AsFd, OwnedFd};

impl Session<'_> {
    /// Waits for a message of the client. Returns `None` when the client is
    /// gone.
    pub(super) fn listen(&self, buffer: &mut [u8]) -> Result<Option<Said>, Errno> {
        if self.proven.is_none() && self.socket.next_has_descriptors()? {
            let builder = std::thread::Builder::new()
                .name(String::from("doorman"))
                .stack_size(256 * 1024);
            // A file that may be kept comes back by this.
            let (back, out) = Socket::pair()?;
            let mut keep = vec![self.socket.as_fd(), out.as_fd()];
            keep.extend(self.peer.pidfd());
            let said = descriptors::apart(builder, &keep, || self.hear(buffer, Some(&out)))
                .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::NOMEM))??;
            let Some(mut said) = said else {
                return Ok(None);
            };
            if let Handed::Passed(admission) = said.handed {
                let file = back.receive(&mut [0; 8])?.fds.pop().ok_or(Errno::MFILE)?;
                said.handed = Handed::Admitted(file, admission);
            }
            return Ok(Some(said));
        }
        self.hear(buffer, None)
    }

    /// Receives a message. A descriptor is closed again if it has told
    /// everything at once. In a thread apart, which has an `out`, it is closed in
    /// any case, and passed on by that if something allows the request.
    fn hear(&self, buffer: &mut [u8], out: Option<&Socket>) -> Result<Option<Said>, Errno> {
        let mut received = self.socket.receive(buffer)?;
        if let Some(dormancy) = self.guard.gate.dormancy() {
            dormancy.catch_up();
        }
        if received.length == 0 {
            return Ok(None);
        }
        let request = understand(buffer, &received);
        let handed = match (&request, received.fds.pop()) {
            (_, None) => Handed::Nothing,
            (Ok(Request::Prove), Some(proof)) => {
                let prover = memfd::check_immutable_capability(proof.as_fd(), &self.challenge);
                Handed::Proof(prover.unwrap_or_default())
            }
            (Ok(Request::Query), Some(file)) => {
                Handed::Pins(grant::pins_of(self.guard, file.as_fd()))
            }
            (_, Some(file)) => match (out, &request) {
                (None, _) => Handed::File(file),
                (Some(out), Ok(request)) => self.judge(received.sender, request, file, out),
                (Some(_), Err(_)) => Handed::Useless(not_capable()),
            },
        };
        Ok(Some(Said {
            request,
            sender: received.sender,
            handed,
        }))
    }

    /// Judges a request of a client without the capability.
    fn judge(
        &self,
        sender: Option<Sender>,
        request: &Request,
        file: OwnedFd,
        out: &Socket,
    ) -> Handed {
        let may_be_allowed = matches!(
            request,
            Request::Pin(_) | Request::Allocate(_) | Request::Announce { .. } | Request::Yield(_)
        );
        if !may_be_allowed || self.version < VERSION_WITH_POLICY {
            return Handed::Useless(not_capable());
        }
        let admitted = delegation::admit(self.guard, &self.peer, sender, request, file.as_fd());
        let passed = admitted.and_then(|admission| {
            out.send_now(&[&[0]], &[file.as_fd()])
                .map(|()| admission)
                .map_err(|errno| system("passing a file on", errno))
        });
        match passed {
            Ok(admission) => Handed::Passed(admission),
            Err(refusal) => Handed::Useless(refusal),
        }
    }
}

/// Parses a request and checks the number of its descriptors.
pub(super) fn understand(buffer: &[u8], received: &Received) -> Result<Request, Refusal> {
    if received.truncated {
        return Err(protocol("the message is too long"));
    }
    let bytes = buffer.get(..received.length).unwrap_or_default();
    let request = Request::decode(bytes).map_err(|error: DecodeError| protocol(error))?;
    if received.fds.len() == request.descriptors() {
        Ok(request)
    } else {
        Err(protocol(
            "the message carries another number of descriptors than it must",
        ))
    }
}
