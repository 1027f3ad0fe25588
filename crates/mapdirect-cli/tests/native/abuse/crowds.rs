//! Clients who leave, do not answer, or are many.

use super::*;

/// At every point where the guard waits for it.
pub(crate) fn leaves_in_the_middle(world: &World) {
    let guard = world.guard();
    let disk = world.disk(Kind::XFS);
    let path = written(&disk, "abuse-leaves", 65536);
    for round in 0..60 {
        // What the one before asked for may be granted only now.
        let file = wait_for(Duration::from_secs(20), || {
            Ok(File::options().read(true).write(true).open(&path).ok())
        });
        let file = file.unwrap();
        let connection = proven(&guard);
        let request = pin_request(0, 4096).encode();
        connection.send(&[&request], &[file.as_fd()]).unwrap();
        // It does not even wait for the answer, or hears that it should swap
        // (or that it need not) and leaves, or swaps and leaves.
        if round % 3 > 0
            && let Some((Reply::Swap, fds)) = hear(&connection)
            && round % 3 == 2
        {
            mapdirect_sys::dup::replace(file.as_fd(), fds[0].as_fd()).unwrap();
            connection.send(&[&Request::Swapped.encode()], &[]).unwrap();
        }
        drop((connection, file));
        wait_until_free(&path);
    }
    is_well(world, &guard);
    std::fs::remove_file(&path).unwrap();
}

pub(crate) fn never_swaps(world: &World) {
    let guard = world.guard();
    let disk = world.disk(Kind::XFS);
    let path = written(&disk, "abuse-never-swaps", 65536);
    let file = open(&path);
    let connection = proven(&guard);
    let request = pin_request(0, 4096).encode();
    connection.send(&[&request], &[file.as_fd()]).unwrap();
    let first = hear(&connection);
    if Gate::under_test() == Gate::Bpf {
        // The old description may stay: nothing is to be swapped, and whoever
        // says that it was talks nonsense.
        assert!(matches!(first, Some((Reply::Granted(_), _))), "{first:?}");
        let nonsense = ask(&connection, &Request::Swapped, &[]);
        assert!(matches!(nonsense, Some(Reply::Refused(_))), "{nonsense:?}");
        drop((first, connection, file));
        is_well(world, &guard);
        std::fs::remove_file(&path).unwrap();
        return;
    }
    let Some((Reply::Swap, fds)) = first else {
        panic!("no swap: {first:?}");
    };
    // Meanwhile others are not kept waiting for ever.
    let started = Instant::now();
    let opened = File::open(&path);
    assert!(opened.is_ok() && started.elapsed() < Duration::from_secs(6));
    let Some((Reply::Refused(refusal), _)) = hear(&connection) else {
        panic!("it must be refused in the end");
    };
    assert_eq!(refusal.reason, Reason::Protocol);
    drop((fds, opened, connection, file));
    wait_until_free(&path);
    // And one that says it did, and did not.
    let file = open(&path);
    let connection = proven(&guard);
    connection.send(&[&request], &[file.as_fd()]).unwrap();
    let Some((Reply::Swap, _fds)) = hear(&connection) else {
        panic!("no swap");
    };
    connection.send(&[&Request::Swapped.encode()], &[]).unwrap();
    let Some((Reply::Refused(refusal), _)) = hear(&connection) else {
        panic!("it must be refused");
    };
    assert_eq!(refusal.reason, Reason::OpenHere, "{refusal:?}");
    drop((connection, file));
    is_well(world, &guard);
    std::fs::remove_file(&path).unwrap();
}

/// Asks and asks and never reads an answer.
pub(crate) fn never_reads(world: &World) {
    let guard = world.guard();
    let connection = proven(&guard);
    connection
        .set_send_timeout(Duration::from_millis(200))
        .unwrap();
    let request = Request::Status.encode();
    let started = Instant::now();
    let mut sent = 0;
    while started.elapsed() < Duration::from_secs(8) {
        match connection.send(&[&request], &[]) {
            Ok(()) => sent += 1,
            Err(Errno::AGAIN) => {}
            Err(_) => break,
        }
    }
    assert!(sent > 0);
    assert!(
        started.elapsed() < Duration::from_secs(8),
        "the guard must hang up at last"
    );
    is_well(world, &guard);
}

