//! What the policy does not allow.

use super::*;

const ACCESS: Errno = Errno::ACCESS;

/// Each thing that can be wrong, with its errno and words.
pub(super) fn denials(world: &World) {
    let setting = Setting::new(world, Kind::XFS, "denials", "");
    let path = setting.file("a", 0o666);
    let outside = written(&setting.disk, "policy-outside", 65536);
    allow(&outside, 0o666);
    let mut asking = setting.nobody();
    let named = format!("no rule for user {NOBODY} covers {}", outside.display());
    asking.is_refused("pin", &outside, ACCESS, "policy", &named);
    // A directory whose name only begins alike.
    let beside = PathBuf::from(format!("{}2", setting.place.display()));
    std::fs::create_dir(&beside).unwrap();
    let other = beside.join("a");
    std::fs::rename(&outside, &other).unwrap();
    asking.is_refused("pin", &other, ACCESS, "policy", "covers");
    std::fs::remove_dir_all(&beside).unwrap();
    // A rule for reading.
    setting.read_again(&rule("main", &setting.place, "read", ""));
    asking.is_refused("pin", &path, ACCESS, "policy", "cannot write");
    asking.is_refused("map", &path, ACCESS, "policy", "cannot write");
    asking.holds("pin-read-only", &path);
    asking.says("let-go");
    // No rule for this user.
    let others = rule("main", &setting.place, "write", "");
    setting.read_again(&others.replace(&NOBODY.to_string(), "12345"));
    asking.is_refused("pin", &path, ACCESS, "not-capable", "CAP_LINUX_IMMUTABLE");
    // By group.
    setting.read_again(&others.replace("users", "groups"));
    asking.holds("pin", &path);
    asking.says("let-go");
    // No rule at all.
    setting.read_again("");
    asking.is_refused("pin", &path, ACCESS, "not-capable", "CAP_LINUX_IMMUTABLE");
}

/// A descriptor proves nothing: neither one that was passed by somebody with more
/// rights, nor one from before the file was made private.
pub(super) fn deputies(world: &World) {
    let setting = Setting::new(world, Kind::XFS, "deputies", "");
    let path = setting.file("private", 0o600);
    let name = path.to_string_lossy().into_owned();
    let mut asking = setting.asking(&["opened", &name]);
    let words = format!("user {NOBODY} may not open the file for reading and writing now");
    asking.is_refused("pin-opened", &path, ACCESS, "policy", &words);
    allow(&path, 0o444);
    asking.is_refused("pin-opened", &path, ACCESS, "policy", &words);
    allow(&path, 0o666);
    asking.holds("pin-opened", &path);
    asking.says("let-go");
    allow(&path, 0o600);
    asking.is_refused("pin-opened", &path, ACCESS, "policy", &words);
    // What the descriptor can do does not matter, nor who owns the directory.
    allow(&setting.place, 0o700);
    allow(&path, 0o666);
    asking.holds("pin-opened", &path);
    asking.says("let-go");
}

/// Names that come and go: links, renamed directories, and no name at all.
pub(super) fn other_names(world: &World) {
    let setting = Setting::new(world, Kind::XFS, "names", "");
    let path = setting.file("a", 0o666);
    let mut asking = setting.nobody();
    // A link to a file of somebody else, in a directory that the policy names.
    let victim = written(&setting.disk, "policy-victim", 65536);
    allow(&victim, 0o666);
    let link = setting.place.join("link");
    std::fs::hard_link(&victim, &link).unwrap();
    asking.is_refused("pin", &link, ACCESS, "policy", "2 names");
    asking.is_refused("pin", &victim, ACCESS, "policy", "2 names");
    std::os::unix::fs::chown(&victim, Some(NOBODY), None).unwrap();
    asking.holds("pin", &link);
    asking.says("let-go");
    std::fs::remove_file(&link).unwrap();
    asking.is_refused("pin", &victim, ACCESS, "policy", "covers");
    // A symbolic link leads to the file, whose own name counts.
    std::os::unix::fs::symlink(&victim, &link).unwrap();
    asking.is_refused("pin", &link, ACCESS, "policy", "covers");
    std::fs::remove_file(&victim).unwrap();
    let elsewhere = setting.disk.path("policy-link");
    std::os::unix::fs::symlink(&path, &elsewhere).unwrap();
    asking.holds("pin", &elsewhere);
    asking.says("let-go");
    std::fs::remove_file(&elsewhere).unwrap();
    // A directory above it is renamed.
    let moved = PathBuf::from(format!("{}-moved", setting.place.display()));
    std::fs::rename(&setting.place, &moved).unwrap();
    asking.is_refused("pin", &moved.join("a"), ACCESS, "policy", "covers");
    std::fs::rename(&moved, &setting.place).unwrap();
    asking.holds("pin", &path);
    asking.says("let-go");
    // No name: somebody else's file that was removed, and one's own.
    let name = path.to_string_lossy().into_owned();
    let mut opened = setting.asking(&["opened", &name]);
    std::fs::remove_file(&path).unwrap();
    opened.is_refused("pin-opened", &path, ACCESS, "policy", "0 names");
}
