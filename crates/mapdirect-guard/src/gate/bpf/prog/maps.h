// SPDX-License-Identifier: (MIT OR Apache-2.0) OR GPL-2.0
//
// The maps, and what is asked of them everywhere.

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct settings);
} settings SEC(".maps");

// Inodes whose entry is WRITES_PASS: what most writes to a pinned file need,
// without a look-up in a hash map.
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
	// Grows when a pin is taken up again, or one ends of which the guard is
	// not told.
	u64 stirred;
	// Grows with everything that may change the blocks of any file.
	u64 upheavals;
} filter SEC(".bss.filter");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 20);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct key);
	__type(value, struct entry);
} entries SEC(".maps");

// Who may open what is DENIES_WRITE.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 20);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct key);
	__type(value, struct root);
} roots SEC(".maps");

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

// How many struct files are pins of an inode. At its end the inode is DEAD:
// then its entry counts for nothing, and nobody else can join, until the guard
// pins it again, or mmap(2) takes it up (dormant.h). That makes it WAKING
// first: its entry counts, and nobody can join.

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 20);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct key);
	__type(value, struct life);
} lives SEC(".maps");

// How many pins there are on a filesystem. Only programs change it.
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

// What is kept of each pin.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 22);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, u64);
	__type(value, struct pin_facts);
} pins SEC(".maps");

// How many refusals there were, by kind, whether or not anybody listened; and
// how many ends of pins could not be told.
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
	return ((ino ^ ((u64)dev << 40)) * FILTER_MULTIPLIER) >> (64 - FILTER_BITS);
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
