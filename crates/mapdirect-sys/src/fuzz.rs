//! The fuzz targets: every parser of this crate, with checks of what it
//! returns. The seeds are bytes such as the kernel writes.

use crate::{dm_table, fanotify, fiemap, memfd, perf_event, proc, proc_locks, proc_mountinfo};
use crate::{uname, userfaultfd};

/// A parser of untrusted bytes.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// The name of the target, also on the command line of `cargo fuzz`.
    pub name: &'static str,
    /// Parses bytes, and panics if the result cannot be true.
    pub run: fn(&[u8]),
    /// Bytes that are valid for the parser.
    pub seeds: &'static [&'static [u8]],
}

/// The parsers of this crate.
pub const TARGETS: [Target; 18] = [
    Target {
        name: "fanotify-events",
        run: fanotify_events,
        seeds: &[&FANOTIFY_RANGE, &FANOTIFY_FID],
    },
    Target {
        name: "perf-records",
        run: perf_records,
        seeds: &[&PERF],
    },
    Target {
        name: "fiemap-answers",
        run: fiemap_answers,
        seeds: &[&[0; 56], &[1; 112]],
    },
    Target {
        name: "userfaultfd-messages",
        run: userfaultfd_messages,
        seeds: &[
            b"\x15\0\0\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0",
            b"\x14\0\0\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x20\0\0\0\0\0\0\0\x30\0\0\0\0\0",
        ],
    },
    Target {
        name: "proofs",
        run: proofs,
        seeds: &[b"challenge\x01\0\0\0\x02\0\0\0\0\0\0\0"],
    },
    Target {
        name: "proc-syscall",
        run: proc_syscall,
        seeds: &[
            b"running\n",
            b"-1 0x7ffe5ee9e6a8 0x7f5a4b3a4e13\n",
            b"0 0x3 0x7f2d59ce9000 0x20000 0x22 0x0 0x0 0x7ffd0af0a4b8 0x7f2d5a0b1a1d\n",
        ],
    },
    Target {
        name: "proc-stack",
        run: proc_stack,
        seeds: &[
            b"[<0>] fanotify_handle_event+0x6a2/0xd60\n[<0>] vfs_open.isra.0+0x2d/0xf0\n",
            b"",
        ],
    },
    Target {
        name: "proc-schedstat",
        run: proc_schedstat,
        seeds: &[b"123456 789 42\n"],
    },
    Target {
        name: "proc-stat",
        run: proc_stat,
        seeds: &[b"7 (a) b) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 33333 4 5 6 7 8 9\n"],
    },
    Target {
        name: "proc-status",
        run: proc_status_ids,
        seeds: &[
            b"Name:\tdb\nUid:\t7\t7\t7\t7\nGid:\t8\t8\t8\t8\nGroups:\t8 9 \nNSpid:\t70\t1\n",
        ],
    },
    Target {
        name: "proc-cgroup",
        run: proc_cgroup,
        seeds: &[
            b"0::/system.slice/db.service\n",
            b"7:pids:/user.slice\n1:name=systemd:/a:b\n0::/\n",
        ],
    },
    Target {
        name: "proc-fdinfo",
        run: proc_fdinfo,
        seeds: &[
            b"pos:\t0\nflags:\t0100002\nmnt_id:\t29\nino:\t131\nlock:\t1: OFDLCK ADVISORY  READ -1 \
              07:00:131 4611686018427387904 4611686018427387904\n",
            b"SqMask:\t0x7\nUserFiles:\t2\n    0: /srv/a\n    1: <none>\nscm_fds: 3\n",
        ],
    },
    Target {
        name: "proc-maps",
        run: proc_maps,
        seeds: &[
            b"7f2d59c00000-7f2d59e00000 rw-s 00200000 103:02 131                      /srv/a b\n",
            b"7ffd0aeea000-7ffd0af0b000 rw-p 00000000 00:00 0                         [stack]\n",
        ],
    },
    Target {
        name: "proc-mountinfo",
        run: proc_mountinfo_lines,
        seeds: &[
            b"29 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw,errors=remount-ro\n",
            b"77 29 0:51 / /mnt/a\\040b rw - overlay none rw,lowerdir=/l,upperdir=/u,workdir=/w\n",
        ],
    },
    Target {
        name: "proc-locks",
        run: proc_locks_lines,
        seeds: &[
            b"1: OFDLCK ADVISORY  READ -1 07:00:131 4611686018427387904 4611686018427387904\n",
            b"2: -> FLOCK  ADVISORY  WRITE 77 00:1a:3 0 EOF\n",
        ],
    },
    Target {
        name: "dm-tables",
        run: dm_tables,
        seeds: &[&DM_TABLE],
    },
    Target {
        name: "names",
        run: names,
        seeds: &[b"a\\040b\\134c", b"\x1b[31mred\x07"],
    },
    Target {
        name: "kernel-release",
        run: kernel_release,
        seeds: &[b"6.1.0-31-amd64", b"7.3"],
    },
];

