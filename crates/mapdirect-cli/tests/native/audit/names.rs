//! A pin is on the file, and whoever asks is shown its present name.

use super::{log, mapdirect, said, wait_for_records};
use crate::world::{BINARY, World, open, pin, wait_until_free, written};
use mapdirect_testkit::Kind;
use mapdirect_testkit::process::GuardProcess;
use serde_json::{Value, json};
use std::path::Path;

/// The only file of `status --json`.
fn shown(guard: &GuardProcess) -> Value {
    let text = said(&mapdirect(guard, &["status", "--json"]).output().unwrap());
    let status: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        status["files"].as_array().map(Vec::len),
        Some(1),
        "{status}"
    );
    status["files"][0].clone()
}

/// Shrinks the file by whatever name it has, which is refused.
fn refused(guard: &GuardProcess, path: &Path) -> Value {
    let number = log(guard, &[]).len();
    let file = std::fs::File::options().write(true).open(path);
    let refused = file.and_then(|file| file.set_len(0));
    assert!(refused.is_err(), "nothing was refused");
    wait_for_records(guard, number + 1, |_| true).pop().unwrap()
}

pub fn names(world: &World) {
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    for kind in [Kind::XFS, Kind::EXT4] {
        let disk = world.disk(kind);
        let path = written(&disk, "audit-names", 65536);
        let file = open(&path);
        let pinned = pin(&guard.client(), &file, 0..65536);
        let name = |path: &Path| json!(path.to_str().unwrap());
        let is = |found: &Value, path: &Path, former: Value, states: Value| {
            assert_eq!(found["file"], name(path), "{found}");
            assert_eq!(found["former"], former, "{found}");
            assert_eq!(found["name_state"], states, "{found}");
        };
        let both = |path: &Path, seen: &Path, former: Value, states: Value| {
            is(&shown(&guard), seen, former.clone(), states.clone());
            is(&refused(&guard, path), seen, former, states);
        };
        both(&path, &path, Value::Null, json!(["present"]));
        // Renamed.
        let other = disk.path("audit-other\nname");
        std::fs::rename(&path, &other).unwrap();
        let former = name(&path);
        both(
            &other,
            &other,
            former.clone(),
            json!(["present", "missing"]),
        );
        // Another file takes the name.
        std::fs::write(&path, b"another").unwrap();
        both(&other, &other, former, json!(["present", "replaced"]));
        // As tar, rsync and git do: the file loses its name to another.
        std::fs::rename(&other, &path).unwrap();
        both(&path, &path, Value::Null, json!(["present"]));
        std::fs::write(&other, b"another").unwrap();
        std::fs::rename(&other, &path).unwrap();
        is(
            &shown(&guard),
            &path,
            Value::Null,
            json!(["deleted", "replaced"]),
        );
        let text = said(&mapdirect(&guard, &["status"]).output().unwrap());
        // It is wrapped at words.
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let words = "audit-names (deleted; that name means another file now)";
        assert!(text.contains(words), "{text}");
        std::fs::remove_file(&path).unwrap();
        is(
            &shown(&guard),
            &path,
            Value::Null,
            json!(["deleted", "missing"]),
        );
        // Nothing that is said moves a cursor.
        let text = said(&mapdirect(&guard, &["log"]).output().unwrap());
        assert!(!text.replace('\n', "").contains(char::is_control), "{text}");
        drop((pinned, file));
        std::fs::write(&path, b"").unwrap();
        wait_until_free(&path);
        std::fs::remove_file(&path).unwrap();
        super::wait_until_nothing_is_pinned(&guard);
    }
}
