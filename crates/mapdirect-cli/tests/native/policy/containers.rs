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
    asks_inside(Command::new("unshare"), setting, more, how)
}

/// The same, with a command that ends in `unshare`.
fn asks_inside(mut command: Command, setting: &Setting, more: &[&str], how: &str) -> Asking {
    command
        .args(more)
        .args(NAMESPACES)
        .arg(std::env::current_exe().unwrap())
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
        asks_inside(command, &setting, &as_root, how)
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

/// What `mapdirect run` does in a PID namespace of its own: the number by which it
/// names the root of the family is one of that namespace.
pub(super) fn supervised(world: &World) {
    if !can_be_made(world, &[]) {
        return;
    }
    let setting = Setting::new(world, Kind::XFS, "supervised", "");
    let path = setting.file("a", 0o666);
    let words = ["unshare"].iter().chain(NAMESPACES).copied();
    let as_nobody = ["setpriv", "--reuid=65534", "--clear-groups"];
    let words: Vec<&str> = words.chain(as_nobody).collect();
    let mut running = ways::supervised(&setting, &words, &path);
    assert_eq!(running.hear().unwrap(), "mapped");
    assert!(crate::world::is_pinned(&path));
    let status = setting.guard.client().status().unwrap();
    let pin = &status.files[0].pins[0];
    assert_eq!(
        (pin.uid, &status.files[0].path),
        (NOBODY, &path.display().to_string())
    );
    running.tell("look").unwrap();
    assert_eq!(running.hear().unwrap(), "alive");
    assert_eq!(running.finish().unwrap(), Some(0));
    crate::world::wait_until_free(&path);
}

/// A container with a root directory of its own, made of this machine's programs.
struct Nspawn(ScratchDirectory);

/// The first user of the host who is one of a container's, where it has its own.
const SHIFTED: u32 = 0x20000;

impl Nspawn {
    /// Nothing, and a word why, where there are no such containers.
    fn new(world: &World) -> Option<Self> {
        let root = ScratchDirectory::new("container").unwrap();
        allow(root.path(), 0o755);
        for name in ["usr", "etc", "proc", "sys", "dev", "run", "tmp", "root"] {
            std::fs::create_dir(root.path().join(name)).unwrap();
        }
        for name in ["bin", "sbin", "lib", "lib32", "lib64"] {
            if Path::new("/").join(name).is_symlink() {
                let target = PathBuf::from("usr").join(name);
                std::os::unix::fs::symlink(target, root.path().join(name)).unwrap();
            }
        }
        let container = Self(root);
        let tried = container.command(&[]).arg("/bin/true").output();
        let why = match tried {
            Ok(output) if output.status.success() => return Some(container),
            Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Err(error) => error.to_string(),
        };
        let why = why.lines().last().unwrap_or_default().to_owned();
        world.unavailable(format!("containers of systemd-nspawn: {why}"));
        None
    }

    fn command(&self, more: &[&str]) -> Command {
        let mut command = Command::new("systemd-nspawn");
        command
            .args(["--quiet", "--pipe", "--register=no", "--keep-unit"])
            .args(["--private-network", "--bind-ro=/usr"])
            .arg("--directory")
            .arg(self.0.path())
            .args(more);
        command
    }

    /// A program in it that asks for pins; the socket and the files are mounted
    /// into it under other names.
    fn asking(&self, setting: &Setting, more: &[&str], how: &str) -> Asking {
        let binary = std::env::current_exe().unwrap();
        let bind = |from: &Path, to: &str| format!("--bind={}:{to}", from.display());
        let mut command = self.command(more);
        command
            .arg(bind(&binary, "/tests"))
            .arg(bind(setting.guard.socket(), "/guard.sock"))
            .arg(bind(&setting.place, "/data"))
            .args(["/tests", HELPER, "asks-by-policy", "/guard.sock", how]);
        Asking::of(Helper::spawn(command).unwrap())
    }
}

/// Containers of systemd-nspawn.
pub(super) fn nspawn(world: &World) {
    let Some(container) = Nspawn::new(world) else {
        return;
    };
    let setting = Setting::new(world, Kind::XFS, "nspawn", "");
    let path = setting.file("a", 0o666);
    let inside = Path::new("/data/a");
    let is_shown = |uid: u32| {
        let status = setting.guard.client().status().unwrap();
        let [file] = &status.files[..] else {
            panic!("{status:?}")
        };
        assert_eq!(
            (file.pins[0].uid, &file.path),
            (uid, &path.display().to_string())
        );
        assert!(crate::world::is_pinned(&path));
    };
    // Users of the host: root by the capability, others by the policy.
    let capable = "--capability=CAP_LINUX_IMMUTABLE";
    for (how, uid) in [("root", 0), ("nobody", NOBODY)] {
        let mut asking = container.asking(&setting, &[capable], how);
        for way in ["pin", "map", "pin-growth"] {
            asking.holds(way, inside);
            is_shown(uid);
            asking.says("let-go");
            crate::world::wait_until_free(&path);
        }
        // A container that is killed lets go.
        asking.holds("map", inside);
        asking.0.kill().unwrap();
        crate::world::wait_until_free(&path);
    }
    // Users of its own: the host's numbers count, and its root is nobody.
    let own = format!("--private-users={SHIFTED}:65536");
    let more = [own.as_str(), "--private-users-ownership=off"];
    let words = "CAP_LINUX_IMMUTABLE in the initial user namespace";
    let mut asking = container.asking(&setting, &more, "nobody");
    asking.is_refused("pin", inside, Errno::ACCESS, "not-capable", words);
    let rule = rule("main", &setting.place, "write", "");
    let uid = SHIFTED + NOBODY;
    setting.read_again(&rule.replace(&NOBODY.to_string(), &uid.to_string()));
    asking.holds("pin", inside);
    is_shown(uid);
    asking.says("let-go");
    crate::world::wait_until_free(&path);
    allow(&path, 0o600);
    let said = asking.says(&format!("pin {}", inside.display()));
    assert!(said.contains("not opened"), "{said}");
}
