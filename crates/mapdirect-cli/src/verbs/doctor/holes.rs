//! What each gate cannot refuse. mapdirect(7) says more of it.

/// What remains open under the bpf gate.
pub(super) const BPF: [&str; 7] = [
    "a holder growing a mapping of its own over frozen blocks with mremap(2)",
    "a process with CAP_SYS_ADMIN that changes the argument of an ioctl while it is read \
     (LOOP_CONFIGURE, XFS_IOC_SCRUB_METADATA)",
    "on XFS, a process mapping a file to store to it in the very moment in which another shares \
     blocks near a pin",
    "on XFS, blocks that were set aside for copies before the pin, where somebody keeps writing to \
     the file while it is granted",
    "stores through the page cache beside frozen blocks while no guard runs: it holds the pages \
     that keep them apart",
    "whatever happens in the second until the guard puts back what root deletes from the gate's \
     maps (it is told afterwards)",
    "everything, once root takes the gate away while no guard runs (mapdirect guard --unload, or \
     removing it from /sys/fs/bpf)",
];

/// What remains open under the fanotify gate.
pub(super) const FANOTIFY: [&str; 8] = [
    "a loop device that a holder has made of the file: discards of it (blkdiscard, fstrim, mkfs) \
     free its blocks",
    "a holder moving blocks through its own descriptor (XFS_IOC_SWAPEXT, EXT4_IOC_MOVE_EXT, \
     EXT4_IOC_SWAP_BOOT), or bringing a mapping of its own over frozen blocks with mremap(2) or \
     remap_file_pages(2)",
    "the owner of a file setting hints for the size of extents, by which XFS allocates more than \
     is written to, or having ext4 enable fs-verity",
    "a process with CAP_SYS_RESOURCE that has ext4 send the data of a pinned file through the \
     journal (chattr +j): no block moves, but what is stored is durable only later",
    "an NFS client setting the size of a file whose filesystem is exported after it was pinned \
     (the server asks nobody); what is exported for writing before cannot be pinned",
    "truncate(2) through an overlay over the directory of a pinned file that is mounted after \
     the pin, that no mount namespace shows (fsmount(2) without move_mount(2)), or whose upper \
     directory was given as a relative path: it is noticed when it has happened",
    "a hidden writer of a file without reflink that others read while it is pinned: that there \
     is none is concluded from /proc",
    "everything, once the guard has ended: holders are told then",
];

/// Both gates, and what each cannot refuse: the one in use first.
pub(super) fn of_all(in_use: &str) -> [(&'static str, &'static [&'static str]); 2] {
    let (bpf, fanotify) = (("bpf", &BPF[..]), ("fanotify", &FANOTIFY[..]));
    if in_use == "fanotify" {
        [fanotify, bpf]
    } else {
        [bpf, fanotify]
    }
}
