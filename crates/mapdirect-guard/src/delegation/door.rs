//! Who asks without the capability, and whether that process could open the file
//! by itself.
//!
//! A descriptor proves nothing: it may have been inherited, or passed by somebody
//! with more rights, or opened before the file was made private. So a thread of
//! the guard takes on the user, the groups and the lack of capabilities of the
//! caller, and asks the kernel whether *it* may use the file, at the time of the
//! request. Nothing is opened for that, so nobody is made to wait.
//!
//! The caller is who the kernel says: the process that connected, with the same
//! user then and now and in every respect. All of this runs in a thread that has
//! no descriptors but two sockets (see [`session`](crate::session)). A file comes
//! out of that thread only when it is known to be one of XFS or ext4, whose close
//! waits for no other program.

use super::claims::Right;
use super::{Account, Policy, Rule, place};
use crate::grant::{refusal, system};
use crate::table::Pin;
use crate::{Errno, Guard};
use mapdirect_model::facts::Filesystem;
use mapdirect_proto::{Reason, Refusal, Request};
use mapdirect_sys::faccessat2::{self, Access};
use mapdirect_sys::unix::{Sender, Socket};
use mapdirect_sys::{pidfd, proc, proc_status, setfsuid};
use rustix::fs::{FileType, OFlags};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

/// The process that connected.
#[derive(Debug)]
pub(crate) struct Peer {
    /// Its number, and its user at that time.
    pub(crate) sender: Sender,
    /// Its start time. `None` if it was gone before this could be read.
    pub(crate) start: Option<u64>,
    /// Its pidfd, where the kernel has one (Linux 6.5).
    pidfd: Option<OwnedFd>,
}

impl Peer {
    pub(crate) fn of(socket: &Socket) -> Result<Self, Errno> {
        let sender = socket.peer()?;
        // In this order: a pidfd that is alive afterwards vouches for the number
        // before.
        let pidfd = socket.peer_pidfd();
        let start = proc::start_time(sender.pid).ok();
        let is_gone = matches!(pidfd, Err(Errno::SRCH));
        Ok(Self {
            sender,
            start: start.filter(|_| !is_gone),
            pidfd: pidfd.ok(),
        })
    }

    pub(crate) fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        self.pidfd.as_ref().map(AsFd::as_fd)
    }

    /// Whether the number still names the process that connected. Whatever was
    /// read by this number before was then about that process.
    pub(crate) fn is_there(&self) -> bool {
        let has_ended = self
            .pidfd
            .as_ref()
            .is_some_and(|fd| pidfd::has_ended(fd.as_fd()));
        !has_ended && self.start.is_some() && proc::start_time(self.sender.pid).ok() == self.start
    }
}

/// Somebody who asks without the capability, as the host sees them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    pub(crate) uid: u32,
    gid: u32,
    /// The supplementary groups.
    others: Vec<u32>,
}

impl Caller {
    /// Who sends a message. The kernel says the user at the time of sending;
    /// the process must have no other user in any respect, neither then, nor when
    /// it connected, nor now: a program with more rights than its caller may have
    /// been started in between.
    pub(crate) fn of(peer: &Peer, sender: Sender) -> Result<Self, Refusal> {
        let ids = proc_status::ids(sender.pid);
        let ids = ids.map_err(|errno| system("reading who asks (/proc)", errno))?;
        let (Some(uid), Some(gid)) = (ids.only_user(), ids.only_group()) else {
            return Err(not_allowed(
                format!(
                    "process {} has more than one user or group at a time (users {:?}, groups \
                     {:?})",
                    sender.pid, ids.users, ids.groups
                ),
                "ask from a program that is neither set-user-ID nor set-group-ID",
            ));
        };
        if uid != sender.uid || uid != peer.sender.uid || !peer.is_there() {
            return Err(not_allowed(
                format!(
                    "process {} is of user {uid} now, and was of user {} when it connected",
                    sender.pid, peer.sender.uid
                ),
                "connect again after a change of user",
            ));
        }
        Ok(Self {
            uid,
            gid,
            others: ids.others,
        })
    }

    fn groups(&self) -> Vec<u32> {
        let mut groups = vec![self.gid];
        groups.extend(&self.others);
        groups
    }
}

/// What allows a request of somebody without the capability.
#[derive(Clone, Debug)]
pub(crate) struct Admission {
    pub(crate) uid: u32,
    pub(super) rights: Vec<Right>,
    /// Whether the descriptor can write.
    pub(crate) writes: bool,
}

