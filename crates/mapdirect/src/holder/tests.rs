//! Against a guard that says what the test wants.

use super::hold::Hold;
use super::listener::{LATER, MISSING, SOON};
use super::shared::{Watching, watching};
use crate::guard::Guard;
use crate::map::revoke::Memory;
use crate::state::{EventFd, Integrity, OnBreach, State};
use mapdirect_proto::{
    Breach, Cause, DeviceId, Extent, ExtentState, Gate, MAX_MESSAGE, Notice, Reply, Request,
    VERSION, WatchedPin,
};
use mapdirect_sys::mmap::{self, MAP_SHARED, PROT_READ, PROT_WRITE};
use mapdirect_sys::unix::Socket;
use mapdirect_testkit::fault::{Access, load};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use std::collections::HashSet;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

/// A guard without a gate.
struct Impostor {
    directory: tempfile::TempDir,
    listener: Option<Socket>,
    /// The gate's directory.
    gate: Option<PathBuf>,
}

impl Impostor {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let gate = directory.path().join("gate");
        std::fs::create_dir(&gate).unwrap();
        for name in ["link-a", "link-b"] {
            File::create(gate.join(name)).unwrap();
        }
        let mut impostor = Self {
            directory,
            listener: None,
            gate: Some(gate),
        };
        impostor.begin();
        impostor
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    fn guard(&self) -> Guard {
        Guard::at(self.path())
    }

    fn begin(&mut self) {
        self.listener = Some(Socket::listen(&self.path(), 8).unwrap());
    }

    fn end(&mut self) {
        self.listener = None;
        std::fs::remove_file(self.path()).unwrap();
    }

    /// Lets somebody in who wants to hear of pins, and says what it has to say
    /// of them.
    fn admit(&self, notices: &[Notice]) -> (Socket, Vec<WatchedPin>) {
        let socket = self.listener.as_ref().unwrap().accept().unwrap();
        let mut buffer = [0; MAX_MESSAGE];
        socket.receive(&mut buffer).unwrap();
        let welcome = Reply::Welcome {
            version: VERSION,
            gate: Gate::Bpf,
            pid: 1,
            challenge: [0; 32],
        };
        say(&socket, &welcome);
        let named = self.answer(&socket, notices);
        (socket, named)
    }

    fn answer(&self, socket: &Socket, notices: &[Notice]) -> Vec<WatchedPin> {
        let mut buffer = [0; MAX_MESSAGE];
        let length = socket.receive(&mut buffer).unwrap().length;
        let Ok(Request::Watch(named)) = Request::decode(&buffer[..length]) else {
            panic!("it should have named its pins");
        };
        for notice in notices {
            say(socket, &Reply::Notice(notice.clone()));
        }
        let directory = self.gate.as_deref().map(open_path);
        let fds: Vec<_> = directory.iter().map(AsFd::as_fd).collect();
        let watching = Reply::Watching.encode();
        socket.send(&[&watching], &fds).unwrap();
        named
    }
}

fn open_path(path: &Path) -> OwnedFd {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).unwrap()
}

fn say(socket: &Socket, reply: &Reply) {
    socket.send(&[&reply.encode()], &[]).unwrap();
}

fn fresh() -> WatchedPin {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    WatchedPin {
        pin: NEXT.fetch_add(1, SeqCst),
        device: 2,
        inode: 3,
    }
}

/// A pin, and the connection its notices come by.
fn watched(impostor: &Impostor, on_breach: OnBreach, memory: Option<Memory>) -> (Hold, Socket) {
    std::thread::scope(|scope| {
        let guard = scope.spawn(|| impostor.admit(&[]));
        let hold = Hold::new(fresh(), &impostor.guard(), Gate::Bpf, on_breach, memory).unwrap();
        let (socket, named) = guard.join().unwrap();
        assert_eq!(named, [hold.named()]);
        (hold, socket)
    })
}

