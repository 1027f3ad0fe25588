//! sd_notify(3): what a service says to whoever started it, and hands over.
//!
//! A message is lines of `NAME=value`. Usually it goes to the datagram socket in
//! `NOTIFY_SOCKET`.

use crate::{Errno, Result};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};
use std::ffi::OsStr;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

/// How long a message may wait for whoever reads them.
const PATIENCE: Duration = Duration::from_secs(1);

/// Where messages go.
#[derive(Debug)]
pub struct Notify {
    socket: OwnedFd,
}

impl Notify {
    /// The address in `NOTIFY_SOCKET`: a path, or an abstract name behind an
    /// `@`.
    ///
    /// # Errors
    ///
    /// `EINVAL` for any other address, and whatever connect(2) answers.
    pub fn at(address: &OsStr) -> Result<Self> {
        let bytes = address.as_bytes();
        let address = match bytes {
            [b'@', name @ ..] => SocketAddrUnix::new_abstract_name(name)?,
            [b'/', ..] => SocketAddrUnix::new(bytes)?,
            _ => return Err(Errno::INVAL),
        };
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        rustix::net::connect(&socket, &address)?;
        rustix::net::sockopt::set_socket_timeout(
            &socket,
            rustix::net::sockopt::Timeout::Send,
            Some(PATIENCE),
        )?;
        Ok(Self { socket })
    }

    /// Says something, and hands a descriptor over with it.
    ///
    /// # Errors
    ///
    /// `EAGAIN` if nobody reads, `ECONNREFUSED` if nobody is there.
    pub fn send(&self, text: &str, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = fd.as_slice();
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        loop {
            let text = [IoSlice::new(text.as_bytes())];
            match rustix::net::sendmsg(&self.socket, &text, &mut control, SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(other) => return Err(other),
            }
        }
    }
}