pub(crate) fn thousand_clients(world: &World) {
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let disk = world.disk(Kind::XFS);
    let started = Instant::now();
    let clients: Vec<Socket> = (0..1000).map(|_| proven(&guard)).collect();
    // All of them ask for a pin of their own before anybody reads an answer.
    let paths: Vec<_> = (0..1000)
        .map(|number| {
            let path = disk.path(&format!("abuse-crowd-{number}"));
            std::fs::write(&path, [1; 4096]).unwrap();
            path
        })
        .collect();
    rustix::fs::sync();
    // They are in each other's way for a while.
    let request = Request::Pin(PinRequest {
        offset: 0,
        length: 4096,
        flags: Flags::NONE,
        patience_ms: 20_000,
    });
    let request = request.encode();
    for (client, path) in clients.iter().zip(&paths) {
        let file = File::open(path).unwrap();
        client.send(&[&request], &[file.as_fd()]).unwrap();
    }
    // Whoever is asked to replace its descriptor answers at once, in whatever
    // order they are asked.
    let mut granted = Vec::new();
    let mut left: Vec<&Socket> = clients.iter().collect();
    while !left.is_empty() {
        let mut polled: Vec<_> = left
            .iter()
            .map(|client| PollFd::new(*client, PollFlags::IN))
            .collect();
        let minute = rustix::event::Timespec {
            tv_sec: 60,
            tv_nsec: 0,
        };
        let ready = rustix::event::poll(&mut polled, Some(&minute)).unwrap();
        assert!(ready > 0, "{} were not answered", left.len());
        let mut ready = polled.into_iter().map(|one| !one.revents().is_empty());
        left.retain(|client| {
            if !ready.next().unwrap() {
                return true;
            }
            match hear(client) {
                Some((Reply::Swap, _)) => {
                    // The descriptor that was sent is closed here already.
                    client.send(&[&Request::Swapped.encode()], &[]).unwrap();
                    true
                }
                Some((Reply::Granted(pin), fds)) => {
                    granted.push((pin, fds));
                    false
                }
                other => panic!("not granted: {other:?}"),
            }
        });
    }
    assert_eq!(granted.len(), 1000);
    assert!(paths.iter().all(|path| is_pinned(path)));
    let status = guard.client().status().unwrap();
    assert_eq!(status.files.len(), 1000);
    assert!(status.clients >= 1000);
    drop((granted, clients));
    for path in &paths {
        wait_until_free(path);
        std::fs::remove_file(path).unwrap();
    }
    println!("a thousand clients took {:?}", started.elapsed());
    is_well(world, &guard);
}

/// More clients than a guard has descriptors for.
pub(crate) fn out_of_descriptors(world: &World) {
    let guard = GuardProcess::start_with_descriptors(Path::new(BINARY), 1024).unwrap();
    let disk = world.disk(Kind::XFS);
    let path = written(&disk, "abuse-descriptors", 65536);
    let file = open(&path);
    let held = map(&guard.client(), &file, 0..65536);
    let crowd: Vec<Socket> = (0..1100).map(|_| connect(&guard)).collect();
    let hello = Request::Hello { version: VERSION };
    let mut served = Vec::new();
    for client in crowd {
        match ask(&client, &hello, &[]) {
            Some(Reply::Welcome { .. }) => served.push(client),
            // It may hang up before it is asked anything.
            Some(Reply::Refused(refusal)) => assert_eq!(refusal.reason, Reason::Limit),
            None => {}
            other => panic!("{other:?}"),
        }
    }
    // Two more are those of this process: what it asks by, and what it is told
    // by.
    assert_eq!(served.len() + 2, 1024 / 4);
    // All of them send what the guard has to keep while it looks.
    for client in &served {
        client
            .send(&[&Request::Query.encode()], &[file.as_fd()])
            .unwrap();
    }
    assert!(is_pinned(&path), "the gate goes on");
    let status = guard.client().status().unwrap();
    assert_eq!((status.files.len(), status.clients), (1, 1024 / 4));
    // Those it knows are served.
    let other = written(&disk, "abuse-descriptors-more", 65536);
    let more = open(&other);
    let also_held = map(&guard.client(), &more, 0..65536);
    assert!(is_pinned(&other));
    drop((held, also_held, file, more, served));
    for path in [&path, &other] {
        wait_until_free(path);
        std::fs::remove_file(path).unwrap();
    }
}

