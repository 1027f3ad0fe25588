/* Calls libmapdirect as programs do, and as they should not.
 *
 * checks bad FILE SPARSE            every call with bad input: exact errno, no crash
 * checks use FILE SPARSE            every call as it is meant
 * checks hold FILE                  maps, and does a word a line: store, persist, unmap
 * checks pin FILE                   pins, until a line
 * checks fork FILE                  children and threads
 * checks refused FILE ERRNO         no guard, or one that does not understand
 *
 * Says "done" at the end; what is wrong goes to stderr and ends it. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <mapdirect.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef MAP_SHARED_VALIDATE
#define MAP_SHARED_VALIDATE 3
#endif

#define PAGE 4096UL
#define BOTH (PROT_READ | PROT_WRITE)
#define DIRECT (MAP_SHARED_VALIDATE | MAP_DIRECT)
#define NOWHERE ((char *)0x7ead0000000UL)

#define must(that)                                                                                 \
	do {                                                                                       \
		if (!(that)) {                                                                     \
			fprintf(stderr, "line %d: %s: errno %d: %s\n", __LINE__, #that, errno,     \
				mapdirect_strerror());                                             \
			exit(1);                                                                   \
		}                                                                                  \
	} while (0)

/* Fails with this errno and no other; with words, if they are the library's. */
#define fails(expected, call)                                                                      \
	do {                                                                                       \
		errno = 0;                                                                         \
		must((call) && errno == (expected));                                               \
	} while (0)

#define mmap_fails(expected, address, length, prot, flags, fd, offset)                             \
	fails(expected,                                                                            \
	      mapdirect_mmap(address, length, prot, flags, fd, offset) == MAP_FAILED)

static int opened(const char *path, int mode)
{
	int fd = open(path, mode | O_CLOEXEC);
	must(fd >= 0);
	return fd;
}

static char *mapped(int fd, size_t length)
{
	char *memory = mapdirect_mmap(NULL, length, BOTH, DIRECT, fd, 0);
	must(memory != MAP_FAILED);
	return memory;
}

