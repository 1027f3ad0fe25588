//! Looking around in `/proc`, for a limited time.
//!
//! Most of what `/proc` tells about a process cannot be read while that
//! process is in the middle of `execve(2)`: the kernel holds its
//! `exec_update_lock` from the exchange of the memory until the descriptors
//! marked close-on-exec are closed (`begin_new_exec`, fs/exec.c). If what one
//! of these steps waits for never comes, say an answer of a FUSE server, then
//! whoever reads waits for ever, and cannot be called back. So every look is
//! taken by a thread of its own, which is left alone when it takes too long.

use mapdirect_sys::descriptors::spawn_apart;
use mapdirect_sys::proc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

/// Looks under way at any time, those that hang included.
const MOST: usize = 16;

/// How much longer than somebody's patience a look may take, so that a busy
/// processor is not taken for a process that cannot be looked at.
const GRACE: Duration = Duration::from_millis(200);

static LOOKS: Looks = Looks::new(MOST);

/// A process could not be looked at in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stuck {
    /// Which; 0 if it was not even begun with any.
    pub(crate) pid: i32,
}

impl Stuck {
    /// What could not be done, for a person.
    pub(crate) fn obstacle(self) -> String {
        if self.pid == 0 {
            return String::from("there was no time to look at the processes of the system");
        }
        format!(
            "process {} ({}) cannot be looked at: it has been in the middle of execve(2), or \
             the system too busy, for all that time",
            self.pid,
            // This can be read then, unless its directory in /proc is locked.
            within(GRACE, move |_| proc::command(self.pid)).unwrap_or_else(|_| String::from("?"))
        )
    }