pub(crate) fn second_guard(_world: &World) {
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let second = std::process::Command::new(BINARY)
        .arg("guard")
        .arg("--socket")
        .arg(guard.socket())
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(1));
    let text = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(text.contains("another guard listens"), "{text}");
    assert!(guard.client().status().is_ok(), "the first goes on");
}

/// Whatever is where the socket should be, and no guard's, stays and is named.
pub(crate) fn in_the_way(_world: &World) {
    let scratch = mapdirect_testkit::process::ScratchDirectory::new("in-the-way").unwrap();
    let path = |name: &str| scratch.path().join(name);
    std::os::unix::fs::symlink("nowhere", path("dangling")).unwrap();
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    std::os::unix::fs::symlink(guard.socket(), path("link")).unwrap();
    std::fs::create_dir(path("directory")).unwrap();
    File::create(path("file")).unwrap();
    let _other = std::os::unix::net::UnixListener::bind(path("other")).unwrap();
    for (name, what) in [
        (
            "dangling",
            "a symbolic link, which is not followed, is there",
        ),
        ("link", "a symbolic link, which is not followed, is there"),
        ("directory", "a directory is there"),
        ("file", "a file of another kind is there"),
        ("other", "a socket of another program is there"),
    ] {
        let before = std::fs::symlink_metadata(path(name)).unwrap();
        let gate = mapdirect_testkit::process::BpfDirectory::new(Path::new(BINARY));
        let output = std::process::Command::new(BINARY)
            .args(["guard", "--socket"])
            .arg(path(name))
            .arg("--bpf-directory")
            .arg(gate.path())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let words: Vec<_> = text.split_whitespace().collect();
        let text = words.join(" ");
        assert!(text.contains(what), "{name}: {text}");
        assert!(text.contains("help: move it away"), "{name}: {text}");
        let after = std::fs::symlink_metadata(path(name)).unwrap();
        let identity = std::os::unix::fs::MetadataExt::ino;
        assert_eq!(identity(&before), identity(&after), "{name}");
    }
    assert!(!path("nowhere").exists());
}

/// A stranger who may read the directory of the socket can lock it, for ever.
pub(crate) fn locked_directory(_world: &World) {
    use rustix::fs::FlockOperation;
    let scratch = mapdirect_testkit::process::ScratchDirectory::new("locked").unwrap();
    let locked = File::open(scratch.path()).unwrap();
    rustix::fs::flock(&locked, FlockOperation::LockExclusive).unwrap();
    let socket = scratch.path().join("guard.sock");
    let gate = mapdirect_testkit::process::BpfDirectory::new(Path::new(BINARY));
    let mut child = std::process::Command::new(BINARY)
        .args(["guard", "--socket"])
        .arg(&socket)
        .arg("--bpf-directory")
        .arg(gate.path())
        .spawn()
        .unwrap();
    let client = mapdirect::Guard::at(&socket);
    let answers = wait_for(Duration::from_secs(20), || {
        Ok(client.status().is_ok().then_some(()))
    });
    let pid = child.id().cast_signed();
    mapdirect_sys::signal::kill(pid, mapdirect_sys::signal::Signal::TERMINATE).unwrap();
    child.wait().unwrap();
    answers.unwrap();
}

