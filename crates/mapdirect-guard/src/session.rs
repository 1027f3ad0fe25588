//! The conversation with one client: reads its requests, checks its rights and
//! answers.
//!
//! Every client has a thread of its own, because anything that a client sends
//! may make the thread wait: a descriptor of a filesystem whose server never
//! answers, or a file with gigabytes to write back. Only that client waits
//! then.
//!
//! A thread that hangs in the close of such a descriptor is deaf to SIGKILL. It
//! would keep all descriptors of a killed guard open, and so its gate, at which
//! nobody answers any more. So the descriptors of a client without the
//! capability are received, looked at and closed by a thread that has no other
//! descriptors. A file comes out of it only if the policy allows the request, and
//! the file is one of XFS or ext4.

mod follow;
mod hear;
mod rights;

use self::hear::understand;
use crate::delegation::{self, Admission, Peer};
use crate::family::Family;
use crate::grant::allocate::{self, Allocated};
use crate::grant::giving_way::{self, GivenWay};
use crate::grant::{self, Conversation, Grant, refusal};
use crate::notice::{Watcher, Whereabouts};
use crate::places::Place;
use crate::table::{Announcement, InodeId};
use crate::{Errno, Guard, status};
use mapdirect_proto::{
    AllocateRequest, Flags, MAX_MESSAGE, OLDEST_VERSION, PinRequest, PinnedRange, Reason, Refusal,
    Reply, Request, VERSION, WatchedPin, YieldRequest,
};
use mapdirect_sys::memfd::{self, Prover};
use mapdirect_sys::unix::{Sender, Socket};
use mapdirect_sys::{proc, proc_status};
use rustix::fs::OFlags;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a client may take to read a reply.
const SEND_PATIENCE: Duration = Duration::from_secs(2);
/// How long a client may take to replace a descriptor.
const SWAP_PATIENCE: Duration = Duration::from_secs(2);

/// How long a client may be silent before the guard checks whether it needs its
/// place. A client that has not said hello must then leave, and so must a
/// stranger when there is a crowd.
const IDLE: Duration = Duration::from_secs(10);

pub(crate) struct Session<'guard> {
    guard: &'guard Guard,
    socket: Arc<Socket>,
    /// The process that connected.
    peer: Peer,
    challenge: [u8; 32],
    greeted: bool,
    /// The version of the protocol that both sides speak.
    version: u32,
    /// The process that has proven the capability on this connection. It is the
    /// one that connected.
    proven: Option<Prover>,
    /// The process that connected and its descendants, once it has asked for a
    /// pin for all of them.
    family: Option<Arc<Family>>,
    /// Announcements of this client that may still be used.
    announced: Vec<Arc<Announcement>>,
    /// The pins that give way because of this client.
    given_way: Vec<GivenWay>,
    /// Set if this connection is for notices only.
    watcher: Option<Arc<Watcher>>,
}

/// A message from a client.
struct Said {
    /// The request, or why the message cannot be understood.
    request: Result<Request, Refusal>,
    sender: Option<Sender>,
    handed: Handed,
}

/// What came with a request, or what was learned from it.
enum Handed {
    Nothing,
    File(OwnedFd),
    Proof(Option<Prover>),
    Pins(Result<Vec<PinnedRange>, Refusal>),
    /// What allows a request of a client without the capability. The file is on
    /// its way out of a thread apart.
    Passed(Admission),
    /// The same, with the file.
    Admitted(OwnedFd, Admission),
    /// A descriptor that is of no use to a client without the capability, and
    /// that is closed already.
    Useless(Refusal),
}

/// Why a conversation ends.
enum End {
    /// The client left, or does not read.
    Gone,
    /// The client sent something that makes no sense.
    Nonsense,
}

impl From<Errno> for End {
    fn from(_errno: Errno) -> Self {
        Self::Gone
    }
}