/// A linear target of eight sectors.
const DM_TABLE: [u8; 56] =
    *b"\0\0\0\0\0\0\0\0\x08\0\0\0\0\0\0\0\0\0\0\0\x38\0\0\0linear\0\0\0\0\0\0\0\0\0\08:1 2048\0\0\0\0\0\0\0\0";

fn dm_tables(bytes: &[u8]) {
    for count in 0..3 {
        if let Some(targets) = dm_table::parse(bytes, count) {
            assert_eq!(targets.len(), usize::try_from(count).unwrap_or(usize::MAX));
            for target in targets {
                assert!(target.linear().is_none_or(|(_, _, start)| start % 512 == 0));
            }
        }
    }
}

/// An event with a range, as fanotify(7) lays it out.
const FANOTIFY_RANGE: [u8; 48] = {
    let mut event = [0; 48];
    (event[0], event[4], event[6]) = (48, 3, 24);
    (event[18], event[24], event[26]) = (1, 6, 24);
    event
};

/// An event with the id of an object.
const FANOTIFY_FID: [u8; 52] = {
    let mut event = [0; 52];
    (event[0], event[4], event[6]) = (52, 3, 24);
    (event[24], event[26], event[36], event[40]) = (1, 28, 8, 1);
    event
};

/// A sample, and a record that says that some were lost.
const PERF: [u8; 56] = {
    let mut records = [0; 56];
    (records[0], records[6], records[24]) = (9, 40, 12);
    (records[40], records[46]) = (2, 16);
    records
};

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn fanotify_events(bytes: &[u8]) {
    let events: Vec<_> = fanotify::parse(bytes).collect();
    // Every event takes bytes, and nothing is read behind a malformed one.
    assert!(events.len() <= bytes.len() / 24 + 1);
    let malformed = events.iter().position(Result::is_err);
    assert!(malformed.is_none_or(|at| at + 1 == events.len()));
}

fn perf_records(bytes: &[u8]) {
    let mut taken = 0;
    let _ = perf_event::parse(bytes, &mut |sample| taken += 28 + sample.raw.len());
    assert!(taken <= bytes.len());
}

fn fiemap_answers(bytes: &[u8]) {
    let (start, length) = match bytes.split_first_chunk::<8>() {
        Some((start, _)) => (u64::from_le_bytes(*start) >> 8, 1 << 30),
        None => (0, u64::MAX),
    };
    let mut reached = start;
    let _ = fiemap::walk_bytes(bytes, start..start.saturating_add(length), &mut |extent| {
        let end = extent.logical.saturating_add(extent.length);
        reached = reached.max(end);
    });
    assert!(reached >= start);
}

fn userfaultfd_messages(bytes: &[u8]) {
    if let Some(message) = bytes.first_chunk() {
        let _ = userfaultfd::parse(message);
    }
}

fn proofs(bytes: &[u8]) {
    let challenge = &bytes[..bytes.len().min(9)];
    if let Some(prover) = memfd::Prover::signed(bytes, challenge) {
        assert_eq!(prover.sign(challenge), bytes);
    }
}

