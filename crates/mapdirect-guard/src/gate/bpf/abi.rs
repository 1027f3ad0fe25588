//! The data that user space and the programs exchange, laid out as in
//! `prog/contract.h`. Numbers are in the machine's own byte order.

pub(super) use super::constants::*;
use crate::policy::layers::{LISTS, Layers, List};
use crate::policy::{OperationKind, RULES, Traits};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Row {
    reach: u8,
    refused_on: u8,
    grows: u8,
    brings_shared: u8,
    touches: u8,
    lets_go: u8,
    pad: [u8; 2],
}

/// The table of rules, and the identity of the guard.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Settings {
    rules: [Row; KINDS],
    guard_start: u64,
    guard_tgid: u32,
    preempts: u32,
    preemption: u64,
    functions_known: u32,
    revives: u32,
    functions: [Function; FUNCTIONS],
}

/// The address range of a kernel function that asks for permission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Function {
    pub(super) start: u64,
    pub(super) end: u64,
    /// A [`Doing`](super::functions::Doing).
    pub(super) doing: u64,
}

impl Settings {
    /// The settings for the guard process with this number. The programs fill
    /// in its start time when the process first asks them something.
    pub(super) fn new(
        tgid: u32,
        kernel: &super::functions::Kernel,
        preempts: bool,
        revives: bool,
    ) -> Self {
        // A kind that is not in the table is treated as unknown.
        let unknown = row(OperationKind::Unknown);
        let mut rules = [unknown; KINDS];
        for rule in &RULES {
            rules[rule.kind as usize] = row(rule.kind);
        }
        let known = kernel.functions.len().min(FUNCTIONS);
        let mut functions = [Function::new_zeroed(); FUNCTIONS];
        functions[..known].copy_from_slice(&kernel.functions[..known]);
        Self {
            rules,
            guard_start: 0,
            guard_tgid: tgid,
            preempts: preempts.into(),
            preemption: kernel.preemption,
            functions_known: u32::try_from(known).unwrap_or(0),
            revives: revives.into(),
            functions,
        }
    }
}

impl Settings {
    /// Whether the rules and the guard are the same, apart from the guard's
    /// start time.
    pub(super) fn says_the_same_as(&self, other: &Self) -> bool {
        let said = |one: &Self| {
            let mut said = *one;
            // The programs fill in the start time of the guard.
            said.guard_start = 0;
            said
        };
        said(self).as_bytes() == said(other).as_bytes()
    }
}

fn row(kind: OperationKind) -> Row {
    let rule = kind.rule();
    let traits = Traits::of(kind);
    Row {
        reach: rule.reach as u8,
        refused_on: rule.refused_on as u8,
        grows: rule.grows.into(),
        brings_shared: traits.brings_shared.into(),
        touches: traits.touches.into(),
        lets_go: traits.lets_go as u8,
        pad: [0; 2],
    }
}

/// The positions of two more words behind the filter. `STIRRED` counts how
/// often a pin was taken up again, or ended without telling the guard.
/// `UPHEAVALS` counts what may have changed the blocks of any file.
pub(super) const STIRRED: usize = 3 * FILTER_WORDS;
pub(super) const UPHEAVALS: usize = STIRRED + 1;
pub(super) const SHARED_WORDS: usize = UPHEAVALS + 1;

/// An inode as the kernel identifies it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Key {
    pub(super) dev: u32,
    pad: u32,
    pub(super) ino: u64,
}

impl Key {
    pub(super) fn new(id: crate::table::InodeId) -> Self {
        // `MKDEV`, include/linux/kdev_t.h
        let device = id.device();
        Self {
            dev: device.major << 20 | device.minor,
            pad: 0,
            ino: id.inode,
        }
    }

    pub(super) fn inode(self) -> crate::table::InodeId {
        crate::table::InodeId {
            dev: rustix::fs::makedev(self.dev >> 20, self.dev & 0xf_ffff),
            inode: self.ino,
        }
    }

    /// The word of the filter that has the inode's bit.
    pub(super) fn word(self) -> usize {
        usize::try_from(self.slot() / 64).unwrap_or(0) % FILTER_WORDS
    }

    /// The position of the inode in the filter, as `filter_slot` computes it.
    pub(super) fn slot(self) -> u32 {
        const BITS: u32 = FILTER_BITS;
        let mixed = (self.ino ^ u64::from(self.dev) << 40).wrapping_mul(FILTER_MULTIPLIER);
        u32::try_from(mixed >> (64 - BITS)).unwrap_or(0)
    }
}

