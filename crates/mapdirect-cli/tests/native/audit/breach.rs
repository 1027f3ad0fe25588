//! A breach is a record, too.

use super::{log, mapdirect, said, wait_for_records};
use crate::extents::schemas::validate;
use crate::world::{BINARY, World, open, pin, wait_until_free};
use mapdirect_testkit::Kind;
use mapdirect_testkit::contract::Subject;
use mapdirect_testkit::process::GuardProcess;
use std::path::Path;

/// The holder has blocks moved by its own descriptor, of which permission events
/// hear nothing.
pub fn breach(world: &World) {
    let guard = GuardProcess::start(Path::new(BINARY)).unwrap();
    let mut documents = Vec::new();
    for kind in [Kind::XFS, Kind::EXT4] {
        let subject = Subject::new(&world.disk(kind), "audit-breach", false);
        let file = open(&subject.path);
        let pinned = pin(&guard.client(), &file, subject.pinned());
        subject.move_blocks(kind, &file).unwrap();
        let of_pin = |record: &serde_json::Value| record["pin"] == pinned.pin_id();
        let record = wait_for_records(&guard, 1, of_pin).remove(0);
        assert_eq!(record["event"], "breach", "{record}");
        // Whoever writes blocks back beside it on ext4 may be taken for its cause.
        if kind.is_xfs() {
            assert_eq!(record["pid"], std::process::id(), "{record}");
            assert_eq!(record["uid"], 0, "{record}");
            // What it ran then nobody saw.
            assert!(record["executable"].is_null(), "{record}");
        }
        assert_eq!(record["holder"]["pid"], std::process::id(), "{record}");
        assert_eq!(record["file"], subject.path.to_str().unwrap(), "{record}");
        assert_ne!(record["before"], record["after"], "{record}");
        assert!(record["before"].as_array().is_some_and(|it| !it.is_empty()));
        let breaches = log(&guard, &["--kind", "breach"]);
        assert!(breaches.iter().any(of_pin), "{breaches:?}");
        let text = said(
            &mapdirect(&guard, &["log", "--kind", "breach"])
                .output()
                .unwrap(),
        );
        assert!(text.contains(" breach "), "{text}");
        documents.push(("log", record));
        drop((pinned, file));
        wait_until_free(&subject.path);
        std::fs::remove_file(&subject.path).unwrap();
    }
    validate(world, &documents);
}
