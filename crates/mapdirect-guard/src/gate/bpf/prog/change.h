// SPDX-License-Identifier: (MIT OR Apache-2.0) OR GPL-2.0
//
// Hooks of what changes a file's size, its names, its blocks by ioctl(2), and its
// hints.

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
	// Whoever truncates has the inode's lock, and so its size stays; but XFS
	// does not hold it until an asynchronous direct write has made the file
	// grow, and waits for that after this hook (xfs_setattr_size,
	// fs/xfs/xfs_iops.c).
	q.late = inode->i_sb->s_magic == XFS_MAGIC && inode->i_dio_count.counter;
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
#define FS_ENABLE_VERITY 0x6685
#define FS_SETVERSION 0x7602
#define EXT4_SETVERSION 0x6604
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
	return refuse_pinned(inode, SET_ATTRIBUTES);
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
		q.kind = SET_UP_LOOP;
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
		if (!count)
			return 0;
		// Only a look, without XFS_SCRUB_IFLAG_REPAIR?
		u32 flags[2] = {};
		if (number == XFS_SCRUB &&
		    !bpf_probe_read_user(flags, sizeof(flags), (void *)argument) &&
		    !(flags[1] & 1))
			return 0;
		if (!*(volatile u64 *)count) {
			// As in is_refused: first the note, then one more look.
			__sync_fetch_and_add(&filter.upheavals, 1);
			if (!*(volatile u64 *)count)
				return 0;
		}
		return refuse_exchange(inode, EXCHANGE);
	}
	// By its generation an inode is told from one that had its number before:
	// both have one name here, and one life.
	if (magic == EXT4_MAGIC && (number == EXT4_SETVERSION || number == FS_SETVERSION))
		disturb(inode);
	// It writes its tree behind the end of the file, and frees what is there.
	if (number == FS_ENABLE_VERITY && behind(inode))
		return refuse_pinned(inode, ENABLE_VERITY);
	// Later kernels have a hook for what these set. Here it is in the program's
	// memory, where others may change it: so nothing may be set.
	if ((number == FSSETXATTR || number == SETFLAGS) &&
	    !bpf_core_type_exists(struct file_kattr) && behind(inode))
		return refuse_pinned(inode, SET_ATTRIBUTES);
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
		return attr->flags & EXT4_JOURNAL_DATA ? refuse_pinned(inode, SET_ATTRIBUTES) : 0;
	if (inode->i_sb->s_magic != XFS_MAGIC)
		return 0;
	return sets_hint(inode, attr->fsx_xflags, attr->fsx_extsize, attr->fsx_cowextsize);
}

static __always_inline int judge_name(struct dentry *dentry, u32 kind)
{
	struct inode *inode = dentry->d_inode;

	return inode && behind(inode) ? judge_by_itself(inode, kind) : 0;
}

SEC("lsm/inode_unlink")
int BPF_PROG(inode_unlink, struct inode *dir, struct dentry *dentry, int before)
{
	return before ?: judge_name(dentry, UNLINK);
}

// An exchange comes here twice, once for each name.
SEC("lsm/inode_rename")
int BPF_PROG(inode_rename, struct inode *from, struct dentry *old, struct inode *to,
	     struct dentry *new, int before)
{
	return before ?: judge_name(old, RENAME) ?: judge_name(new, RENAME);
}

// The function from which that is called: one call for an exchange.
SEC("lsm/inode_rename")
int BPF_PROG(inode_rename_5, struct inode *from, struct dentry *old, struct inode *to,
	     struct dentry *new, unsigned int flags, int before)
{
	return before ?: judge_name(old, RENAME) ?: judge_name(new, RENAME);
}
