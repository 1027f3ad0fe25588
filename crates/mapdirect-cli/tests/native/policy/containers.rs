//! Holders in other namespaces, which reach the guard by its socket.

use super::*;
use mapdirect_testkit::process::HELPER;
use std::process::Command;

/// All namespaces that `unshare(1)` makes, but for that of users.
const NAMESPACES: &[&str] = &[
    "--mount",
    "--uts",
    "--ipc",
    "--net",
    "--pid",
    "--cgroup",
    "--time",
    "--boottime",
    "1000000",
    "--fork",
    "--mount-proc",
    "--kill-child",
];

/// A program in namespaces of its own.
fn inside(setting: &Setting, more: &[&str], how: &str) -> Asking {
    let mut command = Command::new("unshare");
    command
        .args(more)
        .args(NAMESPACES)
        .arg(std::env::current_exe().unwrap());
    command
        .args([HELPER, "asks-by-policy"])
        .arg(setting.guard.socket())
        .arg(how);
    Asking::of(Helper::spawn(command).unwrap())
}

/// Where this machine lets nobody make such namespaces, that is said.
fn can_be_made(world: &World, more: &[&str]) -> bool {
    let mut command = Command::new("unshare");
    let made = command.args(more).args(NAMESPACES).arg("true").output();
    let why = match made {
        Ok(output) if output.status.success() => return true,
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        Err(error) => error.to_string(),
    };
    world.unavailable(format!("namespaces for containers: {why}"));
    false
}

/// Root in other PID, time and mount namespaces, but in the initial one of users,
/// is as root: it proves its capability by the numbers of its own namespace.
pub(super) fn privileged(world: &World) {
    if !can_be_made(world, &[]) {
        return;
    }
    let setting = Setting::new(world, Kind::XFS, "privileged", "");
    setting.read_again("");
    let path = setting.file("a", 0o600);
    let mut asking = inside(&setting, &[], "root");
    for how in ["pin", "map", "pin-read-only"] {
        asking.holds(how, &path);
        assert!(crate::world::is_pinned(&path), "{how}");
        let status = setting.guard.client().status().unwrap();
        let pin = &status.files[0].pins[0];
        assert!(pin.delegated.is_none());
        // The host's numbers are shown.
        let command = mapdirect_sys::proc::command(pin.pid);
        assert!(command.starts_with("native"), "{command}");
        assert_ne!(pin.pid, 1);
        assert_eq!(status.files[0].path, path.display().to_string());
        asking.holds("open", &path);
        assert_eq!(asking.says("let-go"), "gone");
        crate::world::wait_until_free(&path);
    }
    // A holder that is killed lets go.
    asking.holds("map", &path);
    asking.0.kill().unwrap();
    crate::world::wait_until_free(&path);
}

/// In a user namespace only the policy allows anything, by the ids that the host
/// sees.
pub(super) fn containers(world: &World) {
    let as_root = ["--user", "--map-root-user"];
    if !can_be_made(world, &as_root) {
        return;
    }
    let setting = Setting::new(world, Kind::XFS, "containers", "");
    let path = setting.file("a", 0o666);
    // An unprivileged user who is root in a namespace of its own. The binary of
    // the tests is made by root, and must be there for everybody.
    let unprivileged = |how| {
        let mut command = Command::new("setpriv");
        let nobody = NOBODY.to_string();
        command.args([
            "--reuid",
            &nobody,
            "--regid",
            &nobody,
            "--clear-groups",
            "unshare",
        ]);
        command
            .args(as_root)
            .args(NAMESPACES)
            .arg(std::env::current_exe().unwrap());
        command
            .args([HELPER, "asks-by-policy"])
            .arg(setting.guard.socket())
            .arg(how);
        Asking::of(Helper::spawn(command).unwrap())
    };
    let mut asking = unprivileged("root");
    for how in ["pin", "map"] {
        asking.holds(how, &path);
        let status = setting.guard.client().status().unwrap();
        let pin = &status.files[0].pins[0];
        assert_eq!(
            (pin.uid, status.files[0].path.clone()),
            (NOBODY, path.display().to_string())
        );
        assert_eq!(pin.delegated.as_ref().unwrap().rule, "main");
        assert!(crate::world::is_pinned(&path));
        asking.says("let-go");
        crate::world::wait_until_free(&path);
    }
    // What it may not open stays closed to it, though it is root there.
    allow(&path, 0o644);
    let said = asking.says(&format!("pin {}", path.display()));
    assert!(said.contains("not opened"), "{said}");
    allow(&path, 0o666);
    // Without a rule it is nobody.
    setting.read_again("");
    let words = "CAP_LINUX_IMMUTABLE in the initial user namespace";
    asking.is_refused("pin", &path, Errno::ACCESS, "not-capable", words);
    asking.0.kill().unwrap();
    // The host's root, as root of a user namespace, has no capability that counts.
    let mut asking = inside(&setting, &as_root, "root");
    asking.is_refused("pin", &path, Errno::ACCESS, "not-capable", words);
    asking.0.kill().unwrap();
    // What a mount namespace calls a file does not matter: the policy names the
    // directory, and the file is elsewhere on the host.
    setting.read_again(&rule("main", &setting.place, "write", ""));
    let elsewhere = setting.disk.path("policy-elsewhere");
    let _ = std::fs::remove_dir_all(&elsewhere);
    std::fs::create_dir(&elsewhere).unwrap();
    std::fs::write(elsewhere.join("a"), vec![1; 65536]).unwrap();
    allow(&elsewhere.join("a"), 0o666);
    let under = |from: &Path, to: &Path| {
        let script = format!(
            "mount --bind {} {} && exec \"$0\" \"$@\"",
            from.display(),
            to.display()
        );
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "sh", "-c", &script])
            .arg(std::env::current_exe().unwrap());
        command
            .args([HELPER, "asks-by-policy"])
            .arg(setting.guard.socket())
            .arg("nobody");
        Asking::of(Helper::spawn(command).unwrap())
    };
    let mut asking = under(&elsewhere, &setting.place);
    asking.is_refused("pin", &path, Errno::ACCESS, "policy", "covers");
    drop(asking);
    // The other way round, the host's name counts.
    let mut asking = under(&setting.place, &elsewhere);
    asking.holds("pin", &elsewhere.join("a"));
    let status = setting.guard.client().status().unwrap();
    assert_eq!(status.files[0].path, path.display().to_string());
    drop(asking);
    std::fs::remove_dir_all(&elsewhere).unwrap();
}
