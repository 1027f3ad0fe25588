//! The mappings of a process (`PROCMAP_QUERY`, Linux 6.11, and proc_pid_maps(5)).
//!
//! A process may have 65530 mappings, and the path of each may be as long as its
//! directories are deep: text without an end, which the kernel also takes long to
//! write. So whoever needs no paths asks without them, and what must be read as
//! text is kept only as far as it says something.

use crate::proc::{MapsEntry, open_task_file, parse_maps_line};
use crate::{Errno, Result, checked};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// What is kept of a line: all that stands in front of a path.
const HEAD: usize = 128;

/// `struct procmap_query` of `include/uapi/linux/fs.h`.
#[repr(C)]
#[derive(Default)]
struct Query {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    start: u64,
    end: u64,
    flags: u64,
    page_size: u64,
    offset: u64,
    inode: u64,
    major: u32,
    minor: u32,
    name_size: u32,
    build_id_size: u32,
    name_addr: u64,
    build_id_addr: u64,
}

const SIZE: usize = size_of::<Query>();
const _: () = assert!(SIZE == 104);
/// `_IOWR('f', 17, struct procmap_query)`.
const PROCMAP_QUERY: libc::Ioctl = 0xc068_6611_u32 as libc::Ioctl;
const WRITABLE: u64 = 0x02;
const EXECUTABLE: u64 = 0x04;
const SHARED: u64 = 0x08;
const COVERING_OR_NEXT: u64 = 0x10;
const FILE_BACKED: u64 = 0x20;

/// The mappings of files of a thread's process; none if the process has no
/// memory any more. Asks `go_on` now and then.
///
/// # Errors
///
/// `ENOENT`, `ESRCH` when it is gone, `EACCES`, `ECANCELED` if `go_on` said no.
pub fn of_files(tid: i32, go_on: &dyn Fn() -> bool) -> Result<Vec<MapsEntry>> {
    let maps = open_task_file(tid, "maps")?;
    let mut found: Vec<MapsEntry> = Vec::new();
    let mut from = 0;
    loop {
        if !go_on() {
            return Err(Errno::CANCELED);
        }
        match next(maps.as_fd(), from) {
            Ok(entry) => {
                from = entry.end;
                found.push(entry);
            }
            Err(Errno::NOENT | Errno::SRCH) => return Ok(found),
            // An older kernel.
            Err(Errno::NOTTY) => break,
            Err(errno) => return Err(errno),
        }
    }
    let heads = heads(maps.as_fd(), go_on)?;
    let entries = heads.lines().filter_map(parse_maps_line);
    Ok(entries.filter(|entry| entry.inode != 0).collect())
}

/// The first mapping of a file that ends behind an address.
fn next(maps: BorrowedFd<'_>, from: u64) -> Result<MapsEntry> {
    let mut query = Query {
        size: SIZE as u64,
        query_flags: COVERING_OR_NEXT | FILE_BACKED,
        query_addr: from,
        ..Query::default()
    };
    // SAFETY: the request says how large the structure is (its size is part of
    // the number), it is ours for the call, and no buffers are asked for.
    checked(unsafe { libc::ioctl(maps.as_raw_fd(), PROCMAP_QUERY, &raw mut query) })?;
    let has = |flag| query.flags & flag != 0;
    Ok(MapsEntry {
        start: query.start,
        end: query.end,
        writable: has(WRITABLE),
        executable: has(EXECUTABLE),
        shared: has(SHARED),
        offset: query.offset,
        major: query.major,
        minor: query.minor,
        inode: query.inode,
    })
}

/// The beginnings of the lines of a file in `/proc/<tid>`.
///
/// # Errors
///
/// As [`of_files`].
pub fn line_heads(tid: i32, name: &str, go_on: &dyn Fn() -> bool) -> Result<String> {
    heads(open_task_file(tid, name)?.as_fd(), go_on)
}

fn heads(file: BorrowedFd<'_>, go_on: &dyn Fn() -> bool) -> Result<String> {
    let mut text = Vec::new();
    let mut column = 0;
    let mut chunk = [0; 8192];
    loop {
        if !go_on() {
            return Err(Errno::CANCELED);
        }
        match rustix::io::read(file, &mut chunk) {
            Ok(0) => break,
            Ok(length) => cut_lines(&chunk[..length], &mut column, &mut text),
            Err(Errno::INTR) => {}
            Err(other) => return Err(other),
        }
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Adds the first bytes of every line. `column` is where the next byte stands.
fn cut_lines(chunk: &[u8], column: &mut usize, text: &mut Vec<u8>) {
    for byte in chunk {
        if *byte == b'\n' {
            *column = 0;
            text.push(b'\n');
        } else if *column < HEAD {
            *column += 1;
            text.push(*byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    const ALWAYS: &dyn Fn() -> bool = &|| true;

    fn own() -> i32 {
        std::process::id().cast_signed()
    }

    #[test]
    fn the_kernel_says_without_paths_what_it_writes_with_them() {
        let program = File::open("/proc/self/exe").unwrap();
        let stat = rustix::fs::fstat(&program).unwrap();
        let ours = |entries: Vec<MapsEntry>| {
            let mut ours = entries;
            ours.retain(|entry| entry.inode == stat.st_ino && entry.executable);
            ours
        };
        let asked = ours(of_files(own(), ALWAYS).unwrap());
        let maps = open_task_file(own(), "maps").unwrap();
        let text = heads(maps.as_fd(), ALWAYS).unwrap();
        let read = ours(text.lines().filter_map(parse_maps_line).collect());
        assert!(!read.is_empty(), "{text}");
        assert_eq!(asked, read);
    }

    #[test]
    fn nobody_goes_on_whom_nobody_waits_for() {
        assert_eq!(of_files(own(), &|| false), Err(Errno::CANCELED));
        let heads = line_heads(own(), "smaps", &|| false);
        assert_eq!(heads, Err(Errno::CANCELED));
        assert!(of_files(i32::MAX, ALWAYS).is_err());
    }

    #[test]
    fn long_lines_are_cut_wherever_they_are_read() {
        let (mut column, mut text) = (0, Vec::new());
        let long = "x".repeat(1000);
        cut_lines(b"ab\n", &mut column, &mut text);
        cut_lines(&long.as_bytes()[..100], &mut column, &mut text);
        cut_lines(&long.as_bytes()[100..], &mut column, &mut text);
        cut_lines(b"\n\nc", &mut column, &mut text);
        let said = format!("ab\n{}\n\nc", &long[..HEAD]);
        assert_eq!(String::from_utf8(text).unwrap(), said);
    }
}