fn not_allowed(obstacle: impl Into<String>, mend: impl Into<String>) -> Refusal {
    refusal(Reason::Policy, Errno::ACCESS, obstacle, mend)
}

/// The refusal for somebody without the capability whom nothing names.
pub(crate) fn not_capable() -> Refusal {
    refusal(
        Reason::NotCapable,
        Errno::ACCESS,
        "the caller lacks CAP_LINUX_IMMUTABLE in the initial user namespace",
        "run it as root, or give it the capability: setcap cap_linux_immutable+ep PROGRAM, or \
         have the guard's policy name it: mapdirect-policy(5)",
    )
}

/// Requires that a file is a regular one of a filesystem on this machine.
pub(super) fn require_local_file(file: BorrowedFd<'_>) -> Result<(), Refusal> {
    let kind = Filesystem::of(file).map_err(|errno| system("fstatfs", errno))?;
    if !matches!(kind, Filesystem::Xfs | Filesystem::Ext4) {
        return Err(refusal(
            Reason::Filesystem,
            Errno::OPNOTSUPP,
            "its filesystem is neither XFS nor ext4",
            "put the file on one of these",
        ));
    }
    let stat = rustix::fs::fstat(file).map_err(|errno| system("fstat", errno))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(refusal(
            Reason::FileType,
            Errno::OPNOTSUPP,
            "it is not a regular file",
            "pin a regular file",
        ));
    }
    Ok(())
}

/// Finds out what allows a request, and whether its sender could open the file.
/// The calling thread has no rights afterwards, and must end soon.
///
/// # Errors
///
/// Why it is not allowed.
pub(crate) fn admit(
    guard: &Guard,
    peer: &Peer,
    sender: Option<Sender>,
    request: &Request,
    file: BorrowedFd<'_>,
) -> Result<Admission, Refusal> {
    let sender = sender.filter(|sender| sender.pid > 0 && sender.pid == peer.sender.pid);
    let sender = sender.ok_or_else(|| {
        refusal(
            Reason::NotCapable,
            Errno::ACCESS,
            "another process speaks on the connection than the one that connected",
            "connect again in every process",
        )
    })?;
    let caller = Caller::of(peer, sender)?;
    let groups = caller.groups();
    match request {
        // The pins themselves say that they were allowed.
        Request::Allocate(request)
            if has_pin(guard, |pin| pin.id == request.pin && pin.uid == caller.uid) => {}
        Request::Yield(_)
            if has_pin(guard, |pin| pin.pid == sender.pid && pin.uid == caller.uid) => {}
        Request::Allocate(_) | Request::Yield(_) => return Err(not_capable()),
        _ if guard.delegation.names(caller.uid, &groups) => {}
        _ => return Err(not_capable()),
    }
    require_local_file(file)?;
    let access = access_of(request, file)?;
    let rights = match request {
        Request::Allocate(_) | Request::Yield(_) => Vec::new(),
        _ => rights(guard, &caller, &groups, access, file)?,
    };
    setfsuid::become_for_good(caller.uid, caller.gid, &caller.others).map_err(|errno| {
        refusal(
            Reason::System,
            errno,
            format!(
                "the guard cannot take on the rights of user {}: {errno}",
                caller.uid
            ),
            "give its unit CAP_SETUID and CAP_SETGID",
        )
    })?;
    faccessat2::may(file, access).map_err(|errno| {
        not_allowed(
            format!(
                "user {} may not open the file for {} now ({errno}), however it came by a \
                 descriptor",
                caller.uid,
                match access {
                    Access::Read => "reading",
                    Access::ReadWrite => "reading and writing",
                }
            ),
            "change the file's mode or access control list, or ask as a user who may",
        )
    })?;
    if !peer.is_there() {
        return Err(crate::grant::gone());
    }
    Ok(Admission {
        uid: caller.uid,
        rights,
        writes: access == Access::ReadWrite,
    })
}

/// Whether there is such a pin by the policy.
fn has_pin(guard: &Guard, is_such: impl Fn(&Pin) -> bool) -> bool {
    guard.table.all().iter().any(|watched| {
        let pins = watched.pins.load();
        pins.iter()
            .any(|pin| pin.delegated().is_some() && is_such(pin))
    })
}

