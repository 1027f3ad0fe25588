// SPDX-License-Identifier: (MIT OR Apache-2.0) OR GPL-2.0
//
// What a thread is doing: by the registers of a system call that they prove,
// else by the kernel's stack.

// include/linux/sched.h: of threads without system calls of their own.
#define PF_IO_WORKER 0x10
#define PF_WQ_WORKER 0x20
#define PF_USER_WORKER 0x4000
#define PF_KTHREAD 0x200000
// arch/x86/include/asm/thread_info.h: a 32-bit system call.
#define TS_COMPAT 2
#define ENOSYS 38
// include/linux/fs.h
#define MAX_RW_COUNT 0x7ffff000ULL

enum abi { X86_64, I386, ARM64 };

// System calls, as far as they matter here, whatever their number.
enum call {
	NOT_PROVEN,
	ANOTHER_CALL,
	READS,
	OPENS,
	WRITE_CALL,
	PWRITE,
	WRITEV,
	PWRITEV,
	PWRITEV2,
	SENDFILE,
	SPLICE,
	COPY_FILE_RANGE,
	FALLOCATE,
	MMAP,
	IO_SUBMIT,
	IO_URING_ENTER,
};

#define BIT(number) (1ULL << (number))

// arch/x86/entry/syscalls/syscall_64.tbl. In a call of these nothing is done to
// a file but to read it: read, pread64, readv, sendfile, execve.
#define X86_64_READS (BIT(0) | BIT(17) | BIT(19) | BIT(40) | BIT(59))
// write, pwrite64, writev
#define X86_64_WRITES (BIT(1) | BIT(18) | BIT(20))

__noinline int call_of(u32 abi, u32 number)
{
	if (abi == X86_64) {
		switch (number) {
		case 0: case 17: case 19: case 59: case 295: case 322: case 327:
			return READS;
		case 1: return WRITE_CALL;
		case 9: return MMAP;
		case 18: return PWRITE;
		case 20: return WRITEV;
		case 40: return SENDFILE;
		case 2: case 85: case 257: case 304: case 437: return OPENS;
		case 209: return IO_SUBMIT;
		case 275: return SPLICE;
		case 285: return FALLOCATE;
		case 296: return PWRITEV;
		case 326: return COPY_FILE_RANGE;
		case 328: return PWRITEV2;
		case 426: return IO_URING_ENTER;
		}
	} else if (abi == I386) {
		// arch/x86/entry/syscalls/syscall_32.tbl; mmap (90) has its arguments in
		// the program's memory.
		switch (number) {
		case 3: case 11: case 145: case 180: case 333: case 358: case 378:
			return READS;
		case 4: return WRITE_CALL;
		case 146: return WRITEV;
		case 181: return PWRITE;
		case 187: case 239: return SENDFILE;
		case 192: return MMAP;
		case 5: case 8: case 295: case 342: case 437: return OPENS;
		case 248: return IO_SUBMIT;
		case 313: return SPLICE;
		case 324: return FALLOCATE;
		case 334: return PWRITEV;
		case 377: return COPY_FILE_RANGE;
		case 379: return PWRITEV2;
		case 426: return IO_URING_ENTER;
		}
	} else {
		// include/uapi/asm-generic/unistd.h
		switch (number) {
		case 63: case 65: case 67: case 69: case 221: case 281: case 286:
			return READS;
		case 64: return WRITE_CALL;
		case 66: return WRITEV;
		case 68: return PWRITE;
		case 70: return PWRITEV;
		case 71: return SENDFILE;
		case 222: return MMAP;
		case 56: case 265: case 437: return OPENS;
		case 2: return IO_SUBMIT;
		case 76: return SPLICE;
		case 47: return FALLOCATE;
		case 285: return COPY_FILE_RANGE;
		case 287: return PWRITEV2;
		case 426: return IO_URING_ENTER;
		}
	}
	return ANOTHER_CALL;
}

static __always_inline struct pt_regs___x86 *own_registers(void)
{
	return (void *)bpf_task_pt_regs((void *)bpf_get_current_task_btf());
}

// O_DIRECT where this runs: on arm64 the bit of x86 is that of O_DIRECTORY.
static __always_inline u32 o_direct(void)
{
	struct pt_regs___x86 *regs = 0;

	return bpf_core_field_exists(regs->orig_ax) ? O_DIRECT_X86 : O_DIRECT_ARM64;
}

// Whether a thread makes system calls of its own.
static __always_inline bool has_calls(struct task_struct *task)
{
	return !(task->flags & (PF_KTHREAD | PF_IO_WORKER | PF_USER_WORKER));
}

// Whether io_uring may run requests in this thread, on the way out of whatever
// call, with the registers of that call or with those that a tracer or a
// seccomp listener has put there: they prove nothing then. Set before the first
// request (io_uring/tctx.c).
static __always_inline bool has_rings(struct task_struct *task)
{
	return bpf_core_field_exists(task->io_uring) && task->io_uring;
}

