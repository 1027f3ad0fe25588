//! Looks at one thread.

use super::{Run, Seen, Subject};
use crate::Errno;
use crate::gate::fanotify::classify::{self, classify_open};
use crate::policy::OperationKind;
use crate::suspicion::{self, Finding, LookFor, judge};
use crate::table::InodeId;
use mapdirect_sys::kcmp;
use mapdirect_sys::proc::{self, Runs, SyscallState};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::os::fd::AsFd;

/// The functions on a thread's stack, or `None` if it is uncertain that the
/// stack is complete and that the thread did not run while it was read.
///
/// # Errors
///
/// The thread is gone, or must not be looked at.
fn exact_stack(tid: i32) -> Result<Option<String>, Errno> {
    let asleep = || matches!(proc::sleeps_in(tid), Ok(Some(_)));
    for _ in 0..3 {
        let before: Option<Runs> = proc::runs(tid).ok();
        let stack = proc::read_task_file(tid, "stack")?;
        let sleeps = asleep();
        let after = proc::runs(tid).ok();
        let functions: Vec<&str> = proc::stack_functions(&stack).collect();
        // On x86-64 a stack in use is never shown: the kernel does not unwind
        // while the thread is on another processor, and otherwise begins where
        // the thread was last switched out (`__unwind_start`,
        // arch/x86/kernel/unwind_orc.c). arm64 does not check this, so the
        // thread must sleep there.
        let is_readable = sleeps || cfg!(target_arch = "x86_64");
        let is_whole = classify::is_whole(&functions) || sleeps && !functions.is_empty();
        if before.is_some() && before == after && is_readable && is_whole {
            return Ok(Some(stack));
        }
        if before.is_none() {
            // If its runs cannot be counted, the thread must sleep all the
            // while.
            return Ok((asleep() && sleeps && is_whole).then_some(stack));
        }
    }
    Ok(None)
}

/// Takes a thread's processor away for a moment, so that the thread's stack can
/// be read.
fn visit(tid: i32) -> Option<String> {
    let home = sched_getaffinity(None).ok()?;
    let processor = proc::processor(tid).ok()?;
    let mut there = CpuSet::new();
    if processor >= CpuSet::MAX_CPU {
        return None;
    }
    there.set(processor);
    sched_setaffinity(None, &there).ok()?;
    // This thread runs there now, so the other thread does not.
    let stack = exact_stack(tid).ok().flatten();
    let _ = sched_setaffinity(None, &home);
    stack
}

/// Looks at a thread. Anything beyond a first look is read only when it
/// decides.
pub(super) fn look(look_for: LookFor, subject: Subject, tid: i32, looks: u32) -> Seen {
    if look_for == LookFor::Truncations && sleeps_in_another_call(tid) {
        return Seen::Innocent;
    }
    let Ok(sleeps_in) = proc::sleeps_in(tid) else {
        return Seen::Innocent;
    };
    if let Some(function) = &sleeps_in
        && suspicion::is_elsewhere(look_for, function)
    {
        return Seen::Innocent;
    }
    /// After so many looks the thread has had time to sleep, or to give way, by
    /// itself.
    const LOOKS_FROM_AFAR: u32 = 3;
    // The thread is gone; or it has privileges that this process lacks.
    let Ok(stack) = exact_stack(tid) else {
        return Seen::Innocent;
    };
    let has_ended = || proc::has_ended(tid).unwrap_or(true);
    let visits = looks >= LOOKS_FROM_AFAR && stack.is_none() && !has_ended();
    let stack = stack.or_else(|| visits.then(|| visit(tid))?);
    let Some(stack) = stack else {
        // A thread that has ended has no stack any more, but still exists until
        // its parent collects it.
        if has_ended() {
            return Seen::Innocent;
        }
        return Seen::Running(Run::of(tid).unwrap_or(Run::ENDLESS));
    };
    let functions: Vec<&str> = proc::stack_functions(&stack).collect();
    let found = judge(look_for, &functions, subject.prefix);
    match found {
        Finding::Nothing => Seen::Innocent,
        Finding::MayByDescriptor(_) if has_other_files(subject.id, tid, &functions) => {
            Seen::Innocent
        }
        _ if look_for == LookFor::AllTruncations && opens_without_truncating(tid, &functions) => {
            Seen::Innocent
        }
        found => Seen::At(found),
    }
}

/// Whether a thread is opening a file by a call that does not truncate.
fn opens_without_truncating(tid: i32, functions: &[&str]) -> bool {
    let truncates = functions.iter().any(|name| name.contains("truncate"));
    !truncates
        && inside(tid).is_some_and(|syscall| {
            classify_open(Some(&syscall), functions) != OperationKind::OpenTruncate
        })
}

/// Whether a thread sleeps in a system call of a program that truncates nothing
/// by path. This settles most threads of a system, with the file of `/proc`
/// that is quickest to read.
///
/// Registers prove this, though they prove little elsewhere. On its way out of
/// a call a thread may do other work with the registers of that call
/// (`io_uring`, a core dump), but it truncates nothing by path there. While the
/// thread sleeps, nobody changes its registers.
fn sleeps_in_another_call(tid: i32) -> bool {
    inside(tid).is_some_and(|syscall| {
        syscall.is_genuine() && TRUNCATES.is_some_and(|numbers| !numbers.contains(&syscall.number))
    })
}