fn breach(pin: u64, time: u64) -> Breach {
    let device = DeviceId { major: 7, minor: 0 };
    let was = [Extent::new(0, Some(4096), 4096, ExtentState::Written)];
    let is = [Extent::new(0, None, 4096, ExtentState::Hole)];
    let breach = Breach::new(pin, (device, 3), "/mnt/file", time, 0..4096, (&was, &is));
    breach.caused_by(Some(Cause::new(77, "xfs_io", "swapext")))
}

fn tell(socket: &Socket, breach: Breach) {
    say(socket, &Reply::Notice(Notice::Breach(breach)));
}

fn wait_for(what: &str, is_so: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(5);
    while !is_so() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn is_readable(event: &EventFd) -> bool {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut [PollFd::new(event, PollFlags::IN)], Some(&now)) == Ok(1)
}

fn two_pages() -> (File, Memory) {
    let length = 2 * rustix::param::page_size();
    let file = tempfile::tempfile().unwrap();
    file.set_len(length as u64).unwrap();
    let prot = PROT_READ | PROT_WRITE;
    // SAFETY: no MAP_FIXED.
    let base = unsafe { mmap::map(0, length, prot, MAP_SHARED, file.as_fd(), 0) }.unwrap();
    let memory = Memory {
        base,
        length,
        stable: Some(base),
    };
    (file, memory)
}

fn unmap(memory: Memory) {
    // SAFETY: nothing refers to it.
    unsafe { mmap::unmap(memory.base, memory.length) }.unwrap();
}

#[test]
fn a_breach_revokes_the_mapping_and_is_told() {
    let impostor = Impostor::new();
    let (_file, memory) = two_pages();
    let (mut hold, socket) = watched(&impostor, OnBreach::Revoke, Some(memory));
    let event = hold.event_fd().unwrap();
    assert_eq!(
        (hold.state(), hold.integrity()),
        (State::Kept, Integrity::Intact)
    );
    assert!(!is_readable(&event));
    // Not of this pin.
    tell(&socket, breach(hold.id() + 1000, 1));
    tell(&socket, breach(hold.id(), 2));
    wait_for("it is revoked", || hold.is_revoked());
    wait_for("it is told", || is_readable(&event));
    assert!(event.clear() && !is_readable(&event));
    let state = hold.state();
    assert!(state.is_lost());
    assert!(
        state
            .why()
            .contains("bytes 0 to 4096; by pid 77 (xfs_io), swapext"),
        "{state}"
    );
    assert_eq!(load(memory.base), Access::BUS_ADRERR);
    assert_eq!(hold.unless_revoked(|| ()), None);
    // The same again when it connects again, and something new.
    tell(&socket, breach(hold.id(), 2));
    tell(&socket, breach(hold.id(), 3));
    wait_for("another is told", || event.clear());
    let Integrity::Breached { count, breaches } = hold.integrity() else {
        panic!("it is breached");
    };
    assert_eq!((count, breaches.len(), breaches[1].time), (2, 2, 3));
    let keeper = hold.let_go();
    assert!(keeper.is_some(), "the pin lasts until it is let go of");
    unmap(memory);
}

#[test]
fn who_asked_for_it_is_told_only() {
    let impostor = Impostor::new();
    let (_file, memory) = two_pages();
    let (mut hold, socket) = watched(&impostor, OnBreach::Tell, Some(memory));
    tell(&socket, breach(hold.id(), 2));
    wait_for("it is told", || !hold.integrity().is_intact());
    assert!(hold.state().is_lost() && !hold.is_revoked());
    assert_eq!(load(memory.base), Access::Went(0));
    // Who asks late sees at once that there is something to see.
    assert!(is_readable(&hold.event_fd().unwrap()));
    let _ = hold.let_go();
    unmap(memory);
}

