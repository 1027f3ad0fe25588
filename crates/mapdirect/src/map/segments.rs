//! Mapping a range segment by segment.

use crate::error::{Error, Kind};
use crate::frozen::{self, Frozen, Run};
use mapdirect_model::plan::{Pages, Plan, Segment};
use mapdirect_sys::mmap::{
    self, MAP_ANONYMOUS, MAP_FIXED, MAP_FIXED_NOREPLACE, MAP_NORESERVE, MAP_PRIVATE, PROT_NONE,
};
use mapdirect_sys::{Errno, proc};
use std::ops::Range;
use std::os::fd::BorrowedFd;

/// How the file itself is mapped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arguments<'a> {
    /// The description whose life is the pin.
    pub(crate) pinned: BorrowedFd<'a>,
    /// Where the caller wants it, with `MAP_FIXED` or `MAP_FIXED_NOREPLACE`
    /// among the flags, or 0.
    pub(crate) address: usize,
    pub(crate) prot: i32,
    /// The type, and whatever else the caller asked for.
    pub(crate) flags: i32,
}

/// A range as mapped.
#[derive(Debug)]
pub(crate) struct Mapped {
    pub(crate) address: usize,
    /// What is kept for the parts that are not the file itself.
    pub(crate) frozen: Option<Frozen>,
}

/// Mappings that a process may need without being asked how many it has.
const FEW: usize = 256;

/// Maps what `plan` says. Nothing is mapped if it fails, what a fixed address
/// held before excepted: that may be gone.
///
/// # Safety
///
/// With `MAP_FIXED`, as [`mmap::map`].
pub(crate) unsafe fn map(plan: &Plan, arguments: Arguments<'_>) -> Result<Mapped, Error> {
    let (first, last) = match plan.segments() {
        [] => return Err(Error::system("mmap", Errno::INVAL)),
        [one] => (one, one),
        [first, .., last] => (first, last),
    };
    let offset = first.range.start;
    let length = usize::try_from(last.range.end - offset).map_err(|_| failed(Errno::NOMEM))?;
    if plan.is_stable() {
        // SAFETY: the caller's promise.
        return unsafe { map_whole(plan, arguments, offset, length) };
    }
    check_count(plan.mappings(), 0)?;
    // SAFETY: the caller's promise.
    let address = unsafe { reserve(plan, arguments, offset, length) }.map_err(failed)?;
    // SAFETY: the reservation is ours alone.
    let opened = unsafe { mmap::open_up(address, length) }.map_err(failed);
    // SAFETY: as above.
    let mapped = opened.and_then(|()| unsafe { fill(plan, arguments, offset, address) });
    if mapped.is_err() {
        // SAFETY: as above; nothing of it has been handed out.
        let _ = unsafe { mmap::unmap(address, length) };
        Frozen::settle();
    }
    Ok(Mapped {
        address,
        frozen: Some(mapped?),
    })
}

fn failed(errno: Errno) -> Error {
    let mend = match errno {
        Errno::NOMEM => "free address space or mappings (vm.max_map_count)",
        Errno::EXIST => "give an address where nothing is mapped",
        _ => "",
    };
    Error::new(
        Kind::System,
        errno,
        format!("mmap failed after the pin was granted: {errno}"),
        mend,
    )
}

/// The size of a huge page in bytes: what one table of pages covers.
fn huge_page() -> u64 {
    let page = mmap::page_size();
    page * (page / 8)
}

fn is_placed(arguments: &Arguments<'_>) -> bool {
    arguments.address != 0 || arguments.flags & (MAP_FIXED | MAP_FIXED_NOREPLACE) != 0
}

/// Whether `address` lets huge pages of the file lie in huge pages of memory.
fn is_congruent(address: usize, offset: u64) -> bool {
    (address as u64)
        .abs_diff(offset)
        .is_multiple_of(huge_page())
}

