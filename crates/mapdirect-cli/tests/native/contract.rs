//! Section 4 of the contract: every operation, at every place, by strangers
//! and by the holder, and the block map read again after each.

use crate::world::{World, dirties_whole_folios, is_brief, kinds, map, open, pin};
use libtest_mimic::Trial;
use mapdirect::{DirectMap, Pin};
use mapdirect_sys::Errno;
use mapdirect_testkit::attack::{Attack, CORPUS, Door, Row, Target};
use mapdirect_testkit::contract::{Attacker, Expected, Gate, Place, Subject, expected};
use mapdirect_testkit::process::{Stranger, attack_by_stranger};
use mapdirect_testkit::{Disk, Kind};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

const KINDS: [Kind; 5] = [
    Kind::XFS,
    Kind::XFS_PLAIN,
    Kind::EXT4,
    Kind::Xfs {
        reflink: true,
        block: 1024,
    },
    Kind::Ext4 { block: 1024 },
];

pub fn trials(world: &World) -> Vec<Trial> {
    let mut trials = Vec::new();
    for kind in kinds(&KINDS) {
        for attack in CORPUS.iter().filter(|attack| attack.place.includes(kind)) {
            if kind.block() < 4096 && needs_pages(attack) {
                continue;
            }
            for attacker in [Attacker::Stranger, Attacker::Holder] {
                // What a holder does through its own descriptor to move
                // extents the fanotify gate cannot see: documented.
                let unseen = Gate::under_test() == Gate::Fanotify
                    && attack.row == Row::Exchange
                    && attack.name != "xfs-exchange-range";
                if attacker == Attacker::Holder && unseen {
                    continue;
                }
                let name = format!("contract::{kind}::{}::{}", attack.name, attacker.name());
                trials.push(world.trial(name, move |world| {
                    try_everywhere(world, kind, attack, attacker);
                }));
            }
        }
        for attack in CORPUS.iter().filter(|attack| attack.place.includes(kind)) {
            if kind.block() == 4096 {
                let name = format!("contract::{kind}::{}::early", attack.name);
                trials.push(world.trial(name, move |world| try_early(world, kind, attack)));
            }
        }
    }
    trials
}

/// The attack works on whole pages of memory.
fn needs_pages(attack: &Attack) -> bool {
    attack.name.starts_with("mmap") || attack.name == "madvise-remove"
}

/// The pin under attack.
#[expect(dead_code, reason = "held, not read")]
enum Held {
    Map(DirectMap),
    Pin(Pin),
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
    for frozen in [false, true] {
        let mut without_pin = None;
        for place in Place::ALL {
            let shared = place == Place::Shared && !kind.reflink();
            if place.is_frozen() != frozen || shared {
                continue;
            }
            if is_brief() && matches!(place, Place::First | Place::Last | Place::After) {
                continue;
            }
            // These do not depend on a place.
            let anywhere = matches!(attack.row, Row::Grow | Row::Metadata | Row::TruncateByOpen);
            if anywhere && place != Place::Stable && place != Place::Hole {
                continue;
            }
            // An untorn write must lie on a multiple of its length.
            if attack.row == Row::Untorn && place == Place::Across {
                continue;
            }
            let natural = match without_pin {
                Some(natural) if is_brief() => natural,
                _ => natural(world, &disk, attack, attacker.name(), place),
            };
            without_pin = Some(natural);
            try_at(world, &disk, attack, attacker, place, natural);
        }
    }
}

fn subject(disk: &Disk, attack: &Attack, what: &str, place: Place) -> Subject {
    let name = format!("{}-{what}-{}", attack.name, place.name());
    Subject::new(disk, &name, place.is_frozen())
}

fn target(subject: &Subject, place: Place, block: u64, file: Option<OwnedFd>) -> Target {
    let (offset, length) = subject.bytes(place);
    Target {
        path: subject.path.clone(),
        offset,
        length,
        block,
        other: subject.other.clone(),
        door: Door::Path,
        file,
    }
}

/// What happens without a pin: whether the operation exists here at all.
fn natural(
    world: &World,
    disk: &Disk,
    attack: &Attack,
    who: &str,
    place: Place,
) -> Result<(), Errno> {
    let subject = subject(disk, attack, &format!("natural-{who}"), place);
    let result = (attack.run)(&target(&subject, place, disk.kind().block(), None));
    if let Err(errno) = result {
        assert!(
            attack.optional || lacks(disk.kind(), attack, errno),
            "{} at {} fails without any pin: {errno}",
            attack.name,
            place.name()
        );
        let what = format!("{} on {}: {errno}", attack.name, disk.kind());
        world.unavailable(what);
    }
    result
}

/// Whether a filesystem is known not to have an operation that others of its
/// kind have.
fn lacks(kind: Kind, attack: &Attack, errno: Errno) -> bool {
    // ext4 defragments nothing where there is DAX, persistent memory has
    // nothing to discard, and XFS compares no holes on it.
    kind.is_dax()
        && match attack.name {
            "ext4-move-extent" | "ext4-move-extent-donor" | "fitrim" => errno == Errno::OPNOTSUPP,
            "fideduperange-from" | "fideduperange-into" => errno == Errno::ILSEQ,
            _ => false,
        }
}