#[test]
fn without_a_guard_it_is_unattended_and_kept_again_by_the_next() {
    let mut impostor = Impostor::new();
    let (hold, socket) = watched(&impostor, OnBreach::Tell, None);
    let event = hold.event_fd().unwrap();
    impostor.end();
    drop(socket);
    wait_for("it is unattended", || {
        matches!(hold.state(), State::Unattended { .. })
    });
    assert!(event.clear());
    assert!(hold.state().why().contains("no guard answers"));
    std::thread::sleep(2 * SOON);
    assert!(!event.clear(), "it is told once");
    impostor.begin();
    let (socket, named) = impostor.admit(&[]);
    assert_eq!(named, [hold.named()]);
    wait_for("it is kept again", || hold.state().is_kept());
    assert!(event.clear());
    // And hears of what happens from then on.
    tell(&socket, breach(hold.id(), 9));
    wait_for("it is told", || hold.state().is_lost());
}

#[test]
fn it_connects_again_when_it_is_told_to() {
    let mut impostor = Impostor::new();
    let (hold, socket) = watched(&impostor, OnBreach::Tell, None);
    assert_eq!(
        hold.reconnect().unwrap(),
        State::Kept,
        "nothing is to be done"
    );
    impostor.end();
    drop(socket);
    wait_for("it is unattended", || {
        matches!(hold.state(), State::Unattended { .. })
    });
    let still = hold.reconnect().unwrap();
    assert!(matches!(still, State::Unattended { .. }), "{still}");
    impostor.begin();
    let state = std::thread::scope(|scope| {
        let asking = scope.spawn(|| hold.reconnect().unwrap());
        let (_socket, named) = impostor.admit(&[]);
        assert_eq!(named, [hold.named()]);
        asking.join().unwrap()
    });
    assert_eq!(state, State::Kept);
}

#[test]
fn a_guard_that_closes_the_connection_is_no_guard_that_is_gone() {
    let impostor = Impostor::new();
    let (hold, socket) = watched(&impostor, OnBreach::Tell, None);
    let event = hold.event_fd().unwrap();
    drop(socket);
    let (_socket, named) = impostor.admit(&[Notice::Breach(breach(hold.id(), 1))]);
    assert_eq!(named, [hold.named()]);
    wait_for("it hears what came meanwhile", || {
        !hold.integrity().is_intact()
    });
    assert!(event.clear());
}

#[test]
fn a_guard_that_does_not_know_the_pin_has_lost_it() {
    let impostor = Impostor::new();
    let (hold, socket) = watched(&impostor, OnBreach::Tell, None);
    drop(socket);
    let lost = Notice::Lost {
        pin: hold.id(),
        why: String::from("unknown"),
    };
    let _socket = impostor.admit(&[lost]);
    wait_for("it is lost", || hold.state().is_lost());
    assert_eq!(hold.state().why(), "unknown");
}

#[test]
fn another_gate_is_no_reason_to_believe_it_lost() {
    let mut impostor = Impostor::new();
    let (hold, socket) = watched(&impostor, OnBreach::Tell, None);
    let first = impostor.gate.take().unwrap();
    drop(socket);
    let lost = || Notice::Lost {
        pin: hold.id(),
        why: String::from("unknown"),
    };
    let _socket = impostor.admit(&[lost()]);
    wait_for("it is unattended", || {
        matches!(hold.state(), State::Unattended { .. })
    });
    assert!(hold.state().why().contains("another gate"));
    // Until the gate that kept it is gone.
    std::fs::remove_dir_all(first).unwrap();
    let _socket = impostor.admit(&[lost()]);
    wait_for("it is lost", || hold.state().is_lost());
}

#[test]
fn a_gate_that_is_taken_away_without_a_guard_is_missed() {
    let mut impostor = Impostor::new();
    let (hold, socket) = watched(&impostor, OnBreach::Tell, None);
    impostor.end();
    drop(socket);
    let unattended = || matches!(hold.state(), State::Unattended { .. });
    wait_for("it is unattended", unattended);
    std::fs::remove_dir_all(impostor.gate.take().unwrap()).unwrap();
    wait_for("it is lost", || hold.state().is_lost());
    assert!(hold.state().why().contains("taken out of the kernel"));
}

