//! Every message survives the wire, and no bytes upset a decoder.

use crate::envelope::{HEADER, Header, kind, message};
use crate::notice::{self, Breach, Notice};
use crate::refusal::MAX_OPENERS;
use crate::wire::{DecodeError, wire_len};
use crate::*;
use proptest::prelude::*;
use zerocopy::IntoBytes as _;

/// Every combination of the flags there are.
fn flags() -> impl Strategy<Value = Flags> {
    (0..=Flags::ALL).prop_map(Flags::from_known_bits)
}

fn request() -> impl Strategy<Value = Request> {
    let pin = (any::<u64>(), any::<u64>(), flags(), any::<u32>()).prop_map(
        |(offset, length, flags, patience_ms)| {
            Request::Pin(PinRequest {
                offset,
                length,
                flags,
                patience_ms,
            })
        },
    );
    prop_oneof![
        any::<u32>().prop_map(|version| Request::Hello { version }),
        Just(Request::Prove),
        pin,
        Just(Request::Swapped),
        Just(Request::Query),
        Just(Request::Status),
        Just(Request::Barrier),
        Just(Request::Resume),
        any::<i32>().prop_map(|pid| Request::Keeper { pid }),
        any::<(u64, u64)>()
            .prop_map(|(offset, length)| Request::Yield(YieldRequest { offset, length })),
        any::<i32>().prop_map(|tid| Request::Announce { tid }),
        any::<(u64, u64, u64)>()
            .prop_map(|(pin, device, inode)| { Request::Ended(WatchedPin { pin, device, inode }) }),
        proptest::collection::vec(any::<(u64, u64, u64)>(), 0..9).prop_map(|pins| {
            let pins = pins.into_iter();
            let watched = pins.map(|(pin, device, inode)| WatchedPin { pin, device, inode });
            Request::Watch(watched.collect())
        }),
        any::<u64>().prop_map(Request::Unpin),
        Just(Request::Disarm),
        any::<(u32, bool)>().prop_map(|(kept, live)| Request::Follow(FollowRequest { kept, live })),
        (
            any::<bool>(),
            any::<u32>(),
            any::<(u64, u64)>(),
            any::<u32>()
        )
            .prop_map(|(is_user, id, (offset, length), seconds)| {
                Request::Arm(ArmRequest {
                    who: if is_user {
                        Who::User(id)
                    } else {
                        Who::Group(id)
                    },
                    offset,
                    length,
                    seconds,
                })
            }),
        any::<(u64, u64, u64)>().prop_map(|(pin, offset, length)| {
            Request::Allocate(AllocateRequest {
                pin,
                offset,
                length,
            })
        }),
    ]
}

fn opener() -> impl Strategy<Value = Opener> {
    let fd = proptest::option::of(0..i32::MAX);
    (any::<i32>(), fd, any::<bool>(), any::<bool>(), ".{0,12}").prop_map(
        |(pid, fd, writable, mapped, command)| Opener {
            pid,
            fd,
            writable,
            mapped,
            command,
        },
    )
}

fn reply() -> impl Strategy<Value = Reply> {
    let welcome = (any::<u32>(), any::<u32>(), any::<i32>(), any::<[u8; 32]>()).prop_map(
        |(version, gate, pid, challenge)| Reply::Welcome {
            version,
            gate: Gate::from_number(gate),
            pid,
            challenge,
        },
    );
    let extents = proptest::collection::vec((any::<u32>(), 1u32..9), 0..20);
    let granted = (any::<u64>(), 0u64..1000, 1u64..1000, extents).prop_map(
        |(pin, start, length, extents)| {
            let extents: Vec<_> = extents
                .into_iter()
                .map(|(at, length)| {
                    let physical = Some(u64::from(at) * 7);
                    Extent::new(at.into(), physical, length.into(), ExtentState::Shared)
                })
                .collect();
            Reply::Granted(Granted {
                pin,
                range: start..start + length,
                file_size: length,
                block_size: 4096,
                device: DeviceId { major: 7, minor: 3 },
                extent_count: extents.len() as u64,
                extents,
            })
        },
    );
    let openers = proptest::collection::vec(opener(), 0..5);
    let refused = (any::<i32>(), any::<u32>(), ".{0,40}", ".{0,40}", openers).prop_map(
        |(errno, reason, obstacle, mend, openers)| {
            Reply::Refused(Refusal {
                errno,
                reason: Reason::from_number(reason),
                obstacle,
                mend,
                openers,
            })
        },
    );
    let pin = (
        any::<u64>(),
        any::<u64>(),
        any::<u64>(),
        flags(),
        any::<i32>(),
    )
        .prop_map(|(pin, start, end, flags, pid)| PinnedRange {
            pin,
            range: start..end,
            flags,
            pid,
        });
    let pins = (proptest::collection::vec(pin, 0..9), any::<u32>())
        .prop_map(|(pins, omitted)| Reply::Pins(pins, omitted.into()));
    prop_oneof![
        welcome,
        Just(Reply::Done),
        Just(Reply::Swap),
        granted,
        refused,
        pins,
        Just(Reply::Status),
        Just(Reply::Watching),
        notice().prop_map(Reply::Notice),
        record().prop_map(|record| Reply::Record(Box::new(record))),
        any::<u64>().prop_map(Reply::Missed),
        Just(Reply::Following),
    ]
}

