// SPDX-License-Identifier: (MIT OR Apache-2.0) OR GPL-2.0
//
// The bpf gate, kernel side.
//
// Security hooks decide, and they rely only on what cannot be missing. The
// kernel never leaves out a program that is attached to a hook; a program that
// is attached to a function (fentry, fexit) it does leave out when the same
// program was preempted on that processor (__bpf_prog_enter_recur,
// kernel/bpf/trampoline.c). So a hook learns what is under way
//
//  1. from the registers of the system call that the thread is in, where these
//     prove it (`proven_call`);
//  2. else from the kernel's stack, which says which function asks
//     (`doing_by_stack`): io_uring, aio, and the kernel's own threads.
//
// Where in the file the operation goes, a register says, or a note. A note is
// left by a program on the last function before the hook, and only when
// nothing can fail any more between the two: so each note belongs to the hook
// that comes next in this thread, which takes it. A hook that finds none
// judges the operation as if it went anywhere in the file.
//
// The kernel's types are declared here as far as they are used; CO-RE finds
// the fields where the running kernel has them, so one object serves all.
// What may be done is not written here: `settings.rules` is the table of
// policy.rs.

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s64 s64;

#define bool _Bool
#define true 1
#define false 0

// "GPL" lets the programs call helpers that read kernel memory.
char LICENSE[] SEC("license") = "Dual MIT/GPL";

#define CORE __attribute__((preserve_access_index))

struct super_block {
	u32 s_dev;
	unsigned long s_magic;
} CORE;

typedef struct {
	int counter;
} atomic_t;

struct address_space {
	atomic_t i_mmap_writable;
} CORE;

struct inode {
	u32 i_flags;
	u16 i_mode;
	u64 i_ino;
	s64 i_size;
	u32 i_generation;
	atomic_t i_dio_count;
	atomic_t i_writecount;
	atomic_t i_readcount;
	struct super_block *i_sb;
	struct address_space *i_mapping;
} CORE;

struct dentry {
	struct inode *d_inode;
} CORE;

struct path {
	struct dentry *dentry;
} CORE;

struct file {
	struct inode *f_inode;
	unsigned int f_flags;
	unsigned int f_mode;
	struct path f_path;
} CORE;

// References to a struct file: until 6.12, and later.
struct file___counted {
	struct {
		s64 counter;
	} f_count;
} CORE;

struct file___referenced {
	struct {
		struct {
			s64 counter;
		} refcnt;
	} f_ref;
} CORE;

struct iattr {
	unsigned int ia_valid;
	s64 ia_size;
} CORE;

struct vm_area_struct {
	unsigned long vm_start;
	unsigned long vm_end;
	unsigned long vm_flags;
	unsigned long vm_pgoff;
	struct file *vm_file;
} CORE;

struct kiocb {
	struct file *ki_filp;
	s64 ki_pos;
	int ki_flags;
} CORE;

struct file_dedupe_range {
	u64 src_offset;
	u64 src_length;
} CORE;

struct file_kattr {
	u32 flags;
	u32 fsx_xflags;
	u32 fsx_extsize;
	u32 fsx_cowextsize;
} CORE;

struct fdtable {
	unsigned int max_fds;
	struct file **fd;
} CORE;

struct files_struct {
	struct fdtable *fdt;
} CORE;

struct ns_common {
	unsigned int inum;
} CORE;

struct user_namespace {
	struct ns_common ns;
} CORE;

struct cred {
	struct {
		u64 val;
	} cap_effective;
	struct user_namespace *user_ns;
} CORE;

struct io_uring_task;

struct thread_info {
	u32 status;
} CORE;

struct task_struct {
	struct thread_info thread_info;
	struct io_uring_task *io_uring;
	int pid;
	int tgid;
	unsigned int flags;
	u64 start_boottime;
	struct task_struct *group_leader;
	struct files_struct *files;
	const struct cred *cred;
} CORE;

// arch/x86/include/asm/ptrace.h
struct pt_regs___x86 {
	unsigned long bp;
	unsigned long bx;
	unsigned long r10;
	unsigned long r9;
	unsigned long r8;
	unsigned long ax;
	unsigned long cx;
	unsigned long dx;
	unsigned long si;
	unsigned long di;
	unsigned long orig_ax;
} CORE;

// arch/arm64/include/asm/ptrace.h
struct pt_regs___arm64 {
	u64 regs[31];
	u64 orig_x0;
	int syscallno;
} CORE;

struct mnt_idmap;

#define ETXTBSY 26
#define EINVAL 22
#define EACCES 13
#define EOPNOTSUPP 95

#define END (~0ULL)
#define PAGE 4096ULL
#define LARGEST_BLOCK 65536ULL

// include/linux/fs.h
#define MAY_WRITE 2
#define MAY_READ 4
#define FMODE_READ 1
#define FMODE_WRITE 2
#define FMODE_NOACCOUNT (1 << 29)
#define ATTR_SIZE (1 << 3)
#define O_APPEND 02000
#define O_DIRECT 040000
#define S_SWAPFILE (1 << 8)
#define S_APPEND (1 << 2)
#define S_IMMUTABLE (1 << 3)
#define S_DAX (1 << 13)
#define S_IFMT 0170000
#define S_IFREG 0100000
#define S_IFBLK 0060000
// include/uapi/linux/fs.h; IOCB_APPEND and IOCB_ATOMIC have the same bits.
#define RWF_APPEND 0x10
#define RWF_NOAPPEND 0x20
#define RWF_ATOMIC 0x40
// include/linux/mm.h
#define VM_SHARED 8
#define VM_MAYWRITE 0x20
#define PROT_WRITE 2
#define MAP_TYPE 0xf
#define MAP_SHARED 1
#define MAP_SHARED_VALIDATE 3
#define MAP_ANONYMOUS 0x20
#define MAP_HUGETLB 0x40000
#define MAP_DIRECT 0x2000000

#define XFS_MAGIC 0x58465342
#define EXT4_MAGIC 0xEF53

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
	u64 tail_size;
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
	u32 type;
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
	u32 dio;
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

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct settings);
} settings SEC(".maps");

#define FILTER_BITS 18
#define FILTER_WORDS (1 << (FILTER_BITS - 6))

// Inodes whose entry is WRITES_PASS: what most writes to a pinned file need,
// without a look-up in a hash map.
#define EASY 1

struct easy {
	u64 ino;
	u64 facts;	// dev << 32 | EASY; else nothing is known
};

// Which inodes are worth a look: a bit is set where some pinned one may be.
// For reads and writes of other files it is all that is looked at. The guard
// stores to this by a mapping of the map.
struct filter {
	u64 bits[FILTER_WORDS];
	struct easy easy[FILTER_WORDS];	// one for each of those words
} filter SEC(".bss.filter");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 20);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct key);
	__type(value, struct entry);
} entries SEC(".maps");

struct many_runs {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_INNER_MAP);
	// Without types: Linux 6.1 takes maps with and without for different.
	__uint(key_size, sizeof(u32));
	__uint(value_size, sizeof(struct run));
};

// Runs that do not fit into an entry, by its version.
struct {
	__uint(type, BPF_MAP_TYPE_HASH_OF_MAPS);
	__uint(max_entries, 1 << 16);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, u64);
	__array(values, struct many_runs);
} spill SEC(".maps");

// The struct files that are pins.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 22);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, u64);
	__type(value, struct holder);
} holders SEC(".maps");

// How many struct files are pins of an inode. Only programs change it. At its
// end the inode is DEAD until the guard pins it again: then its entry counts
// for nothing, and nobody else can join.
#define DEAD (1ULL << 63)

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 20);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct key);
	__type(value, u64);
} lives SEC(".maps");

// How many pins there are on a filesystem.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, u32);
	__type(value, u64);
} devices SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct record);
} records SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} events SEC(".maps");

// Beginnings and ends of pins: refusals, of which there may be many, are not
// in their way.
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} changes SEC(".maps");

// What the guard asked about a file of its own, by thread.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, u32);
	__type(value, struct identity);
} identities SEC(".maps");

// What is kept of a pin for a guard that comes later. Only user space reads
// it; it is declared here to be made and pinned with the others.
struct pin_facts {
	u8 bytes[512];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 22);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, u64);
	__type(value, struct pin_facts);
} pins SEC(".maps");

// How many refusals there were, by kind, whether or not anybody listened; and
// how many ends of pins could not be told.
#define UNTOLD (KINDS - 1)

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, KINDS);
	__type(key, u32);
	__type(value, u64);
} refused SEC(".maps");

static __always_inline u32 current_tid(void)
{
	return (u32)bpf_get_current_pid_tgid();
}

static __always_inline struct settings *the_settings(void)
{
	u32 zero = 0;
	return bpf_map_lookup_elem(&settings, &zero);
}

