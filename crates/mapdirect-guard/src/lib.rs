//! The guard: keeps the blocks of pinned files where they are.
//!
//! ```text
//!  clients ──▶ session (a thread each) ──▶ grant ──▶ table ◀── gate thread ◀── kernel
//!                                            │         ▲            │
//!                                            ▼         │            ▼
//!                                     openers, busy  lifetime     audit
//! ```
//!
//! [`mapdirect_model::contract`] says what may be done, and [`ledger`] what is
//! pinned; both are pure.
//!
//! A grant makes a promise only when the guard can keep it. The gate keeps the
//! promise, and notices when the last mapping is gone. The fanotify gate learns
//! that from close events, which its lifetime thread reads; the bpf gate learns
//! it from its programs. The audit thread reports who was refused.

#![forbid(unsafe_code)]

mod apart;
mod audit;
mod bounded;
mod busy;
mod declared;
mod delegation;
mod exports;
mod family;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzz;
mod gate;
mod grant;
mod journal;
pub mod ledger;
mod listeners;
mod needs;
mod notice;
mod openers;
mod overlay;
mod places;
mod pulse;
mod server;
mod session;
mod socket;
mod status;
mod store;
mod supervise;
mod suspicion;
mod table;
mod thaw;
mod tripwire;
mod waiting;
mod wake;

use mapdirect_model::contract as policy;
use mapdirect_sys::Errno;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Instant;

pub use audit::journald::SOCKET as JOURNAL_SOCKET;
pub use declared::{DEFAULT_PINS, Declared, parse_pins, read_pins};
pub use delegation::{
    Account, DEFAULT as DEFAULT_POLICY, Policy, PolicyError, Rule, group_number, host_path,
    user_number, would_allow,
};
#[cfg(feature = "bpf")]
pub use gate::bpf::{
    DIRECTORY as BPF_DIRECTORY, LoadError, oracle::Oracle, probe as probe_bpf, unload,
};
pub use mapdirect_proto::status::RefusedOperation;
pub use mapdirect_proto::{Breach, Notice};
pub use server::{Config, GateChoice, OnNotice, OnRefusal, Running, StartError, start};
pub use store::Starter;
pub use supervise::{Ended, Supervision, supervise};

/// Checks whether this kernel lets a guard notice what its gate cannot refuse,
/// and says why not.
///
/// # Errors
///
/// What is missing, for a person. Missing privileges are reported, too.
pub fn probe_tripwire() -> Result<(), String> {
    tripwire::probe()
}

/// The names of the capabilities that a guard needs for a gate.
#[must_use]
pub fn needed_capabilities(gate: mapdirect_proto::Gate) -> String {
    needs::names(gate)
}

/// Everything that this process lacks to be a guard with this gate.
#[must_use]
pub fn probe_needs(gate: mapdirect_proto::Gate) -> Vec<StartError> {
    needs::missing(gate)
}

/// Everything that the threads of a guard share.
#[derive(Debug)]
pub(crate) struct Guard {
    gate: Arc<dyn gate::Gate>,
    table: table::Table,
    own: table::OwnOpens,
    audit: audit::Audit,
    journal: audit::journal::Journal,
    notices: notice::Notices,
    overlays: overlay::Overlays,
    exports: exports::Exports,
    scans: busy::Scans,
    pages: apart::Pages,
    places: Arc<places::Places>,
    pulse: pulse::Pulse,
    /// Whoever started this process.
    starter: Arc<store::Starter>,
    delegation: delegation::Delegation,
    tripwire: tripwire::Tripwire,
    /// Operations that wait for the outcome of a grant.
    waiting: waiting::WaitingRoom,
    next: AtomicU64,
    started: Instant,
    stopping: AtomicBool,
    /// Becomes readable when the guard stops.
    stopped: wake::Waker,
}

impl Guard {
    /// The dormant pin of an inode, if there is one.
    fn sleeper(&self, inode: table::InodeId) -> Option<Arc<table::Pin>> {
        self.gate.dormancy()?.sleeper(inode)
    }

    /// Makes sure that nobody takes up a pin of a file again whose blocks may
    /// have changed.
    fn spoil(&self, inode: table::InodeId) {
        if let Some(dormancy) = self.gate.dormancy() {
            dormancy.spoil(self, inode);
        }
    }

    /// The pins of an inode, including the dormant one. A pin that becomes
    /// dormant or is taken up is in both places for a moment, so it is never
    /// missed: it joins the dormant pins before it leaves the table, and returns
    /// in the opposite order.
    fn pins_awake_or_asleep(&self, watched: &table::Watched) -> Vec<Arc<table::Pin>> {
        let before = watched.pins.load_full();
        let asleep = self.sleeper(watched.id);
        let after = watched.pins.load_full();
        let mut all: Vec<Arc<table::Pin>> = Vec::new();
        for pin in after.iter().chain(&asleep).chain(before.iter()) {
            if !all.iter().any(|known| known.id == pin.id) {
                all.push(Arc::clone(pin));
            }
        }
        all
    }

    fn new(
        gate: Arc<dyn gate::Gate>,
        limits: places::Limits,
        delegation: delegation::Delegation,
        starter: Arc<store::Starter>,
    ) -> Result<Self, Errno> {
        // Pins of a guard that died may live on in their holders, with locks on
        // their bytes. So begin with other numbers.
        let mut random = [0; 8];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
        let first = u64::from_le_bytes(random) >> 16;
        Ok(Self {
            gate,
            table: table::Table::new(),
            own: table::OwnOpens::new(),
            audit: audit::Audit::new(),
            journal: audit::journal::Journal::default(),
            notices: notice::Notices::new(),
            overlays: overlay::Overlays::default(),
            exports: exports::Exports::default(),
            scans: busy::Scans::default(),
            pages: apart::Pages::new(server::descriptor_limit()),
            places: places::Places::new(limits),
            pulse: pulse::Pulse::new()?,
            starter,
            delegation,
            tripwire: tripwire::Tripwire::new()?,
            waiting: waiting::WaitingRoom::new()?,
            next: AtomicU64::new(first),
            started: Instant::now(),
            stopping: AtomicBool::new(false),
            stopped: wake::Waker::new()?,
        })
    }

    /// A new number for a pin, which nothing else has.
    fn next_id(&self) -> u64 {
        self.next.fetch_add(1, SeqCst)
    }

    /// The number that [`next_id`](Self::next_id) gives next.
    fn next_pin_number(&self) -> u64 {
        self.next.load(SeqCst)
    }

    /// A byte to lock that nobody else locks.
    fn next_lock_byte(&self) -> u64 {
        table::LOCK_BASE + self.next_id()
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(SeqCst)
    }

    fn stop(&self) {
        self.stopping.store(true, SeqCst);
        self.stopped.wake();
        self.waiting.wake();
        self.pulse.waker.wake();
        self.tripwire.wake();
        self.audit.stop();
    }
}
