// SPDX-License-Identifier: (MIT OR Apache-2.0) OR GPL-2.0
//
// Notes of what a thread is about to do.
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