/// The numbers of truncate(2) and truncate64(2) in any ABI, or `None` if they
/// are not known. A call that has one of these numbers in another ABI is looked
/// at more closely, too.
const TRUNCATES: Option<&[i64]> = if cfg!(target_arch = "x86_64") {
    // x86-64, x32, and i386 with two.
    Some(&[76, 76 | 0x4000_0000, 92, 193])
} else if cfg!(target_arch = "aarch64") {
    // arm64, and 32-bit ARM with two.
    Some(&[45, 92, 193])
} else {
    None
};

/// The system call in which a thread sleeps, if it does.
fn inside(tid: i32) -> Option<proc::Syscall> {
    let file = proc::open_task_file(tid, "syscall").ok()?;
    let mut buffer = [0; 256];
    let text = proc::reread(file.as_fd(), &mut buffer).ok()?;
    match proc::parse_syscall(text) {
        Some(SyscallState::Inside(syscall)) => Some(syscall),
        _ => None,
    }
}

/// Whether a thread's call was made with descriptors of other files that nobody
/// can have replaced since: the thread is the only one of its process, and no
/// other process shares its descriptor table.
fn has_other_files(id: InodeId, tid: i32, functions: &[&str]) -> bool {
    let Some(syscall) = inside(tid) else {
        return false;
    };
    let Some(syscall) = classify::own_registers(Some(&syscall), functions) else {
        return false;
    };
    let Some(descriptors) = suspicion::descriptors(syscall) else {
        return false;
    };
    let are_others = || {
        descriptors.iter().all(|fd| {
            let link = format!("/proc/{tid}/fd/{fd}");
            crate::openers::identify(&link).is_some_and(|other| other != id)
        })
    };
    let is_alone = || proc::numbers_in(&format!("/proc/{tid}/task")).is_ok_and(|t| t.len() == 1);
    let shares = || {
        let pids = proc::numbers_in("/proc").unwrap_or_default();
        pids.into_iter()
            .any(|pid| pid != tid && kcmp::same_descriptors(tid, pid))
    };
    are_others() && is_alone() && !shares()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::suspicion::Prefix;
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
    use std::time::Duration;

    fn subject() -> Subject {
        Subject {
            id: InodeId { dev: 0, inode: 0 },
            prefix: Prefix("xfs_"),
        }
    }

    /// A thread that never leaves its processor by itself is seen all the same.
    #[test]
    fn a_thread_that_runs_is_visited() {
        if !rustix::process::geteuid().is_root() || cfg!(not(target_arch = "x86_64")) {
            // Stacks are root's to read.
            return;
        }
        let over = AtomicBool::new(false);
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                tell.send(rustix::thread::gettid().as_raw_nonzero().get())
                    .unwrap();
                while !over.load(SeqCst) {
                    std::hint::spin_loop();
                }
            });
            let tid = told.recv().unwrap();
            let seen = (0..100).find_map(|_| visit(tid));
            over.store(true, SeqCst);
            let stack = seen.unwrap();
            let functions: Vec<&str> = proc::stack_functions(&stack).collect();
            assert_eq!(
                judge(LookFor::Changes, &functions, Prefix("")),
                Finding::Nothing
            );
        });
    }

    /// A process that nobody has collected yet is in the middle of nothing.
    #[test]
    fn what_has_ended_is_no_suspect() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id().cast_signed();
        while !proc::has_ended(pid).unwrap() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let looks = [LookFor::Truncations, LookFor::Opens, LookFor::Changes];
        for (look_for, looks) in looks.into_iter().zip(0..) {
            let seen = look(look_for, subject(), pid, looks);
            assert!(matches!(seen, Seen::Innocent), "{seen:?}");
        }
        child.wait().unwrap();
    }

    #[test]
    fn a_thread_that_sleeps_is_read_exactly() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let (release, released) = std::sync::mpsc::channel::<()>();
        let (tell, told) = std::sync::mpsc::channel();
        let sleeper = std::thread::spawn(move || {
            tell.send(rustix::thread::gettid().as_raw_nonzero().get())
                .unwrap();
            let _ = released.recv();
        });
        let tid = told.recv().unwrap();
        let stack = (0..1000).find_map(|_| {
            std::thread::sleep(Duration::from_millis(1));
            exact_stack(tid)
                .unwrap()
                .filter(|stack| stack.contains("futex"))
        });
        assert!(stack.is_some());
        drop(release);
        sleeper.join().unwrap();
        assert!(exact_stack(tid).is_err());
    }

    /// A program that waits sleeps in a call that truncates nothing. A thread of
    /// the kernel sleeps in no call, though it shows number 0.
    #[test]
    fn a_call_that_truncates_nothing_is_told_by_its_number() {
        if !rustix::process::geteuid().is_root() || TRUNCATES.is_none() {
            return;
        }
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = child.id().cast_signed();
        let sleeps = (0..1000).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(1));
            sleeps_in_another_call(pid)
        });
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(sleeps);
        assert!(!sleeps_in_another_call(pid), "it has ended");
        // kthreadd
        assert!(proc::command(2) != "kthreadd" || !sleeps_in_another_call(2));
    }
}