fn proc_syscall(bytes: &[u8]) {
    if let Some(proc::SyscallState::Inside(call)) = proc::parse_syscall(bytes) {
        assert!(call.number != -1);
        let [a, b, c, d, e, f] = call.args;
        let again = format!(
            "{} {a:#x} {b:#x} {c:#x} {d:#x} {e:#x} {f:#x} {:#x} {:#x}\n",
            call.number, call.sp, call.pc
        );
        let same = proc::SyscallState::Inside(call);
        assert_eq!(proc::parse_syscall(again.as_bytes()), Some(same));
    }
}

fn proc_stack(bytes: &[u8]) {
    let text = text(bytes);
    for function in proc::stack_functions(&text) {
        assert!(!function.is_empty() && !function.contains(['+', '.', '\n']));
    }
}

fn proc_schedstat(bytes: &[u8]) {
    assert!(proc::parse_runs(&text(bytes)).is_none_or(|runs| runs.times > 0));
}

fn proc_stat(bytes: &[u8]) {
    let text = text(bytes);
    let _ = proc::parse_start_time(&text);
    for field in 0..60 {
        let _ = proc::parse_stat_field::<i64>(&text, field);
    }
}

fn proc_status_ids(bytes: &[u8]) {
    if let Some(ids) = crate::proc_status::parse(&text(bytes)) {
        let is_one = ids.users.iter().all(|user| *user == ids.users[0]);
        assert_eq!(ids.only_user().is_some(), is_one);
        assert!(ids.others.len() + ids.numbers.len() <= bytes.len());
    }
}

fn proc_cgroup(bytes: &[u8]) {
    let text = text(bytes);
    if let Some(path) = proc::parse_cgroup(&text) {
        assert!(text.contains(path) && !path.contains('\n'));
    }
    let _ = crate::proc_status::process_in(&text);
}

fn proc_fdinfo(bytes: &[u8]) {
    let text = text(bytes);
    let info = proc::parse_fdinfo(&text);
    let lines = text.lines().count();
    assert!(info.locks.len() <= lines && info.registered.len() <= lines);
}

fn proc_maps(bytes: &[u8]) {
    for line in text(bytes).lines() {
        let _ = proc::parse_maps_line(line);
    }
}

fn proc_mountinfo_lines(bytes: &[u8]) {
    for line in text(bytes).lines() {
        if let Some(mount) = proc_mountinfo::parse_line(line) {
            for option in mount.options.split(',') {
                let name = option.split('=').next().unwrap_or(option);
                assert!(mount.option(name).is_some());
            }
        }
    }
}

fn proc_locks_lines(bytes: &[u8]) {
    for line in text(bytes).lines() {
        let _ = proc_locks::parse_line(line);
    }
}

/// Checks that a name survives the kernel's escaping.
fn names(bytes: &[u8]) {
    let text = text(bytes);
    assert!(!proc::printable(&text).contains(char::is_control));
    let _ = proc::unescape(&text);
    let escaped: String = text
        .chars()
        .map(|letter| match letter {
            ' ' | '\t' | '\n' | '\\' | '#' => format!("\\{:03o}", u32::from(letter)),
            other => other.to_string(),
        })
        .collect();
    assert_eq!(proc::unescape(&escaped), text);
    // Text that is not an escape stays as it is.
    for other in ["\\+12", "\\-12", "\\9", "\\400"] {
        assert_eq!(proc::unescape(other), other);
    }
}

fn kernel_release(bytes: &[u8]) {
    let _ = uname::version_of(&text(bytes));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The seeds do what they should: also where no fuzzer runs, as under Miri.
    #[test]
    fn seeds_make_sense() {
        for target in TARGETS {
            for seed in target.seeds {
                (target.run)(seed);
                for end in 0..seed.len() {
                    (target.run)(&seed[..end]);
                }
            }
        }
        let event = fanotify::parse(&FANOTIFY_RANGE).next();
        assert!(event.is_some_and(|event| event.is_ok_and(|event| event.range.is_some())));
        let event = fanotify::parse(&FANOTIFY_FID).next();
        assert!(event.is_some_and(|event| event.is_ok_and(|event| event.object.is_some())));
        let mut samples = 0;
        assert!(perf_event::parse(&PERF, &mut |sample| {
            samples += 1;
            assert_eq!(sample.raw.len(), 12);
        }));
        assert_eq!(samples, 1);
    }
}
