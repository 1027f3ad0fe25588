// SPDX-License-Identifier: (MIT OR Apache-2.0) OR GPL-2.0
//
// The kernel's types and constants, as far as they are used; CO-RE finds the
// fields where the running kernel has them.

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

struct list_head {
	struct list_head *next;
} CORE;

// include/linux/filelock.h; until 6.2 include/linux/fs.h
struct file_lock_context {
	struct list_head flc_posix;
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
	struct file_lock_context *i_flctx;
} CORE;

struct dentry {
	struct inode *d_inode;
} CORE;

struct path {
	struct dentry *dentry;
} CORE;

struct file {
	struct inode *f_inode;
	unsigned int f_flags;
	unsigned int f_mode;
	struct path f_path;
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

// fs/xfs/xfs_inode.h, fs/xfs/libxfs/xfs_inode_fork.h
struct xfs_ifork {
	s64 if_bytes;
} CORE;

struct xfs_inode {
	struct xfs_ifork *i_cowfp;
	struct inode i_vnode;
} CORE;

struct kiocb {
	struct file *ki_filp;
	s64 ki_pos;
	int ki_flags;
} CORE;

struct file_dedupe_range {
	u64 src_offset;
	u64 src_length;
} CORE;

struct file_kattr {
	u32 flags;
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

struct io_uring_task;

struct thread_info {
	u32 status;
} CORE;

struct mm_struct {
	struct file *exe_file;
} CORE;

struct task_struct {
	struct thread_info thread_info;
	struct io_uring_task *io_uring;
	int pid;
	int tgid;
	unsigned int flags;
	u64 start_boottime;
	struct task_struct *group_leader;
	struct task_struct *real_parent;
	struct files_struct *files;
	const struct cred *cred;
	struct mm_struct *mm;
} CORE;

// arch/x86/include/asm/ptrace.h
struct pt_regs___x86 {
	unsigned long bp;
	unsigned long bx;
	unsigned long r10;
	unsigned long r9;
	unsigned long r8;
	unsigned long ax;
	unsigned long cx;
	unsigned long dx;
	unsigned long si;
	unsigned long di;
	unsigned long orig_ax;
} CORE;

// arch/arm64/include/asm/ptrace.h
struct pt_regs___arm64 {
	u64 regs[31];
	u64 orig_x0;
	int syscallno;
} CORE;

struct mnt_idmap;

#define ETXTBSY 26
#define EINVAL 22
#define EACCES 13
#define EOPNOTSUPP 95
#define EALREADY 114

#define END (~0ULL)

// include/linux/fs.h
#define MAY_WRITE 2
#define MAY_READ 4
#define FMODE_READ 1
#define FMODE_CAN_ATOMIC_WRITE 0x80
#define FMODE_WRITE 2
#define FMODE_NOACCOUNT (1 << 29)
#define ATTR_SIZE (1 << 3)
#define O_APPEND 02000
// arch/x86 has the value of asm-generic, arch/arm64 one of its own: see o_direct.
#define O_DIRECT_X86 040000
#define O_DIRECT_ARM64 0200000
#define S_SWAPFILE (1 << 8)
#define S_APPEND (1 << 2)
#define S_IMMUTABLE (1 << 3)
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
