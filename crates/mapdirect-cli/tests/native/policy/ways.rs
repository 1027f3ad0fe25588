//! The other ways to pin, by the policy: strengths, denials, families, `run`, and
//! across a restart of the guard.

use super::*;
use mapdirect_testkit::contract::Gate;
use std::process::Command;

/// Everything that a pin can be, as far as a rule lets it.
pub(super) fn strength_and_denials(world: &World) {
    let setting = Setting::new(world, Kind::XFS, "ways", "pins = 3");
    let path = setting.file("a", 0o666);
    let mut asking = setting.nobody();
    for how in ["pin-stable", "pin-growth", "pin-family"] {
        let id = asking.holds(how, &path);
        assert!(crate::world::is_pinned(&path), "{how}");
        let status = setting.guard.client().status().unwrap();
        let pin = &status.files[0].pins[0];
        assert_eq!(pin.pin, id);
        assert_eq!(pin.delegated.as_ref().unwrap().rule, "main", "{how}");
        asking.says("let-go");
        crate::world::wait_until_free(&path);
    }
    // The guard hears of the end of a pin a moment later than whoever may open the
    // file again, and its holder still counts as one until then.
    wait_for(patience(), || {
        let status = setting.guard.client().status()?;
        Ok(status.files.is_empty().then_some(()))
    })
    .unwrap();
    // Its own pin gives way, to itself; nobody else's does.
    asking.is_refused("give-way", &path, Errno::ACCESS, "not-capable", "");
    asking.holds("pin-growth", &path);
    let mut other = setting.nobody();
    other.is_refused("give-way", &path, Errno::ACCESS, "not-capable", "");
    let elsewhere = setting.file("b", 0o666);
    other.holds("pin-growth", &elsewhere);
    other.is_refused(
        "give-way",
        &path,
        Errno::TXTBSY,
        "frozen-blocks",
        "pinned, too",
    );
    assert_eq!(path.metadata().unwrap().len(), 65536);
    assert_eq!(
        asking.says(&format!("give-way {}", path.display())),
        "held 0"
    );
    assert_eq!(path.metadata().unwrap().len(), 4096);
    assert_eq!(asking.says("state"), "Kept");
    assert!(crate::world::is_pinned(&path));
    drop((asking, other));
    crate::world::wait_until_free(&path);
    let path = setting.file("c", 0o666);
    // What others could do but for a denial takes a word of the rule.
    let mut asking = setting.nobody();
    for (how, what) in [("pin-deny-write", "write"), ("pin-deny-rename", "rename")] {
        let words = format!("lets no pin deny others to {what}");
        asking.is_refused(how, &path, Errno::ACCESS, "policy", &words);
    }
    let denies = "deny = [\"write\", \"rename\"]";
    setting.read_again(&rule("main", &setting.place, "write", denies));
    asking.holds("pin-deny-write", &path);
    let opened = File::options().write(true).open(&path);
    assert_eq!(opened.unwrap_err().raw_os_error(), Some(libc::ETXTBSY));
    asking.says("let-go");
    crate::world::wait_until_free(&path);
    asking.holds("pin-deny-rename", &path);
    asking.says("let-go");
    crate::world::wait_until_free(&path);
    // What follows the growth of a file has no number of bytes.
    setting.read_again(&rule("main", &setting.place, "write", "bytes = \"1G\""));
    let words = "this range has no end";
    asking.is_refused("pin-growth", &path, Errno::AGAIN, "limit", words);
    asking.holds("pin-stable", &path);
}

/// `mapdirect run` as a user without any right.
pub(super) fn run(world: &World) {
    let setting = Setting::new(world, Kind::XFS, "run", "seconds = 3");
    let path = setting.file("a", 0o666);
    let mut running = supervised(
        &setting,
        &["setpriv", "--reuid=65534", "--clear-groups"],
        &path,
    );
    assert_eq!(running.hear().unwrap(), "mapped");
    assert!(crate::world::is_pinned(&path));
    let status = setting.guard.client().status().unwrap();
    let pin = &status.files[0].pins[0];
    assert_eq!(
        (pin.uid, &*pin.delegated.as_ref().unwrap().rule),
        (NOBODY, "main")
    );
    running.tell("look").unwrap();
    assert_eq!(running.hear().unwrap(), "alive");
    // When the time is over the program goes on, and anybody may do what the
    // pin refused.
    wait_for(Duration::from_secs(3) + patience(), || {
        Ok((!crate::world::is_pinned(&path)).then_some(()))
    })
    .unwrap();
    running.tell("look").unwrap();
    assert_eq!(running.hear().unwrap(), "alive");
    assert_eq!(running.finish().unwrap(), Some(0));
}

/// A script that maps a file for writing, under `mapdirect run`.
pub(super) fn supervised(setting: &Setting, before: &[&str], path: &Path) -> Helper {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/native/supervised.py");
    let mut words = before.iter();
    let mut command = Command::new(words.next().unwrap());
    command
        .args(words)
        .arg(BINARY)
        .args(["run", "--strict", "--files"])
        .arg(setting.place.join("**"))
        .args(["--", "python3"])
        .arg(script)
        .arg(path)
        .arg("r+")
        .env("MAPDIRECT_SOCKET", setting.guard.socket());
    Helper::spawn(command).unwrap()
}

/// What a guard leaves behind with the bpf gate keeps its limits, its time, and
/// what was taken away.
pub(super) fn next_guard(world: &World) {
    if Gate::under_test() != Gate::Bpf {
        world.unavailable(String::from(
            "policy::next-guard: pins outlive no guard of fanotify",
        ));
        return;
    }
    let mut setting = Setting::new(world, Kind::XFS, "next", "pins = 2");
    let [brief, taken, other, path] = ["brief", "a", "b", "c"].map(|it| setting.file(it, 0o666));
    let rules = [
        rule("brief", &brief, "write", "seconds = 20"),
        rule("main", &setting.place, "write", "pins = 2"),
    ];
    setting.read_again(&rules.concat());
    let mut asking = setting.nobody();
    let begun = Instant::now();
    asking.holds("pin", &brief);
    let id = asking.holds("pin-stable", &taken);
    setting.guard.client().unpin(id).unwrap();
    crate::world::wait_until_free(&taken);
    let id = asking.holds("pin-growth", &other);
    asking.holds("pin", &path);
    setting.guard.kill().unwrap();
    assert!(crate::world::is_pinned(&path) && crate::world::is_pinned(&other));
    assert!(!crate::world::is_pinned(&taken));
    setting.guard.start_again(Path::new(BINARY)).unwrap();
    wait_for(patience(), || {
        Ok(asking.says("state").ends_with("; Kept; Kept").then_some(()))
    })
    .unwrap();
    assert!(!crate::world::is_pinned(&taken));
    let mut nobody = setting.nobody();
    nobody.is_refused("pin", &taken, Errno::AGAIN, "limit", "allows 2 pins");
    // It ends what the other one granted: by order, and in time.
    setting.guard.client().unpin(id).unwrap();
    crate::world::wait_until_free(&other);
    let mut state = String::new();
    wait_for(Duration::from_secs(20) + patience(), || {
        state = asking.says("state");
        let over = state.starts_with("lost: the time that the policy allows");
        Ok(over.then_some(()))
    })
    .unwrap_or_else(|error| panic!("{error}: {state}"));
    assert!(begun.elapsed() >= Duration::from_secs(19));
    crate::world::wait_until_free(&brief);
    nobody.holds("pin", &taken);
    drop((asking, nobody));
    crate::world::wait_until_free(&path);
    crate::world::wait_until_free(&taken);
}
