// SPDX-License-Identifier: (MIT OR Apache-2.0) OR GPL-2.0
//
// Hooks of mappings, and of the questions that are asked about files.

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
	// In a pin of strength stable a store to a hole allocates.
	if (e->followed_end)
		return -EOPNOTSUPP;
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
	struct holder *known = bpf_map_lookup_elem(&holders, &pointer);
	if (known)
		// What else is pinned need not stay so for as long as this file.
		return *(volatile u64 *)&known->pin && start >= known->start &&
			       end <= known->end ?
			       0 :
			       -EOPNOTSUPP;
	// What is being granted may be refused yet: then nobody would know of who
	// has joined.
	if (*(volatile u32 *)&e->flags & GRANTING)
		return -ETXTBSY;
	struct life *life = bpf_map_lookup_elem(&lives, &key);
	if (life && (*(volatile u64 *)&life->lives & DEAD))
		return take_up(file, &key, at);
	struct holder holder = { .key = key, .start = start, .end = end };
	holder.pin = bpf_ktime_get_ns() | DEAD;
	if (!become_pin(pointer, &holder, 0))
		return -ETXTBSY;
	// Those it was judged by may have ended before it joined, and another pin
	// have begun: then it has joined one that knows nothing of it. The guard
	// says that it grants one before that begins.
	now = bpf_map_lookup_elem(&entries, &key);
	if (!now || *(volatile u64 *)&now->version != version ||
	    (*(volatile u32 *)&now->flags & GRANTING)) {
		bpf_map_delete_elem(&holders, &pointer);
		leave(&key, holder.pin);
		uncount_pin(key.dev);
		return -ETXTBSY;
	}
	// The guard must hear of it, or it would think too little pinned.
	struct event *event = bpf_ringbuf_reserve(&changes, sizeof(*event), 0);
	if (!event) {
		bpf_map_delete_elem(&holders, &pointer);
		leave(&key, holder.pin);
		uncount_pin(key.dev);
		return -ETXTBSY;
	}
	u64 ids = bpf_get_current_pid_tgid();
	event->kind_of_event = EVENT_RAW;
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

// Whether somebody may store to a range of a file by a mapping of it.
static __noinline int may_store(struct file *file, u64 start, u64 end)
{
	struct inode *inode = file->f_inode;
	struct question q = {};

	name(&q.key, inode);
	q.size = inode->i_size;
	q.kind = MAP_WRITE;
	q.at.start = start;
	q.at.end = end;
	u64 pointer = (u64)file;
	struct holder *holder = bpf_map_lookup_elem(&holders, &pointer);
	q.foreign = !holder || !*(volatile u64 *)&holder->pin || holder->foreign;
	return decide(&q);
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
	if (!behind(file->f_inode))
		return 0;
	if (!mapped_by_call(file, &at))
		at.end = END;
	return may_store(file, at.start, at.end);
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
	if (!behind(file->f_inode))
		return 0;
	u64 start = area->vm_pgoff * PAGE;
	return may_store(file, start, start + (area->vm_end - area->vm_start));
}

// fcntl(fd, F_GETFL, WHO_IS_IT) by the guard: what is this file to the kernel?
#define F_GETFL 3
#define F_SETFL 4
// fcntl(fd, F_GETFL, IS_IT_PIN | number) by anybody: EALREADY if this file is
// that pin. The guard's own numbers have so many bits.

static __noinline int says_pin(struct file *file, u64 value)
{
	u64 pointer = (u64)file;
	struct holder *holder = bpf_map_lookup_elem(&holders, &pointer);

	if (!holder || !holder->pin || (holder->pin & DEAD))
		return 0;
	return (holder->pin & PIN_NUMBER) == (value & PIN_NUMBER) ? -EALREADY : 0;
}

// Whether anybody has record locks on an inode. The process that has them
// loses some when it closes a description of the inode.
static __noinline int has_locks(struct inode *inode)
{
	struct file_lock_context *locks = inode->i_flctx;

	if (!locks)
		return 0;
	void *list = (void *)locks + bpf_core_field_offset(struct file_lock_context, flc_posix);
	return BPF_CORE_READ(locks, flc_posix.next) != list;
}