fn try_at(
    world: &World,
    disk: &Disk,
    attack: &'static Attack,
    attacker: Attacker,
    place: Place,
    natural: Result<(), Errno>,
) {
    let kind = disk.kind();
    let block = kind.block();
    let subject = subject(disk, attack, attacker.name(), place);
    let guard = world.guard();
    let file = open(&subject.path);
    // Frozen blocks are pinned once without a mapping and once with one.
    let held = if place.is_frozen() && matches!(attacker, Attacker::Stranger) {
        Held::Pin(pin(&guard.client(), &file, subject.pinned()))
    } else {
        Held::Map(map(&guard.client(), &file, subject.pinned()))
    };
    let before = subject.block_map();
    let result = match attacker {
        Attacker::Stranger => attack_by_stranger(
            attack,
            Door::Path,
            &subject.path,
            &subject.other,
            subject.bytes(place),
            block,
        )
        .unwrap(),
        Attacker::Holder => {
            let own = OwnedFd::from(file.try_clone().unwrap());
            (attack.run)(&target(&subject, place, block, Some(own)))
        }
    };
    let after = subject.block_map();
    assert_eq!(
        before.extents(),
        after.extents(),
        "{} at {} changed the block map",
        attack.name,
        place.name()
    );
    let gate = Gate::under_test();
    let mut expected = expected(attack, place, attacker, kind.reflink(), gate);
    if gate == Gate::Bpf && dirties_whole_folios(kind) && place.is_frozen() {
        // Nothing may be written near an unwritten block.
        if expected == Expected::Works && matches!(attack.row, Row::Grow | Row::Write) {
            expected = Expected::Either;
        }
    }
    let rounds = gate == Gate::Fanotify && block < 4096 && !is_exact(attack);
    if expected == Expected::Works && rounds {
        // Events are rounded out to pages of several blocks.
        expected = Expected::Either;
    }
    check(attack, place, expected, result, natural);
    world.count("attacks", 1);
    drop(held);
    drop(file);
    if place == Place::Stable || place == Place::Hole {
        // And then it works as ever.
        crate::world::wait_until_free(&subject.path);
        let again = attack_by_stranger(
            attack,
            Door::Path,
            &subject.path,
            &subject.other,
            subject.bytes(place),
            block,
        );
        assert_eq!(again.unwrap(), natural, "{} after the pin", attack.name);
    }
}

/// The gate knows its range to the byte, from the registers.
fn is_exact(attack: &Attack) -> bool {
    matches!(
        attack.row,
        Row::Truncate | Row::Grow | Row::Metadata | Row::Read
    ) || matches!(
        attack.name,
        "pwrite"
            | "fallocate"
            | "fallocate-keep-size"
            | "punch-hole"
            | "zero-range"
            | "zero-range-keep-size"
            | "unshare-range"
            | "collapse-range"
            | "insert-range"
    )
}

fn check(
    attack: &Attack,
    place: Place,
    expected: Expected,
    result: Result<(), Errno>,
    natural: Result<(), Errno>,
) {
    let right = match expected {
        Expected::Works => result == natural,
        Expected::Refused => {
            // What does not exist here may say so before anybody is asked.
            result == Err(Errno::TXTBSY) || natural.is_err() && result == natural
        }
        Expected::Either => result == natural || result == Err(Errno::TXTBSY),
    };
    assert!(
        right,
        "{} at {}: expected {expected:?} (without a pin: {natural:?}), got {result:?}",
        attack.name,
        place.name()
    );
}

/// A stranger that had the file open before: either the pin is refused and
/// names it, or what it does later meets the gate.
fn try_early(world: &World, kind: Kind, attack: &'static Attack) {
    let alone = Gate::under_test() == Gate::Bpf && attack.row == Row::Exchange && !kind.is_dax();
    let disk = if alone {
        Arc::new(Disk::new(kind, 512).unwrap())
    } else {
        world.disk(kind)
    };
    let block = kind.block();
    let place = Place::Stable;
    if natural(world, &disk, attack, "early", place).is_err() {
        return;
    }
    let subject = subject(&disk, attack, "early", place);
    let mut stranger = Stranger::start(
        attack,
        Door::Path,
        &subject.path,
        &subject.other,
        subject.bytes(place),
        block,
        true,
    )
    .unwrap();
    let before = subject.block_map();
    let file = File::open(&subject.path).unwrap();
    let guard = world.guard();
    let try_to_pin = || {
        mapdirect::PinOptions::new()
            .range(subject.pinned())
            .guard(guard.client())
            .pin(&file)
    };
    let names = |error: &mapdirect::Error| {
        let mut openers = error.openers().iter();
        openers.any(|opener| opener.pid == stranger.pid())
    };
    let mut pinned = try_to_pin();
    // An emulated processor may be too slow to look at every process.
    let mut more = if is_brief() { 5 } else { 0 };
    while more > 0 && pinned.as_ref().is_err_and(|error| !names(error)) {
        more -= 1;
        pinned = try_to_pin();
    }
    match pinned {
        Err(error) => {
            assert_eq!(Gate::under_test(), Gate::Fanotify, "{error:#}");
            assert_eq!(error.errno(), Errno::TXTBSY.raw_os_error(), "{error:#}");
            let named = names(&error);
            assert!(named, "the refusal must name the stranger: {error:#}");
        }
        Ok(_pin) => {
            let gate = Gate::under_test();
            if gate == Gate::Fanotify {
                // Only a reader, and only where readers cannot share blocks.
                let writes = attack.needs == mapdirect_testkit::attack::Needs::Write;
                assert!(!kind.reflink() && !writes);
            }
            let result = stranger.attack().unwrap();
            let after = subject.block_map();
            assert_eq!(before.extents(), after.extents(), "{}", attack.name);
            let expected = expected(attack, place, Attacker::Stranger, kind.reflink(), gate);
            check(attack, place, expected, result, Ok(()));
        }
    }
    world.count("attackers that came early", 1);
}
