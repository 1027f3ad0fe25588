//! Holders and guards of different versions, over real sockets: they speak the
//! older version of the two, or say which versions they speak.
//!
//! A guard of another version is this guard behind a relay that changes what
//! it says of itself. The relay is a thread of the test, so that the guard
//! still hears the process that proved.

use crate::world::{World, is_pinned, map, open, wait_until_free, written};
use libtest_mimic::Trial;
use mapdirect::Guard;
use mapdirect_proto::{
    Flags, Gate, Granted, MAX_MESSAGE, OLDEST_VERSION, PinRequest, Reply, Request, VERSION,
    VERSION_WITH_BARRIER, VERSION_WITH_FAMILIES, VERSION_WITH_POLICY,
};
use mapdirect_sys::unix::Socket;
use mapdirect_sys::{Errno, memfd};
use mapdirect_testkit::Kind;
use mapdirect_testkit::process::ScratchDirectory;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub fn trials(world: &World) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (name, run) in [
        ("older-holder", older_holder as fn(&World)),
        ("newer-holder", newer_holder),
        ("unknown-holder", unknown_holder),
        ("older-guard", older_guard),
        ("guard-without-strengths", guard_without_strengths),
        ("newer-guard", newer_guard),
        ("unknown-guard", unknown_guard),
    ] {
        trials.push(world.trial(format!("versions::{name}"), run));
    }
    trials
}

fn connect(path: &Path) -> Socket {
    let socket = Socket::connect(path).unwrap();
    let limit = Some(Duration::from_secs(20));
    socket.set_receive_timeout(limit).unwrap();
    socket
}

fn hear(socket: &Socket) -> Option<(Reply, Vec<OwnedFd>)> {
    let mut buffer = vec![0; MAX_MESSAGE];
    let received = socket.receive(&mut buffer).ok()?;
    if received.length == 0 {
        return None;
    }
    let reply = Reply::decode(&buffer[..received.length]).unwrap();
    Some((reply, received.fds))
}