// The guard itself is let in: it asks its own table first.
static __always_inline bool is_guard(void)
{
	struct settings *s = the_settings();

	if (!s || s->guard_tgid != bpf_get_current_pid_tgid() >> 32)
		return false;
	struct task_struct *task = (void *)bpf_get_current_task();
	return BPF_CORE_READ(task, group_leader, start_boottime) == s->guard_start;
}

static __always_inline u32 filter_slot(u32 dev, u64 ino)
{
	return ((ino ^ ((u64)dev << 40)) * 0x9E3779B97F4A7C15ULL) >> (64 - FILTER_BITS);
}

static __always_inline bool may_be_pinned(u32 dev, u64 ino)
{
	u32 slot = filter_slot(dev, ino);

	return filter.bits[(slot >> 6) & (FILTER_WORDS - 1)] >> (slot & 63) & 1;
}

static __always_inline bool behind(struct inode *inode)
{
	return may_be_pinned(inode->i_sb->s_dev, inode->i_ino);
}

static __always_inline void name(struct key *key, struct inode *inode)
{
	key->dev = inode->i_sb->s_dev;
	key->pad = 0;
	key->ino = inode->i_ino;
}

// Nothing where there is no memory, and, up to Linux 6.1, where the thread was
// interrupted in the middle of this (bpf_task_storage_trylock,
// kernel/bpf/bpf_task_storage.c): then there is no note.
static __always_inline struct record *my_record(bool make)
{
	return bpf_task_storage_get(&records, bpf_get_current_task_btf(), 0,
				    make ? BPF_LOCAL_STORAGE_GET_F_CREATE : 0);
}

static __always_inline u64 plus(u64 a, u64 b)
{
	u64 sum = a + b;
	return sum < a ? END : sum;
}

static __always_inline u64 align_down(u64 value, u64 unit)
{
	return value & ~(unit - 1);
}

static __always_inline u64 align_up(u64 value, u64 unit)
{
	u64 up = plus(value, unit - 1);
	return up == END ? END : up & ~(unit - 1);
}

// The first run of a list that ends behind `start`: they are sorted and
// disjoint. 1 if there is one, 0 if not, -1 if it cannot be told.
static __always_inline int find(struct entry *e, u32 list, u64 start, struct run *found)
{
	u32 low = e->first[list], high = e->first[list + 1];
	u32 last = high;

	if (low >= high)
		return 0;
	if (!e->spilled) {
		for (u32 at = 0; at < INLINE; at++) {
			if (at >= low && at < high && e->runs[at].end > start) {
				*found = e->runs[at];
				return 1;
			}
		}
		return 0;
	}
	u64 version = e->version;
	void *runs = bpf_map_lookup_elem(&spill, &version);
	if (!runs)
		return -1;
	for (int step = 0; step < 32 && low < high; step++) {
		u32 middle = low + (high - low) / 2;
		struct run *run = bpf_map_lookup_elem(runs, &middle);
		if (!run)
			return -1;
		if (run->end > start)
			high = middle;
		else
			low = middle + 1;
	}
	if (low >= last)
		return 0;
	struct run *run = bpf_map_lookup_elem(runs, &low);
	if (!run)
		return -1;
	*found = *run;
	return 1;
}

// Whether [start, end) meets a run of a list.
// Global functions, those that are not static, are verified once by
// themselves and not again wherever they are called: so they may not be
// inlined either.
__noinline int meets(struct entry *e, u32 list, u64 start, u64 end)
{
	struct run run = {};

	if (!e)
		return 1;
	if (list >= LISTS || start >= end)
		return 0;
	int found = find(e, list, start, &run);
	return found < 0 || (found && run.start < end);
}

// What is judged of one range of an operation. Layers::refuses_range.
__noinline int refuses_range(struct entry *e, struct rule *rule, u32 kind, struct run *at, u64 size)
{
	if (!e || !rule || !at)
		return 1;
	u64 block = e->block;
	u64 start = at->start, end = at->end;
	u64 from = start, to = end;

	switch (rule->reach) {
	case NOTHING:
		return 0;
	case EVERYTHING:
		return 1;
	case RANGE:
		// reach_of in policy.rs.
		if (kind == PUNCH_HOLE && end > size)
			to = align_up(end, PAGE);
		break;
	case TO_THE_END:
		to = END;
		break;
	case BEYOND_SIZE:
		if (start < e->size_floor)
			return 1;
		if (e->fixed_size != END && (start != e->fixed_size || end != e->fixed_size))
			return 1;
		from = to = 0;
		break;
	}
	u32 list = rule->refused_on == ANY_BLOCK ? PINNED : kind == MAP_WRITE ? MAPPED : FROZEN;
	if (meets(e, list, from, to))
		return 1;
	if (!block || (block & (block - 1)))
		return 1;
	bool grows = rule->grows && end > size && (size & (block - 1));
	u64 tail = align_down(size, block);
	if (grows && meets(e, SHARED, tail, size))
		return 1;
	return 0;
}

// What an operation does beside the pins. Layers::minds_range.
__noinline int minds_range(struct entry *e, u32 untorn, struct run *at)
{
	if (!e || !at)
		return 1;
	u64 block = e->block;
	u64 start = at->start, end = at->end;

	if (!block || (block & (block - 1)))
		return 1;
	u64 from = align_down(start, block), to = align_up(end, block);
	if (meets(e, BESIDE, from, to))
		return 1;
	return untorn && meets(e, WINDOW, from, to);
}

__noinline int lets_go(struct entry *e, u32 how, u64 start, u64 end)
{
	if (!e)
		return 1;
	u64 before = how == 2 ? e->block : 0;
	u64 from = start > before ? start - before : 0;

	return meets(e, HELD, align_down(from, PAGE), how == 2 ? END : end);
}

static __always_inline bool is_empty(struct entry *e, u32 list)
{
	return e->first[list] >= e->first[list + 1];
}

// OperationKind::writes_data.
static __always_inline bool writes_data(u32 kind)
{
	return kind == WRITE || kind == WRITE_UNTORN || kind == COPY_RANGE;
}

// OperationKind::leaves_unwritten.
static __always_inline bool leaves_unwritten(u32 kind)
{
	return kind == ALLOCATE || kind == ALLOCATE_KEEP_SIZE || kind == ZERO_RANGE ||
	       kind == WRITE_ZEROES || kind == COLLAPSE_RANGE || kind == INSERT_RANGE ||
	       kind == RESHAPE;
}

// Most writes, in short: what the rest of `judge` would look for is not there.
static __always_inline bool meets_nothing(struct entry *e, struct rule *rule, struct question *q)
{
	if (rule->reach != RANGE || rule->refused_on != FROZEN_BLOCKS || rule->brings_shared ||
	    q->kind == MAP_WRITE || q->has_or || (e->flags & FAILING_FREES) ||
	    !is_empty(e, EDGES))
		return false;
	return q->at.end <= q->size && q->at.end <= e->tail_size && is_empty(e, FROZEN) &&
	       is_empty(e, BESIDE) && is_empty(e, HELD) && is_empty(e, AHEAD);
}

// Layers::dirties_folios.
__noinline int dirties_folios(struct entry *e, u32 kind, struct run *at)
{
	if (!e || !at)
		return 1;
	u64 block = e->block, start = at->start, end = at->end;

	if (!block || (block & (block - 1)))
		return 1;
	u64 from = align_down(start, block), to = align_up(end, block);
	if (writes_data(kind) || kind == UNSHARE_RANGE)
		return meets(e, COARSE, from, to);
	return kind != MAP_WRITE && ((from != start && meets(e, COARSE, from, start)) ||
				     (to != end && meets(e, COARSE, end, to)));
}

