//! Characters, widths, columns, and where the words go.

use super::{flat, mapdirect, output};
use crate::extents::schemas::validate;
use crate::world::{BINARY, World, open, wait_until_free, written};
use mapdirect_sys::names;
use mapdirect_sys::signal::{self, Signal};
use mapdirect_testkit::Kind;
use mapdirect_testkit::process::{Helper, wait_for};
use serde_json::Value;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Names that a terminal would obey, or that are no text.
const ODD: [&[u8]; 5] = [
    b"new\nline",
    b"\x1b[31mred\x1b[2J",
    "right\u{202e}left".as_bytes(),
    b"bytes\xff\xfe",
    b"$'quoted'",
];

fn odd_files(world: &World, of: &str) -> Vec<PathBuf> {
    let disk = world.disk(Kind::XFS);
    let make = |name: &&[u8]| {
        let name = [of.as_bytes(), *name].concat();
        let path = disk.root().join(OsStr::from_bytes(&name));
        std::fs::write(&path, [7; 8192]).unwrap();
        File::open(&path).unwrap().sync_all().unwrap();
        path
    };
    ODD.iter().map(make).collect()
}

/// Holds pins of files for as long as it lives.
fn holder(socket: &Path, files: &[PathBuf]) -> Helper {
    let mut arguments: Vec<&OsStr> = vec![OsStr::new("pin")];
    arguments.extend(files.iter().map(|file| file.as_os_str()));
    arguments.extend(["--patience", "5000"].map(OsStr::new));
    let mut pin = Helper::spawn(mapdirect(socket, &arguments)).unwrap();
    while pin.hear().unwrap() != "held until SIGINT or SIGTERM" {}
    pin
}

fn let_go(pin: Helper, files: &[PathBuf]) {
    signal::kill(pin.pid(), Signal::TERMINATE).unwrap();
    pin.finish().unwrap();
    for file in files {
        wait_until_free(file);
        std::fs::remove_file(file).unwrap();
    }
}

/// Nothing but text reaches a terminal, and the name can be read from it.
pub(super) fn names(world: &World) {
    let guard = world.guard();
    let files = odd_files(world, "words-names-");
    let pin = holder(guard.socket(), &files);
    let refused = Command::new("truncate")
        .args(["-s", "0"])
        .args(&files)
        .stderr(Stdio::null())
        .status();
    assert!(!refused.unwrap().success());
    let all: Vec<&OsStr> = files.iter().map(|file| file.as_os_str()).collect();
    let with = |verb: &str, more: &[&str]| {
        let mut words: Vec<&OsStr> = vec![OsStr::new(verb)];
        words.extend(&all);
        words.extend(more.iter().map(OsStr::new));
        output(guard.socket(), &words)
    };
    for (what, said) in [
        ("show", with("show", &[])),
        ("show columns", with("show", &["-o", "offset,file"])),
        ("status", with("status", &[])),
        ("status columns", with("status", &["-o", "file,pin"])),
        ("refused", with("pin", &["--range", "1G:"])),
        (
            "refused",
            with("pin", &["--require-stable", "--range", "1G:1"]),
        ),
    ] {
        let bytes = [said.stdout, said.stderr].concat();
        let text = String::from_utf8(bytes).unwrap();
        for character in text.chars() {
            let is_shown = character == '\n' || !names::is_deceptive(character);
            assert!(is_shown, "{what}: {character:?} in {text}");
        }
        let flat: String = text.split_whitespace().collect();
        // An error is about one of them.
        let is_named = files.iter().any(|file| {
            let quoted = names::quoted(file.as_os_str());
            flat.contains(&quoted.split_whitespace().collect::<String>())
        });
        assert!(is_named, "{what}: {text}");
    }
    let_go(pin, &files);
}

