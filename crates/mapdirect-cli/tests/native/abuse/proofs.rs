//! Proofs, announcements and connections of others.

use super::*;

/// Without the proof there is no pin, whatever else is said.
pub(crate) fn unproven(world: &World) {
    let guard = world.guard();
    let disk = world.disk(Kind::XFS);
    let path = written(&disk, "abuse-unproven", 65536);
    let file = File::open(&path).unwrap();
    let socket = connect(&guard);
    ask(&socket, &Request::Hello { version: VERSION }, &[]).unwrap();
    // A memory file that holds nothing, one that is not immutable, and one
    // made for another connection.
    let other = proven(&guard);
    let stale = memfd::prove_immutable_capability(&[0; 32], memfd::By::Namespace).unwrap();
    for proof in [
        memfd::sealed("x", b"").unwrap(),
        memfd::sealed("x", &[0; 32]).unwrap(),
        stale,
    ] {
        let reply = ask(&socket, &Request::Prove, &[proof.as_fd()]);
        assert!(matches!(reply, Some(Reply::Refused(_))), "{reply:?}");
    }
    let reply = ask(&socket, &pin_request(0, 4096), &[file.as_fd()]);
    let Some(Reply::Refused(refusal)) = reply else {
        panic!("{reply:?}");
    };
    assert_eq!(refusal.errno, Errno::ACCESS.raw_os_error());
    assert_eq!(refusal.reason, Reason::NotCapable);
    drop((other, file));
    std::fs::remove_file(&path).unwrap();
}

/// A proof for this connection's challenge, but made by another process: what
/// a fake guard gets out of a privileged program.
pub(crate) fn relayed_proof(world: &World) {
    let guard = world.guard();
    let disk = world.disk(Kind::XFS);
    let path = written(&disk, "abuse-relayed", 65536);
    let file = File::open(&path).unwrap();
    let socket = connect(&guard);
    let challenge = greet(&socket);
    let (ours, theirs) = Socket::pair().unwrap();
    let child = mapdirect_testkit::raw::fork(|| {
        let sent = memfd::prove_immutable_capability(&challenge, memfd::By::Namespace)
            .and_then(|proof| theirs.send(&[b"proof"], &[proof.as_fd()]));
        i32::from(sent.is_err())
    })
    .unwrap();
    assert_eq!(mapdirect_testkit::raw::wait(child), Ok(0));
    let proof = ours.receive(&mut [0; 16]).unwrap().fds.remove(0);
    let requests = [
        (Request::Prove, proof.as_fd()),
        (pin_request(0, 4096), file.as_fd()),
    ];
    for (request, fd) in requests {
        let Some(Reply::Refused(refusal)) = ask(&socket, &request, &[fd]) else {
            panic!("{request:?} with the proof of another");
        };
        assert_eq!(refusal.errno, Errno::ACCESS.raw_os_error());
        assert_eq!(refusal.reason, Reason::NotCapable);
    }
    drop((proof, file));
    assert!(!is_pinned(&path));
    std::fs::remove_file(&path).unwrap();
}

/// In a user namespace of its own a process has all capabilities, and they
/// count for nothing outside.
pub(crate) fn own_user_namespace(world: &World) {
    let guard = world.guard();
    let disk = world.disk(Kind::XFS);
    let path = written(&disk, "abuse-namespace", 65536);
    let socket = guard.socket().to_string_lossy().into_owned();
    let name = path.to_string_lossy().into_owned();
    let mut helper = Helper::start("own-namespace", &[&socket, &name]).unwrap();
    let errno = Errno::ACCESS.raw_os_error();
    assert_eq!(helper.hear().unwrap(), format!("refused {errno}"));
    assert_eq!(helper.finish().unwrap(), Some(0));
    assert!(!is_pinned(&path));
    std::fs::remove_file(&path).unwrap();
}

/// Proves what it can, goes into a user namespace of its own, and asks for a
/// pin.
pub(crate) fn play_own_namespace(arguments: &[String]) -> anyhow::Result<()> {
    let [socket, path] = arguments else {
        anyhow::bail!("wrong arguments");
    };
    let file = File::open(path)?;
    let socket = proven_to(Path::new(socket));
    mapdirect_testkit::raw::own_user_namespace()?;
    let all = mapdirect_sys::capget::effective(0)?;
    anyhow::ensure!(mapdirect_sys::capget::contains(
        all,
        mapdirect_sys::capget::CAP_LINUX_IMMUTABLE
    ));
    match ask(&socket, &pin_request(0, 4096), &[file.as_fd()]) {
        Some(Reply::Refused(refusal)) => say(&format!("refused {}", refusal.errno)),
        other => say(&format!("{other:?}")),
    }
    Ok(())
}