// Layers::refuses.
__noinline int judge(struct entry *e, struct question *q)
{
	if (!e || !q)
		return 1;
	u32 kind = q->kind;
	struct settings *s = the_settings();

	if (!s)
		return 1;
	if (kind == COPY_RANGE && !(e->flags & REFLINK)) {
		if (q->read_side)
			return 0;
		kind = WRITE;
	}
	if (kind == WRITE_UNTORN && !(e->flags & REFLINK))
		kind = WRITE;
	if (kind >= KINDS)
		return 1;
	// Wherever it begins, it could be grown over frozen blocks by mremap(2),
	// which no hook sees.
	if (kind == MAP_WRITE && q->foreign && (e->flags & HAS_FROZEN))
		return 1;
	struct rule *rule = &s->rules[kind];
	u64 size = q->size;

	if (meets_nothing(e, rule, q))
		return 0;
	if (refuses_range(e, rule, kind, &q->at, size))
		return 1;
	if (q->has_or && refuses_range(e, rule, kind, &q->or_at, size))
		return 1;
	u64 largest = q->at.end;
	if (q->has_or && q->or_at.end > largest)
		largest = q->or_at.end;
	if (e->tail_size != END && rule->grows && largest > e->tail_size)
		return 1;
	u32 how = rule->lets_go;
	if (how == 3)
		how = q->direct ? 1 : 0;
	if (how && lets_go(e, how, q->at.start, q->at.end))
		return 1;
	if (how && q->has_or && lets_go(e, how, q->or_at.start, q->or_at.end))
		return 1;
	if (rule->brings_shared) {
		u64 from = q->at.start, to = q->at.end;
		if (rule->reach == EVERYTHING) {
			from = 0;
			to = END;
		} else if (rule->reach == TO_THE_END) {
			from = from > LARGEST_BLOCK ? from - LARGEST_BLOCK : 0;
			to = END;
		}
		if (rule->grows && to > size) {
			u64 last = size ? size - 1 : 0;
			from = from < last ? from : last;
		}
		from = align_down(from, LARGEST_BLOCK);
		to = align_up(to, LARGEST_BLOCK);
		if (meets(e, WINDOW, from, to))
			return 1;
	}
	if (writes_data(kind) && !is_empty(e, AHEAD)) {
		if (meets(e, AHEAD, q->at.start, q->at.end))
			return 1;
		if (q->has_or && meets(e, AHEAD, q->or_at.start, q->or_at.end))
			return 1;
	}
	if ((e->flags & FAILING_FREES) && writes_data(kind) && size < e->size_floor &&
	    largest > size)
		return 1;
	u64 unwritten_to = rule->reach == TO_THE_END ? END : q->at.end;
	if (leaves_unwritten(kind) && meets(e, EDGES, q->at.start, unwritten_to))
		return 1;
	bool untorn = kind == WRITE_UNTORN;
	if (rule->touches && minds_range(e, untorn, &q->at))
		return 1;
	if (rule->touches && q->has_or && minds_range(e, untorn, &q->or_at))
		return 1;
	u64 block = e->block;
	if (!block || (block & (block - 1)))
		return 1;
	struct run tail = { align_down(size, block), size };
	bool zeroes_tail = rule->grows && largest > size && (size & (block - 1));
	if (zeroes_tail && minds_range(e, untorn, &tail))
		return 1;
	if (!is_empty(e, COARSE) && rule->touches && !q->read_side) {
		if (dirties_folios(e, kind, &q->at) ||
		    (q->has_or && dirties_folios(e, kind, &q->or_at)))
			return 1;
	}
	return zeroes_tail && meets(e, COARSE, tail.start, tail.end);
}

// Whether an operation is refused. An entry may be replaced while it is read,
// and its memory used for another: what counts is a verdict by one that is
// still the same afterwards.
int verdict(struct question *q)
{
	if (!q)
		return 1;
	struct key key = q->key;
	for (int try = 0; try < 4; try++) {
		struct entry *e = bpf_map_lookup_elem(&entries, &key);
		if (!e)
			return 0;
		u64 version = *(volatile u64 *)&e->version;
		int refuses = judge(e, q);
		struct entry *now = bpf_map_lookup_elem(&entries, &key);
		if (!now)
			return 0;
		if (now == e && *(volatile u64 *)&now->version == version)
			return refuses;
	}
	return 1;
}

static __noinline int tell(struct question *q)
{
	u32 kind = q->kind;
	u64 *count = bpf_map_lookup_elem(&refused, &kind);

	if (count)
		__sync_fetch_and_add(count, 1);
	struct event *event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (!event)
		return 0;
	u64 ids = bpf_get_current_pid_tgid();
	event->type = EVENT_REFUSED;
	event->kind = kind;
	event->tid = (u32)ids;
	event->tgid = ids >> 32;
	event->key = q->key;
	event->start = q->at.start;
	event->end = q->at.end;
	event->pin = 0;
	event->file = 0;
	bpf_get_current_comm(event->command, sizeof(event->command));
	bpf_ringbuf_submit(event, 0);
	return 0;
}

// Whether there is anything to refuse for; tells the guard of it.
__noinline int is_refused(struct question *q)
{
	if (!q)
		return 1;
	if (is_guard())
		return 0;
	// The entry may be one that the guard has written for pins that were
	// gone by then.
	struct key key = q->key;
	u64 *lives_of = bpf_map_lookup_elem(&lives, &key);
	if (!lives_of || (*lives_of & DEAD))
		return 0;
	tell(q);
	return 1;
}

static __always_inline int decide(struct question *q)
{
	return verdict(q) && is_refused(q) ? -ETXTBSY : 0;
}

// Refuses what may not be done to a file any part of which is pinned.
static __noinline int refuse_pinned(struct inode *inode, u32 kind)
{
	struct question q = {};

	name(&q.key, inode);
	struct key key = q.key;
	if (!bpf_map_lookup_elem(&entries, &key))
		return 0;
	q.kind = kind;
	q.at.end = END;
	return is_refused(&q) ? -ETXTBSY : 0;
}

// ---- what a thread is doing ----

// include/linux/sched.h: of threads without system calls of their own.
#define PF_IO_WORKER 0x10
#define PF_WQ_WORKER 0x20
#define PF_USER_WORKER 0x4000
#define PF_KTHREAD 0x200000
// arch/x86/include/asm/thread_info.h: a 32-bit system call.
#define TS_COMPAT 2
#define ENOSYS 38
// include/linux/fs.h
#define MAX_RW_COUNT 0x7ffff000ULL

enum abi { X86_64, I386, ARM64 };

// System calls, as far as they matter here, whatever their number.
enum call {
	NOT_PROVEN,
	ANOTHER_CALL,
	READS,
	OPENS,
	WRITE_CALL,
	PWRITE,
	WRITEV,
	PWRITEV,
	PWRITEV2,
	SENDFILE,
	SPLICE,
	COPY_FILE_RANGE,
	FALLOCATE,
	MMAP,
	IO_SUBMIT,
	IO_URING_ENTER,
};

#define BIT(number) (1ULL << (number))

// arch/x86/entry/syscalls/syscall_64.tbl. In a call of these nothing is done to
// a file but to read it: read, pread64, readv, sendfile, execve.
#define X86_64_READS (BIT(0) | BIT(17) | BIT(19) | BIT(40) | BIT(59))
// write, pwrite64, writev
#define X86_64_WRITES (BIT(1) | BIT(18) | BIT(20))

__noinline int call_of(u32 abi, u32 number)
{
	if (abi == X86_64) {
		switch (number) {
		case 0: case 17: case 19: case 59: case 295: case 322: case 327:
			return READS;
		case 1: return WRITE_CALL;
		case 9: return MMAP;
		case 18: return PWRITE;
		case 20: return WRITEV;
		case 40: return SENDFILE;
		case 2: case 85: case 257: case 304: case 437: return OPENS;
		case 209: return IO_SUBMIT;
		case 275: return SPLICE;
		case 285: return FALLOCATE;
		case 296: return PWRITEV;
		case 326: return COPY_FILE_RANGE;
		case 328: return PWRITEV2;
		case 426: return IO_URING_ENTER;
		}
	} else if (abi == I386) {
		// arch/x86/entry/syscalls/syscall_32.tbl; mmap (90) has its arguments in
		// the program's memory.
		switch (number) {
		case 3: case 11: case 145: case 180: case 333: case 358: case 378:
			return READS;
		case 4: return WRITE_CALL;
		case 146: return WRITEV;
		case 181: return PWRITE;
		case 187: case 239: return SENDFILE;
		case 192: return MMAP;
		case 5: case 8: case 295: case 342: case 437: return OPENS;
		case 248: return IO_SUBMIT;
		case 313: return SPLICE;
		case 324: return FALLOCATE;
		case 334: return PWRITEV;
		case 377: return COPY_FILE_RANGE;
		case 379: return PWRITEV2;
		case 426: return IO_URING_ENTER;
		}
	} else {
		// include/uapi/asm-generic/unistd.h
		switch (number) {
		case 63: case 65: case 67: case 69: case 221: case 281: case 286:
			return READS;
		case 64: return WRITE_CALL;
		case 66: return WRITEV;
		case 68: return PWRITE;
		case 70: return PWRITEV;
		case 71: return SENDFILE;
		case 222: return MMAP;
		case 56: case 265: case 437: return OPENS;
		case 2: return IO_SUBMIT;
		case 76: return SPLICE;
		case 47: return FALLOCATE;
		case 285: return COPY_FILE_RANGE;
		case 287: return PWRITEV2;
		case 426: return IO_URING_ENTER;
		}
	}
	return ANOTHER_CALL;
}

static __always_inline struct pt_regs___x86 *own_registers(void)
{
	return (void *)bpf_task_pt_regs((void *)bpf_get_current_task_btf());
}

