//! Names that strangers choose, in columns, in lines and in paths.

use super::{flat, mapdirect, output};
use crate::world::{BINARY, World, wait_until_free};
use mapdirect_sys::names;
use mapdirect_sys::signal::{self, Signal};
use mapdirect_testkit::Kind;
use mapdirect_testkit::contract::Gate as UnderTest;
use mapdirect_testkit::process::{Helper, ScratchDirectory};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Names that would be several cells, or read as something else.
const HOSTILE: [&[u8]; 12] = [
    b"a b",
    b"0  4096  written",
    b"new\nline  0",
    b"tab\tbed",
    b"x, by root (uid 0)",
    b"\x1b[31mred\x1b[2J",
    b"bytes\xff \xfe",
    "right\u{202e}left".as_bytes(),
    "wide\u{3000}blank\u{a0}s".as_bytes(),
    b"back\\x20(deleted)",
    b"$'quoted '",
    b" ",
];

fn rows(text: Vec<u8>, columns: usize) -> Vec<Vec<String>> {
    let text = String::from_utf8(text).unwrap();
    let shown = |character: char| character == '\n' || !names::is_deceptive(character);
    assert!(text.chars().all(shown), "{text:?}");
    let row = |line: &str| -> Vec<String> {
        let cells: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
        assert_eq!(cells.len(), columns, "{line:?}");
        cells
    };
    text.lines().map(row).collect()
}

/// A row has the cells that were asked for, whatever files and commands are
/// called, and names can be read from it.
pub(super) fn cells(world: &World) {
    let guard = world.guard();
    let disk = world.disk(Kind::XFS);
    let mut files: Vec<PathBuf> = Vec::new();
    for name in HOSTILE {
        let name = [b"words-cell-", name].concat();
        let path = disk.root().join(OsStr::from_bytes(&name));
        std::fs::write(&path, [7; 8192]).unwrap();
        File::open(&path).unwrap().sync_all().unwrap();
        files.push(path);
    }
    // What is executed by this name has it as the name of its command.
    let scratch = ScratchDirectory::new("cells").unwrap();
    let program = scratch.path().join("m  lost, (x)");
    std::os::unix::fs::symlink(BINARY, &program).unwrap();
    let mut pin = Command::new(&program);
    pin.arg("pin").args(&files).args(["--patience", "5000"]);
    pin.env("MAPDIRECT_SOCKET", guard.socket());
    let mut pin = Helper::spawn(pin).unwrap();
    while pin.hear().unwrap() != "held until SIGINT or SIGTERM" {}
    let table = |verb: &str, columns: &str, locale: &str| {
        let mut words: Vec<&OsStr> = vec![OsStr::new(verb), OsStr::new("-n")];
        words.extend([OsStr::new("-o"), OsStr::new(columns)]);
        words.extend(files.iter().map(|file| file.as_os_str()));
        let mut command = mapdirect(guard.socket(), &words);
        let said = command.env("LC_ALL", locale).output().unwrap();
        assert!(said.status.success(), "{said:?}");
        assert!(locale != "C" || said.stdout.is_ascii(), "{said:?}");
        said.stdout
    };
    let original = |cell: &str| PathBuf::from(names::unquoted(cell).unwrap());
    for locale in ["C.UTF-8", "C"] {
        let shown = rows(table("show", "offset,file,state", locale), 3);
        let named: Vec<_> = shown.iter().map(|row| original(&row[1])).collect();
        assert_eq!(named, files);
        for row in &shown {
            assert_eq!([&row[0], &row[2]], ["0", "written"]);
        }
        let columns = "pid,command,file,rule,left,state";
        let shown = rows(table("status", columns, locale), 6);
        assert_eq!(shown.len(), files.len());
        for row in &shown {
            assert_eq!(row[0], pin.pid().to_string());
            let command = names::unquoted(&row[1]).unwrap();
            assert_eq!(command, OsString::from("m  lost, (x)"));
            assert!(files.contains(&original(&row[2])), "{row:?}");
            assert_eq!(row[3..], ["-", "-", "kept"]);
        }
    }
    // Also where the name stands above the rows.
    let shown = String::from_utf8(table("show", "offset,state", "C.UTF-8")).unwrap();
    let heads = shown.lines().filter(|line| line.ends_with(':'));
    assert!(heads.clone().count() == files.len(), "{shown}");
    assert!(
        heads
            .clone()
            .all(|line| !line.contains(char::is_whitespace)),
        "{shown}"
    );
    // A shell reads such a name.
    let cell = rows(table("show", "file", "C"), 1).remove(6).remove(0);
    let read = Command::new("bash")
        .args(["-c", &format!("printf %s {cell}")])
        .output()
        .unwrap();
    assert_eq!(PathBuf::from(OsString::from_vec(read.stdout)), files[6]);
    // What must be said of a name is said in its cell.
    std::fs::remove_file(&files[0]).unwrap();
    let said = output(guard.socket(), &["status", "-n", "-o", "file,pid"]);
    let gone = format!("{}\\x20(deleted", names::cell(files[0].as_os_str(), true));
    let shown = rows(said.stdout, 2);
    let deleted = shown.iter().filter(|row| row[0].starts_with(&gone));
    assert_eq!(deleted.count(), 1, "{shown:?}");
    signal::kill(pin.pid(), Signal::TERMINATE).unwrap();
    pin.finish().unwrap();
    for file in &files[1..] {
        wait_until_free(file);
        std::fs::remove_file(file).unwrap();
    }
}

