//! Feeds every parser with mutated seeds for a moment, on a stable compiler.
//!
//! `MAPDIRECT_FUZZ_SECONDS` says how long for each, half a second by default.
//! The bytes that a parser stumbles over are printed, and belong to its seeds
//! when it is fixed.

#![expect(clippy::print_stdout, reason = "a test tells what it tried")]

use libtest_mimic::{Arguments, Failed, Trial};
use mapdirect_fuzz::{Target, targets};
use mapdirect_proto::record::{self, Owner};
use mapdirect_proto::{
    BlockMap, DeviceId, Extent, ExtentState, Flags, Gate, Granted, MAGIC, Notice, Opener,
    PinRequest, PinnedRange, Reason, Refusal, Reply, Request, VERSION, WatchedPin, encode_status,
    extent, status,
};
use mapdirect_proto::{FollowRequest, Name, NameState, Record};
use mapdirect_testkit::random::Random;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

static INPUTS: AtomicU64 = AtomicU64::new(0);

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let seconds = std::env::var("MAPDIRECT_FUZZ_SECONDS");
    let seconds = seconds.map_or(Ok(0.5), |text| text.parse());
    let Ok(limit) = seconds.map(Duration::from_secs_f64) else {
        println!("MAPDIRECT_FUZZ_SECONDS is no number");
        return ExitCode::FAILURE;
    };
    let list = targets();
    let count = list.len();
    let trials = list.into_iter().map(|target| {
        Trial::test(format!("fuzz::{}", target.name), move || {
            feed(&target, limit)
        })
    });
    let conclusion = libtest_mimic::run(&arguments, trials.collect());
    let inputs = INPUTS.load(Relaxed);
    if inputs > 0 {
        println!("tried: {inputs} inputs for {count} parsers of bytes nobody vouches for");
    }
    conclusion.exit_code()
}

fn feed(target: &Target, limit: Duration) -> Result<(), Failed> {
    let mut seeds: Vec<Vec<u8>> = target.seeds.iter().map(|seed| seed.to_vec()).collect();
    seeds.extend(said(target.name));
    let mut random = Random::new(0x6d61_7064);
    let started = Instant::now();
    for seed in &seeds {
        fed(target, seed)?;
    }
    let mut inputs = seeds.len() as u64;
    while started.elapsed() < limit {
        // The clock costs more than most parsers.
        for _ in 0..100 {
            fed(target, &mutated(&mut random, &seeds))?;
            inputs += 1;
        }
    }
    INPUTS.fetch_add(inputs, Relaxed);
    Ok(())
}

fn fed(target: &Target, bytes: &[u8]) -> Result<(), Failed> {
    std::panic::catch_unwind(|| (target.run)(bytes)).map_err(|_| {
        let name = target.name;
        Failed::from(format!("{name} stumbles over {}", bytes.escape_ascii()))
    })
}

/// A seed, changed in a few places.
fn mutated(random: &mut Random, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = random.pick(seeds).clone();
    for _ in 0..=random.below(6) {
        let at = usize::try_from(random.below(bytes.len() as u64 + 1)).unwrap_or(0);
        match random.below(9) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, random.byte()),
            2 => bytes.extend(random.pick(seeds).iter().skip(at).take(64)),
            3 => drop(bytes.splice(at..at, random.pick(&WORDS).iter().copied())),
            4 if at < bytes.len() => drop(bytes.remove(at)),
            // A number takes an interesting value.
            5 | 6 => {
                let value = *random.pick(&NUMBERS);
                let width = *random.pick(&[1, 2, 4, 8]);
                for (place, byte) in bytes
                    .iter_mut()
                    .skip(at)
                    .zip(value.to_le_bytes())
                    .take(width)
                {
                    *place = byte;
                }
            }
            7 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            _ if at < bytes.len() => bytes[at] = random.byte(),
            _ => {}
        }
    }
    mend_length(random, &mut bytes);
    bytes
}

/// Messages say how long they are first: what lies gets no further.
fn mend_length(random: &mut Random, bytes: &mut [u8]) {
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    if random.below(2) == 0
        && let Some(first) = bytes.first_chunk_mut()
        && first[2..] == [0, 0]
    {
        *first = length.to_le_bytes();
    }
}

const NUMBERS: [u64; 12] = [
    0,
    1,
    8,
    24,
    4096,
    0x7f,
    0xff,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    u64::MAX >> 1,
    u64::MAX,
];

const WORDS: [&[u8]; 16] = [
    b" ",
    b"\n",
    b"\t",
    b":",
    b"-",
    b"+1",
    b"/",
    b"\\040",
    b"\\",
    b"0x",
    b"ffffffffffffffff",
    b"18446744073709551615",
    b"18446744073709551616",
    b"\xff\xfe",
    b"(",
    b")",
];