// Whether a thread makes system calls of its own.
static __always_inline bool has_calls(struct task_struct *task)
{
	return !(task->flags & (PF_KTHREAD | PF_IO_WORKER | PF_USER_WORKER));
}

// Whether io_uring may run requests in this thread, on the way out of whatever
// call, with the registers of that call or with those that a tracer or a
// seccomp listener has put there: they prove nothing then. Set before the first
// request (io_uring/tctx.c).
static __always_inline bool has_rings(struct task_struct *task)
{
	return bpf_core_field_exists(task->io_uring) && task->io_uring;
}

// The number of the system call that this thread is in the middle of, or -1. It
// has not been answered yet: the kernel sets ax to -ENOSYS on the way in, and
// to the answer on the way out.
static __always_inline s64 call_number(struct task_struct *task, u32 *abi)
{
	struct pt_regs___x86 *regs = own_registers();

	if (!has_calls(task))
		return -1;
	if (bpf_core_field_exists(regs->orig_ax)) {
		if (regs->ax != (u64)-ENOSYS)
			return -1;
		*abi = task->thread_info.status & TS_COMPAT ? I386 : X86_64;
		int number = (int)regs->orig_ax;
		// Numbers of x32 have bit 30, and are not known here.
		return number;
	}
	// There is no such mark on arm64. Without rings nothing but the call itself
	// runs with its registers.
	struct pt_regs___arm64 *arm = (void *)regs;
	*abi = ARM64;
	return arm->syscallno;
}

// The system call that this thread is proven to be in.
__noinline int proven_call(void)
{
	struct task_struct *task = (void *)bpf_get_current_task_btf();
	u32 abi = X86_64;

	if (has_rings(task))
		return NOT_PROVEN;
	s64 number = call_number(task, &abi);
	return number < 0 ? NOT_PROVEN : call_of(abi, number);
}

// The same for what io_uring has no request for: there registers prove it even
// if there are rings.
__noinline int call_without_rings(void)
{
	struct task_struct *task = (void *)bpf_get_current_task_btf();
	u32 abi = X86_64;
	s64 number = call_number(task, &abi);

	return number < 0 ? NOT_PROVEN : call_of(abi, number);
}

// An argument of the system call, counted from 0. Those that the kernel takes
// for an int have the caller's junk above it.
__noinline u64 argument(u32 which)
{
	struct task_struct *task = (void *)bpf_get_current_task_btf();
	struct pt_regs___x86 *regs = own_registers();

	if (!bpf_core_field_exists(regs->orig_ax)) {
		struct pt_regs___arm64 *arm = (void *)regs;
		switch (which) {
		case 0: return arm->orig_x0;
		case 1: return arm->regs[1];
		case 2: return arm->regs[2];
		case 3: return arm->regs[3];
		case 4: return arm->regs[4];
		default: return arm->regs[5];
		}
	}
	if (task->thread_info.status & TS_COMPAT) {
		switch (which) {
		case 0: return (u32)regs->bx;
		case 1: return (u32)regs->cx;
		case 2: return (u32)regs->dx;
		case 3: return (u32)regs->si;
		case 4: return (u32)regs->di;
		default: return (u32)regs->bp;
		}
	}
	switch (which) {
	case 0: return regs->di;
	case 1: return regs->si;
	case 2: return regs->dx;
	case 3: return regs->r10;
	case 4: return regs->r8;
	default: return regs->r9;
	}
}

static __always_inline bool is_32_bit(void)
{
	struct task_struct *task = (void *)bpf_get_current_task_btf();
	struct pt_regs___x86 *regs = own_registers();

	return bpf_core_field_exists(regs->orig_ax) && (task->thread_info.status & TS_COMPAT);
}

// An argument of 64 bits, which 32-bit calls pass in two.
static __always_inline u64 wide_argument(u32 which, u32 low, u32 high)
{
	return is_32_bit() ? argument(low) | argument(high) << 32 : argument(which);
}

// What a descriptor of this thread is. That it is the file of a hook proves
// that the call is about this file; that it is not proves nothing, since others
// may have put another in its place since.
static __always_inline struct file *own_file(u32 fd)
{
	struct task_struct *task = (void *)bpf_get_current_task_btf();
	// Not by helpers, which cost more than the rest of it.
	struct fdtable *table = task->files->fdt;
	struct file *file = 0;

	if (fd >= table->max_fds)
		return 0;
	struct file **slot = table->fd + fd;
	bpf_probe_read_kernel(&file, sizeof(file), slot);
	return file;
}

#define FRAMES 12

// What the function does that an address of the kernel's code belongs to.
__noinline int doing_at(u64 at)
{
	struct settings *s = the_settings();

	if (!s)
		return ANYTHING;
	u32 known = s->functions_known;
	for (u32 one = 0; one < FUNCTIONS; one++) {
		if (one >= known)
			break;
		if (at > s->functions[one].start && at <= s->functions[one].end)
			return s->functions[one].doing;
	}
	return ANYTHING;
}

// What the function does that asks, by the kernel's own stack: the innermost
// one that is known. Nobody can forge that, and nothing of it is left out, but
// it takes longer than registers.
static __noinline int doing_by_stack(void *ctx)
{
	u64 frames[FRAMES] = {};

	if (bpf_get_stack(ctx, frames, sizeof(frames), 0) <= 0)
		return ANYTHING;
	for (u32 frame = 0; frame < FRAMES; frame++) {
		int doing = frames[frame] ? doing_at(frames[frame]) : ANYTHING;
		if (doing != ANYTHING)
			return doing;
	}
	return ANYTHING;
}

// ---- notes ----
//
// Each is left by the last function before a hook, when nothing but that hook
// can come next, or another security module that says no: then the end of that
// function takes it back.

static __always_inline bool preempts(void)
{
	struct settings *s = the_settings();

	return !s || s->preempts;
}

static __always_inline void note(struct note *note, struct file *file, u32 doing, u32 kind,
				 u64 start, u64 end)
{
	note->file = (u64)file;
	note->doing = doing;
	note->kind = kind;
	note->start = start;
	note->end = end;
	note->rwf = note->has_rwf = 0;
}

static __always_inline void note_write(struct file *file, u32 doing, u32 kind, u64 start, u64 end)
{
	struct record *record = my_record(true);

	if (record)
		note(&record->write, file, doing, kind, start, end);
}

static __always_inline void note_read(struct file *file, u32 doing, u32 kind, u64 start, u64 end)
{
	struct record *record = my_record(true);

	if (record)
		note(&record->read, file, doing, kind, start, end);
}

static __always_inline int forget(void)
{
	struct record *record = my_record(false);

	if (record)
		record->read.file = record->write.file = 0;
	return 0;
}