fn record() -> impl Strategy<Value = Record> {
    let texts = proptest::collection::vec(".{0,40}", 8);
    let ids = any::<(i32, i32, Option<u32>, Option<(i32, u32)>)>();
    let range = proptest::option::of(any::<u32>().prop_map(|start| start.into()..u64::MAX));
    (any::<[u64; 4]>(), texts, ids, range, any::<(u32, u32)>()).prop_map(
        |([number, time, inode, pin], texts, (pid, tid, uid, owner), range, (event, state))| {
            let mut texts = texts.into_iter();
            let mut text = || texts.next().unwrap();
            let device = DeviceId { major: 7, minor: 3 };
            let event = match event % 3 {
                0 => record::Event::Refusal,
                1 => record::Event::Breach,
                _ => record::Event::Other(event.max(3)),
            };
            let mut record = Record::new(event, time, Gate::Bpf, (device, inode));
            (record.number, record.pin, record.range) = (number, pin, range);
            record.actor = Actor {
                pid,
                tid,
                uid,
                command: text(),
                executable: text(),
                cgroup: text(),
            };
            record.owner = owner.map(|(pid, uid)| Owner {
                command: text(),
                ..Owner::new(pid, uid)
            });
            record.name = Name::new(text(), text(), NameState::from_known_bits(state));
            (record.operation, record.call) = (text(), text());
            record.before = vec![Extent::new(0, Some(4096), 1, ExtentState::Written)];
            record
        },
    )
}

fn notice() -> impl Strategy<Value = Notice> {
    let extents = || {
        proptest::collection::vec(any::<u32>(), 0..9).prop_map(|places| {
            let places = places.into_iter();
            let extent =
                |at: u32| Extent::new(at.into(), None, u64::from(at) + 1, ExtentState::Hole);
            places.map(extent).collect::<Vec<_>>()
        })
    };
    let cause = proptest::option::of((any::<i32>(), ".{0,20}", ".{0,20}"));
    let breach = (any::<[u64; 5]>(), ".{0,40}", extents(), extents(), cause).prop_map(
        |([pin, inode, time, start, end], path, before, after, cause)| {
            let device = DeviceId { major: 7, minor: 3 };
            let both = (&before[..], &after[..]);
            let breach = Breach::new(pin, (device, inode), path, time, start..end, both);
            let cause = cause.map(|(pid, command, what)| notice::Cause::new(pid, command, what));
            Notice::Breach(breach.caused_by(cause))
        },
    );
    prop_oneof![
        breach,
        (any::<u64>(), ".{0,60}").prop_map(|(pin, why)| Notice::Lost { pin, why }),
        (any::<u64>(), ".{0,60}").prop_map(|(pin, why)| Notice::Unattended { pin, why }),
    ]
}

