//! Finds out who did something: user, program, control group.
//!
//! Everything is read from `/proc` by number, so a start time is read before
//! and after: if both are the same, the number was that of one thread all the
//! time. Nothing here waits for the thread itself but for what
//! [`look`](crate::gate::fanotify::look) names: the lock of a directory of
//! `/proc`, and from Linux 7.0 for `exec_update_lock`, for the link `exe`. So
//! this runs only where nobody has to wait for it.

use mapdirect_proto::record::{Actor, MAX_PLACE};
use mapdirect_sys::{proc, proc_status};

/// What `/proc` says about a thread, or `None` if it is gone, or if it began
/// after `before`, in clock ticks since boot: then it is another thread.
pub(crate) fn find(tid: i32, before: Option<u64>) -> Option<Actor> {
    let began = proc::start_time(tid).ok()?;
    if before.is_some_and(|before| began >= before) {
        return None;
    }
    let status = proc::read_task_file(tid, "status").ok()?;
    let mut actor = Actor::default();
    actor.tid = tid;
    actor.pid = proc_status::process_in(&status)?;
    // The real user: the owner even of a program with the set-user-id bit.
    actor.uid = proc_status::parse(&status).map(|ids| ids.users[0]);
    actor.command = proc::command(tid);
    // Kernel threads run no program.
    actor.executable = std::fs::read_link(format!("/proc/{tid}/exe"))
        .map(|path| cut(&proc::printable(&path.to_string_lossy())))
        .unwrap_or_default();
    actor.cgroup = proc::read_task_file(tid, "cgroup")
        .ok()
        .and_then(|text| proc::parse_cgroup(&text).map(|path| cut(&proc::printable(path))))
        .unwrap_or_default();
    (proc::start_time(tid) == Ok(began)).then_some(actor)
}

/// Strangers choose these texts, and many records are kept.
fn cut(text: &str) -> String {
    text.chars()
        .scan(0, |length, character| {
            *length += character.len_utf8();
            (*length <= MAX_PLACE).then_some(character)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_thread_is_found_and_no_other_is_taken_for_it() {
        let own = rustix::thread::gettid().as_raw_nonzero().get();
        let actor = find(own, None).unwrap();
        assert_eq!(actor.pid, std::process::id().cast_signed());
        assert_eq!(actor.tid, own);
        assert_eq!(actor.uid, Some(rustix::process::getuid().as_raw()));
        let program = std::env::current_exe().unwrap();
        assert_eq!(actor.executable, program.to_string_lossy());
        let began = proc::start_time(own).unwrap();
        assert_eq!(find(own, Some(began)), None, "a thread that came later");
        assert!(find(own, Some(began + 1)).is_some());
        assert_eq!(find(i32::MAX, None), None);
        // A kernel thread runs no program.
        assert_eq!(
            find(2, None).map(|actor| actor.executable),
            Some(String::new())
        );
    }

    #[test]
    fn long_texts_are_cut() {
        assert_eq!(cut("abc"), "abc");
        let long = "ü".repeat(2000);
        assert_eq!(cut(&long).len(), MAX_PLACE);
    }
}