#define FORGETS(name, function)                                                                    \
	SEC("fexit/" #function)                                                                    \
	int BPF_PROG(name)                                                                         \
	{                                                                                          \
		return forget();                                                                   \
	}

// Reads and writes of every file pay for this: it is attached only while
// something is pinned for which it matters where a write goes.
SEC("fentry/rw_verify_area")
int BPF_PROG(note_rw, int write, struct file *file, const s64 *ppos, u64 count)
{
	if (!behind(file->f_inode))
		return 0;
	// Of reads only copies matter, and those are nobody's but the thread's.
	if (!write && proven_call() != COPY_FILE_RANGE)
		return 0;
	s64 at = -1;
	if (ppos)
		bpf_probe_read_kernel(&at, sizeof(at), ppos);
	// Else it fails before it asks (rw_verify_area, fs/read_write.c).
	if (at < 0 || (s64)count < 0 || at + (s64)count < 0)
		return 0;
	struct record *record = my_record(true);
	if (!record)
		return 0;
	struct note *one = write ? &record->write : &record->read;
	note(one, file, WRITING, WRITE, at, plus(at, count));
	// Asynchronous writes keep their position in a kiocb, and beside it how
	// they shall be made.
	struct kiocb *iocb = (void *)ppos - bpf_core_field_offset(struct kiocb, ki_pos);
	if (write && BPF_CORE_READ(iocb, ki_filp) == file) {
		one->rwf = BPF_CORE_READ(iocb, ki_flags);
		one->has_rwf = 1;
	}
	return 0;
}

FORGETS(end_rw, rw_verify_area)

// include/uapi/linux/falloc.h
#define KEEP_SIZE 0x01

static __always_inline u32 fallocate_kind(int mode)
{
	switch (mode & ~KEEP_SIZE) {
	case 0:
		return mode & KEEP_SIZE ? ALLOCATE_KEEP_SIZE : ALLOCATE;
	case 0x02:
		return PUNCH_HOLE;
	case 0x08:
		return COLLAPSE_RANGE;
	case 0x10:
		return ZERO_RANGE;
	case 0x20:
		return INSERT_RANGE;
	case 0x40:
		return UNSHARE_RANGE;
	case 0x80:
		return WRITE_ZEROES;
	default:
		return RESHAPE;
	}
}

// Whether vfs_fallocate comes as far as the hook; what it does not know fails
// there, and what it will know one day is not noted.
static __always_inline bool is_fallocate(struct file *file, int mode, s64 offset, s64 length)
{
	if (offset < 0 || length <= 0 || !(file->f_mode & FMODE_WRITE))
		return false;
	if (file->f_inode->i_flags & (S_APPEND | S_IMMUTABLE | S_SWAPFILE))
		return false;
	// Those that need KEEP_SIZE, those that may not have it, and those that do
	// not mind.
	switch (mode) {
	case 0: case 0x01: case 0x03: case 0x08: case 0x10: case 0x11: case 0x20: case 0x40:
	case 0x41:
		return true;
	default:
		return false;
	}
}

SEC("fentry/vfs_fallocate")
int BPF_PROG(note_fallocate, struct file *file, int mode, s64 offset, s64 length)
{
	if (behind(file->f_inode) && is_fallocate(file, mode, offset, length))
		note_write(file, ALLOCATING, fallocate_kind(mode), offset, plus(offset, length));
	return 0;
}

FORGETS(end_fallocate, vfs_fallocate)

static __always_inline u64 remap_end(s64 at, s64 length)
{
	// Nothing means everything.
	return length > 0 ? plus(at, length) : END;
}

SEC("fentry/remap_verify_area")
int BPF_PROG(note_remap, struct file *file, s64 at, s64 length, bool write)
{
	if (!behind(file->f_inode) || at < 0 || length < 0 || at + length < 0)
		return 0;
	if (write)
		note_write(file, REMAPPING, CLONE, at, remap_end(at, length));
	else
		note_read(file, REMAPPING, CLONE, at, remap_end(at, length));
	return 0;
}

FORGETS(end_remap, remap_verify_area)

// Until 6.1 remap_verify_area is part of its callers, which can fail before
// they ask: what is noted there counts only where no program is left out, so
// that each call leaves notes of its own.
SEC("fentry/do_clone_file_range")
int BPF_PROG(note_clone, struct file *in, s64 at_in, struct file *out, s64 at_out, s64 length,
	     u32 flags)
{
	if (preempts())
		return 0;
	if (behind(in->f_inode))
		note_read(in, REMAPPING, CLONE, at_in, remap_end(at_in, length));
	if (behind(out->f_inode))
		note_write(out, REMAPPING, CLONE, at_out, remap_end(at_out, length));
	return 0;
}

SEC("fentry/vfs_dedupe_file_range")
int BPF_PROG(note_dedupe, struct file *file, struct file_dedupe_range *same)
{
	if (preempts() || !behind(file->f_inode))
		return 0;
	u64 at = BPF_CORE_READ(same, src_offset);
	note_read(file, REMAPPING, DEDUPE, at, plus(at, BPF_CORE_READ(same, src_length)));
	return 0;
}

SEC("fentry/vfs_dedupe_file_range_one")
int BPF_PROG(note_dedupe_one, struct file *source, s64 from, struct file *file, s64 at, s64 length,
	     u32 flags)
{
	if (preempts())
		return 0;
	if (behind(source->f_inode))
		note_read(source, REMAPPING, DEDUPE, from, remap_end(from, length));
	if (behind(file->f_inode))
		note_write(file, REMAPPING, DEDUPE, at, remap_end(at, length));
	return 0;
}

FORGETS(end_clone, do_clone_file_range)
FORGETS(end_dedupe_one, vfs_dedupe_file_range_one)

// Takes the note of a thread about what it does to a file.
static __always_inline bool take(struct record *record, bool write, struct file *file, u32 doing,
				 struct note *taken)
{
	if (!record)
		return false;
	struct note *one = write ? &record->write : &record->read;
	if (one->file != (u64)file)
		return false;
	*taken = *one;
	one->file = 0;
	return taken->doing == doing ||
	       (taken->doing == WRITING && (doing == COPYING || doing == ASYNCHRONOUS));
}

// ---- hooks ----

// Whether a write goes to the end of the file, wherever it says. Others append,
// too: where that will be is not known.
static __always_inline bool appends(u32 file_flags, u32 rwf)
{
	return (rwf & RWF_APPEND) || ((file_flags & O_APPEND) && !(rwf & RWF_NOAPPEND));
}

// Where a write goes, if a register says.
__noinline int place_by_registers(u32 call, struct run *at)
{
	if (!at)
		return 0;
	if (call == PWRITE) {
		// 32-bit: fd, buffer, length, and the position in two.
		at->start = wide_argument(3, 3, 4);
		at->end = plus(at->start, argument(2));
		return 1;
	}
	if (call == PWRITEV || call == PWRITEV2) {
		// How much it writes is in the program's memory, which may change.
		s64 start = wide_argument(3, 3, 4);
		if (start < 0)
			return 0;
		at->start = start;
		at->end = plus(start, MAX_RW_COUNT);
		return 1;
	}
	return 0;
}

// What a write does to this file.
static __noinline int ask_about_write(void *ctx, struct file *file, struct question *q)
{
	struct record *record = my_record(false);
	struct note noted = {};
	u32 call = proven_call();
	u32 doing = ANYTHING;
	bool ours = false;

	if (!q)
		return 0;
	switch (call) {
	case WRITE_CALL: case PWRITE: case WRITEV: case PWRITEV: case PWRITEV2: case SENDFILE:
		doing = WRITING;
		ours = own_file(argument(0)) == file;
		break;
	case SPLICE:
		doing = WRITING;
		ours = own_file(argument(2)) == file;
		break;
	case COPY_FILE_RANGE:
		doing = COPYING;
		ours = own_file(argument(2)) == file;
		break;
	case FALLOCATE:
		doing = ALLOCATING;
		ours = own_file(argument(0)) == file;
		break;
	}
	if (!ours)
		doing = doing_by_stack(ctx);
	q->kind = UNKNOWN;
	q->at.start = 0;
	q->at.end = END;
	u32 flags = BPF_CORE_READ(file, f_flags);
	q->direct = !!(flags & O_DIRECT);
	if (doing == ALLOCATING) {
		// io_uring allocates in its workers only, so this is a call of the
		// thread, if that has calls: with rings, too.
		if (!ours && call_without_rings() == FALLOCATE)
			ours = own_file(argument(0)) == file;
		if (ours) {
			if (record)
				record->write.file = 0;
			q->kind = fallocate_kind((int)argument(1));
			q->at.start = wide_argument(2, 2, 3);
			q->at.end = plus(q->at.start, wide_argument(3, 4, 5));
		} else if (take(record, true, file, ALLOCATING, &noted)) {
			q->kind = noted.kind;
			q->at.start = noted.start;
			q->at.end = noted.end;
		}
		return 0;
	}
	if (doing == REMAPPING) {
		q->kind = CLONE;
		if (take(record, true, file, REMAPPING, &noted)) {
			q->kind = noted.kind;
			q->at.start = noted.start;
			q->at.end = noted.end;
		}
		return 0;
	}
	if (doing != WRITING && doing != COPYING && doing != ASYNCHRONOUS) {
		if (record)
			record->write.file = 0;
		return 0;
	}
	bool known = take(record, true, file, doing, &noted);
	u32 rwf = 0;
	bool is_plain = doing != ASYNCHRONOUS;
	if (is_plain) {
		// It is a call of this thread, with rings or without, or of the
		// kernel's own threads, which do not say how. What stands in memory
		// before the position may look like a kiocb, and is none.
		if (call_without_rings() == PWRITEV2)
			rwf = argument(5);
	} else if (known && noted.has_rwf) {
		// Here these decide, and not how the file was opened; IOCB_APPEND and
		// IOCB_ATOMIC are the bits of RWF_APPEND and RWF_ATOMIC.
		rwf = noted.rwf & (RWF_APPEND | RWF_ATOMIC);
		if (!(rwf & RWF_APPEND))
			rwf |= RWF_NOAPPEND;
	} else if (flags & O_DIRECT) {
		// Nobody knows how. An untorn write is direct
		// (generic_atomic_write_valid).
		q->has_doubt = 1;
	}
	if (ours && call == PWRITE) {
		place_by_registers(call, &q->at);
	} else if (known) {
		q->at.start = noted.start;
		q->at.end = noted.end;
	} else if (ours) {
		place_by_registers(call, &q->at);
	}
	// What is not known to go anywhere, nor how, stays so.
	if ((is_plain || known) && appends(flags, rwf)) {
		q->at.start = q->size;
		q->at.end = END;
	}
	q->kind = doing == COPYING ? COPY_RANGE : rwf & RWF_ATOMIC ? WRITE_UNTORN : WRITE;
	return 0;
}

static __noinline int judge_write(void *ctx, struct file *file)
{
	struct inode *inode = file->f_inode;
	struct question q = {};

	name(&q.key, inode);
	struct key key = q.key;
	if (!bpf_map_lookup_elem(&entries, &key))
		return 0;
	q.size = inode->i_size;
	ask_about_write(ctx, file, &q);
	if (q.has_doubt) {
		// With notes there is no doubt: they cost every write, so the guard
		// attaches them when it hears of one.
		struct question worse = q;
		worse.kind = WRITE_UNTORN;
		int refused = verdict(&worse);
		if (refused) {
			struct event *event = bpf_ringbuf_reserve(&changes, sizeof(*event), 0);
			if (event) {
				__builtin_memset(event, 0, sizeof(*event));
				event->type = EVENT_DOUBT;
				event->key = q.key;
				bpf_ringbuf_submit(event, 0);
			}
			q.kind = WRITE_UNTORN;
		}
	}
	return decide(&q);
}

static __noinline int judge_read(void *ctx, struct file *file)
{
	struct inode *inode = file->f_inode;
	struct question q = {};

	name(&q.key, inode);
	struct key key = q.key;
	struct entry *e = bpf_map_lookup_elem(&entries, &key);
	// Only where blocks can be shared there is anything to reading.
	if (!e || !(e->flags & REFLINK))
		return 0;
	u32 call = proven_call();
	// aio knows no copies; io_uring opens files, which copies those below an
	// overlay.
	if (call == READS || call == SENDFILE || call == SPLICE || call == IO_SUBMIT)
		return 0;
	u32 doing = call == COPY_FILE_RANGE ? COPYING : doing_by_stack(ctx);
	if (doing == READING)
		return 0;
	struct note noted = {};
	q.read_side = 1;
	q.size = inode->i_size;
	q.kind = doing == REMAPPING ? CLONE : doing == COPYING ? COPY_RANGE : UNKNOWN;
	q.at.end = END;
	if (take(my_record(false), false, file, doing, &noted)) {
		if (doing == REMAPPING)
			q.kind = noted.kind;
		q.at.start = noted.start;
		q.at.end = noted.end;
	}
	return decide(&q);
}

// Every read and write of any file pays for this, while something is pinned.
SEC("lsm/file_permission")
int BPF_PROG(file_permission, struct file *file, int mask, int before)
{
	if (before)
		return before;
	struct inode *inode = file->f_inode;
	u32 dev = inode->i_sb->s_dev;
	u64 ino = inode->i_ino;
	u32 slot = filter_slot(dev, ino);
	u32 word = (slot >> 6) & (FILTER_WORDS - 1);
	if (!(filter.bits[word] >> (slot & 63) & 1))
		return 0;
	struct task_struct *task = (void *)bpf_get_current_task_btf();
	u32 abi = ARM64;
	u64 number = has_rings(task) ? -1 : call_number(task, &abi);
	bool simple = abi == X86_64 && number < 64;
	if (!(mask & MAY_WRITE)) {
		if (simple && (X86_64_READS >> number & 1))
			return 0;
		return judge_read(ctx, file);
	}
	if (simple && (X86_64_WRITES >> number & 1)) {
		u64 facts = *(volatile u64 *)&filter.easy[word].facts;
		if (facts == ((u64)dev << 32 | EASY) && filter.easy[word].ino == ino &&
		    own_file(own_registers()->di) == file)
			return 0;
	}
	return judge_write(ctx, file);
}

// Whoever opens a pinned file for writing must be somebody whose writes come by
// here. Whatever opens files for itself, and writes to them without asking, is
// not let in: an overlay, process accounting, swap, storage targets. They call
// from within other system calls, or open what is below something else.
static __noinline int may_open(struct file *file)
{
	struct task_struct *task = (void *)bpf_get_current_task_btf();
	struct inode *inode = file->f_inode;
	struct dentry *dentry = BPF_CORE_READ(file, f_path.dentry);

	if ((file->f_mode & FMODE_NOACCOUNT) || BPF_CORE_READ(dentry, d_inode) != inode)
		return 0;
	u32 flags = task->flags;
	if (flags & PF_IO_WORKER)
		return 1;
	// nfsd asks whenever it writes; what workqueues do (NFS to oneself, SMB)
	// is not known.
	if (flags & PF_KTHREAD)
		return !(flags & PF_WQ_WORKER);
	u32 call = call_without_rings();
	// A listener of file events gets its descriptors by read(2).
	return call == OPENS || call == IO_URING_ENTER || call == READS ||
	       (call == NOT_PROVEN && has_rings(task));
}

SEC("lsm/file_open")
int BPF_PROG(file_open, struct file *file, int before)
{
	if (before || !(file->f_mode & FMODE_WRITE))
		return before;
	struct inode *inode = file->f_inode;
	if (!behind(inode) || may_open(file))
		return 0;
	return refuse_pinned(inode, OPEN_WRITE);
}

static __always_inline int judge_size(struct dentry *dentry, struct iattr *attr)
{
	if (!(attr->ia_valid & ATTR_SIZE))
		return 0;
	struct inode *inode = dentry->d_inode;
	if (!inode || !behind(inode))
		return 0;
	struct question q = {};
	name(&q.key, inode);
	q.size = inode->i_size;
	q.kind = TRUNCATE;
	q.at.start = q.at.end = attr->ia_size;
	return decide(&q);
}

SEC("lsm/inode_setattr")
int BPF_PROG(inode_setattr, struct mnt_idmap *idmap, struct dentry *dentry, struct iattr *attr,
	     int before)
{
	return before ?: judge_size(dentry, attr);
}

// Until 6.1 without a mapping of ids.
SEC("lsm/inode_setattr")
int BPF_PROG(inode_setattr_2, struct dentry *dentry, struct iattr *attr, int before)
{
	return before ?: judge_size(dentry, attr);
}

static __always_inline int refuse_exchange(struct inode *inode, u32 kind)
{
	struct question q = {};

	name(&q.key, inode);
	q.kind = kind;
	q.at.end = END;
	if (is_guard())
		return 0;
	tell(&q);
	return -ETXTBSY;
}

// fs/xfs/xfs_fs.h, fs/ext4/ext4.h, include/uapi/linux/{fs,loop}.h; sizes in
// the numbers differ between ABIs and are not compared.
#define XFS_SWAPEXT 0x586d
#define XFS_SCRUB 0x583c
#define XFS_SCRUBV 0x5840
#define FSSETXATTR 0x5820
#define SETFLAGS 0x6602
#define ENABLE_VERITY 0x6685
#define EXT4_MIGRATE 0x6609
#define EXT4_MOVE_EXT 0x660f
#define EXT4_SWAP_BOOT 0x6611
#define LOOP_SET_FD 0x4c00
#define LOOP_CHANGE_FD 0x4c06
#define LOOP_CONFIGURE 0x4c0a
#define EXT4_JOURNAL_DATA 0x4000
#define FS_XFLAG_REALTIME 0x1
#define FS_XFLAG_EXTSIZE 0x800
#define FS_XFLAG_COWEXTSIZE 0x10000

// How far XFS allocates around what is written, and copies around what is
// shared, is part of what was promised: no such hints may come to be. (The
// first can be set while the file has no blocks; and so can it be moved to a
// device whose blocks are larger.)
static __noinline int sets_hint(struct inode *inode, u32 flags, u32 extents, u32 copies)
{
	if (!(flags & (FS_XFLAG_REALTIME | FS_XFLAG_EXTSIZE | FS_XFLAG_COWEXTSIZE)) && !extents &&
	    !copies)
		return 0;
	return refuse_pinned(inode, UNKNOWN);
}

static __noinline int ioctl_of(struct inode *inode, u32 command, u64 argument)
{
	u32 number = command & 0xffff;

	if (number == LOOP_SET_FD || number == LOOP_CHANGE_FD || number == LOOP_CONFIGURE) {

		u32 fd = argument;
		if ((inode->i_mode & S_IFMT) != S_IFBLK)
			return 0;
		if (number == LOOP_CONFIGURE &&
		    bpf_probe_read_user(&fd, sizeof(fd), (void *)argument))
			return 0;
		struct file *file = own_file(fd);
		// By a file that cannot be written to, a loop device is read-only.
		if (file && !(BPF_CORE_READ(file, f_mode) & FMODE_WRITE))
			return 0;
		struct inode *backing = BPF_CORE_READ(file, f_inode);
		struct question q = {};
		q.key.dev = BPF_CORE_READ(backing, i_sb, s_dev);
		q.key.ino = BPF_CORE_READ(backing, i_ino);
		if (!may_be_pinned(q.key.dev, q.key.ino))
			return 0;
		// A loop device discards, and writes, without asking.
		q.kind = UNKNOWN;
		q.at.end = END;
		return decide(&q);
	}
	u64 magic = inode->i_sb->s_magic;
	bool exchanges = magic == XFS_MAGIC ? number == XFS_SWAPEXT || number == XFS_SCRUB ||
						      number == XFS_SCRUBV
					    : magic == EXT4_MAGIC &&
						      (number == EXT4_MOVE_EXT ||
						       number == EXT4_SWAP_BOOT ||
						       number == EXT4_MIGRATE);
	if (exchanges) {
		u32 dev = inode->i_sb->s_dev;
		u64 *count = bpf_map_lookup_elem(&devices, &dev);
		if (!count || !*count)
			return 0;
		// Only a look, without XFS_SCRUB_IFLAG_REPAIR?
		u32 flags[2] = {};
		if (number == XFS_SCRUB &&
		    !bpf_probe_read_user(flags, sizeof(flags), (void *)argument) &&
		    !(flags[1] & 1))
			return 0;
		return refuse_exchange(inode, EXCHANGE);
	}
	// It writes its tree behind the end of the file, and frees what is there.
	if (number == ENABLE_VERITY && behind(inode))
		return refuse_pinned(inode, UNKNOWN);
	// Later kernels have a hook for what these set. Here it is in the program's
	// memory, where others may change it: so nothing may be set.
	if ((number == FSSETXATTR || number == SETFLAGS) &&
	    !bpf_core_type_exists(struct file_kattr) && behind(inode))
		return refuse_pinned(inode, UNKNOWN);
	return 0;
}

SEC("lsm/file_ioctl")
int BPF_PROG(file_ioctl, struct file *file, unsigned int command, unsigned long argument,
	     int before)
{
	return before ?: ioctl_of(file->f_inode, command, argument);
}

SEC("lsm/file_ioctl_compat")
int BPF_PROG(file_ioctl_compat, struct file *file, unsigned int command, unsigned long argument,
	     int before)
{
	return before ?: ioctl_of(file->f_inode, command, argument);
}

SEC("lsm/inode_file_setattr")
int BPF_PROG(inode_file_setattr, struct dentry *dentry, struct file_kattr *attr, int before)
{
	if (before)
		return before;
	struct inode *inode = dentry->d_inode;
	if (!inode || !behind(inode))
		return 0;
	// Whoever sets this on ext4 has it write data into the journal first.
	if (inode->i_sb->s_magic == EXT4_MAGIC)
		return attr->flags & EXT4_JOURNAL_DATA ? refuse_pinned(inode, UNKNOWN) : 0;
	if (inode->i_sb->s_magic != XFS_MAGIC)
		return 0;
	return sets_hint(inode, attr->fsx_xflags, attr->fsx_extsize, attr->fsx_cowextsize);
}

// One more struct file is a pin of the inode. Only the guard begins anew where
// all were gone.
static __noinline int join(struct key *key, int anew)
{
	struct key name = *key;
	u64 *lives_of = bpf_map_lookup_elem(&lives, &name);

	if (!lives_of && anew) {
		u64 dead = DEAD;
		bpf_map_update_elem(&lives, &name, &dead, BPF_NOEXIST);
		lives_of = bpf_map_lookup_elem(&lives, &name);
	}
	if (!lives_of)
		return 0;
	for (int try = 0; try < 64; try++) {
		u64 now = *(volatile u64 *)lives_of;
		u64 then = now + 1;
		if (now & DEAD) {
			if (!anew)
				return 0;
			then = 1;
		}
		if (__sync_val_compare_and_swap(lives_of, now, then) == now)
			return 1;
	}
	return 0;
}

static __always_inline void leave(struct key *key)
{
	u64 *lives_of = bpf_map_lookup_elem(&lives, key);

	if (!lives_of)
		return;
	// Somebody may join meanwhile: then it lives. The entry is left for the
	// guard to take away, who may have written one for the next pin already.
	if (__sync_fetch_and_add(lives_of, -1) == 1)
		__sync_val_compare_and_swap(lives_of, 0, DEAD);
}

// Whether one run of a list holds all of [start, end).
__noinline int covers(struct entry *e, u32 list, u64 start, u64 end)
{
	struct run run = {};

	if (!e || list >= LISTS || start >= end)
		return 0;
	return find(e, list, start, &run) > 0 && run.start <= start && run.end >= end;
}

// include/uapi/linux/capability.h, include/linux/proc_ns.h
#define CAP_LINUX_IMMUTABLE 9
#define PROC_USER_INIT_INO 0xEFFFFFFDU

static __always_inline bool may_pin(void)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	const struct cred *cred = BPF_CORE_READ(task, cred);
	u64 effective = 0;

	bpf_probe_read_kernel(&effective, sizeof(effective), &cred->cap_effective);
	return (effective & (1 << CAP_LINUX_IMMUTABLE)) &&
	       BPF_CORE_READ(cred, user_ns, ns.inum) == PROC_USER_INIT_INO;
}

