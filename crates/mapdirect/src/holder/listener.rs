//! Hears what becomes of the pins of this process.
//!
//! A thread for each guard listens on a connection of its own, started with the
//! first pin. It has a table of descriptors of its own, so that a program that
//! closes descriptors it does not know (`closefrom`) does not deafen it, and it
//! takes no signals. It cannot be the thread that hears where frozen memory
//! goes: taking a mapping away waits for that one.
//!
//! When the connection ends the thread connects again, names the pins of this
//! process, and hears what the guard makes of them: one that was granted by an
//! earlier guard and taken over is kept; one that is not known is lost.
//!
//! A child of fork(2) has its mappings, but no thread and none of what is known
//! here, since somebody may have been changing it when the child was made. It
//! begins anew with the first pin it asks about: from then on it is told, and
//! its mapping revoked, like its parent's.

use super::shared::{Entry, Watching, identity};
use crate::state::State;
use mapdirect_proto::request::MAX_WATCHED;
use mapdirect_proto::{Gate, MAX_MESSAGE, Notice, Reply, Request, VERSION, WatchedPin, settle};
use mapdirect_sys::names::path_in_line;
use mapdirect_sys::unix::Socket;
use mapdirect_sys::{Errno, descriptors};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Breaches kept with each pin: the first ones.
pub(super) const KEPT: usize = 16;
/// Pins named in one request, so that the answers fit into the socket.
const AT_ONCE: usize = 64;
/// How long a guard may take to answer.
pub(super) const ANSWER: Duration = Duration::from_secs(5);
/// How often to look for a guard when it has just gone, and how many times.
pub(super) const SOON: Duration = Duration::from_millis(20);
const SOON_TIMES: u32 = 10;
/// How often afterwards.
pub(super) const LATER: Duration = Duration::from_millis(200);
/// How long something may be missing in the gate's directory: a guard that is
/// just starting may put it back.
pub(super) const MISSING: Duration = Duration::from_secs(1);

/// How long to wait for more pins before the guard is told of new ones. A pin
/// that is over by then costs the guard nothing. What happens to a pin meanwhile
/// is told when the guard hears of it.
const TOGETHER: Duration = Duration::from_millis(1);

/// The order to connect again.
pub(super) const RECONNECT: [u8; 1] = [1];
/// The order to look for new pins.
pub(super) const NEW_PINS: [u8; 1] = [0];

const _: () = assert!(AT_ONCE <= MAX_WATCHED);

/// Why nothing is heard.
enum Silence {
    /// Nobody listens.
    NoGuard(String),
    /// Somebody does, and does not answer.
    Busy(String),
    /// Somebody did, and was killed meanwhile.
    Cut(String),
}

impl Silence {
    /// Nothing is heard by a connection that was made.
    fn after(errno: Errno, why: String) -> Self {
        match errno {
            Errno::CONNRESET | Errno::PIPE => Self::Cut(why),
            _ => Self::Busy(why),
        }
    }
}

/// A connection that notices come by.
struct Link {
    socket: Socket,
    /// The guard's process, in its own words.
    pid: i32,
}

impl Link {
    fn open(path: &std::path::Path) -> std::result::Result<Self, Silence> {
        let path_name = path_in_line(path);
        let socket = Socket::connect(path).map_err(|errno| {
            Silence::NoGuard(format!("no guard answers at {path_name}: {errno}"))
        })?;
        let gone = |errno: Errno| {
            let why = format!("the guard at {path_name} does not answer: {errno}");
            Silence::after(errno, why)
        };
        socket.set_receive_timeout(Some(ANSWER)).map_err(gone)?;
        socket.set_send_timeout(ANSWER).map_err(gone)?;
        let hello = Request::Hello { version: VERSION };
        socket.send(&[&hello.encode()], &[]).map_err(gone)?;
        match hear(&socket).map_err(gone)? {
            (Some(Reply::Welcome { version, pid, .. }), _) => match settle(version) {
                Ok(_) => Ok(Self { socket, pid }),
                Err(unknown) => Err(Silence::Busy(format!(
                    "the guard at {path_name}: {unknown}"
                ))),
            },
            (Some(Reply::Refused(refusal)), _) => Err(Silence::Busy(refusal.obstacle)),
            _ => Err(gone(Errno::PROTO)),
        }
    }