#[test]
fn a_part_of_the_gate_that_is_taken_away_is_missed() {
    let mut impostor = Impostor::new();
    let (hold, socket) = watched(&impostor, OnBreach::Tell, None);
    impostor.end();
    drop(socket);
    let unattended = || matches!(hold.state(), State::Unattended { .. });
    wait_for("it is unattended", unattended);
    let gate = impostor.gate.take().unwrap();
    // What comes beside it is no loss, nor what is put back at once.
    File::create(gate.join("link-c")).unwrap();
    std::fs::rename(gate.join("link-b"), gate.join("link-d")).unwrap();
    std::thread::sleep(2 * LATER);
    std::fs::rename(gate.join("link-d"), gate.join("link-b")).unwrap();
    std::thread::sleep(MISSING + 2 * LATER);
    assert!(unattended(), "{}", hold.state());
    std::fs::remove_file(gate.join("link-b")).unwrap();
    wait_for("it is lost", || hold.state().is_lost());
    assert!(hold.state().why().contains("link-b"), "{}", hold.state());
}

#[test]
fn pins_that_come_later_are_named_on_the_same_connection() {
    let impostor = Impostor::new();
    let (first, socket) = watched(&impostor, OnBreach::Tell, None);
    let more: Vec<Hold> = (0..200)
        .map(|_| Hold::new(fresh(), &impostor.guard(), Gate::Bpf, OnBreach::Tell, None).unwrap())
        .collect();
    let mut named = HashSet::new();
    while named.len() < more.len() {
        named.extend(impostor.answer(&socket, &[]).iter().map(|pin| pin.pin));
    }
    assert!(more.iter().all(|hold| named.contains(&hold.id())));
    tell(&socket, breach(more[77].id(), 1));
    wait_for("it is told", || more[77].state().is_lost());
    assert!(first.state().is_kept() && more[76].state().is_kept());
    let pins = |watching: &Watching| watching.lock().pins.len();
    let before = pins(watching());
    drop(more);
    // Other tests have pins of their own.
    assert!(pins(watching()) < before);
}

/// A program that closes what it does not know does not deafen it.
#[test]
fn its_descriptors_are_its_own() {
    let impostor = Impostor::new();
    let (hold, socket) = watched(&impostor, OnBreach::Tell, None);
    {
        let mut shared = watching().lock();
        let number = shared.pins[&hold.id()].thread;
        // As the program sees it: the number is somebody else's now.
        let stolen = shared.threads[number].orders.take().unwrap();
        drop(stolen);
    }
    tell(&socket, breach(hold.id(), 1));
    std::thread::sleep(Duration::from_millis(50));
    // It heard all the same; whoever asks for more starts another thread.
    let known = watching().lock().pins[&hold.id()].state.clone();
    assert!(known.is_lost());
    let other = std::thread::scope(|scope| {
        let guard = scope.spawn(|| impostor.admit(&[]));
        let other = Hold::new(fresh(), &impostor.guard(), Gate::Bpf, OnBreach::Tell, None);
        guard.join().unwrap();
        other.unwrap()
    });
    assert!(other.state().is_kept());
    // So does whoever wants a descriptor of what is watched already.
    let event = hold.event_fd().unwrap();
    assert!(event.clear() && hold.state().is_lost());
}

#[test]
fn nobody_to_hear_is_no_error() {
    let mut impostor = Impostor::new();
    impostor.end();
    let guard = impostor.guard();
    let bpf = Hold::new(fresh(), &guard, Gate::Bpf, OnBreach::Tell, None).unwrap();
    assert!(matches!(bpf.state(), State::Unattended { .. }));
    let fanotify = Hold::new(fresh(), &guard, Gate::Fanotify, OnBreach::Tell, None).unwrap();
    wait_for("it is lost", || fanotify.state().is_lost());
}