/// Not a byte of a name is lost.
pub(super) fn names_in_json(world: &World) {
    let guard = world.guard();
    let files = odd_files(world, "words-json-");
    let pin = holder(guard.socket(), &files);
    let original = |value: &Value| {
        let name = names::unquoted(value["file"].as_str().unwrap()).unwrap();
        PathBuf::from(name)
    };
    let said = output(guard.socket(), &["status", "--json"]);
    let status: Value = serde_json::from_slice(&said.stdout).unwrap();
    let named: Vec<_> = status["files"]
        .as_array()
        .unwrap()
        .iter()
        .map(original)
        .collect();
    let mut documents = vec![("status", status)];
    for file in &files {
        assert!(named.contains(file), "{file:?} is not in {named:?}");
        let words: [&OsStr; 3] = [OsStr::new("show"), file.as_os_str(), OsStr::new("--json")];
        let said = output(guard.socket(), &words);
        let shown: Value = serde_json::from_slice(&said.stdout).unwrap();
        assert_eq!(&original(&shown), file);
        documents.push(("show", shown));
    }
    validate(world, &documents);
    // What the schema says of names is true in Python, too.
    let name = names::name(files[3].as_os_str());
    let script =
        "import ast, os, sys; sys.stdout.buffer.write(ast.literal_eval('b' + sys.argv[1][1:]))";
    let read = Command::new("python3")
        .args(["-c", script, &name])
        .output()
        .unwrap();
    assert_eq!(OsString::from_vec(read.stdout), *files[3].as_os_str());
    let_go(pin, &files);
}

/// A locale without UTF-8 gets ASCII.
pub(super) fn locales(world: &World) {
    let guard = world.guard();
    let disk = world.disk(Kind::EXT4);
    let path = written(&disk, "words-\u{e5}", 65536);
    let name = path.to_str().unwrap();
    let said = |arguments: &[&str], locale: &[(&str, &str)]| {
        let mut command = mapdirect(guard.socket(), arguments);
        command.env_remove("LC_ALL").envs(locale.iter().copied());
        command.output().unwrap().stdout
    };
    for locale in [
        &[("LC_ALL", "C")][..],
        &[("LC_ALL", "POSIX"), ("LANG", "C.UTF-8")],
        &[("LANG", "de_DE.ISO-8859-1")],
        &[],
    ] {
        for arguments in [&["show", name][..], &["status"], &["doctor"], &["--help"]] {
            let said = said(arguments, locale);
            assert!(
                !said.is_empty() && said.is_ascii(),
                "{arguments:?} {locale:?}"
            );
        }
    }
    for locale in [("LC_ALL", "C.UTF-8"), ("LANG", "en_US.utf8")] {
        let said = String::from_utf8(said(&["show", name], &[locale])).unwrap();
        assert!(said.contains('\u{2588}') && said.contains(name), "{said}");
    }
    // Programs read the same in every locale.
    let json = ["show", name, "--json"];
    assert_eq!(
        said(&json, &[("LC_ALL", "C")]),
        said(&json, &[("LC_ALL", "C.UTF-8")])
    );
    std::fs::remove_file(&path).unwrap();
}

/// No line is wider than it may be, unless a word is.
pub(super) fn widths(world: &World) {
    let guard = world.guard();
    let disk = world.disk(Kind::XFS);
    let path = written(&disk, "words-widths", 3 << 20);
    open(&path).set_len(5 << 20).unwrap();
    let pin = holder(guard.socket(), std::slice::from_ref(&path));
    let name = path.to_str().unwrap();
    for (columns, width) in [
        (None, 80),
        (Some("50"), 50),
        (Some("132"), 132),
        (Some("x"), 80),
    ] {
        for arguments in [&["show", name][..], &["status"], &["doctor"]] {
            let mut command = mapdirect(guard.socket(), arguments);
            command.envs(columns.map(|columns| ("COLUMNS", columns)));
            let said = String::from_utf8(command.output().unwrap().stdout).unwrap();
            for line in said.lines() {
                let words = line.split_whitespace().count();
                let fits = line.chars().count() <= width || words == 1;
                assert!(fits, "{arguments:?} at {width}: {line:?}");
            }
        }
    }
    let_go(pin, std::slice::from_ref(&path));
}