    fn name(&self, pins: &[WatchedPin]) -> std::result::Result<(), Errno> {
        let request = Request::Watch(pins.to_vec());
        self.socket.send(&[&request.encode()], &[])
    }
}

/// The next thing that is said, or nothing if it is not understood.
fn hear(socket: &Socket) -> std::result::Result<(Option<Reply>, Option<OwnedFd>), Errno> {
    let mut buffer = vec![0; MAX_MESSAGE];
    let mut received = socket.receive(&mut buffer)?;
    if received.length == 0 {
        return Err(Errno::PIPE);
    }
    let reply = Reply::decode(&buffer[..received.length]).ok();
    Ok((reply.filter(|_| !received.truncated), received.fds.pop()))
}

/// Where the gate is in the kernel, and what belongs to it.
struct Directory {
    fd: OwnedFd,
    identity: (u64, u64),
    changed: (i64, u64),
    /// What was in it when a guard was there, if this process may know.
    names: Option<BTreeSet<CString>>,
    missing_since: Option<Instant>,
}

impl Directory {
    fn new(fd: OwnedFd) -> Option<Self> {
        let identity = identity(fd.as_fd())?;
        let changed = changed(fd.as_fd())?;
        let names = names(fd.as_fd());
        Some(Self {
            fd,
            identity,
            changed,
            names,
            missing_since: None,
        })
    }

    fn is_there(&self) -> bool {
        rustix::fs::fstat(&self.fd).is_ok_and(|stat| stat.st_nlink > 0)
    }

    /// Why the gate in it does not keep pins any more, if that can be seen.
    fn fault(&mut self) -> Option<String> {
        if !self.is_there() {
            return Some(String::from("the gate was taken out of the kernel"));
        }
        let before = self.names.as_ref()?;
        if changed(self.fd.as_fd()) == Some(self.changed) {
            return None;
        }
        let now = names(self.fd.as_fd())?;
        let Some(name) = before.difference(&now).next() else {
            self.missing_since = None;
            return None;
        };
        let since = *self.missing_since.get_or_insert_with(Instant::now);
        (since.elapsed() >= MISSING).then(|| {
            format!(
                "a part of the gate was taken out of the kernel: {}",
                name.to_string_lossy()
            )
        })
    }
}

fn changed(directory: BorrowedFd<'_>) -> Option<(i64, u64)> {
    let stat = rustix::fs::fstat(directory).ok()?;
    Some((stat.st_mtime, stat.st_mtime_nsec))
}

fn names(directory: BorrowedFd<'_>) -> Option<BTreeSet<CString>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let open = rustix::fs::openat(directory, ".", flags, Mode::empty()).ok()?;
    let entries = rustix::fs::Dir::new(open).ok()?;
    entries
        .map(|entry| entry.map(|entry| entry.file_name().to_owned()).ok())
        .collect()
}

/// The thread.
struct Listener {
    watching: &'static Watching,
    number: usize,
    path: PathBuf,
    orders: Socket,
    /// The program has not closed its end.
    has_orders: bool,
    link: Option<Link>,
    /// The guard's process (`pidfd_open(2)`), where the kernel tells it.
    guard: Option<OwnedFd>,
    directory: Option<Directory>,
    /// Readable for the program when something changes.
    events: HashMap<u64, OwnedFd>,
    /// How often no guard was found since there was one.
    tries: u32,
}