/// Bytes from `start` up to `end`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Run {
    pub(super) start: u64,
    pub(super) end: u64,
}

/// What the pins of an inode refuse.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Entry {
    pub(super) version: u64,
    flags: u32,
    pub(super) spilled: u32,
    size_floor: u64,
    fixed_size: u64,
    largest_size: u64,
    followed_end: u64,
    block: u32,
    first: [u32; LISTS + 1],
    runs: [Run; INLINE],
}

/// Facts about an inode that are not in its layers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Facts {
    pub(super) reflink: bool,
    pub(super) cached: bool,
    /// What pins deny beside what would break them.
    pub(super) denials: Denials,
    /// A pin of the inode is being granted.
    pub(super) granting: bool,
    /// A holder lacks the capability, so what it leaves behind is for nobody.
    pub(super) delegated: bool,
}

/// What the pins of an inode deny.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Denials {
    /// Only this process and its descendants may open the file for writing.
    pub(super) write: Option<Root>,
    /// No name of the file may go.
    pub(super) rename: bool,
}

/// A process as the programs know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Root {
    /// When it started, in clock ticks since boot.
    began: u64,
    pid: u32,
    pad: u32,
}

impl Root {
    /// No process.
    pub(super) const NOBODY: Self = Self {
        began: 0,
        pid: 0,
        pad: 0,
    };

    pub(super) fn new(pid: i32, began: u64) -> Self {
        let pid = u32::try_from(pid).unwrap_or(0);
        Self { began, pid, pad: 0 }
    }
}

impl Denials {
    /// What is denied if this process and its descendants alone may open the
    /// file. If two processes claim that, nobody may.
    pub(super) fn deny_write(&mut self, root: Root) {
        let is_other = self.write.is_some_and(|other| other != root);
        self.write = Some(if is_other { Root::NOBODY } else { root });
    }

    fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

impl Entry {
    /// Makes an entry, and returns the runs that do not fit into it.
    pub(super) fn new(version: u64, layers: &Layers, facts: Facts) -> (Self, Option<Vec<Run>>) {
        let mut first = [0; LISTS + 1];
        let mut runs = Vec::new();
        for (at, list) in layers.lists().iter().enumerate() {
            runs.extend(list.iter().map(|run| Run {
                start: run.start,
                end: run.end,
            }));
            first[at + 1] = u32::try_from(runs.len()).unwrap_or(u32::MAX);
        }
        let flag = |flag, is: bool| if is { flag } else { 0 };
        let mut inline = [Run::new_zeroed(); INLINE];
        let spilled = runs.len() > INLINE;
        if !spilled {
            inline[..runs.len()].copy_from_slice(&runs);
        }
        let entry = Self {
            version,
            flags: flag(REFLINK, facts.reflink)
                | flag(HAS_FROZEN, layers.has_frozen())
                | flag(CACHED, facts.cached)
                | flag(GRANTING, facts.granting)
                | flag(FAILING_FREES, layers.failing_frees)
                | flag(WRITES_PASS, layers.lets_writes_pass())
                | flag(WINDOWED, !layers.list(List::Window).is_empty())
                | flag(DENIES_WRITE, facts.denials.write.is_some())
                | flag(DENIES_RENAME, facts.denials.rename)
                | flag(
                    CAN_SLEEP,
                    can_sleep(layers) && facts.denials.is_none() && !facts.delegated,
                )
                | flag(UNSHARES, layers.unshares),
            size_floor: layers.size_floor,
            fixed_size: layers.fixed_size.unwrap_or(u64::MAX),
            largest_size: layers.largest_size.unwrap_or(u64::MAX),
            followed_end: layers.followed_end,
            block: u32::try_from(layers.block).unwrap_or(0),
            spilled: spilled.into(),
            first,
            runs: inline,
        };
        (entry, spilled.then_some(runs))
    }

    /// Whether the last pin of the inode can become dormant when it ends.
    pub(super) fn can_sleep(&self) -> bool {
        self.flags & CAN_SLEEP != 0
    }