pub(super) fn one_and_many(world: &World) {
    let guard = mapdirect_testkit::process::GuardProcess::start(Path::new(BINARY)).unwrap();
    let disk = world.disk(Kind::XFS);
    let path = written(&disk, "words-one", 65536);
    let pin = holder(guard.socket(), std::slice::from_ref(&path));
    let said = flat(&output(guard.socket(), &["status"]));
    assert!(said.contains("pins: 1 on 1 file "), "{said}");
    assert!(said.contains(", 1 descriptor"), "{said}");
    let_go(pin, std::slice::from_ref(&path));
    let said = flat(&output(guard.socket(), &["status"]));
    assert!(said.contains("pins: 0 on 0 files "), "{said}");
    for (size, words) in [
        (0, "0 bytes,"),
        (1, "1 byte,"),
        (4096, "4 KiB (4096 bytes),"),
    ] {
        let path = written(&disk, "words-size", size);
        let said = flat(&output(guard.socket(), &["show", path.to_str().unwrap()]));
        assert!(said.contains(words), "{said}");
        assert!(size == 0 || said.contains("1 extent: "), "{said}");
        std::fs::remove_file(&path).unwrap();
    }
}

/// One that fails does not stop the others.
pub(super) fn several_files(world: &World) {
    let guard = world.guard();
    let disk = world.disk(Kind::EXT4);
    let paths = ["words-a", "words-b"].map(|name| written(&disk, name, 65536));
    let [a, b] = paths.each_ref().map(|path| path.to_str().unwrap());
    for more in [
        &[][..],
        &["-o", "offset,length"],
        &["--json"],
        &["--format", "table"],
    ] {
        let arguments = [&["show", a, "/nonexistent", b], more].concat();
        let said = output(guard.socket(), &arguments);
        assert_eq!(said.status.code(), Some(1), "{said:?}");
        let text = String::from_utf8(said.stdout).unwrap();
        let places = [a, b].map(|name| text.find(name));
        assert!(places[0].is_some() && places[0] < places[1], "{text}");
        let complaint = String::from_utf8(said.stderr).unwrap();
        assert_eq!(
            complaint,
            "mapdirect: cannot open /nonexistent: No such file or directory\n"
        );
        let arguments = [&["show", a, b], more].concat();
        assert!(output(guard.socket(), &arguments).status.success());
    }
    let said = output(guard.socket(), &["show", a, b, "--format", "csv"]);
    assert_eq!(said.status.code(), Some(1), "{said:?}");
    assert!(said.stdout.is_empty(), "{said:?}");
    for path in &paths {
        std::fs::remove_file(path).unwrap();
    }
}

