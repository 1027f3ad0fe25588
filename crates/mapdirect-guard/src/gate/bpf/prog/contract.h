// SPDX-License-Identifier: (MIT OR Apache-2.0) OR GPL-2.0
//
// What programs and guard share: the rules, what is pinned, questions, notes and
// events. abi.rs has the same in Rust, and a test compares the two; the numbers
// are in constants.h.

#include "constants.h"

// A row of the contract, and what policy.rs knows beside it.
struct rule {
	u8 reach;
	u8 refused_on;
	u8 grows;
	u8 brings_shared;
	u8 touches;	// writes to the blocks it reaches, or zeroes in them
	u8 lets_go;	// throws pages out
	u8 pad[2];
};

// Where a function of the kernel lies that asks for permission, and what it
// does: ASYNCHRONOUS is writing by a kiocb, which says where and how.
struct function {
	u64 start;
	u64 end;
	u64 doing;
};

struct settings {
	struct rule rules[KINDS];
	u64 guard_start;	// start_boottime of the guard
	u32 guard_tgid;
	// The kernel preempts programs: what is noted may be of an older call,
	// where it is noted before everything that can fail.
	u32 preempts;
	u64 preemption;		// address of preempt_dynamic_mode, or 0
	u32 functions_known;
	u32 revives;		// a pin that has ended may be taken up again by mmap(2)
	struct function functions[FUNCTIONS];
};

struct key {
	u32 dev;
	u32 pad;
	u64 ino;
};

struct run {
	u64 start;
	u64 end;
};

// What an operation may not meet, for all pins of an inode together, in a list
// of runs for each reason; see layers.rs.
struct entry {
	u64 version;
	u32 flags;
	u32 spilled;	// runs are in the map `spill[version]`
	u64 size_floor;
	u64 fixed_size;
	u64 largest_size;
	u64 followed_end;	// of the pins of strength stable, or 0
	u32 block;
	u32 first[LISTS + 1];
	struct run runs[INLINE];
};

// The process that, with its descendants, may open a file that is DENIES_WRITE;
// nobody if it is 0.
struct root {
	u64 began;	// in ticks since boot
	u32 pid;
	u32 pad;
};

struct question {
	struct key key;
	u32 kind;
	u8 read_side;
	u8 direct;
	u8 foreign;	// a mapping of a file that is no pin's
	u8 has_or;
	u8 has_doubt;	// a write may be an untorn one
	u8 late;	// the file may have grown by the time a truncation takes effect
	u8 pad[6];
	struct run at;
	struct run or_at;
	u64 size;
	u64 answer;	// of `ask`
};

// One side of an operation under way.
struct note {
	u64 file;
	u64 start;
	u64 end;
	u32 kind;
	u32 doing;
	u32 rwf;
	u32 has_rwf;
};

// What a thread is about to do.
struct record {
	struct note read;
	struct note write;
};

// What is kept of a pin. The guard writes it, for one that comes later; of what
// programs change no two are in one word, but those that one of them changes at a
// time.
struct pin_facts {
	struct key key;
	u64 id;
	u64 file;	// the struct file whose life it is; 0 when it is over
	u64 quiet;	// the guard looks by itself, and need not be told
	u64 revived;	// how often it was taken up again
	u64 stamp;	// of its inode when it was granted
	u64 start;
	u64 end;
	u64 mapped_start;
	u64 mapped_end;
	u32 generation;	// of the inode
	u32 flags;
	int pid;
	u32 uid;
	int handle_type;
	u32 handle_length;
	u64 until;	// the guard's own: see abi.rs
	u64 began;	// of the process `pid`, in ticks since boot
	u8 handle[HANDLE];
};

// How many struct files are pins of an inode, and what became of it when there
// were none. Only programs change it.
struct life {
	u64 lives;
	u64 disturbed;	// grows with everything that its entry would have refused
	u64 last;	// the pin that ended last
};

// What the guard asks about an inode, and about a pin of it or the last one.
struct tending {
	struct key key;
	u64 pin;	// 0 for the last one; the answer says which that is
	u32 what;
	int pid;
	u64 lives;
	u64 stamp;
	u64 file;
	u64 revived;
	u32 uid;
	u32 pad;
};

struct holder {
	struct key key;
	u64 pin;
	u64 start;
	u64 end;
	// Whoever maps it is no holder that keeps to what holders promise.
	u64 foreign;
};

struct event {
	u32 kind_of_event;
	u32 kind;
	u32 tid;
	u32 tgid;
	struct key key;
	u64 start;
	u64 end;
	u64 pin;
	u64 file;
	// Of the thread that was refused: when it began, in clock ticks since boot,
	// and which file its program is, by numbers of the kernel's own; or 0.
	u64 began;
	struct key program;
	char command[16];
};

// Events go through a ring, which has no type. This has the object describe
// them all the same; nobody reads it.
struct event *described_event SEC("described");

// Where XFS keeps what it has set aside for copies: the fork, as seen from the
// inode of the VFS, and the number of bytes in the fork.
struct places {
	s64 fork;
	u32 bytes;
	u32 known;
};

struct identity {
	struct key key;
	u64 file;
	u32 generation;
	u32 direct;	// reads and writes past the page cache
	// The pin that the file shall be, of bytes start to end; or 0.
	u64 pin;
	u64 start;
	u64 end;
	u64 held;	// it is; 2 if the inode had no pin before
	u64 stamp;	// of its inode by then
	s64 references;	// to the struct file
	int writers;	// descriptions of the inode that can write
	int readers;	// those that can only read
	int preemption;	// preempt_dynamic_mode, kernel/sched/core.c
	u32 copies;	// XFS has set blocks aside for copies, or that cannot be told
	u32 role;	// which the file shall have with the pin
	int mapped;	// mappings by which the inode can be stored to
	struct places places;	// told by the guard
};

// Roles: a holder's; a program's that knows nothing of pins; none any more.
#define ROLE_HOLDER 0
#define ROLE_FOREIGN 1
#define ROLE_NONE 2
