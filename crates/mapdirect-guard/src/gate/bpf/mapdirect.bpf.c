// SPDX-License-Identifier: (MIT OR Apache-2.0) OR GPL-2.0
//
// The bpf gate, kernel side.
//
// An operation comes by in two steps: a function that knows its range (fentry)
// leaves a note about it, and the permission hook that follows in the same
// thread takes that note and judges. A hook that finds no note about a file
// behind the gate refuses: what is not understood must do.
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

struct file {
	struct inode *f_inode;
	unsigned int f_flags;
	unsigned int f_mode;
	s64 f_pos;
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

struct io_rw {
	struct kiocb kiocb;
	u32 flags;
} CORE;

struct io_kiocb;

struct iocb {
	s64 aio_offset;
	u32 aio_rw_flags;
} CORE;

struct file_dedupe_range {
	u64 src_offset;
	u64 src_length;
} CORE;

struct file_kattr {
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

struct task_struct {
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
	unsigned long r10;
	unsigned long r9;
	unsigned long r8;
	unsigned long ax;
	unsigned long dx;
	unsigned long si;
	unsigned long di;
	unsigned long orig_ax;
} CORE;

struct mnt_idmap;
struct iov_iter;

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
#define ATTR_SIZE (1 << 3)
#define O_APPEND 02000
#define O_DIRECT 040000
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

struct settings {
	struct rule rules[KINDS];
	u64 guard_start;	// start_boottime of the guard
	u32 guard_tgid;
	u32 pad;
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
enum list { PINNED, FROZEN, BESIDE, SHARED, WINDOW, STORES, HELD, MAPPED, AHEAD, EDGES, COARSE, LISTS };

#define INLINE 8

#define REFLINK 1	// its filesystem shares blocks
#define HAS_FROZEN 2	// or blocks beside it that take frozen ones along
#define CACHED 4	// raw mappings through the page cache are accepted
#define FAILING_FREES 8	// a growing write that fails frees blocks of a pin

struct entry {
	u64 version;
	u32 flags;
	u32 spilled;	// runs are in the map `spill[version]`
	u64 size_floor;
	u64 fixed_size;
	u64 tail_size;
	u32 block;
	u32 first[LISTS + 1];
	u32 pad;
	struct run runs[INLINE];
};

struct question {
	struct key key;
	u32 kind;
	u8 read_side;
	u8 direct;
	u8 foreign;	// a mapping of a file that is no pin's
	u8 has_or;
	u8 stored_to;	// there are mappings to store to the file by
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
	u32 direct;
};

// What a thread is about to do.
struct record {
	struct note read;
	struct note write;
	struct note rough;	// the same as `write`, but only that it is not more
	u64 copy_in;
	u64 copy_out;
	u64 flags_file;
	u32 rwf;
	u32 remaps;	// an ioctl has begun that may share blocks
	u32 copies;	// a copy_file_range has been noticed
	u32 pad;
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
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct settings);
} settings SEC(".maps");

#define FILTER_BITS 18

// Which inodes are worth a look: not zero where some pinned one may be.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1 << FILTER_BITS);
	__type(key, u32);
	__type(value, u64);
} filter SEC(".maps");

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

// Blocks near a pin may have come to be shared since it was looked at.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 20);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct key);
	__type(value, u64);
} shared_since SEC(".maps");

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

// Those of threads that there was no memory for, or that were preempted in the
// middle of this (bpf_task_storage_trylock, kernel/bpf/bpf_task_storage.c);
// and whether there ever were any.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, u32);
	__type(value, struct record);
} spare_records SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u64);
} spared SEC(".maps");

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
	u64 *there = bpf_map_lookup_elem(&filter, &slot);

	return there && *there;
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

static __noinline struct record *spare_record(bool make)
{
	u32 zero = 0;
	u64 *ever = bpf_map_lookup_elem(&spared, &zero);

	if (!ever || (!make && !*ever))
		return 0;
	u32 tid = current_tid();
	struct record *record = bpf_map_lookup_elem(&spare_records, &tid);
	if (!record && make) {
		struct record none = {};
		*ever = 1;
		bpf_map_update_elem(&spare_records, &tid, &none, BPF_NOEXIST);
		record = bpf_map_lookup_elem(&spare_records, &tid);
	}
	return record;
}

