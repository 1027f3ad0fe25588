// SPDX-License-Identifier: (MIT OR Apache-2.0) OR GPL-2.0
//
// Hooks of reads, writes and opens.

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
	q->direct = !!(flags & o_direct());
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
	} else if ((flags & o_direct()) && (file->f_mode & FMODE_CAN_ATOMIC_WRITE)) {
		// Nobody knows how. An untorn write is direct
		// (generic_atomic_write_valid), and only for files of which their
		// filesystem has said at open that it can (kiocb_set_rw_flags).
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
				event->kind_of_event = EVENT_DOUBT;
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
	if (!behind(inode))
		return 0;
	if (!may_open(file))
		return refuse_pinned(inode, OPEN_WRITE);
	return judge_by_itself(inode, OPEN_WRITE);
}
