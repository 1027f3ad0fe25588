// SPDX-License-Identifier: (MIT OR Apache-2.0) OR GPL-2.0
//
// The life of a pin, from the struct file that becomes one to the end of that.

// One more struct file is a pin of the inode. Only the guard begins anew where
// all were gone; then this is 2.
static __noinline int join(struct key *key, int anew)
{
	struct key name = *key;
	struct life *life = bpf_map_lookup_elem(&lives, &name);

	if (!life && anew) {
		// No stamp of an earlier pin may fit.
		struct life fresh = { .lives = DEAD, .disturbed = bpf_ktime_get_ns() };
		bpf_map_update_elem(&lives, &name, &fresh, BPF_NOEXIST);
		life = bpf_map_lookup_elem(&lives, &name);
	}
	if (!life)
		return 0;
	for (int try = 0; try < 64; try++) {
		u64 now = *(volatile u64 *)&life->lives;
		u64 then = now + 1;
		if (now & WAKING)
			return 0;
		if (now & DEAD) {
			if (!anew)
				return 0;
			then = 1;
		}
		if (__sync_val_compare_and_swap(&life->lives, now, then) == now)
			return now & DEAD ? 2 : 1;
	}
	return 0;
}

static __always_inline void leave(struct key *key, u64 pin)
{
	struct life *life = bpf_map_lookup_elem(&lives, key);

	if (!life)
		return;
	// Somebody may join meanwhile: then it lives. The entry is left for the
	// guard to take away, who may have written one for the next pin already.
	if (__sync_fetch_and_add(&life->lives, -1) == 1) {
		*(volatile u64 *)&life->last = pin;
		__sync_val_compare_and_swap(&life->lives, 0, DEAD);
	}
}

// Counts one more pin on a filesystem.
static __noinline int count_pin(u32 dev)
{
	u32 name = dev;
	u64 *count = bpf_map_lookup_elem(&devices, &name);

	if (!count) {
		u64 none = 0;
		bpf_map_update_elem(&devices, &name, &none, BPF_NOEXIST);
		count = bpf_map_lookup_elem(&devices, &name);
	}
	if (!count)
		return 0;
	__sync_fetch_and_add(count, 1);
	return 1;
}

static __noinline int uncount_pin(u32 dev)
{
	u32 name = dev;
	u64 *count = bpf_map_lookup_elem(&devices, &name);

	if (count)
		__sync_fetch_and_add(count, -1);
	return 0;
}

// A struct file becomes a pin; says whether it did, as `join` does.
static __noinline int become_pin(u64 file, struct holder *holder, int anew)
{
	if (!holder)
		return 0;
	struct holder copy = *holder;
	struct key key = copy.key;

	if (!count_pin(key.dev))
		return 0;
	int joined = join(&key, anew);
	if (!joined) {
		uncount_pin(key.dev);
		return 0;
	}
	if (!bpf_map_update_elem(&holders, &file, &copy, BPF_NOEXIST))
		return joined;
	leave(&key, copy.pin);
	uncount_pin(key.dev);
	return 0;
}

// A struct file that stays is no pin any more. Its element stays as long as it
// does, as one of no pin: an element that was freed and used again has another
// number by then, and numbers are not used again.
static __always_inline bool disown(struct holder *holder, u64 pin)
{
	return pin && __sync_val_compare_and_swap(&holder->pin, pin, 0) == pin;
}

// A struct file is no pin any more.
static __noinline int end_life(u64 file)
{
	u64 pointer = file;
	struct holder *holder = bpf_map_lookup_elem(&holders, &pointer);
	if (!holder)
		return 0;
	struct key key = holder->key;
	u64 pin = *(volatile u64 *)&holder->pin;
	// The guard may disown it just now: one of both does the rest.
	bool is_ours = disown(holder, pin);
	bpf_map_delete_elem(&holders, &pointer);
	if (!is_ours)
		return 0;
	// Until `leave` the guard takes nothing of it away. It asks for quiet, and
	// then looks whether the pin is over; here it is over, and then this looks
	// whether there is quiet. So one of them sees the other.
	bool quiet = false;
	struct pin_facts *facts = bpf_map_lookup_elem(&pins, &pin);
	if (facts) {
		__sync_lock_test_and_set(&facts->file, 0);
		quiet = *(volatile u64 *)&facts->quiet;
	}
	leave(&key, pin);
	uncount_pin(key.dev);
	if (quiet) {
		__sync_fetch_and_add(&filter.stirred, 1);
		return 0;
	}
	struct event *event = bpf_ringbuf_reserve(&changes, sizeof(*event), 0);
	if (!event) {
		u32 untold = UNTOLD;
		u64 *count = bpf_map_lookup_elem(&refused, &untold);
		if (count)
			__sync_fetch_and_add(count, 1);
		return 0;
	}
	__builtin_memset(event, 0, sizeof(*event));
	event->kind_of_event = EVENT_ENDED;
	event->key = key;
	event->pin = pin;
	bpf_ringbuf_submit(event, 0);
	return 0;
}

// The last mapping of a pin is gone, or somebody else's file, mostly.
// A hook where hooks call programs: those are never left out.
SEC("lsm/file_free_security")
int BPF_PROG(file_free, struct file *file)
{
	// Its inode may be gone.
	return end_life((u64)file);
}