impl<'guard> Session<'guard> {
    /// Prepares to talk to the client at the other end of `socket`.
    pub(crate) fn new(guard: &'guard Guard, socket: Socket) -> Result<Self, Errno> {
        socket.tell_senders()?;
        socket.set_send_timeout(SEND_PATIENCE)?;
        socket.set_receive_timeout(Some(IDLE))?;
        let peer = Peer::of(&socket)?;
        let mut challenge = [0; 32];
        rustix::rand::getrandom(&mut challenge, rustix::rand::GetRandomFlags::empty())?;
        Ok(Self {
            guard,
            socket: Arc::new(socket),
            peer,
            challenge,
            greeted: false,
            version: OLDEST_VERSION,
            proven: None,
            family: None,
            announced: Vec::new(),
            given_way: Vec::new(),
            watcher: None,
        })
    }

    /// Talks until the client leaves or sends nonsense, or until it is silent
    /// while others wait for its place.
    pub(crate) fn run(mut self, place: &Place) {
        let mut buffer = vec![0; MAX_MESSAGE + 1];
        loop {
            let said = match self.listen(&mut buffer) {
                Ok(Some(said)) => said,
                Err(Errno::AGAIN) => {
                    let is_used = self.proven.is_some() || self.watcher.is_some();
                    if is_used || self.greeted && !place.is_wanted() {
                        continue;
                    }
                    return;
                }
                _ => return,
            };
            match self.answer(said, place) {
                Ok(()) => {}
                Err(End::Gone) => return,
                Err(End::Nonsense) => {
                    // The reply is on its way. A client that speaks another
                    // protocol gets no second chance to confuse the guard.
                    return;
                }
            }
        }
    }

    fn answer(&mut self, said: Said, place: &Place) -> Result<(), End> {
        let request = match said.request {
            Ok(request) => request,
            Err(refusal) => {
                self.refuse(refusal)?;
                return Err(End::Nonsense);
            }
        };
        let sender = said.sender;
        match (&request, said.handed) {
            (Request::Hello { version }, Handed::Nothing) => self.greet(*version),
            (Request::Watch(pins), Handed::Nothing) if self.greeted => self.watch(pins, sender),
            (Request::Follow(follow), Handed::Nothing) if self.greeted => {
                self.follow(*follow, place)
            }
            _ if !self.greeted || self.watcher.is_some() => {
                self.refuse(protocol(if self.greeted {
                    "this connection is for notices"
                } else {
                    "a conversation begins with a hello"
                }))?;
                Err(End::Nonsense)
            }
            (Request::Prove, Handed::Proof(prover)) => self.prove(prover, sender),
            (Request::Query, Handed::Pins(pins)) => self.tell_pins(pins),
            (Request::Pin(pin), Handed::File(file)) => {
                let owner = self.authorise(sender);
                self.pin(pin, file, owner, None)
            }
            (Request::Pin(pin), Handed::Admitted(file, admission)) => {
                let owner = self.require_peer(sender);
                self.pin(pin, file, owner, Some(&admission))
            }
            (Request::Allocate(allocate), Handed::File(file)) => {
                let owner = self.authorise(sender);
                self.allocate(*allocate, file, owner)
            }
            (Request::Allocate(allocate), Handed::Admitted(file, admission)) => {
                let owner = self.require_peer(sender);
                match self.guard.delegation.turn(admission.uid) {
                    Ok(_turn) => self.allocate(*allocate, file, owner),
                    Err(refusal) => self.refuse(refusal),
                }
            }
            (Request::Announce { tid }, Handed::File(file)) => {
                let owner = self.authorise(sender);
                self.announce(*tid, file.as_fd(), owner)
            }
            (Request::Announce { tid }, Handed::Admitted(file, _)) => {
                let owner = self.require_peer(sender);
                self.announce(*tid, file.as_fd(), owner)
            }
            (Request::Arm(arm), Handed::File(file)) => {
                let arms = &self.guard.delegation.arms;
                self.order(sender, || arms.arm(arm, file.as_fd()))
            }
            (Request::Disarm, Handed::File(file)) => {
                let arms = &self.guard.delegation.arms;
                self.order(sender, || arms.disarm(file.as_fd()))
            }
            (Request::Unpin(pin), Handed::Nothing) => {
                self.order(sender, || delegation::ends::unpin(self.guard, *pin))
            }
            (Request::Yield(range), Handed::File(file)) => {
                let owner = self.authorise(sender);
                self.give_way(*range, file, owner)
            }
            (Request::Yield(range), Handed::Admitted(file, admission)) => {
                let owner = self.require_peer(sender);
                match self.guard.delegation.turn(admission.uid) {
                    Ok(_turn) => self.give_way(*range, file, owner),
                    Err(refusal) => self.refuse(refusal),
                }
            }
            (Request::Keeper { pid }, Handed::Nothing) => self.name_keeper(*pid, sender),
            (Request::Resume, Handed::Nothing) => {
                self.hold_again();
                Ok(self.send(&Reply::Done, &[])?)
            }
            (
                Request::Pin(_)
                | Request::Allocate(_)
                | Request::Yield(_)
                | Request::Announce { .. }
                | Request::Arm(_)
                | Request::Disarm,
                Handed::Useless(refusal),
            ) => self.refuse(refusal),
            (Request::Status, Handed::Nothing) => self.status(),
            (Request::Barrier, Handed::Nothing) => Ok(self.send(&Reply::Done, &[])?),
            (Request::Ended(pin), Handed::Nothing) => self.ended(*pin),
            (Request::Swapped, Handed::Nothing) => {
                self.refuse(protocol("nothing was to be swapped"))?;
                Err(End::Nonsense)
            }
            _ => {
                self.refuse(protocol("this request needs another number of descriptors"))?;
                Err(End::Nonsense)
            }
        }
    }