    /// Whether no write is refused anywhere in the file, except untorn ones.
    pub(super) fn lets_writes_pass(&self) -> bool {
        self.flags & WRITES_PASS != 0
    }
}

/// Whether nothing is frozen, or has to be treated as frozen. What was proven
/// for such pins stays true as long as nobody does what the pins refuse. Pins
/// of strength stable end for good: whoever takes a pin up by `mmap(2)` relies
/// on nothing in it being allocated.
fn can_sleep(layers: &Layers) -> bool {
    layers.followed_end == 0
        && layers.lets_writes_pass()
        && !layers.has_frozen()
        && layers.list(List::Mapped).is_empty()
        && layers.fixed_size.is_none()
}

/// A struct file whose life is a pin.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Holder {
    pub(super) key: Key,
    pub(super) pin: u64,
    pub(super) start: u64,
    pub(super) end: u64,
    /// Not 0 if it is a program's own, which knows nothing of pins.
    pub(super) foreign: u64,
}

/// A pin began where all others were gone.
pub(super) const ANEW: u64 = 2;

/// Identifies one of the guard's open files to the bpf programs, and names the
/// pin it is about to become.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Identity {
    pub(super) key: Key,
    pub(super) file: u64,
    pub(super) generation: u32,
    /// The number of direct writes and reads under way.
    pub(super) direct: u32,
    /// The pin that the file is about to become, or 0.
    pub(super) pin: u64,
    pub(super) start: u64,
    pub(super) end: u64,
    /// Not 0 if the file is a pin; [`ANEW`] if the inode had none before.
    pub(super) held: u64,
    /// The number of notes on the inode by then.
    pub(super) stamp: u64,
    /// References to the struct file, including the one of this very question.
    pub(super) references: i64,
    /// Descriptions of the inode that can write, and truncations by path under
    /// way.
    pub(super) writers: i32,
    /// Descriptions of the inode that can only read.
    pub(super) readers: i32,
    /// The value of `preempt_dynamic_mode` (kernel/sched/core.c), if the kernel
    /// has it.
    pub(super) preemption: i32,
    /// Not 0 if XFS has set blocks aside for copies, or if that cannot be found
    /// out.
    pub(super) copies: u32,
    /// What the file is about to be to the pin, a [`Role`].
    pub(super) role: u32,
    /// Mappings by which the inode can be stored to, or could be after
    /// `mprotect(2)`; one that is being made counts for a moment.
    pub(super) mapped: i32,
    /// Told by the guard.
    pub(super) places: Places,
}

/// Where XFS keeps what it has set aside for copies of shared blocks.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Places {
    /// The fork, as seen from the inode of the VFS.
    pub(super) fork: i64,
    /// The number of bytes in the fork.
    pub(super) bytes: u32,
    /// Not 0 if these are known.
    pub(super) known: u32,
}

/// What a file is about to be to a pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Role {
    /// Its life is the pin's, and whoever has it keeps to what holders promise.
    Holder = 0,
    /// Its life is the pin's, and whoever has it knows nothing of pins.
    Foreign = 1,
    /// Nothing any more.
    None = 2,
}

/// The number of struct files whose lives are pins of an inode.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Life {
    pub(super) lives: u64,
    pub(super) disturbed: u64,
    pub(super) last: u64,
}

/// A question about an inode, and about one of its pins or its last one.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Tending {
    pub(super) key: Key,
    pub(super) pin: u64,
    pub(super) what: u32,
    pub(super) pid: i32,
    pub(super) lives: u64,
    pub(super) stamp: u64,
    /// The struct file whose life is the pin, or 0 if the pin has ended.
    pub(super) file: u64,
    pub(super) revived: u64,
    /// The user who holds the pin, or held it last.
    pub(super) uid: u32,
    pad: u32,
}

/// An event at the gate.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Event {
    pub(super) kind_of_event: u32,
    pub(super) kind: u32,
    pub(super) tid: u32,
    pub(super) tgid: u32,
    pub(super) key: Key,
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) pin: u64,
    pub(super) file: u64,
    /// When the thread began, in clock ticks since boot.
    pub(super) began: u64,
    /// The file that the thread's program is; of zeros if it runs none.
    pub(super) program: Key,
    pub(super) command: [u8; 16],
}

