//! Section 4 of the contract for strength stable: every operation, on what is
//! stable and what is not, at the tail of the file and behind it.

use super::follow;
use crate::world::{World, is_brief, kinds, open};
use libtest_mimic::Trial;
use mapdirect::{BlockMap, ExtentState, Integrity};
use mapdirect_sys::Errno;
use mapdirect_testkit::attack::{Attack, CORPUS, Door, Needs, Row, Target, clone_range};
use mapdirect_testkit::contract::{Attacker, BLOCKS, Expected, Gate, PINNED, Subject};
use mapdirect_testkit::process::attack_by_stranger;
use mapdirect_testkit::{Disk, Kind, raw};
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// Where an attack goes. Everything from the start of the pin on is pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Before,
    Stable,
    Hole,
    Unwritten,
    Shared,
    /// The last block of the file.
    Tail,
    /// The first block behind the file.
    Behind,
    Beyond,
}

impl Place {
    const ALL: [Self; 8] = [
        Self::Before,
        Self::Stable,
        Self::Hole,
        Self::Unwritten,
        Self::Shared,
        Self::Tail,
        Self::Behind,
        Self::Beyond,
    ];

    fn blocks(self) -> Range<u64> {
        let first = match self {
            Self::Before => PINNED.start - 1,
            Self::Stable => 18,
            Self::Hole => 20,
            Self::Unwritten => 22,
            Self::Shared => 24,
            Self::Tail => BLOCKS - 1,
            Self::Behind => BLOCKS,
            Self::Beyond => BLOCKS + 3,
        };
        first..first + 1
    }

    fn is_in_file(self) -> bool {
        self.blocks().end <= BLOCKS
    }
}

pub fn trials(world: &World) -> Vec<Trial> {
    let mut trials = Vec::new();
    for kind in kinds(&[Kind::XFS, Kind::XFS_PLAIN, Kind::EXT4]) {
        for attack in CORPUS.iter().filter(|attack| attack.place.includes(kind)) {
            // Where time is short: what changes nothing is tried elsewhere.
            if is_brief()
                && (kind == Kind::XFS_PLAIN || matches!(attack.row, Row::Read | Row::Metadata))
            {
                continue;
            }
            for attacker in [Attacker::Stranger, Attacker::Holder] {
                // One gate asks who it is, the other does not.
                let only = match Gate::under_test() {
                    Gate::Bpf => Attacker::Stranger,
                    Gate::Fanotify => Attacker::Holder,
                };
                if kind != Kind::XFS && attacker != only {
                    continue;
                }
                // What moves a holder's extents by its own descriptor the
                // fanotify gate cannot see; see `attacked`.
                let unseen = Gate::under_test() == Gate::Fanotify
                    && attack.row == Row::Exchange
                    && attack.name != "xfs-exchange-range";
                if attacker == Attacker::Holder && unseen {
                    continue;
                }
                let name = format!(
                    "stable::contract::{kind}::{}::{}",
                    attack.name,
                    attacker.name()
                );
                trials.push(world.trial(name, move |world| {
                    try_everywhere(world, kind, attack, attacker);
                }));
            }
        }
    }
    trials
}

/// What the contract says.
fn is_refused(attack: &Attack, place: Place, reflink: bool) -> bool {
    let is_pinned = place != Place::Before;
    match attack.row {
        Row::Read | Row::Metadata | Row::Grow => false,
        // Whatever it is, it may become stable.
        Row::Write | Row::Allocate | Row::MapWrite => false,
        Row::Deallocate if attack.name == "unshare-range" => false,
        // Below the size the file has. The new size is where the range begins,
        // or a byte before that.
        Row::Truncate => {
            place.is_in_file() || attack.name == "truncate-inside-a-page" && place == Place::Behind
        }
        // All that follows is moved.
        Row::Shift | Row::TruncateByOpen => true,
        Row::Deallocate | Row::Exchange | Row::Reflink => is_pinned || is_whole_file(attack),
        // Behind the file there is nothing to copy.
        Row::CopyFrom => reflink && is_pinned && place.is_in_file(),
        Row::Untorn => reflink && is_pinned,
    }
}

fn is_whole_file(attack: &Attack) -> bool {
    matches!(
        attack.name,
        "ficlone-from" | "ficlone-into" | "xfs-swapext" | "ext4-swap-boot"
    )
}

/// Nothing beside the pin may come to be shared, and the other side of an
/// exchange is not known.
fn is_refused_beside(attack: &Attack, reflink: bool) -> bool {
    let shares = matches!(
        attack.row,
        Row::Reflink | Row::CopyFrom | Row::Exchange | Row::Untorn
    ) || attack.name == "copy_file_range-into";
    reflink && shares || attack.row == Row::Exchange && attack.name != "xfs-exchange-range"
}

fn expected(attack: &Attack, place: Place, attacker: Attacker, reflink: bool) -> Expected {
    if attack.row == Row::CopyFrom && !place.is_in_file() {
        // Nothing is copied, and perhaps nobody asked.
        return Expected::Either;
    }
    let refused = is_refused(attack, place, reflink);
    let beside = is_refused_beside(attack, reflink);
    if Gate::under_test() == Gate::Bpf {
        return if refused || beside {
            Expected::Refused
        } else {
            Expected::Works
        };
    }
    match attacker {
        Attacker::Stranger if attack.needs == Needs::Write => Expected::Refused,
        _ if refused => Expected::Refused,
        // Of truncations by path it is not known how large the file is by then.
        _ if attack.needs == Needs::Path && matches!(attack.row, Row::Truncate | Row::Grow) => {
            Expected::Refused
        }
        _ if reflink && matches!(attack.row, Row::Reflink | Row::CopyFrom) => Expected::Refused,
        _ if beside => Expected::Either,
        _ if attack.precise || matches!(attack.row, Row::Write | Row::MapWrite | Row::Allocate) => {
            // Some show neither what they do nor how.
            let is_vague = attack.name.contains("io_uring")
                || attack.name.contains("i386")
                || attack.name.contains("aio")
                || attack.name.contains("xfs-");
            if is_vague {
                Expected::Either
            } else {
                Expected::Works
            }
        }
        _ => Expected::Either,
    }
}

