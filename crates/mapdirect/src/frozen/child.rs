//! What a child of fork(2) gets in the place of frozen memory.

use super::thread::SPEAKING;
use mapdirect_sys::mmap::{
    self, MAP_FIXED, MAP_FIXED_NOREPLACE, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, PROT_NONE,
    PROT_READ, PROT_WRITE,
};
use mapdirect_sys::{Errno, proc};
use rustix::fs::MemfdFlags;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering::{AcqRel, SeqCst};

/// The child has gaps in its memory, and no thread: nothing may come to lie
/// in the gaps that a stray store could hit.
pub(super) extern "C" fn in_child() {
    // Nobody of those who spoke through it is here.
    let there = SPEAKING.swap(std::ptr::null_mut(), AcqRel);
    if there.is_null() {
        return;
    }
    // SAFETY: made by `Box::into_raw`, and never freed.
    let speaking = unsafe { &*there };
    // Whoever heard of something at this moment may have made room for
    // others: then only what is empty can be told to be ours.
    let is_sure = !speaking.hearing.load(SeqCst);
    let Ok(regions) = speaking.regions[speaking.intact.load(SeqCst)].try_lock() else {
        return;
    };
    if regions.0.is_empty() {
        return;
    }
    let empty = rustix::fs::memfd_create(c"mapdirect-empty", MemfdFlags::CLOEXEC);
    let empty = empty.as_ref().ok().map(AsFd::as_fd);
    for (start, (end, _)) in &regions.0 {
        let range = *start..*end;
        if block(&range, MAP_FIXED_NOREPLACE, empty).is_err() {
            // The program has it inherited all the same (MADV_DOFORK): what
            // is there is not protected.
            block_inherited(&range, empty, is_sure);
        }
    }
}

/// Has every access to a range raise SIGBUS: there is a file mapped, and
/// nothing in it. Or SIGSEGV, if there is no file either.
fn block(range: &Range<usize>, how: i32, empty: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
    let (start, length) = (range.start, range.len());
    if let Some(empty) = empty {
        let prot = PROT_READ | PROT_WRITE;
        // SAFETY: takes no place that is in use, or that of memory which is
        // the library's own.
        return unsafe { mmap::map(start, length, prot, MAP_SHARED | how, empty, 0) }.map(drop);
    }
    let flags = MAP_PRIVATE | MAP_NORESERVE | how;
    // SAFETY: as above.
    unsafe { mmap::map_anonymous(start, length, PROT_NONE, flags) }.map(drop)
}

/// Blocks what is nothing in a range, and if that `is_ours` also memory
/// without a file and our own memory file.
fn block_inherited(range: &Range<usize>, empty: Option<BorrowedFd<'_>>, is_ours: bool) {
    let mut at = range.start;
    let gap = |part: Range<usize>| {
        if !part.is_empty() {
            // Whatever is there is not ours.
            let _ = block(&part, MAP_FIXED_NOREPLACE, empty);
        }
    };
    for (entry, name) in proc::own_mappings().unwrap_or_default() {
        let (Ok(start), Ok(end)) = (usize::try_from(entry.start), usize::try_from(entry.end))
        else {
            continue;
        };
        let part = start.max(range.start)..end.min(range.end);
        if part.is_empty() {
            continue;
        }
        gap(at..part.start);
        at = part.end;
        let ours = entry.inode == 0 && !entry.shared || name.starts_with("/memfd:mapdirect-copies");
        if is_ours && ours {
            // If it fails, the child has what it asked for.
            let _ = block(&part, MAP_FIXED, empty);
        }
    }
    gap(at..range.end);
}