/// A pinned file, and a connection that may announce who opens it.
pub(crate) struct Announcing {
    connection: Socket,
    path: PathBuf,
    known: OwnedFd,
    _held: mapdirect::Pin,
}

impl Announcing {
    fn new(world: &World, guard: &GuardProcess, name: &str) -> Self {
        let path = written(&world.disk(Kind::XFS), name, 65536);
        let file = File::open(&path).unwrap();
        let held = PinOptions::new().guard(guard.client()).pin(&file).unwrap();
        let mode = rustix::fs::Mode::empty();
        let known = rustix::fs::open(&path, rustix::fs::OFlags::PATH, mode).unwrap();
        assert!(is_pinned(&path));
        Self {
            connection: proven(guard),
            path,
            known,
            _held: held,
        }
    }

    /// Announces the calling thread.
    fn announce(&self) -> Reply {
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        let request = Request::Announce { tid };
        ask(&self.connection, &request, &[self.known.as_fd()]).unwrap()
    }

    /// Whether the calling thread may open it for writing must be `announced`;
    /// where operations are judged whoever likes may.
    fn expect_let_in(&self, announced: bool, why: &str) {
        match Gate::under_test() {
            Gate::Fanotify => assert_eq!(!is_pinned(&self.path), announced, "{why}"),
            Gate::Bpf => assert!(is_pinned(&self.path), "{why}"),
        }
    }
}

impl Drop for Announcing {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// One that is not made use of is soon worth nothing, and in nobody's way.
pub(crate) fn announcements_expire(world: &World) {
    let guard = world.guard();
    let announcing = Announcing::new(world, &guard, "abuse-announced-late");
    let mut announced = 0;
    let refusal = loop {
        match announcing.announce() {
            Reply::Done => announced += 1,
            Reply::Refused(refusal) => break refusal,
            other => panic!("{other:?}"),
        }
        assert!(announced < 1000, "there must be a limit");
    };
    assert_eq!(refusal.reason, Reason::Limit);
    std::thread::sleep(mapdirect_proto::ANNOUNCEMENT_LIFE);
    announcing.expect_let_in(false, "none of them is good any more");
    assert_eq!(announcing.announce(), Reply::Done);
    announcing.expect_let_in(true, "this one is");
    announcing.expect_let_in(false, "but only once");
}

pub(crate) fn announcements_end(world: &World) {
    let guard = world.guard();
    let mut announcing = Announcing::new(world, &guard, "abuse-announced-and-left");
    assert_eq!(announcing.announce(), Reply::Done);
    announcing.connection = connect(&guard);
    // The guard hears of it when its thread runs.
    std::thread::sleep(Duration::from_millis(300));
    announcing.expect_let_in(false, "it ended with the session");
}

pub(crate) fn announcements_name_one_thread(world: &World) {
    let guard = world.guard();
    let announcing = Announcing::new(world, &guard, "abuse-announced-another");
    assert_eq!(announcing.announce(), Reply::Done);
    std::thread::scope(|scope| {
        let another = scope.spawn(|| announcing.expect_let_in(false, "another thread"));
        another.join().unwrap();
    });
    announcing.expect_let_in(true, "the thread announced");
    // A thread of somebody else is not for us to announce.
    let request = Request::Announce { tid: 1 };
    let reply = ask(
        &announcing.connection,
        &request,
        &[announcing.known.as_fd()],
    );
    assert!(matches!(reply, Some(Reply::Refused(_))), "{reply:?}");
}

/// A child that inherited a proven connection is not the one that proved.
pub(crate) fn someone_elses_connection(world: &World) {
    let guard = world.guard();
    let disk = world.disk(Kind::XFS);
    let path = written(&disk, "abuse-inherited", 65536);
    let file = File::open(&path).unwrap();
    let connection = proven(&guard);
    let request = pin_request(0, 4096).encode();
    let child = mapdirect_testkit::raw::fork(|| {
        i32::from(connection.send(&[&request], &[file.as_fd()]).is_err())
    })
    .unwrap();
    assert_eq!(mapdirect_testkit::raw::wait(child), Ok(0));
    let Some((Reply::Refused(refusal), _)) = hear(&connection) else {
        panic!("a child must not pin on its parent's connection");
    };
    assert_eq!(refusal.errno, Errno::ACCESS.raw_os_error());
    drop(file);
    assert!(!is_pinned(&path));
    std::fs::remove_file(&path).unwrap();
}