proptest! {
    #[test]
    fn requests_survive_the_wire(request in request()) {
        prop_assert_eq!(Request::decode(&request.encode()), Ok(request));
    }

    #[test]
    fn replies_survive_the_wire(reply in reply()) {
        prop_assert_eq!(Reply::decode(&reply.encode()), Ok(reply));
    }

    #[test]
    fn any_bytes_decode_or_not(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Request::decode(&bytes);
        let _ = Reply::decode(&bytes);
    }

    /// Bytes that get past the header reach every decoder.
    #[test]
    fn any_record_decodes_or_not(
        kind in prop_oneof![1u16..20, 101u16..117],
        record in 0u16..200,
        tail in proptest::collection::vec(any::<u8>(), 0..300),
    ) {
        let header = Header {
            length: wire_len(HEADER + tail.len()),
            kind: kind.into(),
            record: record.into(),
        };
        let bytes = [header.as_bytes(), &tail].concat();
        let _ = Request::decode(&bytes);
        let _ = Reply::decode(&bytes);
    }

    #[test]
    fn a_changed_byte_never_upsets_the_decoder(
        reply in reply(),
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
    ) {
        let mut bytes = reply.encode();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let _ = Reply::decode(&bytes);
    }
}

#[test]
fn a_shorter_record_reads_as_zeros_and_a_longer_must_be_zero() {
    let old = message(kind::PIN, &[7u8, 0, 0, 0, 0, 0, 0, 0], &[]);
    let Ok(Request::Pin(pin)) = Request::decode(&old) else {
        panic!("an older record must be read");
    };
    assert_eq!((pin.offset, pin.length), (7, 0));
    let mut newer = [0u8; 40];
    assert!(Request::decode(&message(kind::PIN, &newer, &[])).is_ok());
    newer[39] = 1;
    let refused = Request::decode(&message(kind::PIN, &newer, &[]));
    assert_eq!(refused, Err(DecodeError::Newer));
}

#[test]
fn a_breach_with_too_much_to_say_still_fits() {
    let hole = Extent::new(0, None, 1, ExtentState::Hole);
    let many = vec![hole; 1000];
    let device = DeviceId { major: 7, minor: 3 };
    let path = "ü".repeat(9000);
    let breach = Breach::new(1, (device, 2), path, 3, 4..5, (&many, &many));
    let cause = notice::Cause::new(6, "x".repeat(9000), "y".repeat(9000));
    let mut breach = breach.caused_by(Some(cause));
    breach.before = many;
    let bytes = Reply::Notice(Notice::Breach(breach)).encode();
    assert!(bytes.len() <= MAX_MESSAGE);
    let Ok(Reply::Notice(Notice::Breach(breach))) = Reply::decode(&bytes) else {
        panic!("must decode");
    };
    assert_eq!(breach.before.len(), notice::MAX_BREACH_EXTENTS);
    assert_eq!(breach.cause.unwrap().what.len(), 256);
}

#[test]
fn a_refusal_with_too_much_to_say_still_fits() {
    let opener = Opener {
        pid: 1,
        fd: None,
        writable: true,
        mapped: true,
        command: "ü".repeat(500),
    };
    let refusal = Refusal {
        errno: 26,
        reason: Reason::OpenElsewhere,
        obstacle: "ß".repeat(60_000),
        mend: "x".repeat(60_000),
        openers: vec![opener; 1000],
    };
    let bytes = Reply::Refused(refusal).encode();
    assert!(bytes.len() <= MAX_MESSAGE);
    let Ok(Reply::Refused(refusal)) = Reply::decode(&bytes) else {
        panic!("must decode");
    };
    assert_eq!(refusal.openers.len(), MAX_OPENERS);
}

#[test]
fn a_record_with_too_much_to_say_still_fits() {
    let long = || "ü".repeat(9000);
    let device = DeviceId { major: 7, minor: 3 };
    let mut record = Record::new(record::Event::Refusal, 1, Gate::Fanotify, (device, 2));
    record.actor.command = long();
    record.actor.executable = long();
    record.actor.cgroup = long();
    (record.operation, record.call) = (long(), long());
    record.name = Name::new(long(), long(), NameState::PRESENT);
    let mut owner = Owner::new(1, 2);
    owner.command = long();
    record.owner = Some(owner);
    record.before = vec![Extent::new(0, None, 1, ExtentState::Hole); 1000];
    record.after = record.before.clone();
    let bytes = Reply::Record(Box::new(record)).encode();
    assert!(bytes.len() <= MAX_MESSAGE);
    let Ok(Reply::Record(record)) = Reply::decode(&bytes) else {
        panic!("must decode");
    };
    assert_eq!(record.name.path.len(), 4096);
    assert_eq!(record.after.len(), notice::MAX_BREACH_EXTENTS);
}