// fcntl(fd, F_GETFL, MAY_TAKE_UP | number) by anybody: EALREADY if it is worth
// trying.
static __noinline int says_dormant(struct file *file, u64 value)
{
	struct inode *inode = file->f_inode;
	struct key key;

	if ((file->f_mode & (FMODE_READ | FMODE_WRITE)) != (FMODE_READ | FMODE_WRITE))
		return 0;
	if (!behind(inode) || has_locks(inode))
		return 0;
	name(&key, inode);
	struct life *life = bpf_map_lookup_elem(&lives, &key);
	if (!life || *(volatile u64 *)&life->lives != DEAD)
		return 0;
	return (*(volatile u64 *)&life->last ^ value) & PIN_NUMBER ? 0 : -EALREADY;
}

// A write that has been judged takes its flags from the file afterwards: so
// where it matters where it goes, or how it is made, these do not change.
static __noinline int sets_flags(struct file *file, u64 value)
{
	u32 changed = (file->f_flags ^ (u32)value) & (O_APPEND | o_direct());
	struct inode *inode = file->f_inode;

	if (!changed || !behind(inode))
		return 0;
	struct key key;
	name(&key, inode);
	struct entry *e = bpf_map_lookup_elem(&entries, &key);
	if (!e)
		return 0;
	u32 flags = *(volatile u32 *)&e->flags;
	if ((flags & WRITES_PASS) && (!(flags & WINDOWED) || !(changed & o_direct())))
		return 0;
	return refuse_pinned(inode, SET_FLAGS);
}

// Whether XFS has set blocks aside for copies of shared blocks of a file
// (xfs_inode_has_cow_data); it shows them to nobody.
static __noinline int has_copies(struct file *file, struct places *places)
{
	u64 inode = 0, fork = 0;
	s64 bytes = 0;

	if (!places)
		return 1;
	if (file->f_inode->i_sb->s_magic != XFS_MAGIC)
		return 0;
	// As a number: the verifier lets no unknown offset be added to a pointer.
	if (!places->known || bpf_probe_read_kernel(&inode, sizeof(inode), &file->f_inode) ||
	    bpf_probe_read_kernel(&fork, sizeof(fork), (void *)(inode + places->fork)))
		return 1;
	return fork &&
	       (bpf_probe_read_kernel(&bytes, sizeof(bytes), (void *)(fork + places->bytes)) ||
		bytes);
}

SEC("lsm/file_fcntl")
int BPF_PROG(file_fcntl, struct file *file, unsigned int command, unsigned long value,
	     int before)
{
	if (before)
		return before;
	if (command == F_SETFL)
		return sets_flags(file, value);
	if (command == F_GETFL && (value & ~PIN_NUMBER) == IS_IT_PIN)
		return says_pin(file, value);
	if (command == F_GETFL && (value & ~PIN_NUMBER) == MAY_TAKE_UP)
		return says_dormant(file, value);
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
		identity.role = asked->role;
		identity.places = asked->places;
	}
	name(&identity.key, inode);
	identity.file = (u64)file;
	identity.generation = inode->i_generation;
	identity.direct = inode->i_dio_count.counter;
	identity.writers = inode->i_writecount.counter;
	identity.readers = inode->i_readcount.counter;
	identity.mapped = inode->i_mapping->i_mmap_writable.counter;
	identity.copies = has_copies(file, &identity.places);
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
	if (identity.pin && identity.role == ROLE_NONE) {
		u64 pointer = identity.file;
		struct holder *holder = bpf_map_lookup_elem(&holders, &pointer);
		if (holder && holder->pin == identity.pin)
			end_life(pointer);
	} else if (identity.pin) {
		struct holder holder = {
			.key = identity.key,
			.pin = identity.pin,
			.start = identity.start,
			.end = identity.end,
			.foreign = identity.role == ROLE_FOREIGN,
		};
		identity.held = become_pin(identity.file, &holder, 1);
		struct key key = identity.key;
		struct life *life = bpf_map_lookup_elem(&lives, &key);
		if (life)
			identity.stamp = stamp_of(life);
	}
	bpf_map_update_elem(&identities, &tid, &identity, BPF_ANY);
	return 0;
}
