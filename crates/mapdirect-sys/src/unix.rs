//! unix(7): whole messages with descriptors, between processes that know the
//! sender.

use crate::{Errno, Result, checked};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

/// The most descriptors in one message.
pub const MAX_FDS: usize = 4;

/// A socket that carries whole messages (`SOCK_SEQPACKET`).
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
}

/// A message as received.
#[derive(Debug)]
pub struct Received {
    /// The length of the message in the buffer.
    pub length: usize,
    /// Whether the message was longer than the buffer, or carried more
    /// descriptors than [`MAX_FDS`]. The rest is then lost.
    pub truncated: bool,
    /// The descriptors that came with the message, all close-on-exec.
    pub fds: Vec<OwnedFd>,
    /// The sending process, as the kernel knows it. This is known only on a
    /// socket after [`tell_senders`](Socket::tell_senders), and only if the
    /// process is visible in this PID namespace.
    pub sender: Option<Sender>,
}

/// The credentials that the kernel attaches to a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sender {
    /// Process id in the receiver's namespace.
    pub pid: i32,
    /// Real user id.
    pub uid: u32,
}

impl Socket {
    /// Creates a socket that listens at `path`; nothing may exist there yet.
    /// The sockets that [`accept`](Self::accept) returns name the sender of
    /// every message.
    ///
    /// # Errors
    ///
    /// `EADDRINUSE`, and any error of creating a file there.
    pub fn listen(path: &Path, backlog: i32) -> Result<Self> {
        let socket = Self::new()?;
        rustix::net::bind(&socket.fd, &SocketAddrUnix::new(path)?)?;
        // Connections inherit this. If it was set only after accepting a
        // connection, a message could come before that and name nobody.
        socket.tell_senders()?;
        rustix::net::listen(&socket.fd, backlog)?;
        Ok(socket)
    }

    /// Takes over a socket that somebody else made to listen.
    ///
    /// # Errors
    ///
    /// `EINVAL` if it does not listen, or is of another kind.
    pub fn listening(fd: OwnedFd) -> Result<Self> {
        let listens = rustix::net::sockopt::socket_acceptconn(&fd)?;
        if !listens || rustix::net::sockopt::socket_type(&fd)? != SocketType::SEQPACKET {
            return Err(Errno::INVAL);
        }
        let socket = Self { fd };
        socket.tell_senders()?;
        Ok(socket)
    }

    /// Takes over one end of a [`pair`](Self::pair) that another process made.
    ///
    /// # Errors
    ///
    /// `EINVAL` if it is a socket of another kind, `ENOTSOCK`.
    pub fn connected(fd: OwnedFd) -> Result<Self> {
        if rustix::net::sockopt::socket_type(&fd)? != SocketType::SEQPACKET {
            return Err(Errno::INVAL);
        }
        Ok(Self { fd })
    }

    /// Creates a socket that is connected to the one listening at `path`.
    ///
    /// # Errors
    ///
    /// `ENOENT` or `ECONNREFUSED` when nobody listens at `path`, `EACCES`.
    pub fn connect(path: &Path) -> Result<Self> {
        let socket = Self::new()?;
        let address = SocketAddrUnix::new(path)?;
        loop {
            match rustix::net::connect(&socket.fd, &address) {
                Ok(()) => return Ok(socket),
                Err(Errno::INTR) => {}
                Err(other) => return Err(other),
            }
        }
    }

    /// Creates two sockets that are connected to each other.
    ///
    /// # Errors
    ///
    /// `EMFILE`, `ENFILE`.
    pub fn pair() -> Result<(Self, Self)> {
        let (one, other) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok((Self { fd: one }, Self { fd: other }))
    }

    fn new() -> Result<Self> {
        let fd = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok(Self { fd })
    }

    /// Waits for a client.
    ///
    /// # Errors
    ///
    /// `EMFILE`, `ENFILE`; `ECONNABORTED` when the client has left.
    pub fn accept(&self) -> Result<Self> {
        loop {
            match rustix::net::accept_with(&self.fd, SocketFlags::CLOEXEC) {
                Ok(fd) => return Ok(Self { fd }),
                Err(Errno::INTR) => {}
                Err(other) => return Err(other),
            }
        }
    }