    fn send(&self, reply: &Reply, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        self.socket.send(&[&reply.encode()], fds)
    }

    fn refuse(&self, refusal: Refusal) -> Result<(), End> {
        Ok(self.send(&Reply::Refused(refusal), &[])?)
    }

    /// Agrees on a version of the protocol. Holders of version 1 say hello
    /// again at points at which later ones send a barrier.
    fn greet(&mut self, version: u32) -> Result<(), End> {
        if let Err(unknown) = mapdirect_proto::settle(version) {
            self.refuse(refusal(
                Reason::Protocol,
                Errno::PROTONOSUPPORT,
                unknown.to_string(),
                OTHER_VERSION,
            ))?;
            return Err(End::Nonsense);
        }
        self.greeted = true;
        self.version = version.min(VERSION);
        Ok(self.send(
            &Reply::Welcome {
                version: VERSION,
                gate: self.guard.gate.kind(),
                pid: std::process::id().cast_signed(),
                challenge: self.challenge,
            },
            &[],
        )?)
    }

    /// Carries out an order of somebody with the capability.
    fn order(
        &self,
        sender: Option<Sender>,
        order: impl FnOnce() -> Result<(), Refusal>,
    ) -> Result<(), End> {
        match self.authorise(sender).and_then(|_| order()) {
            Ok(()) => Ok(self.send(&Reply::Done, &[])?),
            Err(refusal) => self.refuse(refusal),
        }
    }

