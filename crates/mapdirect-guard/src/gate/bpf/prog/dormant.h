// SPDX-License-Identifier: (MIT OR Apache-2.0) OR GPL-2.0
//
// Taking up again what was pinned, by mmap(2) alone.
//
// When the last pin of an inode ends its entry stays, and counts for nothing:
// it is dormant. If nothing has happened since that the entry would have
// refused, all that was proven for the grant is still true, and the pin may go
// on as if it had never ended.
//
// Whoever passes where the entry says no (`is_refused`) notes that first, in
// `disturbed`, and then looks once more whether the pin lives. Whoever takes it
// up makes it live first, and then looks whether anything was noted. All four
// are ordered by atomic operations, so that one of them sees the other:
//
//	passes:   disturbed += 1;           lives is DEAD?    else it is refused
//	takes up: lives: DEAD -> WAKING;    disturbed == stamp?  else DEAD again
//
// Whoever takes it up looks before that as well. It proves nothing, but keeps
// those out who could not take it up: as long as an inode is WAKING, others wait.
//
// `stamp` is the sum of the notes when the pin was granted, and stays what it
// was, however often it is taken up: a note that comes between two lives of the
// pin is seen by every later one. Were it read anew with each life, somebody who
// found the pin dead before that life, made his note during it, and looked once
// more after it would pass without a trace. Such a one cannot reach over a grant:
// that waits for whoever is in the middle of an operation.
//
// WAKING is a state of its own: as long as it is not sure that the pin lives,
// nobody may join it. The guard, before it takes anything of a dormant inode
// away, makes a note like anybody who passes, and waits until nobody is WAKING.
//
// What is noted of no inode in particular (an exchange whose other side is not
// known) is counted in `upheavals`; there `devices` stands for `lives`.
//
// The inode is the same if it was in memory all the while: `inode_free` makes a
// note when it leaves. ext4 gives its number free a moment before that, so its
// generation, which the filesystem draws by lot, must be the same as well.

static __always_inline u64 stamp_of(struct life *life)
{
	return *(volatile u64 *)&life->disturbed + *(volatile u64 *)&filter.upheavals;
}

// Whether one run of a list holds all of [start, end).
__noinline int covers(struct entry *e, u32 list, u64 start, u64 end)
{
	struct run run = {};

	if (!e || list >= LISTS || start >= end)
		return 0;
	return find(e, list, start, &run) > 0 && run.start <= start && run.end >= end;
}

// What is kept of the pin that ended last, if nothing has been noted of its
// inode since it was granted, and if it holds this range.
static __always_inline struct pin_facts *undisturbed(struct life *life, struct key *name,
						     u32 generation, struct run *at)
{
	u64 pin = *(volatile u64 *)&life->last;
	struct pin_facts *facts = bpf_map_lookup_elem(&pins, &pin);

	if (!facts || facts->stamp != stamp_of(life) || facts->generation != generation)
		return 0;
	// The element may have been another inode's when it was found.
	if (facts->key.ino != name->ino || facts->key.dev != name->dev)
		return 0;
	return at->start >= facts->start && at->end <= facts->end ? facts : 0;
}

static __noinline int take_up(struct file *file, struct key *key, struct run *at)
{
	if (!file || !key || !at)
		return -EOPNOTSUPP;
	struct key name = *key;
	struct settings *s = the_settings();
	struct life *life = bpf_map_lookup_elem(&lives, &name);
	if (!life || !s || !s->revives)
		return -EOPNOTSUPP;
	if (*(volatile u64 *)&life->lives != DEAD)
		return -ETXTBSY;
	// Read before the inode is WAKING: whoever sets it makes a note first, so
	// one that was set before this is noted, and one set later is not seen.
	u32 generation = file->f_inode->i_generation;
	// Who comes for nothing goes again without a trace: others would have to
	// wait for it.
	if (!undisturbed(life, &name, generation, at))
		return -EOPNOTSUPP;
	if (__sync_val_compare_and_swap(&life->lives, DEAD, WAKING) != DEAD)
		return -ETXTBSY;
	if (!count_pin(name.dev)) {
		__sync_val_compare_and_swap(&life->lives, WAKING, DEAD);
		return -EOPNOTSUPP;
	}
	struct pin_facts *facts = undisturbed(life, &name, generation, at);
	// From here on nobody takes the entry away.
	struct entry *e = bpf_map_lookup_elem(&entries, &name);
	if (facts && e && (e->flags & CAN_SLEEP) && covers(e, PINNED, at->start, at->end)) {
		u64 pointer = (u64)file;
		struct holder holder = {
			.key = name,
			.pin = facts->id,
			.start = at->start,
			.end = at->end,
		};
		if (!bpf_map_update_elem(&holders, &pointer, &holder, BPF_NOEXIST)) {
			facts->pid = bpf_get_current_pid_tgid() >> 32;
			facts->uid = bpf_get_current_uid_gid();
			facts->revived++;
			__sync_lock_test_and_set(&facts->file, pointer);
			__sync_val_compare_and_swap(&life->lives, WAKING, 1);
			__sync_fetch_and_add(&filter.stirred, 1);
			return 0;
		}
	}
	__sync_val_compare_and_swap(&life->lives, WAKING, DEAD);
	uncount_pin(name.dev);
	return -EOPNOTSUPP;
}

// An inode leaves memory: the next file may have its number. Nobody has it
// open, so nobody is about to take up a pin of it.
SEC("lsm/inode_free_security")
int BPF_PROG(inode_free, struct inode *inode)
{
	return inode->i_sb ? disturb(inode) : 0;
}

// What the guard does about a dormant inode.
SEC("syscall")
int tend(struct tending *t)
{
	struct key key = t->key;
	u64 pin = t->pin;
	u32 what = t->what;
	struct life *life = bpf_map_lookup_elem(&lives, &key);

	t->lives = DEAD;
	t->stamp = t->file = t->revived = 0;
	t->pid = 0;
	t->uid = 0;
	if (what == TEND_GRANTING || what == TEND_GRANTED) {
		struct entry *e = bpf_map_lookup_elem(&entries, &key);
		u32 flags = e ? e->flags & ~GRANTING : 0;
		if (e)
			*(volatile u32 *)&e->flags =
				what == TEND_GRANTING ? flags | GRANTING : flags;
	}
	if (life) {
		if (what == TEND_DISTURB)
			__sync_fetch_and_add(&life->disturbed, 1);
		t->lives = *(volatile u64 *)&life->lives;
		t->stamp = stamp_of(life);
		if (!pin)
			pin = *(volatile u64 *)&life->last;
	}
	t->pin = pin;
	struct pin_facts *facts = bpf_map_lookup_elem(&pins, &pin);
	if (!facts)
		return 0;
	if (what == TEND_QUIET)
		__sync_lock_test_and_set(&facts->quiet, 1);
	if (what == TEND_TELL)
		__sync_lock_test_and_set(&facts->quiet, 0);
	if (what == TEND_DISOWN) {
		u64 pointer = *(volatile u64 *)&facts->file;
		struct holder *holder = bpf_map_lookup_elem(&holders, &pointer);
		if (holder && disown(holder, pin)) {
			__sync_lock_test_and_set(&facts->file, 0);
			leave(&key, pin);
			uncount_pin(key.dev);
		}
	}
	t->file = *(volatile u64 *)&facts->file;
	t->revived = facts->revived;
	t->pid = facts->pid;
	t->uid = facts->uid;
	return 0;
}