fn subject(disk: &Disk, name: &str, place: Place) -> Subject {
    let subject = Subject::new(disk, name, false);
    let block = disk.kind().block();
    let file = open(&subject.path);
    let punch = |at: u64| raw::fallocate(file.as_fd(), 3, at * block, block).unwrap();
    punch(Place::Hole.blocks().start);
    let unwritten = Place::Unwritten.blocks().start;
    punch(unwritten);
    raw::fallocate(file.as_fd(), 0, unwritten * block, block).unwrap();
    if place == Place::Shared {
        let at = Place::Shared.blocks().start * block;
        let sharer = File::create(&subject.sharer).unwrap();
        clone_range(sharer.as_fd(), file.as_fd(), at, block, at).unwrap();
        sharer.sync_all().unwrap();
    }
    file.sync_all().unwrap();
    drop(file);
    // Long enough for what copies from it behind the end of the file.
    let other = open(&subject.other);
    other.set_len((BLOCKS + 8) * block).unwrap();
    subject
}

fn bytes(place: Place, block: u64) -> (u64, u64) {
    (place.blocks().start * block, block)
}

fn by_stranger(
    attack: &'static Attack,
    subject: &Subject,
    place: Place,
    block: u64,
) -> Result<(), Errno> {
    let range = bytes(place, block);
    attack_by_stranger(
        attack,
        Door::Path,
        &subject.path,
        &subject.other,
        range,
        block,
    )
    .unwrap()
}

fn try_everywhere(world: &World, kind: Kind, attack: &'static Attack, attacker: Attacker) {
    // What is refused on a whole filesystem is, while another test has a pin
    // there.
    let alone = Gate::under_test() == Gate::Bpf && attack.row == Row::Exchange && !kind.is_dax();
    let disk = if alone {
        Arc::new(Disk::new(kind, 512).unwrap())
    } else {
        world.disk(kind)
    };
    for place in Place::ALL {
        if place == Place::Shared && !kind.reflink() {
            continue;
        }
        let anywhere = matches!(attack.row, Row::Grow | Row::Metadata | Row::TruncateByOpen);
        if anywhere && place != Place::Stable {
            continue;
        }
        // There is no file to map yet.
        if attack.name.starts_with("mmap") && !place.is_in_file() {
            continue;
        }
        if is_brief() && matches!(place, Place::Before | Place::Beyond) {
            continue;
        }
        try_at(world, &disk, attack, attacker, place);
    }
}

fn try_at(world: &World, disk: &Disk, attack: &'static Attack, attacker: Attacker, place: Place) {
    let (kind, block) = (disk.kind(), disk.kind().block());
    let name = |what: &str| {
        format!(
            "stable-{}-{what}-{}-{place:?}",
            attack.name,
            attacker.name()
        )
    };
    let natural = {
        let subject = subject(disk, &name("natural"), place);
        by_stranger(attack, &subject, place, block)
    };
    let subject = subject(disk, &name("pinned"), place);
    let guard = world.guard();
    let file = open(&subject.path);
    let pin = follow(&guard.client(), &file, PINNED.start * block);
    let held = pin.block_map().clone();
    let result = match attacker {
        Attacker::Stranger => by_stranger(attack, &subject, place, block),
        Attacker::Holder => {
            let (offset, length) = bytes(place, block);
            (attack.run)(&Target {
                path: subject.path.clone(),
                offset,
                length,
                block,
                other: subject.other.clone(),
                door: Door::Path,
                file: Some(OwnedFd::from(file.try_clone().unwrap())),
            })
        }
    };
    assert_held(&held, &subject, attack, place);
    let expected = expected(attack, place, attacker, kind.reflink());
    let right = match expected {
        Expected::Works => result == natural,
        Expected::Refused => result == Err(Errno::TXTBSY) || natural.is_err() && result == natural,
        Expected::Either => result == natural || result == Err(Errno::TXTBSY),
    };
    assert!(
        right,
        "{} at {place:?}: expected {expected:?} (without a pin: {natural:?}), got {result:?}",
        attack.name
    );
    assert_eq!(
        pin.integrity(),
        Integrity::Intact,
        "{} at {place:?}",
        attack.name
    );
    world.count("attacks on strength stable", 1);
    drop((pin, file));
    crate::world::wait_until_free(&subject.path);
}

/// Everything that was held is where it was.
fn assert_held(held: &BlockMap, subject: &Subject, attack: &Attack, place: Place) {
    let file = File::open(&subject.path).unwrap();
    let end = held.file_size();
    let now = mapdirect::block_map(&file, held.range().start..end).unwrap();
    for extent in held
        .extents()
        .iter()
        .filter(|extent| extent.state.is_stable())
    {
        let parts = now
            .extents()
            .iter()
            .filter_map(|now| now.clipped(&(extent.offset..extent.end())));
        for part in parts {
            let physical = extent.physical.unwrap() + (part.offset - extent.offset);
            assert_eq!(
                (part.state, part.physical),
                (ExtentState::Written, Some(physical)),
                "{} at {place:?} moved what was held at {}",
                attack.name,
                part.offset
            );
        }
    }
}