/// Maps the whole range as the file itself.
///
/// # Safety
///
/// As [`map`].
pub(super) unsafe fn map_whole(
    plan: &Plan,
    arguments: Arguments<'_>,
    offset: u64,
    length: usize,
) -> Result<Mapped, Error> {
    let Arguments {
        pinned,
        address,
        prot,
        flags,
    } = arguments;
    // The kernel aligns by itself, most of the time.
    // SAFETY: the caller answers for MAP_FIXED.
    let mapped =
        unsafe { mmap::map(address, length, prot, flags, pinned, offset) }.map_err(failed)?;
    let whole = |address| Mapped {
        address,
        frozen: None,
    };
    if is_placed(&arguments) || is_congruent(mapped, offset) || !plan.has_room_for(huge_page()) {
        return Ok(whole(mapped));
    }
    let aligned = || {
        // SAFETY: no address is asked for.
        let place = unsafe { reserve(plan, arguments, offset, length) }?;
        // SAFETY: over our own reservation.
        let again = unsafe { mmap::map(place, length, prot, flags | MAP_FIXED, pinned, offset) };
        again.inspect_err(|_| {
            // SAFETY: nobody knows of it.
            let _ = unsafe { mmap::unmap(place, length) };
        })
    };
    match aligned() {
        Ok(again) => {
            // SAFETY: nobody knows of it.
            let _ = unsafe { mmap::unmap(mapped, length) };
            Ok(whole(again))
        }
        // Small pages will do.
        Err(_) => Ok(whole(mapped)),
    }
}

/// Private memory that nothing is in yet, in the place of the whole range.
///
/// # Safety
///
/// As [`map`].
unsafe fn reserve(
    plan: &Plan,
    arguments: Arguments<'_>,
    offset: u64,
    length: usize,
) -> Result<usize, Errno> {
    const PLACE: i32 = MAP_FIXED | MAP_FIXED_NOREPLACE | mmap::MAP_32BIT;
    let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | arguments.flags & PLACE;
    let prot = PROT_NONE;
    let huge = usize::try_from(huge_page()).map_err(|_| Errno::NOMEM)?;
    let spare = if is_placed(&arguments) || !plan.has_room_for(huge_page()) {
        0
    } else {
        huge
    };
    let size = length.checked_add(spare).ok_or(Errno::NOMEM)?;
    // SAFETY: the caller answers for MAP_FIXED.
    let start = unsafe { mmap::map_anonymous(arguments.address, size, prot, flags) }?;
    if spare == 0 {
        return Ok(start);
    }
    let past = usize::try_from((start as u64).wrapping_sub(offset) % huge_page())
        .map_err(|_| Errno::NOMEM)?;
    let skip = if past == 0 { 0 } else { huge - past };
    let address = start + skip;
    for (at, length) in [(start, skip), (address + length, spare - skip)] {
        if length > 0 {
            // SAFETY: the ends of our own reservation. They stay reserved if
            // it fails.
            let _ = unsafe { mmap::unmap(at, length) };
        }
    }
    Ok(address)
}

/// Puts the segments into a reservation.
///
/// # Safety
///
/// The reservation must be the caller's alone.
unsafe fn fill(
    plan: &Plan,
    arguments: Arguments<'_>,
    offset: u64,
    address: usize,
) -> Result<Frozen, Error> {
    let place = Place { offset, address };
    for segment in plan.segments() {
        if segment.pages == Pages::Stable {
            // SAFETY: a part of the reservation.
            unsafe { map_part(&place, arguments, &segment.range) }.map_err(failed)?;
        }
    }
    let runs: Vec<Run> = plan
        .frozen_runs()
        .map(|run| place.run(run, plan.page(), arguments.pinned))
        .collect::<Result<_, _>>()?;
    // SAFETY: what is left of the reservation, which nobody else knows of.
    unsafe { frozen::protect(runs, arguments.pinned) }
}

/// Maps a part of the file itself.
///
/// # Safety
///
/// Nothing may refer to the memory in its place.
unsafe fn map_part(
    place: &Place,
    arguments: Arguments<'_>,
    range: &Range<u64>,
) -> Result<(), Errno> {
    let memory = place.of(range);
    let flags = arguments.flags & !MAP_FIXED_NOREPLACE | MAP_FIXED;
    // SAFETY: the caller's promise.
    unsafe {
        mmap::map(
            memory.start,
            memory.len(),
            arguments.prot,
            flags,
            arguments.pinned,
            range.start,
        )
    }
    .map(drop)
}

