//! Notices to holders: that blocks of a pin have changed, or that nothing keeps
//! a pin any more.
//!
//! A holder has a connection for notices (`Request::Watch`). The guard never
//! waits for a holder that does not read: if the socket does not take a notice,
//! the guard closes the connection. The library then connects again, and is
//! told what has happened to each of its pins so far. So each pin records that
//! in its own [`Fate`].

use crate::table::{Pin, Table, Watched};
use crossbeam_queue::ArrayQueue;
use mapdirect_proto::{Breach, Notice, Reply, WatchedPin};
use mapdirect_sys::proc;
use mapdirect_sys::unix::{Sender, Socket};
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::Thread;

/// The number of breaches kept for `mapdirect status`.
const RECENT: usize = 64;
/// The number of breaches kept with each pin, for a holder that asks later. The
/// first ones are kept, since the first breach ends the promise.
const OF_A_PIN: usize = 4;
/// The number of notices kept for the operator of the guard until they are
/// printed.
const UNTOLD: usize = 1024;

/// What has happened to a pin. Only [`Notices`] changes and reads this, under
/// its lock.
#[derive(Debug, Default)]
pub(crate) struct Fate {
    inner: Mutex<Inner>,
    /// The process that asked for the pin, and its start time. Others may hold
    /// the pin later.
    asker: OnceLock<(i32, u64)>,
}

#[derive(Debug, Default)]
struct Inner {
    count: u64,
    first: Vec<Breach>,
    lost: Option<String>,
    /// What became of names of the file, if the pin denies that; the first few.
    renamed: Vec<String>,
}

impl Fate {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records the process that asked for the pin, and its start time, because
    /// process ids are used again.
    pub(crate) fn asked_by(&self, pid: i32, start: u64) {
        let _ = self.asker.set((pid, start));
    }

    /// The process that asked for the pin, and its start time.
    pub(crate) fn asker(&self) -> Option<(i32, u64)> {
        self.asker.get().copied()
    }

    /// Takes over what an earlier guard has counted. Whoever holds the pin was
    /// told of it.
    pub(crate) fn had(&self, breaches: u64) {
        self.lock().count = breaches;
    }

    /// Whether this process asked for the pin.
    fn was_asked_by(&self, pid: i32) -> bool {
        self.asker
            .get()
            .is_some_and(|(asker, start)| *asker == pid && proc::start_time(pid) == Ok(*start))
    }

    /// The notices for a holder that asks now.
    fn notices(&self, pin: u64) -> Vec<Notice> {
        let inner = self.lock();
        let lost = inner.lost.clone().map(|why| Notice::Lost { pin, why });
        let breaches = inner.first.iter().cloned().map(Notice::Breach);
        let renamed = inner.renamed.iter().cloned();
        let renamed = renamed.map(|how| Notice::Renamed { pin, how });
        breaches.chain(renamed).chain(lost).collect()
    }

    /// The number of breaches, and why the pin is lost, if it is.
    pub(crate) fn summary(&self) -> (u64, Option<String>) {
        let inner = self.lock();
        (inner.count, inner.lost.clone())
    }
}

/// A connection that gets notices about pins.
#[derive(Debug)]
pub(crate) struct Watcher {
    socket: Arc<Socket>,
    /// The process and the user at the other end.
    peer: Sender,
    /// The pins that the connection asked about. Some of them may have ended.
    pins: Mutex<Vec<u64>>,
}

impl Watcher {
    pub(crate) fn new(socket: Arc<Socket>, peer: Sender) -> Arc<Self> {
        Arc::new(Self {
            socket,
            peer,
            pins: Mutex::default(),
        })
    }

    fn pins(&self) -> MutexGuard<'_, Vec<u64>> {
        self.pins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a notice, or closes the connection. Never waits.
    fn tell(&self, notice: &Notice) {
        let bytes = Reply::Notice(notice.clone()).encode();
        if self.socket.send_now(&[&bytes], &[]).is_err() {
            // The session of the connection sees its end, and ends, too.
            let _ = self.socket.shut_down();
        }
    }

    /// Answers a request, in the thread of the connection. This thread may wait
    /// a little for its client.
    fn answer(&self, notice: &Notice) {
        let bytes = Reply::Notice(notice.clone()).encode();
        if self.socket.send(&[&bytes], &[]).is_err() {
            let _ = self.socket.shut_down();
        }
    }