// The number of the system call that this thread is in the middle of, or -1. It
// has not been answered yet: the kernel sets ax to -ENOSYS on the way in, and
// to the answer on the way out.
static __always_inline s64 call_number(struct task_struct *task, u32 *abi)
{
	struct pt_regs___x86 *regs = own_registers();

	if (!has_calls(task))
		return -1;
	if (bpf_core_field_exists(regs->orig_ax)) {
		if (regs->ax != (u64)-ENOSYS)
			return -1;
		*abi = task->thread_info.status & TS_COMPAT ? I386 : X86_64;
		int number = (int)regs->orig_ax;
		// Numbers of x32 have bit 30, and are not known here.
		return number;
	}
	// There is no such mark on arm64. Without rings nothing but the call itself
	// runs with its registers.
	struct pt_regs___arm64 *arm = (void *)regs;
	*abi = ARM64;
	return arm->syscallno;
}

// The system call that this thread is proven to be in.
__noinline int proven_call(void)
{
	struct task_struct *task = (void *)bpf_get_current_task_btf();
	u32 abi = X86_64;

	if (has_rings(task))
		return NOT_PROVEN;
	s64 number = call_number(task, &abi);
	return number < 0 ? NOT_PROVEN : call_of(abi, number);
}

// The same for what io_uring has no request for: there registers prove it even
// if there are rings.
__noinline int call_without_rings(void)
{
	struct task_struct *task = (void *)bpf_get_current_task_btf();
	u32 abi = X86_64;
	s64 number = call_number(task, &abi);

	return number < 0 ? NOT_PROVEN : call_of(abi, number);
}

// An argument of the system call, counted from 0. Those that the kernel takes
// for an int have the caller's junk above it.
__noinline u64 argument(u32 which)
{
	struct task_struct *task = (void *)bpf_get_current_task_btf();
	struct pt_regs___x86 *regs = own_registers();

	if (!bpf_core_field_exists(regs->orig_ax)) {
		struct pt_regs___arm64 *arm = (void *)regs;
		switch (which) {
		case 0: return arm->orig_x0;
		case 1: return arm->regs[1];
		case 2: return arm->regs[2];
		case 3: return arm->regs[3];
		case 4: return arm->regs[4];
		default: return arm->regs[5];
		}
	}
	if (task->thread_info.status & TS_COMPAT) {
		switch (which) {
		case 0: return (u32)regs->bx;
		case 1: return (u32)regs->cx;
		case 2: return (u32)regs->dx;
		case 3: return (u32)regs->si;
		case 4: return (u32)regs->di;
		default: return (u32)regs->bp;
		}
	}
	switch (which) {
	case 0: return regs->di;
	case 1: return regs->si;
	case 2: return regs->dx;
	case 3: return regs->r10;
	case 4: return regs->r8;
	default: return regs->r9;
	}
}

static __always_inline bool is_32_bit(void)
{
	struct task_struct *task = (void *)bpf_get_current_task_btf();
	struct pt_regs___x86 *regs = own_registers();

	return bpf_core_field_exists(regs->orig_ax) && (task->thread_info.status & TS_COMPAT);
}

// An argument of 64 bits, which 32-bit calls pass in two.
static __always_inline u64 wide_argument(u32 which, u32 low, u32 high)
{
	return is_32_bit() ? argument(low) | argument(high) << 32 : argument(which);
}

// What a descriptor of this thread is. That it is the file of a hook proves
// that the call is about this file; that it is not proves nothing, since others
// may have put another in its place since.
static __always_inline struct file *own_file(u32 fd)
{
	struct task_struct *task = (void *)bpf_get_current_task_btf();
	// Not by helpers, which cost more than the rest of it.
	struct fdtable *table = task->files->fdt;
	struct file *file = 0;

	if (fd >= table->max_fds)
		return 0;
	struct file **slot = table->fd + fd;
	bpf_probe_read_kernel(&file, sizeof(file), slot);
	return file;
}

#define FRAMES 12

// What the function does that an address of the kernel's code belongs to.
__noinline int doing_at(u64 at)
{
	struct settings *s = the_settings();

	if (!s)
		return ANYTHING;
	u32 known = s->functions_known;
	for (u32 one = 0; one < FUNCTIONS; one++) {
		if (one >= known)
			break;
		if (at > s->functions[one].start && at <= s->functions[one].end)
			return s->functions[one].doing;
	}
	return ANYTHING;
}

// What the function does that asks, by the kernel's own stack: the innermost
// one that is known. Nobody can forge that, and nothing of it is left out, but
// it takes longer than registers.
static __noinline int doing_by_stack(void *ctx)
{
	u64 frames[FRAMES] = {};

	if (bpf_get_stack(ctx, frames, sizeof(frames), 0) <= 0)
		return ANYTHING;
	for (u32 frame = 0; frame < FRAMES; frame++) {
		int doing = frames[frame] ? doing_at(frames[frame]) : ANYTHING;
		if (doing != ANYTHING)
			return doing;
	}
	return ANYTHING;
}