    /// Makes the kernel attach the sender's process and user to every message
    /// received from now on (`SO_PASSCRED`).
    ///
    /// # Errors
    ///
    /// None in practice.
    pub fn tell_senders(&self) -> Result<()> {
        rustix::net::sockopt::set_socket_passcred(&self.fd, true)
    }

    /// Makes [`send`](Self::send) fail with `EAGAIN` when the peer does not
    /// read for this long.
    ///
    /// # Errors
    ///
    /// `EDOM` for a duration the kernel cannot represent.
    pub fn set_send_timeout(&self, timeout: Duration) -> Result<()> {
        rustix::net::sockopt::set_socket_timeout(
            &self.fd,
            rustix::net::sockopt::Timeout::Send,
            Some(timeout),
        )
    }

    /// Makes [`receive`](Self::receive) fail with `EAGAIN` when nothing comes
    /// for this long. `None` waits for ever.
    ///
    /// # Errors
    ///
    /// `EDOM` for a duration the kernel cannot represent.
    pub fn set_receive_timeout(&self, timeout: Option<Duration>) -> Result<()> {
        rustix::net::sockopt::set_socket_timeout(
            &self.fd,
            rustix::net::sockopt::Timeout::Recv,
            timeout,
        )
    }

    /// The process at the other end, which connected (`SO_PEERPIDFD`, 6.5). The
    /// descriptor refers to that very process even after its number is used
    /// again.
    ///
    /// # Errors
    ///
    /// `ESRCH` when it is gone already, `ENOPROTOOPT` before 6.5.
    pub fn peer_pidfd(&self) -> Result<OwnedFd> {
        const SO_PEERPIDFD: libc::c_int = 77;
        let mut fd: libc::c_int = -1;
        let mut length =
            libc::socklen_t::try_from(size_of::<libc::c_int>()).map_err(|_| Errno::INVAL)?;
        // SAFETY: the option writes one int, the size `length` says.
        checked(unsafe {
            libc::getsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_SOCKET,
                SO_PEERPIDFD,
                (&raw mut fd).cast(),
                &raw mut length,
            )
        })?;
        // SAFETY: the kernel just gave us this descriptor.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// The process that connected, and its user at that time.
    ///
    /// # Errors
    ///
    /// `ENOTCONN`.
    pub fn peer(&self) -> Result<Sender> {
        let credentials = rustix::net::sockopt::socket_peercred(&self.fd)?;
        Ok(Sender {
            pid: credentials.pid.as_raw_nonzero().get(),
            uid: credentials.uid.as_raw(),
        })
    }

    /// The groups that the process that connected was in at that time, its own
    /// first (`SO_PEERGROUPS`).
    ///
    /// # Errors
    ///
    /// `ENOTCONN`.
    pub fn peer_groups(&self) -> Result<Vec<u32>> {
        const SO_PEERGROUPS: libc::c_int = 59;
        let own = rustix::net::sockopt::socket_peercred(&self.fd)?
            .gid
            .as_raw();
        let mut groups = vec![0_u32; 64];
        loop {
            let bytes = groups.len() * size_of::<u32>();
            let mut length = libc::socklen_t::try_from(bytes).map_err(|_| Errno::INVAL)?;
            // SAFETY: the option writes group ids, at most `length` bytes of
            // them, and says how many there are.
            let got = checked(unsafe {
                libc::getsockopt(
                    self.fd.as_raw_fd(),
                    libc::SOL_SOCKET,
                    SO_PEERGROUPS,
                    groups.as_mut_ptr().cast(),
                    &raw mut length,
                )
            });
            let count = usize::try_from(length).unwrap_or(0) / size_of::<u32>();
            match got {
                Ok(_) => {
                    groups.truncate(count);
                    groups.insert(0, own);
                    return Ok(groups);
                }
                Err(Errno::RANGE) if count > groups.len() => groups.resize(count, 0),
                // The other end of a pair, which nobody connected.
                Err(Errno::NODATA) => return Ok(vec![own]),
                Err(other) => return Err(other),
            }
        }
    }