/// Guards that start at the same time, each on its own socket, each with the
/// best gate there is. In the kernel there is one gate, for one guard.
pub(crate) fn guards_at_once(_world: &World) {
    let scratch = mapdirect_testkit::process::ScratchDirectory::new("at-once").unwrap();
    let start = |number: usize| {
        let mut child = std::process::Command::new(BINARY)
            .args(["guard", "--socket"])
            .arg(scratch.path().join(format!("{number}.sock")))
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = child.stdout.take().unwrap();
        (child, std::io::BufReader::new(stdout))
    };
    let started: Vec<_> = (0..5).map(start).collect();
    let mut gates = Vec::new();
    let mut children = Vec::new();
    for (child, mut stdout) in started {
        let mut line = String::new();
        std::io::BufRead::read_line(&mut stdout, &mut line).unwrap();
        gates.push(line.split(", ").nth(1).unwrap_or_default().to_owned());
        children.push(child);
    }
    for mut child in children {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let of = |gate: &str| gates.iter().filter(|found| *found == gate).count();
    let kernel = of("gate bpf");
    assert!(of("gate fanotify") == 5 || kernel == 1, "{gates:?}");
}

/// A socket left behind is taken over; any other file is not.
pub(crate) fn socket_in_the_way(_world: &World) {
    let mut guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let socket = guard.socket().to_owned();
    guard.kill().unwrap();
    assert!(socket.exists(), "nobody took it away");
    let start = || {
        let mut child = std::process::Command::new(BINARY)
            .arg("guard")
            .arg("--socket")
            .arg(&socket)
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = child.stdout.take().unwrap();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line).unwrap();
        (child, line)
    };
    let (mut child, line) = start();
    assert!(line.contains("ready"), "{line}");
    child.kill().unwrap();
    child.wait().unwrap();
    std::fs::remove_file(&socket).unwrap();
    std::fs::write(&socket, "something precious").unwrap();
    let (mut child, line) = start();
    assert_eq!(line, "");
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert_eq!(std::fs::read(&socket).unwrap(), b"something precious");
}

/// Others may ask, and learn nothing about pins of strangers.
pub(crate) fn unprivileged_status(world: &World) {
    let guard = world.guard();
    let disk = world.disk(Kind::XFS);
    let path = written(&disk, "abuse-secret-name", 65536);
    let file = File::open(&path).unwrap();
    let held = PinOptions::new().guard(guard.client()).pin(&file).unwrap();
    std::process::Command::new("chmod")
        .arg("755")
        .arg(guard.socket().parent().unwrap())
        .status()
        .unwrap();
    // The binary may lie where nobody else can reach it.
    let copy = mapdirect_testkit::process::ScratchDirectory::new("bin").unwrap();
    let binary = copy.path().join("mapdirect");
    std::fs::copy(BINARY, &binary).unwrap();
    for path in [copy.path(), &binary] {
        std::process::Command::new("chmod")
            .arg("755")
            .arg(path)
            .status()
            .unwrap();
    }
    let run = |arguments: &[&str]| {
        std::process::Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(&binary)
            .args(arguments)
            .env("MAPDIRECT_SOCKET", guard.socket())
            .output()
            .unwrap()
    };
    let output = run(&["status", "--json"]);
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!text.contains("secret"), "{text}");
    // With more privilege than its caller it does not listen to the caller's
    // environment.
    std::process::Command::new("chmod")
        .arg("2755")
        .arg(&binary)
        .status()
        .unwrap();
    let output = run(&["status"]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains(mapdirect_proto::DEFAULT_SOCKET), "{text}");
    assert!(
        !text.contains("MAPDIRECT_SOCKET"),
        "what it ignores: {text}"
    );
    let output = run(&["doctor"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("lacks CAP_LINUX_IMMUTABLE"), "{text}");
    let output = run(&["guard", "--socket", "/tmp/mapdirect-nobody.sock"]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("root"), "{text}");
    drop(held);
    std::fs::remove_file(&path).unwrap();
}