fn ask(
    socket: &Socket,
    request: &Request,
    fds: &[BorrowedFd<'_>],
) -> Option<(Reply, Vec<OwnedFd>)> {
    socket.send(&[&request.encode()], fds).ok()?;
    hear(socket)
}

/// A pin that was asked for word by word.
pub(crate) struct Asked {
    pub(crate) socket: Socket,
    pub(crate) granted: Granted,
    /// The descriptors that came with the answer; the first is the pin's.
    pub(crate) fds: Vec<OwnedFd>,
    /// What the guard gave in place of the descriptor that was sent, or that
    /// itself.
    pub(crate) file: OwnedFd,
}

/// Pins the first 65536 bytes of a file, word by word as a holder does who
/// speaks `version`.
pub(crate) fn ask_for_pin(guard: &Path, version: u32, file: OwnedFd, flags: Flags) -> Asked {
    let socket = connect(guard);
    let hello = Request::Hello { version };
    let Some((
        Reply::Welcome {
            version: theirs,
            challenge,
            ..
        },
        _,
    )) = ask(&socket, &hello, &[])
    else {
        panic!("no welcome");
    };
    assert_eq!(theirs, VERSION, "a guard says its newest version");
    let proof = memfd::prove_immutable_capability(
        &challenge,
        if version < VERSION_WITH_POLICY {
            memfd::By::StartTime
        } else {
            memfd::By::Namespace
        },
    )
    .unwrap();
    let proven = ask(&socket, &Request::Prove, &[proof.as_fd()]);
    assert!(matches!(proven, Some((Reply::Done, _))), "{proven:?}");
    let request = Request::Pin(PinRequest {
        offset: 0,
        length: 65536,
        flags,
        patience_ms: 1000,
    });
    let mut answer = ask(&socket, &request, &[file.as_fd()]).unwrap();
    let mut file = file;
    while matches!(answer.0, Reply::Swap) {
        file = answer.1.pop().unwrap();
        answer = ask(&socket, &Request::Swapped, &[]).unwrap();
    }
    let (Reply::Granted(granted), fds) = answer else {
        panic!("{answer:?}");
    };
    Asked {
        socket,
        granted,
        fds,
        file,
    }
}

/// Pins a file as a holder does who speaks `version`.
fn converse(world: &World, version: u32) {
    let (disk, guard) = (world.disk(Kind::XFS), world.guard());
    let path = written(&disk, &format!("versions-holder-{version}"), 65536);
    let file = open(&path).into();
    let Asked {
        socket,
        granted,
        fds: pinned,
        file,
    } = ask_for_pin(guard.socket(), version, file, Flags::NONE);
    let hello = Request::Hello { version };
    assert_eq!(granted.range, 0..65536);
    let settled = version.min(VERSION);
    if settled >= VERSION_WITH_BARRIER {
        let answer = ask(&socket, &Request::Barrier, &[]);
        assert!(matches!(answer, Some((Reply::Done, _))), "{answer:?}");
    } else {
        // How version 1 says it.
        let answer = ask(&socket, &hello, &[]);
        let welcomed = matches!(answer, Some((Reply::Welcome { .. }, _)));
        assert!(welcomed, "{answer:?}");
    }
    assert!(is_pinned(&path));
    drop((pinned, file));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

fn older_holder(world: &World) {
    const { assert!(OLDEST_VERSION < VERSION) };
    for version in OLDEST_VERSION..VERSION {
        converse(world, version);
    }
}

fn newer_holder(world: &World) {
    for version in [VERSION, VERSION + 1, 99, u32::MAX] {
        converse(world, version);
    }
}

fn unknown_holder(world: &World) {
    let guard = world.guard();
    let socket = connect(guard.socket());
    let hello = Request::Hello {
        version: OLDEST_VERSION - 1,
    };
    let Some((Reply::Refused(refusal), _)) = ask(&socket, &hello, &[]) else {
        panic!("it should have been refused");
    };
    assert_eq!(refusal.errno, Errno::PROTONOSUPPORT.raw_os_error());
    names_both_versions(&refusal.obstacle);
    assert!(!refusal.mend.is_empty());
    assert!(hear(&socket).is_none(), "the conversation is over");
}

fn names_both_versions(said: &str) {
    let theirs = format!("version {} ", OLDEST_VERSION - 1);
    assert!(said.contains(&theirs), "{said}");
    let ours = format!("{OLDEST_VERSION} to {VERSION}");
    assert!(said.contains(&ours), "{said}");
}

/// A guard that says it is of another version.
pub struct Relay {
    pub path: PathBuf,
    heard: Arc<Mutex<Vec<Request>>>,
    _directory: ScratchDirectory,
}

impl Relay {
    /// The holder is told that the gate is the one beside which it needs a
    /// barrier.
    pub fn new(guard: &Path, version: u32) -> Self {
        let directory = ScratchDirectory::new("versions").unwrap();
        let path = directory.path().join("guard.sock");
        let listener = Socket::listen(&path, 8).unwrap();
        let heard = Arc::new(Mutex::new(Vec::new()));
        let (guard, noted) = (guard.to_owned(), Arc::clone(&heard));
        // It ends with the test.
        std::thread::spawn(move || {
            while let Ok(holder) = listener.accept() {
                let holder = Arc::new(holder);
                let guard = Arc::new(Socket::connect(&guard).unwrap());
                let (from, to, noted) =
                    (Arc::clone(&holder), Arc::clone(&guard), Arc::clone(&noted));
                std::thread::spawn(move || {
                    pass(&from, &to, |bytes| {
                        let said = Request::decode(&bytes).unwrap();
                        noted.lock().unwrap().push(said.clone());
                        match said {
                            // The guard behind it settles on what it claims.
                            Request::Hello { version: theirs } => {
                                let settled = theirs.min(version).max(OLDEST_VERSION);
                                Request::Hello { version: settled }.encode()
                            }
                            _ => bytes,
                        }
                    });
                });
                std::thread::spawn(move || pass(&guard, &holder, |bytes| claim(bytes, version)));
            }
        });
        Self {
            path,
            heard,
            _directory: directory,
        }
    }

    fn heard(&self, wanted: impl Fn(&Request) -> bool) -> usize {
        let heard = self.heard.lock().unwrap();
        heard.iter().filter(|request| wanted(request)).count()
    }
}

/// Hands on what one says to the other, until one of them leaves.
fn pass(from: &Socket, to: &Socket, change: impl Fn(Vec<u8>) -> Vec<u8>) {
    let mut buffer = vec![0; MAX_MESSAGE];
    while let Ok(received) = from.receive(&mut buffer) {
        if received.length == 0 {
            break;
        }
        let bytes = change(buffer[..received.length].to_vec());
        let fds: Vec<_> = received.fds.iter().map(AsFd::as_fd).collect();
        if to.send(&[&bytes], &fds).is_err() {
            break;
        }
    }
    let _ = (from.shut_down(), to.shut_down());
}

fn claim(bytes: Vec<u8>, version: u32) -> Vec<u8> {
    match Reply::decode(&bytes).unwrap() {
        Reply::Welcome { pid, challenge, .. } => Reply::Welcome {
            version,
            gate: Gate::Bpf,
            pid,
            challenge,
        }
        .encode(),
        _ => bytes,
    }
}

/// Has the library pin a file beside a guard that claims a version, and says
/// what it heard.
fn pin_beside(world: &World, version: u32) -> Relay {
    let (disk, guard) = (world.disk(Kind::XFS), world.guard());
    let path = written(&disk, &format!("versions-guard-{version}"), 65536);
    let relay = Relay::new(guard.socket(), version);
    let file = open(&path);
    let held = map(&Guard::at(&relay.path), &file, 0..65536);
    assert!(is_pinned(&path));
    drop((held, file));
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
    relay
}

fn older_guard(world: &World) {
    for version in OLDEST_VERSION..VERSION_WITH_BARRIER {
        let relay = pin_beside(world, version);
        let barriers = relay.heard(|request| matches!(request, Request::Barrier));
        assert_eq!(barriers, 0, "that guard does not know it");
        // What stands for it there.
        let again = relay.heard(|request| *request == Request::Hello { version });
        assert_eq!(again, 1);
    }
}

/// A guard that does not know what a pin shall be is not asked for it.
fn guard_without_strengths(world: &World) {
    let (disk, guard) = (world.disk(Kind::XFS), world.guard());
    let path = written(&disk, "versions-strength", 65536);
    let relay = Relay::new(guard.socket(), VERSION_WITH_FAMILIES - 1);
    let file = open(&path);
    let refused = mapdirect::PinOptions::new()
        .strength(mapdirect::Strength::Stable)
        .guard(Guard::at(&relay.path))
        .pin(&file)
        .unwrap_err();
    assert_eq!(refused.errno(), Errno::OPNOTSUPP.raw_os_error());
    let said = refused.to_string();
    assert!(said.contains("version 2 of the protocol"), "{said}");
    assert_eq!(relay.heard(|request| matches!(request, Request::Pin(_))), 0);
    assert!(!is_pinned(&path));
    std::fs::remove_file(&path).unwrap();
}

fn newer_guard(world: &World) {
    for version in [VERSION, VERSION + 1, 99] {
        let relay = pin_beside(world, version);
        let barriers = relay.heard(|request| matches!(request, Request::Barrier));
        assert_eq!(barriers, 1);
        let hello = Request::Hello { version: VERSION };
        let others = |request: &Request| matches!(request, Request::Hello { .. });
        assert_eq!(relay.heard(others), relay.heard(|said| *said == hello));
    }
}

fn unknown_guard(world: &World) {
    let (disk, guard) = (world.disk(Kind::XFS), world.guard());
    let path = written(&disk, "versions-unknown", 65536);
    let relay = Relay::new(guard.socket(), OLDEST_VERSION - 1);
    let file = open(&path);
    let refused = mapdirect::PinOptions::new()
        .guard(Guard::at(&relay.path))
        .pin(&file)
        .unwrap_err();
    assert_eq!(refused.errno(), Errno::PROTONOSUPPORT.raw_os_error());
    names_both_versions(&refused.to_string());
    assert!(!is_pinned(&path));
    std::fs::remove_file(&path).unwrap();
}