/// Whether files are pinned, for scripts.
pub(super) fn status_of_files(world: &World) {
    let guard = world.guard();
    let disk = world.disk(Kind::XFS);
    let paths = ["words-pinned", "words-free"].map(|name| written(&disk, name, 65536));
    let [pinned, free] = paths.each_ref().map(|path| path.to_str().unwrap());
    let pin = holder(guard.socket(), &paths[..1]);
    let link = disk.path("words-link");
    std::os::unix::fs::symlink(&paths[0], &link).unwrap();
    for (files, status) in [
        (&[pinned][..], 0),
        (&[link.to_str().unwrap()], 0),
        (&[free], 1),
        (&[pinned, free], 1),
        (&["/nonexistent"], 1),
        (&[], 0),
    ] {
        let arguments = [&["status"], files].concat();
        let said = output(guard.socket(), &arguments);
        assert_eq!(said.status.code(), Some(status), "{files:?}: {said:?}");
        let json = output(guard.socket(), &[&arguments[..], &["--json"]].concat());
        assert_eq!(json.status.code(), Some(status), "{files:?}");
        let json: Value = serde_json::from_slice(&json.stdout).unwrap();
        let named = json["files"].as_array().unwrap();
        if !files.is_empty() {
            let wanted = usize::from(
                files
                    .iter()
                    .any(|file| *file != free && *file != "/nonexistent"),
            );
            assert_eq!(named.len(), wanted, "{files:?}: {json}");
            let text = String::from_utf8(said.stdout).unwrap();
            let says = format!("{free}: not pinned");
            assert_eq!(text.contains(&says), files.contains(&free), "{text}");
        }
        validate(world, &[("status", json)]);
    }
    let nowhere = output(Path::new("/nonexistent/socket"), &["status", pinned]);
    assert_eq!(nowhere.status.code(), Some(3), "{nowhere:?}");
    std::fs::remove_file(link).unwrap();
    let_go(pin, &paths[..1]);
    std::fs::remove_file(&paths[1]).unwrap();
}

/// Tables for scripts have the columns that are asked for, in that order.
pub(super) fn columns(world: &World) {
    let guard = world.guard();
    let disk = world.disk(Kind::EXT4);
    let path = written(&disk, "words-columns", 65536);
    open(&path).set_len(1 << 20).unwrap();
    let pin = holder(guard.socket(), std::slice::from_ref(&path));
    let name = path.to_str().unwrap();
    let lines = |arguments: &[&str]| -> Vec<Vec<String>> {
        let said = output(guard.socket(), arguments);
        assert!(said.status.success(), "{said:?}");
        let text = String::from_utf8(said.stdout).unwrap();
        let words = |line: &str| line.split_whitespace().map(str::to_owned).collect();
        text.lines().map(words).collect()
    };
    let shown = lines(&["show", name, "--columns", "state,offset,length,stable"]);
    assert_eq!(
        shown,
        [
            ["STATE", "OFFSET", "LENGTH", "STABLE"],
            ["written", "0", "65536", "yes"],
            ["hole", "65536", "983040", "no"],
        ]
    );
    let pid = pin.pid().to_string();
    let shown = lines(&[
        "status",
        name,
        "-n",
        "-o",
        "pid,file,offset,length,strength,state",
    ]);
    assert_eq!(shown, [[&*pid, name, "0", "1048576", "all", "kept"]]);
    for arguments in [
        &["show", name, "-o", "galaxy"][..],
        &["show", name, "-o", "state", "--json"],
        &["status", "-n"],
    ] {
        assert_eq!(output(guard.socket(), arguments).status.code(), Some(2));
    }
    let_go(pin, std::slice::from_ref(&path));
}

/// What cannot be written is an error.
pub(super) fn full_device(world: &World) {
    let guard = world.guard();
    let disk = world.disk(Kind::XFS);
    let path = written(&disk, "words-full", 65536);
    let name = path.to_str().unwrap();
    for arguments in [
        &["show", name][..],
        &["show", name, "--json"],
        &["show", name, "-o", "state"],
        &["show", name, "--format", "csv"],
        &["status"],
        &["status", "--json"],
        &["doctor"],
        &["doctor", "--json"],
        &["prepare", name],
        &["policy", "check", "--policy", "/nonexistent"],
        &["pin", name],
        &["pin", name, "--json"],
        &["--help"],
        &["pin", "--help"],
        &["--version"],
    ] {
        let mut command = mapdirect(guard.socket(), arguments);
        command.stdout(File::options().write(true).open("/dev/full").unwrap());
        let said = command.stderr(Stdio::piped()).output().unwrap();
        assert_eq!(said.status.code(), Some(1), "{arguments:?}: {said:?}");
        assert_eq!(
            String::from_utf8(said.stderr).unwrap(),
            "mapdirect: cannot write to standard output: No space left on device\n",
            "{arguments:?}"
        );
    }
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}

