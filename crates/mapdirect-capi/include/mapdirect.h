#ifndef MAPDIRECT_H
#define MAPDIRECT_H

/* Generated from the source by `cargo xtask header`. The manual is mapdirect(3). */

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/*
 mapdirect_durability: the program writes cache lines back by itself.
 */
#define MAPDIRECT_CACHE_FLUSH 1

/*
 mapdirect_durability: caches survive a power cut, and a fence is all.
 */
#define MAPDIRECT_AUTOMATIC 2

/*
 mapdirect_durability: msync(2).
 */
#define MAPDIRECT_MSYNC 3

/*
 A flag for mmap: use it with MAP_SHARED_VALIDATE.
 */
#ifndef MAP_DIRECT
#define MAP_DIRECT 0x2000000
#endif

/*
 mapdirect_prepare: the file grows to the end of the range, if it is smaller.
 */
#define MAPDIRECT_GROW 1

/*
 mapdirect_prepare: fails unless the range can be mapped by huge pages.
 */
#define MAPDIRECT_HUGE 2

/*
 mapdirect_pin_fd: holds what is stable or becomes so, and lets the file grow.
 */
#define MAPDIRECT_PIN_STABLE 1

/*
 mapdirect_pin_fd: the whole file and its size.
 */
#define MAPDIRECT_PIN_FILE 2

/*
 mapdirect_pin_fd: nobody else may open the file for writing.
 */
#define MAPDIRECT_PIN_DENY_WRITE 4

/*
 mapdirect_pin_fd: no name of the file goes.
 */
#define MAPDIRECT_PIN_DENY_RENAME 8

/*
 mapdirect_pin_fd: descendants of this process have a holder's rights.
 */
#define MAPDIRECT_PIN_FAMILY 16

/*
 mapdirect_pin_fd: prepares the range first.
 */
#define MAPDIRECT_PIN_PREPARE 32

/*
 mapdirect_extent: allocated, written, and used by this file alone.
 */
#define MAPDIRECT_WRITTEN 1

/*
 mapdirect_extent: no blocks; reads as zeros.
 */
#define MAPDIRECT_HOLE 2

/*
 mapdirect_extent: blocks with whatever was in them before. Never show it.
 */
#define MAPDIRECT_UNWRITTEN 3

/*
 mapdirect_extent: also used by other files.
 */
#define MAPDIRECT_SHARED 4

/*
 mapdirect_extent: written, but a copy of a shared block nearby may move it.
 */
#define MAPDIRECT_LOOSE 5

/*
 mapdirect_extent: something that a program cannot go to by itself.
 */
#define MAPDIRECT_OTHER 6

/*
 mapdirect_status: a guard is there, and the promise holds.
 */
#define MAPDIRECT_KEPT 0

/*
 mapdirect_status: no guard is there, and the kernel still refuses.
 */
#define MAPDIRECT_UNATTENDED 1

/*
 mapdirect_status: the promise has ended, or was broken.
 */
#define MAPDIRECT_LOST 2

/*
 mapdirect_extent: there is no place on the device.
 */
#define MAPDIRECT_NOWHERE UINT64_MAX

/*
 The number of a pin: never 0, and never used again.
 */
typedef uint64_t mapdirect_pin;

/*
 A run of blocks in the same state. Later versions have more behind it.
 */
struct mapdirect_extent {
  /*
   Byte of the file.
   */
  uint64_t offset;
  /*
   Byte of the block device, or MAPDIRECT_NOWHERE.
   */
  uint64_t physical;
  /*
   Bytes.
   */
  uint64_t length;
  /*
   MAPDIRECT_WRITTEN and so on.
   */
  uint32_t state;
  /*
   Number of the block device.
   */
  uint32_t device_major;
  /*
   Number of the block device.
   */
  uint32_t device_minor;
  /*
   0.
   */
  uint32_t reserved;
};

/*
 What became of a pin. Later versions have more behind it.
 */
struct mapdirect_state {
  /*
   MAPDIRECT_KEPT and so on.
   */
  uint32_t state;
  /*
   As mapdirect_durability; 0 for a pin without a mapping.
   */
  uint32_t durability;
  /*
   The number by which the guard knows the pin.
   */
  uint64_t pin;
  /*
   The range pinned, in bytes of the file: its start.
   */
  uint64_t start;
  /*
   And its end; all ones if it has none.
   */
  uint64_t end;
  /*
   How often blocks were found changed.
   */
  uint64_t breaches;
};