    fn pin(
        &mut self,
        pin: &PinRequest,
        file: OwnedFd,
        owner: Result<Sender, Refusal>,
        admission: Option<&Admission>,
    ) -> Result<(), End> {
        let guard = self.guard;
        let granted = owner.and_then(|owner| {
            self.check_mapping(pin)?;
            self.begin_family(pin, owner)?;
            grant::grant(guard, pin, file, owner, admission, self)
        });
        if let (Ok(grant), Some(start)) = (&granted, self.peer.start) {
            grant.pin.fate.asked_by(self.peer.sender.pid, start);
        }
        match granted {
            Ok(Grant {
                watched,
                pin,
                granted,
                file,
                extents,
                lifeline,
            }) => {
                let mut fds = vec![file.as_fd()];
                fds.extend(extents.as_ref().map(AsFd::as_fd));
                fds.extend(lifeline.as_ref().map(AsFd::as_fd));
                // Whoever knows of the pin must find it with the next guard.
                let sent = match guard.gate.outlives(&watched, &pin) {
                    // If the client is gone, the description goes with this
                    // message, and so does the pin.
                    Ok(()) => self.send(&Reply::Granted(granted), &fds).map_err(End::from),
                    Err(refusal) => {
                        guard.gate.take_away(guard, &watched, &pin);
                        self.refuse(refusal)
                    }
                };
                drop((file, lifeline));
                pin.hand_over();
                self.guard.waiting.decided();
                sent
            }
            Err(refusal) => self.refuse(refusal),
        }
    }

    /// Takes an ancestor of the process that asks for the root of its family:
    /// for a supervisor that is not itself an ancestor of whom it supervises. The
    /// number is the one that the ancestor has in the sender's PID namespace.
    fn name_keeper(&mut self, pid: i32, sender: Option<Sender>) -> Result<(), End> {
        let named = self.require_peer(sender).and_then(|sender| {
            let known = proc_status::ancestor_known_as(sender.pid, pid);
            let known = known.map_err(|errno| grant::system("finding an ancestor", errno))?;
            let family = Family::of(known).map_err(|errno| grant::system("pidfd_open", errno))?;
            if family.may_have(sender.pid) {
                return Ok(family);
            }
            Err(refusal(
                Reason::Arguments,
                Errno::PERM,
                format!("process {} does not descend from process {pid}", sender.pid),
                "name an ancestor",
            ))
        });
        match named {
            Ok(family) => {
                self.family = Some(Arc::new(family));
                Ok(self.send(&Reply::Done, &[])?)
            }
            Err(refusal) => self.refuse(refusal),
        }
    }

    /// Gets hold of the process that asks for a pin for its family, or for one
    /// that denies writing to everybody else.
    fn begin_family(&mut self, pin: &PinRequest, sender: Sender) -> Result<(), Refusal> {
        if self.family.is_some() || !pin.flags.intersects(Flags::FAMILY | Flags::DENY_WRITE) {
            return Ok(());
        }
        let family = Family::of(sender.pid).map_err(|errno| grant::system("pidfd_open", errno))?;
        // If the number names the process that connected now, it has named it
        // before.
        if !self.peer.is_there() {
            return Err(grant::gone());
        }
        self.family = Some(Arc::new(family));
        Ok(())
    }

    /// Sends notices about pins on this connection from now on.
    fn watch(&mut self, pins: &[WatchedPin], sender: Option<Sender>) -> Result<(), End> {
        let peer = match self.require_peer(sender) {
            Ok(peer) => peer,
            Err(refusal) => return self.refuse(refusal),
        };
        let watcher = self
            .watcher
            .get_or_insert_with(|| Watcher::new(Arc::clone(&self.socket), peer));
        let guard = self.guard;
        guard.notices.watch(watcher, pins, |named| {
            let found = guard.table.get(InodeId::from(named)).and_then(|watched| {
                let pins = guard.pins_awake_or_asleep(&watched);
                let mut alive = pins.into_iter().filter(|pin| !pin.is_dead());
                alive.find(|pin| pin.id == named.pin)
            });
            found.map_or_else(
                || Whereabouts::Told(Box::new(guard.gate.fate_of(named))),
                Whereabouts::Known,
            )
        });
        let directory = self.guard.gate.directory();
        let fds: Vec<_> = directory.iter().map(AsFd::as_fd).collect();
        Ok(self.send(&Reply::Watching, &fds)?)
    }