pub(super) fn serve(watching: &'static Watching, number: usize, path: PathBuf, orders: Socket) {
    // Without a table of its own, in a sandbox that allows none, the thread can
    // be deafened by a program that closes its descriptors, and then connects
    // again.
    // SAFETY: the thread uses the socket and what it opens or receives from
    // here on, all of which it keeps to itself.
    let _ = unsafe { descriptors::unshare(orders.as_fd()) };
    let mut listener = Listener {
        watching,
        number,
        path,
        orders,
        has_orders: true,
        link: None,
        guard: None,
        directory: None,
        events: HashMap::new(),
        tries: 0,
    };
    listener.connect_or_tell();
    // Whoever asked may be gone.
    let _ = listener.orders.send(&[&[0]], &[]);
    loop {
        listener.step();
    }
}

impl Listener {
    fn step(&mut self) {
        let timeout = match (&self.link, self.has_live_pins()) {
            (Some(_), _) | (None, false) => None,
            _ if self.tries < SOON_TIMES => Some(SOON),
            _ => Some(LATER),
        };
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let (ordered, told) = {
            let mut fds = Vec::with_capacity(2);
            if self.has_orders {
                fds.push(PollFd::new(&self.orders, PollFlags::IN));
            }
            if let Some(link) = &self.link {
                fds.push(PollFd::new(&link.socket, PollFlags::IN));
            }
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                // No memory for a moment.
                Err(_) => std::thread::sleep(SOON),
            }
            let is_ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
            let ordered = self.has_orders && fds.first().is_some_and(is_ready);
            let told = self.link.is_some() && fds.last().is_some_and(is_ready);
            (ordered, told)
        };
        if ordered {
            self.take_order();
        }
        if told {
            self.listen();
        }
        if self.link.is_none() {
            self.leave_asleep();
            if self.has_live_pins() {
                self.connect_or_tell();
            }
        }
    }

    /// No guard is heard any more. A pin that sleeps is not taken up again before
    /// one is: nobody would tell what becomes of it.
    fn leave_asleep(&self) {
        self.bring(|entry| {
            let may_be_taken_up = entry.asleep && entry.state.is_kept();
            may_be_taken_up.then(|| State::Unattended {
                why: String::from("the guard went away while the pin was over"),
            })
        });
    }

    fn has_live_pins(&self) -> bool {
        let shared = self.watching.lock();
        let mut own = shared
            .pins
            .values()
            .filter(|entry| entry.thread == self.number);
        own.any(|entry| !entry.state.is_lost() && !entry.asleep)
    }

    /// Something to be told to the program by, or a word that there are new
    /// pins.
    fn take_order(&mut self) {
        let mut order = [0; 8];
        match self.orders.receive(&mut order) {
            Ok(mut received) if received.length > 0 => {
                if received.length == 8
                    && let Some(event) = received.fds.pop()
                {
                    self.keep_event(u64::from_ne_bytes(order), event);
                }
                match order.get(..received.length) {
                    Some(order) if order == RECONNECT => self.link = None,
                    Some(order) if order == NEW_PINS => std::thread::sleep(TOGETHER),
                    _ => {}
                }
            }
            _ => self.has_orders = false,
        }
        let mut new = {
            let mut shared = self.watching.lock();
            let thread = shared.threads.get_mut(self.number);
            thread
                .map(|thread| std::mem::take(&mut thread.new))
                .unwrap_or_default()
        };
        // What was let go of at once need not be asked about.
        new.retain(|pin| self.watching.lock().pins.contains_key(&pin.pin));
        let Some(link) = &self.link else {
            // It names them all when there is one.
            return;
        };
        let named = new.chunks(AT_ONCE).try_for_each(|pins| link.name(pins));
        if named.is_err() {
            self.link = None;
        }
    }

    fn keep_event(&mut self, pin: u64, event: OwnedFd) {
        let shared = self.watching.lock();
        self.events.retain(|pin, _| shared.pins.contains_key(pin));
        // It may have changed while this was on its way.
        let entry = shared.pins.get(&pin);
        if entry.is_some_and(|entry| !entry.state.is_kept() || !entry.renames.is_empty()) {
            signal_event(&event);
        }
        drop(shared);
        self.events.insert(pin, event);
    }

    /// Hears one thing that the guard says.
    fn listen(&mut self) {
        let Some(link) = &self.link else {
            return;
        };
        match hear(&link.socket) {
            Ok((Some(Reply::Notice(notice)), _)) => self.take(notice),
            Ok((Some(Reply::Watching), Some(fd))) => self.keep_directory(fd),
            Ok((Some(_), _)) => {}
            Ok((None, _)) | Err(_) => self.link = None,
        }
    }

    fn keep_directory(&mut self, fd: OwnedFd) {
        let known = self
            .directory
            .as_ref()
            .map(|known| (known.identity, known.changed));
        let now = identity(fd.as_fd()).zip(changed(fd.as_fd()));
        if known.is_none() || known != now {
            self.directory = Directory::new(fd);
        }
    }

    fn take(&mut self, notice: Notice) {
        let pin = notice.pin();
        let is_news = {
            let mut shared = self.watching.lock();
            match shared.pins.get_mut(&pin) {
                Some(entry) if entry.thread == self.number => match notice {
                    Notice::Breach(breach) => entry.breached(breach),
                    Notice::Unattended { why, .. } => entry.become_(State::Unattended { why }),
                    Notice::Lost { why, .. } => entry.become_(State::Lost { why }),
                    Notice::Renamed { how, .. } => entry.renamed(how),
                    _ => false,
                },
                _ => false,
            }
        };
        if is_news {
            self.signal(pin);
        }
    }

    fn signal(&self, pin: u64) {
        if let Some(event) = self.events.get(&pin) {
            signal_event(event);
        }
    }

    /// Brings the pins of one gate into a state.
    fn bring(&self, wanted: impl Fn(&Entry) -> Option<State>) {
        let mut changed = Vec::new();
        let mut shared = self.watching.lock();
        for (pin, entry) in &mut shared.pins {
            if entry.thread == self.number
                && let Some(state) = wanted(entry)
                && entry.become_(state)
            {
                changed.push(*pin);
            }
        }
        drop(shared);
        changed.iter().for_each(|pin| self.signal(*pin));
    }

    fn connect_or_tell(&mut self) {
        let mut shared = self.watching.lock();
        if let Some(thread) = shared.threads.get_mut(self.number) {
            thread.begun += 1;
        }
        drop(shared);
        let mut tried = self.connect();
        if let Err(Silence::Cut(_)) = tried {
            // A guard is killed together with its supervisor, or without: whether
            // anybody listens yet shows at once.
            tried = self.connect();
        }
        match tried {
            Ok(()) => self.tries = 0,
            Err(silence) => {
                self.link = None;
                self.tries = self.tries.saturating_add(1);
                self.tell_without_guard(&silence);
            }
        }
        let mut shared = self.watching.lock();
        if let Some(thread) = shared.threads.get_mut(self.number) {
            thread.done = thread.begun;
        }
        drop(shared);
        self.watching.tried.notify_all();
    }

    /// What becomes of pins while no guard answers.
    fn tell_without_guard(&mut self, silence: &Silence) {
        let (Silence::NoGuard(why) | Silence::Busy(why) | Silence::Cut(why)) = silence;
        let is_gone = match (silence, &self.guard) {
            // Somebody listens. A guard that was killed may have been in the middle of
            // its answer, and another one is about to come.
            (Silence::Busy(_) | Silence::Cut(_), _) => false,
            (Silence::NoGuard(_), Some(guard)) => has_ended(guard),
            (Silence::NoGuard(_), None) => true,
        };
        let fault = self.directory.as_mut().and_then(Directory::fault);
        self.bring(|entry| {
            let unattended = || State::Unattended {
                why: format!("{why}; the kernel goes on refusing"),
            };
            Some(match (entry.gate, &fault) {
                (Gate::Bpf, Some(fault)) => State::Lost { why: fault.clone() },
                (Gate::Bpf, None) => unattended(),
                _ if is_gone => State::Lost {
                    why: String::from("the guard is gone, and nobody refuses any more"),
                },
                _ => State::Unattended { why: why.clone() },
            })
        });
    }

    /// Connects, names all pins, and hears what the guard makes of them.
    fn connect(&mut self) -> std::result::Result<(), Silence> {
        let link = Link::open(&self.path)?;
        let pins: Vec<WatchedPin> = {
            let mut shared = self.watching.lock();
            if let Some(thread) = shared.threads.get_mut(self.number) {
                thread.new.clear();
            }
            let own = shared
                .pins
                .values()
                .filter(|entry| entry.thread == self.number && !entry.state.is_lost());
            own.map(|entry| entry.named).collect()
        };
        let failed = |errno| Silence::after(errno, format!("the guard does not answer: {errno}"));
        let mut notices = Vec::new();
        let mut directory = None;
        for some in pins.chunks(AT_ONCE) {
            link.name(some).map_err(failed)?;
            loop {
                match hear(&link.socket).map_err(failed)? {
                    (Some(Reply::Notice(notice)), _) => notices.push(notice),
                    (Some(Reply::Watching), fd) => {
                        directory = fd;
                        break;
                    }
                    (Some(Reply::Refused(refusal)), _) => {
                        return Err(Silence::Busy(refusal.obstacle));
                    }
                    _ => return Err(failed(Errno::PROTO)),
                }
            }
        }
        link.socket.set_receive_timeout(None).map_err(failed)?;
        let found = directory.as_ref().map(AsFd::as_fd).and_then(identity);
        // A guard with another gate, or none in the kernel, knows nothing of
        // pins that the kernel keeps.
        let is_other_gate = self
            .directory
            .as_ref()
            .is_some_and(|known| Some(known.identity) != found && known.is_there());
        let answered: HashSet<u64> = pins.iter().map(|pin| pin.pin).collect();
        let refused: HashSet<u64> = notices.iter().map(Notice::pin).collect();
        if is_other_gate {
            let no_verdict = |entry: &Entry| entry.gate == Gate::Bpf;
            notices.retain(|notice| {
                let shared = self.watching.lock();
                !shared.pins.get(&notice.pin()).is_some_and(no_verdict)
            });
            notices.into_iter().for_each(|notice| self.take(notice));
            return Err(Silence::Busy(format!(
                "the guard at {} keeps another gate",
                path_in_line(&self.path)
            )));
        }
        if let Some(directory) = directory {
            self.keep_directory(directory);
        }
        // Somebody else may have made the socket at which it listens: systemd, or an
        // earlier guard.
        let is_its_own = link.socket.peer().is_ok_and(|peer| peer.pid == link.pid);
        self.guard = is_its_own.then(|| link.socket.peer_pidfd().ok()).flatten();
        self.link = Some(link);
        self.bring(|entry| {
            let pin = &entry.named.pin;
            (answered.contains(pin) && !refused.contains(pin)).then_some(State::Kept)
        });
        notices.into_iter().for_each(|notice| self.take(notice));
        Ok(())
    }
}

/// Whether a guard's process has ended. It closes its connections a moment
/// before.
fn has_ended(guard: &OwnedFd) -> bool {
    let patience = Timespec {
        tv_sec: 0,
        tv_nsec: 100_000_000,
    };
    let mut fds = [PollFd::new(guard, PollFlags::IN)];
    poll(&mut fds, Some(&patience)) != Ok(0)
}

fn signal_event(event: &OwnedFd) {
    // It fails only when the counter is full: then it is readable.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}