    /// Whether the other end may get notices about a pin: it asked for the pin
    /// and holds it, or is the user who holds the pin, or root.
    fn may_hear_of(&self, pin: &Pin) -> bool {
        self.peer.uid == 0
            || self.peer.uid == pin.uid
            || self.peer.pid == pin.pid && pin.fate.was_asked_by(self.peer.pid)
    }
}

/// The watchers of one pin.
#[derive(Debug)]
struct Audience {
    /// Lives as long as the pin does, dormant or not, whoever holds it.
    fate: Weak<Fate>,
    watchers: Vec<Arc<Watcher>>,
}

/// The audiences, by pin number.
#[derive(Debug, Default)]
struct Audiences {
    of: HashMap<u64, Audience>,
    /// At this number of audiences, those of ended pins are removed.
    enough: usize,
}

/// Records what happens to pins, and tells their holders.
#[derive(Debug)]
pub(crate) struct Notices {
    /// Locked while an event is recorded and told, and while a connection
    /// starts to watch and is told what was recorded before. So nothing is told
    /// twice, and nothing is missed.
    audiences: Mutex<Audiences>,
    recent: Mutex<VecDeque<Breach>>,
    breached: AtomicU64,
    /// Notices for the operator of the guard.
    untold: ArrayQueue<Notice>,
    /// Breaches that had no room there.
    lost: AtomicU64,
    /// The thread that prints these notices.
    printer: OnceLock<Thread>,
}

/// What the guard knows of a pin that a holder names.
pub(crate) enum Whereabouts {
    /// The pin, which is alive or may be taken up again.
    Known(Arc<Pin>),
    /// What became of the pin.
    Told(Box<Notice>),
}