/// What a later guard must know of a pin.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct PinFacts {
    pub(super) key: Key,
    pub(super) id: u64,
    /// The struct file whose life is the pin, or 0 if the pin has ended.
    pub(super) file: u64,
    /// Not 0 if the guard checks by itself, and need not be told of the pin's
    /// end.
    pub(super) quiet: u64,
    /// How often the pin was taken up again.
    pub(super) revived: u64,
    /// The number of notes on the inode when the pin was granted.
    pub(super) stamp: u64,
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) mapped_start: u64,
    /// 0 if nothing is mapped.
    pub(super) mapped_end: u64,
    /// The generation of the inode.
    pub(super) generation: u32,
    pub(super) flags: u32,
    pub(super) pid: i32,
    pub(super) uid: u32,
    pub(super) handle_type: i32,
    pub(super) handle_length: u32,
    /// 0 if the holder has the capability. Otherwise what
    /// [`Delegated::wire`](crate::delegation::Delegated::wire) says.
    pub(super) until: u64,
    /// When the process `pid` started, in clock ticks since boot; 0 if that is
    /// not known.
    pub(super) began: u64,
    pub(super) handle: [u8; HANDLE],
}

const _: () = assert!(size_of::<PinFacts>() == PIN_FACTS);

/// A question to the programs, for tests.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Question {
    pub(super) key: Key,
    pub(super) kind: u32,
    pub(super) read_side: u8,
    pub(super) direct: u8,
    pub(super) foreign: u8,
    pub(super) has_or: u8,
    pub(super) has_doubt: u8,
    pub(super) late: u8,
    pub(super) pad: [u8; 6],
    pub(super) at: Run,
    pub(super) or_at: Run,
    pub(super) size: u64,
    pub(super) answer: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use libbpf_rs::Btf;
    use libbpf_rs::HasSize as _;
    use libbpf_rs::btf::types::{MemberAttr, Struct};
    use std::mem::offset_of;

    /// Where the object has the members of a struct, in bytes.
    fn members(btf: &Btf<'_>, name: &str) -> (usize, Vec<(String, usize)>) {
        let found = btf.type_by_name::<Struct<'_>>(name);
        let found = found.unwrap_or_else(|| panic!("the object has no struct {name}"));
        let members = found.iter().map(|member| {
            let MemberAttr::Normal { offset } = member.attr else {
                panic!("{name} has a bit field");
            };
            let name = member.name.unwrap_or_default().to_string_lossy();
            (name.into_owned(), usize::try_from(offset).unwrap() / 8)
        });
        (found.size(), members.collect())
    }

    /// Both sides have the same members, in the same places.
    #[test]
    fn the_layouts_are_those_of_the_object() {
        let object = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/src/gate/bpf/prog/mapdirect.bpf.o"
        );
        let btf = Btf::from_path(object).unwrap();
        macro_rules! same {
            ($type:ty, $name:literal, $($member:ident)*) => {
                let here = vec![$((stringify!($member).to_owned(), offset_of!($type, $member)),)*];
                assert_eq!(members(&btf, $name), (size_of::<$type>(), here), $name);
            };
        }
        same!(Row, "rule", reach refused_on grows brings_shared touches lets_go pad);
        same!(Function, "function", start end doing);
        same!(
            Settings,
            "settings",
            rules guard_start guard_tgid preempts preemption functions_known revives functions
        );
        same!(Key, "key", dev pad ino);
        same!(Run, "run", start end);
        same!(
            Entry,
            "entry",
            version flags spilled size_floor fixed_size largest_size followed_end block first
            runs
        );
        same!(
            Question,
            "question",
            key kind read_side direct foreign has_or has_doubt late pad at or_at size answer
        );
        same!(Root, "root", began pid pad);
        same!(Holder, "holder", key pin start end foreign);
        same!(
            Identity,
            "identity",
            key file generation direct pin start end held stamp references writers readers preemption
            copies role mapped places
        );
        same!(Places, "places", fork bytes known);
        same!(
            Event,
            "event",
            kind_of_event kind tid tgid key start end pin file began program command
        );
        same!(
            PinFacts,
            "pin_facts",
            key id file quiet revived stamp start end mapped_start mapped_end generation flags pid
            uid handle_type handle_length until began handle
        );
        same!(Life, "life", lives disturbed last);
        same!(
            Tending,
            "tending",
            key pin what pid lives stamp file revived uid pad
        );
        let (filter, places) = members(&btf, "filter");
        assert_eq!(filter, SHARED_WORDS * size_of::<u64>());
        assert_eq!(
            places[2],
            (String::from("stirred"), STIRRED * size_of::<u64>())
        );
        assert_eq!(
            places[3],
            (String::from("upheavals"), UPHEAVALS * size_of::<u64>())
        );
        assert_eq!(
            places[1],
            (String::from("easy"), FILTER_WORDS * size_of::<u64>())
        );
    }
}
