// SPDX-License-Identifier: (MIT OR Apache-2.0) OR GPL-2.0
//
// The bpf gate, kernel side.
//
// Security hooks decide, and they rely only on what cannot be missing. The
// kernel never leaves out a program that is attached to a hook; a program that
// is attached to a function (fentry, fexit) it does leave out when the same
// program was preempted on that processor (__bpf_prog_enter_recur,
// kernel/bpf/trampoline.c). So a hook learns what is under way
//
//  1. from the registers of the system call that the thread is in, where these
//     prove it (`proven_call`);
//  2. else from the kernel's stack, which says which function asks
//     (`doing_by_stack`): io_uring, aio, and the kernel's own threads.
//
// Where in the file the operation goes, a register says, or a note. A note is
// left by a program on the last function before the hook, and only when
// nothing can fail any more between the two: so each note belongs to the hook
// that comes next in this thread, which takes it. A hook that finds none
// judges the operation as if it went anywhere in the file.
//
// The kernel's types are declared here as far as they are used; CO-RE finds
// the fields where the running kernel has them, so one object serves all.
// What may be done is not written here: `settings.rules` is the table of
// policy.rs.

#include "types.h"
#include "contract.h"
#include "maps.h"
#include "judge.h"
#include "syscall.h"
#include "notes.h"
#include "access.h"
#include "change.h"
#include "life.h"
#include "dormant.h"
#include "mapping.h"
#include "census.h"

// What the gate would say: for tests.
SEC("syscall")
int ask(struct question *q)
{
	struct question copy = *q;

	q->answer = verdict(&copy);
	return 0;
}

// Where XFS keeps what it has set aside for copies. It may be a module, which
// is described only once it is there: later, as a rule, than the programs. So
// the guard asks when it needs to know, and tells the programs.
SEC("syscall")
int find_places(struct places *p)
{
	if (!bpf_core_field_exists(struct xfs_inode, i_cowfp) ||
	    !bpf_core_field_exists(struct xfs_ifork, if_bytes))
		return 0;
	p->fork = (s64)bpf_core_field_offset(struct xfs_inode, i_cowfp) -
		  (s64)bpf_core_field_offset(struct xfs_inode, i_vnode);
	p->bytes = bpf_core_field_offset(struct xfs_ifork, if_bytes);
	p->known = 1;
	return 0;
}