/// Where bytes of the file are in memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) offset: u64,
    pub(crate) address: usize,
}

impl Place {
    fn of(&self, range: &Range<u64>) -> Range<usize> {
        // The whole range was found to fit into memory.
        let at = |offset: u64| {
            self.address + usize::try_from(offset - self.offset).unwrap_or(usize::MAX / 2)
        };
        at(range.start)..at(range.end)
    }

    /// A run of segments that are not the file itself.
    fn run(&self, segments: &[Segment], page: u64, pinned: BorrowedFd<'_>) -> Result<Run, Error> {
        let (Some(first), Some(last)) = (segments.first(), segments.last()) else {
            return Err(Error::system("mmap", Errno::INVAL));
        };
        let mut run = Run {
            range: self.of(&(first.range.start..last.range.end)),
            faulting: Vec::new(),
            copied: Vec::new(),
        };
        for segment in segments {
            match segment.pages {
                Pages::Stable | Pages::Zeros => {}
                Pages::Faulting => run.faulting.push(self.of(&segment.range)),
                Pages::Copied => {
                    let mut at = segment.range.start;
                    while at < segment.range.end {
                        let bytes = read_page(pinned, at, page)
                            .map_err(|errno| Error::system("pread", errno))?;
                        run.copied.push((self.of(&(at..at + page)).start, bytes));
                        at += page;
                    }
                }
            }
        }
        Ok(run)
    }
}

/// A page as the file has it; zeros behind its end.
fn read_page(pinned: BorrowedFd<'_>, offset: u64, page: u64) -> Result<Vec<u8>, Errno> {
    let mut bytes = vec![0; usize::try_from(page).map_err(|_| Errno::NOMEM)?];
    let mut done = 0;
    while done < bytes.len() {
        match rustix::io::pread(pinned, &mut bytes[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(Errno::INTR) => {}
            Err(other) => return Err(other),
        }
    }
    Ok(bytes)
}

/// Says what the kernel only hints at, before anything is mapped: whether
/// `needed` mappings fit in the place of `there`.
pub(crate) fn check_count(needed: usize, there: usize) -> Result<(), Error> {
    let more = needed.saturating_sub(there);
    if more <= FEW {
        return Ok(());
    }
    let limit = proc::max_map_count();
    let present = proc::count_own_mappings();
    // What cannot be read cannot be compared: mmap will tell.
    let (Ok(limit), Ok(present)) = (limit, present) else {
        return Ok(());
    };
    // mmap itself needs room for the two pieces a mapping is cut into.
    if more + present + 2 <= limit {
        return Ok(());
    }
    Err(Error::new(
        Kind::Limit,
        Errno::NOMEM,
        format!(
            "the range has so many pieces that it takes {more} memory mappings more; with the \
             {present} there are, that is more than vm.max_map_count allows ({limit})"
        ),
        format!(
            "sysctl vm.max_map_count={}, or make the range stable first (mapdirect prepare)",
            more + present + 2 + limit / 8
        ),
    ))
}

/// Puts the file itself in the place of frozen memory: `added`, in a range
/// that is mapped from `place` on. Where that fails, the memory raises SIGBUS
/// from then on: it is not true any more. Returns how many of them are there.
///
/// # Safety
///
/// Nothing may refer to the memory.
pub(crate) unsafe fn replace(
    place: &Place,
    arguments: Arguments<'_>,
    added: &[Segment],
) -> (usize, Result<(), Error>) {
    for (at, segment) in added.iter().enumerate() {
        // SAFETY: the caller's promise.
        let mapped = unsafe { map_part(place, arguments, &segment.range) };
        if let Err(errno) = mapped {
            for segment in &added[at..] {
                // SAFETY: as above.
                unsafe { frozen::let_fault(&place.of(&segment.range)) };
            }
            return (at, Err(failed(errno)));
        }
    }
    (added.len(), Ok(()))
}