    /// Handles a holder's message that a pin has ended. A holder cannot end a
    /// pin; the pin has ended only if the kernel says so. The answer then comes
    /// once nothing is refused for the pin any more.
    fn ended(&self, ended: WatchedPin) -> Result<(), End> {
        let Guard { gate, table, .. } = self.guard;
        if gate.refuses_for_ended(ended.pin) {
            table.wait_until_out(InodeId::from(&ended), ended.pin);
        }
        Ok(self.send(&Reply::Done, &[])?)
    }

    fn allocate(
        &mut self,
        request: AllocateRequest,
        file: OwnedFd,
        owner: Result<Sender, Refusal>,
    ) -> Result<(), End> {
        let Allocated { now, result } = match owner {
            Ok(sender) => {
                let is_wanted = || self.socket.peer_is_gone() == Ok(false);
                allocate::allocate(self.guard, request, file, sender, &is_wanted)
            }
            Err(refusal) => return self.refuse(refusal),
        };
        if let Some((granted, extents)) = now {
            let fds: Vec<_> = extents.iter().map(AsFd::as_fd).collect();
            self.send(&Reply::Granted(granted), &fds)?;
        }
        match result {
            Ok(()) => Ok(self.send(&Reply::Done, &[])?),
            Err(refusal) => self.refuse(refusal),
        }
    }

    fn give_way(
        &mut self,
        range: YieldRequest,
        file: OwnedFd,
        owner: Result<Sender, Refusal>,
    ) -> Result<(), End> {
        /// The most ranges of one client that give way at a time.
        const MOST: usize = 256;
        let given = owner.and_then(|sender| {
            if self.given_way.len() >= MOST {
                return Err(refusal(
                    Reason::Limit,
                    Errno::AGAIN,
                    format!("its pins give way in {MOST} ranges already"),
                    "resume first",
                ));
            }
            giving_way::give_way(self.guard, range, file, sender)
        });
        match given {
            Ok(given) => {
                self.given_way.push(given);
                Ok(self.send(&Reply::Done, &[])?)
            }
            Err(refusal) => self.refuse(refusal),
        }
    }

    /// Has every pin that gives way because of this client hold what is there
    /// now.
    fn hold_again(&mut self) {
        for given in std::mem::take(&mut self.given_way) {
            given.hold_again(self.guard);
        }
    }

    /// Makes the checks that `mmap(2)` itself would make.
    fn check_mapping(&self, pin: &PinRequest) -> Result<(), Refusal> {
        if !pin.flags.contains(Flags::MAP) {
            return Ok(());
        }
        let page = mapdirect_sys::mmap::page_size();
        let has_length = !matches!(pin.length, 0 | PinRequest::WITHOUT_END);
        if !has_length || !pin.offset.is_multiple_of(page) {
            return Err(refusal(
                Reason::Arguments,
                Errno::INVAL,
                "a mapping needs a length, and an offset on a page boundary",
                format!("pages have {page} bytes here"),
            ));
        }
        Ok(())
    }

    fn announce(
        &mut self,
        tid: i32,
        path: BorrowedFd<'_>,
        owner: Result<Sender, Refusal>,
    ) -> Result<(), End> {
        let announced = owner.and_then(|owner| self.let_in(tid, path, owner));
        match announced {
            Ok(announcement) => {
                let now = Instant::now();
                self.announced.retain(|other| other.is_good(now));
                self.announced.extend(announcement);
                Ok(self.send(&Reply::Done, &[])?)
            }
            Err(refusal) => self.refuse(refusal),
        }
    }