/// A reader that leaves is told nothing, as with other tools.
pub(super) fn closed_pipe(world: &World) {
    let guard = world.guard();
    let disk = world.disk(Kind::XFS);
    let path = written(&disk, "words-closed", 65536);
    let name = path.to_str().unwrap();
    for arguments in [
        &["show", name][..],
        &["status"],
        &["doctor", "--json"],
        &["--help"],
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = mapdirect(guard.socket(), arguments);
        let said = command
            .stdout(writer)
            .stderr(Stdio::piped())
            .output()
            .unwrap();
        assert_eq!(said.status.code(), Some(141), "{arguments:?}");
        assert!(said.stderr.is_empty(), "{said:?}");
    }
    std::fs::remove_file(&path).unwrap();
}

/// Colours are for terminals, and not for those who mind them.
pub(super) fn colours(world: &World) {
    let guard = world.guard();
    let on_terminal = |variables: &[(&str, &str)]| {
        let mut command = Command::new("script");
        let said = command
            .args(["-qec", &format!("{BINARY} doctor"), "/dev/null"])
            .env("MAPDIRECT_SOCKET", guard.socket())
            .env("TERM", "xterm")
            .env("LC_ALL", "C.UTF-8")
            .env_remove("NO_COLOR")
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        String::from_utf8(said.stdout).unwrap()
    };
    assert!(
        on_terminal(&[]).contains("\x1b[32mok"),
        "{}",
        on_terminal(&[])
    );
    assert!(on_terminal(&[("NO_COLOR", "")]).contains('\x1b'));
    for variables in [[("NO_COLOR", "1")], [("TERM", "dumb")], [("TERM", "")]] {
        let said = on_terminal(&variables);
        assert!(said.contains("ok    kernel"), "{said}");
        assert!(!said.contains('\x1b'), "{variables:?}: {said}");
    }
    let said = output(guard.socket(), &["doctor"]).stdout;
    assert!(!said.contains(&0x1b));
}

/// Who waits for others can be stopped at once.
pub(super) fn interrupted(world: &World) {
    let guard = world.guard();
    let disk = world.disk(Kind::XFS);
    let path = written(&disk, "words-interrupted", 65536);
    let name = path.to_str().unwrap();
    open(&path).set_len(1 << 20).unwrap();
    // A mapping that could store to a hole is in the way of a pin under any gate.
    let script = "import mmap, sys, time\n\
                  file = open(sys.argv[1], 'r+b')\n\
                  mapping = mmap.mmap(file.fileno(), 0)\n\
                  print('mapped', flush=True)\n\
                  time.sleep(600)";
    let mut in_the_way = Command::new("python3");
    in_the_way.args(["-c", script, name]);
    let mut in_the_way = Helper::spawn(in_the_way).unwrap();
    assert_eq!(in_the_way.hear().unwrap(), "mapped");
    for more in [&[][..], &["--", "true"]] {
        let arguments = [&["pin", name, "--patience", "30000"], more].concat();
        let mut pin = mapdirect(guard.socket(), &arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let pid = pin.id().cast_signed();
        std::thread::sleep(Duration::from_millis(500));
        assert!(pin.try_wait().unwrap().is_none(), "it did not wait");
        let before = Instant::now();
        signal::kill(pid, Signal::INTERRUPT).unwrap();
        let ended = wait_for(Duration::from_secs(10), || Ok(pin.try_wait().unwrap())).unwrap();
        assert_eq!(ended.code(), Some(128 + Signal::INTERRUPT), "{more:?}");
        assert!(
            before.elapsed() < Duration::from_secs(5),
            "{:?}",
            before.elapsed()
        );
    }
    signal::kill(in_the_way.pid(), Signal::KILL).unwrap();
    in_the_way.finish().unwrap();
    wait_until_free(&path);
    std::fs::remove_file(&path).unwrap();
}