impl Notices {
    pub(crate) fn new() -> Self {
        Self {
            audiences: Mutex::default(),
            recent: Mutex::default(),
            breached: AtomicU64::new(0),
            untold: ArrayQueue::new(UNTOLD),
            lost: AtomicU64::new(0),
            printer: OnceLock::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Audiences> {
        self.audiences
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that blocks of a pin have changed, and tells its holder. The
    /// inode and the pin are filled in here; so is the path, if `breach` has
    /// none.
    pub(crate) fn breach(&self, watched: &Watched, pin: &Pin, mut breach: Breach) {
        breach.pin = pin.id;
        (breach.device, breach.inode) = (watched.id.device(), watched.id.inode);
        if breach.path.is_empty() {
            breach.path = watched.path.to_string();
        }
        let audiences = self.lock();
        {
            let mut fate = pin.fate.lock();
            fate.count += 1;
            if fate.first.len() < OF_A_PIN {
                fate.first.push(breach.clone());
            }
        }
        pin.keep_breach();
        self.breached.fetch_add(1, Relaxed);
        {
            let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
            if recent.len() == RECENT {
                recent.pop_front();
            }
            recent.push_back(breach.clone());
        }
        self.tell(&audiences, Notice::Breach(breach));
    }

    /// Records that a name of the file of a pin is gone, and tells the holder.
    pub(crate) fn renamed(&self, pin: &Pin, how: &str) {
        let audiences = self.lock();
        {
            let mut fate = pin.fate.lock();
            if fate.renamed.len() < OF_A_PIN {
                fate.renamed.push(how.to_owned());
            }
        }
        let how = how.to_owned();
        self.tell(&audiences, Notice::Renamed { pin: pin.id, how });
    }

    /// Records that nothing keeps a pin any more, and tells its holder once.
    pub(crate) fn lost(&self, pin: &Pin, why: &str) {
        let audiences = self.lock();
        {
            let mut fate = pin.fate.lock();
            if fate.lost.is_some() {
                return;
            }
            fate.lost = Some(why.to_owned());
        }
        let why = why.to_owned();
        self.tell(&audiences, Notice::Lost { pin: pin.id, why });
    }

    /// The same for every pin in the table.
    pub(crate) fn lost_all(&self, table: &Table, why: &str) {
        for watched in table.all() {
            for pin in watched.pins.load().iter().filter(|pin| !pin.is_dead()) {
                self.lost(pin, why);
            }
        }
    }

    /// The number of breaches that will have no record, since this was last
    /// asked.
    pub(crate) fn take_lost(&self) -> u64 {
        self.lost.swap(0, Relaxed)
    }

    fn tell(&self, audiences: &Audiences, notice: Notice) {
        if let Some(audience) = audiences.of.get(&notice.pin()) {
            for watcher in &audience.watchers {
                watcher.tell(&notice);
            }
        }
        // The status shows those that are too many to print.
        if let Err(Notice::Breach(_)) = self.untold.push(notice) {
            self.lost.fetch_add(1, Relaxed);
        }
        if let Some(printer) = self.printer.get() {
            printer.unpark();
        }
    }

    /// Makes `watcher` get the notices about these pins from now on, and tells
    /// it at once what has happened before. `find` looks for the pin, also among
    /// those that may be taken up again, or says what became of it.
    pub(crate) fn watch(
        &self,
        watcher: &Arc<Watcher>,
        pins: &[WatchedPin],
        find: impl Fn(&WatchedPin) -> Whereabouts,
    ) {
        for named in pins {
            match find(named) {
                Whereabouts::Known(pin) if watcher.may_hear_of(&pin) => {
                    self.watch_one(watcher, &pin)
                }
                Whereabouts::Known(pin) => watcher.answer(&Notice::Unattended {
                    pin: pin.id,
                    why: String::from(
                        "the guard keeps the pin, and does not know this process as its holder",
                    ),
                }),
                Whereabouts::Told(notice) => watcher.answer(&notice),
            }
        }
    }

    fn watch_one(&self, watcher: &Arc<Watcher>, pin: &Arc<Pin>) {
        let mut audiences = self.lock();
        if audiences.of.len() >= audiences.enough {
            audiences
                .of
                .retain(|_, audience| audience.fate.strong_count() > 0);
            audiences.enough = 2 * audiences.of.len() + 64;
        }
        let audience = audiences.of.entry(pin.id).or_insert_with(|| Audience {
            fate: Arc::downgrade(&pin.fate),
            watchers: Vec::new(),
        });
        if audience
            .watchers
            .iter()
            .any(|other| Arc::ptr_eq(other, watcher))
        {
            return;
        }
        audience.watchers.push(Arc::clone(watcher));
        let mut asked = watcher.pins();
        if asked.len() == asked.capacity() {
            asked.retain(|pin| audiences.of.contains_key(pin));
            let room = asked.len() + 64;
            asked.reserve(room);
        }
        asked.push(pin.id);
        drop(asked);
        let before = pin.fate.notices(pin.id);
        drop(audiences);
        before.iter().for_each(|notice| watcher.answer(notice));
    }

    /// Ends all connections for notices.
    pub(crate) fn hang_up(&self) {
        for audience in self.lock().of.values() {
            for watcher in &audience.watchers {
                // It may be gone.
                let _ = watcher.socket.shut_down();
            }
        }
    }

    /// Forgets a connection that is gone.
    pub(crate) fn forget(&self, watcher: &Arc<Watcher>) {
        let mut audiences = self.lock();
        for pin in watcher.pins().drain(..) {
            if let Some(audience) = audiences.of.get_mut(&pin) {
                audience
                    .watchers
                    .retain(|other| !Arc::ptr_eq(other, watcher));
                if audience.watchers.is_empty() {
                    audiences.of.remove(&pin);
                }
            }
        }
    }

    /// The number of breaches, and the latest of them, oldest first.
    pub(crate) fn breaches(&self) -> (u64, Vec<Breach>) {
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let recent = recent.iter().cloned().collect();
        (self.breached.load(Relaxed), recent)
    }

    /// Makes the calling thread the one that prints notices. It is woken when
    /// there are any.
    pub(crate) fn printed_here(&self) {
        let _ = self.printer.set(std::thread::current());
    }

    /// The next notice to print.
    pub(crate) fn next(&self) -> Option<Notice> {
        self.untold.pop()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::{Abilities, InodeId};
    use mapdirect_proto::{Cause, DeviceId, Extent, ExtentState, Flags, MAX_MESSAGE};

    /// A pin, and a client that watches it.
    struct Setting {
        notices: Notices,
        table: Table,
        watched: Arc<Watched>,
        pin: Arc<Pin>,
        client: Socket,
        watcher: Arc<Watcher>,
    }

    const ID: InodeId = InodeId { dev: 7, inode: 12 };

    fn setting(peer: Sender) -> Setting {
        let table = Table::new();
        let watched = table.get_or_insert(ID, || {
            Watched::new(ID, Abilities::default(), Arc::from("/mnt/file"))
        });
        let owner = Sender { pid: 5, uid: 1000 };
        let pin = Pin::unsettled(9, 0..8192, None, 0..8192, Flags::NONE, owner);
        let pin = Arc::new(pin);
        watched.add(&pin);
        let (server, client) = Socket::pair().unwrap();
        Setting {
            notices: Notices::new(),
            table,
            watched,
            pin,
            client,
            watcher: Watcher::new(Arc::new(server), peer),
        }
    }

    impl Setting {
        fn watch(&self, pin: u64) {
            let named = WatchedPin {
                pin,
                device: ID.dev,
                inode: ID.inode,
            };
            self.notices.watch(&self.watcher, &[named], |named| {
                let pins = self.watched.pins.load();
                let mut alive = pins.iter().filter(|pin| !pin.is_dead());
                let unknown = || Notice::Lost {
                    pin: named.pin,
                    why: String::from("unknown"),
                };
                alive.find(|pin| pin.id == named.pin).map_or_else(
                    || Whereabouts::Told(Box::new(unknown())),
                    |pin| Whereabouts::Known(Arc::clone(pin)),
                )
            });
        }

        fn hear(&self) -> Option<Notice> {
            let waited = self.client.wait_until_readable(std::time::Duration::ZERO);
            if waited != Ok(true) {
                return None;
            }
            let mut buffer = [0; MAX_MESSAGE];
            let length = self.client.receive(&mut buffer).unwrap().length;
            match Reply::decode(&buffer[..length]) {
                Ok(Reply::Notice(notice)) => Some(notice),
                _ => None,
            }
        }

        fn breach(&self, time: u64) {
            let device = DeviceId { major: 0, minor: 0 };
            let was = [Extent::new(0, Some(4096), 4096, ExtentState::Written)];
            let is = [Extent::new(0, None, 4096, ExtentState::Hole)];
            let breach = Breach::new(0, (device, 0), "", time, 0..4096, (&was, &is));
            let cause = Cause::new(77, "xfs_io", "XFS_IOC_SWAPEXT");
            let breach = breach.caused_by(Some(cause));
            self.notices.breach(&self.watched, &self.pin, breach);
        }
    }

    #[test]
    fn a_holder_hears_of_what_comes_and_of_what_came_before() {
        let setting = setting(Sender { pid: 5, uid: 1000 });
        setting.breach(1);
        setting.watch(9);
        let Some(Notice::Breach(breach)) = setting.hear() else {
            panic!("a breach came before");
        };
        assert_eq!((breach.pin, breach.inode, breach.time), (9, 12, 1));
        assert_eq!(breach.path, "/mnt/file");
        assert_eq!(breach.after[0].state, ExtentState::Hole);
        assert_eq!(breach.cause.unwrap().pid, 77);
        setting.watch(9);
        assert_eq!(setting.hear(), None, "it was told once");
        setting.breach(2);
        assert!(matches!(setting.hear(), Some(Notice::Breach(breach)) if breach.time == 2));
        setting.notices.lost_all(&setting.table, "the gate is gone");
        setting.notices.lost(&setting.pin, "again");
        let lost = Notice::Lost {
            pin: 9,
            why: String::from("the gate is gone"),
        };
        assert_eq!(setting.hear(), Some(lost));
        assert_eq!(setting.hear(), None, "lost once");
        assert_eq!(
            setting.pin.fate.summary(),
            (2, Some(String::from("the gate is gone")))
        );
        let (count, recent) = setting.notices.breaches();
        assert_eq!((count, recent.len()), (2, 2));
        assert_eq!(std::iter::from_fn(|| setting.notices.next()).count(), 3);
    }

    #[test]
    fn who_comes_late_hears_how_it_began_and_that_it_is_lost() {
        let setting = setting(Sender { pid: 1, uid: 0 });
        for time in 0..1000 {
            setting.breach(time);
        }
        setting.notices.lost(&setting.pin, "why");
        setting.watch(9);
        let heard: Vec<_> = std::iter::from_fn(|| setting.hear()).collect();
        assert_eq!(heard.len(), OF_A_PIN + 1);
        assert!(matches!(&heard[0], Notice::Breach(breach) if breach.time == 0));
        assert!(matches!(&heard[OF_A_PIN], Notice::Lost { .. }));
        assert_eq!(setting.pin.fate.summary().0, 1000);
        let (count, recent) = setting.notices.breaches();
        assert_eq!((count, recent.len()), (1000, RECENT));
        assert_eq!(recent[RECENT - 1].time, 999);
    }

    #[test]
    fn another_user_hears_nothing_but_that_it_is_no_holder() {
        let setting = setting(Sender { pid: 6, uid: 1001 });
        setting.breach(1);
        setting.watch(9);
        assert!(matches!(
            setting.hear(),
            Some(Notice::Unattended { pin: 9, .. })
        ));
        setting.breach(2);
        assert_eq!(setting.hear(), None);
    }

    /// It gave up its user id after it had pinned; its process id alone, which
    /// may be another process's by now, does not do.
    #[test]
    fn the_process_itself_hears_of_it_whoever_it_is_by_now() {
        let own = std::process::id().cast_signed();
        let start = proc::start_time(own).unwrap();
        for (told, hears) in [(Some(start), true), (Some(start - 1), false), (None, false)] {
            let mut setting = setting(Sender {
                pid: own,
                uid: 1001,
            });
            let owner = Sender {
                pid: own,
                uid: 1000,
            };
            let pin = Pin::unsettled(10, 0..8192, None, 0..8192, Flags::NONE, owner);
            if let Some(start) = told {
                pin.fate.asked_by(own, start);
            }
            setting.pin = Arc::new(pin);
            setting.watched.add(&setting.pin);
            setting.breach(1);
            setting.watch(10);
            let heard = setting.hear();
            assert_eq!(matches!(heard, Some(Notice::Breach(_))), hears, "{heard:?}");
        }
    }

    /// Somebody else takes it up, and lets go of it, and then its first holder,
    /// who is not told anew that it should watch.
    #[test]
    fn whoever_watches_a_pin_hears_of_it_whoever_has_it() {
        let mut setting = setting(Sender { pid: 5, uid: 1000 });
        setting.watch(9);
        for owner in [Sender { pid: 6, uid: 1001 }, Sender { pid: 5, uid: 1000 }] {
            let passed = Arc::new(setting.pin.passed_to(owner));
            assert_eq!(
                (passed.id, passed.pid, passed.uid),
                (9, owner.pid, owner.uid)
            );
            setting.watched.remove(|pin| pin.id == 9);
            setting.watched.add(&passed);
            setting.pin = passed;
        }
        // Audiences of pins that are over are forgotten now and then.
        for id in 100..1100 {
            let owner = Sender { pid: 5, uid: 1000 };
            let pin = Pin::unsettled(id, 0..8192, None, 0..8192, Flags::NONE, owner);
            setting.watched.add(&Arc::new(pin));
            setting.watch(id);
            setting.watched.remove(|pin| pin.id == id);
        }
        setting.breach(1);
        assert!(matches!(setting.hear(), Some(Notice::Breach(breach)) if breach.pin == 9));
    }

    /// The rights to hear of a pin go with it.
    #[test]
    fn who_has_taken_up_a_pin_may_hear_of_it() {
        let mut setting = setting(Sender { pid: 6, uid: 1001 });
        setting.watch(9);
        assert!(matches!(setting.hear(), Some(Notice::Unattended { .. })));
        setting.pin = Arc::new(setting.pin.passed_to(Sender { pid: 6, uid: 1001 }));
        setting.watched.remove(|pin| pin.id == 9);
        setting.watched.add(&setting.pin);
        setting.breach(1);
        setting.watch(9);
        assert!(matches!(setting.hear(), Some(Notice::Breach(_))));
    }

    #[test]
    fn a_pin_that_is_not_there_is_answered() {
        let setting = setting(Sender { pid: 5, uid: 1000 });
        setting.watch(8);
        assert!(matches!(setting.hear(), Some(Notice::Lost { pin: 8, .. })));
        setting.pin.end();
        setting.watch(9);
        assert!(matches!(setting.hear(), Some(Notice::Lost { pin: 9, .. })));
    }

    #[test]
    fn nobody_waits_for_a_client_that_does_not_read() {
        let setting = setting(Sender { pid: 5, uid: 1000 });
        setting.watch(9);
        let mut times = 0;
        while setting.client.peer_is_gone() == Ok(false) {
            assert!(times < 100_000, "the connection is never closed");
            setting.breach(times);
            times += 1;
        }
        // What fitted can still be read.
        assert!(matches!(setting.hear(), Some(Notice::Breach(breach)) if breach.time == 0));
        setting.notices.forget(&setting.watcher);
        assert!(setting.notices.lock().of.is_empty());
    }

    #[test]
    fn pins_that_are_over_are_forgotten() {
        let setting = setting(Sender { pid: 1, uid: 0 });
        for id in 100..1100 {
            let owner = Sender { pid: 5, uid: 1000 };
            let pin = Pin::unsettled(id, 0..8192, None, 0..8192, Flags::NONE, owner);
            setting.watched.add(&Arc::new(pin));
            setting.watch(id);
            setting.watched.remove(|pin| pin.id == id);
        }
        assert!(setting.notices.lock().of.len() < 200);
        assert!(setting.watcher.pins().len() < 400);
    }
}