// mmap(2) with MAP_DIRECT by a program that knows nothing of guards: it gets
// what somebody privileged has pinned already, and keeps it pinned.
static __noinline int map_direct(struct file *file, struct run *at, u32 prot, u32 flags)
{
	u32 type = flags & MAP_TYPE;

	if (!file || !at || (flags & (MAP_ANONYMOUS | MAP_HUGETLB)))
		return -EINVAL;
	if (type != MAP_SHARED && type != MAP_SHARED_VALIDATE)
		return -EINVAL;
	u64 start = at->start, end = at->end;
	if (start >= end)
		return -EINVAL;
	if (!(prot & PROT_WRITE) ||
	    (file->f_mode & (FMODE_READ | FMODE_WRITE)) != (FMODE_READ | FMODE_WRITE))
		return -EACCES;
	if (!may_pin())
		return -EACCES;
	struct inode *inode = file->f_inode;
	u64 magic = inode->i_sb->s_magic;
	if ((magic != XFS_MAGIC && magic != EXT4_MAGIC) || (inode->i_mode & S_IFMT) != S_IFREG)
		return -EOPNOTSUPP;
	struct key key;
	name(&key, inode);
	struct entry *e = bpf_map_lookup_elem(&entries, &key);
	if (!e)
		return -EOPNOTSUPP;
	u64 version = *(volatile u64 *)&e->version;
	if (!(inode->i_flags & S_DAX) && !(e->flags & CACHED))
		return -EOPNOTSUPP;
	// A store to a frozen block would have to raise SIGBUS: that takes a
	// library.
	if (!covers(e, PINNED, start, end) || meets(e, FROZEN, start, end) ||
	    meets(e, MAPPED, start, end))
		return -EOPNOTSUPP;
	struct entry *now = bpf_map_lookup_elem(&entries, &key);
	if (now != e || *(volatile u64 *)&now->version != version)
		return -ETXTBSY;
	// What the kernel itself would say, after this.
	if (type == MAP_SHARED_VALIDATE)
		return -EOPNOTSUPP;
	u64 pointer = (u64)file;
	struct holder holder = { .key = key, .start = start, .end = end };
	holder.pin = bpf_ktime_get_ns() | DEAD;
	if (bpf_map_lookup_elem(&holders, &pointer))
		return 0;
	if (!join(&key, 0))
		return -EOPNOTSUPP;
	if (bpf_map_update_elem(&holders, &pointer, &holder, BPF_NOEXIST)) {
		leave(&key);
		return -ETXTBSY;
	}
	// The guard must hear of it, or it would think too little pinned.
	struct event *event = bpf_ringbuf_reserve(&changes, sizeof(*event), 0);
	if (!event) {
		bpf_map_delete_elem(&holders, &pointer);
		leave(&key);
		return -ETXTBSY;
	}
	u32 dev = key.dev;
	u64 *count = bpf_map_lookup_elem(&devices, &dev);
	if (count)
		__sync_fetch_and_add(count, 1);
	u64 ids = bpf_get_current_pid_tgid();
	event->type = EVENT_RAW;
	event->kind = 0;
	event->tid = (u32)ids;
	event->tgid = ids >> 32;
	event->key = key;
	event->start = start;
	event->end = end;
	event->pin = holder.pin;
	event->file = pointer;
	bpf_get_current_comm(event->command, sizeof(event->command));
	bpf_ringbuf_submit(event, 0);
	return 0;
}

