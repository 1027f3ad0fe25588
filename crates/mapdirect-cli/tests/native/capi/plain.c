/* mmap(2) with MAP_DIRECT by a program that knows of no library; what makes that
 * work is linked, or in LD_PRELOAD.
 *
 * plain use FILE SPARSE     maps, moves, protects, forks, runs, loads
 * plain hold FILE           maps, and waits for a line
 * plain cost ROUNDS         nanoseconds per mmap and munmap without the flag, and of
 *                           the C library's own, a turn a line */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef MAP_SHARED_VALIDATE
#define MAP_SHARED_VALIDATE 3
#endif
#define MAP_DIRECT 0x2000000
#define PAGE 4096UL
#define BOTH (PROT_READ | PROT_WRITE)
#define DIRECT (MAP_SHARED_VALIDATE | MAP_DIRECT)

#define must(that)                                                                                 \
	do {                                                                                       \
		if (!(that)) {                                                                     \
			fprintf(stderr, "line %d: %s: errno %d\n", __LINE__, #that, errno);        \
			exit(1);                                                                   \
		}                                                                                  \
	} while (0)

/* The machine may be busy, and the guard then has no time to look. */
static char *pinned(int fd)
{
	void *memory;

	for (int tries = 0; tries < 200; tries++) {
		memory = mmap(NULL, 4 * PAGE, BOTH, DIRECT, fd, 0);
		if (memory != MAP_FAILED || errno != ETXTBSY)
			break;
		usleep(100000);
	}
	must(memory != MAP_FAILED);
	return memory;
}

static void *early, *earliest;

static void *anonymous(size_t length)
{
	return mmap(NULL, length, BOTH, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

static void before_all(void)
{
	earliest = anonymous(PAGE);
}

__attribute__((section(".preinit_array"), used)) static void (*const first)(void) = before_all;

__attribute__((constructor(101))) static void constructed(void)
{
	early = anonymous(3 * PAGE);
	if (early != MAP_FAILED)
		munmap((char *)early + PAGE, PAGE);
}

static volatile int over;

static void *allocating(void *unused)
{
	(void)unused;
	while (!over) {
		/* Large enough for the allocator to map it. */
		char *memory = malloc(1 << 20);
		must(memory);
		memory[1 << 19] = 1;
		free(memory);
		char *own = anonymous(4 * PAGE);
		must(own != MAP_FAILED);
		own[0] = 1;
		must(munmap(own + PAGE, PAGE) == 0 && munmap(own, 4 * PAGE) == 0);
	}
	return NULL;
}

/* The signal that a store ends a child by. */
static int store_ends_by(char *at)
{
	int status;
	pid_t child = fork();
	must(child >= 0);
	if (child == 0) {
		signal(SIGBUS, SIG_DFL);
		*at = 1;
		_exit(0);
	}
	must(waitpid(child, &status, 0) == child);
	return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
}

static void use(char **argv)
{
	pthread_t threads[2];
	int status, fd = open(argv[2], O_RDWR | O_CLOEXEC), sparse = open(argv[3], O_RDWR);
	must(fd >= 0 && sparse >= 0);
	must(earliest && earliest != MAP_FAILED && early && early != MAP_FAILED);
	for (int at = 0; at < 2; at++)
		must(!pthread_create(&threads[at], NULL, allocating, NULL));
	must(mmap(NULL, PAGE, BOTH, MAP_PRIVATE | MAP_DIRECT, fd, 0) == MAP_FAILED);
	must(errno == EINVAL);
	must(mmap64(NULL, PAGE, PROT_READ, DIRECT, fd, 0) == MAP_FAILED && errno == EACCES);
	char *memory = pinned(fd);
	must(ftruncate(fd, PAGE) == -1 && errno == ETXTBSY);
	/* Sizes and places. */
	must(mremap(memory, 4 * PAGE, 8 * PAGE, MREMAP_MAYMOVE) == MAP_FAILED && errno == EINVAL);
	must(mremap(memory, 4 * PAGE, 2 * PAGE, 0) == MAP_FAILED && errno == EINVAL);
	must(mremap(memory, 0, PAGE, MREMAP_MAYMOVE) == MAP_FAILED && errno == EINVAL);
	must(mremap(memory + PAGE, PAGE, PAGE, 0) == memory + PAGE);
	char *other = anonymous(2 * PAGE);
	must(other != MAP_FAILED);
	must(mremap(memory, 4 * PAGE, 4 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, other) == MAP_FAILED);
	must(errno == EINVAL);
	must(mremap(other, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, memory) == MAP_FAILED);
	must(errno == EINVAL);
	other[5] = 5;
	other = mremap(other, 2 * PAGE, 64 * PAGE, MREMAP_MAYMOVE);
	must(other != MAP_FAILED && other[5] == 5);
	must(munmap(memory + PAGE, PAGE) == -1 && errno == EINVAL);
	must(mmap(memory, PAGE, BOTH, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED);
	must(errno == EINVAL);
	must(mmap(other, PAGE, BOTH, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == other);
	must(other[5] == 0 && munmap(other, 64 * PAGE) == 0);
	/* Protection. */
	must(mprotect(memory, PAGE, PROT_READ) == 0 && store_ends_by(memory) == SIGSEGV);
	must(mprotect(memory, PAGE, BOTH) == 0 && store_ends_by(memory) == 0);
	char *holes = pinned(sparse);
	must(store_ends_by(holes + PAGE) == SIGBUS);
	must(mprotect(holes, 4 * PAGE, PROT_READ) == 0);
	must(mprotect(holes, 4 * PAGE, BOTH | PROT_EXEC) == 0);
	must(holes[PAGE] == 0 && store_ends_by(holes + PAGE) == SIGBUS && store_ends_by(holes) == 0);
	/* Libraries, children, programs. */
	void *library = dlopen("libm.so.6", RTLD_NOW | RTLD_LOCAL);
	must(library && dlsym(library, "cos") && dlclose(library) == 0);
	for (int round = 0; round < 20; round++) {
		pid_t child = fork();
		must(child >= 0);
		if (child == 0) {
			alarm(60);
			memory[100] = 1;
			free(malloc(1 << 20));
			must(munmap(memory + PAGE, PAGE) == -1 && errno == EINVAL);
			must(munmap(memory, 4 * PAGE) == 0 && munmap(holes, 4 * PAGE) == 0);
			if (round == 0)
				execl("/proc/self/exe", "plain", "hold-nothing", argv[2], (char *)0);
			_exit(round == 0);
		}
		must(waitpid(child, &status, 0) == child && status == 0);
	}
	must(ftruncate(fd, PAGE) == -1 && errno == ETXTBSY);
	over = 1;
	for (int at = 0; at < 2; at++)
		must(!pthread_join(threads[at], NULL));
	must(munmap(memory, 4 * PAGE) == 0 && munmap(holes, 4 * PAGE) == 0);
	must(ftruncate(fd, 8 * PAGE) == 0);
}

typedef void *map_call(void *, size_t, int, int, int, off_t);
typedef int unmap_call(void *, size_t);

static double turn(map_call *map, unmap_call *unmap, long rounds)
{
	struct timespec from, to;

	clock_gettime(CLOCK_MONOTONIC, &from);
	for (long at = 0; at < rounds; at++) {
		/* Of no access, so that the kernel does not join it to its neighbours. */
		char *memory = map(NULL, 16 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		must(memory != MAP_FAILED && unmap(memory, 16 * PAGE) == 0);
	}
	clock_gettime(CLOCK_MONOTONIC, &to);
	double taken = (to.tv_sec - from.tv_sec) * 1e9 + (to.tv_nsec - from.tv_nsec);
	return taken / (double)rounds;
}

/* The program's mmap and munmap, and those of the C library, in turns. */
static void cost(long rounds)
{
	void *library = dlopen("libc.so.6", RTLD_NOW);
	must(library);
	map_call *map = (map_call *)dlsym(library, "mmap");
	unmap_call *unmap = (unmap_call *)dlsym(library, "munmap");
	must(map && unmap && map != mmap);
	for (int at = 0; at < 1001; at++) {
		double ours, peer;
		if (at % 2) {
			ours = turn(mmap, munmap, rounds);
			peer = turn(map, unmap, rounds);
		} else {
			peer = turn(map, unmap, rounds);
			ours = turn(mmap, munmap, rounds);
		}
		printf("%.2f %.2f\n", ours, peer);
	}
}

int main(int argc, char **argv)
{
	char line[64];

	if (argc < 3)
		return 2;
	if (!strcmp(argv[1], "use")) {
		use(argv);
	} else if (!strcmp(argv[1], "cost")) {
		cost(atol(argv[2]));
		return 0;
	} else if (!strcmp(argv[1], "hold")) {
		int fd = open(argv[2], O_RDWR);
		char *memory = pinned(fd);
		must(close(fd) == 0);
		printf("mapped\n");
		fflush(stdout);
		must(fgets(line, sizeof(line), stdin));
		memset(memory, 0x5a, 4 * PAGE);
		must(msync(memory, 4 * PAGE, MS_SYNC) == 0 && munmap(memory, 4 * PAGE) == 0);
	}
	if (strcmp(argv[1], "hold-nothing"))
		printf("done\n");
	return 0;
}
