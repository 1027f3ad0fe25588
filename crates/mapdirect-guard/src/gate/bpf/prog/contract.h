// SPDX-License-Identifier: (MIT OR Apache-2.0) OR GPL-2.0
//
// What programs and guard share: the rules, what is pinned, questions, notes and
// events. abi.rs has the same in Rust.

// In the order of OperationKind in policy.rs.
enum kind {
	READ,
	OPEN_READ,
	MAP_READ,
	MAP_WRITE,
	OPEN_WRITE,
	OPEN_TRUNCATE,
	WRITE,
	WRITE_UNTORN,
	TRUNCATE,
	ALLOCATE,
	ALLOCATE_KEEP_SIZE,
	PUNCH_HOLE,
	ZERO_RANGE,
	WRITE_ZEROES,
	UNSHARE_RANGE,
	COLLAPSE_RANGE,
	INSERT_RANGE,
	RESHAPE,
	CLONE,
	DEDUPE,
	COPY_RANGE,
	EXCHANGE,
	UNKNOWN,
	KINDS = 32,
};

// In the order of Reach.
enum reach { NOTHING, RANGE, TO_THE_END, BEYOND_SIZE, EVERYTHING };
// In the order of Meets.
enum meets { FROZEN_BLOCKS, ANY_BLOCK };

// A row of the contract, and what policy.rs knows beside it.
struct rule {
	u8 reach;
	u8 refused_on;
	u8 grows;
	u8 brings_shared;
	u8 touches;	// writes to the blocks it reaches, or zeroes in them
	u8 lets_go;	// throws pages out: 1 its range, 2 all from there on, 3 if direct
	u8 pad[2];
};

// What a function of the kernel does that asks for permission.
// ASYNCHRONOUS: writing by a kiocb, which says where and how.
enum doing { ANYTHING, READING, WRITING, ALLOCATING, REMAPPING, COPYING, ASYNCHRONOUS };

// Where it lies: addresses of its code.
struct function {
	u64 start;
	u64 end;
	u64 doing;
};

#define FUNCTIONS 64

struct settings {
	struct rule rules[KINDS];
	u64 guard_start;	// start_boottime of the guard
	u32 guard_tgid;
	// The kernel preempts programs: what is noted may be of an older call,
	// where it is noted before everything that can fail.
	u32 preempts;
	u64 preemption;		// address of preempt_dynamic_mode, or 0
	u32 functions_known;
	u32 pad;
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

// What an operation may not meet, for all pins of an inode together; see
// layers.rs, which says the same in Rust.
enum list { PINNED, FROZEN, BESIDE, SHARED, WINDOW, HELD, MAPPED, AHEAD, EDGES, COARSE, LISTS };

#define INLINE 8

#define REFLINK 1	// its filesystem shares blocks
#define HAS_FROZEN 2	// or blocks beside it that take frozen ones along
#define CACHED 4	// raw mappings through the page cache are accepted
#define FAILING_FREES 8	// a growing write that fails frees blocks of a pin
#define WRITES_PASS 16	// no write is refused, wherever it goes, unless it is untorn
#define WINDOWED 32	// untorn ones are refused near the pins

struct entry {
	u64 version;
	u32 flags;
	u32 spilled;	// runs are in the map `spill[version]`
	u64 size_floor;
	u64 fixed_size;
	u64 largest_size;
	u32 block;
	u32 first[LISTS + 1];
	struct run runs[INLINE];
};

struct question {
	struct key key;
	u32 kind;
	u8 read_side;
	u8 direct;
	u8 foreign;	// a mapping of a file that is no pin's
	u8 has_or;
	u8 has_doubt;	// a write may be an untorn one
	u8 pad[7];
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

struct holder {
	struct key key;
	u64 pin;
	u64 start;
	u64 end;
};

#define EVENT_REFUSED 1
#define EVENT_ENDED 2
#define EVENT_RAW 3
#define EVENT_DOUBT 4	// notes of writes are needed, to judge one

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
	char command[16];
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
	u64 held;	// it is
	s64 references;	// to the struct file
	int writers;	// descriptions of the inode that can write
	int readers;	// those that can only read
	int preemption;	// preempt_dynamic_mode, kernel/sched/core.c
	u32 pad;
};