static __always_inline struct record *my_record(bool make)
{
	struct record *record =
		bpf_task_storage_get(&records, bpf_get_current_task_btf(), 0,
				     make ? BPF_LOCAL_STORAGE_GET_F_CREATE : 0);
	return record ?: spare_record(make);
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
static __noinline int refuses_range(struct entry *e, struct rule *rule, u32 kind, struct run *at,
				    u64 size)
{
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
static __noinline int minds_range(struct entry *e, bool shared, struct run *at)
{
	u64 block = e->block;
	u64 start = at->start, end = at->end;

	if (!block || (block & (block - 1)))
		return 1;
	u64 from = align_down(start, block), to = align_up(end, block);
	if (meets(e, BESIDE, from, to))
		return 1;
	return shared && meets(e, WINDOW, from, to);
}

static __noinline int lets_go(struct entry *e, u32 how, u64 start, u64 end)
{
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
	if (q->at.end > q->size || q->at.end > e->tail_size || !is_empty(e, FROZEN) ||
	    !is_empty(e, BESIDE) || !is_empty(e, HELD) || !is_empty(e, AHEAD))
		return false;
	return is_empty(e, WINDOW) ||
	       !meets(e, WINDOW, align_down(q->at.start, LARGEST_BLOCK),
		      align_up(q->at.end, LARGEST_BLOCK));
}

// Layers::dirties_folios.
static __noinline int dirties_folios(struct entry *e, u32 kind, struct run *at)
{
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
static __noinline int judge(struct entry *e, struct question *q)
{
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
	struct key key = q->key;
	// Wherever it begins, it could be grown over frozen blocks by mremap(2),
	// which no hook sees, and over what has come to be shared beside a pin.
	if (kind == MAP_WRITE && q->foreign &&
	    ((e->flags & HAS_FROZEN) ||
	     (!is_empty(e, WINDOW) && bpf_map_lookup_elem(&shared_since, &key))))
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
	bool nears = false;
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
		// Whoever has it mapped may store to what comes to be shared, and
		// is not judged then.
		nears = meets(e, WINDOW, from, to);
		if (meets(e, STORES, from, to) || (q->stored_to && nears))
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
	bool shared = !is_empty(e, WINDOW) &&
		      (kind == WRITE_UNTORN || bpf_map_lookup_elem(&shared_since, &key));
	if (rule->touches && minds_range(e, shared, &q->at))
		return 1;
	if (rule->touches && q->has_or && minds_range(e, shared, &q->or_at))
		return 1;
	u64 block = e->block;
	if (!block || (block & (block - 1)))
		return 1;
	struct run tail = { align_down(size, block), size };
	bool zeroes_tail = rule->grows && largest > size && (size & (block - 1));
	if (zeroes_tail && minds_range(e, shared, &tail))
		return 1;
	if (!is_empty(e, COARSE) && rule->touches && !q->read_side) {
		if (dirties_folios(e, kind, &q->at) ||
		    (q->has_or && dirties_folios(e, kind, &q->or_at)))
			return 1;
	}
	if (zeroes_tail && meets(e, COARSE, tail.start, tail.end))
		return 1;
	// Far away nothing comes to be shared beside a pin.
	if (nears) {
		u64 one = 1;
		bpf_map_update_elem(&shared_since, &key, &one, BPF_ANY);
	}
	return 0;
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

static __always_inline int decide(struct question *q)
{
	if (!verdict(q) || is_guard())
		return 0;
	// The entry may be one that the guard has written for pins that were
	// gone by then.
	struct key key = q->key;
	u64 *lives_of = bpf_map_lookup_elem(&lives, &key);
	if (!lives_of || (*lives_of & DEAD))
		return 0;
	tell(q);
	return -ETXTBSY;
}

// ---- notes ----

static __always_inline void note_write(struct file *file, u32 kind, u64 start, u64 end)
{
	struct record *record = my_record(true);

	if (!record)
		return;
	record->write.file = (u64)file;
	record->write.kind = kind;
	record->write.start = start;
	record->write.end = end;
	record->write.direct = !!(file->f_flags & O_DIRECT);
}

static __always_inline void note_read(struct file *file, u32 kind, u64 start, u64 end)
{
	struct record *record = my_record(true);

	if (!record)
		return;
	record->read.file = (u64)file;
	record->read.kind = kind;
	record->read.start = start;
	record->read.end = end;
}

// Whether a write goes to the end of the file, wherever it says. Others append,
// too: where that will be is not known.
static __always_inline bool appends(u32 file_flags, u32 rwf)
{
	return (rwf & RWF_APPEND) || ((file_flags & O_APPEND) && !(rwf & RWF_NOAPPEND));
}

SEC("fentry/rw_verify_area")
int BPF_PROG(note_rw, int write, struct file *file, const s64 *ppos, u64 count)
{
	struct inode *inode = file->f_inode;

	if (!behind(inode))
		return 0;
	struct record *record = my_record(write);
	if (!record)
		return 0;
	s64 at = 0;
	if (ppos)
		bpf_probe_read_kernel(&at, sizeof(at), ppos);
	if (at < 0 && write) {
		// io_uring's "where the file stands" never gets here; what does
		// is refused by rw_verify_area itself.
		record->write.file = 0;
		return 0;
	}
	u64 start = at, end = plus(start, count);
	if (!write) {
		// What is noted may be of an operation that failed before anybody
		// asked.
		record->read.file = 0;
		record->remaps = 0;
		if (record->copy_in == (u64)file)
			note_read(file, COPY_RANGE, start, end);
		return 0;
	}
	u32 kind = record->copy_out == (u64)file ? COPY_RANGE : WRITE;
	u32 rwf = record->flags_file == (u64)file ? record->rwf : 0;
	record->flags_file = 0;
	if (rwf & RWF_ATOMIC)
		kind = WRITE_UNTORN;
	if (appends(file->f_flags, rwf)) {
		start = inode->i_size;
		end = END;
	}
	record->write.file = (u64)file;
	record->write.kind = kind;
	record->write.start = start;
	record->write.end = end;
	record->write.direct = !!(file->f_flags & O_DIRECT);
	return 0;
}

// include/linux/fs.h
#define MAX_RW_COUNT 0x7ffff000ULL

// How a write is made, and roughly where: rw_verify_area knows that to the
// byte, but a program of ours is left out where the same one was preempted
// (bpf_prog_get_recursion_context, include/linux/bpf.h, in
// __bpf_prog_enter_recur). Hooks never are.
static __always_inline void note_flags(struct file *file, s64 at, u32 rwf)
{
	struct record *record = my_record(true);

	if (!record)
		return;
	record->flags_file = (u64)file;
	record->rwf = rwf;
	record->rough.file = at < 0 ? 0 : (u64)file;
	record->rough.start = at;
	record->rough.end = plus(at, MAX_RW_COUNT);
}

static __always_inline s64 position(const s64 *ppos)
{
	s64 at = -1;

	if (ppos)
		bpf_probe_read_kernel(&at, sizeof(at), ppos);
	return at;
}

SEC("fentry/vfs_writev")
int BPF_PROG(note_writev, struct file *file, const void *vec, unsigned long count, s64 *pos,
	     u32 flags)
{
	if (behind(file->f_inode))
		note_flags(file, position(pos), flags);
	return 0;
}

SEC("fentry/vfs_iter_write")
int BPF_PROG(note_iter_write, struct file *file, struct iov_iter *iter, s64 *ppos, u32 flags)
{
	if (behind(file->f_inode))
		note_flags(file, position(ppos), flags);
	return 0;
}

SEC("fentry/vfs_iocb_iter_write")
int BPF_PROG(note_iocb_write, struct file *file, struct kiocb *iocb, struct iov_iter *iter)
{
	if (!behind(file->f_inode))
		return 0;
	// Here these decide, and not how the file was opened.
	u32 flags = iocb->ki_flags & (RWF_APPEND | RWF_ATOMIC);
	note_flags(file, iocb->ki_pos, flags & RWF_APPEND ? flags : flags | RWF_NOAPPEND);
	return 0;
}

SEC("fentry/aio_write")
int BPF_PROG(note_aio_write, struct kiocb *request, const struct iocb *iocb, bool vectored,
	     bool compat)
{
	struct file *file = request->ki_filp;

	if (file && behind(file->f_inode))
		note_flags(file, BPF_CORE_READ(iocb, aio_offset), BPF_CORE_READ(iocb, aio_rw_flags));
	return 0;
}

SEC("fentry/io_write")
int BPF_PROG(note_io_write, struct io_kiocb *request, unsigned int issue_flags)
{
	// The command of a request lies at its beginning (io_kiocb_to_cmd).
	struct io_rw *rw = (void *)request;
	struct file *file = BPF_CORE_READ(rw, kiocb.ki_filp);

	if (!file)
		return 0;
	struct inode *inode = BPF_CORE_READ(file, f_inode);
	if (may_be_pinned(BPF_CORE_READ(inode, i_sb, s_dev), BPF_CORE_READ(inode, i_ino)))
		note_flags(file, BPF_CORE_READ(rw, kiocb.ki_pos), BPF_CORE_READ(rw, flags));
	return 0;
}

// How one write is made says nothing of the next one: those functions may
// return before they come to rw_verify_area.
static __always_inline int forget_flags(void)
{
	struct record *record = my_record(false);

	if (record)
		record->flags_file = record->rough.file = 0;
	return 0;
}

#define FORGETS(name, function)                                                                    \
	SEC("fexit/" #function)                                                                    \
	int BPF_PROG(name)                                                                         \
	{                                                                                          \
		return forget_flags();                                                             \
	}

FORGETS(end_writev, vfs_writev)
FORGETS(end_iter_write, vfs_iter_write)
FORGETS(end_iocb_write, vfs_iocb_iter_write)
FORGETS(end_aio_write, aio_write)
FORGETS(end_io_write, io_write)

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

SEC("fentry/vfs_fallocate")
int BPF_PROG(note_fallocate, struct file *file, int mode, s64 offset, s64 length)
{
	if (behind(file->f_inode) && offset >= 0 && length > 0)
		note_write(file, fallocate_kind(mode), offset, plus(offset, length));
	return 0;
}

static __always_inline u64 remap_end(s64 at, s64 length)
{
	// Nothing means everything.
	return length > 0 ? plus(at, length) : END;
}

SEC("fentry/remap_verify_area")
int BPF_PROG(note_remap, struct file *file, s64 at, s64 length, bool write)
{
	if (!behind(file->f_inode) || at < 0)
		return 0;
	if (write)
		note_write(file, CLONE, at, remap_end(at, length));
	else
		note_read(file, CLONE, at, remap_end(at, length));
	return 0;
}

// Until 6.1 remap_verify_area is part of its callers.
SEC("fentry/do_clone_file_range")
int BPF_PROG(note_clone, struct file *in, s64 at_in, struct file *out, s64 at_out, s64 length,
	     u32 flags)
{
	if (behind(in->f_inode))
		note_read(in, CLONE, at_in, remap_end(at_in, length));
	if (behind(out->f_inode))
		note_write(out, CLONE, at_out, remap_end(at_out, length));
	return 0;
}

SEC("fentry/vfs_dedupe_file_range")
int BPF_PROG(note_dedupe, struct file *file, struct file_dedupe_range *same)
{
	if (!behind(file->f_inode))
		return 0;
	u64 at = BPF_CORE_READ(same, src_offset);
	note_read(file, DEDUPE, at, plus(at, BPF_CORE_READ(same, src_length)));
	return 0;
}

SEC("fentry/vfs_dedupe_file_range_one")
int BPF_PROG(note_dedupe_one, struct file *source, s64 from, struct file *file, s64 at, s64 length,
	     u32 flags)
{
	if (behind(source->f_inode))
		note_read(source, DEDUPE, from, remap_end(from, length));
	if (behind(file->f_inode))
		note_write(file, DEDUPE, at, remap_end(at, length));
	return 0;
}

SEC("fentry/vfs_copy_file_range")
int BPF_PROG(note_copy, struct file *in, s64 at_in, struct file *out, s64 at_out, u64 length,
	     u32 flags)
{
	if (!behind(in->f_inode) && !behind(out->f_inode))
		return 0;
	struct record *record = my_record(true);
	if (!record)
		return 0;
	record->copies = 1;
	// Blocks are shared within a filesystem only.
	if (in->f_inode->i_sb != out->f_inode->i_sb)
		return 0;
	record->copy_in = (u64)in;
	record->copy_out = (u64)out;
	return 0;
}

SEC("fexit/vfs_copy_file_range")
int BPF_PROG(copied, struct file *in, s64 at_in, struct file *out, s64 at_out, u64 length,
	     u32 flags)
{
	struct record *record = my_record(false);

	if (record)
		record->copy_in = record->copy_out = record->copies = 0;
	return 0;
}

SEC("fentry/vm_mmap_pgoff")
int BPF_PROG(note_mmap, struct file *file, unsigned long address, unsigned long length,
	     unsigned long prot, unsigned long flags, unsigned long page)
{
	u32 type = flags & MAP_TYPE;

	if (!file || (type != MAP_SHARED && type != MAP_SHARED_VALIDATE))
		return 0;
	if (!(flags & MAP_DIRECT) && !behind(file->f_inode))
		return 0;
	u64 start = page * PAGE;
	note_write(file, MAP_WRITE, start, plus(start, align_up(length, PAGE)));
	return 0;
}

// ---- hooks ----

// include/linux/sched.h: of processes without system calls of their own.
#define PF_IO_WORKER 0x10
#define PF_USER_WORKER 0x4000
#define PF_KTHREAD 0x200000
#define ENOSYS 38
// arch/x86/entry/syscalls/syscall_64.tbl
#define X86_64_WRITE 1
#define X86_64_MMAP 9
#define X86_64_PWRITE64 18
#define X86_64_COPY_FILE_RANGE 326
// arch/x86/entry/syscalls/syscall_32.tbl
#define I386_COPY_FILE_RANGE 377

// The number of the system call that the thread is in the middle of: it has
// not been answered yet, or the kernel would be doing what is left to do
// afterwards.
static __always_inline u64 number_of_syscall(struct pt_regs___x86 *regs)
{
	struct task_struct *task = (void *)bpf_get_current_task_btf();

	if (!bpf_core_field_exists(regs->orig_ax) ||
	    (task->flags & (PF_KTHREAD | PF_IO_WORKER | PF_USER_WORKER)) ||
	    regs->ax != (u64)-ENOSYS)
		return END;
	return regs->orig_ax;
}

static __always_inline struct pt_regs___x86 *own_registers(void)
{
	return (void *)bpf_task_pt_regs((void *)bpf_get_current_task_btf());
}

static __always_inline struct file *own_file(u32 fd)
{
	struct task_struct *task = (void *)bpf_get_current_task_btf();
	struct fdtable *table = BPF_CORE_READ(task, files, fdt);
	struct file *file = 0;

	if (fd >= BPF_CORE_READ(table, max_fds))
		return 0;
	struct file **slot = BPF_CORE_READ(table, fd) + fd;
	bpf_probe_read_kernel(&file, sizeof(file), slot);
	return file;
}

// Whether it is a copy_file_range(2), though nobody noticed it.
static __noinline int copies_by_syscall(void)
{
	u64 number = number_of_syscall(own_registers());

	return number == X86_64_COPY_FILE_RANGE || number == I386_COPY_FILE_RANGE;
}

// Where the write(2) or pwrite(2) goes that the thread is in the middle of, if
// that is of this file: nobody but its registers knows, where rw_verify_area
// was not noticed.
static __noinline int write_of_syscall(struct file *file, struct run *at)
{
	struct pt_regs___x86 *regs = own_registers();
	u64 number = number_of_syscall(regs);

	if (!at || (number != X86_64_WRITE && number != X86_64_PWRITE64))
		return 0;
	if (own_file(regs->di) != file)
		return 0;
	s64 start = number == X86_64_WRITE ? BPF_CORE_READ(file, f_pos) :
					     (s64)regs->r10;
	if (start < 0)
		return 0;
	at->start = start;
	at->end = plus(start, regs->dx);
	return 1;
}

// A write that rw_verify_area was not noticed of.
static __noinline int rough_write(struct file *file, struct record *record, struct question *q)
{
	u32 flags = BPF_CORE_READ(file, f_flags), rwf = 0;
	struct run at = {};

	q->direct = !!(flags & O_DIRECT);
	if (record && record->rough.file == (u64)file && record->flags_file == (u64)file) {
		rwf = record->rwf;
		at.start = record->rough.start;
		at.end = record->rough.end;
		record->flags_file = record->rough.file = 0;
	} else if (!write_of_syscall(file, &at)) {
		return 0;
	}
	if (appends(flags, rwf)) {
		at.start = q->size;
		at.end = END;
	}
	q->kind = rwf & RWF_ATOMIC ? WRITE_UNTORN : WRITE;
	q->at = at;
	return 0;
}

SEC("lsm/file_permission")
int BPF_PROG(file_permission, struct file *file, int mask, int before)
{
	if (before)
		return before;
	struct inode *inode = file->f_inode;
	if (!behind(inode))
		return 0;
	struct record *record = my_record(false);
	struct question q = {};
	name(&q.key, inode);
	q.size = inode->i_size;
	q.stored_to = inode->i_mapping->i_mmap_writable.counter > 0;
	if (mask & MAY_WRITE) {
		q.kind = UNKNOWN;
		q.at.end = END;
		if (record && record->write.file == (u64)file) {
			q.kind = record->write.kind;
			q.at.start = record->write.start;
			q.at.end = record->write.end;
			q.direct = record->write.direct;
			record->write.file = 0;
			if (q.kind == WRITE && !record->copies && copies_by_syscall())
				q.kind = COPY_RANGE;
		} else {
			rough_write(file, record, &q);
		}
		return decide(&q);
	}
	if (!record || record->read.file != (u64)file) {
		// What is not noted of a read may be one all the same.
		bool remaps = record && record->remaps;
		if (!remaps && ((record && record->copies) || !copies_by_syscall()))
			return 0;
		q.kind = remaps ? CLONE : COPY_RANGE;
		q.at.end = END;
		q.read_side = 1;
		return decide(&q);
	}
	q.kind = record->read.kind;
	q.at.start = record->read.start;
	q.at.end = record->read.end;
	q.read_side = 1;
	record->read.file = 0;
	return decide(&q);
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
#define FICLONE 0x9409
#define FICLONERANGE 0x940d
#define FIDEDUPERANGE 0x9436
#define XFS_SWAPEXT 0x586d
#define XFS_SCRUB 0x583c
#define XFS_SCRUBV 0x5840
#define FSSETXATTR 0x5820
#define ENABLE_VERITY 0x6685
#define EXT4_MIGRATE 0x6609
#define EXT4_MOVE_EXT 0x660f
#define EXT4_SWAP_BOOT 0x6611
#define LOOP_SET_FD 0x4c00
#define LOOP_CHANGE_FD 0x4c06
#define LOOP_CONFIGURE 0x4c0a
#define FS_XFLAG_REALTIME 0x1
#define FS_XFLAG_EXTSIZE 0x800
#define FS_XFLAG_COWEXTSIZE 0x10000

static __noinline int refuse_if_pinned(struct inode *inode)
{
	struct key key;

	name(&key, inode);
	return bpf_map_lookup_elem(&entries, &key) ? refuse_exchange(inode, UNKNOWN) : 0;
}

// How far XFS allocates around what is written, and copies around what is
// shared, is part of what was promised: no such hints may come to be. (The
// first can be set while the file has no blocks; and so can it be moved to a
// device whose blocks are larger.)
static __noinline int sets_hint(struct inode *inode, u32 flags, u32 extents, u32 copies)
{
	if (!(flags & (FS_XFLAG_REALTIME | FS_XFLAG_EXTSIZE | FS_XFLAG_COWEXTSIZE)) && !extents &&
	    !copies)
		return 0;
	return refuse_if_pinned(inode);
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
	if (number == FICLONE || number == FICLONERANGE || number == FIDEDUPERANGE) {
		struct record *record = my_record(true);
		if (record)
			record->remaps = 1;
		return 0;
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
		return refuse_if_pinned(inode);
	if (number == FSSETXATTR && magic == XFS_MAGIC && behind(inode)) {
		// fsx_xflags, fsx_extsize and fsx_cowextsize of struct fsxattr.
		u32 fields[5] = {};
		// What is not in memory cannot be read here: refuse it then.
		if (bpf_probe_read_user(fields, sizeof(fields), (void *)argument))
			fields[1] = 1;
		return sets_hint(inode, fields[0], fields[1], fields[4]);
	}
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
	if (!inode || !behind(inode) || inode->i_sb->s_magic != XFS_MAGIC)
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
static __noinline int map_direct(struct file *file, struct note *note, u32 prot, u32 flags)
{
	u32 type = flags & MAP_TYPE;

	if (!file || (flags & (MAP_ANONYMOUS | MAP_HUGETLB)))
		return -EINVAL;
	if (type != MAP_SHARED && type != MAP_SHARED_VALIDATE)
		return -EINVAL;
	u64 start = note->start, end = note->end;
	if (note->file != (u64)file || note->kind != MAP_WRITE || start >= end)
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

// What mmap(2) maps of a file, if nobody noticed it.
static __noinline int mapping_of_syscall(struct file *file, struct note *note)
{
	struct pt_regs___x86 *regs = own_registers();

	if (!note || !file || number_of_syscall(regs) != X86_64_MMAP)
		return 0;
	if (own_file(regs->r8) != file)
		return 0;
	note->file = (u64)file;
	note->kind = MAP_WRITE;
	note->start = regs->r9;
	note->end = plus(note->start, align_up(regs->si, PAGE));
	return 1;
}

static __always_inline int judge_mapping(struct file *file, u32 prot, u32 flags)
{
	u32 type = flags & MAP_TYPE;

	if (flags & MAP_DIRECT) {
		struct record *mine = my_record(false);
		struct note none = {};
		if (mine) {
			none = mine->write;
			mine->write.file = 0;
		}
		if (none.file != (u64)file || none.kind != MAP_WRITE)
			mapping_of_syscall(file, &none);
		return map_direct(file, &none, prot, flags);
	}

	if (!file || (type != MAP_SHARED && type != MAP_SHARED_VALIDATE))
		return 0;
	struct inode *inode = file->f_inode;
	if (!behind(inode))
		return 0;
	struct question q = {};
	name(&q.key, inode);
	q.size = inode->i_size;
	q.kind = MAP_WRITE;
	q.at.end = END;
	struct record *record = my_record(false);
	struct note rough = {};
	if (record && record->write.file == (u64)file && record->write.kind == MAP_WRITE) {
		q.at.start = record->write.start;
		q.at.end = record->write.end;
		record->write.file = 0;
	} else if (mapping_of_syscall(file, &rough)) {
		q.at.start = rough.start;
		q.at.end = rough.end;
	}
	if (!(prot & PROT_WRITE) || !(file->f_mode & FMODE_WRITE))
		return 0;
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
#define WHO_IS_IT 0x6d61706469726563ULL

SEC("lsm/file_fcntl")
int BPF_PROG(file_fcntl, struct file *file, unsigned int command, unsigned long argument,
	     int before)
{
	if (before || command != F_GETFL || argument != WHO_IS_IT)
		return before;
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

// What the gate would say: for tests.
SEC("syscall")
int ask(struct question *q)
{
	struct question copy = *q;

	q->answer = verdict(&copy);
	return 0;
}