// What mmap(2) maps of a file. io_uring has no request for that.
static __noinline int mapped_by_call(struct file *file, struct run *at)
{
	if (!at || !file || call_without_rings() != MMAP || own_file(argument(4)) != file)
		return 0;
	at->start = argument(5) * (is_32_bit() ? PAGE : 1);
	at->end = plus(at->start, align_up(argument(1), PAGE));
	return 1;
}

static __always_inline int judge_mapping(struct file *file, u32 prot, u32 flags)
{
	u32 type = flags & MAP_TYPE;
	struct run at = {};

	if (flags & MAP_DIRECT) {
		mapped_by_call(file, &at);
		return map_direct(file, &at, prot, flags);
	}
	if (!file || (type != MAP_SHARED && type != MAP_SHARED_VALIDATE))
		return 0;
	if (!(prot & PROT_WRITE) || !(file->f_mode & FMODE_WRITE))
		return 0;
	struct inode *inode = file->f_inode;
	if (!behind(inode))
		return 0;
	struct question q = {};
	name(&q.key, inode);
	q.size = inode->i_size;
	q.kind = MAP_WRITE;
	q.at.end = END;
	if (mapped_by_call(file, &at))
		q.at = at;
	u64 pointer = (u64)file;
	q.foreign = !bpf_map_lookup_elem(&holders, &pointer);
	return decide(&q);
}