#ifdef __cplusplus
extern "C" {
#endif /* __cplusplus */

/*
 Why the last call of this thread failed, in words: what was asked, what stood
 in the way and who, and in a line that begins with "help:" what helps. Never
 NULL; empty if none has failed. It is valid until the thread's next call that
 fails.
 */
const char *mapdirect_strerror(void);

/*
 Makes what was stored to length bytes of a mapping durable, and returns when it
 is. EINVAL if they are not all in one mapping; EIO if blocks under it have
 changed; what msync(2) answers.
 */
int mapdirect_persist(const void *address, size_t length);

/*
 Starts writing a range back. It is durable when a later mapdirect_drain has
 returned: flush many ranges, then drain once. Errors as mapdirect_persist.
 */
int mapdirect_flush(const void *address, size_t length);

/*
 Waits until everything is durable that this thread has flushed, and, where that
 takes msync(2), any thread has. Errors of msync(2); the next call tries again.
 */
int mapdirect_drain(void);

/*
 Copies length bytes into a mapping and makes them durable; on persistent memory
 past the cache. Errors as mapdirect_persist, and ETXTBSY for blocks that cannot
 be stored to; EFAULT for a source of NULL.
 */
int mapdirect_memcpy_persist(void *to, const void *from, size_t length);

/*
 What it takes to make stores to a mapping durable: MAPDIRECT_CACHE_FLUSH,
 MAPDIRECT_AUTOMATIC or MAPDIRECT_MSYNC; -1 and EINVAL if none is there.
 */
int mapdirect_durability(const void *address);

/*
 mmap(2) that knows MAP_DIRECT; without that flag it is mmap(2).

 While the mapping exists, nobody can move, free, share or allocate the blocks
 under it: whoever tries gets ETXTBSY. Memory is mapped until mapdirect_munmap,
 exec or exit; a child of fork(2) shares it. The file can be closed.

 Without DAX it fails with EOPNOTSUPP, unless MAPDIRECT_CACHED=1 is in the
 environment, or mapdirect_accept_page_cache(1) was called in this thread.

 EINVAL: MAP_ANONYMOUS, MAP_PRIVATE or MAP_HUGETLB; offset off a page boundary;
 length 0; MAP_FIXED over a pinned mapping. EACCES: no PROT_WRITE; fd not open
 for reading and writing; no CAP_LINUX_IMMUTABLE. EOPNOTSUPP: the filesystem or
 the file cannot keep the promise; no guard; an unknown flag beside
 MAP_SHARED_VALIDATE. ETXTBSY: the block map cannot be brought to rest. EBADF,
 ENODEV, ENOMEM, EOVERFLOW, EEXIST: as mmap(2).
 */
void *mapdirect_mmap(void *address,
                     size_t length,
                     int prot,
                     int flags,
                     int fd,
                     off_t offset);

/*
 munmap(2) that knows the mappings of mapdirect_mmap. It waits until their pins
 are over. Mappings that are in the range must be in it whole: EINVAL for a part
 of one, and nothing is unmapped then. Of other memory it unmaps what munmap(2)
 would.
 */
int mapdirect_munmap(void *address, size_t length);

/*
 Whether mapdirect_mmap in this thread accepts the page cache where there is no
 DAX: 1 yes, 0 no, -1 what MAPDIRECT_CACHED in the environment says (as at
 first).
 */
int mapdirect_accept_page_cache(int accept);

/*
 How long, in milliseconds, calls of this process wait for others who have a file
 open or change it: a tenth of a second at first, a minute at most.
 */
int mapdirect_patience(unsigned int milliseconds);

/*
 Has the guard allocate, initialise and unshare the blocks under length bytes of
 a mapping, while it is pinned: then they can be stored to. EINVAL if they are
 not all in one mapping; ENOSPC; ETXTBSY if somebody else has pinned them.
 */
int mapdirect_allocate(void *address, size_t length);

/*
 Allocates, initialises and unshares every block of length bytes of a file from
 offset on, before it is pinned. Length 0 stands for the rest of the file. Not a
 byte of it changes. Flags: MAPDIRECT_GROW, MAPDIRECT_HUGE. Needs no guard.
 */
int mapdirect_prepare(int fd, off_t offset, uint64_t length, unsigned int flags);

/*
 Whether mapdirect_mmap can map this file: 1, or 0 with errno and words; -1 for a
 descriptor that is none. It maps a page for a moment to find out.
 */
int mapdirect_supported(int fd);

/*
 Pins length bytes of a file from offset on, without mapping them: until
 mapdirect_unpin, their blocks stay where they are. Length 0 stands for the rest
 of the file, and with MAPDIRECT_PIN_STABLE for whatever it grows to. The file
 can be open for reading only, and can be closed. 0 if it fails; errno as
 mapdirect_mmap.
 */
mapdirect_pin mapdirect_pin_fd(int fd, off_t offset, uint64_t length, unsigned int flags);

/*
 Ends a pin. EINVAL if there is none of this number; ETIMEDOUT when the guard has
 not confirmed the end within a second: this process has let go of it then.
 */
int mapdirect_unpin(mapdirect_pin pin);

/*
 The extents under a mapping, extended to whole blocks: fills a buffer of
 capacity records of size bytes (sizeof(struct mapdirect_extent)), and returns
 how many there are, which may be more. -1 if it fails.
 */
ptrdiff_t mapdirect_extents(const void *address,
                            struct mapdirect_extent *extents,
                            size_t capacity,
                            size_t size);

/*
 The same of a pin. One with MAPDIRECT_PIN_STABLE tells what it holds by now.
 */
ptrdiff_t mapdirect_pin_extents(mapdirect_pin pin,
                                struct mapdirect_extent *extents,
                                size_t capacity,
                                size_t size);

/*
 What has become of the pin of a mapping; size is sizeof(struct
 mapdirect_state). If it is not kept, mapdirect_strerror says why.
 */
int mapdirect_status(const void *address, struct mapdirect_state *state, size_t size);

/*
 The same of a pin.
 */
int mapdirect_pin_status(mapdirect_pin pin, struct mapdirect_state *state, size_t size);

/*
 A descriptor for poll(2) that becomes readable when mapdirect_status has news of
 a mapping; reading 8 bytes makes it unreadable. It is the caller's to close.
 */
int mapdirect_event_fd(const void *address);

/*
 The same for a pin.
 */
int mapdirect_pin_event_fd(mapdirect_pin pin);

#ifdef __cplusplus
}  /* extern "C" */
#endif  /* __cplusplus */

#endif  /* MAPDIRECT_H */
