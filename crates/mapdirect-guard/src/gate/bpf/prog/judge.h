// SPDX-License-Identifier: (MIT OR Apache-2.0) OR GPL-2.0
//
// Whether an operation is refused: Layers::refuses of policy/layers.rs, in C.

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
__noinline int refuses_range(struct entry *e, struct rule *rule, struct question *q,
			     struct run *at, u32 kind)
{
	if (!e || !rule || !q || !at)
		return 1;
	u64 size = q->size;
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
		if (start < e->followed_end && (q->late || start < size))
			return 1;
		if (e->fixed_size != END && (start != e->fixed_size || end != e->fixed_size))
			return 1;
		from = to = 0;
		break;
	}
	u32 list = rule->refused_on == MEETS_ANY ? PINNED : kind == MAP_WRITE ? MAPPED : FROZEN;
	bool unshares = kind == UNSHARE_RANGE && (e->flags & UNSHARES);
	if (!unshares && meets(e, list, from, to))
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
	u64 before = how == LETS_GO_TO_THE_END ? e->block : 0;
	u64 from = start > before ? start - before : 0;

	return meets(e, HELD, align_down(from, PAGE),
		     how == LETS_GO_TO_THE_END ? END : end);
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
	if (rule->reach != RANGE || rule->refused_on != MEETS_FROZEN || rule->brings_shared ||
	    q->kind == MAP_WRITE || q->has_or || (e->flags & FAILING_FREES) ||
	    !is_empty(e, EDGES))
		return false;
	return q->at.end <= q->size && q->at.end <= e->largest_size && is_empty(e, FROZEN) &&
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

// Whether the thread's process is one, or descends from it. Every parent that
// a process ever has is one of those it descends from (find_new_reaper,
// kernel/exit.c), so nobody needs to stand still for this.
__noinline int is_in_family(struct key *key)
{
	struct task_struct *task = (void *)bpf_get_current_task();

	if (!key)
		return 0;
	struct key name = *key;
	struct root *root = bpf_map_lookup_elem(&roots, &name);
	if (!root)
		return 0;
	u32 pid = root->pid;
	u64 began = root->began;
	if (!pid)
		return 0;
	for (int generation = 0; generation <= ANCESTORS; generation++) {
		struct task_struct *leader = BPF_CORE_READ(task, group_leader);
		u32 tgid = BPF_CORE_READ(leader, tgid);
		if (tgid == pid && BPF_CORE_READ(leader, start_boottime) / TICK == began)
			return 1;
		if (tgid <= 1)
			return 0;
		task = BPF_CORE_READ(leader, real_parent);
	}
	return 0;
}

// What a pin denies beside what would break it.
static __always_inline bool is_denied(struct entry *e, u32 kind, struct key *key)
{
	if (kind == UNLINK || kind == RENAME)
		return e->flags & DENIES_RENAME;
	return (kind == OPEN_WRITE || kind == TRUNCATE) && (e->flags & DENIES_WRITE) &&
	       !is_in_family(key);
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
	if (is_denied(e, kind, &q->key))
		return 1;
	if (kind == OPEN_WRITE || kind == UNLINK || kind == RENAME)
		return 0;
	// Wherever it begins, it could be grown over frozen blocks by mremap(2),
	// which no hook sees.
	if (kind == MAP_WRITE && q->foreign && (e->flags & HAS_FROZEN))
		return 1;
	struct rule *rule = &s->rules[kind];
	u64 size = q->size;

	if (meets_nothing(e, rule, q))
		return 0;
	if (refuses_range(e, rule, q, &q->at, kind))
		return 1;
	if (q->has_or && refuses_range(e, rule, q, &q->or_at, kind))
		return 1;
	u64 largest = q->at.end;
	if (q->has_or && q->or_at.end > largest)
		largest = q->or_at.end;
	if (e->largest_size != END && rule->grows && largest > e->largest_size)
		return 1;
	u32 how = rule->lets_go;
	if (how == LETS_GO_RANGE_IF_DIRECT)
		how = q->direct ? LETS_GO_RANGE : LETS_GO_NOTHING;
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
	// What moves would not be known any more.
	if (kind == INSERT_RANGE && !is_empty(e, WINDOW) && meets(e, BESIDE, q->at.start, END))
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
	struct task_struct *task = (void *)bpf_get_current_task();
	struct inode *program = BPF_CORE_READ(task, mm, exe_file, f_inode);
	event->kind_of_event = EVENT_REFUSED;
	event->kind = kind;
	event->tid = (u32)ids;
	event->tgid = ids >> 32;
	event->key = q->key;
	event->start = q->at.start;
	event->end = q->at.end;
	event->pin = 0;
	event->file = 0;
	event->began = BPF_CORE_READ(task, start_boottime) / TICK;
	event->program.dev = BPF_CORE_READ(program, i_sb, s_dev);
	event->program.pad = 0;
	event->program.ino = BPF_CORE_READ(program, i_ino);
	bpf_get_current_comm(event->command, sizeof(event->command));
	bpf_ringbuf_submit(event, 0);
	return 0;
}

// Notes of one inode what nobody refuses, for who would take up a pin of it.
static __noinline int disturb(struct inode *inode)
{
	struct key key;

	if (!behind(inode))
		return 0;
	name(&key, inode);
	struct life *life = bpf_map_lookup_elem(&lives, &key);
	if (life)
		__sync_fetch_and_add(&life->disturbed, 1);
	return 0;
}

// Whether there is anything to refuse for; tells the guard of it.
__noinline int is_refused(struct question *q)
{
	if (!q)
		return 1;
	struct key key = q->key;
	struct life *life = bpf_map_lookup_elem(&lives, &key);
	if (!life)
		return 0;
	if (*(volatile u64 *)&life->lives & DEAD) {
		// The entry counts for nothing. But it is let pass only after a note
		// that it came, and one more look: see dormant.h.
		__sync_fetch_and_add(&life->disturbed, 1);
		if (*(volatile u64 *)&life->lives & DEAD)
			return 0;
	}
	if (is_guard())
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

// Refuses what pins deny, which has no range.
static __noinline int judge_by_itself(struct inode *inode, u32 kind)
{
	struct question q = {};

	name(&q.key, inode);
	q.kind = kind;
	q.at.end = END;
	return decide(&q);
}
