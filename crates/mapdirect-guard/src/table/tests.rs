use super::*;
use crate::Errno;
use crate::policy::OperationKind;
use crate::policy::{Geometry, Operation, Pinned};
use mapdirect_proto::{BlockMap, Extent, ExtentState, Flags};
use mapdirect_sys::unix::Sender;
use std::os::fd::OwnedFd;

const OWNER: Sender = Sender { pid: 1, uid: 0 };

fn id(inode: u64) -> InodeId {
    InodeId { dev: 7, inode }
}

#[test]
fn entries_come_and_go() {
    let table = Table::new();
    let made: Vec<_> = (0..5000)
        .map(|inode| {
            table.get_or_insert(id(inode), || {
                Watched::new(id(inode), Abilities::default(), Arc::default())
            })
        })
        .collect();
    let again = table.get_or_insert(id(17), || panic!("it is there already"));
    assert!(Arc::ptr_eq(&made[17], &again));
    assert_eq!(table.all().len(), 5000);
    table.remove(&made[17]);
    assert!(table.get(id(17)).is_none());
    assert!(table.get(id(18)).is_some());
}

#[test]
fn an_unsettled_pin_makes_others_wait_and_a_dead_one_does_not() {
    let pin = Pin::unsettled(1, 0..4096, None, 0..4096, Flags::NONE, OWNER);
    let write = Operation::new(OperationKind::Write, 0..10);
    let read = Operation::new(OperationKind::Read, 0..10);
    assert_eq!(pin.opinion(&write, 4096, 0), Opinion::Wait);
    assert_eq!(pin.opinion(&read, 4096, 0), Opinion::Allow);
    let device = DeviceId { major: 7, minor: 0 };
    let written = Extent::new(0, Some(0), 4096, ExtentState::Written);
    let map = BlockMap::new(device, 4096, 4096, 0..4096, [written]);
    pin.settle(
        &map,
        &Pinned::new(&map, false, Geometry::of_pages(4096)),
        None,
    );
    assert_eq!(pin.opinion(&write, 4096, 0), Opinion::Allow);
    let punch = Operation::new(OperationKind::PunchHole, 0..10);
    assert_eq!(pin.opinion(&punch, 4096, 0), Opinion::Wait);
    pin.hand_over();
    assert_eq!(pin.opinion(&punch, 4096, 0), Opinion::Refuse);
    pin.end();
    assert_eq!(pin.opinion(&punch, 4096, 0), Opinion::Allow);
}

fn announced(watched: &Watched, tid: i32, start: u64, came: Instant) -> bool {
    watched.announced(tid, came, || Some(start)).is_some()
}

#[test]
fn an_announcement_is_good_once_and_for_the_thread_it_names() {
    let watched = Watched::new(id(1), Abilities::default(), Arc::default());
    let now = Instant::now();
    assert!(
        watched
            .announced(5, now, || panic!("nobody came"))
            .is_none()
    );
    assert!(watched.announce(&Arc::new(Announcement::new(5, 70))));
    assert!(!announced(&watched, 6, 70, now));
    assert!(!announced(&watched, 5, 71, now), "its number is used again");
    assert!(watched.announced(5, now, || None).is_none(), "it is gone");
    let found = watched.announced(5, now, || Some(70)).unwrap();
    assert!(found.take());
    assert!(!found.take());
    assert!(!announced(&watched, 5, 70, now));
}

#[test]
fn an_announcement_does_not_outlive_its_time() {
    let watched = Watched::new(id(1), Abilities::default(), Arc::default());
    assert!(watched.announce(&Arc::new(Announcement::new(5, 70))));
    let life = mapdirect_proto::ANNOUNCEMENT_LIFE;
    assert!(announced(&watched, 5, 70, Instant::now()));
    assert!(!announced(&watched, 5, 70, Instant::now() + life));
}

#[test]
fn stale_announcements_are_in_nobodys_way() {
    let watched = Watched::new(id(1), Abilities::default(), Arc::default());
    let all: Vec<_> = (1..=64)
        .map(|tid| Arc::new(Announcement::new(tid, 70)))
        .collect();
    assert!(all.iter().all(|one| watched.announce(one)));
    let more = Arc::new(Announcement::new(65, 70));
    assert!(!watched.announce(&more));
    assert!(all[7].take());
    assert!(watched.announce(&more));
    let now = Instant::now();
    assert!(!announced(&watched, 8, 70, now));
    assert!(announced(&watched, 9, 70, now) && announced(&watched, 65, 70, now));
}

#[test]
fn only_the_opening_thread_is_ours() {
    let own = OwnOpens::new();
    let tid = rustix::thread::gettid().as_raw_nonzero().get();
    assert!(!own.contains(tid));
    own.during(|| assert!(own.contains(tid)));
    assert!(!own.contains(tid));
    own.for_long(|| assert!(own.contains(tid)));
    assert!(!own.contains(tid));
    assert!(!own.contains(0));
}

#[test]
fn the_description_of_an_event_goes_to_the_thread_it_is_about() {
    let own = OwnOpens::new();
    let tid = rustix::thread::gettid().as_raw_nonzero().get();
    let file = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    assert!(own.hand(tid, file()).is_some(), "it did not ask");
    let handed = own.quietly(|| {
        assert!(own.hand(tid + 1, file()).is_some());
        assert!(own.hand(tid, file()).is_none());
        Err(Errno::TXTBSY)
    });
    assert!(handed.is_ok());
    let refused = own.quietly(|| Err(Errno::TXTBSY));
    assert_eq!(refused.unwrap_err(), Errno::TXTBSY);
    assert!(own.quietly(|| Ok(file())).is_ok());
    assert!(own.hand(tid, file()).is_some());
}