/// What the caller must be able to do with the file. The guard opens the file
/// again in the way in which the descriptor was opened.
fn access_of(request: &Request, file: BorrowedFd<'_>) -> Result<Access, Refusal> {
    if !matches!(request, Request::Pin(_)) {
        return Ok(Access::ReadWrite);
    }
    let flags = rustix::fs::fcntl_getfl(file).map_err(|errno| system("F_GETFL", errno))?;
    Ok(match flags & OFlags::ACCMODE {
        OFlags::RDONLY => Access::Read,
        _ => Access::ReadWrite,
    })
}

fn rights(
    guard: &Guard,
    caller: &Caller,
    groups: &[u32],
    access: Access,
    file: BorrowedFd<'_>,
) -> Result<Vec<Right>, Refusal> {
    let mut rights = guard.delegation.arms.rights(file, caller.uid, groups);
    let policy = guard.delegation.policy();
    let named: Vec<&Arc<Rule>> = policy
        .rules()
        .iter()
        .filter(|rule| rule.names(caller.uid, groups))
        .collect();
    if named.is_empty() {
        return if rights.is_empty() {
            Err(not_allowed(
                format!(
                    "no rule names user {}, and the file is not armed for it",
                    caller.uid
                ),
                "ask root: mapdirect arm, or mapdirect-policy(5)",
            ))
        } else {
            Ok(rights)
        };
    }
    let judged =
        place::of(file, caller.uid).and_then(|path| covering(&named, &path, access, caller.uid));
    match judged {
        Ok(rules) => rights.extend(rules.iter().map(|rule| Right::rule(rule))),
        Err(_) if !rights.is_empty() => {}
        Err(why) => {
            return Err(not_allowed(
                why,
                "see what is allowed: mapdirect policy check --as USER FILE",
            ));
        }
    }
    Ok(rights)
}

/// The rules of a policy by which a user may pin a file, and whether that user may
/// open it. The guard must ask the same when the user does. Descriptors must be
/// those of the calling thread.
///
/// # Errors
///
/// Why there are none, for a person.
pub fn would_allow(
    policy: &Policy,
    account: &Account,
    file: BorrowedFd<'_>,
    writes: bool,
) -> Result<Vec<Arc<Rule>>, String> {
    let named: Vec<_> = policy
        .rules()
        .iter()
        .filter(|rule| rule.names(account.uid, &account.groups))
        .collect();
    if named.is_empty() {
        return Err(format!("no rule names user {}", account.uid));
    }
    require_local_file(file).map_err(|refusal| refusal.obstacle)?;
    let access = if writes {
        Access::ReadWrite
    } else {
        Access::Read
    };
    let path = place::of(file, account.uid)?;
    let rules = covering(&named, &path, access, account.uid)?;
    let rules = rules.into_iter().map(Arc::clone).collect();
    let account = account.clone();
    // A thread that has become somebody else stays so.
    let may = std::thread::scope(|scope| {
        let asks = scope.spawn(move || {
            let (gid, others) = account.groups.split_first().unwrap_or((&account.uid, &[]));
            setfsuid::become_for_good(account.uid, *gid, others)?;
            faccessat2::may(file, access)
        });
        asks.join().unwrap_or(Err(Errno::IO))
    });
    match may {
        Ok(()) => Ok(rules),
        Err(Errno::PERM) if !rustix::process::geteuid().is_root() => Ok(rules),
        Err(errno) => Err(format!(
            "the policy allows it, but the user may not open the file so ({errno})"
        )),
    }
}

/// The rules that allow a file at a path to be pinned.
///
/// # Errors
///
/// Why there are none, for a person.
pub(super) fn covering<'rules>(
    named: &[&'rules Arc<Rule>],
    path: &Path,
    access: Access,
    uid: u32,
) -> Result<Vec<&'rules Arc<Rule>>, String> {
    let shown = proc::printable(&path.to_string_lossy());
    let covering: Vec<_> = named.iter().filter(|rule| rule.covers(path)).collect();
    if covering.is_empty() {
        return Err(format!("no rule for user {uid} covers {shown}"));
    }
    let allowing: Vec<_> = covering
        .iter()
        .filter(|rule| rule.writes || access == Access::Read)
        .map(|rule| **rule)
        .collect();
    if allowing.is_empty() {
        let names: Vec<_> = covering.iter().map(|rule| &*rule.name).collect();
        return Err(format!(
            "the rules for user {uid} that cover {shown} ({}) are for descriptors that cannot \
             write",
            names.join(", ")
        ));
    }
    Ok(allowing)
}