/// Paths in lines are names, too.
pub(super) fn paths(world: &World) {
    let guard = world.guard();
    let scratch = ScratchDirectory::new("paths").unwrap();
    let odd = scratch.path().join("a\n\x1b[2Jmapdirect: b");
    let quoted = names::quoted(odd.as_os_str());
    let nowhere = odd.join("x");
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let policy = scratch.path().join("p, q\n");
    std::fs::write(
        &policy,
        "[[rule]]\nname = \"r\"\nusers = [1]\npaths = [\"/a\\nb\"]\naccess = \"write\"\n",
    )
    .unwrap();
    let metrics = output(
        guard.socket(),
        &["status", "--metrics-file", &text(&nowhere)],
    );
    let missing = output(&odd, &["status"]);
    let rules = output(
        guard.socket(),
        &["policy", "check", "--policy", &text(&policy)],
    );
    std::fs::write(&policy, "[[rule").unwrap();
    let wrong = output(
        guard.socket(),
        &["policy", "check", "--policy", &text(&policy)],
    );
    let quoted_policy = names::quoted(policy.as_os_str());
    for (said, status, words) in [
        (&metrics, 1, quoted.trim_end_matches('\'')),
        (&missing, 3, &*quoted),
        (&rules, 0, &*quoted_policy),
        (&rules, 0, r"$'/a\nb'"),
        (&wrong, 1, &*quoted_policy),
    ] {
        assert_eq!(said.status.code(), Some(status), "{said:?}");
        assert!(flat(said).contains(words), "{words}: {said:?}");
    }
    let device = scratch.path().join("fifo");
    let made = Command::new("mkfifo").arg(&device).status().unwrap();
    assert!(made.success());
    let said = output(
        guard.socket(),
        &["status", "--metrics-file", &text(&device)],
    );
    assert_eq!(said.status.code(), Some(1));
    assert!(flat(&said).contains("it is a FIFO, and a file would take its place"));
    if UnderTest::under_test() == UnderTest::Fanotify {
        ready(&odd, &quoted);
    }
}