    /// Sends one message with descriptors.
    ///
    /// # Errors
    ///
    /// `EPIPE` or `ECONNRESET` when the peer is gone, `EAGAIN` after the send
    /// timeout, `EMSGSIZE`.
    pub fn send(&self, bytes: &[&[u8]], fds: &[BorrowedFd<'_>]) -> Result<()> {
        self.send_flags(bytes, fds, SendFlags::NOSIGNAL)
    }

    /// [`send`](Self::send) without waiting: fails with `EAGAIN` when the
    /// peer's queue is full.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send).
    pub fn send_now(&self, bytes: &[&[u8]], fds: &[BorrowedFd<'_>]) -> Result<()> {
        self.send_flags(bytes, fds, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
    }

    fn send_flags(&self, bytes: &[&[u8]], fds: &[BorrowedFd<'_>], flags: SendFlags) -> Result<()> {
        let mut slices = [IoSlice::new(&[]); 4];
        if bytes.len() > slices.len() || fds.len() > MAX_FDS {
            return Err(Errno::MSGSIZE);
        }
        for (slice, part) in slices.iter_mut().zip(bytes) {
            *slice = IoSlice::new(part);
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        loop {
            match rustix::net::sendmsg(&self.fd, &slices[..bytes.len()], &mut control, flags) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(other) => return Err(other),
            }
        }
    }

    /// Ends the connection in both directions, for every descriptor of it.
    ///
    /// # Errors
    ///
    /// `ENOTCONN`.
    pub fn shut_down(&self) -> Result<()> {
        rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Both)
    }

    /// Waits for one message, and says whether descriptors come with it. It
    /// takes neither the message nor the descriptors. Only works on a socket
    /// after [`tell_senders`](Self::tell_senders).
    ///
    /// # Errors
    ///
    /// As [`receive`](Self::receive).
    pub fn next_has_descriptors(&self) -> Result<bool> {
        // The buffer has room for the sender, and nothing else.
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        loop {
            let mut byte = [0];
            match rustix::net::recvmsg(
                &self.fd,
                &mut [IoSliceMut::new(&mut byte)],
                &mut control,
                RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC,
            ) {
                Ok(message) => {
                    return Ok(message.flags.contains(rustix::net::ReturnFlags::CTRUNC));
                }
                Err(Errno::INTR) => {}
                Err(other) => return Err(other),
            }
        }
    }

    /// Waits for one message. A length of 0 means that the peer has closed its
    /// end.
    ///
    /// # Errors
    ///
    /// `EAGAIN` after the receive timeout, `ECONNRESET`.
    pub fn receive(&self, buffer: &mut [u8]) -> Result<Received> {
        let mut space =
            [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS), ScmCredentials(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let message = loop {
            match rustix::net::recvmsg(
                &self.fd,
                &mut [IoSliceMut::new(buffer)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            ) {
                Ok(message) => break message,
                Err(Errno::INTR) => {}
                Err(other) => return Err(other),
            }
        };
        let mut received = Received {
            length: message.bytes,
            truncated: message
                .flags
                .intersects(rustix::net::ReturnFlags::TRUNC | rustix::net::ReturnFlags::CTRUNC),
            fds: Vec::new(),
            sender: None,
        };
        for ancillary in control.drain() {
            match ancillary {
                RecvAncillaryMessage::ScmRights(fds) => received.fds.extend(fds),
                RecvAncillaryMessage::ScmCredentials(credentials) => {
                    // The kernel returns 0 if it does not know.
                    let pid = credentials.pid.as_raw_nonzero().get();
                    let uid = credentials.uid.as_raw();
                    received.sender = (pid > 0).then_some(Sender { pid, uid });
                }
                _ => {}
            }
        }
        Ok(received)
    }

    /// Waits until there is something to receive, even if only the end of the
    /// connection. Says whether there is.
    ///
    /// # Errors
    ///
    /// Any error of `poll(2)`.
    pub fn wait_until_readable(&self, limit: Duration) -> Result<bool> {
        Ok(!self.poll(PollFlags::IN, limit)?.is_empty())
    }

    /// Whether the peer has closed its end, without reading anything.
    ///
    /// # Errors
    ///
    /// Any error of `poll(2)`.
    pub fn peer_is_gone(&self) -> Result<bool> {
        let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        Ok(self
            .poll(PollFlags::RDHUP, Duration::ZERO)?
            .intersects(gone))
    }

    /// The subset of these events that occurs within a limit.
    fn poll(&self, events: PollFlags, limit: Duration) -> Result<PollFlags> {
        let until = Instant::now() + limit;
        let mut fds = [PollFd::new(&self.fd, events)];
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).map_err(|_| Errno::INVAL)?;
            match poll(&mut fds, Some(&timeout)) {
                Ok(_) => return Ok(fds[0].revents()),
                Err(Errno::INTR) => {}
                Err(other) => return Err(other),
            }
        }
    }
}

impl From<Socket> for OwnedFd {
    fn from(socket: Socket) -> Self {
        socket.fd
    }
}

impl std::os::fd::AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn messages_stay_whole_and_name_their_sender() {
        let (one, other) = Socket::pair().unwrap();
        other.tell_senders().unwrap();
        let file = tempfile::tempfile().unwrap();
        one.send(&[b"ab", b"c"], &[file.as_fd()]).unwrap();
        one.send(&[b"d"], &[]).unwrap();
        let mut buffer = [0; 16];
        assert_eq!(other.next_has_descriptors(), Ok(true));
        assert_eq!(other.next_has_descriptors(), Ok(true), "it is still there");
        let first = other.receive(&mut buffer).unwrap();
        assert_eq!(&buffer[..first.length], b"abc");
        assert_eq!((first.fds.len(), first.truncated), (1, false));
        assert_eq!(first.sender.unwrap().pid, std::process::id().cast_signed());
        assert_eq!(other.next_has_descriptors(), Ok(false));
        assert_eq!(other.receive(&mut buffer).unwrap().length, 1);
        drop(one);
        assert_eq!(other.next_has_descriptors(), Ok(false));
    }

    #[test]
    fn whoever_is_accepted_names_its_senders_from_the_first() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listening = Socket::listen(&path, 1).unwrap();
        let client = Socket::connect(&path).unwrap();
        client.send(&[b"before"], &[]).unwrap();
        let accepted = listening.accept().unwrap();
        let groups = accepted.peer_groups().unwrap();
        assert_eq!(groups[0], rustix::process::getegid().as_raw());
        let others = rustix::process::getgroups().unwrap();
        assert_eq!(groups.len(), 1 + others.len());
        client.send(&[b"after"], &[]).unwrap();
        for _ in 0..2 {
            let received = accepted.receive(&mut [0; 16]).unwrap();
            let pid = received.sender.map(|sender| sender.pid);
            assert_eq!(pid, Some(std::process::id().cast_signed()));
        }
    }

    #[test]
    fn a_socket_that_was_not_told_names_nobody() {
        let (one, other) = Socket::pair().unwrap();
        one.send(&[b"x"], &[]).unwrap();
        assert_eq!(other.receive(&mut [0; 4]).unwrap().sender, None);
    }

    #[test]
    fn a_message_too_long_is_marked() {
        let (one, other) = Socket::pair().unwrap();
        one.send(&[&[7; 100]], &[]).unwrap();
        let received = other.receive(&mut [0; 10]).unwrap();
        assert!(received.truncated);
    }

    #[test]
    fn a_peer_that_left_is_seen() {
        let (one, other) = Socket::pair().unwrap();
        assert_eq!(other.peer_is_gone(), Ok(false));
        drop(one);
        assert_eq!(other.peer_is_gone(), Ok(true));
        assert_eq!(other.receive(&mut [0; 4]).unwrap().length, 0);
    }

    #[test]
    fn a_reader_that_sleeps_does_not_block_for_ever() {
        let (one, _other) = Socket::pair().unwrap();
        one.set_send_timeout(Duration::from_millis(10)).unwrap();
        let error = loop {
            if let Err(errno) = one.send(&[&[0; 60_000]], &[]) {
                break errno;
            }
        };
        assert_eq!(error, Errno::AGAIN);
    }
}