    /// Waits while a look hangs at this process; says whether that is over.
    pub(crate) fn is_over_before(self, deadline: Instant) -> bool {
        loop {
            if !LOOKS.hangs_at(self.pid) {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// A look under way.
#[derive(Debug, Default)]
struct Look {
    /// The process it is at.
    pid: AtomicI32,
    /// Nobody waits for it any more.
    is_given_up: AtomicBool,
}

/// Tells what a look is at.
#[derive(Debug)]
pub(crate) struct Looking {
    looks: &'static Looks,
    look: Arc<Look>,
}

impl Looking {
    /// Notes that `pid` is looked at next.
    ///
    /// # Errors
    ///
    /// An earlier look hangs there: this one would as well.
    pub(crate) fn at(&self, pid: i32) -> Result<(), Stuck> {
        if self.looks.hangs_at(pid) {
            return Err(Stuck { pid });
        }
        self.look.pid.store(pid, SeqCst);
        Ok(())
    }
}

/// Takes a look in a thread of its own and waits for what it sees, but not
/// for longer than `limit`. What it sees later is dropped.
pub(crate) fn within<T: Send + 'static>(
    limit: Duration,
    look: impl FnOnce(&Looking) -> T + Send + 'static,
) -> Result<T, Stuck> {
    LOOKS.within(limit, look)
}

/// The limit of a look for somebody who is patient until `deadline`.
pub(crate) fn limit(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()) + GRACE
}

/// Where the oldest look under way is: what those who share it wait for.
pub(crate) fn oldest() -> Stuck {
    let looks = LOOKS.lock();
    Stuck {
        pid: looks.first().map_or(0, |look| look.pid.load(SeqCst)),
    }
}

/// Every look under way.
#[derive(Debug)]
struct Looks {
    under_way: Mutex<Vec<Arc<Look>>>,
    ended: Condvar,
    most: usize,
}

impl Looks {
    const fn new(most: usize) -> Self {
        Self {
            under_way: Mutex::new(Vec::new()),
            ended: Condvar::new(),
            most,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Look>>> {
        self.under_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn hangs_at(&self, pid: i32) -> bool {
        self.lock()
            .iter()
            .any(|look| look.is_given_up.load(SeqCst) && look.pid.load(SeqCst) == pid)
    }

    fn within<T: Send + 'static>(
        &'static self,
        limit: Duration,
        look: impl FnOnce(&Looking) -> T + Send + 'static,
    ) -> Result<T, Stuck> {
        let deadline = Instant::now() + limit;
        let under_way = UnderWay {
            looks: self,
            look: self.begin(deadline)?,
        };
        let noted = Arc::clone(&under_way.look);
        let looking = Looking {
            looks: self,
            look: Arc::clone(&noted),
        };
        let (tell, told) = mpsc::channel();
        let builder = std::thread::Builder::new()
            .name(String::from("look"))
            .stack_size(256 * 1024);
        // What hangs may not even be ended by SIGKILL: nobody may have to
        // wait for the descriptors it has, least of all for those of a gate.
        let spawned = spawn_apart(builder, None, move || {
            // It counts as under way until it is told.
            let _under_way = under_way;
            let seen = look(&looking);
            // Nobody listens any more if it took too long.
            let _ = tell.send(seen);
        });
        if spawned.is_err() {
            return Err(Stuck { pid: 0 });
        }
        told.recv_timeout(deadline.saturating_duration_since(Instant::now()))
            .or_else(|_| {
                noted.is_given_up.store(true, SeqCst);
                told.try_recv()
            })
            .map_err(|_| Stuck {
                pid: noted.pid.load(SeqCst),
            })
    }

    /// Waits until there is room for another look.
    fn begin(&self, deadline: Instant) -> Result<Arc<Look>, Stuck> {
        let mut under_way = self.lock();
        while under_way.len() >= self.most {
            let left = deadline.saturating_duration_since(Instant::now());
            let hang = under_way.iter().all(|look| look.is_given_up.load(SeqCst));
            if hang || left.is_zero() {
                let pid = under_way.first().map_or(0, |look| look.pid.load(SeqCst));
                return Err(Stuck { pid });
            }
            (under_way, _) = self
                .ended
                .wait_timeout(under_way, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let look = Arc::new(Look::default());
        under_way.push(Arc::clone(&look));
        Ok(look)
    }
}

/// Makes room for another look when it is dropped.
struct UnderWay {
    looks: &'static Looks,
    look: Arc<Look>,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.looks
            .lock()
            .retain(|look| !Arc::ptr_eq(look, &self.look));
        self.looks.ended.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_millis(50);
    const LATE: Duration = Duration::from_secs(60);

    fn looks(most: usize) -> &'static Looks {
        Box::leak(Box::new(Looks::new(most)))
    }

    /// A look that hangs at a process until the sender is dropped.
    fn hang(looks: &'static Looks, pid: i32) -> (Result<(), Stuck>, mpsc::Sender<()>) {
        let (release, released) = mpsc::channel::<()>();
        let seen = looks.within(SOON, move |looking| {
            let _ = looking.at(pid);
            let _ = released.recv();
        });
        (seen, release)
    }

    #[test]
    fn a_look_tells_what_it_sees() {
        assert_eq!(looks(1).within(LATE, |_| 7), Ok(7));
        assert_eq!(within(LATE, |_| 7), Ok(7));
    }

    #[test]
    fn a_look_that_hangs_is_left_alone_and_names_the_process() {
        let looks = looks(2);
        let begun = Instant::now();
        let (seen, release) = hang(looks, 77);
        assert!(begun.elapsed() < LATE / 2);
        assert_eq!(seen, Err(Stuck { pid: 77 }));
        // The next one does not go there, and sees the rest.
        let next = looks.within(LATE, |looking| (looking.at(76), looking.at(77)));
        assert_eq!(next, Ok((Ok(()), Err(Stuck { pid: 77 }))));
        drop(release);
        while looks.hangs_at(77) {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(looks.within(LATE, |looking| looking.at(77)), Ok(Ok(())));
    }

    #[test]
    fn no_more_than_so_many_hang() {
        let looks = looks(3);
        let hanging: Vec<_> = (1..=3).map(|pid| hang(looks, pid)).collect();
        let begun = Instant::now();
        assert_eq!(looks.within(LATE, |_| ()), Err(Stuck { pid: 1 }));
        assert!(begun.elapsed() < LATE / 2, "at once");
        assert_eq!(looks.lock().len(), 3);
        drop(hanging);
        while !looks.lock().is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(looks.within(LATE, |_| ()), Ok(()));
    }

    #[test]
    fn a_crowd_waits_for_its_turn() {
        let looks = looks(2);
        std::thread::scope(|scope| {
            for _ in 0..20 {
                scope.spawn(|| {
                    let pause = |_: &Looking| std::thread::sleep(Duration::from_millis(1));
                    assert_eq!(looks.within(LATE, pause), Ok(()));
                });
            }
        });
    }
}