/// What a guard says first has its socket in it.
fn ready(socket: &Path, quoted: &str) {
    let mut guard = Command::new(BINARY)
        .args(["guard", "--gate", "fanotify", "--socket"])
        .arg(socket)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(guard.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let taken = output(
        socket,
        &[
            "guard",
            "--gate",
            "fanotify",
            "--socket",
            socket.to_str().unwrap(),
        ],
    );
    signal::kill(guard.id().cast_signed(), Signal::TERMINATE).unwrap();
    assert_eq!(guard.wait().unwrap().code(), Some(0));
    let expected = format!("mapdirect guard: ready, gate fanotify, listening at {quoted}\n");
    assert_eq!(line, expected);
    let said = flat(&taken);
    assert!(
        said.contains(&format!("another guard listens at {quoted}")),
        "{said}"
    );
}

/// What is no regular file is not opened, and is called what it is.
pub(super) fn kinds(world: &World) {
    let guard = world.guard();
    let scratch = ScratchDirectory::in_memory("kinds").unwrap();
    let at = |name: &str| scratch.path().join(name);
    let made = Command::new("mkfifo").arg(at("fifo")).status().unwrap();
    assert!(made.success());
    // Of a tape, or a watchdog, that would do something. There is none here.
    let made = Command::new("mknod")
        .arg(at("tape"))
        .args(["c", "9", "0"])
        .status();
    assert!(made.unwrap().success());
    let _listener = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    std::fs::create_dir(at("directory")).unwrap();
    std::os::unix::fs::symlink("tape", at("link")).unwrap();
    let traced = Command::new("strace")
        .arg("-V")
        .stdout(Stdio::null())
        .status();
    let traced = traced.is_ok_and(|status| status.success());
    if !traced {
        world.unavailable(String::from("seeing what is opened (strace)"));
    }
    for (name, kind) in [
        ("fifo", "a FIFO"),
        ("tape", "a device"),
        ("link", "a device"),
        ("socket", "a socket"),
        ("directory", "a directory"),
    ] {
        let path = at(name);
        for verb in [
            &["show"][..],
            &["pin"],
            &["pin", "--prepare"],
            &["prepare"],
            &["prepare", "--size", "1M"],
        ] {
            let trace = at("trace");
            let mut command = Command::new("timeout");
            command.arg("20");
            if traced {
                command.args(["strace", "-f", "-e", "trace=open,openat,openat2", "-o"]);
                command.arg(&trace);
            }
            command.arg(BINARY).args(verb).arg(&path);
            command.env("MAPDIRECT_SOCKET", guard.socket());
            let said = command.output().unwrap();
            let text = flat(&said);
            assert_eq!(said.status.code(), Some(1), "{verb:?} {name}: {text}");
            let words = format!(": it is {kind}, not a regular file");
            assert!(text.ends_with(&words), "{verb:?} {name}: {text}");
            if !traced {
                continue;
            }
            let trace = std::fs::read_to_string(&trace).unwrap();
            let mut opens = trace
                .lines()
                .filter(|line| line.contains(path.to_str().unwrap()))
                .peekable();
            assert!(opens.peek().is_some(), "{trace}");
            assert!(opens.all(|line| line.contains("O_PATH")), "{trace}");
        }
    }
    world.count("kinds of files that are not opened", 5);
}

/// Whoever has closed, filled or limited something is told.
pub(super) fn limits(world: &World) {
    let guard = world.guard();
    let path = crate::world::written(&world.disk(Kind::EXT4), "words-limits", 65536);
    let name = path.to_str().unwrap();
    let shell = |limit: &str, verb: &str| {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("{limit}; exec \"$0\" {verb}"), BINARY]);
        command.env("MAPDIRECT_SOCKET", guard.socket());
        let said = command.output().unwrap();
        (said.status.code(), flat(&said))
    };
    let closed = "mapdirect: cannot write to standard output: Bad file descriptor";
    for verb in [
        "status",
        "doctor --json",
        "--help",
        &format!("show {name}"),
        &format!("pin {name}"),
    ] {
        assert_eq!(
            shell("exec >&-", verb),
            (Some(1), closed.to_owned()),
            "{verb}"
        );
    }
    let (status, said) = shell("exec >&-", &format!("pin {name} -- true"));
    assert_eq!((status, &*said), (Some(0), ""));
    let large = "mapdirect: cannot write to standard output: File too large";
    let scratch = ScratchDirectory::new("limits").unwrap();
    let file = scratch.path().join("out").display().to_string();
    for verb in ["status", "--help"] {
        let (status, said) = shell(&format!("ulimit -f 0; exec >{file}"), verb);
        assert_eq!((status, &*said), (Some(1), large), "{verb}");
    }
    let (status, said) = shell("ulimit -f 0", "log");
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("help: raise the limit (ulimit -f)"), "{said}");
    // What it executes finds signals as they were.
    let (status, _) = shell("true", &format!("pin {name} -- sh -c 'kill -XFSZ $$'"));
    assert_eq!(status, Some(128 + 25));
    for (descriptors, verb, expected, words) in [
        (
            4,
            format!("arm {name} --allow-uid 1"),
            1,
            "a socket for the guard failed: Too many open files",
        ),
        (4, format!("pin {name} -- true"), 125, "Too many open files"),
        (4, String::from("log"), 1, "too many files open"),
    ] {
        let (status, said) = shell(&format!("ulimit -n {descriptors}"), &verb);
        assert_eq!(status, Some(expected), "{verb}: {said}");
        assert!(said.contains(words), "{verb}: {said}");
    }
    let (status, said) = shell("true", "unpin 999");
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("there is no pin 999"), "{said}");
    let (status, said) = shell("true", &format!("disarm {name}"));
    assert_eq!(status, Some(1), "{said}");
    // A terminal that cannot show it.
    for terminal in ["TERM=dumb", "-u TERM"] {
        let script = format!("env {terminal} {BINARY} top");
        let said = Command::new("timeout")
            .args(["20", "script", "-qec", &script, "/dev/null"])
            .env("MAPDIRECT_SOCKET", guard.socket())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert_eq!(said.status.code(), Some(2), "{said:?}");
        assert!(
            flat(&said).contains("TERM is not set, or is dumb"),
            "{said:?}"
        );
        assert!(!said.stdout.contains(&0x1b), "{said:?}");
    }
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// Terminals of every size, while somebody types and changes it.
pub(super) fn sizes(world: &World) {
    let guard = world.guard();
    let said = Command::new("python3")
        .args(["-c", include_str!("sizes.py"), BINARY])
        .env("MAPDIRECT_SOCKET", guard.socket())
        .env("TERM", "xterm")
        .output()
        .unwrap();
    assert!(said.status.success(), "{said:?}");
    world.count("terminals of odd sizes under top", 10);
}