/// Messages as they are sent, for those who read messages.
fn said(target: &str) -> Vec<Vec<u8>> {
    match target {
        "requests" => asked().iter().map(Request::encode).collect(),
        "replies" => answered().iter().map(Reply::encode).collect(),
        "extents" => vec![extent::encode_extents(&some_extents())],
        "statuses" => vec![encode_status(&a_status())],
        _ => Vec::new(),
    }
}

fn asked() -> Vec<Request> {
    let pin = WatchedPin {
        pin: 1,
        device: 2,
        inode: 3,
    };
    assert_eq!(MAGIC.to_be_bytes(), *b"MAPDIRCT");
    vec![
        Request::Hello { version: VERSION },
        Request::Prove,
        Request::Pin(PinRequest {
            offset: 4096,
            length: 8192,
            flags: Flags::MAP | Flags::SEGMENTS,
            patience_ms: 100,
        }),
        Request::Swapped,
        Request::Announce { tid: 7 },
        Request::Ended(pin),
        Request::Watch(vec![pin; 3]),
        Request::Barrier,
        Request::Follow(FollowRequest {
            kept: 20,
            live: true,
        }),
    ]
}

fn some_extents() -> Vec<Extent> {
    vec![
        Extent::new(0, Some(4096), 4096, ExtentState::Written),
        Extent::new(4096, None, 4096, ExtentState::Hole),
    ]
}

fn answered() -> Vec<Reply> {
    let opener = Opener {
        pid: 7,
        fd: Some(3),
        writable: true,
        mapped: false,
        command: String::from("dd"),
    };
    let device = DeviceId { major: 7, minor: 0 };
    let map = BlockMap::new(device, 4096, 8192, 0..8192, some_extents());
    let parts = (&some_extents()[..1], &some_extents()[1..]);
    let breach = mapdirect_proto::Breach::new(9, (map.device(), 131), "/srv/a", 5, 0..4096, parts);
    vec![
        Reply::Welcome {
            version: VERSION,
            gate: Gate::Bpf,
            pid: 1,
            challenge: [7; 32],
        },
        Reply::Granted(Granted {
            pin: 1,
            range: 0..8192,
            file_size: 8192,
            block_size: 4096,
            device,
            extent_count: 2,
            extents: some_extents(),
        }),
        Reply::Refused(Refusal {
            errno: 26,
            reason: Reason::OpenElsewhere,
            obstacle: String::from("process 7 has it open"),
            mend: String::from("end it"),
            openers: vec![opener; 2],
        }),
        Reply::Pins(
            vec![PinnedRange {
                pin: 1,
                range: 0..4096,
                flags: Flags::WHOLE_FILE,
                pid: 7,
            }],
            2,
        ),
        Reply::Notice(Notice::Breach(breach)),
        Reply::Notice(Notice::Lost {
            pin: 1,
            why: String::from("gone"),
        }),
        Reply::Watching,
        Reply::Record(Box::new(a_record())),
        Reply::Missed(5),
        Reply::Following,
    ]
}

fn a_record() -> Record {
    let device = DeviceId { major: 7, minor: 0 };
    let mut record = Record::new(record::Event::Breach, 5, Gate::Bpf, (device, 131));
    record.actor.uid = Some(1000);
    record.actor.command = String::from("dd");
    record.operation = String::from("write");
    record.range = Some(0..4096);
    record.name = Name::new("/srv/a", "/srv/b", NameState::PRESENT);
    record.pin = 7;
    record.owner = Some(Owner::new(77, 0));
    (record.before, record.after) = (some_extents(), some_extents());
    record
}

fn a_status() -> status::Status {
    let device = DeviceId { major: 7, minor: 0 };
    status::Status {
        gate: Gate::Fanotify,
        pid: 12,
        uptime: 34,
        clients: 5,
        judged: 600,
        refused: vec![(String::from("truncate"), 3)],
        files: vec![status::FileStatus {
            device,
            inode: 131,
            path: String::from("/srv/a"),
            former: String::from("/srv/b"),
            name_state: NameState::PRESENT,
            pins: Vec::new(),
            holders: vec![status::Holder {
                pid: 77,
                command: String::from("db"),
                mapped: 4096,
                descriptors: 1,
            }],
        }],
        recent: vec![status::RefusedOperation {
            time: 1,
            tid: 80,
            command: String::from("dd"),
            operation: String::from("open-write"),
            device,
            inode: 131,
            path: String::from("/srv/a"),
            range: Some(0..4096),
        }],
        breached: 0,
        breaches: Vec::new(),
        policy: None,
        armed: Vec::new(),
        unrecorded: 4,
    }
}
