//! A family: a holder and its descendants, which have a holder's rights
//! together.

use crate::Errno;
use mapdirect_sys::{ancestry, pidfd, proc};
use std::os::fd::{AsFd, OwnedFd};

/// A holder, as the root of a family.
#[derive(Debug)]
pub(crate) struct Family {
    pid: i32,
    /// When it started, in clock ticks since boot.
    began: u64,
    process: OwnedFd,
}

impl Family {
    /// The family of a process. The caller makes sure that the number names the
    /// process before and afterwards.
    pub(crate) fn of(pid: i32) -> Result<Self, Errno> {
        let process = pidfd::of_process(pid)?;
        let began = proc::start_time(pid)?;
        Ok(Self {
            pid,
            began,
            process,
        })
    }

    /// The family of the process with this number that started then; of none if
    /// it has ended, or never was.
    pub(crate) fn that_began(pid: i32, began: u64) -> Option<Self> {
        let family = Self::of(pid).ok().filter(|_| began != 0)?;
        (family.began == began && family.lives()).then_some(family)
    }

    /// When the holder started, in clock ticks since boot.
    pub(crate) fn began(&self) -> u64 {
        self.began
    }

    /// The number of the holder.
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether the holder has not ended: its number is its own then.
    pub(crate) fn lives(&self) -> bool {
        !pidfd::has_ended(self.process.as_fd())
    }

    /// Whether a process, which does not end meanwhile, belongs to the family.
    /// What cannot be found out counts as no. Waits for nobody.
    pub(crate) fn has(&self, process: i32) -> bool {
        // The holder is looked at last: it had its number until then.
        ancestry::descends(process, |pid| pid == self.pid) && self.lives()
    }

    /// [`has`](Self::has) for a process that may end meanwhile, and for every
    /// kernel. May wait: not for the gate thread.
    pub(crate) fn may_have(&self, process: i32) -> bool {
        ancestry::descends_by_proc(process, |pid| pid == self.pid) && self.lives()
    }
}

/// The process that a thread belongs to, which waits for an answer and so does
/// not end. Waits for nobody.
pub(crate) fn process_of(tid: i32) -> Option<i32> {
    let thread = pidfd::of_thread(tid).ok()?;
    pidfd::process_of(thread.as_fd()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn children_belong_to_the_family_as_long_as_its_holder_lives() {
        let own = std::process::id().cast_signed();
        let mut holder = Command::new("sh")
            .args(["-c", "sleep 60 & echo $!; wait"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut output = std::io::BufReader::new(holder.stdout.take().unwrap());
        std::io::BufRead::read_line(&mut output, &mut line).unwrap();
        let child: i32 = line.trim().parse().unwrap();
        let family = Family::of(holder.id().cast_signed()).unwrap();
        assert!(family.may_have(child) && family.may_have(family.pid()));
        assert!(!family.may_have(own));
        let told = pidfd::parent(family.process.as_fd());
        if told.is_ok() {
            assert!(family.has(child) && family.has(family.pid()) && !family.has(own));
        }
        holder.kill().unwrap();
        assert_eq!(holder.wait().unwrap().code(), None);
        assert!(!family.lives());
        assert!(!family.may_have(child) && !family.may_have(family.pid()));
        mapdirect_sys::signal::kill(child, mapdirect_sys::signal::Signal::KILL).unwrap();
    }
}
