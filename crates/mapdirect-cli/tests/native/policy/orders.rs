//! Limits, time, and what root orders.

use super::*;
use mapdirect_testkit::contract::Gate;
use std::process::Command;

fn mapdirect(setting: &Setting, arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(BINARY)
        .env("COLUMNS", "1000")
        .args(arguments)
        .env("MAPDIRECT_SOCKET", setting.guard.socket())
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.code(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

/// Pins and bytes of one user.
pub(super) fn limits(world: &World) {
    let more = "pins = 2\nbytes = \"96K\"";
    let setting = Setting::new(world, Kind::XFS, "limits", more);
    let path = setting.file("a", 0o666);
    let mut asking = setting.nobody();
    asking.holds("pin", &path);
    let words = "rule \"main\" allows 98304 pinned bytes, user 65534 has 65536";
    asking.is_refused("pin", &path, Errno::AGAIN, "limit", words);
    // Another process of the same user shares the limits.
    let mut other = setting.nobody();
    other.is_refused("pin", &path, Errno::AGAIN, "limit", words);
    assert_eq!(asking.says("let-go"), "gone");
    crate::world::wait_until_free(&path);
    other.holds("pin", &path);
    // Root is not counted.
    let guard = setting.guard.client();
    let file = mapdirect::open(&path, &guard).unwrap();
    drop(crate::world::pin(&guard, &file, 0..65536));
}

/// When the time is over the pin ends, its holder is told, and anybody may do
/// what the pin refused.
pub(super) fn time_is_over(world: &World) {
    for how in ["pin", "pin-read-only", "map"] {
        let setting = Setting::new(world, Kind::XFS, "time", "seconds = 2");
        let path = setting.file("a", 0o666);
        let mut asking = setting.nobody();
        let id = asking.holds(how, &path);
        assert!(crate::world::is_pinned(&path));
        wait_for(Duration::from_secs(2) + patience(), || {
            Ok(asking.says("state").starts_with("lost:").then_some(()))
        })
        .unwrap();
        let state = asking.says("state");
        assert!(state.contains("the time that the policy allows"), "{state}");
        assert!(state.contains("rule \"main\""), "{state}");
        crate::world::wait_until_free(&path);
        let status = setting.guard.client().status().unwrap();
        assert!(
            status
                .files
                .iter()
                .all(|file| file.pins.iter().all(|pin| pin.pin != id))
        );
        // The former holder still has it open, which is no pin.
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(0)
            .unwrap();
        assert_eq!(asking.says("let-go"), "gone");
        std::fs::write(&path, vec![1; 65536]).unwrap();
        asking.holds("pin", &path);
    }
}

/// The policy is read again at SIGHUP; a wrong one changes nothing.
pub(super) fn read_again(world: &World) {
    let setting = Setting::new(world, Kind::XFS, "again", "");
    let path = setting.file("a", 0o666);
    let mut asking = setting.nobody();
    asking.holds("pin", &path);
    let good = rule("main", &setting.place, "write", "");
    let said = setting.read_again(&good.replace("access", "acces"));
    let place = format!(
        "SIGHUP: {}:5:1: unknown field `acces`",
        setting.path().display()
    );
    assert!(said.contains(&place), "{said}");
    let status = setting.guard.client().status().unwrap().policy.unwrap();
    assert_eq!(status.rules, 1);
    assert!(status.error.contains(":5:1:"), "{status:?}");
    // The old one still holds.
    asking.holds("pin", &path);
    allow(&setting.path(), 0o666);
    let said = setting.read_again(&good);
    assert!(said.contains("may write to it"), "{said}");
    allow(&setting.path(), 0o644);
    let said = setting.read_again("# nothing\n");
    assert!(said.contains("0 rules; 2 pins stay"), "{said}");
    // Pins stay, and nothing new is granted.
    assert_eq!(asking.says("state"), "Kept; Kept");
    assert!(crate::world::is_pinned(&path));
    asking.is_refused("pin", &path, Errno::ACCESS, "not-capable", "");
    assert_eq!(
        setting
            .guard
            .client()
            .status()
            .unwrap()
            .policy
            .unwrap()
            .error,
        ""
    );
    // At the start a wrong policy is an error.
    std::fs::write(setting.path(), "[[rule]]\nname = 7\n").unwrap();
    let policy = setting.path().to_string_lossy().into_owned();
    let socket = setting.policy.path().join("other.sock");
    let socket = socket.to_string_lossy().into_owned();
    let arguments = ["guard", "--socket", &socket, "--policy", &policy];
    let (status, said) = mapdirect(&setting, &arguments);
    assert_eq!(status, Some(1), "{said}");
    assert!(
        said.contains(&format!("{policy}:2:8: invalid type")),
        "{said}"
    );
    let (status, said) = mapdirect(&setting, &["policy", "check", "--policy", &policy]);
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains(":2:8:"), "{said}");
    std::fs::write(setting.path(), &good).unwrap();
    let (status, said) = mapdirect(&setting, &["policy", "check", "--policy", &policy]);
    assert_eq!(status, Some(0), "{said}");
    assert!(said.contains("users 65534 may pin"), "{said}");
    let name = path.to_string_lossy().into_owned();
    let check = |user: &str, name: &str| {
        let arguments = ["policy", "check", "--policy", &policy, "--as", user, name];
        mapdirect(&setting, &arguments)
    };
    assert_eq!(check("65534", &name).0, Some(0));
    let (status, said) = check("1", &name);
    assert!(
        status == Some(1) && said.contains("no rule names user 1"),
        "{said}"
    );
    allow(&path, 0o600);
    let (status, said) = check("65534", &name);
    assert!(status == Some(1) && said.contains("may not open"), "{said}");
}

/// A permission for a while: for the file itself and for a part of it.
pub(super) fn armed(world: &World) {
    let setting = Setting::new(world, Kind::XFS, "armed", "");
    setting.read_again("");
    let path = setting.file("a", 0o666);
    let name = path.to_string_lossy().into_owned();
    let mut asking = setting.nobody();
    asking.is_refused("pin", &path, Errno::ACCESS, "not-capable", "");
    let arm = |more: &[&str]| {
        let words: Vec<&str> = ["arm", &name].iter().chain(more).copied().collect();
        mapdirect(&setting, &words)
    };
    let (status, said) = arm(&["--allow-uid", "65534", "--seconds", "3600"]);
    assert_eq!(status, Some(0), "{said}");
    let (_, said) = mapdirect(&setting, &["status"]);
    assert!(
        said.contains(&format!("armed: {name} for user 65534")),
        "{said}"
    );
    asking.holds("pin", &path);
    let (_, shown) = mapdirect(&setting, &["status", "--json"]);
    let shown = serde_json::from_str(&shown).unwrap();
    crate::extents::schemas::validate(world, &[("status", shown)]);
    // The file itself is meant, whatever its name.
    let moved = setting.disk.path("policy-armed-moved");
    std::fs::rename(&path, &moved).unwrap();
    asking.holds("pin", &moved);
    std::fs::rename(&moved, &path).unwrap();
    let other = setting.file("b", 0o666);
    asking.is_refused("pin", &other, Errno::ACCESS, "policy", "not armed");
    let (status, said) = mapdirect(&setting, &["disarm", &name]);
    assert_eq!(status, Some(0), "{said}");
    asking.is_refused("pin", &path, Errno::ACCESS, "not-capable", "");
    assert_eq!(asking.says("state"), "Kept; Kept", "granted pins stay");
    asking.says("let-go");
    crate::world::wait_until_free(&path);
    let (status, said) = mapdirect(&setting, &["disarm", &name]);
    assert!(status == Some(1) && said.contains("not armed"), "{said}");
    // A group, and a part.
    assert_eq!(
        arm(&["--allow-gid", "65534", "--range", "0:32K"]).0,
        Some(0)
    );
    let words = "bytes 0 to 32768 of the file are armed";
    asking.is_refused("pin", &path, Errno::ACCESS, "policy", words);
    // The time ends by itself.
    assert_eq!(arm(&["--allow-gid", "65534", "--seconds", "1"]).0, Some(0));
    std::thread::sleep(Duration::from_millis(1200));
    asking.is_refused("pin", &path, Errno::ACCESS, "not-capable", "");
    assert_eq!(arm(&["--allow-uid", "65534", "--seconds", "0"]).0, Some(2));
    // The next file with the same name is another.
    assert_eq!(arm(&["--allow-uid", "65534"]).0, Some(0));
    std::fs::remove_file(&path).unwrap();
    let again = setting.file("a", 0o666);
    asking.is_refused("pin", &again, Errno::ACCESS, "policy", "not armed");
    // Who lacks the capability arms nothing.
    let guard = setting.guard.client();
    let file = File::open(&again).unwrap();
    let effective = mapdirect_sys::capget::effective(0).unwrap();
    let refused = std::thread::scope(|scope| {
        scope
            .spawn(|| {
                let immutable = 1 << mapdirect_sys::capget::CAP_LINUX_IMMUTABLE;
                mapdirect_sys::capget::set_effective(effective & !immutable).unwrap();
                guard.arm(&file, mapdirect::Who::User(0), None, 60)
            })
            .join()
            .unwrap()
    });
    assert_eq!(refused.unwrap_err().errno(), ACCESS);
}

const ACCESS: i32 = libc::EACCES;

/// Root ends a pin, whoever holds it.
pub(super) fn unpin(world: &World) {
    let setting = Setting::new(world, Kind::XFS, "unpin", "");
    let path = setting.file("a", 0o666);
    let guard = setting.guard.client();
    for (who, how) in [
        ("nobody", "pin"),
        ("nobody", "map"),
        ("root", "map"),
        ("root", "pin"),
    ] {
        let mut asking = setting.asking(&[who]);
        let id = asking.holds(how, &path);
        let other = asking.holds(how, &path);
        let (status, said) = mapdirect(&setting, &["unpin", &id.to_string()]);
        assert_eq!(status, Some(0), "{said}");
        let expected = "lost: root has ended it (mapdirect unpin); Kept";
        wait_for(patience(), || {
            Ok((asking.says("state") == expected).then_some(()))
        })
        .unwrap();
        assert!(crate::world::is_pinned(&path), "the other pin");
        assert_eq!(mapdirect(&setting, &["unpin", &id.to_string()]).0, Some(1));
        guard.unpin(other).unwrap();
        crate::world::wait_until_free(&path);
        // Nothing is left that refuses, though the holder lives.
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(4096)
            .unwrap();
        assert_eq!(asking.says("let-go"), "gone");
        assert_eq!(asking.0.finish().unwrap(), Some(0));
        std::fs::write(&path, vec![1; 65536]).unwrap();
        // The next pin is like any other, and ends like any other.
        drop(crate::world::pin(&guard, &open(&path), 0..65536));
        crate::world::wait_until_free(&path);
    }
    assert_eq!(guard.unpin(u64::MAX).unwrap_err().errno(), libc::ENOENT);
}

/// A user whom the policy names asks as fast as it can; root's pins are granted.
pub(super) fn storm(world: &World) {
    let setting = Setting::new(world, Kind::XFS, "storm", "pins = 4");
    let path = setting.file("a", 0o666);
    let other = setting.file("b", 0o600);
    let mut storms = [setting.nobody(), setting.nobody()];
    for storm in &mut storms {
        storm.holds("storm", &path);
    }
    let limit = if Gate::under_test() == Gate::Bpf {
        Duration::from_secs(20)
    } else {
        Duration::from_secs(3)
    };
    for _ in 0..10 {
        let begun = Instant::now();
        drop(crate::world::pin(
            &setting.guard.client(),
            &open(&other),
            0..65536,
        ));
        let took = begun.elapsed();
        assert!(took < limit, "{took:?}");
    }
    assert!(setting.guard.client().status().is_ok());
    for storm in storms {
        storm.0.kill().unwrap();
    }
    // What was under way when they were killed is counted no more.
    crate::world::wait_until_free(&path);
    let mut asking = setting.nobody();
    wait_for(patience(), || {
        let said = asking.says(&format!("pin {}", path.display()));
        Ok(said.starts_with("held").then_some(()))
    })
    .unwrap();
    for _ in 1..4 {
        asking.holds("pin", &path);
    }
    asking.is_refused("pin", &path, Errno::AGAIN, "limit", "allows 4 pins");
}