static void bad(char **paths)
{
	int fd = opened(paths[0], O_RDWR), sparse = opened(paths[1], O_RDWR);
	int closed = fcntl(fd, F_DUPFD, 500), reading, pipes[2];
	struct mapdirect_state state;
	struct mapdirect_extent extent;
	char byte = 0;

	must(closed >= 0 && close(closed) == 0);
	must(pipe(pipes) == 0);
	/* What semantics say of mmap, errno by errno. */
	mmap_fails(EINVAL, NULL, PAGE, BOTH, MAP_PRIVATE | MAP_DIRECT, fd, 0);
	mmap_fails(EINVAL, NULL, PAGE, BOTH, MAP_DIRECT, fd, 0);
	mmap_fails(EINVAL, NULL, PAGE, BOTH, DIRECT | MAP_ANONYMOUS, -1, 0);
	mmap_fails(EINVAL, NULL, PAGE, BOTH, DIRECT | MAP_HUGETLB, fd, 0);
	mmap_fails(EINVAL, NULL, 0, BOTH, DIRECT, fd, 0);
	mmap_fails(EINVAL, NULL, PAGE, BOTH, DIRECT, fd, 1);
	mmap_fails(EINVAL, NULL, PAGE, BOTH, DIRECT, fd, -1);
	mmap_fails(EINVAL, NOWHERE + 1, PAGE, BOTH, DIRECT | MAP_FIXED, fd, 0);
	mmap_fails(EACCES, NULL, PAGE, PROT_READ, DIRECT, fd, 0);
	mmap_fails(EACCES, NULL, PAGE, PROT_NONE, DIRECT, fd, 0);
	/* Closed again: the fanotify gate counts who else has the file open. */
	reading = opened(paths[0], O_RDONLY);
	mmap_fails(EACCES, NULL, PAGE, BOTH, DIRECT, reading, 0);
	mmap_fails(EACCES, NULL, PAGE, BOTH, MAP_SHARED, reading, 0);
	must(mapdirect_supported(reading) == 0 && errno == EACCES);
	must(close(reading) == 0);
	mmap_fails(EOPNOTSUPP, NULL, PAGE, BOTH, DIRECT | 1 << 24, fd, 0);
	mmap_fails(EBADF, NULL, PAGE, BOTH, DIRECT, -1, 0);
	mmap_fails(EBADF, NULL, PAGE, BOTH, DIRECT, -100, 0);
	mmap_fails(EBADF, NULL, PAGE, BOTH, DIRECT, closed, 0);
	mmap_fails(EBADF, NULL, PAGE, BOTH, DIRECT, 1 << 30, 0);
	mmap_fails(EOVERFLOW, NULL, PAGE, BOTH, DIRECT, fd, (off_t)(-PAGE));
	mmap_fails(EOVERFLOW, NULL, 2 * PAGE, BOTH, DIRECT, fd, (off_t)(~0UL / 2 - PAGE + 1));
	mmap_fails(ENOMEM, NULL, ~0UL, BOTH, DIRECT, fd, 0);
	mmap_fails(EACCES, NULL, PAGE, BOTH, DIRECT, pipes[0], 0);
	must(strstr(mapdirect_strerror(), "help:"));
	must(mapdirect_accept_page_cache(0) == 0);
	must(getenv("MAPDIRECT_DAX") ||
	     (mapdirect_mmap(NULL, PAGE, BOTH, DIRECT, fd, 0) == MAP_FAILED &&
	      errno == EOPNOTSUPP && strstr(mapdirect_strerror(), "DAX")));
	must(mapdirect_accept_page_cache(-1) == 0);
	fails(EINVAL, mapdirect_accept_page_cache(2) == -1);
	/* Without the flag it is mmap, and munmap. */
	mmap_fails(EBADF, NULL, PAGE, BOTH, MAP_SHARED, closed, 0);
	char *other = mapdirect_mmap(NULL, PAGE, BOTH, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	must(other != MAP_FAILED);
	memset(other, 1, PAGE);
	must(mapdirect_munmap(other, PAGE) == 0);
	fails(EINVAL, mapdirect_munmap(other + 1, PAGE) == -1);
	fails(EINVAL, mapdirect_munmap(other, 0) == -1);
	/* Addresses and numbers that lead nowhere. */
	char *memory = mapped(fd, 4 * PAGE);
	void *nowhere[] = {NULL, (void *)1, memory - 1, memory + 4 * PAGE, (void *)~0UL};
	for (size_t at = 0; at < sizeof(nowhere) / sizeof(*nowhere); at++) {
		fails(EINVAL, mapdirect_persist(nowhere[at], 1) == -1);
		fails(EINVAL, mapdirect_flush(nowhere[at], 1) == -1);
		fails(EINVAL, mapdirect_memcpy_persist(nowhere[at], &byte, 1) == -1);
		fails(EINVAL, mapdirect_durability(nowhere[at]) == -1);
		fails(EINVAL, mapdirect_allocate(nowhere[at], 1) == -1);
		fails(EINVAL, mapdirect_status(nowhere[at], &state, sizeof(state)) == -1);
		fails(EINVAL, mapdirect_extents(nowhere[at], &extent, 1, sizeof(extent)) == -1);
		fails(EINVAL, mapdirect_event_fd(nowhere[at]) == -1);
		mapdirect_pin pin = (mapdirect_pin)(size_t)nowhere[at];
		fails(EINVAL, mapdirect_unpin(pin) == -1);
		fails(EINVAL, mapdirect_pin_status(pin, &state, sizeof(state)) == -1);
		fails(EINVAL, mapdirect_pin_extents(pin, &extent, 1, sizeof(extent)) == -1);
		fails(EINVAL, mapdirect_pin_event_fd(pin) == -1);
	}
	/* Lengths that leave the mapping. */
	fails(EINVAL, mapdirect_persist(memory, 4 * PAGE + 1) == -1);
	fails(EINVAL, mapdirect_persist(memory + 1, ~0UL) == -1);
	fails(EINVAL, mapdirect_flush(memory + 4 * PAGE - 1, 2) == -1);
	fails(EINVAL, mapdirect_memcpy_persist(memory + 1, memory, ~0UL) == -1);
	fails(EINVAL, mapdirect_memcpy_persist(memory + 4 * PAGE - 1, paths, 2) == -1);
	fails(EINVAL, mapdirect_allocate(memory, 4 * PAGE + 1) == -1);
	fails(EINVAL, mapdirect_allocate(memory + 1, ~0UL) == -1);
	/* Buffers that are none. */
	fails(EFAULT, mapdirect_memcpy_persist(memory, NULL, 1) == -1);
	fails(EFAULT, mapdirect_status(memory, NULL, sizeof(state)) == -1);
	fails(EFAULT, mapdirect_extents(memory, NULL, 1, sizeof(extent)) == -1);
	fails(EINVAL, mapdirect_status(memory, &state, 4) == -1);
	fails(EINVAL, mapdirect_extents(memory, &extent, 1, sizeof(extent) - 1) == -1);
	must(mapdirect_extents(memory, NULL, 0, sizeof(extent)) >= 1);
	/* Parts of a mapping, and things over it. */
	fails(EINVAL, mapdirect_munmap(memory, PAGE) == -1);
	fails(EINVAL, mapdirect_munmap(memory + PAGE, PAGE) == -1);
	fails(EINVAL, mapdirect_munmap(memory + PAGE, 8 * PAGE) == -1);
	mmap_fails(EINVAL, memory + PAGE, PAGE, BOTH, DIRECT | MAP_FIXED, fd, 0);
	mmap_fails(EINVAL, memory, 4 * PAGE, BOTH, MAP_SHARED | MAP_FIXED, fd, 0);
	mmap_fails(EINVAL, memory + PAGE, PAGE, BOTH, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	mmap_fails(EEXIST, memory, PAGE, BOTH, DIRECT | MAP_FIXED_NOREPLACE, fd, 0);
	must(mapdirect_status(memory, &state, sizeof(state)) == 0 && state.state == MAPDIRECT_KEPT);
	must(mapdirect_munmap(memory, 4 * PAGE - 5) == 0);
	fails(EINVAL, mapdirect_persist(memory, 1) == -1);
	/* Pins. */
	must(mapdirect_pin_fd(-1, 0, 0, 0) == 0 && errno == EBADF);
	must(mapdirect_pin_fd(closed, 0, 0, 0) == 0 && errno == EBADF);
	must(mapdirect_pin_fd(fd, -1, 1, 0) == 0 && errno == EOVERFLOW);
	must(mapdirect_pin_fd(fd, 1, ~0UL, 0) == 0 && errno == EOVERFLOW);
	must(mapdirect_pin_fd(fd, 1L << 40, 0, 0) == 0 && errno == EINVAL);
	must(mapdirect_pin_fd(fd, 0, 0, 1u << 31) == 0 && errno == EINVAL);
	must(mapdirect_pin_fd(fd, 1, 1, MAPDIRECT_PIN_FILE) == 0 && errno == EINVAL);
	mapdirect_pin pin = mapdirect_pin_fd(fd, 0, PAGE, 0);
	must(pin && mapdirect_unpin(pin) == 0);
	fails(EINVAL, mapdirect_unpin(pin) == -1);
	/* Preparing. */
	fails(EBADF, mapdirect_prepare(closed, 0, 0, 0) == -1);
	fails(EINVAL, mapdirect_prepare(fd, 0, 0, 64) == -1);
	fails(EOVERFLOW, mapdirect_prepare(fd, -5, 1, 0) == -1);
	fails(EBADF, mapdirect_supported(closed) == -1);
	/* What cannot be stored to says so. */
	memory = mapped(sparse, 4 * PAGE);
	fails(ETXTBSY, mapdirect_memcpy_persist(memory + PAGE, &byte, 1) == -1);
	must(mapdirect_persist(memory, 4 * PAGE) == 0);
	must(mapdirect_munmap(memory, 4 * PAGE) == 0);
}

static void use(char **paths)
{
	int fd = opened(paths[0], O_RDWR), sparse = opened(paths[1], O_RDWR);
	struct mapdirect_state state;
	struct {
		struct mapdirect_extent extent;
		uint64_t later[2];
	} longer[8];
	struct {
		struct mapdirect_state state;
		uint64_t later;
	} newer;
	char bytes[100], there[100];

	must(*mapdirect_strerror() == 0);
	must(mapdirect_supported(fd) == 1);
	char *memory = mapped(fd, 8 * PAGE);
	int durability = mapdirect_durability(memory + 5 * PAGE + 7);
	must(durability >= MAPDIRECT_CACHE_FLUSH && durability <= MAPDIRECT_MSYNC);
	for (int round = 0; round < 3; round++) {
		memset(memory + 100, round + 1, 100);
		must(mapdirect_persist(memory + 100, 100) == 0);
		must(pread(fd, there, 100, 100) == 100 && !memcmp(there, memory + 100, 100));
		memset(bytes, round + 50, sizeof(bytes));
		must(mapdirect_memcpy_persist(memory + PAGE - 3, bytes, sizeof(bytes)) == 0);
		must(pread(fd, there, 100, PAGE - 3) == 100 && !memcmp(there, bytes, 100));
		memory[2 * PAGE] = 9;
		must(mapdirect_flush(memory + 2 * PAGE, 1) == 0);
		must(mapdirect_flush(memory + 8 * PAGE - 1, 1) == 0);
		must(mapdirect_drain() == 0);
		must(mapdirect_persist(memory, 0) == 0);
	}
	/* Structures of this version and of a later one. */
	must(mapdirect_status(memory, &state, sizeof(state)) == 0);
	must(state.state == MAPDIRECT_KEPT && state.durability == (uint32_t)durability);
	must(state.start == 0 && state.end >= 8 * PAGE && state.breaches == 0 && state.pin);
	memset(&newer, 0xff, sizeof(newer));
	must(mapdirect_status(memory, &newer.state, sizeof(newer)) == 0);
	must(newer.later == 0 && newer.state.pin == state.pin);
	memset(longer, 0xff, sizeof(longer));
	ptrdiff_t count = mapdirect_extents(memory, &longer[0].extent, 8, sizeof(*longer));
	must(count >= 1 && longer[0].later[1] == 0 && longer[0].extent.offset == 0);
	must(longer[0].extent.state == MAPDIRECT_WRITTEN);
	must(longer[0].extent.physical != MAPDIRECT_NOWHERE);
	must(count < 8 && longer[count].later[1] == ~0UL);
	int event = mapdirect_event_fd(memory);
	struct pollfd waiting = {event, POLLIN, 0};
	must(event >= 0 && poll(&waiting, 1, 0) == 0 && close(event) == 0);
	must(mapdirect_munmap(memory, 8 * PAGE) == 0);
	/* One call for two mappings and what lies between. */
	char *place = mmap(NULL, 8 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	must(place != MAP_FAILED);
	for (int at = 1; at < 8; at += 4) {
		must(munmap(place + at * PAGE, 2 * PAGE) == 0);
		char *there_too = mapdirect_mmap(place + at * PAGE, 2 * PAGE, BOTH,
						 DIRECT | MAP_FIXED_NOREPLACE, fd, 0);
		must(there_too == place + at * PAGE);
		there_too[PAGE] = 1;
	}
	must(mapdirect_munmap(place, 8 * PAGE) == 0);
	for (int at = 0; at < 8; at++)
		must(mprotect(place + at * PAGE, PAGE, PROT_NONE) == -1 && errno == ENOMEM);
	/* MAP_FIXED over other memory. */
	place = mmap(NULL, 4 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	must(mapdirect_mmap(place + PAGE, PAGE, BOTH, DIRECT | MAP_FIXED, fd, PAGE) == place + PAGE);
	must(mapdirect_munmap(place, 4 * PAGE) == 0);
	/* What is frozen can be allocated under the pin. */
	memory = mapped(sparse, 4 * PAGE);
	must(mapdirect_allocate(memory + PAGE + 1, 1) == 0);
	memory[PAGE] = 5;
	must(mapdirect_persist(memory + PAGE, 1) == 0);
	must(mapdirect_munmap(memory, 4 * PAGE) == 0);
	must(mapdirect_prepare(sparse, 0, 6 * PAGE, MAPDIRECT_GROW) == 0);
	struct stat stat;
	must(fstat(sparse, &stat) == 0 && stat.st_size == 6 * PAGE);
	/* A pin without a mapping. */
	mapdirect_pin pin = mapdirect_pin_fd(sparse, 0, 0, 0);
	must(pin);
	count = mapdirect_pin_extents(pin, &longer[0].extent, 8, sizeof(*longer));
	must(count >= 1 && longer[0].extent.state == MAPDIRECT_WRITTEN);
	must(mapdirect_pin_status(pin, &state, sizeof(state)) == 0);
	must(state.state == MAPDIRECT_KEPT && state.durability == 0 && state.end == 6 * PAGE);
	event = mapdirect_pin_event_fd(pin);
	must(event >= 0 && close(event) == 0);
	must(ftruncate(sparse, PAGE) == -1 && errno == ETXTBSY);
	must(mapdirect_unpin(pin) == 0);
	pin = mapdirect_pin_fd(sparse, 0, 0, MAPDIRECT_PIN_STABLE);
	must(pin && mapdirect_pin_status(pin, &state, sizeof(state)) == 0 && state.end == ~0UL);
	must(ftruncate(sparse, 7 * PAGE) == 0);
	must(ftruncate(sparse, PAGE) == -1 && errno == ETXTBSY);
	must(mapdirect_unpin(pin) == 0);
	must(ftruncate(sparse, PAGE) == 0);
}

static void hold(char **paths)
{
	char line[64], *memory;
	int fd = opened(paths[0], O_RDWR);
	struct mapdirect_state state;

	memory = mapped(fd, 4 * PAGE);
	close(fd);
	printf("mapped\n");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		if (!strcmp(line, "store\n")) {
			memset(memory, 0x5a, 4 * PAGE);
			must(mapdirect_persist(memory, 4 * PAGE) == 0);
		} else if (!strcmp(line, "unmap\n")) {
			must(mapdirect_munmap(memory, 4 * PAGE) == 0);
		} else if (!strcmp(line, "lost\n")) {
			int event = mapdirect_event_fd(memory);
			struct pollfd waiting = {event, POLLIN, 0};
			must(event >= 0 && poll(&waiting, 1, 30000) == 1);
			must(mapdirect_status(memory, &state, sizeof(state)) == 0);
			must(state.state != MAPDIRECT_KEPT && *mapdirect_strerror());
			must(close(event) == 0);
			must(mapdirect_munmap(memory, 4 * PAGE) == 0);
		}
		printf("done\n");
		fflush(stdout);
	}
}

static void hold_pin(char **paths)
{
	char line[64];
	int fd = opened(paths[0], O_RDONLY);
	mapdirect_pin pin = mapdirect_pin_fd(fd, 0, 0, 0);

	must(pin && close(fd) == 0);
	printf("pinned\n");
	fflush(stdout);
	must(fgets(line, sizeof(line), stdin));
	must(mapdirect_unpin(pin) == 0);
}

static char *of_all;
static volatile int over;

static void *persisting(void *shared)
{
	int fd = *(int *)shared;

	while (!over) {
		must(mapdirect_persist(of_all, 8) == 0);
		char *own = mapped(fd, PAGE);
		own[0]++;
		must(mapdirect_flush(own, 1) == 0 && mapdirect_drain() == 0);
		must(mapdirect_munmap(own, PAGE) == 0);
	}
	return NULL;
}

static void forks(char **paths)
{
	pthread_t threads[3];
	int fd = opened(paths[0], O_RDWR), status;
	struct mapdirect_state state;

	of_all = mapped(fd, 2 * PAGE);
	for (int at = 0; at < 3; at++)
		must(!pthread_create(&threads[at], NULL, persisting, &fd));
	for (int round = 0; round < 40; round++) {
		usleep(1000 * (round % 7));
		pid_t child = fork();
		must(child >= 0);
		if (child == 0) {
			alarm(60);
			of_all[16] = (char)round;
			/* A thread of the parent may have been in the middle of this. */
			must(mapdirect_persist(of_all, 2 * PAGE) == 0);
			if (round % 8 == 0)
				must(!mapdirect_status(of_all, &state, sizeof(state)));
			must(mapdirect_munmap(of_all, 2 * PAGE) == 0);
			fails(EINVAL, mapdirect_persist(of_all, 1) == -1);
			if (round % 8 == 0) {
				char *own = mapped(fd, PAGE);
				must(mapdirect_munmap(own, PAGE) == 0);
			}
			_exit(0);
		}
		must(waitpid(child, &status, 0) == child && status == 0);
	}
	over = 1;
	for (int at = 0; at < 3; at++)
		must(!pthread_join(threads[at], NULL));
	must(mapdirect_munmap(of_all, 2 * PAGE) == 0);
}

static void refused(char **paths)
{
	int fd = opened(paths[0], O_RDWR), expected = atoi(paths[1]);

	mmap_fails(expected, NULL, PAGE, BOTH, DIRECT, fd, 0);
	must(strstr(mapdirect_strerror(), "cannot map"));
	must(mapdirect_pin_fd(fd, 0, 0, 0) == 0 && errno == expected);
	must(mapdirect_supported(fd) == 0 && errno == expected);
	printf("%s\n", strrchr(mapdirect_strerror(), '\n') + 1);
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		void (*run)(char **);
	} checks[] = {{"bad", bad},	  {"use", use},	    {"hold", hold},
		      {"pin", hold_pin}, {"fork", forks}, {"refused", refused}};

	if (argc < 3)
		return 2;
	/* The machine may be busy. */
	must(mapdirect_patience(20000) == 0);
	for (size_t at = 0; at < sizeof(checks) / sizeof(*checks); at++)
		if (!strcmp(argv[1], checks[at].name)) {
			checks[at].run(argv + 2);
			printf("done\n");
			return 0;
		}
	return 2;
}
