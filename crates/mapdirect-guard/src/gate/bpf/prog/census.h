// SPDX-License-Identifier: (MIT OR Apache-2.0) OR GPL-2.0
//
// Who has a file open for writing: lists that the guard reads.

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
