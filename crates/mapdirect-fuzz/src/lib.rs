//! Every parser of mapdirect that reads bytes nobody vouches for: what clients
//! and guards send each other, what the kernel writes, and what is in `/proc`
//! of processes that belong to others.
//!
//! `tests/fuzz.rs` feeds each with mutated seeds for a moment, and
//! `fuzz/` has the same targets for `cargo fuzz`.

#![forbid(unsafe_code)]

use mapdirect_proto::{Reply, Request, decode_status, encode_status, extent};
pub use mapdirect_sys::fuzz::Target;

/// All of them.
#[must_use]
pub fn targets() -> Vec<Target> {
    let mut targets = vec![
        Target {
            name: "requests",
            run: requests,
            seeds: &[b"\x18\0\0\0\x01\0\x10\0TCRIDPAM\x02\0\0\0\0\0\0\0"],
        },
        Target {
            name: "replies",
            run: replies,
            seeds: &[b"\x08\0\0\0\x66\0\0\0"],
        },
        Target {
            name: "extents",
            run: extents,
            seeds: &[&[0; 32], &[1; 64]],
        },
        Target {
            name: "statuses",
            run: statuses,
            seeds: &[&[0; 8]],
        },
    ];
    targets.extend(mapdirect_sys::fuzz::TARGETS);
    targets.extend(mapdirect_guard::fuzz::targets());
    targets
}

/// Feeds a target with bytes.
///
/// # Panics
///
/// When there is no such target, or what it made of the bytes cannot be true.
pub fn run(name: &str, bytes: &[u8]) {
    let targets = targets();
    let target = targets.iter().find(|target| target.name == name);
    let Some(target) = target else {
        panic!("there is no target {name}");
    };
    (target.run)(bytes);
}

/// What was understood is understood again when it is said again.
fn requests(bytes: &[u8]) {
    if let Ok(request) = Request::decode(bytes) {
        assert!(request.descriptors() <= 1);
        assert_eq!(Request::decode(&request.encode()), Ok(request));
    }
}

fn replies(bytes: &[u8]) {
    if let Ok(reply) = Reply::decode(bytes) {
        // Texts and lists that are too long are cut, once.
        let again = Reply::decode(&reply.encode());
        let again = again.unwrap_or_else(|error| panic!("{reply:?}: {error}"));
        assert_eq!(Reply::decode(&again.encode()), Ok(again));
    }
}

fn extents(bytes: &[u8]) {
    if let Ok(extents) = extent::decode_extents(bytes) {
        let again = extent::decode_extents(&extent::encode_extents(&extents));
        assert_eq!(again.as_ref(), Ok(&extents));
    }
}

fn statuses(bytes: &[u8]) {
    if let Ok(status) = decode_status(bytes) {
        let again = decode_status(&encode_status(&status));
        let again = again.unwrap_or_else(|error| panic!("{status:?}: {error}"));
        assert_eq!(decode_status(&encode_status(&again)), Ok(again));
    }
}