SEC("lsm/mmap_file")
int BPF_PROG(mmap_file, struct file *file, unsigned long asked, unsigned long prot,
	     unsigned long flags, int before)
{
	return before ?: judge_mapping(file, prot, flags);
}

// As security_mmap_file has it.
SEC("lsm/mmap_file")
int BPF_PROG(mmap_file_3, struct file *file, unsigned long prot, unsigned long flags, int before)
{
	return before ?: judge_mapping(file, prot, flags);
}

SEC("lsm/file_mprotect")
int BPF_PROG(file_mprotect, struct vm_area_struct *area, unsigned long asked, unsigned long prot,
	     int before)
{
	if (before)
		return before;
	struct file *file = area->vm_file;
	if (!file || !(prot & PROT_WRITE))
		return 0;
	unsigned long flags = area->vm_flags;
	if ((flags & (VM_SHARED | VM_MAYWRITE)) != (VM_SHARED | VM_MAYWRITE))
		return 0;
	struct inode *inode = file->f_inode;
	if (!behind(inode))
		return 0;
	struct question q = {};
	name(&q.key, inode);
	q.size = inode->i_size;
	q.kind = MAP_WRITE;
	q.at.start = area->vm_pgoff * PAGE;
	q.at.end = q.at.start + (area->vm_end - area->vm_start);
	u64 pointer = (u64)file;
	q.foreign = !bpf_map_lookup_elem(&holders, &pointer);
	return decide(&q);
}

// The last mapping of a pin is gone, or somebody else's file, mostly.
// A hook where hooks call programs: those are never left out.
SEC("lsm/file_free_security")
int BPF_PROG(file_free, struct file *file)
{
	// Its inode may be gone.
	u64 pointer = (u64)file;
	struct holder *holder = bpf_map_lookup_elem(&holders, &pointer);
	if (!holder)
		return 0;
	struct key key = holder->key;
	u64 pin = holder->pin;
	bpf_map_delete_elem(&holders, &pointer);
	bpf_map_delete_elem(&pins, &pin);
	leave(&key);
	u32 dev = key.dev;
	u64 *count = bpf_map_lookup_elem(&devices, &dev);
	if (count && *count)
		__sync_fetch_and_add(count, -1);
	struct event *event = bpf_ringbuf_reserve(&changes, sizeof(*event), 0);
	if (!event) {
		u32 untold = UNTOLD;
		count = bpf_map_lookup_elem(&refused, &untold);
		if (count)
			__sync_fetch_and_add(count, 1);
		return 0;
	}
	__builtin_memset(event, 0, sizeof(*event));
	event->type = EVENT_ENDED;
	event->key = key;
	event->pin = pin;
	bpf_ringbuf_submit(event, 0);
	return 0;
}

// fcntl(fd, F_GETFL, WHO_IS_IT) by the guard: what is this file to the kernel?
#define F_GETFL 3
#define F_SETFL 4
#define WHO_IS_IT 0x6d61706469726563ULL

// A write that has been judged takes its flags from the file afterwards: so
// where it matters where it goes, or how it is made, these do not change.
static __noinline int sets_flags(struct file *file, u64 value)
{
	u32 changed = (file->f_flags ^ (u32)value) & (O_APPEND | O_DIRECT);
	struct inode *inode = file->f_inode;

	if (!changed || !behind(inode))
		return 0;
	struct key key;
	name(&key, inode);
	struct entry *e = bpf_map_lookup_elem(&entries, &key);
	if (!e)
		return 0;
	u32 flags = *(volatile u32 *)&e->flags;
	if ((flags & WRITES_PASS) && (!(flags & WINDOWED) || !(changed & O_DIRECT)))
		return 0;
	return refuse_pinned(inode, UNKNOWN);
}

SEC("lsm/file_fcntl")
int BPF_PROG(file_fcntl, struct file *file, unsigned int command, unsigned long value,
	     int before)
{
	if (before)
		return before;
	if (command == F_SETFL)
		return sets_flags(file, value);
	if (command != F_GETFL || value != WHO_IS_IT)
		return 0;
	struct settings *s = the_settings();
	if (s && !s->guard_start && s->guard_tgid == bpf_get_current_pid_tgid() >> 32) {
		// Its number may be another process's one day.
		struct task_struct *task = (void *)bpf_get_current_task();
		s->guard_start = BPF_CORE_READ(task, group_leader, start_boottime);
	}
	if (!is_guard())
		return 0;
	struct inode *inode = file->f_inode;
	struct identity identity = {};
	u32 tid = current_tid();
	struct identity *asked = bpf_map_lookup_elem(&identities, &tid);
	if (asked) {
		identity.pin = asked->pin;
		identity.start = asked->start;
		identity.end = asked->end;
	}
	name(&identity.key, inode);
	identity.file = (u64)file;
	identity.generation = inode->i_generation;
	identity.dio = inode->i_dio_count.counter;
	identity.writers = inode->i_writecount.counter;
	identity.readers = inode->i_readcount.counter;
	if (s && s->preemption)
		bpf_probe_read_kernel(&identity.preemption, sizeof(identity.preemption),
				      (void *)s->preemption);
	struct file___counted *counted = (void *)file;
	struct file___referenced *referenced = (void *)file;
	if (bpf_core_field_exists(counted->f_count))
		identity.references = BPF_CORE_READ(counted, f_count.counter);
	else if (bpf_core_field_exists(referenced->f_ref))
		// One reference is none (FILE_REF_ONEREF, include/linux/file_ref.h).
		identity.references = BPF_CORE_READ(referenced, f_ref.refcnt.counter) + 1;
	else
		identity.references = 1LL << 62;
	if (identity.pin) {
		struct holder holder = {
			.key = identity.key,
			.pin = identity.pin,
			.start = identity.start,
			.end = identity.end,
		};
		u64 pointer = identity.file;
		struct key key = identity.key;
		if (!bpf_map_update_elem(&holders, &pointer, &holder, BPF_NOEXIST)) {
			if (join(&key, 1))
				identity.held = 1;
			else
				bpf_map_delete_elem(&holders, &pointer);
		}
	}
	bpf_map_update_elem(&identities, &tid, &identity, BPF_ANY);
	return 0;
}

// ---- who has a file open ----

struct seq_file;

struct bpf_iter_meta {
	struct seq_file *seq;
} CORE;

struct bpf_iter__task_file {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
	u32 fd;
	struct file *file;
} CORE;

struct bpf_iter__task_vma {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
	struct vm_area_struct *vma;
} CORE;

// The inode that a thread of the guard looks for descriptions of. Lists are
// made in the thread that reads them, so one that has to wait for a process
// waits alone.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, u32);
	__type(value, struct key);
} sought SEC(".maps");

// Tells the guard of a description that can write to it.
static __always_inline int list(struct seq_file *seq, struct file *file)
{
	u32 tid = current_tid();
	struct key *key = bpf_map_lookup_elem(&sought, &tid);

	if (!key || !file || !(file->f_mode & FMODE_WRITE))
		return 0;
	struct inode *inode = file->f_inode;
	if (inode->i_ino != key->ino || inode->i_sb->s_dev != key->dev)
		return 0;
	u64 pointer = (u64)file;
	bpf_seq_write(seq, &pointer, sizeof(pointer));
	return 0;
}

SEC("iter/task_file")
int writers_by_descriptor(struct bpf_iter__task_file *ctx)
{
	return ctx->file ? list(ctx->meta->seq, ctx->file) : 0;
}

SEC("iter/task_vma")
int writers_by_mapping(struct bpf_iter__task_vma *ctx)
{
	struct vm_area_struct *area = ctx->vma;

	return area && area->vm_file ? list(ctx->meta->seq, area->vm_file) : 0;
}

// What the gate would say: for tests.
SEC("syscall")
int ask(struct question *q)
{
	struct question copy = *q;

	q->answer = verdict(&copy);
	return 0;
}