    /// Lets a thread of the sender open a file. A file that is not behind the
    /// gate needs nothing.
    fn let_in(
        &self,
        tid: i32,
        path: BorrowedFd<'_>,
        sender: Sender,
    ) -> Result<Option<Arc<Announcement>>, Refusal> {
        // The thread gave its number as its own PID namespace has it.
        let tid = match proc_status::ids(sender.pid) {
            Ok(ids) if ids.numbers.len() > 1 => {
                proc_status::thread_known_as(sender.pid, tid).unwrap_or(0)
            }
            _ => tid,
        };
        let start = proc::thread_start_time(sender.pid, tid).ok();
        let is_path = rustix::fs::fcntl_getfl(path).is_ok_and(|flags| flags.contains(OFlags::PATH));
        let (Some(start), true) = (start.filter(|_| tid > 0), is_path) else {
            return Err(protocol("an announcement names a thread and a path"));
        };
        let stat = rustix::fs::fstat(path)
            .map_err(|errno| refusal(Reason::System, errno, "fstat failed", ""))?;
        let id = InodeId::from(&stat);
        let Some(watched) = self.guard.table.get(id) else {
            return Ok(None);
        };
        let announcement = Arc::new(Announcement::new(tid, start));
        if watched.announce(&announcement) {
            return Ok(Some(announcement));
        }
        Err(refusal(
            Reason::Limit,
            Errno::AGAIN,
            "too many others are about to open it",
            "try again",
        ))
    }

    fn tell_pins(&self, pins: Result<Vec<PinnedRange>, Refusal>) -> Result<(), End> {
        match pins {
            Ok(pins) => Ok(self.send(&Reply::Pins(pins, 0), &[])?),
            Err(refusal) => self.refuse(refusal),
        }
    }

    fn status(&self) -> Result<(), End> {
        let uid = self.peer.sender.uid;
        let privileged = self.proven.is_some() || uid == 0;
        let status = status::gather(self.guard, (!privileged).then_some(uid));
        match memfd::sealed("mapdirect-status", &mapdirect_proto::encode_status(&status)) {
            Ok(file) => Ok(self.send(&Reply::Status, &[file.as_fd()])?),
            Err(errno) => self.refuse(refusal(
                Reason::System,
                errno,
                format!("memfd_create failed: {errno}"),
                "",
            )),
        }
    }

    fn wait_for_swapped(&self) -> Result<(), Refusal> {
        let failed = |errno: Errno| {
            refusal(
                Reason::Protocol,
                Errno::TIMEDOUT,
                format!("the descriptor was not replaced in time ({errno})"),
                "",
            )
        };
        self.socket
            .set_receive_timeout(Some(SWAP_PATIENCE))
            .map_err(failed)?;
        let mut buffer = [0; 256];
        let received = self.socket.receive(&mut buffer);
        self.socket
            .set_receive_timeout(Some(IDLE))
            .map_err(failed)?;
        let received = received.map_err(failed)?;
        match understand(&buffer, &received) {
            Ok(Request::Swapped) => Ok(()),
            _ => Err(protocol("the descriptor should have been replaced now")),
        }
    }
}

impl Conversation for Session<'_> {
    fn swap(&mut self, replacement: BorrowedFd<'_>) -> Result<(), Refusal> {
        self.send(&Reply::Swap, &[replacement])
            .map_err(|errno| refusal(Reason::Protocol, errno, "the client is gone", ""))?;
        self.wait_for_swapped()
    }

    fn family(&self) -> Option<Arc<Family>> {
        self.family.clone()
    }

    fn is_wanted(&self) -> bool {
        self.socket.peer_is_gone() == Ok(false)
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        self.hold_again();
        if let Some(watcher) = &self.watcher {
            self.guard.notices.forget(watcher);
        }
        // The processes that these announcements are for may be gone.
        for announcement in &self.announced {
            announcement.take();
        }
    }
}

/// The help for a client that speaks another version of the protocol.
const OTHER_VERSION: &str = "use the library of the same version as the guard";

fn protocol(what: impl std::fmt::Display) -> Refusal {
    refusal(
        Reason::Protocol,
        Errno::PROTO,
        what.to_string(),
        OTHER_VERSION,
    )
}
